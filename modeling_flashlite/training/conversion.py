# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Conversion of pre-trained decoders: the same tensors, bit for bit, under other names.

A converted model computes what its parent does while the axes cover the text, and reads longer texts sparsely. Weights
are read and checked one by one, so that memory holds them once. A folder is written whole or not at all.
"""

import contextlib
import copy
import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, snapshot_download
from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..configuration_flashlite import FlashLiteConfig, FlashLiteEncoderConfig
from ..modeling_flashlite import FlashLiteForCausalLM, FlashLiteForConditionalGeneration
from .families import FAMILIES, ConversionError, flashlite_config, parent_config, weight_names

# what a checkpoint consists of beside its weights, and the papers that travel with it
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
_PAPERS = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*", re.IGNORECASE)
_PICKLES = re.compile(r"(pytorch_model|model|consolidated)[\w.-]*\.(bin|pt|pth|ckpt)")
# buffers that old checkpoints hold
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq")


@dataclass
class Source:
    """A checkpoint to convert: its config, and its weights, read on demand.

    `shapes` gives the shape of every weight by its name, and `read` the weight itself. `folder` is `None` for a model
    in memory, `gguf` the name of a GGUF file in the folder.
    """

    name: str
    config: PreTrainedConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    generation_config: GenerationConfig | None = None
    folder: Path | None = None
    gguf: str | None = None

    @classmethod
    def of_flashlite(cls, folder: str, model: PreTrainedModel) -> "Source":
        """A Flash-Lite checkpoint, as the origin of what is made of it."""
        weights = model.state_dict()
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return cls(folder, model.config, shapes, weights.__getitem__, model.generation_config, Path(folder))

    def tokenizer(self):
        """The tokenizer of the checkpoint; `None` where it has none."""
        if self.folder is None or not (self.gguf or any(self.folder.glob("tokenizer*"))):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.folder, **({"gguf_file": self.gguf} if self.gguf else {}))
        except Exception as error:  # tokenizers raise whatever their files make them
            raise ConversionError(f"The tokenizer of {self.name} cannot be read: {_first_line(error)}") from error


def open_source(model: PreTrainedModel | str | Path, max_length: int | None = None) -> Source:
    """Find a checkpoint and refuse, before a weight is read, what cannot be converted.

    Args:
        model: a model in memory, a folder, a `.gguf` file, or a Hub id.
        max_length (`int`, *optional*): see [`convert`].

    Raises:
        ConversionError: with one sentence.
    """
    if isinstance(model, PreTrainedModel):
        flashlite_config(model.config, max_length)
        if type(model).__name__.removesuffix("ForCausalLM") == type(model).__name__:
            raise ConversionError(f"{type(model).__name__} has no language-model head; give the ...ForCausalLM.")
        weights = model.state_dict()
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return Source(
            getattr(model.config, "_name_or_path", "") or model.config.model_type,
            model.config,
            shapes,
            lambda name: weights[name].detach().clone(),
            model.generation_config,
        )
    path = Path(model)
    if path.suffix == ".gguf" and not path.is_file():
        raise ConversionError(f"There is no file {path}; give the path of a .gguf file.")
    if path.is_file():
        return _open_gguf(path, max_length)
    folder = path
    if not path.is_dir():
        config = _read_config(str(model))
        flashlite_config(config, max_length)
        try:
            folder = Path(snapshot_download(str(model), allow_patterns=_FILES))
        except Exception as error:
            raise ConversionError(f"{model} cannot be downloaded: {_first_line(error)}") from error
    config = _read_config(str(folder))
    flashlite_config(config, max_length)
    shapes, read = _open_safetensors(folder)
    generation = None
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    return Source(str(model), config, shapes, read, generation, folder)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _read_config(name: str, **kwargs) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except Exception as error:
        raise ConversionError(
            f"{name} has no config that can be read ({_first_line(error)}); give a folder with config.json, a .gguf "
            f"file or a Hub id of one of {', '.join(FAMILIES)}."
        ) from error


def _open_gguf(path: Path, max_length: int | None) -> Source:
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the reader of these files raises whatever it stumbles over
        raise ConversionError(f"{path} cannot be read as GGUF: {_first_line(error)}") from error
    flashlite_config(config, max_length)
    try:
        parent = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:
        raise ConversionError(f"{path} cannot be read: {_first_line(error)}") from error
    weights = {name: weight.detach() for name, weight in parent.state_dict().items()}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    return Source(str(path), config, shapes, weights.__getitem__, parent.generation_config, path.parent, path.name)


def _open_safetensors(folder: Path) -> tuple[dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    """Shapes of the weights in a folder, and a function that reads one and keeps no file open."""
    places, shapes = {}, {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  (it is no dict)
                    places[name] = file
                    shapes[name] = tuple(weights.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ConversionError(f"{file} cannot be read: {_first_line(error)}") from error

    def read(name: str) -> torch.Tensor:
        # a file is mapped for one weight at a time: pages that were read would count as memory
        with safe_open(places[name], "pt") as weights:
            return weights.get_tensor(name).clone()

    return shapes, read


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConversionError(f"{index} is no index of weights; download the checkpoint again.") from error
        for name in names:
            if Path(name).name != name or not (folder / name).is_file():
                raise ConversionError(
                    f"{name!r} is in the index of {folder}, but not in the folder; download it again."
                )
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    pickled = sorted(path.name for path in folder.iterdir() if _PICKLES.fullmatch(path.name))
    if pickled:
        raise ConversionError(
            f"{folder} has its weights as a pickle ({pickled[0]}), which runs code when it is read; load it where you "
            "trust it and save it again with save_pretrained."
        )
    raise ConversionError(f"{folder} has no weights; give a folder with model.safetensors.")


def convert(
    model: PreTrainedModel | str | Path,
    *,
    output: str | Path | None = None,
    max_length: int | None = None,
    **axes: Any,
) -> FlashLiteForCausalLM:
    """Convert a pre-trained decoder to Flash-Lite: the same weights, bit for bit, in their own types.

    While the axes cover the text (the first `(relevance_top_k + 3) * block_size` tokens) the converted model computes
    what its parent computes; longer texts are read sparsely.

    Args:
        model (`PreTrainedModel`, `str` or `Path`): a model in memory, a folder, a `.gguf` file (dequantized to
            float32), or a Hub id. Families: Llama, Mistral, Qwen2, Qwen3, SmolLM3, Granite, OLMo 2, Gemma 3 (text).
        output (`str` or `Path`, *optional*): folder for the converted checkpoint with tokenizer, chat template,
            generation settings and a card; it must not exist, or be empty.
        max_length (`int`, *optional*): tokens of the longest text that the model is meant for;
            `max_position_embeddings` if unset.
        **axes: fields of the sparse attention (`relevance_top_k`, `memory_blocks`, `block_size`, ...); by default
            chosen from the length that the parent was trained for, see [`families.default_axes`].

    Returns:
        [`FlashLiteForCausalLM`]: with the parent's generation settings, in evaluation mode.

    Raises:
        ConversionError: a family or a feature that cannot be converted; missing, extra, misshapen, pickled or damaged
            weights; a folder that is in the way. Nothing is left half-written.
    """
    if output is not None:
        check_output(output)
    source = open_source(model, max_length)
    converted = transplant(source, max_length, **axes)
    if output is not None:
        write_checkpoint(converted, source, output)
    return converted


def transplant(source: Source, max_length: int | None = None, **axes: Any) -> FlashLiteForCausalLM:
    """The Flash-Lite model with the weights of a source; see [`convert`]."""
    config = flashlite_config(source.config, max_length, **axes)
    names = weight_names(source.config)
    with torch.device("meta"):
        model = FlashLiteForCausalLM(config)
    places = _check_names(source, names, {name: tuple(x.shape) for name, x in model.state_dict().items()})
    weights = {}
    for theirs, ours in tqdm(places.items(), desc="weights", unit="tensor"):
        weights[ours] = _read(source, theirs)
    if source.config.tie_word_embeddings:
        table = weights["model.decoder.embed_tokens.weight"]
        head = weights.setdefault("lm_head.weight", table)
        if head is not table and not torch.equal(head, table):
            raise ConversionError(
                f"`tie_word_embeddings` is True in {source.name}, but lm_head.weight differs from the embeddings; set "
                "it to False in config.json."
            )
        weights["lm_head.weight"] = table
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    model.config.dtype = weights["model.decoder.embed_tokens.weight"].dtype
    if source.generation_config is not None:
        model.generation_config = source.generation_config
    return model.eval()


def _read(source: Source, name: str) -> torch.Tensor:
    try:
        weight = source.read(name)
    except (SafetensorError, OSError) as error:
        raise ConversionError(f"{name} of {source.name} cannot be read: {_first_line(error)}") from error
    if not weight.is_floating_point():
        raise ConversionError(f"{name} of {source.name} is {weight.dtype}, but weights are floating-point numbers.")
    if not torch.isfinite(weight).all():
        raise ConversionError(f"{name} of {source.name} holds NaN or infinity; the checkpoint is damaged.")
    return weight


def _check_names(source: Source, names: dict[str, str], shapes: dict[str, tuple]) -> dict[str, str]:
    """Which weights to read and their names here; refuse missing, extra and misshapen ones."""
    optional = {"lm_head.weight"} if source.config.tie_word_embeddings else set()
    there = {name for name in source.shapes if not _IGNORED.fullmatch(name)}
    missing, extra = sorted(set(names) - there - optional), sorted(there - set(names))
    if missing or extra:
        what, name = ("lacks", missing[0]) if missing else ("has the unknown weight", extra[0])
        count = len(missing or extra)
        others = f" and {count - 1} more" if count > 1 else ""
        raise ConversionError(f"{source.name} {what} {name}{others}; its config does not describe its weights.")
    for theirs in names:
        if theirs in there and source.shapes[theirs] != shapes[names[theirs]]:
            raise ConversionError(
                f"{theirs} of {source.name} is {list(source.shapes[theirs])}, but its config says "
                f"{list(shapes[names[theirs]])}; one of them is wrong."
            )
    return {theirs: ours for theirs, ours in names.items() if theirs in there}


def parent_of(model: FlashLiteForCausalLM, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of the parent's class with the same tensors as a converted one: one change changes both."""
    weights = model.state_dict()
    with torch.device("meta"):
        parent = AutoModelForCausalLM.from_config(config)
    names = weight_names(config)
    if missing := sorted(set(weights) - set(names.values())):
        raise ConversionError(f"{config.model_type} has no place for {missing[0]}.")
    parent.load_state_dict({theirs: weights[ours] for theirs, ours in names.items()}, assign=True)
    parent.tie_weights()
    return _with_buffers(parent).eval()


