"""Perplexity of a language model over the bits of its whole file, and which of ten questions it answers.

python scripts/studies/compression.py --model HuggingFaceTB/SmolLM2-135M-Instruct \
    --dataset train=wikitext2/train.txt.xz,test=wikitext2/test.txt.xz --rates 5 4 3.5 3 2.5 \
    --output model_cards/results/compression_smollm2.json

Calibrated on lines from the beginning of `train` and, where the model has a chat template, on as many tokens that it
writes itself; measured on lines of `test` in windows, a newline behind every line. `--tokens 0` is data-free, in
`from_pretrained`. Points join those that the results file has, so a run that is stopped goes on. `--coded` measures
models that are quantized already, as by `quantize.py --method qat` or GGUF files of the same model, instead.
"""

import json
import math
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.loading import load_data, pick_split
from modeling_flashlite.ecq_config_flashlite import EcqConfig
from modeling_flashlite.measure.benchmark import fresh_cost
from modeling_flashlite.measure.compression import load_gguf
from modeling_flashlite.measure.cost import peak_memory_bytes
from modeling_flashlite.measure.perplexity import text_likelihood
from modeling_flashlite.measure.results import command_line, git_commit, read_results, write_results
from modeling_flashlite.measure.workloads import quantizing
from modeling_flashlite.training.calibration import quantize
from modeling_flashlite.training.sampling import with_conversations

# the first ten of a list of forty that SmolLM2-135M-Instruct answers in float; the answer holds one of the words
QUESTIONS = {
    "What is the capital of France?": ("paris",),
    "What is the capital of Germany?": ("berlin",),
    "What is the capital of Japan?": ("tokyo",),
    "What is the capital of China?": ("beijing",),
    "Who wrote Romeo and Juliet?": ("shakespeare",),
    "Which animal says meow?": ("cat",),
    "What is the opposite of hot?": ("cold",),
    "Which ocean is the largest?": ("pacific",),
    "What is the chemical formula of water?": ("h2o", "h₂o"),
    "How many days are in a week?": ("7", "seven"),
}


@dataclass
class StudyArgs:
    model: str = field(metadata={"help": "directory or Hub id of a causal language model"})
    dataset: str = field(metadata={"help": "local files (train=..., test=...) or a Hub id, rows of a `text` column"})
    rates: list[float] = field(default_factory=lambda: [5, 4, 3.5, 3, 2.5], metadata={"help": "bits of the file"})
    tokens: int = field(default=16384, metadata={"help": "tokens to calibrate on; 0 is data-free"})
    chat_share: float | None = field(
        default=None, metadata={"help": "of these tokens in conversations that the model writes; half if it can"}
    )
    limit: int = field(default=400, metadata={"help": "lines to measure on"})
    length: int = field(default=512, metadata={"help": "tokens read at once"})
    answers: bool = field(default=True, metadata={"help": "ask the ten questions"})
    coded: list[str] = field(
        default_factory=list, metadata={"help": "folders of coded models and .gguf files, to measure"}
    )
    work: str = field(default="runs/compression", metadata={"help": "keeps conversations, steps and finished blocks"})
    output: str = field(default="runs/results/compression.json", metadata={"help": "results file"})
    label: str | None = field(default=None, metadata={"help": "name of the data set in tables"})
    note: str | None = field(default=None, metadata={"help": "about the checkpoint, for the results file"})


