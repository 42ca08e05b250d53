"""GICv2 CPU interface: priority mask, running priority, active interrupts, EOI modes.

Source: GICv2 architecture specification chapter 4.4 (GICC_*).
"""

from __future__ import annotations

from typing import Final

from replay.hardware.gic_distributor import IDLE_PRIORITY, SGIS, GicDistributor

__all__ = ["GicCpuInterface"]

# Register offsets, GICC_*
CTLR: Final = 0x0000
PMR: Final = 0x0004
BPR: Final = 0x0008
EOIR: Final = 0x0010
DIR: Final = 0x1000

CTLR_ENABLE: Final = 0x3
CTLR_EOIMODE: Final = 1 << 9
SPURIOUS: Final = 1023
INTID: Final = 0x3FF


class GicCpuInterface:
    """Physical CPU interface of one core. `acknowledge`, `end_of_interrupt`, `deactivate` are IAR, EOIR and DIR."""

    __slots__ = ("bpr", "cpu", "ctlr", "distributor", "pmr", "stack")

    def __init__(self, distributor: GicDistributor, cpu: int) -> None:
        self.distributor: GicDistributor = distributor
        self.cpu: int = cpu
        self.ctlr: int = 0
        self.pmr: int = 0
        self.bpr: int = 0
        #: active priorities, the running one last
        self.stack: list[int] = []

    def write(self, offset: int, value: int) -> None:
        """A write to GICC + `offset`. Registers it does not know have no effect."""
        if offset == CTLR:
            self.ctlr = value
        elif offset == PMR:
            self.pmr = value & 0xFF
        elif offset == BPR:
            self.bpr = value & 7
        elif offset == EOIR:
            self.end_of_interrupt(value)
        elif offset == DIR:
            self.deactivate(value)

    def running_priority(self) -> int:
        """Priority of the highest active interrupt, 0x100 when idle."""
        return self.stack[-1] if self.stack else IDLE_PRIORITY

    def signalled(self) -> int:
        """INTID that raises the IRQ wire of the core, -1 without one: below PMR and below the running group."""
        if not self.ctlr & CTLR_ENABLE:
            return -1
        irq = self.distributor.best_pending(self.cpu)
        if irq < 0:
            return -1
        priority = self.distributor.priority_of(irq, self.cpu)
        if priority >= self.pmr or self._group(priority) >= self.running_priority():
            return -1
        return irq

    def _group(self, priority: int) -> int:
        """Group priority: the bits that decide preemption, by GICC_BPR (4.4.3)."""
        return priority & ~((2 << self.bpr) - 1)

    def acknowledge(self) -> int:
        """GICC_IAR read: INTID, for an SGI with its source core in bits 12:10, or SPURIOUS."""
        irq = self.signalled()
        if irq < 0:
            return SPURIOUS
        self.stack.append(self._group(self.distributor.priority_of(irq, self.cpu)))
        source = self.distributor.activate(irq, self.cpu)
        return irq | source << 10 if irq < SGIS else irq

    def end_of_interrupt(self, value: int) -> None:
        """GICC_EOIR write: priority drop; with EOImode=0 also deactivates."""
        irq = value & INTID
        if irq >= self.distributor.irqs:
            return
        if self.stack:
            self.stack.pop()
        if not self.ctlr & CTLR_EOIMODE:
            self.distributor.deactivate(irq, self.cpu)

    def deactivate(self, value: int) -> None:
        """GICC_DIR write: deactivates; the running priority stays."""
        if self.ctlr & CTLR_EOIMODE:
            self.distributor.deactivate(value & INTID, self.cpu)
