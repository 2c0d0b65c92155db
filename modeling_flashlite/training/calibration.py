# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Post-training quantization with data: rounding with error feedback, bits where the loss needs them.

One pass over the calibration data collects, for every weight, the second moments of its inputs and of the gradients of
its outputs; `ecq_search_flashlite` turns them into steps, codes and a file of the asked size. It needs about
`12 * (rows^2 + columns^2)` bytes for each weight.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..ecq_search_flashlite import Layer, inverse_factor, search
from ..ecq_stream_flashlite import QuantizedWeight
from ..linear_flashlite import Linear
from ..quantization_flashlite import (
    EcqConfig,
    attach,
    collect_layers,
    ids_of,
    install,
    overhead_bytes,
)

logger = logging.getLogger(__name__)
_MAX_OUTPUT_ROWS = 4096  # beyond, the moments of output gradients are kept for single rows only
_MAX_WAVE_WORK = 3e10  # limit of multiply-adds for feedback along rows of one weight
LADDER = (2.0, 2.33, 2.67, 3.0, 3.33, 3.67, 4.0)  # bits per weight tried for `max_loss_increase`
_ROW_SHARE = 0.8  # weight of sensitivity against standard deviation for steps within a tensor


class _Moments:
    """Second moments of one weight, from hooks: `inputs` [columns, columns], `outputs` [rows, rows] or [rows]."""

    def __init__(self, layer: Layer):
        self.layer = layer
        self.inputs = self.outputs = None
        self.lookup_inputs = self.lookup_rows = None

    @staticmethod
    def _moment(x: torch.Tensor, full: bool) -> torch.Tensor:
        x = x.detach().reshape(-1, x.shape[-1]).float()
        return x.T @ x if full else x.square().sum(0)

    def linear(self, x: torch.Tensor, output: torch.Tensor) -> None:
        self.inputs = _add(self.inputs, self._moment(x, True))
        full = output.shape[-1] <= _MAX_OUTPUT_ROWS
        if output.requires_grad:
            output.register_hook(lambda g: setattr(self, "outputs", _add(self.outputs, self._moment(g, full))))

    def lookup(self, ids: torch.Tensor, output: torch.Tensor) -> None:
        counts = torch.bincount(ids.reshape(-1), minlength=len(self.layer.weight)).float()
        self.lookup_rows = _add(self.lookup_rows, counts)
        if output.requires_grad:
            output.register_hook(
                lambda g: setattr(self, "lookup_inputs", _add(self.lookup_inputs, self._moment(g, True)))
            )

    def finish(self) -> None:
        """Compute factors and steps of the layer from the collected moments."""
        inputs, outputs = self.inputs, self.outputs
        if self.lookup_inputs is not None:
            # A lookup is a product with one-hot inputs: the roles of rows and columns are exchanged.
            rows = self.lookup_rows + self.lookup_rows.mean() * 0.05 + 1e-3
            if inputs is None or outputs is None:
                inputs, outputs = self.lookup_inputs, rows
            else:
                total = inputs.trace() * (outputs.trace() if outputs.dim() == 2 else outputs.sum())
                share = self.lookup_inputs.trace() * (self.lookup_rows.sum() + 1) / (total + 1e-30)
                inputs = inputs / inputs.trace() + share * self.lookup_inputs / self.lookup_inputs.trace()
                rows = share * rows / rows.sum()
                if outputs.dim() == 2:
                    outputs = outputs / outputs.trace() + torch.diag(rows)
                else:
                    outputs = outputs / outputs.sum() + rows
                scale = (total / (1 + share)) ** 0.5
                inputs, outputs = inputs * scale, outputs * scale
        layer = self.layer
        if inputs is None or not torch.isfinite(inputs).all() or inputs.trace() <= 0:
            return
        layer.input_moment, layer.input_factor = inputs, inverse_factor(inputs)
        if outputs is None or not torch.isfinite(outputs).all() or outputs.sum() <= 0:
            return
        if outputs.dim() == 2:
            factor = inverse_factor(outputs)
            spread = factor.diagonal().log2()
            rows, columns = layer.weight.shape
            if rows * columns * (64 * columns + rows) <= _MAX_WAVE_WORK:
                layer.output_factor = factor
        else:
            spread = -0.5 * torch.log2(outputs.double() + 0.01 * outputs.double().mean())
        sigma = torch.log2(layer.sigma.double())
        rows = _ROW_SHARE * (spread - spread.mean()) + (1 - _ROW_SHARE) * (sigma - sigma.mean())
        layer.log_steps = (layer.input_factor.diagonal().log2().mean() + spread.mean() + rows).float()


def _add(total, value):
    return value if total is None else total + value


