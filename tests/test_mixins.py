"""Checks of transformers' own model and generation tests, beyond test_contract.py."""

import copy
import inspect
import pickle

import pytest
import torch
from heads import both_generators, every_form
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationConfig,
    pipeline,
)

from modeling_flashlite import FlashLiteForSequenceClassification, FlashLiteForTokenClassification
from modeling_flashlite.compat_flashlite import CACHE

BATCH, LENGTH, NEW = 2, 11, 6
SETTINGS = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "pad_token_id": 0,
    "suppress_tokens": [0],
}
MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 20},
    "sample-many": {"do_sample": True, "num_return_sequences": 3},
    "beam": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "beam-sample": {"num_beams": 2, "do_sample": True},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[5]], "min_p": 0.01},
    "guidance": {"guidance_scale": 1.5},
    "no-cache": {"use_cache": False},
}


@pytest.fixture
def make(tiny_config):
    def build(model_class, encoder, seed=0, **overrides):
        config = tiny_config(is_encoder_decoder=encoder, **overrides)
        config.initializer_range = 0.2
        torch.manual_seed(seed)
        return model_class(config).eval()

    return build


def ids(rows=BATCH, columns=LENGTH):
    return torch.randint(3, 97, (rows, columns), generator=torch.Generator().manual_seed(rows))


