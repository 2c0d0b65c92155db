"""Chat with a checkpoint in the terminal; answers appear as they are generated.

    python scripts/chat.py --model you/flash-lite-x
    echo "I like cats." | python scripts/chat.py --model model_cards/flash-lite-en-de

Each line of a pipe is one turn, and only the answers are printed. Commands: see /help. Ctrl-C stops an answer.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import modeling_flashlite  # noqa: F401  (registers the architecture)
from modeling_flashlite.publish.hub import DownloadError, download
from modeling_flashlite.serve.engine import Engine, Limits, Settings

HELP = """\
/help              this list
/reset             forget the conversation
/retry             answer the last turn again
/history           print the conversation
/system TEXT       set the system message and forget the conversation
/set NAME VALUE    change temperature, top_p, max_tokens or seed; without arguments print them
/save FILE         write the conversation as JSON
/load FILE         read it back
/quit              leave (also Ctrl-D)"""


class Chat:
    """A conversation with one model.

    Args:
        engine (`Engine`): the model.
        settings (`Settings`): of every answer.
        system (`str`, *optional*): first message.
    """

    def __init__(self, engine: Engine, settings: Settings, system: str | None = None):
        self.engine, self.settings, self.system = engine, settings, system
        self.messages: list[dict[str, str]] = []
        self.reset()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> None:
        """Print the answer as it comes; an answer that fails leaves the conversation as it was."""
        turn = {"role": "user", "content": text}
        job = self.engine.submit(self.engine.encode_chat([*self.messages, turn]), self.settings)
        pieces = []
        try:
            for piece in job:
                pieces.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            job.cancelled = True
        print(flush=True)
        if job.error:
            raise ValueError(f"The answer failed: {job.error}.")
        self.messages += [turn, {"role": "assistant", "content": "".join(pieces)}]

    def command(self, line: str) -> bool:
        """Run a `/command`; return whether the chat goes on."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/quit":
            return False
        if name == "/help":
            print(HELP)
        elif name == "/reset":
            self.reset()
        elif name == "/history":
            print("\n".join(f"{message['role']}: {message['content']}" for message in self.messages))
        elif name == "/system":
            self.system = rest or None
            self.reset()
        elif name == "/set":
            self.set(*rest.split())
        elif name == "/retry":
            if not self.messages or self.messages[-1]["role"] != "assistant":
                raise ValueError("There is no answer to retry yet.")
            self.messages, turn = self.messages[:-2], self.messages[-2]
            self.answer(turn["content"])
        elif name == "/save" and rest:
            Path(rest).write_text(json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        elif name == "/load" and rest:
            self.load(Path(rest))
        else:
            raise ValueError(f"Unknown command or missing argument: {line}; /help lists them.")
        return True

    def load(self, path: Path) -> None:
        messages = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(messages, list) or not all(
            isinstance(m, dict) and set(m) == {"role", "content"} and all(isinstance(v, str) for v in m.values())
            for m in messages
        ):
            raise ValueError(f"{path} is not a conversation; it must be a list of role and content, as /save writes.")
        self.messages = messages

    def set(self, name: str | None = None, value: str | None = None) -> None:
        kinds = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}
        if name is None:
            print(" ".join(f"{known}={getattr(self.settings, known)}" for known in kinds))
            return
        if name not in kinds or value is None:
            raise ValueError(f"/set takes one of {', '.join(kinds)} and a value.")
        number = kinds[name](value)
        if name != "seed" and not 0 <= number <= {"temperature": 2.0, "top_p": 1.0}.get(name, float("inf")):
            raise ValueError(f"{name} = {value} is out of range.")
        setattr(self.settings, name, number)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="Hub id or folder")
    add("--revision", help="branch, tag or commit")
    add("--trust-remote-code", action="store_true", help="run code of the repository (not needed for Flash-Lite)")
    add("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    add("--system", help="system message")
    add("--max-tokens", type=int, default=256, help="most tokens of one answer")
    add("--temperature", type=float, default=0.0, help="0 is greedy")
    add("--top-p", type=float, default=1.0, help="nucleus sampling")
    add("--seed", type=int, help="makes sampling repeatable")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Chat until the input ends; 2 when the model cannot be had."""
    args = make_parser().parse_args(argv)
    try:
        folder = download(args.model, args.revision)
    except DownloadError as error:
        print(f"chat: {error}", file=sys.stderr)
        return 2
    limits = Limits(new_tokens=args.max_tokens, batch=1, seconds=3600.0)
    engine = Engine(folder, None, args.trust_remote_code, limits, args.device)
    settings = Settings(args.max_tokens, args.temperature, args.top_p, seed=args.seed)
    chat = Chat(engine, settings, args.system)
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (editing and history of the line)
        print(f"{args.model}: {engine.model.num_parameters() / 1e6:.1f}M parameters. /help lists the commands.")
    failed = False
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            break
        try:
            if line.startswith("/"):
                if not chat.command(line):
                    break
            elif line:
                chat.answer(line)
        except (ValueError, OSError) as error:
            failed = True
            print(f"chat: {error}", file=sys.stderr)
    engine.close(timeout=5.0)
    return int(failed and not interactive)


if __name__ == "__main__":
    sys.exit(main())
