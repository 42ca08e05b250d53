"""The short cuts of the local APIC leave behind what its rules would have: findings, numbers and every register; and
what fills recordings really goes the short way."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from replay.declare import Config
from replay.events import KIND_ID, NIL, NONE, Batch
from replay.sink import Sink
from replay.systems.apic import SYSTEM, short_cuts
from replay.systems.apic.machine import ApicMachine
from replay.systems.apic.services import codes_of, find_runs
from replay.systems.apic.short_cuts import QuickApicMachine
from replay.systems.apic.state import STORY, Processor

MS = 1_000_000
COLUMNS = ApicMachine.columns
#: (kind, processor, fields); a time is given when it is fed.
Step = tuple[str, str, dict[str, int]]
WHO: dict[str, dict[str, int]] = {
    "cpu1": {"cpu": 1}, "cpu2": {"cpu": 2}, "d0v0": {"dom": 0, "vcpu": 0}, "d0v1": {"dom": 0, "vcpu": 1},
    "d1v0": {"dom": 1, "vcpu": 0},
}  # fmt: skip
PHYSICAL = ("cpu1", "cpu2")
APICS = frozenset({"lapic.accept", "lapic.deliver", "lapic.eoi", "lapic.idle", "lapic.tpr", "sched.run", "sched.stop"})


def batch(rows: Sequence[tuple[int, Step]], first: int) -> Batch:
    """Times and steps as columns; `first`: the number of the first event."""
    absent = {"val": NIL, "val2": NIL, "flags": 0}
    made: dict[str, list[int]] = {name: [] for name in COLUMNS}
    for number, (t, (kind, who, fields)) in enumerate(rows):
        row = {**WHO.get(who, {}), **fields, "kind": KIND_ID[kind], "t_ns": t, "seq": first + number}
        for name in COLUMNS:
            made[name].append(row.get(name, absent.get(name, NONE)))
    return Batch({name: np.array(values, np.int64) for name, values in made.items()}, len(rows))


def registers(p: Processor) -> dict[str, Any]:
    """All that the rules know of a processor."""
    lapic = p.lapic
    return {
        **{name: getattr(lapic, name) for name in ("irr", "irr_known", "isr", "isr_unknown_below", "tmr", "tpr")},
        **{name: getattr(p, name) for name in (
            "cpu", "dom", "vcpu", "frames", "frames_known", "running", "conf", "requested_at", "returned_at",
            "generation", "deliverable_since", "serial",
        )},
        "recent": list(p.recent), "deliveries": list(p.deliveries), "eois": list(p.eois),
    }  # fmt: skip


class Pair:
    """A machine with and one without short cuts, fed the same."""

    def __init__(self, *, known: bool = True, observed: Iterable[str] | None = None, **config: int) -> None:
        self.quick, self.plain = (
            kind(Config(SYSTEM.parameters, config), Sink(closed=False)) for kind in (QuickApicMachine, ApicMachine)
        )
        for machine in (self.quick, self.plain):
            machine.from_boot = known
            machine.observed = None if observed is None else frozenset(observed)
        self.count = 0

    def feed(self, rows: Sequence[tuple[int, Step]]) -> None:
        """One batch; the registers are the same afterwards."""
        made = batch(rows, self.count)
        self.count += len(rows)
        self.quick.feed(made)
        self.plain.feed(made)
        assert self.quick.now == self.plain.now == rows[-1][0]
        assert list(self.quick.processors) == list(self.plain.processors)
        for key, p in self.plain.processors.items():
            assert registers(self.quick.processors[key]) == registers(p)

    def end(self, t: int) -> list[str]:
        """The findings' codes, which are the same as everything else."""
        for machine in (self.quick, self.plain):
            machine.finish(t)
            machine.sink.settle()
        assert self.quick.sink.findings == self.plain.sink.findings
        assert self.quick.metrics() == self.plain.metrics()
        return [f.code.name for f in self.plain.sink.findings]


# -- anything at all ---------------------------------------------------------------------------------------------------


