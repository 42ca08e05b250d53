"""Numbers out of text for all rows at once, eight characters per machine word ("SIMD within a register").

`Text` holds the bytes and an unaligned view of every 8 of them as one little-endian u64. Each method works on
arrays of byte positions; nothing here loops over rows.
"""

from __future__ import annotations

import numpy as np

from parsers.ftrace.arrays import Array

__all__ = ["Text"]

U64 = np.uint64
LOW = U64(0x0101010101010101)
HIGH = U64(0x8080808080808080)
ZEROS = U64(0x3030303030303030)
NIBBLES = U64(0xF0F0F0F0F0F0F0F0)
SIXES = U64(0x0606060606060606)
NONE = U64(0)
SPACES = U64(0x2020202020202020)
ALL = U64(0xFFFFFFFFFFFFFFFF)
BLANKS = U64(0x1010101010101010)
#: Keeps the last n of eight characters (the high bytes of the word).
LAST = np.array([0, *((0xFFFFFFFFFFFFFFFF << 8 * (8 - n)) & 0xFFFFFFFFFFFFFFFF for n in range(1, 9))], dtype=np.uint64)
FIFTEENS = U64(0x0F0F0F0F0F0F0F0F)
#: Value of a hexadecimal digit by its character; 255 for others.
DIGIT = np.array([int(chr(c), 16) if chr(c) in "0123456789abcdef" else 255 for c in range(256)], dtype=np.uint64)
TENS = np.array([10**n for n in range(20)], dtype=np.uint64)


def _ones(words: Array) -> Array:
    """Bits that are set, for words of the form 0…01…1."""
    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(words))
    # numpy before 2: the exponents of the two halves, each exact as a float
    upper, lower = words >> U64(32), words & U64(0xFFFFFFFF)
    return np.asarray(np.frexp(upper.astype(np.float64))[1] + np.frexp(lower.astype(np.float64))[1])


def _eight_digits(word: Array) -> tuple[Array, Array]:
    """The number that eight characters show, and whether all of them are digits."""
    good = ((word & NIBBLES) == ZEROS) & (((word + SIXES) & NIBBLES) == ZEROS)
    word = word - ZEROS
    word = (word * U64(10) + (word >> U64(8))) & U64(0x00FF00FF00FF00FF)
    word = (word * U64(100) + (word >> U64(16))) & U64(0x0000FFFF0000FFFF)
    return (word * U64(10000) + (word >> U64(32))) & U64(0x00000000FFFFFFFF), good


def _eight_hex(word: Array) -> tuple[Array, Array]:
    """The number that eight hexadecimal digits show, and whether all of them are such (a to f small)."""
    letters = (word >> U64(6)) & LOW
    nines = letters * U64(9)
    digit = (word & FIFTEENS) + nines
    # only 0-9 and a-f map back to themselves
    good = digit + ZEROS + letters * U64(0x27) == word
    good &= (digit & NIBBLES) == 0
    good &= ((digit + SIXES) & BLANKS) >> U64(4) == letters
    digit = ((digit << U64(4)) | (digit >> U64(8))) & U64(0x00FF00FF00FF00FF)
    digit = ((digit << U64(8)) | (digit >> U64(16))) & U64(0x0000FFFF0000FFFF)
    return ((digit << U64(16)) | (digit >> U64(32))) & U64(0x00000000FFFFFFFF), good


def _windows(literals: list[tuple[int, bytes]]) -> list[tuple[int, np.uint64, np.uint64]]:
    """Literals with their places as words to look at: (place, mask, value); as few as do."""
    letters = {place + number: letter for place, literal in literals for number, letter in enumerate(literal)}
    found: list[tuple[int, np.uint64, np.uint64]] = []
    done = -1
    for place in sorted(letters):
        if place > done:
            inside = [letters.get(place + number) for number in range(8)]
            mask = bytes(0 if letter is None else 255 for letter in inside)
            value = bytes(letter or 0 for letter in inside)
            found.append((place, U64(int.from_bytes(mask, "little")), U64(int.from_bytes(value, "little"))))
            done = place + 7
    return found