def _batches(calibration, model, batch_size: int, data_collator: Callable | None) -> Iterable[dict]:
    """Batches of tensors from a loader, a list of batches, or a dataset of examples, which is padded here."""
    examples = iter(calibration)
    first = next(examples)
    examples, ids = itertools.chain([first], examples), first.get("input_ids")
    if data_collator is None and (ids is None or isinstance(ids, torch.Tensor) and ids.dim() == 2):
        yield from examples
        return
    pad = getattr(model.config, "pad_token_id", None) or 0
    fill = {"input_ids": pad, "labels": -100, "decoder_input_ids": pad}
    while group := list(itertools.islice(examples, batch_size)):
        if data_collator is not None:
            yield data_collator(group)
            continue
        batch = {}
        for key in [k for k in group[0] if k in fill or k.endswith("attention_mask")]:
            rows = [torch.as_tensor(example[key]) for example in group]
            batch[key] = nn.utils.rnn.pad_sequence(rows, True, fill.get(key, 0))
        if "attention_mask" not in batch:
            lengths = torch.tensor([len(example["input_ids"]) for example in group])
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
        yield batch


def batches_of(calibration, model, data_collator=None, batch_size: int = 8, max_batches: int | None = None) -> list:
    """The first batches of calibration data in any of the forms that [`quantize`] takes."""
    return list(itertools.islice(_batches(calibration, model, batch_size, data_collator), max_batches))


def _with_labels(batch: dict, model) -> dict:
    """Adds next-token labels for a decoder-only model that was given none."""
    batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
    if "labels" not in batch and not model.config.is_encoder_decoder and model.can_generate():
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            labels[batch["attention_mask"] == 0] = -100
        batch["labels"] = labels
    return batch


def _watch(module: nn.Module, record: Callable) -> Callable[[], object]:
    """Call `record(input, output)` for every product or lookup of a layer; returns a function that stops this."""
    plain = type(module)
    if plain.forward in (nn.Linear.forward, Linear.forward, nn.Embedding.forward, Conv1D.forward):

        def hook(module, args, kwargs, output):
            record(*args, *kwargs.values(), output)

        return module.register_forward_hook(hook, with_kwargs=True).remove

    # A subclass may take other inputs than ids (a mask) and return other values (scaled embeddings).
    class Watched(nn.Linear if isinstance(module, nn.Linear) else nn.Embedding):  # type: ignore[misc]
        def forward(self, input):
            output = super().forward(input)
            record(input, output)
            return output

    module.__class__ = type(plain.__name__, (plain, Watched), {})
    return lambda: setattr(module, "__class__", plain)


def collect_moments(model, layers: list[Layer], batches: list[dict]) -> None:
    """Fill in the factors and steps of `layers` from forward and backward passes over `batches`."""
    moments = [_Moments(layer) for layer in layers]
    undo = [
        _watch(module, moment.lookup if isinstance(module, nn.Embedding) else moment.linear)
        for moment in moments
        for module in moment.layer.modules
    ]
    training = model.training
    model.eval()
    try:
        for batch in batches:
            batch = _with_labels(batch, model)
            next(model.get_input_embeddings().parameters()).requires_grad_(True)
            with torch.enable_grad():
                outputs = model(**batch, use_cache=False) if model.can_generate() else model(**batch)
                loss = getattr(outputs, "loss", None)
                if loss is not None:
                    targets = (batch["labels"] != -100).sum() if "labels" in batch else 1
                    (loss * targets).backward()
            model.zero_grad(set_to_none=True)
    finally:
        for end in undo:
            end()
        model.train(training)
    for moment in moments:
        moment.finish()
    _centre(layers)


def _centre(layers: list[Layer]) -> None:
    """Common offset so that a multiplier of -1 means half a standard deviation on average."""
    elements = sum(layer.weight.numel() for layer in layers)
    offset = sum(
        ((layer.log_steps - torch.log2(layer.sigma)).mean() * layer.weight.numel()).item() for layer in layers
    )
    for layer in layers:
        layer.log_steps = layer.log_steps - offset / elements


@torch.no_grad()
def mean_loss(model, batches: list[dict]) -> float:
    """Mean loss per target of a model over batches, in nats."""
    total = count = 0.0
    training = model.training
    model.eval()
    for batch in batches:
        batch = _with_labels(batch, model)
        # the first token of a row is no target of a causal model
        first = int(model.can_generate() and not model.config.is_encoder_decoder)
        targets = (batch["labels"][..., first:] != -100).sum().item()
        if not targets:  # the mean would be NaN
            continue
        # with use_cache the library ignores the mask implied by restarting positions
        outputs = model(**batch, use_cache=False) if model.can_generate() else model(**batch)
        total += outputs.loss.item() * targets
        count += targets
    model.train(training)
    if not count:
        raise ValueError("The batches hold 0 targets, but a loss needs at least 1; check their labels.")
    return total / count


