"""The trace.dat reader: merges all CPUs and buffers by time and hands out one Arrow table per event."""

from __future__ import annotations

import heapq
import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO, ClassVar

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import constant, dictionary, nulls, plain
from parsers.ftrace.columns import escape
from parsers.recording import Accounting, Chunk, ClockModel, Gap, NoteCode, ReadOptions
from parsers.tables import Table
from parsers.tracedat.decode import Batch
from parsers.tracedat.events import Events
from parsers.tracedat.header import Head, note, read_head
from parsers.tracedat.layout import BATCH, MAGIC, NOTES, Limit
from parsers.tracedat.pages import Budget, PageStream, Problems
from parsers.tracedat.times import TimeBase, shifted
from parsers.tracedat.walk import Array, Records, walk

__all__ = ["TraceDatReader"]


#: Pages of one CPU that are taken at once: so many bytes, or fewer if there are many CPUs.
RUN = 256 << 10


@dataclass(slots=True)
class Run:
    """Pages in hand that follow each other in one CPU's data: `stream` index, bytes, file offset (of their chunk, if
    compressed), and how many records of the first page were given out already; the other pages' were not."""

    stream: int
    data: bytes
    offset: int
    given: int = 0
    fresh: bool = True


@dataclass(slots=True)
class Pages:
    """All pages of a batch, in order of stream and time: `at` is their place in the batch, `offset` in the file (of
    their chunk, if compressed), `stream` an index."""

    at: Array
    size: Array
    offset: Array
    stream: Array
    fresh: Array

    @classmethod
    def of(cls, runs: list[Run], streams: list[PageStream]) -> Pages:
        """Pages of `runs`, each of which begins at a multiple of 8 in the batch."""
        columns: list[list[Array]] = [[], [], [], [], []]
        begin = 0
        for run in runs:
            buffer, length = streams[run.stream].buffer, len(run.data)
            inside = np.arange(0, length, buffer.page_size, dtype=np.int64)
            size = np.minimum(buffer.page_size, length - inside)
            offset = np.full(inside.size, run.offset) if buffer.compressed else inside + run.offset
            stream, fresh = np.full(inside.size, run.stream), np.full(inside.size, run.fresh)
            for column, values in zip(columns, (inside + begin, size, offset, stream, fresh), strict=True):
                column.append(values)
            begin += length + -length % 8
        return cls(*(np.concatenate(column) for column in columns))


