"""Generation of both language models: caches, beams, speculation, embeddings and streams."""

import pytest
import torch
import transformers
from heads import BATCH, LENGTH, both_generators, continued, every_form, first_output, inputs_of
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    TextIteratorStreamer,
)

from modeling_flashlite import (
    FlashLiteForCausalLM,
)
from modeling_flashlite.compat_flashlite import CACHE

LIBRARY = tuple(map(int, transformers.__version__.split(".")[:2]))


@both_generators
def test_cache_has_the_columns_that_generate_counts(make, model_class, encoder):
    model = make(model_class, encoder)
    inputs = inputs_of(model)
    out = continued(model, encoder, inputs, return_dict_in_generate=True)
    cache = out.past_key_values
    assert model(**inputs, use_cache=False).past_key_values is None
    if encoder:
        assert isinstance(cache, EncoderDecoderCache)
        assert all(tuple(layer.keys.shape) == (BATCH, 2, LENGTH, 8) for layer in cache.cross_attention_cache.layers)
        cache = cache.self_attention_cache
    assert isinstance(cache, DynamicCache) and not cache.is_compileable and getattr(cache, "is_croppable", True)
    columns = out.sequences.shape[1] - 1
    assert cache.get_seq_length() == columns
    for layer in cache.layers:
        assert tuple(layer.keys.shape) == tuple(layer.values.shape) == (BATCH, 2, columns, 8)


@both_generators
@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 5},
        {"num_beams": 2, "do_sample": True},
        {"use_cache": False},
        {"logits_to_keep": 0},
        {"cache_implementation": "dynamic"},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_ways_to_generate(make, model_class, encoder, arguments):
    model = make(model_class, encoder)
    inputs = inputs_of(model)
    tokens = continued(model, encoder, inputs, **arguments)
    assert tokens.shape == (BATCH * arguments.get("num_return_sequences", 1), 12 + (1 if encoder else LENGTH))
    if not arguments.keys() & {"num_beams", "do_sample"}:
        torch.testing.assert_close(tokens, continued(model, encoder, inputs), rtol=0, atol=0)


@both_generators
def test_beams_equal_a_search_without_cache(make, model_class, encoder):
    model = make(model_class, encoder).double()
    inputs = inputs_of(model)
    with_cache = continued(model, encoder, inputs, num_beams=3)
    torch.testing.assert_close(with_cache, continued(model, encoder, inputs, num_beams=3, use_cache=False))


@both_generators
@pytest.mark.parametrize("helper", ["assistant", "lookup", "early exit"])
def test_speculation_changes_no_token(make, model_class, encoder, helper):
    model = make(model_class, encoder).double()
    inputs = inputs_of(model, batch=1, padded=False)
    other = make(model_class, encoder).double()
    arguments = {
        "assistant": {"assistant_model": other},
        "lookup": {"prompt_lookup_num_tokens": 3},
        "early exit": {"assistant_early_exit": 1},
    }[helper]
    fast = continued(model, encoder, inputs, max_new_tokens=30, **arguments)
    torch.testing.assert_close(fast, continued(model, encoder, inputs, max_new_tokens=30), rtol=0, atol=0)


@both_generators
def test_generation_goes_on_from_a_cache(make, model_class, encoder):
    model = make(model_class, encoder).double()
    inputs = inputs_of(model)
    whole = continued(model, encoder, inputs, return_dict_in_generate=True)
    first = continued(model, encoder, inputs, max_new_tokens=5, return_dict_in_generate=True)
    rest = {CACHE: first.past_key_values}
    if encoder:
        rest |= {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        # the library tells a whole sequence from its new tokens by the length of the mask
        rest |= {"decoder_input_ids": first.sequences, "decoder_attention_mask": torch.ones_like(first.sequences)}
        tokens = continued(model, False, rest, max_new_tokens=7)
    else:
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1)
        tokens = continued(
            model, encoder, {"input_ids": first.sequences, "attention_mask": mask} | rest, max_new_tokens=7
        )
    torch.testing.assert_close(tokens, whole.sequences, rtol=0, atol=0)


def test_generation_from_embeddings(make):
    model = make(FlashLiteForCausalLM, False)
    inputs = inputs_of(model)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    from_ids = continued(model, False, inputs)[:, LENGTH:]
    from_embeds = continued(model, False, {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]})
    torch.testing.assert_close(from_embeds, from_ids, rtol=0, atol=0)


@every_form
def test_embeddings_may_replace_ids(make, model_class, encoder):
    model = make(model_class, encoder)
    inputs = inputs_of(model)
    table = model.get_input_embeddings()
    embeds = {
        name.replace("input_ids", "inputs_embeds"): table(value) if name.endswith("ids") else value
        for name, value in inputs.items()
    }
    torch.testing.assert_close(first_output(model, embeds), first_output(model, inputs))


@both_generators
def test_last_logits_alone(make, model_class, encoder):
    model = make(model_class, encoder)
    inputs = inputs_of(model)
    everything = model(**inputs).logits
    torch.testing.assert_close(model(**inputs, logits_to_keep=1).logits, everything[:, -1:])
    torch.testing.assert_close(model(**inputs, logits_to_keep=torch.tensor([0, 5])).logits, everything[:, [0, 5]])


@both_generators
def test_the_librarys_own_empty_cache_is_taken_over(make, model_class, encoder):
    model = make(model_class, encoder)
    inputs = inputs_of(model)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if encoder else DynamicCache(config=model.config)
    out = model(**inputs, past_key_values=cache, use_cache=True)
    assert out.past_key_values is cache and cache.get_seq_length() == LENGTH - (2 if encoder else 0)
    torch.testing.assert_close(out.logits, model(**inputs).logits)


def test_tokens_are_streamed(make):
    class Letters:
        def decode(self, tokens, **arguments):
            return "".join(chr(97 + int(token) % 26) + " " for token in tokens)

    model = make(FlashLiteForCausalLM, False)
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True)
    tokens = continued(model, False, inputs_of(model, batch=1, padded=False), streamer=streamer)
    assert "".join(streamer) == Letters().decode(tokens[0, LENGTH:])
