"""Known and unknown: the three-valued state of a replay that did not see the beginning (spec 0.3).

A flag is 0, 1 or UNKNOWN. A word of many bits (IRR, ISR, pending, mask, selector) is a `Bits`: a mask of the bits
that are known and their values. A rule asks `test()` and stays silent when the answer is UNKNOWN (U3).
"""

from __future__ import annotations

from typing import Final

__all__ = ["UNKNOWN", "Bits"]

UNKNOWN: Final = -1


class Bits:
    """A word of `width` bits of which some are unknown. `value` never has a bit outside `known`."""

    __slots__ = ("all", "known", "value")

    def __init__(self, width: int, *, known: bool) -> None:
        self.all: int = (1 << width) - 1
        self.known: int = self.all if known else 0
        self.value: int = 0

    def test(self, bit: int) -> int:
        """0, 1 or UNKNOWN."""
        if not self.known >> bit & 1:
            return UNKNOWN
        return self.value >> bit & 1

    def set(self, bit: int) -> None:
        """The bit is 1 from now on."""
        mask = 1 << bit
        self.known |= mask
        self.value |= mask

    def clear(self, bit: int) -> None:
        """The bit is 0 from now on."""
        mask = 1 << bit
        self.known |= mask
        self.value &= ~mask

    def learn(self, value: int) -> None:
        """A snapshot: every bit is known."""
        self.known = self.all
        self.value = value & self.all

    def forget(self) -> None:
        """Nothing is known any more (U2)."""
        self.known = 0
        self.value = 0

    def highest(self) -> int:
        """Highest bit known to be 1, or -1."""
        return self.value.bit_length() - 1

    def is_empty(self) -> int:
        """1 definitely all zero, 0 definitely not, UNKNOWN otherwise."""
        if self.value:
            return 0
        return 1 if self.known == self.all else UNKNOWN
