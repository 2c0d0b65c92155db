"""The quantize verb: its recipes run, meet their budget, and leave a model that loads."""

import json

import pytest
import yaml
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
)
from verbs import RECIPES, TINY_RUN, TINY_SHAPE, argument_classes, load_script, run_verb, write_corpus

from modeling_flashlite.cli import parse_args
from modeling_flashlite.ecq_modules_flashlite import EcqModule

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantize")
    dataset = write_corpus(folder)
    for recipe in ("train_tiny", "train_translation"):
        layers = ["--encoder_layers=2"] if recipe == "train_translation" else []
        run_verb(recipe, dataset, folder / recipe, [*TINY_SHAPE, *layers, "--vocab_size=300"])
    return folder, dataset


def quantize(recipe, ground, *overrides):
    folder, dataset = ground
    script = load_script("quantize")
    base = folder / ("train_translation" if recipe == "qat_translation" else "train_tiny")
    argv = [f"--config={RECIPES[recipe]}", f"--dataset={dataset}", f"--model={base}", *TINY_RUN]
    return script.main(*parse_args(argument_classes(script), [*argv, f"--output_dir={folder / recipe}", *overrides]))


@pytest.mark.parametrize("recipe", ["ptq_tiny", "ptq_smol", "qat_tiny", "recover_tiny", "qat_lm", "qat_translation"])
def test_recipe_quantizes(recipe, ground, capsys):
    own = ["--lora_r=2"] if recipe == "recover_tiny" else []
    metrics = quantize(recipe, ground, "--target_bits=5", "--calibration_batches=2", "--max_steps=4", *own)
    assert metrics["bits_per_weight"] == pytest.approx(5, abs=0.1)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["file_bytes"] == metrics["file_bytes"]
    folder = ground[0] / recipe / ("base" if recipe == "recover_tiny" else "")
    auto = AutoModelForSeq2SeqLM if recipe == "qat_translation" else AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    assert any(isinstance(module, EcqModule) for module in model.modules())
    keys = set(yaml.safe_load(RECIPES[recipe].read_text()))
    assert {"method", "target_bits", "output_dir"} <= keys


def test_a_model_with_memory_is_trained_over_segments(ground):
    options = ["--segment_length=16", "--calibration_batches=2", "--target_bits=5", "--max_steps=2"]
    metrics = quantize("qat_tiny", ground, *options)
    assert metrics["bits_per_weight"] == pytest.approx(5, abs=0.1) and metrics["eval_loss"] > 0


@pytest.mark.parametrize(("kind", "method"), [("llama", "qat"), ("gpt2", "qat"), ("gemma3_text", "lsq")])
def test_models_of_others_are_trained_to_a_budget(kind, method, ground, tmp_path):
    """With their float selves as the teachers; their hooks are called by name, by position, and not at all."""
    folder, dataset = ground
    tokenizer = AutoTokenizer.from_pretrained(folder / "train_tiny")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    if kind != "gpt2":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 1, "head_dim": 16}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    model.save_pretrained(tmp_path / kind)
    tokenizer.save_pretrained(tmp_path / kind)
    choices = [f"--model={tmp_path / kind}", f"--method={method}"]
    budget = ["--target_bits=5"] if method == "qat" else []
    metrics = quantize("qat_tiny", ground, "--max_steps=4", *budget, *choices)
    assert 2 < metrics["bits_per_weight"] < 5.1 and metrics["perplexity_increase"] < 1
    if method == "qat":
        assert isinstance(AutoModelForCausalLM.from_pretrained(folder / "qat_tiny"), type(model))


def test_training_starts_from_the_codes_of_another_run(ground):
    quantize("ptq_tiny", ground, "--target_bits=5", "--calibration_batches=2")
    start = f"--start={ground[0] / 'ptq_tiny'}"
    metrics = quantize("qat_pretrained", ground, "--target_bits=5", "--max_steps=4", "--eval_limit=2", start)
    assert metrics["bits_per_weight"] == pytest.approx(5, abs=0.1) and metrics["perplexity_increase"] < 1


