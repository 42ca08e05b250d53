"""The virtual GIC, what-if on a recording: edges are taken, and the guest acts, when it did (spec 0.6, S3.7)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from replay.agenda import HARDWARE
from replay.bodies import Bodies
from replay.declare import Config
from replay.events import NIL, NONE
from replay.sink import Sink
from replay.systems.vgic.base import ACK, EOI, PHYS_IRQ
from replay.systems.vgic.calibration import ACK as ACK_OFFSET
from replay.systems.vgic.calibration import EOI as EOI_OFFSET
from replay.systems.vgic.machine import VgicMachine
from replay.systems.vgic.state import Irq, Vcpu

if TYPE_CHECKING:
    from replay.systems.vgic.policies import Policy

__all__ = ["RetimedVgic"]

#: Agenda: a core takes interrupt a, whose edge was event b.
TAKE: Final = -1


class RetimedVgic(VgicMachine):
    """Closed runs with the lags and bodies of a recording."""

    def __init__(self, policy: Policy, config: Config, sink: Sink) -> None:
        super().__init__(policy, config, sink)
        self.bodies: Bodies = Bodies(2)
        self.pending: set[int] = set()  # interrupts of which an edge is on its way to a core
        self.latched: dict[int, int] = {}  # edges latched behind an active one
        self.cause: dict[int, int] = {}  # the edge that is being handled
        self.eoi_after: dict[int, int] = {}

    def load(self, init: Mapping[str, Any]) -> None:
        """`targets`: the vcpu that each interrupt goes to at first."""
        if self.measured is not None and self.measured.bodies is not None:
            self.bodies = self.measured.bodies
        for obj, vcpu in init.get("targets", {}).items():
            q = self.irq(NONE, int(obj))
            q.target = self.place(NONE, int(vcpu))
            q.p_affinity = self.vcpus[q.target].running_on

    # -- G6: from the device to a core -------------------------------------------------------------------

    def phys_irq(self, q: Irq) -> None:
        """An edge is pending in the distributor until a core takes it; another one meanwhile has no lag: it coalesces.
        A core takes before anything else of the same moment happens, so only one is ever on its way."""
        due = self.measured.lags.of(self.seq) if self.measured is not None and self.measured.lags is not None else NIL
        if due == NIL and self.measured is not None and self.measured.aids:
            # No core took it: it coalesced with one that was taken, or was pending to the end.
            self.emit(PHYS_IRQ, NONE, NONE, q.obj)
            self.monitor.edges += 1
            self.monitor.coalesced += q.id in self.pending or q.p_active == 1
            return
        if q.p_active or due <= self.now:
            self.cause[q.id], before = self.seq, self.cause.get(q.id, NONE)
            if q.p_active:
                self.latched[q.id] = self.seq
                self.cause[q.id] = before
            super().phys_irq(q)
            return
        self.emit(PHYS_IRQ, NONE, NONE, q.obj)
        self.monitor.edges += 1
        self.pending.add(q.id)
        self.agenda.at(due, HARDWARE, TAKE, q.id, self.seq)

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        if action != TAKE:
            super().fire(action, a, b, c)
            return
        self.seq = NONE
        q = self.irqs[a]
        self.pending.discard(q.id)
        self.cause[q.id] = b
        self.arrive(q)

    def deactivate(self, q: Irq) -> None:
        """The latched edge, if any, is the next one that is handled."""
        if q.p_latch:
            self.cause[q.id] = self.latched.pop(q.id, NONE)
        super().deactivate(q)

    # -- G5: the guest -----------------------------------------------------------------------------------

    def guest_will(self, action: int, vcpu: Vcpu, lr: int, after: int) -> None:
        """IAR and EOIR at the recorded offsets (C2); medians for what the recording does not have (C3)."""
        q = vcpu.owner[lr]
        if q is not None and action == ACK:
            seq = self.cause.get(q.id, NONE)
            taken = self.bodies.take(q.obj, seq, seq) if seq >= 0 else ()
            body = taken[0] if taken else self.bodies.substitute(q.obj)
            after = self.ack_ns if body is None else body[ACK_OFFSET]
            self.eoi_after[q.id] = self.eoi_ns if body is None else body[EOI_OFFSET]
        elif q is not None and action == EOI:
            after = self.eoi_after.get(q.id, after)
        super().guest_will(action, vcpu, lr, max(after, 0))
