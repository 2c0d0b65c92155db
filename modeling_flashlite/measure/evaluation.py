"""Evaluate a model on a task: generate, classify, extract or score, then compute metrics."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.batching import PaddingCollator
from ..data.labels import class_id, class_of, ids_by_name, names_of
from ..data.loading import text_of
from ..data.preprocessing import cut_prompt, preprocess
from ..data.tasks import TaskData, prompts_and_references, references_of
from ..data.tokenization import end_tokens
from ..spans_flashlite import cut_question, question_windows, span_scores
from .metrics import METRICS, RESAMPLES
from .perplexity import label_likelihood, text_likelihood
from .results import write_results

__all__ = [
    "classify",
    "evaluate_task",
    "extract_answers",
    "generate_texts",
    "label_likelihood",
    "text_likelihood",
    "write_results",
]

logger = logging.get_logger(__name__)


def evaluate_task(
    data: TaskData,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | IterableDataset,
    *,
    batch_size: int = 16,
    max_source_length: int = 512,
    generation: Mapping | None = None,
    likelihood: Mapping | None = None,
    resamples: int = RESAMPLES,
) -> dict:
    """Run a model over a data set and compute the task's metrics.

    Args:
        data (`TaskData`): the task for this data set and this model (see `tasks.resolve_task`).
        model (`PreTrainedModel`): loaded with the head that the task needs.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        dataset (`Dataset` or `IterableDataset`): one split; a streamed one is read once.
        batch_size (`int`, *optional*, defaults to 16): rows at a time, sorted by length.
        max_source_length (`int`, *optional*, defaults to 512): longer inputs are cut; contexts of questions are read
            in windows.
        generation (`dict`, *optional*): arguments of `generate` over the task's own.
        likelihood (`dict`, *optional*): arguments of `text_likelihood`, for text generation with a decoder-only model.
            An encoder-decoder is scored on continuations of pieces of the text.
        resamples (`int`, *optional*, defaults to 1000): of the bootstrap; 0 for no intervals.

    Returns:
        `dict` with `metrics`, `intervals` (95%, by metric), `details` (signatures and counts), `protocol`, `examples`
        (number), and `predictions` (`list[dict]` of input, prediction and references; empty for text generation).
    """
    task, columns = data.task, data.columns
    rows = list(dataset.select_columns(list(columns.values())))
    if not rows:
        raise ValueError("The data set has 0 rows, but at least 1 is needed; check the split and the limit.")
    if task.name == "text-generation":
        options = {"resamples": resamples, **(likelihood or {})}
        scores, limits = _likelihood(data, model, tokenizer, rows, batch_size, max_source_length, options)
        return {**_sorted_scores(scores), "protocol": limits, "examples": len(rows), "predictions": []}
    limits = {"batch_size": batch_size, "max_source_length": max_source_length}
    protocol: dict = {"max_source_length": max_source_length}
    said: dict = {}
    targets: Dataset | None = None
    references: list
    inputs: list
    if task.name == "classification":
        inputs = [text_of(row[columns["text"]]) for row in rows]
        references, said = _class_ids(data, dataset, rows)
        found = classify(model, tokenizer, inputs, **limits)
    elif task.name == "extractive-qa":
        inputs = [(text_of(row[columns["question"]]), text_of(row[columns["context"]])) for row in rows]
        references = [references_of(row[columns["answers"]]) for row in rows]
        found = extract_answers(model, tokenizer, inputs, allow_empty=not all(references), **limits)
    else:
        protocol["generation"] = {**task.generation, **(generation or {})}
        pairs = [pair for row in rows for pair in prompts_and_references(data, row, tokenizer)]
        inputs, references = [prompt for prompt, _ in pairs], [accepted for _, accepted in pairs]
        # good replies seldom equal the reference, so its likelihood is computed too; what is wrong with the
        # conversations shows before anything is generated
        targets = _targets(data, tokenizer, rows, max_source_length)[0] if task.name == "chat" else None
        ends = {"templated": data.templated, "from_start": task.name == "chat"}
        found = generate_texts(model, tokenizer, inputs, **limits, **ends, **protocol["generation"])
    scores = {**said}
    for group in task.metrics:
        scores |= METRICS[group](found, references, resamples)
    if task.name == "chat":
        scores |= label_likelihood(model, DataLoader(targets, batch_size, collate_fn=PaddingCollator(tokenizer)))
    predictions = [
        {"input": given, "prediction": answer, "references": accepted}
        for given, answer, accepted in zip(inputs, found, references, strict=True)
    ]
    return {**_sorted_scores(scores), "protocol": protocol, "examples": len(rows), "predictions": predictions}


def _likelihood(data: TaskData, model, tokenizer, rows, batch_size, max_source_length, options) -> tuple[dict, dict]:
    """Likelihood of plain text; an encoder-decoder is scored on continuations of text pieces instead."""
    if not data.encoder_decoder:
        return text_likelihood(model, tokenizer, [text_of(row[data.columns["text"]]) for row in rows], **options)
    return _label_scores(data, model, tokenizer, rows, batch_size, max_source_length)


def _label_scores(data: TaskData, model, tokenizer, rows, batch_size, max_source_length) -> tuple[dict, dict]:
    """Loss on the training targets of these rows, and the length limits used."""
    examples, limits = _targets(data, tokenizer, rows, max_source_length)
    batches = DataLoader(examples, batch_size, collate_fn=PaddingCollator(tokenizer))
    return label_likelihood(model, batches), limits


def _targets(data: TaskData, tokenizer, rows, max_source_length) -> tuple[Dataset, dict]:
    """What a training would learn from these rows, and the length limits used."""
    limits = {"max_source_length": max_source_length, "max_target_length": max(2, max_source_length // 4)}
    return preprocess(data, Dataset.from_list(rows), tokenizer, **limits), limits


@torch.inference_mode()
def generate_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    batch_size: int = 16,
    max_source_length: int = 512,
    templated: bool = False,
    from_start: bool = False,
    **generation,
) -> list[str]:
    """Generate an answer to each prompt, in batches of similar length, longest first.

    Args:
        model (`PreTrainedModel`): encoder-decoder, or decoder-only (padded on the left).
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        prompts (`Sequence[str]`): inputs; answers are returned in their order, without special tokens.
        batch_size (`int`, *optional*, defaults to 16): prompts at a time.
        max_source_length (`int`, *optional*, defaults to 512): longer prompts are cut as in training.
        templated (`bool`, *optional*, defaults to `False`): the prompts contain their special tokens, so the tokenizer
            adds none, and the template's end-of-turn token ends an answer too.
        from_start (`bool`, *optional*, defaults to `False`): cut long prompts at their beginning.
        **generation: arguments of `generate`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, but must be at least 1; 16 is usual.")
    encoder_decoder = model.config.is_encoder_decoder
    generation.setdefault("pad_token_id", tokenizer.pad_token_id)
    if templated and "eos_token_id" not in generation:
        generation["eos_token_id"] = end_tokens(tokenizer, model.generation_config) or None
    encoded = tokenizer(list(prompts), add_special_tokens=not templated, verbose=False)["input_ids"]
    encoded = [cut_prompt(ids, max_source_length, from_start) for ids in encoded]
    answers = [""] * len(prompts)
    model.eval()
    for picks in _batches([len(ids) for ids in encoded], batch_size, "generate"):
        batch = tokenizer.pad(
            {"input_ids": [encoded[i] for i in picks]},
            padding_side="right" if encoder_decoder else "left",
            return_tensors="pt",
        ).to(model.device)
        ids = model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **generation)
        if not encoder_decoder:
            ids = ids[:, batch["input_ids"].shape[1] :]
        for place, text in zip(picks, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True):
            answers[place] = text.strip()
    return answers


