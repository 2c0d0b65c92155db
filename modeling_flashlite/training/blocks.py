# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Quantize a model block by block, each block on the inputs from the already quantized model.

Two passes over the calibration data for each block: one for the second moments of its inputs, one for the outputs of
its rounded weights. In memory are the model, the matrices of one block, and one hidden state for each token.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..ecq_layers_flashlite import install_layer
from ..ecq_reader_flashlite import decode_weights
from ..ecq_search_flashlite import (
    Layer,
    find_multiplier,
    fit,
    inverse_factor,
    predicted_divergence,
    quantize_layer,
)
from ..ecq_stream_flashlite import encode_weight, stream_bytes
from ..ecq_weight_flashlite import QuantizedWeight
from .moments import HELD, SLICE, TOKENS, InputMoments, collect_moments, slices_of
from .replay import Replay, stacks_of

logger = logging.getLogger(__name__)
TOLERANCE = 0.006  # accepted gap below the budget, as a share of it
_PROCESS = 0.5e9  # bytes of Python and its libraries
_BEARABLE = 0.7  # predicted divergence in nats at which perplexity doubles
_HOPELESS = math.log(1000)  # beyond, the prediction is one of ruin only
_FIELDS = ("log_steps", "log_scales", "noise", "price")
Group = tuple[int, int, list[Layer]]  # stack (-1 outside of all), block, layers


def runner(model) -> Callable[[dict], object]:
    """Calls a model on a batch, without labels if it needs none, with products in bfloat16 where that is faster."""
    needs_labels = model.config.is_encoder_decoder
    options = {"use_cache": False} if model.can_generate() else {}
    parameter = next(model.parameters())
    quick = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    quick = quick and torch.cpu._is_avx512_bf16_supported()

    def run(batch: dict):
        batch = {k: v.to(parameter.device) for k, v in batch.items() if isinstance(v, torch.Tensor)}
        if not needs_labels or "decoder_input_ids" in batch:
            batch.pop("labels", None)
        with torch.autocast("cpu", torch.bfloat16) if quick else nullcontext():
            return model(**batch, **options)

    return run


class _Spending:
    """The multiplier that spends a number of bytes, corrected by the actual sizes of the finished layers."""

    def __init__(self, layers: list[Layer], room: float):
        self.aim = (1 - TOLERANCE / 4) * room
        self.multiplier, sizes = find_multiplier(layers, self.aim)
        self.predicted = {id(layer): size for layer, size in zip(layers, sizes)}
        self.elements = {id(layer): layer.weight.numel() for layer in layers}
        self.spent = self.expected = 0.0

    def next(self) -> float:
        """Multiplier for all remaining layers."""
        ratio = self.spent / self.expected if self.expected else 1.0
        left = ratio * sum(self.predicted.values())
        octaves = 8 * (left - (self.aim - self.spent)) / sum(self.elements.values())
        return self.multiplier + max(-1.0, min(1.0, octaves))

    def take(self, layer: Layer, weight: QuantizedWeight, multiplier: float) -> None:
        octaves = self.multiplier - multiplier
        self.expected += self.predicted.pop(id(layer)) + octaves * self.elements.pop(id(layer)) / 8
        self.spent += stream_bytes(weight)


def _check(batches: list[dict]) -> int:
    """Checksum of calibration data."""
    check = 0
    for batch in batches:
        for name in sorted(batch):
            if isinstance(batch[name], torch.Tensor):
                check = zlib.crc32(batch[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), check)
    return check


class _Resume:
    """Progress of a run in a folder: the steps, and the streams of each group; every write is atomic.

    Args:
        folder (`Path`, *optional*): nothing is kept if unset.
        run (`dict`): what identifies the run; files of another one are not used.
    """

    def __init__(self, folder: str | os.PathLike | None, run: dict):
        self.folder, self.run = None if folder is None else Path(folder), {"run": json.dumps(run, sort_keys=True)}

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.partial"
        save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata=self.run)
        os.replace(path, self.folder / f"{name}.safetensors")

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()} if file.metadata() == self.run else None  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}); delete the folder and start again.") from error


