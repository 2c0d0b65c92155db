# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Run a model block by block, for any family: finished blocks replay their last outputs.

Every stack of layers of a transformers model is an `nn.ModuleList` whose members are called once each, in order. To
run one of them on some batches, the model's own `forward` is called; the blocks before it return at once what the last
of them returned for this batch, and the run ends behind it. So masks, positions and whatever else a family passes to
its layers come from its own code, and what is in memory is one hidden state for each token and stack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

import torch
from torch import nn


class _Stop(Exception):
    """Raised when the block is done, to skip the rest of the model."""


def _detached(value):
    """The same nested tuples, lists and dicts of tensors, detached from the graph."""
    if isinstance(value, torch.Tensor):
        return value.detach()
    if isinstance(value, (tuple, list)):
        return type(value)(_detached(item) for item in value)
    return value


@contextmanager
def _forward(module: nn.Module, function: Callable) -> Iterator[None]:
    held = module.__dict__.get("forward")
    module.__dict__["forward"] = function
    try:
        yield
    finally:
        if held is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = held


def stacks_of(model: nn.Module, call: Callable[[], object]) -> list[list[tuple[str, nn.Module]]]:
    """Names and modules of the blocks of each stack, in the order of their calls.

    Args:
        model (`nn.Module`): the model.
        call (callable): runs the model once.

    Returns:
        `list[list[tuple[str, nn.Module]]]`: the outermost module lists whose members are called once each, in order.
        Empty where a model has none, as with layers that are used again and again.
    """
    stacks: list = []
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not (inside and name.startswith(inside)):
            stacks.append([(f"{name}.{i}", block) for i, block in enumerate(module)])
            inside = (*inside, name + ".")
    calls: list[str] = []
    hooks = [
        block.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        for stack in stacks
        for name, block in stack
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for stack in stacks:
        names = [name for name, _ in stack]
        first = calls.index(names[0]) if names[0] in calls else -1
        if [name for name in calls if name in names] == names == calls[first : first + len(names)]:
            found.append((first, stack))
    return [stack for _, stack in sorted(found, key=lambda item: item[0])]


class Replay:
    """The stacks of a model on some batches, run one block at a time.

    Args:
        stacks: of [`stacks_of`].
        run (callable): `run(batch)` calls the model on one batch.
        batches (`list`): what the model is run on.
    """

    def __init__(self, stacks: list[list[tuple[str, nn.Module]]], run: Callable[[dict], object], batches: list[dict]):
        self.stacks, self.call, self.batches = stacks, run, batches
        self.outputs: list[dict[int, object]] = [{} for _ in batches]

    def run(self, stack: int, index: int, keep: bool) -> Iterator[int]:
        """Run block `index` of stack `stack` on every batch; `keep` what it returns, for the blocks behind it.

        Yields:
            `int`: the number of each batch, when it is done.
        """
        block = self.stacks[stack][index][1]
        for number, batch in enumerate(self.batches):
            with self._replaced(number, stack, index, block, keep), suppress(_Stop):
                self.call(batch)
            yield number

    @contextmanager
    def _replaced(self, number: int, stack: int, index: int, block: nn.Module, keep: bool) -> Iterator[None]:
        outputs, plain = self.outputs[number], block.forward

        def last(*args, **kwargs):
            result = plain(*args, **kwargs)
            if keep:
                outputs[stack] = _detached(result)
            raise _Stop

        with ExitStack() as entered:
            for other, blocks in enumerate(self.stacks[: stack + 1]):
                for _, module in blocks if other < stack else blocks[:index]:
                    entered.enter_context(_forward(module, lambda *args, _other=other, **kwargs: outputs[_other]))
            entered.enter_context(_forward(block, last))
            yield
