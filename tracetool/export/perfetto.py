"""A dataset as a Perfetto trace: what each CPU, vCPU and interrupt did, gaps, findings with arrows to their evidence.

Written through the `perfetto` package (an extra), packet by packet, so that memory does not grow with the recording.
Times are those of the dataset; a dataset in ticks is shown as if a tick were a nanosecond, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import polars as pl

from replay.declare import UsageError
from replay.events import KIND_ID
from tracetool.export.packets import Path_, Writer, require
from tracetool.output import whole_files
from tracetool.report.verdict import finding_id
from tracetool.report.words import noun
from tracetool.store import Dataset

__all__ = ["SPANS", "Span", "export", "require"]


@dataclass(frozen=True, slots=True)
class Span:
    """A pair of events that is drawn as a slice. `place`: "cpu", "vcpu", "unit" (vCPU or else CPU) or "object"."""

    begin: str
    end: str
    place: str
    track: str
    title: str
    #: Columns that an end must share with its begin, beside those of the place.
    key: tuple[str, ...] = ()


SPANS: Final[tuple[Span, ...]] = (
    Span("idle.enter", "idle.exit", "cpu", "idle", "idle"),
    Span("isr.begin", "isr.end", "cpu", "handlers", "vector {obj:#x}", ("obj",)),
    Span("hpet.handler.begin", "hpet.handler.end", "cpu", "handlers", "HPET channel {obj}", ("obj",)),
    Span("hpet.handler.begin", "hpet.handler.end", "object", "handler", "on CPU {cpu}", ("cpu",)),
    Span("flow.handler.begin", "flow.handler.end", "cpu", "handlers", "irq {obj}", ("obj",)),
    Span("flow.handler.begin", "flow.handler.end", "object", "handler", "on CPU {cpu}", ("cpu",)),
    Span("irqdesc.entry", "irqdesc.exit", "cpu", "handlers", "irq {obj}", ("obj",)),
    Span("irqdesc.entry", "irqdesc.exit", "object", "handler", "on CPU {cpu}", ("cpu",)),
    Span("gic.ack", "gic.eoi", "cpu", "in service", "INTID {obj}", ("obj", "flags")),
    Span("sched.run", "sched.stop", "vcpu", "running", "on CPU {cpu}"),
    Span("sched.run", "sched.stop", "cpu", "runs", "d{dom}v{vcpu}", ("dom", "vcpu")),
    Span("via.isr_begin", "via.isr_end", "vcpu", "in service", "vector {obj:#x}", ("obj",)),
    Span("vgic.ack", "vgic.eoi", "vcpu", "in service", "INTID {obj}", ("obj",)),
    Span("lapic.deliver", "lapic.eoi", "unit", "in service", "vector {obj:#x}", ("obj",)),
    Span("evtchn.upcall", "evtchn.upcall_end", "vcpu", "upcall", "upcall"),
)
_BEGIN: Final = {k: [s for s in SPANS if s.begin == k] for k in {s.begin for s in SPANS}}
_END: Final = {k: [s for s in SPANS if s.end == k] for k in {s.end for s in SPANS}}
#: Families of kinds whose `obj` has a track of its own.
_OBJECTS: Final = frozenset({"hpet", "flow", "irqdesc", "evtchn", "ioapic", "hwhpet", "vgic"})
_COLUMNS: Final = ("seq", "t_ns", "kind", "cpu", "dom", "vcpu", "obj", "tgt", "val", "flags", "conf")

Row = Mapping[str, Any]


# -- slices --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Open:
    """A slice that has begun."""

    key: tuple[Any, ...]
    t0: int
    name: str
    cpu: int | None
    args: dict[str, Any]


@dataclass(slots=True)
class _Lanes:
    """The open slices of one track. Each lane holds one, so that handlers that overlap without nesting stay true."""

    open: list[_Open | None] = field(default_factory=list)

    def find(self, key: tuple[Any, ...]) -> int | None:
        """Lane of a slice; parts of the key that the end does not know match anything, the last begun first."""
        fitting = [
            (o.t0, i) for i, o in enumerate(self.open)
            if o is not None and all(b is None or a == b for a, b in zip(o.key, key, strict=True))
        ]  # fmt: skip
        return max(fitting)[1] if fitting else None

    def put(self, item: _Open) -> None:
        """Into the first free lane."""
        for index, held in enumerate(self.open):
            if held is None:
                self.open[index] = item
                return
        self.open.append(item)


def _place(kind: str, row: Row) -> Path_:
    """Track of the object that an event is about."""
    family = kind.partition(".")[0]
    if family in _OBJECTS and row["obj"] is not None:
        return _object(kind, row)
    if row["vcpu"] is not None:
        return _vcpu(row)
    return _cpu(row)


def _object(kind: str, row: Row) -> Path_:
    word = noun(kind)
    domain = f"d{row['dom']} " if row["dom"] is not None else ""
    return ("Interrupts", f"{domain}{word} {row['obj']}")


def _vcpu(row: Row) -> Path_:
    return ("vCPUs", f"d{'?' if row['dom'] is None else row['dom']}v{row['vcpu']}")


def _cpu(row: Row) -> Path_:
    return ("CPUs", f"CPU {row['cpu']}") if row["cpu"] is not None else ("Whole system",)


def _span_place(span: Span, row: Row) -> Path_ | None:
    if span.place == "object":
        return (*_object(span.begin, row), span.track) if row["obj"] is not None else None
    if span.place == "cpu" or (span.place == "unit" and row["vcpu"] is None):
        return (*_cpu(row), span.track) if row["cpu"] is not None else None
    return (*_vcpu(row), span.track) if row["vcpu"] is not None else None


class _Slices:
    """Pairs begins and ends."""

    def __init__(self, out: Writer) -> None:
        self.out = out
        self.lanes: dict[Path_, _Lanes] = {}

    def feed(self, kind: str, row: Row) -> bool:
        """An event; returns whether it is part of a slice."""
        begins, ends = _BEGIN.get(kind, ()), _END.get(kind, ())
        for span in ends:
            path = _span_place(span, row)
            if path is not None and not self._close(path, _key(span, row), row["t_ns"]):
                self.out.instant(self.out.track(path), row["t_ns"], f"{kind}, begin not recorded", _args(row))
        for span in begins:
            path = _span_place(span, row)
            if path is not None:
                # A second begin means that the end between them was not recorded.
                self._close(path, _key(span, row), row["t_ns"], why="end not recorded")
                item = _Open(_key(span, row), row["t_ns"], _title(span, row), row["cpu"], _args(row))
                self.lanes.setdefault(path, _Lanes()).put(item)
        return bool(begins or ends)

    def _close(self, path: Path_, key: tuple[Any, ...], t: int, why: str = "") -> bool:
        lanes = self.lanes.get(path)
        lane = lanes.find(key) if lanes else None
        if lanes is None or lane is None:
            return False
        self._emit(path, lanes, lane, t, why)
        return True

    def _emit(self, path: Path_, lanes: _Lanes, lane: int, t: int, why: str) -> None:
        item = lanes.open[lane]
        assert item is not None
        lanes.open[lane] = None
        args = {**item.args, "end": why} if why else item.args
        self.out.slice(self.out.track(path, lane), item.t0, max(t, item.t0), item.name, args)

    def cut(self, t: int, cpu: int | None, why: str) -> None:
        """Nothing is known from `t` on about a CPU (None: about any): what began there ends here."""
        for path, lanes in self.lanes.items():
            for lane, item in enumerate(lanes.open):
                if item is not None and (cpu is None or item.cpu in (None, cpu)):
                    self._emit(path, lanes, lane, t, why)


def _key(span: Span, row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in span.key)


def _title(span: Span, row: Row) -> str:
    try:
        return span.title.format(**row)
    except (TypeError, ValueError):  # a column that the title wants is null
        return span.begin


def _args(row: Row) -> dict[str, Any]:
    shown = {name: row[name] for name in ("seq", "tgt", "val", "flags", "offset")}
    if row["conf"] < 100:
        shown["confidence"] = row["conf"]
    return {k: v for k, v in shown.items() if not (k == "flags" and not v)}


# -- the trace -----------------------------------------------------------------------------------------------------


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for table in dataset.event_batches(list(KIND_ID), (*_COLUMNS, "origin")):
        frame = pl.from_arrow(table)
        assert isinstance(frame, pl.DataFrame)
        offset = pl.col("origin").struct.field("offset")
        yield from frame.select(*_COLUMNS, offset).with_columns(pl.col("kind").cast(pl.String)).iter_rows(named=True)


def export(
    dataset: Dataset,
    runs: Sequence[Mapping[str, Any]],
    output: Path,
    *,
    start_s: float | None = None,
    end_s: float | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, int]:
    """Write a Perfetto trace; returns bytes, tracks, slices, findings and gaps_without_time.

    `start_s` and `end_s` (seconds from the first record) cut a window out. The file appears whole or not at all.
    `progress` is called with what is done, and how many of how many events.
    """
    span = dataset.manifest["span"]
    t0, t1 = int(span["t0_ns"]), int(span["t1_ns"])
    low = t0 if start_s is None else t0 + round(start_s * 1e9)
    high = max(t1, *(f["t_ns"] for r in runs for f in r["findings"]), t0) if end_s is None else t0 + round(end_s * 1e9)
    if high < low:
        raise UsageError(f"nothing lies between {start_s or 0} s and {end_s} s: --from must come before --to")
    with whole_files(output) as (staging,), staging.open("wb") as file:
        out = Writer(file, low, high)
        done = _fill(dataset, runs, out, t0, t1, progress)
    return {"bytes": output.stat().st_size, "tracks": len(out.tracks), "slices": out.slices, **done}


def _fill(
    dataset: Dataset, runs: Sequence[Mapping[str, Any]], out: Writer, t0: int, t1: int,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, int]:
    source = dataset.manifest["inputs"][0]
    unit = dataset.manifest["clock"]["unit"]
    facts = {"source": source["source"], "sha256": source["sha256"], "time unit": unit}
    note = "" if unit == "ns" else " (1 ns here is 1 tick: the frequency is not known)"
    out.instant(out.track(("Recording",)), max(t0, out.low), f"{source['source']}{note}", facts)
    wanted = {e["seq"] for r in runs for f in r["findings"] for e in f["evidence"] if e.get("seq") is not None}
    placed: dict[int, Path_] = {}
    slices = _Slices(out)
    total = int(dataset.manifest.get("events") or 1)
    for done, row in enumerate(_rows(dataset)):
        kind = row["kind"]
        if progress and not done % 4096:
            progress("writing", done, total)
        if kind == "trace.lost":
            slices.cut(row["t_ns"] if row["val"] is None else row["val"], row["cpu"], "records lost")
            continue
        if row["seq"] in wanted:
            placed[row["seq"]] = _place(kind, row)
        if not slices.feed(kind, row):
            out.instant(out.track(_place(kind, row)), row["t_ns"], kind, _args(row))
    slices.cut(t1, None, "end of the recording")
    missing = _gaps(dataset, out, t0, t1)
    return {"findings": _findings(runs, out, placed.get), "gaps_without_time": missing}


def _gaps(dataset: Dataset, out: Writer, t0: int, t1: int) -> int:
    """Gaps as slices; an end that is not known reaches to the end of the recording. Returns those without any time."""
    missing = 0
    lanes: dict[int | None, list[int]] = {}
    timed = [g for g in dataset.gaps() if g["t0_ns"] is not None or g["t1_ns"] is not None]
    missing = len(dataset.gaps()) - len(timed)
    spans = [(t0 if g["t0_ns"] is None else g["t0_ns"], t1 if g["t1_ns"] is None else g["t1_ns"], g) for g in timed]
    for begin, end, gap in sorted(spans, key=lambda s: (s[0], s[1])):
        ends = lanes.setdefault(gap["cpu"], [])
        lane = next((i for i, e in enumerate(ends) if e <= begin), len(ends))
        ends[lane : lane + 1] = [max(begin, end)]
        who = "all CPUs" if gap["cpu"] is None else f"CPU {gap['cpu']}"
        args = {k: gap[k] for k in ("lost", "offset", "length", "text")}
        out.slice(out.track(("Gaps", who), lane), begin, max(begin, end), f"gap: {gap['reason']}", args)
    return missing


def _findings(
    runs: Sequence[Mapping[str, Any]], out: Writer, placed: Callable[[int], Path_ | None]
) -> int:
    """Findings as instants; an arrow runs through evidence and finding in the order of time, and ends at the last."""
    count = 0
    for run in runs:
        path = ("Findings", f"{run['system']} under {run['policy']} ({run['mode']})")
        for finding in run["findings"]:
            if not out.low <= finding["t_ns"] <= out.high:
                continue
            count += 1
            moments: list[tuple[int, Path_, str, Mapping[str, Any]]] = []
            for step in finding["evidence"]:
                if out.low <= step["t_ns"] <= out.high:
                    where = placed(step["seq"]) if step.get("seq") is not None else None
                    label = step["label"] if where else f"{step['label']} (computed)"
                    moments.append((step["t_ns"], where or path, label, {"offset": step.get("offset")}))
            args = {
                "id": finding_id(run, finding), "severity": finding["severity"], "expected": finding["expected"],
                "observed": finding["observed"], "confidence": finding["confidence"], "offset": finding["offset"],
                "rule": finding["rule"],
            }  # fmt: skip
            moments.append((finding["t_ns"], path, f"{finding['severity']}: {finding['code']}", args))
            moments.sort(key=lambda m: m[0])  # stable: the finding comes after evidence of the same time
            flow = count if len(moments) > 1 else None
            for index, (t, track, name, shown) in enumerate(moments, 1):
                out.instant(out.track(track), t, name, shown, flow=flow, last=index == len(moments))
    return count
