"""The TSC's frequency from the recording itself.

TRC_PM_IDLE_ENTRY/EXIT carry the low 32 bits of NOW() (ns) beside the stamp where the TSC never stops. NOW() is
one clock for the whole machine, so all these pairs lie on one line whose slope is ns per tick.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parsers.xentrace.boundaries import GUARD, MARGIN, find_records
from parsers.xentrace.windows import Source, Windows

__all__ = ["Fit", "Sample", "fit_clock", "take_sample"]

HEAD_WORDS = 512 << 10
STRIDED_WORDS = 1536 << 10
MORE_WORDS = 8 << 20
ENOUGH_PAIRS = 64
MAX_WINDOW_WORDS = 256 << 10
WRAP = 1 << 32
LEAST_PAIRS = 8
CPU_TOLERANCE = 50e-6  # slopes of CPUs on one TSC agree better than this
WORST_PPM = 1000.0  # a fit worse than this is none
LEAST_HZ, MOST_HZ = 0.2e9, 10e9
PM_TIMER_HZ = 3_579_545
#: Headers of idle entry and exit with their words and a stamp, under the ids since 4.2 and before.
ENTRY_HEADS = (0xC0801002, 0xC0802001)
EXIT_HEADS = (0xE0801003, 0xE0802002)


@dataclass(slots=True)
class Sample:
    """Part of a recording: the distinct header words in it, and its idle records as columns."""

    headers: list[int]
    tsc: NDArray[np.uint64]
    tick: NDArray[np.uint32]
    cpu: NDArray[np.int64]
    is_exit: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Fit:
    """`hz` None: nothing could be derived, `text` says why. `error_ppm` is an estimate of the error."""

    hz: float | None
    error_ppm: float | None
    pairs: int
    text: str


def take_sample(source: Source, windows: Windows) -> Sample:
    """Reads the first windows and some spread over the file: more of them if idle records are rare."""
    total = int(windows.words.sum())
    sample = _read(source, windows, HEAD_WORDS, STRIDED_WORDS)
    if len(sample.tsc) < ENOUGH_PAIRS and total > HEAD_WORDS + STRIDED_WORDS:
        sample = _read(source, windows, MORE_WORDS, MORE_WORDS // 2)
    return sample


def _read(source: Source, windows: Windows, head: int, strided: int) -> Sample:
    sizes = np.minimum(windows.words, MAX_WINDOW_WORDS)
    ends = np.cumsum(sizes + GUARD)
    front = max(1, int(np.searchsorted(ends, head, "right")))
    chosen = list(range(front))
    rest = int(ends[-1] - ends[front - 1])
    if rest:
        share = min(1.0, strided / rest)
        marks = np.floor((ends[front:] - ends[front - 1]) * share / np.maximum(1, sizes[front:].max() + GUARD))
        chosen += (front + np.flatnonzero(np.diff(marks, prepend=-1.0))).tolist() if share < 1 else []
        if share == 1:
            chosen += range(front, len(sizes))
    headers: set[int] = set()
    columns: list[tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.int64], NDArray[np.bool_]]] = []
    group: list[int] = []
    room = HEAD_WORDS
    for index in [*chosen, -1]:
        if index >= 0:
            group.append(index)
            room -= int(sizes[index]) + GUARD
        if group and (index < 0 or room <= 0):
            columns.append(_parse(source, windows, sizes, group, headers))
            group, room = [], HEAD_WORDS
    tsc, tick, cpu, is_exit = (np.concatenate(parts) for parts in zip(*columns, strict=True))
    order = np.argsort(tsc, kind="stable")
    return Sample(sorted(headers), tsc[order], tick[order], cpu[order], is_exit[order])


def _parse(
    source: Source, windows: Windows, sizes: NDArray[np.int64], group: list[int], headers: set[int]
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.int64], NDArray[np.bool_]]:
    lengths = sizes[group]
    ends = np.cumsum(lengths + GUARD) - GUARD
    starts = ends - lengths
    words = np.zeros(int(ends[-1]) + MARGIN, np.uint32)
    raw = memoryview(words.view(np.uint8))  # type: ignore[arg-type]
    for index, start, length in zip(group, starts.tolist(), lengths.tolist(), strict=True):
        source.read_into(int(windows.offset[index]), raw[4 * start : 4 * (start + length)])
    pos, landed = find_records(words, starts, ends)
    last = np.searchsorted(pos, ends) - 1
    whole = np.ones(len(pos), np.bool_)
    whole[last[landed > ends]] = False
    pos = pos[whole]
    head = words[pos]
    if len(headers) < 4096:
        headers.update(np.unique(head).tolist())
    is_exit = np.isin(head, np.array(EXIT_HEADS, np.uint32))
    idle = np.flatnonzero(is_exit | np.isin(head, np.array(ENTRY_HEADS, np.uint32)))
    at = pos[idle]
    tsc = words[at + 1].astype(np.uint64) | words[at + 2].astype(np.uint64) << np.uint64(32)
    cpu = windows.cpu[group][np.searchsorted(starts, at, "right") - 1]
    return tsc, words[at + 4], cpu, is_exit[idle]


def fit_clock(sample: Sample) -> Fit:
    """Fits ns = offset of the CPU + slope * ticks through the idle records.

    Entries are preferred: their tick is read right before the stamp. CPUs whose slope disagrees with the
    others (a TSC of their own) are left out. PM timer counts and anything else that is not ns is refused.
    """
    use = ~sample.is_exit
    if np.count_nonzero(use) < LEAST_PAIRS:
        use = np.ones(len(sample.tsc), np.bool_)
    tsc, tick, cpu = sample.tsc[use], sample.tick[use], sample.cpu[use]
    if len(tsc) < LEAST_PAIRS:
        return Fit(None, None, len(tsc), f"no frequency: {len(tsc)} idle records, {LEAST_PAIRS} are needed")
    x = (tsc - tsc.min()).astype(np.float64)
    rough = _rough_slope(x, tick, cpu)
    if rough is None or not LEAST_HZ <= 1e9 / rough <= MOST_HZ:
        what = "the ticks of idle records are not ns"
        if int(tick.max()) < 1 << 24 or (rough and 1e9 / rough > MOST_HZ):
            what += f" (ACPI PM timer counts at {PM_TIMER_HZ} Hz?)"
        return Fit(None, None, len(tsc), f"no frequency: {what}")
    slopes = {
        number: _line(x[mine], tick[mine], cpu[mine], rough)
        for number in np.unique(cpu).tolist()
        if np.count_nonzero(mine := cpu == number) >= LEAST_PAIRS
    }
    odd: list[int] = []
    if len(slopes) > 1:
        middle = float(np.median([slope for slope, _, _ in slopes.values()]))
        odd = [
            number
            for number, (slope, error, _) in slopes.items()
            if abs(slope - middle) > middle * CPU_TOLERANCE + 8 * error
        ]
        keep = ~np.isin(cpu, odd)
        if 0 < np.count_nonzero(keep) < len(keep):
            x, tick, cpu = x[keep], tick[keep], cpu[keep]
    slope, error, used = _line(x, tick, cpu, rough)
    hz = 1e9 / slope
    ppm = error / slope * 1e6
    if not LEAST_HZ <= hz <= MOST_HZ or not ppm < WORST_PPM:
        return Fit(None, None, len(x), "no frequency: the ticks of idle records do not lie on a line")
    text = f"{hz / 1e6:.3f} MHz from {used} of {len(tsc)} idle records, +-{ppm:.2g} ppm"
    if odd:
        text += f"; without CPU {', '.join(map(str, odd))}, which disagree"
    return Fit(hz, ppm, used, text)


def _rough_slope(x: NDArray[np.float64], tick: NDArray[np.uint32], cpu: NDArray[np.int64]) -> float | None:
    """Median of ns per tick between neighbours on one CPU; only the nearer half, which cannot have wrapped."""
    order = np.lexsort((x, cpu))
    step = np.diff(x[order])
    rise = np.diff(tick[order]).astype(np.float64)  # uint32 arithmetic wraps like the tick does
    same = (np.diff(cpu[order]) == 0) & (step > 0)
    if not same.any():
        return None
    near = same & (step <= np.median(step[same]))
    return float(np.median(rise[near] / step[near])) or None


def _line(
    x: NDArray[np.float64], tick: NDArray[np.uint32], cpu: NDArray[np.int64], slope: float
) -> tuple[float, float, int]:
    """(slope, its standard error, pairs used): the ticks are unwrapped over growing spans from the start."""
    error, used = np.inf, 0
    span = 0.5e9 / slope
    end = float(x[-1])
    while True:
        inside = x <= span
        if np.count_nonzero(inside) >= 4:
            left, right = x[inside], cpu[inside]
            rest = tick[inside] - slope * left
            rest = (rest - rest[0] + WRAP / 2) % WRAP - WRAP / 2
            bend, error, used = _trimmed(left, rest, right)
            slope += bend
        if span >= end:
            return slope, error, used
        span *= 8


def _trimmed(
    x: NDArray[np.float64], y: NDArray[np.float64], cpu: NDArray[np.int64]
) -> tuple[float, float, int]:
    """Slope of y over x with an offset for each CPU, without outliers; its standard error; points used.

    Outliers are late stamps: an interrupt or a preempted host between reading NOW() and the stamp.
    """
    _, number = np.unique(cpu, return_inverse=True)
    keep = np.ones(len(x), np.bool_)
    slope, sigma, spread = 0.0, np.inf, 0.0
    for _ in range(8):
        weight = np.maximum(1, np.bincount(number[keep], minlength=number.max() + 1))
        mean_x = np.bincount(number[keep], x[keep], len(weight)) / weight
        mean_y = np.bincount(number[keep], y[keep], len(weight)) / weight
        dx, dy = x - mean_x[number], y - mean_y[number]
        spread = float((dx[keep] ** 2).sum())
        if not spread:
            return 0.0, np.inf, 0
        slope = float((dx[keep] * dy[keep]).sum()) / spread
        rest = dy - slope * dx
        for group in range(len(weight)):
            mine = number == group
            rest[mine] -= np.median(rest[mine])
        sigma = max(1.4826 * float(np.median(np.abs(rest))), 1.0)
        keep = np.abs(rest) <= 3 * sigma
    used = int(np.count_nonzero(keep))
    return slope, sigma / float(np.sqrt(spread)), used
