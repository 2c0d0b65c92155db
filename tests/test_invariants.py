"""Invariants of training: batch splits, interruptions and padding values change nothing."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import checkpoints
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from training_runs import V, arguments, ragged_rows, streams
from transformers import (
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LabelSmoother

from modeling_flashlite import (
    FlashLiteForCausalLM,
    FlashLiteForConditionalGeneration,
    FlashLiteForQuestionAnswering,
)
from modeling_flashlite.data.batching import PaddingCollator
from modeling_flashlite.measure.plots import plot_losses
from modeling_flashlite.training.distillation import set_loss_function
from modeling_flashlite.training.divergence import KDLoss
from modeling_flashlite.training.lora import add_lora
from modeling_flashlite.training.trainers import (
    CarefulTrainer,
    SegmentTrainer,
    last_checkpoint,
    memory_tensors,
    read_memories,
    write_tensors,
)

# peft 0.21 itself asks for an attribute that transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


def losses_and_norms(trainer):
    trainer.train()
    return [(log["loss"], log["grad_norm"]) for log in trainer.state.log_history if "grad_norm" in log]


@pytest.mark.parametrize("causal", [False, True], ids=["seq2seq", "causal"])
@pytest.mark.parametrize("kind", ["ce", "kd", "lora", "lora_kd"])
def test_accumulation_equals_the_whole_batch(tmp_path, tiny_config, kind, causal):
    results = []
    for batch, accumulation in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = (FlashLiteForCausalLM if causal else FlashLiteForConditionalGeneration)(
            tiny_config(is_encoder_decoder=not causal)
        )
        if "lora" in kind:
            model = add_lora(model, r=2)
        if "kd" in kind:
            set_loss_function(model, KDLoss(alpha=0.5, temperature=1.0))
        args = arguments(tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation)
        trainer = Trainer(model, TrainingArguments(**args), train_dataset=ragged_rows(causal, "kd" in kind))
        results.append(losses_and_norms(trainer))
    np.testing.assert_allclose(results[0], results[1], rtol=2e-4)


@pytest.mark.parametrize("causal", [False, True], ids=["seq2seq", "causal"])
def test_the_label_mask_is_the_only_mask(tiny_config, causal):
    """Prompt and padding are excluded by -100 alone; what stands in a masked label's teacher row is irrelevant."""
    model = (FlashLiteForCausalLM if causal else FlashLiteForConditionalGeneration)(
        tiny_config(is_encoder_decoder=not causal)
    )
    model.loss_function = KDLoss()
    rows = ragged_rows(causal, teacher=True, count=4).with_format("torch")[:4]
    aligned = torch.nn.functional.pad(rows["labels"][:, 1:], (0, 1), value=-100) if causal else rows["labels"]
    grads = []
    for junk in (0.0, float("nan")):
        weights = rows["teacher_weights"].masked_fill((aligned == -100)[..., None], junk)
        loss = model(**{**rows, "teacher_weights": weights}).loss
        grads.append(torch.autograd.grad(loss, model.lm_head.weight)[0])
    assert torch.equal(*grads)


def test_loss_function_misuse_raises(seq2seq_config):
    model = FlashLiteForConditionalGeneration(seq2seq_config)
    with pytest.raises(TypeError):
        model.loss_function = torch.nn.CrossEntropyLoss()
    assert "loss_function" not in dict(model.named_modules())


@pytest.mark.parametrize("causal", [False, True], ids=["seq2seq", "causal"])
def test_label_smoothing_is_the_usual_one_and_stays_out_of_the_model(tmp_path, tiny_config, causal):
    model = (FlashLiteForCausalLM if causal else FlashLiteForConditionalGeneration)(
        tiny_config(is_encoder_decoder=not causal)
    )
    rows, hook = ragged_rows(causal, count=8), model.loss_function
    batch = {name: torch.tensor(rows[name]) for name in rows.column_names}
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.2))
    loss = CarefulTrainer(model, args, train_dataset=rows).compute_loss(model.eval(), batch)
    torch.testing.assert_close(loss, LabelSmoother(0.2)(model(**batch), batch["labels"], shift_labels=causal))
    if causal:  # an encoder-decoder under the stock Trainer needs a collator that gives it decoder inputs
        stock = Trainer(model, TrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.2)))
        torch.testing.assert_close(loss, stock.compute_loss(model, dict(batch)))
    assert model.loss_function is hook
    set_loss_function(model, KDLoss())  # smooths by itself
    assert CarefulTrainer(model, args, train_dataset=rows).label_smoother is None
    set_loss_function(model, lambda hidden_states, lm_head, labels, **kwargs: hidden_states.sum())
    with pytest.raises(ValueError, match="label_smoothing_factor is 0.2.*never be called"):
        CarefulTrainer(model, args, train_dataset=rows)


def test_label_smoothing_of_positions_is_refused(tmp_path, tiny_config):
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.2))
    with pytest.raises(ValueError, match="learns from start_positions, end_positions"):
        CarefulTrainer(FlashLiteForQuestionAnswering(tiny_config()), args)


