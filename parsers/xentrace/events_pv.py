"""Records of the collector, of PV guests (class 0x020), memory, shadow paging, domains and guests.

Sources: xen/include/public/trace.h, xen/arch/x86/pv/trace.c, xen/arch/x86/mm/shadow/, xen/common/.
"""

from __future__ import annotations

from parsers.xentrace.layout import Event, IdBits, Layout, Version

__all__ = ["EVENTS"]

V3_3, V3_4, V4_0, V4_1, V4_2, V4_3, V4_7, V4_17, V4_18, V4_19, V4_21 = (
    (3, 3), (3, 4), (4, 0), (4, 1), (4, 2), (4, 3), (4, 7), (4, 17), (4, 18), (4, 19), (4, 21)
)  # fmt: skip

F_WIDE = 0x100
WIDE = IdBits("wide", 8)


def _pv(
    name: str, number: int, doc: str, narrow: str | None, wide: str | None,
    *, until: Version = (99, 0), notes: str = "",
) -> Event:  # fmt: skip
    """A PV record: a form for 32-bit guests, one under id bit 0x100 for 64-bit ones.

    Ids are 0x201xNN; until 4.2 they had no sub-class: 0x20fxNN.
    """
    layouts: list[Layout] = []
    ids: list[int] = []
    for fields, flag in ((narrow, 0), (wide, F_WIDE)):
        if fields is None:
            continue
        current, old = 0x201000 | flag | number, 0x20F000 | flag | number
        # Events that 4.3 dropped never had the new id, but a recording that has it is still read.
        ids.append(current)
        layouts.append(Layout(fields, V4_3, max(until, V4_3), ids=(current,)))
        ids.append(old)
        layouts.append(Layout(fields, V4_0, V4_2, ids=(old,)))
    return Event(name, tuple(ids), doc, tuple(layouts), id_bits=(WIDE,), notes=notes)


def _shadow(name: str, number: int, doc: str, *forms: tuple[str, str, str], notes: str = "") -> Event:
    """A shadow record: for each form the fields with 2, 3 and 4 paging levels; newest form first."""
    base = 0x40F000 | number
    ids = tuple(base | level << 8 for level in range(3))
    layouts = tuple(
        Layout(fields, *span, ids=(ids[level],))
        for form, span in zip(forms, _SHADOW_SPANS[len(forms)], strict=True)
        for level, fields in enumerate(form)
    )
    return Event(
        f"TRC_SHADOW_{name}", ids, doc, layouts,
        stamped="no", id_bits=(IdBits("levels", 8, 2, add=2),), notes=notes,
    )  # fmt: skip


_SHADOW_SPANS: dict[int, tuple[tuple[Version, Version], ...]] = {
    1: (((0, 0), (99, 0)),),
    2: ((V4_19, (99, 0)), ((0, 0), V4_18)),
}
_VA = ("va:32", "va:32", "va:64")
_GL1E = ("gl1e:32 va:32 flags:32", "gl1e:64 va:32 flags:32", "gl1e:64 va:64 flags:32")
_EMULATE = (
    "gl1e:32 write_val:32 va:32 flags:29 emul_count:3",
    "gl1e:64 write_val:64 va:32 flags:29 emul_count:3",
    "gl1e:64 write_val:64 va:64 flags:29 emul_count:3",
)
_UNSHADOW = (
    ("gfn:32 va:32 flags:32", "gfn:64 va:32 flags:32", "gfn:64 va:64 flags:32"),
    ("gfn:32 va:32", "gfn:64 va:32", "gfn:64 va:64"),
)


def _frame(name: str, number: int, doc: str) -> Event:
    return Event(f"TRC_SHADOW_{name}", (0x40F000 | number,), doc, (Layout("gfn:64"),), stamped="no")


