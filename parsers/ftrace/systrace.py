"""Android systrace HTML: ftrace text inside a page, plain or zlib-compressed (`TRACE:`), read as ftrace text."""

from __future__ import annotations

import base64
import io
import re
import zlib
from typing import BinaryIO, ClassVar

from parsers.ftrace.notes import note
from parsers.ftrace.text import FtraceTextReader
from parsers.open import MAX_RATIO, RATIO_FREE_BYTES
from parsers.recording import Note, ReadOptions, RecordingError

__all__ = ["SystraceReader"]

#: Newer pages: one or more blocks of text. Older ones: a JavaScript string with literal `\n\` line ends.
BLOCK = re.compile(rb'<script class="trace-data" type="application/text">\s*(.*?)(</script>|\Z)', re.S)
STRING = re.compile(rb'linuxPerfData = "(.*?)(";|\Z)', re.S)
EVENT = re.compile(rb"-\d+ +(?:\([ \d-]+\) +)?\[\d{3,}\]")
#: Compressed bytes taken at a time.
PIECE = 1 << 10
#: A page is held in memory as a whole; Android's own limit is far below.
LARGEST = 512 << 20


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


class SystraceReader(FtraceTextReader):
    """`offset` of a record is its line number within the trace text, not within the page.

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
            blocks = [(m.start(1), m[1].replace(b"\\n\\\n", b"\n").replace(b"\\n", b"\n")) for m in found]
        cut = bool(found) and not found[-1][2]
        if cut:
            self._damage.append(note("ftrace-truncated", "the page ends inside the trace", size))
        if not blocks and page[:64].lstrip().startswith(b"TRACE:"):
            blocks = [(0, page)]
        texts: list[bytes] = []
        for at, block in blocks:
            if sum(map(len, texts)) > LARGEST:
                self._damage.append(note("systrace-compressed", f"more than {LARGEST} bytes of trace text", at))
                break
            text, damaged = _plain(block)
            if damaged:
                self._damage.append(note("systrace-compressed", f"block of {len(block)} bytes", at))
            # pages also carry process lists; only the block with events is the trace
            if text and (EVENT.search(text[: 1 << 20]) or text.lstrip().startswith(b"# tracer")):
                texts = [part[: part.rfind(b"\n") + 1] for part in texts]  # cut and not the last: up to the last line
                # the end of a block is the end of a line, unless the block was cut there
                ended = text.endswith(b"\n") or damaged or (cut and at == blocks[-1][0])
                texts.append(text if ended else text + b"\n")
        if not texts:
            raise RecordingError("a page without ftrace text")
        self._page = size
        super().__init__(io.BytesIO(b"".join(texts)), options)
        self.accounting.total = size

    @classmethod
    def sniff(cls, head: bytes) -> bool:
        """An HTML page of Android's systrace or Chrome's trace viewer, or atrace's compressed text."""
        start = head[:1024].lstrip().lower()
        html = start.startswith((b"<!doctype html", b"<html"))
        marks = (b"trace-data", b"linuxPerfData", b"trace_viewer", b"tracing.importer", b"systrace", b"trace-viewer")
        return (html and any(mark in head for mark in marks)) or start.startswith(b"trace:\n\x78")

    def _finish(self) -> None:
        inner = self.accounting.skipped
        super()._finish()
        total = self.accounting.total = self._page
        self.accounting.skipped = min(inner, total)
        self.accounting.parsed = total - self.accounting.skipped

    def _extra_notes(self) -> list[Note]:
        return self._damage
