"""Tasks: columns resolved or explained, and the right inputs and labels for both kinds of model."""

import pytest
import transformers
from datasets import ClassLabel, Dataset
from transformers import Trainer, TrainingArguments

from modeling_flashlite import (
    FlashLiteForCausalLM,
    FlashLiteForConditionalGeneration,
    FlashLiteForQuestionAnswering,
    FlashLiteForSequenceClassification,
)
from modeling_flashlite.data.batching import PaddingCollator
from modeling_flashlite.data.labels import label_names
from modeling_flashlite.data.preprocessing import cut_prompt, preprocess
from modeling_flashlite.data.tasks import (
    TASKS,
    TaskData,
    chat_turns,
    get_task,
    prompts_and_references,
    resolve_columns,
    resolve_task,
)
from modeling_flashlite.data.tokenization import train_tokenizer
from modeling_flashlite.measure.evaluation import evaluate_task
from modeling_flashlite.measure.metrics import METRICS
from modeling_flashlite.spans_flashlite import question_windows

CONTEXT = "The tower was built in 1889 by Gustave Eiffel, and it stands in Paris."
DATA = {
    "translation": {"source": ["one two", "three"], "target": ["eins zwei", "drei"]},
    "text2text-generation": {"source": ["one two", "three"], "target": ["eins zwei", "drei"]},
    "summarization": {"dialogue": ["one two three four"] * 2, "summary": ["one", "two"]},
    "extractive-qa": {
        "question": ["When?", "Who?"],
        "context": [CONTEXT] * 2,
        "answers": [{"text": ["1889"], "answer_start": [23]}, {"text": ["Gustave Eiffel"], "answer_start": [31]}],
    },
    "abstractive-qa": {"question": ["When?", "Who?"], "context": [CONTEXT] * 2, "answer": ["1889", "Gustave Eiffel"]},
    "chat": {
        "messages": [
            [
                {"role": "user", "content": "one"},
                {"role": "assistant", "content": "two"},
                {"role": "user", "content": "three"},
                {"role": "assistant", "content": "four"},
            ]
        ]
        * 2
    },
    "text-generation": {"text": ["one two three " * 20, "four five six " * 20]},
    "classification": {"text": ["one two", "three"], "label": ["good", "bad"]},
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([CONTEXT, "one two three four five six", "eins zwei drei"] * 5, 320)


@pytest.fixture(scope="module")
def closing():
    return train_tokenizer([CONTEXT, "one two three four five six", "eins zwei drei"] * 5, 320, add_eos_token=True)


def prepared(name, tokenizer, encoder_decoder=True, **options):
    rows = Dataset.from_dict(DATA[name])
    return preprocess(resolve_task(get_task(name), rows, encoder_decoder=encoder_decoder), rows, tokenizer, **options)


def shown(tokenizer, labels):
    return tokenizer.decode([label for label in labels if label != -100])


def test_rows_that_are_lines_of_one_text(tokenizer, caplog):
    lines = Dataset.from_dict({"text": ["one two", "", "three", "", "four five six"] * 4})
    data = resolve_task(get_task("text-generation"), lines, encoder_decoder=False)
    transformers.utils.logging.enable_propagation()
    try:
        preprocess(data, lines, tokenizer, max_source_length=16)
    finally:
        transformers.utils.logging.disable_propagation()
    assert "8 of the first 20 rows are blank" in caplog.text and "end=newline" in caplog.text
    rows = preprocess(data, lines, tokenizer, max_source_length=16, end="newline")
    assert tokenizer.decode([token for row in rows["input_ids"] for token in row]) == "\n".join(lines["text"]) + "\n"
    assert all(row == list(range(len(row))) for row in rows["position_ids"])  # a line sees the lines before it
    titled = lines.add_column("title", ["a"] * 10 + ["b"] * 10)
    rows = preprocess(data, titled, tokenizer, max_source_length=512, end="newline", document_column="title")
    assert rows[0]["position_ids"].count(0) == 2  # the lines of each title are a document
    with pytest.raises(ValueError, match="end is 'newlin', but must be 'eos' .* or 'newline'"):
        preprocess(data, lines, tokenizer, end="newlin")
    with pytest.raises(ValueError, match="end 'newline', but only text generation .* the task is translation"):
        prepared("translation", tokenizer, end="newline")


@pytest.mark.parametrize("labels", [["a", None], [0, None], [0.5, 1.5], [-1, 1], [[0, 1], [1]], [{"a": 1}, {"a": 2}]])
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(ValueError, match="Column 'label' holds .* classes are all strings or all whole numbers"):
        label_names(Dataset.from_dict({"label": labels}), "label")


@pytest.mark.parametrize("name", TASKS)
def test_declarations_are_consistent(name):
    task = TASKS[name]
    assert task.name == name and task.target in task.columns
    assert task.name == "text-generation" or set(task.metrics) <= set(METRICS)
    for prompt in (task.prompt, task.instruction or ""):
        prompt.format(**dict.fromkeys([*task.columns, *(f"{role}_column" for role in task.columns)], "x"))


@pytest.mark.parametrize("encoder_decoder", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_prepares_both_kinds_of_model(name, encoder_decoder, tokenizer):
    rows = prepared(name, tokenizer, encoder_decoder=encoder_decoder, max_source_length=48, max_target_length=16)
    assert len(rows) >= 2
    assert "input_ids" in rows.column_names
    assert {"labels", "start_positions"} & set(rows.column_names)
    assert all(len(ids) <= 48 for ids in rows["input_ids"])


def test_encoder_decoder_rows(closing):
    row = prepared("translation", closing)[0]
    assert closing.decode(row["input_ids"]) == "one two</s>"
    assert closing.decode(row["labels"]) == "eins zwei</s>"


def test_decoder_only_rows_learn_the_answer_alone(tokenizer):
    row = prepared("translation", tokenizer, encoder_decoder=False)[0]
    assert tokenizer.decode(row["input_ids"]).endswith("\n\none two<|end|><|assistant|>eins zwei<|end|>")
    assert shown(tokenizer, row["labels"]) == "eins zwei<|end|>"
    assert len(row["input_ids"]) == len(row["labels"])


def test_without_a_template_a_newline_separates(tokenizer):
    plain = train_tokenizer(["one two eins zwei"] * 3, 300)
    plain.chat_template = None
    row = prepared("translation", plain, encoder_decoder=False)[0]
    assert plain.decode(row["input_ids"]) == "one two\neins zwei</s>"
    assert shown(plain, row["labels"]) == "eins zwei</s>"


def test_prompt_in_training_equals_prompt_in_evaluation(tokenizer, closing):
    for name in ("summarization", "abstractive-qa"):
        for encoder_decoder, tok in ((True, closing), (False, tokenizer)):
            dataset, task = Dataset.from_dict(DATA[name]), get_task(name)
            data = resolve_task(task, dataset, encoder_decoder=encoder_decoder)
            [(prompt, _)] = prompts_and_references(data, dataset[0], tok)
            asked = tok(prompt, add_special_tokens=encoder_decoder)["input_ids"]
            row = prepared(name, tok, encoder_decoder=encoder_decoder)[0]
            assert row["input_ids"][: len(asked)] == asked


def test_chat_learns_every_turn_of_the_assistant(tokenizer):
    row = prepared("chat", tokenizer, encoder_decoder=False)[0]
    assert shown(tokenizer, row["labels"]) == "two<|end|>four<|end|>"
    turns = prepared("chat", tokenizer)
    assert len(turns) == 4
    assert (
        tokenizer.decode(turns[1]["input_ids"])
        == "<|user|>one<|end|><|assistant|>two<|end|><|user|>three<|end|><|assistant|>"
    )
    assert tokenizer.decode(turns[1]["labels"]) == "four<|end|>"
    assert chat_turns([{"role": "assistant", "content": "first"}]) == []


def test_instructions_and_prompts_of_ones_own(tokenizer):
    rows = Dataset.from_dict(DATA["translation"])
    task = get_task("translation")
    first = rows[0]

    def asked(encoder_decoder=False, tok=tokenizer, shots=0, **options):
        data = resolve_task(task, rows, encoder_decoder=encoder_decoder, **options)
        if shots:
            data = data.with_shots(rows, shots, tok.chat_template is not None)
        return prompts_and_references(data, first, tok)[0][0]

    columns = list(resolve_task(task, rows).columns.values())
    instruction = f"Translate from {columns[0]} to {columns[1]}.\n\none two"
    assert asked() == f"<|user|>{instruction}<|end|><|assistant|>" and asked(encoder_decoder=True) == "one two"
    assert asked(prompt="{source}\\nin German:") == "<|user|>one two\nin German:<|end|><|assistant|>"
    assert asked(shots=1) == f"<|user|>{instruction}<|end|><|assistant|>eins zwei<|end|>{asked()}"
    plain = train_tokenizer(["one two eins zwei"] * 3, 300)
    plain.chat_template = None
    assert asked(tok=plain, shots=1) == "one two\neins zwei\n\none two\n"
    with pytest.raises(ValueError, match="takes no examples"):
        asked(encoder_decoder=True, shots=1)
    with pytest.raises(ValueError, match="only 2 rows have an answer"):
        asked(shots=3)
    for wrong in ("no role", "{source} {x}", "{source"):
        with pytest.raises(ValueError, match="prompt is"):
            asked(prompt=wrong)
    with pytest.raises(ValueError, match="chat has no prompt"):
        resolve_task(get_task("chat"), Dataset.from_dict(DATA["chat"]), prompt="{messages}")


def test_text_generation_with_an_encoder_continues(tokenizer):
    rows = prepared("text-generation", tokenizer, max_source_length=8, max_target_length=4)
    text = tokenizer.decode([token for row in rows for token in row["input_ids"] + row["labels"]])
    assert text == "".join(text + "</s>" for text in DATA["text-generation"]["text"])


def test_extractive_spans_decode_to_the_answer(closing):
    for row, answer in zip(prepared("extractive-qa", closing, max_source_length=128), ("1889", "Gustave Eiffel")):
        span = closing.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1])
        assert span.strip() == answer


