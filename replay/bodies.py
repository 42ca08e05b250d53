"""What a what-if run takes from the recording besides its stimuli: bodies and lags (spec 0.6).

A *body* is what a guest or driver did because of an outcome: a handler's run, the moment of its EOI. It is stored as
offsets from its cause and replayed at the same offsets from the cause that the model predicts (C2). A *lag* is how
long after a stimulus its effect came: the CPU was busy, or its interrupts were off, under any policy.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import polars as pl

from replay.events import NIL

__all__ = ["MIN_SAMPLES", "Bodies", "Lags", "Measured", "Read", "median", "of_kinds"]

#: An object with fewer recorded bodies than this lends no median (C3).
MIN_SAMPLES: Final = 8

class Read(Protocol):
    """Gives the canonical events of some kinds as one frame in order: seq, t_ns, kind (text) and the other columns.
    With a `limit` about that many of them, from the start."""

    def __call__(self, kinds: Sequence[str], limit: int | None = None) -> pl.DataFrame: ...


def of_kinds(events: pl.DataFrame, *kinds: str) -> pl.DataFrame:
    """The events of these kinds among what a `Read` gave."""
    return events.filter(pl.col("kind").is_in(kinds))


def median(values: Iterable[int]) -> int | None:
    """The lower median, an integer of the recording's own; None without values."""
    ordered = sorted(values)
    return ordered[(len(ordered) - 1) // 2] if ordered else None


class Lags:
    """When the effect of each recorded stimulus began and was done (ns), by the stimulus' `seq`."""

    __slots__ = ("done", "due", "seqs")

    def __init__(self, frame: pl.DataFrame) -> None:
        """`frame` has seq, due and perhaps done, one row for each stimulus, by seq."""
        self.seqs: array[int] = array("q", frame["seq"].cast(pl.Int64).to_list())
        self.due: array[int] = array("q", frame["due"].cast(pl.Int64).to_list())
        last = frame["done"] if "done" in frame.columns else frame["due"]
        self.done: array[int] = array("q", last.cast(pl.Int64).to_list())

    def find(self, seq: int) -> int:
        """Position of a stimulus in `due` and `done`, -1 when it had no effect."""
        index = bisect_left(self.seqs, seq)
        return index if index < len(self.seqs) and self.seqs[index] == seq else -1

    def of(self, seq: int) -> int:
        """Time at which the effect began, NIL without one."""
        index = self.find(seq)
        return NIL if index < 0 else self.due[index]


class _Stock:
    """Recorded bodies of one object, in order; `used` is how many have been given out or passed over."""

    __slots__ = ("causes", "columns", "medians", "used")

    def __init__(self, causes: array[int], columns: tuple[array[int], ...]) -> None:
        self.causes = causes
        self.columns = columns
        self.used = 0
        some = len(causes) >= MIN_SAMPLES
        self.medians = tuple(median(c) or 0 for c in columns) if some else None


class Bodies:
    """Bodies by object. A body has one offset (ns) for each of the columns it was made with."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.stock: dict[int, _Stock] = {}
        self.moved = 0  # replayed from the recording
        self.synthetic = 0  # medians of the object
        self.default = 0  # configured values
        self.dropped = 0  # whose cause was not predicted
        self.merged = 0  # appended to another one

    def add(self, obj: int, causes: Sequence[int], *columns: Sequence[int]) -> None:
        """Bodies of one object: the order of their causes (`seq` or ns, ascending) and their offsets."""
        self.stock[obj] = _Stock(array("q", causes), tuple(array("q", c) for c in columns))

    def take(self, obj: int, first: int, last: int) -> tuple[tuple[int, ...], ...]:
        """Bodies that the recording has for the stimuli from `first` to `last` (as the causes are given).

        More than one when several recorded causes became one predicted cause (C5). None when there is no such body,
        or it was given out already (C3): use `substitute`. Bodies passed over are dropped (C4).
        """
        found = self.stock.get(obj)
        if found is None:
            return ()
        lo = bisect_left(found.causes, first)
        hi = min(bisect_left(found.causes, last) + 1, len(found.causes))
        if hi <= found.used:
            return ()
        if lo > found.used:
            self.dropped += lo - found.used
        lo = max(lo, found.used)
        if lo >= hi:
            found.used = lo
            return ()
        found.used = hi
        self.moved += 1
        self.merged += hi - lo - 1
        return tuple(tuple(column[index] for column in found.columns) for index in range(lo, hi))

    def substitute(self, obj: int) -> tuple[int, ...] | None:
        """Median offsets of the object (C3); None when it has too few bodies, so that the configured ones serve."""
        found = self.stock.get(obj)
        if found is None or found.medians is None:
            self.default += 1
            return None
        self.synthetic += 1
        return found.medians

    def rewind(self) -> Bodies:
        """The same bodies, none of them used: for another run."""
        fresh = Bodies(self.width)
        for obj, found in self.stock.items():
            copy = fresh.stock[obj] = _Stock.__new__(_Stock)
            copy.causes, copy.columns, copy.medians, copy.used = found.causes, found.columns, found.medians, 0
        return fresh

    def metrics(self) -> dict[str, int]:
        """How much of a run rests on what: names begin with `bodies_`."""
        unused = sum(len(s.causes) - s.used for s in self.stock.values())
        return {
            "bodies_moved": self.moved,
            "bodies_merged": self.merged,
            "bodies_dropped": self.dropped + unused,
            "bodies_synthetic": self.synthetic,
            "bodies_default": self.default,
        }


@dataclass(slots=True)
class Measured:
    """What a system's vectorised pre-pass over a recording found for its what-if runs.

    `values` are parameters (the user's own go over them), `init` is what `Machine.load` takes. `bodies` and `lags` are
    the machine's. `assumptions` are sentences for the report; `blind` says which stimulus is missing, so that nothing
    can be calibrated; `undecided` gives, for a policy, the reason why its what-if says nothing.
    """

    values: dict[str, Any] = field(default_factory=dict)
    init: dict[str, Any] = field(default_factory=dict)
    bodies: Bodies | None = None
    lags: Lags | None = None
    assumptions: list[str] = field(default_factory=list)
    blind: str = ""
    undecided: dict[str, str] = field(default_factory=dict)
    #: The longest that an effect was seen to take (ns): one predicted closer to the end may come after it.
    reach_ns: int = 0
    #: Stimuli were concluded from outcomes or other records.
    inferred: bool = False
    #: Recorded outcomes of other objects than these are not the model's (None: all are).
    only: frozenset[int] | None = None
    #: Whatever else a system's own machine understands.
    aids: Any = None

    def fresh(self) -> Measured:
        """For another run: bodies that nobody has used."""
        bodies = self.bodies.rewind() if self.bodies is not None else None
        return replace(self, bodies=bodies)