@torch.no_grad()
def _loss_with(model, layers: list[Layer], weights: list[QuantizedWeight], batches: list[dict]) -> float:
    """Loss of the float model with rounded weights; the float weights are restored."""
    originals = [layer.modules[0].weight.detach().clone() for layer in layers]
    for layer, weight in zip(layers, weights):
        values = weight.dequantize()
        module = layer.modules[0]
        module.weight.copy_(values.T if isinstance(module, Conv1D) else values)
    try:
        return mean_loss(model, batches)
    finally:
        for layer, original in zip(layers, originals):
            layer.modules[0].weight.copy_(original)


def pareto(model, layers: list[Layer], batches: list[dict], bits: Iterable[float]) -> list[dict]:
    """Loss at each rate: rows with bits (per parameter, whole file), loss, increase (of perplexity) and weights."""
    overhead, parameters = overhead_bytes(model, ids_of(layers)), sum(p.numel() for p in model.parameters())
    base, rows = mean_loss(model, batches), []
    for layer in layers:
        layer.weight = layer.weight.clone()  # the original is overwritten while the loss is measured
    for rate in bits:
        try:
            weights = search(layers, rate * parameters / 8, overhead, tolerance=0.02)
        except ValueError:
            continue
        loss = _loss_with(model, layers, weights, batches)
        rows.append({"bits": rate, "loss": loss, "increase": math.exp(loss - base) - 1, "weights": weights})
        logger.info("%.2f bits per weight: loss %.4f, perplexity %+.2f%%", rate, loss, 100 * rows[-1]["increase"])
    return rows


def quantize(
    model,
    config: EcqConfig,
    calibration: Iterable | None = None,
    data_collator: Callable | None = None,
    batch_size: int = 8,
    max_batches: int | None = None,
):
    """Quantize a float model in place, with calibration data if given.

    Args:
        model (`PreTrainedModel`): any float model; encoder-decoders need labels in the calibration data.
        config (`EcqConfig`): the budget.
        calibration (iterable, *optional*): batches of tensors, or a dataset of examples with `input_ids` and, if
            wanted, `attention_mask` and `labels`. Some ten thousand tokens are enough. Without it: data-free.
        data_collator (`Callable`, *optional*): makes a batch from a list of examples.
        batch_size (`int`): examples in a batch.
        max_batches (`int`, *optional*): use only so many.

    Returns:
        The same model, now quantized: `save_pretrained` writes the coded file. `model.ecq_pareto` holds the table of
        rates and losses if `config.max_loss_increase` asked for it.

    Raises:
        ValueError: the budget is out of reach, or the model is a mixture of experts.
    """
    layers = collect_layers(model, config)
    overhead, parameters = overhead_bytes(model, ids_of(layers)), sum(p.numel() for p in model.parameters())
    if calibration is None:
        if config.max_loss_increase is not None:
            raise ValueError("max_loss_increase needs data to measure the loss on; pass calibration=dataset.")
        weights = search(layers, config.budget(parameters), overhead)
    else:
        batches = batches_of(calibration, model, data_collator, batch_size, max_batches)
        collect_moments(model, layers, batches)
        if config.max_loss_increase is None:
            weights = search(layers, config.budget(parameters), overhead)
        else:
            weights = _within(model, layers, batches, config)
    with torch.no_grad():
        install(model, layers, weights)
    attach(model, config)
    return model


def _within(model, layers: list[Layer], batches: list[dict], config: EcqConfig) -> list[QuantizedWeight]:
    """The smallest of a ladder of rates whose perplexity rises by at most `max_loss_increase`."""
    rows = pareto(model, layers, batches, LADDER)
    good = [row for row in rows if row["increase"] <= config.max_loss_increase]
    if not good:
        best = min(rows, key=lambda row: row["increase"])
        raise ValueError(
            f"No rate up to {LADDER[-1]} bits keeps the perplexity within {config.max_loss_increase:+.2%}: the best is"
            f" {best['increase']:+.2%} at {best['bits']} bits; allow more, or train with qat.prepare_qat."
        )
    model.ecq_pareto = [{k: v for k, v in row.items() if k != "weights"} for row in rows]
    return good[0]["weights"]


def merge_adapters(peft_model, config: EcqConfig | None = None, calibration: Iterable | None = None, **kwargs):
    """Merge LoRA adapters into a quantized model by quantizing the sum again; peft's own merge cannot add to codes.

    Args:
        peft_model (`peft.PeftModel`): adapters on a quantized model.
        config (`EcqConfig`, *optional*): the new budget; that of the base if unset.
        calibration, kwargs: as for [`quantize`].

    Returns:
        The base model, quantized, without adapters.
    """
    base = peft_model.get_base_model()
    if getattr(base, "hf_quantizer", None) is None:
        raise ValueError("The base of these adapters is not quantized; call merge_and_unload() on it.")
    config = config or base.hf_quantizer.quantization_config
    base.dequantize()
    for module in peft_model.modules():
        if isinstance(getattr(module, "base_layer", None), Conv1D):
            module.fan_in_fan_out = True
    return quantize(peft_model.merge_and_unload(), config, calibration, **kwargs)
