"""Reader of QEMU device-trace logs (`-trace events=… -msg timestamp=on -D LOG`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from parsers.lines import BATCH_BYTES, LineBatch, line_batches
from parsers.qemu.events import CPU_NAMING, EVENTS, GENERIC, UNPARSED, Event
from parsers.qemu.registers import DECODERS, decode
from parsers.qemu.regtables import REGISTER_TABLES
from parsers.qemu.threads import ThreadMap
from parsers.recording import Accounting, Chunk, ClockModel, Gap, Note, NoteCode, ReadOptions, RecordingError
from parsers.tables import Table

__all__ = ["QemuReader"]

_STAMPED = re.compile(rb"^\d{1,10}@([0-8]?\d{9})\.(\d{6}):[a-z][a-z0-9_]*(?: |\r?$)", re.M)
_BARE = re.compile(rb"^(?:" + b"|".join(name.encode() for name in EVENTS) + rb") ", re.M)
_PREFIX = (
    r"^(?:(?P<tid>\d{1,10})@(?P<sec>[0-8]?\d{9})\.(?P<us>\d{6}):)?"
    r"(?P<event>[a-z][a-z0-9_]{0,63})(?: (?P<args>.*))?$"
)
_HEAD = 1 << 20
#: A wall clock that goes back by more than this was set by somebody; less is two threads racing for the log.
_STEP_US = 1_000_000
#: Times are held below this, so that noise that looks like stamps cannot overflow t_ns.
_LIMIT_US = 9_000_000_000_000_000

I64 = npt.NDArray[np.int64]

_CODES = {
    note.code: note
    for note in (
        NoteCode(
            "qemu-unparsed",
            "warn",
            "a line that is no trace line, or whose arguments do not fit its event: kept in `unparsed`",
        ),
        NoteCode("qemu-cut", "warn", "the log ends in the middle of a line: kept in `unparsed`"),
        NoteCode("qemu-long-line", "warn", "a line too long to be a trace line: its head is kept"),
        NoteCode(
            "qemu-stamp-back",
            "info",
            "a stamp is earlier than the line before it (threads race for the log): t_ns is held",
        ),
        NoteCode(
            "qemu-clock-step",
            "warn",
            "the wall clock was set back while recording: t_ns goes on from where it was",
        ),
        NoteCode(
            "qemu-stamp-wild",
            "warn",
            "a single stamp far ahead of its neighbours is not believed: t_ns of the line before",
        ),
        NoteCode("qemu-no-stamps", "warn", "the log has no stamps (`-msg timestamp=on`): t_ns counts lines"),
        NoteCode(
            "qemu-shared-thread",
            "info",
            "one thread runs several CPUs: `cpu` is the one its lines named last",
        ),
        NoteCode("qemu-undeclared", "info", "events without a declaration: kept as text in `qemu_event`"),
    )
}

#: So many events are counted by name (QEMU 10 declares about 3500); lines of further ones are counted as `OTHERS`.
MAX_NAMES = 8192
OTHERS = "(other events)"


class QemuReader:
    """A QEMU device-trace log. See `parsers.recording.Reader` for the protocol.

    One table per declared event, decoded register tables beside them (same `seq` as their line), `qemu_event` for
    undeclared events, `unparsed` for the rest. `seq` is the line order, which is authoritative; `tsc` is the stamp
    in microseconds. `cpu` is the virtual machine's CPU that runs the writing thread: null for device
    threads, and for lines megabytes before a thread first named its CPU.
    """

    format: ClassVar[str] = "qemu"
    note_codes: ClassVar[tuple[NoteCode, ...]] = tuple(_CODES.values())

    @staticmethod
    def sniff(head: bytes) -> bool:
        """Whether a line with QEMU's prefix, or (without stamps) two lines of declared events, are in the head."""
        return _STAMPED.search(head) is not None or len(_BARE.findall(head)) > 1

    def __init__(self, stream: BinaryIO, options: ReadOptions) -> None:
        self.tables: dict[str, Table] = {
            **{name: event.table for name, event in EVENTS.items()},
            **REGISTER_TABLES,
            GENERIC.name: GENERIC,
            UNPARSED.name: UNPARSED,
        }
        self.accounting = Accounting()
        self.counts: dict[str, int] = {}
        self._stream = stream
        self._source = options.source
        self._threads = ThreadMap()
        stream.seek(0)
        head = stream.read(_HEAD)
        stamp = _STAMPED.search(head)
        if stamp is None and not _BARE.search(head):
            raise RecordingError(f"no QEMU trace line (`tid@sec.usec:event …`) in the first {len(head)} bytes")
        self._us0: int | None = None
        if stamp is not None:
            self._us0 = int(stamp[1]) * 1_000_000 + int(stamp[2])
            self.clock = ClockModel(
                "us", 1e6, self._us0, "ns", "host wall clock", doc="stamps in microseconds; line order rules"
            )
        else:
            self.clock = ClockModel("none", None, 0, "ticks", "none", doc="no stamps in the log: t_ns counts lines")
        self._time = self._us0 or 0  # last t, in stamp microseconds
        self._step = 0  # added to stamps after the clock was set back

    def chunks(self) -> Iterator[Chunk]:
        """The log in batches of lines."""
        self._stream.seek(0)
        first = True
        for batch in line_batches(self._stream, BATCH_BYTES):
            chunk = self._chunk(batch)
            if first and self._us0 is None:
                chunk.notes.append(_note("qemu-no-stamps", "the log has no stamps; record with -msg timestamp=on"))
            first = False
            yield chunk

    def _chunk(self, batch: LineBatch) -> Chunk:
        lines = pl.DataFrame({"row": np.arange(len(batch), dtype=np.int64), "line": batch.text})
        lines = lines.with_columns(pl.col("line").str.extract_groups(_PREFIX)).unnest("line")
        stamp = pl.col("sec").cast(pl.Int64, strict=False) * 1_000_000 + pl.col("us").cast(pl.Int64, strict=False)
        lines = lines.with_columns(
            pl.col("tid").cast(pl.UInt32, strict=False),
            pl.when(pl.Series(batch.dirty)).then(None).otherwise(pl.col("event")).alias("event"),
            stamp.alias("stamp"),
        )
        if self._us0 is not None:  # in a log with stamps, a line without one is something else's output
            lines = lines.with_columns(pl.when(pl.col("stamp").is_not_null()).then(pl.col("event")).alias("event"))
        lines_named = lines.drop_nulls("event")
        declared = pl.col("event").is_in(list(EVENTS))
        parsed = np.zeros(len(batch), np.bool_)
        named = np.full(len(batch), -1, np.int64)
        typed: dict[str, pl.DataFrame] = {}
        for (key,), group in lines_named.filter(declared).partition_by("event", as_dict=True).items():
            name = str(key)
            part = _arguments(EVENTS[name], group)
            if not part.height:
                continue
            typed[name] = part
            self.counts[name] = self.counts.get(name, 0) + part.height
            if name in CPU_NAMING:
                named[part["row"].to_numpy()] = part[CPU_NAMING[name]].cast(pl.Int64).to_numpy()
            parsed[part["row"].to_numpy()] = True
        # all of the others at once: a hostile log has a new name in every line
        unknown = lines_named.filter(~declared & (pl.col("args").is_not_null() | pl.col("stamp").is_not_null()))
        parsed[unknown["row"].to_numpy()] = True
        self._count_others(unknown["event"])

        notes: list[Note] = []
        cpu = self._threads.assign(np.where(parsed, lines["tid"].fill_null(-1).to_numpy().astype(np.int64), -1), named)
        for tid in self._threads.take_new_shared():
            notes.append(_note("qemu-shared-thread", f"thread {tid} runs several CPUs", batch.offset))
        stamps = lines["stamp"].fill_null(-1).to_numpy().copy()
        stamps[~parsed] = -1
        common = self._common(batch, stamps, cpu, notes)
        tables: dict[str, pa.Table] = {}
        for name, part in typed.items():
            tables[name] = _table(EVENTS[name].table, part, common)
        if unknown.height:
            tables[GENERIC.name] = _table(GENERIC, unknown, common)
            text = f"{unknown.height} lines of {unknown['event'].n_unique()} undeclared events"
            notes.append(_note("qemu-undeclared", text, batch.offset, unknown.height))
        bad = np.flatnonzero(~parsed)
        if len(bad):
            tables[UNPARSED.name] = self._unparsed(batch, bad, common, notes)
        for event_name, table_name, decoder in DECODERS:
            if event_name in tables:
                rows = decode(REGISTER_TABLES[table_name], decoder, tables[event_name])
                if rows is not None:
                    before = tables.get(table_name)
                    tables[table_name] = rows if before is None else pa.concat_tables([before, rows]).sort_by("seq")
        gaps = self._account(batch, parsed, notes)
        return Chunk(tables, gaps, notes, self.accounting.total)

    def _count_others(self, events: pl.Series) -> None:
        """Count lines of undeclared events, by name up to MAX_NAMES different ones."""
        for name, count in events.value_counts(sort=False).sort(events.name).iter_rows():
            if name not in self.counts and len(self.counts) >= MAX_NAMES:
                name = OTHERS
            self.counts[name] = self.counts.get(name, 0) + count

    def _common(self, batch: LineBatch, stamps: I64, cpu: I64, notes: list[Note]) -> pa.Table:
        count = len(batch)
        seq = np.arange(batch.first_line - 1, batch.first_line - 1 + count, dtype=np.uint64)
        if self._us0 is None:
            t_ns: I64 = seq.astype(np.int64)
            error = pa.array(np.zeros(count, np.uint32))
        else:
            t_ns = self._times(batch, stamps, notes)
            # A line without a stamp came somewhere after the one before it: no bound is known.
            error = pa.array(np.full(count, 999, np.uint32), mask=stamps < 0)
        source = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int16)), pa.array([self._source]))
        return pa.table(
            {
                "seq": seq,
                "t_ns": t_ns,
                "t_err_ns": error,
                "tsc": pa.array(np.maximum(stamps, 0).astype(np.uint64), mask=stamps < 0),
                "cpu": pa.array(np.clip(cpu, 0, 0xFFFF).astype(np.uint16), mask=(cpu < 0) | (cpu > 0xFFFF)),
                "source": source,
                "offset": seq + np.uint64(1),
            }
        )

    def _times(self, batch: LineBatch, stamps: I64, notes: list[Note]) -> I64:
        """Monotone t_ns of every line; lines without a stamp take that of the line before."""
        at = np.flatnonzero(stamps >= 0)
        line0 = batch.first_line
        out = np.full(len(stamps), self._time, np.int64)
        if len(at):
            raw = stamps[at] + self._step
            delta = np.diff(raw, prepend=self._time)
            after = np.append(delta[1:], 0)
            wild = (delta > _STEP_US) & (after < -_STEP_US)
            if wild.any():
                notes.append(_note("qemu-stamp-wild", f"line {line0 + at[wild][0]}", batch.offset, int(wild.sum())))
                at, raw = at[~wild], raw[~wild]
                delta = np.diff(raw, prepend=self._time)
            steps = np.where(delta < -_STEP_US, -delta, 0)
            if steps.any():
                where = np.flatnonzero(steps)
                text = f"line {line0 + at[where[0]]}: back by {steps[where[0]]} us"
                notes.append(_note("qemu-clock-step", text, batch.offset, len(where)))
                moved = np.minimum(np.cumsum(steps.astype(np.float64)), float(_LIMIT_US)).astype(np.int64)
                raw = raw + moved
                self._step = min(self._step + int(moved[-1]), _LIMIT_US)
            held = np.maximum.accumulate(np.maximum(raw, self._time)) if len(raw) else raw
            back = int((np.diff(raw, prepend=raw[:1]) < 0).sum())
            if back:
                first = int(np.flatnonzero(np.diff(raw, prepend=raw[:1]) < 0)[0])
                notes.append(_note("qemu-stamp-back", f"first at line {line0 + at[first]}", batch.offset, back))
            if len(at):
                index = np.searchsorted(at, np.arange(len(stamps)), side="right") - 1
                out = np.where(index >= 0, held[np.maximum(index, 0)], self._time)
                self._time = int(held[-1])
        return np.minimum(out - (self._us0 or 0), _LIMIT_US) * 1000

    def _unparsed(self, batch: LineBatch, bad: I64, common: pa.Table, notes: list[Note]) -> pa.Table:
        lengths = batch.byte_lengths()[bad]
        rows = pl.DataFrame({"row": bad, "text": [batch.raw(int(i)) for i in bad], "length": lengths})
        text = f"line {batch.first_line + int(bad[0])}: {batch.raw(int(bad[0]))[:80]!r}"
        notes.append(_note("qemu-unparsed", text, batch.offset + int(batch.starts[bad[0]]), len(bad)))
        long = bad[batch.dirty[bad] & (lengths > 1 << 16)]
        if len(long):
            notes.append(
                _note(
                    "qemu-long-line",
                    f"line {batch.first_line + int(long[0])}",
                    batch.offset + int(batch.starts[long[0]]),
                    len(long),
                )
            )
        return _table(UNPARSED, rows, common)

    def _account(self, batch: LineBatch, parsed: npt.NDArray[np.bool_], notes: list[Note]) -> list[Gap]:
        lengths = batch.byte_lengths()
        good = int(lengths[parsed].sum())
        self.accounting.total += batch.size
        self.accounting.parsed += good
        self.accounting.skipped += batch.size - good
        if not batch.unterminated:
            return []
        offset = batch.offset + int(batch.starts[-1])
        notes.append(_note("qemu-cut", "the last line is cut", offset))
        stop = self._time if self._us0 is not None else None
        return [
            Gap(
                "truncated",
                None,
                stop,
                None,
                offset,
                int(lengths[-1]),
                text="the log ends in the middle of a line",
            )
        ]


