# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Cost of rounding each weight: second moments of the inputs, and of the gradients of the outputs.

The gradients are those of the cross-entropy of labels drawn from the model's own predictions, so that their second
moment is the Fisher information, the curvature of the Kullback-Leibler divergence from the float model. A few thousand
tokens are enough, since only one number per row is taken from the gradients, and only partly trusted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from ..ecq_search_flashlite import Layer
from ..linear_flashlite import Linear

TOKENS = 4096  # that gradients are taken on
SLICE = 512  # tokens at a time
HELD = 1 << 30  # bytes of input moments held at a time; beyond that, the float model runs several times
_ROW_SHARE, _TABLE_SHARE, _LAYER_SHARE = 0.5, 0.5, 0.5  # exponents of the curvature in steps


def watch(module: nn.Module, record: Callable) -> Callable[[], object]:
    """Call `record(input, output)` for every product or lookup of a layer; returns a function that stops it."""
    plain = type(module)
    if plain.forward in (nn.Linear.forward, Linear.forward, nn.Embedding.forward, Conv1D.forward):

        def hook(module, args, kwargs, output):
            record(*args, *kwargs.values(), output)

        return module.register_forward_hook(hook, with_kwargs=True).remove

    # A subclass may take other arguments (a mask) and return other values (scaled embeddings) than the lookup's.
    class Watched(nn.Linear if isinstance(module, nn.Linear) else nn.Embedding):  # type: ignore[misc]
        def forward(self, input):
            output = super().forward(input)
            record(input, output)
            return output

    module.__class__ = type(plain.__name__, (plain, Watched), {})
    return lambda: setattr(module, "__class__", plain)


def second_moment(x: torch.Tensor) -> torch.Tensor:
    """`x^T x` over all but the last axis, float32 `[n, n]`."""
    x = x.detach().reshape(-1, x.shape[-1]).float()
    if x.device.type == "cpu":
        array = x.numpy()
        return torch.from_numpy(array.T @ array)  # NumPy computes one half and mirrors it
    with torch.autocast(x.device.type, enabled=False):
        return x.T @ x


def begin_gradients(output: object) -> None:
    """Let gradients flow from here on, though no weight asks for one: a table's own would be as large as the table."""
    if isinstance(output, torch.Tensor) and output.is_floating_point() and torch.is_grad_enabled():
        output.requires_grad_()


class InputMoments:
    """Second moments of the inputs of several layers; those that read the same tensor share one."""

    def __init__(self, layers: list[Layer]):
        self.layers = layers
        self.sums: dict[int, torch.Tensor] = {}
        self.owner: dict[int, int] = {}
        self.live: list[tuple[torch.Tensor, int]] = []

    def watch(self) -> list[Callable[[], object]]:
        """Start recording; returns a function that stops it."""
        return [
            watch(module, lambda x, output, index=index: self.record(index, x))
            for index, layer in enumerate(self.layers)
            for module in layer.modules
            if not isinstance(module, nn.Embedding)
        ]

    def record(self, index: int, x: torch.Tensor) -> None:
        owner = next((owner for tensor, owner in self.live if tensor is x), index)
        if self.owner.setdefault(index, owner) != index and self.owner[index] == owner:
            return
        self.owner[index] = index
        self.live.append((x, index))
        moment = second_moment(x)
        self.sums[index] = self.sums[index].add_(moment) if index in self.sums else moment

    def next_batch(self) -> None:
        """Forget the tensors seen so far; call it between two batches."""
        self.live.clear()

    def rows(self, index: int) -> int:
        """Rows of the largest weight that reads the input of layer `index`."""
        owner = self.owner.get(index, index)
        return max(len(layer.weight) for i, layer in enumerate(self.layers) if self.owner.get(i, i) == owner)

    def of(self, index: int) -> torch.Tensor | None:
        """Second moment of the inputs of layer `index`; `None` where nothing of use was seen."""
        moment = self.sums.get(self.owner.get(index, index))
        return moment if moment is not None and torch.isfinite(moment).all() and moment.trace() > 0 else None


