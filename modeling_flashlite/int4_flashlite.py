"""Products and look-ups of packed 4-bit weights (see `tiles_flashlite`): linear layers, embeddings, tied heads.

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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from .int8_flashlite import digits_of, held_codes, held_linear, int8_matmul
from .rare_flashlite import RareDigits, ScaledDigits
from .tiles_flashlite import (
    TILE_ROWS,
    dequantize_int4,
    derived,
    group_of,
    join_columns,
    kernel_group,
    tile_codes,
    unpack,
)

_KERNEL_ROWS = 16  # M up to which the int4 kernel beats unpacking to int8
_KERNEL_ROWS_EXACT = 36  # ... and unpacking to bfloat16
_HELD_ROWS = 4  # M up to which it beats codes that are held as int8


def int4_linear_reference(
    x: torch.Tensor,
    tiles: torch.Tensor,
    step: torch.Tensor,
    in_features: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`F.linear` with the dequantized weight in x's dtype: what [`int4_linear`] approximates to bfloat16 precision."""
    return F.linear(x, dequantize_int4(tiles, step, in_features, x.dtype), bias)


@functools.lru_cache(maxsize=1)
def _tiles_fit_kernel() -> bool:
    """Whether this processor's int4 kernel reads tiles as they are (AVX-512 does)."""
    codes = (torch.arange(64 * 32, device="cpu") * 7919 % 251 % 16 - 8).to(torch.int8).view(64, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
    return torch.equal(packed.view(-1), tile_codes(codes).view(-1))


_kernel_forms = WeakIdKeyDictionary()


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
    return derived(_kernel_forms, tiles, _reordered)


@functools.lru_cache(maxsize=64)
def _unit_scales(groups: int, rows: int) -> torch.Tensor:
    """Scale 1 and zero point 0 for every group; the steps are applied afterwards, in float32."""
    with torch.inference_mode(False):
        ones = torch.ones(groups, rows, dtype=torch.bfloat16, device="cpu")
        return torch.stack([ones, torch.zeros_like(ones)], -1)


def _kernel_matmul(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    group = kernel_group(tiles.shape[1])
    scales = _unit_scales(tiles.shape[1] // group, tiles.shape[0] * TILE_ROWS)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x, _kernel_form(tiles), group, scales)


class KernelWeight(NamedTuple):
    """A weight with its steps as PyTorch's kernel takes them, and what its inputs are made of.

    Attributes:
        packed (`torch.Tensor` uint8 `[64 * tiles, Kp / 2]`): the tiles' own memory where their order fits.
        columns (`int`): K.
        group (`int`): columns that share a scale.
        scales (`torch.Tensor` bfloat16 `[Kp / group, 64 * tiles, 2]`): steps rounded to bfloat16, and zeros.
        numbers (`torch.Tensor` int64 `[Kp]`, *optional*): the input that each column of the tiles multiplies.
        factors (`torch.Tensor` bfloat16 `[Kp]` or `[K]`, *optional*): what that input is multiplied by before.
        rare ([`ScaledDigits`], *optional*): of `64 * tiles` rows.
    """

    packed: torch.Tensor
    columns: int
    group: int
    scales: torch.Tensor
    numbers: torch.Tensor | None = None
    factors: torch.Tensor | None = None
    rare: ScaledDigits | None = None

    @classmethod
    def of(
        cls,
        tiles: torch.Tensor,
        step: torch.Tensor,
        columns: int,
        numbers: torch.Tensor | None = None,
        factors: torch.Tensor | None = None,
        rare: RareDigits | None = None,
    ) -> KernelWeight:
        """Tiles and steps made ready for [`int4_few_rows`]: one byte more for every 16 to 64 weights."""
        group, rows = kernel_group(tiles.shape[1]), len(tiles) * TILE_ROWS
        steps = F.pad(step.detach().to(torch.bfloat16), (0, rows - len(step)))
        scales = torch.stack([steps, torch.zeros_like(steps)], -1).expand(tiles.shape[1] // group, -1, -1)
        factors = None if factors is None else factors.detach().to(torch.bfloat16)
        scaled = None if rare is None else ScaledDigits.of(rare.padded(rows), step)
        return cls(_kernel_form(tiles), columns, group, scales.contiguous(), numbers, factors, scaled)

    @staticmethod
    def most_rows() -> int:
        """Rows of activations up to which this is faster than unpacking."""
        return _KERNEL_ROWS if held_codes() is None else _HELD_ROWS

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """x `[M, K]` of any floating dtype times the weight: bfloat16 `[M, 64 * tiles]`."""
        return self.product(spread(x.to(torch.bfloat16), self.numbers, self.factors))

    def product(self, rows: torch.Tensor) -> torch.Tensor:
        """As [`rows`], of inputs bfloat16 `[M, K or Kp]` that have their numbers and factors."""
        padded = 2 * self.packed.shape[1]
        wide = rows.contiguous() if padded == rows.shape[1] else F.pad(rows, (0, padded - rows.shape[1]))
        out = torch.ops.aten._weight_int4pack_mm_for_cpu.default(wide, self.packed, self.group, self.scales)
        if self.rare is None:
            return out
        own = rows if rows.shape[1] == self.columns else rows.narrow(1, 0, self.columns)
        return self.rare.add_to(out, own, self.scales[0, :, 0])


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
    return are_few_rows(x.numel() // max(x.shape[-1], 1))


def are_few_rows(count: int) -> bool:
    """See [`is_few_rows`]."""
    return 0 < count <= KernelWeight.most_rows()


def int4_few_rows(x: torch.Tensor, weight: KernelWeight, out_features: int) -> torch.Tensor:
    """[`int4_linear`] for few rows, without gradient, in one call of the kernel, which also applies the steps.

    The steps lose up to 2^-9 of their value in bfloat16. Bfloat16 callers save a rounding for it: the same error
    (0.3% of the output's root mean square on random values); float32 callers have 0.3 instead of 0.23%.

    Args:
        x (`torch.Tensor` `[..., K]`): activations on the CPU, any floating dtype.
        weight ([`KernelWeight`]): see its `of`.
        out_features (`int`): N.

    Returns:
        `torch.Tensor` `[..., N]` in x's dtype.
    """
    *batch, in_features = x.shape
    out = weight.rows(x.reshape(-1, in_features))
    if out.shape[1] != out_features:
        out = out[:, :out_features].contiguous()
    return out.to(x.dtype).view(*batch, out_features)


def _no_autocast(x: torch.Tensor):
    """Sums over unscaled codes reach past float16's range, so an autocast region around us must not reach in."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if device != "meta" else contextlib.nullcontext()


def _exact_matmul(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """x `[M, Kp]` times codes unpacked to bfloat16, a few tiles at a time."""
    group = group_of(TILE_ROWS * tiles.shape[1], x.device)
    with _no_autocast(x):
        return join_columns([x @ unpack(part).to(torch.bfloat16) for part in tiles.split(group)])


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
        out = int8_matmul(x, tiles) if int8 else None
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
    group = group_of(TILE_ROWS * tiles.shape[0], grad.device)
    with _no_autocast(grad):
        for first in range(0, in_features, group):
            codes = unpack(tiles[:, first : min(first + group, in_features)]).to(torch.bfloat16)
            out[:, first : first + group] = grad @ codes[:, :out_features].t()
    return out


@int4_matmul_backward.register_fake
def _(grad, tiles, in_features):
    return grad.new_empty(grad.shape[0], in_features, dtype=torch.bfloat16)


int4_matmul.register_autograd(_backward, setup_context=_setup_context)


def _unpacked_matmul(x, tiles, steps, numbers, factors, rare) -> torch.Tensor:
    """x `[M, K]` times the weights, unpacked once to bfloat16 with their steps: bfloat16 `[M, 64 * tiles]`.

    Few passes over the weights and none over the output, so that oneDNN's product is most of the time.
    """
    columns, digits, parts = x.shape[1], None, []
    if factors is not None:
        x = x * factors[:columns].to(x.dtype)
    if numbers is not None:
        digits = digits_of(numbers, factors, columns).to(torch.bfloat16)
    x, steps, group = x.to(torch.bfloat16), steps.to(torch.bfloat16), group_of(TILE_ROWS * tiles.shape[1], x.device)
    rows = range(0, len(steps), group * TILE_ROWS)
    with _no_autocast(x):
        for first, part, own in zip(rows, tiles.split(group), steps.split(group * TILE_ROWS)):
            weight = unpack(part).to(torch.bfloat16)
            if digits is not None:
                weight[:columns].index_add_(0, numbers[columns:], weight[columns:].mul_(digits))
            if rare is not None:
                rare.add_to(weight, first)
            parts.append(x @ weight[:columns].mul_(own))
    return join_columns(parts)


def _plain_linear(x, tiles, step, numbers, factors, rare, int8: bool) -> torch.Tensor:
    """[`int4_linear`] of x `[M, K]` without gradient, in eager mode: `[M, N]` of some floating dtype."""
    on_cpu = x.device.type == "cpu"
    if int8 and on_cpu and len(x) > _HELD_ROWS and not step.requires_grad:
        out = held_linear(x, tiles, step, numbers, factors, rare)
        if out is not None:
            return out
    if not on_cpu or len(x) <= (_KERNEL_ROWS if int8 else _KERNEL_ROWS_EXACT):
        return _with_rare(_matmul(spread(x, numbers, factors), tiles, len(step), False), x, factors, rare) * step
    if int8 and numbers is None and rare is None:
        out = int8_matmul(x if factors is None else x * factors[: x.shape[1]], tiles)
        if out is not None:
            return out[:, : len(step)] * step
    steps = F.pad(step, (0, len(tiles) * TILE_ROWS - len(step)))
    return _unpacked_matmul(x, tiles, steps, numbers, factors, rare)[:, : len(step)]


def _with_rare(out: torch.Tensor, x: torch.Tensor, factors, rare: RareDigits | None) -> torch.Tensor:
    """Add what rare digits contribute to the product `[M, N]` of x `[M, K]`, before steps."""
    if rare is None:
        return out
    x = x if factors is None else x * factors[: x.shape[1]].to(x.dtype)
    return out + rare.product(x.float())  # more than bfloat16: the first digits of these codes cancel a part of it


def int4_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    step: torch.Tensor,
    in_features: int,
    bias: torch.Tensor | None = None,
    int8_activations: bool = True,
    numbers: torch.Tensor | None = None,
    factors: torch.Tensor | None = None,
    rare: RareDigits | None = None,
) -> torch.Tensor:
    """`x @ (code * step).T + bias` on packed codes, differentiable in x, step and bias.

    Args:
        x (`torch.Tensor` `[..., K]`): activations, any floating dtype.
        tiles (`torch.Tensor` uint8 `[ceil(N / 64), Kp, 32]`): see [`tile_codes`].
        step (`torch.Tensor` `[N]`): one step per row.
        in_features (`int`): K.
        bias (`torch.Tensor` `[N]`, *optional*).
        int8_activations (`bool`): many rows without a gradient may be rounded to int8, one scale per row, as long as
            that costs at most 1.5% of the output's root mean square; False keeps bfloat16. Weights with `numbers` or
            rare digits keep it for prompts: there int8 was 3% faster, and perplexity 0.8% higher.
        numbers, factors (`torch.Tensor`, *optional*): what the columns of the tiles multiply, see [`spread`].
        rare ([`RareDigits`], *optional*): what is added to single codes.

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
        int8 = int8_activations and not needs_grad and numbers is None and rare is None
        out = int4_matmul(spread(rows, numbers, factors), tiles, out_features, int8)
        out = _with_rare(out, rows, factors, rare) * step
    else:  # in eager inference the custom op's wrapper costs as much as a small product
        out = _plain_linear(rows, tiles, step, numbers, factors, rare, int8_activations)
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
    rare: RareDigits | None = None,
) -> torch.Tensor:
    """Rows of the dequantized table, bit for bit, differentiable in step.

    Args:
        ids (`torch.Tensor` integer, any shape): rows, 0 <= id < N.
        tiles, step, in_features: as for [`int4_linear`].
        dtype (`torch.dtype`): of the result.
        rare ([`RareDigits`], *optional*): what is added to single codes.

    Returns:
        `torch.Tensor` `[*ids.shape, K]`.
    """
    flat = ids.reshape(-1).long()
    steps = step[flat]  # raises on ids out of range
    slot = flat % TILE_ROWS
    byte = tiles[flat // TILE_ROWS, :in_features, slot % 32]
    nibble = torch.where((slot >= 32)[:, None], byte >> 4, byte & 15)
    codes = nibble.to(torch.promote_types(step.dtype, torch.float32)) - 8
    if rare is not None:
        codes = codes + _rare_rows(flat, *rare, in_features)
    return (codes * steps[:, None]).to(dtype).view(*ids.shape, in_features)


@torch.library.custom_op("flashlite::rare_rows", mutates_args=())
def _rare_rows_op(
    ids: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, width: int
) -> torch.Tensor:
    """[`RareDigits.look_up`], whose sizes depend on the ids: what a compiler need not see."""
    return RareDigits(starts, columns, values).look_up(ids, width)


@_rare_rows_op.register_fake
def _(ids, starts, columns, values, width):
    return ids.new_empty(len(ids), width, dtype=torch.float32)


def _rare_rows(ids, starts, columns, values, width: int) -> torch.Tensor:
    if torch.compiler.is_compiling() or type(ids) is not torch.Tensor:
        return _rare_rows_op(ids, starts, columns, values, width)
    return RareDigits(starts, columns, values).look_up(ids, width)
