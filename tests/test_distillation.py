"""Divergences against a dense float64 oracle; cached, sampled and live teachers; students made from teachers."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from modeling_flashlite import FlashLiteForCausalLM, FlashLiteForConditionalGeneration
from modeling_flashlite.data.loading import PaddingCollator, pack
from modeling_flashlite.training.calibration import mean_loss
from modeling_flashlite.training.distillation import (
    DistillationCallback,
    DistillationTrainer,
    set_loss_function,
    student_from_teacher,
)
from modeling_flashlite.training.divergence import (
    KDLoss,
    _ForwardKL,
    divergence,
    pack_weights,
    shared_vocabulary,
    unpack_weights,
)
from modeling_flashlite.training.teacher import teacher_logits
from modeling_flashlite.training.teacher_cache import TeacherCache, check_teacher_columns, check_vocabulary

V = 97
OFF = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
DEPTHS = {"layers": 1, "ffn_dim": 32, "attention_heads": 2}
KINDS = ["forward", "reverse", "jsd:0.3", "jsd:0", "jsd:1", "skew:0.1", "taid:0.4"]


def make_tokenizer(size=V, padding_side="right"):
    vocabulary = {"<pad>": 0, "</s>": 1, "<s>": 2, **{f"w{i}": i for i in range(3, size)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", padding_side=padding_side
    )


def seq2seq_rows(count=8, seed=0):
    draw = np.random.default_rng(seed)
    return Dataset.from_list(
        [
            {
                "input_ids": draw.integers(3, V, draw.integers(4, 12)).tolist(),
                "labels": draw.integers(3, V, draw.integers(3, 10)).tolist() + [1],
            }
            for _ in range(count)
        ]
    )


def causal_rows(count=8, seed=0):
    draw = np.random.default_rng(seed)
    return Dataset.from_list([{"input_ids": draw.integers(3, V, draw.integers(6, 14)).tolist()} for _ in range(count)])


def with_labels(rows):
    return rows.map(lambda row: {"labels": row["input_ids"]})


def t5(vocab_size=V, layers=2, seed=1):
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=vocab_size, d_model=16, d_kv=4, d_ff=32, num_layers=layers, num_heads=4, dropout_rate=0.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, initializer_factor=4.0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config).eval()


def llama(vocab_size=V, seed=1, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=layers, num_attention_heads=4,
        initializer_range=0.3, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def arguments(path, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return Seq2SeqTrainingArguments(str(path), **{**defaults, **options})


def oracle(name, log_p, log_q):
    """The textbook definitions on probabilities, in float64."""
    p, q = log_p.exp(), log_q.exp()
    kind, _, value = name.partition(":")
    value = float(value) if value else None
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    if kind == "forward" or name == "jsd:0":
        return kl(p, q)
    if kind == "reverse" or name == "jsd:1":
        return kl(q, p)
    if kind == "jsd":
        m = value * p + (1 - value) * q
        return value * kl(p, m) + (1 - value) * kl(q, m)
    if kind == "skew":
        return kl(p, value * p + (1 - value) * q)
    between = q.detach() ** (1 - value) * p**value
    return kl(between / between.sum(-1, keepdim=True), q)


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


def test_samples_are_unbiased_and_their_divergence_is_zero_for_the_teacher():
    tokenizer = make_tokenizer()
    cache = TeacherCache(llama(), tokenizer, k=16, mode="sample", temperature=1.0)
    logits = 2 * torch.randn(1, V)
    ids, weights = cache._select(logits.repeat(4000, 1), torch.Generator().manual_seed(0))
    assert ids.shape == weights.shape == (4000, 18)
    shares = torch.zeros(V).scatter_add_(0, ids[:, 1:-1].flatten(), weights[:, 1:-1].flatten() / 4000)
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=8e-3, rtol=0)
    loss = KDLoss(alpha=0.0, temperature=1.0)
    head = nn.Linear(V, V, bias=False)
    nn.init.eye_(head.weight)
    labels = torch.zeros(1, 4000, dtype=torch.long)
    columns = {"teacher_ids": ids[None], "teacher_weights": weights[None]}
    assert abs(loss(logits.repeat(4000, 1)[None], head, labels, **columns)) < 1e-6
    student = torch.randn(1, V)
    states = student.repeat(4000, 1)[None].requires_grad_()
    (grad,) = torch.autograd.grad(loss(states, head, labels, **columns), states)
    expected = student.softmax(-1) - logits.softmax(-1)
    torch.testing.assert_close(grad.sum(1), expected, atol=8e-3, rtol=0)
    with pytest.raises(ValueError, match="mode='topk'"):
        KDLoss("reverse", temperature=1.0)(states, head, labels, **columns)


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_on_causal", "decoder_on_seq2seq"])
def test_cached_top_v_equals_live_teacher_rows(kind, padding_side):
    """Whatever the teacher and the batching, row t holds the distribution that state t of the student must match."""
    tokenizer = make_tokenizer(padding_side=padding_side)
    teacher = (t5() if kind == "encoder_decoder" else llama()).double()
    rows = causal_rows() if kind == "decoder_on_causal" else seq2seq_rows()
    cache = TeacherCache(teacher, tokenizer, k=V, mode="topk", temperature=1.5, dtype="float32")
    annotated = cache.annotate(rows, batch_size=3)
    for row in annotated:
        ids = torch.from_numpy(np.asarray(row["input_ids"]))[None].long()
        if kind == "decoder_on_causal":
            expected = teacher(input_ids=ids).logits[0, :-1]
            assert (row["teacher_weights"][-1] == 0).all()
        elif kind == "encoder_decoder":
            expected = teacher(input_ids=ids, labels=torch.from_numpy(row["labels"])[None].long()).logits[0]
        else:
            text = torch.cat([ids, torch.from_numpy(row["labels"])[None].long()], 1)
            expected = teacher(input_ids=text).logits[0, ids.shape[1] - 1 : -1]
        expected = (expected / 1.5).softmax(-1).detach().float()
        found = torch.zeros_like(expected).scatter_(
            1,
            torch.from_numpy(row["teacher_ids"].astype(np.int64))[: len(expected)],
            torch.from_numpy(row["teacher_weights"])[: len(expected)],
        )
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_decoder_only_rows_for_a_seq2seq_student_in_a_padded_batch():
    teacher, tokenizer = llama(), make_tokenizer()
    batch = PaddingCollator(tokenizer)(seq2seq_rows(4).to_list())
    with torch.no_grad():
        logits, _ = teacher_logits(teacher, batch, seq2seq=True)
        for row in range(4):
            ids = batch["input_ids"][row][batch["attention_mask"][row] == 1]
            labels = batch["labels"][row][batch["labels"][row] != -100]
            expected = teacher(torch.cat([ids, labels])[None]).logits[0, len(ids) - 1 : -1]
            torch.testing.assert_close(logits[row, : len(labels)], expected, atol=1e-5, rtol=1e-4)


def test_cache_is_an_ordinary_dataset_that_survives_the_disk_and_streaming(tmp_path):
    tokenizer, rows = make_tokenizer(), seq2seq_rows()
    cache = TeacherCache(t5(), tokenizer, k=4)
    annotated = cache.annotate(rows)
    assert annotated.features["teacher_ids"].feature.length == 6
    annotated.to_parquet(tmp_path / "cache.parquet")
    loaded = Dataset.from_parquet(str(tmp_path / "cache.parquet"), cache_dir=str(tmp_path))
    loss = KDLoss()
    info = check_teacher_columns(loaded, tokenizer, loss, cache.teacher)
    assert info["k"] == 4 and info["mode"] == "sample"
    streamed = cache.annotate(IterableDataset.from_generator(lambda: iter(rows.to_list())))
    check_teacher_columns(streamed, tokenizer, loss)
    first, again = next(iter(streamed)), annotated[0]
    assert np.array_equal(first["teacher_ids"], again["teacher_ids"])


def packed_rows(count=6):
    """Documents of 3 to 9 tokens, four in a row."""
    draw = np.random.default_rng(0)
    documents = Dataset.from_list([{"input_ids": draw.integers(3, V, 3 + n).tolist()} for n in range(count)])
    return documents, pack(documents, 16)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "ours"])
def test_a_teacher_reads_packed_documents_one_by_one(family, causal_config):
    teacher = FlashLiteForCausalLM(causal_config).eval() if family == "ours" else other(family)
    documents, rows = packed_rows()
    cached = TeacherCache(teacher, make_tokenizer(), k=V, mode="topk", dtype="float32", temperature=1.0).annotate(rows)
    for row, annotated in zip(rows, cached):
        batch = PaddingCollator(make_tokenizer())([row])
        live, _ = teacher_logits(teacher, batch, False)
        starts = [*np.flatnonzero(np.asarray(row["position_ids"]) == 0), len(row["input_ids"])]
        for first, last in zip(starts, starts[1:]):
            alone = teacher(input_ids=batch["input_ids"][:, first:last]).logits[0]
            torch.testing.assert_close(live[0, first:last], alone, atol=1e-4, rtol=1e-4)
            kept = torch.tensor(annotated["teacher_weights"][first : last - 1])
            best = torch.tensor(annotated["teacher_ids"][first : last - 1].astype(np.int64))
            expected = alone.softmax(-1)[:-1].gather(-1, best)
            torch.testing.assert_close(kept, expected, atol=1e-5, rtol=1e-3)
    batches = [PaddingCollator(make_tokenizer())([row]) for row in rows]
    assert mean_loss(teacher, batches) > 0  # also with a row of one token, which is no target
    total = targets = 0.0
    for document in documents:
        ids = torch.tensor([document["input_ids"]])
        total += teacher(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        targets += ids.shape[1] - 1
    whole = pack(documents, 1000)
    assert mean_loss(teacher, [PaddingCollator(make_tokenizer())(list(whole))]) == pytest.approx(total / targets, 1e-4)


def test_a_teacher_that_cannot_keep_documents_apart_is_refused():
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=16, n_layer=1, n_head=2)).eval()
    _, rows = packed_rows()
    with pytest.raises(ValueError, match="BloomForCausalLM reads across packed documents"):
        TeacherCache(bloom, make_tokenizer()).annotate(rows)
    TeacherCache(bloom, make_tokenizer()).annotate(with_labels(causal_rows(2)))


@pytest.mark.parametrize("seq2seq", [False, True])
def test_tokens_that_the_teacher_does_not_know_are_named(tmp_path, tiny_config, seq2seq):
    student = FlashLiteForConditionalGeneration if seq2seq else FlashLiteForCausalLM
    rows = seq2seq_rows(4) if seq2seq else with_labels(causal_rows(4))
    trainer = DistillationTrainer(
        student(tiny_config(is_encoder_decoder=seq2seq)),
        arguments(tmp_path),
        teacher=t5(40) if seq2seq else llama(40),
        train_dataset=rows,
        data_collator=PaddingCollator(make_tokenizer()),
    )
    with pytest.raises(ValueError, match=r"hold the token \d+, but .* knows 40 only"):
        trainer.train()


def test_cache_of_another_origin_is_refused():
    tokenizer = make_tokenizer()
    annotated = TeacherCache(t5(), tokenizer, k=4).annotate(seq2seq_rows(2))
    with pytest.raises(ValueError, match="tokenizer"):
        check_teacher_columns(annotated, make_tokenizer(V - 1))
    with pytest.raises(ValueError, match="temperature"):
        check_teacher_columns(annotated, tokenizer, KDLoss(temperature=1.0))
    with pytest.raises(ValueError, match="samples"):
        check_teacher_columns(annotated, tokenizer, KDLoss("reverse"))
    with pytest.raises(ValueError, match="weights"):
        check_teacher_columns(annotated, tokenizer, teacher=t5(seed=5))
    with pytest.raises(ValueError, match="teacher_info"):
        check_teacher_columns(seq2seq_rows(2), tokenizer)


def test_bad_input_to_the_cache_raises():
    tokenizer = make_tokenizer()
    with pytest.raises(ValueError, match="0 rows"):
        TeacherCache(t5(), tokenizer).annotate(Dataset.from_dict({"input_ids": [], "labels": []}))
    with pytest.raises(ValueError, match="mode is 'best'"):
        TeacherCache(t5(), tokenizer, mode="best")
    with pytest.raises(ValueError, match="smaller k"):
        TeacherCache(t5(), tokenizer, mode="topk", k=V + 1)
    with pytest.raises(ValueError, match="teacher's own tokenizer"):
        TeacherCache(t5(), make_tokenizer(V + 3))
    with pytest.raises(ValueError, match="plain text"):
        TeacherCache(t5(), tokenizer, k=4).annotate(causal_rows(2))
    with pytest.raises(ValueError, match="train"):
        check_vocabulary(tokenizer, make_tokenizer(V - 1))


@pytest.mark.parametrize("teacher", [t5, llama])
def test_text_mode_writes_answers(teacher):
    rows = Dataset.from_dict({"source": ["w3 w4 w5", "w6 w7"]})
    cache = TeacherCache(teacher(), make_tokenizer(), mode="text")
    annotated = cache.annotate(rows, max_new_tokens=4, do_sample=False)
    assert all(isinstance(text, str) for text in annotated["teacher_text"])


@pytest.mark.parametrize("mode", ["sample", "topk"])
@pytest.mark.parametrize("causal", [False, True], ids=["seq2seq", "causal"])
def test_unmodified_trainer_distils_from_columns(tmp_path, tiny_config, mode, causal):
    tokenizer = make_tokenizer()
    model_class = FlashLiteForCausalLM if causal else FlashLiteForConditionalGeneration
    rows = with_labels(causal_rows()) if causal else seq2seq_rows()
    model = model_class(tiny_config(is_encoder_decoder=not causal))
    cache = TeacherCache(llama() if causal else t5(), tokenizer, k=8, mode=mode)
    annotated = cache.annotate(rows)
    loss = model.loss_function = KDLoss()
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=6, learning_rate=0.02, optim="adamw_torch"),
        train_dataset=annotated,
        eval_dataset=annotated,
        data_collator=PaddingCollator(tokenizer),
        callbacks=[DistillationCallback(loss)],
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "kd" in log]
    assert logs[-1]["kd"] < logs[0]["kd"] and {"ce", "agree"} <= set(logs[0])
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(trainer.state.log_history[-1]["eval_ce"], rel=1e-4)


@pytest.mark.parametrize("name", ["forward", "jsd:0.5", "taid"])
def test_live_teacher_trains_the_student(tmp_path, seq2seq_config, name):
    trainer = DistillationTrainer(
        FlashLiteForConditionalGeneration(seq2seq_config),
        arguments(tmp_path, max_steps=8, learning_rate=0.02, optim="adamw_torch"),
        teacher=t5(V + 31),
        loss=KDLoss(name, alpha=0.0),
        train_dataset=seq2seq_rows(),
        processing_class=make_tokenizer(),
        data_collator=PaddingCollator(make_tokenizer()),
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "kd" in log]
    assert logs[-1]["kd"] < logs[0]["kd"]
    if name == "taid":
        assert trainer.callback_handler.callbacks[0].taid["t"] == pytest.approx(1.0)


def test_live_causal_teacher_and_its_cache_give_the_same_steps(tmp_path, causal_config):
    tokenizer, rows = make_tokenizer(), with_labels(causal_rows())
    cache = TeacherCache(llama(), tokenizer, k=V, mode="topk", dtype="float32")
    results = []
    for teacher, dataset in ((llama(), rows), (None, cache.annotate(rows))):
        torch.manual_seed(0)
        trainer = DistillationTrainer(
            FlashLiteForCausalLM(causal_config),
            arguments(tmp_path),
            teacher=teacher,
            train_dataset=dataset,
            processing_class=tokenizer,
            data_collator=PaddingCollator(tokenizer),
        )
        # the info column has been read by now; the batches do not need it
        trainer.train()
        results.append([(log["loss"], log["kd"]) for log in trainer.state.log_history if "kd" in log])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-4)


def other(family):
    """A student of transformers that calls its loss hook in another way than ours, or not at all."""
    torch.manual_seed(5)
    sizes = {"vocab_size": V, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    if family == "GPT2":
        return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **OFF, **sizes)).eval()
    if family == "BART":
        width = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in DEPTHS.items()}
        return BartForConditionalGeneration(
            BartConfig(d_model=16, decoder_start_token_id=1, max_position_embeddings=64, dropout=0.0, **width, **sizes)
        ).eval()
    return t5(seed=5) if family == "T5" else llama(seed=5)


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
@pytest.mark.parametrize("family", ["Llama", "GPT2", "T5", "BART"])
def test_students_of_other_families_learn_from_the_teacher(tmp_path, family, cached):
    """The first logged loss is the definition's, on one batch, and the divergence falls."""
    tokenizer, seq2seq, student = make_tokenizer(), family in ("T5", "BART"), other(family)
    rows = seq2seq_rows(4) if seq2seq else with_labels(causal_rows(4))
    teacher, loss = (t5() if seq2seq else llama()), KDLoss("forward", alpha=0.3, temperature=1.0)
    collator = PaddingCollator(tokenizer)
    batch = collator(list(rows))
    with torch.no_grad():
        log_p, log_q = (
            teacher_logits(model, batch, seq2seq)[0].double().log_softmax(-1) for model in (teacher, student)
        )
    labels = batch["labels"] if seq2seq else nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    mask = labels != -100
    ce = -log_q.gather(-1, labels.clamp(min=0)[..., None])[..., 0][mask].mean()
    kd = oracle("forward", log_p, log_q)[mask].mean()
    if cached:
        rows = TeacherCache(teacher, tokenizer, k=V, mode="topk", temperature=1.0, dtype="float32").annotate(rows)
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=8, learning_rate=0.02, optim="adamw_torch"),
        teacher=None if cached else teacher,
        loss=loss,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
        data_collator=collator,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(ce.item(), rel=1e-4)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "kd" in log]
    assert logs[0]["kd"] == pytest.approx(kd.item(), rel=1e-3) and logs[-1]["kd"] < logs[0]["kd"]
    assert logs[0]["loss"] == pytest.approx((0.3 * ce + 0.7 * kd).item(), rel=1e-3)