def calibration_batches(model, tokenizer, lines: list[str], args: StudyArgs) -> list[dict]:
    """Windows of consecutive lines, four in a batch, and conversations."""
    ids: list[int] = []
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    for line in lines:
        ids += tokenizer(line, add_special_tokens=False)["input_ids"] + newline
        if len(ids) >= args.tokens:
            break
    rows = torch.tensor(ids[: min(len(ids), args.tokens) // args.length * args.length]).view(-1, args.length)
    batches = [{"input_ids": part} for part in rows.split(4)]
    return with_conversations(batches, model, tokenizer, args.chat_share, args.work)


def answers_of(model, tokenizer) -> list[dict]:
    """Greedy answers to the questions, by the chat template where there is one."""
    answers = []
    for question, words in QUESTIONS.items():
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": question}]
            given = tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        else:
            given = tokenizer(f"Question: {question}\nAnswer:", return_tensors="pt")
        out = model.generate(**given, max_new_tokens=24, do_sample=False)
        text = tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        right = any(word in text.lower() for word in words)
        answers.append({"question": question, "answer": text, "right": right})
    return answers


def measure(model, tokenizer, lines: list[str], args: StudyArgs) -> dict:
    metrics, _ = text_likelihood(
        model, tokenizer, lines, segment_length=args.length, memory=False, end="\n", resamples=0
    )
    point = {"perplexity": metrics["token_perplexity"]}
    if not args.answers:
        return point
    answers = answers_of(model, tokenizer)
    return {**point, "right": sum(answer["right"] for answer in answers), "answers": answers}


def quantized(rate: float, args: StudyArgs, batches: list[dict] | None) -> tuple[torch.nn.Module, dict]:
    """The model at a rate, and what that took."""
    if batches is None:
        peak, seconds = fresh_cost(quantizing, args.model, rate)
        model = AutoModelForCausalLM.from_pretrained(
            args.model, dtype=torch.float32, quantization_config=EcqConfig(target_bits=rate)
        )
        return model, {"seconds": round(seconds, 1), "peak_bytes": peak}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    begin, processor = time.perf_counter(), time.process_time()
    quantize(model, EcqConfig(target_bits=rate), batches, resume=args.work)
    cost = {"seconds": time.perf_counter() - begin, "processor_seconds": time.process_time() - processor}
    cost = {name: round(value, 1) for name, value in cost.items()}
    return model, {**cost, "process_peak_bytes": peak_memory_bytes()}


def measure_rate(
    rate: float, args: StudyArgs, tokenizer, batches: list[dict] | None, lines: list[str], parameters: int
) -> dict:
    """Quantize, write, load again and measure, so that what is measured is what a user downloads."""
    model, cost = quantized(rate, args, batches)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        del model
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        point = measure(loaded, tokenizer, lines, args)
    return {"target": rate, "bits": 8 * size / parameters, "bytes": size, **cost, **point}


def measure_coded(folder: str, args: StudyArgs, tokenizer, lines: list[str], parameters: int) -> dict:
    """A model that is quantized already, and what its training took if the trainer has left its state."""
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    target = model.hf_quantizer.quantization_config.target_bits
    point = {"method": "coded", "target": target, "bits": 8 * size / parameters, "bytes": size}
    state = Path(folder) / "trainer_state.json"
    if state.is_file():
        held = json.loads(state.read_text(encoding="utf-8"))
        seconds = max((log["train_runtime"] for log in held["log_history"] if "train_runtime" in log), default=None)
        training = {"steps": held["global_step"], "tokens": held["num_input_tokens_seen"], "seconds": seconds}
        point |= {"method": "trained", "training": training}
    return point | measure(model, tokenizer, lines, args)


def measure_gguf(path: Path, args: StudyArgs, tokenizer, lines: list[str], parameters: int) -> dict:
    """A GGUF file of the same model, which transformers dequantizes to float32."""
    model = load_gguf(path)
    size = path.stat().st_size
    point = {"method": f"GGUF {path.stem}", "target": None, "bits": 8 * size / parameters, "bytes": size}
    return point | measure(model, tokenizer, lines, args)


def key(point: dict) -> tuple:
    return point.get("method", "calibrated"), point["target"]


def write(args: StudyArgs, points: list[dict]) -> None:
    """Write the results file anew, points in the order of method and rate."""
    points.sort(key=lambda point: (key(point)[0] != "float", key(point)[0], -(point["target"] or 0)))
    metrics = {
        f"perplexity {' '.join(str(part) for part in key(point) if part)}": point["perplexity"] for point in points
    }
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
        protocol={
            "perplexity": "a token, windows without memory, a newline behind every line",
            "right": f"of {len(QUESTIONS)} questions that the float model answers, greedy, chat template",
        },
        note=args.note,
    )


def main(args: StudyArgs) -> dict:
    splits, tokenizer = load_data(args.dataset), AutoTokenizer.from_pretrained(args.model)
    lines = list(pick_split(splits, "test")["text"][: args.limit])
    points = read_results([Path(args.output)])[0]["points"] if Path(args.output).exists() else []
    stamp = {"commit": git_commit(), "command": command_line()}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if not any(key(point)[0] == "float" for point in points):
        points.append({"method": "float", "target": None, "bits": 32.0, **measure(model, tokenizer, lines, args)})
    base = next(point["perplexity"] for point in points if point["method"] == "float")
    rates = [] if args.coded else args.rates
    batches = calibration_batches(model, tokenizer, splits["train"]["text"], args) if args.tokens and rates else None
    parameters = sum(p.numel() for p in model.parameters())
    del model
    method = {"method": "calibrated" if args.tokens else "data-free"}
    for rate_or_folder in [*rates, *args.coded]:
        if str(rate_or_folder).endswith(".gguf"):
            point = measure_gguf(Path(rate_or_folder), args, tokenizer, lines, parameters)
        elif args.coded:
            point = measure_coded(rate_or_folder, args, tokenizer, lines, parameters)
        else:
            point = method | measure_rate(rate_or_folder, args, tokenizer, batches, lines, parameters)
        point |= stamp | {"increase": point["perplexity"] / base - 1}
        points = [other for other in points if key(other) != key(point)] + [point]
        print(f"{point['bits']:.3f} bits: perplexity {point['perplexity']:.2f} ({point['increase']:+.1%})")
        write(args, points)
    return finish({"output": args.output, "points": len(points)})


if __name__ == "__main__":
    start(main, (StudyArgs,), __doc__)
