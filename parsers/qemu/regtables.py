"""Registers of the interrupt hardware and the tables that their accesses are decoded into, declared as data.

Register maps: HPET 1.0a (2.3), Intel SDM vol. 3 (LAPIC, MSI), 82093AA IOAPIC, Arm IHI 0048B GICv2 (4.3, 4.4, 5.3).
"""

from __future__ import annotations

import pyarrow as pa

from parsers.qemu.events import TID
from parsers.tables import Column, Table

__all__ = [
    "GICC_IRQ",
    "GICC_REGS",
    "GICD_REGS",
    "GICH_REGS",
    "HPET_REGS",
    "IOAPIC_REGS",
    "LAPIC_REGS",
    "REGISTER_TABLES",
]

_NAME = pa.dictionary(pa.int16(), pa.string())
_WRITE = Column("write", pa.bool_(), "true: write, false: read")
_VALUE = Column("value", pa.uint64(), "value written or read")
_OFFSET = Column("reg_offset", pa.uint32(), "register offset")
_SIZE = Column("size", pa.uint8(), "bytes accessed", "bytes")


def _reg(doc: str) -> Column:
    return Column("reg", _NAME, "register: " + doc)


def _u8(name: str, doc: str) -> Column:
    return Column(name, pa.uint8(), doc)


def _u16(name: str, doc: str) -> Column:
    return Column(name, pa.uint16(), doc)


def _flag(name: str, doc: str) -> Column:
    return Column(name, pa.bool_(), doc)


HPET_REGS = (
    "GENERAL_CAP",
    "GENERAL_CONFIG",
    "GENERAL_ISR",
    "COUNTER",
    "TN_CONFIG",
    "TN_CMP",
    "TN_FSB_VALUE",
    "TN_FSB_ADDR",
    "OTHER",
)
LAPIC_REGS = {
    0x20: "ID",
    0x30: "VERSION",
    0x80: "TPR",
    0x90: "APR",
    0xA0: "PPR",
    0xB0: "EOI",
    0xC0: "RRD",
    0xD0: "LDR",
    0xE0: "DFR",
    0xF0: "SVR",
    **{0x100 + 16 * n: f"ISR{n}" for n in range(8)},
    **{0x180 + 16 * n: f"TMR{n}" for n in range(8)},
    **{0x200 + 16 * n: f"IRR{n}" for n in range(8)},
    0x280: "ESR",
    0x2F0: "LVT_CMCI",
    0x300: "ICR_LO",
    0x310: "ICR_HI",
    0x320: "LVT_TIMER",
    0x330: "LVT_THERMAL",
    0x340: "LVT_PERF",
    0x350: "LVT_LINT0",
    0x360: "LVT_LINT1",
    0x370: "LVT_ERROR",
    0x380: "TIMER_INITIAL",
    0x390: "TIMER_CURRENT",
    0x3E0: "TIMER_DIVIDE",
}
IOAPIC_REGS = ("IOREGSEL", "ID", "VERSION", "ARB", "RTE_LO", "RTE_HI", "EOI", "OTHER")
#: GICD blocks: (first offset, end, name, bits of the register per interrupt; 0 = not indexed by interrupt)
GICD_REGS: tuple[tuple[int, int, str, int], ...] = (
    (0x000, 0x004, "CTLR", 0),
    (0x004, 0x008, "TYPER", 0),
    (0x008, 0x00C, "IIDR", 0),
    (0x080, 0x100, "IGROUPR", 1),
    (0x100, 0x180, "ISENABLER", 1),
    (0x180, 0x200, "ICENABLER", 1),
    (0x200, 0x280, "ISPENDR", 1),
    (0x280, 0x300, "ICPENDR", 1),
    (0x300, 0x380, "ISACTIVER", 1),
    (0x380, 0x400, "ICACTIVER", 1),
    (0x400, 0x800, "IPRIORITYR", 8),
    (0x800, 0xC00, "ITARGETSR", 8),
    (0xC00, 0xD00, "ICFGR", 2),
    (0xF00, 0xF04, "SGIR", 0),
    (0xF10, 0xF20, "CPENDSGIR", 8),
    (0xF20, 0xF30, "SPENDSGIR", 8),
)
GICC_REGS = {
    0x00: "CTLR",
    0x04: "PMR",
    0x08: "BPR",
    0x0C: "IAR",
    0x10: "EOIR",
    0x14: "RPR",
    0x18: "HPPIR",
    0x1C: "ABPR",
    0x20: "AIAR",
    0x24: "AEOIR",
    0x28: "AHPPIR",
    **{0xD0 + 4 * n: f"APR{n}" for n in range(4)},
    **{0xE0 + 4 * n: f"NSAPR{n}" for n in range(4)},
    0xFC: "IIDR",
    0x1000: "DIR",
}
GICC_IRQ = ("IAR", "EOIR", "HPPIR", "AIAR", "AEOIR", "AHPPIR", "DIR")
GICH_REGS = {
    0x00: "HCR",
    0x04: "VTR",
    0x08: "VMCR",
    0x10: "MISR",
    0x20: "EISR0",
    0x24: "EISR1",
    0x30: "ELRSR0",
    0x34: "ELRSR1",
    0xF0: "APR",
}

