# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Saving: an interrupted save keeps the previous model in the folder, and every fitting Auto class is registered."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

# always a mixin of a model
if TYPE_CHECKING:
    from transformers import PreTrainedModel as _Model
else:
    _Model = object


# Auto class -> file and class; for machines without this package
AUTO_MAP = {
    "AutoConfig": "configuration_flashlite.FlashLiteConfig",
    "AutoModel": "modeling_flashlite.FlashLiteModel",
    "AutoModelForSeq2SeqLM": "modeling_flashlite.FlashLiteForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_flashlite.FlashLiteForCausalLM",
    "AutoModelForSequenceClassification": "modeling_flashlite.FlashLiteForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_flashlite.FlashLiteForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_flashlite.FlashLiteForQuestionAnswering",
}


def fitting_auto_map(is_encoder_decoder: bool) -> dict[str, str]:
    """The part of `AUTO_MAP` that a checkpoint with or without an encoder can be loaded with."""
    return {name: path for name, path in AUTO_MAP.items() if is_encoder_decoder or name != "AutoModelForSeq2SeqLM"}


class AtomicSaving(_Model):
    """Gives a [`PreTrainedModel`] a `save_pretrained` that replaces an older model once the new one is complete."""

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, push_to_hub=False, **kwargs):
        """Save like [`PreTrainedModel.save_pretrained`]; a full disk or a kill leaves the previous model intact.

        All files are written into `.incomplete` in the folder first and then replace the old ones. A distributed
        checkpoint, whose parts are written by several processes, is written in place.
        """
        rest = {"is_main_process": is_main_process, "state_dict": state_dict, "push_to_hub": push_to_hub, **kwargs}
        folder = Path(save_directory)
        if self._auto_class is not None:  # the code is saved too, with all classes
            known = getattr(self.config, "auto_map", None) or {}
            self.config.auto_map = {**known, **fitting_auto_map(self.config.is_encoder_decoder)}
        if not self.config.tie_word_embeddings and getattr(self, "hf_quantizer", None) is None:
            _separate_tables(self)
        in_place = kwargs.get("distributed_checkpoint") or folder.is_file()
        if in_place or not self.should_save_on_this_rank(is_main_process):
            super().save_pretrained(save_directory, **rest)
        else:
            if push_to_hub:
                rest.setdefault("repo_id", folder.name)
            staging = folder / ".incomplete"
            _remove(staging)  # left by an interrupted save
            try:
                super().save_pretrained(staging, **rest)
                _move_model(staging, folder)
            finally:
                _remove(staging)
        if not in_place:  # other processes may read the result
            self.barrier_after_gathered_checkpoint_save(getattr(self.config, "distributed_config", None))


def _separate_tables(model) -> None:
    """Copy tables that still share one tensor although the config no longer ties them.

    peft leaves them this way after training a head. The file would contain only one of them, and the others would be
    initialized randomly on loading.
    """
    seen = set()
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("embed_tokens", "lm_head"):
            if id(module.weight) in seen:
                module.weight = type(module.weight)(module.weight.detach().clone(), module.weight.requires_grad)
            seen.add(id(module.weight))


def _remove(folder: Path) -> None:
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def _move_model(source: Path, target: Path) -> None:
    """Move the files of a model, weights first, and remove obsolete weight files of the previous model."""

    def stem(name: str) -> str:
        return re.sub(r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?$", "", name)

    new = sorted(os.listdir(source), key=lambda name: (".safetensors" not in name, name))
    stems = {stem(name) for name in new if ".safetensors" in name}
    old = {path.name for path in target.iterdir() if ".safetensors" in path.name and stem(path.name) in stems}
    for name in new:
        os.replace(source / name, target / name)
    for name in old - set(new):
        (target / name).unlink()
