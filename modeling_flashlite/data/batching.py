"""From rows of text to batches: tokenize, join, pack or segment, and collate."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from datasets import (
    Dataset,
    IterableDataset,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .loading import column_names, require_columns, text_of
from .tokenization import row_end_tokens

__all__ = ["PaddingCollator", "join_rows", "pack", "row_end", "segment_streams", "tokenize_texts"]


def row_end(name: str) -> str | None:
    """What closes a row of text: `None`, the end-of-sequence token, for `eos`; a newline for `newline`.

    Raises:
        ValueError: for another name.
    """
    ends = {"eos": None, "newline": "\n"}
    if name not in ends:
        raise ValueError(
            f"end is {name!r}, but must be 'eos' (a row is a document) or 'newline' (rows are the lines of one text)."
        )
    return ends[name]


def join_rows(dataset: Dataset, column: str, document_column: str) -> Dataset:
    """Join the texts in `column` of consecutive rows with the same `document_column`, separated by newlines.

    Raises:
        ValueError: for a streamed dataset, or a column that it does not have.
    """
    require_columns(dataset, [column, document_column], "Name another with document_column.")
    if isinstance(dataset, IterableDataset):
        raise ValueError("Streamed rows cannot be joined to documents; load them without streaming.")
    pairs = zip(dataset[document_column], dataset[column])
    documents = itertools.groupby(pairs, lambda pair: pair[0])
    return Dataset.from_dict({column: ["\n".join(text_of(text) for _, text in rows) for _, rows in documents]})


def tokenize_texts(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str = "text",
    *,
    end: str | None = None,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Replace `column` by `input_ids`: one row per document, without truncation.

    Args:
        dataset (`Dataset` or `IterableDataset`): rows of text.
        tokenizer (`PreTrainedTokenizerBase`): its special tokens are not added.
        column (`str`, *optional*, defaults to `"text"`): where the text is.
        end (`str`, *optional*): what closes each row that does not end with it; the tokenizer's end-of-sequence token
            if unset. Use a newline where the rows are the lines of one long text, as in WikiText, and pack them with
            `one_text`.
        num_proc (`int`, *optional*): worker processes.
    """
    require_columns(dataset, [column], "Name another with columns, e.g. text=content.")
    last = row_end_tokens(tokenizer, end)

    def encode(batch):
        texts = [text_of(text).removesuffix(end or "") for text in batch[column]]
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [ids + last for ids in encoded["input_ids"]]}

    return _map(dataset, encode, "tokenise", num_proc)


