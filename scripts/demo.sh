#!/usr/bin/env bash
# Sets up .venv, then runs the main job; arguments go to scripts/demo.py: bash scripts/demo.sh --size smallest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python scripts/demo.py "$@"
