"""Divergence codes and parameters of IOAPIC pins (spec S6.2)."""

from __future__ import annotations

from typing import Final

from replay.declare import Code, Parameter

__all__ = ["CODES", "EDGE_LOST_MASKED", "LEVEL_STORM", "PARAMETERS", "REMOTE_IRR_STUCK", "RTE_CHANGE_INFLIGHT"]

_LINE: Final = "ioapic.line"
_RTE: Final = "ioapic.rte"
_EOI: Final = "lapic.eoi|ioapic.eoi"

EDGE_LOST_MASKED: Final = Code(
    "ioapic-edge-lost-masked",
    "info",
    "IO1",
    "Intel 82093AA, redirection table: interrupt mask",
    "An edge arrived at a masked pin; unmasking does not bring it back.",
    "The driver masked the pin without quiescing its device.",
    "The part latches edges while masked (ioapic_latches_edges).",
    needs=(_LINE, _RTE),
    thresholds=("ioapic_latches_edges",),
)
RTE_CHANGE_INFLIGHT: Final = Code(
    "ioapic-rte-change-inflight",
    "warn",
    "IO4",
    "Intel 82093AA, redirection table: Remote IRR; Linux ioapic_ack_level",
    "Vector or trigger mode was rewritten while Remote IRR was set, so the EOI that comes will not match.",
    "Affinity was changed without waiting for the interrupt in flight.",
    "Remote IRR is unknown.",
    needs=(_LINE, _RTE, _EOI),
)
REMOTE_IRR_STUCK: Final = Code(
    "ioapic-remote-irr-stuck",
    "error",
    "IO3 IO4",
    "Intel 82093AA, redirection table: Remote IRR",
    "Remote IRR stays set while the vector it was sent with is in no IRR or ISR: the pin can never send again.",
    "The vector was rewritten in flight, or the EOI was lost.",
    "It is unknown where the vector is.",
    needs=(f"{_LINE}|ioapic.remote_irr", _RTE, f"{_EOI}|lapic.snapshot"),
    thresholds=("ioapic_stuck_ns",),
)
LEVEL_STORM: Final = Code(
    "ioapic-level-storm",
    "warn",
    "IO3",
    "Linux note_interrupt; KVM kvm_ioapic_update_eoi_one",
    "A level pin was delivered again three times without its line falling, and no handler wanted any of them; or KVM "
    "slowed it down, having sent it again 10,000 times running.",
    "No driver serves the device that holds the line.",
    "A handler took one of them; it is unknown what the handlers returned.",
    needs=(_LINE, _RTE, _EOI, "lapic.exit|ioapic.storm"),
    thresholds=("ioapic_storm_count",),
)

CODES: Final = (EDGE_LOST_MASKED, RTE_CHANGE_INFLIGHT, REMOTE_IRR_STUCK, LEVEL_STORM)

PARAMETERS: Final = (
    Parameter("ioapic_latches_edges", 0, "", "1: the part remembers an edge at a masked pin"),
    Parameter("ioapic_stuck_ns", 1_000_000, "ns", "Remote IRR without a vector in flight for this long: stuck"),
    Parameter("ioapic_storm_count", 3, "", "re-deliveries nobody wanted that make a storm"),
)
