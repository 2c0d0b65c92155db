"""The study of perplexity over bits: what it writes is what was measured, whole files included."""

import json

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from verbs import TINY_SHAPE, load_script, run_verb, write_corpus

from modeling_flashlite.cli import parse_args


@pytest.mark.parametrize("tokens", [64, 0])
def test_every_rate_is_measured_from_its_file(tokens, tmp_path, capsys):
    dataset = write_corpus(tmp_path)
    run_verb("train_tiny", dataset, tmp_path / "base", [*TINY_SHAPE, "--vocab_size=300"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    text = tmp_path / "text.txt"
    text.write_text("A small text of some words.\nAnd a second line.\n" * 20, encoding="utf-8")
    script, output = load_script("compression"), tmp_path / "results.json"
    argv = [f"--model={tmp_path / 'llama'}", f"--dataset=train={text},test={text}", "--rates", "4", "6"]
    argv += [f"--tokens={tokens}", "--length=16", "--limit=20", f"--output={output}"]
    (args,) = parse_args((script.StudyArgs,), argv)
    script.main(args)
    results = json.loads(output.read_text(encoding="utf-8"))
    metrics, points = results["metrics"], results["points"]
    assert [point["target"] for point in points] == [None, 6, 4]
    for point in points[1:]:
        assert 0.96 * point["target"] < point["bits"] <= point["target"]
        assert len(point["answers"]) == len(script.QUESTIONS)
    assert points[2]["increase"] == pytest.approx(points[2]["perplexity"] / points[0]["perplexity"] - 1)
    method = "calibrated" if tokens else "data-free"
    assert metrics[f"perplexity {method} 4.0"] == points[2]["perplexity"]
