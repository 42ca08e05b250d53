"""FIFO event channels: the machine and its rules (spec S5.5, F1..F4).

`fifo.word`, `fifo.head` and `fifo.ready` give shared memory as it was read; sends, upcalls and handler runs move the
model between such readings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import INF, KIND_ID, NIL, NONE
from replay.hardware.evtchn_fifo import PORTS, QUEUES, FifoPort, FifoVcpu, walk
from replay.knowledge import UNKNOWN
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.event_channel import codes
from replay.systems.event_channel import machine as two_level

__all__ = ["FifoMachine"]

WORD: Final = KIND_ID["fifo.word"]
HEAD: Final = KIND_ID["fifo.head"]
READY: Final = KIND_ID["fifo.ready"]
CONSUMING: Final = KIND_ID["fifo.consuming"]
CHECK: Final = KIND_ID["fifo.check"]

DO_UPCALL: Final = 0
UNLINKED: Final = 1
EVALUATE: Final = 2
BUSY_LONG: Final = 3
#: Xen lock_old_queue gives up after so many attempts.
LOCK_ATTEMPTS: Final = 3


class FifoDomain:
    """One guest on the FIFO ABI."""

    def __init__(self, number: int, known: bool) -> None:
        self.id: int = number
        self.known: bool = known
        self.ports: dict[int, FifoPort] = {}
        self.vcpus: dict[int, FifoVcpu] = {}
        self.suspects: dict[tuple[str, int, int], int] = {}  # violation seen, and since when
        self.reported: set[tuple[str, int, int]] = set()
        self.armed: bool = False

    def port(self, number: int) -> FifoPort:
        """The port's record."""
        found = self.ports.get(number)
        if found is None:
            found = self.ports[number] = FifoPort(number, self.known)
        return found

    def vcpu(self, number: int) -> FifoVcpu:
        """The vCPU's record."""
        found = self.vcpus.get(number)
        if found is None:
            found = self.vcpus[number] = FifoVcpu(number, self.known)
        return found


