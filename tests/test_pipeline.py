"""The pipelines for text to text and for extractive answers: results, batching, long input, settings, refusals."""

import pytest
import torch
from checkpoints import make_model, make_tokenizer, save_checkpoint
from transformers import pipeline

from modeling_flashlite.pipeline_flashlite import (
    SHORT_NAMES,
    FlashLitePipeline,
    FlashLiteQuestionAnsweringPipeline,
    fill_template,
)

CONTEXT = "The Licensor grants a licence. It is free of charge! You may copy the Work near the river. " * 8


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(add_eos_token=True)


@pytest.fixture(scope="module")
def pipe(tokenizer):
    model = make_model("seq2seq", len(tokenizer))
    # random weights would end at once or never
    model.generation_config.update(max_new_tokens=6, eos_token_id=None)
    return FlashLitePipeline(model, tokenizer=tokenizer, task="text2text-generation", device="cpu")


@pytest.fixture(scope="module")
def reader(tokenizer):
    return FlashLiteQuestionAnsweringPipeline(
        make_model("reader", len(tokenizer)), tokenizer=tokenizer, task="question-answering", device="cpu"
    )


@pytest.mark.parametrize(
    ("task", "key"),
    [
        (None, "generated_text"),
        ("translation", "translation_text"),
        ("translation_en_to_de", "translation_text"),
        ("summarize", "summary_text"),
    ],
)
def test_result_has_the_shape_of_transformers_4(pipe, task, key):
    assert [list(result) for result in pipe("Hello there.", task=task)] == [[key]]
    many = pipe(["Hello there.", "Good bye."], task=task)
    assert len(many) == 2 and all(list(result) == [key] for result in many)
    assert pipe([], task=task) == []


def test_batches_equal_single_calls(pipe):
    texts = ["One.", "Two words here, and then some more of them.", "Three!"]
    assert pipe(texts, batch_size=3) == [pipe(text)[0] for text in texts]


def test_generator_is_read_lazily(pipe):
    seen = []

    def texts():
        for number in range(100):
            seen.append(number)
            yield f"Text {number}."

    results = iter(pipe(texts(), batch_size=2))
    next(results)
    assert len(seen) <= 6


def test_long_input_is_read_in_pieces_at_sentence_ends(pipe, tokenizer):
    count = lambda text: len(tokenizer(text)["input_ids"])  # noqa: E731
    pieces = FlashLitePipeline._cut(CONTEXT, count, 60)
    assert len(pieces) > 3 and max(map(count, pieces)) <= 60
    assert " ".join(pieces).split() == CONTEXT.split()
    assert all(piece.rstrip()[-1] in ".!" for piece in pieces)
    whole = pipe(CONTEXT, max_input_tokens=60, batch_size=2)
    assert whole[0]["generated_text"] == " ".join(pipe(piece)[0]["generated_text"].strip() for piece in pieces)
    assert pipe(CONTEXT, max_input_tokens=60, truncation=True) == pipe(pieces[0])
    # no sentence ends, no spaces: words, then characters
    assert all(count(piece) <= 12 for piece in FlashLitePipeline._cut("word " * 50 + "x" * 80, count, 12))


def test_prompts_come_from_arguments_and_config(pipe, tokenizer):
    assert pipe("b", prefix="a ") == pipe("a b") == pipe("b", template="a {text}")
    prompt = "translate en to de: b"
    template = "translate {src_lang} to {tgt_lang}: {text}"
    assert pipe("b", template=template, src_lang="en", tgt_lang="de") == pipe(prompt)
    pipe.model.config.task_specific_params = {"translation": {"template": template, "max_new_tokens": 3}}
    try:
        by_name = pipe("b", task="translation_en_to_de", return_tensors=True)[0]["output_token_ids"]
        by_hand = pipe(prompt, return_tensors=True, max_new_tokens=3)[0]["output_token_ids"]
        assert by_name.tolist() == by_hand.tolist()
    finally:
        del pipe.model.config.task_specific_params
    assert fill_template("{text} {other}", {"text": "{question}", "question": "no"}) == "{question} {other}"