def _groups(layers: list[Layer], stacks: list) -> list[Group]:
    """Layers in the order of quantization: those outside blocks first, then block by block."""
    groups: list[Group] = []
    rest = list(layers)
    for number, stack in enumerate(stacks):
        for index, (name, _) in enumerate(stack):
            own = [layer for layer in rest if all(n.startswith(name + ".") for n in layer.names)]
            rest = [layer for layer in rest if not any(layer is other for other in own)]
            groups.append((number, index, own))
    return [(-1, 0, rest), *groups] if rest else groups


def _weighted_error(layer: Layer, weight: QuantizedWeight) -> float:
    """Relative error power of the outputs, from one row in four."""
    original = layer.weight[::4].float()
    error = original - weight.dequantize()[::4].to(original)
    moment = torch.eye(original.shape[1]) if layer.input_moment is None else layer.input_moment.to(original)
    power = ((original @ moment) * original).sum()
    return (((error @ moment) * error).sum() / power).item() if power > 0 else 0.0  # a layer of zeros has no error


class BlockQuantizer:
    """Quantizes all weights of a model in place, within a room of bytes.

    Args:
        model (`PreTrainedModel`): a float model in evaluation mode.
        layers (`list[Layer]`): its weights, of `collect_layers`.
        batches (`list[dict]`): calibration data.
        room (`float`): bytes for all streams.
        resume (path, *optional*): folder in which each finished block is kept, and from which an interrupted run goes
            on.
    """

    def __init__(self, model, layers: list[Layer], batches: list[dict], room: float, resume=None):
        self.model, self.layers, self.batches, self.room = model, layers, batches, room
        self.call = runner(model)
        probe = next(slices_of(batches, 64, 1), None)
        if probe is None:
            raise ValueError("The calibration data has 0 rows, but at least 1 is needed; pass None to use no data.")
        self.stacks = stacks_of(model, lambda: self.call(probe))
        self.groups = _groups(layers, self.stacks)
        self.last = max(number for number, (_, _, own) in enumerate(self.groups) if own)
        self.elements = sum(layer.weight.numel() for layer in layers)
        tokens = sum(next(iter(batch.values())).numel() for batch in batches)
        known = {"layers": {layer.names[0]: list(layer.weight.shape) for layer in layers}, "data": _check(batches)}
        self.resume = _Resume(resume, {**known, "room": room})
        self.steps = _Resume(resume, known)  # the same for every room
        self.replay = Replay(self.stacks, self.call, batches)
        self.done = self.noise = 0.0
        self._announce(probe, tokens)

    @torch.no_grad()
    def run(self) -> bool:
        """False, with nothing changed, if feedback needs more than the available bytes."""
        self._find_steps()
        self.spending = _Spending(self.layers, self.room)
        if sum(self.spending.predicted.values()) > 1.01 * self.room:
            return False
        divergence = predicted_divergence(self.layers, self.spending.multiplier)
        if divergence > _BEARABLE:
            about, nats = ("more than", _HOPELESS) if divergence > _HOPELESS else ("about", divergence)
            logger.warning(
                "This budget costs %s %.2f nats of divergence from the float model, whose perplexity grows by a factor"
                " of %s %.1f: ask for more bits, or train with qat.prepare_qat.",
                about,
                nats,
                about,
                math.exp(nats),
            )
        blocks = sum(stack >= 0 for stack, _, _ in self.groups)
        with tqdm(total=2 * blocks * len(self.batches), desc="quantize", unit="batch") as bar:
            for number, (stack, index, own) in enumerate(self.groups):
                if stack >= 0:
                    bar.set_description(f"quantize {self.stacks[stack][index][0]}")
                self._quantize_group(number, stack, index, own, bar)
        return True

    def _find_steps(self) -> None:
        """Steps of all layers, and feedback of those outside of blocks; kept for other rooms."""
        outside = [layer for stack, _, own in self.groups for layer in own if stack < 0]
        fields = [(layer, name) for layer in self.layers for name in _FIELDS]
        fields += [(layer, "input_moment") for layer in outside]
        held = self.steps.load("steps")
        if held is None:
            collect_moments(self.model, self.layers, self.call, self.batches, keep={id(layer) for layer in outside})
            values = {f"{layer.names[0]}.{name}": getattr(layer, name) for layer, name in fields}
            self.steps.save("steps", {name: value for name, value in values.items() if value is not None})
            return
        for layer, name in fields:
            setattr(layer, name, held.get(f"{layer.names[0]}.{name}"))
        for layer in outside:
            if layer.input_moment is not None:
                layer.input_factor = inverse_factor(layer.input_moment).float()

    def _quantize_group(self, number: int, stack: int, index: int, own: list[Layer], bar) -> None:
        multiplier, weights = self.spending.next() if own else 0.0, self._kept(number, own)
        if weights is None:
            if stack >= 0:
                self._follow_inputs(own, stack, index, bar)
            weights, multiplier = self._round(number, own, multiplier)
            self.resume.save(
                f"group-{number}", {layer.names[0]: encode_weight(weight) for layer, weight in zip(own, weights)}
            )
        elif stack >= 0:
            bar.update(len(self.batches))
        for layer, weight in zip(own, weights):
            self.done += weight.codes.numel()
            self.noise += _weighted_error(layer, weight) * weight.codes.numel()
            self.spending.take(layer, weight, multiplier)
            values, module = weight.dequantize(), layer.modules[0]
            module.weight.copy_(values.T if isinstance(module, Conv1D) else values)
        if stack >= 0 and number + 1 < len(self.groups):
            for _ in self.replay.run(stack, index, keep=True):
                bar.update()
        for layer, weight in zip(own, weights):
            install_layer(self.model, layer, weight)
            layer.forget()
            layer.weight = layer.weight[:0]  # let go of the original
        bits, error = 8 * self.spending.spent / max(1, self.done), self.noise / max(1, self.done)
        bar.set_postfix(bits=f"{bits:.2f}", error=f"{error:.2%}")

    def _kept(self, number: int, own: list[Layer]) -> list[QuantizedWeight] | None:
        """The weights of a group finished by an earlier run."""
        held = self.resume.load(f"group-{number}") if own else {}
        if held is None:
            return None
        streams = ([(layer.names[0], held[layer.names[0]], tuple(layer.weight.shape))] for layer in own)
        return [weight.quantized() for (weight,) in decode_weights(streams)]

    def _round(self, number: int, own: list[Layer], multiplier: float) -> tuple[list[QuantizedWeight], float]:
        if number < self.last:
            return [quantize_layer(layer, multiplier) for layer in own], multiplier
        weights, _, multiplier = fit(
            lambda m: [quantize_layer(layer, m) for layer in own],
            self.room - self.spending.spent,
            sum(layer.weight.numel() for layer in own),
            multiplier,
            TOLERANCE * self.room,
        )
        return weights, multiplier

    def _follow_inputs(self, layers: list[Layer], stack: int, index: int, bar) -> None:
        """Feedback and column scales of one block's layers, from the inputs that the quantized model gives it."""
        moments = InputMoments(layers)
        ends = moments.watch()
        try:
            for _ in self.replay.run(stack, index, keep=False):
                moments.next_batch()
                bar.update()
        finally:
            for end in reversed(ends):
                end()
        for number, layer in enumerate(layers):
            moment = moments.of(number)
            if moment is not None:
                layer.follow(moment, moments.rows(number))

    def _announce(self, probe: dict, tokens: int) -> None:
        """Forecast the time and memory of the run from a small slice of data."""
        start = time.perf_counter()
        with torch.no_grad():
            self.call(probe)
        seconds = (time.perf_counter() - start) / next(iter(probe.values())).numel()
        products = sum(2 * layer.weight.numel() * layer.weight.shape[1] for layer in self.layers)
        x = torch.randn(512, 512)
        start = time.perf_counter()
        x @ x
        rate = 2 * 512**3 / (time.perf_counter() - start)
        minutes = (seconds * (3 * min(tokens, TOKENS) + 2 * tokens) + 2 * products / rate) / 60
        shapes = [layer.weight.shape for layer in self.layers]
        logits = max((rows for rows, _ in shapes), default=0)  # of a head; about three copies in its loss
        slice_bytes = SLICE * (12 * logits + 4 * sum(rows + columns for rows, columns in shapes))
        moments = min(HELD, sum(4 * columns**2 for _, columns in shapes))
        largest = 20 * max((rows * columns for rows, columns in shapes), default=0)  # copies while it is rounded
        hidden = 4 * tokens * min((columns for _, columns in shapes), default=0)
        held = sum(p.nbytes for p in self.model.parameters()) + max(moments + slice_bytes, largest) + hidden + _PROCESS
        logger.info(
            "Quantizing %d weights with %d tokens: about %.1f minutes and %.1f GB of memory.",
            self.elements,
            tokens,
            minutes,
            held / 1e9,
        )
