"""Event channels under random loads: what holds for every run (spec V, S5)."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.declare import Config
from replay.events import KIND_ID, NIL, NONE
from replay.sink import Finding, Sink
from replay.systems.event_channel import SYSTEM
from replay.systems.event_channel.fifo import FifoMachine
from replay.systems.event_channel.machine import COLUMNS, TwoLevelMachine
from replay.systems.event_channel.policies import POLICIES

Row = tuple[int, ...]
PORTS = (3, 9, 40, 65, 70, 127, 700)
VCPUS = 3


def row(kind: str, t: int, **fields: int) -> Row:
    values = {"kind": KIND_ID[kind], "t_ns": t, "val": NIL, "val2": NIL, "flags": 0, **fields}
    return tuple(values.get(name, NONE) for name in COLUMNS)


def ordered(rows: Iterable[Row]) -> list[Row]:
    """In time, numbered."""
    result = sorted(rows, key=lambda r: r[1])
    at = COLUMNS.index("seq")
    return [(*r[:at], index, *r[at + 1 :]) for index, r in enumerate(result)]


class Recorder(TwoLevelMachine):
    """A closed run that writes down what a perfect recorder would have seen."""

    def __init__(self, policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(policy, config, sink)
        self.log: list[Row] = []
        dispatched = self.monitor.dispatched

        def record(dom: Any, vcpu: Any, channel: Any, t: int, seq: int) -> None:
            self.log.append(row("evtchn.handled", t, vcpu=vcpu.number, obj=channel.number))
            self.log.append(row("evtchn.clear", t, vcpu=vcpu.number, obj=channel.number))
            dispatched(dom, vcpu, channel, t, seq)

        self.monitor.dispatched = record  # type: ignore[method-assign]

    def take(self, rows: Iterable[Row]) -> None:
        for event in rows:
            self.advance(event[1])
            self.log.append(event)
            super().take([event])

    def upcall(self, dom: Any, vcpu: Any) -> None:
        if vcpu.upcall_mask == 1 or vcpu.upcall_pending != 1:
            return
        self.log.append(row("evtchn.upcall", self.now, vcpu=vcpu.number))
        super().upcall(dom, vcpu)
        self.log.append(row("evtchn.upcall_end", self.now, vcpu=vcpu.number))

    def unmask_by_hypercall(self, dom: Any, channel: Any) -> None:
        self.log.append(row("evtchn.unmask_hypercall", self.now, vcpu=channel.unmask_vcpu, obj=channel.number))
        super().unmask_by_hypercall(dom, channel)

    def schedule_upcall(self, dom: Any, vcpu: Any) -> None:
        super().schedule_upcall(dom, vcpu)


def machine(policy: str, *, closed: bool, from_boot: bool = True, cls: Any = TwoLevelMachine, **config: Any) -> Any:
    made = cls(POLICIES[policy](), Config(SYSTEM.parameters, config), Sink(closed=closed))
    made.from_boot = from_boot
    return made


def run(made: Any, rows: list[Row], end: int | None = None) -> Any:
    made.consume(iter(rows))
    made.finish(rows[-1][1] + 1_000_000 if end is None else end)
    return made


def key(findings: list[Finding]) -> list[tuple[int, str, int, int]]:
    return sorted((f.t, f.code.name, f.obj, f.vcpu) for f in findings)


@st.composite
def loads(draw: st.DrawFn, *, rebinds: str = "none", toggles: bool = True) -> list[Row]:
    """Sends, masks and unmasks from any vCPU, rebinds of both sides or of one, upcall_mask toggles."""
    events = [row("evtchn.rebind", 0, obj=p, tgt=draw(st.integers(0, VCPUS - 1))) for p in PORTS]
    t = 0
    for _ in range(draw(st.integers(3, 40))):
        t += draw(st.sampled_from((0, 20, 50, 99, 100, 101, 400, 3_000, 9_950, 10_000, 30_000)))
        port = draw(st.sampled_from(PORTS))
        vcpu = draw(st.integers(0, VCPUS - 1))
        what = draw(st.integers(0, 11))
        if what < 4:
            events.append(row("evtchn.send", t, obj=port))
        elif what < 6:
            events.append(row("evtchn.mask", t, vcpu=vcpu, obj=port))
        elif what < 9:
            events.append(row("evtchn.unmask", t, vcpu=vcpu, obj=port))
        elif what < 10 and toggles:
            events.append(row("evtchn.upcall_mask", t, vcpu=vcpu))
            events.append(row("evtchn.upcall_unmask", t + draw(st.integers(0, 2_000)), vcpu=vcpu))
        elif rebinds == "both":
            events.append(row("evtchn.mask", t, vcpu=vcpu, obj=port))
            events.append(row("evtchn.rebind", t, vcpu=vcpu, obj=port, tgt=draw(st.integers(0, VCPUS - 1))))
        elif rebinds == "one":
            kind = draw(st.sampled_from(("guest.bind_cpu", "evtchn.bind_vcpu")))
            events.append(row(kind, t, vcpu=vcpu, obj=port, tgt=draw(st.integers(0, VCPUS - 1))))
    return ordered(events)


def never_strands(rows: list[Row], policy: str) -> None:
    made = run(machine(policy, closed=True), rows)
    assert [f.code.name for f in made.sink.findings if f.severity != "info"] == []


def conserves(rows: list[Row], policy: str) -> None:
    m = run(machine(policy, closed=True), rows).metrics()
    assert m["sends"] == m["handled"] + m["coalesced"] + m["pending"] + m["closed_pending"]


def reruns_identically(rows: list[Row], policy: str) -> None:
    first, second = (run(machine(policy, closed=True), rows) for _ in range(2))
    assert repr(first.sink.findings) == repr(second.sink.findings)
    assert first.metrics() == second.metrics()


def recording(rows: list[Row], policy: str) -> tuple[list[Row], Any]:
    made = run(machine(policy, closed=True, cls=Recorder), rows)
    return ordered(made.log), made


def recording_says_the_same(rows: list[Row], policy: str) -> None:
    """Every stranding that the closed run found is found in its recording, at the same time, and no other."""
    log, closed = recording(rows, policy)
    opened = run(machine(policy, closed=False), log, rows[-1][1] + 1_000_000)
    wanted = [k for k in key(closed.sink.findings) if k[1] == "evtchn-stranded-pending"]
    got = [k for k in key(opened.sink.findings) if k[1] == "evtchn-stranded-pending"]
    assert got == wanted
    assert opened.handled == closed.handled


def stays_clean(rows: list[Row], policy: str, cut: int) -> None:
    """The end of a clean recording, nothing known at its start."""
    log, _ = recording(rows, policy)
    end = rows[-1][1] + 1_000_000
    whole = run(machine(policy, closed=False), log, end)
    part = run(machine(policy, closed=False, from_boot=False), log[cut % len(log) :], end)
    known = {(f.code.name, f.obj) for f in whole.sink.findings}
    assert {(f.code.name, f.obj) for f in part.sink.findings if f.severity != "info"} <= known


policies = st.sampled_from(("current", "proposed", "modern"))
careful = st.sampled_from(("proposed", "modern"))
any_load = st.one_of(loads(), loads(rebinds="both"), loads(rebinds="one"))
CHECKS = [
    pytest.param(never_strands, (loads(), careful), id="careful-policies-never-strand"),
    pytest.param(conserves, (any_load, policies), id="conservation"),
    pytest.param(reruns_identically, (any_load, policies), id="reruns"),
    pytest.param(recording_says_the_same, (any_load, policies), id="recording-says-the-same"),
    pytest.param(stays_clean, (any_load, policies, st.integers(0, 400)), id="suffix-proves-nothing-new"),
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


@pytest.mark.parametrize("bound", [True, False])
@pytest.mark.parametrize("from_boot", [True, False])
def test_a_port_that_may_need_the_selector_bit_excuses_it(from_boot: bool, bound: bool) -> None:
    """Port 70 is pending. Bound to vCPU 2, the bit of its word there is not port 65's alone, also when nobody knows
    whether 70 is masked."""
    rows = [row("evtchn.rebind", 0, obj=port, tgt=0) for port in (65, 70)]
    rows += [row("guest.bind_cpu", 0, vcpu=0, obj=70, tgt=2)] * bound
    rows += [row("evtchn.mask", 0, vcpu=0, obj=65), row("evtchn.send", 0, obj=65), row("evtchn.send", 0, obj=70)]
    for vcpu in (0, 2):
        rows += [row("evtchn.upcall", 100, vcpu=vcpu), row("evtchn.upcall_end", 100, vcpu=vcpu)]
    rows += [row("evtchn.unmask", 30_000, vcpu=2, obj=65)]
    made = run(machine("current", closed=False, from_boot=from_boot), ordered(rows), 1_000_000)
    found = {(f.code.name, f.obj) for f in made.sink.findings if f.severity != "info"}
    assert ("evtchn-stranded-pending", 65) in found
    assert (("evtchn-selector-wrong-vcpu", 65) in found) == (not bound)


def test_current_strands_and_is_rescued_by_luck() -> None:
    """The loads see the defect: otherwise `never strands` would say nothing."""
    seen: Counter[str] = Counter()
    for seed in range(20):
        rng = random.Random(seed)
        t = 0
        events: list[Row] = []
        for _ in range(300):
            t += rng.choice((100, 3_000, 30_000))
            kind = rng.choice(("evtchn.send", "evtchn.mask", "evtchn.unmask"))
            events.append(row(kind, t, vcpu=rng.randrange(VCPUS), obj=rng.choice(PORTS)))
        seen.update(f.code.name for f in run(machine("current", closed=True), ordered(events)).sink.findings)
        recording_says_the_same(ordered(events), "current")
        assert run(machine("proposed", closed=True), ordered(events)).metrics()["stranded"] == 0
    assert seen["evtchn-stranded-pending"] > 100
    assert seen["evtchn-piggyback-delivery"] > 10


# -- FIFO ---------------------------------------------------------------------------------------------------------


def fifo_keeps_its_promises(rows: list[Row]) -> None:
    """Nothing is lost, nothing is left unlinked, and the queues are empty in the end (F1..F4)."""
    made: FifoMachine = machine("any", closed=True, cls=FifoMachine)
    last = rows[-1][1]
    for vcpu in range(VCPUS):
        rows = [*rows, row("evtchn.upcall_unmask", last + 5_000, vcpu=vcpu)]
    rows = [*rows, row("fifo.check", last + 500_000)]
    run(made, rows, last + 1_000_000)
    m = made.metrics()
    assert m["sends"] == m["handled"] + m["coalesced"] + m["pending"]
    assert made.sink.findings == []
    for dom in made.domains.values():
        for port in dom.ports.values():
            assert port.linked == 0 or port.masked == 1
            assert not port.is_ready()


FIFO_LOADS = st.one_of(loads(), loads(rebinds="both"))


@settings(max_examples=50, deadline=None)
@given(FIFO_LOADS)
def test_fifo(rows: list[Row]) -> None:
    fifo_keeps_its_promises(rows)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None)
@given(FIFO_LOADS)
def test_fifo_slow(rows: list[Row]) -> None:
    fifo_keeps_its_promises(rows)
