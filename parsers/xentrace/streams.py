"""Each CPU's windows as one stream: what was given out, and the earliest key of what follows."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np

from parsers.xentrace.stamps import spikes
from parsers.xentrace.windows import Windows

__all__ = ["Stream", "streams_of"]


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


def streams_of(windows: Windows) -> dict[int, Stream]:
    """The streams by CPU."""
    streams: dict[int, Stream] = {}
    damaged: set[int] = set()
    for cpu in windows.first_stamp:
        mine = np.flatnonzero(windows.cpu == cpu)
        damaged.update(mine[spikes(windows.first[mine], 0, None)].tolist())
    order = np.argsort(windows.cpu, kind="stable")
    for index in order.tolist():
        cpu = int(windows.cpu[index])
        stream = streams.get(cpu)
        if stream is None:
            stream = streams[cpu] = Stream(cpu, array("q"), array("Q"), array("Q"))
        first = int(windows.first[index]) if index not in damaged else 0
        before = stream.floors[-1] if stream.floors else windows.origin if cpu in windows.first_stamp else 0
        # A window that does not begin with a stamp may continue the one before.
        leads = windows.leads[index] and stream.windows
        stream.windows.append(index)
        stream.floors.append(max(before, first) if leads else before)
    for stream in streams.values():
        upcoming = 0
        stream.upcoming = array("Q", bytes(8 * (len(stream.windows) + 1)))
        for slot in range(len(stream.windows) - 1, -1, -1):
            window = stream.windows[slot]
            first = int(windows.first[window]) if window not in damaged else 0
            upcoming = first or upcoming
            stream.upcoming[slot] = upcoming
    return streams
