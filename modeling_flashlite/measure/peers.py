"""Peers in the benchmarks: models of equal shape with random weights, and 4-bit layers of other packages."""

import contextlib
import importlib.util
import io
import json
import subprocess
import tempfile
from collections.abc import Iterable, Sequence

import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    T5GemmaConfig,
    T5GemmaForConditionalGeneration,
    T5GemmaModuleConfig,
)

from ..configuration_flashlite import FlashLiteConfig
from ..modeling_flashlite import FlashLiteForCausalLM, FlashLiteForConditionalGeneration

__all__ = ["CTranslate2Bart", "four_bit_linear", "installed", "llama_bench", "make_models", "make_peer"]


def installed(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Split package names into installed and missing ones."""
    found = [name for name in names if importlib.util.find_spec(name) is not None]
    return found, [name for name in names if name not in found]


def make_models(names: Sequence[str], shape: tuple[int, int, int, int]) -> dict[str, torch.nn.Module]:
    """Models of equal width, depth, heads and vocabulary with random weights; all else is the family's default.

    The gated feed-forward networks of T5Gemma and Llama are 8/3 wide, which is as many parameters as BART's 4.

    Args:
        names: any of "BART", "T5Gemma", "Llama" and "Flash-Lite", which is decoder-only beside "Llama".
        shape: width, layers of each stack, heads, vocabulary.
    """
    width, layers, heads, vocabulary = shape
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    ours = {**tokens, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    gated = {
        **ours,
        "num_key_value_heads": heads // 2,
        "head_dim": width // heads,
        "intermediate_size": width * 8 // 3,
    }

    def bart():
        stacks = {
            f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", layers), ("attention_heads", heads))
        }
        ffn = {"encoder_ffn_dim": 4 * width, "decoder_ffn_dim": 4 * width, "dropout": 0.0}
        return BartForConditionalGeneration(
            BartConfig(**tokens, **stacks, **ffn, d_model=width, decoder_start_token_id=1, forced_eos_token_id=None)
        )

    def t5gemma():
        # without the soft cap of Gemma's logits, which SDPA cannot compute
        stack = T5GemmaModuleConfig(
            **gated, query_pre_attn_scalar=width // heads, attn_logit_softcapping=None, final_logit_softcapping=None
        )
        return T5GemmaForConditionalGeneration(
            T5GemmaConfig(encoder=stack, decoder=stack, **tokens, decoder_start_token_id=1, dropout_rate=0.0)
        )

    def ours_alone():
        return FlashLiteForCausalLM(FlashLiteConfig(**ours, is_encoder_decoder=False))

    make = {
        "BART": bart,
        "T5Gemma": t5gemma,
        "Llama": lambda: LlamaForCausalLM(LlamaConfig(**gated, tie_word_embeddings=True)),
        "Flash-Lite": ours_alone
        if "Llama" in names
        else lambda: FlashLiteForConditionalGeneration(FlashLiteConfig(**ours)),
    }
    return {name: make[name]() for name in names}


def make_peer(
    name: str, shape: tuple[int, int, int, int], parameters: int, dropout: float = 0.0
) -> BartForConditionalGeneration | T5ForConditionalGeneration:
    """A new encoder-decoder of transformers whose feed-forward width gives a number of parameters.

    Args:
        name: "BART", or "T5" (version 1.1, gated, with one table for encoder, decoder and head).
        shape: width, layers of each stack, heads, vocabulary.
        parameters: the target; the nearest feed-forward width is taken.
        dropout: rate, wherever the family applies it; T5 also within attention and feed-forward networks.

    Raises:
        ValueError: the rest of the model alone has more parameters.
    """
    width, layers, heads, vocabulary = shape
    tokens = {"vocab_size": vocabulary, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    shared = {**tokens, "d_model": width, "decoder_start_token_id": 1}
    both = {f"{s}_{k}": v for s in ("encoder", "decoder") for k, v in (("layers", layers), ("attention_heads", heads))}

    def make(ffn: int):
        if name == "BART":
            # learned positions: only as many as short sentences need
            own = {**both, "encoder_ffn_dim": ffn, "decoder_ffn_dim": ffn, "max_position_embeddings": 128}
            return BartForConditionalGeneration(BartConfig(**shared, **own, dropout=dropout, forced_eos_token_id=None))
        own = {"d_kv": width // heads, "d_ff": ffn, "num_layers": layers, "num_heads": heads}
        gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": True, "dropout_rate": dropout}
        return T5ForConditionalGeneration(T5Config(**shared, **own, **gated))

    with torch.device("meta"):
        few, many = (sum(parameter.numel() for parameter in make(ffn).parameters()) for ffn in (64, 128))
    ffn = round(64 + 64 * (parameters - few) / (many - few))
    if ffn < 1:
        raise ValueError(
            f"{name} of width {width} with {layers} layers has {few} parameters with a feed-forward network of 64, so "
            f"{parameters} leave none; lower its width."
        )
    return make(ffn)


class CTranslate2Bart:
    """BART in CTranslate2's format, converted by CTranslate2's own loader.

    Args:
        model (`BartForConditionalGeneration`): in float32.
        compute_type (`str`): "float32" or "int8".
        threads (`int`): per translation.
    """

    def __init__(self, model: BartForConditionalGeneration, compute_type: str, threads: int):
        import ctranslate2
        from ctranslate2.converters import transformers as converters

        self.tokens = [f"t{index}" for index in range(model.config.vocab_size)]
        # config fields that the converter reads and transformers 5 removed
        for name, value in (("normalize_before", False), ("normalize_embedding", True)):
            setattr(model.config, name, value)
        spec = converters._MODEL_LOADERS["BartConfig"].get_model_spec(model)
        spec.register_source_vocabulary(self.tokens)
        spec.register_target_vocabulary(self.tokens)
        config = model.config
        for name in ("bos_token", "eos_token", "decoder_start_token"):
            setattr(spec.config, name, self.tokens[getattr(config, f"{name}_id")])
        spec.config.unk_token = self.tokens[config.eos_token_id + 1]
        spec.validate()
        spec.optimize(quantization=None)
        with tempfile.TemporaryDirectory() as folder:
            spec.save(folder)
            self.translator = ctranslate2.Translator(
                folder, device="cpu", compute_type=compute_type, intra_threads=threads, inter_threads=1
            )

    def greedy(self, ids: torch.Tensor, new_tokens: int) -> list[list[str]]:
        """Exactly `new_tokens` tokens for each row of `ids`."""
        rows = [[self.tokens[index] for index in row] for row in ids.tolist()]
        length = {"min_decoding_length": new_tokens, "max_decoding_length": new_tokens}
        results = self.translator.translate_batch(rows, beam_size=1, max_batch_size=0, **length)
        return [result.hypotheses[0] for result in results]


def four_bit_linear(package: str, linear: torch.nn.Linear, dtype: torch.dtype) -> torch.nn.Module:
    """A copy of `linear` with 4-bit weights by `package`, "torchao" (groups of 128) or "bitsandbytes" (NF4)."""
    weight = linear.weight.detach().to(dtype)
    # on import, both packages print messages about missing device kernels
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        if package == "torchao":
            from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

            copy = torch.nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=dtype)
            coded = Int4OpaqueTensor.from_hp(weight, [1, 128])
            copy.weight = torch.nn.Parameter(coded, requires_grad=False)
            return copy
        from bitsandbytes.nn import Linear4bit

        copy = Linear4bit(linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4")
        copy.load_state_dict({"weight": weight})
        return copy.to("cpu")


def llama_bench(
    binary: str, gguf: str, threads: int, *, prompt: int = 0, new: int = 0, depth: int = 0, repeats: int = 1
) -> list[float]:
    """Seconds per repetition of llama.cpp's `llama-bench`, which reads or generates tokens.

    Args:
        binary (`str`): the program.
        gguf (`str`): the model.
        threads (`int`): of llama.cpp.
        prompt, new (`int`): tokens to read, or to generate; one of them.
        depth (`int`): tokens that are in the cache already.
        repeats (`int`): repetitions; the tokens of `depth` are read once for all of them.

    Raises:
        RuntimeError: the program fails, e.g. with an illegal instruction if it was built for another processor.
    """
    sizes = {"-t": threads, "-p": prompt, "-n": new, "-d": depth, "-r": repeats}
    options = [word for name, value in sizes.items() for word in (name, str(value))]
    done = subprocess.run([binary, "-m", gguf, *options, "-o", "json"], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip()[-300:]
        raise RuntimeError(f"{binary} ended with code {done.returncode} ({reason}); build it for this processor.")
    (result,) = json.loads(done.stdout)
    return [nanoseconds / 1e9 for nanoseconds in result["samples_ns"]]
