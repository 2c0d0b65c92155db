"""Publishing and downloading against a Hub-compatible server, with the real clients and in clean processes.

They run where `HF_ENDPOINT` names a server and `FLASHLITE_HUB_TOKEN` a token with write access; the real Hub will do.
`FLASHLITE_HUB_OTHER_TOKEN` (another account), `FLASHLITE_HUB_READ_TOKEN` (read-only, same account) and
`FLASHLITE_HUB_ADMIN_TOKEN` (a test server that can be told to fail) add the tests that need them.
"""

# ruff: noqa: F811  (fixtures of hub_server)
import json
import os
import re
import shutil
import subprocess
import sys
import uuid

import pytest
import torch
from checkpoints import HEADS, RESULTS, TEXT, WRITTEN, make_model, make_tokenizer
from hub_server import (  # noqa: F401  (fixtures among them)
    KINDS,
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

from modeling_flashlite.publish import cards, hub
from modeling_flashlite.publish.hub import DownloadError, Publisher, PublishError
from modeling_flashlite.publish.repository import content_tag, list_files, stage
from modeling_flashlite.saving_flashlite import fitting_auto_map

pytestmark = NEEDS_HUB


def test_publish_is_one_commit_and_runs_again_without_another(path, repo, staged):
    files = list_files(staged)
    first = Publisher(repo, TOKEN).publish(staged, tag=content_tag(files), private=True)
    assert remote(repo) == {file.name: file.size for file in files}
    assert first["uploaded"] == len(files) and commits(repo) == 2  # the Hub's own first commit, and ours
    api = HfApi(token=TOKEN)
    assert api.repo_info(repo).private
    assert [tag.target_commit for tag in api.list_repo_refs(repo).tags] == [first["commit"]]
    again = Publisher(repo, TOKEN).publish(staged, tag=content_tag(files))
    assert again["commit"] == first["commit"] and again["uploaded"] == 0
    folder = hub.download(repo, token=TOKEN, cache_dir=staged.parent / "cache")
    assert (folder / "model.safetensors").read_bytes() == (staged / "model.safetensors").read_bytes()


def test_update_replaces_weights_and_removes_stale_files(repo, staged, runs):
    publisher = Publisher(repo, TOKEN)
    old = publisher.publish(staged)["commit"]
    (staged / "model.safetensors").unlink()
    make_model("seq2seq").save_pretrained(staged.parent / "sharded", max_shard_size="60KB")
    for shard in (staged.parent / "sharded").glob("model*"):
        shutil.copyfile(shard, staged / shard.name)
    (staged / "codec_flashlite.py").unlink(missing_ok=True)
    report = publisher.publish(staged)
    assert report["deleted"] >= 1 and "model.safetensors" not in remote(repo)
    assert remote(repo) == {file.name: file.size for file in list_files(staged)}
    assert "model.safetensors" in remote(repo, old)


def test_branch_and_pull_request_leave_main_alone(repo, staged):
    publisher = Publisher(repo, TOKEN)
    main = publisher.publish(staged)["commit"]
    (staged / "README.md").write_text((staged / "README.md").read_text() + "\nMore.\n")
    branch = publisher.publish(staged, branch="next")
    request = publisher.publish(staged, create_pr=True)
    api = HfApi(token=TOKEN)
    assert api.repo_info(repo).sha == main
    assert api.repo_info(repo, revision="next").sha == branch["commit"] != main
    assert [discussion.is_pull_request for discussion in api.get_repo_discussions(repo)] == [True]
    assert "discussions" in request["url"]


def test_heads_load_in_a_clean_process(account, runs, tmp_path):
    """Every head, quantized too, tokenizer and pipeline, with `trust_remote_code` only and the revision pinned."""
    published, expected = {}, {}
    inputs = torch.arange(8, 24)[None]
    try:
        for kind, (_, auto_class, crossed) in KINDS.items():
            name = f"{account}/flashlite-test-{kind}-{uuid.uuid4().hex[:8]}"
            report = Publisher(name, TOKEN).publish(complete(runs[kind], tmp_path / kind, name))
            published[name] = (auto_class, report["commit"], sorted(fitting_auto_map(crossed)))
            model = KINDS[kind][0].from_pretrained(runs[kind])
            with torch.no_grad():
                outputs = model(inputs, **({"decoder_input_ids": inputs} if crossed else {}))
            expected[name] = outputs[0].double().sum().item()
        code = f"""
import json, torch, transformers
from transformers import AutoConfig, AutoTokenizer, pipeline
inputs, found = torch.arange(8, 24)[None], {{}}
for name, (auto_class, revision, fitting) in {published!r}.items():
    hub = dict(revision=revision, trust_remote_code=True)
    model = getattr(transformers, auto_class).from_pretrained(name, **hub)
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        outputs = model(inputs, **({{"decoder_input_ids": inputs}} if auto_class == "AutoModelForSeq2SeqLM" else {{}}))
    found[name] = outputs[0].double().sum().item()
    assert not hasattr(model.config, "quantization_config") or "Ecq" in str(model)
    text = "Any text: äöü €"
    tokenizer = AutoTokenizer.from_pretrained(name, **hub)
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    if auto_class == "AutoModelForSeq2SeqLM":
        results = pipeline(model=name, max_new_tokens=4, **hub)(["a", "b"], batch_size=2)
        assert [list(result) for result in results] == [["generated_text"]] * 2
        assert pipeline("text2text-generation", model=name, **hub).task == "text2text-generation"
    if auto_class == "AutoModelForQuestionAnswering":
        assert "answer" in pipeline(model=name, **hub)(question="Who?", context="The Licensor.")
    if auto_class == "AutoModelForCausalLM":
        assert pipeline("text-generation", model=name, max_new_tokens=4, **hub)("The")[0]["generated_text"]
    assert sorted(AutoConfig.from_pretrained(name, **hub).auto_map) == fitting
assert not [name for name in __import__("sys").modules if name.startswith(("peft.", "datasets.", "evaluate"))]
print(json.dumps(found))
"""
        found = json.loads(clean(code, tmp_path / "home").stdout.splitlines()[-1])
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)
    finally:
        for name in published:
            HfApi(token=TOKEN).delete_repo(name)


