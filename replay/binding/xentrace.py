"""Stock xentrace to canonical events (spec M.1): idle and HPET broadcast, virtual LAPICs, scheduling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import polars as pl
import pyarrow as pa

from replay.binding import xentrace_hpet, xentrace_hvm, xentrace_instrumented, xentrace_via
from replay.binding.base import Assembler, Bound, Context, Forward, Records, event, lost_events, slices
from replay.binding.rows import chosen
from replay.coverage import Observation

__all__ = ["FORMATS", "bind"]

#: Formats of the reader whose tables this binding understands.
FORMATS: Final = ("xentrace", "xenalyze", "xentrace_format")

IDLE_DOMAIN: Final = 0x7FFF
#: Records whose events are made together: with fewer it takes longer, with more it takes more memory.
SLICE: Final = 640 << 10
#: Facts by the first word of the kinds that make them void.
_SYSTEM_OF: Final = {"hpet": "hpet", "via": "callback", "lapic": "apic"}


def bind(records: Records, context: Context) -> Bound:
    """Survey the recording once, then give its events slice by slice in bounded memory."""
    hpet = xentrace_hpet.survey(records, context)
    hvm = xentrace_hvm.survey(records)
    via = xentrace_via.survey(records, context, hvm.usable)
    observed: dict[str, Observation] = {
        "trace.lost": Observation(100, "TRC_LOST_RECORDS and damage found by the reader"),
        **_scheduling(records),
        **hpet.observed,
        **hvm.observed,
        **via.observed,
    }
    facts: dict[str, Any] = {"domains": _domains(records), **hpet.facts, **hvm.facts, **via.facts}
    more = xentrace_instrumented.survey(records, context, hvm.usable)
    observed.update(more.observed)
    for system in {kind.partition(".")[0] for kind in more.observed}:
        if isinstance(facts.get(_SYSTEM_OF.get(system, "")), str):
            del facts[_SYSTEM_OF[system]]  # why stock records say too little
    facts.update(more.facts)
    return Bound(observed, facts, _batches(records, context, hpet, hvm, via, more))


def _domains(records: Records) -> dict[str, int]:
    """Domains that ran and the number of their vCPUs."""
    if "TRC_SCHED_RUNSTATE_CHANGE" not in records.tables():
        return {}
    met = [part.unique() for part in records.parts("TRC_SCHED_RUNSTATE_CHANGE", ("dom", "vcpu"))]
    frame = pl.concat(met).filter(pl.col("dom") != IDLE_DOMAIN)
    frame = frame.group_by("dom").agg(n=pl.col("vcpu").n_unique()).sort("dom")
    return {str(dom): n for dom, n in frame.iter_rows()}


def _scheduling(records: Records) -> dict[str, Observation]:
    if "TRC_SCHED_RUNSTATE_CHANGE" not in records.tables():
        return {}
    seen = Observation(100, "TRC_SCHED_RUNSTATE_CHANGE")
    return {"sched.run": seen, "sched.stop": seen}


def _batches(
    records: Records,
    context: Context,
    hpet: xentrace_hpet.Survey,
    hvm: xentrace_hvm.Survey,
    via: xentrace_via.Survey,
    more: xentrace_instrumented.Survey,
) -> Iterator[pa.Table]:
    assembler = Assembler(context.source)
    forward = Forward(records)
    instrumented = xentrace_instrumented.Binder(forward, more)
    idle = xentrace_hpet.Binder(forward, context, hpet)
    virtual = xentrace_hvm.Binder(forward, hvm)
    lost = lost_events(context)
    for lo, hi in slices(context.rows, SLICE):
        lapics = list(virtual.events(lo, hi))
        callback = xentrace_via.of_machine(via, lapics, virtual.entries(lo, hi))
        stock = more.theirs([*idle.events(lo, hi), *lapics, *callback])
        frames = [*stock, *instrumented.events(lo, hi), *_runstates(forward, lo, hi)]
        if lo == 0:
            frames.append(lost)
        frames.reverse()  # handed over from the end, so that nothing holds them any longer
        last = max((int(f["t_ns"].max() or 0) for f in frames if f.height and f is not lost), default=None)  # type: ignore[arg-type]
        forward.release()
        idle.ahead.release()
        del lapics, callback, stock
        if last is None:
            continue
        table = assembler.push((frames.pop() for _ in range(len(frames))), last)
        if table is not None:
            yield table
            del table
    rest = assembler.push([], None)
    if rest is not None:
        yield rest


def _runstates(records: Forward, lo: int, hi: int) -> Iterator[pl.DataFrame]:
    """Which vCPU runs on which CPU, idle vCPUs left out."""
    name = "TRC_SCHED_RUNSTATE_CHANGE"
    if name not in records.tables():
        return
    frame = records.read(name, lo, hi, (*xentrace_hvm.KEEP, *xentrace_hvm.RUNSTATE))
    frame = chosen(frame, frame["dom"] != IDLE_DOMAIN)
    who = {"dom": "dom", "vcpu": "vcpu"}
    yield event(chosen(frame, frame["new_state"] == 0), "sched.run", name, **who)
    yield event(chosen(frame, frame["old_state"] == 0), "sched.stop", name, **who, val="new_state")
