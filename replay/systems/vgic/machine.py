"""The virtual GIC of Xen on Arm, predicted from stimuli: the guest (G5), the distributor (G6), the scheduler."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import NONE
from replay.hardware.gic_list_registers import ACTIVE, INVALID, LR_EOI, LR_HW, NO_LR
from replay.sink import Sink
from replay.systems.vgic.base import (
    ACK,
    DISABLE,
    ENABLE,
    EOI,
    GUEST_ACK,
    GUEST_EOI,
    ITARGETS,
    MAINT,
    PHYS_IRQ,
    SGI,
)
from replay.systems.vgic.hypervisor import KICK_EDIT, KICK_NEW, KICK_OLD, Hypervisor
from replay.systems.vgic.state import Irq, Vcpu

if TYPE_CHECKING:
    from replay.systems.vgic.policies import Policy

__all__ = ["VgicMachine"]


class VgicMachine(Hypervisor):
    """Closed runs: the policy decides."""

    def __init__(self, policy: Policy, config: Config, sink: Sink) -> None:
        super().__init__(policy, config, sink)
        self.eoi_ns: int = config.integer("eoi_ns")
        self.underflow_limit: int = min(1, self.nr_lrs - 1)
        self.maintenance_irqs: int = 0
        self.underflow_irqs: int = 0

    # -- G5 guest ----------------------------------------------------------------------------------------

    def guest_ack(self, vcpu: Vcpu, lr: int) -> None:
        """G5: GICV_IAR. Pending to active."""
        q = vcpu.owner[lr]
        assert q is not None
        vcpu.lrs.set_state(lr, ACTIVE)
        self.effects.append((self.now, vcpu.id << 16 | q.obj))
        self.emit(GUEST_ACK, vcpu.running_on, vcpu.id, q.obj)
        self.monitor.acked(q, vcpu.id, vcpu.loaded[lr], vcpu.loaded_seq[lr])
        self.guest_will(EOI, vcpu, lr, self.eoi_ns)

    def guest_eoi(self, vcpu: Vcpu, lr: int) -> None:
        """G5: GICV_EOIR. Active to invalid; deactivates with HW=1, else may raise a maintenance interrupt."""
        q = vcpu.owner[lr]
        assert q is not None
        word = vcpu.lrs.words[lr]
        vcpu.lrs.set_state(lr, INVALID)
        vcpu.invalid_since[lr] = self.now
        self.emit(GUEST_EOI, vcpu.running_on, vcpu.id, q.obj)
        if word & LR_HW:
            self.deactivate(q)
        elif word & LR_EOI:
            self.maintenance_irqs += 1
            self.emit(MAINT, vcpu.running_on, vcpu.id, NONE, NONE, 1)
            outer = self.enter(vcpu.id)
            self.policy.on_maintenance(self, vcpu.id)
            self.leave(vcpu.id, outer)
        if vcpu.lr_pending and vcpu.lrs.valid() <= self.underflow_limit:
            self.underflow_irqs += 1
            self.emit(MAINT, vcpu.running_on, vcpu.id, NONE, NONE, 2)
            self.leave(vcpu.id, self.enter(vcpu.id))

    # -- G6 physical interrupt ---------------------------------------------------------------------------

    def phys_irq(self, q: Irq) -> None:
        """G6: an edge while active is latched once; more coalesce."""
        self.emit(PHYS_IRQ, NONE, NONE, q.obj)
        self.monitor.edges += 1
        if not q.p_active:
            self.arrive(q)
        elif q.p_latch:
            self.monitor.coalesced += 1
        else:
            q.p_latch = 1

    def arrive(self, q: Irq) -> None:
        """G6: the distributor hands the interrupt to the pcpu of its affinity, which enters the hypervisor."""
        q.p_active = 1
        q.raised_at = self.now
        self.monitor.arrived(q)
        pcpu = q.p_affinity
        v = self.current.get(pcpu, NONE)
        outer = self.enter(v)
        self.policy.on_arrival(self, q, pcpu)
        self.leave(v, outer)
        self.monitor.check(q)

    def deactivate(self, q: Irq) -> None:
        """G6: active to inactive; what was latched meanwhile arrives."""
        q.p_active = 0
        if q.p_latch:
            q.p_latch = 0
            self.arrive(q)
        self.monitor.check(q)

    # -- stimuli -----------------------------------------------------------------------------------------

    def hyp_entry(self, v: int) -> None:
        if self.vcpus[v].running_on >= 0:
            self.leave(v, self.enter(v))

    def itargets(self, q: Irq, writer: int, new: int) -> None:
        """A write is an entry of the writer; writing what is there already does nothing."""
        self.monitor.itargets_writes += 1
        outer = self.enter(writer)
        self.emit(ITARGETS, self.pcpu(), writer, q.obj, new)
        if new != q.target:
            self.policy.on_itargets(self, q, writer, new)
        self.leave(writer, outer)
        self.monitor.check(q)

    def enable(self, q: Irq, v: int) -> None:
        """vgic_enable_irqs: what waits inflight without a list register is raised. No kick, as in Xen."""
        self.emit(ENABLE, NONE, v, q.obj)
        q.enabled = 1
        if q.inflight_on != NO_LR and q.lr == NO_LR and q.lr_pending_on == NO_LR:
            outer = self.here
            self.here = v
            self.raise_irq(q.inflight_on, q)
            self.here = outer
        self.monitor.check(q)

    def disable(self, q: Irq) -> None:
        """vgic_disable_irqs: off lr_pending; what is in a list register stays."""
        self.emit(DISABLE, NONE, NONE, q.obj)
        q.enabled = 0
        self.leave_lr_pending(q)
        self.monitor.check(q)

    def run(self, cpu: int, v: int) -> None:
        """Context switch to `v`; arch_move_irqs takes its interrupts along; held-back acts of the guest resume."""
        vcpu = self.vcpus[v]
        vcpu.running_on = cpu
        self.current[cpu] = v
        for q in self.irqs:
            if q.target == v and not q.migrating:
                self.move_affinity(q)
        outer = self.here
        self.here = v
        self.refill(vcpu)
        self.here = outer
        waiting = vcpu.waiting
        vcpu.waiting = []
        for action, lr, serial in waiting:
            self.agenda.at(self.now + self.ack_ns, SOFTWARE, action, v, lr, serial)

    def stop(self, cpu: int, v: int) -> None:
        """Context switch away: an entry, so its list registers are synced before they are saved."""
        vcpu = self.vcpus[v]
        if vcpu.running_on >= 0:
            outer = self.here
            self.here = v
            for lr in range(self.nr_lrs):
                self.sync_lr(vcpu, lr)
            self.here = outer
            self.current.pop(vcpu.running_on, None)
            vcpu.running_on = NONE

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        """ACK and EOI by the guest, an SGI that is taken, a time-out."""
        self.seq = NONE
        if action == SGI:
            self.vcpus[b].kicks -= 1
            v = self.current.get(a, NONE)
            self.leave(v, self.enter(v))
        elif action <= EOI:
            vcpu = self.vcpus[a]
            if vcpu.serial[b] != c:
                return
            if vcpu.running_on < 0:
                vcpu.waiting.append((action, b, c))
            elif action == ACK:
                self.guest_ack(vcpu, b)
            else:
                self.guest_eoi(vcpu, b)
        else:
            self.monitor.time_out(action, self.irqs[a], c)

    # -- the end -----------------------------------------------------------------------------------------

    def conclude(self, t_end: int) -> None:
        for q in self.irqs:
            self.monitor.concluded(q)

    def metrics(self) -> dict[str, int]:
        """Spec S3.6 and B; times in ns."""
        return {
            "sgis": sum(self.sgis),
            "sgis_kick_new": self.sgis[KICK_NEW],
            "sgis_kick_old": self.sgis[KICK_OLD],
            "sgis_edit": self.sgis[KICK_EDIT],
            "maintenance_irqs": self.maintenance_irqs,
            "underflow_irqs": self.underflow_irqs,
            "hyp_entries": self.hyp_entries,
            **self.monitor.metrics(),
        }
