"""Starting the server, and an engine of a tiny model."""

import os
import re
import subprocess
import sys
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


def make_engine(folder: Path) -> Engine:
    """An engine with small limits; the caller closes it."""
    limits = Limits(prompt_tokens=100, new_tokens=50, batch=4, waiting=6, seconds=60)
    return Engine(CheckpointArgs(str(folder), device="cpu"), limits=limits)
