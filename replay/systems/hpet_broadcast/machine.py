"""HPET broadcast, predicted: stimuli in, and the policy decides who programs what and who is woken (spec S1.3-S1.5).

The machine owns the hardware side (comparator, message, LAPIC acceptance, handler stack) and the steps that all
policies share; who gets a channel, whether it may be retargeted, how a handler is entered and what happens when an
owner wakes are the policy's hooks.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

import numpy as np

from replay.agenda import HARDWARE, SOFTWARE
from replay.declare import Config
from replay.events import INF, KIND_ID, NONE, Batch
from replay.hardware.lapic import vector_class
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.hpet_broadcast.monitor import HpetMonitor
from replay.systems.hpet_broadcast.policies import EARLY_EOI, BroadcastPolicy
from replay.systems.hpet_broadcast.state import Channel, Cpu, Frame

__all__ = ["HpetBroadcast"]

ENTER: Final = KIND_ID["idle.enter"]
BREAK: Final = KIND_ID["idle.break"]
EXIT: Final = KIND_ID["idle.exit"]
ISR_BEGIN: Final = KIND_ID["isr.begin"]
ISR_END: Final = KIND_ID["isr.end"]

#: Rows that are made at a time.
STRIDE: Final = 1 << 13

# Actions of the agenda.
MATCH: Final = 1
HANDLER_END: Final = 2
REENTER: Final = 3
RESUME: Final = 4


class HpetBroadcast(Machine):
    """`n_channels` comparators shared by `n_cpus` CPUs."""

    columns: ClassVar[tuple[str, ...]] = ("kind", "t_ns", "cpu", "obj", "val")

    def __init__(self, policy: BroadcastPolicy, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.policy = policy
        self.slop_ns = config.integer("slop_ns")
        self.min_delta_ns = config.integer("min_delta_ns")
        self.max_delta_ns = config.integer("max_delta_ns")
        self.handler_ns = config.integer("handler_ns")
        self.rewake_busy_ns = config.integer("rewake_busy_ns")
        self.vector = config.integer(policy.vector_parameter)
        # N = 0 means one channel through IRQ0.
        self.channels = [Channel(i) for i in range(max(1, config.integer("n_channels")))]
        self.cpus = [Cpu(i) for i in range(config.integer("n_cpus"))]
        self.monitor = HpetMonitor(
            sink,
            slop_ns=self.slop_ns,
            miss_ns=config.integer("miss_ns"),
            stack_limit=config.integer("stack_limit"),
        )
        self.rr = 0  # round-robin cursor of A1
        self.serial = 0
        self.irqs = 0
        self.reprograms = 0
        self.retargets = 0
        self.refusals = 0
        self.wake_ipis = 0
        self.joins = 0
        self.shortens = 0
        self.pushed = 0
        self.dropped_bodies = 0
        self.moved_deadlines = 0

    def load(self, init: Mapping[str, Any]) -> None:
        """`init.S1.channels[]` = {owner, dest, members, next, deadlines}: CPUs that already sleep."""
        for channel, given in zip(self.channels, init.get("S1", {}).get("channels", ()), strict=False):
            channel.owner = given["owner"]
            channel.used = True
            channel.dest = given.get("dest", channel.owner) if self.policy.retargets else channel.owner
            for member in given["members"]:
                cpu = self.cpu(member)
                cpu.asleep = True
                cpu.channel = channel.index
                cpu.deadline = given["deadlines"][str(member)]
                if self.policy.owner_is_member or member != channel.owner:
                    channel.members |= 1 << member
            channel.next_event = given["next"]
            self.arm(channel, given["next"])

    def cpu(self, index: int) -> Cpu:
        """The CPU, which a recording may name before `n_cpus` said so."""
        while index >= len(self.cpus):
            self.cpus.append(Cpu(len(self.cpus)))
        return self.cpus[index]

    # -- event glue --------------------------------------------------------------------------------------------

    def feed(self, batch: Batch) -> None:
        """As `consume`. A recorded exit only tells the next entry of its CPU when it was: that is found in columns."""
        cpus = batch.array("cpu")
        if not len(batch) or int(cpus.min()) < 0 or int(cpus.max()) >= len(self.cpus):
            self.consume(batch.rows(self.columns))
            return
        kinds, times = batch.array("kind"), batch.array("t_ns")
        exits = kinds == EXIT
        moves = np.flatnonzero(exits | (kinds == ENTER))
        moves = moves[np.argsort(cpus[moves], kind="stable")]  # by CPU, and of each in order
        told = np.where(exits[moves], times[moves], NONE)
        first = np.ones(len(moves), np.bool_)
        first[1:] = cpus[moves[1:]] != cpus[moves[:-1]]
        exited = np.full(len(batch), NONE, np.int64)
        exited[moves[1:]] = told[:-1]
        heads = moves[first]
        exited[heads] = [self.cpus[index].recorded_exit for index in cpus[heads].tolist()]
        last = np.append(first[1:], True)[: len(moves)]
        left = list(zip(cpus[moves[last]].tolist(), told[last].tolist(), strict=True))
        for lo in range(0, len(batch), STRIDE):
            rows = np.flatnonzero(~exits[lo : lo + STRIDE]) + lo
            columns = (kinds, times, cpus, batch.array("obj"), batch.array("val"), exited)
            self.consume_without_exits(zip(*(column[rows].tolist() for column in columns), strict=True))
        for index, t in left:
            self.cpus[index].recorded_exit = t

    def consume_without_exits(self, rows: Iterable[tuple[int, ...]]) -> None:
        """Rows without idle.exit; `exited` is when the last one was that came after the CPU's last entry."""
        heap = self.agenda.heap
        cpus = self.cpus
        for kind, t, index, obj, val, exited in rows:
            if heap and heap[0][0] <= t:
                self.advance(t)
            else:
                self.now = t
            cpu = cpus[index]
            if kind == ENTER:
                cpu.recorded_exit = exited
                self.recorded_enter(cpu, val if val > 0 else INF)
            elif kind == BREAK:
                if cpu.asleep:
                    self.leave(cpu, unrelated=True)
            elif kind == ISR_BEGIN:
                cpu.in_service.append(obj)
            elif kind == ISR_END:
                self.isr_end(cpu, obj)

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        for kind, t, cpu, obj, val in rows:
            self.advance(t)
            if cpu < 0:
                continue  # nobody knows where it was
            if kind == ENTER:
                self.recorded_enter(self.cpu(cpu), val if val > 0 else INF)
            elif kind == EXIT:
                self.cpu(cpu).recorded_exit = t
            elif kind == BREAK:
                self.broken(self.cpu(cpu))
            elif kind == ISR_BEGIN:
                self.cpu(cpu).in_service.append(obj)
            elif kind == ISR_END:
                self.isr_end(self.cpu(cpu), obj)

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        if action == MATCH:
            channel = self.channels[a]
            if channel.timer != self.now:  # there is an entry that is earlier or later
                return
            channel.timer = INF
            if channel.gen == c:
                self.match(channel)
            elif channel.armed_for < INF:  # the comparator was written anew since
                self.time(channel)
        elif action == HANDLER_END:
            self.handler_end(self.cpus[a], b)
        elif action == REENTER:
            self.enter(self.cpus[a], b)
        elif action == RESUME:
            # A deadline that passed while the body was pushed asks for a wake at once; it is the push that is late.
            self.enter(self.cpus[a], max(b, self.now))

    # -- sleeping and waking -----------------------------------------------------------------------------------

    def recorded_enter(self, cpu: Cpu, deadline: int) -> None:
        """A recorded idle entry. What the CPU did since its recorded wake is a body that follows the predicted one.

        C2, C7: if the model woke the CPU later than the recording did, the sleep begins when the body has ended; an
        entry that would come too early keeps its recorded time, and the deadline is never shifted (C6). If the model
        still sleeps, the recorded wake was surplus: with the deadline unchanged it did no work and is dropped (C5);
        with another deadline something moved the timers, which ends the model's sleep too.
        """
        body = self.now - cpu.recorded_exit if cpu.recorded_exit != NONE else 0
        cpu.recorded_exit = NONE
        if body and cpu.asleep:
            if abs(deadline - cpu.deadline) <= self.slop_ns:
                self.dropped_bodies += 1
                return
            self.moved_deadlines += 1
            cpu.deadline = INF
            self.broken(cpu)
        elif body and cpu.woke_at + body > self.now:
            self.pushed += 1
            self.agenda.at(cpu.woke_at + body, SOFTWARE, RESUME, cpu.index, deadline)
            return
        self.enter(cpu, deadline)

    def enter(self, cpu: Cpu, deadline: int) -> None:
        """A CPU goes idle with an absolute deadline. Ignored when it is asleep already."""
        if cpu.asleep:
            return
        cpu.asleep = True
        cpu.deadline = deadline
        self.policy.pick(self, cpu)

    def broken(self, cpu: Cpu) -> None:
        """Something else than the HPET or a broadcast ends the sleep."""
        if cpu.asleep:
            self.leave(cpu, unrelated=True)

    def leave(self, cpu: Cpu, *, unrelated: bool) -> None:
        """A8/B6-B8: the CPU leaves idle and its channel; one that was woken too early will go back to sleep."""
        cpu.asleep = False
        if not unrelated:
            self.effects.append((self.now, cpu.index))
        deadline = cpu.deadline
        if not unrelated or self.now - deadline > self.slop_ns:
            self.monitor.woke(self.now, cpu.index, deadline, unrelated=unrelated)
        channel = self.channels[cpu.channel] if cpu.channel != NONE else None
        if channel is not None:
            self.policy.on_exit(self, channel, cpu)
        cpu.woke_at = self.now
        if not unrelated and deadline < INF and deadline - self.now > self.slop_ns:
            self.agenda.at(self.now + self.rewake_busy_ns, SOFTWARE, REENTER, cpu.index, deadline)

    def wake_by_ipi(self, cpu: Cpu) -> None:
        """A7/B6: another CPU's handler wakes this one."""
        self.wake_ipis += 1
        if cpu.asleep:
            self.leave(cpu, unrelated=False)

    # -- comparator --------------------------------------------------------------------------------------------

    def program(self, channel: Channel, expire: int, *, forced: bool) -> None:
        """A4: aim the comparator at `expire`. Unforced, a time that has passed is a failure; forced, it is late."""
        self.reprograms += 1
        delta = expire - self.now
        if delta <= 0 and not forced:
            return
        channel.next_event = expire
        self.arm(channel, self.now + min(max(delta, self.min_delta_ns), self.max_delta_ns))

    def arm(self, channel: Channel, at: int) -> None:
        """Write the comparator; an earlier match is no longer due."""
        channel.gen += 1
        self.agenda.serial += 1
        channel.armed_for = at
        channel.serial = self.agenda.serial
        if at < channel.timer:
            self.time(channel)

    def time(self, channel: Channel) -> None:
        """An entry in the agenda for the next match. Most writes are undone before, and the entry of one does for the
        next that may be later."""
        at = channel.timer = channel.armed_for
        heapq.heappush(self.agenda.heap, (at, HARDWARE, channel.serial, MATCH, channel.index, 0, channel.gen))

    def disarm(self, channel: Channel) -> None:
        """Push the comparator a full wrap away."""
        channel.gen += 1
        channel.armed_for = INF
        channel.next_event = INF

    def retarget(self, channel: Channel, cpu: int) -> None:
        """Point the message at `cpu` (A5, or B1's one write). The first write of an unset target moves nothing."""
        if channel.dest == cpu:
            return
        if channel.dest != NONE:
            self.retargets += 1
        channel.dest = cpu

    # -- interrupt ---------------------------------------------------------------------------------------------

    def match(self, channel: Channel) -> None:
        """H1: the counter reached the comparator; the message goes to `dest` (A6)."""
        self.irqs += 1
        cpu = self.cpu(channel.dest)
        blocker = self.blocker(cpu)
        if blocker == NONE:
            self.take(channel, cpu)
            return
        if channel.index not in cpu.pending:  # IRR collapses duplicates
            cpu.pending.append(channel.index)
        if blocker != self.vector:
            self.monitor.blocked(self.now, channel.index, cpu.index, blocker, self.vector)

    def blocker(self, cpu: Cpu) -> int:
        """A6: the highest vector in service that holds the HPET's back; NONE if it can be taken."""
        if not cpu.in_service and not cpu.stack:
            return NONE
        highest = self.vector if cpu.stack and self.policy.entry_mode != EARLY_EOI else NONE
        for vector in cpu.in_service:
            highest = max(highest, vector)
        return highest if vector_class(highest) >= vector_class(self.vector) else NONE

    def take(self, channel: Channel, cpu: Cpu) -> None:
        """A6, A7: acknowledge, and run the handler unless the same interrupt is being handled elsewhere."""
        self.monitor.taken(self.now, channel.index, cpu.index, channel.owner, channel.members)
        if cpu.index == channel.dest:
            channel.move_in_progress = False
        for frame in cpu.stack:
            frame.end += self.handler_ns
        self.serial += 1
        cpu.stack.append(Frame(channel.index, self.now + self.handler_ns, self.serial))
        self.agenda.at(self.now + self.handler_ns, SOFTWARE, HANDLER_END, cpu.index, self.serial)
        self.monitor.entered(self.now, channel.index, cpu.index, len(cpu.stack))
        if channel.handler_cpu == NONE:
            channel.handler_cpu = cpu.index
            self.policy.on_interrupt(self, channel, cpu)
        else:
            channel.rerun = True
        if cpu.asleep:
            self.leave(cpu, unrelated=False)

    def handler_end(self, cpu: Cpu, serial: int) -> None:
        """The handler returns, later if others nested in it; then whatever waited in IRR is taken."""
        frame = None
        for each in cpu.stack:
            if each.serial == serial:
                frame = each
        if frame is None:
            return
        if frame.end > self.now:
            self.agenda.at(frame.end, SOFTWARE, HANDLER_END, cpu.index, serial)
            return
        cpu.stack.remove(frame)
        channel = self.channels[frame.channel]
        others = 0  # of its handlers on this CPU
        for each in cpu.stack:
            others += each.channel == frame.channel
        if channel.handler_cpu == cpu.index and not others:
            channel.handler_cpu = NONE
            if channel.rerun:
                channel.rerun = False
                self.policy.on_interrupt(self, channel, cpu)
        self.take_pending(cpu)

    def isr_end(self, cpu: Cpu, vector: int) -> None:
        """The EOI of another interrupt."""
        if vector in cpu.in_service:
            cpu.in_service.remove(vector)
        self.take_pending(cpu)

    def take_pending(self, cpu: Cpu) -> None:
        """IRR to ISR for the messages that waited, oldest first."""
        while cpu.pending and self.blocker(cpu) == NONE:
            self.take(self.channels[cpu.pending.pop(0)], cpu)

    def conclude(self, t_end: int) -> None:
        for cpu in self.cpus:
            if cpu.asleep:
                self.monitor.still_asleep(t_end, cpu.index, cpu.deadline)

    def metrics(self) -> dict[str, int]:
        return {
            "hpet_irqs": self.irqs,
            "hpet_reprograms": self.reprograms,
            "hpet_retargets": self.retargets,
            "retargets_refused": self.refusals,
            "wake_ipis": self.wake_ipis,
            "joins": self.joins,
            "shortens": self.shortens,
            "pushed": self.pushed,
            "dropped_bodies": self.dropped_bodies,
            "moved_deadlines": self.moved_deadlines,
            "early_wakeups": self.monitor.early_wakeups,
            "max_lateness_ns": self.monitor.max_lateness_ns,
            "max_nesting": self.monitor.max_nesting,
        }
