"""Irq flow under random loads: what holds for every run (spec V, S4)."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.declare import Config
from replay.events import KIND_ID, NIL, NONE
from replay.sink import Sink
from replay.systems.irq_flow import SYSTEM
from replay.systems.irq_flow.machine import IrqFlowMachine
from replay.systems.irq_flow.policies import POLICIES

Row = tuple[int, ...]
COLUMNS = IrqFlowMachine.columns
CPUS = 3
CONFIG = {"lateeoi_ns": 2_000}


def row(kind: str, t: int, **fields: int) -> Row:
    values = {"kind": KIND_ID[kind], "t_ns": t, "val": NIL, "val2": NIL, "flags": 0, **fields}
    return tuple(values.get(name, NONE) for name in COLUMNS)


def ordered(rows: Iterable[Row]) -> list[Row]:
    """In time, numbered."""
    result = sorted(rows, key=lambda r: r[1])
    at = COLUMNS.index("seq")
    return [(*r[:at], index, *r[at + 1 :]) for index, r in enumerate(result)]


class Recorder(IrqFlowMachine):
    """A closed run that writes down what a perfect recorder would have seen."""

    def __init__(self, policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(policy, config, sink)
        self.log: list[Row] = []
        self.flow_cpu = NONE
        self.quiet = False

    def note(self, kind: str, irq: Any, cpu: int, val: int = NIL) -> None:
        if not self.quiet:
            self.log.append(row(kind, self.now, obj=irq.irq, cpu=cpu, val=val))

    def consume(self, rows: Iterable[Row]) -> None:
        for event in rows:
            self.advance(event[1])
            self.log.append(event)
            self.quiet = True  # what a stimulus does is told by the stimulus
            super().consume([event])
            self.quiet = False

    def upcall(self, irq: Any, cpu: int) -> None:
        self.flow_cpu = cpu
        super().upcall(irq, cpu)

    def mask(self, irq: Any, reason: int) -> None:
        self.note("flow.mask", irq, self.flow_cpu, reason)
        super().mask(irq, reason)

    def unmask(self, irq: Any, reason: int, cpu: int) -> None:
        self.note("flow.unmask", irq, cpu, reason)
        super().unmask(irq, reason, cpu)

    def clear(self, irq: Any) -> None:
        naive = self.policy.name == "fasteoi-naive"
        self.note("flow.eoi" if naive else "flow.ack", irq, self.flow_cpu)
        super().clear(irq)

    def begin(self, irq: Any, cpu: int) -> None:
        self.note("flow.handler.begin", irq, cpu)
        super().begin(irq, cpu)

    def handler_end(self, irq: Any, cpu: int) -> None:
        self.flow_cpu = cpu
        self.note("flow.handler.end", irq, cpu, 1)
        super().handler_end(irq, cpu)

    def lateeoi(self, irq: Any, cpu: int, spurious: bool) -> None:
        self.note("flow.lateeoi", irq, cpu)
        super().lateeoi(irq, cpu, spurious)

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        if action == 1:
            self.note("flow.consume", self.irq(a), b)
        super().fire(action, a, b, c)


def machine(policy: str, *, closed: bool, from_boot: bool = True, cls: Any = IrqFlowMachine, **config: Any) -> Any:
    made = cls(POLICIES[policy](), Config(SYSTEM.parameters, {**CONFIG, **config}), Sink(closed=closed))
    made.from_boot = from_boot
    return made


def run(made: Any, rows: list[Row]) -> Any:
    made.consume(iter(rows))
    made.finish(rows[-1][1] + 1_000_000)
    return made


@st.composite
def loads(draw: st.DrawFn, *, disables: bool = True) -> list[Row]:
    """Raises, affinity changes and disable/enable pairs of two irqs."""
    events: list[Row] = []
    t = 0
    for _ in range(draw(st.integers(2, 40))):
        t += draw(st.sampled_from((0, 50, 100, 150, 2_999, 3_000, 3_001, 5_000, 9_900, 10_000, 25_000)))
        irq = draw(st.integers(5, 6))
        what = draw(st.integers(0, 9))
        if what < 6:
            events.append(row("flow.raise", t, obj=irq))
        elif what < 9 or not disables:
            events.append(row("flow.set_affinity", t, obj=irq, tgt=draw(st.integers(0, CPUS - 1))))
        else:
            events.append(row("flow.disable", t, obj=irq, cpu=0))
            t += draw(st.sampled_from((0, 50, 4_000, 12_000)))
            events.append(row("flow.enable", t, obj=irq, cpu=0))
    return ordered(events) or [row("flow.raise", 0, obj=5)]


def never_loses(rows: list[Row], policy: str) -> None:
    made = run(machine(policy, closed=True), rows)
    assert made.metrics()["lost_edges"] == 0
    assert [f.code.name for f in made.sink.findings] == []
    assert made.metrics()["outstanding"] == 0


def conserves(rows: list[Row], policy: str) -> None:
    m = run(machine(policy, closed=True), rows).metrics()
    assert m["raises"] + m["resends"] == m["acked"] + m["coalesced"] + m["pending"]
    assert m["raises"] == m["consumed"] + m["lost_raises"] + m["outstanding"]


def reruns_identically(rows: list[Row], policy: str) -> None:
    first, second = (run(machine(policy, closed=True), rows) for _ in range(2))
    assert repr(first.sink.findings) == repr(second.sink.findings)
    assert first.metrics() == second.metrics()


def recording(rows: list[Row], policy: str) -> tuple[list[Row], Any]:
    made = run(machine(policy, closed=True, cls=Recorder), rows)
    return ordered(made.log), made


def found(made: Any, *names: str) -> list[tuple[str, int, int]]:
    return sorted((f.code.name, f.obj, f.val) for f in made.sink.findings if f.code.name in names)


def recording_says_the_same(rows: list[Row], policy: str) -> None:
    """The recording of a closed run shows the same losses and the same drops, and no other error."""
    log, closed = recording(rows, policy)
    opened = run(machine(policy, closed=False, settle_ns=0), log)
    assert found(opened, "flow-edge-lost") == found(closed, "flow-edge-lost")
    if policy != "fasteoi-naive":
        assert opened.dropped == closed.dropped
    assert opened.handler_runs == closed.handler_runs
    errors = {f.code.name for f in opened.sink.findings if f.severity == "error"}
    assert errors <= {"flow-edge-lost"}


def stays_clean(rows: list[Row], policy: str, cut: int) -> None:
    """The end of a recording, nothing known at its start, proves nothing that the whole does not."""
    log, _ = recording(rows, policy)
    whole = run(machine(policy, closed=False), log)
    part = run(machine(policy, closed=False, from_boot=False), log[cut % len(log) :])
    known = {(f.code.name, f.obj) for f in whole.sink.findings}
    assert {(f.code.name, f.obj) for f in part.sink.findings if f.severity != "info"} <= known


careful = st.sampled_from(("edge", "fasteoi", "lateeoi"))
policies = st.sampled_from(tuple(POLICIES))
CHECKS = [
    pytest.param(never_loses, (loads(), careful), id="careful-policies-never-lose"),
    pytest.param(conserves, (loads(), policies), id="conservation"),
    pytest.param(reruns_identically, (loads(), policies), id="reruns"),
    pytest.param(recording_says_the_same, (loads(), policies), id="recording-says-the-same"),
    pytest.param(stays_clean, (loads(), policies, st.integers(0, 400)), id="suffix-proves-nothing-new"),
]


@pytest.mark.parametrize(("check", "strategies"), CHECKS)
def test_property(check: Any, strategies: Any) -> None:
    bind_arguments: Any = given(*strategies)
    settings(max_examples=50, deadline=None)(bind_arguments(check))()


@pytest.mark.slow
@pytest.mark.parametrize(("check", "strategies"), CHECKS)
def test_property_slow(check: Any, strategies: Any) -> None:
    bind_arguments: Any = given(*strategies)
    settings(max_examples=1000, deadline=None)(bind_arguments(check))()


@pytest.mark.parametrize("policy", list(POLICIES))
def test_who_loses(policy: str) -> None:
    """level and fasteoi-naive lose edges under a load of raises and moves; the others do not (spec V)."""
    lost = 0
    for seed in range(20):
        rng = random.Random(seed)
        t = 0
        events: list[Row] = []
        for _ in range(300):
            t += rng.choice((100, 3_000, 6_000, 30_000))
            if rng.random() < 0.3:
                events.append(row("flow.set_affinity", t, obj=5, tgt=rng.randrange(CPUS)))
            else:
                events.append(row("flow.raise", t, obj=5))
        lost += run(machine(policy, closed=True), ordered(events)).metrics()["lost_edges"]
        recording_says_the_same(ordered(events), policy)
    if policy in ("level", "fasteoi-naive"):
        assert lost > 20
    else:
        assert lost == 0
