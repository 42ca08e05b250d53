"""Linux irq flow for event channels: state and primitive operations (spec S4.3); policies put them in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from replay.agenda import SOFTWARE, UPCALL
from replay.bodies import Bodies, Lags
from replay.declare import Config
from replay.events import INF, NIL, NONE
from replay.hardware.evtchn_two_level import TYPE_IPI, TYPE_PIRQ, TYPE_VIRQ
from replay.knowledge import UNKNOWN
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.irq_flow import codes
from replay.systems.irq_flow.calibration import CONSUME, DURATION, LATEEOI, SPURIOUS, WORKED
from replay.systems.irq_flow.monitor import FIRST_TIMER, SPURIOUS_CAP, DescMonitor, Monitor
from replay.systems.irq_flow.state import EOI_PENDING, EXPLICIT, NOWHERE, IrqRecord

__all__ = ["IrqFlowRules"]

#: Agenda: upcall of irq a on cpu b; last look of the handler; its end; late EOI; end of the late EOI's back-off.
DO_UPCALL: Final = 0
DO_CONSUME: Final = 1
DO_END: Final = 2
DO_LATEEOI: Final = 3
DO_UNMASK: Final = 4

TYPES: Final = {"pirq": TYPE_PIRQ, "virq": TYPE_VIRQ, "ipi": TYPE_IPI}
#: Late EOIs with the spurious flag up to this many cost nothing (Linux event_eoi_delay's threshold).
SPURIOUS_THRESHOLD: Final = 1
MAX_BACKOFF_NS: Final = 1_000_000_000


class IrqFlowRules(Machine):
    """State of all irqs of one guest kernel, and what can be done to them."""

    def __init__(self, policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.policy = policy
        self.closed: bool = sink.closed
        self.cpu: int = config.integer("cpu")
        self.upcall_ns: int = config.integer("upcall_ns")
        self.handler_ns: int = config.integer("handler_ns")
        self.consume_ns: int = config.integer("consume_ns")
        self.lateeoi_ns: int = NONE if config["lateeoi_ns"] is None else config.integer("lateeoi_ns")
        self.virq_global: bool = bool(config["virq_global"])
        self.percpu: bool = bool(config["percpu"])
        self.type: int = TYPES.get(str(config["irq_type"]), NONE)
        self.move_at_once: bool = bool(config["move_at_once"])
        self.move_when_dropped: bool = bool(config["move_when_dropped"])
        self.jiffy_ns: int = config.integer("jiffy_ns")
        self.monitor = Monitor(config, sink, self.agenda)
        self.descs = DescMonitor(config, sink)
        self.irqs: dict[int, IrqRecord] = {}
        self.busy_until: dict[int, int] = {}  # cpus inside a serialised flow
        self.upcall_found: dict[int, bool] = {}  # recordings: what the last upcall of a cpu led to
        self.seq: int = NONE
        self.raises: int = 0
        self.coalesced: int = 0
        self.acked: int = 0
        self.resends: int = 0
        self.handler_runs: int = 0
        self.reruns: int = 0
        self.pended_inprogress: int = 0
        self.dropped: int = 0
        self.upcalls: int = 0
        self.spurious_upcalls: int = 0
        self.active_skips: int = 0
        self.migrations: int = 0
        self.deferred: int = 0
        self.refused: int = 0
        self.consumed: int = 0
        self.unmask_hypercalls: int = 0
        self.max_latency_ns: int = 0
        self.lateeoi_delay_ns: int = 0
        self.handler_time_ns: int = 0
        self.bodies: Bodies | None = None  # what-if on a recording
        self.lags: Lags | None = None

    def load(self, init: Mapping[str, Any]) -> None:
        """`init.S4` = {bound{irq: cpu}, types{irq: name}, percpu[irq]}."""
        if self.measured is not None:
            self.bodies = self.measured.bodies
            self.lags = self.measured.lags
            self.monitor.consume_known = self.sees("flow.consume")
        state = init.get("S4", init)
        for name, cpu in state.get("bound", {}).items():
            self.irq(int(name)).bound = int(cpu)
        for name, kind in state.get("types", {}).items():
            self.irq(int(name)).type = TYPES.get(str(kind), NONE)
        for name in state.get("percpu", ()):
            self.irq(int(name)).per_cpu = 1

    def irq(self, number: int) -> IrqRecord:
        """The irq's record."""
        found = self.irqs.get(number)
        if found is None:
            known = self.from_boot or self.closed
            found = self.irqs[number] = IrqRecord(number, self.cpu, known)
            found.type = self.type
            found.virq_global = self.virq_global
            if self.percpu:
                found.per_cpu = 1
        return found

    # -- port and upcall -------------------------------------------------------------------------------------

    def raise_(self, irq: IrqRecord) -> None:
        """Someone sets the port pending (S5 E1); what is pending already coalesces."""
        self.raises += 1
        irq.add_raise(self.now, self.seq)
        if irq.post() == 1:
            self.coalesced += 1
            return
        irq.quiet_since = INF
        if self.closed and irq.masked == 0:
            self.notify(irq, self.seq)
        self.monitor.check_masked(irq, self.now)

    def notify(self, irq: IrqRecord, seq: int = NONE) -> None:
        """The cpu to which the port is bound gets an upcall: upcall_ns from now, or when the recorded raise `seq` (the
        oldest outstanding one) was taken, wherever that was: no cpu was ready for it before."""
        irq.posted += 1
        due = self.now + self.upcall_ns
        if self.lags is not None:
            if seq < 0 and irq.raise_seqs:
                seq = irq.raise_seqs[0]
            taken = self.lags.of(seq)
            if taken >= self.now:
                due = taken
        self.agenda.at(due, UPCALL, DO_UPCALL, irq.irq, irq.bound)

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        """An upcall, a step of a handler, or one of the monitor's time-outs."""
        irq = self.irq(a)
        if action == DO_UPCALL:
            self.upcall(irq, b)
        elif action == DO_CONSUME:
            self.consumed += irq.consume_until(self.now)
        elif action == DO_END:
            self.handler_end(irq, b)
        elif action == DO_LATEEOI:
            irq.eoi_due = INF
            self.lateeoi(irq, b, bool(c))
        elif action == DO_UNMASK:
            if irq.eoi_gen == c:
                self.finish_lateeoi(irq, b)
        elif action >= FIRST_TIMER:
            self.monitor.fire(action, irq, b, c, self.now)

    def upcall(self, irq: IrqRecord, cpu: int) -> None:
        """cpu's scan looks at the port: ready and bound here, or nothing to do (S5 E2)."""
        if self.policy.serialised and self.busy_until.get(cpu, NIL) > self.now:
            self.agenda.at(self.busy_until[cpu], UPCALL, DO_UPCALL, irq.irq, cpu)
            return
        irq.posted -= 1
        self.upcalls += 1
        if not irq.is_ready() or irq.bound != cpu:
            self.spurious_upcalls += 1
        elif self.policy.gate(self, irq, cpu):
            self.policy.flow_enter(self, irq, cpu)
        self.monitor.settle(irq, self.now, cpu)

    def no_work(self, cpu: int) -> None:
        """flow-upcall-no-work, which only recordings raise."""
        self.sink.report(
            codes.UPCALL_NO_WORK, self.now, cpu=cpu, seq=self.seq,
            expected="a pending event for this CPU", observed="none was ready",
        )  # fmt: skip

    # -- primitive operations (S4.3) --------------------------------------------------------------------------

    def mask(self, irq: IrqRecord, reason: int) -> None:
        """Add a mask reason; the port is masked while there is one (Linux do_mask)."""
        irq.reasons |= reason
        if irq.masked != 1:
            irq.masked = 1
            irq.mask_t = self.now
        self.monitor.check_masked(irq, self.now)

    def unmask(self, irq: IrqRecord, reason: int, cpu: int) -> None:
        """Drop a mask reason; with the last one the port is unmasked, and notified again if it is pending: by
        hypercall if it is not local (Linux do_unmask, unmask_evtchn)."""
        irq.reasons &= ~reason
        if irq.reasons or irq.masked == 0:
            return
        irq.masked = 0
        if irq.mask_t != NIL:
            irq.masked_ns += self.now - irq.mask_t
        if self.closed and irq.pending == 1:
            if cpu != irq.bound:
                self.unmask_hypercalls += 1
            self.notify(irq)
        self.monitor.check_masked(irq, self.now)

    def clear(self, irq: IrqRecord) -> None:
        """Clear the pending bit (Linux clear_evtchn)."""
        if irq.pending == 1:
            self.acked += 1
        irq.pending = 0
        self.monitor.check_masked(irq, self.now)

    def ack(self, irq: IrqRecord, cpu: int) -> None:
        """The chip's ack: deferred move, then clear (Linux ack_dynirq). Whether a flow that is then dropped has moved
        differs between kernels."""
        if irq.inprogress == NOWHERE or self.move_when_dropped:
            self.deferred_move(irq, cpu)
        self.clear(irq)

    def deferred_move(self, irq: IrqRecord, cpu: int) -> None:
        """mask, rebind, *unmask*, whatever the flow had masked before (Linux move_native_irq of 2.6.32 to 2.6.36)."""
        if irq.move_to == NONE or irq.disabled == 1:
            return
        self.mask(irq, EXPLICIT)
        self.move_masked(irq)
        self.unmask(irq, EXPLICIT, cpu)
        if self.policy.unmasks_early:
            self.monitor.unmasked_early(irq, self.now, self.seq)

    def move_masked(self, irq: IrqRecord) -> None:
        """Carry out a deferred affinity change on a masked port (Linux move_masked_irq)."""
        if irq.move_to == NONE or irq.disabled == 1:
            return
        irq.bound = irq.move_to
        irq.move_to = NONE
        self.migrations += 1

    def defer_move(self, irq: IrqRecord, cpu: int) -> None:
        """set_affinity waits for the next ack or eoi (IRQ_MOVE_PENDING)."""
        irq.move_to = cpu
        self.deferred += 1
        self.accept_move(irq, cpu)

    def bind(self, irq: IrqRecord, cpu: int) -> None:
        """Rebind at once (Linux xen_rebind_evtchn_to_cpu)."""
        irq.bound = cpu
        self.accept_move(irq, cpu)

    def accept_move(self, irq: IrqRecord, cpu: int) -> None:
        """An irq that can be moved is not per-cpu (U4)."""
        if irq.per_cpu == UNKNOWN:
            irq.per_cpu = 0
        self.descs.movable(irq.irq)
        self.monitor.affinity_wanted(irq, cpu)

    def refuse_move(self, irq: IrqRecord, cpu: int) -> None:
        """There is no set_affinity."""
        self.refused += 1
        self.monitor.affinity_refused(irq, cpu, self.now, self.seq, irq.type == TYPE_IPI)

    def has_percpu_flow(self, irq: IrqRecord) -> bool:
        """Whether the edge kernel gives this irq handle_percpu_irq: IPIs and irqs requested per-cpu."""
        return irq.type == TYPE_IPI or irq.per_cpu == 1

    def disable(self, irq: IrqRecord) -> None:
        """disable_irq: the dynamic chip masks at once."""
        irq.disabled = 1
        self.mask(irq, EXPLICIT)

    def enable(self, irq: IrqRecord, cpu: int) -> None:
        """enable_irq: an edge remembered while disabled is sent again (check_irq_resend), then unmask."""
        irq.disabled = 0
        if irq.irqs_pending == 1 and irq.inprogress == NOWHERE:
            irq.irqs_pending = 0
            if irq.post() != 1:
                self.resends += 1
        self.unmask(irq, EXPLICIT, cpu)
        self.monitor.check_masked(irq, self.now)

    # -- handler ---------------------------------------------------------------------------------------------

    def begin(self, irq: IrqRecord, cpu: int) -> None:
        """The handler starts: consume and end follow at their offsets."""
        self.handler_runs += 1
        if irq.running and irq.begin_cpu != cpu:
            self.monitor.concurrent(irq, irq.begin_cpu, cpu, self.now, self.seq)
        irq.running += 1
        irq.begin_t = self.now
        irq.begin_cpu = cpu
        self.effects.append((self.now, cpu << 32 | irq.irq))
        if irq.outstanding and self.now - irq.outstanding[0] > self.max_latency_ns:
            self.max_latency_ns = self.now - irq.outstanding[0]
        self.monitor.begun(irq, cpu, self.now, self.seq, True)
        run_ns, consume_ns = (self.handler_ns, self.consume_ns) if self.bodies is None else self.body(irq, self.bodies)
        self.handler_time_ns += run_ns
        self.busy_until[cpu] = self.now + run_ns
        self.agenda.at(self.now + consume_ns, SOFTWARE, DO_CONSUME, irq.irq, cpu)
        self.agenda.at(self.now + run_ns, SOFTWARE, DO_END, irq.irq, cpu)

    def body(self, irq: IrqRecord, bodies: Bodies) -> tuple[int, int]:
        """What-if on a recording: the handler's run and last look, as recorded for the raises that it serves (C2). Of
        several recorded runs that became one, those with work are appended (C5)."""
        seqs = irq.raise_seqs
        taken = bodies.take(irq.irq, seqs[0], seqs[-1]) if seqs else ()
        if not taken:
            run = bodies.substitute(irq.irq)
            irq.eoi_after, irq.eoi_spurious = (self.lateeoi_ns if self.lateeoi_ns >= 0 else NIL), 0
            run_ns = self.handler_ns if run is None else run[DURATION]
            return run_ns, min(self.consume_ns, run_ns)
        run_ns = taken[0][DURATION]
        look = taken[0][CONSUME]
        consume_ns = min(self.consume_ns, run_ns) if look == NIL else look
        irq.eoi_after, irq.eoi_spurious = taken[0][LATEEOI], taken[0][SPURIOUS]
        for more in taken[1:]:
            if more[WORKED]:
                look = more[CONSUME]
                consume_ns = run_ns + (min(self.consume_ns, more[DURATION]) if look == NIL else look)
                run_ns += more[DURATION]
                irq.eoi_after, irq.eoi_spurious = more[LATEEOI], more[SPURIOUS]
        if irq.eoi_after == NIL and self.lateeoi_ns >= 0:
            irq.eoi_after = self.lateeoi_ns
        return run_ns, consume_ns

    def handler_end(self, irq: IrqRecord, cpu: int) -> None:
        """The handler returns."""
        irq.running -= 1
        irq.end_t = self.now
        self.monitor.ended(irq, cpu, self.now, 1, NONE)
        self.policy.flow_end(self, irq, cpu)
        self.monitor.check_masked(irq, self.now)
        self.monitor.settle(irq, self.now, cpu)

    def drop(self, irq: IrqRecord, cpu: int) -> None:
        """The flow leaves because of INPROGRESS and remembers nothing."""
        self.dropped += 1
        self.monitor.dropped(irq, cpu, self.now, self.seq)

    def skip(self, irq: IrqRecord, cpu: int) -> None:
        """The late-EOI gate is closed: the bit stays pending."""
        self.active_skips += 1
        self.sink.report(
            codes.ACTIVE_SKIP, self.now, cpu=cpu, obj=irq.irq, seq=self.seq,
            expected="nothing active from before", observed="late EOI still owed: the bit stays pending",
        )  # fmt: skip

    # -- late EOI --------------------------------------------------------------------------------------------

    def expect_lateeoi(self, irq: IrqRecord, cpu: int) -> None:
        """The handler has ended; the driver owes the late EOI."""
        irq.eoi_owed = 1
        self.monitor.eoi_owed(irq, cpu, self.now)
        after = self.lateeoi_ns if self.bodies is None else irq.eoi_after
        if self.closed and after >= 0:
            irq.eoi_due = self.now + after
            self.agenda.at(irq.eoi_due, SOFTWARE, DO_LATEEOI, irq.irq, cpu, irq.eoi_spurious)

    def lateeoi(self, irq: IrqRecord, cpu: int, spurious: bool) -> None:
        """xen_irq_lateeoi: spurious ones beyond the threshold are delayed, 2^(n-2) jiffies up to a second."""
        if self.closed and irq.eoi_owed != 1:
            return  # a recorded one whose handler run this policy does not have
        irq.lateeoi_t = self.now
        irq.eoi_owed = 0
        irq.eoi_gen += 1
        if not spurious:
            irq.spurious_cnt = 0
        elif irq.spurious_cnt < SPURIOUS_CAP:
            irq.spurious_cnt += 1
            if irq.spurious_cnt == SPURIOUS_CAP:
                self.monitor.storm(irq, self.now, SPURIOUS_CAP, self.seq)
        delay = 0
        if irq.spurious_cnt > SPURIOUS_THRESHOLD:
            delay = min(self.jiffy_ns << min(irq.spurious_cnt - 2, 30), MAX_BACKOFF_NS)
        if irq.end_t != NIL:
            self.lateeoi_delay_ns = max(self.lateeoi_delay_ns, self.now - irq.end_t + delay)
        if delay:
            irq.backoff_until = self.now + delay
            self.agenda.at(irq.backoff_until, SOFTWARE, DO_UNMASK, irq.irq, cpu, irq.eoi_gen)
        else:
            self.finish_lateeoi(irq, cpu)

    def finish_lateeoi(self, irq: IrqRecord, cpu: int) -> None:
        """is_active := 0, EOI_PENDING dropped, unmask (Linux xen_irq_lateeoi_locked)."""
        irq.is_active = 0
        self.unmask(irq, EOI_PENDING, cpu)

    # -- end --------------------------------------------------------------------------------------------------

    def conclude(self, t_end: int) -> None:
        """Closed runs: missing late EOIs and stuck ports are judged at the end (spec B)."""
        if self.closed:
            for irq in self.irqs.values():
                self.monitor.conclude(irq, t_end)

    def metrics(self) -> dict[str, int]:
        """Spec S4.7; conservation: raises + resends = acked + coalesced + pending."""
        records = list(self.irqs.values())
        return {
            "raises": self.raises,
            "coalesced": self.coalesced,
            "acked": self.acked,
            "resends": self.resends,
            "pending": sum(irq.pending == 1 for irq in records),
            "consumed": self.consumed,
            "outstanding": sum(len(irq.outstanding) for irq in records),
            "handler_runs": self.handler_runs,
            "reruns": self.reruns,
            "lost_edges": self.monitor.lost_edges,
            "lost_raises": self.monitor.lost_raises,
            "possibly_lost_edges": self.monitor.possible_lost,
            "pended_inprogress": self.pended_inprogress,
            "dropped_upcalls": self.dropped,
            "upcalls": self.upcalls,
            "spurious_upcalls": self.spurious_upcalls,
            "active_skips": self.active_skips,
            "migrations": self.migrations,
            "migrations_deferred": self.deferred,
            "migrations_refused": self.refused,
            "unmask_hypercalls": self.unmask_hypercalls,
            "masked_ns": sum(irq.masked_ns for irq in records),
            "max_latency_ns": self.max_latency_ns,
            "max_lateeoi_ns": self.lateeoi_delay_ns,
            "max_handler_ns": self.descs.max_handler_ns(),
            "handler_time_ns": self.handler_time_ns,
        }
