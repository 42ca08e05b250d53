"""Event channels of an SMP dom0 (2005): the selector bit set on whichever vcpu unmasks, or on the one that listens.

Simulated are the two-level bitmaps in shared memory, an upcall loop that looks at the ports bound to its own vcpu only,
backends that send, and processes that mask and unmask their ports from any vcpu (the event-channel device). `bad`
unmasks by writing the bitmaps where it runs; the good guest asks the hypervisor when the port listens elsewhere.
"""

from __future__ import annotations

from collections import Counter
from random import Random

from tracetool.seeded.engine import Recording, World

__all__ = ["record"]

US = 1_000
MS = 1_000_000

DOM = 0
VCPUS = 4
BITS = 64
INTERDOMAIN = 2
#: Ports of the device model, in word 1; a busy port of word 0; one of word 1 on another vcpu.
DEVICE_MODEL = (65, 66, 70)
HOT = 3
OTHER = 80
OTHER_VCPU = 1
END = 20 * MS
UPCALL = 100
HANDLER = 400
#: Pending for this long with nobody told: lost, but for luck.
STRANDED = 10 * US


class Vcpu:
    """Its vcpu_info, and where its upcall loop is."""

    def __init__(self) -> None:
        self.selector = 0
        self.upcall_pending = False
        self.scanning = False
        self.words = 0


class Guest(World):
    """A guest with the two-level ABI and the hypervisor's side of it."""

    def __init__(self, rng: Random, *, bad: bool) -> None:
        super().__init__()
        self.bad = bad
        self.pending: set[int] = set()
        self.masked: set[int] = set()
        self.bound = {HOT: 0, OTHER: OTHER_VCPU, **dict.fromkeys(DEVICE_MODEL, 0)}
        self.vcpus = [Vcpu() for _ in range(VCPUS)]
        self.lives = Counter[int]()  # how often a port was handled
        self.masks = Counter[int]()  # and masked
        self.lost: set[int] = set()
        for v in range(VCPUS):
            self.note("sched.run", dom=DOM, vcpu=v, cpu=v)
        self.note("evtchn.rebind", dom=DOM, obj=HOT, tgt=0)
        self.note("evtchn.rebind", dom=DOM, obj=OTHER, tgt=OTHER_VCPU)
        for n, port in enumerate(DEVICE_MODEL):
            self.at(10 * US * (n + 1), self.open, port, rng.randrange(VCPUS))
        for port, mean in ((HOT, 150 * US), (OTHER, 900 * US), *((p, 400 * US) for p in DEVICE_MODEL)):
            t = 100 * US
            while t < END:
                t += 1 + int(rng.expovariate(1 / mean))
                self.at(t, self.send, port)
        for port in DEVICE_MODEL:
            t = 200 * US
            while t < END:
                t += rng.randrange(100 * US, 800 * US)
                self.at(t, self.mask, port, rng.randrange(VCPUS))
                t += rng.randrange(20 * US, 300 * US)
                self.at(t, self.unmask, port, rng.randrange(VCPUS))

    # -- hypervisor --------------------------------------------------------------------------------------------

    def send(self, port: int) -> None:
        """Strictly one after the other, each only if the one before changed something."""
        self.note("evtchn.send", dom=DOM, obj=port)
        self.set_pending(port)

    def set_pending(self, port: int) -> None:
        if port not in self.pending:
            self.pending.add(port)
            if port not in self.masked:
                self.select(port, self.bound[port], hypervisor=True)

    def select(self, port: int, v: int, *, hypervisor: bool) -> None:
        """The selector bit of the port's word, then the upcall byte, then the upcall."""
        vcpu = self.vcpus[v]
        bit = 1 << port // BITS
        if vcpu.selector & bit:
            return
        vcpu.selector |= bit
        if self.bound[port] != v:
            self.happened("evtchn-selector-wrong-vcpu")
            listener = self.vcpus[self.bound[port]]
            if not listener.selector & bit and not listener.scanning:
                self.after(STRANDED, self.still_there, port, self.lives[port], self.masks[port])
        if not vcpu.upcall_pending:
            vcpu.upcall_pending = True
            if hypervisor:
                self.note("evtchn.notify", dom=DOM, vcpu=v, obj=port)
            self.after(UPCALL, self.upcall, v)

    def still_there(self, port: int, life: int, masks: int) -> None:
        """A while after nobody who listens was told: neither handled by luck nor masked? Counts once until handled."""
        if (self.lives[port], self.masks[port]) == (life, masks) and port not in self.lost:
            self.lost.add(port)
            self.happened("evtchn-stranded-pending")

    # -- guest: upcall -----------------------------------------------------------------------------------------

    def upcall(self, v: int) -> None:
        """evtchn_do_upcall, unless it is running there already: then it goes round once more by itself."""
        vcpu = self.vcpus[v]
        if vcpu.scanning or not vcpu.upcall_pending:
            return
        vcpu.scanning = True
        self.note("evtchn.upcall", dom=DOM, vcpu=v)
        self.round(v)

    def round(self, v: int) -> None:
        """Clear the byte, take the selector, then port by port."""
        vcpu = self.vcpus[v]
        vcpu.upcall_pending = False
        vcpu.words |= vcpu.selector
        vcpu.selector = 0
        self.step(v)

    def step(self, v: int) -> None:
        """The next port of this vcpu that is ready in one of the words taken."""
        vcpu = self.vcpus[v]
        ready = [
            p for p in sorted(self.pending - self.masked) if self.bound[p] == v and vcpu.words >> p // BITS & 1
        ]  # fmt: skip
        if ready:
            port = ready[0]
            self.note("evtchn.handled", dom=DOM, vcpu=v, obj=port)
            self.note("evtchn.clear", dom=DOM, vcpu=v, obj=port)
            self.pending.discard(port)
            self.lives[port] += 1
            self.lost.discard(port)
            self.after(HANDLER, self.step, v)
            return
        vcpu.words = 0
        if vcpu.upcall_pending:
            self.round(v)
            return
        vcpu.scanning = False
        self.note("evtchn.upcall_end", dom=DOM, vcpu=v)

    # -- guest: the event-channel device -----------------------------------------------------------------------

    def open(self, port: int, v: int) -> None:
        """A process binds a port: created masked, set pending to be on the safe side, unmasked soon after."""
        self.mask(port, v)
        self.note("evtchn.bind", dom=DOM, obj=port, tgt=0, val=INTERDOMAIN, flags=1)
        self.set_pending(port)
        self.after(3 * US, self.unmask, port, v)

    def mask(self, port: int, v: int) -> None:
        self.note("evtchn.mask", dom=DOM, vcpu=v, obj=port)
        self.masked.add(port)
        self.masks[port] += 1

    def unmask(self, port: int, v: int) -> None:
        """The process on vcpu `v` wants to hear of the port again."""
        self.note("evtchn.unmask", dom=DOM, vcpu=v, obj=port)
        if not self.bad and self.bound[port] != v:
            self.note("evtchn.unmask_hypercall", dom=DOM, vcpu=v, obj=port)
        if port not in self.masked:
            return
        self.masked.discard(port)
        if port in self.pending:
            here = self.bad or self.bound[port] == v
            self.select(port, v if here else self.bound[port], hypervisor=not here)


def record(*, bad: bool, seed: int) -> Recording:
    """Simulate 20 ms of 4 vcpus and 5 ports; same sends, masks and unmasks for the same seed."""
    return Guest(Random(seed), bad=bad).run(END)
