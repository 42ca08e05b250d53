"""Two-level event channels: what may be concluded when, step by step (S5.3, S5.4, U1 to U5)."""

from __future__ import annotations

from typing import Any

import pytest

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import KINDS, NONE, Batch, events_from_json
from replay.hardware import evtchn_two_level as abi
from replay.hardware.evtchn_two_level import (
    SNAP_ABI,
    SNAP_GUEST_CPU,
    SNAP_MASK,
    SNAP_PENDING,
    SNAP_SEL,
    SNAP_UPCALL_MASK,
    SNAP_UPCALL_PENDING,
)
from replay.sink import Sink
from replay.systems import SYSTEMS
from replay.systems.event_channel.machine import TwoLevelMachine
from replay.systems.event_channel.monitor import DELAY, MASKED
from replay.systems.event_channel.policies import Current
from tests.conformance.test_evtchn_rules import (
    MISMATCH,
    MS,
    NO_WORK,
    NOOP,
    PIGGYBACK,
    SEED,
    STRANDED,
    SYSTEM,
    US,
    WRONG,
    Event,
    bind,
    codes,
    mask,
    replay,
    scan,
    send,
    snap,
    unmask,
)

LATE = "evtchn-delivery-delay"
SELECTOR = "evtchn-selector-without-upcall"
BLOCK = "evtchn-lost-wakeup-block"


def rebind(t: int, port: int, vcpu: int = NONE) -> Event:
    return (t, "evtchn.rebind", {"obj": port, "tgt": vcpu})


def bind_cpu(t: int, port: int, vcpu: int) -> Event:
    return (t, "guest.bind_cpu", {"obj": port, "tgt": vcpu})


def hypercall(t: int, port: int, vcpu: int = 0) -> Event:
    return (t, "evtchn.unmask_hypercall", {"vcpu": vcpu, "obj": port})


def somewhere(t: int, port: int) -> Event:
    return (t, "evtchn.unmask", {"obj": port})


def on(t: int, kind: str, vcpu: int, **fields: int) -> Event:
    return (t, kind, {"vcpu": vcpu, **fields})


def gap(t: int) -> Event:
    return (t, "trace.lost", {"val": t})


def blocks(t: int, vcpu: int = 0) -> Event:
    return on(t, "sched.stop", vcpu, val=2)


def when(run: Run, code: str) -> list[int]:
    return [f.t for f in run.findings if f.code.name == code]


#: Bound elsewhere while the selector bit of the old vCPU is set (E5): stranded from 200 on.
MOVED: list[Event] = [bind(65), send(100, 65), rebind(200, 65, 2)]


def test_numbers_of_the_abi() -> None:
    """Xen's EVTCHNSTAT_*, and what `obj` and `val` of an evtchn.snapshot say."""
    types = ("UNBOUND", "INTERDOMAIN", "PIRQ", "VIRQ", "IPI")
    assert [getattr(abi, f"TYPE_{name}") for name in types] == [1, 2, 3, 4, 5]
    words = ("PENDING", "MASK", "SEL", "UPCALL_PENDING", "UPCALL_MASK", "ABI", "NOTIFY_VCPU", "GUEST_CPU")
    assert [getattr(abi, f"SNAP_{name}") for name in words] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert (abi.ABI_TWO_LEVEL, abi.ABI_FIFO) == (0, 1)


# -- the clock of evtchn-stranded-pending ------------------------------------------------------------------------------


def test_the_clock_begins_anew_with_the_predicate() -> None:
    assert when(replay(MOVED), STRANDED) == [10_200]
    back = [*MOVED, rebind(4_000, 65, 0), rebind(6_000, 65, 2)]
    assert when(replay(back), STRANDED) == [16_000]
    served = [*MOVED, *scan(3_000, 2, 65), send(5_000, 65), rebind(6_000, 65, 0), bind_cpu(7_000, 65, 5)]
    assert [t for t in when(replay(served), STRANDED) if t < 16_000] == []
    masked = [*MOVED, mask(3_000, 2, 65), snap(5_000, SNAP_MASK, 0, index=1)]
    assert when(replay(masked), STRANDED) == [15_000]
    cleared = [*MOVED, on(3_000, "evtchn.clear", 2, obj=65), on(4_000, "evtchn.upcall", 0),
               on(5_000, "evtchn.upcall_end", 0), send(6_000, 65), rebind(6_000, 65, 0)]  # fmt: skip
    assert when(replay(cleared), STRANDED) == [16_000]


def test_time_stranded_counts_when_it_was_short_too() -> None:
    run = replay([*MOVED, *scan(5_000, 2, 65)])
    assert (codes(run), run.metrics["stranded"], run.metrics["stranded_ns"]) == ([], 0, 4_900)
    selected = replay([*MOVED, rebind(300, 66, 2), send(5_000, 66), *scan(6_000, 2, 65, 66)])
    assert selected.metrics["stranded_ns"] == 4_800


def test_every_pending_life_is_told_of() -> None:
    second = [send(50_000, 65), rebind(50_100, 65, 3)]
    for end in (scan(30_000, 2, 65), [on(30_000, "evtchn.clear", 2, obj=65)],
                [(30_000, "evtchn.close", {"obj": 65}), rebind(31_000, 65, 2)]):  # fmt: skip
        assert when(replay([*MOVED, *end, *second]), STRANDED) == [10_200, 60_100]


