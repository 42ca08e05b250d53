"""Records of a batch of text to Arrow tables: names and payloads out of the lines, common columns, typed fields."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array, constant, dictionary, nulls, plain
from parsers.ftrace.batch import Records, Scan, latest
from parsers.ftrace.columns import FTRACE_COMMON, escape, ftrace_schema
from parsers.ftrace.flags import decode_flags
from parsers.ftrace.layouts import BARE, Layout
from parsers.ftrace.notes import note
from parsers.ftrace.payload import MAX_TABLES, TEXT, Built, Payload, Payloads
from parsers.ftrace.rests import Rests, split
from parsers.ftrace.shapes import is_known
from parsers.recording import ClockModel, Note, ReadOptions
from parsers.tables import Column, Table

__all__ = ["MARKERS", "Builder"]

COMM = pa.dictionary(pa.int32(), pa.string())
SMALL = pa.dictionary(pa.int16(), pa.string())
STACK_COLUMNS = (
    *FTRACE_COMMON,
    Column("caller_sym", pa.list_(pa.string()), "innermost first"),
    Column("of_seq", pa.uint64(), "the record before on that CPU, to which the stack belongs"),
)
FIXED = {
    table.name: table
    for table in (
        TEXT,
        Table("kernel_stack", "kernel stack trace of the record before", STACK_COLUMNS),
        Table("user_stack", "user stack trace of the record before", STACK_COLUMNS),
        Table(
            "function",
            "function tracer: FUNCTION <-CALLER",
            (*FTRACE_COMMON, Column("ip_sym", pa.string(), "entered"), Column("parent_ip_sym", pa.string(), "caller")),
        ),
        Table(
            "funcgraph",
            "function_graph tracer: one printed line",
            (
                *FTRACE_COMMON,
                Column("duration_ns", pa.int64(), "of the call that ends here", "ns"),
                Column("depth", pa.uint16(), "nesting, from the indentation"),
                Column("call", pa.string(), "`f() {`, `f();`, `}` as printed"),
            ),
        ),
    )
}
#: Records whose text may hold newlines, so that stray lines after them are theirs.
MARKERS = frozenset({"tracing_mark_write", "print", "bprint", "bputs", "0"})
#: What the records of names beyond `payload.MAX_TABLES` are counted as; the table has each one's own name.
OTHERS = "(other events)"
#: A last line without end: what it says may be shorter than what was recorded, so it is no event.
CUT = "(cut)"


def _taken(columns: list[pa.Array], rows: Array) -> list[pa.Array]:
    """Some rows of all columns, in one call."""
    names = [str(number) for number in range(len(columns))]
    return list(pa.RecordBatch.from_arrays(columns, names=names).take(pa.array(rows)).columns)


class Builder:
    """Keeps the tables, counts and the running `seq` of one text recording."""

    def __init__(self, options: ReadOptions, layout: Layout) -> None:
        self.tables: dict[str, Table] = {}
        self.counts: dict[str, int] = {}
        self.first: int | None = None
        self.clock: ClockModel | None = None
        self._options, self._layout = options, layout
        self._payloads = Payloads(self.tables, report=layout.pads)
        self._schemas: dict[str, pa.Schema] = {}
        self._seq = 0
        self._as_text: Counter[str] = Counter()
        self._unstamped = 0
        self._last_seq: dict[int, int] = {}

    def notes(self) -> list[Note]:
        """What stayed text, and how many records had no stamp."""
        found = [note("ftrace-payload", name, count=count) for name, count in self._as_text.most_common(20)]
        if others := self.counts.get(OTHERS):
            text = f"records of event names beyond the first {MAX_TABLES} undeclared ones, counted as {OTHERS}"
            found.append(note("ftrace-many-events", text, count=others))
        if self._unstamped:
            found.append(note("ftrace-no-stamps", f"{self._unstamped} records", count=self._unstamped))
        return found

    def build(
        self,
        data: Array,
        text: bytearray,
        starts: Array,
        ends: Array,
        scan: Scan,
        sources: dict[int, bytes],
        line: int,
        kept: Array | None = None,
        cut: int = -1,
    ) -> tuple[dict[str, pa.Table], list[int]]:
        """Tables of a batch, and the rows of lines that belong to nothing.

        `line` is the number of the batch's first line; `kept` says which of its lines the rows are (None: all);
        `cut` is the row of a line without end.
        """
        records = scan.records
        if not records.row.size:
            return {}, scan.unknown
        rests = split(data, records, self._layout.pads)
        code = rests.code[rests.index]
        strays = scan.unknown
        if strays:
            added, of, strays = self._owners(scan, code, rests.names)
            alone = self._alone(text, starts, ends, strays)
            strays = [row for row in strays if row not in alone]
            if added.size or alone:
                records = self._with(records, added, of, starts, ends)
                records = self._with(records, np.array(sorted(alone), dtype=np.int64), None, starts, ends)
                continued = np.isin(records.row, added)
                rests = split(data, records, self._layout.pads)
                code = rests.code[rests.index]
                code[continued] = rests.number("(continued)")
        if records.graph.any():
            code[records.graph] = rests.number("funcgraph")
        if cut >= 0 and records.row[-1] == cut:
            code[-1] = rests.number(CUT)
        if self._options.only:
            wanted = np.isin(code, [n for n, name in enumerate(rests.names) if name in self._options.only])
            records, code, rests.index = records.chosen(wanted), code[wanted], rests.index[wanted]
            if not records.row.size:
                return {}, strays
        small = np.uint16 if len(rests.names) < 1 << 16 else np.int64
        order = np.argsort(code.astype(small), kind="stable")
        numbers = line + (records.row if kept is None else kept[records.row])
        common = self._common(scan, records, sources, numbers, order)
        tables = self._grouped(rests, code, order, common, records, scan, text, starts, ends)
        cpus, last = latest(records.cpu)
        self._last_seq.update(zip(cpus.tolist(), (self._seq + last).tolist(), strict=True))
        self._seq += records.row.size
        return tables, strays

    def _grouped(
        self,
        rests: Rests,
        code: Array,
        order: Array,
        common: list[pa.Array],
        records: Records,
        scan: Scan,
        text: bytearray,
        starts: Array,
        ends: Array,
    ) -> dict[str, pa.Table]:
        """One table for each event; `order` sorts the records by event."""
        # the different texts of an event lie side by side in `by_code`
        small = np.uint16 if len(rests.names) < 1 << 16 else np.int64
        by_code = np.argsort(rests.code.astype(small), kind="stable")
        lows = np.searchsorted(rests.code[by_code], np.arange(len(rests.names) + 1))
        place = np.empty(by_code.size, dtype=np.int64)
        place[by_code] = np.arange(by_code.size)
        place = place[rests.index[order]]
        tables: dict[str, pa.Table] = {}
        as_text: list[pa.Table] = []
        edges = np.flatnonzero(np.diff(code[order], prepend=-1, append=-1)).tolist()
        own = np.array([self._admits(rests.names[number]) for number in code[order[edges[:-1]]].tolist()])
        if not own.all():
            of_each = np.repeat(own, np.diff(edges))
            as_text.append(self._others(rests, common, code, order, np.flatnonzero(~of_each)))
            mine = np.flatnonzero(of_each)
            order, place, common = order[mine], place[mine], _taken(common, mine)
            edges = np.flatnonzero(np.diff(code[order], prepend=-1, append=-1)).tolist() if mine.size else []
        for begin, end in pairwise(edges):
            number = int(code[order[begin]])
            name = rests.names[number]
            self.counts[name] = self.counts.get(name, 0) + end - begin
            shared = [values.slice(begin, end - begin) for values in common]
            if name in FIXED and name != TEXT.name:
                group = Payload(rests.rows(rests.index[order[begin:end]], whole=name != "function"), rests.raw)
                tables[name] = self._fixed(name, shared, group, records, order[begin:end], scan, text, starts, ends)
                continue
            if name in ("(continued)", CUT):
                group = Payload(rests.rows(rests.index[order[begin:end]], whole=True), rests.raw)
                as_text.append(self._text(name, shared, group, np.arange(end - begin), np.arange(end - begin)))
                continue
            low = int(lows[number])
            group = Payload(rests.rows(by_code[low : int(lows[number + 1])]), rests.raw)
            local = place[begin:end] - low
            built, rest = self._payloads.decode(name, group) if name[0] != "(" else ([], np.arange(len(group)))
            if built:
                tables[name] = self._typed(name, shared, built, local, len(group))
            if rest.size:
                where = np.full(len(group), -1, dtype=np.int64)
                where[rest] = np.arange(rest.size)
                part = self._text(name, shared, group, rest, where[local])
                as_text.append(part)
                if name[0] != "(" and part.num_rows:  # none: only the text of a line that was cut
                    self._as_text[name] += part.num_rows
        if as_text:
            table = pa.concat_tables(as_text).unify_dictionaries()
            tables[TEXT.name] = table.take(np.argsort(table["seq"].to_numpy(), kind="stable")).combine_chunks()
        return tables

    def _admits(self, name: str) -> bool:
        """Whether records of this name are looked at on their own."""
        return name in FIXED or name[0] == "(" or name in self._options.only or self._payloads.admits(name)

    def _others(self, rests: Rests, common: list[pa.Array], code: Array, order: Array, rows: Array) -> pa.Table:
        """Records of names that are too many: all of them as text, each with its name."""
        numbers, slot = np.unique(code[order[rows]], return_inverse=True)
        names = pa.array([rests.names[number] for number in numbers.tolist()], pa.string())
        event = pa.DictionaryArray.from_arrays(plain(pa.int32(), slot.astype(np.int32)), names)
        texts = rests.index[order[rows]]
        payload = Payload(rests.rows(texts), rests.raw).strings(np.arange(rows.size)).cast(pa.string())
        self.counts[OTHERS] = self.counts.get(OTHERS, 0) + int(rows.size)
        return pa.Table.from_arrays([*_taken(common, rows), event, payload], schema=TEXT.schema())

    @staticmethod
    def _owners(scan: Scan, code: Array, names: list[str]) -> tuple[Array, Array, list[int]]:
        """Stray lines that directly follow a marker, the marker's index, and the other stray lines."""
        marker = [number for number, name in enumerate(names) if name in MARKERS]
        unknown = np.array(scan.unknown, dtype=np.int64)
        owner = np.searchsorted(scan.records.row, unknown) - 1
        belongs = (owner >= 0) & np.isin(code[np.maximum(owner, 0)], marker)
        return unknown[belongs], owner[belongs], unknown[~belongs].tolist()

    @staticmethod
    def _alone(text: bytearray, starts: Array, ends: Array, strays: list[int]) -> set[int]:
        """Stray lines that are an event without any context (`nocontext-info` was on for a while)."""
        found = set()
        for row in strays:
            match = BARE.fullmatch(text, int(starts[row]), int(ends[row]))
            if match is not None and is_known(match["name"], match["payload"]):
                found.add(row)
        return found

    @staticmethod
    def _with(records: Records, rows: Array, owner: Array | None, starts: Array, ends: Array) -> Records:
        """The records with lines `rows` among them: with their owners' columns, or (None) with none at all."""
        if not rows.size:
            return records
        merged = np.argsort(np.concatenate((records.row, rows)), kind="stable")
        own = {"row": rows, "rest": starts[rows], "end": ends[rows]}
        if owner is None:
            own |= {name: np.zeros(rows.size, dtype=np.int64) for name in ("stamp", "stamped", "graph")}
        fields = {}
        for name in Records.__slots__:
            values = getattr(records, name)
            more = own.get(name, np.full(rows.size, -1) if owner is None else values[owner])
            fields[name] = np.concatenate((values, more.astype(values.dtype)))[merged]
        return Records(**fields)

    def _common(
        self, scan: Scan, records: Records, sources: dict[int, bytes], numbers: Array, order: Array
    ) -> list[pa.Array]:
        """COMMON and ftrace's common columns, in `order`."""
        assert self.clock is not None or not records.stamped.any()
        rows = records.row.size
        stamped = records.stamped
        bare = int(rows - np.count_nonzero(stamped))
        self._unstamped += bare
        stamp = records.stamp[order]
        shown = stamped[order] if bare else None
        elapsed = stamp - np.int64(self.first or 0)
        clock = self.clock
        error = 0
        if clock is not None and clock.unit == "ns" and clock.hz:
            hz = round(clock.hz)
            if 10**9 % hz == 0:
                elapsed = elapsed * (10**9 // hz)
            else:
                elapsed = elapsed // hz * 10**9 + elapsed % hz * 10**9 // hz
            error = 0 if clock.kind == "tsc" else int(10**9 // hz) - 1
            error = error + 1 if self._layout.rounds and error else error
        names = [escape(raw.lstrip(b" ")) for raw in scan.comms]
        comms = {name: i for i, name in enumerate(dict.fromkeys(names))}
        slot = np.array([*(comms[name] for name in names), 0], dtype=np.int32)
        comm = records.comm[order]
        decoded = [decode_flags(raw.decode("latin-1")) for raw in scan.words]
        known = np.array([*(pair is not None for pair in decoded), False])
        flags = np.array([*((pair or (0, 0))[0] for pair in decoded), 0], dtype=np.uint8)
        preempt = np.array([*((pair or (0, 0))[1] for pair in decoded), 0], dtype=np.uint8)
        word = records.word[order]
        valid = known[word]
        buffers, buffer = [""], np.zeros(rows, dtype=np.int16)
        if sources:
            buffers += [name for name in dict.fromkeys(map(escape, sources.values())) if name]
            number = {name: i for i, name in enumerate(buffers)}
            for index in np.flatnonzero(np.isin(records.row, list(sources))).tolist():
                buffer[index] = number[escape(sources[int(records.row[index])])]
            buffer = buffer[order]
        pid, tgid, cpu = records.pid[order], records.tgid[order], records.cpu[order]
        return [
            plain(pa.uint64(), order.astype(np.uint64) + np.uint64(self._seq)),
            plain(pa.int64(), elapsed, shown),
            plain(pa.uint32(), np.full(rows, error, dtype=np.uint32), shown),
            plain(pa.uint64(), stamp.view(np.uint64), shown),
            plain(pa.uint16(), cpu.astype(np.uint16), cpu >= 0),
            constant(SMALL, self._options.source, rows),
            plain(pa.uint64(), numbers[order].astype(np.uint64)),
            plain(pa.int32(), pid.astype(np.int32), pid >= 0),
            dictionary(COMM, slot[comm], list(comms) or [""], comm >= 0),
            plain(pa.uint8(), flags[word], valid),
            plain(pa.uint8(), preempt[word], valid),
            plain(pa.int32(), tgid.astype(np.int32), tgid >= 0),
            dictionary(SMALL, buffer, buffers),
        ]

    def _typed(
        self, name: str, shared: list[pa.Array], built: list[Built], local: Array, texts: int
    ) -> pa.Table:
        """The table of one event. `built` are the columns of its different texts, `local` each record's text."""
        kinds = self._payloads.types(name)
        if name not in self._schemas:
            self._schemas[name] = ftrace_schema(self.tables[name])
        own = []
        for field, kind in kinds.items():
            parts = []
            for rows, columns in built:
                values = columns.get(field)
                values = nulls(kind, rows.size) if values is None else values
                parts.append(values if values.type == kind else values.cast(kind))
            own.append(pa.concat_arrays(parts) if len(parts) > 1 else parts[0])
        done = built[0][0] if len(built) == 1 else np.concatenate([rows for rows, _ in built])
        if done.size == texts == local.size and len(built) == 1:
            pick = None  # every text occurs once, in this order
        else:
            where = np.full(texts, -1, dtype=np.int64)
            where[done] = np.arange(done.size)
            pick = where[local]
            if done.size < texts:
                rows = np.flatnonzero(pick >= 0)
                pick = pick[rows]
                shared = _taken(shared, rows)
        if pick is not None and own:
            own = _taken(own, pick)
        return pa.Table.from_arrays([*shared, *own], schema=self._schemas[name])

    def _text(self, name: str, shared: list[pa.Array], group: Payload, texts: Array, where: Array) -> pa.Table:
        """Records whose text `where` (index into `texts`, -1 none) is kept as it is."""
        rows = np.flatnonzero(where >= 0)
        payload = group.strings(texts).cast(pa.string()).take(pa.array(where[rows]))
        columns = _taken(shared, rows)
        return pa.Table.from_arrays([*columns, constant(COMM, name, rows.size), payload], schema=TEXT.schema())

    def _fixed(
        self,
        name: str,
        shared: list[pa.Array],
        group: Payload,
        records: Records,
        index: Array,
        scan: Scan,
        text: bytearray,
        starts: Array,
        ends: Array,
    ) -> pa.Table:
        """Function tracers and stack traces."""
        import polars as pl  # costs more than reading a small recording, and few have such lines

        self.tables.setdefault(name, FIXED[name])
        if name == "function":
            calls = pl.Series(group.strings(np.arange(len(group))))
            groups = calls.str.extract_groups(r"^\s*(\S+) +<-(\S+)").struct.unnest()
            own = [groups.to_series(i).to_arrow().cast(pa.string()) for i in (0, 1)]
        elif name == "funcgraph":
            shown = records.duration[index]
            calls = pl.Series(group.strings(np.arange(len(group))))
            blank = calls.str.len_bytes() - calls.str.strip_chars_start(" ").str.len_bytes()
            depth = (np.maximum(blank.to_numpy().astype(np.int64) - 2, 0) // 2).clip(0, 65535)
            own = [
                plain(pa.int64(), shown, shown >= 0),
                plain(pa.uint16(), depth.astype(np.uint16)),
                calls.str.strip_chars(" ").to_arrow().cast(pa.string()),
            ]
        else:
            own = self._stacks(records, index, scan, text, starts, ends)
        return pa.Table.from_arrays([*shared, *own], schema=FIXED[name].schema())

    def _stacks(
        self, records: Records, index: Array, scan: Scan, text: bytearray, starts: Array, ends: Array
    ) -> list[pa.Array]:
        rows = scan.stacks
        owner = np.searchsorted(records.row, rows) - 1
        by_cpu = np.argsort(records.cpu, kind="stable")
        before = np.full(records.cpu.size, -1, dtype=np.int64)
        same = records.cpu[by_cpu[1:]] == records.cpu[by_cpu[:-1]]
        before[by_cpu[1:][same]] = by_cpu[:-1][same]
        callers = []
        belonging = []
        for record, low, high in zip(
            index.tolist(), *(np.searchsorted(owner, index + add).tolist() for add in (0, 1)), strict=True
        ):
            lines = [bytes(text[int(starts[row]) : int(ends[row])]) for row in rows[low:high].tolist()]
            callers.append([escape(line.partition(b"=>")[2].strip()) for line in lines])
            previous = int(before[record])
            cpu = int(records.cpu[record])
            belonging.append(self._seq + previous if previous >= 0 else self._last_seq.get(cpu))
        return [pa.array(callers, pa.list_(pa.string())), pa.array(belonging, pa.uint64())]
