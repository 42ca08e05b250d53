"""The callback driven by events: closed runs (the policy decides) and recordings (their outcomes are checked)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

from replay.agenda import SOFTWARE
from replay.bodies import Bodies
from replay.declare import Config
from replay.events import KIND_ID, NIL, NONE
from replay.knowledge import UNKNOWN
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.hvm_callback.calibration import Recorded
from replay.systems.hvm_callback.monitor import CallbackMonitor
from replay.systems.hvm_callback.policies import Policy
from replay.systems.hvm_callback.state import ENTRY, EOI_WORD, RTE_WORD, Domain
from replay.systems.hvm_callback.watchdog import LOST_DUE, STUCK_DUE, Watchdog

__all__ = ["CallbackMachine"]

SET_PARAM: Final = KIND_ID["via.set_param"]
UPCALL_SET: Final = KIND_ID["via.upcall_set"]
UPCALL_CLEAR: Final = KIND_ID["via.upcall_clear"]
RTE_WRITE: Final = KIND_ID["via.rte_write"]
GSI_ASSERT: Final = KIND_ID["via.gsi_assert"]
GSI_DEASSERT: Final = KIND_ID["via.gsi_deassert"]
VMENTRY: Final = KIND_ID["via.vmentry"]
INJECT: Final = KIND_ID["via.inject"]
EOI: Final = KIND_ID["via.eoi"]
LINE: Final = KIND_ID["via.line"]
ISR_BEGIN: Final = KIND_ID["via.isr_begin"]
ISR_END: Final = KIND_ID["via.isr_end"]
HANDLED: Final = KIND_ID["evtchn.handled"]
RUN: Final = KIND_ID["sched.run"]
STOP: Final = KIND_ID["sched.stop"]
WINDOW: Final = KIND_ID["lapic.intr_window"]
RESET: Final = KIND_ID["lapic.reset"]
IDLE: Final = KIND_ID["lapic.idle"]
LOST: Final = KIND_ID["trace.lost"]

# Actions of the agenda; a = domain, b = vcpu. ENTRY is declared with the state, the time-outs with the rules.
CLEAR_DUE: Final = 2
EOI_DUE: Final = 3
SET_DUE: Final = 6

#: Domain of the idle vCPUs.
IDLE_DOMAIN: Final = 0x7FFF
# Xen runstates, `val` of sched.stop.
RUNNABLE: Final = 1
BLOCKED: Final = 2
OFFLINE: Final = 3


class CallbackMachine(Machine):
    """All domains of a recording, or the one of a scenario (spec S2, A, B)."""

    columns: ClassVar[tuple[str, ...]] = (
        "kind", "seq", "t_ns", "cpu", "dom", "vcpu", "obj", "tgt", "val", "val2", "conf",
    )  # fmt: skip

    def __init__(self, policy: Policy, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.policy = policy
        self.closed = sink.closed
        self.seq = NONE  # canonical event that is being fed; NONE for predicted ones
        self.gsi = config.integer("gsi")
        self.vector_given = self.closed or "vector" in config.given
        self.vector = config.integer("vector") if self.vector_given else NONE
        route = config.integer("route_vcpu") if self.closed else NONE
        self.dest_vcpu = route if route >= 0 else config.integer("rte_dest_vcpu")
        self.sample_on_exit = config.integer("sample_on_exit")
        self.apic_id_stride = config.integer("apic_id_stride") or (1 if self.closed else 2)
        self.gsi_shared = config.integer("gsi_shared")
        self.kick_ns = config.integer("kick_ns")
        self.isr_clear_ns = config.integer("isr_clear_ns")
        self.isr_mid_exit_ns = config.integer("isr_mid_exit_ns")
        self.isr_eoi_ns = config.integer("isr_eoi_ns")
        self.exit_ns = config.integer("exit_ns")
        self.domains: dict[int, Domain] = {}
        self.monitor = CallbackMonitor(sink, config)
        self.watchdog = Watchdog(sink, config)
        # What-if on a recording: its bodies, the inferred sets that are still to come, the VM entries of bodies.
        self.bodies: Bodies | None = None
        self.recorded: Recorded | None = None
        self.next_set = 0
        self.next_inside = 0

    def load(self, init: Mapping[str, Any]) -> None:
        if self.measured is not None and isinstance(self.measured.aids, Recorded):
            self.bodies = self.measured.bodies
            self.recorded = self.measured.aids
            self.schedule_set()

    def schedule_set(self) -> None:
        """The next inferred set goes on the agenda."""
        recorded = self.recorded
        if recorded is not None and self.next_set < len(recorded.sets):
            at = max(recorded.sets[self.next_set], 0)
            self.agenda.at(at, SOFTWARE, SET_DUE, recorded.set_doms[self.next_set])
            self.next_set += 1

    def ignores(self) -> frozenset[str]:
        """Which vCPU runs matters to delays (since a set of the flag, a line, a window), and one that is first seen
        running to what is known of domains created later."""
        judged = ("via.upcall_set", "via.line", "lapic.intr_window", "lapic.reset")
        if self.closed or self.from_boot or self.observed is None or any(self.sees(kind) for kind in judged):
            return frozenset()
        return frozenset(("sched.run", "sched.stop"))

    def start(self) -> None:
        """What the recording can show decides which rules may speak."""
        self.monitor.sees_sets = self.sees("via.upcall_set")
        self.monitor.sees_work = self.sees("evtchn.handled")
        self.monitor.sees_windows = self.sees("lapic.intr_window")

    def domain(self, number: int) -> Domain:
        """The domain of this number."""
        d = self.domains.get(number)
        if d is None:
            d = Domain(number, self)
            self.domains[number] = d
        return d

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        self.start()
        if self.closed:
            self.consume_stimuli(rows)
        else:
            self.consume_recording(rows)

    # -- closed: only stimuli and context ------------------------------------------------------------------------

    def consume_stimuli(self, rows: Iterable[tuple[int, ...]]) -> None:
        """Event glue of closed runs. Outcomes and responses are the model's own here."""
        for kind, seq, t, _, dom, v, obj, tgt, val, _, _ in rows:
            self.advance(t)
            if dom == IDLE_DOMAIN:
                continue
            d = self.domain(dom)
            self.seq = seq
            if kind == VMENTRY:
                if self.recorded is None or not self.of_body(seq):
                    self.enter(d, v)
            elif kind == UPCALL_SET:
                if self.recorded is None or not self.recorded.sets:
                    self.upcall_set(d, v)
            elif kind == RUN:
                d.vcpu(v).running = 1
                self.enter(d, v)
            elif kind == STOP:
                d.vcpu(v).running = 0
                d.vcpu(v).blocked = val == BLOCKED
            elif kind == GSI_ASSERT:
                d.hold(obj, tgt, 1)
            elif kind == GSI_DEASSERT:
                d.hold(obj, tgt, 0)
            elif kind == RTE_WRITE:
                d.rte_write(obj, val, tgt)
            elif kind == SET_PARAM:
                d.set_param(val, obj)
            self.seq = NONE
            self.clock_stale(d)

    def of_body(self, seq: int) -> bool:
        """Whether a recorded VM entry belongs to the body of a recorded injection: it moves with the predicted one."""
        inside = self.recorded.inside if self.recorded is not None else ()
        while self.next_inside < len(inside) and inside[self.next_inside] < seq:
            self.next_inside += 1
        return self.next_inside < len(inside) and inside[self.next_inside] == seq

    def upcall_set(self, d: Domain, v: int) -> None:
        """An event arrives: vcpu0's flag goes from 0 to 1, or was 1 already."""
        if d.flag == 1 or v > 0:
            return
        self.monitor.flag_set(d, self.now, self.seq)
        d.flag = 1
        self.policy.on_upcall_set(d)

    def enter(self, d: Domain, v: int) -> None:
        """V4; an injection brings the handler's body with it (spec A)."""
        vector = d.vmentry(v)
        if vector == NONE:
            return
        t = self.now
        mine = vector == d.vector
        if mine:
            since = d.latency_from if d.flag == 1 else NIL
            self.monitor.injected(d, d.vcpu(v), t, self.seq, 100)
            self.effects.append((t, d.id << 16 | v))
            if self.bodies is not None:
                self.play(d, v, since, self.bodies)
                return
            self.agenda.at(t + self.isr_clear_ns, SOFTWARE, CLEAR_DUE, d.id, v)
            if self.isr_mid_exit_ns:
                self.agenda.at(t + self.isr_mid_exit_ns, SOFTWARE, ENTRY, d.id, v)
        self.agenda.at(t + self.isr_eoi_ns, SOFTWARE, EOI_DUE, d.id, v)

    def play(self, d: Domain, v: int, since: int, bodies: Bodies) -> None:
        """C2, C3: the body that was recorded for the flag set at `since` (NIL: the injection is spurious), on vcpu `v`.
        One handler serves whatever was sent while the flag was set: bodies of such sets are dropped."""
        t = self.now
        taken = bodies.take(d.id, since, since) if since != NIL else ()
        first = until = 0
        if taken:
            clear, eoi, after, first, until = taken[0]
        else:
            clear, eoi, after, _, _ = bodies.substitute(d.id) or (NIL, self.isr_eoi_ns, NIL, 0, 0)
        if clear == NIL or clear >= eoi:
            clear = self.isr_clear_ns if self.isr_clear_ns < eoi else eoi // 2
        self.agenda.at(t + clear, SOFTWARE, CLEAR_DUE, d.id, v)
        if self.recorded is not None:
            for offset in self.recorded.entries[first:until]:
                self.agenda.at(t + offset, SOFTWARE, ENTRY, d.id, v)
        self.agenda.at(t + eoi, SOFTWARE, EOI_DUE, d.id, v, after if after != NIL else 0)

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        if action == SET_DUE:
            self.upcall_set(self.domain(a), 0)
            self.schedule_set()
            return
        d = self.domains[a]
        if action == ENTRY:
            self.enter(d, b)
        elif action == CLEAR_DUE:
            if d.flag == 1:
                self.monitor.flag_cleared(d, b, self.now, NONE)
                d.flag = 0
        elif action == EOI_DUE:
            d.eoi_exits += 1
            if self.sample_on_exit:
                self.policy.on_vmexit(d, b)
            if d.eoi(b, NONE) == d.vector:
                d.callback_eois += 1
            self.agenda.at(self.now + (c or self.exit_ns), SOFTWARE, ENTRY, a, b)
        elif action == LOST_DUE:
            self.watchdog.lost_due(d, c, self.now)
        elif action == STUCK_DUE:
            self.watchdog.stuck_due(d, b, c, self.now)
        self.clock_stale(d)

    # -- open: the recording's own outcomes ----------------------------------------------------------------------

    def consume_recording(self, rows: Iterable[tuple[int, ...]]) -> None:
        """Event glue of recordings."""
        heap = self.agenda.heap
        d = None
        for kind, seq, t, cpu, dom, v, obj, tgt, val, val2, conf in rows:
            if heap:
                self.advance(t)
            else:
                self.now = t
            if kind == LOST:
                self.taint(cpu, val, t)
                continue
            if dom == IDLE_DOMAIN:
                continue
            if d is None or d.id != dom:
                d = self.domain(dom)
            self.seq = seq
            if kind == VMENTRY:
                u = d.vcpus.get(v) or d.vcpu(v)
                u.entries_since_eoi += 1
                u.last_entry_t = t
                d.vm_entries += 1
                continue
            if kind == RUN:
                self.recorded_run(d, v)
                continue
            if kind == STOP:
                self.recorded_stop(d, v, val)
                continue
            if kind == INJECT:
                self.recorded_inject(d, v, obj, conf)
            elif kind == EOI:
                self.recorded_eoi(d, v, obj)
            elif kind == ISR_BEGIN:
                self.recorded_begin(d, v, obj)
            elif kind == ISR_END:
                if val != NIL:
                    d.vcpu(v).work += val
                d.matching.ended(v, d.vcpu(v).work > 0)
                self.monitor.handler_ended(d, d.vcpu(v))
            elif kind == HANDLED:
                d.vcpu(v).work += 1
            elif kind == UPCALL_CLEAR:
                self.recorded_clear(d, v, val)
            elif kind == UPCALL_SET:
                self.recorded_set(d, v)
            elif kind == LINE:
                self.recorded_line(d, obj, val, val2)
            elif kind == GSI_ASSERT:
                self.recorded_hold(d, obj, tgt, 1)
            elif kind == GSI_DEASSERT:
                self.recorded_hold(d, obj, tgt, 0)
            elif kind == RTE_WRITE:
                d.story.append((t, seq, RTE_WORD, val & 0xFF))
                d.rte_write(obj, val, tgt)
            elif kind == SET_PARAM:
                d.param_t = t
                d.set_param(val, obj)
            elif kind == WINDOW:
                d.line_excused = True
            elif kind == IDLE:
                d.vcpu(v).lapic.settle()
            elif kind == RESET:
                if v == NONE:  # the domain was created here: its state is known from now on
                    d = Domain(dom, self, created=True)
                    self.domains[dom] = d
                    continue
                d.vcpu(v).lapic.reset()
                d.vcpu(v).forget_injection()
            self.watchdog.watch(d, t)
            self.clock_stale(d)

    def recorded_run(self, d: Domain, v: int) -> None:
        """sched.run."""
        u = d.vcpu(v)
        if u.ready_since == NIL:
            u.ready_since = self.now
        u.offline = 0

    def recorded_stop(self, d: Domain, v: int, state: int) -> None:
        """sched.stop; only a runnable vCPU still wants to run. Without a state it is unknown whether it does."""
        u = d.vcpu(v)
        if state != RUNNABLE:
            u.ready_since = NIL
        u.offline = UNKNOWN if state == NIL else 1 if state == OFFLINE else 0
        if u.offline == 1:
            d.line_excused = True
            d.offline0 = d.offline0 or v == 0

    def recorded_inject(self, d: Domain, v: int, vector: int, conf: int) -> None:
        """V4 as recorded. A vector that is not named is taken for the callback's."""
        if vector == NONE:
            vector = d.vector
        if vector == NONE:
            return
        d.took(v, vector)
        if vector == d.vector:
            u = d.vcpu(v)
            ahead = u.ahead_t != NIL and self.now - u.ahead_t <= self.monitor.clock_slack_ns
            self.monitor.injected(d, u, self.now, self.seq, conf)
            d.matching.injected(v, u.repeated, ahead)

    def recorded_eoi(self, d: Domain, v: int, named: int) -> None:
        """V5 as recorded: the highest ISR bit goes; a named vector that is not in service says that we missed it."""
        u = d.vcpu(v)
        d.eoi_exits += 1
        top = u.lapic.highest_in_service()
        if named != NONE and named != top:
            vector = named
            if named in u.lapic.isr:
                u.lapic.isr.remove(named)
            elif top < 0:
                self.watchdog.eoi_unmatched(d, u, self.now, self.seq)
            for pin in d.ioapic.pins_of(named):
                d.message(pin, pin.end_of_interrupt(), v)
        elif top < 0:
            self.watchdog.eoi_unmatched(d, u, self.now, self.seq)
            return
        else:
            vector = d.eoi(v, self.seq)
        if vector == d.vector:
            d.story.append((self.now, self.seq, EOI_WORD, v))
            d.matching.eoi(v)
            self.monitor.callback_eoi(d, u, self.now, self.seq)
            u.entries_since_eoi = 0

    def recorded_begin(self, d: Domain, v: int, vector: int) -> None:
        """The guest's handler of the callback starts; it names the vector if nothing else did."""
        u = d.vcpu(v)
        d.handlers += 1
        d.matching.begun(v)
        u.work = 0
        if d.vector == NONE and vector != NONE:
            d.vector = vector
        if u.injected_t != NIL and not u.begun:
            u.begun = True
        elif d.handlers > d.injections:
            u.ahead_t = self.now

    def recorded_set(self, d: Domain, v: int) -> None:
        """via.upcall_set: the flag went from 0 to 1 here, whatever was known of it."""
        if d.flag == 1 or v > 0:
            return
        self.monitor.flag_set(d, self.now, self.seq)
        d.flag = 1

    def recorded_clear(self, d: Domain, v: int, found: int) -> None:
        """The handler clears the flag; `val` says what it found there. It stays clear if sets are recorded."""
        if v == NONE:
            v = 0
        d.matching.cleared(v)
        self.monitor.read(d, d.vcpu(v), UNKNOWN if found == NIL else int(found != 0))
        self.monitor.flag_cleared(d, v, self.now, self.seq)
        d.flag = 0 if self.monitor.sees_sets else UNKNOWN

    def recorded_line(self, d: Domain, gsi: int, a: int, count: int) -> None:
        """V1 as recorded; `val2` is gsi_assert_count after it, if known."""
        if gsi != NONE and gsi != d.via_gsi:
            d.set_param(NIL, gsi)
        if a == 0 and d.via_asserted == 0:
            self.watchdog.underflow(d, d.via_gsi, NONE, self.now, self.seq)
        d.set_line(a)
        if count != NIL:
            self.watchdog.count_seen(d, count, self.now, self.seq)

    def recorded_hold(self, d: Domain, gsi: int, source: int, a: int) -> None:
        """Another device's line."""
        if d.hold(gsi, source, a):
            self.watchdog.underflow(d, gsi, source, self.now, self.seq)
        if a and gsi == d.via_gsi:
            self.monitor.end_stale(d, self.now)

    def taint(self, cpu: int, t0: int, t1: int) -> None:
        """U2: any vCPU may have run on the cpu that lost records, so every domain is unknown."""
        for d in self.domains.values():
            # What lasted until the gap is proven; what lies beyond it is not (U5).
            self.monitor.end_stale(d, max(t0, d.stale_t))
            d.forget()
            self.watchdog.watch(d, t1)
            self.clock_stale(d)

    # -- the end and the numbers ---------------------------------------------------------------------------------

    def clock_stale(self, d: Domain) -> None:
        """Time during which the line is asserted with the flag clear."""
        if d.via_asserted == 1 and d.flag == 0:
            if d.stale_clock == NIL:
                d.stale_clock = self.now
        elif d.stale_clock != NIL:
            d.stale_ns += self.now - d.stale_clock
            d.stale_clock = NIL

    def conclude(self, t_end: int) -> None:
        for d in self.domains.values():
            if d.stale_clock != NIL:
                d.stale_ns += t_end - d.stale_clock
            self.monitor.finish(d, t_end)
        self.sink.findings.sort(key=lambda finding: finding.t)

    def metrics(self) -> dict[str, int]:
        ds = list(self.domains.values())
        result = {
            "upcall_sets": sum(d.set_count for d in ds),
            "upcall_clears": sum(d.clears for d in ds),
            "pending_at_end": sum(d.flag == 1 for d in ds),
            "injections": sum(d.injections for d in ds),
            "useful_injections": sum(d.useful for d in ds),
            "spurious_injections": sum(d.spurious for d in ds),
            "eoi_exits": sum(d.eoi_exits for d in ds),
            "callback_eois": sum(d.callback_eois for d in ds),
            "vm_entries": sum(d.vm_entries for d in ds),
            "max_assert_delay_ns": max((d.max_assert_delay for d in ds), default=0),
            "max_callback_latency_ns": max((d.max_latency for d in ds), default=0),
            "callback_latency_sum_ns": sum(d.latency_sum for d in ds),
            "events_consumed": sum(d.consumed for d in ds),
            "storm_max": max((d.storm_max for d in ds), default=0),
            "storm_ns": max((d.storm_ns for d in ds), default=0),
            "asserted_with_flag_clear_ns": sum(d.stale_ns for d in ds),
        }
        if self.closed:
            result["irq_lock_taken"] = sum(d.irq_lock_taken for d in ds)
        else:
            result["handlers"] = sum(d.handlers for d in ds)
            result["handlers_without_work"] = sum(d.no_work for d in ds)
            matched = [d.matching.finish() for d in ds]
            for name in matched[0] if result["handlers"] else ():
                result[name] = sum(counts[name] for counts in matched)
            result["eois_unmatched"] = sum(d.eois_unmatched for d in ds)
        return result
