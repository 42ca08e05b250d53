"""Records of a debug build of Xen with the trace points that stock Xen lacks; none of them is upstream.

Layout and places are explained in docs/instrumented-xen.md, its table made from `POINTS`. Ids: hardware sub-class 4
(0x00804nnn), HVM sub-class 8 (0x00088nnn) and the free class 0x100 for event channels (0x0100fnnn). Every record is
stamped and has at most seven words. A 64-bit time is always the distance from now in ns, so that no second clock is
needed; `NEVER_NS` stands for "not armed" or "no deadline".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from parsers.xentrace.layout import Event, Layout

__all__ = ["EVENTS", "GROUPS", "NEVER_NS", "POINTS", "SETUP", "VERSION", "Group", "Point"]

#: Layout version in the set-up record; a reader that does not know it must not trust the rest.
VERSION: Final = 1
#: A distance in ns that means "never" (INT64_MAX).
NEVER_NS: Final = (1 << 63) - 1

SETUP: Final = "TRC_INST_SETUP"

_WHO = "vcpu:16 dom:16"


@dataclass(frozen=True, slots=True)
class Group:
    """Trace points that are compiled in together: a bit of `groups` in the set-up record, and where their ids begin."""

    name: str
    bit: int
    base: int
    doc: str


GROUPS: Final[tuple[Group, ...]] = (
    Group("hpet", 0, 0x804000, "HPET broadcast: comparators, targets, handlers"),
    Group("mwait", 1, 0x804000, "the hand-shake around MWAIT: flag, MONITOR, check, store"),
    Group("irq", 2, 0x804000, "physical interrupts: entry, return, EOI"),
    Group("callback", 3, 0x88000, "upcall flag, callback line, other devices' lines, virtual IOAPIC"),
    Group("vlapic", 4, 0x88000, "virtual local APICs: request, service, EOI"),
    Group("evtchn", 5, 0x100F000, "event channels as the hypervisor sees them"),
    Group("guest", 6, 0x100F000, "marks that an instrumented guest leaves through a debug hypercall"),
    Group("vgic", 7, 0x88000, "Arm: virtual GIC of the default implementation"),
    Group("idle", 8, 0x804000, "idle entry with its deadline, idle exit with its reason, wakes of other CPUs"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Point:
    """A trace point: its record, its group, the function(s) of Xen that write it, and when."""

    event: Event
    group: str
    where: str
    when: str


def _point(group: str, name: str, number: int, doc: str, fields: str, where: str, when: str, notes: str = "") -> Point:
    base = next(g.base for g in GROUPS if g.name == group)
    text = f"Only in a debug build with the points of docs/instrumented-xen.md. {notes}".strip()
    return Point(Event(f"TRC_{name}", (base | number,), doc, (Layout(fields),), notes=text), group, where, when)


POINTS: Final[tuple[Point, ...]] = (
    _point("hpet", "INST_SETUP", 0x000, "What this build records",
           "version:16 hpet_algorithm:8 vgic_algorithm:8 groups:32 event_mask:32 channels:16 cpus:16 hpet_vector:8 "
           "_:24",
           "tb_control (XEN_SYSCTL_TBUFOP_enable), and once a second from time_calibration",
           "when tracing starts, on every CPU",
           "Algorithms: 0 not said; HPET 1 current, 2 proposed, 3 proposed-keep, 4 upstream-2025; vGIC 1 naive, "
           "2 patch-v8, 3 merged, 4 merged-2017, 5 maintenance"),
    _point("hpet", "HPET_PROGRAM", 0x001, "A comparator is written",
           "channel:16 reason:8 forced:b8 owner:s16 _:16 delta_ns:s64",
           "reprogram_hpet_evt_channel, hpet_detach_channel", "after the write, under the channel's lock",
           "reason: 0 entry, 1 shorten, 2 broadcast again, 3 disarm; delta_ns: expiry less NOW()"),
    _point("hpet", "HPET_RETARGET", 0x002, "A channel's message is pointed at a CPU, or is refused to be",
           "channel:16 refused:b8 _:8 old_target:s16 new_target:s16 irq:32",
           "set_channel_irq_affinity", "after the attempt", "targets are CPU numbers, -1: none"),
    _point("hpet", "HPET_ENTRY", 0x003, "A channel's handler begins",
           "channel:16 irq:s16 late_ns:32 owner:s16 _:16",
           "hpet_interrupt_handler", "first thing",
           "late_ns: main counter less comparator, which is how long the message waited; 0xffffffff: it was rewritten"),
    _point("hpet", "HPET_RETURN", 0x004, "A channel's handler ends", "channel:16 _:16",
           "hpet_interrupt_handler", "last thing"),
    _point("idle", "HPET_WAKE", 0x005, "The broadcast wakes another CPU", "target:16 how:16",
           "evt_do_broadcast, cpuidle_wakeup_mwait, cpumask_raise_softirq", "for each CPU woken",
           "how: 1 store to the monitored line, 2 IPI, 4 softirq bit only"),
    _point("idle", "IDLE_DEADLINE", 0x006, "This CPU goes to sleep on a channel",
           "channel:s16 state:16 delta_ns:s64",
           "hpet_broadcast_enter", "before the channel is chosen", "delta_ns: timer_deadline less NOW()"),
    _point("idle", "IDLE_WOKEN", 0x007, "This CPU is out of MWAIT or HLT",
           "reason:8 vector:8 channel:s16",
           "mwait_idle, acpi_processor_idle", "before interrupts are enabled; reason from the IRR and the softirq mask",
           "reason: 0 unknown, 1 the channel's own vector, 2 another CPU's broadcast, 3 another interrupt, 4 "
           "clean-up IPI"),
    _point("mwait", "MWAIT_STEP", 0x010, "A step on the way into MWAIT", "step:8 _:24",
           "mwait_idle_with_hints", "at each step", "step: 0 flag set, 1 MONITOR, 2 last check, 3 MWAIT"),
    _point("mwait", "MWAIT_SAMPLE", 0x011, "A waker looks at a sleeper's flag", "target:16 flag:b8 _:8",
           "cpuidle_wakeup_mwait, arch_set_softirq", "when the flag is read"),
    _point("mwait", "MWAIT_STORE", 0x012, "A waker writes the sleeper's wake word", "target:16 flag:b8 ipi:b8",
           "cpuidle_wakeup_mwait, arch_set_softirq", "after the write; with a compare-exchange flag is what it found"),
    _point("irq", "IRQ_ENTER", 0x020, "A physical interrupt is taken", "vector:8 depth:8 kind:16 irq:s32",
           "do_IRQ", "after irq_enter()", "kind: 0 Xen's own, 1 a guest's, 2 direct vector, 3 spurious; irq -1: none"),
    _point("irq", "IRQ_RETURN", 0x021, "do_IRQ returns", "vector:8 depth:8 _:16 irq:s32", "do_IRQ",
           "at the exit label"),
    _point("irq", "IRQ_EOI", 0x022, "EOI is written to this CPU's local APIC", "vector:8 deferred:b8 _:16 irq:s32",
           "ack_APIC_irq and its callers", "before the write", "deferred: after the guest's own EOI"),
    _point("callback", "CALLBACK_VIA", 0x001, "How upcalls reach a domain", "dom:16 via:8 _:8 gsi:32",
           "hvm_set_callback_via", "after the change", "via: 0 none, 1 GSI, 2 PCI INTx, 3 vector"),
    _point("callback", "UPCALL_SET", 0x002, "evtchn_upcall_pending went from 0 to 1", _WHO,
           "vcpu_mark_events_pending", "when test_and_set found 0"),
    _point("callback", "UPCALL_CLEARED", 0x003, "vCPU 0's evtchn_upcall_pending is clear again", _WHO,
           "vmx_vmexit_handler, svm_vmexit_handler, vlapic_EOI_set", "at the first look that finds it clear",
           "The guest clears it in shared memory; vcpu is the one that exited"),
    _point("callback", "CALLBACK_LINE", 0x004, "The callback's own contribution to its GSI",
           "dom:16 gsi:16 asserted:b8 was:b8 count:16",
           "hvm_set_callback_irq_level, hvm_maybe_deassert_evtchn_irq", "after the change, under irq_lock",
           "count: gsi_assert_count afterwards"),
    _point("callback", "GSI_LINE", 0x005, "Another source asserts or releases a GSI",
           "dom:16 gsi:16 asserted:b8 kind:8 count:16 holder:32",
           "__hvm_pci_intx_assert, __hvm_pci_intx_deassert, hvm_isa_irq_assert, hvm_gsi_assert",
           "after the change, under irq_lock", "kind: 0 PCI INTx (holder = device*4+pin), 1 ISA, 2 GSI"),
    _point("callback", "VIOAPIC_RTE", 0x006, "A guest writes a redirection entry",
           "dom:16 gsi:16 dest_vcpu:s16 _:16 rte:64", "vioapic_write_redirent", "after the write",
           "dest_vcpu: -1 unless it is a single one"),
    _point("callback", "VIOAPIC_SEND", 0x007, "The virtual IOAPIC sends a message",
           "dom:16 gsi:16 vector:8 level:b8 delivery:8 logical:b8 dest:32", "vioapic_deliver", "for each message"),
    _point("callback", "VIOAPIC_EOI", 0x008, "An EOI reaches a pin of the virtual IOAPIC",
           "dom:16 gsi:16 vector:8 again:b8 count:16", "vioapic_update_EOI", "for each level pin of the vector",
           "again: the line is still high and is delivered again"),
    _point("vlapic", "VLAPIC_ACCEPT", 0x010, "A vector enters IRR", _WHO + " vector:8 level:b8 posted:b8 was:b8",
           "vlapic_set_irq", "after the bit was set", "was: it was set already"),
    _point("vlapic", "VLAPIC_SERVE", 0x011, "A vector goes from IRR to ISR", _WHO + " vector:8 _:24",
           "vlapic_ack_pending_irq; vmx_intr_assist with APICv", "after the change"),
    _point("vlapic", "VLAPIC_EOI", 0x012, "A guest's EOI", _WHO + " vector:8 level:b8 next:8 upcall:8",
           "vlapic_EOI_set", "first thing",
           "vector: highest in ISR, 0 none; next: the one below; upcall: vCPU 0's flag then"),
    _point("vlapic", "VLAPIC_TPR", 0x013, "TPR changes", _WHO + " tpr:8 _:24", "vlapic_set_tpr", "after the write"),
    _point("vlapic", "VLAPIC_WINDOW", 0x014, "A vector waits until the guest takes interrupts again",
           _WHO + " vector:8 kind:8 _:16",
           "vmx_enable_intr_window, svm_enable_intr_window", "when a window is asked for", "kind: hvm_intsource"),
    _point("vgic", "VGIC_PHYS", 0x020, "A physical interrupt for a guest arrives", "virq:16 irq:16",
           "do_IRQ (arm)", "before vgic_inject_irq"),
    _point("vgic", "VGIC_INJECT", 0x021, "A virtual interrupt is made pending", _WHO + " virq:16 status:16",
           "vgic_inject_irq", "under the vgic lock"),
    _point("vgic", "VGIC_LR_WRITE", 0x022, "A list register is loaded", _WHO + " virq:16 lr:8 _:8 word:64",
           "gic_set_lr", "after the write"),
    _point("vgic", "VGIC_LR_CLEAR", 0x023, "A list register is found or made empty", _WHO + " virq:16 lr:8 state:8",
           "gic_update_one_lr", "when it is taken off its list"),
    _point("vgic", "VGIC_ITARGETS", 0x024, "A guest moves an interrupt", _WHO + " virq:16 new_vcpu:16 outcome:8 _:24",
           "vgic_store_itargetsr, vgic_store_irouter", "after vgic_migrate_irq",
           "outcome: 0 moved, 1 injected again, 2 MIGRATING, 3 refused"),
    _point("vgic", "VGIC_SGI", 0x025, "A CPU is kicked", "target:16 sgi:16", "smp_send_event_check_mask",
           "for each CPU"),
    _point("vgic", "VGIC_MAINT", 0x026, "Maintenance interrupt", "misr:32", "vgic_sync_from_lrs",
           "where the underflow request is cleared, or the EOI-maintenance bit is found"),
    _point("vgic", "VGIC_DEACTIVATE", 0x027, "A physical interrupt is deactivated", "virq:16 irq:16",
           "gicv2_guest_irq_end", "after the write"),
    _point("vgic", "VGIC_AFFINITY", 0x028, "A guest's physical interrupt is routed",
           "virq:16 old_target:s16 new_target:s16 _:16",
           "irq_set_affinity (arm)", "after the write"),
    _point("vgic", "VGIC_ENTRY", 0x029, "The hypervisor is entered", _WHO + " reason:32", "enter_hypervisor_from_guest",
           "after the list registers were synchronised", "reason: 0 trap, 1 SGI, 2 interrupt, 3 maintenance"),
    _point("vgic", "VGIC_ENABLE", 0x02A, "A guest enables or disables an interrupt",
           _WHO + " virq:16 enabled:b8 priority:8",
           "vgic_enable_irqs, vgic_disable_irqs", "after the change"),
    _point("evtchn", "EVTCHN_SEND", 0x001, "A domain or Xen raises a channel; which one follows in EVTCHN_PENDING",
           _WHO + " port:32 remote_dom:16 type:8 _:8 remote_port:32",
           "evtchn_send, send_guest_vcpu_virq, send_guest_global_virq, send_guest_pirq", "before set_pending",
           "vcpu and dom: the sender; type: EVTCHNSTAT_*"),
    _point("evtchn", "EVTCHN_PENDING", 0x002, "Two-level: a port is set pending",
           _WHO + " port:32 pending_was:b8 masked:b8 selected_was:b8 raised:b8",
           "evtchn_2l_set_pending", "last thing",
           "vcpu: the one notified; raised: evtchn_upcall_pending went 0 to 1. Later flags are 0 where a step did "
           "not run"),
    _point("evtchn", "EVTCHN_PENDING_FIFO", 0x003, "FIFO: a port is set pending",
           _WHO + " port:32 word:32 pending_was:b8 linked_was:b8 ready_was:b8 raised:b8 queue:8 old_queue:8 "
           "old_vcpu:16",
           "evtchn_fifo_set_pending", "last thing", "word: the event word afterwards"),
    _point("evtchn", "EVTCHN_UNMASK", 0x004, "EVTCHNOP_unmask", _WHO + " port:32 notify_vcpu:16 mask_was:b8 raised:b8",
           "evtchn_2l_unmask, evtchn_fifo_unmask", "last thing", "vcpu: the caller"),
    _point("evtchn", "EVTCHN_BIND", 0x005, "A channel comes into being, is rebound or closed",
           _WHO + " port:32 how:8 type:8 pending:b8 _:8 remote_dom:16 _:16 remote_port:32",
           "evtchn_bind_interdomain, evtchn_bind_virq, evtchn_bind_ipi, evtchn_bind_pirq, evtchn_bind_vcpu, "
           "evtchn_close",
           "after the change", "how: 0 new, 1 bind_vcpu, 2 close; vcpu: notified from now on; type: EVTCHNSTAT_*"),
    _point("evtchn", "EVTCHN_UPCALL", 0x006, "An upcall is delivered to a PV vCPU", _WHO + " sel:64",
           "create_bounce_frame for the event callback", "before the return to the guest",
           "sel: evtchn_pending_sel then (two-level)"),
    _point("evtchn", "EVTCHN_WORD", 0x007, "A word of shared memory as read now", _WHO + " what:16 index:16 value:64",
           "vcpu_block, do_poll, domain_dump_evtchn_info", "for each vCPU that blocks: its words, and pending ones",
           "what: 0 pending, 1 mask, 2 selector, 3 upcall_pending, 4 upcall_mask, 5 ABI (1 FIFO), 6 notified vCPU"),
    _point("guest", "GUEST_MARK", 0x020, "An instrumented guest tells what only it can see",
           _WHO + " obj:32 what:8 _:24", "do_event_channel_op, debug sub-command", "when the guest calls",
           "what: 0 upcall begins, 1 ends, 2 port dispatched, 3 acknowledged, 4 masked, 5 unmasked by the guest "
           "itself, "
           "6 handled on this vCPU from now on, 7 upcalls off, 8 on, 16 virtual interrupt acknowledged, 17 ended"),
)  # fmt: skip

EVENTS: Final[tuple[Event, ...]] = tuple(point.event for point in POINTS)
