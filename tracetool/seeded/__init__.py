"""Seeded bugs: for each of the five documents a small simulator makes a recording with the bug and one without.

The simulators know nothing of the models (they import neither systems nor hardware of `replay`), so that agreement
means something. `tracetool selftest --all` holds every rule against every bug.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from types import MappingProxyType
from typing import Any

from tracetool.seeded.engine import Recording

__all__ = ["BUGS", "Bug"]


@dataclass(frozen=True, slots=True)
class Bug:
    """One bug and its repair.

    The module of its name has `record(*, bad, seed)`; `bad` and `good` are the policies whose algorithms the simulator
    runs by itself. `verify` are the codes that must fire on the bad recording, `what_if` those that must fire when the
    bad policy is run on its stimuli; neither may fire under the good policy. `exact` are codes whose every occurrence
    the simulator knows; `counts` says which metric of a verify run is the number of which kind in the recording.
    """

    name: str
    document: str
    fault: str
    repair: str
    system: str
    bad: str
    good: str
    seed: int
    verify: tuple[str, ...]
    what_if: tuple[str, ...]
    exact: tuple[str, ...] = ()
    counts: tuple[tuple[str, str], ...] = ()
    sub: str = ""
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def record(self, *, bad: bool) -> Recording:
        """The recording with the bug or with its repair, of the same stimuli."""
        recording: Recording = import_module(f"tracetool.seeded.{self.name}").record(bad=bad, seed=self.seed)
        return recording


BUGS = (
    Bug(
        "hpet",
        document="Xen HPET improvement proposal, 2013",
        fault="fewer channels than CPUs, handed over through irq migration",
        repair="the owner's interrupt never moves, and wakes everybody who joined",
        system="hpet",
        bad="current",
        good="proposed",
        seed=4,
        verify=(
            "hpet-wrong-cpu", "hpet-affinity-stale", "hpet-nested-irq", "hpet-stack-depth", "hpet-late-wakeup",
            "hpet-missed-wakeup", "hpet-retarget",
        ),
        what_if=(
            "hpet-wrong-cpu", "hpet-affinity-stale", "hpet-nested-irq", "hpet-blocked-by-isr", "hpet-late-wakeup",
            "hpet-missed-wakeup", "hpet-spurious-irq",
        ),
        exact=("hpet-affinity-stale", "hpet-wrong-cpu", "hpet-nested-irq", "hpet-stack-depth"),
        counts=(("sleeps", "idle.enter"), ("hpet_irqs", "hpet.handler.begin")),
        config={"n_channels": 3, "n_cpus": 8},
    ),
    Bug(
        "mwait",
        document="Xen HPET improvement proposal, 2013: the race beside it",
        fault="the flag that elides the IPI lies outside the monitored word",
        repair="flag and softirq mask in the monitored word, one compare-exchange",
        system="hpet",
        bad="current",
        good="proposed",
        seed=1,
        verify=("mwait-lost-wakeup", "mwait-ipi-elided-unsafe"),
        what_if=("mwait-lost-wakeup",),
        exact=("mwait-lost-wakeup", "mwait-ipi-elided-unsafe"),
        sub="mwait",
    ),
    Bug(
        "callback",
        document="PV-on-HVM platform interrupt not properly cleared, 2008",
        fault="interrupt routed to vcpu1, but only vcpu0's entries let its line fall",
        repair="every EOI may let it fall",
        system="callback",
        bad="current",
        good="proposed",
        seed=1,
        verify=("via-stale-assert", "via-spurious-inject", "via-inject-storm"),
        what_if=("via-stale-assert", "via-spurious-inject", "via-inject-storm"),
        exact=("via-spurious-inject",),
        counts=(
            ("upcall_sets", "via.upcall_set"), ("injections", "via.inject"), ("vm_entries", "via.vmentry"),
            ("eoi_exits", "via.eoi"), ("callback_eois", "via.eoi"),
        ),
        config={"apic_id_stride": 2},
    ),
    Bug(
        "vgic",
        document="xen/arm: inflight irqs during migration, review of 2014",
        fault="ITARGETSR changes target and affinity while a list register of the old vcpu is in use",
        repair="the list register asks for a maintenance interrupt, which completes the move",
        system="vgic",
        bad="naive",
        good="maintenance",
        seed=1,
        verify=("vgic-delivered-old-target", "vgic-queued-stranded", "vgic-lr-foreign-access"),
        what_if=("vgic-delivered-old-target", "vgic-queued-stranded", "vgic-lr-foreign-access"),
        exact=("vgic-delivered-old-target", "vgic-lr-foreign-access"),
        counts=(
            ("phys_edges", "vgic.phys_irq"), ("guest_acks", "vgic.ack"), ("itargets_writes", "vgic.itargets"),
            ("hyp_entries", "vgic.hyp_entry"), ("sgis", "vgic.sgi"), ("maintenance_irqs", "vgic.maint"),
        ),
    ),
    Bug(
        "irqflow",
        document="Fix lost interrupt race in Xen event channels, 2010",
        fault="event channels as level interrupts, moved in the ack hook",
        repair="event channels as edges, remembered while a handler runs",
        system="irqflow",
        bad="level",
        good="edge",
        seed=1,
        verify=("flow-edge-lost", "flow-upcall-dropped-inprogress", "flow-migrate-unmask-early"),
        what_if=("flow-edge-lost", "flow-upcall-dropped-inprogress", "flow-migrate-unmask-early"),
        exact=("flow-upcall-dropped-inprogress", "flow-edge-lost"),
        counts=(
            ("raises", "flow.raise"), ("handler_runs", "flow.handler.begin"), ("upcalls", "flow.upcall"),
            ("migrations_deferred", "flow.set_affinity"),
        ),
    ),
    Bug(
        "evtchn",
        document="event delay on an SMP xen0, 2005",
        fault="unmasking sets the selector bit of the vcpu that executes it",
        repair="a port that listens elsewhere is unmasked by hypercall",
        system="evtchn",
        bad="current",
        good="proposed",
        seed=2,
        verify=(
            "evtchn-stranded-pending", "evtchn-selector-wrong-vcpu", "evtchn-piggyback-delivery",
            "evtchn-upcall-no-work",
        ),
        what_if=(
            "evtchn-stranded-pending", "evtchn-selector-wrong-vcpu", "evtchn-piggyback-delivery",
            "evtchn-upcall-no-work",
        ),
        exact=("evtchn-selector-wrong-vcpu", "evtchn-stranded-pending"),
        counts=(
            ("sends", "evtchn.send"), ("handled", "evtchn.handled"), ("upcalls", "evtchn.upcall"),
            ("unmask_hypercalls", "evtchn.unmask_hypercall"), ("notifications", "evtchn.notify"),
        ),
    ),
)  # fmt: skip
