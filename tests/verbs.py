"""Run the scripts in the tests' own process: load them by name, parse their options, and a corpus for every task."""

import importlib.util
import json
import sys
from pathlib import Path

from modeling_flashlite.cli import parse_args

SCRIPTS = Path(__file__).parents[1] / "scripts"
RECIPES = {path.stem: path for path in sorted((SCRIPTS / "recipes").glob("*.yaml"))}
VERBS = {"train": "train", "distill": "distill", "lora": "finetune", "adapt": "distill"}
QUANTIZE = ("ptq", "qat", "recover")  # tested by test_quantize_script.py
# recipes are named <verb>_<what>, or <task>_smol for a converted model
VERB_OF = {name: VERBS.get(name.partition("_")[0], "finetune" if name.endswith("_smol") else None) for name in RECIPES}
VERB_OF |= dict.fromkeys([name for name in RECIPES if name.startswith(QUANTIZE)])
TINY_SHAPE = [
    "--hidden_size=32",
    "--num_hidden_layers=2",
    "--num_attention_heads=4",
    "--num_key_value_heads=2",
    "--block_size=8",
    "--sub_block_size=4",
    "--relevance_top_k=2",
]
TINY_RUN = [
    "--max_steps=2",
    "--per_device_train_batch_size=2",
    "--per_device_eval_batch_size=2",
    "--gradient_accumulation_steps=1",
    "--report_to=none",
    "--use_cpu=true",
    "--disable_tqdm=true",
    "--eval_strategy=no",
    "--save_strategy=no",
    "--logging_steps=1",
    "--max_source_length=32",
    "--max_target_length=16",
]


def load_script(name):
    """Import a script of `scripts/` or `scripts/studies/` by its name."""
    (path,) = [*SCRIPTS.glob(f"{name}.py"), *SCRIPTS.glob(f"studies/{name}.py")]
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def argument_classes(script):
    """The dataclasses that a verb parses, in the order of its `main`."""
    return [hint for name, hint in script.main.__annotations__.items() if name != "return"]


def write_corpus(folder):
    """Texts, translation pairs and dialogues with the columns that the recipes name."""
    rows = [
        {
            "text": f"number {i} and number {i + 1} make {2 * i + 1} " * 3,
            "en": f"the number {i} is small",
            "de": f"die Zahl {i} ist klein",
            "dialogue": f"A: what is {i} plus one? B: it is {i + 1}.",
            "summary": f"{i} plus one is {i + 1}.",
            "sentence": f"the number {i} is {'odd' if i % 2 else 'even'}",
            # the validation rows know one class only
            "label": ("odd" if i % 2 else "even") if i < 18 else "odd",
            "coarse_label": "odd" if i % 2 else "even",
            "question": "What is small?",
            "context": f"the number {i} is small",
            "answers": {"text": [f"number {i}"], "answer_start": [4]},
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"{i}"},
            ],
        }
        for i in range(24)
    ]
    for split, part in (("train", rows[:18]), ("validation", rows[18:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return f"train={folder}/train.jsonl,validation={folder}/validation.jsonl"


def run_verb(recipe, dataset, output, overrides):
    """Run the verb of a recipe on a data set with a few overrides, in this process; return its metrics."""
    script = load_script(VERB_OF[recipe])
    argv = [f"--config={RECIPES[recipe]}", f"--dataset={dataset}", f"--output_dir={output}", *TINY_RUN, *overrides]
    return script.main(*parse_args(argument_classes(script), argv))
