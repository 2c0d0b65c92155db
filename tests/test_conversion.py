"""Converted models compute what their parents compute, convert back bit for bit, and bad checkpoints are refused."""

import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from huggingface_hub import ModelCard
from parents import CASES, SIZES, close, in_full_precision, make_parent, some_ids
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from modeling_flashlite import FlashLiteConfig, FlashLiteForCausalLM, convert
from modeling_flashlite.measure.parity import full_attention, logit_parity
from modeling_flashlite.training.conversion import convert_back, to_encoder_decoder
from modeling_flashlite.training.families import FAMILIES, ConversionError, dense_length, flashlite_config
from modeling_flashlite.training.source import open_source

# from 5.24 on the argument of the parents is called `cache`
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_logits_equal_the_parents(name):
    parent = make_parent(name)
    model = convert(parent)
    ids = some_ids()
    close(model(ids).logits, parent(ids).logits)
    # padded on the left, as batches of prompts are
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = model(ids, attention_mask=mask).logits
    close(padded[0, 7:], parent(ids, attention_mask=mask, position_ids=positions).logits[0, 7:])
    # cached, in pieces
    past = model(ids[:, :17], use_cache=True).past_key_values
    theirs = parent(ids[:, :17], use_cache=True).past_key_values
    for piece in (ids[:, 17:19], ids[:, 19:20], ids[:, 20:]):
        ours = model(piece, past_key_values=past).logits
        close(ours, parent(piece, past_key_values=theirs).logits)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_the_parents(name):
    parent = make_parent(name)
    model, ids = convert(parent), some_ids(1, 9)
    settings = {"max_new_tokens": 64, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), parent.generate(ids, **settings))


def test_parity_is_zero_with_the_parents_products_and_leaves_its_weights_alone():
    parent = make_parent("llama", torch.float32)
    model = convert(parent)
    before = {name: weight.clone() for name, weight in parent.state_dict().items()}
    found = logit_parity(model, parent, some_ids())
    assert found["with_plain_products"] == 0 and found["same_choice"] == 1
    assert 0 < found["parent_from_float64"] < 1e-5 and 0 < found["from_float64"] < 1e-5
    after = parent.state_dict()
    assert all(after[name].dtype == torch.float32 and torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("name", CASES)
def test_conversion_there_and_back_is_bit_exact(name, tmp_path):
    parent = make_parent(name, torch.bfloat16)
    parent.save_pretrained(tmp_path / "parent")
    convert(tmp_path / "parent", output=tmp_path / "flash")
    model = FlashLiteForCausalLM.from_pretrained(tmp_path / "flash")
    assert model.dtype == torch.bfloat16
    convert_back(model, CASES[name][0]).save_pretrained(tmp_path / "back")
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("parent", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    parent, again = (AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("parent", "back"))
    assert type(again) is type(parent)
    assert torch.equal(again(some_ids()).logits, parent(some_ids()).logits)


def test_the_converted_weights_are_copies():
    parent = make_parent("llama")
    model = convert(parent)
    with torch.no_grad():
        model.get_input_embeddings().weight.zero_()
    assert parent.get_input_embeddings().weight.abs().sum() > 0


def test_axes_follow_the_trained_length():
    parent = make_parent("llama", max_position_embeddings=8192)
    stack = flashlite_config(parent.config).decoder
    assert (stack.block_size, stack.relevance_top_k, stack.memory_blocks) == (8, 89, 1022)
    assert (stack.memory_blocks + 2) * stack.block_size <= 8192 < (stack.memory_blocks + 3) * stack.block_size
    longer = flashlite_config(make_parent("llama", max_position_embeddings=32768).config).decoder
    assert (longer.relevance_top_k, longer.memory_blocks) == (365, 4094)
    own = flashlite_config(parent.config, relevance_top_k=None, memory_blocks=3).decoder
    assert (own.relevance_top_k, own.memory_blocks) == (None, 3)


@torch.no_grad()
def test_beyond_the_dense_length_attention_is_sparse():
    parent = make_parent("llama")
    model = convert(parent, block_size=4, sub_block_size=2, relevance_top_k=1, memory_blocks=None)
    ids, dense = some_ids(1, 60), dense_length(model.config)
    difference = (model(ids).logits - parent(ids).logits).abs().amax(-1)[0]
    assert difference[:dense].max() < 1e-10 < difference[dense:].max()
    with full_attention(model):
        close(model(ids).logits, parent(ids).logits)


REFUSED = {
    "another family": ("gpt2", {}, "gpt2 cannot be converted; supported families are llama"),
    "experts": ("mixtral", {}, "mixtral cannot be converted"),
    "windows": ("mistral", {"sliding_window": 16}, "attention windows of 16 tokens"),
    "windows of some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
        "16",
    ),
    "soft caps": ("gemma3_text", {"final_logit_softcapping": 30.0, "sliding_window": 128}, "soft caps"),
    "parts of heads": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "a part of each head",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_expressed_is_refused_before_weights_are_read(name, tmp_path):
    model_type, changes, message = REFUSED[name]
    AutoConfig.for_model(model_type, **{**SIZES, **changes}).save_pretrained(tmp_path / "parent")
    with pytest.raises(ConversionError, match=message) as caught:  # there are no weights at all
        convert(tmp_path / "parent", output=tmp_path / "flash")
    assert "\n" not in str(caught.value) and not (tmp_path / "flash").exists()


def test_a_window_is_taken_where_no_text_is_longer():
    parent = make_parent("mistral", sliding_window=64)
    with pytest.raises(ConversionError, match="max_length=64"):
        convert(parent)
    decoder = convert(parent, max_length=64).config.decoder
    assert (decoder.memory_blocks + 2) * decoder.block_size == 64


@pytest.fixture
def folder(tmp_path):
    make_parent("llama", torch.float32, tie_word_embeddings=True).save_pretrained(tmp_path / "parent")
    return tmp_path / "parent"


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def pickles_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-50])


