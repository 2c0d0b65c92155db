"""Command lines of the scripts: dataclasses filled from a YAML recipe and overrides, with hints for unknown keys."""

import contextlib
import json
import linecache
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from jinja2 import TemplateError
from safetensors import SafetensorError
from transformers import HfArgumentParser, PreTrainedModel

from .measure.cost import count_parameters
from .spelling import did_you_mean

__all__ = ["banner", "finish", "needs", "parse_args", "refuse_unused", "start"]

# errors that always describe the input, and errors that do so only when raised by our own code
_REFUSALS = ValueError, OSError, ImportError, FloatingPointError, SafetensorError, TemplateError
_WRITTEN_REFUSALS = TypeError, RuntimeError, KeyError, AttributeError
_MOST_CHARACTERS = 800  # some libraries list everything they support


def start(main: Callable, classes: Sequence[type] | None = None, description: str | None = None) -> None:
    """Run a script's `main` and exit; refused input prints one sentence and exits with code 2.

    `--debug` without a value is removed from the command line and shows the traceback of a refusal. Other errors,
    which are faults of the program, keep their traceback and exit code 1.

    Args:
        main (`Callable`): takes one instance of each class; returns an exit code, or metrics already printed by
            `finish`.
        classes (sequence of dataclasses, *optional*): see [`parse_args`]; without them `main` reads the command line.
        description (`str`, *optional*): shown by `--help`.
    """
    debug = _take_debug(sys.argv)
    try:
        result = main() if classes is None else main(*parse_args(classes, description=description))
    except SystemExit as stop:
        if isinstance(stop.code, str) and not debug:
            _refuse(re.sub(r"^[\w.]+: ", "", stop.code))
        raise
    except Exception as error:
        if debug or not _is_refusal(error):
            raise
        _refuse(_sentence(error))
    raise SystemExit(result if isinstance(result, int) else 0)


@contextlib.contextmanager
def needs(extra: str):
    """Refuse in one sentence, with exit code 2, where a package of an optional `extra` is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        _refuse(f"{error.name} is not installed; run `pip install 'flashlite[{extra}]'`.")


def _take_debug(argv: list[str]) -> bool:
    """Remove `--debug` from the command line, unless it has a value: then it is the Trainer's option."""
    for place, word in enumerate(argv):
        if word == "--debug" and (place + 1 == len(argv) or argv[place + 1].startswith("-")):
            del argv[place]
            return True
    return False


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, _REFUSALS):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    line = linecache.getline(trace.tb_frame.f_code.co_filename, trace.tb_lineno)
    return isinstance(error, _WRITTEN_REFUSALS) and line.lstrip().startswith("raise ")


def _sentence(error: Exception) -> str:
    said = error.args[0] if isinstance(error, KeyError) and error.args else error
    text = " ".join(str(said).split()) or type(error).__name__
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]} ... (--debug shows all)"


def parse_args(classes: Sequence[type], argv: Sequence[str] | None = None, description: str | None = None) -> tuple:
    """Fill dataclasses from `--config recipe.yaml` and `--key value` overrides; the command line wins.

    Args:
        classes (sequence of dataclasses): each key sets the field of that name.
        argv (sequence of `str`, *optional*): arguments; those of the process if unset.
        description (`str`, *optional*): shown by `--help`.

    Returns:
        `tuple`: one instance per class, with an extra attribute `given`: the names given on the command line.

    Raises:
        `SystemExit`: with code 2 and one line for an unknown key, a wrong type or a value that a class refuses.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = HfArgumentParser(classes, description=description, allow_abbrev=False)
    parser.error = _refuse  # argparse would print the usage of all training arguments before the message
    parser.add_argument("--config", help="YAML recipe; every other argument overrides its key")
    parser.epilog = "--debug, without a value, shows the traceback of a refusal."
    keys = [field.name for cls in classes for field in fields(cls) if field.init]
    # the recipe's values become defaults, so it is read before the other arguments are parsed
    config = next((argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"), None)
    config = next((word.partition("=")[2] for word in argv if word.startswith("--config=")), config)
    if config is not None:
        recipe = _read_recipe(config)
        for key in recipe:
            if key not in keys:
                _refuse(f"unknown key {key!r} in {Path(config).name}{_suggest(key, keys)}")
        for action in parser._actions:
            action.required = action.required and action.dest not in recipe
        parser.set_defaults(**recipe)
    try:
        *parsed, rest = parser.parse_args_into_dataclasses(
            argv, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, TypeError) as error:
        _refuse(str(error))
    for word in rest:
        if word.startswith("-"):
            key = word.lstrip("-").partition("=")[0]
            _refuse(f"unknown key {key!r} on the command line{_suggest(key, keys)}")
    if rest:
        _refuse(f"unexpected argument {rest[0]!r}; arguments are given as --key value")
    given = frozenset(word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--"))
    for instance in parsed[: len(classes)]:
        instance.__dict__["given"] = given
    return tuple(parsed[: len(classes)])


def _read_recipe(path: str) -> dict:
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        _refuse(f"cannot read the recipe {path}: {error}")
    if not isinstance(recipe, dict):
        _refuse(f"{path} holds a {type(recipe).__name__}, but a recipe is a list of 'key: value' lines")
    return recipe


def _suggest(key: str, keys: list[str]) -> str:
    return did_you_mean(key, keys) or "; --help lists the keys"


def _refuse(message: str) -> None:
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {message}\n")
    raise SystemExit(2)


def refuse_unused(args, names: Iterable[str], use: str) -> None:
    """Refuse options that were given on the command line and that this run would ignore.

    Those of a recipe pass, since it may describe several kinds of runs.

    Args:
        args: an instance of [`parse_args`].
        names (iterable of `str`): the options that the run does not use.
        use (`str`): what they are used for.

    Raises:
        ValueError: one of them was given.
    """
    for name in names:
        if name in getattr(args, "given", ()):
            raise ValueError(f"--{name} is only used {use}; leave it out.")


def banner(name: str, model: PreTrainedModel, training_args) -> str:
    """One line about the run: parameters (a coded weight counts as its elements), precision, devices, seed."""
    total = count_parameters(model)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    precision = "bf16" if training_args.bf16 else "fp16" if training_args.fp16 else "fp32"
    device = torch.cuda.get_device_name() if training_args.device.type == "cuda" else training_args.device.type
    return (
        f"{name} · {total / 1e6:.1f}M params ({trainable / 1e6:.1f}M trainable) · {precision} · "
        f"{training_args.world_size}x {device} · seed {training_args.seed}"
    )


def finish(metrics: dict) -> dict:
    """Print a run's metrics as the last line of standard output, one JSON object, from the main process only."""
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        sys.stdout.flush()
        sys.stdout.write(json.dumps(metrics) + "\n")
        sys.stdout.flush()
    return metrics
