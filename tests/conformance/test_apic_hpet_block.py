"""HPET block, rules H1 to H4: what one step leaves behind for the next, and what a gap in the recording takes away."""

from __future__ import annotations

import pytest

from replay.events import NIL
from replay.hardware.hpet_block import Comparator, HpetBlock
from replay.knowledge import UNKNOWN
from tests.conformance.test_ioapic_rules import MS, Event, cmp, ev, replay, route, said

GLITCH, TORN, CONFLICT = "hwhpet-enable-glitch", "hwhpet-torn-route", "hwhpet-legacy-conflict"
PIN8 = {"rte": [{"pin": 8, "vector": 0x38, "level": 0, "mask": 0, "dest": 0}]}


def found(code: str, *events: Event, boot: bool = True) -> list[int]:
    """Times at which a code is raised, and nothing else is."""
    run = replay(events, init=PIN8, from_boot=boot)
    assert {f.code.name for f in run.findings} <= {code}
    return [f.t for f in run.findings]


def fire(t: int, number: int = 0) -> Event:
    return ev(t, "hwhpet.fire", obj=number)


def config(t: int, value: int, old: int, number: int = 0) -> Event:
    """Bit 2: interrupt enable; bit 3: periodic."""
    return ev(t, "hwhpet.config", obj=number, val=value, val2=old)


def general(t: int, value: int) -> Event:
    """Bit 0: the counter runs; bit 1: legacy replacement route."""
    return ev(t, "hwhpet.config", val=value)


def lost(t: int) -> Event:
    return ev(t, "trace.lost", cpu=0, val=t - 1)


def data(t: int, value: int) -> Event:
    return ev(t, "hwhpet.route_data", obj=0, val=value)


def address(t: int, value: int) -> Event:
    return ev(t, "hwhpet.route_addr", obj=0, val=value)


# -- the registers -------------------------------------------------------------------------------------------------


def test_a_comparator_after_reset_and_one_of_which_nothing_is_known() -> None:
    one = Comparator(known=True)
    assert (one.armed, one.periodic, one.data, one.address, one.half) == (0, 0, 0, 0, 0)
    one = Comparator(known=False)
    assert (one.armed, one.periodic, one.data, one.address, one.half) == (UNKNOWN, UNKNOWN, NIL, NIL, 0)


def test_a_route_update_is_two_writes_in_any_order() -> None:
    one = Comparator(known=True)
    assert [one.write_address(1), one.write_data(65)] == [False, True]
    assert [one.write_data(66), one.write_address(2)] == [False, True]
    assert [one.write_data(66), one.write_address(3)] == [False, False]  # the vector stays
    assert [one.write_data(67), one.write_address(3)] == [False, False]  # the destination stays
    assert [one.write_data(68), one.write_data(68), one.write_address(4)] == [False, False, True]
    assert [one.write_data(68), one.write_data(68), one.write_address(5)] == [False, False, False]
    unknown = Comparator(known=False)
    assert [unknown.write_data(66), unknown.write_address(2)] == [False, False]
    assert [unknown.write_data(67), unknown.write_address(3)] == [False, True]


def test_a_block_forgets_its_comparators() -> None:
    block = HpetBlock(known=True)
    block.comparator(0).write_value(100)
    block.write_general(2)
    assert (block.legacy, block.comparator(0).armed) == (1, 1)
    block.forget()
    assert (block.legacy, len(block.comparators), block.comparator(0).armed) == (UNKNOWN, 0, UNKNOWN)


# -- H2 --------------------------------------------------------------------------------------------------------------


def test_a_torn_route_needs_both_registers_to_differ_from_what_they_were_at_reset() -> None:
    assert found(TORN, data(10, 65), fire(15), address(20, 1)) == [15]
    assert found(TORN, address(10, 1), fire(15), data(20, 65)) == [15]
    assert found(TORN, data(10, 0), fire(15), address(20, 1)) == []
    assert found(TORN, address(10, 0), fire(15), data(20, 65)) == []


def test_a_torn_route_is_told_with_its_three_steps() -> None:
    (f,) = replay([*route(0, 65, 1), *route(120, 66, 2), fire(125)]).findings
    assert (f.obj, f.val, f.tgt, f.t_first) == (0, 66, -1, 120)
    assert [(e.t, e.label) for e in f.evidence] == [
        (120, "first route register written"), (125, "comparator fires"), (130, "second route register written"),
    ]  # fmt: skip


