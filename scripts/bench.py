"""Race parts of Flash-Lite against named peers in one run; a table, and a results file with hardware and versions.

python scripts/bench.py attention decode prefill train generate loss quant load memory growth parallel scale
python scripts/bench.py prefill --lengths 1024,4096 --threads 1 --repeats 9
python scripts/bench.py generate quant --peers ctranslate2,torchao,bitsandbytes
"""

import argparse
import copy
import dataclasses
import functools
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import DynamicCache, Trainer, TrainingArguments

from modeling_flashlite import FlashLiteCache, FlashLiteConfig, FlashLiteForCausalLM
from modeling_flashlite.attention_flashlite import AxisSpec, BlockSummaries, multi_axis_attention, summarize_blocks
from modeling_flashlite.measure.benchmark import (
    SPARSE_LENGTH,
    copy_bandwidth,
    draw_growth,
    faster_than,
    fit_growth,
    format_table,
    fresh_cost,
    kernel_seconds,
    peak_growth,
    race,
    summarize_race,
)
from modeling_flashlite.measure.parallel import measure_parallel
from modeling_flashlite.measure.peers import CTranslate2Bart, four_bit_linear, installed, make_models
from modeling_flashlite.measure.results import write_results
from modeling_flashlite.measure.scaling import Device, count_decoder_parameters, plan
from modeling_flashlite.quantization_flashlite import EcqConfig
from modeling_flashlite.training.calibration import quantize
from modeling_flashlite.training.distillation import KDLoss

HEADS, KEY_VALUE_HEADS, HEAD_DIM = 8, 2, 64
# unlimited memory: both sides see the whole past
SPEC = AxisSpec(block_size=64, sub_block_size=16, relevance_top_k=8, memory_blocks=None)
# 8192 tokens, which models with a bounded memory see: its time is linear in the length
WINDOW = dataclasses.replace(SPEC, memory_blocks=128)
OURS, DENSE, GROUPED = "multi-axis", "SDPA causal", "SDPA, group as rows"
FLEX, FLEX_LENGTHS = "FlexAttention causal, compiled", (4096, 16384)
OUR_MODEL, BART, T5GEMMA, LLAMA = "Flash-Lite", "BART", "T5Gemma", "Llama"
OUR_BFLOAT16 = f"{OUR_MODEL} bfloat16"
OUR_INT4 = "Flash-Lite int4"
# width, layers of each stack, heads, vocabulary: small enough to train here, and one of about 60 M parameters
TRAINER_LENGTH, TRAINER_STEPS = 512, 3
TRAINED, DECODED = (256, 4, 4, 8192), (512, 6, 8, 32000)
# tokens per training step at short lengths
STEP_TOKENS = 512
# 75 M parameters, which leave the cache; and next to none
CODED, SMALL = (1024, 8, 16, 16000), (64, 2, 4, 256)
PREFILL_TOKENS = 512
SOURCE_TOKENS, NEW_TOKENS, LONG_NEW_TOKENS = 32, 30, 8
# width, layers, heads and key-value heads of the models of the written plan
SCALED = {"1 B": (2048, 34, 16, 4), "7 B": (4096, 62, 32, 8)}
PACKAGES = ("ctranslate2", "torchao", "bitsandbytes")
# a causal model of this shape, of which one size at a time is varied
GROWN = {"width": 256, "batch": 1, "vocabulary": 8192, "length": 1024}
GROWTH = {
    "length": (1024, 2048, 4096, 8192, 16384),
    "width": (128, 256, 512),
    "batch": (1, 2, 4),
    "vocabulary": (8192, 16384, 32768),
}
LENGTHS = {
    "attention": (640, 1024, 2048, 4096, 16384),
    "prefill": (640, 1024, 2048, 4096, 16384, 65536),
    "decode": (4096, 16384, 65536),
    "train": (64, 512, 4096, 8192),
    "generate": (4096, 16384),
    "memory": (4096, 8192, 16384),
}
PARALLEL = (256, 4, 8, 8192)
# verbs whose costs are fitted and drawn over a size
GROWING = ("attention", "decode", "prefill", "train", "generate", "loss", "memory", "growth")


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


