"""Divergence codes and parameters of the virtual GIC (spec S3.5, A, B)."""

from __future__ import annotations

from typing import Final

from replay.declare import Code, Parameter

__all__ = [
    "AFFINITY_MISMATCH",
    "CODES",
    "DELIVERED_OLD_TARGET",
    "DUPLICATE_LR",
    "HW_PENDING_ACTIVE",
    "LOST_IRQ",
    "LR_FOREIGN_ACCESS",
    "LR_STALE",
    "MAINT_UNNEEDED",
    "MIGRATING_STUCK",
    "MIGRATION_REFUSED",
    "PARAMETERS",
    "PHYS_ACTIVE_LEAK",
    "QUEUED_STRANDED",
    "TWO_LISTS",
]

_LOAD: Final = "vgic.lr_write"
_CLEAR: Final = "vgic.lr_clear"
_ACK: Final = "vgic.ack"
_EOI: Final = "vgic.eoi"
_WRITE: Final = "vgic.itargets"

DELIVERED_OLD_TARGET: Final = Code(
    "vgic-delivered-old-target",
    "error",
    "W1",
    "GICv2 4.3.12, effect of changes to GICD_ITARGETSR; Xen vgic_store_itargetsr",
    "A list register was loaded on a vcpu after a write to ITARGETSR had excluded that vcpu, and the guest took it.",
    "The write changed the target only: an interrupt still in lr_pending, or queued behind its own list register, "
    "stayed with the old vcpu.",
    "the interrupt was active when the target changed (the architecture allows it), or was loaded before the write",
    needs=(_WRITE, _LOAD, _ACK),
)
QUEUED_STRANDED: Final = Code(
    "vgic-queued-stranded",
    "error",
    "G1, P1",
    "Xen vgic_vcpu_inject_irq, gic_update_one_lr",
    "An interrupt was QUEUED with no way forward (not in lr_pending, its list register invalid or none, nobody kicked) "
    "for longer than strand_ns. `val` is the delay until it was loaded, or until the end.",
    "A second interrupt arrived between the guest's EOI and the next entry of the old vcpu, on another physical cpu, "
    "and nobody interrupted the old vcpu.",
    "the interrupt is disabled; warn only while the old vcpu is not running",
    needs=("vgic.inject", _LOAD, _CLEAR, _EOI, "vgic.sgi", "vgic.hyp_entry"),
    thresholds=("strand_ns",),
)
LR_FOREIGN_ACCESS: Final = Code(
    "vgic-lr-foreign-access",
    "error",
    "G3",
    "Xen gic_raise_inflight_irq, gic_update_one_lr; GICv2 5.3 (GICH registers are banked by core)",
    "A list register index that belongs to one vcpu was looked up in the registers of another. `vcpu` executed, "
    "`val` owns it.",
    "The inflight list is the old vcpu's and the lock held is the new vcpu's: the target moved and the node did not.",
    "the vcpu whose registers these are is not running and its saved image is meant",
    needs=(_LOAD + "|" + _CLEAR, "sched.run"),
)
TWO_LISTS: Final = Code(
    "vgic-two-lists",
    "error",
    "G1",
    "Xen struct pending_irq: inflight and lr_queue nodes",
    "One interrupt was linked in the inflight list of one vcpu and in the lr_pending list of another (`val`).",
    "A write to ITARGETSR races with an injection.",
    "the intermediate state inside one lock section; recordings, for no event shows lr_pending",
)
DUPLICATE_LR: Final = Code(
    "vgic-duplicate-lr",
    "error",
    "G2",
    "GICv2 5.2.2: a virtual interrupt must not be in two list registers",
    "The same virtual interrupt was valid in two list registers. `vcpu` is the new one's, `val` the other's.",
    "Migration loaded the new vcpu without clearing the old list register.",
    "an SGI: one list register for each source is legal",
    needs=(_LOAD, _CLEAR, _ACK, _EOI),
)
MIGRATING_STUCK: Final = Code(
    "vgic-migrating-stuck",
    "warn",
    "W2, F1",
    "Xen GIC_IRQ_GUEST_MIGRATING",
    "MIGRATING was set for longer than migrating_ns.",
    "The guest does not EOI, or the old vcpu is descheduled or never enters the hypervisor.",
    "the old vcpu is not running",
    needs=(_WRITE, _LOAD, _CLEAR),
    thresholds=("migrating_ns",),
)
PHYS_ACTIVE_LEAK: Final = Code(
    "vgic-phys-active-leak",
    "error",
    "G5, M1",
    "GICv2 4.4.5 (GICC_DIR), 5.3.14 (GICH_LR.HW); Xen gic_update_one_lr",
    "The physical interrupt was active for longer than leak_ns while the virtual one was in no list register and not "
    "QUEUED: nothing will ever deactivate it.",
    "The list register lost its HW bit, so the guest's EOI no longer deactivated, and Xen did not do it instead.",
    "a passthrough device was reset meanwhile",
    needs=("vgic.phys_irq", _LOAD, _CLEAR, _EOI, "vgic.deactivate", "vgic.inject"),
    thresholds=("leak_ns",),
)
LOST_IRQ: Final = Code(
    "vgic-lost-irq",
    "error",
    "G6",
    "Xen vgic_vcpu_inject_irq",
    "An arrival (not one that coalesced) was not acknowledged by the guest by the end, longer than lost_ns later, "
    "though the interrupt is enabled. `val` is the time it arrived.",
    "Stranded in a list of the wrong vcpu, or the vcpu that holds it never runs.",
    "records were lost meanwhile",
    needs=("vgic.phys_irq", _ACK, "vgic.enable"),
    thresholds=("lost_ns",),
)
MIGRATION_REFUSED: Final = Code(
    "vgic-migration-refused",
    "warn",
    "W2",
    "Xen vgic_store_itargetsr, vgic_migrate_irq since 31bc6a93a0",
    "A write to ITARGETSR was ignored because the previous migration had not finished. `val` is the target refused.",
    "The guest moves the interrupt again before the old vcpu has cleared its list register.",
    "the write names the target that is already set",
    needs=(_WRITE, _LOAD, _CLEAR),
)
AFFINITY_MISMATCH: Final = Code(
    "vgic-affinity-mismatch",
    "info",
    "W1",
    "Xen irq_set_affinity, arch_move_irqs",
    "For longer than slice_ns the physical interrupt went to another pcpu than the one that runs its target vcpu.",
    "The affinity follows lazily.",
    "MIGRATING, or the target mask has several vcpus",
    needs=("vgic.affinity", _WRITE, "sched.run"),
    thresholds=("slice_ns",),
    closed=False,
)
LR_STALE: Final = Code(
    "vgic-lr-stale",
    "info",
    "G3",
    "Xen gic_clear_lrs",
    "A list register stayed VISIBLE after the guest's EOI for longer than stale_ns, until the next entry. `val` is for "
    "how long.",
    "Lazy clearing, by design.",
    needs=(_EOI, _CLEAR),
    thresholds=("stale_ns",),
    closed=False,
)
HW_PENDING_ACTIVE: Final = Code(
    "vgic-hw-pending-active",
    "warn",
    "G3",
    "GICv2 5.3.14: pending-and-active is not allowed with HW=1; Xen gic_update_one_lr",
    "A second instance was to be merged into an active list register that is tied to a physical interrupt.",
    "The physical interrupt was deactivated, or injected by software, while the guest still handled the first one.",
    needs=(_LOAD,),
)
MAINT_UNNEEDED: Final = Code(
    "vgic-maint-unneeded",
    "info",
    "G4",
    "GICv2 5.3.5 (GICH_MISR); Xen maintenance_interrupt",
    "A maintenance interrupt found nothing to do.",
    "Underflow was resolved, or the list register cleared, before the interrupt was taken.",
    needs=("vgic.maint",),
    closed=False,
)

