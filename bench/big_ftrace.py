"""Makes a trace.dat of any size with the event mix of a real one, and consistent with itself.

    python -m bench.big_ftrace RECORDING.dat SIZE OUTPUT.dat      SIZE as in 300M: bytes of ring-buffer pages

The ring-buffer pages of every CPU are repeated with their page stamps moved by the length of the recording; stamps
inside a page are deltas, so nothing else changes (a recording with absolute stamps inside its pages is refused).
Version 7 with one buffer, compressed as the original is; formats, symbols and task names are the original's. The
output is written piece by piece: memory depends on the recording, not on SIZE. Text of that size is what
`trace-cmd report` prints of the result.
"""

from __future__ import annotations

import argparse
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import pyarrow as pa

from bench.big import parse_size
from parsers.open import open_recording

__all__ = ["Source", "main", "read_source", "write"]

OPTIONS: Final = 0
BUFFER: Final = 3
PAGE_HEAD: Final = 16


@dataclass(frozen=True, slots=True)
class Source:
    """A version 7 file taken apart: bytes before the buffer section, its option, each CPU's chunks of plain pages."""

    head: bytes
    link: int  # where in `head` the offset of the second options section stands
    name_and_clock: bytes
    page: int
    cpus: list[int]
    chunks: list[list[bytes]]
    compressed: bool
    tail: bytes  # the strings section
    period: int


def _text(data: bytes, at: int) -> tuple[bytes, int]:
    end = data.index(b"\0", at)
    return data[at:end], end + 1


def _extent(pages: bytes, page: int) -> tuple[int, int]:
    """First and last stamp of one CPU's pages, record by record."""
    stamp = last = 0
    for base in range(0, len(pages), page):
        stamp, commit = struct.unpack_from("<QQ", pages, base)
        at = base + PAGE_HEAD
        end = at + (commit & (1 << 27) - 1)
        while at < end:
            (word,) = struct.unpack_from("<I", pages, at)
            kind, delta = word & 31, word >> 5
            (after,) = struct.unpack_from("<I", pages, at + 4) if at + 8 <= end else (0,)
            if kind == 31:
                raise SystemExit("absolute stamps inside the pages: cannot be moved")
            if kind == 29 and not delta:
                break
            stamp += delta + (after << 27 if kind == 30 else 0)
            at += 8 if kind == 30 else 4 + after if kind in (0, 29) else 4 + 4 * kind
            last = stamp
    return struct.unpack_from("<Q", pages)[0], last


def read_source(path: str) -> Source:
    """Take a recording apart; SystemExit when it is not of the kind that can be repeated."""
    with open_recording(path) as opened:
        data = opened.stream.read()
    if data[:13] != b"\x17\x08\x44tracing7\0\0":
        raise SystemExit(f"{path}: not a little-endian trace.dat of version 7")
    method, at = _text(data, 18)
    if method not in (b"zstd", b"none"):
        raise SystemExit(f"{path}: compressed with {method!r}, only zstd and none are repeated")
    codec = pa.Codec("zstd")
    _, at = _text(data, at)
    (first,) = struct.unpack_from("<Q", data, at)
    ident, flags, _, size = struct.unpack_from("<HHIQ", data, first)
    link = first + 16 + size - 8
    (second,) = struct.unpack_from("<Q", data, link)
    if ident != OPTIONS or flags & 1 or not second:
        raise SystemExit(f"{path}: the options are not where trace-cmd 3.1 writes them")
    _, _, _, second_size = struct.unpack_from("<HHIQ", data, second)
    option, length = struct.unpack_from("<HI", data, second + 16)
    body = data[second + 22 : second + 22 + length]
    if option != BUFFER or length + 6 + 14 != second_size:
        raise SystemExit(f"{path}: more than one buffer")
    (section,) = struct.unpack_from("<Q", body)
    _, at = _text(body, 8)
    _, at = _text(body, at)
    page, count = struct.unpack_from("<II", body, at)
    cpus, chunks, extents = [], [], []
    compressed = bool(struct.unpack_from("<HH", data, section)[1] & 1)
    for number in range(count):
        cpu, offset, area = struct.unpack_from("<IQQ", body, at + 8 + 20 * number)
        parts: list[bytes] = []
        if not compressed:
            parts = [data[offset : offset + area]] if area else []
        elif area:
            (chunk_count,) = struct.unpack_from("<I", data, offset)
            offset += 4
            for _ in range(chunk_count):
                small, plain = struct.unpack_from("<II", data, offset)
                parts.append(codec.decompress(data[offset + 8 : offset + 8 + small], plain, asbytes=True))
                offset += 8 + small
        cpus.append(cpu)
        chunks.append(parts)
        if parts:
            extents.append(_extent(b"".join(parts), page))
    if not extents:
        raise SystemExit(f"{path}: no records")
    period = max(last for _, last in extents) - min(begin for begin, _ in extents) + 1
    tail = data[second + 16 + second_size :]
    return Source(data[:section], link, body[8:at], page, cpus, chunks, compressed, tail, period)


def _moved(pages: bytes, page: int, add: int) -> bytes:
    words = np.frombuffer(bytearray(pages), dtype="<u8").reshape(-1, page // 8)
    words[:, 0] += np.uint64(add)
    return words.tobytes()


def write(source: Source, copies: int, out: BinaryIO) -> None:
    """The recording, `copies` times one after the other in time."""
    codec = pa.Codec("zstd")
    out.write(source.head)
    section = out.tell()
    out.write(bytes(16))
    entries = []
    for cpu, parts in zip(source.cpus, source.chunks, strict=True):
        out.write(bytes(-out.tell() % source.page))
        begin = out.tell()
        if parts and source.compressed:
            out.write(struct.pack("<I", copies * len(parts)))
        for copy in range(copies):
            for part in parts:
                pages = _moved(part, source.page, copy * source.period)
                if source.compressed:
                    small = codec.compress(pages, asbytes=True)
                    out.write(struct.pack("<II", len(small), len(pages)))
                    pages = small
                out.write(pages)
        size = out.tell() - begin
        # trace-cmd's size leaves out the count of chunks
        entries.append((cpu, begin, size - 4 if size and source.compressed else size))
    second = out.tell()
    body = struct.pack("<Q", section) + source.name_and_clock + struct.pack("<II", source.page, len(entries))
    body += b"".join(struct.pack("<IQQ", *entry) for entry in entries)
    options = struct.pack("<HI", BUFFER, len(body)) + body + struct.pack("<HIQ", 0, 8, 0)
    out.write(struct.pack("<HHIQ", OPTIONS, 0, 0, len(options)) + options + source.tail)
    out.seek(section)
    out.write(struct.pack("<HHIQ", BUFFER, int(source.compressed), 0, second - section - 16))
    out.seek(source.link)
    out.write(struct.pack("<Q", second))


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("recording")
    parser.add_argument("size", type=parse_size)
    parser.add_argument("output")
    given = parser.parse_args(arguments)
    source = read_source(given.recording)
    one = sum(len(part) for parts in source.chunks for part in parts)
    copies = max(1, -(-given.size // one))
    with Path(given.output).open("wb") as out:
        write(source, copies, out)
    print(f"{copies} copies, {copies * one} bytes of pages", file=sys.stderr)


if __name__ == "__main__":
    main()
