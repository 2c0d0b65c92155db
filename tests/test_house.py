"""Architecture rules: allowed imports, files that travel to the Hub, cost of an import, versions and documents."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_flashlite"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
HUB = {name for name in MODULES if name.endswith("_flashlite")}
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))

# floors 0 and 1, what travels: every edge by name; imports go down, never up
EDGES = {
    "attention_dense": set(),
    "attention_parts": {"compat"},
    "attention_tiles": {"attention_parts"},
    "compat": set(),
    "configuration": {"compat", "lora_targets", "quantization"},
    "codec": set(),
    "coded": set(),
    "int4": {"int8", "rare", "tiles"},
    "int8": {"rare", "tiles"},
    "rare": {"tiles"},
    "tiles": set(),
    "linear": {"compat"},
    "ecq_parents": set(),
    "lora_targets": set(),
    "pipeline": {"compat", "spans"},
    "spans": set(),
    "saving": set(),
    "attention": {"attention_dense", "attention_parts", "attention_tiles"},
    "ecq_weight": {"rare", "tiles"},
    "ecq_stream": {"codec", "ecq_weight", "tiles"},
    "ecq_reader": {"codec", "ecq_stream", "ecq_weight", "tiles"},
    "ecq_modules": {"ecq_weight", "int4", "linear", "rare", "tiles"},
    "ecq_twins": {"ecq_modules", "ecq_weight"},
    "ecq_probe": {"ecq_search"},
    "ecq_search": {"ecq_stream", "ecq_weight"},
    "loss": {"ecq_twins", "linear"},
    "ecq_config": set(),
    "ecq_layers": {
        "compat",
        "ecq_config",
        "ecq_modules",
        "ecq_parents",
        "ecq_search",
        "ecq_twins",
        "ecq_weight",
        "linear",
    },
    "quantization": {
        "coded",
        "ecq_config",
        "ecq_layers",
        "ecq_modules",
        "ecq_probe",
        "ecq_reader",
        "ecq_search",
        "ecq_stream",
        "ecq_twins",
        "ecq_weight",
    },
    "working_set": {"attention", "attention_dense", "attention_parts"},
    "rows": set(),
    "cache_blocks": {"attention", "rows"},
    "cache": {"attention", "cache_blocks"},
    "positions": set(),
    "layers": {"attention", "attention_dense", "cache", "configuration", "linear", "positions", "rows"},
    "base": {"compat", "configuration", "layers", "quantization", "saving"},
    "stacks": {"base", "cache", "compat", "configuration", "layers", "linear", "positions", "rows"},
    "layer_step": {
        "attention",
        "attention_dense",
        "cache",
        "ecq_modules",
        "int4",
        "layers",
        "linear",
        "positions",
        "tiles",
        "working_set",
    },
    "decode": {"base", "cache", "compat", "int4", "layer_step", "layers", "linear", "positions", "stacks"},
    "modeling": {
        "base",
        "cache",
        "compat",
        "configuration",
        "decode",
        "int8",
        "linear",
        "loss",
        "quantization",
        "stacks",
    },
}
# floor 2, the workshop, one folder per activity: it stands on everything that travels, and on these of its own floor
WORKSHOP_EDGES = {
    "checkpoint": {"data.tasks"},
    "cli": {"measure.cost", "spelling"},
    "data.batching": {"data.loading", "data.tokenization"},
    "data.corpus": set(),
    "data.labels": set(),
    "data.loading": {"data.corpus", "spelling"},
    "data.conversations": set(),
    "data.preprocessing": {
        "data.batching",
        "data.conversations",
        "data.loading",
        "data.labels",
        "data.tasks",
        "data.tokenization",
    },
    "data.tasks": {"data.conversations", "data.labels", "data.loading", "spelling"},
    "data.tokenization": set(),
    "measure.benchmark": {"measure.cost", "measure.plots"},
    "measure.compression": {"measure.plots", "measure.results", "training.calibration", "training.moments"},
    "measure.cost": {"checkpoint"},
    "measure.evaluation": {
        "data.batching",
        "data.loading",
        "data.preprocessing",
        "data.labels",
        "data.tasks",
        "data.tokenization",
        "measure.metrics",
        "measure.perplexity",
        "measure.results",
    },
    "measure.long_context": {"measure.plots"},
    "measure.metrics": set(),
    "measure.own_metrics": set(),
    "measure.parallel": {"measure.scaling"},
    "measure.parity": set(),
    "measure.peers": set(),
    "measure.perplexity": {"data.tokenization", "measure.metrics"},
    "measure.plots": set(),
    "measure.results": set(),
    "measure.scaling": set(),
    "measure.study": {"cli", "measure.benchmark", "measure.peers", "measure.results", "measure.workloads"},
    "measure.workloads": {"training.divergence", "training.families"},
    "native.kernels": set(),
    "publish.cards": {"publish.repository"},
    "publish.hub": {"publish.repository"},
    "publish.onnx_export": set(),
    "publish.repository": {"data.tasks"},
    "serve.continuous": {"serve.jobs"},
    "serve.engine": {"checkpoint", "data.tokenization", "serve.continuous", "serve.grammar", "serve.jobs"},
    "serve.grammar": set(),
    "serve.jobs": {"serve.grammar"},
    "serve.openai_schema": {"serve.jobs"},
    "serve.page": {"serve.engine", "serve.jobs"},
    "serve.terminal": {"serve.engine", "serve.jobs"},
    "serve.endpoints": {"serve.engine", "serve.openai_schema", "serve.server", "serve.tools"},
    "serve.server": {"serve.engine", "serve.grammar", "serve.jobs", "serve.openai_schema", "serve.tools"},
    "serve.tools": set(),
    "training.conversion": {"training.converted_files", "training.families", "training.source"},
    "training.converted_files": {"training.families", "training.source"},
    "training.source": {"training.families"},
    "training.families": set(),
    "training.pruning": {"training.families"},
    "training.checks": {"data.tasks", "measure.metrics", "training.trainers"},
    "training.distillation": {
        "training.divergence",
        "training.teacher",
        "training.teacher_cache",
        "training.trainers",
        "training.conversion",
        "training.families",
    },
    "training.blocks": {"training.moments", "training.replay"},
    "training.calibration": {"training.blocks"},
    "training.divergence": set(),
    "training.launch": {
        "checkpoint",
        "cli",
        "data.batching",
        "data.loading",
        "data.preprocessing",
        "data.labels",
        "data.tasks",
        "data.tokenization",
        "training.checks",
        "training.teacher",
        "measure.plots",
        "training.trainers",
    },
    "training.lora": set(),
    "training.lsq": set(),
    "training.scratch": {
        "data.batching",
        "data.loading",
        "data.tokenization",
        "measure.cost",
        "measure.perplexity",
        "training.calibration",
        "training.distillation",
        "training.divergence",
        "training.lora",
        "training.qat",
        "training.stages",
        "training.teacher_cache",
    },
    "training.parents": {"data.tokenization", "training.stages"},
    "training.pretrained": {
        "data.batching",
        "data.corpus",
        "measure.cost",
        "measure.parity",
        "measure.perplexity",
        "training.calibration",
        "training.conversion",
        "training.lora",
        "training.parents",
        "training.sampling",
        "training.stages",
    },
    "training.stages": {"measure.cost", "measure.results", "training.trainers"},
    "training.moments": set(),
    "training.qat": {"training.calibration"},
    "training.replay": set(),
    "training.sampling": {"data.tokenization", "measure.results"},
    "spelling": set(),
    "training.teacher": set(),
    "training.teacher_cache": {
        "checkpoint",
        "data.batching",
        "data.loading",
        "training.divergence",
        "training.teacher",
    },
    "training.trainers": {"data.loading"},
}
# huggingface_hub gives configurations their `strict` decorator; transformers itself cannot be installed without it
SHIPPED_IMPORTS = {"torch", "numpy", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
# shipped code is read before it is trusted: it opens no file and no connection and starts nothing
FORBIDDEN_IMPORTS = {"ctypes", "http", "pickle", "shutil", "socket", "subprocess", "tempfile", "urllib", "webbrowser"}
FORBIDDEN_CALLS = {"open", "eval", "exec", "compile", "__import__"}
# one exception: the quantizer reads the header of the safetensors files that transformers hands it
ALLOWED_CALLS = {"quantization_flashlite": {"open"}}


def imports(path: Path) -> tuple[set[str], set[str]]:
    """Return (modules of ours, top-level names of others) that a file imports anywhere in it."""
    ours, others = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            others |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            assert node.module, f"{path.name}: import names from a module, not modules"
            folder = list(path.relative_to(PACKAGE).parts[:-1]) if path.is_relative_to(PACKAGE) else []
            ours.add(".".join([*folder[: len(folder) - node.level + 1], node.module]))
        elif isinstance(node, ast.ImportFrom):
            others.add(node.module.partition(".")[0])
    return ours, others


def called_names(path: Path) -> set[str]:
    """Return the plain names that a file calls as functions."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    return {function.id for function in calls if isinstance(function, ast.Name)}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_go_down(name):
    ours, others = imports(MODULES[name])
    assert "modeling_flashlite" not in others, "inside the package, import relatively"
    table = EDGES if name in HUB else WORKSHOP_EDGES
    short = name.removesuffix("_flashlite")
    assert short in table, f"{name}.py is new: give it a row in this test, with the modules it may import"
    allowed = {f"{edge}_flashlite" for edge in EDGES} if name not in HUB else set()
    allowed |= {f"{edge}_flashlite" if name in HUB else edge for edge in table[short]}
    assert ours <= allowed, f"{name}.py may not import {sorted(ours - allowed)}"


