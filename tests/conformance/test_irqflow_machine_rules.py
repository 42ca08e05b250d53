"""Irq flow rules that need a second look: clocks that start anew, gaps, flows entered twice, what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from replay.bodies import Bodies, Measured
from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import NIL, events_from_json
from replay.systems.irq_flow.calibration import WORKED
from replay.systems.irq_flow.machine import IrqFlowMachine
from replay.systems.irq_flow.policies import Edge
from replay.systems.irq_flow.state import MAX_OUTSTANDING, IrqRecord
from tests.conformance.pinned import measure
from tests.conformance.test_irqflow_rules import EARLY, LOST, MS, SYSTEM, Event, S, codes, ev, handling, replay, seed

MASKED = "flow-masked-forever"
MISSING = "flow-lateeoi-missing"
IGNORED = "flow-affinity-ignored"


def gap(t: int, since: int) -> Event:
    return (t, "trace.lost", {"val": since})


def when(run: Run, code: str) -> list[int]:
    return [f.t for f in run.findings if f.code.name == code]


# -- recordings: a lost edge is told when nothing has happened for settle_ns -------------------------------------------


def test_an_ack_starts_the_clock_of_a_lost_edge_anew() -> None:
    """Somebody is on the way to the handler at 15.0, until the unmask says that nobody is."""
    events = [*seed()[1:], ev(15_000, "ack", 1), ev(16_000, "unmask", 1)]
    (lost,) = [f for f in replay(events, policy="level", end=MS).findings if f.code.name == LOST]
    assert (lost.t, lost.t_first) == (26_000, 16_000)


def test_a_raise_starts_the_clock_of_a_lost_edge_anew() -> None:
    """fasteoi-naive: what the eoi erases at 6.0 is lost with what it erased before."""
    events = [ev(1_000, "raise"), ev(1_100, "ack"), ev(1_200, "eoi"), ev(5_000, "raise"), ev(6_000, "eoi")]
    run = replay(events, policy="fasteoi-naive", end=MS)
    assert [(f.t, f.t_first, f.val) for f in run.findings] == [(16_000, 6_000, 1_000)]
    assert run.metrics["lost_raises"] == 2


def test_an_eoi_ends_the_flow_of_its_own_cpu() -> None:
    events = [ev(0, "raise"), ev(100, "ack", 0)]
    assert when(replay([*events, ev(200, "eoi", 0)], policy="fasteoi-naive", end=MS), LOST) == [10_200]
    assert when(replay([*events, ev(200, "eoi", 1)], policy="fasteoi-naive", end=MS), LOST) == []


def test_what_came_before_a_handler_is_consumed_by_it_whether_its_last_look_is_recorded_or_not() -> None:
    for look in (True, False):
        events = [ev(0, "raise"), ev(50, "raise"), *handling(100, consume=look)]
        run = replay(events, end=MS)
        assert (run.metrics["consumed"], run.metrics["outstanding"], codes(run)) == (2, 0, [])


# -- recordings: masks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["edge", "lateeoi"])
def test_an_unmask_without_a_reason_takes_all_reasons_away(policy: str) -> None:
    first = [ev(0, "raise"), *handling(100), ev(10_500, "lateeoi"), ev(12_000, "mask", val=4), ev(20_000, "raise")]
    assert MASKED in codes(replay(first, policy=policy))
    assert codes(replay([*first, ev(30_000, "unmask")], policy=policy)) == []
    for reason in (1, 4):
        again = [ev(30_000, "unmask"), ev(40_000, "mask", val=reason), ev(50_000, "unmask", val=reason)]
        assert codes(replay([*first, *again], policy=policy)) == []


def test_a_late_eoi_that_is_still_in_time_excuses_a_masked_port() -> None:
    """The handler is seen to end twice, at 10.1 us and at 500 ms: a second after the last the driver is late."""
    base = [ev(0, "raise"), ev(50, "mask", val=4), *handling(100), ev(20_000, "raise")]
    base.append(ev(500 * MS, "handler.end", val=1))
    run = replay(base, policy="lateeoi")
    assert [(f.t, f.cause) for f in run.findings if f.code.name == MASKED] == [(1_500 * MS, MISSING)]
    assert when(replay([*base, ev(1_400 * MS, "lateeoi")], policy="lateeoi"), MASKED) == []
    # Nobody owes one to the edge flow.
    run = replay(base, policy="edge")
    assert [(f.t, f.cause) for f in run.findings if f.code.name == MASKED] == [(S + 20_000, "")]


# -- recordings: storms and moves --------------------------------------------------------------------------------------


def test_a_second_of_runs_without_work_ends_after_a_second() -> None:
    def storms(apart: int, *more: Event) -> list[int]:
        events = [ev(0, "raise"), *handling(100, val=0), ev(apart, "raise"), *handling(apart + 100, val=0), *more]
        return when(replay(events, storm_per_s=1), "flow-storm")

    assert storms(S) == []
    assert storms(S - 1) == [S - 1 + 10_100]
    assert storms(S - 1, gap(500 * MS, 400 * MS)) == [S - 1 + 10_100]  # lost records hide more of them, not fewer


def test_a_new_request_has_its_own_time() -> None:
    """Asked for cpu 1, then at 500 ms for cpu 2: a second from the first handling after that."""
    handled = [e for t in (1 * MS, 600 * MS, 700 * MS) for e in (ev(t - 100, "raise"), *handling(t))]
    run = replay([ev(0, "set_affinity", tgt=1), *handled, ev(500 * MS, "set_affinity", tgt=2)])
    assert [(f.t, f.cpu) for f in run.findings if f.code.name == IGNORED] == [(1_600 * MS + 10_000, 2)]


def test_a_request_is_told_to_be_ignored_once() -> None:
    handled = [e for t in (1 * MS, 600 * MS, 700 * MS) for e in (ev(t - 100, "raise"), *handling(t))]
    run = replay([ev(0, "set_affinity", tgt=1), *handled, ev(2 * MS, "handler.end", val=1)])
    assert when(run, IGNORED) == [S + 1 * MS + 10_000]


# -- recordings: gaps --------------------------------------------------------------------------------------------------


def test_a_gap_hides_where_the_flow_is_and_who_was_asked_for() -> None:
    """U2. The unmask after the gap is not known to be inside a flow; cpu 1 may have handled it in the gap."""
    events = [ev(0, "raise"), ev(50, "mask"), ev(100, "ack"), gap(600, 500)]
    events += [ev(700, "set_affinity", tgt=1), ev(800, "unmask")]
    run = replay(events, policy="level", end=MS)
    assert (when(run, EARLY), run.metrics["migrations"]) == ([], 0)
    handled = [e for t in (1 * MS, 600 * MS, 700 * MS) for e in (ev(t - 100, "raise"), *handling(t))]
    assert when(replay([ev(0, "set_affinity", tgt=1), gap(600, 500), *handled]), IGNORED) == []


def test_a_gap_hides_an_unmask() -> None:
    base = [ev(0, "raise"), *handling(100), ev(12_000, "mask"), ev(20_000, "raise")]
    assert when(replay([*base, gap(30_000, 25_000)]), MASKED) == []


def test_a_back_off_that_was_seen_to_begin_excuses_after_a_gap_too() -> None:
    late = [ev(12_000 + n, "lateeoi", flags=1) for n in range(12)]  # a second of back-off, until 1.000012 s
    base = [ev(0, "raise"), ev(50, "mask", val=4), *handling(100), *late, gap(20_000, 15_000)]
    masked = [ev(45_000, "enable"), ev(46_000, "lateeoi"), ev(49_000, "mask"), ev(50_000, "raise")]
    masked = [*handling(30_000)[1:], *masked]
    run = replay([*base, *masked], policy="lateeoi", stuck_ns=500 * MS)
    assert when(run, MASKED) == [S + 12_011]


def test_a_late_eoi_inside_the_run_is_not_owed_after_a_gap() -> None:
    events = [
        ev(0, "raise"), ev(50, "mask", val=4), ev(110, "handler.begin"), ev(500, "lateeoi"), gap(700, 600),
        ev(1_000, "handler.end", val=1), ev(2_000, "enable"), ev(3_000, "mask"), ev(4_000, "raise"),
    ]  # fmt: skip
    (f,) = [f for f in replay(events, policy="lateeoi").findings if f.code.name == MASKED]
    assert (f.t, f.cause) == (S + 4_000, "")


def test_the_story_of_an_edge_lost_after_a_gap_begins_with_its_own_raise() -> None:
    events = [ev(0, "raise"), gap(600, 500), *seed()[5:]]
    (f,) = [f for f in replay(events, policy="level", end=MS).findings if f.code.name == LOST]
    (raised,) = [step for step in f.evidence if step.label == "raise"]
    assert (raised.t, raised.seq) == (6_000, sorted(e[0] for e in events).index(6_000))


def test_an_edge_that_was_sent_again_by_enable_is_no_rerun() -> None:
    """check_irq_resend takes the memory away: the next run serves the pending bit."""
    events = [
        ev(0, "raise"), *handling(100), ev(2_000, "raise"), ev(2_100, "ack", 1), ev(3_000, "disable"),
        ev(20_000, "enable"), *handling(21_000),
    ]  # fmt: skip
    run = replay(events, policy="edge", end=MS)
    assert (run.metrics["resends"], run.metrics["reruns"]) == (1, 0)


def test_raises_that_nobody_consumes_take_bounded_memory() -> None:
    irq = IrqRecord(5, 0, True)
    for t in range(MAX_OUTSTANDING + 10):
        irq.add_raise(t, t)
    assert len(irq.outstanding) == len(irq.raise_seqs) == 1024


# -- closed runs -------------------------------------------------------------------------------------------------------


def test_an_upcall_that_is_due_comes_before_the_next_event() -> None:
    run = replay([ev(0, "raise"), ev(1, "disable")], closed=True, upcall_ns=0, end=MS)
    assert run.effects == [(0, 5)]


def test_fasteoi_is_not_stuck_while_its_handler_runs() -> None:
    """Raised again at 5.0 while masked for the handler, which runs until 10.1."""
    for end, stuck in ((6_000, 0), (MS, 0)):
        run = replay([ev(0, "raise"), ev(5_000, "raise")], policy="fasteoi", closed=True, end=end)
        assert len(when(run, MASKED)) == stuck


def test_fasteoi_naive_entered_while_its_handler_runs_only_clears() -> None:
    """enable's unmask brings an upcall at 3.1; its flow finds the handler running: eoi, so 4.0 does not coalesce."""
    events = [ev(0, "raise"), ev(2_000, "disable"), ev(3_000, "enable"), ev(4_000, "raise")]
    run = replay(events, policy="fasteoi-naive", closed=True, end=8_000)
    assert (run.metrics["handler_runs"], run.metrics["acked"], run.metrics["coalesced"]) == (1, 2, 0)


