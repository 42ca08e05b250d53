"""Irq flow, recordings: every code fires where it should and is silent where the spec says "not when"."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import events_from_json
from replay.hardware.evtchn_two_level import TYPE_INTERDOMAIN, TYPE_IPI, TYPE_PIRQ
from replay.hardware.irq_desc import PER_CPU
from replay.systems import SYSTEMS
from replay.systems.irq_flow.codes import CODES

SYSTEM = SYSTEMS["irqflow"]
US = 1_000
MS = 1_000_000
S = 1_000 * MS
Event = tuple[int, str, Mapping[str, int]]


def replay(
    events: Sequence[Event],
    *,
    policy: str = "edge",
    end: int = 5 * S,
    known: bool = True,
    closed: bool = False,
    init: Mapping[str, Any] | None = None,
    **config: Any,
) -> Run:
    in_order = sorted(events, key=lambda event: event[0])
    table = events_from_json([{"t": t, "kind": kind, **fields} for t, kind, fields in in_order])
    return run_machine(
        SYSTEM, policy, [table], config=Config(SYSTEM.parameters, config), closed=closed, init=init, t_end=end,
        from_boot=known,
    )  # fmt: skip


def codes(run: Run, *, info: bool = False) -> list[str]:
    return [f.code.name for f in run.findings if info or f.severity != "info"]


def ev(t: int, kind: str, cpu: int = 0, **fields: int) -> Event:
    return (t, f"flow.{kind}", {"obj": 5, "cpu": cpu, **fields})


def handling(t: int, cpu: int = 0, *, consume: bool = True, end: int = 10_000, val: int = 1) -> list[Event]:
    """Ack, handler, its last look, its end."""
    look = [ev(t + 3_000, "consume", cpu)] if consume else []
    return [ev(t, "ack", cpu), ev(t + 10, "handler.begin", cpu), *look, ev(t + end, "handler.end", cpu, val=val)]


LOST = "flow-edge-lost"
DROPPED = "flow-upcall-dropped-inprogress"
EARLY = "flow-migrate-unmask-early"


def seed(*, consume: bool = True) -> list[Event]:
    """Document 003 as a recording: moved by the ack, raised again, dropped on cpu1."""
    return [
        ev(0, "set_affinity", tgt=1), ev(1_000, "raise"), ev(1_100, "mask"), ev(1_105, "unmask"),
        *handling(1_110, consume=consume), ev(6_000, "raise"), ev(6_100, "mask", 1), ev(6_110, "ack", 1),
        ev(11_120, "unmask"),
    ]  # fmt: skip


def test_the_seed_as_a_recording() -> None:
    run = replay(seed(), policy="level", end=MS)
    assert [(f.code.name, f.t, f.cpu) for f in run.findings] == [
        (DROPPED, 6_110, 1), (LOST, 21_110, 0),
    ]  # fmt: skip
    lost = run.findings[-1]
    assert (lost.val, lost.severity, lost.conf, lost.cause, lost.t_first) == (6_000, "error", 100, DROPPED, 11_110)
    assert [step.label for step in lost.evidence] == [
        "handler begins", "raise", "acknowledged and dropped on cpu1", "handler ends",
    ]  # fmt: skip


def test_unmask_inside_the_flow_is_the_early_one() -> None:
    events = [ev(0, "set_affinity", tgt=1), ev(1_000, "raise"), ev(1_100, "mask"), ev(1_105, "ack"),
              ev(1_108, "unmask"), ev(1_120, "handler.begin"), ev(9_000, "handler.end")]  # fmt: skip
    found = [(f.t, f.cpu) for f in replay(events, policy="level", end=MS).findings if f.code.name == EARLY]
    assert found == [(1_108, 1)]
    assert EARLY not in codes(replay(events, policy="edge", end=MS))
    assert EARLY not in codes(replay(events[1:], policy="level", end=MS))


def test_edge_lost_only_possibly_when_the_last_look_is_not_recorded() -> None:
    found = [f for f in replay(seed(consume=False), policy="level", end=MS).findings if f.code.name == LOST]
    assert [(f.severity, f.conf) for f in found] == [("warn", 50)]
    early = [ev(1_000, "raise"), ev(1_050, "raise"), *handling(1_100, consume=False)]
    assert codes(replay(early, policy="level", end=MS)) == []


def test_edge_remembers() -> None:
    rerun = [ev(11_120, "handler.begin"), ev(14_000, "consume"), ev(20_000, "handler.end", val=1)]
    run = replay([*seed(), *rerun], policy="edge", end=MS)
    assert codes(run) == []
    assert run.metrics["reruns"] == 1


def test_edge_lost_not_if_a_handler_follows_in_time() -> None:
    assert LOST not in codes(replay([*seed(), *handling(15_000)], policy="level", end=MS))
    assert LOST in codes(replay([*seed(), *handling(25_000)], policy="level", end=MS))


def test_edge_lost_not_when_unknown() -> None:
    assert codes(replay(seed()[6:], policy="level", known=False, end=MS)) == []  # where the handler runs is not known
    assert LOST in codes(replay(seed()[5:], policy="level", known=False, end=MS))  # its begin is all that is needed
    lost: Event = (9_000, "trace.lost", {"val": 8_000})
    assert LOST not in codes(replay([*seed(), lost], policy="level", end=MS))


def test_naive_fasteoi_clears_after_the_handler() -> None:
    base = [ev(1_000, "raise"), ev(1_110, "handler.begin"), ev(4_000, "consume"), ev(11_000, "handler.end", val=1)]
    eoi = ev(11_050, "eoi")
    assert codes(replay([*base, ev(6_000, "raise"), eoi], policy="fasteoi-naive", end=MS)) == [LOST]
    assert codes(replay([*base, ev(3_000, "raise"), eoi], policy="fasteoi-naive", end=MS)) == []


def test_fasteoi_keeps_what_comes_while_masked() -> None:
    first = [ev(1_000, "raise"), ev(1_050, "mask", val=4), *handling(1_100), ev(6_000, "raise"), ev(11_150, "eoi")]
    run = replay([*first, ev(11_300, "mask", val=4), *handling(11_310), ev(21_400, "eoi")], policy="fasteoi", end=3 * S)
    assert codes(run) == []


def test_concurrent_handler() -> None:
    code = "flow-concurrent-handler"
    two = [ev(0, "raise"), ev(100, "handler.begin", 0), ev(200, "handler.begin", 1)]
    assert [(f.code.name, f.cpu, f.tgt) for f in replay(two, end=MS).findings] == [(code, 1, 0)]
    assert codes(replay([*two[:2], ev(150, "handler.end", 0), two[2]], end=MS)) == []
    assert codes(replay(two, init={"S4": {"percpu": [5]}}, end=MS)) == []
    assert codes(replay(two, known=False, end=MS)) == []
    assert code in codes(replay([ev(0, "set_affinity", tgt=0), *two], known=False, end=MS))


def test_masked_forever() -> None:
    code = "flow-masked-forever"
    base = [ev(0, "raise"), *handling(100), ev(12_000, "mask"), ev(20_000, "raise")]
    assert [(f.code.name, f.t) for f in replay(base).findings] == [(code, S + 20_000)]
    assert codes(replay([*base, ev(900 * MS, "unmask"), *handling(900 * MS + 100)])) == []
    assert codes(replay([*base[:-1], ev(15_000, "disable"), base[-1]])) == []
    running = [*base, ev(30_000, "handler.begin")]
    assert code not in codes(replay(running))


def test_masked_during_a_late_eoi_back_off() -> None:
    code = "flow-masked-forever"
    late: list[Event] = []
    for n in range(12):
        late.append(ev(12_000 + n, "lateeoi", flags=1))
    base = [ev(0, "raise"), ev(50, "mask", val=4), *handling(100), *late, ev(20_000, "raise")]
    assert code not in codes(replay(base, policy="lateeoi", end=S))
    assert code not in codes(replay(base, policy="lateeoi", end=4 * S))  # unmasked when the back-off has run out


def test_lateeoi_missing() -> None:
    code = "flow-lateeoi-missing"
    base = [ev(0, "raise"), ev(50, "mask", val=4), *handling(100)]
    found = replay(base, policy="lateeoi").findings
    assert [(f.code.name, f.t, f.severity) for f in found] == [(code, S + 10_100, "warn")]
    again = replay([*base, ev(20_000, "raise")], policy="lateeoi").findings
    assert [(f.code.name, f.severity) for f in again] == [(code, "error"), ("flow-masked-forever", "error")]
    assert codes(replay([*base, ev(900 * MS, "lateeoi")], policy="lateeoi")) == []
    assert codes(replay(base, policy="edge")) == []
    inside = [*base, ev(5_000, "lateeoi")]
    assert codes(replay(inside, policy="lateeoi")) == []
    known = [*base, ev(20_000, "lateeoi"), ev(29_000, "raise"), *handling(30_000)]
    assert codes(replay(known, policy="edge")) == [code]  # this irq is one that gets late EOIs


def test_spurious_invocation() -> None:
    code = "flow-spurious-invocation"
    base = [ev(0, "raise"), *handling(100)]
    assert codes(replay([*base, *handling(20_000)], end=MS), info=True) == [code]
    assert codes(replay(handling(20_000), end=MS), info=True) == []
    assert codes(replay([*base, ev(19_000, "raise"), *handling(20_000)], end=MS), info=True) == []
    rerun = [ev(0, "raise"), *handling(100), ev(2_000, "raise"), ev(2_100, "ack", 1), *handling(10_110)[1:]]
    assert codes(replay(rerun, end=MS), info=True) == []


def test_upcall_no_work() -> None:
    code = "flow-upcall-no-work"
    first: Event = (50, "flow.upcall", {"cpu": 0})
    second: Event = (20_000, "flow.upcall", {"cpu": 0})
    third: Event = (30_000, "flow.upcall", {"cpu": 0})
    base = [ev(0, "raise"), first, *handling(100)]
    assert codes(replay([*base, second], end=MS), info=True) == []
    assert codes(replay([*base, second, third], end=MS), info=True) == [code]


def test_affinity_refused() -> None:
    code = "flow-affinity-refused"
    asked = [ev(0, "set_affinity", tgt=1)]
    plain = replay(asked, policy="percpu", end=MS).findings
    assert [(f.code.name, f.severity) for f in plain] == [(code, "info")]
    assert [f.severity for f in replay(asked, policy="percpu", virq_global=True).findings] == ["warn"]
    assert codes(replay(asked, policy="percpu", irq_type="ipi"), info=True) == []
    assert codes(replay(asked, policy="edge", end=MS), info=True) == []
    assert codes(replay(asked, policy="edge", end=MS, percpu=True), info=True) == [code]


def test_affinity_ignored() -> None:
    code = "flow-affinity-ignored"
    asked = ev(0, "set_affinity", tgt=1)
    old = [e for n in range(3) for e in (ev(n * 300 * MS + 1_000, "raise"), *handling(n * 300 * MS + 1_100))]
    assert [(f.code.name, f.t) for f in replay([asked, *old]).findings] == [(code, S + 11_100)]
    new = [ev(950 * MS, "raise", 1), *handling(950 * MS + 100, 1)]
    assert codes(replay([asked, *old, *new])) == []
    assert codes(replay([asked, *old[: len(old) // 3]])) == []


def test_no_end_notify() -> None:
    code = "flow-no-end-notify"
    pirq: Event = (0, "evtchn.bind", {"obj": 5, "tgt": 0, "val": TYPE_PIRQ})
    other: Event = (0, "evtchn.bind", {"obj": 5, "tgt": 0, "val": TYPE_INTERDOMAIN})
    assert codes(replay([pirq], end=MS), info=True) == [code]
    assert codes(replay([pirq], policy="level", end=MS), info=True) == [code]
    assert codes(replay([pirq], policy="fasteoi", end=MS), info=True) == []
    assert codes(replay([other], end=MS), info=True) == []


def test_storm() -> None:
    code = "flow-storm"
    fast = [e for n in range(40) for e in (ev(n * 20_000, "raise"), *handling(n * 20_000 + 100, val=0))]
    assert codes(replay(fast, end=MS, storm_per_s=30)) == [code]
    assert codes(replay(fast, end=MS, storm_per_s=40)) == []
    useful = [e for n in range(40) for e in (ev(n * 20_000, "raise"), *handling(n * 20_000 + 100, val=1))]
    assert codes(replay(useful, end=MS, storm_per_s=30)) == []
    capped = [ev(n, "lateeoi", flags=1) for n in range(255)]
    assert codes(replay(capped, policy="lateeoi", end=255)) == [code]


def test_active_skip() -> None:
    code = "flow-active-skip"
    events = [ev(0, "raise"), ev(13_000, "unmask"), ev(14_000, "raise")]
    run = replay(events, policy="lateeoi", closed=True, lateeoi_ns=50_000, end=200_000)
    assert run.metrics["active_skips"] == 0
    assert run.metrics["handler_runs"] == 2
    assert code in {c.name for c in SYSTEM.codes}


def test_active_gate_skips_while_the_late_eoi_is_owed() -> None:
    """A driver's enable_irq cannot open the gate: only the late EOI can."""
    from replay.sink import Sink
    from replay.systems.irq_flow.machine import IrqFlowMachine
    from replay.systems.irq_flow.policies import LateEoi

    sink = Sink(closed=False)
    machine = IrqFlowMachine(LateEoi(), Config(SYSTEM.parameters), sink)
    irq = machine.irq(5)
    irq.is_active = irq.pending = 1
    irq.posted = 1
    machine.upcall(irq, 0)
    assert machine.active_skips == 1
    assert irq.pending == 1
    assert [f.code.name for f in sink.findings] == ["flow-active-skip"]


