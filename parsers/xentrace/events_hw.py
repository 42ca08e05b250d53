"""Hardware records (class 0x080): power management and physical interrupts.

Sources: xen/include/public/trace.h, xen/arch/x86/acpi/cpu_idle.c, xen/arch/x86/cpu/mwait-idle.c, xen/arch/x86/irq.c.
Xen 4.0 and 4.1 wrote idle records under the ids that move-cleanup has since 4.2; the word count tells them apart.
"""

from __future__ import annotations

from parsers.xentrace.layout import Event, Layout

__all__ = ["EVENTS"]

V4_1, V4_2 = (4, 1), (4, 2)

_ENTRY = "cx:32 tick:32 expected_us:32 predicted_us:32"
_EXIT = "cx:32 tick:32 irr0:32 irr1:32 irr2:32 irr3:32"
_BIND = "irq:16 vector:16 cpumask0:64 cpumask1:64 cpumask2:64"
_MASK = "The mask covers the first 192 CPUs"


def _irq(name: str, number: int, doc: str, fields: str, notes: str = "") -> Event:
    return Event(f"TRC_HW_IRQ_{name}", (0x802000 | number,), doc, (Layout(fields, V4_2),), notes=notes)


EVENTS: tuple[Event, ...] = (
    Event("TRC_PM_FREQ_CHANGE", (0x801001,), "A cpufreq target was applied", (Layout("old_mhz:32 new_mhz:32"),),
          notes="Only governors that go through __cpufreq_driver_target()"),
    Event("TRC_PM_IDLE_ENTRY", (0x801002, 0x802001), "This CPU is about to enter a C-state",
          (Layout(_ENTRY, V4_2, ids=(0x801002,)), Layout(_ENTRY, until=V4_1, ids=(0x802001,))),
          notes="Plain HLT idle (default_idle) is not traced"),
    Event("TRC_PM_IDLE_EXIT", (0x801003, 0x802002), "This CPU left a C-state",
          (Layout(_EXIT, V4_2, ids=(0x801003,)), Layout(_EXIT, until=V4_1, ids=(0x802002,))),
          notes="irr0..irr3: up to four vectors pending in the physical LAPIC's IRR, ascending, zero-padded. "
          "mwait-idle since 4.17 writes it after interrupts were enabled (commit e67ab91fc4), so the waking "
          "interrupt's handler records come first"),
    _irq("MOVE_CLEANUP_DELAY", 1, "The old vector is still pending in IRR: cleanup is tried again",
         "irq:32 vector:32 on_cpu:32"),
    _irq("MOVE_CLEANUP", 2, "The old vector was released on this CPU after a move", "irq:32 vector:32 on_cpu:32"),
    _irq("BIND_VECTOR", 3, "An interrupt was bound to a fixed vector (HPET broadcast: 0x30)", _BIND, _MASK),
    _irq("CLEAR_VECTOR", 4, "A vector was released", _BIND, _MASK),
    _irq("MOVE_FINISH", 5, "A move in flight ended because the vector was released",
         "irq:32 vector:32 on_cpu:32", "vector is the old one"),
    _irq("ASSIGN_VECTOR", 6, "A new vector and target were chosen", _BIND,
         _MASK + "; several CPUs possible from 4.13 to 4.21, exactly one since 4.22"),
    _irq("UNMAPPED_VECTOR", 7, "An interrupt without handler", "vector:32"),
    _irq("HANDLED", 8, "An interrupt's handler (or its forwarding to a guest) ended on this CPU",
         "irq:32 tsc_in:32 tsc_out:32",
         "Not written for direct APIC vectors (LAPIC timer, IPIs), for rate-limited interrupts and legacy HPET ticks "
         "beyond IRQ 0; the LAPIC's acknowledgement is not included"),
)  # fmt: skip
