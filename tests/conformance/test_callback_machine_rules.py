"""Callback rules that need a second look: what ends an episode, what a gap hides, vectors that move, what-ifs."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

import pytest

from replay.bodies import Bodies, Measured
from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import events_from_json
from replay.hardware.ioapic import rte_word
from replay.systems.hvm_callback import SYSTEM
from replay.systems.hvm_callback.calibration import FIRST, UNTIL, Recorded
from replay.systems.hvm_callback.matching import Matching
from tests.conformance.pinned import measure
from tests.conformance.test_callback_rules import (
    EDGE,
    GSI,
    MS,
    RTE,
    STOCK,
    US,
    VECTOR,
    Event,
    ev,
    guest_run,
    late,
    replay,
    routed,
    said,
    stale,
)

LATE = "via-late-assert"
DELIVERY = "via-late-delivery"
LOST = "via-lost-callback"
MISMATCH = "via-count-mismatch"
SPURIOUS = "via-spurious-inject"
STALE = "via-stale-assert"
STORM = "via-inject-storm"
STUCK = "via-remote-irr-stuck"
UNMATCHED = "via-eoi-unmatched"
EXCLUSIVE = {"vector": VECTOR, "gsi_shared": 0}
WORK = STOCK | {"evtchn.handled"}
KINDS = frozenset(SYSTEM.kinds)
#: No code but the one that is looked at.
PATIENT = {"late_delivery_ns": 100 * MS, "late_assert_ns": 100 * MS}


def when(run: Run, code: str) -> list[int]:
    return [f.t for f in run.findings if f.code.name == code]


def gap(t: int) -> Event:
    return {"t": t, "kind": "trace.lost", "cpu": 0, "val": t}


def line(t: int, a: int, **fields: int) -> Event:
    return ev(t, "via.line", obj=GSI, val=a, **fields)


def set_(t: int) -> Event:
    return ev(t, "via.upcall_set", vcpu=0)


def clear(t: int, v: int = 1, **fields: int) -> Event:
    return ev(t, "via.upcall_clear", vcpu=v, **fields)


def inject(t: int, v: int = 1, vector: int = VECTOR) -> Event:
    return ev(t, "via.inject", vcpu=v, obj=vector)


def eoi(t: int, v: int = 1, **fields: int) -> Event:
    return ev(t, "via.eoi", vcpu=v, **fields)


def write(t: int, word: int) -> Event:
    return ev(t, "via.rte_write", obj=GSI, val=word)


def stop(t: int, v: int, state: int) -> Event:
    return ev(t, "sched.stop", vcpu=v, cpu=0, val=state)


def run_(t: int, v: int) -> Event:
    return ev(t, "sched.run", vcpu=v, cpu=0)


def after(run: Run, code: str, name: str) -> list[Any]:
    return [getattr(f, name) for f in run.findings if f.code.name == code]


# -- who runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", [True, False])
def test_idle_vcpus_are_no_domain(closed: bool) -> None:
    """Xen numbers the idle domain 0x7fff."""
    entry = {"t": US, "kind": "via.vmentry", "vcpu": 0}
    metrics = [
        replay([{**entry, "dom": dom}], closed=closed, end=MS).metrics["vm_entries"] for dom in (0x7FFF, 0x7FFE)
    ]
    assert metrics == [0, 1]


def test_a_time_out_comes_before_the_next_event() -> None:
    """The callback had been lost for a millisecond when it was polled at 5 ms."""
    events = [write(0, EDGE), run_(0, 1), set_(US), line(US, 1), inject(2 * US), eoi(3 * US), clear(5 * MS)]
    assert when(replay(events, end=9 * MS), LOST) == [3 * US + MS + 1]


@pytest.mark.parametrize(
    ("boot", "closed", "observed", "left_out"),
    [(False, False, STOCK, True), (True, False, STOCK, False), (False, True, STOCK, False), (False, False, None, False),
     *((False, False, STOCK | {kind}, False)
       for kind in ("via.upcall_set", "via.line", "lapic.intr_window", "lapic.reset"))],
)  # fmt: skip
def test_who_runs_is_read_where_something_depends_on_it(
    boot: bool, closed: bool, observed: frozenset[str] | None, left_out: bool
) -> None:
    asked: list[frozenset[str]] = []

    def batches(columns: tuple[str, ...], ignored: frozenset[str]) -> list[Any]:
        asked.append(ignored)
        return []

    run_machine(
        SYSTEM, "applied", batches, config=Config(SYSTEM.parameters), closed=closed, from_boot=boot, observed=observed,
    )  # fmt: skip
    assert asked == [frozenset({"sched.run", "sched.stop"} if left_out else ())]


def test_late_delivery_counts_from_when_a_vcpu_was_first_seen_to_run() -> None:
    assert DELIVERY not in [s[0] for s in said(replay(late(), from_boot=False))]
    assert DELIVERY in [s[0] for s in said(replay(late(run_(0, 1)), from_boot=False))]
    assert DELIVERY not in [s[0] for s in said(replay(late(run_(MS + 5 * US, 1)), from_boot=False))]


def test_a_vcpu_that_may_run_from_the_beginning_is_ready_from_the_beginning() -> None:
    events = [write(0, RTE), line(0, 1), inject(MS)]
    assert when(replay(events), DELIVERY) == []
    assert when(replay([*events[:2], inject(MS + 1)]), DELIVERY) == [MS + 1]


def test_late_delivery_is_silent_when_the_target_was_offline_meanwhile() -> None:
    assert when(replay(late(stop(2 * US, 1, 3), run_(3 * US, 1))), DELIVERY) == []
    assert len(when(replay(late(stop(2 * US, 1, 1), run_(3 * US, 1))), DELIVERY)) == 1


def test_an_excuse_is_one_lines() -> None:
    """Interrupts were off while the first line waited; the second waits as long without that."""
    first = late(ev(MS, "lapic.intr_window", vcpu=1, obj=VECTOR, val=2))
    again = [clear(3 * MS), line(3 * MS, 0), eoi(3 * MS), set_(4 * MS), line(4 * MS, 1), inject(6 * MS)]
    assert when(replay([*first, *again]), DELIVERY) == [6 * MS]


def test_a_line_that_fell_again_waits_for_nobody() -> None:
    events = routed(set_(US), line(US, 1), clear(2 * US), line(2 * US, 0), inject(3 * MS))
    assert when(replay(events), DELIVERY) == []


def test_a_vcpu0_that_is_online_again_excuses_no_late_line() -> None:
    late_line = [set_(US), line(US + 300 * US, 1)]
    assert when(replay(routed(stop(0, 0, 3), *late_line)), LATE) == []
    assert when(replay(routed(stop(0, 0, 3), run_(1, 0), *late_line)), LATE) == [301 * US]


# -- what a gap hides --------------------------------------------------------------------------------------------------


def test_a_gap_hides_a_delivery() -> None:
    hidden = [*late(gap(10 * US), run_(20 * US, 1)), write(11 * US, RTE)]
    assert when(replay(hidden), DELIVERY) == []


def test_who_was_offline_before_a_gap_is_not_known_to_be_back() -> None:
    """One that comes online is seen to run."""
    late_line = [write(15 * US, RTE), set_(20 * US), line(320 * US, 1)]
    assert when(replay(routed(stop(0, 0, 3), gap(10 * US), *late_line)), LATE) == []
    assert when(replay(routed(stop(0, 0, 3), gap(10 * US), run_(16 * US, 0), *late_line)), LATE) == [320 * US]


def test_a_handler_seen_before_a_gap_may_belong_to_the_injection_after_it() -> None:
    """Within the slack of the guest's clock, as without the gap; later it does not."""
    for t, found in ((11 * US, []), (200 * US, [200 * US])):
        events = [
            *guest_run(0, found=1), ev(10 * US, "via.isr_begin", vcpu=0, obj=VECTOR), gap(10_500), inject(t, 0),
            ev(t + 10, "via.upcall_clear", vcpu=0, val=0),
        ]  # fmt: skip
        run = replay(events, from_boot=False, observed=STOCK, config=EXCLUSIVE)
        assert when(run, SPURIOUS) == found


