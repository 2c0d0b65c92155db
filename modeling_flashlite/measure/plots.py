"""Plots in one style, as SVG files without dates, so that equal numbers give identical files."""

import importlib.util
from pathlib import Path

__all__ = ["COLOURS", "can_draw", "new_axes", "plot_losses", "save_axes"]

# palette of Okabe and Ito, safe for colour-blind readers
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def new_axes(xlabel: str, ylabel: str, width: float = 6):
    """Axes of a figure `width` x 4 inches."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(width, 4), layout="constrained").subplots()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return axes


def save_axes(axes, path: str | Path, margin: float) -> Path:
    """Write the figure of `axes`; `margin` is the share of the width left for labels at the ends of its lines."""
    axes.margins(x=margin)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.savefig(path, metadata={"Date": None})
    return Path(path)


def plot_losses(log_history: list[dict], path: str | Path) -> Path | None:
    """Draw training and evaluation losses, and a divergence if one was logged, over the steps as an SVG.

    Args:
        log_history (`list[dict]`): of a `TrainerState`.
        path (`str` or `Path`): file to write.

    Returns:
        `Path`, or `None` where matplotlib is not installed or nothing was logged.
    """
    curves = {
        key: [(log["step"], log[key]) for log in log_history if key in log and "step" in log]
        for key in ("loss", "eval_loss", "kd", "eval_kd")
    }
    if not any(curves.values()) or not can_draw():
        return None
    axes = new_axes("step", "nats per token")
    # each key has a fixed colour
    for colour, (key, points) in zip(COLOURS, curves.items()):
        if points:
            steps, values = zip(*points)
            axes.plot(steps, values, color=colour, marker="o" if len(points) < 20 else None, markersize=3)
            axes.annotate(f" {key} {values[-1]:.3f}", (steps[-1], values[-1]), color=colour, va="center")
    return save_axes(axes, path, margin=0.15)
