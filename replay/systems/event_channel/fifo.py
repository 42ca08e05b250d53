"""FIFO event channels: the machine (spec S5.5).

`fifo.word`, `fifo.head` and `fifo.ready` give shared memory as it was read; sends, upcalls and handler runs move the
model between such readings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from replay.agenda import SOFTWARE
from replay.events import INF, KIND_ID, NIL, NONE
from replay.hardware.evtchn_fifo import BUSY, PORTS, QUEUES, FifoPort, FifoVcpu
from replay.knowledge import UNKNOWN
from replay.systems.event_channel import codes
from replay.systems.event_channel import machine as two_level
from replay.systems.event_channel.fifo_monitor import BUSY_LONG, DO_UPCALL, EVALUATE, UNLINKED, FifoDomain
from replay.systems.event_channel.fifo_rules import FifoRules

__all__ = ["FifoMachine"]

WORD: Final = KIND_ID["fifo.word"]
HEAD: Final = KIND_ID["fifo.head"]
READY: Final = KIND_ID["fifo.ready"]
CONSUMING: Final = KIND_ID["fifo.consuming"]
CHECK: Final = KIND_ID["fifo.check"]


class FifoMachine(FifoRules):
    """Event channels of all guests, FIFO ABI."""

    columns: ClassVar[tuple[str, ...]] = two_level.COLUMNS

    # -- events ----------------------------------------------------------------------------------------------

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        """The event glue."""
        closed = self.closed
        for kind, t, d, v, p, tgt, val, flags, seq in rows:
            self.advance(t)
            self.seq = seq
            dom = self.domain(d)
            if kind == CHECK:
                self.evaluate(dom, 0)
            elif kind == two_level.LOST:
                self.taint(NONE, val if val != NIL else t, t)
            elif kind in (HEAD, READY, CONSUMING, two_level.UPCALL, two_level.UPCALL_END):
                if v >= 0 and not closed:
                    self.on_vcpu(dom, dom.vcpu(v), kind, tgt, val)
            elif kind in (two_level.UPCALL_MASK, two_level.UPCALL_UNMASK):
                if v >= 0:
                    self.set_upcall_mask(dom, dom.vcpu(v), kind == two_level.UPCALL_MASK)
            elif not 0 < p < PORTS:
                self.out_of_range(dom, p)
            elif kind == two_level.SEND:
                self.sends += 1
                self.send(dom, dom.port(p))
            elif kind == two_level.HANDLED:
                if not closed and v >= 0:
                    self.on_handled(dom, dom.vcpu(v), dom.port(p))
            elif kind == two_level.CLEAR:
                if not closed:
                    self.on_clear(dom.port(p))
            elif kind == two_level.UNMASK:
                self.unmask(dom, dom.port(p))
            elif kind == two_level.MASK:
                self.mask(dom.port(p))
            elif kind == WORD:
                if not closed and val != NIL:
                    self.on_word(dom, dom.port(p), val)
            else:
                self.on_binding(dom, dom.port(p), kind, tgt, val, flags)

    def on_binding(self, dom: FifoDomain, port: FifoPort, kind: int, vcpu: int, val: int, flags: int) -> None:
        """Bind, rebind, close. FIFO's guest side needs no binding of its own: the queue decides."""
        if kind == two_level.BIND:
            port.notify_vcpu = max(vcpu, 0)
            if flags & 1:
                self.send(dom, port)
        elif kind in (two_level.BIND_VCPU, two_level.REBIND):
            if vcpu < 0 and self.closed:  # a request that does not say where to
                return
            if vcpu != port.notify_vcpu:  # F4: what is linked stays where it is
                port.changes += 1
            port.notify_vcpu = vcpu
        elif kind == two_level.CLOSE:
            self.closed_pending += port.pending == 1
            port.pending = 0
            port.notify_vcpu = 0
            self.recheck(dom, port)

    def out_of_range(self, dom: FifoDomain, port: int) -> None:
        """No such event word."""
        key = (codes.PORT_RANGE.name, NONE, port)
        if port >= PORTS and key not in dom.reported and len(dom.reported) < 10_000:
            dom.reported.add(key)
            self.sink.report(
                codes.PORT_RANGE, self.now, dom=dom.id, obj=port, val=PORTS, seq=self.seq,
                expected=f"a port below {PORTS}", observed=f"port {port}",
            )  # fmt: skip

    # -- what recordings say ----------------------------------------------------------------------------------

    def on_word(self, dom: FifoDomain, port: FifoPort, word: int) -> None:
        """An event word was read."""
        if port.pending != 1:
            port.pend_t = self.now
        port.set_word(word)
        port.link_gen = dom.ends_gen
        if not word & BUSY:
            port.busy_t = INF
        elif port.busy_t == INF:
            port.busy_t = self.now
            self.agenda.at(self.now + self.busy_ns, SOFTWARE, BUSY_LONG, dom.id, port.number)
        self.recheck(dom, port)
        self.arm(dom)

    def on_vcpu(self, dom: FifoDomain, vcpu: FifoVcpu, kind: int, queue: int, val: int) -> None:
        """A head, a ready word, or where the vCPU is."""
        if kind == HEAD:
            if 0 <= queue < QUEUES and val != NIL:
                vcpu.head[queue] = val
                vcpu.tail[queue] = UNKNOWN
            vcpu.mapped = True
        elif kind == READY:
            if val != NIL:
                vcpu.ready = val
                vcpu.ready_known = -1
            vcpu.mapped = True
        elif kind == CONSUMING:
            vcpu.consuming = 0 if val == 0 else 1
        elif kind == two_level.UPCALL:
            self.upcalls += 1
            vcpu.consuming = 1
            vcpu.dispatched = 0
        else:
            if vcpu.consuming == 1 and vcpu.dispatched == 0:
                self.spurious_upcalls += 1
            vcpu.consuming = 0
            for index in range(QUEUES):  # what arrived during the loop may have been drained
                vcpu.head[index] = UNKNOWN
                vcpu.lhead[index] = 0
            vcpu.ready_known = 0
        self.arm(dom)

    def on_handled(self, dom: FifoDomain, vcpu: FifoVcpu, port: FifoPort) -> None:
        """F2 as recorded: the event was taken off its queue and dispatched on `vcpu`."""
        self.handled += 1
        vcpu.dispatched += 1
        if port.pending == 1:
            self.max_delivery_ns = max(self.max_delivery_ns, self.now - port.pend_t)
        queue = port.priority
        if port.linked == 1 and port.last_vcpu == vcpu.number != port.notify_vcpu:
            self.sink.report(
                codes.FIFO_OLD_QUEUE, self.now, dom=dom.id, vcpu=vcpu.number, obj=port.number, tgt=port.notify_vcpu,
                seq=self.seq, observed=f"queue {queue} of vcpu{vcpu.number}",
            )  # fmt: skip
        higher = vcpu.ready & vcpu.ready_known & ((1 << queue) - 1)
        if higher and port.last_vcpu == vcpu.number:
            self.inversions += 1
            self.sink.report(
                codes.FIFO_PRIORITY_INVERSION, self.now, dom=dom.id, vcpu=vcpu.number, obj=port.number,
                val=(higher & -higher).bit_length() - 1, seq=self.seq,
                expected=f"queue {(higher & -higher).bit_length() - 1} first",
                observed=f"dispatched from queue {queue}",
            )  # fmt: skip
        following = port.unlink()
        if vcpu.head[queue] == port.number:
            vcpu.head[queue] = 0
        vcpu.lhead[queue] = following
        if following <= 0:  # read again before the next step
            vcpu.ready &= ~(1 << queue)
        if not port.clears:
            port.pending = UNKNOWN
        port.since = INF

    def on_clear(self, port: FifoPort) -> None:
        """The handler's flow acked the event."""
        port.clears = True
        port.pending = 0
        port.since = INF
        port.reported = False

    # -- time -------------------------------------------------------------------------------------------------

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        """An upcall or a time-out."""
        dom = self.domain(a)
        if action == DO_UPCALL:
            self.upcall(dom, dom.vcpu(b))
        elif action == UNLINKED:
            port = dom.port(b)
            if port.since == self.now - self.strand_ns:
                self.report_unlinked(dom, port)
        elif action == EVALUATE:
            dom.armed = False
            self.evaluate(dom, self.strand_ns)
        elif action == BUSY_LONG:
            port = dom.port(b)
            if port.busy_t == self.now - self.busy_ns:
                port.busy_t = NIL
                self.sink.report(
                    codes.FIFO_BUSY_STUCK, self.now, dom=dom.id, obj=port.number, t_first=self.now - self.busy_ns,
                    expected="BUSY for a few instructions", observed=f"BUSY for {self.busy_ns} ns",
                )  # fmt: skip

    def taint(self, cpu: int, t0: int, t1: int) -> None:
        """Lost records: nothing is known (U2)."""
        if self.closed:
            return
        self.from_boot = False
        for dom in self.domains.values():
            dom.known = False
            dom.suspects.clear()
            for port in dom.ports.values():
                port.forget()
            for vcpu in dom.vcpus.values():
                vcpu.forget()
        self.sink.taint(t0)

    def metrics(self) -> dict[str, int]:
        """Spec S5.6."""
        pending = sum(1 for dom in self.domains.values() for port in dom.ports.values() if port.pending == 1)
        return {
            "sends": self.sends,
            "coalesced": self.coalesced,
            "handled": self.handled,
            "pending": pending,
            "closed_pending": self.closed_pending,
            "upcalls": self.upcalls,
            "spurious_upcalls": self.spurious_upcalls,
            "notifications": self.notifications,
            "unmask_hypercalls": self.unmask_hypercalls,
            "priority_inversions": self.inversions,
            "max_queue_length": self.max_queue,
            "max_delivery_ns": self.max_delivery_ns,
        }
