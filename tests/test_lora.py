"""Adapters through peft: default targets, training, merging, reloading, switching, and distillation on top."""

import subprocess
import sys

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForSeq2SeqLM, Olmo2Config, Olmo2ForCausalLM, Seq2SeqTrainingArguments
from transformers.integrations.peft import MIN_PEFT_VERSION

from modeling_flashlite import FlashLiteForCausalLM, FlashLiteForConditionalGeneration
from modeling_flashlite.training.distillation import set_loss_function
from modeling_flashlite.training.divergence import KDLoss
from modeling_flashlite.training.lora import TARGET_MODULES, add_lora
from modeling_flashlite.training.trainers import CarefulTrainer

# peft 0.21 itself asks for an attribute that transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
BATCH = {
    "input_ids": torch.arange(3, 19).view(2, 8),
    "attention_mask": torch.ones(2, 8, dtype=torch.long),
    "labels": torch.arange(20, 32).view(2, 6),
}


def rows():
    return [{key: value[i % 2] for key, value in BATCH.items()} for i in range(4)]


def make(config):
    torch.manual_seed(0)
    model = FlashLiteForConditionalGeneration if config.is_encoder_decoder else FlashLiteForCausalLM
    return model(config)


def stir(model):
    """Give the adapters' zero halves some content."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return model


def fit(model, path, **options):
    arguments = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    args = Seq2SeqTrainingArguments(str(path), **{**arguments, **options})
    trainer = CarefulTrainer(model, args, train_dataset=rows())
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_default_targets_are_known_to_peft(tiny_config, encoder_decoder):
    model = get_peft_model(make(tiny_config(is_encoder_decoder=encoder_decoder)), LoraConfig(r=2))
    adapted = {
        name.rpartition(".lora_A")[0].rpartition(".")[2] for name, _ in model.named_modules() if ".lora_A" in name
    }
    assert adapted == set(TARGET_MODULES)


def test_targets_are_known_when_peft_is_imported_after_the_model_was_made():
    code = (
        "import sys, modeling_flashlite as fl\n"
        "config = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, block_size=8)\n"
        "model = fl.FlashLiteForCausalLM(fl.FlashLiteConfig(**config, sub_block_size=4, is_encoder_decoder=False))\n"
        "assert 'peft' not in sys.modules\n"
        "from peft import LoraConfig, get_peft_model\n"
        "assert 'q_proj' in get_peft_model(model, LoraConfig(r=2)).peft_config['default'].target_modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "lm_head"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_alone(tmp_path, seq2seq_config, options, checkpointing):
    model = make(seq2seq_config)
    model.config.tie_word_embeddings = "modules_to_save" not in options
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    model = add_lora(model, r=2, **options)
    losses = fit(model, tmp_path, activation_checkpointing=checkpointing)
    assert losses[-1] < losses[0]
    changed = {
        name
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.grad is None and not weight.any()
    }
    assert not changed
    for name, weight in model.get_base_model().named_parameters():
        name = name.replace(".base_layer", "").replace(".original_module", "")
        if name in before and "lora" not in name and "modules_to_save" not in name:
            assert torch.equal(weight, before[name]), name


def test_checkpointing_changes_no_number(tmp_path, seq2seq_config):
    runs = [
        fit(stir(add_lora(make(seq2seq_config), r=2)), tmp_path, activation_checkpointing=checkpointing)
        for checkpointing in (False, True)
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)


@pytest.mark.parametrize("encoder_decoder", [False, True])
def test_merged_equals_unmerged(tiny_config, encoder_decoder):
    model = stir(add_lora(make(tiny_config(is_encoder_decoder=encoder_decoder)), r=2)).eval()
    batch = BATCH if encoder_decoder else {"input_ids": BATCH["input_ids"]}
    expected = model(**batch).logits
    merged = model.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(merged(**batch).logits, expected, atol=1e-5, rtol=1e-4)


def test_saved_adapters_load_both_ways_and_switch(tmp_path, seq2seq_config):
    base = make(seq2seq_config).eval()
    base.save_pretrained(tmp_path / "base")
    plain = base(**BATCH).logits
    expected = []
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model = stir(add_lora(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base"), r=2)).eval()
        expected.append(model(**BATCH).logits)
        model.save_pretrained(tmp_path / name)
    loaded = PeftModel.from_pretrained(
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base"), tmp_path / "first"
    ).eval()
    torch.testing.assert_close(loaded(**BATCH).logits, expected[0])
    loaded.load_adapter(tmp_path / "second", "second")
    loaded.set_adapter("second")
    torch.testing.assert_close(loaded(**BATCH).logits, expected[1])

    if Version(peft.__version__) < Version(MIN_PEFT_VERSION):
        return  # transformers 5.24 wants a newer peft for its own methods than there is
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").eval()
    for name in ("first", "second"):
        model.load_adapter(str(tmp_path / name), adapter_name=name)
    for name, logits in zip(("first", "second"), expected):
        model.set_adapter(name)
        torch.testing.assert_close(model(**BATCH).logits, logits)
    model.disable_adapters()
    torch.testing.assert_close(model(**BATCH).logits, plain)
    assert model.generate(**{k: v for k, v in BATCH.items() if k != "labels"}, max_new_tokens=3).shape[0] == 2


@pytest.mark.parametrize("targets", [None, ["q_proj", "lm_head"]], ids=["layers", "head"])
def test_distillation_trains_adapters(seq2seq_config, targets):
    model = add_lora(make(seq2seq_config), r=2, target_modules=targets)
    loss = KDLoss()
    set_loss_function(model, loss)
    assert model.get_base_model().loss_function is loss
    teacher = torch.randn(2, 6, 97)
    model(**BATCH, teacher_logits=teacher).loss.backward()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad and "lora_B" in name]
    assert trained and all(model.get_parameter(name).grad.abs().sum() > 0 for name in trained)
    assert loss.pop_metrics()["kd"] > 0


def test_rank_zero_is_refused(seq2seq_config):
    with pytest.raises(ValueError, match="rank 1"):
        add_lora(make(seq2seq_config), r=0)


def test_families_that_peft_does_not_know_are_adapted_everywhere():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Olmo2Config(**sizes, intermediate_size=32)
    names = [name for name, _ in add_lora(Olmo2ForCausalLM(config), r=2).named_parameters() if "lora_A" in name]
    assert len(names) == 7


@pytest.mark.parametrize("encoder_decoder", [False, True])
@pytest.mark.parametrize(
    "options", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [5, 21, 23]}], ids=str
)
def test_trained_tables_survive_merging_and_saving(tmp_path, tiny_config, encoder_decoder, options):
    """One table serves encoder, decoder and head: peft trains all of it, or unties it in the config."""
    config = tiny_config(is_encoder_decoder=encoder_decoder)
    make(config).save_pretrained(tmp_path / "base")
    task = "SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM"
    model = type(make(config)).from_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, LoraConfig(r=2, task_type=task, **options))
    batch = BATCH if encoder_decoder else {"input_ids": BATCH["labels"], "labels": BATCH["labels"]}
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 1.0)
    before = adapted.eval()(**batch).loss
    for _ in range(3):
        optimizer.zero_grad()
        adapted(**batch).loss.backward()
        optimizer.step()
    trained = adapted(**batch)
    assert trained.loss < before
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(**batch).logits, trained.logits, rtol=0, atol=1e-6)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(merged(**batch).logits, trained.logits, rtol=1e-4, atol=1e-5)
    expected = merged(**batch).logits
    merged.save_pretrained(tmp_path / "merged")
    again, report = type(model).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not report["missing_keys"]
    torch.testing.assert_close(again.eval()(**batch).logits, expected, rtol=0, atol=1e-6)
