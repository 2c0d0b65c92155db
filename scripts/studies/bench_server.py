"""The worker of serve.py: tokens per second of 1 and of several chats at once, and a short request beside a long one.

python scripts/bench.py server --model runs/smollm2-3bits --threads 2
"""

import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

import modeling_flashlite
from modeling_flashlite.checkpoint import CheckpointArgs
from modeling_flashlite.cli import finish, start
from modeling_flashlite.measure.benchmark import cpu_features, format_table
from modeling_flashlite.measure.study import write_bench
from modeling_flashlite.measure.workloads import random_tokens
from modeling_flashlite.serve.engine import Engine
from modeling_flashlite.serve.jobs import Job, Limits, Settings


@dataclass
class ServerArgs:
    model: str = field(metadata={"help": "folder or Hub id of a decoder-only model"})
    dtype: str = field(default="bfloat16", metadata={"help": "float32 or bfloat16"})
    clients: int = field(default=16, metadata={"help": "chats at once"})
    prompt_tokens: int = field(default=64, metadata={"help": "tokens of the longest prompt; others are shorter"})
    new_tokens: int = field(default=48, metadata={"help": "tokens of each chat's answer"})
    long_tokens: int = field(default=250, metadata={"help": "tokens of the long answer"})
    short_tokens: int = field(default=8, metadata={"help": "tokens of the short request"})
    threads: int = field(default=2, metadata={"help": "threads of PyTorch"})
    native: bool = field(default=False, metadata={"help": "coded models by compiled code, as serve.py --native"})
    repeats: int = field(default=3, metadata={"help": "rounds, of which the median counts"})
    seed: int = field(default=0, metadata={"help": "of the prompts"})
    output: str = field(default="model_cards/results/smollm2/server.json", metadata={"help": "results file"})


class Clients:
    """Requests to one engine, with prompts of random tokens that share no beginning."""

    def __init__(self, engine: Engine, args: ServerArgs):
        self.engine, self.args, self.sent = engine, args, 0
        self.vocabulary = engine.model.config.get_text_config(decoder=True).vocab_size

    def send(self, new_tokens: int) -> Job:
        self.sent += 1
        length = self.args.prompt_tokens - 3 * (self.sent % 16)
        ids = random_tokens(1, max(length, 4), self.vocabulary, seed=self.args.seed + self.sent)[0].tolist()
        return self.engine.submit(ids, Settings(new_tokens, 0.0))

    def rate(self, count: int) -> float:
        """New tokens per second of so many chats at once."""
        begin = time.perf_counter()
        jobs = [self.send(self.args.new_tokens) for _ in range(count)]
        for job in jobs:
            self.wait(job)
        return sum(job.new_tokens for job in jobs) / (time.perf_counter() - begin)

    def short(self, beside: bool) -> float:
        """Seconds of a short request, beside a long one that has begun or alone."""
        running = self.send(self.args.long_tokens) if beside else None
        while running is not None and running.new_tokens < 4 and running.finish_reason is None:
            time.sleep(0.01)
        begin = time.perf_counter()
        self.wait(self.send(self.args.short_tokens))
        seconds = time.perf_counter() - begin
        if running is not None:
            running.cancelled = True
            self.wait(running, "cancelled")
        return seconds

    @staticmethod
    def wait(job: Job, *accepted: str) -> None:
        for _ in job:
            pass
        if job.finish_reason not in ("stop", "length", *accepted):
            raise RuntimeError(f"A request ended with {job.finish_reason!r} ({job.error}).")


def main(args: ServerArgs) -> dict:
    torch.set_num_threads(args.threads)
    if args.native:
        modeling_flashlite.enable_native()
    limits = Limits(batch=max(args.clients, 2), new_tokens=args.long_tokens, seconds=600.0)
    checkpoint = CheckpointArgs(model=args.model, dtype=args.dtype, device="cpu")
    engine = Engine(checkpoint, limits=limits)
    clients = Clients(engine, args)
    # no answer ends before its last token
    engine.batch.ends.clear()
    works = {
        "1 chat": lambda: clients.rate(1),
        f"{args.clients} chats": lambda: clients.rate(args.clients),
        "short request alone": lambda: clients.short(False),
        "short request beside a long one": lambda: clients.short(True),
    }
    works["1 chat"]()
    values: dict[str, list[float]] = {name: [] for name in works}
    for _ in tqdm(range(args.repeats), desc="rounds"):
        for name, run in works.items():
            values[name].append(run())
    engine.close()
    one, many, alone, beside = values.values()
    metrics = {
        "times_one_chat": statistics.median(b / a for a, b in zip(one, many)),
        "times_alone": statistics.median(b / a for a, b in zip(alone, beside)),
    }
    rows = [
        {
            "work": name,
            "unit": "tokens/s" if "chat" in name else "s",
            "median": round(statistics.median(samples), 3),
            "spread": [round(min(samples), 3), round(max(samples), 3)],
            "rounds": len(samples),
        }
        for name, samples in values.items()
    ]
    about = {"model": args.model, "cpu_features": cpu_features()}
    write_bench(Path(args.output), "server", args, rows, metrics, without=("model",), **about)
    print(format_table(rows))
    print({name: round(value, 2) for name, value in metrics.items()})
    return finish({"results": args.output})


if __name__ == "__main__":
    start(main, (ServerArgs,), __doc__)
