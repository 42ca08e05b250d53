"""Whole services in columns: request, delivery and EOI of one vector that follow each other on a processor.

A calm processor is after such a service what it was before it (`short_cuts`). So a *run* of services, with nothing else
on that processor in between, can be taken as one step when its first row comes, whatever other processors do meanwhile.
What is left for the loop of rows are first events, nesting, and whatever is not plain.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

__all__ = ["OVERLOOKED", "Runs", "find_runs"]

#: The step of rows that end no run, though they lie in it.
OVERLOOKED: Final = 0xFF

#: Rows of a run's end that a story can be about: three services.
LAST: Final = 3


class Runs:
    """Runs of services in a stretch. `heads` are their first rows, `tails` marks their other rows.

    `lowest` is the lowest class of a run's vectors; `asked` and `ended` the rows of its last request (delivery, where
    requests are not recorded) and of its last EOI.
    """

    __slots__ = ("_at", "_first", "_last", "_of", "_order", "_size", "asked", "ended", "heads", "lowest", "tails")

    def __init__(self, order: Any, at: Any, size: int, slots: Any, vectors: Any) -> None:
        """`order`: rows by processor; `at`: where in it services of `size` rows begin."""
        begins = np.ones(len(at), np.bool_)
        begins[1:] = (at[1:] - at[:-1] != size) | (slots[order[at[1:]]] != slots[order[at[:-1]]])
        starts = np.flatnonzero(begins)
        self._order: Any = order
        self._at: Any = at
        self._size: int = size
        self._of: Any = np.cumsum(begins) - 1  # the run of each service
        self._first: list[int] = at[starts].tolist()
        last = at[np.append(starts[1:], len(at)) - 1]
        self._last: list[int] = last.tolist()
        self.heads: Any = order[at[starts]]
        self.tails: Any = np.zeros(len(slots), np.bool_)
        for offset in range(size):
            self.tails[order[at + offset]] = True
        self.tails[self.heads] = False
        self.lowest: list[int] = (np.minimum.reduceat(vectors[order[at]], starts) >> 4).tolist()
        self.asked: list[int] = order[last].tolist()
        self.ended: list[int] = order[last + size - 1].tolist()

    def story(self, run: int) -> list[int]:
        """Rows of the last deliveries and EOIs of a run."""
        size = self._size
        end = self._last[run] + size
        rows: list[int] = self._order[max(self._first[run], end - LAST * size) : end].tolist()
        return [row for n, row in enumerate(rows) if n % size >= size - 2]

    def rows(self, run: int) -> Any:
        """All rows of a run."""
        return self._order[self._first[run] : self._last[run] + self._size]

    def counts(self, taken: list[int], slots: Any, vectors: Any, width: int) -> Any:
        """Services of the runs `taken` by slot and vector: index slot * `width` + vector."""
        chosen = np.zeros(len(self._first), np.bool_)
        chosen[taken] = True
        rows = self._order[self._at[chosen[self._of]]]
        return np.bincount(slots[rows] * width + vectors[rows])


def find_runs(slots: Any, steps: Any, vectors: Any, times: Any, pattern: tuple[int, ...], patience: int) -> Runs | None:
    """Runs of services: rows of one slot with the steps of `pattern` (the last is an EOI, that may name no vector: 0)
    and one vector, delivered within `patience` ns of the request; None without any. OVERLOOKED steps end no run."""
    order = np.flatnonzero(steps != OVERLOOKED)
    size = len(pattern)
    if len(order) < size:
        return None
    order = order[np.argsort(slots[order].astype(np.uint16), kind="stable")]
    lane = slots[order]
    step = steps[order]
    vector = vectors[order]
    n = len(order) - size + 1
    good = lane[:n] == lane[size - 1 :]
    for offset, wanted in enumerate(pattern):
        good &= step[offset : n + offset] == wanted
    good &= (vector[size - 1 :] == 0) | (vector[size - 1 :] == vector[:n])
    if size > 2:
        good &= vector[:n] == vector[1 : n + 1]
        time = times[order]
        good &= time[1 : n + 1] - time[:n] < patience
    at = np.flatnonzero(good)
    return Runs(order, at, size, slots, vectors) if len(at) else None
