"""Lanes, periods and moments of canonical events: what a timeline draws.

A lane is a CPU (`CPU 0`), a vCPU (`d1v0`), an HPET channel, or the object that an event is about. Periods run from
one kind of event to another (`SPANS`); everything else is a moment.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from replay.events import KIND_ID, KINDS
from tracetool.report.around import Events
from tracetool.report.words import Times, hexa, noun

__all__ = [
    "SPANS", "Moment", "Period", "Window", "describe", "lane_expr", "lane_key", "lane_of", "meanings",
    "span_kinds", "window",
]  # fmt: skip


#: Events that belong to an HPET channel's row.
CHANNEL: Final = frozenset({"hpet.program", "hpet.retarget", "hpet.fire"})


@dataclass(frozen=True, slots=True)
class Span:
    """A period: what it is, the kinds that begin and end it, and whether periods of several objects nest."""

    name: str
    begin: tuple[str, ...]
    end: tuple[str, ...]
    role: str  # colour: idle, handler, service, run
    nests: bool = True


SPANS: Final = (
    Span("idle", ("idle.enter",), ("idle.exit", "idle.break"), "idle", nests=False),
    Span("running", ("sched.run",), ("sched.stop",), "run", nests=False),
    Span("vector in service", ("isr.begin", "via.isr_begin"), ("isr.end", "via.isr_end"), "service"),
    Span("in service until EOI", ("lapic.deliver", "gic.ack"), ("lapic.eoi", "gic.eoi"), "service"),
    Span("HPET handler", ("hpet.handler.begin",), ("hpet.handler.end",), "handler"),
    Span("interrupt handler", ("irqdesc.entry", "flow.handler.begin"), ("irqdesc.exit", "flow.handler.end"), "handler"),
    Span("upcall", ("evtchn.upcall",), ("evtchn.upcall_end",), "handler", nests=False),
)
_BEGIN: Final = {kind: span for span in SPANS for kind in span.begin}
_END: Final = {kind: span for span in SPANS for kind in span.end}


def span_kinds() -> list[str]:
    """All kinds that begin or end a period."""
    return [*_BEGIN, *_END]


@dataclass(frozen=True, slots=True)
class Period:
    """A period on a lane; `t0`/`t1` None: it began before, or ended after, what the window shows."""

    lane: str
    span: Span
    t0: int | None
    t1: int | None
    obj: int | None
    text: str


@dataclass(frozen=True, slots=True)
class Moment:
    """A single event on a lane."""

    lane: str
    t: int
    kind: str
    text: str
    seq: int
    source: str | None
    offset: int | None
    conf: int
    obj: int | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """Everything between `t0` and `t1`. `cut`: there was more than could be taken, so the window was narrowed."""

    t0: int
    t1: int
    lanes: list[str]
    periods: list[Period]
    moments: list[Moment]
    cut: bool


def lane_of(row: Mapping[str, Any]) -> str:
    """The lane of one event."""
    kind = row["kind"]
    if kind in CHANNEL:
        return f"HPET channel {row['obj']}" if row["obj"] is not None else "HPET"
    if row["vcpu"] is not None:
        return f"d{'?' if row['dom'] is None else row['dom']}v{row['vcpu']}"
    if row["cpu"] is not None:
        return f"CPU {row['cpu']}"
    if row["obj"] is not None:
        where = f"d{row['dom']} " if row["dom"] is not None else ""
        return f"{where}{noun(kind)} {row['obj']}"
    return f"domain {row['dom']}" if row["dom"] is not None else "everything"


def lane_expr() -> pl.Expr:
    """The lane of events that begin or end a period, as an expression (they name a CPU or a vCPU)."""
    vcpu = pl.format("d{}v{}", pl.col("dom").cast(pl.String).fill_null("?"), pl.col("vcpu"))
    return (
        pl.when(pl.col("vcpu").is_not_null()).then(vcpu)
        .when(pl.col("cpu").is_not_null()).then(pl.format("CPU {}", pl.col("cpu")))
        .otherwise(pl.lit("everything"))
    )  # fmt: skip


def lane_key(lane: str) -> tuple[int, tuple[int, ...], str]:
    """Order of lanes: CPUs, vCPUs, HPET channels, the rest; numbers as numbers."""
    numbers = tuple(int(part) for part in "".join(c if c.isdigit() else " " for c in lane).split())
    if lane.startswith("CPU "):
        return 0, numbers, lane
    if lane.startswith("d") and "v" in lane and not lane.startswith("domain") and " " not in lane:
        return 1, numbers, lane
    return (2 if lane.startswith("HPET channel") else 3), numbers, lane


def describe(row: Mapping[str, Any], times: Times | None = None) -> str:
    """An event in words: its kind and every column that is set; the vocabulary says what the columns mean."""
    kind = row["kind"]
    obj = row["obj"]
    parts = []
    if obj is not None:
        word = noun(kind)
        parts.append(f"{word} {hexa(obj) if word == 'vector' else obj}")
    if row["vcpu"] is not None:
        parts.append(f"d{'?' if row['dom'] is None else row['dom']}v{row['vcpu']}")
    elif row["dom"] is not None:
        parts.append(f"dom {row['dom']}")
    if row["cpu"] is not None:
        parts.append(f"CPU {row['cpu']}")
    if kind == "hpet.retarget":
        parts.append(f"CPU {row['val']} → CPU {row['tgt']}" + (" refused" if (row["flags"] or 0) & 1 else ""))
    elif kind == "idle.enter":
        left = None if row["val"] is None else row["val"] - row["t_ns"]
        named = {None: "deadline unknown", 0: "no deadline"}
        parts.append(named.get(row["val"]) or f"deadline {(times or Times()).relative(left or 0)}")
    else:
        parts += [f"{name}={row[name]}" for name in ("tgt", "val", "val2") if row[name] is not None]
        if row["flags"]:
            parts.append(f"flags={row['flags']:#x}")
    return f"{kind} {', '.join(parts)}" if parts else str(kind)


def _take(events: Events, t: int, low: int, high: int, cap: int) -> tuple[int, int, list[dict[str, Any]], bool]:
    """Rows of [low, high], widened while there are few, narrowed around `t` while there are more than `cap`."""
    rows = events.between(low, high, cap + 1)
    for _ in range(7):
        before = sum(1 for r in rows if r["t_ns"] < t)
        if len(rows) > cap or (before >= 10 and len(rows) >= 24):
            break
        grow = max((high - low) * 2, 200_000)
        wider = events.between(low - grow, high + grow // 2, cap + 1)
        if len(wider) > cap or (len(wider) == len(rows) and grow > 2_000_000_000):
            break
        low, high, rows = low - grow, high + grow // 2, wider
    cut = False
    while len(rows) > cap and high - low > 1:
        cut = True
        low, high = t - (t - low) // 2, t + (high - t) // 2
        rows = events.between(low, high, cap + 1)
    return low, high, rows[:cap], cut


def window(
    events: Events, t: int, low: int, high: int, gaps: Sequence[Mapping[str, Any]],
    times: Times, *, cap: int = 900,
) -> Window:  # fmt: skip
    """The events around `t` (dataset time): at least from `low` to `high` unless there are more than `cap`."""
    low, high, rows, cut = _take(events, t, low, high, cap)
    if rows and not cut:
        # Nothing is gained by empty margins, but the finding itself must stay inside.
        first, last = min(rows[0]["t_ns"], t), max(rows[-1]["t_ns"], t)
        pad = max((last - first) // 40, 1)
        low, high = max(low, first - pad), min(high, last + pad)
    before = _before(events, low, gaps)
    periods, moments = _periods([*before, *rows], low, times)
    lanes = sorted({p.lane for p in periods} | {m.lane for m in moments}, key=lane_key)
    return Window(low, high, lanes, periods, moments, cut)


#: How far before a window a period may have begun (ns or ticks).
REACH: Final = 10_000_000_000


def _before(events: Events, low: int, gaps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last event of each period kind and lane before the window, unless a gap makes it worthless."""
    frame = events.before(low, REACH)
    if not frame.height:
        return []
    last = (
        frame.filter(pl.col("kind").is_in([k for k in span_kinds() if not _nesting(k)]))
        .with_columns(lane=lane_expr(), span=pl.col("kind").replace_strict(_SPAN_NAME, return_dtype=pl.String))
        .group_by("lane", "span")
        .last()
        .sort("seq")
    )
    rows = last.drop("lane", "span").to_dicts()
    oldest = min((r["t_ns"] for r in rows), default=low)
    near = [g for g in gaps if _gap_between([g], None, oldest, low)]
    return [r for r in rows if not _gap_between(near, r["cpu"], r["t_ns"], low)]


