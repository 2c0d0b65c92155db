# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""The HTTP endpoints of the server, in OpenAI's form, and the limit of request sizes; needs the `serve` extra.

Every refusal is a 4xx in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, and costs no generation.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse
from starlette.exceptions import HTTPException

from .engine import Engine
from .openai_schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    parse,
    render_error,
)
from .server import Server
from .tools import marks_calls, takes_tools


class BodyLimit:
    """Refuse a request body above `limit` bytes, whether or not it announces its length, before it is parsed."""

    def __init__(self, app, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        body, more = b"", announced.isdigit() and int(announced) <= self.limit
        refused = not more
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if message["type"] == "http.disconnect" or len(body) > self.limit:
                refused = len(body) > self.limit
                break
        if refused:
            error = ApiError(413, f"The request is larger than {self.limit} bytes; shorten it.", code="too_large")
            return await render_error(error)(scope, receive, send)
        sent = False

        async def replay():
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        return await self.app(scope, replay, send)


class Measured:
    """Count responses and their seconds. FastAPI's own middleware would hide from an answer that its client left."""

    def __init__(self, app, server: Server):
        self.app, self.server = app, server

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start, status = time.monotonic(), 500

        async def noted(message):
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            self.server.responses[status] += 1
            self.server.seconds += time.monotonic() - start


async def accepted(server: Server, request: Request, kind):
    """The body of an authorized request, and the engine that it asks for."""
    server.authorize(request)
    body = await parse(request, kind)
    engine = server.find(body.model)
    server.check(body)
    return body, engine


def create_app(
    engine: Engine, api_key: str | None = None, body_limit: int = 1 << 20, adapters: Sequence[Engine] = ()
) -> FastAPI:
    """Build the application.

    Args:
        engine (`Engine`): the model; closed when the application stops.
        api_key (`str`, *optional*): bearer token to ask for.
        body_limit (`int`, *optional*, defaults to 1 MiB): largest request, in bytes.
        adapters (sequence of `Engine`, *optional*): of its adapters, chosen by their names; closed with it.
    """
    server = Server([engine, *adapters], api_key)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        for served in (engine, *adapters):
            await asyncio.to_thread(served.close)

    app = FastAPI(title="Flash-Lite", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server

    app.add_middleware(BodyLimit, limit=body_limit)

    # added last, so that it also counts requests refused by the limit
    app.add_middleware(Measured, server=server)

    @app.exception_handler(ApiError)
    async def on_api_error(request, error):
        return render_error(error)

    @app.exception_handler(HTTPException)
    async def on_http_error(request, error):
        return render_error(ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}"))

    @app.exception_handler(Exception)
    async def on_bug(request, error):
        return render_error(ApiError(500, "The server failed on this request."))

    @app.get("/health")
    async def health():
        return {"status": "ok", "model": engine.name, "waiting": engine.waiting}

    @app.get("/metrics")
    async def metrics(request: Request):
        server.authorize(request)
        return PlainTextResponse(server.metrics())

    def card(name: str) -> dict:
        return {"id": name, "object": "model", "created": server.started, "owned_by": "flashlite"}

    @app.get("/v1/models")
    async def models(request: Request):
        server.authorize(request)
        return {"object": "list", "data": [card(name) for name in server.engines]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str):
        server.authorize(request)
        return card(server.find(name).name)

    @app.post("/v1/completions")
    async def completions(request: Request):
        body, engine = await accepted(server, request, CompletionRequest)
        prompts = body.prompts()
        if len(prompts) > engine.limits.choices:
            raise ApiError(400, f"{len(prompts)} prompts are above the limit of {engine.limits.choices}.", "prompt")
        if not prompts:
            raise ApiError(400, "prompt is empty; give at least one.", "prompt")
        ids = prompts if isinstance(prompts[0], list) else await asyncio.to_thread(engine.encode, prompts)
        answers = await server.submit(engine, ids, body, "prompt")
        return await server.answer(request, engine, answers, body, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        body, engine = await accepted(server, request, ChatRequest)
        tools, messages = body.offered(), [message.plain() for message in body.messages]
        template = "" if engine.tokenizer.chat_template is None else engine.tokenizer.get_chat_template(tools=tools)
        if tools and not takes_tools(template):
            message = f"The chat template of {engine.name} has no tools; leave them out."
            raise ApiError(400, message, "tools", "unsupported_value")
        try:
            prompt = await asyncio.to_thread(engine.encode_chat, messages, tools)
        except ValueError as error:
            raise ApiError(400, str(error), "messages") from None
        calls = bool(tools) and marks_calls(template)
        if body.demanded() and not calls:
            message = f"tool_choice needs a chat template with <tool_call>, which {engine.name} has not; leave it out."
            raise ApiError(400, message, "tool_choice", "unsupported_value")
        answers = await server.submit(engine, [prompt], body, "messages")
        return await server.answer(request, engine, answers, body, chat=True, calls=calls)

    return app
