"""Rewrite the tables in README.md from results files.

python scripts/studies/readme_table.py
python scripts/studies/readme_table.py --check
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from modeling_flashlite.cli import start

ROOT = Path(__file__).resolve().parents[2]
# what each checkpoint is judged by: key of its metrics, and its name in the table
HEADLINES = {
    "translation": ("bleu", "BLEU"),
    "text-generation": ("word_perplexity", "word perplexity"),
    "classification": ("accuracy", "accuracy"),
    "extractive-qa": ("f1", "F1"),
    "abstractive-qa": ("f1", "F1"),
    "summarization": ("rougeL", "ROUGE-L"),
    "chat": ("bleu", "BLEU"),
}
# folders of results files in the order of the table, and of those that a sentence below it names
CHECKPOINTS, OTHERS = ("en_de", "lm"), ("trec", "sst2", "squad", "dialogsum", "sgd")
OURS, INT4, PAIRS = "multi-axis", "Flash-Lite int4", "30 tokens, sequence to sequence"
FLOATS = ("times_faster", "than_float32", "than_plain_float32")
# lines of the table of speed: words, peer, and for each number a file, what its row is and which column counts
SPEEDS = (
    (
        "attention of a token after 4k / 16k / 64k",
        "SDPA",
        [("decode", {"name": OURS, "peer": "SDPA causal", "length": n}, "times_faster") for n in (4096, 16384, 65536)],
    ),
    (
        "attention forward, 4k / 16k / 64k tokens",
        "causal SDPA",
        [("prefill", {"name": OURS, "length": n}, "times_faster") for n in (4096, 16384, 65536)],
    ),
    (
        "attention forward and backward, 4k / 16k",
        "causal SDPA",
        [("attention", {"name": OURS, "length": n}, "times_faster") for n in (4096, 16384)],
    ),
    (
        "30 tokens by 60 M parameters, 4 bits, batch 1 / 32",
        "BART, T5Gemma, float32",
        [("generate", {"name": INT4, "work": PAIRS, "batch": n}, "times_faster") for n in (1, 32)],
    ),
    (
        "the same",
        "CTranslate2 int8",
        [("generate", {"name": INT4, "work": PAIRS, "batch": n}, "than_CTranslate2_int8") for n in (1, 32)],
    ),
    (
        "30 tokens by 75 M parameters, 4 bits",
        "itself in bfloat16 / float32 / float32 by PyTorch's own choice of library",
        [("quant", {"name": "int4", "work": "30 tokens"}, column) for column in FLOATS],
    ),
    (
        "loading the file and one token",
        "itself in bfloat16",
        [("load", {"name": "coded", "work": "load, 1 token"}, "times_faster")],
    ),
)


FILES = tuple(dict.fromkeys(name for _, _, numbers in SPEEDS for name, _, _ in numbers))


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a Markdown table; all columns except the first are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def sizes(parameters: int, bits_per_weight: float, weight_bytes: int) -> list[str]:
    """The cells of a model's size."""
    return [f"{parameters / 1e6:.2f} M", f"{bits_per_weight:.2f}", f"{weight_bytes / 1e6:.2f} MB"]


def render_real(folder: Path) -> str:
    """A model that people have: its budgets, what sparse attention costs, its tasks, and the stages of the demo."""
    folder = folder / "smollm2"
    path = folder / "demo.json"
    lines = [*compressed(folder), attention_cost(folder), compiled_speed(folder), "", *adapted(folder)]
    return "\n".join(lines + (demo_stages(path) if path.is_file() else []))


def attention_cost(folder: Path) -> str:
    """What sparse attention costs the model that was not trained with it, in a sentence."""
    names = "books_8192_dense", "books_8192_block8_sub2", "retrieval_4096_dense", "retrieval_4096_sparse"
    metrics = [json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["metrics"] for name in names]
    dense, sparse = (each["perplexity 1-8192"] for each in metrics[:2])
    of, finds = (each["passkey 4096"] + each["needle 4096"] for each in metrics[2:])
    return (
        f"Sparse attention reads 9% of the keys of 8,192 tokens in full: perplexity of two novels {sparse:.2f} as "
        f"converted ({sparse / dense - 1:+.1%} over full attention), by `scripts/studies/long_text.py`. Of the pass "
        f"keys and needles that full attention finds in 4,096 tokens it finds {finds / of:.0%}. All results are in "
        "`model_cards/results/smollm2/`, of weights dequantized from Q4_1."
    )