def _mem(name: str, number: int, doc: str, head: str, old_tail: str) -> Event:
    """4.18 gave dom and order a word each; before they shared one and the next was undefined."""
    return Event(
        f"TRC_MEM_{name}", (0x10F000 | number,), doc,
        (Layout(f"{head} dom:32 order:32", V4_18), Layout(f"{head} {old_tail} _:32", V4_0, V4_17)),
        stamped="no", notes="The two forms are equally long: state the Xen version if it matters",
    )  # fmt: skip


EVENTS: tuple[Event, ...] = (
    Event("TRC_LOST_RECORDS", (0x1F001,), "The ring was full: records were dropped on this CPU",
          (Layout("lost_records:32 vcpu:16 dom:16 first_tsc:64", V3_4), Layout("lost_records:32", until=V3_3)),
          notes="Blind from first_tsc to the stamp of the record. dom/vcpu ran when the gap ended"),
    Event("TRC_TRACE_WRAP_BUFFER", (0x1F002,), "Filler up to the end of the ring", (Layout("filler:*"),),
          stamped="sometimes", notes="Its words are stale and are not kept"),
    Event("TRC_TRACE_CPU_CHANGE", (0x1F003,), "Written by the collector: a window of one CPU's records follows",
          (Layout("window_cpu:s32 window_bytes:32"),), stamped="no",
          notes="t_err_ns is null: when the collector wrote it is not known; it stands before the first record "
          "of its window"),
    Event("TRC_TRACE_IRQ", (0x1F004,), "An interrupt was handled; became TRC_HW_IRQ_HANDLED",
          (Layout("irq:32 tsc_in:32 tsc_out:32", V4_0, V4_1),)),
    Event("TRC_DOM0_DOM_ADD", (0x41001,), "A domain was created", (Layout("dom:32", V4_7),)),
    Event("TRC_DOM0_DOM_REM", (0x41002,), "A domain is gone", (Layout("dom:32", V4_7),)),
    # memory
    Event("TRC_MEM_PAGE_GRANT_MAP", (0x10F001,), "A grant was mapped", (Layout("granting_dom:32"),)),
    Event("TRC_MEM_PAGE_GRANT_UNMAP", (0x10F002,), "A grant was unmapped", (Layout("granting_dom:32"),)),
    Event("TRC_MEM_PAGE_GRANT_TRANSFER", (0x10F003,), "A page was given away", (Layout("dom:32"),)),
    Event("TRC_MEM_SET_P2M_ENTRY", (0x10F004,), "An entry of a p2m table was written",
          (Layout("gfn:64 mfn:64 p2mt:32 dom:16 order:16", V4_0),), stamped="no",
          notes="NPT and shadow only; the EPT path is not traced"),
    _mem("DECREASE_RESERVATION", 0x05, "A guest gave back an extent", "gfn:64", "dom:16 order:16"),
    _mem("POD_POPULATE", 0x10, "A page was populated on demand", "gfn:64 mfn:64", "dom:16 order:16"),
    _mem("POD_ZERO_RECLAIM", 0x11, "Zero pages were reclaimed", "gfn:64 mfn:64", "dom:16 order:16"),
    _mem("POD_SUPERPAGE_SPLINTER", 0x12, "A superpage was split", "gfn:64", "dom:16 _:16"),
    # PV
    _pv("TRC_PV_HYPERCALL", 0x01, "Hypercall entry, old form", "rip:32 eax:32", "rip:64 eax:32", until=V4_2),
    _pv("TRC_PV_TRAP", 0x03, "An exception was passed to a PV guest",
        "rip:32 trapnr:15 use_error_code:b1 error_code:16", "rip:64 trapnr:15 use_error_code:b1 error_code:16"),
    _pv("TRC_PV_PAGE_FAULT", 0x04, "A page fault was passed to a PV guest",
        "rip:32 va:32 error_code:32", "rip:64 va:64 error_code:32"),
    _pv("TRC_PV_FORCED_INVALID_OP", 0x05, "A PV guest executed the forced-emulation CPUID",
        "rip:32", "rip:64", notes="rip is the address after the instruction"),
    _pv("TRC_PV_EMULATE_PRIVOP", 0x06, "A privileged instruction was emulated", "rip:32", "rip:64",
        notes="rip is the address after the instruction"),
    _pv("TRC_PV_EMULATE_4GB", 0x07, "A 4-GiB segment was fixed up", "rip:32", None, until=V4_2),
    _pv("TRC_PV_MATH_STATE_RESTORE", 0x08, "FPU state was restored lazily", "", None, until=V4_21),
    _pv("TRC_PV_PAGING_FIXUP", 0x09, "A shadow or log-dirty fault was fixed silently",
        "rip:32 va:32", "rip:64 va:64"),
    _pv("TRC_PV_GDT_LDT_MAPPING_FAULT", 0x0A, "A page of the LDT was mapped on demand",
        "rip:32 ldt_offset:32", "rip:64 ldt_offset:64"),
    Event("TRC_PV_PTWR_EMULATION", (0x20100B, 0x20110B, 0x20F00B, 0x20F10B), "A page-table write was emulated",
          (Layout("pte:64 va:64 rip:64", V4_3, ids=(0x20110B,)),
           Layout("pte:64 va:64 rip:64", V4_0, V4_2, ids=(0x20F10B,)),
           Layout("pte:32 va:32 rip:32", ids=(0x20100B, 0x20F00B))),
          id_bits=(WIDE,), notes="The narrow form (2-level guests) was gone before 4.0"),
    _pv("TRC_PV_PTWR_EMULATION_PAE", 0x0C, "A page-table write of a 32-bit PAE guest was emulated",
        "pte:64 va:32 rip:32", None),
    Event("TRC_PV_HYPERCALL_V2", (0x20100D,), "Hypercall entry", (Layout("hypercall:*", V4_3),),
          notes="Arguments are recorded only for mmu_update, multicall, mmuext_op (a1 count), grant_table_op (a0 "
          "cmd, a2 count), vcpu_op (a0 cmd, a1 vcpu) and sched_op (a0 cmd)"),
    Event("TRC_PV_HYPERCALL_SUBCALL", (0x20200E,), "One entry of a multicall", (Layout("hypercall:*", V4_3),)),
    # shadow paging
    _shadow("NOT_SHADOW", 0x01, "The fault is the guest's own and is passed on", _GL1E),
    _shadow("FAST_PROPAGATE", 0x02, "Fast path: a not-present fault goes to the guest", _VA),
    _shadow("FAST_MMIO", 0x03, "Fast path: known MMIO address", _VA),
    _shadow("FALSE_FAST_PATH", 0x04, "The fast path met a stale marker", _VA),
    _shadow("MMIO", 0x05, "MMIO by the slow path", _VA),
    _shadow("FIXUP", 0x06, "A shadow entry was filled in", _GL1E),
    _shadow("DOMF_DYING", 0x07, "A fault of a dying domain", _VA),
    _shadow("EMULATE", 0x08, "A guest's page-table write was emulated", _EMULATE),
    _shadow("EMULATE_UNSHADOW_USER", 0x09, "A user-mode write made Xen unshadow the page", *_UNSHADOW),
    _shadow("EMULATE_UNSHADOW_EVTINJ", 0x0A, "A fault during event delivery unshadowed the page", *_UNSHADOW),
    _shadow("EMULATE_UNSHADOW_UNHANDLED", 0x0B, "The emulator gave up: the page was unshadowed", *_UNSHADOW),
    _frame("WRMAP_BF", 0x0C, "Brute-force search for writable mappings"),
    _frame("PREALLOC_UNPIN", 0x0D, "A top-level shadow was unpinned to free memory"),
    _frame("RESYNC_FULL", 0x0E, "An out-of-sync page was synchronised"),
    _frame("RESYNC_ONLY", 0x0F, "One out-of-sync page was kept, the others were synchronised"),
    Event("TRC_GUEST", tuple(0x800F000 | number for number in range(0x1000)),
          "An HVM guest inserted a record of its own (HVMOP_xentrace)", (Layout("words:*", V4_1),),
          stamped="no", id_bits=(IdBits("number", 0, 12),)),
)  # fmt: skip
