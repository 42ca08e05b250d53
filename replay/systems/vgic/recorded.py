"""A recorded virtual GIC: state is what the recording shows, and unknown where it shows nothing (spec 0.3, 0.5).

Nothing is predicted here: list registers, kicks, deactivations come from the recording, and the same monitor judges
them. The policy is asked only what a write to ITARGETSR means (taken, refused, MIGRATING).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from replay.declare import Config
from replay.events import NIL, NONE
from replay.hardware.gic_list_registers import (
    ACTIVE,
    BOTH,
    INVALID,
    LR_EOI,
    LR_HW,
    NO_LR,
    PENDING,
    lr_state,
    lr_word,
)
from replay.knowledge import UNKNOWN
from replay.sink import Sink
from replay.systems.vgic.base import VgicBase
from replay.systems.vgic.state import NOWHERE_KNOWN, Irq, Vcpu

if TYPE_CHECKING:
    from replay.systems.vgic.policies import Policy

__all__ = ["RecordedVgic"]

MAX_LRS: Final = 64
#: Rows of the table of moves; a guest that rotates affinities all day would fill memory.
MAX_MOVES: Final = 10_000


class RecordedVgic(VgicBase):
    """Open runs. Accepts stimuli, responses and outcomes of spec S3.2."""

    def __init__(self, policy: Policy, config: Config, sink: Sink) -> None:
        super().__init__(config, sink)
        self.policy: Policy = policy
        self.lost: bool = False
        self.sgis: int = 0
        self.hyp_entries: int = 0
        self.maintenance_irqs: int = 0
        self.moves: list[dict[str, int | str | None]] = []  # writes to ITARGETSR, for `extra`
        self.moving: dict[int, dict[str, int | str | None]] = {}  # by interrupt, until the new vcpu takes it

    def knows_start(self) -> bool:
        """Only in a recording that begins with the system and has lost nothing so far (U1, U2)."""
        return self.from_boot and not self.lost

    def home(self, dom: int, number: int) -> int:
        """Complete recordings start with vcpu i on pcpu i, like scenarios; else the scheduler's records tell."""
        return number if dom <= 0 and self.knows_start() else NOWHERE_KNOWN

    def holder(self, q: Irq, v: int) -> int:
        """List register of `v` that is known to hold `q`, else -1."""
        if q.inflight_on == v and q.lr >= 0 and self.vcpus[v].owner[q.lr] is q:
            return q.lr
        return NO_LR

    # -- physical side -----------------------------------------------------------------------------------

    def phys_irq(self, q: Irq) -> None:
        """G6. An edge proves that the interrupt is active or latched afterwards."""
        self.monitor.edges += 1
        if q.p_active == 0:
            q.p_active = 1
            q.raised_at = self.now
            self.monitor.arrived(q)
        elif q.p_active == 1:
            if q.p_latch == 1:
                self.monitor.coalesced += 1
            q.p_latch = 1
        else:
            q.p_active = 1
            q.p_latch = UNKNOWN
        self.monitor.check(q)

    def physically_done(self, q: Irq) -> None:
        """G6: deactivated; a latched edge makes it active again. That arrival counts when it is injected."""
        q.p_active = q.p_latch
        if q.p_latch == 1:
            q.raised_at = self.now
        q.p_latch = 0

    def deactivated(self, q: Irq) -> None:
        if q.p_active != 0:
            self.physically_done(q)
        self.monitor.check(q)

    def affinity_changed(self, q: Irq, cpu: int) -> None:
        q.p_affinity = cpu
        self.check_affinity(q)

    # -- distributor writes ------------------------------------------------------------------------------

    def itargets(self, q: Irq, writer: int, new: int) -> None:
        """W1, W2. Whether a write took effect may depend on MIGRATING: unknown there, unknown afterwards."""
        self.monitor.itargets_writes += 1
        if new == q.target:
            return
        if q.migrating == UNKNOWN or q.lr == NOWHERE_KNOWN:
            q.target = NONE
            q.migrating = UNKNOWN
            q.mismatch_since = NIL
        else:
            self.note_move(q, writer, new)
            self.policy.on_itargets(self, q, writer, new)

    def note_move(self, q: Irq, writer: int, new: int) -> None:
        """A row of `extra["vgic_moves"]`: when the guest moved it, in which state, when that was done."""
        states = ("empty, not noticed yet", "pending", "active", "pending and active")
        row: dict[str, int | str | None] = {
            "t_ns": self.now, "irq": q.obj, "writer": writer, "from": q.target if q.target >= 0 else None, "to": new,
            "list_register": states[self.vcpus[q.inflight_on].lrs.state(q.lr)] if q.lr >= 0 else "none",
            "physical": {0: "idle", 1: "active"}.get(q.p_active, "unknown"),
            "completed_ns": None, "next_ack_ns": None,
        }  # fmt: skip
        self.moving[q.id] = row
        if len(self.moves) < MAX_MOVES:
            self.moves.append(row)

    def end_migration(self, q: Irq) -> None:
        row = self.moving.get(q.id)
        if row is not None:
            row["completed_ns"] = self.now
        super().end_migration(q)

    def enable(self, q: Irq, v: int) -> None:
        q.enabled = 1
        self.monitor.check(q)

    def disable(self, q: Irq) -> None:
        q.enabled = 0
        self.monitor.check(q)

    # -- hypervisor --------------------------------------------------------------------------------------

    def hyp_entry(self, v: int) -> None:
        """G4: whoever wanted to interrupt this vcpu has done so."""
        self.hyp_entries += 1
        self.vcpus[v].kicks = 0

    def kick_sent(self, cpu: int, tgt: int) -> None:
        """G1 kick. With an unknown placement any vcpu may be the one that was kicked."""
        self.sgis += 1
        v = self.current.get(tgt, NONE)
        for vcpu in self.vcpus:
            if vcpu.id == v:
                vcpu.kicks = 1
            elif vcpu.running_on == NOWHERE_KNOWN:
                vcpu.kicks = UNKNOWN
            else:
                continue
            for q in vcpu.owner:
                if q is not None:
                    self.monitor.check(q)

    def maintenance_taken(self, cpu: int, misr: int) -> None:
        if misr == NIL or misr & 1:
            self.maintenance_irqs += 1
        if misr == 0:
            self.monitor.unneeded(cpu, self.current.get(cpu, NONE))

    def injected(self, v: int, q: Irq) -> None:
        """G1: QUEUED. Whether it went to lr_pending is not recorded; it does not matter if it has a list register."""
        if q.queued != 1:
            q.queued = 1
            q.queued_since = self.now
        if q.migrating == 1:
            q.disturbed = True
        if q.waiting_since == NIL and q.enabled == 1:
            self.monitor.arrived(q)
        q.lr_pending_on = NOWHERE_KNOWN
        self.monitor.check(q)

    def lr_written(self, v: int, cpu: int, q: Irq, lr: int, word: int) -> None:
        """G2, or the edit of a live list register. `word` NIL: contents not recorded."""
        vcpu = self.vcpus[v]
        lr = self.holder(q, v) if lr < 0 else lr
        if not 0 <= lr < MAX_LRS:
            return
        vcpu.grow(lr)
        if word != NIL and lr_state(word) == INVALID:
            self.lr_cleared(v, cpu, q, lr)
            return
        self.executed_on(vcpu, cpu, q, lr)
        if word == NIL:
            word = lr_word(q.obj, PENDING, q.priority)
        elif word & LR_HW and lr_state(word) == BOTH:
            self.monitor.hw_pending_active(q, v)
        old = vcpu.owner[lr]
        live = old is q and vcpu.lrs.state(lr) != INVALID
        if old is not None and old is not q:
            self.displaced(old)
        vcpu.owner[lr] = q
        vcpu.lrs.write(lr, word)
        if live:
            if not self.sees("vgic.eoi"):
                vcpu.loaded[lr] = NIL  # an edit, or the next instance after an EOI that nobody saw
        else:
            self.load_seen(vcpu, lr, q, word)
        self.monitor.check(q)

    def load_seen(self, vcpu: Vcpu, lr: int, q: Irq, word: int) -> None:
        """U4: what the load of a list register proves."""
        fresh = lr_state(word) == PENDING
        vcpu.loaded[lr] = self.now if fresh else NIL
        vcpu.loaded_seq[lr] = self.seq
        vcpu.invalid_since[lr] = NIL
        q.lr = lr
        q.inflight_on = vcpu.id
        if q.queued == 1:
            self.monitor.queued_ns += self.now - q.queued_since
            if q.enabled == UNKNOWN:
                q.enabled = 1
        q.queued = 0
        if q.migrating == UNKNOWN and fresh:
            q.migrating = 0
        if word & LR_HW and q.p_active != 1:
            q.p_active = 1
            q.p_latch = UNKNOWN
        self.monitor.loaded(q, vcpu)

    def lr_cleared(self, v: int, cpu: int, q: Irq, lr: int) -> None:
        """G3 found it invalid: not VISIBLE, not ACTIVE, and a migration of it is finished."""
        vcpu = self.vcpus[v]
        lr = self.holder(q, v) if lr < 0 else lr
        if lr >= MAX_LRS:
            return
        if self.executed_on(vcpu, cpu, q, lr):
            return  # what was cleared is a register of another vcpu
        if lr >= 0:
            vcpu.grow(lr)
            old = vcpu.owner[lr]
            if old is q:
                self.monitor.cleared(q, vcpu, lr)
                if vcpu.lrs.state(lr) != INVALID:  # the guest's EOI was not recorded
                    self.forget_physical(q)
            elif old is not None:
                self.displaced(old)
            vcpu.owner[lr] = None
            vcpu.invalid_since[lr] = NIL
        q.lr = NO_LR
        q.inflight_on = NO_LR if q.queued == 0 else NOWHERE_KNOWN
        q.lr_pending_on = NO_LR if q.queued == 0 else NOWHERE_KNOWN
        if q.migrating == 1:
            self.end_migration(q)
        elif q.migrating == UNKNOWN:
            q.migrating = 0
        self.monitor.check(q)

    def displaced(self, q: Irq) -> None:
        """Another interrupt sits in its list register: evicted, or cleared without a record."""
        q.lr = NO_LR
        q.inflight_on = NOWHERE_KNOWN
        q.queued = UNKNOWN
        q.migrating = UNKNOWN
        self.forget_physical(q)
        self.monitor.check(q)

    def forget_physical(self, q: Irq) -> None:
        """The physical state is not known any more."""
        q.p_active = UNKNOWN
        q.p_latch = UNKNOWN
        q.raised_at = NIL

    def executed_on(self, vcpu: Vcpu, cpu: int, q: Irq, lr: int) -> bool:
        """vgic-lr-foreign-access, True if it is one; where the scheduler is not recorded, the access tells where the
        vcpu runs."""
        if cpu < 0 or vcpu.running_on == NONE:
            return False
        if not self.sees("sched.run") or vcpu.running_on == NOWHERE_KNOWN:
            vcpu.running_on = cpu
            self.current[cpu] = vcpu.id
        elif vcpu.running_on != cpu:
            executing = self.current.get(cpu, NONE)
            if executing >= 0 and executing != vcpu.id:
                q.lr, held = lr, q.lr
                self.monitor.foreign_access(q, executing, vcpu.id, cpu)
                q.lr = held
                return True
        return False

    # -- guest -------------------------------------------------------------------------------------------

    def acked(self, v: int, q: Irq) -> None:
        """G5. The interrupt was in a list register of `v`."""
        row = self.moving.get(q.id)
        if row is not None and row["to"] == v:
            row["next_ack_ns"] = self.now
            del self.moving[q.id]
        lr = self.holder(q, v)
        if lr >= 0:
            vcpu = self.vcpus[v]
            vcpu.lrs.set_state(lr, ACTIVE)
            self.monitor.acked(q, v, vcpu.loaded[lr], vcpu.loaded_seq[lr])
            return
        if q.lr >= 0 or q.inflight_on == NO_LR:  # not where it was thought to be
            self.displaced(q)
        q.lr = NOWHERE_KNOWN
        q.inflight_on = v
        self.monitor.acked(q, v, NIL, NONE)

    def ended(self, v: int, q: Irq) -> None:
        """G5. Deactivates with HW=1; with HW=0 and EOI=1 the hypervisor will; otherwise nobody knows."""
        lr = self.holder(q, v)
        word = 0
        if lr >= 0:
            vcpu = self.vcpus[v]
            word = vcpu.lrs.words[lr]
            vcpu.lrs.set_state(lr, PENDING if lr_state(word) == BOTH else INVALID)
            vcpu.invalid_since[lr] = self.now
        if word & LR_HW:
            if q.p_active != 0:
                self.physically_done(q)
        elif not word & LR_EOI:
            self.forget_physical(q)
        self.monitor.check(q)

    # -- scheduler, lost records, end --------------------------------------------------------------------

    def run(self, cpu: int, v: int) -> None:
        self.current[cpu] = v
        self.vcpus[v].running_on = cpu
        self.vcpus[v].kicks = 0
        for q in self.irqs:
            if q.target == v:
                self.check_affinity(q)

    def stop(self, cpu: int, v: int) -> None:
        self.vcpus[v].running_on = NONE
        if self.current.get(cpu, NONE) == v:
            del self.current[cpu]

    def taint(self, cpu: int, t0: int, t1: int) -> None:
        """U2. Any cpu can have changed any interrupt; list registers are forgotten where they can have been."""
        self.lost = True
        for q in self.irqs:
            q.reset(known=False)
        for vcpu in self.vcpus:
            if cpu < 0 or vcpu.running_on in (cpu, NOWHERE_KNOWN, NONE):
                vcpu.running_on = NOWHERE_KNOWN
            vcpu.kicks = UNKNOWN
            for lr in range(len(vcpu.owner)):
                vcpu.owner[lr] = None
                vcpu.invalid_since[lr] = NIL
        self.current = {cpu: v for cpu, v in self.current.items() if self.vcpus[v].running_on == cpu}

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        self.seq = NONE
        self.monitor.time_out(action, self.irqs[a], c)

    def conclude(self, t_end: int) -> None:
        if self.moves:
            self.extra["vgic_moves"] = self.moves
        for q in self.irqs:
            self.monitor.concluded(q)

    def metrics(self) -> dict[str, int]:
        """What was recorded; the predicted numbers of a closed run have the same names."""
        return {
            "sgis": self.sgis,
            "maintenance_irqs": self.maintenance_irqs,
            "hyp_entries": self.hyp_entries,
            **self.monitor.metrics(),
        }
