# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Generation for many readers at once: jobs with their own settings, batched into one `generate`, streamed as text."""

import logging
import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ..checkpoint import CheckpointArgs, load_language_model, read_tokenizer
from ..data.tokenization import end_tokens

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a server accepts; everything above is refused before it costs anything.

    Args:
        prompt_tokens (`int`): longest prompt.
        new_tokens (`int`): most tokens one answer may have.
        batch (`int`): most answers generated at once.
        waiting (`int`): most answers waiting for their turn.
        choices (`int`): most answers (prompts times `n`) of one request.
        seconds (`float`): longest a request may take, waiting included.
    """

    prompt_tokens: int = 4096
    new_tokens: int = 1024
    batch: int = 8
    waiting: int = 64
    choices: int = 8
    seconds: float = 120.0


@dataclass
class Settings:
    """How one answer is generated; `temperature` 0 is greedy.

    Args:
        max_tokens (`int`): most new tokens.
        temperature (`float`), top_p (`float`): sampling.
        frequency_penalty, presence_penalty (`float`): logits taken off per earlier occurrence, and once.
        stop (`list[str]`): texts that end the answer; they are not part of it.
        seed (`int`, *optional*): the same seed gives the same answer, whatever else is in the batch.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: list[str] = field(default_factory=list)
    seed: int | None = None


class QueueFull(RuntimeError):
    """Too many answers are waiting; try again later."""


