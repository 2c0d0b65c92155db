"""Divergences and the distillation loss against a dense float64 oracle."""

import math

import pytest
import torch
from teachers import (
    V,
    oracle,
)
from torch import nn

from modeling_flashlite.training.divergence import (
    KDLoss,
    _ForwardKL,
    divergence,
    pack_weights,
    shared_vocabulary,
    unpack_weights,
)

KINDS = ["forward", "reverse", "jsd:0.3", "jsd:0", "jsd:1", "skew:0.1", "taid:0.4"]


@pytest.mark.parametrize("name", KINDS)
def test_divergence_equals_its_definition(name):
    log_p = torch.randn(5, 11, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    kind, _, value = name.partition(":")
    results = []
    for function in (
        lambda p, q: divergence(p, q, kind, float(value) if value else None),
        lambda p, q: oracle(name, p, q),
    ):
        loss = function(log_p, logits.log_softmax(-1)).sum()
        results.append((loss.detach(), *torch.autograd.grad(loss, logits)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_divergence_of_equals_is_zero_with_zero_gradient(name):
    log_p = (4 * torch.randn(5, 11, dtype=torch.float64)).log_softmax(-1)
    logits = log_p.clone().requires_grad_()
    kind, _, value = name.partition(":")
    loss = divergence(log_p, logits.log_softmax(-1), kind, float(value) if value else None).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert abs(loss) < 1e-12 and grad.abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["forward", "reverse", "jsd", "skew", "taid"])
def test_divergence_survives_impossible_tokens(kind):
    logits = torch.randn(3, 7, requires_grad=True)
    teacher = torch.randn(3, 7)
    teacher[:, 2] = -math.inf
    loss = divergence(teacher.log_softmax(-1), logits.log_softmax(-1), kind, 0.5).sum()
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite() and grad.isfinite().all()


def loss_case(wrap=False):
    head = nn.Linear(16, V, bias=False).double()
    states = torch.randn(2, 6, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, V, (2, 6))
    labels[0, 3:] = -100
    teacher = 3 * torch.randn(2, 6, V, dtype=torch.float64)
    if wrap:
        head = nn.Sequential(head)
    return states, head, labels, teacher


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_kl_in_one_pass_equals_autograd(dtype):
    """Also where a teacher rules tokens out, and for a student equal to its teacher."""
    student, teacher = (3 * torch.randn(5, V, dtype=dtype, requires_grad=True) for _ in range(2))
    teacher = teacher.detach().clone()
    teacher[0, 3:] = -torch.inf
    teacher[1] = student[1].detach()
    weights = torch.rand(5, dtype=dtype)
    value = _ForwardKL.apply(student, teacher)
    (grad,) = torch.autograd.grad((weights * value).sum(), student)
    expected = divergence(teacher.log_softmax(-1), student.log_softmax(-1))
    (expected_grad,) = torch.autograd.grad((weights * expected).sum(), student)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(grad, expected_grad)
    assert abs(value[1]) < 1e-6 and grad[1].abs().max() < 1e-6


@pytest.mark.parametrize("wrap", [False, True], ids=["linear", "module"])
@pytest.mark.parametrize("chunk_size", [2, None])
@pytest.mark.parametrize("name", KINDS)
def test_chunked_loss_equals_dense_oracle(name, chunk_size, wrap):
    states, head, labels, teacher = loss_case(wrap)
    loss = KDLoss(name, alpha=0.3, temperature=1.7, chunk_size=chunk_size)
    value = loss(states, head, labels, V, num_items_in_batch=7, teacher_logits=teacher)
    grads = torch.autograd.grad(value, [states, *head.parameters()])
    logits = head(states)
    mask = labels != -100
    kd = oracle(name, (teacher / 1.7).log_softmax(-1), (logits / 1.7).log_softmax(-1))[mask].sum()
    expected = (0.3 * nn.functional.cross_entropy(logits[mask], labels[mask], reduction="sum") + 0.7 * 1.7**2 * kd) / 7
    expected_grads = torch.autograd.grad(expected, [states, *head.parameters()])
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "signal"),
    [*((name, signal) for name in KINDS for signal in ("dense", "topk", "all")), ("forward", "sampled")],
)
def test_given_logits_make_the_same_distillation_loss(name, signal):
    """Logits that exist anyway give the value, the gradients and the metrics of the oracle and of the chunked path."""
    states, head, labels, teacher = loss_case()
    items = torch.tensor(7)
    columns = {"teacher_logits": teacher}
    if signal != "dense":
        weights, ids = (teacher / 1.7).softmax(-1).topk(5 if signal == "topk" else V)
        columns = {"teacher_ids": ids, "teacher_weights": weights}
    if signal == "sampled":  # every token drawn with its own probability, and the teacher's negative entropy
        entropy = (weights * weights.log()).sum(-1, keepdim=True)
        columns = {
            "teacher_ids": torch.cat([ids, ids[..., :1]], -1),
            "teacher_weights": torch.cat([weights, entropy], -1),
        }
    results = []
    for given in (True, False):
        loss = KDLoss(name, alpha=0.3, temperature=1.7, chunk_size=2)
        logits = head(states) if given else None
        value = loss(states, None if given else head, labels, V, items, logits=logits, **columns)
        grads = torch.autograd.grad(value, [states, *head.parameters()])
        metrics = loss.pop_metrics()
        with torch.no_grad():
            evaluated = loss(states, head, labels, V, items, logits=logits, **columns)
        results.append((value.detach(), grads, metrics, evaluated, loss.pop_metrics("eval")))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(*(result[:2] for result in results), rtol=1e-10, atol=1e-12)
    if signal != "topk":
        logits, mask = head(states), labels != -100
        kd = oracle(name, (teacher / 1.7).log_softmax(-1), (logits / 1.7).log_softmax(-1))[mask].sum()
        ce = nn.functional.cross_entropy(logits[mask], labels[mask], reduction="sum")
        expected = (0.3 * ce + 0.7 * 1.7**2 * kd) / items
        grads = torch.autograd.grad(expected, [states, *head.parameters()])
        torch.testing.assert_close(results[0][:2], (expected.detach(), grads), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd:0.3", "skew:0.1", "taid:0.4"])
def test_all_entries_cached_equal_the_live_teacher(name):
    states, head, labels, teacher = loss_case()
    loss = KDLoss(name, alpha=0.3, temperature=1.7)
    weights, ids = (teacher / 1.7).softmax(-1).topk(V)
    live = torch.autograd.grad(loss(states, head, labels, V, teacher_logits=teacher), states)
    cached = torch.autograd.grad(loss(states, head, labels, V, teacher_ids=ids, teacher_weights=weights), states)
    torch.testing.assert_close(cached, live, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", KINDS)
def test_some_entries_and_a_tail_make_the_divergence_of_buckets(name):
    states, head, labels, teacher = loss_case()
    weights, ids = teacher.softmax(-1).topk(5)
    loss = KDLoss(name, alpha=0.0, temperature=1.0)
    value = loss(states, head, labels, V, teacher_ids=ids, teacher_weights=weights)
    q = head(states).softmax(-1).gather(-1, ids)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (weights, q))
    expected = oracle(name, p.log(), q.log())[labels != -100].mean()
    torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9)


