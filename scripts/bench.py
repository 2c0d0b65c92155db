"""Run benchmarks one after another, each in its own process, and list their results files.

    python scripts/bench.py attention decode train generate
    python scripts/bench.py prefill --lengths 1024 4096 --threads 1 --repeats 9
    python scripts/bench.py decode --help

Each name stands for `scripts/studies/bench_<name>.py`; options after the names are passed to all of them.
"""

import json
import subprocess
import sys
from pathlib import Path

STUDIES = Path(__file__).parent / "studies"
NAMES = sorted(path.stem.removeprefix("bench_") for path in STUDIES.glob("bench_*.py"))


def main(words: list[str]) -> int:
    """Return the code of the first benchmark that fails, 2 when none is named."""
    count = next((index for index, word in enumerate(words) if word.startswith("-")), len(words))
    names, options = words[:count], words[count:]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        print(__doc__)
        reason = f"{unknown[0]!r} is unknown" if unknown else "no name is given"
        print(f"bench.py: {reason}; the names are {', '.join(NAMES)}.", file=sys.stderr)
        return 2
    files = {}
    for name in names:
        command = [sys.executable, str(STUDIES / f"bench_{name}.py"), *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            line = ""
            for line in process.stdout:
                print(line, end="", flush=True)
        if process.returncode or {"-h", "--help"} & set(options):
            return process.returncode
        files[name] = json.loads(line)["results"]
    print(json.dumps({"results": files}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
