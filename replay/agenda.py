"""Events that a machine schedules for itself: comparators, latencies, handler ends, time-outs.

Ties are broken as spec 0.1 says: by class, then by insertion. Recorded (or scenario) events count as the first
software events of their moment, because they were inserted before the run started.
"""

from __future__ import annotations

import heapq
from typing import Final

__all__ = ["HARDWARE", "OUTCOME", "SOFTWARE", "UPCALL", "Agenda", "Entry"]

#: Classes of simultaneous events, in the order in which they happen.
OUTCOME: Final = 0
HARDWARE: Final = 1
SOFTWARE: Final = 2
UPCALL: Final = 3

#: (t, class, serial, action, a, b, c): `action` and its arguments mean what the machine that scheduled them says.
Entry = tuple[int, int, int, int, int, int, int]


class Agenda:
    """A heap of entries. Stale entries are not removed: the machine compares a generation it put in `c`."""

    __slots__ = ("heap", "serial")

    def __init__(self) -> None:
        self.heap: list[Entry] = []
        self.serial: int = 0

    def at(self, t: int, order: int, action: int, a: int = 0, b: int = 0, c: int = 0) -> None:
        """Schedule `action(a, b, c)` at `t` in class `order`."""
        self.serial += 1
        heapq.heappush(self.heap, (t, order, self.serial, action, a, b, c))

    def pop(self) -> Entry:
        """Take the first entry."""
        return heapq.heappop(self.heap)
