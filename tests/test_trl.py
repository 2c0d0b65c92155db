"""TRL trains a Flash-Lite model like any other: supervised on conversations, and on preferences."""

import pytest
import torch
from checkpoints import save_checkpoint
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

trl = pytest.importorskip("trl")
# TRL still uses the older names of transformers
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

QUESTION = [{"role": "user", "content": "Who grants a licence?"}]
GOOD, BAD = [{"role": "assistant", "content": "Each contributor."}], [{"role": "assistant", "content": "Nobody."}]


def run(kind, config, rows, folder, **options):
    """Two steps; the model, its weights before, and what was logged."""
    save_checkpoint("causal", folder)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    shared = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "learning_rate": 1e-2}
    args = config(str(folder / "run"), **shared, max_length=64, use_cpu=True, bf16=False, report_to="none", **options)
    trainer = kind(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.train()
    return trainer, before


@pytest.mark.parametrize("packing", [False, True])
def test_supervised(packing, tmp_path):
    rows = [{"messages": QUESTION + GOOD}] * 4
    options = {"assistant_only_loss": True, "packing": packing}
    trainer, before = run(trl.SFTTrainer, trl.SFTConfig, rows, tmp_path, **options)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert all((weight != before[name]).any() for name, weight in trainer.model.named_parameters() if "q_proj" in name)


def test_preferences(tmp_path):
    rows = [{"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}] * 4
    trainer, _ = run(trl.DPOTrainer, trl.DPOConfig, rows, tmp_path)
    margins = [row["rewards/margins"] for row in trainer.state.log_history if "rewards/margins" in row]
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[1] > 0
    assert all(torch.isfinite(weight).all() for weight in trainer.model.parameters())
