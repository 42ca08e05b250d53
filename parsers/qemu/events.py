"""QEMU trace events, declared as data: the argument template of each event and what its columns mean.

A template is the event's own message with `{column:type}` where a value stands. Types: `i8` … `u64` decimal,
`x8` … `x64` hexadecimal with 0x, `w` a word, `q` the text up to a quote. `[...]` encloses a part that older
versions do not print; a literal bracket is written `\\[`.
Facts: QEMU's trace-events files of hw/intc, hw/i386 and softmmu, as they appear in logs of QEMU 7.2.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import pyarrow as pa

from parsers.tables import Column, Table

__all__ = ["CPU_NAMING", "EVENTS", "GENERIC", "TID", "UNPARSED", "Event"]

_TYPES: dict[str, tuple[str, pa.DataType]] = {
    **{f"i{n}": (r"-?\d{1,19}", getattr(pa, f"int{n}")()) for n in (8, 16, 32, 64)},
    **{f"u{n}": (r"\d{1,20}", getattr(pa, f"uint{n}")()) for n in (8, 16, 32, 64)},
    **{f"x{n}": (r"0x[0-9a-f]{1,16}", getattr(pa, f"uint{n}")()) for n in (8, 16, 32, 64)},
    "w": (r"[A-Za-z0-9_.-]{1,64}", pa.string()),
    "q": (r"[^']{0,255}", pa.string()),
}

#: What a column means wherever it occurs; an event may override it.
_DOCS: dict[str, str] = {
    "addr": "guest physical address",
    "by": "index of the virtual machine's CPU that made the access; -1: a device or the main loop",
    "coalescing": "running count of delivered interrupts (coalescing report)",
    "core": "index of the CPU interface that the line is about",
    "cpumask": "mask of the cores that see this line",
    "delivery_mode": "0 fixed, 1 lowest priority, 2 SMI, 4 NMI, 5 INIT, 6 SIPI, 7 ExtINT",
    "dest": "destination id of the interrupt message",
    "dest_mode": "0 physical, 1 logical",
    "gsi": "global system interrupt",
    "iface": "'cpu': the physical CPU interface; 'vcpu': the virtual CPU interface of that core",
    "irq": "interrupt number of the controller (GIC: the 32 private ones included)",
    "level": "level of the line after this call",
    "mr": "address of the emulator's MemoryRegion, in the emulator",
    "name": "name of the memory region",
    "reg_offset": "register offset",
    "pin": "input pin of the IOAPIC",
    "size": "bytes accessed",
    "target": "mask of the targets in the distributor",
    "trigger_mode": "0 edge, 1 level",
    "value": "value read or written",
    "vector": "interrupt vector",
}

TID = Column("tid", pa.uint32(), "host thread that wrote the line; null when the log has no prefix")
_FIELD = re.compile(r"\{(\w+):(\w+)\}")


@dataclass(frozen=True)
class Event:
    """One trace event: its name, its message template and prose; `docs` overrides the meaning of columns."""

    name: str
    template: str
    doc: str
    docs: tuple[tuple[str, str], ...] = ()

    @cached_property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """(column, type code) in the order of the message."""
        return tuple(_FIELD.findall(self.template))

    @cached_property
    def pattern(self) -> str:
        """Regular expression of the whole argument text, one named group for each column."""
        out, last = [], 0
        text = self.template
        for match in _FIELD.finditer(text):
            out.append(_literal(text[last : match.start()]))
            out.append(f"(?P<{match[1]}>{_TYPES[match[2]][0]})")
            last = match.end()
        out.append(_literal(text[last:]))
        return "^" + "".join(out) + "$"

    @cached_property
    def optional(self) -> frozenset[str]:
        """Columns inside [...]: null when the version does not print them."""
        return frozenset(n for part in re.findall(r"\[(?!\{)[^\]]*\]", self.template) for n, _ in _FIELD.findall(part))

    @cached_property
    def table(self) -> Table:
        """The record table: `tid`, then the arguments."""
        docs = {**_DOCS, **dict(self.docs)}
        return Table(self.name, self.doc, (TID, *(Column(n, _TYPES[t][1], docs[n]) for n, t in self.fields)))


def _literal(text: str) -> str:
    # "[" and "]" of a template mark an optional part; a literal bracket is written "\[".
    out, i = "", 0
    while i < len(text):
        if text[i] == "\\":
            out, i = out + re.escape(text[i + 1]), i + 2
            continue
        out += {"[": "(?:", "]": ")?"}.get(text[i]) or (text[i] if text[i] == " " else re.escape(text[i]))
        i += 1
    return out


_MMIO = "cpu {by:i16} mr {mr:x64} addr {addr:x64} value {value:x64} size {size:u8}[ name '{name:q}']"
_IFACE = "{iface:w} {core:u16}"

EVENTS: dict[str, Event] = {
    event.name: event
    for event in (
        Event(
            "memory_region_ops_read",
            _MMIO,
            "a read of a device register; decoded further for the interrupt hardware",
        ),
        Event(
            "memory_region_ops_write",
            _MMIO,
            "a write of a device register; decoded further for the interrupt hardware",
        ),
        # x86: line → GSI router → 8259 / IOAPIC → APIC bus → LAPIC
        Event("x86_gsi_interrupt", "GSI interrupt #{gsi:u16} level:{level:i8}", "a line into the GSI router"),
        Event("x86_pic_interrupt", "PIC interrupt #{irq:u16} level:{level:i8}", "a line into the 8259 pair"),
        Event("pic_interrupt", "irq {irq:i16} intno {vector:i16}", "an 8259 interrupt was acknowledged"),
        Event(
            "pic_set_irq",
            "master {master:i8} irq {irq:i16} level {level:i8}",
            "an input of one 8259",
            (("master", "1: the master chip"),),
        ),
        Event(
            "ioapic_set_irq",
            "vector: {pin:u16} level: {level:i8}",
            "an IOAPIC pin is set to a level, written also when it does not change (the log calls the pin a vector)",
        ),
        Event(
            "ioapic_set_remote_irr",
            "set remote irr for pin {pin:u16}",
            "remote IRR 0→1: a level interrupt was sent",
        ),
        Event(
            "ioapic_clear_remote_irr",
            "clear remote irr for pin {pin:u16} vector {vector:u16}",
            "remote IRR 1→0 by an EOI",
        ),
        Event(
            "ioapic_eoi_broadcast",
            "EOI broadcast for vector {vector:u16}",
            "the EOI of a level vector reached the IOAPIC",
        ),
        Event(
            "ioapic_eoi_delayed_reassert",
            "delayed reassert on EOI broadcast for vector {vector:u16}",
            "interrupt storm: the pin is asserted again later",
        ),
        Event(
            "ioapic_mem_read",
            "ioapic mem read addr {reg_offset:x64} regsel: {regsel:x8} size {size:x8} retval {value:x32}",
            "IOAPIC register read",
            (("regsel", "IOREGSEL before the access"),),
        ),
        Event(
            "ioapic_mem_write",
            "ioapic mem write addr {reg_offset:x64} regsel: {regsel:x8} size {size:x8} val {value:x32}",
            "IOAPIC register write",
            (("regsel", "IOREGSEL before the access"),),
        ),
        Event(
            "apic_local_deliver",
            "vector {lvt:u8} delivery mode {delivery_mode:u8}",
            "delivery through the local vector table",
            (("lvt", "LVT entry: 0 timer, 1 thermal, 2 performance, 3 LINT0, 4 LINT1, 5 error"),),
        ),
        Event(
            "apic_deliver_irq",
            "dest {dest:u32} dest_mode {dest_mode:u8} delivery_mode {delivery_mode:u8} vector {vector:u8}"
            " trigger_mode {trigger_mode:u8}",
            "an interrupt message on the APIC bus",
        ),
        Event(
            "apic_mem_readl",
            "{reg_offset:x64} = {value:x32}",
            "LAPIC register read by the CPU of this thread",
        ),
        Event(
            "apic_mem_writel",
            "{reg_offset:x64} = {value:x32}",
            "LAPIC register write by the CPU of this thread",
        ),
        Event("apic_report_irq_delivered", "coalescing {coalescing:i32}", "an interrupt was accepted by a LAPIC"),
        Event(
            "apic_get_irq_delivered",
            "returning coalescing {coalescing:i32}",
            "a device asks whether its interrupt was accepted",
        ),
        Event("apic_reset_irq_delivered", "old coalescing {coalescing:i32}", "a device starts counting"),
        Event("cpu_set_apic_base", "{value:x64}", "IA32_APIC_BASE written"),
        Event("cpu_get_apic_base", "{value:x64}", "IA32_APIC_BASE read"),
        # Arm: GICv2 with virtualization extension
        Event("gic_enable_irq", "irq {irq:u16} enabled", "an interrupt was enabled in the distributor"),
        Event("gic_disable_irq", "irq {irq:u16} disabled", "an interrupt was disabled in the distributor"),
        Event(
            "gic_set_irq",
            "irq {irq:u16} level {level:i8} cpumask {cpumask:x32} target {target:x32}",
            "a physical line into the distributor changes",
        ),
        Event(
            "gic_update_bestirq",
            _IFACE
            + " irq {irq:u16} priority {priority:u16} cpu priority mask {pmr:u16} cpu running priority {running:u16}",
            "highest pending interrupt of a CPU interface",
            (
                ("priority", "priority of that interrupt"),
                ("pmr", "GICC_PMR"),
                ("running", "running priority; 256: idle"),
            ),
        ),
        Event(
            "gic_update_set_irq",
            r"{cpu_name:w}\[{core:u16}\]: {wire:w} = {level:i8}",
            "a wire from the GIC to a core",
            (("cpu_name", "'cpu' as printed"), ("wire", "irq, fiq, virq or vfiq")),
        ),
        Event(
            "gic_acknowledge_irq",
            _IFACE + " acknowledged irq {irq:u16}",
            "IAR read: the core (or its guest) took the interrupt",
        ),
        Event(
            "gic_cpu_read",
            _IFACE + " iface read at {reg_offset:x32}: {value:x32}",
            "CPU-interface register read",
        ),
        Event(
            "gic_cpu_write",
            _IFACE + " iface write at {reg_offset:x32} {value:x32}",
            "CPU-interface register write",
        ),
        Event(
            "gic_hyp_read",
            "hyp read at {reg_offset:x32}: {value:x32}",
            "GICH register read by the CPU of this thread",
        ),
        Event(
            "gic_hyp_write",
            "hyp write at {reg_offset:x32}: {value:x32}",
            "GICH register write by the CPU of this thread",
        ),
        Event(
            "gic_dist_read",
            "dist read at {reg_offset:x32} size {size:u8}: {value:x32}",
            "distributor register read",
        ),
        Event(
            "gic_dist_write",
            "dist write at {reg_offset:x32} size {size:u8}: {value:x32}",
            "distributor register write",
        ),
        Event(
            "gic_lr_entry",
            "cpu {core:u16}: new lr entry {index:u8}: {value:x32}",
            "a list register becomes active",
            (("index", "number of the list register"),),
        ),
        Event(
            "gic_update_maintenance_irq",
            "cpu {core:u16}: maintenance = {level:i8}",
            "the maintenance interrupt of a core",
        ),
    )
}

#: Events whose line names the CPU that runs the thread, and the column that holds it.
CPU_NAMING: dict[str, str] = {
    "memory_region_ops_read": "by",
    "memory_region_ops_write": "by",
    "gic_acknowledge_irq": "core",
    "gic_cpu_read": "core",
    "gic_cpu_write": "core",
}

GENERIC = Table(
    "qemu_event",
    "an event without a declaration here, kept as printed",
    (TID, Column("event", pa.string(), "name of the event"), Column("args", pa.string(), "its message")),
)
UNPARSED = Table(
    "unparsed",
    "a line that is no trace line, or whose arguments do not fit the event's declaration",
    (
        Column("text", pa.string(), "the line, cut at 4 KiB, bytes that are not UTF-8 as \\xNN"),
        Column("length", pa.uint64(), "bytes of the line, line end included", "bytes"),
    ),
)
