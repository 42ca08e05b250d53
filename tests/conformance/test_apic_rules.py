"""Local APIC, rules L1 to L6: every code fires where it should and is silent where the spec says "not when".

Every table of events is replayed twice, with and without the short cuts for the common cases; both say the same.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from replay.declare import Config, System
from replay.driver import Run, run_machine
from replay.events import KINDS, NIL, NONE, Batch, events_from_json
from replay.hardware.lapic import LocalApic, vector_class
from replay.knowledge import UNKNOWN
from replay.sink import Finding, Sink
from replay.systems.apic import SYSTEM
from replay.systems.apic.codes import CODES
from replay.systems.apic.machine import ApicMachine

US = 1_000
MS = 1_000_000
S = 1_000_000_000
Event = tuple[int, str, Mapping[str, int]]
Who = Mapping[str, int]

CPU: Who = {"cpu": 1}
VCPU: Who = {"dom": 1, "vcpu": 0}
ALL = frozenset(kind.name for kind in KINDS if kind.name != "ioapic.message")

VECTOR_KINDS = ("lapic.accept", "lapic.deliver", "lapic.exit")

UNMATCHED = "lapic-eoi-unmatched"
WRONG_VECTOR = "lapic-eoi-wrong-vector"
WITHOUT_IRR = "lapic-deliver-without-irr"
INVERSION = "lapic-priority-inversion"
NOT_HIGHEST = "lapic-not-highest"
NESTED = "stack-lower-priority-nested"
EXIT_ORDER = "stack-exit-order"
EXIT_UNMATCHED = "stack-exit-unmatched"
DEPTH = "stack-nesting-depth"
OVERDUE = "lapic-eoi-overdue"
ILLEGAL = "lapic-illegal-vector"
STUCK = "lapic-irr-stuck"


#: The machine without its short cuts.
PLAIN = replace(SYSTEM, make=lambda policy, config, sink, sub: ApicMachine(config, sink))


def once(system: System, events: Sequence[Event], **how: Any) -> Run:
    prefix: Event = (0, "hwhpet.config", {"obj": 7, "val": 0, "val2": 0})
    in_order = [prefix, *sorted(events, key=lambda event: event[0])]
    table = events_from_json([{"t": t, "kind": kind, **fields} for t, kind, fields in in_order])
    return run_machine(
        system, "any", [table], config=Config(SYSTEM.parameters, how["config"]), closed=False, t_end=how["end"],
        from_boot=how["known"], observed=how["observed"],
    )  # fmt: skip


def replay(
    events: Sequence[Event], *, end: int = 50 * MS, known: bool = True, hidden: Sequence[str] = (), **config: int
) -> Run:
    """`hidden`: kinds that the recording does not show. Event numbers start at 1."""
    how = {"end": end, "known": known, "observed": ALL - set(hidden) if hidden else None, "config": config}
    short = once(SYSTEM, events, **how)
    long = once(PLAIN, events, **how)
    assert short.findings == long.findings
    assert short.metrics == long.metrics
    return long


def codes(run: Run) -> list[str]:
    return [f.code.name for f in run.findings]


def found(run: Run, code: str) -> list[tuple[int, int, int]]:
    """(time, vector, val) of the findings of a code."""
    return [(f.t, f.obj, f.val) for f in run.findings if f.code.name == code]


def only(run: Run) -> Finding:
    (finding,) = run.findings
    return finding


def accept(t: int, vector: int, who: Who = CPU, *, flags: int = 0) -> Event:
    """`flags`: 1 level, 2 IRR had it already, 4 it had not."""
    return (t, "lapic.accept", {**who, "obj": vector, "flags": flags})


def deliver(t: int, vector: int, who: Who = CPU) -> Event:
    return (t, "lapic.deliver", {**who, "obj": vector})


def exits(t: int, vector: int, who: Who = CPU) -> Event:
    return (t, "lapic.exit", {**who, "obj": vector})


def eoi(t: int, vector: int | None = None, who: Who = CPU) -> Event:
    return (t, "lapic.eoi", who if vector is None else {**who, "obj": vector})


def take(t: int, vector: int, who: Who = CPU) -> list[Event]:
    """Requested and delivered at once."""
    return [accept(t, vector, who), deliver(t, vector, who)]


def serve(t: int, vector: int, who: Who = CPU) -> list[Event]:
    """All of an interrupt's life, 30 ns long."""
    return [*take(t, vector, who), eoi(t + 20, vector, who), exits(t + 30, vector, who)]


def tpr(t: int, value: int, who: Who = CPU) -> Event:
    return (t, "lapic.tpr", {**who, "val": value})


def idle(t: int, who: Who = CPU) -> Event:
    return (t, "lapic.idle", who)


def reset(t: int, who: Who = CPU) -> Event:
    return (t, "lapic.reset", who)


def snap(t: int, register: int, word: int, value: int, who: Who = CPU) -> Event:
    return (t, "lapic.snapshot", {**who, "obj": register, "tgt": word, "val": value})


def lost(t: int, cpu: int | None = 1) -> Event:
    return (t, "trace.lost", {"val": t - 1} if cpu is None else {"cpu": cpu, "val": t - 1})


def runs(t: int, who: Who = VCPU, cpu: int = 3) -> Event:
    return (t, "sched.run", {**who, "cpu": cpu})


def stops(t: int, who: Who = VCPU, cpu: int = 3) -> Event:
    return (t, "sched.stop", {**who, "cpu": cpu, "val": 1})


# -- the registers -------------------------------------------------------------------------------------------------


def test_accept_sets_irr_and_the_trigger_mode() -> None:
    lapic = LocalApic(known=True)
    assert [lapic.accept(0x31, True), lapic.accept(0x31, True)] == [False, True]  # collapses
    assert (lapic.irr, lapic.tmr) == (1 << 0x31, 1 << 0x31)
    assert lapic.accept(0x52, False) is False
    assert (lapic.irr, lapic.tmr) == (1 << 0x31 | 1 << 0x52, 1 << 0x31)
    assert lapic.accept(0x31, False) is True
    assert lapic.tmr == 0


def test_processor_priority_is_the_higher_of_tpr_and_isr() -> None:
    lapic = LocalApic(known=True)
    assert (vector_class(0x31), vector_class(0xFF), lapic.ppr_class()) == (3, 15, 0)
    lapic.tpr = 0x45
    assert lapic.ppr_class() == 4
    lapic.deliver(0x51)
    assert lapic.ppr_class() == 5
    lapic.tpr = 0x60
    assert lapic.ppr_class() == 6
    lapic.tpr = UNKNOWN
    assert lapic.ppr_class() == 5


