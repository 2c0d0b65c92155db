"""Chat with a checkpoint in the terminal; answers appear as they are generated.

    python scripts/chat.py --model you/flash-lite-x
    echo "I like cats." | python scripts/chat.py --model model_cards/flash-lite-en-de

Each line of a pipe is one turn, and only the answers are printed. Commands: see /help. Ctrl-C stops an answer.
"""

import contextlib
import os
import sys
from dataclasses import dataclass, field

import modeling_flashlite  # registers the architecture
from modeling_flashlite.checkpoint import CheckpointArgs
from modeling_flashlite.cli import parse_args, start
from modeling_flashlite.measure.cost import count_parameters
from modeling_flashlite.publish.hub import download
from modeling_flashlite.serve.engine import Engine
from modeling_flashlite.serve.jobs import Limits, Settings
from modeling_flashlite.serve.terminal import Chat


@dataclass
class ChatArgs:
    system: str | None = field(default=None, metadata={"help": "system message"})
    max_tokens: int = field(default=256, metadata={"help": "most tokens of one answer"})
    temperature: float = field(default=0.0, metadata={"help": "0 is greedy"})
    top_p: float = field(default=1.0, metadata={"help": "nucleus sampling"})
    seed: int | None = field(default=None, metadata={"help": "makes sampling repeatable"})
    native: bool = field(default=False, metadata={"help": "decode coded models by code compiled on this machine"})

    def __post_init__(self):
        if self.system is not None:  # bytes that are not UTF-8 arrive as halves of characters
            self.system = os.fsencode(self.system).decode(errors="replace")
        self.settings = Settings(self.max_tokens, self.temperature, self.top_p, seed=self.seed)


def converse(chat: Chat, interactive: bool) -> bool:
    """Read turns and commands until the input ends; return whether all of them succeeded."""
    succeeded = True
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return succeeded
        except KeyboardInterrupt:
            print()
            return succeeded
        try:
            if line.startswith("/"):
                if not chat.command(line):
                    return succeeded
            elif line:
                chat.answer(line)
        except (ValueError, OSError) as error:
            succeeded = False
            print(f"chat: {error}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Chat until the input ends; 2 when the model cannot be loaded, 1 when a turn of a pipe failed."""
    checkpoint, args = parse_args((CheckpointArgs, ChatArgs), argv, description=__doc__)
    try:
        if args.native:
            modeling_flashlite.enable_native()
        checkpoint.model = str(download(checkpoint.model, checkpoint.revision))
    except RuntimeError as error:  # of the download, or of the compiler
        print(f"chat: {error}", file=sys.stderr)
        return 2
    engine = Engine(checkpoint, limits=Limits(new_tokens=args.max_tokens, batch=1, seconds=3600.0))
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (editing and history of the line)
        print(f"{engine.name}: {count_parameters(engine.model) / 1e6:.1f}M parameters. /help lists the commands.")
    succeeded = converse(Chat(engine, args.settings, args.system), interactive)
    engine.close(timeout=5.0)
    return int(not succeeded and not interactive)


if __name__ == "__main__":
    start(main)
