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

from parsers.xentrace.boundaries import GUARD, MARGIN, find_records
from parsers.xentrace.stamps import spikes
from parsers.xentrace.streams import Stream, streams_of
from parsers.xentrace.windows import RECORD_WORDS, Source, Windows

__all__ = ["Batch", "Overrun", "batches"]

#: Words at a time. With more a batch's fixed cost counts less, but each `1 << 20` of them take 30 to 60 MiB until they
#: are stored; of a recording beyond LONG_BYTES fewer are taken, for whoever stores one that long needs the memory.
BATCH_WORDS, LONG_BATCH_WORDS = 3 << 20, 1 << 20
LONG_BYTES = 2 << 30
MIN_PIECE_WORDS = 1024


@dataclass(frozen=True, slots=True)
class Overrun:
    """The end of a window that holds no whole record: [offset, offset + length)."""

    cpu: int
    offset: int
    length: int


@dataclass(slots=True)
class Batch:
    """Records in (cpu, place in stream) order; `words[pos]` is a record's header word.

    The columns cover all records that were found; `chosen` are the indexes of those that belong to this batch (None:
    all of them), `count` their number. `tsc` is 0 and `key` the sort key where there is no stamp. `odd`: indexes of
    stamped records whose stamp is not their key. Of those and the records without stamp, `late` are the indexes and
    `late_ticks` the distance to the CPU's next key that is a stamp, -1 if unknown. `untimed`: True where the CPU has no
    stamp at all, None if nowhere.
    """

    words: NDArray[np.uint32]
    pos: NDArray[np.int64]
    head: NDArray[np.uint32]
    tsc: NDArray[np.uint64]
    key: NDArray[np.uint64]
    cpu: NDArray[np.uint16]
    offset: NDArray[np.uint64]
    chosen: NDArray[np.int64] | None
    count: int
    late: NDArray[np.int64]
    late_ticks: NDArray[np.int64]
    odd: NDArray[np.int64]
    untimed: NDArray[np.bool_] | None
    last: dict[int, int]  # key of the last record of each CPU
    overruns: list[Overrun]
    done: int  # bytes of the recording consumed by this batch


@dataclass(slots=True)
class _Piece:
    stream: Stream
    slot: int  # index into stream.windows
    window: int
    start: int  # first word within the window
    words: int
    whole: bool  # reaches the window's end
    place: int = 0  # first word in the buffer


def batches(source: Source, windows: Windows, batch_words: int | None = None) -> Iterator[Batch]:
    """All records of all windows in batches: every record of a batch sorts before those of the next."""
    if batch_words is None:
        batch_words = BATCH_WORDS if source.size <= LONG_BYTES else LONG_BATCH_WORDS
    streams = streams_of(windows)
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
        if len(buffer) < total + MARGIN:
            buffer = np.zeros(total + MARGIN, np.uint32)
        words = buffer[: total + MARGIN]
        raw = memoryview(words.view(np.uint8))  # type: ignore[arg-type]
        for piece in sorted(pieces, key=lambda piece: piece.window):
            place = 4 * piece.place
            source.read_into(
                int(windows.offset[piece.window]) + 4 * piece.start, raw[place : place + 4 * piece.words]
            )
        batch, given = _cut(words, pieces, heads, windows)
        quantum = batch_words if 4 * given >= total else max(MIN_PIECE_WORDS, batch_words // len(streams))
        if batch is not None:
            handed = [batch]
            del batch  # the caller decides how long it lives
            yield handed.pop()


def _choose(
    heads: list[tuple[int, int]],
    streams: dict[int, Stream],
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
    head = words.take(pos)
    stamped = head >= np.uint32(0x80000000)
    bare = np.flatnonzero(~stamped)
    tsc = _stamps(words, pos)
    tsc[bare] = 0
    key = np.empty_like(tsc)

    groups: list[tuple[Stream, int, int]] = []  # pieces [a, b) of each CPU
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
    odd: list[NDArray[np.int64]] = []
    for stream, a, b in groups:
        r0, r1 = int(first[a]), int(last[b - 1])
        if r1 > r0:
            floor = windows.origin if stream.key is None else stream.key
            following = stream.next_stamp(pieces[b - 1].slot + 1)
            odd.append(r0 + _keys(tsc[r0:r1], stamped[r0:r1], key[r0:r1], floor, following))
            if stream.key is None:
                _lead(tsc[r0:r1], stamped[r0:r1], key[r0:r1], windows.first_stamp.get(stream.cpu, 0))
    lead = first[fresh]
    key[lead] = key[lead + 1]
    strange = np.concatenate([np.zeros(0, np.int64), *odd])
    if len(strange):
        bare = np.union1d(bare, strange)
    stamped_after = _next_stamped(bare)
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

    chosen: list[tuple[int, int]] = []
    overruns: list[Overrun] = []
    late: list[NDArray[np.int64]] = []
    late_ticks: list[NDArray[np.int64]] = []
    untimed: NDArray[np.bool_] | None = None
    latest: dict[int, int] = {}
    given = 0
    for (stream, a, b), r1 in zip(groups, ready, strict=True):
        r0 = int(first[a])
        cut = r1
        if limit is not None:
            side = "right" if stream.cpu <= limit[1] else "left"
            cut = min(cut, r0 + int(np.searchsorted(key[r0:r1], np.uint64(limit[0]), side)))  # type: ignore[call-overload]
        if cut > r0:
            chosen.append((r0, cut))
            some = slice(*np.searchsorted(bare, (r0, cut)).tolist())
            late.append(bare[some])
            after = stamped_after[some]
            late_ticks.append(_lateness(stream, pieces[b - 1], key, bare[some], after, r0, int(last[b - 1])))
            if stream.cpu not in windows.first_stamp:
                untimed = np.zeros(len(pos), np.bool_) if untimed is None else untimed
                untimed[r0:cut] = True
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
            stream.key = latest[stream.cpu] = int(key[cut - 1])
    count = sum(b - a for a, b in chosen)
    if not count and not overruns:
        return None, given
    bases = np.array(
        [windows.offset[piece.window] + 4 * (piece.start - piece.place) for piece in pieces], np.int64
    )
    counts = last - first
    offset = np.repeat(bases, counts)
    offset += 4 * pos
    cpu = np.repeat(np.array([piece.stream.cpu for piece in pieces], np.uint16), counts)
    picked = None if count == len(pos) else np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in chosen)])
    none = np.zeros(0, np.int64)
    if picked is not None and len(strange):
        strange = strange[np.isin(strange, picked)]
    return Batch(
        words, pos, head, tsc, key, cpu, offset.view(np.uint64), picked, count,
        np.concatenate([none, *late]), np.concatenate([none, *late_ticks]), strange,
        untimed, latest, overruns, 4 * given,
    ), given  # fmt: skip


