"""Conversations to token ids, with the assistant's turns marked, whatever chat template a tokenizer has."""

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

__all__ = ["apply_template", "cut_at_turns", "encode_conversation", "messages_of"]

logger = logging.get_logger(__name__)
_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")
# ShareGPT's names, and OpenAI's newer one
_ROLES = {"human": "user", "gpt": "assistant", "developer": "system"}


def messages_of(value: Any) -> list[dict]:
    """A conversation as messages with `role` and `content`, which is a text; none for an empty cell.

    Accepts a list or its JSON, ShareGPT's `from` and `value`, and contents in OpenAI's forms: missing beside tool
    calls, or a list of parts of text.

    Raises:
        `ValueError`: anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"A conversation is the text {value[:40]!r}, but must be a list or its JSON.") from error
    if not isinstance(value, list | None):
        raise ValueError(f"A conversation is a {type(value).__name__}, but must be a list of messages; convert it.")
    return [_message(turn) for turn in value or ()]


def _message(turn: Any) -> dict:
    if not isinstance(turn, Mapping) or not (turn.get("role") or turn.get("from")):
        raise ValueError(f"A message is {turn!r}, but must have a role and content (or ShareGPT's from and value).")
    # tables fill what other messages have, such as tool calls, with None
    said = {name: part for name, part in turn.items() if part is not None}
    role = said.pop("from", None) or said["role"]
    content = said.pop("value", said.get("content", ""))
    if isinstance(content, list):
        if odd := [part for part in content if not isinstance(part, Mapping) or part.get("type", "text") != "text"]:
            raise ValueError(f"A message has the part {odd[0]!r}, but only parts of text can be read; leave it out.")
        content = "".join(part.get("text") or "" for part in content)
    return {**said, "role": _ROLES.get(role, role), "content": str(content)}


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict], **options):
    """`tokenizer.apply_chat_template`; a `ValueError` says which roles a template refuses, and why."""
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"The chat template refuses a conversation of {roles} ({error}); change such rows, or the template."
        ) from error


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict]
) -> list[tuple[list[int], list[bool]]]:
    """Encode a conversation and mark the tokens of the assistant's turns, the end of each turn included.

    A template with `{% generation %}` marks them itself. For any other, a turn is what the template adds to the turns
    before it and its own generation prompt. A template that changes earlier turns, for example leaves out their
    thinking, gives one example for each turn of the assistant, as the model will see it.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast one with a chat template.
        messages (`list[dict]`): `role` and `content` of each turn.

    Returns:
        `list` of (`input_ids`, marks), one for a template that keeps earlier turns. A turn of the assistant before
        any other is not marked: nothing asks for it.

    Raises:
        `ValueError`: there is no chat template, or it does not continue its own generation prompt.
    """
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template; set tokenizer.chat_template, or take an instruct model.")
    if _MARKER.search(tokenizer.get_chat_template()):
        options = {"return_dict": True, "return_assistant_tokens_mask": True, "tokenizer_kwargs": {"verbose": False}}
        encoded = apply_template(tokenizer, messages, **options)
        return [(encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]])]
    return encode_by_prefixes(tokenizer, messages)


def encode_by_prefixes(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> list[tuple[list[int], list[bool]]]:
    """[`encode_conversation`] without markers: each turn is the difference of two prefixes of the text."""
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant" and turn]
    spans = [_span(tokenizer, messages[:turn], messages[turn]) for turn in turns]
    whole = _text(tokenizer, messages)
    if all(whole.startswith(text) for text, _, _ in spans):
        return [_marked(tokenizer, whole, [(start, end) for _, start, end in spans])]
    logger.warning_once("The chat template changes earlier turns: each turn of the assistant becomes an example.")
    return [_marked(tokenizer, text, [(start, end)]) for text, start, end in spans]


def _text(tokenizer, messages: list[dict], **options) -> str:
    return apply_template(tokenizer, messages, tokenize=False, **options)


def _span(tokenizer, history: list[dict], reply: dict) -> tuple[str, int, int]:
    """Text up to the end of a reply, and where in it the reply begins and ends."""
    asked = _text(tokenizer, history, add_generation_prompt=True)
    text = _text(tokenizer, [*history, reply])
    if not text.startswith(asked):
        raise ValueError(
            "The chat template does not continue its own generation prompt, so the assistant's turns cannot be found; "
            "put {% generation %} and {% endgeneration %} around them in tokenizer.chat_template."
        )
    # the model stops at the token that ends its turn: white space behind it is the template's
    said = text.rstrip()
    ends = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    end = len(said) if len(said) > len(asked) and any(said.endswith(token) for token in ends) else len(text)
    return text[:end], len(asked), end


def _marked(tokenizer, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    if not tokenizer.is_fast:
        raise ValueError("The tokenizer is a slow one, which has no offsets; load it with use_fast=True.")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    inside = [any(end > first and start < last for first, last in spans) for start, end in encoded["offset_mapping"]]
    return encoded["input_ids"], inside


def cut_at_turns(ids: list[int], marks: list[bool], limit: int) -> tuple[list[int], list[bool]]:
    """The first turns of a conversation that fit into `limit` tokens, up to the end of one of the assistant's.

    If not even its first turn fits, that one is cut.
    """
    if len(ids) <= limit:
        return ids, marks
    ends = [place + 1 for place, (mark, following) in enumerate(pairwise([*marks, False])) if mark and not following]
    limit = max((end for end in ends if end <= limit), default=limit)
    return ids[:limit], marks[:limit]