def test_late_eoi_back_off_doubles() -> None:
    """Threshold 1, then 2^(n-2) jiffies, at most a second (Linux xen_irq_lateeoi_locked)."""
    delays = []
    for n in (1, 2, 3, 4, 20):
        events = [ev(0, "raise"), *handling(100), *[ev(100_000, "lateeoi", flags=1)] * n]
        delays.append(replay(events, policy="lateeoi", end=100_000).metrics["max_lateeoi_ns"] - 89_900)
    assert delays == [0, 4 * MS, 8 * MS, 16 * MS, S]


# -- S6.5 ---------------------------------------------------------------------------------------------------------


def entry(t: int, irq: int, cpu: int = 0) -> Event:
    return (t, "irqdesc.entry", {"obj": irq, "cpu": cpu})


def leave(t: int, irq: int, cpu: int = 0, val: int = 1) -> Event:
    return (t, "irqdesc.exit", {"obj": irq, "cpu": cpu, "val": val})


def state(t: int, irq: int, val: int, depth: int = 0) -> Event:
    return (t, "irqdesc.state", {"obj": irq, "val": val, "val2": depth})


def test_desc_concurrent() -> None:
    code = "irqdesc-concurrent"
    two = [entry(0, 9, 0), entry(10, 9, 1)]
    assert codes(replay(two)) == [code]
    assert codes(replay([two[0], leave(5, 9, 0), two[1]])) == []
    assert codes(replay([state(0, 9, PER_CPU), *two])) == []
    assert codes(replay(two, known=False)) == []
    assert codes(replay([state(0, 9, 0), *two], known=False)) == [code]


