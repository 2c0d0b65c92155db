"""Tiny random checkpoints of every head, with a tokenizer, for the tests of the Hub, the pipelines and the servers."""

import json
from pathlib import Path

import torch

try:  # what huggingface_hub and openai stand on has changed its name
    import httpx2 as httpx  # noqa: F401
except ImportError:
    import httpx  # noqa: F401

import modeling_flashlite as flashlite
from modeling_flashlite.data.tokenization import train_tokenizer
from modeling_flashlite.ecq_config_flashlite import EcqConfig

TEXT = (Path(__file__).parents[1] / "LICENSE").read_text(encoding="utf-8").splitlines()
HEADS = {
    "seq2seq": (flashlite.FlashLiteForConditionalGeneration, "AutoModelForSeq2SeqLM", True),
    "causal": (flashlite.FlashLiteForCausalLM, "AutoModelForCausalLM", False),
    "base": (flashlite.FlashLiteModel, "AutoModel", False),
    "classifier": (flashlite.FlashLiteForSequenceClassification, "AutoModelForSequenceClassification", False),
    "tagger": (flashlite.FlashLiteForTokenClassification, "AutoModelForTokenClassification", False),
    "reader": (flashlite.FlashLiteForQuestionAnswering, "AutoModelForQuestionAnswering", False),
}
WRITTEN = {
    "summary": "A random model for tests.",
    "license": "apache-2.0",
    "language": ["en"],
    "base_model": "none",
    "distilled_from": "none",
    "datasets": [{"name": "licence-text", "license": "apache-2.0"}],
    "example": "You may not use this file",
    "limits": ["It was never trained."],
    "citation": "@misc{flashlite}",
}
RESULTS = {
    "task": "translation",
    "dataset": "licence-text",
    "split": "test",
    "metrics": {"bleu": 0.5},
    "seeds": [0],
    "speed": [{"name": "greedy, batch 1", "value": 100.0, "unit": "tokens/s"}],
    "hardware": "a test machine",
    "command": "python -m pytest",
    "recipe": "none",
    "seed": 0,
    "commit": "0000000",
}


def make_tokenizer(add_eos_token: bool = False):
    return train_tokenizer(TEXT, 400, add_eos_token=add_eos_token)


def make_model(kind: str, vocab_size: int = 400):
    model_class, _, is_encoder_decoder = HEADS[kind]
    torch.manual_seed(0)
    config = flashlite.FlashLiteConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        block_size=8,
        sub_block_size=4,
        relevance_top_k=2,
        memory_blocks=8,
        is_encoder_decoder=is_encoder_decoder,
    )
    return model_class(config).eval()


def save_checkpoint(kind: str, folder: Path) -> Path:
    """Save model (of a head, or `"quantized"`) and tokenizer, with a card.yaml and a results file beside them."""
    head = "seq2seq" if kind == "quantized" else kind
    tokenizer = make_tokenizer(head == "seq2seq")
    make_model(head, len(tokenizer)).save_pretrained(folder)
    if kind == "quantized":
        model = HEADS[head][0].from_pretrained(folder, quantization_config=EcqConfig(target_bits=4.5))
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    describe(folder)
    return folder


def checkpoint_layers(model, settings: dict | None = None) -> None:
    """Recompute the layers in the backward pass; transformers 5.23 gave the method another name."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(settings)


def describe(folder: Path, **changes) -> None:
    """Write card.yaml (JSON is YAML) and a results file into a run."""
    (folder / "card.yaml").write_text(json.dumps({**WRITTEN, **changes}))
    (folder / "results").mkdir(exist_ok=True)
    (folder / "results" / "translation.json").write_text(json.dumps(RESULTS))
