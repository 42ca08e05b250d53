"""Linux irq_desc: the software state of one interrupt line (spec S6.5), and what handler entries and exits must obey.

Linux kernel/irq: handle_irq_event, note_interrupt, __disable_irq/__enable_irq.
"""

from __future__ import annotations

from typing import Final

from replay.events import NONE
from replay.knowledge import UNKNOWN

__all__ = [
    "DISABLED",
    "INPROGRESS",
    "MASKED",
    "MOVE_PENDING",
    "ONESHOT",
    "PENDING",
    "PER_CPU",
    "REPLAY",
    "CpuStack",
    "IrqDesc",
]

#: Bits of the `val` of `irqdesc.state`. The kernel's own bit numbers moved between versions; bindings translate.
INPROGRESS: Final = 1 << 0
PENDING: Final = 1 << 1
MASKED: Final = 1 << 2
DISABLED: Final = 1 << 3
MOVE_PENDING: Final = 1 << 4
REPLAY: Final = 1 << 5
ONESHOT: Final = 1 << 6
PER_CPU: Final = 1 << 7


class IrqDesc:
    """Checker's view of one irq: on which cpu its handler runs, and what its handlers returned."""

    __slots__ = ("begin_t", "count", "cpu", "irq", "max_handler_ns", "per_cpu", "risk_reported", "unhandled")

    def __init__(self, irq: int, known: bool) -> None:
        self.irq: int = irq
        self.cpu: int = NONE  # handler seen running here
        self.begin_t: int = 0
        self.per_cpu: int = 0 if known else UNKNOWN
        self.count: int = 0  # returns in the present window of note_interrupt
        self.unhandled: int = 0
        self.risk_reported: bool = False
        self.max_handler_ns: int = 0

    def note(self, handled: bool, window: int) -> int:
        """note_interrupt: count one return; the number of unhandled ones in the present window of `window` returns."""
        if self.count >= window:
            self.count = 0
            self.unhandled = 0
            self.risk_reported = False
        self.count += 1
        if not handled:
            self.unhandled += 1
        return self.unhandled


class CpuStack:
    """Handlers that run on one cpu, outermost first. `complete`: nothing runs there that was not seen to begin."""

    __slots__ = ("complete", "irqs")

    def __init__(self, known: bool) -> None:
        self.irqs: list[int] = []
        self.complete: bool = known

    def enter(self, irq: int) -> bool:
        """False when `irq` is already running on this cpu: its exit is missing; it is replaced."""
        if irq in self.irqs:
            del self.irqs[self.irqs.index(irq) :]
            self.irqs.append(irq)
            return False
        self.irqs.append(irq)
        return True

    def leave(self, irq: int) -> bool:
        """False when the exit does not match the innermost entry."""
        if self.irqs and self.irqs[-1] == irq:
            self.irqs.pop()
            return True
        if irq in self.irqs:
            del self.irqs[self.irqs.index(irq) :]
            return False
        return not self.irqs and not self.complete