class _Curvature:
    """Second moments of the gradients of one weight's outputs, by row, and of what a table gives to the model."""

    def __init__(self, layer: Layer, is_head: bool):
        self.layer, self.is_head = layer, is_head
        self.rows = self.lookups = self.counts = None
        self.known = False

    def linear(self, x: torch.Tensor, output: torch.Tensor) -> None:
        if output.requires_grad and not self.is_head:
            output.register_hook(lambda g: self._add("rows", g.float().reshape(-1, g.shape[-1]).square().sum(0)))

    def lookup(self, ids: torch.Tensor, output: torch.Tensor) -> None:
        begin_gradients(output)
        self._add("counts", torch.bincount(ids.reshape(-1), minlength=len(self.layer.weight)).float())
        if output.requires_grad:
            output.register_hook(lambda g: self._add("lookups", second_moment(g)))

    def _add(self, name: str, value: torch.Tensor) -> None:
        held = getattr(self, name)
        setattr(self, name, value if held is None else held + value)

    def finish(self, inputs: torch.Tensor | None, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(moment of the inputs, curvature of the rows), both a token; `None` where nothing was seen."""
        rows = None if self.rows is None else self.rows / tokens
        inputs = None if inputs is None else inputs / tokens
        if self.lookups is None or self.lookups.trace() <= 0:
            return inputs, rows
        # A lookup is a product with one-hot inputs: rows and columns exchange roles.
        counts = (self.counts + 0.05 * self.counts.mean()) / tokens
        lookups = self.lookups / tokens
        if inputs is None or rows is None:
            return lookups, counts
        product, lookup = (inputs.trace() * rows.sum()).item(), (lookups.trace() * counts.sum()).item()
        share = lookup / (product + lookup)
        mixed = (1 - share) * inputs / inputs.trace() + share * lookups / lookups.trace()
        weights = (1 - share) * rows / rows.sum() + share * counts / counts.sum()
        return mixed * (product + lookup), weights


def slices_of(batches: Iterable[dict], tokens: int, most: int) -> Iterator[dict]:
    """Parts of batches of about `tokens` tokens each, `most` in all."""
    for batch in batches:
        first = next(iter(batch.values()))
        ids = batch.get("input_ids", first)
        length = max(1, ids.shape[1] if ids.dim() == 2 else 1)
        rows = max(1, tokens // length)
        for start in range(0, len(first), rows):
            part = {key: value[start : start + rows] if value.dim() else value for key, value in batch.items()}
            yield part
            most -= length * len(part[next(iter(part))])
            if most <= 0:
                return


def _backward(outputs, head: _Curvature | None, batch: dict, generator: torch.Generator) -> None:
    """Gradients of the cross-entropy of labels drawn from the predictions, or of the loss where there are none."""
    logits = getattr(outputs, "logits", None)
    if logits is not None and logits.requires_grad:
        # the gradient of the cross-entropy is chances - drawn; logits are large, so there is one copy of them
        chances = logits.detach().flatten(0, -2).float().softmax(-1)
        drawn = torch.multinomial(chances, 1, generator=generator)
        labels = batch.get("labels")
        if labels is not None and labels.shape == logits.shape[:-1]:
            chances *= (labels.flatten() != -100)[:, None]
        if head is not None and chances.shape[-1] == len(head.layer.weight):
            head._add("rows", chances.sum(0) - torch.linalg.vector_norm(chances, dim=0).square())
        seen = chances.gather(1, drawn) > 0
        chances.scatter_add_(1, drawn, -seen.to(chances))
        logits.backward(chances.view(logits.shape).to(logits.dtype))
    elif getattr(outputs, "loss", None) is not None:
        outputs.loss.backward()


def collect_moments(
    model, layers: list[Layer], run: Callable[[dict], object], batches: list[dict], keep: set[int] | None = None
) -> None:
    """Fill in steps, column scales and feedback of `layers` from the float model on some of `batches`.

    Args:
        model (`PreTrainedModel`): the float model.
        layers (`list[Layer]`): its weights.
        run (callable): `run(batch)` gives the model's outputs.
        batches (`list[dict]`): of tensors.
        keep (set of `int`, *optional*): ids of the layers that keep the matrices for feedback; all if unset.
    """
    parts = list(slices_of(batches, SLICE, TOKENS))
    head_module = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    curvatures = [_Curvature(layer, any(m is head_module for m in layer.modules)) for layer in layers]
    groups = _groups(curvatures)
    with tqdm(total=len(parts) * len(groups), desc="sensitivity", unit="slice") as bar:
        tokens, moments = _forward_backward(model, run, parts, curvatures, groups[0], bar)
        for number, group in enumerate(groups):
            if number:
                moments = _forward_only(run, parts, group, bar)
            for index, curvature in enumerate(group):
                layer = curvature.layer
                found = curvature.finish(moments.of(index), tokens)
                curvature.known = _set_steps(layer, *found, moments.rows(index))
                if keep is not None and id(layer) not in keep:
                    layer.forget()
    _centre([curvature.layer for curvature in curvatures if curvature.known])


def _groups(curvatures: list[_Curvature]) -> list[list[_Curvature]]:
    """Layers whose input moments are in memory at the same time."""
    groups: list[list[_Curvature]] = [[]]
    held = 0
    for curvature in curvatures:
        size = 4 * curvature.layer.weight.shape[1] ** 2
        if groups[-1] and held + size > HELD:
            groups.append([])
            held = 0
        groups[-1].append(curvature)
        held += size
    return groups


def _forward_only(run, parts: list[dict], group: list[_Curvature], bar) -> InputMoments:
    moments = InputMoments([curvature.layer for curvature in group])
    ends = moments.watch()
    try:
        for part in parts:
            with torch.no_grad():
                run(part)
            moments.next_batch()
            bar.update()
    finally:
        for end in reversed(ends):
            end()
    return moments


def _forward_backward(model, run, parts, curvatures, group, bar) -> tuple[int, InputMoments]:
    """The number of tokens, and the input moments of the first group; curvatures are filled in."""
    moments, tokens = InputMoments([curvature.layer for curvature in group]), 0
    head = next((curvature for curvature in curvatures if curvature.is_head), None)
    generator = torch.Generator(device=model.device).manual_seed(0)
    ends = moments.watch()
    ends += [
        watch(module, curvature.lookup if isinstance(module, nn.Embedding) else curvature.linear)
        for curvature in curvatures
        for module in curvature.layer.modules
    ]
    begin = model.get_input_embeddings().register_forward_hook(lambda module, args, output: begin_gradients(output))
    ends.append(begin.remove)
    wanted = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in wanted:
            p.requires_grad_(False)  # gradients of outputs only: those of weights would take their room
        for part in parts:
            with torch.enable_grad():
                _backward(run(part), head, part, generator)
            moments.next_batch()
            tokens += next(iter(part.values())).numel()
            bar.update()
    finally:
        for end in reversed(ends):
            end()
        for p, gradient in wanted:
            p.requires_grad_(gradient)
    return tokens, moments


def _set_steps(layer: Layer, moment: torch.Tensor | None, rows: torch.Tensor | None, readers: int) -> bool:
    """Steps and column scales that equalize the marginal benefit of a bit, as far as the moments are trusted."""
    if moment is None:
        return False
    spread = layer.follow(moment, readers)
    if rows is None or not torch.isfinite(rows).all() or rows.sum() <= 0:
        return False
    layer.price = layer.price_of(rows)
    rows = -0.5 * torch.log2(rows.to(layer.sigma) + 1e-3 * rows.mean().to(layer.sigma))
    sigma, share = torch.log2(layer.sigma), _TABLE_SHARE if layer.is_table else _ROW_SHARE
    within = share * (rows - rows.mean()) + (1 - share) * (sigma - sigma.mean())
    layer.log_steps = within + _LAYER_SHARE * (rows.mean() + spread) + (1 - _LAYER_SHARE) * sigma.mean()
    return True


def _centre(layers: list[Layer]) -> None:
    """Common offset so that a multiplier of -1 means half a standard deviation on average."""
    elements = max(1, sum(layer.weight.numel() for layer in layers))
    offset = sum(
        ((layer.log_steps - torch.log2(layer.sigma)).mean() * layer.weight.numel()).item() for layer in layers
    )
    for layer in layers:
        layer.log_steps = layer.log_steps - offset / elements
