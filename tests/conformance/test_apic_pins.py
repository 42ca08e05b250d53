"""IOAPIC pins, rules IO1 to IO5: what a pin remembers from one step to the next, and what a gap takes away."""

from __future__ import annotations

from typing import Any

import pytest

from replay.events import NONE
from replay.hardware.ioapic import LOWEST_PRIORITY, MAYBE, NOTHING, SEND, Pin, rte_word
from replay.knowledge import UNKNOWN
from tests.conformance.test_ioapic_rules import MS, PIN, VEC, Event, ev, known_pin, replay, rte, said, served

STUCK, CHANGED, STORM = "ioapic-remote-irr-stuck", "ioapic-rte-change-inflight", "ioapic-level-storm"
#: A recorder that shows EOIs at the IOAPIC.
EXPLICIT = frozenset({"ioapic.line", "ioapic.rte", "ioapic.eoi", "lapic.deliver", "lapic.eoi", "lapic.exit"})


def line(t: int, level: int) -> Event:
    return ev(t, "ioapic.line", obj=PIN, val=level)


def entry(t: int, vector: int, **changes: int) -> Event:
    return ev(t, "ioapic.rte", obj=PIN, val=vector, val2=rte_word(vector, dest=1, **changes))


def check(t: int) -> Event:
    return ev(t, "ioapic.check")


def lost(t: int) -> Event:
    return ev(t, "trace.lost", cpu=0, val=t - 1)


def found(events: list[Event], code: str, **how: Any) -> list[int]:
    return [t for name, _, t in said(replay(events, **how)) if name == code]


def state(pin: Pin) -> tuple[Any, ...]:
    return (
        pin.vector, pin.masked, pin.level, pin.logical, pin.dest, pin.remote_irr, pin.line, pin.sent, pin.rewritten,
    )  # fmt: skip


# -- the registers -------------------------------------------------------------------------------------------------


def test_an_entry_as_a_signed_word() -> None:
    assert rte_word(0x59, dest=0x83, level=1) == 0x8300_0000_0000_8059 - 2**64
    assert rte_word(0x59, dest=0x7F, level=0) == 0x7F00_0000_0000_0059
    assert LOWEST_PRIORITY == 1  # 82093AA, delivery mode 001


def test_a_pin_after_reset_and_after_a_gap() -> None:
    assert state(Pin(PIN, known=True)) == (NONE, 1, 0, 0, NONE, 0, 0, NONE, False)
    assert Pin(PIN, known=True).delivery == 0  # fixed
    unknown = (NONE, UNKNOWN, UNKNOWN, UNKNOWN, NONE, UNKNOWN, UNKNOWN, NONE, False)
    assert state(Pin(PIN, known=False)) == unknown
    pin = known_pin(dest=1, logical=1)
    pin.raise_line()
    pin.set_vector(VEC + 16)
    assert state(pin) == (VEC + 16, 0, 1, 1, 1, 1, 1, VEC, True)
    pin.forget()
    assert state(pin) == unknown


def test_an_entry_that_is_rewritten_in_flight_is_remembered_until_its_eoi() -> None:
    pin = known_pin()
    pin.raise_line()
    assert not pin.rewritten
    pin.write(rte_word(VEC, masked=1))
    assert not pin.rewritten  # the EOI will match
    pin.write(rte_word(VEC + 1))
    pin.write(rte_word(VEC + 1, masked=1))
    assert (pin.rewritten, pin.sent) == (True, VEC)
    pin.lower_line()
    assert pin.end_of_interrupt() == NOTHING
    assert (pin.remote_irr, pin.sent, pin.rewritten) == (0, NONE, False)


def test_an_entry_written_as_edge_stands_for_no_message() -> None:
    pin = known_pin()
    pin.raise_line()
    pin.write(rte_word(VEC, level=0))
    assert (pin.remote_irr, pin.sent) == (0, NONE)
    pin.write(rte_word(VEC))
    assert pin.assess() == SEND
    assert (pin.sent, pin.rewritten) == (VEC, False)  # another message: it is awaited as it was sent


def test_what_a_pin_stands_for_is_unknown_while_remote_irr_is() -> None:
    pin = known_pin()
    pin.raise_line()
    pin.remote_irr = UNKNOWN  # a gap, or what a recorder says
    assert pin.assess() == MAYBE
    assert (pin.remote_irr, pin.sent) == (1, NONE)
    pin = known_pin()
    pin.raise_line()
    pin.level = UNKNOWN
    assert pin.end_of_interrupt() == MAYBE
    assert (pin.remote_irr, pin.sent) == (UNKNOWN, NONE)


