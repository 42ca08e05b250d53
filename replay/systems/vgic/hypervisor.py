"""The hypervisor's side of the virtual GIC, 2014: rules G1-G4 (spec S3.3) and the operations of policies.

A hypervisor entry takes no time and its effects are nested, so `here` names the vcpu on whose pcpu the hypervisor
executes at the moment (Xen's `current`). No policy is known here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import KIND_ID, NIL, NONE
from replay.hardware.gic_list_registers import (
    ACTIVE,
    INVALID,
    LR_EOI,
    LR_HW,
    LR_PHYSICAL_SHIFT,
    NO_LR,
    PENDING,
    lr_word,
)
from replay.sink import Sink
from replay.systems.vgic.base import (
    ACK,
    AFFINITY,
    DEACTIVATE,
    HYP_ENTRY,
    INJECT,
    KICK,
    LR_CLEAR,
    LR_WRITE,
    MAX_VCPUS,
    SGI,
    VgicBase,
)
from replay.systems.vgic.state import Irq, Vcpu, enqueue

if TYPE_CHECKING:
    from replay.systems.vgic.policies import Policy

__all__ = ["KICK_EDIT", "KICK_NEW", "KICK_OLD", "Hypervisor"]

#: Why a kick was sent (metrics).
KICK_NEW: Final = 0
KICK_OLD: Final = 1
KICK_EDIT: Final = 2
HYP_EXIT: Final = KIND_ID["vgic.hyp_exit"]

_PHYSICAL: Final = 0x3FF << LR_PHYSICAL_SHIFT


class Hypervisor(VgicBase):
    """Injection, list registers, entry and exit. `log`, when set to a list, receives every stimulus and every
    predicted event, in order, as (kind, t, cpu, vcpu, obj, tgt, val)."""

    def __init__(self, policy: Policy, config: Config, sink: Sink) -> None:
        super().__init__(config, sink)
        self.policy: Policy = policy
        self.ack_ns: int = config.integer("ack_ns")
        self.sgi_ns: int = config.integer("sgi_ns")
        self.here: int = NONE
        self.log: list[tuple[int, int, int, int, int, int, int]] | None = None
        self.sgis: list[int] = [0, 0, 0]
        self.hyp_entries: int = 0
        for number in range(min(config.integer("vcpus"), MAX_VCPUS)):
            self.place(NONE, number)

    def knows_start(self) -> bool:
        """A predicted guest begins idle, whatever it was that the recording did not see."""
        return True

    def home(self, dom: int, number: int) -> int:
        """Vcpu i of the only domain starts on pcpu i; those of others where the scheduler puts them."""
        return number if dom <= 0 else NONE

    def emit(self, kind: int, cpu: int, vcpu: int, obj: int, tgt: int = NONE, val: int = NIL) -> None:
        """Record an event; vcpus are indices."""
        if self.log is not None:
            self.log.append((kind, self.now, cpu, vcpu, obj, tgt, val))

    # -- what the guest and the distributor do in turn -------------------------------------------------------

    def guest_will(self, action: int, vcpu: Vcpu, lr: int, after: int) -> None:
        """The guest acts on a list register `after` ns from now (G5)."""
        self.agenda.at(self.now + after, SOFTWARE, action, vcpu.id, lr, vcpu.serial[lr])

    def deactivate(self, q: Irq) -> None:
        """The physical interrupt goes from active to inactive (G6)."""
        raise NotImplementedError

    # -- G1 inject ---------------------------------------------------------------------------------------

    def inject(self, v: int, q: Irq) -> None:
        """G1: vgic_vcpu_inject_irq, gic_raise_inflight_irq."""
        self.queue(q)
        if q.inflight_on != NO_LR:
            if q.lr_pending_on == NO_LR and v == self.here:
                self.sync_named(v, q)
        else:
            q.inflight_on = v
            enqueue(self.vcpus[v].inflight, q)
            if q.enabled:
                self.raise_irq(v, q)
        self.kick(v, KICK_NEW)

    def queue(self, q: Irq) -> None:
        """vgic_vcpu_inject_irq: QUEUED := 1."""
        self.emit(INJECT, self.pcpu(), q.target, q.obj)
        self.set_queued(q)

    def set_queued(self, q: Irq) -> None:
        """QUEUED := 1."""
        if not q.queued:
            q.queued = 1
            q.queued_since = self.now

    def raise_irq(self, v: int, q: Irq) -> None:
        """gic_raise_guest_irq: into a free list register if `v` executes here and nobody waits, else lr_pending."""
        vcpu = self.vcpus[v]
        lr = vcpu.free_lr()
        if v == self.here and not vcpu.lr_pending and lr >= 0:
            self.load_lr(vcpu, lr, q)
        else:
            q.lr_pending_on = v
            enqueue(vcpu.lr_pending, q)

    def kick(self, v: int, purpose: int) -> None:
        """smp_send_event_check_mask, when `v` runs elsewhere."""
        vcpu = self.vcpus[v]
        if v != self.here and vcpu.running_on >= 0:
            self.sgis[purpose] += 1
            vcpu.kicks += 1
            self.emit(KICK, self.pcpu(), NONE, NONE, vcpu.running_on)
            self.agenda.at(self.now + self.sgi_ns, SOFTWARE, SGI, vcpu.running_on, v)

    def pcpu(self) -> int:
        """The pcpu that executes the hypervisor now."""
        return self.vcpus[self.here].running_on if self.here >= 0 else NONE

    # -- G2 load -----------------------------------------------------------------------------------------

    def load_lr(self, vcpu: Vcpu, lr: int, q: Irq) -> None:
        """G2: gic_set_lr. Pending, tied to the physical interrupt."""
        vcpu.lrs.write(lr, lr_word(q.obj, PENDING, q.priority, physical=q.obj))
        vcpu.owner[lr] = q
        vcpu.loaded[lr] = self.now
        vcpu.loaded_seq[lr] = self.seq
        q.lr = lr
        q.soft = False
        self.dequeued(q)
        self.emit(LR_WRITE, vcpu.running_on, vcpu.id, q.obj, lr, vcpu.lrs.words[lr])
        self.guest_will(ACK, vcpu, lr, self.ack_ns)
        self.monitor.loaded(q, vcpu)

    def dequeued(self, q: Irq) -> None:
        """QUEUED := 0."""
        if q.queued:
            q.queued = 0
            self.monitor.queued_ns += self.now - q.queued_since

    # -- G3 sync one list register -----------------------------------------------------------------------

    def sync_named(self, v: int, q: Irq) -> None:
        """G3 on the index that an interrupt names. Wrong when that index is another vcpu's: nothing is changed."""
        if q.lr == NO_LR:
            return
        if q.inflight_on != v:
            self.monitor.foreign_access(q, v, q.inflight_on, self.vcpus[v].running_on)
        else:
            self.sync_lr(self.vcpus[v], q.lr)

    def sync_lr(self, vcpu: Vcpu, lr: int) -> None:
        """G3: gic_update_one_lr."""
        q = vcpu.owner[lr]
        if q is None:
            return
        state = vcpu.lrs.state(lr)
        if state == INVALID:
            self.free_lr(vcpu, lr, q)
            if q.enabled and q.queued and not q.migrating:
                self.raise_irq(vcpu.id, q)
            else:
                self.leave_inflight(q)
                if q.migrating:
                    self.policy.on_finish(self, q, vcpu.id)
            self.monitor.check(q)
            return
        if state == ACTIVE:
            if q.queued:
                self.monitor.hw_pending_active(q, vcpu.id)
        else:
            self.dequeued(q)
        if q.edit:
            self.edit_lr(vcpu, lr, q)

    def free_lr(self, vcpu: Vcpu, lr: int, q: Irq) -> None:
        """The list register is empty (invalid already, or about to be loaded); the interrupt is no longer VISIBLE."""
        self.monitor.cleared(q, vcpu, lr)
        vcpu.owner[lr] = None
        vcpu.serial[lr] += 1
        vcpu.invalid_since[lr] = NIL
        q.lr = NO_LR
        self.emit(LR_CLEAR, vcpu.running_on, vcpu.id, q.obj, lr)

    def leave_inflight(self, q: Irq) -> None:
        """list_del_init of the inflight node."""
        if q.inflight_on != NO_LR:
            self.vcpus[q.inflight_on].inflight.remove(q)
            q.inflight_on = NO_LR

    def leave_lr_pending(self, q: Irq) -> None:
        """gic_remove_from_queues."""
        if q.lr_pending_on != NO_LR:
            self.vcpus[q.lr_pending_on].lr_pending.remove(q)
            q.lr_pending_on = NO_LR

    # -- G4 hypervisor entry and exit --------------------------------------------------------------------

    def enter(self, v: int) -> int:
        """G4: gic_clear_lrs on entry from the guest. Returns what `leave` has to restore."""
        outer = self.here
        self.here = v
        self.hyp_entries += 1
        if v >= 0:
            vcpu = self.vcpus[v]
            self.emit(HYP_ENTRY, vcpu.running_on, v, NONE)
            for lr in range(self.nr_lrs):
                self.sync_lr(vcpu, lr)
        return outer

    def leave(self, v: int, outer: int) -> None:
        """G4: gic_inject on the way back to the guest."""
        if v >= 0:
            self.refill(self.vcpus[v])
            self.emit(HYP_EXIT, self.vcpus[v].running_on, v, NONE)
        self.here = outer

    def refill(self, vcpu: Vcpu) -> None:
        """G4: gic_restore_pending_irqs. A pending list register of lower priority makes room."""
        while vcpu.lr_pending:
            q = vcpu.lr_pending[0]
            lr = vcpu.free_lr()
            if lr < 0:
                victim = self.victim(vcpu, q)
                if victim is None:
                    return
                lr = self.evict(vcpu, victim)
            self.leave_lr_pending(q)
            self.load_lr(vcpu, lr, q)

    def victim(self, vcpu: Vcpu, q: Irq) -> Irq | None:
        """The interrupt of lowest priority, below that of `q`, that is loaded and not yet taken by the guest."""
        for other in reversed(vcpu.inflight):
            if other.priority <= q.priority:
                return None
            if other.lr != NO_LR and vcpu.lrs.state(other.lr) == PENDING:
                return other
        return None

    def evict(self, vcpu: Vcpu, q: Irq) -> int:
        """Take a pending interrupt out of its list register. One that migrates need not come back: it moves now."""
        lr = q.lr
        self.free_lr(vcpu, lr, q)
        self.set_queued(q)
        if q.migrating:
            q.soft = False
            self.leave_inflight(q)
            self.policy.on_finish(self, q, vcpu.id)
        else:
            q.lr_pending_on = vcpu.id
            enqueue(vcpu.lr_pending, q)
        self.monitor.check(q)
        return lr

    # -- what a policy may do ----------------------------------------------------------------------------

    def move_affinity(self, q: Irq) -> None:
        pcpu = self.vcpus[q.target].running_on
        if pcpu >= 0 and pcpu != q.p_affinity:
            self.emit(AFFINITY, self.pcpu(), NONE, q.obj, pcpu, q.p_affinity)
            q.p_affinity = pcpu

    def move_queued(self, q: Irq) -> None:
        if q.inflight_on != NO_LR:
            self.leave_lr_pending(q)
            self.leave_inflight(q)
            self.dequeued(q)
            self.inject(q.target, q)

    def kick_old(self, q: Irq) -> None:
        self.kick(q.migrate_from, KICK_OLD)

    def hand_over(self, q: Irq) -> None:
        if q.queued and q.inflight_on == NO_LR:
            self.monitor.lock_drops += 1
            self.inject(q.target, q)

    def request_edit(self, q: Irq) -> None:
        """At once if the registers are here or saved in memory, else by an SGI to the pcpu that has them."""
        old = self.vcpus[q.inflight_on]
        if old.id == self.here or old.running_on < 0:
            self.edit_lr(old, q.lr, q)
        else:
            q.edit = True
            self.kick(old.id, KICK_EDIT)

    def edit_lr(self, vcpu: Vcpu, lr: int, q: Irq) -> None:
        """HW=0, EOI=1; bits 19:10 stop being the physical id. The guest has not written EOIR: G3 was here before."""
        q.edit = False
        vcpu.lrs.write(lr, vcpu.lrs.words[lr] & ~(LR_HW | _PHYSICAL) | LR_EOI)
        q.soft = True
        self.emit(LR_WRITE, vcpu.running_on, vcpu.id, q.obj, lr, vcpu.lrs.words[lr])

    def deactivate_for_guest(self, q: Irq) -> None:
        if q.soft:
            self.emit(DEACTIVATE, self.pcpu(), NONE, q.obj)
            self.deactivate(q)