def test_windows_cover_a_long_context(closing):
    windows = question_windows(closing, "When?", CONTEXT * 5, 40, stride=10)
    covered = {place for _, offsets in windows for start, end in offsets for place in range(start, end)}
    assert covered == set(range(len(CONTEXT * 5)))
    assert all(len(ids) <= 40 for ids, _ in windows) and len(windows) > 2
    with pytest.raises(ValueError, match="leaves no room for its context in 6 tokens"):
        question_windows(closing, "A question of several words?", CONTEXT, 6)


def test_a_question_that_fills_a_window_is_too_long(closing):
    rows = Dataset.from_dict({**DATA["extractive-qa"], "question": ["When?", "Who was it, and when? " * 20]})
    data = resolve_task(get_task("extractive-qa"), rows)
    limits = {"max_source_length": 40}
    every, fitting = preprocess(data, rows, closing, **limits), preprocess(data, rows.select([0]), closing, **limits)
    assert list(every)[: len(fitting)] == list(fitting) and any(every["end_positions"][len(fitting) :])
    assert all(len(ids) <= 40 for ids in every["input_ids"])
    assert list(preprocess(data, rows, closing, too_long="drop", **limits)) == list(fitting)
    with pytest.raises(ValueError, match="leaves no room for its context in 40 tokens"):
        preprocess(data, rows, closing, too_long="error", **limits)


