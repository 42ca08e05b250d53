"""Virtual GICv2 (patch review of 2014): an SPI is retargeted while its list register on the old vcpu is in use.

Simulated are two physical CPUs with one vcpu each, their list registers, a distributor, devices, and a guest that moves
its interrupts about. `bad` changes the target and the physical affinity and leaves the list register alone; the good
one has the guest's EOI raise a maintenance interrupt on the old vcpu, which completes the move.
"""

from __future__ import annotations

from random import Random

from tracetool.seeded.engine import Recording, World

__all__ = ["record"]

US = 1_000
MS = 1_000_000

VCPUS = 2
SPIS = (40, 41, 42)
REGISTERS = 4
EDGES = 140
MOVES = 40
END = 60 * MS
ACK = 500
EOI = 4 * US
SGI = 1 * US
NOWHERE = -1

# GICH_LRn
INVALID, PENDING, ACTIVE = 0, 1, 2
STATE_SHIFT = 28
HW_BIT = 1 << 31
EOI_BIT = 1 << 19
PHYSICAL_SHIFT = 10
PRIORITY = 0x14 << 23


class Spi:
    """An interrupt: distributor state, what the hypervisor notes, where its list register is."""

    def __init__(self) -> None:
        self.target = 0
        self.affinity = 0
        self.active = False
        self.latched = False
        self.queued = False
        self.migrating = False
        self.edited = False
        self.edit_wanted = False
        self.vcpu = NOWHERE
        self.register = NOWHERE
        self.state = INVALID
        self.written = NOWHERE
        self.loaded = NOWHERE