def test_an_entry_before_a_gap_at_the_same_moment_does_not_make_an_injection_the_eois() -> None:
    idle = [e for e in guest_run(10 * US) if e["kind"] != "via.vmentry"]
    events = [*guest_run(0, work=1), ev(10 * US, "via.vmentry", vcpu=0), gap(10 * US), *idle]
    assert said(replay(events, from_boot=False, observed=WORK, config=EXCLUSIVE)) == []
    assert len(when(replay([e for e in events if e["kind"] != "trace.lost"], from_boot=False, observed=WORK,
                           config=EXCLUSIVE), SPURIOUS)) == 1  # fmt: skip


def test_an_eoi_before_a_gap_delivers_nothing_after_it() -> None:
    """The same moment for all: the flag is seen to be clear, but not before the gap."""
    start = [set_(US), line(US, 1), inject(2 * US), clear(3 * US), eoi(5 * US)]
    after_eoi = [clear(5 * US), inject(6 * US), eoi(8 * US)]
    assert when(replay(routed(*start, *after_eoi), config=EXCLUSIVE), STALE) == [5 * US]
    assert when(replay(routed(*start, gap(5 * US), *after_eoi), config=EXCLUSIVE), STALE) == []


@pytest.mark.parametrize("vector", [VECTOR, 0])
def test_a_message_to_nobody_is_forgotten_in_a_gap(vector: int) -> None:
    """A logical destination without a vCPU: it may be anywhere. The one after the gap went to vcpu 1, and is lost."""
    nobody = rte_word(vector, dest=0, logical=1)
    sent = [write(0, nobody), set_(US), line(US, 1)]
    assert when(replay(sent, end=5 * MS, config=PATIENT), STUCK) == []
    again = [
        write(20 * US, rte_word(vector, dest=2, level=0)), line(21 * US, 0), write(22 * US, rte_word(vector, dest=2)),
        line(23 * US, 1), ev(24 * US, "lapic.reset", vcpu=1),
    ]  # fmt: skip
    run = replay([*sent, gap(10 * US), *again], end=5 * MS, config={**PATIENT, "gsi_shared": 0})
    assert when(run, STUCK) == [24 * US + MS + 1]


