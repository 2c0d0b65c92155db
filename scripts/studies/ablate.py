"""Compare design choices on real text: equal data, equal steps, several seeds.

    python scripts/studies/ablate.py --dataset python --study positions
    python scripts/studies/ablate.py --dataset train=a.jsonl.xz,validation=b.jsonl.xz --seeds 0 1 2 --steps 600
    python scripts/studies/ablate.py --study axes --only dense multi-axis --length 4096 --block_size 64

Each run trains a small decoder-only model from scratch. The results file records every evaluation with the processor
time spent on training so far, so that choices can be compared at equal steps and at equal time. Runs already in the
results file are not repeated.
"""

import json
import math
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from modeling_flashlite import FlashLiteConfig, FlashLiteForCausalLM
from modeling_flashlite.cli import finish, start
from modeling_flashlite.configuration_flashlite import POSITION_ENCODINGS
from modeling_flashlite.data.batching import PaddingCollator, pack, tokenize_texts
from modeling_flashlite.data.loading import load_data, pick_split
from modeling_flashlite.data.tokenization import train_tokenizer
from modeling_flashlite.measure.results import write_results

STUDIES = {
    "positions": {name: {"position_encoding": name} for name in POSITION_ENCODINGS},
    "axes": {
        "dense": {"relevance_top_k": None, "memory_blocks": None},
        "multi-axis": {},
        "local and grid": {"relevance_top_k": 0},
        "local only": {"relevance_top_k": 0, "memory_blocks": 1},
    },
}


@dataclass
class AblateArgs:
    study: str = field(default="positions", metadata={"help": "positions or axes"})
    dataset: str = field(default="python", metadata={"help": "Hub id, split=file list, or 'python'"})
    limit: int | None = field(default=None, metadata={"help": "rows of each split"})
    steps: int = field(default=600, metadata={"help": "optimizer steps of each run"})
    length: int = field(default=384, metadata={"help": "tokens per row"})
    batch_size: int = field(default=6, metadata={"help": "rows per step"})
    block_size: int = field(default=32, metadata={"help": "tokens per block"})
    relevance_top_k: int = field(default=4, metadata={"help": "blocks that multi-axis attention reads in full"})
    hidden_size: int = field(default=192, metadata={"help": "width of the models"})
    layers: int = field(default=4, metadata={"help": "layers of the models"})
    rows: int = field(default=96, metadata={"help": "validation rows"})
    vocab_size: int = field(default=4096, metadata={"help": "of the tokenizer that is trained"})
    learning_rate: float = field(default=2e-3, metadata={"help": "peak of the cosine schedule"})
    bf16: bool = field(default=False, metadata={"help": "matrix products in bfloat16"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "one run of each choice per seed"})
    only: list[str] = field(default_factory=list, metadata={"help": "choices of the study to run; all if unset"})
    output: str | None = field(
        default=None, metadata={"help": "results file; model_cards/results/ablation_<study>.json if unset"}
    )


class Clock(TrainerCallback):
    """Processor seconds spent in training steps, logged at each evaluation."""

    def __init__(self):
        self.seconds, self.start = 0.0, None

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds += time.process_time() - self.start

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        state.log_history[-1]["train_seconds"] = self.seconds


