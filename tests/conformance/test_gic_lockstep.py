"""GICv2 in lockstep: what the models learn from a recording that differs, or begins late (spec 0.3, U1-U4)."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from replay.hardware.gic_distributor import GicDistributor
from replay.hardware.gic_list_registers import ACTIVE, PENDING, lr_with_state, lr_word
from tests.conformance.test_gic_rules import (
    ALL,
    GUEST,
    LR,
    RESET,
    Event,
    S,
    ack,
    best,
    cpu_if,
    dirs,
    dist,
    eoi,
    gicd,
    hyp_read,
    line,
    lockstep,
    replay,
)

APR = 0x0F0
LEVEL = dist(1, 0xC00 + 10, 0, 1)  # 40 to 43 are level
#: A second list register: 60, which is 41 outside, above 50.
HIGH = lr_word(60, PENDING, 0x80, physical=41)


def clean(events: Sequence[Event], **counts: tuple[int, int, int, int]) -> None:
    """No mismatch, and these counts (predicted, observed, mismatch, open)."""
    assert lockstep(events) == (counts, [])


# -- list registers ------------------------------------------------------------------------------------------------


def test_a_list_register_that_was_read_differently_tells_the_active_priorities() -> None:
    active = lr_with_state(LR, ACTIVE)
    seen = [hyp_read(20, 0x100, active), hyp_read(21, APR, 1 << 20), best(22, 1023, 0x100, 0xA0, virtual=1)]
    counts, wrong = lockstep([*RESET, *GUEST, *seen])
    assert (counts["gich_read"], counts["virtual_running_priority"]) == ((2, 2, 1, 0), (1, 1, 0, 0))
    assert [t for t, _, _ in wrong] == [20]
    # Another register that was read differently says nothing about them.
    other = [ack(20, 50, virtual=1), hyp_read(21, 0x000, 5), hyp_read(22, APR, 1 << 20)]
    assert [t for t, _, _ in lockstep([*RESET, *GUEST, *other])[1]] == [21]
    low = [cpu_if(20, APR, 1, flags=2), hyp_read(21, 0x000, 5), hyp_read(22, APR, 1)]
    assert [t for t, _, _ in lockstep([*RESET, *GUEST, *low])[1]] == [21]


@pytest.mark.parametrize("physical", [40, 0])
def test_an_end_without_an_acknowledge_takes_the_pending_one_first(physical: int) -> None:
    word = lr_word(50, PENDING, 0xA0, physical=physical)
    given = [*GUEST, cpu_if(17, 0x100, word, flags=2), cpu_if(18, 0x104, HIGH, flags=2)]
    ended = [*RESET, *given, eoi(40, 50, virtual=1), hyp_read(50, 0x100, lr_with_state(word, 0)),
             hyp_read(51, 0x104, HIGH)]  # fmt: skip
    clean(ended, ack=(1, 1, 0, 0), gich_read=(2, 2, 0, 0))
    metrics = replay(ended, end=S, observed=ALL).metrics
    assert metrics["lockstep.gic_deactivated_by_guest"] == 1
    alone = [e for e in ended if e[0] not in (18, 51)]
    clean(alone, ack=(1, 1, 0, 0), gich_read=(1, 1, 0, 0))
    if physical:
        again = [*ended, line(60, 40, 1), ack(70, 40)]
        clean(again, ack=(2, 2, 0, 0), gich_read=(2, 2, 0, 0))


def test_what_was_taken_below_an_active_one_says_that_this_has_ended() -> None:
    """EOImode=0: 60 had been deactivated, and 41 with it, before 50 could be taken."""
    first = [dist(2, 0x104, 1 << 9), dist(3, 0x400 + 41, 0x90, 1), dist(3, 0x800 + 41, 1, 1)]
    forty_one = [line(17, 41, 1), ack(18, 41), eoi(19, 41), line(19, 41, 0)]
    given = [*GUEST, *forty_one, cpu_if(20, 0x104, HIGH, flags=2), ack(21, 60, virtual=1)]
    below = [ack(30, 50, virtual=1), hyp_read(31, 0x104, lr_with_state(HIGH, 0)), hyp_read(32, APR, 1 << 20)]
    counts, wrong = lockstep([*RESET, *first, *given, *below, line(40, 41, 1), ack(41, 41)])
    assert (counts["ack"], counts["virtual_ack"], counts["gich_read"]) == ((3, 3, 0, 0), (2, 2, 1, 0), (2, 2, 0, 0))
    assert wrong == [(30, "gic virtual ack cpu 0x0 0x3ff", "gic virtual ack cpu 0x0 0x32")]
    # EOImode=1: the priority was dropped, and it may still be active.
    split = [cpu_if(19, 0x000, 0x201, flags=1), *below[:1], hyp_read(31, 0x104, lr_with_state(HIGH, ACTIVE))]
    counts, wrong = lockstep([*RESET, *first, *given, *split])
    assert (counts["gich_read"], [t for t, _, _ in wrong]) == ((1, 1, 0, 0), [30])


def test_an_active_one_of_lower_priority_stays_active() -> None:
    low = lr_word(61, PENDING, 0xC0)
    given = [*GUEST[:-1], cpu_if(16, 0x108, low, flags=2), ack(17, 61, virtual=1), cpu_if(18, 0x100, LR, flags=2),
             cpu_if(19, 0x104, HIGH, flags=2), ack(20, 50, virtual=1)]  # fmt: skip
    reads = [hyp_read(21, 0x108, lr_with_state(low, ACTIVE)), hyp_read(22, 0x100, lr_with_state(LR, ACTIVE))]
    counts, wrong = lockstep([*RESET, *given, *reads])
    assert (counts["gich_read"], [t for t, _, _ in wrong]) == ((2, 2, 0, 0), [20])


def test_an_acknowledge_that_no_list_register_explains_leaves_the_best_one_in_doubt() -> None:
    taken = [ack(20, 99, virtual=1), hyp_read(30, 0x100, lr_with_state(LR, ACTIVE))]
    counts, wrong = lockstep([*RESET, *GUEST, *taken])
    assert (counts["gich_read"], [t for t, _, _ in wrong]) == ((0, 1, 0, 1), [20])
    both = [*GUEST, cpu_if(17, 0x104, HIGH, flags=2), ack(20, 99, virtual=1)]
    reads = [hyp_read(30, 0x104, lr_with_state(HIGH, ACTIVE)), hyp_read(31, 0x100, LR)]
    counts, wrong = lockstep([*RESET, *both, *reads])
    assert (counts["gich_read"], [t for t, _, _ in wrong]) == ((1, 2, 0, 1), [20])
    # With nothing pending, there is nothing to doubt.
    none = [ack(20, 50, virtual=1), ack(30, 99, virtual=1), ack(40, 1023, virtual=1)]
    counts, wrong = lockstep([*RESET, *GUEST, *none])
    assert (counts["virtual_ack"], [t for t, _, _ in wrong]) == ((3, 3, 1, 0), [30])


# -- running priorities --------------------------------------------------------------------------------------------


def test_a_running_priority_printed_in_a_read_that_differs_is_the_same_mismatch() -> None:
    """Of the virtual interface of that core; one of the physical interface is judged by itself."""
    two = [*GUEST, cpu_if(17, 0x104, HIGH, flags=2)]
    printed = [best(18, 33, 0x100, 0x60), best(19, 50, 0xA0, 0xA0, virtual=1), ack(20, 50, virtual=1)]
    counts, wrong = lockstep([*RESET, *two, *printed])
    assert (counts["virtual_running_priority"], counts["running_priority"]) == ((0, 1, 0, 1), (1, 1, 1, 0))
    assert [t for t, _, _ in wrong] == [20, 18]
    elsewhere = [best(19, 50, 0xA0, 0xA0, cpu=1, virtual=1), ack(20, 50, virtual=1)]
    counts, wrong = lockstep([*RESET, *two, *elsewhere])
    assert (counts["virtual_running_priority"], [t for t, _, _ in wrong]) == ((1, 1, 1, 0), [20, 19])


def test_a_virtual_running_priority_that_differs_is_taken_over() -> None:
    at_60 = [ack(20, 50, virtual=1), best(30, 1023, 0x100, 0x60, virtual=1), line(31, 41, 1)]
    both = [hyp_read(32, APR, 1 << 20 | 1 << 12), best(33, 1023, 0x100, 0x60, virtual=1)]
    counts, wrong = lockstep([*RESET, *GUEST, *at_60, *both])
    assert (counts["gich_read"], counts["virtual_running_priority"]) == ((1, 1, 0, 0), (2, 2, 1, 0))
    assert [t for t, _, _ in wrong] == [30]
    idle = [ack(20, 50, virtual=1), best(30, 1023, 0x100, 0x100, virtual=1), line(31, 41, 1), hyp_read(32, APR, 0)]
    counts, wrong = lockstep([*RESET, *GUEST, *idle])
    assert (counts["gich_read"], [t for t, _, _ in wrong]) == ((1, 1, 0, 0), [30])


def test_a_physical_running_priority_that_differs_is_taken_over() -> None:
    """40 at 0xa0, above it SGI 3 at 0x60, whose end was not seen."""
    nested = [dist(6, 0x400 + 3, 0x60, 1), line(10, 40, 1), ack(11, 40), dist(12, 0xF00, 1 << 16 | 3), ack(13, 3)]
    dropped = [best(20, 1023, 0x100, 0xA0), line(21, 40, 0), best(22, 1023, 0x100, 0xA0), eoi(30, 40),
               best(31, 1023, 0x100, 0x100)]  # fmt: skip
    counts, wrong = lockstep([*RESET, *nested, *dropped])
    assert (counts["running_priority"], wrong) == (
        (3, 3, 1, 0), [(20, "gic running priority cpu 0x0 0x60", "gic running priority cpu 0x0 0xa0")],
    )  # fmt: skip
    higher = [best(20, 1023, 0x100, 0x40), line(21, 40, 0), best(22, 1023, 0x100, 0x40), eoi(30, 1), eoi(31, 3),
              best(32, 1023, 0x100, 0xA0)]  # fmt: skip
    counts, wrong = lockstep([*RESET, *nested, *higher])
    assert (counts["running_priority"], [t for t, _, _ in wrong]) == ((3, 3, 1, 0), [20])


def test_a_running_priority_that_is_not_recorded_is_not_judged() -> None:
    for virtual in (0, 1):
        bare = (20, "gic.best", {"cpu": 0, "obj": 40, "val": 0xA0, "flags": virtual})
        clean([*RESET, *GUEST, bare, line(21, 41, 1)], ack=(1, 1, 0, 0))
    zero = [best(20, 1023, 0x100, 0, virtual=1), line(21, 41, 1)]
    assert lockstep([*RESET, *GUEST, *zero])[0]["virtual_running_priority"] == (1, 1, 1, 0)


# -- a recording that begins late ----------------------------------------------------------------------------------


def test_what_was_active_before_the_recording_is_learnt_from_the_running_priority() -> None:
    """Something of priority 0x60 is active; 40, at 0x40, preempts it and ends."""
    late = [LEVEL, best(10, 40, 0x40, 0x60), ack(20, 40), best(30, 1023, 0x100, 0x40), eoi(40, 40), line(41, 40, 0),
            best(50, 1023, 0x100, 0x60), ack(60, 1023)]  # fmt: skip
    clean(late, ack=(2, 2, 0, 0), running_priority=(2, 3, 0, 1))
    # Of another core, or of another interrupt: it is judged after the read.
    after = [LEVEL, best(8, 1023, 0x100, 0x100), best(10, 41, 0xA0, 0x100), best(12, 40, 0x40, 0x40), ack(20, 41)]
    assert lockstep(after)[0]["running_priority"] == (2, 3, 1, 1)
    other = [LEVEL, best(8, 1023, 0x100, 0x100, cpu=1), best(9, 1023, 0x100, 0x100), best(10, 41, 0xA0, 0x60, cpu=1),
             ack(20, 41)]  # fmt: skip
    assert [t for t, _, _ in lockstep(other)[1]] == [10]


def test_an_interrupt_that_is_pending_again_is_not_active() -> None:
    late = [LEVEL, best(5, 1023, 0x100, 0x100), ack(20, 40), eoi(30, 40), best(40, 40, 0xA0, 0x100), ack(50, 40)]
    counts, wrong = lockstep(late)
    assert (counts["ack"], wrong) == ((1, 2, 0, 1), [])


def test_eoimode_is_known_once_it_was_written_or_used() -> None:
    """While it is a guess nobody knows whether EOIR has deactivated, and so what comes next."""
    taken = [best(10, 40, 0xA0, 0x100), ack(20, 40), eoi(30, 40)]
    for written, judged in (([], 1), ([cpu_if(5, 4, 0xF0)], 1), ([cpu_if(5, 0, 1)], 2)):
        counts, wrong = lockstep([LEVEL, *written, *taken, ack(40, 40)])
        assert (counts["ack"], wrong) == ((judged, 2, 0, 2 - judged), [])
    used = [*taken, dirs(35, 40), best(36, 40, 0xA0, 0x100), ack(40, 40), eoi(50, 40), dirs(55, 40), ack(60, 40)]
    counts, wrong = lockstep([LEVEL, *used])
    assert (counts["ack"], wrong) == ((3, 3, 0, 0), [])


@pytest.mark.parametrize(
    ("events", "counts"),
    [
        ([best(10, 16, 0xA0, 0x100), ack(20, 16)], (1, 1, 0, 0)),
        ([best(10, 15, 0xA0, 0x100), ack(20, 15)], (0, 1, 0, 1)),
        ([best(10, 1023, 0x100, 0x100), ack(20, 0)], (0, 1, 0, 1)),  # nobody saw who sent the SGI
        ([best(10, 1023, 0x100, 0x100), ack(20, 1023)], (1, 1, 0, 0)),
    ],
)
def test_who_sent_an_sgi_before_is_not_known(events: list[Event], counts: tuple[int, ...]) -> None:
    found, wrong = lockstep(events)
    assert (found["ack"], wrong) == (counts, [])


def test_an_sgi_that_is_named_has_the_priority_that_was_printed() -> None:
    late = [best(10, 0, 0x40, 0x100), ack(20, 0), best(30, 1023, 0x100, 0x40)]
    assert lockstep(late) == ({"ack": (0, 1, 0, 1), "running_priority": (0, 2, 0, 2)}, [])
    nothing = [best(10, 1023, 0x100, 0x100), (11, "gic.best", {"cpu": 0, "val": 0x10, "val2": 0x100}),
               dist(12, 0x100 + 7, 1 << 7, 1), ack(20, 1023)]  # fmt: skip
    assert lockstep(nothing, irqs=64)[0]["ack"] == (1, 1, 0, 0)


def test_the_virtual_interface_is_open_where_the_physical_one_is_known() -> None:
    clean([best(10, 1023, 0x100, 0x100, virtual=1)], virtual_running_priority=(1, 1, 0, 0))


# -- registers that do not exist -----------------------------------------------------------------------------------


def test_an_sgi_has_no_line_and_a_private_interrupt_has() -> None:
    banked = [dist(6, 0x100, 1 << 16), dist(7, 0x400 + 16, 0x40, 1)]
    clean([*RESET, *banked, line(10, 15, 1), line(10, 0, 1), ack(11, 1023)], ack=(1, 1, 0, 0))
    clean([*RESET, *banked, line(10, 16, 1, cpu=0), ack(11, 16)], ack=(1, 1, 0, 0))


def test_numbers_from_1020_on_are_no_interrupts() -> None:
    enabled = [dist(6, 0x17F, 0xFF, 1), dist(7, 0xBFB, 0x0101, 2)]
    clean([*RESET, *enabled, line(10, 1020, 1), ack(11, 1023)], ack=(1, 1, 0, 0))
    assert lockstep([*RESET, *enabled, line(10, 1020, 1), ack(11, 1023)], irqs=2000)[1] == []
    assert lockstep([*RESET, *enabled, line(10, 1019, 1), ack(11, 1019)], irqs=2000)[1] == []


def test_a_write_is_of_four_bytes_at_most() -> None:
    """Whatever a damaged recording says."""
    late = [best(5, 1023, 0x100, 0x100), dist(6, 0xC00 + 8, 0, 1 << 40)]
    for irq, judged in ((47, 1), (48, 0)):
        counts, wrong = lockstep([*late, best(10, irq, 0xA0, 0x100), ack(20, irq)])
        assert (counts["ack"], wrong) == ((judged, 1, 0, 1 - judged), [])


def test_a_write_of_one_byte_is_about_eight_interrupts_and_ends_at_the_register() -> None:
    d = gicd()
    d.write(0x105, 1, 0x1FF, 0)
    assert d.enabled[40:50] == [3] * 8 + [0] * 2
    d.write(0xF2E, 4, 0x01010101, 0)  # SPENDSGIR of 14, 15, and of nothing
    assert (d.latch[14:18], sum(d.sgi_sources)) == ([1, 1, 0, 0], 2)
    d.write(0xF1F, 4, 0x01010101, 0)
    assert d.latch[14:18] == [1, 0, 0, 0]


def test_deactivating_nothing_and_interrupt_0() -> None:
    d = GicDistributor(64, 2)
    d.active[63] = d.active[0] = 3
    d.deactivate(-1, 0)
    d.deactivate(64, 0)
    d.deactivate(0, 1)
    assert (d.active[63], d.active[0]) == (3, 1)