# works and lengths of native.json, and rows of server_native.json, that README names
DEPTHS = ("decode", 1), ("decode", 512), ("prefill", 512)
CHATS = "1 chat", "16 chats"

# how a point of a results file was made, in words: method, file, words with the target in them
POINTS = (
    ("calibrated", "compression_chat", "`quantize.py --target_bits {:g}`"),
    ("trained", "compression_qat", "the same after a little training, `--method qat --target_bits {:g}`"),
    ("data-free", "compression_data_free", "without data, in `from_pretrained`"),
)


def compressed(folder: Path) -> list[str]:
    """Lines of a table of the budgets of SmolLM2-135M-Instruct."""
    rows = []
    for method, name, words in POINTS:
        points = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["points"]
        for point in points:
            if point["method"] == "float" and not rows:
                rows.append(["float32", "", "", f"{point['perplexity']:.2f}", "", f"{point['right']} of 10"])
            elif point["method"] == method:
                size = f"{point['bits']:.2f}", f"{point['bytes'] / 1e6:.1f} MB"
                right = f"{point['right']} of 10" if "right" in point else ""
                quality = f"{point['perplexity']:.2f}", f"{point['increase']:+.1%}", right
                rows.append([words.format(point["target"]), *size, *quality])
    return [
        *table(["SmolLM2-135M-Instruct", "bits per weight", "file", "WikiText-2", "over float32", "questions"], rows),
        "",
        "Perplexity per token of the first 400 lines; ten questions that the float model answers; calibrated on text "
        "and on conversations that the model writes itself (`scripts/studies/compression.py`). Files of llama.cpp, "
        f"measured alike (`rates.svg`): {gguf_files(folder)}.",
    ]


def gguf_files(folder: Path) -> str:
    """Perplexity and size of GGUF files of the same model, in words."""
    points = json.loads((folder / "compression_gguf.json").read_text(encoding="utf-8"))["points"]
    files = [point for point in points if point["method"].startswith("GGUF")]
    return ", ".join(
        f"{point['method'].removeprefix('GGUF ')} {point['perplexity']:.2f} at {point['bits']:.2f} bits"
        for point in sorted(files, key=lambda point: point["bits"])
    )


def compiled_speed(folder: Path) -> str:
    """What the compiled path makes of the model at 3 bits, beside llama.cpp and bfloat16, in a sentence."""
    rows = json.loads((folder / "native.json").read_text(encoding="utf-8"))["rows"]
    speed = {(row["work"], row["length"], row["threads"], row["name"]): row["tokens_per_s"] for row in rows}

    def side(name: str) -> str:
        new, later, prompt = (speed[work, length, 1, name] for work, length in DEPTHS)
        return f"{new:.0f} / {later:.0f} / {prompt:.0f}"

    result = json.loads((folder / "server_native.json").read_text(encoding="utf-8"))
    one, many = (next(row["median"] for row in result["rows"] if row["work"] == chats) for chats in CHATS)
    return (
        f"Compiled (`--native`), one thread, tokens/s: {side('Flash-Lite, coded, native')} generated from scratch / "
        f"generated after 512 tokens / read, a prompt of 512; llama.cpp with Q4_0: {side('llama.cpp')}; in bfloat16: "
        f"{side('Flash-Lite, bfloat16')}. `serve.py --native` on two threads: one chat {one:.0f}, 16 chats {many:.0f} "
        "(`native.json`, `server_native.json`)."
    )


