"""Coded layers: joined, cast, copied, differentiated, and following their codes."""

import copy
import pickle

import pytest
import torch
from coded import SMALL, build, logits_of
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
)

from modeling_flashlite import FlashLiteForCausalLM
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.ecq_modules_flashlite import join
from modeling_flashlite.int8_flashlite import int8_codes
from modeling_flashlite.measure.workloads import random_decoder
from modeling_flashlite.training.calibration import quantize


def test_steps_survive_a_cast():
    model = quantize(build("llama"), EcqConfig(target_bits=4))
    step = model.lm_head.step.clone()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16 and torch.equal(model.lm_head.step, step)
    assert logits_of(model).dtype == torch.bfloat16


def test_generates_and_backpropagates_to_inputs():
    model = quantize(build("t5"), EcqConfig(target_bits=4))
    out = model.generate(torch.randint(3, 256, (2, 9)), max_new_tokens=5, do_sample=False)
    assert out.shape[0] == 2
    embeds = torch.randn(2, 5, 64, requires_grad=True)
    model(inputs_embeds=embeds, decoder_input_ids=torch.ones(2, 3, dtype=torch.long)).logits.sum().backward()
    assert embeds.grad.abs().sum() > 0


def test_a_copy_and_a_pickle_compute_the_same():
    model = quantize(build("llama"), EcqConfig(target_bits=4))
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))
    assert torch.equal(logits_of(pickle.loads(pickle.dumps(model))), logits_of(model))


@torch.no_grad()
def test_sisters_of_a_loaded_model_are_joined_where_they_lie(tmp_path):
    """Layers that a decode session multiplies together are loaded side by side, with each other's wide columns."""
    model = random_decoder((256, 1, 4, 256), seed=0)
    attention, mlp = model.model.decoder.layers[0].self_attn, model.model.decoder.layers[0].mlp
    for column, layer in enumerate((attention.q_proj, attention.v_proj, mlp.up_proj)):
        layer.weight[:, column : 3 * column + 1] *= 12
    quantize(model, EcqConfig()).save_pretrained(tmp_path)
    layer = FlashLiteForCausalLM.from_pretrained(tmp_path).model.decoder.layers[0]
    sisters = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]
    for layers in sisters, [layer.mlp.gate_proj, layer.mlp.up_proj]:
        tiles = [(part.tiles.data_ptr(), part.tiles.shape) for part in layers]
        assert join(layers) is not None
        assert tiles == [(part.tiles.data_ptr(), part.tiles.shape) for part in layers]


def projections(model) -> list[nn.Module]:
    attention = model.model.layers[0].self_attn
    return [attention.q_proj, attention.v_proj]


def tile_filling(seed: int = 0, wide: bool = False):
    """A Llama whose attention layers fill their tiles; some have wide columns, each others."""
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SMALL, "hidden_size": 128}, intermediate_size=96, num_key_value_heads=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    for column, layer in enumerate(projections(model) * wide):
        layer.weight.data[:, column : 3 * column + 1] *= 12
    return quantize(model, EcqConfig())


@torch.no_grad()
@pytest.mark.parametrize("wide", [False, True])
def test_joined_layers_compute_what_each_computes(wide, tmp_path):
    model, other = tile_filling(0, wide), tile_filling(1, not wide)
    layers = projections(model)
    before, bits = logits_of(model), [layer.quantized().codes for layer in layers]
    names, footprint = set(model.state_dict()), model.get_memory_footprint()
    joint = join(layers)
    assert joint.numbers is not None or joint.rare is not None or not wide
    assert joint is join(layers) and joint.out_features == sum(layer.out_features for layer in layers)
    for layer, codes in zip(layers, bits):
        assert torch.equal(layer.quantized().codes, codes)
    # nothing is held twice, and the model is the same to everybody else
    addresses = [layer.tiles.data_ptr() for layer in layers]
    assert addresses == [joint.tiles.data_ptr(), joint.tiles.data_ptr() + layers[0].tiles.numel()]
    # but for wide columns, which are now the same in all
    assert set(model.state_dict()) >= names or wide
    assert 0.9 * footprint < model.get_memory_footprint() < 1.1 * footprint
    torch.testing.assert_close(logits_of(model), before, atol=0.02, rtol=0.02)
    for rows in (1, 5, 40):
        x = torch.randn(rows, layers[0].in_features)
        want = torch.cat([layer(x) for layer in layers], -1)
        torch.testing.assert_close(joint(x), want, atol=2e-2, rtol=2e-2)
        with int8_codes():
            torch.testing.assert_close(joint(x), want, atol=6e-2, rtol=2e-2)
    # what changes a layer parts it from the others, and the next joint follows
    for layer, from_layer in zip(layers, projections(other)):
        layer.set_quantized(from_layer.quantized())
    assert join(layers) is not joint
    joint, x = join(layers), torch.randn(1, layers[0].in_features)
    want = torch.cat([layer(x) for layer in projections(other)], -1)
    torch.testing.assert_close(joint(x), want, atol=1e-2, rtol=1e-2)
    assert "joint" not in copy.deepcopy(layers[0]).__dict__
    want = logits_of(model)
    near = {"atol": 0.02, "rtol": 0.02}  # the kernel adds up in another order where wide columns were added
    torch.testing.assert_close(logits_of(copy.deepcopy(model)), want, **near)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), want, **near)
    model.to(torch.bfloat16)
    assert join(layers) is not joint


@torch.no_grad()
def test_joined_layers_that_do_not_fill_their_tiles():
    mlp = tile_filling(1).model.layers[0].mlp
    joint, x = join([mlp.gate_proj, mlp.up_proj]), torch.randn(3, 128)
    gate, up = joint(x).split(128, dim=-1)  # 96 rows take two tiles of 64
    torch.testing.assert_close(gate[:, :96], mlp.gate_proj(x), atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(up[:, :96], mlp.up_proj(x), atol=1e-2, rtol=1e-2)


@torch.no_grad()
def test_layers_that_cannot_be_joined():
    model = tile_filling()
    first, second = projections(model)
    assert join([first, nn.Linear(128, 64)]) is None and join([nn.Linear(128, 64), first]) is None
    first.step.requires_grad_()
    assert join([first, second]) is None
    first.step.requires_grad_(False)
    second.bias = nn.Parameter(torch.zeros(second.out_features))
    assert join([first, second]) is None


@torch.no_grad()
@pytest.mark.parametrize("wide", [(False, False), (False, True), (True, False)])
def test_a_layer_follows_its_codes(wide):
    """What was prepared for the kernel is forgotten when codes or steps are set, loaded, shared or moved."""
    first, second = (projections(tile_filling(seed, wide[seed]))[1] for seed in (0, 1))
    x = torch.randn(1, 128)
    wanted = second(x)
    assert not torch.equal(first(x), wanted)
    before = copy.deepcopy(first)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), wanted)
    assert torch.allclose(first.dequantize(), second.dequantize(), rtol=1e-6)
    before(x)
    before.set_quantized(second.quantized())
    assert torch.equal(before(x), wanted)
    before.set_quantized(projections(tile_filling())[1].quantized())
    before(x)
    before.share_quantized(second)
    assert torch.equal(before(x), wanted)