SMOOTHED = {"label_smoothing_factor": 0.2}


@pytest.mark.parametrize("cached", [False, True], ids=["live", "cached"])
@pytest.mark.parametrize("family", ["causal", "seq2seq", "Llama", "T5"])
def test_label_smoothing_is_part_of_the_distillation_loss(tmp_path, tiny_config, family, cached):
    tokenizer, seq2seq = make_tokenizer(), family in ("T5", "seq2seq")
    torch.manual_seed(5)
    ours = {"causal": FlashLiteForCausalLM, "seq2seq": FlashLiteForConditionalGeneration}.get(family)
    student = ours(tiny_config(is_encoder_decoder=seq2seq)) if ours else other(family)
    rows = seq2seq_rows(4) if seq2seq else with_labels(causal_rows(4))
    teacher, collator = (t5() if seq2seq else llama()), PaddingCollator(tokenizer)
    batch = collator(list(rows))
    with torch.no_grad():
        log_p, log_q = (
            teacher_logits(model.eval(), batch, seq2seq)[0].double().log_softmax(-1) for model in (teacher, student)
        )
    labels = batch["labels"] if seq2seq else nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    mask = labels != -100
    ce = nn.functional.cross_entropy(log_q[mask], labels[mask], label_smoothing=0.2)
    kd = oracle("forward", log_p, log_q)[mask].mean()
    if cached:
        rows = TeacherCache(teacher, tokenizer, k=V, mode="topk", temperature=1.0, dtype="float32").annotate(rows)
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=1, **SMOOTHED),
        teacher=None if cached else teacher,
        loss=KDLoss("forward", alpha=0.3, temperature=1.0),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=collator,
    )
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "kd" in log]
    assert log["loss"] == pytest.approx((0.3 * ce + 0.7 * kd).item(), rel=1e-3)