def test_another_port_of_the_word_ends_it_and_its_scan_begins_it_anew() -> None:
    """66 sets the selector bit of vCPU 2; its scan leaves 65 where it was."""
    events = [*MOVED, rebind(300, 66, 2), send(2_000, 66), *scan(3_000, 2, 66)]
    run = replay(events)
    assert [(f.t, f.t_first) for f in run.findings if f.code.name == STRANDED] == [(14_000, 4_000)]


def test_during_an_upcall_only_the_words_it_took_are_excused() -> None:
    running = [bind(65), bind(5, 2), send(40, 5), on(50, "evtchn.upcall", 2), send(100, 65), rebind(200, 65, 2)]
    assert when(replay(running), STRANDED) == [10_200]


def test_whether_an_upcall_runs_has_to_be_known() -> None:
    seen = [bind_cpu(0, 65, 0), *words(0)]
    assert when(replay(seen, known=False), STRANDED) == []
    ended = [*seen[:3], blocks(0), seen[3]]
    assert when(replay(ended, known=False), STRANDED) == [10_000]


def test_what_became_unknown_begins_anew_when_it_is_known_again() -> None:
    """A send whose vCPU is not known may have set the selector bit, until that is read."""
    events = [*MOVED, rebind(900, 70), send(1_000, 70), snap(20_000, SNAP_SEL, 0, vcpu=2)]
    assert when(replay(events), STRANDED) == [30_000]


def test_masked_again_is_not_stranded() -> None:
    events = [*MOVED, mask(3_000, 2, 65)]
    assert when(replay(events), STRANDED) == []


def test_a_bind_of_a_pending_port_may_strand_it() -> None:
    run = replay([bind(65), send(100, 65), (200, "evtchn.bind", {"obj": 65, "tgt": 2})])
    assert when(run, STRANDED) == [10_200]


def test_a_gap_ends_every_conclusion() -> None:
    assert when(replay([*MOVED, gap(3_000)]), STRANDED) == []
    known_again = [
        rebind(5_000, 65, 2), blocks(5_000, 2), snap(5_000, SNAP_PENDING, 2, index=1),
        snap(5_000, SNAP_MASK, 0, index=1), snap(5_000, SNAP_SEL, 0, vcpu=2),
    ]  # fmt: skip
    assert when(replay([*MOVED, gap(3_000), *known_again]), STRANDED) == [15_000]
    assert replay([*MOVED, gap(3_000), *known_again[:1]]).metrics["stranded_ns"] == 0  # until when is not known
    later = [(t + 45_000, kind, fields) for t, kind, fields in known_again]
    assert when(replay([*MOVED, gap(30_000), *later]), STRANDED) == [10_200, 60_000]  # perhaps another life


def test_a_port_first_named_after_a_gap_is_unknown() -> None:
    events = [gap(5), bind_cpu(10, 70, 0), *scan(100, 0), snap(5_000, SNAP_PENDING, 1 << 6, index=1)]
    assert when(replay(events), STRANDED) == []  # masked, perhaps
    assert when(replay([*events, snap(5_000, SNAP_MASK, 0, index=1)]), STRANDED) == [15_000]


def test_a_selector_bit_is_unknown_after_a_gap_until_it_is_set() -> None:
    known = [rebind(300, 65, 0), on(300, "evtchn.clear", 0, obj=65), unmask(300, 0, 65)]
    run = replay([bind(65), send(100, 65), gap(200), *known, send(400, 65), snap(500, SNAP_SEL, 0)])
    assert (run.metrics["samples_agree.selector"], run.metrics["samples_disagree.selector"]) == (0, 1)


def test_after_a_gap_the_end_of_an_upcall_says_nothing_of_selectors() -> None:
    events = [on(10, "evtchn.upcall", 0), gap(200), snap(300, SNAP_SEL, 0), on(400, "evtchn.upcall_end", 0)]
    run = replay([*events, snap(500, SNAP_SEL, 1)])
    assert run.metrics["samples_disagree.selector"] == 1
    latched = [events[0], bind(65), send(20, 65), *events[1:], snap(500, SNAP_SEL, 2)]
    assert replay(latched).metrics["samples_disagree.selector"] == 1


# -- two snapshots as the proof ----------------------------------------------------------------------------------------

#: Sends are not recorded: a port was found pending that nobody was seen to send to.
HIDDEN: list[Event] = [bind_cpu(0, 65, 0), *scan(0, 0, 9), snap(5_000, SNAP_PENDING, 0),
                       snap(6_000, SNAP_PENDING, 1 << 9)]  # fmt: skip


def words(t: int) -> list[Event]:
    return [snap(t, SNAP_PENDING, 2, index=1), snap(t, SNAP_MASK, 0, index=1), snap(t, SNAP_SEL, 0)]


@pytest.mark.parametrize(
    "between",
    [rebind(30 * US, 65, 0), gap(30 * US), mask(30 * US, 0, 65), unmask(30 * US, 0, 65)],
    ids=["rebind", "gap", "mask", "unmask"],
)
def test_snapshots_with_something_between(between: Event) -> None:
    assert when(replay([*HIDDEN, *words(20 * US), *words(40 * US)], known=False), STRANDED) == [40 * US]
    bound: Event = (31 * US, "evtchn.bind", {"obj": 65, "tgt": 0})
    more = [between, bound, unmask(32 * US, 0, 65), blocks(33 * US)] if between[1] == "trace.lost" else [between]
    run = replay([*HIDDEN, *words(20 * US), *more, *words(40 * US)], known=False)
    assert when(run, STRANDED) == ([40 * US] if between[1] == "evtchn.unmask" else [])
    both = [mask(30 * US, 0, 65), unmask(31 * US, 0, 65)]
    assert when(replay([*HIDDEN, *words(20 * US), *both, *words(40 * US)], known=False), STRANDED) == []


