"""Records of one physical CPU are lost: whatever ran there meanwhile is unknown, not wrong."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from parsers.open import open_recording
from tests.recordings.test_linux_binding import stored
from tests.recordings.xentrace_tools import record, window
from tests.shared import shared_path
from tracetool.replaying import Settings, replay_dataset

CPU_CHANGE = 0x1F003
LOST_RECORDS = 0x1F001
#: Ticks of the recording machine in a second.
HZ = 2.596155e9


def windows(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """CPU and records of each window of the collector."""
    at = 0
    while at + 12 <= len(raw):
        head, cpu, size = struct.unpack_from("<III", raw, at)
        assert head & 0x0FFFFFFF == CPU_CHANGE
        yield cpu, raw[at + 12 : at + 12 + size]
        at += 12 + size


def records(payload: bytes) -> Iterator[tuple[bytes, int | None]]:
    """Each record and its stamp."""
    at = 0
    while at + 4 <= len(payload):
        head = struct.unpack_from("<I", payload, at)[0]
        size = 4 + 8 * (head >> 31) + 4 * (head >> 28 & 7)
        yield payload[at : at + size], struct.unpack_from("<Q", payload, at + 4)[0] if head >> 31 else None
        at += size


def without(raw: bytes, lost_cpu: int, begin: int, end: int) -> bytes:
    """The recording without that CPU's records in [begin, end) ticks; TRC_LOST_RECORDS says so, as Xen writes it."""
    out = []
    lost, told, now, first = 0, False, 0, 0
    for cpu, payload in windows(raw):
        if cpu != lost_cpu:
            out.append(window(cpu, payload))
            continue
        kept = []
        for one, stamp in records(payload):
            now = now if stamp is None else stamp
            if begin <= now < end:
                lost += 1
                first = first or now
                continue
            if now >= end and stamp is not None and not told:
                told = True
                words = (lost, 0x7FFF, first & 0xFFFFFFFF, first >> 32)
                kept.append(record(LOST_RECORDS, words, stamp - 1))
            kept.append(one)
        out.append(window(cpu, *kept))
    assert lost > 1000
    assert told
    return b"".join(out)


@pytest.mark.parametrize(("cpu", "begin", "end"), [(1, 5.925, 8.922), (0, 3.114, 6.111), (3, 5.158, 6.656)])
def test_a_cpu_whose_records_are_lost(cpu: int, begin: float, end: float, tmp_path: Path) -> None:
    """vCPUs move to that CPU, take or end an interrupt there, and come back."""
    raw = open_recording(shared_path("recordings/xen-pvh/pvh-load.xentrace.zst")).stream.read()
    start = min(stamp for _, payload in windows(raw) for _, stamp in records(payload) if stamp)
    path = tmp_path / "cut.xentrace"
    path.write_bytes(without(raw, cpu, start + int(begin * HZ), start + int(end * HZ)))
    runs = replay_dataset(stored(path, tmp_path), Settings(systems=("apic", "callback")))
    assert [(f["code"], f["t_ns"]) for run in runs for f in run["findings"] if f["severity"] != "info"] == []
    apic = next(run for run in runs if run["system"] == "apic")
    assert apic["metrics"]["deliveries"] > 1000  # what is seen is counted
