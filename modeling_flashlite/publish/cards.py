# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Model cards generated from a staged repository, results files and a short `card.yaml`.

Numbers come only from results files, sizes only from the published files, and the snippet is run when the card is
made. `card.yaml` next to the checkpoint contains what cannot be derived:

    summary: Translates English to German.        # one sentence
    license: apache-2.0
    language: [en, de]
    base_model: you/flash-lite-en-de              # or: none
    base_model_relation: quantized                # finetune, adapter, merge, quantized; not with `none`
    distilled_from: you/teacher                   # or: none
    datasets: [{name: tatoeba, license: cc-by-2.0, url: ...}]
    example: I like cats.                         # input of the snippet
    tags: [conversational]                        # of a chat model, whose snippet is a chat; optional
    limits: [Sentences only.]
    citation: "@software{...}"
    command: python scripts/distill.py ...        # of the training, where the results files have another
    recipe: scripts/recipes/distill.yaml

A results file is a JSON object; several are merged, later ones first in line:

    {"task": "translation", "dataset": "tatoeba", "split": "test", "metrics": {"bleu": 30.1},
     "teacher": {"bleu": 31.0}, "float": {"bleu": 30.3}, "seeds": [0, 1, 2], "std": {"bleu": 0.2},
     "speed": [{"name": "greedy, batch 1", "value": 210.0, "unit": "tokens/s"}], "hardware": "2 cores, float32",
     "command": "python scripts/...", "recipe": "scripts/recipes/...", "seed": 0, "commit": "3f2c1a9"}
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch
import yaml
from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, StrictUndefined

from .repository import HEADS, PublishError, content_tag, find_checkpoint, list_files, read_safetensors_header

TEMPLATE = Path(__file__).with_name("card_template.md")
# fields from card.yaml, and fields from the results files
WRITTEN = (
    "summary",
    "license",
    "language",
    "base_model",
    "distilled_from",
    "datasets",
    "example",
    "limits",
    "citation",
)
MEASURED = ("metrics", "speed", "hardware", "command", "recipe", "seed", "commit")
RELATIONS = ("finetune", "adapter", "merge", "quantized")
# runs the snippet like a reader: without the package, without a network
BLOCKER = "import sys; sys.modules['modeling_flashlite'] = None\n"


def collect_card(folder: str | Path, repo_id: str, results: list[dict], written: dict, revision: str | None = None):
    """Collect every field of the card; unknown ones stay `None` or empty for `missing_fields`.

    Args:
        folder (`str` or `Path`): staged repository.
        repo_id (`str`): where it will live.
        results (`list[dict]`): contents of results files.
        written (`dict`): contents of `card.yaml`.
        revision (`str`, *optional*): what the snippet pins; defaults to the tag of `hub.content_tag`.

    Returns:
        `dict` of fields, ready for `render_card`.
    """
    folder = Path(folder)
    files = [file for file in list_files(folder) if file.name != "README.md"]
    unknown = set(written) - {*WRITTEN, "base_model_relation", "task", "tags", "command", "recipe"}
    if unknown:
        raise PublishError(f"card.yaml has the unknown field {min(unknown)}; it knows {', '.join(WRITTEN)}.")
    card = {name: written.get(name) for name in WRITTEN}
    card |= {name: written.get(name, _first(results, name)) for name in MEASURED if name not in ("metrics", "speed")}
    kind = describe_kind(folder)
    card |= {
        "name": repo_id,
        "revision": revision or content_tag(files),
        "relation": written.get("base_model_relation"),
        "tags": ["flashlite", *written.get("tags", []), *(["custom_code"] if kind["custom_code"] else [])],
        "quality": quality_rows(results),
        "speed": [row for result in results for row in result.get("speed", [])],
        "sizes": size_rows(folder),
        "files": files,
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
        **kind,
    }
    card["snippet"] = make_snippet(card)
    return card


