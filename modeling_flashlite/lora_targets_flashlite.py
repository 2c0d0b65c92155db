# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""The layers that `LoraConfig()` adapts in a Flash-Lite model when `target_modules` is not given.

peft looks up the model type in its own tables. Entries are added when peft asks a model for its config, right before
the look-up, so that peft is never imported from here.
"""

import sys

# every projection of a layer: for equal trainable weights, more layers beat a higher rank (QLoRA, section 4)
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_MODEL_TYPES = ("flashlite", "flashlite_decoder", "flashlite_encoder")
_METHODS = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "OFT", "BOFT")


def register_lora_targets() -> None:
    """Add the default targets to peft's tables, if peft has been imported; entries that exist stay."""
    tables = sys.modules.get("peft.utils.constants")
    for method in _METHODS:
        table = getattr(tables, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING", {})
        for model_type in _MODEL_TYPES:
            table.setdefault(model_type, list(TARGET_MODULES))
