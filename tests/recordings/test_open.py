"""Opening recordings: compression by magic, stdin, truncation, bombs."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from parsers.formats import FORMATS, reader_class, sniff
from parsers.open import SPOOL_RAM_BYTES, open_recording
from parsers.recording import RecordingError
from tests.shared import SAMPLES

RAW = (SAMPLES / "xen-2l-dom0-idle.xentrace").read_bytes()


def zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zstd": zstd
}  # fmt: skip


@pytest.mark.parametrize("codec", PACKERS)
@pytest.mark.parametrize("members", [1, 3])
def test_any_compression_under_any_name(tmp_path: Path, codec: str, members: int) -> None:
    path = tmp_path / "recording.txt"
    stored = PACKERS[codec](RAW) * members
    path.write_bytes(stored)
    with open_recording(path) as opened:
        assert opened.compression == codec
        assert opened.truncated is None
        assert opened.stream.read() == RAW * members
        assert opened.size == len(RAW) * members
        assert opened.sha256 == hashlib.sha256(stored).hexdigest()


def test_plain_files_are_opened_in_place() -> None:
    path = SAMPLES / "xen-2l-dom0-idle.xentrace"
    with open_recording(path) as opened:
        assert (opened.compression, opened.size) == (None, len(RAW))
        assert opened.sha256 == hashlib.sha256(RAW).hexdigest()
        assert opened.head() == RAW[: 64 << 10]
        assert opened.stream.tell() == 0


@pytest.mark.parametrize("codec", [None, *PACKERS])
def test_stdin(monkeypatch: pytest.MonkeyPatch, codec: str | None) -> None:
    stored = PACKERS[codec](RAW) if codec else RAW

    class Stdin:
        buffer = io.BytesIO(stored)

    monkeypatch.setattr(sys, "stdin", Stdin())
    with open_recording("-") as opened:
        assert opened.stream.read() == RAW
        assert opened.compression == codec
        assert opened.sha256 == hashlib.sha256(stored).hexdigest()


@pytest.mark.parametrize("codec", ["gzip", "xz", "zstd"])
def test_truncated_stream_keeps_what_came_out(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "cut"
    stored = PACKERS[codec](RAW * 20)
    path.write_bytes(stored[: len(stored) * 9 // 10])
    with open_recording(path) as opened:
        out = opened.stream.read()
        assert opened.truncated is not None
        assert "bytes came out" in opened.truncated
        assert len(out) > len(RAW) // 3
        assert (RAW * 20).startswith(out)


def test_expansion_is_limited(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(bytes(100 << 20)))
    with pytest.raises(RecordingError, match="refused"):
        open_recording(path)
    path.write_bytes(gzip.compress(RAW * 10))
    with pytest.raises(RecordingError, match="refused"):
        open_recording(path, max_bytes=1 << 20)


def test_large_recordings_leave_memory(tmp_path: Path) -> None:
    path = tmp_path / "large"
    copies = SPOOL_RAM_BYTES // len(RAW) + 1
    path.write_bytes(zstd(RAW * copies))
    with open_recording(path) as opened:
        assert opened.stream.fileno() >= 0
        opened.stream.seek(-len(RAW), io.SEEK_END)
        assert opened.stream.read() == RAW


def test_missing_file_and_directory(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(RecordingError, match="cannot be read"):
            open_recording(path)


@pytest.mark.parametrize("head", [b"", b"\0" * 4096, b"hello world\n" * 50])
def test_what_is_not_xentrace_is_not_sniffed(head: bytes) -> None:
    assert not reader_class("xentrace").sniff(head)


def test_sniff() -> None:
    assert sniff(RAW[: 64 << 10]) is reader_class("xentrace")
    assert sniff(b"garbage!" + RAW[: 32 << 10]) is reader_class("xentrace")
    assert len({name for name, _, _ in FORMATS}) == len(FORMATS)