class Hypervisor(World):
    """Both CPUs; vcpu i runs on CPU i all the time."""

    def __init__(self, rng: Random, *, bad: bool) -> None:
        super().__init__()
        self.bad = bad
        self.spis = {number: Spi() for number in SPIS}
        self.used = [[False] * REGISTERS for _ in range(VCPUS)]
        for v in range(VCPUS):
            self.note("sched.run", vcpu=v, cpu=v)
        for number in SPIS:
            self.note("vgic.enable", vcpu=0, obj=number)
        for _ in range(EDGES):
            t, number = rng.randrange(END), rng.choice(SPIS)
            self.at(t, self.edge, number)
            if rng.random() < 0.5:  # the device has more soon after
                self.at(t + rng.randrange(20 * US), self.edge, number)
            if rng.random() < 0.3:  # and the guest moves it in between
                then = t + rng.randrange(1, EOI)
                self.at(then, self.write_target, number, rng.randrange(VCPUS), rng.randrange(VCPUS))
        for _ in range(MOVES):
            self.at(rng.randrange(END), self.write_target, rng.choice(SPIS), rng.randrange(VCPUS), rng.randrange(VCPUS))
        for v in range(VCPUS):
            t = 0
            while t < END:
                t += 1 + int(rng.expovariate(1 / (700 * US)))
                self.at(t, self.trap, v)

    # -- distributor -------------------------------------------------------------------------------------------

    def edge(self, number: int) -> None:
        """The device raises its line: one is active, one can be latched."""
        spi = self.spis[number]
        self.note("vgic.phys_irq", obj=number, cpu=spi.affinity)
        if spi.active:
            spi.latched = True
        else:
            spi.active = True
            self.taken(number)

    def deactivated(self, number: int) -> None:
        spi = self.spis[number]
        spi.active = spi.latched
        if spi.latched:
            spi.latched = False
            self.taken(number)

    def affine(self, number: int, cpu: int) -> None:
        spi = self.spis[number]
        if spi.affinity != cpu:
            self.note("vgic.affinity", obj=number, tgt=cpu, val=spi.affinity)
            spi.affinity = cpu

    def taken(self, number: int) -> None:
        """The physical interrupt enters the hypervisor on the CPU it is affine to."""
        cpu = self.spis[number].affinity
        self.entry(cpu)
        self.inject(number, cpu)

    # -- hypervisor --------------------------------------------------------------------------------------------

    def trap(self, v: int) -> None:
        """The guest traps for a reason of its own."""
        self.note("vgic.hyp_entry", vcpu=v, val=0)
        self.sync(v)

    def entry(self, v: int) -> None:
        """An entry that the interrupt traffic causes."""
        self.note("vgic.hyp_entry", vcpu=v, val=1, role="outcome")
        self.sync(v)

    def sync(self, v: int) -> None:
        """Look through the list registers of this vcpu: what the guest has finished is let go."""
        for number, spi in self.spis.items():
            if spi.vcpu != v:
                continue
            if spi.state == INVALID:
                self.let_go(number)
            elif spi.edit_wanted:
                self.edit(number)

    def let_go(self, number: int) -> None:
        """Clear the list register; then whatever was queued behind it, or the end of a migration."""
        spi = self.spis[number]
        v = spi.vcpu
        self.note("vgic.lr_clear", vcpu=v, cpu=v, obj=number, tgt=spi.register)
        self.used[v][spi.register] = False
        spi.vcpu = spi.register = NOWHERE
        spi.edit_wanted = False
        if spi.migrating:
            spi.migrating = False
            self.affine(number, spi.target)
            if spi.edited:
                spi.edited = False
                self.note("vgic.deactivate", cpu=v, obj=number)
                self.deactivated(number)
        if spi.queued and spi.vcpu == NOWHERE:
            # `bad`: onto the vcpu in whose list the interrupt was found
            self.load(number, v if self.bad else spi.target)

    def inject(self, number: int, cpu: int) -> None:
        """vgic_vcpu_inject_irq for the present target."""
        spi = self.spis[number]
        self.note("vgic.inject", vcpu=spi.target, obj=number)
        spi.queued = True
        if spi.vcpu == NOWHERE:
            self.load(number, spi.target)
            if spi.target != cpu:
                self.kick(cpu, spi.target)
        elif spi.vcpu == spi.target:
            self.kick(cpu, spi.vcpu) if spi.vcpu != cpu else self.sync(cpu)
        elif self.bad and not self.used[cpu][spi.register]:
            # Its list register index, looked up in the registers of this CPU: found empty, and cleared.
            self.note("vgic.lr_clear", vcpu=spi.vcpu, cpu=cpu, obj=number, tgt=spi.register)
            self.happened("vgic-lr-foreign-access")

    def load(self, number: int, v: int) -> None:
        """A free list register of `v` gets the interrupt."""
        spi = self.spis[number]
        spi.vcpu, spi.register, spi.state = v, self.used[v].index(False), PENDING
        self.used[v][spi.register] = True
        spi.queued = False
        spi.loaded = self.now
        self.write(number)
        self.after(ACK, self.ack, number)

    def write(self, number: int) -> None:
        """Program the list register as it should be now."""
        spi = self.spis[number]
        tied = EOI_BIT if spi.edited else HW_BIT | number << PHYSICAL_SHIFT
        word = number | tied | PRIORITY | spi.state << STATE_SHIFT
        self.note("vgic.lr_write", vcpu=spi.vcpu, cpu=spi.vcpu, obj=number, tgt=spi.register, val=word)

    def edit(self, number: int) -> None:
        """HW=0, EOI=1: the guest's EOI will come to the hypervisor."""
        spi = self.spis[number]
        spi.edit_wanted = False
        spi.edited = True
        self.write(number)

    def kick(self, cpu: int, v: int) -> None:
        self.note("vgic.sgi", cpu=cpu, tgt=v)
        self.after(SGI, self.entry, v)

    # -- guest -------------------------------------------------------------------------------------------------

    def write_target(self, number: int, writer: int, v: int) -> None:
        """GICD_ITARGETSR: a trap of the writer."""
        spi = self.spis[number]
        self.entry(writer)
        self.note("vgic.itargets", vcpu=writer, obj=number, tgt=v)
        if v == spi.target:
            return
        spi.target = v
        spi.written = self.now
        if self.bad or spi.vcpu == NOWHERE:
            self.affine(number, v)
        elif not spi.migrating:
            spi.migrating = True
            if spi.vcpu == writer:
                self.edit(number)
            else:
                spi.edit_wanted = True
                self.kick(writer, spi.vcpu)

    def ack(self, number: int) -> None:
        """The guest reads IAR."""
        spi = self.spis[number]
        self.note("vgic.ack", vcpu=spi.vcpu, obj=number)
        if spi.vcpu != spi.target and spi.loaded > spi.written:
            self.happened("vgic-delivered-old-target")
        spi.state = ACTIVE
        self.after(EOI, self.eoi, number)

    def eoi(self, number: int) -> None:
        """The guest writes EOIR."""
        spi = self.spis[number]
        v = spi.vcpu
        self.note("vgic.eoi", vcpu=v, obj=number)
        spi.state = INVALID
        if spi.edited:
            self.note("vgic.maint", cpu=v, val=1)
            self.entry(v)
        else:
            self.deactivated(number)


def record(*, bad: bool, seed: int) -> Recording:
    """Simulate 60 ms of 2 vcpus and 3 SPIs; same edges, writes and traps for the same seed."""
    return Hypervisor(Random(seed), bad=bad).run(END)
