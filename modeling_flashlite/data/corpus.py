"""A text corpus that needs no download: the documentation in the running Python's standard library."""

import ast
import hashlib
import inspect
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm

# directories of the standard library that are not documentation, or that some distributions leave out
_SKIPPED_DIRECTORIES = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3"}
_MINIMUM_CHARACTERS = 40


def python_corpus(validation_fraction: float = 0.05, root: str | Path | None = None) -> DatasetDict:
    """Collect the docstrings and language topics of this Python's standard library without importing it.

    One row per documented object, in order of file name and then of position in the file: `name` is its qualified
    name (`json.decoder.JSONDecoder.decode`), `signature` its first line of source (`def decode(self, s)`; empty for
    modules and topics), `text` its documentation without indentation. Repeated texts are dropped. The split is by a
    hash of the module's name, so that it depends neither on the order nor on the Python version.

    Args:
        validation_fraction (`float`, *optional*, defaults to 0.05): share of modules that go to `validation`.
        root (`str` or `Path`, *optional*): directory of Python sources; the standard library if unset.

    Returns:
        `datasets.DatasetDict` with the splits `train` and `validation` (about 2 MB of text together).

    Raises:
        `FileNotFoundError`: `root` has no Python source with documentation.
        `ValueError`: `validation_fraction` is not inside (0, 1).
    """
    if not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}, but must be inside (0, 1); 0.05 is usual.")
    root = Path(root or sysconfig.get_path("stdlib"))
    files = sorted(path for path in root.rglob("*.py") if not _SKIPPED_DIRECTORIES & set(path.relative_to(root).parts))
    seen: set[str] = set()
    splits: dict[str, list[dict]] = {"train": [], "validation": []}
    for path in tqdm(files, desc="python documentation", unit="file"):
        module = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for name, signature, text in _documentation(path, module):
            if len(text) >= _MINIMUM_CHARACTERS and text not in seen:
                seen.add(text)
                # the topics are a single module, so each is assigned to a split by itself
                unit = name if module == "pydoc_data.topics" else module
                split = "validation" if hash_fraction(unit) < validation_fraction else "train"
                splits[split].append({"name": name, "signature": signature, "text": text})
    if not splits["train"] or not splits["validation"]:
        raise FileNotFoundError(
            f"{root} holds {len(files)} Python files with {len(seen)} documented objects, too few for two splits; "
            "pass the directory of a Python standard library as root, or your own text files as dataset."
        )
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def hash_fraction(key: str) -> float:
    """Map a string to a number in [0, 1), the same on every machine, so that splits do not depend on order."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64


def _documentation(path: Path, module: str) -> Iterator[tuple[str, str, str]]:
    """Yield (qualified name, signature, documentation) of every documented object in one source file."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # templates and intentionally broken sources
        return
    if module == "pydoc_data.topics":
        for topic, text in _topics(tree):
            yield f"topics.{topic}", "", text.strip()
        return
    yield from _docstrings(tree, module)


def _docstrings(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str
) -> Iterator[tuple[str, str, str]]:
    text = ast.get_docstring(node, clean=False)
    if text:
        yield name, _signature(node), inspect.cleandoc(text).strip()
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _docstrings(child, f"{name}.{child.name}")


def _signature(node: ast.AST) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases})" if bases else f"class {node.name}"
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"def {node.name}({ast.unparse(node.args)})"
    return ""


def _topics(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            yield from sorted(ast.literal_eval(statement.value).items())
