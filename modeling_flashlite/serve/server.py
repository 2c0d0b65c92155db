# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""An HTTP server that speaks OpenAI's completions API: needs the `serve` extra (fastapi, uvicorn).

Every refusal is a 4xx in OpenAI's shape, `{"error": {"message", "type", "param", "code"}}`, and costs no generation.
"""

import asyncio
import contextlib
import hmac
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from jinja2 import TemplateError
from starlette.exceptions import HTTPException

from .engine import Engine
from .jobs import Job, QueueFull, Settings
from .openai_schema import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    Sampling,
    StreamOptions,
    chat_logprobs,
    completion_logprobs,
    event,
    parse,
    render_error,
    usage,
)

STATUS_OF_REASON = {"timeout": 408, "cancelled": 408, "error": 500}


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


class Server:
    """The endpoints over one engine.

    Args:
        engine (`Engine`): the model.
        api_key (`str`, *optional*): if given, `/v1/*` and `/metrics` ask for it as a bearer token.
    """

    def __init__(self, engine: Engine, api_key: str | None = None):
        self.engine, self.api_key = engine, api_key
        self.started = int(time.time())
        self.responses: Counter = Counter()
        self.seconds = 0.0

    def authorize(self, request: Request) -> None:
        """Refuse a request without the key; the comparison takes the same time for every wrong one."""
        if self.api_key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), self.api_key.encode()):
            raise ApiError(401, "Incorrect API key provided; send it as a bearer token.", code="invalid_api_key")

    def check(self, body: Sampling) -> None:
        """Refuse another model, and fields whose values this server cannot honour."""
        if body.model not in (None, self.engine.name):
            raise ApiError(
                404,
                f"The model '{body.model[:100]}' does not exist; this is {self.engine.name}.",
                "model",
                "model_not_found",
            )
        unread = [name for name in ("logit_bias", "suffix", "tools", "functions") if getattr(body, name, None)]
        for name in (*unread, *body.unread()):
            message = f"{name[:100]} is not supported by this server; leave it out."
            raise ApiError(400, message, name[:100], "unsupported_value")
        for name in ("logprobs", "echo"):
            if body.stream and getattr(body, name, None):
                raise ApiError(400, f"{name} is not supported in streams; leave it out.", name, "unsupported_value")
        if getattr(body, "top_logprobs", None) and not getattr(body, "logprobs", None):
            raise ApiError(400, "top_logprobs needs logprobs to be true.", "top_logprobs")
        if (getattr(body, "best_of", None) or 1) > (body.n or 1):
            raise ApiError(400, "best_of above n is not supported by this server.", "best_of", "unsupported_value")
        if (getattr(body, "response_format", None) or {"type": "text"}).get("type") != "text":
            raise ApiError(400, "response_format must be text.", "response_format", "unsupported_value")

    def settings(self, body: Sampling) -> Settings:
        """Settings of the request's first choice; `None` means OpenAI's default."""
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stop) > 4 or not all(0 < len(text) <= 200 for text in stop):
            raise ApiError(400, "stop takes at most 4 texts of 1 to 200 characters.", "stop")
        limit = self.engine.limits.new_tokens
        asked = getattr(body, "max_completion_tokens", None) or body.max_tokens or min(256, limit)
        if asked > limit:
            raise ApiError(400, f"max_tokens is {asked}, the limit is {limit}; ask for less.", "max_tokens")
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
        given = {name: getattr(body, name) for name in names} | {"top_k": body.top_k and max(body.top_k, 0)}
        return Settings(
            max_tokens=asked,
            stop=stop,
            seed=body.seed,
            logprobs=body.likeliest(),
            echo=bool(getattr(body, "echo", None)),
            **{k: v for k, v in given.items() if v is not None},
        )

    def submit(self, prompts: list[list[int]], body: Sampling, param: str) -> list[Job]:
        """Queue `n` answers to each prompt, or none at all."""
        base, count = self.settings(body), body.n or 1
        if len(prompts) * count > self.engine.limits.choices:
            limit = self.engine.limits.choices
            raise ApiError(400, f"{len(prompts)} prompts times n = {count} is above the limit of {limit}.", "n")
        jobs: list[Job] = []
        try:
            for prompt in prompts:
                for choice in range(count):
                    # choices of one request differ, and each can be had again
                    seed = None if base.seed is None else (base.seed + choice) % 2**63
                    jobs.append(self.engine.submit(prompt, Settings(**{**vars(base), "seed": seed})))
        except (ValueError, QueueFull) as error:
            for job in jobs:
                job.cancelled = True
            if isinstance(error, QueueFull):
                raise ApiError(429, str(error), code="rate_limit_exceeded") from None
            code = "context_length_exceeded" if "limit" in str(error) else None
            raise ApiError(400, str(error), param, code) from None
        return jobs

    async def answer(self, request: Request, jobs: list[Job], body: Sampling, chat: bool) -> Response:
        """Wait for the jobs, or stream them."""
        frame = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self.engine.name,
        }
        if body.stream:
            events = self.stream(jobs, frame, chat, body)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        texts = await self.gather(request, jobs)
        decode = self.engine.tokenizer.decode
        choices = []
        for index, (text, job) in enumerate(zip(texts, jobs)):
            if job.settings.echo:
                text = decode(job.prompt) + text
            choices.append(self.choice(index, text, job, chat))
        return JSONResponse({**frame, "choices": choices, "usage": usage(jobs, body.n or 1)})

    async def gather(self, request: Request, jobs: list[Job]) -> list[str]:
        """Collect the complete texts; cancel the jobs when the client disconnects."""
        waiting = asyncio.gather(*(asyncio.to_thread("".join, job) for job in jobs))
        try:
            while not waiting.done():
                await asyncio.wait([waiting], timeout=0.5)
                if not waiting.done() and await request.is_disconnected():
                    break
        finally:
            for job in jobs:
                job.cancelled = job.finish_reason is None
        texts = await waiting
        for job in jobs:
            if status := STATUS_OF_REASON.get(job.finish_reason or "error"):
                raise ApiError(
                    status, f"The answer was not finished ({job.finish_reason}); try again or ask for less."
                )
        return texts

    async def stream(self, jobs: list[Job], frame: dict, chat: bool, body: Sampling) -> AsyncIterator[str]:
        """Server-sent events: pieces of all choices as they come, their ends, optionally usage, and `[DONE]`."""
        options = body.stream_options or StreamOptions()
        frame = {**frame, "object": "chat.completion.chunk" if chat else "text_completion"}
        queue: asyncio.Queue = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def forward(index: int, job: Job) -> None:
            for piece in job:
                loop.call_soon_threadsafe(queue.put_nowait, (index, piece))
            loop.call_soon_threadsafe(queue.put_nowait, (index, None))

        readers = [asyncio.create_task(asyncio.to_thread(forward, i, job)) for i, job in enumerate(jobs)]
        extra = {"usage": None} if options.include_usage else {}
        try:
            if chat:
                for index in range(len(jobs)):
                    opening = {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                    yield event({**frame, "choices": [opening], **extra})
            open_jobs = len(jobs)
            while open_jobs:
                index, piece = await queue.get()
                open_jobs -= piece is None
                reason = jobs[index].finish_reason if piece is None else None
                if reason in STATUS_OF_REASON:
                    message = f"The answer was not finished ({reason}); try again or ask for less."
                    yield event({"error": {"message": message, "type": "server_error", "param": None, "code": reason}})
                    continue
                yield event({**frame, "choices": [self.chunk(index, piece, reason, chat)], **extra})
            if options.include_usage:
                yield event({**frame, "choices": [], "usage": usage(jobs, body.n or 1)})
            yield "data: [DONE]\n\n"
        finally:
            for job in jobs:
                job.cancelled = job.finish_reason is None
            await asyncio.gather(*readers)

    def choice(self, index: int, text: str, job: Job, chat: bool) -> dict:
        """One finished answer."""
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        logprobs = None
        if job.settings.logprobs is not None:
            shape = chat_logprobs if chat else completion_logprobs
            logprobs = shape(job.logprobs, self.engine.tokenizer)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": job.finish_reason}

    @staticmethod
    def chunk(index: int, piece: str | None, reason: str | None, chat: bool) -> dict:
        """One piece of a stream."""
        said = {"delta": {} if piece is None else {"content": piece}} if chat else {"text": piece or ""}
        return {"index": index, **said, "logprobs": None, "finish_reason": reason}

    def metrics(self) -> str:
        """Counters in Prometheus' text format."""
        lines = [f'flashlite_responses_total{{status="{status}"}} {n}' for status, n in sorted(self.responses.items())]
        names = ["prompt_tokens", "generated_tokens", "shared_prompt_tokens", "batches", "batched_answers"]
        names.append("failed_batches")
        lines += [f"flashlite_{name}_total {self.engine.counters[name]}" for name in names]
        lines += [f"flashlite_request_seconds_total {self.seconds:.6f}", f"flashlite_waiting {self.engine.waiting}"]
        return "\n".join(lines) + "\n"


