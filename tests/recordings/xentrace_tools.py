"""Writes small xentrace streams and reads them back; a decoder in plain Python to compare with."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from parsers.recording import Gap, Note, ReadOptions
from parsers.xentrace.reader import XentraceReader

__all__ = ["Result", "hop_file", "id_counts", "read", "record", "window"]

CPU_CHANGE = 0x1F003


def record(event: int, words: tuple[int, ...] | list[int] = (), tsc: int | None = None) -> bytes:
    """One record; stamped if `tsc` is given."""
    head = event | len(words) << 28 | (0 if tsc is None else 1 << 31)
    stamp = b"" if tsc is None else struct.pack("<Q", tsc)
    return struct.pack("<I", head) + stamp + struct.pack(f"<{len(words)}I", *(word & 0xFFFFFFFF for word in words))


def window(cpu: int, *records: bytes) -> bytes:
    """A collector's window with these records."""
    payload = b"".join(records)
    return struct.pack("<III", 0x2001F003, cpu, len(payload)) + payload


@dataclass
class Result:
    reader: XentraceReader
    tables: dict[str, pa.Table]
    gaps: list[Gap]
    notes: list[Note]

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Rows of a table without nulls' columns being dropped; none if the table is absent."""
        return self.tables[name].to_pylist() if name in self.tables else []

    def ordered(self) -> list[dict[str, Any]]:
        """All rows of all tables by `seq`, with the table's name."""
        rows = [{"table": name, **row} for name in self.tables for row in self.rows(name)]
        return sorted(rows, key=lambda row: row["seq"])


def read(data: bytes | Path, *, batch_words: int = 3 << 20, **options: Any) -> Result:
    """Reads a whole recording; also checks what must hold for every recording."""
    raw = data.read_bytes() if isinstance(data, Path) else data
    reader = XentraceReader(io.BytesIO(raw), ReadOptions(**options), batch_words=batch_words)
    parts: dict[str, list[pa.Table]] = {}
    gaps: list[Gap] = []
    notes: list[Note] = []
    next_seq = 0
    for chunk in reader.chunks():
        seqs: list[int] = []
        for name, table in chunk.tables.items():
            assert table.schema.equals(reader.tables[name].schema(), check_metadata=True), name
            table.validate(full=True)
            seqs += table["seq"].to_pylist()
            parts.setdefault(name, []).append(table)
        assert sorted(seqs) == list(range(next_seq, next_seq + len(seqs)))
        next_seq += len(seqs)
        gaps += chunk.gaps
        notes += chunk.notes
    account = reader.accounting
    assert account.parsed + account.skipped == account.total == len(raw)
    tables = {name: pa.concat_tables(many) for name, many in parts.items()}
    assert reader.counts == {name: len(table) for name, table in tables.items()}
    codes = {code.code for code in reader.note_codes}
    assert {note.code for note in notes} <= codes
    return Result(reader, tables, gaps, notes)


def hop_file(raw: bytes) -> Iterator[tuple[int, int, int, int | None, tuple[int, ...]]]:
    """(offset, cpu, event, tsc, words) of every record of an undamaged stream, in file order."""
    at, end, cpu = 0, 0, -1
    while at < len(raw):
        head, *_ = struct.unpack_from("<I", raw, at)
        event, extra, stamped = head & 0x0FFFFFFF, head >> 28 & 7, head >> 31
        if at == end:
            assert event == CPU_CHANGE
            cpu, size = struct.unpack_from("<II", raw, at + 4)
            end = at + 12 + size
        tsc = struct.unpack_from("<Q", raw, at + 4)[0] if stamped else None
        start = at + 4 + 8 * stamped
        yield at, cpu, event, tsc, struct.unpack_from(f"<{extra}I", raw, start)
        at = start + 4 * extra


def id_counts(path: Path) -> dict[int, int]:
    """Records per event id from a counts file."""
    found = re.findall(r"^  (0x[0-9a-f]{8}) +(\d+)", path.read_text(), re.M)
    return {int(event, 16): int(count) for event, count in found}