def _with_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """Make the buffers of a model that was built without memory: they follow from its config."""
    with torch.device("cpu"):
        for name, module in list(model.named_modules()):
            if type(module).__name__.endswith("RotaryEmbedding"):
                model.set_submodule(name, type(module)(model.config))
            elif hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.nn.Buffer(torch.tensor(module.scalar_embed_scale), persistent=False)
    return model


def convert_back(model: FlashLiteForCausalLM, model_type: str = "llama") -> PreTrainedModel:
    """The model of another family that computes what this one does with full attention, sharing its tensors.

    Raises:
        ConversionError: where that family cannot express the model; the message names the field.
    """
    parent = parent_of(model, parent_config(model.config, model_type))
    parent.config.dtype = model.config.dtype
    parent.generation_config = model.generation_config
    return parent


def to_encoder_decoder(model: FlashLiteForCausalLM) -> FlashLiteForConditionalGeneration:
    """An encoder-decoder from a decoder, without a new weight: the layout of T5Gemma 2 (arXiv 2512.14856).

    The encoder has the decoder's weights and reads in both directions; the decoder reads the encoder's states through
    its own projections in its one softmax. The embeddings are one table.

    Args:
        model ([`FlashLiteForCausalLM`]): a decoder, whose tensors the new decoder takes over.

    Returns:
        [`FlashLiteForConditionalGeneration`]: in evaluation mode, to be adapted.
    """
    config = copy.deepcopy(model.config)
    stack = config.decoder.to_dict()
    shared = {name: stack[name] for name in FlashLiteEncoderConfig.__dataclass_fields__ if name in stack}
    fresh = FlashLiteConfig(
        encoder={**shared, "is_decoder": False},
        decoder=config.decoder,
        is_encoder_decoder=True,
        tie_word_embeddings=config.tie_word_embeddings,
        decoder_start_token_id=_start_token(config.decoder),
    )
    with torch.device("meta"):
        new = FlashLiteForConditionalGeneration(fresh)
    weights = model.state_dict()
    for name in list(weights):
        if name.startswith("model.decoder.") and ".decoder.embed_tokens." not in name:
            weights[name.replace("model.decoder.", "model.encoder.", 1)] = weights[name].clone()
    # tied below, or the encoder's own where the head has a table of its own
    weights["model.encoder.embed_tokens.weight"] = weights["model.decoder.embed_tokens.weight"]
    new.load_state_dict(weights, assign=True)
    new.tie_weights()
    new.config.dtype = model.config.dtype
    new.generation_config = GenerationConfig.from_model_config(new.config)
    new.generation_config.eos_token_id = model.generation_config.eos_token_id
    return new.eval()


