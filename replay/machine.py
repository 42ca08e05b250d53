"""What every machine has: an agenda, a clock, a sink (spec I.1).

A machine owns state and pure transitions; a policy is a strategy object that only its hooks know; a monitor is told
of transitions and raises divergences. `consume` is the event glue: one loop, one branch for each kind, no dispatch
tables and no strings (3 M events/s interpreted).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final

from replay.agenda import SOFTWARE, Agenda
from replay.compiled import mypyc_attr
from replay.effects import Effects
from replay.events import Batch
from replay.sink import Sink

if TYPE_CHECKING:
    from replay.bodies import Measured

__all__ = ["GAP_BEGINS", "Machine"]

#: Flag of trace.lost: from here on records of the CPU are missing, until the next trace.lost of that CPU.
GAP_BEGINS: Final = 1


@mypyc_attr(allow_interpreted_subclasses=True)
class Machine:
    """Base of all machines. Subclasses define `columns`, `consume`, `fire`, `metrics` and their own state."""

    #: Columns of the canonical events, in the order in which `consume` unpacks a row.
    columns: ClassVar[tuple[str, ...]] = ("kind", "t_ns", "cpu", "obj", "tgt", "val")

    def __init__(self, sink: Sink) -> None:
        self.sink = sink
        self.agenda = Agenda()
        self.now = 0  # ns
        self.open_gaps = 0  # stretches of lost records that have begun and not ended
        #: Whether the events begin with the system's own beginning. If not, all state starts unknown (U1).
        self.from_boot = True
        #: Kinds that the recording can show; None means all of them (scenarios). Rules that lack one stay silent.
        self.observed: frozenset[str] | None = None
        #: What-if: the effects that a guest or device would notice, as (t ns, what). Two policies that differ here
        #: have left the recording behind (spec 0.5).
        self.effects = Effects()
        #: What-if on a recording: what was measured in it (spec 0.6); None in scenarios.
        self.measured: Measured | None = None
        #: Tables for people that are neither findings nor metrics: name to rows of plain JSON values.
        self.extra: dict[str, list[dict[str, int | str | None]]] = {}

    def sees(self, kind: str) -> bool:
        """Whether the recording would show events of this kind if they happened."""
        return self.observed is None or kind in self.observed

    def ignores(self) -> frozenset[str]:
        """Kinds of which no event can change the state, a finding or a number, as this recording is observed: a reader
        may leave them out. Asked once, after `load`."""
        return frozenset()

    def load(self, init: Mapping[str, Any]) -> None:
        """State at the start, from a scenario's `init` or a snapshot. Absent keys keep the default."""

    def feed(self, batch: Batch) -> None:
        """Feed a batch of events, in order. A machine may override it to take short cuts; `consume` is the law."""
        self.consume(batch.rows(self.columns))

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        """Feed events in order. Before each, `self.advance(t)` lets earlier entries of the agenda happen."""
        raise NotImplementedError

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        """An entry of the agenda is due; `self.now` is its time."""
        raise NotImplementedError

    def advance(self, t: int) -> None:
        """Let everything happen that comes before a recorded event of time `t` (ns), then set the clock to it."""
        heap = self.agenda.heap
        while heap:
            due, order, _, action, a, b, c = heap[0]
            if due > t or (due == t and order >= SOFTWARE):
                break
            heapq.heappop(heap)
            self.now = due
            self.fire(action, a, b, c)
        self.now = t

    def finish(self, t_end: int) -> None:
        """Let everything up to and including `t_end` happen, then evaluate what is only known at the end."""
        agenda = self.agenda
        while agenda.heap and agenda.heap[0][0] <= t_end:
            due, _, _, action, a, b, c = agenda.pop()
            self.now = due
            self.fire(action, a, b, c)
        self.now = t_end
        self.conclude(t_end)

    def conclude(self, t_end: int) -> None:
        """Rules that are evaluated at the end of a run."""

    def taint(self, cpu: int, t0: int, t1: int) -> None:
        """Records of `cpu` (NONE: all) between t0 and t1 are lost: what they could have written is unknown (U2)."""

    def gap(self, flags: int) -> None:
        """`trace.lost`: a stretch of lost records begins or ends."""
        self.open_gaps = max(0, self.open_gaps + (1 if flags & GAP_BEGINS else -1))

    def metrics(self) -> dict[str, int]:
        """Named numbers of the run (spec I.5); names are those of the scenarios."""
        return {}
