"""Each CPU's windows as one stream: what was given out, the earliest key of what follows, damaged stamps."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parsers.xentrace.windows import Windows

__all__ = ["Stream", "spikes", "streams_of"]

#: No stamp, where the lowest of several is wanted.
NO_STAMP = (1 << 64) - 1
#: A stamp this far above a later one is damage and not skew (ticks; about 25 s).
SPIKE_TICKS = np.uint64(1 << 36)


@dataclass(slots=True)
class Stream:
    """One CPU's windows and how far they have been given out."""

    cpu: int
    windows: array[int]  # indexes into Windows
    floors: array[int]
    upcoming: array[int]  # first stamp in the windows from here on, 0: none
    at: int = 0  # next window
    start: int = 0  # first word of it that was not given out
    key: int | None = None  # key of the last record given out
    floor: int | None = None  # exact key of the next record, once known

    def next_stamp(self, slot: int) -> int | None:
        """The first stamp in the CPU's windows from `slot` on."""
        return self.upcoming[slot] or None

    def head(self) -> tuple[int, int] | None:
        """(no key that follows is lower, CPU), None at the end."""
        if self.at >= len(self.windows):
            return None
        return (self.floors[self.at] if self.floor is None else self.floor), self.cpu


def spikes(stamps: NDArray[np.uint64], floor: int, following: int | None) -> NDArray[np.bool_]:
    """Stamps (0: none) of one CPU that cannot be true: far above later ones which fit what came before.

    `floor` is the last key before them, `following` the first stamp after them if known. A clock that was set back is
    not a spike: what follows it lies below `floor`, and order of storage is kept. Without this rule one damaged stamp
    would move all later records of its CPU to the end of time.
    """
    if not len(stamps):
        return np.zeros(0, np.bool_)
    ahead = np.where(stamps == 0, np.uint64(NO_STAMP), stamps)
    if following is not None:
        ahead = np.append(ahead, np.uint64(following))
    lowest = np.minimum.accumulate(ahead[::-1])[::-1][: len(stamps)]
    above = stamps > lowest
    if not above.any():
        return above
    above[above] = stamps[above] - lowest[above] > SPIKE_TICKS
    return above & (lowest >= np.uint64(floor))


def streams_of(windows: Windows) -> dict[int, Stream]:
    """The streams by CPU."""
    streams: dict[int, Stream] = {}
    damaged: set[int] = set()
    for cpu in np.unique(windows.cpu).tolist():
        mine = np.flatnonzero(windows.cpu == cpu)
        damaged.update(mine[spikes(windows.first[mine], windows.first_stamp.get(cpu, 0), None)].tolist())
    order = np.argsort(windows.cpu, kind="stable")
    for index in order.tolist():
        cpu = int(windows.cpu[index])
        stream = streams.get(cpu)
        if stream is None:
            stream = streams[cpu] = Stream(cpu, array("q"), array("Q"), array("Q"))
        first = int(windows.first[index]) if index not in damaged else 0
        before = stream.floors[-1] if stream.floors else windows.first_stamp.get(cpu, 0)
        stream.windows.append(index)
        # A window that does not begin with a stamp may continue the one before.
        stream.floors.append(max(before, first) if windows.leads[index] else before)
    for stream in streams.values():
        upcoming = 0
        stream.upcoming = array("Q", bytes(8 * (len(stream.windows) + 1)))
        for slot in range(len(stream.windows) - 1, -1, -1):
            window = stream.windows[slot]
            first = int(windows.first[window]) if window not in damaged else 0
            upcoming = first or upcoming
            stream.upcoming[slot] = upcoming
    return streams
