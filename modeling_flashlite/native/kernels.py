"""Decoding of coded models by compiled code, built on this machine on request: products and whole layers for a token.

[`enable_native`] compiles `decode.cpp` once (half a minute; the library stays in the cache of
`torch.utils.cpp_extension`), and puts [`NativeWeight`] in the place of `KernelWeight` and [`NativeLayerStep`] in that
of `LayerStep`. The Python path is the reference, and runs everywhere else. Activations of up to four rows are split
into two bytes, so that products are as exact as in float32. More rows, of batches and prompts, have one byte for each
activation and a scale for 32 of them: about bfloat16 precision, at twice the speed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import cpp_extension
from transformers.activations import ACT2FN

from ..cache_flashlite import FlashLiteCacheLayer, own_cache
from ..decode_flashlite import DecodeSession, TokenStep
from ..ecq_modules_flashlite import EcqEmbedding, EcqLinear, join
from ..int4_flashlite import KernelWeight
from ..layer_step_flashlite import EncoderKeys, LayerStep, Place, norms_of
from ..layers_flashlite import FlashLiteDecoderLayer
from ..linear_flashlite import is_hooked
from ..stacks_flashlite import FlashLiteDecoder
from ..tiles_flashlite import TILE_ROWS

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_NAME = "flashlite_native"
_PYTHON: tuple[Any, Any] = KernelWeight.of, KernelWeight.most_rows


class NativeWeight(NamedTuple):
    """A weight as `decode.cpp` takes it, what [`KernelWeight`] is for PyTorch; only rare digits are held twice.

    Attributes:
        held (`torch.classes.flashlite_native.Held`): tiles, step, numbers and factors as in `int4_linear`, and
            `RareDigits.by_tiles`.
    """

    held: Any

    @classmethod
    def of(cls, tiles, step, columns, numbers=None, factors=None, rare=None, bias=None) -> NativeWeight:
        """The arguments as they are, but for the order of rare digits; see `KernelWeight.of`."""
        step, factors, bias = (x if x is None else x.detach().contiguous() for x in (step, factors, bias))
        ordered = (None, None) if rare is None else rare.padded(len(tiles) * TILE_ROWS).by_tiles()
        return cls(torch.classes.flashlite_native.Held([tiles, step, numbers, factors, *ordered], bias, columns))

    @staticmethod
    def most_rows() -> int:
        """Any number: with AVX-512, 512 rows are still faster than by unpacking."""
        return sys.maxsize

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        """x `[M, K]` of any floating dtype times the weight: `[M, N]` in x's dtype."""
        return self.held.rows(x)


class NativeLayerStep(LayerStep):
    """A [`LayerStep`] in one call of compiled code, where all weights of the layer are codes on the CPU.

    The shifted first block of long bounded texts and other activations than SiLU take the Python path.
    """

    def __init__(self, layer: FlashLiteDecoderLayer, index: int, kind: str | None, dtype: torch.dtype):
        super().__init__(layer, index, kind, dtype)
        self.native: Any = _native_layer(layer, self.query_map) if _is_coded(layer) else None

    def __call__(
        self, states: torch.Tensor, cache: FlashLiteCacheLayer, place: Place, encoder: EncoderKeys | None = None
    ) -> torch.Tensor:
        """States `[B, D]` of the newest tokens -> `[B, D]`; the cache grows in place."""
        cross = (None, None, None) if encoder is None else encoder.cross
        if self.native is None or not _takes(cache, place) or not _fit(cross, cache):
            return super().__call__(states, cache, place, encoder)
        slots, angles = cache.open_slots(), place.angles[self.kind]
        states = self.native.step(states, angles.cos, angles.sin, *_buffers(cache), slots, *cross)
        cache.close_slots()
        return states


def _takes(cache: FlashLiteCacheLayer, place: Place) -> bool:
    """Whether compiled code can read and extend a layer of the cache."""
    return (
        place.few
        and place.shift is None
        and (place.bias is None) == (type(cache.fill) is int)  # one position of all rows, or one of each
        and cache.summarized == cache._used // cache.spec.block_size
        and cache._keys.dtype in (torch.float32, torch.bfloat16)
    )


