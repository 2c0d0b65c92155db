"""Students: trained from cached and live teachers, made from teachers, on every trainer that calls the hook."""

import numpy as np
import pytest
import torch
from teachers import V, arguments, causal_rows, llama, make_tokenizer, oracle, other, seq2seq_rows, t5, with_labels
from torch import nn
from transformers import (
    Trainer,
)

from modeling_flashlite import FlashLiteForCausalLM, FlashLiteForConditionalGeneration
from modeling_flashlite.data.batching import PaddingCollator
from modeling_flashlite.training.distillation import (
    DistillationCallback,
    DistillationTrainer,
    set_loss_function,
    student_from_teacher,
)
from modeling_flashlite.training.divergence import (
    KDLoss,
    divergence,
)
from modeling_flashlite.training.teacher import teacher_logits
from modeling_flashlite.training.teacher_cache import TeacherCache


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


@pytest.mark.parametrize("family", ["llama", "flashlite"])
def test_decoder_only_student(family, tiny_config):
    ours = FlashLiteForCausalLM(tiny_config(num_hidden_layers=3))
    student = student_from_teacher(llama(layers=3) if family == "llama" else ours, decoder_layers=1)
    assert student(torch.arange(3, 9)[None]).logits.shape == (1, 6, V)
