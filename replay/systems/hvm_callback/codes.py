"""Divergence codes and parameters of the PV-on-HVM callback (spec S2.5, A, B)."""

from __future__ import annotations

from typing import Final

from replay.declare import Code, Parameter

__all__ = [
    "CODES",
    "COUNT_MISMATCH",
    "EOI_UNMATCHED",
    "INJECT_STORM",
    "LATE_ASSERT",
    "LATE_DELIVERY",
    "LOST_CALLBACK",
    "PARAMETERS",
    "REMOTE_IRR_STUCK",
    "SPURIOUS_INJECT",
    "STALE_ASSERT",
]

_SET: Final = "via.upcall_set"
_CLEAR: Final = "via.upcall_clear"
_LINE: Final = "via.line"
_INJECT: Final = "via.inject"
_EOI: Final = "via.eoi"
_RTE: Final = "via.rte_write"
#: A binding that was told that nobody else is on the GSI states this kind as observed.
_OTHERS: Final = "via.gsi_assert"

STALE_ASSERT: Final = Code(
    "via-stale-assert",
    "warn",
    "V5",
    "Xen vlapic_EOI_set, vioapic_update_EOI, hvm_set_callback_irq_level",
    "An EOI delivers the callback again although vcpu0's evtchn_upcall_pending is clear and nobody else holds the "
    "GSI; error when the line stays so for longer than stale_error_ns. Once for each episode.",
    "The flag is sampled on VM entries of vcpu0 only, so a handler on another vcpu cannot make the line fall.",
    "Another source holds the GSI, or the clearing of the flag is not recorded.",
    needs=(_SET, _CLEAR, _INJECT, _EOI, _OTHERS),
    thresholds=("stale_error_ns",),
)
SPURIOUS_INJECT: Final = Code(
    "via-spurious-inject",
    "warn",
    "V4",
    "Xen hvm_vcpu_has_pending_irq, hvm_set_callback_irq_level",
    "The callback's vector is injected although vcpu0's evtchn_upcall_pending is clear and nobody else holds the GSI.",
    "The vector entered IRR before the line fell; a deassert does not take it back.",
    "Another source holds the GSI (info when that is unknown: gsi_shared=0 excludes it); info when the flag was set "
    "again before the guest's handler read it.",
    needs=(f"{_SET}|evtchn.handled", f"{_CLEAR}|via.isr_end", _INJECT, _OTHERS),
    thresholds=("gsi_shared", "clock_slack_ns"),
)
INJECT_STORM: Final = Code(
    "via-inject-storm",
    "error",
    "V4 V5",
    "Xen vioapic_update_EOI",
    "The third spurious injection of one episode.",
    "vcpu0 is not entered, so nobody samples its flag; worse when there are more vcpus than pcpus.",
    "Another source holds the GSI.",
    needs=SPURIOUS_INJECT.needs,
    thresholds=("storm_count",),
)
LATE_ASSERT: Final = Code(
    "via-late-assert",
    "warn",
    "V1",
    "Xen hvm_set_callback_irq_level",
    "The line is raised later than late_assert_ns after evtchn_upcall_pending was set; error above "
    "late_assert_error_ns.",
    "The line is raised on VM entries of vcpu0 only, and vcpu0 was not entered.",
    "vcpu0 was offline or paused by the toolstack; the flag was cleared first; the line was high already.",
    needs=(_SET, _LINE),
    thresholds=("late_assert_ns", "late_assert_error_ns"),
)
LATE_DELIVERY: Final = Code(
    "via-late-delivery",
    "warn",
    "V3 V4",
    "Xen vmx_intr_assist, svm_intr_assist",
    "The callback is injected later than late_delivery_ns after its line rose, although the target could run.",
    "Scheduling of the target vcpu, a masked redirection entry, or a higher vector in service.",
    "The target was offline, or the guest had interrupts disabled (an interrupt window was requested).",
    needs=(_LINE, _INJECT, "lapic.intr_window"),
    thresholds=("late_delivery_ns",),
    closed=False,
)
LOST_CALLBACK: Final = Code(
    "via-lost-callback",
    "error",
    "V2 V3",
    "Xen vioapic_irq_positive_edge, vioapic_write_redirent",
    "The flag is set and the line asserted, the redirection entry is unmasked with Remote IRR clear, and the vector "
    "is in no IRR or ISR, for longer than lost_ns.",
    "The redirection entry was rewritten, the virtual LAPIC was reset, or state was restored in between.",
    "Immediately after save/restore, where the line is dropped on purpose (restore_grace_ns).",
    needs=(_SET, _LINE, _RTE, _INJECT),
    thresholds=("lost_ns", "restore_grace_ns"),
    closed=False,
)
REMOTE_IRR_STUCK: Final = Code(
    "via-remote-irr-stuck",
    "error",
    "V5",
    "Xen vioapic_update_EOI",
    "Remote IRR stays set for longer than remote_irr_ns while the vector it stands for is in no virtual LAPIC.",
    "The vector was changed while the interrupt was in flight, or its EOI was lost.",
    "The whereabouts of the vector are unknown.",
    needs=(_RTE, _INJECT, _EOI, f"{_LINE}|via.gsi_assert"),
    thresholds=("remote_irr_ns",),
    closed=False,
)
EOI_UNMATCHED: Final = Code(
    "via-eoi-unmatched",
    "info",
    "V5",
    "Xen vlapic_EOI_set",
    "The guest writes EOI while nothing is in service.",
    "A quirk of the guest.",
    "ISR is unknown; APIC assist or PV EOI is in use (eoi_assist).",
    needs=(_INJECT, _EOI),
    closed=False,
)
COUNT_MISMATCH: Final = Code(
    "via-count-mismatch",
    "error",
    "V1",
    "Xen hvm_irq.gsi_assert_count",
    "gsi_assert_count differs from the number of sources that hold the GSI, or a source that does not hold it lets go.",
    "A deassert without an assert.",
    "It is unknown which sources hold the GSI.",
    needs=(f"{_LINE}|via.gsi_deassert",),
    closed=False,
)

