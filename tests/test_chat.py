"""The terminal chat: piped turns, commands, history that reaches the model, errors, and a real terminal."""

import io
import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from verbs import load_script

from modeling_flashlite import add_lora
from modeling_flashlite.checkpoint import CheckpointArgs, load_language_model, read_tokenizer
from modeling_flashlite.serve.engine import Engine
from modeling_flashlite.serve.jobs import Limits, Settings
from modeling_flashlite.serve.terminal import HELP, Chat

ROOT = Path(__file__).parents[1]
chat_script = load_script("chat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("causal", tmp_path_factory.mktemp("chat") / "tiny-lm")


@pytest.fixture(scope="module")
def engine(folder):
    engine = Engine(CheckpointArgs(str(folder), device="cpu"), limits=Limits(new_tokens=12, prompt_tokens=300))
    yield engine
    engine.close()


@pytest.fixture
def chat(engine):
    return Chat(engine, Settings(12, 1.0, seed=0))


def pipe(folder, text: str, monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    code = chat_script.main(["--model", str(folder), "--device", "cpu", "--max-tokens", "8", *arguments])
    return code, *capsys.readouterr()


def test_history_reaches_the_model(chat, engine, capsys):
    chat.answer("Who grants?")
    first = capsys.readouterr().out[:-1]
    chat.answer("And who else?")
    second = capsys.readouterr().out[:-1]
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    assert [chat.messages[1]["content"], chat.messages[3]["content"]] == [first, second]
    expected = engine.submit(engine.encode_chat(chat.messages[:3]), Settings(12, 1.0, seed=0))
    assert "".join(expected) == second


def test_commands(chat, capsys, tmp_path):
    chat.answer("Who grants?")
    before = list(chat.messages)
    assert chat.command("/retry") and chat.messages == before
    assert chat.command(f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk.json").read_text()) == before
    assert chat.command("/reset") and chat.messages == []
    assert chat.command(f"/load {tmp_path / 'talk.json'}") and chat.messages == before
    assert chat.command("/system Be brief.")
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
    assert chat.command("/set temperature 0.5") and chat.settings.temperature == 0.5
    capsys.readouterr()
    assert chat.command("/history") and capsys.readouterr().out == "system: Be brief.\n"
    assert chat.command("/help")
    assert capsys.readouterr().out == HELP + "\n"
    assert chat.command("/quit") is False


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/bogus", "Unknown command"),
        ("/save", "missing argument"),
        ("/set colour red", "takes one of"),
        ("/set top_p 2", "out of range"),
        ("/set max_tokens many", "invalid literal"),
        ("/retry", "no answer to retry"),
    ],
)
def test_bad_command_is_one_sentence(chat, line, message):
    with pytest.raises(ValueError, match=message):
        chat.command(line)


def test_load_refuses_what_is_not_a_conversation(chat, tmp_path):
    (tmp_path / "bad.json").write_text('[{"role": "user"}]')
    with pytest.raises(ValueError, match="is not a conversation"):
        chat.command(f"/load {tmp_path / 'bad.json'}")


def test_pipe_prints_answers_only(folder, monkeypatch, capsys, chat):
    code, output, errors = pipe(folder, "Who grants?\n\n/quit\nnever read\n", monkeypatch, capsys)
    assert code == 0 and errors.count("chat:") == 0
    assert output.endswith("\n") and ">" not in output.splitlines()[0][:2]
    code, _, errors = pipe(folder, "/bogus\n", monkeypatch, capsys)
    assert code == 1 and errors.splitlines()[-1].startswith("chat: Unknown command")


def test_too_long_a_turn_leaves_the_conversation(folder, monkeypatch, capsys):
    code, output, errors = pipe(folder, "word " * 9000 + "\n/history\n", monkeypatch, capsys)
    assert code == 1 and "the limit is" in errors and output.strip() == ""


def test_encoder_decoder_answers_the_last_turn(tmp_path, monkeypatch, capsys):
    folder = save_checkpoint("seq2seq", tmp_path / "tiny-s2s")
    code, output, _ = pipe(folder, "You may\nYou may\n", monkeypatch, capsys)
    lines = output.split("\n")
    assert code == 0 and lines[0] == lines[len(lines) // 2]


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("kind", ["causal", "quantized", "seq2seq"])
def test_adapter_folder_answers_with_its_base(kind, tmp_path, monkeypatch, capsys):
    base = save_checkpoint(kind, tmp_path / "base")
    model = add_lora(load_language_model(str(base), device="cpu"), r=4)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    adapted = load_language_model(str(tmp_path / "adapter"), device="cpu")
    ids = {"input_ids": torch.arange(4, 20)[None]}
    if kind != "causal":
        ids["decoder_input_ids"] = ids["input_ids"]
    with torch.no_grad():
        expected = model.eval()(**ids).logits
        torch.testing.assert_close(adapted(**ids).logits, expected)
        with model.disable_adapter():
            assert not torch.allclose(model(**ids).logits, expected, atol=1e-3)
    # the adapter has no tokenizer of its own, so the base's is used
    assert read_tokenizer(str(tmp_path / "adapter")).get_vocab() == read_tokenizer(str(base)).get_vocab()
    code, output, _ = pipe(tmp_path / "adapter", "You may\n", monkeypatch, capsys)
    assert code == 0 and output.endswith("\n")


def test_missing_model_is_one_sentence(monkeypatch, capsys):
    assert chat_script.main(["--model", "nobody/no//thing"]) == 2
    assert capsys.readouterr().err.startswith("chat: 'nobody/no//thing' is not a repository name")


def test_terminal_shows_a_prompt_and_streams(folder):
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "chat.py"), "--model", str(folder), "--max-tokens", "5"],
        stdin=child,
        stdout=child,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
    )
    os.close(child)

    def read_until(text: str) -> str:
        seen, end = "", time.monotonic() + 120
        while text not in seen and time.monotonic() < end:
            if select.select([parent], [], [], 1)[0]:
                seen += os.read(parent, 4096).decode(errors="replace")
        return seen

    assert "M parameters. /help lists the commands." in read_until("> ")
    os.write(parent, b"Who grants?\n")
    read_until("\n> ")
    os.write(parent, b"/history\n")
    assert "user: Who grants?" in read_until("assistant:")
    os.write(parent, b"/quit\n")
    assert process.wait(timeout=60) == 0
    os.close(parent)
