"""Whole services in columns: request, delivery and EOI of one vector, and the services that interrupt its handler.

A calm processor is after such a service what it was before it (`short_cuts`). So a *run* of services, with nothing else
on that processor in between, can be taken as one step when its first row comes, whatever other processors do meanwhile.
What is left for the loop of rows are first events, deeper nesting, and whatever is not plain.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

__all__ = ["BYTE", "Runs", "codes_of", "find_runs"]

#: Bits of a vector.
BITS: Final = 8

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
        "_begins", "_codes", "_deliver", "_ends", "_firsts", "_order", "asked", "deep", "ended", "heads", "lowest",
        "tails",
    )  # fmt: skip

    def __init__(self, order: Any, lane: Any, codes: Any, deliver: int, services: Services, rows: int) -> None:
        """`order`: some of all `rows`, by processor, `lane` and `codes`: theirs; `deliver`: the step of a delivery."""
        begin, end = services.begin, services.end
        owner = lane.take(begin)
        breaks = np.ones(len(begin), np.bool_)
        breaks[1:] = (begin[1:] != end[:-1]) | (owner[1:] != owner[:-1])
        starts = np.flatnonzero(breaks)
        lasts = np.append(starts[1:], len(begin)) - 1
        firsts = begin[starts]
        ends = end[lasts]
        self._begins: Any = begin
        self._order: Any = order
        self._codes: Any = codes
        self._deliver: int = deliver
        self._firsts: Any = firsts
        self._ends: Any = ends
        self.heads: Any = order[firsts]
        bounds = np.append(np.column_stack((firsts, ends)).reshape(-1), len(order))
        inside = np.zeros(len(bounds), np.bool_)
        inside[1::2] = True  # what lies before the first run is outside, the next stretch of rows inside, and so on
        self.tails: Any = np.zeros(rows, np.bool_)
        self.tails[order] = np.repeat(inside, np.diff(bounds, prepend=0))
        self.tails[self.heads] = False
        self.lowest: list[int] = (np.minimum.reduceat(_vectors(codes.take(begin)), starts) >> 4).tolist()
        self.deep: list[bool] = np.logical_or.reduceat(services.deep, starts).tolist()
        self.asked: list[int] = order[services.asked[lasts]].tolist()
        self.ended: list[int] = order[ends - 1].tolist()

    def story(self, run: int) -> list[int]:
        """Rows of the last deliveries and EOIs of a run."""
        end = self._ends[run]
        begin = max(self._firsts[run], end - LAST)
        from_delivery = self._codes[begin:end] >> BITS >= self._deliver
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


def codes_of(steps: Any, vectors: Any) -> Any:
    """Step and vector of each row as one number of two bytes."""
    return steps.astype(np.uint16) << BITS | vectors


def _vectors(codes: Any) -> Any:
    return codes.astype(np.uint8)


def find_runs(
    slots: Any, overlooked: Any, codes: Any, times: Any, pattern: tuple[int, ...], patience: int, nesting: bool
) -> Runs | None:
    """Runs of services; None without any.

    A service is rows of one slot with the steps of `pattern` (the last is an EOI, that may name no vector: 0) and one
    vector, delivered within `patience` ns of the request. With `nesting` its handler may be interrupted by services of
    higher classes, one after the other. Rows where `overlooked` is true end no run. `codes`: `codes_of` the rows.
    `slots`: unsigned integers of one or two bytes, by which NumPy sorts in linear time; the highest of its type is
    nobody's.
    """
    # An overlooked row gets the highest slot, and so the last place.
    lane = slots | np.negative(overlooked.astype(slots.dtype))
    order = np.argsort(lane, kind="stable")[: len(slots) - np.count_nonzero(overlooked)]
    lane = lane.take(order)
    codes = codes.take(order)
    plain = _matches(lane, codes, pattern)
    at = np.flatnonzero(plain)
    timely = _in_time(order.take(at), order.take(at + 1), times, pattern, patience)
    if not timely.all():
        plain[at[~timely]] = False
        at = at[timely]
    if not len(at):
        return None
    services = Services(at, at + len(pattern), at, np.zeros(len(at), np.bool_))
    if nesting:
        free = np.ones(len(order), np.bool_)  # rows of no service
        for offset in range(len(pattern)):
            free[offset : offset + len(plain)] &= ~plain
        rows = np.flatnonzero(free)
        found = np.flatnonzero(_matches(lane[rows], codes[rows], pattern))
        outer = rows[found]
        index = found + len(pattern) - 2
        entered = rows[index]
        ended = rows[index + 1]
        good = _in_time(order[outer], order[entered], times, pattern, patience)
        good &= entered == outer + len(pattern) - 2  # nothing happens between a request and its delivery
        # All rows between two that follow each other in `rows` are rows of services, and so are all others before.
        low = (entered - index) // len(pattern)
        high = low + (ended - entered - 1) // len(pattern)
        good &= low < high
        services = _interrupted(services, outer[good], ended[good], low[good], high[good], codes)
    return Runs(order, lane, codes, pattern[-2], services, len(slots))


def _matches(lane: Any, codes: Any, pattern: tuple[int, ...]) -> Any:
    """Where rows that follow each other have the steps of the pattern, one lane and one vector."""
    n = max(0, len(codes) - len(pattern) + 1)
    first = codes[:n]
    good = first >> BITS == pattern[0]
    good &= lane[:n] == lane[len(lane) - n :]
    for offset, wanted in enumerate(pattern[1:-1], 1):
        good &= codes[offset : offset + n] == first + (wanted - pattern[0] << BITS)
    eoi = codes[len(codes) - n :]
    good &= (eoi == pattern[-1] << BITS) | (eoi == first + (pattern[-1] - pattern[0] << BITS))
    return good


def _in_time(asked: Any, delivered: Any, times: Any, pattern: tuple[int, ...], patience: int) -> Any:
    """Which requests are delivered before patience ends; all, where requests are not recorded."""
    if len(pattern) < 3:
        return np.ones(len(asked), np.bool_)
    return times.take(delivered) - times.take(asked) < patience


def _interrupted(inner: Services, outer: Any, ended: Any, low: Any, high: Any, codes: Any) -> Services:
    """Services of which none is part of another: `inner`, and in place of its elements from `low` to before `high` that
    which begins at `outer` and has its EOI at `ended`, if all those are of higher classes."""
    at = inner.begin
    bounds = np.column_stack((low, high)).reshape(-1)
    vectors = _vectors(codes.take(at))
    lowest = np.minimum.reduceat(np.append(vectors, 0xFF), bounds)[::2] if len(bounds) else vectors[:0]
    higher = lowest >> 4 > _vectors(codes[outer]) >> 4
    outer, ended, low, high = outer[higher], ended[higher], low[higher], high[higher]
    begin, end, asked, deep = at.copy(), inner.end, at.copy(), inner.deep
    begin[low] = outer
    end[low] = ended + 1
    asked[low] = at[high - 1]
    deep[low] = True
    if len(low) and np.any(high - low > 1):
        kept = np.ones(len(at), np.bool_)
        for n in range(1, int((high - low).max())):
            kept[(low + n)[low + n < high]] = False
        begin, end, asked, deep = begin[kept], end[kept], asked[kept], deep[kept]
    return Services(begin, end, asked, deep)
