"""README keeps its word: its Python runs, its commands name what exists, its table is the results file's."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def run(*command, cwd):
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An empty folder in which the demo has run at its smallest size."""
    where = tmp_path_factory.mktemp("readme")
    (where / "model_cards").symlink_to(ROOT / "model_cards")
    output = run(str(ROOT / "scripts/demo.py"), "--size", "smallest", cwd=where)
    (where / "stdout.txt").write_text(output, encoding="utf-8")
    return where


@pytest.mark.slow
def test_demo_ends_with_a_table_and_json(folder):
    lines = (folder / "stdout.txt").read_text(encoding="utf-8").splitlines()
    result = json.loads(lines[-1])
    assert [row["stage"] for row in result["stages"]] == ["teacher", "distilled", "quantized", "qat", "lora"]
    quantized = next(row for row in result["stages"] if row["stage"] == "quantized")
    assert quantized["bits_per_weight"] <= 3.03  # the budget that the demo asks for, one per cent more
    assert any(line.split()[:2] == ["stage", "parameters"] for line in lines)


@pytest.mark.slow
def test_finished_stages_are_kept(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("stage.json")}
    output = run(str(ROOT / "scripts/demo.py"), "--size", "smallest", cwd=folder)
    assert output.count("finished before, kept") == len(before) == 8
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("stage.json")}


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_python_block_runs(block, folder):
    run("-c", block, cwd=folder)


def test_named_files_exist():
    named = set(re.findall(r"\b((?:scripts|modeling_flashlite|tests)/[\w/]+\.\w+)", README))
    named |= {f"modeling_flashlite/{name}" for name in re.findall(r"`(\w+\.py)`", README)}
    missing = {name for name in named if not (ROOT / name).is_file()}
    assert named and not missing


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    wanted = {
        target for line in re.findall(r"^make ([a-z ]+?) *(?:#|$)", README, re.MULTILINE) for target in line.split()
    }
    assert wanted and wanted <= set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))


def test_tables_are_the_results_files():
    run(str(ROOT / "scripts/studies/readme_table.py"), "--check", cwd=ROOT)


def test_readme_is_short():
    lines = README.splitlines()
    assert len(lines) < 200
    assert lines.index("bash scripts/test.sh     # sets up .venv, then runs every test") < 30
