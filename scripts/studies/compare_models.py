"""Flash-Lite against BART and T5 of transformers: equal parameters, depth, tokenizer, data, steps, schedule and beams.

python scripts/studies/compare_models.py --config scripts/recipes/train_captions.yaml --num_train_epochs 4
python scripts/studies/compare_models.py --config recipe.yaml --dataset train=a.jsonl,validation=b.jsonl,test=c.jsonl

A recipe of `train.py` describes everything but the peers. Each model is trained to the end at every learning rate,
because the best rate after a few hundred steps may be the worst at the end; the lowest validation loss counts.
Finished trainings in `output_dir` are reused, so that a later call can add rates or repeat the timing on a quiet
machine. Training steps and generation are timed in turn, with answers of equal length.
"""

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForSeq2SeqLM, DataCollatorForSeq2Seq, set_seed

from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import pick_split
from modeling_flashlite.data.tasks import prompts_and_references
from modeling_flashlite.measure.benchmark import race, summarize_race
from modeling_flashlite.measure.cost import count_parameters
from modeling_flashlite.measure.evaluation import evaluate_task, generate_texts, label_likelihood
from modeling_flashlite.measure.peers import make_peer
from modeling_flashlite.measure.results import write_json, write_results
from modeling_flashlite.training.launch import (
    ArchitectureArgs,
    DataArgs,
    ModelArgs,
    TrainArgs,
    load_model,
    load_rows,
    load_splits,
    load_task,
    load_tokenizer,
)
from modeling_flashlite.training.trainers import CarefulTrainer

OURS = "Flash-Lite"
STEP = "training step"
# what the families call the width inside their feed-forward networks
FEED_FORWARD = ("intermediate_size", "encoder_ffn_dim", "d_ff")


@dataclass
class CompareArgs:
    peers: str = field(default="BART,T5", metadata={"help": "who is compared with Flash-Lite"})
    peer_width: int = field(default=144, metadata={"help": "of the peers; their feed-forward networks fill up"})
    peer_heads: int = field(default=4, metadata={"help": "attention heads of the peers"})
    learning_rates: str = field(
        default="5e-4,1e-3,2e-3", metadata={"help": "peaks to choose from; with a name (T5=5e-3) for one model alone"}
    )
    test_split: str = field(default="test", metadata={"help": "split for the final scores"})
    label: str | None = field(default=None, metadata={"help": "name of the data set in tables; as given if unset"})
    speed_rows: int = field(default=32, metadata={"help": "test rows generated when timed"})
    speed_tokens: int = field(default=24, metadata={"help": "tokens of each of them: answers of one length compare"})
    repeats: int = field(default=5, metadata={"help": "rounds of the timing"})
    output: str = field(default="model_cards/results/peers.json", metadata={"help": "results file"})


