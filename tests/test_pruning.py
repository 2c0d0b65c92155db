"""Pruning: parts without effect are removed first, and removing them changes nothing."""

import json

import pytest
import torch
from checkpoints import make_tokenizer
from parents import close, make_parent, some_ids
from verbs import load_script

from modeling_flashlite import FlashLiteForCausalLM, convert
from modeling_flashlite.training.conversion import to_encoder_decoder
from modeling_flashlite.training.distillation import student_from_teacher
from modeling_flashlite.training.families import ConversionError
from modeling_flashlite.training.pruning import count, parse_target, prune

FAMILIES = ["llama, biases, a head size of its own", "qwen3", "olmo2", "gemma3", "smollm3"]


@pytest.fixture(params=FAMILIES)
def model(request):
    return convert(make_parent(request.param))


@torch.no_grad()
def test_dead_units_heads_and_layers_are_pruned_first(model):
    stack = model.config.decoder
    layers = model.model.decoder.layers
    for layer in layers:
        layer.mlp.down_proj.weight[:, 5:9] = 0
        if stack.num_key_value_heads > 1:
            layer.self_attn.o_proj.weight[:, : stack.num_attention_heads // 2 * stack.head_dim] = 0
    layers[1].mlp.down_proj.weight.zero_()
    layers[1].self_attn.o_proj.weight.zero_()
    for part in (layers[1].mlp.down_proj, layers[1].self_attn.o_proj):
        if part.bias is not None:
            part.bias.zero_()
    groups = max(1, stack.num_key_value_heads // 2)
    if stack.qk_norm == "projection":  # the norm is over all heads, so that one less changes the others
        groups = stack.num_key_value_heads
    target = {"num_hidden_layers": 2, "intermediate_size": 36, "num_key_value_heads": groups}
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    small, sizes = prune(model, target, some_ids(4, 16))
    close(small(some_ids()).logits, model(some_ids()).logits)
    assert sizes == {**target, "hidden_size": 24}
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@torch.no_grad()
def test_hidden_dimensions_and_a_checkpoint_of_its_own(model, tmp_path):
    small, _ = prune(model, {"hidden_size": 16}, some_ids(4, 16))
    small.save_pretrained(tmp_path)
    again = FlashLiteForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(some_ids()).logits, small(some_ids()).logits)
    assert again.config.hidden_size == 16 and again.lm_head.weight.shape == (73, 16)


def test_parameters_are_reached():
    model = convert(make_parent("llama", intermediate_size=960, num_hidden_layers=8))
    whole = count(model.config)
    small, sizes = prune(model, {"parameters": int(0.6 * whole)}, some_ids(2, 8))
    assert 0.55 * whole < small.num_parameters() <= 0.6 * whole
    assert sizes["num_hidden_layers"] < 8 and sizes["intermediate_size"] < 960


def test_targets():
    assert parse_target("layers=20, intermediate_size=1152") == {"num_hidden_layers": 20, "intermediate_size": 1152}
    assert parse_target("parameters=90M") == {"parameters": 90_000_000}
    wrong = ("heads=3", "layers=many", "layers=", "layers=inf", "layers=infM", "layers=2.6", "layers=1,layers=2")
    for text in (*wrong, "parameters=90M,layers=3"):
        with pytest.raises(ConversionError):
            parse_target(text)
    model, rows = convert(make_parent("llama")), some_ids()
    whole = count(model.config)
    for target, message in (
        ({"num_hidden_layers": 4}, "must be 1 to 3"),
        ({"num_hidden_layers": 3}, "has num_hidden_layers=3 already; give a smaller size"),
        ({"parameters": 900_000_000}, f"parameters is 900,000,000, but the model has {whole:,}; give fewer"),
    ):
        with pytest.raises(ConversionError, match=message):
            prune(model, target, rows)
    with pytest.raises(ConversionError, match="encoder or head would be lost"):
        prune(to_encoder_decoder(model), {"num_hidden_layers": 2}, rows)


@torch.no_grad()
def test_a_student_with_fewer_layers_of_a_library_teacher_is_flash_lite():
    teacher = make_parent("smollm3", num_hidden_layers=4)
    whole = student_from_teacher(teacher)
    assert isinstance(whole, FlashLiteForCausalLM)
    close(whole.eval()(some_ids()).logits, teacher(some_ids()).logits)
    student = student_from_teacher(teacher, decoder_layers=2)
    assert student.config.num_hidden_layers == 2 and len(student.config.no_rope_layers) == 2
    last = student.model.decoder.layers[1].mlp.up_proj.weight
    assert torch.equal(last, teacher.model.layers[3].mlp.up_proj.weight) and last is not teacher.model.layers[3].mlp


def test_the_script_prunes_by_a_single_file_or_by_its_train_split(tmp_path):
    tokenizer = make_tokenizer()
    convert(make_parent("llama", vocab_size=len(tokenizer))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "ab cd, ef gh. " * 400}) + "\n")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    script = load_script("convert")
    for name, dataset in (("one", f"{text}"), ("two", f"train={text},test={tmp_path / 'empty.jsonl'}")):
        args = script.ConvertArgs(str(tmp_path / "model"), str(tmp_path / name), prune="layers=1", dataset=dataset)
        script.main(args)
        assert FlashLiteForCausalLM.from_pretrained(tmp_path / name).config.num_hidden_layers == 1
