"""GICv2 in lockstep with an emulator's log: distributor, CPU interfaces, list registers (spec 0.5, S6.3, S3.1).

The models are fed lines and register writes only. They predict what every IAR read returns, the list register words
that the hypervisor reads back (so the guest's acknowledges, priority drops and deactivations), and the running
priority that the emulator prints when it looks for the best pending interrupt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from replay.declare import Config
from replay.events import KIND_ID, NIL, NONE
from replay.hardware.gic_distributor import ICFGR, ITARGETSR, PRIVATE, SGIR, SGIS, GicDistributor
from replay.lockstep import Lockstep
from replay.sink import Sink
from replay.systems.gic.interfaces import ACTIVE, GICH_LR, Interfaces

__all__ = ["NEEDS", "GicLockstep"]

ACK: Final = KIND_ID["gic.ack"]
EOI: Final = KIND_ID["gic.eoi"]
DIR: Final = KIND_ID["gic.dir"]
LINE: Final = KIND_ID["gic.line"]
DIST: Final = KIND_ID["gic.dist"]
CPU_IF: Final = KIND_ID["gic.cpu_if"]
BEST: Final = KIND_ID["gic.best"]
HYP_READ: Final = KIND_ID["gic.hyp_read"]
LOST: Final = KIND_ID["trace.lost"]

#: Without these in the recording there is nothing to compare.
NEEDS: Final = ("gic.line", "gic.dist", "gic.cpu_if", "gic.ack", "gic.eoi")

NAMES: Final = ("gic_ack", "gic_virtual_ack", "gich_read", "gic_running_priority", "gic_virtual_running_priority")
PHYSICAL_ACK: Final = 0
VIRTUAL_ACK: Final = 1
GICH_READ: Final = 2
RUNNING: Final = 3

VIRTUAL: Final = 1
HYPERVISOR: Final = 2
GICC_CTLR: Final = 0x0000
GICC_PMR: Final = 0x0004
EOIR: Final = 0x10
GICC_DIR: Final = 0x1000
MAX_CPUS: Final = 8
MAX_IRQS: Final = 1020
MAX_LRS: Final = 64
INTID: Final = 0x3FF
SPURIOUS: Final = 1023
#: Running priority when nothing is active.
IDLE: Final = 0x100
EOIMODE: Final = 1 << 9
#: Bytes that one access to a register of the distributor can have.
WORD: Final = 4


class GicLockstep(Lockstep):
    """A whole GIC.

    A recording that begins before GICD_CTLR is written is complete. In another one registers are unknown until they
    are seen: an interrupt counts as enabled, with its priority, once the emulator names it, and the interfaces are
    taken to be open to it and to drop priority and deactivate apart (EOImode=1) until an interrupt is taken again
    without having been deactivated.
    """

    def __init__(self, sink: Sink, config: Config) -> None:
        super().__init__(sink, NAMES)
        self.irqs = min(max(config.integer("irqs"), 32), MAX_IRQS)
        self.nr_lrs = min(max(config.integer("nr_lrs"), 1), MAX_LRS)
        self.distributor = GicDistributor(self.irqs, MAX_CPUS, pinned=bool(config.integer("latch_pinned")))
        self.cores: list[Interfaces] = []
        self.gap = False  # after one, a write of GICD_CTLR is no beginning
        self.known: bool  # everything, from the beginning
        self.familiar: set[tuple[int, int]] = set()  # (interrupt, core) of which enable and priority are known
        self.configured: set[int] = set()  # SPIs of which ICFGR was written
        self.deferred: list[tuple[int, ...]] = []  # core, running priority, virtual, best interrupt, t, seq
        self.drops = [0, 0]
        self.deactivations = [0, 0]
        self.stranded_latches = 0
        self.reset(known=False)

    def reset(self, *, known: bool) -> None:
        """Registers as after reset, or unknown."""
        d = self.distributor
        self.known = known
        self.familiar.clear()
        self.configured.clear()
        self.deferred.clear()
        self.cores = [Interfaces(d, cpu, self.nr_lrs, known=known) for cpu in range(MAX_CPUS)]
        if not known:
            d.ctlr = 1
            for core in self.cores:
                core.physical.write(GICC_CTLR, EOIMODE | 1)
                core.physical.write(GICC_PMR, 0xFF)

    def watch(self, rows: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        """Passes the machine's rows on, having fed them to the models."""
        for row in rows:
            kind, t, cpu, _, _, obj, val, flags, seq, tgt, val2 = row
            if kind == LOST:
                self.forget()
            elif cpu < MAX_CPUS:
                self.feed(kind, t, cpu, obj, tgt, val, val2, flags, seq)
            yield row

    def feed(self, kind: int, t: int, cpu: int, obj: int, tgt: int, val: int, val2: int, flags: int, seq: int) -> None:
        """One canonical event, stimulus or outcome."""
        if kind == BEST:
            self.best(cpu, obj, val, val2, flags, t, seq)
            return
        if kind == ACK:
            if not self.known:  # what is taken was the best before, never after
                self.check_deferred([d for d in self.deferred if d[0] == cpu and not d[2] and d[3] == obj & INTID])
            self.acknowledge(cpu, obj, flags, t, seq)
            self.check_deferred()
            return
        if self.deferred:
            self.check_deferred()
        if kind == LINE:
            if SGIS <= obj < self.irqs:  # an SGI has no line
                self.step(t, seq, "line of", cpu, obj, val)
                self.distributor.set_line(obj, val, max(cpu, 0))
        elif cpu < 0:
            return
        elif kind == HYP_READ:
            self.hyp_read(cpu, obj, val, t, seq)
        elif kind == CPU_IF:
            self.step(t, seq, ("GICC", "GICV", "GICH")[min(flags & 3, 2)], cpu, obj, val)
            self.interface(cpu, obj, val, flags)
        elif kind == EOI:
            self.step(t, seq, "virtual EOIR" if flags & 1 else "EOIR", cpu, obj, NIL)
            self.ended(cpu, obj, flags & 1, EOIR)
        elif kind == DIR:
            self.step(t, seq, "virtual DIR" if flags & 1 else "DIR", cpu, obj, NIL)
            self.ended(cpu, obj, flags & 1, GICC_DIR)
        elif kind == DIST:
            self.step(t, seq, "GICD", cpu, tgt, val)
            self.dist(cpu, tgt, val, val2)

    # -- stimuli -----------------------------------------------------------------------------------------------

    def dist(self, cpu: int, offset: int, value: int, size: int) -> None:
        """A distributor write; the one to CTLR before anything else says that the recording is complete."""
        d = self.distributor
        size = min(size, WORD)
        if offset == 0 and not self.known and not self.gap and not any(self.observed):
            self.reset(known=True)
        d.write(offset, size, value, cpu)
        if ICFGR <= offset < SGIR:
            self.configured.update(range((offset - ICFGR) * 4, (offset - ICFGR + size) * 4))
        if ITARGETSR <= offset < ICFGR:
            for irq in range(offset - ITARGETSR, min(offset - ITARGETSR + size, self.irqs)):
                if irq >= PRIVATE and d.pinned and d.latch[irq] and not d.latch[irq] & d.targets[irq]:
                    self.stranded_latches += 1

    def interface(self, cpu: int, offset: int, value: int, flags: int) -> None:
        """A write to GICC, GICV or GICH, other than EOIR and DIR."""
        core = self.cores[cpu]
        if flags & HYPERVISOR:
            core.write(offset, value)
        elif flags & VIRTUAL:
            core.lrs.write_virtual(offset, value)
        else:
            core.physical.write(offset, value)
            core.assumed = core.assumed and offset != GICC_CTLR

    def ended(self, cpu: int, value: int, virtual: int, register: int) -> None:
        """EOIR: priority drop, and deactivation unless EOImode=1; DIR: deactivation."""
        core = self.cores[cpu]
        if virtual:
            held = [n for n, w in enumerate(core.lrs.words) if w & INTID == value & INTID and w >> 28 & 3]
            if register == EOIR and held and not any(core.lrs.state(n) & ACTIVE for n in held):
                self.take_virtual(core, value, cpu)  # U4: its acknowledge was not seen
            done = core.lrs.write_virtual(register, value)
            if done >= 0:
                self.distributor.deactivate(done, cpu)
                self.deactivations[1] += 1
            self.drops[1] += register == EOIR
            return
        core.physical.write(register, value)
        if register == GICC_DIR:
            core.assumed = False  # EOImode=1: otherwise nobody writes DIR
        elif len(core.certain) > 1:
            core.certain.pop()
        if register == EOIR and core.assumed:
            self.familiar -= {(value & INTID, n) for n in range(MAX_CPUS)}  # active or not
        self.drops[0] += register == EOIR
        self.deactivations[0] += (register == EOIR) != bool(core.physical.ctlr & EOIMODE)

    # -- outcomes ----------------------------------------------------------------------------------------------

    def acknowledge(self, cpu: int, value: int, flags: int, t: int, seq: int) -> None:
        """IAR was read: the model must have signalled this interrupt; then it is taken in the model too."""
        if cpu < 0:
            return
        core = self.cores[cpu]
        self._story.append((t, seq, "virtual IAR" if flags & 1 else "IAR", cpu, value, NIL))
        if flags & 1:
            words, apr = list(core.lrs.words), core.lrs.apr
            expected = core.lrs.acknowledge_virtual() if not core.unknown else NIL
            self.compare(VIRTUAL_ACK, cpu, value, expected, t, seq)
            if expected != value:
                core.lrs.words, core.lrs.apr = words, apr
                self.take_virtual(core, value, cpu, doubt=expected != NIL)
                same = [d for d in self.deferred if d[0] == cpu and d[2]]  # printed in this read: the same mismatch
                self.observed[RUNNING + 1] += len(same)
                self.open[RUNNING + 1] += len(same)
                self.deferred = [d for d in self.deferred if d not in same]
            return
        irq = value & INTID
        signalled = core.physical.signalled()
        certain = self.sure(irq, cpu) and self.sure(signalled, cpu)
        if signalled == irq:
            expected = core.physical.acknowledge()
            core.certain.append(self.sure(irq, cpu))
            self.compare(PHYSICAL_ACK, cpu, value, expected if certain else NIL, t, seq)
            return
        expected = signalled if signalled >= 0 else SPURIOUS
        certain = certain and (core.certain[-1] or expected == irq)
        self.compare(PHYSICAL_ACK, cpu, value, expected if certain else NIL, t, seq)
        if signalled >= 0:
            if not self.sure(signalled, cpu) and signalled not in self.configured:
                self.distributor.edge[signalled] = True  # its line is high, and yet it is not pending here
            self.distributor.latch[signalled] &= ~(1 << cpu)  # U4, so that one cause is one mismatch
        if irq < self.irqs:
            self.take(core, irq, cpu)

    def sure(self, irq: int, cpu: int) -> bool:
        """Whether it is known what this interrupt does: it is enabled, and for an SPI how it is triggered. Which cores
        had sent an SGI before is not known."""
        if self.known or irq < 0 or irq >= MAX_IRQS:
            return True
        return irq >= SGIS and (irq, cpu) in self.familiar and (irq < PRIVATE or irq in self.configured)

    def take(self, core: Interfaces, irq: int, cpu: int) -> None:
        """U4: it was taken, whatever the model thought."""
        d = self.distributor
        mask = 1 << cpu if irq < PRIVATE else d.all
        if not self.known and d.active[irq] & mask:
            core.physical.ctlr &= ~EOIMODE
            core.assumed = False
        d.enabled[irq] |= mask
        core.physical.stack.append(d.priority_of(irq, cpu))
        core.certain.append(self.known or (irq, cpu) in self.familiar)
        d.activate(irq, cpu)

    def take_virtual(self, core: Interfaces, value: int, cpu: int, *, doubt: bool = False) -> None:
        """The same for a list register, if a pending one holds it: what would have kept it from being signalled is
        over then. If none does, or nothing was taken, a list register that the model calls pending is in `doubt` until
        the hypervisor reads or writes it: no guess is made on it."""
        lrs = core.lrs
        for n, word in enumerate(lrs.words):
            if word & INTID == value & INTID and word >> 28 & 1:
                level = word >> 23 & 0x1F
                for m, other in enumerate(lrs.words):
                    if m != n and other >> 28 & ACTIVE and other >> 23 & 0x1F <= level and not lrs.vmcr & EOIMODE:
                        self.distributor.deactivate(lrs.deactivate_virtual(other & INTID), cpu)
                lrs.set_state(n, ACTIVE)
                lrs.apr = lrs.apr >> level << level | 1 << level
                return
        best = core.lrs.best_pending()
        if doubt and best >= 0:
            core.unknown.add(GICH_LR + 4 * best)

    def set_running(self, core: Interfaces, running: int, virtual: int) -> None:
        """U4: the priority of what is active, as recorded; 0x100: nothing is."""
        if virtual:
            level = running >> 3
            core.lrs.apr = 0 if running >= IDLE else core.lrs.apr >> level << level | 1 << level
            return
        stack = core.physical.stack
        while stack and stack[-1] < running:
            stack.pop()
        if running < IDLE and core.physical.running_priority() != running:
            stack.append(running)
        if not self.known:
            core.certain = [running >= IDLE, *core.certain[1 : len(stack)], True][: len(stack) + 1]

    def compare(self, kind: int, cpu: int, value: int, expected: int, t: int, seq: int) -> None:
        """Count an outcome; NIL: the model could not tell."""
        self.observed[kind] += 1
        if expected == NIL:
            self.open[kind] += 1
            return
        self.predicted[kind] += 1
        if value != expected:
            self.report_extra(kind, t, seq, cpu, value, NONE, NIL, self.text(kind, cpu, expected, NONE, NIL))

    def hyp_read(self, cpu: int, offset: int, value: int, t: int, seq: int) -> None:
        """A GICH register was read."""
        core = self.cores[cpu]
        expected = core.read(offset)
        if expected == NIL:
            return
        self.observed[GICH_READ] += 1
        if offset in core.unknown:
            self.open[GICH_READ] += 1
        else:
            self.predicted[GICH_READ] += 1
            if value != expected:
                wanted = self.text(GICH_READ, cpu, offset, NONE, expected)
                self.report_extra(GICH_READ, t, seq, cpu, offset, NONE, value, wanted)
                core.write(offset, value)
                if offset >= GICH_LR:
                    core.lrs.apr = core.active_priorities()
        core.write(offset, value)

    def best(self, cpu: int, irq: int, priority: int, running: int, flags: int, t: int, seq: int) -> None:
        """The emulator looked for the best pending interrupt. It prints this inside an IAR read before the read."""
        if cpu < 0 or running < 0:
            return
        core = self.cores[cpu]
        if not self.known and not flags & 1 and 0 <= irq < self.irqs and (irq, cpu) not in self.familiar:
            self.introduce(irq, cpu, priority)
        now = core.lrs.running_priority() if flags & 1 else core.physical.running_priority()
        if not flags & 1 and now == running and not core.certain[-1]:
            self.set_running(core, running, 0)
            self.observed[RUNNING] += 1
            self.open[RUNNING] += 1
        elif now == running or (flags & 1 and core.unknown):
            kind = RUNNING + (flags & 1)
            self.observed[kind] += 1
            self.predicted[kind] += now == running
            self.open[kind] += now != running
        else:
            self.deferred.append((cpu, running, flags & 1, irq, t, seq))

    def introduce(self, irq: int, cpu: int, priority: int) -> None:
        """U4: an interrupt of which nothing was known on this core is enabled, pending here, and of this priority."""
        d = self.distributor
        self.familiar.add((irq, cpu))
        mask = 1 << cpu
        d.enabled[irq] |= mask
        d.active[irq] &= ~mask
        d.targets[irq] |= mask
        d.priority[irq * MAX_CPUS + cpu] = priority
        if d.edge[irq]:
            d.latch[irq] |= mask
        else:
            d.line[irq] |= mask

    def check_deferred(self, chosen: list[tuple[int, ...]] | None = None) -> None:
        """Running priorities that did not agree, now that what they were printed for is known; all, or those chosen."""
        for cpu, running, virtual, _, t, seq in self.deferred if chosen is None else chosen:
            core = self.cores[cpu]
            now = core.lrs.running_priority() if virtual else core.physical.running_priority()
            self.compare(RUNNING + virtual, cpu, running, now if virtual or core.certain[-1] else NIL, t, seq)
            self.set_running(core, running, virtual)
        self.deferred = [] if chosen is None else [d for d in self.deferred if d not in chosen]

    def forget(self) -> None:
        """Records were lost (U2)."""
        super().forget()
        self.gap = True
        self.distributor = GicDistributor(self.irqs, MAX_CPUS, pinned=self.distributor.pinned)
        self.reset(known=False)

    def metrics(self) -> dict[str, int]:
        """Counts by kind, and what the models went through."""
        out = dict(super().metrics())
        if self.seen:
            out["lockstep.gic_priority_drops"] = self.drops[0]
            out["lockstep.gic_deactivations"] = self.deactivations[0]
            out["lockstep.gic_virtual_priority_drops"] = self.drops[1]
            out["lockstep.gic_deactivated_by_guest"] = self.deactivations[1]
            out["lockstep.gic_latches_left_behind"] = self.stranded_latches
        return out
