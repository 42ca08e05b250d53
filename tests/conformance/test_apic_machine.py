"""The machine around the rules of the APIC: whose event it is, what a recording lets be left out, what pins ask for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from replay.declare import Config
from replay.events import NONE, Batch, events_from_json
from replay.hardware.ioapic import rte_word
from replay.sink import Sink
from replay.systems.apic import SYSTEM
from replay.systems.apic.machine import ApicMachine
from tests.conformance.test_apic_rules import (
    BOOT,
    INVERSION,
    MS,
    NOT_HIGHEST,
    STUCK,
    UNMATCHED,
    WITHOUT_IRR,
    accept,
    codes,
    counted,
    deliver,
    eoi,
    exits,
    found,
    lockstep,
    lost,
    pin_line,
    replay,
    runs,
    serve,
    snap,
    stops,
    take,
)
from tests.conformance.test_ioapic_rules import PIN, VEC, ev, rte
from tests.conformance.test_ioapic_rules import replay as replay_pins

FIRST = {"dom": 0, "vcpu": 0}
SECOND = {"dom": 0, "vcpu": 1}
LEVEL = 1


def machine(events: Iterable[dict[str, Any]], init: dict[str, Any] | None = None) -> ApicMachine:
    """Without short cuts, after some events."""
    made = ApicMachine(Config(SYSTEM.parameters), Sink(closed=False))
    made.load(init or {})
    made.feed(Batch.of(events_from_json(list(events)), made.columns))
    return made


# -- whose event it is -------------------------------------------------------------------------------------------------


def test_the_vcpus_of_domain_0_are_vcpus() -> None:
    run = replay([*serve(0, 0x31, FIRST), *serve(100, 0x41, SECOND), *serve(200, 0x51)])
    assert {n: c for n, c in run.metrics.items() if n.startswith("deliveries.")} == {
        "deliveries.d0v0.0x31": 1, "deliveries.d0v1.0x41": 1, "deliveries.cpu1.0x51": 1,
    }  # fmt: skip
    where = {**FIRST, "cpu": 3}  # on which CPU it ran is not what it is
    (f,) = replay([eoi(100, None, where)]).findings
    assert (f.code.name, f.cpu, f.dom, f.vcpu) == (UNMATCHED, NONE, 0, 0)


def test_a_vcpu_of_domain_0_waits_for_its_requests() -> None:
    run = replay([runs(0, FIRST), accept(100, 0x31, FIRST)])
    assert found(run, STUCK) == [(100 + MS, 0x31, MS)]


def test_a_gap_on_a_cpu_is_one_of_every_vcpu() -> None:
    for who in (FIRST, {"dom": 1, "vcpu": 0}):
        assert codes(replay([*serve(0, 0x31, who), lost(50, 2), eoi(100, None, who)])) == []
    begins = (20, "trace.lost", {"cpu": 2, "val": 20, "flags": 1})
    assert codes(replay([begins, *take(100, 0x41, FIRST), *take(200, 0x31, FIRST)], end=300)) == []
    assert codes(replay([*take(100, 0x41, FIRST), *take(200, 0x31, FIRST)], end=300)) == [INVERSION]


# -- L1, L3, L4 --------------------------------------------------------------------------------------------------------


def test_the_trigger_mode_of_a_request_goes_into_tmr() -> None:
    asked = [ev(t, "lapic.accept", cpu=1, obj=v, flags=f) for t, v, f in ((0, 0x31, LEVEL), (1, 0x41, 0), (2, 0x51, 3))]
    assert machine(asked).processors[-2].lapic.tmr == 1 << 0x31 | 1 << 0x51
    up = ev(5, "ioapic.line", obj=PIN, val=1)
    for level in (0, 1):
        lapic = machine([up], rte(level=level)).processors[-2].lapic
        assert (lapic.irr, lapic.tmr) == (1 << VEC, level << VEC)


def test_a_request_that_was_served_is_none() -> None:
    """When IRR is read later, it is not known since when the vector is requested again."""
    again = [snap(25, 0, 1, 1 << 0x11), accept(26, 0x31), deliver(30, 0x31)]
    assert codes(replay([*serve(5, 0x51)[:2], eoi(7), exits(8, 0x51), *again], end=40)) == []
    assert codes(replay([accept(5, 0x51), *again], end=40)) == [NOT_HIGHEST]


def test_words_of_a_register_dump_are_64_vectors() -> None:
    full = [snap(5, 0, 0, -1)]  # all of 0 to 63
    assert codes(replay([*full, deliver(10, 0x3F)], end=20)) == []
    assert codes(replay([*full, deliver(10, 0x40)], end=20)) == [WITHOUT_IRR]


def test_an_eoi_of_vector_0_is_counted_as_one() -> None:
    run = replay([deliver(10, 0), eoi(20), *take(30, 0x31), eoi(40)], hidden=["lapic.exit"])
    assert (run.metrics["eois.cpu1.0x00"], run.metrics["max_nesting"]) == (1, 1)
    assert "eois.cpu1.unknown" not in run.metrics


def test_each_request_has_one_time_out() -> None:
    vcpu = {"dom": 1, "vcpu": 0}
    asked = [accept(100, 0x31, vcpu), accept(600, 0x41, vcpu), accept(MS + 200, 0x61, vcpu)]
    assert found(replay([runs(0), *asked]), STUCK) == [
        (MS + 100, 0x31, MS), (MS + 600, 0x41, MS), (2 * MS + 200, 0x61, MS),
    ]  # fmt: skip


def test_a_request_that_was_late_before_is_told_once() -> None:
    """It waited while its vCPU did not run, was served, and is asked for again: the old time-out is not its own."""
    vcpu = {"dom": 1, "vcpu": 0}
    late = [stops(50), accept(100, 0x31, vcpu), runs(MS + 500), deliver(MS + 600, 0x31, vcpu)]
    ended = [eoi(MS + 700, None, vcpu), exits(MS + 710, 0x31, vcpu)]
    again = [runs(0), *late, *ended, accept(MS + 900, 0x31, vcpu)]
    assert found(replay(again), STUCK) == [(2 * MS + 900, 0x31, MS)]
    # While it is still the same request the time-out goes on until it could have been delivered.
    assert found(replay([runs(0), *late[:3]]), STUCK) == [(2 * MS + 500, 0x31, MS)]
    held = [runs(0), *late[:2], runs(5 * MS + 300), stops(5 * MS + 400), runs(9 * MS)]
    assert found(replay(held), STUCK) == [(10 * MS, 0x31, MS)]


# -- pins --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vector", [0, VEC])
@pytest.mark.parametrize("known", [True, False])
def test_an_eoi_reaches_the_pins_of_the_vector_it_dismisses(vector: int, known: bool) -> None:
    """Named or not; where no vector is known to be in service it is the one that the record names."""
    up = ev(0, "ioapic.line", obj=PIN, val=1)
    taken = ev(10, "lapic.deliver", cpu=1, obj=vector)
    named, unnamed = ev(20, "lapic.eoi", cpu=1, obj=vector), ev(20, "lapic.eoi", cpu=1)
    wrong = ev(20, "lapic.eoi", cpu=1, obj=0x99)

    def again(*events: dict[str, Any]) -> int:
        run = replay_pins([up, *events], init=rte(vector=vector), from_boot=known)
        return run.metrics["level_redeliveries"]

    assert [again(taken, named), again(taken, unnamed), again(taken, wrong)] == [1, 1, 1]
    assert [again(named), again(unnamed), again(wrong)] == [1, 0, 0]


def test_a_vector_that_is_reserved_is_in_flight_nowhere() -> None:
    """82093AA: an entry that nobody programmed has vector 0; its message is refused, so no EOI will come."""
    events = [ev(0, "ioapic.line", obj=PIN, val=1), ev(90, "ioapic.check")]
    run = replay_pins(events, init=rte(vector=0), end=100)
    assert [(f.code.name, f.t, f.obj) for f in run.findings] == [
        ("lapic-illegal-vector", 0, 0), ("ioapic-remote-irr-stuck", 90, PIN),
    ]  # fmt: skip


@pytest.mark.parametrize("dom", [0, 3])
def test_the_pins_of_a_guest_ask_its_vcpus(dom: int) -> None:
    events = [
        ev(0, "ioapic.rte", dom=dom, obj=PIN, val=VEC, val2=rte_word(VEC, dest=1)),
        ev(1, "ioapic.line", dom=dom, obj=PIN, val=1),
    ]
    asked = machine(events).processors
    assert {key: (p.cpu, p.dom, p.vcpu, p.lapic.irr) for key, p in asked.items()} == {
        dom << 16 | 1: (NONE, dom, 1, 1 << VEC),
    }  # fmt: skip
    run = replay_pins([*events, ev(5, "lapic.accept", dom=dom, vcpu=1, obj=VEC, flags=1)], init={})
    assert run.metrics["irr_coalesced"] == 1


# -- what a recording lets be left out --------------------------------------------------------------------------------


def test_who_runs_may_be_left_out_where_nothing_is_timed() -> None:
    def ignored(observed: Iterable[str] | None, boot: bool = False) -> frozenset[str]:
        made = SYSTEM.make(None, Config(SYSTEM.parameters), Sink(closed=False), "")
        made.from_boot = boot
        made.observed = None if observed is None else frozenset(observed)
        return made.ignores()

    shown = {"lapic.deliver", "lapic.eoi", "sched.run", "sched.stop"}
    assert ignored(shown) == {"sched.run", "sched.stop"}
    assert ignored(shown, boot=True) == frozenset()
    assert ignored(None) == frozenset()
    for timed in ("lapic.accept", "lapic.exit", "lapic.reset"):
        assert ignored({*shown, timed}) == frozenset()


def test_the_end_of_a_recording_settles_nothing() -> None:
    """What the emulator would have written next is no outcome that is missing."""
    whole, _ = lockstep(BOOT)
    counts, wrong = lockstep([*BOOT, pin_line(10, 1)])
    assert wrong == []
    for name in ("ioapic_remote_irr_set", "ioapic_message"):
        assert counted(counts, name) == counted(whole, name)
