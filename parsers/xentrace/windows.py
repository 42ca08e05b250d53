"""Pass 1 over a recording: where the collector's windows are, and where the file is damaged.

window := 0x2001f003, cpu (s32), size (u32, bytes), then `size` bytes of records of that CPU.
"""

from __future__ import annotations

import os
import struct
from array import array
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from parsers.recording import RecordingError

__all__ = ["HEADER_BYTES", "MAGIC", "MAX_CPUS", "RECORD_WORDS", "Damage", "Source", "Windows", "plausible", "scan"]

MAGIC = 0x2001F003  #: header of TRC_TRACE_CPU_CHANGE: two extra words, no stamp
MAGIC_LE = struct.pack("<I", MAGIC)
HEADER_BYTES = 12
MAX_CPUS = 4096  #: larger CPU numbers are taken for damage (xenalyze: 256)
PROBE_BYTES = 120  # enough for the first stamped record of nearly every window
LONG_PROBE_BYTES = 16 << 10
SEARCH_BYTES = 1 << 20
#: Length in words of a record by the top four bits of its header: stamp flag and number of extra words.
RECORD_WORDS = tuple(1 + (2 if top & 8 else 0) + (top & 7) for top in range(16))


class Source:
    """Positioned reads from a binary stream; `RecordingError` if it is shorter than it was."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.size = stream.seek(0, os.SEEK_END)
        self.descriptor: int | None
        try:
            self.descriptor = stream.fileno()
        except (OSError, AttributeError):
            self.descriptor = None

    def read(self, offset: int, size: int) -> bytes:
        """Up to `size` bytes at `offset` (fewer at the end)."""
        try:
            if self.descriptor is not None:
                return os.pread(self.descriptor, size, offset)
            self.stream.seek(offset)
            return self.stream.read(size)
        except OSError as error:
            raise RecordingError(f"cannot be read: {error.strerror or error}", offset=offset) from error

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fills `target` from `offset` on."""
        try:
            done = 0
            while done < len(target):
                if self.descriptor is not None:
                    count = os.preadv(self.descriptor, [target[done:]], offset + done)
                else:
                    self.stream.seek(offset + done)
                    count = self.stream.readinto(target[done:])  # type: ignore[attr-defined]
                if not count:
                    raise RecordingError("file became shorter while it was read", offset=offset + done)
                done += count
        except OSError as error:
            raise RecordingError(f"cannot be read: {error.strerror or error}", offset=offset) from error


@dataclass(frozen=True, slots=True)
class Damage:
    """Bytes [offset, offset + length) that belong to no window, or (length 0) a window with a wrong size."""

    reason: str  # "damaged" | "truncated"
    offset: int
    length: int
    cpu: int | None
    text: str


@dataclass(slots=True)
class Windows:
    """All windows in file order, as columns; a window's words include its three header words.

    `floor`: no record of the window sorts before this key; `first`: the first stamp in it (0: none found).
    """

    offset: NDArray[np.int64]
    words: NDArray[np.int64]
    cpu: NDArray[np.int64]
    first: NDArray[np.uint64]
    leads: NDArray[np.bool_]  # the first record of the payload is stamped
    damage: list[Damage] = field(default_factory=list)
    skipped: int = 0
    first_stamp: dict[int, int] = field(default_factory=dict)  # by CPU

    @property
    def origin(self) -> int:
        """Where time begins: no key is lower. A CPU's own first stamp may be damaged, and so tell nothing of others."""
        return min(self.first_stamp.values(), default=0)


def plausible(head: bytes, remaining: int) -> tuple[int, int] | None:
    """(cpu, payload bytes) if `head` starts with a window header that fits into `remaining` bytes."""
    if len(head) < HEADER_BYTES:
        return None
    magic, cpu, size = struct.unpack_from("<III", head)
    if magic != MAGIC or cpu >= MAX_CPUS or size % 4 or HEADER_BYTES + size > remaining:
        return None
    return cpu, size


