"""Linear and embedding layers on packed 4-bit codes, and their fake-quantized twins for training.

All of them are subclasses of the layer that they replace, so that PEFT can wrap them, and layers of other libraries
that only extend `forward` (a scaled or shifted embedding) still work.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .ecq_weight_flashlite import QuantizedWeight, TiledWeight, digit_columns, share_scales, thin_out
from .int4_flashlite import (
    KernelWeight,
    int4_embedding,
    int4_few_rows,
    int4_linear,
    is_few_rows,
    is_plain,
)
from .linear_flashlite import Linear
from .rare_flashlite import RareDigits
from .tiles_flashlite import TILE_ROWS

# the classes below are always mixins of a layer
if TYPE_CHECKING:
    from torch.nn import Module as _Layer
else:
    _Layer = object
_RARE = tuple(f"rare_{name}" for name in RareDigits._fields)
HELD = ("weight", "tiles", "step", "numbers", "factors", *_RARE)
_ANY_SIZE = "numbers", "factors", *_RARE  # as many entries as the codes need
_DERIVED = "kernel", "joint"


class CodedWeight(nn.Parameter):
    """The `weight` of a quantized layer for other code: it has dtype, device and rows, but no elements.

    Code that needs the elements, such as peft's `merge_and_unload`, fails with an error that says what to do.
    """

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        try:
            return torch.Tensor.__torch_function__.__func__(cls, func, types, args, kwargs)
        except RuntimeError as error:
            raise RuntimeError(
                f"A weight with 4-bit codes for its elements cannot enter `{getattr(func, '__name__', func)}`; merge"
                " adapters with calibration.merge_adapters(peft_model), or call dequantize() on the model first."
            ) from error

    def __reduce_ex__(self, protocol):
        return _without_elements, (len(self), self.dtype, self.device)


def _without_elements(rows: int, dtype: torch.dtype, device) -> CodedWeight:
    return CodedWeight(torch.empty(rows, 0, dtype=dtype, device=device), requires_grad=False)


class EcqModule(_Layer):
    """Base of [`EcqLinear`] and [`EcqEmbedding`]: the codes, and a `weight` placeholder without elements.

    Parameters:
        tiles (uint8, the layout of `tiles_flashlite`), step (float32 `[rows]`): codes and steps.
        numbers (int64), factors (float32): what the tiles' columns multiply, `None` where that is just the input; see
            [`TiledWeight.inputs`].
        rare_starts, rare_columns (int32), rare_values (bfloat16): [`RareDigits`], `None` where there are none.
        weight (float `[rows, 0]`): has the dtype and device that other code asks a layer for; tied layers share it.

    `kernel` and `joint` are made from the codes when they are first used, see [`EcqLinear`] and [`join`]. They are
    discarded when codes or steps are set, loaded or moved, so these must not be modified in other ways.
    """

    base: float
    grid: int
    kernel: KernelWeight | None = None
    joint: EcqLinear | None = None

    def _forget(self) -> None:
        for name in _DERIVED:
            self.__dict__.pop(name, None)

    def __getstate__(self):
        return {key: value for key, value in self.__dict__.items() if key not in _DERIVED}

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        self._forget()
        given = {name: state_dict.get(prefix + name) for name in HELD[1:]}
        if given["tiles"] is not None and self._parameters["tiles"] is not None:
            self._make_room(given)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _make_room(self, given: dict[str, torch.Tensor | None]) -> None:
        """Hold the same parameters as `given`: how many columns are wide differs from one quantization to the next."""
        for name, value in given.items():
            held = self._parameters[name]
            if value is None:
                self._parameters[name] = None
            elif held is None:
                self._parameters[name] = nn.Parameter(value.detach().to(self.tiles.device, copy=True), False)
            elif held.shape != value.shape and len(held) == len(value) or name in _ANY_SIZE:
                held.data = held.data.new_empty(value.shape)  # the parameter stays: tied layers share it
        if (step := given["step"]) is not None:
            exponents = torch.log2(step.detach().double() / self.base) * self.grid
            if (exponents - exponents.round()).abs().max() > 1e-3 or exponents.abs().max() > 127:
                self.base = float(step[0])  # the other quantization had another base; any of its steps will do

    def _open(self, dtype: torch.dtype, device, size_only: bool = False) -> None:
        """Replace the float weight by a place for codes; with `size_only` it has their bytes, for device maps."""
        rows, columns = self.weight_shape
        for name in HELD:
            self._parameters.pop(name, None)
            self.register_parameter(name, None)
        weight = _without_elements(rows, dtype, device)
        if size_only:
            weight = torch.empty(rows, (columns + 1) // 2, dtype=torch.uint8, device=device)
            weight = nn.Parameter(weight, requires_grad=False)
        self._parameters["weight"] = weight
        self.proxy_dtype, self.stream = dtype, None
        self._forget()

    def __setattr__(self, name, value):
        # The loader assigns the stored stream to `weight`; it is kept here until the quantizer decodes all streams.
        if name == "weight" and isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1:
            object.__setattr__(self, "stream", value.detach())
            rows = self.weight_shape[0]
            value = _without_elements(rows, self.proxy_dtype, value.device)
            value._is_hf_initialized = True
        super().__setattr__(name, value)

    def take_stream(self) -> torch.Tensor:
        """The loaded stream, which the module gives away."""
        stream = self.stream
        self.__dict__["stream"] = None
        return stream

    @torch.inference_mode(False)  # a model that is quantized in inference mode can be trained later
    def set_quantized(self, weight: QuantizedWeight | TiledWeight, device=None) -> None:
        """Take over codes and steps."""
        device = device or self.weight.device
        if device.type == "meta":
            device = torch.device("cpu")
        if self.weight.is_meta or self.weight.dtype == torch.uint8:
            self._parameters["weight"] = _without_elements(weight.shape[0], self.proxy_dtype, device)
        tiled = TiledWeight.of(weight) if isinstance(weight, QuantizedWeight) else weight
        rare = tiled.rare or (None, None, None)
        for name, value in zip(HELD[1:], (tiled.tiles, tiled.step(), *tiled.inputs(), *rare)):
            if value is not None:
                value = value.to(device)
                value = nn.Parameter(value.clone() if value.is_inference() else value, requires_grad=False)
                value._is_hf_initialized = True
            self._parameters[name] = value
        # past __setattr__, as the parameters: a model has hundreds of layers
        self.__dict__.update(base=weight.base, grid=weight.grid, stream=None)
        self._forget()

    def share_quantized(self, other: EcqModule) -> None:
        """Use the codes of a tied layer."""
        for name in HELD:
            self._parameters[name] = other._parameters[name]
        self.base, self.grid, self.stream = other.base, other.grid, None
        self._forget()

    @property
    def rare(self) -> RareDigits | None:
        """What is added to single codes."""
        held = self._parameters
        return None if held["rare_starts"] is None else RareDigits(*(held[name] for name in _RARE))

    def prepared(self) -> KernelWeight:
        """The codes and steps for [`int4_few_rows`]; no bias."""
        kernel = self.kernel
        if kernel is None:
            # tensors made in inference mode cannot be used in training, unlike the codes, if these were made outside
            with torch.inference_mode(self.tiles.is_inference()):
                weight = self.tiles.detach(), self.step.detach(), self.weight_shape[1]
                # bypasses nn.Module.__setattr__, which searches parameters, buffers and modules first
                kernel = KernelWeight.of(*weight, self.numbers, self.factors, self.rare)
                self.__dict__["kernel"] = kernel
        return kernel

    def tiled(self) -> TiledWeight:
        """The codes in their memory layout, with steps and column scales."""
        none = torch.zeros(0, dtype=torch.long, device=self.tiles.device)
        columns, wide, column_exponents = self.weight_shape[1], (none, none), None
        exponents = _exponents(self.step / self.base, self.grid)
        if self.factors is not None:
            scale = self.factors.data[:columns]
            column_exponents = _exponents(scale, self.grid)
            column_exponents = column_exponents if column_exponents.any() else None
            if self.numbers is not None:
                numbers = self.numbers.data[columns:]
                digit = self.factors.data[columns:] / scale[numbers]
                wide = numbers[(digit > 4) & (digit < 64)], numbers[digit > 64]
        scaled = self.base, exponents, self.grid, column_exponents
        return TiledWeight(self.weight_shape, self.tiles.data, wide, *scaled, self.rare)

    def quantized(self) -> QuantizedWeight:
        """The codes and steps as a [`QuantizedWeight`], the same as was set."""
        return self.tiled().quantized()

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The dequantized weight, `[rows, columns]`; float32 or `dtype`."""
        return self.quantized().dequantize().to(dtype or torch.float32)

    def _apply(self, fn, recurse=True):
        exact = {
            name: self._parameters[name].data
            for name in ("step", "factors", "rare_values")
            if self._parameters.get(name) is not None
        }
        super()._apply(fn, recurse)
        self._forget()
        # `model.to(bfloat16)` must not round steps and factors: they are stored exactly
        for name, value in exact.items():
            moved = self._parameters[name]
            if moved.dtype != value.dtype:
                moved.data = value.to(moved.device)
        return self