def name_shard(folder, shard):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))


NORM = "model.norm.weight"
DAMAGE = {
    "a missing weight": (lambda f: change_weights(f, lambda w: w.pop(NORM)), "lacks model.norm.weight"),
    "an extra weight": (lambda f: change_weights(f, lambda w: w.update(x=torch.ones(2))), "has the unknown weight x"),
    "a misshapen weight": (
        lambda f: change_weights(f, lambda w: w.update({NORM: torch.ones(5)})),
        r"model.norm.weight of .* is \[5\], but its config says \[24\]",
    ),
    "NaN": (lambda f: change_weights(f, lambda w: w[NORM].fill_(float("nan"))), "holds NaN or infinity"),
    "integers": (lambda f: change_weights(f, lambda w: w.update({NORM: torch.ones(24).int()})), "is torch.int32"),
    "a head of its own in a tied model": (
        lambda f: change_weights(f, lambda w: w.update({"lm_head.weight": torch.ones(73, 24)})),
        "lm_head.weight differs",
    ),
    "another config": (lambda f: change_config(f, intermediate_size=41), "one of them is wrong"),
    "fewer layers": (lambda f: change_config(f, num_hidden_layers=2), "has the unknown weight model.layers.2"),
    "no layers": (lambda f: change_config(f, num_hidden_layers=0), "`num_hidden_layers` is 0"),
    "absurdly many layers": (lambda f: change_config(f, num_hidden_layers=10**9), "too few for 1000000000 layers"),
    "heads that do not divide": (lambda f: change_config(f, num_key_value_heads=3), "must be a multiple of"),
    "a padding token of its own": (lambda f: change_config(f, pad_token_id=9999), "beyond its 73 tokens"),
    "float8": (lambda f: change_weights(f, lambda w: w.update({NORM: w[NORM].to(torch.float8_e4m3fn)})), "float8"),
    "broken generation settings": (
        lambda f: (f / "generation_config.json").write_text("{"),
        "generation_config.json of",
    ),
    "pickles": (pickles_only, "as a pickle"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "a short file": (truncate, "cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config that can be read"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "has no config that can be read"),
    "an index that leads out": (lambda f: name_shard(f, "../x"), "in the index of"),
    "an index of numbers": (lambda f: name_shard(f, 5), "in the index of"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_checkpoints_are_refused_in_one_sentence(name, folder, tmp_path):
    damage, message = DAMAGE[name]
    damage(folder)
    with pytest.raises(ConversionError, match=message) as caught:
        convert(folder, output=tmp_path / "flash")
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent"]


def write_gguf(path, architecture):
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_tensor("output_norm.weight", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_files_that_cannot_be_read_are_refused_in_one_sentence(tmp_path):
    (tmp_path / "text.gguf").write_text("hello")
    write_gguf(tmp_path / "mamba.gguf", "mamba")
    write_gguf(tmp_path / "unknown.gguf", "llama")
    reader = GGUFReader(tmp_path / "unknown.gguf", "r+")
    reader.tensors[0].field.parts[4][0] = 99  # the type of its numbers
    reader.data.flush()
    messages = {
        "text": "cannot be read as GGUF",
        "mamba": "mamba cannot be converted",
        "unknown": "is not a valid GGMLQuantizationType",
    }
    for name, message in {**messages, "none": "There is no file"}.items():
        with pytest.raises(ConversionError, match=message) as caught:
            convert(tmp_path / f"{name}.gguf")
        assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_nothing(folder, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FlashLiteForCausalLM, "save_pretrained", full)
    with pytest.raises(ConversionError, match="No space left on device; nothing was kept"):
        convert(folder, output=tmp_path / "flash")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parent"]


def test_a_killed_conversion_leaves_no_checkpoint_and_the_next_one_works(folder, tmp_path):
    code = (
        "import os, signal, sys\n"
        "from modeling_flashlite import FlashLiteForCausalLM, convert\n"
        "save = FlashLiteForCausalLM.save_pretrained\n"
        "def killed(self, folder, **kwargs):\n"
        "    save(self, folder, **kwargs)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "FlashLiteForCausalLM.save_pretrained = killed\n"
        "convert(sys.argv[1], output=sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "flash")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "flash").exists()
    convert(folder, output=tmp_path / "flash")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["flash", "parent"]


def test_an_older_folder_is_not_overwritten(folder, tmp_path):
    (tmp_path / "flash").mkdir()
    (tmp_path / "flash" / "mine.txt").write_text("mine")
    with pytest.raises(ConversionError, match="exists already"):
        convert(folder, output=tmp_path / "flash")
    assert [path.name for path in (tmp_path / "flash").iterdir()] == ["mine.txt"]


def test_settings_of_generation_are_a_copy_without_the_parents_cache():
    parent = make_parent("llama", torch.float32)
    parent.generation_config.cache_implementation = "static"
    model = convert(parent)
    assert model.generate(some_ids(1, 5), max_new_tokens=3).shape[1] == 8
    model.generation_config.max_new_tokens = 7
    back = convert_back(model, "llama")
    back.generation_config.max_new_tokens = 9
    kept = [one.generation_config.max_new_tokens for one in (parent, model, back)]
    assert kept == [None, 7, 9] and parent.generation_config.cache_implementation == "static"


def test_a_misspelt_axis_and_what_is_no_model_are_refused():
    parent = make_parent("llama")
    with pytest.raises(ConversionError, match="no field 'relevance_topk'; it has block_size, .*relevance_top_k"):
        convert(parent, relevance_topk=3)
    with pytest.raises(ConversionError, match="A PeftModel.* cannot be converted; merge adapters"):
        convert(get_peft_model(parent, LoraConfig(target_modules=["q_proj"])))


@pytest.mark.parametrize("name", ["my model: v2", "- x", "a #b"])
def test_a_card_is_yaml_whatever_the_name_and_the_licence(name, tmp_path):
    make_parent("llama", torch.float32).save_pretrained(tmp_path / name)
    said = {"license": "other", "license_name": "two:\nlines", "license_link": "LICENSE #1", "language": ["en", "de"]}
    (tmp_path / name / "README.md").write_text(f"---\n{json.dumps(said)}\n---\n")
    convert(tmp_path / name, output=tmp_path / "flash")
    card = ModelCard.load(tmp_path / "flash" / "README.md")
    assert card.data.base_model == name and card.data.tags == ["flashlite"]
    assert said == {field: card.data[field] for field in said} and "Licence: two: lines." in card.text


def test_shards_licence_and_settings_come_along(tmp_path):
    parent = make_parent("llama", torch.float32)
    parent.generation_config.eos_token_id = [2, 5]
    parent.save_pretrained(tmp_path / "parent", max_shard_size="20KB")
    (tmp_path / "parent" / "LICENSE").write_text("Do what you like.")
    (tmp_path / "parent" / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n# A parent\n")
    model = convert(tmp_path / "parent", output=tmp_path / "flash")
    assert torch.equal(model.lm_head.weight, parent.lm_head.weight)
    assert FlashLiteForCausalLM.from_pretrained(tmp_path / "flash").generation_config.eos_token_id == [2, 5]
    card = (tmp_path / "flash" / "README.md").read_text()
    assert "license: mit" in card and "base_model: parent" in card
    assert (tmp_path / "flash" / "LICENSE").read_text() == "Do what you like."
    shutil.rmtree(tmp_path / "parent")
    assert torch.isfinite(model(some_ids()).logits).all()  # it stands on no file of its parent


def test_back_is_refused_where_the_family_has_no_such_field():
    model = convert(make_parent("qwen3"))
    with pytest.raises(ConversionError, match="llama has"):
        convert_back(model, "llama")
    own = FlashLiteForCausalLM(FlashLiteConfig(num_hidden_layers=1, hidden_size=24, num_attention_heads=4))
    with pytest.raises(ConversionError, match="rotary positions"):
        convert_back(own, "llama")
    with pytest.raises(ConversionError, match="not a supported family"):
        convert_back(model, "gpt2")


@torch.no_grad()
def test_a_model_trained_here_goes_to_a_family_with_multipliers():
    config = FlashLiteConfig(
        **{name: value for name, value in SIZES.items() if name != "max_position_embeddings"},
        is_encoder_decoder=False,
        position_encoding="rotary",
    )
    model = FlashLiteForCausalLM(config).double().eval()
    with pytest.raises(ConversionError, match="embedding_multiplier"):
        convert_back(model, "llama")
    back = in_full_precision(convert_back(model, "granite"))
    torch.testing.assert_close(back(some_ids()).logits, model(some_ids()).logits, rtol=0, atol=1e-5)


def test_every_family_is_tried():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)
    with pytest.raises(ConversionError, match="no language-model head"):
        open_source(make_parent("llama").model)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "llama, untied", "gemma3", "smollm3"])
def test_an_encoder_decoder_has_no_new_weight(name, tmp_path):
    model = convert(make_parent(name))
    seq2seq = to_encoder_decoder(model)
    ours, new = model.state_dict(), seq2seq.state_dict()
    for weight in new:
        assert torch.equal(new[weight], ours[weight.replace("encoder", "decoder")]), weight
    encoder, decoder = seq2seq.model.encoder, seq2seq.model.decoder
    assert encoder.layers[0].mlp.up_proj.weight is not decoder.layers[0].mlp.up_proj.weight
    if model.config.tie_word_embeddings:
        assert encoder.embed_tokens.weight is decoder.embed_tokens.weight
        seq2seq.save_pretrained(tmp_path)
        tables = [key for key in load_file(tmp_path / "model.safetensors") if "embed_tokens" in key or "head" in key]
        assert len(tables) == 1
    out = seq2seq.generate(some_ids(2, 9), max_new_tokens=5, do_sample=False)
    assert out.shape[0] == 2
    # what it reads ahead changes the states of the encoder, not those of the decoder
    ids, later = some_ids(1, 9), some_ids(1, 9)
    later[0, -1] = (later[0, -1] + 1) % 73
    assert not torch.allclose(encoder(ids).last_hidden_state[0, 0], encoder(later).last_hidden_state[0, 0])
    close(model(ids).logits[0, :-1], model(later).logits[0, :-1])
