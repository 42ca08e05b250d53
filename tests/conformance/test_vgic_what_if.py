"""The virtual GIC, what-if on a recording: what is measured (spec 0.6), and what happens when."""

from __future__ import annotations

import warnings
from typing import Any

import pyarrow as pa

from replay.bodies import Measured
from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import KIND_ID, NIL, NONE, events_from_json
from replay.sink import Sink
from replay.systems import SYSTEMS
from replay.systems.vgic.calibration import effect, effect_fields, effect_object, effect_words
from tests.conformance.pinned import measure
from tests.conformance.test_vgic_rules import HW40, ev

VGIC = SYSTEMS["vgic"]
Event = dict[str, Any]
EDGE = KIND_ID["vgic.phys_irq"]


def taken(t: int, obj: int = 40, *, cpu: int = 0, virtual: int = 0) -> Event:
    return ev(t, "gic.ack", cpu=cpu, obj=obj, flags=virtual)


def loaded(t: int, obj: int = 40, vcpu: int = 0) -> Event:
    return ev(t, "lr_write", vcpu=vcpu, cpu=vcpu, obj=obj, tgt=0, val=HW40 + obj - 40)


def handled(t: int, end: int, obj: int = 40, vcpu: int = 0) -> list[Event]:
    return [ev(t, "ack", vcpu=vcpu, obj=obj), ev(end, "eoi", vcpu=vcpu, obj=obj)]


def measured(events: list[Event], **config: Any) -> Measured:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return measure("vgic", events, config)[0]


def what_if(events: list[Event], policy: str = "patch-v8", **config: Any) -> Run:
    """As from the command line."""
    found = measured(events, **config)
    _, fed, _ = measure("vgic", events, config)
    given = events_from_json(events).filter(pa.array([e["kind"] in fed for e in events]))
    return run_machine(
        VGIC, policy, [given], config=Config(VGIC.parameters, {**found.values, **config}), closed=True, sub="retimed",
        t_end=events[-1]["t"] + 1_000_000, from_boot=False, observed=frozenset(e["kind"] for e in events),
        measured=found,
    )  # fmt: skip


def acks(run: Run) -> list[tuple[int, int, int]]:
    """(t, vcpu, interrupt) of every acknowledge."""
    return [(t, effect_fields(what)["vcpu"], effect_object(what)) for t, what in run.effects]


#: Taken 300 ns after its edge, acknowledged 600 ns after that, ended 2000 ns later.
ONE = [ev(0, "phys_irq", obj=40), taken(100, virtual=1), taken(300), loaded(400), *handled(900, 2_900)]


def lags(events: list[Event]) -> dict[int, int]:
    found = measured(events).lags
    assert found is not None
    return dict(zip(found.seqs, found.due, strict=True))


def test_what_is_measured() -> None:
    found = measured(ONE)
    assert lags(ONE) == {0: 300}  # the guest's IAR read before it is of the virtual interface
    assert (found.values, found.init, found.aids) == ({"ack_ns": 600, "eoi_ns": 2_000}, {"targets": {40: 0}}, True)
    assert (found.reach_ns, found.assumptions) == (900, [])
    assert found.bodies is not None and list(found.bodies.take(40, 0, 0)[0]) == [600, 2_000]


def test_without_physical_acknowledges_an_edge_is_taken_at_once() -> None:
    bare = [e for e in ONE if e["kind"] != "gic.ack"]
    found = measured(bare)
    assert (lags(bare), found.aids, found.values) == ({0: 0}, False, {"ack_ns": 500, "eoi_ns": 2_000})
    virtual = [e for e in ONE if e["t"] != 300]
    assert (lags(virtual), measured(virtual).aids) == ({0: 0}, False)
    two = [ev(0, "phys_irq", obj=41), *bare]  # of two interrupts, neither coalesces
    assert lags(two) == {0: 0, 1: 0}
    assert what_if(two).metrics["guest_acks"] == 2


def test_the_body_begins_with_the_load_where_another_core_took_it() -> None:
    other = [ONE[0], taken(300, cpu=1), *ONE[3:]]
    assert measured(other).values == {"ack_ns": 500, "eoi_ns": 2_000}


def test_edges_that_nobody_took() -> None:
    """While one is on its way, or active, another coalesces; at the end it may be pending still."""
    first = [ONE[0], ev(100, "phys_irq", obj=40), *ONE[2:4], ev(500, "phys_irq", obj=40), *ONE[4:]]
    assert lags(first) == {0: 300}
    m = what_if(first).metrics
    assert (m["phys_edges"], m["coalesced"], m["arrivals"], m["guest_acks"]) == (3, 2, 1, 1)
    after = what_if([*ONE, ev(9_000, "phys_irq", obj=40)]).metrics
    assert (after["phys_edges"], after["coalesced"], after["arrivals"]) == (2, 0, 1)


def test_an_edge_while_it_is_active_is_latched_until_the_guest_ends_it() -> None:
    again = [*ONE[:4], ev(500, "phys_irq", obj=40), *handled(900, 2_900), taken(3_000), loaded(3_100),
             *handled(3_300, 4_000)]  # fmt: skip
    assert lags(again) == {0: 300, 4: 3_000}
    run = what_if(again)
    assert acks(run) == [(900, 0, 40), (3_200, 0, 40)]  # 300 after its arrival, which is at 2900 here
    assert (run.metrics["coalesced"], run.metrics["arrivals"]) == (0, 2)


