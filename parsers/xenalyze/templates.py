"""The lines of the classic `xentrace_format` with its stock formats file, declared as data.

For each name: the event ids that are printed under it, and where the printed values come from, in the order of
printing: `h1` word 1 in hexadecimal, `d1` in decimal, `H21` sixteen hexadecimal digits (word 2, then word 1), `q12`
eight digits (low halves of words 1 and 2). Values follow a "=" unless a pattern for them is given. Where a name has
several ids, the number and the width of the values tell. The words are decoded with the binary layouts and labels are
not believed: from 0x22212 on the stock file names credit2's records one id too early, and the labels of the vector
records are shifted by one word.
Facts: the stock formats file of Xen 4.17 (removed in 4.19).
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BY_NAME", "LABEL_ERRORS", "Template"]


@dataclass(frozen=True, slots=True)
class Template:
    """A name, one event id printed under it, the origin of the values, and how values are found if not by "="."""

    name: str
    event: int
    slots: tuple[str, ...]
    pattern: str = r"= ?(?:0x)?([0-9a-f]+)"


_STATES = ("running", "runnable", "blocked", "offline")
_BARE = r"0x([0-9a-f]+)"

#: name, id, slots, special pattern
_ROWS: tuple[tuple[str, int, str] | tuple[str, int, str, str], ...] = (
    ("lost_records", 0x1F001, "h1", _BARE),
    ("wrap_buffer", 0x1F002, "", _BARE),
    ("cpu_change", 0x1F003, "h1", _BARE),
    *(
        (f"{a}_to_{b}", 0x21001 | i << 8 | j << 4, "h1")
        for i, a in enumerate(_STATES)
        for j, b in enumerate(_STATES)
        if i != j
    ),
    ("continue_running", 0x21002, "h1"),
    ("sched_add_domain", 0x28001, "h1"),
    ("sched_rem_domain", 0x28002, "h1"),
    ("domain_sleep", 0x28003, "q12"),
    ("domain_wake", 0x28004, "q12"),
    ("do_yield", 0x28005, "q12"),
    ("do_block", 0x28006, "q12"),
    ("domain_shutdown", 0x28007, "q12 h3"),
    ("sched_ctl", 0x28008, ""),
    ("sched_adjdom", 0x28009, "h1"),
    ("__enter_scheduler", 0x2800A, "q12 q34"),
    ("s_timer_fn", 0x2800B, ""),
    ("t_timer_fn", 0x2800C, ""),
    ("dom_timer_fn", 0x2800D, ""),
    ("switch_infprev", 0x2800E, "q12 d3"),
    ("switch_infnext", 0x2800F, "q12 d3 d4"),
    ("domain_shutdown_code", 0x28010, "q12 h3"),
    ("switch_infcont", 0x28011, "q12 d3 d4"),
    ("csched:sched_tasklet", 0x22001, ""),
    ("csched:account_start", 0x22002, "q12 d3"),
    ("csched:account_stop", 0x22003, "q12 d3"),
    ("csched:stolen_vcpu", 0x22004, "q23 d1"),
    ("csched:picked_cpu", 0x22005, "q12 d3"),
    ("csched:tickle", 0x22006, "d1"),
    ("csched:boost", 0x22007, "q12"),
    ("csched:unboost", 0x22008, "q12"),
    ("csched:schedule", 0x22009, "h1"),
    ("csched:ratelimit", 0x2200A, "h1 d2"),
    ("csched:steal_check", 0x2200B, "d1 d2"),
    ("csched2:tick", 0x22201, ""),
    ("csched2:runq_pos", 0x22202, "h1 d2"),
    ("csched2:credit burn", 0x22203, "h1 d2 d3 d4"),
    ("csched2:credit_add", 0x22204, ""),
    ("csched2:tickle_check", 0x22205, "h1 d2 d3"),
    ("csched2:tickle", 0x22206, "d1"),
    ("csched2:credit_reset", 0x22207, "h1 d2 d3"),
    ("csched2:sched_tasklet", 0x22208, ""),
    ("csched2:update_load", 0x22209, ""),
    ("csched2:runq_assign", 0x2220A, "h1 d2"),
    ("csched2:updt_vcpu_load", 0x2220B, "h3 H21 d4"),
    ("csched2:updt_runq_load", 0x2220C, "h5 H21 H43"),
    ("csched2:tickle_new", 0x2220D, "h1 d2 d3"),
    ("csched2:runq_max_weight", 0x2220E, "h1"),
    ("csched2:migrrate", 0x2220F, "h1 h2"),
    ("csched2:load_check", 0x22210, "h1 d2"),
    ("csched2:load_balance", 0x22211, "H21 H43 h5"),
    ("csched2:pick_cpu", 0x22212, "H21 h3 d4"),
    ("csched2:runq_candidate", 0x22213, "h1 d3 d2"),
    ("csched2:schedule", 0x22214, "h1 h2"),
    ("csched2:ratelimit", 0x22215, "h1 d2"),
    ("csched2:runq_cand_chk", 0x22216, "h1"),
    ("rtds:tickle", 0x22801, "d1"),
    ("rtds:runq_pick", 0x22802, "h1 H32 H54"),
    ("rtds:burn_budget", 0x22803, "h1 H32 d4"),
    ("rtds:repl_budget", 0x22804, "h1 H32 H54"),
    ("rtds:sched_tasklet", 0x22805, ""),
    ("rtds:schedule", 0x22806, "h1"),
    ("null:pick_cpu", 0x22A01, "h1 d2"),
    ("null:assign", 0x22A02, "h1 d2"),
    ("null:deassign", 0x22A03, "h1 d2"),
    ("null:migrate", 0x22A04, "h1 h2"),
    ("null:schedule", 0x22A05, "h1 h2"),
    ("null:sched_tasklet", 0x22A06, ""),
    ("domain_create", 0x41001, "h1"),
    ("domain_destroy", 0x41002, "h1"),
    ("VMENTRY", 0x81001, ""),
    ("VMEXIT", 0x81002, "h1 h2"),
    ("VMEXIT", 0x81102, "h1 H32"),
    ("nVMENTRY", 0x81401, ""),
    ("nVMEXIT", 0x81402, "h1 h2"),
    ("nVMEXIT", 0x81502, "h1 H32"),
    # PF_XEN: address and error code stand under each other's label
    ("PF_XEN", 0x82001, "h2 h1"),
    ("PF_XEN", 0x82101, "h3 H21"),
    ("PF_INJECT", 0x82002, "h1 h2"),
    ("PF_INJECT", 0x82102, "h1 H32"),
    ("INJ_EXC", 0x82003, "h1 h2"),
    ("INJ_VIRQ", 0x82004, "h1 d2"),
    ("REINJ_VIRQ", 0x82005, "h1"),
    ("IO_READ", 0x82006, "h1 d2"),
    ("IO_WRITE", 0x82007, "h1 d2"),
    ("CR_READ", 0x82008, "d1 h2"),
    ("CR_READ", 0x82108, "d1 H32"),
    ("CR_WRITE", 0x82009, "d1 h2"),
    ("CR_WRITE", 0x82109, "d1 H32"),
    ("DR_READ", 0x8200A, ""),
    ("DR_WRITE", 0x8200B, ""),
    ("MSR_READ", 0x8200C, "h1 H32"),
    ("MSR_WRITE", 0x8200D, "h1 H32"),
    ("CPUID", 0x8200E, "h1 h2 h3 h4 h5"),
    ("INTR", 0x8200F, "h1"),
    ("NMI", 0x82010, ""),
    ("SMI", 0x82011, ""),
    ("VMMCALL", 0x82012, "h1"),
    ("HLT", 0x82013, "d1"),
    ("INVLPG", 0x82014, "d1 h2"),
    ("INVLPG", 0x82114, "d1 H32"),
    ("MCE", 0x82015, ""),
    ("IOPORT_READ", 0x82016, "h1 h2"),
    ("IOPORT_WRITE", 0x82216, "h1 h2"),
    ("MMIO_READ", 0x82017, "h1 h2"),
    ("MMIO_WRITE", 0x82217, "h1 h2"),
    ("CLTS", 0x82018, ""),
    ("LMSW", 0x82019, "h1"),
    ("LMSW", 0x82119, "H21"),
    ("RDTSC", 0x8201A, "H21"),
    ("INTR_WINDOW", 0x82020, "h1"),
    ("NPF", 0x82021, "H21 H43 h5 h6"),
    ("TRAP", 0x82023, "h1"),
    ("page_grant_map", 0x10F001, "d1"),
    ("page_grant_unmap", 0x10F002, "d1"),
    ("page_grant_transfer", 0x10F003, "d1"),
    ("hypercall", 0x20100D, "h1"),
    ("hypercall", 0x201001, "h1 h2"),
    ("hypercall", 0x201101, "H21 h3"),
    ("trap", 0x201003, "h1 h2"),
    ("trap", 0x201103, "H21 h3"),
    ("page_fault", 0x201004, "h1 h2 h3"),
    ("page_fault", 0x201104, "H21 H43 h5"),
    ("forced_invalid_op", 0x201005, "h1"),
    ("forced_invalid_op", 0x201105, "H21"),
    ("emulate_privop", 0x201006, "h1"),
    ("emulate_privop", 0x201106, "H21"),
    ("emulate_4G", 0x201007, "h1"),
    ("math_state_restore", 0x201008, ""),
    ("paging_fixup", 0x201009, "h1 h2"),
    ("paging_fixup", 0x201109, "H21 H43"),
    ("gdt_ldt_mapping_fault", 0x20100A, "h1 h2"),
    ("gdt_ldt_mapping_fault", 0x20110A, "H21 H43"),
    ("ptwr_emulation", 0x20110B, "H43 H65 H21"),
    ("ptwr_emulation_pae", 0x20100C, "h3 h4 H21"),
    ("cpu_freq_change", 0x801001, "d1 d2", r"(\d+)MHz"),
    ("cpu_idle_entry", 0x801002, "d1 d2 d3 d4", r"(?:-> C|tick = |expected = |predicted = )(\d+)"),
    ("cpu_idle_exit", 0x801003, "d1 d2 d3 d4 d5 d6", r"(?:\[ C|tick = |irq = | )(\d+)"),
    ("cleanup_move_delayed", 0x802001, "d1 h2 d3", r"(?:irq = |vector 0x|CPU)([0-9a-f]+)"),
    ("cleanup_move", 0x802002, "d1 h2 d3", r"(?:irq = |vector 0x|CPU)([0-9a-f]+)"),
    ("bind_vector", 0x802003, "d1 h2 h3", r"(?:irq = |vector 0x|mask: 0x)([0-9a-f]+)"),
    ("clear_vector", 0x802004, "d1 h2 h3", r"(?:irq = |vector 0x|mask: 0x)([0-9a-f]+)"),
    ("move_vector", 0x802005, "d1 h2 d3", r"(?:irq = |vector 0x|CPU)([0-9a-f]+)"),
    ("assign_vector", 0x802006, "d1 h2 h3", r"(?:irq = |vector 0x|mask: 0x)([0-9a-f]+)"),
    ("bogus_vector", 0x802007, "h1", _BARE),
    ("do_irq", 0x802008, "d1 d2 d3", r"= (\d+)"),
)

BY_NAME: dict[str, list[Template]] = {}
for _name, _event, _slots, *_pattern in _ROWS:
    BY_NAME.setdefault(_name, []).append(Template(_name, _event, tuple(_slots.split()), *_pattern))

#: Events whose printed label is wrong; their words are right.
LABEL_ERRORS = frozenset(
    {*range(0x22212, 0x22217), 0x82001, 0x82101, 0x22806, 0x802003, 0x802004, 0x802006, 0x802008, 0x801002, 0x801003}
)
