"""Codes that the rule tests of the project raise; `tests/conformance/test_seeded.py` measures them again."""

from __future__ import annotations

from typing import Final

__all__ = ["UNIT_TESTED"]

UNIT_TESTED: Final[frozenset[str]] = frozenset({
    "hpet-wrong-cpu", "hpet-affinity-stale", "hpet-nested-irq", "hpet-stack-depth", "hpet-blocked-by-isr",
    "hpet-late-wakeup", "hpet-missed-wakeup", "hpet-early-wakeup", "hpet-spurious-irq", "hpet-retarget",
    "hpet-masked-expiry", "hpet-orphan-member", "hpet-owner-not-idle", "hpet-bad-choice", "mwait-lost-wakeup",
    "via-stale-assert", "via-spurious-inject", "via-inject-storm", "via-late-assert", "via-late-delivery",
    "via-lost-callback", "via-remote-irr-stuck", "via-eoi-unmatched", "via-count-mismatch",
    "vgic-delivered-old-target", "vgic-queued-stranded", "vgic-lr-foreign-access", "vgic-duplicate-lr",
    "vgic-two-lists", "vgic-migrating-stuck", "vgic-phys-active-leak", "vgic-lost-irq", "vgic-migration-refused",
    "vgic-affinity-mismatch", "vgic-lr-stale", "vgic-hw-pending-active", "vgic-maint-unneeded", "flow-edge-lost",
    "flow-upcall-dropped-inprogress", "flow-migrate-unmask-early", "flow-concurrent-handler", "flow-masked-forever",
    "flow-lateeoi-missing", "flow-spurious-invocation", "flow-upcall-no-work", "flow-affinity-refused",
    "flow-affinity-ignored", "flow-no-end-notify", "flow-storm", "flow-active-skip", "irqdesc-concurrent",
    "irqdesc-unbalanced", "irqdesc-spurious-disable-risk", "evtchn-stranded-pending", "evtchn-selector-wrong-vcpu",
    "evtchn-upcall-no-work", "evtchn-piggyback-delivery", "evtchn-selector-without-upcall",
    "evtchn-upcall-without-selector", "evtchn-binding-mismatch", "evtchn-delivery-delay",
    "evtchn-masked-pending-long", "evtchn-unmask-hypercall-noop", "evtchn-port-range", "evtchn-lost-wakeup-block",
    "fifo-pending-unlinked", "fifo-linked-unreachable", "fifo-queue-cycle", "fifo-ready-lost", "fifo-busy-stuck",
    "fifo-priority-inversion", "fifo-old-queue-delivery", "fifo-lost-queue-change", "fifo-no-control-block",
})  # fmt: skip
