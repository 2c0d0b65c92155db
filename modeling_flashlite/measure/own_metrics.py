"""Metrics of the `evaluate` library in addition to those of a task: by name on the Hub, or from a local file."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evaluate import CombinedEvaluations

__all__ = ["load_metrics", "score_predictions"]


def load_metrics(names: Sequence[str]) -> CombinedEvaluations:
    """Load metrics and combine them; each result is prefixed with the name or the file's stem.

    Args:
        names (`Sequence[str]`): `.py` files with an `evaluate.Metric`, loaded without a network, or names on the Hub
            (`"accuracy"`, `"you/metric"`), whose code is downloaded and run.

    Raises:
        ValueError: a metric cannot be loaded, or two have the same name.
    """
    evaluate = _library()
    modules = {}
    for name in names:
        short = Path(name).stem
        if short in modules:
            raise ValueError(f"Two metrics are called {short!r}; rename the file of one of them.")
        try:
            modules[short] = evaluate.load(name)
        except (OSError, ImportError, ValueError) as error:  # FileNotFoundError where neither file nor Hub has it
            raise ValueError(
                f"The metric {name!r} cannot be loaded ({error}); give a .py file with an evaluate.Metric, or a name "
                "on the Hub while it can be reached."
            ) from None
    return evaluate.combine(modules, force_prefix=True)


def score_predictions(metrics: CombinedEvaluations, predictions: Sequence[Mapping]) -> dict[str, float]:
    """Compute combined metrics on the `predictions` of `evaluate_task`; only numbers are kept.

    Args:
        metrics (`CombinedEvaluations`): of [`load_metrics`].
        predictions (`Sequence[Mapping]`): rows with `prediction` and `references`, a class or a list of texts. Where
            every row has exactly one reference text, the metric receives a flat list of them.
    """
    references = [row["references"] for row in predictions]
    if all(isinstance(answers, list) and len(answers) == 1 for answers in references):
        references = [answers[0] for answers in references]
    scores = metrics.compute(predictions=[row["prediction"] for row in predictions], references=references)
    return {name: float(value) for name, value in scores.items() if isinstance(value, (int, float))}


def _library():
    """Import the `evaluate` library; `scripts/evaluate.py`, whose folder comes first on the path, would shadow it."""
    found, sys.path = sys.path, [place for place in sys.path if not (Path(place) / "evaluate.py").is_file()]
    try:
        import evaluate
    finally:
        sys.path = found
    return evaluate