def test_init_imports_only_what_travels():
    ours, others = imports(PACKAGE / "__init__.py")
    assert ours <= HUB
    assert others <= SHIPPED_IMPORTS


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_do_not_import_scripts(path):
    ours, others = imports(path)
    assert not ours
    assert not others & ({script.stem for script in SCRIPTS} | {"scripts", "tests"})


def test_shipped_files_are_the_reachable_files():
    """`save_pretrained` copies what it reaches by relative imports: exactly what is meant to travel."""
    reached = {"modeling_flashlite", "pipeline_flashlite"}
    for name in list(reached):
        reached |= {Path(file).stem for file in get_relative_import_files(str(MODULES[name]))}
    assert reached == HUB


@pytest.mark.parametrize("name", sorted(HUB))
def test_shipped_file_needs_nothing_unusual(name):
    path = MODULES[name]
    ours, others = imports(path)
    assert others <= SHIPPED_IMPORTS, f"{name}.py imports {sorted(others - SHIPPED_IMPORTS)}"
    assert not others & FORBIDDEN_IMPORTS
    assert not called_names(path) & FORBIDDEN_CALLS - ALLOWED_CALLS.get(name, set())
    # transformers finds imports by a regular expression over the text, docstrings included
    assert set(get_relative_imports(path)) == ours


