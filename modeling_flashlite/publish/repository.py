# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Stage a checkpoint for the Hub: published files, complete config, and checks before upload."""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files

from ..data.tasks import TASKS
from ..quantization_flashlite import safetensors_header
from ..saving_flashlite import fitting_auto_map

PACKAGE = Path(__file__).parents[1]
# class -> (Auto class, pipeline task)
HEADS = {
    "FlashLiteForConditionalGeneration": ("AutoModelForSeq2SeqLM", "text2text-generation"),
    "FlashLiteForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "FlashLiteForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "FlashLiteForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "FlashLiteForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "FlashLiteModel": ("AutoModel", "feature-extraction"),
}
# files that are published, and deleted when a new version lacks them
PUBLISHED = re.compile(
    r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|config\.json|"
    r"generation_config\.json|adapter_config\.json|tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|"
    r"added_tokens\.json|chat_template\.jinja|additional_chat_templates/[\w-]+\.jinja|\w+_flashlite\.py|README\.md"
)
# task of `tasks.py` -> task of the pipeline, for encoder-decoders
PIPELINE_TASKS = {
    "text2text-generation": "text2text-generation",
    "translation": "translation",
    "summarization": "summarization",
    "abstractive-qa": "question-answering",
}
PICKLED = re.compile(r"(pytorch_model|adapter_model|model)[\w.-]*\.(bin|pt|pth|pkl|ckpt)")
SECRET = re.compile(rb"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{20,})")


class PublishError(RuntimeError):
    """Publishing stopped; the message has the reason and the fix. The repository is unchanged or complete."""


@dataclass(frozen=True)
class StagedFile:
    """One file to publish: its name there, size in bytes, sha256, and git blob id."""

    name: str
    size: int
    sha256: str
    blob_id: str


