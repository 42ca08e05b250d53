"""trace.dat files made here: byte orders, rings with every record kind, and every way to break them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsers.recording import Chunk, ReadOptions, RecordingError
from parsers.tracedat import TraceDatReader

FORMAT = """name: tick
ID: 77
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:int irq;\toffset:8;\tsize:4;\tsigned:1;
\tfield:__data_loc char[] name;\toffset:12;\tsize:4;\tsigned:1;
\tfield:u64 wide;\toffset:16;\tsize:8;\tsigned:0;
\tfield:char comm[8];\toffset:24;\tsize:8;\tsigned:1;
\tfield:__rel_loc unsigned long[] mask;\toffset:32;\tsize:4;\tsigned:0;

print fmt: "irq=%d", REC->irq
"""


@dataclass
class Writer:
    """Builds trace.dat files: `order` "<" or ">", version 6 or 7, `method` none, zlib or zstd, `word` 8 or 4 bytes."""

    order: str = "<"
    version: int = 7
    method: str = "none"
    page: int = 4096
    word: int = 8

    def pack(self, layout: str, *values: Any) -> bytes:
        return struct.pack(self.order + layout, *values)

    def event(self, irq: int, name: bytes = b"eth0\0", ident: int = 77) -> bytes:
        """A `tick` record: pid = irq + 1000, wide = irq * 2**33, mask = [irq, 7]."""
        at = 36 + 2 * self.word
        body = self.pack("HBBi", ident, 1, 0x12, irq + 1000) + self.pack("iIQ", irq, at | len(name) << 16, irq << 33)
        body += b"co\xff\0junk" + self.pack("I", 2 * self.word << 16) + self.long(irq, 7) + name
        return body + bytes(-len(body) % 4)

    def long(self, *values: int) -> bytes:
        """C's `unsigned long`."""
        return self.pack(("Q" if self.word == 8 else "I") * len(values), *values)

    def record(self, delta: int, body: bytes, *, long: bool = False) -> bytes:
        size = len(body)
        if long or size > 112:
            return self.head(0, delta) + self.pack("I", size + 4) + body
        return self.head(size // 4, delta) + body

    def head(self, kind: int, delta: int) -> bytes:
        return self.pack("I", delta << 5 | kind if self.order == "<" else kind << 27 | delta)

    def ring(self, stamp: int, body: bytes, *, lost: int | None = None) -> bytes:
        """A page; `lost` -1: flagged without a count."""
        commit = len(body)
        if lost is not None:
            commit |= 1 << 31 | (1 << 30 if lost >= 0 else 0)
            if lost >= 0:
                body += self.long(lost)
        page = self.pack("Q", stamp) + self.long(commit) + body
        return page + b"\xee" * (self.page - len(page))

    def file(self, cpus: dict[int, bytes], *, clock: str = "local", options: bytes = b"", instance: str = "") -> bytes:
        """The whole recording; `cpus` maps CPU id to its pages."""
        info = b""
        page = HEADER_PAGE if self.word == 8 else HEADER_PAGE_32
        for name, text in ((b"header_page\0", page), (b"header_event\0", b"# compressed entry header\n")):
            info += name + self.pack("Q", len(text)) + text
        ftrace = self.pack("I", 0)
        formats = self.pack("I", 1) + b"irq\0" + self.pack("I", 1) + self.pack("Q", len(FORMAT)) + FORMAT.encode()
        symbols, printk, tasks = self.pack("I", 0), self.pack("I", 0), b"1001 ta\xffsk\\\n"
        tasks = self.pack("Q", len(tasks)) + tasks
        start = b"\x17\x08\x44tracing" + b"%d\0" % self.version + bytes([self.order == ">", self.word])
        start += self.pack("I", self.page)
        chosen = f"[{clock}]".encode()
        options = self.pack("HI", 4, len(chosen)) + chosen + options
        if self.version == 6:
            number = max(cpus) + 1
            out = start + info + ftrace + formats + symbols + printk + tasks + self.pack("I", number)
            out += b"options  \0" + options + self.pack("H", 0) + b"flyrecord\0"
            place = (len(out) + number * 16 + self.page - 1) // self.page * self.page
            table, data = b"", b""
            for cpu in range(number):
                pages = cpus.get(cpu, b"")
                table += self.pack("QQ", place + len(data), len(pages))
                data += pages
            return (out + table).ljust(place, b"\0") + data
        out = start + self.method.encode() + b"\0" + b"1\0"
        first_options = len(out)
        out += bytes(8)
        places = {}
        for ident, body in ((16, info), (17, ftrace), (18, formats), (19, symbols), (20, printk), (21, tasks)):
            places[ident] = len(out)
            out += self.section(ident, body)
        options += b"".join(self.pack("HIQ", ident, 8, place) for ident, place in places.items())
        entries, data = b"", b""
        buffer_at = len(out)
        out += self.pack("HHIQ", 3, int(self.method != "none"), 0, 0)
        for cpu, pages in cpus.items():
            block = self.chunks(pages) if self.method != "none" else pages
            counted = len(block) - 4 if self.method != "none" else len(block)
            data += bytes(-(len(out) + len(data)) % self.page)  # trace-cmd refuses pages elsewhere
            entries += self.pack("IQQ", cpu, len(out) + len(data), counted)
            data += block
        out = out[: buffer_at + 8] + self.pack("Q", len(data)) + out[buffer_at + 16 :] + data
        body = self.pack("Q", buffer_at) + instance.encode() + b"\0" + clock.encode() + b"\0"
        body += self.pack("II", self.page, len(cpus)) + entries
        second = len(out)
        done = self.pack("HIQ", 0, 8, 0)
        out += self.section(0, self.pack("HI", 3, len(body)) + body + done, plain=True)
        out = out[:first_options] + self.pack("Q", len(out)) + out[first_options + 8 :]
        return out + self.section(0, options + self.pack("HIQ", 0, 8, second), plain=True)

    def compress(self, data: bytes) -> bytes:
        return zlib.compress(data) if self.method == "zlib" else pa.Codec("zstd").compress(data, asbytes=True)

    def section(self, ident: int, body: bytes, *, plain: bool = False) -> bytes:
        packed = self.method != "none" and not plain
        if packed:
            small = self.compress(body)
            body = self.pack("II", len(small), len(body)) + small
        return self.pack("HHIQ", ident, int(packed), 0, len(body)) + body

    def chunks(self, pages: bytes) -> bytes:
        parts = [pages[i : i + 2 * self.page] for i in range(0, len(pages), 2 * self.page)]
        out = self.pack("I", len(parts))
        for part in parts:
            small = self.compress(part)
            out += self.pack("II", len(small), len(part)) + small
        return out


HEADER_PAGE = b"""\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:16;\tsize:4080;\tsigned:0;
"""


HEADER_PAGE_32 = b"""\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;
\tfield: local_t commit;\toffset:8;\tsize:4;\tsigned:1;
\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;
\tfield: char data;\toffset:12;\tsize:4084;\tsigned:0;
"""


def read(data: bytes, **options: Any) -> tuple[TraceDatReader, list[Chunk], dict[str, pa.Table]]:
    """Reader, chunks, whole tables; the account always adds up."""
    reader = TraceDatReader(io.BytesIO(data), ReadOptions(**options))
    chunks = list(reader.chunks())
    account = reader.accounting
    assert account.total == len(data) == account.parsed + account.skipped
    assert account.parsed >= 0 and account.skipped >= 0
    parts: dict[str, list[pa.Table]] = {}
    for chunk in chunks:
        for name, table in chunk.tables.items():
            table.validate(full=True)
            parts.setdefault(name, []).append(table)
    tables = {name: pa.concat_tables(tables) for name, tables in parts.items()}
    assert sum(reader.counts.values()) == sum(table.num_rows for table in tables.values())
    return reader, chunks, tables


def busy(writer: Writer) -> dict[int, bytes]:
    """Two CPUs (0 and 5) with every kind of record in their pages."""
    w = writer
    page = w.record(0, w.event(1)) + w.record(5, w.event(2), long=True)
    page += w.head(30, 3) + w.pack("I", 2) + w.record(1, w.event(3))  # extend: 3 + (2 << 27)
    page += w.head(29, 7) + w.pack("I", 8) + bytes(4) + w.record(0, w.event(4))  # padding with a delta
    page += w.head(31, 9) + w.pack("I", 1 << 4) + w.record(2, w.event(5))  # absolute: 9 + (16 << 27)
    page += w.record(0, w.event(6, b"x" * 150)) + w.head(29, 0) + b"\xff" * 8
    second = w.ring(1 << 32, w.record(1, w.event(8)), lost=17) + w.ring(1 << 33, w.record(1, w.event(9)), lost=-1)
    return {0: w.ring(100, page), 5: w.ring(50, w.record(0, w.event(7))) + second}


VARIANTS = [
    Writer(order, version, method, page)
    for order in "<>"
    for version, method in ((6, "none"), (7, "none"), (7, "zlib"), (7, "zstd"))
    for page in (4096, 16384)
] + [Writer(order, version, "none", 4096, 4) for order in "<>" for version in (6, 7)]


@pytest.mark.parametrize("writer", VARIANTS, ids=str)
def test_every_kind_of_record(writer: Writer) -> None:
    """Stamps, fields, order and lost records are the same in each variant."""
    reader, chunks, tables = read(writer.file(busy(writer)))
    rows = tables["tick"].to_pydict()
    extended = 100 + 5 + 3 + (2 << 27) + 1
    absolute = 9 + (16 << 27)
    assert list(zip(rows["irq"], rows["tsc"], rows["cpu"], strict=True)) == [
        (7, 50, 5),
        (1, 100, 0),
        (2, 105, 0),
        (3, extended, 0),
        (4, extended + 7, 0),
        (5, absolute + 2, 0),
        (6, absolute + 2, 0),
        (8, (1 << 32) + 1, 5),
        (9, (1 << 33) + 1, 5),
    ]
    assert rows["t_ns"] == [stamp - 50 for stamp in rows["tsc"]]
    assert rows["wide"] == [irq << 33 for irq in rows["irq"]]
    assert rows["mask"] == [[irq, 7] for irq in rows["irq"]]
    assert rows["name"] == ["eth0"] * 6 + ["x" * 150] + ["eth0"] * 2
    assert set(rows["arg_comm"]) == {"co\\xff"} and rows["comm"][1] == "ta\\xffsk\\\\" and rows["comm"][0] == "<...>"
    assert rows["flags"] == [1] * 9 and rows["preempt"] == [0x12] * 9 and rows["pid"][0] == 1007
    gaps = [gap for chunk in chunks for gap in chunk.gaps]
    assert [(gap.reason, gap.cpu, gap.t0, gap.t1, gap.lost) for gap in gaps] == [
        ("lost-records", 5, 50, (1 << 32) + 1, 17),
        ("lost-records", 5, (1 << 32) + 1, (1 << 33) + 1, None),
    ]
    assert reader.accounting.skipped == 0


def test_unknown_and_short_records_are_kept() -> None:
    """A record of an undeclared id and one shorter than its event go to ftrace_raw."""
    w = Writer()
    page = w.ring(1, w.record(0, w.event(1, ident=5)) + w.record(1, w.event(2)[:8]) + w.record(1, w.event(3)))
    reader, chunks, tables = read(w.file({0: page}))
    assert tables["ftrace_raw"]["event_id"].to_pylist() == [5, 77]
    assert tables["ftrace_raw"]["payload"].to_pylist() == [w.event(1, ident=5), w.event(2)[:8]]
    assert reader.counts == {"event_5": 1, "tick": 2}
    codes = {note.code for chunk in chunks for note in chunk.notes}
    assert {"tracedat-unknown-event", "tracedat-short-record"} <= codes


def test_tsc2nsec_and_time_shift() -> None:
    """ns = (ts * mult) >> shift, exact beyond 64 bits; a guest's stamps move by the peer's offset."""
    w = Writer()
    start = (1 << 61) + 12345
    pages = {0: w.ring(start, w.record(0, w.event(1)) + w.record(1000, w.event(2)))}
    mult, shift = 0xCCCC_CCCD, 33
    option = w.pack("HIIIQ", 14, 16, mult, shift, 99)
    reader, _, tables = read(w.file(pages, clock="tsc2nsec", options=option))
    exact = (((start + 1000) * mult) >> shift) - ((start * mult) >> shift)
    assert tables["tick"]["t_ns"].to_pylist() == [0, exact] and reader.clock.unit == "ns"
    assert tables["tick"]["tsc"].to_pylist() == [start, start + 1000]
    sample = w.pack("QII", 1, 0, 1) + w.pack("I", 1) + w.pack("QqQ", 5, -40, 1)
    option = w.pack("HI", 12, len(sample)) + sample
    two = {0: w.ring(100, w.record(0, w.event(1)))}
    _, chunks, tables = read(w.file(two, options=option))
    assert tables["tick"]["tsc"].to_pylist() == [100]
    assert "tracedat-time-shift" in {note.code for chunk in chunks for note in chunk.notes}


def test_damaged_page_keeps_prefix() -> None:
    """A record that runs over its page ends the page, with a gap at its place; later pages still count."""
    w = Writer()
    good = w.record(0, w.event(1))
    pages = w.ring(10, good + w.head(28, 1) + b"\0" * 8) + w.ring(20, w.record(0, w.event(2)))
    data = w.file({0: pages})
    reader, chunks, tables = read(data)
    assert tables["tick"]["irq"].to_pylist() == [1, 2]
    (gap,) = [gap for chunk in chunks for gap in chunk.gaps]
    assert gap.reason == "damaged" and gap.length == 12 and gap.offset == data.index(good) + len(good)
    assert reader.accounting.skipped == 12


@pytest.mark.parametrize("version", [6, 7])
def test_truncation_everywhere(version: int) -> None:
    """Any prefix: an error, or fewer records and (inside the data) a gap; never more, never another exception."""
    w = Writer(version=version)
    data = w.file(busy(w))
    step = max(1, len(data) // 150)
    for size in range(0, len(data), step):
        try:
            reader, chunks, _ = read(data[:size])
        except RecordingError:
            continue
        assert sum(reader.counts.values()) <= 9
        severities = {note.severity for chunk in chunks for note in chunk.notes}
        if sum(reader.counts.values()) < 9:
            assert "error" in severities or "warn" in severities


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 1 << 32), st.sampled_from(VARIANTS[:8:2] + VARIANTS[8::4]), st.integers(1, 30))
def test_noise(seed: int, writer: Writer, flips: int) -> None:
    """Random bytes anywhere: RecordingError or tables that are valid Arrow."""
    data = bytearray(writer.file(busy(writer)))
    chance = random.Random(seed)
    for _ in range(flips):
        data[chance.randrange(len(data))] = chance.choice((0, 255, chance.randrange(256)))
    try:
        read(bytes(data))
    except RecordingError:
        return


