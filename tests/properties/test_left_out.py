"""What a machine is not fed, or is fed in columns, changes no finding, number or effect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import polars as pl
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.declare import Config, System
from replay.driver import Run, run_machine
from replay.events import KIND_ID, KINDS, Batch, events_from_json
from replay.machine import Machine
from replay.sink import Sink
from replay.systems import SYSTEMS
from replay.systems.hpet_broadcast.machine import HpetBroadcast
from replay.systems.hpet_broadcast.recorded import RecordedBroadcast

US = 1_000
HPET, APIC, CALLBACK = SYSTEMS["hpet"], SYSTEMS["apic"], SYSTEMS["callback"]


def in_batches(events: Sequence[dict[str, Any]], cuts: Sequence[int]) -> Iterator[pa.Table]:
    table = events_from_json(events)
    ends = sorted({min(cut, len(events)) for cut in cuts} | {0, len(events)})
    return (table.slice(lo, hi - lo) for lo, hi in pairwise(ends))


def said(run: Run) -> object:
    return run.findings, run.metrics, list(run.effects), run.extra


class ByRow(HpetBroadcast):
    """Every row by the law."""

    def feed(self, batch: Batch) -> None:
        Machine.feed(self, batch)


class RecordedByRow(RecordedBroadcast):
    """Every row by the law."""

    def feed(self, batch: Batch) -> None:
        Machine.feed(self, batch)


SLEEPS = st.lists(
    st.tuples(
        st.sampled_from(["idle.enter", "idle.exit", "idle.exit", "idle.break", "isr.begin", "isr.end"]),
        st.integers(0, 3), st.sampled_from([0, 0, 1, 5 * US, 40 * US, 300 * US]), st.sampled_from([0, 30, 200, 900]),
        st.sampled_from([0x30, 0xE1]),
    ),
    max_size=60,
)  # fmt: skip
CUTS = st.lists(st.integers(0, 60), max_size=4)


@settings(max_examples=50, deadline=None)
@given(SLEEPS, CUTS, st.sampled_from(sorted(HPET.policies)), st.integers(0, 2))
def test_exits_in_columns(
    steps: Sequence[tuple[str, int, int, int, int]], cuts: Sequence[int], policy: str, n: int
) -> None:
    events, t = [], 0
    for kind, cpu, pause, sleep, vector in steps:
        t += pause
        event = {"t": t, "kind": kind, "cpu": cpu, "obj": vector}
        events.append({**event, "val": t + sleep * US} if kind == "idle.enter" else event)
    if not events:
        return
    by_row = replace(HPET, make=lambda policy, config, sink, sub: ByRow(policy, config, sink))
    config = Config(HPET.parameters, {"n_channels": n, "n_cpus": 2})
    one, other = (
        run_machine(system, policy, in_batches(events, cuts), config=config, closed=True, t_end=t + 5_000 * US)
        for system in (HPET, by_row)
    )
    assert said(one) == said(other)


#: Small numbers (ns), so that what is judged later is judged among other events.
QUICK = {
    "slop_ns": 4, "exit_latency_ns": 2, "miss_ns": 12, "exit_path_ns": 5, "remote_wake_ns": 6, "inflight_ns": 3,
}  # fmt: skip
BROADCASTS = st.lists(
    st.tuples(
        st.sampled_from(["move", "move", "move", "hpet.handler.begin", "hpet.handler.begin", "hpet.retarget", "other"]),
        st.integers(0, 2), st.integers(0, 1), st.sampled_from([0, 0, 1, 1, 2, 4, 7, 11, 30]),
        st.sampled_from([None, 0, 1, 3, 8, 20]), st.sampled_from([0, 0, 0, 0, 1, 2]),
    ),
    min_size=8, max_size=80,
)  # fmt: skip
RARE = st.lists(
    st.tuples(st.integers(0, 80), st.sampled_from(["hpet.program", "trace.lost", "refused", "hpet.fire"])), max_size=1
)


@settings(max_examples=60, deadline=None)
@given(
    BROADCASTS, RARE, CUTS, st.sampled_from(sorted(HPET.policies)), st.sampled_from([{}, {}, {"fixed_owners": 1}]),
    st.booleans(),
)  # fmt: skip
def test_quiet_sleeps_in_columns(
    steps: Sequence[tuple[str, int, int, int, int | None, int]], rare: Sequence[tuple[int, str]],
    cuts: Sequence[int], policy: str, given: dict[str, int], ends: bool,
) -> None:  # fmt: skip
    events: list[dict[str, Any]] = []
    asleep: set[int] = set()
    t = 1_000
    for kind, cpu, channel, pause, sleep, reason in steps:
        t += pause
        event: dict[str, Any] = {"t": t, "kind": kind, "cpu": cpu, "obj": channel, "tgt": reason}
        if kind == "move":
            event["kind"] = "idle.exit" if cpu in asleep else "idle.enter"
            asleep ^= {cpu}
        elif kind == "other":  # a record is missing
            event["kind"] = ("idle.exit", "idle.enter", "hpet.handler.end")[reason]
        if event["kind"] == "idle.enter":
            event["val"] = sleep and t + sleep
        events.append(event)
    for at, kind in rare:
        if at < len(events):
            now = events[at]["t"]
            event = {"t": now, "kind": kind, "cpu": 0, "obj": 0, "tgt": 1, "val": now, "flags": 1}
            events.insert(at, {**event, "kind": "hpet.retarget"} if kind == "refused" else event)
    if not events:
        return
    by_row = replace(HPET, make=lambda policy, config, sink, sub: RecordedByRow(policy, config, sink))
    observed = {k.name for k in KINDS if k.sys == "hpet"} - (set() if ends else {"hpet.handler.end"})
    one, other = (
        run_machine(
            system, policy, in_batches(events, cuts), config=Config(HPET.parameters, {**QUICK, **given}), closed=False,
            t_end=t + 50, from_boot=False, observed=frozenset(observed),
        )
        for system in (HPET, by_row)
    )  # fmt: skip
    assert said(one) == said(other)


KEPT = ("lapic.deliver", "lapic.eoi", "lapic.idle", "lapic.tpr", "trace.lost")
WORK = st.lists(
    st.tuples(
        st.sampled_from([*KEPT, "sched.run", "sched.stop", "sched.run", "sched.stop", "lapic.deliver", "lapic.eoi"]),
        st.integers(0, 2), st.integers(0, 1), st.sampled_from([0, 1, 50 * US, 20_000 * US]),
        st.sampled_from([0x31, 0x41, 0x51, 0xFF]),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(WORK, CUTS)
def test_what_is_ignored_changes_nothing(steps: Sequence[tuple[str, int, int, int, int]], cuts: Sequence[int]) -> None:
    events, t = [], 0
    for kind, dom, vcpu, pause, vector in steps:
        t += pause
        owner: dict[str, Any] = {} if kind == "trace.lost" else {"dom": dom, "vcpu": vcpu}
        value = t - 1 if kind == "trace.lost" else 0x20 if kind == "lapic.tpr" else 1
        events.append({"t": t, "kind": kind, "cpu": vcpu, "obj": vector, "val": value, **owner})
    if not events:
        return
    run_both_ways(APIC, "any", {}, frozenset((*KEPT, "sched.run", "sched.stop")), events, cuts)


VIA = ("via.vmentry", "via.inject", "via.eoi", "via.isr_begin", "via.isr_end", "via.upcall_clear", "via.gsi_assert")
CALLBACKS = st.lists(
    st.tuples(
        st.sampled_from([*VIA, "via.rte_write", "via.vmentry", "lapic.idle", "sched.run", "sched.stop", "trace.lost"]),
        st.integers(0, 1), st.integers(0, 1), st.sampled_from([0, 1, 50 * US, 20_000 * US]),
        st.sampled_from([0x31, 0x71, 0xF3]), st.sampled_from([None, 0, 1]),
    ),
    max_size=60,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(CALLBACKS, CUTS, st.sampled_from([{}, {"vector": 0xF3}]))
def test_which_vcpu_runs_is_nothing_to_a_callback_without_sets(
    steps: Sequence[tuple[str, int, int, int, int, int | None]], cuts: Sequence[int], given: dict[str, int]
) -> None:
    events, t = [], 0
    for kind, dom, vcpu, pause, vector, value in steps:
        t += pause
        owner: dict[str, Any] = {} if kind == "trace.lost" else {"dom": dom, "vcpu": vcpu}
        obj = {"via.gsi_assert": 28, "via.rte_write": 28}.get(kind, vector)
        said_too = {"trace.lost": t - 1, "via.rte_write": 0x8000 | vector}.get(kind, value)
        events.append({"t": t, "kind": kind, "cpu": vcpu, "obj": obj, "val": said_too, **owner})
    if not events:
        return
    seen = frozenset((*VIA, "via.rte_write", "lapic.idle", "sched.run", "sched.stop", "trace.lost"))
    run_both_ways(CALLBACK, "applied", given, seen, events, cuts)


def run_both_ways(
    system: System, policy: str, given: dict[str, int], observed: frozenset[str], events: Sequence[dict[str, Any]],
    cuts: Sequence[int],
) -> None:  # fmt: skip
    """All events, and without sched.run and sched.stop, which the machine says it ignores."""
    left: list[frozenset[str]] = []

    def reader(columns: Sequence[str], ignored: frozenset[str]) -> Iterator[pa.Table]:
        left.append(ignored)
        for batch in in_batches(events, cuts):
            keep = ~pl.Series(batch["kind"].cast(pa.string()).to_pylist(), dtype=pl.String).is_in(list(ignored))
            yield batch.filter(pa.array(keep.to_list()))

    one, other = (
        run_machine(
            system, policy, batches, config=Config(system.parameters, given), closed=False,
            t_end=events[-1]["t"] + 1, from_boot=False, observed=observed,
        )
        for batches in (reader, in_batches(events, cuts))
    )  # fmt: skip
    assert said(one) == said(other)
    assert left == [frozenset(("sched.run", "sched.stop"))]


def test_every_recorded_kind_that_is_ignored_exists() -> None:
    machine = HPET.make(HPET.policies["current"](), Config(HPET.parameters), Sink(closed=False), "")
    assert machine.ignores() <= set(KIND_ID) and "idle.break" in machine.ignores()
    assert not machine.ignores() & {k.name for k in KINDS if k.name.startswith(("hpet.", "isr.", "trace."))}
