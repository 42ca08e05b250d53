"""The rules of the callback: predicates that are called at transitions (spec S2.5), in closed and in open runs alike.

Closed runs know every state word, so a verdict falls at once. A recording shows the guest's read of the flag only after
the injection; a verdict waits for it on the vCPU (`Vcpu.injected_t`) and falls at the read, the EOI or the end.
"""

from __future__ import annotations

from typing import Final

from replay.declare import Config
from replay.events import NIL, NONE
from replay.knowledge import UNKNOWN
from replay.sink import Sink
from replay.systems.hvm_callback import codes
from replay.systems.hvm_callback.state import (
    ASSERT_WORD,
    CLEAR_WORD,
    DEASSERT_WORD,
    INJECT_WORD,
    SET_WORD,
    Domain,
    flag_text,
)
from replay.systems.hvm_callback.vcpu import Vcpu

__all__ = ["CallbackMonitor"]

#: Confidence when the flag was not recorded and only the handler's own look, or its idleness, speaks.
CONF_READ: Final = 80
CONF_IDLE_HANDLER: Final = 50
#: Confidence when it is unknown whether another device holds the line.
CONF_SHARED: Final = 50
CONF_INFERRED_LINE: Final = 80
_SET_AGAIN: Final = "The flag was set again before the guest's handler read it."
_NOT_EXCLUDED: Final = "Another device on this GSI is not excluded (--set callback.gsi_shared=0 excludes it)."


