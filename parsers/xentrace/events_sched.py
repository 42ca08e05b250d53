"""Scheduler records (class 0x002): runstates, the generic scheduler, credit, credit2, RTDS, null.

Sources: xen/include/public/trace.h, xen/common/sched/*.c. Since core scheduling (4.13) "vcpu" became "unit".
"""

from __future__ import annotations

from parsers.xentrace.layout import Event, IdBits, Layout

__all__ = ["EVENTS"]

V4_1, V4_2, V4_3, V4_4, V4_5 = (4, 1), (4, 2), (4, 3), (4, 4), (4, 5)
V4_6, V4_7, V4_8, V4_9, V4_10, V4_11 = (4, 6), (4, 7), (4, 8), (4, 9), (4, 10), (4, 11)

RUNSTATE_IDS = tuple(
    0x21001 | old << 8 | new << 4 for old in range(4) for new in range(4) if old != new
)


def _verbose(number: int) -> tuple[int, ...]:
    """Id in sub-class VERBOSE, and in the flat numbering before 3.4."""
    return (0x28000 | number, 0x2F000 | number) if number <= 0xF else (0x28000 | number,)


def _flat(name: str, number: int, doc: str, fields: str, **extra: str) -> Event:
    return Event(name, _verbose(number), doc, (Layout(fields),), **extra)  # type: ignore[arg-type]


def _credit2(name: str, number: int, doc: str, *layouts: Layout, notes: str = "") -> Event:
    """credit2 has 0x222NN; Xen 4.1 and 4.2 used 0x220NN, which 4.3 gave to credit."""
    ids = (0x22200 | number, 0x22000 | number) if number <= 0xC else (0x22200 | number,)
    return Event(name, ids, doc, layouts, notes=notes)


def _halves(fields: str, since: tuple[int, int], until: tuple[int, int]) -> tuple[Layout, ...]:
    """Forms whose first word was dom (low), vcpu (high) until 4.6 and unit (low), dom (high) after."""
    old = Layout(fields.replace("unit:16 dom:16", "dom:16 unit:16"), since, min(until, V4_6))
    return (Layout(fields, max(since, V4_7), until), old) if until > V4_6 else (old,)


def _new(fields: str, since: tuple[int, int] = V4_8) -> Layout:
    return Layout(fields, since)


NOW = (99, 0)

