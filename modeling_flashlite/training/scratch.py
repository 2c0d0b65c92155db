# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""The whole pipeline from scratch as stages: tokenizer, teacher, student, quantization, adapters, reload."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from datasets import load_from_disk
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ..configuration_flashlite import FlashLiteConfig
from ..data.batching import PaddingCollator, pack, tokenize_texts
from ..data.loading import load_data, pick_split, require_columns
from ..data.tokenization import train_tokenizer
from ..ecq_config_flashlite import EcqConfig
from ..measure.cost import measure_generation
from ..measure.perplexity import text_likelihood
from .calibration import quantize
from .distillation import DistillationCallback, set_loss_function
from .divergence import KDLoss
from .lora import add_lora
from .qat import EcqCallback, prepare_qat
from .stages import Stages, reload_elsewhere, weight_cost
from .teacher_cache import TeacherCache

__all__ = ["SIZES", "ScratchStages", "Size"]


@dataclass(frozen=True)
class Size:
    """The size of a run: widths, depths, steps; rows of `length` tokens, `batch` rows per step."""

    vocab_size: int
    length: int
    batch: int
    teacher: dict
    student: dict
    steps: dict
    rows: int | None
    validation_rows: int


SMALL_BLOCKS = {"block_size": 16, "relevance_top_k": 1}  # so that attention is sparse in rows of 64 tokens
SIZES = {
    "default": Size(
        vocab_size=4096,
        length=256,
        batch=8,
        teacher={"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2},
        student={"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
        steps={"teacher": 270, "student": 300, "qat": 80, "lora": 40},
        rows=None,
        validation_rows=400,
    ),
    "smallest": Size(
        vocab_size=512,
        length=64,
        batch=8,
        teacher={"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, **SMALL_BLOCKS},
        student={"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, **SMALL_BLOCKS},
        steps={"teacher": 12, "student": 12, "qat": 10, "lora": 6},
        rows=600,
        validation_rows=12,
    ),
}
PROMPT = "Return a list of"


class ScratchStages(Stages):
    """The stages from texts to an adapted 4-bit model; each method fills its folder and returns a row of the table.

    Args:
        root (`Path`), made_with (`Mapping`), seed (`int`): see [`Stages`].
        size (`Size`): widths, depths and steps.
        target_bits (`float`): budget of the quantized file, bits per weight.
    """

    def __init__(self, root: Path, made_with: Mapping, seed: int, size: Size, target_bits: float):
        super().__init__(root, made_with, seed)
        self.size, self.target_bits = size, target_bits

    def load_texts(self, dataset: str, column: str, limit: int | None = None) -> None:
        """Load training and validation texts; without a validation split, a twentieth of the rows is held out."""
        splits = load_data(dataset, limit=limit or self.size.rows)
        if len(splits) == 1:
            halves = pick_split(splits, "train").train_test_split(test_size=0.05, shuffle=False)
            splits = {"train": halves["train"], "validation": halves["test"]}
        require_columns(splits["train"], [column], "Name the text column with --column.")
        self.column, self.train_texts = column, splits["train"].select_columns([column])
        self.texts = pick_split(splits, "validation")[column][: self.size.validation_rows]

    def tokenizer(self, folder: Path) -> None:
        """Train the tokenizer."""
        texts = self.train_texts[self.column]
        train_tokenizer(texts, self.size.vocab_size, total=len(texts)).save_pretrained(folder)

    def pack_rows(self) -> None:
        """Tokenize and pack the training texts."""
        self.tok = AutoTokenizer.from_pretrained(self.root / "tokenizer")
        self.rows = pack(tokenize_texts(self.train_texts, self.tok, self.column), self.size.length)
        self.collator = PaddingCollator(self.tok)

    def new_model(self, shape: dict) -> PreTrainedModel:
        """A decoder with random weights."""
        config = FlashLiteConfig(
            vocab_size=len(self.tok),
            pad_token_id=self.tok.pad_token_id,
            bos_token_id=self.tok.bos_token_id,
            eos_token_id=self.tok.eos_token_id,
            is_encoder_decoder=False,
            **shape,
        )
        return AutoModelForCausalLM.from_config(config)

    def keep(self, model, folder: Path) -> dict:
        """Save, reload and measure a model."""
        model.save_pretrained(folder)
        self.tok.save_pretrained(folder)
        return self.measure(AutoModelForCausalLM.from_pretrained(folder), folder)

    def measure(self, model, folder: Path, adapter: Path | None = None) -> dict:
        """A row of the table: size of the files, likelihood of the held-out texts, speed of greedy generation."""
        batch = min(8, len(self.texts))
        metrics, _ = text_likelihood(model, self.tok, self.texts, segment_length=self.size.length, batch_size=batch)
        speed = {row["unit"]: row["value"] for row in measure_generation(model, self.tok, [PROMPT], repeats=3)}
        return {
            **weight_cost(model, folder, adapter),
            "loss": math.log(metrics["token_perplexity"]),
            "perplexity": metrics["token_perplexity"],
            "bits_per_byte": metrics["bits_per_byte"],
            "tokens_per_second": speed["tokens/s"],
        }

    def train(self, model, folder: Path, kind: str, learning_rate: float, rows=None, callbacks=()) -> None:
        settings = {"collator": self.collator, "batch": self.size.batch, "steps": self.size.steps[kind]}
        rows = self.rows if rows is None else rows
        self.fit(model, rows, folder, learning_rate=learning_rate, callbacks=callbacks, **settings)

    def teacher(self, folder: Path) -> dict:
        """Train the larger model."""
        model = self.new_model(self.size.teacher)
        self.train(model, folder, "teacher", 2e-3)
        return self.keep(model, folder)

    def annotations(self, folder: Path) -> None:
        """Annotate the training rows with the teacher's distributions, once."""
        teacher = AutoModelForCausalLM.from_pretrained(self.root / "teacher")
        count = min(len(self.rows), self.size.steps["student"] * self.size.batch)
        used = self.rows.shuffle(self.seed).select(range(count))
        cache = TeacherCache(teacher, self.tok, k=16, temperature=1.0)
        cache.annotate(used, batch_size=16).save_to_disk(folder / "rows")

    def fit_to_teacher(self, model, folder: Path, kind: str, learning_rate: float, callbacks=()) -> None:
        """Train on the annotated rows."""
        loss = KDLoss("forward", alpha=0.3, temperature=1.0)
        set_loss_function(model, loss)
        rows = load_from_disk(self.root / "annotations" / "rows")
        self.train(model, folder, kind, learning_rate, rows, [DistillationCallback(loss), *callbacks])

    def distilled(self, folder: Path) -> dict:
        """Train the student on the teacher's distributions."""
        model = self.new_model(self.size.student)
        self.fit_to_teacher(model, folder, "student", 3e-3)
        return self.keep(model, folder)

    def quantize_with(self, function):
        """The distilled student after `calibration.quantize` or `qat.prepare_qat` on some training rows."""
        model = AutoModelForCausalLM.from_pretrained(self.root / "distilled")
        some = self.rows.select(range(min(len(self.rows), 16 * self.size.batch)))
        return function(model, EcqConfig(target_bits=self.target_bits), some, data_collator=self.collator)

    def quantized(self, folder: Path) -> dict:
        """Quantize the student to the budget after training."""
        return self.keep(self.quantize_with(quantize), folder)

    def qat(self, folder: Path) -> dict:
        """Quantization-aware training, with the file size steered to the budget."""
        model = self.quantize_with(prepare_qat)
        self.fit_to_teacher(model, folder, "qat", 1e-3, [EcqCallback()])
        return self.keep(model, folder)

    def lora(self, folder: Path) -> dict:
        """Low-rank adapters on the 4-bit model recover some of the quality lost by quantization."""
        base = self.root / "qat"
        model = add_lora(AutoModelForCausalLM.from_pretrained(base), r=4)
        self.fit_to_teacher(model, folder, "lora", 1e-3)
        model.save_pretrained(folder)
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder)
        return self.measure(model, base, adapter=folder)

    def reloaded(self, folder: Path) -> dict:
        """Load base and adapter where the package cannot be imported, compare with the model here, generate."""
        settings = {"max_new_tokens": 40, "do_sample": True, "top_k": 20, "pad_token_id": self.tok.pad_token_id}
        return {"text": reload_elsewhere(self.root / "qat", self.root / "lora", PROMPT, **settings)}