@pytest.mark.parametrize("shown", [False, True], ids=["hook", "hook and callback"])
@pytest.mark.parametrize("causal", [False, True], ids=["seq2seq", "causal"])
def test_the_stock_trainer_is_refused_where_it_would_not_call_the_hook(tmp_path, tiny_config, causal, shown):
    tokenizer = make_tokenizer()
    rows = with_labels(causal_rows()) if causal else seq2seq_rows()
    model = (FlashLiteForCausalLM if causal else FlashLiteForConditionalGeneration)(
        tiny_config(is_encoder_decoder=not causal)
    )
    loss = model.loss_function = KDLoss()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        model,
        arguments(tmp_path, max_steps=2, **SMOOTHED),
        train_dataset=TeacherCache(llama() if causal else t5(), tokenizer, k=8).annotate(rows),
        data_collator=PaddingCollator(tokenizer, model=model),
        callbacks=[DistillationCallback(loss)] if shown else None,
    )
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_another_loss_beside_the_distillation_is_refused(tmp_path, causal_config):
    with pytest.raises(ValueError, match="compute_loss_func would replace"):
        DistillationTrainer(
            FlashLiteForCausalLM(causal_config), arguments(tmp_path), teacher=llama(), compute_loss_func=print
        )


def test_plain_trainer_distils_a_causal_model_of_transformers(tmp_path):
    """Its hook gets logits and unshifted labels; hooks that are called in yet other ways are refused."""
    tokenizer, student = make_tokenizer(), llama(seed=5)
    student.loss_function = loss = KDLoss("forward", alpha=0.0, temperature=1.0)
    teacher, batch = llama(), PaddingCollator(tokenizer)(list(with_labels(causal_rows(4))))
    with torch.no_grad():
        logits = teacher(**batch).logits
    value = student(**batch, teacher_logits=logits).loss
    log_q = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    mask = batch["labels"][:, 1:] != -100
    kd = divergence(logits.log_softmax(-1), log_q)[:, :-1][mask].mean()
    torch.testing.assert_close(value, kd)
    with pytest.raises(TypeError, match="DistillationTrainer"):
        loss(logits, batch["labels"], V)