def test_pending_above_looks_at_higher_classes_only() -> None:
    lapic = LocalApic(known=True)
    for vector in (0x21, 0x3F, 0x40, 0x55):
        lapic.accept(vector, False)
    assert [lapic.pending_above(v) for v in (0x20, 0x4F, 0x50, 0xF0)] == [0x55, 0x55, -1, -1]
    lapic.deliver(0x55)
    assert [lapic.pending_above(v) for v in (0x20, 0x3E, 0x40)] == [0x40, 0x40, -1]


def test_eoi_dismisses_the_highest_in_service() -> None:
    lapic = LocalApic(known=True)
    for vector in (0x31, 0x51, 0x41, 0x51):  # out of order, and one twice: still a set
        lapic.deliver(vector)
    assert [lapic.highest_in_service(), *(lapic.eoi() for _ in range(4))] == [0x51, 0x51, 0x41, 0x31, -1]
    assert lapic.highest_in_service() == -1


def test_the_spurious_vector_enters_no_isr() -> None:
    lapic = LocalApic(known=True, spurious_vector=0x3F)
    lapic.accept(0x3F, False)
    lapic.deliver(0x3F)
    assert (lapic.irr, lapic.isr) == (0, [])


def test_what_is_unknown_of_isr_shrinks_with_each_delivery() -> None:
    """A delivery proves that nothing of its class or above was in service."""
    lapic = LocalApic(known=False)
    assert (lapic.irr_known, lapic.tpr, lapic.isr_unknown_below, lapic.isr_is_known()) == (0, UNKNOWN, 16, False)
    below = []
    for vector in (0x51, 0x71, 0x31, 0xFF, 0x20):
        lapic.deliver(vector)
        below.append((lapic.isr_unknown_below, lapic.isr_is_known()))
    assert below == [(5, False), (5, False), (3, False), (3, False), (2, False)]
    lapic.deliver(0x1F)  # class 0 does not exist
    assert lapic.isr_is_known()
    lapic.forget()
    assert (lapic.isr, lapic.isr_unknown_below) == ([], 16)
    lapic.settle()
    assert lapic.isr_is_known()
    lapic.accept(0x31, True)
    lapic.deliver(0x41)
    lapic.reset()
    assert (lapic.irr, lapic.isr, lapic.tmr, lapic.tpr, lapic.isr_unknown_below) == (0, [], 0, 0, 0)
    assert lapic.irr_known == (1 << 256) - 1


# -- L4 ------------------------------------------------------------------------------------------------------------


def test_eoi_unmatched() -> None:
    run = replay([*serve(100, 0x31), eoi(200, 0x31)])
    f = only(run)
    assert (f.code.name, f.severity, f.t, f.cpu, f.dom, f.vcpu, f.obj, f.val) == (
        UNMATCHED, "warn", 200, 1, NONE, NONE, 0x31, NIL,
    )  # fmt: skip
    assert (f.conf, f.seq, f.expected, f.observed) == (100, 5, "a vector in service", "ISR empty")
    assert [(e.t, e.seq, e.label) for e in f.evidence] == [
        (100, 2, "deliver 0x31"), (120, 3, "EOI"), (200, 5, "EOI"),
    ]  # fmt: skip
    assert (run.metrics["eois"], run.metrics["eois_unmatched"]) == (2, 1)
    f = only(replay([*serve(100, 0x31, VCPU), eoi(200, None, VCPU)]))
    assert (f.code.name, f.cpu, f.dom, f.vcpu, f.obj) == (UNMATCHED, NONE, 1, 0, NONE)


def test_eoi_unmatched_not_while_isr_is_unknown() -> None:
    assert codes(replay([eoi(10), *serve(100, 0x31), eoi(200)], known=False)) == []
    assert codes(replay([*serve(100, 0x31), lost(150), eoi(200)])) == []
    assert codes(replay([eoi(200)], hidden=["lapic.deliver"])) == []
    assert codes(replay([*serve(100, 0x20), eoi(200)], known=False)) == []


def test_eoi_unmatched_once_isr_is_known() -> None:
    lowest = replay([*serve(100, 0x51), eoi(150), *serve(200, 0x1F), eoi(300)], known=False)
    assert found(lowest, UNMATCHED) == [(300, NONE, NIL)]
    halted = only(replay([idle(100), *serve(110, 0x51), eoi(200)], known=False))
    assert (halted.code.name, halted.t, halted.conf) == (UNMATCHED, 200, 80)  # concluded, not seen
    for sure in (
        replay([idle(50), reset(100), eoi(200)], known=False),
        replay([idle(100), eoi(200)]),  # known already: the halt adds nothing
    ):
        assert (only(sure).code.name, only(sure).conf) == (UNMATCHED, 100)
    words = [snap(100 + word, 1, word, 0) for word in range(4)]
    assert codes(replay([*words[:3], eoi(200)], known=False)) == []
    assert codes(replay([*words, eoi(200)], known=False)) == [UNMATCHED]


def test_eoi_of_the_spurious_vector_is_unmatched() -> None:
    """It sets no ISR bit and expects no EOI."""
    assert found(replay([deliver(10, 0xFF), eoi(20), exits(30, 0xFF)]), UNMATCHED) == [(20, NONE, NIL)]
    assert codes(replay([deliver(10, 0xFF), exits(30, 0xFF)])) == []
    assert codes(replay([*take(10, 0xFF), eoi(20, 0xFF), exits(30, 0xFF)], spurious_vector=0xEF)) == []
    assert codes(replay([deliver(10, 0xEF), exits(30, 0xEF)], spurious_vector=0xEF)) == []


def test_a_snapshot_puts_vectors_in_service() -> None:
    inside = [snap(10, 1, word, 1 << 1 | 1 << 17 if word == 1 else 0) for word in range(4)]  # 0x41 and 0x51
    run = replay([*inside, eoi(20, 0x51), eoi(30, 0x41), eoi(40)], known=False)
    assert found(run, UNMATCHED) == [(40, NONE, NIL)]
    assert codes(run) == [UNMATCHED]
    corrected = [*take(0, 0x31), *take(5, 0xA1), snap(10, 1, 0, 0), eoi(20, 0xA1), exits(21, 0xA1), eoi(30)]
    assert found(replay(corrected), UNMATCHED) == [(30, NONE, NIL)]  # 0x31 had gone unseen, 0xa1 is of another word
    top = [snap(10, 1, 3, -(1 << 63)), eoi(20, 0xFF), eoi(30)]  # the sign bit is vector 0xff
    assert found(replay(top), UNMATCHED) == [(30, NONE, NIL)]


