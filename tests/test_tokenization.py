"""Tokenizer training: lossless on any Unicode, fixed special ids, and a plain tokenizer that `AutoTokenizer` loads."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from verbs import argument_classes, load_script

from modeling_flashlite.cli import parse_args
from modeling_flashlite.data.tokenization import CHAT_TOKENS, SPECIAL_TOKENS, run_tokenizer, train_tokenizer

TEXTS = [
    "the cat sat on the mat in 1984",
    "Schöne Grüße aus München, 42 Äpfel",
    "print('hello world')\n\treturn x",
] * 8
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Go on."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 400)


@pytest.fixture
def closing_tokenizer():
    return train_tokenizer(TEXTS, 400, add_eos_token=True)


def test_special_tokens_have_their_fixed_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *CHAT_TOKENS]) == list(range(8))
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert ids == (0, 1, 2, 3)
    assert set(SPECIAL_TOKENS + CHAT_TOKENS) <= set(tokenizer.all_special_tokens)


# everything that UTF-8 can hold: all but lone surrogates
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_a_round_trip(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


AWKWARD = ["", " ", "  two  blanks  ", "\n\n\t\r\n", "a\u200db\ufeffc\u0000", "e\u0301 é ﬁ ℡", "👩\u200d👧 漢字 नमस्ते"]


@pytest.mark.parametrize("text", [*AWKWARD, "it ' s n't .", "</s> <pad> <|user|>"])
def test_awkward_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_special_tokens_in_text_can_be_taken_as_plain_text(tokenizer):
    plain = tokenizer("</s>", add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.eos_token_id not in plain
    assert tokenizer.decode(plain) == "</s>"


def test_end_of_sequence_is_added_only_where_asked(tokenizer, closing_tokenizer):
    assert tokenizer("cat")["input_ids"] == closing_tokenizer("cat", add_special_tokens=False)["input_ids"]
    assert closing_tokenizer("cat")["input_ids"] == [*tokenizer("cat")["input_ids"], 2]
    assert closing_tokenizer("cat", "mat")["input_ids"].count(2) == 2
    assert closing_tokenizer("cat", return_special_tokens_mask=True)["special_tokens_mask"][-1] == 1
    assert closing_tokenizer.decode(closing_tokenizer("cat")["input_ids"], skip_special_tokens=True) == "cat"


def test_end_of_sequence_survives_truncation(closing_tokenizer):
    ids = closing_tokenizer("the cat sat on the mat", truncation=True, max_length=4)["input_ids"]
    assert len(ids) == 4 and ids[-1] == 2


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_both_sides(tokenizer, side):
    batch = tokenizer(["cat", "the cat sat on the mat"], padding=True, padding_side=side, return_tensors="pt")
    short = batch["input_ids"][0][batch["attention_mask"][0].bool()]
    assert short.tolist() == tokenizer("cat")["input_ids"]
    pads = batch["input_ids"][0][: -len(short)] if side == "left" else batch["input_ids"][0][len(short) :]
    assert len(pads) > 0 and set(pads.tolist()) == {0}


def test_digits_are_separate_tokens(tokenizer):
    assert [token for token in tokenizer.tokenize("1984") if token.isdigit()] == list("1984")


def test_batches_equal_single_texts(tokenizer):
    assert tokenizer(TEXTS[:3])["input_ids"] == [tokenizer(text)["input_ids"] for text in TEXTS[:3]]


def test_tokens_can_be_added(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    copy = AutoTokenizer.from_pretrained(tmp_path)
    assert copy.add_tokens(["<new>"]) == 1
    assert copy.convert_tokens_to_ids("<new>") == len(tokenizer)
    assert copy.decode(copy("a<new>b")["input_ids"]) == "a<new>b"


@pytest.mark.parametrize("name", ["tokenizer", "closing_tokenizer"])
def test_saved_and_loaded_it_is_the_same(name, tmp_path, request):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded(TEXTS[:3])["input_ids"] == tokenizer(TEXTS[:3])["input_ids"]
    assert loaded.special_tokens_map == tokenizer.special_tokens_map
    assert loaded.model_max_length == tokenizer.model_max_length == 1024
    assert loaded.chat_template == tokenizer.chat_template
    # a second round changes nothing in the file
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()


def test_loads_beside_a_model_config_without_the_package(tokenizer, tiny_config, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules['modeling_flashlite'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"print(AutoTokenizer.from_pretrained({str(tmp_path)!r}, trust_remote_code=True)('the cat')['input_ids'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(tokenizer("the cat")["input_ids"]), done.stderr


def test_training_is_deterministic(tokenizer):
    assert train_tokenizer(iter(TEXTS), 400).get_vocab() == tokenizer.get_vocab()


def test_chat_template_and_generation_prompt(tokenizer):
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|system|>Be brief.<|end|><|user|>Hello?<|end|><|assistant|>Yes.<|end|><|user|>Go on.<|end|><|assistant|>"
    )


def test_chat_template_marks_what_the_assistant_says(tokenizer):
    encoded = tokenizer.apply_chat_template(CONVERSATION, return_dict=True, return_assistant_tokens_mask=True)
    spoken = [token for token, said in zip(encoded["input_ids"], encoded["assistant_masks"]) if said]
    assert tokenizer.decode(spoken) == "Yes.<|end|>"


def test_chat_template_refuses_unknown_roles(tokenizer):
    with pytest.raises(Exception, match="role tool is not one of system, user, assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize(
    ("texts", "size", "error", "message"),
    [
        (TEXTS, 100, ValueError, "vocab_size is 100, but bytes and special tokens need 264"),
        ([], 400, ValueError, "are empty"),
        (["", ""], 400, ValueError, "are empty"),
        (["fine", 3], 400, TypeError, "text 1 is a int"),
    ],
)
def test_bad_training_input(texts, size, error, message):
    with pytest.raises(error, match=message):
        train_tokenizer(texts, size)


@pytest.mark.parametrize("columns", ["translation.en,translation.de", "en, de"])
def test_the_script_reads_any_columns_and_empty_cells(columns, tmp_path):
    rows = [{"en": None, "de": "Schoene Gruesse"}, {"en": "the cat sat", "de": None}]
    rows = [{**row, "translation": row} for row in rows]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = load_script("train_tokenizer")
    argv = [
        f"--dataset={tmp_path}/a.jsonl",
        f"--columns={columns}",
        "--vocab_size=300",
        f"--output_dir={tmp_path}/tok",
    ]
    found = script.main(*parse_args(argument_classes(script), argv))
    assert found["vocab_size"] >= 264 and AutoTokenizer.from_pretrained(tmp_path / "tok")("cat")["input_ids"]


def test_a_run_trains_its_tokenizer_anew_for_other_data_or_options(tmp_path):
    first = run_tokenizer(tmp_path, lambda: TEXTS, vocab_size=300).get_vocab()
    written = (tmp_path / "tokenizer.json").stat().st_mtime_ns
    assert run_tokenizer(tmp_path, lambda: iter(TEXTS), vocab_size=300).get_vocab() == first
    assert run_tokenizer(tmp_path, lambda: ["a resumed run"], keep=True, vocab_size=290).get_vocab() == first
    assert (tmp_path / "tokenizer.json").stat().st_mtime_ns == written  # read, not made
    assert len(run_tokenizer(tmp_path, lambda: TEXTS, vocab_size=310)) == 310
    assert run_tokenizer(tmp_path, lambda: TEXTS, vocab_size=310, add_eos_token=True)("a")["input_ids"][-1] == 2
    assert run_tokenizer(tmp_path, lambda: ["other texts"] * 9, vocab_size=300).get_vocab() != first
