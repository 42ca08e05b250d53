"""Linux irq flow: what a flow function does around the handler (spec S4.4).

A policy differs from the others only in its hooks: `gate`, `flow_enter`, `flow_end`, `on_set_affinity`, and
`on_inprogress`/`on_eoi`, the parts of the flow that recordings show by themselves.
"""

from __future__ import annotations

from typing import ClassVar, Final

from replay.systems.irq_flow.machine import IrqFlowMachine
from replay.systems.irq_flow.state import EOI_PENDING, EXPLICIT, NOWHERE, TEMPORARY, IrqRecord

__all__ = ["POLICIES", "Edge", "Fasteoi", "FasteoiNaive", "LateEoi", "Level", "Percpu", "Policy"]


class Policy:
    """Strategy of the irq flow; subclass it for `--policy ./mine.py:MyPolicy`."""

    name: ClassVar[str] = ""
    has_end_hook: ClassVar[bool] = False  # end or eoi is called after the handler
    unmasks_early: ClassVar[bool] = False  # the move in ack unmasks a port that the flow had masked
    owes_eoi: ClassVar[bool] = False
    serialised: ClassVar[bool] = False  # flows of one cpu run one after the other

    def gate(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> bool:
        """Whether the upcall loop enters the flow at all."""
        return True

    def flow_enter(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """The flow function up to the start of the handler; atomic for this irq (desc lock)."""
        raise NotImplementedError

    def flow_end(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """The flow function from the end of the handler on."""
        raise NotImplementedError

    def on_inprogress(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """The flow acknowledged the event and found the handler running elsewhere."""
        machine.drop(irq, cpu)

    def on_eoi(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """A recorded eoi."""

    def on_set_affinity(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Historic chips: the move waits for the next ack or eoi (IRQ_MOVE_PENDING)."""
        machine.defer_move(irq, cpu)


def rebind_masked(machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
    """Rebind under the mask reason TEMPORARY (Linux xen_rebind_evtchn_to_cpu)."""
    machine.mask(irq, TEMPORARY)
    machine.bind(irq, cpu)
    machine.unmask(irq, TEMPORARY, cpu)


class Level(Policy):
    """Linux 2.6.36-rc2, handle_level_irq on xen_dynamic_chip."""

    name = "level"
    unmasks_early = True

    def flow_enter(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Mask, ack; a running handler is left alone and nothing is remembered."""
        machine.mask(irq, EXPLICIT)
        machine.ack(irq, cpu)
        if irq.inprogress != NOWHERE:
            self.on_inprogress(machine, irq, cpu)
        elif irq.disabled != 1:
            irq.inprogress = cpu
            machine.begin(irq, cpu)

    def flow_end(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Unmask unless disabled."""
        irq.inprogress = NOWHERE
        if irq.disabled != 1:
            machine.unmask(irq, EXPLICIT, cpu)


class Percpu(Policy):
    """handle_percpu_irq, for IPIs and per-cpu VIRQs: no lock, no INPROGRESS, no affinity."""

    name = "percpu"
    serialised = True

    def flow_enter(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Ack, handler."""
        machine.ack(irq, cpu)
        machine.begin(irq, cpu)

    def flow_end(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Nothing: the port was never masked."""

    def on_inprogress(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """There is no INPROGRESS."""

    def on_set_affinity(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Refused: xen_percpu_chip has no set_affinity."""
        machine.refuse_move(irq, cpu)


class Edge(Policy):
    """handle_edge_irq, as merged for 2.6.36. Per-cpu irqs get the percpu flow."""

    name = "edge"

    def __init__(self) -> None:
        self.percpu = Percpu()

    def flow_enter(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """A running handler or a disabled irq: remember, mask, ack. Else ack and run; the port stays unmasked."""
        if machine.has_percpu_flow(irq):
            self.percpu.flow_enter(machine, irq, cpu)
        elif irq.inprogress != NOWHERE or irq.disabled == 1:
            machine.mask(irq, EXPLICIT)
            machine.ack(irq, cpu)
            self.on_inprogress(machine, irq, cpu)
        else:
            machine.ack(irq, cpu)
            irq.inprogress = cpu
            self.run(machine, irq, cpu)

    def run(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """One turn of the handler loop."""
        if irq.irqs_pending == 1 and irq.disabled != 1:  # masked when the edge was remembered
            machine.unmask(irq, EXPLICIT, cpu)
        irq.irqs_pending = 0
        machine.begin(irq, cpu)

    def flow_end(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Run again while an edge came meanwhile."""
        if not machine.has_percpu_flow(irq):
            self.leave(machine, irq, cpu)

    def leave(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Bottom of the handler loop."""
        if irq.irqs_pending == 1 and irq.disabled != 1:
            machine.reruns += 1
            self.run(machine, irq, cpu)
        else:
            irq.inprogress = NOWHERE

    def on_inprogress(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """The edge is remembered in irqs_pending (IRQS_PENDING)."""
        if machine.has_percpu_flow(irq):
            return
        irq.irqs_pending = 1
        if irq.inprogress != NOWHERE:
            machine.pended_inprogress += 1

    def on_set_affinity(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Deferred, at once on chips that do so (move_at_once), or refused for a per-cpu irq."""
        if machine.has_percpu_flow(irq):
            self.percpu.on_set_affinity(machine, irq, cpu)
        elif machine.move_at_once:
            rebind_masked(machine, irq, cpu)
        else:
            machine.defer_move(irq, cpu)


class Fasteoi(Policy):
    """Beulich's choice, shape of the classic 2.6.18-xen evtchn.c: the upcall masks and clears, eoi unmasks."""

    name = "fasteoi"
    has_end_hook = True

    def flow_enter(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Masked from here to eoi, so the handler cannot be found running."""
        machine.mask(irq, EOI_PENDING)
        machine.clear(irq)
        irq.inprogress = cpu
        machine.begin(irq, cpu)

    def flow_end(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """eoi: move while still masked, then unmask once."""
        irq.inprogress = NOWHERE
        machine.move_masked(irq)
        machine.unmask(irq, EOI_PENDING, cpu)

    def on_inprogress(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """handle_fasteoi_irq leaves, and forgets the edge."""
        machine.drop(irq, cpu)

    def on_eoi(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """eoi drops the flow's own mask."""
        machine.unmask(irq, EOI_PENDING, cpu)


class FasteoiNaive(Policy):
    """What Fitzhardinge argues against: no ack before the handler, the pending bit is cleared at eoi."""

    name = "fasteoi-naive"
    has_end_hook = True

    def flow_enter(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Handler at once; a running one: eoi, which clears the bit."""
        if irq.inprogress != NOWHERE:
            machine.clear(irq)
        else:
            irq.inprogress = cpu
            machine.begin(irq, cpu)

    def flow_end(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """eoi: clear, then move."""
        irq.inprogress = NOWHERE
        machine.clear(irq)
        machine.move_masked(irq)

    def on_eoi(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """eoi clears the pending bit."""
        machine.clear(irq)


class LateEoi(Edge):
    """Linux events_base.c, interdomain channels of backends: masked until the driver says so."""

    name = "lateeoi"
    has_end_hook = True
    owes_eoi = True

    def gate(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> bool:
        """is_active: while the late EOI is owed the bit stays pending."""
        if irq.is_active == 1:
            machine.skip(irq, cpu)
            return False
        irq.is_active = 1
        return True

    def flow_enter(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """Mask reason EOI_PENDING, clear, then the edge flow."""
        machine.mask(irq, EOI_PENDING)
        machine.clear(irq)
        irq.eoi_owed = 1
        if irq.inprogress != NOWHERE or irq.disabled == 1:
            self.on_inprogress(machine, irq, cpu)
        else:
            irq.inprogress = cpu
            self.run(machine, irq, cpu)

    def flow_end(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """As edge; then the driver owes the late EOI, unless it came while the handler ran."""
        self.leave(machine, irq, cpu)
        if irq.inprogress == NOWHERE and irq.eoi_owed == 1:
            machine.expect_lateeoi(irq, cpu)

    def on_set_affinity(self, machine: IrqFlowMachine, irq: IrqRecord, cpu: int) -> None:
        """At once."""
        rebind_masked(machine, irq, cpu)


POLICIES: Final[dict[str, type[Policy]]] = {
    p.name: p for p in (Level, Edge, Fasteoi, FasteoiNaive, Percpu, LateEoi)
}
