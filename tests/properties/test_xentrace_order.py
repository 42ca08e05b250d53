"""Global order: by running maximum of a CPU's stamps, then CPU, then storage order, whatever the batches are."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsers.xentrace.boundaries import GUARD, STEPS, find_records, hop
from tests.recordings.xentrace_tools import Result, hop_file, read, record, window
from tests.shared import SAMPLES

RAW = (SAMPLES / "xen-2l-dom0-idle.xentrace").read_bytes()

#: CPU, then its windows: records are (stamped, step of the clock; negative steps go back).
Steps = list[tuple[bool, int]]
RECORD = st.tuples(st.sampled_from([True, True, True, False]), st.integers(-3, 40))
CPUS = st.dictionaries(st.integers(0, 5), st.lists(st.lists(RECORD, max_size=25), min_size=1, max_size=5), min_size=1)


def build(cpus: dict[int, list[Steps]], rng: random.Random) -> bytes:
    """Windows of the CPUs in a random interleaving that keeps each CPU's own order."""
    queues: dict[int, list[bytes]] = {}
    for cpu, windows in cpus.items():
        clock = 1000
        queues[cpu] = []
        for steps in windows:
            rows: list[bytes] = []
            for stamped, step in steps:
                clock += step
                rows.append(record(0x28006, [cpu, len(rows)], clock if stamped else None))
            queues[cpu].append(window(cpu, *rows))
    out = []
    while any(queues.values()):
        out.append(queues[rng.choice([cpu for cpu, queue in queues.items() if queue])].pop(0))
    return b"".join(out)


def expected_order(raw: bytes) -> list[int]:
    """Offsets of all records in global order, worked out one record at a time."""
    streams: dict[int, list[tuple[int, int | None, bool]]] = {}
    for offset, cpu, event, tsc, _ in hop_file(raw):
        streams.setdefault(cpu, []).append((offset, tsc, event == 0x1F003))
    keyed = []
    for cpu, stream in streams.items():
        high = next((tsc for _, tsc, _ in stream if tsc is not None), 0)
        keys = []
        for _, tsc, _ in stream:
            high = high if tsc is None else max(high, tsc)
            keys.append(high)
        for place, (offset, _, header) in enumerate(stream):
            follows = header and place + 1 < len(stream) and not stream[place + 1][2]
            keyed.append((keys[place + 1] if follows else keys[place], cpu, place, offset))
    return [offset for *_, offset in sorted(keyed)]


def offsets(result: Result) -> list[int]:
    return [row["offset"] for row in result.ordered()]


@settings(max_examples=80, deadline=None)
@given(CPUS, st.integers(0, 2**32), st.sampled_from([1, 60, 300, 3 << 20]))
def test_order_is_exact_whatever_the_batch_size(cpus: dict[int, list[Steps]], seed: int, batch: int) -> None:
    raw = build(cpus, random.Random(seed))
    result = read(raw, batch_words=batch)
    assert offsets(result) == expected_order(raw)


@pytest.mark.parametrize("batch", [2000, 20_000, 3 << 20])
def test_sample_in_small_batches(batch: int) -> None:
    assert offsets(read(RAW, batch_words=batch)) == expected_order(RAW)


def split(raw: bytes) -> dict[int, list[bytes]]:
    windows: dict[int, list[bytes]] = {}
    at = 0
    while at < len(raw):
        cpu = int.from_bytes(raw[at + 4 : at + 8], "little")
        end = at + 12 + int.from_bytes(raw[at + 8 : at + 12], "little")
        windows.setdefault(cpu, []).append(raw[at:end])
        at = end
    return windows


def test_windows_hugely_out_of_order() -> None:
    """All of CPU 3, then all of CPU 2, …: still one global order, in bounded batches."""
    windows = split(RAW)
    raw = b"".join(part for cpu in sorted(windows, reverse=True) for part in windows[cpu])
    result = read(raw, batch_words=8000)
    assert offsets(result) == expected_order(raw)
    tsc = [row["tsc"] for row in result.ordered() if row["tsc"] is not None]
    assert tsc == sorted(tsc)


def test_few_huge_windows() -> None:
    windows = split(RAW)
    raw = b"".join(
        window(cpu, *(part[12:] for part in parts)) for cpu, parts in windows.items()
    )
    assert offsets(read(raw, batch_words=5000)) == expected_order(raw)


def test_step_back_keeps_storage_order_and_is_noted() -> None:
    rows = [record(0x28006, [n, 0], tsc) for n, tsc in enumerate([100, 200, 150, 160, 300])]
    result = read(window(0, *rows))
    blocks = result.rows("TRC_SCHED_BLOCK")
    assert [row["dom"] for row in blocks] == [0, 1, 2, 3, 4]
    assert [row["t_ns"] for row in blocks] == [0, 100, 100, 100, 200]
    assert [row["tsc"] for row in blocks] == [100, 200, 150, 160, 300]
    (note,) = [note for note in result.notes if note.code == "xentrace-tsc-back"]
    assert (note.count, note.cpu) == (2, 0)


def test_unstamped_records_inherit_with_an_honest_error() -> None:
    rows = [record(0x82010), record(0x28006, [1, 1], 100), record(0x82010), record(0x82010)]
    raw = window(0, *rows) + window(1, record(0x28006, [1, 1], 120)) + window(0, record(0x28006, [1, 1], 180))
    result = read(raw)
    nmi = result.rows("TRC_HVM_NMI")
    assert [row["t_ns"] for row in nmi] == [0, 0, 0]
    assert [row["t_err_ns"] for row in nmi] == [None, 80, 80]
    assert [row["tsc"] for row in nmi] == [None] * 3


def test_cpu_without_stamps_has_no_times() -> None:
    result = read(window(0, record(0x28006, [1, 1], 100)) + window(1, record(0x82010)))
    assert result.rows("TRC_HVM_NMI")[0]["t_ns"] is None
    assert "xentrace-unstamped" in {note.code for note in result.notes}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=120), st.integers(0, 2**32))
def test_stepping_together_equals_hopping(lengths: list[int], seed: int) -> None:
    """Any words at all: the lockstep over all windows and the plain loop find the same records."""
    words = np.random.default_rng(seed).integers(0, 2**32, sum(lengths) + GUARD * len(lengths), np.uint32)
    check_records(words, lengths)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9000), min_size=1, max_size=4), st.integers(0, 2**32), st.sampled_from([1, 2, 16]))
def test_long_windows_are_walked_in_stretches(lengths: list[int], seed: int, kinds: int) -> None:
    """Few kinds of words: chains of records from wrong places then need long to meet the right one, or never do."""
    rng = np.random.default_rng(seed)
    words = rng.integers(0, 2**32, kinds, np.uint32)[rng.integers(0, kinds, sum(lengths) + GUARD * len(lengths))]
    check_records(words, lengths)


def test_chains_that_never_meet() -> None:
    """Every word looks like the header of the same length: what begins in a wrong place stays wrong."""
    words = np.full(20_000 + 2 * GUARD, 0x50021001, np.uint32)
    check_records(words, [12_001, 7_999])


def check_records(words: np.ndarray, lengths: list[int]) -> None:  # type: ignore[type-arg]
    ends = np.cumsum(np.array(lengths, np.int64) + GUARD) - GUARD
    starts = ends - np.array(lengths, np.int64)
    pos, landed = find_records(words, starts, ends)
    steps = words.view(np.uint8)[3::4].tobytes().translate(STEPS)
    expected: list[int] = []
    for lane, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        found, last = hop(steps, start, end)
        expected += found
        assert landed[lane] == last
    assert pos.tolist() == expected
