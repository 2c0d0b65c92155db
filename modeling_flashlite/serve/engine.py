# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Generation for concurrent clients: one worker thread runs their jobs and streams the text."""

import contextlib
import functools
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch
from jinja2 import TemplateError
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..checkpoint import CheckpointArgs, add_adapter, load_language_model, read_tokenizer
from ..data.tokenization import end_tokens
from .continuous import ContinuousBatch
from .grammar import Grammars
from .jobs import Answer, Job, Limits, QueueFull, Settings

logger = logging.getLogger(__name__)


class RowSampler(LogitsProcessor):
    """Each answer samples its row's token; all others get `-inf`, so that greedy `generate` selects it."""

    def __init__(self, answers: list[Answer]):
        self.answers = answers

    def __call__(self, input_ids, scores):
        chosen = torch.full_like(scores, float("-inf"))
        for row, answer in enumerate(self.answers):
            chosen[row, answer.choose(scores[row])] = 0.0
        return chosen


class RowStop(StoppingCriteria):
    """Passes each row's new token to its answer, and ends the row when the answer is complete."""

    def __init__(self, answers: list[Answer]):
        self.answers = answers

    def __call__(self, input_ids, scores, **kwargs):
        for answer, token in zip(self.answers, input_ids[:, -1].tolist()):
            answer.take(token)
        return torch.tensor([answer.done for answer in self.answers], device=input_ids.device, dtype=torch.bool)


