"""Checks of a training script's options before it runs, and task metrics during training."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data.tasks import Task
from .trainers import LAST_FILE

__all__ = ["Unset", "check_folder", "check_resume", "shape_changes", "task_measures"]

logger = logging.get_logger(__name__)
# config fields of a Flash-Lite decoder on which no weight depends
_FREE = ("block_size", "sub_block_size", "relevance_top_k", "memory_blocks")
# names of the dropout of embeddings and residual branches, and of attention, in all families
_RESIDUAL_DROPOUT = ("dropout_rate", "dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout", "hidden_dropout_prob")
_ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "activation_dropout")
# metrics that the Trainer and the distillation callback add to every evaluation
_ALWAYS = ("loss", "kd", "ce", "agree", "runtime", "samples_per_second", "steps_per_second")


class Unset(int):
    """A default value, distinguishable from the same value given explicitly."""


def check_resume(folder: str | None) -> None:
    """Raise `ValueError` unless `resume_from_checkpoint` is unset or names a complete checkpoint."""
    if folder is not None and not (Path(folder) / LAST_FILE).is_file():
        raise ValueError(
            f"resume_from_checkpoint is {folder}, which has no {LAST_FILE} and is therefore incomplete; name a "
            f"complete checkpoint, or use --resume."
        )


def check_folder(folder: str, adapters: bool) -> None:
    """Raise `ValueError` where a run would save adapters beside a model, or a model beside adapters.

    Whoever loads such a folder would get the adapters of one run on top of the weights of the other.
    """
    other = Path(folder) / ("config.json" if adapters else "adapter_config.json")
    if other.is_file():
        kinds = ("adapters", "a model") if adapters else ("a model", "adapters")
        raise ValueError(
            f"output_dir is {folder}, where {kinds[0]} would be saved, but it holds {kinds[1]} ({other.name}), and "
            "both would be loaded together; choose another folder, or remove what is there."
        )


def shape_changes(shape, config: PreTrainedConfig, origin: str) -> dict[str, object]:
    """Changes that shape options make to a checkpoint's config: dropout, and fields without weights.

    A width or depth that differs from the weights is refused on the command line. In a recipe, which may describe a
    new model, it is ignored with a warning.

    Args:
        shape (`ArchitectureArgs`): `None` or [`Unset`] for options that were not given.
        config (`PreTrainedConfig`): of the checkpoint.
        origin (`str`): its name, for the message.

    Returns:
        `dict`: values for `from_pretrained`.
    """
    asked = {name: value for name, value in asdict(shape).items() if not isinstance(value, Unset | None)}
    given = getattr(shape, "given", asked)
    changes: dict[str, object] = {}
    if "dropout_rate" in asked:
        changes |= _dropout_changes(asked.pop("dropout_rate"), config)
    for name, value in asked.items():
        if name in _FREE and name in given and hasattr(config, name):
            changes[name] = value
            continue
        held = _held(name, config)
        if held != value and name not in given:
            logger.warning(f"The recipe's {name} {value} is ignored: {origin} has {held}.")
        elif held != value:
            raise ValueError(
                f"{name} is {value}, but {origin} has {held}, and a loaded model keeps its shape; leave {name} out, "
                "or train a new model without --model."
            )
    return changes


def _held(name: str, config: PreTrainedConfig) -> object:
    encoder = getattr(config, "encoder", None)
    return encoder.num_hidden_layers if name == "encoder_layers" and encoder else getattr(config, name, None)


def _dropout_changes(rate: float, config: PreTrainedConfig) -> dict[str, float]:
    known = [name for name in _RESIDUAL_DROPOUT if hasattr(config, name)]
    if rate and not known:
        raise ValueError(
            f"dropout_rate is {rate}, but {config.model_type} models have no dropout in their residual branches; "
            f"leave it out."
        )
    others = [name for name in _ATTENTION_DROPOUT if hasattr(config, name)] if not rate else []
    return dict.fromkeys([*known, *others], rate)


def task_measures(
    task: Task, args, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_target_length: int
) -> dict[str, Callable]:
    """Keyword arguments of a `Trainer` for the task's metrics at every evaluation.

    Accuracy of classes; the metrics of generated text with `predict_with_generate`, greedy unless
    `generation_num_beams` says otherwise. Conversations and plain text have no single answer to generate.

    Raises:
        `ValueError`: `predict_with_generate` for such a task, or a `metric_for_best_model` that is not measured.
    """
    measures: dict[str, Callable] = {}
    names: tuple[str, ...] = ()
    one_answer = task.generates and (model.config.is_encoder_decoder or task.name not in ("chat", "text-generation"))
    if args.predict_with_generate and not one_answer:
        raise ValueError(
            f"predict_with_generate is set, but the rows of {task.name} have no single answer that "
            f"{type(model).__name__} could generate; leave it out, and use evaluate.py after the training."
        )
    if args.predict_with_generate and task.metrics != ("perplexity",):
        if args.generation_max_length is None:
            args.generation_max_length = max_target_length + 1  # and the start token
        measures["compute_metrics"] = _TextMeasures(task, tokenizer)
        names = tuple(measures["compute_metrics"]([[tokenizer.eos_token_id]], [[tokenizer.eos_token_id]]))
    elif task.name == "classification":
        measures["compute_metrics"] = _class_measures
        measures["preprocess_logits_for_metrics"] = _best_classes
        names = ("accuracy", "f1_macro")
    wanted = (args.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted not in (*_ALWAYS, *names):
        raise ValueError(
            f"metric_for_best_model is {wanted!r}, but an evaluation measures {', '.join(('loss', *names))}"
            f"{'' if names or not task.generates else '; predict_with_generate adds the metrics of the task'}."
        )
    return measures


class _TextMeasures:
    """Metrics of a task from generated and reference token ids, where -100 is padding."""

    def __init__(self, task: Task, tokenizer: PreTrainedTokenizerBase):
        self.task, self.tokenizer = task, tokenizer

    def __call__(self, predictions, labels=None) -> dict[str, float]:
        from ..measure.metrics import METRICS

        if labels is None:  # an `EvalPrediction`
            predictions, labels = predictions.predictions, predictions.label_ids
        found, wanted = self._texts(predictions), self._texts(labels)
        scores: dict = {}
        for group in self.task.metrics:
            scores |= METRICS[group](found, [[text] for text in wanted], 0)
        return {name: value for name, value in scores.items() if isinstance(value, float)}

    def _texts(self, ids) -> list[str]:
        ids = np.asarray(ids)
        ids = np.where(ids < 0, self.tokenizer.pad_token_id or 0, ids)
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]


def _best_classes(logits, labels):
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def _class_measures(prediction) -> dict[str, float]:
    from ..measure.metrics import classification

    return classification(prediction.predictions, prediction.label_ids, 0)
