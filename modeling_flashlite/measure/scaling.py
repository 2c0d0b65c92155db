"""Formulas for the training cost of a Flash-Lite decoder per device: memory, time and communication.

Units are bytes unless a name says otherwise. Notation: P parameters, L layers, D width, V vocabulary, T tokens per
device and step, n devices. Mixed precision as in FSDP2: weights, gradients and AdamW's two moments are sharded in
float32; layers compute in bfloat16. `scripts/studies/bench_parallel.py` compares the communication with the traffic of
two processes, `tests/test_bench.py` the parameters with a real model.
"""

from dataclasses import dataclass

from ..configuration_flashlite import FlashLiteConfig

__all__ = ["Device", "attention_visits", "communication", "count_decoder_parameters", "plan", "training_flops"]

WIDE, NARROW = 4, 2  # bytes of float32 and bfloat16


@dataclass(frozen=True)
class Device:
    """An accelerator and its network.

    Args:
        flops: peak operations per second in bfloat16.
        utilisation: share of the peak that a training step reaches.
        memory: bytes.
        inside, outside: bytes per second that a device sends, within a node and between nodes.
        node: devices in a node.
    """

    flops: float = 989e12
    utilisation: float = 0.4
    memory: float = 80e9
    inside: float = 450e9
    outside: float = 50e9
    node: int = 8


def count_decoder_parameters(config: FlashLiteConfig) -> int:
    """Parameters of `FlashLiteForCausalLM` with tied embeddings as wide as the model."""
    c = config.get_text_config(decoder=True)
    query, key = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention = c.hidden_size * (2 * query + 2 * key)
    if c.position_encoding != "rotary":
        attention += query * c.head_dim + 2 * query
    layer = attention + 3 * c.hidden_size * c.intermediate_size + 2 * c.hidden_size
    return c.num_hidden_layers * layer + c.vocab_size * c.hidden_size + c.hidden_size


def attention_visits(config: FlashLiteConfig, length: int) -> float:
    """Mean number of keys per query in a text of `length` tokens."""
    c = config.get_text_config(decoder=True)
    b, top = c.block_size, c.relevance_top_k
    dense = length if top is None else min(length, (top + 3) * b)
    total = dense * (dense + 1) / 2
    for block in range(dense // b, -(-length // b)):
        queries = min((block + 1) * b, length) - max(block * b, dense)
        # the first, the previous and the own block are read by every query and are no candidates
        older = block - 2 if c.memory_blocks is None else min(block - 2, c.memory_blocks - 1)
        total += max(queries, 0) * (2.5 * b + min(top or 0, older) * b + max(older - (top or 0), 0))
    return total / length


def training_flops(config: FlashLiteConfig, length: int, checkpointing: bool = True) -> float:
    """Operations per token of forward and backward pass; `checkpointing` repeats the forward of every layer."""
    c = config.get_text_config(decoder=True)
    passes = 4 if checkpointing else 3
    products = 2 * (count_decoder_parameters(config) - c.vocab_size * c.hidden_size) * passes
    head = 2 * c.vocab_size * c.hidden_size * 3
    width = c.num_attention_heads * (c.key_dim + c.head_dim)
    return products + head + 2 * width * attention_visits(config, length) * c.num_hidden_layers * passes


def communication(
    parameters: float,
    devices: int,
    kind: str,
    *,
    kept: float = 0,
    layers: int = 0,
    states: float = 0,
    logits: float = 0,
) -> float:
    """Bytes that each device sends in a training step, by ring algorithms.

    Args:
        parameters: bytes of all weights in the type in which they are sent.
        devices: number of devices.
        kind: "ddp" (gradients summed: twice the weights), "fsdp" (weights gathered for forward and for backward,
            gradients scattered: three times) or "tp" (per layer seven sums of its states, two in forward and one in
            backward for each of q, k, v, gate and up; two at the ends; the logits gathered).
        kept: bytes of the weights that "fsdp" keeps from forward to backward: those of the outermost module.
        layers: of the model, for "tp".
        states: bytes of the states of all tokens of a step, for "tp"; `logits` likewise.
    """
    share = (devices - 1) / devices
    if kind == "tp":
        return share * (2 * (7 * layers + 2) * states + logits)
    return share * (2 * parameters if kind == "ddp" else 3 * parameters - kept)


def plan(config: FlashLiteConfig, devices: int, *, tokens: int, length: int, device: Device | None = None) -> dict:
    """Memory and time of a training step per device under FSDP2 with activation checkpointing.

    Weights and gradients are sent as bfloat16 during computation, so a step takes the longer of both times.

    Args:
        config ([`FlashLiteConfig`]): of a decoder.
        devices (`int`): over which weights, gradients and optimizer state are sharded.
        tokens (`int`): per device and step.
        length (`int`): of a text.
        device ([`Device`], *optional*): by default 80 GB, 989 TFLOP/s.
    """
    device, c = device or Device(), config.get_text_config(decoder=True)
    parameters = count_decoder_parameters(config)
    layer = (parameters - c.vocab_size * c.hidden_size) / c.num_hidden_layers
    states = tokens * c.hidden_size * NARROW
    # inputs of all layers, about 12 tensors within the current layer, and the float32 loss chunk of 8 MiB
    memory = {
        "parameters": WIDE * parameters / devices,
        "gradients": WIDE * parameters / devices,
        "optimizer": 2 * WIDE * parameters / devices,
        "gathered": NARROW * (2 * layer + c.vocab_size * c.hidden_size) * (1 if devices > 1 else 0),
        "activations": c.num_hidden_layers * states + 12 * states + 2**23,
    }
    sent = communication(NARROW * parameters, devices, "fsdp", kept=NARROW * c.vocab_size * c.hidden_size)
    speed = device.inside if devices <= device.node else device.outside
    compute = training_flops(config, length) * tokens / (device.flops * device.utilisation)
    seconds = max(compute, sent / speed)
    total = sum(memory.values())
    return {
        "devices": devices,
        **{f"{name}_GB": round(size / 1e9, 3) for name, size in memory.items()},
        "memory_GB": round(total / 1e9, 2),
        "fits": total < 0.9 * device.memory,
        "sent_GB": round(sent / 1e9, 2),
        "compute_s": round(compute, 3),
        "communication_s": round(sent / speed, 3),
        "tokens_per_s": round(devices * tokens / seconds),
        # 20 tokens per parameter
        "days": round(20 * parameters / (devices * tokens / seconds) / 86400, 2),
    }