def test_desc_unbalanced() -> None:
    code = "irqdesc-unbalanced"
    assert codes(replay([entry(0, 9), entry(10, 10), leave(20, 10), leave(30, 9)])) == []
    assert codes(replay([entry(0, 9), entry(10, 10), leave(20, 9)])) == [code]
    assert codes(replay([entry(0, 9), entry(10, 9)])) == [code]
    assert codes(replay([leave(0, 9)])) == [code]
    assert codes(replay([leave(0, 9)], known=False)) == []
    assert codes(replay([state(0, 9, 0, depth=-1)])) == [code]
    assert codes(replay([state(0, 9, 0, depth=1)])) == []
    lost: Event = (10, "trace.lost", {"val": 5})
    assert codes(replay([entry(0, 9), lost, leave(20, 9), leave(30, 8)])) == []


def test_desc_spurious() -> None:
    code = "irqdesc-spurious-disable-risk"
    none = [e for n in range(30) for e in (entry(n * 10, 9), leave(n * 10 + 5, 9, val=0))]
    assert codes(replay(none, spurious_risk=20)) == [code]
    assert codes(replay(none, spurious_risk=31)) == []
    assert codes(replay(none, spurious_risk=20, spurious_window=15)) == []


# -- closed runs --------------------------------------------------------------------------------------------------