@pytest.mark.parametrize("known", [False, True], ids=["plain", "with the model"])
def test_stock_seq2seq_trainer_smooths_as_with_the_usual_collator(tmp_path, seq2seq_config, known):
    """The stock Trainer keeps the labels from the model, whose decoder inputs the collator must make then."""
    model, tokenizer = FlashLiteForConditionalGeneration(seq2seq_config), checkpoints.make_tokenizer()
    rows = [{"input_ids": [5, 6, 7, 8][:n], "labels": [9, 10, 11, 2][:n]} for n in (4, 3)]
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, label_smoothing_factor=0.1))
    usual = DataCollatorForSeq2Seq(tokenizer, model)
    ours = PaddingCollator(tokenizer, model=model if known else None)
    stock = Seq2SeqTrainer(model, args, data_collator=ours, train_dataset=rows, eval_dataset=rows)
    if known:
        expected = Seq2SeqTrainer(model, args, data_collator=usual, eval_dataset=rows).evaluate()["eval_loss"]
        assert stock.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        stock.train()
        return
    for run in (stock.evaluate, stock.train):
        with pytest.raises(ValueError, match=r"PaddingCollator\(tokenizer, model=model\)"):
            run()
    assert stock.state.global_step == 0


class PoisonedTrainer(CarefulTrainer):
    """Breaks the weights at one step, as a diverging run does."""

    def training_step(self, model, *args, **kwargs):
        if self.state.global_step == 2:
            with torch.no_grad():
                model.lm_head.weight.fill_(float("nan"))
        return super().training_step(model, *args, **kwargs)


def test_broken_loss_stops_with_step_batch_and_last_checkpoint(tmp_path, causal_config):
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, save_strategy="steps", save_steps=1))
    trainer = PoisonedTrainer(FlashLiteForCausalLM(causal_config), args, train_dataset=ragged_rows(True))
    with pytest.raises(FloatingPointError, match="step 3.*broken_batch_rank0.safetensors.*checkpoint-2"):
        trainer.train()
    assert load_file(tmp_path / "broken_batch_rank0.safetensors")["labels"].shape == (8, 10)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")


def test_full_disk_leaves_the_previous_checkpoint(tmp_path, causal_config, monkeypatch):
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, save_strategy="steps", save_steps=1, save_total_limit=1))
    trainer = CarefulTrainer(FlashLiteForCausalLM(causal_config), args, train_dataset=ragged_rows(True))
    save = torch.save

    def full_disk(value, path, *rest, **options):
        if "checkpoint-2" in str(path):
            raise OSError(28, "No space left on device")
        return save(value, path, *rest, **options)

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="MiB are free.*checkpoint-1"):
        trainer.train()
    assert not (tmp_path / "checkpoint-2").exists()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
    monkeypatch.setattr(torch, "save", save)
    trainer = CarefulTrainer(FlashLiteForCausalLM(causal_config), args, train_dataset=ragged_rows(True))
    trainer.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_half_written_checkpoints_are_passed_over(tmp_path):
    assert last_checkpoint(tmp_path) is None
    for step in (5, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (5, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


SCRIPT = """
import json, sys, time, torch
import numpy as np
sys.path.insert(0, {tests!r})
from conftest import TINY
from training_runs import arguments, ragged_rows, streams
from transformers import Seq2SeqTrainingArguments
from modeling_flashlite import FlashLiteConfig, FlashLiteForCausalLM
from modeling_flashlite.training.trainers import CarefulTrainer, SegmentTrainer, last_checkpoint
folder, kind, slow = sys.argv[1:]
torch.manual_seed(0)
model = FlashLiteForCausalLM(FlashLiteConfig(**{{**TINY, "dropout_rate": 0.1, "is_encoder_decoder": False}}))
options = dict(max_steps=6, save_strategy="steps", save_steps=2, per_device_train_batch_size=4)
options["lr_scheduler_type"] = "cosine"
cls, rows = (SegmentTrainer, streams(4)) if kind == "segments" else (CarefulTrainer, ragged_rows(True))
class Slow(cls):
    def training_step(self, *args, **kwargs):
        print("step", self.state.global_step, flush=True)
        time.sleep(float(slow) * (self.state.global_step >= 3))
        return super().training_step(*args, **kwargs)
trainer = Slow(model, Seq2SeqTrainingArguments(**arguments(folder, **options)), train_dataset=rows)
trainer.train(resume_from_checkpoint=last_checkpoint(folder))
logs = [log for log in trainer.state.log_history if "grad_norm" in log]
print(json.dumps([(log["step"], log["loss"], log["grad_norm"]) for log in logs]))
"""


@pytest.mark.parametrize("kind", ["plain", "segments"])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, kind):
    code = textwrap.dedent(SCRIPT).format(tests=os.path.dirname(__file__))

    def start(folder, slow):
        command = [sys.executable, "-c", code, str(tmp_path / folder), kind, str(slow)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    victim = start("killed", 30)
    for line in victim.stdout:
        if line.strip() == "step 3":  # the checkpoint of step 2 is written, the next one is not
            break
    time.sleep(0.1)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert victim.returncode == -signal.SIGKILL
    outputs = []
    for folder in ("killed", "whole"):
        output, errors = start(folder, 0).communicate(timeout=300)
        assert output, errors
        outputs.append(json.loads(output.splitlines()[-1]))
    assert outputs[0] == outputs[1]


def segment_model(config):
    torch.manual_seed(0)
    return FlashLiteForCausalLM(config)


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_segment_memory_follows_its_stream(tmp_path, causal_config, batch, accumulation):
    """However the streams are spread over micro-batches, each row sees its own past and nobody else's."""
    rows, model = streams(4), segment_model(causal_config)
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "learning_rate": 0.0}
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, max_steps=len(rows) // 4, **options))
    trainer = SegmentTrainer(model, args, train_dataset=rows)
    trainer.train()
    found = [log["loss"] for log in trainer.state.log_history if "grad_norm" in log]
    expected = []
    columns = rows.with_format("torch")[:]
    memories = [model.new_memory() for _ in range(4)]
    for step in range(len(rows) // 4):
        total = count = 0
        for stream in range(4):
            row = {key: value[4 * step + stream][None] for key, value in columns.items()}
            if row.pop("memory_reset"):
                memories[stream] = model.new_memory()
            with torch.no_grad():
                output = model(**row, memory=memories[stream])
            memories[stream] = output.memory
            labels = int((row["shift_labels"] != -100).sum())
            total, count = total + output.loss.item() * labels, count + labels
        expected.append(total / max(count, 1))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_segment_memory_is_used_and_evaluation_has_its_own(tmp_path, causal_config):
    rows = streams(4)
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, per_device_train_batch_size=4, per_device_eval_batch_size=4))
    trainer = SegmentTrainer(segment_model(causal_config), args, train_dataset=rows, eval_dataset=rows)
    first, again = trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]
    assert first == again
    forgetful = rows.map(lambda row: {"memory_reset": True})
    assert trainer.evaluate(forgetful)["eval_loss"] != first


