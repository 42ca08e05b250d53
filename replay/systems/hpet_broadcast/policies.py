"""Who gets a channel, and what its owner does: the algorithms of HPET broadcast (spec S1.3-S1.5).

A policy of one's own is a subclass with other hooks: `pick`, `may_retarget`, `on_release`, `on_exit`,
`on_interrupt`, and `entry_mode`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from replay.compiled import mypyc_attr
from replay.events import INF, NONE

if TYPE_CHECKING:
    from replay.systems.hpet_broadcast.machine import HpetBroadcast
    from replay.systems.hpet_broadcast.state import Channel, Cpu

__all__ = [
    "EARLY_EOI",
    "IRQS_OFF",
    "LATE_EOI",
    "BroadcastPolicy",
    "Current",
    "Proposed",
    "ProposedKeep",
    "Upstream2025",
]

#: How a handler is entered: EOI first and interrupts on; EOI afterwards; interrupts off until the EOI at the end.
EARLY_EOI: Final = 0
LATE_EOI: Final = 1
IRQS_OFF: Final = 2


def _members(mask: int) -> list[int]:
    """CPU numbers of a bit mask, ascending."""
    return [cpu for cpu in range(mask.bit_length()) if mask >> cpu & 1]


@mypyc_attr(allow_interpreted_subclasses=True)
class BroadcastPolicy:
    """Base of all policies of system `hpet`. The hooks get the machine and change it through its methods."""

    system: ClassVar[str] = "hpet"
    name: ClassVar[str] = ""
    entry_mode: ClassVar[int] = EARLY_EOI
    #: Parameter that holds the vector of the channels.
    vector_parameter: ClassVar[str] = "hpet_vector"
    #: Whether `members` includes the owner (current) or is a wake list beside it (proposed).
    owner_is_member: ClassVar[bool] = True
    #: Whether a scenario's stale `dest` can exist under this policy.
    retargets: ClassVar[bool] = False
    #: Whether the interrupt is ever pointed at another CPU than the one that took the free channel (B4).
    moves_interrupt: ClassVar[bool] = True
    #: Whether only a sleeping CPU may own a channel (B6).
    owner_must_sleep: ClassVar[bool] = False
    #: mwait hand-shake that belongs to it.
    mwait: ClassVar[str] = "cmpxchg"

    def pick(self, m: HpetBroadcast, cpu: Cpu) -> None:
        """A CPU goes idle: give it a channel and see that the comparator is right."""
        raise NotImplementedError

    def on_exit(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """A CPU leaves idle and with it the channel."""
        raise NotImplementedError

    def on_interrupt(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """The channel's handler runs on `cpu`."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Current(BroadcastPolicy):
    """`arch/x86/hpet.c` as of November 2013: round robin, ownership handed over by moving the interrupt."""

    name = "current"
    retargets = True
    mwait = "separate-flag"

    def pick(self, m: HpetBroadcast, cpu: Cpu) -> None:
        """A1 pick, A2 attach, A3 arm: `hpet_get_channel`, `hpet_attach_channel`, `hpet_broadcast_enter`."""
        channel = self.get_channel(m, cpu)
        cpu.channel = channel.index
        if channel.owner == NONE:  # A1: it was unused; A2: it turned unused meanwhile
            channel.owner = cpu.index
        if channel.owner == cpu.index:
            self.affinity(m, channel, cpu)
        channel.members |= 1 << cpu.index
        if cpu.deadline < channel.next_event:
            m.program(channel, cpu.deadline, forced=True)

    def get_channel(self, m: HpetBroadcast, cpu: Cpu) -> Channel:
        """A1: the CPU's own channel if there are enough; else the first unused from the cursor; else share that one."""
        n = len(m.channels)
        if n >= len(m.cpus):
            return m.channels[cpu.index]
        start = m.rr
        m.rr = (m.rr + 1) % n
        for step in range(n):
            channel = m.channels[(start + step) % n]
            if not channel.used:
                channel.used = True
                return channel
        return m.channels[start]

    def may_retarget(self, channel: Channel, cpu: int) -> bool:
        """A5: a second move before an interrupt arrived through the new vector is refused."""
        return not channel.move_in_progress

    def affinity(self, m: HpetBroadcast, channel: Channel, by: Cpu) -> None:
        """A5: point the message at the owner; an expiry in the masked window is handled inline, on the CPU `by`."""
        owner = channel.owner
        if channel.dest != owner:
            if channel.dest == NONE:
                m.retarget(channel, owner)
            elif self.may_retarget(channel, owner):
                m.retarget(channel, owner)
                channel.move_in_progress = True
            else:
                m.refusals += 1
                m.monitor.stale(m.now, channel.index, owner, channel.dest)
        if channel.next_event < m.now:
            self.on_interrupt(m, channel, by)

    def on_exit(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """A8: leave the members; hand an owned channel to the lowest of the rest, or release it."""
        cpu.channel = NONE
        channel.members &= ~(1 << cpu.index)
        if channel.owner != cpu.index:
            return
        if not channel.members:
            channel.owner = NONE
            channel.used = False
            self.on_release(m, channel)
            return
        channel.owner = _members(channel.members)[0]
        self.affinity(m, channel, cpu)

    def on_release(self, m: HpetBroadcast, channel: Channel) -> None:
        """A8: the comparator stays armed."""

    def on_interrupt(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """A7: wake the members whose deadline has come, re-arm for the earliest of the rest."""
        channel.next_event = INF
        expired = []
        rest = INF
        for index in _members(channel.members):
            member = m.cpus[index]
            if member.deadline <= m.now:
                expired.append(member)
            else:
                rest = min(rest, member.deadline)
        if rest < INF:
            m.program(channel, rest, forced=False)
        for member in expired:
            if member.index != cpu.index:
                m.wake_by_ipi(member)


@mypyc_attr(allow_interpreted_subclasses=True)
class Upstream2025(Current):
    """The code after the repairs of 2025: EOI afterwards, one fixed vector, atomic retarget, pushed out on release."""

    name = "upstream-2025"
    entry_mode = LATE_EOI
    retargets = False
    mwait = "cmpxchg"

    def affinity(self, m: HpetBroadcast, channel: Channel, by: Cpu) -> None:
        """A5 is one atomic address write: never refused, nothing masked, nothing run inline."""
        m.retarget(channel, channel.owner)

    def on_release(self, m: HpetBroadcast, channel: Channel) -> None:
        """A8: the comparator is pushed a full wrap away."""
        m.disarm(channel)


@mypyc_attr(allow_interpreted_subclasses=True)
class Proposed(BroadcastPolicy):
    """The proposal: join a channel that fires in time or shorten the soonest; the interrupt never moves."""

    name = "proposed"
    entry_mode = IRQS_OFF
    vector_parameter = "direct_vector"
    owner_is_member = False
    moves_interrupt = False
    owner_must_sleep = True

    def pick(self, m: HpetBroadcast, cpu: Cpu) -> None:
        """B1 own, else B2 join, else B3 shorten."""
        for channel in m.channels:
            if channel.owner == NONE:
                self.own(m, channel, cpu)
                return
        latest = None  # of those that fire in time
        soonest = m.channels[0]
        limit = cpu.deadline + m.slop_ns
        for channel in m.channels:
            if m.now <= channel.next_event <= limit and (latest is None or channel.next_event > latest.next_event):
                latest = channel
            if channel.next_event < soonest.next_event:
                soonest = channel
        if latest is not None:
            m.joins += 1
            self.join(latest, cpu)
            return
        m.shortens += 1
        self.join(soonest, cpu)
        m.program(soonest, cpu.deadline, forced=True)

    def own(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """B1, B4: the one place where the target is written."""
        channel.owner = cpu.index
        channel.dest = cpu.index
        cpu.channel = channel.index
        if cpu.deadline < INF:
            m.program(channel, cpu.deadline, forced=True)

    def join(self, channel: Channel, cpu: Cpu) -> None:
        """B2: onto the owner's wake list."""
        channel.members |= 1 << cpu.index
        cpu.channel = channel.index

    def on_exit(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """B6 for the owner, B7 for a CPU on the wake list."""
        cpu.channel = NONE
        if channel.owner == cpu.index:
            self.on_owner_exit(m, channel, cpu)
        else:
            channel.members &= ~(1 << cpu.index)

    def on_owner_exit(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """B6: wake everybody on the list, disarm, give the channel up."""
        self.release(m, channel)
        for index in _members(channel.members):  # each leaves the list as it wakes
            m.wake_by_ipi(m.cpus[index])

    def release(self, m: HpetBroadcast, channel: Channel) -> None:
        """B6: disarmed and free."""
        m.disarm(channel)
        channel.owner = NONE

    def on_interrupt(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """B6: the interrupt itself only wakes the owner, whose exit does the rest."""


@mypyc_attr(allow_interpreted_subclasses=True)
class ProposedKeep(Proposed):
    """As proposed, but an awake owner keeps serving its wake list."""

    name = "proposed-keep"
    owner_must_sleep = False

    def pick(self, m: HpetBroadcast, cpu: Cpu) -> None:
        """An owner that goes idle again stays on its channel and shortens it if needed."""
        for channel in m.channels:
            if channel.owner == cpu.index:
                cpu.channel = channel.index
                if cpu.deadline < channel.next_event:
                    m.program(channel, cpu.deadline, forced=True)
                return
        super().pick(m, cpu)

    def on_exit(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """B7; the channel is released when the list is empty and the owner is awake."""
        super().on_exit(m, channel, cpu)
        if channel.owner != NONE and not channel.members and not m.cpus[channel.owner].asleep:
            self.release(m, channel)

    def on_owner_exit(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """B6 keep: nobody is woken."""

    def on_interrupt(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
        """Wake the members that are due within the slop; aim the comparator at the earliest of the rest."""
        channel.next_event = INF
        members = [m.cpus[i] for i in _members(channel.members)]
        due = [c for c in members if c.deadline <= m.now + m.slop_ns]
        rest = min((c.deadline for c in members if c.deadline > m.now + m.slop_ns), default=INF)
        for member in due:
            m.wake_by_ipi(member)
        if rest < INF:
            m.program(channel, rest, forced=True)
