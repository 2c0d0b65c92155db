"""A conversation in the terminal: turns, commands, and answers that appear as they are generated."""

import json
import sys
from pathlib import Path

from .engine import Engine
from .jobs import Settings

__all__ = ["HELP", "Chat"]

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

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str) -> None:
        """Print the answer while it is generated; after an error the conversation is unchanged."""
        turn = {"role": "user", "content": text}
        job = self.engine.submit(self.engine.encode_chat([*self.messages, turn]), self.settings)
        pieces = []
        try:
            for piece in job:
                pieces.append(piece)
                self._write(piece)
        except KeyboardInterrupt:
            job.cancelled = True
        self._write("\n")
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
            self._write(HELP + "\n")
        elif name == "/reset":
            self.reset()
        elif name == "/history":
            self._write("".join(f"{message['role']}: {message['content']}\n" for message in self.messages))
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
            self._write(" ".join(f"{known}={getattr(self.settings, known)}" for known in kinds) + "\n")
            return
        if name not in kinds or value is None:
            raise ValueError(f"/set takes one of {', '.join(kinds)} and a value.")
        number = kinds[name](value)
        if name != "seed" and not 0 <= number <= {"temperature": 2.0, "top_p": 1.0}.get(name, float("inf")):
            raise ValueError(f"{name} = {value} is out of range.")
        setattr(self.settings, name, number)