@pytest.mark.parametrize("match", ["states", "relations"])
def test_encoder_matching_pulls_the_encoders_together(tmp_path, tiny_config, match):
    config = tiny_config(is_encoder_decoder=True)
    torch.manual_seed(3)
    teacher = FlashLiteForConditionalGeneration(config)
    torch.manual_seed(4)
    student = FlashLiteForConditionalGeneration(config)
    batch = PaddingCollator(make_tokenizer())(seq2seq_rows().to_list())

    @torch.no_grad()
    def distance():
        return trainer._encoder_distance(student(**batch), teacher(**batch), batch).item()

    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=6, learning_rate=0.01, optim="adamw_torch"),
        teacher=teacher,
        encoder_match=match,
        encoder_weight=3.0,
        train_dataset=seq2seq_rows(),
        data_collator=PaddingCollator(make_tokenizer()),
    )
    before = distance()
    trainer.train()
    assert distance() < before


def test_encoder_matching_of_other_widths_names_the_fix(tmp_path, seq2seq_config):
    trainer = DistillationTrainer(
        FlashLiteForConditionalGeneration(seq2seq_config),
        arguments(tmp_path),
        teacher=t5(),
        encoder_match="states",
        train_dataset=seq2seq_rows(),
        data_collator=PaddingCollator(make_tokenizer()),
    )
    with pytest.raises(ValueError, match="relations"):
        trainer.train()


