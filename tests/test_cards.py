"""Staging and model cards: published files, refused files, required fields, and a snippet that runs."""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import yaml
from checkpoints import RESULTS, WRITTEN, describe, make_model, make_tokenizer, save_checkpoint
from huggingface_hub import ModelCard
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.measure.results import read_results
from modeling_flashlite.publish import cards, repository
from modeling_flashlite.publish.repository import PublishError, list_files, stage
from modeling_flashlite.saving_flashlite import AUTO_MAP
from modeling_flashlite.training.calibration import quantize

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def publish():
    spec = importlib.util.spec_from_file_location("publish", ROOT / "scripts" / "publish.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    return save_checkpoint("seq2seq", tmp_path / "run")


@pytest.fixture
def card(run, tmp_path):
    folder = stage(run, tmp_path / "staged", task="translation")
    return {**cards.collect_card(folder, "you/model", [RESULTS], WRITTEN), "snippet_output": "text"}


def test_stage_takes_what_travels_and_nothing_else(run, tmp_path):
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json", ".env"):
        (run / name).write_text("private")
    folder = stage(run, tmp_path / "staged", task="translation")
    names = {file.name for file in list_files(folder)}
    shipped = {path.name for path in (ROOT / "modeling_flashlite").glob("*_flashlite.py")}
    assert names == shipped | {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    config = json.loads((folder / "config.json").read_text())
    assert set(config["auto_map"]) == set(AUTO_MAP)
    assert list(config["custom_pipelines"]) == ["translation"]
    assert config["task_specific_params"]["translation"]["num_beams"] == 4


def test_auto_map_names_every_head():
    import modeling_flashlite

    for reference in AUTO_MAP.values():
        module, name = reference.split(".")
        assert getattr(modeling_flashlite, name).__module__ == f"modeling_flashlite.{module}"


def test_latest_checkpoint_of_a_trainer_run_is_found(tmp_path):
    for step in (9, 10):
        make_model("causal").save_pretrained(tmp_path / f"checkpoint-{step}")
    assert repository.find_checkpoint(tmp_path).name == "checkpoint-10"


def spoil_pickle(run):
    (run / "pytorch_model.bin").write_bytes(b"x")


def spoil_missing(run):
    (run / "model.safetensors").unlink()


def spoil_truncated(run):
    path = run / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def spoil_header(run):
    (run / "model.safetensors").write_bytes(b"\xff" * 100)


def spoil_index(run):
    (run / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_pickle, "pytorch_model.bin is a pickle"),
        (spoil_missing, "has no .*safetensors"),
        (spoil_truncated, "its header asks for"),
        (spoil_header, "is not a safetensors file"),
        (spoil_index, "is in the index but not in the folder"),
    ],
)
def test_damaged_weights_are_refused(run, tmp_path, spoil, message):
    spoil(run)
    with pytest.raises(PublishError, match=message):
        stage(run, tmp_path / "staged")


def test_token_in_a_file_is_refused(run, tmp_path):
    folder = stage(run, tmp_path / "staged")
    (folder / "README.md").write_text("log in with hf_" + "a1B2" * 8)
    with pytest.raises(PublishError, match="README.md holds something that looks like an access token"):
        list_files(folder)


def test_card_says_what_the_files_are(card, tmp_path):
    text = cards.render_card(card)
    parsed = ModelCard(text)
    assert parsed.data.library_name == "transformers" and parsed.data.pipeline_tag == "translation"
    assert parsed.data.eval_results[0].metric_value == RESULTS["metrics"]["bleu"]
    assert parsed.data.license == "apache-2.0" and "custom_code" in parsed.data.tags
    for file in list_files(tmp_path / "staged"):
        assert file.sha256 in text
    for part in (card["snippet"], RESULTS["hardware"], RESULTS["command"], "never trained", WRITTEN["citation"]):
        assert part in text
    total = card["sizes"][-1]
    assert total["parameters"] == make_model("seq2seq").num_parameters()
    size = (tmp_path / "staged" / "model.safetensors").stat().st_size
    assert total["bytes"] == size and total["bits"] == pytest.approx(8 * size / total["parameters"])
    assert [row["bits"] for row in card["sizes"] if row["group"] == "embeddings"] == [32.0]
    assert 'revision="files-' in card["snippet"]


@pytest.mark.parametrize(
    "name", [*cards.WRITTEN, "hardware", "command", "recipe", "commit", "seed", "quality", "speed"]
)
def test_card_with_an_empty_field_does_not_publish(card, name):
    card[name] = None if name not in ("quality", "speed") else []
    with pytest.raises(PublishError, match=name):
        cards.render_card(card)


