"""Rules of the callback that watch registers, counts and time: S2.5 beside the injections themselves.

Only recordings raise these (spec B).
"""

from __future__ import annotations

from typing import Final

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import NIL, NONE
from replay.knowledge import UNKNOWN
from replay.sink import Sink
from replay.systems.hvm_callback import codes
from replay.systems.hvm_callback.state import Domain, flag_text
from replay.systems.hvm_callback.vcpu import Vcpu

__all__ = ["LOST_DUE", "STUCK_DUE", "Watchdog"]

# Actions of the agenda.
LOST_DUE: Final = 4
STUCK_DUE: Final = 5


class Watchdog:
    """Lost callbacks, stuck Remote IRR, unmatched EOIs, wrong counts."""

    def __init__(self, sink: Sink, config: Config) -> None:
        self.sink = sink
        self.closed = sink.closed
        self.lost_ns = config.integer("lost_ns")
        self.remote_irr_ns = config.integer("remote_irr_ns")
        self.restore_grace_ns = config.integer("restore_grace_ns")
        self.eoi_assist = config.integer("eoi_assist")

    def watch(self, d: Domain, t: int) -> None:
        """Time-outs whose predicate may have changed: start, stop (U5)."""
        if self.closed:
            return
        machine = d.machine
        if self._lost(d):
            if d.lost_since == NIL:
                d.lost_since = t
                machine.agenda.at(t + self.lost_ns + 1, SOFTWARE, LOST_DUE, d.id, 0, t)
        else:
            d.lost_since = NIL
            d.lost_reported = False
        for gsi, pin in d.ioapic.pins.items():
            if pin.remote_irr == 1 and pin.sent != NONE and not d.in_flight(pin.sent):
                if gsi not in d.stuck_since:
                    d.stuck_since[gsi] = t
                    machine.agenda.at(t + self.remote_irr_ns + 1, SOFTWARE, STUCK_DUE, d.id, gsi, t)
            elif gsi in d.stuck_since:
                del d.stuck_since[gsi]
                d.stuck_reported.discard(gsi)

    def _lost(self, d: Domain) -> bool:
        """V2, V3: all five of flag, line, Remote IRR, mask, and the vector's whereabouts are known, and say lost."""
        if d.flag != 1 or d.via_asserted != 1 or not d.routed():
            return False
        pin = d.ioapic.pin(d.via_gsi)
        if pin.remote_irr != 0 or pin.masked != 0 or pin.vector == NONE:
            return False
        return d.surely_nowhere(pin.vector)

    def lost_due(self, d: Domain, since: int, t: int) -> None:
        """`via-lost-callback`: the predicate has held since `since`."""
        if d.lost_since != since or d.lost_reported:
            return
        if d.param_t != NIL and since - d.param_t < self.restore_grace_ns:
            return
        d.lost_reported = True
        pin = d.ioapic.pin(d.via_gsi)
        self.sink.report(
            codes.LOST_CALLBACK, t, dom=d.id, vcpu=0, obj=d.via_gsi, val=t - since, t_first=since,
            expected="vector in an IRR or ISR, or Remote IRR set",
            observed=f"flag=1 asserted=1 remote_irr=0 mask=0 {pin.vector:#x} nowhere, level={flag_text(pin.level)}",
            evidence=d.told(),
        )  # fmt: skip

    def stuck_due(self, d: Domain, gsi: int, since: int, t: int) -> None:
        """`via-remote-irr-stuck`: Remote IRR stands for a vector that is nowhere."""
        if d.stuck_since.get(gsi, NIL) != since or gsi in d.stuck_reported:
            return
        d.stuck_reported.add(gsi)
        pin = d.ioapic.pin(gsi)
        self.sink.report(
            codes.REMOTE_IRR_STUCK, t, dom=d.id, obj=gsi, val=pin.sent, t_first=since,
            cause="The entry was rewritten while the interrupt was in flight." if pin.rewritten else "",
            expected="remote_irr=0", observed=f"remote_irr=1, sent as {pin.sent:#x}, entry now {pin.vector:#x}",
            evidence=d.told(),
        )  # fmt: skip

    def eoi_unmatched(self, d: Domain, u: Vcpu, t: int, seq: int) -> None:
        """`via-eoi-unmatched`: nothing was in service."""
        if self.closed or self.eoi_assist or not u.lapic.isr_is_known():
            return
        d.eois_unmatched += 1
        self.sink.report(codes.EOI_UNMATCHED, t, dom=d.id, vcpu=u.number, seq=seq, observed="ISR empty")

    def underflow(self, d: Domain, gsi: int, source: int, t: int, seq: int) -> None:
        """`via-count-mismatch`: a source lets go of a GSI that it surely does not hold."""
        self.sink.report(
            codes.COUNT_MISMATCH, t, dom=d.id, obj=gsi, tgt=source, seq=seq,
            expected="deassert by a source that holds the GSI", observed="it does not", evidence=d.told(),
        )  # fmt: skip

    def count_seen(self, d: Domain, count: int, t: int, seq: int) -> None:
        """`via-count-mismatch`: the recorded gsi_assert_count against the sum of its contributors."""
        held = d.held_count()
        mine = d.via_asserted
        if held != UNKNOWN and mine != UNKNOWN and count != held + mine:
            self.sink.report(
                codes.COUNT_MISMATCH, t, dom=d.id, obj=d.via_gsi, val=count, seq=seq,
                expected=f"gsi_assert_count={held + mine}", observed=f"gsi_assert_count={count}",
                evidence=d.told(),
            )  # fmt: skip
            d.strangers = UNKNOWN
        elif held == UNKNOWN and mine != UNKNOWN:
            named = sum(n for key, n in d.held.items() if key >> 32 == d.via_gsi)
            d.strangers = max(0, count - mine - named)
