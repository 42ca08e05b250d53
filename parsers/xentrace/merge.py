"""Puts the records of all CPUs in one order, batch by batch, in bounded memory.

Every CPU's windows are one stream in storage order. A batch takes the windows that begin earliest, finds
the records in them and gives out those that no later window can precede; the rest is read again with the
next batch. A record's sort key is the running maximum of its CPU's stamps, so that a record without stamp
sorts with the one before it and a stamp that steps back keeps its place. Order: (key, cpu, place in stream).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parsers.xentrace.windows import RECORD_WORDS, Source, Windows

__all__ = ["BATCH_WORDS", "Batch", "Overrun", "batches", "find_records", "hop"]

BATCH_WORDS = 2 << 20  #: 8 MiB of words at a time
MIN_PIECE_WORDS = 1024
GUARD = max(RECORD_WORDS)  #: words between two windows in the buffer; no record reaches farther
FEW_LANES = 48  #: below this a plain loop is faster than NumPy stepping through all windows together
STEPS = bytes(RECORD_WORDS[top >> 4] for top in range(256))  #: record length by the header's top byte


@dataclass(frozen=True, slots=True)
class Overrun:
    """The end of a window that holds no whole record: [offset, offset + length)."""

    cpu: int
    offset: int
    length: int


@dataclass(slots=True)
class Batch:
    """Records in (cpu, place in stream) order; `words[pos]` is a record's header word.

    `key`: sort key; `error`: distance to the CPU's next stamp in ticks (0 if stamped), -1 if unknown;
    `timed`: False where the CPU has no stamp at all; `back`: stamped below the key.
    """

    words: NDArray[np.uint32]
    pos: NDArray[np.int64]
    head: NDArray[np.uint32]
    tsc: NDArray[np.uint64]
    key: NDArray[np.uint64]
    error: NDArray[np.int64]
    cpu: NDArray[np.uint16]
    offset: NDArray[np.uint64]
    untimed: NDArray[np.bool_] | None
    overruns: list[Overrun]
    done: int  # bytes of the recording consumed so far


def hop(steps: bytes, start: int, end: int) -> tuple[list[int], int]:
    """Positions of the records in words [start, end), one after the other, and where the last one ends."""
    found = []
    at = start
    while at < end:
        found.append(at)
        at += steps[at]
    return found, at


def find_records(
    words: NDArray[np.uint32], starts: NDArray[np.int64], ends: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of all records in the windows [starts, ends), ascending, and where each window's last one ends.

    Windows are separated by at least `GUARD` words. All windows step together while there are many of them.
    """
    raw = bytearray(words.view(np.uint8)[3::4].tobytes().translate(STEPS))
    steps = np.frombuffer(raw, np.uint8)
    guards = (ends[:, None] + np.arange(GUARD)).ravel()
    steps[guards] = 0  # whoever gets here stays
    mark = np.zeros(len(words), np.bool_)
    at = starts.copy()
    lanes = np.arange(len(starts))
    landed = starts.copy()
    while len(at) >= FEW_LANES:
        for _ in range(32):
            mark[at] = True
            at += steps[at]
        running = steps[at] != 0
        if not running.all():
            landed[lanes[~running]] = at[~running]
            at, lanes = at[running], lanes[running]
    if len(at):
        plain = bytes(raw)
        for lane, position in zip(lanes.tolist(), at.tolist(), strict=True):
            found, landed[lane] = hop(plain, position, int(ends[lane]))
            mark[found] = True
    mark[guards] = False
    return np.flatnonzero(mark), landed


#: No stamp, where the lowest of several is wanted.
NO_STAMP = (1 << 64) - 1
#: A stamp this far above a later one is damage and not skew (ticks; about 25 s).
SPIKE_TICKS = np.uint64(1 << 36)


@dataclass(slots=True)
class _Stream:
    """One CPU's windows and how far they have been given out."""

    cpu: int
    windows: list[int]  # indexes into Windows
    floors: list[int]
    next_stamp: list[int | None]  # first stamp in the windows from here on
    at: int = 0  # next window
    start: int = 0  # first word of it that was not given out
    key: int | None = None  # key of the last record given out
    floor: int | None = None  # exact key of the next record, once known

    def head(self) -> tuple[int, int] | None:
        if self.at >= len(self.windows):
            return None
        return (self.floors[self.at] if self.floor is None else self.floor), self.cpu


