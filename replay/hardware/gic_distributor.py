"""GICv2 distributor: enable, pending, active, priority, targets, configuration, SGIs.

Source: GICv2 architecture specification chapter 4.3 (GICD_*). Interrupts 0-15 are SGIs, 16-31 PPIs (both banked
by core), 32 and up SPIs. State is held by interrupt, bits by core where it is banked.
"""

from __future__ import annotations

from typing import Final

__all__ = ["GicDistributor"]

# Register offsets, GICD_*
CTLR: Final = 0x000
ISENABLER: Final = 0x100
ICENABLER: Final = 0x180
ISPENDR: Final = 0x200
ICPENDR: Final = 0x280
ISACTIVER: Final = 0x300
ICACTIVER: Final = 0x380
IPRIORITYR: Final = 0x400
ITARGETSR: Final = 0x800
ICFGR: Final = 0xC00
SGIR: Final = 0xF00
CPENDSGIR: Final = 0xF10
SPENDSGIR: Final = 0xF20

SGIS: Final = 16
PRIVATE: Final = 32
IDLE_PRIORITY: Final = 0x100


class GicDistributor:
    """Distributor of `cpus` cores (at most 8) and `irqs` interrupts.

    The four words of an interrupt (enabled, latch, line, active) are masks of cores; for an SPI all bits are equal.
    """

    __slots__ = (
        "active", "all", "cpus", "ctlr", "edge", "enabled", "irqs", "latch", "line", "pinned", "priority",
        "sgi_sources", "targets",
    )  # fmt: skip

    def __init__(self, irqs: int, cpus: int, *, pinned: bool = False) -> None:
        self.irqs: int = irqs
        #: A latched edge stays with the cores that were its targets when it came, instead of following ITARGETSR as
        #: 4.3.12 demands. QEMU 7.2 emulates it so; an interrupt can then wait until its old target comes back.
        self.pinned: bool = pinned
        self.cpus: int = cpus
        self.all: int = (1 << cpus) - 1
        self.ctlr: int = 0
        self.enabled: list[int] = [self.all if irq < SGIS else 0 for irq in range(irqs)]
        self.latch: list[int] = [0] * irqs
        self.line: list[int] = [0] * irqs
        self.active: list[int] = [0] * irqs
        self.edge: list[bool] = [irq < SGIS for irq in range(irqs)]
        self.targets: list[int] = [0] * irqs
        #: priority[irq * cpus + cpu]
        self.priority: list[int] = [0] * (irqs * cpus)
        #: sgi_sources[sgi * cpus + target]: mask of the cores that sent it
        self.sgi_sources: list[int] = [0] * (SGIS * cpus)

    # -- inputs ------------------------------------------------------------------------------------------

    def set_line(self, irq: int, level: int, cpu: int = 0) -> None:
        """The wire of `irq` changes; `cpu` counts for private interrupts. A rising edge latches an edge interrupt."""
        mask = 1 << cpu if irq < PRIVATE else self.all
        if level:
            if self.edge[irq] and self.line[irq] & mask != mask:
                self.latch[irq] |= self.targets[irq] if self.pinned and irq >= PRIVATE else mask
            self.line[irq] |= mask
        else:
            self.line[irq] &= ~mask

    def send_sgi(self, irq: int, source: int, targets: int) -> None:
        """SGIR: pending for every core of `targets`, by (source, target)."""
        for cpu in range(self.cpus):
            if targets >> cpu & 1:
                self.sgi_sources[irq * self.cpus + cpu] |= 1 << source
                self.latch[irq] |= 1 << cpu

    def write(self, offset: int, size: int, value: int, cpu: int) -> None:
        """A write of `size` bytes to GICD + `offset` by core `cpu`. Registers it does not know have no effect."""
        if offset == CTLR:
            self.ctlr = value
        elif ISENABLER <= offset < IPRIORITYR:
            self._write_bits(offset, size, value, cpu)
        elif IPRIORITYR <= offset < ITARGETSR:
            self._write_priorities(offset - IPRIORITYR, size, value, cpu)
        elif ITARGETSR <= offset < ICFGR:
            self._write_targets(offset - ITARGETSR, size, value)
        elif ICFGR <= offset < SGIR:
            self._write_config((offset - ICFGR) * 4, size, value)
        elif offset == SGIR:
            self._write_sgir(value, cpu)
        elif CPENDSGIR <= offset < SPENDSGIR + 0x10:
            self._write_sgi_pending(offset, size, value, cpu)

    def _write_bits(self, offset: int, size: int, value: int, cpu: int) -> None:
        """One bit an interrupt: set and clear registers of enable, pending, active."""
        register = offset & ~0x7F
        first = (offset & 0x7F) * 8
        for bit in range(size * 8):
            irq = first + bit
            if value >> bit & 1 and irq < self.irqs:
                mask = 1 << cpu if irq < PRIVATE else self.all
                if register == ISENABLER:
                    self.enabled[irq] |= mask
                elif register == ICENABLER:
                    if irq >= SGIS:
                        self.enabled[irq] &= ~mask
                elif register == ISPENDR:
                    if irq >= SGIS:
                        self.latch[irq] |= mask
                elif register == ICPENDR:
                    if irq >= SGIS:
                        self.latch[irq] &= ~mask
                elif register == ISACTIVER:
                    self.active[irq] |= mask
                elif register == ICACTIVER:
                    self.active[irq] &= ~mask

    def _write_priorities(self, first: int, size: int, value: int, cpu: int) -> None:
        """One byte an interrupt; banked for private ones."""
        for index in range(size):
            irq = first + index
            if irq >= self.irqs:
                return
            for core in range(self.cpus):
                if irq >= PRIVATE or core == cpu:
                    self.priority[irq * self.cpus + core] = value >> 8 * index & 0xFF

    def _write_targets(self, first: int, size: int, value: int) -> None:
        """One byte an interrupt, a mask of cores; read-only for private ones (4.3.12).

        An active interrupt is not affected: its state stays; a pending one is offered to the new targets.
        """
        for index in range(size):
            irq = first + index
            if PRIVATE <= irq < self.irqs:
                self.targets[irq] = value >> 8 * index & self.all

    def _write_config(self, first: int, size: int, value: int) -> None:
        """Two bits an interrupt, the upper one says edge. SGIs are always edge."""
        for index in range(size * 4):
            irq = first + index
            if SGIS <= irq < self.irqs:
                self.edge[irq] = bool(value >> (2 * index + 1) & 1)

    def _write_sgir(self, value: int, cpu: int) -> None:
        """GICD_SGIR: filter 25:24 (0 the list in 23:16, 1 all others, 2 the writer itself)."""
        chosen = value >> 24 & 3
        targets = value >> 16 & 0xFF
        if chosen == 1:
            targets = self.all & ~(1 << cpu)
        elif chosen == 2:
            targets = 1 << cpu
        self.send_sgi(value & 0xF, cpu, targets & self.all)

    def _write_sgi_pending(self, offset: int, size: int, value: int, cpu: int) -> None:
        """GICD_CPENDSGIR and GICD_SPENDSGIR: one byte an SGI, a mask of sources."""
        base = SPENDSGIR if offset >= SPENDSGIR else CPENDSGIR
        for index in range(size):
            irq = offset - base + index
            if irq >= SGIS:
                return
            slot = irq * self.cpus + cpu
            sources = value >> 8 * index & 0xFF
            if base == SPENDSGIR:
                self.sgi_sources[slot] |= sources
            else:
                self.sgi_sources[slot] &= ~sources
            if self.sgi_sources[slot]:
                self.latch[irq] |= 1 << cpu
            else:
                self.latch[irq] &= ~(1 << cpu)

    # -- what a CPU interface asks -----------------------------------------------------------------------

    def pending(self, irq: int, cpu: int) -> bool:
        """Latched, or a level interrupt whose line is up, and offered to this core."""
        if not (self.latch[irq] >> cpu & 1 or (not self.edge[irq] and self.line[irq] >> cpu & 1)):
            return False
        return irq < PRIVATE or bool(self.targets[irq] >> cpu & 1)

    def best_pending(self, cpu: int) -> int:
        """Highest pending, enabled, not active interrupt for a core; the lowest INTID among equals; -1 without one."""
        best = -1
        best_priority = IDLE_PRIORITY
        if not self.ctlr & 3:
            return best
        bit = 1 << cpu
        for irq in range(self.irqs):
            if self.enabled[irq] & bit and not self.active[irq] & bit and self.pending(irq, cpu):
                priority = self.priority[irq * self.cpus + cpu]
                if priority < best_priority:
                    best = irq
                    best_priority = priority
        return best

    def priority_of(self, irq: int, cpu: int) -> int:
        """Priority of an interrupt as seen by a core."""
        return self.priority[irq * self.cpus + cpu]

    def activate(self, irq: int, cpu: int) -> int:
        """An IAR read takes `irq`: pending to active. Returns the source core of an SGI, else 0."""
        mask = 1 << cpu if irq < PRIVATE else self.all
        if irq >= SGIS:
            self.latch[irq] &= ~mask
            self.active[irq] |= mask
            return 0
        slot = irq * self.cpus + cpu
        sources = self.sgi_sources[slot]
        source = (sources & -sources).bit_length() - 1 if sources else 0
        self.sgi_sources[slot] = sources & (sources - 1) if sources else 0
        if not self.sgi_sources[slot]:
            self.latch[irq] &= ~mask
        self.active[irq] |= mask
        return source

    def deactivate(self, irq: int, cpu: int) -> None:
        """Active to inactive (EOIR with EOImode=0, DIR, or the EOI of a list register with HW=1); -1: nothing."""
        if 0 <= irq < self.irqs:
            self.active[irq] &= ~(1 << cpu if irq < PRIVATE else self.all)
