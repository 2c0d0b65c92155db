#!/usr/bin/env bash
# Runs the contract of the library on every transformers that pyproject.toml allows: the oldest, the last one with the
# old name of the cache, the locked one and the newest of the package index.
#   bash scripts/versions.sh                # a small set on each of them
#   bash scripts/versions.sh --others       # the same without the locked one, which the whole suite covers (.ci/run)
#   bash scripts/versions.sh --whole        # every test on each of them
#   bash scripts/versions.sh -k generation  # other arguments go to pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh

whole="" others=""
while [ $# -gt 0 ]; do
    case "$1" in
        --whole) whole=yes; shift ;;
        --others) others=yes; shift ;;
        *) break ;;
    esac
done

lock() { sed -n "s/^$1==//p" scripts/constraints.txt; }
oldest="$(sed -n 's/^OLDEST, NEWEST = "\([0-9.]*\)".*/\1/p' modeling_flashlite/compat_flashlite.py)"
newest="$(.venv/bin/python -m pip index versions transformers --disable-pip-version-check 2>/dev/null |
    sed -n '1s/.*(\(.*\))/\1/p')"
if [ -z "$newest" ]; then
    newest="$(sed -n 's/^OLDEST, NEWEST = .*"\([0-9.]*\)"$/\1/p' modeling_flashlite/compat_flashlite.py)"
    echo "versions: no package index answers; $newest, the newest known, stands for the newest" >&2
fi
versions="$(printf '%s\n' "$oldest" 5.23.0 "$(lock transformers)" "$newest" | sort --version-sort --unique)"

# An environment holds transformers and what it wants otherwise than the lock; it borrows the rest from .venv, PyTorch
# first of all: seconds instead of gigabytes.
environment() {
    local folder=".venv-transformers-$1"
    if [ "$("$folder/bin/python" -c 'import transformers; print(transformers.__version__)' 2>/dev/null)" != "$1" ]; then
        .venv/bin/python -m venv --clear "$folder"
        # the second line stands for the editable install, whose own .pth file a borrowed folder does not run
        { .venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' && pwd; } \
            >"$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
        "$folder/bin/python" -m pip install -qq --disable-pip-version-check "transformers==$1" >&2
    fi
    echo "$folder"
}

small=(
    tests/test_arguments.py tests/test_contract.py tests/test_generation.py tests/test_modeling.py
    tests/test_cache.py tests/test_inference_mode.py tests/test_mixins.py
    "tests/test_lora.py::test_trained_tables_survive_merging_and_saving"
    "tests/test_quantization.py::test_saved_model_is_the_quantized_model"
    "tests/test_quantization.py::test_quantizes_while_loading"
    "tests/test_quantization.py::test_loads_into_other_heads_and_dtypes"
    "tests/test_readme.py::test_first_python_block_runs"
)
[ -z "$whole" ] || small=(tests)

failed=()
for version in $versions; do
    if [ "$version" = "$(lock transformers)" ]; then
        [ -z "$others" ] || continue
        folder=.venv
    else
        folder="$(environment "$version")" || { failed+=("$version (no environment)"); continue; }
    fi
    echo "versions: transformers $version"
    "$folder/bin/python" -m pytest -q -p no:cacheprovider -n auto --maxprocesses 4 --dist loadfile "${small[@]}" "$@" || failed+=("$version")
done
if [ "${#failed[@]}" -gt 0 ]; then
    printf 'versions: failed on transformers %s\n' "${failed[@]}" >&2
    exit 1
fi
echo "versions: green on transformers" $versions "after ${SECONDS} s"
