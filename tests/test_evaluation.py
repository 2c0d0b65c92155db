"""Metrics against known values and the original programs, likelihoods against brute force, tasks end to end."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from modeling_flashlite import (
    FlashLiteForCausalLM,
    FlashLiteForConditionalGeneration,
    FlashLiteForQuestionAnswering,
    FlashLiteForSequenceClassification,
)
from modeling_flashlite.checkpoint import CheckpointArgs, load_for_task
from modeling_flashlite.data.tasks import TASKS, get_task, resolve_task
from modeling_flashlite.data.tokenization import train_tokenizer
from modeling_flashlite.measure import cost as measurement
from modeling_flashlite.measure import metrics, perplexity, results
from modeling_flashlite.measure.evaluation import classify, evaluate_task, extract_answers, generate_texts
from modeling_flashlite.measure.own_metrics import load_metrics, score_predictions

ROOT = Path(__file__).resolve().parents[1]
WORDS = st.lists(st.sampled_from(["a", "b", "c", "the", "cat", "sat", "mat", "dog"]), max_size=8).map(" ".join)
TEXTS = ["the cat sat on the mat", "one two three four", "When was it built? In 1889, in Paris."]
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 5, 300)


@pytest.fixture
def make(tiny_config, tokenizer):
    def build(model_class, **overrides):
        return model_class(tiny_config(vocab_size=len(tokenizer), **IDS, **overrides)).eval()

    return build


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
        assert metrics.chrf(["a", "b"], [["a"], []]) == metrics.chrf(["a", "b"], [["a"], [""]])
        with pytest.raises(ValueError, match="No words, tokens or bytes"):
            metrics.likelihood([], [], [], [])


class TestPerplexity:
    ROWS = ["the cat sat", "on the mat", "", "one two three four 1889", "in Paris"]

    @staticmethod
    def brute_force(model, tokenizer, rows, window):
        """Sum of the losses of all tokens; the one after `place` is predicted from `window(place)` to `place`."""
        tokens = [2] + [token for row in rows for token in [*tokenizer(row)["input_ids"], 2]]
        total = 0.0
        with torch.no_grad():
            for start in {window(place) for place in range(len(tokens) - 1)}:
                losses = -model(input_ids=torch.tensor([tokens[start:]])).logits[0].log_softmax(-1)
                places = [place for place in range(start, len(tokens) - 1) if window(place) == start]
                total += sum(float(losses[place - start, tokens[place + 1]]) for place in places)
        return total

    def nll(self, found):
        return math.log(found["token_perplexity"]) * found["tokens"]

    @pytest.mark.parametrize(("stride", "batch_size"), [(16, 1), (16, 3), (4, 2), (5, 4)])
    def test_windows_equal_brute_force(self, make, tokenizer, stride, batch_size):
        model = make(FlashLiteForCausalLM)
        options = {"segment_length": 16, "stride": stride, "batch_size": batch_size, "memory": False}
        found, protocol = perplexity.text_likelihood(model, tokenizer, self.ROWS, **options)
        # the input at `place` is read in the first window that reaches it
        wanted = self.brute_force(model, tokenizer, self.ROWS, lambda p: max(0, -(-(p + 1 - 16) // stride)) * stride)
        assert self.nll(found) == pytest.approx(wanted, rel=1e-5)
        assert (protocol["memory"], protocol["stride"]) == (False, stride)

    @pytest.mark.parametrize("length", [8, 13])
    def test_memory_of_everything_equals_one_pass(self, make, tokenizer, length):
        model = make(FlashLiteForCausalLM, memory_blocks=None, relevance_top_k=None)
        found, protocol = perplexity.text_likelihood(model, tokenizer, self.ROWS, segment_length=length)
        wanted = self.brute_force(model, tokenizer, self.ROWS, lambda place: 0)
        assert self.nll(found) == pytest.approx(wanted, rel=1e-4)
        assert protocol["memory"] is True and protocol["streams"] == 1

    def test_streams_start_with_an_empty_memory(self, make, tokenizer):
        model = make(FlashLiteForCausalLM, memory_blocks=None, relevance_top_k=None)
        found, _ = perplexity.text_likelihood(model, tokenizer, self.ROWS, segment_length=8, batch_size=3)
        steps = -(-found["tokens"] // 24)
        wanted = self.brute_force(model, tokenizer, self.ROWS, lambda place: place // (8 * steps) * 8 * steps)
        assert self.nll(found) == pytest.approx(wanted, rel=1e-4)

    def test_more_streams_than_segments(self, make, tokenizer):
        model = make(FlashLiteForCausalLM)
        found, _ = perplexity.text_likelihood(model, tokenizer, ["one"], segment_length=64, batch_size=4)
        assert found["tokens"] == len(tokenizer("one")["input_ids"]) + 1

    def test_words_are_those_of_wikitext(self, make, tokenizer):
        """One per blank-separated word, one per line, blank lines included, whatever the tokenizer makes of them."""
        rows = [" = Title = ", "", " one two @-@ three . "]
        found, _ = perplexity.text_likelihood(make(FlashLiteForCausalLM), tokenizer, rows, end="\n")
        assert found["words"] == 3 + 1 + 1 + 5 + 1
        assert found["bytes"] == len("\n".join(rows)) + 1
        document, _ = perplexity.text_likelihood(make(FlashLiteForCausalLM), tokenizer, ["\n".join(rows)], end="\n")
        assert (document["words"], document["bytes"]) == (found["words"], found["bytes"])

    def test_uniform_model_has_the_perplexity_of_its_vocabulary(self, make, tokenizer):
        model = make(FlashLiteForCausalLM)
        torch.nn.init.zeros_(model.lm_head.weight)
        found, _ = perplexity.text_likelihood(model, tokenizer, self.ROWS)
        assert found["token_perplexity"] == pytest.approx(len(tokenizer))
        assert found["bits_per_byte"] == pytest.approx(found["tokens"] * math.log2(len(tokenizer)) / found["bytes"])

    def test_label_likelihood_equals_the_loss(self, make):
        for model_class, encoder_decoder in ((FlashLiteForCausalLM, False), (FlashLiteForConditionalGeneration, True)):
            model = make(model_class, is_encoder_decoder=encoder_decoder)
            batch = {"input_ids": torch.randint(3, 90, (3, 9)), "labels": torch.randint(3, 90, (3, 9))}
            batch["labels"][0, 4:] = -100
            found = perplexity.label_likelihood(
                model, [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
            )
            assert found["loss"] == pytest.approx(model(**batch).loss.item(), rel=1e-4)

    def test_refusals(self, make, tokenizer):
        model = make(FlashLiteForCausalLM)
        with pytest.raises(ValueError, match="There are 0 rows to score"):
            perplexity.text_likelihood(model, tokenizer, [])
        with pytest.raises(ValueError, match="segment_length is 8, stride 9 and batch_size 1"):
            perplexity.text_likelihood(model, tokenizer, ["a"], segment_length=8, stride=9)
        with pytest.raises(ValueError, match="stride is 4 with memory"):
            perplexity.text_likelihood(model, tokenizer, ["a"], segment_length=8, stride=4)
        with pytest.raises(ValueError, match="has no segment memory"):
            perplexity.text_likelihood(torch.nn.Linear(1, 1), tokenizer, ["a"], memory=True)
        with pytest.raises(ValueError, match="0 labels"):
            perplexity.label_likelihood(model, [])


class TestGeneration:
    @pytest.mark.parametrize("model_class", [FlashLiteForCausalLM, FlashLiteForConditionalGeneration])
    def test_batches_equal_single_prompts_in_order(self, make, tokenizer, model_class):
        model = make(model_class, is_encoder_decoder=model_class is FlashLiteForConditionalGeneration)
        prompts = ["one", TEXTS[0], "two three", TEXTS[2], "four"]
        options = {"max_new_tokens": 6, "do_sample": False}
        together = generate_texts(model, tokenizer, prompts, batch_size=3, **options)
        assert together == [generate_texts(model, tokenizer, [prompt], **options)[0] for prompt in prompts]
        assert not any("<pad>" in text for text in together)

    def test_templates_end_generation(self, make, tokenizer):
        model = make(FlashLiteForCausalLM)
        # where the model can only close the turn, generation stops at once
        allowed = [tokenizer.convert_tokens_to_ids("<|end|>")]
        texts = generate_texts(
            model, tokenizer, ["<|user|>one<|end|><|assistant|>"], templated=True, max_new_tokens=50,
            prefix_allowed_tokens_fn=lambda batch, ids: allowed,
        )  # fmt: skip
        assert texts == [""]

    def test_refuses_an_empty_batch_size(self, make, tokenizer):
        with pytest.raises(ValueError, match="batch_size is 0"):
            generate_texts(make(FlashLiteForCausalLM), tokenizer, ["a"], batch_size=0)


class TestExtraction:
    class Pointer(torch.nn.Module):
        """Points at the token that holds a digit; at the first token where there is none."""

        def __init__(self, tokenizer):
            super().__init__()
            self.tokenizer, self.device = tokenizer, torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            digits = torch.tensor([[self.tokenizer.decode([token]).isdigit() for token in row] for row in input_ids])
            start = digits & ~torch.nn.functional.pad(digits[:, :-1], (1, 0), value=False)
            end = digits & ~torch.nn.functional.pad(digits[:, 1:], (0, 1), value=False)
            start[:, 0] = end[:, 0] = ~digits.any(1)
            return type("Output", (), {"start_logits": start.float() * 9, "end_logits": end.float() * 9})

    @pytest.mark.parametrize("length", [64, 24])
    def test_finds_spans_across_windows_and_batches(self, tokenizer, length):
        asked = [
            ("When?", TEXTS[0] + " it was built in 1889 " + TEXTS[0] * 2),
            ("How?", "in 42 ways"),
            ("Who?", TEXTS[0]),
        ]
        found = extract_answers(
            self.Pointer(tokenizer),
            tokenizer,
            asked,
            allow_empty=True,
            batch_size=2,
            max_source_length=length,
            stride=8,
        )
        assert found == ["1889", "42", ""]

    def test_an_answer_is_always_given_unless_none_is_allowed(self, tokenizer):
        [text] = extract_answers(self.Pointer(tokenizer), tokenizer, [("Who?", TEXTS[0])])
        assert text and text in TEXTS[0]


class TestMeasurement:
    def test_speed_rows(self, make, tokenizer):
        rows = measurement.measure_generation(make(FlashLiteForCausalLM), tokenizer, TEXTS, new_tokens=3, repeats=2)
        assert [row["unit"] for row in rows] == ["ms", "ms/token", "tokens/s", "sentences/s"] * 2
        assert {row["name"].rpartition(" ")[2] for row in rows} == {"1", "3"}
        assert all(row["spread"][0] <= row["value"] <= row["spread"][1] for row in rows)
        with pytest.raises(ValueError, match="new_tokens is 1"):
            measurement.measure_generation(make(FlashLiteForCausalLM), tokenizer, TEXTS, new_tokens=1)

    def test_sizes(self, make, tmp_path):
        model = make(FlashLiteForCausalLM)
        model.save_pretrained(tmp_path)
        sizes = measurement.model_size(model, tmp_path)
        assert sizes["parameters"] == sum(parameter.numel() for parameter in model.parameters())
        assert sizes["weight_bytes"] == (tmp_path / "model.safetensors").stat().st_size
        assert 32 < sizes["bits_per_weight"] < 40
        assert sizes["file_bytes"] > sizes["weight_bytes"]
        assert measurement.peak_memory_bytes() > 2**20


class TestResults:
    def test_file_has_what_a_table_needs(self, tmp_path):
        path = tmp_path / "deep" / "result.json"
        content = results.write_results(path, {"bleu": np.float32(1.5)}, task="translation", seed=3, speed=[])
        read = json.loads(path.read_text())
        assert read["metrics"] == {"bleu": 1.5} and read["seeds"] == [3] and read["speed"] == []
        assert {"hardware", "versions", "commit", "command", "date"} <= set(read) == set(content)
        assert list(path.parent.iterdir()) == [path]

    def test_failed_write_leaves_the_old_file(self, tmp_path):
        path = tmp_path / "result.json"
        results.write_json(path, {"a": 1})
        with pytest.raises(ValueError):
            results.write_json(path, {"a": float("nan")})
        assert json.loads(path.read_text()) == {"a": 1} and len(list(tmp_path.iterdir())) == 1

    def test_paths_are_relative(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        text = f"--dataset train={tmp_path}/a.jsonl,test={tmp_path}/b.jsonl --lr 1/2 --task a/b"
        assert results.relative_paths(text) == "--dataset train=a.jsonl,test=b.jsonl --lr 1/2 --task a/b"
        monkeypatch.setattr(sys, "argv", [f"{tmp_path}/scripts/x.py", "--model", f"{tmp_path}/run"])
        assert results.command_line() == "python scripts/x.py --model run"


DATA = {
    "translation": {"source": TEXTS, "target": TEXTS},
    "text2text-generation": {"source": TEXTS, "target": TEXTS},
    "summarization": {"document": TEXTS, "summary": TEXTS},
    "extractive-qa": {"question": TEXTS, "context": TEXTS, "answers": [{"text": ["on"], "answer_start": [12]}] * 3},
    "abstractive-qa": {"question": TEXTS, "context": TEXTS, "answers": [["on"], ["two"], ["1889"]]},
    "chat": {
        "messages": [[{"role": "user", "content": text}, {"role": "assistant", "content": text}] for text in TEXTS]
    },
    "text-generation": {"text": TEXTS},
    "classification": {"text": TEXTS, "label": ["good", "bad", "good"]},
}
CLASSES = {"extractive-qa": FlashLiteForQuestionAnswering, "classification": FlashLiteForSequenceClassification}


@pytest.mark.parametrize("encoder_decoder", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_evaluated(name, encoder_decoder, make, tokenizer):
    generative = FlashLiteForConditionalGeneration if encoder_decoder else FlashLiteForCausalLM
    model = make(CLASSES.get(name, generative), is_encoder_decoder=encoder_decoder)
    rows = Dataset.from_dict(DATA[name])
    found = evaluate_task(
        resolve_task(get_task(name), rows, config=model.config),
        model,
        tokenizer,
        rows,
        generation={"max_new_tokens": 4},
        max_source_length=64,
        resamples=20,
    )
    assert found["examples"] == 3 and found["metrics"]
    assert ("token_perplexity" in found["metrics"]) == (name in ("chat", "text-generation"))
    # the continuations of an encoder-decoder have no interval
    assert set(found["intervals"]) == set(found["metrics"]) - {"loss"} or "loss" in found["metrics"]
    assert len(found["predictions"]) == (0 if name == "text-generation" else 3)
    json.dumps(found)


def test_labels_by_name_follow_the_model(make, tokenizer):
    model = make(FlashLiteForSequenceClassification, id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    rows = Dataset.from_dict(DATA["classification"])
    found = evaluate_task(resolve_task(get_task("classification"), rows, config=model.config), model, tokenizer, rows)
    assert [record["references"] for record in found["predictions"]] == [0, 1, 0]
    assert [record["prediction"] for record in found["predictions"]] == classify(model, tokenizer, TEXTS)


class TestClasses:
    """Accuracy compares names, since two label sets may number them differently."""

    NAMES = ("negative", "neutral", "positive")

    @pytest.fixture
    def judged(self, make, tokenizer):
        """The model's own answers as labels of a data set, so that its accuracy is 100."""
        table = dict(enumerate(self.NAMES))
        model = make(FlashLiteForSequenceClassification, id2label=table, label2id={v: k for k, v in table.items()})
        texts = [f"{text} {number}" for number in range(3) for text in TEXTS]
        answers = [self.NAMES[label] for label in classify(model, tokenizer, texts)]

        def accuracy(labels, names=None):
            rows = Dataset.from_dict({"text": texts, "label": labels})
            if names:
                rows = rows.cast_column("label", ClassLabel(names=list(names)))
            data = resolve_task(get_task("classification"), rows, config=model.config)
            found = evaluate_task(data, model, tokenizer, rows, resamples=0)
            return found["metrics"]["accuracy"], found["details"]

        return model, answers, accuracy

    def test_the_order_of_the_data_does_not_matter(self, judged):
        _, answers, accuracy = judged
        names = self.NAMES[::-1]
        assert accuracy([names.index(answer) for answer in answers], names)[0] == 100
        assert accuracy(answers)[0] == accuracy([answer.upper() for answer in answers])[0] == 100
        assert accuracy([self.NAMES.index(answer) for answer in answers])[0] == 100  # bare numbers

    @pytest.mark.parametrize("numbered", [False, True])
    def test_an_unknown_name_is_a_wrong_answer(self, judged, numbered):
        _, answers, accuracy = judged
        answers = ["mixed", *answers[1:]]
        names = ("mixed", *self.NAMES[::-1]) if numbered else None
        value, details = accuracy([names.index(answer) for answer in answers] if numbered else answers, names)
        assert value == pytest.approx(100 * 8 / 9) and details["unknown_labels"] == "mixed (1 rows)"

    def test_sets_without_a_common_name_are_refused(self, judged):
        with pytest.raises(ValueError, match="are bad, good, but the model's are negative, neutral, positive"):
            judged[2](["good", "bad", "good"] * 3)

    def test_rows_without_a_class_are_refused(self, judged):
        with pytest.raises(ValueError, match="1 rows without a label"):
            judged[2]([-1, 1, 2] + [0] * 6, None)
        with pytest.raises(ValueError, match=r"2\.5"):
            judged[2]([2.5] * 9)

    def test_a_model_without_names_is_compared_by_number(self, judged):
        model, answers, accuracy = judged
        model.config.id2label = {number: f"LABEL_{number}" for number in range(3)}
        value, details = accuracy([self.NAMES.index(answer) for answer in answers], self.NAMES)
        assert value == 100 and "by number" in details["labels"]
        assert accuracy(answers)[0] == 100 or len(set(answers)) < 3  # in alphabetical order


