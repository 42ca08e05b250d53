"""Rules of the GICv2 CPU interfaces (spec S6.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replay.declare import Code
from replay.events import NIL, NONE
from replay.sink import Evidence
from replay.systems.gic.codes import (
    ACTIVE_LEAK,
    DIR_MISSING,
    EOI_ORDER,
    EOI_UNMATCHED,
    PRIORITY_INVERSION,
    SPURIOUS_ACK,
)

if TYPE_CHECKING:
    from replay.systems.gic.machine import GicMachine, InService, Interface

__all__ = ["Monitor"]


class Monitor:
    """Raises divergences about one CPU interface; `unit` says which."""

    def __init__(self, machine: GicMachine) -> None:
        self.machine: GicMachine = machine

    def report(
        self, code: Code, unit: Interface, irq: int, *, val: int = NIL, since: int = NIL, seq: int = NONE,
        expected: str = "", observed: str = "",
    ) -> None:  # fmt: skip
        """One finding; silent where the recording lacks what the rule needs. `seq` is the acknowledge's."""
        m = self.machine
        if not all(m.sees(kind) for kind in code.needs):
            return
        story = (Evidence(since, seq if seq >= 0 else None, f"IAR returned {irq}"),) if since != NIL else ()
        m.sink.report(
            code, m.now, cpu=unit.cpu, obj=irq, val=val, t_first=since, seq=m.seq, expected=expected,
            observed=observed, tags=("virtual",) if unit.virtual else (), evidence=story,
        )  # fmt: skip

    def spurious(self, unit: Interface, irq: int) -> None:
        """gic-spurious-ack."""
        self.report(SPURIOUS_ACK, unit, irq, expected="something to acknowledge", observed=f"IAR returned {irq}")

    def inversion(self, unit: Interface, irq: int, priority: int, running: InService) -> None:
        """gic-priority-inversion: lower number is higher priority; equal does not preempt."""
        self.report(
            PRIORITY_INVERSION,
            unit,
            irq,
            val=running.priority,
            expected=f"nothing until {running.irq} (priority {running.priority}) ends",
            observed=f"{irq} (priority {priority}) acknowledged",
        )

    def order(self, unit: Interface, irq: int, running: InService) -> None:
        """gic-eoi-order."""
        self.report(
            EOI_ORDER, unit, irq, val=running.irq, expected=f"EOIR of {running.irq}", observed=f"EOIR of {irq}"
        )

    def unmatched(self, unit: Interface, irq: int) -> None:
        """gic-eoi-unmatched."""
        self.report(EOI_UNMATCHED, unit, irq, expected="an IAR read before", observed="not in service here")

    def leak(self, unit: Interface, entry: InService) -> None:
        """gic-active-leak."""
        now = self.machine.now
        self.report(
            ACTIVE_LEAK, unit, entry.irq, val=now - entry.since, since=entry.since, seq=entry.seq,
            expected=f"EOIR of {entry.irq}", observed=f"in service for {now - entry.since} ns",
        )  # fmt: skip

    def dir_missing(self, unit: Interface, irq: int, since: int) -> None:
        """gic-dir-missing."""
        held = self.machine.now - since
        self.report(
            DIR_MISSING, unit, irq, val=held, expected=f"DIR of {irq}",
            observed=f"priority dropped, still active after {held} ns",
        )  # fmt: skip
