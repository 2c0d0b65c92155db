"""The loss hook: token-chunked losses that never build the whole `[B, T, V]` logits.

A language-model head of this package calls `loss_function(hidden_states=, lm_head=, labels=, vocab_size=,
num_items_in_batch=, **kwargs)` and gets a scalar back. Cross-entropy lives here; distillation plugs in a callable of
the same signature. Letters: B batch, T target, D model, V vocabulary, N labelled tokens, C tokens of a chunk.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .ecq_twins_flashlite import FakeQuantLinear
from .linear_flashlite import Linear, is_hooked, linear

# logits of one chunk, 8 MiB in float32: large enough for a full-speed product, small enough to stay in a cache while
# softmax and its gradient pass over them, which halves the time of the loss on a CPU
CHUNK_LOGITS = 1 << 21
# a head that gathers its weight on every call must be called equally often on every rank, whatever its labels are
SHARDED_HEAD_CHUNKS = 4
IGNORE_INDEX = -100


def check_loss_function(loss_function) -> None:
    """Raise `TypeError` unless `loss_function` is a plain callable.

    PyTorch registers an `nn.Module` assigned to `model.loss_function` as a submodule: the hook is never called, and
    its weights enter the optimizer and the checkpoint.
    """
    if isinstance(loss_function, nn.Module):
        raise TypeError(
            f"loss_function is the nn.Module {type(loss_function).__name__}, which PyTorch would register as a "
            "submodule and never call; pass a plain callable, such as a function or a dataclass with __call__."
        )
    if not callable(loss_function):
        raise TypeError(f"loss_function is {loss_function!r}, which is not callable; pass a function.")


def is_sharded(lm_head: nn.Module) -> bool:
    """Whether calling `lm_head` gathers its weight from other ranks (FSDP2's `DTensor`, DeepSpeed's partitions)."""
    return any(type(p).__name__ == "DTensor" or hasattr(p, "ds_id") for p in lm_head.parameters())


def is_plain_linear(lm_head: nn.Module) -> bool:
    """Whether calling `lm_head` is a product with `lm_head.weight` (fake-quantized in training) and nothing else.

    False for subclasses and wrappers (adapters, parametrizations), for tensor subclasses, and where hooks or a
    replaced `forward` (offloading, tensor parallelism) would be skipped.
    """
    return (
        type(lm_head) in (nn.Linear, Linear, FakeQuantLinear)
        and type(lm_head.weight) in (nn.Parameter, torch.Tensor)
        and not is_hooked(lm_head)
        and not is_sharded(lm_head)
    )


def chunked_cross_entropy(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: int | torch.Tensor | None = None,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    logits: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    r"""Cross-entropy of `softmax(lm_head(hidden_states))` against aligned labels, a chunk of tokens at a time.

    `L = -1/n * sum over labels != -100 of log softmax(lm_head(h_t))[y_t]`, in float32, `n = num_items_in_batch` or
    else the number of labelled tokens. Equal to [`chunked_cross_entropy_reference`], values and gradients.

    Args:
        hidden_states (`torch.Tensor` of shape `[B, T, D]`): states before the head.
        lm_head (`nn.Module`): the head, `[*, D] -> [*, V]`; anything but a plain `nn.Linear` is called as a module.
        labels (`torch.Tensor` of shape `[B, T]`): target of each state, already shifted; -100 is ignored.
        vocab_size (`int`, *optional*): part of the hook's signature; the head decides the width.
        num_items_in_batch (`int` or `torch.Tensor`, *optional*): labelled tokens of the whole accumulated batch.
        label_smoothing (`float`, *optional*, defaults to 0.0): share of the uniform distribution in the target.
        chunk_size (`int`, *optional*): tokens of a chunk; by default as many as keep the chunk's logits at 8 MiB.
        logits (`torch.Tensor` of shape `[B, T, V]`, *optional*): the head's output, if already computed; the head is
            then not run again.

    Returns:
        `torch.Tensor`: scalar in float32 (float64 for float64 states); 0 where no token is labelled.
    """

    def row_loss(logits, labels):
        return (F.cross_entropy(logits, labels, reduction="sum", label_smoothing=label_smoothing),)

    if logits is not None:  # already computed: dropping rows would copy all the others
        labels = labels.to(logits.device).flatten()
        (total,), count = row_loss(at_least_float32(logits.flatten(0, -2)), labels), (labels != IGNORE_INDEX).sum()
        return total / divisor(count if num_items_in_batch is None else num_items_in_batch, 1, total)
    (total,), count = chunked_sum(hidden_states, lm_head, labels, row_loss, (), chunk_size)
    return total / divisor(num_items_in_batch, count, total)


def chunked_cross_entropy_reference(
    hidden_states, lm_head, labels, vocab_size=None, num_items_in_batch=None, label_smoothing=0.0, **kwargs
):
    """The definition of [`chunked_cross_entropy`]: all logits at once, plain autograd."""
    logits = at_least_float32(lm_head(hidden_states)).flatten(0, -2)
    total = F.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=label_smoothing)
    return total / divisor(num_items_in_batch, int((labels != IGNORE_INDEX).sum()), total)


def chunked_sum(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor,
    row_loss: Callable[..., tuple[torch.Tensor, ...]],
    columns: Sequence[torch.Tensor] = (),
    chunk_size: int | None = None,
    logits: torch.Tensor | None = None,
) -> tuple[tuple[torch.Tensor, ...], int]:
    """Sum `row_loss` over the labelled tokens without building all logits.

    Only the first sum carries a gradient, to the hidden states and to the head. The label mask is the only mask: a
    token whose label is -100 never reaches the head. With a plain `nn.Linear` or its fake-quantized twin, the
    gradient is computed in the forward pass, chunk by chunk; any other head is called as a module and recomputed in
    the backward pass.

    Args:
        row_loss (`Callable`): `(logits [C, V], labels [C], *columns [C, ...]) -> tuple` of sums over the rows.
        columns (sequence of `torch.Tensor` of shape `[B, T, ...]`): what `row_loss` needs beside the labels.
        logits (`torch.Tensor` of shape `[B, T, V]`, *optional*): the head's output, if already computed.

    Returns:
        `tuple`: the sums, and the number of labelled tokens.
    """
    labels = labels.to(hidden_states.device).flatten()
    columns = [column.flatten(0, 1) for column in columns]
    index = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    if logits is not None:
        logits = at_least_float32(logits.flatten(0, -2)[index])
        beside = (column[index.to(column.device)].to(logits.device) for column in columns)
        return row_loss(logits, labels[index], *beside), len(index)
    states = hidden_states.flatten(0, -2)[index]
    if is_sharded(lm_head):
        pieces = index.tensor_split(SHARDED_HEAD_CHUNKS)
    else:
        # each chunk reads the head and its gradient once, which would dominate the cost of fewer tokens
        least = max(1, states.shape[-1] // 4)
        pieces = index.split(chunk_size or max(least, CHUNK_LOGITS // getattr(lm_head, "out_features", 1 << 15)))

    def rows(piece):  # sliced per chunk, so that dense teacher logits are not copied as a whole
        return labels[piece], *(column[piece.to(column.device)].to(states.device) for column in columns)

    if torch.is_grad_enabled() and is_plain_linear(lm_head):
        # rounded once for all chunks
        weight = lm_head.fake_quantized() if type(lm_head) is FakeQuantLinear else lm_head.weight
        return _LinearSum.apply(states, weight, lm_head.bias, row_loss, rows, pieces), len(index)

    def head_loss(part, piece):
        return row_loss(at_least_float32(lm_head(part)), *rows(piece))

    values = []
    for part, piece in zip(states.split([len(p) for p in pieces]), pieces, strict=True):
        if torch.is_grad_enabled():
            values.append(checkpoint(head_loss, part, piece, use_reentrant=False))
        else:
            values.append(head_loss(part, piece))
    totals: list = [sum(column) for column in zip(*values, strict=True)]
    first, *others = totals
    return (first, *(other.detach() for other in others)), len(index)


def at_least_float32(logits: torch.Tensor) -> torch.Tensor:
    """Promote half precision to float32; float32 and float64 are unchanged."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def divisor(num_items_in_batch: int | torch.Tensor | None, count: int, like: torch.Tensor) -> int | torch.Tensor:
    """The number a sum over labelled tokens is divided by: the accumulated batch's if given, else this batch's."""
    items = count if num_items_in_batch is None else num_items_in_batch
    return items.to(like.device).clamp(min=1) if isinstance(items, torch.Tensor) else max(items, 1)


