# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Which layers' weights are read by the modules around them, past the layers' own `forward`: these must stay tensors.

`self.dt_proj.weight @ states` in a block of Mamba, or the table of relative positions that DeBERTa normalises, needs
the weight itself; codes could not take its place. Only its dtype and device are known of codes as well.
"""

import dis
import functools
import inspect
from collections.abc import Iterator
from types import CodeType

from torch import nn
from transformers import PreTrainedModel

# methods that build, tie or resize a model, on float weights
_BUILDING = ("__init__", "_init_weights", "reset_parameters", "_initialize", "initialize", "extra_repr")
_BUILDING_PREFIXES = ("tie_", "_tie", "resize_", "_resize", "set_", "prune_", "_prune", "_load", "load_", "from_")
_KNOWN_OF_CODES = {"dtype", "device"}
_READS = ("LOAD_ATTR", "weight")


def read_by_parents(model: nn.Module) -> set[str]:
    """Names of the modules below `model` whose weight a module above them reads as a tensor.

    Decided from the compiled methods of the classes: an attribute `weight` that is read off a child's name, in any
    method that takes part in a forward pass. A name counts for every module of that name below the reading one.
    """
    found: set[str] = set()
    for place, parent in model.named_modules():
        names = _weights_read_in(type(parent))
        # Bloom cuts weights in pieces only to repeat a training over several devices to the last bit
        if names and getattr(parent, "slow_but_exact", None) is not False:
            below = ((f"{place}.{name}" if place else name, name) for name, _ in parent.named_modules() if name)
            found |= {whole for whole, name in below if name.rpartition(".")[2] in names}
    return found


@functools.cache
def _weights_read_in(kind: type) -> frozenset[str]:
    names: set[str] = set()
    for base in kind.__mro__:
        if base in (nn.Module, PreTrainedModel) or base.__module__.startswith(("torch.nn.modules.module", "builtins")):
            continue
        for name, method in vars(base).items():
            method = inspect.unwrap(getattr(method, "__func__", method)) if callable(method) else method
            code = getattr(method, "__code__", None)
            if code is not None and name not in _BUILDING and not name.startswith(_BUILDING_PREFIXES):
                for part in _with_nested(code):
                    names |= _weights_read(part)
    return frozenset(names)


def _with_nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _with_nested(constant)


def _weights_read(code: CodeType) -> set[str]:
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "EXTENDED_ARG", "NOP")]
    found = set()
    for place, step in enumerate(steps[:-1]):
        if (
            step.opname in ("LOAD_ATTR", "LOAD_METHOD")
            and (steps[place + 1].opname, steps[place + 1].argval) == _READS
        ):
            after = [following.argval for following in steps[place + 2 : place + 4]]
            # its dtype or device, or `isinstance(weight, torch.Tensor)`
            if not (after and after[0] in _KNOWN_OF_CODES) and after != ["torch", "Tensor"]:
                found.add(step.argval)
    return found
