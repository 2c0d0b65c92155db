"""What may stand in a cell: texts, numbers, answers and conversations in every form, and nothing."""

import json

import pytest
from datasets import Dataset

from modeling_flashlite.data.batching import join_rows
from modeling_flashlite.data.conversations import messages_of
from modeling_flashlite.data.preprocessing import answer_span, preprocess
from modeling_flashlite.data.tasks import (
    TaskData,
    chat_turns,
    get_task,
    prompts_and_references,
    references_of,
    resolve_task,
    texts_of,
)
from modeling_flashlite.data.tokenization import train_tokenizer

CONTEXT = "The tower was built in 1889 by Gustave Eiffel, and it stands in Paris."
MESSAGES = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CONTEXT, "one two three four five six", "eins zwei drei"] * 5, 320)


def test_texts_are_read_out_of_any_cell():
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert texts_of(messages) == ["one", "two"] and texts_of("a") == ["a"] and texts_of(3) == []
    assert texts_of({"text": ["1889"], "answer_start": [23]}) == ["1889"]
    assert texts_of([{"from": "human", "value": "one"}]) == ["one"] and texts_of({"x": 1}) == []


def test_conversations_of_sharegpt_are_messages():
    turns = [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]
    messages = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    assert messages_of(turns) == messages and messages_of(messages) == messages


def test_conversations_of_every_form():
    messages = [{"role": "user", "content": "one two"}, {"role": "assistant", "content": ""}]
    assert messages_of(None) == [] and messages_of(json.dumps(messages)) == messages
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": " two"}]
    assert messages_of([{"role": "user", "content": parts}, {"role": "assistant", "content": None}]) == messages
    assert messages_of([{"from": "human", "value": "one two"}, {"from": "gpt", "value": None}]) == messages
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    assert messages_of([call]) == [{**call, "content": ""}] and chat_turns(messages_of([*messages[:1], call])) == []
    assert messages_of([{"role": "developer", "content": 1, "tool_calls": None}]) == [
        {"role": "system", "content": "1"}
    ]
    for odd in (
        "one",
        {"role": "user"},
        ["one"],
        [{"content": "one"}],
        [{"role": "user", "content": [{"type": "image"}]}],
    ):
        with pytest.raises(ValueError, match="A (conversation is|message is|message has the part) .*"):
            messages_of(odd)


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_rows_without_a_conversation_give_no_example(encoder_decoder, tokenizer):
    rows = Dataset.from_dict({"messages": [None, MESSAGES]})
    data = resolve_task(get_task("chat"), rows, encoder_decoder=encoder_decoder)
    limits = {"max_source_length": 64, "max_target_length": 16}
    whole = preprocess(data, rows.select([1]), tokenizer, **limits)
    assert list(preprocess(data, rows, tokenizer, **limits)) == list(whole)


@pytest.mark.parametrize("encoder_decoder", [True, False])
def test_what_a_chat_template_refuses_is_said(encoder_decoder, tokenizer):
    rows = Dataset.from_dict({"messages": [[{"role": "tool", "content": "x"}, {"role": "assistant", "content": "y"}]]})
    data = resolve_task(get_task("chat"), rows, encoder_decoder=encoder_decoder)
    with pytest.raises(
        ValueError, match="refuses a conversation of tool.*role tool is not one of system, user, assis"
    ):
        preprocess(data, rows, tokenizer)


@pytest.mark.parametrize("end", ["eos", "newline"])
def test_numbers_are_texts(end, tokenizer):
    rows = [Dataset.from_dict({"text": values}) for values in ([0, 12, None], ["0", "12", ""])]
    data = resolve_task(get_task("text-generation"), rows[0], encoder_decoder=False)
    learned = [list(preprocess(data, part, tokenizer, max_source_length=8, end=end)) for part in rows]
    assert learned[0] == learned[1]
    joined = [join_rows(part.add_column("book", ["a"] * 3), "text", "book")["text"] for part in rows]
    assert joined[0] == joined[1] == ["0\n12\n"]
    pairs = Dataset.from_dict({"source": [1, 2], "target": [0, None]})
    (example,) = preprocess(resolve_task(get_task("translation"), pairs), pairs, tokenizer)
    assert tokenizer.decode(example["labels"]) == "0</s>"


def test_empty_cells_are_empty_texts(tokenizer):
    data = TaskData(get_task("translation"), {"source": "src", "target": "tgt"}, encoder_decoder=True)
    assert prompts_and_references(data, {"src": None, "tgt": None}, tokenizer) == [("", [])]


def test_answer_span_of_every_form():
    assert answer_span({"text": ["1889"], "answer_start": [23]}, CONTEXT) == (23, 27)
    assert answer_span({"text": [], "answer_start": []}, CONTEXT) is None
    assert answer_span([{"text": "1889", "answer_start": 23}], CONTEXT) == (23, 27)
    assert answer_span({"text": "1889", "answer_start": 23}, CONTEXT) == answer_span(1889, CONTEXT) == (23, 27)
    assert answer_span("Paris", CONTEXT) == (64, 69)
    assert answer_span(["nowhere"], CONTEXT) is None


def test_references_of_every_form():
    assert references_of("a") == ["a"]
    assert references_of(["a", "b"]) == ["a", "b"]
    assert references_of({"text": ["a"], "answer_start": [0]}) == ["a"]
    assert references_of([]) == references_of(None) == references_of({"text": []}) == []
    assert references_of([{"text": "a", "answer_start": 0}, {"text": "b", "answer_start": 1}]) == ["a", "b"]
    assert references_of(0) == ["0"] and references_of([1, 2.5, None]) == ["1", "2.5"]
    for odd in ({"answer": "a"}, [{"answer": "a"}], [["a"]]):
        with pytest.raises(ValueError, match="An answer is .*, but must be a text"):
            references_of(odd)