def test_a_fire_belongs_to_the_update_in_which_it_happens() -> None:
    first = [*route(0, 65, 1), data(100, 66), fire(110)]
    assert found(TORN, *first, address(120, 2)) == [110]
    assert found(TORN, *first, data(115, 66), address(120, 2)) == [110]  # the same word again
    # The first half is too old to be of the same update; the next one is whole before anything fires.
    late = 100 + 2 * MS
    assert found(TORN, *first, data(late, 67), address(late + 10, 2)) == []
    # After a whole update the next one begins anew.
    assert found(TORN, *first, address(120, 2), data(130, 67), address(140, 3)) == [110]
    assert found(TORN, *first, address(120, 2), data(130, 67), fire(135), address(140, 3)) == [110, 135]


# -- H3 --------------------------------------------------------------------------------------------------------------


def test_a_periodic_comparator_stays_armed() -> None:
    armed = [cmp(10, 1000, 900), config(20, 0xC, 0), fire(50_000), config(60_000, 8, 12), config(70_000, 12, 8)]
    assert found(GLITCH, *armed, fire(70_005)) == []
    once = [cmp(10, 1000, 900), config(20, 4, 0), fire(50_000), config(60_000, 0, 4), config(70_000, 4, 0)]
    assert found(GLITCH, *once, fire(70_005)) == [70_005]


def test_an_enable_makes_one_glitch() -> None:
    assert found(GLITCH, config(100, 4, 0), fire(105), fire(110)) == [105]


@pytest.mark.parametrize("before", [[], [cmp(10, 1000, 900), fire(20)]], ids=["never seen", "seen"])
def test_after_a_gap_a_comparator_may_be_armed(before: list[Event]) -> None:
    assert found(GLITCH, *before, config(100, 4, 0), fire(105)) == [105]
    assert found(GLITCH, *before, lost(50), config(100, 4, 0), fire(105)) == []
    assert found(GLITCH, *before, lost(50), config(60, 0, 0), cmp(70, 2000, 900), fire(80), config(100, 4, 0),
                 fire(105)) == [105]  # fmt: skip


# -- H4 --------------------------------------------------------------------------------------------------------------


def rises(*times: int) -> list[Event]:
    return [ev(t + n, "ioapic.line", obj=8, val=1 - n) for t in times for n in (0, 1)]


ENABLED = config(1, 4, 0, number=1)


def test_the_legacy_route_is_bit_1_of_the_general_configuration() -> None:
    assert found(CONFLICT, general(0, 2), ENABLED, *rises(50)) == [50]
    assert found(CONFLICT, general(0, 3), ENABLED, *rises(50)) == [50]
    assert found(CONFLICT, general(0, 1), ENABLED, *rises(50)) == []
    assert found(CONFLICT, general(0, 0), ENABLED, *rises(50)) == []


def test_a_legacy_conflict_is_told_once_for_each_time_the_route_is_on() -> None:
    run = replay([general(0, 3), ENABLED, *rises(50, 60, 70)], init=PIN8)
    assert [(f.code.name, f.t, f.obj, f.tgt) for f in run.findings] == [(CONFLICT, 50, 1, 8)]
    assert found(CONFLICT, general(0, 3), ENABLED, *rises(50), general(55, 3), *rises(60)) == [50]
    assert found(CONFLICT, general(0, 3), ENABLED, *rises(50), general(55, 1), *rises(60)) == [50]
    assert found(CONFLICT, general(0, 3), ENABLED, *rises(50), general(55, 1), general(56, 3), *rises(60, 70)) == [
        50, 60,
    ]  # fmt: skip


def test_after_a_gap_the_legacy_route_is_not_known() -> None:
    begun = [general(0, 3), ENABLED]
    again = config(56, 4, 0, number=1)
    assert found(CONFLICT, *begun, lost(55), again, *rises(60)) == []
    assert found(CONFLICT, *begun, lost(55), general(56, 3), *rises(60)) == []
    assert found(CONFLICT, *begun, *rises(50), lost(55), general(56, 3), again, *rises(60)) == [50, 60]


def test_comparator_1_that_fires_is_no_conflict() -> None:
    begun = [general(0, 3), ENABLED, cmp(2, 9, 1) | {"obj": 1}]
    assert said(replay([*begun, fire(50, 1), *rises(50 + 2_000)], init=PIN8)) == []
    assert said(replay([*begun, fire(50, 1), *rises(51 + 2_000)], init=PIN8)) == [(CONFLICT, "warn", 2_051)]
    assert said(replay([*begun, fire(50, 0), *rises(60)], init=PIN8)) == [(CONFLICT, "warn", 60)]
