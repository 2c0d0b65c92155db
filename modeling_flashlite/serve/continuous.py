# Copyright 2026 The Flash-Lite team. Licensed under the Apache License, Version 2.0.
"""Continuous batching: answers join and leave one running batch between two tokens.

Prompts are read in chunks, one chunk between two steps of the batch, so a long prompt delays running answers by one
chunk at a time; prompts that fit into a chunk together are read together. Answers are admitted in order of arrival, as
long as the largest possible keys and values of all of them fit into `Limits.cache_bytes`. Prompts that share a prefix
with an earlier one, such as a system message, reuse its keys and values.

Shapes: B rows, C columns of the cache (padding included), V vocabulary.
"""

import contextvars
import copy
from collections import Counter, deque

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from ..compat_flashlite import CACHE
from .jobs import Answer, Job, Limits, TokenLogprob, token_logprobs

# prompt tokens read between two steps of the batch, and while nothing else runs
CHUNK, ALONE_CHUNK = 128, 1024
# number of prompts whose keys are kept for sharing, and the shortest prefix worth copying
KEPT_PROMPTS, SHORTEST_PREFIX = 4, 64


def join_caches(cache: DynamicCache, *others: DynamicCache) -> None:
    """Append the rows of `others` to `cache`; the newest columns of all become one column, shorter rows get padding.

    Raises:
        TypeError: a layer of the caches cannot hold padding, e.g. one with a sliding window.
    """
    for layer, *more in zip(cache.layers, *(other.layers for other in others), strict=True):
        if hasattr(layer, "append_rows"):
            layer.append_rows(*more)
        elif type(layer) is DynamicLayer:
            width = max(part.get_seq_length() for part in (layer, *more))
            layer.keys = torch.cat([_pad_left(part.keys, width) for part in (layer, *more)])
            layer.values = torch.cat([_pad_left(part.values, width) for part in (layer, *more)])
        else:
            raise TypeError(f"Rows of a {type(layer).__name__} cannot join a running batch.")


def split_cache(cache: DynamicCache, mask: torch.Tensor) -> list[DynamicCache]:
    """The rows of `cache` as caches of their own, without the padding of `mask` (bool `[B, C]`)."""
    caches = []
    for index, real in enumerate(mask):
        row = copy.copy(cache)
        row.layers = [
            layer.row(index) if hasattr(layer, "row") else _real_columns(layer, index, real) for layer in cache.layers
        ]
        caches.append(row)
    return caches


def _real_columns(layer: DynamicLayer, index: int, real: torch.Tensor) -> DynamicLayer:
    row = copy.copy(layer)
    row.keys, row.values = (states[index : index + 1][:, :, real] for states in (layer.keys, layer.values))
    return row


def _pad_left(states: torch.Tensor, width: int) -> torch.Tensor:
    """`[B, N, S, H]` -> `[B, N, width, H]`."""
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0))


def _left(rows: list[torch.Tensor]) -> torch.Tensor:
    """Rows of any lengths as one matrix, padded with 0 on the left."""
    return pad_sequence(rows, batch_first=True, padding_side="left")


def _shared(tokens: list[int], others: list[int]) -> int:
    """How many tokens two texts begin with in common."""
    return next((i for i, (a, b) in enumerate(zip(tokens, others)) if a != b), min(len(tokens), len(others)))


class Prompt:
    """A prompt being read chunk by chunk before it joins the batch; `cache` is `None` before its first chunk."""

    def __init__(self, answer: Answer):
        self.answer, self.tokens = answer, answer.job.prompt
        self.cache: DynamicCache | None = None
        self.read = 0

    @property
    def rest(self) -> list[int]:
        """Tokens that are not read yet."""
        return self.tokens[self.read :]


