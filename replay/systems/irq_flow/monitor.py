"""Linux irq flow: the rules that raise divergences (spec S4.6, S6.5).

Closed runs decide at the moment itself; recordings wait a little where a later record may still explain (settle_ns),
and stay silent where something that the predicate reads is unknown (U3).
"""

from __future__ import annotations

from typing import Final

from replay.agenda import SOFTWARE, Agenda
from replay.declare import Config
from replay.events import INF, NIL, NONE
from replay.hardware.irq_desc import PER_CPU, CpuStack, IrqDesc
from replay.sink import Evidence, Sink
from replay.systems.irq_flow import codes
from replay.systems.irq_flow.state import NOWHERE, IrqRecord

__all__ = ["FIRST_TIMER", "DescMonitor", "Monitor"]

SETTLE: Final = 10
STUCK_MASKED: Final = 11
STUCK_EOI: Final = 12
STUCK_MOVE: Final = 13
#: Actions of the agenda from here on are the monitor's.
FIRST_TIMER: Final = SETTLE

#: spurious_cnt saturates here (u8).
SPURIOUS_CAP: Final = 255
SECOND: Final = 1_000_000_000


class Monitor:
    """Divergences of one run of the irq-flow machine."""

    def __init__(self, config: Config, sink: Sink, agenda: Agenda) -> None:
        self.sink = sink
        self.agenda = agenda
        self.closed: bool = sink.closed
        self.settle_ns: int = config.integer("settle_ns")
        self.stuck_ns: int = config.integer("stuck_ns")
        self.storm_per_s: int = config.integer("storm_per_s")
        self.lost_edges: int = 0
        self.lost_raises: int = 0
        self.possible_lost: int = 0
        #: Closed runs: the handler's last look at its ring is the scenario's, or recorded.
        self.consume_known: bool = True

    # -- lost edges (S4.5) -----------------------------------------------------------------------------------

    def is_quiet(self, irq: IrqRecord) -> bool:
        """Nothing is left that would start a handler: all of it certain."""
        return (
            irq.inprogress == NOWHERE
            and irq.running == 0
            and irq.entering == NONE
            and irq.irqs_pending == 0
            and irq.pending == 0
            and irq.posted == 0
        )

    def settle(self, irq: IrqRecord, t: int, cpu: int) -> None:
        """Something ended: look for raises that nobody will consume."""
        if not irq.outstanding or not self.is_quiet(irq):
            return
        if self.closed:
            self.report_lost(irq, t, cpu)
        elif irq.quiet_since == INF:
            irq.quiet_since = t
            irq.quiet_gen += 1
            self.agenda.at(t + self.settle_ns, SOFTWARE, SETTLE, irq.irq, cpu, irq.quiet_gen)

    def report_lost(self, irq: IrqRecord, t: int, cpu: int) -> None:
        """One finding for all raises outstanding; they are forgotten."""
        certain = (self.closed and self.consume_known) or irq.consume_seen
        possibly = not certain and irq.begin_t != NIL and irq.outstanding[0] > irq.begin_t
        if possibly:
            self.possible_lost += 1
        else:
            self.lost_edges += 1
        self.lost_raises += len(irq.outstanding)
        steps = [Evidence(irq.outstanding[0], irq.raise_seqs[0] if irq.raise_seqs[0] >= 0 else None, "raise")]
        if irq.begin_t != NIL:
            steps.append(Evidence(irq.begin_t, None, "handler begins"))
        if irq.end_t != NIL:
            steps.append(Evidence(irq.end_t, None, "handler ends"))
        if irq.dropped_t != NIL:
            steps.append(Evidence(irq.dropped_t, None, f"acknowledged and dropped on cpu{irq.dropped_cpu}"))
        steps.sort(key=lambda step: step.t)
        self.sink.report(
            codes.EDGE_LOST, t, cpu=cpu, obj=irq.irq, val=irq.outstanding[0],
            t_first=irq.quiet_since if irq.quiet_since != INF else t,
            severity="warn" if possibly else "", conf=50 if possibly else 100,
            cause=codes.DROPPED_INPROGRESS.name if irq.dropped_t >= irq.outstanding[0] else "",
            expected="a handler run after the raise",
            observed=f"{len(irq.outstanding)} raise(s) outstanding, pending 0, irqs_pending 0, no handler"
            + (", possibly consumed" if possibly else ""),
            evidence=steps,
        )  # fmt: skip
        irq.drop(len(irq.outstanding))

    # -- transitions -----------------------------------------------------------------------------------------

    def dropped(self, irq: IrqRecord, cpu: int, t: int, seq: int) -> None:
        """The flow left because of INPROGRESS and remembers nothing."""
        irq.dropped_t = t
        irq.dropped_cpu = cpu
        self.sink.report(
            codes.DROPPED_INPROGRESS, t, cpu=cpu, obj=irq.irq, tgt=irq.inprogress, seq=seq,
            expected="the edge is remembered", observed=f"handler running on cpu{irq.inprogress}",
        )  # fmt: skip

    def unmasked_early(self, irq: IrqRecord, t: int, seq: int) -> None:
        """The deferred move in ack unmasked the port; `bound` is the new cpu."""
        self.sink.report(
            codes.UNMASK_EARLY, t, cpu=irq.bound, obj=irq.irq, seq=seq,
            expected="masked until the handler has ended", observed=f"unmasked, bound to cpu{irq.bound}",
        )  # fmt: skip

    def concurrent(self, irq: IrqRecord, other: int, cpu: int, t: int, seq: int) -> None:
        """A second handler body begins while one runs on another cpu."""
        if irq.per_cpu != 0:
            return
        self.sink.report(
            codes.CONCURRENT, t, cpu=cpu, obj=irq.irq, tgt=other, t_first=irq.begin_t, seq=seq,
            expected="one handler at a time", observed=f"running on cpu{other} and cpu{cpu}",
        )  # fmt: skip

    def begun(self, irq: IrqRecord, cpu: int, t: int, seq: int, rerun: bool) -> None:
        """A handler begins."""
        if not irq.outstanding and irq.raises_known and not irq.first_run and not rerun:
            self.sink.report(
                codes.SPURIOUS_INVOCATION, t, cpu=cpu, obj=irq.irq, seq=seq,
                expected="a raise since the handler ran last", observed="none",
            )  # fmt: skip
        if irq.want != NONE:
            if cpu == irq.want:
                irq.want = NONE
            else:
                irq.begins_after += 1

    def ended(self, irq: IrqRecord, cpu: int, t: int, value: int, seq: int) -> None:
        """A handler returned `value` (NIL unknown, 0 IRQ_NONE)."""
        if irq.want != NONE and irq.begins_after == 1:
            self.agenda.at(t + self.stuck_ns, SOFTWARE, STUCK_MOVE, irq.irq, cpu, irq.want_gen)
        if value != 0:
            return
        if irq.none_start == NIL or t - irq.none_start >= SECOND:
            irq.none_start = t
            irq.none_count = 0
        irq.none_count += 1
        if irq.none_count == self.storm_per_s + 1:
            self.storm(irq, t, irq.none_count, seq)

    def storm(self, irq: IrqRecord, t: int, count: int, seq: int) -> None:
        """Too many runs without work."""
        self.sink.report(
            codes.STORM, t, obj=irq.irq, val=count, t_first=irq.none_start, seq=seq,
            expected=f"at most {self.storm_per_s} a second", observed=f"{count} handler runs without work",
        )  # fmt: skip

    def affinity_refused(self, irq: IrqRecord, cpu: int, t: int, seq: int, is_ipi: bool) -> None:
        """set_affinity on the percpu flow."""
        if not is_ipi:
            self.sink.report(
                codes.AFFINITY_REFUSED, t, cpu=cpu, obj=irq.irq, severity="warn" if irq.virq_global else "", seq=seq,
                expected=f"bound to cpu{cpu}", observed=f"stays on cpu{irq.bound}",
            )  # fmt: skip

    def affinity_wanted(self, irq: IrqRecord, cpu: int) -> None:
        """set_affinity was accepted: from the next handling on, cpu has stuck_ns to show up."""
        irq.want = cpu
        irq.want_gen += 1
        irq.begins_after = 0

    def check_masked(self, irq: IrqRecord, t: int) -> None:
        """Start or stop the clock of flow-masked-forever."""
        if irq.pending == 1 and irq.masked == 1 and irq.disabled == 0 and irq.inprogress == NOWHERE:
            if irq.mask_since == INF:
                irq.mask_since = t
                irq.masked_gen += 1
                if not self.closed and not irq.masked_reported:
                    self.agenda.at(t + self.stuck_ns, SOFTWARE, STUCK_MASKED, irq.irq, 0, irq.masked_gen)
        else:
            irq.mask_since = INF
            if irq.masked == 0:
                irq.masked_reported = False

    def eoi_owed(self, irq: IrqRecord, cpu: int, t: int) -> None:
        """A handler ended whose driver owes a late EOI."""
        irq.eoi_gen += 1
        if not self.closed:
            self.agenda.at(t + self.stuck_ns, SOFTWARE, STUCK_EOI, irq.irq, cpu, irq.eoi_gen)

    # -- time-outs -------------------------------------------------------------------------------------------

    def fire(self, action: int, irq: IrqRecord, cpu: int, generation: int, t: int) -> None:
        """A time-out is due."""
        if action == SETTLE:
            if irq.quiet_gen == generation and irq.quiet_since != INF and irq.outstanding and self.is_quiet(irq):
                self.report_lost(irq, t, cpu)
        elif action == STUCK_MASKED:
            if irq.masked_gen == generation and irq.mask_since != INF:
                self.masked_due(irq, t)
        elif action == STUCK_EOI:
            if irq.eoi_gen == generation and irq.eoi_owed == 1:
                self.report_eoi(irq, t)
        elif action == STUCK_MOVE and irq.want_gen == generation and irq.want != NONE and irq.begins_after >= 2:
            self.move_due(irq, cpu, t)

    def move_due(self, irq: IrqRecord, cpu: int, t: int) -> None:
        """Handled elsewhere for stuck_ns. Only closed runs know where it is bound; there a rerun may be elsewhere."""
        if self.closed and irq.bound == irq.want:
            return
        self.sink.report(
            codes.AFFINITY_IGNORED, t, cpu=irq.want, obj=irq.irq, tgt=cpu, t_first=t - self.stuck_ns,
            expected=f"handled on cpu{irq.want}", observed=f"handled {irq.begins_after} times elsewhere",
        )  # fmt: skip
        irq.want = NONE

    def masked_due(self, irq: IrqRecord, t: int) -> None:
        """Masked and pending for stuck_ns; a late EOI or a back-off that is still in time is an excuse."""
        excuse = irq.backoff_until
        if irq.eoi_owed == 1 and irq.end_t != NIL:
            excuse = max(excuse, irq.end_t + self.stuck_ns)
        if excuse > t:
            self.agenda.at(excuse, SOFTWARE, STUCK_MASKED, irq.irq, 0, irq.masked_gen)
            return
        self.report_masked(irq, t)

    def report_masked(self, irq: IrqRecord, t: int) -> None:
        """Raise flow-masked-forever."""
        irq.masked_reported = True
        self.sink.report(
            codes.MASKED_FOREVER, t, cpu=irq.bound, obj=irq.irq, t_first=irq.mask_since,
            cause=codes.LATEEOI_MISSING.name if irq.eoi_owed == 1 else "",
            expected="unmasked", observed=f"pending 1, masked (reasons {irq.reasons}), no handler",
        )  # fmt: skip

    def report_eoi(self, irq: IrqRecord, t: int) -> None:
        """Raise flow-lateeoi-missing."""
        self.sink.report(
            codes.LATEEOI_MISSING, t, cpu=irq.bound, obj=irq.irq, t_first=irq.end_t,
            severity="error" if irq.pending == 1 else "", expected="late EOI", observed="handler ended, none issued",
        )  # fmt: skip

    def conclude(self, irq: IrqRecord, t: int) -> None:
        """End of a closed run (spec B): what is owed or stuck now."""
        if irq.eoi_due != INF or irq.inprogress != NOWHERE or t < irq.backoff_until:
            return
        if irq.eoi_owed == 1:
            self.report_eoi(irq, t)
        if irq.mask_since != INF:
            self.report_masked(irq, t)