def test_snapshots_of_a_masked_port_prove_nothing() -> None:
    selectors = [snap(t, SNAP_SEL, 0) for t in (40 * US, 60 * US)]
    assert when(replay([*HIDDEN, *words(20 * US), mask(30 * US, 0, 65), *selectors], known=False), STRANDED) == []


def test_snapshots_of_port_0_after_a_gap_prove_nothing() -> None:
    events = [*scan(0, 0, 0), gap(10_000), bind_cpu(11_000, 0, 0), blocks(12_000)]
    selectors = [snap(t, SNAP_SEL, 0) for t in (20 * US, 40 * US)]
    assert when(replay([*events, *selectors]), STRANDED) == []


# -- what a port with an unknown bit does to selectors (E1, E3, E4) ----------------------------------------------------

IDLE: list[Event] = [*scan(0, 0), *scan(0, 1)]


@pytest.mark.parametrize(
    "request_",
    [
        [rebind(2_000, 65, 0), send(3_000, 65), snap(4_000, SNAP_MASK, 0, index=1)],  # mask not known
        [rebind(2_000, 65, 0), unmask(3_000, 0, 65), snap(4_000, SNAP_PENDING, 2, index=1)],  # pending not known
        [rebind(2_000, 65, 0), unmask(3_000, 1, 65), snap(4_000, SNAP_PENDING, 2, index=1)],  # E4
        [rebind(2_000, 65, 0), hypercall(3_000, 65, 1), snap(4_000, SNAP_PENDING, 2, index=1)],
        [rebind(2_000, 65, 0), somewhere(2_500, 65), snap(4_000, SNAP_PENDING, 2, index=1)],  # nor where
        [rebind(2_000, 65, 0), snap(2_000, SNAP_MASK, 0, index=1), send(3_000, 65)],  # pending already, perhaps
    ],
    ids=["send masked", "local unmask", "unmask by hypercall", "recorded hypercall", "unmask somewhere", "send"],
)
def test_a_selector_bit_that_may_have_been_set_is_unknown(request_: list[Event]) -> None:
    assert when(replay([*IDLE, *request_], known=False), STRANDED) == []
    assert when(replay([*IDLE, *request_, snap(5_000, SNAP_SEL, 0)], known=False), STRANDED) == [15_000]


def test_an_upcall_byte_that_may_have_been_set_is_unknown() -> None:
    start = [*IDLE, snap(1_500, SNAP_UPCALL_PENDING, 0), rebind(2_000, 65, 0)]
    assert when(replay([*start, send(3_000, 65), snap(4_000, SNAP_SEL, 2)], known=False), SELECTOR) == []
    assert when(replay([*start, snap(4_000, SNAP_SEL, 2)], known=False), SELECTOR) == []  # sends are not all recorded
    sure = [*start, on(2_500, "evtchn.clear", 0, obj=65), snap(2_500, SNAP_MASK, 0, index=1), gap(2_600),
            snap(2_700, SNAP_UPCALL_PENDING, 0), rebind(2_700, 65, 0), on(2_700, "evtchn.clear", 0, obj=65),
            snap(2_700, SNAP_MASK, 0, index=1), blocks(2_700)]  # fmt: skip
    assert when(replay([*sure, send(3_000, 65), snap(4_000, SNAP_SEL, 2)], known=False), SELECTOR) == []
    assert when(replay([*sure, snap(4_000, SNAP_SEL, 2)], known=False), SELECTOR) == [14_000]


def test_unmasked_somewhere_it_is_ready() -> None:
    events = [bind(65), mask(0, 0, 65), send(100, 65), somewhere(200, 65), snap(1_000, SNAP_SEL, 0)]
    assert when(replay(events), STRANDED) == [11_000]
    other = [bind(65), rebind(0, 65), mask(0, 0, 65), send(100, 65), unmask(200, 0, 65), rebind(300, 65, 0)]
    assert when(replay([*other, snap(1_000, SNAP_SEL, 0)]), STRANDED) == [11_000]


def test_bits_set_during_a_scan_may_have_been_drained_by_it() -> None:
    rescued = [send(700_000, 5), on(700_100, "evtchn.upcall", 0), send(700_150, 70),
               on(700_200, "evtchn.handled", 0, obj=65)]  # fmt: skip
    start = [bind(5), bind(70), send(10, 70), *scan(20, 0, 70, end=400)]
    seed = [(t + 1_000, kind, fields) for t, kind, fields in SEED]
    run = replay([*start, *seed, *rescued], policy="current")
    assert (when(run, STRANDED), when(run, PIGGYBACK)) == ([12_000], [])
    unknown = [rescued[0], rebind(700_050, 66), rescued[1], send(700_150, 66), rescued[3]]
    assert when(replay([*start, *seed, *unknown], policy="current"), PIGGYBACK) == []
    before = [rebind(699_000, 66), send(699_500, 66), *rescued[:2], rescued[3]]
    assert when(replay([*start, *seed, *before], policy="current"), PIGGYBACK) == [700_200]
    drained = [bind(65), on(50, "evtchn.upcall", 0), send(100, 65), on(200, "evtchn.upcall_end", 0)]
    assert codes(replay([*drained, snap(5_000, SNAP_SEL, 0), snap(5_000, SNAP_UPCALL_PENDING, 0)], end=6_000)) == []
    sampled = replay([*drained, snap(5_000, SNAP_SEL, 0)], end=6_000)
    assert sampled.metrics["samples_disagree.selector"] == 0


