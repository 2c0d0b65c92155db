"""Time and memory of reading and generating at the shapes of real models, over length, batch and threads.

python scripts/bench.py shapes
python scripts/bench.py shapes --shapes 135M --lengths 1024 4096 16384 --threads 2

Random weights in bfloat16: cost does not depend on their values. Every point is a fresh process, whose memory counts
from the finished model on. A point that would take longer than `--seconds`, by the one before it, is left out.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from modeling_flashlite.cli import finish, start
from modeling_flashlite.measure.benchmark import cpu_features, draw_growth, fit_growth, format_table, fresh_cost
from modeling_flashlite.measure.study import write_bench
from modeling_flashlite.measure.workloads import SHAPES, generating, reading

READ, GENERATE = "read a prompt", "generate 16 tokens"


@dataclass
class ShapesArgs:
    shapes: list[str] = field(default_factory=lambda: ["135M", "1.2B"], metadata={"help": " or ".join(SHAPES)})
    lengths: list[int] = field(
        default_factory=lambda: [1024, 4096, 16384, 65536], metadata={"help": "tokens of prompts"}
    )
    batches: list[int] = field(default_factory=lambda: [1, 4, 16, 32], metadata={"help": "rows that are generated"})
    threads: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "threads of PyTorch"})
    seconds: float = field(default=120.0, metadata={"help": "a point that would take longer is left out"})
    repeats: int = field(default=3, metadata={"help": "rounds of points under a tenth of that; the median counts"})
    seed: int = field(default=0, metadata={"help": "of weights and tokens"})
    output: str = field(default="model_cards/results/smollm2/shapes.json", metadata={"help": "results file"})


def point(work: str, shape: str, length: int, batch: int, threads: int, args: ShapesArgs) -> dict:
    """One row: median milliseconds over the rounds, and the largest growth of memory."""
    torch.set_num_threads(threads)
    target = reading if work == READ else generating
    costs = [fresh_cost(target, shape, args.seed, length, batch)]
    while len(costs) < args.repeats and costs[0][1] < args.seconds / 10:
        costs.append(fresh_cost(target, shape, args.seed, length, batch))
    seconds = [cost[1] for cost in costs]
    return {
        "work": work,
        "name": f"{shape}, {threads} threads",
        "length": length,
        "batch": batch,
        "threads": threads,
        "ms": round(1e3 * statistics.median(seconds), 1),
        "spread_ms": [round(1e3 * min(seconds), 1), round(1e3 * max(seconds), 1)],
        "rounds": len(costs),
        "tokens_per_s": round(batch * (length if work == READ else 16) / statistics.median(seconds), 1),
        "MiB": round(max(cost[0] for cost in costs) / 2**20, 1),
    }


def measure(args: ShapesArgs) -> tuple[list[dict], list[str]]:
    """The rows, and what was left out."""
    rows, skipped = [], []
    plans = (
        (READ, "length", [(length, 1) for length in args.lengths]),
        (GENERATE, "batch", [(64, batch) for batch in args.batches]),
    )
    for shape in args.shapes:
        for threads in args.threads:
            for work, varied, sizes in plans:
                per_token = 0.0
                for length, batch in tqdm(sizes, desc=f"{shape}, {threads} threads, {work}"):
                    if per_token * length * batch > args.seconds:
                        skipped.append(f"{work}, {shape}, {threads} threads, {length} tokens, batch {batch}")
                        continue
                    row = point(work, shape, length, batch, threads, args)
                    per_token = row["ms"] / 1e3 / (length * batch)
                    rows.append({**row, "varied": varied})
    return rows, skipped


def main(args: ShapesArgs) -> dict:
    unknown = [shape for shape in args.shapes if shape not in SHAPES]
    if unknown:
        raise ValueError(f"shapes has {unknown[0]!r}, but must be of {', '.join(SHAPES)}.")
    rows, skipped = measure(args)
    path, growth = Path(args.output), fit_growth(rows)
    about = {"dtype": "bfloat16", "skipped": skipped, "cpu_features": cpu_features()}
    write_bench(path, "shapes", args, rows, growth=growth, **about)
    draw_growth(rows, path.with_suffix(""))
    print(format_table(rows), format_table(growth), sep="\n\n")
    return finish({"results": args.output})


if __name__ == "__main__":
    start(main, (ShapesArgs,), __doc__)
