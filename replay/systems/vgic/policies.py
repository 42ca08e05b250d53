"""Policies of the virtual GIC: what happens to an interrupt whose target changes while it is in flight (spec S3.4).

A policy is four hooks; everything it may do is a method of `VgicMachine`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replay.hardware.gic_list_registers import NO_LR
from replay.systems.vgic.state import Irq

if TYPE_CHECKING:
    from replay.systems.vgic.base import VgicBase

__all__ = ["Maintenance", "Merged", "Merged2017", "Naive", "PatchV8", "Policy"]


class Policy:
    """Hooks with the behaviour that all policies share. `q` is the interrupt, `v` a vcpu."""

    name = ""

    def on_itargets(self, m: VgicBase, q: Irq, writer: int, new: int) -> None:
        """The guest wrote another target than the present one; `writer` has entered the hypervisor (W1, W2)."""
        m.set_target(q, new)

    def on_arrival(self, m: VgicBase, q: Irq, pcpu: int) -> None:
        """A physical interrupt was taken on `pcpu`, whose vcpu has entered the hypervisor (P1)."""
        m.inject(q.target, q)

    def on_finish(self, m: VgicBase, q: Irq, v: int) -> None:
        """`v` has let go of an interrupt that is MIGRATING (F1)."""
        m.end_migration(q)

    def on_maintenance(self, m: VgicBase, v: int) -> None:
        """EOI maintenance interrupt on `v`, after G3 of its entry, which has called `on_finish` (M1)."""


class Naive(Policy):
    """vgic_store_itargetsr before the series: the write changes the target, nothing else moves."""

    name = "naive"

    def on_itargets(self, m: VgicBase, q: Irq, writer: int, new: int) -> None:
        super().on_itargets(m, q, writer, new)
        if m.phys_immediate:
            m.move_affinity(q)


class PatchV8(Policy):
    """[PATCH v8 03/10] xen/arm: inflight irqs during migration. Flag, kick the old vcpu, let it hand over."""

    name = "patch-v8"

    def on_itargets(self, m: VgicBase, q: Irq, writer: int, new: int) -> None:
        """W1: move what is not in a list register at once, else set MIGRATING. W2: later writes only retarget."""
        m.set_target(q, new)
        if q.migrating:
            return
        if q.lr != NO_LR:
            m.begin_migration(q)
            if m.phys_immediate:
                m.move_affinity(q)
        else:
            m.move_affinity(q)
            m.move_queued(q)

    def on_arrival(self, m: VgicBase, q: Irq, pcpu: int) -> None:
        """P1: an interrupt that arrives meanwhile is noted, and the old vcpu interrupted so that it lets go."""
        if q.migrating:
            m.queue(q)
            m.kick_old(q)
        else:
            m.inject(q.target, q)

    def on_finish(self, m: VgicBase, q: Irq, v: int) -> None:
        """F1: drop the old vcpu's lock, inject into the new one: normally a second SGI."""
        m.end_migration(q)
        if m.phys_immediate:
            m.move_affinity(q)
        m.hand_over(q)


class Merged(Policy):
    """Xen 6e42345c5c and 5bd62a757b: the physical affinity moves only when the old vcpu has let go.

    The second physical interrupt therefore interrupts the old vcpu by itself.
    """

    name = "merged"

    def on_itargets(self, m: VgicBase, q: Irq, writer: int, new: int) -> None:
        """vgic_migrate_irq."""
        m.set_target(q, new)
        if q.migrating:
            return
        if q.lr != NO_LR:
            m.begin_migration(q)
        else:
            m.move_affinity(q)
            m.move_queued(q)

    def on_finish(self, m: VgicBase, q: Irq, v: int) -> None:
        """gic_update_one_lr: irq_set_affinity to the pcpu of the target of that moment."""
        m.end_migration(q)
        m.move_affinity(q)
        m.hand_over(q)


class Merged2017(Merged):
    """Xen 31bc6a93a0 and 91ef736493: one migration at a time; a write meanwhile is ignored."""

    name = "merged-2017"

    def on_itargets(self, m: VgicBase, q: Irq, writer: int, new: int) -> None:
        """vgic_store_itargetsr keeps the old value where vgic_migrate_irq refuses."""
        if q.migrating:
            m.refuse(q, writer, new)
        else:
            super().on_itargets(m, q, writer, new)


class Maintenance(Merged):
    """Campbell's proposal: let the guest's EOI raise a maintenance interrupt, and complete the move there."""

    name = "maintenance"

    def on_itargets(self, m: VgicBase, q: Irq, writer: int, new: int) -> None:
        """W1, with the live list register edited to HW=0, EOI=1; any number of writes, only the last counts."""
        moving = q.migrating
        super().on_itargets(m, q, writer, new)
        if q.migrating and not moving:
            m.request_edit(q)

    def on_finish(self, m: VgicBase, q: Irq, v: int) -> None:
        """M1: affinity to the current target, deactivate what the guest's EOI no longer did, inject if QUEUED."""
        m.end_migration(q)
        m.move_affinity(q)
        queued = q.queued
        m.deactivate_for_guest(q)
        if queued:
            m.hand_over(q)
