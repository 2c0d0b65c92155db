"""Post-training quantization with data."""

import math
from types import SimpleNamespace

import pytest
import torch
from test_quantization import MODELS, build, logits_of
from transformers import OPTConfig, OPTForCausalLM

from modeling_flashlite import FlashLiteConfig, FlashLiteForConditionalGeneration
from modeling_flashlite.ecq_search_flashlite import (
    Layer,
    _round_columns,
    _round_waves,
    inverse_factor,
    quantize_layer,
    search,
)
from modeling_flashlite.ecq_stream_flashlite import encode_weight, stream_bytes
from modeling_flashlite.quantization_flashlite import EcqConfig, collect_layers
from modeling_flashlite.training.calibration import _watch, batches_of, collect_moments, mean_loss, quantize


def _moment(n: int, seed: int) -> torch.Tensor:
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -0.7, n)
    mix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed + 1)) / n**0.5
    x = x @ (torch.eye(n) + mix)
    return x.T @ x


def _layer(rows: int = 40, columns: int = 64) -> Layer:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(5))
    layer = Layer(["w"], [], weight, torch.zeros(rows))
    layer.input_moment = _moment(columns, 0)
    layer.input_factor = inverse_factor(layer.input_moment)
    layer.output_factor = inverse_factor(_moment(rows, 7))
    return layer


def test_waves_without_coupling_of_rows_are_gptq():
    layer = _layer()
    step, low, high = torch.full((40,), 0.5).double(), torch.full((64,), -8.0), torch.full((64,), 7.0)
    rows = torch.diag(torch.rand(40).double() + 0.5)
    args = (step, low.double(), high.double(), layer.input_factor)
    columns = _round_columns(layer.weight.double(), *args)
    assert torch.equal(_round_waves(layer.weight.double(), *args, rows), columns)


def test_waves_equal_element_by_element_feedback():
    layer = _layer(20, 12)
    step = torch.full((20,), 0.4).double()
    low, high = torch.full((12,), -8.0).double(), torch.full((12,), 7.0).double()
    weight, codes = layer.weight.double(), torch.zeros(20, 12).double()
    c_h, c_g = layer.input_factor, layer.output_factor
    for i in range(20):
        for j in range(12):
            codes[i, j] = torch.round(weight[i, j] / step[i]).clamp(-8, 7)
            error = (weight[i, j] - codes[i, j] * step[i]) / (c_g[i, i] * c_h[j, j])
            weight = weight - error * torch.outer(c_g[i], c_h[j])
    assert torch.equal(_round_waves(layer.weight.double(), step, low, high, c_h, c_g), codes)


def test_feedback_lowers_the_loss_at_equal_steps():
    layer = _layer()
    g, h = torch.linalg.inv(layer.output_factor.T @ layer.output_factor), layer.input_moment.double()

    def cost(feedback: bool, output_factor) -> float:
        layer.output_factor = output_factor
        weight = quantize_layer(layer, -1.0, feedback)
        error = layer.weight.double() - weight.dequantize()
        return (error.T @ g @ error @ h).trace().item()

    both = layer.output_factor
    nearest, columns, rows_too = cost(False, None), cost(True, None), cost(True, both)
    assert rows_too < 0.9 * columns < 0.9 * 0.9 * nearest


def test_search_lands_on_the_budget():
    layers = [_layer(40, 64), _layer(120, 96)]
    for bits in (2.0, 3.0):
        budget = sum(layer.weight.numel() for layer in layers) * bits / 8
        weights = search(layers, budget + 100, 100)
        held = sum(len(encode_weight(weight)) for weight in weights)
        assert 0.975 * budget <= held <= budget
        assert held == pytest.approx(sum(stream_bytes(weight) for weight in weights))


