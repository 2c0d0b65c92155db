"""The cache: crops, reorders, bounded memory, and caches that do not fit."""

import random

import pytest
import torch
from models import causal_model, tokens

from modeling_flashlite import (
    FlashLiteCache,
)
from modeling_flashlite.attention_flashlite import AxisSpec, multi_axis_attention, multi_axis_attention_reference
from modeling_flashlite.cache_flashlite import FlashLiteCacheLayer
from modeling_flashlite.working_set_flashlite import WorkingSet, fits_working_set


def test_generation_of_any_length_needs_bounded_memory():
    model = causal_model(dtype=torch.float32)
    out = model.generate(tokens(1, 5), max_new_tokens=300, do_sample=False, return_dict_in_generate=True)
    layer = out.past_key_values.layers[0]
    assert layer.get_seq_length() == 304
    assert layer.keys.shape[2] < 80
    with torch.no_grad():
        logits = model(out.sequences[:, :-1], use_cache=False).logits
    assert torch.equal(logits[:, 4:].argmax(-1), out.sequences[:, 5:])


def test_crop_takes_tokens_back_exactly():
    model = causal_model()
    ids = tokens(2, 40)
    with torch.no_grad():
        truth = model(ids, use_cache=False).logits
        cache = model(ids[:, :33], use_cache=True).past_key_values
        cache.crop(-6)
        assert cache.get_seq_length() == 27
        out = model(ids[:, 27:], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(out.logits, truth[:, 27:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("memory", [None, 9])
@torch.no_grad()
def test_decoding_with_crops_and_reorders_equals_attention_over_what_is_left(memory):
    spec, chance = AxisSpec(4, 2, 2, memory), random.Random(0)
    layer, working, made_for = FlashLiteCacheLayer(spec), None, None
    k = v = torch.zeros(2, 2, 0, 8, dtype=torch.float64)
    served = 0
    for _ in range(250):
        if k.shape[2] > 60 and chance.random() < 0.1:
            back = chance.randint(1, 9)
            layer.crop(-back)
            k, v = k[:, :, :-back], v[:, :, :-back]
        if chance.random() < 0.05:
            layer.reorder_cache(torch.tensor([1, 0]))
            k, v = k.flip(0), v.flip(0)
        q, new_k, new_v = (torch.randn(2, heads, 1, 8, dtype=torch.float64) for heads in (4, 2, 2))
        k, v = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
        own = layer.update(new_k, new_v)
        out = multi_axis_attention(q, *own, spec, start=layer.start, summaries=layer.summaries)
        expected = multi_axis_attention_reference(q, k, v, spec, start=k.shape[2] - 1)[0]
        assert (out - expected).abs().max() < 1e-12
        if not fits_working_set(*own, spec, layer.start):
            continue
        # what is derived from the slots is valid for one version and block
        if made_for != (layer.version, layer.start // 4):
            made_for = layer.version, layer.start // 4
            working = WorkingSet(*own, spec, layer.start // 4, layer.summaries)
        else:
            served += 1
        out = working.attend((q * 8**-0.5).view(4, 2, 8), *own, layer.start).view_as(expected)
        assert (out - expected).abs().max() < 1e-12
    assert served > 50


@torch.no_grad()
def test_unwritten_slots_are_ignored():
    model, ids = causal_model(), tokens(2, 34)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    truth, order = model(ids, attention_mask=mask).logits[:, 30:], torch.tensor([1, 0])
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        cache = model(ids[:, :30], attention_mask=mask[:, :30], use_cache=True).past_key_values
        cache.reorder_cache(order)
        out = model(ids[order, 30:], attention_mask=mask[order], past_key_values=cache, use_cache=True).logits
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(out, truth[order], rtol=0, atol=1e-12)


def test_crop_beyond_the_window_is_refused():
    model = causal_model(memory_blocks=2)
    cache = FlashLiteCache(model.config)
    for chunk in tokens(1, 200).split(10, dim=1):
        model(chunk, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="window of 2 blocks"):
        cache.crop(-190)
    cache.crop(-3)
    assert cache.get_seq_length() == 197


def test_select_repeat_and_reorder_move_whole_rows():
    model = causal_model()
    ids, mask = tokens(3, 30), torch.ones(3, 30, dtype=torch.long)
    mask[1, :7] = 0
    follow = tokens(3, 5, seed=9)

    def run(change, rows):
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        change(cache)
        return model(follow[rows], past_key_values=cache, use_cache=True).logits

    with torch.no_grad():
        truth = run(lambda cache: None, [0, 1, 2])
        order = torch.tensor([2, 0, 1])
        torch.testing.assert_close(run(lambda c: c.reorder_cache(order), [2, 0, 1]), truth[order])
        torch.testing.assert_close(run(lambda c: c.batch_select_indices(order[:2]), [2, 0]), truth[order[:2]])
        twice = run(lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
        torch.testing.assert_close(twice[::2], truth)
        cache = model(ids, use_cache=True).past_key_values
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(ids, past_key_values=cache, use_cache=True).logits
        torch.testing.assert_close(again, model(ids).logits, rtol=0, atol=1e-12)


def test_caches_of_another_model_or_batch_are_refused_before_any_change():
    model = causal_model()
    deeper = causal_model(num_hidden_layers=3)
    cache = deeper(tokens(1, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="3 layers"):
        model(tokens(1, 2), past_key_values=cache)
    cache = model(tokens(2, 9), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="2 rows"):
        model(tokens(3, 2), past_key_values=cache)
    assert cache.get_seq_length() == 9
    with pytest.raises(ValueError, match="give one of them"):
        model(tokens(2, 2), past_key_values=cache, memory=model.new_memory())
