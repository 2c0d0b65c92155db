"""How far smaller students are behind their teacher, over the tokens that they were trained on.

python scripts/studies/students.py --teacher runs/smol --dataset test=enwiki/test.jsonl.xz \
    --runs pruned=runs/smol-90m,pruned=runs/student_smol,random=runs/student_random --output students.json

A run is a folder of distill.py or train.py: each of its checkpoints is a point (`--save_steps`, and
`--include_num_input_tokens_seen true` for the tokens). A folder without checkpoints is a point at 0 tokens.
"""

import gc
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_flashlite  # noqa: F401  registers the Auto classes
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import load_data, pick_split
from modeling_flashlite.measure.perplexity import text_likelihood
from modeling_flashlite.measure.plots import COLOURS, can_draw, new_axes, save_axes
from modeling_flashlite.measure.results import write_results


@dataclass
class StudyArgs:
    teacher: str = field(metadata={"help": "folder or Hub id"})
    runs: str = field(metadata={"help": "name=folder, separated by commas; runs of one name make one curve"})
    dataset: str = field(metadata={"help": "local files (test=a.jsonl.xz) or a Hub id, rows of a `text` column"})
    split: str = field(default="test", metadata={"help": "split"})
    texts: int | None = field(default=None, metadata={"help": "texts, evenly spaced over the split; all if unset"})
    length: int = field(default=512, metadata={"help": "tokens read at once"})
    dtype: str = field(default="bfloat16", metadata={"help": "float32 or bfloat16"})
    seed: int = field(default=42, metadata={"help": "of the trainings, for the results file"})
    output: str = field(default="runs/results/students.json", metadata={"help": "results file; a plot goes beside it"})
    label: str | None = field(default=None, metadata={"help": "name of the data set in tables"})
    note: str | None = field(default=None, metadata={"help": "about the checkpoints, for the results file"})


def points_of(folder: Path) -> list[tuple[int, Path]]:
    """Tokens seen and folder of each checkpoint of a run.

    Raises:
        ValueError: for a run that did not count its tokens.
    """
    found = []
    for checkpoint in folder.glob("checkpoint-*"):
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if not state["num_input_tokens_seen"]:
            raise ValueError(f"{checkpoint} has counted no tokens; train with --include_num_input_tokens_seen true.")
        found.append((state["num_input_tokens_seen"], checkpoint))
    return sorted(found) or [(0, folder)]


def measure(folder: str | Path, tokenizer, rows: list[str], args: StudyArgs) -> dict:
    """Perplexity a token and its interval of one checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    found, _ = text_likelihood(model, tokenizer, rows, segment_length=args.length, memory=False, batch_size=4)
    parameters = model.num_parameters()
    del model
    gc.collect()
    return {"perplexity": found["token_perplexity"], "parameters": parameters, "scored": found["tokens"]}


def draw(teacher: float, curves: dict[str, list], path: Path) -> None:
    axes = new_axes("tokens of training (thousands)", "perplexity")
    axes.axhline(teacher, color="grey", linestyle="--", linewidth=1)
    axes.annotate(f"teacher {teacher:.1f}", (0, teacher), color="grey", va="bottom")
    for colour, (name, points) in zip(COLOURS, curves.items()):
        xs, ys = zip(*((point["tokens"] / 1000, point["perplexity"]) for point in points))
        axes.plot(xs, ys, color=colour, marker="o", markersize=4)
        axes.annotate(f" {name} {ys[-1]:.1f}", (xs[-1], ys[-1]), color=colour, va="center")
    axes.set_yscale("log")
    save_axes(axes, path, margin=0.15)


def main(args: StudyArgs) -> dict:
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    rows = pick_split(load_data(args.dataset), args.split)["text"]
    rows = list(rows[:: max(1, len(rows) // args.texts)][: args.texts] if args.texts else rows)
    teacher = measure(args.teacher, tokenizer, rows, args)
    curves: dict[str, list] = {}
    for entry in args.runs.split(","):
        name, _, folder = entry.rpartition("=")
        for tokens, checkpoint in points_of(Path(folder)):
            point = {"tokens": tokens, **measure(checkpoint, tokenizer, rows, args)}
            point["over_teacher"] = point["perplexity"] / teacher["perplexity"]
            curves.setdefault(name, []).append(point)
            print(f"{name}: {tokens:,} tokens, perplexity {point['perplexity']:.2f}")
    metrics = {"perplexity teacher": teacher["perplexity"]}
    metrics |= {f"perplexity {name}": points[-1]["perplexity"] for name, points in curves.items()}
    write_results(
        args.output,
        metrics,
        task="students",
        dataset=args.label or args.dataset,
        split=args.split,
        model=args.teacher,
        config=asdict(args),
        seed=args.seed,
        dtype=args.dtype,
        students={"teacher": teacher, "points": curves},
    )
    if can_draw():
        draw(teacher["perplexity"], curves, Path(args.output).with_suffix(".svg"))
    return finish({"output": args.output, **metrics})


if __name__ == "__main__":
    start(main, (StudyArgs,), __doc__)