def test_card_asks_for_teacher_and_float_where_there_are_any(card):
    card |= {"distilled_from": "you/teacher", "quantized": True, "base_model": "you/float", "relation": None}
    missing = "\n".join(cards.missing_fields(card))
    for part in ("teacher's value is empty", "float model's value is empty", "base_model_relation"):
        assert part in missing
    card["relation"] = "quantized"
    for row in card["quality"]:
        row.update(teacher=1.0, float=0.9)
    assert cards.missing_fields(card) == []
    assert "base_model_relation: quantized" in cards.render_card(card)


def test_quantized_checkpoint_shows_its_bits_and_asks_for_the_float_model(tmp_path):
    run = save_checkpoint("quantized", tmp_path / "run")
    folder = stage(run, tmp_path / "staged", task="translation")
    card = cards.collect_card(folder, "you/model", [RESULTS], WRITTEN)
    rows = {row["group"]: row for row in card["sizes"]}
    assert card["quantized"] and rows["total"]["parameters"] == make_model("seq2seq").num_parameters()
    assert rows["encoder feed-forward"]["bits"] < 4 < rows["encoder norms"]["bits"]
    assert any("float model's value is empty" in line for line in cards.missing_fields(card))


def test_unknown_field_and_bad_results_are_named(run, tmp_path):
    folder = stage(run, tmp_path / "staged")
    with pytest.raises(PublishError, match="unknown field licence"):
        cards.collect_card(folder, "you/model", [], {"licence": "mit"})
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ValueError, match="one JSON object"):
        read_results([tmp_path / "bad.json"])


def test_dry_run_says_what_would_happen_and_what_is_missing(publish, run, capsys, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert publish.main(["--run", str(run), "--repo", "you/model", "--task", "translation"]) == 0
    output = capsys.readouterr().out
    assert "modeling_flashlite.py" in output and "dry run: nothing was sent" in output
    report = json.loads(output.splitlines()[-1])
    assert report["pushed"] is False and report["missing"] == 0
    describe(run, license="", example="")
    assert publish.main(["--run", str(run), "--repo", "you/model", "--push"]) == 1
    output = capsys.readouterr().out
    assert "missing  license" in output and "missing  example" in output
    assert json.loads(output.splitlines()[-1])["missing"] == 3  # the snippet has nothing to run on


@pytest.mark.parametrize("kind", ["causal", "reader"])
def test_snippet_runs_without_the_package(kind, tmp_path):
    run = save_checkpoint(kind, tmp_path / "run")
    example = "Who grants it? The Licensor." if kind == "reader" else "You may not"
    folder = stage(run, tmp_path / "staged")
    card = cards.collect_card(folder, "you/model", [RESULTS], {**WRITTEN, "example": example})
    assert cards.run_snippet(card, folder)


def test_chat_snippet_of_a_coded_model_of_another_family_runs_without_the_package(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=96
    )
    quantize(LlamaForCausalLM(config), EcqConfig(target_bits=5)).save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    folder = stage(tmp_path / "run", tmp_path / "staged")
    assert (folder / "codec_flashlite.py").is_file() and not (folder / "modeling_flashlite.py").exists()
    words = {**WRITTEN, "example": "You may not", "tags": ["conversational"]}
    card = cards.collect_card(folder, "you/model", [RESULTS], words)
    assert "'role': 'assistant'" in cards.run_snippet(card, folder)


def test_failing_snippet_does_not_publish(run, tmp_path, card):
    (tmp_path / "staged" / "modeling_flashlite.py").write_text("raise RuntimeError('broken on purpose')")
    with pytest.raises(PublishError, match="snippet fails: RuntimeError: broken on purpose"):
        cards.run_snippet(card, tmp_path / "staged")


COMMITTED = sorted(path.parent for path in (ROOT / "model_cards").glob("*/config.json"))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_card_is_complete(folder):
    """A committed model has a card that names the checksum of each of its files, and no copy of the code."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert {"license", "language", "datasets", "pipeline_tag", "model-index"} <= set(front)
    for file in list_files(folder):
        assert not file.name.endswith(".py"), "scripts/publish.py adds the code"
        if file.name != "README.md":
            assert file.sha256 in text, f"{file.name} changed after its card was written"


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_model_runs_from_its_hub_folder_without_the_package(folder, tmp_path):
    """The folder that publish.py builds, in a process that cannot import the package, prints what the card shows."""
    written = cards.load_written(folder.with_suffix(".yaml"))
    task = written["task"] if written["task"] in repository.PIPELINE_TASKS else None
    staged = stage(folder, tmp_path / "staged", task=task)
    assert {path.name for path in (ROOT / "modeling_flashlite").glob("*_flashlite.py")} <= set(os.listdir(staged))
    card = cards.collect_card(staged, "you/model", [RESULTS], written)
    printed = cards.run_snippet(card, staged)
    assert printed in (folder / "README.md").read_text(encoding="utf-8")
