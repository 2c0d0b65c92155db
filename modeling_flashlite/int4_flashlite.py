"""Packed int4 weights in memory and the products that use them: one storage for linear layers, embeddings, tied heads.

A weight is w[n, k] = code[n, k] * step[n] with codes -8..7 and one float32 step per row. Codes lie in *tiles*, uint8
`[ceil(N / 64), Kp, 32]` with Kp = K rounded up to 32: byte (b, k, j) holds code + 8 of row 64 b + j in its low nibble
and of row 64 b + j + 32 in its high nibble; padding is code 0. That is what PyTorch's AVX-512 int4 kernel reads, so
half a byte per weight is all there is: nothing is kept twice, and the same tiles serve products, look-ups and saving.

`int4_linear` picks a way by the number of activation rows M. Microseconds of a layer with bfloat16 activations, one
thread of an AVX-512 core with VNNI and BF16, weights as far in the cache as they fit, minima (PyTorch 2.13). "held" is
int4 within [`int8_codes`]:

    ===========  ===  =====  =====  =====  ======================================================
    N x K          M   bf16   int4   held  int4 runs
    ===========  ===  =====  =====  =====  ======================================================
    512 x 512      1     25     13         PyTorch's int4 kernel up to M = 16
    512 x 512     32     53    114     76  codes and activations as int8, `_int_mm`
    512 x 512     64     86    141    102  (held: oneDNN, codes unpacked once)
    1024 x 1024    1     71     32
    1024 x 1024   16    119    198
    1024 x 1024   32    192    284    142
    1024 x 1024   64    321    367    232
    32000 x 512    1   1801    425
    32000 x 512   16   2654   2971
    32000 x 512   32   3698   4958   1576
    32000 x 512   64   5614   7864   2878
    ===========  ===  =====  =====  =====  ======================================================

With two threads the kernel would beat unpacking up to about 40 rows, but its sums are rounded to bfloat16.
An earlier run with weights that were not in the cache had int4 at 2620 us against 2729 of bfloat16 for
1024 x 1024 and M = 256, and at 28 331 against 39 657 for 4096 x 4096.

Everything is computed in bfloat16 with exact integer codes and float32 accumulation, whatever the caller's dtype: the
kernel's float32 and float16 versions are scalar loops, 27 to 55 times slower. Steps are applied afterwards in float32;
in [`int4_few_rows`] the kernel applies them, rounded to bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

TILE_ROWS = 64
_KERNEL_ROWS = 16  # M up to which the int4 kernel beats unpacking to int8
_KERNEL_ROWS_EXACT = 36  # ... and unpacking to bfloat16
_INT8_ERROR = 0.015  # relative error of the output that int8 activations may cost
_GROUP_WEIGHTS = 1 << 20  # weights unpacked at a time, to stay in the cache


def _padded(columns: int) -> int:
    """Columns of tiles for so many columns of codes.

    A multiple of 32. A few more than needed can take less memory, since the kernel's scales are then fewer:
    608 = 19 * 32 columns need one per 32 weights, 640 = 5 * 128 one per 128.
    """
    least = -(-columns // 32) * 32
    return min(range(least, least + 256, 32), key=lambda padded: padded * (1 + 8 / _kernel_group(padded)))


def empty_tiles(rows: int, columns: int, device=None) -> torch.Tensor:
    """Room for the tiles of codes `[N, K]`, not initialised: uint8 `[ceil(N / 64), Kp, 32]`."""
    return torch.empty(-(-rows // TILE_ROWS), _padded(columns), 32, dtype=torch.uint8, device=device)


def tile_codes(codes: torch.Tensor) -> torch.Tensor:
    """Tiles of codes.

    Args:
        codes (`torch.Tensor` int8 `[N, K]`): -8..7.

    Returns:
        `torch.Tensor` uint8 `[ceil(N / 64), Kp, 32]`.
    """
    if codes.dtype != torch.int8 or codes.numel() and (codes.min() < -8 or codes.max() > 7):
        raise ValueError(
            f"Tiles hold int8 codes -8..7, not {codes.dtype} of {codes.min()}..{codes.max()}; clamp them first."
        )
    rows, columns = codes.shape
    tiles = empty_tiles(rows, columns, codes.device)
    padded, group = tiles.shape[1], _group(TILE_ROWS * tiles.shape[1], codes.device)
    for first in range(0, len(tiles), group):
        part = (codes[TILE_ROWS * first : TILE_ROWS * (first + group)] + 8).view(torch.uint8)
        if len(part) % TILE_ROWS or padded != columns:
            part = F.pad(part, (0, padded - columns, 0, -len(part) % TILE_ROWS), value=8)
        halves = part.view(-1, 2, 32, padded)
        tiles[first : first + group] = (halves[:, 0] | (halves[:, 1] << 4)).transpose(1, 2)
    return tiles


def untile_codes(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Inverse of [`tile_codes`]: int8 `[rows, columns]`."""
    codes = tiles.new_empty(rows, columns, dtype=torch.int8)
    group = _group(TILE_ROWS * tiles.shape[1], tiles.device)
    for first in range(0, len(tiles), group):
        part = tiles[first : first + group, :columns]
        nibbles = torch.stack([part & 15, part >> 4], 1).view(torch.int8).transpose(2, 3).reshape(-1, columns)
        into = codes[TILE_ROWS * first : TILE_ROWS * (first + group)]
        torch.sub(nibbles[: len(into)], 8, out=into)
    return codes


