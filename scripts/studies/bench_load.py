"""Load a decoder of 75 M parameters, coded and as bfloat16, from a warm cache, each time in a fresh process.

The last rows are the time to import the package, after what every model and pipeline of transformers imports.

python scripts/studies/bench_load.py --repeats 3
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tqdm.auto import tqdm

from modeling_flashlite import EcqConfig, quantize
from modeling_flashlite.cli import start
from modeling_flashlite.measure.benchmark import fresh_cost, summarize_race
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import CODED, loading, random_decoder

SMALL = (64, 2, 4, 256)
LOAD, TOKEN = "load", "load, 1 token"
IMPORT = """
import time
from transformers import AutoModel, GenerationMixin, PreTrainedModel, pipeline
begin = time.perf_counter()
import modeling_flashlite
print(time.perf_counter() - begin)
"""


def measure(args: BenchArgs) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        rows = loads(args, Path(folder))
    times = [float(subprocess.check_output([sys.executable, "-c", IMPORT])) for _ in range(args.repeats)]
    return rows + summarize_race({"modeling_flashlite": times}, ["modeling_flashlite"], work="import")


def loads(args: BenchArgs, folder: Path) -> list[dict]:
    """Time and peak memory of loading, alone and with one token computed."""
    quantize(random_decoder(SMALL, args.seed), EcqConfig()).save_pretrained(folder / "small")
    model = random_decoder(tuple(args.shape) or CODED, args.seed).bfloat16()
    model.save_pretrained(folder / "bfloat16")
    held = {"bfloat16": model.get_memory_footprint()}
    model = quantize(model, EcqConfig())
    model.save_pretrained(folder / "coded")
    held["coded"] = model.get_memory_footprint()
    sides = [(work, name) for work in (LOAD, TOKEN) for name in held]
    costs: dict = {side: [] for side in sides}
    for _ in tqdm(range(min(args.repeats, 5)), desc="load", leave=False):
        for work, name in sides:
            costs[work, name].append(fresh_cost(loading, str(folder / name), work == TOKEN))
    rows = []
    for work in (LOAD, TOKEN):
        times = {name: [seconds for _, seconds in costs[work, name]] for name in held}
        for row in summarize_race(times, ["bfloat16"], work=work):
            name = row["name"]
            peak = statistics.median(growth for growth, _ in costs[work, name])
            file = sum(path.stat().st_size for path in (folder / name).glob("*.safetensors"))
            sizes = {"file_MiB": file, "held_MiB": held[name], "peak_MiB": peak}
            rows.append({**row, **{key: round(size / 2**20, 1) for key, size in sizes.items()}})
            rows[-1]["peak_over_held"] = round(peak / held[name], 2)
    return rows


if __name__ == "__main__":
    start(lambda: run_bench("load", measure))
