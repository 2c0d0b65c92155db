"""Distillation loss from cached teacher columns, chunked against dense: time, and memory beyond the inputs.

python scripts/studies/bench_loss.py
"""

from modeling_flashlite.cli import start
from modeling_flashlite.measure.benchmark import peak_growth, race, summarize_race
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import loss_step


def measure(args: BenchArgs) -> list[dict]:
    rows = []
    tokens = args.lengths[0] if args.lengths else 2048
    for vocabulary in args.shape[3:] or (32000, 128000):
        steps = {name: loss_step(args.seed, vocabulary, name, tokens) for name in ("dense", "chunked")}
        times = race(steps, repeats=args.repeats, seconds=args.seconds, name=f"loss {vocabulary}")
        for row in summarize_race(times, ["dense"], vocabulary=vocabulary, tokens=tokens):
            growth = peak_growth(loss_step, args.seed, vocabulary, row["name"], tokens)
            rows.append({**row, "MiB": round(growth / 2**20, 1)})
    return rows


if __name__ == "__main__":
    start(lambda: run_bench("loss", measure, grows=True))
