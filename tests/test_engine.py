"""The engine without HTTP: its queue and deadlines, choice of tokens, texts from tokens, calls of tools."""

import json
import sys
import time
from collections import Counter

import pytest
import torch
from checkpoints import save_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import make_engine
from transformers import RepetitionPenaltyLogitsProcessor

from modeling_flashlite.checkpoint import CheckpointArgs
from modeling_flashlite.serve.engine import Engine
from modeling_flashlite.serve.grammar import Grammars
from modeling_flashlite.serve.jobs import LIKELIEST, Answer, Job, Limits, QueueFull, Settings, TextAssembler, pick
from modeling_flashlite.serve.tools import split_calls


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("causal", tmp_path_factory.mktemp("serve") / "tiny-lm")


@pytest.fixture(scope="module")
def engine(folder):
    engine = make_engine(folder)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine_tokenizer(engine):
    return engine.tokenizer


def test_encoder_decoder_is_served(tmp_path):
    folder = save_checkpoint("seq2seq", tmp_path / "tiny-s2s")
    engine = Engine(CheckpointArgs(str(folder), device="cpu"), limits=Limits(new_tokens=8))
    jobs = [engine.submit(prompt, Settings(8, 0.0)) for prompt in engine.encode(["The Licensor grants.", "You"])]
    texts = ["".join(job) for job in jobs]
    for text, prompt in zip(texts, ("The Licensor grants.", "You")):
        inputs = engine.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        ids = engine.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0]
        assert text == engine.tokenizer.decode(ids, skip_special_tokens=True)
    assert engine.encode_chat([{"role": "user", "content": "You"}]) == engine.encode(["You"])[0]
    engine.close()


def test_requests_share_a_batch_and_the_queue_is_limited(engine):
    before = dict(engine.counters)
    prompt = engine.encode(["Licensed"])[0]
    jobs = [engine.submit(prompt, Settings(20, 0.0)) for _ in range(6)]
    with pytest.raises(QueueFull, match="answers are waiting already"):
        for _ in range(50):
            jobs.append(engine.submit(prompt, Settings(20, 0.0)))
    assert len({"".join(job) for job in jobs}) == 1
    steps = engine.counters["batches"] - before.get("batches", 0)
    assert steps < sum(job.new_tokens for job in jobs)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_generation_settings_of_the_checkpoint_do_not_break_answers(tmp_path, kind):
    folder = save_checkpoint(kind, tmp_path / "model")
    path = folder / "generation_config.json"
    odd = {"stop_strings": ["."], "num_return_sequences": 3, "num_beams": 4, "do_sample": True, "min_new_tokens": 2}
    odd |= {"return_dict_in_generate": True, "max_length": 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | odd))
    engine = Engine(CheckpointArgs(str(folder), device="cpu"), limits=Limits(seconds=60))
    try:
        jobs = [engine.submit(engine.encode(["You may not use"])[0], Settings(6, 0.0)) for _ in range(2)]
        texts = ["".join(job) for job in jobs]
        assert texts[0] == texts[1] and all(job.finish_reason in ("stop", "length") for job in jobs)
    finally:
        engine.close()


def test_deadline_and_cancellation_free_the_worker(engine):
    prompt = engine.encode(["Licensed"])[0]
    late = Job(prompt, Settings(50, 1.0, seed=0), time.monotonic() - 1)
    engine._waiting.put(late)
    assert "".join(late) == "" and late.finish_reason == "timeout"
    gone = engine.submit(prompt, Settings(50, 1.0, seed=0))
    gone.cancelled = True
    assert engine.submit(prompt, Settings(2, 0.0)) and list(gone) is not None
    assert gone.finish_reason == "cancelled"


def test_a_job_that_cannot_be_admitted_leaves_the_worker(engine):
    prompt = engine.encode(["Licensed"])[0]
    broken = Settings(4, 1.0)
    broken.seed = 2**70  # past the check of ranges, as any fault of our own would be
    job = engine.submit(prompt, broken)
    assert "".join(job) == "" and (job.finish_reason, job.error) == ("error", "generation failed")
    after = engine.submit(prompt, Settings(4, 0.0))
    assert list(after) and after.finish_reason == "length"