# -- causes and the other codes ----------------------------------------------------------------------------------------

START: list[Event] = [bind(65, 1), bind(70, 1), mask(0, 0, 65), send(100, 65)]


def test_a_noop_hypercall_is_the_cause_in_its_pending_life_only() -> None:
    noop = [*START, snap(150, SNAP_MASK, 0, index=1), hypercall(200, 65)]
    second = [send(50_000, 65), rebind(50_100, 65, 0)]
    run = replay([*noop, *scan(30_000, 1, 65), *second])
    assert [(f.t, f.cause) for f in run.findings if f.code.name == STRANDED] == [(10_150, NOOP), (60_100, WRONG)]
    masked = replay([*noop, mask(300, 0, 65), unmask(400, 0, 65), rebind(500, 65, 0)])
    assert [(f.t, f.cause) for f in masked.findings if f.code.name == STRANDED] == [(10_500, WRONG)]


def test_a_noop_hypercall_shows_a_port_stranded() -> None:
    """The vCPU blocked inside its scan: nobody looked at the port before the hypercall."""
    events = [bind(65), send(100, 65), on(200, "evtchn.upcall", 0), blocks(1_000), hypercall(2_000, 65, 1)]
    run = replay(events)
    assert (when(run, NOOP), when(run, STRANDED)) == ([2_000, 12_000], [12_000])


def test_a_predicted_hypercall_that_was_not_recorded_is_forgotten_with_the_next_mask() -> None:
    events = [*START, unmask(200, 0, 65), mask(300, 0, 65), hypercall(400, 65)]
    assert replay(events, end=500).metrics["unmask_hypercalls"] == 2


def test_a_port_of_another_vcpu_is_unmasked_by_hypercall_under_every_policy_but_the_first() -> None:
    events = [bind(65, 1), mask(0, 1, 65), send(100, 65), unmask(200, 0, 65)]
    for policy, hvm, calls in (("current", True, 0), ("proposed", True, 1), ("modern", True, 1), ("modern", False, 1)):
        run = replay(events, policy=policy, closed=True, hvm=hvm)
        assert (run.metrics["unmask_hypercalls"], run.metrics["handled"]) == (calls, calls)


def test_a_bind_ends_what_was_before() -> None:
    one_sided = [bind(65), bind_cpu(1_000, 65, 3)]
    assert when(replay(one_sided), MISMATCH) == [11_000]
    assert when(replay([*one_sided, (5_000, "evtchn.bind", {"obj": 65, "tgt": 3})]), MISMATCH) == []
    moved = [rebind(1_000, 65, 3), (2_000, "evtchn.bind", {"obj": 65, "tgt": 0}), mask(2_100, 0, 65), send(2_200, 65)]
    run = replay([*moved, unmask(3_000, 3, 65)], policy="current", end=4_000)
    assert when(run, WRONG) == [3_000]


def test_numbers_of_vcpus_that_are_believed() -> None:
    for vcpu, notified in ((8_192, 8_192), (8_193, 0), (1, 1), (NONE, 0)):
        run = replay([(0, "evtchn.bind", {"obj": 65, "tgt": vcpu, "flags": 1})], closed=True)
        assert [what >> 32 & 0xFFFF for _, what in run.effects] == [notified]
    lost = replay([(0, "evtchn.rebind", {"obj": 65, "tgt": 8_193}), send(10, 65)], closed=True)
    assert lost.metrics["handled"] == 0
    assert replay([rebind(0, 65, 8_192), send(10, 65)], closed=True).metrics["handled"] == 1


def test_selector_and_byte_have_to_contradict_each_other_for_long() -> None:
    quiet = [bind(130), send(500, 130), snap(1_000, SNAP_SEL, 4)]
    byte = snap(1_000, SNAP_UPCALL_PENDING, 0)
    assert when(replay([*quiet, byte]), SELECTOR) == [11_000]
    again = [*scan(5_000, 0, 130), send(7_000, 130), snap(8_000, SNAP_UPCALL_PENDING, 0)]
    assert when(replay([*quiet, byte, *again]), SELECTOR) == [18_000]
    assert when(replay([*quiet, byte, gap(5_000), blocks(6_000), send(7_000, 5)]), SELECTOR) == []


def test_lost_wakeup_needs_all_to_be_known() -> None:
    pending = [bind(9), send(500, 9)]
    assert when(replay([*pending, blocks(1_000)]), BLOCK) == [11_000]
    assert when(replay([*pending, gap(600), snap(700, SNAP_UPCALL_MASK, 0), blocks(1_000)]), BLOCK) == []
    assert when(replay([*pending, gap(600), snap(700, SNAP_UPCALL_PENDING, 1), blocks(1_000)]), BLOCK) == []
    relearnt = [snap(5_000, SNAP_UPCALL_PENDING, 1), snap(5_000, SNAP_UPCALL_MASK, 0)]
    assert when(replay([*pending, blocks(1_000), gap(3_000), *relearnt]), BLOCK) == []  # awake again, perhaps
    ends_not_recorded = [*pending, *scan(600, 0, 9)[:-1], send(850, 9), on(900, "evtchn.upcall", 0), blocks(1_000)]
    assert when(replay(ends_not_recorded), BLOCK) == []


