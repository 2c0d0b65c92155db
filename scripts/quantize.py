"""Quantize a model to a bit budget: after training (ptq), with training (qat), or with adapters on top (recover).

python scripts/quantize.py --config scripts/recipes/qat_tiny.yaml --model runs/train_tiny --target_bits 2.5
python scripts/quantize.py --config scripts/recipes/ptq_tiny.yaml --rates 2 2.5 3 3.5 --results runs/rates.json
python scripts/quantize.py --config scripts/recipes/qat_tiny.yaml --method lsq --results runs/rates.json
"""

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.trainer_utils import SaveStrategy

from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import PaddingCollator
from modeling_flashlite.measure.results import command_line, read_results, write_results
from modeling_flashlite.quantization_flashlite import EcqConfig, collect_layers, weight_of
from modeling_flashlite.training.calibration import batches_of, mean_loss, pareto, quantize
from modeling_flashlite.training.distillation import DistillationTrainer, KDLoss
from modeling_flashlite.training.launch import (
    ArchitectureArgs,
    DataArgs,
    ModelArgs,
    TrainArgs,
    load_model,
    load_rows,
    load_splits,
    load_tokenizer,
    make_trainer,
    run,
)
from modeling_flashlite.training.lora import add_lora
from modeling_flashlite.training.lsq import PlainLSQ
from modeling_flashlite.training.qat import EcqCallback, prepare_qat

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
    alpha: float = field(
        default=0.0, metadata={"help": "qat, recover: share of plain cross-entropy beside the teacher"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of teacher and student"})
    divergence: str = field(
        default="forward", metadata={"help": "from the float original: forward, reverse, jsd:beta"}
    )
    lora_r: int = field(default=8, metadata={"help": "recover: rank of the adapters"})
    rates: list[float] = field(
        default_factory=list, metadata={"help": "ptq: only measure the loss at these bits per weight"}
    )
    lsq_bits: int = field(default=2, metadata={"help": "lsq: bits of a code, all of them in the file"})
    results: str | None = field(
        default=None, metadata={"help": "results file; a loss over bits per weight joins those that it has"}
    )


def nearest_int4(weight: torch.Tensor, group: int = 128) -> tuple[torch.Tensor, float]:
    """Round to nearest with 4 bits and a bfloat16 scale, the largest magnitude, for each group; (weight, bits)."""
    rows, columns = weight.shape
    group = min(group, columns)
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    scale = (padded.abs().amax(-1, keepdim=True) / 7.5).to(torch.bfloat16).float().clamp(min=1e-12)
    rounded = (torch.round(padded / scale).clamp(-8, 7) * scale).view(rows, -1)[:, :columns]
    return rounded.to(weight.dtype), 4.0 * rows * columns + 16.0 * scale.numel()


@torch.no_grad()
def nearest_point(model, layers, batches, base: float) -> dict:
    """The peer that everybody has: int4 in groups of 128, nothing coded."""
    peer, total, bits = copy.deepcopy(model), sum(p.numel() for p in model.parameters()), 0.0
    for layer in layers:
        module = peer.get_submodule(layer.names[0])
        rounded, held = nearest_int4(weight_of(module))
        module.weight.copy_(rounded if rounded.shape == module.weight.shape else rounded.T)
        bits += held - 16 * rounded.numel()
    loss = mean_loss(peer, batches)
    return {"method": "int4 g128", "bits": bits / total + 16, "loss": loss, "increase": math.exp(loss - base) - 1}


def measure_rates(model, options: QuantizeArgs, calibration: list, evaluation: list) -> list[dict]:
    """Loss of float, int4 g128, data-free and calibrated quantization over bits per weight."""
    base = mean_loss(model, evaluation)
    points = [{"method": "float", "bits": 32.0, "loss": base, "increase": 0.0}]
    points.append(nearest_point(model, collect_layers(model, EcqConfig()), evaluation, base))
    for method, data in (("ours, data-free", None), ("ours, calibrated", calibration)):
        points += [{"method": method, **row} for row in pareto(model, options.rates, evaluation, data)]
    return points


def add_points(options: QuantizeArgs, model: str, dataset: str, seed: int, points: list[dict]) -> None:
    """Write the results file anew with `points` in the places of older ones of their method and size."""
    path = options.results
    if not path:
        return

    def key(point: dict) -> tuple:
        return point["method"], round(point["bits"], 1)

    fresh = {key(point) for point in points}
    points = [{**point, "command": command_line()} for point in points]
    if Path(path).exists():
        points = [point for point in read_results([Path(path)])[0]["points"] if key(point) not in fresh] + points
    metrics = {f"increase_{p['method']}_{p['bits']:.2f}": p["increase"] for p in points}
    write_results(path, metrics, task="quantization", model=model, dataset=dataset, seed=seed, points=points)


def file_bytes(folder: str) -> int:
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def main(
    model_args: ModelArgs, shape: ArchitectureArgs, data: DataArgs, options: QuantizeArgs, args: TrainArgs
) -> dict:
    if options.method not in METHODS:
        raise SystemExit(f"quantize.py: method is {options.method!r}, but must be one of {', '.join(METHODS)}.")
    if not model_args.model:
        raise SystemExit("quantize.py: no model is given; pass --model with a folder or Hub id of a trained one.")
    splits = load_splits(data)
    tokenizer = load_tokenizer(model_args, data, args.output_dir, splits)
    model = load_model(model_args, shape, tokenizer, data, splits)
    collator = PaddingCollator(tokenizer)
    rows, held_out = load_rows(data, args, tokenizer, splits, model.config.is_encoder_decoder, model.config)
    calibration = batches_of(rows, model, collator, args.train_batch_size, options.calibration_batches)
    evaluation = batches_of(held_out or rows, model, collator, args.eval_batch_size)
    if options.rates:
        points = measure_rates(model, options, calibration, evaluation)
        add_points(options, model_args.model, data.dataset, args.seed, points)
        return finish({"points": points})

    base, parameters = mean_loss(model, evaluation), sum(p.numel() for p in model.parameters())
    config = EcqConfig(
        target_bits=options.target_bits,
        target_bytes=options.target_bytes,
        max_loss_increase=options.max_loss_increase,
    )
    teacher = copy.deepcopy(model) if options.method != "ptq" else None
    metrics = {"output_dir": args.output_dir, "float_loss": base}
    callbacks, packed_bits = [], None
    if options.method == "lsq":
        callbacks = [PlainLSQ(model, [layer.modules for layer in collect_layers(model, config)], options.lsq_bits)]
        packed_bits = parameters * callbacks[0].bits_per_weight(model)
        args.save_strategy = SaveStrategy.NO  # parametrized tied weights do not fit a checkpoint
    elif options.method == "qat":
        prepare_qat(model, config, calibration)
        callbacks = [EcqCallback()]
    else:
        quantize(model, config, None if options.data_free else calibration)
        metrics["ptq_perplexity_increase"] = math.exp(mean_loss(model, evaluation) - base) - 1
    folder = args.output_dir if options.method != "recover" else f"{args.output_dir}/base"
    if options.method in ("ptq", "recover"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    if options.method != "ptq":
        trainer = make_trainer(
            DistillationTrainer,
            add_lora(model, options.lora_r) if options.method == "recover" else model,
            args,
            tokenizer,
            (rows, held_out),
            teacher=teacher,
            loss=KDLoss(options.divergence, options.alpha, options.temperature),
            callbacks=callbacks,
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
    add_points(options, model_args.model, data.dataset, args.seed, [point])
    return finish(metrics)


if __name__ == "__main__":
    start(main, (ModelArgs, ArchitectureArgs, DataArgs, QuantizeArgs, TrainArgs), __doc__)
