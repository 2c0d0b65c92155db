"""The benchmarks measure what they say: each at a tiny size, and formulas against real models and brute force."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from verbs import load_script

from modeling_flashlite import FlashLiteConfig, FlashLiteForCausalLM
from modeling_flashlite.attention_flashlite import AxisSpec, _axis_masks, summarize_blocks
from modeling_flashlite.measure.benchmark import draw_growth, fit_growth, race, summarize_race
from modeling_flashlite.measure.parallel import measure_parallel
from modeling_flashlite.measure.peers import llama_bench
from modeling_flashlite.measure.scaling import Device, attention_visits, communication, count_decoder_parameters, plan
from modeling_flashlite.measure.study import BenchArgs

ROOT = Path(__file__).resolve().parents[1]
QUICK = {"shape": [32, 2, 4, 300], "lengths": [660, 700], "threads": 1, "repeats": 1, "seconds": 0.1, "peers": []}


def rows_of(name, **options):
    return load_script(f"bench_{name}").measure(BenchArgs(**{**QUICK, **options}))


@pytest.mark.parametrize(
    "name", ["attention", "decode", "prefill", pytest.param("generate", marks=pytest.mark.slow), "quant"]
)
def test_bench_races_us_against_a_peer(name):
    rows = rows_of(name)
    assert {row["length"] for row in rows} and all(row["ms"] > 0 for row in rows)
    assert len({row["name"] for row in rows}) > 1 and all("times_faster" in row for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "loss", "load", "memory", "growth", "parallel"])
def test_bench_measures(name):
    rows = rows_of(name)
    assert rows and all(row.get("ms", row.get("MiB")) is not None for row in rows)


@pytest.mark.slow
def test_shapes_leave_out_what_would_take_too_long():
    shapes = load_script("bench_shapes")
    args = shapes.ShapesArgs(shapes=["tiny"], lengths=[64, 10**9], batches=[1, 2], threads=[1], seconds=60, repeats=1)
    rows, skipped = shapes.measure(args)
    assert [(row["varied"], row["batch"]) for row in rows] == [("length", 1), ("batch", 1), ("batch", 2)]
    assert all(row["ms"] > 0 for row in rows) and len(skipped) == 1 and "1000000000" in skipped[0]


@pytest.mark.slow
def test_peers_that_are_installed_race_too():
    pytest.importorskip("ctranslate2")
    rows = rows_of("generate", peers=["ctranslate2"])
    assert {"CTranslate2 float32", "CTranslate2 int8"} <= {row["name"] for row in rows}
    assert all(row["than_CTranslate2_int8"] > 0 for row in rows if row["work"].endswith("sequence to sequence"))


def test_real_models_race_and_older_rows_stay(tmp_path):
    real = load_script("bench_real")
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, head_dim=16)).save_pretrained(tmp_path / "llama")
    args = real.RealArgs(model=str(tmp_path / "llama"), repeats=1, target_bits=6.0, output=str(tmp_path / "r.json"))
    models = real.load_models(args, tmp_path)
    for work, length in (("decode", 1), ("prefill", 512), ("decode", 1)):
        rows = real.measure(work, length, 1, models, args)
        assert [row["name"] for row in rows] == list(models) and all(row["tokens_per_s"] > 0 for row in rows)
        real.write(rows, args)
    rows = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["rows"]
    assert [row["work"] for row in rows] == ["decode"] * 3 + ["prefill"] * 3
    with pytest.raises(RuntimeError, match="code 1"):
        llama_bench("false", "none.gguf", 1, new=1)


def test_runner_runs_each_bench_and_lists_the_files(tmp_path):
    options = ["--lengths", "128", "--repeats", "1", "--seconds", "0.1", "--threads", "1", "--output", str(tmp_path)]
    command = [sys.executable, str(ROOT / "scripts/bench.py"), "decode", "attention", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert list(results) == ["decode", "attention"]
    for name, path in results.items():
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        assert content["task"] == f"bench {name}" and content["rows"] and content["growth"] == []
        assert f"scripts/studies/bench_{name}.py" in content["command"]
    unknown = subprocess.run([*command[:2], "decod"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 2 and "'decod' is unknown" in unknown.stderr


def test_translated_peer_answers_like_the_original():
    pytest.importorskip("ctranslate2")
    from modeling_flashlite.measure.peers import CTranslate2Bart, make_models

    torch.manual_seed(0)
    bart = make_models(["BART"], (32, 2, 4, 60))["BART"].eval()
    ids = torch.randint(4, 60, (2, 7))
    ours = bart.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=6, max_new_tokens=6, do_sample=False)
    theirs = CTranslate2Bart(bart, "float32", threads=1).greedy(ids, 6)
    assert theirs == [[f"t{index}" for index in row[1:7]] for row in ours.tolist()]


def test_scaling_plan_is_what_the_formulas_say(tmp_path):
    scale = load_script("bench_scale")
    scale.main(scale.ScaleArgs(str(tmp_path)))
    content = json.loads((tmp_path / "scaling.json").read_text(encoding="utf-8"))
    assert {row["name"] for row in content["rows"]} == {"1 B", "7 B"}
    assert content["assumptions"]["memory"] == Device().memory
    for row in content["rows"]:
        assert row["parameters"] == pytest.approx(float(row["name"][0]) * 1e9, rel=0.05)


def tiny(**options):
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    return FlashLiteConfig(**{**sizes, "num_key_value_heads": 2, "is_encoder_decoder": False, **options})


@pytest.mark.parametrize("encoding", ["rotary", "transformer_xl"])
def test_parameter_formula_equals_a_model(encoding):
    config = tiny(position_encoding=encoding)
    with torch.device("meta"):
        model = FlashLiteForCausalLM(config)
    assert count_decoder_parameters(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("top, memory", [(2, None), (1, 5), (0, 4)])
@pytest.mark.parametrize("length", [9, 64, 128])
def test_visits_formula_is_near_the_count(top, memory, length):
    """The formula takes every block as half full; a count of the masks of one head differs by that much."""
    config = tiny(block_size=4, sub_block_size=2, relevance_top_k=top, memory_blocks=memory)
    spec = AxisSpec(4, 2, top, memory)
    q, k, v = (torch.randn(1, 1, length, 8) for _ in range(3))
    tokens, grid = _axis_masks(q, length, summarize_blocks(k, v, spec), spec, 0, 1.0)
    count = (tokens.sum() + grid.sum()).item() / length
    assert attention_visits(config, length) == pytest.approx(count, rel=0.06)


def test_memory_falls_and_work_stays_as_devices_join():
    plans = [plan(tiny(), devices, tokens=128, length=64) for devices in (8, 64, 1024)]
    assert plans[0]["optimizer_GB"] >= plans[1]["optimizer_GB"] >= plans[2]["optimizer_GB"]
    assert communication(100, 2, "ddp") == 100 and communication(100, 4, "fsdp", kept=20) == 210


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "tp"])
def test_two_processes_send_what_theory_says(kind, tmp_path):
    FlashLiteForCausalLM(tiny()).save_pretrained(tmp_path)
    result = measure_parallel(kind, tmp_path, batch=2, length=16, steps=1)
    assert result["sent_over_theory"] == pytest.approx(1, abs=0.02)


def test_growth_is_fitted_and_drawn(tmp_path):
    rows = [{"work": "w", "name": "a", "length": n, "ms": 2.0 * n**2} for n in (100, 4096, 8192, 16384)]
    (fit,) = fit_growth(rows)
    assert math.isclose(fit["exponent"], 2) and (fit["from"], fit["to"], fit["over"]) == (4096, 16384, "length")
    pytest.importorskip("matplotlib")
    (path,) = draw_growth(rows, tmp_path / "bench-x")
    assert path.name == "bench-x-ms-length.svg" and "<svg" in path.read_text(encoding="utf-8")


def test_race_runs_in_turn_and_ratios_are_per_round():
    order = []
    times = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repeats=2, shortest=0.0)
    assert order == ["a", "b"] * 3 and [len(samples) for samples in times.values()] == [2, 2]
    rows = summarize_race({"a": [2.0, 4.0, 6.0], "b": [1.0, 1.0, 3.0]}, ["a"])
    assert [row["times_faster"] for row in rows] == [1.0, 2.0]