@dataclass(slots=True)
class _Piece:
    stream: _Stream
    slot: int  # index into stream.windows
    window: int
    start: int  # first word within the window
    words: int
    whole: bool  # reaches the window's end
    place: int = 0  # first word in the buffer


def spikes(stamps: NDArray[np.uint64], floor: int, following: int | None) -> NDArray[np.bool_]:
    """Stamps (0: none) of one CPU that cannot be true: far above later ones which fit what came before.

    `floor` is the last key before them, `following` the first stamp after them if known. A clock that was set back is
    not a spike: what follows it lies below `floor`, and order of storage is kept. Without this rule one damaged stamp
    would move all later records of its CPU to the end of time.
    """
    if not len(stamps):
        return np.zeros(0, np.bool_)
    ahead = np.where(stamps == 0, np.uint64(NO_STAMP), stamps)
    if following is not None:
        ahead = np.append(ahead, np.uint64(following))
    lowest = np.minimum.accumulate(ahead[::-1])[::-1][: len(stamps)]
    above = stamps > lowest
    if not above.any():
        return above
    above[above] = stamps[above] - lowest[above] > SPIKE_TICKS
    return above & (lowest >= np.uint64(floor))


def _streams(windows: Windows) -> dict[int, _Stream]:
    streams: dict[int, _Stream] = {}
    damaged: set[int] = set()
    for cpu in np.unique(windows.cpu).tolist():
        mine = np.flatnonzero(windows.cpu == cpu)
        damaged.update(mine[spikes(windows.first[mine], windows.first_stamp.get(cpu, 0), None)].tolist())
    order = np.argsort(windows.cpu, kind="stable")
    for index in order.tolist():
        cpu = int(windows.cpu[index])
        stream = streams.get(cpu)
        if stream is None:
            stream = streams[cpu] = _Stream(cpu, [], [], [])
        first = int(windows.first[index]) if index not in damaged else 0
        before = stream.floors[-1] if stream.floors else windows.first_stamp.get(cpu, 0)
        stream.windows.append(index)
        # A window that does not begin with a stamp may continue the one before.
        stream.floors.append(max(before, first) if windows.leads[index] else before)
    for stream in streams.values():
        upcoming: int | None = None
        stream.next_stamp = [None] * (len(stream.windows) + 1)
        for slot in range(len(stream.windows) - 1, -1, -1):
            window = stream.windows[slot]
            first = int(windows.first[window]) if window not in damaged else 0
            upcoming = first or upcoming
            stream.next_stamp[slot] = upcoming
    return streams


