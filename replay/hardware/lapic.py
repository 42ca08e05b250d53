"""Local APIC: the registers that decide what is delivered when, physical or virtual (spec S6.1).

Intel SDM vol. 3A, chapter "Advanced Programmable Interrupt Controller", sections on interrupt priority, PPR,
IRR/ISR/TMR and EOI.
"""

from __future__ import annotations

from typing import Final

from replay.knowledge import UNKNOWN

__all__ = ["VECTORS", "VECTOR_BIT", "LocalApic", "vector_class"]

VECTORS: Final = 256
#: A vector's bit in IRR and TMR.
VECTOR_BIT: Final[tuple[int, ...]] = tuple(1 << vector for vector in range(VECTORS))
#: Vectors below this are reserved for exceptions; accepting one is illegal (L1).
FIRST_LEGAL_VECTOR: Final = 16
#: A class above all: nothing is known of any in-service vector.
ALL_CLASSES: Final = 16


def vector_class(vector: int) -> int:
    """Priority class: the upper four bits of a vector."""
    return vector >> 4


class LocalApic:
    """IRR, ISR, TMR, TPR of one local APIC.

    `isr` lists the vectors known to be in service, lowest priority first (the highest is the last). What is *not* known
    is kept as one number: vectors of a class below `isr_unknown_below` may be in service unseen. A delivery proves that
    nothing of its class or above was in service (L3), so knowledge grows by itself (U4). So does TPR, which
    is UNKNOWN until a write to it is seen.
    `irr`/`irr_known` are bit masks: a bit of `irr` counts only where `irr_known` has it too.
    """

    __slots__ = ("irr", "irr_known", "isr", "isr_unknown_below", "spurious_vector", "tmr", "tpr")

    def __init__(self, *, known: bool, spurious_vector: int = 0xFF) -> None:
        self.irr: int = 0
        self.irr_known: int = 0
        self.isr: list[int] = []
        self.isr_unknown_below: int = 0
        self.tmr: int = 0
        self.tpr: int = 0
        self.spurious_vector: int = spurious_vector
        if known:
            self.reset()
        else:
            self.forget()

    def reset(self) -> None:
        """Power-up, INIT, or a new vCPU: everything is empty and known."""
        self.irr = 0
        self.irr_known = (1 << VECTORS) - 1
        self.isr.clear()
        self.isr_unknown_below = 0
        self.tmr = 0
        self.tpr = 0

    def forget(self) -> None:
        """Records were lost (U2): any vector may be requested or in service."""
        self.irr = 0
        self.irr_known = 0
        self.isr.clear()
        self.isr_unknown_below = ALL_CLASSES
        self.tpr = UNKNOWN

    def accept(self, vector: int, level: bool) -> bool:
        """L1: the bus or a device asks for `vector`. True when IRR had it already: the two collapse into one."""
        bit = 1 << vector
        coalesced = bool(self.irr & bit)
        self.irr |= bit
        self.irr_known |= bit
        if level:
            self.tmr |= bit
        else:
            self.tmr &= ~bit
        return coalesced

    def highest_in_service(self) -> int:
        """Highest vector known to be in service, -1 if none is known."""
        return self.isr[-1] if self.isr else -1

    def ppr_class(self) -> int:
        """L2: class of the processor priority, from what is known of TPR and ISR (a lower bound)."""
        in_service = vector_class(self.isr[-1]) if self.isr else 0
        return max(in_service, vector_class(self.tpr))  # UNKNOWN is below everything

    def held_by_tpr(self, vector: int) -> bool:
        """L2: whether TPR is known to hold `vector` back, whatever is in service."""
        return self.tpr >> 4 > 0 and vector_class(vector) <= self.tpr >> 4

    def pending_above(self, vector: int) -> int:
        """Highest vector in IRR of a higher class than `vector`, -1 if none is known."""
        above = self.irr >> ((vector_class(vector) + 1) << 4)
        return (above.bit_length() - 1) + ((vector_class(vector) + 1) << 4) if above else -1

    def deliver(self, vector: int) -> None:
        """L3: IRR bit to ISR bit. The caller has checked the conditions; the spurious vector sets no ISR bit."""
        bit = 1 << vector
        self.irr &= ~bit
        if vector == self.spurious_vector:
            return
        if vector not in self.isr:
            self.isr.append(vector)
            if len(self.isr) > 1 and self.isr[-2] > vector:
                self.isr.sort()
        if vector >> 4 < self.isr_unknown_below:
            self.isr_unknown_below = vector >> 4
        if self.held_by_tpr(vector):
            self.tpr = UNKNOWN  # it was lowered, and nobody saw it

    def eoi(self) -> int:
        """L4: clear the highest ISR bit and return its vector; -1 when none is known to be set."""
        return self.isr.pop() if self.isr else -1

    def isr_is_known(self) -> bool:
        """Whether no unseen vector can be in service."""
        return self.isr_unknown_below <= 1

    def settle(self) -> None:
        """Nothing unseen is in service: the owner sleeps with interrupts on, so its handlers have ended."""
        self.isr_unknown_below = 0