def _start_token(config) -> int | None:
    """What a decoder's text begins with: the first of the special tokens that there is."""
    end = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    return next((token for token in (config.bos_token_id, config.pad_token_id, end) if token is not None), None)


def check_output(output: str | Path) -> Path:
    """Refuse a folder that is in the way."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} is there already; remove it, or give another folder.")
    return output


@contextlib.contextmanager
def staged(output: str | Path) -> Iterator[Path]:
    """A folder beside `output` that takes its name at the end; it vanishes if anything goes wrong."""
    output = check_output(output)
    staging = output.parent / f".{output.name}.incomplete"
    shutil.rmtree(staging, ignore_errors=True)  # left over from a run that was killed
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.replace(output)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{output} cannot be written: {_first_line(error)}; nothing was kept of it.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_checkpoint(model: PreTrainedModel, source: Source, output: str | Path) -> None:
    """Write a converted model with what belongs to its parent: tokenizer, licence, and a card that names it."""
    with staged(output) as folder:
        model.save_pretrained(folder)
        tokenizer = source.tokenizer()
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        for path in sorted(source.folder.iterdir()) if source.folder else ():
            if path.is_file() and _PAPERS.fullmatch(path.name):
                shutil.copyfile(path, folder / path.name)
        (folder / "README.md").write_text(make_card(model, source), encoding="utf-8")


_CARD = """---
{head}
---

