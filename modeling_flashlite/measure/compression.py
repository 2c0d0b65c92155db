"""What quantization costs: loss, divergence from the float model and agreement with it, by size and by kind of layer.

All models are measured by the same code on the same tokens: the quantized one at several budgets, rounding to 4 bits
in groups, and GGUF files of the same model, which transformers dequantizes.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..ecq_config_flashlite import EcqConfig
from ..ecq_layers_flashlite import collect_layers, groups_of, ids_of, overhead_bytes
from ..ecq_search_flashlite import Layer
from ..ecq_stream_flashlite import stream_bytes
from ..training.calibration import quantize, with_labels
from ..training.moments import slices_of
from .plots import COLOURS, can_draw, save_axes
from .results import command_line, read_results, write_results

logger = logging.getLogger(__name__)
GROUPS = 128, 32  # weights that share a scale, of rounding to 4 bits
_SLICE = 512  # tokens whose logits are in memory


@contextmanager
def replaced(layers: Sequence[Layer], weights: Sequence[torch.Tensor]) -> Iterator[None]:
    """Other weights `[rows, columns]` in the float layers of a model, while the context lasts."""
    held = [layer.modules[0].weight.detach().clone() for layer in layers]
    try:
        for layer, weight in zip(layers, weights):
            _put(layer, weight)
        yield
    finally:
        for layer, weight in zip(layers, held):
            layer.modules[0].weight.data.copy_(weight)


def _put(layer: Layer, weight: torch.Tensor) -> None:
    module = layer.modules[0]
    module.weight.data.copy_(weight.T if isinstance(module, Conv1D) else weight)


def nearest_int4(weight: torch.Tensor, group: int = 128) -> tuple[torch.Tensor, float]:
    """Round to nearest with 4 bits and a bfloat16 scale, the largest magnitude, for each group; (weight, bits)."""
    rows, columns = weight.shape
    group = min(group, columns)
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % group)).view(rows, -1, group)
    scale = (padded.abs().amax(-1, keepdim=True) / 7.5).to(torch.bfloat16).float().clamp(min=1e-12)
    rounded = (torch.round(padded / scale).clamp(-8, 7) * scale).view(rows, -1)[:, :columns]
    return rounded.to(weight.dtype), 4.0 * rows * columns + 16.0 * scale.numel()


def _targets(model, batch: dict, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits `[targets, classes]`, labels `[targets]`) of the places where the model predicts something."""
    labels = batch["labels"]
    if model.can_generate() and not model.config.is_encoder_decoder:
        logits, labels = logits[:, :-1], labels[:, 1:]
    seen = labels != -100
    return logits[seen].float(), labels[seen]


@torch.no_grad()
def measure(reference, model, batches: list[dict]) -> dict[str, float]:
    """Loss, Kullback-Leibler divergence from `reference`, both in nats a target, and share of equal first choices.

    Args:
        reference (`PreTrainedModel`): the float model.
        model (`PreTrainedModel`): another with the same classes; may be the same.
        batches (`list[dict]`): to measure on; labels are the next tokens where there are none.

    Raises:
        ValueError: the batches have no targets, or the models have other classes.
    """
    totals, count = torch.zeros(3, dtype=torch.float64), 0
    reference.eval(), model.eval()
    options = {"use_cache": False} if model.can_generate() else {}
    for part in slices_of(batches, _SLICE, 1 << 62):
        part = with_labels(part, reference)
        plain, labels = _targets(reference, part, reference(**part, **options).logits)
        other = plain if model is reference else _targets(model, part, model(**part, **options).logits)[0]
        if other.shape != plain.shape:
            raise ValueError(f"{model.name_or_path} predicts {other.shape[-1]} classes, not {plain.shape[-1]}.")
        wanted, logs = plain.log_softmax(-1), other.log_softmax(-1)
        totals[0] -= logs.gather(1, labels[:, None]).double().sum()
        totals[1] += (wanted.exp() * (wanted - logs)).sum(dtype=torch.float64)
        totals[2] += (wanted.argmax(-1) == logs.argmax(-1)).sum()
        count += len(labels)
    if not count:
        raise ValueError("The batches hold 0 targets, but a loss needs at least 1; check their labels.")
    loss, divergence, agreement = (totals / count).tolist()
    return {"loss": loss, "kl": max(divergence, 0.0), "top1": agreement}


