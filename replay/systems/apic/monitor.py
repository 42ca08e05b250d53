"""Rules of the local APIC: predicates over (state, event) that raise divergences (spec S6.1).

Every method is told of one transition *before* the state changes and knows how to stay silent on unknowns (U3).
"""

from __future__ import annotations

from replay.events import NONE
from replay.hardware.lapic import FIRST_LEGAL_VECTOR, vector_class
from replay.sink import Evidence, Sink
from replay.systems.apic import codes
from replay.systems.apic.state import Processor

__all__ = ["LapicMonitor"]


class LapicMonitor:
    """The L rules. `accepts_seen`, `delivers_seen`, `exits_seen`: whether the recording shows those.

    `tpr_certain`: whether every write of TPR is seen. No recorder does: behind a TPR shadow a guest writes unseen.
    """

    def __init__(self, sink: Sink, nesting_limit: int, t_err_ns: int) -> None:
        self.sink = sink
        self.nesting_limit = nesting_limit
        self.t_err_ns = t_err_ns
        self.accepts_seen = True
        self.exits_seen = True
        self.delivers_seen = True
        self.tpr_certain = True
        self.max_nesting = 0
        self.unmatched = 0

    def illegal(self, p: Processor, vector: int, t: int, seq: int) -> bool:
        """L1: vectors below 16 are reserved. True when it was reported."""
        if vector >= FIRST_LEGAL_VECTOR:
            return False
        self.sink.report(
            codes.ILLEGAL_VECTOR, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=vector, seq=seq,
            expected="vector >= 16", observed=f"vector {vector}",
        )  # fmt: skip
        return True

    def delivering(self, p: Processor, vector: int, t: int, seq: int) -> None:
        """L3 and L5, before IRR, ISR and TPR change."""
        top = p.lapic.highest_in_service()
        if vector != p.lapic.spurious_vector and top >= 0 and vector_class(vector) <= vector_class(top):
            self._inversion(p, vector, t, seq, top, f"vector {top:#x} is in service")
        elif vector != p.lapic.spurious_vector and self.tpr_certain and p.lapic.held_by_tpr(vector):
            self._inversion(p, vector, t, seq, p.lapic.tpr, f"TPR is {p.lapic.tpr:#x}")
        else:
            self._nesting_on_early_eoi(p, vector, t, seq)
        if self.accepts_seen:
            self._request_seen(p, vector, t, seq)

    def _inversion(self, p: Processor, vector: int, t: int, seq: int, priority: int, why: str) -> None:
        """L2, L3: PPR, which is at least that of what is known of ISR and TPR, holds the vector back."""
        self.sink.report(
            codes.PRIORITY_INVERSION, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=vector, val=priority, seq=seq,
            expected=f"class above {vector_class(priority):#x} ({why})", observed=f"vector {vector:#x} delivered",
            evidence=(*p.story(), Evidence(t, seq, f"deliver {vector:#x} below {priority:#x}")),
        )  # fmt: skip

    def _nesting_on_early_eoi(self, p: Processor, vector: int, t: int, seq: int) -> None:
        """L5: the outer handler has written its EOI, is still running, and is of the same or a higher class."""
        if not self.exits_seen or not p.frames:
            return
        outer = p.frames[-1][0]
        if outer not in p.lapic.isr and vector_class(vector) <= vector_class(outer):
            self.sink.report(
                codes.LOWER_PRIORITY_NESTED, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=vector, val=outer, seq=seq,
                expected=f"nothing of class {vector_class(outer):#x} or below until {outer:#x} has returned",
                observed=f"vector {vector:#x} entered, {outer:#x} running with its ISR bit clear",
                evidence=(*p.story(), Evidence(t, seq, f"deliver {vector:#x} inside {outer:#x}")),
            )  # fmt: skip

    def _request_seen(self, p: Processor, vector: int, t: int, seq: int) -> None:
        """L3: the vector was requested, and nothing of a higher class was requested before it."""
        lapic = p.lapic
        if vector == lapic.spurious_vector:
            return
        bit = 1 << vector
        if lapic.irr_known & bit and not lapic.irr & bit:
            self.sink.report(
                codes.DELIVER_WITHOUT_IRR, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=vector, seq=seq,
                expected=f"IRR[{vector:#x}] = 1", observed="IRR bit clear",
                evidence=(*p.story(), Evidence(t, seq, f"deliver {vector:#x}")),
            )  # fmt: skip
        higher = lapic.pending_above(vector)
        if higher >= 0 and t - p.requested_at.get(higher, t) > self.t_err_ns and not p.blocked(higher):
            self.sink.report(
                codes.NOT_HIGHEST, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=vector, val=higher, seq=seq, conf=50,
                expected=f"vector {higher:#x} first", observed=f"vector {vector:#x} delivered",
                evidence=(
                    Evidence(p.requested_at[higher], None, f"request {higher:#x}"),
                    Evidence(t, seq, f"deliver {vector:#x}"),
                ),
            )  # fmt: skip

    def entered(self, p: Processor, vector: int, t: int, seq: int) -> None:
        """Stack depth after a handler was entered."""
        depth = len(p.frames)
        self.max_nesting = max(self.max_nesting, depth)
        if depth > self.nesting_limit:
            self.sink.report(
                codes.NESTING_DEPTH, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=vector, val=depth, seq=seq,
                expected=f"at most {self.nesting_limit} handlers inside each other",
                observed=f"{depth}: " + ", ".join(f"{v:#x}" for v, _ in p.frames),
                evidence=p.story(),
            )  # fmt: skip

    def eoi(self, p: Processor, named: int, t: int, seq: int) -> None:
        """L4, before the highest ISR bit is cleared. `named` is the vector that the record names, or NONE."""
        top = p.lapic.highest_in_service()
        if top < 0:
            if not self.delivers_seen or not p.lapic.isr_is_known():
                return
            self.unmatched += 1
            self.sink.report(
                codes.EOI_UNMATCHED, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=named, seq=seq, conf=p.conf,
                expected="a vector in service", observed="ISR empty",
                evidence=(*p.story(), Evidence(t, seq, "EOI")),
            )  # fmt: skip
        elif named not in (NONE, top):
            self.sink.report(
                codes.EOI_WRONG_VECTOR, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=named, val=top, seq=seq,
                expected=f"EOI of {top:#x}, the highest in service", observed=f"EOI of {named:#x}",
                evidence=(*p.story(), Evidence(t, seq, f"EOI of {named:#x}")),
            )  # fmt: skip

    def exiting(self, p: Processor, vector: int, t: int, seq: int) -> None:
        """Handlers return in the reverse order of their entries."""
        if p.frames and p.frames[-1][0] == vector:
            return
        if any(v == vector for v, _ in p.frames):
            self.sink.report(
                codes.EXIT_ORDER, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=vector, val=p.frames[-1][0], seq=seq,
                expected=f"return of {p.frames[-1][0]:#x}", observed=f"return of {vector:#x}", evidence=p.story(),
            )  # fmt: skip
        elif p.frames_known:
            self.sink.report(
                codes.EXIT_UNMATCHED, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=vector, seq=seq,
                expected="an entered handler", observed=f"return of {vector:#x}", evidence=p.story(),
            )  # fmt: skip

    def overdue(self, p: Processor, vector: int, t: int, since: int) -> None:
        """L6: still in service long after the handler returned; only a cost while the owner does not run."""
        self.sink.report(
            codes.EOI_OVERDUE, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=vector, val=t - since, t_first=since,
            expected=f"EOI of {vector:#x}", observed="still in service",
            severity="info" if p.running == 0 else "", evidence=p.story(),
        )  # fmt: skip

    def stuck(self, p: Processor, vector: int, t: int, since: int) -> None:
        """Requested, deliverable, running, and yet not delivered. Interrupts may have been off: nobody records IF."""
        self.sink.report(
            codes.IRR_STUCK, t, cpu=p.cpu, dom=p.dom, vcpu=p.vcpu, obj=vector, val=t - since, t_first=since,
            expected=f"delivery of {vector:#x}", observed="IRR set, nothing above it in service",
            severity="warn", conf=50,
            evidence=(Evidence(since, None, f"{vector:#x} deliverable"),),
        )  # fmt: skip