@dataclass
class Guesses:
    """What processors do, in any order; `odd`: how often something else than services happens."""

    draw: random.Random
    vectors: tuple[int, ...]
    odd: float
    shown: frozenset[str] | None

    def service(self, who: str, below: int = 0x100) -> list[Step]:
        draw = self.draw
        vector = draw.choice([v for v in self.vectors if v < below] or list(self.vectors))
        steps: list[Step] = [("lapic.accept", who, {"obj": vector}), ("lapic.deliver", who, {"obj": vector})]
        for _ in range(draw.choice((0, 0, 0, 1, 1, 2))):
            inner = draw.choice(self.vectors)
            at = draw.choice((1, 2, 2, 2))
            steps[at:at] = [
                ("lapic.accept", who, {"obj": inner}), ("lapic.deliver", who, {"obj": inner}), ("lapic.eoi", who, {}),
            ]  # fmt: skip
        steps.append(("lapic.eoi", who, draw.choice(({}, {}, {"obj": vector}))))
        if draw.random() < 0.3:
            steps.append(("lapic.exit", who, {"obj": vector}))
        if draw.random() < 0.2:
            steps.append(("lapic.idle", who, {}))
        if draw.random() < self.odd:
            del steps[draw.randrange(len(steps))]
        return steps

    def other(self, who: str) -> list[Step]:
        draw = self.draw
        vector = draw.choice((*self.vectors, 0, 5, 0x10, 0xFF, 0x100, 0x131))
        where = {"cpu": draw.choice((1, 2))}
        run: Step = (draw.choice(("sched.run", "sched.stop")), who, where)
        return [draw.choice((
            ("lapic.accept", who, {"obj": vector}), ("lapic.accept", who, {"obj": vector, "flags": 1}),
            ("lapic.deliver", who, {"obj": vector}), ("lapic.eoi", who, {"obj": vector}), ("lapic.eoi", who, {}),
            ("lapic.idle", who, {}), ("lapic.reset", who, {}),
            ("lapic.tpr", who, {"val": draw.choice((0, 0, 0x0F, 0x10, 0x1F, 0x40, -1))}),
            ("lapic.snapshot", who, {"obj": draw.choice((0, 1)), "tgt": 0, "val": draw.choice((0, 1 << 0x31))}),
            ("lapic.deliver", who, {}), run if who not in PHYSICAL else ("lapic.eoi", who, {}),
            ("trace.lost", "", {"cpu": draw.choice((1, 3)), "val": 0}),
        ))]  # fmt: skip

    def steps(self, count: int) -> list[Step]:
        draw = self.draw
        owners = draw.sample(sorted(WHO), draw.choice((1, 2, 3)))
        queues: dict[str, list[Step]] = {who: [] for who in owners}
        out: list[Step] = [("sched.run", who, {"cpu": 3}) for who in owners if who not in PHYSICAL]
        while len(out) < count:
            who = draw.choice(owners)
            if not queues[who]:
                queues[who] = self.other(who) if draw.random() < self.odd else self.service(who)
            step = queues[who].pop(0)
            if self.shown is None or step[0] in self.shown:
                out.append(step)
        return out