# -- entries at the start --------------------------------------------------------------------------------------------


def test_entries_at_the_start_are_edge_and_unmasked_unless_they_say_otherwise() -> None:
    bare = {"rte": [{"pin": PIN, "vector": VEC}]}
    pulses = [line(t, level) for t in (10, 20, 30) for level in (1, 0)]
    assert replay(pulses, init=bare).metrics["ioapic_sends"] == 3
    assert replay(pulses, init=rte()).metrics["ioapic_sends"] == 1  # level: Remote IRR holds the others back


def test_entries_at_the_start_may_have_their_line_up() -> None:
    unmasked = entry(10, VEC)
    assert replay([unmasked], init=rte(mask=1, line=1)).metrics["ioapic_sends"] == 1
    assert replay([unmasked], init=rte(mask=1, line=0)).metrics["ioapic_sends"] == 0


def test_a_logical_destination_is_no_apic_id() -> None:
    """Which CPU takes the message is not known: it is requested nowhere."""
    events = [line(0, 1), ev(5, "lapic.accept", cpu=1, obj=VEC, flags=1)]
    assert replay(events, init=rte()).metrics["irr_coalesced"] == 1
    assert replay(events, init=rte(logical=1)).metrics["irr_coalesced"] == 0


# -- IO3, IO4: Remote IRR that stands for nothing ----------------------------------------------------------------------


def test_a_rewrite_begins_the_time_out_anew() -> None:
    events = [line(0, 1), entry(5, 0x81), *served(10)]
    assert found(events, STUCK, end=3 * MS) == [20 + MS]
    assert found([*events, entry(500_000, 0x82)], STUCK, end=3 * MS) == [500_000 + MS]


def test_a_check_asks_the_local_apics() -> None:
    """INIT empties the CPU that had the request."""
    events = [line(0, 1), ev(5, "lapic.reset", cpu=1), check(90)]
    run = replay(events, end=100)
    assert said(run) == [(STUCK, "error", 90)]
    assert (run.findings[0].t_first, run.findings[0].val, run.findings[0].cause) == (90, VEC, "")
    assert found([line(0, 1), check(90)], STUCK, end=100) == []  # still requested
    # Somebody else's vector, vector 0 too, is no excuse.
    assert found([*events, ev(6, "lapic.accept", cpu=1, obj=0x31)], STUCK, end=100) == [90]
    # With records lost, or without any local APIC, it may be anywhere.
    assert found([line(0, 1), ev(5, "lapic.reset", cpu=1), ev(6, "lapic.eoi", cpu=2), lost(7), check(90)], STUCK) == []
    assert found([line(0, 1), check(90)], STUCK, observed=frozenset({"ioapic.line", "ioapic.rte"}), end=100) == []


def test_a_check_knows_nothing_of_an_edge_pin_or_of_an_unknown_message() -> None:
    """82093AA: Remote IRR has no meaning for an edge triggered pin."""
    reset = ev(1, "lapic.reset", cpu=1)
    stated = ev(5, "ioapic.remote_irr", obj=PIN, val=1)
    assert found([reset, stated, check(90)], STUCK, init=rte(level=0), end=100) == []
    assert found([reset, stated, check(90)], STUCK, init=rte(), end=100) == [90]
    assert found([reset, check(90)], STUCK, init=rte(remote_irr=1), end=100) == []


def test_what_the_recording_states_of_remote_irr_is_a_message_in_flight() -> None:
    stated = ev(5, "ioapic.remote_irr", obj=PIN, val=1)
    events = [stated, entry(6, 0x81), *served(10)]
    assert said(replay(events, end=3 * MS)) == [(CHANGED, "warn", 6), (STUCK, "error", 20 + MS)]
    assert said(replay([stated, *served(10)], end=3 * MS)) == []
    assert said(replay([stated, entry(6, 0x81)], end=3 * MS)) == [(CHANGED, "warn", 6)]  # not dismissed yet
    assert said(replay([stated, entry(6, 0x81), *served(10), check(30)], end=40)) == [
        (CHANGED, "warn", 6), (STUCK, "error", 30),
    ]  # fmt: skip