def batches(source: Source, windows: Windows, batch_words: int = BATCH_WORDS) -> Iterator[Batch]:
    """All records of all windows in batches: every record of a batch sorts before those of the next."""
    streams = _streams(windows)
    quantum = batch_words
    buffer = np.zeros(0, np.uint32)
    while True:
        heads = [head for stream in streams.values() if (head := stream.head()) is not None]
        if not heads:
            return
        heapq.heapify(heads)
        pieces = _choose(heads, streams, windows, batch_words, quantum)
        pieces.sort(key=lambda piece: (piece.stream.cpu, piece.slot))
        total = 0
        for piece in pieces:
            piece.place = total
            total += piece.words + GUARD
        if len(buffer) < total:
            buffer = np.zeros(total, np.uint32)
        words = buffer[:total]
        raw = memoryview(words.view(np.uint8))  # type: ignore[arg-type]
        for piece in sorted(pieces, key=lambda piece: piece.window):
            place = 4 * piece.place
            source.read_into(
                int(windows.offset[piece.window]) + 4 * piece.start, raw[place : place + 4 * piece.words]
            )
        batch, given = _cut(words, pieces, heads, windows)
        quantum = batch_words if 4 * given >= total else max(MIN_PIECE_WORDS, batch_words // len(streams))
        if batch is not None:
            yield batch


def _choose(
    heads: list[tuple[int, int]],
    streams: dict[int, _Stream],
    windows: Windows,
    batch_words: int,
    quantum: int,
) -> list[_Piece]:
    """Takes pieces of windows off the heap of heads until the batch is full. Partly read CPUs leave the heap."""
    pieces: list[_Piece] = []
    slots = {cpu: streams[cpu].at for _, cpu in heads}
    room = batch_words
    used: dict[int, int] = {}
    while heads and room > 0:
        _, cpu = heapq.heappop(heads)
        stream, slot = streams[cpu], slots[cpu]
        window = stream.windows[slot]
        start = stream.start if slot == stream.at else 0
        rest = int(windows.words[window]) - start
        take = min(rest, max(MIN_PIECE_WORDS, quantum - used.get(cpu, 0)))
        pieces.append(_Piece(stream, slot, window, start, take, take == rest))
        room -= take + GUARD
        used[cpu] = used.get(cpu, 0) + take
        if take == rest:
            slots[cpu] = slot + 1
            if slot + 1 < len(stream.windows):
                heapq.heappush(heads, (stream.floors[slot + 1], cpu))
    return pieces


def _cut(
    words: NDArray[np.uint32], pieces: list[_Piece], heads: list[tuple[int, int]], windows: Windows
) -> tuple[Batch | None, int]:
    """Finds the records of the pieces, decides which can be given out and moves the streams on."""
    starts = np.array([piece.place for piece in pieces], np.int64)
    ends = starts + np.array([piece.words for piece in pieces], np.int64)
    pos, landed = find_records(words, starts, ends)
    first = np.searchsorted(pos, starts)
    last = np.searchsorted(pos, ends)
    # A record that reaches beyond its piece is not there yet, or (in a whole window) never will be.
    last -= (landed > ends) & (last > first)
    if (landed > ends).any():
        keep = np.ones(len(pos), np.bool_)
        keep[last[landed > ends]] = False
        pos = pos[keep]
        first = np.searchsorted(pos, starts)
        last = np.searchsorted(pos, ends)
    head = words[pos]
    stamped = head >= 0x80000000
    low = words[np.minimum(pos + 1, len(words) - 1)]
    high = words[np.minimum(pos + 2, len(words) - 1)]
    tsc = low | (high.astype(np.uint64) << np.uint64(32))
    tsc[~stamped] = 0
    key = np.empty_like(tsc)

    groups: list[tuple[_Stream, int, int]] = []  # pieces [a, b) of each CPU
    begin = 0
    for index in range(1, len(pieces) + 1):
        if index == len(pieces) or pieces[index].stream is not pieces[begin].stream:
            groups.append((pieces[begin].stream, begin, index))
            begin = index

    # Window headers stand before the first record of their window, in time as well.
    fresh = np.array([piece.start == 0 for piece in pieces], np.bool_) & (last - first > 1)
    limits = dict.fromkeys((cpu for _, cpu in heads), 0)
    for floor, cpu_number in heads:
        limits[cpu_number] = floor
    for stream, a, b in groups:
        r0, r1 = int(first[a]), int(last[b - 1])
        if r1 == r0:
            continue
        floor = stream.key if stream.key is not None else windows.first_stamp.get(stream.cpu, 0)
        part = tsc[r0:r1]
        odd = spikes(part, floor, stream.next_stamp[pieces[b - 1].slot + 1])
        if odd.any():
            part = np.where(odd, np.uint64(0), part)
        np.maximum.accumulate(part, out=key[r0:r1])
        np.maximum(key[r0:r1], np.uint64(floor), out=key[r0:r1])
    lead = first[fresh]
    key[lead] = key[lead + 1]
    ready: list[int] = []
    for stream, a, b in groups:
        r0, r1 = int(first[a]), int(last[b - 1])
        if not pieces[b - 1].whole and r1 > r0:
            stamps = np.flatnonzero(stamped[r0:r1])
            if len(stamps) and int(stamps[-1]) + 1 < r1 - r0:
                r1 = r0 + int(stamps[-1]) + 1  # what follows waits for its next stamp
            limits[stream.cpu] = int(key[r1 - 1])
        elif stream.cpu in limits and r1 > r0:
            # What follows on this CPU sorts after this piece, whatever is known of the next window.
            limits[stream.cpu] = max(limits[stream.cpu], int(key[r1 - 1]))
        ready.append(r1)
    limit = min(((floor, number) for number, floor in limits.items()), default=None)

    chosen: list[NDArray[np.int64]] = []
    overruns: list[Overrun] = []
    errors: list[NDArray[np.int64]] = []
    untimed: list[NDArray[np.bool_]] = []
    given = done = 0
    for (stream, a, b), r1 in zip(groups, ready, strict=True):
        r0 = int(first[a])
        cut = r1
        if limit is not None:
            side = "right" if stream.cpu <= limit[1] else "left"
            cut = min(cut, r0 + int(np.searchsorted(key[r0:r1], np.uint64(limit[0]), side)))  # type: ignore[call-overload]
        chosen.append(np.arange(r0, cut))
        if cut > r0:
            errors.append(_errors(stream, pieces[b - 1], windows, key, stamped, r0, cut, int(last[b - 1])))
            untimed.append(np.full(cut - r0, stream.cpu not in windows.first_stamp))
        for index in range(a, b):
            piece = pieces[index]
            if cut < last[index] or not piece.whole:
                place = int(pos[cut]) if cut < last[index] else _resume(words, pos, first, last, index, piece)
                stream.at, stream.start = piece.slot, piece.start + place - piece.place
                stream.floor = int(key[cut]) if cut < last[index] else None
                if stream.floor is None and cut > r0:
                    stream.floor = int(key[cut - 1])
                given += place - piece.place
                break
            stream.at, stream.start, stream.floor = piece.slot + 1, 0, None
            given += piece.words
            if landed[index] > ends[index]:
                whole = _resume(words, pos, first, last, index, piece)
                rest = int(ends[index]) - whole
                there = int(windows.offset[piece.window]) + 4 * (piece.start + whole - piece.place)
                overruns.append(Overrun(stream.cpu, there, 4 * rest))
        if cut > r0:
            stream.key = int(key[cut - 1])
    pick = np.concatenate(chosen) if len(chosen) > 1 else chosen[0]
    if not len(pick) and not overruns:
        return None, given
    bases = np.array(
        [windows.offset[piece.window] + 4 * (piece.start - piece.place) for piece in pieces], np.int64
    )
    counts = last - first
    offset = (np.repeat(bases, counts) + 4 * pos).astype(np.uint64)
    cpu = np.repeat(np.array([piece.stream.cpu for piece in pieces], np.uint16), counts)
    flags = np.concatenate(untimed) if untimed else np.zeros(0, np.bool_)
    error = np.concatenate(errors) if errors else np.zeros(0, np.int64)
    if len(pick) == len(pos):
        done = 4 * given
        columns = (pos, head, tsc, key, error, cpu, offset)
    else:
        done = 4 * given
        columns = (pos[pick], head[pick], tsc[pick], key[pick], error, cpu[pick], offset[pick])
    return Batch(words, *columns, flags if flags.any() else None, overruns, done), given


def _resume(
    words: NDArray[np.uint32],
    pos: NDArray[np.int64],
    first: NDArray[np.int64],
    last: NDArray[np.int64],
    index: int,
    piece: _Piece,
) -> int:
    """Place in the buffer after the last whole record of a piece."""
    if last[index] == first[index]:
        return piece.place
    at = int(pos[last[index] - 1])
    return at + RECORD_WORDS[int(words[at]) >> 28]


def _errors(
    stream: _Stream,
    tail: _Piece,
    windows: Windows,
    key: NDArray[np.uint64],
    stamped: NDArray[np.bool_],
    r0: int,
    cut: int,
    end: int,
) -> NDArray[np.int64]:
    """For records [r0, cut) of a CPU: ticks to its next stamp, 0 where stamped, -1 where unknown."""
    error = np.zeros(cut - r0, np.int64)
    plain = np.flatnonzero(~stamped[r0:cut])
    if not len(plain):
        return error
    stamps = np.flatnonzero(stamped[r0:end])
    nearest = np.searchsorted(stamps, plain)
    known = nearest < len(stamps)
    upcoming = key[r0 + stamps[np.minimum(nearest, len(stamps) - 1)]] if len(stamps) else key[r0 + plain]
    gap = (upcoming - key[r0 + plain]).astype(np.int64)
    later = stream_next = None
    if tail.whole:
        stream_next = stream.next_stamp[tail.slot + 1]
    if stream_next is not None:
        later = np.maximum(np.uint64(stream_next), key[r0 + plain]) - key[r0 + plain]
    gap = np.where(known, gap, -1 if later is None else later.astype(np.int64))
    if stream.key is None:  # before the CPU's first stamp: earlier than the key, nobody knows how much
        gap[plain < (stamps[0] if len(stamps) else len(stamped))] = -1
    error[plain] = gap
    return error