def test_a_budget_that_feedback_cannot_meet_is_said(caplog):
    layers = [_layer(64, 128)]
    directions = torch.linalg.qr(torch.randn(128, 128, generator=torch.Generator().manual_seed(0)).double())[0]
    layers[0].output_factor = None
    layers[0].input_factor = inverse_factor(directions * torch.logspace(0, -6, 128) @ directions.T, 1e-7)
    budget = layers[0].weight.numel() * 1.2 / 8
    weights = search(layers, budget, 0)
    assert 0.99 * budget <= sum(stream_bytes(weight) for weight in weights) <= budget
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "rounded to nearest" in record.getMessage()
    caplog.clear()
    search([_layer(64, 128)], layers[0].weight.numel(), 0)
    assert "budget of 8.00" in caplog.records[-1].getMessage()


@pytest.mark.parametrize("kind", ["llama", "t5", "bert"])
def test_calibrated_quantization_saves_and_loads(kind, tmp_path):
    torch.manual_seed(0)
    model = build(kind)
    parameters = model.num_parameters()
    data = [{"input_ids": torch.randint(3, 256, (n,)), "labels": torch.randint(3, 256, (n,))} for n in (9, 12, 5, 7)]
    quantize(model, EcqConfig(target_bits=4.0), calibration=data, batch_size=2)
    model.save_pretrained(tmp_path)
    bits = 8 * (tmp_path / "model.safetensors").stat().st_size / parameters
    assert bits == pytest.approx(4.0, rel=0.01)
    assert torch.equal(logits_of(MODELS[kind][0].from_pretrained(tmp_path)), logits_of(model))


def _trained(steps: int = 60):
    """A small encoder-decoder that has learned to copy, and batches of its task."""
    torch.manual_seed(0)
    config = FlashLiteConfig(
        vocab_size=64,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        block_size=16,
        sub_block_size=4,
        pad_token_id=0,
        decoder_start_token_id=1,
    )
    model = FlashLiteForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids = torch.randint(2, 64, (16, 8))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    batches = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 64, (8, 16, 8))]
    return model.eval(), batches


def test_data_help_an_encoder_decoder_and_a_loss_can_be_asked_for():
    model, batches = _trained()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    base, losses = mean_loss(model, batches[4:]), {}
    for name, calibration in (("data-free", None), ("calibrated", batches[:4])):
        fresh = FlashLiteForConditionalGeneration(model.config)
        fresh.load_state_dict(state)
        losses[name] = mean_loss(quantize(fresh, EcqConfig(target_bits=3.0), calibration), batches[4:])
    assert losses["calibrated"] - base < 0.8 * (losses["data-free"] - base)
    quantize(model, EcqConfig(max_loss_increase=0.3), batches[:4])
    table = model.ecq_pareto
    assert math.exp(mean_loss(model, batches[:4]) - base) < 1.5 and len(table) > 4
    assert table[0]["increase"] > table[-1]["increase"]


def test_hooks_and_gradients_are_left_as_they_were():
    model = build("llama")
    layers = collect_layers(model, EcqConfig(target_bits=3))
    collect_moments(model, layers, batches_of([{"input_ids": torch.randint(3, 256, (2, 9))}], model))
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(layer.output_factor is not None for layer in layers)


def test_what_a_subclass_looks_up_is_recorded():
    """It is called with a mask; what it looks up is two places further than positions."""
    config = OPTConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64)
    model = OPTForCausalLM(config).eval()
    module, seen = model.model.decoder.embed_positions, []
    end = _watch(module, lambda *pair: seen.append(pair))
    model(torch.arange(5)[None])
    end()
    model(torch.arange(5)[None])
    ((places, vectors),) = seen
    assert places.tolist() == [[2, 3, 4, 5, 6]] and torch.equal(vectors, module.weight[places])


def test_calibration_data_may_be_a_stream():
    rows = [{"input_ids": list(range(3, 3 + length))} for length in (4, 6, 5)]
    model = SimpleNamespace(config=SimpleNamespace(pad_token_id=0))
    shapes = [tuple(batch["input_ids"].shape) for batch in batches_of(iter(rows), model, batch_size=2)]
    assert shapes == [(2, 6), (1, 5)]
