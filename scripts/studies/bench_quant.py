"""A decoder with 4-bit codes against itself in bfloat16 and float32: decoding, prefill, and single layers by others.

python scripts/studies/bench_quant.py --peers torchao bitsandbytes
"""

import copy
import functools

import torch

from modeling_flashlite import EcqConfig, quantize
from modeling_flashlite.cli import start
from modeling_flashlite.measure.benchmark import faster_than, race, summarize_race
from modeling_flashlite.measure.peers import four_bit_linear
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import (
    CODED,
    NEW_TOKENS,
    PREFILL_TOKENS,
    SOURCE_TOKENS,
    greedy,
    random_decoder,
    random_tokens,
)

PLAIN_FLOAT32 = "float32, PyTorch's products"


def without_onednn(run):
    """`run` with PyTorch's own float32 products in place of oneDNN's (see `linear_flashlite`)."""

    def plain():
        with torch.backends.mkldnn.flags(enabled=False):
            return run()

    return plain


@torch.inference_mode()
def measure(args: BenchArgs) -> list[dict]:
    shape = tuple(args.shape) or CODED
    plain = random_decoder(shape, args.seed).to(args.device)
    models = {"float32": plain, "bfloat16": copy.deepcopy(plain).bfloat16()}
    coded = quantize(copy.deepcopy(plain), EcqConfig())
    models |= {"int4, float32 states": coded, "int4": copy.deepcopy(coded).to(torch.bfloat16)}
    prompt, context = (
        random_tokens(1, length, shape[-1], seed=args.seed, device=args.device)
        for length in (SOURCE_TOKENS, PREFILL_TOKENS)
    )
    rows = []
    for work, length, make in (
        (f"{NEW_TOKENS} tokens", SOURCE_TOKENS, lambda model: greedy(model, prompt)),
        ("prefill", PREFILL_TOKENS, lambda model: lambda: model(context, use_cache=True, logits_to_keep=1)),
    ):
        contenders = {name: make(model) for name, model in models.items()}
        contenders[PLAIN_FLOAT32] = without_onednn(contenders["float32"])
        times = race(contenders, repeats=args.repeats, seconds=min(args.seconds, 25.0), name=work)
        than, than_plain = faster_than(times, "float32"), faster_than(times, PLAIN_FLOAT32)
        for row in summarize_race(times, ["bfloat16"], work=work, length=length, batch=1):
            held = models.get(row["name"], plain).get_memory_footprint()
            row |= {"than_float32": than[row["name"]], "than_plain_float32": than_plain[row["name"]]}
            rows.append({**row, "MiB": round(held / 2**20, 1)})
    return rows + linear_layers(args, plain, coded)


def linear_layers(args: BenchArgs, plain, coded) -> list[dict]:
    """One layer of these models in 4 bits, ours and other packages', against itself in bfloat16."""
    layers = [model.get_decoder().layers[0].mlp.gate_proj for model in (plain, coded)]
    contenders = {"bfloat16": copy.deepcopy(layers[0]).bfloat16(), "int4": layers[1]}
    packages = [package for package in ("torchao", "bitsandbytes") if package in args.found]
    for package in packages:
        contenders[f"{package} 4-bit"] = four_bit_linear(package, layers[0], torch.bfloat16)
    rows, width = [], layers[0].in_features
    for count in (1, PREFILL_TOKENS):
        x = torch.randn(count, width, generator=torch.Generator().manual_seed(args.seed)).bfloat16()
        calls = {name: functools.partial(layer, x) for name, layer in contenders.items()}
        times = race(calls, repeats=args.repeats, seconds=min(args.seconds, 15.0), name="linear layers")
        for row in summarize_race(times, ["bfloat16"], work=f"linear {width}x{layers[0].out_features}", length=count):
            for package in packages:
                row[f"than_{package}"] = faster_than(times, f"{package} 4-bit")[row["name"]]
            rows.append(row)
    return rows


if __name__ == "__main__":
    start(lambda: run_bench("quant", measure, against_packages=True))