class _LinearSum(torch.autograd.Function):
    """Sum of `row_loss` over the chunks of a plain linear head, with the gradient taken in the forward pass."""

    @staticmethod
    def forward(ctx, states, weight, bias, row_loss, rows, pieces):
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wide = torch.promote_types(weight.dtype, torch.float32)  # sums over the chunks
        grad_states = torch.zeros_like(states) if needs_states else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        sums, start, device, dtypes = None, 0, states.device.type, (states.dtype, weight.dtype)
        if torch.is_autocast_enabled(device):  # which would convert the weight in every chunk
            weight = weight.to(torch.get_autocast_dtype(device))
        for piece in pieces:
            part = states[start : start + len(piece)]
            logits = linear(part, weight, bias).requires_grad_()
            with torch.enable_grad():
                values = row_loss(at_least_float32(logits), *rows(piece))
                (grad,) = torch.autograd.grad(values[0], logits)
            if needs_states:
                grad_states[start : start + len(piece)] = linear(grad, weight.to(grad.dtype).t())
            if needs_weight and grad.dtype == part.dtype == wide:
                grad_weight.addmm_(grad.t(), part)
            elif needs_weight:
                grad_weight += grad.t() @ part.to(grad.dtype)
            if needs_bias:
                grad_bias += grad.sum(0, dtype=wide)
            values = [value.detach() for value in values]
            sums = values if sums is None else [a + b for a, b in zip(sums, values, strict=True)]
            start += len(piece)
        ctx.save_for_backward(grad_states, grad_weight, grad_bias)
        ctx.dtypes = dtypes
        ctx.mark_non_differentiable(*sums[1:])
        return tuple(sums)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        dtypes = (ctx.dtypes[0], ctx.dtypes[1], ctx.dtypes[1])
        grads = [None if g is None else (g * grad).to(d) for g, d in zip(ctx.saved_tensors, dtypes, strict=True)]
        return *grads, None, None, None