class _Scan:
    def __init__(self, source: Source) -> None:
        self.source = source
        # One array for each column of Windows: there are 46 windows in a megabyte.
        self.offset, self.words, self.cpu = array("q"), array("q"), array("q")
        self.first, self.leads = array("Q"), bytearray()
        self.damage: list[Damage] = []
        self.skipped = 0
        self.first_stamp: dict[int, int] = {}
        self.found: tuple[int, int] | None = None  # (searched from, result) of the last search

    def run(self) -> None:
        source, size = self.source, self.source.size
        offset = 0
        head = source.read(0, HEADER_BYTES + PROBE_BYTES)
        while offset < size:
            fit = plausible(head, size - offset)
            if fit is None:
                offset = self.broken(offset, head)
                head = source.read(offset, HEADER_BYTES + PROBE_BYTES)
                continue
            cpu, payload = fit
            end = offset + HEADER_BYTES + payload
            after = source.read(end, HEADER_BYTES + PROBE_BYTES)
            if end < size and not self.starts(after):
                # The size is wrong, or what follows is damaged: an earlier header decides which.
                found = self.search(offset + HEADER_BYTES)
                if found < end:
                    cut = (found - offset - HEADER_BYTES) // 4 * 4
                    text = f"window header of CPU {cpu} says {payload} bytes, but another window begins after {cut}"
                    self.damage.append(Damage("damaged", offset, found - offset - HEADER_BYTES - cut, cpu, text))
                    self.skipped += found - offset - HEADER_BYTES - cut
                    self.add(offset, cut, cpu, head)
                    offset = found
                    head = source.read(offset, HEADER_BYTES + PROBE_BYTES)
                    continue
            self.add(offset, payload, cpu, head)
            offset, head = end, after

    def starts(self, head: bytes) -> bool:
        """Whether `head` is a header, possibly of a window that was cut off."""
        if len(head) < HEADER_BYTES:
            return MAGIC_LE.startswith(head[:4]) or head.startswith(MAGIC_LE)
        magic, cpu, size = struct.unpack_from("<III", head)
        return bool(magic == MAGIC and cpu < MAX_CPUS and size % 4 == 0)

    def broken(self, offset: int, head: bytes) -> int:
        """Handles what is not a whole window at `offset`; returns where to go on."""
        size = self.source.size
        found = self.search(offset + 1)
        if len(head) >= HEADER_BYTES and self.starts(head):
            _, cpu, payload = struct.unpack_from("<III", head)
            reason = "truncated" if found >= size else "damaged"
            there = found - offset - HEADER_BYTES
            text = f"window of CPU {cpu} promises {payload} bytes, {there} are there"
            self.add(offset, there // 4 * 4, cpu, head[: HEADER_BYTES + there])
            self.damage.append(Damage(reason, found - there % 4, there % 4, cpu, text))
            self.skipped += there % 4
            return found
        word = head[:4].hex(" ")
        if found >= size and offset and len(head) < HEADER_BYTES:
            text = f"{len(head)} bytes at the end are too few for a window header"
            self.damage.append(Damage("truncated", offset, size - offset, None, text))
        else:
            text = f"expected a window header (03 f0 01 20), found {word}; skipped {found - offset} bytes"
            self.damage.append(Damage("damaged", offset, found - offset, None, text))
        self.skipped += found - offset
        return found

    def search(self, start: int) -> int:
        """Offset of the next header, from `start` on, whose window ends at a header or at the end of file."""
        if self.found and self.found[0] <= start <= self.found[1]:
            return self.found[1]
        source, size = self.source, self.source.size
        base = start
        while base < size:
            block = source.read(base, SEARCH_BYTES + HEADER_BYTES)
            if not block:
                break
            at = block.find(MAGIC_LE)
            while 0 <= at < SEARCH_BYTES:
                fit = plausible(block[at : at + HEADER_BYTES], size - base - at)
                if fit is not None:
                    end = base + at + HEADER_BYTES + fit[1]
                    if end == size or self.starts(source.read(end, HEADER_BYTES)):
                        self.found = start, base + at
                        return base + at
                at = block.find(MAGIC_LE, at + 1)
            base += SEARCH_BYTES
        self.found = start, size
        return size

    def add(self, offset: int, payload: int, cpu: int, head: bytes) -> None:
        stamp, leads = self.probe(offset + HEADER_BYTES, payload, cpu, head)
        if stamp is not None:
            self.first_stamp.setdefault(cpu, stamp)
        self.offset.append(offset)
        self.words.append(3 + payload // 4)
        self.cpu.append(cpu)
        self.first.append(stamp or 0)
        self.leads.append(leads)

    def probe(self, offset: int, payload: int, cpu: int, head: bytes) -> tuple[int | None, bool]:
        """The first stamp in a window, and whether its first record has it."""
        if not payload:
            return None, False
        block = head[HEADER_BYTES : HEADER_BYTES + payload]
        stamp, at = _first_stamp(block, payload)
        if stamp is None and at < payload:
            limit = payload if cpu not in self.first_stamp else min(payload, LONG_PROBE_BYTES)
            done = at
            while stamp is None and done < limit:
                block = self.source.read(offset + done, min(LONG_PROBE_BYTES, payload - done))
                stamp, used = _first_stamp(block, payload - done)
                if not used:
                    break
                done += used
        return stamp, stamp is not None and bool(block) and at == 0


def _first_stamp(block: bytes, limit: int) -> tuple[int | None, int]:
    """(first stamp or None, bytes hopped over before it) in `block`; records do not reach beyond `limit`."""
    at = 0
    while at + 4 <= len(block):
        top = block[at + 3] >> 4
        size = 4 * RECORD_WORDS[top]
        if at + size > limit:
            return None, limit
        if top & 8:
            if at + 12 > len(block):
                return None, at
            return int.from_bytes(block[at + 4 : at + 12], "little"), at
        at += size
    return None, at


def scan(source: Source) -> Windows:
    """Finds all windows. `RecordingError` if there is none."""
    if not source.size:
        raise RecordingError("empty file")
    run = _Scan(source)
    run.run()
    if not run.offset:
        word = source.read(0, 4).hex(" ")
        raise RecordingError(
            f"not an xentrace recording: expected a window header (03 f0 01 20) at offset 0, found {word}, "
            f"and there is none in {source.size} bytes"
        )
    return Windows(
        np.frombuffer(run.offset, np.int64), np.frombuffer(run.words, np.int64), np.frombuffer(run.cpu, np.int64),
        np.frombuffer(run.first, np.uint64), np.frombuffer(run.leads, np.bool_),
        run.damage, run.skipped, run.first_stamp,
    )  # fmt: skip
