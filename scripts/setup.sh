#!/usr/bin/env bash
# Creates .venv and installs the pinned lock into it. A second run finds its stamp and returns at once.
#   PYTHON=python3.12 bash scripts/setup.sh
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/setup.sh   # Linux without a GPU: smaller torch
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "setup: $*" >&2
    exit 1
}

python="${PYTHON:-python3}"
command -v "$python" >/dev/null || fail "no $python on PATH; install Python 3.10 or newer, or name one with PYTHON=..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "$("$python" -V 2>&1) is too old; Flash-Lite needs Python 3.10 or newer, name one with PYTHON=..."
"$python" -c 'import venv, ensurepip' 2>/dev/null ||
    fail "$python cannot make virtual environments; install its venv package (Debian, Ubuntu: apt install python3-venv)"

stamp="$("$python" -c '
import hashlib, os, pathlib, sys
text = b"".join(pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "scripts/constraints.txt"))
print(hashlib.sha256(text + sys.version.encode() + os.getcwd().encode()).hexdigest())')"
if [ "$(cat .venv/setup.stamp 2>/dev/null)" = "$stamp" ] && .venv/bin/python -c '' 2>/dev/null; then
    exit 0
fi

echo "setup: installing the pinned packages into .venv; the first time takes a few minutes"
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv
# the newest transformers, and with it the lock, needs Python 3.11; on 3.10 pip resolves the ranges of pyproject.toml
lock=(--constraint scripts/constraints.txt)
.venv/bin/python -c 'import sys; sys.exit(sys.version_info >= (3, 11))' && lock=()
.venv/bin/python -m pip install -qq --disable-pip-version-check ${lock[@]+"${lock[@]}"} --editable '.[dev]'
echo "$stamp" >.venv/setup.stamp
echo "setup: ready after ${SECONDS} s"