@torch.inference_mode()
def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    batch_size: int = 16,
    max_source_length: int = 512,
) -> list[int]:
    """Return the most probable class id of each text."""
    encoded = [ids[:max_source_length] for ids in tokenizer(list(texts), verbose=False)["input_ids"]]
    found = [0] * len(texts)
    model.eval()
    for picks in _batches([len(ids) for ids in encoded], batch_size, "classify"):
        batch = tokenizer.pad({"input_ids": [encoded[i] for i in picks]}, return_tensors="pt").to(model.device)
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for place, label in zip(picks, logits.argmax(-1).tolist(), strict=True):
            found[place] = label
    return found


@torch.inference_mode()
def extract_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[tuple[str, str]],
    *,
    allow_empty: bool = False,
    max_answer_tokens: int = 30,
    batch_size: int = 16,
    max_source_length: int = 384,
    stride: int = 128,
) -> list[str]:
    """Return, for each (question, context), the span with the highest sum of start and end logits.

    Args:
        model (`PreTrainedModel`): with a question-answering head.
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        asked (`Sequence[tuple[str, str]]`): questions with their contexts.
        allow_empty (`bool`, *optional*, defaults to `False`): answer "" if the first token, which stands for no
            answer, scores above every span.
        max_answer_tokens (`int`, *optional*, defaults to 30): longest span.
        batch_size, max_source_length, stride (`int`, *optional*): windows at a time, tokens of each and of overlaps.
    """
    fitting = [(cut_question(tokenizer, question, max_source_length), context) for question, context in asked]
    windows = [
        (number, ids, offsets)
        for number, texts in enumerate(fitting)
        for ids, offsets in question_windows(tokenizer, *texts, max_source_length, stride)
    ]
    best = [(float("-inf"), "")] * len(asked)
    # a context has no answer if none of its windows has one
    empty = [float("inf")] * len(asked)
    model.eval()
    for picks in _batches([len(ids) for _, ids, _ in windows], batch_size, "answer"):
        batch = tokenizer.pad(
            {"input_ids": [windows[i][1] for i in picks]}, padding_side="right", return_tensors="pt"
        ).to(model.device)
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        for place, starts, ends in zip(picks, outputs.start_logits.float(), outputs.end_logits.float(), strict=True):
            number, ids, offsets = windows[place]
            score, first, last = _best_span(starts[: len(ids)], ends[: len(ids)], offsets, max_answer_tokens)
            empty[number] = min(empty[number], float(starts[0] + ends[0]))
            if score > best[number][0]:
                best[number] = (score, asked[number][1][offsets[first][0] : offsets[last][1]].strip())
    return ["" if allow_empty and none > score else text for (score, text), none in zip(best, empty, strict=True)]


