"""Load data sets from files, folders, the Hub or this Python's documentation, and name their splits and columns."""

import csv
import functools
from collections import Counter
from pathlib import Path

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    load_dataset,
)
from datasets.exceptions import DatasetGenerationError

from ..spelling import did_you_mean
from .corpus import hash_fraction, python_corpus

__all__ = ["column_names", "hash_fraction", "load_data", "pick_split", "python_corpus", "require_columns", "text_of"]
_BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
_COMPRESSIONS = {".xz", ".gz", ".bz2", ".zst"}
_VALIDATION_NAMES = ("validation", "valid", "val", "dev")
# None, NA and null are text; only an empty cell is missing
_CSV_OPTIONS = {"keep_default_na": False, "na_values": [""]}
# text/tab-separated-values has no quoting: a field that begins with a quotation mark is taken literally
_TSV_OPTIONS = {**_CSV_OPTIONS, "sep": "\t", "quoting": csv.QUOTE_NONE}
# a byte order mark is no text
_OPTIONS: dict[str, dict] = {".csv": _CSV_OPTIONS, ".tsv": _TSV_OPTIONS, ".txt": {"encoding": "utf-8-sig"}}
# errors of the `datasets` builders for an empty file
_NO_ROWS = ("corresponds to no data", "at least one example", "No columns to parse")