CODES: Final[tuple[Code, ...]] = (
    DELIVERED_OLD_TARGET,
    QUEUED_STRANDED,
    LR_FOREIGN_ACCESS,
    TWO_LISTS,
    DUPLICATE_LR,
    MIGRATING_STUCK,
    PHYS_ACTIVE_LEAK,
    LOST_IRQ,
    MIGRATION_REFUSED,
    AFFINITY_MISMATCH,
    LR_STALE,
    HW_PENDING_ACTIVE,
    MAINT_UNNEEDED,
)

PARAMETERS: Final[tuple[Parameter, ...]] = (
    Parameter("vcpus", 2, "", "vcpus of a closed run; vcpu i runs on pcpu i"),
    Parameter("nr_lrs", 4, "", "list registers of a core (GICH_VTR)"),
    Parameter("ack_ns", 500, "ns", "closed runs: from the load of a list register to the guest's IAR read"),
    Parameter("eoi_ns", 4_000, "ns", "closed runs: from IAR to EOIR"),
    Parameter("sgi_ns", 1_000, "ns", "closed runs: from sending a kick to the entry it causes"),
    Parameter("match_ns", 2_000, "ns", "how far a predicted acknowledge may lie from the recorded one"),
    Parameter("phys_follows", "immediate", "", "'immediate': patch-v8 and naive move the physical affinity at the "
              "write to ITARGETSR; 'fixed': they never move it"),
    Parameter("strand_ns", 100_000, "ns", "QUEUED without a way forward for longer is stranded"),
    Parameter("migrating_ns", 10_000_000, "ns", "MIGRATING for longer is stuck"),
    Parameter("leak_ns", 1_000_000, "ns", "physically active without a holder for longer is a leak"),
    Parameter("lost_ns", 1_000_000_000, "ns", "an arrival not acknowledged for longer by the end is lost"),
    Parameter("stale_ns", 100_000, "ns", "lazy clearing for longer is mentioned; the metric lazy_lr_ns counts all"),
    Parameter("slice_ns", 30_000_000, "ns", "a scheduler time slice; affinity may lag that long"),
)  # fmt: skip
