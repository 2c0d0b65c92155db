"""A training step of whole models against models of equal shape, bare and under the stock Trainer.

python scripts/studies/bench_train.py --lengths 512 4096
"""

import tempfile

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments

from modeling_flashlite.cli import start
from modeling_flashlite.measure.benchmark import race, summarize_race
from modeling_flashlite.measure.peers import make_models
from modeling_flashlite.measure.study import BenchArgs, run_bench
from modeling_flashlite.measure.workloads import BART, LLAMA, OUR_MODEL, T5GEMMA, random_tokens, training_step

LENGTHS = (64, 512, 4096, 8192)
# width, layers of each stack, heads, vocabulary: small enough to train here
SHAPE = (256, 4, 4, 8192)
# tokens of a batch of short rows
STEP_TOKENS = 512
TRAINER_LENGTH, TRAINER_STEPS = 512, 3


def measure(args: BenchArgs) -> list[dict]:
    """Steps of `length` source and as many target tokens, or of causal tokens."""
    rows = []
    kinds = ("sequence to sequence", [BART, T5GEMMA]), ("causal", [LLAMA])
    for kind, peers in kinds:
        shape = tuple(args.shape) or SHAPE
        models = make_models([*peers, OUR_MODEL], shape)
        for length in tqdm(args.lengths or LENGTHS, desc=f"train, {kind}"):
            if BART in peers and length > STEP_TOKENS:
                continue
            batch = max(STEP_TOKENS // length, 1)
            ids = random_tokens(batch, length, shape[-1], seed=args.seed, device=args.device)
            contenders = {name: training_step(model.to(args.device), ids) for name, model in models.items()}
            times = race(contenders, repeats=args.repeats, seconds=min(args.seconds, 10.0))
            rows += summarize_race(times, peers, work=f"training step, {kind}", length=length, batch=batch)
            if length == TRAINER_LENGTH or args.shape:
                rows += under_trainer(args, models, peers, ids, kind)
    return rows


def under_trainer(args: BenchArgs, models: dict, peers: list[str], ids: torch.Tensor, kind: str) -> list[dict]:
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


if __name__ == "__main__":
    start(lambda: run_bench("train", measure, grows=True))
