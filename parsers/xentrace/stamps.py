"""Stamps that are not when their record was written: changed by damage, or by a clock that was set back.

Xen stamps and stores a CPU's records with interrupts off, so that its stamps rise in storage order. Of stamps that do
not, those are believed that are the most: one changed bit then costs one record its time and not all that follow.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Run", "runs", "spikes"]

#: No stamp, where the lowest of several is wanted.
NO_STAMP = (1 << 64) - 1
#: A stamp this far from those around it is damage and not skew (ticks; less than 1 ms).
FAR_TICKS = np.uint64(1 << 20)
#: More stamps in a row above later ones, or below earlier ones, are a clock that was set back.
LONGEST_DAMAGE = 4096
#: Runs of a CPU that are told one by one; what is beyond becomes one.
MOST_RUNS = 64


@dataclass(frozen=True, slots=True)
class Run:
    """Records in a row of one CPU with stamps that are not their time, which lies in [t0, t1] (ticks; None: unknown).

    `reason`: "skew" (less than `FAR_TICKS` off), "damaged", or "clock-back" (more than `LONGEST_DAMAGE` records).
    """

    cpu: int
    count: int
    t0: int
    t1: int | None
    offset: int  # of the first of them
    reason: str


def spikes(stamps: NDArray[np.uint64], floor: int, following: int | None) -> NDArray[np.bool_]:
    """Stamps (0: none) of one CPU that cannot be true: above later ones, which fit to more of the others.

    `floor` is the last key before them, `following` the first stamp after them if known. The stamps that are believed
    are the most that rise together; one that is too low needs nothing, for a running maximum passes over it. A clock
    that was set back is not a spike: what follows it lies below `floor`, or so many lie above it that order of
    storage is kept. Without this rule one damaged stamp would move all later records of its CPU to the end of time.
    """
    bad = np.zeros(len(stamps), np.bool_)
    place = np.flatnonzero(stamps >= np.uint64(max(floor, 1)))
    told = stamps[place]
    if following is not None and following >= floor:
        told = np.append(told, np.uint64(following))
    if not len(told):
        return bad
    lowest = np.minimum.accumulate(told[::-1])[::-1]
    if not (told - lowest > FAR_TICKS).any():
        return bad
    believed = np.ones(len(told), np.bool_)
    crossed = np.flatnonzero((told > lowest) | (told < np.maximum.accumulate(told)))
    believed[crossed] = _rising(told[crossed].tolist())
    lowest = np.minimum.accumulate(np.where(believed, told, np.uint64(NO_STAMP))[::-1])[::-1]
    high = np.flatnonzero(~believed & (told > lowest))
    high = high[told[high] - lowest[high] > FAR_TICKS]
    for run in np.split(high, np.flatnonzero(np.diff(high) != 1) + 1):
        if len(run) <= LONGEST_DAMAGE:
            bad[place[run]] = True
    return bad


def _rising(stamps: list[int]) -> NDArray[np.bool_]:
    """Which of them form a longest sequence that does not fall; of several the one that stays lowest."""
    ends: list[int] = []  # the lowest stamp at which a sequence of each length ends
    at: list[int] = []  # its index
    before = []
    for index, stamp in enumerate(stamps):
        length = bisect_right(ends, stamp)
        before.append(at[length - 1] if length else -1)
        ends[length : length + 1] = [stamp]
        at[length : length + 1] = [index]
    member = np.zeros(len(stamps), np.bool_)
    index = at[-1] if at else -1
    while index >= 0:
        member[index] = True
        index = before[index]
    return member


def runs(
    tsc: NDArray[np.uint64],
    key: NDArray[np.uint64],
    ticks: NDArray[np.int64],
    cpu: NDArray[np.uint16],
    offset: NDArray[np.uint64],
) -> Iterator[Run]:
    """Runs of records whose stamp `tsc` is not their `key`; `ticks` from there to the CPU's next true stamp, or -1.

    One element for each such record, in the order of CPU and storage.
    """
    far = np.maximum(tsc, key) - np.minimum(tsc, key) > FAR_TICKS
    for number in np.unique(cpu).tolist():
        mine = np.flatnonzero(cpu == number)
        until = key[mine] + ticks[mine].astype(np.uint64)  # of a run it is the same, whatever the keys are
        first = np.flatnonzero(np.diff(until, prepend=until[0] ^ np.uint64(1)))[:MOST_RUNS]
        some_far = np.logical_or.reduceat(far[mine], first)
        for a, b, is_far in zip(first.tolist(), [*first[1:].tolist(), len(mine)], some_far.tolist(), strict=True):
            begin, end = mine[a], mine[b - 1]
            reason = "skew" if not is_far else "damaged" if b - a <= LONGEST_DAMAGE else "clock-back"
            t1 = int(key[end]) + int(ticks[end]) if ticks[end] >= 0 else None
            yield Run(number, b - a, int(key[begin]), t1, int(offset[begin]), reason)
