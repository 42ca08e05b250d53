"""Stamps changed by damage: a record loses its own time and no other's; that is a gap, and no rule errs there."""

from __future__ import annotations

import itertools
import random
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsers.xentrace.stamps import FAR_TICKS, LONGEST_DAMAGE, spikes
from tests.damage.test_xentrace_damage import windows_of
from tests.recordings.xentrace_tools import Result, hop_file, read, record, window
from tests.shared import SAMPLES, shared_path
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Choice, Settings, replay_dataset
from tracetool.store import Dataset

RAW = (SAMPLES / "xen-2l-dom0-idle.xentrace").read_bytes()
#: (offset, CPU, stamp) of the stamped records.
STAMPED = [(offset, cpu, tsc) for offset, cpu, _, tsc, _ in hop_file(RAW) if tsc is not None]
#: The first and the last of each CPU: nothing before or after them says what their stamp should have been.
FIRST = {cpu: offset for offset, cpu, _ in reversed(STAMPED)}
LAST = {cpu: offset for offset, cpu, _ in STAMPED}


def times(result: Result) -> dict[int, int]:
    """Stamped records' time in ticks by their offset."""
    tsc0 = result.reader.clock.tsc0
    rows = (row for row in result.ordered() if row["tsc"] is not None)
    return {row["offset"]: row["t_ns"] + tsc0 for row in rows}


def with_stamps(changed: dict[int, int], raw: bytes = RAW) -> bytes:
    """The sample with other stamps in the records at these offsets."""
    data = bytearray(raw)
    for offset, stamp in changed.items():
        struct.pack_into("<Q", data, offset + 4, stamp)
    return bytes(data)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(STAMPED) - 1), st.integers(21, 63), st.sampled_from([8000, 3 << 20]))
def test_one_changed_bit_costs_one_record_its_time(which: int, bit: int, batch: int) -> None:
    offset, cpu, true = STAMPED[which]
    wrong = true ^ 1 << bit
    # Nothing says that the lowest stamp of a CPU is too low, nor that the highest is too high.
    if offset == (FIRST[cpu] if wrong < true else LAST[cpu]):
        return
    result = read(with_stamps({offset: wrong}), batch_words=batch, cpu_hz=1e9)
    got = times(result)
    moved = [abs(got[at] - t) for at, _, t in STAMPED if at != offset and got[at] != t]
    if got[offset] == wrong:
        # Of two that contradict each other while both fit to the rest, one is believed; a little too high is skew.
        assert sum(far > FAR_TICKS for far in moved) <= 1
    else:
        assert not moved
        (gap,) = result.gaps
        assert (gap.reason, gap.cpu) == ("damaged", cpu)
        (row,) = (row for row in result.ordered() if row["offset"] == offset)
        assert got[offset] == gap.t0
        if offset in (FIRST[cpu], LAST[cpu]):
            assert gap.t1 is row["t_err_ns"] is None  # nobody knows how much earlier or later
        else:
            assert gap.t0 + row["t_err_ns"] == gap.t1
            assert gap.t0 <= true <= gap.t1


@pytest.mark.parametrize("seed", range(6))
def test_many_changed_stamps_cost_only_their_records_the_time(seed: int) -> None:
    """Too high and too low ones, mixed, half of them in rows of up to 20."""
    rng = random.Random(seed)
    bad: dict[int, int] = {}
    for _ in range(12):
        at = rng.randrange(len(STAMPED) - 60)
        for offset, cpu, true in STAMPED[at : at + rng.choice((1, 20))]:
            if offset not in (FIRST[cpu], LAST[cpu]):
                bad[offset] = true + rng.choice((1, -1)) * rng.randrange(int(FAR_TICKS), 1 << rng.randrange(22, 38))
    result = read(with_stamps(bad), cpu_hz=1e9)
    got = times(result)
    moved = [at for at, _, t in STAMPED if at not in bad and abs(got[at] - t) > FAR_TICKS]
    # The most are believed, so that each true stamp that is not has a wrong one in its place.
    assert len(moved) <= len(bad)
    assert [gap for gap in result.gaps if gap.reason == "damaged"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(1, 12), max_size=9))