@pytest.mark.parametrize("name", sorted(MODULES))
def test_package_does_not_print(name):
    assert "print" not in called_names(MODULES[name])


def test_import_is_silent_and_cheap():
    """Beyond the libraries it stands on, importing costs less than 0.3 s of processor time and writes no line."""
    needed = sorted(set.union(*(imports(MODULES[name])[1] for name in HUB)) - set(sys.stdlib_module_names))
    code = (
        f"import time, {', '.join(needed)}\n"
        "from transformers import AutoModel, GenerationMixin, Pipeline, PreTrainedModel, PreTrainedTokenizerFast\n"
        "from transformers.quantizers import HfQuantizer\n"
        "start = time.process_time()\n"
        "import modeling_flashlite\n"
        "assert time.process_time() - start < 0.3, time.process_time() - start\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_wheel_holds_what_the_package_reads(tmp_path):
    """An installed package has its template and its type marker, as a checkout has."""
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    code = "from setuptools import build_meta; print(build_meta.build_wheel('wheel'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(tmp_path / "wheel" / done.stdout.splitlines()[-1]) as wheel:
        packed = {name for name in wheel.namelist() if name.startswith(f"{PACKAGE.name}/")}
    kept = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert packed == {name for name in kept if "__pycache__" not in name}


def test_map_in_contributing_names_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.partition("```\n")[2].partition("```")[0]
    missing = [
        name for name in MODULES if not re.search(rf"\b{name.split('.')[-1].removesuffix('_flashlite')}\b", tree)
    ]
    assert not missing, "add these modules to the map in CONTRIBUTING.md"
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert {f"{folder}/" for folder in folders} <= set(tree.split())


def test_versions_agree():
    def find(file, pattern):
        return re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE).group(1)

    import modeling_flashlite

    version = find("pyproject.toml", r'^version = "(.+)"$')
    assert find("CITATION.cff", r"^version: (.+)$") == version
    assert find("CHANGELOG.md", r"^## (\S+)") == version
    assert modeling_flashlite.__version__ == version


def test_no_tracked_file_names_a_machine():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of tracked files")
    machine_path = re.compile(r"/(work|tmp|root|home|Users|opt|farm|mnt)/\w")
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue
        found += [f"{name}: {match.group()}" for match in machine_path.finditer(text)]
    assert not found
