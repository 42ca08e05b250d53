"""Local APICs and IOAPIC in lockstep with an emulator's log: which vector an EOI may have dismissed, and what it shows.

Such a log has requests (flags: 1 level, 2 IRR had it already, 4 it had not) and EOIs, but not when a vector goes into
service. So every test says what is certain, and what is open.
"""

from __future__ import annotations

import pytest

from tests.conformance.test_apic_rules import (
    BOOT,
    ENDED,
    EXTRA,
    LEVEL_RTE,
    MISSING,
    RTE,
    SENT,
    Event,
    accept,
    broadcast,
    counted,
    eoi,
    lockstep,
    message,
    pin_line,
    remote_irr,
    reset,
    snap,
)

#: What a request does to IRR, and its trigger mode.
EDGE, LEVEL = 4, 5
UNTOLD_LEVEL = 1


def mismatches(*events: Event) -> list[tuple[str, int]]:
    return lockstep(events)[1]


def test_an_eoi_is_of_the_vector_in_service_or_of_a_higher_class() -> None:
    """L3: asked again while its IRR bit is clear, 0x51 is in service: nothing of its class or below can nest on it."""
    again = [*BOOT, accept(10, 0x51, flags=EDGE), accept(11, 0x51, flags=EDGE)]
    for below in (0x31, 0x4F, 0x50, 0x55, 0x5F):
        asked = [*again, accept(12, below, flags=LEVEL)]
        assert mismatches(*asked, eoi(20), pin_line(30, 0)) == []
        assert mismatches(*asked, eoi(20), broadcast(21, below)) == [(EXTRA, 21)]
    for above in (0x60, 0x61, 0xF1):
        asked = [*again, accept(12, above, flags=LEVEL)]
        assert mismatches(*asked, eoi(20), pin_line(30, 0)) == []
        assert mismatches(*asked, eoi(20), broadcast(21, above)) == []


def test_a_vector_asked_for_twice_is_dismissed_twice() -> None:
    again = [*BOOT, accept(10, 0x51, flags=EDGE), accept(11, 0x51, flags=EDGE), accept(12, 0x31, flags=LEVEL)]
    two = [*again, eoi(20), eoi(30)]
    assert mismatches(*two, eoi(40), pin_line(50, 0)) == [(MISSING, 50)]
    assert mismatches(*two, eoi(40), broadcast(41, 0x31), pin_line(50, 0)) == []
    # After the first EOI it is not known which of the two is in service.
    assert mismatches(*again, eoi(20), eoi(30), pin_line(50, 0)) == []
    assert mismatches(*again, eoi(20), eoi(30), broadcast(31, 0x31), pin_line(50, 0)) == []


def test_a_vector_of_a_higher_class_ends_inside_the_one_in_service() -> None:
    """Its EOI leaves 0x51 in service, so the next is of it, and not of what waits below."""
    again = [*BOOT, accept(10, 0x51, flags=EDGE), accept(11, 0x51, flags=EDGE), accept(12, 0x31, flags=LEVEL)]
    nested = [*again, accept(13, 0x71, flags=LEVEL), eoi(20), broadcast(21, 0x71)]
    assert mismatches(*nested, eoi(30), broadcast(31, 0x31)) == [(EXTRA, 31)]


def test_an_eoi_of_one_of_two_edges_leaves_it_open_which() -> None:
    two = [*BOOT, accept(10, 0x51, flags=EDGE), accept(11, 0x52, flags=EDGE), eoi(12), pin_line(13, 0)]
    # 0x51 was in service. With interrupts off three wait: the highest of them is level triggered.
    waiting = [accept(14, 0x51, flags=EDGE), accept(15, 0x57, flags=LEVEL)]
    assert mismatches(*two, *waiting, eoi(16), broadcast(17, 0x57)) == []
    assert mismatches(*two, *waiting, eoi(16), pin_line(17, 0)) == []
    # When all are dismissed it is known again what comes.
    alone = [eoi(14), accept(15, 0x31, flags=LEVEL)]
    assert mismatches(*two, *alone, eoi(16), pin_line(17, 0)) == [(MISSING, 17)]


def test_a_request_that_may_have_merged_leaves_open_how_many_eois_come() -> None:
    """The log does not say what IRR had (neither 2 nor 4)."""
    asked = [*BOOT, accept(10, 0x71, flags=UNTOLD_LEVEL), accept(11, 0x71, flags=UNTOLD_LEVEL)]
    assert mismatches(*asked, eoi(20), pin_line(30, 0), eoi(40), pin_line(50, 0)) == []
    assert mismatches(*asked, eoi(20), broadcast(21), eoi(40), broadcast(41)) == []
    once = [*BOOT, accept(10, 0x71, flags=UNTOLD_LEVEL), accept(11, 0x51)]
    assert mismatches(*once, eoi(20), pin_line(30, 0), eoi(40), pin_line(50, 0)) == [(MISSING, 50)]


def test_requests_that_merged_before_the_log_showed_them_are_requests() -> None:
    asked = [RTE, accept(10, 0x51, flags=2), accept(11, 0x71, flags=3), eoi(20), broadcast(21)]
    # 0x51 is left: with another one it is open whose EOI the next is.
    more = [accept(22, 0x61, flags=LEVEL)]
    assert mismatches(*asked, *more, eoi(30), pin_line(40, 0)) == []
    assert mismatches(*asked, *more, eoi(30), pin_line(40, 0), eoi(50), pin_line(60, 0)) == [(MISSING, 60)]


