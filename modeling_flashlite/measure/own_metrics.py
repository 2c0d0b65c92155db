"""Metrics of the `evaluate` library, by name or from a file of one's own, beside those of a task."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluate import CombinedEvaluations, combine
from evaluate import load as load_metric

__all__ = ["load_metrics", "score_predictions"]


def load_metrics(names: Sequence[str]) -> CombinedEvaluations:
    """Load metrics and combine them; each result is prefixed with the name or the file's stem.

    Args:
        names (`Sequence[str]`): `.py` files with an `evaluate.Metric`, loaded without a network, or names on the Hub
            (`"accuracy"`, `"you/metric"`), whose code is downloaded and run.

    Raises:
        ValueError: a metric cannot be loaded, or two have the same name.
    """
    modules = {}
    for name in names:
        short = Path(name).stem
        if short in modules:
            raise ValueError(f"Two metrics are called {short!r}; rename the file of one of them.")
        try:
            modules[short] = load_metric(name)
        except (OSError, ImportError, ValueError) as error:  # FileNotFoundError where neither file nor Hub has it
            raise ValueError(
                f"The metric {name!r} cannot be loaded ({error}); give a .py file with an evaluate.Metric, or a name "
                "on the Hub while it can be reached."
            ) from None
    return combine(modules, force_prefix=True)


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
