# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""From requests in OpenAI's form to jobs of an engine, and back to whole or streamed answers."""

import asyncio
import contextlib
import hmac
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from .engine import Engine
from .grammar import Grammar, GrammarError
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
    usage,
)
from .tools import split_calls

STATUS_OF_REASON = {"timeout": 408, "cancelled": 408, "error": 500}


def delta_of(text: str) -> tuple[dict, bool]:
    """A whole answer as one piece of a stream, and whether it calls tools."""
    content, calls = split_calls(text)
    called = [{"index": place, **call} for place, call in enumerate(calls)]
    return {"content": content, **({"tool_calls": called} if called else {})}, bool(called)


class Answers:
    """The answers to one request; the engine's thread hands their text to the event loop, so no thread waits for it.

    Iterate over it for `(index, piece)` as they come; the piece is `None` at the end of each answer.
    """

    def __init__(self):
        self.jobs: list[Job] = []
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()

    def add(self, engine: Engine, prompt: list[int], settings: Settings) -> None:
        """Queue one more answer; raises what [`Engine.submit`] raises."""
        self.jobs.append(engine.submit(prompt, settings, partial(self._put, len(self.jobs))))

    def _put(self, index: int, piece: str | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped, and nobody reads
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

    def cancel(self) -> None:
        """End those that still run."""
        for job in self.jobs:
            job.cancelled = job.finish_reason is None

    def _expire(self) -> None:
        for job in self.jobs:
            job.finish("timeout")

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | None]]:
        # slightly later than the worker, which stops at the deadline if it is alive
        left = max(job.deadline for job in self.jobs) - time.monotonic() + 1.0
        timer = self._loop.call_later(left, self._expire)
        try:
            running = set(range(len(self.jobs)))
            while running:
                index, piece = await self._pieces.get()
                if piece is None:
                    running.discard(index)
                yield index, piece
        finally:
            timer.cancel()

    async def texts(self) -> list[str]:
        """The complete texts."""
        texts = [""] * len(self.jobs)
        async for index, piece in self:
            texts[index] += piece or ""
        return texts


