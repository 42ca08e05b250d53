"""PV-on-HVM platform interrupt (report of 2008): routed to vcpu1, and only vcpu0's entries look whether it may fall.

Simulated are a guest with two vcpus, its virtual IOAPIC pin and local APICs, event-channel events that set vcpu0's
flag, and VM exits that have nothing to do with them. `bad` samples the flag on entries of vcpu0 only; the good one also
lets the line fall when any vcpu writes EOI.
"""

from __future__ import annotations

from random import Random

from tracetool.seeded.engine import Recording, World

__all__ = ["record"]

US = 1_000
MS = 1_000_000

DOM = 1
VCPUS = 2
TARGET = 1
GSI = 28
VECTOR = 0x59
#: Redirection entry: level, not masked, physical destination, APIC id 2 (Xen numbers vcpus by two).
RTE = VECTOR | 1 << 15 | TARGET * 2 << 56
EVENTS = 50
END = 20 * MS
KICK = 500
READ = 2 * US
EOI = 4 * US
EXIT = 200


class Guest(World):
    """One domain with its emulated interrupt controllers."""

    def __init__(self, rng: Random, *, bad: bool) -> None:
        super().__init__()
        self.bad = bad
        self.flag = False  # vcpu0's evtchn_upcall_pending
        self.line = False  # what the hypervisor contributes to the GSI on its behalf
        self.remote_irr = False
        self.irr = [False] * VCPUS
        self.isr = [False] * VCPUS
        self.note("via.rte_write", dom=DOM, obj=GSI, val=RTE)
        for v in range(VCPUS):
            self.note("sched.run", dom=DOM, vcpu=v, cpu=v)
        for _ in range(EVENTS):
            self.at(rng.randrange(END), self.event)
        for v, mean in ((0, 400 * US), (1, 900 * US)):
            t = 0
            while t < END:
                t += 1 + int(rng.expovariate(1 / mean))
                self.at(t, self.unrelated_exit, v)

    def event(self) -> None:
        """An event channel of vcpu0 becomes pending."""
        if self.flag:
            return
        self.flag = True
        self.note("via.upcall_set", dom=DOM, vcpu=0)
        self.after(KICK, self.enter, 0)

    def unrelated_exit(self, v: int) -> None:
        """The vcpu was out for a reason of its own and is entered again."""
        self.note("via.vmentry", dom=DOM, vcpu=v)
        self.about_to_run(v)

    def enter(self, v: int) -> None:
        """An entry after a kick or an EOI."""
        self.note("via.vmentry", dom=DOM, vcpu=v, role="outcome")
        self.about_to_run(v)

    def about_to_run(self, v: int) -> None:
        """Sample the flag, then inject what waits."""
        if v == 0:
            self.set_line(self.flag)
        if self.irr[v] and not self.isr[v]:
            self.irr[v] = False
            self.isr[v] = True
            self.note("via.inject", dom=DOM, vcpu=v, obj=VECTOR)
            if not self.flag:
                self.happened("via-spurious-inject")
            self.after(READ, self.read_flag, v)
            self.after(EOI, self.eoi, v)

    def read_flag(self, v: int) -> None:
        """The guest's handler exchanges the flag with 0 and handles what there is."""
        self.note("via.upcall_clear", dom=DOM, vcpu=v, val=int(self.flag))
        self.flag = False

    def eoi(self, v: int) -> None:
        """EOI exits; a level pin that is still high is delivered again."""
        self.note("via.eoi", dom=DOM, vcpu=v, obj=VECTOR)
        if not self.bad and self.line and not self.flag:
            self.set_line(False)
        self.isr[v] = False
        self.remote_irr = False
        self.assess(kick=False)
        self.after(EXIT, self.enter, v)

    def set_line(self, high: bool) -> None:
        """The callback's own contribution changes."""
        if high != self.line:
            self.line = high
            self.note("via.line", dom=DOM, obj=GSI, val=int(high))
            self.assess(kick=True)

    def assess(self, *, kick: bool) -> None:
        """A level pin that is high and not being served sends its message."""
        if self.line and not self.remote_irr:
            self.remote_irr = True
            self.irr[TARGET] = True
            if kick:
                self.after(KICK, self.enter, TARGET)


def record(*, bad: bool, seed: int) -> Recording:
    """Simulate 20 ms of a guest with 50 events; same events and unrelated exits for the same seed."""
    return Guest(Random(seed), bad=bad).run(END)