def _exponents(ratios: torch.Tensor, grid: int) -> torch.Tensor:
    return torch.round(torch.log2(ratios.detach().double()) * grid).to("cpu", torch.int8)


class EcqLinear(EcqModule, nn.Linear):
    """`y = x W^T + b` with `W` in packed 4-bit codes; build it with [`to_quantized`]."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """x `[..., in_features]` to `[..., out_features]`, in the dtype of x."""
        held = self._parameters  # reading a module's attributes takes as long as a small operation
        bias = held["bias"]
        plain = is_plain(input) and not held["step"].requires_grad and input.shape[-1] == self.in_features
        if plain and is_few_rows(input):
            output = int4_few_rows(input, self.kernel or self.prepared(), self.out_features)
            return output if bias is None else (output + bias).to(input.dtype)
        return int4_linear(
            input,
            self.tiles,
            self.step,
            self.in_features,
            bias,
            numbers=self.numbers,
            factors=self.factors,
            rare=self.rare,
        )


def _neighbours(parts: Sequence[nn.Parameter]) -> torch.Tensor:
    """Concatenate the parts along the first axis and make each a view of it, unless they are adjacent already."""
    place, length = parts[0].data_ptr(), sum(len(part) for part in parts)
    shape, stride = (length, *parts[0].shape[1:]), parts[0].stride()
    ends = [place]
    for part in parts:
        ends.append(ends[-1] + part.numel() * part.element_size())
    if [part.data_ptr() for part in parts] == ends[:-1]:
        storage = parts[0].untyped_storage()
        if ends[-1] <= storage.data_ptr() + storage.nbytes():
            return parts[0].detach().as_strided(shape, stride)
    whole = torch.cat([part.detach() for part in parts])
    for part, own in zip(parts, whole.split([len(part) for part in parts])):
        part.data = own  # the parameter stays the same, since layers may share it
    return whole


def _with_the_same_columns(weights: list[TiledWeight]) -> list[TiledWeight]:
    """The weights with the digits of the same wide columns in their tiles."""
    plain = [weight.quantized() for weight in weights]
    wide = [digit_columns(weight.codes) for weight in plain]
    second, third = (torch.cat([own[i] for own in wide]).unique() for i in range(2))
    return thin_out([TiledWeight.whole(weight, (second, third)) for weight in plain])


def _joint_rare(layers: list[EcqLinear], sizes: list[int]) -> tuple[torch.Tensor | None, ...]:
    """The rare digits of layers, each with empty rows up to its size, one after the other."""
    having = [layer for layer in layers if layer.rare is not None]
    if not having:
        return None, None, None
    columns, values = (_neighbours([layer._parameters[name] for layer in having]) for name in _RARE[1:])
    starts, end = [], 0
    for layer, size in zip(layers, sizes):
        own = columns.new_zeros(size + 1) if layer.rare is None else layer.rare.padded(size).starts
        starts.append(own[:-1] + end)
        end += int(own[-1])
    return torch.cat([*starts, columns.new_full((1,), end)]), columns, values


@torch.inference_mode(False)  # as in `prepared`
@torch.no_grad()
def join(layers: Sequence[nn.Module]) -> EcqLinear | None:
    """One layer that computes the outputs of several from the same input and the same codes, in one product.

    One product is faster than several small ones. The codes of the layers become neighbours in memory, each layer's
    own tiles a view of them, so that nothing but steps is held twice and every layer works on as before. Layers with
    different wide columns get those of all of them.

    Args:
        layers (sequence of `nn.Module`): layers with the same number of input features.

    Returns:
        [`EcqLinear`] without bias, the same one while none of the layers changes; the outputs of each layer begin at
        the next multiple of 64. None if one of the layers is wrapped or not quantized, has a bias, other column scales
        than the first, or trains its steps.
    """
    joint = getattr(layers[0], "joint", None)
    if joint is not None and all(getattr(layer, "joint", None) is joint for layer in layers):
        return joint
    coded = [layer for layer in layers if type(layer) is EcqLinear and layer.tiles is not None]
    if len(coded) < len(layers) or not all(
        layer.in_features == coded[0].in_features
        and layer.in_features % 2 == 0
        and layer.bias is None
        and not layer.step.requires_grad
        for layer in coded
    ):
        return None
    for layer in coded:
        if layer.tiles.is_inference():  # of a model that was copied in inference mode
            layer.set_quantized(layer.tiled())
    weights = [layer.tiled() for layer in coded]
    if not share_scales([weight.column_exponents for weight in weights]):
        return None
    if not all(map(torch.equal, (a for weight in weights for a in weight.wide), weights[0].wide * len(weights))):
        for layer, weight in zip(coded, _with_the_same_columns(weights)):
            layer.set_quantized(weight)
    columns, sizes = coded[0].in_features, [len(layer.tiles) * TILE_ROWS for layer in coded]
    with torch.device("meta"):
        joint = EcqLinear(columns, sum(sizes), bias=False)
    joint._open(coded[0].weight.dtype, coded[0].tiles.device)
    step = torch.cat([nn.functional.pad(layer.step, (0, size - len(layer.step))) for layer, size in zip(coded, sizes)])
    tiles = _neighbours([layer.tiles for layer in coded])
    rare = _joint_rare(coded, sizes)
    for name, value in zip(HELD[1:], (tiles, step, coded[0].numbers, coded[0].factors, *rare)):
        joint._parameters[name] = None if value is None else nn.Parameter(value.detach(), requires_grad=False)
    for layer in coded:
        layer._forget()
        layer.__dict__["joint"] = joint
    return joint


class EcqEmbedding(EcqModule, nn.Embedding):
    """Embedding lookup in packed 4-bit codes; build it with [`to_quantized`]."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """ids int `[...]` to `[..., embedding_dim]`, in the dtype of the model."""
        columns, rare = self.embedding_dim, self.rare
        if self.numbers is None:
            output = int4_embedding(input, self.tiles, self.step, columns, rare=rare)
            output = output if self.factors is None else output * self.factors
        else:
            digits = int4_embedding(input, self.tiles, self.step, self.tiles.shape[1], rare=rare) * self.factors
            output = digits[..., :columns].index_add(-1, self.numbers[columns:], digits[..., columns:])
        return output.to(self.weight.dtype)


TWIN_STATE = ("log_base", "exponents", "column_exponents", "code_lengths")
_CLASSES: dict[tuple[type, type], type] = {}


def _subclass(plain: type, mixin: type) -> type:
    """`mixin` for the plain layer, or a class in which a third-party `plain` calls it through `super().forward`."""
    if plain in (nn.Linear, Linear, nn.Embedding, Conv1D):
        return mixin
    key = (plain, mixin)
    if key not in _CLASSES:
        _CLASSES[key] = type(mixin.__name__ + plain.__name__, (plain, mixin), {"__module__": plain.__module__})
    return _CLASSES[key]


def retype(module: nn.Module, linear: type, embedding: type) -> nn.Module:
    """`module` with its class changed in place; a `Conv1D` becomes a new linear layer, transposed."""
    plain = getattr(module, "plain_class", type(module))
    if plain is Conv1D and not isinstance(module, nn.Linear):
        rows, columns = module.weight.shape[1], module.weight.shape[0]
        with torch.device("meta"):
            linear_module = linear(columns, rows, bias=True)
        weight = module.weight.detach().T.contiguous()
        linear_module._parameters["weight"] = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        linear_module._parameters["bias"] = module.bias
        module = linear_module.train(module.training)
    else:
        mixin = linear if isinstance(module, (nn.Linear, Conv1D)) else embedding
        module.__class__ = _subclass(plain, mixin)
    module.plain_class = plain
    return module


def to_quantized(module: nn.Module, size_only: bool = False) -> nn.Module:
    """Turn a float layer or a twin into an [`EcqLinear`] or [`EcqEmbedding`] without codes, in place if possible."""
    dtype, device = module.weight.dtype, module.weight.device
    module = retype(module, EcqLinear, EcqEmbedding)
    for name in ("log_step", *TWIN_STATE):
        module._parameters.pop(name, None)
        module._buffers.pop(name, None)
    module._open(dtype, device, size_only)
    return module


def to_float(module: EcqModule, dtype: torch.dtype) -> nn.Module:
    """Turn a quantized layer back into its float class, with the dequantized weight."""
    weight, plain = module.dequantize(dtype), module.plain_class
    module._forget()
    for name in HELD[1:]:
        module._parameters.pop(name, None)
    if plain is Conv1D:
        conv = Conv1D(module.out_features, module.in_features)
        conv.weight, conv.bias = nn.Parameter(weight.T.contiguous()), module.bias
        return conv.train(module.training)
    module.__class__ = plain
    module._parameters["weight"] = nn.Parameter(weight)
    return module
