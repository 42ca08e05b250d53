"""HPET broadcast, recorded: the rules of S1.7 on what really happened, as far as the recording shows it.

Stock recorders name no owner and no comparator, so this machine infers: a channel's interrupt is pointed at its owner
when the channel is attached or handed over; a CPU that is awake owns nothing under the recorded policy; a CPU that
wakes right after another's handler was served by it. Whatever rests on such an inference has confidence 50 and is one
step less severe than declared; with owners in the recording (`hpet.program`) the same rules speak with full severity.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from typing import ClassVar, Final

import numpy as np

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import INF, KIND_ID, KINDS, NIL, NONE, Batch
from replay.knowledge import UNKNOWN
from replay.machine import GAP_BEGINS, Machine
from replay.sink import Evidence, Sink
from replay.systems.hpet_broadcast import codes
from replay.systems.hpet_broadcast.comparators import ORPHAN_CHECK, OWNER_CHECK, ComparatorRules
from replay.systems.hpet_broadcast.policies import BroadcastPolicy
from replay.systems.hpet_broadcast.sleeps import BY_BROADCAST, BY_HPET, QuietSleeps, by_cpu, quiet_sleeps
from replay.words import span

__all__ = ["RecordedBroadcast"]

ENTER: Final = KIND_ID["idle.enter"]
EXIT: Final = KIND_ID["idle.exit"]
BEGIN: Final = KIND_ID["hpet.handler.begin"]
END: Final = KIND_ID["hpet.handler.end"]
RETARGET: Final = KIND_ID["hpet.retarget"]
PROGRAM: Final = KIND_ID["hpet.program"]
FIRE: Final = KIND_ID["hpet.fire"]
ISR_BEGIN: Final = KIND_ID["isr.begin"]
ISR_END: Final = KIND_ID["isr.end"]
LOST: Final = KIND_ID["trace.lost"]

#: Flag of hpet.retarget: the move was refused.
REFUSED: Final = 1

# Actions of the agenda.
JUDGE: Final = 1
MISSED: Final = 2

#: Confidence of whatever is inferred from stock records.
INFERRED: Final = 50


class _Cpu:
    """What is known of a CPU. `asleep` is 0, 1 or UNKNOWN; `since` is when that began (ns).

    `due` is when a sleep that lasts is a missed wake-up (ns), `due_serial` its turn among entries of that moment;
    `timer` the time of the agenda's entry that sees to it, then or before, INF without one. All this is as of the event
    `known`; `quiet` are sleeps of the present batch that are no rows.
    """

    __slots__ = (
        "asleep", "deadline", "due", "due_serial", "enter_seq", "generation", "index", "known", "quiet", "since",
        "stack", "timer",
    )  # fmt: skip

    def __init__(self, index: int) -> None:
        self.index = index
        self.asleep = UNKNOWN
        self.since = 0
        self.deadline = INF
        self.enter_seq = NONE
        self.generation = 0
        self.stack: list[tuple[int, int, int]] = []  # (channel, begin ns, seq)
        self.due = INF
        self.due_serial = 0
        self.timer = INF
        self.known = NONE
        self.quiet: QuietSleeps | None = None


class _Channel:
    """What is known of a channel: where its interrupt is pointed, since when, and the owner if it is recorded.

    `named`: the recording names owners, so an `owner` of NONE says that the last one left idle at `released_at` (ns).
    """

    __slots__ = ("index", "moved_at", "moved_seq", "named", "owner", "released_at", "target")

    def __init__(self, index: int) -> None:
        self.index = index
        self.target = NONE
        self.moved_at = 0
        self.moved_seq = NONE
        self.owner = NONE
        self.named = False
        self.released_at = 0


class _Suspect:
    """A handler on a CPU that was awake: whom did it serve?"""

    __slots__ = ("awake_since", "begin", "channel", "cpu", "owned", "seq", "served", "story")

    def __init__(
        self, channel: int, cpu: int, begin: int, seq: int, awake_since: int, owned: bool, story: tuple[Evidence, ...]
    ) -> None:
        self.channel = channel
        self.cpu = cpu
        self.begin = begin
        self.seq = seq
        self.awake_since = awake_since
        self.owned = owned  # the recording names owners, and the channel has none
        self.served: list[tuple[int, int, int]] = []  # (cpu, wake ns, seq)
        self.story = story  # where the channel was pointed when the handler began


class RecordedBroadcast(Machine):
    """State of idle CPUs and channel interrupts as recorded."""

    columns: ClassVar[tuple[str, ...]] = ("kind", "seq", "t_ns", "cpu", "obj", "tgt", "val", "val2", "flags")

    def __init__(self, policy: BroadcastPolicy, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.policy = policy
        self.comparators = ComparatorRules(policy, config, sink, self.agenda)
        self.slop_ns = config.integer("slop_ns")
        self.miss_ns = config.integer("miss_ns")
        self.stack_limit = config.integer("stack_limit")
        self.inflight_ns = config.integer("inflight_ns")
        self.exit_latency_ns = config.integer("exit_latency_ns")
        self.exit_path_ns = config.integer("exit_path_ns")
        self.remote_wake_ns = config.integer("remote_wake_ns")
        self.fixed_owners = bool(config["fixed_owners"])
        self.releases = not self.fixed_owners and not policy.owner_must_sleep
        self.cpus: dict[int, _Cpu] = {}
        self.channels: dict[int, _Channel] = {}
        self.suspects: list[_Suspect] = []
        self.handlers_recorded: bool
        self.ends_recorded: bool
        self.handler_conf: int  # how sure it is that a handler is a channel's
        self.gap_end = -1
        self.handlers = 0
        self.own_wakes = 0
        self.remote_wakes = 0
        self.other_wakes = 0
        self.retargets = 0
        self.awake_handlers = 0
        self.early = 0
        self.max_lateness = 0
        self.max_nesting = 0
        self.sleeps = 0

    # -- event glue --------------------------------------------------------------------------------------------

    def ignores(self) -> frozenset[str]:
        """What ended a sleep, and the hand-shake of mwait."""
        return frozenset(k.name for k in KINDS if k.name.startswith(("idle.break", "idle.prep.", "wake.")))

    def feed(self, batch: Batch) -> None:
        """As `consume`, without sleeps that break no rule (`sleeps.py`)."""
        kinds, seqs, times, cpus = (batch.array(name) for name in ("kind", "seq", "t_ns", "cpu"))
        if not self.owners_unknown(batch) or not (seqs[1:] > seqs[:-1]).all():
            self.consume(batch.rows(self.columns))
            return
        late_ns = min(self.slop_ns + self.exit_latency_ns, self.miss_ns)
        entries, exits = quiet_sleeps(kinds, times, cpus, batch.array("tgt"), batch.array("val"), late_ns)
        self.sleeps += len(entries)
        self.other_wakes += len(entries)
        for index, sleeps in by_cpu(entries, exits, seqs, times, cpus):
            self.cpu(index).quiet = sleeps
        loud = np.ones(len(batch), np.bool_)
        loud[entries] = False
        loud[exits] = False
        self.consume(batch.chosen(loud).rows(self.columns))
        self.advance(int(times[-1]))
        for p in self.cpus.values():
            self.look(p, INF)
            p.quiet = None

    def owners_unknown(self, batch: Batch) -> bool:
        """Whether no owner of a channel is known, nor becomes known in the batch, and no records are lost in it: then
        only handlers ask how a CPU is."""
        kinds, comparators = batch.array("kind"), self.comparators
        refused = (kinds == RETARGET) & (batch.array("flags") & REFUSED != 0)
        if self.fixed_owners or comparators.owner or comparators.joined or comparators.choices:
            return False
        return not ((kinds == PROGRAM) | (kinds == LOST) | refused).any()

    def look(self, p: _Cpu, seq: int) -> None:
        """How a CPU is before the event `seq`, if its last move then was of a quiet sleep."""
        if p.quiet is not None:
            last = bisect_left(p.quiet.entered_seqs, seq) - 1
            if last >= 0:
                self.be(p, p.quiet, last, p.quiet.exited_seqs[last] < seq)

    def look_now(self, p: _Cpu) -> None:
        """How a CPU is when an entry of the agenda is due: after the events of that moment."""
        if p.quiet is not None:
            last = bisect_right(p.quiet.entered, self.now) - 1
            if last >= 0:
                self.be(p, p.quiet, last, p.quiet.exited[last] <= self.now)

    def be(self, p: _Cpu, quiet: QuietSleeps, last: int, over: bool) -> None:
        """The CPU's last move was the entry of a quiet sleep, or its exit; unless more is known."""
        seq = quiet.exited_seqs[last] if over else quiet.entered_seqs[last]
        if seq > p.known:
            p.known = seq
            p.asleep = 0 if over else 1
            p.since = quiet.exited[last] if over else quiet.entered[last]
            p.generation += 1
            p.due = INF

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        self.handlers_recorded = self.sees("hpet.handler.begin")
        self.ends_recorded = self.sees("hpet.handler.end")
        self.handler_conf = 100 if self.observed is None else INFERRED
        heap = self.agenda.heap
        cpus = self.cpus
        for kind, seq, t, cpu, obj, tgt, val, val2, flags in rows:
            if heap and heap[0][0] <= t:
                self.advance(t)
            else:
                self.now = t
            if kind == ENTER:
                self.enter(cpus.get(cpu) or self.cpu(cpu), val, seq)
            elif kind == EXIT:
                self.exit(cpus.get(cpu) or self.cpu(cpu), obj, tgt, seq)
            elif kind == BEGIN:
                self.begin(self.channel(obj), self.cpu(cpu), seq)
            elif kind == END:
                self.end(self.cpu(cpu), obj)
            elif kind == RETARGET:
                if flags & REFUSED:
                    self.refused(self.channel(obj), tgt, val, seq)
                else:
                    self.retarget(self.channel(obj), tgt, cpu, seq)
            elif kind == PROGRAM:
                self.program(self.channel(obj), cpu, tgt if tgt != NONE else cpu, val, val2)
            elif kind == FIRE:
                self.comparators.message(t, obj, cpu, seq)
            elif kind == ISR_BEGIN:
                self.comparators.isr_begin(cpu, obj)
            elif kind == ISR_END:
                self.comparators.isr_end(cpu, obj)
            elif kind == LOST:
                self.gap(flags)
                self.taint(cpu, val, t)

    def cpu(self, index: int) -> _Cpu:
        """State of a CPU, unknown at first."""
        found = self.cpus.get(index)
        if found is None:
            found = self.cpus[index] = _Cpu(index)
        return found

    def channel(self, index: int) -> _Channel:
        """State of a channel, unknown at first."""
        found = self.channels.get(index)
        if found is None:
            found = self.channels[index] = _Channel(index)
        return found

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        if action == JUDGE:
            for suspect in self.suspects:
                if suspect.seq == a and suspect.begin == b:
                    self.suspects.remove(suspect)
                    self.judge(suspect)
                    break
        elif action == ORPHAN_CHECK:
            if not self.open_gaps:
                self.comparators.orphan_check(self.now, a, self.cpus)
        elif action == OWNER_CHECK:
            if self.cpus[b].generation == c:
                self.comparators.owner_check(self.now, a, self.cpus[b])
        elif action == MISSED:
            p = self.cpus[a]
            if p.timer != self.now:  # there is an entry that is earlier or later
                return
            p.timer = INF
            self.look_now(p)
            if p.asleep != 1:
                pass
            elif p.generation != c:
                if p.due < INF:  # the entry was for an earlier sleep
                    self.time(p)
            elif self.all_seen_since(p.since):
                self.missed(p, self.now, NONE)

    def program(self, ch: _Channel, cpu: int, owner: int, armed: int, reason: int) -> None:
        """A4: a comparator is written, which also names the channel's owner."""
        ch.named = True
        ch.owner = owner
        self.comparators.programmed(self.now, ch.index, cpu, owner, armed, reason)

    # -- idle --------------------------------------------------------------------------------------------------

    def enter(self, p: _Cpu, deadline: int, seq: int) -> None:
        """A CPU goes to sleep; its deadline is what the governor expected."""
        p.asleep = 1
        p.since = self.now
        p.known = seq
        p.enter_seq = seq
        p.deadline = deadline if deadline not in (NIL, 0) else INF
        p.generation += 1
        self.sleeps += 1
        if self.comparators.choices:
            self.comparators.entered(self.now, p, seq)
        p.due = INF
        if p.deadline < INF and self.handlers_recorded:
            p.due = p.deadline + self.miss_ns
            self.agenda.serial += 1
            p.due_serial = self.agenda.serial
            if p.due < p.timer:
                self.time(p)

    def time(self, p: _Cpu) -> None:
        """An entry in the agenda for when the present sleep is too long. Most sleeps end before, and the entry of one
        does for the next that may last longer."""
        p.timer = p.due
        heapq.heappush(self.agenda.heap, (p.due, SOFTWARE, p.due_serial, MISSED, p.index, 0, p.generation))

    def exit(self, p: _Cpu, obj: int, reason: int, seq: int) -> None:
        """A CPU woke, by its own channel, by another CPU's handler, or by something else."""
        self.look(p, seq)
        if reason == BY_HPET:
            self.own_wakes += 1
        elif reason == BY_BROADCAST:
            self.remote_wakes += 1
            for suspect in self.suspects:
                if suspect.channel == obj and suspect.cpu != p.index:
                    suspect.served.append((p.index, self.now, seq))
        else:
            self.other_wakes += 1
        if p.asleep == 1 and p.deadline < INF and self.all_seen_since(p.since):
            self.woke(p, reason, seq)
        p.asleep = 0
        p.since = self.now
        if self.comparators.owner or self.comparators.joined:
            self.comparators.exited(self.now, p)
        if self.releases:
            for ch in self.channels.values():
                # A8: it hands the channel over, which is recorded, or releases it. B6: it must have given it up.
                if ch.owner == p.index:
                    ch.owner = NONE
                    ch.released_at = self.now

    def woke(self, p: _Cpu, reason: int, seq: int) -> None:
        """Wake against deadline. Another CPU may have moved the deadline meanwhile, so this is never certain."""
        lateness = self.now - p.deadline
        by_hpet = reason in (BY_HPET, BY_BROADCAST)
        if by_hpet:
            self.max_lateness = max(self.max_lateness, lateness)
        if lateness > self.slop_ns + self.exit_latency_ns:
            if by_hpet:
                self.sink.report(
                    codes.LATE_WAKEUP, self.now, cpu=p.index, val=lateness, t_first=p.deadline, seq=seq,
                    severity="warn" if lateness > 10 * self.slop_ns else "info", conf=INFERRED,
                    expected="wake at the deadline", observed=f"{span(lateness)} later",
                    evidence=self.sleep_story(p, seq),
                )  # fmt: skip
            elif lateness >= self.miss_ns:
                pass  # reported by the time-out
            else:
                self.missed(p, self.now, seq)
        elif by_hpet and lateness < -(self.slop_ns + 2_000):
            self.early += 1
            if self.sink.spared(codes.EARLY_WAKEUP):
                return
            self.sink.report(
                codes.EARLY_WAKEUP, self.now, cpu=p.index, val=lateness, seq=seq, conf=INFERRED,
                expected="sleep until the deadline", observed=f"woken {span(-lateness)} before",
                evidence=self.sleep_story(p, seq),
            )  # fmt: skip

    def missed(self, p: _Cpu, t: int, seq: int) -> None:
        """Still asleep, or rescued by something unrelated, after the deadline."""
        self.sink.report(
            codes.MISSED_WAKEUP, t, cpu=p.index, val=t - p.deadline, t_first=p.deadline, seq=seq,
            severity="warn", conf=INFERRED,
            expected="a wake at the deadline", observed=f"asleep {span(t - p.deadline)} longer",
            evidence=self.sleep_story(p, seq),
        )  # fmt: skip

    def sleep_story(self, p: _Cpu, seq: int) -> tuple[Evidence, ...]:
        """When it went to sleep, when it wanted to wake, when it did."""
        return (
            Evidence(p.since, p.enter_seq, f"cpu {p.index} goes idle, expects to sleep {span(p.deadline - p.since)}"),
            Evidence(p.deadline, None, "its deadline"),
            Evidence(self.now, None if seq == NONE else seq, f"cpu {p.index} leaves idle"),
        )

    # -- interrupts --------------------------------------------------------------------------------------------

    def refused(self, ch: _Channel, owner: int, dest: int, seq: int) -> None:
        """A5: the channel has a new owner, the message goes on to the old one."""
        self.sink.report(
            codes.AFFINITY_STALE, self.now, cpu=owner, obj=ch.index, val=dest, seq=seq,
            expected=f"message to cpu {owner}", observed=f"still to cpu {dest}", evidence=self.target_story(ch),
        )  # fmt: skip
        ch.owner = owner
        self.comparators.owner[ch.index] = owner

    def retarget(self, ch: _Channel, target: int, by: int, seq: int) -> None:
        """A5: the channel's interrupt is pointed at a CPU, its owner from now on."""
        if ch.target not in (NONE, target):
            self.retargets += 1
            severity = "" if self.policy.moves_interrupt else "error"
            if not self.sink.spared(codes.RETARGET, severity):
                self.sink.report(
                    codes.RETARGET, self.now, cpu=by, obj=ch.index, tgt=target, val=ch.target, seq=seq, conf=80,
                    severity=severity, expected="",
                    observed=f"pointed from cpu {ch.target} to cpu {target} by cpu {by}",
                )  # fmt: skip
        ch.target = target
        ch.moved_at = self.now
        ch.moved_seq = seq
        if ch.named or self.fixed_owners:
            ch.owner = target
            self.comparators.moved(self.now, ch.index, target, seq)

    def begin(self, ch: _Channel, p: _Cpu, seq: int) -> None:
        """A6: a channel's handler starts on a CPU."""
        self.handlers += 1
        self.look(p, seq)
        self.comparators.began(self.now, ch.index, seq)
        if not self.ends_recorded:  # nothing is known to be below it
            p.stack.clear()
        p.stack.append((ch.index, self.now, seq))
        depth = len(p.stack)
        self.max_nesting = max(self.max_nesting, depth)
        if depth > 1:
            self.nested(p, ch, depth, seq)
        if self.open_gaps and not self.fixed_owners:
            return  # U3: a CPU whose records are lost may have moved the channel
        if ch.owner != NONE:
            if ch.owner != p.index:
                self.wrong_cpu(ch, p.index, ch.owner, seq, certain=True, story=self.target_story(ch))
        elif p.asleep == 0 and self.now - p.since > self.exit_path_ns:
            # Awake CPUs own nothing; whom this handler serves shows in the next moments.
            self.suspect(ch, p, seq, owned=ch.named and self.now - ch.released_at > self.exit_path_ns)
        elif ch.target not in (NONE, p.index) and self.now - ch.moved_at > self.inflight_ns:
            owner = self.cpus.get(ch.target)
            if owner is not None:
                self.look(owner, seq)
            if owner is not None and owner.asleep == 1 and owner.since >= ch.moved_at - self.exit_path_ns:
                self.wrong_cpu(ch, p.index, ch.target, seq, certain=False, story=self.target_story(ch))

    def suspect(self, ch: _Channel, p: _Cpu, seq: int, *, owned: bool) -> None:
        """A handler on a CPU that is awake: judged when everybody whom it wakes has woken."""
        self.awake_handlers += 1
        self.suspects.append(_Suspect(ch.index, p.index, self.now, seq, p.since, owned, self.target_story(ch)))
        self.agenda.at(self.now + self.remote_wake_ns + self.exit_path_ns, SOFTWARE, JUDGE, seq, self.now)

    def end(self, p: _Cpu, channel: int) -> None:
        """The handler returned."""
        for index in range(len(p.stack) - 1, -1, -1):
            if p.stack[index][0] == channel:
                del p.stack[index]
                return

    def nested(self, p: _Cpu, ch: _Channel, depth: int, seq: int) -> None:
        """A6: intervals that contain each other on one CPU."""
        story = tuple(Evidence(t, s, f"channel {c} handler begins") for c, t, s in p.stack)
        self.sink.report(
            codes.NESTED_IRQ, self.now, cpu=p.index, obj=ch.index, val=depth, seq=seq, conf=self.handler_conf,
            expected="no handler below it", observed=f"depth {depth}", evidence=story,
        )  # fmt: skip
        if depth > self.stack_limit:
            self.sink.report(
                codes.STACK_DEPTH, self.now, cpu=p.index, obj=ch.index, val=depth, seq=seq, conf=self.handler_conf,
                expected=f"depth at most {self.stack_limit}", observed=f"depth {depth}", evidence=story,
            )  # fmt: skip

    def target_story(self, ch: _Channel) -> tuple[Evidence, ...]:
        """Where the channel was pointed last."""
        if ch.target == NONE:
            return ()
        return (Evidence(ch.moved_at, ch.moved_seq, f"channel {ch.index} pointed at cpu {ch.target}"),)

    def wrong_cpu(
        self, ch: _Channel, cpu: int, owner: int, seq: int, *, certain: bool, story: tuple[Evidence, ...]
    ) -> None:
        """A6: without owners in the recording the message may have been accepted before the channel was moved."""
        self.sink.report(
            codes.WRONG_CPU, self.now, cpu=cpu, obj=ch.index, val=owner, seq=seq,
            severity="" if certain else "warn", conf=100 if certain else INFERRED,
            tags=() if certain else ("inferred",),
            expected=f"interrupt on cpu {owner}", observed=f"handler on cpu {cpu}",
            evidence=(*story, Evidence(self.now, seq, f"handler of channel {ch.index} begins on cpu {cpu}")),
        )  # fmt: skip

    def judge(self, s: _Suspect) -> None:
        """The handler ran on a CPU that was awake: it served sleepers elsewhere, or nobody."""
        p = self.cpus[s.cpu]
        self.look_now(p)
        if not self.all_seen_since(s.awake_since):
            return
        entering = self.exit_path_ns if s.owned else self.remote_wake_ns + self.exit_path_ns
        if p.asleep == UNKNOWN or (p.asleep == 1 and s.begin < p.since <= s.begin + entering):
            return  # on its way into idle: it may have owned the channel already
        label = f"handler of channel {s.channel} begins on cpu {s.cpu}, awake for {span(s.begin - s.awake_since)}"
        began = Evidence(s.begin, s.seq, label)
        if s.owned:
            if not s.served:
                self.sink.report(
                    codes.SPURIOUS_IRQ, s.begin, cpu=s.cpu, obj=s.channel, seq=s.seq,
                    expected="an armed channel has an owner that sleeps, or somebody to wake",
                    observed=f"handler on cpu {s.cpu}, awake, and nobody woke",
                    evidence=(*s.story, began),
                )  # fmt: skip
            return
        if s.served:
            cpu, woke, seq = s.served[0]
            self.sink.report(
                codes.WRONG_CPU, s.begin, cpu=s.cpu, obj=s.channel, val=cpu, seq=s.seq,
                severity="warn", conf=INFERRED, tags=("inferred",),
                expected=f"interrupt on cpu {cpu}, which slept on it", observed=f"handler on cpu {s.cpu}, awake",
                evidence=(*s.story, began, Evidence(woke, seq, f"cpu {cpu} leaves idle")),
            )  # fmt: skip
            return
        self.sink.report(
            codes.SPURIOUS_IRQ, s.begin, cpu=s.cpu, obj=s.channel, seq=s.seq, severity="info", conf=INFERRED,
            tags=("inferred",), expected="an armed channel has an owner that sleeps",
            observed=f"handler on cpu {s.cpu}, awake, and nobody woke",
            evidence=(*s.story, began),
        )  # fmt: skip

    # -- ignorance ---------------------------------------------------------------------------------------------

    def gap(self, flags: int) -> None:
        """Who woke whom cannot be told in a stretch of lost records."""
        super().gap(flags)
        if not flags & GAP_BEGINS:
            self.gap_end = self.now

    def all_seen_since(self, t: int) -> bool:
        """U3: whether no record of any CPU is missing from `t` until now, and handlers are recorded at all."""
        return not self.open_gaps and t > self.gap_end and self.handlers_recorded

    def taint(self, cpu: int, t0: int, t1: int) -> None:
        """U2: the CPU's idle state and stack are unknown, and it may have moved any channel."""
        self.comparators.forget()
        for p in self.cpus.values():
            if cpu in (NONE, p.index):
                p.asleep = UNKNOWN
                p.stack.clear()
        for ch in self.channels.values():
            if self.fixed_owners:
                break
            ch.target = NONE
            ch.owner = NONE
            ch.named = False

    def metrics(self) -> dict[str, int]:
        return {
            "sleeps": self.sleeps,
            "hpet_irqs": self.handlers,
            "hpet_retargets": self.retargets,
            "wakes_by_own_channel": self.own_wakes,
            "wakes_by_broadcast": self.remote_wakes,
            "wakes_by_other": self.other_wakes,
            "handlers_on_awake_cpu": self.awake_handlers,
            "early_wakeups": self.early,
            "max_lateness_ns": self.max_lateness,
            "max_nesting": self.max_nesting,
        }
