"""Workloads of the benchmarks: random inputs, models with random weights, and the calls that are measured.

Functions measured in a separate process live here, because that process must import them.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LlamaConfig

from ..attention_flashlite import AxisSpec, multi_axis_attention
from ..cache_flashlite import FlashLiteCache
from ..configuration_flashlite import FlashLiteConfig
from ..ecq_config_flashlite import EcqConfig
from ..modeling_flashlite import FlashLiteForCausalLM
from ..training.divergence import KDLoss
from ..training.families import flashlite_config

__all__ = [
    "ATTENTIONS",
    "HEAD_SHAPE",
    "SHAPES",
    "SPEC",
    "attention_inputs",
    "attention_work",
    "continuation",
    "generating",
    "greedy",
    "random_decoder",
    "random_tokens",
    "reading",
    "training_step",
]

HEADS, KEY_VALUE_HEADS, HEAD_DIM = 8, 2, 64
HEAD_SHAPE = {"heads": HEADS, "key_value_heads": KEY_VALUE_HEADS, "head_dim": HEAD_DIM}
# unlimited memory, so that both sides attend to the whole past
SPEC = AxisSpec(block_size=64, sub_block_size=16, relevance_top_k=8, memory_blocks=None)
# memory of 8192 tokens: beyond it, time is linear in the length
WINDOW = dataclasses.replace(SPEC, memory_blocks=128)
OURS, DENSE = "multi-axis", "SDPA causal"
# names in tables and in results files
OUR_MODEL, BART, T5GEMMA, LLAMA = "Flash-Lite", "BART", "T5Gemma", "Llama"
SOURCE_TOKENS, NEW_TOKENS, PREFILL_TOKENS = 32, 30, 512
# width, layers, heads, vocabulary: 75 M parameters, more than a cache holds
CODED = (1024, 8, 16, 16000)
# shapes of SmolLM2-135M and Llama-3.2-1B; tiny is for quick trials
SHAPES = {
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "135M": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "1.2B": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def multi_axis(q, k, v):
    return multi_axis_attention(q, k, v, SPEC)


def windowed(q, k, v):
    return multi_axis_attention(q, k, v, WINDOW)


ATTENTIONS: dict[str, Callable] = {DENSE: sdpa, OURS: multi_axis}


def attention_inputs(
    queries: int, keys: int, *, seed: int = 0, dtype: str = "float32", device: str = "cpu", grad: bool = False
) -> list[torch.Tensor]:
    """Random q `[1, H, queries, d]` and k, v `[1, Hkv, keys, d]` of one seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (HEADS, queries), (KEY_VALUE_HEADS, keys), (KEY_VALUE_HEADS, keys)
    tensors = [torch.randn(1, *shape, HEAD_DIM, generator=generator) for shape in shapes]
    return [tensor.to(device, getattr(torch, dtype)).requires_grad_(grad) for tensor in tensors]


def attention_work(function: Callable, length: int, work: str, **inputs) -> Callable[[], object]:
    """A function without arguments that computes `"forward"` or `"forward+backward"` over `length` tokens.

    Args:
        function (`Callable`): attention of q, k, v.
        length (`int`): tokens.
        work (`str`): what the call computes.
        **inputs: `seed`, `dtype` and `device` of [`attention_inputs`].
    """
    backward = work == "forward+backward"
    q, k, v = attention_inputs(length, length, grad=backward, **inputs)
    grad = torch.randn_like(q)
    if backward:
        return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), grad)
    return torch.inference_mode()(lambda: function(q, k, v))


def named_attention_work(name: str, length: int, work: str, seed: int, dtype: str) -> Callable[[], object]:
    """[`attention_work`] of one of `ATTENTIONS` by its name, for a separate process."""
    return attention_work(ATTENTIONS[name], length, work, seed=seed, dtype=dtype)


def random_tokens(batch: int, length: int, vocabulary: int, *, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Token ids `[batch, length]`, none of the first four, which are special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocabulary, (batch, length), generator=generator).to(device)


def random_decoder(shape: tuple[int, int, int, int], seed: int = 0) -> FlashLiteForCausalLM:
    """A decoder-only Flash-Lite of (width, layers, heads, vocabulary) with random float32 weights."""
    width, layers, heads, vocabulary = shape
    torch.manual_seed(seed)
    config = FlashLiteConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        is_encoder_decoder=False,
    )
    return FlashLiteForCausalLM(config).eval()