def adapted(folder: Path) -> list[str]:
    """Lines of a table of the tasks that SmolLM2-135M-Instruct was adapted to, before and after quantization."""
    rows = []
    for path in sorted(folder.glob("tasks_*.json")):
        if path.stem.endswith("_3bits"):
            continue
        runs = [path, path.with_name(f"{path.stem}_3bits.json")]
        runs = [json.loads(found.read_text(encoding="utf-8")) for found in runs if found.is_file()]
        metric, name = HEADLINES[runs[0]["task"]]
        cells = []
        for run in runs:
            low, high = run["intervals"][metric]
            cells.append(f"{run['metrics'][metric]:.1f} ({low:.1f} to {high:.1f})")
        share = [f"{run['metrics'][metric] / runs[0]['metrics'][metric]:.3f}" for run in runs[1:]]
        rows.append([f"{runs[0]['dataset']}, {name}", *cells, *(share or ["", ""])])
    return [
        *table(["SmolLM2-135M-Instruct after training", "float", "at 3 bits", "of float"], rows),
        "",
        "One training seed, 95% bootstrap intervals; LoRA, WikiText-103 all weights; recipes `*_smol.yaml`, "
        "measured by `scripts/evaluate.py`.",
    ]


def demo_stages(path: Path) -> list[str]:
    """Lines of a table of the demo's stages, and what the finished model answers."""
    demo = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        [
            row["stage"],
            *sizes(row["parameters"], row["bits_per_weight"], row["file_bytes"]),
            *(f"{row[name]:.1f}" for name in ("perplexity", "task_perplexity", "tokens_per_second")),
        ]
        for row in demo["stages"]
    ]
    chat, answer = demo["chat"], " ".join(demo["chat"]["answer"].split())
    header = ["stage", "parameters", "bits per weight", "weights on disk", "perplexity", "on the task", "tokens/s"]
    return [
        "",
        *table(header, rows),
        "",
        f"`scripts/demo.py` in {demo['metrics']['seconds']:.0f} s on {demo['hardware']}; perplexity of Python "
        f"documentation, and of answers about it, which the adapters learn. *{chat['question']}* *{answer}*",
    ]


def scores(folder: Path, names: tuple[str, ...]) -> list[tuple[Path, dict, str]]:
    """Each results file of the folders `names`, its content, and its headline with the interval."""
    found = []
    for path in (path for name in names for path in sorted((folder / name).glob("[0-9]_*.json"))):
        result = json.loads(path.read_text(encoding="utf-8"))
        metric, name = HEADLINES[result["task"]]
        low, high = result["intervals"][metric]
        found.append((path, result, f"{name} {result['metrics'][metric]:.2f} ({low:.2f} to {high:.2f})"))
    return found


def render_checkpoints(folder: Path) -> str:
    """The trained models, stage by stage, from `en_de/1_teacher.json`, `lm/1_trained.json` and similar files."""
    rows = []
    for path, result, score in scores(folder, CHECKPOINTS):
        rows.append(
            [
                f"{result['dataset']}, {path.stem.partition('_')[2].replace('_', ' ')}",
                *sizes(*(result["size"][key] for key in ("parameters", "bits_per_weight", "weight_bytes"))),
                score,
            ]
        )
    lines = table(["data, stage", "parameters", "bits per weight", "weights on disk", "test score"], rows)
    lines += [
        "",
        "95% bootstrap intervals; one training seed, two CPU cores; `model_cards/results/`, written by "
        "`scripts/evaluate.py`.",
    ]
    others = [f"{result['dataset']} {score}" for _, result, score in scores(folder, OTHERS)]
    if others:
        lines.append(f"Small models trained from scratch in minutes on one core: {'; '.join(others)}.")
    lines.append(render_peers(folder))
    return "\n".join(lines)


def render_peers(folder: Path) -> str:
    """Scores of models of equal size, data, steps and schedule, and the speed of Flash-Lite relative to the peers."""
    results = json.loads((folder / "peers.json").read_text(encoding="utf-8"))
    key, name = HEADLINES[results["task"]]
    best = [row for row in results["points"] if row["best"]]
    ours, *peers = (row["method"] for row in best)
    ms = {(row["work"], row["name"]): row["ms"] for row in results["race"]}
    times = []
    for work in dict.fromkeys(work for work, _ in ms):
        ratios = (f"{ms[work, peer] / ms[work, ours]:.2f}" for peer in peers)
        times.append(f"{' / '.join(ratios)} ({work})")
    scores = ", ".join(f"{row['method']} {row[key]:.1f}" for row in best)
    return (
        f"Trained alike for {results['config']['num_train_epochs']:.0f} epochs on {results['dataset']}, with "
        f"{best[0]['parameters'] / 1e6:.1f} M parameters each, {name}: {scores}; speed of {ours} relative to "
        f"{' / '.join(peers)}: {', '.join(times)} (`peers.json`, "
        "`scripts/studies/compare_models.py`)."
    )


