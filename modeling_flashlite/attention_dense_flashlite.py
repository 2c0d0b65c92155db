"""Attention in which every query sees all keys up to its own, or all keys of a band.

PyTorch's kernels, explicit weights where there are few of them, and one softmax over several sets of keys.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Where keys and values differ in width, up to this many weights (of all heads) are computed explicitly.
_FEW_WEIGHTS = 1 << 23


def query_slots(start: int | Tensor, length: int, device: torch.device) -> Tensor:
    """Slots of the queries, [1 or B, length]."""
    offsets = torch.arange(length, device=device)
    return (start[:, None] if isinstance(start, Tensor) else start) + offsets[None, :]


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False, scaling: float | None = None
) -> Tensor:
    """Dense attention [B, H, T, dv] by the fastest method at this size; `mask` is boolean, true where a key is seen.

    PyTorch's CPU kernel requires values as wide as the keys, so narrower ones are padded; with few weights, computing
    them explicitly takes half the time or less.
    """
    scaling = q.shape[-1] ** -0.5 if scaling is None else scaling
    width, groups = v.shape[3], q.shape[1] // k.shape[1]
    if width < k.shape[3]:
        fits = q.device.type == "cpu" and q.dtype != torch.float16 and not torch.compiler.is_exporting()
        if fits and q.shape[:3].numel() * k.shape[2] <= _FEW_WEIGHTS:
            return _explicit_attention(q, k, v, mask, causal, scaling)
        v = F.pad(v, (0, k.shape[3] - width))
    if q.shape[2] == 1 and groups > 1:
        # The queries of a group are rows of one product, so that keys are read once per group.
        rows = q.unflatten(1, (k.shape[1], groups)).squeeze(3)
        out = F.scaled_dot_product_attention(rows, k, v, mask, scale=scaling).flatten(1, 2).unsqueeze(2)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scaling, enable_gqa=groups > 1)
    return out[..., :width]


def _explicit_attention(q, k, v, mask: Tensor | None, causal: bool, scaling: float) -> Tensor:
    """Attention with explicit weights: faster than a kernel with padded values if there are few weights."""
    batch, hkv, s = k.shape[:3]
    rows, k, v_rows = (x.reshape(batch * hkv, -1, x.shape[3]) for x in (q * scaling, k, v))
    if causal:
        mask = torch.ones(q.shape[2], s, dtype=torch.bool, device=q.device).tril_()[None, None]
    logits = torch.bmm(rows, k.mT)
    if mask is not None:
        # finite, so that a row of only padding gives finite results
        lowest = torch.finfo(logits.dtype).min
        logits = logits.view(batch, hkv, -1, *mask.shape[2:]).masked_fill(~mask[:, :, None], lowest).view_as(logits)
    return torch.bmm(logits.softmax(-1), v_rows).view(*q.shape[:3], v.shape[3]).to(v.dtype)


def causal_attention(q, k, v, start, scaling, cross) -> Tensor:
    """Every query sees every token up to its own."""
    length = q.shape[2]
    end = start + length if isinstance(start, int) else k.shape[2]
    k, v, mask = k[:, :, :end], v[:, :, :end], None
    if length == 1 and isinstance(start, int) and not torch.compiler.is_exporting():
        if cross is None:
            return _joint_step(q, [k], [v], scaling, None)
        return _joint_step(q, [k, cross[0]], [v, cross[1]], scaling, cross[2])
    if cross is not None or isinstance(start, Tensor) or (start and length > 1):
        slots = query_slots(start, length, q.device)[:, :, None]
        mask = (torch.arange(k.shape[2], device=q.device) <= slots)[:, None]
        if cross is not None:
            k, v = torch.cat([k, cross[0]], 2), torch.cat([v, cross[1]], 2)
            extra = cross[2] if cross[2] is not None else mask.new_ones(q.shape[0], cross[0].shape[2])
            mask, extra = mask.expand(q.shape[0], -1, -1, -1), extra.bool()[:, None, None, :]
            mask = torch.cat([mask, extra.expand(-1, -1, length, -1)], 3)
    return dense_attention(q, k, v, mask, bool(mask is None and length > 1), scaling)


def _joint_step(q: Tensor, keys: list, values: list, scaling: float | None, last_mask: Tensor | None) -> Tensor:
    """One query per row over several sets of keys [B, Hkv, S, dk], none copied; the mask [B, S] is the last set's."""
    batch, heads, hkv = q.shape[0], q.shape[1], keys[0].shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    rows = (q * (q.shape[-1] ** -0.5 if scaling is None else scaling)).reshape(batch * hkv, heads // hkv, -1).to(wide)
    logits = [torch.bmm(rows, x.flatten(0, 1).to(wide).mT) for x in keys]
    if last_mask is not None:
        logits[-1].view(batch, -1, last_mask.shape[1]).masked_fill_(~last_mask.bool()[:, None], -math.inf)
    out = joint_attention(logits, [x.flatten(0, 1).to(wide) for x in values])
    return out.view(batch, heads, 1, -1).to(values[0].dtype)


def joint_weights(logits: list[Tensor]) -> tuple[Tensor, ...]:
    """One softmax over several sets of logits [N, R, S], each set's weights by themselves."""
    return torch.cat(logits, 2).softmax(2).split_with_sizes([x.shape[2] for x in logits], 2)


def joint_attention(logits: list[Tensor], values: list[Tensor]) -> Tensor:
    """One softmax over several sets of logits [N, R, S] and values [N, S, dv]; [N, R, dv]."""
    weights = joint_weights(logits)
    out = torch.bmm(weights[0], values[0])
    for weight, value in zip(weights[1:], values[1:]):
        out = torch.baddbmm(out, weight, value)
    return out


def window_attention(q, k, v, b, reach, start, scaling, cross, first_query) -> Tensor:
    """A band: every query sees every token of its last `reach` blocks, of its own block and of the first one."""
    back, length = reach * b, q.shape[2]
    if first_query is not None:
        # one product for both kinds of queries: each has zeros in the dimensions of the other
        scaling = q.shape[3] ** -0.5 if scaling is None else scaling
        (q, k), first_k = (F.pad(x, (0, x.shape[3])) for x in (q, k)), F.pad(k[:, :, :b], (k.shape[3], 0))
        q = torch.cat([q[..., : first_query.shape[3]], first_query], 3)
        cross = cross and (F.pad(cross[0], (0, cross[0].shape[3])), *cross[1:])
        k = torch.cat([first_k, k[:, :, b:]], 2)
    pieces = []
    for lo in range(0, length, max(back, 256)):
        hi = min(lo + max(back, 256), length)
        slots = query_slots(start, length, q.device)[:, lo:hi, None]
        oldest, newest = (int(slots.min()) // b) * b - back, int(slots.max()) + 1
        keys = torch.arange(newest, device=q.device)
        keys = keys[(keys < b) | (keys >= oldest)]
        mask = ((keys <= slots) & ((keys >= slots // b * b - back) | (keys < b)))[:, None]
        origin = max(oldest, b)
        part_k, part_v = (torch.cat([x[:, :, : min(b, newest)], x[:, :, origin:newest]], 2) for x in (k, v))
        if cross is not None:
            part_k, part_v = torch.cat([part_k, cross[0]], 2), torch.cat([part_v, cross[1]], 2)
            extra = cross[2] if cross[2] is not None else mask.new_ones(q.shape[0], cross[0].shape[2])
            extra = extra.bool()[:, None, None, :].expand(-1, -1, hi - lo, -1)
            mask = torch.cat([mask.expand(q.shape[0], -1, -1, -1), extra], 3)
        pieces.append(dense_attention(q[:, :, lo:hi], part_k, part_v, mask, False, scaling))
    return torch.cat(pieces, 2)