def test_command_publishes_and_keeps_the_token_to_itself(repo, runs, tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "publish.py"), "--run", str(runs["causal"]), "--repo", repo]
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "--push"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["pushed"] and report["commit"] == HfApi(token=TOKEN).repo_info(repo).sha
    card = hub.download(repo, revision=report["tag"], token=TOKEN, cache_dir=tmp_path / "cache") / "README.md"
    for text in (done.stdout, done.stderr, card.read_text()):
        assert TOKEN not in text
    environment["HF_TOKEN"] = "hf_wrong"
    refused = subprocess.run([*command, "--push"], env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and re.fullmatch(r"publish: .*\(401\).*\n", refused.stderr.splitlines()[-1] + "\n")
    assert "hf_wrong" not in refused.stdout + refused.stderr and "Traceback" not in refused.stderr


# PEFT reads a property that transformers has renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_adapter_is_published_and_loads_on_its_base(account, repo, runs, tmp_path):
    from peft import LoraConfig, get_peft_model

    base = f"{account}/flashlite-test-base-{uuid.uuid4().hex[:8]}"
    Publisher(base, TOKEN).publish(complete(runs["causal"], tmp_path / "base", base))
    try:
        model = HEADS["causal"][0].from_pretrained(runs["causal"])
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = get_peft_model(model, config)
        adapted.save_pretrained(tmp_path / "run")
        stage(tmp_path / "run", tmp_path / "staged", base_model=base)
        written = {**WRITTEN, "base_model": base, "base_model_relation": "adapter"}
        card = cards.collect_card(tmp_path / "staged", repo, [RESULTS], written)
        (tmp_path / "staged" / "README.md").write_text(cards.render_card({**card, "snippet_output": "text"}))
        Publisher(repo, TOKEN).publish(tmp_path / "staged", tag=card["revision"])
        assert set(remote(repo)) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
        code = "import transformers, peft\n" + card["snippet"] + "print(model(**inputs)[0].double().sum().item())\n"
        printed = clean(code, tmp_path / "home").stdout.splitlines()[-1]
        inputs = make_tokenizer()(WRITTEN["example"], return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            assert float(printed) == pytest.approx(adapted.eval()(**inputs)[0].double().sum().item(), rel=1e-4)
    finally:
        HfApi(token=TOKEN).delete_repo(base)


def test_plain_push_to_hub_of_model_tokenizer_and_trainer(repo, account, runs, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

    tokenizer, model = (
        AutoTokenizer.from_pretrained(runs["causal"]),
        AutoModelForCausalLM.from_pretrained(runs["causal"]),
    )
    model.push_to_hub(repo, token=TOKEN)
    tokenizer.push_to_hub(repo, token=TOKEN)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(remote(repo))
    arguments = TrainingArguments(
        tmp_path / repo.rpartition("/")[2],
        max_steps=1,
        push_to_hub=True,
        hub_model_id=repo,
        hub_token=TOKEN,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [
        {"input_ids": (ids := tokenizer(line)["input_ids"][:8] + [0] * 8)[:8], "labels": ids[:8]} for line in TEXT[:4]
    ]
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub()
    again = AutoModelForCausalLM.from_pretrained(repo, token=TOKEN, cache_dir=tmp_path / "cache")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), trainer.model.state_dict().values()))


def test_wrong_read_only_and_foreign_tokens_are_told_apart(repo, staged):
    with pytest.raises(PublishError, match=r"refused .*401"):
        Publisher(repo, "hf_" + "wrong" * 4).publish(staged)
    with pytest.raises(PublishError, match=r"may not .*\(403\)"):
        Publisher(repo, other("READ_TOKEN")).publish(staged)
    before = Publisher(repo, TOKEN).publish(staged)["commit"]
    (staged / "README.md").write_text((staged / "README.md").read_text() + "\nMine.\n")
    with pytest.raises(PublishError, match=r"\(403\)"):
        Publisher(repo, other("OTHER_TOKEN")).publish(staged)
    assert HfApi(token=TOKEN).repo_info(repo).sha == before


def test_private_gated_and_missing_are_one_sentence(repo, staged, tmp_path):
    Publisher(repo, TOKEN).publish(staged, private=True)
    stranger = other("OTHER_TOKEN")
    with pytest.raises(DownloadError, match=r"not found, or this account may not see it"):
        hub.download(repo, token=stranger, cache_dir=tmp_path / "a")
    HfApi(token=TOKEN).update_repo_settings(repo, private=False)
    Publisher(repo, TOKEN).publish(staged, gated="manual")
    with pytest.raises(DownloadError, match="gated and this account has no access"):
        hub.download(repo, token=stranger, cache_dir=tmp_path / "b")
    with pytest.raises(DownloadError, match="no such branch, tag or commit"):
        hub.download(repo, revision="no-such", token=TOKEN, cache_dir=tmp_path / "c")
    with pytest.raises(DownloadError, match="was not found"):
        hub.download(repo + "-not", token=TOKEN, cache_dir=tmp_path / "d")
    with pytest.raises(PublishError, match="is not a repository name"):
        Publisher("not//a name", TOKEN).publish(staged)


def test_missing_file_is_a_clear_error_of_the_library(repo, runs, tmp_path):
    api = HfApi(token=TOKEN)
    Publisher(repo, TOKEN).publish(complete(runs["causal"], tmp_path / "staged", repo))
    api.delete_file("model.safetensors", repo)
    with pytest.raises(OSError, match=r"does not appear to have a file named .*model.safetensors"):
        HEADS["causal"][0].from_pretrained(repo, token=TOKEN, cache_dir=tmp_path / "cache")


def test_stale_parent_is_refused(repo, staged):
    publisher = Publisher(repo, TOKEN)
    old = publisher.publish(staged)["commit"]
    new = HfApi(token=TOKEN).upload_file(path_or_fileobj=b"x", path_in_repo="note.txt", repo_id=repo).oid
    (staged / "README.md").write_text((staged / "README.md").read_text() + "\nMine.\n")
    with pytest.raises(PublishError, match=f"stands at {new[:10]}, not at {old[:10]}"):
        publisher.publish(staged, parent_commit=old)
    # somebody commits between our look and our commit: the server itself refuses
    publisher._head = lambda revision: old
    with pytest.raises(PublishError, match=r"changed while publishing \(412\)"):
        publisher.publish(staged)
    assert HfApi(token=TOKEN).repo_info(repo).sha == new


def test_published_checkpoint_is_chatted_with_and_served(repo, runs, tmp_path):
    """From the Hub by name: a piped chat, then a server asked by the `openai` client."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    pytest.importorskip("uvicorn", reason="the serve extra is not installed")
    Publisher(repo, TOKEN).publish(complete(runs["causal"], tmp_path / "staged", repo))
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}

    def script(name: str, *arguments: str) -> list[str]:
        return [sys.executable, str(ROOT / "scripts" / name), "--model", repo, *arguments]

    chat = subprocess.run(
        script("chat.py", "--max-tokens", "5"),
        input="Hello\n",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert chat.stdout.endswith("\n") and "Traceback" not in chat.stderr
    server = subprocess.Popen(script("serve.py", "--port=0"), env=environment, stdout=subprocess.PIPE, text=True)
    try:
        address = server.stdout.readline().split()[-1]
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0)
        assert [model.id for model in client.models.list()] == [repo]
        answer = client.chat.completions.create(
            model=repo, messages=[{"role": "user", "content": "Hello"}], max_tokens=5, temperature=0
        )
        assert answer.choices[0].message.content.strip() == chat.stdout.strip()
    finally:
        server.terminate()
        assert server.wait(timeout=60) is not None
