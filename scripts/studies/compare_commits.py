"""Decoding by another checkout of this package and by this one, in turns: milliseconds per token of the same work.

git worktree add ../before 7bad42a
python scripts/studies/compare_commits.py --before ../before --rounds 7 --threads 2

Every round runs each side in a process of its own, so that both meet the same noise of the machine. With one thread,
processor time is taken, which other programs disturb less.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from modeling_flashlite.cli import finish, start
from modeling_flashlite.measure.benchmark import cpu_features, format_table
from modeling_flashlite.measure.results import git_commit, write_results

ROOT = Path(__file__).resolve().parents[2]
# what both sides run; only names that both have
CHILD = """
import copy, json, sys, time
import torch
from modeling_flashlite import EcqConfig, FlashLiteCache, FlashLiteConfig, FlashLiteForCausalLM, quantize
from modeling_flashlite.attention_flashlite import AxisSpec, summarize_blocks

torch.set_num_threads(int(sys.argv[1]))
clock = time.process_time if sys.argv[1] == "1" else time.perf_counter
torch.manual_seed(0)
width, layers, heads, vocabulary = json.loads(sys.argv[2])
names = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
model = FlashLiteForCausalLM(FlashLiteConfig(**names, is_encoder_decoder=False)).eval()
model.generation_config.eos_token_id = None
bfloat16 = copy.deepcopy(model).bfloat16()
models = {"float32": model, "bfloat16": bfloat16, "int4": quantize(copy.deepcopy(bfloat16), EcqConfig())}
found = {}
with torch.inference_mode():
    for name, model in models.items():
        for length in (32, 4096):
            cache = FlashLiteCache(model.config)
            ids = torch.randint(4, vocabulary, (1, length))
            model(ids[:, :1], past_key_values=cache)
            for index, layer in enumerate(list(cache.layers)):
                shapes = ((1, layer._keys.shape[1], length - 2, x.shape[3]) for x in (layer._keys, layer._values))
                cache.update(*(torch.randn(shape).to(layer._keys.dtype) for shape in shapes), index)
            taken = []
            for new in (4, 24, 24):
                settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
                begin = clock()
                model.generate(ids, past_key_values=cache, **settings)
                taken.append((clock() - begin) / new)
                cache.crop(length - 1 - cache.get_seq_length())
            found[f"generate, {name}, after {length}"] = min(taken[1:])
print(json.dumps(found))
"""


@dataclass
class CompareArgs:
    before: str = field(metadata={"help": "directory of the other checkout"})
    rounds: int = field(default=7, metadata={"help": "processes of each side"})
    threads: int = field(default=2, metadata={"help": "threads of PyTorch"})
    shape: list[int] = field(
        default_factory=lambda: [512, 6, 8, 32000], metadata={"help": "width, layers, heads, vocabulary"}
    )
    output: str = field(default="model_cards/results/decode_before_after.json", metadata={"help": "results file"})


def run_side(folder: Path, args: CompareArgs) -> dict[str, float]:
    """Seconds per token of each workload, by the package in `folder`."""
    command = [sys.executable, "-c", CHILD, str(args.threads), json.dumps(args.shape)]
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The side in {folder} failed: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.splitlines()[-1])


def commit_of(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main(args: CompareArgs) -> dict:
    sides = {"before": Path(args.before).resolve(), "now": ROOT}
    times: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
    for _ in tqdm(range(args.rounds), desc="rounds"):
        for side, folder in sides.items():
            for work, seconds in run_side(folder, args).items():
                times[side].setdefault(work, []).append(seconds)
    rows = []
    for work, before in times["before"].items():
        now = times["now"][work]
        ratio = statistics.median(b / n for b, n in zip(before, now))
        ms = {side: round(1e3 * statistics.median(times[side][work]), 2) for side in sides}
        spread = {f"{side}_spread": [round(1e3 * pick(times[side][work]), 2) for pick in (min, max)] for side in sides}
        rows.append({"work": work, **ms, **spread, "times_faster": round(ratio, 3), "rounds": len(now)})
    commits = {"before": commit_of(sides["before"]), "now": git_commit()}
    write_results(
        args.output,
        {row["work"]: row["times_faster"] for row in rows},
        task="decoding before and after",
        config={name: value for name, value in asdict(args).items() if name not in ("before", "output")},
        seed=0,
        rows=rows,
        commits=commits,
        cpu_features=cpu_features(),
    )
    print(format_table(rows))
    return finish({"results": args.output})


if __name__ == "__main__":
    start(main, (CompareArgs,), __doc__)
