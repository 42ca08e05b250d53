"""Short cuts for what fills most of a recording: request, delivery and EOI on a processor that serves nothing else.

`ApicMachine` is the law, one method for each rule; here is only speed. A batch of events is looked at column by column
first. Then one loop takes what is plain: on a *calm* processor (nothing requested, or one vector requested, or one in
service, nothing else) a request, a delivery and an EOI move it to the next of these three states, exactly as `accept`,
`deliver` and `eoi` do when no rule has anything to say. Anything else first writes the state back to the registers
(`restore`) and then goes to the method of its rule.

What a rule *learns* from an event (a bit of IRR or a class of ISR is known from now on) it learns from the first event
of its kind, vector and processor, until the processor's state is forgotten or reset (`generation`); so that one always
goes the long way, and the short cut has nothing to learn. Row numbers stand for time and event number until somebody
asks.

Whole services that follow each other on a calm processor are one step of the loop (`services`), taken when the first
row comes. Where that row finds the processor not calm, the rows of the first service go one by one and the run begins
after it; when that has happened a few times, all rows of that processor to the stretch's end go one by one.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Final

import numpy as np

from replay.agenda import SOFTWARE
from replay.columns import counted, dense, first_of_each
from replay.declare import Config
from replay.events import INF, KINDS, Batch
from replay.hardware.lapic import VECTOR_BIT, VECTORS
from replay.sink import Sink
from replay.systems.apic.ioapic_monitor import STUCK_LIMIT, IoApicMonitor
from replay.systems.apic.machine import (
    ACCEPT,
    DELIVER,
    EOI,
    HPET_FIRE,
    IDLE,
    IOAPIC_LINE,
    IRR_WATCH,
    LOST,
    ApicMachine,
)
from replay.systems.apic.services import BYTE, Runs, codes_of, find_runs
from replay.systems.apic.state import STORY, Processor

__all__ = ["QuickApicMachine"]

# States of a lane.
AWAKE: Final = 0  # anything: the registers hold the truth
REST: Final = 1  # nothing requested, nothing in service
ASKED: Final = 2  # one vector in IRR
SERVING: Final = 3  # one vector in ISR, its handler is the only one
ASKED_AGAIN: Final = 4  # as SERVING, and one of a higher class in IRR
NESTED: Final = 5  # two in ISR, the handler of the higher class runs on top of the other

# What an event asks of a lane.
SLOW: Final = 0
TO_ACCEPT: Final = 1
TO_DELIVER: Final = 2
TO_EOI: Final = 3
TO_IDLE: Final = 4
TO_SERVE: Final = 5  # a run of whole services
STEPS: Final = 8  # a power of two above them

#: Rows that are looked at together.
STRIDE: Final = 1 << 16
#: Times that runs of services of a processor are tried in a stretch, though it was not calm when one began.
TRIES: Final = 32
#: The lowest vector that goes the short way, and the lowest TPR that would hold it back: Linux leaves 0x10 in its TPR,
#: which holds back exceptions only.
LOWEST: Final = 2 << 4
#: In place of the vector of an EOI that names none.
UNNAMED: Final = 0

_STEP: Final = np.zeros(len(KINDS), np.uint8)
_STEP[[ACCEPT, DELIVER, EOI, IDLE]] = (TO_ACCEPT, TO_DELIVER, TO_EOI, TO_IDLE)


class Lane:
    """A processor as the loop sees it. Unless AWAKE, `state` and `vector` stand for IRR, ISR, frames and requests.

    `vector` is the one requested last, or in service; `outer` the one below it in service (ASKED_AGAIN, NESTED).
    `asked`, `entered`, `outer_entered` and `ended` are the rows of the last request, deliveries and EOI taken here, -1
    for none; then the one time that matters is `kept`, from the registers. `rows` are deliveries and EOIs, the
    last of them for the story. `learnt`: steps and vectors of which the rules have seen an event since `generation` of
    the processor began, as step * VECTORS + vector.
    """

    __slots__ = (
        "asked", "ended", "entered", "eois", "generation", "kept", "key", "learnt", "outer", "outer_entered",
        "processor", "rows", "state", "vector",
    )  # fmt: skip

    def __init__(self, key: int) -> None:
        self.key: int = key
        self.processor: Processor | None = None
        self.eois: list[int] = []  # the processor's
        self.state: int = AWAKE
        self.vector: int = UNNAMED
        self.outer: int = UNNAMED
        self.outer_entered: int = -1
        self.kept: int = 0
        self.asked: int = -1
        self.entered: int = -1
        self.ended: int = -1
        self.rows: list[int] = []
        self.learnt: set[int] = set()
        self.generation: int = 0


class Plan:
    """What the loop will do with the rows of a stretch: `steps` and `vectors` of each. `delivered` are its deliveries
    as (slot, vector, number), `first` what the rules will have learnt at its end."""

    __slots__ = ("delivered", "first", "steps", "vectors")

    def __init__(self, steps: Any, vectors: Any) -> None:
        self.steps: Any = steps
        self.vectors: Any = vectors
        self.delivered: list[tuple[int, int, int]] = []
        self.first: list[tuple[Lane, int]] = []


class QuickApicMachine(ApicMachine):
    """`ApicMachine` with short cuts; findings and numbers are the same."""

    def __init__(self, config: Config, sink: Sink) -> None:
        super().__init__(config, sink)
        self.lanes: dict[int, Lane] = {}  # by key of the processor
        self.shut: bool = False  # something happened after which the present stretch takes no short cuts
        self.batch: Batch | None = None  # the present stretch, and some of its columns
        self.kinds: Any = ()
        self.vectors: Any = ()
        self.flags: Any = ()
        self.times: Any = ()
        self.seqs: Any = ()
        self.runs: Runs | None = None  # of the present stretch
        self.step_of: Any = _STEP

    def feed(self, batch: Batch) -> None:
        """Feed a batch of events, in order."""
        if not self.started:
            self.start()
            if self.exits_traced:  # then an EOI ends no handler
                self.step_of = np.where(_STEP == TO_EOI, np.uint8(SLOW), _STEP)
        for start in range(0, len(batch), STRIDE):
            part = batch.slice(start, STRIDE)
            if self.lockstep is not None or self.ioapics or self.monitor.nesting_limit < 1:
                self.consume(part.rows(self.columns))
            else:
                self.stretch(part)

    def stretch(self, batch: Batch) -> None:
        """Feed the rows of one stretch."""
        self.batch = batch
        self.kinds = memoryview(batch.array("kind"))
        self.vectors = memoryview(batch.array("obj"))
        self.flags = memoryview(batch.array("flags"))
        self.times = memoryview(batch.array("t_ns"))
        self.seqs = memoryview(batch.array("seq"))
        self.shut = False
        slots, lanes = self.assign(batch)
        plan = self.plan(batch, slots, lanes)
        before = [self.deliveries(lanes[slot], vector) for slot, vector, _ in plan.delivered]
        self.take_rows(lanes, slots, plan)
        for (slot, vector, count), others in zip(plan.delivered, before, strict=True):
            # Whatever the methods of the rules counted.
            self.processors[lanes[slot].key].deliveries[vector] = others + count
        for lane, learnt in plan.first:
            if lane.generation == self.generation(lane):
                lane.learnt.add(learnt)
        self.now = self.times[len(batch) - 1]
        self.batch = None

    def generation(self, lane: Lane) -> int:
        """The processor's; the first one where it has not appeared yet."""
        p = self.processors.get(lane.key)
        return 0 if p is None else p.generation

    def deliveries(self, lane: Lane, vector: int) -> int:
        """Of a vector by a processor up to now."""
        p = self.processors.get(lane.key)
        return 0 if p is None else p.deliveries[vector]

    def assign(self, batch: Batch) -> tuple[Any, list[Lane]]:
        """For each row the index of its lane in the list of lanes."""
        dom = batch.array("dom")
        unit = batch.array("vcpu")
        if dom.min() < 0:
            unit = np.where(dom >= 0, unit, batch.array("cpu"))
        low = int(unit.min())
        width = int(unit.max()) - low + 1
        which = dom.astype(np.int64)
        which *= width
        which += unit
        which -= low
        found, slots = dense(which)
        lanes = []
        for value in found.tolist():
            owner, member = divmod(value, width)
            key = owner << 16 | member + low if owner >= 0 else -1 - (member + low)
            lane = self.lanes.get(key)
            if lane is None:
                self.lanes[key] = lane = Lane(key)
            lanes.append(lane)
        return slots, lanes

    def plan(self, batch: Batch, slots: Any, lanes: list[Lane]) -> Plan:
        """For each row its step; SLOW where only a rule's method will do."""
        named = batch.array("obj")
        flags = batch.array("flags")
        steps = self.step_of.take(batch.array("kind"))
        vectors = named.astype(np.uint8)
        vectors *= (named >= 0).view(np.uint8)  # none is UNNAMED
        strange = (named == UNNAMED) | (named >= VECTORS)
        if flags.any():
            strange |= (steps == TO_ACCEPT) & (flags & 1 != 0)
        if strange.any():
            steps[strange] = SLOW
            vectors[strange] = UNNAMED
        which = slots * (STEPS * VECTORS)
        which += codes_of(steps, vectors)
        bound = len(lanes) * STEPS * VECTORS
        for lane in lanes:
            generation = self.generation(lane)
            if lane.generation != generation:
                lane.generation = generation
                lane.learnt.clear()
        plan = Plan(steps, vectors)
        slow: list[int] = []
        new: dict[int, int] = {}  # by element of `which` what the rules learn from its first row
        for index, count in zip(*counted(which, bound), strict=True):
            slot, code = divmod(index, STEPS * VECTORS)
            step, vector = divmod(code, VECTORS)
            if step == TO_DELIVER and vector != UNNAMED:
                plan.delivered.append((slot, vector, count))
            if step in (TO_ACCEPT, TO_DELIVER) and (
                vector < LOWEST or (step == TO_DELIVER and vector == self.spurious_vector)
            ):
                slow.append(index)
            elif step != SLOW:
                learnt = code if step in (TO_ACCEPT, TO_DELIVER) else step * VECTORS  # an EOI is one, named or not
                if learnt not in lanes[slot].learnt:
                    new[index] = slot * STEPS * VECTORS + learnt
        if slow:
            steps[np.isin(which, slow)] = SLOW
        if new:
            rows = np.sort(first_of_each(which, bound))
            met: set[int] = set()
            for row, index in zip(rows.tolist(), which[rows].tolist(), strict=True):
                if index in new and new[index] not in met:
                    met.add(new[index])
                    steps[row] = SLOW
            for value in met:
                slot, learnt = divmod(value, STEPS * VECTORS)
                plan.first.append((lanes[slot], learnt))
        return plan

    def take_rows(self, lanes: list[Lane], slots: Any, plan: Plan) -> None:
        """All rows of the stretch; runs of services at their first row, if their processor is calm then."""
        self.runs = runs = self.whole_services(slots, len(lanes), plan)
        codes = plan.steps.copy()
        values = plan.vectors.astype(np.int64)
        left = np.ones(len(codes), np.bool_)
        if runs is not None:
            codes[runs.heads] = TO_SERVE
            values[runs.heads] = np.arange(len(runs.heads))
            left = ~runs.tails
            left &= plan.steps != TO_IDLE  # a halt teaches once
        of_row = np.array(lanes, object)
        tried = dict.fromkeys(range(len(lanes)), 0)
        for lane in lanes:
            self.settle(lane)
        at = 0
        while at >= 0:
            rows = np.flatnonzero(left[at:]) + at
            at = self.run_rows(
                rows.tolist(), of_row[slots[rows]].tolist(), codes[rows].tolist(), values[rows].tolist()
            )
            if at >= 0 and runs is not None:  # not calm: this service, in the end all of the processor, row by row
                slot = int(slots[at])
                tried[slot] += 1
                run = int(values[at])
                rows = runs.shorten(run) if tried[slot] < TRIES else np.flatnonzero(slots[at:] == slot) + at
                codes[rows] = plan.steps[rows]
                values[rows] = plan.vectors[rows]
                left[rows] = True
                head = runs.head(run) if tried[slot] < TRIES else -1
                if head >= 0:
                    codes[head] = TO_SERVE
                    values[head] = run
                    left[head] = True
        for lane in lanes:
            self.restore(lane)
        if runs is not None:
            # A delivery that the loop did not take was in a run, and has its EOI there.
            rows = np.flatnonzero(left & (np.asarray(self.kinds) == DELIVER) & (codes != TO_SERVE))
            looped = np.bincount(slots[rows] * VECTORS + plan.vectors[rows], minlength=len(lanes) * VECTORS)
            for slot, vector, count in plan.delivered:
                served = count - int(looped[slot * VECTORS + vector])
                if served:
                    lanes[slot].eois[vector] += served
        self.runs = None

    def whole_services(self, slots: Any, lanes: int, plan: Plan) -> Runs | None:
        """Runs of services; None where a row concerns all processors."""
        kinds = np.asarray(self.kinds)
        if self.exits_traced or np.any((kinds == LOST) | ((kinds >= IOAPIC_LINE) & (kinds <= HPET_FIRE))):
            return None
        pattern = (TO_ACCEPT, TO_DELIVER, TO_EOI) if self.monitor.accepts_seen else (TO_DELIVER, TO_EOI)
        return find_runs(
            slots.astype(np.uint8 if lanes <= BYTE else np.uint16), plan.steps == TO_IDLE,
            codes_of(plan.steps, plan.vectors), np.asarray(self.times), pattern, self.irr_stuck_ns or INF,
            self.monitor.nesting_limit >= 2,
        )  # fmt: skip

    def serve(self, lane: Lane, run: int) -> bool:
        """A run of services, if this processor is calm; the registers are afterwards as before."""
        runs = self.runs
        assert runs is not None  # the step was planned with them
        if lane.state == SERVING:
            if self.monitor.nesting_limit < 2 or runs.deep[run] or runs.lowest[run] <= lane.vector >> 4:
                return False
            self.monitor.max_nesting = max(self.monitor.max_nesting, 2)
        elif lane.state != REST:
            return False
        elif runs.deep[run]:
            self.monitor.max_nesting = max(self.monitor.max_nesting, 2)
        lane.asked = runs.asked[run]
        lane.ended = runs.ended[run]
        lane.rows.append(~run)
        return True

    def run_rows(self, rows: list[int], lanes: list[Lane], steps: list[int], vectors: list[int]) -> int:
        """The loop. Returns the first row of a run that cannot be taken, -1 when all rows are done."""
        heap = self.agenda.heap
        accepts_seen = self.monitor.accepts_seen
        nesting = self.monitor.nesting_limit >= 2
        due = heap[0][0] if heap else INF
        deepest = 0
        stop: int = bisect_left(self.times, due)  # the row before which an entry of the agenda is due
        for i, lane, step, vector in zip(rows, lanes, steps, vectors):  # noqa: B905 (all are of one length)
            if i >= stop:
                self.advance(self.times[i])
                due = heap[0][0] if heap else INF
                stop = bisect_left(self.times, due, i + 1)
            state = lane.state
            if step == TO_DELIVER:
                if (state == ASKED and lane.vector == vector) or (state == REST and not accepts_seen):
                    lane.state = SERVING
                    lane.vector = vector
                    lane.entered = i
                    lane.rows.append(i)
                    continue
                if state == SERVING and not accepts_seen and nesting and vector >> 4 > lane.vector >> 4:
                    lane.outer = lane.vector
                    lane.outer_entered = lane.entered
                    lane.vector = vector
                    state = ASKED_AGAIN
                if state == ASKED_AGAIN and lane.vector == vector:
                    lane.state = NESTED
                    lane.entered = i
                    lane.rows.append(i)
                    deepest = 2
                    continue
            elif step == TO_EOI:
                if state in (SERVING, NESTED) and (vector in (UNNAMED, lane.vector)):
                    lane.ended = i
                    lane.rows.append(i)
                    lane.eois[lane.vector] += 1
                    if state == SERVING:
                        lane.state = REST
                    else:
                        lane.state = SERVING
                        lane.vector = lane.outer
                        lane.entered = lane.outer_entered
                    continue
            elif step == TO_ACCEPT:
                if state == REST:
                    lane.state = ASKED
                    lane.vector = vector
                    lane.asked = i
                    continue
                if state == SERVING and nesting and vector >> 4 > lane.vector >> 4:
                    lane.state = ASKED_AGAIN
                    lane.outer = lane.vector
                    lane.outer_entered = lane.entered
                    lane.vector = vector
                    lane.asked = i
                    continue
            elif step == TO_SERVE:
                if self.serve(lane, vector):
                    continue
                self.monitor.max_nesting = max(self.monitor.max_nesting, deepest)
                return i
            elif step == TO_IDLE and state != AWAKE:
                continue
            self.long_way(lane, i)
            if heap and heap[0][0] != due:
                due = heap[0][0]
                stop = bisect_left(self.times, due, i + 1)
        self.monitor.max_nesting = max(self.monitor.max_nesting, deepest)
        return -1

    def long_way(self, lane: Lane, row: int) -> None:
        """An event that goes to the method of its rule."""
        self.restore(lane)
        self.now = self.times[row]
        kind: int = self.kinds[row]
        p = lane.processor
        if p is not None and kind in (ACCEPT, DELIVER, EOI) and not self.open_gaps:
            vector: int = self.vectors[row]
            seq: int = self.seqs[row]
            if kind == EOI:
                self.eoi(p, vector, seq)
            elif not 0 <= vector < VECTORS:
                pass  # a damaged record names no vector
            elif kind == DELIVER:
                self.deliver(p, vector, seq)
            else:
                self.accept(p, vector, bool(self.flags[row] & 1), seq)
        elif self.batch is not None:
            _, seq, _, *rest = self.batch.row(row, self.columns)
            self.event(kind, seq, lane.key, *rest)
            lane.processor = p = self.processors.get(lane.key)
            if p is not None:
                lane.eois = p.eois
        self.settle(lane)

    def settle(self, lane: Lane) -> None:
        """Registers to lane: find out whether the processor is calm. A TPR that holds a class back is for the rules,
        and so is the request that puts the next watch into the agenda."""
        p = lane.processor
        if p is None or self.shut or self.open_gaps or (self.watches(p) and not p.watched):
            return
        lapic = p.lapic
        if lapic.tmr or lapic.tpr >= LOWEST:  # UNKNOWN is below all
            return
        if lapic.isr:
            if len(lapic.isr) == 1 == len(p.frames) and not lapic.irr and not p.requested_at:
                lane.vector, lane.kept = p.frames[0]
                if lane.vector == lapic.isr[0]:
                    lane.state = SERVING
        elif p.frames:
            return
        elif lapic.irr:
            if len(p.requested_at) == 1:
                lane.vector, lane.kept = next(iter(p.requested_at.items()))
                if lapic.irr == VECTOR_BIT[lane.vector]:
                    lane.state = ASKED
        elif not p.requested_at:
            lane.state = REST

    def watches(self, p: Processor) -> bool:
        """Whether a request needs an entry in the agenda."""
        return bool(self.irr_stuck_ns) and p.dom >= 0 and self.monitor.accepts_seen

    def restore(self, lane: Lane) -> None:
        """Lane to registers: write what `accept`, `deliver` and `eoi` would have written since `settle`."""
        state = lane.state
        p = lane.processor
        if state == AWAKE or p is None:
            return
        lane.state = AWAKE
        times = self.times
        entered = times[lane.entered] if lane.entered >= 0 else lane.kept
        outer_entered = times[lane.outer_entered] if lane.outer_entered >= 0 else lane.kept
        lapic = p.lapic
        lapic.irr = 0
        p.requested_at.clear()
        if state in (ASKED, ASKED_AGAIN):
            lapic.irr = VECTOR_BIT[lane.vector]
            p.requested_at[lane.vector] = times[lane.asked] if lane.asked >= 0 else lane.kept
        p.frames.clear()
        if state in (ASKED_AGAIN, NESTED):
            p.frames.append((lane.outer, outer_entered))
        if state in (SERVING, NESTED):
            p.frames.append((lane.vector, entered))
        lapic.isr = [vector for vector, _ in p.frames]
        if lane.ended >= 0:
            p.deliverable_since = times[lane.ended]
        for row in self.last_rows(lane.rows):
            vector = self.vectors[row] if self.kinds[row] == DELIVER else -1
            p.recent.append((times[row], self.seqs[row], vector))
        lane.rows.clear()
        lane.asked = lane.entered = lane.outer_entered = lane.ended = -1

    def last_rows(self, rows: list[int]) -> list[int]:
        """The last rows for a story; a run of services stands in the list as its complement."""
        last = rows[-STORY:]
        if self.runs is not None:
            last = [r for row in last for r in (self.runs.story(~row) if row < 0 else (row,))]
        return last[-STORY:]

    # -- what concerns processors that are calm ------------------------------------------------------------------

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        lane = self.lanes.get(self.by_serial[a].key) if action != STUCK_LIMIT else None
        if lane is None:
            super().fire(action, a, b, c)
            return
        if action == IRR_WATCH and lane.state in (REST, SERVING, NESTED) and lane.asked >= 0:
            # Nothing is requested that is not served in time, but it is busy: watch on, in place of the next `accept`.
            asked: int = self.times[lane.asked]
            if asked > self.now:  # the last one of a run of services is still to come
                self.agenda.at(asked + self.irr_stuck_ns, SOFTWARE, IRR_WATCH, a, 0, c)
                return
            lane.asked = -1
            self.agenda.at(self.now + self.irr_stuck_ns, SOFTWARE, IRR_WATCH, a, 0, c)
            return
        self.restore(lane)
        super().fire(action, a, b, c)
        self.settle(lane)

    def taint(self, cpu: int, t0: int, t1: int) -> None:
        self.no_more_short_cuts()
        super().taint(cpu, t0, t1)

    def ioapic(self, dom: int) -> IoApicMonitor:
        if dom not in self.ioapics:
            self.no_more_short_cuts()  # pins wait to hear of deliveries and EOIs
        return super().ioapic(dom)

    def no_more_short_cuts(self) -> None:
        """The rest of the stretch goes by the rules."""
        self.shut = True
        for lane in self.lanes.values():
            self.restore(lane)