def test_on_policy_steps_train_on_the_students_own_targets(tmp_path, seq2seq_config):
    trainer = DistillationTrainer(
        FlashLiteForConditionalGeneration(seq2seq_config),
        arguments(tmp_path, max_steps=3),
        teacher=t5(),
        on_policy=1.0,
        train_dataset=seq2seq_rows(),
        data_collator=PaddingCollator(make_tokenizer()),
    )
    seen = []
    sample = trainer._sample_targets
    trainer._sample_targets = lambda inputs: seen.append(sample(inputs)) or seen[-1]
    trainer.train()
    assert len(seen) == 3 and all(labels.shape[0] == 4 for labels in seen)
    for labels in seen:  # nothing is learned after the end of a text
        ended = (labels == trainer.model.generation_config.eos_token_id).cumsum(1)
        assert (labels[ended.roll(1, 1).bool() & (torch.arange(labels.shape[1]) > 0)] == -100).all()
    assert {trainer._student_writes() for _ in range(5)} == {True}


def test_other_vocabulary_is_refused_before_training(tmp_path, seq2seq_config):
    student = FlashLiteForConditionalGeneration(seq2seq_config)
    with pytest.raises(ValueError, match="output ids"):
        DistillationTrainer(student, arguments(tmp_path), teacher=t5(5000))
    with pytest.raises(ValueError, match="tokens"):
        DistillationTrainer(
            student,
            arguments(tmp_path),
            teacher=t5(),
            teacher_tokenizer=make_tokenizer(90),
            processing_class=make_tokenizer(),
        )
    with pytest.raises(ValueError, match="live teacher"):
        DistillationTrainer(student, arguments(tmp_path), on_policy=0.5)


