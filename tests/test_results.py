"""Results files: what they hold, atomic writes, and no path of a machine."""

import json
import sys

import numpy as np
import pytest

from modeling_flashlite.measure import results


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