def training_step(model, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward over one batch, without the optimizer."""
    model.train()

    def step():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def greedy(model, ids: torch.Tensor, **kwargs) -> Callable[[], torch.Tensor]:
    """Greedy generation of exactly `NEW_TOKENS` tokens; no token ends it early."""
    # min_new_tokens has the same effect, but scans the vocabulary for every token
    model.generation_config.eos_token_id = None
    count = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1, **kwargs}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **count)


def continuation(model, length: int, new_tokens: int, seed: int = 0) -> Callable[[], None]:
    """Greedy decoding after `length` tokens, with random states in the cache: their values do not change the cost."""
    config = model.config.get_text_config(decoder=True)
    ours = isinstance(model, FlashLiteForCausalLM)
    cache = FlashLiteCache(config) if ours else DynamicCache(config=config)
    one, whole = (random_tokens(1, n, config.vocab_size, seed=seed, device=model.device) for n in (1, length))
    model(one, past_key_values=cache)
    for index, layer in enumerate(list(cache.layers) if length > 2 else ()):
        keys = layer._keys if ours else layer.keys
        widths = keys.shape[3], layer.values.shape[3]
        cache.update(*(torch.randn(1, keys.shape[1], length - 2, width).to(keys) for width in widths), index)
    run = greedy(model, whole, max_new_tokens=new_tokens, past_key_values=cache)

    def step():
        run()
        cache.crop(length - 1 - cache.get_seq_length())

    return step


def random_model(shape: str, seed: int) -> FlashLiteForCausalLM:
    """A converted Llama of this shape with random bfloat16 weights and a trained length of 8,192."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(seed)
    return FlashLiteForCausalLM._from_config(flashlite_config(config), dtype=torch.bfloat16).eval()


def reading(shape: str, seed: int, length: int, batch: int) -> Callable[[], object]:
    """Read a prompt of `length` tokens in chunks of 2,048."""
    model = random_model(shape, seed)
    ids = random_tokens(batch, length, SHAPES[shape]["vocab_size"], seed=seed)

    @torch.inference_mode()
    def read(ids: torch.Tensor) -> None:
        cache = None
        for part in ids.split(2048, 1):
            cache = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values

    read(ids[:, :64])  # one-time initialisation
    return lambda: read(ids)


def generating(shape: str, seed: int, length: int, batch: int) -> Callable[[], object]:
    """Read prompts of `length` tokens and generate 16 tokens for each of `batch` rows."""
    run = greedy(
        random_model(shape, seed),
        random_tokens(batch, length, SHAPES[shape]["vocab_size"], seed=seed),
        max_new_tokens=16,
    )
    run()
    return run


def loss_step(seed: int, vocabulary: int, name: str, tokens: int = 2048) -> Callable[[], None]:
    """Forward and backward of a distillation loss over `tokens`: from all logits at once, or chunk by chunk."""
    torch.manual_seed(seed)
    width, kept = 256, 64
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    labels = torch.randint(vocabulary, (1, tokens))
    ids = torch.randint(vocabulary, (1, tokens, kept)).sort(-1).values
    teacher = {"teacher_ids": ids, "teacher_weights": torch.rand(1, tokens, kept).softmax(-1) * 0.9}
    loss = KDLoss("forward", temperature=1.0)

    def step():
        hidden.grad = head.weight.grad = None
        logits = head(hidden) if name == "dense" else None
        loss(hidden, head, labels, logits=logits, **teacher).backward()

    return step


def grown_step(seed: int, sizes: dict) -> Callable[[], None]:
    """A training step of a causal model of two layers with the width, batch, length and vocabulary of `sizes`."""
    model = random_decoder((sizes["width"], 2, 4, sizes["vocabulary"]), seed)
    return training_step(model, random_tokens(sizes["batch"], sizes["length"], sizes["vocabulary"], seed=seed))


def loading(folder: str, first_token: bool) -> Callable[[], object]:
    """Load the model in `folder`; with `first_token`, also compute one token.

    Loading only maps a float model into memory, and its first token reads it, so only both together compare with a
    coded model. The small model beside `folder` is loaded first, so that imports are not counted.
    """

    @torch.inference_mode()
    def run(folder):
        model = FlashLiteForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model(torch.tensor([[4]])) if first_token else model

    run(Path(folder).parent / "small")
    return lambda: run(folder)


def quantizing(model: str, rate: float) -> Callable[[], object]:
    """Quantize `model` to `rate` bits per weight without data while loading it, as users do."""
    AutoTokenizer.from_pretrained(model)  # imports are not counted
    config = EcqConfig(target_bits=rate)
    return lambda: AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=config)
