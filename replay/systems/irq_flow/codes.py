"""Linux irq flow for event channels: divergence codes (spec S4.6, S6.5) and parameters, declared once."""

from __future__ import annotations

from typing import Final

from replay.declare import Code, Parameter

__all__ = [
    "ACTIVE_SKIP",
    "AFFINITY_IGNORED",
    "AFFINITY_REFUSED",
    "CODES",
    "CONCURRENT",
    "DESC_CONCURRENT",
    "DESC_SPURIOUS",
    "DESC_UNBALANCED",
    "DROPPED_INPROGRESS",
    "EDGE_LOST",
    "LATEEOI_MISSING",
    "MASKED_FOREVER",
    "NO_END_NOTIFY",
    "PARAMETERS",
    "SPURIOUS_INVOCATION",
    "STORM",
    "UNMASK_EARLY",
    "UPCALL_NO_WORK",
]

EDGE_LOST: Final = Code(
    "flow-edge-lost", "error", "S4.5", "Linux handle_level_irq, xen_dynamic_chip",
    "A raise was acknowledged but no handler looked at its ring afterwards, and nothing is left that would start one.",
    "A deferred affinity change unmasked the port while its handler was about to run, and the flow has no memory of an "
    "edge that meets a running handler; or the pending bit is cleared after the handler.",
    "raised before the handler began; where the handler's last look is not recorded, an edge during its run may have "
    "been consumed (warn, confidence 50)",
    ("flow.raise", "flow.ack|flow.eoi", "flow.handler.begin", "flow.handler.end"), ("settle_ns",),
)  # fmt: skip
DROPPED_INPROGRESS: Final = Code(
    "flow-upcall-dropped-inprogress", "warn", "S4.4 level 3", "Linux handle_level_irq",
    "The flow acknowledged the event and left because the handler was running on another CPU.",
    "Root-cause marker of a lost edge.", "the flow remembers (edge)", ("flow.ack", "flow.handler.begin"),
)  # fmt: skip
UNMASK_EARLY: Final = Code(
    "flow-migrate-unmask-early", "warn", "S4.3", "Linux move_native_irq in the ack hook",
    "The deferred affinity change unmasked the port, now bound to another CPU, before the handler had ended.",
    "Root-cause marker: an event raised now is delivered to a CPU that finds the handler in progress.",
    "flow other than level", ("flow.set_affinity", "flow.unmask|flow.ack"),
)  # fmt: skip
CONCURRENT: Final = Code(
    "flow-concurrent-handler", "error", "S4.1 inprogress", "Linux handle_irq_event",
    "The handler of one irq runs on two CPUs at once.", "A percpu flow on a movable irq, or INPROGRESS was lost.",
    "truly per-cpu irq, or it is not known whether it is", ("flow.handler.begin", "flow.handler.end"),
)  # fmt: skip
MASKED_FOREVER: Final = Code(
    "flow-masked-forever", "error", "S4.3", "Linux unmask_irq, xen_irq_lateeoi",
    "The port is masked and pending, not disabled, no handler runs and no late EOI is due.",
    "An unmask or a late EOI is missing.", "disabled by the driver; spurious back-off running",
    ("flow.raise", "flow.mask", "flow.unmask"), ("stuck_ns",),
)  # fmt: skip
LATEEOI_MISSING: Final = Code(
    "flow-lateeoi-missing", "warn", "S4.4 lateeoi", "Linux xen_irq_lateeoi",
    "The handler ended and the driver has not issued the late EOI; error when the port is pending again.",
    "Driver bug.", "spurious back-off; suspended device", ("flow.handler.end", "flow.lateeoi"), ("stuck_ns",),
)  # fmt: skip
SPURIOUS_INVOCATION: Final = Code(
    "flow-spurious-invocation", "info", "S4.4", "Linux handle_irq_event",
    "A handler began although no raise was outstanding.", "Rerun after the ring had been drained, or a shared irq.",
    "first invocation after bind", ("flow.raise", "flow.handler.begin"), closed=False,
)  # fmt: skip
UPCALL_NO_WORK: Final = Code(
    "flow-upcall-no-work", "info", "S4.3", "Linux xen_evtchn_do_upcall", "An upcall found no event to handle.",
    "The deferred move unmasks before it clears; or a nested upcall.", "", ("flow.upcall", "flow.ack"), closed=False,
)  # fmt: skip
AFFINITY_REFUSED: Final = Code(
    "flow-affinity-refused", "info", "S4.4 percpu", "Linux xen_percpu_chip has no set_affinity",
    "An affinity change was asked of an irq with the percpu flow; warn for a global VIRQ.",
    "The flow should follow IRQF_PERCPU, not the kind of event channel.", "IPI",
    ("flow.set_affinity",),
)  # fmt: skip
AFFINITY_IGNORED: Final = Code(
    "flow-affinity-ignored", "warn", "S4.3", "Linux irq_move_irq, xen_rebind_evtchn_to_cpu",
    "The irq goes on being handled elsewhere long after its affinity was changed.",
    "The move needs an interrupt to happen, and its hook is not called.", "no interrupt since",
    ("flow.set_affinity", "flow.handler.begin", "flow.handler.end"), ("stuck_ns",),
)  # fmt: skip
NO_END_NOTIFY: Final = Code(
    "flow-no-end-notify", "info", "S4.4", "Linux handle_edge_irq calls neither end nor eoi",
    "A pirq has a flow without an end or eoi hook: Xen cannot learn that the guest does not handle it.",
    "Choice of flow.", "no pirqs", ("evtchn.bind",), closed=False,
)  # fmt: skip
STORM: Final = Code(
    "flow-storm", "warn", "S4.4", "Linux note_interrupt, xen_irq_lateeoi spurious back-off",
    "More than storm_per_s handler runs within a second found nothing to do, or the spurious counter is at its cap.",
    "A frontend sends events without requests, or a level source is not quieted.", "",
    ("flow.handler.end|flow.lateeoi",), ("storm_per_s",),
)  # fmt: skip
ACTIVE_SKIP: Final = Code(
    "flow-active-skip", "info", "S4.4 lateeoi", "Linux handle_irq_for_port is_active",
    "The scan found the port but its late EOI is still owed: skipped, the bit stays pending.",
    "Raised again after a rebind.", "", ("flow.upcall", "flow.lateeoi"), closed=False,
)  # fmt: skip
DESC_CONCURRENT: Final = Code(
    "irqdesc-concurrent", "error", "S6.5", "Linux handle_irq_event, IRQD_IRQ_INPROGRESS",
    "One irq's handler was entered on a second CPU before it had returned on the first.",
    "A flow handler ignored INPROGRESS, or an exit is missing.", "PER_CPU, or it is not known whether it is",
    ("irqdesc.entry", "irqdesc.exit", "irqdesc.state|flow.set_affinity"), closed=False,
)  # fmt: skip
DESC_UNBALANCED: Final = Code(
    "irqdesc-unbalanced", "warn", "S6.5", "Linux irq_handler_entry/exit, __enable_irq",
    "Entries and exits on a CPU do not nest, or the disable depth went below zero.",
    "Lost records, or enable_irq without disable_irq.", "handler began before the recording",
    ("irqdesc.entry", "irqdesc.exit"), closed=False,
)  # fmt: skip
DESC_SPURIOUS: Final = Code(
    "irqdesc-spurious-disable-risk", "warn", "S6.5", "Linux note_interrupt",
    "So many handler returns of this irq were IRQ_NONE that the kernel is on its way to disable the line (99 900 of "
    "100 000).",
    "Shared line whose driver does not claim it, or a misrouted interrupt.", "",
    ("irqdesc.exit",), ("spurious_risk", "spurious_window"), closed=False,
)  # fmt: skip

