"""Rules of the HPET broadcast: predicates over (state, transition) that raise divergences (spec S1.7)."""

from __future__ import annotations

from replay.events import INF, NONE
from replay.hardware.lapic import vector_class
from replay.sink import Evidence, Sink
from replay.systems.hpet_broadcast import codes
from replay.words import span

__all__ = ["HpetMonitor"]


class HpetMonitor:
    """Told of fires, wakes and moves by the machine. All times in ns."""

    def __init__(self, sink: Sink, *, slop_ns: int, miss_ns: int, stack_limit: int) -> None:
        self.sink = sink
        self.slop_ns = slop_ns
        self.miss_ns = miss_ns
        self.stack_limit = stack_limit
        self.early_wakeups = 0
        self.max_lateness_ns = 0
        self.max_nesting = 0

    def taken(self, t: int, channel: int, cpu: int, owner: int, members: int) -> None:
        """A6: the message was taken on `cpu`."""
        if owner == NONE and not members:
            self.sink.report(
                codes.SPURIOUS_IRQ, t, cpu=cpu, obj=channel,
                expected="an armed channel has an owner", observed="fired with no owner and no member",
            )  # fmt: skip
        elif owner not in (NONE, cpu):
            self.sink.report(
                codes.WRONG_CPU, t, cpu=cpu, obj=channel, val=owner,
                expected=f"interrupt on cpu {owner}, the owner", observed=f"taken on cpu {cpu}",
            )  # fmt: skip

    def entered(self, t: int, channel: int, cpu: int, depth: int) -> None:
        """A6: a handler is on the stack; `depth` counts it."""
        self.max_nesting = max(self.max_nesting, depth)
        if depth > 1:
            self.sink.report(
                codes.NESTED_IRQ, t, cpu=cpu, obj=channel, val=depth,
                expected="no handler below it", observed=f"depth {depth}",
            )  # fmt: skip
        if depth > self.stack_limit:
            self.sink.report(
                codes.STACK_DEPTH, t, cpu=cpu, obj=channel, val=depth,
                expected=f"depth at most {self.stack_limit}", observed=f"depth {depth}",
            )  # fmt: skip

    def blocked(self, t: int, channel: int, cpu: int, blocker: int, vector: int) -> None:
        """A6: the message waits behind a vector in service."""
        self.sink.report(
            codes.BLOCKED_BY_ISR, t, cpu=cpu, obj=channel, tgt=blocker,
            expected=f"class {vector_class(vector):#x} above everything in service",
            observed=f"vector {blocker:#x} in service",
            evidence=(Evidence(t, None, f"channel {channel} fires, vector {vector:#x} waits in IRR"),),
        )  # fmt: skip

    def stale(self, t: int, channel: int, owner: int, dest: int) -> None:
        """A5: the move to the new owner was refused."""
        self.sink.report(
            codes.AFFINITY_STALE, t, cpu=owner, obj=channel, val=dest,
            expected=f"message to cpu {owner}", observed=f"still to cpu {dest}: the last move has not completed",
        )  # fmt: skip

    def woke(self, t: int, cpu: int, deadline: int, *, unrelated: bool) -> None:
        """A CPU leaves idle; `unrelated` when neither the HPET nor another CPU's broadcast woke it."""
        if deadline >= INF:
            return
        lateness = t - deadline
        if not unrelated:
            self.max_lateness_ns = max(self.max_lateness_ns, lateness)
        if lateness > self.slop_ns:
            if unrelated:
                self.missed(t, cpu, deadline)
                return
            self.sink.report(
                codes.LATE_WAKEUP, t, cpu=cpu, val=lateness, t_first=deadline,
                expected=f"wake at {deadline} ns", observed=f"{span(lateness)} later",
                severity="error" if lateness > 10 * self.slop_ns else "",
            )  # fmt: skip
        elif lateness < -self.slop_ns and not unrelated:
            self.early_wakeups += 1
            self.sink.report(
                codes.EARLY_WAKEUP, t, cpu=cpu, val=lateness,
                expected=f"sleep until {deadline} ns", observed=f"woken {span(-lateness)} before",
            )  # fmt: skip

    def missed(self, t: int, cpu: int, deadline: int) -> None:
        """Asleep too long after the deadline, or rescued by something unrelated."""
        self.sink.report(
            codes.MISSED_WAKEUP, t, cpu=cpu, val=t - deadline, t_first=deadline,
            expected=f"wake at {deadline} ns", observed=f"asleep {span(t - deadline)} longer",
        )  # fmt: skip

    def still_asleep(self, t_end: int, cpu: int, deadline: int) -> None:
        """At the end of a run."""
        if deadline < INF and deadline + self.miss_ns <= t_end:
            self.missed(t_end, cpu, deadline)
