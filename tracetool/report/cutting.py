"""Records cut out of a recording: their own bytes, as a small recording that can be read again.

An xentrace recording is records in windows of one CPU, so a few records are a recording when each stretch of one CPU
gets a window header (xen/include/public/trace.h, TRC_TRACE_CPU_CHANGE). Text is lines. Of other formats a record is
nothing without the pages and tables around it: `cut` gives None.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import BinaryIO, Final

__all__ = ["SUFFIX", "cut"]

#: A record to cut: offset as in its table (bytes; in text the line, from 1), and the pCPU that wrote it.
Place = tuple[int, int]

#: Header word of TRC_TRACE_CPU_CHANGE: two extra words (cpu, bytes that follow), no time stamp.
_CPU_CHANGE: Final = 0x2001F003
#: Longest line that is taken (bytes), and lines of a heading.
_LINE: Final = 1 << 16
_HEADING: Final = 40


def cut(format: str, stream: BinaryIO, places: Sequence[Place]) -> bytes | None:
    """The records at `places` (ascending), in their order in the file; None when the format does not allow it.

    `stream` is the uncompressed recording, at its start.
    """
    cutter = _CUTTERS.get(format)
    return None if cutter is None else cutter(stream, places)


def _xentrace(stream: BinaryIO, places: Sequence[Place]) -> bytes:
    parts = []
    for cpu, run in groupby(places, key=lambda place: place[1]):
        window = b"".join(_record(stream, offset) for offset, _ in run)
        parts.append(struct.pack("<IiI", _CPU_CHANGE, cpu, len(window)) + window)
    return b"".join(parts)


def _record(stream: BinaryIO, offset: int) -> bytes:
    """One record: bit 31 of its header says that a stamp follows, bits 28 to 30 how many more words."""
    stream.seek(offset)
    head = stream.read(4)
    if len(head) < 4:
        return b""
    word = int.from_bytes(head, "little")
    return head + stream.read((word >> 31) * 8 + (word >> 28 & 7) * 4)


def _text(stream: BinaryIO, places: Sequence[Place]) -> bytes:
    wanted = {offset for offset, _ in places}
    last = max(wanted, default=0)
    out = []
    heading = True
    number = 0
    while number < last and (line := stream.readline(_LINE)):
        if not line.endswith(b"\n") and len(line) == _LINE:  # the rest of an overlong line is the same line
            while (rest := stream.readline(_LINE)) and not rest.endswith(b"\n"):
                pass
        number += 1
        # The comment at the top says how the columns are laid out.
        heading = heading and number <= _HEADING and line.startswith(b"#")
        if heading or number in wanted:
            out.append(line)
    return b"".join(out)


_CUTTERS: Final[Mapping[str, Callable[[BinaryIO, Sequence[Place]], bytes]]] = {
    "xentrace": _xentrace,
    **dict.fromkeys(
        ("qemu", "xenalyze", "xentrace_format", "trace-cmd-report", "perf-script", "ftrace"), _text
    ),
}
#: What a file with cut records is called by its end.
SUFFIX: Final[Mapping[str, str]] = {name: ".xentrace" if name == "xentrace" else ".txt" for name in _CUTTERS}
