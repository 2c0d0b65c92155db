# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""ONNX: an encoder graph, a decoder graph with its cache, and a generator that runs them (needs the `export` extra).

The decoder graph holds the cache as plain tensors of `max_length` slots. It attends by the model's own definition of
multi-axis attention, so it is exact at every length up to there, and costs `max_length` per token however short the
text is: it is for running anywhere, not for running fast.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ..cache_flashlite import axis_spec
from ..compat_flashlite import CACHE
from ..layers_flashlite import DecoderContext, FlashLiteAttention
from ..modeling_flashlite import FlashLiteForCausalLM, FlashLiteForConditionalGeneration
from ..positions_flashlite import LENGTH_ROPES, layer_angles, shift_angles


class ExportError(ValueError):
    """This checkpoint cannot be exported; the message says why."""


class EncoderGraph(nn.Module):
    """Source tokens and mask `[B, S]` -> states `[B, S, D]`, keys and values `[layers, B, M, S, H]`."""

    def __init__(self, model: FlashLiteForConditionalGeneration):
        super().__init__()
        self.encoder, self.decoder = model.model.encoder, model.model.decoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
        all_angles = layer_angles(self.decoder.config, positions, states.dtype)
        pairs = [layer.self_attn.keys_values(states, angles) for layer, angles in zip(self.decoder.layers, all_angles)]
        return states, torch.stack([key for key, _ in pairs]), torch.stack([value for _, value in pairs])


class DecoderGraph(nn.Module):
    """New tokens `[B, T]` at slots `position [B]` on -> logits `[B, T, V]` and the cache with them written in.

    Keys and values are `[layers, B, M, max_length, H]`. A row's tokens stand from slot 0 on without gaps; what a row
    holds behind its last token is never seen, so shorter rows of a prompt are padded on the right. The model's own
    layers run, over a [`SlotContext`].
    """

    def __init__(self, model: FlashLiteForCausalLM | FlashLiteForConditionalGeneration):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position, keys, values, encoder_keys=None, encoder_values=None, encoder_mask=None):
        decoder = self.model.model.decoder
        states = decoder.embed(decoder.embed_tokens(input_ids))
        slots = position[:, None] + torch.arange(input_ids.shape[1], device=input_ids.device)
        context = SlotContext(slots, keys, values)
        if encoder_mask is not None:
            context.encoder = encoder_keys, encoder_values, encoder_mask.bool()
        if (spec := axis_spec(decoder.config)).memory_blocks is not None:
            context.shift_angles = shift_angles(decoder.config, slots, spec, states.dtype)
        with _by_definition(decoder.config):
            states = decoder.run_layers(states, None, layer_angles(decoder.config, slots, states.dtype), context)
        _, logits = self.model.loss_and_logits(states, None, 0, {}, {})
        return logits, torch.stack(context.new_keys), torch.stack(context.new_values)


class SlotContext(DecoderContext):
    """What the decoder's layers read and write, as plain tensors of a graph.

    Args:
        slots: slots `[B, T]` of the new tokens.
        keys, values: the cache of all layers, `[layers, B, M, max_length, H]`.
    """

    def __init__(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor):
        super().__init__()
        self.slots, self.keys, self.values = slots, keys, values
        self.encoder: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        self.new_keys: list[torch.Tensor] = []
        self.new_values: list[torch.Tensor] = []

    def extend(self, layer_idx: int, key: torch.Tensor, value: torch.Tensor):
        """All slots of a layer, the new ones written; the slot of each row's first new token; no summaries."""
        self.new_keys.append(_write(self.keys[layer_idx], key, self.slots))
        self.new_values.append(_write(self.values[layer_idx], value, self.slots))
        return self.new_keys[-1], self.new_values[-1], self.slots[:, 0], None

    def encoder_keys(self, attention: FlashLiteAttention, states: torch.Tensor | None):
        """Keys and values of the encoder, inputs of the graph, and their mask; `None` without an encoder."""
        if self.encoder is None:
            return None
        keys, values, mask = self.encoder
        return keys[attention.layer_idx], values[attention.layer_idx], mask


@contextlib.contextmanager
def _by_definition(config):
    """Attend by the reference, whose operations do not depend on values, as a graph demands."""
    chosen, config._attn_implementation = config._attn_implementation, "eager"
    try:
        yield
    finally:
        config._attn_implementation = chosen