@pytest.mark.parametrize("vector", [0, 0x51, 0xFF])
def test_an_eoi_of_a_level_triggered_vector_is_broadcast(vector: int) -> None:
    asked = [*BOOT, accept(10, vector, flags=LEVEL), eoi(20)]
    assert mismatches(*asked, broadcast(21, vector), pin_line(30, 0)) == []
    assert mismatches(*asked, pin_line(30, 0)) == [(MISSING, 30)]


@pytest.mark.parametrize("vector", [0, 0x51])
@pytest.mark.parametrize("before", [[RTE, reset(1)], BOOT], ids=["reset", "dismissed"])
def test_a_lapic_that_is_empty_remembers_nothing(before: list[Event], vector: int) -> None:
    both = [*before, accept(30, vector, flags=EDGE), accept(31, 0x71, flags=LEVEL)]
    assert mismatches(*both, eoi(40), pin_line(41, 0), eoi(50), pin_line(60, 0)) == [(MISSING, 60)]


def test_a_lapic_that_was_told_of_too_many_eois_begins_anew() -> None:
    """Two broadcasts of what nobody asked for: as many EOIs as requests, so nothing is left."""
    again = [*BOOT, accept(10, 0x51, flags=EDGE), accept(11, 0x51, flags=EDGE)]
    wrong = [eoi(20), broadcast(21, 0x99), eoi(22), broadcast(23, 0x98)]
    told = [(EXTRA, 21), (EXTRA, 23)]
    both = [accept(30, 0x51, flags=EDGE), accept(31, 0x71, flags=LEVEL)]
    after = [eoi(40), pin_line(41, 0), eoi(50), pin_line(60, 0)]
    assert mismatches(*again, *wrong, *both, *after) == [*told, (MISSING, 60)]
    low = [accept(30, 0x31, flags=LEVEL), eoi(40), pin_line(41, 0)]
    assert mismatches(*again, *wrong, *low) == [*told, (MISSING, 41)]


def test_init_settles_what_was_expected() -> None:
    assert mismatches(*BOOT, *SENT, pin_line(20, 0), eoi(30), reset(40)) == [(MISSING, 40)]
    assert mismatches(*BOOT, *SENT, reset(30), eoi(40), pin_line(50, 0)) == []  # nothing is in service after it


def test_words_of_tmr_are_32_vectors() -> None:
    """A word shows its own vectors only, and what is learnt from it is put back in its place."""
    level = [*BOOT, accept(10, 0x80, flags=LEVEL), accept(11, 0xE0, flags=LEVEL)]
    assert mismatches(*level, snap(15, 2, 0, 0), snap(16, 2, 3, 1 << 17), snap(17, 2, 4, 1), snap(18, 2, 7, 1)) == []
    assert mismatches(*level, snap(15, 2, 7, 0), snap(16, 2, 7, 0)) == [(EXTRA, 15)]
    assert mismatches(*level, snap(15, 2, 7, 0x21), snap(16, 2, 7, 0x21)) == [(EXTRA, 15)]
    assert mismatches(*level, snap(15, 2, 0, 1), snap(16, 2, 0, 1)) == [(EXTRA, 15)]
    # Words of 64 bits with something in the upper half are damaged: no other vector is touched by them.
    assert mismatches(*level, snap(15, 2, 3, 1 << 32), snap(16, 2, 4, 1)) == [(EXTRA, 15)]


def test_a_message_says_its_delivery_mode() -> None:
    lowest: Event = (0, "ioapic.rte", {"obj": 20, "val": 0x71, "val2": LEVEL_RTE | 1 << 8})
    sent = [lowest, *BOOT[1:], pin_line(10, 1), remote_irr(11, 1)]
    before = [e if e[1] != "ioapic.message" else message(2, mode=1 << 15 | 1 << 8) for e in sent]
    assert mismatches(*before, message(12, mode=1 << 15 | 1 << 8)) == []
    for mode in (1 << 15, 1 << 15 | 1 << 9, 1 << 8):
        assert mismatches(*before, message(12, mode=mode)) == [(EXTRA, 12)]


@pytest.mark.parametrize("dom", [0, 1])
def test_a_guests_own_apic_is_none_of_the_machines(dom: int) -> None:
    guest: list[Event] = [
        (10, "ioapic.line", {"dom": dom, "obj": 20, "val": 1}),
        (11, "lapic.accept", {"dom": dom, "vcpu": 1, "cpu": 1, "obj": 0x71, "flags": LEVEL}),
        pin_line(20, 0),
    ]
    assert lockstep([*BOOT, *guest]) == lockstep(BOOT)


def test_damaged_records_name_no_vector_and_no_word() -> None:
    odd: list[Event] = [
        event
        for vector in (256, (1 << 32) - 1)
        for event in (accept(14, vector, flags=LEVEL), broadcast(15, vector))
    ]
    words = [snap(16, 2, word, 1) for word in (-1, 8, 1 << 20)]
    assert lockstep([*BOOT, *SENT, *odd, *words, *ENDED]) == lockstep([*BOOT, *SENT, *ENDED])
    missing: list[Event] = [(14, "lapic.accept", {"cpu": 1, "flags": LEVEL}), (15, "ioapic.eoi", {})]
    assert lockstep([*BOOT, *SENT, *missing, *ENDED]) == lockstep([*BOOT, *SENT, *ENDED])


def test_a_set_that_is_restated_is_counted_as_nothing() -> None:
    """The emulator writes "set" again when a pin is looked at while Remote IRR is set; no message follows."""
    calm, _ = lockstep([*BOOT, *SENT, *ENDED])
    again, wrong = lockstep([*BOOT, *SENT, remote_irr(15, 1), remote_irr(16, 1), *ENDED])
    assert wrong == []
    for name in ("ioapic_remote_irr_set", "ioapic_message"):
        assert counted(again, name) == counted(calm, name)
