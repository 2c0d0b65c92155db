"""Decode sessions: equal to the decoder in every situation, and all state is released at the end."""

import contextlib
import copy
import gc
import threading

import pytest
import torch
from models import causal_model, one_by_one, tokens
from peft import LoraConfig, get_peft_model

from modeling_flashlite import FlashLiteCache
from modeling_flashlite.configuration_flashlite import POSITION_ENCODINGS
from modeling_flashlite.decode_flashlite import DecodeSession, decode_session, decoding
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.layer_step_flashlite import EncoderKeys
from modeling_flashlite.quantization_flashlite import quantize_data_free


@pytest.fixture
def steps(monkeypatch):
    """One entry per call of a session, true where it took the token itself."""
    taken, original = [], DecodeSession._takes
    monkeypatch.setattr(DecodeSession, "_takes", lambda *args: taken.append(original(*args)) or taken[-1])
    return taken


@pytest.fixture
def open_sessions():
    """Where a test opens the sessions that last until its end."""
    with contextlib.ExitStack() as stack:
        yield stack


def bytes_of_tensors() -> int:
    """Bytes of all tensors that are alive, storages counted once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and type(thing).__name__ != "FakeTensor":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("axes", [{}, {"relevance_top_k": None, "memory_blocks": None}, {"memory_blocks": 1}])
def test_a_session_equals_the_decoder(encoding, encoder, axes, steps):
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
    long, _ = one_by_one(model, ids, session=False, **inputs)
    torch.testing.assert_close(short, long, rtol=0, atol=1e-12)


@pytest.mark.parametrize("encoder", [False, True])
def test_beams_and_copied_caches_keep_their_own_keys(encoder, steps):
    model = causal_model(is_encoder_decoder=encoder)
    inputs = {"input_ids": tokens(2, 7, seed=2)} if encoder else {}
    prompt, rest = tokens(2, 20).split([9, 11], dim=1)
    with decode_session(model):
        _, past = one_by_one(model, prompt, **inputs)
        copied = copy.deepcopy(past)
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
def test_reordered_beams_equal_a_pass_without_cache(encoding, steps, open_sessions, monkeypatch):
    model, chance = causal_model(position_encoding=encoding, is_encoder_decoder=True), torch.Generator().manual_seed(1)
    made, init = [], EncoderKeys.__init__
    monkeypatch.setattr(EncoderKeys, "__init__", lambda *args: made.append(init(*args)))
    mask = torch.tensor([[1] * 5 + [0] * 2, [1] * 7, [1] * 6 + [0]])
    states = model.get_encoder()(input_ids=tokens(3, 7, seed=2), attention_mask=mask).last_hidden_state
    states, mask = states.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    ids, past = torch.zeros(6, 0, dtype=torch.long), None
    open_sessions.enter_context(decode_session(model))
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
    with decode_session(model), torch.no_grad():
        past = one_by_one(model, tokens(1, 6))[1]
        out = model(tokens(1, 1), past_key_values=past, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and not steps[-1]


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
@pytest.mark.parametrize("axes", [{}, {"relevance_top_k": None, "memory_blocks": None}, {"memory_blocks": 3}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rows_of_different_lengths_equal_the_layers(encoding, axes, dtype, steps):
    model = causal_model(position_encoding=encoding, num_attention_heads=4, num_key_value_heads=2, **axes).to(dtype)
    ids, mask = tokens(3, 60), torch.ones(3, 60, dtype=torch.long)
    mask[0, :9], mask[1, :4] = 0, 0

    def run(context):
        with context, torch.no_grad():
            outputs = model(ids[:, :12], attention_mask=mask[:, :12], use_cache=True)
            found = [outputs.logits[:, -1]]
            for end in range(13, 61):
                past = {"past_key_values": outputs.past_key_values}
                outputs = model(ids[:, end - 1 : end], attention_mask=mask[:, :end], **past)
                found.append(outputs.logits[:, -1])
        return torch.stack(found)

    ours, truth = run(decode_session(model)), run(contextlib.nullcontext())
    assert steps == [False] + [True] * 48
    error = (ours - truth).abs().max()
    assert error < (1e-11 if dtype == torch.float64 else 0.05)


def test_training_goes_through_the_layers(steps):
    one_by_one(causal_model().train(), tokens(1, 4))
    assert not any(steps)


@pytest.mark.parametrize("wrong", [{"input_ids": torch.tensor([[61]])}, {"attention_mask": torch.ones(1, 3)}])
def test_inputs_that_cannot_be_meant_are_refused(wrong, steps):
    model = causal_model()
    with decode_session(model), torch.no_grad():
        past = one_by_one(model, tokens(1, 6))[1]
        with pytest.raises(ValueError, match="vocabulary|attention mask"):
            model(**{"input_ids": tokens(1, 1), **wrong}, past_key_values=past, use_cache=True)
    assert steps[-1]


def test_adapters_and_codes_count(steps):
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
    long, _ = one_by_one(model, ids, session=False)
    # products with codes are of bfloat16 precision
    assert (short - long).norm() < 0.02 * long.norm()
    with model.disable_adapter():
        without = one_by_one(model, ids)[0]
    assert (short - without).norm() > 0.1 * long.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_coded_layers_with_a_norm_folded_in(encoding, rows, dtype, steps):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32, "position_encoding": encoding}
    model = causal_model(dtype=torch.float32, **sizes)
    quantize_data_free(model, EcqConfig())
    model, ids = model.to(dtype), tokens(rows, 16)
    short, _ = one_by_one(model, ids)
    long, _ = one_by_one(model, ids, session=False)
    assert any(steps)
    # products with codes are of bfloat16 precision
    assert (short - long).norm() < (0.02 if dtype == torch.float32 else 0.06) * long.norm()


def test_large_batches_hold_their_codes_for_one_generation(steps):
    torch.manual_seed(0)
    model = causal_model(dtype=torch.float32, hidden_size=64, num_attention_heads=2, head_dim=32)
    quantize_data_free(model, EcqConfig())
    prompt, settings = tokens(20, 3), {"max_new_tokens": 6, "min_new_tokens": 6, "output_logits": True}
    settings |= {"attention_mask": torch.ones_like(prompt), "return_dict_in_generate": True, "do_sample": False}
    few = model.generate(prompt[:1], **{**settings, "attention_mask": settings["attention_mask"][:1]}).logits
    many = model.generate(prompt, **settings).logits
    assert (many[1][0] - few[1][0]).norm() < 0.05 * few[1][0].norm()


SEARCHES = ({"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "prompt_lookup_num_tokens": 3})


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
@pytest.mark.parametrize("encoder", [False, True])
@pytest.mark.parametrize("search", SEARCHES, ids=str)
def test_generation_gives_the_same_tokens(encoding, encoder, search, steps, monkeypatch):
    model = causal_model(is_encoder_decoder=encoder, position_encoding=encoding)
    model.generation_config.pad_token_id = 0
    rows = 1 if "prompt_lookup_num_tokens" in search else 2
    settings = {"max_new_tokens": 24, "min_new_tokens": 24, "attention_mask": torch.ones(rows, 7, dtype=torch.long)}
    short = model.generate(tokens(rows, 7), **settings, **search)
    assert any(steps)
    monkeypatch.setattr(DecodeSession, "_takes", lambda *args: False)
    assert torch.equal(short, model.generate(tokens(rows, 7), **settings, **search))


def test_a_draft_decodes_within_the_session_of_its_target(steps, monkeypatch):
    model, draft = causal_model(), causal_model(seed=1, num_hidden_layers=1)
    made, init = [], DecodeSession.forget
    monkeypatch.setattr(DecodeSession, "forget", lambda self: made.append(self.decoder) or init(self))
    settings = {"max_new_tokens": 20, "do_sample": False, "attention_mask": torch.ones(1, 7, dtype=torch.long)}
    alone = model.generate(tokens(1, 7), **settings)
    steps.clear()
    assert torch.equal(model.generate(tokens(1, 7), assistant_model=draft, **settings), alone)
    assert any(steps) and draft.get_decoder() in made


@pytest.mark.parametrize("encoder", [False, True])
@torch.no_grad()
def test_tokens_taken_back_and_chunks_between_tokens(encoder, steps):
    model = causal_model(is_encoder_decoder=encoder, relevance_top_k=1, memory_blocks=None)
    inputs = {"encoder_outputs": model.get_encoder()(tokens(1, 7, seed=2))} if encoder else {}
    name, ids = "decoder_input_ids" if encoder else "input_ids", tokens(1, 60)
    truth = model(**{name: ids}, use_cache=False, **inputs).logits
    with decode_session(model):
        _, past = one_by_one(model, ids[:, :30], **inputs)
        for back, chunk in ((3, 1), (6, 4), (1, 5), (9, 2)):
            past.crop(-back)
            seen = past.get_seq_length()
            model(**{name: ids[:, seen : seen + chunk]}, past_key_values=past, use_cache=True, **inputs)
            seen += chunk
            out, _ = one_by_one(model, ids[:, seen : seen + 11], past=past, **inputs)
            torch.testing.assert_close(out, truth[:, seen : seen + 11], rtol=0, atol=1e-12)
    assert steps.count(True) > 60


def test_an_offloaded_cache_is_the_decoders(steps):
    model, ids = causal_model(), tokens(1, 12)
    past = FlashLiteCache(model.config)
    past.offloading = True  # as on an accelerator, whose streams a CPU lacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FlashLiteCache, "prefetch", lambda *args: None, raising=False)
        patch.setattr(FlashLiteCache, "offload", lambda *args: None, raising=False)
        assert not DecodeSession(model.get_decoder())._holds(past, False)
    past.offloading = False
    one_by_one(model, ids, past=past)
    assert any(steps)


def test_a_session_is_the_threads_own_and_ends(steps):
    model = causal_model()
    decoder = model.get_decoder()
    with decode_session(model) as session:
        with decode_session(model) as same:
            assert same is session is decoding(decoder)
        assert decoding(decoder) is session
        seen = []
        thread = threading.Thread(target=lambda: seen.append(decoding(decoder)))
        thread.start()
        thread.join()
        assert seen == [decoder]
        one_by_one(model, tokens(1, 5))
        assert session.step is not None
    assert decoding(decoder) is decoder and session.step is None


def test_training_after_inference_mode(steps):
    model, ids = causal_model(), tokens(1, 40)
    with torch.inference_mode():
        model.generate(ids[:, :4], max_new_tokens=30, do_sample=False)
    with decode_session(model):
        with torch.inference_mode():
            _, past = one_by_one(model, ids[:, :30])
        fresh, _ = one_by_one(model, ids)
    assert any(steps)
    torch.testing.assert_close(fresh, one_by_one(model, ids, session=False)[0], rtol=0, atol=1e-12)
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("coded", [False, True])
def test_no_byte_outlives_a_generation(rows, coded, steps):
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "head_dim": 32}
    model = causal_model(dtype=torch.float32, is_encoder_decoder=True, **sizes)
    if coded:
        quantize_data_free(model, EcqConfig())
    prompt = tokens(rows, 5)
    settings = {"max_new_tokens": 40, "min_new_tokens": 40, "attention_mask": torch.ones_like(prompt)}
    searches = {"num_beams": 2}, {"do_sample": False}
    for search in searches:  # constants of the library, and what coded layers keep
        model.generate(prompt, **{**settings, "max_new_tokens": 2, "min_new_tokens": 2}, **search)
    before = bytes_of_tensors()
    for search in searches:
        model.generate(prompt, **settings, **search)
    assert any(steps)
    assert bytes_of_tensors() == before