def find_checkpoint(run: str | Path) -> Path:
    """Return the folder with the checkpoint of a run: the run itself, or its latest `checkpoint-N`."""
    run = Path(run)
    steps = sorted(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for folder in [run, *reversed(steps)]:
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
    raise PublishError(f"{run} has no config.json and no adapter_config.json; give the folder of a saved model.")


def stage(run: str | Path, target: str | Path, *, task: str | None = None, base_model: str | None = None) -> Path:
    """Assemble a repository in `target`: weights, tokenizer, generation config, code, full config.

    Weights are linked, not copied. The config gets the `auto_map` of every head and the pipeline of its task, so
    that each of them loads with `trust_remote_code=True`.

    Args:
        run (`str` or `Path`): a folder written by `save_pretrained` or by `Trainer`, or a run that holds one.
        target (`str` or `Path`): an empty folder.
        task (`str`, *optional*): what an encoder-decoder is for, one of `PIPELINE_TASKS`; its pipeline then
            generates as `tasks.py` says.
        base_model (`str`, *optional*): Hub id of the base of an adapter, written into its config.

    Raises:
        PublishError: no weights, pickled weights, damaged weights, or something that looks like a token.
    """
    checkpoint, target = find_checkpoint(run), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(checkpoint.rglob("*")):
        name = path.relative_to(checkpoint).as_posix()
        if PUBLISHED.fullmatch(name) and name != "README.md" and not name.endswith(".py"):
            (target / name).parent.mkdir(exist_ok=True)
            if name.endswith(".safetensors"):
                (target / name).symlink_to(path.resolve())
            else:
                shutil.copyfile(path, target / name)
    check_weights(target, checkpoint)
    if (target / "adapter_config.json").is_file():
        if base_model:
            _edit_json(target / "adapter_config.json", base_model_name_or_path=base_model)
    else:
        _complete_config(target, task)
    return target


def _complete_config(folder: Path, task: str | None) -> None:
    """Add code, `auto_map` and `custom_pipelines` to a staged Flash-Lite checkpoint.

    A coded model of another family has its `auto_map` since it was saved, and gets the files of the quantizer.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "flashlite":
        if (config.get("quantization_config") or {}).get("quant_method") == "ecq" and "auto_map" in config:
            quantizer = PACKAGE / "quantization_flashlite.py"
            for source in map(Path, [quantizer, *get_relative_import_files(quantizer)]):
                shutil.copyfile(source, folder / source.name)
        return
    for source in PACKAGE.glob("*_flashlite.py"):
        shutil.copyfile(source, folder / source.name)
    changes: dict = {"auto_map": fitting_auto_map(config.get("is_encoder_decoder", True))}
    auto_class, pipeline_task = HEADS.get((config.get("architectures") or [""])[0], ("", ""))
    classes = {
        "AutoModelForSeq2SeqLM": "FlashLitePipeline",
        "AutoModelForQuestionAnswering": "FlashLiteQuestionAnsweringPipeline",
    }
    if auto_class == "AutoModelForSeq2SeqLM" and task is not None:
        if task not in PIPELINE_TASKS:
            raise PublishError(f"task is '{task}', an encoder-decoder has one of {', '.join(PIPELINE_TASKS)}.")
        pipeline_task = PIPELINE_TASKS[task]
        if task in TASKS:
            own = (config.get("task_specific_params") or {}).get(pipeline_task, {})
            changes["task_specific_params"] = {pipeline_task: {**TASKS[task].generation, **own}}
    if auto_class in classes:
        implementation = f"pipeline_flashlite.{classes[auto_class]}"
        changes["custom_pipelines"] = {pipeline_task: {"impl": implementation, "pt": [auto_class], "type": "text"}}
    _edit_json(folder / "config.json", **changes)


def _edit_json(path: Path, **changes) -> None:
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def check_weights(folder: Path, checkpoint: Path | None = None) -> None:
    """Refuse a folder without safetensors weights, with pickled, missing or truncated ones."""
    weights = sorted(folder.glob("*.safetensors"))
    pickled = [path.name for path in (checkpoint or folder).iterdir() if PICKLED.fullmatch(path.name)]
    if pickled:
        raise PublishError(
            f"{pickled[0]} is a pickle, and only safetensors are published; save the model again with "
            "save_pretrained and remove the file."
        )
    if not weights:
        raise PublishError(
            f"{checkpoint or folder} has no *.safetensors weights; save the model with save_pretrained."
        )
    index = folder / "model.safetensors.index.json"
    names = {path.name for path in weights}
    if index.is_file():
        missing = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) - names
        if missing:
            raise PublishError(f"{min(missing)} is in the index but not in the folder; save the model again.")
    for path in weights:
        read_safetensors_header(path)


def read_safetensors_header(path: Path) -> dict[str, dict]:
    """Return `{tensor: {"dtype", "shape", "data_offsets"}}`; refuse a damaged or truncated file."""
    size = path.stat().st_size
    try:
        header, start = safetensors_header(path)
    except ValueError:
        raise PublishError(f"{path.name} is not a safetensors file ({size} bytes); save the model again.") from None
    end = start + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if end != size:
        raise PublishError(f"{path.name} has {size} bytes, its header asks for {end}; save the model again.")
    return header


def describe_file(path: Path, name: str) -> StagedFile:
    """Size and checksums of one file."""
    size = path.stat().st_size
    digest, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            blob.update(block)
    return StagedFile(name, size, digest.hexdigest(), blob.hexdigest())


def list_files(folder: str | Path) -> list[StagedFile]:
    """List the files of a staged folder with size and sha256; refuse text that holds an access token."""
    files = []
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and PUBLISHED.fullmatch(name := path.relative_to(folder).as_posix()):
            if path.suffix != ".safetensors" and SECRET.search(path.read_bytes()):
                raise PublishError(f"{name} holds something that looks like an access token; remove it.")
            files.append(describe_file(path, name))
    return files


def content_tag(files: list[StagedFile]) -> str:
    """Name for a tag that follows from the files alone (the card excepted, which mentions it)."""
    text = "\n".join(f"{file.name} {file.sha256}" for file in files if file.name != "README.md")
    return f"files-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
