"""Android systrace HTML: ftrace text inside a page, plain or zlib-compressed (`TRACE:`), read as ftrace text."""

from __future__ import annotations

import base64
import io
import re
import zlib
from bisect import bisect_right
from enum import Enum
from typing import BinaryIO, ClassVar

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array
from parsers.ftrace.notes import note
from parsers.ftrace.text import FtraceTextReader
from parsers.open import MAX_RATIO, RATIO_FREE_BYTES
from parsers.recording import Note, ReadOptions, RecordingError

__all__ = ["SystraceReader"]

#: Newer pages: one or more blocks of text. Older ones: a JavaScript string with literal `\n\` line ends.
BLOCK = re.compile(rb'<script class="trace-data" type="application/text">\s*(.*?)(</script>|\Z)', re.S)
STRING = re.compile(rb'linuxPerfData = "(.*?)(";|\Z)', re.S)
EVENT = re.compile(rb"-\d+ +(?:\([ \d-]+\) +)?\[\d{3,}\]")
#: A line's end in such a string.
BREAK = re.compile(rb"\\n(?:\\\n)?")
#: Bytes of a string between places that are known.
STEP = 4 << 10
#: Compressed bytes taken at a time.
PIECE = 1 << 10
#: A page is held in memory as a whole; Android's own limit is far below.
LARGEST = 512 << 20


def _real(string: bytes) -> bytes:
    """A JavaScript string's text: literal line ends made real."""
    return string.replace(b"\\n\\\n", b"\n").replace(b"\\n", b"\n")


def _plain(block: bytes) -> tuple[bytes, bool]:
    """A trace block's text, and whether it was damaged."""
    marker = block.find(b"TRACE:")
    if marker < 0 or EVENT.search(block[marker : marker + 4096]):
        return block, False
    data = block[marker + len(b"TRACE:") :].lstrip(b"\r\n")
    if not data.startswith(b"\x78"):
        digits = re.sub(rb"[^A-Za-z0-9+/]+", b"", data)
        whole = len(digits) - (len(digits) % 4 == 1)  # a cut page ends anywhere
        data = base64.b64decode(digits[:whole] + b"=" * (-whole % 4))
    inflater = zlib.decompressobj()
    text, left = bytearray(), max(RATIO_FREE_BYTES, int(MAX_RATIO * len(data)))
    try:
        for at in range(0, len(data), PIECE):  # what came out before the damage is kept
            text += inflater.decompress(data[at : at + PIECE], left + 1 - len(text))
            if inflater.eof or len(text) > left:
                break
    except zlib.error:
        pass
    return bytes(text[:left]), not inflater.eof or len(text) > left


class Kind(Enum):
    """How a part of the text was made of the page's bytes."""

    PLAIN = "as it stands"
    STRING = "literal line ends made real"
    PACKED = "unpacked"


