"""Starting the server, and an engine of a tiny model."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from modeling_flashlite.checkpoint import CheckpointArgs
from modeling_flashlite.serve.engine import Engine
from modeling_flashlite.serve.jobs import Limits

ROOT = Path(__file__).parents[1]


def start(folder: Path, *arguments: str, **environment: str) -> tuple[subprocess.Popen, str]:
    """Start the script on a free port; return the process and the address."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "serve.py"), "--model", str(folder), "--port=0", *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = process.stdout.readline()
    if not line:
        raise AssertionError(process.communicate()[1])
    return process, re.search(r"http://\S+?(?=/v1)", line)[0]


def make_engine(folder: Path, **limits) -> Engine:
    """An engine with small limits; the caller closes it."""
    limits = {"prompt_tokens": 100, "new_tokens": 50, "batch": 4, "waiting": 6, "seconds": 60, **limits}
    return Engine(CheckpointArgs(str(folder), device="cpu"), limits=Limits(**limits))


@contextlib.contextmanager
def served(engine: Engine):
    """The address of a server in this process; the engine is closed at the end."""
    import uvicorn

    from modeling_flashlite.serve.endpoints import create_app

    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(engine), log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)
