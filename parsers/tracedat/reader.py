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


@dataclass(slots=True)
class Page:
    """A page in hand: `stream` index, bytes, file offset, and how many of its records were given out already."""

    stream: int
    data: bytes
    offset: int
    given: int
    fresh: bool = True


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
        while ahead is not None:
            yield ahead
            ahead = next(self._produced, None)

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
        carried: list[Page] = []

        def following(index: int) -> int:
            stamp = streams[index].next_time
            assert stamp is not None
            if not self._head.shifts:
                return max(floor[index], min(stamp, (1 << 63) - 1))
            return max(floor[index], int(self._key(index, np.array([stamp], dtype=np.uint64))[0]))

        while True:
            heap = [(following(i), i) for i in members if streams[i].next_time is not None]
            heapq.heapify(heap)
            pages = carried
            held = sum(len(page.data) for page in carried)
            target = min(held, 3 * BATCH) + BATCH
            while heap and held < target:
                _, index = heapq.heappop(heap)
                data, offset = streams[index].take()
                pages.append(Page(index, data, offset, 0))
                held += len(data)
                if streams[index].next_time is not None:
                    heapq.heappush(heap, (following(index), index))
            # after much damage the order is given up, not the memory
            limit = heap[0][0] if heap and held <= 4 * BATCH else None
            if not pages:
                return
            pages.sort(key=lambda page: page.stream)
            tables, carried = self._give(pages, floor, limit, comparable=comparable)
            if tables:
                yield self._chunk(tables)

    def _give(
        self, pages: list[Page], floor: dict[int, int], limit: int | None, *, comparable: bool
    ) -> tuple[dict[str, pa.Table], list[Page]]:
        """Decode the records before `limit` (corrected stamp; None: all of them); keep the other pages."""
        head, streams = self._head, self._streams
        stride = (max(len(page.data) for page in pages) + 7) // 8 * 8
        short = np.fromiter(
            (len(page.data) < streams[page.stream].buffer.page_size for page in pages), dtype=bool, count=len(pages)
        )
        sizes = np.fromiter((len(page.data) for page in pages), dtype=np.int64, count=len(pages))
        padded = (page.data.ljust(stride, b"\0") for page in pages)
        data = np.frombuffer(b"".join((*padded, bytes(8))), dtype=np.uint8)
        records = walk(data, len(pages), stride, sizes, head.page, head.order, short)
        owner = np.fromiter((page.stream for page in pages), dtype=np.int64, count=len(pages))
        stream = owner[records.page]
        keys = np.empty(records.stamp.size, dtype=np.int64)
        edges = np.flatnonzero(np.diff(stream, prepend=-1, append=-1))
        self._report(pages, records, sizes, stride)
        for begin, end in pairwise(edges.tolist()):
            index = int(stream[begin])
            keys[begin:end] = np.maximum.accumulate(self._key(index, records.stamp[begin:end]))
            floor[index] = max(floor[index], int(keys[end - 1]))
            streams[index].last_time = int(records.stamp[end - 1])
        per_page = np.bincount(records.page, minlength=len(pages))
        first = np.cumsum(per_page) - per_page
        given = np.fromiter((page.given for page in pages), dtype=np.int64, count=len(pages))
        ordinal = np.arange(records.page.size) - first[records.page]
        open_rows = np.flatnonzero(ordinal >= given[records.page])
        order = open_rows[np.argsort(keys[open_rows], kind="stable")]
        if limit is not None:
            order = order[: np.searchsorted(keys[order], limit, side="left")]
        done = given + np.bincount(records.page[order], minlength=len(pages))
        kept = [
            Page(page.stream, page.data, page.offset, int(done[number]), False)
            for number, page in enumerate(pages)
            if done[number] < per_page[number]
        ]
        if not order.size:
            return {}, kept
        rows = records.page[order]
        offsets = np.fromiter((page.offset for page in pages), dtype=np.int64, count=len(pages))
        plain_file = np.fromiter(
            (not streams[page.stream].buffer.compressed for page in pages), dtype=bool, count=len(pages)
        )
        within = np.where(plain_file[rows], records.start[order] - 4 - rows * stride, 0)
        tables = self._tables(
            Batch(data, head.order),
            records,
            order,
            owner[rows],
            keys[order] if comparable else None,
            offsets[rows] + within,
        )
        return tables, kept

    def _report(self, pages: list[Page], records: Records, sizes: Array, stride: int) -> None:
        """Gaps for lost records and damaged pages among the pages that are new in this batch."""
        troubled = np.flatnonzero((records.lost >= 0) | (records.bad >= 0))
        if not troubled.size:
            return
        bounds = np.searchsorted(records.page, np.arange(len(pages) + 1))
        for number in troubled.tolist():
            page = pages[number]
            if not page.fresh:
                continue
            stream = self._streams[page.stream]
            begin, end = int(bounds[number]), int(bounds[number + 1])
            same = begin > 0 and pages[int(records.page[begin - 1])].stream == page.stream
            before = int(records.stamp[begin - 1]) if same else stream.last_time
            if records.lost[number] >= 0 and len(self._problems.gaps) < 10 * Limit.NOTES * 100:
                lost = int(records.lost[number]) or None
                after = int(records.stamp[begin]) if end > begin else None
                self._problems.gaps.append(Gap("lost-records", stream.cpu, before, after, page.offset, 0, lost))
                self._lost[stream.cpu] += lost or 0
            if records.bad[number] >= 0:
                inside = int(records.bad[number]) - number * stride
                used = int(records.used[number]) + self._head.page.data
                length = max(0, (used or int(sizes[number])) - inside)
                compressed = stream.buffer.compressed
                if page.offset + int(sizes[number]) == self._head.total and page.stream in self._cut:
                    self._problems.skipped += length  # the end of the file is told once
                    continue
                self._problems.damaged(
                    "tracedat-page",
                    f"cpu {stream.cpu}: the page's records do not add up after byte {inside}",
                    cpu=stream.cpu,
                    offset=page.offset + (0 if compressed else inside),
                    length=0 if compressed else length,
                    t0=int(records.stamp[end - 1]) if end > begin else before,
                )

    def _tables(
        self, batch: Batch, records: Records, order: Array, stream: Array, keys: Array | None, offset: Array
    ) -> dict[str, pa.Table]:
        """Tables by event of the records `order`, which are in global order."""
        if self._first is None and keys is not None:
            self._first = int(keys[0])
            self.clock = self._base.model(int(records.stamp[order[0]]))
        start, size = records.start[order], records.size[order]
        event = self._events.identify(batch, start, size)
        if self._options.only:
            wanted = self._events.wanted(event)
            order, start, size, event = order[wanted], start[wanted], size[wanted], event[wanted]
            stream, offset = stream[wanted], offset[wanted]
            keys = keys[wanted] if keys is not None else None
        rows = order.size
        by_event = np.argsort(event, kind="stable")
        start, size, stream = start[by_event], size[by_event], stream[by_event]
        cpu = np.array([s.cpu for s in self._streams], dtype=np.uint16)[stream]
        buffers = list(dict.fromkeys(s.buffer.name for s in self._streams))
        buffer = np.array([buffers.index(s.buffer.name) for s in self._streams], dtype=np.int16)[stream]
        if keys is None:
            t_ns, t_err = nulls(pa.int64(), rows), nulls(pa.uint32(), rows)
        else:
            assert self._first is not None
            t_ns = plain(pa.int64(), self._base.relative(keys, self._first)[by_event])
            t_err = plain(pa.uint32(), np.zeros(rows, dtype=np.uint32))
        common = [
            plain(pa.uint64(), by_event.astype(np.uint64) + np.uint64(self._seq)),
            t_ns,
            t_err,
            plain(pa.uint64(), records.stamp[order][by_event]),
            plain(pa.uint16(), cpu),
            constant(pa.dictionary(pa.int16(), pa.string()), self._options.source, rows),
            plain(pa.uint64(), offset[by_event].astype(np.uint64)),
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
