"""The assistant's turns are found in any chat template: by its marker, or by the difference of prefixes."""

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_flashlite.data.conversations import cut_at_turns, encode_by_prefixes, encode_conversation
from modeling_flashlite.data.preprocessing import preprocess
from modeling_flashlite.data.tasks import get_task, resolve_task
from modeling_flashlite.data.tokenization import train_tokenizer

# SmolLM2's and, in short, Qwen's, which leaves the thinking out of earlier turns
CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|system|>{{ '\nYou help.<|end|>\n' }}{% endif %}"
    "{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FORGETS = (
    "{% for m in messages %}{% set said = m.content if loop.last else m.content.split('</think>')[-1] %}"
    "{{ '<|' + m.role + '|>' + said + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
BROKEN = (
    "{% for m in messages %}{{ m.content + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"
)
ASKED = [
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "<think>hm</think>two"},
    {"role": "user", "content": "three?"},
    {"role": "assistant", "content": "four"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four <think> system You help.\n"] * 3, 320)


def with_template(tokenizer, template):
    changed = train_tokenizer(["one two three four <think> system You help.\n"] * 3, 320)
    changed.chat_template = template
    return changed


def said(tokenizer, examples):
    return ["".join(tokenizer.decode([t]) for t, mark in zip(ids, marks) if mark) for ids, marks in examples]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=12)), max_size=6))
def test_prefixes_find_what_the_marker_marks(tokenizer, turns):
    messages = [{"role": "user", "content": "?"}] + [{"role": role, "content": text} for role, text in turns]
    assert encode_by_prefixes(tokenizer, messages) == encode_conversation(tokenizer, messages)


def test_templates_without_a_marker_are_learned_to_the_end_of_each_turn(tokenizer):
    chatml = with_template(tokenizer, CHATML)
    ((ids, marks),) = examples = encode_conversation(chatml, ASKED)
    assert ids == chatml.apply_chat_template(ASKED)["input_ids"]
    assert said(chatml, examples) == ["<think>hm</think>two<|end|>four<|end|>"]
    prompt = chatml.apply_chat_template(ASKED[:3], add_generation_prompt=True)["input_ids"]
    assert ids[: len(prompt)] == prompt and not marks[len(prompt) - 1] and marks[len(prompt)]
    # an answer that nobody asked for is read, not learned
    assert said(chatml, encode_conversation(chatml, [ASKED[1], *ASKED])) == said(chatml, examples)


def test_a_template_that_changes_earlier_turns_gives_an_example_for_each(tokenizer):
    forgets = with_template(tokenizer, FORGETS)
    first, second = encode_conversation(forgets, ASKED)
    assert said(forgets, [first, second]) == ["<think>hm</think>two<|end|>", "four<|end|>"]
    assert "hm" not in forgets.decode(second[0])


@pytest.mark.parametrize(
    ("template", "message"), [(BROKEN, "does not continue its own generation prompt"), (None, "no chat template")]
)
def test_what_cannot_be_learned_is_refused(template, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        encode_conversation(with_template(tokenizer, template), ASKED)


def test_long_conversations_end_with_a_turn(tokenizer):
    ids, marks = list(range(8)), [bool(int(bit)) for bit in "01100110"]
    assert cut_at_turns(ids, marks, 6) == (ids[:3], marks[:3]) and cut_at_turns(ids, marks, 7) == (ids[:7], marks[:7])
    assert cut_at_turns(ids, marks, 2) == (ids[:2], marks[:2]) and cut_at_turns(ids, marks, 8) == (ids, marks)


def test_packed_conversations_learn_the_same_tokens(tokenizer):
    rows = Dataset.from_dict(
        {"conversations": [[{"from": "human", "value": "one?"}, {"from": "gpt", "value": "two"}]] * 5}
    )
    data = resolve_task(get_task("chat"), rows, encoder_decoder=False)
    limits = {"max_source_length": 32, "max_target_length": 8}
    single, packed = (preprocess(data, rows, tokenizer, packed=packed, **limits) for packed in (False, True))
    assert len(packed) < len(single) and "position_ids" in packed.column_names

    def learned(examples):
        return [label for labels in examples["labels"] for label in labels if label != -100]

    assert learned(packed) == learned(single)
    with pytest.raises(ValueError, match="has a row for each answer"):
        preprocess(resolve_task(get_task("chat"), rows), rows, tokenizer, packed=True)
