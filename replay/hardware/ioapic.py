"""I/O APIC pins: redirection entry, line, Remote IRR; physical or virtual (spec S6.2).

Intel 82093AA datasheet, "I/O Redirection Table Registers"; Xen arch/x86/hvm/vioapic.c keeps the same rules.
Flags are 0, 1 or UNKNOWN: a transition that reads an unknown makes unknown what it would have written, no more.
"""

from __future__ import annotations

from typing import Final

from replay.events import NONE
from replay.knowledge import UNKNOWN

__all__ = [
    "LOST",
    "LOWEST_PRIORITY",
    "MAYBE",
    "NOTHING",
    "SEND",
    "IoApic",
    "Pin",
    "rte_word",
]

#: What a transition did: no message, a message to the local APICs, perhaps one, or an edge that nobody will see.
NOTHING: Final = 0
SEND: Final = 1
MAYBE: Final = 2
LOST: Final = 3

# Bits of a redirection entry.
VECTOR_MASK: Final = 0xFF
DELIVERY_SHIFT: Final = 8
DELIVERY_MASK: Final = 0x7
DESTMODE_BIT: Final = 11
TRIGGER_BIT: Final = 15
MASK_BIT: Final = 16
DEST_SHIFT: Final = 56
#: Delivery mode 1: the message goes to one of the destinations.
LOWEST_PRIORITY: Final = 1


def rte_word(
    vector: int, *, level: int = 1, masked: int = 0, dest: int = 0, logical: int = 0, delivery: int = 0
) -> int:
    """A redirection entry as the signed 64-bit integer that canonical events carry."""
    word = vector & VECTOR_MASK
    word |= (delivery & DELIVERY_MASK) << DELIVERY_SHIFT
    word |= (logical & 1) << DESTMODE_BIT | (level & 1) << TRIGGER_BIT | (masked & 1) << MASK_BIT
    word |= (dest & 0xFF) << DEST_SHIFT
    return word - (1 << 64) if word >> 63 else word


class Pin:
    """One pin with its redirection entry.

    `sent` is the vector of the last level message that Remote IRR stands for, NONE when it stands for none.
    `rewritten`: vector or trigger were changed while Remote IRR was set, so the awaited EOI may never match (IO4).
    """

    __slots__ = (
        "delivery", "dest", "level", "line", "logical", "masked", "number", "remote_irr", "rewritten", "sent", "vector",
    )  # fmt: skip

    def __init__(self, number: int, *, known: bool) -> None:
        unknown = 0 if known else UNKNOWN
        self.number: int = number
        self.vector: int = NONE
        self.masked: int = 1 if known else UNKNOWN
        self.level: int = unknown
        self.remote_irr: int = unknown
        self.line: int = unknown
        self.dest: int = NONE
        self.logical: int = unknown
        self.delivery: int = 0
        self.sent: int = NONE
        self.rewritten: bool = False

    def forget(self) -> None:
        """Records were lost: the entry may have been rewritten and the line may have moved (U2)."""
        self.vector = NONE
        self.masked = UNKNOWN
        self.level = UNKNOWN
        self.logical = UNKNOWN
        self.dest = NONE
        self.remote_irr = UNKNOWN
        self.line = UNKNOWN
        self.sent = NONE
        self.rewritten = False

    def raise_line(self) -> int:
        """IO1, IO2 (vioapic_irq_positive_edge): the line goes high."""
        was = self.line
        self.line = 1
        if was == 1:
            return NOTHING
        if self.level == 0:
            if self.masked == 1:
                return LOST
            return SEND if self.masked == 0 and was == 0 else MAYBE
        return self.assess()

    def lower_line(self) -> None:
        """The line goes low. A message already sent cannot be taken back."""
        self.line = 0

    def forget_line(self) -> None:
        """It is not known any more whether somebody holds the line; a level pin may have sent a message."""
        if self.line != 1 and self.level != 0 and self.masked != 1 and self.remote_irr == 0:
            self.remote_irr = UNKNOWN
        self.line = UNKNOWN

    def assess(self) -> int:
        """IO2: a level pin sends when the line is high, the entry unmasked and Remote IRR clear."""
        if self.level == 0 or self.masked == 1 or self.line == 0 or self.remote_irr == 1:
            return NOTHING
        certain = self.level == 1 and self.masked == 0 and self.line == 1
        if certain and self.remote_irr == 0:
            self.remote_irr = 1
            self.sent = self.vector
            self.rewritten = False
            return SEND
        # Remote IRR was set already or it is now: either way it is set, if the rest is certain.
        self.remote_irr = 1 if certain else UNKNOWN
        self.sent = NONE
        return MAYBE

    def end_of_interrupt(self) -> int:
        """IO3, IO5 (vioapic_update_EOI): Remote IRR falls; a line still high sends again."""
        if self.level == 0:
            return NOTHING
        if self.level == UNKNOWN:
            self.remote_irr = UNKNOWN
            self.sent = NONE
            return MAYBE
        self.remote_irr = 0
        self.sent = NONE
        self.rewritten = False
        return self.assess()

    def set_vector(self, vector: int) -> bool:
        """IO4: only the vector is rewritten. True when a message of the old one is still unacknowledged."""
        in_flight = self.remote_irr == 1 and self.vector not in (NONE, vector)
        self.rewritten = self.rewritten or in_flight
        self.vector = vector
        return in_flight

    def write(self, word: int) -> bool:
        """Software writes the whole entry (vioapic_write_redirent). True as `set_vector`.

        Remote IRR is read-only, but an entry written as edge loses it. Call `assess` afterwards: unmasking a pin
        whose line is high sends.
        """
        level = word >> TRIGGER_BIT & 1
        changed = self.vector not in (NONE, word & VECTOR_MASK) or self.level not in (UNKNOWN, level)
        in_flight = self.remote_irr == 1 and changed
        self.rewritten = self.rewritten or in_flight
        self.vector = word & VECTOR_MASK
        self.delivery = word >> DELIVERY_SHIFT & DELIVERY_MASK
        self.logical = word >> DESTMODE_BIT & 1
        self.level = level
        self.masked = word >> MASK_BIT & 1
        self.dest = word >> DEST_SHIFT & 0xFF
        if level == 0:
            self.remote_irr = 0
            self.sent = NONE
        return in_flight


class IoApic:
    """The pins of one or more I/O APICs, by global number; a pin exists once something was said about it."""

    __slots__ = ("known", "pins")

    def __init__(self, *, known: bool) -> None:
        self.known: bool = known
        self.pins: dict[int, Pin] = {}

    def pin(self, number: int) -> Pin:
        """The pin of this number."""
        pin = self.pins.get(number)
        if pin is None:
            pin = Pin(number, known=self.known)
            self.pins[number] = pin
        return pin

    def pins_of(self, vector: int) -> list[Pin]:
        """IO3: an EOI of `vector` reaches *all* pins with that vector."""
        return [pin for pin in self.pins.values() if pin.vector == vector]

    def forget(self) -> None:
        """Records were lost (U2)."""
        self.known = False
        for pin in self.pins.values():
            pin.forget()