REGISTER_TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table(
            "hpet_reg",
            "HPET register access (region 'hpet')",
            (
                TID,
                _WRITE,
                _reg("GENERAL_CONFIG, TN_CMP, …; FSB = front-side-bus message"),
                _u8("timer", "comparator"),
                _flag("high", "true: the upper 32 bits of the register"),
                _VALUE,
                _SIZE,
                _flag("enable", "GENERAL_CONFIG bit 0: the counter runs"),
                _flag("legacy", "GENERAL_CONFIG bit 1: legacy replacement routes"),
                _flag("level", "TN_CONFIG bit 1: level triggered"),
                _flag("int_enable", "TN_CONFIG bit 2"),
                _flag("periodic", "TN_CONFIG bit 3"),
                _u8("route", "TN_CONFIG bits 13:9: IOAPIC pin"),
                _flag("fsb", "TN_CONFIG bit 14: message delivery"),
                _u8("vector", "TN_FSB_VALUE bits 7:0"),
                _u8("dest", "TN_FSB_ADDR bits 19:12: destination id of the message"),
                _u8("dest_mode", "TN_FSB_ADDR bit 2: 1 logical"),
            ),
        ),
        Table(
            "lapic_reg",
            "LAPIC register access; `cpu` is the CPU whose LAPIC it is (the thread's)",
            (
                TID,
                _WRITE,
                _OFFSET,
                _reg("EOI, ICR_LO, TIMER_INITIAL, …; OTHER if not named here"),
                _VALUE,
                _u8("vector", "ICR_LO and LVT_*: bits 7:0"),
                _u8("delivery_mode", "ICR_LO and LVT_*: bits 10:8"),
                _u8("dest_mode", "ICR_LO bit 11: 1 logical"),
                _u8("shorthand", "ICR_LO bits 19:18: 0 none, 1 self, 2 all, 3 all others"),
                _flag("masked", "LVT_* bit 16"),
                _u8("dest", "ICR_HI bits 31:24: destination id"),
            ),
        ),
        Table(
            "msi_write",
            "an interrupt message written to the LAPIC window by a device, or by the emulator on behalf of one",
            (
                TID,
                Column("by", pa.int16(), "CPU whose thread wrote it; -1: a device thread"),
                _u8("dest", "address bits 19:12"),
                _u8("dest_mode", "address bit 2: 1 logical"),
                _flag("redirect", "address bit 3: redirection hint"),
                _u8("vector", "data bits 7:0"),
                _u8("delivery_mode", "data bits 10:8"),
                _u8("level", "data bit 14"),
                _u8("trigger_mode", "data bit 15: 1 level"),
            ),
        ),
        Table(
            "ioapic_reg",
            "IOAPIC register access, the window resolved by the register selected",
            (
                TID,
                _WRITE,
                _reg("IOREGSEL, RTE_LO, RTE_HI, …"),
                _u8("pin", "RTE_*: pin"),
                _VALUE,
                _u8("vector", "RTE_LO bits 7:0; EOI: the vector"),
                _u8("delivery_mode", "RTE_LO bits 10:8"),
                _u8("dest_mode", "RTE_LO bit 11: 1 logical"),
                _flag("send_pending", "RTE_LO bit 12: delivery status"),
                _flag("active_low", "RTE_LO bit 13: polarity"),
                _flag("remote_irr", "RTE_LO bit 14"),
                _u8("trigger_mode", "RTE_LO bit 15: 1 level"),
                _flag("masked", "RTE_LO bit 16"),
                _u8("dest", "RTE_HI bits 31:24"),
            ),
        ),
        Table(
            "gicd_reg",
            "GIC distributor access; the interrupts below 32 are those of the accessing core",
            (
                TID,
                _WRITE,
                _OFFSET,
                _reg("ISENABLER, ITARGETSR, SGIR, …; OTHER if not named here"),
                _VALUE,
                _SIZE,
                _u16("irq_first", "first interrupt covered by this access"),
                _u16("irq_count", "interrupts covered"),
                _u8("sgi", "SGIR bits 3:0"),
                _u8("sgi_targets", "SGIR bits 23:16: mask of cores"),
                _u8("sgi_filter", "SGIR bits 25:24: 0 the mask, 1 all others, 2 self"),
            ),
        ),
        Table(
            "gicc_reg",
            "GIC CPU-interface access",
            (
                TID,
                _WRITE,
                _flag("virtual", "true: virtual CPU interface (GICV), a guest"),
                _u16("core", "core of the interface"),
                _OFFSET,
                _reg("IAR, EOIR, DIR, PMR, …; OTHER if not named here"),
                _VALUE,
                _u16("irq", "IAR, EOIR, HPPIR, DIR: bits 9:0 (1023 = none)"),
                _u8("source_cpu", "the same: bits 12:10, source core of an SGI"),
            ),
        ),
        Table(
            "gich_reg",
            "GIC hypervisor-interface access by the core of this thread",
            (
                TID,
                _WRITE,
                _OFFSET,
                _reg("HCR, VMCR, MISR, ELRSR0, APR, LR, …; OTHER if not named here"),
                _u8("lr", "LR: number of the list register"),
                _VALUE,
                _flag("enable", "HCR bit 0"),
                _flag("uie", "HCR bit 1: underflow interrupt enable"),
                _u8("eoi_count", "HCR bits 31:27"),
                _u16("virq", "LR bits 9:0: virtual id"),
                _u16("pirq", "LR bits 19:10 if HW: physical id"),
                _flag("eoi_maintenance", "LR bit 19 if not HW: maintenance interrupt on EOI"),
                _u8("source_cpu", "LR bits 12:10 if not HW: source of an SGI"),
                _u8("priority", "LR bits 27:23 (priority bits 7:3)"),
                _u8("state", "LR bits 29:28: 0 invalid, 1 pending, 2 active, 3 pending and active"),
                _flag("group1", "LR bit 30"),
                _flag("hw", "LR bit 31"),
            ),
        ),
    )
}