def _write(buffer: torch.Tensor, new: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Put `[B, M, T, H]` into the slots `[B, T]` of `[B, M, max_length, H]`."""
    return buffer.scatter(2, slots[:, None, :, None].expand_as(new), new)


def check_exportable(model, max_length: int) -> None:
    """Raise `ExportError` for what a graph cannot express."""
    if not isinstance(model, (FlashLiteForCausalLM, FlashLiteForConditionalGeneration)):
        raise ExportError(f"{type(model).__name__} has no export; only the two language-model heads have one.")
    if getattr(model, "is_quantized", False):
        raise ExportError(
            "ONNX has no operator for entropy-coded weights; call model.dequantize() first and export the float model."
        )
    rope = dict(model.model.decoder.config.rope_parameters or {})
    if rope.get("rope_type") in LENGTH_ROPES:
        raise ExportError(f"rope_type {rope['rope_type']} depends on the length, which a graph cannot; use another.")
    block = model.model.decoder.config.block_size
    if max_length < block or max_length % block:
        raise ExportError(f"max_length is {max_length}, it must be a positive multiple of block_size = {block}.")


def cache_shapes(model, max_length: int, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of the decoder graph's keys and values."""
    config = model.model.decoder.config
    outer = (config.num_hidden_layers, batch, config.num_key_value_heads, max_length)
    return (*outer, config.key_dim), (*outer, config.head_dim)


def export_onnx(model, folder: str | Path, max_length: int = 512) -> list[Path]:
    """Write `decoder.onnx`, for an encoder-decoder `encoder.onnx`, and their description into a folder.

    The description is `onnx_config.json` (shapes and special tokens, all that [`OnnxGenerator`] reads), and the
    `config.json` and `generation_config.json` of the model.

    Args:
        model: a language-model head, in float; put into evaluation mode.
        folder (`str` or `Path`): made if needed.
        max_length (`int`, *optional*, defaults to 512): slots of the cache, a multiple of `block_size`.

    Returns:
        `list[Path]`: the files.

    Raises:
        ExportError: with the reason.
    """
    check_exportable(model, max_length)
    model, folder = model.float().eval(), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    batch, tokens, source = (torch.export.Dim(name, min=1) for name in ("batch", "tokens", "source"))
    ids, position = torch.ones(2, 3, dtype=torch.long), torch.zeros(2, dtype=torch.long)
    keys, values = (torch.zeros(shape) for shape in cache_shapes(model, max_length, 2))
    inputs = {"input_ids": ids, "position": position, "keys": keys, "values": values}
    dynamic = {"input_ids": {0: batch, 1: tokens}, "position": {0: batch}, "keys": {1: batch}, "values": {1: batch}}
    files = [folder / "decoder.onnx", folder / "onnx_config.json"]
    if isinstance(model, FlashLiteForConditionalGeneration):
        mask = torch.ones(2, 5, dtype=torch.long)
        encoder_ids = torch.ones(2, 5, dtype=torch.long)
        files.insert(0, folder / "encoder.onnx")
        with torch.no_grad():
            graph = EncoderGraph(model)
            _, cross_keys, cross_values = graph(encoder_ids, mask)
        outputs = ["last_hidden_state", "encoder_keys", "encoder_values"]
        shapes = {"input_ids": {0: batch, 1: source}, "attention_mask": {0: batch, 1: source}}
        _export(graph, {"input_ids": encoder_ids, "attention_mask": mask}, shapes, outputs, files[0])
        inputs |= {"encoder_keys": cross_keys, "encoder_values": cross_values, "encoder_mask": mask}
        dynamic |= {name: {1: batch, 3: source} for name in ("encoder_keys", "encoder_values")}
        dynamic["encoder_mask"] = {0: batch, 1: source}
    _export(DecoderGraph(model), inputs, dynamic, ["logits", "new_keys", "new_values"], files[-2])
    key_shape, value_shape = cache_shapes(model, max_length, 0)
    ends = model.generation_config.eos_token_id
    description = {
        "is_encoder_decoder": model.config.is_encoder_decoder,
        "keys": key_shape,
        "values": value_shape,
        "decoder_start_token_id": model.generation_config.decoder_start_token_id
        if model.generation_config.decoder_start_token_id is not None
        else model.config.decoder_start_token_id,
        "eos_token_id": ends if isinstance(ends, list) else [] if ends is None else [ends],
        "pad_token_id": model.generation_config.pad_token_id or 0,
    }
    files[-1].write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    model.config.to_json_file(folder / "config.json")
    model.generation_config.save_pretrained(folder)
    return [*files, folder / "config.json", folder / "generation_config.json"]


def quantize_weights(path: str | Path, block_size: int = 32) -> None:
    """Round the matrices of an exported graph to 8 bits in place, with a scale for each block of a column.

    ONNX Runtime's `MatMulNBits`, rounding to nearest. The embedding table and the norms stay as they are.

    Args:
        path (`str` or `Path`): a graph that [`export_onnx`] wrote.
        block_size (`int`, *optional*, defaults to 32): elements that share a scale, a power of 2 from 16.

    Raises:
        ExportError: the graph has no matrix that could be rounded.
    """
    import onnx
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    graph = onnx.load(str(path))
    before = _rounded(graph)
    quantizer = MatMulNBitsQuantizer(graph, bits=8, block_size=block_size, is_symmetric=True)
    quantizer.process()
    if _rounded(quantizer.model.model) == before:
        raise ExportError(f"{path} has no matrix product with constant weights that are float; export it anew.")
    partial = Path(path).with_suffix(".incomplete")
    quantizer.model.save_model_to_file(str(partial), use_external_data_format=False)
    partial.replace(path)


def _rounded(graph) -> int:
    return sum(node.op_type == "MatMulNBits" for node in graph.graph.node)


def _export(graph: nn.Module, inputs: dict, dynamic: dict, outputs: list[str], path: Path) -> None:
    with torch.no_grad():
        program = torch.onnx.export(
            graph.eval(),
            kwargs=inputs,
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=dynamic,
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():  # Python stack traces, which name paths of this machine
        node.metadata_props.clear()
    program.save(str(path))


def measure_parity(model, folder: str | Path, steps: int = 8, seed: int = 0) -> dict[str, float]:
    """Compare an exported folder with the model: two prompts of different length, then token by token.

    Args:
        model: the model that was exported.
        folder (`str` or `Path`): what `export_onnx` wrote.
        steps (`int`, *optional*, defaults to 8): decoded tokens after the prompt.
        seed (`int`, *optional*, defaults to 0): of the random prompts.

    Returns:
        `dict`: largest absolute differences `encoder` (where there is one), `prompt` and `step` of states and logits,
        and `generate`, the share of equal tokens in greedy generation.
    """
    runner, random = OnnxGenerator(folder), np.random.default_rng(seed)
    vocabulary, slots = model.config.get_text_config(decoder=True).vocab_size, runner.config["keys"][3]
    lengths = np.array([slots - steps, max(1, (slots - steps) // 2)])
    ids = random.integers(0, vocabulary, (2, lengths[0]))
    mask = (np.arange(lengths[0]) < lengths[:, None]).astype(np.int64)
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    found = {}
    with torch.no_grad():
        if runner.encoder is not None:
            states = model.model.encoder(**inputs).last_hidden_state
            fixed = runner.encode(ids, mask)
            found["encoder"] = float(np.abs(runner.states - states.numpy())[mask.astype(bool)].max())
            prompt, width = random.integers(0, vocabulary, (2, slots - steps)), np.array([slots - steps] * 2)
            inputs["decoder_input_ids"] = torch.tensor(prompt)
        else:
            prompt, width, fixed = ids, lengths, {}
        outputs = model(**inputs, use_cache=True)
        logits, cache = runner.step(prompt, np.zeros(2, np.int64), runner.new_cache(2), fixed)
        real = np.arange(prompt.shape[1]) < width[:, None]
        found["prompt"] = float(np.abs(logits - outputs.logits.numpy())[real].max())
        found["step"] = 0.0
        past, position, tokens = outputs.past_key_values, width, random.integers(0, vocabulary, (steps, 2, 1))
        for token in tokens:
            if runner.encoder is not None:
                inputs["decoder_input_ids"] = torch.tensor(token)
            else:
                grown = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
                inputs = {"input_ids": torch.tensor(token), "attention_mask": grown}
            outputs = model(**inputs, **{CACHE: past}, use_cache=True)
            logits, cache = runner.step(token, position, cache, fixed)
            found["step"] = max(found["step"], float(np.abs(logits - outputs.logits.numpy()).max()))
            past, position = outputs.past_key_values, position + 1
    found["generate"] = _generation_agreement(model, runner, ids[:1, : max(1, slots // 2)], min(steps, slots // 2 - 1))
    return found


def _generation_agreement(model, runner: "OnnxGenerator", ids: np.ndarray, new_tokens: int) -> float:
    expected = model.generate(torch.tensor(ids), max_new_tokens=new_tokens, do_sample=False, num_beams=1)
    expected = expected[:, 1 if runner.encoder is not None else ids.shape[1] :].numpy()
    tokens = runner.generate(ids, max_new_tokens=new_tokens)
    return float((tokens == expected).mean()) if tokens.shape == expected.shape else 0.0


class OnnxGenerator:
    """Greedy generation by ONNX Runtime from an exported folder; torch is not needed to run it.

    Args:
        folder (`str` or `Path`): what `export_onnx` wrote.
    """

    def __init__(self, folder: str | Path):
        import onnxruntime

        folder = Path(folder)
        self.config = json.loads((folder / "onnx_config.json").read_text(encoding="utf-8"))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3

        def load(name: str):
            return onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])

        self.decoder = load("decoder.onnx")
        self.encoder: Any = load("encoder.onnx") if self.config["is_encoder_decoder"] else None

    def generate(self, input_ids: np.ndarray, attention_mask: np.ndarray | None = None, max_new_tokens: int = 20):
        """Continue, or translate, each row; returns the new tokens `[B, at most max_new_tokens]`.

        Args:
            input_ids (`np.ndarray`): `[B, S]`; a decoder's prompts are padded on the right.
            attention_mask (`np.ndarray`, *optional*): `[B, S]`, 1 for real tokens.
            max_new_tokens (`int`, *optional*, defaults to 20): most new tokens.

        Raises:
            ValueError: the cache has too few slots.
        """
        mask = np.ones_like(input_ids) if attention_mask is None else attention_mask.astype(np.int64)
        batch, fixed = len(input_ids), {}
        if self.encoder is not None:
            fixed = self.encode(input_ids, mask)
            tokens, lengths = np.full((batch, 1), self.config["decoder_start_token_id"]), np.ones(batch, np.int64)
        else:
            tokens, lengths = input_ids, mask.sum(1)
        slots = self.config["keys"][3]
        if lengths.max() + max_new_tokens > slots:
            raise ValueError(
                f"{lengths.max()} tokens and {max_new_tokens} new ones need more than the {slots} slots of this "
                "export; export it with a larger max_length."
            )
        cache = self.new_cache(batch)
        new: list[np.ndarray] = []
        position, last, done = np.zeros(batch, np.int64), lengths - 1, np.zeros(batch, bool)
        while len(new) < max_new_tokens and not done.all():
            logits, cache = self.step(tokens, position, cache, fixed)
            chosen = logits[np.arange(batch), last].argmax(-1)
            chosen = np.where(done, self.config["pad_token_id"], chosen)
            new.append(chosen)
            done |= np.isin(chosen, self.config["eos_token_id"])
            position, last, tokens = position + last + 1, np.zeros(batch, np.int64), chosen[:, None]
        return np.stack(new, 1)

    def encode(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> dict[str, np.ndarray]:
        """Run the encoder; return what every decoder step reads of it, and keep the states."""
        self.states, keys, values = self.encoder.run(None, {"input_ids": input_ids, "attention_mask": attention_mask})
        return {"encoder_keys": keys, "encoder_values": values, "encoder_mask": attention_mask}

    def new_cache(self, batch: int) -> dict[str, np.ndarray]:
        """An empty cache."""
        shapes = {name: self.config[name] for name in ("keys", "values")}
        return {name: np.zeros((layers, batch, *rest), np.float32) for name, (layers, _, *rest) in shapes.items()}

    def step(self, tokens: np.ndarray, position: np.ndarray, cache: dict, fixed: dict) -> tuple[np.ndarray, dict]:
        """Feed `[B, T]` tokens from slots `position` on; return logits `[B, T, V]` and the cache after them."""
        inputs = {"input_ids": tokens.astype(np.int64), "position": position.astype(np.int64), **cache, **fixed}
        logits, keys, values = self.decoder.run(None, inputs)
        return logits, {"keys": keys, "values": values}