def test_a_model_samples_the_text_it_is_quantized_on(ground, tmp_path, capsys):
    script, output = load_script("sample"), tmp_path / "new" / "sampled.jsonl"
    argv = [f"--model={ground[0] / 'train_tiny'}", "--rows=24", "--max_new_tokens=24", "--batch_size=16"]
    args = parse_args(argument_classes(script), [*argv, f"--output={output}"])
    metrics = script.main(*args)
    rows = [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == metrics["rows"] <= 24 and len(set(rows)) > 12
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == metrics
    first = output.read_bytes()
    script.main(*args)
    assert output.read_bytes() == first and not [path for path in output.parent.iterdir() if path != output]
    quantize("ptq_tiny", (ground[0], f"train={output}"), "--target_bits=5", "--calibration_batches=1")
    argv = [argv[0], "--chat=true", "--rows=2", f"--beside={ground[1]}", f"--output={output}"]
    script.main(*parse_args(argument_classes(script), argv))
    rows = [json.loads(line)["text"] for line in output.read_text(encoding="utf-8").splitlines()]
    (joined,) = (row for row in rows if "number 17 and" in row)
    assert "number 0 and" in joined and len(rows) <= 3  # one document of all lines


def test_rates_are_measured(ground, tmp_path):
    results = tmp_path / "rates.json"
    given = ["--rates", "5", "6", f"--results={results}", f"--report={tmp_path / 'report.json'}"]
    metrics = quantize("ptq_tiny", ground, *given, "--calibration_batches=2")
    methods = {point["method"] for point in metrics["points"]}
    assert methods == {"float", "int4 g128", "int4 g32", "ours, data-free", "ours, calibrated"}
    six, five = (point["kl"] for point in metrics["points"] if point["method"] == "ours, calibrated")
    assert 0 < six < five < 0.5
    kept = json.loads(results.read_text())["points"]
    assert [{key: value for key, value in point.items() if key != "command"} for point in kept] == metrics["points"]

    kinds = json.loads((tmp_path / "report.json").read_text())["kinds"]
    assert sum(row["share"] for row in kinds) == pytest.approx(1) and all(0 <= row["kl"] < 2 * five for row in kinds)
    assert all(1 < row["bits"] < 9 and 0 < row["error"] < 2 for row in kinds) and len(kinds) > 5
    assert all(abs(point["bits"] - point["target"]) < 0.05 for point in metrics["points"] if "target" in point)
    assert (tmp_path / "report.svg").read_text().count("int4 g32") == 1

    # plain LSQ with 8 bits is nearly lossless, and takes the place of an older run of itself
    for _ in range(2):
        lsq = quantize("qat_tiny", ground, "--method=lsq", "--lsq_bits=8", f"--results={results}", "--max_steps=2")
    assert 8 < lsq["bits_per_weight"] < 10 and abs(lsq["perplexity_increase"]) < 0.05
    assert [point["method"] for point in json.loads(results.read_text())["points"][len(kept) :]] == ["plain LSQ"]


def test_unknown_methods_are_refused(ground):
    with pytest.raises(SystemExit, match="method is 'lqs', but must be one of ptq, qat, recover, lsq"):
        quantize("qat_tiny", ground, "--method=lqs")


IGNORED = [
    ("ptq_tiny", "start=x", "by --method qat"),
    ("ptq_tiny", "lora-r=4", "by --method recover"),
    ("ptq_tiny", "alpha=0.5", "by --method qat, recover, lsq"),
    ("ptq_tiny", "lora_r=4", "by --method recover"),
    ("ptq_tiny", "weight_rate=0.1", "by --method qat"),
    ("ptq_tiny", "lsq_bits=3", "by --method lsq"),
    ("ptq_tiny", "gguf=x.gguf", "with --report"),
    ("ptq_tiny --report=r.json", "target_bits=3", "to write a model"),
    ("ptq_tiny --data_free=true", "calibration_batches=3", "to calibrate"),
    ("qat_tiny", "report=r.json", "by --method ptq"),
    ("qat_tiny --method=lsq", "target_bits=3", "by --method ptq, qat, recover"),
]


@pytest.mark.parametrize(("run", "option", "use"), IGNORED)
def test_options_that_a_method_ignores_are_refused(run, option, use, ground):
    recipe, *more = run.split()
    with pytest.raises(
        ValueError, match=f"--{option.partition('=')[0].replace('-', '_')} is only used {use}.*; leave it out"
    ):
        quantize(recipe, ground, *more, f"--{option}")


def test_budgets_and_batches_are_checked_before_the_data(ground, capsys):
    with pytest.raises(ValueError, match=r"target_bits=9.0 must be a number of 0.5 to 8"):
        quantize("ptq_tiny", ground, "--target_bits=9", "--dataset=nowhere.txt")
    for count in (0, -1):
        with pytest.raises(SystemExit):
            quantize("ptq_tiny", ground, f"--calibration_batches={count}")
        assert f"calibration_batches is {count}, but must be at least 1" in capsys.readouterr().err


def test_a_float_source_is_not_overwritten(ground):
    source = ground[0] / "train_tiny"
    before = (source / "model.safetensors").read_bytes()
    for recipe, option in (("ptq_tiny", "model"), ("recover_tiny", "model"), ("qat_tiny", "start")):
        changes = [f"--{option}={source}", f"--output_dir={source.parent / 'x' / '..' / source.name}"]
        changes += [] if option == "model" else [f"--model={ground[0] / 'other'}"]
        with pytest.raises(ValueError, match=f"would overwrite --{option} .*train_tiny; give another folder"):
            quantize(recipe, ground, *changes)
    assert (source / "model.safetensors").read_bytes() == before


def test_results_of_another_kind_do_not_share_a_folder(ground, tmp_path):
    """Old adapters would be loaded with the new model, and counted in its size."""
    few = ["--target_bits=5", "--max_steps=1", f"--output_dir={tmp_path}", "--calibration_batches=1"]
    quantize("recover_tiny", ground, *few)
    with pytest.raises(ValueError, match="holds adapters .*remove what is there"):
        quantize("ptq_tiny", ground, *few)
    for path in tmp_path.glob("adapter_*"):
        path.unlink()
    (tmp_path / "old.gguf").write_bytes(bytes(1000))
    metrics = quantize("ptq_tiny", ground, *few)
    assert metrics["file_bytes"] == (tmp_path / "model.safetensors").stat().st_size
    with pytest.raises(ValueError, match="holds a model .*remove what is there"):
        quantize("recover_tiny", ground, *few)


def test_a_refused_budget_leaves_no_blocks(ground, tmp_path):
    with pytest.raises(ValueError, match="ask for more bits"):
        quantize("ptq_tiny", ground, "--target_bits=3.2", "--calibration_batches=1", f"--output_dir={tmp_path}")
    assert not (tmp_path / "blocks").exists()