def test_loss_function_must_be_a_plain_callable(seq2seq_config):
    model = FlashLiteForConditionalGeneration(seq2seq_config)
    with pytest.raises(TypeError):
        model.loss_function = nn.CrossEntropyLoss()
    with pytest.raises(TypeError):
        set_loss_function(model, nn.CrossEntropyLoss())


def test_student_keeps_spaced_layers(tiny_config):
    teacher = FlashLiteForConditionalGeneration(tiny_config(is_encoder_decoder=True, num_hidden_layers=4))
    teacher.config.use_cache = teacher.config.decoder.use_cache = False  # as training leaves it
    student = student_from_teacher(teacher, encoder_layers=3, decoder_layers=2)
    assert student.generation_config.use_cache and student.generation_config is not teacher.generation_config
    config = student.config
    assert (config.encoder.num_hidden_layers, config.decoder.num_hidden_layers) == (3, 2)
    name = "model.decoder.layers.{}.self_attn.q_proj.weight"
    source, copied = teacher.state_dict(), student.state_dict()
    for mine, its in ((0, 0), (1, 3)):
        assert torch.equal(copied[name.format(mine)], source[name.format(its)])
    whole = student_from_teacher(teacher).eval()
    batch = PaddingCollator(make_tokenizer())(seq2seq_rows(2).to_list())
    assert torch.equal(whole(**batch).logits, teacher.eval()(**batch).logits)
    with pytest.raises(ValueError, match="choose 1 to 4"):
        student_from_teacher(teacher, decoder_layers=5)


