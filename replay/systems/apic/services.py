"""Whole services in columns: request, delivery and EOI of one vector, and the services that interrupt its handler.

A calm processor is after such a service what it was before it (`short_cuts`). So a *run* of services, with nothing else
on that processor in between, can be taken as one step when its first row comes, whatever other processors do meanwhile.
What is left for the loop of rows are first events, deeper nesting, and whatever is not plain.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

__all__ = ["BYTE", "OVERLOOKED", "Runs", "find_runs"]

#: The step of rows that end no run, though they lie in it.
OVERLOOKED: Final = 0xFF

#: Rows of a run's end that a story can be about: each request among them is followed by its delivery and its EOI.
LAST: Final = 9
#: Slots that one byte can name, beside the one of overlooked rows.
BYTE: Final = (1 << 8) - 1


class Services:
    """Services of processors in rows sorted by processor: the first row of each, the row after its last, the row of the
    last request in it (delivery, where requests are not recorded), and whether its handler is interrupted."""

    __slots__ = ("asked", "begin", "deep", "end")

    def __init__(self, begin: Any, end: Any, asked: Any, deep: Any) -> None:
        self.begin: Any = begin
        self.end: Any = end
        self.asked: Any = asked
        self.deep: Any = deep


class Runs:
    """Runs of services in a stretch. `heads` are their first rows, `tails` marks their other rows.

    `lowest` is the lowest class of a run's vectors, `deep` whether a handler is interrupted in it; `asked` and `ended`
    are the rows of its last request (delivery, where requests are not recorded) and of its last EOI.
    """

    __slots__ = (
        "_begins", "_deliver", "_ends", "_firsts", "_order", "_steps", "asked", "deep", "ended", "heads", "lowest",
        "tails",
    )  # fmt: skip

    def __init__(self, order: Any, steps: Any, deliver: int, services: Services, slots: Any, vectors: Any) -> None:
        """`order`: rows by processor, `steps`: theirs; `deliver`: the step of a delivery."""
        begin, end = services.begin, services.end
        slot = slots[order[begin]]
        breaks = np.ones(len(begin), np.bool_)
        breaks[1:] = (begin[1:] != end[:-1]) | (slot[1:] != slot[:-1])
        starts = np.flatnonzero(breaks)
        lasts = np.append(starts[1:], len(begin)) - 1
        firsts = begin[starts]
        ends = end[lasts]
        self._begins: Any = begin
        self._order: Any = order
        self._steps: Any = steps
        self._deliver: int = deliver
        self._firsts: Any = firsts
        self._ends: Any = ends
        self.heads: Any = order[firsts]
        self.tails: Any = np.zeros(len(slots), np.bool_)
        self.tails[order[self._inside(firsts, ends)]] = True
        self.tails[self.heads] = False
        self.lowest: list[int] = (np.minimum.reduceat(vectors[order[begin]], starts) >> 4).tolist()
        self.deep: list[bool] = np.logical_or.reduceat(services.deep, starts).tolist()
        self.asked: list[int] = order[services.asked[lasts]].tolist()
        self.ended: list[int] = order[ends - 1].tolist()

    def _inside(self, firsts: Any, ends: Any) -> Any:
        """Which rows of `order` lie in the runs that begin and end there."""
        change = np.zeros(len(self._order) + 1, np.int8)
        change[firsts] += 1
        change[ends] -= 1
        return np.cumsum(change[:-1], dtype=np.int8).view(np.bool_)

    def story(self, run: int) -> list[int]:
        """Rows of the last deliveries and EOIs of a run."""
        end = self._ends[run]
        begin = max(self._firsts[run], end - LAST)
        from_delivery = self._steps[begin:end] >= self._deliver
        rows: list[int] = self._order[begin:end][from_delivery].tolist()
        return rows

    def head(self, run: int) -> int:
        """The first row of a run, -1 when nothing is left of it."""
        first = self._firsts[run]
        return int(self._order[first]) if first < self._ends[run] else -1

    def shorten(self, run: int) -> Any:
        """Let a run begin with its second service; returns the rows of the first."""
        first = self._firsts[run]
        following = int(np.searchsorted(self._begins, first, side="right"))
        end = self._ends[run]
        if following < len(self._begins):
            end = min(end, self._begins[following])
        self._firsts[run] = end
        return self._order[first:end]

    def counts(self, taken: list[int], slots: Any, vectors: Any, width: int) -> Any:
        """Services of the runs `taken` by slot and vector: index slot * `width` + vector."""
        mine = self._inside(self._firsts[taken], self._ends[taken])
        rows = self._order[mine & (self._steps == self._deliver)]
        return np.bincount(slots[rows] * width + vectors[rows])


def find_runs(
    slots: Any, steps: Any, vectors: Any, times: Any, pattern: tuple[int, ...], patience: int, nesting: bool
) -> Runs | None:
    """Runs of services; None without any.

    A service is rows of one slot with the steps of `pattern` (the last is an EOI, that may name no vector: 0) and one
    vector, delivered within `patience` ns of the request. With `nesting` its handler may be interrupted by services of
    higher classes, one after the other. OVERLOOKED steps end no run. `slots`, `steps`, `vectors`: unsigned bytes, or
    two for `slots`, by which NumPy sorts in linear time; no slot is the highest number of its type.
    """
    last = np.iinfo(slots.dtype).max
    lane = slots.copy()
    lane[steps == OVERLOOKED] = last
    order = np.argsort(lane, kind="stable")[: np.count_nonzero(steps != OVERLOOKED)]
    lane = lane[order]
    step = steps[order]
    vector = vectors[order]
    at = _matches(lane, step, vector, pattern)
    at = at[_in_time(order[at], order[at + 1], times, pattern, patience)]
    if not len(at):
        return None
    services = Services(at, at + len(pattern), at, np.zeros(len(at), np.bool_))
    if nesting:
        rest = np.ones(len(order), np.bool_)
        for offset in range(len(pattern)):
            rest[at + offset] = False
        rows = np.flatnonzero(rest)
        found = _matches(lane[rows], step[rows], vector[rows], pattern)
        outer = rows[found]
        entered = rows[found + len(pattern) - 2]
        ended = rows[found + len(pattern) - 1]
        good = _in_time(order[outer], order[entered], times, pattern, patience)
        good &= entered == outer + len(pattern) - 2  # nothing happens between a request and its delivery
        services = _interrupted(services, outer[good], entered[good], ended[good], vector)
    return Runs(order, step, pattern[-2], services, slots, vectors)


def _matches(lane: Any, step: Any, vector: Any, pattern: tuple[int, ...]) -> Any:
    """Where rows that follow each other have the steps of the pattern, one lane and one vector."""
    n = max(0, len(step) - len(pattern) + 1)
    good = lane[:n] == lane[len(lane) - n :]
    for offset, wanted in enumerate(pattern):
        good &= step[offset : offset + n] == wanted
    at = np.flatnonzero(good)
    eoi = vector[at + len(pattern) - 1]
    same = (eoi == 0) | (eoi == vector[at])
    for offset in range(1, len(pattern) - 1):
        same &= vector[at + offset] == vector[at]
    return at[same]


def _in_time(asked: Any, delivered: Any, times: Any, pattern: tuple[int, ...], patience: int) -> Any:
    """Which requests are delivered before patience ends; all, where requests are not recorded."""
    if len(pattern) < 3:
        return np.ones(len(asked), np.bool_)
    return times[delivered] - times[asked] < patience


def _interrupted(inner: Services, outer: Any, entered: Any, ended: Any, vector: Any) -> Services:
    """Services of which none is part of another: `inner`, and around them those that begin at `outer`, if what is
    between their delivery and their EOI are services of higher classes."""
    at = inner.begin
    low = np.searchsorted(at, entered)
    high = np.searchsorted(at, ended)
    some = low < high  # that what is there are services, and no other rows, is known from how they were found
    outer, ended, low, high = outer[some], ended[some], low[some], high[some]
    bounds = np.column_stack((low, high)).reshape(-1)
    lowest = np.minimum.reduceat(np.append(vector[at], 0xFF), bounds)[::2] if len(bounds) else vector[:0]
    higher = lowest >> 4 > vector[outer] >> 4
    outer, ended, low, high = outer[higher], ended[higher], low[higher], high[higher]
    change = np.zeros(len(at) + 1, np.int8)
    change[low] += 1
    change[high] -= 1
    free = np.cumsum(change[:-1], dtype=np.int8) == 0
    begin = np.append(at[free], outer)
    by_begin = np.argsort(begin, kind="stable")  # two sorted parts: linear time
    return Services(
        begin[by_begin],
        np.append(inner.end[free], ended + 1)[by_begin],
        np.append(inner.asked[free], at[high - 1])[by_begin],
        (np.arange(len(begin)) >= len(begin) - len(outer))[by_begin],
    )
