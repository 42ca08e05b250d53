"""FIFO event channels: what a guest's ports and queues must satisfy (spec S5.5, F4).

What is wrong has to last before it is told: the words of a queue are written one after the other.
"""

from __future__ import annotations

from typing import Final

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import INF, NIL, NONE
from replay.hardware.evtchn_fifo import QUEUES, FifoPort, FifoVcpu, walk
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.event_channel import codes

__all__ = ["BUSY_LONG", "DO_UPCALL", "EVALUATE", "UNLINKED", "FifoDomain", "FifoMonitor"]

#: Agenda: the upcall of vCPU b of domain a; then the time-outs of the monitor.
DO_UPCALL: Final = 0
UNLINKED: Final = 1
EVALUATE: Final = 2
BUSY_LONG: Final = 3
#: Xen lock_old_queue gives up after so many attempts.
LOCK_ATTEMPTS: Final = 3
#: What a queue owes, and what is seen instead.
EXPECTED: Final = {
    codes.FIFO_NO_CONTROL_BLOCK.name: ("a control block before the first event", "linked for a vCPU without one"),
    codes.FIFO_LINKED_UNREACHABLE.name: ("LINKED means on some queue", "LINKED, and on no queue"),
    codes.FIFO_QUEUE_CYCLE.name: ("a queue that ends", "a LINK that leads back"),
    codes.FIFO_READY_LOST.name: ("ready bit of a queue with events", "events linked, ready bit clear, not consuming"),
}


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
        self.ends_gen: int = 0  # grows whenever something was linked behind an unknown port

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


class FifoMonitor(Machine):
    """The guests, and the rules that raise divergences."""

    def __init__(self, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.closed: bool = sink.closed
        self.strand_ns: int = config.integer("strand_ns")
        self.domains: dict[int, FifoDomain] = {}
        self.seq: int = NONE

    def domain(self, number: int) -> FifoDomain:
        """The guest's record."""
        found = self.domains.get(number)
        if found is None:
            found = self.domains[number] = FifoDomain(number, self.from_boot or self.closed)
        return found

    def recheck(self, dom: FifoDomain, port: FifoPort) -> None:
        """Start or stop the clock of fifo-pending-unlinked."""
        if port.pending == 1 and port.masked == 0 and port.linked == 0:
            if port.since == INF:
                port.since = self.now
                self.agenda.at(self.now + self.strand_ns, SOFTWARE, UNLINKED, dom.id, port.number)
        else:
            port.since = INF
            if port.pending != 1:
                port.reported = False

    def arm(self, dom: FifoDomain) -> None:
        """Look at the queues strand_ns from now, once for all changes in between."""
        if not dom.armed and not self.closed:
            dom.armed = True
            self.agenda.at(self.now + self.strand_ns, SOFTWARE, EVALUATE, dom.id)

    def report_unlinked(self, dom: FifoDomain, port: FifoPort) -> None:
        """Raise fifo-pending-unlinked, once in a pending life, unless a vCPU may just be handling the event (U3)."""
        owner = dom.vcpus.get(port.last_vcpu)
        handling = port.last_vcpu == NONE or (owner is not None and owner.consuming != 0)
        if port.reported or (port.clears and handling):
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
        wrong: dict[tuple[str, int, int], None] = {}
        met: set[int] = set()
        complete = dom.known and bool(dom.vcpus)  # or there may be vCPUs that nobody has named yet
        for vcpu in dom.vcpus.values():
            for queue in range(QUEUES):
                complete &= self.look_at_queue(dom, vcpu, queue, met, wrong)
        for port in dom.ports.values():
            if port.linked == 1 and complete and port.number not in met:
                wrong[(codes.FIFO_LINKED_UNREACHABLE.name, NONE, port.number)] = None
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
        self, dom: FifoDomain, vcpu: FifoVcpu, queue: int, met: set[int], wrong: dict[tuple[str, int, int], None]
    ) -> bool:
        """Walk one queue from the guest's own head and from the shared one. True when all of it is known."""
        complete = True
        events = 0
        for start in (vcpu.lhead[queue], vcpu.head[queue]):
            found, whole, cycle = walk(dom.ports, start, dom.ends_gen)
            met.update(found)
            events += len(found)
            complete &= whole
            if cycle:
                wrong[(codes.FIFO_QUEUE_CYCLE.name, vcpu.number, queue)] = None
        if events and vcpu.ready_test(queue) == 0 and vcpu.consuming == 0:
            wrong[(codes.FIFO_READY_LOST.name, vcpu.number, queue)] = None
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
            expected=EXPECTED[name][0], observed=EXPECTED[name][1],
        )  # fmt: skip
