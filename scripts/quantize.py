"""Quantize a model to a bit budget: after training (ptq), with training (qat), or with adapters on top (recover).

python scripts/quantize.py --config scripts/recipes/qat_tiny.yaml --model runs/train_tiny --target_bits 2.5
python scripts/quantize.py --config scripts/recipes/ptq_tiny.yaml --rates 2 2.5 3 3.5 --results runs/rates.json
python scripts/quantize.py --model you/llama --dataset train=wiki.txt --report runs/report.json --gguf Q4_K_M.gguf
python scripts/quantize.py --config scripts/recipes/qat_pretrained.yaml --model you/llama --start runs/ptq --resume
python scripts/quantize.py --config scripts/recipes/qat_tiny.yaml --method lsq --results runs/rates.json
"""

import copy
import logging
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer_utils import SaveStrategy

from modeling_flashlite.checkpoint import load_language_model
from modeling_flashlite.cli import finish, refuse_unused, start
from modeling_flashlite.data.batching import PaddingCollator
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.ecq_layers_flashlite import collect_layers
from modeling_flashlite.measure.benchmark import format_table
from modeling_flashlite.measure.compression import add_points, rate_curve, write_report
from modeling_flashlite.training.calibration import batches_of, mean_loss, quantize
from modeling_flashlite.training.checks import check_folder
from modeling_flashlite.training.distillation import DistillationTrainer, SegmentDistillationTrainer
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
    load_tokenizer,
    make_trainer,
    run,
)
from modeling_flashlite.training.lora import add_lora, save_base
from modeling_flashlite.training.lsq import PlainLSQ
from modeling_flashlite.training.qat import EcqCallback, prepare_qat, qat_optimizer
from modeling_flashlite.training.sampling import with_conversations

RATES = [5.0, 4.0, 3.5, 3.0, 2.5]  # of a report
METHODS = ("ptq", "qat", "recover", "lsq")
BUDGET = ("target_bits", "target_bytes", "max_loss_increase")
# options that only some methods use
USED_BY = {
    **dict.fromkeys(("rates", "report", "gguf"), ["ptq"]),
    **dict.fromkeys(("max_loss_increase", "data_free"), ["ptq", "recover"]),
    **dict.fromkeys(("target_bits", "target_bytes", "calibration_batches", "chat_share"), ["ptq", "qat", "recover"]),
    **dict.fromkeys(("start", "weight_rate"), ["qat"]),
    **dict.fromkeys(("alpha", "temperature", "divergence"), ["qat", "recover", "lsq"]),
    "lora_r": ["recover"],
    "lsq_bits": ["lsq"],
}


@dataclass
class QuantizeArgs:
    method: str = field(default="ptq", metadata={"help": "ptq, qat, recover (adapters on top) or lsq (a peer)"})
    target_bits: float | None = field(default=None, metadata={"help": "bits per parameter of the whole file"})
    target_bytes: str | None = field(default=None, metadata={"help": "the same as a size, 3MB"})
    max_loss_increase: float | None = field(
        default=None, metadata={"help": "ptq: smallest file whose perplexity rises by at most this share"}
    )
    data_free: bool = field(default=False, metadata={"help": "ptq without calibration"})
    calibration_batches: int = field(default=16, metadata={"help": "batches of training rows to calibrate on"})
    chat_share: float | None = field(
        default=None, metadata={"help": "share of conversations the model writes; half with a chat template"}
    )
    start: str | None = field(default=None, metadata={"help": "qat: folder of the model after ptq, to start from"})
    weight_rate: float | None = field(
        default=None, metadata={"help": "qat: learning rate of the weights in their steps; learning_rate: the rest"}
    )
    alpha: float = field(default=0.0, metadata={"help": "qat, recover: share of cross-entropy beside the teacher"})
    temperature: float = field(default=1.0, metadata={"help": "of teacher and student"})
    divergence: str = field(default="forward", metadata={"help": "from the original: forward, reverse, jsd:beta"})
    lora_r: int = field(default=8, metadata={"help": "recover: rank of the adapters"})
    rates: list[float] = field(default_factory=list, metadata={"help": "ptq: only measure the loss at these bits"})
    report: str | None = field(default=None, metadata={"help": "the same into this results file, with a figure"})
    gguf: str | None = field(default=None, metadata={"help": "report: GGUF files of the model, with commas"})
    lsq_bits: int = field(default=2, metadata={"help": "lsq: bits of a code, all of them in the file"})
    results: str | None = field(default=None, metadata={"help": "results file that loss over bits is added to"})

    def __post_init__(self):
        if self.calibration_batches < 1:
            raise ValueError(
                f"calibration_batches is {self.calibration_batches}, but must be at least 1; --data_free uses none."
            )


def measure_rates(model, options: QuantizeArgs, calibration: list[dict], evaluation: list[dict], about: dict) -> dict:
    """What is lost at several rates, with `--report` of all kinds of layers too; the model stays as it is."""
    ggufs = options.gguf.split(",") if options.gguf else []
    points, kinds = rate_curve(model, options.rates or RATES, calibration, evaluation, ggufs)
    add_points(options.results, points, **about)
    if options.report:
        print(format_table(points), format_table(kinds), sep="\n\n")
        write_report(options.report, points, kinds, **about)
    return finish({"points": points})


