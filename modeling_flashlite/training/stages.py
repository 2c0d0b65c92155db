# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""A job of several stages in one folder, which goes on where it was interrupted, and its table at the end."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import set_seed
from transformers.trainer_callback import ProgressCallback


class LossOnBar(ProgressCallback):
    """The Trainer's progress bar with the last losses on it, instead of one more line for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: f"{logs[name]:.3f}" for name in ("loss", "kd", "agree", "bits_per_weight") if name in logs}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


class Stages:
    """One folder of stages; each leaves what it made and `stage.json`, and is skipped when that is there.

    Args:
        root (`Path`): the folder.
        made_with (`Mapping`): arguments; a folder that was made with others is refused.
        seed (`int`): set before each stage, so that a resumed job does what an uninterrupted one does.

    Raises:
        ValueError: the folder was made with other arguments.
    """

    def __init__(self, root: Path, made_with: Mapping, seed: int):
        self.root, self.seed = Path(root), seed
        self.table: list[dict] = []
        self.seconds = 0.0
        record = self.root / "args.json"
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != dict(made_with):
            raise ValueError(f"{self.root} was made with other arguments; give another --output, or remove it.")
        _write(record, made_with)

    def stage(self, work: Callable[[Path], dict | None]) -> dict:
        """Run `work` on the stage's folder unless it is finished; return what it returned, a row of the table.

        A stage that was interrupted finds its folder as it left it.
        """
        name = work.__name__
        folder = self.root / name
        finished = folder / "stage.json"
        if finished.is_file():
            print_line(f"{name}: finished before, kept")
        else:
            print_line(name)
            set_seed(self.seed)
            start = time.monotonic()
            row = work(folder) or {}
            _write(finished, {**row, "seconds": round(time.monotonic() - start, 1)})
            shutil.rmtree(folder / "trainer", ignore_errors=True)
        row = json.loads(finished.read_text(encoding="utf-8"))
        self.seconds += row["seconds"]
        if "parameters" in row:
            self.table.append({"stage": name, **row})
        return row

    def render(self, columns: Mapping[str, tuple[str, str]]) -> str:
        """The table as text, one line for each stage: `columns` maps keys to a title and a format."""
        rows = [["stage", *(title for title, _ in columns.values())]]
        for row in self.table:
            cells = (pattern.format(row[key]) if key in row else "" for key, (_, pattern) in columns.items())
            rows.append([row["stage"], *cells])
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def print_line(text: str) -> None:
    """Say which stage runs."""
    sys.stdout.write(f"demo: {text}\n")
    sys.stdout.flush()


def _write(path: Path, content: Mapping) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(dict(content), indent=2), encoding="utf-8")
    part.replace(path)


def run_elsewhere(code: str, *arguments: str) -> dict:
    """Run Python code in a fresh process and folder, offline; return the JSON that it prints last.

    Raises:
        RuntimeError: with what it wrote, where it fails.
    """
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=home,
            env={**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"The saved model does not load by itself:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])
