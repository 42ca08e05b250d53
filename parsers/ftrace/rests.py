"""What stands after the time in each line, every different text once: its event and where its payload begins.

In real recordings four of five lines repeat an earlier one but for task, CPU and time, so everything that is done with
names and payloads is done with the different ones only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array, binary
from parsers.ftrace.batch import Records
from parsers.ftrace.quick import Rows
from parsers.ftrace.swar import Text

__all__ = ["Rests", "split"]

NAME = re.compile(rb"([A-Za-z_][\w.-]*)(?:\+0x[0-9a-f]+/0x[0-9a-f]+)?(?: <[0-9a-f]+>)?")
#: What the options `raw` and `hex` leave of an event: the number of its type.
RAW = re.compile(rb"type: (\d{1,5})")
LONGEST_NAME = 128
#: Spare bytes before and after, for reading 8 at once.
SPARE = 16


@dataclass(slots=True)
class Rests:
    """Different texts: bytes [begin, end) of `raw` (`text`), payload from `start` on, event number `code`.

    `index` is each record's text. `odd` marks texts that hold a backslash, a NUL or anything that is not ASCII (None:
    none does).
    """

    raw: bytes
    text: Text
    begin: Array
    start: Array
    end: Array
    code: Array
    names: list[str]
    index: Array
    odd: Array | None = None

    def rows(self, chosen: Array, *, whole: bool = False) -> Rows:
        """Payloads (or `whole` texts) of some of the texts."""
        odd = self.odd[chosen] if self.odd is not None else None
        start = (self.begin if whole else self.start)[chosen]
        return Rows(self.text, start, np.maximum(self.end[chosen], start), odd)

    def number(self, name: str) -> int:
        """The event number of `name`, which is added if need be."""
        if name not in self.names:
            self.names.append(name)
        return self.names.index(name)


def split(data: Array, records: Records, pads: bool) -> Rests:
    """The rests of all records; `pads`: blanks after the name only pad (trace-cmd)."""
    coded = binary(data, records.rest, records.end - records.rest, pa.binary()).dictionary_encode()
    values, count = coded.dictionary, len(coded.dictionary)
    offsets = np.frombuffer(values.buffers()[1], dtype=np.int32)[values.offset : values.offset + count + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    inner = bytes(values.buffers()[2][first:last]) if last > first else b""
    raw = bytes(SPARE) + inner + bytes(4 * SPARE)
    array = np.frombuffer(raw, dtype=np.uint8)
    edges = offsets.astype(np.int64) + (SPARE - first)
    begin, end = edges[:-1], edges[1:]
    index = coded.indices.to_numpy(zero_copy_only=False)
    code, start, names = _names(array, raw, begin, end, pads)
    rests = Rests(raw, Text(array), begin, start, end, code, names, index)
    if not (inner.isascii() and b"\\" not in inner and b"\0" not in inner):
        strange = np.flatnonzero((array >= 128) | (array == 92) | (array == 0))
        place = np.searchsorted(begin, strange, side="right") - 1
        inside = (place >= 0) & (strange >= start[place]) & (strange < end[np.maximum(place, 0)])
        rests.odd = np.zeros(count, dtype=bool)
        rests.odd[place[inside]] = True
    return rests


def _names(data: Array, raw: bytes, begin: Array, end: Array, pads: bool) -> tuple[Array, Array, list[str]]:
    """Event number of each text, where its payload starts, and the names by number."""
    colon = Text(data).find(58, begin, end)
    size = np.where((colon < end) & (colon - begin <= LONGEST_NAME), colon - begin, 0)
    coded = binary(data, begin, size).dictionary_encode()
    names: list[str] = []
    number: dict[str, int] = {}

    def code_of(name: str) -> int:
        if name not in number:
            number[name] = len(names)
            names.append(name)
        return number[name]

    mapping = []
    for value in coded.dictionary.to_pylist():
        match = NAME.fullmatch(value)
        name = "tracing_mark_write" if value == b"0" else match[1].decode() if match else ""
        mapping.append(code_of(name) if name else -1)
    code = np.array(mapping, dtype=np.int64)[coded.indices.to_numpy(zero_copy_only=False)]
    start = np.minimum(colon + 1, end)
    start = np.minimum(start + (data[start] == 32), end)
    for _ in range(40 if pads else 0):
        more = (data[start] == 32) & (start < end)
        if not more.any():
            break
        start += more
    odd = (code < 0) | np.isin(code, [number.get(n, -9) for n in ("kernel_stack", "user_stack", "type")])
    for index in np.flatnonzero(odd).tolist():
        line = raw[int(begin[index]) : min(int(end[index]), int(begin[index]) + 400)]
        kind = RAW.fullmatch(line)
        if kind is None and code[index] == number.get("type"):
            continue  # an event of that name
        start[index] = begin[index]
        if kind is not None:
            code[index] = code_of(f"event_{kind[1].decode()}")
        elif b"<stack trace" in line:
            code[index] = code_of("kernel_stack")
        elif b"<user stack trace" in line:
            code[index] = code_of("user_stack")
        elif re.fullmatch(rb"\S+ +<-\S+", line.strip()):
            code[index] = code_of("function")
        else:
            code[index] = code_of("(no name)")
    return code, start, names
