"""Names of kernel addresses from the kallsyms text that trace-cmd saves, parsed as little as is needed."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array, dictionary, plain
from parsers.ftrace.columns import escape
from parsers.ftrace.swar import Text

__all__ = ["Symbols"]

#: So many different addresses are searched one by one; after that the whole text is parsed once.
SEARCHES = 48
#: No function is as long as this (bytes): what lies farther behind a symbol is not in it.
FARTHEST = 1 << 20


class Symbols:
    """Symbols at exactly an address (`name`), or around it (`around`)."""

    def __init__(self, text: bytes, word: int) -> None:
        self._text, self._digits = b"\n" + text, 2 * word
        self._known: dict[int, str | None] = {}
        self._all: dict[bytes, bytes] | None = None
        self._table: tuple[Array, Array] | None = None

    def name(self, address: int) -> str | None:
        """Symbol at exactly `address`."""
        if address in self._known:
            return self._known[address]
        key = f"{address:0{self._digits}x}".encode()
        if self._all is None and len(self._known) >= SEARCHES:
            lines = (line.split(b" ", 2) for line in self._text.split(b"\n"))
            self._all = {parts[0]: parts[2] for parts in reversed(list(lines)) if len(parts) == 3}
        if self._all is not None:
            rest = self._all.get(key)
        else:
            found = self._bisect(key)
            if found < 0:
                found = self._text.find(b"\n" + key + b" ")
            rest = None
            if found >= 0:
                end = self._text.find(b"\n", found + 1)
                parts = self._text[found + 1 : end if end >= 0 else None].split(b" ", 2)
                rest = parts[2] if len(parts) == 3 else None
        name = escape(rest.split(b"\t", 1)[0]) if rest and address else None
        if len(self._known) < 1 << 16:
            self._known[address] = name
        return name

    def around(self, address: int) -> str | None:
        """`symbol+0xOFFSET/0xSIZE`, and ` [module]`, as the kernel prints a code address (%pS).

        The size reaches to the next symbol, as in the kernel; of several symbols at one address the first one counts.
        """
        if self._table is None:
            self._table = self._addresses()
        values, lines = self._table
        after = int(np.searchsorted(values, np.uint64(address), side="right"))
        if not after or not address:
            return None
        start = int(values[after - 1])
        offset = address - start
        if offset >= FARTHEST:
            return None
        at = int(lines[np.searchsorted(values, np.uint64(start), side="left")])
        end = self._text.find(b"\n", at)
        parts = self._text[at : end if end >= 0 else None].split(b" ", 2)
        if len(parts) < 3:
            return None
        name, _, module = escape(parts[2]).partition("\t")
        size = f"/0x{int(values[after]) - start:x}" if after < values.size else ""
        return f"{name}+0x{offset:x}{size}" + (f" {module}" if module else "")

    def _addresses(self) -> tuple[Array, Array]:
        """All addresses in order, and where their lines begin."""
        data = np.frombuffer(self._text + bytes(32), dtype=np.uint8)
        starts = np.flatnonzero(data == 10) + 1
        values, good = Text(data).hexadecimal(starts, starts + self._digits)
        good &= (data[starts + self._digits] == 32) & (values != 0)
        values, starts = values[good], starts[good]
        order = np.argsort(values, kind="stable")
        return values[order], starts[order]

    def _bisect(self, key: bytes) -> int:
        """Where the line of `key` begins (at the line end before it), if the text is sorted around it, else -1.

        Most of kallsyms is; what is found is exact in any case, and the first of several equal lines.
        """
        text, width = self._text, len(key)
        low, high = 0, len(text)
        while low < high:
            middle = text.rfind(b"\n", low, (low + high) // 2 + 1)
            if text[middle + 1 : middle + 1 + width] < key:
                low = text.find(b"\n", middle + 1)
                if low < 0:
                    return -1
            else:
                high = middle
        return low if text.startswith(b"\n" + key + b" ", low) else -1

    def column(self, addresses: Array, *, around: bool = False) -> pa.Array:
        """String column of the names (`around`: with offset and size); null without one."""
        unique, index = np.unique(addresses, return_inverse=True)
        find = self.around if around else self.name
        names = [find(address) for address in unique.tolist()]
        named = np.array([name is not None for name in names], dtype=bool)[index]
        coded = dictionary(pa.dictionary(pa.int32(), pa.string()), index, [name or "" for name in names])
        if named.all():
            return coded.cast(pa.string())
        indices = plain(pa.int32(), index.astype(np.int32), named)
        return pa.DictionaryArray.from_arrays(indices, coded.dictionary).cast(pa.string())
