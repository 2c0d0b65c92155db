# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Stages of the demonstration on a real model: convert, read sparsely, quantize, adapt by LoRA, reload, answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data.batching import PaddingCollator, pack, tokenize_texts
from ..data.corpus import python_corpus
from ..ecq_config_flashlite import EcqConfig
from ..measure.cost import measure_generation
from ..measure.parity import full_attention, perplexity
from ..measure.perplexity import label_likelihood
from .calibration import quantize
from .conversion import convert
from .lora import add_lora
from .parents import random_llama, smollm2
from .sampling import Conversation, conversation_rows, write_conversations
from .stages import Stages, reload_elsewhere, weight_cost

__all__ = ["SIZES", "PretrainedStages", "Size"]


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


class PretrainedStages(Stages):
    """The stages; each is a method that fills its folder and returns a row of the table.

    Args:
        root (`Path`): the folder.
        made_with (`Mapping`): arguments; a folder made with other arguments is refused.
        seed (`int`): of data order and adapters.
        size (`Size`): how much is read and trained.
        target_bits (`float`): budget of the quantized file, bits per weight.
        question (`str`): for the finished model.
    """

    def __init__(self, root: Path, made_with: Mapping, seed: int, size: Size, target_bits: float, question: str):
        super().__init__(root, made_with, seed)
        self.size, self.target_bits, self.question = size, target_bits, question
        self.corpus, self.source = python_corpus(), ""
        self.talks: list[Conversation] = []
        self.float_model, self.codes = self.root / "converted" / "model", self.root / "quantized"

    def random_parent(self, folder: Path) -> dict:
        """A small random model, for a run that only tries the machinery."""
        return {"model": random_llama(folder, self.corpus["train"]["text"][:600])}

    def parent(self, folder: Path) -> dict:
        """A small real model."""
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
        speed = measure_generation(plain, self.tok, [self.question], new_tokens=16, repeats=2)
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
        quantize(model, EcqConfig(target_bits=self.target_bits), batches, resume=folder / "trainer")
        model.save_pretrained(folder)
        self.tok.save_pretrained(folder)
        return self.measure(AutoModelForCausalLM.from_pretrained(folder), folder)

    def lora(self, folder: Path) -> dict:
        """Low-rank adapters on the quantized model learn the task, on the stock Trainer; the conversations remind."""
        objects = self.corpus["train"].shuffle(self.seed).select(range(4 * self.size.steps - len(self.talks)))
        pairs = [self.entry(row) for row in objects]
        pairs += [(question["content"], answer["content"]) for question, answer in self.talks]
        model = add_lora(AutoModelForCausalLM.from_pretrained(self.codes), r=8)
        lessons, steps = Dataset.from_list([self.lesson(*pair) for pair in pairs]), self.size.steps
        self.fit(model, lessons, folder, collator=PaddingCollator(self.tok), steps=steps, batch=4, learning_rate=1e-3)
        model.save_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(self.codes)
        return self.measure(PeftModel.from_pretrained(base, folder), self.codes, adapter=folder)

    def answered(self, folder: Path) -> dict:
        """Base and adapter answer where the package cannot be imported, with the logits that they have here."""
        chat = [{"role": "user", "content": self.question}]
        answer = reload_elsewhere(self.codes, self.root / "lora", chat, max_new_tokens=40, do_sample=False)
        return {"question": self.question, "answer": answer}
