"""Results files, one per run: numbers with hardware, versions, command and commit; the source of all tables."""

import datetime
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path

import torch

# an absolute path at the start of a text or after a space, quote, equals sign or comma
_ABSOLUTE = re.compile(r"(^|[\s=,'\"])(/[\w.~-]+(?:/[\w.*~-]+)+)")
_PACKAGES = ("torch", "transformers", "datasets", "tokenizers", "peft", "sacrebleu", "rouge_score", "numpy")


def write_results(
    path: str | Path,
    metrics: Mapping[str, float],
    *,
    task: str | None = None,
    dataset: str | None = None,
    split: str | None = None,
    model: str | None = None,
    config: Mapping | None = None,
    seed: int | None = None,
    **fields,
) -> dict:
    """Write a results file atomically and return its content.

    Args:
        path (`str` or `Path`): a `.json` file; its directory is made.
        metrics (`Mapping[str, float]`): name to number.
        task, dataset, split, model (`str`, *optional*): what was measured on what.
        config (`Mapping`, *optional*): settings needed to repeat the run.
        seed (`int`, *optional*): of the run; also listed as `seeds`.
        **fields: further JSON fields: `intervals`, `protocol`, `speed` (rows of `name`, `value`, `unit`), `size`,
            `teacher`, `std`, `recipe`, ...; they override the collected ones.

    Returns:
        `dict`: the content of the file, with `hardware`, `versions`, `commit` (`None` outside a git checkout, `-dirty`
        behind it if files are changed), `command` and `date` gathered here.
    """
    content = {
        "task": task,
        "dataset": relative_paths(dataset),
        "split": split,
        "model": relative_paths(model),
        "metrics": dict(metrics),
        "config": {name: relative_paths(value) for name, value in (config or {}).items()},
        "seed": seed,
        "seeds": [] if seed is None else [seed],
        "hardware": describe_hardware(),
        "versions": package_versions(),
        "commit": git_commit(),
        "command": command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **fields,
    }
    write_json(path, content)
    return content


def read_results(paths: list[Path]) -> list[dict]:
    """Read results files; refuse what is not a JSON object."""
    results = []
    for path in paths:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON ({error}); write it again with scripts/evaluate.py.") from None
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, but a results file is one JSON object.")
        results.append(content)
    return results


def write_json(path: str | Path, content: object) -> None:
    """Write JSON atomically.

    Raises:
        ValueError: a number is NaN or infinite, which JSON cannot hold.
    """
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, default=_plain, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path} would hold a number that is not finite ({error}); check the run's losses.") from None
    _replace(Path(path), text + "\n")


def write_json_lines(path: str | Path, rows: Iterable[object]) -> None:
    """Write one JSON value per line, atomically."""
    _replace(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _replace(path: Path, text: str) -> None:
    """Write to a temporary file beside `path`, which then replaces it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def describe_hardware() -> str:
    """Device, count or threads, and memory in one line, e.g. `AMD EPYC 9354, 2 threads, 8 GiB`."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{torch.cuda.device_count()} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    # idle threads that spin avoid a wake-up per operation
    waiting = os.environ.get("OMP_WAIT_POLICY", "").lower()
    parts = [_processor_name(), f"{torch.get_num_threads()} threads{f' waiting {waiting}ly' if waiting else ''}"]
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        parts.append(f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB")
    return ", ".join(parts)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that results depend on."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Short commit hash of the checkout that this package runs from, or `None`; scripts are part of its code."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", "--", "__init__.py"):
            return None  # installed in a folder of another project
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":(top)scripts")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> str:
    """The command of this process, its paths relative to the working directory."""
    script = sys.argv[0] if sys.argv[0].endswith(".py") else Path(sys.argv[0]).name
    return str(relative_paths(shlex.join(["python", script, *sys.argv[1:]])))


def relative_paths(value: object) -> object:
    """Make absolute paths in a text relative to the working directory, so that results files reveal no machine."""
    if not isinstance(value, str):
        return value
    return _ABSOLUTE.sub(lambda match: match[1] + os.path.relpath(match[2]), value)


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _plain(value: object) -> object:
    """Convert NumPy and PyTorch scalars to Python numbers and everything else to text."""
    return value.item() if hasattr(value, "item") else str(value)