def test_the_most_stamps_that_rise_together_are_believed(steps: list[int]) -> None:
    far = int(FAR_TICKS) + 1
    stamps = np.array([1000 + step * far for step in steps], np.uint64)
    bad = spikes(stamps, 0, None)
    key = np.maximum.accumulate(np.where(bad, np.uint64(0), stamps)) if len(stamps) else stamps
    own = int((key == stamps).sum())
    rising = [
        n for n in range(len(steps) + 1) if any(list(c) == sorted(c) for c in itertools.combinations(steps, n))
    ]
    assert own == max(rising)


def test_a_clock_that_was_set_back_is_not_damage() -> None:
    """Order of storage is kept and time stands; it is told as that, and what lies there is a gap."""
    n = LONGEST_DAMAGE + 100
    before = [record(0x28006, [0, k], (1 << 30) + 1000 * k) for k in range(n)]
    after = [record(0x28006, [1, k], 5000 + 1000 * k) for k in range(n)]
    result = read(window(0, *before, *after))
    rows = result.rows("TRC_SCHED_BLOCK")
    assert [row["dom"] for row in rows] == [0] * n + [1] * n
    top = rows[n - 1]["t_ns"]
    assert {row["t_ns"] for row in rows[n:]} == {top}
    assert [(note.severity, note.count) for note in result.notes if note.code == "xentrace-tsc-back"] == [("warn", n)]
    assert not [note for note in result.notes if note.code == "xentrace-stamp"]
    assert [gap.reason for gap in result.gaps] == ["clock-back"]
    assert {row["t_err_ns"] for row in rows[n:]} == {None}  # no stamp after them says when they were


def test_small_steps_back_are_skew_and_no_gap() -> None:
    rows = [record(0x28006, [n, 0], 1_000_000 + tsc) for n, tsc in enumerate([100, 200, 150, 160, 300])]
    result = read(window(0, *rows))
    assert not result.gaps
    assert [row["t_err_ns"] for row in result.rows("TRC_SCHED_BLOCK")] == [0, 0, 100, 100, 0]


def test_gaps_of_one_batch_are_few() -> None:
    """Every other stamp is damaged: the first ones are told one by one, the rest as one."""
    rows = [record(0x28006, [n, 0], 10_000_000 + 10 * n + (n % 2 << 40)) for n in range(1001)]
    result = read(window(0, *rows))
    assert len(result.gaps) == 64
    assert sum(note.count for note in result.notes if note.code == "xentrace-stamp") == 500


def errors(data: bytes, folder: Path) -> list[str]:
    """Codes of errors that a replay of all systems finds."""
    path = folder / "damaged.xentrace"
    path.write_bytes(data)
    ingest([str(path)], folder / "d", IngestOptions())
    runs = replay_dataset(Dataset.open(folder / "d"), Settings((Choice("current"),)))
    assert runs
    return [f["code"] for run in runs for f in run["findings"] if f["severity"] == "error"]


def flipped(raw: bytes, seed: int) -> bytes:
    """40 stamps of a recording with a changed bit, and two rows of 20 that are noise."""
    rng = random.Random(seed)
    stamped = [(offset, tsc) for offset, _, _, tsc, _ in hop_file(raw) if tsc is not None]
    bad = {offset: true ^ 1 << rng.randrange(64) for offset, true in rng.sample(stamped, 40)}
    for _ in range(2):
        at = rng.randrange(len(stamped) - 20)
        bad |= {offset: rng.getrandbits(64) for offset, _ in stamped[at : at + 20]}
    return with_stamps(bad, raw)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_stamps_give_no_errors(seed: int, tmp_path: Path) -> None:
    assert not errors(flipped(RAW, seed), tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_damaged_stamps_of_a_guest_recording_give_no_errors(seed: int, tmp_path: Path) -> None:
    """Handlers would pile up where time stands, and halts last for ever."""
    packed = shared_path("recordings/xen-hvm/hvm-load.xentrace.zst").read_bytes()
    with pa.CompressedInputStream(pa.BufferReader(packed), "zstd") as stream:
        data = stream.read(700_000)
    whole = max(end for _, end in windows_of(data) if end <= len(data))
    assert not errors(flipped(data[:whole], seed), tmp_path)