# -- episodes ----------------------------------------------------------------------------------------------------------


def test_a_line_that_falls_ends_the_episode_though_no_flag_was_set() -> None:
    """Asserted again with the flag clear: another stale line."""
    again = [line(30 * US, 1), inject(31 * US), eoi(34 * US), inject(34 * US + 200), eoi(38 * US), line(39 * US, 0)]
    run = replay(routed(*stale(10 * US, 1), line(17 * US, 0), *again))
    assert when(run, STALE) == [14 * US, 34 * US]


def test_a_line_that_is_stale_from_the_beginning() -> None:
    """No set was ever seen: the flag of a new domain is clear."""
    events = routed(clear(500), line(US, 1), inject(2 * US), eoi(5 * US), inject(5 * US + 200), eoi(9 * US))
    assert when(replay(events), STALE) == [5 * US]


def test_another_device_ends_a_stale_episode() -> None:
    for gsi, severity in ((GSI, "warn"), (GSI + 1, "error")):
        other = ev(100 * US, "via.gsi_assert", obj=gsi, tgt=7)
        run = replay(routed(*stale(10 * US, 1), other), end=3 * MS)
        assert after(run, STALE, "severity") == [severity]


def test_a_stale_line_that_is_not_recorded_is_inferred() -> None:
    shown = KINDS - {"via.line"}
    events = routed(*(e for e in stale(10 * US, 1) if e["kind"] != "via.line"))
    assert after(replay(events, observed=shown), STALE, "conf") == [80]
    assert after(replay(routed(*stale(10 * US, 1))), STALE, "conf") == [100]


def test_a_flag_that_the_handler_finds_set_was_set_again() -> None:
    """Nobody saw the set; the guest's own look says so."""
    events = [e | {"val": 1} if e["kind"] == "via.upcall_clear" and e["t"] > 14 * US else e for e in stale(10 * US, 1)]
    run = replay(routed(*events))
    assert [(f.severity, f.val, f.cause[:18]) for f in run.findings if f.code.name == SPURIOUS] == [
        ("info", 1, "The flag was set a")
    ]  # fmt: skip


