"""Opens a recording: a seekable stream of its uncompressed bytes, whatever it was compressed with.

Compression is recognised by magic numbers, never by the file's name, and works the same on stdin.
"""

from __future__ import annotations

import bz2
import hashlib
import io
import lzma
import os
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from parsers.recording import RecordingError

__all__ = ["HEAD_BYTES", "MAX_BYTES", "MAX_RATIO", "SPOOL_RAM_BYTES", "Opened", "open_recording"]

HEAD_BYTES = 64 << 10  #: what a reader's `sniff` gets to see
SPOOL_RAM_BYTES = 32 << 20  #: decompressed recordings up to this size stay in memory
MAX_RATIO = 200.0  #: a larger expansion is taken for a decompression bomb ...
RATIO_FREE_BYTES = 64 << 20  #: ... once this much came out (a small file of zeros is harmless)
MAX_BYTES = 8 << 30  #: and nothing may expand beyond this
LZMA_MEMORY = 256 << 20  #: memory that an xz stream may ask for
PIECE = 256 << 10
ZSTD_PIECE = 4 << 10  # Arrow drops an incomplete piece when the stream breaks off: lose little

#: (magic number, codec): gzip RFC 1952, Zstandard RFC 8878, .xz file format 1.2, bzip2.
MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\x1f\x8b\x08", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"BZh", "bz2"),
)
MAGIC_BYTES = 6


class Opened:
    """A recording, opened.

    `stream`: seekable binary stream of the uncompressed bytes; `name`: as given by the user;
    `compression`: "gzip", "zstd", "xz", "bz2" or None; `size`: uncompressed bytes;
    `truncated`: why a compressed stream ended early (what came out before is in `stream`), else None.
    """

    def __init__(
        self,
        stream: BinaryIO,
        name: str,
        *,
        size: int,
        compression: str | None = None,
        truncated: str | None = None,
        digest: str | None = None,
    ) -> None:
        self.stream = stream
        self.name = name
        self.size = size
        self.compression = compression
        self.truncated = truncated
        self._digest = digest
        self._stamp = None if digest is not None else _stamp_of(stream)

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the input as stored, that is: before decompression.

        `RecordingError` when a file that is read in place is no longer as it was when it was opened: what was read
        is then neither the old content nor the new.
        """
        if self._digest is None:
            with Path(self.name).open("rb") as file:
                self._digest = hashlib.file_digest(file, "sha256").hexdigest()
                if self._stamp is not None and _stamp_of(file) != self._stamp:
                    raise RecordingError("the file changed while it was read; make a copy and read that")
        return self._digest

    def head(self) -> bytes:
        """The first `HEAD_BYTES` of the uncompressed recording; the stream is left at its start."""
        self.stream.seek(0)
        head = self.stream.read(HEAD_BYTES)
        self.stream.seek(0)
        return head

    def close(self) -> None:
        """Closes the stream; a spooled copy is gone after this."""
        self.stream.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_recording(
    path: str | Path, *, max_ratio: float = MAX_RATIO, max_bytes: int = MAX_BYTES
) -> Opened:
    """Opens the file `path`, or stdin for "-".

    Plain files are opened in place. Compressed ones and stdin go to a spool: memory below
    `SPOOL_RAM_BYTES`, an unnamed temporary file above. `RecordingError` if the file cannot be opened or read,
    or if it expands by more than `max_ratio` or beyond `max_bytes`.
    """
    name = str(path)
    try:
        if name == "-":
            return _spool(sys.stdin.buffer, name, max_ratio, max_bytes)
        file = Path(path).open("rb")  # noqa: SIM115 - handed to the caller
        try:
            if file.seekable() and _codec_of(file.read(MAGIC_BYTES)) is None:
                size = file.seek(0, io.SEEK_END)
                file.seek(0)
                return Opened(file, name, size=size)
            if file.seekable():
                file.seek(0)
            opened = _spool(file, name, max_ratio, max_bytes)
        except BaseException:
            file.close()
            raise
        file.close()
        return opened
    except OSError as error:
        raise RecordingError(f"cannot be read: {error.strerror or error}") from error


def _stamp_of(file: BinaryIO) -> tuple[int, int, int, int]:
    """Device, inode, size and time of the last change of an open file."""
    stat = os.fstat(file.fileno())
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def _codec_of(head: bytes) -> str | None:
    for magic, codec in MAGIC:
        if head.startswith(magic):
            return codec
    return None


class _Source:
    """The stored bytes, hashed as they go by. `read` may be handed to pyarrow as a file."""

    closed = False

    def __init__(self, raw: BinaryIO) -> None:
        self.raw = raw
        self.hash = hashlib.sha256()
        self.count = 0
        self.pushed = self._more(MAGIC_BYTES)
        while len(self.pushed) < MAGIC_BYTES and (more := self._more(MAGIC_BYTES - len(self.pushed))):
            self.pushed += more

    def _more(self, size: int) -> bytes:
        data = self.raw.read(size)
        self.hash.update(data)
        self.count += len(data)
        return data

    def read(self, size: int = PIECE) -> bytes:
        if self.pushed:
            data, self.pushed = self.pushed[:size], self.pushed[size:]
            return data
        return self._more(size)

    def close(self) -> None:
        """Asked for by pyarrow; the file belongs to the caller."""

    def drain(self) -> str:
        """Reads to the end (the hash covers all of the input) and returns the digest."""
        while self._more(PIECE):
            pass
        return self.hash.hexdigest()


class _Spool:
    """Memory up to `SPOOL_RAM_BYTES`, then an unnamed temporary file with a descriptor of its own."""

    def __init__(self) -> None:
        self.file: Any = io.BytesIO()
        self.size = 0
        self.in_memory = True

    def write(self, data: bytes) -> None:
        if self.in_memory and self.size + len(data) > SPOOL_RAM_BYTES:
            # The caller owns and closes it.
            disk = tempfile.TemporaryFile(prefix="tracetool-")  # noqa: SIM115
            disk.write(self.file.getbuffer())
            self.file, self.in_memory = disk, False
        self.file.write(data)
        self.size += len(data)

    def finish(self) -> BinaryIO:
        self.file.flush()
        self.file.seek(0)
        return cast(BinaryIO, self.file)


def _spool(raw: BinaryIO, name: str, max_ratio: float, max_bytes: int) -> Opened:
    source = _Source(raw)
    codec = _codec_of(source.pushed)
    spool = _Spool()
    truncated: str | None = None
    try:
        for piece in _PIECES[codec](source):
            spool.write(piece)
            size = spool.size
            if codec and (size > max_bytes or size > max(RATIO_FREE_BYTES, max_ratio * source.count)):
                raise RecordingError(
                    f"{codec} stream expands to more than {size >> 20} MiB from {source.count} bytes; refused",
                    offset=source.count,
                )
    except _Damaged as error:
        truncated = f"{codec} stream: {error} after {source.count} bytes; {spool.size} bytes came out"
        if not spool.size:
            spool.file.close()
            raise RecordingError(truncated, offset=source.count) from error
    except BaseException:
        spool.file.close()
        raise
    return Opened(
        spool.finish(), name, size=spool.size, compression=codec, truncated=truncated, digest=source.drain()
    )


class _Damaged(Exception):
    """The compressed stream ended early or is damaged."""


def _plain(source: _Source) -> Iterator[bytes]:
    while data := source.read():
        yield data


def _zlib(source: _Source) -> Iterator[bytes]:
    """gzip, any number of members; zlib's object has no `needs_input`, so its tail is fed again."""
    data = source.read()
    while data:
        member = zlib.decompressobj(wbits=31)
        while not member.eof:
            if not data:
                raise _Damaged("ends early")
            try:
                out = member.decompress(data, PIECE)
            except zlib.error as error:
                raise _Damaged(str(error)) from error
            if out:
                yield out
            if not member.eof:
                data = member.unconsumed_tail or source.read()
        # Zero padding after the last member is legal (tapes, block devices).
        data = (member.unused_data or source.read()).lstrip(b"\0")
        if data and not data.startswith(b"\x1f\x8b"[: len(data)]):
            raise _Damaged("something else follows the last member")


