"""Text recordings that are cut anywhere, hit by noise, or one endless line: tables and notes, never another error."""

from __future__ import annotations

import gzip
import io
import random
import resource
import time
from collections.abc import Callable
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

import parsers.qemu.reader
import parsers.xenalyze.classic
import parsers.xenalyze.reader
from parsers.debugkeys import InterruptsReader, LsevtchnReader, TimerListReader, XenConsoleReader
from parsers.qemu import QemuReader
from parsers.recording import Chunk, ReadOptions, RecordingError
from parsers.xenalyze import ClassicReader, XenalyzeReader
from tests.shared import SAMPLES

SOURCES: dict[str, tuple[Any, int]] = {  # sample → reader, bytes of it that are used
    "qemu-x86-ioapic.log.gz": (QemuReader, 60_000),
    "qemu-arm64-gic.log.gz": (QemuReader, 60_000),
    "xen-debug-keys.txt.zst": (XenConsoleReader, 1 << 20),
    "proc-interrupts-hpet.txt": (InterruptsReader, 1 << 20),
    "proc-timer_list.txt": (TimerListReader, 1 << 20),
    "lsevtchn-hvm.txt": (LsevtchnReader, 1 << 20),
    "xenalyze-dom0-idle.dump.txt.zst": (XenalyzeReader, 60_000),
    "xentrace_format-dom0-idle.txt.zst": (ClassicReader, 60_000),
}


def sample(name: str) -> bytes:
    raw = (SAMPLES / name).read_bytes()
    if name.endswith(".gz"):
        return gzip.decompress(raw)
    if name.endswith(".zst"):
        data: bytes = pa.input_stream(str(SAMPLES / name), compression="zstd").read()
        return data
    return raw


def read(reader: Any, stream: Any) -> tuple[Any, list[Chunk]] | None:
    """Everything a reader gives; None if it refuses the input. The bytes always add up and every line has its row."""
    try:
        opened = reader(stream, ReadOptions())
    except RecordingError:
        return None
    chunks = list(opened.chunks())
    account = opened.accounting
    assert account.total == account.parsed + account.skipped
    return opened, chunks


def lines_of(chunks: list[Chunk]) -> list[int]:
    return sorted({line for chunk in chunks for table in chunk.tables.values() for line in table["offset"].to_pylist()})


def check(reader: Any, data: bytes) -> tuple[Any, list[Chunk]] | None:
    got = read(reader, io.BytesIO(data))
    if got is not None:
        opened, chunks = got
        assert opened.accounting.total == len(data)
        lines = data.count(b"\n") + (not data.endswith(b"\n"))
        assert lines_of(chunks) == list(range(1, lines + 1))
        for chunk in chunks:
            for name, table in chunk.tables.items():
                assert table.schema.equals(opened.tables[name].schema())
    return got


@pytest.mark.parametrize("name", SOURCES)
def test_cut_anywhere(name: str) -> None:
    reader, used = SOURCES[name]
    data = sample(name)[:used]
    random.seed(1)
    whole = check(reader, data[: data.rfind(b"\n") + 1])
    assert whole is not None
    for cut in [*range(40), *random.sample(range(len(data)), 25), len(data) - 1]:
        got = check(reader, data[:cut])
        good = data[:cut].rfind(b"\n") + 1
        if got is None or cut == good:
            continue
        # The lines before the cut are as they were, and the cut is told.
        notes = {note.code for chunk in got[1] for note in chunk.notes}
        assert any(code.endswith("-cut") for code in notes), (cut, notes)


def damage(data: bytes, kind: str) -> bytes:
    out = bytearray(data)
    for _ in range(60):
        at = random.randrange(len(out))
        if kind == "flip":
            out[at] ^= 1 << random.randrange(8)
        elif kind == "noise":
            out[at : at + random.randrange(40)] = random.randbytes(random.randrange(40))
        elif kind == "digits":  # numbers that do not fit their columns
            out[at:at] = b"99999999999999999999999"[: random.randrange(1, 24)]
        elif kind == "newlines":
            out[at : at + 1] = random.choice([b"\n", b"\r", b"\n\n", b"\0", b"\xff\n"])
    return bytes(out)