CODES: Final = (
    EDGE_LOST, DROPPED_INPROGRESS, UNMASK_EARLY, CONCURRENT, MASKED_FOREVER, LATEEOI_MISSING, SPURIOUS_INVOCATION,
    UPCALL_NO_WORK, AFFINITY_REFUSED, AFFINITY_IGNORED, NO_END_NOTIFY, STORM, ACTIVE_SKIP, DESC_CONCURRENT,
    DESC_UNBALANCED, DESC_SPURIOUS,
)  # fmt: skip

PARAMETERS: Final = (
    Parameter("cpu", 0, "cpu", "where irqs are bound at first"),
    Parameter("upcall_ns", 100, "ns", "notification to upcall, in closed runs; recordings: measured"),
    Parameter("handler_ns", 10_000, "ns", "handler run, in closed runs; recordings: each run's own, else the median"),
    Parameter("consume_ns", 3_000, "ns", "begin to the handler's last look at its ring, in closed runs"),
    Parameter("lateeoi_ns", None, "ns", "handler end to late EOI, in closed runs; none: the driver never issues it, "
              "and on recordings: measured"),
    Parameter("virq_global", False, "", "the irqs are global VIRQs"),
    Parameter("percpu", False, "", "the irqs are requested per-cpu (IRQF_PERCPU): edge gives them the percpu flow"),
    Parameter("irq_type", "", "", "pirq, virq, ipi or evtchn, for irqs that no bind event describes"),
    Parameter("move_when_dropped", True, "", "ack moves also when the flow then leaves because of INPROGRESS"),
    Parameter("move_at_once", False, "", "edge: set_affinity rebinds at once under the mask reason TEMPORARY, as Linux "
              "chips with mask reasons do; measured in recordings"),
    Parameter("match_ns", 2_000, "ns", "how far a predicted handler run may lie from the recorded one"),
    Parameter("jiffy_ns", 4_000_000, "ns", "a jiffy, unit of the late EOI's back-off"),
    Parameter("settle_ns", 10_000, "ns", "recordings: how long nothing may happen before an edge counts as lost"),
    Parameter("stuck_ns", 1_000_000_000, "ns", "missing unmask, late EOI or move"),
    Parameter("storm_per_s", 1_000, "1/s", "handler runs without work"),
    Parameter("spurious_window", 100_000, "", "returns that note_interrupt looks at"),
    Parameter("spurious_risk", 10_000, "", "unhandled returns in a window worth a warning"),
)  # fmt: skip