def _stdlib(make: Callable[[], Any]) -> Callable[[_Source], Iterator[bytes]]:
    """bz2 and xz: objects with `needs_input`, any number of streams one after the other."""

    def pieces(source: _Source) -> Iterator[bytes]:
        data = source.read()
        while data:
            stream = make()
            while not stream.eof:
                if stream.needs_input and not data:
                    data = source.read()
                    if not data:
                        raise _Damaged("ends early")
                try:
                    out = stream.decompress(data, PIECE)
                except (OSError, lzma.LZMAError, EOFError, MemoryError) as error:
                    raise _Damaged(str(error)) from error
                data = b""
                if out:
                    yield out
            data = (stream.unused_data or source.read()).lstrip(b"\0")

    return pieces


def _zstd(source: _Source) -> Iterator[bytes]:
    """Zstandard frames through Arrow's codec, which reads any number of them."""
    import pyarrow as pa

    stream = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")
    while True:
        try:
            out = stream.read(ZSTD_PIECE)
        except (OSError, pa.ArrowException) as error:
            raise _Damaged(str(error).splitlines()[0]) from error
        if not out:
            return
        yield out


_PIECES: dict[str | None, Callable[[_Source], Iterator[bytes]]] = {
    None: _plain,
    "gzip": _zlib,
    "bz2": _stdlib(bz2.BZ2Decompressor),
    "xz": _stdlib(lambda: lzma.LZMADecompressor(memlimit=LZMA_MEMORY)),
    "zstd": _zstd,
}
