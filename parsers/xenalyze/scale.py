"""The frequency at which xenalyze printed its times, found from the dump itself."""

from __future__ import annotations

import re
from itertools import pairwise
from statistics import median

__all__ = ["printed_scale", "scale_of"]

#: `irq_handled irq N DURATION (START,END)`: END is the low half of the TSC just before the record's own stamp.
_HANDLED = re.compile(
    rb"^.(?: {14}| *(\d{1,7})\.(\d{9})) .{1,256}? irq_handled irq [0-9a-f]+ -?\d+ \(-?\d+,(-?\d+)\)", re.M
)
_FEWEST = 8
_WINDOW_NS = 300_000_000  # the low half wraps after 0.8 s at 5 GHz
_LONGEST_NS = 10_000_000_000


def scale_of(hz: float) -> int:
    """xenalyze's integer for a frequency: ns = (cycles << 10) / scale."""
    return int((int(hz) << 10) / 1e9)


def printed_scale(head: bytes) -> int | None:
    """The integer scale of a dump, or None if its head has too few interrupt records to tell.

    First from neighbours (no wrap possible), then sharpened over the whole head, wraps counted with the first estimate.
    """
    found = [
        (int(s or 0) * 1_000_000_000 + int(ns or 0), int(end) & 0xFFFFFFFF) for s, ns, end in _HANDLED.findall(head)
    ]
    near = [
        ((end - end0) % (1 << 32)) / (ns - ns0)
        for (ns0, end0), (ns, end) in pairwise(found)
        if 100_000 < ns - ns0 < _WINDOW_NS
    ]
    if len(near) < _FEWEST:
        return None
    rate = median(near)
    ns0, end0 = found[0]
    sharp: list[float] = []
    total, last_ns, last_end = 0, ns0, end0
    for ns, end in found[1:]:
        if not 0 < ns - last_ns < _LONGEST_NS:
            continue
        wraps = round(((ns - last_ns) * rate - (end - last_end)) / (1 << 32))
        total += end - last_end + (wraps << 32)
        last_ns, last_end = ns, end
        if ns - ns0 > _WINDOW_NS:
            sharp.append(total / (ns - ns0))
    scale = median(sharp or near) * 1024
    return round(scale) if 500 < scale < 20_000 and abs(scale - round(scale)) < 0.2 else None