def load_data(
    dataset: str,
    *,
    name: str | None = None,
    revision: str | None = None,
    streaming: bool = False,
    limit: int | None = None,
    columns: str | None = None,
) -> DatasetDict | IterableDatasetDict:
    """Load a data set with all of its splits, wherever it lives.

    Args:
        dataset (`str`): one of
            `python`: the documentation of the running Python (see `python_corpus`);
            a file, a glob or a comma-separated list, each with an optional `split=` before it, of json, jsonl, csv,
            tsv, parquet or txt, also compressed with xz, gz, bz2 or zst: `train=a.jsonl.xz,test=b.jsonl.xz`
            (without a `split=` the rows are `train`; several files of one split are joined on their common columns);
            fields of a tsv are not quoted; in csv and tsv only an empty cell is `None`;
            a directory of such files; or the id of a data set on the Hub, `owner/name`.
        name (`str`, *optional*): configuration of a Hub data set.
        revision (`str`, *optional*): git revision of a Hub data set.
        streaming (`bool`, *optional*, defaults to `False`): read rows on demand instead of preparing all of them.
        limit (`int`, *optional*): keep the first `limit` rows of every split.
        columns (`str`, *optional*): `source=translation.en,...`, or names alone: a name with a dot is a field inside a
            column, which becomes a column itself.

    Returns:
        `datasets.DatasetDict`, or `datasets.IterableDatasetDict` with `streaming`.

    Raises:
        `FileNotFoundError`: a file does not exist. `ValueError`: an unknown format, no common column, or no rows.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}, but at least one row is needed; pass a positive number or leave it out.")
    if dataset == "python":
        splits = python_corpus()
    elif files := _data_files(dataset):
        loaded = {split: _load_files(paths, streaming) for split, paths in files.items()}
        splits = IterableDatasetDict(loaded) if streaming else DatasetDict(loaded)
    else:
        splits = load_dataset(dataset, name, revision=revision, streaming=streaming, **_directory_options(dataset))
    if limit is not None:
        splits = type(splits)({split: _take(rows, limit) for split, rows in splits.items()})
    if nested := [pair.rpartition("=")[2].strip() for pair in (columns or "").split(",") if "." in pair]:
        splits = type(splits)({split: _unfold(rows, nested) for split, rows in splits.items()})
    for split, rows in splits.items():
        if isinstance(rows, Dataset) and len(rows) == 0:
            raise ValueError(f"Split {split!r} of {dataset!r} has 0 rows, but at least 1 is needed; check the files.")
    return splits


def pick_split(splits: DatasetDict | IterableDatasetDict, split: str) -> Dataset | IterableDataset:
    """Return one split; `validation`, `valid`, `val` and `dev` are synonyms, and other names raise a `ValueError`."""
    for candidate in (split, *(_VALIDATION_NAMES if split in _VALIDATION_NAMES else ())):
        if candidate in splits:
            return splits[candidate]
    raise ValueError(
        f"Split {split!r} does not exist; choose one of {', '.join(splits)}{did_you_mean(split, splits)}."
    )


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """List the columns of a data set; a streamed data set may have to read its first row."""
    return list(dataset.column_names or next(iter(dataset), {}))


def require_columns(dataset: Dataset | IterableDataset, columns: list[str], hint: str = "") -> None:
    """Raise a `ValueError` with the existing columns and a suggestion if one of `columns` is missing."""
    available = column_names(dataset)
    for column in columns:
        if column not in available:
            raise ValueError(
                f"Column {column!r} does not exist; the data set has {', '.join(available) or 'no columns'}"
                f"{did_you_mean(column, available)}.{' ' + hint if hint else ''}"
            )


def text_of(value: object) -> str:
    """Text of a cell; an empty cell, which is `None`, becomes an empty text."""
    return "" if value is None else str(value)


def _take(rows, limit: int):
    return rows.take(limit) if isinstance(rows, IterableDataset) else rows.select(range(min(limit, len(rows))))


def _unfold(rows, nested: list[str]):
    """Add fields inside columns, such as `translation.en`, as columns of that name; existing columns are kept."""

    def fields(row: dict) -> dict:
        return {name: functools.reduce(lambda part, key: part and part[key], name.split("."), row) for name in missing}

    known = (rows.features or rows._resolve_features().features).flatten()
    missing = [name for name in nested if name in known and name not in column_names(rows)]
    return rows.map(fields) if missing else rows


def _suffixes(path: Path) -> str:
    return (path.with_suffix("") if path.suffix.lower() in _COMPRESSIONS else path).suffix.lower()


def _data_files(dataset: str) -> dict[str, list[str]]:
    """Parse `split=path,split=path`; the result is empty if `dataset` does not describe local files."""
    files: dict[str, list[str]] = {}
    for part in map(str.strip, dataset.split(",")):
        split, equals, path = (word.strip() for word in part.partition("="))
        if not equals or "/" in split or Path(part).is_file():  # any other = is part of a path
            split, path = "", part
        if not (split or Path(path).is_file() or _suffixes(Path(path)) in _BUILDERS):
            return {}
        where = Path(path).expanduser()
        matches = sorted(str(match) for match in where.parent.glob(where.name)) if "*" in where.name else [str(where)]
        if not matches or not all(Path(match).is_file() for match in matches):
            raise FileNotFoundError(f"{path!r} is not a file; give an existing path, e.g. train=data/train.jsonl.")
        files.setdefault(split or "train", []).extend(matches)
    return files


def _directory_options(dataset: str) -> dict:
    """Options for the tables in a local directory; `datasets` assumes the most frequent format among its files."""
    folder = Path(dataset)
    suffixes = Counter(_suffixes(path) for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else {}
    known = [suffix for suffix in suffixes if suffix in _BUILDERS]
    suffix = max(known, key=lambda suffix: suffixes[suffix], default="")
    return _OPTIONS.get(suffix, {})


def _load_files(paths: list[str], streaming: bool) -> Dataset | IterableDataset:
    """Read the files of a split, one folder and format at a time, joined on their common columns."""
    groups: dict[tuple[Path, str], list[str]] = {}
    for path in paths:
        groups.setdefault((Path(path).parent, _suffixes(Path(path))), []).append(path)
    parts = []
    for (_, suffix), group in groups.items():
        if suffix not in _BUILDERS:
            raise ValueError(
                f"{group[0]!r} ends in {suffix or 'nothing'!r}, but data files end in one of "
                f"{', '.join(sorted(_BUILDERS))}; convert it."
            )
        options = _OPTIONS.get(suffix, {})
        empty = [path for path in group if not Path(path).stat().st_size]
        if empty:
            raise ValueError(f"{empty[0]} is empty, but a data file needs at least 1 row; check what wrote it.")
        try:
            part = load_dataset(_BUILDERS[suffix], data_files=group, split="train", streaming=streaming, **options)
            # a streamed file is only opened here
            rows = len(part) if isinstance(part, Dataset) else next((1 for _ in part), 0)
        except StopIteration:
            rows = 0
        except (DatasetGenerationError, ValueError) as error:
            cause = error.__cause__ or error
            if not any(phrase in str(cause) for phrase in _NO_ROWS):
                raise ValueError(f"{', '.join(group)} cannot be read as {suffix}: {cause}") from error
            rows = 0
        if not rows:
            raise ValueError(f"{', '.join(group)} has 0 rows, but at least 1 is needed; check what wrote it.")
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    shared = [name for name in column_names(parts[0]) if all(name in column_names(part) for part in parts[1:])]
    if not shared:
        raise ValueError(f"The files {', '.join(paths)} have 0 columns in common; at least 1 is needed to join them.")
    parts = [part.select_columns(shared) for part in parts]
    # string types differ between formats, and a streamed part knows its types only after reading
    features = (parts[0]._resolve_features() if streaming else parts[0]).features
    return concatenate_datasets([part.cast(features) for part in parts])
