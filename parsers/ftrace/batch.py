"""One batch of lines to records: which line is what, and the columns of all record lines."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from parsers.ftrace.arrays import Array
from parsers.ftrace.layouts import Fast, Layout, detect, fixed_columns

__all__ = ["Records", "Scan", "classify"]

LOST = re.compile(rb"CPU:(\d{1,5}) \[(?:LOST )?(?:(\d{1,18}) )?EVENTS?(?: DROPPED)?\]")
STARTED = re.compile(rb"#+ CPU (\d{1,5}) buffer started #+")
OVERWRITTEN = re.compile(rb"# entries-in-buffer/entries-written: (\d{1,18})/(\d{1,18})")
QUIET = re.compile(rb"cpus=\d+|version = \d+|trace:.*|TRACE:| *-{3,}|\w+: +cpus=\d+|\s*")
GRAPH = re.compile(
    rb" *(?:(?P<abs>\d{1,10}\.\d{6}) +\| +)?(?P<cpu>\d{1,5})\) +(?:(?P<comm>\S.{0,18}?)-(?P<pid>\d{1,10}) +\| +)?"
    rb"(?P<mark>[+!#*@$])? *(?:(?P<dur>\d{1,15}(?:\.\d{1,3})?) us)? +\|(?P<call> .*)",
    re.S,
)
SWITCH = re.compile(rb" *\d{1,5}\) .{1,60} => .*", re.S)
SHORTEST = 12  #: no event line is shorter
PREFIX = 400  #: bytes of a line that patterns look at; the rest can only be payload


@dataclass(slots=True)
class Records:
    """Columns of records as NumPy arrays, in line order; -1 = not shown. Starts are byte positions in the batch."""

    row: Array
    comm: Array
    comm_size: Array
    pid: Array
    tgid: Array
    cpu: Array
    flags: Array
    flags_size: Array
    stamp: Array
    stamped: Array
    rest: Array
    end: Array
    duration: Array  # ns, function_graph; -1 none
    graph: Array  # True: a line of function_graph that is a call, not an event


@dataclass(slots=True)
class Scan:
    """What a batch holds besides records. Rows are line indices."""

    records: Records
    stacks: Array
    unknown: list[int] = field(default_factory=list)
    lost: list[tuple[int, int, int | None]] = field(default_factory=list)  # row, cpu, count
    started: list[tuple[int, int]] = field(default_factory=list)  # row, cpu
    overwritten: list[tuple[int, int]] = field(default_factory=list)  # row, count


def _slow(line: bytes, layouts: tuple[Layout, ...], dot: int) -> tuple[int, ...] | None:
    """One line by pattern: positions relative to its start, in the order of `Records` from comm to rest."""
    head = line[:PREFIX]
    found = detect(head, layouts)
    if found is None:
        return None
    _, match = found
    groups = match.groupdict()
    stamp = match["ts"]
    value = int(stamp.replace(b".", b""))
    if b"." in stamp and dot:
        shown = len(stamp) - stamp.index(b".") - 1
        value = value * 10 ** (dot - shown) if shown <= dot else value // 10 ** (shown - dot)
    value = max(-(1 << 62), min(value, (1 << 63) - 1))
    tgid, flags = groups.get("tgid"), groups.get("flags")
    pid, thread = int(match["pid"]), groups.get("tid")
    leader = int(tgid) if tgid and tgid.strip().isdigit() else -1
    if thread:
        leader, pid = pid, int(thread)
    comm, size = match.start("comm"), len(match["comm"])
    if pid > 0x7FFFFFFF or leader > 0x7FFFFFFF or int(match["cpu"]) > 0xFFFF:
        return None
    rest = match.start("rest")
    word = (match.start("flags"), len(flags)) if flags else (-1, 0)
    return comm, size, pid, leader, int(match["cpu"]), *word, value, rest


def classify(
    data: Array, raw: bytes, starts: Array, ends: Array, fast: Fast | None, layouts: tuple[Layout, ...], dot: int
) -> tuple[Scan, dict[int, bytes]]:
    """Sort the lines [starts, ends) of `raw` (`data` is its array); also the instance name by row, if shown."""
    if fast is not None:
        lines, done = fixed_columns(data, starts, ends, fast)
    else:
        done = np.zeros(starts.size, dtype=bool)
        lines = None
    size = ends - starts
    stack = ~done & (size > 3) & (data[starts] == 32) & (data[starts + 1] == 61) & (data[starts + 2] == 62)
    report_stack = ~done & (size > 3) & (data[starts] == 61) & (data[starts + 1] == 62) & (data[starts + 2] == 32)
    stack |= report_stack
    open_rows = np.flatnonzero(~done & ~stack & (size > 0)).tolist()
    scan = Scan(_empty(), np.flatnonzero(stack))
    slow: list[tuple[int, ...]] = []
    sources: dict[int, bytes] = {}
    for row in open_rows:
        begin, end = int(starts[row]), int(ends[row])
        line = raw[begin : min(end, begin + PREFIX)]
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
        found = _slow(line, layouts, dot)
        if found is not None:
            flags = begin + found[5] if found[5] >= 0 else -1
            shown = (row, begin + found[0], *found[1:5], flags, *found[6:8], 1, begin + found[8], end, -1, 0)
            slow.append(shown)
            if b": " in line[: found[0] + 1]:
                sources[row] = line.split(b":", 1)[0]
            continue
        graph = GRAPH.fullmatch(line)
        if graph is not None and int(graph["cpu"]) <= 0xFFFF:
            slow.append(_graph(graph, row, begin, end))
            continue
        lost = LOST.match(line)
        if lost is not None:
            scan.lost.append((row, int(lost[1]), int(lost[2]) if lost[2] else None))
        elif not QUIET.fullmatch(line) and not SWITCH.fullmatch(line):
            scan.unknown.append(row)
    parts = []
    if lines is not None:
        count = lines.row.size
        sixteen, none = np.full(count, 16), np.full(count, -1)
        width = np.full(count, fast.flags if fast else 0)
        one, zero = np.ones(count, dtype=np.int64), np.zeros(count, dtype=np.int64)
        parts.append(
            [lines.row, lines.comm, sixteen, lines.pid, lines.tgid, lines.cpu, lines.flags, width, lines.stamp, one,
             lines.rest, ends[lines.row], none, zero]
        )  # fmt: skip
    if slow:
        table = np.array(slow, dtype=np.int64)
        parts.append([table[:, i] for i in range(table.shape[1])])
    if parts:
        merged = [np.concatenate([part[i] for part in parts]) for i in range(14)] if len(parts) > 1 else parts[0]
        if len(parts) > 1:
            order = np.argsort(merged[0], kind="stable")
            merged = [values[order] for values in merged]
        merged[9], merged[13] = merged[9].astype(bool), merged[13].astype(bool)
        scan.records = Records(*merged)
    return scan, sources


def _graph(match: re.Match[bytes], row: int, begin: int, end: int) -> tuple[int, ...]:
    """A function_graph line; an event in a comment becomes a record of its own, without a stamp unless one is shown."""
    shown = match["abs"]
    stamp = int(shown.replace(b".", b"")) if shown else 0
    comm = begin + match.start("comm") if match["comm"] else -1
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
        row, comm, len(match["comm"] or b""), min(pid, 0x7FFFFFFF), -1, int(match["cpu"]), -1, 0, stamp,
        int(bool(shown)), rest, end, duration, is_call,
    )  # fmt: skip


def _empty() -> Records:
    none = np.zeros(0, dtype=np.int64)
    columns: dict[str, Array] = {}
    for name in Records.__slots__:
        columns[name] = none.astype(bool) if name in ("stamped", "graph") else none
    return Records(**columns)
