"""Low-rank adapters through peft: default targets for `flashlite`, and one call that prepares a model for training."""

import importlib.abc
import importlib.util
import sys

from transformers import PreTrainedModel

__all__ = ["TARGET_MODULES", "add_lora", "register_lora_targets"]

# every projection of a layer: with the same number of trainable weights, more places beat more rank (QLoRA, section 4)
TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MODEL_TYPES = ("flashlite", "flashlite_decoder", "flashlite_encoder")
METHODS = ("LORA", "ADALORA", "LOHA", "LOKR", "VERA", "OFT", "BOFT")


def register_lora_targets() -> None:
    """Let `LoraConfig()` without `target_modules` know what to adapt in a Flash-Lite model.

    Where peft has not been imported yet, the entry is made at the moment it is: importing peft costs more than this
    package and the model together.
    """
    if "peft" in sys.modules:
        _register()
    elif not any(isinstance(finder, _WhenPeftIsImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenPeftIsImported())


def _register() -> None:
    from peft.utils import constants

    for method in METHODS:
        mapping = getattr(constants, f"TRANSFORMERS_MODELS_TO_{method}_TARGET_MODULES_MAPPING", {})
        for model_type in MODEL_TYPES:
            mapping.setdefault(model_type, list(TARGET_MODULES))


class _WhenPeftIsImported(importlib.abc.MetaPathFinder):
    """Runs `_register` right after peft's own import, then steps aside; many only ask whether peft is there."""

    searching = False

    def find_spec(self, name, path=None, target=None):
        if name != "peft" or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                sys.meta_path.remove(self)
                _register()

            spec.loader.exec_module = exec_module
        return spec


def add_lora(
    model: PreTrainedModel,
    r: int = 8,
    alpha: int | None = None,
    dropout: float = 0.0,
    target_modules: list[str] | str | None = None,
    modules_to_save: list[str] | None = None,
):
    """Freeze a model and add trainable low-rank adapters.

    Args:
        model (`PreTrainedModel`): a language model; its loss hook keeps working.
        r (`int`, *optional*, defaults to 8): rank.
        alpha (`int`, *optional*): scale times rank; `2 r` if unset.
        dropout (`float`, *optional*, defaults to 0.0): on the adapters' inputs.
        target_modules (`list[str]` or `str`, *optional*): names, or `"all-linear"`; if unset, [`TARGET_MODULES`], what
            peft knows of a model of another family, or all linear layers if it knows nothing.
        modules_to_save (`list[str]`, *optional*): modules trained in full, for example `["lm_head"]`.

    Returns:
        `peft.PeftModel`: train it with any Trainer; `merge_and_unload()` gives a plain model back.
    """
    if r < 1:
        raise ValueError(f"r is {r}, but an adapter needs at least rank 1; 8 or 16 are usual.")
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    register_lora_targets()
    if target_modules is None and model.config.model_type not in known:
        target_modules = "all-linear"
    # peft trains the new head of these in full
    heads = {
        "SequenceClassification": "SEQ_CLS",
        "TokenClassification": "TOKEN_CLS",
        "QuestionAnswering": "QUESTION_ANS",
    }
    head = next((kind for name, kind in heads.items() if type(model).__name__.endswith(name)), None)
    task = TaskType[head or ("SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM")]
    config = LoraConfig(
        task_type=task,
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        modules_to_save=modules_to_save,
    )
    # checkpointed layers need an input that carries a gradient, which a frozen embedding does not give
    model.enable_input_require_grads()
    return get_peft_model(model, config)
