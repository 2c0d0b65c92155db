"""What the benchmark scripts share: options, table, results file and growth curves."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..cli import finish, parse_args
from .benchmark import draw_growth, fit_growth, format_table
from .peers import installed
from .results import write_results
from .workloads import HEAD_SHAPE, SPEC

__all__ = ["BenchArgs", "run_bench", "write_bench"]


@dataclass
class BenchArgs:
    """Options of all benchmarks; each uses those that apply to it."""

    lengths: list[int] = field(default_factory=list, metadata={"help": "tokens; each benchmark's own if unset"})
    shape: list[int] = field(
        default_factory=list,
        metadata={"help": "width, layers, heads, vocabulary of the models, to look around; not for the record"},
    )
    peers: list[str] = field(
        default_factory=lambda: ["ctranslate2", "torchao", "bitsandbytes"],
        metadata={"help": "packages to race against, where installed"},
    )
    threads: int = field(default=2, metadata={"help": "threads of PyTorch"})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16, of bare attention"})
    device: str = field(default="cpu", metadata={"help": "cpu, or cuda where there is one"})
    repeats: int = field(default=5, metadata={"help": "rounds, of which the median counts"})
    seconds: float = field(default=30.0, metadata={"help": "no new round of a race begins after so long"})
    seed: int = field(default=0, metadata={"help": "of inputs and weights"})
    output: str = field(default="model_cards/results", metadata={"help": "directory of the results file"})

    @property
    def inputs(self) -> dict:
        """Keyword arguments of `workloads.attention_inputs`."""
        return {"seed": self.seed, "dtype": self.dtype, "device": self.device}

    @property
    def found(self) -> list[str]:
        """Those of `peers` that are installed."""
        return installed(self.peers)[0]


def write_bench(
    path: Path,
    name: str,
    args: Any,
    rows: list[dict],
    metrics: Mapping[str, float] | None = None,
    *,
    without: Sequence[str] = (),
    settings: Mapping | None = None,
    **fields,
) -> None:
    """Write the results file of a benchmark.

    Args:
        path (`Path`): the file.
        name (`str`): of the benchmark.
        args (dataclass): its options, with `seed`; they are recorded, except `output` and those of `without`.
        rows (`list[dict]`): the table.
        metrics (`Mapping[str, float]`, *optional*): name to number.
        without (sequence of `str`): options that do not apply.
        settings (`Mapping`, *optional*): further settings, such as fixed shapes.
        **fields: see [`write_results`].
    """
    config = {key: value for key, value in asdict(args).items() if key not in ("output", *without)}
    config |= settings or {}
    write_results(path, metrics or {}, task=f"bench {name}", config=config, seed=args.seed, rows=rows, **fields)


def run_bench(
    name: str, measure: Callable[[BenchArgs], list[dict]], *, grows: bool = False, against_packages: bool = False
) -> dict:
    """Run one benchmark as a program: parse, measure, print a table, write `bench-<name>.json`.

    Args:
        name (`str`): of the benchmark, in file names and in `task`.
        measure (`Callable`): returns the rows.
        grows (`bool`): also fit exponents of the costs over the sizes, and draw them.
        against_packages (`bool`): list the installed packages among the peers with their versions.

    Returns:
        `dict` with the path of the results file, which is also the last line of standard output.
    """
    (args,) = parse_args((BenchArgs,), description=sys.modules[measure.__module__].__doc__)
    torch.set_num_threads(args.threads)
    # until a large block is freed once, as in any program with a model, glibc returns freed memory after every call
    torch.empty(2**22)
    found, skipped = installed(args.peers)
    if against_packages and skipped:
        sys.stderr.write(f"Left out, not installed: {', '.join(skipped)}; pip install 'flashlite[bench]' adds them.\n")
    rows = measure(args)
    fields: dict = {}
    if against_packages:
        fields |= {"peers": {package: metadata.version(package) for package in found}, "skipped": skipped}
    if grows:
        fields["growth"] = fit_growth(rows)
    path = Path(args.output) / f"bench-{name}.json"
    write_bench(path, name, args, rows, settings={**HEAD_SHAPE, "axes": asdict(SPEC)}, **fields)
    if grows:
        draw_growth(rows, path.with_suffix(""))
        sys.stdout.write(f"\n{name}, growth\n{format_table(fields['growth'])}\n")
    sys.stdout.write(f"\n{name}\n{format_table(rows)}\n")
    return finish({"results": path.as_posix()})
