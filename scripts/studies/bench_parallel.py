"""A training step on two gloo processes by DDP, FSDP2 and tensor parallelism: time, and traffic against theory.

python scripts/studies/bench_parallel.py
"""

import tempfile

from modeling_flashlite.cli import start
from modeling_flashlite.measure.parallel import measure_parallel
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import random_decoder

# width, layers, heads, vocabulary
SHAPE = (256, 4, 8, 8192)


def measure(args: BenchArgs) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        random_decoder(tuple(args.shape) or SHAPE, args.seed).save_pretrained(folder)
        for kind, name in (("ddp", "DDP"), ("fsdp", "FSDP2"), ("tp", "TP")):
            rows.append({"work": "training step, 2 processes", "name": name, **measure_parallel(kind, folder)})
    return rows


if __name__ == "__main__":
    start(lambda: run_bench("parallel", measure))