class CallbackMonitor:
    """S2.5. One object serves all domains of a run; what it remembers lives in the domain."""

    def __init__(self, sink: Sink, config: Config) -> None:
        self.sink = sink
        self.closed = sink.closed
        self.sees_sets: bool  # these three are the machine's to say, before anything happens
        self.sees_work: bool
        self.sees_windows: bool
        self.storm_count = config.integer("storm_count")
        self.stale_error_ns = config.integer("stale_error_ns")
        self.late_assert_ns = config.integer("late_assert_ns")
        self.late_assert_error_ns = config.integer("late_assert_error_ns")
        self.clock_slack_ns = config.integer("clock_slack_ns")
        self.late_delivery_ns = config.integer("late_delivery_ns")

    # -- transitions of the flag and the line ------------------------------------------------------------------

    def flag_set(self, d: Domain, t: int, seq: int) -> None:
        """evtchn_upcall_pending went from 0 to 1: a new episode."""
        self.end_stale(d, t)
        d.set_t = t
        d.sets += 1
        d.late_reported = False
        d.offline0 = 0 in d.vcpus and d.vcpus[0].offline == 1
        self.end_storm(d, t)
        d.ordinal = 0
        d.storm_reported = False
        d.stale_reported = False
        if d.latency_from == NIL:
            d.latency_from = t
        d.set_count += 1
        d.story.append((t, seq, SET_WORD, 0))

    def flag_cleared(self, d: Domain, v: int, t: int, seq: int) -> None:
        """The guest's handler on vcpu `v` read and cleared the flag."""
        self._assert_overdue(d, t)
        d.clears += d.flag == 1
        d.clear_t = t
        d.reads += 1
        d.story.append((t, seq, CLEAR_WORD, v))

    def line_changed(self, d: Domain, a: int) -> None:
        """V1 changed the callback's contribution to `a`."""
        t = d.machine.now
        seq = d.machine.seq
        if a:
            d.story.append((t, seq, ASSERT_WORD, NONE))
            d.line_t = t
            d.line_excused = False
            if d.flag == 1:
                self.asserted(d, t, t - d.set_t, seq)
        else:
            d.story.append((t, seq, DEASSERT_WORD, NONE))
            d.line_t = NIL
            self.end_stale(d, t)
            self.end_storm(d, t)
            d.stale_reported = False

    def asserted(self, d: Domain, t: int, delay: int, seq: int) -> None:
        """V1, line(1): `via-late-assert` when the flag had been set for too long."""
        d.max_assert_delay = max(d.max_assert_delay, delay)
        if delay > self.late_assert_ns and not d.late_reported and not d.offline0:
            self._late_assert(d, t, delay, seq)

    def _assert_overdue(self, d: Domain, t: int) -> None:
        """The flag has been set for long and the line is known to be low still; told once for each set."""
        if d.flag != 1 or d.via_asserted != 0 or d.late_reported or d.offline0 or self.closed:
            return
        if t - d.set_t > self.late_assert_ns and d.routed():
            self._late_assert(d, t, t - d.set_t, NONE)

    def _late_assert(self, d: Domain, t: int, delay: int, seq: int) -> None:
        d.late_reported = True
        self.sink.report(
            codes.LATE_ASSERT, t, dom=d.id, vcpu=0, obj=d.via_gsi, val=delay, t_first=d.set_t, seq=seq,
            severity="error" if delay > self.late_assert_error_ns else "",
            expected=f"line asserted within {self.late_assert_ns} ns of upcall_pending",
            observed=f"{delay} ns", evidence=d.told(),
        )  # fmt: skip

    # -- injections --------------------------------------------------------------------------------------------

    def injected(self, d: Domain, u: Vcpu, t: int, seq: int, conf: int) -> None:
        """V4: the callback's vector was injected on a vCPU."""
        d.injections += 1
        d.story.append((t, seq, INJECT_WORD, u.number))
        others = d.others(d.via_gsi)
        if self.closed:
            if d.flag == 1:
                self.useful(d, t)
            elif others == 0:
                self.spurious(d, u.number, t, "", 100, seq)
            return
        self._delivered(d, u, t, seq)
        if u.injected_t != NIL:
            self.verdict(d, u, UNKNOWN)
        u.injected_t = t
        u.injected_seq = seq
        u.injected_conf = conf
        u.flag_at_injection = d.flag
        u.others_at_injection = others
        u.reads_at_injection = d.reads
        u.sets_at_injection = d.sets
        u.after_eoi = u.entries_since_eoi == 0 or (u.entries_since_eoi == 1 and u.last_entry_t == t)
        u.repeated = u.after_eoi and d.callback_eoi_t != NIL
        u.begun = False
        if u.ahead_t != NIL and t - u.ahead_t <= self.clock_slack_ns and d.flag == UNKNOWN:
            # The guest's clock runs a little ahead: this handler was seen before its injection (0.1).
            u.forget_injection()
        u.ahead_t = NIL
        if d.flag == 1:
            self.useful(d, t)
        elif d.flag == 0 and others == 0:
            self._redelivered_unseen(d, t)

    def useful(self, d: Domain, t: int) -> None:
        """The first injection that serves a set flag."""
        d.useful += 1
        if d.latency_from != NIL:
            d.max_latency = max(d.max_latency, t - d.latency_from)
            d.latency_sum += t - d.latency_from
            d.consumed += 1
            d.latency_from = NIL

    def read(self, d: Domain, u: Vcpu, found: int) -> None:
        """The handler on a vCPU reads the flag; `found` is its value there if recorded, else UNKNOWN."""
        if u.injected_t == NIL:
            return
        if found == 1:
            if u.flag_at_injection != 0:
                self.worked(d, u)
            else:
                self.verdict(d, u, found)
        elif found == 0 or u.flag_at_injection == 0:
            self.verdict(d, u, found)

    def worked(self, d: Domain, u: Vcpu) -> None:
        """The handler found something to do: whatever came before was another episode."""
        if not self.sees_sets:
            d.ordinal = 0
            d.storm_reported = False
        if u.flag_at_injection != 0:
            u.forget_injection()

    def handler_ended(self, d: Domain, u: Vcpu) -> None:
        """The guest's handler returned: if nothing came out of it, that speaks (with low confidence)."""
        if u.injected_t == NIL or not u.begun:
            return
        if u.work:
            self.worked(d, u)
            return
        if not self.sees_work:
            return
        d.no_work += 1
        if u.after_eoi and u.flag_at_injection == UNKNOWN and d.sets == u.sets_at_injection:
            self._judge(d, u, min(CONF_IDLE_HANDLER, u.injected_conf))
            u.forget_injection()

    def verdict(self, d: Domain, u: Vcpu, found: int) -> None:
        """V4: the last injection on this vCPU can be judged now, or never."""
        if u.flag_at_injection == 0:
            if u.others_at_injection == 0:
                if d.sets > u.sets_at_injection or found == 1:
                    self._report_spurious(
                        d, u.number, u.injected_t, d.ordinal + 1, "info", u.injected_conf, u.injected_seq, _SET_AGAIN
                    )
                else:
                    self.spurious(d, u.number, u.injected_t, "", u.injected_conf, u.injected_seq)
            elif d.sets == u.sets_at_injection and found != 1:
                self._judge(d, u, u.injected_conf)
        elif (
            found == 0
            and u.flag_at_injection == UNKNOWN
            and d.reads == u.reads_at_injection
            and d.sets == u.sets_at_injection
        ):
            # Nobody cleared the flag between the injection and this look at it, so it was clear at the injection.
            self._judge(d, u, min(CONF_READ, u.injected_conf))
        u.forget_injection()

    def _judge(self, d: Domain, u: Vcpu, conf: int) -> None:
        """The flag was clear; whether that is a fault depends on what is known of other devices."""
        if u.others_at_injection == 0:
            self.spurious(d, u.number, u.injected_t, "", conf, u.injected_seq)
        elif u.others_at_injection == UNKNOWN:
            self.spurious(d, u.number, u.injected_t, "info", min(conf, CONF_SHARED), u.injected_seq)

    def spurious(self, d: Domain, v: int, t: int, severity: str, conf: int, seq: int) -> None:
        """`via-spurious-inject`, and `via-inject-storm` at the third of an episode."""
        d.spurious += 1
        d.ordinal += 1
        d.storm_max = max(d.storm_max, d.ordinal)
        if d.ordinal == 1:
            d.storm_start = t
        cause = _NOT_EXCLUDED if severity == "info" else ""
        self._report_spurious(d, v, t, d.ordinal, severity, conf, seq, cause)
        if d.ordinal >= self.storm_count and not d.storm_reported:
            d.storm_reported = True
            self.sink.report(
                codes.INJECT_STORM, t, dom=d.id, vcpu=v, obj=d.vector, val=d.ordinal, t_first=d.storm_start, seq=seq,
                severity=severity or ("warn" if conf < CONF_READ else ""), conf=conf, cause=cause,
                expected="one injection for each time the flag is set",
                observed=f"{d.ordinal} with the flag clear", evidence=d.told(),
            )  # fmt: skip

    def _report_spurious(
        self, d: Domain, v: int, t: int, ordinal: int, severity: str, conf: int, seq: int, cause: str
    ) -> None:
        self.sink.report(
            codes.SPURIOUS_INJECT, t, dom=d.id, vcpu=v, obj=d.vector, val=ordinal, seq=seq, severity=severity,
            conf=conf, cause=cause, expected="upcall_pending=1 or another source on the GSI",
            observed=f"upcall_pending=0 via_asserted={flag_text(d.via_asserted)}", evidence=d.told(),
        )  # fmt: skip

    def end_storm(self, d: Domain, t: int) -> None:
        """The episode ends: how long its spurious injections went on."""
        if d.ordinal and d.storm_start != NIL:
            d.storm_ns = max(d.storm_ns, t - d.storm_start)
            d.storm_start = NIL

    # -- stale line --------------------------------------------------------------------------------------------

    def redelivered(self, d: Domain, v: int, seq: int) -> None:
        """V5 delivered the callback again (predicted)."""
        if d.flag == 0 and d.others(d.via_gsi) == 0:
            self._stale(d, v, d.machine.now, seq)

    def callback_eoi(self, d: Domain, u: Vcpu, t: int, seq: int) -> None:
        """A recorded EOI of the callback's vector: what was known then decides what a later injection proves."""
        d.callback_eois += 1
        d.callback_eoi_t = t
        d.callback_eoi_asserted = d.via_asserted
        d.callback_eoi_others = d.others(d.via_gsi)
        d.callback_eoi_seq = seq
        d.callback_eoi_vcpu = u.number
        if u.injected_t != NIL and u.flag_at_injection == 0:
            self.verdict(d, u, UNKNOWN)

    def _redelivered_unseen(self, d: Domain, t: int) -> None:
        """An injection with the flag clear since before the last EOI can only come from V5 at that EOI."""
        eoi_t = d.callback_eoi_t
        if eoi_t == NIL or d.callback_eoi_others != 0 or d.callback_eoi_asserted == 0:
            return
        if d.clear_t == NIL or d.clear_t > eoi_t:  # the flag was not clear yet at that EOI
            return
        self._stale(d, d.callback_eoi_vcpu, eoi_t, d.callback_eoi_seq)

    def _stale(self, d: Domain, v: int, t: int, seq: int) -> None:
        """`via-stale-assert` begins: one for each episode; told when it ends and its length is known."""
        if d.stale_reported:
            d.stale_count += 1
            return
        d.stale_reported = True
        d.stale_t = t
        d.stale_vcpu = v
        d.stale_seq = seq
        d.stale_count = 1
        d.stale_start = d.clear_t if d.clear_t != NIL else t
        d.stale_asserted = d.via_asserted

    def end_stale(self, d: Domain, t: int) -> None:
        """The episode ends: the line fell, the flag was set, another source came, or the run is over."""
        if d.stale_t == NIL:
            return
        length = t - d.stale_start
        self.sink.report(
            codes.STALE_ASSERT, d.stale_t, dom=d.id, vcpu=d.stale_vcpu, obj=d.via_gsi, val=d.stale_count,
            t_first=d.stale_start, seq=d.stale_seq, severity="error" if length > self.stale_error_ns else "",
            conf=100 if d.stale_asserted == 1 else CONF_INFERRED_LINE,
            expected="callback_via_asserted=0 once upcall_pending is clear",
            observed=f"asserted with the flag clear for {length} ns, {d.stale_count} re-deliveries",
            evidence=d.told(),
        )  # fmt: skip
        d.stale_t = NIL

    # -- delivery ----------------------------------------------------------------------

    def _delivered(self, d: Domain, u: Vcpu, t: int, seq: int) -> None:
        """`via-late-delivery`: from the line, or from when the target could run, to the injection."""
        line_t = d.line_t
        d.line_t = NIL
        if line_t == NIL or d.line_excused or not self.sees_windows or u.ready_since == NIL:
            return
        if t - max(line_t, u.ready_since) > self.late_delivery_ns:
            self._late_delivery(d, u.number, t, line_t, seq)

    def _late_delivery(self, d: Domain, v: int, t: int, line_t: int, seq: int) -> None:
        masked = d.ioapic.pin(d.via_gsi).masked
        self.sink.report(
            codes.LATE_DELIVERY, t, dom=d.id, vcpu=v, obj=d.vector, val=t - line_t, t_first=line_t, seq=seq,
            cause="The redirection entry is masked." if masked == 1 else "",
            expected=f"injected within {self.late_delivery_ns} ns of the line", observed=f"{t - line_t} ns",
            evidence=d.told(),
        )  # fmt: skip

    # -- the end -----------------------------------------------------------------------------------------------

    def finish(self, d: Domain, t: int) -> None:
        """Verdicts that waited for something which did not come."""
        self.end_stale(d, t)
        self.end_storm(d, t)
        if self.closed:
            return
        for vcpu in d.vcpus.values():
            if vcpu.injected_t != NIL and vcpu.flag_at_injection == 0:
                self.verdict(d, vcpu, UNKNOWN)
        self._assert_overdue(d, t)
        if d.line_t != NIL and not d.line_excused and self.sees_windows and d.via_asserted == 1:
            targets = d.targets(d.ioapic.pin(d.via_gsi))
            u = d.vcpu(targets[0]) if targets else None
            if u is not None and u.ready_since != NIL and t - max(d.line_t, u.ready_since) > self.late_delivery_ns:
                self._late_delivery(d, u.number, t, d.line_t, NONE)
