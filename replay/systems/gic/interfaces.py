"""The registers of one core's GICv2 interfaces, physical and virtual, with what is known of them (spec S6.3, S3.1)."""

from __future__ import annotations

from functools import reduce
from operator import or_
from typing import Final

from replay.events import NIL
from replay.hardware.gic_cpu_interface import GicCpuInterface
from replay.hardware.gic_distributor import GicDistributor
from replay.hardware.gic_list_registers import ListRegisters

__all__ = ["ACTIVE", "GICH_LR", "Interfaces"]

GICH_HCR: Final = 0x000
GICH_VMCR: Final = 0x008
GICH_APR: Final = 0x0F0
GICH_LR: Final = 0x100
#: State of a list register.
ACTIVE: Final = 2


class Interfaces:
    """Both CPU interfaces of a core. `unknown` are the GICH registers of which the value was never seen; `certain` says
    of each active priority, and of having none, whether it is known or a guess; `assumed`: GICC_CTLR was not seen."""

    __slots__ = ("assumed", "certain", "lrs", "physical", "unknown")

    def __init__(self, distributor: GicDistributor, cpu: int, nr_lrs: int, *, known: bool) -> None:
        self.physical = GicCpuInterface(distributor, cpu)
        self.lrs = ListRegisters(nr_lrs)
        registers = [GICH_HCR, GICH_VMCR, GICH_APR, *range(GICH_LR, GICH_LR + 4 * nr_lrs, 4)]
        self.unknown: set[int] = set() if known else set(registers)
        self.certain = [known]
        self.assumed = not known

    def read(self, offset: int) -> int:
        """GICH + `offset`, NIL for a register that is not modelled."""
        if offset == GICH_HCR:
            return self.lrs.hcr
        if offset == GICH_VMCR:
            return self.lrs.vmcr
        if offset == GICH_APR:
            return self.lrs.apr
        n = (offset - GICH_LR) // 4
        return self.lrs.words[n] if 0 <= n < self.lrs.count else NIL

    def active_priorities(self) -> int:
        """APR as the list registers have it: one bit for each priority of which one is active."""
        return reduce(or_, (1 << (w >> 23 & 0x1F) for w in self.lrs.words if w >> 28 & ACTIVE), 0)

    def write(self, offset: int, value: int) -> None:
        """GICH + `offset` := value."""
        self.unknown.discard(offset)
        if offset == GICH_HCR:
            self.lrs.hcr = value
        elif offset == GICH_VMCR:
            self.lrs.write_vmcr(value)
        elif offset == GICH_APR:
            self.lrs.apr = value
        elif 0 <= (offset - GICH_LR) // 4 < self.lrs.count:
            self.lrs.write((offset - GICH_LR) // 4, value)
