# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Texts and conversations that a language model writes itself, to be quantized or distilled on.

Texts are plain samples at temperature 1 from the beginning of a text (LLM-QAT, arXiv 2305.17888, whose first tokens
are greedy, which writes the same few beginnings again and again). A conversation begins with what the chat template
puts before a user's words; the model then writes the question and answers it (Magpie, arXiv 2406.08464).
"""

from __future__ import annotations

import functools
import json
import logging
import os
import zlib
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenization import end_tokens, turn_end
from ..measure.results import write_json_lines

logger = logging.getLogger(__name__)
Conversation = list[dict[str, str]]
QUESTION_TOKENS, ANSWER_TOKENS = 48, 96  # at most, of a conversation
SHARE = 0.5  # of calibration tokens in conversations: measured on SmolLM2-135M-Instruct, see LOG.md
MOST_TOKENS = 16384  # of conversations, a few minutes of writing
_MARK = "zebra"  # a word that no chat template contains
_SEED = 0
_MOST_ROUNDS = 32  # of 64 conversations; a model that writes next to nothing gets no more


def _pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    held = model.generation_config.eos_token_id
    tokens = tokenizer.pad_token_id, tokenizer.eos_token_id, held[0] if isinstance(held, list) else held, 0
    return next(token for token in tokens if token is not None)


def _write(model, tokenizer, given: dict[str, torch.Tensor], tokens: int, **options) -> tuple[torch.Tensor, list[str]]:
    """What the model writes behind rows of ids, as tokens and decoded."""
    given = {name: value.to(model.device) for name, value in given.items()}
    ids = model.generate(**given, max_new_tokens=tokens, pad_token_id=_pad_token(model, tokenizer), **options)
    ids = ids[:, given["input_ids"].shape[1] :]
    return ids, [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def write_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, max_new_tokens: int, batch_size: int
) -> list[str]:
    """Texts of the model, written from its first token on; those that are empty are left out.

    Raises:
        ValueError: neither the tokenizer nor the model knows a token that begins a text.
    """
    starts = (tokenizer.bos_token_id, model.generation_config.bos_token_id, tokenizer.eos_token_id)
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise ValueError(f"{model.name_or_path} has no bos and no eos token to begin a text with; set one.")
    texts: list[str] = []
    with tqdm(total=count, desc="sample", unit="text") as bar:
        while bar.n < count:
            rows = min(batch_size, count - bar.n)
            ids = torch.full((rows, 1), start)
            options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0}
            given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            texts += _write(model, tokenizer, given, max_new_tokens, **options)[1]
            bar.update(rows)
    return [text for text in texts if text]


@torch.no_grad()
def write_conversations(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int, batch_size: int = 64
) -> list[Conversation]:
    """Questions that the model asks itself, with its greedy answers.

    Left out are those with an empty part, and questions that the model does not end in its template's way: one that
    was never trained on the template ends none.

    Args:
        model (`PreTrainedModel`): a decoder-only language model.
        tokenizer (`PreTrainedTokenizerBase`): has a chat template.
        count (`int`): questions to write.
        batch_size (`int`, *optional*, defaults to 64): conversations at once.

    Returns:
        `list[list[dict]]`: messages with `role` and `content`.

    Raises:
        ValueError: the template does not show the user's words.
    """
    said = tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    if _MARK not in said:
        raise ValueError(f"The chat template of {model.name_or_path} leaves the user's words out; give it texts only.")
    begin = tokenizer(said.split(_MARK)[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    conversations: list[Conversation] = []
    end, ends = turn_end(tokenizer), {"eos_token_id": end_tokens(tokenizer)}
    with tqdm(total=count, desc="conversations", unit="row") as bar:
        while bar.n < count:
            rows = min(batch_size, count - bar.n)
            given = {"input_ids": begin.repeat(rows, 1), "attention_mask": torch.ones(rows, begin.shape[1]).long()}
            options = {"do_sample": True, "top_k": 0, "top_p": 0.9, "temperature": 1.0, **ends}
            ids, questions = _write(model, tokenizer, given, QUESTION_TOKENS, **options)
            ended = (ids == end).any(1).tolist() if end is not None else [False] * rows
            asked = [[{"role": "user", "content": text}] for text, done in zip(questions, ended) if text and done]
            conversations += _answered(model, tokenizer, asked, ends) if asked else []
            bar.update(rows)
    return conversations


def _answered(model, tokenizer, asked: list[Conversation], ends: dict) -> list[Conversation]:
    texts = [tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) for turns in asked]
    encoded = [torch.tensor(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    given = {
        "input_ids": pad(encoded, padding_value=_pad_token(model, tokenizer)),
        "attention_mask": pad([torch.ones_like(ids) for ids in encoded]),
    }
    _, answers = _write(model, tokenizer, given, ANSWER_TOKENS, do_sample=False, **ends)
    return [[*turns, {"role": "assistant", "content": answer}] for turns, answer in zip(asked, answers) if answer]


def conversation_rows(
    tokenizer: PreTrainedTokenizerBase, conversations: list[Conversation], length: int
) -> torch.Tensor:
    """Token ids int64 `[rows, length]`: each row begins with a conversation and is filled up by those that follow.

    A row begins where a chat does, since the first tokens of a text have activations unlike all others.
    """
    rows, row = [], []
    for messages in conversations:
        row += tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        if len(row) >= length:
            rows.append(row[:length])
            row = []
    return torch.tensor(rows, dtype=torch.long).view(-1, length)


def conversation_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    folder: str | os.PathLike | None = None,
    *,
    length: int = 256,
    batch_size: int = 8,
) -> list[dict[str, torch.Tensor]]:
    """Batches of `input_ids` with at most `tokens` tokens of conversations that the model writes.

    Args:
        model (`PreTrainedModel`): a decoder-only language model, before it is quantized.
        tokenizer (`PreTrainedTokenizerBase`): has a chat template.
        tokens (`int`): all tokens wanted.
        folder (path, *optional*): keeps the conversations of this model in `conversations.jsonl` for another run.
        length, batch_size (`int`): tokens of a row, rows of a batch.
    """
    count = tokens // length
    weight = next(model.parameters()).detach().flatten()[:65536].float().cpu()
    path = None if folder is None else Path(folder) / f"conversations-{zlib.crc32(weight.numpy()):08x}.jsonl"
    held: list[Conversation] = []
    if path is not None and path.exists():
        held = [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]
    rows = conversation_rows(tokenizer, held, length)
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        for _ in range(_MOST_ROUNDS if len(rows) < count else 0):
            left = count - len(rows)
            held += write_conversations(model, tokenizer, min(max(8, 2 * left), 64))
            rows = conversation_rows(tokenizer, held, length)
            if path is not None and held:
                write_json_lines(path, ({"messages": messages} for messages in held))
            if len(rows) >= count or not held:
                break
    if not held:
        logger.warning("%s does not end a turn of its chat template: no conversations.", type(model).__name__)
    return [{"input_ids": part} for part in rows[:count].split(batch_size)] if len(rows) else []


def with_conversations(
    batches: list[dict],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    share: float | None = None,
    folder: str | os.PathLike | None = None,
) -> list[dict]:
    """Calibration data of which a share are conversations that the model writes, so that it still answers afterwards.

    Args:
        batches (`list[dict]`): text to calibrate on; conversations take the place of the last of them.
        model, tokenizer: a language model, before it is quantized, and its tokenizer.
        share (`float`, *optional*): of the tokens, below 1, in conversations, at most `MOST_TOKENS` of them; if unset
            `SHARE` for a decoder-only model with a chat template, else 0.
        folder (path, *optional*): see [`conversation_batches`].
    """
    speaks = tokenizer.chat_template is not None and model.can_generate() and not model.config.is_encoder_decoder
    share = (SHARE if speaks else 0.0) if share is None else share
    if not 0 <= share < 1:
        raise ValueError(f"The share of conversations is {share}, but must be at least 0 and below 1; 0.5 is usual.")
    if share and not speaks:
        raise ValueError(
            f"{type(model).__name__} cannot write conversations: that takes a decoder-only language model and a"
            " tokenizer with a chat template; set the share of conversations to 0."
        )
    wanted = round(share * sum(batch["input_ids"].numel() for batch in batches)) if share else 0
    own = conversation_batches(model, tokenizer, min(wanted, MOST_TOKENS), folder) if wanted else []
    texts = batches[: max(1, round(len(batches) * (1 - share)))] if own else batches
    # evenly mixed: only the first tokens are taken for gradients
    places = [((place + 0.5) / len(part), batch) for part in (texts, own) for place, batch in enumerate(part)]
    return [batch for _, batch in sorted(places, key=lambda pair: pair[0])]
