"""When Xen samples vcpu0's evtchn_upcall_pending and moves the line of the platform interrupt (spec S2.4).

The policies differ in these three hooks and in nothing else.
"""

from __future__ import annotations

from replay.systems.hvm_callback.state import Domain

__all__ = ["AlwaysCheck", "Applied", "Current", "Policy", "Proposed"]


class Policy:
    """Hooks of the callback. Base: the flag is set and vcpu0 is kicked; nothing else looks at it."""

    name = ""

    def on_upcall_set(self, d: Domain) -> None:
        """vcpu0's flag went from 0 to 1."""
        d.kick(0)

    def on_vmentry(self, d: Domain, v: int) -> None:
        """vCPU `v` is about to be entered; IRR is looked at afterwards."""

    def on_eoi(self, d: Domain, v: int) -> None:
        """vCPU `v` wrote EOI, for whatever vector; the highest ISR bit is taken afterwards."""

    def on_vmexit(self, d: Domain, v: int) -> None:
        """vCPU `v` has left the guest; why is looked at afterwards. Only what-ifs on recordings have exits."""


class Current(Policy):
    """hvm_set_callback_irq_level as of January 2008: `v->vcpu_id != 0` returns before the flag is looked at."""

    name = "current"

    def on_vmentry(self, d: Domain, v: int) -> None:
        if v == 0:
            d.line(d.flag)


class Proposed(Current):
    """hvm_perhaps_callback_irq_deasserted: EOI on any vcpu can lower the line, never raise it."""

    name = "proposed"

    def on_eoi(self, d: Domain, v: int) -> None:
        d.irq_lock_taken += 1
        if d.via_asserted == 1 and d.flag == 0:
            d.set_line(0)


class AlwaysCheck(Policy):
    """Without the vcpu0 test: every VM entry of every vcpu samples *vcpu0's* flag under the lock."""

    name = "always-check"

    def on_vmentry(self, d: Domain, v: int) -> None:
        d.line(d.flag)


class Applied(Policy):
    """Xen 10e3974b14, hvm_assert_evtchn_irq and hvm_maybe_deassert_evtchn_irq: raised at once, lowered on any entry."""

    name = "applied"

    def on_upcall_set(self, d: Domain) -> None:
        d.line(1)

    def on_vmentry(self, d: Domain, v: int) -> None:
        if d.via_asserted == 1 and d.flag == 0:
            d.line(0)

    def on_vmexit(self, d: Domain, v: int) -> None:
        """svm_vmexit_handler and vmx_vmexit_handler test before they handle the exit, so an EOI finds the line low."""
        self.on_vmentry(d, v)
