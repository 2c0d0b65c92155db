# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Post-training quantization with data: rounding with error feedback, and more bits where the loss is sensitive.

1. Forward and backward pass of the float model on a few thousand tokens: the cost of an error in each row of each
   weight (`moments`). This gives the relative steps of all weights, and the multiplier that is predicted to meet the
   budget.
2. Tables and heads are quantized, then one block after another (`blocks`), each on the inputs from the already
   quantized model: one pass for the second moments of these, one for the block's new outputs. The multiplier follows
   the bytes spent so far; the last block meets the budget.

Memory holds the model, the matrices of one block, and one hidden state per calibration token.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..ecq_config_flashlite import EcqConfig
from ..ecq_layers_flashlite import collect_layers, ids_of, install, overhead_bytes, round_rest
from ..ecq_probe_flashlite import scale_columns
from ..ecq_search_flashlite import Layer, room_of, search
from ..quantization_flashlite import attach
from .blocks import BlockQuantizer

logger = logging.getLogger(__name__)
LADDER = (2.0, 2.33, 2.67, 3.0, 3.33, 3.67, 4.0, 4.5, 5.0, 6.0)  # bits per weight tried for `max_loss_increase`


def _batches(calibration, model, batch_size: int, data_collator: Callable | None) -> Iterable[dict]:
    """Batches of tensors from a loader, a list of batches, or a dataset of examples, which is padded here."""
    examples = iter(calibration)
    first: dict = next(examples, {})
    if not first:
        raise ValueError("The data holds no batch, or an empty one, but at least 1 is needed; pass None to use none.")
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
    """The first batches of calibration data, in any form that [`quantize`] accepts; segments lose their memory."""
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches is {max_batches}, but must be at least 1, or None for all.")
    batches = itertools.islice(_batches(calibration, model, batch_size, data_collator), max_batches)
    carried = "memory_reset", "shift_labels"
    kept = [{name: value for name, value in batch.items() if name not in carried} for batch in batches]
    if not all(kept):
        raise ValueError(f"Batch {[bool(batch) for batch in kept].index(False)} of the data is empty; leave it out.")
    return kept


