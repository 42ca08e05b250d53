"""HPET block: comparators and their message routes (spec S6.4; IA-PC HPET specification 1.0a, 2.3.4 to 2.3.9)."""

from __future__ import annotations

from typing import Final

from replay.events import NIL
from replay.knowledge import UNKNOWN

__all__ = ["COMPARATOR_BITS", "Comparator", "HpetBlock", "ticks_ahead"]

#: Comparators are compared modulo 2^32: 32-bit ones in hardware, 64-bit ones because drivers write 32 bits.
COMPARATOR_BITS: Final = 32
_WRAP: Final = 1 << COMPARATOR_BITS
_HALF: Final = 1 << (COMPARATOR_BITS - 1)

# Timer n configuration register.
INT_ENABLE_BIT: Final = 2
PERIODIC_BIT: Final = 3
#: General configuration register: legacy replacement route.
LEGACY_BIT: Final = 1

#: Halves of a route update that has begun.
DATA_WRITTEN: Final = 1
ADDRESS_WRITTEN: Final = 2


def ticks_ahead(value: int, counter: int) -> int:
    """How many ticks `value` lies ahead of `counter`, modulo 2^32; negative when it lies behind (H1)."""
    delta = (value - counter) % _WRAP
    return delta - _WRAP if delta >= _HALF else delta


class Comparator:
    """One timer of the block.

    `data` and `address` are the MSI route registers (NIL unknown). `half` names the register written first in an
    update that is not complete; `changed` whether that is known to have changed the register.
    """

    __slots__ = ("address", "armed", "changed", "data", "enabled", "half", "periodic", "value")

    def __init__(self, *, known: bool) -> None:
        self.value: int = NIL
        #: 1 from the write of a value until its match; UNKNOWN when neither was seen.
        self.armed: int = 0 if known else UNKNOWN
        self.enabled: int = UNKNOWN
        self.periodic: int = 0 if known else UNKNOWN
        self.data: int = 0 if known else NIL
        self.address: int = 0 if known else NIL
        self.half: int = 0
        self.changed: bool = False

    def write_value(self, value: int) -> None:
        """H1: software writes the comparator."""
        self.value = value
        self.armed = 1

    def match(self) -> None:
        """The counter reached the value: one-shot comparators are done, periodic ones go on."""
        if self.periodic != 1:
            self.armed = 0 if self.periodic == 0 else UNKNOWN

    def write_config(self, config: int, old: int) -> bool:
        """Timer configuration. True when int_enable went from 0 to 1 (H3)."""
        before = self.enabled if old == NIL else old >> INT_ENABLE_BIT & 1
        self.enabled = config >> INT_ENABLE_BIT & 1
        self.periodic = config >> PERIODIC_BIT & 1
        return before == 0 and self.enabled == 1

    def write_data(self, data: int) -> bool:
        """H2: the vector half of the route. True when this completes an update whose halves both changed something."""
        changed = self.data not in (NIL, data)
        self.data = data
        return self._half_written(DATA_WRITTEN, changed)

    def write_address(self, address: int) -> bool:
        """H2: the destination half of the route; result as `write_data`."""
        changed = self.address not in (NIL, address)
        self.address = address
        return self._half_written(ADDRESS_WRITTEN, changed)

    def _half_written(self, which: int, changed: bool) -> bool:
        if self.half == 0 or self.half == which:
            self.changed = changed or (self.half == which and self.changed)
            self.half = which
            return False
        self.half = 0
        return changed and self.changed


class HpetBlock:
    """Comparators by number, and whether comparators 0 and 1 replace the PIT and the RTC (H4)."""

    __slots__ = ("comparators", "known", "legacy")

    def __init__(self, *, known: bool) -> None:
        self.known: bool = known
        self.comparators: dict[int, Comparator] = {}
        self.legacy: int = 0 if known else UNKNOWN

    def comparator(self, number: int) -> Comparator:
        """The comparator of this number."""
        comparator = self.comparators.get(number)
        if comparator is None:
            comparator = Comparator(known=self.known)
            self.comparators[number] = comparator
        return comparator

    def write_general(self, config: int) -> None:
        """General configuration register."""
        self.legacy = config >> LEGACY_BIT & 1

    def forget(self) -> None:
        """Records were lost (U2)."""
        self.known = False
        self.legacy = UNKNOWN
        self.comparators.clear()
