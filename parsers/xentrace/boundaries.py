"""Where the records of many windows begin: a record's length is known from its header only, so one follows the other.

Windows are cut into stretches that are walked together, one NumPy step for all of them. A stretch's first record is
not known, but chains of records from wrong places soon meet the right one: each walk begins some words early, and
counts only if the stretch before ends where it begins. Stretches of which that is not true are walked one by one.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from parsers.xentrace.windows import RECORD_WORDS

__all__ = ["GUARD", "MARGIN", "STEPS", "find_records", "hop"]

GUARD: Final = max(RECORD_WORDS)  #: words between two windows in a buffer; no record reaches farther
STEPS: Final = bytes(RECORD_WORDS[top >> 4] for top in range(256))  #: record length by the header's top byte
BLOCK: Final = 16  # steps between two looks at who has arrived
MARGIN: Final = BLOCK * GUARD  #: words after the last window in a buffer that a walk may look at
STRETCH: Final = 509  # words; not a power of two, for the sake of the cache
LEAD: Final = 96  # words before a stretch where its walk begins

_Words = NDArray[np.uint32]
_Index = NDArray[np.int64]
_Bytes = NDArray[np.uint8]


def hop(steps: bytes, start: int, end: int) -> tuple[list[int], int]:
    """Positions of the records in words [start, end), one after the other, and where the last one ends."""
    found = []
    at = start
    while at < end:
        found.append(at)
        at += steps[at]
    return found, at


def find_records(words: _Words, starts: _Index, ends: _Index) -> tuple[_Index, _Index]:
    """Positions of all records in the windows [starts, ends), ascending, and where each window's last one ends.

    Windows are separated by at least `GUARD` words; `MARGIN` words after the last one save a copy.
    """
    if len(words) < int(ends[-1]) + MARGIN:
        words = np.concatenate((words, np.zeros(MARGIN, np.uint32)))
    steps = _steps(words)
    lanes = np.maximum(1, (ends - starts) // STRETCH)
    last = np.cumsum(lanes) - 1
    first = last - lanes + 1
    window = np.repeat(starts, lanes)
    begin = window + STRETCH * (np.arange(len(window)) - np.repeat(first, lanes))
    stop = np.append(begin[1:], 0)
    stop[last] = ends
    early = np.maximum(begin - LEAD, window)
    early[first] = starts
    entry = _walk(steps, early, begin, None)
    mark = np.zeros(len(words), np.bool_)
    landed = _walk(steps, entry, stop, mark)
    wrong = entry[1:] != landed[:-1]
    wrong[first[1:] - 1] = False  # a window's first stretch has nothing before it
    if wrong.any():
        _repair(steps, mark, begin, stop, entry, landed, np.flatnonzero(wrong) + 1, frozenset(first.tolist()))
    return np.flatnonzero(mark), landed[last]


def _steps(words: _Words) -> _Bytes:
    """Length in words of a record that begins at each word: STEPS in arithmetic, which is faster than a look-up."""
    top = words.astype("<u4", copy=False).view(np.uint8)[3::4].copy()
    steps: _Bytes = top >> np.uint8(7)
    steps += steps
    top >>= np.uint8(4)
    top &= np.uint8(7)
    steps += top
    steps += np.uint8(1)
    return steps


def _walk(steps: _Bytes, at: _Index, stop: _Index, mark: NDArray[np.bool_] | None) -> _Index:
    """Walk from each `at` to the first place not below `stop`, which is returned; set `mark` on the way."""
    landed = at.copy()
    live = np.flatnonzero(at < stop)
    at, stop = at[live], stop[live]
    while len(at):
        path = np.empty((BLOCK + 1, len(at)), np.int64)
        path[0] = at
        for index in range(BLOCK):
            np.add(path[index], steps.take(path[index]), out=path[index + 1])
        at = path[BLOCK]
        arrived = np.flatnonzero(at >= stop)
        if len(arrived):
            beyond = path[:, arrived] >= stop[arrived]
            landed[live[arrived]] = path[beyond.argmax(axis=0), arrived]
        if mark is not None:
            mark[path[:BLOCK][path[:BLOCK] < stop] if len(arrived) else path[:BLOCK]] = True
        if len(arrived):
            going = np.flatnonzero(at < stop)
            live, at, stop = live[going], at[going], stop[going]
    return landed


def _repair(
    steps: _Bytes,
    mark: NDArray[np.bool_],
    begin: _Index,
    stop: _Index,
    entry: _Index,
    landed: _Index,
    wrong: _Index,
    first: frozenset[int],
) -> None:
    """Walk again, in order, the stretches that do not begin where the one before ends, until they do."""
    lane = 0
    for suspect in wrong.tolist():
        lane = max(lane, suspect)
        while lane < len(begin) and lane not in first and landed[lane - 1] != entry[lane]:
            start, low, end = int(landed[lane - 1]), int(begin[lane]), int(stop[lane])
            found, there = hop(steps[low : end + GUARD].tobytes(), start - low, end - low)
            mark[low:end] = False
            mark[np.array(found, np.int64) + low] = True
            entry[lane], landed[lane] = start, there + low
            lane += 1
