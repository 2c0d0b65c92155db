"""Linear layers whose float32 products on a CPU use oneDNN where it is faster than MKL.

PyTorch sends bfloat16 products to oneDNN and float32 products to MKL. On non-Intel CPUs MKL takes twice as long, and
uses a single thread for single-row inputs. `torch.nn.functional.linear` is the reference.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.nn import functional as F

from .compat_flashlite import private_operator

# multiplications (half as many for a single row) above which oneDNN's larger overhead is negligible
_MANY = 1 << 19


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__


@functools.lru_cache(maxsize=1)
def _has_onednn() -> bool:
    available = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return available and private_operator("mkldnn", "_linear_pointwise") is not None


def _onednn(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise.default(states, weight, bias, "none", [], "")


def _takes_onednn(states: torch.Tensor, weight: torch.Tensor) -> bool:
    plain = torch.Tensor, nn.Parameter
    return (
        states.dtype == weight.dtype == torch.float32
        and states.dim() > 1
        and states.numel() > 0
        and weight.numel() * max(states.numel() // states.shape[-1], 2) >= _MANY
        and type(states) in plain
        and type(weight) in plain
        and states.device.type == weight.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and torch._C._functorch.maybe_current_level() is None
        and torch.backends.mkldnn.enabled
        and _has_onednn()
    )


class _Linear(torch.autograd.Function):
    """`states [..., K] @ weight [N, K].T + bias`, and its gradients, by oneDNN."""

    @staticmethod
    def forward(ctx, states, weight, bias):
        ctx.save_for_backward(states, weight)
        return _onednn(states, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        states, weight = ctx.saved_tensors
        product = F.linear if torch.is_grad_enabled() else _onednn  # F.linear has second derivatives
        rows, needed = grad.flatten(0, -2), ctx.needs_input_grad
        grad_states = product(grad, weight.t()) if needed[0] else None
        grad_weight = product(rows.t(), states.flatten(0, -2).t()) if needed[1] else None
        return grad_states, grad_weight, rows.sum(0) if needed[2] else None


def linear(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, faster for plain float32 tensors on a CPU: `[..., K]`, `[N, K]` -> `[..., N]`."""
    if not _takes_onednn(states, weight):
        return F.linear(states, weight, bias)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (states, weight, bias)):
        return _Linear.apply(states, weight, bias)
    return _onednn(states, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` whose product is taken by [`linear`]."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """`[..., in_features]` -> `[..., out_features]`."""
        return linear(input, self.weight, self.bias)
