"""Time and memory of a training step against length, width, batch and vocabulary, one varied at a time.

python scripts/studies/bench_growth.py
"""

from tqdm.auto import tqdm

from modeling_flashlite.cli import start
from modeling_flashlite.measure.benchmark import peak_growth, race, summarize_race
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import OUR_MODEL, grown_step

BASE = {"width": 256, "batch": 1, "vocabulary": 8192, "length": 1024}
VARIED = {
    "length": (1024, 2048, 4096, 8192, 16384),
    "width": (128, 256, 512),
    "batch": (1, 2, 4),
    "vocabulary": (8192, 16384, 32768),
}


def measure(args: BenchArgs) -> list[dict]:
    rows, known = [], {}
    base = {**BASE, **({"width": args.shape[0], "length": 64, "vocabulary": args.shape[-1]} if args.shape else {})}
    for varied, values in VARIED.items():
        for value in tqdm([base[varied], 2 * base[varied]] if args.shape else values, desc=f"growth, {varied}"):
            sizes = {**base, varied: value}
            key = tuple(sizes.values())
            if key not in known:
                times = race({OUR_MODEL: grown_step(args.seed, sizes)}, repeats=args.repeats, seconds=10.0)
                (row,) = summarize_race(times, [OUR_MODEL])
                known[key] = {column: row[column] for column in ("name", "ms", "spread_ms", "rounds")}
                known[key]["MiB"] = round(peak_growth(grown_step, args.seed, sizes) / 2**20, 1)
            rows.append({"work": f"training step over {varied}", "varied": varied, **sizes, **known[key]})
    return rows


if __name__ == "__main__":
    start(lambda: run_bench("growth", measure, grows=True))