def test_student_equal_to_its_teacher_logs_zero_divergence_and_full_agreement():
    states, head, labels, _ = loss_case()
    loss = KDLoss()
    loss(states, head, labels, V, teacher_logits=head(states).detach())
    metrics = loss.pop_metrics()
    assert abs(metrics["kd"]) < 1e-7 and metrics["agree"] == 1.0 and metrics["ce"] > 0
    assert loss.pop_metrics() == {}


def test_evaluation_is_cross_entropy_with_the_divergence_beside_it():
    states, head, labels, teacher = loss_case()
    loss = KDLoss()
    with torch.no_grad():
        value = loss(states, head, labels, V, teacher_logits=teacher)
        assert torch.equal(loss(states, head, labels, V), value)
    mask = labels != -100
    torch.testing.assert_close(value, nn.functional.cross_entropy(head(states)[mask], labels[mask]).detach())
    assert loss.pop_metrics("eval")["kd"] > 0


def test_padded_vocabulary_is_sliced_and_renormalised():
    states, head, labels, teacher = loss_case()
    padded = torch.cat([teacher, torch.full((2, 6, 31), 50.0, dtype=torch.float64)], -1)
    loss = KDLoss()
    torch.testing.assert_close(
        loss(states, head, labels, V, teacher_logits=padded), loss(states, head, labels, V, teacher_logits=teacher)
    )
    with pytest.raises(ValueError, match="32128 output ids"):
        shared_vocabulary(32128, 97)


@pytest.mark.parametrize("options", [{"divergence": "forwards"}, {"divergence": "forward:1"}, {"divergence": "jsd:2"}])
def test_unknown_divergence_raises(options):
    with pytest.raises(ValueError, match="divergence is"):
        KDLoss(**options)


def test_training_without_a_teacher_raises():
    states, head, labels, _ = loss_case()
    with pytest.raises(ValueError, match="TeacherCache"):
        KDLoss()(states, head, labels, V)


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 30.0])
def test_probabilities_in_a_byte_keep_their_odds(spread):
    p = (torch.randn(200, 300) * spread).softmax(-1)
    kept = p.topk(32).values
    again = unpack_weights(pack_weights(kept))
    assert pack_weights(kept).dtype == torch.uint8 and float(again.sum(-1).max()) < 1 + 1e-5
    whole, ours = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1).clamp_min(1e-7) for x in (kept, again))
    assert float((whole * (whole / ours).log()).sum(-1).abs().max()) < 2e-3
    assert torch.equal(unpack_weights(pack_weights(torch.zeros(2, 4))), torch.zeros(2, 4))