# peft's names of the kinds of models that adapters belong to
ADAPTED = {
    "SEQ_2_SEQ_LM": "FlashLiteForConditionalGeneration",
    "SEQ_CLS": "FlashLiteForSequenceClassification",
    "TOKEN_CLS": "FlashLiteForTokenClassification",
    "QUESTION_ANS": "FlashLiteForQuestionAnswering",
}


def describe_kind(folder: Path) -> dict:
    """Head, pipeline task, adapter and quantization of a checkpoint, from its configs."""
    if (folder / "adapter_config.json").is_file():
        adapter = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        auto_class, task = HEADS[ADAPTED.get(adapter.get("task_type"), "FlashLiteForCausalLM")]
        return {
            "auto_class": auto_class,
            "pipeline_tag": task,
            "library_name": "peft",
            "adapter_base": adapter["base_model_name_or_path"],
            "custom_code": False,
            "quantized": False,
        }
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto_class, task = HEADS.get((config.get("architectures") or [""])[0], ("AutoModelForCausalLM", "text-generation"))
    return {
        "auto_class": auto_class,
        "pipeline_tag": next(iter(config.get("custom_pipelines", {})), task),
        "library_name": "transformers",
        "adapter_base": None,
        "custom_code": "auto_map" in config,
        "quantized": "quantization_config" in config,
    }


def quality_rows(results: list[dict]) -> list[dict]:
    """One row per metric: task, dataset, split, name, value, std, seeds, teacher, float."""
    rows = []
    for result in results:
        for name, value in result.get("metrics", {}).items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                fields = {key: (result.get(key) or {}).get(name) for key in ("std", "teacher", "float")}
                where = {key: result.get(key) for key in ("task", "dataset", "split", "seeds")}
                rows.append({**where, "metric": name, "value": value, **fields})
    return rows


def size_rows(folder: Path) -> list[dict]:
    """Parameters, bytes in the file and bits per weight of each group of tensors, and of the whole files.

    Parameters are counted on the float model, so that codes, scales and streams of a quantized checkpoint are
    attributed to their weights.
    """
    headers: dict[str, dict] = {}
    weights = sorted(folder.glob("*.safetensors"))
    for path in weights:
        headers |= read_safetensors_header(path)
    stored: dict[str, int] = defaultdict(int)
    counts: dict[str, int] = defaultdict(int)
    shapes = float_shapes(folder) or {name: prod(entry["shape"]) for name, entry in headers.items()}
    modules = {name.rpartition(".")[0] for name in shapes}
    for name, entry in headers.items():
        owner = name if name in shapes else next((m for m in _prefixes(name) if m in modules), name)
        stored[tensor_group(owner)] += entry["data_offsets"][1] - entry["data_offsets"][0]
    for name, count in shapes.items():
        counts[tensor_group(name)] += count
    rows: list[dict] = [
        {"group": group, "parameters": counts[group], "bytes": size} for group, size in sorted(stored.items())
    ]
    size = sum(path.stat().st_size for path in weights)
    rows.append({"group": "headers", "parameters": 0, "bytes": size - sum(stored.values())})
    total: dict = {"group": "total", "parameters": sum(counts.values()), "bytes": size}
    for row in [*rows, total]:
        row["bits"] = 8 * row["bytes"] / row["parameters"] if row["parameters"] else None
    return [*rows, total]


def float_shapes(folder: Path) -> dict[str, int]:
    """Parameter counts of the model without quantization, tied ones once; empty for an adapter."""
    import transformers

    if not (folder / "config.json").is_file():
        return {}
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    architecture = (config.architectures or [""])[0]
    auto_class = getattr(transformers, HEADS.get(architecture, ("AutoModelForCausalLM",))[0])
    with torch.device("meta"):
        model = auto_class.from_config(config)
    return {name: parameter.numel() for name, parameter in model.named_parameters()}