def test_script_writes_one_results_file(make, tokenizer, tmp_path):
    model = make(FlashLiteForCausalLM)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(TEXTS * 3))
    command = [sys.executable, str(ROOT / "scripts" / "evaluate.py"), "--model", "model", "--task", "text-generation"]
    command += ["--dataset", "test=text.txt", "--end", "newline", "--segment_length", "8", "--memory_blocks", "2"]
    command += ["--speed_prompts", "2", "--speed_tokens", "3", "--output", "out.json", "--label", "tiny text"]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    # a script called evaluate.py does not hide the library of that name
    refused = subprocess.run(
        [*command, "--task", "translation", "--metrics", "none.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert "'none.py' cannot be loaded" in refused.stderr and refused.returncode == 2
    printed = json.loads(done.stdout.splitlines()[-1])
    written = json.loads((tmp_path / "out.json").read_text())
    assert printed["word_perplexity"] == written["metrics"]["word_perplexity"] > 1
    assert written["dataset"] == "tiny text" and written["protocol"]["memory_blocks"] == 2
    assert (
        written["size"]["parameters"] > 0 and written["speed"] and str(tmp_path) not in json.dumps(written["command"])
    )


def test_a_head_that_was_not_trained_is_not_evaluated(make, tmp_path):
    make(FlashLiteForCausalLM).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no weights for score.bias, .* was not trained for classification"):
        load_for_task(CheckpointArgs(str(tmp_path)), get_task("classification"))


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