def test_eoi_wrong_vector() -> None:
    nested = [*take(10, 0x31), *take(20, 0x41)]
    f = only(replay([*nested, eoi(30, 0x31), eoi(40)]))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val, f.seq) == (WRONG_VECTOR, "error", 30, 1, 0x31, 0x41, 5)
    assert (f.expected, f.observed) == ("EOI of 0x41, the highest in service", "EOI of 0x31")
    assert f.evidence[-1].label == "EOI of 0x31"
    assert codes(replay([*nested, eoi(30, 0x41), eoi(40, 0x31)])) == []
    assert codes(replay([*nested, eoi(30), eoi(40)])) == []
    run = replay([*take(10, 0x31), eoi(20, 0x41)])
    assert codes(run) == [WRONG_VECTOR]
    assert run.metrics["eois.cpu1.0x31"] == 1  # hardware cleared what was in service


# -- L3 ------------------------------------------------------------------------------------------------------------


def test_deliver_without_irr() -> None:
    f = only(replay([*serve(0, 0x51), deliver(100, 0x31)], end=200))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val, f.conf) == (WITHOUT_IRR, "warn", 100, 1, 0x31, NIL, 100)
    assert (f.expected, f.observed, f.evidence[-1].label) == ("IRR[0x31] = 1", "IRR bit clear", "deliver 0x31")
    twice = [*serve(0, 0x31), deliver(100, 0x31), eoi(110), exits(120, 0x31)]
    assert found(replay(twice), WITHOUT_IRR) == [(100, 0x31, NIL)]
    other = [accept(0, 0x51), deliver(100, 0x61), eoi(110), exits(120, 0x61)]
    assert found(replay(other), WITHOUT_IRR) == [(100, 0x61, NIL)]


def test_deliver_without_irr_not_when_requests_are_unknown() -> None:
    assert codes(replay([deliver(100, 0x31)], known=False, end=200)) == []
    twice = [deliver(100, 0x31), eoi(110), exits(115, 0x31), deliver(120, 0x31)]
    assert codes(replay(twice, hidden=["lapic.accept"], end=200)) == []
    assert codes(replay([*serve(0, 0x31), lost(50), deliver(100, 0x31)], end=200)) == []
    assert codes(replay([deliver(100, 0xFF)], end=200)) == []
    seen = [*serve(0, 0x31), deliver(100, 0x31)]  # its bit is known since the first request
    assert codes(replay(seen, known=False, end=200)) == [WITHOUT_IRR]


def test_snapshot_of_irr() -> None:
    assert codes(replay([snap(0, 0, 1, 1 << 0x11), deliver(10, 0x51)], end=20)) == []
    assert codes(replay([accept(0, 0x51), snap(5, 0, 1, 0), deliver(10, 0x51)], end=20)) == [WITHOUT_IRR]
    assert codes(replay([accept(0, 0x51), snap(5, 0, 0, 0), deliver(10, 0x51)], end=20)) == []
    assert codes(replay([snap(5, 0, 1, 0), deliver(10, 0x51)], known=False, end=20)) == [WITHOUT_IRR]
    assert codes(replay([snap(5, 0, 0, 0), deliver(10, 0x51)], known=False, end=20)) == []
    assert codes(replay([snap(5, 0, 1, 0), deliver(10, 0x7F)], known=False, end=20)) == [WITHOUT_IRR]
    assert codes(replay([snap(5, 0, 1, 0), deliver(10, 0x80)], known=False, end=20)) == []
    assert codes(replay([snap(5, 0, 1, -1), deliver(10, 0x7F), eoi(15)], end=20)) == []
    assert codes(replay([accept(0, 0x80), snap(5, 0, 1, 0), deliver(10, 0x80)], end=20)) == []
    assert codes(replay([snap(5, 2, 1, 0), deliver(10, 0x51)], known=False, end=20)) == []  # TMR


def test_priority_inversion() -> None:
    outer = take(10, 0x41)
    for inner in (0x4F, 0x31):
        f = replay([*outer, *take(20, inner)], end=30).findings[0]
        assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val) == (INVERSION, "error", 20, 1, inner, 0x41)
    assert (f.expected, f.observed) == ("class above 0x4 (vector 0x41 is in service)", "vector 0x31 delivered")
    assert [e.label for e in f.evidence] == ["deliver 0x41", "deliver 0x31 below 0x41"]
    assert codes(replay([*outer, *take(20, 0x50)], end=30)) == []
    assert codes(replay([*outer, eoi(15), exits(16, 0x41), *take(20, 0x31)], end=30)) == []
    assert codes(replay([*take(10, 0xF1), deliver(20, 0xFF)], end=30)) == []  # spurious: no class of its own
    assert codes(replay([*outer, lost(15), *take(20, 0x31)], end=30)) == []


def test_a_vector_out_of_order_in_service_keeps_the_highest_on_top() -> None:
    run = replay([*take(10, 0x41), *take(20, 0x31), eoi(30, 0x41), eoi(40, 0x31)])
    assert codes(run) == [INVERSION]
    assert run.metrics["in_service_at_end"] == 0


def test_priority_inversion_under_tpr() -> None:
    """L2: PPR is the higher of TPR and ISR, class by class; of TPR the lower half does not matter."""
    f = only(replay([tpr(0, 0x45), *take(10, 0x4F)]))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val) == (INVERSION, "error", 10, 1, 0x4F, 0x45)
    assert (f.expected, f.observed) == ("class above 0x4 (TPR is 0x45)", "vector 0x4f delivered")
    assert [(e.t, e.label) for e in f.evidence] == [(10, "deliver 0x4f below 0x45")]
    assert codes(replay([tpr(0, 0x45), *take(10, 0x50)])) == []
    assert codes(replay([tpr(0, 0x45), tpr(5, 0x3F), *take(10, 0x4F)])) == []
    assert codes(replay([tpr(0, 0x45), deliver(10, 0xFF), exits(15, 0xFF)])) == []  # the spurious vector
    assert codes(replay([tpr(0, 0x0F), *take(10, 0x10)])) == []
    # Either one is enough; what is in service is named first.
    assert found(replay([*take(5, 0x61), tpr(7, 0x50), *take(10, 0x51)]), INVERSION) == [(10, 0x51, 0x61)]
    assert found(replay([*take(5, 0x41), tpr(7, 0x60), *take(10, 0x51)]), INVERSION) == [(10, 0x51, 0x60)]


def test_an_unknown_tpr_accuses_nobody() -> None:
    """It may be 0, so only what is in service counts; and it may be anything, so nothing is called deliverable."""
    assert codes(replay([*take(10, 0x21)], known=False)) == []
    assert codes(replay([*take(5, 0x61), *take(10, 0x51)], known=False)) == [INVERSION]
    assert codes(replay([tpr(0, 0x50), lost(5), *take(10, 0x21)])) == []
    assert codes(replay([tpr(0, 0x50), reset(5), *take(10, 0x21)])) == []
    assert codes(replay([tpr(0, 0x50), tpr(5, -1), *take(10, 0x21)])) == []
    # A delivery shows that TPR is lower by then: one lost write is one finding.
    assert codes(replay([tpr(0, 0x50), *take(10, 0x31), eoi(20), exits(25, 0x31), *take(30, 0x31)])) == [INVERSION]
    # No recording shows every write of TPR: the guest has a shadow.
    assert codes(replay([tpr(0, 0x50), *take(10, 0x31)], hidden=["lapic.exit"])) == []
    lapic = LocalApic(known=False)
    assert [lapic.held_by_tpr(v) for v in (0x10, 0x20, 0xF0)] == [False, False, False]


