# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""One answer to one prompt: limits, sampling settings, and incremental text."""

import math
import queue
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .grammar import Grammar, GrammarError

__all__ = [
    "LIKELIEST",
    "RANGES",
    "Answer",
    "Job",
    "Limits",
    "QueueFull",
    "Settings",
    "TextAssembler",
    "TokenLogprob",
    "pick",
    "special_tokens",
]

# least and largest value of each number in `Settings`, whoever gives it: a flag, a command or a request
RANGES: dict[str, tuple[float, float]] = {
    "max_tokens": (0, math.inf),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 10),  # logits are divided by it, and must stay finite
    "frequency_penalty": (-2, 2),
    "presence_penalty": (-2, 2),
    "seed": (-(2**63), 2**63 - 1),
}


@dataclass(frozen=True)
class Limits:
    """Limits of a server; requests beyond them are refused before any work.

    Args:
        prompt_tokens (`int`): longest prompt.
        new_tokens (`int`): most tokens one answer may have.
        batch (`int`): most answers generated at once.
        waiting (`int`): most answers waiting for their turn.
        choices (`int`): most answers (prompts times `n`) of one request.
        seconds (`float`): longest a request may take, waiting included.
        cache_bytes (`int`): memory for keys and values of all answers generated at once, by their largest sizes.
    """

    prompt_tokens: int = 4096
    new_tokens: int = 1024
    batch: int = 16
    waiting: int = 64
    choices: int = 8
    seconds: float = 120.0
    cache_bytes: int = 2 << 30

    def __post_init__(self):
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"The limit {name} is {value}, but must be above 0.")


@dataclass
class Settings:
    """How one answer is generated; `temperature` 0 is greedy. Numbers outside [`RANGES`] are a `ValueError`.

    Args:
        max_tokens (`int`): most new tokens; 0 only with `echo`.
        temperature (`float`), top_p (`float`), top_k (`int`, 0 for all), min_p (`float`): sampling.
        repetition_penalty (`float`): divides the logits of tokens that are in prompt or answer, as in transformers.
        frequency_penalty, presence_penalty (`float`): logits taken off per earlier occurrence, and once.
        stop (`list[str]`): texts, or special tokens, that end the answer; they are not part of it.
        seed (`int`, *optional*): the same seed gives the same answer, whatever else is in the batch.
        logprobs (`int`, *optional*): log-probabilities of each token and of this many of the likeliest ones.
        echo (`bool`): log-probabilities of the prompt's tokens too.
        grammar (`Grammar`, *optional*): what the answer must follow, see `grammar.py`.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    logprobs: int | None = None
    echo: bool = False
    grammar: Grammar | None = None

    def __post_init__(self):
        for name, (least, largest) in RANGES.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= largest:
                raise ValueError(f"{name} is {value}, but must be from {least} to {largest}.")
        if not (self.max_tokens or self.echo):
            raise ValueError("max_tokens is 0, which only makes sense with echo; ask for at least 1.")


# tokens that are sorted for top_p; all of them only if these do not reach it
LIKELIEST = 1024


class TokenLogprob(NamedTuple):
    """A token, its log-probability in nats (`None` for the first token of a prompt), and the likeliest ones."""

    token: int
    logprob: float | None
    top: list[tuple[int, float]]


class QueueFull(RuntimeError):
    """Too many answers are waiting; try again later."""


def special_tokens(tokenizer) -> dict[str, int]:
    """Tokens that decoded text leaves out, by what they are called."""
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


class TextAssembler:
    """Turns token ids into text incrementally: never a partial character, never a part of a stop text.

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
        """Add one token and return the text that is final."""
        self._ids.append(token)
        return self._release(self._decode_new(final=False), final=False)

    def finish(self) -> str:
        """Return the withheld text at the end."""
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
    """One answer being generated. Iterate over it to read text pieces until the job is finished.

    Args:
        prompt (`list[int]`): token ids.
        settings (`Settings`): how to generate.
        deadline (`float`): time by `time.monotonic` after which the job is dropped.
        put (`Callable`, *optional*): takes each piece of text, and `None` at the end, in the thread that generates
            them; then there is nothing to iterate over.
    """

    def __init__(
        self,
        prompt: list[int],
        settings: Settings,
        deadline: float,
        put: Callable[[str | None], None] | None = None,
    ):
        self.prompt, self.settings, self.deadline = prompt, settings, deadline
        self.new_tokens = 0
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.error: str | None = None
        self.cancelled = False
        self.pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.put = put or self.pieces.put

    def finish(self, reason: str, error: str | None = None) -> None:
        """End the job; later calls change nothing."""
        if self.finish_reason is None:
            self.finish_reason, self.error = reason, error
            self.put(None)

    def is_wanted(self) -> bool:
        """Whether somebody still waits for it; a job that was cancelled or is late ends here."""
        if self.cancelled or time.monotonic() > self.deadline:
            self.finish("cancelled" if self.cancelled else "timeout")
        return self.finish_reason is None

    def __iter__(self):
        while True:
            try:
                # slightly longer than the worker's limit, whose message is more specific
                piece = self.pieces.get(timeout=max(0.0, self.deadline - time.monotonic()) + 1.0)
            except queue.Empty:
                self.finish("timeout")
                continue
            if piece is None:
                return
            yield piece


