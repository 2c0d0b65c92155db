# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""A page to try a model in the browser (needs the `web` extra: gradio)."""

import os
from collections.abc import Callable, Iterator

# the page talks to this machine only
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr

from .engine import Engine
from .jobs import QueueFull, Settings


def make_page(engine: Engine) -> gr.Blocks:
    """One text field in, the answer streamed out; a decoder with a chat template gets a conversation."""

    def answer(encode: Callable[[], list[int]], max_tokens: float, temperature: float) -> Iterator[str]:
        try:
            job = engine.submit(encode(), Settings(max_tokens=int(max_tokens), temperature=temperature))
        except (ValueError, QueueFull) as error:
            raise gr.Error(str(error)) from None
        text = ""
        for piece in job:
            text += piece
            yield text
        if job.finish_reason not in ("stop", "length"):
            raise gr.Error(f"The answer was not finished ({job.finish_reason}).")
        if not text:
            yield "(no text)"

    def chat(message: str, history: list[dict], max_tokens: float, temperature: float) -> Iterator[str]:
        turns = [{"role": turn["role"], "content": _plain(turn["content"])} for turn in history]
        asked = [*turns, {"role": "user", "content": message}]
        yield from answer(lambda: engine.encode_chat(asked), max_tokens, temperature)

    def complete(text: str, max_tokens: float, temperature: float) -> Iterator[str]:
        yield from answer(lambda: engine.encode([text])[0], max_tokens, temperature)

    limit = engine.limits.new_tokens
    settings = [
        gr.Slider(1, limit, min(128, limit), step=1, label="Most new tokens"),
        gr.Slider(0.0, 2.0, 0.0, step=0.05, label="Temperature"),
    ]
    if engine.is_encoder_decoder or engine.tokenizer.chat_template is None:
        title = "Input" if engine.is_encoder_decoder else "Text to continue"
        return gr.Interface(
            complete,
            [gr.Textbox(label=title, lines=4), *settings],
            gr.Textbox(label="Output", lines=4),
            title=engine.name,
            flagging_mode="never",
        )
    return gr.ChatInterface(chat, additional_inputs=settings, title=engine.name)


def mount_page(app, engine: Engine, api_key: str | None = None):
    """Serve the page at `/`; with an API key it asks for user `flashlite` and the key."""
    return gr.mount_gradio_app(app, make_page(engine), path="/", auth=("flashlite", api_key) if api_key else None)


def _plain(content) -> str:
    """Text of a message in gradio's history: a string, or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