def test_only_doubt_about_other_devices_names_them() -> None:
    for shared, named in ((0, False), (-1, True)):
        run = replay(routed(*stale(10 * US, 1)), observed=KINDS - {"via.gsi_assert"}, config={"gsi_shared": shared})
        (cause,) = after(run, SPURIOUS, "cause")
        assert ("Another device" in cause) == named


def test_work_ends_a_row_of_idle_handlers() -> None:
    def vals(*work: int) -> list[int]:
        events = [e for n, w in enumerate(work) for e in guest_run(n * 10 * US, work=w)]
        return after(replay(events, from_boot=False, observed=WORK, config=EXCLUSIVE), SPURIOUS, "val")

    assert vals(1, 0, 0, 1, 0, 0) == [1, 2, 1, 2]
    assert vals(1, 0, 0, 0) == [1, 2, 3]


def test_isr_end_may_say_how_much_was_handled() -> None:
    for work, found in ((0, [10 * US]), (2, [])):
        events = [*guest_run(0, work=1), *(e for e in guest_run(10 * US) if e["kind"] != "via.isr_end")]
        events.append(ev(18 * US, "via.isr_end", vcpu=0, obj=VECTOR, val=work))
        assert when(replay(events, from_boot=False, observed=WORK, config=EXCLUSIVE), SPURIOUS) == found


def test_each_storm_is_told() -> None:
    events = [e for n in range(8) for e in guest_run(n * 10 * US, found=int(n % 4 == 0))]
    run = replay(events, from_boot=False, observed=STOCK, config=EXCLUSIVE)
    assert when(run, STORM) == [30 * US, 70 * US]


def test_a_read_that_found_the_flag_set_is_the_verdict() -> None:
    """Whatever comes of it: the handler is not idle."""
    events = [*guest_run(0, work=1), *guest_run(10 * US, found=1)]
    assert said(replay(events, from_boot=False, observed=WORK, config=EXCLUSIVE)) == []


def test_an_injection_is_judged_once() -> None:
    """Idle, and then somebody looks at the flag again."""
    idle = [e for e in guest_run(10 * US) if e["kind"] != "via.upcall_clear"]
    events = [*guest_run(0, work=1), *idle, clear(18 * US + 500, 0, val=0)]
    assert when(replay(events, from_boot=False, observed=WORK, config=EXCLUSIVE), SPURIOUS) == [10 * US]


def test_a_reset_vcpu_has_no_injection_to_judge() -> None:
    events = [e for e in stale(10 * US, 1) if e["t"] < 16 * US]
    assert SPURIOUS in [s[0] for s in said(replay(routed(*events)))]
    reset = [*events, ev(15 * US, "lapic.reset", vcpu=1)]
    assert SPURIOUS not in [s[0] for s in said(replay(routed(*reset)))]


def test_a_clear_without_a_vcpu_is_vcpu0s() -> None:
    events = [*guest_run(0, found=1), *guest_run(10 * US, found=0)]
    for e in events:
        if e["kind"] == "via.upcall_clear":
            del e["vcpu"]
    run = replay(events, from_boot=False, observed=STOCK, config=EXCLUSIVE)
    assert [(f.t, f.vcpu) for f in run.findings] == [(10 * US, 0)]


# -- EOIs --------------------------------------------------------------------------------------------------------------


def test_a_named_eoi_takes_its_own_vector() -> None:
    events = [inject(1, 0, 0x31), inject(2, 0, 0x91), eoi(3, 0, obj=0x31), eoi(4, 0), eoi(5, 0)]
    assert when(replay(events), UNMATCHED) == [5]


def test_a_named_eoi_reaches_the_pins_of_its_vector() -> None:
    """Below another one in service."""
    events = routed(set_(US), line(US, 1), inject(2 * US), clear(3 * US), line(4 * US, 0))
    named = [inject(5 * US, 1, 0xF3), eoi(6 * US, obj=VECTOR)]
    assert when(replay([*events, *named], end=5 * MS), STUCK) == []


def test_vector_0_is_a_vector() -> None:
    """The hypervisor would not send it, but whoever writes 0 into the entry gets what he asked for."""
    zero = rte_word(0, dest=2)
    flight = [set_(US), line(US, 1), inject(2 * US, 1, 0), clear(3 * US), line(4 * US, 0), eoi(5 * US)]
    run = replay([write(0, zero), *flight])
    assert (run.metrics["callback_eois"], when(run, UNMATCHED)) == (1, [])
    run = replay([inject(1, 0, 0), eoi(2, 0, obj=0x31)])
    assert when(run, UNMATCHED) == []


