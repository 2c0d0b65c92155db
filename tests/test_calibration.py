"""Post-training quantization with data."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from coded import MODELS, build, inputs_of, logits_of
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from modeling_flashlite import FlashLiteConfig, FlashLiteForConditionalGeneration
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.ecq_layers_flashlite import collect_layers, groups_of
from modeling_flashlite.ecq_search_flashlite import (
    Layer,
    inverse_factor,
    predicted_bytes,
    quantize_layer,
    round_with_feedback,
    round_with_feedback_reference,
    search,
)
from modeling_flashlite.ecq_stream_flashlite import encode_weight, stream_bytes
from modeling_flashlite.training import blocks
from modeling_flashlite.training import calibration as rounding
from modeling_flashlite.training.blocks import BlockQuantizer, runner
from modeling_flashlite.training.calibration import batches_of, mean_loss, quantize
from modeling_flashlite.training.moments import InputMoments, collect_moments, second_moment, watch
from modeling_flashlite.training.replay import Replay, stacks_of


def _moment(n: int, seed: int) -> torch.Tensor:
    x = torch.randn(4 * n, n, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -0.7, n)
    mix = torch.randn(n, n, generator=torch.Generator().manual_seed(seed + 1)) / n**0.5
    x = x @ (torch.eye(n) + mix)
    return x.T @ x


def _layer(rows: int = 40, columns: int = 64, seed: int = 5) -> Layer:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    layer = Layer(["w"], [], weight, torch.zeros(rows))
    layer.follow(_moment(columns, 0))
    return layer


@pytest.mark.parametrize(("rows", "columns"), [(7, 9), (20, 130), (9000, 12)])
def test_feedback_in_blocks_is_feedback_element_by_element(rows, columns):
    generator = torch.Generator().manual_seed(rows)
    ratio = 3 * torch.randn(rows, columns, generator=generator).double()
    scale = torch.rand(columns, generator=generator).double() + 0.5
    low, high = torch.full((columns,), -8.0), torch.full((columns,), 7.0)
    high[: columns // 2] = 100
    args = (scale, low, high, inverse_factor(_moment(columns, 0)))
    before = ratio.clone()
    assert torch.equal(round_with_feedback(ratio, *args), round_with_feedback_reference(ratio, *args))
    assert torch.equal(ratio, before)


def test_feedback_and_column_scales_lower_the_loss_at_equal_rates():
    """The moment has the spread of a real one; the rate differs by less than a twentieth of a bit."""
    layer = _layer(256, 64)
    h = _moment(64, 0).double() * torch.logspace(0, -2, 64).double().outer(torch.logspace(0, -2, 64).double())

    def cost(feedback: bool, scales: bool) -> tuple[float, float]:
        layer.follow(h)
        if not scales:
            layer.log_scales = torch.zeros(64)
        weight = quantize_layer(layer, -2.0, feedback)
        error = layer.weight.double() - weight.dequantize()
        counts = torch.unique(weight.codes, return_counts=True)[1] / weight.codes.numel()
        return ((error @ h) * error).sum().item(), -(counts * counts.log2()).sum().item()

    (nearest, rate), (fed, _), (both, scaled_rate) = cost(False, False), cost(True, False), cost(True, True)
    assert fed < 0.8 * nearest and both < 0.7 * fed
    assert scaled_rate - rate < 0.5 * math.log2(fed / both)


@pytest.mark.parametrize("multiplier", [-3.0, -1.0, 0.5])
def test_the_predicted_rate_is_the_one_of_rounding_with_feedback(multiplier):
    layer = _layer(512, 256)
    held = stream_bytes(quantize_layer(layer, multiplier))
    assert predicted_bytes(layer, multiplier) == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize("feedback", [False, True])
def test_no_weight_is_cut_off_by_the_finest_steps(feedback):
    """However far an outlier stands out, its row's steps reach it, column scales included."""
    layer = _layer(rows=130)
    layer.weight[3, 5], layer.weight[7, 60] = 300.0, -80.0
    layer = Layer(["w"], [], layer.weight, torch.zeros(130))
    layer.follow(_moment(64, 0))
    weight = quantize_layer(layer, -30.0, feedback)
    assert weight.codes.abs().max() < 1911
    step = weight.step()[:, None] * weight.column_scale()
    off = (weight.dequantize() - layer.weight).abs() / step
    assert off.max() < (30 if feedback else 1.5)  # the gain of the whole moves the largest codes a little


@pytest.mark.parametrize("bits", [2.0, 3.3, 6.0])
def test_search_lands_on_the_budget(bits):
    layers = [_layer(40, 64), _layer(120, 96)]
    budget = sum(layer.weight.numel() for layer in layers) * bits / 8
    weights = search(layers, budget + 100, 100)
    held = sum(len(encode_weight(weight)) for weight in weights)
    assert 0.97 * budget <= held <= budget
    assert held == sum(stream_bytes(weight) for weight in weights)


