"""One batch of lines to records: which line is what, and the columns of all record lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from parsers.ftrace.arrays import Array
from parsers.ftrace.layouts import (
    BARE,
    FEWEST_LINES,
    MOST_TEMPLATES,
    Fast,
    Layout,
    Lines,
    detect,
    fixed_columns,
    stamp_of,
)  # fmt: skip

__all__ = ["Records", "Scan", "classify", "latest"]

LOST = re.compile(rb"CPU:(\d{1,5}) \[(?:LOST )?(?:(\d{1,18}) )?EVENTS?(?: DROPPED)?\]")
STARTED = re.compile(rb"#+ CPU (\d{1,5}) buffer started #+")
OVERWRITTEN = re.compile(rb"# entries-in-buffer/entries-written: (\d{1,18})/(\d{1,18})")
QUIET = re.compile(rb"cpus=\d+|version = \d+|trace:.*|TRACE:| *-{3,}|\w+: +cpus=\d+|\s*")
GRAPH = re.compile(
    rb" *(?:(?P<abs>\d{1,10}\.\d{6}) +\| +)?(?P<cpu>\d{1,5})\) +(?:(?P<comm>\S.{0,18}?)-(?P<pid>\d{1,10}) +\| +)?"
    rb"(?P<mark>[+!#*@$])? *(?:(?P<dur>\d{1,15}(?:\.\d{1,3})?) us)? +\|(?P<call> .*)",
    re.S,
)
#: The same without the CPU (funcgraph-cpu off): told by its duration, or by the blanks in place of it.
CALL = re.compile(
    rb"(?P<abs>)(?P<cpu>)(?P<comm>)(?P<pid>)(?: {8,}| *(?P<mark>[+!#*@$])? *(?P<dur>\d{1,15}(?:\.\d{1,3})?) us +)"
    rb"\|(?P<call>  .*)",
    re.S,
)
SWITCH = re.compile(rb" *\d{1,5}\) .{1,60} => .*", re.S)
DISTANCE = re.compile(rb"\(\+?-?\d{1,20}\) +")
SHORTEST = 12  #: no event line is shorter
PREFIX = 400  #: bytes of a line that patterns look at; the rest can only be payload


@dataclass(slots=True)
class Records:
    """Columns of records as NumPy arrays, in line order; -1 = not shown. Starts are byte positions in the batch."""

    row: Array
    comm: Array  # index into `Scan.comms`, -1 not shown
    pid: Array
    tgid: Array
    cpu: Array
    word: Array  # index into `Scan.words`
    stamp: Array
    stamped: Array
    rest: Array
    end: Array
    duration: Array  # ns, function_graph; -1 none
    graph: Array  # True: a line of function_graph that is a call, not an event

    def chosen(self, which: Array | slice) -> Records:
        """Some of the records."""
        return Records(*(getattr(self, name)[which] for name in Records.__slots__))


def latest(cpus: Array) -> tuple[Array, Array]:
    """The different CPUs, and where the last record of each stands."""
    narrow = cpus.astype(np.int16) if cpus.size and int(cpus.max()) < 1 << 15 else cpus  # sorted by digits: quicker
    found, back = np.unique(narrow[::-1], return_index=True)
    return found.astype(np.int64), cpus.size - 1 - back


class Codes(dict[bytes, int]):
    """Numbers for byte strings, given out in the order in which they are first seen."""

    def __missing__(self, key: bytes) -> int:
        self[key] = len(self)
        return self[key]


@dataclass(slots=True)
class Scan:
    """What a batch holds besides records. Rows are line indices; `comms` and `words` number task names, flag words."""

    records: Records
    stacks: Array
    comms: Codes = field(default_factory=Codes)
    words: Codes = field(default_factory=Codes)
    unknown: list[int] = field(default_factory=list)
    lost: list[tuple[int, int, int | None]] = field(default_factory=list)  # row, cpu, count
    started: list[tuple[int, int]] = field(default_factory=list)  # row, cpu
    overwritten: list[tuple[int, int]] = field(default_factory=list)  # row, count


def _slow(line: bytes, layouts: tuple[Layout, ...], dot: int, scan: Scan) -> tuple[int, ...] | None:
    """One line by pattern: where comm begins, the columns of `Records` from comm to stamp, where the rest begins."""
    found = detect(line, layouts)
    if found is None:
        return None
    _, match = found
    groups = match.groupdict()
    stamp = stamp_of(match)
    value = int(stamp.replace(b".", b""))
    if b"." in stamp and dot:
        shown = len(stamp) - stamp.index(b".") - 1
        value = value * 10 ** (dot - shown) if shown <= dot else value // 10 ** (shown - dot)
    value = max(-(1 << 62), min(value, (1 << 63) - 1))
    tgid, flags = groups.get("tgid"), groups.get("flags")
    if groups.get("vflags"):
        flags = b"#" + match["vflags"] + b":" + match["vpreempt"]
    base, mark = (16, "x") if groups.get("xpid") else (10, "")
    pid, cpu, thread = int(match[f"{mark}pid"], base), int(match[f"{mark}cpu"], base), groups.get("tid")
    leader = int(tgid) if tgid and tgid.strip().isdigit() else -1
    if thread:
        leader, pid = pid, int(thread)
    if base == 16:
        pid, cpu = pid if pid <= 0x7FFFFFFF else -1, cpu if cpu <= 0xFFFF else -1
    if pid > 0x7FFFFFFF or leader > 0x7FFFFFFF or cpu > 0xFFFF:
        return None
    word = scan.words[flags] if flags else -1
    # raw and hex show no name; an empty one is a name
    comm = scan.comms[match["comm"]] if match.end("comm") or match.start("pid" if base == 10 else "xpid") else -1
    return match.start("comm"), comm, pid, leader, cpu, word, value, match.start("rest")


def classify(
    data: Array,
    raw: bytearray,
    starts: Array,
    ends: Array,
    templates: list[Fast],
    layouts: tuple[Layout, ...],
    dot: int,
) -> tuple[Scan, dict[int, bytes]]:
    """Sort the lines [starts, ends) of `raw` (`data` is its array); also the instance name by row, if shown.

    `templates` grows by the column layouts that are met. Without any layout (nothing but names and payloads) each
    line that names an event is one.
    """
    scan = Scan(_empty(), np.zeros(0, dtype=np.int64))
    parts, left = _in_columns(data, raw, starts, ends, templates, layouts, dot, scan)
    first, second, third = (data[starts[left] + place] for place in range(3))
    long = ends[left] - starts[left] > 3
    # " =>" of the kernel, "=> " of trace-cmd
    stack = long & (((first == 32) & (second == 61) & (third == 62)) | ((first == 61) & (second == 62) & (third == 32)))
    scan.stacks = left[stack]
    slow: list[tuple[int, ...]] = []
    sources: dict[int, bytes] = {}
    for row in left[~stack & (ends[left] > starts[left])].tolist():
        begin, end = int(starts[row]), int(ends[row])
        line = bytes(raw[begin : min(end, begin + PREFIX)])
        if line[:1] == b"#":
            match = STARTED.match(line)
            if match:
                scan.started.append((row, int(match[1])))
            match = OVERWRITTEN.match(line)
            if match:
                scan.overwritten.append((row, max(0, int(match[2]) - int(match[1]))))
            continue
        if end - begin < SHORTEST:
            if not QUIET.fullmatch(line):
                scan.unknown.append(row)
            continue
        found = _slow(line, layouts, dot, scan)
        if found is not None:
            comm_at, *shown, rest = found
            slow.append((row, *shown, 1, begin + rest, end, -1, 0))
            if b": " in line[: comm_at + 1]:
                sources[row] = line.split(b":", 1)[0]
            continue
        graph = GRAPH.fullmatch(line) or CALL.fullmatch(line)
        if graph is not None and int(graph["cpu"] or 0) <= 0xFFFF:
            slow.append(_graph(graph, row, begin, end, scan))
            continue
        lost = LOST.match(line)
        if lost is not None:
            scan.lost.append((row, int(lost[1]), int(lost[2]) if lost[2] else None))
        elif not layouts and BARE.fullmatch(line):
            slow.append((row, -1, -1, -1, -1, -1, 0, 0, begin, end, -1, 0))
        elif not QUIET.fullmatch(line) and not SWITCH.fullmatch(line):
            scan.unknown.append(row)
    if slow:
        table = np.array(slow, dtype=np.int64)
        parts.append([table[:, i] for i in range(table.shape[1])])
    if parts:
        count = len(Records.__slots__)
        merged = [np.concatenate([part[i] for part in parts]) for i in range(count)] if len(parts) > 1 else parts[0]
        if len(parts) > 1:
            order = np.argsort(merged[0], kind="stable")
            merged = [values[order] for values in merged]
        records = Records(*merged)
        records.stamped, records.graph = records.stamped.astype(bool), records.graph.astype(bool)
        scan.records = records
    return scan, sources


def _in_columns(
    data: Array,
    raw: bytearray,
    starts: Array,
    ends: Array,
    templates: list[Fast],
    layouts: tuple[Layout, ...],
    dot: int,
    scan: Scan,
) -> tuple[list[list[Array]], Array]:
    """Columns of the lines that fit a template, and the other lines; learns templates while many lines fit none."""
    parts, left, tried = [], np.arange(starts.size), 0
    for _ in range(MOST_TEMPLATES):
        if tried == len(templates):
            learned = _learn(raw, starts, ends, left, templates, layouts, dot) if left.size >= FEWEST_LINES else None
            if learned is None:
                break
            templates.append(learned)
        fast, tried = templates[tried], tried + 1
        lines, left = fixed_columns(data, starts, ends, left, fast)
        if lines is not None:
            parts.append(_columns(raw, ends, lines, fast, scan))
    return parts, left


def _learn(
    raw: bytearray,
    starts: Array,
    ends: Array,
    left: Array,
    templates: list[Fast],
    layouts: tuple[Layout, ...],
    dot: int,
) -> Fast | None:
    """A template from a line in the middle of those that fit none."""
    for place in (left.size // 2, left.size // 4, 3 * left.size // 4):
        row = int(left[place])
        begin = int(starts[row])
        found = detect(bytes(raw[begin : min(int(ends[row]), begin + PREFIX)]), layouts)
        fast = Fast.learn(*found) if found is not None else None
        if fast is not None and fast not in templates and fast.dot == dot:
            return fast
    return None


def _columns(raw: bytearray, ends: Array, lines: Lines, fast: Fast, scan: Scan) -> list[Array]:
    """The columns of `Records`, in their order."""
    rows = lines.row.size
    task = np.array(
        [
            (scan.comms[m[1]], int(m[2]), int(m[3]) if m[3] and m[3].strip().isdigit() else -1, int(m[4]))
            for m in lines.heads
        ],
        dtype=np.int64,
    ).reshape(-1, 4)
    none = np.full(rows, -1)
    word = np.array([scan.words[word] for word in lines.words], dtype=np.int64)[lines.word] if fast.flags else none
    rest, end = lines.rest, ends[lines.row]
    if fast.layout.pads:
        # --ts-diff puts the distance from the record before between time and name
        for row in np.flatnonzero(np.frombuffer(raw, dtype=np.uint8)[rest] == 40).tolist():
            match = DISTANCE.match(raw, int(rest[row]), int(end[row]))
            rest[row] = match.end() if match else rest[row]
    one, zero = np.ones(rows, dtype=bool), np.zeros(rows, dtype=bool)
    return [
        lines.row, *(np.ascontiguousarray(task[:, i])[lines.head] for i in range(4)), word, lines.stamp, one,
        rest, end, none, zero,
    ]  # fmt: skip


def _graph(match: re.Match[bytes], row: int, begin: int, end: int, scan: Scan) -> tuple[int, ...]:
    """A function_graph line; an event in a comment becomes a record of its own, without a stamp unless one is shown."""
    shown = match["abs"]
    stamp = int(shown.replace(b".", b"")) if shown else 0
    comm = scan.comms[match["comm"]] if match["comm"] else -1
    pid = int(match["pid"]) if match["pid"] else -1
    duration = -1
    if match["dur"]:
        whole, _, part = match["dur"].partition(b".")
        duration = int(whole) * 1000 + int(part.ljust(3, b"0") or b"0")
    call = match["call"]
    rest, is_call = begin + match.start("call"), 1
    text = call.strip()
    if text.startswith(b"/* ") and re.match(rb"/\* [\w+/<>-]+: ", text):
        rest += call.index(b"/* ") + 3
        end = end - 3 if text.endswith(b" */") and end - begin <= PREFIX else end
        is_call = 0
    return (
        row, comm, min(pid, 0x7FFFFFFF), -1, int(match["cpu"] or -1), -1, stamp, int(bool(shown)), rest, end, duration,
        is_call,
    )  # fmt: skip


def _empty() -> Records:
    none = np.zeros(0, dtype=np.int64)
    columns: dict[str, Array] = {}
    for name in Records.__slots__:
        columns[name] = none.astype(bool) if name in ("stamped", "graph") else none
    return Records(**columns)
