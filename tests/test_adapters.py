"""Adapters where a script expects a model: merged before they are trained, quantized or cut; one run in a folder."""

import json
import shutil

import pytest
import torch
from checkpoints import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from verbs import RECIPES, TINY_RUN, TINY_SHAPE, argument_classes, load_script, run_verb, write_corpus

from modeling_flashlite.checkpoint import load_language_model, read_tokenizer
from modeling_flashlite.cli import parse_args
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.training.lora import add_lora

# peft 0.21 itself asks for an attribute that transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
IDS = torch.arange(5, 25)[None]


def adapter_of(base, folder):
    """An adapter that changes what its base says, with a tokenizer."""
    adapted = add_lora(AutoModelForCausalLM.from_pretrained(base), r=2)
    adapted.save_pretrained(folder)
    weights = load_file(folder / "adapter_model.safetensors")
    stirred = {name: weight + 0.3 * torch.randn_like(weight) for name, weight in weights.items()}
    save_file(stirred, folder / "adapter_model.safetensors", {"format": "pt"})
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """A corpus, a model and an adapter."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    make_model("causal", len(make_tokenizer())).save_pretrained(folder / "base")
    make_tokenizer().save_pretrained(folder / "base")
    return write_corpus(folder), folder / "base", adapter_of(folder / "base", folder / "adapter")


@torch.no_grad()
def logits(folder):
    return load_language_model(str(folder), device="cpu")(IDS).logits


def base_named_by(folder):
    return json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]


def quantize(dataset, output, *overrides):
    script = load_script("quantize")
    argv = [f"--config={RECIPES['ptq_tiny']}", f"--dataset={dataset}", f"--output_dir={output}", *TINY_RUN]
    return script.main(*parse_args(argument_classes(script), [*argv, "--calibration_batches=1", *overrides]))


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("lora_tiny", ["--lora_r=2"]),
        ("lora_tiny", ["--lora_r=0", "--merge=false"]),
        ("train_tiny", []),
        ("distill_tiny", ["--keep_layers=2", "--k=4"]),
        ("distill_tiny", ["--keep_layers=2", "--k=4", "--lora_r=2"]),
    ],
)
def test_an_adapter_is_trained_as_what_it_says(recipe, overrides, ground, tmp_path):
    dataset, base, adapter = ground
    option = "--teacher" if recipe.startswith("distill") else "--model"
    run_verb(recipe, dataset, tmp_path / "run", [f"{option}={adapter}", "--learning_rate=0", *overrides])
    torch.testing.assert_close(logits(tmp_path / "run"), logits(adapter), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits(adapter), logits(base), atol=1e-2)
    if "--lora_r=2" in overrides:
        assert base_named_by(tmp_path / "run") == str(tmp_path / "run" / "base")
    if recipe == "lora_tiny" and "--lora_r=2" in overrides:
        torch.testing.assert_close(logits(tmp_path / "run" / "merged"), logits(adapter), rtol=1e-4, atol=1e-4)
    if recipe == "train_tiny":  # all of its weights are trained, too
        run_verb(recipe, dataset, tmp_path / "run", [f"--model={adapter}", "--learning_rate=1"])
        assert not torch.allclose(logits(tmp_path / "run"), logits(adapter), atol=1e-2)


@pytest.mark.parametrize("method", ["ptq", "recover"])
def test_an_adapter_is_quantized_as_what_it_says(method, ground, tmp_path):
    dataset, _, adapter = ground
    budget = ["--target_bits=6", f"--method={method}", "--learning_rate=0", *["--lora_r=2"] * (method == "recover")]
    metrics = quantize(dataset, tmp_path, f"--model={adapter}", *budget)
    assert metrics["bits_per_weight"] == pytest.approx(6, abs=0.1)
    if method == "recover":
        assert base_named_by(tmp_path) == str(tmp_path / "base")
        assert torch.equal(logits(tmp_path), logits(tmp_path / "base"))
    assert (logits(tmp_path) - logits(adapter)).std() < 0.2 * logits(adapter).std()


def test_an_adapter_of_a_coded_model_is_merged_into_its_weights(ground, tmp_path):
    dataset, base, _ = ground
    coded = AutoModelForCausalLM.from_pretrained(base, quantization_config=EcqConfig(target_bits=4.5))
    coded.save_pretrained(tmp_path / "coded")
    adapter = adapter_of(tmp_path / "coded", tmp_path / "adapter")
    run_verb("lora_tiny", dataset, tmp_path / "run", [f"--model={adapter}", "--lora_r=2", "--learning_rate=0"])
    torch.testing.assert_close(logits(tmp_path / "run"), logits(adapter), rtol=1e-2, atol=1e-2)


def test_a_folder_holds_a_model_or_adapters(ground, tmp_path):
    dataset, base, adapter = ground
    for source, option in ((base, "--lora_r=2"), (adapter, "--lora_r=0")):
        folder = tmp_path / option
        shutil.copytree(source, folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(ValueError, match="output_dir is .*, where .* would be saved, but it holds"):
            run_verb("lora_tiny", dataset, folder, [f"--model={base}", option, "--merge=false"])
        assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before


@pytest.mark.parametrize("family", ["flashlite", "llama"])
def test_a_tokenizer_without_a_pad_token_will_do(family, ground, tmp_path):
    dataset, base, _ = ground
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_pretrained(base)
    if family == "llama":
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, **sizes))
    model.save_pretrained(tmp_path / "model")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").pad_token is None
    assert read_tokenizer(str(tmp_path / "model")).pad_token == "</s>"
    options = [f"--model={tmp_path / 'model'}", "--lora_r=2", "--load_best_model_at_end=false"]
    run_verb("lora_classification", dataset, tmp_path / "class", options)
    script = load_script("evaluate")
    argv = [f"--dataset={dataset}", "--split=validation", "--resamples=0", f"--output={tmp_path / 'x.json'}"]
    argv += ["--max_new_tokens=2", "--speed_prompts=2", "--speed_tokens=2"]
    for name, task, columns in (
        ("class", "classification", "text=sentence,label=label"),
        ("model", "translation", "source=en,target=de"),
    ):
        given = [f"--model={tmp_path / name}", f"--task={task}", f"--columns={columns}", *argv]
        assert script.main(*parse_args(argument_classes(script), given))


def test_an_end_that_pads_is_learned(ground, tmp_path):
    """In a new model, the embedding of its pad token would stay zero."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run_verb("train_tiny", ground[0], tmp_path / "run", [*TINY_SHAPE, f"--tokenizer={tmp_path / 'tokenizer'}"])
    table = load_language_model(str(tmp_path / "run")).get_input_embeddings()
    assert table.weight[tokenizer.eos_token_id].any()