def masked(encoder):
    """Ids and a mask that pads the first row on the left."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    return {"input_ids": ids(), "attention_mask": mask}


def own(cache):
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


@both_generators
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_generation_returns_what_it_was_asked_for(make, model_class, encoder, mode, attention):
    if encoder and mode == "guidance":
        pytest.skip("the library calls the model without a source")
    model = make(model_class, encoder, attn_implementation=attention)
    arguments = MODES[mode]
    wanted = {"output_scores": True, "output_logits": True, "output_hidden_states": True}
    wanted |= {"output_attentions": True} if attention == "eager" else {}
    torch.manual_seed(1)
    plain = model.generate(**masked(encoder), **{**SETTINGS, **arguments})
    torch.manual_seed(1)
    out = model.generate(**masked(encoder), **{**SETTINGS, **arguments}, **wanted, return_dict_in_generate=True)
    torch.testing.assert_close(out.sequences, plain, rtol=0, atol=0)
    rows = BATCH * arguments.get("num_return_sequences", 1)
    before = 1 if encoder else LENGTH
    assert tuple(out.sequences.shape) == (rows, before + NEW)
    running = BATCH * arguments.get("num_beams", arguments.get("num_return_sequences", 1))
    assert len(out.scores) == len(out.logits) == NEW and tuple(out.scores[0].shape) == (running, 97)
    states = out.decoder_hidden_states if encoder else out.hidden_states
    assert len(states) == NEW and len(states[0]) == 3
    cached = arguments.get("use_cache", True)
    for step, state in enumerate(states):
        columns = before + step if not cached or step == 0 else 1
        assert tuple(state[0].shape) == (running, columns, 32)
    if attention == "eager":
        weights = out.decoder_attentions if encoder else out.attentions
        for step, weight in enumerate(weights):
            queries = before + step if not cached or step == 0 else 1
            assert tuple(weight[0].shape) == (running, 4, queries, before + step)
        if encoder:
            assert tuple(out.cross_attentions[0][0].shape) == (running, 4, 1, LENGTH)
    if cached:
        cache = own(getattr(out, CACHE))
        assert cache.get_seq_length() == before + NEW - 1
        assert tuple(cache.layers[0].keys.shape) == (running, 2, before + NEW - 1, 8)
    assert (out.scores[0].isfinite().any(1)).all()


@both_generators
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("helper", ["assistant", "lookup"])
def test_speculation_returns_what_greedy_search_does(make, model_class, encoder, attention, helper):
    model = make(model_class, encoder, attn_implementation=attention).double()
    arguments = {"prompt_lookup_num_tokens": 2}
    if helper == "assistant":
        assistant = make(model_class, encoder, seed=3, num_hidden_layers=1).double()
        assistant.generation_config.num_assistant_tokens = 3
        arguments = {"assistant_model": assistant}
    wanted = {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True}
    settings = {**SETTINGS, "max_new_tokens": 20, "min_new_tokens": None, "eos_token_id": None}
    out = model.generate(ids(1), **settings, **arguments, **wanted)
    truth = model.generate(ids(1), **settings, **wanted)
    torch.testing.assert_close(out.sequences, truth.sequences, rtol=0, atol=0)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(truth.scores))
    sampled = model.generate(ids(1), **{**settings, "do_sample": True}, **arguments)
    assert sampled.shape == truth.sequences.shape


@both_generators
def test_generation_starts_from_embeddings_with_and_without_ids(make, model_class, encoder):
    model = make(model_class, encoder)
    embeds = model.get_input_embeddings()(ids())
    truth = model.generate(ids(), **SETTINGS)[:, -NEW:]
    torch.testing.assert_close(model.generate(inputs_embeds=embeds, **SETTINGS)[:, -NEW:], truth, rtol=0, atol=0)
    if encoder:
        decoder_embeds = model.get_decoder().embed_tokens(torch.full((BATCH, 1), 1))
        out = model(inputs_embeds=embeds, decoder_inputs_embeds=decoder_embeds).logits
        torch.testing.assert_close(out, model(ids(), decoder_input_ids=torch.full((BATCH, 1), 1)).logits)
    else:
        torch.testing.assert_close(model.generate(ids(), inputs_embeds=embeds, **SETTINGS)[:, -NEW:], truth)


@both_generators
@pytest.mark.parametrize("beams", [1, 2])
def test_generation_continues_from_its_cache(make, model_class, encoder, beams):
    model = make(model_class, encoder).double()
    settings = {**SETTINGS, "return_dict_in_generate": True, "use_cache": True}
    settings |= {"max_new_tokens": 4, "min_new_tokens": 4}
    whole = model.generate(ids(), **{**settings, "max_new_tokens": 7, "min_new_tokens": 7})
    first = model.generate(ids(), **{**settings, "max_new_tokens": 3, "min_new_tokens": 3})
    again = {"decoder_input_ids": first.sequences} if encoder else {}
    tokens = ids() if encoder else first.sequences
    mask = {"decoder_attention_mask" if encoder else "attention_mask": torch.ones_like(first.sequences)}
    rest = model.generate(tokens, **again, **mask, **settings, **{CACHE: getattr(first, CACHE)})
    torch.testing.assert_close(rest.sequences, whole.sequences, rtol=0, atol=0)
    assert own(getattr(rest, CACHE)).get_seq_length() == own(getattr(whole, CACHE)).get_seq_length()


@both_generators
def test_kinds_of_cache_that_cannot_grow_are_refused_in_a_sentence(make, model_class, encoder):
    model = make(model_class, encoder)
    for kind in ("static", "quantized"):
        with pytest.raises((ValueError, ImportError)) as refusal:
            model.generate(ids(), cache_implementation=kind, **SETTINGS)
        assert "Cache, but the cache must grow" in str(refusal.value) or "quant" in str(refusal.value)


@both_generators
def test_a_prefilled_cache_of_the_library_is_refused(make, model_class, encoder):
    filled = DynamicCache()
    filled.update(torch.zeros(BATCH, 2, 3, 8), torch.zeros(BATCH, 2, 3, 8), 0)
    model = make(model_class, encoder)
    inputs = {"decoder_input_ids": ids()} if encoder else {}
    with pytest.raises(ValueError, match="DynamicCache of 3 tokens"):
        model(ids(), **inputs, past_key_values=filled)


@both_generators
def test_preparing_inputs_hands_on_all_arguments(make, model_class, encoder):
    model = make(model_class, encoder)
    prepared = model.prepare_inputs_for_generation(ids(), is_first_iteration=True, output_hidden_states=True)
    assert prepared["output_hidden_states"] is True
    names = inspect.signature(model.forward).parameters
    assert {"cache", "past_key_values", "logits_to_keep", "kwargs"} <= set(names)


@both_generators
def test_saved_generation_settings_are_used(make, model_class, encoder, tmp_path):
    model = make(model_class, encoder)
    model.generation_config = GenerationConfig(
        max_new_tokens=4, pad_token_id=0, bos_token_id=1, decoder_start_token_id=1
    )
    model.save_pretrained(tmp_path)
    auto = AutoModelForSeq2SeqLM if encoder else AutoModelForCausalLM
    loaded = auto.from_pretrained(tmp_path)
    assert loaded.generate(ids()).shape[1] == 4 + (1 if encoder else LENGTH)


@every_form
@torch.no_grad()
def test_copies_pickles_and_other_types_compute_the_same(make, model_class, encoder, tmp_path):
    model = make(model_class, encoder)
    truth = model(ids())[0]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(ids())[0], truth, rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    half = model_class.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert half.dtype == torch.bfloat16 and half(ids())[0].dtype == torch.bfloat16
    assert model_class.from_pretrained(tmp_path, dtype="auto").dtype == torch.float32
    mixed = model_class.from_pretrained(tmp_path, attn_implementation={"decoder": "eager"}).eval()
    assert mixed.config.decoder._attn_implementation == "eager"
    torch.testing.assert_close(mixed(ids())[0], truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_class", [FlashLiteForSequenceClassification, FlashLiteForTokenClassification])
@pytest.mark.parametrize("encoder", [False, True])
def test_a_head_of_another_size_is_initialized_again(make, model_class, encoder, tmp_path):
    make(model_class, encoder, num_labels=2).save_pretrained(tmp_path)
    with pytest.raises((RuntimeError, ValueError), match="mismatch|size|shape"):
        model_class.from_pretrained(tmp_path, num_labels=5)
    model = model_class.from_pretrained(tmp_path, num_labels=5, ignore_mismatched_sizes=True)
    assert model(ids()).logits.shape[-1] == 5


@every_form
def test_states_keep_their_gradients(make, model_class, encoder):
    model = make(model_class, encoder, attn_implementation="eager").train()
    out = model(ids(), output_hidden_states=True, output_attentions=True)
    prefix = "decoder_" if encoder else ""
    kept = [out[f"{prefix}hidden_states"][0], out[f"{prefix}attentions"][0]]
    kept += [out["encoder_hidden_states"][0], out["encoder_attentions"][0]] if encoder else []
    for state in kept:
        state.retain_grad()
    out[0].sum().backward()
    assert all(state.grad is not None for state in kept)


@every_form
def test_checkpointing_can_be_switched_on_and_off(make, model_class, encoder):
    model = make(model_class, encoder)
    on = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    off = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    layers = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    on()
    assert all(layer.gradient_checkpointing for layer in layers)
    off()
    assert layers and not any(layer.gradient_checkpointing for layer in layers)


@every_form
@torch.no_grad()
def test_rows_alone_and_in_a_batch_are_the_same(make, model_class, encoder):
    model = make(model_class, encoder).double()
    together = model(**masked(encoder))
    for row in range(BATCH):
        alone = model(**{name: value[row : row + 1] for name, value in masked(encoder).items()})
        torch.testing.assert_close(alone[0], together[0][row : row + 1])


@pytest.mark.filterwarnings("ignore")
def test_text_generation_pipeline(make):
    from checkpoints import make_model, make_tokenizer

    tokenizer = make_tokenizer()
    generate = pipeline("text-generation", model=make_model("causal", len(tokenizer)), tokenizer=tokenizer)
    texts = generate(["You may not", "use this file except in compliance"], max_new_tokens=5, do_sample=False)
    assert len(texts) == 2 and texts[0][0]["generated_text"].startswith("You may not")
