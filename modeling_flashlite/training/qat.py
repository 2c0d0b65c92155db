# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
r"""Quantization-aware training to a bit budget, on the standard Trainer.

    model = prepare_qat(model, EcqConfig(target_bits=2.2), calibration=dataset)
    Trainer(model, args, train_dataset=dataset, callbacks=[EcqCallback()]).train()
    model.save_pretrained("small")

`prepare_qat` starts from the codes of post-training quantization and puts fake-quantized twins in place of the layers.
Their weights and steps learn from the loss by straight-through gradients. The rate of a weight w with step s is the
piecewise linear code length

    R(u) = (1 - f) L[floor u] + f L[floor u + 1],    u = w / s,    f = u - floor u,

with L the running mean of `-log2` of each code's frequency. [`EcqCallback`] adds `lambda dR/dw` and `lambda dR/dlog s`
to the gradients just before each optimizer step, after accumulation, averaging over processes and clipping, in units
of the root mean square of the loss's own gradient; a proportional-integral controller sets lambda so that the bits of
the whole file come to the target. Negative lambda, when the file is too small, only shortens steps.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable

import torch
from transformers import TrainerCallback, TrainingArguments

from ..ecq_config_flashlite import EcqConfig
from ..ecq_layers_flashlite import collect_layers, groups_of, install_groups, overhead_bytes
from ..ecq_modules_flashlite import to_quantized
from ..ecq_stream_flashlite import stream_bytes
from ..ecq_twins_flashlite import LEVELS, FakeQuantModule, to_twin
from ..ecq_weight_flashlite import QuantizedWeight
from ..quantization_flashlite import attach
from .calibration import quantize

logger = logging.getLogger(__name__)
_MARGIN = 0.4  # share of a step by which a weight may start away from its center
_MEMORY = 0.9  # momentum of the running means
_PROPORTIONAL, _INTEGRAL, _LIMIT = 2.0, 0.05, 4.0  # gains and limit of the controller, per bit of error


def prepare_qat(
    model,
    config: EcqConfig,
    calibration: Iterable | None = None,
    data_collator: Callable | None = None,
    batch_size: int = 8,
    max_batches: int | None = None,
    start=None,
):
    """Replace the layers of a float model by fake-quantized twins, in place.

    Args:
        model (`PreTrainedModel`): a float model, best fully trained.
        config (`EcqConfig`): with `target_bits` or `target_bytes`.
        calibration, data_collator, batch_size, max_batches: as for `calibration.quantize`, from whose codes
            training starts.
        start (`PreTrainedModel`, *optional*): the same model, quantized before; its codes are taken instead.

    Returns:
        The same model, ready for `Trainer(..., callbacks=[EcqCallback()])`.
    """
    if config.target_bits is None and config.target_bytes is None:
        raise ValueError("Training needs a budget: set target_bits or target_bytes in the EcqConfig.")
    layers = collect_layers(model, config)
    originals = {
        layer.names[0]: (
            layer.weight.clone() if start is None else layer.weight,
            layer.modules[0].weight.requires_grad,
        )
        for layer in layers
    }
    if start is None:
        quantize(model, config, calibration, data_collator, batch_size, max_batches)
    else:
        _take_rest(model, start, originals)
    config.stage = "qat"
    for names, coded in groups_of(start or model):
        weight, (original, trained) = coded[0].quantized(), originals.pop(names[0])
        first, master = None, _near(weight, original)
        for name in names:
            module = model.get_submodule(name)
            twin = to_twin(module, weight, master)
            if twin is not module:
                model.set_submodule(name, twin)
            if first is None:
                first = twin
                twin.weight.requires_grad_(trained)
            else:
                twin.share_twin(first)
    model.register_buffer("ecq_rate", torch.zeros(3, device=model.device))
    attach(model, config)
    return model


@torch.no_grad()
def _take_rest(model, start, coded: Iterable[str]) -> None:
    """Take over what stays float, after checking that `start` has codes for all of `coded`."""
    held = {names[0] for names, _ in groups_of(start)}
    if different := sorted(held.symmetric_difference(coded)):
        raise ValueError(
            f"start does not hold codes of the same layers as the model, {different[0]} for one; quantize this model."
        )
    inside = tuple(f"{name}." for names, _ in groups_of(start) for name in names)
    own = model.state_dict()
    for name, value in start.state_dict().items():
        if not name.startswith(inside) or name.endswith(".bias"):
            own[name].copy_(value)


def _smooth(counts: torch.Tensor) -> torch.Tensor:
    """Counts of the codes of `LEVELS`, each averaged over neighbours within a quarter of its distance from 0.

    Large codes are rare, and the code lengths of neighbours must not differ by chance.
    """
    codes = torch.arange(LEVELS[0], LEVELS[1] + 1, device=counts.device)
    reach, place = codes.abs() // 4, codes - LEVELS[0]
    below, above = (place - reach).clamp(min=0), (place + reach + 1).clamp(max=len(counts))
    sums = torch.nn.functional.pad(counts.double().cumsum(0), (1, 0))
    return ((sums[above] - sums[below]) / (above - below)).float()


def _near(weight: QuantizedWeight, original: torch.Tensor) -> torch.Tensor:
    """The original weight, clamped to the steps of its codes, so that training starts as the quantized model."""
    step = weight.step()[:, None] * (1.0 if weight.column_scale() is None else weight.column_scale())
    rounded, margin = weight.dequantize().to(original.device), _MARGIN * step.to(original.device)
    return (rounded + (original.float() - rounded).clamp(-margin, margin)).to(original.dtype)


def parameter_groups(model, weight_rate: float) -> list[dict]:
    """Groups for an optimizer: the weights of each twin learn by a share of their step, all others as it is told.

    Layers differ in their steps by more than ten times. With Adam a weight moves by about its learning rate, so one
    rate for all would turn over the codes of some layers and never change those of others.

    Args:
        model (`PreTrainedModel`): of [`prepare_qat`].
        weight_rate (`float`): learning rate of the weights, in steps of their layer.

    Returns:
        `list[dict]`: for `torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-3)`.
    """
    groups, coded = [], set()
    for _, twins in groups_of(model, FakeQuantModule):
        weight = twins[0].weight
        steps = torch.cat([step.mean(1) for _, _, step in twins[0].pieces()])
        groups.append({"params": [weight], "lr": weight_rate * steps.median().item()})
        coded.add(id(weight))
    return [{"params": [p for p in model.parameters() if id(p) not in coded]}, *groups]


def qat_optimizer(model, weight_rate: float, args: TrainingArguments) -> torch.optim.AdamW:
    """AdamW over [`parameter_groups`], otherwise as the arguments of a `Trainer` say."""
    groups, betas = parameter_groups(model, weight_rate), (args.adam_beta1, args.adam_beta2)
    return torch.optim.AdamW(groups, args.learning_rate, betas, args.adam_epsilon, args.weight_decay, fused=True)


class RateController:
    """The rate of a model with twins: measures it, adds its gradient, steers it to the budget.

    Its state is the model's buffer `ecq_rate`, which checkpoints keep: lambda's integral, the ratio of gradients, and
    the bits of the file besides the entropy of the codes.
    """

    def __init__(self, model):
        self.model, config = model, model.hf_quantizer.quantization_config
        self.groups = [twins for _, twins in groups_of(model, FakeQuantModule)]
        if not self.groups:
            raise ValueError("The model has no fake-quantized layers; call prepare_qat(model, EcqConfig(...)) first.")
        coded = {id(twin.weight) for twins in self.groups for twin in twins}
        own = [p for n, p in model.named_parameters() if not n.endswith("log_step")]
        self.parameters = sum(p.numel() for p in own)
        self.elements = sum(twins[0].weight.numel() for twins in self.groups)
        self.target = 8 * config.budget(self.parameters) / self.parameters
        self.overhead = 8 * overhead_bytes(model, coded)
        # Size of the coded streams beyond the entropy of the codes: headers, tables, steps, coder overhead.
        if model.ecq_rate[2] == 0:
            self.side = 0.0
            self.measure(update=False)
            model.ecq_rate[2] = self.overhead + self._held() - self.bits * self.parameters
        self.side = model.ecq_rate[2].item()
        self.bits = self.distortion = self.weight = math.nan

    def _held(self) -> int:
        """Bits of the coded streams."""
        return 8 * sum(stream_bytes(twins[0].quantized()) for twins in self.groups)

    @torch.no_grad()
    def measure(self, update: bool = True) -> tuple[list[torch.Tensor], float]:
        """Measures the bits per weight and updates the code lengths.

        Returns:
            the gradient of the rate by the step of each group, and the squares of those by the weights, summed.
        """
        bits, power, noise, shifts, squares = self.side, 0.0, 0.0, [], 0.0
        for twins in self.groups:
            twin = twins[0]
            slopes = twin.code_lengths.diff()
            counts = torch.zeros(len(twin.code_lengths), dtype=torch.long, device=slopes.device)
            shift = torch.zeros((), device=slopes.device)
            for _, weight, step in twin.pieces():
                ratio = (weight / step).clamp_(*LEVELS)
                codes = ratio.round()
                counts += torch.bincount((codes - LEVELS[0]).to(torch.uint8).flatten(), minlength=len(counts))
                slope = _slope(slopes, ratio)
                shift -= (slope * ratio).sum()
                squares += slope.div_(step).square_().sum().item()
                noise += codes.mul_(step).sub_(weight).square_().sum().item()
                power += weight.square().sum().item()
            shifts.append(shift * (math.log(2) / math.sqrt(7 * twin.weight.numel())))
            counts = counts.float()
            p = counts / counts.sum()
            bits -= (counts * torch.log2(p.clamp(min=1e-12))).sum().item()
            lengths = -torch.log2(_smooth(counts).clamp(min=0.1) / counts.sum())
            if update:
                started = bool((twin.code_lengths != 4.0).any())
                twin.code_lengths.lerp_(lengths, 1 - _MEMORY if started else 1.0)
        self.bits, self.distortion = bits / self.parameters, noise / power
        return shifts, squares

    @torch.no_grad()
    def step(self, frozen: bool = False) -> None:
        """Call it with complete gradients before the optimizer step; `frozen` leaves the weights unchanged."""
        shifts, rate_power = self.measure()
        state, error = self.model.ecq_rate, self.bits - self.target
        grads = [twins[0].weight.grad for twins in self.groups]
        loss_power = sum(grad.float().square().sum().item() for grad in grads if grad is not None)
        if loss_power == 0.0:
            return
        if rate_power > 0.0:  # not before the first lengths are known
            scale = math.sqrt(loss_power / rate_power)
            state[1] = scale if state[1] == 0 else _MEMORY * state[1] + (1 - _MEMORY) * scale
        state[0] = (state[0] + _INTEGRAL * max(-0.5, min(0.5, error))).clamp(-_LIMIT, _LIMIT)
        self.weight = max(-_LIMIT, min(_LIMIT, state[0].item() + _PROPORTIONAL * error))
        push = self.weight * state[1]
        for twins, grad, shift in zip(self.groups, grads, shifts):
            twin = twins[0]
            if twin.log_step.grad is not None:
                twin.log_step.grad += push * shift
            if frozen:
                twin.weight.grad = None
            elif self.weight > 0 and grad is not None:
                slopes = twin.code_lengths.diff()
                for rows, weight, step in twin.pieces():
                    slope = _slope(slopes, (weight / step).clamp_(*LEVELS)).div_(step)
                    grad[rows] += (push * slope).to(grad.dtype)


def _slope(slopes: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
    """Derivative of the code length by `ratio = w / step`, of the piece of the line on which it lies."""
    low = ratio.floor().clamp_(max=LEVELS[1] - 1).sub_(LEVELS[0])
    return slopes[low.to(torch.int32)]


class EcqCallback(TrainerCallback):
    """Quantization-aware training for the standard `Trainer` and `Seq2SeqTrainer`: rate, schedule, logs, and export.

    Adds `bits_per_weight` (whole file), `distortion` (squared error over squared weight) and `lambda` to the logs.
    When training ends the model becomes the coded 4-bit model, and `save_pretrained` writes the file.

    Args:
        freeze (`float`): last share of training, in which weights are frozen and only steps, norms and biases learn.
    """

    def __init__(self, freeze: float = 0.1):
        self.freeze = freeze
        self.controller: RateController | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if getattr(model, "hf_quantizer", None) is None:
            raise ValueError("EcqCallback trains a model of prepare_qat(model, EcqConfig(...)); this one is float.")
        self.controller = RateController(model)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        done = state.global_step / max(1, state.max_steps)
        self.controller.step(frozen=done >= 1 - self.freeze)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.controller is None or logs is None or "loss" not in logs or math.isnan(self.controller.bits):
            return
        rate = self.controller
        values = {"bits_per_weight": rate.bits, "distortion": rate.distortion, "lambda": rate.weight}
        values = {key: round(value, 5) for key, value in values.items()}
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        finalize(model, self.controller)
        self.controller = None


@torch.no_grad()
def finalize(model, controller: RateController | None = None) -> None:
    """Turn a trained model with twins into the coded 4-bit model, in place.

    If the file still exceeds the budget by more than 0.03 bits, because training was too short, all quantization steps
    grow until it fits.
    """
    controller = controller or RateController(model)
    groups = groups_of(model, FakeQuantModule)
    for _ in range(8):
        excess = (controller.overhead + controller._held()) / controller.parameters - controller.target
        if excess <= 0.03:
            break
        logger.warning("The file is %.2f bits per weight above the budget; all steps grow.", excess)
        for _, twins in groups:
            twins[0].log_base += 1.05 * excess
    weights = [twins[0].quantized() for _, twins in groups]
    modules = [(names, [to_quantized(twin) for twin in twins]) for names, twins in groups]
    install_groups(model, modules, weights)
    del model.ecq_rate
    config = model.hf_quantizer.quantization_config
    config.stage = "coded"
    attach(model, config)