class TraceDatReader:
    """trace.dat v6 and v7, either byte order, plain, zstd or zlib (trace-cmd).

    `offset` of a record is its file offset; in a compressed buffer it is its chunk's.
    """

    format: ClassVar[str] = "trace.dat"
    note_codes: ClassVar[tuple[NoteCode, ...]] = NOTES
    leaves_out: ClassVar[bool] = True

    def __init__(self, stream: BinaryIO, options: ReadOptions) -> None:
        total = stream.seek(0, io.SEEK_END)
        self._stream, self._options = stream, options
        self._head: Head = read_head(stream, total)
        self._problems = Problems(notes=self._head.notes)
        self._events = Events(self._head, options)
        self.tables: dict[str, Table] = self._events.tables
        self.counts: dict[str, int] = self._events.counts
        self.accounting = Accounting(total=total)
        self._seq = 0
        self._lost: Counter[int] = Counter()
        self._streams = self._open_streams()
        clock = self._streams[0].buffer.clock if self._streams else self._head.clock
        self._base = TimeBase.choose(clock, self._head.tsc2nsec, options.cpu_hz)
        self._first: int | None = None
        self.clock: ClockModel = self._base.model(0)
        if self._base.unit == "ticks" or not clock:
            self._head.add_note("tracedat-clock", f"{self._base.origin}; t_ns is in {self._base.unit}")
        self._produced = self._produce()
        self._ahead = next(self._produced, None)

    @staticmethod
    def sniff(head: bytes) -> bool:
        """The ten magic bytes of trace-cmd."""
        return head.startswith(MAGIC)

    def chunks(self) -> Iterator[Chunk]:
        """The whole recording, in global order."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            yield ahead
        del ahead  # a chunk that was given out is not kept while the next one is made
        yield from self._produced

    def _open_streams(self) -> list[PageStream]:
        head, streams = self._head, []
        wanted = [(buffer, area) for buffer in head.buffers for area in buffer.areas if area.size]
        # A fair part each; a chunk may be larger (a recorder writes ten pages) as long as the sum stays within bounds.
        share, budget = Limit.CHUNKS_HELD // max(1, len(wanted)), Budget(Limit.CHUNKS_HELD)
        taken: list[tuple[int, int]] = []
        cut: dict[tuple[str, int], str] = {}
        for buffer, area in sorted(wanted, key=lambda pair: pair[1].offset):
            problem = ""
            if not 4 * head.page.data <= buffer.page_size <= Limit.PAGE or buffer.page_size % 8:
                problem = f"page size {buffer.page_size}"
            elif area.cpu > 0xFFFF:
                problem = f"CPU number {area.cpu}"
            elif area.offset >= head.total:
                problem = f"data at {area.offset} beyond the end of the file"
            elif taken and area.offset < taken[-1][1]:
                problem = f"data at {area.offset} overlaps another CPU's"
            if problem:
                beyond = area.offset >= head.total
                self._problems.damaged(
                    "tracedat-truncated" if beyond else "tracedat-section",
                    f"cpu {area.cpu}: {problem}",
                    cpu=min(area.cpu, 0xFFFF),
                    offset=min(area.offset, head.total),
                    length=0,
                )
                continue
            end = area.offset + area.size
            if end > head.total:
                if not buffer.compressed:  # of those the chunk that is cut says it
                    missing = f"{end - head.total} of {area.size} bytes lie beyond the end of the file"
                    cut[(buffer.name, area.offset)] = missing
                area = type(area)(area.cpu, area.offset, head.total - area.offset)
            taken.append((area.offset, area.offset + area.size))
            streams.append(
                PageStream(
                    self._stream,
                    buffer,
                    area,
                    order=head.order,
                    inflate=head.inflate,
                    problems=self._problems,
                    share=share,
                    budget=budget,
                )
            )
        head.claims.extend(taken)
        names = {buffer.name: rank for rank, buffer in enumerate(head.buffers)}
        streams.sort(key=lambda stream: (names[stream.buffer.name], stream.cpu, stream.area.offset))
        places = [(stream.buffer.name, stream.area.offset) for stream in streams]
        self._cut = {index: cut[place] for index, place in enumerate(places) if place in cut}
        return streams

    def _produce(self) -> Iterator[Chunk]:
        """Chunks of all buffers on the first buffer's clock, then of the others (their stamps do not compare)."""
        clocks = list(dict.fromkeys(stream.buffer.clock for stream in self._streams))
        for clock in clocks:
            if clock != clocks[0]:
                self._head.add_note("tracedat-clock", f"a buffer on clock {clock!r}: its t_ns is null")
            members = [i for i, stream in enumerate(self._streams) if stream.buffer.clock == clock]
            yield from self._merge(members, comparable=clock == clocks[0])
        if not self._streams:
            self._head.add_note("tracedat-empty", "no CPU has any data")
        for index, missing in self._cut.items():
            stream = self._streams[index]
            text = f"cpu {stream.cpu}: {missing}"
            self._problems.damaged(
                "tracedat-truncated", text, cpu=stream.cpu, offset=self._head.total, length=0, t0=stream.last_time
            )
        self._account()
        last = self._chunk({})
        if last.gaps or last.notes:
            yield last

    def _key(self, index: int, stamps: Array) -> Array:
        """Corrected stamps (i64) of one stream."""
        cpu = self._streams[index].cpu
        shifts = self._head.shifts
        shift = shifts[cpu] if cpu < len(shifts) else shifts[0] if shifts else None
        return shifted(stamps, shift, self._head.interpolate)

    def _merge(self, members: list[int], *, comparable: bool) -> Iterator[Chunk]:
        """Take pages in order of their first stamp; give out the records that no unread page can precede."""
        streams = self._streams
        floor = dict.fromkeys(members, -(1 << 63))
        carried: list[Run] = []
        most = min(RUN, BATCH // len(members))

        def following(index: int) -> int:
            stamp = streams[index].next_time
            assert stamp is not None
            if not self._head.shifts:
                return max(floor[index], min(stamp, (1 << 63) - 1))
            return max(floor[index], int(self._key(index, np.array([stamp], dtype=np.uint64))[0]))

        while True:
            heap = [(following(i), i) for i in members if streams[i].next_time is not None]
            heapq.heapify(heap)
            runs = carried
            held = sum(len(run.data) for run in carried)
            target = min(held, 3 * BATCH) + BATCH
            while heap and held < target:
                _, index = heapq.heappop(heap)
                data, offset = streams[index].take(most)
                runs.append(Run(index, data, offset))
                held += len(data)
                if streams[index].next_time is not None:
                    heapq.heappush(heap, (following(index), index))
            # after much damage the order is given up, not the memory
            limit = heap[0][0] if heap and held <= 4 * BATCH else None
            if not runs:
                return
            runs.sort(key=lambda run: run.stream)
            tables, carried = self._give(runs, floor, limit, comparable=comparable)
            if tables:
                yield self._chunk(tables)
            del tables  # not kept while the next ones are made

    def _give(
        self, runs: list[Run], floor: dict[int, int], limit: int | None, *, comparable: bool
    ) -> tuple[dict[str, pa.Table], list[Run]]:
        """Decode the records before `limit` (corrected stamp; None: all of them); keep the pages of the others."""
        head, streams = self._head, self._streams
        pages = Pages.of(runs, streams)
        parts = (part for run in runs for part in (run.data, bytes(-len(run.data) % 8)))
        data = np.frombuffer(b"".join((*parts, bytes(Batch.SPARE + 8))), dtype=np.uint8)
        short = pages.size < np.array([stream.buffer.page_size for stream in streams])[pages.stream]
        records = walk(data, pages.at, pages.size, head.page, head.order, short)
        self._report(pages, records)
        first = np.searchsorted(records.page, np.arange(pages.at.size + 1))  # record of each page
        edges = np.flatnonzero(np.diff(pages.stream, prepend=-1, append=-1))
        given = {run.stream: run.given for run in reversed(runs)}
        chosen: list[slice] = []
        keys: list[Array] = []
        ends: dict[int, tuple[int, int]] = {}  # of streams that are not done: next page, and record of it
        for low, high in pairwise(edges.tolist()):
            index = int(pages.stream[low])
            begin, end = int(first[low]), int(first[high])
            if begin == end:
                continue
            key = np.maximum.accumulate(self._key(index, records.stamp[begin:end]))
            floor[index] = max(floor[index], int(key[-1]))
            streams[index].last_time = int(records.stamp[end - 1])
            stop = begin + int(np.searchsorted(key, limit, side="left")) if limit is not None else end
            start = begin + given[index]
            if stop < end:
                page = int(records.page[max(stop, start)])
                ends[index] = page, max(stop, start) - int(first[page])
            if start < stop:
                chosen.append(slice(start, stop))
                keys.append(key[start - begin : stop - begin])
        kept = self._kept(runs, ends)
        runs.clear()  # their bytes are in `data`
        if not chosen:
            return {}, kept
        records, key = records.chosen(chosen), np.concatenate(keys)
        keys.clear()
        return self._tables(Batch(data, head.order), records, pages, key, comparable), kept

    def _kept(self, runs: list[Run], ends: dict[int, tuple[int, int]]) -> list[Run]:
        """What is left of the runs: of the streams in `ends` from that page on, of which so many records are given."""
        kept: list[Run] = []
        page = 0
        for run in runs:
            buffer = self._streams[run.stream].buffer
            count = -(-len(run.data) // buffer.page_size)
            after, given = ends.get(run.stream, (page + count, 0))
            if after < page + count:
                skip = max(0, after - page) * buffer.page_size
                offset = run.offset + (0 if buffer.compressed else skip)
                kept.append(Run(run.stream, run.data[skip:], offset, given if after >= page else 0, fresh=False))
            page += count
        return kept

    def _report(self, pages: Pages, records: Records) -> None:
        """Gaps for lost records and damaged pages among the pages that are new in this batch."""
        troubled = np.flatnonzero((records.lost >= 0) | (records.bad >= 0))
        if not troubled.size:
            return
        bounds = np.searchsorted(records.page, np.arange(pages.at.size + 1))
        for number in troubled.tolist():
            if not pages.fresh[number]:
                continue
            owner, size, offset = int(pages.stream[number]), int(pages.size[number]), int(pages.offset[number])
            stream = self._streams[owner]
            compressed = stream.buffer.compressed
            begin, end = int(bounds[number]), int(bounds[number + 1])
            same = begin > 0 and int(pages.stream[records.page[begin - 1]]) == owner
            before = int(records.stamp[begin - 1]) if same else stream.last_time
            if records.lost[number] >= 0 and len(self._problems.gaps) < 10 * Limit.NOTES * 100:
                lost = int(records.lost[number]) or None
                after = int(records.stamp[begin]) if end > begin else None
                self._problems.gaps.append(Gap("lost-records", stream.cpu, before, after, offset, 0, lost))
                self._lost[stream.cpu] += lost or 0
            if records.bad[number] >= 0:
                inside = int(records.bad[number] - pages.at[number])
                used = int(records.used[number]) + self._head.page.data
                length = max(0, (used or size) - inside)
                if offset + size == self._head.total and owner in self._cut:
                    self._problems.skipped += length  # the end of the file is told once
                    continue
                self._problems.damaged(
                    "tracedat-page",
                    f"cpu {stream.cpu}: the page's records do not add up after byte {inside}",
                    cpu=stream.cpu,
                    offset=offset + (0 if compressed else inside),
                    length=0 if compressed else length,
                    t0=int(records.stamp[end - 1]) if end > begin else before,
                )

    def _tables(
        self, batch: Batch, records: Records, pages: Pages, keys: Array, comparable: bool
    ) -> dict[str, pa.Table]:
        """Tables by event of records that are in order of stream and time; `keys` are their corrected stamps."""
        start, size, stamp, page = records.start, records.size, records.stamp, records.page
        if self._first is None and comparable:
            first = int(np.argmin(keys))
            self._first = int(keys[first])
            self.clock = self._base.model(int(stamp[first]))
        event = self._events.identify(batch, start, size)
        if self._options.only:
            kept = np.flatnonzero(self._events.wanted(event))
            start, size, stamp, page = start[kept], size[kept], stamp[kept], page[kept]
            keys, event = keys[kept], event[kept]
        rows = keys.size
        order = np.argsort(keys, kind="stable")
        event = event[order]
        by_event = np.argsort(event, kind="stable")
        order = order[by_event]
        start, size, page = start[order], size[order], page[order]
        owner = pages.stream[page]
        streams = self._streams
        buffers = list(dict.fromkeys(s.buffer.name for s in streams))
        buffer = np.array([buffers.index(s.buffer.name) for s in streams], dtype=np.int16)[owner]
        if comparable:
            assert self._first is not None
            t_ns = plain(pa.int64(), self._base.relative(keys[order], self._first))
            t_err = plain(pa.uint32(), np.zeros(rows, dtype=np.uint32))
        else:
            t_ns, t_err = nulls(pa.int64(), rows), nulls(pa.uint32(), rows)
        # the file offset of what stands before each record, or of its chunk
        in_file = np.array([not s.buffer.compressed for s in streams])
        offset = np.where(in_file[owner], start - 4 - pages.at[page], 0) + pages.offset[page]
        common = [
            plain(pa.uint64(), by_event.astype(np.uint64) + np.uint64(self._seq)),
            t_ns,
            t_err,
            plain(pa.uint64(), stamp[order]),
            plain(pa.uint16(), np.array([s.cpu for s in streams], dtype=np.uint16)[owner]),
            constant(pa.dictionary(pa.int16(), pa.string()), self._options.source, rows),
            plain(pa.uint64(), offset.astype(np.uint64)),
        ]
        instance = dictionary(pa.dictionary(pa.int16(), pa.string()), buffer, [escape(b.encode()) for b in buffers])
        self._seq += rows
        return self._events.tables_of(batch, event[by_event], start, size, common, instance)

    def _chunk(self, tables: dict[str, pa.Table]) -> Chunk:
        problems = self._problems
        chunk = Chunk(tables, list(problems.gaps), list(problems.notes), self._position())
        problems.gaps.clear()
        problems.notes.clear()
        return chunk

    def _position(self) -> int:
        areas = sum(stream.position for stream in self._streams)
        rest = self._head.total - sum(stream.area.size for stream in self._streams)
        return max(0, rest) + areas

    def _account(self) -> None:
        """Every byte: understood intervals (with alignment padding between them) less what was given up."""
        head, account = self._head, self.accounting
        parsed, position = 0, 0
        for begin, end in sorted((min(b, head.total), min(e, head.total)) for b, e in head.claims):
            if position < begin < position + head.page_size <= position + Limit.PAGE:
                begin = position
            parsed += max(0, end - max(begin, position))
            position = max(position, end)
        account.parsed = max(0, parsed - self._problems.skipped)
        account.skipped = account.total - account.parsed
        for cpu, count in sorted(self._lost.items()):
            self._problems.notes.append(
                note("tracedat-lost", f"cpu {cpu}: {count or 'some'} records lost", 0, cpu, max(1, count))
            )
        self._problems.notes.extend(self._events.notes())

