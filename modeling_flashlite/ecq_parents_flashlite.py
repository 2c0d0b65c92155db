# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Find layers whose weights are read by parent modules, bypassing the layers' `forward`: these must stay tensors.

`self.dt_proj.weight @ states` in a block of Mamba, or the table of relative positions that DeBERTa normalises, needs
the weight itself; codes could not take its place. Only its dtype and device are known of codes as well.
"""

import ast
import functools
import inspect
from types import CodeType, FunctionType

from torch import nn
from transformers import PreTrainedModel

# methods that build, tie or resize a model, on float weights
_BUILDING = ("__init__", "_init_weights", "reset_parameters", "_initialize", "initialize", "extra_repr")
_BUILDING_PREFIXES = ("tie_", "_tie", "resize_", "_resize", "set_", "prune_", "_prune", "_load", "load_", "from_")
_KNOWN_OF_CODES = {"dtype", "device"}


def read_by_parents(model: nn.Module) -> set[str]:
    """Names of the modules below `model` whose weight a module above them reads as a tensor.

    Decided from the source of the classes: `weight` is read off a child's name in any method that takes part in a
    forward pass. A name counts for every module of that name below the reading one. Of a class without source, as one
    typed into an interpreter, nothing is known; its forward pass then fails with the error of `CodedWeight`.
    """
    found: set[str] = set()
    for place, parent in model.named_modules():
        names = _weights_read_in(type(parent))  # type: ignore[arg-type]
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
            if name in _BUILDING or name.startswith(_BUILDING_PREFIXES) or not isinstance(method, FunctionType):
                continue
            if _mentions_weight(method.__code__):  # few do, and parsing takes long
                names |= _weights_read(method)
    return frozenset(names)


def _mentions_weight(code: CodeType) -> bool:
    return "weight" in code.co_names or any(isinstance(x, CodeType) and _mentions_weight(x) for x in code.co_consts)


def _weights_read(function: FunctionType) -> set[str]:
    """The names `x` of all `y.x.weight` that the function reads for more than what codes know, too."""
    try:
        source = inspect.getsource(function)
        tree = ast.parse(f"if True:\n{source}" if source[0].isspace() else source)
    except (OSError, SyntaxError):  # no source; or a lambda amid an expression
        return set()
    known = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in _KNOWN_OF_CODES:
            known.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            known.add(node.args[0])
    return {
        node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load)
        if isinstance(node.value, ast.Attribute) and node not in known
    }
