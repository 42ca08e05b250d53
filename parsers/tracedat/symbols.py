"""Names of kernel addresses from the kallsyms text that trace-cmd saves, without parsing all of it."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array, dictionary, plain
from parsers.ftrace.columns import escape

__all__ = ["Symbols"]

#: So many different addresses are searched one by one; after that the whole text is parsed once.
SEARCHES = 48


class Symbols:
    """Exact symbol addresses; an address inside a function has no name here."""

    def __init__(self, text: bytes, word: int) -> None:
        self._text, self._digits = b"\n" + text, 2 * word
        self._known: dict[int, str | None] = {}
        self._all: dict[bytes, bytes] | None = None

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

    def column(self, addresses: Array) -> pa.Array:
        """String column of the names; null without one."""
        unique, index = np.unique(addresses, return_inverse=True)
        names = [self.name(address) for address in unique.tolist()]
        named = np.array([name is not None for name in names], dtype=bool)[index]
        coded = dictionary(pa.dictionary(pa.int32(), pa.string()), index, [name or "" for name in names])
        if named.all():
            return coded.cast(pa.string())
        indices = plain(pa.int32(), index.astype(np.int32), named)
        return pa.DictionaryArray.from_arrays(indices, coded.dictionary).cast(pa.string())