_SPAN_NAME: Final = {kind: span.name for kind, span in [*_BEGIN.items(), *_END.items()]}


def _nesting(kind: str) -> bool:
    return (_BEGIN.get(kind) or _END[kind]).nests


def _gap_between(gaps: Sequence[Mapping[str, Any]], cpu: int | None, t0: int, t1: int) -> bool:
    for gap in gaps:
        if gap.get("cpu") is None or cpu is None or gap["cpu"] == cpu:
            start = gap.get("t0_ns") if gap.get("t0_ns") is not None else gap.get("t1_ns")
            end = gap.get("t1_ns") if gap.get("t1_ns") is not None else start
            if start is not None and end is not None and start < t1 and end > t0:
                return True
    return False


def _periods(rows: Iterable[Mapping[str, Any]], low: int, times: Times) -> tuple[list[Period], list[Moment]]:
    open_: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    seen: set[tuple[str, str]] = set()
    periods: list[Period] = []
    moments: list[Moment] = []
    for row in rows:
        kind, t = row["kind"], row["t_ns"]
        lane = lane_of(row)
        if t >= low:
            moments.append(_moment(lane, row, times))
        if kind in _BEGIN:
            span = _BEGIN[kind]
            stack = open_.setdefault((lane, span.name), [])
            if not span.nests and stack:  # its end is not in the recording: the next beginning ends it
                periods.append(_period(lane, span, stack.pop(), t, times))
            stack.append(row)
        elif kind in _END:
            span = _END[kind]
            stack = open_.setdefault((lane, span.name), [])
            match = next((i for i in reversed(range(len(stack))) if row["obj"] in (None, stack[i]["obj"])), None)
            if match is None and not span.nests and stack:
                match = len(stack) - 1
            if match is not None:
                periods.append(_period(lane, span, stack.pop(match), t, times))
            elif t >= low and (lane, span.name) not in seen:
                periods.append(Period(lane, span, None, t, row["obj"], f"{span.name}, began before"))
            seen.add((lane, span.name))
    for (lane, name), stack in open_.items():
        span = next(s for s in SPANS if s.name == name)
        periods += [_period(lane, span, row, None, times) for row in stack]
    return [p for p in periods if p.t1 is None or p.t1 >= low], moments


def _period(lane: str, span: Span, row: Mapping[str, Any], t1: int | None, times: Times) -> Period:
    text = f"{span.name}: {describe(row, times)}" + ("" if t1 is not None else ", end not in the window")
    return Period(lane, span, row["t_ns"], t1, row["obj"], text)


def _moment(lane: str, row: Mapping[str, Any], times: Times) -> Moment:
    origin = row.get("origin") or {}
    return Moment(
        lane, row["t_ns"], row["kind"], describe(row, times), row["seq"], origin.get("file"), origin.get("offset"),
        row["conf"], row["obj"],
    )  # fmt: skip


def meanings(kinds: Iterable[str]) -> Iterator[tuple[str, str]]:
    """(kind, what its columns mean) for a legend."""
    for kind in sorted(set(kinds)):
        if kind in KIND_ID:
            yield kind, KINDS[KIND_ID[kind]].fields
