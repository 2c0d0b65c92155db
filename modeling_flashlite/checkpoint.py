"""Naming and loading of checkpoints by scripts: a model or an adapter, from a folder or the Hub, and its tokenizer."""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import GENERATION_CONFIG_NAME, cached_file, find_adapter_config_file

from .data.tasks import LANGUAGE_MODELS, Task

__all__ = [
    "BASE_CONFIG",
    "CheckpointArgs",
    "add_adapter",
    "is_adapter",
    "load_for_task",
    "load_language_model",
    "load_merged",
    "read_config",
    "read_tokenizer",
]

# saved beside the adapter of a classifier: its base's config with the classes of the adapter's head. Named
# config.json, it would make the folder look like a model
BASE_CONFIG = "base_config.json"


@dataclass
class CheckpointArgs:
    """Options of every script that loads a checkpoint."""

    model: str = field(metadata={"help": "folder or Hub id of a model or of an adapter"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit on the Hub"})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run the code of the repository; Flash-Lite checkpoints do not need it here"}
    )
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16 or float16"})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; the accelerator if there is one"})

    @property
    def hub(self) -> dict:
        """Keyword arguments of every `from_pretrained`."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


def base_of(model: str, **hub) -> tuple[str, dict]:
    """The checkpoint with the config, and its keyword arguments: the base of an adapter, else the model itself.

    Args:
        model (`str`): folder or Hub id.
        **hub: `revision` and `trust_remote_code`; the revision is the adapter's and does not apply to its base.
    """
    if (Path(model) / "config.json").is_file():
        return model, hub
    adapter = find_adapter_config_file(model, revision=hub.get("revision"))
    if adapter is None:
        return model, hub
    content = json.loads(Path(adapter).read_text(encoding="utf-8"))
    base, revision = content.get("base_model_name_or_path"), content.get("revision")
    if not base:
        raise ValueError(f"{adapter} has no base_model_name_or_path; add the folder or Hub id of the base.")
    return base, {**hub, "revision": revision}


def is_adapter(model: str, **hub) -> bool:
    """Whether a folder or Hub id holds an adapter."""
    return base_of(model, **hub)[0] != model


def read_config(model: str, **hub) -> PretrainedConfig:
    """Configuration of a model, or of the base of an adapter, with the classes of the adapter's own head."""
    base, base_hub = base_of(model, **hub)
    if base != model and _has(model, BASE_CONFIG, hub):
        return AutoConfig.from_pretrained(model, _configuration_file=BASE_CONFIG, **hub)
    hub = base_hub
    return AutoConfig.from_pretrained(base, **hub)


def read_tokenizer(model: str, **hub) -> PreTrainedTokenizerBase:
    """Tokenizer of a checkpoint; an adapter without one uses its base's.

    Where there is no pad token, the end of sequence pads: masks and labels tell it from a real one.
    """
    base, base_hub = base_of(model, **hub)
    if base != model and not _has(model, "tokenizer_config.json", hub):
        model, hub = base, base_hub
    tokenizer = AutoTokenizer.from_pretrained(model, **hub)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _has(model: str, name: str, hub: dict) -> bool:
    missing_ok = {"_raise_exceptions_for_missing_entries": False, "revision": hub.get("revision")}
    return cached_file(model, name, **missing_ok) is not None


def load_merged(auto, model: str, changes: dict, **hub) -> PreTrainedModel:
    """Load a model whose weights will be trained, quantized or cut: an adapter is merged into those of its base.

    A coded base becomes a float model, since no adapter can be added to codes.

    Args:
        auto (`type`): the Auto class.
        model (`str`): folder or Hub id of a model or an adapter.
        changes (`dict`): of config fields; further arguments of `from_pretrained`.
        **hub: `revision` and `trust_remote_code`.
    """
    base, base_hub = base_of(model, **hub)
    if base == model:
        return auto.from_pretrained(model, **hub, **changes)
    from peft import PeftModel

    config = read_config(model, **hub)
    config.update({name: value for name, value in changes.items() if name != "ignore_mismatched_sizes"})
    # a head of other classes, of the base or of the adapter, is initialized anew
    loaded = auto.from_pretrained(base, config=config, ignore_mismatched_sizes=True, **base_hub)
    if getattr(loaded, "hf_quantizer", None) is not None:
        loaded.dequantize()
    adapted = PeftModel.from_pretrained(loaded, model, ignore_mismatched_sizes=True, revision=hub.get("revision"))
    merged = adapted.merge_and_unload()
    _read_generation(merged, model, hub)
    return merged.requires_grad_(True)  # adapters freeze their base