def run(overrides: dict, seed: int, args: AblateArgs, tokenizer, train, validation) -> list[dict]:
    """Train one model; return `step`, `loss` (nats per token) and `train_seconds` of each evaluation."""
    set_seed(seed)
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // 32,
        "block_size": args.block_size,
        "relevance_top_k": args.relevance_top_k,
        "is_encoder_decoder": False,
    }
    model = FlashLiteForCausalLM(FlashLiteConfig(**{**shape, **overrides}))
    settings = TrainingArguments(
        output_dir=f"runs/ablation_{args.study}",
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        bf16=args.bf16,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 10,
        weight_decay=0.1,
        adam_beta2=0.95,
        eval_strategy="steps",
        eval_steps=max(1, args.steps // 5),
        save_strategy="no",
        logging_steps=args.steps,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    )
    trainer = Trainer(
        model,
        settings,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=PaddingCollator(tokenizer),
        callbacks=[Clock()],
    )
    trainer.train()
    return [
        {"step": entry["step"], "loss": entry["eval_loss"], "train_seconds": entry["train_seconds"]}
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]


def loss_at(curve: list[dict], seconds: float) -> float:
    """Loss after a number of training seconds, interpolated linearly between evaluations."""
    previous = curve[0]
    for point in curve:
        if point["train_seconds"] >= seconds and point is not previous:
            share = (seconds - previous["train_seconds"]) / (point["train_seconds"] - previous["train_seconds"])
            return previous["loss"] + share * (point["loss"] - previous["loss"])
        previous = point
    return curve[-1]["loss"]


def summarise(runs: list[dict]) -> list[dict]:
    """One row per choice: mean and spread at equal steps, and at the time that the fastest choice needed.

    `relative_perplexity` is relative to the first choice.
    """
    choices = list(dict.fromkeys(entry["choice"] for entry in runs))
    by_choice = {choice: [entry["curve"] for entry in runs if entry["choice"] == choice] for choice in choices}
    first = statistics.mean(curve[-1]["loss"] for curve in by_choice[choices[0]])
    fastest = min(statistics.mean(c[-1]["train_seconds"] for c in curves) for curves in by_choice.values())
    rows = []
    for choice, curves in by_choice.items():
        final = [curve[-1]["loss"] for curve in curves]
        seconds = statistics.mean(curve[-1]["train_seconds"] for curve in curves)
        rows.append(
            {
                "choice": choice,
                "seeds": len(curves),
                "loss_equal_steps": statistics.mean(final),
                "loss_sd": statistics.stdev(final) if len(final) > 1 else None,
                "relative_perplexity": math.exp(statistics.mean(final) - first),
                "loss_equal_time": statistics.mean(loss_at(curve, fastest) for curve in curves),
                "processor_seconds_per_step": seconds / curves[0][-1]["step"],
                "relative_time": seconds / fastest,
            }
        )
    return rows


def save(path: Path, args: AblateArgs, runs: list[dict]) -> None:
    """Rewrite the results file, so that an interrupted study loses at most one run."""
    table = summarise(runs)
    write_results(
        path,
        {row["choice"]: row["loss_equal_steps"] for row in table},
        task="ablation",
        dataset=args.dataset,
        split="validation",
        config={name: value for name, value in asdict(args).items() if name not in ("output", "only")},
        seeds=sorted({entry["seed"] for entry in runs}),
        unit="nats per token",
        table=table,
        runs=runs,
    )


def main(args: AblateArgs) -> dict:
    if args.study not in STUDIES:
        raise ValueError(f"study is {args.study!r}, but must be one of {', '.join(STUDIES)}.")
    path = Path(args.output or f"model_cards/results/ablation_{args.study}.json")
    splits = load_data(args.dataset, limit=args.limit)
    train, validation = pick_split(splits, "train"), pick_split(splits, "validation")
    tokenizer = train_tokenizer((row["text"] for row in train), args.vocab_size, total=len(train))
    train, validation = (pack(tokenize_texts(rows, tokenizer), args.length) for rows in (train, validation))
    # one document a row: the position encodings are compared over the whole length
    train, validation = (rows.remove_columns("position_ids") for rows in (train, validation))
    validation = validation.select(range(min(len(validation), args.rows)))
    whole = [len(ids) == args.length for ids in train["input_ids"]]
    train = train.select([index for index, full in enumerate(whole) if full])

    report = {"runs": []}
    if path.exists():
        report = json.loads(path.read_text())
    for seed in args.seeds:
        for choice, overrides in STUDIES[args.study].items():
            done = any(entry["choice"] == choice and entry["seed"] == seed for entry in report["runs"])
            if done or (args.only and choice not in args.only):
                continue
            print(f"{args.study}: {choice}, seed {seed}", flush=True)
            curve = run(overrides, seed, args, tokenizer, train, validation)
            report["runs"].append({"choice": choice, "seed": seed, "curve": curve})
            save(path, args, report["runs"])
    return finish({"table": summarise(report["runs"])})


if __name__ == "__main__":
    start(main, [AblateArgs], __doc__)