def test_budgets_that_no_steps_reach_are_refused_or_reported(caplog):
    with pytest.raises(ValueError, match="ask for at least half a bit"):
        search([_layer(64, 128)], 200, 100)
    search([_layer(64, 128)], 64 * 128 * 3, 0)
    said = caplog.records[-1].getMessage()
    assert "of a budget of 24576: the steps cannot be finer" in said
    assert int(said.split()[3]) == stream_bytes(search([_layer(64, 128)], 64 * 128 * 3, 0)[0])


@pytest.mark.parametrize(("nats", "said"), [(1.2, "a factor of about 3.3:"), (900.0, "a factor of more than 1000.0:")])
def test_a_hopeless_budget_is_said_to_be(nats, said, monkeypatch, caplog):
    monkeypatch.setattr(blocks, "predicted_divergence", lambda layers, multiplier: nats)
    quantize(build("llama"), EcqConfig(target_bits=5), [{"input_ids": torch.randint(3, 256, (2, 12))}])
    assert any(said in record.getMessage() for record in caplog.records)


IDS = torch.arange(3, 15).view(2, 6)
EMPTY = {
    "no batches": ([], {}, "holds no batch"),
    "a batch of nothing": ([{}], {}, "holds no batch, or an empty one"),
    "a later batch of nothing": ([{"input_ids": IDS}, {}], {}, "Batch 1 of the data is empty"),
    "no rows": ([{"input_ids": IDS[:0]}], {}, "has 0 rows, but at least 1 is needed"),
    "none asked for": ([{"input_ids": IDS}], {"max_batches": 0}, "max_batches is 0, but must be at least 1"),
    "less than none": ([{"input_ids": IDS}], {"max_batches": -1}, "max_batches is -1"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_empty_calibration_data_is_refused_in_one_sentence(name):
    data, options, message = EMPTY[name]
    with pytest.raises(ValueError, match=message) as caught:
        quantize(build("llama"), EcqConfig(target_bits=4), data, **options)
    assert "\n" not in str(caught.value)


def test_a_layer_of_zeros_has_no_error():
    layer = _layer()
    layer.weight.zero_()
    assert blocks._weighted_error(layer, quantize_layer(layer, 0.0)) == 0


def test_a_budget_that_feedback_cannot_meet_is_reported(caplog):
    """Five tokens span five directions: fed-back errors then take more bits than the longest steps save."""
    model = build("llama-untied")
    data = [{"input_ids": torch.randint(3, 256, (1, 5))}]
    parameters = model.num_parameters()
    quantize(model, EcqConfig(target_bits=1.2), data)
    assert any("rounded to nearest" in record.getMessage() for record in caplog.records)
    held = sum(stream_bytes(modules[0].quantized()) for _, modules in groups_of(model))
    assert held < 1.2 * parameters / 8


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "gemma3", "t5gemma"])
def test_replay_feeds_each_block_its_inputs_in_the_model(kind):
    model = build(kind)
    batches = [inputs_of(model), {k: v.flip(1) for k, v in inputs_of(model).items()}]
    run = runner(model)
    stacks = stacks_of(model, lambda: run(batches[0]))
    assert [len(stack) for stack in stacks] == [2, 2] if model.config.is_encoder_decoder else [2]
    layers = [layer for layer in collect_layers(model, EcqConfig()) if ".1." in layer.names[0]]
    whole, parts = InputMoments(layers), InputMoments(layers)
    ends = whole.watch()
    with torch.no_grad():
        for batch in batches:
            run(batch)
            whole.next_batch()
    for end in ends:
        end()
    replay, ends = Replay(stacks, run, batches), parts.watch()
    with torch.no_grad():
        for stack in range(len(stacks)):
            assert list(replay.run(stack, 0, keep=True)) == [0, 1]
            for _ in replay.run(stack, 1, keep=True):
                parts.next_batch()
    for end in ends:
        end()
    for index in range(len(layers)):
        torch.testing.assert_close(parts.of(index), whole.of(index))
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_blocks_that_are_used_twice_are_no_stack():
    torch.manual_seed(0)
    config = AlbertConfig(
        vocab_size=256, embedding_size=32, hidden_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    config.intermediate_size = 96
    model = AlbertForMaskedLM(config).eval()
    batch = {"input_ids": torch.randint(3, 256, (2, 12))}
    assert stacks_of(model, lambda: model(**batch)) == []
    assert quantize(model, EcqConfig(target_bits=4.0), [batch]).is_quantized


def test_an_input_shared_by_layers_is_counted_once():
    layers = [Layer([n], [torch.nn.Linear(16, 8)], torch.randn(8, 16), torch.zeros(8)) for n in "abc"]
    moments = InputMoments(layers)
    ends = moments.watch()
    for _ in range(2):
        x, other = torch.randn(5, 16), torch.randn(3, 16)
        for layer, value in zip(layers, (x, x, other)):
            layer.modules[0](value)
        moments.next_batch()
    for end in ends:
        end()
    assert moments.of(0) is moments.of(1) and set(moments.sums) == {0, 2}
    torch.testing.assert_close(moments.of(2).diagonal().sum() > 0, torch.tensor(True))
    torch.testing.assert_close(second_moment(x), x.T @ x)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
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


def test_an_interrupted_run_resumes(tmp_path, monkeypatch):
    """The blocks that were done are read back: nothing of them is rounded anew, and the result is the same."""
    data = [{"input_ids": torch.randint(3, 256, (2, 12), generator=torch.Generator().manual_seed(2))}]
    config, plain = EcqConfig(target_bits=4.0), BlockQuantizer._round
    whole = quantize(build("llama"), config, data)
    rounded, first = [], True

    def stop(self, number, own, multiplier):
        if number == 2 and first:
            raise KeyboardInterrupt
        rounded.append(number)
        return plain(self, number, own, multiplier)

    monkeypatch.setattr(BlockQuantizer, "_round", stop)
    with pytest.raises(KeyboardInterrupt):
        quantize(build("llama"), config, data, resume=tmp_path)
    assert rounded == [0, 1] and not list(tmp_path.glob("*.partial"))
    first = False
    resumed = quantize(build("llama"), config, data, resume=tmp_path)
    assert rounded == [0, 1, 2]
    assert torch.equal(logits_of(resumed), logits_of(whole))
    # another budget is another run, but with the same steps
    monkeypatch.setattr(blocks, "collect_moments", None)
    other = quantize(build("llama"), EcqConfig(target_bits=5.0), data, resume=tmp_path)
    assert rounded == [0, 1, 2, 0, 1, 2]
    monkeypatch.undo()
    fresh = quantize(build("llama"), EcqConfig(target_bits=5.0), data)
    assert torch.equal(logits_of(other), logits_of(fresh))
    (tmp_path / "steps.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged .* start again"):
        quantize(build("llama"), EcqConfig(target_bits=5.0), data, resume=tmp_path)


def test_columns_that_read_large_inputs_are_finer_without_data(monkeypatch):
    """A pass over random tokens finds them: the error of the logits falls at equal size."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=128, num_hidden_layers=2, num_attention_heads=4)
    config.intermediate_size, config.num_key_value_heads = 192, 4
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for block in model.model.layers:
            block.input_layernorm.weight[:6] *= 20
            block.post_attention_layernorm.weight[:6] *= 20
    batch, errors = {"input_ids": torch.randint(3, 512, (16, 32))}, {}
    want = model(**batch).logits
    for name in ("scaled", "plain"):
        coded = quantize(copy.deepcopy(model), EcqConfig(target_bits=4.0))
        coded.dequantize()  # products in float32, so that only the codes count
        errors[name] = (coded(**batch).logits - want).square().mean().item()
        monkeypatch.setattr(rounding, "scale_columns", lambda model, layers: None)
    assert errors["scaled"] < 0.8 * errors["plain"]


@pytest.mark.parametrize("data", [None, "tokens"])
def test_sisters_of_any_number_of_rows_have_the_same_column_scales(data):
    """So that q, k and v stay one product: keys and values of few heads follow their queries."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=128, num_hidden_layers=1, num_attention_heads=4)
    config.intermediate_size, config.num_key_value_heads = 160, 1
    data = data and [{"input_ids": torch.randint(3, 512, (8, 64))}]
    model = quantize(LlamaForCausalLM(config), EcqConfig(target_bits=4.0), data)
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    assert (attention.q_proj.factors[:128] != 1).any()
    for first, other in [("q_proj", "k_proj"), ("q_proj", "v_proj")]:
        pair = (getattr(attention, name).tiled().column_exponents for name in (first, other))
        assert torch.equal(*pair)
    assert torch.equal(mlp.gate_proj.tiled().column_exponents, mlp.up_proj.tiled().column_exponents)


def test_a_model_that_cannot_read_random_tokens_is_quantized_without_scales(monkeypatch, caplog):
    model = build("llama")

    def refuse(*args, **kwargs):
        raise ValueError("no image")

    monkeypatch.setattr(type(model), "forward", refuse)
    assert quantize(model, EcqConfig(target_bits=4.0)).is_quantized
    assert "no image" in caplog.records[-1].getMessage()


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
    assert math.exp(mean_loss(model, batches[:4]) - base) < 1.31
    assert table[-1]["increase"] <= 0.3 and all(
        row["bits"] > table[-1]["bits"] or row["increase"] > 0.3 for row in table[:-1]
    )


def test_hooks_and_gradients_are_left_as_they_were():
    model = build("llama")
    layers = collect_layers(model, EcqConfig(target_bits=3))
    collect_moments(model, layers, runner(model), [{"input_ids": torch.randint(3, 256, (2, 9))}], keep=set())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(layer.log_scales is not None and layer.input_factor is None for layer in layers)


def test_what_a_subclass_looks_up_is_recorded():
    """It is called with a mask; what it looks up is two places further than positions."""
    config = OPTConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, ffn_dim=64)
    model = OPTForCausalLM(config).eval()
    module, seen = model.model.decoder.embed_positions, []
    end = watch(module, lambda *pair: seen.append(pair))
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
