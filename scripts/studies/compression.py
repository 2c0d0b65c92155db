"""Perplexity of a language model over the bits of its whole file, and what it answers at each of them.

python scripts/studies/compression.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
    --dataset train=wikitext2/train.txt.xz,test=wikitext2/test.txt.xz --rates 5 4 3.5 3 2.5 \
    --output model_cards/results/compression_smollm2.json

Calibrated on lines from the beginning of `train`, measured on lines of `test` in windows, a newline behind every line.
A run that is stopped keeps the rates that it has measured.
"""

import math
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import load_data, pick_split
from modeling_flashlite.measure.perplexity import text_likelihood
from modeling_flashlite.measure.results import write_results
from modeling_flashlite.quantization_flashlite import EcqConfig
from modeling_flashlite.training.calibration import quantize

QUESTIONS = (
    "What is the capital of France?",
    "What is the largest planet of the solar system?",
    "Who wrote Romeo and Juliet?",
    "What is two plus three?",
    "What colour is the sky on a clear day?",
    "How many days does a week have?",
    "What is the opposite of hot?",
    "Which animal says meow?",
    "What is water made of?",
    "Name three fruits.",
)


@dataclass
class StudyArgs:
    model: str = field(metadata={"help": "directory or Hub id of a causal language model"})
    dataset: str = field(metadata={"help": "local files (train=..., test=...) or a Hub id, rows of a `text` column"})
    rates: list[float] = field(default_factory=lambda: [5, 4, 3.5, 3, 2.5], metadata={"help": "bits of the file"})
    tokens: int = field(default=8192, metadata={"help": "tokens to calibrate on; 0 is data-free"})
    limit: int = field(default=400, metadata={"help": "lines to measure on"})
    length: int = field(default=512, metadata={"help": "tokens read at once"})
    answers: bool = field(default=True, metadata={"help": "ask the ten questions"})
    output: str = field(default="runs/results/compression.json", metadata={"help": "results file"})
    label: str | None = field(default=None, metadata={"help": "name of the data set in tables"})
    note: str | None = field(default=None, metadata={"help": "about the checkpoint, for the results file"})


def calibration_batches(tokenizer, lines: list[str], args: StudyArgs) -> list[dict] | None:
    """Windows of consecutive lines, four in a batch."""
    if not args.tokens:
        return None
    ids: list[int] = []
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for line in lines:
        ids += tokenizer(line, add_special_tokens=False)["input_ids"] + newline
        if len(ids) >= args.tokens:
            break
    rows = torch.tensor(ids[: min(len(ids), args.tokens) // args.length * args.length]).view(-1, args.length)
    return [{"input_ids": part} for part in rows.split(4)]


def answers_of(model, tokenizer) -> list[dict]:
    """Greedy answers to the questions, by the chat template where there is one."""
    answers = []
    for question in QUESTIONS:
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": question}]
            given = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            given = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")
        out = model.generate(**given, max_new_tokens=32, do_sample=False)
        text = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append({"question": question, "answer": text.strip()})
    return answers


def measure(model, tokenizer, lines: list[str], args: StudyArgs) -> dict:
    metrics, _ = text_likelihood(
        model, tokenizer, lines, segment_length=args.length, memory=False, end="\n", resamples=0
    )
    point = {"perplexity": metrics["token_perplexity"]}
    return {**point, "answers": answers_of(model, tokenizer)} if args.answers else point


def measure_rate(rate: float, args: StudyArgs, tokenizer, batches: list[dict] | None, lines: list[str]) -> dict:
    """Quantize, write, load again and measure, so that what is measured is what a user downloads."""
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    parameters, begin = sum(p.numel() for p in model.parameters()), time.perf_counter()
    quantize(model, EcqConfig(target_bits=rate), batches)
    seconds = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        del model
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        point = measure(loaded, tokenizer, lines, args)
    return {"target": rate, "bits": 8 * size / parameters, "bytes": size, "seconds": round(seconds, 1), **point}


def main(args: StudyArgs) -> dict:
    splits, tokenizer = load_data(args.dataset), AutoTokenizer.from_pretrained(args.model)
    lines = list(pick_split(splits, "test")["text"][: args.limit])
    batches = calibration_batches(tokenizer, splits["train"]["text"], args) if args.tokens else None
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    points = [{"target": None, "bits": 32.0, **measure(model, tokenizer, lines, args)}]
    base, metrics = points[0]["perplexity"], {"perplexity float": points[0]["perplexity"]}
    del model
    for rate in args.rates:
        points.append(measure_rate(rate, args, tokenizer, batches, lines))
        point = points[-1]
        point["increase"] = point["perplexity"] / base - 1
        metrics[f"perplexity {rate:g} bits"] = point["perplexity"]
        print(f"{point['bits']:.3f} bits: perplexity {point['perplexity']:.2f} ({point['increase']:+.1%})")
        write_results(
            args.output,
            {name: value for name, value in metrics.items() if math.isfinite(value)},
            task="compression",
            dataset=args.label or args.dataset,
            split="test",
            model=args.model,
            config=asdict(args),
            seed=0,
            points=points,
            protocol={"perplexity": "a token, windows without memory, a newline behind every line"},
            note=args.note,
        )
    return finish({"output": args.output, **metrics})


if __name__ == "__main__":
    start(main, (StudyArgs,), __doc__)
