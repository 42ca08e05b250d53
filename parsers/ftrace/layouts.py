"""How a line of ftrace text is laid out: exact patterns for one line, and fixed columns for millions of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array
from parsers.ftrace.swar import Text

__all__ = [
    "BARE", "FEWEST_LINES", "LAYOUTS", "MOST_TEMPLATES", "PLAIN", "Fast", "Layout", "Lines", "detect", "fixed_columns",
    "named", "stamp_of",
]  # fmt: skip


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
WORD = re.compile(FLAG)
VERBOSE = (
    rb"(?P<comm>.{16}) +(?P<pid>\d{1,10}) +(?P<cpu>\d{1,5}) (?P<vflags>\d{1,3}) (?P<vpreempt>[0-9a-f]{8}) "
    rb"[0-9a-f]{8,16} \[(?P<xts>[0-9a-f]{8,16})\] "
)
#: What `raw` and `hex` print of an event: its type's number for most, two or three words for the rest.
RAW = rb"type: \d+|# [0-9a-f]+ .*|[A-Za-z_]\w*: .*|[0-9a-f]{2,16}(?: [0-9a-f]{2,16}){1,3} *"
#: Layouts that are too plain to be told from one line.
PLAIN = frozenset({"raw", "hex", "bare"})
#: A line without any context (`nocontext-info`): an event, a function, the head of a stack trace.
BARE = re.compile(
    rb"(?P<name>[A-Za-z_][\w.-]{0,127})(?:\+0x[0-9a-f]+/0x[0-9a-f]+)?: (?P<payload>.*)|\S{1,200} <-\S{1,200}|"
    rb" ?<(?:user )?stack trace ?>",
    re.S,
)
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
    # with the option `verbose`: flags in decimal, depth, sequence, and the time in hexadecimal (us, or ticks)
    Layout("verbose", re.compile(VERBOSE + rb"-?\d+\.\d+ms \(\+-?\d+\.\d+ms\): (?P<rest>.*)", re.S), micros=True),
    Layout("verbose-ticks", re.compile(VERBOSE + rb"-?\d+ \(\+-?\d+\): (?P<rest>.*)", re.S)),
    # with the options `raw` and `hex`: no task name
    Layout(
        "raw",
        re.compile(rb"(?P<comm>)(?P<pid>\d{1,10}) (?P<cpu>\d{1,5}) (?P<ts>\d{4,20}) (?P<rest>" + RAW + rb")", re.S),
    ),
    Layout(
        "hex",
        re.compile(
            rb"(?P<comm>)(?P<xpid>[0-9a-f]{8}) (?P<xcpu>[0-9a-f]{8}) (?P<xts>[0-9a-f]{4,16}) "
            rb"(?P<rest>(?:" + RAW + rb")?)",
            re.S,
        ),
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


def stamp_of(match: re.Match[bytes]) -> bytes:
    """The stamp of a line in decimal digits, maybe with a dot."""
    groups = match.groupdict()
    return b"%d" % int(groups["xts"], 16) if groups.get("xts") else groups["ts"]


def detect(line: bytes, layouts: tuple[Layout, ...] = LAYOUTS) -> tuple[Layout, re.Match[bytes]] | None:
    """The first layout that fits."""
    for layout in layouts:
        match = layout.pattern.fullmatch(line)
        if match is not None:
            return layout, match
    return None


#: What stands before the flag word or the time.
HEAD = re.compile(rb"(.{16})-(\d{1,10}) +(?:\(([ \d-]{5,7})\) )?\[(\d{3,5})\]", re.S)
#: A layout learned from a line: so many are kept, and so many lines must be left for another to be learned.
MOST_TEMPLATES, FEWEST_LINES = 8, 64
#: Bytes before the colon behind the time, at most: lines are read beyond their end, but not beyond the spare bytes.
WIDEST = 96


@dataclass(frozen=True, slots=True)
class Fast:
    """Byte columns of a line: dash at 16, then pid, maybe tgid, `[cpu]`, maybe flags, time, ": "."""

    head: int  # bytes up to and with the bracket that closes the CPU
    flags: int  # width or 0
    dot: int  # digits after the dot, 0 without a dot
    colon: int
    layout: Layout

    @classmethod
    def learn(cls, layout: Layout, match: re.Match[bytes]) -> Fast | None:
        """Columns from one good line; None when it is not laid out in columns."""
        groups = match.groupdict()
        if layout.name not in ("kernel", "report") or match.end("comm") != 16 or match.start("comm"):
            return None
        stamp = match["ts"]
        if groups.get("src") or len(stamp) > 16 or match.end("ts") > WIDEST:
            return None
        dot = len(stamp) - stamp.index(b".") - 1 if b"." in stamp else 0
        flags = len(match["flags"]) if groups.get("flags") else 0
        return cls(match.end("cpu") + 1, flags, dot, match.end("ts"), layout)

    @property
    def after(self) -> int:
        """Where the time begins, blanks on its left included."""
        return self.head + (self.flags + 2 if self.flags else 0)

    def literals(self) -> list[tuple[int, bytes]]:
        """What is the same in every line, with its column."""
        found = [(16, b"-"), (self.head - 1, b"]"), (self.colon, b": ")]
        if self.flags:
            found.append((self.after - 1, b" "))
        if self.layout.name == "kernel":
            found.append((self.head, b" "))
        if self.dot:
            found.append((self.colon - self.dot - 1, b"."))
        return found


@dataclass(slots=True)
class Lines:
    """Columns of records: `row` is the line's index in the batch, `stamp` the printed digits as one number.

    `head` and `word` are indices into `heads` (what `HEAD` matches) and `words` (flag words; empty without).
    """

    row: Array
    head: Array
    heads: list[re.Match[bytes]]
    word: Array
    words: list[bytes]
    stamp: Array
    rest: Array  # start of what follows "time: "


def fixed_columns(data: Array, starts: Array, ends: Array, rows: Array, fast: Fast) -> tuple[Lines | None, Array]:
    """Records among the lines `rows` of [starts, ends) that obey `fast`, and the lines that do not."""
    begin, width = starts[rows], fast.colon + 2
    if not rows.size:
        return None, rows
    text, at = Text(data).beginnings(begin, width)
    fits = ends[rows] - begin > width
    fits &= text.fits(at, fast.literals())
    if not fits.any():
        return None, rows
    if not fits.all():
        begin, at = begin[fits], at[fits]
    fine = np.ones(begin.size, dtype=bool)
    head, raw = _encoded(text.data, at, fast.head)
    heads = [HEAD.fullmatch(value) for value in raw]
    sane = [m is not None and int(m[2]) <= 0x7FFFFFFF and int(m[4]) <= 0xFFFF for m in heads]
    fine &= np.array(sane, dtype=bool)[head]
    word, words = np.zeros(0, dtype=np.int32), list[bytes]()
    if fast.flags:
        word, words = _encoded(text.data, at + fast.head + 1, fast.flags)
        fine &= np.array([WORD.fullmatch(value) is not None for value in words], dtype=bool)[word]
    whole = fast.colon - fast.dot - 1 if fast.dot else fast.colon
    stamp, valid = text.fixed(at + fast.after, whole - fast.after)
    fine &= valid
    if fast.dot:
        part, valid = text.fixed(at + (whole + 1), fast.dot)
        fine &= valid & (text.data[at + (whole + 1)] != 32)
        stamp = stamp * np.uint64(10**fast.dot) + part
    good = [match for match in heads if match is not None]
    if len(good) < len(heads):
        head = (np.cumsum(sane) - 1).astype(np.int32)[head]
        good = [match for match, is_sane in zip(heads, sane, strict=True) if match is not None and is_sane]
    taken = rows if fits.all() else rows[fits]
    if not fine.all():
        fits[np.flatnonzero(fits)[~fine]] = False
        taken, begin, head, stamp = taken[fine], begin[fine], head[fine], stamp[fine]
        word = word[fine] if fast.flags else word
    left = rows[~fits]
    return Lines(taken, head, good, word, words, stamp.astype(np.int64), begin + width), left


def named(data: Array, starts: Array, templates: list[Fast], only: frozenset[str]) -> Array:
    """Which lines may show one of the events `only`: those that fit no template, and those with such a name."""
    kept = np.ones(starts.size, dtype=bool)
    rows = np.arange(starts.size)
    for fast in templates:
        if not rows.size:
            break
        lines, at = Text(data).beginnings(starts if rows.size == starts.size else starts[rows], fast.colon + 10)
        fits = lines.fits(at, fast.literals())
        start = lines.words[at + (fast.colon + 2)]
        # --ts-diff puts "(+12) " before the name
        wanted = (start & np.uint64(255)) == 40 if fast.layout.pads else np.zeros(rows.size, dtype=bool)
        for text in {(name.encode() + b":")[:8] for name in only}:
            mask = np.uint64((1 << 8 * len(text)) - 1)
            wanted |= (start & mask) == np.uint64(int.from_bytes(text, "little"))
        if fits.all():
            kept[rows] = wanted
            break
        kept[rows[fits]] = wanted[fits]
        rows = rows[~fits]
    return kept


def _encoded(data: Array, at: Array, width: int) -> tuple[Array, list[bytes]]:
    """Index of each row's `width` bytes at `at` among the different values."""
    items = np.ndarray((data.size - width + 1,), f"V{width}", data.data, 0, (1,))[at]
    coded = pa.Array.from_buffers(pa.binary(width), at.size, [None, pa.py_buffer(items)]).dictionary_encode()
    return coded.indices.to_numpy(), coded.dictionary.to_pylist()
