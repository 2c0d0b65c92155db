"""Peak memory of the attention beyond its inputs, each number from a fresh process, and its growth with the length.

python scripts/studies/bench_memory.py --lengths 4096 8192
"""

from tqdm.auto import tqdm

from modeling_flashlite.cli import start
from modeling_flashlite.measure.benchmark import peak_growth
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import DENSE, OURS, named_attention_work

LENGTHS = (4096, 8192, 16384)


def measure(args: BenchArgs) -> list[dict]:
    rows = []
    for work in ("forward", "forward+backward"):
        for name in (DENSE, OURS):
            for length in tqdm(args.lengths or LENGTHS, desc=f"memory, {name}, {work}", leave=False):
                peak = peak_growth(named_attention_work, name, length, work, args.seed, args.dtype)
                rows.append({"work": work, "length": length, "name": name, "MiB": round(peak / 2**20, 1)})
    return rows


if __name__ == "__main__":
    start(lambda: run_bench("memory", measure, grows=True))
