"""Event channels in Linux (2010): treated as level interrupts that move in their ack hook, or as edges.

Simulated are a guest's CPUs, each with interrupts off while it handles one, its ports in shared memory, a backend that
raises them, and an irq balancer. `bad` is the level flow: mask, ack (which carries out a pending move and unmasks),
handler, unmask. The good one is the edge flow, which remembers an edge that meets a running handler.
"""

from __future__ import annotations

from random import Random

from tracetool.seeded.engine import Recording, World

__all__ = ["record"]

US = 1_000
MS = 1_000_000

CPUS = 3
PORTS = (5, 6)
RAISES = 250
MOVES = 40
END = 40 * MS
UPCALL = 100
LOOK = 3 * US
RUN = 10 * US
NOBODY = -1
#: Reason that a recorder of mask and unmask would give.
EXPLICIT = 1


class Port:
    """Bits in shared memory, and the kernel's descriptor."""

    def __init__(self) -> None:
        self.pending = False
        self.masked = False
        self.bound = 0
        self.move_to = NOBODY
        self.running_on = NOBODY
        self.remembered = False
        self.unread: list[int] = []


class Kernel(World):
    """The guest kernel and its backend."""

    def __init__(self, rng: Random, *, bad: bool) -> None:
        super().__init__()
        self.bad = bad
        self.ports = {number: Port() for number in PORTS}
        self.busy = [False] * CPUS
        self.called = [False] * CPUS
        for _ in range(RAISES):
            t = rng.randrange(END)
            number = rng.choice(PORTS)
            self.at(t, self.raise_, number)
            if rng.random() < 0.4:  # the backend has more soon after
                self.at(t + rng.randrange(RUN), self.raise_, number)
        for _ in range(MOVES):
            self.at(rng.randrange(END), self.balance, rng.choice(PORTS), rng.randrange(CPUS))

    # -- from outside ------------------------------------------------------------------------------------------

    def raise_(self, number: int) -> None:
        """The backend puts a request on the ring and sends an event."""
        port = self.ports[number]
        self.note("flow.raise", obj=number)
        port.unread.append(self.now)
        if not port.pending:
            port.pending = True
            self.notify(port)

    def balance(self, number: int, cpu: int) -> None:
        """irqbalance writes smp_affinity; the move waits for the next interrupt."""
        self.note("flow.set_affinity", obj=number, tgt=cpu)
        self.ports[number].move_to = cpu

    def notify(self, port: Port) -> None:
        """The hypervisor calls up the CPU the port is bound to."""
        if port.pending and not port.masked:
            self.after(UPCALL, self.call, port.bound)

    # -- a CPU -------------------------------------------------------------------------------------------------

    def call(self, cpu: int) -> None:
        """An upcall reaches a CPU; with interrupts off it waits."""
        if self.busy[cpu]:
            self.called[cpu] = True
            return
        self.note("flow.upcall", cpu=cpu)
        self.scan(cpu)

    def scan(self, cpu: int) -> None:
        """Handle every port that is ready and bound here."""
        for number, port in self.ports.items():
            ready = port.pending and not port.masked and port.bound == cpu
            if ready and (self.level(number, port, cpu) if self.bad else self.edge(number, port, cpu)):
                return
        if self.called[cpu]:
            self.called[cpu] = False
            self.call(cpu)

    def ack(self, number: int, port: Port, cpu: int) -> None:
        """The chip's ack hook: a pending move first (mask, rebind, unmask), then the pending bit."""
        self.note("flow.ack", obj=number, cpu=cpu)
        if port.move_to != NOBODY:
            self.note("flow.mask", obj=number, cpu=cpu, val=EXPLICIT)
            port.bound = port.move_to
            port.move_to = NOBODY
            port.masked = False
            self.note("flow.unmask", obj=number, cpu=cpu, val=EXPLICIT)
            self.after(UPCALL, self.call, port.bound)
        port.pending = False

    def mask(self, number: int, port: Port, cpu: int) -> None:
        port.masked = True
        self.note("flow.mask", obj=number, cpu=cpu, val=EXPLICIT)

    def unmask(self, number: int, port: Port, cpu: int) -> None:
        """Clear the mask bit; what became pending meanwhile is sent again."""
        port.masked = False
        self.note("flow.unmask", obj=number, cpu=cpu, val=EXPLICIT)
        self.notify(port)

    # -- flows: whether a handler occupies the CPU now ---------------------------------------------------------

    def level(self, number: int, port: Port, cpu: int) -> bool:
        self.mask(number, port, cpu)
        self.ack(number, port, cpu)
        if port.running_on != NOBODY:
            self.happened("flow-upcall-dropped-inprogress")
            return False
        self.handler(number, port, cpu)
        return True

    def edge(self, number: int, port: Port, cpu: int) -> bool:
        if port.running_on != NOBODY:
            port.remembered = True
            self.mask(number, port, cpu)
            self.ack(number, port, cpu)
            return False
        self.ack(number, port, cpu)
        self.handler(number, port, cpu)
        return True

    def handler(self, number: int, port: Port, cpu: int) -> None:
        """The driver's handler, its last look at the ring, its return."""
        self.busy[cpu] = True
        port.running_on = cpu
        self.note("flow.handler.begin", obj=number, cpu=cpu)
        self.after(LOOK, self.look, number, cpu)
        self.after(RUN, self.end, number, cpu)

    def look(self, number: int, cpu: int) -> None:
        self.note("flow.consume", obj=number, cpu=cpu)
        self.ports[number].unread.clear()

    def end(self, number: int, cpu: int) -> None:
        """Back in the flow function."""
        port = self.ports[number]
        self.note("flow.handler.end", obj=number, cpu=cpu, val=1)
        if not self.bad and port.remembered:
            port.remembered = False
            if port.masked:
                self.unmask(number, port, cpu)
            self.handler(number, port, cpu)
            return
        port.running_on = NOBODY
        self.busy[cpu] = False
        if self.bad:
            self.unmask(number, port, cpu)
        if port.unread and not port.pending:
            self.happened("flow-edge-lost")
        self.scan(cpu)


def record(*, bad: bool, seed: int) -> Recording:
    """Simulate 40 ms of 3 CPUs and 2 ports; same raises and affinity changes for the same seed."""
    return Kernel(Random(seed), bad=bad).run(END)
