"""The main job on a real model: convert, read sparsely, quantize, adapt by LoRA, reload cleanly, answer a question.

python scripts/demo.py
python scripts/demo.py --size smallest --output runs/quick
python scripts/demo.py --model Qwen/Qwen2.5-0.5B-Instruct --target_bits 3.5 --output runs/qwen
python scripts/demo.py --from_scratch
"""

import dataclasses
import os
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_flashlite import EcqConfig, PaddingCollator, convert, quantize
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.batching import pack, tokenize_texts
from modeling_flashlite.data.corpus import python_corpus
from modeling_flashlite.measure.cost import measure_generation
from modeling_flashlite.measure.parity import full_attention, perplexity
from modeling_flashlite.measure.perplexity import label_likelihood
from modeling_flashlite.measure.results import write_results
from modeling_flashlite.training.lora import add_lora
from modeling_flashlite.training.parents import random_llama, smollm2
from modeling_flashlite.training.sampling import conversation_rows, write_conversations
from modeling_flashlite.training.stages import Stages, reload_elsewhere, weight_cost

COLUMNS = {
    "parameters": ("parameters", "{:,}"),
    "bits_per_weight": ("bits/weight", "{:.2f}"),
    "file_bytes": ("file bytes", "{:,}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "task_perplexity": ("on the task", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:.1f}"),
    "seconds": ("seconds", "{:.0f}"),
}


@dataclass
class DemoArgs:
    model: str | None = field(
        default=None, metadata={"help": "folder, Hub id or .gguf; SmolLM2-135M-Instruct if unset"}
    )
    size: str = field(default="default", metadata={"help": "default (minutes), or smallest: a random model, seconds"})
    target_bits: float = field(default=3.0, metadata={"help": "budget of the quantized file, bits per weight"})
    question: str = field(default="What is the capital of France?", metadata={"help": "for the finished model"})
    output: str = field(default="runs/demo", metadata={"help": "a stage that is finished here is not run again"})
    seed: int = field(default=0, metadata={"help": "seed of data order and adapters"})


@dataclass(frozen=True)
class Size:
    """Tokens of the long text; rows of `length` tokens and conversations to calibrate on; steps of the adapters."""

    text: int
    length: int
    rows: int
    conversations: int
    steps: int
    axes: dict


SIZES = {
    "default": Size(text=2048, length=256, rows=16, conversations=48, steps=24, axes={}),
    "smallest": Size(
        text=256, length=64, rows=4, conversations=12, steps=4, axes={"block_size": 16, "relevance_top_k": 1}
    ),
}


