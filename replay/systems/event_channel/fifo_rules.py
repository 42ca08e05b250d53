"""FIFO event channels: how ports are linked, consumed and unmasked (spec S5.5, F1..F3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import INF, NONE
from replay.hardware.evtchn_fifo import QUEUES, FifoPort, FifoVcpu, walk
from replay.knowledge import UNKNOWN
from replay.sink import Sink
from replay.systems.event_channel import codes
from replay.systems.event_channel.fifo_monitor import DO_UPCALL, FifoDomain, FifoMonitor

__all__ = ["FifoRules"]


class FifoRules(FifoMonitor):
    """The transitions of shared memory. There are no policies: the hypervisor always chooses the queue."""

    def __init__(self, _policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(config, sink)
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
        dom = self.domain(int(state.get("dom", NONE)))
        for port in state.get("masked", ()):
            dom.port(int(port)).masked = 1
        for port, vcpu in state.get("notify_vcpu", {}).items():
            dom.port(int(port)).notify_vcpu = dom.port(int(port)).last_vcpu = int(vcpu)
        for port, priority in state.get("priority", {}).items():
            dom.port(int(port)).priority = int(priority)
        for vcpu in state.get("unmapped", ()):
            dom.vcpu(int(vcpu)).mapped = False

    # -- F1: set ---------------------------------------------------------------------------------------------

    def send(self, dom: FifoDomain, port: FifoPort) -> None:
        """F1: PENDING := 1, then link unless masked (Xen evtchn_fifo_set_pending)."""
        if port.post() == 1:
            self.coalesced += 1
        else:
            port.pend_t = self.now
        if port.masked == 0:
            self.link(dom, port)
        elif port.masked == UNKNOWN and port.linked != 1:
            port.linked = UNKNOWN
            self.perhaps_append(dom, port)
        self.recheck(dom, port)

    def link(self, dom: FifoDomain, port: FifoPort) -> None:
        """F1's tail: if LINKED goes 0 to 1, append to the queue of (notify_vcpu, priority); a new head makes the queue
        ready; a new ready bit marks the upcall pending."""
        if port.linked == UNKNOWN:
            self.perhaps_append(dom, port)
            port.linked = 1
        if port.linked == 1:
            return
        if port.notify_vcpu < 0:
            self.perhaps_append(dom, port)
            port.linked = 1
            return
        vcpu = dom.vcpu(port.notify_vcpu)
        if not vcpu.mapped:
            self.report_once(dom, codes.FIFO_NO_CONTROL_BLOCK.name, vcpu.number, port.number)
            return
        if port.last_vcpu >= 0:
            old = dom.vcpu(port.last_vcpu)
            if old.tail[port.priority] == port.number:
                old.tail[port.priority] = 0
        port.last_vcpu = port.notify_vcpu
        port.changes = 0
        self.append(dom, vcpu, port)

    def append(self, dom: FifoDomain, vcpu: FifoVcpu, port: FifoPort) -> None:
        """Behind the tail if that is still LINKED, else as the new head."""
        queue = port.priority
        tail = vcpu.tail[queue]
        vcpu.tail[queue] = port.number
        linked = dom.ports[tail].linked if tail > 0 else tail
        if linked == UNKNOWN:
            self.blur_queue(dom, vcpu, queue)
        elif linked == 1:
            dom.ports[tail].link = port.number
        else:
            vcpu.head[queue] = port.number
            vcpu.ready |= 1 << queue
            vcpu.ready_known |= 1 << queue
            if self.closed and not vcpu.upcall_pending:
                vcpu.upcall_pending = True
                if vcpu.upcall_mask == 0:
                    self.schedule_upcall(dom, vcpu)
        port.linked = 1
        port.link = 0
        port.link_gen = dom.ends_gen
        if self.closed:
            self.max_queue = max(self.max_queue, len(walk(dom.ports, vcpu.head[queue], dom.ends_gen)[0]))

    def perhaps_append(self, dom: FifoDomain, port: FifoPort) -> None:
        """The port may be appended now: to the queue of its vCPU, or to any if that is not known."""
        port.link = UNKNOWN
        if port.notify_vcpu >= 0:
            self.blur_tail(dom, dom.vcpu(port.notify_vcpu), port.priority)
            return
        dom.known = False  # vCPUs that nobody has named yet have queues too
        for vcpu in dom.vcpus.values():
            for queue in range(QUEUES):
                self.blur_tail(dom, vcpu, queue)

    def blur_tail(self, dom: FifoDomain, vcpu: FifoVcpu, queue: int) -> None:
        """Some port may have been appended."""
        self.blur_queue(dom, vcpu, queue)
        vcpu.tail[queue] = UNKNOWN

    def blur_queue(self, dom: FifoDomain, vcpu: FifoVcpu, queue: int) -> None:
        """Something was appended, but behind what is not known: where LINK was 0, that may have been the end."""
        dom.ends_gen += 1
        vcpu.head[queue] = UNKNOWN
        vcpu.ready_known &= ~(1 << queue) | vcpu.ready

    def schedule_upcall(self, dom: FifoDomain, vcpu: FifoVcpu) -> None:
        """Closed runs: the upcall comes upcall_ns from now."""
        self.notifications += 1
        self.agenda.at(self.now + self.upcall_ns, SOFTWARE, DO_UPCALL, dom.id, vcpu.number)

    def set_upcall_mask(self, dom: FifoDomain, vcpu: FifoVcpu, masked: bool) -> None:
        """The vCPU's interrupt flag: in recordings the upcalls themselves are recorded."""
        vcpu.upcall_mask = masked
        if not masked and vcpu.upcall_pending:
            self.schedule_upcall(dom, vcpu)

    # -- F2: consume -----------------------------------------------------------------------------------------

    def upcall(self, dom: FifoDomain, vcpu: FifoVcpu) -> None:
        """Exchange the ready word with 0 and consume the queues, the one of highest priority first (Linux
        __evtchn_fifo_handle_events). Handlers take no time, so nothing arrives meanwhile and the ready word need not be
        read again after each event."""
        if vcpu.upcall_mask or not vcpu.upcall_pending:
            return
        self.upcalls += 1
        before = self.handled
        vcpu.upcall_pending = False
        ready = vcpu.ready
        vcpu.ready = 0
        while ready:
            self.consume_queue(dom, vcpu, (ready & -ready).bit_length() - 1)
            ready &= ready - 1
        if self.handled == before:
            self.spurious_upcalls += 1

    def consume_queue(self, dom: FifoDomain, vcpu: FifoVcpu, queue: int) -> None:
        """F2 for every event of a queue (Linux consume_one_event)."""
        number = vcpu.head[queue]
        vcpu.head[queue] = 0
        while number:
            port = dom.ports[number]
            number = port.unlink()
            if port.pending == 1 and port.masked == 0:
                self.handled += 1
                self.effects.append((self.now, dom.id << 48 | vcpu.number << 32 | port.number))
                self.max_delivery_ns = max(self.max_delivery_ns, self.now - port.pend_t)
                port.pending = 0
                self.recheck(dom, port)

    # -- F3: unmask ------------------------------------------------------------------------------------------

    def unmask(self, dom: FifoDomain, port: FifoPort) -> None:
        """F3: the guest clears MASKED; if PENDING, EVTCHNOP_unmask runs F1's link step (Linux evtchn_fifo_unmask)."""
        port.masked = 0
        if port.pending == 1:
            self.unmask_hypercalls += 1
            self.link(dom, port)
        elif port.pending == UNKNOWN and port.linked != 1:
            port.linked = UNKNOWN
            self.perhaps_append(dom, port)
        self.recheck(dom, port)

    def mask(self, port: FifoPort) -> None:
        """The guest sets MASKED."""
        port.masked = 1
        port.since = INF
