"""Range asymmetric numeral systems over packed int4 codes: many short independent lanes, decoded side by side.

One numpy step decodes one byte (two codes) of every lane of every chunk given, across tensors; that is what makes many
small streams fast. The payload's layout is documented in `codec_flashlite.py`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence

import numpy as np

from .huffman_flashlite import CodecError

_PROB_BITS = 15
_STATE_LOW = 1 << 16
_LANE_SYMBOLS = 4096  # aimed at by the encoder; 48 bits a lane make 0.2% at 2.5 bits per weight
_MAX_LANE_SYMBOLS = 8192  # what a decoder accepts; bounds its steps
_HEAD = 18


def _nibble_levels(histogram: np.ndarray) -> np.ndarray:
    """16 bytes of -16 log2(probability) from the histogram of packed bytes; 255 where a nibble never occurs."""
    table = histogram.reshape(16, 16)
    counts = table.sum(0) + table.sum(1)
    levels = np.full(16, 255, dtype=np.uint8)
    used = counts > 0
    levels[used] = np.clip(np.rint(-16 * np.log2(counts[used] / counts.sum())), 0, 254)
    return levels


def pair_frequencies(levels: np.ndarray) -> np.ndarray:
    """Frequencies of the 256 bytes, summing to 2**15, at least 1 where both nibbles occur; integer arithmetic."""
    mantissa = np.array([math.floor((1 << 24) * 2 ** (-j / 16) + 0.5) for j in range(16)], dtype=np.int64)
    levels = levels.astype(np.int64)
    p = np.where(levels < 255, np.maximum(mantissa[levels % 16] >> (levels // 16), 1), 0)
    if not p.any():
        raise CodecError("The rANS table has no symbol; fetch the file again.")
    p = np.where(p > 0, np.maximum((p << 24) // p.sum(), 1), 0)
    product = np.outer(p, p).reshape(-1)
    total = 1 << _PROB_BITS
    frequencies = np.where(product > 0, np.maximum((product + (1 << 32)) >> (48 - _PROB_BITS), 1), 0)
    frequencies[np.argmax(frequencies)] += total - frequencies.sum()
    return frequencies


def _lane_shape(symbols: int) -> tuple[int, int]:
    """(lanes, symbols in a lane) that the encoder chooses for a chunk."""
    lanes = max(1, round(symbols / _LANE_SYMBOLS))
    return lanes, -(-symbols // lanes)


class Rans:
    """rANS plan of one chunk: table, lanes and expected size."""

    def __init__(self, histogram: np.ndarray):
        self.levels = _nibble_levels(histogram)
        self.frequencies = pair_frequencies(self.levels)
        self.lanes, self.steps = _lane_shape(int(histogram.sum()))
        used = histogram > 0
        bits = (histogram[used] * (_PROB_BITS - np.log2(self.frequencies[used]))).sum()
        self.size = _HEAD + 5 * self.lanes + math.ceil(bits / 8)


def rans_encode(jobs: Sequence[tuple[np.ndarray, Rans]]) -> list[bytes]:
    """Encode chunks (packed bytes, plan) side by side; the payload of each."""
    steps = max(plan.steps for _, plan in jobs)
    edges = np.cumsum([0] + [plan.lanes for _, plan in jobs])
    lanes = int(edges[-1])
    symbols = np.full((steps, lanes), -1, dtype=np.int32)  # -1: this lane is shorter
    for i, (data, plan) in enumerate(jobs):
        block = np.full(plan.steps * plan.lanes, int(np.argmax(plan.frequencies)), dtype=np.int32)
        block[: data.size] = data
        symbols[: plan.steps, edges[i] : edges[i + 1]] = block.reshape(plan.steps, plan.lanes) + 256 * i
    frequency = np.concatenate([plan.frequencies for _, plan in jobs])
    start = np.concatenate([np.cumsum(plan.frequencies) - plan.frequencies for _, plan in jobs])
    state = np.full(lanes, _STATE_LOW, dtype=np.int64)
    words = np.zeros((lanes, steps), dtype="<u2")
    free = np.full(lanes, steps, dtype=np.int64)  # words are written backwards, so they lie in reading order
    for row in symbols[::-1]:
        live = np.flatnonzero(row >= 0)
        f, x = frequency[row[live]], state[live]
        full = np.flatnonzero(x >= f << (32 - _PROB_BITS))
        at = live[full]
        free[at] -= 1
        words[at, free[at]] = x[full] & 0xFFFF
        x[full] >>= 16
        high, low = np.divmod(x, f)
        state[live] = (high << _PROB_BITS) + low + start[row[live]]
    kept = np.arange(steps) >= free[:, None]
    payloads = []
    for i, (_, plan) in enumerate(jobs):
        own = slice(edges[i], edges[i + 1])
        head = plan.levels.tobytes() + struct.pack("<H", plan.lanes) + (steps - free[own]).astype("<u2").tobytes()
        payloads.append(head + state[own].astype("<u4").tobytes() + words[own][kept[own]].tobytes())
    return payloads


class Lanes:
    """Parsed and length-checked rANS payload of one chunk of `size` symbols."""

    def __init__(self, payload: memoryview, size: int):
        if len(payload) < _HEAD:
            raise CodecError(f"rANS payload of {len(payload)} bytes is shorter than its header; fetch the file again.")
        self.size, (self.lanes,) = size, struct.unpack_from("<H", payload, 16)
        words_at = _HEAD + 6 * self.lanes
        if not 1 <= self.lanes <= size or len(payload) < words_at:
            raise CodecError(f"rANS payload has {self.lanes} lanes for {size} symbols; fetch the file again.")
        self.steps = -(-size // self.lanes)
        self.words_per_lane = np.frombuffer(payload, "<u2", self.lanes, _HEAD).astype(np.int64)
        self.states = np.frombuffer(payload, "<u4", self.lanes, _HEAD + 2 * self.lanes).astype(np.int64)
        count = int(self.words_per_lane.sum())
        if self.steps > _MAX_LANE_SYMBOLS or len(payload) != words_at + 2 * count or self.states.min() < _STATE_LOW:
            raise CodecError("rANS payload contradicts its own lengths; fetch the file again.")
        self.words = np.frombuffer(payload, "<u2", count, words_at)
        self.levels = np.frombuffer(payload, np.uint8, 16)

    def table(self) -> np.ndarray:
        """Symbol, frequency and offset in one int64 for each of the 2**15 slots."""
        frequencies = pair_frequencies(self.levels)
        start = np.cumsum(frequencies) - frequencies
        entry = (np.arange(256, dtype=np.int64) << 48) | (frequencies << 24)
        return np.repeat(entry - start, frequencies) + np.arange(1 << _PROB_BITS)


def rans_decode(jobs: Sequence[Lanes]) -> Iterator[np.ndarray]:
    """Decode chunks side by side. `jobs` are sorted by falling `steps`; yields the packed bytes of each."""
    lane_counts = [job.lanes for job in jobs]
    edges = np.cumsum([0] + lane_counts)
    tables = np.empty(len(jobs) << _PROB_BITS, dtype=np.int64)
    for table, job in zip(tables.reshape(len(jobs), -1), jobs):
        table[:] = job.table()
    base = np.repeat(np.arange(len(jobs), dtype=np.int64) << _PROB_BITS, lane_counts)
    words = np.concatenate([job.words for job in jobs] + [np.zeros(1, "<u2")])
    counts = np.concatenate([job.words_per_lane for job in jobs])
    end = np.cumsum(counts)
    read = end - counts
    state = np.concatenate([job.states for job in jobs])
    symbols = np.empty((jobs[0].steps, len(state)), dtype=np.uint8)
    mask = (1 << _PROB_BITS) - 1
    ends_at = np.array([job.steps for job in jobs])
    for step in range(jobs[0].steps):
        live = int(edges[np.count_nonzero(ends_at > step)])
        x = state[:live]
        slot = x & mask
        slot += base[:live]
        entry = tables.take(slot)
        np.right_shift(entry, 48, out=symbols[step, :live], casting="unsafe")
        x >>= _PROB_BITS
        x *= (entry >> 24) & 0xFFFFFF
        entry &= 0xFFFFFF
        x += entry
        low = np.flatnonzero(x < _STATE_LOW)
        if low.size:
            at = read[low]
            read[low] = at + 1
            x[low] = (x[low] << 16) | words.take(at, mode="clip")  # a damaged lane may overrun; found out below
    if (read != end).any() or (state != _STATE_LOW).any():
        raise CodecError("A rANS lane does not end where it should; fetch the file again.")
    for i, job in enumerate(jobs):
        yield symbols[: job.steps, edges[i] : edges[i + 1]].reshape(-1)[: job.size]


def rans_batches(jobs: list) -> list[list]:
    """Group jobs, tuples whose first entry has `lanes` and `steps`, by falling steps into batches of bounded memory.

    A batch holds at most 64 chunks (each has its table) and 2**23 symbols, unless it is a single chunk; shorter lanes
    waste at most as much room as all of them fill.
    """
    batches: list[list] = []
    lanes = symbols = 0
    for job in sorted(jobs, key=lambda j: -j[0].steps):
        lanes, symbols = lanes + job[0].lanes, symbols + job[0].lanes * job[0].steps
        room = batches[-1][0][0].steps * lanes if batches else 0
        if batches and len(batches[-1]) < 64 and symbols <= 1 << 23 and room <= 2 * symbols + (1 << 16):
            batches[-1].append(job)
        else:
            batches.append([job])
            lanes, symbols = job[0].lanes, job[0].lanes * job[0].steps
    return batches
