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

import torch
from transformers.trainer_utils import SaveStrategy

from modeling_flashlite.checkpoint import load_language_model
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.batching import PaddingCollator
from modeling_flashlite.measure.benchmark import format_table
from modeling_flashlite.measure.compression import add_points, rate_curve, write_report
from modeling_flashlite.quantization_flashlite import EcqConfig, collect_layers
from modeling_flashlite.training.calibration import batches_of, mean_loss, quantize
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
from modeling_flashlite.training.lora import add_lora
from modeling_flashlite.training.lsq import PlainLSQ
from modeling_flashlite.training.qat import EcqCallback, parameter_groups, prepare_qat
from modeling_flashlite.training.sampling import with_conversations

RATES = [5.0, 4.0, 3.5, 3.0, 2.5]  # of a report
METHODS = ("ptq", "qat", "recover", "lsq")


@dataclass
class QuantizeArgs:
    method: str = field(
        default="ptq",
        metadata={"help": "ptq, qat, recover: adapters on the quantized model, or lsq: a peer, to compare with"},
    )
    target_bits: float | None = field(default=None, metadata={"help": "bits per parameter of the whole file"})
    target_bytes: str | None = field(default=None, metadata={"help": "the same as a size, 3MB"})
    max_loss_increase: float | None = field(
        default=None, metadata={"help": "ptq: smallest file whose perplexity rises by at most this share"}
    )
    data_free: bool = field(default=False, metadata={"help": "ptq without calibration"})
    calibration_batches: int = field(default=16, metadata={"help": "batches of training rows to calibrate on"})
    chat_share: float | None = field(
        default=None,
        metadata={"help": "of them in conversations that the model writes itself; half if it has a chat template"},
    )
    start: str | None = field(
        default=None, metadata={"help": "qat: folder of the model as ptq has quantized it, from whose codes it starts"}
    )
    weight_rate: float | None = field(
        default=None,
        metadata={"help": "qat: learning rate of the weights in their steps; learning_rate is of the rest"},
    )
    alpha: float = field(
        default=0.0, metadata={"help": "qat, recover: share of plain cross-entropy beside the teacher"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of teacher and student"})
    divergence: str = field(
        default="forward", metadata={"help": "from the float original: forward, reverse, jsd:beta"}
    )
    lora_r: int = field(default=8, metadata={"help": "recover: rank of the adapters"})
    rates: list[float] = field(
        default_factory=list, metadata={"help": "ptq: only measure what is lost at these bits per parameter"}
    )
    report: str | None = field(
        default=None,
        metadata={
            "help": "the same into this results file, with a table of all kinds of layers and a figure beside it"
        },
    )
    gguf: str | None = field(
        default=None, metadata={"help": "report: GGUF files of the same model, with commas, to compare with"}
    )
    lsq_bits: int = field(default=2, metadata={"help": "lsq: bits of a code, all of them in the file"})
    results: str | None = field(
        default=None, metadata={"help": "results file; a loss over bits per weight joins those that it has"}
    )


def without_memory(batches: list[dict]) -> list[dict]:
    """Segments without what a trainer needs to carry memory: each row is read by itself."""
    return [{k: v for k, v in batch.items() if k not in ("memory_reset", "shift_labels")} for batch in batches]


def optimizers(model, options: QuantizeArgs, args: TrainArgs) -> dict:
    """The trainer's argument where weights have a rate of their own."""
    if options.method != "qat" or options.weight_rate is None:
        return {}
    groups, betas = parameter_groups(model, options.weight_rate), (args.adam_beta1, args.adam_beta2)
    adam = torch.optim.AdamW(groups, args.learning_rate, betas, args.adam_epsilon, args.weight_decay, fused=True)
    return {"optimizers": (adam, None)}


def file_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def main(
    model_args: ModelArgs, shape: ArchitectureArgs, data: DataArgs, options: QuantizeArgs, args: TrainArgs
) -> dict:
    if options.method not in METHODS:
        raise SystemExit(f"quantize.py: method is {options.method!r}, but must be one of {', '.join(METHODS)}.")
    if not model_args.model:
        raise SystemExit("quantize.py: no model is given; pass --model with a folder or Hub id of a trained one.")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("modeling_flashlite").setLevel(logging.INFO)  # what it is going to cost
    splits = load_splits(data)
    task = load_task(data, model_args, splits)
    tokenizer = load_tokenizer(model_args, task, args.output_dir, splits)
    model = load_model(model_args, shape, tokenizer, task)
    collator = PaddingCollator(tokenizer)
    rows, held_out = load_rows(task.for_model(model.config), data, args, tokenizer, splits)
    blocks = Path(args.output_dir) / "blocks"  # an interrupted run goes on from there
    calibration = batches_of(rows, model, collator, args.train_batch_size, options.calibration_batches)
    evaluation = batches_of(held_out or rows, model, collator, args.eval_batch_size)
    calibration, evaluation = without_memory(calibration), without_memory(evaluation)
    if data.task == "text-generation" and not options.data_free and options.method != "lsq" and not options.start:
        calibration = with_conversations(calibration, model, tokenizer, options.chat_share, args.output_dir)
    about = {"model": model_args.model, "dataset": data.dataset, "seed": args.seed}
    if options.rates or options.report:
        ggufs = options.gguf.split(",") if options.gguf else []
        points, kinds = rate_curve(model, options.rates or RATES, calibration, evaluation, ggufs)
        add_points(options.results, points, **about)
        if options.report:
            print(format_table(points), format_table(kinds), sep="\n\n")
            write_report(options.report, points, kinds, **about)
        return finish({"points": points})

    base, parameters = mean_loss(model, evaluation), sum(p.numel() for p in model.parameters())
    config = EcqConfig(
        target_bits=options.target_bits,
        target_bytes=options.target_bytes,
        max_loss_increase=options.max_loss_increase,
    )
    teacher = copy.deepcopy(model) if options.method != "ptq" else None
    if teacher is not None and args.bf16:
        teacher.bfloat16()  # autocast is the trainer's, and does not reach the teacher
    metrics = {"output_dir": args.output_dir, "float_loss": base}
    callbacks, packed_bits = [], None
    if options.method == "lsq":
        callbacks = [PlainLSQ(model, [layer.modules for layer in collect_layers(model, config)], options.lsq_bits)]
        packed_bits = parameters * callbacks[0].bits_per_weight(model)
        args.save_strategy = SaveStrategy.NO  # parametrized tied weights do not fit a checkpoint
    elif options.method == "qat":
        coded = None if options.start is None else load_language_model(options.start, device=str(model.device))
        prepare_qat(model, config, calibration, start=coded)
        callbacks = [EcqCallback()]
    else:
        quantize(model, config, None if options.data_free else calibration, resume=blocks)
        metrics["ptq_perplexity_increase"] = math.exp(mean_loss(model, evaluation) - base) - 1
    folder = args.output_dir if options.method != "recover" else f"{args.output_dir}/base"
    if options.method in ("ptq", "recover"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        shutil.rmtree(blocks, ignore_errors=True)
    if options.method != "ptq":
        trainer = make_trainer(
            SegmentDistillationTrainer if data.segment_length else DistillationTrainer,
            add_lora(model, options.lora_r) if options.method == "recover" else model,
            args,
            tokenizer,
            (rows, held_out),
            teacher=teacher,
            loss=KDLoss(options.divergence, options.alpha, options.temperature),
            callbacks=callbacks,
            **optimizers(model, options, args),
        )
        metrics |= run(trainer, "quantize")
        model = trainer.model
    loss = mean_loss(model, evaluation)
    size = file_bytes(folder) if packed_bits is None else round(packed_bits / 8)
    metrics |= {"perplexity_increase": math.exp(loss - base) - 1, "file_bytes": size}
    metrics |= {"bits_per_weight": 8 * size / parameters, "smaller": 4 * parameters / size}
    method = "plain LSQ" if options.method == "lsq" else f"ours, {options.method}"
    point = {"method": method, "bits": metrics["bits_per_weight"], "loss": loss}
    point |= {"increase": metrics["perplexity_increase"], "steps": args.max_steps}
    add_points(options.results, [point], **about)
    return finish(metrics)


if __name__ == "__main__":
    start(main, (ModelArgs, ArchitectureArgs, DataArgs, QuantizeArgs, TrainArgs), __doc__)
