"""Teachers and their caches: live and cached rows agree, and what does not fit is refused."""

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from teachers import V, arguments, causal_rows, llama, make_tokenizer, other, seq2seq_rows, t5, with_labels
from torch import nn
from transformers import (
    BloomConfig,
    BloomForCausalLM,
)

from modeling_flashlite import FlashLiteForCausalLM, FlashLiteForConditionalGeneration
from modeling_flashlite.data.batching import PaddingCollator, pack
from modeling_flashlite.training.calibration import mean_loss
from modeling_flashlite.training.distillation import (
    DistillationTrainer,
)
from modeling_flashlite.training.divergence import (
    KDLoss,
)
from modeling_flashlite.training.teacher import teacher_logits
from modeling_flashlite.training.teacher_cache import TeacherCache, check_teacher_columns, check_vocabulary


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
    with pytest.raises(ValueError, match="BloomForCausalLM attends across packed documents"):
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
