"""The value of distillation: one student from scratch, with a live and with a cached teacher, over several seeds.

python scripts/studies/compare_distillation.py
python scripts/studies/compare_distillation.py --dataset train=a.jsonl.xz,validation=b.jsonl.xz --seeds 0,1,2

Every arm runs in its own process, so that its memory can be measured. Finished arms in `work_dir` are reused.
"""

import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import load_from_disk
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from modeling_flashlite import FlashLiteConfig, FlashLiteForCausalLM
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.batching import PaddingCollator, pack, tokenize_texts
from modeling_flashlite.data.loading import load_data, pick_split
from modeling_flashlite.data.tokenization import train_tokenizer
from modeling_flashlite.measure.results import write_json, write_results
from modeling_flashlite.training.distillation import DistillationTrainer
from modeling_flashlite.training.divergence import KDLoss
from modeling_flashlite.training.launch import TrainArgs
from modeling_flashlite.training.teacher_cache import TeacherCache
from modeling_flashlite.training.trainers import CarefulTrainer

ARMS = ("scratch", "live", "cached")
BLOCKS = {"block_size": 32, "relevance_top_k": 2, "is_encoder_decoder": False}
TEACHER = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 2}
STUDENT = {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


@dataclass
class CompareArgs:
    dataset: str = field(default="python", metadata={"help": "python, local files, or a Hub id"})
    column: str = field(default="text", metadata={"help": "column with the text"})
    vocab_size: int = field(default=4096, metadata={"help": "of the tokenizer trained first"})
    length: int = field(default=128, metadata={"help": "tokens of a packed row"})
    batch: int = field(default=16, metadata={"help": "rows of a step"})
    steps: int = field(default=400, metadata={"help": "steps of every student"})
    teacher_steps: int = field(default=1500, metadata={"help": "steps of the teacher"})
    evaluations: int = field(default=20, metadata={"help": "points of each student's validation curve"})
    validation_rows: int = field(default=128, metadata={"help": "packed rows evaluated each time"})
    limit: int | None = field(default=None, metadata={"help": "rows of the dataset; all if unset"})
    learning_rate: float = field(default=5e-3, metadata={"help": "peak, of the students"})
    teacher_learning_rate: float = field(default=2e-3, metadata={"help": "peak, of the teacher"})
    alpha: float = field(default=0.3, metadata={"help": "share of plain cross-entropy"})
    temperature: float = field(default=1.0, metadata={"help": "of both softmaxes"})
    mode: str = field(default="sample", metadata={"help": "of the cache: sample or topk"})
    k: int = field(default=64, metadata={"help": "cached entries per token"})
    seeds: str = field(default="0,1,2", metadata={"help": "one run of each arm per seed"})
    work_dir: str = field(default="runs/compare_distillation", metadata={"help": "tokenizer, rows, teacher, runs"})
    output: str = field(default="model_cards/results/distillation.json", metadata={"help": "results file"})
    arm: str | None = field(default=None, metadata={"help": "used by the script itself: one part of the work"})
    seed: int = field(default=0, metadata={"help": "used by the script itself"})


def trainer_arguments(args: CompareArgs, folder: Path, steps: int, learning_rate: float) -> TrainArgs:
    return TrainArgs(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        weight_decay=0.1,
        logging_steps=max(1, steps // args.evaluations),
        eval_strategy="steps",
        eval_steps=max(1, steps // args.evaluations),
        save_strategy="no",
        report_to="none",
        seed=args.seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )


def new_model(tokenizer, shape: dict, seed: int) -> FlashLiteForCausalLM:
    set_seed(seed)
    special = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return FlashLiteForCausalLM(FlashLiteConfig(vocab_size=len(tokenizer), **special, **BLOCKS, **shape))


def prepare(args: CompareArgs, root: Path) -> None:
    """Tokenizer, packed rows, trained teacher, and its annotations of the students' training rows."""
    splits = load_data(args.dataset, limit=args.limit)
    texts = pick_split(splits, "train")[args.column]
    tokenizer = train_tokenizer(texts, args.vocab_size, total=len(texts))
    train, validation = (
        pack(tokenize_texts(pick_split(splits, name), tokenizer, args.column), args.length).shuffle(seed=0)
        for name in ("train", "validation")
    )
    validation = validation.select(range(min(args.validation_rows, len(validation))))
    teacher = new_model(tokenizer, TEACHER, 0)
    trainer = CarefulTrainer(
        teacher,
        trainer_arguments(args, root / "teacher", args.teacher_steps, args.teacher_learning_rate),
        train_dataset=train,
        eval_dataset=validation,
        data_collator=PaddingCollator(tokenizer),
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    seen = train.select(range(min(len(train), args.steps * args.batch)))
    start = time.perf_counter()
    cache = TeacherCache(teacher.cpu(), tokenizer, args.k, mode=args.mode, temperature=args.temperature)
    cache.annotate(seen, batch_size=args.batch).save_to_disk(root / "train")
    seconds = time.perf_counter() - start
    validation.save_to_disk(root / "validation")
    teacher.save_pretrained(root / "teacher")
    tokenizer.save_pretrained(root / "teacher")
    write_json(root / "prepare.json", {"teacher_loss": loss, "annotate_seconds": seconds, "rows": len(seen)})


def memory_mib() -> float:
    """Peak memory of this process so far: on the accelerator if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    # kibibytes on Linux, bytes on macOS
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run_arm(args: CompareArgs, root: Path) -> None:
    """Train one student; its curve, time per step and memory go to a file."""
    tokenizer = AutoTokenizer.from_pretrained(root / "teacher")
    train, validation = load_from_disk(root / "train"), load_from_disk(root / "validation")
    if args.arm != "cached":
        train = train.remove_columns(["teacher_ids", "teacher_weights", "teacher_info"])
    before = memory_mib()
    student = new_model(tokenizer, STUDENT, args.seed)
    shared = {
        "args": trainer_arguments(args, root / f"{args.arm}_{args.seed}", args.steps, args.learning_rate),
        "train_dataset": train,
        "eval_dataset": validation,
        "data_collator": PaddingCollator(tokenizer),
        "processing_class": tokenizer,
    }
    if args.arm == "scratch":
        trainer = CarefulTrainer(student, **shared)
    else:
        teacher = AutoModelForCausalLM.from_pretrained(root / "teacher") if args.arm == "live" else None
        loss = KDLoss("forward", args.alpha, args.temperature)
        trainer = DistillationTrainer(student, teacher=teacher, loss=loss, **shared)
    seconds, step = [], trainer.training_step

    def timed(*values, **options):
        start = time.perf_counter()
        loss = step(*values, **options)
        seconds.append(time.perf_counter() - start)
        return loss

    trainer.training_step = timed
    trainer.train()
    curve = [(log["step"], log["eval_loss"]) for log in trainer.state.log_history if "eval_loss" in log]
    row = {"curve": curve, "seconds_per_step": float(np.median(seconds)), "memory_mib": memory_mib() - before}
    write_json(root / f"{args.arm}_{args.seed}.json", row)


def part(args: CompareArgs, arm: str, seed: int = 0) -> dict:
    """Run a part of the work in its own process unless its file exists, and read the file."""
    name = arm if arm == "prepare" else f"{arm}_{seed}"
    path = Path(args.work_dir) / f"{name}.json"
    if not path.is_file():
        values = {**vars(args), "arm": arm, "seed": seed}
        flags = [f"--{key}={value}" for key, value in values.items() if value is not None]
        subprocess.run([sys.executable, os.path.abspath(__file__), *flags], check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text(encoding="utf-8"))


def steps_to_reach(steps: np.ndarray, losses: np.ndarray, goal: float) -> float | None:
    """First step at which a curve reaches `goal`, interpolated between evaluations; `None` if it never does."""
    below = np.flatnonzero(losses <= goal)
    if not len(below):
        return None
    i = below[0]
    if i == 0:
        return float(steps[0])
    return float(np.interp(goal, [losses[i], losses[i - 1]], [steps[i], steps[i - 1]]))


def summarise(args: CompareArgs, prepared: dict, runs: dict) -> dict:
    """The figures: final losses, the share of the steps that distillation needs, memory and time per step."""
    steps = np.array([step for step, _ in runs["scratch"][0]["curve"]])
    curves = {arm: np.array([[loss for _, loss in run["curve"]] for run in runs[arm]]) for arm in ARMS}
    goals = curves["scratch"][:, -1]
    metrics = dict(prepared)
    for arm in ARMS:
        metrics[f"{arm}_loss"] = float(curves[arm][:, -1].mean())
        metrics[f"{arm}_loss_std"] = float(curves[arm][:, -1].std(ddof=1)) if len(goals) > 1 else 0.0
        metrics[f"{arm}_seconds_per_step"] = float(np.median([run["seconds_per_step"] for run in runs[arm]]))
        metrics[f"{arm}_memory_mib"] = float(np.median([run["memory_mib"] for run in runs[arm]]))
    for arm in ("live", "cached"):
        reached = [steps_to_reach(steps, curve, goal) for curve, goal in zip(curves[arm], goals)]
        if None not in reached:
            metrics[f"{arm}_share_of_steps_to_scratch_loss"] = float(np.mean(reached) / args.steps)
    metrics["cached_over_live_loss"] = metrics["cached_loss"] / metrics["live_loss"]
    metrics["cached_over_live_memory"] = metrics["cached_memory_mib"] / metrics["live_memory_mib"]
    metrics["cached_over_live_seconds"] = metrics["cached_seconds_per_step"] / metrics["live_seconds_per_step"]
    return metrics


def main(args: CompareArgs) -> dict:
    root = Path(args.work_dir)
    root.mkdir(parents=True, exist_ok=True)
    if args.arm:
        return prepare(args, root) if args.arm == "prepare" else run_arm(args, root)
    prepared = part(args, "prepare")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    runs = {arm: [] for arm in ARMS}
    for seed in seeds:  # interleaved, so that a slow hour of the machine hits every arm
        for arm in ARMS:
            runs[arm].append(part(args, arm, seed))
    metrics = summarise(args, prepared, runs)
    settings = {key: value for key, value in vars(args).items() if key not in ("arm", "seed", "work_dir", "output")}
    curves = {arm: [run["curve"] for run in runs[arm]] for arm in ARMS}
    write_results(
        args.output,
        metrics,
        task="distillation",
        dataset=args.dataset,
        split="validation",
        config={**settings, "teacher": TEACHER, "student": STUDENT},
        curves=curves,
    )
    return finish({"output": args.output, **metrics})


if __name__ == "__main__":
    start(main, (CompareArgs,), __doc__)
