# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Differences between the supported versions of transformers, and validation of model arguments.

No other file checks a version. Published checkpoints contain this file for years, so it tests for features of the
library rather than for its version.
"""

import copy
import functools
import inspect
import re
import warnings
from collections.abc import Iterable, Mapping

import torch
import transformers

# the oldest supported version, and the newest tested one
OLDEST, NEWEST = "5.16.0", "5.24.0"


def _release(version: str) -> tuple[int, ...]:
    parts = [int(part) for part in re.findall(r"^\d+(?:\.\d+)*", version)[0].split(".")]
    return *parts, *[0] * (3 - len(parts))


def check_version(version: str) -> None:
    """Refuse a transformers `version` that is too old, and warn about one that is newer than tested.

    Raises:
        ImportError: `version` is older than `OLDEST`.
    """
    if _release(version) < _release(OLDEST):
        raise ImportError(
            f"transformers {version} is installed, but Flash-Lite needs {OLDEST} or newer; run "
            f'`pip install "transformers>={OLDEST}"`.'
        )
    if _release(version)[:2] > _release(NEWEST)[:2]:
        transformers.utils.logging.get_logger(__name__).warning(
            f"transformers {version} is newer than {NEWEST}, the newest that Flash-Lite was tested with; if outputs "
            f'look wrong, run `pip install "transformers<={NEWEST}"`.'
        )


check_version(transformers.__version__)

# the rest needs a recent library
from transformers import GenerationConfig, Pipeline, configuration_utils  # noqa: E402
from transformers.modeling_outputs import BaseModelOutputWithPast  # noqa: E402
from transformers.utils import TransformersKwargs  # noqa: E402

# 5.24 renamed `past_key_values` to `cache`, in what `generate` passes and in the outputs; it deprecates the old name
_NAMES = ("cache", "past_key_values")
CACHE = next(name for name in _NAMES if name in BaseModelOutputWithPast.__dataclass_fields__)
_OTHER_NAME = next(name for name in _NAMES if name != CACHE)


class CacheNames:
    """Gives an output class the cache under both names; the field itself is called `CACHE`."""


setattr(CacheNames, _OTHER_NAME, property(lambda self: getattr(self, CACHE), doc="The cache, by its other name."))


def takes_cache(forward):
    """Let a `forward` with `past_key_values` accept the cache as `cache` too.

    The signature is cached, so that `generate` does not rebuild it for every token of a model with custom code.
    """

    @functools.wraps(forward)
    def wrapper(self, *args, cache=None, **kwargs):
        old = kwargs.get("past_key_values")
        if cache is not None:
            if old is not None:
                raise ValueError("Got both `cache` and `past_key_values`, two names of one argument; give one.")
            kwargs["past_key_values"] = cache
        elif old is not None and CACHE == "cache" and not torch.compiler.is_compiling():
            # the same warning as transformers' own models since 5.24
            warnings.warn("`past_key_values` is deprecated; use `cache` instead.", FutureWarning, stacklevel=2)
        return forward(self, *args, **kwargs)

    signature = inspect.signature(forward)
    parameters = list(signature.parameters.values())
    place = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    annotation = signature.parameters["past_key_values"].annotation
    parameters.insert(
        place, inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    )
    wrapper.__signature__ = signature.replace(parameters=parameters)
    return wrapper


def private_operator(namespace: str, name: str):
    """`torch.ops.<namespace>.<name>`, or `None` and a warning if this PyTorch no longer has it.

    PyTorch's private operators are not stable. Those used here have slower public equivalents.
    """
    operator = getattr(getattr(torch.ops, namespace), name, None)
    if operator is None:
        transformers.utils.logging.get_logger(__name__).warning(
            f"PyTorch {torch.__version__} has no operator {namespace}.{name}; slower public operators are used "
            f"instead."
        )
    return operator


def named_module(name: str, patterns: Iterable[str] | None) -> bool:
    """Whether one of `patterns`, as in `modules_to_not_convert`, matches the module `name` or one of its parents.

    A pattern is a beginning or a regular expression that ends where a part of the name does, or an end of the name.
    In 5.16 `layers.1` names `layers.11` too; a checkpoint means the same modules on every version.
    """
    return any(re.match(rf"(?:{key})(?:\.|$|(?<=\.))", name) or name.endswith(key) for key in patterns or ())


def sub_config_specs(classes: Mapping[str, type], optional: str) -> dict:
    """The `sub_configs_defaults` of a composite config whose part `optional` may be `None`.

    They came after 5.16, which asks for `sub_configs` alone.
    """
    spec = getattr(configuration_utils, "SubConfigSpec", None)
    if spec is None:
        return {}
    return {name: spec(config_class=part, optional=name == optional) for name, part in classes.items()}


class GenerationArguments:
    """Gives pipelines of 5.16 what later ones have: generation arguments kept apart and merged for each call.

    Mixed in before the pipeline's own class; where that has `_prepare_generate_kwargs`, nothing is added.
    """

    if not hasattr(Pipeline, "_prepare_generate_kwargs"):

        def __init__(self, *args, **kwargs):
            names = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {"generation_config"}
            self._generate_kwargs = {name: value for name, value in kwargs.items() if name in names}
            super().__init__(*args, **kwargs)

        def _prepare_generate_kwargs(self, generate_kwargs: dict, **overrides) -> dict:
            config = copy.deepcopy(generate_kwargs.get("generation_config") or self.generation_config)  # type: ignore[attr-defined]
            known = {name: value for name, value in generate_kwargs.items() if hasattr(config, name)}
            config.update(**{**known, **overrides})
            rest = {name: value for name, value in generate_kwargs.items() if name not in known}
            return {**rest, "generation_config": config}


# keyword arguments that a `forward` accepts beyond its own, and their consumers
_RECORDED = {"output_attentions", "output_hidden_states"}  # the stacks, which record them
_SCALED = {"num_items_in_batch"}  # the loss
# collators of packed rows also give these; they repeat `position_ids`, which the model reads
_PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


def check_arguments(model, given: dict, known=(), packed: bool = False) -> None:
    """Refuse unused arguments.

    Args:
        model (`nn.Module`): whose `forward` got them.
        given (`dict`): the arguments beyond those that `forward` names.
        known (collection of `str`): further names that are read, such as those of a loss function.
        packed (`bool`): whether position ids are given.

    Raises:
        TypeError: an argument is not known, in Python's own words.
    """
    allowed = _RECORDED | _SCALED | (_PACKED if packed else set())
    for name, value in given.items():
        # tools may pass every field of `TransformersKwargs` as None
        if name in allowed or name in known or (value is None and name in TransformersKwargs.__optional_keys__):
            continue
        raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}")


def named_arguments(function) -> frozenset[str]:
    """The named arguments of `function`, without those collected in `**kwargs`."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some C functions have no signature
        return frozenset()
    return frozenset(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