KIND_NAMES = frozenset(kind.name for kind in KINDS)


def test_lost_wakeup_where_upcalls_are_not_recorded() -> None:
    """What the byte is is known at the moment of a snapshot only."""
    blind = KIND_NAMES - {"evtchn.upcall"}
    pending = [bind(9), send(500, 9)]
    assert when(replay([*pending, blocks(1_000)], observed=blind), BLOCK) == []
    sampled = [*pending, snap(1_000, SNAP_UPCALL_PENDING, 1)]
    assert when(replay([*sampled, blocks(1_000)], observed=blind), BLOCK) == [11_000]
    assert when(replay([*sampled, blocks(1_001)], observed=blind), BLOCK) == []


def test_stranded_where_sends_are_not_recorded() -> None:
    for missing, told in (({"evtchn.send"}, [10_200]), ({"evtchn.notify"}, [10_200]),
                          ({"evtchn.send", "evtchn.notify"}, [])):  # fmt: skip
        assert when(replay(MOVED, observed=KIND_NAMES - missing), STRANDED) == told


def test_delays_from_the_very_beginning() -> None:
    """At the beginning of a whole recording every vCPU runs."""
    late = replay([bind(9), bind(70), send(0, 70), *scan(100, 0, 9)], end=40 * MS)
    assert when(late, LATE) == [10 * MS]


def machine(*events: Event) -> TwoLevelMachine:
    made = TwoLevelMachine(Current(), Config(SYSTEM.parameters, {}), Sink(closed=False))
    table = events_from_json([{"t": t, "kind": kind, **fields} for t, kind, fields in events])
    names = made.columns
    made.consume(Batch.of(table, names).rows(names))
    return made


def entries(made: TwoLevelMachine, action: int) -> list[int]:
    return [entry[0] for entry in made.agenda.heap if entry[3] == action]


def test_one_entry_of_the_agenda_serves_all_ports() -> None:
    start = [on(0, "sched.run", 0, cpu=0), *scan(0, 0, 9)]
    assert entries(machine(*start, send(2_000, 9), send(3_000, 70), send(4_000, 80)), DELAY) == [10 * MS]
    looked = machine(*start, send(2_000, 9), send(MS, 70), send(11 * MS, 80), send(11 * MS, 81))
    assert entries(looked, DELAY) == [11 * MS]
    second = 1_000 * MS
    masked = [mask(0, 0, port) for port in (9, 70, 80)]
    assert entries(machine(*masked, send(2_000, 9), send(3_000, 70)), MASKED) == [second + 2_000]
    later = machine(*masked, send(2_000, 9), send(3_000, 70), send(second + 2_500, 80))
    assert entries(later, MASKED) == [second + 3_000]


def test_events_that_name_no_port_or_no_vcpu() -> None:
    base = [bind(9), send(50, 9), *scan(100, 0, 9), send(1_500, 0), *scan(2_000, 0, 0)]
    odd: list[Event] = [
        (5_000, "evtchn.send", {}), (5_010, "evtchn.handled", {"obj": 9}), (5_020, "evtchn.upcall", {}),
        (5_030, "evtchn.upcall_end", {}), (5_040, "evtchn.clear", {}),
    ]  # fmt: skip
    for n in range(len(odd) + 1):
        m = replay([*base, *odd[:n], send(6_000, 70)]).metrics
        assert (m["sends"], m["handled"], m["upcalls"], m["pending"]) == (3, 2, 2, 1)


def test_a_time_of_zero() -> None:
    """What has to last for no time at all is told before the next event."""
    cleared = on(1, "evtchn.clear", 2, obj=65)
    assert when(replay([bind(65), send(0, 65), rebind(0, 65, 2), cleared], strand_ns=0), STRANDED) == [0]
    warm = [*scan(0, 0, 9), *scan(0, 2, 9)]
    assert when(replay([*warm, bind(65), send(3_000, 65), rebind(3_000, 65, 2), on(3_000, "evtchn.clear", 2, obj=65)],
                       strand_ns=0), STRANDED) == []  # fmt: skip


def test_a_time_of_zero_in_batches() -> None:
    """Batches that begin while something is due already."""
    events = [bind(65), send(0, 65), rebind(0, 65, 2), bind(70), send(0, 65),
              on(1, "evtchn.clear", 2, obj=65), send(3, 70)]  # fmt: skip
    table = events_from_json([{"t": t, "kind": kind, **fields} for t, kind, fields in events])
    for cut in range(len(events) + 1):
        run = run_machine(
            SYSTEM, "current", [table.slice(0, cut), table.slice(cut)],
            config=Config(SYSTEM.parameters, {"strand_ns": 0}), closed=False, t_end=20 * MS, from_boot=True,
        )  # fmt: skip
        assert when(run, STRANDED) == [0]


