"""One token at a time by the short way: what the layers would have given, and the layers wherever it does not fit."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_modeling import causal_model, tokens

from modeling_flashlite.configuration_flashlite import POSITION_ENCODINGS
from modeling_flashlite.modeling_flashlite import _INT8_CODES
from modeling_flashlite.quantization_flashlite import EcqConfig, quantize_data_free
from modeling_flashlite.step_flashlite import DecoderStep, EncoderKeys


@pytest.fixture
def steps(monkeypatch):
    """What `DecoderStep.of` gave: one entry per forward with a cache, true where the short way was taken."""
    taken, original = [], DecoderStep.of.__func__

    def of(cls, *args, **kwargs):
        step = original(cls, *args, **kwargs)
        taken.append(step is not None)
        return step

    monkeypatch.setattr(DecoderStep, "of", classmethod(of))
    return taken


@torch.no_grad()
def one_by_one(model, ids, past=None, **inputs):
    """Logits `[B, T, V]` of tokens that come one at a time, and the cache."""
    name, logits = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids", []
    for token in ids.split(1, dim=1):
        out = model(**{name: token}, past_key_values=past, use_cache=True, **inputs)
        past = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, dim=1), past


def through_the_layers(monkeypatch, *args, **kwargs):
    with monkeypatch.context() as patch:
        patch.setattr(DecoderStep, "of", classmethod(lambda *args, **kwargs: None))
        return one_by_one(*args, **kwargs)[0]


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("axes", [{}, {"relevance_top_k": None, "memory_blocks": None}, {"memory_blocks": 1}])
def test_a_step_is_the_layers(encoding, encoder, axes, steps, monkeypatch):
    model = causal_model(
        position_encoding=encoding, is_encoder_decoder=encoder, num_attention_heads=4, num_key_value_heads=2, **axes
    )
    inputs = {}
    if encoder:
        mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7])
        inputs = {"input_ids": tokens(2, 7, seed=2), "attention_mask": mask}
    ids = tokens(2, 45)
    short, _ = one_by_one(model, ids, **inputs)
    assert steps == [False] + [True] * 44
    torch.testing.assert_close(short, through_the_layers(monkeypatch, model, ids, **inputs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("encoder", [False, True])
def test_beams_and_copied_caches_keep_their_own_keys(encoder, steps, monkeypatch):
    model = causal_model(is_encoder_decoder=encoder)
    inputs = {"input_ids": tokens(2, 7, seed=2)} if encoder else {}
    prompt, rest = tokens(2, 20).split([9, 11], dim=1)
    _, past = one_by_one(model, prompt, **inputs)
    copied = copy.deepcopy(past)
    assert copied is not past and len(copied.__dict__) == len(past.__dict__)
    # rows change places: the cache has to be read anew
    order = torch.tensor([1, 0])
    past.reorder_cache(order)
    turned = {name: value[order] for name, value in inputs.items()}
    swapped, _ = one_by_one(model, rest, past=past, **turned)
    again, _ = one_by_one(model, rest[order], past=copied, **inputs)
    torch.testing.assert_close(swapped, again[order], rtol=0, atol=1e-12)
    assert steps.count(False) == 1


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
@torch.no_grad()
def test_reordered_beams_equal_a_pass_without_cache(encoding, steps, monkeypatch):
    model, chance = causal_model(position_encoding=encoding, is_encoder_decoder=True), torch.Generator().manual_seed(1)
    made, init = [], EncoderKeys.__init__
    monkeypatch.setattr(EncoderKeys, "__init__", lambda *args: made.append(init(*args)))
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7, [1] * 6 + [0]])
    states = model.get_encoder()(input_ids=tokens(3, 7, seed=2), attention_mask=mask).last_hidden_state
    states, mask = states.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    ids, past = torch.zeros(6, 0, dtype=torch.long), None
    rows, swapped = torch.arange(6), torch.tensor([2, 3, 0, 0, 5, 4])
    for length in range(40):
        inputs = {"encoder_outputs": (states,), "attention_mask": mask}
        ids = torch.cat([ids, tokens(6, 1, seed=length)], dim=1)
        out = model(decoder_input_ids=ids[:, -1:], past_key_values=past, use_cache=True, **inputs)
        past = out.past_key_values
        truth = model(decoder_input_ids=ids, use_cache=False, **inputs).logits[:, -1:]
        torch.testing.assert_close(out.logits, truth, rtol=0, atol=1e-12)
        # beams of a sentence change places after every token, sentences now and then
        order = rows // 2 * 2 + torch.randint(0, 2, (6,), generator=chance)
        if length in (9, 31):
            order, states, mask = swapped, states[swapped], mask[swapped]
        elif length == 20:
            order, states, mask = rows[[0, 1, 4, 3, 2, 5]], states[[0, 1, 4, 3, 2, 5]], mask[[0, 1, 4, 3, 2, 5]]
        elif length > 20:
            order = rows
        past.reorder_cache(order)
        ids = ids[order]
    layers = model.config.decoder.num_hidden_layers
    assert len(made) == 4 * layers and past.self_attention_cache.layers[0].summarized > 2
    past.batch_select_indices(rows[:4])
    past.batch_repeat_interleave(2)
    chosen = rows[:4].repeat_interleave(2)
    inputs = {"encoder_outputs": (states[chosen],), "attention_mask": mask[chosen]}
    ids = torch.cat([ids[chosen], tokens(8, 1, seed=99)], dim=1)
    out = model(decoder_input_ids=ids[:, -1:], past_key_values=past, use_cache=True, **inputs)
    truth = model(decoder_input_ids=ids, use_cache=False, **inputs).logits[:, -1:]
    torch.testing.assert_close(out.logits, truth, rtol=0, atol=1e-12)


def test_weights_changed_between_generations_count(steps):
    model, ids = causal_model(), tokens(1, 12)
    _, past = one_by_one(model, ids)
    past.reset()
    with torch.no_grad():
        model.get_decoder().layers[0].self_attn.r_proj.weight.mul_(-1)
    fresh, _ = one_by_one(model, ids)
    reused, _ = one_by_one(model, ids, past=past)
    torch.testing.assert_close(reused, fresh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", ["self_attn", "mlp", "input_layernorm"])
def test_hooks_on_modules_still_run(place, steps):
    model, seen = causal_model(), []
    handle = getattr(model.get_decoder().layers[1], place).register_forward_hook(lambda *args: seen.append(1))
    one_by_one(model, tokens(1, 6))
    assert len(seen) == 6 and not any(steps)
    handle.remove()
    model.get_decoder().layers[1].mlp.down_proj.register_forward_hook(lambda *args: seen.append(2))
    one_by_one(model, tokens(1, 6))
    assert seen.count(2) == 6 and any(steps)


def test_states_and_weights_are_recorded_when_asked_for(steps):
    model = causal_model()
    past = one_by_one(model, tokens(1, 6))[1]
    with torch.no_grad():
        out = model(tokens(1, 1), past_key_values=past, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and not steps[-1]


def test_padded_rows_and_training_go_through_the_layers(steps):
    model = causal_model()
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        past = model(tokens(2, 6), attention_mask=mask, use_cache=True).past_key_values
        model(tokens(2, 1), attention_mask=torch.nn.functional.pad(mask, (0, 1), value=1), past_key_values=past)
    model.train()
    one_by_one(model, tokens(1, 4))
    assert not any(steps)


def test_adapters_and_codes_count(steps, monkeypatch):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    model = causal_model(dtype=torch.float32, **sizes)
    quantize_data_free(model, EcqConfig())
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    ids = tokens(1, 16)
    short, _ = one_by_one(model, ids)
    assert any(steps)
    long = through_the_layers(monkeypatch, model, ids)
    # products with codes are of bfloat16 precision
    assert (short - long).norm() < 0.02 * long.norm()
    with model.disable_adapter():
        without = one_by_one(model, ids)[0]
    assert (short - without).norm() > 0.1 * long.norm()


def test_large_batches_hold_their_codes_as_long_as_the_model(steps):
    torch.manual_seed(0)
    model = causal_model(dtype=torch.float32, hidden_size=64, num_attention_heads=2, head_dim=32)
    quantize_data_free(model, EcqConfig())
    prompt, settings = tokens(20, 3), {"max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True}
    settings |= {"attention_mask": torch.ones_like(prompt), "return_dict_in_generate": True, "do_sample": False}
    few = model.generate(prompt[:1], **{**settings, "attention_mask": settings["attention_mask"][:1]}).logits
    before = len(_INT8_CODES[model])
    many = model.generate(prompt, **settings).logits
    assert (many[1][0] - few[1][0]).norm() < 0.05 * few[1][0].norm()
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        held = dict(_INT8_CODES[model].items())
        assert len(held) > before
        model.generate(prompt, **settings)
        assert all(_INT8_CODES[model][tiles] is codes for tiles, codes in held.items())
    assert copy.deepcopy(model) not in _INT8_CODES


def test_generation_by_steps_gives_the_same_tokens(steps, monkeypatch):
    model = causal_model(is_encoder_decoder=True)
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    for search in ({"do_sample": False}, {"num_beams": 3}):
        short = model.generate(tokens(2, 7), **settings, **search)
        assert any(steps)
        with monkeypatch.context() as patch:
            patch.setattr(DecoderStep, "of", classmethod(lambda *args, **kwargs: None))
            assert torch.equal(short, model.generate(tokens(2, 7), **settings, **search))