def with_labels(batch: dict, model) -> dict:
    """Add next-token labels for a decoder-only model if there are none."""
    batch = {k: v.to(model.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
    if "labels" not in batch and not model.config.is_encoder_decoder and model.can_generate():
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            labels[batch["attention_mask"] == 0] = -100
        batch["labels"] = labels
    return batch


@torch.no_grad()
def mean_loss(model, batches: list[dict]) -> float:
    """Mean loss per target of a model over batches, in nats."""
    total = count = 0.0
    training = model.training
    model.eval()
    for batch in batches:
        batch = with_labels(batch, model)
        # the first token of a row is not a target of a causal model
        first = int(model.can_generate() and not model.config.is_encoder_decoder)
        targets = (batch["labels"][..., first:] != -100).sum().item()
        if not targets:  # the mean over 0 labels would be NaN
            continue
        # with a cache, transformers would ignore the mask implied by restarting positions
        outputs = model(**batch, use_cache=False) if model.can_generate() else model(**batch)
        total += outputs.loss.item() * targets
        count += targets
    model.train(training)
    if not count:
        raise ValueError("The batches hold 0 targets, but a loss needs at least 1; check their labels.")
    return total / count


def pareto(model, bits: Iterable[float], evaluation: list[dict], calibration: Iterable | None = None) -> list[dict]:
    """Loss at each rate: rows with bits (per parameter, whole file), loss and increase (of perplexity).

    Args:
        model (`PreTrainedModel`): a float model, which is not changed.
        bits (iterable of `float`): the rates; one that is out of reach is left out.
        evaluation (`list[dict]`): batches to measure on.
        calibration (iterable, *optional*): as for [`quantize`]; without it, data-free.
    """
    base, rows = mean_loss(model, evaluation), []
    for rate in bits:
        try:
            coded = quantize(copy.deepcopy(model), EcqConfig(target_bits=rate), calibration)
        except ValueError as error:
            logger.warning("%.2f bits per weight: %s", rate, error)
            continue
        loss = mean_loss(coded, evaluation)
        rows.append({"bits": rate, "loss": loss, "increase": math.exp(loss - base) - 1})
        logger.info("%.2f bits per weight: loss %.4f, perplexity %+.2f%%", rate, loss, 100 * rows[-1]["increase"])
    return rows


def quantize(
    model,
    config: EcqConfig,
    calibration: Iterable | None = None,
    data_collator: Callable | None = None,
    batch_size: int = 8,
    max_batches: int | None = None,
    resume: str | os.PathLike | None = None,
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
        resume (path, *optional*): folder that keeps each finished block; an interrupted run with the same budget and
            data goes on from there.

    Returns:
        The same model, now quantized: `save_pretrained` writes the coded file. `model.ecq_pareto` holds the table of
        rates and losses if `config.max_loss_increase` asked for it.

    Raises:
        ValueError: the budget is out of reach, or the model is a mixture of experts.
    """
    layers = collect_layers(model, config)
    overhead, parameters = overhead_bytes(model, ids_of(layers)), sum(p.numel() for p in model.parameters())
    budget = config.budget(parameters)
    if calibration is None:
        if config.max_loss_increase is not None:
            raise ValueError("max_loss_increase needs data to measure the loss on; pass calibration=dataset.")
        scale_columns(model, layers)
        install(model, layers, search(layers, budget, overhead))
    else:
        batches = batches_of(calibration, model, data_collator, batch_size, max_batches)
        if config.max_loss_increase is not None:
            model.ecq_pareto = _ladder(model, batches, config.max_loss_increase)
            budget = model.ecq_pareto[-1]["bits"] * parameters / 8
        elif budget is None:
            budget = 3.1 * parameters / 8
        _calibrated(model, layers, batches, budget, overhead, resume)
    attach(model, config)
    return model


def _calibrated(model, layers: list[Layer], batches: list[dict], budget: float, overhead: float, resume) -> None:
    room, training = room_of(layers, budget, overhead), model.training
    round_rest(model, [module for layer in layers for module in layer.modules])
    model.eval()
    if not BlockQuantizer(model, layers, batches, room, resume).run():
        # If few input directions carry all the power, fed-back errors cost more bits than longer steps save.
        logger.warning(
            "Rounding with error feedback needs more than the budget of %.2f bits per weight; all weights are rounded"
            " to nearest instead: ask for more bits, or train with qat.prepare_qat.",
            8 * budget / sum(p.numel() for p in model.parameters()),
        )
        for layer in layers:
            layer.forget()
            layer.noise = None
        install(model, layers, search(layers, budget, overhead))
    model.train(training)


def _ladder(model, batches: list[dict], most: float) -> list[dict]:
    """Rates tried, ending with the smallest of the ladder whose perplexity rises by at most `most`."""
    rows, low, high, found = [], 0, len(LADDER), None
    while low < high:
        middle = (low + high) // 2
        measured = pareto(model, [LADDER[middle]], batches, batches)
        rows += measured
        if measured and measured[0]["increase"] <= most:
            high, found = middle, measured[0]
        else:
            low = middle + 1
    if found is None:
        raise ValueError(
            f"No rate up to {LADDER[-1]} bits keeps the perplexity within {most:+.2%}: the best is"
            f" {min((row['increase'] for row in rows), default=math.inf):+.2%}; allow more, or train with"
            " qat.prepare_qat."
        )
    return sorted((row for row in rows if row is not found), key=lambda row: row["bits"]) + [found]


def merge_adapters(peft_model, config: EcqConfig | None = None, calibration: Iterable | None = None, **kwargs):
    """Merge LoRA adapters into a quantized model by quantizing the sum; peft's own merge cannot add to codes.

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