def _note(code: str, text: str, offset: int = 0, count: int = 1) -> Note:
    return Note(code, _CODES[code].severity, text, offset, count=count)


def _arguments(event: Event, part: pl.DataFrame) -> pl.DataFrame:
    """`row`, `tid` and the typed arguments of the lines that fit the event's declaration."""
    groups = part.select("row", "tid", pl.col("args").fill_null("").str.extract_groups(event.pattern)).unnest("args")
    casts: list[pl.Expr] = []
    required: list[pl.Expr] = []
    for name, code in event.fields:
        column = pl.col(name)
        if code[0] == "x":
            size: Any = getattr(pl, f"UInt{code[1:]}")
            column = column.str.slice(2).str.to_integer(base=16, strict=False, dtype=pl.UInt64).cast(size, strict=False)
        elif code[0] in "iu":
            size = getattr(pl, ("Int" if code[0] == "i" else "UInt") + code[1:])
            column = column.cast(size, strict=False)
        casts.append(column)
        if name not in event.optional:
            required.append(pl.col(name).is_not_null())
    return groups.with_columns(casts).filter(pl.all_horizontal(required))


def _table(table: Table, part: pl.DataFrame, common: pa.Table) -> pa.Table:
    schema = table.schema()
    rows = common.take(pa.array(part["row"].to_numpy()))
    columns = {field.name: rows.column(field.name) for field in schema if field.name in common.column_names}
    for column in table.columns:
        columns[column.name] = part[column.name].to_arrow().cast(column.type)
    return pa.Table.from_pydict(columns, schema=schema)
