"""Rules of the PV-on-HVM callback on recordings: each code where it fires, and where its "not when" keeps it silent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import events_from_json
from replay.hardware.ioapic import rte_word
from replay.systems.hvm_callback import SYSTEM

US = 1_000
MS = 1_000_000
GSI = 28
VECTOR = 0x59
#: Redirection entry of the platform interrupt: level, unmasked, APIC id 2 = vcpu 1 of a Xen guest.
RTE = rte_word(VECTOR, dest=2)

Event = dict[str, Any]


def ev(t: int, kind: str, **fields: Any) -> Event:
    return {"t": t, "kind": kind, "dom": 1, **fields}


def routed(*events: Event) -> list[Event]:
    """A guest that has programmed its redirection entry."""
    return [ev(0, "via.rte_write", obj=GSI, val=RTE), *events]


def replay(
    events: Iterable[Event],
    *,
    policy: str = "applied",
    closed: bool = False,
    end: int | None = None,
    from_boot: bool = True,
    observed: frozenset[str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Run:
    table = events_from_json(sorted(events, key=lambda event: event["t"]))
    return run_machine(
        SYSTEM,
        policy,
        [table],
        config=Config(SYSTEM.parameters, config or {}),
        closed=closed,
        t_end=end,
        from_boot=from_boot,
        observed=observed,
    )


def said(run: Run) -> list[tuple[str, str, int]]:
    return [(f.code.name, f.severity, f.t) for f in run.findings]


def episode(start: int, *, v: int = 1, clear: int = 2 * US, fall: int = 3 * US, eoi: int = 4 * US) -> list[Event]:
    """One healthy callback: set, assert, inject, clear, deassert, EOI."""
    return [
        ev(start, "via.upcall_set", vcpu=0),
        ev(start + 100, "via.line", obj=GSI, val=1),
        ev(start + 500, "via.inject", vcpu=v, obj=VECTOR),
        ev(start + 600, "via.isr_begin", vcpu=v, obj=VECTOR),
        ev(start + clear, "via.upcall_clear", vcpu=v),
        ev(start + fall, "via.line", obj=GSI, val=0),
        ev(start + eoi - 100, "via.isr_end", vcpu=v, obj=VECTOR),
        ev(start + eoi, "via.eoi", vcpu=v, obj=VECTOR),
        ev(start + eoi + 200, "via.vmentry", vcpu=v),
    ]


def stale(start: int, again: int, gap: int = 4 * US) -> list[Event]:
    """The line is not lowered: the EOI delivers again, `again` times, `gap` ns apart."""
    events = [e for e in episode(start) if e["kind"] != "via.line" or e["val"]]
    eoi = start + 4 * US
    for n in range(again):
        at = eoi + 200 + n * gap
        events += [
            ev(at, "via.inject", vcpu=1, obj=VECTOR),
            ev(at + gap // 2, "via.upcall_clear", vcpu=1),
            ev(at + gap - 200, "via.eoi", vcpu=1, obj=VECTOR),
        ]
    return events


def test_a_healthy_recording_is_clean() -> None:
    run = replay(routed(*episode(10 * US), *episode(50 * US), *episode(90 * US, v=0)))
    assert said(run) == []
    assert run.metrics["injections"] == run.metrics["callback_eois"] == run.metrics["handlers"] == 3
    assert run.metrics["useful_injections"] == 3
    assert run.metrics["spurious_injections"] == 0
    assert run.metrics["max_assert_delay_ns"] == 100
    assert run.metrics["max_callback_latency_ns"] == 500
    assert run.metrics["callback_latency_sum_ns"] == 1_500


# -- via-stale-assert, via-spurious-inject, via-inject-storm ---------------------------------------------------


def test_stale_line_and_one_spurious_injection() -> None:
    events = routed(*stale(10 * US, 1), ev(17 * US, "via.line", obj=GSI, val=0))
    run = replay(events)
    assert said(run) == [("via-stale-assert", "warn", 14 * US), ("via-spurious-inject", "warn", 14 * US + 200)]
    assert run.findings[0].t_first == 12 * US  # the clear
    assert run.findings[1].val == 1
    assert run.metrics["asserted_with_flag_clear_ns"] == 5 * US
    labels = [step.label for step in run.findings[1].evidence]
    assert "upcall_pending cleared on vcpu 1" in labels and "callback injected on vcpu 1" in labels


def test_stale_line_is_an_error_only_when_it_lasts() -> None:
    just = replay(routed(*stale(10 * US, 1), ev(12 * US + 1 * MS, "via.line", obj=GSI, val=0)))
    over = replay(routed(*stale(10 * US, 1), ev(12 * US + 1 * MS + 1, "via.line", obj=GSI, val=0)))
    assert said(just)[0] == ("via-stale-assert", "warn", 14 * US)
    assert said(over)[0] == ("via-stale-assert", "error", 14 * US)


def test_a_new_event_ends_the_stale_episode() -> None:
    events = routed(*stale(10 * US, 1), ev(30 * US, "via.upcall_set", vcpu=0), ev(5 * MS, "via.vmentry", vcpu=0))
    assert said(replay(events))[0] == ("via-stale-assert", "warn", 14 * US)


def test_stale_line_that_ends_with_the_recording_is_told() -> None:
    assert said(replay(routed(*stale(10 * US, 1)), end=3 * MS))[0] == ("via-stale-assert", "error", 14 * US)


def test_storm_at_the_third_and_once() -> None:
    run = replay(routed(*stale(10 * US, 5)))
    assert [f.val for f in run.findings if f.code.name == "via-spurious-inject"] == [1, 2, 3, 4, 5]
    storms = [f for f in run.findings if f.code.name == "via-inject-storm"]
    assert [(f.severity, f.t, f.conf) for f in storms] == [("error", 14 * US + 200 + 8 * US, 100)]
    assert [f.code.name for f in run.findings].count("via-stale-assert") == 1
    assert run.metrics["storm_max"] == 5


def test_another_source_makes_it_legitimate() -> None:
    other = ev(5 * US, "via.gsi_assert", obj=GSI, tgt=7)
    assert said(replay(routed(other, *stale(10 * US, 5)))) == []


def test_another_source_that_let_go_is_no_excuse() -> None:
    other = [ev(5 * US, "via.gsi_assert", obj=GSI, tgt=7), ev(6 * US, "via.gsi_deassert", obj=GSI, tgt=7)]
    assert ("via-inject-storm", "error", 22 * US + 200) in said(replay(routed(*other, *stale(10 * US, 3))))


def test_spurious_is_info_when_the_flag_is_set_again_before_the_read() -> None:
    again = ev(15 * US, "via.upcall_set", vcpu=0)  # injected at 14.2, read at 16.2
    run = replay(routed(*stale(10 * US, 1), again))
    assert ("via-spurious-inject", "info", 14 * US + 200) in said(run)
    assert run.metrics["spurious_injections"] == 0
    late = ev(17 * US, "via.upcall_set", vcpu=0)  # after the read
    assert ("via-spurious-inject", "warn", 14 * US + 200) in said(replay(routed(*stale(10 * US, 1), late)))


def test_nothing_is_said_of_a_flag_that_is_unknown() -> None:
    events = [e for e in stale(10 * US, 5) if e["kind"] != "via.upcall_set"]
    kinds = frozenset({"via.inject", "via.eoi", "via.vmentry", "via.upcall_clear", "via.isr_begin", "via.isr_end"})
    assert said(replay(routed(*events), observed=kinds)) == []
    assert said(replay(routed(*events), observed=kinds | {"via.line", "via.rte_write"})) == []


def test_flag_known_but_other_devices_unknown_is_info() -> None:
    kinds = frozenset(SYSTEM.kinds) - {"via.gsi_assert"}
    run = replay(routed(*stale(10 * US, 4)), observed=kinds)
    assert {(f.code.name, f.severity, f.conf) for f in run.findings} == {
        ("via-spurious-inject", "info", 50),
        ("via-inject-storm", "info", 50),
    }
    run = replay(routed(*stale(10 * US, 4)), observed=kinds, config={"gsi_shared": 0})
    assert {f.severity for f in run.findings} == {"warn", "error"}


def test_a_domain_created_in_the_recording_is_known() -> None:
    created = {"t": 0, "kind": "lapic.reset", "dom": 1}
    events = routed(*stale(10 * US, 1))
    assert said(replay(events, from_boot=False)) == [("via-spurious-inject", "info", 14 * US + 200)]
    assert [s[:2] for s in said(replay([created, *events], from_boot=False))] == [
        ("via-stale-assert", "warn"),
        ("via-spurious-inject", "warn"),
    ]


def test_an_unknown_start_is_known_again_from_the_first_set() -> None:
    shared0 = {"gsi_shared": 0, "vector": VECTOR}
    whole = [*stale(10 * US, 2), ev(100 * US, "via.line", obj=GSI, val=0), *stale(200 * US, 2)]
    run = replay(whole[4:], from_boot=False, config=shared0)  # begins inside the first handler
    names = [f.code.name for f in run.findings if f.t > 150 * US]
    assert names.count("via-spurious-inject") == 2
    assert names.count("via-stale-assert") == 1


def test_lost_records_make_the_flag_unknown() -> None:
    lost = {"t": 13 * US, "kind": "trace.lost", "cpu": 0, "val": 12 * US}
    assert said(replay([*routed(*stale(10 * US, 4)), lost])) == []
    run = replay([*routed(*stale(10 * US, 4)), lost], config={"gsi_shared": 0, "vector": VECTOR})
    first = next(f.t for f in run.findings if f.code.name == "via-spurious-inject")
    assert first > 16 * US + 200  # after the next clear


def test_a_gap_ends_what_was_seen_of_an_episode() -> None:
    """The line may have fallen inside the gap: only what lasted until it began counts."""
    lost = {"t": 5 * MS, "kind": "trace.lost", "cpu": 0, "val": 100 * US}
    run = replay([*routed(*stale(10 * US, 1)), lost], end=9 * MS)
    assert said(run)[0] == ("via-stale-assert", "warn", 14 * US)
    assert "for 88000 ns" in run.findings[0].observed
    flight = [
        ev(US, "via.upcall_set", vcpu=0),
        ev(US, "via.line", obj=GSI, val=1),
        ev(2 * US, "lapic.reset", vcpu=1),
    ]
    lost = {"t": 500 * US, "kind": "trace.lost", "cpu": 0, "val": 400 * US}
    assert said(replay([*routed(*flight), lost], end=5 * MS)) == []


def test_a_new_event_restarts_the_count_of_the_storm() -> None:
    run = replay(routed(*stale(10 * US, 2), *stale(50 * US, 2)))
    assert [f.val for f in run.findings if f.code.name == "via-spurious-inject"] == [1, 2, 1, 2]
    assert "via-inject-storm" not in [f.code.name for f in run.findings]
    run = replay(routed(*stale(10 * US, 3), *stale(50 * US, 3)))
    assert [f.code.name for f in run.findings].count("via-inject-storm") == 2


# -- what stock tracing can prove ------------------------------------------------------------------------------

#: What xentrace and the guest's own ftrace give on Xen 4.17.
STOCK = frozenset(
    {
        "via.inject",
        "via.eoi",
        "via.vmentry",
        "sched.run",
        "sched.stop",
        "via.isr_begin",
        "via.isr_end",
        "via.upcall_clear",
    }
)


def guest_run(start: int, *, found: int | None = None, work: int | None = None) -> list[Event]:
    """Inject, handler, EOI, VM entry as stock tracing shows them; 10 us."""
    read = {} if found is None else {"val": found}
    events = [
        ev(start, "via.inject", vcpu=0, obj=VECTOR),
        ev(start + 10, "via.vmentry", vcpu=0),
        ev(start + 1 * US, "via.isr_begin", vcpu=0, obj=VECTOR),
        ev(start + 2 * US, "via.upcall_clear", vcpu=0, **read),
        ev(start + 8 * US, "via.isr_end", vcpu=0, obj=VECTOR),
        ev(start + 9 * US, "via.eoi", vcpu=0),
    ]
    return events + [ev(start + 3 * US + n, "evtchn.handled", vcpu=0, obj=7) for n in range(work or 0)]


def test_stock_healthy_run_is_clean_and_counted() -> None:
    events = [e for n in range(20) for e in guest_run(n * 10 * US)]
    events += [ev(n * 10 * US + 9 * US + 100, "via.vmentry", vcpu=0) for n in range(20)]
    run = replay(events, from_boot=False, observed=STOCK, config={"vector": VECTOR})
    assert said(run) == []
    assert (run.metrics["injections"], run.metrics["handlers"], run.metrics["callback_eois"]) == (20, 20, 20)


def test_stock_handler_that_finds_the_flag_clear() -> None:
    events = guest_run(0, found=1)
    for n in range(1, 4):
        events += guest_run(n * 10 * US, found=0)
    exclusive = {"vector": VECTOR, "gsi_shared": 0}
    run = replay(events, from_boot=False, observed=STOCK, config=exclusive)
    assert said(run) == [
        ("via-spurious-inject", "warn", 10 * US),
        ("via-spurious-inject", "warn", 20 * US),
        ("via-spurious-inject", "warn", 30 * US),
        ("via-inject-storm", "error", 30 * US),
    ]
    assert {f.conf for f in run.findings} == {80}
    # Whether another device is on the line is unknown: still told, but as no fault.
    run = replay(events, from_boot=False, observed=STOCK, config={"vector": VECTOR})
    assert {(f.severity, f.conf) for f in run.findings} == {("info", 50)}
    assert len(run.findings) == 4


def test_stock_useful_read_ends_the_episode() -> None:
    events = [e for n in range(12) for e in guest_run(n * 10 * US, found=int(n % 3 == 0))]
    run = replay(events, from_boot=False, observed=STOCK, config={"vector": VECTOR, "gsi_shared": 0})
    assert [f.code.name for f in run.findings] == ["via-spurious-inject"] * 8
    assert [f.val for f in run.findings] == [1, 2] * 4


def test_stock_read_by_another_vcpu_excuses() -> None:
    events = [*guest_run(0, found=1), *guest_run(10 * US, found=0), ev(11 * US, "via.upcall_clear", vcpu=1, val=1)]
    run = replay(events, from_boot=False, observed=STOCK, config={"vector": VECTOR, "gsi_shared": 0})
    assert said(run) == []


def test_stock_handler_without_work_right_after_eoi() -> None:
    exclusive = {"vector": VECTOR, "gsi_shared": 0}
    events = [*guest_run(0, work=1), *guest_run(10 * US)]
    run = replay(events, from_boot=False, observed=STOCK | {"evtchn.handled"}, config=exclusive)
    assert [(f.code.name, f.t, f.conf) for f in run.findings] == [("via-spurious-inject", 10 * US, 50)]
    assert run.metrics["handlers_without_work"] == 1
    # The same with a VM entry in between: the injection need not come from the EOI.
    run = replay(
        [*events, ev(9 * US + 100, "via.vmentry", vcpu=0)],
        from_boot=False, observed=STOCK | {"evtchn.handled"}, config=exclusive,
    )  # fmt: skip
    assert said(run) == []
    # The same without a record of work: an idle handler proves nothing.
    assert said(replay(events, from_boot=False, observed=STOCK, config=exclusive)) == []


def test_a_storm_of_idle_handlers_is_no_error() -> None:
    events = [e for n in range(6) for e in guest_run(n * 10 * US)]
    run = replay(
        events, from_boot=False, observed=STOCK | {"evtchn.handled"}, config={"vector": VECTOR, "gsi_shared": 0}
    )
    storms = [f for f in run.findings if f.code.name == "via-inject-storm"]
    assert [(f.severity, f.conf) for f in storms] == [("warn", 50)]


def test_handler_seen_before_its_injection_is_counted_not_judged() -> None:
    events = [
        ev(0, "via.inject", vcpu=0, obj=VECTOR),
        ev(5 * US, "via.eoi", vcpu=0),
        ev(9 * US, "via.isr_begin", vcpu=0, obj=VECTOR),
        ev(9 * US + 1, "via.isr_end", vcpu=0, obj=VECTOR),
        ev(10 * US, "via.isr_begin", vcpu=0, obj=VECTOR),  # the guest's clock is ahead
        ev(10 * US + 1, "via.isr_end", vcpu=0, obj=VECTOR),
        ev(11 * US, "via.inject", vcpu=0, obj=VECTOR),
        ev(12 * US, "via.upcall_clear", vcpu=0, val=0),
    ]
    run = replay(events, from_boot=False, observed=STOCK, config={"vector": VECTOR, "gsi_shared": 0})
    assert said(run) == []
    assert (run.metrics["injections"], run.metrics["handlers"]) == (2, 2)


def test_without_a_named_vector_nothing_is_guessed() -> None:
    events = [
        e | {"obj": VECTOR} if e["kind"] == "via.inject" else e
        for n in range(5)
        for e in guest_run(n * 10 * US, found=0)
        if e["kind"] != "via.isr_begin"
    ]
    run = replay(events, from_boot=False, observed=STOCK)
    assert said(run) == [] and run.metrics["injections"] == 0


# -- via-late-assert ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("delay", "severity"),
    [(100 * US, ""), (100 * US + 1, "warn"), (10 * MS, "warn"), (10 * MS + 1, "error")],
)
def test_late_assert(delay: int, severity: str) -> None:
    run = replay(routed(ev(US, "via.upcall_set", vcpu=0), ev(US + delay, "via.line", obj=GSI, val=1)))
    expected = [("via-late-assert", severity, US + delay)] if severity else []
    assert [s for s in said(run) if s[0] == "via-late-assert"] == expected
    assert run.metrics["max_assert_delay_ns"] == delay


def test_late_assert_is_silent_when_vcpu0_was_paused() -> None:
    paused = [
        ev(2 * US, "sched.stop", vcpu=0, cpu=1, val=3),
        ev(3 * MS, "sched.run", vcpu=0, cpu=1),
        ev(0, "sched.run", vcpu=0, cpu=1),
    ]
    events = routed(ev(US, "via.upcall_set", vcpu=0), *paused, ev(4 * MS, "via.line", obj=GSI, val=1))
    assert "via-late-assert" not in [s[0] for s in said(replay(events))]
    for e in events:
        if e["kind"] == "sched.stop":
            e["val"] = 1  # runnable: it only had to wait
    assert "via-late-assert" in [s[0] for s in said(replay(events))]


def test_late_assert_that_never_comes() -> None:
    events = routed(ev(US, "via.upcall_set", vcpu=0))
    assert said(replay(events, end=20 * MS)) == [("via-late-assert", "error", 20 * MS)]
    assert said(replay(events, end=100 * US)) == []
    assert said(replay(events, end=20 * MS, observed=frozenset({"via.upcall_set", "via.inject"}))) == []


# -- via-late-delivery -------------------------------------------------------------------------------------------


def late(*between: Event, delay: int = 2 * MS) -> list[Event]:
    return routed(
        ev(US, "via.upcall_set", vcpu=0),
        ev(US, "via.line", obj=GSI, val=1),
        *between,
        ev(US + delay, "via.inject", vcpu=1, obj=VECTOR),
    )


def test_late_delivery() -> None:
    run = replay(late())
    assert said(run) == [("via-late-delivery", "warn", US + 2 * MS)]
    assert run.findings[0].val == 2 * MS
    assert said(replay(late(delay=MS))) == []


def test_late_delivery_is_silent_while_the_guest_has_interrupts_off() -> None:
    assert said(replay(late(ev(MS, "lapic.intr_window", vcpu=1, obj=VECTOR, val=2)))) == []
    without = frozenset({k for k in SYSTEM.kinds if k != "lapic.intr_window"})
    assert said(replay(late(), observed=without)) == []


def test_late_delivery_counts_only_time_in_which_the_target_could_run() -> None:
    blocked = [ev(0, "sched.stop", vcpu=1, cpu=0, val=2), ev(1_500 * US, "sched.run", vcpu=1, cpu=0)]
    assert said(replay(late(*blocked))) == []
    waiting = [ev(0, "sched.stop", vcpu=1, cpu=0, val=1), ev(1_500 * US, "sched.run", vcpu=1, cpu=0)]
    assert [s[0] for s in said(replay(late(*waiting)))] == ["via-late-delivery"]
    assert said(replay(late(ev(2 * US, "sched.stop", vcpu=1, cpu=0, val=3)))) == []


def test_late_delivery_names_a_masked_entry() -> None:
    masked = [
        ev(0, "via.rte_write", obj=GSI, val=rte_word(VECTOR, dest=2, masked=1)),
        ev(1_900 * US, "via.rte_write", obj=GSI, val=RTE),
    ]
    run = replay(late(*masked))
    assert [s[0] for s in said(run)] == ["via-late-delivery"]
    still = replay(late(masked[0])[:-1], end=3 * MS)
    assert [(f.code.name, f.cause) for f in still.findings] == [
        ("via-late-delivery", "The redirection entry is masked.")
    ]


# -- via-lost-callback, via-remote-irr-stuck ---------------------------------------------------------------------

EDGE = rte_word(VECTOR, dest=2, level=0)


def test_lost_callback_when_the_entry_becomes_edge_triggered() -> None:
    masked = ev(US, "via.rte_write", obj=GSI, val=rte_word(VECTOR, dest=2, level=0, masked=1))
    events = routed(masked, ev(2 * US, "via.upcall_set", vcpu=0), ev(2 * US, "via.line", obj=GSI, val=1))
    unmasked = ev(9 * US, "via.rte_write", obj=GSI, val=EDGE)
    run = replay([*events, unmasked], end=5 * MS, config={"late_delivery_ns": 10 * MS})
    assert said(run) == [("via-lost-callback", "error", 9 * US + MS + 1)]
    assert said(replay([*events, unmasked], end=9 * US + MS, config={"late_delivery_ns": 10 * MS})) == []
    # Masked: not lost, it waits.
    assert said(replay(events, end=5 * MS, config={"late_delivery_ns": 10 * MS})) == []
    # Cleared in time.
    polled = ev(500 * US, "via.upcall_clear", vcpu=0)
    assert said(replay([*events, unmasked, polled], end=5 * MS, config={"late_delivery_ns": 10 * MS})) == []


def test_lost_callback_is_silent_right_after_a_restore() -> None:
    events = [
        ev(0, "via.rte_write", obj=GSI, val=rte_word(VECTOR, dest=2, level=0, masked=1)),
        ev(2 * US, "via.upcall_set", vcpu=0),
        ev(2 * US, "via.line", obj=GSI, val=1),
        ev(9 * US, "via.rte_write", obj=GSI, val=EDGE),
    ]
    quiet = {"late_delivery_ns": 100 * MS}
    restored = ev(8 * US, "via.set_param", val=1, obj=GSI)
    assert [s[0] for s in said(replay(events, end=5 * MS, config=quiet))] == ["via-lost-callback"]
    assert said(replay([*events, restored], end=5 * MS, config=quiet)) == []


def test_lost_callback_needs_all_five() -> None:
    events = routed(
        ev(US, "via.rte_write", obj=GSI, val=rte_word(VECTOR, dest=2, level=0, masked=1)),
        ev(2 * US, "via.upcall_set", vcpu=0),
        ev(2 * US, "via.line", obj=GSI, val=1),
        ev(9 * US, "via.rte_write", obj=GSI, val=EDGE),
    )
    assert said(replay(events, end=5 * MS, from_boot=False)) == []


def test_remote_irr_stuck_after_the_vector_changed_in_flight() -> None:
    flight = [
        ev(US, "via.upcall_set", vcpu=0),
        ev(US, "via.line", obj=GSI, val=1),
        ev(2 * US, "via.inject", vcpu=1, obj=VECTOR),
        ev(3 * US, "via.upcall_clear", vcpu=1),
        ev(4 * US, "via.line", obj=GSI, val=0),
    ]
    change = ev(5 * US, "via.rte_write", obj=GSI, val=rte_word(0x71, dest=2))
    eoi = ev(6 * US, "via.eoi", vcpu=1, obj=VECTOR)
    run = replay(routed(*flight, change, eoi), end=5 * MS)
    assert said(run) == [("via-remote-irr-stuck", "error", 6 * US + MS + 1)]
    assert run.findings[0].val == VECTOR
    assert run.findings[0].cause == "The entry was rewritten while the interrupt was in flight."
    # The EOI first: nothing is in flight.
    assert said(replay(routed(*flight, ev(5 * US, "via.eoi", vcpu=1), change | {"t": 6 * US}), end=5 * MS)) == []
    # Still in service: not stuck.
    assert said(replay(routed(*flight, change), end=5 * MS)) == []
    # Written as edge in time, which clears Remote IRR.
    rescued = ev(900 * US, "via.rte_write", obj=GSI, val=rte_word(0x71, dest=2, level=0))
    assert said(replay(routed(*flight, change, eoi, rescued), end=5 * MS)) == []
    # The message was not seen going out.
    assert said(replay([*flight[2:], change, eoi], end=5 * MS, from_boot=False)) == []


def test_remote_irr_stuck_after_a_reset_of_the_lapic() -> None:
    events = routed(
        ev(US, "via.upcall_set", vcpu=0),
        ev(US, "via.line", obj=GSI, val=1),
        ev(2 * US, "lapic.reset", vcpu=1),
    )
    names = [s[0] for s in said(replay(events, end=5 * MS, config={"late_delivery_ns": 10 * MS}))]
    assert names == ["via-remote-irr-stuck"]


# -- via-count-mismatch, via-eoi-unmatched -----------------------------------------------------------------------


def test_count_mismatch_underflow() -> None:
    let_go = ev(US, "via.gsi_deassert", obj=GSI, tgt=7)
    assert said(replay(routed(let_go))) == [("via-count-mismatch", "error", US)]
    held = ev(500, "via.gsi_assert", obj=GSI, tgt=7)
    assert said(replay(routed(held, let_go))) == []
    assert said(replay([let_go], from_boot=False)) == []
    twice = [ev(US, "via.line", obj=GSI, val=1), ev(2 * US, "via.line", obj=GSI, val=0)]
    assert said(replay(routed(*twice))) == []
    assert said(replay(routed(*twice, ev(3 * US, "via.line", obj=GSI, val=0)))) == [
        ("via-count-mismatch", "error", 3 * US)
    ]


def test_count_mismatch_against_the_recorded_count() -> None:
    held = ev(500, "via.gsi_assert", obj=GSI, tgt=7)
    up = ev(US, "via.line", obj=GSI, val=1, val2=2)
    assert said(replay(routed(held, up))) == []
    run = replay(routed(up))
    assert said(run) == [("via-count-mismatch", "error", US)]
    assert run.findings[0].val == 2
    # Unknown contributors: the count tells who is there, and from then on it must agree.
    down = ev(2 * US, "via.line", obj=GSI, val=0, val2=1)
    assert said(replay([up, down], from_boot=False)) == []
    assert said(replay([up, down | {"val2": 2}], from_boot=False)) == [("via-count-mismatch", "error", 2 * US)]


def test_a_source_counts_once_however_often_it_asserts() -> None:
    held = [ev(n, "via.gsi_assert", obj=GSI, tgt=7) for n in (100, 200)]
    assert said(replay(routed(*held, ev(US, "via.line", obj=GSI, val=1, val2=2)))) == []


def test_eoi_unmatched() -> None:
    assert said(replay([ev(US, "via.eoi", vcpu=0)])) == [("via-eoi-unmatched", "info", US)]
    assert said(replay([ev(US, "via.eoi", vcpu=0)], from_boot=False)) == []
    assert said(replay([ev(US, "via.eoi", vcpu=0)], config={"eoi_assist": 1})) == []
    pair = [ev(1, "via.inject", vcpu=0, obj=0xF3), ev(2, "via.eoi", vcpu=0)]
    assert said(replay(pair)) == []


# -- closed runs beyond the scenarios ----------------------------------------------------------------------------


def test_stale_assert_severity_in_closed_runs() -> None:
    events = [ev(0, "via.upcall_set", vcpu=0), ev(2 * MS, "via.vmentry", vcpu=0)]
    run = replay(events, policy="current", closed=True, end=3 * MS)
    assert [f.severity for f in run.findings if f.code.name == "via-stale-assert"] == ["error"]
    assert run.metrics["asserted_with_flag_clear_ns"] == 2 * MS - 3 * US


def test_rewriting_the_entry_moves_the_callback() -> None:
    to0 = rte_word(0x61, dest=0)
    events = [ev(0, "via.rte_write", obj=GSI, val=to0), ev(US, "via.upcall_set", vcpu=0)]
    run = replay(events, policy="proposed", closed=True, end=MS)
    assert said(run) == [] and run.metrics["injections"] == 1
    masked = rte_word(0x61, dest=0, masked=1)
    events = [
        ev(0, "via.rte_write", obj=GSI, val=masked),
        ev(US, "via.upcall_set", vcpu=0),
        ev(9 * US, "via.rte_write", obj=GSI, val=to0),
    ]
    run = replay(events, policy="proposed", closed=True, end=MS)
    assert run.metrics["injections"] == 1
    assert run.metrics["max_callback_latency_ns"] == 8 * US + 500  # unmasking delivers, the kick enters


def test_always_check_reads_the_flag_of_vcpu0() -> None:
    events = [ev(0, "sched.stop", vcpu=0), ev(US, "via.upcall_set", vcpu=0), ev(2 * US, "via.vmentry", vcpu=1)]
    run = replay(events, policy="always-check", closed=True, end=MS)
    assert run.metrics["max_assert_delay_ns"] == US
    assert run.metrics["injections"] == 2


@pytest.mark.parametrize(
    ("policy", "locks"), [("current", 2), ("proposed", 3), ("always-check", 5), ("applied", 2)]
)
def test_irq_lock_is_counted_as_each_policy_takes_it(policy: str, locks: int) -> None:
    """One event handled on vcpu1, then one entry of vcpu0 before its second EOI could come."""
    config = {"isr_mid_exit_ns": 3 * US}
    events = [ev(0, "via.upcall_set", vcpu=0), ev(4 * US, "via.vmentry", vcpu=0)]
    run = replay(events, policy=policy, closed=True, end=MS, config=config)
    assert run.metrics["injections"] == 1
    assert run.metrics["irq_lock_taken"] == locks


def test_lowest_priority_takes_turns() -> None:
    shared = rte_word(VECTOR, dest=0b110, logical=1, delivery=1)
    events = [ev(0, "via.rte_write", obj=GSI, val=shared)]
    events += [ev(n * 100 * US, "via.upcall_set", vcpu=0) for n in range(1, 5)]
    run = replay(events, policy="proposed", closed=True, end=MS)
    assert run.metrics["injections"] == 4 and said(run) == []
    # Under applied each EOI delivers once more, to the next in turn, beginning after 0.
    run = replay(events[:4], policy="applied", closed=True, end=MS)
    assert [f.vcpu for f in run.findings if f.code.name == "via-spurious-inject"] == [2, 2, 2]
    run = replay(events[:3], policy="current", closed=True, end=120 * US)
    assert [f.vcpu for f in run.findings if f.code.name == "via-spurious-inject"][:4] == [2, 1, 2, 1]


@pytest.mark.parametrize(
    ("policy", "entries"), [("current", 3), ("proposed", 3), ("always-check", 3), ("applied", 2)]
)
def test_vm_entries_are_those_of_kicks_and_of_eoi_exits(policy: str, entries: int) -> None:
    """Until 6 us: kick of vcpu0 at 0.5 (not applied), of vcpu1, the entry after the EOI; V3 from V5 kicks nobody."""
    run = replay([ev(0, "via.upcall_set", vcpu=0)], policy=policy, closed=True, end=6 * US)
    assert run.metrics["vm_entries"] == entries


def test_a_vcpu_that_does_not_run_is_neither_kicked_nor_entered() -> None:
    stopped = [ev(0, "sched.stop", vcpu=1), ev(0, "via.upcall_set", vcpu=0), ev(900, "sched.run", vcpu=1)]
    run = replay(stopped, policy="proposed", closed=True, end=4 * US)
    # vcpu0 at 0.5 asserts; its kick of vcpu1 is dropped; vcpu1 enters when it runs.
    assert run.metrics["vm_entries"] == 2 and run.metrics["max_callback_latency_ns"] == 900
    preempted = [ev(0, "via.upcall_set", vcpu=0), ev(700, "sched.stop", vcpu=1), ev(3 * US, "sched.run", vcpu=1)]
    run = replay(preempted, policy="proposed", closed=True, end=4 * US)
    # The kick was sent at 0.5 while vcpu1 ran, and finds it stopped at 1.0.
    assert run.metrics["vm_entries"] == 2 and run.metrics["max_callback_latency_ns"] == 3 * US


def test_without_a_route_nothing_is_asserted() -> None:
    events = [ev(0, "via.set_param", val=0), ev(US, "via.upcall_set", vcpu=0)]
    for policy in SYSTEM.policies:
        run = replay(events, policy=policy, closed=True, end=MS)
        assert run.metrics["injections"] == 0 and run.metrics["irq_lock_taken"] == 0


def test_declarations_are_complete() -> None:
    kinds = set(SYSTEM.kinds)
    names = [code.name for code in SYSTEM.codes]
    assert len(names) == len(set(names)) == 9
    parameters = {p.name for p in SYSTEM.parameters}
    for code in SYSTEM.codes:
        assert code.name.startswith("via-") and code.doc and code.cause and code.source and code.needs
        assert {k for need in code.needs for k in need.split("|")} <= kinds
        assert set(code.thresholds) <= parameters
    assert [code.name for code in SYSTEM.codes if code.closed] == [
        "via-stale-assert", "via-spurious-inject", "via-inject-storm", "via-late-assert",
    ]  # fmt: skip