def load_language_model(model: str, *, device: str | None = None, merged: bool = False, **options) -> PreTrainedModel:
    """Load an encoder-decoder as `AutoModelForSeq2SeqLM` and any other model as `AutoModelForCausalLM`, for inference.

    Args:
        model (`str`): folder or Hub id of a model or an adapter.
        device (`str`, *optional*): where it goes; the accelerator if there is one, else the CPU.
        merged (`bool`, *optional*, defaults to `False`): see [`load_merged`].
        **options: of `from_pretrained`; `revision` and `trust_remote_code` also find the config.
    """
    hub = {name: options[name] for name in ("revision", "trust_remote_code") if name in options}
    auto = getattr(transformers, LANGUAGE_MODELS[bool(read_config(model, **hub).is_encoder_decoder)])
    if merged:
        changes = {name: value for name, value in options.items() if name not in hub}
        return load_merged(auto, model, changes, **hub).to(device or _best_device()).eval()
    loaded = auto.from_pretrained(model, **options)
    if is_adapter(model, **hub):
        _read_generation(loaded, model, hub)
    return loaded.to(device or _best_device()).eval()


def add_adapter(base: PreTrainedModel, folder: str) -> PreTrainedModel:
    """A model with the adapter of a folder; its other weights are those of `base`, which stays as it is.

    Raises:
        ValueError: the folder holds no adapter, or one of another model.
    """
    tensors = {id(tensor): tensor for tensor in (*base.parameters(), *base.buffers())}
    model = copy.deepcopy(base, tensors)  # modules anew, tensors shared
    try:
        model.load_adapter(folder)
    except (OSError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:300]
        raise ValueError(f"{folder} is no adapter of this model: {said}; name one that was trained on it.") from error
    _read_generation(model, folder, {})
    return model.eval()


def _read_generation(loaded: PreTrainedModel, model: str, hub: dict) -> None:
    """Use the generation settings saved beside an adapter, which contain the end tokens of its training."""
    if _has(model, GENERATION_CONFIG_NAME, hub):
        loaded.generation_config = GenerationConfig.from_pretrained(model, revision=hub.get("revision"))


def load_for_task(checkpoint: CheckpointArgs, task: Task, memory_blocks: int | None = None) -> PreTrainedModel:
    """Load a model with the head of a task, for inference; without weights for the head, it is refused.

    Args:
        checkpoint (`CheckpointArgs`): the model or adapter.
        task (`Task`): decides the head; where it generates text, the class follows the kind of the model.
        memory_blocks (`int`, *optional*): blocks of segment memory; the checkpoint's own if unset.

    Raises:
        ValueError: the checkpoint was trained for another task.
    """
    config = read_config(checkpoint.model, **checkpoint.hub)
    if memory_blocks is not None:
        config.get_text_config(decoder=True).memory_blocks = memory_blocks
    auto = getattr(transformers, task.auto_class_for(config.is_encoder_decoder))
    options = {"config": config, "dtype": checkpoint.dtype, "output_loading_info": True, **checkpoint.hub}
    model, info = auto.from_pretrained(checkpoint.model, **options)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{checkpoint.model} has no weights for {', '.join(missing[:3])}, {len(missing)} in all: it was not "
            f"trained for {task.name}; name the task that it was trained for, or train it for this one."
        )
    return model.to(checkpoint.device or _best_device()).eval()


def _best_device() -> torch.device:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")
