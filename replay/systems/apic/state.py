"""State of one processor as the APIC rules see it: its LAPIC and the handlers that run on it."""

from __future__ import annotations

from collections import deque
from typing import Final

from replay.events import NONE
from replay.hardware.lapic import VECTORS, LocalApic, vector_class
from replay.knowledge import UNKNOWN
from replay.sink import Evidence

__all__ = ["STORY", "Processor"]

#: How many deliveries and EOIs are remembered to tell how it came to a finding.
STORY: Final = 6


class Processor:
    """A physical CPU (`cpu`) or a vCPU (`dom`, `vcpu`).

    `frames` are the handlers running, outermost first, as (vector, entry time in ns). `running` is 0, 1 or UNKNOWN.
    `conf` is the confidence of a statement about an empty ISR: lower once it was concluded from a halt.
    `deliveries` and `eois` count by vector; the last of `eois` are those of which the vector is unknown.
    """

    __slots__ = (
        "conf", "cpu", "deliverable_since", "deliveries", "dom", "eois", "frames", "frames_known", "generation", "key",
        "lapic", "recent", "requested_at", "returned_at", "running", "serial", "vcpu", "watched",
    )  # fmt: skip

    def __init__(
        self, key: int, serial: int, cpu: int, dom: int, vcpu: int, *, known: bool, spurious_vector: int
    ) -> None:
        self.key: int = key
        self.serial: int = serial
        self.cpu: int = cpu
        self.dom: int = dom
        self.vcpu: int = vcpu
        self.lapic = LocalApic(known=known, spurious_vector=spurious_vector)
        self.frames: list[tuple[int, int]] = []
        self.frames_known: bool = known
        self.running: int = 1 if dom == NONE else UNKNOWN
        self.conf: int = 100
        self.deliverable_since: int = 0
        self.requested_at: dict[int, int] = {}
        self.returned_at: dict[int, int] = {}  # when the handler of a vector last returned before its EOI
        self.watched: bool = False  # the agenda has an entry for the oldest request
        self.generation: int = 0
        self.deliveries: list[int] = [0] * VECTORS
        self.eois: list[int] = [0] * (VECTORS + 1)
        self.recent: deque[tuple[int, int, int]] = deque(maxlen=STORY)  # (t, seq, vector or -1 for EOI)

    def forget(self) -> None:
        """Records were lost: registers, stack and run state are unknown."""
        self.lapic.forget()
        self.frames.clear()
        self.frames_known = False
        self.requested_at.clear()
        self.recent.clear()
        self.new_generation()
        if self.dom != NONE:
            self.running = UNKNOWN

    def new_generation(self) -> None:
        """Entries of the agenda about the state before this moment are stale."""
        self.generation += 1
        self.watched = False

    def blocked(self, vector: int) -> bool:
        """Whether TPR or a vector in service holds `vector` back (L2)."""
        return vector_class(vector) <= self.lapic.ppr_class()

    def story(self) -> tuple[Evidence, ...]:
        """The last deliveries and EOIs, oldest first."""
        return tuple(
            Evidence(t, seq, "EOI" if vector < 0 else f"deliver {vector:#x}") for t, seq, vector in self.recent
        )