class Places:
    """Where in the page (`stream`) the bytes and lines of the text are, part by part.

    Of compressed text nothing has a place: its bytes are all at the block, its lines count within the text. So do
    those of a string that does not end its lines where the page does.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._text, self._page, self._kinds = [0], [0], [Kind.PLAIN]  # offsets where a part starts
        self._lines, self._shifts = [1], [0]  # number of a part's first line; what is added to it in the page
        self._size, self._count = 0, 1
        self._at, self._above = 0, 0  # how far the page's lines are counted

    def add(self, text: bytes, page: bytes, at: int, length: int, kind: Kind) -> None:
        """`text` follows in the text; it was made of `length` bytes at `at` of the page."""
        if kind is Kind.STRING:
            self._add_string(page, at, at + length, self._size + len(text))
        else:
            self._part(self._size, at, kind)
        exact = kind is Kind.PLAIN or text.count(b"\n") == page.count(b"\n", at, at + length)
        self._above += page.count(b"\n", self._at, at)
        self._at = at
        self._lines.append(self._count)
        self._shifts.append(1 + self._above - self._count if exact and kind is not Kind.PACKED else 0)
        self._size += len(text)
        self._count += text.count(b"\n")

    def _add_string(self, page: bytes, at: int, end: int, last: int) -> None:
        """Parts of about STEP bytes, none of which starts inside of a break."""
        size = self._size
        while at < end and size < last:
            self._part(size, at, Kind.STRING)
            found = BREAK.search(page, min(end, at + STEP), min(end, at + 2 * STEP))
            stop = found.end() if found else max(at + 1, min(end, at + 2 * STEP - 3))
            if found and len(found[0]) == 2 and page[stop : min(end, stop + 2)] == b"\\\n":
                stop += 2  # the search ended inside of it
            size += len(_real(page[at:stop]))
            at = stop

    def _part(self, text: int, page: int, kind: Kind) -> None:
        self._text.append(text)
        self._page.append(page)
        self._kinds.append(kind)

    def offset(self, at: int) -> int:
        """Byte of the page."""
        part = bisect_right(self._text, at) - 1
        start, inside = self._page[part], at - self._text[part]
        if self._kinds[part] is not Kind.STRING:
            return start + (inside if self._kinds[part] is Kind.PLAIN else 0)
        before = self._stream.tell()
        self._stream.seek(start)
        raw = self._stream.read(2 * STEP + 4)
        self._stream.seek(before)
        shorter = 0
        for match in BREAK.finditer(raw):
            if match.end() - shorter - (len(match[0]) - 1) > inside:
                break
            shorter += len(match[0]) - 1
        return start + inside + shorter

    def lines(self, lines: Array) -> Array:
        """Lines of the page."""
        shifts = np.array(self._shifts, dtype=np.int64)
        return lines + shifts[np.searchsorted(self._lines, lines, side="right") - 1]


class SystraceReader(FtraceTextReader):
    """`offset` of a record is its line number within the page; of compressed text: within what came out.

    Everything around the trace (the viewer's scripts) counts as parsed.
    """

    format: ClassVar[str] = "systrace"

    def __init__(self, stream: BinaryIO, options: ReadOptions) -> None:
        size = stream.seek(0, io.SEEK_END)
        if size > LARGEST:
            raise RecordingError(f"a systrace page of {size} bytes; at most {LARGEST} are read")
        stream.seek(0)
        page = stream.read()
        self._damage: list[Note] = []
        found = list(BLOCK.finditer(page))
        blocks = [(match.start(1), match[1]) for match in found]
        if not found:
            found = list(STRING.finditer(page))
            blocks = [(m.start(1), _real(m[1])) for m in found]
        cut = bool(found) and not found[-1][2]
        if cut:
            self._damage.append(note("ftrace-truncated", "the page ends inside the trace", size))
        if not blocks and page[:64].lstrip().startswith(b"TRACE:"):
            blocks = [(0, page)]
        lengths = {match.start(1): len(match[1]) for match in found}
        texts: list[bytes] = []
        made: list[tuple[int, int, Kind]] = []
        held = 0
        for at, block in blocks:
            if held > LARGEST:
                self._damage.append(note("systrace-compressed", f"more than {LARGEST} bytes of trace text", at))
                break
            text, damaged = _plain(block)
            if damaged:
                self._damage.append(note("systrace-compressed", f"block of {len(block)} bytes", at))
            # pages also carry process lists; only the block with events is the trace
            if text and (EVENT.search(text[: 1 << 20]) or text.lstrip().startswith(b"# tracer")):
                # cut and not the last: up to the last line
                texts[-1:] = [part[: part.rfind(b"\n") + 1] for part in texts[-1:]]
                # the end of a block is the end of a line, unless the block was cut there
                ended = text.endswith(b"\n") or damaged or (cut and at == blocks[-1][0])
                texts.append(text if ended else text + b"\n")
                held += len(text)
                length = lengths.get(at, size)
                kind = Kind.PACKED if text is not block else Kind.PLAIN if length == len(block) else Kind.STRING
                made.append((at, length, kind))
        if not texts:
            raise RecordingError("a page without ftrace text")
        self._page = size
        self._places = Places(stream)
        for text, (at, length, kind) in zip(texts, made, strict=True):
            self._places.add(text, page, at, length, kind)
        del page, found, blocks
        super().__init__(io.BytesIO(b"".join(texts)), options)
        self.accounting.total = size

    @classmethod
    def sniff(cls, head: bytes) -> bool:
        """An HTML page of Android's systrace or Chrome's trace viewer, or atrace's compressed text."""
        start = head[:1024].lstrip().lower()
        html = start.startswith((b"<!doctype html", b"<html"))
        marks = (b"trace-data", b"linuxPerfData", b"trace_viewer", b"tracing.importer", b"systrace", b"trace-viewer")
        return (html and any(mark in head for mark in marks)) or start.startswith(b"trace:\n\x78")

    def _file_offset(self, at: int) -> int:
        return self._places.offset(at)

    def _file_lines(self, lines: Array) -> Array:
        return self._places.lines(lines)

    def _batch(self, text: bytearray, size: int, last: bool) -> dict[str, pa.Table]:
        tables = super()._batch(text, size, last)
        for name, table in tables.items():
            at = table.schema.get_field_index("offset")
            lines = table.column(at).to_numpy().astype(np.int64)
            offsets = pa.array(self._file_lines(lines), pa.int64()).cast(table.schema.field(at).type)
            tables[name] = table.set_column(at, table.schema.field(at), offsets)
        return tables

    def _finish(self) -> None:
        inner = self.accounting.skipped
        super()._finish()
        total = self.accounting.total = self._page
        self.accounting.skipped = min(inner, total)
        self.accounting.parsed = total - self.accounting.skipped

    def _extra_notes(self) -> list[Note]:
        return self._damage
