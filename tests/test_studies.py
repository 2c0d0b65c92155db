"""Studies and plots: what they train once, compare and draw."""

import json

import pytest
from verbs import RECIPES, TINY_RUN, TINY_SHAPE, argument_classes, load_script, write_corpus

from modeling_flashlite.cli import parse_args


def test_models_of_equal_size_are_compared(tmp_path):
    dataset = write_corpus(tmp_path)
    script = load_script("compare_models")
    argv = [f"--config={RECIPES['train_captions']}", f"--dataset={dataset}", f"--output_dir={tmp_path / 'runs'}"]
    argv += [*TINY_RUN, *TINY_SHAPE, "--hidden_size=64", "--num_key_value_heads=4", "--vocab_size=300"]
    own = ["--peer_width=48", "--peer_heads=4", "--test_split=validation", "--repeats=1"]
    own += ["--learning_rates=1e-3,T5=1e-4"]
    given = [*argv, *own, "--speed_rows=2", f"--output={tmp_path / 'peers.json'}"]
    script.main(*parse_args(argument_classes(script), given))
    written = json.loads((tmp_path / "peers.json").read_text())
    ours, *peers = written["points"]
    tried = [(row["method"], row["learning_rate"]) for row in peers]
    assert tried == [("BART", 1e-3), ("T5", 1e-3), ("T5", 1e-4)] and ours["steps"] == 2
    best = min(peers[1:], key=lambda row: row["validation_loss"])
    assert [row["best"] for row in peers] == [True, peers[1] is best, peers[2] is best]
    assert written["metrics"]["T5 bleu"] == best["bleu"]
    assert all(row["parameters"] == pytest.approx(ours["parameters"], rel=0.01) for row in peers)
    assert {row["work"].partition(",")[0] for row in written["race"]} == {"training step", "generation"}
    with pytest.raises(ValueError, match="lower its width"):
        script.make_peer("BART", (256, 4, 4, 300), ours["parameters"])


def test_ablation_trains_each_choice_once(tmp_path, monkeypatch, capsys):
    script = load_script("ablate")
    text = "".join(json.dumps({"text": f"number {i} and number {i + 1} " * 40}) + "\n" for i in range(8))
    (tmp_path / "a.jsonl").write_text(text)
    argv = ["ablate.py", "--study", "axes", "--only", "dense", "multi-axis", "--steps", "2", "--length", "64"]
    argv += ["--block_size", "8", "--relevance_top_k", "1", "--hidden_size", "32", "--layers", "1", "--seeds", "0"]
    argv += ["--dataset", f"train={tmp_path}/a.jsonl,validation={tmp_path}/a.jsonl", "--vocab_size", "300"]
    monkeypatch.chdir(tmp_path)
    script.main(*parse_args((script.AblateArgs,), [*argv[1:], "--rows", "2", "--output", "out.json"]))
    dense, sparse = json.loads(capsys.readouterr().out.splitlines()[-1])["table"]
    assert (dense["choice"], dense["relative_perplexity"], sparse["choice"]) == ("dense", 1.0, "multi-axis")
    # the same weights and rows, and rows long enough that the choice matters
    assert sparse["loss_equal_steps"] != dense["loss_equal_steps"]
    assert sparse["relative_perplexity"] == pytest.approx(1, abs=0.01)


def test_results_are_drawn_over_each_other(tmp_path):
    script = load_script("plot")
    rates = {"points": [{"method": "ours", "bits": b, "loss": 3 - b / 4} for b in (2.0, 3.0)] + [{"method": "?"}]}
    (tmp_path / "rates.json").write_text(json.dumps(rates))
    (tmp_path / "qat.json").write_text(
        json.dumps({"bits": 2, "loss": 2.2, "speed": [{"name": "later, b 1", "value": 3}]})
    )
    argv = [f"--results={tmp_path}/rates.json,qat={tmp_path}/qat.json", "--x=bits", "--y=loss"]
    done = script.main(*parse_args((script.PlotArgs,), [*argv, f"--output={tmp_path}/a.svg"]))
    assert done["points"] == 3 and (tmp_path / "a.svg").read_text().count("ours") == 1
    few = script.main(*parse_args((script.PlotArgs,), [*argv, f"--output={tmp_path}/a.svg", "--x_max=2.5"]))
    assert few["points"] == 2
    over_time = [f"--results={tmp_path}/qat.json", "--x=speed.later, b 1", "--y=loss", f"--output={tmp_path}/b.svg"]
    assert script.main(*parse_args((script.PlotArgs,), over_time))["points"] == 1
    with pytest.raises(SystemExit, match="no number at 'bits' and 'perplexity'"):
        script.main(*parse_args((script.PlotArgs,), [argv[0], "--x=bits", "--y=perplexity"]))
    with pytest.raises(SystemExit, match="exactly one"):
        script.main(*parse_args((script.PlotArgs,), []))