@pytest.mark.parametrize(
    "make", [llama, lambda layers: FlashLiteForCausalLM(CAUSAL(layers))], ids=["llama", "flashlite"]
)
def test_decoder_only_student(make):
    student = student_from_teacher(make(layers=3), decoder_layers=1)
    assert student(torch.arange(3, 9)[None]).logits.shape == (1, 6, V)


def CAUSAL(layers):  # noqa: N802
    from conftest import TINY

    from modeling_flashlite import FlashLiteConfig

    return FlashLiteConfig(**{**TINY, "is_encoder_decoder": False, "num_hidden_layers": layers})


@pytest.mark.parametrize("spread", [0.1, 1.0, 5.0, 30.0])
def test_probabilities_in_a_byte_keep_their_odds(spread):
    p = (torch.randn(200, 300) * spread).softmax(-1)
    kept = p.topk(32).values
    again = unpack_weights(pack_weights(kept))
    assert pack_weights(kept).dtype == torch.uint8 and float(again.sum(-1).max()) < 1 + 1e-5
    whole, ours = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1).clamp_min(1e-7) for x in (kept, again))
    assert float((whole * (whole / ours).log()).sum(-1).abs().max()) < 2e-3
    assert torch.equal(unpack_weights(pack_weights(torch.zeros(2, 4))), torch.zeros(2, 4))


def test_a_cache_of_bytes_is_small_and_teaches_the_same(tmp_path):
    vocabulary = 1000
    rows = Dataset.from_list([{"input_ids": torch.randint(0, vocabulary, (200,)).tolist()} for _ in range(20)])
    teacher, tokenizer = llama(vocab_size=vocabulary), make_tokenizer(vocabulary)
    losses = {}
    for dtype in ("float32", "uint8"):
        cached = TeacherCache(teacher, tokenizer, k=32, mode="topk", temperature=1.0, dtype=dtype).annotate(rows)
        cached.select_columns(["teacher_ids", "teacher_weights", "teacher_info"]).save_to_disk(tmp_path / dtype)
        batch = PaddingCollator(tokenizer)([cached[0], cached[1]])
        student = llama(vocab_size=vocabulary, seed=2)
        student.loss_function = KDLoss("forward", alpha=0.0, temperature=1.0)
        student.train()
        batch["labels"] = batch["input_ids"]
        losses[dtype] = student(**batch).loss.item()
    assert losses["uint8"] == pytest.approx(losses["float32"], rel=0.01)
    size = sum(path.stat().st_size for path in (tmp_path / "uint8").glob("*.arrow"))
    assert size / (200 * 20) <= 120
    with pytest.raises(ValueError, match="uint8 in mode topk"):
        TeacherCache(teacher, tokenizer, dtype="uint8")
