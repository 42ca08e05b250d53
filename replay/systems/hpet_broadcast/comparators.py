"""Rules on recordings that show the comparators: who programmed which channel for when (`hpet.program`).

Stock recorders do not; an instrumented hypervisor or an emulator does. `hpet.program` names the channel, the CPU that
wrote, the owner (`tgt`), the time it is armed for (`val`) and why (`val2`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from replay.agenda import SOFTWARE, Agenda
from replay.declare import Config
from replay.events import INF, NIL, NONE
from replay.hardware.lapic import vector_class
from replay.sink import Evidence, Sink
from replay.systems.hpet_broadcast import codes
from replay.systems.hpet_broadcast.policies import BroadcastPolicy
from replay.words import span

__all__ = ["ORPHAN_CHECK", "OWNER_CHECK", "ComparatorRules", "Sleeper"]

# `val2` of hpet.program.
BY_ENTRY: Final = 0
BY_SHORTEN: Final = 1
DISARM: Final = 3

# Actions of the machine's agenda that belong to these rules.
ORPHAN_CHECK: Final = 10
OWNER_CHECK: Final = 11

#: A handler of the hypervisor's own that blocks for less than this is no finding (ns).
SHORT_BLOCKER_NS: Final = 50_000
#: Within this a handler has run and everybody whom it woke has left idle (ns).
HANDLING_NS: Final = 100_000


class Sleeper(Protocol):
    """What these rules read of a CPU."""

    index: int
    asleep: int
    deadline: int
    generation: int


class ComparatorRules:
    """State of the comparators, as far as they were seen being written, and the vectors in service on each CPU."""

    def __init__(self, policy: BroadcastPolicy, config: Config, sink: Sink, agenda: Agenda) -> None:
        self.policy = policy
        self.sink = sink
        self.agenda = agenda
        self.slop_ns = config.integer("slop_ns")
        self.settle_ns = 2 * config.integer("min_delta_ns")
        self.exit_path_ns = config.integer("exit_path_ns")  # an interrupt may delay the exit path
        self.vector = config.integer(policy.vector_parameter)
        self.n_channels = config.integer("n_channels")
        self.armed: dict[int, int] = {}  # channel: armed for (ns), INF disarmed; absent: unknown
        self.owner: dict[int, int] = {}
        self.joined: dict[int, int] = {}  # CPU: channel it relies on
        self.choices: dict[int, tuple[int, dict[int, tuple[int, int]]]] = {}  # CPU: (channel, all channels before)
        self.in_service: dict[int, list[int]] = {}
        self.fired: dict[int, tuple[int, int, int, int]] = {}  # channel: (t, seq, cpu, blocker)
        self.handled: dict[int, int] = {}  # channel: when its handler began (ns)
        self.reported: set[tuple[int, int]] = set()  # (CPU, generation) of orphans

    def forget(self) -> None:
        """U2: records are lost; a comparator may have been written in them."""
        self.armed.clear()
        self.owner.clear()
        self.joined.clear()
        self.choices.clear()
        self.in_service.clear()
        self.fired.clear()

    def programmed(self, t: int, channel: int, cpu: int, owner: int, armed: int, reason: int) -> None:
        """A4: a comparator is written."""
        if reason in (BY_ENTRY, BY_SHORTEN) and cpu != NONE:
            known = {c: (a, self.owner.get(c, NONE)) for c, a in self.armed.items()}
            self.choices[cpu] = (channel, known)
            self.joined[cpu] = channel
        self.owner[channel] = owner
        if reason == DISARM:
            self.armed[channel] = INF
        elif armed == NIL:
            self.armed.pop(channel, None)
        else:
            self.armed[channel] = armed
        self.agenda.at(max(t + self.settle_ns, self.busy_until(channel)), SOFTWARE, ORPHAN_CHECK, channel)

    def entered(self, t: int, p: Sleeper, seq: int) -> None:
        """B2, B3: was another channel a better choice for this deadline? Only told if all channels are known."""
        choice = self.choices.pop(p.index, None)
        if choice is None or p.deadline >= INF:
            return
        channel, before = choice
        if len(before) < self.n_channels or before.get(channel, (INF, NONE))[1] in (NONE, p.index):
            return
        if any(owner == NONE for _, owner in before.values()):
            best = min(c for c, (_, owner) in before.items() if owner == NONE)
        else:
            in_time = {c: a for c, (a, _) in before.items() if t <= a <= p.deadline + self.slop_ns}
            if in_time:
                best = max(in_time, key=lambda c: (in_time[c], -c))
            else:
                best = min(before, key=lambda c: (before[c][0], c))
        if best != channel:
            self.sink.report(
                codes.BAD_CHOICE, t, cpu=p.index, obj=channel, val=best, seq=seq,
                expected=f"channel {best}", observed=f"channel {channel}",
            )  # fmt: skip

    def exited(self, t: int, p: Sleeper) -> None:
        """A8, B6: a CPU leaves idle; what it owned must be handed over or given up."""
        self.joined.pop(p.index, None)
        for channel, owner in self.owner.items():
            if owner == p.index:
                if self.policy.owner_must_sleep:
                    self.agenda.at(t + self.exit_path_ns, SOFTWARE, OWNER_CHECK, channel, p.index, p.generation)
                else:
                    self.owner[channel] = NONE
                self.agenda.at(t + self.settle_ns, SOFTWARE, ORPHAN_CHECK, channel)

    def owner_check(self, t: int, channel: int, p: Sleeper) -> None:
        """B6: an owner that is awake has given its channel up."""
        if self.owner.get(channel) == p.index and p.asleep == 0 and self.armed.get(channel, INF) < INF:
            self.sink.report(
                codes.OWNER_NOT_IDLE, t, cpu=p.index, obj=channel,
                expected="given up when its owner woke", observed=f"still owned by cpu {p.index}, which is awake",
            )  # fmt: skip

    def busy_until(self, channel: int) -> int:
        """When the channel's last handler has run and everybody whom it woke has left idle (ns)."""
        return self.handled.get(channel, -HANDLING_NS) + HANDLING_NS

    def orphan_check(self, t: int, channel: int, cpus: Mapping[int, Sleeper]) -> None:
        """A7, A8: everybody who sleeps on a channel has an owner there and an interrupt in time."""
        armed = self.armed.get(channel)
        owner = self.owner.get(channel)
        if armed is None or owner is None:
            return
        if t < self.busy_until(channel):  # those whom the handler wakes are on their way out; looked at again then
            return
        for cpu, joined in self.joined.items():
            p = cpus.get(cpu)
            if joined != channel or p is None or p.asleep != 1 or p.deadline >= INF:
                continue
            too_late = armed > p.deadline + self.slop_ns
            if (owner == NONE or too_late) and (cpu, p.generation) not in self.reported:
                self.reported.add((cpu, p.generation))
                self.sink.report(
                    codes.ORPHAN_MEMBER, t, cpu=cpu, obj=channel, val=armed if armed < INF else NIL,
                    expected="an owner, and an interrupt at the deadline",
                    observed="no owner" if owner == NONE else "armed too late for it",
                )  # fmt: skip

    def moved(self, t: int, channel: int, owner: int, seq: int) -> None:
        """A5: the channel is pointed elsewhere; a deadline that passed meanwhile is handled inline."""
        self.owner[channel] = owner
        armed = self.armed.get(channel, INF)
        if armed < t and channel not in self.fired:
            self.sink.report(
                codes.MASKED_EXPIRY, t, obj=channel, cpu=owner, val=t - armed, t_first=armed, seq=seq,
                expected="the interrupt before the move", observed=f"expired {span(t - armed)} before it",
            )  # fmt: skip

    def message(self, t: int, channel: int, cpu: int, seq: int) -> None:
        """A6: the message reached a CPU's LAPIC; remember what holds it back."""
        blocker = max(self.in_service.get(cpu, ()), default=NONE)
        if vector_class(blocker) < vector_class(self.vector):
            blocker = NONE
        self.fired[channel] = (t, seq, cpu, blocker)

    def began(self, t: int, channel: int, seq: int) -> None:
        """A6: its handler begins."""
        self.armed[channel] = INF
        self.handled[channel] = t
        if self.joined:  # otherwise nobody is known to rely on a channel; who joins later is looked at for that
            self.agenda.at(t + HANDLING_NS, SOFTWARE, ORPHAN_CHECK, channel)
        fired = self.fired.pop(channel, None)
        if fired is None:
            return
        at, fire_seq, cpu, blocker = fired
        if blocker != NONE and t - at > SHORT_BLOCKER_NS:
            self.sink.report(
                codes.BLOCKED_BY_ISR, at, cpu=cpu, obj=channel, tgt=blocker, val=t - at, seq=fire_seq,
                expected=f"class {vector_class(self.vector):#x} above everything in service",
                observed=f"vector {blocker:#x} in service for {span(t - at)} more",
                evidence=(Evidence(at, fire_seq, "message arrives"), Evidence(t, seq, "handler begins")),
            )  # fmt: skip

    def isr_begin(self, cpu: int, vector: int) -> None:
        """Another interrupt is in service."""
        self.in_service.setdefault(cpu, []).append(vector)

    def isr_end(self, cpu: int, vector: int) -> None:
        """Its EOI."""
        vectors = self.in_service.get(cpu, [])
        if vector in vectors:
            vectors.remove(vector)
