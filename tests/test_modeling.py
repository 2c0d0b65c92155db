"""The logits do not depend on how the input is split, padded or packed."""

import pytest
import torch
from checkpoints import checkpoint_layers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import causal_model, tokens

from modeling_flashlite import (
    FlashLiteCache,
    FlashLiteConfig,
    FlashLiteForCausalLM,
)
from modeling_flashlite.configuration_flashlite import POSITION_ENCODINGS
from modeling_flashlite.rows_flashlite import packed_rows


@st.composite
def cuts(draw):
    length = draw(st.integers(1, 60))
    points = sorted(draw(st.sets(st.integers(1, max(length - 1, 1)), max_size=8)) | {length})
    bounds = [0, *(point for point in points if point <= length)]
    return [(a, b) for a, b in zip(bounds, bounds[1:]) if a < b]


shapes = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([2, 4, 8]),
        "sub_block_size": st.sampled_from([1, 2]),
        "relevance_top_k": st.sampled_from([0, 1, 3, None]),
        "memory_blocks": st.sampled_from([0, 1, 3, 20, None]),
        "num_key_value_heads": st.sampled_from([1, 2]),
        "position_encoding": st.sampled_from(POSITION_ENCODINGS),
    }
)
SHORT_TAIL = {
    "block_size": 2,
    "sub_block_size": 1,
    "relevance_top_k": 0,
    "memory_blocks": 3,
    "num_key_value_heads": 1,
    "position_encoding": "transformer_xl",
}


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    chunks=cuts(),
    pads=st.tuples(*[st.integers(0, 9)] * 4),
    segments=st.integers(0, 9),
    seed=st.integers(0, 99),
)
# a row that ends before the other in its chunk, behind more tokens of its own
@example(shape=SHORT_TAIL, chunks=[(0, 6), (6, 23)], pads=(6, 0, 5, 6), segments=0, seed=0)
@example(shape=SHORT_TAIL, chunks=[(0, 5), (5, 11)], pads=(7, 0, 6, 7), segments=0, seed=0)
def test_chunks_paddings_and_one_forward_agree(shape, chunks, pads, segments, seed):
    """Left and right padding, uneven chunks with a cache, and one pass over bare rows give the same logits.

    So do chunks of which the first `segments` are read with a segment memory, from which the cache goes on.
    """
    model = causal_model(seed, **shape)
    length = chunks[-1][1]
    rows = [tokens(1, max(1, length - pads[2]), seed), tokens(1, max(1, length - pads[3]), seed + 1)]
    before = [pads[0] % (length - row.shape[1] + 1) for row in rows]
    ids, mask = torch.zeros(2, length, dtype=torch.long), torch.zeros(2, length, dtype=torch.long)
    for index, (row, start) in enumerate(zip(rows, before)):
        ids[index, start : start + row.shape[1]] = row[0]
        mask[index, start : start + row.shape[1]] = 1
    with torch.no_grad():
        truth = [model(row, use_cache=False).logits[0] for row in rows]
        whole = model(ids, attention_mask=mask, use_cache=False).logits
        cache, parts = None, []
        for a, b in chunks:
            out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        memory, continued = model.new_memory(), []
        for index, (a, b) in enumerate(chunks):
            if index < segments:
                out = model(ids[:, a:b], attention_mask=mask[:, a:b], memory=memory)
                memory = out.memory
            else:
                out = model(ids[:, a:b], attention_mask=mask[:, :b], past_key_values=memory, use_cache=True)
            continued.append(out.logits)
        assert memory.get_seq_length() == length
    for result in (whole, torch.cat(parts, 1), torch.cat(continued, 1)):
        for index, (row, start) in enumerate(zip(rows, before)):
            torch.testing.assert_close(result[index, start : start + row.shape[1]], truth[index], rtol=0, atol=1e-12)


