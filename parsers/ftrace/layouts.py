"""How a line of ftrace text is laid out: exact patterns for one line, and fixed columns for millions of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from parsers.ftrace.arrays import Array
from parsers.ftrace.swar import Text

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
    text = Text(data)
    limit = ends[rows]
    place = begin + 17
    stop = text.find(32, place, begin + (fast.tgid or bracket))
    pid, fine = text.decimal(place, stop)
    # nothing but blanks between the pid and what follows
    fine &= (data[begin + (fast.tgid or bracket) - 1] == 32) & (data[place] != 45) & (stop - place <= 9)
    cpu, valid = text.decimal(begin + bracket + 1, begin + bracket + 4)
    fine &= valid
    # the colon after the time: its place depends on how many digits the time has
    from_ = begin + after
    colon = text.find(58, from_, np.minimum(limit, from_ + 26))
    fine &= (colon < limit - 2) & (colon < from_ + 26) & (data[np.minimum(colon + 1, limit)] == 32)
    whole = colon - fast.dot - 1 if fast.dot else colon
    stamp, valid = text.padded(from_, whole)
    fine &= valid
    if fast.dot:
        part, valid = text.padded(colon - fast.dot, colon)
        fine &= valid & (data[whole] == 46) & (data[colon - fast.dot] != 32)
        stamp = stamp * np.uint64(10**fast.dot) + part
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
        Lines(
            rows[keep],
            begin[keep],
            pid[keep].astype(np.int64),
            tgid[keep],
            cpu[keep].astype(np.int64),
            flags[keep],
            stamp[keep].astype(np.int64),
            colon[keep] + 2,
        ),
        marks,
    )
