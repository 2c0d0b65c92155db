"""A real model against llama.cpp and transformers: tokens per second read and generated, and the first token.

python scripts/bench.py real --model HuggingFaceTB/SmolLM2-135M-Instruct --gguf SmolLM2-135M-Instruct.Q4_0.gguf
python scripts/bench.py real --works decode --native --gguf q4.gguf
python scripts/bench.py real --model runs/smollm2 --lengths 4096 --threads 1 --gguf q4.gguf --llama_bench llama-bench

The model is a Llama of transformers. It is converted, and quantized without data where no `--coded` is given. The
contenders take turns, round after round. Rows of other lengths and threads stay in the results file, so that parts can
be measured by themselves.
"""

import functools
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

import modeling_flashlite
from modeling_flashlite import EcqConfig, quantize
from modeling_flashlite.cli import finish, start
from modeling_flashlite.measure.benchmark import (
    cpu_features,
    faster_than,
    format_table,
    kernel_seconds,
    summarize_race,
)
from modeling_flashlite.measure.peers import llama_bench
from modeling_flashlite.measure.results import git_commit, read_results
from modeling_flashlite.measure.study import BenchArgs, write_bench
from modeling_flashlite.measure.workloads import continuation, random_tokens
from modeling_flashlite.training.conversion import transplant
from modeling_flashlite.training.source import open_source

LLAMA_CPP, LLAMA, FLOAT, CODED, NATIVE = (
    "llama.cpp",
    "transformers' Llama, bfloat16",
    "Flash-Lite, bfloat16",
    "Flash-Lite, coded",
    "Flash-Lite, coded, native",
)
NEW_TOKENS = 32
# up to this length a prompt is read in every round, beyond it llama.cpp reads it once for all its repetitions
SHORT = 1024
FIRST_TOKEN = """
import sys, torch
from modeling_flashlite import FlashLiteForCausalLM
model = FlashLiteForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()
model.generate(torch.arange(4, 20)[None], max_new_tokens=1, do_sample=False)
"""


@dataclass
class RealArgs(BenchArgs):
    model: str = field(default="HuggingFaceTB/SmolLM2-135M-Instruct", metadata={"help": "a Llama of transformers"})
    coded: str | None = field(default=None, metadata={"help": "a coded Flash-Lite of it; made without data if unset"})
    target_bits: float = field(default=3.0, metadata={"help": "bits per parameter of the one that is made"})
    gguf: str | None = field(default=None, metadata={"help": "the model for llama.cpp; without it, no llama.cpp"})
    llama_bench: str = field(default="llama-bench", metadata={"help": "llama.cpp's benchmark program"})
    lengths: list[int] = field(
        default_factory=lambda: [1, 512, 4096, 8192],
        metadata={"help": "tokens: prompts from 512 on are read, and tokens generated after 1 and from 4096 on"},
    )
    works: list[str] = field(
        default_factory=lambda: ["prefill", "decode", "first token"], metadata={"help": "what is measured"}
    )
    threads: list[int] = field(default_factory=lambda: [1, 2], metadata={"help": "threads of every contender"})
    native: bool = field(default=False, metadata={"help": "with the coded model by compiled code, too"})
    note: str | None = field(default=None, metadata={"help": "about the checkpoint, for the results file"})
    output: str = field(default="model_cards/results/smollm2/speed.json", metadata={"help": "results file"})


def load_models(args: RealArgs, folder: Path) -> dict[str, torch.nn.Module]:
    """Those of PyTorch, all with bfloat16 states; ours are saved in `folder` too."""
    source = open_source(args.model, None)
    ours = transplant(source, None).bfloat16().eval()
    if args.coded is None:
        coded = quantize(transplant(source, None), EcqConfig(target_bits=args.target_bits)).bfloat16().eval()
    else:
        coded = AutoModelForCausalLM.from_pretrained(args.coded, dtype=torch.bfloat16).eval()
    for name, model in (("float", ours), ("coded", coded)):
        model.save_pretrained(folder / name)
    llama = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    models = {LLAMA: llama, FLOAT: ours, CODED: coded}
    if args.native:
        models[NATIVE] = AutoModelForCausalLM.from_pretrained(folder / "coded", dtype=torch.bfloat16).eval()
    return models


def natively(run: Callable, *args):
    """What `run` returns with the compiled code enabled; models keep the products that they prepare meanwhile."""
    modeling_flashlite.enable_native()
    try:
        return run(*args)
    finally:
        modeling_flashlite.enable_native(False)


def timed(run: Callable[[], object]) -> list[float]:
    begin = time.perf_counter()
    run()
    return [time.perf_counter() - begin]


def take_turns(contenders: dict[str, Callable[[], list[float]]], once: set[str], args: RealArgs, name: str) -> dict:
    """Seconds of every contender in rounds; those of `once` run in the first round only, all their repetitions."""
    times: dict[str, list[float]] = {contender: [] for contender in contenders}
    for contender, run in contenders.items():
        if contender not in once and not contender.startswith(LLAMA_CPP):
            run()
    begin = time.perf_counter()
    for index in tqdm(range(args.repeats), desc=name, leave=False):
        for contender, run in contenders.items():
            if index == 0 or contender not in once:
                times[contender] += run()
        if time.perf_counter() - begin > args.seconds:
            break
    return times


