"""Position encodings: one dot product equals the sum of the published terms, and scores depend on distance only."""

import pytest
import torch

from modeling_flashlite.attention_flashlite import AxisSpec
from modeling_flashlite.configuration_flashlite import POSITION_ENCODINGS
from modeling_flashlite.layers_flashlite import FlashLiteDecoderAttention
from modeling_flashlite.positions_flashlite import first_block_shift, nearer, position_angles, rotate, shift_angles


def attention_of(config, encoding):
    config.position_encoding = encoding
    attention = FlashLiteDecoderAttention(config.decoder, 0).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return attention


def scores(attention, config, hidden, positions):
    angles = position_angles(config.decoder, positions, hidden.dtype)
    query, (key, _) = attention.queries(hidden, angles), attention.keys_values(hidden, angles)
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    return query @ key.mT


def scores_reference(attention, config, hidden, positions):
    """The terms of the papers, one after the other, with explicit relative positions."""
    stack = config.decoder
    batch, length, _ = hidden.shape
    size, heads = stack.head_dim, stack.num_attention_heads
    query = attention.q_proj(hidden).view(batch, length, heads, size).transpose(1, 2)
    key = attention.k_proj(hidden).view(batch, length, stack.num_key_value_heads, size).transpose(1, 2)
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    distance = (positions[:, :, None] - positions[:, None, :]).double()
    frequencies = 10000.0 ** (-torch.arange(0, size, 2).double() / size)
    total = torch.zeros(batch, heads, length, length, dtype=torch.float64)
    if attention.is_rotary:
        angles = distance[..., None] * frequencies
        half = size // 2
        (a, b), (c, d) = (query[..., :half], query[..., half:]), (key[..., :half], key[..., half:])
        real = torch.einsum("bnth,bnsh->bntsh", a, c) + torch.einsum("bnth,bnsh->bntsh", b, d)
        imaginary = torch.einsum("bnth,bnsh->bntsh", b, c) - torch.einsum("bnth,bnsh->bntsh", a, d)
        # R_t q . R_s k = Re(q k* e^{i (t - s) w}), pair by pair
        total += (real * angles.cos()[:, None] - imaginary * angles.sin()[:, None]).sum(-1)
    else:
        content = query @ key.mT
        content_bias = torch.einsum("nh,bnsh->bns", attention.content_bias, key)[:, :, None]
        total += content + content_bias
        sinusoid = torch.cat(
            [(distance[..., None] * frequencies).cos(), (distance[..., None] * frequencies).sin()], -1
        )
        relative = attention.r_proj(sinusoid).view(batch, length, length, heads, size)
        total += torch.einsum("bnth,btsnh->bnts", query, relative)
        total += torch.einsum("nh,btsnh->bnts", attention.position_bias, relative)
    return total


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_one_dot_product_equals_the_terms_of_the_papers(tiny_config, encoding):
    config = tiny_config()
    attention = attention_of(config, encoding)
    hidden = torch.randn(2, 9, config.hidden_size, dtype=torch.float64, requires_grad=True)
    positions = torch.stack([torch.arange(9), torch.arange(9) + 5])
    ours, truth = (function(attention, config, hidden, positions) for function in (scores, scores_reference))
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-11)
    weight = torch.randn_like(truth)
    parameters = [hidden, *(p for n, p in attention.named_parameters() if not n.startswith(("v_proj", "o_proj")))]
    gradients = [torch.autograd.grad((value * weight).sum(), parameters) for value in (ours, truth)]
    for ours, truth in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=1e-10)


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_scores_depend_on_distance_alone(tiny_config, encoding):
    config = tiny_config()
    attention = attention_of(config, encoding).float()
    hidden = torch.randn(1, 12, config.hidden_size)
    near, far = (scores(attention, config, hidden, torch.arange(12)[None] + shift) for shift in (0, 1_000_000))
    # angles in float32 would be off by 2.6e-2 here
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-4)


def test_rotation_keeps_norms_and_undoes_itself(tiny_config):
    config = tiny_config()
    cos, sin = position_angles(config.decoder, torch.arange(7)[None], torch.float64)
    states = torch.randn(1, 2, 7, config.head_dim, dtype=torch.float64)
    turned = rotate(states, cos, sin)
    torch.testing.assert_close(turned.norm(dim=-1), states.norm(dim=-1))
    torch.testing.assert_close(rotate(turned, cos, -sin), states)


def test_scaled_rotary_embeddings_of_the_library_work(tiny_config):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    plain, scaled = tiny_config(), tiny_config(rope_parameters=rope)
    cos, _ = position_angles(plain.decoder, torch.arange(4)[None], torch.float64)
    halved, _ = position_angles(scaled.decoder, torch.arange(0, 8, 2)[None], torch.float64)
    torch.testing.assert_close(cos, halved, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("encoding", POSITION_ENCODINGS)
def test_the_first_block_seems_no_further_than_the_window_reaches(tiny_config, encoding):
    config = tiny_config(block_size=4, memory_blocks=3)
    attention, spec = attention_of(config, encoding), AxisSpec(4, 2, 1, 3)
    positions = torch.arange(60)[None]
    shift = first_block_shift(positions, spec)
    assert [first_block_shift(t, spec) for t in range(60)] == shift[0].tolist()
    assert int((positions - shift).max()) == (spec.memory_blocks + 2) * spec.block_size - 1
    assert not shift[:, : (spec.memory_blocks + 2) * spec.block_size].any()
    hidden = torch.randn(1, 60, config.hidden_size, dtype=torch.float64)
    far, near = (
        attention.queries(hidden, position_angles(config.decoder, x, hidden.dtype))
        for x in (positions, positions - shift)
    )
    angles = shift_angles(config.decoder, positions, spec, hidden.dtype)[0]
    torch.testing.assert_close(nearer(far, *angles), near, rtol=0, atol=1e-11)