class FifoMachine(Machine):
    """Event channels of all guests, FIFO ABI. There are no policies: the hypervisor always chooses the queue."""

    columns: ClassVar[tuple[str, ...]] = two_level.COLUMNS

    def __init__(self, policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.policy = policy
        self.closed: bool = sink.closed
        self.upcall_ns: int = config.integer("upcall_ns")
        self.strand_ns: int = config.integer("strand_ns")
        self.busy_ns: int = config.integer("busy_ns")
        self.domains: dict[int, FifoDomain] = {}
        self.seq: int = NONE
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

    def domain(self, number: int) -> FifoDomain:
        """The guest's record."""
        found = self.domains.get(number)
        if found is None:
            found = self.domains[number] = FifoDomain(number, self.from_boot or self.closed)
        return found

    # -- events ----------------------------------------------------------------------------------------------

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        """The event glue."""
        heap = self.agenda.heap
        closed = self.closed
        for kind, t, d, v, p, tgt, val, flags, seq in rows:
            if heap and heap[0][0] <= t:
                self.advance(t)
            self.now = t
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
                    self.set_upcall_mask(dom, dom.vcpu(v), 1 if kind == two_level.UPCALL_MASK else 0)
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
            port.notify_vcpu = port.last_vcpu = max(vcpu, 0)
            if flags & 1:
                self.send(dom, port)
        elif kind in (two_level.BIND_VCPU, two_level.REBIND):
            if vcpu != port.notify_vcpu:
                port.changes += 1
                port.old_queue = port.linked == 1
            port.notify_vcpu = vcpu
        elif kind == two_level.CLOSE:
            self.closed_pending += port.pending == 1
            port.pending = 0
            port.notify_vcpu = 0
            self.recheck(dom, port)

    def out_of_range(self, dom: FifoDomain, port: int) -> None:
        """No such event word."""
        key = ("range", port, 0)
        if port >= PORTS and key not in dom.reported and len(dom.reported) < 10_000:
            dom.reported.add(key)
            self.sink.report(codes.PORT_RANGE, self.now, dom=dom.id, obj=port, val=PORTS, seq=self.seq)

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

    # -- what recordings say ----------------------------------------------------------------------------------

    def on_word(self, dom: FifoDomain, port: FifoPort, word: int) -> None:
        """An event word was read."""
        was_busy = port.busy
        port.set_word(word)
        if port.busy == 1 and was_busy != 1:
            port.busy_gen += 1
            self.agenda.at(self.now + self.busy_ns, SOFTWARE, BUSY_LONG, dom.id, port.number, port.busy_gen)
        elif port.busy == 0:
            port.busy_gen += 1
        self.recheck(dom, port)
        self.arm(dom)

    def on_vcpu(self, dom: FifoDomain, vcpu: FifoVcpu, kind: int, queue: int, val: int) -> None:
        """A head, a ready word, or where the vCPU is."""
        if kind == HEAD:
            if 0 <= queue < QUEUES and val != NIL:
                vcpu.head[queue] = val
                vcpu.tail[queue] = UNKNOWN
            vcpu.mapped = 1
        elif kind == READY:
            if val != NIL:
                vcpu.ready = val & (1 << QUEUES) - 1
                vcpu.ready_known = (1 << QUEUES) - 1
            vcpu.mapped = 1
        elif kind == CONSUMING:
            vcpu.consuming = 0 if val == 0 else 1
        elif kind == two_level.UPCALL:
            self.upcalls += 1
            vcpu.consuming = 1
            vcpu.upcall_pending = 0
            vcpu.dispatched = 0
        else:
            vcpu.consuming = 0
            if vcpu.dispatched == 0:
                self.spurious_upcalls += 1
            if vcpu.upcall_pending == 1:
                vcpu.upcall_pending = UNKNOWN
            for index in range(QUEUES):  # what arrived during the loop may have been drained
                self.blur_queue(vcpu, index)
                vcpu.lhead[index] = 0
            vcpu.ready = 0
            vcpu.ready_known = 0
        self.arm(dom)

    def on_handled(self, dom: FifoDomain, vcpu: FifoVcpu, port: FifoPort) -> None:
        """F2 as recorded: the event was taken off its queue and dispatched on `vcpu`."""
        self.handled += 1
        vcpu.dispatched += 1
        if port.pending == 1 and port.pend_t != NIL:
            self.max_delivery_ns = max(self.max_delivery_ns, self.now - port.pend_t)
        queue = port.last_prio
        if port.old_queue and port.last_vcpu == vcpu.number != port.notify_vcpu:
            self.sink.report(
                codes.FIFO_OLD_QUEUE, self.now, dom=dom.id, vcpu=vcpu.number, obj=port.number, tgt=port.notify_vcpu,
                seq=self.seq, observed=f"queue {queue} of vcpu{vcpu.number}",
            )  # fmt: skip
        port.old_queue = False
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
            vcpu.lhead[queue] = following
        if not port.clears:
            port.pending = UNKNOWN
        port.since = INF

    def on_clear(self, port: FifoPort) -> None:
        """The handler's flow acked the event."""
        port.clears = True
        port.pending = 0
        port.since = INF
        port.reported = False

    # -- checks ----------------------------------------------------------------------------------------------

    def recheck(self, dom: FifoDomain, port: FifoPort) -> None:
        """Start or stop the clock of fifo-pending-unlinked."""
        if port.pending == 1 and port.masked == 0 and port.linked == 0:
            if port.since == INF:
                port.since = self.now
                port.generation += 1
                due = self.now + self.strand_ns
                self.agenda.at(due, SOFTWARE, UNLINKED, dom.id, port.number, port.generation)
        else:
            port.since = INF
            if port.pending != 1:
                port.reported = False

    def arm(self, dom: FifoDomain) -> None:
        """Look at the queues strand_ns from now, once for all changes in between."""
        if not dom.armed and not self.closed:
            dom.armed = True
            self.agenda.at(self.now + self.strand_ns, SOFTWARE, EVALUATE, dom.id)

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        """An upcall or a time-out."""
        dom = self.domain(a)
        if action == DO_UPCALL:
            self.upcall(dom, dom.vcpu(b))
        elif action == UNLINKED:
            port = dom.port(b)
            if port.generation == c and port.since != INF:
                self.report_unlinked(dom, port)
        elif action == EVALUATE:
            dom.armed = False
            self.evaluate(dom, self.strand_ns)
        elif action == BUSY_LONG:
            port = dom.port(b)
            if port.busy_gen == c and port.busy == 1:
                self.sink.report(
                    codes.FIFO_BUSY_STUCK, self.now, dom=dom.id, obj=port.number, t_first=self.now - self.busy_ns
                )

    def report_unlinked(self, dom: FifoDomain, port: FifoPort) -> None:
        """Raise fifo-pending-unlinked, once in a pending life, unless the vCPU is just handling the event."""
        owner = dom.vcpus.get(port.last_vcpu)
        if port.reported or (port.clears and owner is not None and owner.consuming != 0):
            return
        port.reported = True
        self.sink.report(
            codes.FIFO_PENDING_UNLINKED, self.now, dom=dom.id, vcpu=port.notify_vcpu, obj=port.number,
            t_first=port.since, seq=self.seq, expected="LINKED", observed="PENDING, not MASKED, not LINKED",
        )  # fmt: skip
        if port.changes >= LOCK_ATTEMPTS:
            self.sink.report(
                codes.FIFO_LOST_QUEUE_CHANGE, self.now, dom=dom.id, obj=port.number, val=port.changes,
                t_first=port.since, observed=f"{port.changes} queue changes since last linked",
            )  # fmt: skip

    def evaluate(self, dom: FifoDomain, grace: int) -> None:
        """Look at every queue; what has been wrong for `grace` ns is reported. A walk that meets something unknown
        proves nothing about ports that were not met."""
        wrong: dict[tuple[str, int, int], int] = {}
        met: set[int] = set()
        complete = bool(dom.vcpus)
        for vcpu in dom.vcpus.values():
            for queue in range(QUEUES):
                complete &= self.look_at_queue(dom, vcpu, queue, met, wrong)
        for port in dom.ports.values():
            if port.linked == 1 and complete and port.number not in met:
                wrong[(codes.FIFO_LINKED_UNREACHABLE.name, NONE, port.number)] = 0
            if grace == 0 and port.since != INF:
                self.report_unlinked(dom, port)
        for key in [key for key in dom.suspects if key not in wrong]:
            del dom.suspects[key]
            dom.reported.discard(key)
        again = False
        for key in wrong:
            since = dom.suspects.setdefault(key, self.now)
            if self.now - since >= grace or key[0] == codes.FIFO_QUEUE_CYCLE.name:
                self.report_once(dom, *key)
            elif key not in dom.reported:
                again = True
        if again:
            self.arm(dom)

    def look_at_queue(
        self, dom: FifoDomain, vcpu: FifoVcpu, queue: int, met: set[int], wrong: dict[tuple[str, int, int], int]
    ) -> bool:
        """Walk one queue from the guest's own head and from the shared one. True when all of it is known."""
        complete = True
        events = 0
        for start in (vcpu.lhead[queue], vcpu.head[queue]):
            found, ended, cycle = walk(dom.ports, start)
            met.update(found)
            events += len(found)
            complete &= ended or cycle
            if cycle:
                wrong[(codes.FIFO_QUEUE_CYCLE.name, vcpu.number, queue)] = 0
        if events and vcpu.ready_test(queue) == 0 and vcpu.consuming == 0:
            wrong[(codes.FIFO_READY_LOST.name, vcpu.number, queue)] = 0
        return complete and vcpu.consuming == 0

    def report_once(self, dom: FifoDomain, name: str, vcpu: int, number: int) -> None:
        """Raise a code of the queues; again only after it had gone away."""
        key = (name, vcpu, number)
        if key in dom.reported:
            return
        dom.reported.add(key)
        code = next(code for code in codes.CODES if code.name == name)
        is_queue = name in (codes.FIFO_READY_LOST.name, codes.FIFO_QUEUE_CYCLE.name)
        self.sink.report(
            code, self.now, dom=dom.id, vcpu=vcpu, obj=NONE if is_queue else number,
            val=number if is_queue else NIL, t_first=dom.suspects.get(key, self.now), seq=self.seq,
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
        for finding in reversed(self.sink.findings):
            if finding.t < t0:
                break
            finding.severity = "info"
            finding.tags = (*finding.tags, "tainted")

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