def test_percpu_flows_wait_for_each_other() -> None:
    run = replay([ev(0, "raise"), ev(50, "raise", obj=6)], policy="percpu", closed=True)
    assert run.metrics["handler_runs"] == 2
    assert run.metrics["max_latency_ns"] == 10_050


def test_ipi_takes_the_percpu_flow_under_edge() -> None:
    bind: Event = (0, "evtchn.bind", {"obj": 5, "tgt": 2, "val": TYPE_IPI})
    run = replay([bind, ev(10, "set_affinity", tgt=1), ev(100, "raise")], policy="edge", closed=True)
    assert (run.metrics["migrations_refused"], run.metrics["handler_runs"], codes(run)) == (1, 1, [])


def test_upcall_of_the_old_cpu_finds_nothing_after_a_rebind() -> None:
    events = [ev(0, "raise"), ev(50, "set_affinity", tgt=1)]
    run = replay(events, policy="lateeoi", closed=True, lateeoi_ns=2_000, end=MS)
    assert (run.metrics["spurious_upcalls"], run.metrics["handler_runs"]) == (1, 1)
    assert run.effects == [(150, 1 << 32 | 5)]


def test_move_of_a_dropped_flow_is_a_parameter() -> None:
    events = [ev(0, "set_affinity", tgt=1), ev(1_000, "raise"), ev(5_000, "set_affinity", tgt=2), ev(6_000, "raise")]
    moves = [
        replay(events, policy="level", closed=True, end=50_000, move_when_dropped=flag).metrics["migrations"]
        for flag in (True, False)
    ]
    assert moves == [2, 1]