def test_generation_arguments_reach_generate(pipe):
    results = pipe("Hello", num_beams=3, num_return_sequences=2)
    assert len(results) == 2
    assert [len(result) for result in pipe(["a", "b"], num_beams=2, num_return_sequences=2)] == [2, 2]
    ids = pipe("Hello", max_new_tokens=3, return_tensors=True)[0]["output_token_ids"]
    assert len(ids) == 4  # the start token and three more


def test_generative_answer_takes_the_most_probable_piece(pipe):
    answer = pipe(question="Who grants?", context=CONTEXT, task="answer", max_input_tokens=80)
    assert set(answer) == {"score", "answer"} and 0 < answer["score"] <= 1
    pair = {"question": "Who grants?", "context": CONTEXT}
    many = pipe([pair, pair], task="answer", max_input_tokens=80, batch_size=4)
    assert [entry["answer"] for entry in many] == [answer["answer"]] * 2
    assert [entry["score"] for entry in many] == pytest.approx([answer["score"]] * 2, rel=1e-3)


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ("", {}, "non-empty string"),
        (3, {}, "non-empty string"),
        ("text", {"task": "nonsense"}, "Unknown task 'nonsense'"),
        ("text", {"max_input_tokens": 0}, "at least 1"),
        ("a " * 50, {"max_input_tokens": 4, "prefix": "a very long prefix "}, "template alone takes"),
        ({"question": "who?"}, {"task": "answer"}, "question and context"),
    ],
)
def test_bad_input_is_one_sentence(pipe, inputs, arguments, message):
    with pytest.raises(ValueError, match=message):
        pipe(inputs, **arguments)


def test_decoder_is_refused(tokenizer):
    with pytest.raises(ValueError, match="needs an encoder-decoder"):
        FlashLitePipeline(make_model("causal", len(tokenizer)), tokenizer=tokenizer, device="cpu")


def test_reader_marks_a_span_of_the_context(reader):
    answer = reader(question="Who grants?", context=CONTEXT)
    assert set(answer) == {"score", "start", "end", "answer"}
    assert CONTEXT[answer["start"] : answer["end"]] == answer["answer"] == answer["answer"].strip()
    pair = {"question": "Who grants?", "context": CONTEXT}
    best = reader(pair, top_k=3, max_seq_len=60, doc_stride=20)
    assert len(best) == 3 and best[0]["score"] >= best[1]["score"] >= best[2]["score"]
    many = reader([pair, pair], top_k=3, max_seq_len=60, doc_stride=20, batch_size=4)
    for row in many:
        assert [entry["start"] for entry in row] == [entry["start"] for entry in best]


def test_reader_agrees_with_the_model(reader, tokenizer):
    question, context = "Who?", "The Licensor grants it."
    answer = reader(question=question, context=context, max_answer_len=50)
    encoded = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets, sources = encoded.pop("offset_mapping")[0].tolist(), encoded.sequence_ids(0)
    inside = [index for index, source in enumerate(sources) if source == 1 and offsets[index][1]]
    with torch.no_grad():
        outputs = reader.model(**{name: encoded[name] for name in ("input_ids", "attention_mask")})
    start, end = (x[0, inside].softmax(-1) for x in (outputs.start_logits, outputs.end_logits))
    score, first, last = max((float(start[i] * end[j]), i, j) for i in range(len(start)) for j in range(i, len(end)))
    assert answer["score"] == pytest.approx(score, rel=1e-4)
    assert answer["answer"] == context[offsets[inside[first]][0] : offsets[inside[last]][1]].strip()


def test_reader_may_answer_nothing(reader):
    answers = reader(question="Who?", context="Nobody knows.", handle_impossible_answer=True, top_k=500)
    assert sum(answer["answer"] == "" for answer in answers) == 1
    assert all(answer["answer"] for answer in reader(question="Who?", context="Nobody knows.", top_k=50))
    with pytest.raises(ValueError, match="leaves no room for its context in"):
        reader(question="Who is it?", context="Nobody", max_seq_len=3)


def test_names_are_registered_with_the_package(tmp_path):
    folder = save_checkpoint("seq2seq", tmp_path / "model")
    for name in SHORT_NAMES:
        assert isinstance(pipeline(name, model=str(folder), device="cpu"), FlashLitePipeline)
    pipeline("translate", model=str(folder), device="cpu").save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "pipeline_flashlite.py").is_file()
    again = pipeline(model=str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    assert again.task == "text2text-generation"