def test_not_highest() -> None:
    asked = [accept(10, 0x51), accept(20, 0x31)]
    f = only(replay([*asked, deliver(30, 0x31)], end=40))
    assert (f.code.name, f.severity, f.t, f.obj, f.val, f.conf) == (NOT_HIGHEST, "warn", 30, 0x31, 0x51, 50)
    assert [(e.t, e.seq, e.label) for e in f.evidence] == [(10, None, "request 0x51"), (30, 3, "deliver 0x31")]
    assert (f.expected, f.observed) == ("vector 0x51 first", "vector 0x31 delivered")
    assert codes(replay([*asked, deliver(30, 0x51)], end=40)) == []
    assert codes(replay([accept(10, 0x3F), accept(20, 0x31), deliver(30, 0x31)], end=40)) == []  # same class


def test_not_highest_not_for_what_was_held_back_or_came_at_once() -> None:
    asked = [accept(10, 0x51), accept(20, 0x31)]
    assert codes(replay([tpr(0, 0x50), *asked, deliver(30, 0x31)], end=40)) == [INVERSION]
    assert codes(replay([tpr(0, 0x2F), *asked, deliver(30, 0x31)], end=40)) == [NOT_HIGHEST]
    assert codes(replay([*asked, deliver(30, 0x31)], t_err_ns=20, end=40)) == []
    assert codes(replay([*asked, deliver(30, 0x31)], t_err_ns=19, end=40)) == [NOT_HIGHEST]
    assert codes(replay([accept(10, 0x31), accept(20, 0x51), deliver(20, 0x31)], end=40)) == []
    assert codes(replay([*asked, deliver(30, 0x31)], hidden=["lapic.accept"], end=40)) == []
    served = [accept(5, 0x51), deliver(6, 0x51), eoi(7), exits(8, 0x51), accept(20, 0x31), deliver(30, 0x31)]
    assert codes(replay(served, end=40)) == []
    assert codes(replay([snap(5, 0, 1, 1 << 0x11), accept(20, 0x31), deliver(30, 0x31)], end=40)) == []  # since when?


# -- L1 ------------------------------------------------------------------------------------------------------------


def test_illegal_vector() -> None:
    f = only(replay([*serve(0, 0x31), accept(100, 15)]))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.seq) == (ILLEGAL, "error", 100, 1, 15, 5)
    assert (f.expected, f.observed) == ("vector >= 16", "vector 15")
    assert codes(replay([*serve(0, 0x31), *serve(100, 16)])) == []
    assert found(replay([accept(0, 0, VCPU)]), ILLEGAL) == [(0, 0, NIL)]


def test_requests_that_collapse_are_counted() -> None:
    run = replay([accept(0, 0x31), accept(10, 0x31), accept(20, 0x31, flags=1), deliver(30, 0x31), eoi(40)], end=50)
    assert (codes(run), run.metrics["irr_coalesced"], run.metrics["deliveries"]) == ([], 2, 1)
    again = replay([*take(0, 0x31), accept(10, 0x31), eoi(20), exits(30, 0x31), deliver(40, 0x31)], end=50)
    assert (codes(again), again.metrics["irr_coalesced"]) == ([], 0)  # asked again while in service


# -- L5 ------------------------------------------------------------------------------------------------------------


def test_lower_priority_nested() -> None:
    early = [*take(10, 0x41), eoi(15)]
    for inner in (0x31, 0x4F, 0x41):
        f = only(replay([*early, *take(20, inner)], end=30))
        assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val) == (NESTED, "warn", 20, 1, inner, 0x41)
    assert (f.expected, f.observed) == (
        "nothing of class 0x4 or below until 0x41 has returned",
        "vector 0x41 entered, 0x41 running with its ISR bit clear",
    )
    assert [e.label for e in f.evidence] == ["deliver 0x41", "EOI", "deliver 0x41 inside 0x41"]
    assert codes(replay([*early, *take(20, 0x51)], end=30)) == []
    assert codes(replay([*early, exits(17, 0x41), *take(20, 0x31)], end=30)) == []
    assert codes(replay([*early, *take(20, 0x31)], hidden=["lapic.exit"], end=30)) == []
    assert codes(replay([*early, lost(17), *take(20, 0x31)], end=30)) == []
    assert codes(replay([*early, reset(17), *take(20, 0x31)], end=30)) == []


def test_exit_order() -> None:
    nested = [*take(10, 0x31), *take(20, 0x41), eoi(25), eoi(26)]
    f = only(replay([*nested, exits(30, 0x31), exits(40, 0x41)]))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val) == (EXIT_ORDER, "warn", 30, 1, 0x31, 0x41)
    assert (f.expected, f.observed) == ("return of 0x41", "return of 0x31")
    assert [e.label for e in f.evidence] == ["deliver 0x31", "deliver 0x41", "EOI", "EOI"]
    assert codes(replay([*nested, exits(30, 0x41), exits(40, 0x31)])) == []


def test_exit_unmatched() -> None:
    f = only(replay([*serve(0, 0x41), exits(100, 0x31)]))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val) == (EXIT_UNMATCHED, "warn", 100, 1, 0x31, NIL)
    assert codes(replay([*serve(0, 0x31), exits(100, 0x31)])) == [EXIT_UNMATCHED]
    assert codes(replay([exits(100, 0x31)], known=False)) == []
    assert codes(replay([lost(50), exits(100, 0x31)])) == []
    assert codes(replay([idle(50), exits(100, 0x31)], known=False)) == [EXIT_UNMATCHED]
    assert codes(replay([reset(50), exits(100, 0x31)], known=False)) == [EXIT_UNMATCHED]
    inside = [*take(0, 0x31), exits(50, 0x41)]
    assert codes(replay(inside, end=100)) == [EXIT_UNMATCHED]


def test_nesting_depth() -> None:
    three = [*take(10, 0x31), *take(20, 0x41), *take(30, 0x51)]
    run = replay(three, end=40)
    f = only(run)
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val) == (DEPTH, "error", 30, 1, 0x51, 3)
    assert (f.expected, f.observed) == ("at most 2 handlers inside each other", "3: 0x31, 0x41, 0x51")
    assert [e.label for e in f.evidence] == ["deliver 0x31", "deliver 0x41", "deliver 0x51"]
    assert run.metrics["max_nesting"] == 3
    assert codes(replay(three, nesting_limit=3, end=40)) == []
    run = replay([*three[:4], eoi(25), exits(26, 0x41), *three[4:]], end=40)
    assert (codes(run), run.metrics["max_nesting"]) == ([], 2)
    assert replay([]).metrics["max_nesting"] == 0
    assert replay(serve(0, 0x31)).metrics["max_nesting"] == 1


