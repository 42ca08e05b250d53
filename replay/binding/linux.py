"""Linux recordings (ftrace text, trace.dat, trace-cmd report, perf script, systrace) to canonical events (M.2, M.3)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import pyarrow as pa

from replay.binding import kvm_arm64, kvm_x86, linux_evtchn, linux_hpet, linux_idle, linux_irq
from replay.binding.base import Assembler, Bound, Context, Records, lost_events, slices
from replay.binding.linux_probes import Source
from replay.coverage import Observation

__all__ = ["FORMATS", "bind", "clock_hz"]

#: Records that are bound together: samples make up to eight events of one, so fewer than elsewhere.
SLICE: Final = 1 << 18
#: Formats of the readers whose tables this binding understands.
FORMATS: Final = ("trace.dat", "ftrace", "trace-cmd-report", "perf-script", "systrace")


def clock_hz(records: Records) -> float | None:
    """Frequency of a recording whose clock ticks (x86-tsc), from its own timer records; None if they do not tell."""
    return linux_idle.clock_hz(Source(records))


def bind(records: Records, context: Context) -> Bound:
    """Survey the recording once, then give its events slice by slice in bounded memory."""
    source = Source(records, context.options.get("event_map"))
    irq = linux_irq.survey(source)
    idle = linux_idle.survey(source, context)
    hpet = linux_hpet.survey(source, idle.channels, idle.owners, idle.offset_ns)
    idle.owned_by(hpet)
    channels = linux_evtchn.survey(source, irq.flows)
    x86 = kvm_x86.survey(source)
    arm = kvm_arm64.survey(source)
    observed: dict[str, Observation] = {
        "trace.lost": Observation(100, "lost events as the ring buffer counts them, and damage found by the reader"),
    }
    facts: dict[str, Any] = {}
    blind: dict[str, str] = {}
    for part in (irq, idle, hpet, channels, x86, arm):
        _add(observed, part.observed)
        facts.update(part.facts)
        blind.update(getattr(part, "blind", {}))
    observed.update(source.observed())
    if source.distrusted:
        facts["distrusted_probes"] = dict(sorted(source.distrusted.items()))
    if blind:
        facts["blind"] = dict(sorted(blind.items()))
    binders = (
        linux_irq.Binder(source, irq),
        linux_idle.Binder(source, idle),
        linux_hpet.Binder(source, hpet, idle.offset_ns),
        linux_evtchn.Binder(source, channels),
        kvm_x86.Binder(source, x86),
        kvm_arm64.Binder(source, arm),
    )
    return Bound(observed, facts, _batches(source, context, binders))


def _add(observed: dict[str, Observation], more: Mapping[str, Observation]) -> None:
    """Two sources of one kind: the weaker one decides how far it can be trusted."""
    for kind, seen in more.items():
        before = observed.get(kind)
        if before is None:
            observed[kind] = seen
        else:
            observed[kind] = Observation(min(before.conf, seen.conf), f"{before.how}; {seen.how}")


def _batches(source: Source, context: Context, binders: tuple[Any, ...]) -> Iterator[pa.Table]:
    assembler = Assembler(context.source)
    lost = lost_events(context)
    for lo, hi in slices(context.rows, SLICE):
        frames = [frame for binder in binders for frame in binder.events(lo, hi)]
        frames += source.mapped_events(lo, hi)
        last = max((int(f["t_ns"].max() or 0) for f in frames if f.height), default=None)
        if lo == 0:
            frames.append(lost)
        if last is None:
            continue
        table = assembler.push(frames, last)
        if table is not None:
            yield table
    rest = assembler.push([], None)
    if rest is not None:
        yield rest
