"""Results files: what they hold, atomic writes, and no path of a machine."""

import json
import subprocess
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

    def test_the_commit_is_that_of_the_whole_code(self, monkeypatch, tmp_path):
        def git(*arguments):
            command = ["git", "-C", str(tmp_path), "-c", "user.name=x", "-c", "user.email=x", *arguments]
            subprocess.run(command, check=True, capture_output=True)

        for name in ("package/__init__.py", "package/measure/results.py", "package/x.py", "scripts/a.py", "README.md"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text("1\n")
        monkeypatch.setattr(results, "__file__", str(tmp_path / "package" / "measure" / "results.py"))
        git("init")
        git("add", "README.md")
        git("commit", "-m", "another project")
        assert results.git_commit() is None
        git("add", ".")
        git("commit", "-m", "ours")
        clean = results.git_commit()
        (tmp_path / "README.md").write_text("2\n")
        assert results.git_commit() == clean
        for name in ("package/x.py", "scripts/a.py"):
            (tmp_path / name).write_text("2\n")
            assert results.git_commit() == f"{clean}-dirty"
            git("checkout", name)

    def test_paths_are_relative(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        text = f"--dataset train={tmp_path}/a.jsonl,test={tmp_path}/b.jsonl --lr 1/2 --task a/b"
        assert results.relative_paths(text) == "--dataset train=a.jsonl,test=b.jsonl --lr 1/2 --task a/b"
        monkeypatch.setattr(sys, "argv", [f"{tmp_path}/scripts/x.py", "--model", f"{tmp_path}/run"])
        assert results.command_line() == "python scripts/x.py --model run"
