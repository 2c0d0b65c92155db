"""Quantization-aware training on the stock Trainer."""

import copy
import math

import pytest
import torch
from coded import build, logits_of
from conftest import TINY
from training_runs import streams
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from modeling_flashlite import FlashLiteConfig, FlashLiteForCausalLM
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.ecq_modules_flashlite import EcqLinear
from modeling_flashlite.ecq_twins_flashlite import FakeQuantLinear, _FakeQuantize
from modeling_flashlite.training.calibration import quantize
from modeling_flashlite.training.distillation import SegmentDistillationTrainer
from modeling_flashlite.training.divergence import KDLoss
from modeling_flashlite.training.qat import EcqCallback, RateController, parameter_groups, prepare_qat


def data(count: int = 64, length: int = 12) -> list[dict]:
    ids = torch.randint(3, 40, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def arguments(folder, cls=TrainingArguments, **kwargs):
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-3,
        "max_steps": 30,
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(str(folder), **{**settings, **kwargs})


def file_bits(model, folder) -> float:
    parameters = model.num_parameters()
    model.save_pretrained(folder)
    return 8 * (folder / "model.safetensors").stat().st_size / parameters


def test_step_gradient_is_the_one_of_the_formula():
    torch.manual_seed(0)
    weight = (torch.randn(6, 10) * 40).double().requires_grad_()
    shift, start = torch.zeros(1, requires_grad=True), torch.rand(6) + 0.3
    weights = torch.randn(6, 10)
    scale = torch.rand(10) + 0.3
    (_FakeQuantize.apply(weight, shift, start, scale) * weights).sum().backward()
    steps = start[:, None] * scale
    ratio = weight.detach().float() / steps
    inside = (ratio >= -128.5) & (ratio <= 127.5)
    codes = ratio.round().clamp(-128, 127)
    slope = steps * torch.where(inside, codes - ratio, codes)
    want = (weights * slope).sum() * math.log(2) / math.sqrt(7 * 60)
    assert torch.allclose(shift.grad, want) and torch.equal(weight.grad != 0, inside)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames checkpointing
@pytest.mark.parametrize("accumulation, bf16, checkpointing", [(1, False, False), (2, True, True)])
def test_stock_trainer_meets_the_budget(tmp_path, accumulation, bf16, checkpointing):
    model = build("llama").train()
    parameters = model.num_parameters()
    prepare_qat(model, EcqConfig(target_bits=4.0))
    assert isinstance(model.model.layers[0].mlp.up_proj, FakeQuantLinear)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    args = arguments(
        tmp_path, gradient_accumulation_steps=accumulation, bf16=bf16, gradient_checkpointing=checkpointing
    )
    trainer = Trainer(model, args, train_dataset=data(), callbacks=[EcqCallback()])
    before = logits_of(model)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "bits_per_weight" in entry]
    assert logs and logs[-1]["bits_per_weight"] == pytest.approx(4.0, abs=0.05) and "lambda" in logs[0]
    assert isinstance(model.lm_head, EcqLinear) and not torch.equal(logits_of(model), before)
    model.save_pretrained(tmp_path / "coded")
    size = (tmp_path / "coded" / "model.safetensors").stat().st_size
    assert 3.9 < 8 * size / parameters < 4.05
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "coded")
    # the Trainer leaves its autocast around the trained model
    assert torch.allclose(logits_of(loaded), logits_of(model), atol=0.02 if bf16 else 0)


def test_export_computes_what_training_computed(tmp_path):
    model = prepare_qat(build("t5").train(), EcqConfig(target_bits=4.0))
    outputs = []

    class Watch(EcqCallback):
        def on_train_end(self, args, state, control, model=None, **kwargs):
            outputs.append(logits_of(model.eval()))
            super().on_train_end(args, state, control, model=model, **kwargs)

    args = arguments(tmp_path, Seq2SeqTrainingArguments, max_steps=8)
    Seq2SeqTrainer(model, args, train_dataset=data(), callbacks=[Watch()]).train()
    got = logits_of(model.eval())
    assert (got - outputs[0]).square().mean() < 1e-3 * got.var()
    model.save_pretrained(tmp_path / "coded")
    dequantized = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "coded").dequantize()
    assert torch.allclose(logits_of(dequantized), outputs[0], atol=0.02 * got.std().item())