def windowed(q, k, v):
    return multi_axis_attention(q, k, v, WINDOW)


ATTENTIONS = {DENSE: sdpa, OURS: multi_axis}


def flex_attention(length: int):
    """FlexAttention with a causal block mask, compiled for this length when it is first called."""
    from torch.nn.attention import flex_attention as flex

    mask = flex.create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device="cpu")
    compiled = torch.compile(flex.flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def workload(args, function, length: int, work: str):
    """A function without arguments that does `work` of an attention over `length` tokens."""
    backward = work == "forward+backward"
    q, k, v = make_inputs(args, length, length, grad=backward)
    grad = torch.randn_like(q)
    if backward:
        return lambda: torch.autograd.grad(function(q, k, v), (q, k, v), grad)
    return torch.inference_mode()(lambda: function(q, k, v))


def whole_sequences(args, verb: str, work: str) -> list[dict]:
    rows = []
    for length in tqdm(args.lengths or LENGTHS[verb], desc=verb):
        functions = ATTENTIONS | ({f"{OURS}, 8k window": windowed} if length >= SPARSE_LENGTH else {})
        # on a CPU it has no backward, and its mask is made from all pairs of tokens
        if work == "forward" and args.device == "cpu" and length in FLEX_LENGTHS and shutil.which("c++"):
            functions[FLEX] = flex_attention(length)
        contenders = {name: workload(args, function, length, work) for name, function in functions.items()}
        # a round that takes many seconds is its own warm-up
        times = race(contenders, repeats=args.repeats, seconds=args.seconds if length < 16384 else 5)
        rows += summarize_race(times, [DENSE], work=work, length=length)
    return rows


def attention(args) -> list[dict]:
    """Forward with backward over whole sequences against dense causal attention."""
    return whole_sequences(args, "attention", "forward+backward")


def prefill(args) -> list[dict]:
    """Forward over whole sequences against dense causal attention."""
    return whole_sequences(args, "prefill", "forward")


@torch.inference_mode()
def decode(args) -> list[dict]:
    """One token over a preallocated cache; `SDPA, group as rows` reads each key once for its group of queries."""
    rows = []
    for length in tqdm(args.lengths or LENGTHS["decode"], desc="decode"):
        times = race(decode_contenders(args, length), repeats=4 * args.repeats, seconds=args.seconds)
        for peer in (DENSE, GROUPED):
            pair = {name: times[name] for name in (peer, OURS)}
            rows += summarize_race(pair, [peer], work="one token", length=length)
    return rows


def decode_contenders(args, length: int) -> dict:
    """Steps through the tokens of the block before `length`, over and over; its summaries are new at its first."""
    q, k, v = make_inputs(args, 1, length)
    b = SPEC.block_size
    whole = summarize_blocks(k[:, :, : length - b], v[:, :, : length - b], SPEC)
    grouped = q.view(1, KEY_VALUE_HEADS, HEADS // KEY_VALUE_HEADS, HEAD_DIM)
    pasts = [(start, k[:, :, : start + 1], v[:, :, : start + 1]) for start in range(length - b, length)]

    def stepper(step):
        places = itertools.cycle(pasts)
        return lambda: step(*next(places))

    def ours(start, keys, values):
        nonlocal summaries
        if start % b == 0:
            summaries = BlockSummaries(*whole)
        return multi_axis_attention(q, keys, values, SPEC, start=start, summaries=summaries)

    summaries = whole
    return {
        DENSE: stepper(lambda _, keys, values: F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)),
        GROUPED: stepper(lambda _, keys, values: F.scaled_dot_product_attention(grouped, keys, values)),
        OURS: stepper(ours),
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
    return rows


def random_tokens(args, batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """Ordinary tokens [batch, length]; the first ids have meanings."""
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(4, vocabulary, (batch, length), generator=generator).to(args.device)


def train(args) -> list[dict]:
    """A training step, forward and backward, of whole models: `length` source and target tokens, or causal ones."""
    rows = []
    kinds = ("sequence to sequence", [BART, T5GEMMA]), ("causal", [LLAMA])
    for kind, peers in kinds:
        shape = args.shape or TRAINED
        models = make_models([*peers, OUR_MODEL], shape)
        for length in tqdm(args.lengths or LENGTHS["train"], desc=f"train, {kind}"):
            if BART in peers and length > STEP_TOKENS:
                continue
            ids = random_tokens(args, max(STEP_TOKENS // length, 1), length, shape[-1])
            contenders = {name: training_step(model.to(args.device), ids) for name, model in models.items()}
            times = race(contenders, repeats=args.repeats, seconds=min(args.seconds, 10.0))
            rows += summarize_race(times, peers, work=f"training step, {kind}", length=length, batch=ids.shape[0])
            if length == TRAINER_LENGTH or args.shape:
                rows += under_trainer(args, models, peers, ids, kind)
    return rows


def under_trainer(args, models: dict, peers: list[str], ids: torch.Tensor, kind: str) -> list[dict]:
    """The same models under the same `Trainer`, optimizer and data loading included."""
    rows = Dataset.from_dict({"input_ids": ids.tolist() * TRAINER_STEPS, "labels": ids.tolist() * TRAINER_STEPS})
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=TRAINER_STEPS,
            per_device_train_batch_size=ids.shape[0],
            learning_rate=1e-5,
            use_cpu=args.device == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=args.seed,
        )
        contenders = {name: Trainer(model, settings, train_dataset=rows).train for name, model in models.items()}
        times = race(contenders, repeats=args.repeats, seconds=min(args.seconds, 10.0))
    work = {"work": f"{TRAINER_STEPS} steps under the Trainer, {kind}", "length": ids.shape[1], "batch": ids.shape[0]}
    fresh = summarize_race(times, peers, **work)
    return [{**row, "tokens_per_s": round(1e3 * ids.numel() * TRAINER_STEPS / row["ms"])} for row in fresh]


def training_step(model, ids):
    model.train()

    def step():
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


@torch.inference_mode()
def generate(args) -> list[dict]:
    """Greedy decoding of whole models: short answers to short sources, and a long context continued."""
    rows, peers, shape = [], [BART, T5GEMMA], args.shape or DECODED
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
        ids = random_tokens(args, batch, SOURCE_TOKENS, shape[-1])
        contenders = {name: greedy(model.to(args.device).eval(), ids) for name, model in models.items()}
        contenders |= {name: functools.partial(other.greedy, ids, NEW_TOKENS) for name, other in others.items()}
        times = race(contenders, repeats=args.repeats, seconds=args.seconds)
        work = {"work": f"{NEW_TOKENS} tokens, sequence to sequence", "length": SOURCE_TOKENS, "batch": batch}
        fresh = summarize_race(times, peers, **work)
        for other in others:
            than = faster_than(times, other)
            for row in fresh:
                row[f"than_{other.replace(' ', '_')}"] = than[row["name"]]
        for row in fresh:
            if row["name"] in (OUR_MODEL, OUR_BFLOAT16, OUR_INT4) and args.device == "cpu":
                row |= where_time_goes(models[row["name"]], contenders[row["name"]], row["ms"] / 1e3, bandwidth)
        rows += fresh
    models = make_models([LLAMA, OUR_MODEL], shape)
    for length in args.lengths or LENGTHS["generate"]:
        contenders = {name: continuation(args, model.to(args.device).eval(), length) for name, model in models.items()}
        times = race(contenders, repeats=args.repeats, seconds=args.seconds)
        rows += summarize_race(times, [LLAMA], work=f"{LONG_NEW_TOKENS} tokens, causal", length=length, batch=1)
    return rows


def where_time_goes(model, run, seconds: float, bandwidth: float) -> dict:
    """What is not in the model's kernels per token, and how near the decoder's bytes come to the rate of a copy."""
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


def greedy(model, ids, **kwargs):
    """Exactly so many new tokens, whatever the random weights would end with."""
    # a minimum length would do that too, at the price of a search through the vocabulary for every token
    model.generation_config.eos_token_id = None
    count = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1, **kwargs}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **count)


def continuation(args, model, length: int):
    """Greedy decoding on a context of `length` tokens, whose cache holds random states: their values cost nothing."""
    config = model.config.get_text_config(decoder=True)
    cache = FlashLiteCache(config) if isinstance(model, FlashLiteForCausalLM) else DynamicCache(config=config)
    prompt = random_tokens(args, 1, 2, config.vocab_size)
    model(prompt, past_key_values=cache)
    for index, layer in enumerate(list(cache.layers)):
        keys = layer._keys if isinstance(cache, FlashLiteCache) else layer.keys
        widths = keys.shape[3], layer.values.shape[3]
        cache.update(*(torch.randn(1, keys.shape[1], length - 3, width).to(keys) for width in widths), index)
    ids = random_tokens(args, 1, length, config.vocab_size)
    new = LONG_NEW_TOKENS
    run = greedy(model, ids, max_new_tokens=new, past_key_values=cache)

    def step():
        run()
        cache.crop(length - 1 - cache.get_seq_length())

    return step


def loss_step(seed: int, vocabulary: int, name: str):
    """Forward and backward of a distillation loss over 2048 tokens: with all logits at once, or chunk by chunk."""
    torch.manual_seed(seed)
    tokens, width, kept = 2048, 256, 64
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    head = torch.nn.Linear(width, vocabulary, bias=False)
    labels = torch.randint(vocabulary, (1, tokens))
    ids = torch.randint(vocabulary, (1, tokens, kept)).sort(-1).values
    teacher = {"teacher_ids": ids, "teacher_weights": torch.rand(1, tokens, kept).softmax(-1) * 0.9}
    loss = KDLoss("forward", temperature=1.0)

    def step():
        hidden.grad = head.weight.grad = None
        logits = head(hidden) if name == "dense" else None
        loss(hidden, head, labels, logits=logits, **teacher).backward()

    return step


def loss(args) -> list[dict]:
    """Distillation loss from cached teacher columns, chunked against dense: time, and memory beyond the inputs."""
    rows = []
    for vocabulary in (32000, 128000):
        steps = {name: loss_step(args.seed, vocabulary, name) for name in ("dense", "chunked")}
        times = race(steps, repeats=args.repeats, seconds=args.seconds, name=f"loss {vocabulary}")
        for row in summarize_race(times, ["dense"], vocabulary=vocabulary, tokens=2048):
            growth = peak_growth(loss_step, args.seed, vocabulary, row["name"])
            rows.append({**row, "MiB": round(growth / 2**20, 1)})
    return rows


def without_onednn(run):
    """`run` with the float32 products that PyTorch makes by itself (see `linear_flashlite`)."""

    def plain():
        with torch.backends.mkldnn.flags(enabled=False):
            return run()

    return plain


def coded_shape(seed: int, shape) -> FlashLiteForCausalLM:
    """A decoder with random weights in float32."""
    width, layers, heads, vocabulary = shape
    torch.manual_seed(seed)
    config = FlashLiteConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        is_encoder_decoder=False,
    )
    return FlashLiteForCausalLM(config).eval()


@torch.inference_mode()
def quant(args) -> list[dict]:
    """A decoder of 75 M parameters with 4-bit codes against itself in bfloat16 and float32: decoding and prefill."""
    shape = args.shape or CODED
    plain = coded_shape(args.seed, shape).to(args.device)
    models = {"float32": plain, "bfloat16": copy.deepcopy(plain).bfloat16()}
    coded = quantize(copy.deepcopy(plain), EcqConfig())
    models |= {"int4, float32 states": coded, "int4": copy.deepcopy(coded).to(torch.bfloat16)}
    prompt, context = (random_tokens(args, 1, length, shape[-1]) for length in (SOURCE_TOKENS, PREFILL_TOKENS))
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


def linear_layers(args, plain, coded) -> list[dict]:
    """One layer of these models in 4 bits by us and by others, against itself in bfloat16."""
    layers = [model.get_decoder().layers[0].mlp.gate_proj for model in (plain, coded)]
    contenders = {"bfloat16": copy.deepcopy(layers[0]).bfloat16(), "int4": layers[1]}
    for package in ("torchao", "bitsandbytes"):
        if package in args.found:
            contenders[f"{package} 4-bit"] = four_bit_linear(package, layers[0], torch.bfloat16)
    rows, width = [], layers[0].in_features
    for count in (1, PREFILL_TOKENS):
        x = torch.randn(count, width, generator=torch.Generator().manual_seed(args.seed)).bfloat16()
        calls = {name: functools.partial(layer, x) for name, layer in contenders.items()}
        times = race(calls, repeats=args.repeats, seconds=min(args.seconds, 15.0), name="linear layers")
        for row in summarize_race(times, ["bfloat16"], work=f"linear {width}x{layers[0].out_features}", length=count):
            for package in ("torchao", "bitsandbytes"):
                if package in args.found:
                    row[f"than_{package}"] = faster_than(times, f"{package} 4-bit")[row["name"]]
            rows.append(row)
    return rows


LOAD, TOKEN, PLAIN_FLOAT32 = "load", "load, 1 token", "float32, PyTorch's products"
IMPORT = """
import time
from transformers import AutoModel, GenerationMixin, PreTrainedModel, pipeline
begin = time.perf_counter()
import modeling_flashlite
print(time.perf_counter() - begin)
"""


def loading(folder: str, work: str):
    """Load a model, and for `TOKEN` compute one, after a small one has made the process import what every load needs.

    The token counts because a float model is only mapped into memory when it is loaded, and read when it is used.
    """

    @torch.inference_mode()
    def run(folder):
        model = FlashLiteForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        return model(torch.tensor([[4]])) if work == TOKEN else model

    run(Path(folder).parent / "small")
    return lambda: run(folder)


def load(args) -> list[dict]:
    """Load a decoder of 75 M parameters, coded or as bfloat16, from a warm cache, each time in a fresh process.

    And import the package, after what any model and pipeline of transformers imports.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        quantize(coded_shape(args.seed, SMALL), EcqConfig()).save_pretrained(f"{folder}/small")
        model = coded_shape(args.seed, args.shape or CODED).bfloat16()
        model.save_pretrained(f"{folder}/bfloat16")
        held = {"bfloat16": model.get_memory_footprint()}
        model = quantize(model, EcqConfig())
        model.save_pretrained(f"{folder}/coded")
        held["coded"] = model.get_memory_footprint()
        sides = [(work, name) for work in (LOAD, TOKEN) for name in held]
        costs = {side: [] for side in sides}
        for _ in tqdm(range(min(args.repeats, 5)), desc="load", leave=False):
            for work, name in sides:
                costs[work, name].append(fresh_cost(loading, f"{folder}/{name}", work))
        for work in (LOAD, TOKEN):
            times = {name: [seconds for _, seconds in costs[work, name]] for name in held}
            for row in summarize_race(times, ["bfloat16"], work=work):
                name = row["name"]
                peak = statistics.median(growth for growth, _ in costs[work, name])
                file = sum(path.stat().st_size for path in Path(folder, name).glob("*.safetensors"))
                sizes = {"file_MiB": file, "held_MiB": held[name], "peak_MiB": peak}
                rows.append({**row, **{key: round(size / 2**20, 1) for key, size in sizes.items()}})
                rows[-1]["peak_over_held"] = round(peak / held[name], 2)
    times = [float(subprocess.check_output([sys.executable, "-c", IMPORT])) for _ in range(args.repeats)]
    return rows + summarize_race({"modeling_flashlite": times}, ["modeling_flashlite"], work="import")


def grown_step(seed: int, sizes: dict):
    """A training step of a causal model of two layers with `sizes`."""
    model = coded_shape(seed, (sizes["width"], 2, 4, sizes["vocabulary"]))
    args = argparse.Namespace(seed=seed, device="cpu")
    return training_step(model, random_tokens(args, sizes["batch"], sizes["length"], sizes["vocabulary"]))


def growth(args) -> list[dict]:
    """Time and memory of a training step against length, width, batch and vocabulary, one varied at a time."""
    rows, known = [], {}
    base = {**GROWN, **({"width": args.shape[0], "length": 64, "vocabulary": args.shape[-1]} if args.shape else {})}
    for varied, values in GROWTH.items():
        for value in tqdm([base[varied], 2 * base[varied]] if args.shape else values, desc=f"growth, {varied}"):
            sizes = {**base, varied: value}
            key = tuple(sizes.values())
            if key not in known:
                times = race({OUR_MODEL: grown_step(args.seed, sizes)}, repeats=args.repeats, seconds=10.0)
                (row,) = summarize_race(times, [OUR_MODEL])
                known[key] = {column: row[column] for column in ("name", "ms", "spread_ms", "rounds")}
                known[key]["MiB"] = round(peak_growth(grown_step, args.seed, sizes) / 2**20, 1)
            rows.append({"work": f"training step over {varied}", "varied": varied, **sizes, **known[key]})
    return rows


def parallel(args) -> list[dict]:
    """A training step on two gloo processes by DDP, FSDP2 and tensor parallelism: time, and traffic against theory."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        coded_shape(args.seed, args.shape or PARALLEL).save_pretrained(folder)
        for kind, name in (("ddp", "DDP"), ("fsdp", "FSDP2"), ("tp", "TP")):
            rows.append({"work": "training step, 2 processes", "name": name, **measure_parallel(kind, folder)})
    return rows


def scale(args) -> list[dict]:
    """The written plan: memory and time per device of training 1 B and 7 B, by formula, nothing measured."""
    rows = []
    for name, (width, layers, heads, kv_heads) in SCALED.items():
        config = FlashLiteConfig(
            vocab_size=32000,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            is_encoder_decoder=False,
        )
        parameters = count_decoder_parameters(config)
        for devices in (8, 64, 256, 1024):
            tokens = 16384 if devices < 1024 else 8192
            costs = plan(config, devices, tokens=tokens, length=4096)
            rows.append({"name": name, "parameters": parameters, "tokens_per_device": tokens, **costs})
    return rows


VERBS = {
    "attention": attention,
    "decode": decode,
    "prefill": prefill,
    "train": train,
    "generate": generate,
    "loss": loss,
    "quant": quant,
    "load": load,
    "memory": memory,
    "growth": growth,
    "parallel": parallel,
    "scale": scale,
}


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verbs", nargs="+", choices=VERBS, help="what to measure")
    parser.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], help="tokens, a,b,c")
    parser.add_argument("--peers", default=",".join(PACKAGES), help="packages to race against, where installed")
    parser.add_argument(
        "--shape",
        type=lambda text: tuple(int(part) for part in text.split(",")),
        help="width,layers,heads,vocabulary of the models, for a quick look; results of it are no records",
    )
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
    # the C library hands memory back after every call until one large piece was freed, as any program with a model has
    torch.empty(2**22)
    args.found, skipped = installed(filter(None, args.peers.split(",")))
    for peer in skipped if {"generate", "quant"} & set(args.verbs) else ():
        print(f"{peer} is not installed and is left out; pip install 'flashlite[bench]' brings it.")
    files = {}
    for verb in args.verbs:
        rows = VERBS[verb](args)
        path = args.output / ("scaling.json" if verb == "scale" else f"bench-{verb}.json")
        settings = {name: value for name, value in vars(args).items() if name not in ("verbs", "output", "found")}
        fields = {"rows": rows}
        if verb == "scale":
            fields["assumptions"] = vars(Device())
        else:
            settings |= {"heads": HEADS, "key_value_heads": KEY_VALUE_HEADS, "head_dim": HEAD_DIM, "axes": vars(SPEC)}
        if verb in ("generate", "quant"):
            fields |= {"peers": {name: metadata.version(name) for name in args.found}, "skipped": skipped}
        if verb in GROWING:
            fields["growth"] = fit_growth(rows)
        write_results(path, {}, task=f"bench {verb}", config=settings, seed=args.seed, **fields)
        if verb in GROWING:
            draw_growth(rows, path.with_suffix(""))
            print(f"\n{verb}, growth\n{format_table(fields['growth'])}")
        files[verb] = path.as_posix()
        print(f"\n{verb}\n{format_table(rows)}")
    print(json.dumps({"results": files}))


if __name__ == "__main__":
    main()
