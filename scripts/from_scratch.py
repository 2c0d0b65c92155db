"""The whole pipeline on real text: tokenizer, teacher, distilled student, 4-bit file, LoRA, clean reload.

python scripts/from_scratch.py
python scripts/from_scratch.py --size smallest --output runs/quick
python scripts/from_scratch.py --dataset train=a.jsonl,validation=b.jsonl --target_bits 2.5 --output runs/mine
"""

import dataclasses
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_from_disk
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_flashlite import (
    EcqCallback,
    EcqConfig,
    FlashLiteConfig,
    KDLoss,
    PaddingCollator,
    TeacherCache,
    add_lora,
    load_data,
    pack,
    prepare_qat,
    quantize,
    tokenize_texts,
    train_tokenizer,
)
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import pick_split, require_columns
from modeling_flashlite.measure.cost import measure_generation
from modeling_flashlite.measure.perplexity import text_likelihood
from modeling_flashlite.measure.results import write_results
from modeling_flashlite.training.distillation import DistillationCallback, set_loss_function
from modeling_flashlite.training.stages import Stages, reload_elsewhere, weight_cost


@dataclass
class DemoArgs:
    size: str = field(default="default", metadata={"help": "default (minutes) or smallest (seconds of training)"})
    dataset: str = field(default="python", metadata={"help": "python, local files (train=a.txt,...), or a Hub id"})
    column: str = field(default="text", metadata={"help": "column that holds the text"})
    limit: int | None = field(default=None, metadata={"help": "rows to use of every split; all if unset"})
    target_bits: float = field(default=3.0, metadata={"help": "budget of the quantized file, bits per weight"})
    output: str = field(default="runs/scratch", metadata={"help": "a stage that is finished here is not run again"})
    seed: int = field(default=0, metadata={"help": "seed of weights, data order and sampling"})


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


class Demo(Stages):
    """The stages; each method fills its folder and returns a row of the table."""

    def __init__(self, args: DemoArgs):
        if args.size not in SIZES:
            raise ValueError(f"size is {args.size!r}, but must be one of {', '.join(SIZES)}.")
        kept = {key: value for key, value in dataclasses.asdict(args).items() if key != "output"}
        super().__init__(Path(args.output), kept, args.seed)
        self.args, self.size = args, SIZES[args.size]

    def load_texts(self) -> None:
        splits = load_data(self.args.dataset, limit=self.args.limit or self.size.rows)
        if len(splits) == 1:  # without a second split, the last twentieth is held out
            halves = pick_split(splits, "train").train_test_split(test_size=0.05, shuffle=False)
            splits = {"train": halves["train"], "validation": halves["test"]}
        require_columns(splits["train"], [self.args.column], "Name the text column with --column.")
        self.train_texts = splits["train"].select_columns([self.args.column])
        self.texts = pick_split(splits, "validation")[self.args.column][: self.size.validation_rows]

    def tokenizer(self, folder: Path) -> None:
        texts = self.train_texts[self.args.column]
        train_tokenizer(texts, self.size.vocab_size, total=len(texts)).save_pretrained(folder)

    def pack_rows(self) -> None:
        self.tok = AutoTokenizer.from_pretrained(self.root / "tokenizer")
        self.rows = pack(tokenize_texts(self.train_texts, self.tok, self.args.column), self.size.length)
        self.collator = PaddingCollator(self.tok)

    def new_model(self, shape: dict):
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
        model = self.new_model(self.size.teacher)
        self.train(model, folder, "teacher", 2e-3)
        return self.keep(model, folder)

    def annotations(self, folder: Path) -> None:
        """Annotate the training rows with the teacher's distributions, once."""
        teacher = AutoModelForCausalLM.from_pretrained(self.root / "teacher")
        count = min(len(self.rows), self.size.steps["student"] * self.size.batch)
        used = self.rows.shuffle(self.args.seed).select(range(count))
        cache = TeacherCache(teacher, self.tok, k=16, temperature=1.0)
        cache.annotate(used, batch_size=16).save_to_disk(folder / "rows")

    def fit_to_teacher(self, model, folder: Path, kind: str, learning_rate: float, callbacks=()) -> None:
        """Train on the annotated rows."""
        loss = KDLoss("forward", alpha=0.3, temperature=1.0)
        set_loss_function(model, loss)
        rows = load_from_disk(self.root / "annotations" / "rows")
        self.train(model, folder, kind, learning_rate, rows, [DistillationCallback(loss), *callbacks])

    def distilled(self, folder: Path) -> dict:
        model = self.new_model(self.size.student)
        self.fit_to_teacher(model, folder, "student", 3e-3)
        return self.keep(model, folder)

    def quantize_with(self, function):
        """The distilled student after `calibration.quantize` or `qat.prepare_qat` on some training rows."""
        model = AutoModelForCausalLM.from_pretrained(self.root / "distilled")
        some = self.rows.select(range(min(len(self.rows), 16 * self.size.batch)))
        return function(model, EcqConfig(target_bits=self.args.target_bits), some, data_collator=self.collator)

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


COLUMNS = {
    "parameters": ("parameters", "{:,}"),
    "bits_per_weight": ("bits/weight", "{:.2f}"),
    "file_bytes": ("file bytes", "{:,}"),
    "loss": ("loss", "{:.3f}"),
    "perplexity": ("perplexity", "{:.1f}"),
    "tokens_per_second": ("tokens/s", "{:.0f}"),
}


def main(args: DemoArgs) -> dict:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft asks transformers for it by the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    demo = Demo(args)
    demo.load_texts()
    demo.stage(demo.tokenizer)
    demo.pack_rows()
    for work in (demo.teacher, demo.annotations, demo.distilled, demo.quantized, demo.qat, demo.lora):
        demo.stage(work)
    text = demo.stage(demo.reloaded)["text"]
    print(f"\n{text}\n\n{demo.render(COLUMNS)}\n")
    results = write_results(
        demo.root / "results.json",
        {
            "seconds": round(demo.seconds, 1),
            **{f"perplexity_{r['stage']}": r["perplexity"] for r in demo.table},
        },
        task="text-generation",
        dataset=args.dataset,
        split="validation",
        config={**dataclasses.asdict(args), **dataclasses.asdict(demo.size)},
        seed=args.seed,
        stages=demo.table,
        sample=text,
    )
    return finish({"stages": demo.table, "seconds": results["metrics"]["seconds"], "output": args.output})


if __name__ == "__main__":
    start(main, [DemoArgs], __doc__)
