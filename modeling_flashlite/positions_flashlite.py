# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Positions: angles per layer, rotation of queries and keys, and the shift of the first block."""

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

# rotary embeddings whose frequencies depend on the length of the text
LENGTH_ROPES = ("dynamic", "longrope")


def position_angles(
    config, positions: torch.Tensor, dtype: torch.dtype, kind: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine `[B, 1, T, H / 2]` of the angles of `positions` `[B, T]`, for layers of one of `rope_kinds`.

    Angles are computed in float64: in float32 they are off by 2.6e-2 at position one million, and scores would not
    depend on the distance alone. Models trained with float32 angles keep them (`rope_dtype`). There is no stored
    buffer that could lose precision.
    """
    wide = torch.float64 if config.rope_dtype == "float64" else torch.promote_types(dtype, torch.float32)
    frequencies, scaling = rope_frequencies(config, positions, kind)
    angles = positions[:, None, :, None].to(wide) * frequencies.to(wide)
    return (angles.cos() * scaling).to(dtype), (angles.sin() * scaling).to(dtype)


def rope_frequencies(config, positions: torch.Tensor, kind: str | None) -> tuple[torch.Tensor, float]:
    """Angle per position `[H / 2]` of each pair of dimensions, and the factor of cosines and sines."""
    if kind == "none":
        return torch.zeros(config.head_dim // 2, device=positions.device), 1.0
    rope = config.rope_parameters
    if rope["rope_type"] == "default" or kind == "local":
        base = config.rope_local_base_freq if kind == "local" else rope["rope_theta"]
        dtype = getattr(torch, config.rope_dtype)
        exponent = torch.arange(0, config.head_dim, 2, dtype=dtype, device=positions.device) / config.head_dim
        return 1.0 / base**exponent, 1.0
    # these frequencies depend on the current length; reading it synchronizes an accelerator
    length = int(positions.max()) + 1 if rope["rope_type"] in LENGTH_ROPES else None
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, positions.device, seq_len=length)


def layer_angles(config, positions: torch.Tensor, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """[`position_angles`] of each layer; layers of one kind share them."""
    kinds = config.rope_kinds
    angles = {kind: position_angles(config, positions, dtype, kind) for kind in set(kinds)}
    return [angles[kind] for kind in kinds]


def shift_angles(config, positions: torch.Tensor, spec, dtype: torch.dtype):
    """Cosine and sine `[B, 1, T, H / 2]` for each layer: angles of [`first_block_shift`] of `positions` `[B, T]`."""
    shift, kinds = first_block_shift(positions, spec)[:, None, :, None], config.rope_kinds
    turns = {kind: shift * rope_frequencies(config, positions, kind)[0].to(torch.float64) for kind in set(kinds)}
    angles = {kind: (turn.cos().to(dtype), turn.sin().to(dtype)) for kind, turn in turns.items()}
    return [angles[kind] for kind in kinds]


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (h, h + H / 2) of `[B, N, T, H]` by its position's angle (https://huggingface.co/papers/2104.09864)."""
    first, second = states.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def first_block_shift(positions, spec):
    """Shift of the first block's positions toward queries at `positions`, a tensor or an `int`.

    Once the first block has left the window, it is placed just before the window, so that no distance exceeds the span
    of the window at any text length (https://huggingface.co/papers/2309.17453).
    """
    if spec.memory_blocks is None:
        return 0 * positions
    blocks = positions // spec.block_size - int(spec.reach) - 1
    return (blocks.clamp(min=0) if isinstance(blocks, torch.Tensor) else max(blocks, 0)) * spec.block_size


def nearer(query: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Queries with their positions, `[B, N, T, H or 2 H]`, as they are at positions less by some shift.

    `cos` and `sin` `[.., H / 2]` belong to the shift. The last dimensions carry the position in both encodings, and
    turn alike.
    """
    size = 2 * cos.shape[-1]
    return torch.cat([query[..., :-size], rotate(query[..., -size:], cos, -sin)], dim=-1)
