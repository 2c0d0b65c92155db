# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""The checkpoint that a conversion starts from: checked before any weight is read, then read weight by weight."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from .families import FAMILIES, ConversionError, flashlite_config, one_line

# the files of a checkpoint that a conversion needs from the Hub
_FILES = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
_PICKLES = re.compile(r"(pytorch_model|model|consolidated)[\w.-]*\.(bin|pt|pth|ckpt)")


@dataclass
class Source:
    """A checkpoint to convert: its config, and its weights, read on demand.

    `shapes` maps each weight's name to its shape, and `read` loads one by name. `folder` is `None` for a model in
    memory; `gguf` is the name of a GGUF file in the folder.
    """

    name: str
    config: PreTrainedConfig
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], torch.Tensor]
    generation_config: GenerationConfig | None = None
    folder: Path | None = None
    gguf: str | None = None

    @classmethod
    def of_flashlite(cls, name: str, folder: Path, model: PreTrainedModel) -> "Source":
        """A Flash-Lite checkpoint as the source of a derived model."""
        weights = model.state_dict()
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return cls(name, model.config, shapes, weights.__getitem__, model.generation_config, folder)

    def tokenizer(self):
        """The tokenizer of the checkpoint; `None` where it has none."""
        if self.folder is None or not (self.gguf or any(self.folder.glob("tokenizer*"))):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.folder, **({"gguf_file": self.gguf} if self.gguf else {}))
        except Exception as error:  # damaged tokenizer files can raise any exception
            raise ConversionError(f"The tokenizer of {self.name} cannot be read: {one_line(error)}") from error


def local_folder(model: str | Path) -> Path:
    """The folder of a checkpoint; one on the Hub is downloaded."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), allow_patterns=_FILES))
    except Exception as error:
        raise ConversionError(f"{model} cannot be downloaded: {one_line(error)}") from error


def open_source(model: PreTrainedModel | str | Path, max_length: int | None = None) -> Source:
    """Find a checkpoint and check that it can be converted, before any weight is read.

    Args:
        model: a model in memory, a folder, a `.gguf` file, or a Hub id.
        max_length (`int`, *optional*): see [`convert`].

    Raises:
        ConversionError: the checkpoint cannot be converted; the message says why.
    """
    if isinstance(model, PreTrainedModel):
        flashlite_config(model.config, max_length)
        if type(model).__name__.removesuffix("ForCausalLM") == type(model).__name__:
            raise ConversionError(
                f"{type(model).__name__} has no language-model head; load it with AutoModelForCausalLM."
            )
        weights = model.state_dict()
        shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
        return Source(
            getattr(model.config, "_name_or_path", "") or model.config.model_type,
            model.config,
            shapes,
            lambda name: weights[name].detach().clone(),
            model.generation_config,
        )
    if not isinstance(model, (str, Path)):
        raise ConversionError(
            f"A {type(model).__name__} cannot be converted; merge adapters (merge_and_unload), and give a "
            "PreTrainedModel, a folder or a Hub id."
        )
    path = Path(model)
    if path.suffix == ".gguf" and not path.is_file():
        raise ConversionError(f"There is no file {path}; give the path of a .gguf file.")
    if path.is_file():
        return _open_gguf(path, max_length)
    if not path.is_dir():
        flashlite_config(_read_config(str(model)), max_length)
    folder = local_folder(model)
    config = _read_config(str(folder))
    flashlite_config(config, max_length)
    shapes, read = _open_safetensors(folder)
    generation = None
    if (folder / "generation_config.json").is_file():
        try:
            generation = GenerationConfig.from_pretrained(folder)
        except (OSError, ValueError, TypeError) as error:
            raise ConversionError(f"generation_config.json of {model} cannot be read: {one_line(error)}") from error
    return Source(str(model), config, shapes, read, generation, folder)


def _read_config(name: str, **kwargs) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except Exception as error:
        raise ConversionError(
            f"{name} has no config that can be read ({one_line(error)}); give a folder with config.json, a .gguf "
            f"file or a Hub id of one of {', '.join(FAMILIES)}."
        ) from error


def _open_gguf(path: Path, max_length: int | None) -> Source:
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the GGUF reader can raise any exception on damaged files
        raise ConversionError(f"{path} cannot be read as GGUF: {one_line(error)}") from error
    flashlite_config(config, max_length)
    try:
        parent = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    except Exception as error:
        raise ConversionError(f"{path} cannot be read: {one_line(error)}") from error
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
            raise ConversionError(f"{file} cannot be read: {one_line(error)}") from error

    def read(name: str) -> torch.Tensor:
        # a file is mapped for one weight at a time: pages that were read would count as memory
        with safe_open(places[name], "pt") as weights:
            return weights.get_tensor(name).clone()

    return shapes, read


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in places.values()})
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
