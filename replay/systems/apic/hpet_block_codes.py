"""Divergence codes and parameters of the HPET block (spec S6.4)."""

from __future__ import annotations

from typing import Final

from replay.declare import Code, Parameter

__all__ = ["CODES", "ENABLE_GLITCH", "LEGACY_CONFLICT", "MISSED_COMPARATOR", "PARAMETERS", "TORN_ROUTE"]

MISSED_COMPARATOR: Final = Code(
    "hwhpet-missed-comparator",
    "error",
    "H1",
    "IA-PC HPET 2.3.9.2; Linux hpet_clkevt_set_next_event, Xen reprogram_hpet_evt_channel",
    "A comparator was written behind the counter and did not match: it fires after a full wrap, about 300 s.",
    "The delta was shorter than the write takes, and nobody compared counter and comparator afterwards.",
    "It fired after all; info when it was written again within hpet_retry_ns.",
    needs=("hwhpet.cmp", "hwhpet.fire"),
    thresholds=("hpet_retry_ns",),
)
TORN_ROUTE: Final = Code(
    "hwhpet-torn-route",
    "error",
    "H2",
    "IA-PC HPET 2.3.8, FSB interrupt route register; Xen hpet_msi_write",
    "A comparator fired between the two writes that gave its message another vector and another destination.",
    "The channel was not masked while its route was rewritten.",
    "int_enable is clear; one of the two registers did not change.",
    needs=("hwhpet.route_data", "hwhpet.route_addr", "hwhpet.fire"),
    thresholds=("hpet_route_ns",),
)
ENABLE_GLITCH: Final = Code(
    "hwhpet-enable-glitch",
    "info",
    "H3",
    "Xen 24f608dc90",
    "A comparator fired on int_enable 0 to 1 although it was not armed.",
    "Some parts raise an interrupt when int_enable is set.",
    "It was armed, or that is unknown.",
    needs=("hwhpet.config", "hwhpet.cmp", "hwhpet.fire"),
    thresholds=("hpet_glitch_ns",),
)
LEGACY_CONFLICT: Final = Code(
    "hwhpet-legacy-conflict",
    "warn",
    "H4",
    "IA-PC HPET 2.3.5, legacy replacement route",
    "Pin 8 rose without comparator 1 firing, while comparator 1 is routed to it in place of the RTC.",
    "The RTC is in use together with the legacy replacement route.",
    "Legacy replacement or int_enable of comparator 1 is off or unknown.",
    needs=("hwhpet.config", "hwhpet.fire", "ioapic.line"),
    thresholds=("hpet_match_ns",),
)

CODES: Final = (MISSED_COMPARATOR, TORN_ROUTE, ENABLE_GLITCH, LEGACY_CONFLICT)

PARAMETERS: Final = (
    Parameter("hpet_retry_ns", 1_000_000, "ns", "a missed comparator written again within this time was noticed"),
    Parameter("hpet_route_ns", 1_000_000, "ns", "two route writes further apart than this are not one update"),
    Parameter("hpet_glitch_ns", 10_000, "ns", "int_enable to an interrupt that it caused"),
    Parameter("hpet_match_ns", 2_000, "ns", "comparator 1 to the rise of pin 8"),
)