def contenders_of(work: str, length: int, threads: int, models: dict, args: RealArgs) -> dict:
    """Functions that return the seconds of their repetitions."""
    if work == "prefill":
        ids = random_tokens(1, length, models[LLAMA].config.vocab_size, seed=args.seed)
        runs = {
            name: functools.partial(model, ids, use_cache=True, logits_to_keep=1) for name, model in models.items()
        }
        if NATIVE in models:
            runs[NATIVE] = functools.partial(natively, runs[NATIVE])
        sizes = {"prompt": length}
    else:
        arguments = length + 1, NEW_TOKENS, args.seed
        runs = {name: continuation(model, *arguments) for name, model in models.items() if name != NATIVE}
        if NATIVE in models:
            run = natively(continuation, models[NATIVE], *arguments)
            runs[NATIVE] = functools.partial(natively, run)
        sizes = {"new": NEW_TOKENS, "depth": length if length > 1 else 0}
    calls = {name: functools.partial(timed, run) for name, run in runs.items()}
    if args.gguf is None:
        return calls
    repeats = args.repeats if work == "decode" and length > SHORT else 1
    theirs = functools.partial(llama_bench, args.llama_bench, args.gguf, threads, repeats=repeats, **sizes)
    return {LLAMA_CPP: theirs, **calls}


@torch.inference_mode()
def measure(work: str, length: int, threads: int, models: dict, args: RealArgs) -> list[dict]:
    torch.set_num_threads(threads)
    calls = contenders_of(work, length, threads, models, args)
    once = {LLAMA_CPP} if work == "decode" and length > SHORT else set()
    times = take_turns(calls, once, args, f"{work} {length}, {threads} threads")
    tokens = length if work == "prefill" else NEW_TOKENS
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    rows = summarize_race(times, [LLAMA], work=work, length=length, threads=threads)
    for row in rows:
        row["tokens_per_s"] = round(tokens / medians[row["name"]], 1)
        row["times_llama_cpp"] = round(medians[LLAMA_CPP] / medians[row["name"]], 2) if LLAMA_CPP in medians else None
        row["commit"] = git_commit()
        if work == "decode" and row["name"] in (FLOAT, CODED, NATIVE):
            run = functools.partial(calls[row["name"]])
            row["outside_kernels"] = round(1 - min(kernel_seconds(run) / medians[row["name"]], 1), 3)
    return rows


def first_tokens(folder: Path, args: RealArgs) -> list[dict]:
    """Wall-clock seconds of a process that imports, loads, reads 16 tokens and generates one."""
    torch.set_num_threads(max(args.threads))
    command = [sys.executable, "-c", FIRST_TOKEN]
    runs = {name: [*command, str(folder / part)] for name, part in ((FLOAT, "float"), (CODED, "coded"))}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in tqdm(range(min(args.repeats, 5)), desc="first token", leave=False):
        for name, run in runs.items():
            times[name] += timed(functools.partial(subprocess.run, run, check=True, capture_output=True))
    size = {"work": "first token of a process", "length": 16, "threads": max(args.threads), "commit": git_commit()}
    ratios = faster_than(times, FLOAT)
    return [{**row, "times_faster": ratios[row["name"]]} for row in summarize_race(times, [FLOAT], **size)]


def write(rows: list[dict], args: RealArgs) -> None:
    """The results file: fresh rows, and the older ones of other works, lengths and threads."""

    def key(row: dict) -> tuple:
        return row["work"], row["length"], row["threads"]

    path, fresh = Path(args.output), {key(row) for row in rows}
    old = read_results([path])[0]["rows"] if path.exists() else []
    rows = sorted([row for row in old if key(row) not in fresh] + rows, key=key)
    metrics = {f"{row['name']}, {row['work']} {row['length']}, {row['threads']} threads": row["ms"] for row in rows}
    about = {"model": args.model, "cpu_features": cpu_features(), "note": args.note}
    write_bench(path, "real", args, rows, metrics, without=("model", "note", "shape", "peers"), **about)


def main(args: RealArgs) -> dict:
    if args.gguf is not None and shutil.which(args.llama_bench) is None:
        raise ValueError(f"There is no program {args.llama_bench!r}; build llama.cpp or name its llama-bench.")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        models = load_models(args, Path(name))
        for threads in args.threads:
            for length in args.lengths:
                for work in [w for w in ("prefill", "decode") if w in args.works]:
                    if length >= 512 if work == "prefill" else length in (1, 512) or length > SHORT:
                        rows += measure(work, length, threads, models, args)
                        write(rows, args)
        if "first token" in args.works:
            rows += first_tokens(Path(name), args)
            write(rows, args)
    print(format_table(rows))
    return finish({"results": args.output})


if __name__ == "__main__":
    start(main, (RealArgs,), __doc__)
