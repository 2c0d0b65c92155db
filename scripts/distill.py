"""Distil a student from a teacher that annotates the data once (the default), or runs in every step (`--live`).

python scripts/distill.py --config scripts/recipes/distill_tiny.yaml --teacher runs/train_tiny
accelerate launch scripts/distill.py --config scripts/recipes/distill_base.yaml --learning_rate 2e-4 --resume
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from datasets import load_dataset, load_from_disk

from modeling_flashlite.checkpoint import is_adapter, load_language_model, read_tokenizer
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.tasks import get_task
from modeling_flashlite.training.checks import shape_changes, task_measures
from modeling_flashlite.training.distillation import DistillationTrainer, student_from_teacher
from modeling_flashlite.training.divergence import KDLoss
from modeling_flashlite.training.launch import (
    ArchitectureArgs,
    DataArgs,
    ModelArgs,
    TrainArgs,
    load_model,
    load_rows,
    load_splits,
    load_task,
    make_trainer,
    run,
    stop_at_turns,
)
from modeling_flashlite.training.lora import add_lora, save_base
from modeling_flashlite.training.teacher_cache import TeacherCache, check_vocabulary


@dataclass
class DistillArgs:
    teacher: str | None = field(default=None, metadata={"help": "folder or Hub id of the teacher"})
    full_attention: bool = field(
        default=False, metadata={"help": "let a Flash-Lite teacher attend to everything: heals sparse attention"}
    )
    live: bool = field(default=False, metadata={"help": "run the teacher in every step instead of caching it"})
    teacher_cache: str | None = field(
        default=None, metadata={"help": "folder (made if missing) or Hub id of the annotated rows"}
    )
    annotate_only: bool = field(default=False, metadata={"help": "stop when the cache is written"})
    mode: str = field(default="sample", metadata={"help": "what is cached: sample (unbiased) or topk"})
    k: int = field(default=64, metadata={"help": "cached entries per token"})
    divergence: str = field(default="forward", metadata={"help": "forward, reverse, jsd:beta, skew:alpha, taid"})
    alpha: float = field(default=0.5, metadata={"help": "share of plain cross-entropy"})
    temperature: float = field(default=2.0, metadata={"help": "of both softmaxes"})
    on_policy: float = field(default=0.0, metadata={"help": "live only: share of steps on the student's own targets"})
    encoder_match: str | None = field(default=None, metadata={"help": "live only: states or relations"})
    encoder_weight: float = field(default=1.0, metadata={"help": "of the encoder term"})
    keep_layers: int | None = field(
        default=None, metadata={"help": "start from the teacher with this many decoder layers"}
    )
    keep_encoder_layers: int | None = field(default=None, metadata={"help": "the same for its encoder"})
    lora_r: int = field(default=0, metadata={"help": "train adapters of this rank instead of all weights"})


def cached_rows(distill: DistillArgs, args: TrainArgs, teacher, tokenizer, rows):
    """The annotated training rows, see `TeacherCache.annotated`; without a teacher, of the folder or the Hub."""
    folder = Path(distill.teacher_cache or f"{args.output_dir}/teacher_cache")
    if teacher is None and folder.is_dir():
        return load_from_disk(folder)
    if teacher is None:
        return load_dataset(str(folder), split="train").with_format("numpy")
    with args.main_process_first(desc="annotate"):
        cache = TeacherCache(
            teacher.to(args.device),
            tokenizer,
            distill.k,
            mode=distill.mode,
            temperature=distill.temperature,
            dtype="uint8" if distill.mode == "topk" else "float16",
        )
        return cache.annotated(rows, folder, args.eval_batch_size, replace=distill.teacher_cache is None)


def refuse_what_would_be_ignored(model_args: ModelArgs, data: DataArgs, distill: DistillArgs) -> None:
    """Refuse options that exclude each other or are incomplete."""
    kept = distill.keep_layers or distill.keep_encoder_layers
    if distill.teacher is None and (distill.live or kept or not distill.teacher_cache):
        raise SystemExit("distill.py: no teacher is given; pass --teacher, or --teacher_cache with annotated rows.")
    if not get_task(data.task).generates:
        raise SystemExit(f"distill.py: {data.task} generates no text to learn from a teacher; use train.py for it.")
    if kept and model_args.model:
        raise SystemExit("distill.py: --model and --keep_layers both name the student's origin; leave out one.")
    if distill.live and distill.annotate_only:
        raise SystemExit("distill.py: a live teacher writes no cache; leave out --live or --annotate_only.")


def make_student(model_args, shape, task, distill, tokenizer, teacher):
    """The model to train: the teacher with fewer layers, a checkpoint, or a new one."""
    if not (distill.keep_layers or distill.keep_encoder_layers):
        return load_model(model_args, shape, tokenizer, task)
    changes = shape_changes(shape, teacher.config, distill.teacher)
    student = student_from_teacher(teacher, distill.keep_encoder_layers, distill.keep_layers, changes)
    if task.task.name != "text-generation" and not task.encoder_decoder:
        stop_at_turns(student, tokenizer)
    return student


def main(
    model_args: ModelArgs, shape: ArchitectureArgs, data: DataArgs, distill: DistillArgs, args: TrainArgs
) -> dict:
    refuse_what_would_be_ignored(model_args, data, distill)
    code = {"trust_remote_code": model_args.trust_remote_code}
    full = {"relevance_top_k": None, "memory_blocks": None} if distill.full_attention else {}
    teacher = None
    if distill.teacher:
        teacher = load_language_model(distill.teacher, device="cpu", merged=True, **code, **full)
    tokenizer = read_tokenizer(model_args.tokenizer or model_args.model or distill.teacher, **code)
    if teacher is not None and (model_args.tokenizer or model_args.model):
        with contextlib.suppress(OSError):  # a teacher without a tokenizer cannot be checked
            check_vocabulary(read_tokenizer(distill.teacher, **code), tokenizer)
    if teacher is not None and not model_args.model and data.encoder_decoder is None:
        data.encoder_decoder = teacher.config.is_encoder_decoder
    splits = load_splits(data)
    task = load_task(data, model_args, splits)
    student, measures = None, {}
    if not distill.annotate_only:
        student = make_student(model_args, shape, task, distill, tokenizer, teacher)
        measures = task_measures(task.task, args, student, tokenizer, data.max_target_length)
    train_rows, validation_rows = load_rows(task, data, args, tokenizer, splits)
    if not distill.live:
        train_rows = cached_rows(distill, args, teacher, tokenizer, train_rows)
    if distill.annotate_only:
        return finish({"rows": len(train_rows), "teacher_cache": distill.teacher_cache, "output_dir": args.output_dir})
    if distill.lora_r:
        saved = model_args.model and not is_adapter(model_args.model, **model_args.hub)
        if args.process_index == 0 and not saved:  # adapters must name what they change
            save_base(student, tokenizer, f"{args.output_dir}/base")
        student = add_lora(student, distill.lora_r)
    trainer = make_trainer(
        DistillationTrainer,
        student,
        args,
        tokenizer,
        (train_rows, validation_rows),
        teacher=teacher if distill.live else None,
        loss=KDLoss(distill.divergence, distill.alpha, distill.temperature),
        on_policy=distill.on_policy,
        encoder_match=distill.encoder_match,
        encoder_weight=distill.encoder_weight,
        **measures,
    )
    return finish(run(trainer, "distill"))


if __name__ == "__main__":
    start(main, (ModelArgs, ArchitectureArgs, DataArgs, DistillArgs, TrainArgs), __doc__)
