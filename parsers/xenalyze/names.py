"""Names that xenalyze prints instead of numbers."""

from __future__ import annotations

__all__ = ["HANDLERS", "PV_NAMES", "RUNSTATES", "SCHED_OPS", "SVM_EXITS", "VCPU_OPS", "VMX_EXITS"]

RUNSTATES = {"running": 0, "runnable": 1, "blocked": 2, "offline": 3}
#: HVM handlers that xenalyze prints as `name[64] [ words ]`: number of the event.
HANDLERS = {
    "pf_xen": 0x01,
    "pf_inject": 0x02,
    "inj_exc": 0x03,
    "inj_virq": 0x04,
    "reinj_virq": 0x05,
    "io_read": 0x06,
    "io_write": 0x07,
    "cr_read": 0x08,
    "cr_write": 0x09,
    "dr_read": 0x0A,
    "dr_write": 0x0B,
    "msr_read": 0x0C,
    "msr_write": 0x0D,
    "cpuid": 0x0E,
    "intr": 0x0F,
    "nmi": 0x10,
    "smi": 0x11,
    "vmmcall": 0x12,
    "hlt": 0x13,
    "invlpg": 0x14,
    "mce": 0x15,
    "clts": 0x18,
    "lmsw": 0x19,
    "rdtsc": 0x1A,
    "intr_window": 0x20,
    "npf": 0x21,
    "realmode_emulate": 0x22,
    "trap": 0x23,
    "trap_debug": 0x24,
    "vlapic": 0x25,
    "xcr_read": 0x26,
    "xcr_write": 0x27,
}
#: PV records that xenalyze prints as `name[ words ]`.
PV_NAMES = {
    "page_fault": 0x04,
    "forced_invalid_op": 0x05,
    "emulate privop": 0x06,
    "emulate_privop": 0x06,
    "emulate_4g": 0x07,
    "math_state_restore": 0x08,
    "paging_fixup": 0x09,
    "gdt_ldt_mapping_fault": 0x0A,
    "ptwr": 0x0B,
    "ptwr_emulation": 0x0B,
    "ptwr_emulation_pae": 0x0C,
}
VCPU_OPS = {
    "initialise": 0,
    "up": 1,
    "down": 2,
    "is_up": 3,
    "get_runstate_info": 4,
    "register_runstate_memory_area": 5,
    "set_periodic_timer": 6,
    "stop_periodic_timer": 7,
    "set_singleshot_timer": 8,
    "stop_singleshot_timer": 9,
    "register_vcpu_info": 10,
    "send_nmi": 11,
}
SCHED_OPS = {"yield": 0, "block": 1, "shutdown": 2, "poll": 3, "remote_shutdown": 4, "shutdown_code": 5, "watchdog": 6}

_EXCEPTIONS = (
    "DE",
    "DB",
    "NMI",
    "BP",
    "OF",
    "BR",
    "UD",
    "NM",
    "DF",
    "09",
    "TS",
    "NP",
    "SS",
    "GP",
    "PF",
    "15",
    "MF",
    "AC",
    "MC",
    "XF",
)
_SVM_AT_60 = (
    "INTR NMI SMI INIT VINTR CR0_SEL_WRITE IDTR_READ GDTR_READ LDTR_READ TR_READ IDTR_WRITE GDTR_WRITE"
    " LDTR_WRITE TR_WRITE RDTSC RDPMC"
    " PUSHF POPF CPUID RSM IRET SWINT INVD PAUSE HLT INVLPG INVLPGA IOIO MSR TASK_SWITCH FERR_FREEZE SHUTDOWN"
    " VMRUN VMMCALL VMLOAD VMSAVE"
    " STGI CLGI SKINIT RDTSCP ICEBP WBINVD MONITOR MWAIT MWAIT_CONDITIONAL XSETBV"
)
#: AMD APM volume 2, appendix C.
SVM_EXITS = {
    **{f"VMEXIT_{name}": 0x60 + i for i, name in enumerate(_SVM_AT_60.split())},
    **{f"VMEXIT_EXCEPTION_{name}": 0x40 + i for i, name in enumerate(_EXCEPTIONS)},
    **{f"VMEXIT_CR{i}_READ": i for i in range(16)},
    **{f"VMEXIT_CR{i}_WRITE": 0x10 + i for i in range(16)},
    **{f"VMEXIT_DR{i}_READ": 0x20 + i for i in range(16)},
    **{f"VMEXIT_DR{i}_WRITE": 0x30 + i for i in range(16)},
    "VMEXIT_NPF": 0x400,
    "VMEXIT_INVALID": 0xFFFFFFFF,
}
_VMX = (
    "EXCEPTION_NMI EXTERNAL_INTERRUPT TRIPLE_FAULT INIT SIPI IO_SMI OTHER_SMI PENDING_VIRT_INTR"
    " PENDING_VIRT_NMI TASK_SWITCH CPUID GETSEC"
    " HLT INVD INVLPG RDPMC RDTSC RSM VMCALL VMCLEAR VMLAUNCH VMPTRLD VMPTRST VMREAD VMRESUME VMWRITE"
    " VMXOFF VMXON CR_ACCESS DR_ACCESS"
    " IO_INSTRUCTION MSR_READ MSR_WRITE INVALID_GUEST_STATE MSR_LOADING . MWAIT_INSTRUCTION"
    " MONITOR_TRAP_FLAG . MONITOR_INSTRUCTION"
    " PAUSE_INSTRUCTION MCE_DURING_VMENTRY . TPR_BELOW_THRESHOLD APIC_ACCESS . . . EPT_VIOLATION"
    " EPT_MISCONFIG INVEPT RDTSCP"
    " VMX_PREEMPTION_TIMER_EXPIRED INVVPID WBINVD XSETBV"
)
#: Intel SDM volume 3, appendix C; reasons that have no name here are numbers in the dump.
VMX_EXITS = {name: code for code, name in enumerate(_VMX.split()) if name != "."}
