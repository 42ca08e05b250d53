"""Line-by-line readers of small text dumps: declared lines in, record tables out.

The dumps read here are kilobytes, so a line is matched with `re`; large console logs stay bounded because
rows are turned into Arrow tables batch by batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import pyarrow as pa

from parsers.lines import LineBatch, line_batches
from parsers.recording import Accounting, Chunk, ClockModel, Gap, Note, NoteCode, ReadOptions, RecordingError
from parsers.tables import Column, Table

__all__ = ["OTHER", "Field", "Row", "TextReader", "convert", "table"]

#: kind → (Arrow type, base of the text: 0 = a word, 1 = a flag shown as 0/1)
_KINDS: dict[str, tuple[pa.DataType, int]] = {
    **{f"u{n}": (getattr(pa, f"uint{n}")(), 10) for n in (8, 16, 32, 64)},
    **{f"i{n}": (getattr(pa, f"int{n}")(), 10) for n in (8, 16, 32, 64)},
    **{f"x{n}": (getattr(pa, f"uint{n}")(), 16) for n in (8, 16, 32, 64)},
    "flag": (pa.bool_(), 1),
    "s": (pa.string(), 0),
}
_LIMITS = {
    kind: (-(1 << int(kind[1:]) - 1) if kind[0] == "i" else 0, 1 << int(kind[1:]) - (kind[0] == "i"))
    for kind in _KINDS
    if kind[0] in "uix"
}

OTHER = Table(
    "other",
    "a line that belongs to no declared kind, kept as it is (cut at 4 KiB)",
    (Column("text", pa.string(), "the line"), Column("length", pa.uint64(), "bytes, line end included", "bytes")),
)


@dataclass(frozen=True, slots=True)
class Field:
    """A column of a dump's table: `kind` says how the text is read (`u32` decimal, `x8` hexadecimal, `flag`, `s`)."""

    name: str
    kind: str
    doc: str
    unit: str = ""


def table(name: str, doc: str, *fields: Field) -> tuple[Table, dict[str, str]]:
    """The record table and, for `convert`, the kind of each column. Every table starts with `snapshot`."""
    snapshot = Field("snapshot", "u32", "ordinal of the dump of this kind in the recording, from 0")
    columns = tuple(Column(f.name, _KINDS[f.kind][0], f.doc, f.unit) for f in (snapshot, *fields))
    return Table(name, doc, columns), {f.name: f.kind for f in fields}


def convert(kinds: Mapping[str, str], values: Mapping[str, str | None]) -> dict[str, Any]:
    """Typed values of a line; `ValueError` when a number does not fit its column."""
    out: dict[str, Any] = {}
    for name, text in values.items():
        kind = kinds.get(name)
        if kind is None:
            continue
        if text is None or kind == "s":
            out[name] = text
            continue
        if kind == "flag":
            out[name] = bool(int(text, 16))
            continue
        number = int(text.strip(), _KINDS[kind][1])
        low, high = _LIMITS[kind]
        if not low <= number < high:
            raise ValueError(f"{name} = {text}")
        out[name] = number
    return out


@dataclass(slots=True)
class Row:
    """A row made from a line: its table, its columns, the CPU it speaks of, and how many lines back it began."""

    table: str
    values: dict[str, Any]
    cpu: int | None = None
    line: int | None = None  # number of the line the row belongs to, when not the current one
    tsc: int | None = None
    at: int = 0  # the last stamp seen when the row was made


_CUT = NoteCode("dump-cut", "warn", "the recording ends in the middle of a line")
_OTHER = NoteCode("dump-other", "info", "lines that belong to no declared kind: kept in `other`")
_LONG = NoteCode("dump-long-line", "warn", "a line too long to be part of a dump: its head is kept in `other`")