class TextAssembler:
    """Turns token ids into text as they come: never half a character, never a part of a stop text.

    Args:
        tokenizer: with `decode`.
        stop (`list[str]`): texts that end the answer.
    """

    def __init__(self, tokenizer, stop: list[str]):
        self.tokenizer, self.stop = tokenizer, stop
        self.stopped = False
        self._ids: list[int] = []
        self._start, self._read = 0, 0
        self._held = ""

    def add(self, token: int) -> str:
        """Take one token and return the text that is now certain."""
        self._ids.append(token)
        return self._release(self._decode_new(final=False), final=False)

    def finish(self) -> str:
        """Return what was held back, when no token follows."""
        return "" if self.stopped else self._release(self._decode_new(final=True), final=True)

    def _decode_new(self, final: bool) -> str:
        # decoding from a little earlier keeps spaces right; its cost does not grow with the answer
        known = self.tokenizer.decode(self._ids[self._start : self._read], skip_special_tokens=True)
        text = self.tokenizer.decode(self._ids[self._start :], skip_special_tokens=True)
        if text.endswith("\ufffd") and not final and len(self._ids) - self._read < 8:
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _release(self, new: str, final: bool) -> str:
        text = self._held + new
        found = [place for stop in self.stop if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0
        if not final:
            lengths = (n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
            keep = max(lengths, default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class Job:
    """One answer in the making. Read it by iterating: text pieces, until the job is finished.

    Args:
        prompt (`list[int]`): token ids.
        settings (`Settings`): how to generate.
        deadline (`float`): time by `time.monotonic` after which the job is dropped.
    """

    def __init__(self, prompt: list[int], settings: Settings, deadline: float):
        self.prompt, self.settings, self.deadline = prompt, settings, deadline
        self.new_tokens = 0
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.cancelled = False
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def finish(self, reason: str, error: str | None = None) -> None:
        """End the job; later calls change nothing."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.pieces.put(None)

    def __iter__(self):
        while True:
            try:
                # a little longer than the worker, which can say more about the end
                piece = self.pieces.get(timeout=max(0.0, self.deadline - time.monotonic()) + 1.0)
            except queue.Empty:
                self.finish("timeout")
                continue
            if piece is None:
                return
            yield piece


class RowSampler(LogitsProcessor):
    """Chooses each row's token by the row's own settings and random generator, whatever the other rows want.

    All other tokens get `-inf`, so that greedy `generate` takes the chosen one.
    """

    def __init__(self, jobs: list[Job], prompt_length: int):
        self.settings = [job.settings for job in jobs]
        self.prompt_length = prompt_length
        self.generators = [torch.Generator() for _ in jobs]
        for generator, settings in zip(self.generators, self.settings):
            if settings.seed is None:
                generator.seed()
            else:
                generator.manual_seed(settings.seed)

    def __call__(self, input_ids, scores):
        chosen = torch.full_like(scores, float("-inf"))
        for row, settings in enumerate(self.settings):
            logits = scores[row].float().cpu()
            if settings.frequency_penalty or settings.presence_penalty:
                counts = torch.bincount(input_ids[row, self.prompt_length :].cpu(), minlength=logits.numel())
                logits = logits - settings.frequency_penalty * counts - settings.presence_penalty * (counts > 0)
            chosen[row, self._pick(logits, settings, self.generators[row])] = 0.0
        return chosen

    @staticmethod
    def _pick(logits, settings: Settings, generator: torch.Generator) -> int:
        if settings.temperature < 1e-3:
            return int(logits.argmax())
        probabilities = (logits / settings.temperature).softmax(-1)
        if settings.top_p < 1.0:
            ordered, order = probabilities.sort(descending=True)
            # keep the smallest set that reaches top_p: the tokens before which less than that has gathered
            beyond = ordered.cumsum(-1) - ordered >= settings.top_p
            beyond[0] = False
            ordered[beyond] = 0.0
            probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
        return int(torch.multinomial(probabilities, 1, generator=generator))


class RowStop(StoppingCriteria):
    """Hands each row's new token to its job and ends the row at its own limit, stop text or deadline."""

    def __init__(self, jobs: list[Job], tokenizer, ends: set[int], counters: Counter):
        self.jobs, self.ends, self.counters = jobs, ends, counters
        self.texts = [TextAssembler(tokenizer, job.settings.stop) for job in jobs]

    def __call__(self, input_ids, scores, **kwargs):
        for job, text, token in zip(self.jobs, self.texts, input_ids[:, -1].tolist()):
            if job.finish_reason is not None:
                continue
            if job.cancelled or time.monotonic() > job.deadline:
                job.finish("cancelled" if job.cancelled else "timeout")
                continue
            job.new_tokens += 1
            self.counters["generated_tokens"] += 1
            piece = "" if token in self.ends else text.add(token)
            if token in self.ends:
                piece = text.finish()
            elif not text.stopped and job.new_tokens >= job.settings.max_tokens:
                piece += text.finish()
            if piece:
                job.pieces.put(piece)
            if token in self.ends or text.stopped:
                job.finish("stop")
            elif job.new_tokens >= job.settings.max_tokens:
                job.finish("length")
        done = [job.finish_reason is not None for job in self.jobs]
        return torch.tensor(done, device=input_ids.device, dtype=torch.bool)


class Engine:
    """One model, one worker thread, many jobs: those that wait are generated together.

    Args:
        checkpoint (`CheckpointArgs`): what to load.
        name (`str`, *optional*): what readers call it; defaults to the id or the folder's name.
        limits (`Limits`, *optional*): what is accepted.
    """

    def __init__(self, checkpoint: CheckpointArgs, name: str | None = None, limits: Limits | None = None):
        self.limits = limits or Limits()
        folder = Path(checkpoint.model)
        self.name = name or (folder.resolve().name if folder.is_dir() else checkpoint.model)
        self.tokenizer = read_tokenizer(checkpoint.model, **checkpoint.hub)
        self.model = load_language_model(
            checkpoint.model, device=checkpoint.device, dtype=checkpoint.dtype, **checkpoint.hub
        )
        self.is_encoder_decoder = self.model.config.is_encoder_decoder
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.counters: Counter = Counter()
        self._ends = self._end_tokens()
        self._waiting: queue.Queue[Job | None] = queue.Queue()
        self._worker = threading.Thread(target=self._work, name="generate", daemon=True)
        self._worker.start()

    def _end_tokens(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        found = set(ends if isinstance(ends, list) else [ends]) | {self.tokenizer.eos_token_id}
        # the end of a turn, which the config may not name
        found |= set(end_tokens(self.tokenizer))
        return found - {None}

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Turn texts into prompts."""
        return [self.tokenizer(text)["input_ids"] for text in texts]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Turn a conversation into a prompt; an encoder-decoder reads the last message."""
        if self.is_encoder_decoder:
            return self.tokenizer(messages[-1]["content"])["input_ids"]
        if self.tokenizer.chat_template is None:
            text = "".join(f"{message['content']}\n" for message in messages)
            return self.tokenizer(text)["input_ids"]
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"]

    def submit(self, prompt: list[int], settings: Settings) -> Job:
        """Queue one answer.

        Raises:
            QueueFull: too many are waiting.
            ValueError: the prompt is empty, too long, or has unknown tokens.
        """
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        if not prompt:
            raise ValueError("The prompt is empty; give at least one token.")
        if len(prompt) > self.limits.prompt_tokens:
            raise ValueError(f"The prompt has {len(prompt)} tokens, the limit is {self.limits.prompt_tokens}; cut it.")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"The prompt has a token outside 0..{vocabulary - 1}; use this model's tokenizer.")
        if self._waiting.qsize() >= self.limits.waiting:
            raise QueueFull(f"{self.limits.waiting} answers are waiting already; try again in a moment.")
        job = Job(prompt, settings, time.monotonic() + self.limits.seconds)
        self._waiting.put(job)
        return job

    @property
    def waiting(self) -> int:
        """Number of answers in the queue."""
        return self._waiting.qsize()

    def close(self, timeout: float = 30.0) -> None:
        """Finish what is running and end the worker."""
        self._waiting.put(None)
        self._worker.join(timeout)

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            jobs, closing = [job], False
            while len(jobs) < self.limits.batch:
                try:
                    # a short wait lets requests that arrive together share a batch
                    follower = self._waiting.get(timeout=0.005)
                except queue.Empty:
                    break
                if closing := follower is None:
                    break
                jobs.append(follower)
            self._run([job for job in jobs if self._is_wanted(job)])
            if closing:
                break
        while not self._waiting.empty():
            if (job := self._waiting.get()) is not None:
                job.finish("cancelled", "the server is stopping")

    @staticmethod
    def _is_wanted(job: Job) -> bool:
        if job.cancelled or time.monotonic() > job.deadline:
            job.finish("cancelled" if job.cancelled else "timeout")
        return job.finish_reason is None

    def _run(self, jobs: list[Job]) -> None:
        if not jobs:
            return
        try:
            self._generate(jobs)
        except Exception:
            logger.exception("a batch of %d answers failed", len(jobs))
            self.counters["failed_batches"] += 1
        for job in jobs:
            job.finish("error", "generation failed")

    @torch.inference_mode()
    def _generate(self, jobs: list[Job]) -> None:
        inputs = self.tokenizer.pad(
            {"input_ids": [job.prompt for job in jobs]}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        prompt_length = 1 if self.is_encoder_decoder else inputs["input_ids"].shape[1]
        self.counters["batches"] += 1
        self.counters["batched_answers"] += len(jobs)
        self.counters["prompt_tokens"] += sum(len(job.prompt) for job in jobs)
        self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max(job.settings.max_tokens for job in jobs),
            do_sample=False,
            num_beams=1,
            # the rows end by RowStop alone, which also knows the end tokens
            eos_token_id=None,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([RowSampler(jobs, prompt_length)]),
            stopping_criteria=StoppingCriteriaList([RowStop(jobs, self.tokenizer, self._ends, self.counters)]),
        )