def test_an_edge_is_lost_when_the_last_upcall_under_way_finds_nothing() -> None:
    """fasteoi-naive: 6.0 merges into the pending bit, enable's upcall is due at 10.15, the eoi erases it at 10.1."""
    events = [ev(0, "raise"), ev(6_000, "raise"), ev(10_000, "disable"), ev(10_050, "enable")]
    run = replay(events, policy="fasteoi-naive", closed=True, end=MS)
    assert (when(run, LOST), run.metrics["spurious_upcalls"]) == ([10_150], 1)


def test_a_late_eoi_while_the_handler_runs_is_one() -> None:
    """It unmasks the port: what is raised at 5.0 is remembered, and run at 10.1. The driver owes it for that event."""
    events = [ev(0, "raise"), ev(3_000, "lateeoi")]
    run = replay(events, policy="lateeoi", closed=True, end=MS)
    assert (codes(run), run.metrics["masked_ns"], run.metrics["handler_runs"]) == ([], 2_900, 1)
    again = replay([*events, ev(5_000, "raise")], policy="lateeoi", closed=True, end=MS)
    assert [again.metrics[k] for k in ("handler_runs", "reruns", "pended_inprogress", "outstanding")] == [2, 1, 1, 0]
    assert codes(again) == [MISSING]
    served = replay([*events, ev(5_000, "raise"), ev(30_000, "lateeoi")], policy="lateeoi", closed=True, end=MS)
    assert codes(served) == []