def test_without_exits_an_eoi_ends_its_handler() -> None:
    hidden = ["lapic.exit"]
    calm = [event for t in range(3) for event in [*take(100 * t, 0x51 - 16 * t), eoi(100 * t + 10)]]
    run = replay(calm, hidden=hidden)
    assert (codes(run), run.metrics["max_nesting"]) == ([], 1)
    nested = [*take(10, 0x31), *take(20, 0x41), eoi(25), *take(30, 0x51), eoi(35), eoi(40)]
    run = replay(nested, hidden=hidden)
    assert (codes(run), run.metrics["max_nesting"]) == ([], 2)
    deep = [*take(10, 0x31), *take(20, 0x41), *take(30, 0x51)]
    assert codes(replay(deep, hidden=hidden)) == [DEPTH]
    spurious = [deliver(10, 0xFF), *take(20, 0x31), eoi(30), *take(40, 0x31), eoi(50)]
    assert replay(spurious, hidden=hidden).metrics["max_nesting"] == 2


# -- L6 ------------------------------------------------------------------------------------------------------------


def test_eoi_overdue() -> None:
    late = [*take(10, 0x31), exits(100, 0x31)]
    f = only(replay(late))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val, f.t_first) == (
        OVERDUE, "warn", 100 + 10 * MS, 1, 0x31, 10 * MS, 100,
    )  # fmt: skip
    assert (f.expected, f.observed, [e.label for e in f.evidence]) == (
        "EOI of 0x31", "still in service", ["deliver 0x31"],
    )  # fmt: skip
    assert codes(replay(late, end=99 + 10 * MS)) == []
    assert [f.t for f in replay(late, eoi_overdue_ns=500).findings] == [600]
    assert codes(replay([*late, eoi(9 * MS)])) == []
    assert codes(replay([*take(10, 0x31), eoi(50), exits(100, 0x31)])) == []
    assert codes(replay(take(10, 0x31))) == []  # the handler still runs
    assert codes(replay([*late, lost(5 * MS)])) == []
    assert codes(replay([*late, lost(5 * MS, 2)])) == [OVERDUE]
    assert codes(replay([*late, reset(5 * MS)])) == []


def test_eoi_overdue_counts_for_each_service_anew() -> None:
    """A guest that acknowledges in time, again and again."""
    often = [e for n in range(20) for e in [*take(n * MS, 0x31), exits(n * MS + 10, 0x31), eoi(n * MS + 990_000)]]
    assert codes(replay(often)) == []
    back = [*take(0, 0x31), exits(10, 0x31), eoi(20), *take(9 * MS, 0x31)]
    assert codes(replay(back)) == []
    assert found(replay([*back, exits(9 * MS + 10, 0x31)]), OVERDUE) == [(19 * MS + 10, 0x31, 10 * MS)]


def test_eoi_overdue_is_a_cost_while_the_owner_does_not_run() -> None:
    late = [*take(10, 0x31, VCPU), exits(100, 0x31, VCPU)]
    for events, severity in (
        ([runs(0), *late], "warn"),
        ([runs(0), *late, stops(200)], "info"),
        ([runs(0), *late, stops(200), runs(300)], "warn"),
        (late, "warn"),
    ):
        f = only(replay(events))
        assert (f.code.name, f.severity, f.dom, f.vcpu, f.cpu) == (OVERDUE, severity, 1, 0, NONE)


# -- L3, time ------------------------------------------------------------------------------------------------------


def test_irr_stuck() -> None:
    f = only(replay([runs(0), accept(100, 0x31, VCPU)]))
    assert (f.code.name, f.t, f.cpu, f.dom, f.vcpu, f.obj, f.val, f.t_first) == (
        STUCK, 100 + MS, NONE, 1, 0, 0x31, MS, 100,
    )  # fmt: skip
    assert (f.severity, f.conf) == ("warn", 50)  # declared error; nobody records IF
    assert (f.expected, f.observed) == ("delivery of 0x31", "IRR set, nothing above it in service")
    assert [(e.t, e.seq, e.label) for e in f.evidence] == [(100, None, "0x31 deliverable")]
    assert found(replay([runs(0), accept(100, 0x31, VCPU)], irr_stuck_ns=500), STUCK) == [(600, 0x31, 500)]
    assert codes(replay([runs(0), accept(100, 0x31, VCPU)], end=MS + 99)) == []


def test_irr_stuck_not_when_it_could_not_or_need_not_be_delivered() -> None:
    asked = accept(100, 0x31, VCPU)
    silent: list[list[Event]] = [
        [asked],  # whether it runs is not known
        [runs(0), asked, stops(200)],
        [runs(0), tpr(50, 0x30, VCPU), asked],
        [runs(0), *take(50, 0x41, VCPU), asked],
        [runs(0), *take(50, 0x3F, VCPU), asked],
        [runs(0), asked, deliver(MS, 0x31, VCPU)],
        [runs(0), asked, reset(200, VCPU)],
        [runs(0), asked, lost(200)],
        [runs(0), asked, snap(200, 0, 0, 0, VCPU)],
        [accept(100, 0x31)],  # physical
    ]
    assert [codes(replay(events)) for events in silent] == [[]] * len(silent)
    assert codes(replay([runs(0), asked], known=False)) == []  # TPR
    assert codes(replay([runs(0), tpr(50, 0, VCPU), asked], known=False)) == [STUCK]
    assert codes(replay([runs(0), asked], irr_stuck_ns=0)) == []
    assert codes(replay([runs(0), asked], hidden=["lapic.accept"])) == []


@pytest.mark.parametrize(
    ("events", "deliverable"),
    [
        ([runs(0), tpr(50, 0x30, VCPU), accept(100, 0x31, VCPU), tpr(5 * MS, 0x20, VCPU)], 5 * MS),
        ([accept(100, 0x31, VCPU), runs(2 * MS)], 2 * MS),
        ([runs(0), accept(100, 0x31, VCPU), stops(200), runs(7 * MS), runs(7 * MS + 500)], 7 * MS),
        ([runs(0), *take(50, 0x41, VCPU), accept(100, 0x31, VCPU), eoi(3 * MS, 0x41, VCPU)], 3 * MS),
        ([runs(0), accept(100, 0x31, VCPU), runs(500 * US)], 100),
        ([runs(0), accept(100, 0x31, VCPU), stops(200), runs(MS + 100)], MS + 100),
    ],
    ids=["tpr", "ran later", "stopped", "in service", "ran all along", "at the time-out"],
)
def test_irr_stuck_counts_from_when_it_was_deliverable(events: list[Event], deliverable: int) -> None:
    run = replay(events)
    assert found(run, STUCK) == [(deliverable + MS, 0x31, MS)]
    assert [f.t_first for f in run.findings if f.code.name == STUCK] == [deliverable]