class DescMonitor:
    """S6.5: entries and exits of handlers, disable depth, handlers that find nothing."""

    def __init__(self, config: Config, sink: Sink) -> None:
        self.sink = sink
        self.window: int = config.integer("spurious_window")
        self.risk: int = config.integer("spurious_risk")
        self.descs: dict[int, IrqDesc] = {}
        self.stacks: dict[int, CpuStack] = {}
        self.known: bool = True

    def desc(self, irq: int) -> IrqDesc:
        """The irq's record."""
        found = self.descs.get(irq)
        if found is None:
            found = self.descs[irq] = IrqDesc(irq, self.known)
        return found

    def stack(self, cpu: int) -> CpuStack:
        """The cpu's handlers."""
        found = self.stacks.get(cpu)
        if found is None:
            found = self.stacks[cpu] = CpuStack(self.known)
        return found

    def entry(self, irq: int, cpu: int, t: int, seq: int) -> None:
        """irq_handler_entry."""
        desc = self.desc(irq)
        if not self.stack(cpu).enter(irq):
            self.unbalanced(irq, cpu, t, seq, "entered again before its exit")
        if desc.cpu not in (NONE, cpu) and desc.per_cpu == 0:
            self.sink.report(
                codes.DESC_CONCURRENT, t, cpu=cpu, obj=irq, tgt=desc.cpu, t_first=desc.begin_t, seq=seq,
                expected="one handler at a time", observed=f"running on cpu{desc.cpu} and cpu{cpu}",
            )  # fmt: skip
        desc.cpu = cpu
        desc.begin_t = t

    def exit(self, irq: int, cpu: int, t: int, value: int, seq: int) -> None:
        """irq_handler_exit; `value` is the irqreturn, NIL unknown."""
        desc = self.desc(irq)
        if not self.stack(cpu).leave(irq):
            self.unbalanced(irq, cpu, t, seq, "exit does not match the innermost entry")
        if desc.cpu == cpu:
            desc.max_handler_ns = max(desc.max_handler_ns, t - desc.begin_t)
            desc.cpu = NONE
        if value == NIL:
            return
        unhandled = desc.note(value != 0, self.window)
        if unhandled >= self.risk and not desc.risk_reported:
            desc.risk_reported = True
            self.sink.report(
                codes.DESC_SPURIOUS, t, cpu=cpu, obj=irq, val=unhandled, seq=seq,
                observed=f"{unhandled} of {desc.count} returns were IRQ_NONE",
            )  # fmt: skip

    def state(self, irq: int, word: int, depth: int, t: int, seq: int) -> None:
        """irqdesc.state: the state word and the disable depth (NIL unknown)."""
        desc = self.desc(irq)
        if word != NIL:
            desc.per_cpu = 1 if word & PER_CPU else 0
        if depth != NIL and (depth < 0 or depth == 0xFFFFFFFF):
            self.unbalanced(irq, NONE, t, seq, "disable depth below zero")

    def movable(self, irq: int) -> None:
        """set_affinity was accepted for it: it is not per-cpu (U4)."""
        self.desc(irq).per_cpu = 0

    def unbalanced(self, irq: int, cpu: int, t: int, seq: int, what: str) -> None:
        """Raise irqdesc-unbalanced."""
        self.sink.report(codes.DESC_UNBALANCED, t, cpu=cpu, obj=irq, seq=seq, observed=what)

    def forget(self, cpu: int) -> None:
        """Records of `cpu` (NONE: all) were lost (U2)."""
        self.known = False
        for number in list(self.stacks) if cpu == NONE else [cpu]:
            self.stacks[number] = CpuStack(False)
        for desc in self.descs.values():
            if cpu in (NONE, desc.cpu):
                desc.cpu = NONE

    def max_handler_ns(self) -> int:
        """Metric: longest handler run."""
        return max((desc.max_handler_ns for desc in self.descs.values()), default=0)
