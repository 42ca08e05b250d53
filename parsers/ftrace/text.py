"""Reader of ftrace text: kernel `trace`, `trace_pipe`, `trace-cmd report` with and without -R, `perf script`."""

from __future__ import annotations

import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import BinaryIO, ClassVar

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array
from parsers.ftrace.batch import Records, Scan, classify, latest
from parsers.ftrace.build import MARKERS, Builder
from parsers.ftrace.layouts import BARE, LAYOUTS, PLAIN, Fast, Layout, detect, named, stamp_of
from parsers.ftrace.notes import NOTES, note
from parsers.ftrace.shapes import is_known
from parsers.recording import Accounting, Chunk, ClockModel, Gap, Note, NoteCode, ReadOptions, RecordingError
from parsers.tables import Table

__all__ = ["FtraceTextReader", "PerfScriptReader", "TraceCmdReportReader"]

#: Bytes of a batch. Every event of a batch costs some calls, however few records it has; memory grows by 7 MiB for
#: each MiB of this.
BATCH = 24 << 20
#: A line longer than this is not an event (a ring-buffer record fits in a sub-buffer).
LONGEST = 1 << 20
#: Zeros after a batch, for what looks beyond a short last line.
SPARE = 128
#: Records that the lines after them belong to, or whose line does not print a name: `only` needs all lines for them.
NEED_CONTEXT = frozenset({"kernel_stack", "user_stack", "function", "funcgraph", "(no name)", "(continued)", *MARKERS})
#: Nothing but names and payloads: no line has a time.
BARE_LAYOUT = Layout("bare", BARE)
BY_NAME = {layout.name: layout for layout in LAYOUTS}


def _head_lines(head: bytes) -> list[bytes]:
    return [line.rstrip(b"\r") for line in head[: 64 << 10].split(b"\n")[:400]]


def first_layout(head: bytes) -> tuple[Layout, re.Match[bytes]] | None:
    """The layout of the first lines that look like events."""
    lines = _head_lines(head)
    plain: list[tuple[Layout, re.Match[bytes]]] = []
    report = any(re.match(rb"(\w+: +)?cpus=\d+$", line) for line in lines[:4])
    order = LAYOUTS if not report else (BY_NAME["report"], BY_NAME["latency-report"], *LAYOUTS)
    for line in lines:
        if line[:1] == b"#":
            continue
        found = detect(line[:400], order)
        if found is None:
            continue
        layout, match = found
        if layout.name in PLAIN:
            plain.append(found)
            continue
        if layout.name == "kernel" and not match["flags"] and re.match(rb"[\w.]+:  +\S", match["rest"]):
            # only trace-cmd pads the event's name
            padded = detect(line[:400], (BY_NAME["report"],))
            return padded or found
        return found
    return plain[0] if lines and (len(plain) > 2 or lines[0].startswith(b"# tracer:")) and plain else None


def is_bare(head: bytes) -> bool:
    """Whether the lines are names and payloads only (`nocontext-info`): all of them, some of events that are known."""
    lines = [line for line in _head_lines(head) if line and line[:1] != b"#"]
    lines = lines[:-1] if len(lines) > 1 and not head.endswith(b"\n") else lines
    matches = [BARE.fullmatch(line) for line in lines if not line.startswith((b" =>", b"=> "))]
    known = sum(m is not None and is_known(m["name"], m["payload"]) for m in matches)
    after = 0  # lines of a marker's own text
    for line, match in zip(lines, matches, strict=False):
        after += match is None and not line.startswith((b" =>", b"=> "))
    return bool(matches) and known >= (1 if head.startswith(b"# tracer:") else 3) and 4 * after <= len(matches)


