"""Injections, handlers, upcalls and EOIs of the callback, one to one; which repeats are harmless (spec S2.4)."""

from __future__ import annotations

from typing import Any

from replay.systems.hvm_callback.matching import Matching

STORM = 3


def counts(steps: str) -> dict[str, Any]:
    """One vCPU. I inject, R inject right at an EOI, J inject of the handler seen before, B begin, C clear, W return
    with work, N return without, E EOI, L records lost."""
    m = Matching(STORM)
    calls = {
        "I": lambda: m.injected(0, False, False), "R": lambda: m.injected(0, True, False),
        "J": lambda: m.injected(0, False, True), "B": lambda: m.begun(0), "C": lambda: m.cleared(0),
        "W": lambda: m.ended(0, True), "N": lambda: m.ended(0, False), "E": lambda: m.eoi(0), "L": m.forget,
    }  # fmt: skip
    for step in steps.replace(" ", ""):
        calls[step]()
    return {name: n for name, n in m.finish().items() if n}


ALL3 = {"matched_handler": 3, "matched_upcall": 3, "matched_eoi": 3, "matched_all": 3}


def test_each_finds_its_own() -> None:
    assert counts("IBCWE IBCWE IBCWE") == ALL3


def test_a_guest_clock_that_runs_ahead() -> None:
    assert counts("BJCWE BCJWE IBCWE") == ALL3


def test_what_only_one_recording_covers_is_not_missing() -> None:
    """The guest's starts later, and goes on when the hypervisor's has ended."""
    assert counts("IE IE IBCWE IBCWE IBCWE BCW BCW") == {**ALL3, "matched_eoi": 5}


def test_what_is_missing_between_two_matches() -> None:
    assert counts("IBCWE IE IBCWE IBCWE") == {**ALL3, "matched_eoi": 4, "unmatched_injections": 1}
    assert counts("IBCWE BCW IBCWE IBCWE") == {**ALL3, "unmatched_handlers": 1}
    assert counts("IBCWE IE L IBCWE IBCWE") == {
        "matched_handler": 3, "matched_upcall": 3, "matched_eoi": 3, "matched_all": 3,
    }  # fmt: skip


def test_repeats_that_find_work_are_harmless() -> None:
    assert counts("IBCWE RBCWE IBCWE") == {**ALL3, "repeated_injections": 1, "repeated_with_work": 1}


def test_one_in_vain_is_harmless_and_a_row_of_them_is_a_storm() -> None:
    one = counts("IBCWE RBCNE IBCWE")
    assert one == {**ALL3, "repeated_injections": 1, "repeated_in_vain": 1, "in_vain_harmless": 1}
    row = counts("IBCWE" + "RBCNE" * STORM + "IBCWE")
    assert (row["repeated_in_vain"], row["in_vain_in_storms"]) == (STORM, STORM)
    assert "in_vain_harmless" not in row
