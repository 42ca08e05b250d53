"""Bounded reads from a file or a section: every request is checked against what is there before it is served."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import pyarrow as pa

from parsers.recording import RecordingError
from parsers.tracedat.layout import Limit

__all__ = ["Cursor", "Damage", "checked_usize", "decompressor"]


class Damage(Exception):
    """Bytes that cannot be what their place in the file says; `offset` is in the file."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class Cursor:
    """Position in `stream` that never reads beyond `end`; `base` is added to offsets in messages."""

    def __init__(self, stream: BinaryIO, end: int, *, order: str = "<", base: int = 0) -> None:
        self.stream, self.end, self.order, self.base = stream, end, order, base

    @classmethod
    def over(cls, data: bytes, *, order: str, base: int) -> Cursor:
        """A cursor over bytes in memory that came from file offset `base`."""
        return cls(io.BytesIO(data), len(data), order=order, base=base)

    def tell(self) -> int:
        """Offset in the stream."""
        return self.stream.tell()

    def seek(self, offset: int) -> None:
        """Go to `offset`; raises `Damage` when it lies outside."""
        if not 0 <= offset <= self.end:
            raise Damage(f"offset {offset} lies outside the {self.end} bytes there are", self.base)
        self.stream.seek(offset)

    def left(self) -> int:
        """Bytes up to the end."""
        return self.end - self.stream.tell()

    def take(self, size: int) -> bytes:
        """Exactly `size` bytes."""
        here = self.stream.tell()
        if not 0 <= size <= self.end - here:
            raise Damage(f"{size} bytes wanted, {self.end - here} there", self.base + here)
        data = self.stream.read(size)
        if len(data) != size:
            raise Damage(f"{size} bytes wanted, {len(data)} there", self.base + here)
        return data

    def number(self, size: int) -> int:
        """Unsigned integer of `size` bytes in the file's byte order."""
        return int.from_bytes(self.take(size), "little" if self.order == "<" else "big")

    def unpack(self, layout: str) -> tuple[Any, ...]:
        """`struct` fields in the file's byte order, without padding."""
        return struct.unpack(self.order + layout, self.take(struct.calcsize("<" + layout)))

    def text(self, limit: int = 4096) -> bytes:
        """A NUL-terminated string of less than `limit` bytes, without the NUL."""
        here = self.stream.tell()
        data = self.stream.read(max(0, min(limit, self.end - here)))
        length = data.find(b"\0")
        if length < 0:
            raise Damage("string without an end", self.base + here)
        self.stream.seek(here + length + 1)
        return data[:length]


def decompressor(name: str) -> Callable[[bytes, int], bytes]:
    """Function (data, uncompressed size) -> bytes for trace-cmd's algorithm `name`; it raises ValueError on damage."""
    if name == "zstd":
        codec = pa.Codec("zstd")

        def zstd(data: bytes, size: int) -> bytes:
            try:
                plain = codec.decompress(data, decompressed_size=size, asbytes=True)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(str(error).splitlines()[0]) from error
            return bytes(plain)

        return zstd
    if name == "zlib":

        def inflate(data: bytes, size: int) -> bytes:
            try:
                plain = zlib.decompressobj().decompress(data, max(1, size))
            except zlib.error as error:
                raise ValueError(str(error)) from error
            if len(plain) != size:
                raise ValueError(f"{len(plain)} bytes instead of {size}")
            return plain

        return inflate
    if name == "none":
        return lambda data, size: data
    raise RecordingError(f"trace.dat compressed with {name!r}; zstd, zlib and none are known")


def checked_usize(size: int, compressed: int, offset: int) -> int:
    """`size` if a compressed section of `compressed` bytes may claim it (zstd and zlib stay below 1:40000)."""
    if size > min(Limit.SECTION, 40000 * compressed + 4096):
        raise Damage(f"{compressed} compressed bytes claim to hold {size}", offset)
    return size