def test_what_the_recording_states_of_remote_irr_ends_the_story_of_a_rewrite() -> None:
    rewritten = [line(0, 1), entry(5, 0x81)]
    stated = [ev(6, "ioapic.remote_irr", obj=PIN, val=0), ev(7, "ioapic.remote_irr", obj=PIN, val=1)]
    lone = replay([*rewritten, *served(10)], observed=EXPLICIT, end=3 * MS)
    assert [(f.code.name, f.cause) for f in lone.findings if f.code.name == STUCK] == [
        (STUCK, "The entry was rewritten while the interrupt was in flight."),
    ]  # fmt: skip
    again = replay([*rewritten, *stated, *served(10, 0x81)], observed=EXPLICIT, end=3 * MS)
    assert [(f.code.name, f.cause, f.val) for f in again.findings if f.code.name == STUCK] == [(STUCK, "", 0x81)]


def test_an_eoi_at_the_ioapic_shows_that_the_recorder_shows_them() -> None:
    """From then on an EOI at a local APIC clears nothing by itself."""
    first = ev(1, "ioapic.eoi", obj=VEC)
    assert found([line(2, 1), *served(10)], STUCK, end=3 * MS) == []
    assert found([first, line(2, 1), *served(10)], STUCK, end=3 * MS) == [20 + MS]


def test_a_pin_that_sends_again_may_be_stuck_again() -> None:
    directed = ev(2 * MS, "ioapic.eoi", obj=VEC, tgt=PIN)
    events = [line(0, 1), *served(10), directed, *served(2 * MS + 10)]
    assert found(events, STUCK, observed=EXPLICIT, end=5 * MS) == [20 + MS, 2 * MS + 20 + MS]


def test_an_eoi_of_a_pin_that_is_half_known_leaves_nothing_in_flight() -> None:
    """After a gap a rising line may or may not have sent."""
    known = [lost(1), entry(2, VEC), line(3, 1)]
    assert said(replay([*known, *served(10), check(90)], end=3 * MS)) == []
    low = [line(0, 1), *served(10), line(15, 0), check(90)]
    assert said(replay(low, end=3 * MS)) == []


# -- IO3: storms -----------------------------------------------------------------------------------------------------


def unwanted(start: int, count: int) -> list[Event]:
    return [e for n in range(count) for e in served(start + 20 * n, result=0)]


def test_a_storm_says_how_many_messages_and_handlers() -> None:
    (f,) = replay([line(0, 1), *unwanted(20, 4)]).findings
    assert (f.code.name, f.t, f.val, f.observed) == (STORM, 70, 3, "3 handlers returned none")


def test_a_storm_is_over_when_the_line_falls() -> None:
    run = replay([line(0, 1), *unwanted(20, 5), line(200, 0), line(201, 1), *unwanted(220, 5)])
    storms = [(f.t, f.val, f.observed) for f in run.findings if f.code.name == STORM]
    # When the line rises the last message may be unacknowledged still: here it is, and three more make it a storm.
    assert (storms[0][0], len(storms)) == (70, 2)
    assert {(val, text) for _, val, text in storms} == {(3, "3 handlers returned none")}


def test_a_handler_that_takes_one_begins_the_count_anew() -> None:
    taken = [*served(20, result=0), *served(40, result=1), *unwanted(60, 5)]
    assert found([line(0, 1), *taken], STORM) == [60 + 2 * 20 + 10]


def test_after_a_gap_the_count_begins_anew() -> None:
    begun = [line(0, 1), *unwanted(20, 2)]
    after = [lost(70), entry(71, VEC), line(72, 1), *unwanted(80, 5)]
    run = replay([*begun, *after])
    assert [(f.t, f.val, f.observed) for f in run.findings if f.code.name == STORM] == [
        (80 + 2 * 20 + 10, 3, "3 handlers returned none"),
    ]  # fmt: skip


@pytest.mark.parametrize("count", [0, 2])
def test_a_pin_that_kvm_slows_down_is_a_storm(count: int) -> None:
    slow = [ev(100, "ioapic.storm", obj=PIN), ev(110, "ioapic.storm", obj=PIN)]
    (f,) = replay([line(0, 1), *unwanted(20, count), *slow]).findings
    assert (f.code.name, f.severity, f.t, f.obj, f.val) == (STORM, "warn", 100, PIN, count)
    assert f.expected == "a handler that makes the line fall"
    assert f.observed == (
        f"KVM slows the pin down; {count} messages since the line rose or the recording began"
    )  # fmt: skip
    falls = [line(120, 0), ev(130, "ioapic.storm", obj=PIN)]
    assert found([line(0, 1), *unwanted(20, count), *slow, *falls], STORM) == [100, 130]
    assert found([line(0, 1), *unwanted(20, 4), *slow], STORM) == [70]  # told already
