"""Greedy generation of whole models: short answers to short sources, and the continuation of a long context.

python scripts/studies/bench_generate.py --peers ctranslate2 --threads 1
"""

import copy
import functools

import torch

from modeling_flashlite import EcqConfig, quantize
from modeling_flashlite.cli import start
from modeling_flashlite.measure.benchmark import copy_bandwidth, faster_than, kernel_seconds, race, summarize_race
from modeling_flashlite.measure.peers import CTranslate2Bart, make_models
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import (
    BART,
    LLAMA,
    NEW_TOKENS,
    OUR_MODEL,
    SOURCE_TOKENS,
    T5GEMMA,
    continuation,
    greedy,
    random_tokens,
)

LENGTHS = (4096, 16384)
# width, layers of each stack, heads, vocabulary: about 60 M parameters
SHAPE = (512, 6, 8, 32000)
OUR_BFLOAT16, OUR_INT4 = f"{OUR_MODEL} bfloat16", f"{OUR_MODEL} int4"
LONG_NEW_TOKENS = 8


@torch.inference_mode()
def measure(args: BenchArgs) -> list[dict]:
    shape = tuple(args.shape) or SHAPE
    return answers(args, shape) + continuations(args, shape)


def answers(args: BenchArgs, shape) -> list[dict]:
    """`NEW_TOKENS` tokens after `SOURCE_TOKENS` source tokens, one row at a time and 32."""
    rows, peers = [], [BART, T5GEMMA]
    models = make_models([*peers, OUR_MODEL], shape)
    models[OUR_BFLOAT16] = copy.deepcopy(models[OUR_MODEL]).bfloat16()
    models[OUR_INT4] = quantize(copy.deepcopy(models[OUR_MODEL]), EcqConfig())
    others = {}
    if "ctranslate2" in args.found:
        others = {
            f"CTranslate2 {kind}": CTranslate2Bart(models[BART], kind, args.threads) for kind in ("float32", "int8")
        }
    bandwidth = copy_bandwidth(2**22 if args.shape else 2**28)
    for batch in (1, 32):
        ids = random_tokens(batch, SOURCE_TOKENS, shape[-1], seed=args.seed, device=args.device)
        contenders = {name: greedy(model.to(args.device).eval(), ids) for name, model in models.items()}
        contenders |= {name: functools.partial(other.greedy, ids, NEW_TOKENS) for name, other in others.items()}
        times = race(contenders, repeats=args.repeats, seconds=args.seconds)
        work = {"work": f"{NEW_TOKENS} tokens, sequence to sequence", "length": SOURCE_TOKENS, "batch": batch}
        fresh = summarize_race(times, peers, **work)
        than = {f"than_{other.replace(' ', '_')}": faster_than(times, other) for other in others}
        for row in fresh:
            row |= {column: ratios[row["name"]] for column, ratios in than.items()}
            if row["name"] in (OUR_MODEL, OUR_BFLOAT16, OUR_INT4) and args.device == "cpu":
                row |= where_time_goes(models[row["name"]], contenders[row["name"]], row["ms"] / 1e3, bandwidth)
        rows += fresh
    return rows


def continuations(args: BenchArgs, shape) -> list[dict]:
    """`LONG_NEW_TOKENS` tokens after a long context."""
    rows, models = [], make_models([LLAMA, OUR_MODEL], shape)
    for length in args.lengths or LENGTHS:
        contenders = {
            name: continuation(model.to(args.device).eval(), length, LONG_NEW_TOKENS, args.seed)
            for name, model in models.items()
        }
        times = race(contenders, repeats=args.repeats, seconds=args.seconds)
        rows += summarize_race(times, [LLAMA], work=f"{LONG_NEW_TOKENS} tokens, causal", length=length, batch=1)
    return rows


def where_time_goes(model, run, seconds: float, bandwidth: float) -> dict:
    """Time per token outside kernels, and the rate at which the decoder's weights are read against that of a copy."""
    decoder = model.get_decoder()
    tensors = {id(x): x for x in (*decoder.parameters(), *decoder.buffers(), *model.lm_head.parameters())}
    moved = sum(x.numel() * x.element_size() for x in tensors.values())
    kernels = min(kernel_seconds(run), seconds)
    return {
        "outside_kernels": round(1 - kernels / seconds, 3),
        "outside_ms_per_token": round(1e3 * (seconds - kernels) / NEW_TOKENS, 3),
        "MB_per_token": round(moved / 1e6, 1),
        "of_copy_bandwidth": round(moved * NEW_TOKENS / seconds / bandwidth, 3),
        "copy_GB_per_s": round(bandwidth / 1e9, 2),
    }


if __name__ == "__main__":
    start(lambda: run_bench("generate", measure, grows=True, against_packages=True))