def tensor_group(name: str) -> str:
    """Name the group of a tensor in the size table."""
    stack = next((stack for stack in ("encoder", "decoder") if f"{stack}." in name or name == stack), "")
    kinds = {
        "embed": "embeddings",
        "lm_head": "embeddings",
        "attn": "attention",
        "mlp": "feed-forward",
        "norm": "norms",
    }
    kind = next((kind for key, kind in kinds.items() if key in name), "head and others")
    return kind if kind in ("embeddings", "head and others") or not stack else f"{stack} {kind}"


def missing_fields(card: dict) -> list[str]:
    """One sentence per missing field; an empty list means that the card can be published."""
    missing = [f"{name}: write it in card.yaml" for name in WRITTEN if card.get(name) in (None, "", [], {})]
    for index, dataset in enumerate(card["datasets"] or []):
        if not isinstance(dataset, dict) or not dataset.get("name") or not dataset.get("license"):
            missing.append(f"datasets[{index}]: give it a name and a license in card.yaml")
    if card["base_model"] not in (None, "none") and card["relation"] not in RELATIONS:
        missing.append(f"base_model_relation: write one of {', '.join(RELATIONS)} in card.yaml")
    where = "no results file has it; run scripts/evaluate.py and give --results"
    missing += [f"{name}: {where}" for name in ("quality", "speed") if not card[name]]
    missing += [f"{name}: {where}" for name in MEASURED[2:] if card[name] in (None, "")]
    for row in card["quality"]:
        label = f"{row['metric']} on {row['dataset']}"
        missing += [f"{label}: its {name} is empty" for name in ("task", "dataset", "split") if not row[name]]
        if not row["seeds"]:
            missing.append(f"{label}: the seeds are empty")
        if row["teacher"] is None and card["distilled_from"] not in (None, "none"):
            missing.append(f"{label}: the teacher's value is empty; evaluate {card['distilled_from']}")
        if row["float"] is None and card["quantized"]:
            missing.append(f"{label}: the float model's value is empty; evaluate it before quantization")
    for row in card["speed"]:
        missing += [f"speed: a row has no {name}" for name in ("name", "value", "unit") if row.get(name) in (None, "")]
    if not card.get("snippet_output"):
        missing.append("snippet: it has not been run")
    return missing


def make_snippet(card: dict) -> str:
    """Example code for the card, with the revision pinned."""
    example = card["example"] or ""

    def quote(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    pinned = f'"{card["name"]}", revision="{card["revision"]}"'
    if card["adapter_base"]:
        answer = "print(model(**inputs)[0])\n"
        if card["auto_class"].endswith("LM"):
            answer = (
                "outputs = model.generate(**inputs, max_new_tokens=40, do_sample=False)\n"
                "print(tokenizer.decode(outputs[0], skip_special_tokens=True))\n"
            )
        return (
            "from peft import PeftModel\n"
            f"from transformers import {card['auto_class']}, AutoTokenizer\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{card["adapter_base"]}", trust_remote_code=True)\n'
            f'base = {card["auto_class"]}.from_pretrained("{card["adapter_base"]}", trust_remote_code=True)\n'
            f"model = PeftModel.from_pretrained(base, {pinned})\n"
            f'inputs = tokenizer({quote(example)}, return_tensors="pt")\n'
            f"{answer}"
        )
    trust = ", trust_remote_code=True" if card["custom_code"] else ""
    task = card["pipeline_tag"]
    # a custom pipeline is found from the config; one of the library needs its name
    name = "" if card["auto_class"] in ("AutoModelForSeq2SeqLM", "AutoModelForQuestionAnswering") else f'"{task}", '
    call = quote(example)
    if task == "question-answering":
        question, _, context = example.partition("?")
        call = f"question={quote(question + '?')}, context={quote(context.strip())}"
    elif task == "text-generation":
        if "conversational" in card["tags"]:  # the Hub's tag of chat models
            call = f'[{{"role": "user", "content": {call}}}]'
        call += ", max_new_tokens=40, do_sample=False"
    shape = "print(len(pipe(" + call + ")[0]))" if task == "feature-extraction" else f"print(pipe({call}))"
    arguments = f"{name}model={pinned}{trust}"
    made = f"pipe = pipeline({arguments})"
    if len(made) > 119:
        made = f"pipe = pipeline(\n    {arguments}\n)"
    return f"from transformers import pipeline\n\n{made}\n{shape}\n"


