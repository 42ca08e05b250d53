"""Find every record of many ring-buffer pages at once: all pages step from record to record together.

Record header (kernel/trace/ring_buffer.c): 5 bits type_len, 27 bits time delta.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from parsers.tracedat.formats import PageHeader

__all__ = ["Array", "Records", "walk"]

Array = npt.NDArray[Any]

DATA_LONG, PADDING, TIME_EXTEND, TIME_STAMP = 0, 29, 30, 31
COMMIT_MASK, COMMIT_LOST, COMMIT_STORED = (1 << 27) - 1, 1 << 31, 1 << 30
#: Bytes to the next record by type_len; those of 0 and 29 depend on the word that follows.
STEP = np.array([0, *(4 + 4 * n for n in range(1, 29)), 0, 8, 8], dtype=np.int64)


@dataclass(slots=True)
class Records:
    """Data records of a batch in page order, then position.

    `start`, `size` (bytes, payload in the batch), `stamp` (u64 ticks), `page` (index). Per page: `lost` (-1 none,
    0 not counted, else the number), `bad` (batch offset where a page stops to make sense, -1 none), `used` (bytes).
    """

    start: Array
    size: Array
    stamp: Array
    page: Array
    lost: Array
    bad: Array
    used: Array

    def chosen(self, parts: list[slice]) -> Records:
        """Some of the records; what is said of pages stays."""

        def of(column: Array) -> Array:
            return np.concatenate([column[part] for part in parts])

        return Records(of(self.start), of(self.size), of(self.stamp), of(self.page), self.lost, self.bad, self.used)


def walk(
    batch: Array, base: Array, page_sizes: Array, header: PageHeader, order: str, short: Array | None = None
) -> Records:
    """Walk the pages that begin at `base` (ascending multiples of 8) in `batch` (uint8, a multiple of 4 bytes long).

    `short` flags pages that the file ends in: the records that are whole are good.
    """
    words = batch.view(f"{order}u4")
    pages = base.size
    stamps = _u64(words, base >> 2, order)
    high = order == ">" and header.commit_size == 8
    commit = words[(base + header.commit + (4 if high else 0)) >> 2].astype(np.int64)
    used = commit & COMMIT_MASK
    bad = np.full(pages, -1, dtype=np.int64)
    if short is not None:
        used = np.where(short, np.minimum(used, np.maximum(page_sizes - header.data, 0)), used)
    too_long = used > page_sizes - header.data
    bad[too_long] = base[too_long] + header.data
    used[too_long] = 0
    end = base + header.data + used
    lost = _lost(words, commit, base, end, page_sizes, header, order)
    marks = _mark(words, base + header.data, end, bad, order)
    at = np.flatnonzero(marks) << 2
    return _stamp(words, at, stamps, base, order, lost, bad, used)


def _u64(words: Array, index: Array, order: str) -> Array:
    low, high = (index, index + 1) if order == "<" else (index + 1, index)
    value: Array = words[low].astype(np.uint64) | words[high].astype(np.uint64) << np.uint64(32)
    return value


def _lost(
    words: Array, commit: Array, base: Array, end: Array, page_sizes: Array, header: PageHeader, order: str
) -> Array:
    """Lost records before each page; the count follows the used data if flagged so and if there is room."""
    lost = np.where(commit & COMMIT_LOST, 0, -1)
    room = end + header.commit_size <= base + page_sizes
    stored = np.flatnonzero((commit & COMMIT_LOST > 0) & (commit & COMMIT_STORED > 0) & room & (end % 4 == 0))
    if stored.size:
        index = end[stored] >> 2
        counts = _u64(words, index, order) if header.commit_size == 8 else words[index]
        lost[stored] = np.minimum(counts, np.uint64(1 << 62)).astype(np.int64)
    return lost


def _mark(words: Array, position: Array, end: Array, bad: Array, order: str) -> Array:
    """A flag for each 4-byte word of the batch that starts a record; fills `bad` for pages that do not add up."""
    marks = np.zeros(words.size, dtype=bool)
    shift, mask = (0, 31) if order == "<" else (27, 31)
    page = np.flatnonzero(position + 4 <= end)
    position, end = position[page], end[page]
    while page.size:
        index = position >> 2
        word = words[index]
        kind = (word >> np.uint32(shift)) & np.uint32(mask) if shift else word & np.uint32(mask)
        step = STEP[kind]
        special = np.flatnonzero(step == 0)
        if special.size:
            after = words[np.minimum(index[special] + 1, words.size - 1)].astype(np.int64)
            here = word[special]
            delta = here >> np.uint32(5) if order == "<" else here & np.uint32(0x07FFFFFF)
            rest = end[special] - position[special]
            is_data = kind[special] == DATA_LONG
            # data: total 4 + L; padding without a delta fills the page, else it skips 4 + L
            step[special] = np.where(~is_data & (delta == 0), rest, 4 + after)
            broken = (is_data & (after < 4)) | (rest < 8) & (is_data | (delta != 0)) | (step[special] & 3 != 0)
            step[special[broken]] = 1 << 40
        following = position + step
        over = following > end
        if over.any():
            bad[page[over]] = position[over]
            keep = ~over
            marks[index[keep]] = True
        else:
            marks[index] = True
        alive = following + 4 <= end
        if alive.all():
            position = following
        else:
            page, position, end = page[alive], following[alive], end[alive]
    return marks


def _stamp(
    words: Array, at: Array, stamps: Array, base: Array, order: str, lost: Array, bad: Array, used: Array
) -> Records:
    """Times of all records by one running sum that restarts at each page and at each absolute stamp."""
    word = words[at >> 2]
    if order == "<":
        kind, delta = word & np.uint32(31), (word >> np.uint32(5)).astype(np.uint64)
    else:
        kind, delta = word >> np.uint32(27), (word & np.uint32(0x07FFFFFF)).astype(np.uint64)
    edges = np.append(np.searchsorted(at, base), at.size)
    per_page = np.diff(edges)
    page = np.repeat(np.arange(base.size, dtype=np.int32), per_page)
    extended = np.flatnonzero(kind >= TIME_EXTEND)
    high = words[(at[extended] >> 2) + 1].astype(np.uint64) << np.uint64(27)
    delta[extended] += high
    absolute = extended[kind[extended] == TIME_STAMP]
    starts = edges[:-1][per_page > 0]
    total = np.cumsum(delta)
    if not absolute.size:
        stamp = total + np.repeat(stamps[page[starts]] - (total[starts] - delta[starts]), per_page[per_page > 0])
    else:
        anchor = np.zeros(at.size, dtype=np.uint64)
        anchor[starts] = stamps[page[starts]] - (total[starts] - delta[starts])
        # 59 bits are stored; the missing top bits are the page's
        top = stamps[page[absolute]] & ~np.uint64((1 << 59) - 1)
        value = delta[absolute] | top
        value[value + np.uint64(1 << 58) < stamps[page[absolute]]] += np.uint64(1 << 59)
        anchor[absolute] = value - total[absolute]
        starts = np.union1d(starts, absolute)
        runs = np.diff(np.append(starts, at.size))
        stamp = total + np.repeat(anchor[starts], runs)
    data = np.flatnonzero(kind < PADDING)
    kind, at = kind[data], at[data]
    start, size = at + 4, kind.astype(np.int64) << 2
    long = np.flatnonzero(kind == DATA_LONG)
    size[long] = words[(at[long] >> 2) + 1].astype(np.int64) - 4
    start[long] += 4
    return Records(start, size, stamp[data], page[data], lost, bad, used)
