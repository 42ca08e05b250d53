"""FIFO event channels: how ports are linked, consumed and unmasked (spec S5.5, F1..F3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import INF, NIL, NONE
from replay.hardware.evtchn_fifo import QUEUES, FifoPort, FifoVcpu, walk
from replay.knowledge import UNKNOWN
from replay.sink import Sink
from replay.systems.event_channel import codes
from replay.systems.event_channel.fifo_monitor import DO_UPCALL, FifoDomain, FifoMonitor

__all__ = ["FifoRules"]


class FifoRules(FifoMonitor):
    """The transitions of shared memory. There are no policies: the hypervisor always chooses the queue."""

    def __init__(self, policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(config, sink)
        self.policy = policy
        self.upcall_ns: int = config.integer("upcall_ns")
        self.busy_ns: int = config.integer("busy_ns")
        self.sends: int = 0
        self.coalesced: int = 0
        self.handled: int = 0
        self.upcalls: int = 0
        self.spurious_upcalls: int = 0
        self.notifications: int = 0
        self.unmask_hypercalls: int = 0
        self.inversions: int = 0
        self.closed_pending: int = 0
        self.max_queue: int = 0
        self.max_delivery_ns: int = 0

    def load(self, init: Mapping[str, Any]) -> None:
        """`init.S5` = {masked[], notify_vcpu{}, priority{}, unmapped[]: vCPUs without a control block}."""
        state = init.get("S5", init)
        if not state:
            return
        dom = self.domain(int(state.get("dom", NONE)))
        for port in state.get("masked", ()):
            dom.port(int(port)).masked = 1
        for port, vcpu in state.get("notify_vcpu", {}).items():
            dom.port(int(port)).notify_vcpu = dom.port(int(port)).last_vcpu = int(vcpu)
        for port, priority in state.get("priority", {}).items():
            dom.port(int(port)).priority = dom.port(int(port)).last_prio = int(priority)
        for vcpu in state.get("unmapped", ()):
            dom.vcpu(int(vcpu)).mapped = 0

    # -- F1: set ---------------------------------------------------------------------------------------------

    def send(self, dom: FifoDomain, port: FifoPort) -> None:
        """F1: PENDING := 1, then link unless masked (Xen evtchn_fifo_set_pending)."""
        if port.post() == 1:
            self.coalesced += 1
        else:
            port.pend_t = self.now
        if port.masked == 0:
            self.link(dom, port)
        self.recheck(dom, port)

    def link(self, dom: FifoDomain, port: FifoPort) -> None:
        """F1's tail: if LINKED goes 0 to 1, append to the queue of (notify_vcpu, priority); a new head makes the queue
        ready; a new ready bit marks the upcall pending."""
        if port.linked != 0:
            if port.linked == UNKNOWN:
                port.linked = 1
                port.link = UNKNOWN
                self.blur_queues(dom)
            return
        port.linked = 1
        port.link = 0
        if port.notify_vcpu < 0:
            self.blur_queues(dom)
            return
        vcpu = dom.vcpu(port.notify_vcpu)
        if vcpu.mapped == 0:
            port.linked = 0
            self.report_once(dom, codes.FIFO_NO_CONTROL_BLOCK.name, vcpu.number, port.number)
            return
        if port.last_vcpu >= 0:
            old = dom.vcpu(port.last_vcpu)
            if old.tail[port.last_prio] == port.number:
                old.tail[port.last_prio] = 0
        port.last_vcpu = port.notify_vcpu
        port.last_prio = port.priority
        port.old_queue = False
        port.changes = 0
        queue = port.priority
        tail = vcpu.tail[queue]
        vcpu.tail[queue] = port.number
        if tail == UNKNOWN:
            self.blur_queue(vcpu, queue)
            return
        last = dom.ports.get(tail) if tail else None
        if last is not None and last.linked == UNKNOWN:
            last.link = UNKNOWN
            self.blur_queue(vcpu, queue)
        elif last is not None and last.linked == 1:
            last.link = port.number
        else:
            vcpu.head[queue] = port.number
            bit = 1 << queue
            was = vcpu.ready_test(queue)
            vcpu.ready |= bit
            vcpu.ready_known |= bit
            if was == 0 and vcpu.upcall_pending != 1:
                vcpu.upcall_pending = 1
                if self.closed and vcpu.upcall_mask != 1:
                    self.schedule_upcall(dom, vcpu)
        if self.closed:
            self.max_queue = max(self.max_queue, len(walk(dom.ports, vcpu.head[queue] or vcpu.lhead[queue])[0]))

    def blur_queue(self, vcpu: FifoVcpu, queue: int) -> None:
        """Something was appended, but where is not known."""
        vcpu.head[queue] = UNKNOWN
        vcpu.ready_known &= ~(1 << queue) | vcpu.ready
        if vcpu.upcall_pending == 0:
            vcpu.upcall_pending = UNKNOWN

    def blur_queues(self, dom: FifoDomain) -> None:
        """A port was linked on an unknown queue."""
        for vcpu in dom.vcpus.values():
            for queue in range(QUEUES):
                self.blur_queue(vcpu, queue)
                vcpu.tail[queue] = UNKNOWN

    def schedule_upcall(self, dom: FifoDomain, vcpu: FifoVcpu) -> None:
        """Closed runs: the upcall comes upcall_ns from now."""
        self.notifications += 1
        self.agenda.at(self.now + self.upcall_ns, SOFTWARE, DO_UPCALL, dom.id, vcpu.number)

    def set_upcall_mask(self, dom: FifoDomain, vcpu: FifoVcpu, masked: int) -> None:
        """The vCPU's interrupt flag."""
        vcpu.upcall_mask = masked
        if not masked and self.closed and vcpu.upcall_pending == 1:
            self.schedule_upcall(dom, vcpu)

    # -- F2: consume -----------------------------------------------------------------------------------------

    def upcall(self, dom: FifoDomain, vcpu: FifoVcpu) -> None:
        """Exchange the ready word with 0 and consume one event at a time from the highest-priority queue, reading the
        ready word again after each (Linux __evtchn_fifo_handle_events)."""
        if vcpu.upcall_mask == 1 or vcpu.upcall_pending != 1:
            return
        self.upcalls += 1
        before = self.handled
        vcpu.upcall_pending = 0
        ready = vcpu.ready
        vcpu.ready = 0
        while ready:
            queue = (ready & -ready).bit_length() - 1
            if not self.consume_one(dom, vcpu, queue):
                ready &= ~(1 << queue)
            ready |= vcpu.ready
            vcpu.ready = 0
        if self.handled == before:
            self.spurious_upcalls += 1

    def consume_one(self, dom: FifoDomain, vcpu: FifoVcpu, queue: int) -> bool:
        """F2 for one event; False when the queue is locally empty afterwards (Linux consume_one_event)."""
        number = vcpu.lhead[queue] or vcpu.head[queue]
        if number <= 0:
            return False
        if vcpu.lhead[queue] == 0:
            vcpu.head[queue] = 0
        port = dom.port(number)
        following = port.unlink()
        vcpu.lhead[queue] = following
        if port.pending == 1 and port.masked == 0:
            self.handled += 1
            self.effects.append((self.now, dom.id << 48 | vcpu.number << 32 | port.number))
            if port.pend_t != NIL:
                self.max_delivery_ns = max(self.max_delivery_ns, self.now - port.pend_t)
            port.pending = 0
            self.recheck(dom, port)
        return following != 0

    # -- F3: unmask ------------------------------------------------------------------------------------------

    def unmask(self, dom: FifoDomain, port: FifoPort) -> None:
        """F3: the guest clears MASKED; if PENDING, EVTCHNOP_unmask runs F1's link step (Linux evtchn_fifo_unmask)."""
        port.masked = 0
        if port.pending == 1:
            self.unmask_hypercalls += 1
            self.link(dom, port)
        elif port.pending == UNKNOWN:
            if port.linked == 0:
                port.linked = UNKNOWN
                port.link = UNKNOWN
            self.blur_queues(dom)
        self.recheck(dom, port)

    def mask(self, port: FifoPort) -> None:
        """The guest sets MASKED."""
        port.masked = 1
        port.since = INF