@pytest.mark.parametrize("seed", range(30))
def test_the_short_cuts_leave_every_register_as_the_rules_do(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    for _ in range(4):
        shown = draw.choice((None, APICS, APICS, APICS - {"lapic.accept"}, APICS | {"lapic.exit", "lapic.reset"}))
        vectors = draw.choice(
            ((0x31,), (0x31, 0x41), (0x31, 0x32, 0x41, 0x51), (0x31, 0x41, 0xF1), (0x31, 0xFF), (0x11, 0x21))
        )
        guesses = Guesses(draw, vectors, draw.choice((0.0, 0.05, 0.3)), shown)
        limits = {"nesting_limit": draw.choice((0, 1, 2, 2, 2, 3)), "irr_stuck_ns": draw.choice((0, 400, 2_000, MS))}
        pair = Pair(known=draw.random() < 0.5, observed=shown, **limits)
        monkeypatch.setattr(short_cuts, "STRIDE", draw.choice((3, 1 << 15, 1 << 15)))
        monkeypatch.setattr(short_cuts, "TRIES", draw.choice((1, 2, 32)))
        gaps = draw.choice(((0, 10), (10, 300, 5_000), (10, 100, 400, 2_000)))
        t = 0
        for _ in range(draw.choice((1, 2, 4))):
            rows: list[tuple[int, Step]] = []
            for step in guesses.steps(draw.choice((8, 30, 60))):
                t += draw.choice(gaps)
                rows.append((t, step))
            pair.feed(rows)
        pair.end(t + draw.choice((0, 3 * MS)))


Rows = list[tuple[int, Step]]


def rows_of(*parts: tuple[int, Sequence[Step]], gap: int = 10) -> Rows:
    """Steps that follow each other, each part from its time on."""
    return [(t + gap * n, step) for t, steps in parts for n, step in enumerate(steps)]


def fed(*batches: Rows, end: int = 0, **how: Any) -> list[str]:
    pair = Pair(**{"observed": APICS, **how})
    for rows in batches:
        pair.feed(rows)
    return pair.end(max(end, batches[-1][-1][0]))


@pytest.mark.parametrize("value", [0, 0x0F, 0x10, 0x1F, 0x20, 0x2F, 0x30])
@pytest.mark.parametrize("vector", [0x15, 0x1F, 0x20, 0x25, 0x2F, 0x31])
def test_a_delivery_shows_that_tpr_was_lowered(value: int, vector: int) -> None:
    """Whoever takes a short cut under a TPR that holds the vector back leaves TPR as it was."""
    low: Step = ("lapic.tpr", "cpu1", {"val": value})
    assert fed(rows_of((0, service(vector) * 4)), rows_of((1_000, [low, *service(vector) * 3]))) == []


def test_what_was_learnt_is_forgotten_in_a_gap() -> None:
    gap: Step = ("trace.lost", "", {"cpu": 1, "val": 900})
    after = rows_of((2_000, service(0x31) * 4))
    assert fed(rows_of((0, service(0x31) * 4)), rows_of((1_000, [gap])), after) == []
    assert fed(rows_of((0, service(0x31) * 4)), rows_of((1_000, [*service(0x31), gap, *service(0x31)])), after) == []


def test_a_batch_may_begin_and_end_inside_handlers() -> None:
    """When they were entered is remembered from the first row on."""
    begun = [*service(0x31) * 2, *service(0x41) * 2]
    inner = service(0x41)
    whole = [*service(0x31)[:2], *inner, *service(0x31)[2:]]
    for first in range(len(whole)):
        for last in range(first, len(whole) + 1):
            parts = begun + whole[:first], whole[first:last], whole[last:]
            assert fed(*(rows_of((1_000 * n, part)) for n, part in enumerate(parts) if part)) == []


def test_a_spurious_vector_after_a_reset_is_spurious_still() -> None:
    reset: Step = ("lapic.reset", "cpu1", {})
    assert fed(rows_of((0, service(0x31))), rows_of((1_000, [*service(0xFF)[:2], reset, *service(0xFF)[:2]]))) == []


@pytest.mark.parametrize("tries", [1, 2, 32])
def test_runs_that_do_not_fit_are_taken_row_by_row(tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something else is requested, from the first row on or later."""
    monkeypatch.setattr(short_cuts, "TRIES", tries)
    begun = [*service(0x31) * 2, *service(0x41) * 2]
    asked = service(0x41)[:1]
    for first, second in ((asked, service(0x31) * 5), ([], [*service(0x31) * 5, *asked, *service(0x31) * 5])):
        told = fed(rows_of((0, [*begun, *first])), rows_of((1_000, second)))
        assert set(told) == {"lapic-not-highest"}


@pytest.mark.parametrize("who", ["d0v0", "d1v0"])
def test_a_request_that_is_not_served_is_told(who: str) -> None:
    """Where it is the last of many that were, with its time-out in the same batch or after it."""
    begun: list[Step] = [("sched.run", who, {"cpu": 3}), ("lapic.tpr", who, {"val": 0})]
    whole = service(0x31, who=who)
    noise: list[Step] = [("lapic.eoi", "cpu2", {})]
    start = rows_of((0, [*begun, *whole * 3, *service(0x41, who=who)]))
    for asked in (whole[:1], [*whole[:2], ("lapic.accept", who, {"obj": 0x41})]):
        for t in (1_000, MS - 500, 5 * MS):
            second = rows_of((t, [*whole * 5, *asked]))
            told = [] if len(asked) > 1 else ["lapic-irr-stuck"]
            assert fed(start, second, end=20 * MS, observed=APICS) == ["lapic-irr-stuck"]
            assert told == [] or fed(start, second + rows_of((t + 9 * MS, noise)), observed=APICS)[:1] == told


def test_pins_hear_of_what_was_served_before_and_after_them() -> None:
    entry: Step = ("ioapic.rte", "", {"obj": 20, "val": 0x31, "val2": 1 << 15 | 0x31 | 1 << 56})
    rise: Step = ("ioapic.line", "", {"obj": 20, "val": 1})
    pins = {"ioapic.rte", "ioapic.line", *APICS}
    mixed = [*service(0x31) * 5, entry, rise, *service(0x31) * 5]
    for known in (True, False):
        fed(rows_of((0, service(0x31) * 4)), rows_of((1_000, mixed)), rows_of((2_000, service(0x31) * 4)),
            observed=pins, known=known)  # fmt: skip


# -- what goes the short way -----------------------------------------------------------------------------------------


def service(vector: int, *inner: Step, who: str = "cpu1", named: bool = False) -> list[Step]:
    """A request, its delivery, what happens meanwhile, its EOI."""
    eoi: dict[str, int] = {"obj": vector} if named else {}
    return [("lapic.accept", who, {"obj": vector}), ("lapic.deliver", who, {"obj": vector}), *inner,
            ("lapic.eoi", who, eoi)]  # fmt: skip


@dataclass
class Ways:
    """How the steps of a batch were taken: by the method of a rule, or in runs of services."""

    long: int
    runs: int


def ways(
    first: list[Step], steps: list[Step], monkeypatch: pytest.MonkeyPatch, *, hidden: Iterable[str] = (), gap: int = 10,
    before: Sequence[list[Step]] = (), **config: int,
) -> Ways:  # fmt: skip
    """Of `steps`, when the rules have seen `before` and `first` already, in batches of their own."""
    found = Ways(0, 0)
    long_way, serve = QuickApicMachine.long_way, QuickApicMachine.serve

    def counted_long(self: QuickApicMachine, lane: Any, row: int) -> None:
        found.long += 1
        long_way(self, lane, row)

    def counted_serve(self: QuickApicMachine, lane: Any, run: int) -> bool:
        done = serve(self, lane, run)
        found.runs += done
        return done

    monkeypatch.setattr(QuickApicMachine, "long_way", counted_long)
    monkeypatch.setattr(QuickApicMachine, "serve", counted_serve)
    pair = Pair(observed=APICS - set(hidden), **config)
    t = 0
    for part in (*before, first, steps):
        found.long = found.runs = 0
        rows = [(t + gap * n, step) for n, step in enumerate(s for s in part if s[0] not in hidden)]
        pair.feed(rows)
        t = rows[-1][0] + gap
    pair.end(t)
    monkeypatch.undo()
    return found


A = service(0x31)
OTHER = [(kind, "cpu2", fields) for kind, _, fields in A]
NEST = service(0x31, *service(0x41))


@pytest.mark.parametrize("hidden", [(), ("lapic.accept",)], ids=["", "no-accepts"])
def test_services_are_taken_in_runs(hidden: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    per = 3 - len(hidden)
    assert ways(A * 4, A * 50, monkeypatch, hidden=hidden) == Ways(0, 1)
    assert ways(A * 4 + OTHER * 4, (A + OTHER) * 50, monkeypatch, hidden=hidden) == Ways(0, 2)
    assert ways(A, service(0x32) * 50, monkeypatch, hidden=hidden).long == per - 1  # of EOIs all is known
    assert ways(A, service(0x31, named=True) * 50, monkeypatch, hidden=hidden) == Ways(0, 1)
    assert ways([*A, ("lapic.idle", "cpu1", {})], [*A, ("lapic.idle", "cpu1", {})] * 50, monkeypatch,
                hidden=hidden) == Ways(0, 1)  # fmt: skip
    # The first ever: each kind of event goes to its rule once.
    assert ways([("lapic.idle", "cpu2", {})], A * 50, monkeypatch, hidden=hidden) == Ways(per, 1)


def test_an_entry_that_was_just_written_hears_of_every_eoi() -> None:
    """Its story is told when it is rewritten in flight."""
    words = {v: ("ioapic.rte", "", {"obj": 20, "val": v, "val2": 1 << 15 | v | 1 << 56}) for v in (0x31, 0x41)}
    rise: Step = ("ioapic.line", "", {"obj": 20, "val": 1})
    steps = [*service(0x31) * 5, words[0x31], *service(0x31) * 3, rise, words[0x41]]
    told = fed(rows_of((0, service(0x31) * 4)), rows_of((1_000, steps)), observed={"ioapic.rte", "ioapic.line", *APICS})
    assert told == ["ioapic-rte-change-inflight"]


@pytest.mark.parametrize("vector", [0, 1, 0x100])
def test_an_eoi_that_names_an_odd_vector_names_another(vector: int) -> None:
    odd: list[Step] = [*service(0x31)[:2], ("lapic.eoi", "cpu1", {"obj": vector})]
    assert fed(rows_of((0, service(0x31) * 4)), rows_of((1_000, odd * 2))) == ["lapic-eoi-wrong-vector"] * 2


@pytest.mark.parametrize("count", [255, 256, 257, 320])
def test_more_processors_than_a_byte_can_name(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """vCPUs whose numbers differ by 256 take turns, and one of them was idle."""
    crowd: list[Step] = [("lapic.idle", "", {"dom": 1, "vcpu": 0})] + [
        (kind, "", {"dom": 1, "vcpu": vcpu, **fields}) for kind, _, fields in A for vcpu in range(count)
    ]
    assert ways(crowd, crowd, monkeypatch) == Ways(0, count)


@pytest.mark.parametrize("hidden", [(), ("lapic.accept",)], ids=["", "no-accepts"])
def test_services_that_interrupt_a_service_are_taken_in_its_run(
    hidden: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    both = A + service(0x41) + NEST
    assert ways(both, NEST * 50, monkeypatch, hidden=hidden) == Ways(0, 1)
    assert ways(both, (A + NEST) * 50, monkeypatch, hidden=hidden) == Ways(0, 1)
    twice = service(0x31, *service(0x41), *service(0x41))
    assert ways(both, twice * 50, monkeypatch, hidden=hidden) == Ways(0, 1)
    # So is one of which the batch shows a part only, row by row.
    assert ways([*both * 2, *service(0x31)[:2]], service(0x41)[:2], monkeypatch, hidden=hidden) == Ways(0, 0)
    # Three inside each other are for the rules, where the third frame is one too many.
    deep = service(0x31, *service(0x41, *service(0x51)))
    assert ways(both + service(0x51), deep * 3, monkeypatch, hidden=hidden).long >= 3
    # With a limit of one so is the second.
    assert ways(both, NEST * 3, monkeypatch, hidden=hidden, nesting_limit=1).long >= 3
    # What interrupts must be of a higher class.
    assert ways(both, service(0x41, *service(0x31)) * 3, monkeypatch, hidden=hidden).long >= 3


def test_services_inside_a_longer_handler_are_taken_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The handler of 0x31 is at work when the batch begins, or is interrupted by something that is not plain."""
    begun = A + service(0x41) + A[:2]
    assert ways(begun, service(0x41) * 50 + A[2:], monkeypatch) == Ways(0, 1)
    assert ways(begun, service(0x32) * 3, monkeypatch).runs == 0  # of its own class
    assert ways(begun, NEST[:0] + service(0x41) * 5, monkeypatch, nesting_limit=1).runs == 0


def test_what_is_not_whole_goes_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request comes while another vector is served: two steps more, none of them for the rules."""
    known = A + service(0x41) + NEST
    late = [*A[:2], ("lapic.accept", "cpu1", {"obj": 0x41}), ("lapic.deliver", "cpu1", {"obj": 0x41}),
            ("lapic.eoi", "cpu1", {"obj": 0x41}), ("lapic.eoi", "cpu1", {"obj": 0x31})]  # fmt: skip
    odd = [*A[:1], ("lapic.idle", "cpu1", {}), *A[1:]]
    assert ways(known + odd, odd * 20, monkeypatch).long == 0
    assert ways(known, late * 20, monkeypatch).long == 0
    # The batch ends inside.
    for count in (1, 2):
        assert ways(known, [*A[:2], *service(0x41)[:count]], monkeypatch) == Ways(0, 0)
    # A service that is the rest of another, and runs after it.
    assert ways(known + A[:1], A[1:] + A * 20, monkeypatch) == Ways(0, 1)
    assert ways(known + A[:2], A[2:] + A * 20, monkeypatch) == Ways(0, 1)


@pytest.mark.parametrize("hidden", [(), ("lapic.accept",)], ids=["", "no-accepts"])
def test_the_deepest_nesting_is_that_of_the_short_ways_too(hidden: tuple[str, ...]) -> None:
    flat = A * 2 + service(0x41) * 2
    late = [*A[:2], ("lapic.accept", "cpu1", {"obj": 0x41}), ("lapic.idle", "cpu1", {}), *service(0x41)[1:], A[2]]
    inside = [*A[:2], *service(0x41) * 3]
    whole = [rows_of((1_000, s)) for s in (NEST * 3, late, inside, [*inside, A[2]])]
    if not hidden:
        waits = rows_of((1_000, [*A[:2], service(0x41)[0]]), (3 * MS, [*service(0x41)[1:], A[2]]))  # no run
        whole += [rows_of((1_000, [*A[:2], *service(0x41)[:2]])), waits + rows_of((4 * MS, [service(0x41)[0], *A * 3]))]
    for rows in whole:
        pair = Pair(observed=APICS - set(hidden))
        for some in (rows_of((0, [*flat, ("lapic.idle", "cpu1", {})])), rows):
            pair.feed([row for row in some if row[1][0] not in hidden])
        pair.end(5 * MS)
        assert pair.plain.metrics()["max_nesting"] == 2


def test_what_the_rules_must_see_goes_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: Step = ("lapic.reset", "cpu1", {})
    tpr: Step = ("lapic.tpr", "cpu1", {"val": 0x40})
    low: Step = ("lapic.tpr", "cpu1", {"val": 0x1F})  # Linux leaves 0x10 there
    level: Step = ("lapic.accept", "cpu1", {"obj": 0x31, "flags": 1})
    assert ways(A * 4, [reset, *A * 50], monkeypatch) == Ways(1, 1)
    assert ways([*A * 4, reset], A * 50, monkeypatch) == Ways(3, 1)  # what was learnt is forgotten
    assert ways(A * 4, A * 50, monkeypatch, before=[[*A * 4, reset]]) == Ways(0, 1)  # and learnt again
    gap: Step = ("trace.lost", "", {"cpu": 2, "val": 0})
    assert ways([*A * 4, gap], A * 50, monkeypatch) == Ways(0, 1)  # of another CPU; the next batch is plain again
    assert ways([*A * 4, tpr], A * 5, monkeypatch).long == 2  # a delivery shows that TPR was lowered
    assert ways([*A * 4, low], A * 5, monkeypatch) == Ways(0, 1)
    assert ways(A * 4, [*A * 20, ("lapic.eoi", "cpu1", {}), *A * 20], monkeypatch) == Ways(1, 2)
    assert ways(A * 4, [level, *A[1:], *A * 5], monkeypatch) == Ways(4, 1)  # TMR is 0 again with the next request
    other: Step = ("lapic.accept", "cpu1", {"obj": 0x41, "flags": 1})
    assert ways(A * 4, [other, *service(0x41)[1:], *A * 5], monkeypatch) == Ways(3 * 6, 0)  # TMR stays
    assert ways(A * 4, [("trace.lost", "", {"cpu": 2, "val": 0}), *A * 5], monkeypatch).long > 10


def test_a_watch_of_requests_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vCPU's requests are timed: the watch is put off while it serves one after the other."""
    vcpu: list[Step] = [(kind, "d1v0", fields) for kind, _, fields in A]
    assert ways(vcpu * 4, vcpu * 50, monkeypatch, irr_stuck_ns=200) == Ways(0, 1)
    for gap in (30, 60):  # one request has to put the watch into the agenda again
        assert ways(vcpu * 4, vcpu * 50, monkeypatch, gap=gap, irr_stuck_ns=200) == Ways(1, 1)
    # A request that is younger than the watch waits on.
    idle: list[Step] = [("lapic.idle", "cpu2", {})]
    steps = [*idle * 5, vcpu[0], *idle * 3, vcpu[1]]
    assert ways(vcpu * 4 + idle, steps, monkeypatch, irr_stuck_ns=200) == Ways(0, 0)
    # It is put off once without a request, then it ends, and the next request begins another.
    for count, long in ((10, 0), (100, 1)):
        for services in (1, 4):
            steps = vcpu * services + idle * count + vcpu[:1]
            assert ways(vcpu * 4 + idle, steps, monkeypatch, irr_stuck_ns=200) == Ways(long, 1)


# -- find_runs, beside what it means -----------------------------------------------------------------------------------

ACCEPT, DELIVER, EOI, NOISE, OVERLOOKED = 1, 2, 3, 0, 4
#: begin, end, asked (positions among the rows of a slot), vector, deep
Service = tuple[int, int, int, int, bool]


def services_of(
    rows: list[int], steps: Any, vectors: Any, times: Any, pattern: tuple[int, ...], patience: int, nesting: bool
) -> list[Service]:
    """Services in the rows of one slot, by their definition."""

    def plain(at: int) -> int:
        """The vector of the service that begins there without interruption; 0 for none."""
        some = rows[at : at + len(pattern)]
        vector = int(vectors[some[0]])
        good = tuple(int(steps[r]) for r in some) == pattern and all(int(vectors[r]) == vector for r in some[:-1])
        if not good or int(vectors[some[-1]]) not in (0, vector):
            return 0
        return 0 if len(pattern) > 2 and times[some[1]] - times[some[0]] >= patience else vector

    out: list[Service] = []
    at = 0
    while at < len(rows):
        if plain(at):
            out.append((at, at + len(pattern), at, plain(at), False))
            at += len(pattern)
            continue
        some = rows[at : at + len(pattern) - 1]
        vector = int(vectors[rows[at]])
        begins = tuple(int(steps[r]) for r in some) == pattern[:-1] and all(int(vectors[r]) == vector for r in some)
        if len(pattern) > 2 and begins:
            begins = bool(times[some[1]] - times[some[0]] < patience)
        inner = at + len(pattern) - 1
        classes, asked = [], -1
        while inner < len(rows) and plain(inner):
            classes.append(plain(inner) >> 4)
            asked = inner
            inner += len(pattern)
        ended = inner < len(rows) and int(steps[rows[inner]]) == EOI and int(vectors[rows[inner]]) in (0, vector)
        if nesting and begins and ended and classes and min(classes) > vector >> 4:
            out.append((at, inner + 1, asked, vector, True))
            at = inner + 1
        else:
            at += 1
    return out


@pytest.mark.parametrize("seed", range(12))
def test_runs_are_what_they_are_called(seed: int) -> None:
    draw = random.Random(seed)
    for _ in range(8):
        pattern = draw.choice(((ACCEPT, DELIVER, EOI), (DELIVER, EOI)))
        nesting, patience = draw.random() < 0.7, draw.choice((50, 1 << 60))
        rows: list[tuple[int, int, int]] = []
        queues: list[list[tuple[int, int]]] = [[] for _ in range(draw.choice((1, 2, 3)))]
        for _ in range(draw.choice((3, 20, 60))):
            slot = draw.randrange(len(queues))
            if not queues[slot]:
                queues[slot] = some(draw, pattern)
            step, vector = queues[slot].pop(0)
            rows.append((slot, step, vector))
        slots, steps, vectors = (np.array(column, np.uint8) for column in zip(*rows, strict=True))
        times = np.cumsum([draw.choice((10, 10, 10, 60)) for _ in rows])
        codes = codes_of(steps, vectors)
        found = find_runs(slots, steps == OVERLOOKED, codes, times, pattern, patience, nesting)
        expected: list[tuple[list[int], list[Service]]] = []  # the rows of a slot, the services of a run
        for slot in range(len(queues)):
            mine = [i for i in range(len(rows)) if slots[i] == slot and steps[i] != OVERLOOKED]
            whole: list[list[Service]] = []
            for one in services_of(mine, steps, vectors, times, pattern, patience, nesting):
                if whole and whole[-1][-1][1] == one[0]:
                    whole[-1].append(one)
                else:
                    whole.append([one])
            expected += [(mine, run) for run in whole]
        if found is None:
            assert not any(not service[4] for _, run in expected for service in run)
            continue
        assert found.heads.tolist() == [mine[run[0][0]] for mine, run in expected]
        inside = {row for mine, run in expected for row in mine[run[0][0] : run[-1][1]]}
        assert set(np.flatnonzero(found.tails).tolist()) == inside - set(found.heads.tolist())
        assert found.lowest == [min(s[3] >> 4 for s in run) for _, run in expected]
        assert found.deep == [any(s[4] for s in run) for _, run in expected]
        assert found.asked == [mine[run[-1][2]] for mine, run in expected]
        assert found.ended == [mine[run[-1][1] - 1] for mine, run in expected]
        for n, (mine, run) in enumerate(expected):
            spoken = [row for row in mine[run[0][0] : run[-1][1]] if steps[row] != ACCEPT]
            assert found.story(n)[-STORY:] == spoken[-STORY:]
        for n, (mine, run) in enumerate(expected):
            for service, following in zip(run, [*run[1:], None], strict=True):
                assert found.head(n) == mine[service[0]]
                assert found.shorten(n).tolist() == mine[service[0] : service[1]]
                assert found.head(n) == (-1 if following is None else mine[following[0]])


def some(draw: random.Random, pattern: tuple[int, ...]) -> list[tuple[int, int]]:
    """Steps and vectors of one slot: mostly services, some inside others."""
    vector = draw.choice((0x31, 0x41, 0x51))
    inner = [(step, draw.choice((0x41, 0x51, 0x61))) for step in pattern] * draw.choice((0, 0, 1, 2))
    if draw.random() < 0.8:
        inner = [(step, 0x52) for _ in range(draw.choice((0, 0, 1, 2))) for step in pattern]
    out = [(step, vector) for step in pattern[:-1]] + inner
    out.append((EOI, draw.choice((0, vector, vector, 0x61))))
    if draw.random() < 0.1:
        out.insert(draw.randrange(len(out)), (draw.choice((NOISE, OVERLOOKED)), 0))
    if draw.random() < 0.1:
        del out[draw.randrange(len(out))]
    return out
