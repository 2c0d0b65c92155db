"""Attention of one token over a preallocated cache against PyTorch's SDPA.

python scripts/studies/bench_decode.py --lengths 4096 65536
"""

import itertools

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from modeling_flashlite.attention_flashlite import summarize_blocks
from modeling_flashlite.cli import start
from modeling_flashlite.measure.benchmark import race, summarize_race
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import (
    DENSE,
    HEAD_DIM,
    HEADS,
    KEY_VALUE_HEADS,
    OURS,
    SPEC,
    attention_inputs,
)
from modeling_flashlite.working_set_flashlite import WorkingSet

LENGTHS = (4096, 16384, 65536)
# the query heads of a group as rows of one product, so that each key is read once
GROUPED = "SDPA, group as rows"


@torch.inference_mode()
def measure(args: BenchArgs) -> list[dict]:
    rows = []
    for length in tqdm(args.lengths or LENGTHS, desc="decode"):
        times = race(contenders(args, length), repeats=4 * args.repeats, seconds=args.seconds)
        for peer in (DENSE, GROUPED):
            pair = {name: times[name] for name in (peer, OURS)}
            rows += summarize_race(pair, [peer], work="one token", length=length)
    return rows


def contenders(args: BenchArgs, length: int) -> dict:
    """Steps that cycle through the tokens of the block before `length`; the first one lays out the working set."""
    b = SPEC.block_size
    length -= length % b  # a working set serves one block
    q, k, v = attention_inputs(1, length, **args.inputs)
    whole = summarize_blocks(k[:, :, : length - b], v[:, :, : length - b], SPEC)
    grouped = q.view(1, KEY_VALUE_HEADS, HEADS // KEY_VALUE_HEADS, HEAD_DIM)
    pasts = [(start, k[:, :, : start + 1], v[:, :, : start + 1]) for start in range(length - b, length)]

    def stepper(step):
        places = itertools.cycle(pasts)
        return lambda: step(*next(places))

    def ours(start, keys, values):
        nonlocal working
        if start % b == 0:
            working = WorkingSet(keys, values, SPEC, start // b, whole)
        rows = (grouped * HEAD_DIM**-0.5).flatten(0, 1).float()
        return working.attend(rows, keys, values, start)

    working = WorkingSet(*pasts[0][1:], SPEC, pasts[0][0] // b, whole)
    return {
        DENSE: stepper(lambda _, keys, values: F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)),
        GROUPED: stepper(lambda _, keys, values: F.scaled_dot_product_attention(grouped, keys, values)),
        OURS: stepper(ours),
    }


if __name__ == "__main__":
    start(lambda: run_bench("decode", measure, grows=True))