class Arena:
    """Data, tokenizer and settings that all models share; makes, trains and evaluates one of them."""

    def __init__(self, compare: CompareArgs, model_args, shape, data, args):
        self.compare, self.model_args, self.shape, self.args = compare, model_args, shape, args
        self.max_source_length = data.max_source_length
        self.peers = compare.peers.split(",")
        self.splits = load_splits(data)
        self.data = load_task(data, model_args, self.splits)
        self.task = self.data.task
        self.tokenizer = load_tokenizer(model_args, self.data, args.output_dir, self.splits)
        self.train_rows, self.validation_rows = load_rows(self.data, data, args, self.tokenizer, self.splits)
        self.test_rows = pick_split(self.splits, compare.test_split)

    def make(self, name: str):
        """A new model; peers have the parameters and depth of ours."""
        set_seed(self.args.seed)
        ours = load_model(self.model_args, self.shape, self.tokenizer, self.data)
        if name == OURS:
            return ours
        width, heads = self.compare.peer_width, self.compare.peer_heads
        shape = (width, self.shape.num_hidden_layers, heads, len(self.tokenizer))
        return make_peer(name, shape, count_parameters(ours), self.shape.dropout_rate or 0.0)

    def rates(self, name: str) -> list[float]:
        """Learning rates at which a model is trained."""
        named = (entry.rpartition("=") for entry in self.compare.learning_rates.split(","))
        return [float(rate) for owner, _, rate in named if owner in ("", name)]

    def folder(self, name: str, learning_rate: float) -> Path:
        """Where a model trained at that rate is kept."""
        return Path(self.args.output_dir) / name / f"{learning_rate:g}"

    def trainer(self, name: str, model, learning_rate: float) -> CarefulTrainer:
        """The same trainer for all; the collator makes the decoder inputs of peers, as label smoothing requires."""
        settings = copy.copy(self.args)
        settings.learning_rate = learning_rate
        settings.output_dir = str(self.folder(name, learning_rate))
        settings.eval_strategy = settings.save_strategy = "no"
        collator = DataCollatorForSeq2Seq(self.tokenizer, model=model)
        return CarefulTrainer(model, settings, train_dataset=self.train_rows, data_collator=collator)

    def validation_loss(self, model) -> float:
        """Nats per token without label smoothing."""
        collator = DataCollatorForSeq2Seq(self.tokenizer, model=model)
        batches = DataLoader(self.validation_rows, self.args.per_device_eval_batch_size, collate_fn=collator)
        return label_likelihood(model, batches)["loss"]

    def train(self, name: str, learning_rate: float) -> dict:
        """Train a model, save it and evaluate it on the test split: one row of the table."""
        path = self.folder(name, learning_rate) / "row.json"
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
        model = self.make(name)
        trainer = self.trainer(name, model, learning_rate)
        trainer.train()
        model.save_pretrained(trainer.args.output_dir)
        scores = evaluate_task(
            self.data,
            model,
            self.tokenizer,
            self.test_rows,
            batch_size=self.args.per_device_eval_batch_size,
            max_source_length=self.max_source_length,
        )
        row = {
            "method": name,
            "parameters": count_parameters(model),
            "feed_forward": next(getattr(model.config, key) for key in FEED_FORWARD if hasattr(model.config, key)),
            "learning_rate": learning_rate,
            "steps": trainer.state.global_step,
            "validation_loss": self.validation_loss(model),
            **scores["metrics"],
            "intervals": scores["intervals"],
            "details": scores["details"],
        }
        write_json(path, row)
        return row

    def race(self, rows: list[dict]) -> list[dict]:
        """Training steps and generation of all models in turn."""
        prompts = [
            prompts_and_references(self.data, row, self.tokenizer)[0][0]
            for row in self.test_rows.select(range(min(self.compare.speed_rows, len(self.test_rows))))
        ]
        steps, beams, single = {}, {}, {}
        length = dict.fromkeys(("min_new_tokens", "max_new_tokens"), self.compare.speed_tokens)
        for row in rows:
            name = row["method"]
            model = AutoModelForSeq2SeqLM.from_pretrained(self.folder(name, row["learning_rate"]))
            trainer = self.trainer(name, model, row["learning_rate"])
            picked = self.train_rows.select(range(min(self.args.per_device_train_batch_size, len(self.train_rows))))
            batch = trainer.data_collator([{key: line[key] for key in ("input_ids", "labels")} for line in picked])
            steps[name] = lambda trainer=trainer, model=model, batch=batch: self.step(trainer, model, batch)
            many = {"batch_size": len(prompts), **self.task.generation, **length}
            beams[name] = lambda model=model, many=many: generate_texts(model, self.tokenizer, prompts, **many)
            one = {"batch_size": 1, **length}
            single[name] = lambda model=model, one=one: generate_texts(model, self.tokenizer, prompts[:4], **one)
        options = {"repeats": self.compare.repeats, "seconds": 20.0}
        found = []
        for work, contenders, count, unit in (
            (STEP, steps, len(picked), "rows/s"),
            (f"generation, {self.task.generation.get('num_beams', 1)} beams", beams, len(prompts), "rows/s"),
            ("generation, greedy, one at a time", single, len(prompts[:4]), "rows/s"),
        ):
            for result in summarize_race(race(contenders, name=work, **options), self.peers, work=work):
                found.append({**result, unit: round(1e3 * count / result["ms"], 2)})
        return found

    def step(self, trainer, model, batch) -> None:
        """Forward and backward pass as in the trainer."""
        model.train()
        with torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16, enabled=self.args.bf16):
            loss = trainer.compute_loss(model, dict(batch))
        loss.backward()
        model.zero_grad()


def main(compare: CompareArgs, model: ModelArgs, shape: ArchitectureArgs, data: DataArgs, args: TrainArgs) -> dict:
    arena = Arena(compare, model, shape, data, args)
    names = (OURS, *arena.peers)
    rows = [arena.train(name, rate) for name in names for rate in arena.rates(name)]
    best = [min((r for r in rows if r["method"] == name), key=lambda r: r["validation_loss"]) for name in names]
    speed = arena.race(best)
    step_ms = {row["name"]: row["ms"] for row in speed if row["work"] == STEP}
    for row in rows:  # one after another, the trainings had more or less of the machine: steps timed in turn compare
        row["train_seconds"] = round(row["steps"] * step_ms[row["method"]] / 1e3, 1)
        row["best"] = row in best
    headline = next(key for key in rows[0] if key in arena.task.metrics or key == "rouge1")
    settings = {**vars(compare), **vars(model), **vars(shape), **vars(data)}
    recipe = ("num_train_epochs", "max_steps", "per_device_train_batch_size", "warmup_steps", "lr_scheduler_type")
    recipe += ("adam_beta2", "weight_decay", "label_smoothing_factor", "max_grad_norm", "bf16")
    metrics = {f"{row['method']} {headline}": row[headline] for row in best}
    write_results(
        compare.output,
        metrics,
        task=data.task,
        dataset=compare.label or data.dataset,
        split=compare.test_split,
        config={**settings, **{key: getattr(args, key) for key in recipe}},
        seed=args.seed,
        protocol={"generation": dict(arena.task.generation)},
        points=rows,
        race=speed,
    )
    return finish({"output": compare.output, **metrics})


if __name__ == "__main__":
    start(main, (CompareArgs, ModelArgs, ArchitectureArgs, DataArgs, TrainArgs), __doc__)
