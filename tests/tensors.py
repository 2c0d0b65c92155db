"""Random queries, keys and values for the tests of attention."""

import torch

from modeling_flashlite.attention_dense_flashlite import query_slots


def random(*shape, grad=False, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=grad)


def qkv(batch=1, heads=4, hkv=2, queries=40, keys=None, dk=8, dv=8, grad=False, dtype=torch.float64):
    keys = queries if keys is None else keys
    shapes = (batch, heads, queries, dk), (batch, hkv, keys, dk), (batch, hkv, keys, dv)
    return tuple(random(*shape, grad=grad, dtype=dtype) for shape in shapes)


def dense(q, k, v):
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


def largest_gap(expected, actual):
    return max((x - y).abs().max().item() for x, y in zip(expected, actual, strict=True))


def cross_inputs(kind, batch, hkv, dv, grad):
    if kind is None:
        return None
    mask = None
    if kind == "masked":
        mask = torch.ones(batch, 5, dtype=torch.bool)
        mask[0] = False
        mask[-1, 3:] = False
    return random(batch, hkv, 5, 8, grad=grad), random(batch, hkv, 5, dv, grad=grad), mask


def first_queries(q, spec, start):
    """Queries for the first block, and what they are where it may be met by others than `q`; needs a memory."""
    slots = query_slots(start, q.shape[2], q.device)[:, None, :, None]
    far = slots // spec.block_size >= spec.reach + 1
    others = torch.randn_like(q).requires_grad_(q.requires_grad)
    return torch.where(far, others, q), others
