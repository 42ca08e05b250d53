"""What a predicted and a recorded virtual GIC share: entities, event glue, and the operations policies may use."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import KIND_ID, NIL, NONE
from replay.knowledge import UNKNOWN
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.vgic.monitor import MISMATCH, Monitor
from replay.systems.vgic.state import Irq, Vcpu

__all__ = ["VgicBase"]

# Actions of the agenda
ACK: Final = 1  # a = vcpu, b = list register, c = serial
EOI: Final = 2
SGI: Final = 3  # a = pcpu




PHYS_IRQ: Final = KIND_ID["vgic.phys_irq"]
ITARGETS: Final = KIND_ID["vgic.itargets"]
ENABLE: Final = KIND_ID["vgic.enable"]
DISABLE: Final = KIND_ID["vgic.disable"]
PRIORITY: Final = KIND_ID["vgic.priority"]
HYP_ENTRY: Final = KIND_ID["vgic.hyp_entry"]
GUEST_ACK: Final = KIND_ID["vgic.ack"]
GUEST_EOI: Final = KIND_ID["vgic.eoi"]
INJECT: Final = KIND_ID["vgic.inject"]
LR_WRITE: Final = KIND_ID["vgic.lr_write"]
LR_CLEAR: Final = KIND_ID["vgic.lr_clear"]
KICK: Final = KIND_ID["vgic.sgi"]
MAINT: Final = KIND_ID["vgic.maint"]
DEACTIVATE: Final = KIND_ID["vgic.deactivate"]
AFFINITY: Final = KIND_ID["vgic.affinity"]
RUN: Final = KIND_ID["sched.run"]
STOP: Final = KIND_ID["sched.stop"]
LOST: Final = KIND_ID["trace.lost"]

ABOUT_IRQ: Final = frozenset(
    (
        PHYS_IRQ, DEACTIVATE, AFFINITY, ENABLE, DISABLE, PRIORITY,
        LR_WRITE, LR_CLEAR, GUEST_ACK, GUEST_EOI, INJECT, ITARGETS,
    )
)  # fmt: skip

#: Vcpus and irqs that a run can have; events that name others are ignored (a corrupt recording, not a guest).
MAX_VCPUS: Final = 4096
MAX_INTID: Final = 1020
IDLE_DOMAIN: Final = 0x7FFF


class VgicBase(Machine):
    """Entities of the virtual GIC and one method for each kind of event."""

    columns: ClassVar[tuple[str, ...]] = ("kind", "t_ns", "cpu", "dom", "vcpu", "obj", "tgt", "val", "seq")

    def __init__(self, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.nr_lrs: int = min(max(config.integer("nr_lrs"), 1), 64)
        self.phys_immediate: bool = config["phys_follows"] == "immediate"
        self.slice_ns: int = config.integer("slice_ns")
        self.seq: int = NONE  # of the event being handled
        self.vcpus: list[Vcpu] = []
        self.vcpu_of: dict[int, int] = {}  # (dom, vcpu) of events to index
        self.irqs: list[Irq] = []
        self.irq_of: dict[int, Irq] = {}
        self.current: dict[int, int] = {}  # pcpu to the vcpu that runs there
        self.monitor: Monitor = Monitor(self, config)

    # -- entities ----------------------------------------------------------------------------------------

    def irq(self, dom: int, obj: int) -> Irq:
        """The interrupt `obj` of a domain (NONE: the only one)."""
        key = obj if dom <= 0 else dom << 16 | obj
        found = self.irq_of.get(key)
        if found is None:
            found = Irq(len(self.irqs), obj, dom, known=self.knows_start())
            if self.knows_start():
                found.target = self.place(dom, 0)  # reset value of GICD_ITARGETSR
            self.irq_of[key] = found
            self.irqs.append(found)
        return found

    def knows_start(self) -> bool:
        """Whether an entity that appears now is in its initial state."""
        return self.from_boot

    def home(self, dom: int, number: int) -> int:
        """The pcpu that a vcpu runs on when it is first named, NONE if not known."""
        return NONE

    def place(self, dom: int, number: int) -> int:
        """Index of a vcpu, which is made when first named."""
        if number < 0:
            return NONE
        key = number if dom <= 0 else dom << 16 | number
        index = self.vcpu_of.get(key, NONE)
        if index < 0:
            index = self.vcpu_of[key] = len(self.vcpus)
            cpu = self.home(dom, number)
            self.vcpus.append(Vcpu(index, dom, number, self.nr_lrs, cpu))
            if not self.knows_start():
                self.vcpus[index].kicks = UNKNOWN
            if cpu >= 0:
                self.current[cpu] = index
        return index

    # -- event glue --------------------------------------------------------------------------------------

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        """Feed canonical events; kinds of other systems are skipped."""
        heap = self.agenda.heap
        for kind, t, cpu, dom, vcpu, obj, tgt, val, seq in rows:
            if heap:
                self.advance(t)
            else:
                self.now = t
            self.seq = seq
            if kind == HYP_ENTRY:
                if 0 <= vcpu < MAX_VCPUS:
                    self.hyp_entry(self.place(dom, vcpu))
            elif kind in ABOUT_IRQ:
                if 0 <= obj < MAX_INTID and vcpu < MAX_VCPUS:
                    self.about_irq(kind, cpu, self.place(dom, vcpu), self.irq(dom, obj), dom, tgt, val)
            elif kind == RUN:
                if dom != IDLE_DOMAIN and 0 <= vcpu < MAX_VCPUS:
                    self.run(cpu, self.place(dom, vcpu))
            elif kind == STOP:
                if dom != IDLE_DOMAIN and 0 <= vcpu < MAX_VCPUS:
                    self.stop(cpu, self.place(dom, vcpu))
            elif kind == KICK:
                self.kick_sent(cpu, tgt)
            elif kind == MAINT:
                self.maintenance_taken(cpu, val)
            elif kind == LOST:
                self.taint(cpu, val, t)

    def about_irq(self, kind: int, cpu: int, v: int, q: Irq, dom: int, tgt: int, val: int) -> None:
        """Events that name an interrupt; most of them also name a vcpu."""
        if kind == PHYS_IRQ:
            self.phys_irq(q)
        elif kind == DEACTIVATE:
            self.deactivated(q)
        elif kind == AFFINITY:
            self.affinity_changed(q, tgt)
        elif kind == ENABLE:
            self.enable(q, v)
        elif kind == DISABLE:
            self.disable(q)
        elif kind == PRIORITY:
            q.priority = val & 0xFF
        elif v < 0:
            return
        elif kind == LR_WRITE:
            self.lr_written(v, cpu, q, tgt, val)
        elif kind == LR_CLEAR:
            self.lr_cleared(v, cpu, q, tgt)
        elif kind == GUEST_ACK:
            self.acked(v, q)
        elif kind == GUEST_EOI:
            self.ended(v, q)
        elif kind == INJECT:
            self.injected(v, q)
        elif 0 <= tgt < MAX_VCPUS:
            self.itargets(q, v, self.place(dom, tgt))

    # -- stimuli -----------------------------------------------------------------------------------------

    def phys_irq(self, q: Irq) -> None:
        """The device raises the line (G6)."""

    def itargets(self, q: Irq, writer: int, new: int) -> None:
        """The guest writes GICD_ITARGETSR."""

    def enable(self, q: Irq, v: int) -> None:
        """The guest writes GICD_ISENABLER."""

    def disable(self, q: Irq) -> None:
        """The guest writes GICD_ICENABLER."""

    def hyp_entry(self, v: int) -> None:
        """The guest traps for a reason of its own (G4)."""

    def run(self, cpu: int, v: int) -> None:
        """The scheduler runs `v` on `cpu`."""

    def stop(self, cpu: int, v: int) -> None:
        """The scheduler takes `v` off `cpu`."""

    # -- outcomes and responses: only a recording has them -----------------------------------------------

    def acked(self, v: int, q: Irq) -> None:
        """The guest read IAR."""

    def ended(self, v: int, q: Irq) -> None:
        """The guest wrote EOIR."""

    def injected(self, v: int, q: Irq) -> None:
        """vgic_vcpu_inject_irq ran."""

    def lr_written(self, v: int, cpu: int, q: Irq, lr: int, word: int) -> None:
        """A list register of `v` was written on `cpu`."""

    def lr_cleared(self, v: int, cpu: int, q: Irq, lr: int) -> None:
        """A list register of `v` was written with 0 on `cpu`."""

    def kick_sent(self, cpu: int, tgt: int) -> None:
        """An event-check SGI went from `cpu` to `tgt`."""

    def maintenance_taken(self, cpu: int, misr: int) -> None:
        """The maintenance interrupt was taken on `cpu`."""

    def deactivated(self, q: Irq) -> None:
        """Xen deactivated the physical interrupt itself (GICC_DIR)."""

    def affinity_changed(self, q: Irq, cpu: int) -> None:
        """The physical interrupt goes to `cpu` from now on."""

    # -- what a policy may do ----------------------------------------------------------------------------

    def set_target(self, q: Irq, new: int) -> None:
        """The write to ITARGETSR takes effect."""
        q.target = new
        q.wrote = self.now
        q.wrote_seq = self.seq
        if q.migrating == 1:
            q.disturbed = True
            self.monitor.migrations_double += 1
        self.check_affinity(q)

    def refuse(self, q: Irq, writer: int, new: int) -> None:
        """The write to ITARGETSR is ignored."""
        self.monitor.refused(q, writer, new)

    def begin_migration(self, q: Irq) -> None:
        """MIGRATING: in a list register of the old vcpu, wanted elsewhere."""
        q.migrating = 1
        q.migrating_since = self.now
        q.migrate_from = q.inflight_on
        q.disturbed = False
        self.monitor.migration_began(q)
        self.check_affinity(q)

    def end_migration(self, q: Irq) -> None:
        """MIGRATING is over."""
        q.migrating = 0
        q.edit = False
        self.monitor.migration_ended(q)
        self.check_affinity(q)

    def move_affinity(self, q: Irq) -> None:
        """irq_set_affinity to the pcpu of the present target."""

    def move_queued(self, q: Irq) -> None:
        """Take it off the old vcpu's lists, if it is on one, and inject it into the present target."""

    def inject(self, v: int, q: Irq) -> None:
        """vgic_vcpu_inject_irq."""

    def queue(self, q: Irq) -> None:
        """Set QUEUED and nothing else."""

    def kick_old(self, q: Irq) -> None:
        """Interrupt the vcpu the interrupt migrates from."""

    def hand_over(self, q: Irq) -> None:
        """If QUEUED and on no list: inject into the present target, under its own lock."""

    def request_edit(self, q: Irq) -> None:
        """Have the list register turned into HW=0, EOI=1."""

    def deactivate_for_guest(self, q: Irq) -> None:
        """Deactivate the physical interrupt if the guest's EOI could not."""

    # -- affinity: an info rule that both modes track ----------------------------------------------------

    def check_affinity(self, q: Irq) -> None:
        """Start or stop the clock of vgic-affinity-mismatch (recordings only; closed runs never raise it)."""
        if self.sink.closed:
            return
        cpu = self.vcpus[q.target].running_on if 0 <= q.target < len(self.vcpus) else NONE
        if q.migrating != 0 or cpu < 0 or q.p_affinity < 0 or cpu == q.p_affinity:
            q.mismatch_since = NIL
        elif q.mismatch_since == NIL:
            q.mismatch_since = self.now
            self.agenda.at(self.now + self.slice_ns, SOFTWARE, MISMATCH, q.id)
