"""Long-context retrieval texts: depth, length, and the score of an answer."""

import random

import pytest
from checkpoints import make_model, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_flashlite.measure.long_context import (
    KINDS,
    Example,
    answer_all,
    evaluate_long_context,
    make_examples,
    plot_depths,
    score,
)


class Words:
    """Counts blanks: a tokenizer for texts whose words are what matters."""

    def __call__(self, text, **kwargs):
        return {"input_ids": text.split()}


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(KINDS)), st.integers(300, 2000), st.floats(0, 1), st.integers(0, 99))
def test_a_text_holds_its_answer_at_its_depth_and_fits(kind, length, depth, seed):
    examples = make_examples(kind, Words(), length, depth, random.Random(seed))
    assert examples[0].depth == depth and len({example.prompt.rsplit("\n", 1)[0] for example in examples}) == 1
    for example in examples:
        assert length - 80 < len(example.prompt.split()) <= length
        body, question = example.prompt.rsplit("\n", 1)
        assert all(answer in body and answer not in question for answer in example.answers)
        assert score(example, f"... {body} ...") == 1 and score(example, "nothing") == 0
        if kind in ("passkey", "needle"):
            assert abs(body.index(example.answers[0]) / len(body) - example.depth) < 0.2
        if kind == "words":
            counts = sorted(body.replace(",", "").split(), key=body.split().count)
            assert min(body.count(word) for word in example.answers) > body.count(counts[0])
    assert make_examples(kind, Words(), length, depth, random.Random(seed)) == examples


def test_scores_are_shares_of_the_expected_words():
    assert score(Example("", ("X1", "X2", "X3", "X4"), 0.0), "X1, X3 and no more") == 0.5


def test_bad_input_is_refused_in_one_sentence():
    for arguments, words in (
        (("pass", 500, 0.5), "is no kind"),
        (("passkey", 500, 1.5), "between 0"),
        (("variables", 60, 0.5), "too few"),
    ):
        kind, length, depth = arguments
        with pytest.raises(ValueError, match=words):
            make_examples(kind, Words(), length, depth, random.Random(0))


def test_a_text_that_is_read_once_is_answered_as_if_read_for_each_question():
    tokenizer = make_tokenizer()
    model = make_model("causal", len(tokenizer))
    examples = make_examples("needle", tokenizer, 900, 0.3, random.Random(1))
    for example, answer in zip(examples[:3], answer_all(model, tokenizer, examples)):
        inputs = tokenizer(example.prompt, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        assert answer == tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_any_causal_model_is_asked_and_its_accuracy_drawn(tmp_path):
    tokenizer = make_tokenizer()
    model = make_model("causal", len(tokenizer))
    result = evaluate_long_context(model, tokenizer, kinds=["passkey", "words"], lengths=[900], depths=2, samples=1)
    assert {(row["kind"], row["depth"]) for row in result["rows"]} == {
        (kind, depth) for kind in ("passkey", "words") for depth in (0.0, 1.0)
    }
    assert set(result["metrics"]) == {"accuracy", "passkey 900", "words 900"}
    assert all(0 <= value <= 1 for value in result["metrics"].values())
    path = plot_depths(result["rows"], tmp_path / "depths.svg")
    assert path is None or "accuracy" in path.read_text()
