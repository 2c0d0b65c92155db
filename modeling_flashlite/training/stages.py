# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""A job of several stages in one folder that resumes where it was interrupted: training, a table, a clean reload."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, Seq2SeqTrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback

from ..measure.cost import model_size
from ..measure.results import write_json, write_results
from .trainers import CarefulTrainer, last_checkpoint

__all__ = ["LossOnBar", "Stages", "print_line", "reload_elsewhere", "run_elsewhere", "weight_cost"]

# run with the package made impossible to import: only what was saved is there
_RELOAD = """
import json, sys
sys.modules["modeling_flashlite"] = None
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, adapter, request = sys.argv[1:]
request = json.loads(request)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model = PeftModel.from_pretrained(model, adapter).eval()
chat = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
prompt = request["prompt"]
text = isinstance(prompt, str)
inputs = tokenizer(prompt, return_tensors="pt") if text else tokenizer.apply_chat_template(prompt, **chat)
torch.manual_seed(0)
with torch.inference_mode():
    logits = model(**inputs).logits[0, -1]
    ids = model.generate(**inputs, **request["generation"])[0]
ids = ids if text else ids[inputs["input_ids"].shape[1]:]
print(json.dumps({"text": tokenizer.decode(ids, skip_special_tokens=True), "logits": logits.tolist()}))
"""


class LossOnBar(ProgressCallback):
    """The Trainer's progress bar with the latest losses on it, instead of a line per log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {name: f"{logs[name]:.3f}" for name in ("loss", "kd", "agree", "bits_per_weight") if name in logs}
        if self.training_bar is not None and shown:
            self.training_bar.set_postfix(shown)


class Stages:
    """A folder of stages; each writes its results and `stage.json`, and is skipped if that exists.

    Args:
        root (`Path`): the folder.
        made_with (`Mapping`): arguments; a folder made with other arguments is refused.
        seed (`int`): set before each stage, so that a resumed job equals an uninterrupted one.

    Raises:
        ValueError: the folder was made with other arguments.
    """

    def __init__(self, root: Path, made_with: Mapping, seed: int):
        self.root, self.seed = Path(root), seed
        self.table: list[dict] = []
        self.seconds = 0.0
        record = self.root / "args.json"
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) != dict(made_with):
            raise ValueError(f"{self.root} was made with other arguments; give another --output, or remove it.")
        write_json(record, dict(made_with))

    def stage(self, work: Callable[[Path], dict | None]) -> dict:
        """Run `work` on the stage's folder unless the stage is finished; return its result, a row of the table.

        An interrupted stage finds its folder as it was left.
        """
        name = work.__name__
        folder = self.root / name
        finished = folder / "stage.json"
        if finished.is_file():
            print_line(f"{name}: finished before, kept")
        else:
            print_line(name)
            set_seed(self.seed)
            start = time.monotonic()
            row = work(folder) or {}
            write_json(finished, {**row, "seconds": round(time.monotonic() - start, 1)})
            shutil.rmtree(folder / "trainer", ignore_errors=True)
        row = json.loads(finished.read_text(encoding="utf-8"))
        self.seconds += row["seconds"]
        if "parameters" in row:
            self.table.append({"stage": name, **row})
        return row

    def fit(self, model, rows, folder: Path, *, collator, steps: int, batch: int, learning_rate: float, callbacks=()):
        """Train a model on the standard Trainer; after an interruption it resumes from its last checkpoint.

        Args:
            model (`PreTrainedModel` or `PeftModel`): trained in place.
            rows (`Dataset`): of tokens and labels.
            folder (`Path`): of the stage; checkpoints go into `trainer` below it.
            collator (`Callable`): makes a batch of rows.
            steps, batch, learning_rate: optimizer steps, rows of each, and the peak of a cosine schedule.
            callbacks: further callbacks of the Trainer.
        """
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 10,
            weight_decay=0.1,
            logging_steps=max(1, steps // 10),
            save_steps=max(1, steps // 2),
            save_total_limit=1,
            seed=self.seed,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = CarefulTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=list(callbacks)
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossOnBar)
        trainer.train(resume_from_checkpoint=last_checkpoint(arguments.output_dir))

    def render(self, columns: Mapping[str, tuple[str, str]]) -> str:
        """The table as text, one line for each stage: `columns` maps keys to a title and a format."""
        rows = [["stage", *(title for title, _ in columns.values())]]
        for row in self.table:
            cells = (pattern.format(row[key]) if key in row else "" for key, (_, pattern) in columns.items())
            rows.append([row["stage"], *cells])
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)

    def write_results(self, config: Mapping, **fields: Any) -> dict:
        """Write the table into `results.json`, see [`write_results`]; return what a script prints as its last line."""
        metrics = {"seconds": round(self.seconds, 1)}
        metrics |= {f"perplexity_{row['stage']}": row["perplexity"] for row in self.table}
        fields |= {"task": "text-generation", "split": "validation", "seed": self.seed, "stages": self.table}
        write_results(self.root / "results.json", metrics, config=config, **fields)
        return {"stages": self.table, "seconds": metrics["seconds"], "output": str(self.root)}


def print_line(text: str) -> None:
    """Print the name of the running stage."""
    sys.stdout.write(f"demo: {text}\n")
    sys.stdout.flush()


def weight_cost(model, folder: Path, adapter: Path | None = None) -> dict:
    """Parameters of a saved model, and bytes and bits per parameter of its weight files, an adapter's included."""
    size = model_size(model, adapter or folder)
    return {
        "parameters": size["parameters"],
        "bits_per_weight": size["bits_per_weight"],
        "file_bytes": size["weight_bytes"],
    }


def reload_elsewhere(base: Path, adapter: Path, prompt: str | list[dict], **generation) -> str:
    """Load a model with its adapter where the package cannot be imported; return how it continues the prompt.

    Args:
        base, adapter (`Path`): folders of the model with its tokenizer, and of the adapter.
        prompt (`str` or `list[dict]`): a text, or the messages of a chat.
        **generation: arguments of `generate`, as JSON can hold them.

    Raises:
        RuntimeError: with the output of the process, where it fails.
        AssertionError: the logits differ from those of the same model here.
    """
    request = json.dumps({"prompt": prompt, "generation": generation})
    there = run_elsewhere(_RELOAD, str(base.resolve()), str(adapter.resolve()), request)
    tokenizer = AutoTokenizer.from_pretrained(base)
    here = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    chat = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    text = isinstance(prompt, str)
    inputs = tokenizer(prompt, return_tensors="pt") if text else tokenizer.apply_chat_template(prompt, **chat)
    with torch.inference_mode():
        logits = here(**inputs).logits[0, -1]
    torch.testing.assert_close(logits, torch.tensor(there["logits"]), rtol=1e-3, atol=1e-3)
    return there["text"]


def run_elsewhere(code: str, *arguments: str) -> dict:
    """Run Python code in a new process and folder, offline; return the JSON on its last line of output.

    Raises:
        RuntimeError: with the output of the process, where it fails.
    """
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=home,
            env={**os.environ, "HF_HOME": home, "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"The saved model does not load by itself:\n{done.stderr}")
    return json.loads(done.stdout.strip().splitlines()[-1])
