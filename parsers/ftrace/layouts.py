"""How a line of ftrace text is laid out: exact patterns for one line, and fixed columns for millions of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from parsers.ftrace.arrays import Array

__all__ = ["LAYOUTS", "Fast", "Layout", "Lines", "detect", "fixed_columns"]


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to print a line. `pattern` has groups comm, pid, cpu, ts, rest and maybe tgid, flags, src, system.

    `rounds`: printed time is rounded, not truncated. `fields`: the payload comes after blanks that only pad.
    """

    name: str
    pattern: re.Pattern[bytes]
    rounds: bool = False
    pads: bool = False
    micros: bool = False


FLAG = rb"[dDbX.][NnpBbLl.][^\s:]{2,6}"
#: Tried in this order; all of them read at most the first bytes of a line.
LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "kernel",
        re.compile(
            rb"(?P<comm>.{16}|.{0,40}?)-(?P<pid>\d{1,10}) +(?:\((?P<tgid>[ \d-]{5,7})\) )?\[(?P<cpu>\d{3,5})\] "
            rb"(?:(?P<flags>" + FLAG + rb") )? *(?P<ts>\d{1,12}\.\d{6}|\d{1,20}): (?P<rest>.*)",
            re.S,
        ),
    ),
    Layout(
        "report",
        re.compile(
            rb"(?:(?P<src>[^ :][^:]{0,80}?): +)?(?P<comm>.{16}|.{0,40}?)-(?P<pid>\d{1,10}) +\[(?P<cpu>\d{3,5})\] *"
            rb"(?P<ts>\d{1,12}\.\d{6,9}|\d{1,20}): +(?:\(\+?-?\d+\) +)?(?P<rest>.*)",
            re.S,
        ),
        rounds=True,
        pads=True,
    ),
    Layout(
        "latency",
        re.compile(
            rb"(?P<comm>.{8})-(?P<pid>\d{1,10}) +(?P<cpu>\d{1,5})(?P<flags>" + FLAG + rb") +"
            rb"(?P<ts>-?\d{1,18})us[ +!#*@$]: (?P<rest>.*)",
            re.S,
        ),
        micros=True,
    ),
    Layout(
        "latency-report",
        re.compile(
            rb"(?P<comm>.{8})-(?P<pid>\d{1,10}) +(?P<cpu>\d{1,5})(?P<flags>" + FLAG + rb") *"
            rb"(?P<ts>\d{1,12}\.\d{6,9}|\d{1,20}): +(?P<rest>.*)",
            re.S,
        ),
        rounds=True,
        pads=True,
    ),
    Layout(
        "perf",
        re.compile(
            rb" *(?P<comm>\S.{0,40}?) +(?P<pid>\d{1,10})(?:/(?P<tid>\d{1,10}))? +\[(?P<cpu>\d{3,5})\] +"
            rb"(?P<ts>\d{1,12}\.\d{6,9}): +(?:\d+ +)?(?P<system>[\w-]{1,64}):(?P<rest>[\w-]{1,128}: .*)",
            re.S,
        ),
        pads=True,
    ),
)


def detect(line: bytes, layouts: tuple[Layout, ...] = LAYOUTS) -> tuple[Layout, re.Match[bytes]] | None:
    """The first layout that fits."""
    for layout in layouts:
        match = layout.pattern.fullmatch(line)
        if match is not None:
            return layout, match
    return None


@dataclass(frozen=True, slots=True)
class Fast:
    """Byte columns of an undisturbed line: dash at 16, then pid, maybe tgid, `[cpu]`, maybe flags, time."""

    bracket: int
    tgid: int  # column of "(" or 0
    flags: int  # width or 0
    dot: int  # digits after the dot, 0 without a dot
    layout: Layout

    @classmethod
    def learn(cls, layout: Layout, match: re.Match[bytes]) -> Fast | None:
        """Columns from one good line; None when it is not laid out in columns."""
        groups = match.groupdict()
        if layout.name not in ("kernel", "report") or match.end("comm") != 16 or match.start("comm"):
            return None
        if groups.get("src") or len(match["cpu"]) != 3:
            return None
        stamp = match["ts"]
        dot = len(stamp) - stamp.index(b".") - 1 if b"." in stamp else 0
        tgid = match.start("tgid") - 1 if groups.get("tgid") else 0
        flags = len(match["flags"]) if groups.get("flags") else 0
        return cls(match.start("cpu") - 1, tgid, flags, dot, layout)