def test_irr_stuck_watches_every_request() -> None:
    both = [runs(0), accept(100, 0x31, VCPU), accept(100, 0x61, VCPU), accept(600, 0x51, VCPU)]
    assert [(t, v) for t, v, _ in found(replay(both), STUCK)] == [(MS + 100, 0x31), (MS + 100, 0x61), (MS + 600, 0x51)]
    served = [
        runs(0), *take(100, 0x31, VCPU), eoi(200, None, VCPU), exits(250, 0x31, VCPU), accept(600, 0x31, VCPU),
    ]  # fmt: skip
    assert found(replay(served), STUCK) == [(600 + MS, 0x31, MS)]
    later = [*served, deliver(700, 0x31, VCPU), eoi(800, None, VCPU), accept(5 * MS, 0x41, VCPU)]
    assert [(t, v) for t, v, _ in found(replay(later), STUCK)] == [(6 * MS, 0x41)]
    again = [runs(0), accept(100, 0x31, VCPU), accept(500 * US, 0x31, VCPU)]  # collapses: the first counts
    assert found(replay(again), STUCK) == [(100 + MS, 0x31, MS)]
    gap = [runs(0), accept(100, 0x31, VCPU), lost(200), runs(300), tpr(300, 0, VCPU), accept(400, 0x51, VCPU)]
    assert found(replay(gap), STUCK) == [(400 + MS, 0x51, MS)]
    born = [runs(0), accept(100, 0x31, VCPU), reset(200, VCPU), accept(400, 0x51, VCPU)]
    assert found(replay(born), STUCK) == [(400 + MS, 0x51, MS)]


# -- ignorance -----------------------------------------------------------------------------------------------------


def test_a_gap_on_a_cpu_leaves_the_others_alone_but_no_vcpu() -> None:
    other: Who = {"cpu": 2}
    assert codes(replay([*serve(0, 0x31), lost(50, 2), eoi(100)])) == [UNMATCHED]
    assert codes(replay([*serve(0, 0x31, other), lost(50, 2), eoi(100, None, other)])) == []
    assert codes(replay([*serve(0, 0x31, VCPU), lost(50, 2), eoi(100, None, VCPU)])) == []
    both = [*serve(0, 0x31), *serve(0, 0x31, other), eoi(100), eoi(100, None, other)]
    assert codes(replay([*both, lost(50, None)])) == []
    assert codes(replay([lost(50, 2), eoi(100)])) == []  # cpu 1 appears after the gap


def test_while_records_of_a_cpu_are_lost_a_vcpu_may_have_been_there() -> None:
    """Between two of its events it took an interrupt, or ended one, on the CPU that nobody sees."""
    begins = (20, "trace.lost", {"cpu": 2, "val": 20, "flags": 1})
    moved = [begins, *serve(100, 0x31, VCPU), eoi(150, None, VCPU), *take(200, 0x31, VCPU), *take(300, 0x31, VCPU)]
    assert codes(replay([*moved, (400, "trace.lost", {"cpu": 2, "val": 20})])) == []
    # Before and after it, and on CPUs themselves, nothing is forgiven.
    assert codes(replay([*take(1, 0x31, VCPU), *take(2, 0x31, VCPU), *moved])) != []
    over = [*moved, (400, "trace.lost", {"cpu": 2, "val": 20}), *take(500, 0x31, VCPU), *take(600, 0x31, VCPU)]
    assert codes(replay(over)) == [INVERSION]
    assert codes(replay([begins, *take(100, 0x31), *take(200, 0x31)])) != []


def test_a_gap_of_all_cpus_is_nobodys_processor() -> None:
    """The first vCPU of domain 0 keeps its name after it."""
    first: Who = {"dom": 0, "vcpu": 0}
    run = replay([lost(50, None), reset(90, first), eoi(100, None, first), *serve(200, 0x31, first)])
    assert [(f.code.name, f.cpu, f.dom, f.vcpu) for f in run.findings] == [(UNMATCHED, NONE, 0, 0)]
    assert run.metrics["deliveries.d0v0.0x31"] == 1


def test_a_domain_created_in_the_recording_starts_empty() -> None:
    born: Event = (10, "lapic.reset", {"dom": 1})
    assert codes(replay([born, eoi(100, None, VCPU)], known=False)) == [UNMATCHED]
    assert codes(replay([born, eoi(100, None, {"dom": 2, "vcpu": 0})], known=False)) == []
    assert codes(replay([born, lost(50), eoi(100, None, VCPU)], known=False)) == []
    assert codes(replay([reset(10, VCPU), eoi(100, None, {"dom": 1, "vcpu": 1})], known=False)) == []


def test_a_gap_in_a_handler_forgets_the_stack_and_the_story() -> None:
    run = replay([*take(10, 0x31), *take(20, 0x41), lost(30), reset(35), exits(40, 0x41)])
    f = only(run)
    assert (f.code.name, f.evidence) == (EXIT_UNMATCHED, ())


# -- numbers -------------------------------------------------------------------------------------------------------


def test_metrics() -> None:
    events = [*serve(0, 0x31), *serve(100, 0x31), *take(200, 0x41), *serve(0, 0x51, VCPU), eoi(90, None, VCPU)]
    m = replay(events, end=300).metrics
    assert {name: count for name, count in m.items() if count and not name.startswith("hwhpet")} == {
        "deliveries": 4, "eois": 4, "eois_unmatched": 1, "in_service_at_end": 1, "max_nesting": 1,
        "deliveries.cpu1.0x31": 2, "deliveries.cpu1.0x41": 1, "deliveries.d1v0.0x51": 1,
        "eois.cpu1.0x31": 2, "eois.d1v0.0x51": 1, "eois.d1v0.unknown": 1,
    }  # fmt: skip


def random_events(seed: int, count: int) -> list[Event]:
    """Anything at all, mostly of one class at a time."""
    draw = random.Random(seed)
    owners: list[Who] = [CPU, {"cpu": 2}, VCPU, {"dom": 1, "vcpu": 1}]
    out: list[Event] = []
    t = 0
    for _ in range(count):
        t += draw.choice((0, 10, 300, 40 * US, 700 * US))
        who = draw.choice(owners)
        vector = draw.choice((3, 0x10, 0x31, 0x32, 0x41, 0x51, 0xF1, 0xFF))
        out += draw.choice(
            (
                serve(t, vector, who), serve(t, vector, who), take(t, vector, who), [accept(t, vector, who)],
                [accept(t, vector, who, flags=1)], [deliver(t, vector, who)], [eoi(t, None, who)],
                [eoi(t, vector, who)], [exits(t, vector, who)], [tpr(t, vector & 0xF0, who)], [idle(t, who)],
                [runs(t, who)] if "dom" in who else [], [stops(t, who)] if "dom" in who else [],
                [reset(t, who)] if draw.random() < 0.2 else [], [lost(t, 2)] if draw.random() < 0.1 else [],
            )
        )  # fmt: skip
    return out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("hidden", [(), ("lapic.exit",), ("lapic.accept",), ("lapic.accept", "lapic.exit")])
