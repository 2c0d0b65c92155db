# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""OpenAI's completions protocol: requests, errors and events (needs the `serve` extra)."""

import codecs
import json
import math
import re
from typing import Annotated, Any, Literal

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, Json, ValidationError, model_validator

from .jobs import RANGES, TokenLogprob, special_tokens

TYPES = {401: "authentication_error", 404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error"}

# what clients send beside a request that no answer depends on
_HARMLESS = {"metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}


class ApiError(Exception):
    """A refusal with its HTTP status; becomes OpenAI's error shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def _within(setting: str):
    least, largest = RANGES[setting]
    return Field(ge=least, le=None if largest == math.inf else largest)


class StreamOptions(BaseModel):
    """Options of a stream: `include_usage` adds a last chunk with token counts."""

    include_usage: bool = False


class Sampling(BaseModel):
    """Fields that both endpoints share; values that this server cannot honour are refused, not ignored."""

    model_config = ConfigDict(allow_inf_nan=False, extra="allow")

    model: str | None = None
    max_tokens: Annotated[int, _within("max_tokens")] | None = None
    temperature: Annotated[float, _within("temperature")] | None = None
    top_p: Annotated[float, _within("top_p")] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, _within("min_p")] | None = None
    repetition_penalty: Annotated[float, _within("repetition_penalty")] | None = None
    frequency_penalty: Annotated[float, _within("frequency_penalty")] | None = None
    presence_penalty: Annotated[float, _within("presence_penalty")] | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, _within("seed")] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    user: str | None = None

    def unread(self) -> list[str]:
        """Fields that this server does not know, but for those that change no answer."""
        unknown = self.model_extra or {}
        return [name for name, value in unknown.items() if value is not None and name not in _HARMLESS]

    def likeliest(self) -> int | None:
        """How many of the likeliest tokens are asked for at each place; `None` for no log-probabilities."""
        return None


class CompletionRequest(Sampling):
    """Body of `/v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as texts or as tokens."""
        given: list = [self.prompt] if isinstance(self.prompt, str) else self.prompt
        return [given] if given and isinstance(given[0], int) else given

    def likeliest(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    """One part of a message; this server reads text only."""

    type: Literal["text"]
    text: str


class CalledFunction(BaseModel):
    """Name and arguments of a call, as a JSON object in a string."""

    name: str
    arguments: Json[dict[str, Any]]


class ToolCall(BaseModel):
    """A call that the assistant made in an earlier turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None

    @model_validator(mode="after")
    def _says_something(self):
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        return self

    def plain(self) -> dict:
        """The message for a chat template, with its parts joined; `developer` is the newer name of `system`."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        message: dict = {"role": "system" if self.role == "developer" else self.role, "content": text}
        message |= {name: value for name in ("name", "tool_call_id") if (value := getattr(self, name)) is not None}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(exclude_none=True) for call in self.tool_calls]
        return message


class Function(BaseModel):
    """A function that the assistant may call; `parameters` is a JSON schema."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, Field(min_length=1, max_length=64)]
    description: str | None = None
    parameters: dict | None = None


class Tool(BaseModel):
    """A tool that the assistant may use."""

    type: Literal["function"]
    function: Function


class ToolChoice(BaseModel):
    """The one function that the answer must call."""

    type: Literal["function"]
    function: Function


class JsonSchema(BaseModel):
    """The schema that an answer must follow."""

    model_config = ConfigDict(extra="allow")

    schema_: Annotated[dict, Field(alias="schema")]


class ResponseFormat(BaseModel):
    """Form of the answer: any text, any JSON object, or JSON that follows a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_a_schema(self):
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self


class ChatRequest(Sampling):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    max_completion_tokens: Annotated[int, _within("max_tokens")] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    functions: list | None = None
    response_format: ResponseFormat | None = None

    def offered(self) -> list[dict] | None:
        """Descriptions of the tools that the answer may call."""
        if not self.tools or self.tool_choice == "none":
            return None
        return [tool.model_dump(exclude_none=True) for tool in self.tools]

    def demanded(self) -> list[dict]:
        """Descriptions of the tools of which the answer must call one; none if it is free."""
        if self.tool_choice in (None, "none", "auto"):
            return []
        name = None if isinstance(self.tool_choice, str) else self.tool_choice.function.name
        tools = [tool for tool in self.offered() or () if name in (None, tool["function"]["name"])]
        if not tools:
            wanted = "a tool" if name is None else f"the tool {name}"
            raise ApiError(400, f"tool_choice demands {wanted}, but tools does not have it.", "tool_choice")
        return tools

    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


async def parse(request: Request, kind):
    """Validate the JSON body; any defect gives status 400."""
    try:
        content = json.loads(await request.body())
        # text that UTF-8 cannot hold would fail later, in the tokenizer
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not JSON in UTF-8 with finite numbers.") from None
    try:
        return kind.model_validate(content, strict=False)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"{where}: {first['msg']}" if where else first["msg"], where or None) from None


def render_error(error: ApiError) -> JSONResponse:
    """OpenAI's error shape."""
    kind = TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    content = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    headers = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}}.get(error.status)
    return JSONResponse({"error": content}, status_code=error.status, headers=headers)


def event(content: dict) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def usage(jobs: list, n: int) -> dict[str, int]:
    """Token counts; a prompt with `n` answers is counted once."""
    prompt = sum(len(job.prompt) for job in jobs[::n])
    completion = sum(job.new_tokens for job in jobs)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class TokenTexts:
    """What single tokens add to a text: bytes, which may be a part of a character only, and a text that names them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.special = {token: content for content, token in special_tokens(tokenizer).items()}
        # some decoders drop the space of the first token of a text
        self._before = tokenizer.encode("a", add_special_tokens=False)
        self._known = len(tokenizer.decode(self._before))

    def bytes_of(self, token: int, first: bool) -> bytes | None:
        """Bytes of a token, the first of a text or a later one; `None` for a special token, which texts leave out."""
        if token in self.special:
            return None
        text = self.tokenizer.decode([token])
        if "\ufffd" in text:
            return _piece_bytes(self.tokenizer.convert_ids_to_tokens(token))
        if not first:
            text = self.tokenizer.decode([*self._before, token])[self._known :]
        return text.encode()

    def name(self, token: int, first: bool) -> str:
        """Text of a token; `bytes:\\xf0` where it is a part of a character, so that no two have the same."""
        raw = self.bytes_of(token, first)
        if raw is None:
            return self.special[token]
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return f"bytes:{str(raw)[2:-1]}"


# byte-level vocabularies write each byte as a visible character: itself, or one from 256 on
_VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(byte): byte for byte in _VISIBLE} | {chr(256 + place): byte for place, byte in enumerate(_HIDDEN)}


def _piece_bytes(piece: str) -> bytes:
    """Bytes of an entry of a vocabulary: `<0xF0>` of SentencePiece, or byte-level."""
    if match := re.fullmatch("<0x([0-9A-F]{2})>", piece):
        return bytes.fromhex(match[1])
    if set(piece) <= _BYTE_OF.keys():
        return bytes(_BYTE_OF[character] for character in piece)
    return piece.encode()


def completion_logprobs(entries: list[TokenLogprob], tokenizer, text: str) -> dict:
    """Log-probabilities in the shape of `/v1/completions`; the first token of an echoed prompt has none.

    Special tokens count in the offsets only where `text`, the prompt or the answer, has them.
    """
    texts = TokenTexts(tokenizer)
    decoder, place = codecs.getincrementaldecoder("utf-8")("replace"), 0
    offsets, tokens, top = [], [], []
    for token, logprob, likeliest in entries:
        first = place == 0
        offsets.append(place)
        tokens.append(texts.name(token, first))
        top.append(None if logprob is None else {texts.name(other, first): value for other, value in likeliest})
        if (raw := texts.bytes_of(token, first)) is not None:
            place += len(decoder.decode(raw))
        elif text.startswith(tokens[-1], place):
            place += len(tokens[-1])
    values = [entry.logprob for entry in entries]
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": top, "text_offset": offsets}


def chat_logprobs(entries: list[TokenLogprob], tokenizer) -> dict:
    """Log-probabilities in the shape of `/v1/chat/completions`; `bytes` of all tokens are those of the content."""
    texts = TokenTexts(tokenizer)

    def one(token: int, logprob: float | None, first: bool) -> dict:
        raw = texts.bytes_of(token, first)
        return {"token": texts.name(token, first), "logprob": logprob, "bytes": None if raw is None else list(raw)}

    content = [
        {**one(token, logprob, not place), "top_logprobs": [one(*pair, not place) for pair in likeliest]}
        for place, (token, logprob, likeliest) in enumerate(entries)
    ]
    return {"content": content, "refusal": None}