def _kind(layer: Layer) -> str:
    """What layers of the same place in all blocks have in common: the last names, without numbers."""
    names = [name for name in layer.names[0].split(".") if not re.fullmatch(r"\d+", name)]
    return ".".join(names[-2:])


def kinds_of_layers(model, coded, batches: list[dict]) -> list[dict]:
    """One row for each kind of layer of a coded model: bits a weight, share of the streams, relative error of the
    weights, and what the model loses when only this kind is coded.

    Args:
        model (`PreTrainedModel`): the float model.
        coded (`PreTrainedModel`): quantized from it.
        batches (`list[dict]`): to measure on.
    """
    peer = copy.deepcopy(model)
    weights = {names[0]: modules[0].quantized() for names, modules in groups_of(coded)}
    kinds: dict[str, list[Layer]] = {}
    for layer in collect_layers(peer, coded.hf_quantizer.quantization_config):
        if layer.names[0] in weights:
            kinds.setdefault(_kind(layer), []).append(layer)
    rows, total = [], sum(map(stream_bytes, weights.values()))
    for kind, own in tqdm(kinds.items(), desc="kinds of layers", unit="kind"):
        size = elements = error = power = 0.0
        for layer in own:
            stream = weights[layer.names[0]]
            size, elements = size + stream_bytes(stream), elements + layer.weight.numel()
            error += (stream.dequantize() - layer.weight.float()).square().sum().item()
            power += layer.weight.float().square().sum().item()
        with replaced(own, [weights[layer.names[0]].dequantize() for layer in own]):
            measured = measure(model, peer, batches)
        row = {"kind": kind, "layers": len(own), "bits": 8 * size / elements, "share": size / total}
        rows.append({**row, "error": math.sqrt(error / max(power, 1e-30)), **measured})
    return rows


def _point(method: str, size: float, parameters: int, measured: dict, base: float) -> dict:
    increase = math.exp(measured["loss"] - base) - 1
    return {"method": method, "bits": 8 * size / parameters, "bytes": round(size), **measured, "increase": increase}


def _rounded_points(model, batches: list[dict], base: float) -> Iterator[dict]:
    """The peer that everybody has: 4 bits in groups, everything else in bfloat16."""
    peer, parameters = copy.deepcopy(model), sum(p.numel() for p in model.parameters())
    layers = collect_layers(peer, EcqConfig())
    rest = overhead_bytes(peer, ids_of(layers))
    for group in GROUPS:
        rounded = [nearest_int4(layer.weight, group) for layer in layers]
        size = rest + sum(bits for _, bits in rounded) / 8
        with replaced(layers, [weight for weight, _ in rounded]):
            yield _point(f"int4 g{group}", size, parameters, measure(model, peer, batches), base)


def load_gguf(path: str | Path):
    """The language model of a GGUF file, dequantized to float32 by transformers."""
    file = Path(path)
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def _gguf_point(model, path: str, batches: list[dict], base: float) -> dict:
    """A GGUF file of the same model."""
    file, peer = Path(path), load_gguf(path)
    parameters = sum(p.numel() for p in model.parameters())
    return _point(file.stem, file.stat().st_size, parameters, measure(model, peer, batches), base)