class Demo(Stages):
    """The stages; each is a method that fills its folder and returns a row of the table."""

    def __init__(self, args: DemoArgs):
        if args.size not in SIZES:
            raise ValueError(f"size is {args.size!r}, but must be one of {', '.join(SIZES)}.")
        kept = {key: value for key, value in dataclasses.asdict(args).items() if key not in ("output", "question")}
        super().__init__(Path(args.output), kept, args.seed)
        self.args, self.size, self.corpus = args, SIZES[args.size], python_corpus()
        self.float_model, self.codes = self.root / "converted" / "model", self.root / "quantized"

    def parent(self, folder: Path) -> dict:
        """Where the model is."""
        if self.args.model is not None:
            return {"model": self.args.model}
        if self.args.size == "smallest":
            return {"model": random_llama(folder, self.corpus["train"]["text"][:600])}
        return {"model": smollm2(folder)}

    def converted(self, folder: Path) -> dict:
        """The same weights as Flash-Lite, measured with full attention: this is the parent."""
        if not self.float_model.exists():  # else the stage was interrupted after it
            convert(self.source, output=self.float_model, **self.size.axes)
        self.prepare()
        model = AutoModelForCausalLM.from_pretrained(self.float_model)
        with full_attention(model):
            return self.measure(model, self.float_model)

    def prepare(self) -> None:
        """The tokenizer, a long text, and the task: to say what a documented object of the standard library does."""
        self.tok = AutoTokenizer.from_pretrained(self.float_model)
        held_out = self.corpus["validation"]
        text = "\n\n".join(held_out["text"])[: 12 * self.size.text]
        self.text = self.tok(text, return_tensors="pt", verbose=False)["input_ids"][:, : self.size.text]
        self.exam = [self.lesson(*self.entry(row)) for row in held_out.select(range(16))]

    def entry(self, row: dict) -> tuple[str, str]:
        """Question and answer about a documented object."""
        return f"What does {row['name']} of Python's standard library do?", row["text"].partition(".")[0] + "."

    def lesson(self, question: str, answer: str) -> dict:
        """One turn of a chat, of which the answer is to be learnt."""
        chat = [{"role": "user", "content": question}]
        prompt = self.tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"][:96]
        ids = self.tok(answer, add_special_tokens=False)["input_ids"][:48] + [self.tok.eos_token_id]
        return {"input_ids": prompt + ids, "labels": [-100] * len(prompt) + ids}

    def measure(self, model, folder: Path, adapter: Path | None = None) -> dict:
        """A row of the table: size of the files, perplexity of the long text and of the answers, speed."""
        plain = model.get_base_model() if adapter else model
        batches = [PaddingCollator(self.tok)(self.exam[place : place + 4]) for place in range(0, len(self.exam), 4)]
        speed = measure_generation(plain, self.tok, [self.args.question], new_tokens=16, repeats=2)
        return {
            **weight_cost(plain, folder, adapter),
            "perplexity": perplexity(plain.eval(), self.text),
            "task_perplexity": label_likelihood(plain, batches)["token_perplexity"],
            "tokens_per_second": next(row["value"] for row in speed if row["unit"] == "tokens/s"),
        }

    def sparse(self, folder: Path) -> dict:
        """The converted model as it is: long texts are read sparsely."""
        return self.measure(AutoModelForCausalLM.from_pretrained(self.float_model), self.float_model)

    def conversations(self, folder: Path) -> dict:
        """The model talks to itself, so that rounding and adapting it keep its chat."""
        model = AutoModelForCausalLM.from_pretrained(self.float_model, dtype=torch.bfloat16)
        return {"texts": write_conversations(model, self.tok, self.size.conversations)}

    def quantized(self, folder: Path) -> dict:
        """Rounded to a file of the asked size, calibrated on documentation and, in turn, on the conversations."""
        some = self.corpus["train"].shuffle(self.seed).select(range(40 * self.size.rows))
        rows = pack(tokenize_texts(some.select_columns(["text"]), self.tok, "text"), self.size.length)["input_ids"]
        talks = conversation_rows(self.tok, self.talks, self.size.length)
        kinds = torch.tensor(rows[: self.size.rows]).split(4), talks[: self.size.rows].split(4)
        batches = [{"input_ids": ids} for pair in zip_longest(*kinds, fillvalue=()) for ids in pair if len(ids)]
        model = AutoModelForCausalLM.from_pretrained(self.float_model)
        quantize(model, EcqConfig(target_bits=self.args.target_bits), batches, resume=folder / "trainer")
        model.save_pretrained(folder)
        self.tok.save_pretrained(folder)
        return self.measure(AutoModelForCausalLM.from_pretrained(folder), folder)

    def lora(self, folder: Path) -> dict:
        """Low-rank adapters on the quantized model learn the task, on the stock Trainer; the conversations remind."""
        objects = self.corpus["train"].shuffle(self.seed).select(range(4 * self.size.steps - len(self.talks)))
        pairs = [self.entry(row) for row in objects]
        pairs += [tuple(turn["content"] for turn in turns) for turns in self.talks]
        model = add_lora(AutoModelForCausalLM.from_pretrained(self.codes), r=8)
        lessons, steps = Dataset.from_list([self.lesson(*pair) for pair in pairs]), self.size.steps
        self.fit(model, lessons, folder, collator=PaddingCollator(self.tok), steps=steps, batch=4, learning_rate=1e-3)
        model.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(self.codes)
        return self.measure(PeftModel.from_pretrained(base, folder), self.codes, adapter=folder)

    def answered(self, folder: Path) -> dict:
        """Base and adapter answer where the package cannot be imported, with the logits that they have here."""
        chat = [{"role": "user", "content": self.args.question}]
        answer = reload_elsewhere(self.codes, self.root / "lora", chat, max_new_tokens=40, do_sample=False)
        return {"question": self.args.question, "answer": answer}


def main(args: DemoArgs) -> dict:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft asks transformers for it by the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    demo = Demo(args)
    demo.source = demo.stage(demo.parent)["model"]
    demo.stage(demo.converted)
    demo.prepare()
    demo.stage(demo.sparse)
    demo.talks = demo.stage(demo.conversations)["texts"]
    for work in (demo.quantized, demo.lora):
        demo.stage(work)
    chat = demo.stage(demo.answered)
    print(f"\n{chat['question']}\n{chat['answer']}\n\n{demo.render(COLUMNS)}\n")
    results = write_results(
        demo.root / "results.json",
        {"seconds": round(demo.seconds, 1), **{f"perplexity_{row['stage']}": row["perplexity"] for row in demo.table}},
        task="text-generation",
        dataset="python",
        split="validation",
        model=args.model or Path(demo.source).name,
        config={**dataclasses.asdict(args), **dataclasses.asdict(demo.size)},
        seed=args.seed,
        stages=demo.table,
        chat=chat,
    )
    return finish(
        {"stages": demo.table, "chat": chat, "seconds": results["metrics"]["seconds"], "output": args.output}
    )


if __name__ == "__main__":
    if "--from_scratch" in sys.argv:
        script = Path(__file__).with_name("from_scratch.py")
        rest = [word for word in sys.argv[1:] if word != "--from_scratch"]
        raise SystemExit(subprocess.run([sys.executable, str(script), *rest], check=False).returncode)
    start(main, [DemoArgs], __doc__)
