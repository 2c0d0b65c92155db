# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""The cache of Flash-Lite: a layer of blocks for each decoder layer, and the keys of the encoder.

Shapes: B batch, N key-value heads, S slots, H head size.
"""

import copy

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from .attention_flashlite import AxisSpec, BlockSummaries, summarize_blocks
from .cache_blocks_flashlite import SPARE_BLOCKS, BlockLayer


def axis_spec(config) -> AxisSpec:
    """The axes of a decoder config."""
    return AxisSpec(config.block_size, config.sub_block_size, config.relevance_top_k, config.memory_blocks)


class FlashLiteCacheLayer(BlockLayer):
    """A [`BlockLayer`] whose rows can be reordered, chosen, joined, cut short and moved, as generation needs."""

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` columns.

        Raises:
            ValueError: for a positive number, for more columns than were seen, or for tokens whose context is gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"`crop` takes 0 or a negative number of tokens to remove, but got {tokens_to_remove}.")
        count = -int(tokens_to_remove)  # assisted generation of older versions of the library gives a tensor
        if count == 0 or not self.is_initialized:
            return
        removed = count if self.mask is None else self.mask[:, -count:].sum(1)
        fill = self.fill - removed
        lowest = fill if isinstance(fill, int) else int(fill.min())
        lost = torch.as_tensor((self.base > 0) & (fill // self.spec.block_size <= self.spec.reach))
        if lowest < 0 or count > self.columns or lost.any():
            raise ValueError(
                f"`crop` cannot take back {count} tokens: the window of {self.spec.reach} blocks has moved past them; "
                f"remove at most {SPARE_BLOCKS * self.spec.block_size} tokens at a time, or raise `memory_blocks`."
            )
        self.version += 1
        self.fill, self.columns = fill, self.columns - count
        self.mask = None if self.mask is None else self.mask[:, :-count]
        self.summarized = min(self.summarized, self._used // self.spec.block_size)

    def _select(self, choose) -> None:
        """Apply `choose` to the batch dimension of the whole state."""
        if self.is_initialized:
            self.version += 1
            self._keys, self._values = choose(self._keys), choose(self._values)
            self._summaries = BlockSummaries(*(choose(part) for part in self._summaries))
            self._select_counts(choose)

    def _select_counts(self, choose) -> None:
        for name in ("fill", "base", "mask"):
            state = getattr(self, name)
            if isinstance(state, torch.Tensor):
                setattr(self, name, choose(state))

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search.

        Only slots in use are copied, into spare buffers that are then swapped with the old ones: writing to newly
        allocated memory takes several times as long.
        """
        if not self.is_initialized:
            return
        beam_idx = beam_idx.to(self._keys.device)
        if len(beam_idx) != self.batch_size or self._keys.requires_grad or self._values.requires_grad:
            return self._select(lambda state: state.index_select(0, beam_idx))
        old, used = (self._keys, self._values), self._used
        if self._spare is None or not all(map(_can_replace, self._spare, old)):
            self._spare = tuple(map(torch.empty_like, old))
        for source, target in zip(old, self._spare):
            torch.index_select(source[:, :, :used], 0, beam_idx, out=target[:, :, :used])
        (self._keys, self._values), self._spare = self._spare, old
        self.version += 1
        if self.summarized:
            self._summaries = BlockSummaries(*(part.index_select(0, beam_idx) for part in self._summaries))
        self._select_counts(lambda state: state.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._select(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows in `indices`."""
        self._select(lambda state: state[indices.to(state.device)])
        if self.is_initialized:
            self._settle()

    def row(self, index: int) -> "FlashLiteCacheLayer":
        """One row as a layer of its own, without padding.

        Raises:
            ValueError: if the layer is empty.
        """
        if not self.is_initialized:
            raise ValueError("A cache without tokens has no rows to take; run the prompt first.")
        layer = copy.copy(self)
        layer._spare = None
        layer.batch_select_indices(torch.tensor([index]))
        if layer.mask is not None:
            layer.columns, layer.mask = int(layer.mask.sum()), None
        return layer

    def append_rows(self, *others: "FlashLiteCacheLayer") -> None:
        """Append the rows of `others`; the newest columns of all become one column, and each row keeps its length.

        Raises:
            ValueError: if one of them is empty.
        """
        parts = (self, *others)
        if not all(part.is_initialized for part in parts):
            raise ValueError("A cache without tokens has no rows to join; run the prompt first.")
        device = self._keys.device
        slots = -(-max(part._used for part in parts) // self.spec.block_size) * self.spec.block_size
        keys, values = (
            [_fit(getattr(part, name), part._used, slots) for part in parts] for name in ("_keys", "_values")
        )
        masks = [part._column_mask() for part in parts]
        width = max(mask.shape[1] for mask in masks)
        self.mask = torch.cat([torch.nn.functional.pad(mask, (width - mask.shape[1], 0)) for mask in masks])
        fills = [part._fill_tensor(device) for part in parts]
        bases = [torch.as_tensor(part.base, device=device).expand(part.batch_size) for part in parts]
        self.fill, self.base, self.columns = torch.cat(fills), torch.cat(bases), max(part.columns for part in parts)
        self._keys, self._values = torch.cat(keys), torch.cat(values)
        self._summaries = summarize_blocks(self._keys, self._values, self.spec)
        self.summarized = self._used // self.spec.block_size
        self._spare = None
        self.version += 1
        self._settle()

    def _column_mask(self) -> torch.Tensor:
        if self.mask is not None:
            return self.mask
        return torch.ones(self.batch_size, self.columns, dtype=torch.bool, device=self._keys.device)

    def drop_columns(self, count: int) -> None:
        """Drop the oldest `count` columns, which are padding in every row."""
        self.columns -= count
        if self.mask is not None:
            empty = int(self.mask.any(0).int().argmax())
            self.mask = self.mask[:, min(count, empty) :]
            self._settle()

    def _settle(self) -> None:
        """Return to common counts once all rows have equal lengths, which allows faster paths."""
        counts = self.fill, self.base
        if any(isinstance(count, torch.Tensor) and bool((count != count[0]).any()) for count in counts):
            return
        self.fill, self.base = (int(torch.as_tensor(count).flatten()[0]) for count in counts)
        if self.mask is not None and bool(self.mask.all()):
            self.mask = None

    def reset_rows(self, rows: torch.Tensor) -> None:
        """Forget the rows where `rows` (bool `[B]`) is true, e.g. those whose document has ended."""
        if not self.is_initialized or not bool(rows.any()):
            return
        self.version += 1
        rows = rows.to(self._keys.device)
        self.fill = self._fill_tensor(rows.device).masked_fill(rows, 0)
        self.base = torch.as_tensor(self.base, device=rows.device).masked_fill(rows, 0).expand(len(rows)).clone()
        self.mask = None if self.mask is None else self.mask & ~rows[:, None]

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move the state back to the device it came from."""
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device) -> None:
        if self.is_initialized and self._keys.device != torch.device(device):
            self.version += 1
            self._keys = self._keys.to(device, non_blocking=True)
            self._values = self._values.to(device, non_blocking=True)
            self._summaries = BlockSummaries(*(part.to(device, non_blocking=True) for part in self._summaries))


def _fit(states: torch.Tensor, used: int, slots: int) -> torch.Tensor:
    """The first `used` slots of `[B, N, S, H]`, zero-padded to `slots`."""
    return torch.nn.functional.pad(states[:, :, :used], (0, 0, 0, slots - used))


def _can_replace(spare: torch.Tensor, states: torch.Tensor) -> bool:
    """Whether `spare` can be written here and is as large as `states`."""
    writable = torch.is_inference_mode_enabled() or not spare.is_inference()
    return writable and spare.shape == states.shape and spare.device == states.device


class EncoderCacheLayer(DynamicLayer):
    """The encoder's keys and values for one decoder layer.

    `whole` `[B, N, S, H or 2 H]` holds the keys with the dimensions that carry their positions; `keys` shows them
    without. `sources` (`LongTensor` `[B]`, `None` if each row is taken for itself) numbers the rows by their source:
    rows of one source, such as the beams of a sentence, are equal, so that reordering them moves no data. `version`
    rises with every change.
    """

    def __init__(self, *args, **kwargs):
        self.version, self.whole, self.sources = 0, None, None
        super().__init__(*args, **kwargs)

    @property
    def keys(self):
        """Keys `[B, N, S, H]` without the dimensions of the position, or `None` while empty."""
        return None if self.whole is None else self.whole[..., : self.values.shape[3]]

    @keys.setter
    def keys(self, value):
        self.whole, self.version = value, self.version + 1

    def update(self, key_states, value_states, *args, **kwargs):
        """Store the keys and values of all source tokens at once; returns the stored tensors.

        Raises:
            ValueError: if keys are held already.
        """
        if self.is_initialized:
            raise ValueError(
                f"The cache holds the keys of {self.whole.shape[2]} source tokens already; call `reset()` on it, or "
                "pass an empty cache, to read another source."
            )
        self.keys, self.values = key_states, value_states
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        return self.whole, self.values

    def get_seq_length(self) -> int:
        """Source tokens held."""
        return 0 if self.whole is None else self.whole.shape[2]

    def _map(self, change) -> None:
        if self.is_initialized:
            self.keys, self.values = change(self.whole), change(self.values)

    def reset(self) -> None:
        """Drop all states."""
        self.keys = self.values = self.sources = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows for beam search."""
        if self.sources is not None:
            sources = self.sources.index_select(0, beam_idx.to(self.sources.device))
            if torch.equal(sources, self.sources):
                return
            self.sources = sources
        self._map(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        self._map(lambda states: states.repeat_interleave(repeats, dim=0))
        self.sources = None if self.sources is None else self.sources.repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows in `indices`."""
        self._map(lambda states: states[indices.to(states.device)])
        self.sources = None if self.sources is None else self.sources[indices.to(self.sources.device)]

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._map(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the state back to the device it came from."""
        self._map(lambda states: states.to(self.device, non_blocking=True))


class FlashLiteCache(DynamicCache):
    """The decoder's cache and segment memory; one [`FlashLiteCacheLayer`] per layer.

    Args:
        config ([`FlashLiteDecoderConfig`] or [`FlashLiteConfig`]): gives the axes and the number of layers.
        offloading (`bool`, defaults to `False`): keep the layers on the CPU between their uses.
    """

    def __init__(self, config, offloading: bool = False):
        config = config.get_text_config(decoder=True)
        spec = axis_spec(config)
        Cache.__init__(
            self, [FlashLiteCacheLayer(spec) for _ in range(config.num_hidden_layers)], offloading=offloading
        )

    def reset_rows(self, rows: torch.Tensor) -> None:
        """Forget the rows where `rows` (bool `[B]`) is true; for streams whose document has ended."""
        for layer in self.layers:
            layer.reset_rows(rows)


def own_cache(past_key_values):
    """The decoder's part of a cache, which is all of it where there is no encoder."""
    return (
        past_key_values.self_attention_cache if isinstance(past_key_values, EncoderDecoderCache) else past_key_values
    )


def prepare_cache(past_key_values, config, cross: bool):
    """Return `past_key_values` ready for the decoder of `config`, taking over an empty `DynamicCache` of the library.

    Args:
        past_key_values (`Cache`, *optional*): the user's or `generate`'s cache; `None` makes a new one.
        config ([`FlashLiteDecoderConfig`]): the decoder's config.
        cross (`bool`): whether there are encoder keys to hold too.

    Raises:
        ValueError: for a cache of another kind, or one that another model has filled.
    """
    if past_key_values is None:
        past_key_values = FlashLiteCache(config)
    if cross:
        if not isinstance(past_key_values, EncoderDecoderCache):
            past_key_values = EncoderDecoderCache(past_key_values, DynamicCache())
        other = past_key_values.cross_attention_cache
        if not other.layers or not all(isinstance(layer, EncoderCacheLayer) for layer in other.layers):
            if not isinstance(other, DynamicCache) or other.get_seq_length() > 0:
                raise ValueError(
                    f"The cache of the encoder's keys is a {type(other).__name__} of {other.get_seq_length()} tokens, "
                    "but this decoder keeps positions beside them; pass an `EncoderDecoderCache` of empty "
                    "`DynamicCache`s, or none."
                )
            other.layers = [EncoderCacheLayer() for _ in range(config.num_hidden_layers)]
            other.layer_class_to_replicate = None
    own = own_cache(past_key_values)
    if own.layers and all(isinstance(layer, FlashLiteCacheLayer) for layer in own.layers):
        if len(own.layers) != config.num_hidden_layers:
            raise ValueError(
                f"The cache has {len(own.layers)} layers, but the decoder has {config.num_hidden_layers}; pass a "
                "cache that this model made, or none."
            )
        return past_key_values
    if not isinstance(own, DynamicCache) or own.get_seq_length() > 0:
        raise ValueError(
            f"`past_key_values` is a {type(own).__name__} of {own.get_seq_length()} tokens, but this decoder keeps "
            "block summaries beside its keys; pass a `FlashLiteCache`, an empty `DynamicCache`, or none."
        )
    spec = axis_spec(config)
    own.layers = [FlashLiteCacheLayer(spec) for _ in range(config.num_hidden_layers)]
    own.layer_class_to_replicate = None
    return past_key_values


__all__ = ["FlashLiteCache", "FlashLiteCacheLayer"]