def create_app(engine: Engine, api_key: str | None = None, body_limit: int = 1 << 20) -> FastAPI:
    """Build the application.

    Args:
        engine (`Engine`): the model; closed when the application stops.
        api_key (`str`, *optional*): bearer token to ask for.
        body_limit (`int`, *optional*, defaults to 1 MiB): largest request, in bytes.
    """
    server = Server(engine, api_key)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        yield
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="Flash-Lite", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.server = server

    app.add_middleware(BodyLimit, limit=body_limit)

    # added last, so that it also sees what the limit refuses
    @app.middleware("http")
    async def measure(request: Request, call_next):
        start = time.monotonic()
        response = await call_next(request)
        server.responses[response.status_code] += 1
        server.seconds += time.monotonic() - start
        return response

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

    def card() -> dict:
        return {"id": engine.name, "object": "model", "created": server.started, "owned_by": "flashlite"}

    @app.get("/v1/models")
    async def models(request: Request):
        server.authorize(request)
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str):
        server.authorize(request)
        server.check(Sampling(model=name))
        return card()

    @app.post("/v1/completions")
    async def completions(request: Request):
        server.authorize(request)
        body = await parse(request, CompletionRequest)
        server.check(body)
        prompts = body.prompt if isinstance(body.prompt, list) else [body.prompt]
        prompts = [prompts] if prompts and isinstance(prompts[0], int) else prompts
        if len(prompts) > engine.limits.choices:
            raise ApiError(400, f"{len(prompts)} prompts are above the limit of {engine.limits.choices}.", "prompt")
        if not prompts:
            raise ApiError(400, "prompt is empty; give at least one.", "prompt")
        ids = prompts if isinstance(prompts[0], list) else await asyncio.to_thread(engine.encode, prompts)
        return await server.answer(request, server.submit(ids, body, "prompt"), body, chat=False)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request):
        server.authorize(request)
        body = await parse(request, ChatRequest)
        server.check(body)
        try:
            prompt = await asyncio.to_thread(engine.encode_chat, [message.plain() for message in body.messages])
        except TemplateError as error:
            raise ApiError(400, f"The chat template refuses these messages: {error}", "messages") from None
        return await server.answer(request, server.submit([prompt], body, "messages"), body, chat=True)

    return app