def test_level_stays_masked_while_disabled() -> None:
    events = [ev(1_000, "raise"), ev(3_000, "disable"), ev(6_000, "raise"), ev(50_000, "enable")]
    run = replay(events, policy="level", closed=True)
    assert (run.metrics["handler_runs"], run.metrics["acked"], codes(run)) == (2, 2, [])


def test_an_edge_remembered_while_disabled_is_sent_again() -> None:
    events = [
        ev(0, "set_affinity", tgt=1), ev(1_000, "raise"), ev(6_000, "raise"), ev(7_000, "disable"),
        ev(50_000, "enable"),
    ]  # fmt: skip
    run = replay(events, policy="edge", closed=True)
    assert (run.metrics["resends"], run.metrics["handler_runs"], codes(run)) == (1, 2, [])


def test_every_code_is_named_in_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [code.name for code in CODES if f'"{code.name}"' not in text] == []


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_declared_thresholds_exist(code: Any) -> None:
    names = {parameter.name for parameter in SYSTEM.parameters}
    assert set(code.thresholds) <= names
    assert code.doc.endswith(".")


# -- closed runs, every number worked out by hand from S4.3 and S4.4 ---------------------------------------------------

#: The handler of the first runs from 1.1 to 11.1 and looks at its ring at 4.1; the others come while it runs.
FOUR: list[Event] = [ev(1_000, "raise"), ev(6_000, "raise"), ev(8_000, "raise"), ev(9_000, "raise")]