def test_short_cuts_do_what_the_rules_do() -> None:
    """`replay` compares with the machine that has none: everything is known, and every port has had a life."""
    calm: list[Event] = [on(0, "sched.run", 0, cpu=0)]
    for t, port in ((1_000, 9), (3_000, 65), (5_000, 9), (7_000, 65), (9_000, 64)):
        calm += [send(t, port), *scan(t + 200, 0, port)]
    predicted = [mask(20_000, 0, 65), send(20_100, 65), unmask(20_200, 1, 65), *scan(20_300, 0, 65)]
    own = replay([*calm, *predicted, hypercall(30_000, 65)], end=40_000)
    assert own.metrics["unmask_hypercalls"] == 2  # the predicted one was handled before this
    waiting = replay([*calm, send(20_000, 65), blocks(21_000)], end=40_000)
    assert when(waiting, BLOCK) == [31_000]
    stranded = replay([*calm, send(20_000, 65), rebind(20_500, 65, 2)], end=40_000)
    (found,) = [f for f in stranded.findings if f.code.name == STRANDED]
    assert [(step.label, step.t) for step in found.evidence] == [
        ("port 65 pending", 20_000), ("selector bit 1 set on vcpu0", 20_000),
    ]  # fmt: skip
    assert found.cause == WRONG
    unknown = [rebind(20_000, 70), send(20_100, 70), on(20_200, "evtchn.clear", 0, obj=70), send(20_300, 65),
               blocks(20_400)]  # fmt: skip
    assert when(replay([*calm, *unknown]), BLOCK) == []  # the selector bit may have been set, and the upcall taken
    nested = [send(20_000, 9), on(20_100, "evtchn.upcall", 0), on(20_200, "evtchn.upcall", 0),
              on(20_300, "evtchn.upcall_end", 0), send(20_400, 64), on(20_500, "evtchn.upcall_end", 0)]  # fmt: skip
    assert replay([*calm, *nested, snap(21_000, SNAP_SEL, 0)]).metrics["samples_disagree.selector"] == 0
    left = [send(20_000, 64), send(20_010, 65), *scan(20_100, 0, 65)]  # 64 is ready, and left where it is
    assert when(replay([*calm, *left]), STRANDED) == [31_100]
    first = [mask(20_000, 0, 65), send(20_010, 65), send(20_020, 64), rebind(20_030, 64, 1),
             snap(20_040, SNAP_MASK, 0, index=1)]  # fmt: skip
    assert when(replay([*calm, *first]), STRANDED) == [30_030]


@pytest.mark.parametrize("vcpu", [255, 256, 300, 511, 512])
def test_guests_with_many_vcpus(vcpu: int) -> None:
    events = [bind(9, vcpu), bind(65, vcpu % 256), *scan(0, vcpu), *scan(0, vcpu % 256)]
    for t, port, where in ((1_000, 9, vcpu), (3_000, 65, vcpu % 256), (5_000, 9, vcpu), (7_000, 9, vcpu)):
        events += [send(t, port), *scan(t + 200, where, port)]
    run = replay([*events, blocks(9_000, vcpu), blocks(9_000, vcpu % 256)])
    assert (codes(run), run.metrics["handled"], run.metrics["spurious_upcalls"]) == ([], 4, 0)


# -- closed runs -------------------------------------------------------------------------------------------------------


def served(run: Run) -> list[tuple[int, int, int]]:
    return [(t, what >> 32 & 0xFFFF, what & 0xFFFFFFFF) for t, what in run.effects]


def test_what_is_pending_at_the_start() -> None:
    init = {"S5": {"pending": [3], "notify_vcpu": {"3": 1}, "guest_cpu": {"3": 1}}}
    assert when(replay([send(500, 70)], closed=True, init=init), STRANDED) == [10_500]
    run = replay([bind(5, 1), send(500, 5)], closed=True, init=init)
    assert served(run) == [(600, 1, 3), (600, 1, 5)]


def test_every_scan_is_counted_for_itself() -> None:
    events = [bind(65, 1), send(0, 65), send(5_000, 65), (5_050, "evtchn.close", {"obj": 65})]
    run = replay(events, closed=True)
    assert (served(run), when(run, NO_WORK), run.metrics["spurious_upcalls"]) == ([(100, 1, 65)], [5_100], 1)
    (f,) = run.findings
    assert f.observed == "no port dispatched (selector 0x2 as far as known)"


def test_a_port_that_nobody_named_is_not_ready() -> None:
    held: list[Event] = [(0, "evtchn.mask", {"vcpu": 0, "obj": 0}), bind(5), send(10, 0), send(20, 5)]
    assert served(replay(held, closed=True)) == [(120, 0, 5)]
    assert served(replay([bind(5), bind(0), send(20, 5)], closed=True)) == [(120, 0, 5)]


# -- what recordings say, word by word ---------------------------------------------------------------------------------


def test_events_in_one_batch_or_two() -> None:
    events = [bind(65), send(100, 65), on(200, "evtchn.upcall", 0), blocks(1_000), on(2_000, "sched.run", 1, cpu=1)]
    table = events_from_json([{"t": t, "kind": kind, **fields} for t, kind, fields in events])
    init = {"S5": {"masked": [9]}}
    for cut in range(len(events) + 1):
        run = run_machine(
            SYSTEM, "current", [table.slice(0, cut), table.slice(cut)], config=Config(SYSTEM.parameters, {}),
            closed=False, init=init, t_end=20 * MS, from_boot=True,
        )  # fmt: skip
        assert (codes(run), run.metrics["upcalls"]) == ([], 1)


