"""Damaged xentrace recordings: the good prefix is kept, the rest is accounted for, nothing else is raised."""

from __future__ import annotations

import io
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsers.recording import ReadOptions, RecordingError
from parsers.xentrace.reader import XentraceReader
from tests.recordings.xentrace_tools import hop_file, read, record, window
from tests.shared import SAMPLES

RAW = (SAMPLES / "xen-2l-dom0-idle.xentrace").read_bytes()


def windows_of(raw: bytes) -> list[tuple[int, int]]:
    """(offset, end) of each window."""
    found, at = [], 0
    while at < len(raw):
        end = at + 12 + int.from_bytes(raw[at + 8 : at + 12], "little")
        found.append((at, end))
        at = end
    return found


#: Two whole small windows in a row, about 1 KB.
SLICE_START, SLICE_END = next(
    (first[0], second[1])
    for first, second in zip(windows_of(RAW), windows_of(RAW)[1:], strict=False)
    if second[1] - first[0] < 1200 and second[1] - second[0] > 100
)
SLICE = RAW[SLICE_START:SLICE_END]
RECORDS = [(offset, event) for offset, _, event, _, _ in hop_file(SLICE)]


def test_truncation_at_every_offset() -> None:
    assert 200 < len(SLICE) < 1200
    for cut in range(len(SLICE)):
        try:
            result = read(SLICE[:cut])
        except RecordingError as error:
            assert cut < 12
            assert "\n" not in str(error)
            continue
        ends = [offset for offset, _ in RECORDS[1:]] + [len(SLICE)]
        whole = [offset for (offset, _), end in zip(RECORDS, ends, strict=True) if end <= cut]
        assert sorted(at for name in result.tables for at in result.tables[name]["offset"].to_pylist()) == whole, cut
        clean = any(cut == end for _, end in windows_of(SLICE))
        assert bool(result.gaps) != clean, cut
        if not clean:
            assert {note.severity for note in result.notes if note.code != "xentrace-ticks"} >= {"error"}


def test_truncated_gap_begins_at_the_last_good_stamp() -> None:
    data = window(4, record(0x28006, [0, 0], 100), record(0x28006, [0, 0], 200), record(0x28006, [0, 0], 300))
    result = read(data[:-4])
    assert [row["tsc"] for row in result.rows("TRC_SCHED_BLOCK")] == [100, 200]
    (gap,) = result.gaps
    assert (gap.reason, gap.cpu, gap.t0, gap.offset, gap.length) == ("truncated", 4, 200, 52, 16)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "empty"),
        (b"\0" * 100_000, "expected a window header"),
        (b"CPU TSC EVENT\n" * 1000, "expected a window header"),
        (b"\x03\xf0\x01\x20", "expected a window header"),
        (b"\x03", "expected a window header"),
    ],
)
def test_no_recording_at_all(data: bytes, what: str) -> None:
    with pytest.raises(RecordingError, match=what) as caught:
        read(data)
    assert "\n" not in str(caught.value)


def test_header_alone_and_header_that_promises_too_much() -> None:
    result = read(window(1)[:8] + (4096).to_bytes(4, "little"))
    assert result.reader.counts == {"TRC_TRACE_CPU_CHANGE": 1}
    assert [gap.reason for gap in result.gaps] == ["truncated"]


def test_record_that_reaches_beyond_its_window() -> None:
    bad = record(0x28006, [1, 2], 300)[:12]  # two words are missing
    data = window(0, record(0x28006, [0, 0], 100), bad) + window(0, record(0x28006, [5, 6], 400))
    result = read(data)
    assert [row["tsc"] for row in result.rows("TRC_SCHED_BLOCK")] == [100, 400]
    (gap,) = result.gaps
    assert (gap.reason, gap.cpu, gap.length) == ("overrun", 0, 12)
    assert result.reader.accounting.skipped == 12


def test_junk_between_windows_is_skipped() -> None:
    first, second = windows_of(RAW)[:2]
    junk = b"\xde\xad\xbe\xef" * 25 + b"\x03\xf0\x01\x20\xff"  # not a multiple of four
    data = RAW[first[0] : first[1]] + junk + RAW[second[0] : windows_of(RAW)[9][1]]
    result = read(data)
    assert result.reader.accounting.skipped == len(junk)
    assert len(result.ordered()) == len(list(hop_file(RAW[: windows_of(RAW)[9][1]])))
    assert [(gap.reason, gap.offset, gap.length) for gap in result.gaps] == [("damaged", first[1], len(junk))]


def test_damaged_front() -> None:
    end = windows_of(RAW)[5][1]
    result = read(b"\0" * 7 + RAW[:end])
    assert result.reader.accounting.skipped == 7
    assert len(result.ordered()) == len(list(hop_file(RAW[:end])))


@pytest.mark.parametrize("size", [0, 4, 100, 1 << 20, 0xFFFFFFFC, 7])
def test_wrong_window_size_loses_nothing_of_the_others(size: int) -> None:
    spans = windows_of(RAW)[:12]
    data = bytearray(RAW[: spans[-1][1]])
    at, end = spans[4]
    data[at + 8 : at + 12] = size.to_bytes(4, "little")
    result = read(bytes(data))
    got = {row["offset"] for row in result.ordered()}
    others = {offset for offset, *_ in hop_file(RAW[: spans[-1][1]]) if not at <= offset < end}
    assert others <= got
    assert result.gaps


def test_random_noise() -> None:
    rng = random.Random(7)
    for length in (13, 100, 5000, 300_000):
        noise = rng.randbytes(length)
        with pytest.raises(RecordingError):
            read(noise)
        # The same noise as the payload of a window: every word may be a header.
        payload = noise[: length // 4 * 4]
        read(window(0, payload) + window(1, payload))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 255)), min_size=1, max_size=12))
def test_changed_bytes(changes: list[tuple[int, int]]) -> None:
    data = bytearray(RAW[:10_000])
    for at, value in changes:
        data[at] = value
    try:
        read(bytes(data))
    except RecordingError as error:
        assert "\n" not in str(error)


def test_a_stamp_that_cannot_be_true_moves_nothing_else() -> None:
    """One stamp gets its high word set: only that record's t_ns is affected, the next ones keep their times."""
    data = bytearray(RAW)
    words = struct.unpack(f"<{len(data) // 4}I", data)
    at = next(i for i in range(30_000, len(words)) if words[i] & 0x8FFFFFFF == 0x80802008)
    struct.pack_into("<I", data, 4 * (at + 2), 0x70000000)
    reader = XentraceReader(io.BytesIO(bytes(data)), ReadOptions())
    latest, odd = 0, []
    for chunk in reader.chunks():
        latest = max([latest, *(t["t_ns"][-1].as_py() or 0 for t in chunk.tables.values() if t.num_rows)])
        odd += [note for note in chunk.notes if note.code == "xentrace-stamp"]
    assert latest < 6_000_000_000
    assert [note.count for note in odd] == [1]
