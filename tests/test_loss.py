"""The chunked cross-entropy equals its dense definition, values and gradients, whatever the head is."""

import copy

import pytest
import torch
from torch import nn

from modeling_flashlite.ecq_twins_flashlite import FakeQuantLinear, to_twin
from modeling_flashlite.ecq_weight_flashlite import QuantizedWeight
from modeling_flashlite.loss_flashlite import (
    check_loss_function,
    chunked_cross_entropy,
    chunked_cross_entropy_reference,
    is_plain_linear,
)

D, V = 16, 37


def make_case(dtype=torch.float64, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(D, V, bias=bias).to(dtype)
    states = torch.randn(3, 7, D, generator=generator, dtype=dtype).requires_grad_()
    labels = torch.randint(0, V, (3, 7), generator=generator)
    labels[0, 4:] = -100
    labels[2] = -100
    return states, head, labels


def gradients(loss_function, states, head, labels, **kwargs):
    loss = loss_function(hidden_states=states, lm_head=head, labels=labels, vocab_size=V, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, [states, *head.parameters()])


class WrappedHead(nn.Module):
    """A head whose weight must not be read from outside: scale and soft cap come after the product."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, states):
        return 5 * torch.tanh(self.linear(states) / 5)


@pytest.mark.parametrize("chunk_size", [4, None])
@pytest.mark.parametrize("bias", [False, True])
def test_fake_quantized_head_is_read_once_and_equals_its_call(chunk_size, bias):
    states, head, labels = make_case(torch.float32, bias)
    levels = QuantizedWeight(
        torch.zeros(head.weight.shape, dtype=torch.int8), 0.05, torch.zeros(V, dtype=torch.int8), 4
    )
    head = to_twin(head, levels, head.weight.detach().clone())
    assert type(head) is FakeQuantLinear and is_plain_linear(head)
    expected, expected_grads = gradients(chunked_cross_entropy_reference, states, head, labels)
    loss, grads = gradients(chunked_cross_entropy, states, head, labels, chunk_size=chunk_size)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, expected_grads)
    assert grads[0].abs().sum() > 0 and all(grad.abs().sum() > 0 for grad in grads[1:])


@pytest.mark.parametrize("chunk_size", [1, 4, None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wrap", [False, True], ids=["linear", "module"])
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": 5}, {"label_smoothing": 0.1}], ids=str)
def test_chunked_equals_reference_in_float64(chunk_size, bias, wrap, options):
    states, head, labels = make_case(bias=bias)
    head = WrappedHead(head) if wrap else head
    expected, expected_grads = gradients(chunked_cross_entropy_reference, states, head, labels, **options)
    loss, grads = gradients(chunked_cross_entropy, states, head, labels, chunk_size=chunk_size, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        loss = chunked_cross_entropy(states, head, labels, chunk_size=chunk_size, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)


def with_logits(hidden_states, lm_head, labels, **kwargs):
    """The loss of logits that exist anyway; the head is not needed any more."""
    return chunked_cross_entropy(hidden_states, None, labels, logits=lm_head(hidden_states), **kwargs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("wrap", [False, True], ids=["linear", "module"])
@pytest.mark.parametrize("items", [None, 5, torch.tensor(5)], ids=str)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_given_logits_make_the_same_loss(bias, wrap, items, label_smoothing):
    states, head, labels = make_case(bias=bias)
    head = WrappedHead(head) if wrap else head
    options = {"num_items_in_batch": items, "label_smoothing": label_smoothing}
    loss, grads = gradients(with_logits, states, head, labels, **options)
    for function, chunks in ((chunked_cross_entropy_reference, {}), (chunked_cross_entropy, {"chunk_size": 4})):
        expected, expected_grads = gradients(function, states, head, labels, **options, **chunks)
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(grads, expected_grads, rtol=1e-12, atol=1e-12)


def test_given_logits_without_labels_or_in_half_precision():
    states, head, labels = make_case()
    loss, grads = gradients(with_logits, states, head, torch.full_like(labels, -100))
    assert loss == 0 and all(grad.abs().sum() == 0 for grad in grads)
    states, head, labels = make_case(torch.bfloat16)
    loss, grads = gradients(with_logits, states, head, labels)
    expected, expected_grads = gradients(chunked_cross_entropy_reference, states, head, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close((loss, grads), (expected, expected_grads))


def test_half_precision_states_give_a_float32_loss():
    states, head, labels = make_case(torch.bfloat16)
    loss, grads = gradients(chunked_cross_entropy, states, head, labels, chunk_size=4)
    expected, expected_grads = gradients(chunked_cross_entropy_reference, states, head, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grads, expected_grads, rtol=2e-2, atol=1e-3)


def test_tied_embedding_receives_both_gradients():
    embedding = nn.Embedding(V, D, dtype=torch.float64)
    head = nn.Linear(D, V, bias=False, dtype=torch.float64)
    head.weight = embedding.weight
    ids, labels = torch.arange(10)[None], torch.arange(1, 11)[None]
    grads = []
    for function in (chunked_cross_entropy, chunked_cross_entropy_reference):
        loss = function(embedding(ids), head, labels, V, chunk_size=3)
        grads += torch.autograd.grad(loss, embedding.weight)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


def test_frozen_head_passes_its_gradient_on():
    states, head, labels = make_case()
    head.requires_grad_(False)
    (expected,) = torch.autograd.grad(chunked_cross_entropy_reference(states, head, labels), states)
    (grad,) = torch.autograd.grad(chunked_cross_entropy(states, head, labels), states)
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-12)


def test_no_labelled_token_gives_zero_and_a_graph():
    states, head, labels = make_case()
    loss, grads = gradients(chunked_cross_entropy, states, head, torch.full_like(labels, -100))
    assert loss == 0 and all(grad.abs().sum() == 0 for grad in grads)


def test_masked_tokens_never_reach_the_loss():
    states, head, labels = make_case()
    broken = states.detach().clone()
    broken[labels == -100] = float("nan")
    expected = chunked_cross_entropy(states, head, labels)
    torch.testing.assert_close(chunked_cross_entropy(broken.requires_grad_(), head, labels), expected)


def test_touched_heads_are_called_as_modules():
    _, head, _ = make_case()
    assert is_plain_linear(head)
    hooked = copy.deepcopy(head)
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    replaced = copy.deepcopy(head)
    replaced.forward = head.forward
    parametrized = nn.utils.parametrizations.weight_norm(copy.deepcopy(head))
    for touched in (hooked, replaced, parametrized, WrappedHead(head), type("Own", (nn.Linear,), {})(D, V)):
        assert not is_plain_linear(touched)


def test_hook_on_the_head_takes_part():
    states, head, labels = make_case()
    head.register_forward_hook(lambda module, args, output: output * 2)
    expected = gradients(chunked_cross_entropy_reference, states, head, labels)
    torch.testing.assert_close(gradients(chunked_cross_entropy, states, head, labels, chunk_size=4), expected)


def test_logits_are_never_built_whole():
    states, head, labels = make_case()
    sizes = []

    class Spy(nn.Module):
        def forward(self, states):
            sizes.append(len(states))
            return head(states)

    chunked_cross_entropy(states, Spy(), labels, chunk_size=4).backward()
    assert max(sizes) == 4 and sum(sizes) == 2 * int((labels != -100).sum())


@pytest.mark.parametrize("value", [nn.CrossEntropyLoss(), "forward", None])
def test_misused_loss_function_raises(value):
    with pytest.raises(TypeError, match="loss_function"):
        check_loss_function(value)
