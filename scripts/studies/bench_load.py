"""Load a decoder of 75 M parameters, coded and as bfloat16, from a warm cache, each time in a fresh process.

The last rows are the time to import the package, after what every model and pipeline of transformers imports.

python scripts/studies/bench_load.py --repeats 3

With `--model`, a folder in bfloat16, and `--coded`, the same model coded, these two are compared: loading and one
token, wall and processor time, with one thread and with two, and the resident memory once decoding has begun.

python scripts/bench.py load --model runs/smollm2-bfloat16 --coded runs/smollm2-3bits
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from modeling_flashlite import EcqConfig, quantize
from modeling_flashlite.cli import finish, parse_args, start
from modeling_flashlite.measure.benchmark import format_table, fresh_cost, summarize_race
from modeling_flashlite.measure.results import write_results
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
# the small model, which is let go of, imports what the other one needs
REAL = """
import gc, json, re, sys, time
import torch
from transformers import AutoModelForCausalLM
import modeling_flashlite
torch.set_num_threads(int(sys.argv[3]))

def resident():
    with open("/proc/self/status") as status:
        return 1024 * int(re.search(r"VmRSS:\\s*(\\d+)", status.read())[1])

@torch.inference_mode()
def run(folder):
    begin = time.perf_counter(), time.process_time()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model(torch.tensor([[4]]))
    return model, time.perf_counter() - begin[0], time.process_time() - begin[1]

generate = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
small = run(sys.argv[2])[0]
small.generate(torch.tensor([[4, 5]]), **generate)
del small
gc.collect()
before = resident()
model, wall, processor = run(sys.argv[1])
model.generate(torch.tensor([[4, 5]]), **generate)
gc.collect()
print(json.dumps([wall, processor, resident() - before]))
"""


@dataclass
class LoadArgs(BenchArgs):
    model: str | None = field(default=None, metadata={"help": "folder of a model in bfloat16"})
    coded: str | None = field(default=None, metadata={"help": "folder of the same model, coded"})
    note: str | None = field(default=None, metadata={"help": "about the model, for the results file"})


def real(args: LoadArgs) -> list[dict]:
    """Rows of a real model, coded against bfloat16."""
    folders = {"bfloat16": args.model, "coded": args.coded}
    sides = [(threads, name) for threads in (1, 2) for name in folders]
    samples: dict = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as small:
        random_decoder(SMALL, args.seed).bfloat16().save_pretrained(Path(small) / "bfloat16")
        quantize(random_decoder(SMALL, args.seed), EcqConfig()).save_pretrained(Path(small) / "coded")
        for _ in tqdm(range(args.repeats), desc="load", leave=False):
            for threads, name in sides:
                command = [sys.executable, "-c", REAL, folders[name], str(Path(small) / name), str(threads)]
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
                output = subprocess.check_output(command, env=environment, stderr=subprocess.DEVNULL)
                samples[threads, name].append(json.loads(output.splitlines()[-1]))
    weights = sum(path.stat().st_size for path in Path(args.model).glob("*.safetensors")) // 2
    rows = []
    for threads, name in sides:
        wall, processor, resident = zip(*samples[threads, name])
        row = {"work": "load, 1 token", "name": name, "threads": threads}
        for key, times in (("wall", wall), ("processor", processor)):
            row[f"{key}_ms"] = round(1e3 * statistics.median(times), 1)
            row[f"{key}_spread_ms"] = [round(1e3 * min(times), 1), round(1e3 * max(times), 1)]
            peer = [sample[key == "processor"] for sample in samples[threads, "bfloat16"]]
            row[f"{key}_of_bfloat16"] = round(statistics.median(a / b for a, b in zip(times, peer)), 2)
        row["resident_MiB"] = round(statistics.median(resident) / 2**20, 1)
        row["resident_bytes_per_weight"] = round(statistics.median(resident) / weights, 3)
        files = Path(folders[name]).glob("*.safetensors")
        row["file_MiB"] = round(sum(path.stat().st_size for path in files) / 2**20, 1)
        rows.append(row)
    return rows


def main() -> dict:
    (args,) = parse_args((LoadArgs,), description=__doc__)
    if not args.model or not args.coded:
        if args.model or args.coded:
            raise SystemExit("Give both --model and --coded, or neither.")
        return run_bench("load", measure)
    rows = real(args)
    path = Path(args.output) / "load.json"
    config = {"model": args.model, "coded": args.coded, "repeats": args.repeats, "note": args.note}
    write_results(path, {}, task="bench load", model=args.model, config=config, seed=args.seed, rows=rows)
    sys.stdout.write(f"\n{format_table(rows)}\n")
    return finish({"results": path.as_posix()})


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
    start(main)