class ContinuousBatch:
    """Generates many answers of one decoder-only model at once; driven by calls of [`ContinuousBatch.step`].

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer: of the model.
        ends (`set[int]`): tokens that end every answer.
        limits (`Limits`): `batch` and `cache_bytes`.
        counters (`Counter`): `generated_tokens`, `prompt_tokens`, `shared_prompt_tokens`, `batches` (steps) and
            `batched_answers` (rows of all steps) are raised.
    """

    def __init__(self, model, tokenizer, ends: set[int], limits: Limits, counters: Counter):
        self.model, self.tokenizer, self.ends = model, tokenizer, ends
        self.limits, self.counters = limits, counters
        self.answers: list[Answer] = []
        self.prompts: deque[Prompt] = deque()
        self.cache: DynamicCache | None = None
        self.mask = torch.zeros(0, 0, dtype=torch.long)
        self.newest: list[int] = []
        self._kept: deque[tuple[list[int], DynamicCache]] = deque(maxlen=KEPT_PROMPTS)
        self.token_bytes = self._token_bytes()

    @torch.inference_mode()
    def _token_bytes(self) -> int:
        """Bytes of keys and values of one token; also finds out whether rows of this model can join.

        Raises:
            TypeError: they cannot.
        """
        _, cache = self._read_outside(torch.tensor([[0]]), DynamicCache(config=self.model.config))
        join_caches(cache, copy.deepcopy(cache))
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // 2

    def bytes_of(self, job: Job) -> int:
        """Largest size of the job's keys and values."""
        return (len(job.prompt) + job.settings.max_tokens) * self.token_bytes

    @property
    def is_idle(self) -> bool:
        """Whether no job is running or starting."""
        return not self.answers and not self.prompts

    def admits(self, job: Job) -> bool:
        """Whether the job can start now: there is a row for it, and memory for its keys and values."""
        running = [answer.job for answer in self.answers] + [prompt.answer.job for prompt in self.prompts]
        taken = sum(map(self.bytes_of, running))
        return not running or (
            len(running) < self.limits.batch and taken + self.bytes_of(job) <= self.limits.cache_bytes
        )

    def admit(self, job: Job) -> None:
        """Start a job; its prompt is read in the next steps."""
        self.counters["prompt_tokens"] += len(job.prompt)
        self.prompts.append(Prompt(Answer(job, self.tokenizer, self.ends, self.counters)))

    def _shared_prefix(self, job: Job) -> tuple[DynamicCache, int]:
        """A cache of the longest prefix that the prompt shares with a kept prompt, and its length."""
        best, longest = None, 0 if job.settings.echo else SHORTEST_PREFIX - 1
        for tokens, cache in self._kept if not job.settings.echo else ():
            # the last token is always read: its logits choose the first new one
            same = min(_shared(tokens, job.prompt), len(job.prompt) - 1)
            if same > longest:
                best, longest = (cache, len(tokens)), same
        if best is not None:
            cache, length = copy.deepcopy(best[0]), best[1]
            try:
                cache.crop(longest - length)
                return cache, longest
            except ValueError:  # tokens beyond the window of a bounded memory are gone
                pass
        return DynamicCache(config=self.model.config), 0

    @torch.inference_mode()
    def step(self) -> None:
        """Read one chunk of the oldest prompts, then give each running answer one token."""
        self._drop_finished()
        if self.prompts:
            self._read(CHUNK if self.answers else ALONE_CHUNK)
        if self.answers:
            self._decode()

    def abandon(self) -> list[Job]:
        """Reset after a failure; returns the jobs that were running."""
        jobs = [answer.job for answer in (*self.answers, *(prompt.answer for prompt in self.prompts))]
        self.answers, self.newest, self.cache = [], [], None
        self.prompts.clear()
        self._kept.clear()
        return jobs

    def _drop_finished(self) -> None:
        self.prompts = deque(prompt for prompt in self.prompts if prompt.answer.job.is_wanted())
        keep = [row for row, answer in enumerate(self.answers) if not answer.done and answer.job.is_wanted()]
        if len(keep) == len(self.answers):
            return
        self.answers = [self.answers[row] for row in keep]
        self.newest = [self.newest[row] for row in keep]
        if not keep or self.cache is None:
            self.cache = None
            return
        self.cache.batch_select_indices(torch.tensor(keep, device=self.model.device))
        self.mask = self.mask[keep]
        # columns that are padding in all remaining rows
        empty = int(self.mask.any(0).int().argmax())
        if empty:
            self.mask = self.mask[:, empty:]
            for layer in self.cache.layers:
                if hasattr(layer, "drop_columns"):
                    layer.drop_columns(empty)
                else:
                    layer.keys, layer.values = layer.keys[:, :, empty:], layer.values[:, :, empty:]

    def _read_outside(self, ids: torch.Tensor, cache: DynamicCache, whole: bool = False, **columns):
        """Logits `[B, T or 1, V]` of prompt tokens `[B, T]`, and the cache that now holds them.

        Prompts are read in a separate context: the decoding session belongs to the running batch, and would restart
        for every other cache.
        """
        arguments = {name: value.to(self.model.device) for name, value in {"input_ids": ids, **columns}.items()}
        if not whole:
            arguments["logits_to_keep"] = 1
        outputs = contextvars.Context().run(self.model, **arguments, **{CACHE: cache}, use_cache=True)
        return outputs.logits, cache

    def _read(self, size: int) -> None:
        """Read `size` tokens at most of the oldest prompts; those that are read to the end join the batch."""
        prompts = self._next_prompts(size)
        if len(prompts) == 1:
            logits = self._read_alone(prompts[0], size)
        else:
            logits = self._read_together(prompts)
        started = []
        for prompt, newest in zip(prompts, logits):
            if prompt.rest:
                continue
            self.prompts.popleft()
            if len(prompt.tokens) >= SHORTEST_PREFIX and self._fits_kept(prompt):
                self._kept.append((prompt.tokens, copy.deepcopy(prompt.cache)))
            if not prompt.answer.job.settings.max_tokens:
                prompt.answer.job.finish("length")
                continue
            token = prompt.answer.choose(newest)
            prompt.answer.take(token, newest)
            if not prompt.answer.done:
                started.append((prompt, token))
        self._join(started)

    def _next_prompts(self, size: int) -> list[Prompt]:
        """The oldest prompt, and those behind it whose rest fits into the same `size` tokens, padding included.

        All of them have a cache, or none has, and a prompt that is echoed is read alone. A prompt that begins like one
        of them waits, and will share its keys.
        """
        together: list[Prompt] = []
        longest = 0
        for prompt in self.prompts:
            if not prompt.read:
                if any(_shared(prompt.tokens, other.tokens) >= SHORTEST_PREFIX for other in together):
                    break
                prompt.cache, prompt.read = self._shared_prefix(prompt.answer.job)
                self.counters["shared_prompt_tokens"] += prompt.read
            longest = max(longest, len(prompt.rest))
            echoes = any(each.answer.job.settings.echo for each in (*together, prompt))
            alike = not together or bool(prompt.read) == bool(together[0].read)
            if together and (echoes or not alike or longest * (len(together) + 1) > size):
                break
            together.append(prompt)
        return together

    def _read_alone(self, prompt: Prompt, size: int) -> torch.Tensor:
        """Logits `[1, V]` of the newest token of a chunk of one prompt."""
        job, chunk = prompt.answer.job, prompt.rest[:size]
        logits, _ = self._read_outside(torch.tensor([chunk]), prompt.cache, whole=job.settings.echo)
        if job.settings.echo:
            self._echo(job, prompt, chunk, logits[0])
        prompt.read += len(chunk)
        return logits[:, -1]

    def _read_together(self, prompts: list[Prompt]) -> torch.Tensor:
        """Logits `[B, V]` of the newest tokens of several prompts, whose rests are read as rows of one batch."""
        cache = prompts[0].cache
        if prompts[0].read:
            join_caches(cache, *(prompt.cache for prompt in prompts[1:]))
        ids = _left([torch.tensor(prompt.rest) for prompt in prompts])
        read, new = (
            [torch.ones(length, dtype=torch.long) for length in lengths]
            for lengths in zip(*((prompt.read, len(prompt.rest)) for prompt in prompts))
        )
        mask = torch.cat([_left(read), _left(new)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        logits, _ = self._read_outside(ids, cache, attention_mask=mask, position_ids=positions)
        for prompt, row in zip(prompts, split_cache(cache, mask.bool())):
            prompt.cache, prompt.read = row, len(prompt.tokens)
        return logits[:, -1]

    def _fits_kept(self, prompt: Prompt) -> bool:
        """Kept prompts may take a quarter of the memory in addition."""
        lengths = [len(prompt.tokens), *(len(tokens) for tokens, _ in self._kept)]
        known = any(tokens[: len(prompt.tokens)] == prompt.tokens for tokens, _ in self._kept)
        return not known and sum(lengths) * self.token_bytes * 4 <= self.limits.cache_bytes

    def _echo(self, job: Job, prompt: Prompt, chunk: list[int], logits: torch.Tensor) -> None:
        """Record the log-probabilities of the prompt's tokens from logits `[T, V]` of one chunk."""
        if job.settings.logprobs is None:
            return
        if not job.logprobs:
            job.logprobs.append(TokenLogprob(prompt.tokens[0], None, []))
        following = prompt.tokens[prompt.read + 1 : prompt.read + len(chunk) + 1]
        job.logprobs += token_logprobs(logits[: len(following)], following, job.settings.logprobs)

    def _join(self, started: list[tuple[Prompt, int]]) -> None:
        """Add completely read prompts, with their first new tokens, as rows of the batch."""
        if not started:
            return
        rows = [] if self.cache is None else [*self.mask]
        caches = [] if self.cache is None else [self.cache]
        caches += [prompt.cache for prompt, _ in started]
        self.cache = caches[0]
        if len(caches) > 1:
            join_caches(self.cache, *caches[1:])
        self.mask = _left(rows + [torch.ones(len(prompt.tokens), dtype=torch.long) for prompt, _ in started])
        self.answers += [prompt.answer for prompt, _ in started]
        self.newest += [token for _, token in started]

    def _decode(self) -> None:
        """One token for each row."""
        self.counters["batches"] += 1
        self.counters["batched_answers"] += len(self.answers)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.answers), 1)], 1)
        mask = self.mask.to(self.model.device)
        logits = self.model(
            input_ids=torch.tensor(self.newest, device=self.model.device)[:, None],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            **{CACHE: self.cache},
            use_cache=True,
        ).logits[:, -1]
        for row, answer in enumerate(self.answers):
            if not answer.done:
                self.newest[row] = answer.choose(logits[row])
                answer.take(self.newest[row], logits[row])
