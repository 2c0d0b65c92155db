"""Serve a checkpoint over OpenAI's HTTP API, on this machine only unless told otherwise.

    python scripts/serve.py --model you/flash-lite-x --port 8000
    FLASHLITE_API_KEY=secret python scripts/serve.py --model runs/x --host 0.0.0.0 --web
    python scripts/serve.py --model runs/smol --adapters sums=runs/dialogsum_smol,chat=runs/sgd_smol

    from openai import OpenAI
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").completions.create(model="x", prompt="Once")

/health and /metrics report its state; --web adds a page to try the model at /. On Ctrl-C or SIGTERM it finishes
running answers, then stops. Needs the `serve` extra, and `web` for the page.
"""

import ipaddress
import os
import socket
import sys
from dataclasses import dataclass, field, replace

import modeling_flashlite  # registers the architecture
from modeling_flashlite.checkpoint import CheckpointArgs
from modeling_flashlite.cli import needs, parse_args, start
from modeling_flashlite.publish.hub import download
from modeling_flashlite.serve.engine import Engine
from modeling_flashlite.serve.jobs import Limits

with needs("serve"):
    import uvicorn

    from modeling_flashlite.serve.endpoints import create_app


@dataclass
class ServeArgs:
    adapters: str | None = field(
        default=None, metadata={"help": "name=folder,name=folder: LoRA adapters of the model, chosen by `model`"}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "port; 0 takes a free one"})
    native: bool = field(default=False, metadata={"help": "decode coded models by code compiled on this machine"})
    web: bool = field(default=False, metadata={"help": "add a page to try the model"})
    max_prompt_tokens: int = field(default=Limits.prompt_tokens, metadata={"help": "longest prompt"})
    max_new_tokens: int = field(default=Limits.new_tokens, metadata={"help": "most tokens of one answer"})
    max_batch: int = field(default=Limits.batch, metadata={"help": "most answers generated at once"})
    max_waiting: int = field(default=Limits.waiting, metadata={"help": "most answers waiting"})
    cache_bytes: int = field(default=Limits.cache_bytes, metadata={"help": "memory for keys and values"})
    max_body: int = field(default=1 << 20, metadata={"help": "largest request, in bytes"})
    timeout: float = field(default=Limits.seconds, metadata={"help": "seconds one request may take"})

    def __post_init__(self):
        # of one engine; the memory for keys and values is shared by the model and its adapters
        self.limits = Limits(
            prompt_tokens=self.max_prompt_tokens,
            new_tokens=self.max_new_tokens,
            batch=self.max_batch,
            waiting=self.max_waiting,
            seconds=self.timeout,
            cache_bytes=self.cache_bytes // (1 + len(self.named_adapters())),
        )

    def named_adapters(self) -> dict[str, str]:
        """Folder or Hub id of each adapter by its name."""
        pairs = [pair.partition("=") for pair in (self.adapters or "").split(",") if pair]
        if any(not (name and folder) for name, _, folder in pairs) or len({name for name, *_ in pairs}) < len(pairs):
            raise ValueError(f"adapters is {self.adapters!r}, but must read name=folder,name=folder, no name twice.")
        return {name: folder for name, _, folder in pairs}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: list[str] | None = None) -> int:
    """Serve until stopped; 2 when it cannot start."""
    checkpoint, args = parse_args((CheckpointArgs, ServeArgs), argv, description=__doc__)
    key = os.environ.get("FLASHLITE_API_KEY") or None
    if key is None and not is_loopback(args.host):
        print(f"serve: {args.host} is open to others; set FLASHLITE_API_KEY, or use 127.0.0.1.", file=sys.stderr)
        return 2
    try:
        if args.native:
            modeling_flashlite.enable_native()
        listener = socket.create_server(
            (args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET
        )
        folder = download(checkpoint.model, checkpoint.revision)
        adapters = {called: str(download(place)) for called, place in args.named_adapters().items()}
    except (OSError, RuntimeError) as error:  # of the download, or of the compiler
        print(f"serve: {error}", file=sys.stderr)
        return 2
    name = None if os.path.isdir(checkpoint.model) else checkpoint.model
    checkpoint.model = str(folder)
    engine = Engine(checkpoint, name, args.limits)
    others = [Engine(replace(checkpoint, model=at), called, args.limits, engine) for called, at in adapters.items()]
    app = create_app(engine, key, args.max_body, others)
    if args.web:
        with needs("web"):
            from modeling_flashlite.serve.page import mount_page

        app = mount_page(app, engine, key)
    host, port = listener.getsockname()[:2]
    print(f"{engine.name} on http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=int(args.timeout) + 1,
        h11_max_incomplete_event_size=16384,
    )
    uvicorn.Server(config).run(sockets=[listener])
    return 0


if __name__ == "__main__":
    start(main)
