"""Continuous batching: an answer equals that of `generate` alone, whatever runs beside it."""

import copy
import time
from collections import Counter

import pytest
import torch
from checkpoints import make_model, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from modeling_flashlite.serve.continuous import ContinuousBatch, join_caches
from modeling_flashlite.serve.jobs import Job, Limits, Settings

SHAPE = {
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "flashlite": lambda: make_model("causal"),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)).eval(),
}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]().double()


def start(model, tokenizer, **limits):
    return ContinuousBatch(model, tokenizer, set(), Limits(**limits), Counter())


def job(prompt, max_tokens=12, **changes):
    return Job(list(prompt), Settings(max_tokens, 0.0, **changes), time.monotonic() + 600)


def prompt_of(seed: int, length: int) -> list[int]:
    return torch.randint(5, 400, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def finish(batch, *answers):
    while not batch.is_idle:
        batch.step()
    assert all(answer.finish_reason == "length" for answer in answers)


def alone(model, prompt, count):
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
    return made[0, len(prompt) :].tolist()


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 90), st.integers(1, 20), st.integers(0, 6)), min_size=1, max_size=5
    )
)
def test_each_answer_equals_generate_alone(model, tokenizer, rows):
    """Rows of any lengths, joining after any number of steps: block, relevance and grid axis are all in use."""
    batch = start(model, tokenizer, batch=8)
    running = []
    for seed, length, count, steps in rows:
        answer = job(prompt_of(seed, length), count)
        assert batch.admits(answer)
        batch.admit(answer)
        running.append((batch.prompts[-1].answer, answer, count))
        for _ in range(steps):
            batch.step()
    finish(batch, *(answer for _, answer, _ in running))
    for written, answer, count in running:
        assert written.tokens == alone(model, answer.prompt, count)


def test_joined_caches_give_the_logits_of_each_row(model):
    caches, rows = [], [prompt_of(1, 70), prompt_of(2, 19), prompt_of(3, 41)]
    with torch.inference_mode():
        for row in rows:
            caches.append(DynamicCache(config=model.config))
            model(input_ids=torch.tensor([row]), past_key_values=caches[-1], use_cache=True)
        joined = copy.deepcopy(caches[0])
        for cache in caches[1:]:
            join_caches(joined, copy.deepcopy(cache))
        mask = torch.stack([torch.cat([torch.zeros(70 - len(row)), torch.ones(len(row) + 1)]) for row in rows]).long()
        new = torch.tensor([[7], [8], [9]])
        arguments = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
        logits = model(input_ids=new, past_key_values=joined, use_cache=True, **arguments).logits
        for row, cache in enumerate(caches):
            expected = model(input_ids=new[row : row + 1], past_key_values=cache, use_cache=True).logits
            torch.testing.assert_close(logits[row : row + 1], expected, atol=1e-12, rtol=0)


def test_an_empty_cache_has_no_rows_to_join():
    model = make_model("causal")
    cache = model.new_memory()
    with pytest.raises(ValueError, match="run the prompt first"):
        join_caches(cache, copy.deepcopy(cache))


def test_prompts_that_begin_alike_share_their_keys(model, tokenizer):
    system = prompt_of(4, 100)
    batch = start(model, tokenizer)
    for tail in ([11, 12], [13], [11, 12, 14]):
        answer = job([*system, *tail], 6)
        batch.admit(answer)
        written = batch.prompts[-1].answer
        finish(batch, answer)
        assert written.tokens == alone(model, answer.prompt, 6)
    assert batch.counters["shared_prompt_tokens"] >= 2 * len(system)


def test_prompts_that_wait_together_are_read_together(model, tokenizer, monkeypatch):
    batch, read, shapes = start(model, tokenizer, batch=8), ContinuousBatch._read_outside, []
    monkeypatch.setattr(
        ContinuousBatch, "_read_outside", lambda *a, **k: shapes.append(tuple(a[1].shape)) or read(*a, **k)
    )
    jobs = [job(prompt_of(seed, length), 6) for seed, length in ((0, 30), (1, 44), (2, 7), (3, 900), (4, 9))]
    for each in jobs:
        batch.admit(each)
    answers = [prompt.answer for prompt in batch.prompts]
    batch.step()
    assert shapes == [(3, 44)]  # the fourth does not fit into the chunk with them
    finish(batch, *jobs)
    for answer, each in zip(answers, jobs):
        assert answer.tokens == alone(model, each.prompt, 6)


def test_prompts_that_begin_alike_share_their_keys_when_they_come_at_once(model, tokenizer):
    system = prompt_of(4, 100)
    batch = start(model, tokenizer)
    jobs = [job([*system, *prompt_of(seed, length)], 6) for seed, length in ((5, 3), (6, 12), (7, 1))]
    for each in jobs:
        batch.admit(each)
    answers = [prompt.answer for prompt in batch.prompts]
    finish(batch, *jobs)
    assert batch.counters["shared_prompt_tokens"] == 2 * len(system)
    for answer, each in zip(answers, jobs):
        assert answer.tokens == alone(model, each.prompt, 6)


def test_memory_is_bounded_and_requests_keep_their_order(model, tokenizer):
    batch = start(model, tokenizer)
    batch.limits = Limits(cache_bytes=batch.token_bytes * 100)
    first, second, small = job(prompt_of(0, 40), 20), job(prompt_of(1, 40), 20), job(prompt_of(2, 5), 5)
    assert batch.admits(first)
    batch.admit(first)
    assert not batch.admits(second) and batch.admits(small)
    finish(batch, first)
    assert batch.admits(second)


def test_long_prompts_do_not_block_running_answers(model, tokenizer):
    batch = start(model, tokenizer)
    running = job(prompt_of(0, 5), 30)
    batch.admit(running)
    batch.step()
    batch.admit(job(prompt_of(1, 1000), 2))
    before = running.new_tokens
    while batch.prompts:
        batch.step()
    assert running.new_tokens - before >= 7  # one token between two chunks of 128


def test_log_probabilities_of_prompt_and_answer(model, tokenizer):
    prompt = prompt_of(3, 150)
    asked = job(prompt, 3, logprobs=2, echo=True)
    batch = start(model, tokenizer)
    batch.admit(asked)
    finish(batch, asked)
    ids = [*prompt, *(token for token, _, _ in asked.logprobs[len(prompt) :])]
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    assert [entry.token for entry in asked.logprobs] == ids and asked.logprobs[0].logprob is None
    given = torch.tensor([entry.logprob for entry in asked.logprobs[1:]])
    torch.testing.assert_close(given, expected[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0], atol=1e-5, rtol=0)
    assert all(len(entry.top) == 2 and entry.top[0][1] >= entry.top[1][1] for entry in asked.logprobs[1:])


def test_cancelled_and_late_jobs_leave_the_batch(model, tokenizer):
    batch = start(model, tokenizer)
    gone, late, stays = job(prompt_of(0, 30), 50), job(prompt_of(1, 9), 50), job(prompt_of(2, 17), 10)
    for answer in (gone, late, stays):
        batch.admit(answer)
    written = batch.prompts[-1].answer
    for _ in range(4):
        batch.step()
    gone.cancelled, late.deadline = True, 0.0
    finish(batch, stays)
    assert (gone.finish_reason, late.finish_reason) == ("cancelled", "timeout")
    assert written.tokens == alone(model, stays.prompt, 10)


def test_windows_cannot_join(tokenizer):
    model = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=16)).eval()
    with pytest.raises(TypeError, match="cannot join"):
        start(model, tokenizer)
