"""Divergence codes and parameters of the local APIC (spec S6.1)."""

from __future__ import annotations

from typing import Final

from replay.declare import Code, Parameter

__all__ = [
    "CODES",
    "DELIVER_WITHOUT_IRR",
    "EOI_OVERDUE",
    "EOI_UNMATCHED",
    "EOI_WRONG_VECTOR",
    "EXIT_ORDER",
    "EXIT_UNMATCHED",
    "ILLEGAL_VECTOR",
    "IRR_STUCK",
    "LOWER_PRIORITY_NESTED",
    "NESTING_DEPTH",
    "NOT_HIGHEST",
    "PARAMETERS",
    "PRIORITY_INVERSION",
]

_DELIVER: Final = "lapic.deliver"
_EOI: Final = "lapic.eoi"

EOI_UNMATCHED: Final = Code(
    "lapic-eoi-unmatched",
    "warn",
    "L4",
    "Intel SDM vol. 3A, EOI register; Xen vlapic_EOI_set",
    "An EOI was written while no vector was in service.",
    "The handler of the spurious vector writes EOI, some handler does so twice, or a delivery was not recorded.",
    "ISR is unknown (start of the recording, lost records) or the guest uses EOI assist.",
    needs=(_DELIVER, _EOI),
)
EOI_WRONG_VECTOR: Final = Code(
    "lapic-eoi-wrong-vector",
    "error",
    "L4",
    "Intel SDM vol. 3A, EOI register",
    "An EOI meant for one vector dismissed another: hardware always clears the highest vector in service.",
    "Handlers that nest write their EOIs in the wrong order.",
    "the exit of a nested handler is not in the recording",
    needs=(_DELIVER, _EOI),
)
DELIVER_WITHOUT_IRR: Final = Code(
    "lapic-deliver-without-irr",
    "warn",
    "L3",
    "Intel SDM vol. 3A, interrupt acceptance for fixed interrupts",
    "A vector was delivered that nobody had requested.",
    "The request was not recorded: a self-IPI, a posted interrupt, or a recorder that misses one of the sources.",
    "requests are not recorded at all, or delivery is virtualised (APICv, AVIC)",
    needs=("lapic.accept", _DELIVER),
)
PRIORITY_INVERSION: Final = Code(
    "lapic-priority-inversion",
    "error",
    "L3",
    "Intel SDM vol. 3A, task and processor priorities",
    "A vector was delivered although one of the same or a higher class was in service, or TPR held its class back. "
    "Hardware cannot do this.",
    "The recording is incomplete or out of order: most likely the EOI of the outer vector is missing.",
    "EOI records are missing; for TPR: writes of it are not all recorded, for a TPR shadow hides them",
    needs=(_DELIVER, _EOI),
)
NOT_HIGHEST: Final = Code(
    "lapic-not-highest",
    "warn",
    "L3",
    "Intel SDM vol. 3A, interrupt acceptance for fixed interrupts",
    "A vector was delivered while one of a higher class had been requested before it.",
    "The request and the delivery are out of order, or the delivery skipped the priority check.",
    "interrupts were off when the higher vector arrived, or TPR writes are not recorded",
    needs=("lapic.accept", _DELIVER),
)
LOWER_PRIORITY_NESTED: Final = Code(
    "stack-lower-priority-nested",
    "warn",
    "L5",
    "Intel SDM vol. 3A, EOI register; Xen do_IRQ with an ack that writes EOI",
    "A vector was entered on top of a handler of the same or a higher class that had already written its EOI.",
    "EOI before the handler's body, with interrupts on: legal for the LAPIC, but nothing bounds the stack any more.",
    "the same handler is re-entered by design",
    needs=(_DELIVER, _EOI, "lapic.exit"),
)
EXIT_ORDER: Final = Code(
    "stack-exit-order",
    "warn",
    "L5",
    "Intel SDM vol. 3A, interrupt and exception handling",
    "Handlers returned in another order than the reverse of their entries.",
    "A context switch inside a handler, or lost records.",
    "the handler is threaded, records were lost",
    needs=(_DELIVER, "lapic.exit"),
)
EXIT_UNMATCHED: Final = Code(
    "stack-exit-unmatched",
    "warn",
    "L5",
    "Intel SDM vol. 3A, interrupt and exception handling",
    "A handler returned that had not been entered.",
    "Lost records, or an entry that the recorder does not show.",
    "records were lost, or the recording began inside the handler",
    needs=(_DELIVER, "lapic.exit"),
)
NESTING_DEPTH: Final = Code(
    "stack-nesting-depth",
    "error",
    "L5",
    "Xen do_IRQ: each nested handler takes a stack frame",
    "More handlers were running inside each other than `nesting_limit` allows.",
    "Early EOI with interrupts on, several devices or channels that point at one CPU.",
    needs=(_DELIVER,),
    thresholds=("nesting_limit",),
    assumes={"lapic.exit": "a handler is taken to end with its EOI, so nesting after an early EOI is not seen"},
)
EOI_OVERDUE: Final = Code(
    "lapic-eoi-overdue",
    "warn",
    "L6",
    "Xen do_IRQ_guest with ACKTYPE_EOI",
    "A vector stayed in service for longer than `eoi_overdue_ns` after its handler returned.",
    "The guest that owns the interrupt does not acknowledge it; all of its class and below is blocked meanwhile.",
    "deferred EOI by design (guest interrupts, resampling) while the guest that owns it is not running",
    needs=(_DELIVER, _EOI, "lapic.exit"),
    thresholds=("eoi_overdue_ns",),
)
ILLEGAL_VECTOR: Final = Code(
    "lapic-illegal-vector",
    "error",
    "L1",
    "Intel SDM vol. 3A, valid interrupt vectors",
    "A vector below 16 was requested.",
    "An unprogrammed RTE or LVT entry, or a corrupt MSI message.",
    needs=("lapic.accept",),
)
IRR_STUCK: Final = Code(
    "lapic-irr-stuck",
    "error",
    "L3",
    "Intel SDM vol. 3A, interrupt acceptance for fixed interrupts",
    "A requested vector was deliverable for longer than `irr_stuck_ns` while the CPU ran, and was not delivered.",
    "The hypervisor lost the request: no injection, no interrupt window.",
    "APICv; the vCPU was not running; interrupts were off",
    needs=("lapic.accept", _DELIVER, "sched.run"),
    thresholds=("irr_stuck_ns",),
)

CODES: Final = (
    EOI_UNMATCHED,
    EOI_WRONG_VECTOR,
    DELIVER_WITHOUT_IRR,
    PRIORITY_INVERSION,
    NOT_HIGHEST,
    LOWER_PRIORITY_NESTED,
    EXIT_ORDER,
    EXIT_UNMATCHED,
    NESTING_DEPTH,
    EOI_OVERDUE,
    ILLEGAL_VECTOR,
    IRR_STUCK,
)

PARAMETERS: Final = (
    Parameter("spurious_vector", 0xFF, "", "vector of the spurious interrupt: sets no ISR bit, expects no EOI"),
    Parameter("nesting_limit", 2, "frames", "deepest nesting of handlers that is not an error"),
    Parameter("eoi_overdue_ns", 10_000_000, "ns", "how long a vector may stay in service after its handler returned"),
    Parameter("irr_stuck_ns", 1_000_000, "ns", "how long a deliverable vector may wait while its CPU runs"),
    Parameter("t_err_ns", 0, "ns", "order of two records of one source closer than this is not trusted"),
)
