"""Recipes and overrides become dataclasses; mistakes become one line and exit code 2."""

import json
from dataclasses import dataclass, field

import pytest
import torch

from modeling_flashlite.cli import banner, finish, parse_args
from modeling_flashlite.training.launch import TrainArgs


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
        ("name: a\ntemprature: 2", [], "unknown key 'temprature' in recipe.yaml; did you mean 'temperature'?"),
        ("name: a", ["--sed", "1"], "unknown key 'sed' on the command line; did you mean 'seed'?"),
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
    line = banner("train", torch.nn.Linear(10, 10), TrainArgs(str(tmp_path), use_cpu=True))
    assert "trainable" in line and "1x cpu" in line
