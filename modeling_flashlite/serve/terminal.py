"""A conversation in the terminal: turns, commands, and answers that appear as they are generated."""

import json
import sys
from dataclasses import replace
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

    def answer(self, text: str, again: bool = False) -> None:
        """Print the answer while it is generated, in place of the last one with `again`.

        After an error the conversation is unchanged.
        """
        asked = [*(self.messages[:-2] if again else self.messages), {"role": "user", "content": text}]
        job = self.engine.submit(self.engine.encode_chat(asked), self.settings)
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
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

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
            self.set(rest)
        elif name == "/retry":
            if [message["role"] for message in self.messages[-2:]] != ["user", "assistant"]:
                raise ValueError("There is no answer to retry yet.")
            self.answer(self.messages[-2]["content"], again=True)
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
        json.dumps(messages, ensure_ascii=False).encode()  # halves of characters would fail later, in the tokenizer
        self.messages = messages

    def set(self, given: str) -> None:
        """Change a setting by its name and value, or print all if none is given."""
        kinds = {"temperature": float, "top_p": float, "max_tokens": int, "seed": int}
        if not given:
            self._write(" ".join(f"{known}={getattr(self.settings, known)}" for known in kinds) + "\n")
            return
        name, *values = given.split()
        if name not in kinds or len(values) != 1:
            raise ValueError(f"/set takes one of {', '.join(kinds)} and a value.")
        self.settings = replace(self.settings, **{name: kinds[name](values[0])})