@pytest.mark.parametrize("known", [True, False])
def test_the_short_cuts_change_nothing(seed: int, hidden: tuple[str, ...], known: bool) -> None:
    """`replay` compares; there must be something to compare."""
    run = replay(random_events(seed, 300), hidden=hidden, known=known)
    assert len(run.findings) > 20
    assert run.metrics["deliveries"] > 50


@pytest.mark.parametrize("hidden", [(), ("lapic.exit",), ("lapic.accept", "lapic.exit")])
@pytest.mark.parametrize("value", [0, 0x0F, 0x10, 0x3F, 0x40, 0x5F, -1])
def test_the_short_cuts_know_of_tpr(value: int, hidden: tuple[str, ...]) -> None:
    """On a vCPU that serves one vector after the other, where everything but a TPR write could take a short cut.

    A TPR of class 3 to 5 holds a vector back. That it is delivered all the same is impossible if TPR is certain, and
    shows in any case that TPR is no longer known: the last request has an excuse then.
    """
    familiar = [e for n, v in enumerate((0x31, 0x41, 0x51) * 3) for e in serve(1_000 * n + 10, v, VCPU)]
    again = [e for n, v in enumerate((0x31, 0x41, 0x51)) for e in serve(21_000 + 1_000 * n, v, VCPU)]
    lowered = [tpr(30_000, 0, VCPU), *serve(31_000, 0x31, VCPU)]
    asked = accept(40_000, 0x41, VCPU)
    inverted = [INVERSION] if value >= 0x30 and not hidden else []
    stuck = [] if "lapic.accept" in hidden else [STUCK]
    for more, excused in ((lowered, False), ([], value < 0 or value >= 0x30)):
        events = [runs(0), tpr(1, 0, VCPU), *familiar, tpr(20_000, value, VCPU), *again, *more, asked]
        shown = [event for event in events if event[1] not in hidden]
        assert codes(replay(shown, hidden=hidden)) == inverted + ([] if excused else stuck)


def test_a_tpr_write_makes_no_ioapic() -> None:
    """What ends the short cuts is TPR itself, of this processor alone."""
    machine = SYSTEM.make(None, Config(SYSTEM.parameters), Sink(closed=False), "")
    rows = [tpr(0, 0x50, VCPU), *take(10, 0x61, VCPU)]
    machine.feed(Batch.of(events_from_json([{"t": t, "kind": k, **f} for t, k, f in rows]), machine.columns))
    assert machine.ioapics == {}
    assert machine.metrics()["deliveries"] == 1


# -- in lockstep with an emulator's log: its LAPICs show requests, merges, EOIs and their broadcasts ---------------

#: Pin 20: vector 0x71, level, fixed, physical, to core 1.
LEVEL_RTE = 1 << 15 | 0x71 | 1 << 56
RTE: Event = (0, "ioapic.rte", {"obj": 20, "val": 0x71, "val2": LEVEL_RTE})
SEES = frozenset(kind.name for kind in KINDS)
MISSING, EXTRA = "model-missing-outcome", "model-extra-outcome"


def pin_line(t: int, level: int) -> Event:
    return (t, "ioapic.line", {"obj": 20, "val": level})


def remote_irr(t: int, value: int) -> Event:
    return (t, "ioapic.remote_irr", {"obj": 20, "val": value})


def message(t: int, vector: int = 0x71, dest: int = 1, mode: int = 1 << 15) -> Event:
    return (t, "ioapic.message", {"obj": vector, "tgt": dest, "val": mode})


def broadcast(t: int, vector: int = 0x71) -> Event:
    return (t, "ioapic.eoi", {"obj": vector})


def lockstep(events: Sequence[Event]) -> tuple[dict[str, int], list[tuple[str, int]]]:
    """Counts of the emulator's outcomes, without the zeros, and the mismatches."""
    in_order = sorted(events, key=lambda event: event[0])
    table = events_from_json([{"t": t, "kind": kind, **fields} for t, kind, fields in in_order])
    run = run_machine(
        SYSTEM, "any", [table], config=Config(SYSTEM.parameters, {}), closed=False, t_end=S, from_boot=False,
        observed=SEES,
    )  # fmt: skip
    counts = {k.removeprefix("lockstep."): v for k, v in run.metrics.items() if k.startswith("lockstep.") and v}
    return counts, [(f.code.name, f.t) for f in run.findings if f.code.name in (MISSING, EXTRA)]


#: A whole life: line, message, request, EOI, broadcast, Remote IRR falls. Before the first, Remote IRR is not known.
BOOT: list[Event] = [
    RTE, reset(1), pin_line(2, 1), remote_irr(2, 1), message(2), accept(3, 0x71, flags=5),
    pin_line(4, 0), eoi(5), broadcast(5), remote_irr(5, 0),
]  # fmt: skip
SENT: list[Event] = [pin_line(10, 1), remote_irr(11, 1), message(12), accept(13, 0x71, flags=5)]
ENDED: list[Event] = [pin_line(20, 0), eoi(30), broadcast(31), remote_irr(32, 0)]


def counted(counts: Mapping[str, int], name: str) -> tuple[int, ...]:
    return tuple(counts.get(f"{name}.{what}", 0) for what in ("predicted", "observed", "mismatch", "open"))


def test_lockstep_of_a_level_interrupt() -> None:
    counts, wrong = lockstep([*BOOT, *SENT, *ENDED, pin_line(40, 1), remote_irr(41, 1), message(42)])
    assert wrong == []
    assert counted(counts, "ioapic_message") == (2, 3, 0, 1)
    assert counted(counts, "ioapic_remote_irr_set") == (2, 3, 0, 1)
    assert counted(counts, "ioapic_remote_irr_clear") == (2, 2, 0, 0)
    assert counted(counts, "ioapic_eoi_broadcast") == (2, 2, 0, 0)
    held = [*BOOT, *SENT, eoi(30), broadcast(31), remote_irr(32, 0), remote_irr(33, 1), message(34)]
    assert lockstep(held)[1] == []  # the line is still up: sent again