@pytest.mark.parametrize("position_encoding", ["rotary", "transformer_xl"])
def test_memory_file_is_exact_and_checked(tmp_path, tiny_config, position_encoding):
    model, path = (
        segment_model(tiny_config(position_encoding=position_encoding)).eval(),
        tmp_path / "memory_0.safetensors",
    )
    memories = {}
    for slot in range(2):
        memory, ids = model.new_memory(), torch.arange(3, 3 + 2 * (50 + slot)).view(2, -1) % V
        for reset in (False, True):
            memory.reset_rows(torch.tensor([False, reset]))
            memory = model(ids, memory=memory).memory
        memories[slot] = memory
    write_tensors(memory_tensors(memories), path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    read = read_memories(path, model, 2, 2, "cpu")
    for slot, memory in memories.items():
        for layer, other in zip(memory.layers, read[slot].layers):
            state, expected = vars(other), {name: value for name, value in vars(layer).items() if name != "spec"}
            for name in expected:
                assert type(state[name]) is type(expected[name]), name
                if name not in ("device", "dtype"):
                    torch.testing.assert_close(state[name], expected[name], rtol=0, atol=0)
        torch.testing.assert_close(model(ids, memory=read[slot]).logits, model(ids, memory=memory).logits)

    good = load_file(path)

    def refused(change, match, slots=2, rows=2):
        write_tensors({**good, **change}, path)
        with pytest.raises(ValueError, match=f"damaged or of another run.*{match}"):
            read_memories(path, model, slots, rows, "cpu")

    refused({}, "other tensors", slots=1)
    refused({}, "for 3 rows", rows=3)
    refused({"more": torch.zeros(1)}, "other tensors")
    refused({"0.0._keys": good["0.0._keys"][..., :-1]}, "keys")
    refused({"0.1._values": good["0.1._values"].int()}, "values")
    refused({"0.1.fill": good["0.1.fill"] + 1000}, "fill")
    refused({"0.1.base": torch.zeros(5)}, "base")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="damaged or of another run"):
        read_memories(path, model, 2, 2, "cpu")


def test_segments_that_do_not_fit_the_batch_are_refused(tmp_path, causal_config):
    args = Seq2SeqTrainingArguments(**arguments(tmp_path, per_device_train_batch_size=3))
    with pytest.raises(ValueError, match="batch_size=3"):
        SegmentTrainer(segment_model(causal_config), args, train_dataset=streams(4))
    with pytest.raises(ValueError, match="segment_streams"):
        SegmentTrainer(segment_model(causal_config), args, train_dataset=ragged_rows(True))


def test_loss_curve_is_drawn(tmp_path):
    logs = [{"step": step, "loss": 3 - step / 10, "kd": 1 / (1 + step)} for step in range(5)]
    path = plot_losses([*logs, {"step": 4, "eval_loss": 2.7}], tmp_path / "loss.svg")
    assert path.read_text().count("<path") > 3
    assert plot_losses([], tmp_path / "none.svg") is None
