"""Linux irq flow for event channels: the event glue, and what recordings say about the state.

What a flow does with the primitives is the policy's business. Closed runs feed raises and affinity changes and the
model runs upcalls and handlers; on recordings the recorded acks, masks and handler runs are the truth.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from replay.events import INF, KIND_ID, NIL, NONE
from replay.hardware.evtchn_two_level import TYPE_PIRQ
from replay.knowledge import UNKNOWN
from replay.systems.irq_flow import codes
from replay.systems.irq_flow.rules import IrqFlowRules
from replay.systems.irq_flow.state import EXPLICIT, NOWHERE, SOMEWHERE, IrqRecord

__all__ = ["IrqFlowMachine"]

RAISE: Final = KIND_ID["flow.raise"]
SET_AFFINITY: Final = KIND_ID["flow.set_affinity"]
DISABLE: Final = KIND_ID["flow.disable"]
ENABLE: Final = KIND_ID["flow.enable"]
FLOW_UPCALL: Final = KIND_ID["flow.upcall"]
ACK: Final = KIND_ID["flow.ack"]
MASK: Final = KIND_ID["flow.mask"]
UNMASK: Final = KIND_ID["flow.unmask"]
EOI: Final = KIND_ID["flow.eoi"]
BEGIN: Final = KIND_ID["flow.handler.begin"]
END: Final = KIND_ID["flow.handler.end"]
CONSUME: Final = KIND_ID["flow.consume"]
LATEEOI: Final = KIND_ID["flow.lateeoi"]
DESC_ENTRY: Final = KIND_ID["irqdesc.entry"]
DESC_EXIT: Final = KIND_ID["irqdesc.exit"]
DESC_STATE: Final = KIND_ID["irqdesc.state"]
BIND: Final = KIND_ID["evtchn.bind"]
LOST: Final = KIND_ID["trace.lost"]


class IrqFlowMachine(IrqFlowRules):
    """All irqs of one guest kernel."""

    columns: ClassVar[tuple[str, ...]] = ("kind", "t_ns", "cpu", "obj", "tgt", "val", "flags", "seq", "val2")

    # -- events ----------------------------------------------------------------------------------------------

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        """The event glue: most frequent kinds first; those that only recordings have are skipped in closed runs."""
        heap = self.agenda.heap
        closed = self.closed
        irqs = self.irqs
        if not self.from_boot:
            self.descs.known = False
        for kind, t, cpu, number, tgt, val, flags, seq, val2 in rows:
            if heap and heap[0][0] <= t:
                self.advance(t)
            self.now = t
            self.seq = seq
            if kind == LOST:
                self.taint(cpu, val if val != NIL else t, t)
                continue
            if kind == FLOW_UPCALL:
                if not closed:
                    self.on_upcall(cpu)
                continue
            if number < 0:
                continue
            irq = irqs.get(number) or self.irq(number)
            if kind == RAISE:
                self.raise_(irq)
            elif not closed and kind == BEGIN:
                self.on_begin(irq, cpu)
            elif not closed and kind == END:
                self.on_end(irq, cpu, val)
            elif not closed and kind == ACK:
                self.on_ack(irq, cpu)
            elif not closed and kind == CONSUME:
                self.on_consume(irq)
            elif not closed and kind == DESC_ENTRY:
                self.descs.entry(number, cpu, t, seq)
            elif not closed and kind == DESC_EXIT:
                self.descs.exit(number, cpu, t, val, seq)
            elif not closed and kind == UNMASK:
                self.on_unmask(irq, cpu, val)
            elif not closed and kind == MASK:
                self.mask(irq, val if val > 0 else EXPLICIT)
            elif not closed and kind == EOI:
                self.on_eoi(irq, cpu)
            elif kind == LATEEOI:
                if self.bodies is None:  # else it comes with the body of its handler run
                    self.lateeoi(irq, cpu, bool(flags & 1))
            elif kind == SET_AFFINITY:
                self.policy.on_set_affinity(self, irq, tgt)
            elif kind == DISABLE:
                self.disable(irq)
            elif kind == ENABLE:
                self.enable(irq, cpu)
            elif kind == BIND:
                self.on_bind(irq, tgt, val)
            elif kind == DESC_STATE and not closed:
                self.descs.state(number, val, val2, t, seq)

    # -- what recordings say ----------------------------------------------------------------------------------

    def on_bind(self, irq: IrqRecord, cpu: int, kind: int) -> None:
        """evtchn.bind gives the kind of the channel; `obj` is the port, used as irq number."""
        irq.type = kind if kind != NIL else irq.type
        irq.first_run = True
        if cpu >= 0:
            irq.bound = cpu
        if irq.type == TYPE_PIRQ and not self.policy.has_end_hook:
            self.sink.report(
                codes.NO_END_NOTIFY, self.now, obj=irq.irq, seq=self.seq,
                expected="EOI to the hypervisor at the end", observed="a flow without an end hook",
            )  # fmt: skip

    def on_upcall(self, cpu: int) -> None:
        """An upcall begins on cpu; the one before found something or it did not."""
        self.upcalls += 1
        if self.upcall_found.get(cpu) is False:
            self.spurious_upcalls += 1
            self.no_work(cpu)
        self.upcall_found[cpu] = False

    def on_ack(self, irq: IrqRecord, cpu: int) -> None:
        """The chip's ack is recorded: the pending bit is clear; the flow runs on cpu, or has met a running handler."""
        irq.acks = True
        if cpu in self.upcall_found:
            self.upcall_found[cpu] = True
        self.clear(irq)
        if irq.inprogress == NOWHERE:
            irq.entering = cpu
            irq.quiet_since = INF
        elif irq.inprogress != SOMEWHERE:
            self.policy.on_inprogress(self, irq, cpu)

    def on_unmask(self, irq: IrqRecord, cpu: int, reason: int) -> None:
        """An unmask is recorded. Inside a flow that had masked the port it is the deferred move's doing."""
        if reason > 0:
            self.unmask(irq, reason, cpu)
        else:
            irq.reasons = 0
            irq.masked = 0
        if irq.move_to != NONE and cpu in (irq.entering, irq.inprogress) and cpu != NONE:
            self.move_masked(irq)
            if self.policy.unmasks_early:
                self.monitor.unmasked_early(irq, self.now, self.seq)
        elif irq.entering == cpu:
            irq.entering = NONE
        self.monitor.check_masked(irq, self.now)
        self.monitor.settle(irq, self.now, cpu)

    def on_eoi(self, irq: IrqRecord, cpu: int) -> None:
        """An eoi is recorded: what it does is the policy's business."""
        if irq.entering == cpu:
            irq.entering = NONE
        self.policy.on_eoi(self, irq, cpu)
        self.monitor.settle(irq, self.now, cpu)

    def on_begin(self, irq: IrqRecord, cpu: int) -> None:
        """A handler begins: whatever was remembered is being served."""
        self.handler_runs += 1
        if irq.inprogress >= 0 and irq.inprogress != cpu:
            self.monitor.concurrent(irq, irq.inprogress, cpu, self.now, self.seq)
        rerun = irq.irqs_pending != 0
        self.monitor.begun(irq, cpu, self.now, self.seq, rerun)
        if rerun and irq.irqs_pending == 1:
            self.reruns += 1
        irq.inprogress = cpu
        irq.entering = NONE
        irq.irqs_pending = 0
        irq.begin_t = self.now
        irq.first_run = False
        irq.raises_known = self.sees("flow.raise")
        irq.ahead = len(irq.outstanding)
        if irq.outstanding and self.now - irq.outstanding[0] > self.max_latency_ns:
            self.max_latency_ns = self.now - irq.outstanding[0]
        if cpu in self.upcall_found:
            self.upcall_found[cpu] = True
        if irq.pending == 1 and not irq.acks:
            irq.pending = UNKNOWN
        self.monitor.check_masked(irq, self.now)

    def on_consume(self, irq: IrqRecord) -> None:
        """The handler looked at its ring for the last time."""
        irq.consume_seen = True
        self.consumed += irq.consume_until(self.now)

    def on_end(self, irq: IrqRecord, cpu: int, value: int) -> None:
        """A handler returned. Without a record of its last look, what was raised before it began is consumed, and
        what was raised during its run possibly."""
        began = cpu >= 0 and irq.inprogress == cpu
        if began:
            self.handler_time_ns += self.now - irq.begin_t
        if irq.inprogress in (cpu, SOMEWHERE):
            irq.inprogress = NOWHERE
        irq.end_t = self.now
        if not began:
            irq.drop(len(irq.outstanding))
        else:
            self.consumed += irq.ahead
            irq.drop(irq.ahead)
        self.monitor.ended(irq, cpu, self.now, value, self.seq)
        if self.owes_lateeoi(irq):
            self.expect_lateeoi(irq, cpu)
        self.monitor.check_masked(irq, self.now)
        self.monitor.settle(irq, self.now, cpu)

    def owes_lateeoi(self, irq: IrqRecord) -> bool:
        """Whether the driver still owes a late EOI for the run that has just ended: its flow wants one, or this irq
        was seen to get one, and none came during the run."""
        wanted = self.policy.owes_eoi or irq.lateeoi_t != NIL
        return wanted and irq.lateeoi_t < irq.begin_t and self.sees("flow.lateeoi")

    # -- lost records, end -------------------------------------------------------------------------------------

    def taint(self, cpu: int, t0: int, t1: int) -> None:
        """Lost records may hide a raise, an ack or a handler of any irq: all is unknown (U2, U6)."""
        if self.closed:
            return
        self.from_boot = False
        for irq in self.irqs.values():
            irq.forget()
        self.upcall_found.clear()
        self.descs.forget(cpu)
        self.sink.taint(t0)