def test_float32_chunks_agree_to_single_precision():
    model = causal_model(dtype=torch.float32)
    ids = tokens(2, 50)
    with torch.no_grad():
        truth = model(ids, use_cache=False).logits
        cache, parts = None, []
        for step in ids.split(1, dim=1):
            out = model(step, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), truth, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_future_tokens_change_no_past_logit(encoding):
    model = causal_model(position_encoding=encoding)
    for length in (1, 4, 5, 23, 41):
        ids = tokens(1, length)
        with torch.no_grad():
            truth = model(ids, use_cache=False).logits
            for position in range(length - 1):
                other = ids.clone()
                other[:, position + 1 :] = tokens(1, length - position - 1, seed=7)
                changed = model(other, use_cache=False).logits
                torch.testing.assert_close(changed[:, : position + 1], truth[:, : position + 1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_segments_with_memory_equal_one_pass(training, checkpointing):
    """Where the memory covers the window, reading segment by segment is one pass, in training too."""
    model = causal_model().train(training)
    model.config.use_cache = False
    if checkpointing:
        checkpoint_layers(model)
    ids = tokens(2, 57)
    truth = model(ids).logits
    for size in (4, 7, 20):
        memory, parts = model.new_memory(), []
        for segment in ids.split(size, dim=1):
            out = model(segment, memory=memory)
            memory = out.memory
            parts.append(out.logits)
        torch.testing.assert_close(torch.cat(parts, 1), truth, rtol=0, atol=1e-12)
        assert memory.layers[0].keys.shape[2] <= (1 + 5 + 1) * 4
        assert not memory.layers[0].keys.requires_grad


def test_a_memory_one_block_short_is_noticed():
    long, short = causal_model(memory_blocks=5), causal_model(memory_blocks=4)
    ids = tokens(1, 57)
    assert not torch.allclose(long(ids).logits, short(ids).logits, atol=1e-6)
    torch.testing.assert_close(long(ids[:, :20]).logits, short(ids[:, :20]).logits, rtol=0, atol=1e-12)


def test_memory_rows_reset_one_by_one():
    model = causal_model()
    first, second = tokens(2, 30), tokens(2, 13, seed=5)
    memory = model(first, memory=model.new_memory()).memory
    memory.reset_rows(torch.tensor([True, False]))
    out = model(second, memory=memory).logits
    torch.testing.assert_close(out[0], model(second[:1]).logits[0], rtol=0, atol=1e-12)
    whole = model(torch.cat([first[1:], second[1:]], 1)).logits
    torch.testing.assert_close(out[1], whole[0, 30:], rtol=0, atol=1e-12)


def test_memory_carries_no_gradient_and_memory_length_is_bounded():
    model = causal_model().train()
    memory = model.new_memory()
    for segment in tokens(1, 400).split(16, dim=1):
        out = model(segment, labels=segment, memory=memory)
        memory = out.memory
        assert memory.layers[0].keys.shape[2] <= 6 * 4
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_packed_documents_equal_rows_of_their_own():
    model = causal_model()
    documents = [tokens(1, size, seed=size) for size in (17, 3, 25)]
    packed = torch.cat(documents, 1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    out = model(packed, position_ids=positions, use_cache=False).logits
    start = 0
    for document in documents:
        end = start + document.shape[1]
        torch.testing.assert_close(out[:, start:end], model(document).logits, rtol=0, atol=1e-12)
        start = end


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    pads=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    offset=st.integers(0, 7),
)
def test_packed_documents_among_padding_equal_each_alone(sizes, pads, offset):
    model = causal_model()
    documents = [tokens(1, size, seed=index) for index, size in enumerate(sizes)]
    single = tokens(1, sum(sizes) + sum(pads), seed=9)
    ids = torch.cat([torch.nn.functional.pad(torch.cat(documents, 1), pads), single])
    mask = torch.cat([torch.nn.functional.pad(torch.ones(1, sum(sizes)), pads), torch.ones(single.shape)]).long()
    positions = torch.cat([offset + torch.arange(size) for size in sizes])
    positions = torch.stack([torch.nn.functional.pad(positions, pads), torch.arange(ids.shape[1])])
    out = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(out[1:], model(single).logits, rtol=0, atol=1e-12)
    start = pads[0]
    for document in documents:
        end = start + document.shape[1]
        torch.testing.assert_close(out[:1, start:end], model(document).logits, rtol=0, atol=1e-12)
        start = end


def test_positions_that_count_padding_or_skip_it_mean_one_document():
    model, ids = causal_model(), tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 4:6] = 0
    truth = model(ids, attention_mask=mask).logits
    for positions in (torch.arange(12)[None], torch.arange(12).expand(2, -1), (mask.cumsum(1) - 1).clamp(min=0)):
        for past in (None, model.new_memory(), FlashLiteCache(model.config)):
            past = {"memory" if past is not None and len(positions) == 1 else "past_key_values": past}
            out = model(ids, attention_mask=mask, position_ids=positions, **past).logits
            torch.testing.assert_close(out, truth, rtol=0, atol=0)


def test_packed_documents_of_unlike_lengths():
    """Short documents are not read at the length of the longest one, and lose no gradient."""
    sizes = [90, 1, 3, 17, 2, 40, 7]
    ids = torch.cat([tokens(1, size, seed=size) for size in sizes], 1)
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    rows = packed_rows(ids[..., None], None, positions)
    assert sum(part.source.numel() for part in rows.parts) <= 2 * ids.shape[1] < rows.source.numel()
    model = causal_model()
    logits = model(ids, position_ids=positions, use_cache=False).logits
    (packed,) = torch.autograd.grad(logits.square().sum(), model.model.decoder.layers[0].self_attn.k_proj.weight)
    alone = [model(part, use_cache=False).logits for part in ids.split(sizes, 1)]
    torch.testing.assert_close(logits, torch.cat(alone, 1), atol=1e-12, rtol=0)
    total = sum(part.square().sum() for part in alone)
    (apart,) = torch.autograd.grad(total, model.model.decoder.layers[0].self_attn.k_proj.weight)
    torch.testing.assert_close(packed, apart, atol=1e-9, rtol=1e-9)


def test_packed_documents_go_with_nothing_that_belongs_to_whole_rows():
    model, ids = causal_model(), tokens(1, 6)
    packed = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}
    filled = model(ids, use_cache=True).past_key_values
    for past in (FlashLiteCache(model.config), filled):
        with pytest.raises(ValueError, match="packed documents, but a cache belongs to whole rows"):
            model(**packed, past_key_values=past)
    with pytest.raises(ValueError, match="packed documents, but a segment memory belongs to whole rows"):
        model(**packed, memory=model.new_memory())
    with pytest.raises(ValueError, match="packed documents, but the encoder reads whole rows"):
        causal_model(is_encoder_decoder=True)(**packed, decoder_input_ids=ids)


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_encoder_padding_and_target_chunks_change_nothing(encoding):
    model = causal_model(is_encoder_decoder=True, position_encoding=encoding)
    source, target = tokens(2, 11), tokens(2, 33, seed=2)
    with torch.no_grad():
        truth = model(source, decoder_input_ids=target).logits
        for left, right in ((3, 0), (0, 4), (2, 5)):
            padded = torch.nn.functional.pad(source, (left, right))
            mask = torch.nn.functional.pad(torch.ones_like(source), (left, right))
            out = model(padded, attention_mask=mask, decoder_input_ids=target).logits
            torch.testing.assert_close(out, truth, rtol=0, atol=1e-12)
        cache, parts = None, []
        for chunk in target.split([1, 1, 9, 1, 20, 1], dim=1):
            out = model(source, decoder_input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, 1), truth, rtol=0, atol=1e-12)
    assert cache.cross_attention_cache.layers[0].keys.shape[2] == 11