def pick(logits: torch.Tensor, settings: Settings, generator: torch.Generator) -> int:
    """Choose one token from logits `[V]`, float32 on the CPU."""
    if settings.temperature < 1e-3:
        return int(logits.numpy().argmax())  # NumPy's is ten times as fast as PyTorch's
    logits = logits / settings.temperature
    if 0 < settings.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[-1], float("-inf"))
    probabilities = logits.softmax(-1)
    if settings.min_p:
        probabilities = probabilities.where(probabilities >= settings.min_p * probabilities.max(), 0.0)
        probabilities = probabilities / probabilities.sum()
    if settings.top_p == 1.0:
        return _draw(probabilities, generator)
    ordered, order = probabilities.topk(min(LIKELIEST, len(probabilities)))
    if ordered.sum() < settings.top_p:
        ordered, order = probabilities.sort(descending=True)
    # keep the smallest set that reaches top_p: tokens with less than that accumulated before them
    beyond = ordered.cumsum(-1) - ordered >= settings.top_p
    beyond[0] = False
    return int(order[_draw(ordered.masked_fill(beyond, 0.0), generator)])


def _draw(weights: torch.Tensor, generator: torch.Generator) -> int:
    """One place of weights `[V]`, as often as it weighs; `torch.multinomial` draws a number for each of them."""
    sums = weights.double().cumsum(-1)
    if not sums[-1] > 0:
        raise FloatingPointError("The model's logits are not numbers.")
    return int(
        torch.searchsorted(sums, sums[-1:] * torch.rand(1, generator=generator, dtype=torch.double), right=True)
    )


class Answer:
    """The tokens of one job: chooses each by the job's settings, hands its text on and ends the job.

    Args:
        job (`Job`): what was asked.
        tokenizer: of the model.
        ends (`set[int]`): tokens that end every answer.
        counters (`Counter`): `generated_tokens` is raised.
        reads_prompt (`bool`, *optional*, defaults to `True`): whether the prompt stands before the answer, as in a
            decoder-only model; then `repetition_penalty` counts it too.
    """

    def __init__(self, job: Job, tokenizer, ends: set[int], counters: Counter, reads_prompt: bool = True):
        self.job, self.ends, self.counters = job, ends, counters
        if job.settings.stop:  # the text has no special tokens, so they are looked for among the tokens
            self.ends = ends | {
                token for name, token in special_tokens(tokenizer).items() if name in job.settings.stop
            }
        self.before = job.prompt if reads_prompt else []
        self.text = TextAssembler(tokenizer, job.settings.stop)
        self.tokens: list[int] = []
        self.constraint = None if job.settings.grammar is None else job.settings.grammar.start()
        self.generator = torch.Generator()
        if job.settings.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(job.settings.seed)

    @property
    def done(self) -> bool:
        """Whether the job has ended."""
        return self.job.finish_reason is not None

    def choose(self, logits: torch.Tensor) -> int:
        """The next token, from the model's logits `[V]`."""
        settings, logits = self.job.settings, logits.float().cpu()
        if settings.repetition_penalty != 1.0 and (seen := sorted({*self.before, *self.tokens})):
            # reduces the logit, whether positive or negative
            factor = torch.where(logits[seen] < 0, settings.repetition_penalty, 1 / settings.repetition_penalty)
            logits = logits.index_put((torch.tensor(seen),), logits[seen] * factor)
        if settings.frequency_penalty or settings.presence_penalty:
            counts = torch.bincount(torch.tensor(self.tokens, dtype=torch.long), minlength=logits.numel())
            logits = logits - settings.frequency_penalty * counts - settings.presence_penalty * (counts > 0)
        if self.constraint is not None:
            try:
                logits = self.constraint.mask(logits)
            except GrammarError as error:
                self.job.finish("error", str(error))
        return pick(logits, settings, self.generator)

    def take(self, token: int, logits: torch.Tensor | None = None) -> None:
        """Add one token to the answer, unless the job has ended; `logits` `[V]` are what it was chosen from."""
        job = self.job
        if self.done or not job.is_wanted():
            return
        self.tokens.append(token)
        if self.constraint is not None:
            self.constraint.take(token)
        job.new_tokens += 1
        self.counters["generated_tokens"] += 1
        if logits is not None and job.settings.logprobs is not None:
            job.logprobs += token_logprobs(logits[None], [token], job.settings.logprobs)
        ended = token in self.ends
        full = job.new_tokens >= job.settings.max_tokens
        piece = "" if ended else self.text.add(token)
        if ended or (full and not self.text.stopped):
            piece += self.text.finish()
        if piece:
            job.put(piece)
        if ended or self.text.stopped:
            job.finish("stop")
        elif full:
            job.finish("length")


def token_logprobs(logits: torch.Tensor, tokens: list[int], top: int) -> list[TokenLogprob]:
    """Log-probabilities of `tokens` under logits `[T, V]`, with the `top` likeliest tokens of each place."""
    logprobs = logits.float().log_softmax(-1).cpu()
    best = logprobs.topk(min(top, logprobs.shape[1]))
    return [
        TokenLogprob(token, float(row[token]), list(zip(indices.tolist(), values.tolist())))
        for token, row, indices, values in zip(tokens, logprobs, best.indices, best.values)
    ]
