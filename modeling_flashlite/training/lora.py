"""Low-rank adapters with peft: one call prepares a model for training."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..ecq_modules_flashlite import EcqModule
from ..lora_targets_flashlite import TARGET_MODULES, register_lora_targets

__all__ = ["TARGET_MODULES", "add_lora", "save_base"]

# modules that peft trains in full by default for these tasks
_TRAINED_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


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
        target_modules (`list[str]` or `str`, *optional*): names, or `"all-linear"`; if unset, [`TARGET_MODULES`] for
            Flash-Lite, peft's defaults for other families, and all linear layers where it has none.
        modules_to_save (`list[str]`, *optional*): modules trained in full, for example `["lm_head"]`.

    Returns:
        `peft.PeftModel`: train it with any Trainer; `merge_and_unload()` gives a plain model back.

    Raises:
        `ValueError`: a rank below 1, or a coded module that would be trained in full.
    """
    if r < 1:
        raise ValueError(f"r is {r}, but an adapter needs at least rank 1; 8 or 16 are usual.")
    from peft import LoraConfig, TaskType, get_peft_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

    register_lora_targets()
    if target_modules is None and model.config.model_type not in known:
        target_modules = "all-linear"
    heads = {
        "SequenceClassification": "SEQ_CLS",
        "TokenClassification": "TOKEN_CLS",
        "QuestionAnswering": "QUESTION_ANS",
    }
    head = next((kind for name, kind in heads.items() if type(model).__name__.endswith(name)), None)
    task = TaskType[head or ("SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM")]
    coded = _coded(model, [*(modules_to_save or ()), *_TRAINED_HEADS.get(head or "", ())])
    if coded:
        raise ValueError(
            f"{coded[0]} would be trained in full, but its weights are codes, which cannot be trained; call "
            f"dequantize() on "
            "the model first, name it in EcqConfig(modules_to_not_convert=...) when quantizing, or adapt it."
        )
    config = LoraConfig(
        task_type=task,
        r=r,
        lora_alpha=2 * r if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        modules_to_save=modules_to_save,
    )
    # checkpointed layers need an input that requires a gradient, which a frozen embedding does not give
    model.enable_input_require_grads()
    return get_peft_model(model, config)


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save a model that is no checkpoint yet where its adapters, which are saved without it, will look for it."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.name_or_path = str(folder)


def _coded(model: PreTrainedModel, names: list[str]) -> list[str]:
    """The coded modules among those with these names."""
    return [
        place
        for place, module in model.named_modules()
        if isinstance(module, EcqModule) and any(f".{place}".endswith(f".{name}") for name in names)
    ]
