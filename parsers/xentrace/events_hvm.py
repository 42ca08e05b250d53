"""HVM records (class 0x008): entries and exits, intercept handlers, emulated timers and interrupt controllers.

Sources: xen/include/public/trace.h, xen/arch/x86/hvm/. Only entries, exits and emulated devices are stamped.
"""

from __future__ import annotations

from parsers.xentrace.layout import NEWEST, Event, IdBits, Layout, Version

__all__ = ["EVENTS"]

V4_1, V4_2, V4_3, V4_5, V4_11, V4_12, V4_13, V4_15, V4_18, V4_19 = (
    (4, 1), (4, 2), (4, 3), (4, 5), (4, 11), (4, 12), (4, 13), (4, 15), (4, 18), (4, 19)
)  # fmt: skip

WIDE = IdBits("wide", 8)
NESTED = IdBits("nested", 10)
F_WIDE, F_WRITE, F_NESTED = 0x100, 0x200, 0x400


def _handler(
    name: str, number: int, doc: str, fields: str = "", since: Version = (0, 0), notes: str = ""
) -> Event:
    """A handler record: one id, one form, no stamp."""
    layouts = (Layout(fields, since),)
    return Event(name, (0x82000 | number,), doc, layouts, stamped="no", notes=notes)


def _both(
    name: str, number: int, doc: str, narrow: str | None, wide: str,
    *, narrow_until: Version = NEWEST, since: Version = (0, 0), notes: str = "",
) -> Event:  # fmt: skip
    """A handler record with a 32-bit form and, under id bit 0x100, a 64-bit form."""
    base = 0x82000 | number
    layouts = [Layout(wide, since, ids=(base | F_WIDE,))]
    ids = [base | F_WIDE]
    if narrow is not None:
        layouts.append(Layout(narrow, since, narrow_until, ids=(base,)))
        ids.insert(0, base)
    return Event(name, tuple(ids), doc, tuple(layouts), stamped="no", id_bits=(WIDE,), notes=notes)


def _exit(name: str, number: int, doc: str, since: Version, notes: str) -> Event:
    base = 0x81000 | number
    return Event(
        name, (base, base | F_WIDE, base | F_NESTED, base | F_WIDE | F_NESTED), doc,
        (Layout("exit_reason:32 rip:32", since, ids=(base, base | F_NESTED)),
         Layout("exit_reason:32 rip:64", since, ids=(base | F_WIDE, base | F_WIDE | F_NESTED))),
        id_bits=(WIDE, NESTED), notes=notes,
    )  # fmt: skip


def _io(name: str, number: int, doc: str, where: str, notes: str = "") -> Event:
    """Port or memory access; the data words are missing if the data lie in guest memory."""
    base = 0x82000 | number
    return Event(
        name, (base, base | F_WIDE), doc,
        (Layout(f"{where}:32 data:32", ids=(base,)), Layout(f"{where}:32", ids=(base,)),
         Layout(f"{where}:64 data:64", ids=(base | F_WIDE,)), Layout(f"{where}:64", ids=(base | F_WIDE,))),
        stamped="no", id_bits=(WIDE,),
        notes="No data if they lie in guest memory; cut to 32 bits in the narrow form" + notes,
    )  # fmt: skip


def _emul(name: str, number: int, doc: str, fields: str = "", notes: str = "") -> Event:
    return Event(f"TRC_HVM_EMUL_{name}", (0x84000 | number,), doc, (Layout(fields, V4_5),), notes=notes)


I386 = "The 32-bit form only came from 32-bit hypervisors (until 4.2)"