# -- who holds the line ------------------------------------------------------------------------------------------------


def test_a_count_says_that_somebody_else_holds_the_line() -> None:
    """Unknown at first; the recorded count is 2 with the callback's own: nothing is spurious while it is so."""
    known = [run_(0, 1), write(1, RTE)]
    flight = [clear(5 * US), inject(6 * US), clear(7 * US), eoi(9 * US)]
    alone = replay([*known, line(US, 1, val2=1), *flight], from_boot=False)
    assert SPURIOUS in [s[0] for s in said(alone)]
    shared = replay([*known, line(US, 1, val2=2), *flight], from_boot=False)
    assert SPURIOUS not in [s[0] for s in said(shared)]


@pytest.mark.parametrize("strangers", [1, 2])
def test_a_stranger_that_lets_go_is_one_less(strangers: int) -> None:
    let_go = ev(2 * US, "via.gsi_deassert", obj=GSI, tgt=7)
    first = line(US, 1, val2=1 + strangers)
    for count, wrong in ((strangers - 1, []), (strangers, [3 * US])):
        run = replay([first, let_go, line(3 * US, 0, val2=count)], from_boot=False)
        assert when(run, MISMATCH) == wrong


def test_a_count_names_only_those_who_are_not_named() -> None:
    named = [ev(500 + n, "via.gsi_assert", obj=gsi, tgt=7) for n, gsi in enumerate((GSI, GSI + 2, GSI + 3))]
    up = line(US, 1, val2=3)  # the callback, source 7, and a stranger
    for count, wrong in ((2, []), (3, [2 * US])):
        run = replay([*named, up, line(2 * US, 0, val2=count)], from_boot=False)
        assert when(run, MISMATCH) == wrong


def test_a_line_that_others_may_hold_is_not_known_to_send_again() -> None:
    """V5: after the EOI the vector is nowhere, or again in the IRR that the reset clears: nothing is stuck for sure."""
    events = routed(set_(US), line(US, 1), inject(2 * US), clear(3 * US), line(4 * US, 0), eoi(5 * US))
    reset = ev(6 * US, "lapic.reset", vcpu=1)
    run = replay([*events, reset], end=5 * MS, observed=KINDS - {"via.gsi_assert"})
    assert when(run, STUCK) == []


def test_a_callback_that_moves_takes_its_line_along() -> None:
    """hvm_set_callback_via: the old GSI falls, so its EOI sends nothing."""
    events = routed(set_(US), line(US, 1), inject(2 * US), ev(3 * US, "via.set_param", val=1, obj=GSI + 2))
    run = replay([*events, eoi(4 * US, obj=VECTOR), ev(5 * US, "lapic.reset", vcpu=1)], end=5 * MS, config=PATIENT)
    assert when(run, STUCK) == []


# -- where the vector is -----------------------------------------------------------------------------------------------

FLIGHT = [set_(US), line(US, 1)]


def changed(v: int) -> list[Event]:
    """Injected on `v`; the entry is rewritten in flight and the EOI matches no pin."""
    return [inject(2 * US, v), clear(3 * US, v), line(4 * US, 0), write(5 * US, rte_word(0x71, dest=2)),
            eoi(6 * US, v, obj=VECTOR)]  # fmt: skip


def test_an_injection_elsewhere_takes_the_vector_along() -> None:
    """The model had it in the IRR of vcpu 1; what was injected is not there any more."""
    for v in (1, 2):
        assert when(replay(routed(*FLIGHT, *changed(v)), end=5 * MS), STUCK) == [6 * US + MS + 1]
    # vcpu 0 has another one: only the bit itself moves.
    other = [ev(0, "via.rte_write", obj=9, val=rte_word(0x41, dest=0)), ev(10, "via.gsi_assert", obj=9, tgt=3)]
    assert when(replay(routed(*other, *FLIGHT, *changed(2)), end=5 * MS), STUCK) == [6 * US + MS + 1]