def pack(
    dataset: Dataset | IterableDataset,
    length: int,
    *,
    one_text: bool = False,
    batch_size: int = 1000,
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Concatenate documents and cut them into rows of `length` tokens; no token is lost and none is repeated.

    Columns of the result, each a list of at most `length` numbers: `input_ids`; `position_ids`, which restart at 0
    with every document (and with every row) and mark the boundaries for attention; `labels`, equal to
    `input_ids` except -100 at the first token of a document, which no earlier token predicts. Rows are full
    except the last of every `batch_size` documents.

    Args:
        dataset (`Dataset` or `IterableDataset`): rows with `input_ids`, and `labels` if they differ.
        length (`int`): tokens per row, at least 2.
        one_text (`bool`, *optional*, defaults to `False`): the `batch_size` documents packed together are the lines of
            one text, so tokens see earlier lines.
        batch_size (`int`, *optional*, defaults to 1000): documents packed together.
        num_proc (`int`, *optional*): worker processes.
    """
    if length < 2:
        raise ValueError(
            f"length is {length}, but a row of 1 token has no target; choose at least 2; 128 or more is usual."
        )
    require_columns(dataset, ["input_ids"], "Call tokenize_texts first.")
    return _map(dataset, lambda batch: _pack_batch(batch, length, one_text), "pack", num_proc, batch_size)


def _pack_batch(batch: dict, length: int, one_text: bool = False) -> dict:
    documents = [ids for ids in batch["input_ids"] if len(ids)]
    targets = [ids for ids in batch.get("labels", batch["input_ids"]) if len(ids)]
    if one_text and documents:
        documents, targets = ([list(itertools.chain.from_iterable(rows))] for rows in (documents, targets))
    ids = [token for document in documents for token in document]
    labels = [label for target in targets for label in [-100, *target[1:]]]
    document_starts = np.repeat(np.cumsum([0, *map(len, documents)])[:-1], [len(document) for document in documents])
    places = np.arange(len(ids))
    # a document continued from the previous row starts at position 0 again: its earlier tokens are not visible
    positions = (places - np.maximum(document_starts, places // length * length)).tolist()
    columns = {"input_ids": ids, "position_ids": positions, "labels": labels}
    rows = range(0, len(ids), length)
    return {key: [values[row : row + length] for row in rows] for key, values in columns.items()}


def segment_streams(
    dataset: Dataset,
    segment_length: int,
    batch_size: int,
    *,
    document_column: str | None = None,
    pad_token_id: int = 0,
) -> Dataset:
    """Arrange documents for segment recurrence: row `n * batch_size + b` is segment n of stream b.

    Read in order with `batch_size` rows a step (all processes together), row b of a batch continues row b of the
    previous batch, so the memory returned for that row is its own past. Columns: `input_ids`; `labels`, -100
    at the first token of a stream or, with `document_column`, of a document; `shift_labels`, the labels shifted left
    by one token, also across segments (for causal models, so that no target is lost between segments); `memory_reset`
    (`bool`): the row has no past, so its memory must be reset first; `attention_mask`, 0 on the padding of a stream's
    last segment.

    Args:
        dataset (`Dataset`): rows with `input_ids`, as `tokenize_texts` returns them; the order is kept.
        segment_length (`int`): tokens per row.
        batch_size (`int`): number of streams.
        document_column (`str`, *optional*): consecutive rows with the same value are one document, and every document
            starts a new segment with an empty memory. Without it all rows form one long text, as in Transformer-XL.
        pad_token_id (`int`, *optional*, defaults to 0): pads the last segments.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            "segment_streams needs the length of the data set, which a streamed one does not have; load "
            "it without streaming."
        )
    if segment_length < 2 or batch_size < 1:
        raise ValueError(
            f"segment_length is {segment_length} and batch_size {batch_size}, but they must be at least 2 and 1; "
            "512 and 8 are usual."
        )
    require_columns(dataset, ["input_ids", *filter(None, [document_column])], "Call tokenize_texts first.")
    segments: list[np.ndarray] = []
    first: list[bool] = []
    for document in _documents(dataset, document_column):
        cuts = range(0, len(document), segment_length)
        segments += [document[cut : cut + segment_length] for cut in cuts]
        first += [cut == 0 for cut in cuts]
    if not segments:
        raise ValueError(f"The data set has {len(dataset)} rows but 0 tokens; check the text column.")
    steps = -(-len(segments) // batch_size)
    ids = np.full((steps * batch_size, segment_length), pad_token_id, dtype=np.int32)
    mask = np.zeros_like(ids, dtype=np.int8)
    reset = np.ones(len(ids), dtype=bool)
    for place, segment in enumerate(segments):
        stream, step = divmod(place, steps)
        row = step * batch_size + stream
        ids[row, : len(segment)] = segment
        mask[row, : len(segment)] = 1
        reset[row] = first[place] or step == 0
    labels = np.where(mask == 1, ids, -100)
    labels[reset, 0] = -100
    # the target of a segment's last token is the first label of the next segment of its stream
    following = np.append(labels[batch_size:, 0], np.full(batch_size, -100))
    shift_labels = np.concatenate([labels[:, 1:], following[:, None]], axis=1)
    mask[:, 0] = 1  # attention needs at least one token, even where a stream has ended; it has no label
    columns = {
        "input_ids": ids,
        "labels": labels,
        "shift_labels": shift_labels,
        "attention_mask": mask,
        "memory_reset": reset,
    }
    return Dataset.from_dict(columns)


def _documents(dataset: Dataset, document_column: str | None) -> Iterator[np.ndarray]:
    """Yield the tokens of each document, joining consecutive rows with the same `document_column`."""
    parts: list[np.ndarray] = []
    current = None
    for row in dataset:
        document = row[document_column] if document_column else None
        if parts and document != current:
            yield np.concatenate(parts)
            parts = []
        current = document
        if len(row["input_ids"]):
            parts.append(np.asarray(row["input_ids"], dtype=np.int32))
    if parts:
        yield np.concatenate(parts)


@dataclass
class PaddingCollator:
    """Pad the per-token columns of a batch to the longest row and stack the others; all but numbers is dropped.

    Labels are padded with -100, `input_ids` with the tokenizer's pad token, everything else (masks, positions,
    cached teacher columns `[T, K]`) with 0. The model derives its decoder inputs from the labels. Where it does not
    receive the labels, as under the Trainer's label smoothing, pass `model` so that the decoder inputs are made here.
    A mask is added unless the rows are packed: there `position_ids` alone separate the documents, and count on over
    padding, so that it makes one document at most.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): provides the pad token and the padding side of `input_ids`.
        pad_to_multiple_of (`int`, *optional*): rounds lengths up to a multiple, for accelerators that prefer aligned
            shapes.
        model (`PreTrainedModel`, *optional*): adds the `decoder_input_ids` that an encoder-decoder derives from its
            labels, like `DataCollatorForSeq2Seq`.
    """

    tokenizer: PreTrainedTokenizerBase
    pad_to_multiple_of: int | None = None
    model: PreTrainedModel | None = None

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        if not rows:
            raise ValueError("The batch has 0 rows, but at least 1 is needed; check the batch size.")
        numeric = [key for key in rows[0] if all(_is_numeric(row[key]) for row in rows)]
        batch = {key: [np.asarray(row[key]) for row in rows] for key in numeric}
        if "input_ids" in batch and not {"attention_mask", "position_ids"} & set(batch):
            batch["attention_mask"] = [np.ones(len(ids), dtype=np.int64) for ids in batch["input_ids"]]
        stacked = {key: self._stack(key, values) for key, values in batch.items()}
        shift = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if (
            shift is not None
            and "labels" in stacked
            and "decoder_input_ids" not in stacked
            and stacked["labels"].dim() == 2
        ):
            stacked["decoder_input_ids"] = shift(labels=stacked["labels"])
        return stacked

    def _stack(self, key: str, values: list[np.ndarray]) -> torch.Tensor:
        if values[0].ndim:
            fill = {"labels": -100, "shift_labels": -100, "input_ids": self.tokenizer.pad_token_id or 0}.get(key, 0)
            multiple = self.pad_to_multiple_of or 1
            length = -(-max(len(value) for value in values) // multiple) * multiple
            left = self.tokenizer.padding_side == "left"
            if key == "position_ids":
                values = [_count_on(value, length, left) for value in values]
            values = [_pad(value, length, fill, left) for value in values]
        stacked = torch.from_numpy(np.stack(values))
        return stacked if stacked.is_floating_point() or stacked.dtype == torch.bool else stacked.long()


def _is_numeric(value: object) -> bool:
    """Whether a cell holds a number, or numbers only, judged by the first."""
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return np.asarray(value).dtype.kind in "biuf"


def _count_on(positions: np.ndarray, length: int, left: bool) -> np.ndarray:
    """Positions padded to `length`: on the right the last document goes on, on the left there is one more."""
    missing = length - len(positions)
    if left or not len(positions):
        return np.concatenate([np.arange(missing, dtype=positions.dtype), positions])
    return np.concatenate([positions, positions[-1] + 1 + np.arange(missing, dtype=positions.dtype)])


def _pad(value: np.ndarray, length: int, fill: int, left: bool) -> np.ndarray:
    missing = (length - len(value), 0) if left else (0, length - len(value))
    return np.pad(value, [missing] + [(0, 0)] * (value.ndim - 1), constant_values=fill)


def _map(dataset, function, description: str, num_proc: int | None, batch_size: int = 1000):
    """Map batches to batches of new columns; streamed data sets support neither progress bars nor processes."""
    options = {"batched": True, "batch_size": batch_size, "remove_columns": column_names(dataset)}
    if isinstance(dataset, IterableDataset):
        return dataset.map(function, **options)
    return dataset.map(function, desc=description, num_proc=num_proc, **options)