def render_speed(folder: Path) -> str:
    """Speed relative to the peers, including where Flash-Lite is slower."""
    results = {name: json.loads((folder / f"bench-{name}.json").read_text(encoding="utf-8")) for name in FILES}
    rows = []
    for words, peer, numbers in SPEEDS:
        cells = []
        for name, wanted, column in numbers:
            (row,) = [row for row in results[name]["rows"] if wanted.items() <= row.items() and column in row]
            cells.append(f"{row[column]:.2g}" if row[column] < 10 else f"{row[column]:.0f}")
        rows.append([words, peer, " / ".join(cells)])
    lines = table(["work", "against", "speedup"], rows)
    threads = sorted({results[name]["hardware"] for name in FILES})
    lines += ["", f"{'; '.join(threads)}; `model_cards/results/bench-*.json`, by `scripts/bench.py`."]
    return "\n".join(lines)


def render_scale(folder: Path) -> str:
    """The training plan of larger models, by the formulas of `modeling_flashlite/measure/scaling.py`."""
    results = json.loads((folder / "scaling.json").read_text(encoding="utf-8"))
    rows = [
        [
            row["name"],
            f"{row['devices']:,}",
            f"{row['memory_GB']:.1f}",
            f"{row['sent_GB']:.1f}",
            f"{row['compute_s']:.2f}",
            f"{row['communication_s']:.2f}",
            f"{row['tokens_per_s'] / 1e6:.2f} M",
            f"{row['days']:.2f}",
        ]
        for row in results["rows"]
        if row["devices"] in (8, 1024)
    ]
    header = ["parameters", "GPUs", "GB each", "GB sent each", "compute, s", "network, s", "tokens/s", "days for 20 P"]
    device = results["assumptions"]
    lines = table(header, rows)
    lines += [
        "",
        f"Per step, FSDP2 with checkpointing, texts of 4096 tokens; assumed: {device['flops'] / 1e12:.0f} TFLOP/s at "
        f"{device['utilisation']:.0%}, {device['inside'] / 1e9:.0f} GB/s inside nodes of {device['node']}, "
        f"{device['outside'] / 1e9:.0f} GB/s between; `model_cards/results/scaling.json`, by `scripts/bench.py "
        "scale`.",
    ]
    return "\n".join(lines)


# section of README: who renders it
SECTIONS = {
    "real model": render_real,
    "results": render_checkpoints,
    "speed": render_speed,
    "scale": render_scale,
}


def rewrite(text: str, results: Path) -> str:
    """README with every generated section replaced.

    Raises:
        ValueError: README lacks the marker lines of a section.
    """
    for name, render in SECTIONS.items():
        start, end = f"<!-- {name}: made by scripts/studies/readme_table.py -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(start)
        _, closed, after = rest.partition(end)
        if not found or not closed:
            raise ValueError(f"README has no lines {start!r} and {end!r} to write between; put them back.")
        text = f"{before}{start}\n{render(results)}\n{end}{after}"
    return text


@dataclass
class TableArgs:
    results: str = field(default=str(ROOT / "model_cards/results"), metadata={"help": "folder of results files"})
    readme: str = field(default=str(ROOT / "README.md"), metadata={"help": "the file that is rewritten"})
    check: bool = field(default=False, metadata={"help": "only compare; exit 1 if README differs"})


def main(args: TableArgs) -> int:
    readme = Path(args.readme)
    text = readme.read_text(encoding="utf-8")
    new = rewrite(text, Path(args.results))
    if args.check:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    start(main, (TableArgs,), __doc__)
