"""A Hub-compatible server for tests: accounts, repositories that are removed afterwards, clean processes."""

import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from checkpoints import HEADS, RESULTS, WRITTEN, save_checkpoint
from huggingface_hub import HfApi, constants

from modeling_flashlite.publish import cards
from modeling_flashlite.publish.repository import stage

ROOT = Path(__file__).parents[1]
ENDPOINT = os.environ.get("HF_ENDPOINT")
TOKEN = os.environ.get("FLASHLITE_HUB_TOKEN") or os.environ.get("HF_TOKEN")
KINDS = {**HEADS, "quantized": HEADS["seq2seq"]}
BLOCKER = "import sys; sys.modules['modeling_flashlite'] = None\n"
NEEDS_HUB = [
    pytest.mark.network,
    pytest.mark.skipif(not (ENDPOINT and TOKEN), reason="HF_ENDPOINT and FLASHLITE_HUB_TOKEN name no Hub to talk to"),
]


def other(name: str) -> str:
    """Token or password from the environment; skip the test without it."""
    value = os.environ.get(f"FLASHLITE_HUB_{name}")
    if not value:
        pytest.skip(f"FLASHLITE_HUB_{name} is not set")
    return value


@pytest.fixture(scope="module")
def account():
    return HfApi(token=TOKEN).whoami()["name"]


@pytest.fixture
def repo(account):
    """Name of a repository that does not exist yet; removed afterwards."""
    name = f"{account}/flashlite-test-{uuid.uuid4().hex[:10]}"
    yield name
    HfApi(token=TOKEN).delete_repo(name, missing_ok=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """One saved checkpoint of every head, and a quantized one."""
    folder = tmp_path_factory.mktemp("runs")
    return {kind: save_checkpoint(kind, folder / kind) for kind in KINDS}


def complete(run: Path, folder: Path, repo: str, task: str | None = None) -> Path:
    """Stage a run with a card whose snippet was not run; running it is tested in test_cards.py."""
    stage(run, folder, task=task)
    card = cards.collect_card(folder, repo, [{**RESULTS, "float": RESULTS["metrics"]}], WRITTEN)
    (folder / "README.md").write_text(cards.render_card({**card, "snippet_output": "text"}))
    return folder


@pytest.fixture
def staged(runs, tmp_path, repo):
    return complete(runs["seq2seq"], tmp_path / "staged", repo, "translation")


@pytest.fixture(params=["lfs", "xet"])
def path(request, monkeypatch):
    """Both ways of uploading and downloading large files."""
    if request.param == "xet":
        pytest.importorskip("hf_xet")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", request.param == "lfs")
    return request.param


def remote(repo: str, revision: str | None = None) -> dict[str, int]:
    entries = HfApi(token=TOKEN).list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry.size for entry in entries if hasattr(entry, "size") and entry.path != ".gitattributes"}


def commits(repo: str) -> int:
    return len(HfApi(token=TOKEN).list_repo_commits(repo))


def clean(code: str, home: Path, token: str | None = TOKEN, check: bool = True, **environment):
    """Run code where only transformers, torch and numpy can be imported, with its own empty cache."""
    kept = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS", "SYSTEMROOT") if name in os.environ}
    credentials = {"HF_TOKEN": token} if token else {}
    variables = {
        **kept,
        "HF_HOME": str(home),
        "HOME": str(home),
        "HF_ENDPOINT": ENDPOINT,
        **credentials,
        **environment,
    }
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-I", "-c", BLOCKER + code]
    done = subprocess.run(command, env=variables, cwd=home, capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done
