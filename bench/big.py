"""Makes a recording of any size with the event mix of a real one, and consistent with itself.

    python -m bench.big RECORDING SIZE OUTPUT        SIZE as in 300M or 10G

Repeating a recording with shifted stamps is not enough: at the seam a vCPU would run on two CPUs, and readers that
follow the scheduler stop. So the repeated part is cut between two moments at which every vCPU has the same state on the
same CPU and every CPU the same idle state, and the words that hold times (low halves of the TSC, ns of NOW()) move with
the stamps. The output is written piece by piece: memory depends on the recording, not on SIZE.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from parsers.open import open_recording
from parsers.recording import ReadOptions
from parsers.xentrace.boundaries import STEPS, hop
from parsers.xentrace.reader import XentraceReader

__all__ = ["Loop", "loop_of", "main", "parse_size", "pieces"]

MAGIC: Final = 0x2001F003
RUNSTATE_MASK: Final = 0x0FFFF00F
RUNSTATE: Final = 0x00021001  # bits 4-5 new state, 8-9 old state
RUNNING: Final = 0
IDLE_ENTRY: Final = 0x00801002
IDLE_EXIT: Final = 0x00801003
IRQ_HANDLED: Final = 0x00802008
#: Payload words that hold a time: (event id, word, whether in ns and not in TSC ticks).
TIME_WORDS: Final = ((IDLE_ENTRY, 1, True), (IDLE_EXIT, 1, True), (IRQ_HANDLED, 1, False), (IRQ_HANDLED, 2, False))

_Words = NDArray[np.uint32]
_Index = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Loop:
    """The part of a recording that can be repeated for ever.

    `words`: whole windows; `stamps`: index of the low word of each stamp; `ticks`, `nanos`: index of words that hold
    low halves of TSC stamps and of times in ns; `ends`: index after each window; `period`, `period_ns`: its length.
    """

    words: _Words
    stamps: _Index
    ticks: _Index
    nanos: _Index
    ends: _Index
    period: int
    period_ns: int
    records: int


@dataclass(frozen=True, slots=True)
class _Records:
    """All records in file order: place and length in words, event id, CPU, window, and sort key (stamp)."""

    pos: _Index
    length: _Index
    event: _Words
    stamped: NDArray[np.bool_]
    cpu: _Index
    window: _Index
    key: NDArray[np.uint64]


def parse_size(text: str) -> int:
    """Bytes from `300M`, `1G` or a plain number; decimal units."""
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(text[-1:].upper())
    return int(float(text[:-1]) * unit) if unit else int(text)


def _records(words: _Words) -> _Records:
    steps = words.view(np.uint8)[3::4].tobytes().translate(STEPS)
    places: list[int] = []
    window_of: list[int] = []
    cpus: list[int] = []
    at = window = 0
    while at < len(words):
        if words[at] != MAGIC:
            raise SystemExit(f"no window at word {at}: the recording must be undamaged")
        end = at + 3 + int(words[at + 2]) // 4
        found, last = hop(steps, at, end)
        if last != end:
            raise SystemExit(f"a record crosses the end of the window at word {at}")
        places += found
        window_of += [window] * len(found)
        cpus += [int(words[at + 1])] * len(found)
        at, window = end, window + 1
    pos = np.array(places, np.int64)
    head = words[pos]
    stamped = head >= 0x80000000
    reach = np.where(stamped, pos, 0)
    tsc = words[reach + 1].astype(np.uint64) | words[reach + 2].astype(np.uint64) << np.uint64(32)
    tsc[~stamped] = 0
    cpu = np.array(cpus, np.int64)
    key = np.zeros(len(pos), np.uint64)
    for number in np.unique(cpu).tolist():
        mine = cpu == number
        key[mine] = np.maximum.accumulate(tsc[mine])
    length = np.frombuffer(steps, np.uint8)[pos].astype(np.int64)
    return _Records(pos, length, head & np.uint32(0x0FFFFFFF), stamped, cpu, np.array(window_of, np.int64), key)


def _same_state(words: _Words, records: _Records) -> tuple[int, int]:
    """Two stamps, as far apart as possible, after which every vCPU and CPU is in the same state."""
    idle = (records.event == IDLE_ENTRY) | (records.event == IDLE_EXIT)
    change = records.event & RUNSTATE_MASK == RUNSTATE
    pick = np.flatnonzero((idle | change) & records.stamped)
    pick = pick[np.lexsort((records.cpu[pick], records.key[pick]))]
    who = words[records.pos[pick] + 3].tolist()
    rows = list(
        zip(records.key[pick].tolist(), records.cpu[pick].tolist(), records.event[pick].tolist(), who, strict=True)
    )
    state: dict[tuple[str, int], Any] = {}
    for _, cpu, event, word in reversed(rows):  # what was so before the first record
        if event in (IDLE_ENTRY, IDLE_EXIT):
            state["idle", cpu] = event == IDLE_EXIT
        else:
            old = event >> 8 & 3
            state["vcpu", word] = (old, cpu if old == RUNNING else -1)
    signature = hash(frozenset(state.items()))
    seen: dict[int, int] = {}
    best = (0, 0)
    for index, (key, cpu, event, word) in enumerate(rows):
        item = ("idle", cpu) if event in (IDLE_ENTRY, IDLE_EXIT) else ("vcpu", word)
        new = event >> 4 & 3
        value = event == IDLE_ENTRY if item[0] == "idle" else (new, cpu if new == RUNNING else -1)
        signature ^= hash((item, state[item])) ^ hash((item, value))
        state[item] = value
        if index + 1 < len(rows) and rows[index + 1][0] == key:
            continue  # both ends must lie between two stamps
        first = seen.setdefault(signature, key)
        if key - first > best[1] - best[0]:
            best = (first, key)
    return best


def loop_of(path: str) -> Loop:
    """The longest part of the recording at `path` that can be repeated. SystemExit when there is none."""
    with open_recording(path) as opened:
        reader = XentraceReader(opened.stream, ReadOptions(source="base"))
        hz = reader.clock.hz
        opened.stream.seek(0)
        words = np.frombuffer(opened.stream.read(), np.uint32)
    records = _records(words)
    start, end = _same_state(words, records)
    if end <= start:
        raise SystemExit(f"{path}: no two moments with the same state")
    header = records.event == (MAGIC & 0x0FFFFFFF)
    keep = (records.key > start) & (records.key <= end) & ~header
    kept = np.bincount(records.window[keep], records.length[keep], int(records.window[-1]) + 1).astype(np.int64)
    keep |= header & (kept[records.window] > 0)
    place, length = records.pos[keep], records.length[keep]
    begin = np.cumsum(length) - length
    out = words[np.repeat(place - begin, length) + np.arange(int(length.sum()))]
    windows = np.flatnonzero(header[keep])
    out[begin[windows] + 2] = 4 * kept[records.window[keep][windows]]
    event, stamped = records.event[keep], records.stamped[keep]
    moved: dict[bool, list[_Index]] = {False: [], True: []}
    for number, word, nanos in TIME_WORDS:
        chosen = np.flatnonzero((event == number) & stamped)
        moved[nanos].append(begin[chosen] + 3 + word)
    period = end - start
    return Loop(
        words=out,
        stamps=begin[stamped] + 1,
        ticks=np.concatenate(moved[False]),
        nanos=np.concatenate(moved[True]),
        ends=np.append(begin[windows][1:], len(out)),
        period=period,
        period_ns=round(period * 1e9 / hz) if hz else 0,
        records=len(place),
    )


def pieces(loop: Loop, size: int) -> Iterator[bytes]:
    """Whole windows, at least `size` bytes in all."""
    left = size
    turn = 0
    while left > 0:
        words = loop.words.copy()
        shift = turn * loop.period
        stamp = words[loop.stamps] | words[loop.stamps + 1].astype(np.uint64) << np.uint64(32)
        stamp += np.uint64(shift)
        words[loop.stamps] = stamp.astype(np.uint32)
        words[loop.stamps + 1] = (stamp >> np.uint64(32)).astype(np.uint32)
        words[loop.ticks] += np.uint32(shift & 0xFFFFFFFF)
        words[loop.nanos] += np.uint32(turn * loop.period_ns & 0xFFFFFFFF)
        if 4 * len(words) > left:
            words = words[: int(loop.ends[np.searchsorted(4 * loop.ends, left)])]
        yield words.tobytes()
        left -= 4 * len(words)
        turn += 1


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("recording")
    parser.add_argument("size", type=parse_size)
    parser.add_argument("output", type=Path)
    given = parser.parse_args(arguments)
    loop = loop_of(given.recording)
    with given.output.open("wb") as target:
        for piece in pieces(loop, given.size):
            target.write(piece)
    share = 4 * len(loop.words) / given.output.stat().st_size
    print(f"{given.output}: {given.output.stat().st_size} bytes, one turn is {share:.1%} of it", file=sys.stderr)


if __name__ == "__main__":
    main()
