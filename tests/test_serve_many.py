"""Many clients of one server: all are answered at once, those beyond the limits are refused, those that leave end."""

import asyncio
import json
import os
import time

import pytest
from checkpoints import httpx, save_checkpoint
from serving import make_engine, served

pytest.importorskip("uvicorn", reason="the serve extra is not installed")

# asyncio's own threads, one of which each answer once held, are four more than the processors, 32 at most
MANY = min(32, (os.cpu_count() or 1) + 4) + 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint("causal", tmp_path_factory.mktemp("serve") / "tiny-lm")


def start(folder, **limits):
    engine = make_engine(folder, new_tokens=2000, **limits)
    engine.batch.ends.clear()  # answers have all their tokens
    return engine


async def stream(client, prompt: str, tokens: int) -> tuple[int, float, float]:
    """Status of a request, and when its first piece and its end came."""
    first = None
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        async for line in answer.aiter_lines():
            if first is None and line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                first = time.monotonic()
    return answer.status_code, first, time.monotonic()


async def ask_all(address: str, count: int, tokens: int) -> list[tuple[int, float, float]]:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, limits=limits, timeout=60) as client:
        return await asyncio.gather(*(stream(client, f"You may {number}", tokens) for number in range(count)))


def test_all_streams_run_at_once(folder):
    with served(start(folder, batch=MANY, waiting=MANY)) as address:
        statuses, first, ends = zip(*asyncio.run(ask_all(address, MANY, 60)))
    assert set(statuses) == {200} and max(first) < min(ends)


def test_streams_beyond_the_queue_are_told_to_come_later(folder):
    with served(start(folder, batch=2, waiting=3)) as address:
        statuses = [status for status, *_ in asyncio.run(ask_all(address, 12, 60))]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 3


@pytest.mark.parametrize("streamed", [True, False])
def test_clients_that_leave_end_their_answers(folder, streamed):
    engine = start(folder, batch=1)
    body = {"prompt": "You may", "max_tokens": 2000, "stream": streamed}

    def leave(address):
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=60) as answer:
            next(answer.iter_lines())

    with served(engine) as address:
        if streamed:
            leave(address)
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/v1/completions", json=body, timeout=0.2)
        end = time.monotonic() + 5
        while not engine.batch.is_idle and time.monotonic() < end:
            time.sleep(0.01)
        assert engine.batch.is_idle and 0 < engine.counters["generated_tokens"] < 2000
