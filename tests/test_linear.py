"""Float32 products by oneDNN: values, gradients, and the cases that keep PyTorch's own call."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from modeling_flashlite import linear_flashlite
from modeling_flashlite.linear_flashlite import Linear, linear


@pytest.fixture
def calls(monkeypatch):
    """How often oneDNN was asked."""
    if not linear_flashlite._has_onednn():
        pytest.skip("this PyTorch has no oneDNN for this processor")
    made = []
    once = linear_flashlite._onednn
    monkeypatch.setattr(linear_flashlite, "_onednn", lambda *args: made.append(1) or once(*args))
    return made


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(), (1,), (3,), (2, 5), (64,)]),
    st.sampled_from([(1024, 512), (512, 1024), (700, 900), (33, 47)]),
    st.booleans(),
    st.integers(0, 9),
)
def test_values_and_gradients_are_those_of_the_truth(rows, shape, with_bias, seed):
    torch.manual_seed(seed)
    n, k = shape
    states = torch.randn(*rows, k, dtype=torch.float64)
    tensors = [states, torch.randn(n, k, dtype=torch.float64) / k**0.5]
    if with_bias:
        tensors.append(torch.randn(n, dtype=torch.float64))
    wanted = [x.clone().requires_grad_() for x in tensors]
    found = [x.float().requires_grad_() for x in tensors]
    target = torch.randn(*rows, n, dtype=torch.float64)
    truth, value = F.linear(*wanted), linear(*found)
    torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(linear(*found), value)
    (truth * target).sum().backward()
    (value * target.float()).sum().backward()
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-4, atol=1e-3)


def test_second_derivatives(calls):
    states, weight = torch.randn(4, 512, requires_grad=True), torch.randn(1024, 512, requires_grad=True)
    results = []
    for function in (F.linear, linear):
        (first,) = torch.autograd.grad(function(states, weight).square().sum(), states, create_graph=True)
        results.append((first.detach(), *torch.autograd.grad(first.square().sum(), [states, weight])))
    for truth, found in zip(*results):
        torch.testing.assert_close(found, truth, rtol=1e-3, atol=1e-3 * float(truth.abs().max()))
    assert calls


def test_only_plain_large_float32_layers_go_there(calls):
    layer, states = Linear(512, 1024), torch.randn(2, 512)
    hooked, replaced = Linear(512, 1024), Linear(512, 1024)
    hooked.register_forward_hook(lambda module, args, output: output + 1)
    replaced.forward = lambda states: -nn.Linear.forward(replaced, states)
    hooked_output = hooked(states)
    torch.testing.assert_close(hooked_output, nn.Linear.forward(hooked, states) + 1, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1
    torch.testing.assert_close(replaced(states), -nn.Linear.forward(replaced, states))
    Linear(64, 64)(torch.randn(1, 64))
    layer.double()(states.double())
    layer.bfloat16()(states.bfloat16())
    layer.float()
    assert layer(states[:0]).shape == (0, 1024)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(states).dtype == torch.bfloat16
    jacobian = torch.func.jacrev(lambda row: layer(row).sum())(states)
    torch.testing.assert_close(jacobian, layer.weight.sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)
    with torch.backends.mkldnn.flags(enabled=False):
        layer(states)
    assert len(calls) == 1
    torch.testing.assert_close(layer(states), nn.Linear.forward(layer, states), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
