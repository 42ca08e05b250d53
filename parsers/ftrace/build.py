"""Records of a batch of text to Arrow tables: names and payloads out of the lines, common columns, typed fields."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa

from parsers.ftrace.arrays import Array, binary, constant, dictionary, nulls, plain
from parsers.ftrace.batch import Records, Scan
from parsers.ftrace.columns import FTRACE_COMMON, escape, ftrace_schema
from parsers.ftrace.flags import decode_flags
from parsers.ftrace.layouts import Layout
from parsers.ftrace.notes import note
from parsers.ftrace.payload import TEXT, Payload, Payloads
from parsers.ftrace.quick import Rows
from parsers.ftrace.swar import Text
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
NAME = re.compile(rb"([A-Za-z_][\w.-]*)(?:\+0x[0-9a-f]+/0x[0-9a-f]+)?(?: <[0-9a-f]+>)?")
#: Records whose text may hold newlines, so that stray lines after them are theirs.
MARKERS = frozenset({"tracing_mark_write", "print", "bprint", "bputs", "0"})
LONGEST_NAME = 128


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
        if self._unstamped:
            found.append(note("ftrace-no-stamps", f"{self._unstamped} records", count=self._unstamped))
        return found

    def build(
        self,
        data: Array,
        text: bytes,
        starts: Array,
        ends: Array,
        scan: Scan,
        sources: dict[int, bytes],
        line: int,
        kept: Array | None = None,
    ) -> tuple[dict[str, pa.Table], list[int]]:
        """Tables of a batch, and the rows of lines that belong to nothing.

        `line` is the number of the batch's first line; `kept` says which of its lines the rows are (None: all).
        """
        records = scan.records
        if not records.row.size:
            return {}, scan.unknown
        names, codes, payload_start = self._names(data, text, records)
        records, codes, payload_start, names, strays = self._continue(
            scan, records, codes, payload_start, names, starts, ends
        )
        if self._options.only:
            wanted = np.isin(codes, [number for number, name in enumerate(names) if name in self._options.only])
            records = Records(*(getattr(records, name)[wanted] for name in Records.__slots__))
            codes, payload_start = codes[wanted], payload_start[wanted]
            if not records.row.size:
                return {}, strays
        count = records.row.size
        order = np.argsort(codes, kind="stable")
        text8 = Text(data)
        payload = self._payload_rows(data, text, payload_start, records.end, order, text8)
        numbers = line + (records.row if kept is None else kept[records.row])
        common = self._common(data, records, sources, numbers, order)
        edges = np.flatnonzero(np.diff(codes[order], prepend=-1, append=-1)).tolist()
        parts: dict[str, list[pa.Table]] = {}
        for begin, end in pairwise(edges):
            name = names[int(codes[order[begin]])]
            self.counts[name] = self.counts.get(name, 0) + end - begin
            shared = [values.slice(begin, end - begin) for values in common]
            group = Payload(payload.part(begin, end), text)
            if name in FIXED and name != TEXT.name:
                table = self._fixed(name, shared, group, records, order[begin:end], scan, text, starts, ends)
                parts.setdefault(name, []).append(table)
                continue
            built, rest = self._payloads.decode(name, group) if name[0] != "(" else ([], np.arange(end - begin))
            for rows, columns in built:
                parts.setdefault(name, []).append(self._typed(name, shared, rows, columns, end - begin))
            if rest.size:
                if name[0] != "(":
                    self._as_text[name] += rest.size
                parts.setdefault(TEXT.name, []).append(self._text(name, shared, group, rest))
        cpus, last = np.unique(records.cpu[::-1], return_index=True)
        self._last_seq.update(zip(cpus.tolist(), (self._seq + count - 1 - last).tolist(), strict=True))
        self._seq += count
        return {name: self._joined(tables) for name, tables in parts.items()}, strays

    @staticmethod
    def _joined(tables: list[pa.Table]) -> pa.Table:
        if len(tables) == 1:
            return tables[0]
        table = pa.concat_tables(tables).unify_dictionaries()
        return table.take(np.argsort(table["seq"].to_numpy(), kind="stable"))

    def _names(self, data: Array, text: bytes, records: Records) -> tuple[list[str], Array, Array]:
        """Event names, the name's number for each record, and where its payload starts."""
        rest, end = records.rest, records.end
        colon = Text(data).find(58, rest, end)
        size = np.where((colon < end) & (colon - rest <= LONGEST_NAME), colon - rest, 0)
        coded = binary(data, rest, size).dictionary_encode()
        codes = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        names: list[str] = []
        number: dict[str, int] = {}

        def code(name: str) -> int:
            if name not in number:
                number[name] = len(names)
                names.append(name)
            return number[name]

        mapping = []
        for raw in coded.dictionary.to_pylist():
            match = NAME.fullmatch(raw)
            name = "tracing_mark_write" if raw == b"0" else match[1].decode() if match else ""
            mapping.append(code(name) if name else -1)
        codes = np.array(mapping, dtype=np.int64)[codes]
        start = np.minimum(colon + 1, end)
        blank = data[start] == 32
        start = np.minimum(start + blank, end)
        if self._layout.pads:
            for _ in range(40):
                more = (data[start] == 32) & (start < end)
                if not more.any():
                    break
                start += more
        codes = np.where(records.graph, code("funcgraph"), codes)
        start = np.where(records.graph, rest, start)
        odd = (codes < 0) | np.isin(codes, [number.get(n, -9) for n in ("kernel_stack", "user_stack")])
        for index in np.flatnonzero(odd).tolist():
            line = text[int(rest[index]) : min(int(end[index]), int(rest[index]) + 400)]
            start[index] = rest[index]
            if b"<stack trace" in line:
                codes[index] = code("kernel_stack")
            elif b"<user stack trace" in line:
                codes[index] = code("user_stack")
            elif re.fullmatch(rb"\S+ +<-\S+", line.strip()):
                codes[index] = code("function")
            else:
                codes[index] = code("(no name)")
        return names, codes, start

    @staticmethod
    def _continue(
        scan: Scan,
        records: Records,
        codes: Array,
        start: Array,
        names: list[str],
        starts: Array,
        ends: Array,
    ) -> tuple[Records, Array, Array, list[str], list[int]]:
        """Stray lines right after a marker become records '(continued)' that inherit the marker's columns."""
        marker = {number for number, name in enumerate(names) if name in MARKERS}
        unknown = np.array(scan.unknown, dtype=np.int64)
        if not unknown.size or not marker:
            return records, codes, start, names, scan.unknown
        owner = np.searchsorted(records.row, unknown) - 1
        belongs = (owner >= 0) & np.isin(codes[np.maximum(owner, 0)], list(marker))
        rows, owner = unknown[belongs], owner[belongs]
        if not rows.size:
            return records, codes, start, names, scan.unknown
        names = [*names, "(continued)"]
        merged = np.argsort(np.concatenate((records.row, rows)), kind="stable")
        fields = {}
        for name in type(records).__slots__:
            values = getattr(records, name)
            added = rows if name == "row" else ends[rows] if name == "end" else values[owner]
            fields[name] = np.concatenate((values, added))[merged]
        codes = np.concatenate((codes, np.full(rows.size, len(names) - 1)))[merged]
        start = np.concatenate((start, starts[rows]))[merged]
        return Records(**fields), codes, start, names, unknown[~belongs].tolist()

    @staticmethod
    def _payload_rows(data: Array, raw: bytes, start: Array, end: Array, order: Array, text: Text) -> Rows:
        """Payloads in `order`; `odd` marks those that hold a backslash, a NUL or anything that is not ASCII."""
        end = np.maximum(end, start)
        if raw.isascii() and b"\\" not in raw and b"\0" not in raw:
            return Rows(text, start[order], end[order])
        strange = np.flatnonzero((data >= 128) | (data == 92) | (data == 0))
        place = np.searchsorted(start, strange, side="right") - 1
        inside = (place >= 0) & (strange < end[np.maximum(place, 0)])
        odd = np.zeros(start.size, dtype=bool)
        odd[place[inside]] = True
        return Rows(text, start[order], end[order], odd[order] if odd.any() else None)

    def _common(
        self, data: Array, records: Records, sources: dict[int, bytes], numbers: Array, order: Array
    ) -> list[pa.Array]:
        """COMMON and ftrace's common columns, in `order`."""
        assert self.clock is not None or not records.stamped.any()
        rows = records.row.size
        seq = np.arange(rows, dtype=np.uint64) + np.uint64(self._seq)
        stamped = records.stamped
        self._unstamped += int((~stamped).sum())
        elapsed = records.stamp - np.int64(self.first or 0)
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
        sizes = np.where(records.comm >= 0, records.comm_size, 0)
        comm = binary(data, np.maximum(records.comm, 0), sizes).dictionary_encode()
        comms = [escape(raw.lstrip(b" ")) for raw in comm.dictionary.to_pylist()]
        comm_code = comm.indices.to_numpy(zero_copy_only=False)
        words = binary(data, np.maximum(records.flags, 0), records.flags_size).dictionary_encode()
        decoded = [decode_flags(raw.decode("latin-1")) for raw in words.dictionary.to_pylist()]
        word = words.indices.to_numpy(zero_copy_only=False)
        known = np.array([pair is not None for pair in decoded] or [False])[word]
        flag = np.array([pair[0] if pair else 0 for pair in decoded] or [0], dtype=np.uint8)[word]
        preempt = np.array([pair[1] if pair else 0 for pair in decoded] or [0], dtype=np.uint8)[word]
        buffers, buffer = [""], np.zeros(rows, dtype=np.int16)
        if sources:
            for name in dict.fromkeys(sources.values()):
                buffers.append(escape(name))
            number = {name: i for i, name in enumerate(buffers)}
            for index in np.flatnonzero(np.isin(records.row, list(sources))).tolist():
                buffer[index] = number[escape(sources[int(records.row[index])])]
        pid_known = records.pid >= 0
        comm_column = dictionary(COMM, comm_code[order], comms)
        return [
            plain(pa.uint64(), seq[order]),
            plain(pa.int64(), elapsed[order], stamped[order]),
            plain(pa.uint32(), np.full(rows, error, dtype=np.uint32), stamped[order]),
            plain(pa.uint64(), records.stamp[order].astype(np.uint64), stamped[order]),
            plain(pa.uint16(), records.cpu[order].astype(np.uint16)),
            constant(SMALL, self._options.source, rows),
            plain(pa.uint64(), numbers[order].astype(np.uint64)),
            plain(pa.int32(), records.pid[order].astype(np.int32), pid_known[order]),
            comm_column,
            plain(pa.uint8(), flag[order], known[order]),
            plain(pa.uint8(), preempt[order], known[order]),
            plain(pa.int32(), records.tgid[order].astype(np.int32), (records.tgid >= 0)[order]),
            dictionary(SMALL, buffer[order], buffers),
        ]

    def _typed(
        self, name: str, shared: list[pa.Array], rows: Array, columns: dict[str, pa.Array], count: int
    ) -> pa.Table:
        table = self.tables[name]
        if rows.size != count:
            index = pa.array(rows)
            shared = [values.take(index) for values in shared]
        own = []
        for field, kind in self._payloads.types(name).items():
            values = columns.get(field)
            if values is None:
                values = nulls(kind, rows.size)
            own.append(values if values.type == kind else values.cast(kind))
        if name not in self._schemas:
            self._schemas[name] = ftrace_schema(table)
        return pa.Table.from_arrays([*shared, *own], schema=self._schemas[name])

    def _text(self, name: str, shared: list[pa.Array], group: Payload, rows: Array) -> pa.Table:
        index = pa.array(rows)
        payload = group.strings(rows).cast(pa.string())
        columns = [values.take(index) for values in shared]
        return pa.Table.from_arrays([*columns, constant(COMM, name, rows.size), payload], schema=TEXT.schema())

    def _fixed(
        self,
        name: str,
        shared: list[pa.Array],
        group: Payload,
        records: Records,
        index: Array,
        scan: Scan,
        text: bytes,
        starts: Array,
        ends: Array,
    ) -> pa.Table:
        """Function tracers and stack traces."""
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
        self, records: Records, index: Array, scan: Scan, text: bytes, starts: Array, ends: Array
    ) -> list[pa.Array]:
        rows = scan.stacks
        owner = np.searchsorted(records.row, rows) - 1
        callers = []
        belonging = []
        for record in index.tolist():
            low, high = np.searchsorted(owner, [record, record + 1])
            lines = [text[int(starts[row]) : int(ends[row])] for row in rows[low:high].tolist()]
            callers.append([escape(line.partition(b"=>")[2].strip()) for line in lines])
            same = np.flatnonzero(records.cpu[:record] == records.cpu[record])
            before = self._last_seq.get(int(records.cpu[record]))
            belonging.append(self._seq + int(same[-1]) if same.size else before)
        return [pa.array(callers, pa.list_(pa.string())), pa.array(belonging, pa.uint64())]
