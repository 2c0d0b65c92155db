"""README is true: its Python runs, the files and commands it names exist, its tables equal the results files."""

import ast
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import make_tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from verbs import TINY_RUN, argument_classes, load_script

from modeling_flashlite.cli import parse_args

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIVE = ("convert", "finetune", "quantize", "evaluate", "chat")
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
    run(str(ROOT / "scripts/demo.py"), "--from_scratch", "--size", "smallest", cwd=where)
    return where


@pytest.mark.slow
def test_demo_ends_with_a_table_and_json(folder):
    lines = (folder / "stdout.txt").read_text(encoding="utf-8").splitlines()
    result = json.loads(lines[-1])
    assert [row["stage"] for row in result["stages"]] == ["converted", "sparse", "quantized", "lora"]
    quantized = next(row for row in result["stages"] if row["stage"] == "quantized")
    assert quantized["bits_per_weight"] <= 3.03  # the budget that the demo asks for, one per cent more
    assert isinstance(result["chat"]["answer"], str)
    assert any(line.split()[:2] == ["stage", "parameters"] for line in lines)


@pytest.mark.slow
def test_finished_stages_are_kept(folder):
    for options, count in (([], 7), (["--from_scratch"], 8)):
        root = folder / ("runs/scratch" if options else "runs/demo")
        before = {path: path.stat().st_mtime_ns for path in root.rglob("stage.json")}
        output = run(str(ROOT / "scripts/demo.py"), *options, "--size", "smallest", cwd=folder)
        assert output.count("finished before, kept") == len(before) == count
        assert before == {path: path.stat().st_mtime_ns for path in root.rglob("stage.json")}


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[0][:40])
def test_python_block_runs(block, folder):
    run("-c", block, cwd=folder)


def test_first_python_block_runs(tmp_path):
    """On every version of transformers that is allowed, see scripts/versions.sh."""
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    printed = run("-c", BLOCKS[0], cwd=tmp_path)
    assert printed.count("Bahnhof") == 1 and printed.startswith("[{'"), printed


@pytest.mark.slow
def test_notebook_runs_and_shows_its_outputs(tmp_path):
    cells = json.loads((ROOT / "scripts/quickstart.ipynb").read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] and cell["execution_count"] for cell in cells)
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    printed = run("-c", "\n".join("".join(cell["source"]) for cell in cells), cwd=tmp_path)
    assert 3.3 < float(re.search(r"([\d.]+) bits per weight", printed).group(1)) < 3.6  # 3.5 were asked for


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_chat_model_of_ones_own_in_five_commands(tmp_path, monkeypatch, capsys):
    """Each as README has it, on a tiny model of another family and a few conversations."""
    block = re.search(r"from a Hub name.*?```bash\n(.*?)```", README, re.DOTALL)[1].replace("\\\n", " ")
    commands = [shlex.split(line) for line in block.splitlines()]
    assert [words[1] for words in commands] == [f"scripts/{name}.py" for name in FIVE]
    monkeypatch.chdir(tmp_path)
    Path("scripts").symlink_to(ROOT / "scripts")
    turns = [{"from": "human", "value": "who grants?"}, {"from": "gpt", "value": "the licensor"}]
    for name in "abc":
        Path(f"{name}.jsonl").write_text(json.dumps({"conversations": turns}) + "\n", encoding="utf-8")
    tokenizer = make_tokenizer()
    turn, asked = "<|{{ m.role }}|>{{ m.content }}<|end|>", "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{turn}{{% endfor %}}{asked}"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"vocab_size": len(tokenizer), "eos_token_id": 2, "pad_token_id": 0}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained("llama")
    tokenizer.save_pretrained("llama")
    tiny = {
        "convert": ["--model=llama", "--report_tokens=0"],
        "finetune": [*TINY_RUN, "--lora_r=2", "--load_best_model_at_end=false"],
        "quantize": [*TINY_RUN, "--calibration_batches=1", "--target_bits=6"],
        "evaluate": ["--max_new_tokens=4", "--speed_tokens=2", "--resamples=0"],
        "chat": ["--max_tokens=4"],
    }
    monkeypatch.setattr(sys, "stdin", io.StringIO("who grants?\n"))
    for name, words in zip(FIVE, commands):
        script, argv = load_script(name), [*words[2:], *tiny[name]]
        if name == "chat":
            assert script.main(argv) == 0
        else:
            script.main(*parse_args(argument_classes(script), argv))
    assert AutoModelForCausalLM.from_pretrained("runs/small").is_quantized


def test_experiment_log_names_commits_and_files():
    folder = ROOT / "model_cards/results"
    text = (folder / "LOG.md").read_text(encoding="utf-8")
    entries = re.split(r"\n(?=- )", text.partition("\n## ")[2])
    entries = [entry for entry in entries if entry.startswith("- ")]
    assert len(entries) > 50
    for entry in entries:
        assert re.match(r"- \*\*20\d\d-\d\d-\d\d `[0-9a-f]{7}` \S", entry), entry[:80]
    named = set(re.findall(r"`([\w-]+\.json|[a-z_]+/)`", text))
    assert named and not [name for name in named if not (folder / name).exists()]


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


def test_first_screen_installs_and_runs():
    lines = README.splitlines()
    assert len(lines) < 240
    assert lines.index("```python") < 15 and any(line.startswith("pip install") for line in lines[:10])
    assert lines.index("<!-- real model: made by scripts/studies/readme_table.py -->") < 25


def test_names_that_it_imports_are_at_the_root():
    """A reader need not know the folders; and what is promised there exists."""
    import modeling_flashlite

    nodes = [node for block in BLOCKS for node in ast.walk(ast.parse(block)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if node.module.partition(".")[0] == "modeling_flashlite"]
    assert ours and {node.module for node in ours} == {"modeling_flashlite"}
    for name in {alias.name for node in ours for alias in node.names} | set(modeling_flashlite.__all__):
        assert callable(getattr(modeling_flashlite, name)) and name in dir(modeling_flashlite)
