"""GICv2 virtual CPU interface: list registers, VMCR, active priorities, maintenance status.

Source: GICv2 architecture specification chapter 5 (GICH_* and GICV_*). Pure state and transitions, no policy.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "ACTIVE",
    "BOTH",
    "INVALID",
    "LR_EOI",
    "LR_HW",
    "NO_LR",
    "PENDING",
    "SPURIOUS",
    "ListRegisters",
    "lr_physical",
    "lr_priority",
    "lr_state",
    "lr_virtual",
    "lr_with_state",
    "lr_word",
]

#: INTID that IAR returns when nothing can be acknowledged.
SPURIOUS: Final = 1023
#: "In no list register" (GIC_INVALID_LR is 0xff in Xen).
NO_LR: Final = -1

# GICH_LRn.State, bits 29:28
INVALID: Final = 0
PENDING: Final = 1
ACTIVE: Final = 2
BOTH: Final = 3

LR_VIRTUAL: Final = 0x3FF  # bits 9:0
LR_PHYSICAL_SHIFT: Final = 10  # bits 19:10, with HW=1
LR_EOI: Final = 1 << 19  # maintenance interrupt on EOI, with HW=0: the same bit as physical id bit 9
LR_CPUID_SHIFT: Final = 10  # bits 12:10, source of an SGI, with HW=0
LR_PRIORITY_SHIFT: Final = 23  # bits 27:23, the upper five bits of a priority
LR_PRIORITY: Final = 0x1F
LR_STATE_SHIFT: Final = 28
LR_HW: Final = 1 << 31

HCR_EN: Final = 1 << 0
HCR_UIE: Final = 1 << 1
HCR_LRENPIE: Final = 1 << 2
HCR_NPIE: Final = 1 << 3
HCR_EOICOUNT: Final = 0x1F << 27

MISR_EOI: Final = 1 << 0
MISR_U: Final = 1 << 1
MISR_LRENP: Final = 1 << 2
MISR_NP: Final = 1 << 3

VMCR_ENABLE: Final = 0x3  # both groups
VMCR_EOIMODE: Final = 1 << 9
VMCR_PMR_SHIFT: Final = 27
VMCR_BPR_SHIFT: Final = 21  # bits 23:21, at least 2 with 32 priorities
VMCR_ABPR_SHIFT: Final = 18  # bits 20:18, at least 3
_VMCR_BPRS: Final = 0x3F << VMCR_ABPR_SHIFT

VMCR_CTLR: Final = 0x3FF

GICV_CTLR: Final = 0x0000
GICV_PMR: Final = 0x0004
GICV_EOIR: Final = 0x0010
GICV_DIR: Final = 0x1000

_IDLE: Final = 0x100  # running priority when nothing is active


def lr_word(virtual: int, state: int, priority: int, *, physical: int = -1, eoi: bool = False) -> int:
    """A GICH_LR word. `physical` >= 0 sets HW; then the EOI maintenance bit does not exist and `eoi` is ignored."""
    word = virtual & LR_VIRTUAL | state << LR_STATE_SHIFT | (priority >> 3 & LR_PRIORITY) << LR_PRIORITY_SHIFT
    if physical >= 0:
        return word | LR_HW | (physical & 0x3FF) << LR_PHYSICAL_SHIFT
    return word | (LR_EOI if eoi else 0)


def lr_virtual(word: int) -> int:
    """Virtual INTID."""
    return word & LR_VIRTUAL


def lr_physical(word: int) -> int:
    """Physical INTID, -1 with HW=0."""
    return word >> LR_PHYSICAL_SHIFT & 0x3FF if word & LR_HW else -1


def lr_priority(word: int) -> int:
    """Priority in the 8-bit scale of the distributor."""
    return (word >> LR_PRIORITY_SHIFT & LR_PRIORITY) << 3


def lr_state(word: int) -> int:
    """INVALID, PENDING, ACTIVE or BOTH."""
    return word >> LR_STATE_SHIFT & 3


def lr_with_state(word: int, state: int) -> int:
    """The word with another state."""
    return word & ~(3 << LR_STATE_SHIFT) | state << LR_STATE_SHIFT


class ListRegisters:
    """GICH and GICV of one core: `count` list registers, HCR, VMCR, APR.

    Words that were never written are what reset makes them: 0.
    """

    __slots__ = ("apr", "count", "hcr", "vmcr", "words")

    def __init__(self, count: int) -> None:
        self.count: int = count
        self.words: list[int] = [0] * count
        self.hcr: int = 0
        self.vmcr: int
        self.write_vmcr(0)
        self.apr: int = 0

    # -- GICH: the hypervisor's side ---------------------------------------------------------------------

    def write(self, n: int, word: int) -> None:
        """GICH_LRn := word."""
        self.words[n] = word

    def write_vmcr(self, value: int) -> None:
        """GICH_VMCR := value; the binary points cannot go below what 32 priorities allow."""
        bpr = max(value >> VMCR_BPR_SHIFT & 7, 2)
        abpr = max(value >> VMCR_ABPR_SHIFT & 7, 3)
        self.vmcr = value & ~_VMCR_BPRS | bpr << VMCR_BPR_SHIFT | abpr << VMCR_ABPR_SHIFT

    def state(self, n: int) -> int:
        """State field of LRn."""
        return self.words[n] >> LR_STATE_SHIFT & 3

    def set_state(self, n: int, state: int) -> None:
        """Change the state field of LRn only."""
        self.words[n] = lr_with_state(self.words[n], state)

    def valid(self) -> int:
        """How many LRs are not invalid."""
        count = 0
        for word in self.words:
            if word >> LR_STATE_SHIFT & 3:
                count += 1
        return count

    def eisr(self) -> int:
        """GICH_EISR: LRs that are invalid, HW=0, with the EOI bit: each keeps the maintenance interrupt raised."""
        bits = 0
        for n, word in enumerate(self.words):
            if not word >> LR_STATE_SHIFT & 3 and not word & LR_HW and word & LR_EOI:
                bits |= 1 << n
        return bits

    def elrsr(self) -> int:
        """GICH_ELRSR: LRs that are empty, that is invalid and asking for no maintenance interrupt."""
        bits = 0
        for n, word in enumerate(self.words):
            if not word >> LR_STATE_SHIFT & 3 and (word & LR_HW or not word & LR_EOI):
                bits |= 1 << n
        return bits

    def misr(self) -> int:
        """GICH_MISR: why a maintenance interrupt is raised."""
        bits = MISR_EOI if self.eisr() else 0
        if self.hcr & HCR_UIE and self.valid() <= 1:
            bits |= MISR_U
        if self.hcr & HCR_LRENPIE and self.hcr & HCR_EOICOUNT:
            bits |= MISR_LRENP
        if self.hcr & HCR_NPIE and not any(word >> LR_STATE_SHIFT & 1 for word in self.words):
            bits |= MISR_NP
        return bits

    # -- GICV: the guest's side --------------------------------------------------------------------------

    def write_virtual(self, offset: int, value: int) -> int:
        """A write to GICV + `offset`. Returns the physical INTID that it deactivates, -1 without one."""
        if offset == GICV_CTLR:
            self.vmcr = self.vmcr & ~VMCR_CTLR | value & VMCR_CTLR
        elif offset == GICV_PMR:
            self.vmcr = self.vmcr & ~(LR_PRIORITY << VMCR_PMR_SHIFT) | (value >> 3 & LR_PRIORITY) << VMCR_PMR_SHIFT
        elif offset == GICV_EOIR:
            return self.end_of_interrupt_virtual(value)
        elif offset == GICV_DIR:
            return self.deactivate_virtual(value)
        return -1

    def mask(self) -> int:
        """GICV_PMR, in the 8-bit scale."""
        return (self.vmcr >> VMCR_PMR_SHIFT & LR_PRIORITY) << 3

    def running_priority(self) -> int:
        """Highest active priority, 0x100 when nothing is active. APR has one bit for each of 32 levels."""
        if not self.apr:
            return _IDLE
        return ((self.apr & -self.apr).bit_length() - 1) << 3

    def best_pending(self) -> int:
        """LR index of the highest pending interrupt, -1 without one. Pending-and-active does not count."""
        best = -1
        best_priority = _IDLE
        for n, word in enumerate(self.words):
            if word >> LR_STATE_SHIFT & 3 == PENDING and lr_priority(word) < best_priority:
                best = n
                best_priority = lr_priority(word)
        return best

    def signalled(self) -> bool:
        """Whether the virtual IRQ wire is raised."""
        best = self.best_pending()
        if best < 0 or not self.hcr & HCR_EN or not self.vmcr & VMCR_ENABLE:
            return False
        priority = lr_priority(self.words[best])
        return priority < self.mask() and priority < self.running_priority()

    def acknowledge_virtual(self) -> int:
        """GICV_IAR read: INTID (with the source in 12:10 for an SGI), or SPURIOUS."""
        if not self.signalled():
            return SPURIOUS
        n = self.best_pending()
        word = self.words[n]
        self.set_state(n, ACTIVE)
        self.apr |= 1 << (lr_priority(word) >> 3)
        virtual = lr_virtual(word)
        if virtual < 16 and not word & LR_HW:
            virtual |= (word >> LR_CPUID_SHIFT & 7) << LR_CPUID_SHIFT
        return virtual

    def end_of_interrupt_virtual(self, value: int) -> int:
        """GICV_EOIR write: drops the priority and, with EOImode=0, deactivates.

        Returns the physical INTID that is deactivated with it, -1 when there is none.
        """
        if value & LR_VIRTUAL > 1019:
            return -1
        self.apr &= self.apr - 1  # without the highest; 0 stays 0
        if self.vmcr & VMCR_EOIMODE:
            return -1
        return self.deactivate_virtual(value)

    def deactivate_virtual(self, value: int) -> int:
        """GICV_DIR write (and the second half of EOIR). Returns as `end_of_interrupt_virtual`."""
        virtual = value & LR_VIRTUAL
        for n, word in enumerate(self.words):
            if word & LR_VIRTUAL == virtual and word >> LR_STATE_SHIFT & 2:
                self.words[n] = word & ~(ACTIVE << LR_STATE_SHIFT)
                return lr_physical(word)
        if self.hcr & HCR_EN:  # EOI without a list register: counted, GICH_HCR.EOICount
            self.hcr = self.hcr & ~HCR_EOICOUNT | (self.hcr + (1 << 27)) & HCR_EOICOUNT
        return -1
