"""Recipes and overrides become dataclasses; mistakes become one line and exit code 2."""

import json
import runpy
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from checkpoints import make_tokenizer
from jinja2 import TemplateError
from safetensors import SafetensorError

from modeling_flashlite import EcqConfig, FlashLiteForCausalLM
from modeling_flashlite.cli import banner, finish, needs, parse_args, start
from modeling_flashlite.data.tasks import TASKS, TaskData
from modeling_flashlite.training.launch import ArchitectureArgs, TrainArgs, new_config
from modeling_flashlite.training.lora import add_lora


@dataclass
class Args:
    name: str = field(metadata={"help": "required"})
    temperature: float = 1.0
    layers: int | None = None
    live: bool = False
    report_to: list[str] = field(default_factory=list)


@dataclass
class Other:
    seed: int = 0


def recipe(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return f"--config={path}"


def test_recipe_fills_and_the_command_line_wins(tmp_path):
    config = recipe(tmp_path, "name: a\ntemperature: 1e-4\nlive: true\nreport_to: [x, y]\nseed: 3\nlayers: null\n")
    args, other = parse_args((Args, Other), [config, "--seed", "7", "--live", "false"])
    assert args == Args("a", 1e-4, None, False, ["x", "y"]) and other.seed == 7
    args, _ = parse_args((Args, Other), ["--config", config.partition("=")[2], "--layers=2"])
    assert args.layers == 2 and args.live


def test_no_recipe_is_needed():
    assert parse_args((Args,), ["--name", "b"])[0] == Args("b")


@pytest.mark.parametrize(
    ("text", "argv", "message"),
    [
        ("name: a\ntemprature: 2", [], "unknown key 'temprature' in recipe.yaml (did you mean 'temperature'?)"),
        ("name: a", ["--sed", "1"], "unknown key 'sed' on the command line (did you mean 'seed'?)"),
        ("name: a", ["--zzzzz=1"], "--help lists the keys"),
        ("name: a\ntemperature: hot", [], "invalid float value: 'hot'"),
        ("temperature: 2.0", [], "name"),
        ("- a\n- b", [], "holds a list"),
        ("name: [", [], "cannot read the recipe"),
        ("name: a", ["stray"], "unexpected argument 'stray'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, capsys, text, argv, message):
    with pytest.raises(SystemExit) as stop:
        parse_args((Args, Other), [recipe(tmp_path, text), *argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error


def test_missing_recipe_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args((Args,), ["--config", "nowhere.yaml"])
    assert stop.value.code == 2 and "nowhere.yaml" in capsys.readouterr().err


def test_values_that_the_trainer_refuses_are_one_line_too(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args((TrainArgs,), ["--output_dir", str(tmp_path), "--save_strategy", "epochs"])
    assert stop.value.code == 2 and "epochs" in capsys.readouterr().err


def test_last_line_is_one_json_object(capsys, tmp_path):
    assert finish({"loss": 1.5}) == {"loss": 1.5}
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"loss": 1.5}


def test_the_banner_counts_what_the_codes_stand_for(tmp_path, tiny_config):
    model = FlashLiteForCausalLM(tiny_config(vocab_size=40_000, is_encoder_decoder=False))
    model.save_pretrained(tmp_path)
    rounded = FlashLiteForCausalLM.from_pretrained(tmp_path, quantization_config=EcqConfig(target_bits=4.5))
    rounded.save_pretrained(tmp_path / "coded")
    coded = FlashLiteForCausalLM.from_pretrained(tmp_path / "coded")
    for kind in (model, coded, add_lora(coded, 2)):
        line = banner("train", kind, TrainArgs(str(tmp_path), use_cpu=True))
        assert line.startswith("train · 1.3M params (") and "trainable" in line and "1x cpu" in line


def stopped(call, capsys):
    """Exit code of what ends the process, and what stands on standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        call()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("k is 0, but\n   must be positive."), "run.py: k is 0, but must be positive.\n"),
        (FileNotFoundError(2, "No such file", "a.csv"), "run.py: [Errno 2] No such file: 'a.csv'\n"),
        (ImportError("matplotlib is missing"), "run.py: matplotlib is missing\n"),
        (SafetensorError("I/O error: No space left on device"), "run.py: I/O error: No space left on device\n"),
        (TemplateError("roles must alternate"), "run.py: roles must alternate\n"),
        (TypeError("streamed rows have no length"), "run.py: streamed rows have no length\n"),
        (KeyError("no such metric"), "run.py: no such metric\n"),
        (SystemExit("run.py: no model is given: pass --model."), "run.py: no model is given: pass --model.\n"),
    ],
)
def test_a_refusal_is_one_sentence_and_exit_code_2(monkeypatch, capsys, error, said):
    def main():
        raise error

    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert stopped(lambda: start(main), capsys) == (2, said)
    monkeypatch.setattr(sys, "argv", ["run.py", "--debug"])
    with pytest.raises(type(error)):
        start(main)
    assert sys.argv == ["run.py"]


def test_an_extra_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    monkeypatch.setitem(sys.modules, "uvicorn", None)

    def main():
        with needs("serve"):
            import uvicorn  # noqa: F401

    assert stopped(main, capsys) == (
        2,
        "run.py: uvicorn is not installed; run `pip install 'flashlite[serve]'`.\n",
    )


def test_layers_of_an_encoder_that_is_not_there():
    tokenizer, alone = make_tokenizer(), TaskData(TASKS["text-generation"], {}, encoder_decoder=False)
    (typed,) = parse_args((ArchitectureArgs,), ["--encoder_layers=2"])
    with pytest.raises(ValueError, match="encoder_layers is 2, but the model has no encoder"):
        new_config(typed, tokenizer, alone)
    assert new_config(typed, tokenizer, replace(alone, encoder_decoder=True)).encoder.num_hidden_layers == 2
    assert new_config(ArchitectureArgs(encoder_layers=2), tokenizer, alone).encoder is None  # a recipe's


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    for fault in (lambda: {}["key"], lambda: 1 + "1", lambda: 1 / 0):
        with pytest.raises((KeyError, TypeError, ZeroDivisionError)):
            start(fault)


def test_exit_codes_and_the_debugger_of_the_trainer_pass(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    assert stopped(lambda: start(lambda: 1), capsys)[0] == 1 and stopped(lambda: start(dict), capsys)[0] == 0
    monkeypatch.setattr(sys, "argv", ["run.py", "--debug", "underflow_overflow", "--output_dir", str(tmp_path)])
    seen = []
    assert stopped(lambda: start(seen.append, (TrainArgs,)), capsys)[0] == 0
    assert [option.value for option in seen[0].debug] == ["underflow_overflow"]


SCRIPTS = Path(__file__).parents[1] / "scripts"
DATA = ["--dataset=train=nowhere.jsonl", "--output_dir=x"]
REFUSED = {
    "train": DATA,
    "distill": ["--teacher=nowhere", *DATA],
    "finetune": ["--model=nowhere", *DATA],
    "quantize": ["--model=nowhere", *DATA],
    "evaluate": ["--model=nowhere", "--task=translation", "--dataset=test=nowhere.jsonl"],
    "chat": ["--model=nowhere/at-all"],
    "serve": ["--model=nowhere/at-all"],
    "sample": ["--model=nowhere", "--output=x.jsonl"],
    "train_tokenizer": DATA,
    "plot": ["--runs=nowhere"],
    "convert": ["--model=nowhere", "--output=x"],
    "demo": ["--size=huge", "--output=x"],
    "from_scratch": ["--size=huge", "--output=x"],
    "export": ["--model=nowhere", "--output=x"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_every_script_refuses_in_one_sentence(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *REFUSED[name]])
    code, said = stopped(lambda: runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__"), capsys)
    assert code == 2 and "Traceback" not in said, said
    assert said.splitlines()[-1].startswith((f"{name}.py: ", f"{name}: ")) and len(said.splitlines()[-1]) < 1000
