"""Class labels: names in data sets and models, and how they are matched."""

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import ClassLabel, Dataset, IterableDataset, Value
from transformers import PreTrainedConfig


def label_names(dataset: Dataset | IterableDataset, column: str) -> list[str]:
    """Class names in the order of their ids; strings are sorted, integers are named by their digits."""
    if names := names_of(dataset, column):
        return names
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f"The classes in column {column!r} of a streamed data set are unknown until all of it has been read; load "
            "it without streaming, or cast the column to a ClassLabel."
        )
    # lists, of several labels, and mappings have no `unique`
    values = set(dataset.unique(column)) if isinstance(dataset.features[column], Value) else dataset[column]
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if odd := [value for value in values if not _is_class_number(value)]:
        raise ValueError(
            f"Column {column!r} holds {odd[0]!r}, but classes are all strings or all whole numbers from 0; correct "
            "it, or leave those rows out."
        )
    return [str(value) for value in range(int(max(values)) + 1)]


def class_of(value: Any, names: list[str] | None = None) -> str:
    """Class name of a cell: a string itself, a number by `names` (of a ClassLabel) or by its digits.

    Raises:
        `ValueError`: no label, or one that is neither a string nor a whole number from 0.
    """
    if isinstance(value, str):
        return value
    if not _is_class_number(value):
        raise ValueError(
            f"A label is {value!r}, but classes are all strings or all whole numbers from 0; correct it, or leave "
            "those rows out."
        )
    return str(int(value)) if names is None else names[int(value)]


def _is_class_number(value: object) -> bool:
    return isinstance(value, int | float) and value >= 0 and not value % 1


def names_of(dataset: Dataset | IterableDataset, column: str) -> list[str] | None:
    """Class names of a ClassLabel column, `None` for any other column."""
    feature = (dataset.features or {}).get(column)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def classes_of(config: PreTrainedConfig) -> list[str]:
    """Class names of a model in the order of their ids."""
    return [str(config.id2label[number]) for number in sorted(config.id2label, key=int)]


def ids_by_name(names: Sequence[str]) -> dict[str, int]:
    """Class ids by name, and by the lower-case name where it is unambiguous."""
    folded = [name.casefold() for name in names]
    ids = {name: number for number, name in enumerate(folded)} if len(set(folded)) == len(folded) else {}
    return ids | {name: number for number, name in enumerate(names)}


def class_id(name: str, ids: Mapping[str, int]) -> int | None:
    """Class id of a name in [`ids_by_name`], `None` where the model does not know it."""
    return ids.get(name, ids.get(name.casefold()))
