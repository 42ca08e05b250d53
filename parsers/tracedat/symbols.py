"""Names of kernel addresses from the kallsyms text that trace-cmd saves, whose lines are parsed only when asked for."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array, plain
from parsers.ftrace.columns import escape
from parsers.ftrace.swar import Text

__all__ = ["Symbols"]

#: No function is as long as this (bytes): what lies farther behind a symbol is not in it.
FARTHEST = 1 << 20


class Symbols:
    """Symbols at exactly an address (`name`), or around it (`around`)."""

    def __init__(self, text: bytes, word: int) -> None:
        self._text, self._digits = b"\n" + text, 2 * word
        self._known: dict[int, str | None] = {}
        self._table: tuple[Array, Array] | None = None

    def name(self, address: int) -> str | None:
        """Symbol at exactly `address`; of several the first one."""
        if address in self._known:
            return self._known[address]
        name = None
        if address:
            found = self._line(address)
            name = self._shown(found) if found >= 0 else None
            name = name.split("\t", 1)[0] if name else None
        if len(self._known) < 1 << 16:
            self._known[address] = name
        return name

    def _line(self, address: int) -> int:
        """Where the first line of `address` begins; -1 without one."""
        values, lines = self._addresses()
        place = int(np.searchsorted(values, np.uint64(address), side="left"))
        return int(lines[place]) if place < values.size and int(values[place]) == address else -1

    def _shown(self, at: int) -> str | None:
        """What the line that begins at `at` says after address and kind."""
        end = self._text.find(b"\n", at)
        parts = self._text[at : end if end >= 0 else None].split(b" ", 2)
        return escape(parts[2]) if len(parts) == 3 and parts[2] else None

    def around(self, address: int) -> str | None:
        """`symbol+0xOFFSET/0xSIZE`, and ` [module]`, as the kernel prints a code address (%pS).

        The size reaches to the next symbol, as in the kernel; of several symbols at one address the first one counts.
        """
        values, lines = self._addresses()
        after = int(np.searchsorted(values, np.uint64(address), side="right"))
        if not after or not address:
            return None
        start = int(values[after - 1])
        offset = address - start
        if offset >= FARTHEST:
            return None
        shown = self._shown(int(lines[np.searchsorted(values, np.uint64(start), side="left")]))
        if shown is None:
            return None
        name, _, module = shown.partition("\t")
        size = f"/0x{int(values[after]) - start:x}" if after < values.size else ""
        return f"{name}+0x{offset:x}{size}" + (f" {module}" if module else "")

    def _addresses(self) -> tuple[Array, Array]:
        """All addresses in order, and where their lines begin; made when first asked for, of the whole text."""
        if self._table is None:
            data, width = np.frombuffer(self._text + bytes(32), dtype=np.uint8), self._digits
            starts = np.flatnonzero(data == 10) + 1
            starts = starts[data[starts + width] == 32]
            values, good = _hexadecimal(data, starts, width)
            good &= values != 0
            values, starts = values[good], starts[good]
            order = np.argsort(values, kind="stable")
            self._table = values[order], starts[order]
        return self._table

    def column(self, addresses: Array, *, around: bool = False) -> pa.Array:
        """String column of the names (`around`: with offset and size); null without one."""
        kind = pa.uint64() if addresses.itemsize == 8 else pa.uint32()
        coded = plain(kind, addresses).dictionary_encode()
        find = self.around if around else self.name
        names = pa.array([find(address) for address in coded.dictionary.to_pylist()], pa.string())
        return names.take(coded.indices)


def _hexadecimal(data: Array, starts: Array, width: int) -> tuple[Array, Array]:
    """Numbers of `width` hexadecimal digits at `starts`, and which rows are such numbers."""
    digits = np.ndarray((data.size - width + 1,), f"S{width}", data.data, 0, (1,))[starts].tobytes()
    try:
        packed = bytes.fromhex(digits.decode("ascii"))  # a tenth of the time of the general way
    except ValueError:
        packed = b""
    if len(packed) == starts.size * width // 2:  # blanks between digits are passed over
        return np.frombuffer(packed, dtype=f">u{width // 2}").astype(np.uint64), np.ones(starts.size, dtype=bool)
    return Text(data).hexadecimal(starts, starts + width)
