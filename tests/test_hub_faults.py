"""Uploads and downloads against a server that fails, a full disk, and no network; where `test_hub.py` runs."""

# ruff: noqa: F811  (fixtures of hub_server)
import os
import resource

import pytest
from checkpoints import httpx
from hub_server import (  # noqa: F401  (fixtures among them)
    ENDPOINT,
    NEEDS_HUB,
    ROOT,
    TOKEN,
    account,
    clean,
    commits,
    complete,
    other,
    path,
    remote,
    repo,
    runs,
    staged,
)
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from modeling_flashlite.publish import hub
from modeling_flashlite.publish.hub import DownloadError, Publisher, PublishError
from modeling_flashlite.publish.repository import list_files

pytestmark = NEEDS_HUB


@pytest.fixture
def faults():
    """Function that makes the server fail; everything is healed afterwards."""
    headers = {"Authorization": f"Bearer {other('ADMIN_TOKEN')}"}

    def inject(**fault):
        httpx.post(f"{ENDPOINT}/_admin/faults", json=fault, headers=headers).raise_for_status()

    yield inject
    httpx.delete(f"{ENDPOINT}/_admin/faults", headers=headers).raise_for_status()


@pytest.mark.parametrize("fault", [{"status": 503}, {"reset": True}], ids=["503", "dropped"])
@pytest.mark.parametrize(
    "where", ["commit/", "preupload", "upload|v1/xorbs|v1/shards"], ids=["commit", "plan", "data"]
)
def test_upload_survives_faults_or_leaves_the_repository_as_it_was(path, repo, staged, faults, fault, where):
    publisher = Publisher(repo, TOKEN)
    publisher.publish(staged)
    (staged / "README.md").write_text((staged / "README.md").read_text() + "\nMore.\n")
    weights = (staged / "model.safetensors").resolve().read_bytes()
    (staged / "model.safetensors").unlink()
    # another copy of the same length: new bytes to send
    (staged / "model.safetensors").write_bytes(weights[:-16] + os.urandom(16))
    before = remote(repo), HfApi(token=TOKEN).repo_info(repo).sha
    faults(match=where, times=2, **fault)
    report = publisher.publish(staged)
    assert HfApi(token=TOKEN).repo_info(repo).sha == report["commit"] != before[1]
    assert remote(repo) == {file.name: file.size for file in list_files(staged)}
    assert commits(repo) == 3


def test_upload_that_never_gets_through_says_so_and_changes_nothing(path, repo, staged, faults, monkeypatch):
    publisher = Publisher(repo, TOKEN, retries=1)
    before = publisher.publish(staged)["commit"]
    (staged / "README.md").write_text((staged / "README.md").read_text() + "\nMore.\n")
    faults(match="/commit/", status=503, times=1000)
    with pytest.raises(PublishError, match=r"Could not commit the files .*run again to resume") as caught:
        publisher.publish(staged)
    assert "\n" not in str(caught.value) and TOKEN not in str(caught.value)
    assert HfApi(token=TOKEN).repo_info(repo).sha == before


def test_damaged_downloads_are_refused(path, repo, staged, faults, tmp_path):
    Publisher(repo, TOKEN).publish(staged)
    weights = "model.safetensors|/lfs/|/xorb/"
    faults(match=weights, method="GET", server="cdn", truncate=1000, times=1)
    folder = hub.download(repo, token=TOKEN, cache_dir=tmp_path / "truncated")
    assert (folder / "model.safetensors").read_bytes() == (staged / "model.safetensors").read_bytes()
    faults(match=weights, method="GET", server="cdn", corrupt=True, times=1)
    folder = hub.download(repo, token=TOKEN, cache_dir=tmp_path / "once")
    assert (folder / "model.safetensors").read_bytes() == (staged / "model.safetensors").read_bytes()
    if path == "xet":
        return  # its client keeps trying for minutes before it gives up
    faults(match=weights, method="GET", server="cdn", corrupt=True, times=1000)
    with pytest.raises(DownloadError):
        hub.download(repo, token=TOKEN, cache_dir=tmp_path / "always")
    assert not list((tmp_path / "always").rglob("snapshots/*/model.safetensors"))


def test_a_full_disk_is_reported_and_leaves_a_usable_cache(path, repo, staged, tmp_path):
    Publisher(repo, TOKEN).publish(staged)
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r}); del sys.modules["modeling_flashlite"]
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from modeling_flashlite.publish.hub import download, DownloadError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
try:
    download({repo!r})
except DownloadError as error:
    print("refused:", error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print((download({repo!r}) / "model.safetensors").stat().st_size)
"""
    done = clean(code, tmp_path / "home", HF_HUB_DISABLE_XET="1" if path == "lfs" else "0")
    refused, size = done.stdout.splitlines()[-2:]
    assert refused.startswith("refused: ") and int(size) == (staged / "model.safetensors").stat().st_size
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_warm_cache_works_offline(repo, runs, tmp_path):
    Publisher(repo, TOKEN).publish(complete(runs["seq2seq"], tmp_path / "staged", repo, "translation"))
    code = f"""
from transformers import pipeline
pipe = pipeline("translation", model={repo!r}, trust_remote_code=True, max_new_tokens=4)
print(pipe("Hello")[0].keys())
"""
    online = clean(code, tmp_path / "home").stdout
    offline = clean(code, tmp_path / "home", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1").stdout
    assert online.splitlines()[-1] == offline.splitlines()[-1] == "dict_keys(['translation_text'])"
    cold = clean(code, tmp_path / "cold", check=False, HF_HUB_OFFLINE="1")
    assert cold.returncode == 1 and "offline" in cold.stderr.lower()


def test_server_errors_keep_their_text_and_lose_the_token():
    request = httpx.Request("GET", "http://hub")
    error = HfHubHTTPError("quota of hf_secret used up", response=httpx.Response(402, request=request))
    explained = hub.explain("commit the files", "you/model", error, "hf_secret")
    assert "402" in str(explained) and "hf_secret" not in str(explained)
