"""Local APIC: edges of the priority rules, the lowest vectors, and what a gap in the recording takes away."""

from __future__ import annotations

import pytest

from replay.hardware.lapic import LocalApic
from replay.knowledge import UNKNOWN
from tests.conformance.test_apic_rules import (
    INVERSION,
    MS,
    NOT_HIGHEST,
    OVERDUE,
    STUCK,
    UNMATCHED,
    VCPU,
    WITHOUT_IRR,
    accept,
    codes,
    deliver,
    eoi,
    exits,
    found,
    lost,
    replay,
    reset,
    runs,
    snap,
    take,
    tpr,
)


def test_a_local_apic_of_which_nothing_is_known() -> None:
    lapic = LocalApic(known=False)
    assert (lapic.irr, lapic.irr_known, lapic.isr, lapic.isr_unknown_below, lapic.tmr, lapic.tpr) == (
        0, 0, [], 16, 0, UNKNOWN,
    )  # fmt: skip
    lapic.accept(0x31, True)
    lapic.forget()
    assert (lapic.irr, lapic.irr_known) == (0, 0)
    lapic.settle()
    assert lapic.isr_unknown_below == 0


def test_processor_priority_is_that_of_the_highest_in_service() -> None:
    lapic = LocalApic(known=True)
    lapic.deliver(0x31)
    lapic.deliver(0x51)
    assert lapic.ppr_class() == 5
    lapic.tpr = 1  # class 0
    assert lapic.ppr_class() == 5
    lapic.eoi()
    lapic.eoi()
    assert lapic.ppr_class() == 0
    lapic.tpr = UNKNOWN
    assert lapic.ppr_class() == 0


@pytest.mark.parametrize("priority", [1, 2, 3, 8, 15])
def test_tpr_holds_its_class_and_those_below(priority: int) -> None:
    lapic = LocalApic(known=True)
    for lower in (0, 15):
        lapic.tpr = priority << 4 | lower
        assert [lapic.held_by_tpr(c << 4 | 8) for c in range(1, 16)] == [c <= priority for c in range(1, 16)]
    # Of class 0 it holds back nothing that can be delivered (SDM, task priority).
    lapic.tpr = 0x0F
    assert not any(lapic.held_by_tpr(vector) for vector in range(256))


def test_vector_0_is_in_service_like_another() -> None:
    """It is reserved, so nobody asks for it rightly; a damaged recording may show it all the same."""
    assert codes(replay([deliver(10, 0), eoi(20)], hidden=["lapic.accept"])) == []
    assert codes(replay([deliver(10, 0), eoi(20), eoi(30)], hidden=["lapic.accept"])) == [UNMATCHED]
    assert codes(replay([deliver(10, 0), deliver(20, 5)], hidden=["lapic.accept"], end=30)) == [INVERSION]
    run = replay([deliver(10, 0), eoi(15), exits(16, 0), deliver(20, 0x31)], end=30)
    assert found(run, WITHOUT_IRR) == [(10, 0, -(1 << 63)), (20, 0x31, -(1 << 63))]
    assert [e.label for e in run.findings[-1].evidence] == ["deliver 0x0", "EOI", "deliver 0x31"]


def test_a_reset_ends_what_was_requested_and_what_was_late() -> None:
    """Registers that are read later tell of other requests and services."""
    asked = [snap(25, 0, 1, 1 << 0x11), accept(26, 0x31), deliver(30, 0x31)]
    assert codes(replay([accept(10, 0x51), reset(20), *asked], end=40)) == []
    served = [*take(10, 0x31), exits(100, 0x31)]
    assert codes(replay([*served, reset(200), snap(300, 1, 0, 1 << 0x31)])) == []


def test_after_a_gap_it_is_not_known_since_when_a_vector_is_requested() -> None:
    asked = [snap(25, 0, 1, 1 << 0x11), accept(26, 0x31), deliver(30, 0x31)]
    assert codes(replay([accept(10, 0x51), *asked], end=40)) == [NOT_HIGHEST]
    assert codes(replay([accept(10, 0x51), lost(20), *asked], end=40)) == []


def test_after_a_gap_it_is_not_known_since_when_a_handler_has_returned() -> None:
    served = [*take(10, 0x31), exits(100, 0x31)]
    inside = snap(300, 1, 0, 1 << 0x31)  # of vectors 0 to 63
    assert codes(replay([*served, inside])) == [OVERDUE]
    assert codes(replay([*served, lost(200), inside])) == []


def test_after_a_gap_it_is_not_known_whether_a_vcpu_runs() -> None:
    asked = [tpr(60, 0, VCPU), accept(100, 0x31, VCPU)]
    assert found(replay([runs(0), *asked]), STUCK) == [(100 + MS, 0x31, MS)]
    assert codes(replay([runs(0), lost(50), *asked])) == []
    assert found(replay([runs(0), lost(50), runs(55), *asked]), STUCK) == [(100 + MS, 0x31, MS)]