def test_attention_weights_rebuild_the_attention_and_sum_to_one():
    model = causal_model(is_encoder_decoder=True)
    source, target = tokens(2, 9), tokens(2, 30, seed=2)
    mask = torch.ones_like(target)
    mask[0, :4] = 0
    truth = model(source, decoder_input_ids=target, decoder_attention_mask=mask).logits
    model.set_attn_implementation("eager")
    out = model(source, decoder_input_ids=target, decoder_attention_mask=mask, output_attentions=True)
    torch.testing.assert_close(out.logits[mask.bool()], truth[mask.bool()], rtol=0, atol=1e-12)
    assert out.decoder_attentions[0].shape == (2, 2, 30, 30)
    assert out.cross_attentions[0].shape == (2, 2, 30, 9)
    total = out.decoder_attentions[0].sum(-1) + out.cross_attentions[0].sum(-1)
    torch.testing.assert_close(total[mask.bool()[:, None].expand(-1, 2, -1)], torch.ones(2 * 56).double())
    assert float(out.decoder_attentions[0][0, :, :, :4].abs().max()) == 0


def test_dense_and_sparse_checkpoints_are_interchangeable():
    sparse, dense = causal_model(), causal_model(relevance_top_k=None, memory_blocks=None)
    dense.load_state_dict(sparse.state_dict())
    ids = tokens(1, 12)
    torch.testing.assert_close(sparse(ids).logits, dense(ids).logits, rtol=0, atol=1e-12)


def test_a_decoder_alone_has_no_unused_parameter():
    model = causal_model().train()
    ids = tokens(2, 40)
    model(ids, labels=ids).loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_finite(dtype):
    model = causal_model(dtype=dtype)
    with torch.no_grad():
        assert torch.isfinite(model(tokens(2, 60)).logits).all()


def test_factorised_embeddings_train_and_tie():
    model = causal_model(embedding_size=8, hidden_size=16)
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    assert model.lm_head.weight.shape == (61, 8)
    ids = tokens(2, 20)
    model(ids, labels=ids).loss.backward()
    assert model.model.decoder.embed_proj.weight.grad is not None and model.head_proj.weight.grad is not None


def test_the_lite_network_halves_parameters_and_operations():
    """4/3 D gated (3 matrices) against the usual plain 4 D (2 matrices): 4 D^2 against 8 D^2, for both counts."""
    config = FlashLiteConfig(hidden_size=96, num_attention_heads=4, is_encoder_decoder=False)
    mlp = FlashLiteForCausalLM(config).model.decoder.layers[0].mlp
    assert sum(parameter.numel() for parameter in mlp.parameters()) == 96 * 96 * 8 // 2


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "exactly one"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "empty"),
        ({"input_ids": torch.tensor([[61]])}, "61 is outside the vocabulary of 61"),
        ({"input_ids": torch.tensor([[-1]])}, "-1 is outside"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 3)}, r"\(1, 3\)"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 1, 4, 4)}, "mask"),
    ],
)
def test_inputs_that_cannot_be_meant_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        causal_model()(**inputs)


def test_missing_encoder_inputs_are_refused():
    model = causal_model(is_encoder_decoder=True)
    with pytest.raises(ValueError, match="encoder input"):
        model(decoder_input_ids=tokens(1, 3))
    with pytest.raises(ValueError, match="packed"):
        model(tokens(1, 3), decoder_input_ids=tokens(1, 4), decoder_position_ids=torch.tensor([[0, 1, 0, 1]]))


def test_a_module_is_refused_as_loss_function():
    with pytest.raises(TypeError, match=r"nn\.Module"):
        causal_model().loss_function = torch.nn.CrossEntropyLoss()