class FtraceTextReader:
    """Text of the kernel's ftrace files. `offset` is the line number, from 1.

    Times: the kernel cuts to microseconds (t_err_ns 999); trace-cmd rounds (t_err_ns 1000, the origin lies half a
    microsecond before the first stamp). Integer stamps (x86-tsc, counter …) stay ticks without `cpu_hz`.
    """

    format: ClassVar[str] = "ftrace"
    note_codes: ClassVar[tuple[NoteCode, ...]] = NOTES
    accepts: ClassVar[tuple[str, ...]] = ("kernel", "latency", "verbose", "verbose-ticks", "raw", "hex")
    leaves_out: ClassVar[bool] = True

    def __init__(self, stream: BinaryIO, options: ReadOptions) -> None:
        total = stream.seek(0, io.SEEK_END)
        stream.seek(0)
        self._stream, self._options = stream, options
        self.accounting = Accounting(total=total)
        self._text_size = total
        head = stream.read(64 << 10)
        stream.seek(0)
        found = first_layout(head)
        bare = found is None and is_bare(head)
        if found is None and not bare and not self._is_graph(head):
            raise RecordingError("no line in the first 64 KiB is laid out like ftrace text")
        self._layout = found[0] if found else BARE_LAYOUT if bare else BY_NAME["kernel"]
        rest = tuple(layout for layout in LAYOUTS if layout is not self._layout)
        self._layouts = (self._layout, *rest) if self._layout.name != "perf" else (self._layout,)
        self._layouts = () if bare else self._layouts
        fast = Fast.learn(*found) if found else None
        self._templates = [fast] if fast is not None else []
        self._stamps = found is not None
        stamp = stamp_of(found[1]) if found else b"0"
        self._shown_first = int(stamp.replace(b".", b""))
        self._dot = len(stamp) - stamp.index(b".") - 1 if b"." in stamp else 0
        self._gaps: list[Gap] = []
        self._late: list[Gap] = []  # that end with the next record
        self._latest: int | None = None  # stamp of the last record so far that has one
        self._notes: list[Note] = []
        self._line, self._position, self._lines_in = 1, 0, 0
        self._last: dict[int, int] = {}
        self._cut = False  # the last line has no end
        self._started: Counter[int] = Counter()
        self._builder = Builder(options, self._layout)
        self.tables: dict[str, Table] = self._builder.tables
        self.counts: dict[str, int] = self._builder.counts
        self.clock: ClockModel = self._clock(0)
        self._produced = self._produce()
        self._ahead = next(self._produced, None)

    @staticmethod
    def _is_graph(head: bytes) -> bool:
        return head.startswith(b"# tracer:") or bool(re.search(rb"^ +\d+\) .{0,20}\|  ", head, re.M))

    @classmethod
    def sniff(cls, head: bytes) -> bool:
        """Whether lines are laid out as this reader's layouts have them."""
        if head[:1] == b"<" or b"\0" in head[:512]:
            return False
        found = first_layout(head)
        if found is None:
            return "kernel" in cls.accepts and (cls._is_graph(head) or is_bare(head))
        return found[0].name in cls.accepts

    def chunks(self) -> Iterator[Chunk]:
        """The whole recording, in order of its lines."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            yield ahead
        del ahead  # a chunk that was given out is not kept while the next one is made
        yield from self._produced

    def _clock(self, first: int) -> ClockModel:
        layout, hz = self._layout, self._options.cpu_hz
        origin = f"{layout.name} text"
        if layout.micros:
            since = "since the start of the buffer" if layout.name == "latency" else "of the trace clock"
            return ClockModel("us", 1e6, first, "ns", f"{layout.name} format: microseconds {since}")
        if self._dot:
            doc = "stamps are rounded" if layout.rounds and self._dot == 6 else "stamps are cut off"
            return ClockModel("us" if self._dot == 6 else "ns", 10.0**self._dot, first, "ns", origin, doc=doc)
        if hz is not None and hz >= 1:
            return ClockModel("tsc", float(round(hz)), first, "ns", "--cpu-hz")
        if not self._stamps:
            return ClockModel("none", None, first, "ticks", f"{origin} without stamps")
        return ClockModel("ticks", None, first, "ticks", f"{origin}, integer stamps")

    def _batches(self) -> Iterator[tuple[bytearray, int, bool]]:
        """(text, its length up to the end of a line, last one?); the consumer may set `self._carry`.

        The text is followed by zeros and overwritten by the next one: new memory for each costs more than reading it.
        """
        self._carry = b""
        buffer = bytearray()
        while True:
            have = len(self._carry)
            if len(buffer) < have + BATCH + SPARE:
                buffer = bytearray(have + BATCH + LONGEST + SPARE)
            buffer[:have], self._carry = self._carry, b""
            with memoryview(buffer) as view:
                size = have + self._stream.readinto(view[have : have + BATCH])  # type: ignore[attr-defined]
            if size == have:
                if size:
                    if buffer[size - 1] != 10:
                        self._cut = True
                        buffer[size], size = 10, size + 1
                    buffer[size : size + SPARE] = bytes(SPARE)
                    yield buffer, size, True
                return
            cut = buffer.rfind(b"\n", 0, size) + 1
            with memoryview(buffer) as view:
                rest = bytes(view[cut:size])
            buffer[cut : cut + SPARE] = bytes(SPARE)
            if len(rest) > LONGEST:
                tail = self._skip_long(len(rest))
                if cut:
                    yield buffer, cut, True
                self._skip(tail)
            elif cut:
                yield buffer, cut, False
                self._carry += rest
            else:
                self._carry = rest

    def _skip_long(self, seen: int) -> int:
        """Read to the end of an endless line; gives its length."""
        length = seen
        while True:
            block = self._stream.read(LONGEST)
            found = block.find(b"\n")
            if found >= 0:
                self._stream.seek(found + 1 - len(block), io.SEEK_CUR)
                return length + found + 1
            length += len(block)
            if not block:
                return length

    def _file_offset(self, at: int) -> int:
        """Where in the file byte `at` of the text is."""
        return at

    def _file_lines(self, lines: Array) -> Array:
        """Numbers of lines in the file from those in the text, both from 1."""
        return lines

    def _span(self, at: int, length: int) -> tuple[int, int]:
        """A stretch of the text as a file's: offset and length."""
        offset = self._file_offset(at)
        return offset, self._file_offset(at + length) - offset

    def _skip(self, length: int) -> None:
        self.accounting.skipped += length
        offset, size = self._span(self._position, length)
        self._notes.append(note("ftrace-long-line", f"{length} bytes", offset))
        self._late.append(Gap("damaged", None, self._latest, None, offset, size, None, "a line too long"))
        self._position += length
        self._line += 1

    def _produce(self) -> Iterator[Chunk]:
        for text, size, last in self._batches():
            tables = self._batch(text, size, last)
            if tables or self._gaps:
                yield self._chunk(tables)
            del tables
        self._finish()
        if self._notes or self._gaps:
            yield self._chunk({})

    def _chunk(self, tables: dict[str, pa.Table]) -> Chunk:
        chunk = Chunk(tables, self._gaps, self._notes, min(self._position, self.accounting.total))
        self._gaps, self._notes = [], []
        return chunk

    def _finish(self) -> None:
        self._gaps += self._late
        for cpu, count in sorted(self._started.items()):
            self._notes.append(note("ftrace-buffer-started", f"cpu {cpu}", 0, cpu, count))
        self._notes.extend(self._builder.notes())
        self._notes.extend(self._extra_notes())
        if self.clock.kind == "ticks":
            self._notes.append(note("ftrace-clock", f"{self.clock.origin}; t_ns is in ticks"))
        self.accounting.skipped = min(self.accounting.skipped, self.accounting.total)
        self.accounting.parsed = self.accounting.total - self.accounting.skipped

    def _extra_notes(self) -> list[Note]:
        return []

    def _batch(self, text: bytearray, size: int, last: bool) -> dict[str, pa.Table]:
        data = np.frombuffer(text, dtype=np.uint8, count=size + SPARE)
        ends = np.flatnonzero(data[:size] == 10)
        starts = np.concatenate((np.zeros(1, dtype=np.int64), ends[:-1] + 1))
        returns = data[ends - 1] == 13  # before the first byte stands a spare one
        if returns.any():
            ends = ends - returns
        kept = self._wanted(data, text, starts)
        if kept is not None:
            starts, ends = starts[kept], ends[kept]
        scan, sources = classify(data, text, starts, ends, self._templates, self._layouts, self._dot)
        used, lines = size, starts.size if kept is None else self._lines_in
        rows = scan.records.row
        keep = starts.size
        if not last and rows.size and size - int(starts[rows[-1]]) < LONGEST:
            # what follows the last record may belong to it: both wait for the next batch
            keep = int(rows[-1])
            self._carry = bytes(text[int(starts[keep]) : size]) + self._carry
            used, lines = int(starts[keep]), keep if kept is None else int(kept[keep])
        self._marks(scan, starts, keep)
        everything = scan.records
        if keep < starts.size:
            scan = self._before(scan, keep)
        if self._builder.first is None and scan.records.stamped.any():
            self._builder.first = int(scan.records.stamp[np.argmax(scan.records.stamped)])
            if kept is not None:
                # times count from the recording's first record, wanted or not
                self._builder.first = min(self._shown_first, self._builder.first)
            self.clock = self._clock(self._builder.first)
            self._builder.clock = self.clock
        cut = self._cut_line(scan, starts, kept) if last and self._cut else -1
        tables, strays = self._builder.build(data, text, starts, ends, scan, sources, self._line, kept, cut)
        if last and self._cut:
            self._tell_cut(scan, starts, cut, strays)
        self._stray_lines([row for row in strays if row != cut], starts, ends, everything)
        stamped = scan.records.stamp[scan.records.stamped]
        self._latest = int(stamped[-1]) if stamped.size else self._latest
        self._position += used
        self._line += lines
        return tables

    def _cut_line(self, scan: Scan, starts: Array, kept: Array | None) -> int:
        """Row of the last line, which has no end; -1 when it is none of the lines looked at."""
        row = int(starts.size) - 1
        if kept is not None and (not kept.size or int(kept[-1]) != self._lines_in - 1):
            return -1
        if scan.stacks.size and scan.stacks[-1] == row:
            scan.stacks = scan.stacks[:-1]
            scan.unknown.append(row)
        return row

    def _tell_cut(self, scan: Scan, starts: Array, row: int, strays: list[int]) -> None:
        """The gap and the note of a last line without end; the line is skipped when it is no record."""
        at = self._position + int(starts[row]) if row >= 0 else self._text_size
        records = scan.records
        before = records.stamp[records.stamped & (records.row < row)] if row >= 0 else records.stamp[records.stamped]
        stop = int(before[-1]) if before.size else max(self._last.values(), default=None)
        length = self._text_size - at if row in strays else 0
        offset, size = self._span(at, length)
        self._notes.append(note("ftrace-truncated", "no newline at the end", offset))
        self.accounting.skipped += length
        self._gaps.append(Gap("truncated", None, stop, None, offset, size, None, "ends inside a line"))

    def _wanted(self, data: Array, text: bytearray, starts: Array) -> Array | None:
        """Indices of the lines that `only` asks for, and of those that are no records; None: all lines.

        A line may be kept that nobody wants: `Builder` looks again.
        """
        only = self._options.only
        if not only or only & NEED_CONTEXT:
            return None
        self._lines_in = int(starts.size)
        if self._templates:
            return np.flatnonzero(named(data, starts, self._templates, only))
        # names are searched in the whole text at once, so a line may hold one elsewhere
        before = b":" if self._layout.name == "perf" else b" "
        places: list[int] = []
        for name in only:
            word = before + name.encode() + b":"
            at = text.find(word, 0, data.size)
            while at >= 0:
                places.append(at)
                # the same line cannot be wanted twice, but it is shorter than a search for its end
                at = text.find(word, at + len(word), data.size)
        wanted = np.zeros(starts.size, dtype=bool)
        wanted[np.searchsorted(starts, np.array(places, dtype=np.int64), side="right") - 1] = True
        first = data[starts]
        for row in np.flatnonzero((first == 35) | (first == 67)).tolist():
            # headers, marks of started buffers and of lost records
            wanted[row] |= text.startswith((b"#", b"CPU:"), int(starts[row]))
        return np.flatnonzero(wanted)

    @staticmethod
    def _before(scan: Scan, keep: int) -> Scan:
        records = scan.records
        scan.records = records.chosen(slice(0, records.row.size - 1))
        scan.stacks = scan.stacks[scan.stacks < keep]
        scan.unknown = [row for row in scan.unknown if row < keep]
        return scan

    def _marks(self, scan: Scan, starts: Array, keep: int) -> None:
        """Gaps from marks of lost records before row `keep`: from the CPU's record before to the one after."""
        records = scan.records
        gone = sum(count for row, count in scan.overwritten if row < keep)
        if gone:
            self._notes.append(note("ftrace-overrun", f"{gone} records overwritten", 0, None, gone))
            self._gaps.append(Gap("overrun", None, None, None, 0, 0, gone, "before the first record"))
        self._started.update(cpu for row, cpu in scan.started if row < keep)
        for row, cpu, count in scan.lost[:10000]:
            if row >= keep:
                break
            on_cpu = np.flatnonzero(records.cpu == cpu)
            at = int(np.searchsorted(records.row[on_cpu], row))
            before = int(records.stamp[on_cpu[at - 1]]) if at else self._last.get(cpu)
            after = int(records.stamp[on_cpu[at]]) if at < on_cpu.size else None
            offset = self._file_offset(self._position + int(starts[row]))
            self._gaps.append(Gap("lost-records", cpu, before, after, offset, 0, count))
            self._notes.append(note("ftrace-lost", f"cpu {cpu}: {count or 'some'} records", offset, cpu, count or 1))
        done = records.row < keep
        cpus, last = latest(records.cpu[done])
        self._last.update(zip(cpus.tolist(), records.stamp[done][last].tolist(), strict=True))

    def _stray_lines(self, rows: list[int], starts: Array, ends: Array, records: Records) -> None:
        """Lines that nothing explains: runs of them become one gap each, from the record before to the one after."""
        runs: list[list[int]] = []
        stamped, stamps = records.row[records.stamped], records.stamp[records.stamped]
        if stamped.size:
            self._gaps += [replace(gap, t1=int(stamps[0])) for gap in self._late]
            self._late = []
        for row in rows:
            if runs and row == runs[-1][1] + 1:
                runs[-1][1] = row
            else:
                runs.append([row, row])
        for first, final in runs:
            length = int(ends[final] + 1 - starts[first])
            self.accounting.skipped += length
            if len(self._gaps) < 2000:
                offset, size = self._span(self._position + int(starts[first]), length)
                after = int(np.searchsorted(stamped, first))
                t0 = int(stamps[after - 1]) if after else self._latest
                t1 = int(stamps[after]) if after < stamped.size else None
                self._gaps.append(Gap("damaged", None, t0, t1, offset, size, None, "not ftrace text"))
        if rows:
            where = self._file_offset(self._position + int(starts[rows[0]]))
            (line,) = self._file_lines(np.array([self._line + rows[0]])).tolist()
            self._notes.append(note("ftrace-line", f"line {line}", where, None, len(rows)))


class TraceCmdReportReader(FtraceTextReader):
    """Output of `trace-cmd report`, also with -R, -t, -l."""

    format: ClassVar[str] = "trace-cmd-report"
    accepts: ClassVar[tuple[str, ...]] = ("report", "latency-report")


class PerfScriptReader(FtraceTextReader):
    """Output of `perf script` for tracepoints."""

    format: ClassVar[str] = "perf-script"
    accepts: ClassVar[tuple[str, ...]] = ("perf",)