EVENTS: tuple[Event, ...] = (
    Event("TRC_HVM_VMENTRY", (0x81001, 0x81401), "Last trace point before the guest runs", (Layout(""),),
          id_bits=(NESTED,), notes="The nested flag exists since 4.2, on SVM only"),
    _exit("TRC_HVM_VMEXIT", 2, "The guest was left", (0, 0),
          "VMX, and until 4.18 SVM too; named TRC_HVM_VMX_EXIT since 4.19. VMX: bit 31 of exit_reason is a failed "
          "entry, the low 16 bits are the basic reason"),
    _exit("TRC_HVM_SVM_EXIT", 3, "An SVM guest was left", V4_19, "The 64-bit exit code is cut to 32 bits"),
    _both("TRC_HVM_PF_XEN", 0x01, "A page fault that Xen handled itself",
          "error_code:32 va:32", "error_code:32 va:64", notes="Only if the shadow class is not traced"),
    _both("TRC_HVM_PF_INJECT", 0x02, "A page fault was queued for injection",
          "error_code:32 cr2:32", "error_code:32 cr2:64", narrow_until=V4_2, notes=I386),
    _handler("TRC_HVM_INJ_EXC", 0x03, "An exception was queued for injection", "vector:32 error_code:s32",
             notes="error_code -1: none"),
    _handler("TRC_HVM_INJ_VIRQ", 0x04, "A virtual interrupt was queued for injection", "vector:32 fake:32",
             notes="LAPIC without virtual interrupt delivery, PIC or callback vector. Nothing is written for LAPIC "
             "vectors if VMX virtual interrupt delivery is on"),
    _handler("TRC_HVM_REINJ_VIRQ", 0x05, "Reserved id, never written by 4.x", "vector:32"),
    _handler("TRC_HVM_IO_READ", 0x06, "Reserved id, never written by 4.x", "port:32 size_bytes:32"),
    _handler("TRC_HVM_IO_WRITE", 0x07, "Reserved id, never written by 4.x", "port:32 size_bytes:32"),
    _both("TRC_HVM_CR_READ", 0x08, "A control register was read", "cr:32 value:32", "cr:32 value:64",
          narrow_until=V4_2, notes="CR8 is the virtual TPR. " + I386),
    _both("TRC_HVM_CR_WRITE", 0x09, "A control register is about to be written", "cr:32 value:32",
          "cr:32 value:64", narrow_until=V4_2, notes="CR8 is the virtual TPR. " + I386),
    _handler("TRC_HVM_DR_READ", 0x0A, "Reserved id, never written by 4.x"),
    _handler("TRC_HVM_DR_WRITE", 0x0B, "The first access to a debug register was intercepted"),
    _handler("TRC_HVM_MSR_READ", 0x0C, "An MSR was read", "msr:32 value:64",
             notes="Also Xen's own reads while it handles a monitored write"),
    _handler("TRC_HVM_MSR_WRITE", 0x0D, "An MSR is about to be written", "msr:32 value:64",
             notes="x2APIC: 0x80b EOI, 0x830 ICR, 0x838 timer count; 0x6e0 TSC deadline"),
    Event("TRC_HVM_CPUID", (0x8200E,), "CPUID was executed",
          (Layout("leaf:32 subleaf:32 eax:32 ebx:32 ecx:32 edx:32", V4_13),
           Layout("leaf:32 eax:32 ebx:32 ecx:32 edx:32", until=V4_12)), stamped="no"),
    Event("TRC_HVM_INTR", (0x8200F,), "A physical interrupt made the guest exit",
          (Layout("vector:32"), Layout("")), stamped="no", notes="Without vector on SVM"),
    _handler("TRC_HVM_NMI", 0x10, "An NMI made the guest exit"),
    _handler("TRC_HVM_SMI", 0x11, "An SMI made the guest exit", notes="SVM only"),
    _handler("TRC_HVM_VMMCALL", 0x12, "A hypercall made the guest exit", "eax:32",
             notes="event_channel_op is 32; its sub-command is not recorded"),
    _handler("TRC_HVM_HLT", 0x13, "HLT was handled", "runnable:b32",
             notes="runnable: it did not sleep after all. Absent if an event was pending already or IF was 0"),
    _both("TRC_HVM_INVLPG", 0x14, "INVLPG made the guest exit", "is_invlpga:b32 va:32", "is_invlpga:b32 va:64",
          narrow_until=V4_2, notes=I386),
    _handler("TRC_HVM_MCE", 0x15, "A machine check made the guest exit"),
    _io("TRC_HVM_IOPORT_READ", 0x16, "An emulated port read completed", "port"),
    _io("TRC_HVM_IOPORT_WRITE", 0x16 | F_WRITE, "An emulated port write", "port"),
    _io("TRC_HVM_IOMEM_READ", 0x17, "An emulated MMIO read completed", "gpa",
        ". Pages: 0xfee00000 vLAPIC, 0xfec00000 vIOAPIC, 0xfed00000 vHPET"),
    _io("TRC_HVM_IOMEM_WRITE", 0x17 | F_WRITE, "An emulated MMIO write", "gpa",
        ". 0xfee000b0 is EOI, 0xfee00300 ICR"),
    _handler("TRC_HVM_CLTS", 0x18, "CLTS made the guest exit", notes="VMX only"),
    _both("TRC_HVM_LMSW", 0x19, "LMSW made the guest exit: resulting CR0", "value:32", "value:64",
          narrow_until=V4_2, notes="VMX only. " + I386),
    _handler("TRC_HVM_RDTSC", 0x1A, "An intercepted RDTSC: what the guest got", "eax:32 edx:32", V4_1),
    _handler("TRC_HVM_INTR_WINDOW", 0x20, "A pending interrupt cannot be injected yet",
             "vector:32 intr_source:32 queued_vector:s32",
             notes="intr_source: 0 none, 1 PIC, 2 LAPIC, 3 NMI, 4 MCE, 5 callback vector. queued_vector: already "
             "queued, -1 none. SVM writes it even when no VINTR is armed (NMI before IRET)"),
    _handler("TRC_HVM_NPF", 0x21, "A nested paging fault", "gpa:64 mfn:64 qualification:32 p2mt:32",
             notes="SVM: qualification is 0 and the record is written after handling, on VMX before"),
    _handler("TRC_HVM_REALMODE_EMULATE", 0x22, "Real-mode code goes to the emulator", "", V4_2, "VMX only"),
    _handler("TRC_HVM_TRAP", 0x23, "An exception made the guest exit", "vector:32", V4_2,
             "SVM: only vector 17, since 4.3"),
    _handler("TRC_HVM_TRAP_DEBUG", 0x24, "#DB made the guest exit", "exit_qualification:32", V4_2,
             "VMX only; cut to 32 bits"),
    _handler("TRC_HVM_VLAPIC", 0x25, "The guest wrote EOI through the APIC access page", "", V4_2,
             "VMX only; written after the EOI was processed; the vector is not recorded"),
    _both("TRC_HVM_XCR_READ", 0x26, "XGETBV was emulated", None, "xcr:32 value:64", since=V4_11),
    _both("TRC_HVM_XCR_WRITE", 0x27, "XSETBV was emulated", None, "xcr:32 value:64", since=V4_11),
    Event("TRC_HVM_OP_DESTROY_PROC", (0x82100,), "Guest page tables go away, in private builds",
          (Layout("words:*"),), stamped="sometimes", notes="No released hypervisor writes it"),
    _emul("HPET_START_TIMER", 1, "A comparator of the virtual HPET was armed",
          "timer:32 irq:32 delta_ns:64 period_ns:64", "Says nothing about the physical HPET"),
    _emul("PIT_START_TIMER", 2, "Channel 0 of the virtual PIT was armed", "delta_ns:32 period_ns:32",
          "period_ns 0: one-shot"),
    _emul("RTC_START_TIMER", 3, "The virtual RTC's periodic timer was armed", "delta_ns:32 period_ns:32"),
    _emul("LAPIC_START_TIMER", 4, "The virtual LAPIC timer was armed",
          "delta_ns:64 period_ns:64 vector:32"),
    _emul("HPET_STOP_TIMER", 5, "A comparator of the virtual HPET was disarmed", "timer:32"),
    _emul("PIT_STOP_TIMER", 6, "The virtual PIT was disarmed"),
    _emul("RTC_STOP_TIMER", 7, "The virtual RTC's periodic timer was disarmed"),
    _emul("LAPIC_STOP_TIMER", 8, "The virtual LAPIC timer was disarmed"),
    _emul("PIT_TIMER_CB", 9, "A tick of the virtual PIT was injected"),
    _emul("LAPIC_TIMER_CB", 10, "A periodic tick of the virtual LAPIC was injected",
          notes="None for one-shot and TSC deadline"),
    _emul("PIC_INT_OUTPUT", 11, "The virtual 8259 looks at its INT line again",
          "int_output_before:32 is_master:b32 irq:s32", "irq -1: none"),
    _emul("PIC_KICK", 12, "The virtual 8259 kicks its vCPU", "irq:s32"),
    _emul("PIC_INTACK", 13, "The virtual 8259 acknowledges", "is_master:b32 irq:32"),
    _emul("PIC_POSEDGE", 14, "Rising edge on a pin of the virtual 8259", "irq:32"),
    _emul("PIC_NEGEDGE", 15, "Falling edge on a pin of the virtual 8259", "irq:32"),
    _emul("PIC_PEND_IRQ_CALL", 16, "The injection path asks the virtual 8259", "accept:32 int_output:32"),
    _emul("LAPIC_PIC_INTR", 17, "Does this vLAPIC take ExtINT?", "is_8259_target:32 accept:s32",
          "accept may be -1 until 4.15"),
)  # fmt: skip
