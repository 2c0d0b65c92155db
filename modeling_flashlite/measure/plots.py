"""Figures in one style, as SVG files without a date, so that the same numbers make the same file."""

import importlib.util
from pathlib import Path

__all__ = ["COLOURS", "can_draw", "new_axes", "save_axes"]

# Okabe and Ito's, which differ for colour-blind readers too
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
