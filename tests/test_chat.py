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


def pipe(folder, text: str | bytes, monkeypatch, capsys, *arguments: str) -> tuple[int, str, str]:
    content = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
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
        ("/set top_p 2", "top_p is 2.0, but must be from 0 to 1"),
        ("/set temperature nan", "temperature is nan, but must be"),
        ("/set max_tokens 0", "ask for at least 1"),
        ("/set max_tokens many", "invalid literal"),
        ("/set max_tokens 5 now", "takes one of"),
        ("/set seed 99999999999999999999", "seed is 99999999999999999999, but must be"),
        ("/retry", "no answer to retry"),
    ],
)
def test_bad_command_is_one_sentence(chat, line, message):
    with pytest.raises(ValueError, match=message):
        chat.command(line)


@pytest.mark.parametrize("given", ["seed=99999999999999999999", "temperature=-1", "top_p=2", "max_tokens=-3"])
def test_flags_have_the_ranges_of_set(given, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        chat_script.main(["--model", str(folder), f"--{given}"])
    assert stop.value.code == 2 and f"{given.replace('=', ' is ')}" in capsys.readouterr().err


def test_a_template_that_refuses_leaves_the_conversation(chat, monkeypatch):
    refusing = "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}x"
    chat.answer("Who grants?")
    before = list(chat.messages)
    monkeypatch.setattr(chat.engine.tokenizer, "chat_template", refusing)
    with pytest.raises(ValueError, match="chat template refuses these messages: roles must alternate"):
        chat.answer("And who else?")
    chat.system = "Be brief."
    monkeypatch.setattr(chat.engine.tokenizer, "chat_template", refusing.replace("> 1", "> 0"))
    with pytest.raises(ValueError, match="roles must alternate"):
        chat.command("/retry")
    assert chat.messages == before


def test_retry_needs_a_question(chat):
    chat.messages = [{"role": "assistant", "content": "Hello."}]
    with pytest.raises(ValueError, match="no answer to retry"):
        chat.command("/retry")


def test_load_refuses_what_is_not_a_conversation(chat, tmp_path):
    (tmp_path / "bad.json").write_text('[{"role": "user"}]')
    with pytest.raises(ValueError, match="is not a conversation"):
        chat.command(f"/load {tmp_path / 'bad.json'}")
    (tmp_path / "half.json").write_text('[{"role": "user", "content": "\\ud800"}]')
    with pytest.raises(ValueError, match="surrogates not allowed"):
        chat.command(f"/load {tmp_path / 'half.json'}")


def test_pipe_prints_answers_only(folder, monkeypatch, capsys, chat):
    code, output, errors = pipe(folder, "Who grants?\n\n/quit\nnever read\n", monkeypatch, capsys)
    assert code == 0 and errors.count("chat:") == 0
    assert output.endswith("\n") and ">" not in output.splitlines()[0][:2]
    code, _, errors = pipe(folder, "/bogus\n", monkeypatch, capsys)
    assert code == 1 and errors.splitlines()[-1].startswith("chat: Unknown command")


def test_bytes_that_are_not_text_are_replaced(folder, monkeypatch, capsys):
    given = "--system", "Be br\udcffef."
    code, output, errors = pipe(folder, b"Who gr\xffnts?\n/history\n", monkeypatch, capsys, *given)
    assert code == 0 and "system: Be br\ufffdef.\nuser: Who gr\ufffdnts?" in output and "chat:" not in errors


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