def test_port_0_is_a_port() -> None:
    assert served(replay([send(10, 0)], closed=True)) == [(110, 0, 0)]
    assert when(replay([snap(0, SNAP_GUEST_CPU, 3, index=0)]), MISMATCH) == [10_000]


def test_ports_out_of_range_are_remembered_up_to_a_limit() -> None:
    made = machine(*(send(0, 5_000 + n) for n in range(10_003)))
    assert len(made.list[0].range_reported) == 10_001


def test_a_notification_shows_the_upcall_byte() -> None:
    told = [snap(0, SNAP_UPCALL_MASK, 0), on(500, "evtchn.notify", 0, obj=9)]
    assert when(replay([*told, blocks(1_000)], known=False), BLOCK) == [11_000]
    masked = [snap(0, SNAP_UPCALL_MASK, 1), told[1]]
    assert when(replay([*masked, blocks(1_000)], known=False), BLOCK) == []


#: Port 65 is sent to during a scan: its last round may have taken the selector bit.
DRAINED: list[Event] = [bind(65), on(50, "evtchn.upcall", 0), send(100, 65), on(200, "evtchn.upcall_end", 0)]


def test_after_a_scan_that_may_have_drained_its_word() -> None:
    assert when(replay([*DRAINED, blocks(1_000)]), BLOCK) == []
    again = replay([*DRAINED, send(300, 66), snap(400, SNAP_SEL, 0)])  # certainly set now
    assert again.metrics["samples_disagree.selector"] == 1
    for sel in (1, 2):  # the end of an upcall that nobody saw begin changes nothing
        events = [*DRAINED, snap(300, SNAP_SEL, 0), on(600, "evtchn.upcall_end", 0), snap(700, SNAP_SEL, sel)]
        assert replay(events).metrics["samples_disagree.selector"] == 1


def test_handled_without_an_ack_it_may_be_pending_or_not() -> None:
    events = [*HIDDEN, *words(20 * US), on(30 * US, "evtchn.handled", 0, obj=70)]
    handled = [(0, "guest.bind_cpu", {"obj": 70, "tgt": 0}), snap(20 * US, SNAP_PENDING, 1 << 6, index=1)]
    selectors = [snap(t, SNAP_SEL, 0) for t in (40 * US, 60 * US)]
    run = replay([*events, *handled, *selectors], known=False)
    assert [f.obj for f in run.findings if f.code.name == STRANDED] == []


def test_a_recorded_hypercall_may_strand_the_port() -> None:
    events = [bind(65, 1), bind_cpu(0, 65, 0), mask(0, 0, 65), send(100, 65), hypercall(5_000, 65)]
    assert when(replay(events), STRANDED) == [15_000]


def test_a_domain_that_turns_to_fifo_is_not_understood() -> None:
    assert when(replay([*MOVED, snap(3_000, SNAP_ABI, 1)]), STRANDED) == []
    assert when(replay([*MOVED, snap(3_000, SNAP_ABI, 0)]), STRANDED) == [10_200]


def test_a_domain_first_named_after_a_gap_is_unknown() -> None:
    assert when(replay([gap(0), *of(4, *MOVED)]), STRANDED) == []
    assert when(replay(of(4, *MOVED)), STRANDED) == [10_200]


def test_words_are_as_wide_as_the_guests() -> None:
    wide = 1 << 40 | 1
    run = replay([snap(10, SNAP_PENDING, wide, index=31), snap(10, SNAP_MASK, wide, index=31)], bits_per_word=32)
    assert run.metrics["pending"] == 1
    selector = replay([snap(10, SNAP_SEL, 1 << 40), *scan(100, 0)], bits_per_word=32)
    assert selector.metrics["upcalls"] == 1
    full = replay([snap(10, SNAP_PENDING, -1, index=1), snap(10, SNAP_SEL, -1), *scan(100, 0)])
    assert full.metrics["pending"] == 64


def test_ports_named_later_are_as_the_word_said() -> None:
    start = [snap(10, SNAP_PENDING, 0, index=1), snap(10, SNAP_MASK, 1 << 6, index=1), blocks(20)]
    events = [*start, rebind(30, 70, 0), snap(40, SNAP_SEL, 0), send(50, 70)]
    run = replay([*events, snap(5_000, SNAP_MASK, 0, index=1)], known=False)
    assert when(run, STRANDED) == [15_000]  # it was masked, so no selector bit was set
    assert run.metrics["coalesced"] == 0
    free = replay([*events[:1], snap(10, SNAP_MASK, 0, index=1), *events[2:]], known=False)
    assert (when(free, STRANDED), free.metrics["coalesced"]) == ([], 0)
    pending = [snap(10, SNAP_PENDING, 1 << 6, index=1), *events[1:]]
    assert replay(pending, known=False).metrics["coalesced"] == 1


def test_the_story_begins_where_the_port_was_first_seen_pending() -> None:
    def begin(*events: Event) -> list[tuple[str, int, int | None]]:
        run = replay([*events], known=False)
        (found,) = [f for f in run.findings if f.code.name == STRANDED]
        return [(step.label, step.t, step.seq) for step in found.evidence]

    assert begin(*HIDDEN, *words(20 * US), *words(40 * US)) == [("port 65 pending", 20 * US, len(HIDDEN))]
    life = [*HIDDEN, send(7_000, 65), *scan(8_000, 0, 65)]
    assert begin(*life, *words(20 * US), *words(40 * US))[-1] == ("port 65 pending", 20 * US, len(life))


