"""The lines of `xenalyze --dump-all`, declared as data: text template → record table and columns.

A template names the columns of the binary reader's table: `{column:type}`. Types: `d` decimal (a negative number in
an unsigned column is taken modulo 2^32), `x` hexadecimal, `u` a time `A.Bus` (B is unpadded nanoseconds: 12.7us is
12,007 ns), `r` a runstate, `e` an exit reason by name or in hexadecimal, `w` a word, `~` a value without column.
`__yes`, `__word`, `__not` after a name make a flag of a word. Regular-expression syntax outside the braces.
`{w0:x}` … `{w6:x}` are payload words, decoded with the binary layouts: for lines whose labels are wrong.
Facts: the project's notes on xenalyze.c (Xen 4.6–4.23).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

__all__ = ["PATTERNS", "Pattern"]

_TYPES = {
    "d": r"-?\d{1,20}",
    "x": r"[0-9a-f]{1,16}",
    "r": r"running|runnable|blocked|offline",
    "e": r"[A-Za-z0-9_]+",
    "w": r"\w+",
    "~": r"[^,]*?",
}
_FIELD = re.compile(r"\{(\w+):([dxurew~])\}")


@dataclass(frozen=True)
class Pattern:
    """One kind of line. `event` is the id as recorded, None if the text does not tell."""

    table: str
    event: int | None
    template: str
    error: str = ""  # what xenalyze prints wrongly and this reader puts right, or cannot

    @cached_property
    def key(self) -> str:
        """The first word, by which lines are sorted before they are matched."""
        return re.match(r" ?[\w:]+", self.template)[0].strip()  # type: ignore[index]

    @cached_property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """(column, type) in order."""
        return tuple(_FIELD.findall(self.template))

    @cached_property
    def regex(self) -> str:
        """Regular expression of the whole text; a time gives two groups, `NAME__a` and `NAME__b`."""

        def group(match: re.Match[str]) -> str:
            if match[2] == "u":
                return rf"(?P<{match[1]}__a>\d{{1,16}})\.(?P<{match[1]}__b>\d{{1,3}})us"
            return f"(?P<{match[1]}>{_TYPES[match[2]]})"

        return "^" + _FIELD.sub(group, self.template) + r"\s*$"


_P = Pattern
_U = r"d{dom:d}v{unit:d}"  # a scheduling unit
_V = r"d{dom:d}v{vcpu:d}"
_BIND = r"irq {w0:x} vec {w1:x} mask {w5:x} {w4:x} {w3:x} {w2:x}"
_BIND_ERROR = "irq, vector and mask words stand under wrong labels; the highest mask word is lost"
_LOAD = r"\d+\.\d+%% \({%s:d}\)"

PATTERNS: tuple[Pattern, ...] = (
    _P(
        "TRC_LOST_RECORDS",
        0x1F001,
        r"lost_records count {lost_records:d} d{dom:d}v{vcpu:d} \(cur {cur:~}\) first_tsc {first_tsc:d}",
        "the time is the end of the gap although the line stands at its start",
    ),
    # scheduler
    _P(
        "TRC_SCHED_RUNSTATE_CHANGE",
        None,
        rf"runstate_change (?:\{{{{p1:d}},{{p2:d}}\}} )?{_V} {{old_state:r}}->{{new_state:r}}",
    ),
    _P("TRC_SCHED_CONTINUE_RUNNING", 0x21002, rf"runstate_continue (?:\{{[^}}]*\}} )?{_V} running->running"),
    _P("TRC_SCHED_SWITCH", 0x2800A, r"sched_switch prev d{prev_dom:d}v{prev_unit:d} next d{next_dom:d}v{next_unit:d}"),
    _P("TRC_SCHED_SWITCH_INFPREV", 0x2800E, rf"sched_switch prev {_U}, run for {{ran_ns:u}}"),
    _P(
        "TRC_SCHED_SWITCH_INFNEXT",
        0x2800F,
        rf"sched_switch next {_U}(?:, was runnable for {{runnable_ns:u}})?(?:, next slice {{slice_ns:u}})?",
        "a slice of -1 is not printed",
    ),
    _P(
        "TRC_SCHED_SWITCH_INFCONT",
        0x28011,
        rf"sched_switch continue {_U}, run for {{ran_ns:u}}(?:, next slice {{slice_ns:u}})?",
    ),
    _P("TRC_SCHED_SLEEP", 0x28003, rf"vcpu_sleep {_V}"),
    _P("TRC_SCHED_WAKE", 0x28004, rf"vcpu_wake {_V}"),
    _P("TRC_SCHED_YIELD", 0x28005, rf"vcpu_yield {_V}"),
    _P("TRC_SCHED_BLOCK", 0x28006, rf"vcpu_block {_V}"),
    _P("TRC_SCHED_DOM_ADD", 0x28001, r"sched_init_domain d\s*{dom:d}"),
    _P("TRC_SCHED_DOM_REM", 0x28002, r"sched_destroy_domain d\s*{dom:d}"),
    _P("TRC_SCHED_ADJDOM", 0x28009, r"sched_adjust d\s*{dom:d}"),
    _P("TRC_SCHED_SHUTDOWN", 0x28007, rf"sched_shutdown {_V}, reason = {{reason:d}}"),
    _P("TRC_SCHED_SHUTDOWN_CODE", 0x28010, rf"sched_shutdown_code {_V}, reason = {{reason:d}}"),
    # credit
    _P("TRC_CSCHED_SCHED_TASKLET", 0x22001, r"csched:sched_tasklet"),
    _P("TRC_CSCHED_ACCOUNT_START", 0x22002, rf"csched:acct_start {_U}, active_vcpus {{active_units:d}}"),
    _P("TRC_CSCHED_ACCOUNT_STOP", 0x22003, rf"csched:acct_stop {_U}, active_vcpus {{active_units:d}}"),
    _P("TRC_CSCHED_STOLEN_UNIT", 0x22004, rf"csched:stolen_vcpu {_U} from cpu {{peer_cpu:d}}"),
    _P("TRC_CSCHED_PICKED_CPU", 0x22005, rf"csched:pick_cpu {{new_cpu:d}} for {_U}"),
    _P("TRC_CSCHED_TICKLE", 0x22006, r"csched:runq_tickle, cpu {target_cpu:d}"),
    _P("TRC_CSCHED_BOOST_START", 0x22007, rf"csched: {_U} boosted"),
    _P("TRC_CSCHED_BOOST_END", 0x22008, rf"csched: {_U} unboosted"),
    _P(
        "TRC_CSCHED_SCHEDULE",
        0x22009,
        r"csched:schedule cpu {on_cpu:d}(?:, {tasklet__yes:w} scheduled)?, {idle__word:w}",
    ),
    _P("TRC_CSCHED_RATELIMIT", 0x2200A, rf"csched:ratelimit, {_U} run only {{ran_ns:u}}"),
    _P("TRC_CSCHED_STEAL_CHECK", 0x2200B, r"csched:load_balance {checked__word:w} {peer_cpu:d}"),
    # credit2
    _P("TRC_CSCHED2_RUNQ_POS", 0x22202, rf"csched2:runq_insert {_U}, position {{pos:d}}"),
    _P(
        "TRC_CSCHED2_CREDIT_BURN",
        0x22203,
        rf"csched2:burn_credits {_U}, credit = {{credit:d}}, (?:budget = {{budget:d}}, )?delta = {{delta:d}}",
    ),
    _P(
        "TRC_CSCHED2_TICKLE_CHECK",
        0x22205,
        rf"csched2:tickle_check {_U}, credit = {{credit:d}}(?:, score = {{score:d}})?.*",
    ),
    _P("TRC_CSCHED2_TICKLE", 0x22206, r"csched2:runq_tickle cpu {target_cpu:d}"),
    _P(
        "TRC_CSCHED2_CREDIT_RESET",
        0x22207,
        rf"csched2:reset_credits {_U}, credit_start = {{credit_start:d}}, credit_end = {{credit_end:d}}(?:,"
        rf" mult = {{multiplier:d}})?",
    ),
    _P("TRC_CSCHED2_SCHED_TASKLET", 0x22208, r"csched2:sched_tasklet"),
    _P("TRC_CSCHED2_UPDATE_LOAD", 0x22209, r"csched2:update_load"),
    _P("TRC_CSCHED2_RUNQ_ASSIGN", 0x2220A, rf"csched2:runq_assign {_U} on rq# {{rqi:d}}"),
    _P("TRC_CSCHED2_UPDATE_UNIT_LOAD", 0x2220B, rf"csched2:update_vcpu_load {_U}, vcpu_load = {_LOAD % 'avgload'}"),
    _P(
        "TRC_CSCHED2_UPDATE_RUNQ_LOAD",
        0x2220C,
        rf"csched2:update_rq_load rq# {{rq_id:d}}, load = {{rq_load:d}}, avgload = {_LOAD % 'rq_avgload'},"
        rf" b_avgload = {_LOAD % 'b_avgload'}",
    ),
    _P(
        "TRC_CSCHED2_TICKLE_NEW",
        0x2220D,
        rf"csched2:runq_tickle_new {_U}, processor = {{on_cpu:d}},? credit = {{credit:d}}",
    ),
    _P("TRC_CSCHED2_RUNQ_MAX_WEIGHT", 0x2220E, r"csched2:update_max_weight rq# {rqi:d}, max_weight = {max_weight:d}"),
    _P("TRC_CSCHED2_MIGRATE", 0x2220F, rf"csched2:migrate {_U} rq# {{from_rq:d}} --> rq# {{to_rq:d}}"),
    _P(
        "TRC_CSCHED2_LOAD_CHECK",
        0x22210,
        r"csched2:load_balance_check lrq# {local_rq:d}, orq# {other_rq:d}, delta = {load_delta:d}",
    ),
    _P("TRC_CSCHED2_PICKED_CPU", 0x22213, rf"csched2:picked_cpu {_U},? rq# {{rq_id:d}},? cpu {{new_cpu:d}}.*"),
    _P(
        "TRC_CSCHED2_RUNQ_CANDIDATE",
        0x22214,
        rf"csched2:runq_candidate {_U}, credit = {{credit:d}}, (?:no cpu was tickled|cpu {{tickled_cpu:d}}"
        rf" was tickled)",
    ),
    _P(
        "TRC_CSCHED2_SCHEDULE",
        0x22215,
        r"csched2:schedule cpu {on_cpu:d}, rq# {rq_id:d}(?:, {tasklet__yes:w} scheduled)?, {idle__word:w}(?:,"
        r" SMT {smt_idle__word:w})?, {tickled__not:w}(?: tickled)?",
    ),
    _P("TRC_CSCHED2_RATELIMIT", 0x22216, rf"csched2:ratelimit, {_U} run only {{ran_ns:u}}"),
    _P("TRC_CSCHED2_RUNQ_CAND_CHECK", 0x22217, rf"csched2:runq_cand_check {_U}"),
    # RTDS: the schedule record's idle and tickled are swapped in the text
    _P("TRC_RTDS_TICKLE", 0x22801, r"rtds:runq_tickle cpu {target_cpu:d}"),
    _P("TRC_RTDS_RUNQ_PICK", 0x22802, rf"rtds:runq_pick {_U}, deadline = {{deadline_ns:d}}, budget = {{budget_ns:d}}"),
    _P(
        "TRC_RTDS_BUDGET_BURN",
        0x22803,
        rf"rtds:burn_budget {_U}, budget = {{budget_ns:d}}, delta = {{delta_ns:d}}",
        "priority and extratime are not printed",
    ),
    _P(
        "TRC_RTDS_BUDGET_REPLENISH",
        0x22804,
        rf"rtds:repl_budget {_U},(?: deadline = {{deadline_ns:d}}, budget = {{budget_ns:d}},)?"
        rf" priority(?:_level)? = {{priority_level:d}}.*",
    ),
    _P("TRC_RTDS_SCHED_TASKLET", 0x22805, r"rtds:sched_tasklet"),
    _P(
        "TRC_RTDS_SCHEDULE",
        0x22806,
        r"rtds:schedule cpu {on_cpu:d},(?:, {tasklet__yes:w} scheduled)?,? {tickled__word:w},"
        r" {idle__not:w}(?: tickled)?",
        "idle and tickled are swapped",
    ),
    # null
    _P("TRC_SNULL_PICKED_CPU", 0x22A01, rf"null:picked_cpu {_U}, cpu {{new_cpu:d}}"),
    _P("TRC_SNULL_UNIT_ASSIGN", 0x22A02, rf"null:vcpu_assign {_U} to cpu {{on_cpu:d}}"),
    _P("TRC_SNULL_UNIT_DEASSIGN", 0x22A03, rf"null:vcpu_deassign {_U} from cpu {{on_cpu:d}}"),
    _P("TRC_SNULL_MIGRATE", 0x22A04, rf"null:migrate {_U}, cpu {{on_cpu:d}}, new_cpu {{new_cpu:d}}"),
    _P(
        "TRC_SNULL_SCHEDULE",
        0x22A05,
        rf"null:schedule cpu {{on_cpu:d}}(?:, {{tasklet__yes:w}} scheduled)?, (?:vcpu {_U}|no vcpu)",
    ),
    _P("TRC_SNULL_TASKLET", 0x22A06, r"null:sched_tasklet"),
    # hardware
    _P("TRC_PM_FREQ_CHANGE", 0x801001, r"pm_freq_change o{old_mhz:d} n{new_mhz:d}"),
    _P("TRC_PM_IDLE_ENTRY", 0x801002, r"pm_idle_start c{cx:d}", "tick, expected and predicted time are not printed"),
    _P("TRC_PM_IDLE_EXIT", 0x801003, r"pm_idle_end c{cx:d}", "tick and pending vectors are not printed"),
    _P(
        "TRC_HW_IRQ_HANDLED",
        0x802008,
        r"irq_handled irq {irq:x} {duration:d} \({tsc_in:d},{tsc_out:d}\)",
        "the low TSC words are printed signed",
    ),
    _P("TRC_HW_IRQ_BIND_VECTOR", 0x802003, f"irq_bind_vector {_BIND}", _BIND_ERROR),
    _P("TRC_HW_IRQ_ASSIGN_VECTOR", 0x802006, f"irq_assign_vector {_BIND}", _BIND_ERROR),
    _P("TRC_HW_IRQ_MOVE_CLEANUP_DELAY", 0x802001, r"irq_move_cleanup_delay irq {irq:x} vec {vector:x} cpu {on_cpu:d}"),
    _P("TRC_HW_IRQ_MOVE_CLEANUP", 0x802002, r"irq_move_cleanup irq {irq:x} vec {vector:x} cpu {on_cpu:d}"),
    _P("TRC_HW_IRQ_UNMAPPED_VECTOR", 0x802007, r"irq_unmapped_vector vec {vector:x}"),
    # HVM
    _P("TRC_HVM_VMEXIT", None, r"vmexit exit_reason {exit_reason:e} eip {rip:x}(?:\(.*\))?"),
    _P("TRC_HVM_VMENTRY", 0x81001, r"vmentry(?: cycles {cycles:d})?(?: !)?"),
    _P("TRC_HVM_INTR", 0x8200F, r"intr vec (?:\w+\()?{vector:x}\)?", "SVM: always 0, taken as not recorded"),
    _P("TRC_HVM_INJ_VIRQ", 0x82004, r"inj_virq vec {vector:d}  {fake__word:w}"),
    _P(
        "TRC_HVM_INTR_WINDOW",
        0x82020,
        r"intr_window vec {vector:d} src {intr_source:d}\(\w+\) intr"
        " (?:#|{queued_vector:x})",
    ),
    _P("TRC_HVM_CR_WRITE", None, r"cr_write cr{cr:d} val {value:x}(?: oval {oval:x} \w+)?"),
    _P("TRC_HVM_MSR_READ", 0x8200C, r"msr_read addr {msr:x} val {value:x}"),
    _P("TRC_HVM_MSR_WRITE", 0x8200D, r"msr_write addr {msr:x} val {value:x}"),
    _P("TRC_HVM_VMMCALL", 0x82012, r"vmcall\s+{eax:x}(?: \(.*\))?"),
    _P("TRC_HVM_IOPORT_READ", None, r"io read port {port:x} val {data:x}"),
    _P("TRC_HVM_IOPORT_WRITE", None, r"io write port {port:x} val {data:x}"),
    _P(
        "TRC_HVM_IOMEM_READ",
        None,
        r"mmio_assist r gpa {gpa:x} (?:data {data:x}|\(no data\))",
        "data are cut to 32 bits",
    ),
    _P(
        "TRC_HVM_IOMEM_WRITE",
        None,
        r"mmio_assist w gpa {gpa:x} (?:data {data:x}|\(no data\))",
        "data are cut to 32 bits",
    ),
    _P("TRC_HVM_NPF", 0x82021, r"npf gpa {gpa:x} q {qualification:x} mfn {mfn:x} t {p2mt:d}"),
    _P("TRC_HVM_PF_INJECT", 0x82002, r"pf_inject guest_cr2 {cr2:x}  guest_ec {error_code:x}"),
    _P("TRC_HVM_PF_INJECT", 0x82102, r"pf_inject64 guest_cr2 {cr2:x}  guest_ec {error_code:x}"),
    # PV
    _P("TRC_PV_TRAP", None, r"trap {trapnr:x} eip {rip:x}(?: ec {error_code:x})?"),
    _P("TRC_PV_HYPERCALL", None, r"hypercall\s+{eax:x} \(\w+\) eip {rip:x}"),
    _P("TRC_PV_HYPERCALL_V2", 0x20100D, r"hypercall\s+{op:x}(?: \({opname:w}\))?(?: {detail:~})?"),
    _P("TRC_PV_HYPERCALL_SUBCALL", 0x20200E, r" hypercall\s+{op:x}(?: \({opname:w}\))?(?: {detail:~})?"),
    _P("TRC_PV_PTWR_EMULATION", None, r"ptwr l1e {pte:x} eip {rip:x} addr {va:x}"),
    # memory, domains, shadow
    _P("TRC_MEM_PAGE_GRANT_MAP", 0x10F001, r"grant-map domain {granting_dom:d}"),
    _P("TRC_MEM_PAGE_GRANT_UNMAP", 0x10F002, r"grant-unmap domain {granting_dom:d}"),
    _P("TRC_MEM_PAGE_GRANT_TRANSFER", 0x10F003, r"grant-transfer domain {dom:d}"),
    _P("TRC_MEM_SET_P2M_ENTRY", 0x10F004, r"set_p2m_entry d{dom:d} o{order:d} t {p2mt:d} g {gfn:x} m {mfn:x}"),
    _P("TRC_MEM_DECREASE_RESERVATION", 0x10F005, r"decrease_reservation d{dom:d} o{order:d} g {gfn:x}"),
    _P("TRC_MEM_POD_POPULATE", 0x10F010, r"pod_populate d{dom:d} o{order:d} g {gfn:x} m {mfn:x}"),
    _P("TRC_MEM_POD_ZERO_RECLAIM", 0x10F011, r"pod_zero_reclaim d{dom:d} o{order:d} g {gfn:x} m {mfn:x} ctx \w+"),
    _P("TRC_MEM_POD_SUPERPAGE_SPLINTER", 0x10F012, r"pod_spage_splinter d{dom:d} o{order:d} g {gfn:x}"),
    _P("TRC_DOM0_DOM_ADD", 0x41001, r"creating domain {dom:d}"),
    _P("TRC_DOM0_DOM_REM", 0x41002, r"destroying domain {dom:d}"),
    _P("TRC_SHADOW_RESYNC_FULL", 0x40F00E, r"oos resync full gfn {gfn:x}"),
    _P("TRC_SHADOW_RESYNC_ONLY", 0x40F00F, r"oos resync only gfn {gfn:x}"),
    _P("TRC_SHADOW_PREALLOC_UNPIN", 0x40F00D, r"prealloc-unpin gfn {gfn:x}"),
    _P("TRC_SHADOW_WRMAP_BF", 0x40F00C, r"wrmap-bf gfn {gfn:x}"),
)