def numbers(run: Run) -> dict[str, int]:
    return {name: value for name, value in run.metrics.items() if value}


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        # 6.1: masked, acknowledged, remembered. 8.0 waits in the port, 9.0 merges into it; 11.1 unmasks and runs again,
        # 11.2 finds the handler running once more.
        ("edge", {"acked": 3, "handler_runs": 3, "reruns": 2, "pended_inprogress": 2, "upcalls": 3, "coalesced": 1,
                  "masked_ns": 5_000 + 9_900, "max_latency_ns": 5_100}),
        # Masked while the handler runs: 6.0 waits, 8.0 and 9.0 merge; the unmask brings it at 11.2.
        ("level", {"acked": 2, "handler_runs": 2, "upcalls": 2, "coalesced": 2, "masked_ns": 20_000,
                   "max_latency_ns": 5_200}),
        ("fasteoi", {"acked": 2, "handler_runs": 2, "upcalls": 2, "coalesced": 2, "masked_ns": 20_000,
                     "max_latency_ns": 5_200}),
        # Never masked; its CPU is busy until 11.1.
        ("percpu", {"acked": 2, "handler_runs": 2, "upcalls": 2, "coalesced": 2, "max_latency_ns": 5_100}),
    ],
)  # fmt: skip
def test_raises_while_the_handler_runs(policy: str, expected: Mapping[str, int]) -> None:
    run = replay(FOUR, policy=policy, closed=True, end=MS)
    runs = expected["handler_runs"]
    assert numbers(run) == {"raises": 4, "consumed": 4, "handler_time_ns": 10_000 * runs, **expected}
    assert run.findings == []
    assert len(run.effects) == runs


def test_late_eoi_that_never_comes_keeps_the_port_masked() -> None:
    run = replay(FOUR, policy="lateeoi", closed=True, end=MS)
    assert numbers(run) == {
        "raises": 4, "acked": 1, "consumed": 1, "handler_runs": 1, "upcalls": 1, "coalesced": 2, "pending": 1,
        "outstanding": 3, "max_latency_ns": 100, "handler_time_ns": 10_000,
    }  # fmt: skip
    assert [(f.code.name, f.severity) for f in run.findings] == [
        ("flow-lateeoi-missing", "error"), ("flow-masked-forever", "error"),
    ]  # fmt: skip


@pytest.mark.parametrize(("policy", "masked"), [("edge", 29_500), ("level", 39_500), ("fasteoi", 39_500)])
def test_raises_while_disabled_wait_for_the_enable(policy: str, masked: int) -> None:
    """Masked from 0.5 to 30.0, and by level and fasteoi while the handler runs from 30.1 on."""
    events = [ev(500, "disable"), ev(1_000, "raise"), ev(2_000, "raise"), ev(30_000, "enable")]
    assert numbers(replay(events, policy=policy, closed=True, end=MS)) == {
        "raises": 2, "coalesced": 1, "acked": 1, "consumed": 2, "handler_runs": 1, "upcalls": 1,
        "max_latency_ns": 29_100, "handler_time_ns": 10_000, "masked_ns": masked,
    }  # fmt: skip


def test_when_a_move_is_made() -> None:
    """edge defers it to the ack, whose unmask is heard on the new CPU; some chips move at once, and nothing is heard.
    fasteoi defers it to the eoi: the second run is elsewhere."""
    events = [ev(500, "set_affinity", tgt=1), ev(1_000, "raise"), ev(6_000, "raise")]
    same = {"raises": 2, "acked": 2, "consumed": 2, "handler_runs": 2, "handler_time_ns": 20_000}
    again = {**same, "reruns": 1, "pended_inprogress": 1, "masked_ns": 5_000, "max_latency_ns": 5_100}
    deferred = {"migrations": 1, "migrations_deferred": 1, "unmask_hypercalls": 1}
    edge = replay(events, policy="edge", closed=True, end=MS)
    assert numbers(edge) == {**again, **deferred, "upcalls": 3, "spurious_upcalls": 1}
    assert edge.effects == [(1_100, 5), (11_100, 5)]
    at_once = replay(events, policy="edge", closed=True, end=MS, move_at_once=1)
    assert at_once.metrics["migrations_deferred"] == 0
    assert numbers(at_once) == {**again, "upcalls": 2}
    assert at_once.effects == [(1_100, 1 << 32 | 5), (11_100, 1 << 32 | 5)]
    fasteoi = replay(events, policy="fasteoi", closed=True, end=MS)
    assert numbers(fasteoi) == {**same, **deferred, "upcalls": 2, "masked_ns": 20_000, "max_latency_ns": 5_200}
    assert fasteoi.effects == [(1_100, 5), (11_200, 1 << 32 | 5)]