def test_types_of_the_first_state() -> None:
    events = [ev(0, "set_affinity", tgt=1)]
    for name, refused in (("ipi", 1), ("virq", 0), ("pirq", 0)):
        run = replay(events, policy="edge", closed=True, init={"S4": {"types": {"5": name}}}, end=MS)
        assert run.metrics["migrations_refused"] == refused


def test_a_driver_that_issues_one_late_eoi_and_not_the_next() -> None:
    """What-if on a recording: the second body has none."""
    bodies = Bodies(5)
    bodies.add(5, [0, 1], [1_000, 1_000], [500, 500], [2_000, NIL], [0, 0], [1, 1])
    events = [{"t": t, "kind": "flow.raise", "obj": 5, "cpu": 0} for t in (0, 50_000)]
    run = run_machine(
        SYSTEM, "lateeoi", [events_from_json(events)], config=Config(SYSTEM.parameters), closed=True, t_end=MS,
        measured=Measured(bodies=bodies),
    )  # fmt: skip
    assert codes(run) == [MISSING]


class Ignoring(Edge):
    """Promises to move and does not."""

    def on_set_affinity(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        machine.accept_move(irq, cpu)


def moves(policy: type[Any] | None, times: Sequence[int]) -> list[tuple[int, int]]:
    events = [{"t": 0, "kind": "flow.set_affinity", "obj": 5, "tgt": 1}]
    events += [{"t": t, "kind": "flow.raise", "obj": 5} for t in times]
    run = run_machine(
        SYSTEM, "edge", [events_from_json(events)], config=Config(SYSTEM.parameters), closed=True, t_end=4 * S,
        policy_class=policy,
    )  # fmt: skip
    return [(f.t, f.cpu) for f in run.findings if f.code.name == IGNORED]


def test_who_never_moves_ignores_the_request_in_closed_runs_too() -> None:
    assert moves(Ignoring, (100 * MS, 200 * MS)) == [(1_100 * MS + 10_100, 1)]
    assert moves(Ignoring, (100 * MS,)) == []


def test_a_rerun_on_the_old_cpu_after_the_move_ignores_nothing() -> None:
    """The ack of the first handling moves the irq; edges that come while it runs are served where it runs."""
    assert moves(None, (100 * MS, 100 * MS + 5_000, 100 * MS + 8_000)) == []


# -- what is measured --------------------------------------------------------------------------------------------------


def as_json(events: Sequence[Event]) -> list[dict[str, Any]]:
    return [{"t": t, "kind": kind, **fields} for t, kind, fields in sorted(events, key=lambda e: e[0])]


def measured(events: Sequence[Event]) -> Measured:
    return measure("irqflow", as_json(events), {})[0]


def test_a_run_of_which_the_return_value_is_not_known_counts_as_work() -> None:
    events = [ev(0, "raise"), ev(100, "handler.begin"), ev(200, "consume"), ev(900, "handler.end"), ev(950, "lateeoi"),
              ev(2_000, "raise"), ev(2_100, "handler.begin"), ev(2_900, "handler.end", val=0)]  # fmt: skip
    bodies = measured(events).bodies
    assert bodies is not None
    assert list(bodies.stock[5].columns[WORKED]) == [1, 0]


@pytest.mark.parametrize("lag", [0, 1, 70])
def test_the_lag_of_upcalls_is_the_median(lag: int) -> None:
    events: list[Event] = []
    for t in (0, 5_000, 9_000):
        events += [ev(t, "raise"), ev(t + lag, "handler.begin"), ev(t + 900, "handler.end")]
    assert measured(events).values["upcall_ns"] == lag


@pytest.mark.parametrize(
    ("late", "wrong", "at_once"),
    [((0, 0), (), True), ((MS,), (), True), ((MS + 1,), (), False), ((0, 2 * MS, 2 * MS), (), False),
     ((0, 0, 2 * MS, 2 * MS), (), True), ((0, 0, 2 * MS, 2 * MS, 2 * MS), (), False), ((0, 0), (0, 1), False)],
)  # fmt: skip
def test_whether_set_affinity_rebinds_at_once(late: Sequence[int], wrong: Sequence[int], at_once: bool) -> None:
    """At least half of the requests, within a millisecond, to the CPU that was asked for."""
    events = [ev(0, "raise"), ev(100, "handler.begin"), ev(900, "handler.end")]
    for n, delay in enumerate(late):
        t = (n + 1) * 100 * MS
        events.append(ev(t, "set_affinity", tgt=n + 1))
        events.append((t + delay, "guest.bind_cpu", {"obj": 5, "tgt": 7 if n in wrong else n + 1}))
    result = measured(events)
    assert bool(result.values.get("move_at_once")) == at_once
    assert any("rebinds at once" in text for text in result.assumptions) == at_once