def test_edges_are_taken_and_handled_when_they_were() -> None:
    second = [*ONE, ev(5_000, "phys_irq", obj=40), taken(5_050), loaded(5_060), *handled(5_070, 5_500)]
    run = what_if(second)
    assert (acks(run), run.metrics["phys_edges"]) == ([(900, 0, 40), (5_070, 0, 40)], 2)
    assert (run.metrics["coalesced"], run.metrics["max_delivery_ns"]) == (0, 600)
    # Both at the moment at which the first was taken: that one comes first.
    tie = [*ONE[:3], ev(300, "phys_irq", obj=40), *ONE[3:], taken(3_000), loaded(3_100), *handled(3_200, 3_500)]
    m = what_if(tie).metrics
    assert (m["arrivals"], m["coalesced"], m["guest_acks"]) == (2, 0, 2)
    # Taken at once, and ended before the next.
    prompt = [ev(0, "phys_irq", obj=40), taken(0), loaded(0), *handled(10, 20), ev(30, "phys_irq", obj=40), taken(30),
              loaded(30), *handled(45, 50)]  # fmt: skip
    assert acks(what_if(prompt)) == [(10, 0, 40), (45, 0, 40)]


def stepped(events: list[Event], end: int) -> Any:
    """The machine at `end`, with a log, fed with the edges."""
    machine: Any = VGIC.make(VGIC.policies["merged"](), Config(VGIC.parameters), Sink(closed=True), "retimed")
    machine.log, machine.measured = [], measured(events)
    machine.load(machine.measured.init)
    edges = [(n, e["t"]) for n, e in enumerate(events) if e["kind"] == "vgic.phys_irq"]
    given = {"kind": EDGE, "obj": 40, "val": NIL}
    machine.consume(tuple({**given, "t_ns": t, "seq": n}.get(c, NONE) for c in machine.columns) for n, t in edges)
    machine.finish(end)
    return machine


def test_each_edge_is_logged_once() -> None:
    """Taken later, coalesced, latched."""
    events = [ONE[0], ev(100, "phys_irq", obj=40), *ONE[2:4], ev(500, "phys_irq", obj=40), *handled(900, 2_900),
              taken(3_000)]  # fmt: skip
    machine = stepped(events, 10_000)
    edges = [(t, obj) for kind, t, _, _, obj, _, _ in machine.log if kind == EDGE]
    assert edges == [(0, 40), (100, 40), (500, 40)]
    assert (machine.metrics()["coalesced"], machine.metrics()["arrivals"]) == (1, 2)


def test_no_event_is_blamed_for_what_a_core_does_later() -> None:
    early = stepped([ONE[0], ev(100, "phys_irq", obj=40), *ONE[2:]], 350)
    assert (early.irqs[0].lr, early.vcpus[0].loaded[0], early.vcpus[0].loaded_seq[0]) == (0, 300, NONE)


def test_the_latched_edge_brings_its_own_body() -> None:
    """Latched at 500, while the first is handled; acknowledged 20 ns after it arrives, as it was."""
    events = [*ONE[:4], ev(500, "phys_irq", obj=40), *handled(900, 2_900), taken(2_900), loaded(2_900),
              *handled(2_920, 2_950), ev(6_000, "phys_irq", obj=40), taken(6_000), loaded(6_000),
              *handled(6_100, 6_150)]  # fmt: skip
    assert acks(what_if(events)) == [(900, 0, 40), (2_920, 0, 40), (6_100, 0, 40)]


def test_a_moved_interrupt_is_handled_by_the_same_body() -> None:
    events = [ev(0, "phys_irq", obj=40), taken(0), loaded(0), ev(50, "itargets", vcpu=1, obj=40, tgt=1),
              *handled(100, 200), ev(5_000, "lr_clear", vcpu=0, cpu=0, obj=40, tgt=0), ev(10_000, "phys_irq", obj=40),
              taken(10_000, cpu=1), loaded(10_000, vcpu=1), *handled(10_100, 10_300, vcpu=1)]  # fmt: skip
    run = what_if(events, "merged", phys_follows="immediate")
    assert [(vcpu, obj) for _, vcpu, obj in acks(run)] == [(0, 40), (1, 40)]
    assert acks(run)[0][0] == 100


def test_what_is_known_by_its_effect_only_is_said() -> None:
    def write(t: int, error: int) -> Event:
        return {**ev(t, "itargets", vcpu=0, obj=40, tgt=1), "t_err": error}

    assert measured([*ONE, write(3_000, 2_000)]).assumptions == []
    both = measured([*ONE, write(3_000, 2_001), write(4_000, 5_000_000), write(5_000, 3)]).assumptions
    assert both == [
        "2 of the guest's writes to ITARGETSR are known by their effect only: up to 5.0 ms earlier than assumed"
    ]


def test_effects_in_words() -> None:
    what = effect({"vcpu": 3, "obj": 40})
    assert (effect_words(what), effect_object(what)) == ("interrupt 40 acknowledged on vcpu 3", 40)
    assert effect_fields(what) == {"vcpu": 3, "obj": 40}


def test_without_edges_nothing_is_measured() -> None:
    found = measured(ONE[1:])
    assert found.lags is None and found.bodies is None
    assert (found.values, found.init) == ({}, {})