@pytest.mark.parametrize("kind", ["flip", "noise", "digits", "newlines"])
@pytest.mark.parametrize("name", SOURCES)
def test_noise(name: str, kind: str) -> None:
    reader, used = SOURCES[name]
    data = sample(name)[:used]
    random.seed(name + kind)
    for _ in range(6):
        check(reader, damage(data, kind))


@pytest.mark.parametrize("name", SOURCES)
def test_pure_noise_and_strange_files(name: str) -> None:
    reader, _ = SOURCES[name]
    random.seed(2)
    head = sample(name)[:2000]
    head = head[: head.rfind(b"\n") + 1]
    for tail in (random.randbytes(50_000), bytes(50_000), b"\n" * 50_000, b" " * 50_000, b"\xff" * 5000, b"9" * 50_000):
        check(reader, tail)
        check(reader, head + tail)


class Endless(io.RawIOBase):
    """A file of `head`, then `length` times the same byte, then `tail`; nothing of it is ever stored."""

    def __init__(self, head: bytes, length: int, tail: bytes) -> None:
        self._parts = (head, length, tail)
        self._size = len(head) + length + len(tail)
        self._at = 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._size)[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        head, length, tail = self._parts
        stop = self._size if size < 0 else min(self._size, self._at + size)
        out = head[self._at : stop]
        middle = min(stop, len(head) + length) - max(self._at, len(head))
        out += b"x" * max(middle, 0)
        start = max(self._at - len(head) - length, 0)
        if stop > len(head) + length:
            out += tail[start : stop - len(head) - length]
        self._at = stop
        return out


@pytest.mark.parametrize("name", SOURCES)
def test_a_line_of_a_gigabyte(name: str) -> None:
    reader, _ = SOURCES[name]
    head = sample(name)[:3000]
    head = head[: head.rfind(b"\n") + 1]
    stream = Endless(head, 1 << 30, b"\n" + head)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    got = read(reader, stream)
    assert got is not None
    opened, chunks = got
    assert opened.accounting.total == (1 << 30) + 1 + 2 * len(head)
    assert opened.accounting.skipped > 1 << 30
    assert time.process_time() - began < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 << 10  # KiB
    # What stands before and after the long line is read as usual.
    lines = head.count(b"\n")
    assert lines_of(chunks) == list(range(1, 2 * lines + 2))


def frames(chunks: list[Chunk]) -> dict[str, pl.DataFrame]:
    parts: dict[str, list[pa.Table]] = {}
    for chunk in chunks:
        for name, table in chunk.tables.items():
            parts.setdefault(name, []).append(table)
    return {name: pl.DataFrame(pl.from_arrow(pa.concat_tables(tables))) for name, tables in parts.items()}


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("qemu-x86-ioapic.log.gz", parsers.qemu.reader),
        ("xenalyze-dom0-idle.dump.txt.zst", parsers.xenalyze.reader),
        ("xentrace_format-dom0-idle.txt.zst", parsers.xenalyze.classic),
    ],
)
def test_the_size_of_a_batch_does_not_matter(name: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reader: Callable[..., Any] = SOURCES[name][0]
    data = sample(name)
    whole = check(reader, data)
    monkeypatch.setattr(module, "BATCH_BYTES", 37_000)
    pieces = check(reader, data)
    assert whole is not None and pieces is not None
    assert len(pieces[1]) > 10
    assert pieces[0].counts == whole[0].counts
    last = -1
    for chunk in pieces[1]:
        seqs = [s for table in chunk.tables.values() for s in (table["seq"][0].as_py(), table["seq"][-1].as_py())]
        assert not seqs or min(seqs) > last
        last = max(seqs, default=last)
    one, many = frames(whole[1]), frames(pieces[1])
    assert one.keys() == many.keys()
    for table, frame in one.items():
        assert many[table].equals(frame), table
