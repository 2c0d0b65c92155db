# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Pruning a decoder: fewer layers, heads, feed-forward units and hidden dimensions, the important ones kept.

Importance is measured on calibration text, as in Minitron (arXiv 2407.14679, 2408.11796): feed-forward units and
key-value groups by the magnitude of their contribution to the residual stream, hidden dimensions by their magnitude in
the inputs of the norms, layers by the loss without them (as in Shortened LLaMA, arXiv 2402.02834).
"""

import copy
import math
from collections import defaultdict
from contextlib import AbstractContextManager, nullcontext

import torch
from tqdm.auto import tqdm

from ..modeling_flashlite import FlashLiteForCausalLM
from .families import ConversionError, check_decoder

# calibration rows on which the model is run once without each layer
_LAYER_ROWS = 4
# what may be pruned, by the names of the config; `layers` is short for `num_hidden_layers`
TARGETS = ("num_hidden_layers", "num_key_value_heads", "intermediate_size", "hidden_size")


def parse_target(text: str) -> dict[str, int]:
    """`"layers=20,intermediate_size=1152"` or `"parameters=90M"` -> sizes by name.

    Raises:
        ConversionError: for an unknown name or an invalid number.
    """
    target = {}
    for word in text.split(","):
        name, _, value = (part.strip() for part in word.partition("="))
        name = "num_hidden_layers" if name == "layers" else name
        if name not in (*TARGETS, "parameters"):
            raise ConversionError(f"--prune knows layers, {', '.join(TARGETS[1:])} and parameters, but not {name!r}.")
        unit = {"k": 1e3, "m": 1e6, "b": 1e9}.get(value[-1:].lower(), 1)
        if name in target:
            raise ConversionError(f"--prune has two values for {name}; leave one of them out.")
        try:
            target[name] = round(float(value[:-1]) * unit) if unit > 1 else int(value)
        except (ValueError, OverflowError):
            raise ConversionError(
                f"--prune {name} is {value!r}, but a whole number such as 20 or 90M is needed."
            ) from None
    if "parameters" in target and len(target) > 1:
        raise ConversionError("--prune takes sizes or parameters, not both; leave one of them out.")
    return target


def _quick_products(model: torch.nn.Module) -> AbstractContextManager:
    """Compute the products of a float32 model in bfloat16 if the CPU has instructions for it."""
    quick = model.dtype == torch.float32 and model.device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return torch.autocast("cpu", torch.bfloat16) if quick else nullcontext()


@torch.inference_mode()
def measure_importance(model: FlashLiteForCausalLM, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    """Importance of layers, groups, units and dimensions, measured on tokens `[R, T]`.

    Returns:
        `dict` with `layers` `[L]`, `groups` `[L, M]`, `units` `[L, F]`, `dimensions` `[D]`, and the mean squares
        `[D]` of each norm's input by the norm's name below the decoder.
    """
    decoder, hooks = model.model.decoder, []
    sums: dict = defaultdict(float)

    def add(name: str, value: torch.Tensor) -> None:
        sums[name] = sums[name] + value.double()

    def watch(index: int, layer) -> None:
        attention, mlp = layer.self_attn, layer.mlp

        def units(module, inputs):
            add(f"units {index}", inputs[0].flatten(0, -2).square().sum(0))

        def groups(module, inputs):
            add(f"groups {index}", inputs[0].flatten(0, -2).square().sum(0))

        hooks.append(mlp.down_proj.register_forward_pre_hook(units))
        hooks.append(attention.o_proj.register_forward_pre_hook(groups))

    def norm_input(name: str):
        return lambda module, inputs: add(f"norm {name}", inputs[0].flatten(0, -2).square().mean(0) * len(rows))

    for index, layer in enumerate(decoder.layers):
        watch(index, layer)
    for name, module in decoder.named_modules():
        if isinstance(module, torch.nn.RMSNorm) and module.normalized_shape == (model.config.hidden_size,):
            hooks.append(module.register_forward_pre_hook(norm_input(name)))
    try:
        with _quick_products(decoder):
            for row in tqdm(rows.split(4), desc="importance", unit="batch"):
                decoder(row, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {"layers": layer_importance(model, rows[:_LAYER_ROWS]), **_gather(model, sums)}


@torch.no_grad()
def layer_importance(model: FlashLiteForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Loss on tokens `[R, T]` without each layer, `[L]`, in nats."""
    losses = []
    with _quick_products(model):
        for layer in tqdm(model.model.decoder.layers, desc="layers", unit="layer"):
            layer.__dict__["forward"] = lambda hidden_states, *_: hidden_states
            try:
                losses.append(model(input_ids=rows, labels=rows, use_cache=False).loss.double())
            finally:
                del layer.__dict__["forward"]
    return torch.stack(losses)