def rate_curve(
    model,
    rates: Sequence[float],
    calibration: list[dict] | None,
    evaluation: list[dict],
    ggufs: Sequence[str] = (),
    data_free: bool = True,
    resume: str | None = None,
) -> tuple[list[dict], list[dict]]:
    """What a model loses at several sizes, beside what others make of it.

    Args:
        model (`PreTrainedModel`): a float model with logits; it stays as it is.
        rates (sequence of `float`): bits of the whole file over the parameters; one out of reach is left out.
        calibration (`list[dict]`, *optional*): batches to calibrate on.
        evaluation (`list[dict]`): batches to measure on.
        ggufs (sequence of paths): GGUF files of the same model.
        data_free (`bool`): quantize without data too.
        resume (path, *optional*): as for `quantize`.

    Returns:
        points, one for each method and size, with `bits`, `bytes`, `loss`, `increase` (of perplexity), `kl` and
        `top1`; and the table of [`kinds_of_layers`] at the smallest rate.
    """
    parameters, measured = sum(p.numel() for p in model.parameters()), measure(model, model, evaluation)
    base, rest = measured["loss"], overhead_bytes(model, ids_of(collect_layers(model, EcqConfig())))
    points = [_point("float", 4 * parameters, parameters, measured, base)]
    points += _rounded_points(model, evaluation, base)
    points += [_gguf_point(model, path, evaluation, base) for path in ggufs]
    kinds: list[dict] = []
    methods = [("ours, data-free", None)] * data_free + [("ours, calibrated", calibration)] * bool(calibration)
    for method, data in methods:
        for rate in sorted(rates, reverse=True):
            try:
                coded = quantize(copy.deepcopy(model), EcqConfig(target_bits=rate), data, resume=resume)
            except ValueError as error:
                logger.warning("%.2f bits per weight: %s", rate, error)
                continue
            size = rest + sum(stream_bytes(modules[0].quantized()) for _, modules in groups_of(coded))
            point = _point(method, size, parameters, measure(model, coded, evaluation), base)
            points.append({**point, "target": rate})
            if method == methods[-1][0] and rate == min(rates):
                kinds = kinds_of_layers(model, coded, evaluation)
    return points, kinds


def draw_report(points: list[dict], kinds: list[dict], path: str | Path) -> Path | None:
    """Perplexity over the size of the file, and divergence by kind of layer, as an SVG; `None` without matplotlib."""
    if not can_draw():
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    axes, bars = figure.subplots(1, 2)
    axes.set(xlabel="bits per parameter, whole file", ylabel="increase of perplexity, %", yscale="symlog")
    methods = list(dict.fromkeys(point["method"] for point in points if point["method"] != "float"))
    for index, method in enumerate(methods):
        own = sorted((point["bits"], 100 * point["increase"]) for point in points if point["method"] == method)
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(*zip(*own), color=colour, marker="o", markersize=4)
        axes.annotate(f" {method}", own[-1], color=colour, va="center")
    bars.barh([row["kind"] for row in kinds], [row["kl"] for row in kinds], color=COLOURS[0])
    bars.set(xlabel="divergence when only this kind is coded, nats")
    bars.invert_yaxis()
    bars.spines[["top", "right"]].set_visible(False)
    return save_axes(axes, path, margin=0.2)


def add_points(path: str | None, points: list[dict], **about) -> None:
    """Write a results file anew with `points` in the places of older ones of their method and size; no path, no file.

    Args:
        path (`str`, *optional*): the file.
        points (`list[dict]`): with `method`, `bits` and `increase`.
        **about: model, dataset and seed.
    """
    if not path:
        return

    def key(point: dict) -> tuple:
        return point["method"], round(point["bits"], 1)

    fresh = {key(point) for point in points}
    points = [{**point, "command": command_line()} for point in points]
    if Path(path).exists():
        points = [point for point in read_results([Path(path)])[0]["points"] if key(point) not in fresh] + points
    write_results(path, _increases(points), task="quantization", points=points, **about)


def write_report(path: str, points: list[dict], kinds: list[dict], **about) -> None:
    """Write the tables of [`rate_curve`] as a results file, and their figure beside it."""
    write_results(path, _increases(points), task="compression report", points=points, kinds=kinds, **about)
    draw_report(points, kinds, Path(path).with_suffix(".svg"))


def _increases(points: list[dict]) -> dict[str, float]:
    return {f"increase_{point['method']}_{point['bits']:.2f}": point["increase"] for point in points}