class TextReader:
    """Base of the readers of snapshots: `line()` turns one line into rows, `finish()` gives rows still open.

    A reader declares `TABLES` (name → table and kinds) and `RECOGNISE`, a pattern of which the head must hold a match.
    `seq` counts lines (a row begun in the chunk before has the first of this one); several rows made from one line
    share its `seq`. Lines without rows are kept in `other`.
    """

    format: ClassVar[str] = ""
    note_codes: ClassVar[tuple[NoteCode, ...]] = (_CUT, _OTHER, _LONG)
    TABLES: ClassVar[dict[str, tuple[Table, dict[str, str]]]] = {}
    #: Bytes of the longest line that is matched; longer ones are kept in `other`. Bounds the time a pattern can take.
    LINE_BYTES: ClassVar[int] = 1024
    RECOGNISE: ClassVar[re.Pattern[bytes]] = re.compile(rb"(?!)")

    @classmethod
    def sniff(cls, head: bytes) -> bool:
        """Whether the head holds a line that only this format has."""
        return cls.RECOGNISE.search(head) is not None

    def __init__(self, stream: BinaryIO, options: ReadOptions) -> None:
        self.tables: dict[str, Table] = {**{name: t for name, (t, _) in self.TABLES.items()}, OTHER.name: OTHER}
        self.clock = ClockModel("none", None, 0, "ticks", "none", doc="a snapshot has no stamps: t_ns counts lines")
        self.accounting = Accounting()
        self.counts: dict[str, int] = {}
        self._stream = stream
        self._source = options.source
        self._line = 0
        self._first_line = 1
        stream.seek(0)
        head = stream.read(1 << 20)
        if not self.RECOGNISE.search(head):
            raise RecordingError(f"no line of {self.format} in the first {len(head)} bytes")
        self.start(head)

    def start(self, head: bytes) -> None:
        """Looks at the first MiB before anything is read: the clock has to be final then."""

    def line(self, text: str) -> list[Row]:
        """Rows of one line; empty, or ValueError, when it is of no declared kind."""
        raise NotImplementedError

    def last_stamp(self) -> int:
        """The last raw stamp met, for the lines that have none."""
        return 0

    def finish(self) -> list[Row]:
        """Rows that were still being put together when the recording ended."""
        return []

    def chunks(self) -> Iterator[Chunk]:
        """The recording in batches of lines."""
        self._stream.seek(0)
        batches = line_batches(self._stream, 1 << 20)
        batch = next(batches, None)
        while batch is not None:
            following = next(batches, None)
            yield self._chunk(batch, last=following is None)
            batch = following

    def _chunk(self, batch: LineBatch, *, last: bool) -> Chunk:
        rows: dict[str, list[Row]] = {}
        self._first_line = batch.first_line
        lengths = batch.byte_lengths().tolist()
        notes: list[Note] = []
        skipped = others = 0
        for index, text in enumerate(batch.text.to_list()):
            self._line = batch.first_line + index
            cut = batch.unterminated and last and index == len(lengths) - 1  # a number at its end may be shorter
            try:
                made = self.line(text) if lengths[index] <= self.LINE_BYTES and not cut else []
            except ValueError:
                made = []
            if not made:
                made = [Row(OTHER.name, {"text": batch.raw(index), "length": lengths[index]})]
                skipped += lengths[index]
                others += 1
                if lengths[index] > self.LINE_BYTES:
                    notes.append(self._note(_LONG, f"line {self._line}", batch.offset + int(batch.starts[index])))
            for row in made:
                row.line = row.line or self._line
                row.at = self.last_stamp()
                rows.setdefault(row.table, []).append(row)
        if last:
            for row in self.finish():
                row.line = row.line or self._line
                rows.setdefault(row.table, []).append(row)
        if others:
            notes.append(self._note(_OTHER, f"{others} lines", batch.offset, others))
        gaps: list[Gap] = []
        if batch.unterminated and last:
            offset = batch.offset + int(batch.starts[-1])
            notes.append(self._note(_CUT, "the last line has no line end", offset))
            gaps.append(Gap("truncated", None, None, None, offset, int(lengths[-1]), text="ends inside a line"))
        self.accounting.total += batch.size
        self.accounting.skipped += skipped
        self.accounting.parsed += batch.size - skipped
        return Chunk({name: self._table(name, made) for name, made in rows.items()}, gaps, notes, self.accounting.total)

    def _note(self, code: NoteCode, text: str, offset: int, count: int = 1) -> Note:
        return Note(code.code, code.severity, text, offset, count=count)

    def _table(self, name: str, rows: list[Row]) -> pa.Table:
        rows.sort(key=lambda row: row.line or 0)
        self.counts[name] = self.counts.get(name, 0) + len(rows)
        # A row that is put together over lines may have begun in the chunk before: `seq` still grows.
        seq = [max(row.line or 1, self._first_line) - 1 for row in rows]
        hz = self.clock.hz
        times = [self._time(row) for row in rows] if hz else seq
        columns: dict[str, Any] = {
            "seq": seq,
            "t_ns": times,
            "t_err_ns": [(self.STAMP_ERROR if row.tsc is not None else None) if hz else 0 for row in rows],
            "tsc": [row.tsc for row in rows],
            "cpu": [row.cpu if row.cpu is not None and row.cpu <= 0xFFFF else None for row in rows],
            "source": pa.DictionaryArray.from_arrays(pa.array([0] * len(rows), pa.int16()), pa.array([self._source])),
            "offset": [row.line or 1 for row in rows],
        }
        for column in self.tables[name].columns:
            columns[column.name] = pa.array([row.values.get(column.name) for row in rows], column.type)
        return pa.Table.from_pydict(columns, schema=self.tables[name].schema())

    #: Resolution of the stamps in ns.
    STAMP_ERROR: ClassVar[int] = 0

    def _time(self, row: Row) -> int:
        raise NotImplementedError