CODES: Final = (
    STALE_ASSERT,
    SPURIOUS_INJECT,
    INJECT_STORM,
    LATE_ASSERT,
    LATE_DELIVERY,
    LOST_CALLBACK,
    REMOTE_IRR_STUCK,
    EOI_UNMATCHED,
    COUNT_MISMATCH,
)

PARAMETERS: Final = (
    Parameter("gsi", 28, "", "GSI of the platform interrupt (recordings: until via.set_param says otherwise)"),
    Parameter("vector", 0x59, "", "vector in its redirection entry; a recording must name it or show the entry"),
    Parameter("rte_dest_vcpu", 1, "vcpu", "destination in its redirection entry (scenarios and what-if)"),
    Parameter("route_vcpu", -1, "vcpu", "what-if: the guest had routed the callback to this vcpu; -1: as recorded"),
    Parameter("sample_on_exit", 0, "", "applied: 1 if the flag is looked at on VM exits, before the exit is handled "
              "(recordings of Xen), 0 on VM entries (scenarios)"),
    Parameter("match_ns", 2_000, "ns", "how far a predicted injection may lie from the recorded one"),
    Parameter("apic_id_stride", 0, "", "APIC ids per vcpu in RTEs; 0: 2 in recordings (Xen), 1 in scenarios"),
    Parameter("gsi_shared", -1, "", "another device is on the GSI: 1 yes, 0 no, -1 as the events say"),
    Parameter("eoi_assist", 0, "", "1: the guest uses APIC assist or PV EOI, so EOIs may be missing"),
    Parameter("kick_ns", 500, "ns", "kick to VM entry"),
    Parameter("isr_clear_ns", 2_000, "ns", "injection to the clearing of evtchn_upcall_pending"),
    Parameter("isr_mid_exit_ns", 0, "ns", "injection to a VM exit inside the handler, 0: none"),
    Parameter("isr_eoi_ns", 4_000, "ns", "injection to EOI"),
    Parameter("exit_ns", 200, "ns", "EOI to the next VM entry"),
    Parameter("storm_count", 3, "", "spurious injections that make a storm"),
    Parameter("stale_error_ns", 1_000_000, "ns", "an asserted line with the flag clear becomes an error"),
    Parameter("late_assert_ns", 100_000, "ns", "flag set to line high: late"),
    Parameter("late_assert_error_ns", 10_000_000, "ns", "flag set to line high: error"),
    Parameter("late_delivery_ns", 1_000_000, "ns", "line high to injection: late"),
    Parameter("clock_slack_ns", 100_000, "ns", "how far the guest's clock may run ahead of the recorder's"),
    Parameter("lost_ns", 1_000_000, "ns", "nothing under way for this long: lost"),
    Parameter("remote_irr_ns", 1_000_000, "ns", "Remote IRR without a vector in flight for this long: stuck"),
    Parameter("restore_grace_ns", 10_000_000, "ns", "silence after via.set_param, which a restore repeats"),
)
