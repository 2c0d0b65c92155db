"""Interleaved timing of alternative implementations in one run, and tables and plots of the results."""

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm.auto import tqdm

from .cost import peak_memory_bytes
from .plots import COLOURS, can_draw, new_axes, save_axes

__all__ = [
    "copy_bandwidth",
    "cpu_features",
    "draw_growth",
    "faster_than",
    "fit_growth",
    "format_table",
    "fresh_cost",
    "growth_exponent",
    "kernel_seconds",
    "peak_growth",
    "race",
    "summarize_race",
]

# varied sizes and measured costs
SIZES, COSTS = ("length", "width", "batch", "vocabulary"), ("ms", "MiB")
# below this length the attention is partly dense and grows differently
SPARSE_LENGTH = 4096
# substrings of operator names that count as kernels: matrix products, attention, gathers
_KERNELS = ("mm", "linear", "attention", "softmax", "index_select", "int4", "int8", "mkldnn")


def race(
    contenders: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 5,
    seconds: float = 10.0,
    shortest: float = 0.02,
    name: str = "",
) -> dict[str, list[float]]:
    """Time functions in turn, round after round, so that noise of the machine affects all of them alike.

    Args:
        contenders: name to function.
        repeats: rounds after the warm-up round; at least one.
        seconds: no new round starts after this time. If the warm-up round takes longer, it is the result.
        shortest: minimum seconds of a sample; shorter calls are repeated within it.
        name: shown by the progress bar.

    Returns:
        Name to seconds per call, one entry per round.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    begin, calls = time.perf_counter(), {}
    for contender, function in contenders.items():
        first = _timed(function, 1, device)
        if first < shortest:  # again, without one-time initialisation
            first = _timed(function, 1, device)
        calls[contender] = max(math.ceil(shortest / first), 1)
        times[contender].append(first)
    if time.perf_counter() - begin > seconds:
        return times
    times = {contender: [] for contender in contenders}
    for _ in tqdm(range(repeats), desc=name, leave=False):
        for contender, function in contenders.items():
            times[contender].append(_timed(function, calls[contender], device))
        if time.perf_counter() - begin > seconds:
            break
    return times


def _timed(function: Callable[[], object], calls: int, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / calls


def faster_than(times: Mapping[str, Sequence[float]], peer: str) -> dict[str, float]:
    """Speedup of each contender over `peer`: the median over rounds of the ratio within a round."""
    return {
        name: round(statistics.median(a / b for a, b in zip(times[peer], samples)), 2)
        for name, samples in times.items()
    }


def summarize_race(times: Mapping[str, Sequence[float]], peers: Sequence[str], **columns) -> list[dict]:
    """One row per contender: median and range in milliseconds, and the speedup over the fastest peer."""
    peer = min(peers, key=lambda name: statistics.median(times[name]))
    rows, ratios = [], faster_than(times, peer)
    for name, samples in times.items():
        rows.append(
            {
                **columns,
                "name": name,
                "ms": round(1e3 * statistics.median(samples), 3),
                "spread_ms": [round(1e3 * min(samples), 3), round(1e3 * max(samples), 3)],
                "rounds": len(samples),
                "peer": peer,
                "times_faster": ratios[name],
            }
        )
    return rows


def peak_growth(target: Callable, *args) -> int:
    """Growth of peak memory, in bytes, while a fresh process runs the function that `target(*args)` returns.

    `target` must be importable; its own work is not counted. The process is fresh because allocators keep memory of
    earlier measurements.
    """
    return fresh_cost(target, *args)[0]


def fresh_cost(target: Callable, *args) -> tuple[int, float]:
    """Growth of peak memory, as in [`peak_growth`], and seconds of one call of the function."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_growth, args=(sender, torch.get_num_threads(), target, *args))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError(f"the measuring process of {target.__name__}{args} ended without a result.") from None
    finally:
        process.join()


def _report_growth(sender, threads: int, target: Callable, *args) -> None:
    torch.set_num_threads(threads)
    function = target(*args)
    before, begin = peak_memory_bytes() or 0, time.perf_counter()
    function()
    seconds = time.perf_counter() - begin
    sender.send(((peak_memory_bytes() or 0) - before, seconds))


def growth_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent `p` of the least-squares fit `cost ~ size ** p`; 1 is linear, 2 quadratic."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    return statistics.linear_regression(x, y).slope


def _curves(rows: Sequence[Mapping], size: str, cost: str) -> dict[tuple[str, str], dict[float, float]]:
    """(work, name) -> {size: cost}, for contenders measured at two sizes or more."""
    curves: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        if size in row and cost in row and row.get("varied", size) == size:
            curves.setdefault((row.get("work", ""), row["name"]), {})[row[size]] = row[cost]
    return {key: dict(sorted(points.items())) for key, points in curves.items() if len(points) > 1}


def fit_growth(rows: Sequence[Mapping]) -> list[dict]:
    """Fit the exponent of each cost; over length only from 4096 tokens on, if two such lengths were measured."""
    fits = []
    for size in SIZES:
        for cost in COSTS:
            for (work, name), points in _curves(rows, size, cost).items():
                far = {x: y for x, y in points.items() if size != "length" or x >= SPARSE_LENGTH}
                points = far if len(far) > 1 else points
                exponent = growth_exponent(list(points), [max(y, 1e-3) for y in points.values()])
                span = {"from": min(points), "to": max(points), "exponent": round(exponent, 2)}
                fits.append({"work": work, "name": name, "cost": cost, "over": size, **span})
    return fits


def draw_growth(rows: Sequence[Mapping], stem: Path) -> list[Path]:
    """Plot each cost against each varied size on log-log axes, as `<stem>-<cost>-<size>.svg`.

    Returns:
        The files; none if matplotlib is not installed.
    """
    if not can_draw():
        return []
    paths = []
    for size in SIZES:
        for cost in COSTS:
            curves = _curves(rows, size, cost)
            if not curves:
                continue
            axes = new_axes(size, cost, width=7)
            for index, ((work, name), points) in enumerate(curves.items()):
                colour = COLOURS[index % len(COLOURS)]
                axes.loglog(list(points), list(points.values()), color=colour, marker="o", markersize=3)
                axes.annotate(f" {name}, {work}", list(points.items())[-1], color=colour, va="center", fontsize=7)
            paths.append(save_axes(axes, stem.parent / f"{stem.name}-{cost.lower()}-{size}.svg", margin=0.4))
    return paths


def copy_bandwidth(size: int = 2**28, device: str = "cpu") -> float:
    """Bandwidth in bytes per second, reads plus writes, of copying `size` bytes, more than caches hold."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = race({"copy": lambda: target.copy_(source)}, repeats=5)["copy"]
    return 2 * size / statistics.median(times)


def cpu_features() -> list[str]:
    """CPU features that decide which matrix kernels run; empty on systems other than Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines() if cpuinfo.is_file() else []
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return [
        name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16") if name in flags
    ]


def kernel_seconds(function: Callable[[], object]) -> float:
    """Seconds of one call spent in kernels (products, attention, gathers), without call overhead and views."""
    function()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        function()
    events = profile.key_averages()
    return sum(e.self_cpu_time_total for e in events if any(part in e.key for part in _KERNELS)) / 1e6


def format_table(rows: Sequence[Mapping]) -> str:
    """Rows as an aligned text table, with a column for every key that occurs."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _cell(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_cell, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
