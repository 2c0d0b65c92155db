"""Forward of the attention over whole sequences against dense causal attention, PyTorch's and FlexAttention.

python scripts/studies/bench_prefill.py --lengths 1024 4096 --threads 1 --repeats 9
"""

import shutil

import torch
from torch.nn.attention import flex_attention
from tqdm.auto import tqdm

from modeling_flashlite.cli import start
from modeling_flashlite.measure.benchmark import SPARSE_LENGTH, race, summarize_race
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import ATTENTIONS, DENSE, OURS, attention_work, windowed

LENGTHS = (640, 1024, 2048, 4096, 16384, 65536)
# FlexAttention builds its mask from all pairs of tokens, and has no backward on a CPU
FLEX, FLEX_LENGTHS = "FlexAttention causal, compiled", (4096, 16384)


def flex(length: int):
    """FlexAttention with a causal block mask, compiled for this length when it is first called."""
    mask = flex_attention.create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
    compiled = torch.compile(flex_attention.flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def measure(args: BenchArgs) -> list[dict]:
    rows, work = [], "forward"
    for length in tqdm(args.lengths or LENGTHS, desc="prefill"):
        functions = ATTENTIONS | ({f"{OURS}, 8k window": windowed} if length >= SPARSE_LENGTH else {})
        if args.device == "cpu" and length in FLEX_LENGTHS and shutil.which("c++"):
            functions[FLEX] = flex(length)
        contenders = {name: attention_work(call, length, work, **args.inputs) for name, call in functions.items()}
        # a round of many seconds needs no warm-up
        times = race(contenders, repeats=args.repeats, seconds=args.seconds if length < 16384 else 5)
        rows += summarize_race(times, [DENSE], work=work, length=length)
    return rows


if __name__ == "__main__":
    start(lambda: run_bench("prefill", measure, grows=True))