def test_a_word_that_shows_the_end_of_a_pending_life() -> None:
    second = [send(50_000, 65), rebind(50_100, 65, 3)]
    run = replay([*MOVED, snap(30_000, SNAP_PENDING, 0, index=1), *second])
    assert when(run, STRANDED) == [10_200, 60_100]
    still = replay([*MOVED, snap(30_000, SNAP_PENDING, 2, index=1), rebind(50_100, 65, 3)])
    assert when(still, STRANDED) == [10_200]


def test_snapshots_with_a_mask_seen_between() -> None:
    seen = [snap(30 * US, SNAP_MASK, 2, index=1)]
    assert when(replay([*HIDDEN, *words(20 * US), *seen, *words(40 * US)], known=False), STRANDED) == []


def test_words_that_nobody_was_seen_to_set() -> None:
    assert when(replay([*MOVED, snap(300, SNAP_SEL, 1 << 5, vcpu=1)]), STRANDED) == []
    assert when(replay([*MOVED, snap(300, SNAP_SEL, 0, vcpu=1)]), STRANDED) == [10_200]
    assert when(replay([*MOVED, snap(300, SNAP_UPCALL_PENDING, 1, vcpu=1)]), STRANDED) == []
    assert when(replay([*MOVED, snap(300, SNAP_UPCALL_PENDING, 0x100, vcpu=1)]), STRANDED) == [10_200]  # a byte


def test_samples_of_the_upcall_byte_are_compared() -> None:
    def compared(*events: Event) -> tuple[int, int]:
        m = replay(events).metrics
        return m.get("samples_agree.upcall_pending", 0), m.get("samples_disagree.upcall_pending", 0)

    assert compared(snap(10, SNAP_UPCALL_PENDING, 0)) == (1, 0)
    assert compared(snap(10, SNAP_UPCALL_PENDING, 1)) == (0, 1)
    assert compared(send(5, 9), snap(10, SNAP_UPCALL_PENDING, 1)) == (1, 0)
    assert compared(send(5, 9), snap(10, SNAP_UPCALL_PENDING, 0)) == (0, 1)
    assert compared(blocks(3), gap(5), snap(10, SNAP_UPCALL_PENDING, 0)) == (0, 0)


# -- both ABIs on one host ---------------------------------------------------------------------------------------------


def mixed(*events: Event, closed: bool = False, observed: frozenset[str] | None = None, **config: Any) -> Run:
    return run_machine(
        SYSTEMS["evtchn"], "current", [events_from_json([{"t": t, "kind": k, **fields} for t, k, fields in events])],
        config=Config(SYSTEM.parameters, config), closed=closed, sub="mixed", t_end=90 * MS, from_boot=True,
        observed=observed,
    )  # fmt: skip


def of(dom: int, *events: Event) -> list[Event]:
    return [(t, kind, {**fields, "dom": dom}) for t, kind, fields in events]


def test_each_domain_goes_to_the_machine_of_its_abi() -> None:
    port = send(10, 5_000)  # FIFO has it, two levels do not
    fifo = of(1, snap(0, SNAP_ABI, 1))
    assert [(f.code.name, f.dom) for f in mixed(*fifo, *of(1, port), *of(2, port)).findings] == [
        ("evtchn-port-range", 2)
    ]
    back = [*fifo, *of(1, snap(5, SNAP_ABI, 0)), *of(1, port)]
    assert codes(mixed(*back)) == ["evtchn-port-range"]
    known = [*fifo, *of(1, (10, "fifo.word", {"obj": 5, "val": 1 << 31}), gap(5_000))]
    assert codes(mixed(*known[:2])) == ["fifo-pending-unlinked"]
    assert codes(mixed(*known[:2], (5_000, "trace.lost", {"val": 5_000}))) == []


def test_findings_and_effects_of_both_come_in_order() -> None:
    stranded = of(2, *MOVED)
    fifo = [*of(1, snap(0, SNAP_ABI, 1)), *of(1, (300, "fifo.word", {"obj": 5, "val": 1 << 31}))]
    late = [*of(2, *((t + 50_000, k, f) for t, k, f in [rebind(0, 80, 0), send(100, 80), rebind(200, 80, 2)]))]
    run = mixed(*sorted([*stranded, *fifo, *late], key=lambda e: e[0]))
    assert [(f.t, f.dom) for f in run.findings if f.severity == "error"] == [(10_200, 2), (10_300, 1), (60_200, 2)]
    sends = [*of(1, snap(0, SNAP_ABI, 1)), *of(1, send(1_000, 5)), *of(2, send(2_000, 5)), *of(1, send(3_000, 5))]
    effects = mixed(*sends, closed=True).effects
    assert [(t, what >> 48) for t, what in effects] == [(1_100, 1), (2_100, 2), (3_100, 1)]


def test_both_machines_know_what_is_recorded() -> None:
    blind = KIND_NAMES - {"evtchn.send", "evtchn.notify"}
    assert when(mixed(*of(2, *MOVED)), STRANDED) == [10_200]
    assert when(mixed(*of(2, *MOVED), observed=blind), STRANDED) == []
