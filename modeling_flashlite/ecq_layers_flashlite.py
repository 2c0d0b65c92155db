"""The layers of a model that are quantized: which they are, what the rest of the file takes, how codes enter them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .compat_flashlite import named_module
from .ecq_config_flashlite import METHOD, EcqConfig
from .ecq_modules_flashlite import EcqModule, to_quantized
from .ecq_parents_flashlite import read_by_parents
from .ecq_search_flashlite import Layer, data_free_steps
from .ecq_twins_flashlite import FakeQuantModule
from .ecq_weight_flashlite import QuantizedWeight, TiledWeight
from .linear_flashlite import Linear

logger = logging.getLogger(__name__)
_TRAINING_STATE = ("log_step", "log_base", "exponents", "column_exponents", "code_lengths", "ecq_rate")

_PLAIN_FORWARDS = (nn.Linear.forward, Linear.forward, nn.Embedding.forward, Conv1D.forward)
_OUR_LINEAR = ".linear_flashlite.Linear"
# embeddings of transformers whose forward only extends that of `nn.Embedding`; any other class with its own forward
# may need the weight itself, so it stays float
_EXTENDED_EMBEDDINGS = ("ScaledWordEmbedding", "NormedEmbedding", "LearnedPositionalEmbedding")


def is_quantizable(module: nn.Module) -> bool:
    if isinstance(module, (EcqModule, FakeQuantModule)):
        return True
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) or not isinstance(
        module, (nn.Linear, nn.Embedding, Conv1D)
    ):
        return False
    if isinstance(module, nn.Embedding) and (module.max_norm is not None or module.num_embeddings <= 64):
        return False
    return not has_own_forward(module) and is_large(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether a layer's class may compute something else than the base does from the weight."""
    kind = type(module)
    # the package and copies from the Hub each have a `Linear`
    is_plain = kind.forward in _PLAIN_FORWARDS or f"{kind.__module__}.{kind.__name__}".endswith(_OUR_LINEAR)
    return not is_plain and not kind.__name__.endswith(_EXTENDED_EMBEDDINGS)


def is_large(module: nn.Module) -> bool:
    shape = module.weight.shape
    return len(shape) == 2 and min(shape) >= 8 and shape.numel() >= 1024


def left_out(model: nn.Module) -> set[str]:
    """Names of tensors that the model computes and does not save, such as Marian's table of positions."""
    return set(getattr(model, "_keys_to_ignore_on_save", None) or ())


def quantizable_layers(model: nn.Module, config: EcqConfig) -> dict[str, nn.Module]:
    """Name and module of every linear layer and embedding to be quantized, LM head and tied weights included.

    A weight that one of its modules, or a parent module, reads directly stays float in all of them.

    Raises:
        ValueError: the model keeps weights in stacked (3-D) parameters, as mixtures of experts do.
    """
    skip = config.modules_to_not_convert
    parameters = ((name, value) for name, value in model.named_parameters() if value.is_floating_point())
    stacked = [
        name for name, value in parameters if value.dim() == 3 and len(value) > 1 and "conv" not in name.lower()
    ]
    stacked = [name for name in stacked if not named_module(name.rpartition(".")[0], skip)]
    if stacked:
        raise ValueError(
            f"{type(model).__name__} keeps weights in stacked parameters ({stacked[0]}, {len(stacked)} in all),"
            " as mixtures of experts do; only nn.Linear, Conv1D and nn.Embedding can be quantized. Name their modules"
            " in modules_to_not_convert to leave them in bfloat16."
        )
    modules = dict(model.named_modules())
    layers = {n: m for n, m in modules.items() if is_quantizable(m) and not named_module(n, skip)}
    needed = read_by_parents(model)
    layers = {n: m for n, m in layers.items() if f"{n}.weight" not in left_out(model) and n not in needed}
    floats = {id(value) for n, m in modules.items() if n not in layers for value in m._parameters.values()}
    return {n: m for n, m in layers.items() if id(m.weight) not in floats}


def weight_of(module: nn.Module) -> torch.Tensor:
    """Float weight `[rows, columns]` of a layer before quantization."""
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def collect_layers(model: nn.Module, config: EcqConfig) -> list[Layer]:
    """The distinct weights to be quantized, with data-free steps: proportional to each row's standard deviation.

    Raises:
        ValueError: the model is quantized already, has nothing to quantize, or a weight is not finite.
    """
    method = getattr(model, "quantization_method", None)
    coded = any(isinstance(module, (EcqModule, FakeQuantModule)) for module in model.modules())
    if coded or method not in (None, METHOD):
        raise ValueError(
            f"{type(model).__name__} is quantized already ({method or METHOD}); call dequantize() first, or load the"
            " float original."
        )
    _check_finite(model)
    _warn_of_own_forwards(model, config)
    groups: dict[int, Layer] = {}
    for name, module in quantizable_layers(model, config).items():
        if id(module.weight) in groups:
            groups[id(module.weight)].names.append(name)
            groups[id(module.weight)].modules.append(module)
            continue
        weight = weight_of(module)
        layer = Layer([name], [module], weight, torch.zeros(len(weight), device=weight.device))
        if not torch.isfinite(layer.sigma).all():
            raise ValueError(f"{name}.weight is too large: its squares are infinite; check the checkpoint.")
        layer.log_steps = data_free_steps(layer)
        groups[id(module.weight)] = layer
    if not groups:
        raise ValueError(f"{type(model).__name__} has no linear layer or embedding of at least 8 x 128 to quantize.")
    return list(groups.values())