def test_training_resumes_where_it_stopped(tmp_path):
    def run(folder, steps, resume=None, **kwargs):
        torch.manual_seed(0)
        model = prepare_qat(build("llama").train(), EcqConfig(target_bits=4.0))
        args = arguments(folder, save_strategy="steps", save_steps=10, **{"max_steps": 20, **kwargs})
        trainer = Trainer(model, args, train_dataset=data(), callbacks=[EcqCallback()])

        if steps < 20:

            class Stop(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    control.should_training_stop = state.global_step >= steps

            trainer.add_callback(Stop())
        trainer.train(resume_from_checkpoint=resume)
        return model, trainer

    whole, first = run(tmp_path / "whole", 20)
    run(tmp_path / "cut", 10)
    resumed, second = run(tmp_path / "cut", 20, resume=str(tmp_path / "cut" / "checkpoint-10"))
    bits = [[e["bits_per_weight"] for e in t.state.log_history if "bits_per_weight" in e][-1] for t in (first, second)]
    assert bits[0] == pytest.approx(bits[1], abs=1e-4)
    assert torch.allclose(logits_of(resumed), logits_of(whole), atol=1e-4)
    middle = AutoModelForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-10")
    assert isinstance(middle.lm_head, FakeQuantLinear) and RateController(middle).target == pytest.approx(4.0)
    assert middle.lm_head.log_step is middle.model.embed_tokens.log_step


def test_lambda_steers_the_rate_up_and_down():
    model = prepare_qat(build("llama").train(), EcqConfig(target_bits=4.0))
    rate = RateController(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = {name: torch.stack([row[name] for row in data(2)]) for name in ("input_ids", "labels")}
    for target, sign in ((3.6, 1), (4.3, -1)):
        rate.target, start = target, None
        for _ in range(25):
            model(**batch).loss.backward()
            rate.step()
            start = start or rate.bits
            optimizer.step()
            optimizer.zero_grad()
        assert sign * (start - rate.bits) > 0.05


def test_training_starts_from_a_quantized_model():
    config, original = EcqConfig(target_bits=4.0), build("llama")
    coded = quantize(copy.deepcopy(original), EcqConfig(target_bits=4.0))
    model = prepare_qat(original, config, start=coded)
    assert torch.allclose(logits_of(model), logits_of(coded.dequantize()), atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="same layers"):
        prepare_qat(build("llama"), config, start=build("llama"))


def test_weights_learn_by_a_share_of_their_step():
    model = prepare_qat(build("llama").train(), EcqConfig(target_bits=4.0))
    twin = model.model.layers[0].mlp.up_proj
    before, steps = twin.weight.detach().clone(), torch.cat([step for _, _, step in twin.pieces()])
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-3, weight_decay=0.0)
    model(**{k: torch.stack([row[k] for row in data(8)]) for k in ("input_ids", "labels")}).loss.backward()
    optimizer.step()
    moved = ((twin.weight - before).abs() / steps)[twin.weight.grad != 0]
    assert 0.04 < moved.median() < 0.06  # Adam's first step is its rate


def test_training_over_segments_reads_with_memory(tmp_path):
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "num_hidden_layers": 1, "is_encoder_decoder": False}
    teacher = FlashLiteForCausalLM(FlashLiteConfig(**{**TINY, **shape}))

    def distances(student, folder, resume=None, callbacks=(), **options):
        settings = {"max_steps": 3, "logging_steps": 1, "save_strategy": "steps", "save_steps": 2} | options
        args = arguments(tmp_path / folder, Seq2SeqTrainingArguments, **settings)
        loss = KDLoss("forward", 0.0, 1.0)
        trainer = SegmentDistillationTrainer(
            student, args, teacher=teacher, loss=loss, train_dataset=streams(4), callbacks=list(callbacks)
        )
        trainer.train(resume_from_checkpoint=resume)
        return [log["kd"] for log in trainer.state.log_history if "kd" in log]

    # in the later steps too, where both remember the earlier ones
    assert max(distances(copy.deepcopy(teacher), "same", learning_rate=0.0)) < 1e-6

    def rounded():
        return prepare_qat(copy.deepcopy(teacher), EcqConfig(target_bits=5.0))

    whole = distances(rounded(), "rounded", callbacks=[EcqCallback()])
    again = distances(rounded(), "rounded", str(tmp_path / "rounded" / "checkpoint-2"), [EcqCallback()])
    assert min(whole) > 1e-5 and again[-1] == pytest.approx(whole[-1], rel=1e-3)
    with pytest.raises(ValueError, match="live Flash-Lite"):
        SegmentDistillationTrainer(rounded(), arguments(tmp_path, Seq2SeqTrainingArguments))


def test_missing_training_inputs_are_named(tmp_path):
    with pytest.raises(ValueError, match="budget"):
        prepare_qat(build("llama"), EcqConfig())
    trainer = Trainer(build("llama"), arguments(tmp_path), train_dataset=data(), callbacks=[EcqCallback()])
    with pytest.raises(ValueError, match="prepare_qat"):
        trainer.train()