def _stamps(words: NDArray[np.uint32], pos: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The two words after each header as one number."""
    wide = np.empty((len(pos), 2), np.uint32)
    wide[:, 0] = words[1:].take(pos)
    wide[:, 1] = words[2:].take(pos)
    return wide.view(np.uint64)[:, 0]


def _keys(
    tsc: NDArray[np.uint64],
    stamped: NDArray[np.bool_],
    key: NDArray[np.uint64],
    floor: int,
    following: int | None,
) -> NDArray[np.int64]:
    """Fill in the sort keys of a CPU's records; returns which stamps are not their key."""
    np.maximum.accumulate(tsc, out=key)
    if int(key[0]) < floor:
        np.maximum(key, np.uint64(floor), out=key)
    odd = np.flatnonzero(tsc != key)
    odd = odd[stamped[odd]]
    if len(odd) or (following is not None and following < int(key[-1])):
        bad = spikes(tsc, floor, following)
        if bad.any():
            np.maximum.accumulate(np.where(bad, np.uint64(0), tsc), out=key)
            np.maximum(key, np.uint64(floor), out=key)
            odd = np.flatnonzero((tsc != key) & stamped)
    return odd


def _lead(tsc: NDArray[np.uint64], stamped: NDArray[np.bool_], key: NDArray[np.uint64], otherwise: int) -> None:
    """Records before a CPU's first true stamp sort with it."""
    own = stamped & (tsc == key)
    first = int(own.argmax())
    key[: first if own[first] else len(key)] = key[first] if own[first] else otherwise


def _next_stamped(bare: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each record without true stamp (ascending) the first index after it that is not of such a record."""
    if not len(bare):
        return bare
    ends = np.append(np.flatnonzero(np.diff(bare) != 1), len(bare) - 1)
    return np.repeat(bare[ends] + 1, np.diff(ends, prepend=-1))


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


def _lateness(
    stream: Stream,
    tail: _Piece,
    key: NDArray[np.uint64],
    bare: NDArray[np.int64],
    after: NDArray[np.int64],
    r0: int,
    end: int,
) -> NDArray[np.int64]:
    """For the records `bare` of a CPU, which have no true stamp: ticks to its next one, -1 where unknown.

    `after` is the stamped record after each, if below `end`; the CPU's records begin at `r0`.
    """
    if not len(bare):
        return bare
    own = key[bare]
    known = after < end
    gap = (key[np.minimum(after, end - 1)] - own).astype(np.int64)
    if not known.all():
        following = stream.next_stamp(tail.slot + 1) if tail.whole else None
        later = -1 if following is None else (np.maximum(np.uint64(following), own) - own).astype(np.int64)
        gap = np.where(known, gap, later)
    if stream.key is None and bare[0] == r0:  # before the CPU's first stamp: nobody knows how much earlier
        gap[bare < after[0]] = -1
    return gap