def _codes(tiles: torch.Tensor) -> torch.Tensor:
    """Codes as int8, K first: `[columns of the tiles, 64 * tiles]`."""
    low, high = (half.view(torch.int8).sub_(8) for half in (tiles & 15, tiles >> 4))
    # one cat moves 32 bytes at a time, three times as fast as a strided copy
    return torch.cat([half for pair in zip(low.unbind(0), high.unbind(0)) for half in pair], 1)


def _group(size: int, device: torch.device) -> int:
    """How many slices of `size` weights to unpack at a time: what stays in a processor's cache, or all on a GPU."""
    return max(1, _GROUP_WEIGHTS // size) if device.type == "cpu" else 1 << 30


def dequantize_int4(
    tiles: torch.Tensor, step: torch.Tensor, in_features: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The float weight: code * step.

    Args:
        tiles (`torch.Tensor` uint8 `[ceil(N / 64), Kp, 32]`): see [`tile_codes`].
        step (`torch.Tensor` `[N]`): one step per row; its length is N.
        in_features (`int`): K.
        dtype (`torch.dtype`): of the result; the product is rounded once.

    Returns:
        `torch.Tensor` `[N, K]`.
    """
    return (_codes(tiles)[:in_features, : step.numel()] * step).to(dtype).t().contiguous()


def int4_linear_reference(
    x: torch.Tensor,
    tiles: torch.Tensor,
    step: torch.Tensor,
    in_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`F.linear` with the dequantized weight in x's dtype: what [`int4_linear`] approximates to bfloat16 precision."""
    return F.linear(x, dequantize_int4(tiles, step, in_features, x.dtype), bias)


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@functools.lru_cache(maxsize=1)
def _tiles_fit_kernel() -> bool:
    """Whether this processor's int4 kernel reads tiles as they are (AVX-512 does)."""
    codes = (torch.arange(64 * 32, device="cpu") * 7919 % 251 % 16 - 8).to(torch.int8).view(64, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    return torch.equal(packed.view(-1), tile_codes(codes).view(-1))


_kernel_forms = WeakIdKeyDictionary()


def _derived(held: WeakIdKeyDictionary, tiles: torch.Tensor, make: Callable[[torch.Tensor], Any]) -> Any:
    """What `make` makes of the tiles: made once, made again after they changed, held while they live."""
    version = None if tiles.is_inference() else tiles._version
    entry = held.get(tiles)
    if entry is None or entry[0] != version:
        with torch.inference_mode(tiles.is_inference()):  # else it may be used in training later
            entry = held[tiles] = version, make(tiles)
    return entry[1]


def _reordered(tiles: torch.Tensor) -> torch.Tensor:
    parts = []
    for tile in tiles:  # one tile at a time, since the packing op takes 4 bytes per weight
        nibbles = torch.stack([tile & 15, tile >> 4]).transpose(1, 2).reshape(TILE_ROWS, -1)
        parts.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(nibbles.to(torch.int32), 1))
    return torch.cat(parts).view(tiles.shape[0] * TILE_ROWS, -1)


def _kernel_form(tiles: torch.Tensor) -> torch.Tensor:
    """Weights as the kernel wants them: the tiles' own memory, or a copy made once and kept while they live."""
    if _tiles_fit_kernel():
        return tiles.view(tiles.shape[0] * TILE_ROWS, tiles.shape[1] // 2)
    return _derived(_kernel_forms, tiles, _reordered)


@functools.lru_cache(maxsize=64)
def _unit_scales(groups: int, rows: int) -> torch.Tensor:
    """Scale 1 and zero point 0 for every group; the steps are applied afterwards, in float32."""
    with torch.inference_mode(False):
        ones = torch.ones(groups, rows, dtype=torch.bfloat16, device="cpu")
        return torch.stack([ones, torch.zeros_like(ones)], -1)


def _kernel_group(padded: int) -> int:
    """How many columns share a scale, the kernel's largest choice that divides Kp."""
    return min(256, padded & -padded)


def _kernel_matmul(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    group = _kernel_group(tiles.shape[1])
    scales = _unit_scales(tiles.shape[1] // group, tiles.shape[0] * TILE_ROWS)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, _kernel_form(tiles), group, scales)


class KernelWeight(NamedTuple):
    """A weight with its steps as PyTorch's kernel takes them, and what its inputs are made of.

    Attributes:
        packed (`torch.Tensor` uint8 `[64 * tiles, Kp / 2]`): the tiles' own memory where their order fits.
        group (`int`): columns that share a scale.
        scales (`torch.Tensor` bfloat16 `[Kp / group, 64 * tiles, 2]`): steps rounded to bfloat16, and zeros.
        numbers (`torch.Tensor` int64 `[Kp]`, *optional*): the input that each column of the tiles multiplies.
        factors (`torch.Tensor` bfloat16 `[Kp]` or `[K]`, *optional*): what that input is multiplied by before.
    """

    packed: torch.Tensor
    group: int
    scales: torch.Tensor
    numbers: torch.Tensor | None = None
    factors: torch.Tensor | None = None


def kernel_weight(
    tiles: torch.Tensor,
    step: torch.Tensor,
    numbers: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> KernelWeight:
    """Tiles and steps made ready for [`int4_few_rows`]: one byte more for every 16 to 64 weights."""
    group = _kernel_group(tiles.shape[1])
    steps = F.pad(step.detach().to(torch.bfloat16), (0, len(tiles) * TILE_ROWS - len(step)))
    scales = torch.stack([steps, torch.zeros_like(steps)], -1).expand(tiles.shape[1] // group, -1, -1)
    factors = None if factors is None else factors.detach().to(torch.bfloat16)
    return KernelWeight(_kernel_form(tiles), group, scales.contiguous(), numbers, factors)


def spread(x: torch.Tensor, numbers: torch.Tensor | None, factors: torch.Tensor | None) -> torch.Tensor:
    """Inputs `[..., K]` to the inputs of the tiles' columns, `[..., Kp]`: `x[..., numbers] * factors`."""
    if numbers is not None:
        x = x.index_select(-1, numbers)
    return x if factors is None else x * factors.to(x.dtype)


def is_plain(x: torch.Tensor) -> bool:
    """Whether products with x are plain eager inference on a CPU, free to run what knows no gradient."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is torch.Tensor
        and x.is_cpu
        and not (torch.is_grad_enabled() and x.requires_grad)
    )


def is_few_rows(x: torch.Tensor) -> bool:
    """Whether [`int4_few_rows`] is the way for so many rows, if x is plain."""
    return 0 < x.numel() <= _KERNEL_ROWS * x.shape[-1]


def int4_few_rows(x: torch.Tensor, weight: KernelWeight, out_features: int) -> torch.Tensor:
    """[`int4_linear`] for few rows, without gradient, in one call of the kernel, which also applies the steps.

    The steps lose up to 2^-9 of their value in bfloat16. Bfloat16 callers save a rounding for it: the same error
    (0.3% of the output's root mean square on random values); float32 callers have 0.3 instead of 0.23%.

    Args:
        x (`torch.Tensor` `[..., K]`): activations on the CPU, any floating dtype.
        weight ([`KernelWeight`]): see [`kernel_weight`].
        out_features (`int`): N.

    Returns:
        `torch.Tensor` `[..., N]` in x's dtype.
    """
    *batch, in_features = x.shape
    packed, group, scales, numbers, factors = weight
    rows, padded = x.reshape(-1, in_features).to(torch.bfloat16), 2 * packed.shape[1]
    if numbers is not None:
        rows = rows.index_select(1, numbers)
    if factors is not None:
        rows = rows * factors
    if padded != rows.shape[1]:
        rows = F.pad(rows, (0, padded - rows.shape[1]))
    out = torch.ops.aten._weight_int4pack_mm_for_cpu.default(rows.contiguous(), packed, group, scales)
    if out.shape[1] != out_features:
        out = out[:, :out_features].contiguous()
    return out.to(x.dtype).view(*batch, out_features)


_int8_held: ContextVar[WeakIdKeyDictionary | None] = ContextVar("int8_codes", default=None)


@contextlib.contextmanager
def int8_codes(held: WeakIdKeyDictionary | None = None) -> Iterator[WeakIdKeyDictionary]:
    """Within it, weights of products of more than 16 rows are held as int8 for oneDNN, one byte more per weight.

    For decoding in large batches, which multiplies by every weight for each token: unpacking is then most of the work.
    Making them ready takes as long as unpacking them twenty times. It changes nothing on processors other than x86.

    Args:
        held (`WeakIdKeyDictionary`, *optional*): what an earlier region held, to go on with; entries live no longer
            than their tiles. By default all is let go of at the end.

    Yields:
        `WeakIdKeyDictionary` of what is held, by tiles.
    """
    held = WeakIdKeyDictionary() if held is None else held
    capable = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    token = _int8_held.set(held if capable else None)
    try:
        yield held
    finally:
        _int8_held.reset(token)


def _int8_scale(x: torch.Tensor) -> torch.Tensor | None:
    """Scales `[M, 1]` that bring the rows of float32 x into int8, or None if outliers forbid it."""
    peak = x.abs().amax(-1, keepdim=True)
    # rounding to a quantum q has variance q^2 / 12, against the mean square of x
    noise = float(torch.linalg.vector_norm(peak)) / 127 * math.sqrt(x.shape[1] / 12)
    if not noise <= _INT8_ERROR * float(torch.linalg.vector_norm(x)):
        return None
    return peak.clamp_(min=torch.finfo(torch.float32).tiny * 127).div_(127)


def _held_linear(
    x: torch.Tensor, tiles: torch.Tensor, step: torch.Tensor, held: WeakIdKeyDictionary
) -> torch.Tensor | None:
    """x `[M, K]` times the weights that are held as int8: `[M, N]` in x's dtype, or None if outliers forbid it."""
    out_features, in_features = len(step), x.shape[1]

    def pack(tiles):
        codes = _codes(tiles)[:in_features, :out_features].t().contiguous()
        return torch.ops.onednn.qlinear_prepack(codes, None), torch.zeros(out_features, dtype=torch.long, device="cpu")

    states = x.to(torch.float32, copy=True)
    scale = _int8_scale(states)
    if scale is None:
        return None
    # few significant bits, so that scaling bfloat16 sums is one operation and exact
    scale = scale.bfloat16()
    # oneDNN needs unsigned activations: flipping the sign bit adds 128
    states = states.div_(scale).round_().to(torch.int8).view(torch.uint8).bitwise_xor(128)
    packed, zeros = _derived(held, tiles, pack)
    dtype = x.dtype if x.dtype in (torch.bfloat16, torch.float32) else torch.float32
    out = torch.ops.onednn.qlinear_pointwise.default(
        states, 1.0, 128, packed, step.detach(), zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return out.mul_(scale).to(x.dtype)


def _int8_matmul(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor | None:
    """x `[M, Kp]` times codes, x rounded to int8 with a scale per row: float32, or None if outliers forbid it."""
    x = x.float()
    scale = _int8_scale(x)
    if scale is None:
        return None
    quantized = x.div(scale).round_().to(torch.int8)
    group = _group(TILE_ROWS * tiles.shape[1], x.device)
    return _join([torch._int_mm(quantized, _codes(part)) * scale for part in tiles.split(group)])


def _no_autocast(x: torch.Tensor):
    """Sums over unscaled codes reach past float16's range, so an autocast region around us must not reach in."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device != "meta" else contextlib.nullcontext()


def _exact_matmul(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """x `[M, Kp]` times codes unpacked to bfloat16, a few tiles at a time."""
    group = _group(TILE_ROWS * tiles.shape[1], x.device)
    with _no_autocast(x):
        return _join([x @ _codes(part).to(torch.bfloat16) for part in tiles.split(group)])


def _matmul(x: torch.Tensor, tiles: torch.Tensor, out_features: int, int8: bool) -> torch.Tensor:
    """x `[M, K]` times codes: `[M, N]`, float32 after int8 activations, else bfloat16."""
    x, (rows, in_features) = x.to(torch.bfloat16), x.shape
    if tiles.shape[1] != in_features:
        x = F.pad(x, (0, tiles.shape[1] - in_features))
    if x.device.type != "cpu" or rows == 0:
        out = _exact_matmul(x, tiles)
    elif rows <= (_KERNEL_ROWS if int8 else _KERNEL_ROWS_EXACT):
        out = _kernel_matmul(x.contiguous(), tiles)
    else:
        out = _int8_matmul(x, tiles) if int8 else None
        out = _exact_matmul(x, tiles) if out is None else out
    return out[:, :out_features].contiguous() if out.shape[1] != out_features else out


@torch.library.custom_op("flashlite::int4_matmul", mutates_args=())
def int4_matmul(x: torch.Tensor, tiles: torch.Tensor, out_features: int, int8: bool) -> torch.Tensor:
    """x `[M, K]` of any floating dtype times the codes: bfloat16 `[M, N]`, before steps and bias."""
    return _matmul(x, tiles, out_features, int8).to(torch.bfloat16)


@int4_matmul.register_fake
def _(x, tiles, out_features, int8):
    return x.new_empty(x.shape[0], out_features, dtype=torch.bfloat16)


def _setup_context(ctx, inputs, output):
    x, tiles, _, _ = inputs
    ctx.save_for_backward(tiles)
    ctx.in_features, ctx.dtype = x.shape[1], x.dtype


def _backward(ctx, grad):
    (tiles,) = ctx.saved_tensors
    return int4_matmul_backward(grad, tiles, ctx.in_features).to(ctx.dtype), None, None, None


@torch.library.custom_op("flashlite::int4_matmul_backward", mutates_args=())
def int4_matmul_backward(grad: torch.Tensor, tiles: torch.Tensor, in_features: int) -> torch.Tensor:
    """Gradient `[M, N]` times the codes `[N, K]`: bfloat16 `[M, K]`."""
    grad, out_features = grad.to(torch.bfloat16), grad.shape[1]
    out = grad.new_empty(grad.shape[0], in_features)
    group = _group(TILE_ROWS * tiles.shape[0], grad.device)
    with _no_autocast(grad):
        for first in range(0, in_features, group):
            codes = _codes(tiles[:, first : min(first + group, in_features)]).to(torch.bfloat16)
            out[:, first : first + group] = grad @ codes[:, :out_features].t()
    return out


@int4_matmul_backward.register_fake
def _(grad, tiles, in_features):
    return grad.new_empty(grad.shape[0], in_features, dtype=torch.bfloat16)


int4_matmul.register_autograd(_backward, setup_context=_setup_context)


def _unpacked_matmul(x, tiles, step, numbers, digits) -> torch.Tensor:
    """x `[M, K]` times the weights, unpacked once to bfloat16 with their steps: bfloat16 `[M, N]`.

    Few passes over the weights and none over the output, so that oneDNN's product is most of the time.
    """
    x, columns, steps = x.to(torch.bfloat16), x.shape[1], step.to(torch.bfloat16)
    steps = F.pad(steps, (0, len(tiles) * TILE_ROWS - len(step)))
    group, parts = _group(TILE_ROWS * tiles.shape[1], x.device), []
    with _no_autocast(x):
        for part, own in zip(tiles.split(group), steps.split(group * TILE_ROWS)):
            weight = _codes(part).to(torch.bfloat16)
            if numbers is not None:
                weight[:columns].index_add_(0, numbers[columns:], weight[columns:].mul_(digits))
            parts.append(x @ weight[:columns].mul_(own))
    return _join(parts)


def _plain_linear(x, tiles, step, numbers, factors, int8: bool) -> torch.Tensor:
    """[`int4_linear`] of x `[M, K]` without gradient, in eager mode: `[M, N]`, float32 or bfloat16."""
    held, columns = _int8_held.get(), x.shape[1]
    if x.device.type != "cpu" or len(x) <= (_KERNEL_ROWS if int8 else _KERNEL_ROWS_EXACT):
        return _matmul(spread(x, numbers, factors), tiles, len(step), False) * step
    digits, out = None, None
    if factors is not None:
        scale = factors[:columns]
        x = x * scale.to(x.dtype)
        if numbers is not None:
            digits = (factors[columns:] / scale[numbers[columns:]]).to(torch.bfloat16)[:, None]
    if int8 and numbers is None:
        if held is not None and not step.requires_grad:
            out = _held_linear(x, tiles, step, held)
        if out is None:
            padded = F.pad(x, (0, tiles.shape[1] - columns)) if tiles.shape[1] != columns else x
            out = _int8_matmul(padded.to(torch.bfloat16), tiles)
            out = None if out is None else out[:, : len(step)] * step
    if out is None:
        out = _unpacked_matmul(x, tiles, step, numbers, digits)[:, : len(step)]
    return out


def int4_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    step: torch.Tensor,
    in_features: int,
    bias: torch.Tensor | None = None,
    int8_activations: bool = True,
    numbers: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x @ (code * step).T + bias` on packed codes, differentiable in x, step and bias.

    Args:
        x (`torch.Tensor` `[..., K]`): activations, any floating dtype.
        tiles (`torch.Tensor` uint8 `[ceil(N / 64), Kp, 32]`): see [`tile_codes`].
        step (`torch.Tensor` `[N]`): one step per row.
        in_features (`int`): K.
        bias (`torch.Tensor` `[N]`, *optional*).
        int8_activations (`bool`): many rows without a gradient may be rounded to int8, one scale per row, as long as
            that costs at most 1.5% of the output's root mean square; False keeps bfloat16. Weights with `numbers`
            always keep it.
        numbers, factors (`torch.Tensor`, *optional*): what the columns of the tiles multiply, see [`spread`].

    Returns:
        `torch.Tensor` `[..., N]` in x's dtype, of bfloat16 precision.
    """
    if x.shape[-1] != in_features or not in_features <= tiles.shape[1]:
        raise ValueError(
            f"Activations have {x.shape[-1]} features and the tiles {tiles.shape[1]}, "
            f"but in_features is {in_features}; check the weight's shape."
        )
    rows, out_features = x.reshape(-1, in_features), step.numel()
    needs_grad = torch.is_grad_enabled() and (x.requires_grad or step.requires_grad)
    if needs_grad or torch.compiler.is_compiling() or type(rows) is not torch.Tensor:
        int8 = int8_activations and not needs_grad and numbers is None
        out = int4_matmul(spread(rows, numbers, factors), tiles, out_features, int8) * step
    else:  # in eager inference the custom op's wrapper costs as much as a small product
        out = _plain_linear(rows, tiles, step, numbers, factors, int8_activations)
    if bias is not None:
        out = out + bias
    return out.to(x.dtype).view(*x.shape[:-1], out_features)


def int4_embedding_reference(
    ids: torch.Tensor, tiles: torch.Tensor, step: torch.Tensor, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """`F.embedding` on the dequantized table: what [`int4_embedding`] computes without building it."""
    return F.embedding(ids, dequantize_int4(tiles, step, in_features, dtype))


def int4_embedding(
    ids: torch.Tensor,
    tiles: torch.Tensor,
    step: torch.Tensor,
    in_features: int,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Rows of the dequantized table, bit for bit, differentiable in step.

    Args:
        ids (`torch.Tensor` integer, any shape): rows, 0 <= id < N.
        tiles, step, in_features: as for [`int4_linear`].
        dtype (`torch.dtype`): of the result.

    Returns:
        `torch.Tensor` `[*ids.shape, K]`.
    """
    flat = ids.reshape(-1).long()
    steps = step[flat]  # raises on ids out of range
    slot = flat % TILE_ROWS
    byte = tiles[flat // TILE_ROWS, :in_features, slot % 32]
    nibble = torch.where((slot >= 32)[:, None], byte >> 4, byte & 15)
    rows = (nibble.to(torch.promote_types(step.dtype, torch.float32)) - 8) * steps[:, None]
    return rows.to(dtype).view(*ids.shape, in_features)