def test_a_message_to_nobody_is_somewhere_until_it_is_injected() -> None:
    nobody = [write(0, rte_word(VECTOR, dest=0, logical=1)), *FLIGHT]
    assert when(replay([*nobody, run_(2 * US, 0)], end=5 * MS, config=PATIENT), STUCK) == []
    assert when(replay([*nobody, *changed(1)], end=5 * MS, config=PATIENT), STUCK) == [6 * US + MS + 1]


@pytest.mark.parametrize("vector", [VECTOR, 0])
def test_lost_says_where_it_looked(vector: int) -> None:
    masked, edge = rte_word(vector, dest=2, level=0, masked=1), rte_word(vector, dest=2, level=0)
    run = replay([write(0, masked), set_(US), line(US, 1), write(9 * US, edge)], end=5 * MS, config=PATIENT)
    assert [(f.t, f.vcpu, f.obj) for f in run.findings if f.code.name == LOST] == [(9 * US + MS + 1, 0, GSI)]


def test_a_message_that_may_have_been_sent_is_not_lost() -> None:
    """An edge-triggered line of which the level was unknown rises: perhaps that was an edge. An injection tells."""
    shown = KINDS - {"via.gsi_assert"}
    first = [write(0, EDGE), *FLIGHT, inject(2 * US), clear(3 * US), line(4 * US, 0), eoi(5 * US)]
    again = [*first, set_(10 * US), line(10 * US, 1)]
    assert when(replay(again, end=5 * MS, observed=shown, config=PATIENT), LOST) == []
    told = replay([*again, inject(11 * US), eoi(12 * US)], end=5 * MS, observed=shown, config=PATIENT)
    assert when(told, LOST) == [12 * US + MS + 1]


def test_an_edge_has_no_remote_irr() -> None:
    """Injected and dismissed with the flag still set: nothing will come any more."""
    run = replay([write(0, EDGE), *FLIGHT, inject(2 * US), eoi(3 * US)], end=5 * MS, config=PATIENT)
    assert when(run, LOST) == [3 * US + MS + 1]


def test_an_injection_from_a_level_pin_says_that_its_message_is_unacknowledged() -> None:
    """So the line that rises meanwhile sends no second one, which would be in an IRR at the end."""
    events = routed(inject(US), set_(2 * US), line(2 * US, 1), line(2_500, 0), eoi(3 * US))
    masked = write(4 * US, rte_word(VECTOR, dest=2, level=0, masked=1))
    run = replay([*events, masked, line(5 * US, 1), write(9 * US, EDGE)], end=5 * MS, config=PATIENT)
    assert when(run, LOST) == [9 * US + MS + 1]


def test_what_is_lost_or_stuck_is_told_once_and_again_when_it_happens_again() -> None:
    masked = rte_word(VECTOR, dest=2, level=0, masked=1)
    lost = [write(0, masked), set_(US), line(US, 1), write(9 * US, EDGE), write(9 * US, masked), write(9 * US, EDGE)]
    assert when(replay(lost, end=5 * MS, config=PATIENT), LOST) == [9 * US + MS + 1]
    again = [*lost, write(6 * MS, masked), write(7 * MS, EDGE)]
    assert when(replay(again, end=9 * MS, config=PATIENT), LOST) == [9 * US + MS + 1, 8 * MS + 1]
    stuck = routed(*FLIGHT, *changed(1))
    twice = [*stuck, inject(6 * US), ev(6 * US, "lapic.reset", vcpu=1)]
    assert when(replay(twice, end=5 * MS, config=PATIENT), STUCK) == [6 * US + MS + 1]
    back = [*stuck, inject(6 * MS), ev(7 * MS, "lapic.reset", vcpu=1)]
    assert when(replay(back, end=9 * MS, config=PATIENT), STUCK) == [6 * US + MS + 1, 8 * MS + 1]


# -- matching ----------------------------------------------------------------------------------------------------------


def counted(steps: str) -> dict[str, int]:
    from tests.conformance.test_callback_matching import counts

    return counts(steps)


