"""The convert verb: what it cannot keep is refused, and a refused command leaves nothing."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from checkpoints import HEADS, make_model, make_tokenizer
from parents import make_parent
from transformers import LlamaForCausalLM
from verbs import load_script

from modeling_flashlite import EcqConfig, FlashLiteConfig, FlashLiteForCausalLM, convert
from modeling_flashlite.cli import parse_args
from modeling_flashlite.training.calibration import quantize
from modeling_flashlite.training.families import ConversionError
from modeling_flashlite.training.lora import add_lora


def run(model, output, *options):
    script = load_script("convert")
    return script.main(*parse_args([script.ConvertArgs], [f"--model={model}", f"--output={output}", *options]))


def refused(message, model, tmp_path, *options):
    with pytest.raises((ValueError, OSError), match=message) as caught:
        run(model, tmp_path / "out", *options)
    assert "\n" not in str(caught.value)
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A small Llama, and the same as Flash-Lite, each with a tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("convert"), make_tokenizer()
    parent = make_parent("llama", torch.float32, vocab_size=len(tokenizer))
    for name, model in (("llama", parent), ("flash", convert(parent))):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


CHANGES = [["--to=llama"], ["--encoder_decoder=true"], ["--prune=layers=1"]]


@pytest.mark.parametrize("change", CHANGES, ids=["to", "encoder_decoder", "prune"])
@pytest.mark.parametrize("kind", [*(kind for kind in HEADS if kind != "causal"), "quantized", "adapter"])
def test_what_would_lose_trained_weights_is_refused(kind, change, ground, tmp_path):
    message = "is quantized; dequantize" if kind == "quantized" else "is an adapter; merge it"
    if kind == "quantized":
        model = quantize(FlashLiteForCausalLM.from_pretrained(ground / "flash"), EcqConfig())
    elif kind == "adapter":
        model = add_lora(FlashLiteForCausalLM.from_pretrained(ground / "flash"), r=2)
    else:
        model = make_model(kind)
        message = f"is a {type(model).__name__}, whose encoder or head would be lost; give a FlashLiteForCausalLM"
    model.save_pretrained(tmp_path / kind)
    refused(message, tmp_path / kind, tmp_path, *change)


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    make_model("causal").save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["decoder"]["num_hidden_layers"] = 1
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    refused(r"do not fit its config \(model.decoder.layers.1", tmp_path / "model", tmp_path, "--encoder_decoder=true")


REFUSED = {
    "an axis": ("flash", ["--to=llama", "--block_size=16"], "--block_size is only used to convert"),
    "a length": ("flash", ["--prune=layers=1", "--max_length=64"], "--max_length is only used to convert"),
    "text": ("flash", ["--to=llama", "--dataset=a.txt"], "--dataset is only used with --prune"),
    "two changes": ("flash", ["--to=llama", "--encoder_decoder=true"], "exclude each other"),
    "another family": ("flash", ["--to=gpt2"], "gpt2 is not a supported family"),
    "no change": ("flash", [], "is a Flash-Lite model already"),
    "a parent": ("llama", ["--to=llama"], "convert .*llama first"),
    "a missing file": ("llama", ["--dataset=nope.txt"], "nope.txt"),
    "a missing column": ("llama", ["--dataset={text}", "--column=foo"], "foo"),
    "nowhere": ("nowhere", [], "has no config that can be read"),
    "an empty text": ("llama", ["--dataset={empty}"], "has 0 tokens, but the report needs 2"),
    "a short text": ("flash", ["--prune=layers=1", "--dataset={text}"], "tokens, but pruning needs 512"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_commands_are_refused_before_anything_is_written(name, ground, tmp_path):
    model, options, message = REFUSED[name]
    (tmp_path / "text.jsonl").write_text('{"text": "ab cd, ef gh. ab"}\n')
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    files = {"text": tmp_path / "text.jsonl", "empty": tmp_path / "empty.jsonl"}
    refused(message, ground / model, tmp_path, *(option.format(**files) for option in options))


@pytest.mark.parametrize("tokens", [1, -5])
def test_a_report_needs_two_tokens(tokens, capsys):
    with pytest.raises(SystemExit):
        parse_args([load_script("convert").ConvertArgs], ["--model=a", "--output=b", f"--report_tokens={tokens}"])
    assert f"report_tokens is {tokens}, but must be 0 or at least 2" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [0, 2])
def test_a_converted_model_comes_with_its_report(tokens, ground, tmp_path):
    found = run(ground / "llama", tmp_path / "out", f"--report_tokens={tokens}")
    assert found["parity"]["with_plain_products"] < 1e-5 and ("perplexity" in found) == bool(tokens)
    kept = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert found == {"output": str(tmp_path / "out"), **kept}


def test_a_model_of_the_hub_is_written_as_its_family(ground, tmp_path, monkeypatch):
    """The cache of the Hub stands in for it."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--flashlite-test--convert"
    try:
        shutil.copytree(ground / "flash", repo / "snapshots" / "0")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text("0")
        run("flashlite-test/convert", tmp_path / "out", "--to=llama")
    finally:
        shutil.rmtree(repo)
    back = LlamaForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    parent = LlamaForCausalLM.from_pretrained(ground / "llama").state_dict()
    assert all(torch.equal(back[name], parent[name]) for name in parent)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_checkpoint_without_its_class_is_loaded_by_its_weights(tmp_path):
    config = FlashLiteConfig(num_hidden_layers=1, hidden_size=24, num_attention_heads=4, is_encoder_decoder=False)
    FlashLiteForCausalLM(config).save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match="rotary positions"):
        run(tmp_path / "model", tmp_path / "out", "--to=llama")
