"""From the rows of a task to model inputs for training, one method per kind of task."""

from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..spans_flashlite import cut_question, question_windows
from .batching import join_rows, pack, row_end, tokenize_texts
from .conversations import cut_at_turns, encode_conversation, messages_of
from .labels import class_id, class_of, ids_by_name, names_of
from .loading import column_names, require_columns, text_of
from .tasks import TaskData, prompts_and_references, references_of
from .tokenization import turn_end

logger = logging.get_logger(__name__)

_OUTPUTS = {"extractive-qa": ("input_ids", "start_positions", "end_positions")}


def preprocess(
    data: TaskData,
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_source_length: int = 512,
    max_target_length: int = 128,
    too_long: str = "truncate",
    packed: bool = False,
    document_column: str | None = None,
    end: str = "eos",
    num_proc: int | None = None,
) -> Dataset | IterableDataset:
    """Turn the rows of a data set into model inputs for training on a task.

    Encoder-decoder models get `input_ids` (the prompt, with the tokenizer's own special tokens) and `labels` (target
    and `</s>`). Decoder-only models get both in one sequence, with the label -100 on everything but the answer. Text
    generation is packed into rows of `max_source_length` tokens; for an encoder-decoder, a text is cut into a source
    and its continuation. Classification gives `labels` as class ids; extractive question answering gives
    `start_positions` and `end_positions`, both 0 (the first token) if the answer is not in the window.

    Args:
        data (`TaskData`): the task for these columns and this kind of model; labels are matched to class ids by name.
        dataset (`Dataset` or `IterableDataset`): rows.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        max_source_length (`int`, *optional*, defaults to 512): tokens of the input, or of the whole row for
            decoder-only models.
        max_target_length (`int`, *optional*, defaults to 128): tokens of the labels, `</s>` included.
        too_long (`str`, *optional*, defaults to `"truncate"`): what to do with rows above these limits: `truncate`,
            `drop` the row, or `error`. Conversations lose their last turns. Extractive question answering uses sliding
            windows instead: only a question that fills one is too long.
        packed (`bool`, *optional*, defaults to `False`): conversations and prompts with answers, without an encoder:
            several in one row of `max_source_length` tokens, which see only themselves.
        num_proc (`int`, *optional*): worker processes.
        document_column (`str`, *optional*): text generation without an encoder: consecutive rows with the same value
            are joined to one document.
        end (`str`, *optional*, defaults to `"eos"`): text generation without an encoder: what closes a row, see
            [`row_end`].
    """
    if too_long not in ("truncate", "drop", "error"):
        raise ValueError(f"too_long is {too_long!r}, but must be 'truncate', 'drop' or 'error'.")
    if min(max_source_length, max_target_length) < 2:
        raise ValueError(
            f"max_source_length is {max_source_length} and max_target_length {max_target_length}, but each must be at "
            "least 2; 512 and 128 are usual."
        )
    task = data.task
    require_columns(dataset, list(data.columns.values()), "Every split needs the columns of the training split.")
    if task.name == "text-generation" and not data.encoder_decoder:
        if document_column is not None:
            dataset = join_rows(dataset, data.columns["text"], document_column)
        elif end == "eos":
            _warn_of_lines(dataset, data.columns["text"])
        documents = tokenize_texts(dataset, tokenizer, data.columns["text"], end=row_end(end), num_proc=num_proc)
        return pack(documents, max_source_length, one_text=end == "newline" and document_column is None)
    if document_column is not None or end != "eos":
        raise ValueError(
            f"document_column is {document_column!r} and end {end!r}, but only text generation by a decoder-only "
            f"model joins rows, and the task is {task.name}; leave them out."
        )
    if not data.encoder_decoder and task.target != "label" and max_target_length >= max_source_length:
        raise ValueError(
            f"max_target_length is {max_target_length}, but without an encoder it is part of max_source_length, "
            f"{max_source_length}; raise the latter."
        )
    if packed and (data.encoder_decoder or not task.generates):
        raise ValueError(
            f"packed is set, but {task.name} by this kind of model has a row for each answer; leave it out."
        )
    names = names_of(dataset, data.columns["label"]) if data.classes is not None else None
    encode = _Encoder(data, tokenizer, max_source_length, max_target_length, too_long, names)
    options = {"batched": True, "remove_columns": column_names(dataset)}
    if isinstance(dataset, Dataset):
        options |= {"num_proc": num_proc, "desc": f"prepare {task.name}"}
    examples = dataset.map(encode, **options)
    if isinstance(examples, Dataset) and not len(examples):
        raise ValueError(
            f"0 examples came out of {len(dataset)} rows; check the columns, the lengths, and too_long={too_long!r}."
        )
    return pack(examples, max_source_length) if packed else examples


