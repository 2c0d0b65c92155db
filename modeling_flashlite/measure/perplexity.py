"""Likelihood of text under a language model, by segments with memory or by windows without."""

from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.tokenization import row_end_tokens
from .metrics import RESAMPLES, likelihood

# bootstrap pieces of one text: enough of them for an interval, and long enough to be nearly independent
_PIECES = 200


@torch.inference_mode()
def text_likelihood(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[str],
    *,
    segment_length: int = 512,
    memory: bool | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    end: str | None = None,
    resamples: int = RESAMPLES,
) -> tuple[dict, dict]:
    """Perplexities and bits per byte of consecutive rows of text.

    Every token of every row is scored exactly once; the end-of-sequence token (without one, the end of a row) before
    the first row is only context. Word-level perplexity follows WikiText-103: the total negative log-likelihood over
    the original number of words, where each line counts one more for its `<eos>`, so that models with different
    tokenizers are comparable. Bits per byte divides by the UTF-8 bytes of the rows, plus one for the end of each.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        rows (`Sequence[str]`): lines of a text or whole documents, in order.
        segment_length (`int`, *optional*, defaults to 512): tokens that the model reads at once.
        memory (`bool`, *optional*): carry the segment memory from segment to segment; if unset, wherever the model has
            one.
        stride (`int`, *optional*): without memory, windows start every `stride` tokens and score the tokens that the
            previous window has not; `segment_length` (no overlap) if unset.
        batch_size (`int`, *optional*, defaults to 1): with memory, the number of streams that the text is cut into,
            each starting with an empty memory (1 is the exact protocol); without memory, windows per batch.
        end (`str`, *optional*): what closes each row that does not end with it; the end-of-sequence token if unset.
            Use a newline for WikiText, where rows are lines.
        resamples (`int`, *optional*, defaults to 1000): of the bootstrap; 0 for no intervals.

    Returns:
        `tuple[dict, dict]`: the metrics of `metrics.likelihood`, and the protocol of the measurement.
    """
    if not len(rows):
        raise ValueError("There are 0 rows to score; check the split and the column.")
    stride = stride or segment_length
    memory = hasattr(model, "new_memory") if memory is None else memory
    if segment_length < 2 or batch_size < 1 or not 1 <= stride <= segment_length:
        raise ValueError(
            f"segment_length is {segment_length}, stride {stride} and batch_size {batch_size}, but segments need at "
            "least 2 tokens, strides 1 to segment_length, and batches 1 row; 512, 512 and 1 are usual."
        )
    if memory and not hasattr(model, "new_memory"):
        raise ValueError(f"{type(model).__name__} has no segment memory; set memory=False, and stride for overlap.")
    if memory and stride != segment_length:
        raise ValueError(f"stride is {stride} with memory, but consecutive segments cannot overlap; leave stride out.")
    last = row_end_tokens(tokenizer, end)
    first = last[-1] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    rows = [row.removesuffix(end or "") for row in rows]
    encoded = tokenizer(rows, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    lengths = np.array([len(ids) + len(last) for ids in encoded])
    text = np.fromiter((token for ids in encoded for token in (*ids, *last)), dtype=np.int64, count=lengths.sum())
    tokens = np.concatenate([[first], text])
    model.eval()
    if memory:
        nll = _through_memory(model, tokens, segment_length, batch_size)
    else:
        nll = _in_windows(model, tokens, segment_length, stride, batch_size)
    # assign rows to pieces, then sum over each piece
    piece = np.arange(len(rows)) * min(_PIECES, len(rows)) // len(rows)
    words = [sum(len(line.split()) + 1 for line in row.split("\n")) for row in rows]
    sizes = [len(row.encode("utf-8", "replace")) + 1 for row in rows]
    per_piece = [np.bincount(piece, weights=values) for values in (words, lengths, sizes)]
    metrics = likelihood(
        np.bincount(np.repeat(piece, lengths), weights=nll, minlength=piece[-1] + 1),
        words=per_piece[0],
        tokens=per_piece[1],
        n_bytes=per_piece[2],
        resamples=resamples,
    )
    protocol = {
        "words": "original words, plus one per line",
        "bytes": "UTF-8, plus one per row",
        "segment_length": segment_length,
        "memory": memory,
        "memory_blocks": getattr(model.config, "memory_blocks", None) if memory else 0,
        "stride": stride,
        "streams": batch_size if memory else None,
        "interval": f"bootstrap over {len(np.unique(piece))} pieces of consecutive rows",
    }
    return metrics, protocol


def _through_memory(model, tokens: np.ndarray, length: int, streams: int) -> np.ndarray:
    """Negative log-likelihood `[T-1]` of each token after the first, read as `streams` parallel texts."""
    steps = -(-(len(tokens) - 1) // (length * streams))
    starts = np.arange(streams) * steps * length
    nll = np.zeros(len(tokens) - 1)
    memory = model.new_memory()
    for step in tqdm(range(steps), desc="perplexity", unit="segment"):
        places = starts + step * length
        losses, memory = _score(model, tokens, places, length, memory)
        for place, loss in zip(places, losses):
            nll[place : place + len(loss)] = loss
    return nll


def _in_windows(model, tokens: np.ndarray, length: int, stride: int, batch_size: int) -> np.ndarray:
    nll = np.zeros(len(tokens) - 1)
    # stop at the first window that reaches the end
    count = 1 + max(0, -(-(len(tokens) - 1 - length) // stride))
    starts = np.arange(count) * stride
    for batch in tqdm(np.array_split(starts, -(-count // batch_size)), desc="perplexity", unit="batch"):
        losses, _ = _score(model, tokens, batch, length, None)
        for place, loss in zip(batch, losses):
            # keep the scores of the previous window; this one only adds the new tokens
            fresh = 0 if place == 0 else length - stride
            nll[place + fresh : place + len(loss)] = loss[fresh:]
    return nll


def _score(model, tokens: np.ndarray, places: np.ndarray, length: int, memory):
    """Run one batch of segments that start at `places`; one array of losses per row, ragged at the end of the text."""
    parts = [tokens[place : place + length + 1] for place in places]
    sizes = [max(0, len(part) - 1) for part in parts]
    width = max(sizes)
    ids = np.zeros((len(parts), width + 1), dtype=np.int64)
    mask = np.zeros((len(parts), width), dtype=np.int64)
    for row, (part, size) in enumerate(zip(parts, sizes)):
        ids[row, : size + 1] = part[: size + 1] if size else 0
        mask[row, : max(size, 1)] = 1  # attention needs at least one token, even where a text has ended
    ids = torch.from_numpy(ids).to(model.device)
    given = {} if memory is None else {"memory": memory}
    attention_mask = None if mask.all() else torch.from_numpy(mask).to(model.device)
    outputs = model(input_ids=ids[:, :-1], attention_mask=attention_mask, use_cache=False, **given)
    losses = [
        torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").double().cpu().numpy()[:size]
        for logits, targets, size in zip(outputs.logits, ids[:, 1:], sizes)
    ]
    return losses, outputs.memory if memory is not None else None


@torch.inference_mode()
def label_likelihood(model: PreTrainedModel, batches) -> dict[str, float]:
    """Mean negative log-likelihood over all labels, `loss` in nats, and its `token_perplexity`.

    Args:
        model (`PreTrainedModel`): a model with a language-model head.
        batches (iterable of `dict`): collated batches with `labels`, e.g. a `DataLoader`.
    """
    model.eval()
    total, count = 0.0, 0
    for batch in tqdm(batches, desc="loss", unit="batch"):
        batch = {name: value.to(model.device) for name, value in batch.items()}
        # with a cache, transformers would ignore the boundaries of packed rows
        logits, labels = model(**batch, use_cache=False).logits, batch["labels"]
        if not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        for row, targets in zip(logits, labels):
            total += float(torch.nn.functional.cross_entropy(row.float(), targets, reduction="sum"))
        count += int((labels != -100).sum())
    if not count:
        raise ValueError("No labels were scored, but a loss needs at least one; check the data set.")
    loss = total / count
    return {"loss": loss, "token_perplexity": float(np.exp(min(loss, 700))), "tokens": count}