def test_an_answer_outside_the_window_is_no_answer(closing):
    rows = prepared("extractive-qa", closing, max_source_length=24)
    assert len(rows) > 2
    spans = set(zip(rows["start_positions"], rows["end_positions"]))
    assert (0, 0) in spans and len(spans) > 1


def test_labels_become_class_ids(tokenizer):
    assert prepared("classification", tokenizer)["labels"] == [1, 0]
    named = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}).cast_column(
        "label", ClassLabel(names=["no", "yes"])
    )
    assert label_names(named, "label") == ["no", "yes"]
    assert label_names(Dataset.from_dict({"label": [0, 2]}), "label") == ["0", "1", "2"]


def test_labels_find_the_model_s_number_by_name(tokenizer):
    """The order of the model wins over that of the data, which differs from split to split."""
    columns = {"text": "text", "label": "label"}
    data = TaskData(get_task("classification"), columns, encoder_decoder=True, classes=["neg", "neutral", "pos"])
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]})
    named = rows.cast_column("label", ClassLabel(names=["POS", "neg"]))
    assert preprocess(data, named, tokenizer)["labels"] == [2, 0]
    assert preprocess(data, rows, tokenizer)["labels"] == [0, 1]  # bare numbers
    with pytest.raises(ValueError, match="class 'mixed', but the model's are neg, neutral, pos"):
        preprocess(data, Dataset.from_dict({"text": ["a"], "label": ["mixed"]}), tokenizer)
    with pytest.raises(ValueError, match="None"):
        preprocess(data, Dataset.from_dict({"text": ["a", "b"], "label": [0, None]}), tokenizer)


