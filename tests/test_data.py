"""Loading, tokenising, packing, segmenting and collating: nothing lost, boundaries kept, clear refusals."""

import copy
import json
import lzma
from itertools import chain

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_flashlite.data.batching import (
    PaddingCollator,
    _pack_batch,
    join_rows,
    pack,
    segment_streams,
    tokenize_texts,
)
from modeling_flashlite.data.corpus import hash_fraction, python_corpus
from modeling_flashlite.data.loading import column_names, load_data, pick_split, require_columns
from modeling_flashlite.data.tokenization import train_tokenizer

ROWS = [{"en": f"line {i}", "de": f"Zeile {i}"} for i in range(7)]
documents = st.lists(st.lists(st.integers(3, 90), max_size=25), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four five six"] * 5, 300)


def write_rows(path, rows=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A standard library of forty small modules."""
    root = tmp_path_factory.mktemp("library")
    (root / "test").mkdir()
    (root / "test" / "left_out.py").write_text('"""This is documentation of a test, which is left out."""\n')
    (root / "broken.py").write_text("def :\n")
    (root / "pydoc_data").mkdir()
    (root / "pydoc_data" / "topics.py").write_text(f"topics = {{'if': 'The if statement {'chooses ' * 9}'}}\n")
    for number in range(40):
        (root / f"module{number:02d}.py").write_text(
            f'"""Module {number} documents what it is good for in one line."""\nraise SystemExit("imported")\n\n\n'
            f'class Thing(dict):\n    def act(self, x=1, *rest):\n        """Act number {number} on x, and then\n\n'
            f'        on all of the rest, in their order."""\n'
        )
    return root


class TestPythonCorpus:
    def test_reads_documentation_without_running_anything(self, library):
        splits = python_corpus(0.2, library)
        rows = [*splits["train"], *splits["validation"]]
        assert len(rows) == 81
        act = next(row for row in rows if row["name"] == "module07.Thing.act")
        assert act["signature"] == "def act(self, x=1, *rest)"
        assert act["text"] == "Act number 7 on x, and then\n\non all of the rest, in their order."
        assert not any("left out" in row["text"] for row in rows)
        assert any(row["name"] == "topics.if" for row in rows)

    def test_splits_by_module_and_the_same_each_time(self, library):
        first, second = python_corpus(0.2, library), python_corpus(0.2, library)
        assert [list(first[split]) for split in first] == [list(second[split]) for split in second]
        modules = [{row["name"].split(".")[0] for row in first[split]} for split in ("train", "validation")]
        assert not modules[0] & modules[1] - {"topics"}

    def test_drops_repeated_texts(self, library):
        (library / "copy.py").write_text((library / "module03.py").read_text())
        assert sum(map(len, python_corpus(0.2, library).values())) == 81

    def test_this_python_has_enough_of_it(self):
        splits = load_data("python")
        assert sum(map(len, splits["train"]["text"])) > 1_000_000
        assert 0.02 < len(splits["validation"]) / len(splits["train"]) < 0.2
        assert min(map(len, splits["train"]["text"])) >= 40

    def test_refuses_a_directory_without_documentation(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="holds 0 Python files with 0 documented objects"):
            python_corpus(root=tmp_path)
        with pytest.raises(ValueError, match="validation_fraction is 1.5"):
            python_corpus(1.5)

    def test_hash_fraction_is_fixed_and_even(self):
        assert hash_fraction("json") == hash_fraction("json") != hash_fraction("ast")
        assert abs(np.mean([hash_fraction(str(i)) for i in range(2000)]) - 0.5) < 0.03


class TestLoading:
    @pytest.mark.parametrize("suffix", [".jsonl", ".json", ".jsonl.xz", ".csv", ".tsv", ".parquet"])
    def test_local_formats(self, tmp_path, suffix):
        path = tmp_path / f"rows{suffix}"
        table = Dataset.from_list(ROWS)
        if suffix == ".parquet":
            table.to_parquet(path)
        elif suffix in (".csv", ".tsv"):
            table.to_csv(path, sep="\t" if suffix == ".tsv" else ",")
        elif suffix.endswith(".xz"):
            path.write_bytes(lzma.compress(write_rows(tmp_path / "rows.jsonl").read_bytes()))
        else:
            write_rows(path)
        assert list(load_data(str(path))["train"]) == ROWS

    def test_text_keeps_blank_lines(self, tmp_path):
        (tmp_path / "a.txt").write_text("one\n\ntwo\n")
        assert load_data(f"test={tmp_path / 'a.txt'}")["test"]["text"] == ["one", "", "two"]

    def test_splits_lists_and_globs(self, tmp_path):
        for name in ("a1.jsonl", "a2.jsonl", "b.jsonl"):
            write_rows(tmp_path / name)
        splits = load_data(f"train={tmp_path}/a*.jsonl,test={tmp_path}/b.jsonl")
        assert {split: len(rows) for split, rows in splits.items()} == {"train": 14, "test": 7}

    def test_limit_and_streaming(self, tmp_path):
        path = write_rows(tmp_path / "rows.jsonl")
        assert len(load_data(str(path), limit=3)["train"]) == 3
        stream = load_data(str(path), streaming=True, limit=3)["train"]
        assert isinstance(stream, IterableDataset) and list(stream) == ROWS[:3]
        assert column_names(stream) == ["en", "de"]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_fields_inside_columns_can_be_named(self, tmp_path, streaming):
        Dataset.from_dict({"translation": [{"en": "a", "de": "b"}, None]}).to_parquet(tmp_path / "a.parquet")
        columns = "source=translation.en,target=translation.nl"
        rows = load_data(str(tmp_path / "a.parquet"), streaming=streaming, columns=columns)["train"]
        assert [row["translation.en"] for row in rows] == ["a", None]
        assert column_names(rows) == ["translation", "translation.en"]

    def test_paths_may_contain_what_separates_splits(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for folder in ("w/lr=0.1", "lr=0.1"):
            (tmp_path / folder).mkdir(parents=True)
            write_rows(tmp_path / folder / "v.jsonl")
            assert (
                len(load_data(f"test={folder}/v.jsonl")["test"]) == len(load_data(f"{folder}/v.jsonl")["train"]) == 7
            )
            assert len(load_data(f"train={folder}/*.jsonl , test = {tmp_path}/{folder}/v.jsonl")["test"]) == 7

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(("name", "head"), [("a.txt", ""), ("a.CSV", "text\n"), ("a.TXT", "")])
    def test_files_of_other_systems_are_read(self, tmp_path, name, head, streaming):
        (tmp_path / name).write_text(f"{head}one\ntwo\n", encoding="utf-8-sig")
        rows = load_data(str(tmp_path / name), streaming=streaming)["train"]
        assert [row["text"] for row in rows] == ["one", "two"]

    def test_files_that_cannot_be_read_are_named(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(bytes(range(256)))
        with pytest.raises(ValueError, match=r"a\.txt cannot be read as \.txt: .*utf-8"):
            load_data(str(tmp_path / "a.txt"))

    def test_directory_of_files(self, tmp_path):
        write_rows(tmp_path / "train.jsonl")
        assert len(load_data(str(tmp_path))["train"]) == 7

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("folder", [False, True])
    def test_a_tsv_knows_no_quotation(self, tmp_path, streaming, folder):
        (tmp_path / "train.tsv").write_text('en\tde\n"Go" now\tx\n"a\tb\nc\td\n"e\tf\ng"\th\n')
        rows = list(load_data(str(tmp_path if folder else tmp_path / "train.tsv"), streaming=streaming)["train"])
        assert [row["en"] for row in rows] == ['"Go" now', '"a', "c", '"e', 'g"']

    @pytest.mark.parametrize("suffix", ["csv", "tsv"])
    def test_only_empty_cells_are_missing(self, tmp_path, suffix):
        cells = ["None", "NA", "null", "nan", "n/a", ""]
        separator = {"csv": ",", "tsv": "\t"}[suffix]
        path = tmp_path / f"a.{suffix}"
        path.write_text(f"text{separator}label\n" + "".join(f"{cell}{separator}x\n" for cell in cells))
        assert load_data(str(path))["train"]["text"] == [*cells[:-1], None]

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("name", "content"),
        [("a.jsonl", ""), ("a.jsonl", "\n\n"), ("a.csv", ""), ("a.csv", "text,label\n"), ("a.txt", "")],
    )
    def test_files_without_rows_are_named(self, tmp_path, name, content, streaming):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=rf"a\.{name[2:]} (is empty|has 0 rows), .*at least 1"):
            load_data(str(tmp_path / name), streaming=streaming)
        packed = tmp_path / f"{name}.xz"
        packed.write_bytes(lzma.compress(content.encode()))
        with pytest.raises(ValueError, match="has 0 rows"):
            load_data(str(packed), streaming=streaming)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_files_of_several_formats_are_joined_on_their_common_columns(self, tmp_path, streaming):
        path = write_rows(tmp_path / "rows.jsonl")
        (tmp_path / "b.csv").write_text("id,en\n1,x\n2,y\n")
        splits = load_data(f"train={path},train={tmp_path}/b.csv,test={tmp_path}/b.csv", streaming=streaming)
        rows = list(splits["train"])
        assert [row["en"] for row in rows] == [row["en"] for row in ROWS] + ["x", "y"] and set(rows[0]) == {"en"}
        assert column_names(splits["test"]) == ["id", "en"]

    def test_refusals_say_what_to_do(self, tmp_path):
        path = write_rows(tmp_path / "rows.jsonl")
        with pytest.raises(FileNotFoundError, match="is not a file; give an existing path"):
            load_data(f"train={tmp_path}/missing.jsonl")
        (tmp_path / "b.csv").write_text("fr\nx\n")
        with pytest.raises(ValueError, match="0 columns in common"):
            load_data(f"train={path},train={tmp_path}/b.csv")
        (tmp_path / "c.xyz").write_text("x")
        with pytest.raises(ValueError, match="ends in '.xyz'"):
            load_data(f"train={tmp_path}/c.xyz")
        with pytest.raises(ValueError, match="limit is 0"):
            load_data(str(path), limit=0)
        splits = load_data(f"train={path},valid={path}")
        assert len(pick_split(splits, "validation")) == 7
        with pytest.raises(
            ValueError, match=r"'tran' does not exist; choose one of train, valid .did you mean 'train'"
        ):
            pick_split(splits, "tran")
        with pytest.raises(ValueError, match=r"'enn' does not exist; the data set has en, de .did you mean 'en'"):
            require_columns(splits["train"], ["enn"])


class TestTokenising:
    def test_documents_end_with_the_end_token(self, tokenizer):
        rows = tokenize_texts(Dataset.from_dict({"body": ["one", "", "two three"]}), tokenizer, "body")
        assert rows.column_names == ["input_ids"] and rows[1]["input_ids"] == [2]
        assert [tokenizer.decode(ids) for ids in rows["input_ids"]] == ["one</s>", "</s>", "two three</s>"]

    def test_lines_end_with_a_newline_if_asked(self, tokenizer):
        rows = tokenize_texts(Dataset.from_dict({"text": ["one", "two"]}), tokenizer, end="\n")
        assert tokenizer.decode(list(chain(*rows["input_ids"]))) == "one\ntwo\n"
        hub = tokenize_texts(Dataset.from_dict({"text": ["one\n", "two\n"]}), tokenizer, end="\n")
        assert hub["input_ids"] == rows["input_ids"]  # datasets on the Hub keep the newline of each line

    def test_long_documents_are_not_cut(self, tokenizer):
        rows = tokenize_texts(Dataset.from_dict({"text": ["one two " * 2000]}), tokenizer, end="")
        assert tokenizer.decode(rows[0]["input_ids"]) == "one two " * 2000


class TestPacking:
    @settings(deadline=None)
    @given(documents=documents, length=st.integers(2, 20))
    def test_no_token_is_lost_and_boundaries_are_kept(self, documents, length):
        rows = _pack_batch({"input_ids": documents}, length)
        assert list(chain(*rows["input_ids"])) == list(chain(*documents))
        assert all(len(row) == length for row in rows["input_ids"][:-1])
        # a token restarts its position where a document or a row begins, and nowhere else
        starts = list(chain(*(range(len(document)) for document in documents)))
        place = 0
        for positions, labels, ids in zip(rows["position_ids"], rows["labels"], rows["input_ids"]):
            for column, (position, label, token) in enumerate(zip(positions, labels, ids)):
                begins = column == 0 or starts[place] == 0
                assert position == (0 if begins else positions[column - 1] + 1)
                assert label == (-100 if starts[place] == 0 else token)
                place += 1

    def test_works_on_streams(self, tokenizer):
        texts = Dataset.from_dict({"text": ["one two three", "four five"]})
        whole = list(pack(tokenize_texts(texts, tokenizer), 4))
        assert list(pack(tokenize_texts(texts.to_iterable_dataset(), tokenizer), 4)) == whole

    def test_lines_of_one_text_are_one_document(self, tokenizer):
        texts = Dataset.from_dict({"text": ["one two", "", "three", "four"]})
        lines = tokenize_texts(texts, tokenizer, end="\n")
        whole = tokenize_texts(Dataset.from_dict({"text": ["one two\n\nthree\nfour"]}), tokenizer, end="\n")
        for rows in (lines, lines.to_iterable_dataset()):
            assert list(pack(rows, 4, one_text=True)) == list(pack(whole, 4))
        assert list(pack(lines, 4)) != list(pack(whole, 4))

    def test_keeps_given_labels(self):
        rows = _pack_batch({"input_ids": [[5, 6, 7], [8, 9]], "labels": [[-100, -100, 7], [8, 9]]}, 8)
        assert rows["labels"] == [[-100, -100, 7, -100, 9]]

    def test_refusals(self):
        with pytest.raises(ValueError, match="length is 1"):
            pack(Dataset.from_dict({"input_ids": [[1]]}), 1)
        with pytest.raises(ValueError, match="'input_ids' does not exist; the data set has text. Call tokenize_texts"):
            pack(Dataset.from_dict({"text": ["a"]}), 8)


class TestSegments:
    @settings(deadline=None, max_examples=40)
    @given(documents=documents, length=st.integers(2, 9), streams=st.integers(1, 4), apart=st.booleans())
    def test_streams_continue_and_nothing_is_lost(self, documents, length, streams, apart):
        if not any(documents):
            return
        names = [f"d{number}" for number in range(len(documents))]
        dataset = Dataset.from_dict({"input_ids": documents, "name": names})
        rows = list(segment_streams(dataset, length, streams, document_column="name" if apart else None))
        assert len(rows) % streams == 0
        order = [rows[step * streams + stream] for stream in range(streams) for step in range(len(rows) // streams)]
        ended = [
            row
            for row in order
            if row["memory_reset"] and row["labels"].count(-100) == length and not any(row["input_ids"])
        ]
        visible = [
            [token for token, seen in zip(row["input_ids"], row["attention_mask"]) if seen]
            for row in order
            if row not in ended
        ]
        assert list(chain(*visible)) == list(chain(*documents))
        for stream in range(streams):
            assert rows[stream]["memory_reset"]
        if apart:
            resets = [
                ids for row, ids in zip([row for row in order if row not in ended], visible) if row["memory_reset"]
            ]
            assert {tuple(document[:length]) for document in documents if document} <= {tuple(ids) for ids in resets}

    def test_targets_cross_segments_but_not_resets(self):
        dataset = Dataset.from_dict({"input_ids": [[3, 4, 5, 6, 7], [8, 9]], "book": ["a", "b"]})
        rows = segment_streams(dataset, 2, 1, document_column="book")
        assert rows["input_ids"] == [[3, 4], [5, 6], [7, 0], [8, 9]]
        assert rows["memory_reset"] == [True, False, False, True]
        assert rows["labels"] == [[-100, 4], [5, 6], [7, -100], [-100, 9]]
        assert rows["shift_labels"] == [[4, 5], [6, 7], [-100, -100], [9, -100]]
        assert rows["attention_mask"] == [[1, 1], [1, 1], [1, 0], [1, 1]]

    def test_two_streams_read_two_halves(self):
        rows = segment_streams(Dataset.from_dict({"input_ids": [list(range(3, 13))]}), 2, 2)
        assert rows["input_ids"] == [[3, 4], [9, 10], [5, 6], [11, 12], [7, 8], [0, 0]]
        assert rows["memory_reset"] == [True, True, False, False, False, True]
        shifted, labels = np.array(rows["shift_labels"]), np.array(rows["labels"])
        assert (shifted != -100).sum() == (labels != -100).sum()

    def test_refusals(self):
        dataset = Dataset.from_dict({"input_ids": [[1, 2]]})
        with pytest.raises(TypeError, match="streamed"):
            segment_streams(dataset.to_iterable_dataset(), 4, 1)
        with pytest.raises(ValueError, match="segment_length is 1 and batch_size 0"):
            segment_streams(dataset, 1, 0)
        with pytest.raises(ValueError, match="1 rows but 0 tokens"):
            segment_streams(
                Dataset.from_dict({"input_ids": [[]]}).cast_column("input_ids", dataset.features["input_ids"]), 4, 1
            )


class TestCollating:
    def test_pads_each_column_to_its_own_length(self, tokenizer):
        rows = [
            {"input_ids": [5, 6, 7], "labels": [8], "text": "a"},
            {"input_ids": [5], "labels": [8, 9], "text": "b"},
        ]
        batch = PaddingCollator(tokenizer)(rows)
        assert batch["input_ids"].tolist() == [[5, 6, 7], [5, 0, 0]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["labels"].tolist() == [[8, -100], [8, 9]]
        assert set(batch) == {"input_ids", "attention_mask", "labels"} and batch["labels"].dtype == torch.long

    def test_pads_teacher_columns_and_keeps_flags(self, tokenizer):
        rows = [
            {"input_ids": [5] * size, "teacher_ids": [[1, 2]] * size, "teacher_weights": [[0.5, 0.5]] * size}
            | {"memory_reset": size == 1, "labels": size % 2}
            for size in (1, 2)
        ]
        batch = PaddingCollator(tokenizer, pad_to_multiple_of=4)(rows)
        assert batch["teacher_ids"].shape == batch["teacher_weights"].shape == (2, 4, 2)
        assert batch["teacher_weights"].dtype.is_floating_point and batch["teacher_weights"][0, 1:].eq(0).all()
        assert batch["memory_reset"].tolist() == [True, False] and batch["labels"].tolist() == [1, 0]

    def test_packed_rows_get_no_mask(self, tokenizer):
        rows = [{"input_ids": [5, 6, 7], "position_ids": [0, 1, 0]}, {"input_ids": [5], "position_ids": [0]}]
        batch = PaddingCollator(tokenizer)(rows)
        assert "attention_mask" not in batch and batch["position_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.padding_side = "left"
        assert PaddingCollator(tokenizer)(rows)["position_ids"].tolist() == [[0, 1, 0], [0, 1, 0]]

    def test_left_padding(self, tokenizer):
        collate = PaddingCollator(train_tokenizer(["x"], 300))
        collate.tokenizer.padding_side = "left"
        assert collate([{"input_ids": [5, 6]}, {"input_ids": [7]}])["input_ids"].tolist() == [[5, 6], [0, 7]]

    def test_columns_without_numbers_are_dropped(self, tokenizer):
        text = {"tags": ["a", "b"], "messages": [{"role": "user"}], "name": None, "split": "x"}
        rows = [{"input_ids": [5], "weight": 0.5, **text}, {"input_ids": [5, 6], "weight": 1, **text, "tags": []}]
        assert set(PaddingCollator(tokenizer)(rows)) == {"input_ids", "attention_mask", "weight"}

    def test_without_a_pad_token_the_mask_decides(self):
        tokenizer = train_tokenizer(["x"], 300)
        tokenizer.pad_token = None
        batch = PaddingCollator(tokenizer)(
            [{"input_ids": [5, 2], "labels": [5, 2]}, {"input_ids": [2], "labels": [2]}]
        )
        assert batch["input_ids"].tolist() == [[5, 2], [2, 0]] and batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
        assert batch["labels"].tolist() == [[5, 2], [2, -100]]

    def test_refuses_an_empty_batch(self, tokenizer):
        with pytest.raises(ValueError, match="0 rows"):
            PaddingCollator(tokenizer)([])


def test_packed_documents_equal_documents_by_themselves(tiny_config, tokenizer):
    """What packing promises, on the model: the logits of a document do not depend on its neighbours."""
    from modeling_flashlite import FlashLiteForCausalLM

    model = FlashLiteForCausalLM(tiny_config()).eval()
    documents = [[5, 6, 7, 8, 9], [10, 11, 12]]
    batch = PaddingCollator(tokenizer)(list(pack(Dataset.from_dict({"input_ids": documents}), 16)))
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        alone = [model(input_ids=torch.tensor([document])).logits[0] for document in documents]
    torch.testing.assert_close(packed[:8], torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_segments_through_the_memory_equal_one_pass(tiny_config, tokenizer):
    """What the streams promise, on the model: with their memory, segments lose as much as the whole text does."""
    from modeling_flashlite import FlashLiteForCausalLM

    model = FlashLiteForCausalLM(tiny_config(memory_blocks=None, relevance_top_k=None)).eval()
    text = torch.randint(3, 90, (40,)).tolist()
    rows = segment_streams(Dataset.from_dict({"input_ids": [text]}), 8, 1)
    memory, total, count = model.new_memory(), 0.0, 0
    with torch.no_grad():
        for row in rows:
            batch = PaddingCollator(tokenizer)([row])
            assert bool(batch.pop("memory_reset")) == (count == 0)
            outputs = model(**batch, memory=memory, num_items_in_batch=1)
            memory, total, count = (
                outputs.memory,
                total + float(outputs.loss),
                count + int((batch["shift_labels"] != -100).sum()),
            )
        whole = model(input_ids=torch.tensor([text]), labels=torch.tensor([text])).loss
    assert count == 39
    assert total / count == pytest.approx(float(whole), rel=1e-4)


def test_neighbouring_rows_of_one_document_are_joined():
    rows = Dataset.from_dict({"book": ["a", "a", "b", "a"], "text": ["one", "two", None, "three"]})
    assert join_rows(rows, "text", "book")["text"] == ["one\ntwo", "", "three"]
    with pytest.raises(ValueError, match="stream"):
        join_rows(rows.to_iterable_dataset(), "text", "book")
