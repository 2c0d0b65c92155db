"""Metrics against their command lines, by hand, and from files of the `evaluate` library."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from modeling_flashlite.measure import metrics
from modeling_flashlite.measure.own_metrics import load_metrics, score_predictions

TEXTS = ["the cat sat on the mat", "one two three four", "When was it built? In 1889, in Paris."]
WORDS = st.lists(st.sampled_from(["a", "b", "c", "the", "cat", "sat", "mat", "dog"]), max_size=8).map(" ".join)


class TestMetrics:
    def test_bleu_and_chrf_equal_the_command_line(self, tmp_path):
        system = ["The cat sat on the mat.", "There is a dog here.", "It rains today, doesn't it?"]
        reference = ["The cat is on the mat.", "A dog is here.", "It is raining today, isn't it?"]
        (tmp_path / "ref").write_text("\n".join(reference) + "\n")
        (tmp_path / "sys").write_text("\n".join(system) + "\n")
        command = [sys.executable, "-m", "sacrebleu", str(tmp_path / "ref"), "-i", str(tmp_path / "sys")]
        command += ["-m", "bleu", "chrf", "-w", "10", "--format", "json"]
        printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        answers = [[text] for text in reference]
        assert metrics.bleu(system, answers)["bleu"] == pytest.approx(printed[0]["score"], abs=1e-8)
        assert metrics.chrf(system, answers)["chrf"] == pytest.approx(printed[1]["score"], abs=1e-8)
        assert metrics.bleu(system, answers, 0)["bleu_signature"].startswith(
            "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp"
        )

    def test_perfect_text_has_perfect_scores(self):
        texts, answers = TEXTS, [[text] for text in TEXTS]
        assert metrics.bleu(texts, answers)["bleu"] == pytest.approx(100)
        assert metrics.chrf(texts, answers)["chrf"] == pytest.approx(100)
        assert metrics.rouge(texts, answers)["rougeL"] == metrics.squad(texts, answers)["f1"] == pytest.approx(100)

    @pytest.mark.parametrize(
        ("text", "words", "bleu"),
        [
            ("यह एक परीक्षण वाक्य है।", "unicode", "13a"),
            ("这是一个测试句子。", "unicode", "zh"),
            ("これはテストの文です。", "unicode", "char"),
            ("นี่คือประโยคทดสอบ", "unicode", "char"),
            ("Это тестовое предложение здесь", "unicode", "13a"),
            ("this is a naive test", "english", "13a"),
        ],
    )
    def test_every_script_can_be_right_and_wrong(self, text, words, bleu):
        found = metrics.rouge([text], [[text]], 0) | metrics.bleu([text], [[text]], 0)
        assert found["rouge1"] == found["rougeL"] == pytest.approx(100) == found["bleu"]
        assert f"tok:{words}|" in found["rouge_signature"] and f"tok:{bleu}|" in found["bleu_signature"]
        half = text[: len(text) // 2]
        assert (
            0 < metrics.rouge([half], [[text]], 0)["rouge1"] < 100
            and 0 < metrics.squad([half], [[text]], 0)["f1"] < 100
        )
        assert metrics.rouge(["zzz"], [[text]], 0)["rougeL"] == 0

    def test_tokenizers_are_chosen_by_name(self):
        assert metrics.rouge(["running"], [["run"]], 0)["rouge1"] == 100  # stemmed
        assert metrics.rouge(["running"], [["run"]], 0, "unicode")["rouge1"] == 0
        assert "tok:char" in metrics.bleu(["a b"], [["a b"]], 0, "char")["bleu_signature"]
        with pytest.raises(ValueError, match="english, unicode"):
            metrics.rouge(["a"], [["a"]], 0, "martian")

    def test_references_may_differ_in_number(self):
        assert metrics.bleu(TEXTS, [["x", text, "y"][: 2 + i % 2] for i, text in enumerate(TEXTS)])["bleu"] > 99.9
        assert metrics.rouge(["a b"], [["x", "a b"]])["rouge1"] == 100

    @pytest.mark.parametrize("metric", [metrics.bleu, metrics.chrf, metrics.rouge])
    def test_rows_without_a_reference_are_left_out_and_counted(self, metric):
        found = metric([*TEXTS, "a", "b"], [*([text] for text in TEXTS), [], []])
        assert found == metric(TEXTS, [[text] for text in TEXTS]) | {"without_reference": 2}

    @settings(deadline=None, max_examples=50)
    @given(texts=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=5))
    def test_rouge_is_the_mean_of_rouge_score(self, texts):
        scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
        found = metrics.rouge([text for text, _ in texts], [[answer] for _, answer in texts], 0)
        for name in ("rouge1", "rouge2", "rougeL"):
            wanted = np.mean([100 * scorer.score(answer, text)[name].fmeasure for text, answer in texts])
            assert found[name] == pytest.approx(wanted)

    @pytest.mark.parametrize(
        ("text", "normal"),
        [("The  Eiffel Tower!", "eiffel tower"), ("a.b.c.", "abc"), ("an apple, the pear", "apple pear")],
    )
    def test_squad_normalisation(self, text, normal):
        assert metrics.normalize_answer(text) == normal

    @pytest.mark.parametrize(
        ("prediction", "answers", "exact", "f1"),
        [
            ("the Eiffel Tower", ["Eiffel Tower."], 100, 100),
            ("in Paris, France", ["Paris"], 0, 100 * 2 * (1 / 3) * 1 / (1 / 3 + 1)),
            ("Paris Paris", ["Paris"], 0, 100 * 2 * 0.5 * 1 / 1.5),
            ("Rome", ["Paris", "rome"], 100, 100),
            ("", [], 100, 100),
            ("Paris", [], 0, 0),
            ("", ["Paris"], 0, 0),
        ],
    )
    def test_squad_by_hand(self, prediction, answers, exact, f1):
        found = metrics.squad([prediction], [answers])
        assert found["exact_match"] == exact and found["f1"] == pytest.approx(f1)

    def test_classification_by_hand(self):
        # class 0: precision 1, recall 1/2; class 1: precision 2/3, recall 1
        found = metrics.classification([0, 1, 1, 1], [0, 0, 1, 1])
        assert found["accuracy"] == 75
        assert found["f1_macro"] == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)
        assert found["accuracy_low"] <= 75 <= found["accuracy_high"]

    def test_likelihood_by_hand(self):
        found = metrics.likelihood([math.log(8), math.log(2)], [2, 2], [3, 1], [4, 4])
        assert found["word_perplexity"] == found["token_perplexity"] == pytest.approx(2)
        assert found["bits_per_byte"] == pytest.approx(0.5)
        assert found["word_perplexity_low"] < 2 < found["word_perplexity_high"]

    def test_interval_covers_and_is_repeatable(self):
        values = np.random.default_rng(1).normal(5, 1, 400)
        found = metrics.with_interval("x", values)
        assert found == metrics.with_interval("x", values)
        assert found["x_high"] - found["x_low"] == pytest.approx(2 * 1.96 / 20, rel=0.15)
        assert found["x_low"] < found["x"] < found["x_high"]

    @pytest.mark.parametrize("metric", metrics.METRICS.values())
    def test_refuses_nothing_and_unequal_numbers(self, metric):
        for predictions, references in (([], []), (["a"], [["a"], ["b"]])):
            with pytest.raises(ValueError, match="predictions and .* references"):
                metric(predictions, references)

    def test_refuses_references_without_text(self):
        with pytest.raises(ValueError, match="All references are empty"):
            metrics.bleu(["a"], [[]])
        with pytest.raises(ValueError, match="All references are empty"):
            metrics.rouge(["a"], [[]])
        with pytest.raises(ValueError, match="No words, tokens or bytes"):
            metrics.likelihood([], [], [], [])


OWN_METRIC = """
import datasets
import evaluate

class Length(evaluate.Metric):
    def _info(self):
        kinds = {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
        features = datasets.Features(kinds)
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        pairs = list(zip(predictions, references))
        return {"ratio": sum(len(a) / len(b) for a, b in pairs) / len(pairs), "signature": "characters"}
"""


def test_metrics_of_ones_own_are_loaded_from_a_file_and_combined(tmp_path):
    for name in ("length", "again"):
        (tmp_path / f"{name}.py").write_text(OWN_METRIC)
    metrics = load_metrics([str(tmp_path / "length.py"), str(tmp_path / "again.py")])
    rows = [{"prediction": "ab", "references": ["abcd"]}, {"prediction": "abc", "references": ["abc"]}]
    assert score_predictions(metrics, rows) == {"length_ratio": 0.75, "again_ratio": 0.75}
    with pytest.raises(ValueError, match="Two metrics are called 'length'"):
        load_metrics([str(tmp_path / "length.py")] * 2)
    with pytest.raises(ValueError, match="metric .*none.py' cannot be loaded"):
        load_metrics([str(tmp_path / "none.py")])
