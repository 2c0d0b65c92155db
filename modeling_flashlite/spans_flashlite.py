# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Extractive question answering: overlapping windows of a long context, and scores of the spans in a window."""

import torch
from transformers import PreTrainedTokenizerBase

__all__ = ["cut_question", "question_windows", "span_scores"]


def cut_question(tokenizer: PreTrainedTokenizerBase, question: str, max_length: int = 384) -> str:
    """The question, or its beginning, half a window long, where it leaves no room for its context."""
    places = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True)
    return question if len(places) < room else question[: places[max(1, room // 2) - 1][1]]


def question_windows(
    tokenizer: PreTrainedTokenizerBase, question: str, context: str, max_length: int = 384, stride: int = 128
) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """Encode a question with its context, in overlapping windows where the context is too long.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): a fast one; its own special tokens are added.
        question, context (`str`): the two texts.
        max_length (`int`, *optional*, defaults to 384): tokens of a window, question included.
        stride (`int`, *optional*, defaults to 128): tokens that two windows share.

    Returns:
        `list` of (`input_ids`, offsets): for each token, its range of characters in the context; (0, 0) for the
        tokens of the question and special tokens.

    Raises:
        `ValueError`: the question alone fills a window.
    """
    asked = len(tokenizer(question, add_special_tokens=False)["input_ids"])
    room = max_length - asked - tokenizer.num_special_tokens_to_add(pair=True)
    if room < 1:
        raise ValueError(
            f"The question leaves no room for its context in {max_length} tokens; raise the limit by {1 - room}."
        )
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=max_length,
        stride=min(stride, room - 1),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    windows = []
    for index, ids in enumerate(encoded["input_ids"]):
        sources = zip(encoded["offset_mapping"][index], encoded.sequence_ids(index), strict=True)
        windows.append((ids, [offset if source == 1 else (0, 0) for offset, source in sources]))
    return windows


def span_scores(start: torch.Tensor, end: torch.Tensor, candidate: torch.Tensor, longest: int) -> torch.Tensor:
    """Sum of the start score of each span's first token and the end score of its last.

    Args:
        start, end (`[L]`): logits or log-probabilities.
        candidate (`[L]`, bool): tokens that may belong to an answer.
        longest (`int`): tokens of the longest span.

    Returns:
        `[L, L]`, by first and last token; -inf for spans that are too long, reversed, or outside the candidates.
    """
    allowed = torch.ones(len(start), len(end), dtype=torch.bool, device=start.device).triu().tril(longest - 1)
    allowed &= candidate[:, None] & candidate[None, :]
    return (start[:, None] + end[None, :]).masked_fill(~allowed, float("-inf"))
