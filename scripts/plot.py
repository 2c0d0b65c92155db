"""Draw the loss curves of one or more runs into one SVG; several seeds of a name become a band.

python scripts/plot.py --runs runs/train_tiny --output runs/train_tiny/loss.svg
python scripts/plot.py --runs scratch=runs/a,scratch=runs/b,distilled=runs/c --key eval_loss --output curves.svg
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from modeling_flashlite.cli import finish, parse_args

# Okabe and Ito's colours, which differ for colour-blind readers too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


@dataclass
class PlotArgs:
    runs: str = field(metadata={"help": "run folders with commas, each with an optional name= before it"})
    output: str = field(default="loss.svg", metadata={"help": "file to write"})
    key: str = field(default="loss", metadata={"help": "what to draw: loss, eval_loss, kd, agree, ..."})


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


def main(args: PlotArgs) -> dict:
    groups = defaultdict(list)
    for entry in args.runs.split(","):
        name, _, folder = entry.rpartition("=")
        groups[name or Path(folder).name].append(read_curve(Path(folder), args.key))
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    last = {}
    for colour, (name, curves) in zip(COLOURS, groups.items()):
        steps = curves[0][0]
        values = np.stack([np.interp(steps, *curve) for curve in curves])
        axes.plot(steps, values.mean(0), color=colour)
        axes.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        last[name] = float(values[:, -1].mean())
        axes.annotate(f" {name} {last[name]:.3f}", (steps[-1], last[name]), color=colour, va="center")
    axes.set(xlabel="step", ylabel=args.key)
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output)
    return finish({"output": args.output, **last})


if __name__ == "__main__":
    main(*parse_args((PlotArgs,), description=__doc__))