def test_matching_rows_end_at_work_and_at_a_gap() -> None:
    vain = "RBCNE"
    two = counted("IBCWE" + vain * 2 + "IBCWE" + vain * 2 + "IBCWE")
    assert two["in_vain_harmless"] == 4 and "in_vain_in_storms" not in two
    across = counted("IBCWE" + vain * 3 + "L" + vain * 2 + "IBCWE")
    assert across["in_vain_harmless"] == 4 and "in_vain_in_storms" not in across


def test_matching_lets_go_of_what_was_open_at_a_gap() -> None:
    assert counted("IBC L IBCWE")["matched_handler"] == 1
    # Whether the guest was recorded around the gap is not known until it is seen again.
    assert "unmatched_injections" not in counted("IBCWE IE L IE IBCWE IBCWE")


def test_matching_is_counted_once() -> None:
    m = Matching(3)
    m.injected(0, False, False)
    m.begun(0)
    assert dict(m.finish()) == dict(m.finish())
    assert m.finish()["matched_handler"] == 1


def test_what_was_open_at_a_gap_is_matched_with_nothing() -> None:
    events = [inject(0, 0), ev(10, "via.isr_begin", vcpu=0, obj=VECTOR), gap(5 * US), *guest_run(10 * US)]
    run = replay(events, from_boot=False, observed=STOCK, config=EXCLUSIVE)
    assert (run.metrics["injections"], run.metrics["matched_handler"]) == (2, 1)


def test_matching_a_handler_that_ran_ahead_is_not_missing() -> None:
    assert "unmatched_handlers" not in counted("IBCWE IBCWE BJCWE IBCWE")
    assert counted("IBCWE BCW BJCWE IBCWE")["unmatched_handlers"] == 1


# -- what-ifs on recordings --------------------------------------------------------------------------------------------


def what_if(events: Iterable[Event], recorded: Recorded, policy: str = "applied", end: int = MS) -> Run:
    table = events_from_json(sorted(events, key=lambda e: e["t"]))
    return run_machine(
        SYSTEM, policy, [table], config=Config(SYSTEM.parameters), closed=True, t_end=end,
        measured=Measured(bodies=Bodies(5), aids=recorded),
    )  # fmt: skip


@pytest.mark.parametrize(("state", "woken"), [(2, True), (1, False), (3, False)])
def test_a_kick_wakes_a_vcpu_that_has_blocked(state: int, woken: bool) -> None:
    """vcpu_kick: one that waits for an interrupt runs; one that waits for a CPU does not run sooner."""
    run = what_if([stop(0, 1, state), set_(US)], Recorded())
    assert list(run.effects)[:1] == ([(US + 500, 1 << 16 | 1)] if woken else [])
    # It runs and blocks no more: preempted afterwards, it waits for a CPU.
    again = [stop(0, 1, state), run_(10, 1), stop(20, 1, 1), set_(US)]
    assert what_if(again, Recorded()).effects == []


def test_a_set_that_was_inferred_before_the_recording_is_at_its_beginning() -> None:
    recorded = Recorded()
    recorded.sets, recorded.set_doms = array("q", [-400]), array("q", [1])
    run = what_if([ev(US, "via.vmentry", vcpu=3)], recorded)
    assert run.effects[0] == (500, 1 << 16 | 1)


def measured(events: list[Event]) -> Measured:
    return measure("callback", sorted(events, key=lambda e: e["t"]), {"vector": VECTOR})[0]


def test_a_vector_that_was_never_injected_says_so() -> None:
    events = [inject(US, 1, 0x31), eoi(2 * US), ev(3 * US, "via.vmentry", vcpu=1)]
    assert measured(events).blind == "vector 0x59 was never injected"


def test_the_first_body_has_all_its_entries() -> None:
    def body(t: int) -> list[Event]:
        return [inject(t), ev(t + 100, "via.vmentry", vcpu=1), ev(t + 900, "via.vmentry", vcpu=1), clear(t + 2_000),
                eoi(t + 4_000), ev(t + 4_200, "via.vmentry", vcpu=1)]  # fmt: skip

    result = measured([*body(0), *body(50 * US)])
    assert result.bodies is not None and isinstance(result.aids, Recorded)
    assert list(result.aids.entries) == [100, 900, 100, 900]
    columns = result.bodies.stock[1].columns
    assert (list(columns[FIRST]), list(columns[UNTIL])) == ([0, 2], [2, 4])