class TestLengths:
    def test_cut_prompts_keep_their_end(self):
        assert cut_prompt(list(range(30)), 20) == [*range(12), *range(22, 30)]
        assert cut_prompt(list(range(30)), 6) == [0, 1, 2, 27, 28, 29]
        assert cut_prompt(list(range(30)), 20, from_start=True) == list(range(10, 30))
        assert cut_prompt([1, 2], 20) == [1, 2]

    def test_truncated_rows_keep_their_template(self, tokenizer):
        rows = prepared("summarization", tokenizer, encoder_decoder=False, max_source_length=14, max_target_length=4)
        text = tokenizer.decode(rows[0]["input_ids"])
        assert text.startswith("<|user|>") and "<|end|><|assistant|>" in text and text.endswith("<|end|>")

    def test_truncated_targets_still_end(self, tokenizer):
        labels = prepared("translation", tokenizer, max_target_length=3)["labels"][0]
        assert len(labels) == 3 and labels[-1] == tokenizer.eos_token_id

    @pytest.mark.parametrize("name", ["translation", "classification"])
    def test_drop_keeps_what_fits_and_error_explains(self, name, tokenizer):
        assert len(prepared(name, tokenizer, max_source_length=2, too_long="drop")) == 1
        with pytest.raises(ValueError, match=r"has \d+ tokens, but at most 2 fit; raise max_source_length, or set"):
            prepared(name, tokenizer, max_source_length=2, too_long="error")

    def test_nothing_left_is_an_error(self, tokenizer):
        limits = {"encoder_decoder": False, "max_source_length": 6, "max_target_length": 5}
        with pytest.raises(ValueError, match="0 examples came out of 2 rows"):
            prepared("chat", tokenizer, too_long="drop", **limits)
        with pytest.raises(ValueError, match="A conversation has"):
            prepared("chat", tokenizer, too_long="error", **limits)

    def test_classes_of_a_stream_must_be_declared(self, tokenizer):
        stream = Dataset.from_dict(DATA["classification"]).to_iterable_dataset()
        with pytest.raises(ValueError, match="column 'label' of a streamed data set"):
            resolve_task(get_task("classification"), stream)
        declared = stream.cast_column("label", ClassLabel(names=["bad", "good"]))
        data = resolve_task(get_task("classification"), declared)
        assert [row["labels"] for row in preprocess(data, declared, tokenizer)] == [1, 0]

    def test_limits_that_cannot_work(self, tokenizer):
        with pytest.raises(ValueError, match="too_long is 'cut'"):
            prepared("translation", tokenizer, too_long="cut")
        with pytest.raises(ValueError, match="must be at least 2"):
            prepared("translation", tokenizer, max_target_length=1)
        with pytest.raises(ValueError, match="max_target_length is 64, but without an encoder"):
            prepared("translation", tokenizer, encoder_decoder=False, max_source_length=64, max_target_length=64)
        # a text has no target, so the limit of targets says nothing about packed rows
        assert prepared(
            "text-generation", tokenizer, encoder_decoder=False, max_source_length=64, max_target_length=64
        )


