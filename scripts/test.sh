#!/usr/bin/env bash
# Sets up .venv, then runs every test; arguments go to pytest: bash scripts/test.sh tests/test_house.py -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python -m pytest "$@"
