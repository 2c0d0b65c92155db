"""A teacher's distributions as columns of the training data, with fingerprints of their origin.

Letters: T target, V vocabulary, K kept entries of a token, n labelled tokens.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset, List, Value, load_from_disk
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..checkpoint import load_language_model
from ..data.batching import PaddingCollator
from ..data.loading import require_columns
from .divergence import pack_weights
from .teacher import teacher_logits

__all__ = ["TeacherCache", "check_teacher_columns", "check_vocabulary", "tokenizer_fingerprint"]

MODES = ("sample", "topk", "text")


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Hash of the token-to-id mapping: equal for interchangeable tokenizers."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """Hash of a sample of every weight: distinguishes revisions without reading all weights."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        numbers = weight.detach().flatten()
        digest.update(numbers[:: max(1, len(numbers) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def data_fingerprint(rows: Dataset) -> str:
    """Hash of the tokens, labels and positions of all rows, the same on every machine."""
    digest = hashlib.sha256()
    for name in sorted({"input_ids", "labels", "position_ids"} & set(rows.column_names)):
        digest.update(name.encode())
        for batch in rows.select_columns([name]).with_format("arrow").iter(1000):
            column = batch[name].combine_chunks()
            digest.update(np.asarray(column.value_lengths(), dtype=np.int64).tobytes())
            digest.update(np.asarray(column.flatten(), dtype=np.int64).tobytes())
    return digest.hexdigest()[:16]


def check_vocabulary(teacher: Tokenizer, student: Tokenizer) -> None:
    """Raise `ValueError` unless both tokenizers assign the same ids to the same tokens."""
    if tokenizer_fingerprint(teacher) != tokenizer_fingerprint(student):
        raise ValueError(
            f"The teacher's tokenizer has {len(teacher)} tokens and the student's {len(student)}, and they differ; "
            "train the student with the teacher's tokenizer, or distil through text with TeacherCache(mode='text')."
        )


@dataclass
class TeacherCache:
    r"""Run a teacher once over a data set and store its distributions as columns.

    Modes: `"sample"` draws `k` tokens from the teacher's distribution and keeps their shares, an unbiased estimate of
    the forward KL and its gradient (arXiv 2503.16870); `"topk"` keeps the `k` largest probabilities, the rest is one
    tail bucket; `"text"` writes the teacher's own answer to the column `teacher_text`, for any tokenizer.

    The columns are `teacher_ids` and `teacher_weights`, `[T, K]`, and `teacher_info`, JSON that describes their
    origin. Row t is what the student's state t must match: that of `labels[t]` for targets of a source, and of
    `labels[t + 1]` for causal data. K is `k`; in mode `sample` it is `k + 2`: the first entry is the teacher's most
    probable token, the last the mean log-probability of the samples, so that a student equal to its teacher has a
    divergence of 0.

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
        """The first difference between the columns of `annotated` and those of this cache for `dataset`."""
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
            raise ValueError("The data set has 0 rows to annotate; check the split and its filters.")
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
            # the default fingerprint would hash the whole teacher
            key = f"{dataset._fingerprint}{info}{sorted(text_options.items())}"
            options |= {"new_fingerprint": hashlib.sha256(key.encode()).hexdigest()[:16], "desc": "annotate"}
        annotated = dataset.map(function, **options)
        return annotated if self.mode == "text" else annotated.with_format("numpy")

    def annotated(self, dataset: Dataset, folder: str | Path, batch_size: int = 8, replace: bool = False) -> Dataset:
        """The annotated rows in `folder`, made there first unless it holds this cache's columns of these rows.

        Args:
            dataset (`Dataset`): tokenized rows, see [`annotate`].
            folder (`str` or `Path`): written whole or not at all.
            batch_size (`int`, *optional*, defaults to 8): rows per forward pass of the teacher.
            replace (`bool`, *optional*, defaults to `False`): whether other columns in the folder may be replaced.

        Raises:
            `ValueError`: streamed rows, or a folder with other columns that may not be replaced.
        """
        if not isinstance(dataset, Dataset):
            raise ValueError("Streamed rows cannot be cached; load them without streaming, or distil with live=True.")
        folder = Path(folder)
        try:
            other = self.difference(load_from_disk(folder), dataset)
        except OSError:
            other = "no complete rows"
        if other and folder.is_dir() and not replace:
            raise ValueError(f"The cache {folder} has {other}; name another folder, or remove it.")
        if other:
            partial = folder.with_name(f"{folder.name}.incomplete")
            shutil.rmtree(partial, ignore_errors=True)
            self.annotate(dataset, batch_size=batch_size).save_to_disk(partial)
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        return load_from_disk(folder)

    def _columns(self, info: str):
        # padded on the right, whatever the tokenizer's side, so that no causal row attends to padding
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
        """Scatter the entries `[n, K]` of labelled tokens to rows of their own lengths, with zeros elsewhere."""
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
        # index of each sample among the distinct samples of its row
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
    """Whether a row's labels are the targets of a source, not a masked copy of its input."""
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