@dataclass(slots=True)
class Lines:
    """Columns of records: `row` is the line's index in the batch, `stamp` the printed digits as one number."""

    row: Array
    comm: Array  # start of the 16 bytes
    pid: Array
    tgid: Array  # -1: not shown
    cpu: Array
    flags: Array  # start of the flag word, -1 none
    stamp: Array
    rest: Array  # start of what follows "time: "


def _digits(data: Array, start: Array, width: int) -> tuple[Array, Array]:
    """A left-aligned number of up to `width` digits followed by blanks: (value, well formed)."""
    value = np.zeros(start.size, dtype=np.int64)
    open_ = np.ones(start.size, dtype=bool)
    good = np.ones(start.size, dtype=bool)
    for k in range(width):
        digit = data[start + k] - np.uint8(48)
        number = digit < 10
        open_ &= number
        good &= number | (data[start + k] == 32)
        good &= ~(number & ~open_)
        value = np.where(open_, value * 10 + digit, value)
    return value, good & (data[start] != 32)


def fixed_columns(data: Array, starts: Array, ends: Array, fast: Fast) -> tuple[Lines, Array]:
    """Records among the lines [starts, ends) that obey `fast`; the second array marks those lines."""
    bracket = fast.bracket
    after = bracket + 5 + (fast.flags + 2 if fast.flags else 0)
    rows = np.flatnonzero(ends - starts > after + 14)
    begin = starts[rows]
    good = (data[begin + 16] == 45) & (data[begin + bracket] == 91) & (data[begin + bracket + 4] == 93)
    if fast.flags:
        # the words' first column and the blanks around it tell a flag word from anything else
        good &= (data[begin + bracket + 5] == 32) & (data[begin + after - 1] == 32)
        good &= data[begin + bracket + 6] != 32
    rows, begin = rows[good], begin[good]
    width = (fast.tgid or bracket) - 17
    pid, fine = _digits(data, begin + 17, width)
    cpu = np.zeros(begin.size, dtype=np.int64)
    for k in (1, 2, 3):
        digit = data[begin + bracket + k] - np.uint8(48)
        fine &= digit < 10
        cpu = cpu * 10 + digit
    # the colon after the time: its place depends on how many digits the time has
    colon = np.full(begin.size, -1, dtype=np.int64)
    limit = ends[rows]
    for k in range(8, 26):
        missing = colon < 0
        if not missing.any():
            break
        place = np.minimum(begin + after + k, limit - 1)
        colon = np.where(missing & (data[place] == 58), place, colon)
    fine &= (colon >= 0) & (colon + 2 < limit)
    colon = np.where(fine, colon, begin + after + 12)
    stamp = np.zeros(begin.size, dtype=np.int64)
    scale = 1
    longest = int((colon - begin).max(initial=0)) - after
    for k in range(1, longest + 1):
        place = colon - k
        inside = place >= begin + after
        letter = data[np.maximum(place, 0)]
        if fast.dot and k == fast.dot + 1:
            fine &= letter == 46
            continue
        digit = letter - np.uint8(48)
        number = digit < 10
        fine &= number | (letter == 32) | ~inside
        if scale < 10**18:
            stamp += np.where(number & inside, digit, 0) * np.int64(scale)
        scale *= 10
    fine &= data[colon - 1] != 32
    tgid = np.full(begin.size, -1, dtype=np.int64)
    if fast.tgid:
        shown = data[begin + fast.tgid + 7] - np.uint8(48) < 10
        value = np.zeros(begin.size, dtype=np.int64)
        for k in range(1, 8):
            digit = data[begin + fast.tgid + k] - np.uint8(48)
            value = value * 10 + np.where(digit < 10, digit, 0)
        tgid = np.where(shown, value, -1)
        fine &= (data[begin + fast.tgid] == 40) & (data[begin + fast.tgid + 8] == 41)
    marks = np.zeros(starts.size, dtype=bool)
    marks[rows[fine]] = True
    flags = begin + bracket + 6 if fast.flags else np.full(begin.size, -1, dtype=np.int64)
    keep = fine
    return (
        Lines(rows[keep], begin[keep], pid[keep], tgid[keep], cpu[keep], flags[keep], stamp[keep], colon[keep] + 2),
        marks,
    )