def _gather(model: FlashLiteForCausalLM, sums: dict) -> dict:
    layers, config = model.model.decoder.layers, model.config.decoder
    units, groups = [], []
    for index, layer in enumerate(layers):
        # a unit contributes its activation times its output column
        columns = layer.mlp.down_proj.weight.double().square().sum(0)
        units.append(sums[f"units {index}"] * columns)
        columns = layer.self_attn.o_proj.weight.double().square().sum(0)
        groups.append((sums[f"groups {index}"] * columns).view(config.num_key_value_heads, -1).sum(1))
    norms = {name.removeprefix("norm "): value for name, value in sums.items() if name.startswith("norm ")}
    # all norms have equal weight, however large the residual stream is there
    dimensions = sum((value / value.sum() for value in norms.values()), torch.zeros(config.hidden_size))
    return {
        "groups": torch.stack(groups),
        "units": torch.stack(units),
        "dimensions": dimensions,
        "norms": norms,
    }


def count(config, **sizes: int) -> int:
    """Number of parameters of the language model of a config with changed sizes."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in FlashLiteForCausalLM(_resized(config, sizes)).parameters())


def _resized(config, sizes: dict[str, int]):
    config = copy.deepcopy(config)
    stack, groups = config.decoder, config.decoder.num_attention_heads // config.decoder.num_key_value_heads
    if "hidden_size" in sizes and stack.embedding_size == stack.hidden_size:
        stack.embedding_size = sizes["hidden_size"]
    for name, value in sizes.items():
        setattr(stack, name, value)
    stack.num_attention_heads = groups * stack.num_key_value_heads
    return config


def sizes_for(config, parameters: int) -> dict[str, int]:
    """Layers and feed-forward width for a number of parameters; width shrinks by about the cube of the layers.

    Pruning width keeps more quality, pruning depth gives more speed (arXiv 2408.11796); head count and hidden size
    stay. Of the 30 layers of SmolLM2-135M, keeping 26 is better than 21, 28 or 30 at 90 M parameters.

    Raises:
        ConversionError: the model has no more, or even a quarter of both is too large.
    """
    stack, best = config.decoder, None
    if parameters >= (whole := count(config)):
        raise ConversionError(f"parameters is {parameters:,}, but the model has {whole:,}; give fewer.")
    for layers in range(stack.num_hidden_layers, stack.num_hidden_layers // 4, -1):
        one, two = (count(config, num_hidden_layers=layers, intermediate_size=width) for width in (64, 128))
        width = (64 + int((parameters - one) / ((two - one) / 64))) // 32 * 32
        width = min(width, stack.intermediate_size)
        if width < stack.intermediate_size // 4:
            continue
        shares = layers / stack.num_hidden_layers, width / stack.intermediate_size
        unlike = abs(math.log(shares[0] ** 3 / shares[1]))
        short = (parameters - one - (width - 64) * (two - one) / 64) / parameters
        if best is None or unlike + 10 * short < best[0]:
            best = unlike + 10 * short, {"num_hidden_layers": layers, "intermediate_size": width}
    if best is None:
        raise ConversionError(
            f"{parameters:,} parameters are too few for layers and feed-forward width alone; give hidden_size too."
        )
    return best[1]


def prune(
    model: FlashLiteForCausalLM, target: dict[str, int], rows: torch.Tensor
) -> tuple[FlashLiteForCausalLM, dict[str, int]]:
    """A smaller model of the most important parts of a larger one; train it afterwards with the larger as teacher.

    Args:
        model ([`FlashLiteForCausalLM`]): with rotary positions; it is not changed.
        target (`dict`): sizes by name, or `parameters`; see [`parse_target`].
        rows (`torch.Tensor`): calibration tokens `[R, T]`.

    Returns:
        The model, and its sizes.

    Raises:
        ConversionError: for a size that is not smaller, or a model whose attention cannot be cut.
    """
    check_decoder(model.config, type(model).__name__, "The model")
    config, stack = model.config, model.config.decoder
    if stack.position_encoding != "rotary" or stack.embedding_size != stack.hidden_size:
        raise ConversionError("Only models with rotary positions and unfactorised embeddings are pruned.")
    sizes = sizes_for(config, target["parameters"]) if "parameters" in target else dict(target)
    for name, value in sizes.items():
        if not 1 <= value <= getattr(stack, name):
            raise ConversionError(f"{name} is {value}, but must be 1 to {getattr(stack, name)}, which the model has.")
    if all(value == getattr(stack, name) for name, value in sizes.items()):
        have = ", ".join(f"{name}={value}" for name, value in sizes.items())
        raise ConversionError(f"The model has {have} already; give a smaller size.")
    importance = measure_importance(model, rows)
    kept = _kept(stack, sizes, importance)
    small = _resized(config, sizes)
    for name in ("no_rope_layers", "local_rope_layers"):
        kinds = getattr(stack, name)
        if kinds is not None:
            setattr(small.decoder, name, [kinds[layer] for layer in kept["layers"]])
    weights = {name: weight.detach() for name, weight in model.state_dict().items()}
    with torch.device("meta"):
        new = FlashLiteForCausalLM(small)
    cut = {name: _cut(name, weights, kept, importance, stack) for name in new.state_dict()}
    new.load_state_dict(cut, assign=True)
    new.tie_weights()
    new.config.dtype, new.generation_config = config.dtype, copy.deepcopy(model.generation_config)
    return new.eval(), {name: getattr(small.decoder, name) for name in TARGETS}


def _kept(stack, sizes: dict[str, int], importance: dict) -> dict:
    """Indices of the kept layers, of groups and units in each, and of dimensions, in their original order."""

    def top(scores: torch.Tensor, number: int) -> torch.Tensor:
        return scores.topk(number).indices.sort().values

    layers = importance["layers"].clone()
    layers[[0, -1]] = math.inf  # both always stay: they map between tokens and the residual stream
    kept_layers = top(layers, sizes.get("num_hidden_layers", len(layers))).tolist()
    groups, units = (sizes.get(name, getattr(stack, name)) for name in ("num_key_value_heads", "intermediate_size"))
    return {
        "layers": kept_layers,
        "groups": [top(importance["groups"][layer], groups) for layer in kept_layers],
        "units": [top(importance["units"][layer], units) for layer in kept_layers],
        "dimensions": top(importance["dimensions"], sizes.get("hidden_size", stack.hidden_size)),
    }


def _cut(name: str, weights: dict, kept: dict, importance: dict, stack) -> torch.Tensor:
    """The kept part of a weight, given its name in the new model."""
    parts, dimensions = name.split("."), kept["dimensions"]
    if parts[2:3] != ["layers"]:
        weight = weights[name]
        return (
            _norm(name, weight, dimensions, importance, stack) if weight.dim() == 1 else weight[:, dimensions].clone()
        )
    number = int(parts[3])
    parts[3] = str(kept["layers"][number])
    old, module, kind = ".".join(parts), parts[-2], parts[-1]
    weight = weights[old]
    queries = stack.num_attention_heads // stack.num_key_value_heads * stack.head_dim
    groups, units = kept["groups"][number], kept["units"][number]

    def heads(size: int) -> torch.Tensor:
        return (groups[:, None] * size + torch.arange(size)).flatten()

    outputs = {
        "q_proj": heads(queries),
        "k_proj": heads(stack.head_dim),
        "v_proj": heads(stack.head_dim),
        "o_proj": dimensions,
        "gate_proj": units,
        "up_proj": units,
        "down_proj": dimensions,
    }
    inputs = {"o_proj": heads(queries), "down_proj": units}
    if module in outputs:
        weight = weight[outputs[module]]
        return weight[:, inputs.get(module, dimensions)].clone() if kind == "weight" else weight.clone()
    if module in ("q_norm", "k_norm"):
        if len(weight) == stack.head_dim:
            return weight.clone()
        return weight[heads(queries if module == "q_norm" else stack.head_dim)].clone()
    return _norm(old, weight, dimensions, importance, stack)


def _norm(name: str, weight: torch.Tensor, dimensions, importance: dict, stack) -> torch.Tensor:
    """The weight of a norm over fewer dimensions, rescaled to preserve the magnitude of its output."""
    squares = importance["norms"].get(name.removeprefix("model.decoder.").removesuffix(".weight"))
    if squares is None or len(dimensions) == len(weight):
        return weight[dimensions].clone()
    scale = (squares[dimensions].mean() / squares.mean()).sqrt().to(weight.dtype)
    return (weight[dimensions] + stack.rms_norm_offset) * scale - stack.rms_norm_offset