def refuse_what_would_be_ignored(options: QuantizeArgs) -> None:
    """Refuse options of the command line that the method does not use; recipes serve several methods."""
    for name, methods in USED_BY.items():
        if options.method not in methods:
            refuse_unused(options, [name], f"by --method {', '.join(methods)}")
    if options.rates or options.report:
        refuse_unused(options, [*BUDGET, "data_free"], "to write a model, which --rates and --report do not")
    else:
        refuse_unused(options, ["gguf"], "with --report")
    if options.data_free or options.start:
        refuse_unused(options, ["calibration_batches", "chat_share"], "to calibrate, without --data_free or --start")


def refuse_what_would_be_lost(model: str, options: QuantizeArgs, output: Path, folder: Path) -> None:
    """Refuse to write over the float source, or beside a result of another kind, which would be loaded with it."""
    for name, source in (("model", model), ("start", options.start)):
        if source and Path(source).resolve() in (output.resolve(), folder.resolve()):
            raise ValueError(f"output_dir is {output}, which would overwrite --{name} {source}; give another folder.")
    check_folder(str(output), adapters=folder != output)


def main(
    model_args: ModelArgs, shape: ArchitectureArgs, data: DataArgs, options: QuantizeArgs, args: TrainArgs
) -> dict:
    method = options.method
    if method not in METHODS:
        raise SystemExit(f"quantize.py: method is {method!r}, but must be one of {', '.join(METHODS)}.")
    if not model_args.model:
        raise SystemExit("quantize.py: no model is given; pass --model with a folder or Hub id of a trained one.")
    output = Path(args.output_dir)
    folder = output if method != "recover" else output / "base"
    if method != "qat":
        options.start = None  # of a recipe
    refuse_what_would_be_ignored(options)
    if not (options.rates or options.report):
        refuse_what_would_be_lost(model_args.model, options, output, folder)
    config = EcqConfig(**{name: getattr(options, name) for name in BUDGET})
    logging.basicConfig(format="%(message)s")
    logging.getLogger("modeling_flashlite").setLevel(logging.INFO)  # announces what the work will cost
    splits = load_splits(data)
    task = load_task(data, model_args, splits)
    tokenizer = load_tokenizer(model_args, task, args.output_dir, splits)
    model = load_model(model_args, shape, tokenizer, task)
    collator = PaddingCollator(tokenizer)
    rows, held_out = load_rows(task.for_model(model.config), data, args, tokenizer, splits)
    calibration = batches_of(rows, model, collator, args.train_batch_size, options.calibration_batches)
    evaluation = batches_of(held_out or rows, model, collator, args.eval_batch_size)
    if data.task == "text-generation" and not options.data_free and method != "lsq" and not options.start:
        calibration = with_conversations(calibration, model, tokenizer, options.chat_share, args.output_dir)
    about = {"model": model_args.model, "dataset": data.dataset, "seed": args.seed}
    if options.rates or options.report:
        return measure_rates(model, options, calibration, evaluation, about)

    base, parameters = mean_loss(model, evaluation), sum(p.numel() for p in model.parameters())
    metrics = {"output_dir": args.output_dir, "float_loss": base}
    teacher = copy.deepcopy(model) if method != "ptq" else None
    if teacher is not None and args.bf16:
        teacher.bfloat16()  # autocast is the trainer's, and does not reach the teacher
    callbacks, optimizer, packed_bits = [], None, None
    if method == "lsq":
        callbacks = [PlainLSQ(model, [layer.modules for layer in collect_layers(model, config)], options.lsq_bits)]
        packed_bits = parameters * callbacks[0].bits_per_weight(model)
        args.save_strategy = SaveStrategy.NO  # parametrized tied weights do not fit a checkpoint
    elif method == "qat":
        coded = None if options.start is None else load_language_model(options.start, device=str(model.device))
        prepare_qat(model, config, calibration, start=coded)
        callbacks = [EcqCallback()]
        optimizer = None if options.weight_rate is None else qat_optimizer(model, options.weight_rate, args)
    else:
        blocks = output / "blocks"  # an interrupted run resumes from them
        try:
            quantize(model, config, None if options.data_free else calibration, resume=blocks)
        except ValueError:  # refused
            shutil.rmtree(blocks, ignore_errors=True)
            raise
        metrics["ptq_perplexity_increase"] = math.exp(mean_loss(model, evaluation) - base) - 1
        save_base(model, tokenizer, folder)
        shutil.rmtree(blocks, ignore_errors=True)
    if method != "ptq":
        trainer = make_trainer(
            SegmentDistillationTrainer if data.segment_length else DistillationTrainer,
            add_lora(model, options.lora_r) if method == "recover" else model,
            args,
            tokenizer,
            (rows, held_out),
            teacher=teacher,
            loss=KDLoss(options.divergence, options.alpha, options.temperature),
            callbacks=callbacks,
            optimizers=(optimizer, None),
        )
        metrics |= run(trainer, "quantize")
        model = trainer.model
    loss = mean_loss(model, evaluation)
    files = [path.stat().st_size for path in folder.glob("model*.safetensors")]
    size = sum(files) if packed_bits is None else round(packed_bits / 8)
    metrics |= {"perplexity_increase": math.exp(loss - base) - 1, "file_bytes": size}
    metrics |= {"bits_per_weight": 8 * size / parameters, "smaller": 4 * parameters / size}
    point = {"method": "plain LSQ" if method == "lsq" else f"ours, {method}", "bits": metrics["bits_per_weight"]}
    point |= {"loss": loss, "increase": metrics["perplexity_increase"], "steps": args.max_steps}
    add_points(options.results, [point], **about)
    return finish(metrics)


if __name__ == "__main__":
    start(main, (ModelArgs, ArchitectureArgs, DataArgs, QuantizeArgs, TrainArgs), __doc__)
