"""Lines of a text recording in bounded batches, as byte ranges and as one polars series.

Shared by the text readers. Text recordings are cut at any byte when a machine hangs and may hold console noise,
so nothing here assumes UTF-8, an end of line at the end of the file, or lines of a sane length.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

__all__ = ["BATCH_BYTES", "KEEP_TEXT", "MAX_LINE", "LineBatch", "line_batches"]

#: Bytes of input that one batch covers (8 MiB keeps a chunk with its tables well under 100 MiB).
BATCH_BYTES = 8 << 20
#: A line longer than this many bytes is not a record of any format read here; it is kept cut.
MAX_LINE = 1 << 16
#: Bytes of an unreadable line that are kept.
KEEP_TEXT = 4096

I64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class LineBatch:
    """Whole lines of a recording.

    `text` holds one entry per line, without line end, with every byte >= 0x80 shown as "?" so that positions are bytes;
    `raw(i)` gives the true bytes. `starts`/`lengths` (bytes, the line end counted) place a line in `data`.
    `lost` holds bytes left out of `data` because one line was longer than a whole batch: it belongs to the last line.
    """

    data: bytes
    starts: I64
    lengths: I64
    first_line: int
    offset: int
    text: pl.Series
    dirty: npt.NDArray[np.bool_]  # lines that are no records: they hold a byte >= 0x80, are too long or have no end
    unterminated: bool = False  # the last line has no line end: the recording was cut there
    lost: int = 0

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def size(self) -> int:
        """Bytes of input that this batch stands for."""
        return len(self.data) + self.lost

    def raw(self, index: int) -> str:
        """At most `KEEP_TEXT` bytes of a line as text; bytes that are not UTF-8 as \\xNN."""
        start = int(self.starts[index])
        stop = start + min(int(self.lengths[index]), KEEP_TEXT)
        return self.data[start:stop].rstrip(b"\r\n").decode("utf-8", "backslashreplace")

    def byte_lengths(self) -> I64:
        """Bytes per line, `lost` included; the sum is `size`."""
        lengths = self.lengths.copy()
        if self.lost:
            lengths[-1] += self.lost
        return lengths


def _batch(data: bytes, first_line: int, offset: int, lost: int = 0) -> LineBatch:
    array = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(array == 0x0A).astype(np.int64) + 1
    unterminated = not data.endswith(b"\n")
    if unterminated:
        ends = np.append(ends, len(data))
    starts = np.concatenate((np.zeros(1, np.int64), ends[:-1]))
    lengths = ends - starts
    dirty = lengths > MAX_LINE
    dirty[-1] |= unterminated  # a number at its end may have lost digits
    high = np.flatnonzero(array >= 0x80)
    shown = data
    if len(high):
        dirty[np.searchsorted(ends, high, side="right")] = True
        copy = array.copy()
        copy[high] = 0x3F
        shown = copy.tobytes()
    offsets = pa.py_buffer(np.concatenate((starts, ends[-1:])))
    lines = pa.LargeStringArray.from_buffers(len(starts), offsets, pa.py_buffer(shown))
    text = pl.Series("line", pl.from_arrow(lines)).str.strip_chars_end("\r\n")
    return LineBatch(data, starts, lengths, first_line, offset, text, dirty, unterminated and not lost, lost)


def line_batches(stream: BinaryIO, batch_bytes: int = BATCH_BYTES) -> Iterator[LineBatch]:
    """All lines from the current position of `stream`, in batches of about `batch_bytes`; memory stays bounded."""
    carry = b""
    line, offset = 1, 0
    while True:
        block = stream.read(batch_bytes)
        data = carry + block
        if not data:
            return
        if not block:
            yield _batch(data, line, offset)
            return
        end = data.rfind(b"\n") + 1
        if end:
            batch = _batch(data[:end], line, offset)
            carry = data[end:]
            yield batch
            line, offset = line + len(batch), offset + batch.size
        elif len(data) < batch_bytes:
            carry = data
        else:  # one line longer than a batch: keep its head, count the rest
            head, lost, carry = data[: MAX_LINE + 1], len(data) - MAX_LINE - 1, b""
            while True:
                block = stream.read(batch_bytes)
                end = block.find(b"\n") + 1
                if end or not block:
                    lost, carry = lost + (end or len(block)), block[end:]
                    break
                lost += len(block)
            batch = _batch(head, line, offset, lost)
            yield batch
            line, offset = line + 1, offset + batch.size