class Server:
    """The endpoints over the engines of a model and of its adapters.

    Args:
        engines (sequence of `Engine`): the first answers requests that name no model.
        api_key (`str`, *optional*): if given, `/v1/*` and `/metrics` ask for it as a bearer token.
    """

    def __init__(self, engines: Sequence[Engine], api_key: str | None = None):
        self.engines, self.api_key = {engine.name: engine for engine in engines}, api_key
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

    def find(self, name: str | None) -> Engine:
        """The engine of that name, the first one without a name."""
        known = list(self.engines)
        if (engine := self.engines.get(known[0] if name is None else name)) is None:
            message = f"The model '{(name or '')[:100]}' does not exist; this is {' or '.join(known)}."
            raise ApiError(404, message, "model", "model_not_found")
        return engine

    def check(self, body: Sampling) -> None:
        """Refuse fields whose values this server cannot honour."""
        unread = [name for name in ("logit_bias", "suffix", "functions") if getattr(body, name, None)]
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

    def grammar(self, engine: Engine, body: Sampling) -> Grammar | None:
        """What the answer must follow by `response_format` or `tool_choice`; `None` for any text."""
        if not isinstance(body, ChatRequest):
            return None
        form, demanded = body.response_format, body.demanded()
        try:
            if demanded:
                return engine.grammars.compile_call(demanded)
            if form is None or form.type == "text":
                return None
            return engine.grammars.compile(form.json_schema.schema_ if form.json_schema else None)
        except (GrammarError, ImportError) as error:
            field = "tool_choice" if demanded else "response_format"
            raise ApiError(400, str(error), field, "unsupported_value") from None

    def settings(self, engine: Engine, body: Sampling) -> Settings:
        """Settings of the request's first choice; `None` means OpenAI's default."""
        stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
        if len(stop) > 4 or not all(0 < len(text) <= 200 for text in stop):
            raise ApiError(400, "stop takes at most 4 texts of 1 to 200 characters.", "stop")
        limit = engine.limits.new_tokens
        given = getattr(body, "max_completion_tokens", None), body.max_tokens, min(256, limit)
        asked = next(tokens for tokens in given if tokens is not None)
        if asked > limit:
            raise ApiError(400, f"max_tokens is {asked}, the limit is {limit}; ask for less.", "max_tokens")
        names = ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty")
        sampling = {name: getattr(body, name) for name in names} | {"top_k": body.top_k and max(body.top_k, 0)}
        grammar = self.grammar(engine, body)
        try:
            return Settings(
                max_tokens=asked,
                stop=stop,
                seed=body.seed,
                logprobs=body.likeliest(),
                echo=bool(getattr(body, "echo", None)),
                grammar=grammar,
                **{k: v for k, v in sampling.items() if v is not None},
            )
        except ValueError as error:  # no tokens are asked for, and nothing else
            raise ApiError(400, str(error), "max_tokens") from None

    async def submit(self, engine: Engine, prompts: list[list[int]], body: Sampling, param: str) -> Answers:
        """Queue `n` answers to each prompt, or none at all."""
        base, count = await asyncio.to_thread(self.settings, engine, body), body.n or 1
        if len(prompts) * count > engine.limits.choices:
            limit = engine.limits.choices
            raise ApiError(400, f"{len(prompts)} prompts times n = {count} is above the limit of {limit}.", "n")
        answers = Answers()
        try:
            for prompt in prompts:
                for choice in range(count):
                    # choices of one request get different, reproducible seeds
                    seed = None if base.seed is None else (base.seed + choice) % 2**63
                    answers.add(engine, prompt, replace(base, seed=seed))
        except (ValueError, QueueFull) as error:
            answers.cancel()
            if isinstance(error, QueueFull):
                raise ApiError(429, str(error), code="rate_limit_exceeded") from None
            code = "context_length_exceeded" if "limit" in str(error) else None
            raise ApiError(400, str(error), param, code) from None
        return answers

    async def answer(
        self, request: Request, engine: Engine, answers: Answers, body: Sampling, chat: bool, calls: bool = False
    ) -> Response:
        """Wait for the answers, or stream them; with `calls`, read calls of tools out of them."""
        frame = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": engine.name,
        }
        if body.stream:
            events = self.stream(answers, frame, chat, body, calls)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        texts = await self.gather(request, answers)
        count = body.n or 1
        if isinstance(body, CompletionRequest) and body.echo:
            given = [text if isinstance(text, str) else engine.tokenizer.decode(text) for text in body.prompts()]
            texts = [given[index // count] + text for index, text in enumerate(texts)]
        # in a thread: texts of thousands of tokens with their likeliest ones take a second
        choices = [
            await asyncio.to_thread(self.choice, engine, index, text, job, chat, calls)
            for index, (text, job) in enumerate(zip(texts, answers.jobs))
        ]
        return JSONResponse({**frame, "choices": choices, "usage": usage(answers.jobs, count)})

    async def gather(self, request: Request, answers: Answers) -> list[str]:
        """Collect the complete texts; cancel the jobs when the client disconnects."""
        waiting = asyncio.create_task(answers.texts())
        try:
            while not waiting.done():
                await asyncio.wait([waiting], timeout=0.5)
                if not waiting.done() and await request.is_disconnected():
                    break
        finally:
            answers.cancel()
        texts = await waiting
        for job in answers.jobs:
            if status := STATUS_OF_REASON.get(job.finish_reason or "error"):
                raise ApiError(
                    status, f"The answer was not finished ({job.finish_reason}); try again or ask for less."
                )
        return texts

    async def stream(
        self, answers: Answers, frame: dict, chat: bool, body: Sampling, calls: bool
    ) -> AsyncIterator[str]:
        """Server-sent events: pieces of all choices as they come, their ends, optionally usage, and `[DONE]`.

        An answer that may hold calls of tools comes as one piece, since its text shows only at its end which they are.
        """
        options, jobs = body.stream_options or StreamOptions(), answers.jobs
        frame = {**frame, "object": "chat.completion.chunk" if chat else "text_completion"}
        extra = {"usage": None} if options.include_usage else {}

        def chunk(index: int, piece: str | None, reason: str | None = None, **said) -> str:
            return event({**frame, "choices": [{**self.chunk(index, piece, reason, chat), **said}], **extra})

        texts = [""] * len(jobs)
        try:
            if chat:
                for index in range(len(jobs)):
                    yield chunk(index, None, delta={"role": "assistant", "content": ""})
            async for index, piece in answers:
                if piece is not None:
                    texts[index] += piece
                    if not calls:
                        yield chunk(index, piece)
                    continue
                reason = jobs[index].finish_reason
                if reason in STATUS_OF_REASON:
                    message = f"The answer was not finished ({reason}); try again or ask for less."
                    yield event({"error": {"message": message, "type": "server_error", "param": None, "code": reason}})
                    continue
                if calls:
                    delta, found = delta_of(texts[index])
                    yield chunk(index, None, delta=delta)
                    reason = "tool_calls" if found else reason
                yield chunk(index, None, reason)
            if options.include_usage:
                yield event({**frame, "choices": [], "usage": usage(jobs, body.n or 1)})
            yield "data: [DONE]\n\n"
        finally:
            answers.cancel()

    @staticmethod
    def choice(engine: Engine, index: int, text: str, job: Job, chat: bool, calls: bool) -> dict:
        """One finished answer."""
        said: dict = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
        logprobs, reason = None, job.finish_reason
        if calls:
            content, found = split_calls(text)
            if found:
                said["message"] |= {"content": content, "tool_calls": found}
                reason = "tool_calls"
        if job.settings.logprobs is not None:
            given = job.logprobs, engine.tokenizer
            logprobs = chat_logprobs(*given) if chat else completion_logprobs(*given, text)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

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
        counters = sum((engine.counters for engine in self.engines.values()), Counter())
        waiting = sum(engine.waiting for engine in self.engines.values())
        lines += [f"flashlite_{name}_total {counters[name]}" for name in names]
        lines += [f"flashlite_request_seconds_total {self.seconds:.6f}", f"flashlite_waiting {waiting}"]
        return "\n".join(lines) + "\n"
