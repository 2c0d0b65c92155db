"""Race parts of Flash-Lite against named peers in one run; a table, and a results file with hardware and versions.

python scripts/bench.py attention decode memory
python scripts/bench.py attention --lengths 1024,4096 --threads 1 --repeats 9
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from modeling_flashlite.attention_flashlite import AxisSpec, BlockSummaries, multi_axis_attention, summarize_blocks
from modeling_flashlite.benchmarking import format_table, growth_exponent, peak_growth, race, summarize_race
from modeling_flashlite.results import write_results

HEADS, KEY_VALUE_HEADS, HEAD_DIM = 8, 2, 64
# unlimited memory: both sides see the whole past
SPEC = AxisSpec(block_size=64, sub_block_size=16, relevance_top_k=8, memory_blocks=None)
OURS, DENSE, GROUPED = "multi-axis", "SDPA causal", "SDPA, group as rows"
LENGTHS = {
    "attention": (640, 1024, 2048, 4096, 16384, 65536),
    "decode": (4096, 16384, 65536, 131072),
    "memory": (4096, 8192, 16384, 32768),
}
LONGEST_BACKWARD = 16384


def make_inputs(args, queries: int, keys: int, grad: bool = False) -> list[torch.Tensor]:
    """Random q [1, H, queries, d] and k, v [1, Hkv, keys, d] of one seed."""
    generator = torch.Generator().manual_seed(args.seed)
    shapes = (HEADS, queries), (KEY_VALUE_HEADS, keys), (KEY_VALUE_HEADS, keys)
    dtype = getattr(torch, args.dtype)
    tensors = [torch.randn(1, *shape, HEAD_DIM, generator=generator).to(args.device, dtype) for shape in shapes]
    return [tensor.requires_grad_(grad) for tensor in tensors]


def sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def multi_axis(q, k, v):
    return multi_axis_attention(q, k, v, SPEC)


ATTENTIONS = {DENSE: sdpa, OURS: multi_axis}


def workload(args, function, length: int, work: str):
    """A function without arguments that does `work` of an attention over `length` tokens."""
    backward = work == "forward+backward"
    q, k, v = make_inputs(args, length, length, grad=backward)
    grad = torch.randn_like(q)
    if backward:
        return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), grad)
    return torch.inference_mode()(lambda: function(q, k, v))


def attention(args) -> list[dict]:
    """Forward, and forward with backward, over whole sequences against dense causal attention."""
    rows = []
    for length in tqdm(args.lengths or LENGTHS["attention"], desc="attention"):
        for work in ("forward", "forward+backward"):
            if length > LONGEST_BACKWARD and work != "forward":
                continue
            contenders = {name: workload(args, function, length, work) for name, function in ATTENTIONS.items()}
            times = race(contenders, repeats=args.repeats, seconds=args.seconds)
            rows += summarize_race(times, [DENSE], work=work, length=length)
    return rows


@torch.inference_mode()
def decode(args) -> list[dict]:
    """One token over a preallocated cache; `SDPA, group as rows` reads each key once for its group of queries."""
    rows = []
    for length in tqdm(args.lengths or LENGTHS["decode"], desc="decode"):
        times = race(decode_contenders(args, length), repeats=4 * args.repeats, seconds=args.seconds)
        rows += summarize_race(times, [DENSE, GROUPED], work="one token", length=length)
    return rows


def decode_contenders(args, length: int) -> dict:
    q, k, v = make_inputs(args, 1, length + SPEC.block_size)
    summaries = summarize_blocks(k, v, SPEC)
    start = length - SPEC.block_size // 2  # in the middle of a block, as most queries are
    keys, values = k[:, :, : start + 1], v[:, :, : start + 1]
    blocks, r = start // SPEC.block_size, SPEC.block_size // SPEC.sub_block_size
    parts = zip(summaries, (1, 1, r, r))
    summaries = BlockSummaries(*(part[:, :, : blocks * entries] for part, entries in parts))
    grouped = q.view(1, KEY_VALUE_HEADS, HEADS // KEY_VALUE_HEADS, HEAD_DIM)
    return {
        DENSE: lambda: F.scaled_dot_product_attention(q, keys, values, enable_gqa=True),
        GROUPED: lambda: F.scaled_dot_product_attention(grouped, keys, values),
        OURS: lambda: multi_axis_attention(q, keys, values, SPEC, start=start, summaries=summaries),
    }


def memory_target(seed: int, dtype: str, length: int, work: str, name: str):
    """The work whose memory is measured, its inputs made."""
    args = argparse.Namespace(seed=seed, dtype=dtype, device="cpu")
    return workload(args, ATTENTIONS[name], length, work)


def memory(args) -> list[dict]:
    """Most memory beyond the inputs, each number from a fresh process, and how it grows with the length."""
    rows, lengths = [], args.lengths or LENGTHS["memory"]
    for work in ("forward", "forward+backward"):
        for name in (DENSE, OURS):
            peaks = []
            for length in tqdm(lengths, desc=f"memory, {name}, {work}", leave=False):
                peaks.append(peak_growth(memory_target, args.seed, args.dtype, length, work, name))
                rows.append({"work": work, "length": length, "name": name, "MiB": round(peaks[-1] / 2**20, 1)})
            if len(peaks) > 1:
                rows[-1]["exponent"] = round(growth_exponent(lengths, [max(peak, 1) for peak in peaks]), 2)
    return rows


VERBS = {"attention": attention, "decode": decode, "memory": memory}


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=VERBS, help="what to measure")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], help="tokens, a,b,c")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    parser.add_argument("--repeats", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--seconds", type=float, default=30.0, help="after so many no new round of a race begins")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("model_cards/results"), help="directory of results files")
    return parser.parse_args(argv)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    files = {}
    for verb in args.verbs:
        rows = VERBS[verb](args)
        path = args.output / f"bench-{verb}.json"
        settings = {name: value for name, value in vars(args).items() if name not in ("verbs", "output")}
        shape = {"heads": HEADS, "key_value_heads": KEY_VALUE_HEADS, "head_dim": HEAD_DIM, "axes": vars(SPEC)}
        write_results(path, {}, task=f"bench {verb}", config={**settings, **shape}, seed=args.seed, rows=rows)
        files[verb] = path.as_posix()
        print(f"\n{verb}\n{format_table(rows)}")
    print(json.dumps({"results": files}))


if __name__ == "__main__":
    main()