class TestColumns:
    def test_common_column_names_are_found_and_others_mapped(self):
        task = get_task("translation")
        rows = Dataset.from_dict({"en": ["a"], "de": ["b"]})
        assert resolve_columns(task, rows, "source=en,target=de") == {"source": "en", "target": "de"}
        assert resolve_columns(task, rows, {"source": "en", "target": "de"})["target"] == "de"
        assert resolve_columns(get_task("summarization"), Dataset.from_dict(DATA["summarization"])) == {
            "document": "dialogue",
            "summary": "summary",
        }

    def test_several_references_are_preferred(self):
        rows = Dataset.from_dict({"dialogue": ["a"], "summary": ["b"], "summaries": [["b", "c"]]})
        assert resolve_columns(get_task("summarization"), rows)["summary"] == "summaries"

    def test_errors_list_the_columns_and_classes(self):
        task, rows = get_task("translation"), Dataset.from_dict({"en": ["a"], "targets": ["b"]})
        with pytest.raises(ValueError, match="'source' does not exist; the data set has en, targets"):
            resolve_columns(task, rows)
        with pytest.raises(ValueError, match=r"the data set has en, targets .did you mean 'targets'"):
            resolve_columns(task, rows, "source=en")
        with pytest.raises(ValueError, match="'from' is not a role of translation; its roles are source, target"):
            resolve_columns(task, rows, "from=en")
        with pytest.raises(ValueError, match="must read role=column"):
            resolve_columns(task, rows, "en,de")
        with pytest.raises(ValueError, match=r"'translat' does not exist; .*did you mean 'translation'"):
            get_task("translat")


def test_streams_are_prepared_alike(closing):
    dataset = Dataset.from_dict(DATA["translation"])
    data = resolve_task(get_task("translation"), dataset)
    stream = preprocess(data, dataset.to_iterable_dataset(), closing)
    assert list(stream) == list(preprocess(data, dataset, closing))


HEADS = {"extractive-qa": FlashLiteForQuestionAnswering, "classification": FlashLiteForSequenceClassification}


@pytest.mark.parametrize("encoder_decoder", [True, False])
@pytest.mark.parametrize("name", TASKS)
def test_every_task_is_learned_and_evaluated(name, encoder_decoder, tiny_config, tokenizer, closing, tmp_path):
    """A few dozen rows through the unmodified `Trainer` and back: the loss falls, and metrics come out."""
    tok = closing if encoder_decoder else tokenizer
    task, dataset = get_task(name), Dataset.from_dict({key: values * 12 for key, values in DATA[name].items()})
    head = HEADS.get(name, FlashLiteForConditionalGeneration if encoder_decoder else FlashLiteForCausalLM)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
    model = head(tiny_config(vocab_size=len(tok), is_encoder_decoder=encoder_decoder, num_labels=2, **ids))
    limits = {"max_source_length": 64, "max_target_length": 16}
    rows = preprocess(resolve_task(task, dataset, encoder_decoder=encoder_decoder), dataset, tok, **limits)
    arguments = TrainingArguments(
        tmp_path, max_steps=10, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=2, save_strategy="no",
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=PaddingCollator(tok), processing_class=tok)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    data = resolve_task(task, dataset, config=model.config)
    found = evaluate_task(
        data, model, tok, dataset.select(range(4)), max_source_length=64, generation={"max_new_tokens": 4}, resamples=0
    )
    assert found["metrics"] and all(value >= 0 for value in found["metrics"].values())