def _check_finite(model: nn.Module) -> None:
    """Refuse weights that the file cannot hold, before anything is changed."""
    most = torch.finfo(torch.bfloat16).max
    for name, value in model.named_parameters():
        if value.is_floating_point() and value.numel():
            peak = torch.linalg.vector_norm(value.detach(), float("inf")).item()
            if not peak <= most:
                raise ValueError(
                    f"{name} holds {peak}, but weights are finite numbers up to {most:.3g}; mend the checkpoint."
                )


def _warn_of_own_forwards(model: nn.Module, config: EcqConfig) -> None:
    """Name the linear layers that stay float because their class has its own `forward`, as Falcon's has."""
    odd = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and has_own_forward(module) and is_large(module)
        if not named_module(name, config.modules_to_not_convert)
    ]
    if odd:
        logger.warning(
            "%d layers (%s, ...) stay bfloat16 and take %.1f MB of the file: %s has its own forward, so codes cannot "
            "take the place of its weight.",
            len(odd),
            odd[0][0],
            sum(2 * module.weight.numel() for _, module in odd) / 1e6,
            type(odd[0][1]).__name__,
        )


def ids_of(layers: list[Layer]) -> set[int]:
    """Ids of the parameters of all layers."""
    return {id(module.weight) for layer in layers for module in layer.modules}


def overhead_bytes(model: nn.Module, coded: set[int]) -> int:
    """Bytes of the file besides the weight streams: other tensors in bfloat16 and the safetensors header.

    Args:
        coded (`set[int]`): ids of the parameters that become streams.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    size, end, seen = 0, 0, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen or name.rpartition(".")[2] in _TRAINING_STATE or name in left_out(model):
            continue
        seen.add(id(tensor))
        if id(tensor) in coded:
            held = tensor.numel() // 2  # only the number of digits of the offsets matters
            kind, shape = "U8", [held]
        else:
            kind, shape = ("BF16", tensor.shape) if tensor.is_floating_point() else ("I64", tensor.shape)
            held = tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())
            size += held
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [end, end + held]}
        end += held
    return size + 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8


def install(model: nn.Module, layers: list[Layer], weights: list[QuantizedWeight]) -> None:
    """Put the codes of float layers into the model, in place, and round what stays float."""
    for layer, weight in zip(layers, weights):
        install_layer(model, layer, weight)
    round_rest(model, coded_places(model).values())


@torch.no_grad()
def install_layer(model: nn.Module, layer: Layer, weight: QuantizedWeight) -> None:
    """Put the codes of one float layer, and of layers tied to it, into the model."""
    modules = [to_quantized(module) for module in layer.modules]
    for name, old, new in zip(layer.names, layer.modules, modules):
        if new is not old:
            model.set_submodule(name, new)
    enter_codes(modules[0], modules, weight)


def enter_codes(owner: EcqModule, modules: Iterable[EcqModule], weight: QuantizedWeight | TiledWeight) -> None:
    """Give the codes of a weight, in memory or tiled, to its owner, and share them with the modules tied to it."""
    owner.set_quantized(weight)
    for module in modules:
        if module is not owner:
            module.share_quantized(owner)


@torch.no_grad()
def round_rest(model: nn.Module, modules: Iterable[nn.Module]) -> None:
    """Round the tensors that stay float to bfloat16, as in the file; those of `modules` are or become codes."""
    # a module may stand in two places, as the resized table of an encoder-decoder does
    held = {id(module) for module in modules}
    coded = {name for name, module in model.named_modules(remove_duplicate=False) if id(module) in held}
    unsaved = left_out(model)
    for name, value in model.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        if value.is_floating_point() and name not in unsaved and (leaf == "bias" or parent not in coded):
            value.copy_(value.to(torch.bfloat16))


@torch.no_grad()
def install_groups(model: nn.Module, groups: list[tuple[list[str], list]], weights: list[QuantizedWeight]) -> None:
    """Set the codes of quantized modules, and round the tensors that stay float."""
    for (_, modules), weight in zip(groups, weights):
        enter_codes(modules[0], modules, weight)
    round_rest(model, coded_places(model).values())


def groups_of(model: nn.Module, kind: type[Any] = EcqModule) -> list[tuple[list[str], list]]:
    """Names and modules of the quantized layers (or twins); those of one tied weight together."""
    groups: dict[int, tuple[list[str], list]] = {}
    for name, module in model.named_modules():
        if isinstance(module, kind):
            names, modules = groups.setdefault(id(module.weight), ([], []))
            names.append(name)
            modules.append(module)
    return list(groups.values())


def coded_places(model: nn.Module) -> dict[str, EcqModule]:
    """Coded modules by name; one that stands in two places has both names."""
    places = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in places if isinstance(module, EcqModule)}
