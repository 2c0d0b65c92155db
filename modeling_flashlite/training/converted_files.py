# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""The folder of a converted model: written whole or not at all, with the parent's tokenizer, licence and name."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from transformers import PreTrainedModel

from .families import ConversionError, dense_length, one_line
from .source import Source

# licences and notices, which are copied beside the converted weights
_PAPERS = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*", re.IGNORECASE)
_KEPT = ("license", "license_name", "license_link", "language")  # of the parent's card
_CARD = """
# {title}

{parent} as a Flash-Lite model: the same weights, bit for bit, with attention that is full up to {dense:,} tokens and
sparse beyond.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({path})
model = AutoModelForCausalLM.from_pretrained({path}, trust_remote_code=True)
```

Licence: {license}. It is the parent's, whose card says what the model was trained on, what it is for and what not.
"""
_PLAIN_CARD = """
# {title}

{parent} as {what}, with the same weights.

Licence: {license}. It is the parent's, whose card says what the model was trained on, what it is for and what not.
"""


def check_output(output: str | Path) -> Path:
    """Refuse an output folder that exists and is not empty."""
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConversionError(f"{output} exists already; remove it, or give another folder.")
    return output


@contextlib.contextmanager
def staged(output: str | Path) -> Iterator[Path]:
    """A temporary folder beside `output`, renamed to it at the end and removed after an error."""
    output = check_output(output)
    staging = output.parent / f".{output.name}.incomplete"
    shutil.rmtree(staging, ignore_errors=True)  # left over from a killed run
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.replace(output)
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"{output} cannot be written: {one_line(error)}; nothing was kept.") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_checkpoint(model: PreTrainedModel, source: Source, folder: Path) -> None:
    """Write a converted model with its parent's tokenizer and licence, and a card that names the parent."""
    model.save_pretrained(folder)
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for path in sorted(source.folder.iterdir()) if source.folder else ():
        if path.is_file() and _PAPERS.fullmatch(path.name):
            shutil.copyfile(path, folder / path.name)
    (folder / "README.md").write_text(make_card(model, source), encoding="utf-8")


def parent_facts(source: Source) -> dict[str, Any]:
    """Name, licence and languages of a parent, from its card or GGUF file; the licence is `unknown` if unstated."""
    facts: dict[str, Any] = {"name": source.name, "license": "unknown"}
    if source.folder and source.gguf:
        facts |= _gguf_facts(source.folder / source.gguf)
    elif source.folder and (source.folder / "README.md").is_file():
        with contextlib.suppress(Exception):  # an unreadable card gives no facts
            said = ModelCard.load(source.folder / "README.md").data.to_dict()
            facts |= {name: said[name] for name in _KEPT if said.get(name)}
    if Path(facts["name"]).exists():
        facts["name"] = Path(facts["name"]).resolve().stem if source.gguf else Path(facts["name"]).resolve().name
    return facts


def _gguf_facts(path: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    keys = {"name": "general.base_model.0.name", "license": "general.license"}
    return {name: str(fields[key].contents()) for name, key in keys.items() if key in fields}


def make_card(model: PreTrainedModel, source: Source) -> str:
    """The text of README.md."""
    facts = parent_facts(source)
    data = ModelCardData(
        base_model=facts["name"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["flashlite"],
        **{name: facts[name] for name in _KEPT if name in facts},
    )
    title = f"{Path(facts['name']).name}-flashlite"
    known = " ".join(str(facts.get("license_name", facts["license"])).split())  # a licence in many lines is one name
    texts = {"title": title, "parent": facts["name"], "license": known}
    if model.config.model_type != "flashlite" or model.config.is_encoder_decoder:
        what = "an encoder-decoder" if model.config.is_encoder_decoder else model.config.model_type
        text = _PLAIN_CARD.format(what=what, **texts)
    else:
        text = _CARD.format(dense=dense_length(model.config), path=json.dumps(title), **texts)
    return f"---\n{data}\n---\n{text}"