class Engine:
    """One model, one worker thread, many jobs.

    Decoder-only models run a continuous batch (see [`ContinuousBatch`]). Encoder-decoders, and models whose caches
    cannot hold rows of different lengths, generate in whole batches of those jobs that wait.

    Args:
        checkpoint (`CheckpointArgs`): what to load.
        name (`str`, *optional*): what readers call it; defaults to the id or the folder's name.
        limits (`Limits`, *optional*): what is accepted.
        base (`Engine`, *optional*): of the model that `checkpoint`, an adapter, belongs to; its weights are shared.
    """

    def __init__(
        self,
        checkpoint: CheckpointArgs,
        name: str | None = None,
        limits: Limits | None = None,
        base: "Engine | None" = None,
    ):
        self.limits = limits or Limits()
        folder = Path(checkpoint.model)
        self.name = name or (folder.resolve().name if folder.is_dir() else checkpoint.model)
        self.counters: Counter = Counter()
        self._waiting: queue.Queue[Job | None] = queue.Queue()
        # the worker loads, too: each thread that computes has a team of OpenMP threads, and two teams that share the
        # processor sleep between operations, which makes a token take twice as long
        loaded: Future = Future()
        arguments = checkpoint, base, loaded
        self._worker = threading.Thread(target=self._work, args=arguments, name="generate", daemon=True)
        self._worker.start()
        loaded.result()

    def _load(self, checkpoint: CheckpointArgs, base: "Engine | None") -> None:
        folder = Path(checkpoint.model)
        if base is None:
            self.tokenizer = read_tokenizer(checkpoint.model, **checkpoint.hub)
            self.model = load_language_model(
                checkpoint.model, device=checkpoint.device, dtype=checkpoint.dtype, **checkpoint.hub
            )
        else:
            own = (folder / "tokenizer_config.json").is_file()
            self.tokenizer = read_tokenizer(checkpoint.model, **checkpoint.hub) if own else base.tokenizer
            self.model = add_adapter(base.model, checkpoint.model)
        self.is_encoder_decoder = self.model.config.is_encoder_decoder
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self._ends = set(end_tokens(self.tokenizer, self.model.generation_config))
        self.batch = self._continuous_batch()

    def _work(self, checkpoint: CheckpointArgs, base: "Engine | None", loaded: Future) -> None:
        """Load, and run jobs until [`close`]."""
        try:
            self._load(checkpoint, base)
        except BaseException as error:
            loaded.set_exception(error)
            return
        loaded.set_result(None)
        if self.batch is None:
            self._work_in_batches()
        else:
            self._work_continuously(self.batch)

    def _continuous_batch(self) -> ContinuousBatch | None:
        if self.is_encoder_decoder:
            return None
        try:
            return ContinuousBatch(self.model, self.tokenizer, self._ends, self.limits, self.counters)
        except TypeError as error:
            logger.warning("%s It generates in whole batches instead.", error)
            return None

    @property
    def vocabulary(self) -> int:
        """Number of the model's logits."""
        return self.model.config.get_text_config(decoder=True).vocab_size

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Compiles grammars of answers; raises `ImportError` without the `json` extra."""
        return Grammars(self.tokenizer, self.vocabulary, self._ends)

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Turn texts into prompts."""
        return [self.tokenizer(text)["input_ids"] for text in texts]

    def encode_chat(self, messages: list[dict], tools: list[dict] | None = None) -> list[int]:
        """Turn a conversation, and descriptions of tools, into a prompt; an encoder-decoder reads the last message.

        Raises:
            ValueError: the chat template refuses the messages.
        """
        if self.is_encoder_decoder:
            return self.tokenizer(messages[-1]["content"])["input_ids"]
        if self.tokenizer.chat_template is None:
            text = "".join(f"{message['content']}\n" for message in messages)
            return self.tokenizer(text)["input_ids"]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
        except TemplateError as error:
            raise ValueError(f"The chat template refuses these messages: {error}") from None

    def submit(self, prompt: list[int], settings: Settings, put: Callable[[str | None], None] | None = None) -> Job:
        """Queue one answer, to be read by iteration, or by `put` (see [`Job`]).

        Raises:
            QueueFull: too many are waiting.
            ValueError: the prompt is empty, too long, or has unknown tokens, or asks for what the model cannot give.
        """
        if not prompt:
            raise ValueError("The prompt is empty; give at least one token.")
        if len(prompt) > self.limits.prompt_tokens:
            raise ValueError(f"The prompt has {len(prompt)} tokens, the limit is {self.limits.prompt_tokens}; cut it.")
        if min(prompt) < 0 or max(prompt) >= self.vocabulary:
            raise ValueError(f"The prompt has a token outside 0..{self.vocabulary - 1}; use this model's tokenizer.")
        job = Job(prompt, settings, time.monotonic() + self.limits.seconds, put)
        if self.batch is None and settings.logprobs is not None:
            raise ValueError("logprobs need a decoder-only model; leave them out.")
        if self.batch is not None and self.batch.bytes_of(job) > self.limits.cache_bytes:
            raise ValueError(
                f"Prompt and answer may take {self.batch.bytes_of(job)} bytes of cache, the limit is "
                f"{self.limits.cache_bytes}; ask for fewer tokens."
            )
        if not settings.max_tokens and settings.logprobs is None:
            job.finish("length")
            return job
        if self._waiting.qsize() >= self.limits.waiting:
            raise QueueFull(f"{self.limits.waiting} answers are waiting already; try again in a moment.")
        self._waiting.put(job)
        return job

    @property
    def waiting(self) -> int:
        """Number of answers in the queue."""
        return self._waiting.qsize()

    def close(self, timeout: float = 30.0) -> None:
        """Finish running jobs and stop the worker."""
        self._waiting.put(None)
        self._worker.join(timeout)

    def _cancel_waiting(self) -> None:
        while not self._waiting.empty():
            if (job := self._waiting.get()) is not None:
                job.finish("cancelled", "the server is stopping")

    def _work_continuously(self, batch: ContinuousBatch) -> None:
        held, closing = None, False
        session = getattr(self.model, "_optimize_model_for_decode", contextlib.nullcontext)
        while not (closing and batch.is_idle):
            if batch.is_idle and held is None:
                held = self._waiting.get()  # sleeps until a request arrives
                closing = closing or held is None
            with session():
                while not batch.is_idle or held is not None:
                    held, closing = self._admit(batch, held, closing)
                    with self._failing_apart(batch.abandon):
                        batch.step()
        if held is not None:
            held.finish("cancelled", "the server is stopping")
        self._cancel_waiting()

    def _admit(self, batch: ContinuousBatch, held: Job | None, closing: bool) -> tuple[Job | None, bool]:
        """Start jobs in their order while there is room; returns the first that has to wait, and the wish to close."""
        while True:
            if held is None and not closing:
                try:
                    held = self._waiting.get_nowait()
                    closing = held is None
                except queue.Empty:
                    pass
            if held is None:
                return None, closing
            if not held.is_wanted():
                held = None
            elif batch.admits(held):
                with self._failing_apart(partial(list, [held])):
                    batch.admit(held)
                held = None
            else:
                return held, closing

    @contextlib.contextmanager
    def _failing_apart(self, abandoned: Callable[[], list[Job]]) -> Iterator[None]:
        """A failure inside ends the answers that `abandoned` names with an error; the worker goes on."""
        try:
            yield
        except Exception:
            jobs = abandoned()
            logger.exception("a batch of %d answers failed", len(jobs))
            self.counters["failed_batches"] += 1
            for job in jobs:
                job.finish("error", "generation failed")

    def _work_in_batches(self) -> None:
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
            if wanted := [job for job in jobs if job.is_wanted()]:
                with self._failing_apart(partial(list, wanted)):
                    self._generate(wanted)
                for job in wanted:
                    job.finish("error", "generation failed")  # nothing where the answer has ended
            if closing:
                break
        self._cancel_waiting()

    @torch.inference_mode()
    def _generate(self, jobs: list[Job]) -> None:
        inputs = self.tokenizer.pad(
            {"input_ids": [job.prompt for job in jobs]}, padding_side="left", return_tensors="pt"
        ).to(self.model.device)
        self.counters["batches"] += 1
        self.counters["batched_answers"] += len(jobs)
        self.counters["prompt_tokens"] += sum(len(job.prompt) for job in jobs)
        alone = not self.is_encoder_decoder
        answers = [Answer(job, self.tokenizer, self._ends, self.counters, alone) for job in jobs]
        self.model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max(job.settings.max_tokens for job in jobs),
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            # the rows end by RowStop alone, which also knows the end tokens
            eos_token_id=None,
            stop_strings=None,
            pad_token_id=self.tokenizer.pad_token_id,
            logits_processor=LogitsProcessorList([RowSampler(answers)]),
            stopping_criteria=StoppingCriteriaList([RowStop(answers)]),
        )