def test_absurd_numbers() -> None:
    """Huge counts, sizes and offsets and a circular chain of options cost nothing and raise nothing else."""
    w = Writer()
    data = w.file(busy(w))
    chain = data.index(w.pack("HIQ", 0, 8, 0)) + 6
    start = 10 + 2 + 2 + 4 + 5 + 2
    first = struct.unpack_from("<Q", data, start)[0]
    circle = data[:chain] + w.pack("Q", first) + data[chain + 8 :]
    _, chunks, tables = read(circle)
    assert tables["tick"].num_rows == 9
    assert "tracedat-section" in {note.code for chunk in chunks for note in chunk.notes}
    for at in range(0, len(data) - 8, 4):
        for value in (b"\xff" * 8, b"\xff\xff\xff\x7f" + bytes(4)):
            try:
                TraceDatReader(io.BytesIO(data[:at] + value + data[at + 8 :]), ReadOptions())
            except RecordingError:
                continue
        if at > 3000:
            break


def test_compression_bomb_is_refused() -> None:
    """A chunk that claims far more than its bytes can hold ends that CPU's data with a gap."""
    w = Writer(method="zstd")
    page = w.ring(1, w.record(0, w.event(1)))
    data = w.file({0: page})
    at = data.index(w.pack("II", len(w.compress(page)), len(page))) + 4
    reader, chunks, _ = read(data[:at] + w.pack("I", 1 << 30) + data[at + 4 :])
    assert not reader.counts
    assert any(gap.reason == "damaged" for chunk in chunks for gap in chunk.gaps)
