"""Plot loss curves of runs (several seeds of one name as a band), or one number of results files over another.

python scripts/plot.py --runs runs/train_tiny --output runs/train_tiny/loss.svg
python scripts/plot.py --runs scratch=runs/a,scratch=runs/b,distilled=runs/c --key eval_loss --output curves.svg
python scripts/plot.py --runs model_cards/results/distillation.json --output curves.svg
python scripts/plot.py --results rates.json,qat=qat.json --x bits --y perplexity --output rate_distortion.svg
python scripts/plot.py --results a=a.json,b=b.json --x "speed.later tokens, greedy, batch 1" --y metrics.bleu
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from modeling_flashlite.cli import finish, start
from modeling_flashlite.measure.plots import COLOURS, new_axes, save_axes


@dataclass
class PlotArgs:
    runs: str | None = field(
        default=None,
        metadata={
            "help": "with commas: run folders, each with an optional name= before it, or results files with curves"
        },
    )
    results: str | None = field(default=None, metadata={"help": "the same with results files"})
    output: str = field(default="loss.svg", metadata={"help": "file to write"})
    key: str = field(default="loss", metadata={"help": "runs: what to draw: loss, eval_loss, kd, agree, ..."})
    x: str = field(default="size.bits_per_weight", metadata={"help": "results: horizontal, a path such as size.bytes"})
    y: str = field(default="metrics.word_perplexity", metadata={"help": "results: vertical, the same"})
    x_max: float | None = field(default=None, metadata={"help": "results: points beyond are left out"})


def read_curve(folder: Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of `key` in a run's newest trainer state."""
    states = sorted(folder.glob("**/trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        raise SystemExit(f"plot.py: {folder} has no trainer_state.json; name the output_dir of a run.")
    logs = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    points = [(log["step"], log[key]) for log in logs if key in log]
    if not points:
        known = sorted({name for log in logs for name, value in log.items() if isinstance(value, float)})
        raise SystemExit(f"plot.py: {folder} logged no {key!r}, only {', '.join(known)}.")
    steps, values = zip(*points)
    return np.array(steps), np.array(values)


def read_curves(entry: str, key: str) -> list[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    """Name and curve of a run's folder, or of each training compared in a results file."""
    name, _, path = entry.rpartition("=")
    if not path.endswith(".json"):
        return [(name or Path(path).name, read_curve(Path(path), key))]
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    curves = [(arm, curve) for arm, runs in content.get("curves", {}).items() for curve in runs]
    for run in content.get("runs", []):
        curves.append((run["choice"], [(point["step"], point[key]) for point in run["curve"] if key in point]))
    if not curves or not all(points for _, points in curves):
        raise SystemExit(
            f"plot.py: {path} has no curves of {key!r}; ablate.py and compare_distillation.py write some."
        )
    return [(arm, tuple(np.array(points, dtype=float).T)) for arm, points in curves]


def look_up(row, path: str):
    """The number at a dotted path of a results file, or `None`; rows of `speed` are found by name."""
    for name in path.split("."):
        if isinstance(row, list):
            row = {entry["name"]: entry["value"] for entry in row}
        row = row.get(name) if isinstance(row, dict) else None
    return row if isinstance(row, int | float) else None


def read_points(entry: str, x: str, y: str) -> list[tuple[str, float, float]]:
    """(name, x, y) of a results file, or of each of its `points`, named by their `method`."""
    name, _, path = entry.rpartition("=")
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = content.get("points", [content])
    found = [(name or row.get("method") or Path(path).stem, look_up(row, x), look_up(row, y)) for row in rows]
    found = [point for point in found if None not in point]
    if not found:
        raise SystemExit(f"plot.py: {path} has no number at {x!r} and {y!r}; name paths that it has.")
    return found


def draw_results(args: PlotArgs) -> dict:
    """Plot points of results files, connecting those of the same name."""
    groups = defaultdict(list)
    for entry in args.results.split(","):
        for name, x, y in read_points(entry, args.x, args.y):
            if args.x_max is None or x <= args.x_max:
                groups[name].append((x, y))
    axes = new_axes(args.x, args.y)
    for index, (name, points) in enumerate(groups.items()):
        xs, ys = zip(*sorted(points))
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(xs, ys, color=colour, marker="o", markersize=4)
        axes.annotate(f" {name}", (xs[-1], ys[-1]), color=colour, va="center")
    save_axes(axes, args.output, margin=0.2)
    return finish({"output": args.output, "points": sum(map(len, groups.values()))})


def draw_runs(args: PlotArgs) -> dict:
    groups = defaultdict(list)
    for entry in args.runs.split(","):
        for name, curve in read_curves(entry, args.key):
            groups[name].append(curve)
    axes = new_axes("step", args.key)
    last = {}
    for colour, (name, curves) in zip(COLOURS, groups.items()):
        steps = curves[0][0]
        values = np.stack([np.interp(steps, *curve) for curve in curves])
        axes.plot(steps, values.mean(0), color=colour)
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        last[name] = float(values[:, -1].mean())
        axes.annotate(f" {name} {last[name]:.3f}", (steps[-1], last[name]), color=colour, va="center")
    save_axes(axes, args.output, margin=0.2)
    return finish({"output": args.output, **last})


def main(args: PlotArgs) -> dict:
    if (args.runs is None) == (args.results is None):
        raise SystemExit("plot.py: got both or neither of --runs and --results; give exactly one of them.")
    return draw_results(args) if args.results else draw_runs(args)


if __name__ == "__main__":
    start(main, (PlotArgs,), __doc__)
