"""Which event a record is, and its table: declared event formats in, Arrow tables out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from parsers.ftrace.arrays import Array, binary, dictionary, nulls, plain
from parsers.ftrace.columns import FAULT, FTRACE_COMMON, escape, ftrace_schema
from parsers.recording import Note, ReadOptions
from parsers.tables import Column, Table
from parsers.tracedat.decode import Batch, Block, column, numbers
from parsers.tracedat.formats import PROBED, EventFormat, EventText
from parsers.tracedat.header import Head, note
from parsers.tracedat.layout import Limit
from parsers.tracedat.symbols import Symbols

__all__ = ["RAW", "Events"]

#: Records that no declared event explains.
RAW = Table(
    "ftrace_raw",
    "records whose event is not declared in the file, or that are shorter than it says",
    (*FTRACE_COMMON, Column("event_id", pa.uint16(), "common_type"), Column("payload", pa.binary(), "the record")),
)

COMM = pa.dictionary(pa.int32(), pa.string())
FLAG_FIELDS = (("flags", pa.uint8()), ("preempt", pa.uint8()))


class Events:
    """The file's events by index; index 0 stands for records that none of them explains."""

    def __init__(self, head: Head, options: ReadOptions) -> None:
        self._only = options.only
        self.tables: dict[str, Table] = {RAW.name: RAW}
        self.counts: dict[str, int] = {}
        self._symbols = Symbols(head.symbols, head.word)
        self._unknown: Counter[int] = Counter()
        self._short: Counter[str] = Counter()
        unique = {event.ident: event for event in reversed(head.formats)}
        self._formats = [event for event in head.formats if unique[event.ident] is event]
        homonyms = Counter(event.name for event in self._formats)
        homonyms[RAW.name] += 1
        self._names = [
            event.name if homonyms[event.name] == 1 else f"{event.system}:{event.name}" for event in self._formats
        ]
        self._index = np.zeros(1 << 16, dtype=np.uint16)
        self._least = np.zeros(len(self._formats) + 1, dtype=np.int64)
        for number, event in enumerate(self._formats[: (1 << 16) - 1], start=1):
            self._index[event.ident] = number
        self._layouts: dict[int, EventFormat] = {}
        self._beyond: dict[int, str] = {}  # declared events without a table by id, as there are too many
        self._beyond_records = 0
        self._seen = np.zeros(1 << 16, dtype=bool)
        self._broken: list[Note] = []
        parsed = (event.parse() for event in self._formats)
        typed = next((event.common["type"] for event in parsed if event and "type" in event.common), None)
        self._type_at = typed.offset if typed and typed.size == 2 else 0
        self._pids = np.array(sorted({0, *head.comms}), dtype=np.int64)
        idle = {0: b"<idle>"}
        comms = {**head.comms, **idle}
        self._comms = pa.array([*(escape(comms[pid]) for pid in self._pids.tolist()), "<...>"], pa.string())
        # pids are small, so a table of all of them finds a name without a search
        top = int(self._pids[-1])
        self._slot_of = np.full(top + 2 if top < 1 << 22 else 0, len(self._pids), dtype=np.int32)
        if self._slot_of.size:
            self._slot_of[self._pids] = np.arange(len(self._pids))
        self._schemas: dict[str, pa.Schema] = {}
        self._tgids = head.tgids
        self._tgid_keys = np.array(sorted(head.tgids), dtype=np.int64)
        self._tgid_values = np.array([head.tgids[pid] for pid in self._tgid_keys.tolist()], dtype=np.int32)

    def identify(self, batch: Batch, start: Array, size: Array) -> Array:
        """Event index of each record; 0 for unknown ids and for records too short for their event."""
        long_enough = size >= self._type_at + 2
        ident = numbers(batch, np.where(long_enough, start, start[0]) + self._type_at, 2)
        self._parse(ident)
        index = np.where(long_enough, self._index[ident], 0)
        short = np.flatnonzero(size < self._least[index])
        if short.size:
            for number, count in zip(*np.unique(index[short], return_counts=True), strict=True):
                self._short[self._names[int(number) - 1]] += int(count)
            index[short] = 0
        return index.astype(np.uint16)

    def wanted(self, event: Array) -> Array:
        """Which records `only` asks for; of several events of one name all are."""
        kept = np.array([False, *(event.name in self._only or name in self._only for event, name in self._pairs())])
        return np.asarray(kept[event])

    def _pairs(self) -> Iterator[tuple[EventText, str]]:
        return zip(self._formats, self._names, strict=True)

    def _parse(self, idents: Array) -> None:
        """Parse the formats of events that occur for the first time; a broken one declares nothing."""
        present = np.bincount(idents, minlength=1 << 16) > 0
        for ident in np.flatnonzero(present & ~self._seen).tolist():
            number = int(self._index[ident])
            if not number:
                continue
            declared = self._formats[number - 1]
            if len(self._layouts) >= Limit.EVENTS:
                self._index[ident], self._beyond[ident] = 0, self._names[number - 1]
                continue
            layout = declared.parse()
            if layout is None:
                self._index[ident] = 0
                text = f"{declared.system}: {declared.text[:60]!r}"
                self._broken.append(note("tracedat-formats", text, declared.offset))
            else:
                self._layouts[number], self._least[number] = layout, layout.least
        self._seen |= present

    def tables_of(
        self, batch: Batch, event: Array, start: Array, size: Array, common: list[pa.Array], buffer: pa.Array
    ) -> dict[str, pa.Table]:
        """Tables of records that are sorted by `event`; `common` are the columns of COMMON for all of them."""
        tables: dict[str, pa.Table] = {}
        edges = np.flatnonzero(np.diff(event.astype(np.int64), prepend=-1, append=-1)).tolist()
        usual = next((layout for layout in self._layouts.values() if _extent(layout) <= Batch.SPARE), None)
        # nearly all events have the common fields in the same places: for those they are taken of all records at once
        tasks = self._task(Block(batch, start, size, _extent(usual)), usual) if usual is not None else []
        for begin, end in pairwise(edges):
            number = int(event[begin])
            rows = slice(begin, end)
            shared = [values.slice(begin, end - begin) for values in (*common, buffer)]
            if number == 0:
                name, own = RAW.name, self._raw(batch, start[rows], size[rows])
            else:
                layout, name = self._layouts[number], self._names[number - 1]
                if name not in self.tables:
                    self.tables[name] = layout.table(name)
                block = Block(batch, start[rows], size[rows], layout.least)
                if usual is not None and layout.common == usual.common:
                    own = [values.slice(begin, end - begin) for values in tasks]
                else:
                    own = self._task(block, layout)
                own += [column(block, field) for field in layout.fields]
                if layout.is_probe:
                    own = self._faults(block, layout, own)
                for field in layout.symbolic:
                    addresses = block.numbers(field.offset, field.size)
                    own.append(self._symbols.column(addresses, around=PROBED.get(field.name, False)))
                self.counts[name] = self.counts.get(name, 0) + end - begin
            columns = shared[:-1] + own[: len(FTRACE_COMMON) - 1] + shared[-1:] + own[len(FTRACE_COMMON) - 1 :]
            tables[name] = pa.Table.from_arrays(columns, schema=self._schema(name))
        return tables

    @staticmethod
    def _faults(block: Block, layout: EventFormat, own: list[pa.Array]) -> list[pa.Array]:
        """A probe's string of no bytes, not even a NUL, or of the word that newer kernels store, was not readable."""
        before = len(own) - len(layout.fields)
        for number, field in enumerate(layout.fields, start=before):
            if field.kind == "string" and field.place != "fixed":
                size = pa.array(block.numbers(field.offset, 4) >> np.uint32(16))
                fault = pc.or_(pc.equal(size, 0), pc.equal(own[number], FAULT))
                own[number] = pc.if_else(fault, pa.scalar(None, pa.string()), own[number])
        return own

    def _schema(self, name: str) -> pa.Schema:
        if name not in self._schemas:
            self._schemas[name] = ftrace_schema(self.tables[name])
        return self._schemas[name]

    def _slots(self, pid: Array) -> Array:
        """Index into `_comms` of each task; the last one for a pid without a name."""
        if self._slot_of.size:
            known = np.minimum(pid.view(np.uint32), self._slot_of.size - 1)
            return self._slot_of[known]
        slot = np.minimum(np.searchsorted(self._pids, pid), len(self._pids) - 1)
        return np.where(self._pids[slot] == pid, slot, len(self._pids))

    def _raw(self, batch: Batch, start: Array, size: Array) -> list[pa.Array]:
        long_enough = size >= self._type_at + 2
        at = np.where(long_enough, start, 0) + self._type_at
        ident = numbers(batch, at, 2)
        for value, count in zip(*np.unique(ident[long_enough], return_counts=True), strict=True):
            known = self._index[value]
            name = self._names[known - 1] if known else self._beyond.get(int(value), f"event_{value}")
            if int(value) in self._beyond:
                self._beyond_records += int(count)
            elif not known:
                self._unknown[int(value)] += int(count)
            self.counts[name] = self.counts.get(name, 0) + int(count)
        if not long_enough.all():
            missing = int((~long_enough).sum())
            self._short["(no event id)"] += missing
            self.counts["event_none"] = self.counts.get("event_none", 0) + missing
        empty = [nulls(field.type, start.size) for field in FTRACE_COMMON[:-1]]
        payload = binary(batch.data, start, size).cast(pa.binary())
        return [*empty, plain(pa.uint16(), ident, long_enough), payload]

    def _task(self, block: Block, layout: EventFormat) -> list[pa.Array]:
        """pid, comm, flags, preempt, tgid."""
        rows = len(block)
        columns = []
        field = layout.common.get("pid")
        pid = None
        if field is not None and field.size == 4:
            pid = block.numbers(field.offset, 4).view(np.int32)
            columns += [plain(pa.int32(), pid), dictionary(COMM, self._slots(pid), self._comms)]
        else:
            columns += [nulls(pa.int32(), rows), nulls(COMM, rows)]
        for key, kind in FLAG_FIELDS:
            field = layout.common.get(key)
            if field is not None and field.size == 1:
                columns.append(plain(kind, block.numbers(field.offset, 1)))
            else:
                columns.append(nulls(kind, rows))
        field = layout.common.get("tgid")
        if field is not None and field.size == 4:
            columns.append(plain(pa.int32(), block.numbers(field.offset, 4).view(np.int32)))
        elif pid is not None and self._tgid_keys.size:
            slot = np.minimum(np.searchsorted(self._tgid_keys, pid), self._tgid_keys.size - 1)
            columns.append(plain(pa.int32(), self._tgid_values[slot], self._tgid_keys[slot] == pid))
        else:
            columns.append(nulls(pa.int32(), rows))
        return columns

    def notes(self) -> list[Note]:
        """What `ftrace_raw` holds, in total."""
        unknown, short = self._unknown.most_common(20), self._short.most_common(20)
        found = [note("tracedat-unknown-event", f"event id {i}", count=count) for i, count in unknown]
        found += self._broken[: Limit.NOTES]
        if self._beyond_records:
            text = f"records of {len(self._beyond)} events beyond the first {int(Limit.EVENTS)}"
            found.append(note("tracedat-many-events", text, count=self._beyond_records))
        return found + [note("tracedat-short-record", name, count=count) for name, count in short]


def _extent(layout: EventFormat) -> int:
    """Bytes of a record up to the end of its common fields."""
    return max((field.offset + field.size for field in layout.common.values()), default=0)