def _warn_of_lines(dataset: Dataset | IterableDataset, column: str) -> None:
    """Warn where the first hundred rows look like the lines of one text, which would be learned one at a time."""
    first = [text_of(row[column]) for row in dataset.take(100)]
    blank = sum(not text.strip() for text in first)
    if blank > len(first) / 10:
        logger.warning(
            f"{blank} of the first {len(first)} rows are blank, as among the lines of one text, but every row is a "
            "document of its own; with end=newline the rows are read as one text."
        )


@dataclass
class _Encoder:
    """Maps a batch of rows to model inputs; a class, so that workers and fingerprints can pickle it."""

    data: TaskData
    tokenizer: PreTrainedTokenizerBase
    max_source_length: int
    max_target_length: int
    too_long: str
    names: list[str] | None = None  # class names from the data set's ClassLabel
    end: int = -1  # closes an answer: the end-of-turn token of a chat template, else the end of sequence

    def __post_init__(self):
        end = turn_end(self.tokenizer) if self.data.templated and self.data.task.generates else None
        end = self.tokenizer.eos_token_id if end is None else end
        if end is None and self.data.task.generates:
            raise ValueError("The tokenizer has no eos_token, but an answer must end; set `tokenizer.eos_token`.")
        self.end = -1 if end is None else end

    def __call__(self, batch: dict) -> dict[str, list]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        encode = {
            "classification": self._classified,
            "extractive-qa": self._questions,
            "text-generation": self._continued,
        }.get(self.data.task.name, self._generated)
        examples = [example for row in rows for example in encode(row)]
        names = examples[0] if examples else _OUTPUTS.get(self.data.task.name, ("input_ids", "labels"))
        return {name: [example[name] for example in examples] for name in names}

    def _generated(self, row: dict) -> list[dict]:
        if self.data.task.name == "chat" and not self.data.encoder_decoder:
            return self._conversation(messages_of(row[self.data.columns["messages"]]))
        examples = []
        for prompt, references in prompts_and_references(self.data, row, self.tokenizer):
            if not references:
                continue
            source = self.tokenizer(prompt, add_special_tokens=not self.data.templated, verbose=False)["input_ids"]
            target = self._ids(references[0]) + [self.end]
            examples += self._joined(source, target)
        return examples

    def _joined(self, source: list[int], target: list[int]) -> list[dict]:
        target_limit = self.max_target_length
        target_fits, end = len(target) <= target_limit, target[-1:]
        source_limit = self.max_source_length - (0 if self.data.encoder_decoder else min(len(target), target_limit))
        source_fits = len(source) <= source_limit
        if not (source_fits and target_fits):
            if self.too_long == "drop":
                return []
            if self.too_long == "error":
                if source_fits:
                    _raise_too_long("target", len(target), target_limit, "max_target_length")
                _raise_too_long("source", len(source), source_limit, "max_source_length")
            if not target_fits:
                target = target[: target_limit - 1] + end
            source = cut_prompt(source, source_limit, from_start=self.data.task.name == "chat")
        if self.data.encoder_decoder:
            return [{"input_ids": source, "labels": target}]
        return [{"input_ids": source + target, "labels": [-100] * len(source) + target}]

    def _conversation(self, messages: list[dict]) -> list[dict]:
        limit, examples = self.max_source_length, []
        for ids, spoken in encode_conversation(self.tokenizer, messages) if messages else ():
            if len(ids) > limit and self.too_long == "error":
                _raise_too_long("conversation", len(ids), limit, "max_source_length")
            if len(ids) > limit and self.too_long == "drop":
                continue
            ids, spoken = cut_at_turns(ids, spoken, limit)
            labels = [token if said else -100 for token, said in zip(ids, spoken, strict=True)]
            if any(spoken):
                examples.append({"input_ids": ids, "labels": labels})
        return examples

    def _continued(self, row: dict) -> list[dict]:
        ids = self._ids(text_of(row[self.data.columns["text"]])) + [self.tokenizer.eos_token_id]
        both = self.max_source_length + self.max_target_length
        examples = []
        for start in range(0, len(ids), both):
            chunk = ids[start : start + both]
            # the remainder is split in the same proportion
            source = min(self.max_source_length, len(chunk) * self.max_source_length // both)
            if source and len(chunk) > source:
                examples.append({"input_ids": chunk[:source], "labels": chunk[source:]})
        return examples

    def _classified(self, row: dict) -> list[dict]:
        ids = self.tokenizer(text_of(row[self.data.columns["text"]]), verbose=False)["input_ids"]
        if len(ids) > self.max_source_length and self.too_long != "truncate":
            if self.too_long == "drop":
                return []
            _raise_too_long("text", len(ids), self.max_source_length, "max_source_length")
        return [
            {"input_ids": ids[: self.max_source_length], "labels": self._class_id(row[self.data.columns["label"]])}
        ]

    def _class_id(self, label: object) -> int:
        name, classes = class_of(label, self.names), self.data.classes or []
        number = class_id(name, ids_by_name(classes))
        if number is None and self.names is None and not isinstance(label, str) and int(name) < len(classes):
            return int(name)  # plain integers are class ids
        if number is None:
            raise ValueError(
                f"A row has the class {name!r}, but the model's are {', '.join(classes)}; leave such rows out, "
                "or train on rows that have it."
            )
        return number

    def _questions(self, row: dict) -> list[dict]:
        question, context = text_of(row[self.data.columns["question"]]), text_of(row[self.data.columns["context"]])
        fitting = cut_question(self.tokenizer, question, self.max_source_length)
        if fitting != question and self.too_long == "drop":
            return []
        if self.too_long == "truncate":
            question = fitting
        span = answer_span(row[self.data.columns["answers"]], context)
        windows = question_windows(self.tokenizer, question, context, self.max_source_length)
        return [
            {"input_ids": ids, "start_positions": start, "end_positions": end}
            for ids, offsets in windows
            for start, end in [_token_span(offsets, span)]
        ]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def cut_prompt(ids: list[int], limit: int, from_start: bool = False) -> list[int]:
    """Shorten an encoded prompt to `limit` tokens, at its beginning (a chat) or before its last few tokens.

    The last tokens are kept: a template asks for the answer there, and `</s>` closes an encoder input.
    """
    if len(ids) <= limit:
        return ids
    kept = limit if from_start else min(8, limit // 2)
    return ids[: limit - kept] + ids[len(ids) - kept :]


def answer_span(answers: Mapping | list | str, context: str) -> tuple[int, int] | None:
    """Characters (start, end) of the first accepted answer in the context, or `None` if there is no answer."""
    texts = references_of(answers)
    if not texts or not texts[0]:
        return None
    first = answers[0] if isinstance(answers, list) else answers
    start = first.get("answer_start") if isinstance(first, Mapping) else None
    start = start[0] if isinstance(start, list) else start
    start = context.find(texts[0]) if start is None else start
    return (start, start + len(texts[0])) if start >= 0 else None


def _token_span(offsets: list[tuple[int, int]], span: tuple[int, int] | None) -> tuple[int, int]:
    """First and last token of a span of characters; (0, 0), the first token, if the window does not hold all of it."""
    if span is None:
        return 0, 0
    inside = [token for token, (start, end) in enumerate(offsets) if end > span[0] and start < span[1]]
    if not inside or offsets[inside[0]][0] > span[0] or offsets[inside[-1]][1] < span[1]:
        return 0, 0
    return inside[0], inside[-1]


def _raise_too_long(what: str, size: int, limit: int, option: str) -> None:
    raise ValueError(
        f"A {what} has {size} tokens, but at most {limit} fit; raise {option}, or set too_long='truncate' or 'drop'."
    )
