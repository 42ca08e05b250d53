"""Divergence codes and parameters of the GICv2 CPU interfaces (spec S6.3)."""

from __future__ import annotations

from typing import Final

from replay.declare import Code, Parameter

__all__ = [
    "ACTIVE_LEAK",
    "CODES",
    "DIR_MISSING",
    "EOI_ORDER",
    "EOI_UNMATCHED",
    "PARAMETERS",
    "PRIORITY_INVERSION",
    "SPURIOUS_ACK",
]

_ACK: Final = "gic.ack"
_EOI: Final = "gic.eoi"
_DIR: Final = "gic.dir"

EOI_UNMATCHED: Final = Code(
    "gic-eoi-unmatched",
    "warn",
    "S6.3",
    "GICv2 4.4.5, GICC_EOIR: the value must be that of the last IAR read",
    "EOIR was written for an interrupt that this CPU interface had not acknowledged.",
    "A handler writes EOIR twice, or on another cpu than the one that read IAR.",
    "the IAR read may be older than the recording, or lost",
    needs=(_ACK, _EOI),
)
EOI_ORDER: Final = Code(
    "gic-eoi-order",
    "warn",
    "S6.3",
    "GICv2 4.4.5, GICC_EOIR: the order must be the reverse of the IAR reads",
    "EOIR was written for an interrupt that is not the one of highest priority in service (`val`).",
    "Handlers that nest write EOIR in the wrong order; the running priority drops too early.",
    "records are missing in between",
    needs=(_ACK, _EOI),
)
PRIORITY_INVERSION: Final = Code(
    "gic-priority-inversion",
    "error",
    "S6.3",
    "GICv2 3.3, interrupt prioritisation",
    "IAR returned an interrupt whose priority is not above the running priority (`val`). Hardware cannot do this.",
    "The recording is incomplete or out of order: most likely the EOIR of the outer interrupt is missing.",
    "EOIR records are missing; a priority is not recorded",
    needs=(_ACK, _EOI),
)
SPURIOUS_ACK: Final = Code(
    "gic-spurious-ack",
    "info",
    "S6.3",
    "GICv2 3.2.5, special interrupt numbers",
    "IAR returned 1020 to 1023: nothing to acknowledge.",
    "The normal end of a loop that reads IAR until it is empty, or an interrupt that was withdrawn.",
    needs=(_ACK,),
    closed=False,
)
ACTIVE_LEAK: Final = Code(
    "gic-active-leak",
    "warn",
    "S6.3",
    "GICv2 4.3.7, GICD_ISACTIVER",
    "An interrupt stayed active on a CPU interface, without EOIR, for longer than active_ns.",
    "Its handler never ended, or forgot EOIR; nothing of the same or a lower priority is delivered meanwhile.",
    "records are missing",
    needs=(_ACK, _EOI),
    thresholds=("active_ns",),
)
DIR_MISSING: Final = Code(
    "gic-dir-missing",
    "warn",
    "S6.3",
    "GICv2 4.4.15, GICC_DIR",
    "With EOImode=1 the priority was dropped by EOIR, but DIR did not follow within dir_ns.",
    "The interrupt stays active and cannot be delivered again.",
    "a list register with HW=1 holds it (the guest's EOI deactivates): only interrupts that have been deactivated by "
    "DIR before are judged; or it was acknowledged again, so it had been deactivated",
    needs=(_ACK, _EOI, _DIR, "gic.cpu_if"),
    thresholds=("dir_ns",),
)

CODES: Final[tuple[Code, ...]] = (
    EOI_UNMATCHED,
    EOI_ORDER,
    PRIORITY_INVERSION,
    SPURIOUS_ACK,
    ACTIVE_LEAK,
    DIR_MISSING,
)

PARAMETERS: Final[tuple[Parameter, ...]] = (
    Parameter("active_ns", 1_000_000_000, "ns", "acknowledged without EOIR for longer is a leak"),
    Parameter("dir_ns", 100_000_000, "ns", "EOIR without DIR for longer, with EOImode=1, is missing"),
    Parameter("irqs", 1020, "", "lockstep: interrupts of the distributor"),
    Parameter("nr_lrs", 4, "", "lockstep: list registers of a core (GICH_VTR)"),
    Parameter("latch_pinned", 0, "", "lockstep: 1: a latched edge stays with the cores that were its targets when it "
              "came, against GICv2 4.3.12; QEMU 7.2 does so"),
)  # fmt: skip
