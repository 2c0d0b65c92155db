"""Serve a checkpoint over OpenAI's HTTP API, on this machine only unless told otherwise.

    python scripts/serve.py --model you/flash-lite-x --port 8000
    FLASHLITE_API_KEY=secret python scripts/serve.py --model runs/x --host 0.0.0.0 --web

    from openai import OpenAI
    OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none").completions.create(model="x", prompt="Once")

/health and /metrics tell how it is doing; --web adds a page to try the model at /. Ctrl-C or SIGTERM lets running
answers end first. Needs the `serve` extra, and `web` for the page.
"""

import argparse
import ipaddress
import os
import socket
import sys

import uvicorn

import modeling_flashlite  # noqa: F401  (registers the architecture)
from modeling_flashlite.publish.hub import DownloadError, download
from modeling_flashlite.serve.engine import Engine, Limits
from modeling_flashlite.serve.server import create_app


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="Hub id or folder")
    add("--revision", help="branch, tag or commit")
    add("--trust-remote-code", action="store_true", help="run code of the repository (not needed for Flash-Lite)")
    add("--device", help="cpu, cuda, ... (default: an accelerator if there is one)")
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8000, help="port; 0 takes a free one")
    add("--web", action="store_true", help="add a page to try the model")
    add("--max-prompt-tokens", type=int, default=Limits.prompt_tokens, help="longest prompt")
    add("--max-new-tokens", type=int, default=Limits.new_tokens, help="most tokens of one answer")
    add("--max-batch", type=int, default=Limits.batch, help="most answers generated at once")
    add("--max-waiting", type=int, default=Limits.waiting, help="most answers waiting")
    add("--max-body", type=int, default=1 << 20, help="largest request, in bytes")
    add("--timeout", type=float, default=Limits.seconds, help="seconds one request may take")
    return parser


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def main(argv: list[str] | None = None) -> int:
    """Serve until stopped; 2 when it cannot start."""
    args = make_parser().parse_args(argv)
    key = os.environ.get("FLASHLITE_API_KEY") or None
    if key is None and not is_loopback(args.host):
        print(f"serve: {args.host} is open to others; set FLASHLITE_API_KEY, or use 127.0.0.1.", file=sys.stderr)
        return 2
    limits = Limits(
        prompt_tokens=args.max_prompt_tokens,
        new_tokens=args.max_new_tokens,
        batch=args.max_batch,
        waiting=args.max_waiting,
        seconds=args.timeout,
    )
    try:
        listener = socket.create_server(
            (args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET
        )
        folder = download(args.model, args.revision)
    except (OSError, DownloadError) as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    name = None if os.path.isdir(args.model) else args.model
    engine = Engine(folder, name, args.trust_remote_code, limits, args.device)
    app = create_app(engine, key, args.max_body)
    if args.web:
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
    sys.exit(main())