def run_snippet(card: dict, folder: str | Path, run: str | Path = "", timeout: float = 300.0) -> str:
    """Run the card's snippet on the staged files, in a process that cannot import the package; return what it prints.

    Args:
        card (`dict`): fields with the snippet.
        folder (`str` or `Path`): staged repository, which stands in for the one on the Hub.
        run (`str` or `Path`, *optional*): folder of an adapter, whose own config names the base on this machine.
        timeout (`float`, *optional*, defaults to 300): seconds.

    Raises:
        PublishError: the snippet fails; the message ends with the last line of its error.
    """
    code = BLOCKER + card["snippet"].replace(f'"{card["name"]}"', repr(str(Path(folder).resolve())))
    if card["adapter_base"]:
        config = find_checkpoint(run) / "adapter_config.json"
        base = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
        code = code.replace(
            f'"{card["adapter_base"]}"', repr(str(Path(base).resolve() if Path(base).exists() else base))
        )
    with tempfile.TemporaryDirectory() as home:
        kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "OMP_NUM_THREADS") if name in os.environ}
        environment = {**kept, "HF_HOME": home, "HOME": home, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, "-I", "-c", code]
        try:
            done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise PublishError(f"The card's snippet took more than {timeout:.0f} s; give a shorter example.") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PublishError(f"The card's snippet fails: {last}")
    return done.stdout.strip() or "(no text)"


def card_metadata(card: dict) -> str:
    """The card's YAML block: what the Hub indexes, `model-index` included."""
    evaluations = [
        EvalResult(
            task_type=card["pipeline_tag"],
            dataset_type=row["dataset"],
            dataset_name=row["dataset"],
            dataset_split=row["split"],
            metric_type=row["metric"],
            metric_name=row["metric"],
            metric_value=row["value"],
        )
        for row in card["quality"]
    ]
    based = {} if card["base_model"] == "none" else {"base_model": card["base_model"]}
    relation = {"base_model_relation": card["relation"]} if based else {}
    data = ModelCardData(
        **based,
        **relation,
        license=card["license"],
        language=card["language"],
        library_name=card["library_name"],
        pipeline_tag=card["pipeline_tag"],
        tags=card["tags"],
        datasets=[dataset["name"] for dataset in card["datasets"]],
        model_name=card["name"].rpartition("/")[2],
        eval_results=evaluations,
    )
    return data.to_yaml(original_order=["license", "language", "library_name", "pipeline_tag"])


def render_card(card: dict, template: str | Path | None = None) -> str:
    """Fill the template.

    Raises:
        PublishError: a field is empty; the message lists all of them.
    """
    if missing := missing_fields(card):
        raise PublishError("The card is not complete: " + "; ".join(missing) + ".")
    text = Path(template or TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    environment.filters |= {"number": _number, "size": _size, "cell": lambda text: str(text).replace("|", "\\|")}
    rendered = environment.from_string(text).render(**card, metadata=card_metadata(card))
    return re.sub(r"\n{3,}", "\n\n", rendered).strip() + "\n"


def load_written(path: Path) -> dict:
    """Read `card.yaml`; an absent file is an empty one."""
    if not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if not isinstance(content, dict):
        raise PublishError(f"{path} must be a mapping of fields, got a {type(content).__name__}.")
    return content


def _first(results: list[dict], name: str):
    return next((result[name] for result in results if result.get(name) is not None), None)


def _prefixes(name: str):
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _number(value: float | None, digits: int = 2) -> str:
    if value is None:
        return "n/a"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.{digits}f}"


def _size(value: int) -> str:
    return f"{value / 1e6:,.2f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"
