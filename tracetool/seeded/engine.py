"""A discrete-event simulator in a few lines, and what it leaves behind: a recording.

It knows nothing of the models under test. Guests, hypervisors and devices of the five documents are written on top of
it as plain callbacks over their own state; whatever a recorder would have seen is noted as a canonical event.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from replay.events import KIND_ID, KINDS, events_from_json

__all__ = ["Recording", "World"]

#: Roles that a what-if run is fed with: whatever would have happened under any algorithm.
_GIVEN = ("stimulus", "context", "marker")


@dataclass(frozen=True, slots=True)
class Recording:
    """What a simulated machine left behind.

    `events` in time order, short names as in scenarios; `t_end` in ns; `truth` holds for some divergence codes the
    moments (ns) at which the simulator itself knows that the thing happened.
    """

    events: tuple[dict[str, Any], ...]
    t_end: int
    truth: dict[str, list[int]] = field(default_factory=dict)

    def table(self) -> pa.Table:
        """Stimuli and outcomes, schema `replay.events.SCHEMA`: what verify mode reads."""
        return events_from_json(self.events, src="simulator")

    def stimuli(self) -> pa.Table:
        """Only what no algorithm has a say in: what a what-if run reads."""
        given = [e for e in self.events if e.get("role", KINDS[KIND_ID[e["kind"]]].role) in _GIVEN]
        return events_from_json(given, src="simulator")

    def kinds(self) -> frozenset[str]:
        """The kinds that occur."""
        return frozenset(e["kind"] for e in self.events)


class World:
    """A clock (ns), a queue of callbacks, and the notes of a recorder that misses nothing."""

    def __init__(self) -> None:
        self.now = 0
        self.events: list[dict[str, Any]] = []
        self.truth: dict[str, list[int]] = {}
        self._queue: list[tuple[int, int, Callable[..., None], tuple[int, ...]]] = []
        self._serial = 0

    def at(self, t: int, action: Callable[..., None], *arguments: int) -> None:
        """Call `action(*arguments)` at `t`; calls for the same moment keep their order."""
        self._serial += 1
        heapq.heappush(self._queue, (max(t, self.now), self._serial, action, arguments))

    def after(self, delay: int, action: Callable[..., None], *arguments: int) -> None:
        """Call `action(*arguments)` in `delay` ns."""
        self.at(self.now + delay, action, *arguments)

    def note(self, kind: str, **fields: Any) -> None:
        """The recorder writes an event; `role` only where it differs from the vocabulary's."""
        self.events.append({"t": self.now, "kind": kind, **fields})

    def happened(self, code: str) -> None:
        """The simulator itself knows that this has happened now."""
        self.truth.setdefault(code, []).append(self.now)

    def run(self, until: int) -> Recording:
        """Let time pass up to and including `until`; returns the recording."""
        while self._queue and self._queue[0][0] <= until:
            self.now, _, action, arguments = heapq.heappop(self._queue)
            action(*arguments)
        self.now = until
        return Recording(tuple(self.events), until, self.truth)