EVENTS: tuple[Event, ...] = (
    Event(
        "TRC_SCHED_RUNSTATE_CHANGE", RUNSTATE_IDS, "A vCPU is about to change its accounting state",
        (Layout("vcpu:16 dom:16"), Layout("vcpu:16 dom:16 p1:64 p2:64")),
        id_bits=(IdBits("old_state", 8, 2), IdBits("new_state", 4, 2)),
        notes="States: 0 running, 1 runnable, 2 blocked, 3 offline. Written before the change, possibly on "
        "another CPU than the vCPU's. The five-word form comes from private builds",
    ),
    Event("TRC_SCHED_CONTINUE_RUNNING", (0x21002,), "The scheduler ran and kept the same vCPU",
          (Layout("vcpu:16 dom:16"),)),
    Event("TRC_SCHED_DOM_ADD", _verbose(1), "A domain was attached to a scheduler",
          (Layout("dom:32", V4_7), Layout("dom:32 vcpu:32", until=V4_6)), notes="Until 4.6 once for each vCPU"),
    _flat("TRC_SCHED_DOM_REM", 2, "A domain was detached from its scheduler", "dom:32"),
    _flat("TRC_SCHED_SLEEP", 3, "A vCPU is taken off the run queues", "dom:32 vcpu:32"),
    _flat("TRC_SCHED_WAKE", 4, "Somebody wakes a vCPU; written on the waking CPU", "dom:32 vcpu:32"),
    _flat("TRC_SCHED_YIELD", 5, "The current vCPU gave up its slot", "dom:32 vcpu:32"),
    _flat("TRC_SCHED_BLOCK", 6, "The current vCPU is about to block (SCHEDOP_block, HLT, SCHEDOP_poll)",
          "dom:32 vcpu:32", notes="Not written if an event could be delivered at once"),
    _flat("TRC_SCHED_SHUTDOWN", 7, "A guest asked to be shut down", "dom:32 vcpu:32 reason:32"),
    _flat("TRC_SCHED_CTL", 8, "Reserved id, never written by 4.x", ""),
    _flat("TRC_SCHED_ADJDOM", 9, "A domain's scheduling parameters changed", "dom:32"),
    _flat("TRC_SCHED_SWITCH", 10, "A context switch was decided on this CPU",
          "prev_dom:32 prev_unit:32 next_dom:32 next_unit:32"),
    _flat("TRC_SCHED_S_TIMER_FN", 11, "Reserved id, never written by 4.x", ""),
    _flat("TRC_SCHED_T_TIMER_FN", 12, "Reserved id, never written by 4.x", ""),
    _flat("TRC_SCHED_DOM_TIMER_FN", 13, "Reserved id, never written by 4.x", ""),
    Event("TRC_SCHED_SWITCH_INFPREV", _verbose(14), "How long the outgoing unit has been in its state",
          (Layout("dom:32 unit:32 ran_ns:32", V4_8), Layout("dom:32 ran_ns:32", until=V4_7)),
          notes="The time is cut to 32 bits and wraps at 4.29 s"),
    Event("TRC_SCHED_SWITCH_INFNEXT", _verbose(15), "How long the incoming unit waited, and its next slice",
          (Layout("dom:32 unit:32 runnable_ns:32 slice_ns:s32", V4_8),
           Layout("dom:32 runnable_ns:32 slice_ns:s32", until=V4_7)),
          notes="Times are cut to 32 bits; a slice of -1 has no end"),
    _flat("TRC_SCHED_SHUTDOWN_CODE", 16, "A guest stated its shutdown reason beforehand",
          "dom:32 vcpu:32 reason:32"),
    Event("TRC_SCHED_SWITCH_INFCONT", (0x28011,), "The same unit was kept: time so far and next slice",
          (Layout("dom:32 unit:32 ran_ns:32 slice_ns:s32", V4_9),)),
    # credit
    Event("TRC_CSCHED_SCHED_TASKLET", (0x22001,), "Tasklet work makes the idle unit run",
          (Layout("", V4_3),)),
    Event("TRC_CSCHED_ACCOUNT_START", (0x22002,), "A unit becomes active for accounting",
          (Layout("dom:32 unit:32 active_units:32", V4_3),)),
    Event("TRC_CSCHED_ACCOUNT_STOP", (0x22003,), "A unit leaves accounting",
          (Layout("dom:32 unit:32 active_units:32", V4_3),)),
    Event("TRC_CSCHED_STOLEN_UNIT", (0x22004,), "A unit was pulled from another CPU's queue",
          (Layout("peer_cpu:32 dom:32 unit:32", V4_3),), notes="STOLEN_VCPU until 4.12"),
    Event("TRC_CSCHED_PICKED_CPU", (0x22005,), "A CPU was chosen for a unit",
          (Layout("dom:32 unit:32 new_cpu:32", V4_3),)),
    Event("TRC_CSCHED_TICKLE", (0x22006,), "A CPU was poked to reschedule; one record for each target",
          (Layout("target_cpu:32", V4_7, stamped=True), Layout("target_cpu:32", V4_3, V4_6, stamped=False))),
    Event("TRC_CSCHED_BOOST_START", (0x22007,), "A unit was boosted on wake-up",
          (Layout("dom:32 unit:32", V4_7),)),
    Event("TRC_CSCHED_BOOST_END", (0x22008,), "A boost was taken back", (Layout("dom:32 unit:32", V4_7),)),
    Event("TRC_CSCHED_SCHEDULE", (0x22009,), "A scheduling pass begins",
          (Layout("on_cpu:16 tasklet:b8 idle:b8", V4_8),)),
    Event("TRC_CSCHED_RATELIMIT", (0x2200A,), "The rate limit held back a preemption",
          (Layout("unit:16 dom:16 ran_ns:32", V4_8),)),
    Event("TRC_CSCHED_STEAL_CHECK", (0x2200B,), "Work stealing looked at a peer or skipped it",
          (Layout("peer_cpu:32 checked:b32", V4_9),)),
    # credit2
    _credit2("TRC_CSCHED2_TICK", 1, "Reserved id, never written", Layout("", V4_1)),
    _credit2("TRC_CSCHED2_RUNQ_POS", 2, "Where in the queue a unit was put",
             Layout("unit:16 dom:16 pos:32", V4_7, stamped=True),
             Layout("dom:16 unit:16 pos:32", V4_1, V4_6, stamped=False)),
    _credit2("TRC_CSCHED2_CREDIT_BURN", 3, "Credit was charged to a unit",
             _new("unit:16 dom:16 credit:s32 budget:s32 delta:s32", V4_10),
             *_halves("unit:16 dom:16 credit:s32 delta:s32", V4_1, V4_9), notes="budget INT_MIN: no cap"),
    _credit2("TRC_CSCHED2_CREDIT_ADD", 4, "Reserved id, never written", Layout("", V4_1)),
    _credit2("TRC_CSCHED2_TICKLE_CHECK", 5, "A candidate was weighed for preemption",
             _new("unit:16 dom:16 credit:s32 score:s32", V4_10),
             *_halves("unit:16 dom:16 credit:s32", V4_1, V4_9)),
    _credit2("TRC_CSCHED2_TICKLE", 6, "A CPU was poked to reschedule",
             Layout("target_cpu:16 _:16", V4_7, stamped=True),
             Layout("target_cpu:8 _:24", V4_1, V4_6, stamped=False)),
    _credit2("TRC_CSCHED2_CREDIT_RESET", 7, "A unit's credit was replenished",
             _new("unit:16 dom:16 credit_start:s32 credit_end:s32", V4_11),
             *_halves("unit:16 dom:16 credit_start:s32 credit_end:s32 multiplier:32", V4_3, V4_10),
             Layout("dom:16 unit:16 credit_start:s32 credit_end:s32", V4_1, V4_2)),
    _credit2("TRC_CSCHED2_SCHED_TASKLET", 8, "Tasklet work makes the idle unit run",
             Layout("", V4_7, stamped=True), Layout("", V4_1, V4_6, stamped=False)),
    _credit2("TRC_CSCHED2_UPDATE_LOAD", 9, "A pass of load bookkeeping", Layout("", V4_1),
             notes="Current form since 4.8"),
    _credit2("TRC_CSCHED2_RUNQ_ASSIGN", 10, "A unit was assigned to a run queue",
             *_halves("unit:16 dom:16 rqi:16 _:16", V4_1, NOW)),
    _credit2("TRC_CSCHED2_UPDATE_UNIT_LOAD", 11, "Load estimate of one unit",
             _new("avgload:64 unit:16 dom:16 shift:32"),
             *_halves("unit:16 dom:16 avgload:32", V4_1, V4_7), notes="UPDATE_VCPU_LOAD until 4.12"),
    _credit2("TRC_CSCHED2_UPDATE_RUNQ_LOAD", 12, "Load estimate of a run queue",
             _new("rq_avgload:64 b_avgload:64 rq_load:16 rq_id:8 shift:8 _:32"),
             Layout("rq_load:4 rq_avgload:28 rq_id:4 b_avgload:28", V4_1, V4_7)),
    _credit2("TRC_CSCHED2_TICKLE_NEW", 13, "A unit that became runnable looks for a CPU",
             _new("unit:16 dom:16 on_cpu:32 credit:s32")),
    _credit2("TRC_CSCHED2_RUNQ_MAX_WEIGHT", 14, "The largest weight on a run queue changed",
             _new("rqi:16 max_weight:16")),
    _credit2("TRC_CSCHED2_MIGRATE", 15, "A unit moves between run queues",
             _new("unit:16 dom:16 from_rq:16 to_rq:16")),
    _credit2("TRC_CSCHED2_LOAD_CHECK", 16, "The balancer compares two run queues",
             _new("local_rq:16 other_rq:16 load_delta:32"), notes="The difference is cut to 32 bits"),
    _credit2("TRC_CSCHED2_LOAD_BALANCE", 17, "The balancer begins",
             _new("local_avg:64 other_avg:64 local_rq:16 other_rq:16 _:32")),
    _credit2("TRC_CSCHED2_PICKED_CPU", 19, "A CPU was chosen for a unit",
             _new("b_avgload:64 unit:16 dom:16 rq_id:16 new_cpu:16"), notes="rq_id 0xffff: none"),
    _credit2("TRC_CSCHED2_RUNQ_CANDIDATE", 20, "The unit that was selected to run next",
             _new("unit:16 dom:16 tickled_cpu:32 credit:s32", V4_11),
             Layout("unit:16 dom:16 tickled_cpu:32 skipped:32 credit:s32", V4_9, V4_10),
             Layout("unit:16 dom:16 tickled_cpu:32 skipped:32", V4_8, V4_8),
             notes="tickled_cpu 0xffffffff: none"),
    _credit2("TRC_CSCHED2_SCHEDULE", 21, "A scheduling pass begins",
             _new("on_cpu:16 rq_id:16 tasklet:b8 idle:b8 smt_idle:b8 tickled:b8")),
    _credit2("TRC_CSCHED2_RATELIMIT", 22, "The rate limit held back a preemption",
             _new("unit:16 dom:16 ran_ns:32")),
    _credit2("TRC_CSCHED2_RUNQ_CAND_CHECK", 23, "An entry of the queue was examined",
             _new("unit:16 dom:16", V4_9)),
    # RTDS
    Event("TRC_RTDS_TICKLE", (0x22801,), "A CPU was poked to reschedule",
          (Layout("target_cpu:16 _:16", V4_7, stamped=True),
           Layout("target_cpu:16 _:16", V4_5, V4_6, stamped=False))),
    Event("TRC_RTDS_RUNQ_PICK", (0x22802,), "The head of the queue was chosen",
          (*_halves("unit:16 dom:16 deadline_ns:64 budget_ns:64", V4_5, NOW), Layout("", V4_5, V4_6)),
          notes="4.5 and 4.6 could write a second record without words"),
    Event("TRC_RTDS_BUDGET_BURN", (0x22803,), "Budget was charged to a unit",
          (Layout("unit:16 dom:16 budget_ns:64 delta_ns:32 priority_level:32 extratime:b8 _:24", V4_10),
           *_halves("unit:16 dom:16 budget_ns:64 delta_ns:32", V4_5, V4_9)),
          notes="delta_ns is cut to 32 bits; only the low byte of the last word means something before 4.18"),
    Event("TRC_RTDS_BUDGET_REPLENISH", (0x22804,), "Budget was refilled for a new period",
          (Layout("unit:16 dom:16 priority_level:32 deadline_ns:64 budget_ns:64", V4_10),
           *_halves("unit:16 dom:16 deadline_ns:64 budget_ns:64", V4_5, V4_9))),
    Event("TRC_RTDS_SCHED_TASKLET", (0x22805,), "Tasklet work makes the idle unit run",
          (Layout("", V4_7), Layout("_:32 _:32 _:32 _:32 _:32", V4_5, V4_6)),
          notes="4.5 and 4.6 wrote five stale words with it"),
    Event("TRC_RTDS_SCHEDULE", (0x22806,), "A scheduling pass begins",
          (Layout("on_cpu:16 tasklet:b8 tickled:b4 idle:b4", V4_8),)),
    # null
    Event("TRC_SNULL_PICKED_CPU", (0x22A01,), "A CPU was chosen",
          (Layout("unit:16 dom:16 new_cpu:32", V4_10),)),
    Event("TRC_SNULL_UNIT_ASSIGN", (0x22A02,), "A unit was tied to a free CPU",
          (Layout("unit:16 dom:16 on_cpu:32", V4_10),), notes="VCPU_ASSIGN until 4.12"),
    Event("TRC_SNULL_UNIT_DEASSIGN", (0x22A03,), "A unit was removed from its CPU",
          (Layout("unit:16 dom:16 on_cpu:32", V4_10),)),
    Event("TRC_SNULL_MIGRATE", (0x22A04,), "A unit was moved",
          (Layout("unit:16 dom:16 on_cpu:16 new_cpu:16", V4_10),)),
    Event("TRC_SNULL_SCHEDULE", (0x22A05,), "A scheduling pass begins",
          (Layout("tasklet:b16 on_cpu:16 unit:s16 dom:s16", V4_10),), notes="unit and dom -1: none"),
    Event("TRC_SNULL_TASKLET", (0x22A06,), "Tasklet work makes the idle unit run", (Layout("", V4_10),)),
)  # fmt: skip
