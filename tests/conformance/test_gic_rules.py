"""GICv2: every code fires where it should and is silent where the spec says "not when"; distributor, CPU interfaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import KINDS, NIL, events_from_json
from replay.hardware.gic_cpu_interface import GicCpuInterface
from replay.hardware.gic_distributor import GicDistributor
from replay.hardware.gic_list_registers import ACTIVE, PENDING, lr_with_state, lr_word
from replay.sink import Finding
from replay.systems.gic import SYSTEM
from replay.systems.gic.codes import CODES

US = 1_000
MS = 1_000_000
S = 1_000_000_000
Event = tuple[int, str, Mapping[str, int]]

ALL = frozenset(kind.name for kind in KINDS)

UNMATCHED = "gic-eoi-unmatched"
ORDER = "gic-eoi-order"
INVERSION = "gic-priority-inversion"
SPURIOUS = "gic-spurious-ack"
LEAK = "gic-active-leak"
NO_DIR = "gic-dir-missing"
EXTRA = "model-extra-outcome"


def replay(
    events: Sequence[Event], *, end: int = 10 * S, known: bool = True, observed: frozenset[str] | None = None,
    **config: int,
) -> Run:  # fmt: skip
    in_order = sorted(events, key=lambda event: event[0])
    table = events_from_json([{"t": t, "kind": kind, **fields} for t, kind, fields in in_order])
    return run_machine(
        SYSTEM, "any", [table], config=Config(SYSTEM.parameters, config), closed=False, t_end=end, from_boot=known,
        observed=observed,
    )  # fmt: skip


def codes(run: Run) -> list[str]:
    return [f.code.name for f in run.findings]


def only(run: Run) -> Finding:
    (finding,) = run.findings
    return finding


def told(run: Run) -> list[tuple[str, int, int, int]]:
    """(code, time, interrupt, val)."""
    return [(f.code.name, f.t, f.obj, f.val) for f in run.findings]


def ack(t: int, irq: int, priority: int | None = None, *, cpu: int = 0, virtual: int = 0) -> Event:
    given = {"cpu": cpu, "obj": irq, "flags": virtual}
    return (t, "gic.ack", given if priority is None else {**given, "val": priority})


def eoi(t: int, irq: int, *, cpu: int = 0, virtual: int = 0) -> Event:
    return (t, "gic.eoi", {"cpu": cpu, "obj": irq, "flags": virtual})


def dirs(t: int, irq: int, *, cpu: int = 0, virtual: int = 0) -> Event:
    return (t, "gic.dir", {"cpu": cpu, "obj": irq, "flags": virtual})


def cpu_if(t: int, offset: int, val: int, *, cpu: int = 0, flags: int = 0) -> Event:
    return (t, "gic.cpu_if", {"cpu": cpu, "obj": offset, "val": val, "flags": flags})


def lost(t: int, cpu: int | None = None) -> Event:
    return (t, "trace.lost", {"val": t - 1} if cpu is None else {"cpu": cpu, "val": t - 1})


def runs(t: int, vcpu: int, *, cpu: int = 0, dom: int = 1) -> Event:
    return (t, "sched.run", {"cpu": cpu, "dom": dom, "vcpu": vcpu})


# -- EOIR ----------------------------------------------------------------------------------------------------------


def test_eoi_unmatched() -> None:
    f = only(replay([ack(10, 40), eoi(20, 40), eoi(30, 40)]))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val, f.t_first, f.seq, f.tags) == (
        UNMATCHED, "warn", 30, 0, 40, NIL, NIL, 2, (),
    )  # fmt: skip
    assert (f.expected, f.observed, f.evidence) == ("an IAR read before", "not in service here", ())
    other = replay([ack(10, 40), eoi(20, 40, cpu=1), eoi(30, 40)])
    assert [(f.code.name, f.t, f.cpu) for f in other.findings] == [(UNMATCHED, 20, 1)]
    assert codes(replay([ack(10, 40), eoi(20, 40)])) == []
    nothing = replay([eoi(10, 1020), eoi(20, 1023)])
    assert (codes(nothing), nothing.metrics["eois"]) == ([], 0)
    assert told(replay([eoi(10, 1019)])) == [(UNMATCHED, 10, 1019, NIL)]


def test_eoi_unmatched_not_while_something_older_may_be_in_service() -> None:
    assert codes(replay([eoi(10, 40)], known=False)) == []
    assert codes(replay([ack(5, 50), eoi(10, 40), eoi(20, 50)], known=False)) == []
    assert codes(replay([lost(5), eoi(10, 40)])) == []
    assert codes(replay([ack(1, 40), eoi(2, 40), lost(5, 0), eoi(10, 40)])) == []
    assert codes(replay([ack(1, 40), eoi(2, 40), lost(5, 1), eoi(10, 40)])) == [UNMATCHED]
    assert codes(replay([ack(1, 40), eoi(2, 40), lost(5), eoi(10, 40)])) == []
    assert told(replay([ack(1, 40), eoi(2, 40), eoi(10, 40)], known=False)) == [(UNMATCHED, 10, 40, NIL)]
    assert told(replay([eoi(2, 40), eoi(10, 40)], known=False)) == [(UNMATCHED, 10, 40, NIL)]  # ended, not taken again
    assert codes(replay([eoi(10, 40)], observed=ALL - {"gic.ack", "gic.line"})) == []


def test_eoi_order() -> None:
    nested = [ack(10, 40, 0xA0), ack(20, 50, 0x80)]
    f = only(replay([*nested, eoi(30, 40), eoi(40, 50)]))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val, f.seq) == (ORDER, "warn", 30, 0, 40, 50, 2)
    assert (f.expected, f.observed) == ("EOIR of 50", "EOIR of 40")
    run = replay([*nested, eoi(30, 50), eoi(40, 40)])
    assert (codes(run), run.metrics["max_depth"]) == ([], 2)
    assert codes(replay([*nested, lost(25), eoi(30, 40), eoi(40, 50)])) == []
    three = [*nested, ack(25, 60, 0x60), eoi(30, 50), eoi(40, 60), eoi(50, 40)]
    assert told(replay(three)) == [(ORDER, 30, 50, 60)]
    assert codes(replay([ack(10, 40), ack(20, 50, cpu=1), eoi(30, 40), eoi(40, 50, cpu=1)])) == []


def test_sgi_carries_its_source_only_in_the_register() -> None:
    assert codes(replay([ack(10, 3 | 2 << 10), eoi(20, 3 | 2 << 10), ack(30, 3 | 1 << 10), eoi(40, 3)])) == []
    assert only(replay([eoi(20, 3 | 2 << 10)])).obj == 3


# -- IAR -----------------------------------------------------------------------------------------------------------


def test_priority_inversion() -> None:
    for inner in (0xA0, 0xB0):
        f = only(replay([ack(10, 40, 0xA0), ack(20, 50, inner), eoi(30, 50), eoi(40, 40)]))
        assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val) == (INVERSION, "error", 20, 0, 50, 0xA0)
    assert (f.expected, f.observed) == ("nothing until 40 (priority 160) ends", "50 (priority 176) acknowledged")


@pytest.mark.parametrize(
    "events",
    [
        [ack(10, 40, 0xA0), ack(20, 50, 0x98), eoi(30, 50), eoi(40, 40)],
        [ack(10, 40, 0xA0), eoi(15, 40), ack(20, 50, 0xB0), eoi(30, 50)],
        [ack(10, 40), ack(20, 50, 0xB0), eoi(30, 50), eoi(40, 40)],
        [ack(10, 40, 0xA0), ack(20, 50), eoi(30, 50), eoi(40, 40)],
        [ack(10, 40, 0xA0), ack(20, 50, 0xB0, cpu=1), eoi(30, 50, cpu=1), eoi(40, 40)],
        [ack(10, 40, 0xA0), ack(20, 50, 0xB0, virtual=1), eoi(30, 50, virtual=1), eoi(40, 40)],
        [ack(10, 40, 0xA0), lost(15), ack(20, 50, 0xB0), eoi(30, 50)],
    ],
    ids=["higher", "after EOIR", "outer unknown", "inner unknown", "other core", "virtual", "gap"],
)
def test_priority_inversion_not(events: list[Event]) -> None:
    assert codes(replay(events)) == []


def test_spurious_ack() -> None:
    run = replay([ack(10 * irq, irq) for irq in range(1020, 1024)])
    assert [(f.code.name, f.severity, f.t, f.obj) for f in run.findings] == [
        (SPURIOUS, "info", 10 * irq, irq) for irq in range(1020, 1024)
    ]
    assert (run.metrics["acks"], run.metrics["spurious_acks"], run.metrics["max_depth"]) == (0, 4, 0)
    run = replay([ack(10, 1019), eoi(20, 1019)])
    assert (codes(run), run.metrics["acks"], run.metrics["eois"], run.metrics["max_depth"]) == ([], 1, 1, 1)
    assert codes(replay([ack(10, 1023)], observed=frozenset(["gic.ack"]))) == [SPURIOUS]


def test_active_leak() -> None:
    f = only(replay([ack(100, 40)]))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val, f.t_first, f.seq) == (
        LEAK, "warn", 100 + S, 0, 40, S, 100, -1,
    )  # fmt: skip
    assert [(e.t, e.seq, e.label) for e in f.evidence] == [(100, 0, "IAR returned 40")]
    assert told(replay([ack(100, 40)], active_ns=500)) == [(LEAK, 600, 40, 500)]
    assert codes(replay([ack(100, 40)], end=99 + S)) == []
    assert codes(replay([ack(100, 40), eoi(S, 40)])) == []
    assert codes(replay([ack(100, 40), lost(S)])) == []
    assert codes(replay([ack(100, 40)], observed=ALL - {"gic.eoi"})) == []


def test_active_leak_watches_every_interrupt_and_tells_once() -> None:
    both = replay([ack(100, 40), ack(200, 50), eoi(3 * S, 50), eoi(3 * S, 40)])
    assert told(both) == [(LEAK, 100 + S, 40, S), (LEAK, 200 + S, 50, S)]
    second = replay([ack(100, 40), ack(200, 50), eoi(300, 50), ack(400, 60)])
    assert told(second) == [(LEAK, 100 + S, 40, S), (LEAK, 400 + S, 60, S)]
    assert told(replay([ack(100, 40), eoi(200, 40), ack(2 * S, 50)])) == [(LEAK, 3 * S, 50, S)]
    assert told(replay([ack(100, 40), eoi(200, 40), ack(S, 50)])) == [(LEAK, 2 * S, 50, S)]
    late = replay([ack(100, 40), ack(2 * S, 50)])
    assert told(late) == [(LEAK, 100 + S, 40, S), (LEAK, 3 * S, 50, S)]
    assert told(replay([ack(100, 40), lost(200), ack(300, 50)])) == [(LEAK, 300 + S, 50, S)]


# -- DIR -----------------------------------------------------------------------------------------------------------

#: EOImode=1, and 40 is one of those that DIR deactivates.
BY_DIR: list[Event] = [cpu_if(0, 0, 0x201), ack(10, 40), eoi(20, 40), dirs(30, 40)]


def test_dir_missing() -> None:
    f = only(replay([*BY_DIR, ack(100, 40), eoi(200, 40)]))
    assert (f.code.name, f.severity, f.t, f.cpu, f.obj, f.val, f.tags) == (
        NO_DIR, "warn", 200 + 100 * MS, 0, 40, 100 * MS, (),
    )  # fmt: skip
    assert told(replay([*BY_DIR, ack(100, 40), eoi(200, 40)], dir_ns=70)) == [(NO_DIR, 270, 40, 70)]
    assert codes(replay([*BY_DIR, ack(100, 40), eoi(200, 40)], end=199 + 100 * MS)) == []


@pytest.mark.parametrize(
    "events",
    [
        [*BY_DIR, ack(100, 40), eoi(200, 40), dirs(90 * MS, 40)],
        [*BY_DIR, ack(100, 40), eoi(200, 40), ack(300, 40), eoi(400, 40), dirs(500, 40)],
        [*BY_DIR, ack(100, 50), eoi(200, 50)],
        [*BY_DIR, cpu_if(50, 0, 1), ack(100, 40), eoi(200, 40)],
        [*BY_DIR[1:], ack(100, 40), eoi(200, 40)],
        [*BY_DIR, ack(100, 40), eoi(200, 40), lost(300)],
        [*BY_DIR, lost(50), ack(100, 40), eoi(200, 40)],
        [*BY_DIR[1:], cpu_if(0, 0, 0x201, flags=2), ack(100, 40), eoi(200, 40)],
        [*BY_DIR[1:], cpu_if(0, 0, 0x201, flags=1), ack(100, 40), eoi(200, 40)],
        [*BY_DIR[1:], cpu_if(0, 4, 0x201), ack(100, 40), eoi(200, 40)],
    ],
    ids=["in time", "taken again", "by the guest", "EOImode=0", "after reset", "gap", "gap before", "GICH", "GICV",
         "another register"],
)  # fmt: skip
def test_dir_missing_not(events: list[Event]) -> None:
    assert codes(replay(events)) == []


def test_dir_missing_with_an_unknown_mode_and_several() -> None:
    taken = [*BY_DIR[1:], ack(100, 40), eoi(200, 40)]
    assert codes(replay(taken, known=False)) == []
    assert codes(replay([cpu_if(0, 0, 0x201), *taken], known=False)) == [NO_DIR]
    assert codes(replay([cpu_if(0, 0, 0x201), *taken], observed=ALL - {"gic.line", "gic.cpu_if"})) == []
    second: list[Event] = [ack(40, 50), eoi(50, 50), dirs(60, 50)]
    both = [*BY_DIR, *second, ack(100, 40), eoi(200, 40), ack(300, 50), eoi(400, 50)]
    assert told(replay(both)) == [(NO_DIR, 200 + 100 * MS, 40, 100 * MS), (NO_DIR, 400 + 100 * MS, 50, 100 * MS)]
    one = [*both, dirs(500, 40)]
    assert told(replay(one)) == [(NO_DIR, 400 + 100 * MS, 50, 100 * MS)]
    later = [*BY_DIR, ack(100, 40), eoi(200, 40), ack(S, 40), eoi(S + 100, 40)]
    assert [t for _, t, _, _ in told(replay(later))] == [200 + 100 * MS, S + 100 + 100 * MS]
    refreshed = [*BY_DIR, ack(100, 40), eoi(200, 40), ack(300, 40), eoi(50 * MS, 40)]
    assert told(replay(refreshed)) == [(NO_DIR, 150 * MS, 40, 100 * MS)]


# -- virtual interface, malformed ----------------------------------------------------------------------------------


def test_the_virtual_interface_is_one_of_its_own() -> None:
    f = only(replay([ack(10, 40), eoi(20, 40, virtual=1), eoi(30, 40)]))
    assert (f.code.name, f.t, f.tags) == (UNMATCHED, 20, ("virtual",))
    mode = [cpu_if(0, 0, 0x201, flags=1)]
    life = [ack(10, 40, virtual=1), eoi(20, 40, virtual=1), dirs(30, 40, virtual=1)]
    f = only(replay([*mode, *life, ack(100, 40, virtual=1), eoi(200, 40, virtual=1)]))
    assert (f.code.name, f.tags) == (NO_DIR, ("virtual",))


def test_another_vcpu_brings_its_own_virtual_interface() -> None:
    inside = [runs(0, 0), ack(5, 40, virtual=1), eoi(6, 40, virtual=1), ack(10, 50, 0xA0, virtual=1)]
    end = eoi(40, 40, virtual=1)
    assert codes(replay([*inside, runs(20, 0), end, eoi(50, 50, virtual=1)])) == [UNMATCHED]
    assert codes(replay([*inside, runs(20, 1), end])) == []
    assert codes(replay([*inside, runs(20, 0, dom=2), end])) == []
    assert codes(replay([*inside, runs(20, 1, cpu=1), end, eoi(50, 50, virtual=1)])) == [UNMATCHED]
    physical = [ack(5, 40), eoi(6, 40), runs(20, 1), eoi(40, 40)]
    assert codes(replay(physical)) == [UNMATCHED]


def test_events_without_core_or_interrupt_are_left_out() -> None:
    bad: list[Event] = [
        (10, "gic.ack", {"obj": 40}), (20, "gic.eoi", {"obj": 40}), (30, "gic.ack", {"cpu": 0}),
        (40, "gic.eoi", {"cpu": 0}), (50, "gic.eoi", {"cpu": 1 << 16, "obj": 40}),
        (60, "gic.cpu_if", {"cpu": 0, "obj": 0}),
    ]  # fmt: skip
    run = replay(bad)
    assert (codes(run), run.metrics) == ([], {"acks": 0, "spurious_acks": 0, "eois": 0, "max_depth": 0})


# -- distributor ---------------------------------------------------------------------------------------------------


def gicd(*, pinned: bool = False) -> GicDistributor:
    """Two cores, 64 interrupts, forwarding; 40 is enabled for core 0 at 0xa0."""
    d = GicDistributor(64, 2, pinned=pinned)
    d.write(0, 4, 1, 0)
    d.write(0x100 + 4, 4, 1 << 8, 0)
    d.write(0x400 + 40, 1, 0xA0, 0)
    d.write(0x800 + 40, 1, 1, 0)
    return d


def test_level_line() -> None:
    d = gicd()
    assert d.best_pending(0) == -1
    d.set_line(40, 1)
    assert (d.best_pending(0), d.best_pending(1), d.priority_of(40, 0), d.priority_of(40, 1)) == (40, -1, 0xA0, 0xA0)
    d.activate(40, 0)
    assert d.best_pending(0) == -1
    d.deactivate(40, 0)
    assert d.best_pending(0) == 40  # the line is still up
    d.set_line(40, 0)
    assert d.best_pending(0) == -1


def test_edge_is_latched_once_until_it_is_taken() -> None:
    d = gicd()
    d.write(0xC00 + 10, 1, 2 << 0, 0)  # 40 is the first of its byte
    assert (d.edge[40], d.edge[41], d.edge[39]) == (True, False, False)
    d.set_line(40, 1)
    d.set_line(40, 0)
    assert d.best_pending(0) == 40
    assert d.activate(40, 0) == 0
    assert d.best_pending(0) == -1
    d.set_line(40, 1)
    assert d.best_pending(0) == -1  # pending and active
    d.deactivate(40, 0)
    assert d.best_pending(0) == 40
    d.activate(40, 0)
    d.deactivate(40, 0)
    d.set_line(40, 1)  # it was up
    assert d.best_pending(0) == -1
    d.write(0xC00 + 10, 1, 1, 0)  # the lower bit means nothing
    assert d.edge[40] is False


def test_targets_move_what_is_pending() -> None:
    d = gicd()
    d.set_line(40, 1)
    d.write(0x800 + 40, 4, 0x0102, 0)
    assert (d.targets[40:44], d.best_pending(0), d.best_pending(1)) == ([2, 1, 0, 0], -1, 40)
    d.write(0x800 + 40, 1, 0xFF, 0)
    assert d.targets[40] == 3
    d.write(0x800 + 31, 1, 2, 0)
    assert d.targets[31] == 0  # read-only for private ones
    d.write(0x800 + 32, 1, 2, 0)
    assert d.targets[32] == 2


@pytest.mark.parametrize(("pinned", "new_target"), [(False, 40), (True, -1)])
def test_a_latched_edge_follows_its_targets_unless_pinned(pinned: bool, new_target: int) -> None:
    d = gicd(pinned=pinned)
    d.write(0xC00 + 10, 1, 2, 0)
    d.set_line(40, 1)
    assert (d.best_pending(0), d.best_pending(1)) == (40, -1)
    d.write(0x800 + 40, 1, 2, 0)
    assert (d.best_pending(0), d.best_pending(1)) == (-1, new_target)
    d.write(0xC00 + 6, 1, 0x80, 0)  # a private edge (27) knows no targets
    d.write(0x100, 4, 1 << 27, 1)
    d.set_line(27, 1, 1)
    assert d.best_pending(1) == 27 if pinned else 40


def test_set_and_clear_registers() -> None:
    d = gicd()
    for offset, bits in ((0x104, 1 << 9 | 1 << 10), (0x184, 1 << 10), (0x204, 1 << 9), (0x304, 1 << 11)):
        d.write(offset, 4, bits, 1)
    assert [d.enabled[irq] for irq in (40, 41, 42, 43)] == [3, 3, 0, 0]
    assert [d.latch[irq] for irq in (40, 41, 42)] == [0, 3, 0]
    assert [d.active[irq] for irq in (42, 43, 44)] == [0, 3, 0]
    d.write(0x284, 4, 1 << 9, 1)
    d.write(0x384, 4, 1 << 11, 1)
    assert (d.latch[41], d.active[43]) == (0, 0)
    d.write(0x105, 1, 1 << 2, 0)  # bytes: 40 + 2
    assert d.enabled[42] == 3
    d.write(0x108, 4, 1, 0)  # interrupt 64 does not exist
    d.write(0x13C, 4, 1 << 31, 0)


def test_private_interrupts_are_banked_and_sgis_stay_enabled() -> None:
    d = gicd()
    assert [d.enabled[irq] for irq in (0, 15, 16, 31, 32)] == [3, 3, 0, 0, 0]
    d.write(0x100, 4, 1 << 27, 1)
    assert d.enabled[27] == 2
    d.write(0x180, 4, 1 << 5 | 1 << 16, 1)
    assert d.enabled[5] == 3
    d.write(0x200, 4, 1 << 5 | 1 << 16, 1)
    assert (d.latch[5], d.latch[16]) == (0, 2)  # ISPENDR does nothing to an SGI
    d.send_sgi(5, 0, 2)
    d.write(0x280, 4, 1 << 5 | 1 << 16, 1)
    assert (d.latch[5], d.latch[16]) == (2, 0)
    d.write(0x400 + 27, 1, 0x40, 1)
    assert (d.priority_of(27, 0), d.priority_of(27, 1)) == (0, 0x40)
    d.write(0x400 + 32, 4, 0x04030201, 1)
    assert [d.priority_of(irq, 0) for irq in range(32, 36)] == [1, 2, 3, 4]
    d.write(0x400 + 62, 4, 0x04030201, 1)
    assert (d.priority_of(62, 0), d.priority_of(63, 1)) == (1, 2)
    d.set_line(27, 1, 1)
    assert (d.pending(27, 0), d.pending(27, 1)) == (False, True)
    d.activate(27, 1)
    assert (d.active[27], d.best_pending(1)) == (2, 5)
    d.deactivate(27, 0)
    assert d.active[27] == 2
    d.deactivate(27, 1)
    assert d.active[27] == 0
    d.set_line(27, 0, 0)
    assert d.pending(27, 1)
    d.set_line(27, 0, 1)
    assert not d.pending(27, 1)
    d.write(0xC00, 4, 0, 0)
    assert d.edge[15] and not d.edge[16]  # SGIs are edges
    d.write(0xC04, 4, 2, 0)
    assert d.edge[16]


def test_best_pending_is_the_lowest_number_and_then_the_lowest_interrupt() -> None:
    d = gicd()
    d.write(0x104, 4, 0xFFFF, 0)
    d.write(0x800 + 40, 4, 0x01010101, 0)
    for irq, priority in ((41, 0x80), (42, 0x60), (43, 0x60)):
        d.write(0x400 + irq, 1, priority, 0)
        d.set_line(irq, 1)
    d.set_line(40, 1)
    order = []
    for _ in range(4):
        order.append(d.best_pending(0))
        d.activate(order[-1], 0)
    assert order == [42, 43, 41, 40]
    d.deactivate(40, 0)
    for ctlr, best in ((0, -1), (1, 40), (2, 40), (4, -1)):
        d.write(0, 4, ctlr, 0)
        assert d.best_pending(0) == best
    d.write(0, 4, 1, 0)
    d.write(0x184, 4, 1 << 8, 0)
    assert d.best_pending(0) == -1


def test_sgis_are_pending_by_source_and_target() -> None:
    d = GicDistributor(64, 4)
    d.write(0, 4, 1, 0)
    for source in (2, 1):
        d.write(0xF00, 4, 0b0001 << 16 | 3, source)
    assert ([d.pending(3, cpu) for cpu in range(4)], d.best_pending(0)) == ([True, False, False, False], 3)
    taken = []
    for _ in range(2):
        taken.append(d.activate(3, 0))
        assert d.best_pending(0) == -1
        d.deactivate(3, 0)
    assert (taken, d.best_pending(0)) == ([1, 2], -1)
    d.write(0xF00, 4, 1 << 24 | 0xFF << 16 | 4, 1)  # all others
    d.write(0xF00, 4, 2 << 24 | 0xFF << 16 | 5, 1)  # itself
    assert [d.latch[4], d.latch[5]] == [0b1101, 0b0010]
    d.write(0xF20 + 6, 1, 0b1000, 2)  # SPENDSGIR
    assert (d.latch[6], d.activate(6, 2)) == (0b0100, 3)
    assert d.latch[6] == 0
    d.write(0xF20 + 4, 4, 0x0302, 2)
    assert (d.sgi_sources[4 * 4 + 2], d.sgi_sources[5 * 4 + 2]) == (0b0010, 0b0011)
    d.write(0xF10 + 4, 4, 0x0102, 2)  # CPENDSGIR
    assert (d.latch[4], d.latch[5]) == (0b1001, 0b0110)
    assert d.activate(5, 2) == 1


# -- CPU interface -------------------------------------------------------------------------------------------------


def gicc(d: GicDistributor, cpu: int = 0) -> GicCpuInterface:
    c = GicCpuInterface(d, cpu)
    c.write(0, 1)
    c.write(4, 0xFF)
    return c


def test_acknowledge_and_end() -> None:
    d = gicd()
    c = gicc(d)
    assert (c.acknowledge(), c.running_priority()) == (1023, 0x100)
    d.set_line(40, 1)
    assert (c.signalled(), c.acknowledge(), c.running_priority(), c.signalled()) == (40, 40, 0xA0, -1)
    d.set_line(40, 0)
    c.write(0x10, 40)
    assert (c.running_priority(), d.active[40]) == (0x100, 0)
    c.write(0x10, 40)  # nothing active: no effect
    assert c.running_priority() == 0x100


def test_eoimode_drops_first_and_deactivates_later() -> None:
    d = gicd()
    c = gicc(d)
    d.set_line(40, 1)
    c.acknowledge()
    c.write(0x1000, 40)  # EOImode=0: DIR does nothing
    assert d.active[40] == 3
    c.write(0, 0x201)
    c.write(0x10, 40)
    assert (c.running_priority(), d.active[40]) == (0x100, 3)
    c.write(0x1000, 40 | 1 << 10)
    assert d.active[40] == 0
    c.write(0x1000, 1023)


def test_end_of_a_special_interrupt_drops_nothing() -> None:
    d = gicd()
    c = gicc(d)
    d.set_line(40, 1)
    c.acknowledge()
    for irq in (64, 1023):
        c.write(0x10, irq)
        assert c.running_priority() == 0xA0


@pytest.mark.parametrize(
    ("ctlr", "pmr", "signalled"),
    [(0, 0xFF, -1), (1, 0xFF, 40), (2, 0xFF, 40), (0x200, 0xFF, -1), (1, 0xA0, -1), (1, 0xA1, 40), (1, 0x1A1, 40)],
)
def test_enable_and_priority_mask(ctlr: int, pmr: int, signalled: int) -> None:
    d = gicd()
    c = gicc(d)
    d.set_line(40, 1)
    c.write(0, ctlr)
    c.write(4, pmr)
    assert (c.signalled(), c.acknowledge()) == (signalled, signalled if signalled >= 0 else 1023)


def test_the_mask_is_closed_at_reset_and_interrupt_0_is_one() -> None:
    d = GicDistributor(64, 2)
    d.write(0, 4, 1, 0)
    d.send_sgi(0, 0, 1)
    c = GicCpuInterface(d, 0)
    assert c.signalled() == -1
    c.write(0, 1)
    assert c.signalled() == -1  # priority 0 is not above PMR 0
    c.write(4, 1)
    assert (c.signalled(), c.acknowledge(), c.running_priority()) == (0, 0, 0)


@pytest.mark.parametrize(
    ("bpr", "inner", "preempts"),
    [(0, 0x9E, True), (0, 0xA0, False), (0, 0xA1, False), (4, 0x9E, True), (5, 0x9E, False), (5, 0x7E, True),
     (6, 0x9E, False), (6, 0x7E, True), (7, 0x00, False), (14, 0x9E, False)],
)  # fmt: skip
def test_binary_point_decides_what_preempts(bpr: int, inner: int, preempts: bool) -> None:
    d = gicd()
    c = gicc(d)
    c.write(8, bpr)
    d.set_line(40, 1)
    assert c.acknowledge() == 40
    d.write(0x104, 4, 1 << 9, 0)
    d.write(0x800 + 41, 1, 1, 0)
    d.write(0x400 + 41, 1, inner, 0)
    d.set_line(41, 1)
    assert c.signalled() == (41 if preempts else -1)


def test_nested_interrupts_end_one_at_a_time() -> None:
    d = gicd()
    c = gicc(d)
    d.set_line(40, 1)
    c.acknowledge()
    d.write(0x400 + 3, 1, 0x40, 0)
    d.send_sgi(3, 1, 1)
    assert (c.acknowledge(), c.running_priority()) == (3 | 1 << 10, 0x40)
    c.write(0x10, 3 | 1 << 10)
    assert (c.running_priority(), d.active[3], d.active[40]) == (0xA0, 0, 3)


# -- in lockstep with an emulator's log ----------------------------------------------------------------------------


def dist(t: int, offset: int, val: int, size: int = 4, *, cpu: int = 0) -> Event:
    return (t, "gic.dist", {"cpu": cpu, "tgt": offset, "val": val, "val2": size})


def line(t: int, irq: int, level: int, cpu: int | None = None) -> Event:
    return (t, "gic.line", {"obj": irq, "val": level} if cpu is None else {"obj": irq, "val": level, "cpu": cpu})


def best(t: int, irq: int, priority: int, running: int, *, cpu: int = 0, virtual: int = 0) -> Event:
    return (t, "gic.best", {"cpu": cpu, "obj": irq, "val": priority, "val2": running, "flags": virtual})


def hyp_read(t: int, offset: int, val: int, *, cpu: int = 0) -> Event:
    return (t, "gic.hyp_read", {"cpu": cpu, "obj": offset, "val": val})


#: From reset: 40 goes to core 0 at 0xa0, the interface of core 0 is open.
RESET: list[Event] = [
    dist(0, 0, 1), dist(1, 0x104, 1 << 8), dist(2, 0x400 + 40, 0xA0, 1), dist(3, 0x800 + 40, 1, 1),
    cpu_if(4, 0, 1), cpu_if(5, 4, 0xFF),
]  # fmt: skip
NAMES = ("ack", "virtual_ack", "running_priority", "virtual_running_priority")


COUNTS = ("predicted", "observed", "mismatch", "open")


def lockstep(events: Sequence[Event], **config: int) -> tuple[dict[str, tuple[int, ...]], list[tuple[int, str, str]]]:
    """Counts (predicted, observed, mismatch, open) by outcome, and the mismatches (time, expected, observed)."""
    run = replay(events, end=S, known=True, observed=ALL, **config)
    counts: dict[str, tuple[int, ...]] = {}
    for name in (*(f"gic_{n}" for n in NAMES), "gich_read"):
        of = tuple(run.metrics.get(f"lockstep.{name}.{what}", 0) for what in COUNTS)
        if any(of):
            counts[name.removeprefix("gic_")] = of
    return counts, [(f.t, f.expected, f.observed) for f in run.findings if f.code.name == EXTRA]


def test_lockstep_predicts_what_iar_returns() -> None:
    life = [ack(10, 1023), line(20, 40, 1), ack(30, 40), ack(35, 1023), line(40, 40, 0), eoi(50, 40), ack(60, 1023)]
    assert lockstep([*RESET, *life]) == ({"ack": (4, 4, 0, 0)}, [])
    assert lockstep([*RESET, *life[:5], dist(52, 0, 0)])[1] == []
    again = [*life[:4], eoi(50, 40), ack(60, 40)]  # the line is still up
    assert lockstep([*RESET, *again]) == ({"ack": (4, 4, 0, 0)}, [])


def test_lockstep_tells_what_iar_returned_instead() -> None:
    for value, text in ((41, "gic ack cpu 0x0 0x29"), (1023, "gic ack cpu 0x0 0x3ff")):
        counts, wrong = lockstep([*RESET, line(20, 40, 1), ack(30, value)])
        assert (counts, wrong) == ({"ack": (1, 1, 1, 0)}, [(30, "gic ack cpu 0x0 0x28", text)])
    counts, wrong = lockstep([*RESET, ack(30, 40)])
    assert wrong == [(30, "gic ack cpu 0x0 0x3ff", "gic ack cpu 0x0 0x28")]
    counts, wrong = lockstep([*RESET, ack(30, 40), eoi(40, 40), ack(50, 1023)])  # taken in the model as well
    assert (counts["ack"], len(wrong)) == ((2, 2, 1, 0), 1)
    f = replay([*RESET, line(20, 40, 1), ack(30, 41)], end=40, observed=ALL).findings[0]
    assert (f.cpu, f.obj, f.seq) == (0, 41, 7)
    assert [e.label for e in f.evidence][-3:] == ["GICC 0x4 = 0xff by cpu 0", "line of 0x28 = 0x1", "IAR 0x29 by cpu 0"]


def test_lockstep_compares_the_running_priority() -> None:
    taken = [best(10, 1023, 0x100, 0x100), line(20, 40, 1), ack(30, 40), best(40, 1023, 0x100, 0xA0)]
    assert lockstep([*RESET, *taken]) == ({"ack": (1, 1, 0, 0), "running_priority": (2, 2, 0, 0)}, [])
    inside = [line(20, 40, 1), best(29, 40, 0xA0, 0xA0), ack(30, 40)]  # printed within the read of IAR
    assert lockstep([*RESET, *inside]) == ({"ack": (1, 1, 0, 0), "running_priority": (1, 1, 0, 0)}, [])
    wrong = [*taken[:3], best(40, 1023, 0x100, 0x80), eoi(50, 40), line(55, 40, 0)]
    counts, findings = lockstep([*RESET, *wrong])
    assert counts["running_priority"] == (2, 2, 1, 0)
    assert findings == [(40, "gic running priority cpu 0x0 0xa0", "gic running priority cpu 0x0 0x80")]
    dropped = [*taken, eoi(50, 40), best(60, 1023, 0x100, 0x100)]
    assert lockstep([*RESET, *dropped])[0]["running_priority"] == (3, 3, 0, 0)


#: The hypervisor opens the virtual interface of core 0 and gives the guest 50, which is 40 outside.
LR = lr_word(50, PENDING, 0xA0, physical=40)
GUEST: list[Event] = [
    cpu_if(6, 0, 0x201), line(10, 40, 1), ack(11, 40), line(12, 40, 0), eoi(13, 40),
    cpu_if(14, 0x000, 1, flags=2), cpu_if(15, 0x008, 0x1F << 27 | 1, flags=2), cpu_if(16, 0x100, LR, flags=2),
]  # fmt: skip
ENDED = [ack(20, 50, virtual=1), hyp_read(30, 0x100, lr_with_state(LR, ACTIVE)), eoi(40, 50, virtual=1),
         hyp_read(50, 0x100, lr_with_state(LR, 0))]  # fmt: skip


def test_lockstep_of_the_list_registers() -> None:
    counts, wrong = lockstep([*RESET, *GUEST, *ENDED])
    assert (counts, wrong) == ({"ack": (1, 1, 0, 0), "virtual_ack": (1, 1, 0, 0), "gich_read": (2, 2, 0, 0)}, [])
    m = replay([*RESET, *GUEST, *ENDED], end=S, observed=ALL).metrics
    assert {k: v for k, v in m.items() if "drops" in k or "deactiv" in k} == {
        "lockstep.gic_priority_drops": 1, "lockstep.gic_deactivations": 0,
        "lockstep.gic_virtual_priority_drops": 1, "lockstep.gic_deactivated_by_guest": 1,
    }  # fmt: skip
    again = [*ENDED, line(60, 40, 1), ack(70, 40)]
    assert lockstep([*RESET, *GUEST, *again])[1] == []
    assert lockstep([*RESET, *GUEST, *ENDED[:1], line(60, 40, 1), ack(70, 40)])[1] == [
        (70, "gic ack cpu 0x0 0x3ff", "gic ack cpu 0x0 0x28")
    ]
    by_hypervisor = [dirs(20, 40), line(60, 40, 1), ack(70, 40)]
    run = replay([*RESET, *GUEST, *by_hypervisor], end=S, observed=ALL)
    assert (codes(run), run.metrics["lockstep.gic_deactivations"]) == ([], 1)


def test_lockstep_of_other_hypervisor_registers() -> None:
    priority = [hyp_read(19, 0x0F0, 0), *ENDED[:1], hyp_read(21, 0x0F0, 1 << 20), hyp_read(22, 0x000, 1)]
    counts, wrong = lockstep([*RESET, *GUEST, *priority, hyp_read(23, 0x004, 7)])  # GICH_VTR is not modelled
    assert (counts["gich_read"], wrong) == ((3, 3, 0, 0), [])
    vmcr = 0x1F << 27 | 2 << 21 | 3 << 18 | 1
    masked = [hyp_read(17, 0x008, vmcr), cpu_if(18, 0x0004, 0x80, flags=1), ack(20, 1023, virtual=1)]
    counts, wrong = lockstep([*RESET, *GUEST, *masked, hyp_read(21, 0x008, vmcr & 0x7FFFFFF | 0x10 << 27)])
    assert (counts["gich_read"], counts["virtual_ack"], wrong) == ((2, 2, 0, 0), (1, 1, 0, 0), [])
    counts, wrong = lockstep([*RESET, *GUEST, hyp_read(20, 0x104, 5), hyp_read(21, 0x104, 5)])  # learnt once
    assert (counts["gich_read"], len(wrong), wrong[0][0]) == ((2, 2, 1, 0), 1, 20)
    written = [cpu_if(17, 0x0F0, 4, flags=2), cpu_if(18, 0x10C, LR, flags=2), cpu_if(19, 0x110, LR, flags=2)]
    reads = [hyp_read(20, 0x0F0, 4), hyp_read(21, 0x10C, LR), hyp_read(22, 0x110, 9)]  # four list registers
    assert lockstep([*RESET, *GUEST, *written, *reads])[0]["gich_read"] == (2, 2, 0, 0)
    assert lockstep([*RESET, *GUEST, *written, *reads], nr_lrs=5)[1] == [
        (22, f"gich read cpu 0x0 0x110 = {LR:#x}", "gich read cpu 0x0 0x110 = 0x9")
    ]


def test_lockstep_of_a_virtual_acknowledge_that_came_differently() -> None:
    two = [*GUEST, cpu_if(17, 0x104, lr_word(60, PENDING, 0x80), flags=2)]
    counts, wrong = lockstep([*RESET, *two, ack(20, 50, virtual=1)])
    assert wrong == [(20, "gic virtual ack cpu 0x0 0x3c", "gic virtual ack cpu 0x0 0x32")]
    running = [best(21, 1023, 0x100, 0x80, virtual=1)]
    counts, wrong = lockstep([*RESET, *two, ack(20, 60, virtual=1), *running])
    assert (counts["virtual_running_priority"], wrong) == ((1, 1, 0, 0), [])
    split = [cpu_if(18, 0x0000, 0x201, flags=1), ack(20, 60, virtual=1), eoi(30, 60, virtual=1),
             dirs(40, 60, virtual=1)]  # fmt: skip
    low = lr_word(60, 0, 0x80)
    reads = [hyp_read(31, 0x104, lr_with_state(low, ACTIVE)), hyp_read(41, 0x104, low)]
    counts, wrong = lockstep([*RESET, *two, *split, *reads])
    assert (counts["gich_read"], wrong) == ((2, 2, 0, 0), [])


def test_lockstep_that_begins_late_is_open_until_registers_were_seen() -> None:
    """No write of GICD_CTLR at first."""
    late = [best(10, 40, 0xA0, 0x100), ack(20, 40), eoi(30, 40), best(40, 1023, 0x100, 0x100)]
    counts, wrong = lockstep(late)
    # Whether something was active before is not known until a running priority is printed.
    assert (counts["ack"], counts["running_priority"], wrong) == ((0, 1, 0, 1), (1, 2, 0, 1), [])
    counts, wrong = lockstep([ack(20, 40), ack(30, 99, virtual=1), hyp_read(40, 0x100, LR), hyp_read(50, 0x100, LR)])
    assert (counts["virtual_ack"], counts["gich_read"]) == ((0, 1, 0, 1), (1, 2, 0, 1))
    assert wrong == []
    counts, wrong = lockstep([*RESET, (8, "trace.lost", {}), ack(10, 50), dist(12, 0, 1), ack(14, 51)])
    assert (counts["ack"][3], wrong) == (2, [])
    counts, wrong = lockstep([best(10, 1023, 0x100, 0x60), ack(20, 1023), eoi(30, 40), best(40, 1023, 0x100, 0x100)])
    assert (counts["running_priority"], wrong) == ((0, 2, 0, 2), [])  # below 0x60 there may be another


def test_lockstep_takes_in_the_model_what_was_taken() -> None:
    """One cause, one mismatch."""
    assert len(lockstep([*RESET, ack(30, 40), best(40, 1023, 0x100, 0xA0), eoi(50, 40)])[1]) == 1
    first = [dist(6, 0x800 + 32, 1, 1), cpu_if(7, 0, 1, cpu=1), cpu_if(8, 4, 0xFF, cpu=1), ack(30, 32, cpu=1)]
    spi = [*first, eoi(31, 32, cpu=1), line(40, 32, 1), ack(41, 32)]
    assert [t for t, _, _ in lockstep([*RESET, *spi])[1]] == [30]
    two = [*GUEST, cpu_if(17, 0x104, lr_word(60, PENDING, 0x80), flags=2), ack(20, 50, virtual=1)]
    counts, wrong = lockstep([*RESET, *two, hyp_read(21, 0x100, lr_with_state(LR, ACTIVE))])
    assert (counts["gich_read"], [t for t, _, _ in wrong]) == ((1, 1, 0, 0), [20])


def test_lockstep_that_begins_late_learns() -> None:
    for private, judged in ((27, (1, 1, 0, 0)), (3, (0, 1, 0, 1))):  # who had sent an SGI before is not known
        counts, wrong = lockstep([best(10, private, 0x40, 0x100), ack(20, private)])
        assert (counts["ack"], wrong) == (judged, [])
    again = [ack(20, 40), eoi(30, 40), ack(40, 40), eoi(50, 40)]  # taken again without DIR: EOImode was 0
    m = replay(again, end=S, observed=ALL).metrics
    assert (m["lockstep.gic_priority_drops"], m["lockstep.gic_deactivations"]) == (2, 1)


def test_lockstep_needs_all_stimuli() -> None:
    hidden = replay([*RESET, ack(30, 40)], end=S, observed=ALL - {"gic.line"})
    assert [name for name in hidden.metrics if name.startswith("lockstep")] == []


def test_lockstep_of_private_interrupts_and_of_cores_beyond_eight() -> None:
    timer = [dist(6, 0x100, 1 << 27, cpu=1), dist(7, 0x400 + 27, 0x40, 1, cpu=1), cpu_if(8, 0, 1, cpu=1),
             cpu_if(9, 4, 0xFF, cpu=1), line(10, 27, 1, cpu=1), ack(11, 1023), ack(12, 27, cpu=1)]  # fmt: skip
    counts, wrong = lockstep([*RESET, *timer, ack(13, 5, cpu=8), line(14, 1020, 1)])
    assert (counts["ack"], wrong) == ((2, 2, 0, 0), [])
    counts, wrong = lockstep([*RESET, *timer[:4], dist(10, 0xF00, 2 << 16 | 3), ack(12, 3, cpu=1)])
    assert (counts["ack"], wrong) == ((1, 1, 0, 0), [])
    counts, wrong = lockstep([*RESET, dist(10, 0xF00, 1 << 16 | 3, cpu=1), ack(12, 3 | 1 << 10)])
    assert (counts["ack"], wrong) == ((1, 1, 0, 0), [])


def test_lockstep_counts_latches_that_stay_behind() -> None:
    edge = [dist(6, 0xC00 + 10, 2, 1), line(10, 40, 1), line(11, 40, 0), dist(12, 0x800 + 40, 2, 1)]
    for pinned, left in ((0, 0), (1, 1)):
        m = replay([*RESET, *edge], end=S, observed=ALL, latch_pinned=pinned).metrics
        assert m["lockstep.gic_latches_left_behind"] == left


def test_the_story_names_each_register() -> None:
    written = [dist(10, 0x104, 1 << 8), cpu_if(11, 4, 0xF0), cpu_if(12, 4, 0xF0, flags=1), cpu_if(13, 0, 1, flags=2),
               eoi(14, 40, virtual=1), dirs(15, 40, virtual=1), dirs(16, 40)]  # fmt: skip
    (f,) = [f for f in replay([*RESET, *written, ack(20, 40)], end=30, observed=ALL).findings if f.code.name == EXTRA]
    assert [e.label for e in f.evidence] == [
        "GICD 0x104 = 0x100 by cpu 0", "GICC 0x4 = 0xf0 by cpu 0", "GICV 0x4 = 0xf0 by cpu 0",
        "GICH 0x0 = 0x1 by cpu 0", "virtual EOIR 0x28 by cpu 0", "virtual DIR 0x28 by cpu 0", "DIR 0x28 by cpu 0",
        "IAR 0x28 by cpu 0",
    ]  # fmt: skip
    last = [cpu_if(17, 0, 1, flags=3), eoi(18, 60), ack(20, 60, virtual=1)]
    f = replay([*RESET, *GUEST, *last], end=30, observed=ALL).findings[-1]
    last_three = [e.label for e in f.evidence][-3:]
    assert last_three == ["GICH 0x0 = 0x1 by cpu 0", "EOIR 0x3c by cpu 0", "virtual IAR 0x3c by cpu 0"]


def test_lockstep_has_at_least_the_private_interrupts_and_one_list_register_and_at_most_64() -> None:
    first = [dist(6, 0x104, 1), dist(7, 0x800 + 32, 1, 1), line(10, 32, 1), ack(11, 1023)]
    assert lockstep([*RESET, *first], irqs=1) == ({"ack": (1, 1, 0, 0)}, [])
    assert [t for t, _, _ in lockstep([*RESET, *first], irqs=33)[1]] == [11]
    for nr_lrs, there in ((0, 1), (100, 64)):
        reads = [hyp_read(10, 0x100 + 4 * (there - 1), 0), hyp_read(11, 0x100 + 4 * there, 0)]
        assert lockstep([*RESET, *reads], nr_lrs=nr_lrs)[0] == {"gich_read": (1, 1, 0, 0)}


def test_lockstep_one_cause_is_one_mismatch_whatever_it_was() -> None:
    level = [line(20, 40, 1), ack(30, 1023), ack(40, 40)]
    assert [t for t, _, _ in lockstep([*RESET, *level])[1]] == [30]
    edge = [dist(6, 0xC00 + 10, 2, 1), line(20, 40, 1), ack(30, 1023), ack(40, 1023)]
    assert [t for t, _, _ in lockstep([*RESET, *edge])[1]] == [30]
    sgi = [dist(6, 0xF00, 1 << 16), ack(30, 1023), ack(40, 1023)]  # SGI 0 for core 0
    assert lockstep([*RESET, *sgi])[1] == [(30, "gic ack cpu 0x0 0x0", "gic ack cpu 0x0 0x3ff")]
    two = [*GUEST, cpu_if(17, 0x104, lr_word(60, PENDING, 0x80), flags=2), ack(20, 50, virtual=1)]
    after = [hyp_read(21, 0x0F0, 1 << 20), hyp_read(22, 0x104, lr_word(60, PENDING, 0x80)), ack(23, 60, virtual=1)]
    assert [t for t, _, _ in lockstep([*RESET, *two, *after])[1]] == [20]


def test_lockstep_compares_a_private_interrupt_without_a_core_with_core_0() -> None:
    timer = [dist(6, 0x100, 1 << 27), dist(7, 0x400 + 27, 0x40, 1), line(10, 27, 1), ack(11, 27)]
    assert lockstep([*RESET, *timer]) == ({"ack": (1, 1, 0, 0)}, [])


LEVEL = dist(1, 0xC00 + 10, 0, 1)  # 40 to 43 are level


@pytest.mark.parametrize(
    ("events", "counts"),
    [
        # Enabled and triggered how: only when both were seen, and on this core.
        ([LEVEL, best(10, 40, 0xA0, 0x100), ack(20, 40)], (1, 1, 0, 0)),
        ([LEVEL, best(10, 43, 0xA0, 0x100), ack(20, 43)], (1, 1, 0, 0)),
        ([LEVEL, best(10, 39, 0xA0, 0x100), ack(20, 39)], (0, 1, 0, 1)),
        ([LEVEL, best(10, 44, 0xA0, 0x100), ack(20, 44)], (0, 1, 0, 1)),
        ([best(10, 32, 0xA0, 0x100), ack(20, 32)], (0, 1, 0, 1)),
        ([best(10, 31, 0xA0, 0x100), ack(20, 31)], (1, 1, 0, 0)),
        ([best(10, 27, 0xA0, 0x100), ack(20, 27, cpu=1)], (0, 1, 0, 1)),
        ([best(10, 27, 0xA0, 0x100, virtual=1), ack(20, 27)], (0, 1, 0, 1)),
        ([dist(1, 0xC00 + 10, 2, 1), best(10, 40, 0xA0, 0x100), ack(20, 40)], (1, 1, 0, 0)),  # an edge is latched
        # It may be meant for several cores.
        ([LEVEL, best(10, 40, 0xA0, 0x100), best(11, 40, 0xA0, 0x100, cpu=1), ack(20, 40, cpu=1)], (1, 1, 0, 0)),
        # Banked priorities: what core 1 says of its 27 is nothing about core 0's.
        ([best(10, 27, 0x80, 0x100), best(11, 27, 0x20, 0x100, cpu=1), best(12, 26, 0x40, 0x100), ack(20, 26)],
         (1, 1, 0, 0)),
        # Nothing was ever said of it.
        ([ack(20, 0)], (0, 1, 0, 1)),
        ([dist(0, 0x104, 1 << 8), ack(20, 41)], (0, 1, 0, 1)),
        # A level interrupt whose line was never seen may still be up after it was taken.
        ([ack(20, 27), eoi(30, 27), ack(40, 27)], (0, 2, 0, 2)),
        # Its line is up, and yet the core is told of nothing: then it is an edge, and over.
        ([best(10, 40, 0xA0, 0x100), ack(20, 1023), ack(30, 1023)], (1, 2, 0, 1)),
        # Nothing of this outlives a gap.
        ([LEVEL, best(10, 40, 0xA0, 0x100), lost(11), ack(20, 40)], (0, 1, 0, 1)),
        ([LEVEL, best(10, 40, 0xA0, 0x100), lost(11), best(12, 40, 0xA0, 0x100), ack(20, 40)], (0, 1, 0, 1)),
        ([*RESET, line(10, 40, 1), lost(11), best(12, 27, 0xB0, 0x100), ack(13, 27)], (1, 1, 0, 0)),
    ],
)  # fmt: skip
def test_lockstep_that_begins_late_knows_what_it_saw(events: list[Event], counts: tuple[int, ...]) -> None:
    assert lockstep(events) == ({"ack": counts, **lockstep([e for e in events if e[1] != "gic.ack"])[0]}, [])


def test_lockstep_that_begins_late_learns_registers_and_running_priorities() -> None:
    again = [ack(20, 27), eoi(30, 27), ack(40, 27), eoi(50, 27)]  # private, taken again without DIR: EOImode was 0
    assert replay(again, end=S, observed=ALL).metrics["lockstep.gic_deactivations"] == 1
    for offset in (0x104, 0x108, 0x10C, 0x0F0):
        counts, wrong = lockstep([hyp_read(40, offset, 0), hyp_read(50, offset, 0)])
        assert (counts["gich_read"], wrong) == ((1, 2, 0, 1), [])
    counts, wrong = lockstep([best(10, 1023, 0x100, 0x60), ack(20, 1023), best(30, 1023, 0x100, 0x60), ack(40, 1023)])
    assert (counts["running_priority"], wrong) == ((1, 2, 0, 1), [])
    counts, wrong = lockstep([best(10, 1023, 0x100, 0x80, virtual=1), ack(20, 1023)])
    assert (counts["virtual_running_priority"], wrong) == ((0, 1, 0, 1), [])
    every = [cpu_if(n, offset, 0, flags=2) for n, offset in enumerate((0, 8, 0xF0, 0x100, 0x104, 0x108, 0x10C))]
    assert lockstep([*every, ack(20, 1023, virtual=1)])[0] == {"virtual_ack": (1, 1, 0, 0)}
    assert lockstep([*every[1:], ack(20, 1023, virtual=1)])[0] == {"virtual_ack": (0, 1, 0, 1)}


def test_lockstep_compares_the_virtual_running_priority_with_the_virtual_interface() -> None:
    counts, wrong = lockstep([*RESET, *GUEST, best(21, 1023, 0x100, 0x60, virtual=1), ack(22, 1023)])
    assert counts["virtual_running_priority"] == (1, 1, 1, 0)
    assert wrong == [(21, "gic virtual running priority cpu 0x0 0x100", "gic virtual running priority cpu 0x0 0x60")]


def test_lockstep_compares_nothing_across_a_gap_and_tells_nothing_of_before() -> None:
    assert lockstep([*RESET, best(10, 1023, 0x100, 0x80), lost(11), line(12, 40, 1)])[1] == []
    after = [(t + 20, kind, fields) for t, kind, fields in RESET]
    assert lockstep([*RESET, lost(10), *after, ack(40, 40)])[1] == []  # the second one proves nothing: open
    run = replay([*RESET, lost(10), line(11, 41, 1), hyp_read(12, 0x100, 0), hyp_read(13, 0x100, 1)], end=S,
                 observed=ALL)  # fmt: skip
    assert [e.label for e in run.findings[0].evidence] == ["line of 0x29 = 0x1"]


def test_lockstep_counts_drops_of_either_interface() -> None:
    m = replay([*RESET, *GUEST, *ENDED, eoi(60, 40)], end=S, observed=ALL).metrics
    assert (m["lockstep.gic_priority_drops"], m["lockstep.gic_virtual_priority_drops"]) == (2, 1)


def test_lockstep_counts_the_first_shared_interrupt_left_behind() -> None:
    edge = [dist(6, 0xC00 + 8, 2, 1), dist(7, 0x800 + 32, 1, 1), line(10, 32, 1), dist(12, 0x800 + 32, 2, 1)]
    m = replay([*RESET, *edge], end=S, observed=ALL, latch_pinned=1).metrics
    assert m["lockstep.gic_latches_left_behind"] == 1


# -- details of the registers --------------------------------------------------------------------------------------


def test_after_reset_nothing_is_forwarded() -> None:
    d = GicDistributor(64, 2)
    d.send_sgi(1, 0, 1)
    assert d.best_pending(0) == -1
    d.write(0, 4, 1, 0)
    assert d.best_pending(0) == 1
    c = GicCpuInterface(d, 0)
    c.write(4, 0xFF)
    assert c.signalled() == -1  # GICC_CTLR is 0
    c.write(0, 1)
    assert c.signalled() == 1


def test_binary_point_0_compares_seven_bits() -> None:
    d = gicd()
    c = gicc(d)
    d.write(0x400 + 40, 1, 0xA2, 0)
    d.set_line(40, 1)
    c.acknowledge()
    d.send_sgi(1, 0, 1)
    for priority, preempts in ((0xA3, -1), (0xA1, 1), (0xA0, 1)):
        d.write(0x400 + 1, 1, priority, 0)
        assert c.signalled() == preempts


def test_a_write_reaches_no_further_than_its_size() -> None:
    d = gicd()
    d.write(0x104, 1, 0x1FF, 0)
    assert d.enabled[32:42] == [3] * 9 + [0]  # 40 was before
    d.write(0xC00 + 10, 1, 0x2AA, 0)
    assert d.edge[39:45] == [False, True, True, True, True, False]
    d.write(0xC00 + 10, 1, 2 << 4, 0)
    assert d.edge[40:44] == [False, False, True, False]
    d.write(0xF30, 4, 0xFF, 0)  # beyond SPENDSGIR
    assert not any(d.latch)


def test_an_sgi_taken_without_a_source_leaves_none() -> None:
    d = gicd()
    assert d.activate(3, 0) == 0
    d.deactivate(3, 0)
    d.send_sgi(3, 1, 1)
    assert (d.activate(3, 0), d.latch[3]) == (1, 0)


def test_dir_is_not_missing_for_what_was_taken_again() -> None:
    """It could not be taken while it was active (S6.3)."""
    before = [cpu_if(5, 0, 0x201), ack(10, 40), eoi(20, 40), dirs(30, 40), ack(40, 40), eoi(50, 40)]
    assert codes(replay([*before, ack(60, 40)], end=500, dir_ns=100)) == []
    assert told(replay(before, end=500, dir_ns=100)) == [(NO_DIR, 150, 40, 100)]


def test_priority_inversion_is_against_the_innermost() -> None:
    nested = [ack(10, 40, 0xA0), ack(20, 50, 0x80), ack(30, 60, 0x90)]
    assert [(f.code.name, f.t, f.obj) for f in replay(nested, end=100).findings] == [(INVERSION, 30, 60)]


def test_a_gap_of_core_0_leaves_core_1_alone() -> None:
    assert codes(replay([ack(1, 40, cpu=1), eoi(2, 40, cpu=1), lost(5, 0), eoi(10, 40, cpu=1)])) == [UNMATCHED]


def test_every_code_is_named_in_a_test() -> None:
    text = open(__file__, encoding="utf-8").read()  # noqa: PTH123, SIM115
    assert [code.name for code in CODES if f'"{code.name}"' not in text] == []