@pytest.mark.parametrize(
    ("events", "wrong"),
    [
        ([pin_line(10, 1), remote_irr(11, 1), pin_line(20, 0)], [(MISSING, 20)]),
        ([pin_line(10, 1), message(12), pin_line(20, 0)], [(MISSING, 20)]),
        ([*SENT, message(15)], [(EXTRA, 15)]),
        ([pin_line(10, 1), remote_irr(11, 1), message(12, vector=0x72)], [(EXTRA, 12)]),
        ([pin_line(10, 1), remote_irr(11, 1), message(12, dest=2)], [(EXTRA, 12)]),
        ([pin_line(10, 1), remote_irr(11, 1), message(12, mode=0)], [(EXTRA, 12)]),
        ([*SENT, pin_line(20, 0), eoi(30), pin_line(40, 0)], [(MISSING, 40)]),
        ([*SENT, pin_line(20, 0), eoi(30), broadcast(31), pin_line(40, 0)], [(MISSING, 40)]),
        ([*SENT, pin_line(20, 0), eoi(30), broadcast(31, 0x72)], [(EXTRA, 31)]),
        ([*SENT, broadcast(31)], [(EXTRA, 31)]),
        ([accept(10, 0x51, flags=0), eoi(30), broadcast(31, 0x51)], [(EXTRA, 31)]),
        ([pin_line(10, 0), remote_irr(11, 1)], [(EXTRA, 11)]),
        ([remote_irr(11, 0)], [(EXTRA, 11)]),
    ],
)
def test_lockstep_mismatches(events: list[Event], wrong: list[tuple[str, int]]) -> None:
    assert lockstep([*BOOT, *events])[1] == wrong


def test_lockstep_of_what_a_line_restates() -> None:
    counts, wrong = lockstep([*BOOT, *SENT, pin_line(14, 0), pin_line(15, 1), remote_irr(16, 1)])
    assert (wrong, counted(counts, "ioapic_message")) == ([], (1, 2, 0, 1))


def test_lockstep_of_merged_requests() -> None:
    """flags 2: IRR had it already, 4: it had not."""
    counts, wrong = lockstep([*BOOT, accept(10, 0x51, flags=4), accept(11, 0x51, flags=2)])
    assert (wrong, counted(counts, "lapic_irr_merged")) == ([], (1, 1, 0, 0))
    counts, wrong = lockstep([*BOOT, accept(11, 0x51, flags=2)])
    assert (wrong, counted(counts, "lapic_irr_merged")) == ([(EXTRA, 11)], (1, 1, 1, 0))
    assert lockstep([RTE, accept(11, 0x51, flags=2)])[1] == []  # not known what IRR had


def test_lockstep_of_an_eoi_that_can_be_of_several() -> None:
    both = [*BOOT, *SENT, accept(14, 0x51, flags=4), pin_line(20, 0)]
    for tail in ([eoi(30), pin_line(31, 0)], [eoi(30), broadcast(31), remote_irr(32, 0), pin_line(33, 0)]):
        assert lockstep([*both, *tail])[1] == []
    twice = [eoi(30), broadcast(31), remote_irr(32, 0), eoi(40), broadcast(41)]
    assert lockstep([*both, *twice])[1] == [(EXTRA, 41)]
    edge_first = [eoi(30), pin_line(31, 0), eoi(40), pin_line(50, 0)]
    assert lockstep([*both, *edge_first])[1] == [(MISSING, 50)]
    again = [*BOOT, accept(10, 0x51, flags=4), accept(12, 0x51, flags=4), eoi(20), eoi(30)]
    later = [pin_line(40, 1), remote_irr(41, 1), message(42), accept(43, 0x71, flags=5), pin_line(44, 0), eoi(50)]
    assert lockstep([*again, *later, pin_line(60, 0)])[1] == [(MISSING, 60)]
    assert lockstep([*again[:-1], *later, pin_line(60, 0)])[1] == []  # one edge is still in service


def test_lockstep_of_tmr() -> None:
    read = [*BOOT, *SENT, snap(15, 2, 3, 1 << 17)]
    counts, wrong = lockstep(read)
    assert (wrong, counted(counts, "lapic_tmr")) == ([], (1, 1, 0, 0))
    assert lockstep([*read, accept(16, 0x71), snap(17, 2, 3, 0)])[1] == []  # edge now
    assert lockstep([*BOOT, *SENT, snap(15, 2, 3, 0), snap(16, 2, 3, 0)])[1] == [(EXTRA, 15)]  # learnt once
    assert lockstep([*BOOT, *SENT, snap(15, 2, 2, 0), snap(16, 2, 2, 1)])[1] == [(EXTRA, 16)]
    assert lockstep([RTE, accept(10, 0x71, flags=1), snap(15, 2, 3, 1 << 17 | 1)])[1] == []  # vector 0x60: not seen
    assert lockstep([RTE, accept(10, 0x71, flags=1), snap(15, 2, 3, 1)])[1] == [(EXTRA, 15)]


def test_lockstep_after_a_gap_and_of_entries_never_seen() -> None:
    gap: Event = (15, "trace.lost", {"val": 14})
    assert lockstep([*BOOT, *SENT, gap, *ENDED])[1] == []
    assert lockstep([pin_line(5, 0), pin_line(10, 1), remote_irr(11, 1), message(12), pin_line(20, 0)])[1] == []
    half: Event = (0, "ioapic.rte", {"obj": 20, "val": 0x71, "val2": LEVEL_RTE, "flags": 1})
    unseen = [half, reset(1), pin_line(2, 0), pin_line(10, 1), remote_irr(11, 1)]
    assert lockstep([*unseen, message(12, dest=7)])[1] == []
    assert lockstep([*unseen, message(12, vector=0x72)])[1] == [(EXTRA, 12)]


def test_lockstep_leaves_a_guests_own_apic_alone() -> None:
    guest: list[Event] = [(10, "ioapic.line", {"dom": 1, "obj": 20, "val": 1}), pin_line(20, 0)]
    assert lockstep([*BOOT, *guest]) == lockstep(BOOT)


def test_what_is_no_vector_is_no_request() -> None:
    """Damaged recordings."""
    times = ((100, 256), (200, (1 << 32) - 1))
    odd: list[Event] = [(t, kind, {**CPU, "obj": vector}) for t, vector in times for kind in VECTOR_KINDS]
    none: list[Event] = [(300, kind, CPU) for kind in VECTOR_KINDS]
    words = [snap(400, 0, 4, 1), snap(401, 0, -1, 1), snap(402, 1, 1 << 20, 1)]
    run = replay([*serve(0, 0x31), *odd, *none, *words, *serve(500, 0x31)])
    assert (codes(run), run.metrics["deliveries"], run.metrics["in_service_at_end"]) == ([], 2, 0)


def test_every_code_is_named_in_a_test() -> None:
    text = open(__file__, encoding="utf-8").read()  # noqa: PTH123, SIM115
    assert [code.name for code in CODES if f'"{code.name}"' not in text] == []