def _fit(cross: Iterable[torch.Tensor | None], cache: FlashLiteCacheLayer) -> bool:
    """Whether keys, values and mask of an encoder are as those of the cache."""
    return all(x is None or x.is_contiguous() and x.dtype in (cache._keys.dtype, torch.bool) for x in cross)


def _buffers(cache: FlashLiteCacheLayer) -> tuple[torch.Tensor, ...]:
    return cache._keys, cache._values, *cache._summaries


class NativeTokenStep(TokenStep):
    """A [`TokenStep`] in one call of compiled code, where the table and all layers are codes on the CPU.

    A token reads all weights, after which no code is in the processor's cache: each operator in between is slow.
    """

    layer_class = NativeLayerStep

    def __init__(self, decoder: FlashLiteDecoder, dtype: torch.dtype):
        super().__init__(decoder, dtype)
        self.kinds = list(dict.fromkeys(layer.kind for layer in self.layers))
        self.native: Any = None
        layers = [layer.native for layer in self.layers if isinstance(layer, NativeLayerStep)]
        if all(layer is not None for layer in layers) and _has_coded_ends(decoder):
            norm, table = decoder.norm, decoder.embed_tokens
            weight, eps = (torch.zeros(0), 0.0) if isinstance(norm, nn.Identity) else (_norm_weight(norm), norm.eps)
            self.native = torch.classes.flashlite_native.Decoder(
                layers,
                [self.kinds.index(layer.kind) for layer in self.layers],
                _held(table),
                weight,
                eps,
                decoder.embedding_multiplier,
            )

    def __call__(self, input_ids: torch.Tensor, past_key_values, place: Place, encoder_mask) -> torch.Tensor:
        """Ids `[B, 1]` to the last hidden states `[B, 1, D]`; the cache grows in place."""
        own = own_cache(past_key_values)
        caches = own.layers
        if self.native is None or own is not past_key_values or not all(map(_takes, caches, repeat(place))):
            return super().__call__(input_ids, past_key_values, place, encoder_mask)
        slots = [cache.open_slots() for cache in caches]
        angles = [part for kind in self.kinds for part in place.angles[kind][:2]]
        ids, buffers = input_ids.long(), [part for cache in caches for part in _buffers(cache)]
        states = self.native.step(ids, angles, buffers, slots[0])
        for cache in caches:
            cache.close_slots()
        return states


def _has_coded_ends(decoder: FlashLiteDecoder) -> bool:
    """Whether what comes before the first and after the last layer is a table of codes and a norm that can be run."""
    table, norm = decoder.embed_tokens, decoder.norm
    if type(table) is not EcqEmbedding or table.tiles is None or not table.tiles.is_cpu or table.step.requires_grad:
        return False
    if decoder.embed_proj is not None or is_hooked(table) or is_hooked(norm):
        return False
    return isinstance(norm, nn.Identity) or isinstance(norm, nn.RMSNorm) and norm.eps is not None


def _norm_weight(norm: nn.RMSNorm) -> torch.Tensor:
    return norm.weight.float().add(getattr(norm, "offset", 0.0)).contiguous()


def _is_coded(layer: FlashLiteDecoderLayer) -> bool:
    """Whether a layer is made of nothing but what `decode.cpp` computes."""
    attention, mlp = layer.self_attn, layer.mlp
    coded = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    coded += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = [*norms_of(layer), attention.q_norm, attention.k_norm]
    if any(map(is_hooked, [*coded, *norms, mlp.act_fn])) or type(mlp.act_fn) is not type(ACT2FN["silu"]):
        return False
    if len({norm.eps for norm in norms if isinstance(norm, nn.RMSNorm)} - {None}) != 1:
        return False
    return all(
        type(linear) is EcqLinear
        and linear.tiles is not None
        and linear.tiles.is_cpu
        and not linear.step.requires_grad
        for linear in coded
    )


def _held(layer: EcqLinear | EcqEmbedding):
    weight, bias = layer.prepared(), getattr(layer, "bias", None)
    if bias is None and type(weight) is NativeWeight:
        return weight.held
    # with its bias, or of a model that has decoded before by the Python path
    tensors = layer.tiles.detach(), layer.step, layer.weight_shape[1], layer.numbers, layer.factors, layer.rare
    return NativeWeight.of(*tensors, None if bias is None else bias.float()).held


