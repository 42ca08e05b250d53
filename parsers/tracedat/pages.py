"""Ring-buffer pages of one CPU, read on demand from the file or from its compressed chunks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO

from parsers.recording import Gap, Note
from parsers.tracedat.header import Area, Buffer, note
from parsers.tracedat.layout import Limit

__all__ = ["Budget", "PageStream", "Problems"]

#: Bytes read at once for one CPU of an uncompressed file.
BLOCK = 256 << 10


@dataclass(slots=True)
class Budget:
    """Bytes of pages that all CPUs together may hold at once, and those they hold."""

    limit: int
    held: int = 0

    def fits(self, size: int) -> bool:
        """Whether `size` more bytes may be held."""
        return self.held + size <= self.limit


@dataclass(slots=True)
class Problems:
    """Gaps and notes that wait for the next chunk, and the bytes of the file that could not be used."""

    gaps: list[Gap] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    skipped: int = 0

    def damaged(self, code: str, text: str, *, cpu: int, offset: int, length: int, t0: int | None = None) -> None:
        """Bytes that are given up: one gap, one note, and their place in the account."""
        reason = "truncated" if code == "tracedat-truncated" else "damaged"
        self.skipped += length
        if len(self.gaps) < 10 * Limit.NOTES:
            self.gaps.append(Gap(reason, cpu, t0, None, offset, length, None, text))
        if len(self.notes) < Limit.NOTES:
            self.notes.append(note(code, text, offset, cpu))


class PageStream:
    """The pages of one CPU of one buffer, oldest first.

    `next_time` is the stamp of the page that `take` gives next (never smaller than an earlier page's, so that a
    damaged stamp cannot reorder a CPU's records), None after the last one.
    """

    def __init__(
        self,
        stream: BinaryIO,
        buffer: Buffer,
        area: Area,
        *,
        order: str,
        inflate: Callable[[bytes, int], bytes],
        problems: Problems,
        share: int,
        budget: Budget,
    ) -> None:
        self.buffer, self.area, self.cpu = buffer, area, area.cpu
        self.problems, self.share, self.budget = problems, share, budget
        self.last_time: int | None = None  # raw stamp of the last record seen, for gaps
        self.next_time: int | None = None
        self._stream, self._order, self._inflate = stream, order, inflate
        self._file = area.offset  # file offset of what is to be read next
        self._end = area.offset + area.size
        self._block, self._block_at, self._used = b"", 0, 0
        self._chunks = self._chunk_count() if buffer.compressed and area.size else 0
        self._advance()

    @property
    def position(self) -> int:
        """Bytes of this CPU's area that have been read."""
        return self._file - self.area.offset

    def take(self, most: int) -> tuple[bytes, int]:
        """The next pages, of about `most` bytes; and the file offset of the first (of its chunk, if compressed).

        Only the last page may be short.
        """
        size = self.buffer.page_size * max(1, most // self.buffer.page_size)
        whole = not self._used and size >= len(self._block)
        pages = self._block if whole else self._block[self._used : self._used + size]
        if 0 < len(pages) % self.buffer.page_size < 16:
            pages = pages[: len(pages) // self.buffer.page_size * self.buffer.page_size]  # no whole page header
        at = self._block_at if self.buffer.compressed else self._block_at + self._used
        self._used += size
        self._advance()
        return pages, at

    def _advance(self) -> None:
        while self._used + 16 > len(self._block):
            self._hold(b"")
            if not (self._next_chunk() if self.buffer.compressed else self._next_block()):
                self.next_time = None
                return
        order = "little" if self._order == "<" else "big"
        stamp = int.from_bytes(self._block[self._used : self._used + 8], order)  # type: ignore[arg-type]
        self.next_time = stamp if self.next_time is None else max(stamp, self.next_time)

    def _hold(self, block: bytes) -> None:
        """Take `block` in hand instead of the one before; at most one is held of each CPU."""
        self.budget.held += len(block) - len(self._block)
        self._block, self._used = block, 0

    def _give_up(self, code: str, message: str, at: int) -> None:
        """From `at` on nothing of this CPU is read."""
        self.problems.damaged(code, message, cpu=self.cpu, offset=at, length=self._end - at, t0=self.last_time)
        self._file, self._chunks = self._end, 0

    def _too_much(self, size: int, at: int) -> bool:
        """Whether `size` bytes more are too many for the machine; this CPU's data is then given up, and told."""
        if self.budget.fits(size):
            return False
        text = f"{size} bytes more of pages to hold: all CPUs together may hold {self.budget.limit}"
        self._give_up("tracedat-memory", text, at)
        return True

    def _next_block(self) -> bool:
        size = self.buffer.page_size
        want = min(max(size, min(BLOCK, self.share) // size * size), self._end - self._file)
        if want <= 0 or self._too_much(want, self._file):
            return False
        self._stream.seek(self._file)
        self._block_at = self._file
        self._hold(self._stream.read(want))
        self._file += want
        return len(self._block) >= 16  # the last page may be short: its records up to there are still good

    def _chunk_count(self) -> int:
        data = self._read(4)
        return int.from_bytes(data, "little" if self._order == "<" else "big") if len(data) == 4 else 0

    def _read(self, size: int) -> bytes:
        self._stream.seek(self._file)
        data = self._stream.read(max(0, min(size, self._end - self._file)))
        self._file += len(data)
        return data

    def _next_chunk(self) -> bool:
        """Decompress the next chunk; a damaged one ends this CPU's data, as the next one's place is then unknown."""
        if not self._chunks:
            return False
        self._chunks -= 1
        at = self._file
        order = "little" if self._order == "<" else "big"
        head = self._read(8)
        compressed, plain = (int.from_bytes(head[i : i + 4], order) for i in (0, 4))  # type: ignore[arg-type]
        page, message = self.buffer.page_size, ""
        most = max(Limit.CHUNK_LEAST, min(Limit.CHUNK, self.share))
        self._block_at = at
        if len(head) < 8 or compressed > self._end - self._file:
            message = "the file or the CPU's area ends inside a compressed chunk"
        elif not 0 < plain <= min(max(page, most), 40000 * compressed + page):
            message = f"a chunk of {compressed} bytes claims to hold {plain}"
        elif plain % page:
            message = f"a chunk of {plain} bytes does not hold whole pages of {page}"
        elif self._too_much(plain, at):
            return False
        else:
            try:
                self._hold(self._inflate(self._read(compressed), plain))
            except ValueError as error:
                message = f"chunk cannot be decompressed: {error}"
        if message:
            code = "tracedat-truncated" if "ends inside" in message else "tracedat-chunk"
            self._give_up(code, message, at)
        return not message
