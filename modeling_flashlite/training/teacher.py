"""Teachers: their distributions aligned with a student's labels, and cached once as ordinary dataset columns.

Letters: B batch, T target, V vocabulary, K kept entries of a token, n labelled tokens.
"""

import hashlib
import json
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..checkpoint import load_language_model
from ..data.loading import PaddingCollator, require_columns
from .divergence import pack_weights

__all__ = [
    "TeacherCache",
    "check_separation",
    "check_teacher_columns",
    "check_tokens",
    "check_vocabulary",
    "teacher_logits",
    "tokenizer_fingerprint",
]

MODES = ("sample", "topk", "text")
# whether a model separates packed documents, cached
_SEPARATING: WeakKeyDictionary = WeakKeyDictionary()


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of the token-to-id mapping: equal for interchangeable tokenizers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hash of samples of every weight: distinguishes revisions without reading a whole teacher."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        numbers = weight.detach().flatten()
        digest.update(numbers[:: max(1, len(numbers) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def data_fingerprint(rows: Dataset) -> str:
    """Hash of the tokens, labels and positions of all rows: the same data give the same on every machine."""
    digest = hashlib.sha256()
    for name in sorted({"input_ids", "labels", "position_ids"} & set(rows.column_names)):
        digest.update(name.encode())
        for batch in rows.select_columns([name]).with_format("arrow").iter(1000):
            column = batch[name].combine_chunks()
            digest.update(np.asarray(column.value_lengths(), dtype=np.int64).tobytes())
            digest.update(np.asarray(column.flatten(), dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def check_vocabulary(teacher: Tokenizer, student: Tokenizer) -> None:
    """Raise `ValueError` unless the ids of both tokenizers mean the same tokens."""
    if tokenizer_fingerprint(teacher) != tokenizer_fingerprint(student):
        raise ValueError(
            f"The teacher's tokenizer has {len(teacher)} tokens and the student's {len(student)}, and they differ; "
            "train the student with the teacher's tokenizer, or distil through text with TeacherCache(mode='text')."
        )


def teacher_logits(
    teacher: PreTrainedModel, batch: dict[str, torch.Tensor], seq2seq: bool
) -> tuple[torch.Tensor, object]:
    """Logits `[B, T, V]` of a teacher, row t being what the student's state t must match, and the teacher's output.

    An encoder-decoder teacher reads the source and its own right-shifted targets, a decoder-only teacher on causal
    data the same tokens as the student. For a sequence-to-sequence student a decoder-only teacher reads source and
    target as one text, and its rows are those that predict the targets.

    Args:
        teacher (`PreTrainedModel`): any model with logits.
        batch (`dict`): `input_ids`, optionally `attention_mask`, `position_ids`, `labels`.
        seq2seq (`bool`): whether `labels` are the targets of a source, else of `input_ids` themselves.

    Raises:
        `ValueError`: the data hold tokens that the teacher does not know, or packed documents that it cannot keep
            apart.
    """
    check_tokens(teacher, *(batch[key] for key in ("input_ids", "labels") if batch.get(key) is not None))
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask") if batch.get(key) is not None}
    if teacher.config.is_encoder_decoder:
        if not seq2seq:
            raise ValueError(
                "The teacher is an encoder-decoder but the data are plain text without a source; use a decoder-only "
                "teacher, or data with input_ids and separate labels."
            )
        inputs["decoder_input_ids"] = shift_right(batch["labels"], teacher)
        output = teacher(**inputs, use_cache=False)
        return output.logits, output
    if not seq2seq:
        if batch.get("position_ids") is not None:
            check_separation(teacher)
            inputs["position_ids"] = batch["position_ids"]
        # with use_cache the library ignores the mask implied by restarting positions
        output = teacher(**inputs, use_cache=False)
        return output.logits, output
    return _continuation_logits(teacher, batch)


def check_tokens(model: PreTrainedModel, *tokens: torch.Tensor) -> None:
    """Raise `ValueError` where `tokens` hold an id for which the model has no embedding, which PyTorch only counts."""
    known = getattr(model.get_input_embeddings(), "num_embeddings", None)
    largest = max((int(ids.max()) for ids in tokens if ids.numel()), default=-1)
    if known is not None and largest >= known:
        raise ValueError(
            f"The data hold the token {largest}, but {model.name_or_path or type(model).__name__} knows {known} only; "
            "encode the data with its own tokenizer, or take a model of the data's vocabulary."
        )


def check_separation(model: PreTrainedModel) -> None:
    """Raise `ValueError` where a model reads across the documents of a packed row, which `position_ids` tell apart.

    Two short documents are read in one row and by themselves, once for each model. What is left of the difference
    that a row without boundaries makes must be rounding.
    """
    if model not in _SEPARATING:
        _SEPARATING[model] = _separates(model)
    if not _SEPARATING[model]:
        raise ValueError(
            f"{type(model).__name__} reads across packed documents: it takes no boundaries from position_ids; give it "
            "one document a row, or take a model that does (Llama and its kin)."
        )


@torch.no_grad()
def _separates(model: PreTrainedModel) -> bool:
    known = getattr(model.get_input_embeddings(), "num_embeddings", 0) or model.config.get_text_config().vocab_size
    ids = (torch.arange(1, 25, device=model.device) * 7919 % known)[None]
    first, second = torch.arange(9, device=model.device)[None], torch.arange(15, device=model.device)[None]
    training = model.training
    model.eval()
    try:
        packed = (
            model(input_ids=ids, position_ids=torch.cat([first, second], 1), use_cache=False).logits[:, 9:].float()
        )
        alone = model(input_ids=ids[:, 9:], use_cache=False).logits.float()
        joined = model(input_ids=ids, use_cache=False).logits[:, 9:].float()
    except TypeError:  # the model has no position_ids argument
        return False
    finally:
        model.train(training)
    error, across = ((read - alone).abs().max() for read in (packed, joined))
    return bool(error <= 0.25 * across)


def shift_right(labels: torch.Tensor, teacher: PreTrainedModel) -> torch.Tensor:
    """Decoder inputs of an encoder-decoder teacher: its start token, then the targets."""
    if hasattr(teacher, "prepare_decoder_input_ids_from_labels"):
        return teacher.prepare_decoder_input_ids_from_labels(labels)
    generation = teacher.generation_config
    start = generation.decoder_start_token_id
    start = generation.bos_token_id if start is None else start
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], dim=1)
    return shifted.masked_fill(shifted == -100, generation.pad_token_id or 0)


def _continuation_logits(teacher: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, object]:
    """Logits of a decoder-only teacher for the targets of a source: it reads both as one text."""
    labels, ids = batch["labels"], batch["input_ids"]
    mask = batch.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    keep = torch.cat([mask.bool(), labels != -100], dim=1)
    # stable sort moves the padding behind the text of each row
    order = (~keep).long().argsort(dim=1, stable=True)
    text = torch.cat([ids, labels.clamp(min=0)], dim=1).gather(1, order)
    output = teacher(input_ids=text, attention_mask=keep.gather(1, order).long(), use_cache=False)
    place = (mask.sum(1, keepdim=True) + (labels != -100).cumsum(1) - 2).clamp(min=0)
    return output.logits.gather(1, place[..., None].expand(-1, -1, output.logits.shape[-1])), output


@dataclass
class TeacherCache:
    r"""Run a teacher once over a dataset and keep what a student needs in columns of that dataset.

    Modes: `"sample"` draws `k` tokens from the teacher's distribution and keeps their shares, an unbiased estimate of
    the forward KL and its gradient (arXiv 2503.16870); `"topk"` keeps the `k` largest probabilities, the rest is one
    tail bucket; `"text"` writes the teacher's own answer to the column `teacher_text`, for any tokenizer.

    The columns are `teacher_ids` and `teacher_weights`, `[T, K]`, and `teacher_info`, a JSON text that says where they
    come from. Row t is what the student's state t must match: it belongs to `labels[t]` of a target and to
    `labels[t + 1]` of causal data. K is `k`; in mode `sample` it is `k + 2`: first comes the teacher's best token,
    last the mean log-probability of the samples: with it, a student equal to its teacher logs a divergence of 0.

    Args:
        teacher (`PreTrainedModel` or `str`): any Hugging Face language model, or the name of one.
        tokenizer (`PreTrainedTokenizerBase`): the tokenizer of teacher and data.
        k (`int`, *optional*, defaults to 64): entries per token.
        mode (`str`, *optional*, defaults to `"sample"`): see above.
        temperature (`float`, *optional*, defaults to 2.0): of the teacher's softmax; must equal the loss's.
        dtype (`str`, *optional*, defaults to `"float16"`): type of the stored weights, `float16` or `float32`; in mode
            `topk` also `uint8`, which keeps odds to 4% (see [`divergence.pack_weights`]).
        seed (`int`, *optional*, defaults to 0): of the samples.
    """

    teacher: Any
    tokenizer: Tokenizer
    k: int = 64
    mode: str = "sample"
    temperature: float = 2.0
    dtype: str = "float16"
    seed: int = 0

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"mode is {self.mode!r}, but must be one of {', '.join(MODES)}.")
        if self.k < 1 or self.temperature <= 0:
            raise ValueError(f"k is {self.k} and temperature {self.temperature}, but both must be positive.")
        if self.dtype not in ("float16", "float32", "uint8") or (self.dtype == "uint8" and self.mode != "topk"):
            raise ValueError(
                f"dtype is {self.dtype!r} in mode {self.mode!r}, but must be float16, float32, or uint8 in mode topk."
            )
        if isinstance(self.teacher, str):
            self.teacher = load_language_model(self.teacher, device="cpu")
        self.teacher.eval()
        self.vocab_size = min(len(self.tokenizer), self.teacher.get_output_embeddings().weight.shape[0])
        if len(self.tokenizer) - self.vocab_size > 0:
            raise ValueError(
                f"The tokenizer has {len(self.tokenizer)} tokens but the teacher only {self.vocab_size} output ids; "
                "pass the teacher's own tokenizer."
            )
        if self.mode == "topk" and self.k > self.vocab_size:
            raise ValueError(f"k is {self.k}, but the vocabulary has {self.vocab_size} tokens; choose a smaller k.")

    @property
    def info(self) -> dict:
        """Where the columns come from: teacher, revision, tokenizer and how they were made."""
        return {
            "teacher": self.teacher.name_or_path or type(self.teacher).__name__,
            "revision": getattr(self.teacher.config, "_commit_hash", None),
            "weights": weights_fingerprint(self.teacher),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "vocab_size": self.vocab_size,
            **{key: getattr(self, key) for key in ("mode", "k", "temperature", "dtype", "seed")},
        }

    def difference(self, annotated: Dataset, dataset: Dataset) -> str | None:
        """What tells the columns of `annotated` from those that this cache would make of `dataset`, if anything."""
        if "teacher_info" not in annotated.column_names or not len(annotated):
            return "no teacher columns"
        held = json.loads(annotated[0]["teacher_info"])
        wanted = {**self.info, "data": data_fingerprint(dataset)}
        named = ("weights", "tokenizer", "data", "mode", "k", "temperature", "dtype", "seed", "vocab_size")
        return next(
            (f"{key} {held.get(key)} instead of {wanted[key]}" for key in named if held.get(key) != wanted[key]), None
        )

    def annotate(self, dataset: Dataset | IterableDataset, batch_size: int = 8, **text_options):
        """Add the teacher's columns to a tokenised dataset (or, in mode `text`, its answers to a dataset of texts).

        Args:
            dataset (`Dataset` or `IterableDataset`): rows with `input_ids` and `labels` (without `labels`, the
                `input_ids` are the targets); in mode `text` rows with a text column.
            batch_size (`int`, *optional*, defaults to 8): rows per forward pass of the teacher.
            text_options: mode `text` only: `source` (`str`, defaults to `"source"`), the column to answer, and
                arguments of `generate` such as `max_new_tokens`.

        Returns:
            the dataset with the new columns, in NumPy format.
        """
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(
                "The dataset has 0 rows, so there is nothing to annotate; check the split and its filters."
            )
        made_of = {"data": data_fingerprint(dataset)} if isinstance(dataset, Dataset) else {}
        info = json.dumps({**self.info, **made_of}, sort_keys=True)
        if self.mode == "text":
            source = text_options.pop("source", "source")
            require_columns(dataset, [source], "Name the text to answer with source=.")
            function, features = self._answers(source, info, text_options), {"teacher_text": Value("string")}
        else:
            require_columns(dataset, ["input_ids"], "Tokenise first.")
            width = self.k + 2 if self.mode == "sample" else self.k
            small = "uint16" if self.vocab_size <= 1 << 16 else "int32"
            features = {
                "teacher_ids": List(List(Value(small), length=width)),
                "teacher_weights": List(List(Value(self.dtype), length=width)),
            }
            function = self._columns(info)
        options: dict[str, Any] = {"batched": True, "batch_size": batch_size, "with_indices": True}
        if dataset.features is not None:
            options["features"] = Features({**dataset.features, **features, "teacher_info": Value("string")})
        if isinstance(dataset, Dataset):
            # the default fingerprint would hash all weights of the teacher
            key = f"{dataset._fingerprint}{info}{sorted(text_options.items())}"
            options |= {"new_fingerprint": hashlib.sha256(key.encode()).hexdigest()[:16], "desc": "annotate"}
        annotated = dataset.map(function, **options)
        return annotated if self.mode == "text" else annotated.with_format("numpy")

    def _columns(self, info: str):
        # right padding whatever the tokenizer does, so that no causal row attends to padding
        collate = PaddingCollator(SimpleNamespace(pad_token_id=self.tokenizer.pad_token_id or 0, padding_side="right"))
        device = self.teacher.device

        def function(rows, indices):
            keys = [key for key in ("input_ids", "attention_mask", "position_ids", "labels") if key in rows]
            items = [dict(zip(keys, values)) for values in zip(*(rows[key] for key in keys))]
            batch = {key: value.to(device) for key, value in collate(items).items()}
            seq2seq = "labels" in batch and is_seq2seq(items[0])
            labels = batch.setdefault("labels", batch["input_ids"])
            if not seq2seq:  # state t of a causal student predicts token t + 1
                if "attention_mask" in batch:
                    labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
                labels = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
            with torch.no_grad():
                logits, _ = teacher_logits(self.teacher, batch, seq2seq)
            generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + indices[0])
            ids, weights = self._select(logits[labels != -100], generator)
            lengths = [len(item.get("labels", item["input_ids"])) for item in items]
            mask = labels != -100
            weights = pack_weights(weights) if self.dtype == "uint8" else weights.to(getattr(torch, self.dtype))
            return {
                "teacher_ids": self._rows(mask, ids, lengths),
                "teacher_weights": self._rows(mask, weights, lengths),
                "teacher_info": [info] * len(lengths),
            }

        return function

    def _rows(self, mask: torch.Tensor, kept: torch.Tensor, lengths: list[int]) -> list[np.ndarray]:
        """Spread the entries `[n, K]` of labelled tokens over their rows, each of its own length, zeros elsewhere."""
        whole = kept.new_zeros(*mask.shape, kept.shape[-1])
        whole[mask] = kept
        return [row[:n] for row, n in zip(whole.cpu().numpy(), lengths)]

    def _select(self, logits: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep K entries of each row: `[n, V]` logits to `[n, K]` ids and weights."""
        log_p = torch.log_softmax(logits[:, : self.vocab_size].float() / self.temperature, dim=-1)
        if self.mode == "topk":
            values, ids = log_p.topk(self.k)
            return ids, values.exp()
        drawn = torch.multinomial(log_p.exp(), self.k, replacement=True, generator=generator).sort(dim=-1).values
        # slot of each sample among the distinct ones of its row
        slot = torch.zeros_like(drawn)
        slot[:, 1:] = (drawn[:, 1:] != drawn[:, :-1]).cumsum(-1)
        ids = torch.zeros_like(drawn).scatter_(1, slot, drawn)
        each = torch.full_like(drawn, 1.0 / self.k, dtype=log_p.dtype)
        shares = torch.zeros_like(each).scatter_add_(1, slot, each)
        mean_log_p = (shares * log_p.gather(1, ids)).sum(-1, keepdim=True)
        best, zero = log_p.argmax(-1, keepdim=True), torch.zeros_like(mean_log_p)
        return torch.cat([best, ids, torch.zeros_like(best)], 1), torch.cat([zero, shares, mean_log_p], 1)

    def _answers(self, source: str, info: str, options: dict):
        def function(rows, indices):
            torch.manual_seed(self.seed * 1_000_003 + indices[0])
            batch = self.tokenizer(
                rows[source], return_tensors="pt", padding=True, truncation=True, padding_side="left"
            )
            batch = {key: batch[key].to(self.teacher.device) for key in ("input_ids", "attention_mask")}
            with torch.no_grad():
                ids = self.teacher.generate(**batch, **options)
            if not self.teacher.config.is_encoder_decoder:
                ids = ids[:, batch["input_ids"].shape[1] :]
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            return {"teacher_text": texts, "teacher_info": [info] * len(texts)}

        return function


def is_seq2seq(row: dict) -> bool:
    """Whether a row's labels are the targets of a source rather than a masked copy of its own input."""
    ids, labels = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    return ids.shape != labels.shape or bool(((labels != ids) & (labels != -100)).any())


def check_teacher_columns(dataset, tokenizer: Tokenizer, loss=None, teacher: PreTrainedModel | None = None) -> dict:
    """Refuse cached teacher columns made for another tokenizer, temperature, divergence or teacher.

    Args:
        dataset: what [`TeacherCache.annotate`] returned, possibly saved, pushed and loaded again.
        tokenizer (`PreTrainedTokenizerBase`): the student's.
        loss (`KDLoss`, *optional*): compares its temperature, and its divergence with the cache's mode.
        teacher (`PreTrainedModel`, *optional*): compares its weights with those that made the columns.

    Returns:
        `dict`: where the columns come from.

    Raises:
        `ValueError`: naming the first difference.
    """
    require_columns(dataset, ["teacher_info"], "Annotate it with TeacherCache first.")
    texts = dataset.unique("teacher_info") if isinstance(dataset, Dataset) else [next(iter(dataset))["teacher_info"]]
    for info in map(json.loads, texts):
        expected = {"tokenizer": tokenizer_fingerprint(tokenizer)}
        if loss is not None:
            expected["temperature"] = loss.temperature
        if teacher is not None:
            expected["weights"] = weights_fingerprint(teacher)
        for key, value in expected.items():
            if info[key] != value:
                raise ValueError(
                    f"The teacher columns were made by {info['teacher']} with {key} {info[key]}, but training uses "
                    f"{value}; annotate the dataset again."
                )
        if loss is not None and info["mode"] == "sample" and loss.divergence != "forward":
            raise ValueError(
                f"The teacher columns hold samples, which estimate the forward divergence only, not "
                f"{loss.divergence!r}; annotate with mode='topk' or choose divergence='forward'."
            )
    return info