def test_tokens_are_chosen_by_the_settings():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])

    def draw(count, seed=None, **changes):
        generator = torch.Generator()
        generator.seed() if seed is None else generator.manual_seed(seed)
        return [pick(logits, Settings(1, **changes), generator) for _ in range(count)]

    assert draw(1, temperature=0.0) == [0]
    assert set(draw(50, top_p=0.5)) == {0}  # the first token alone holds more than half
    assert draw(20, seed=1) == draw(20, seed=1)
    assert (
        set(draw(200, top_k=2)) == {0, 1} and set(draw(200, min_p=0.3)) == {0, 1} and len(set(draw(400, top_k=9))) == 4
    )
    share = torch.bincount(torch.tensor(draw(4000)), minlength=4) / 4000
    torch.testing.assert_close(share, logits.softmax(-1), atol=0.04, rtol=0)
    logits = torch.linspace(1e-3, 0, 3 * LIKELIEST)  # more tokens than are sorted at first share what top_p asks for
    assert LIKELIEST < max(draw(300, top_p=0.8)) < 2.5 * LIKELIEST
    with pytest.raises(FloatingPointError, match="not numbers"):
        pick(torch.tensor([0.0, float("nan")]), Settings(1), torch.Generator())


@pytest.mark.parametrize("reads_prompt", [True, False])
def test_repetition_penalty_is_that_of_transformers(engine_tokenizer, reads_prompt):
    logits = torch.randn(len(engine_tokenizer), generator=torch.Generator().manual_seed(0))
    job = Job([3, 9], Settings(5, 0.0, repetition_penalty=1.7), time.monotonic() + 60)
    answer = Answer(job, engine_tokenizer, set(), Counter(), reads_prompt)
    answer.tokens = [4, 4, 11]
    seen = torch.tensor([[3, 9, 4, 4, 11] if reads_prompt else [4, 4, 11]])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(seen, logits[None].clone())[0]
    kept = logits.clone()
    assert answer.choose(logits) == int(expected.argmax()) and torch.equal(logits, kept)


def test_a_special_token_among_the_stop_texts_ends_the_answer(engine_tokenizer):
    asked = Job([0], Settings(9, 0.0, stop=["<|user|>", "never"]), time.monotonic() + 60)
    answer = Answer(asked, engine_tokenizer, set(), Counter())
    for token in engine_tokenizer("May you<|user|>")["input_ids"]:
        answer.take(token)
    assert "".join(asked) == "May you" and asked.finish_reason == "stop"


def test_penalties_count_the_answer_alone(engine_tokenizer):
    asked = Job([0, 0], Settings(5, 0.0, frequency_penalty=1.0), time.monotonic() + 60)
    answer = Answer(asked, engine_tokenizer, set(), Counter())
    logits = torch.zeros(len(engine_tokenizer))
    logits[:2] = torch.tensor([2.0, 1.5])
    chosen = []
    for _ in range(4):
        chosen.append(answer.choose(logits))
        answer.take(chosen[-1])
    assert chosen == [0, 1, 0, 1]


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_pieces_are_the_text_up_to_the_first_stop(engine_tokenizer, text, stop):
    ids = engine_tokenizer(text)["input_ids"]
    whole = engine_tokenizer.decode(ids, skip_special_tokens=True)
    assembler = TextAssembler(engine_tokenizer, stop)
    pieces = []
    for token in ids:
        pieces.append(assembler.add(token))
        if assembler.stopped:
            break
    pieces.append(assembler.finish())
    places = [whole.find(s) for s in stop if s in whole]
    assert not any("\ufffd" in piece for piece in pieces) or "\ufffd" in whole
    # the earliest text to be complete ends the answer, which may begin before another that was found first
    if not places:
        assert "".join(pieces) == whole
    else:
        assert whole.startswith("".join(pieces)) and assembler.stopped


@settings(max_examples=20, deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), st.integers(), max_size=2), max_size=3), st.text(max_size=20))
def test_calls_are_read_and_broken_ones_stay_text(calls, said):
    said = said.replace("<", "")
    marks = [f"<tool_call>\n{json.dumps({'name': 'f', 'arguments': call})}\n</tool_call>" for call in calls]
    content, found = split_calls(said + "".join(marks))
    assert [json.loads(call["function"]["arguments"]) for call in found] == calls
    assert content == (said if not calls else said.strip() or None)
    for broken in ('{"name": 1}', '{"name": "f", "arguments": "x"}', "[]", "{", '"f"'):
        text = f"{said}<tool_call>{broken}</tool_call>"
        assert split_calls(text) == (text, [])


def test_json_answers_without_their_extra_are_one_sentence(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(ImportError, match=r"pip install 'flashlite\[json\]'"):
        Grammars(engine.tokenizer, engine.vocabulary, {2})