# {title}

{parent} as a Flash-Lite model: the same weights, bit for bit, with attention that is full up to {dense:,} tokens and
sparse beyond.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("{title}")
model = AutoModelForCausalLM.from_pretrained("{title}", trust_remote_code=True)
```

Licence: {license}. It is the parent's, whose card says what the model was trained on, what it is for and what not.
"""


_PLAIN_CARD = """---
{head}
---

# {title}

{parent} as {what}, with the same weights.

Licence: {license}. It is the parent's, whose card says what the model was trained on, what it is for and what not.
"""


def parent_facts(source: Source) -> dict[str, Any]:
    """Name, licence, languages of a parent, from its card or from its GGUF file; `unknown` where it says nothing."""
    facts: dict[str, Any] = {"name": source.name, "license": "unknown", "language": None}
    if source.folder and source.gguf:
        facts |= _gguf_facts(source.folder / source.gguf)
    elif source.folder and (source.folder / "README.md").is_file():
        with contextlib.suppress(Exception):  # a card that cannot be read says nothing
            data = ModelCard.load(source.folder / "README.md").data
            facts |= {"license": data.license or "unknown", "language": data.language}
    if Path(facts["name"]).exists():
        facts["name"] = Path(facts["name"]).resolve().stem if source.gguf else Path(facts["name"]).resolve().name
    return facts


def _gguf_facts(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    keys = {"name": "general.base_model.0.name", "license": "general.license"}
    return {name: str(fields[key].contents()) for name, key in keys.items() if key in fields}


def make_card(model: PreTrainedModel, source: Source) -> str:
    """The text of README.md."""
    facts = parent_facts(source)
    head = [f"license: {facts['license']}", f"base_model: {facts['name']}", "library_name: transformers"]
    head += ["pipeline_tag: text-generation", "tags: [flashlite]"]
    if facts["language"]:
        head.append(f"language: {json.dumps(facts['language'])}")
    title = f"{Path(facts['name']).name}-flashlite"
    if model.config.model_type != "flashlite" or model.config.is_encoder_decoder:
        what = "an encoder-decoder" if model.config.is_encoder_decoder else model.config.model_type
        return _PLAIN_CARD.format(
            head="\n".join(head), title=title, parent=facts["name"], what=what, license=facts["license"]
        )
    dense = dense_length(model.config)
    return _CARD.format(head="\n".join(head), title=title, parent=facts["name"], dense=dense, license=facts["license"])


def dense_length(config: FlashLiteConfig) -> int:
    """Tokens up to which attention is full; longer texts are read sparsely."""
    reach = [value + 3 for value in (config.relevance_top_k,) if value is not None]
    reach += [max(value, 1) + 2 for value in (config.memory_blocks,) if value is not None]
    return min(reach) * config.block_size if reach else config.max_position_embeddings


@torch.inference_mode()
def logit_parity(model: PreTrainedModel, parent: PreTrainedModel, ids: torch.Tensor) -> dict[str, float]:
    """How far the logits of two models on ids `[1, T]` are apart.

    Returns:
        `dict` with the largest difference; the same with PyTorch's own products in both, where [`Linear`] takes
        others (they round in another order); the largest logit; and how often both choose the same token.
    """
    ours, theirs = (x(ids, use_cache=False).logits.float() for x in (model, parent))
    with torch.backends.mkldnn.flags(enabled=False):
        plain = model(ids, use_cache=False).logits.float()
    return {
        "tokens": ids.shape[1],
        "largest_difference": float((ours - theirs).abs().max()),
        "with_plain_products": float((plain - theirs).abs().max()),
        "largest_logit": float(theirs.abs().max()),
        "same_choice": float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
    }


@torch.inference_mode()
def perplexities(model: FlashLiteForCausalLM, ids: torch.Tensor) -> dict[str, float]:
    """Perplexity of `ids[0, 1:]`, read in one pass: with full attention, and as the model is."""
    with full_attention(model):
        dense = perplexity(model, ids)
    return {"tokens": ids.shape[1], "dense": dense, "sparse": perplexity(model, ids)}


@torch.inference_mode()
def perplexity(model: FlashLiteForCausalLM, ids: torch.Tensor) -> float:
    """Perplexity of `ids[0, 1:]`, each token read after all before it, in one pass."""
    states, total = model.model(ids, use_cache=False).last_hidden_state[0, :-1], 0.0
    for part, targets in zip(states.split(256), ids[0, 1:].split(256)):  # logits of few tokens at a time
        logits = model.lm_head(part / model.config.decoder.logits_scaling)
        total += float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
    return math.exp(total / (ids.shape[1] - 1))


@contextlib.contextmanager
def full_attention(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """Inside the context, every token of the model reads all before it."""
    attentions = [layer.self_attn for layer in model.get_decoder().layers]
    specs = [attention.spec for attention in attentions]
    for attention in attentions:
        attention.spec = dataclasses.replace(attention.spec, relevance_top_k=None, memory_blocks=None)
    try:
        yield model
    finally:
        for attention, spec in zip(attentions, specs):
            attention.spec = spec
