#!/usr/bin/env bash
# Sets up .venv, then runs every test, a file on each core at a time; arguments go to pytest, of which -n0 means one process:
#   bash scripts/test.sh tests/test_house.py -x -n0
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m pytest -n auto --maxprocesses 4 --dist loadfile "$@"