def _best_span(starts: torch.Tensor, ends: torch.Tensor, offsets: list, longest: int) -> tuple[float, int, int]:
    inside = torch.tensor([end > 0 for _, end in offsets], device=starts.device)
    scores = span_scores(starts, ends, inside, longest)
    place = int(scores.argmax())
    return float(scores.flatten()[place]), place // len(offsets), place % len(offsets)


def _batches(lengths: Sequence[int], batch_size: int, description: str) -> Iterable[list[int]]:
    """Indices in batches of similar length, longest first, so that running out of memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    with tqdm(total=len(order), desc=description, unit="row") as bar:
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size]
            bar.update(len(order[start : start + batch_size]))


def _class_ids(data: TaskData, dataset, rows: list[dict]) -> tuple[list[int], dict]:
    """Map labels to the model's class ids by name (-1 for unknown names), with remarks for the results file.

    Numbers are compared only where one side has no names: integers in the data, or a model with `LABEL_0`, ... For
    such a model, the names in the data are numbered in alphabetical order, as in training; they must be all of them.
    """
    column, known = data.columns["label"], data.classes or []
    labels, names = [row[column] for row in rows], names_of(dataset, column)
    if without := sum(label is None or (isinstance(label, int) and label < 0) for label in labels):
        raise ValueError(f"Column {column!r} has {without} rows without a label; leave them out.")
    nameless = known == [f"LABEL_{number}" for number in range(len(known))]
    ids, texts = ids_by_name(known), [class_of(label, names) for label in labels]
    found = [class_id(text, ids) for text in texts]
    numbers = not isinstance(labels[0], str)
    if nameless and not numbers and len(set(texts)) == len(known):
        order = sorted(set(texts))
        return [order.index(text) for text in texts], {"labels": f"taken in the order {', '.join(order)}"}
    if numbers and (nameless or (names is None and not any(label is not None for label in found))):
        return [int(label) for label in labels], {"labels": "compared by number, since one side has no names"}
    unknown = Counter(text for text, label in zip(texts, found) if label is None)
    if len(unknown) and unknown.total() == len(labels):
        raise ValueError(
            f"The classes of {column!r} are {_listed(sorted(unknown))}, but the model's are {_listed(known)}; rename "
            "one of them (config.id2label), so that both can be compared."
        )
    said = (
        {"unknown_labels": ", ".join(f"{text} ({count} rows)" for text, count in unknown.items())} if unknown else {}
    )
    if unknown:
        logger.warning(f"The model does not know {said['unknown_labels']}: all answers to these rows count as wrong.")
    return [-1 if label is None else label for label in found], said


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _sorted_scores(scores: dict) -> dict:
    """Split the flat output of the metrics into numbers, intervals and details."""
    details = {name: value for name, value in scores.items() if isinstance(value, (str, int))}
    ends = {name for name in scores if name.endswith(("_low", "_high"))}
    metrics = {name: value for name, value in scores.items() if name not in details and name not in ends}
    intervals = {name: [scores[f"{name}_low"], scores[f"{name}_high"]] for name in metrics if f"{name}_low" in ends}
    return {"metrics": metrics, "intervals": intervals, "details": details}