def _together(layers: list[EcqLinear]) -> tuple[list, list[int]]:
    """The weights of layers that read the same states, in one product if they can be joined, and where each begins."""
    joint = join(layers)
    sizes = [layer.out_features if joint is None else len(layer.tiles) * TILE_ROWS for layer in layers]
    places = [sum(sizes[:index]) for index in range(len(sizes))]
    return list(map(_held, layers if joint is None else [joint])), places


@torch.no_grad()
def _native_layer(layer: FlashLiteDecoderLayer, query_map):
    attention, mlp, spec = layer.self_attn, layer.mlp, layer.self_attn.spec
    reads, places = _together([attention.q_proj, attention.k_proj, attention.v_proj])
    gates, inner_places = _together([mlp.gate_proj, mlp.up_proj])
    norms, eps = [], 0.0
    for norm in (*norms_of(layer), attention.q_norm, attention.k_norm):
        if isinstance(norm, nn.RMSNorm):
            norms.append(_norm_weight(norm))
            eps = norm.eps
        else:
            norms.append(torch.zeros(0))
    bias, matrix = (None, None) if query_map is None else (x.float().contiguous() for x in query_map)
    config = attention.config
    heads = config.num_attention_heads, config.num_key_value_heads, attention.head_dim
    limits = (-1 if limit is None else limit for limit in (spec.relevance_top_k, spec.memory_blocks))
    sizes = [mlp.down_proj.out_features, *heads, mlp.down_proj.in_features]
    sizes += [spec.block_size, spec.sub_block_size, *limits]
    arguments = reads, _held(attention.o_proj), gates, _held(mlp.down_proj), norms, bias, matrix
    return torch.classes.flashlite_native.Layer(
        *arguments, places + inner_places, sizes, eps, layer.residual_multiplier
    )


@functools.lru_cache(maxsize=1)
def build() -> None:
    """Compile and load the library, unless this process has it.

    Raises:
        RuntimeError: there is no compiler or no ninja, or the compiler fails.
    """
    version = f"{sys.implementation.cache_tag}_{torch.__version__}"
    folder = Path(cpp_extension.get_default_build_root()) / f"{_NAME}_{version}"
    try:
        cpp_extension.verify_ninja_availability()
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            cpp_extension.load(
                _NAME,
                [str(Path(__file__).with_name("decode.cpp"))],
                extra_cflags=["-O3", "-fopenmp", "-fno-math-errno"],
                extra_ldflags=["-fopenmp"],
                build_directory=str(folder),
                is_python_module=False,
            )
    except (RuntimeError, OSError) as error:
        compiler = os.environ.get("CXX", "c++")
        raise RuntimeError(
            f"The native kernels could not be built ({str(error).strip().splitlines()[0]}); install {compiler} and "
            "`pip install flashlite[native]`, or leave them out: they change nothing but speed."
        ) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time build in a folder.

    PyTorch's own lock is a file, which stays when a build is killed, and every later one would wait for it forever.
    """
    if fcntl is None:
        raise RuntimeError("this system has no fcntl")
    with open(folder / "building", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "lock").unlink(missing_ok=True)
        yield


def enable_native(on: bool = True) -> None:
    """Let coded models on the CPU decode by compiled code, or with `on=False` by the Python path again.

    A model that has decoded before keeps the products that it prepared.

    Args:
        on (`bool`): whether to use the compiled code.

    Raises:
        RuntimeError: it cannot be built, or this processor has neither AVX2 nor AVX-512, where it would not pay.
    """
    of, most_rows = _PYTHON
    if on:
        build()
        level = torch.ops.flashlite_native.best_level()
        if not level:
            raise RuntimeError(
                "This processor has neither AVX2 nor AVX-512, without which the native kernels are slower than "
                "PyTorch's; leave them out."
            )
        of = NativeWeight.of
        if level == 2:  # AVX2 takes rows one by one
            most_rows = NativeWeight.most_rows
    KernelWeight.of, KernelWeight.most_rows = of, most_rows  # type: ignore[method-assign]
    DecodeSession.step_class = NativeTokenStep if on else TokenStep
