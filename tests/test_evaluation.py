"""Likelihoods against brute force, generation, extraction and classes, and tasks end to end."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import ClassLabel, Dataset
from verbs import argument_classes, load_script

from modeling_flashlite import (
    FlashLiteForCausalLM,
    FlashLiteForConditionalGeneration,
    FlashLiteForQuestionAnswering,
    FlashLiteForSequenceClassification,
)
from modeling_flashlite.checkpoint import CheckpointArgs, load_for_task
from modeling_flashlite.cli import parse_args
from modeling_flashlite.data.tasks import TASKS, get_task, resolve_task
from modeling_flashlite.data.tokenization import train_tokenizer
from modeling_flashlite.measure import cost as measurement
from modeling_flashlite.measure import perplexity
from modeling_flashlite.measure.evaluation import classify, evaluate_task, extract_answers, generate_texts
from modeling_flashlite.training.lora import add_lora

ROOT = Path(__file__).resolve().parents[1]
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
        endless = copy.deepcopy(tokenizer)
        endless.eos_token = None
        lines, _ = perplexity.text_likelihood(make(FlashLiteForCausalLM), endless, rows, end="\n")
        assert lines["tokens"] == found["tokens"]
        with pytest.raises(ValueError, match="no end-of-sequence token to close documents with"):
            perplexity.text_likelihood(make(FlashLiteForCausalLM), endless, rows)
        assert found["bytes"] == len("\n".join(rows)) + 1
        document, _ = perplexity.text_likelihood(make(FlashLiteForCausalLM), tokenizer, ["\n".join(rows)], end="\n")
        hub, _ = perplexity.text_likelihood(
            make(FlashLiteForCausalLM), tokenizer, [f"{row}\n" if row else row for row in rows], end="\n"
        )
        assert hub["words"] == document["words"] == found["words"]
        assert hub["bytes"] == document["bytes"] == found["bytes"]

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
        with pytest.raises(ValueError, match="No labels were scored"):
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

    def test_a_long_question_is_cut(self, tokenizer):
        asked = [("When? " * 90, "it was built in 1889"), ("How?", "in 42 ways")]
        assert extract_answers(self.Pointer(tokenizer), tokenizer, asked, max_source_length=64) == ["1889", "42"]

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
        add_lora(FlashLiteForCausalLM.from_pretrained(tmp_path), r=2).save_pretrained(tmp_path / "adapter")
        both, weights = (
            measurement.model_size(model, tmp_path / "adapter"),
            tmp_path / "adapter/adapter_model.safetensors",
        )
        assert both["weight_bytes"] == sizes["weight_bytes"] + weights.stat().st_size
        assert both["bits_per_weight"] > sizes["bits_per_weight"] and both["parameters"] == sizes["parameters"]


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

    def test_names_are_numbered_only_if_they_are_all_of_a_nameless_model_s(self, make, tokenizer):
        model = make(FlashLiteForSequenceClassification, num_labels=3)
        for labels in (["positive", "neutral", "negative"], ["neutral", "positive", "neutral"]):
            rows = Dataset.from_dict({"text": TEXTS, "label": labels})
            data = resolve_task(get_task("classification"), rows, config=model.config)
            if len(set(labels)) == 3:
                found = evaluate_task(data, model, tokenizer, rows, resamples=0)
                assert [row["references"] for row in found["predictions"]] == [2, 1, 0]
            else:  # which of the three the two are is unknown
                with pytest.raises(
                    ValueError, match="are neutral, positive, but the model's are LABEL_0, LABEL_1, LABE"
                ):
                    evaluate_task(data, model, tokenizer, rows, resamples=0)


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


def test_the_limit_is_not_that_of_the_examples(make, tokenizer, tmp_path):
    make(FlashLiteForCausalLM).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for split, count in (("train", 3), ("test", 2)):
        (tmp_path / f"{split}.csv").write_text("source,target\n" + "1,2\n" * count)
    script = load_script("evaluate")
    argv = [
        f"--model={tmp_path}",
        "--task=translation",
        f"--dataset=train={tmp_path}/train.csv,test={tmp_path}/test.csv",
    ]
    argv += ["--shots=3", "--limit=1", "--max_new_tokens=2", "--speed_prompts=0", "--resamples=0"]
    argv += [f"--output={tmp_path}/out.json", f"--predictions={tmp_path}/found.json"]
    script.main(*parse_args(argument_classes(script), argv))
    (row,) = json.loads((tmp_path / "found.json").read_text())
    assert row["input"].count("<|assistant|>2<|end|>") == 3 and row["references"] == ["2"]


def test_a_head_that_was_not_trained_is_not_evaluated(make, tmp_path):
    make(FlashLiteForCausalLM).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no weights for score.bias, .* was not trained for classification"):
        load_for_task(CheckpointArgs(str(tmp_path)), get_task("classification"))