class Text:
    """Bytes of a batch; they must have 8 spare bytes before the first and after the last position asked for."""

    def __init__(self, data: Array) -> None:
        self.data = data
        self.words = np.ndarray((len(data) - 8,), dtype="<u8", buffer=data.data, strides=(1,))

    def beginnings(self, at: Array, width: int) -> tuple[Text, Array]:
        """The `width` bytes (or a few more) at each position side by side, and where each is there.

        Whoever looks at several places of each line is spared as many walks through the whole text.
        """
        width = -(-width // 8) * 8
        items = np.ndarray((self.data.size - width + 1,), f"V{width}", self.data.data, 0, (1,))
        found = items[np.append(at, at[:1])]  # one more, so that there are spare bytes
        return Text(found.view(np.uint8)), np.arange(at.size, dtype=np.int64) * width

    def has(self, literal: bytes, at: Array) -> Array:
        """Whether `literal` stands at each position."""
        good = np.ones(at.size, dtype=bool)
        for begin in range(0, len(literal), 8):
            part = literal[begin : begin + 8]
            mask = U64((1 << 8 * len(part)) - 1)
            good &= (self.words[at + begin] & mask) == U64(int.from_bytes(part, "little"))
        return good

    def fits(self, at: Array, literals: list[tuple[int, bytes]]) -> Array:
        """Which positions have all literals, given with their distance from them."""
        good = np.ones(at.size, dtype=bool)
        for place, mask, value in _windows(literals):
            word = self.words[at + place]
            word &= mask
            good &= word == value
        return good

    def find(self, letter: int, at: Array, end: Array) -> Array:
        """First position of `letter` at or after `at`; `end` where it does not come before that."""
        pattern = LOW * U64(letter)
        place = at + self._byte(at, pattern)
        rows = np.flatnonzero((place == at + 8) & (place < end))
        while rows.size:
            position = place[rows]
            step = self._byte(position, pattern)
            place[rows] = position + step
            rows = rows[(step == 8) & (position + 8 < end[rows])]
        return np.asarray(np.minimum(place, end))

    def _byte(self, at: Array, pattern: np.uint64) -> Array:
        """Which of the 8 characters at each position is the first to equal the pattern's; 8: none."""
        word = self.words[at] ^ pattern
        hit = (word - LOW) & ~word & HIGH
        return np.asarray(_ones((hit - U64(1)) & ~hit) >> 3, dtype=np.int64)

    def decimal(self, start: Array, end: Array) -> tuple[Array, Array]:
        """Signed decimal numbers of up to 18 digits as u64 bit patterns, and which rows are such numbers."""
        negative = self.data[start] == 45
        start = start + negative
        value, good = self._unsigned(start, end)
        if negative.any():
            value = np.where(negative, ~value + U64(1), value)
        return value, good

    def padded(self, start: Array, end: Array) -> tuple[Array, Array]:
        """Unsigned decimal numbers that blanks on the left may pad; the last character must be a digit."""
        value, good = self._unsigned(start, end, blanks=BLANKS)
        return value, good & (self.data[np.maximum(end - 1, 0)] != 32)

    def fixed(self, start: Array, width: int) -> tuple[Array, Array]:
        """Unsigned decimal numbers of up to 16 digits, all `width` wide; blanks may pad them on the left."""
        value = np.zeros(start.size, dtype=np.uint64)
        good: Array = np.full(start.size, 0 < width <= 16)
        below: Array | None = None
        for done in range(0, min(width, 16), 8):
            keep = LAST[min(8, width - done)]
            word = self.words[start + (width - 8 - done)]
            if width - done < 8:
                word = (word & keep) | (SPACES & ~keep)
            # bit 4 tells a digit from a blank; x has all bits of each blank's byte
            blank = (~(word >> U64(4)) & LOW) * U64(255)
            good &= (blank & (blank + U64(1))) == 0
            good &= (below == 0) | (blank == ALL) if below is not None else blank != ALL
            below = blank
            number, valid = _eight_digits(word | (blank & BLANKS))
            good &= valid
            value += number * TENS[done]
        return value, good

    def _unsigned(self, start: Array, end: Array, blanks: np.uint64 = NONE) -> tuple[Array, Array]:
        size = end - start
        good = (size > 0) & (size <= 18)
        value, valid = _eight_digits(self._tail(end, size) | blanks)
        good &= valid
        done = 8
        while int(size.max(initial=0)) > done < 18:
            rows = np.flatnonzero(size > done)
            more, valid = _eight_digits(self._tail(end[rows] - done, size[rows] - done) | blanks)
            good[rows] &= valid
            value[rows] += more * TENS[done]
            done += 8
        return value, good

    def _tail(self, end: Array, size: Array) -> Array:
        """The last (at most 8) of the `size` characters before each `end`, with zeros on their left."""
        keep = LAST[np.clip(size, 0, 8)]
        word = self.words[end - 8] ^ ZEROS
        word &= keep
        word ^= ZEROS
        return np.asarray(word)

    def hexadecimal(self, start: Array, end: Array, *, prefixed: bool = False) -> tuple[Array, Array]:
        """Hexadecimal numbers of up to 16 digits, with or without 0x, and which rows are such numbers.

        `prefixed`: it is known that all begin with 0x.
        """
        start = start + (2 if prefixed else 2 * self.has(b"0x", start))
        size = end - start
        good = (size > 0) & (size <= 16)
        short = size == 1
        if 4 * np.count_nonzero(short) < short.size:
            value, valid = _eight_hex(self._tail(end, size))
            good &= valid
        else:  # flags and counts are often of one digit, and a table knows those
            value = DIGIT[self.data[start]]
            good &= (value < 16) | ~short
            rows = np.flatnonzero(~short)
            value[rows], valid = _eight_hex(self._tail(end[rows], size[rows]))
            good[rows] &= valid
        rows = np.flatnonzero(size > 8)
        if rows.size:
            more, valid = _eight_hex(self._tail(end[rows] - 8, size[rows] - 8))
            value[rows] |= more << U64(32)
            good[rows] &= valid
        return value, good
