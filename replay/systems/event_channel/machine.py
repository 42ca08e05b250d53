"""Two-level event channels: who sets and clears which bit in which order (spec S5.3, rules E1..E6).

Closed runs feed the stimuli and the model schedules the upcalls. On recordings the recorded outcomes are the truth:
they confirm or refine what the model knows (U4), and rules speak only where everything they read is known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any, ClassVar, Final

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import INF, KIND_ID, NIL, NONE
from replay.hardware.evtchn_two_level import (
    ABI_FIFO,
    SNAP_ABI,
    SNAP_GUEST_CPU,
    SNAP_MASK,
    SNAP_NOTIFY_VCPU,
    SNAP_PENDING,
    SNAP_SEL,
    SNAP_UPCALL_MASK,
    SNAP_UPCALL_PENDING,
    Channel,
    TwoLevelDomain,
    VcpuInfo,
)
from replay.knowledge import UNKNOWN
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.event_channel import codes
from replay.systems.event_channel.monitor import DELAY, FIRST_TIMER, MASKED, Monitor

__all__ = ["COLUMNS", "TwoLevelMachine"]

COLUMNS: Final = ("kind", "t_ns", "dom", "vcpu", "obj", "tgt", "val", "flags", "seq")

BIND: Final = KIND_ID["evtchn.bind"]
SEND: Final = KIND_ID["evtchn.send"]
BIND_VCPU: Final = KIND_ID["evtchn.bind_vcpu"]
BIND_CPU: Final = KIND_ID["guest.bind_cpu"]
REBIND: Final = KIND_ID["evtchn.rebind"]
MASK: Final = KIND_ID["evtchn.mask"]
UNMASK: Final = KIND_ID["evtchn.unmask"]
UPCALL_MASK: Final = KIND_ID["evtchn.upcall_mask"]
UPCALL_UNMASK: Final = KIND_ID["evtchn.upcall_unmask"]
CLEAR: Final = KIND_ID["evtchn.clear"]
CLOSE: Final = KIND_ID["evtchn.close"]
NOTIFY: Final = KIND_ID["evtchn.notify"]
UPCALL: Final = KIND_ID["evtchn.upcall"]
UPCALL_END: Final = KIND_ID["evtchn.upcall_end"]
HANDLED: Final = KIND_ID["evtchn.handled"]
HYPERCALL: Final = KIND_ID["evtchn.unmask_hypercall"]
SNAPSHOT: Final = KIND_ID["evtchn.snapshot"]
SCHED_RUN: Final = KIND_ID["sched.run"]
SCHED_STOP: Final = KIND_ID["sched.stop"]
LOST: Final = KIND_ID["trace.lost"]

#: Kinds whose `obj` is a port.
PORT_KINDS: Final = frozenset(
    (SEND, UNMASK, MASK, CLEAR, HANDLED, NOTIFY, HYPERCALL, BIND, BIND_VCPU, BIND_CPU, REBIND, CLOSE)
)

#: Agenda: the upcall of vCPU b of domain a.
DO_UPCALL: Final = 0
#: `val` of `sched.stop`: the vCPU blocked (Xen RUNSTATE_blocked).
STATE_BLOCKED: Final = 2
#: Highest vCPU number that is believed.
MAX_VCPU: Final = 8192


class TwoLevelMachine(Machine):
    """Event channels of all guests of a host, two-level ABI."""

    columns: ClassVar[tuple[str, ...]] = COLUMNS

    def __init__(self, policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.policy = policy
        self.closed: bool = sink.closed
        self.bits: int = config.integer("bits_per_word")
        self.hvm: bool = bool(config["hvm"])
        self.upcall_ns: int = config.integer("upcall_ns")
        self.monitor = Monitor(config, sink, self.agenda)
        self.domains: dict[int, TwoLevelDomain] = {}
        self.list: list[TwoLevelDomain] = []
        self.dom: TwoLevelDomain = TwoLevelDomain(NONE - 1, self.bits, False)  # the one of the present event
        self.seq: int = NONE
        self.evaluate_start: bool = False
        self.sends: int = 0
        self.coalesced: int = 0
        self.handled: int = 0
        self.upcalls: int = 0
        self.spurious_upcalls: int = 0
        self.notifications: int = 0
        self.unmask_hypercalls: int = 0
        self.words_scanned: int = 0
        self.max_delivery_ns: int = 0
        self.max_delivery_hot_ns: int = 0  # ports of word 0
        self.delivery_ns: int = 0
        self.lost_pending: int = 0  # pending events dropped by a close, or forgotten

    # -- start -----------------------------------------------------------------------------------------------

    def load(self, init: Mapping[str, Any]) -> None:
        """`init.S5` = {pending[], masked[], notify_vcpu{}, guest_cpu{}} of the one domain of a scenario."""
        state = init.get("S5", init)
        if not state:
            return
        dom = self.switch(int(state.get("dom", NONE)))
        for port in state.get("masked", ()):
            dom.channel(int(port)).masked = 1
        for port, vcpu in state.get("notify_vcpu", {}).items():
            dom.channel(int(port)).notify_vcpu = int(vcpu)
        for port, vcpu in state.get("guest_cpu", {}).items():
            dom.channel(int(port)).guest_cpu = int(vcpu)
        for port in state.get("pending", ()):
            channel = dom.channel(int(port))
            channel.pending = 1
            channel.pend_t = 0
        for channel in dom.channels:
            dom.settle(channel)
        self.evaluate_start = True

    def switch(self, number: int) -> TwoLevelDomain:
        """Make domain `number` the present one."""
        found = self.domains.get(number)
        if found is None:
            found = TwoLevelDomain(number, self.bits, self.from_boot)
            self.domains[number] = found
            self.list.append(found)
        self.dom = found
        return found

    # -- events ----------------------------------------------------------------------------------------------

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        """Feed events. What held before the first one is evaluated right after it (spec B)."""
        stream = iter(rows)
        if self.evaluate_start:
            first = list(islice(stream, 1))
            if first:
                self.evaluate_start = False
                self.feed(first)
                for dom in self.list:
                    for channel in dom.channels:
                        self.monitor.check(dom, channel, self.now)
        self.feed(stream)

    def feed(self, rows: Iterable[tuple[int, ...]]) -> None:
        """The event glue. The five kinds that make up most of a recording are taken here where nothing is unknown or
        in trouble; they do exactly what `send`, `on_handled`, `on_clear`, `on_upcall` and
        `on_upcall_end` do then."""
        heap = self.agenda.heap
        monitor = self.monitor
        recorded = not self.closed
        dom = self.dom
        ports = dom.ports
        slots = dom.slots
        ready = dom.ready
        dom_id = dom.id
        limit = dom.limit
        send, handled, clear, upcall, upcall_end = SEND, HANDLED, CLEAR, UPCALL, UPCALL_END
        sends = coalesced = dispatches = upcalls = 0
        for kind, t, d, v, p, tgt, val, flags, seq in rows:
            if heap and heap[0][0] <= t:
                self.advance(t)
            if d != dom_id:
                dom = self.switch(d)
                ports = dom.ports
                slots = dom.slots
                ready = dom.ready
                dom_id = d
            if recorded and 0 <= p < limit and (channel := ports[p]) is not None:
                if kind == send:
                    if channel.pending == 1:
                        sends += 1
                        coalesced += 1
                        continue
                    n = channel.guest_cpu
                    word = channel.word
                    if (
                        channel.pending == 0 == channel.masked
                        and channel.notify_vcpu == n >= 0
                        and monitor.delay_armed
                        and ready[word] == 0
                        and n < len(slots)
                        and (vcpu := slots[n]) is not None
                        and vcpu.in_upcall == 0
                    ):
                        bit = 1 << word
                        if vcpu.sel_known & ~vcpu.sel & bit:
                            sends += 1
                            channel.pending = 1
                            channel.pend_t = t
                            channel.pend_seq = seq
                            channel.select_vcpu = n
                            ready[word] = channel.word_bit
                            vcpu.sel |= bit
                            vcpu.setter[word] = p
                            vcpu.upcall_pending = 1
                            continue
                elif kind == clear:
                    if not channel.trouble:
                        channel.clears = True
                        channel.pending = 0
                        ready[channel.word] &= ~channel.word_bit
                        continue
                elif (
                    kind == handled
                    and channel.guest_cpu == v >= 0
                    and channel.clears
                    and channel.pending == 1
                    and not channel.trouble
                    and dom.handled_seen
                    and v < len(slots)
                    and (vcpu := slots[v]) is not None
                ):
                    dispatches += 1
                    vcpu.dispatched += 1
                    if channel.pend_t != NIL:
                        delay = t - channel.pend_t
                        self.delivery_ns += delay
                        if delay > self.max_delivery_ns:
                            self.max_delivery_ns = delay
                        if delay > self.max_delivery_hot_ns and channel.word == 0:
                            self.max_delivery_hot_ns = delay
                    channel.hypercall_t = NIL
                    continue
            elif recorded and 0 <= v < len(slots) and (vcpu := slots[v]) is not None:
                if kind == upcall:
                    if vcpu.in_upcall == 0:
                        upcalls += 1
                        vcpu.in_upcall = 1
                        vcpu.upcall_pending = 0
                        known = vcpu.sel_all
                        vcpu.taken = vcpu.sel | (known & ~vcpu.sel_known)
                        vcpu.sel = 0
                        vcpu.sel_known = known
                        vcpu.latched = 0
                        vcpu.dispatched = 0
                        continue
                elif kind == upcall_end and vcpu.in_upcall == 1 and vcpu.dispatched and not vcpu.latched:
                    words = vcpu.taken
                    if not words & (words - 1) and not ready[words.bit_length() - 1]:  # at most one, all of it handled
                        vcpu.in_upcall = 0
                        dom.ends_seen = True
                        continue
            self.now = t
            self.seq = seq
            self.event(dom, kind, v, p, tgt, val, flags)
        self.sends += sends
        self.coalesced += coalesced
        self.handled += dispatches
        self.upcalls += upcalls

    def event(self, dom: TwoLevelDomain, kind: int, v: int, p: int, tgt: int, val: int, flags: int) -> None:
        """Any event at `self.now`; those that only recordings have are skipped in closed runs."""
        if kind == UPCALL_END:
            if v >= 0 and not self.closed:
                self.on_upcall_end(dom, dom.vcpu(v))
        elif kind == LOST:
            self.taint(NONE, val if val != NIL else self.now, self.now)
        elif kind in (SCHED_RUN, SCHED_STOP):
            if v >= 0:
                self.on_sched(dom, dom.vcpu(v), kind == SCHED_RUN, val)
        elif kind == UPCALL:
            if v >= 0 and not self.closed:
                self.on_upcall(dom.vcpu(v))
        elif kind in (UPCALL_MASK, UPCALL_UNMASK):
            if v >= 0:
                self.set_upcall_mask(dom, dom.vcpu(v), 1 if kind == UPCALL_MASK else 0)
        elif kind == SNAPSHOT:
            if not self.closed:
                self.on_snapshot(dom, v, p, tgt, val)
        elif kind in PORT_KINDS:
            if 0 <= p < dom.limit:
                self.port_event(dom, dom.ports[p] or dom.channel(p), kind, v, tgt, val, flags)
            else:
                self.out_of_range(dom, p)

    def port_event(
        self, dom: TwoLevelDomain, channel: Channel, kind: int, v: int, tgt: int, val: int, flags: int
    ) -> None:
        """An event that names a port of the ABI."""
        if kind == SEND:
            self.sends += 1
            self.send(dom, channel)
        elif kind == UNMASK:
            self.unmask(dom, v, channel)
        elif kind == MASK:
            self.mask(dom, channel)
        elif kind in (BIND_VCPU, BIND_CPU, REBIND):
            self.rebind(dom, channel, tgt, kind != BIND_CPU, kind != BIND_VCPU)
        elif kind == BIND:
            self.bind(dom, channel, tgt, val, flags)
        elif kind == CLOSE:
            self.close(dom, channel)
        elif self.closed:
            return
        elif kind == CLEAR:
            self.on_clear(dom, channel)
        elif kind == HYPERCALL:
            self.on_hypercall(dom, v, channel)
        elif v < 0:
            return
        elif kind == HANDLED:
            self.on_handled(dom, dom.vcpu(v), channel)
        elif kind == NOTIFY:
            self.on_notify(dom, dom.vcpu(v), channel)

    def out_of_range(self, dom: TwoLevelDomain, port: int) -> None:
        """A port that the ABI cannot hold (S5.1): every number is reported once."""
        if port < dom.limit or port in dom.range_reported or len(dom.range_reported) > 10_000:
            return
        dom.range_reported.add(port)
        self.sink.report(
            codes.PORT_RANGE, self.now, dom=dom.id, obj=port, val=dom.limit, seq=self.seq,
            expected=f"port below {dom.limit}", observed=f"port {port}",
        )  # fmt: skip

    # -- E1: the hypervisor sets a port pending ---------------------------------------------------------------

    def send(self, dom: TwoLevelDomain, channel: Channel) -> None:
        """E1: pending, then mask, then selector, then upcall byte; each step only if the one before changed
        something (Xen evtchn_2l_set_pending)."""
        old = channel.pending
        if old == 1:
            self.coalesced += 1
            return
        now = self.now
        channel.pending = 1
        channel.pend_t = now
        channel.pend_seq = self.seq
        if channel.masked == 0:
            dom.ready[channel.word] |= channel.word_bit
            if not self.closed and not self.monitor.delay_armed:
                self.monitor.arm_delay(dom, now)
            vcpu = channel.notify_vcpu
            if old == 0 and vcpu >= 0:
                self.select(dom, dom.vcpu(vcpu), channel)
            else:
                self.perhaps_select(dom, vcpu, channel)
            if channel.guest_cpu != vcpu or not self.closed:
                self.monitor.check(dom, channel, now)
        elif channel.masked == 1:
            if not self.closed and not self.monitor.masked_armed:
                self.monitor.arm_masked(dom, now)
        else:
            self.perhaps_select(dom, channel.notify_vcpu, channel)

    def select(self, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> None:
        """Tail of E1, E3 and E4: selector bit 0 to 1, and then only, upcall byte 0 to 1, and then only, notify."""
        word = channel.word
        bit = 1 << word
        if vcpu.sel & bit:
            return
        vcpu.sel |= bit
        if vcpu.in_upcall:
            vcpu.latched |= bit
        vcpu.setter[word] = channel.number
        channel.select_t = self.now
        channel.select_seq = self.seq
        channel.select_vcpu = vcpu.number
        if vcpu.sel_known & bit:
            if channel.guest_cpu != vcpu.number or dom.ready[word] != channel.word_bit:
                self.monitor.selector_set(dom, vcpu, channel, self.now, self.seq)
            self.mark_upcall(dom, vcpu)
        else:
            vcpu.sel_known |= bit
            if vcpu.upcall_pending == 0:
                vcpu.upcall_pending = UNKNOWN

    def mark_upcall(self, dom: TwoLevelDomain, vcpu: VcpuInfo) -> None:
        """upcall_pending 0 to 1: the vCPU is notified unless it masks upcalls (Xen vcpu_mark_events_pending)."""
        if vcpu.upcall_pending == 1:
            return
        vcpu.upcall_pending = 1
        if self.closed and vcpu.upcall_mask != 1:
            self.schedule_upcall(dom, vcpu)

    def schedule_upcall(self, dom: TwoLevelDomain, vcpu: VcpuInfo) -> None:
        """Closed runs: the upcall comes upcall_ns from now."""
        self.notifications += 1
        self.agenda.at(self.now + self.upcall_ns, SOFTWARE, DO_UPCALL, dom.id, vcpu.number)

    def perhaps_select(self, dom: TwoLevelDomain, vcpu: int, channel: Channel) -> None:
        """E1's tail where it is not known whether it ran, or for which vCPU: clear selector bits become unknown."""
        if self.closed and vcpu >= 0:
            self.select(dom, dom.vcpu(vcpu), channel)
            return
        for other in dom.vcpus:
            if vcpu in (NONE, other.number):
                other.sel_forget_zero(channel.word)
                if other.in_upcall:
                    other.latched |= 1 << channel.word

    # -- E2: the upcall ---------------------------------------------------------------------------------------

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        """An upcall, or one of the monitor's time-outs."""
        if action == DO_UPCALL:
            dom = self.switch(a)
            self.upcall(dom, dom.vcpu(b))
        elif action == DELAY:
            self.monitor.look_for_delays(self.list, self.now)
        elif action == MASKED:
            self.monitor.look_for_masked(self.list, self.now)
        elif action >= FIRST_TIMER:
            self.monitor.fire(action, self.domains[a], b, c, self.now)

    def upcall(self, dom: TwoLevelDomain, vcpu: VcpuInfo) -> None:
        """E2: clear upcall_pending, exchange the selector with 0, dispatch per word the lowest ready port of this vCPU
        until none is left (Linux evtchn_do_upcall; the order of the two clears matters). Handlers take no time."""
        if vcpu.upcall_mask == 1 or vcpu.upcall_pending != 1:
            return
        self.upcalls += 1
        vcpu.dispatched = 0
        while vcpu.upcall_pending == 1:
            vcpu.upcall_pending = 0
            words = vcpu.sel
            vcpu.sel = 0
            vcpu.taken = words
            vcpu.latched = 0
            while words:
                low = words & -words
                words ^= low
                self.words_scanned += 1
                self.scan_word(dom, vcpu, low.bit_length() - 1)
        if vcpu.dispatched == 0:
            self.spurious_upcalls += 1
            self.monitor.no_work(dom, vcpu, self.now, NONE)

    def scan_word(self, dom: TwoLevelDomain, vcpu: VcpuInfo, word: int) -> None:
        """Dispatch every ready port of `word` that this vCPU handles; its flow acks it."""
        ready = dom.ready[word]
        while ready:
            low = ready & -ready
            ready ^= low
            channel = dom.ports[word * dom.bits + low.bit_length() - 1]
            if channel is not None and channel.guest_cpu == vcpu.number:
                vcpu.dispatched += 1
                self.handled += 1
                self.count_delivery(channel)
                self.monitor.dispatched(dom, vcpu, channel, self.now, NONE)
                channel.pending = 0
                dom.settle(channel)
            elif channel is not None:
                self.monitor.check(dom, channel, self.now)

    def count_delivery(self, channel: Channel) -> None:
        """Metric: pending to handled."""
        if channel.pend_t == NIL:
            return
        delay = self.now - channel.pend_t
        self.delivery_ns += delay
        if delay > self.max_delivery_ns:
            self.max_delivery_ns = delay
        if channel.word == 0 and delay > self.max_delivery_hot_ns:
            self.max_delivery_hot_ns = delay

    # -- E3, E4: unmask ---------------------------------------------------------------------------------------

    def unmask(self, dom: TwoLevelDomain, vcpu: int, channel: Channel) -> None:
        """A request to unmask, executed on `vcpu`; how is the policy's choice."""
        channel.unmask_t = self.now
        channel.unmask_seq = self.seq
        channel.unmask_vcpu = vcpu
        if channel.pending == 1 and channel.masked != 0 and not self.closed and not self.monitor.delay_armed:
            self.monitor.arm_delay(dom, self.now)  # ready from now on
        if vcpu < 0:
            self.unmask_somewhere(dom, channel)
        else:
            self.policy.on_unmask(self, dom, dom.vcpu(vcpu), channel)
        self.monitor.check(dom, channel, self.now)

    def unmask_locally(self, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> None:
        """E3: clear the mask bit; if pending, set the selector bit of the *executing* vCPU and force an upcall there
        (Linux unmask_evtchn, 2005)."""
        channel.masked = 0
        dom.settle(channel)
        if channel.pending == 1:
            self.select(dom, vcpu, channel)
        elif channel.pending == UNKNOWN:
            self.perhaps_select(dom, vcpu.number, channel)

    def unmask_by_hypercall(self, dom: TwoLevelDomain, channel: Channel) -> None:
        """E4: EVTCHNOP_unmask acts only on a mask bit that goes 1 to 0 (Xen evtchn_2l_unmask)."""
        self.unmask_hypercalls += 1
        if not self.closed:
            channel.hypercall_t = self.now
        self.do_hypercall(dom, channel)

    def do_hypercall(self, dom: TwoLevelDomain, channel: Channel) -> None:
        """What the hypervisor does in E4."""
        old = channel.masked
        channel.masked = 0
        dom.settle(channel)
        if old == 0 or channel.pending == 0:
            return
        if old == 1 and channel.pending == 1 and channel.notify_vcpu >= 0:
            self.select(dom, dom.vcpu(channel.notify_vcpu), channel)
        else:
            self.perhaps_select(dom, channel.notify_vcpu, channel)

    def unmask_somewhere(self, dom: TwoLevelDomain, channel: Channel) -> None:
        """Unmasked, but where or how is not known."""
        channel.masked = 0
        dom.settle(channel)
        if channel.pending != 0:
            self.perhaps_select(dom, NONE, channel)

    def mask(self, dom: TwoLevelDomain, channel: Channel) -> None:
        """Set the mask bit (Linux evtchn_2l_mask)."""
        channel.masked = 1
        channel.mask_t = self.now
        channel.hypercall_t = NIL
        channel.noop = False
        dom.settle(channel)
        channel.since = INF
        channel.seen_t = NIL
        if not self.closed and channel.pending == 1 and not self.monitor.masked_armed:
            self.monitor.arm_masked(dom, self.now)

    # -- bindings and flags -----------------------------------------------------------------------------------

    def bind(self, dom: TwoLevelDomain, channel: Channel, vcpu: int, kind: int, flags: int) -> None:
        """A port comes into being, bound to `vcpu` (0 by default) on both sides; interdomain binding conservatively
        sets it pending (Xen evtchn_bind_interdomain)."""
        target = vcpu if 0 <= vcpu <= MAX_VCPU else 0
        channel.type = kind if kind != NIL else NONE
        channel.notify_vcpu = target
        channel.guest_cpu = target
        channel.bound_t = self.now
        channel.mismatch_gen += 1
        if flags & 1:
            self.send(dom, channel)
        self.monitor.check(dom, channel, self.now)

    def rebind(self, dom: TwoLevelDomain, channel: Channel, vcpu: int, notify: bool, guest: bool) -> None:
        """E5: changes future notifications only; a selector bit already set for the old vCPU stays there
        (Xen evtchn_bind_vcpu, Linux bind_evtchn_to_cpu)."""
        if not 0 <= vcpu <= MAX_VCPU:
            vcpu = NONE
        if (notify and channel.notify_vcpu != vcpu) or (guest and channel.guest_cpu != vcpu):
            channel.bound_t = self.now
        if notify:
            channel.notify_vcpu = vcpu
        if guest:
            channel.guest_cpu = vcpu
        channel.seen_t = NIL
        self.monitor.bound(dom, channel, self.now)

    def close(self, dom: TwoLevelDomain, channel: Channel) -> None:
        """The port is freed: Xen clears its pending bit and both sides go back to vCPU 0 (Xen evtchn_close, Linux
        bind_evtchn_to_cpu of a closed port)."""
        if channel.pending == 1:
            self.lost_pending += 1
        channel.pending = 0
        channel.hypercall_t = NIL
        dom.settle(channel)
        self.monitor.end_of_life(channel)
        channel.notify_vcpu = 0
        channel.guest_cpu = 0
        channel.mismatch_gen += 1

    def set_upcall_mask(self, dom: TwoLevelDomain, vcpu: VcpuInfo, masked: int) -> None:
        """The vCPU's interrupt flag. Enabling it with an upcall pending delivers one (PV iret, xen_irq_enable)."""
        vcpu.upcall_mask = masked
        if masked == 0 and self.closed and vcpu.upcall_pending == 1:
            self.schedule_upcall(dom, vcpu)

    # -- what recordings say ----------------------------------------------------------------------------------

    def unseen_send(self, dom: TwoLevelDomain) -> None:
        """A pending bit that nobody was seen to set: sends are not all recorded, so a clear selector or pending bit is
        known only at the moment of a snapshot."""
        dom.sees_sends = False

    def on_notify(self, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> None:
        """The hypervisor notified `vcpu` of the port: E1 ran to its end."""
        self.notifications += 1
        if channel.notify_vcpu == NONE:
            channel.notify_vcpu = vcpu.number
        if channel.pending != 1:
            if channel.pending == 0:
                self.unseen_send(dom)
            channel.pending = 1
            channel.pend_t = self.now
            channel.pend_seq = self.seq
        if channel.masked == UNKNOWN:
            channel.masked = 0
        dom.settle(channel)
        self.select(dom, vcpu, channel)
        vcpu.upcall_pending = 1
        self.monitor.check(dom, channel, self.now)

    def on_upcall(self, vcpu: VcpuInfo) -> None:
        """E2 begins on a vCPU: what its selector held is taken. Nested upcalls only count."""
        self.upcalls += 1
        if vcpu.in_upcall > 0 and self.dom.ends_seen:
            vcpu.in_upcall += 1
            return
        vcpu.in_upcall = 1
        vcpu.upcall_pending = 0
        vcpu.taken = vcpu.sel | (vcpu.sel_all & ~vcpu.sel_known)
        vcpu.sel = 0
        vcpu.sel_known = vcpu.sel_all
        vcpu.latched = 0
        vcpu.dispatched = 0

    def on_upcall_end(self, dom: TwoLevelDomain, vcpu: VcpuInfo) -> None:
        """E2 ends. Selector bits set meanwhile may or may not have been drained by its last round."""
        dom.ends_seen = True
        if vcpu.in_upcall > 1:
            vcpu.in_upcall -= 1
            return
        began = vcpu.in_upcall == 1
        vcpu.in_upcall = 0
        latched = vcpu.latched
        if latched:
            vcpu.sel &= ~latched
            vcpu.sel_known &= ~latched
            vcpu.upcall_pending = UNKNOWN
            vcpu.latched = 0
        if not began:
            return
        if vcpu.dispatched == 0 and dom.handled_seen:
            self.spurious_upcalls += 1
            self.monitor.no_work(dom, vcpu, self.now, self.seq)
        words = vcpu.taken & ~latched
        ready = dom.ready
        while words:
            low = words & -words
            words ^= low
            word = low.bit_length() - 1
            if ready[word]:
                self.monitor.check_word(dom, word, self.now)

    def on_handled(self, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> None:
        """The scan on `vcpu` handed the port to its flow: it was pending and is bound here (U4)."""
        dom.handled_seen = True
        vcpu.dispatched += 1
        self.handled += 1
        if channel.pending == 0:
            self.unseen_send(dom)
        elif channel.pending == 1:
            self.count_delivery(channel)
        if channel.guest_cpu != vcpu.number:
            channel.guest_cpu = vcpu.number if channel.guest_cpu == NONE else NONE
        if channel.trouble:
            self.monitor.dispatched(dom, vcpu, channel, self.now, self.seq)
        channel.hypercall_t = NIL
        if channel.clears:
            channel.pending = 1
        else:  # its ack may not be recorded
            channel.pending = UNKNOWN
            dom.settle(channel)

    def on_clear(self, dom: TwoLevelDomain, channel: Channel) -> None:
        """The handler's flow acked the port."""
        channel.clears = True
        channel.pending = 0
        dom.ready[channel.word] &= ~channel.word_bit
        if channel.trouble:
            self.monitor.end_of_life(channel)

    def on_hypercall(self, dom: TwoLevelDomain, vcpu: int, channel: Channel) -> None:
        """EVTCHNOP_unmask is recorded: the one that the policy predicted, or one of the guest's own accord."""
        if channel.hypercall_t != NIL:
            channel.hypercall_t = NIL
            return
        self.unmask_hypercalls += 1
        if channel.masked == 0 and channel.pending == 1 and channel.notify_vcpu >= 0 and dom.sees_sends:
            target = dom.vcpu(channel.notify_vcpu)
            if target.sel_test(channel.word) == 0 and target.in_upcall == 0:
                self.monitor.hypercall_noop(dom, vcpu, channel, self.now, self.seq)
                return
        self.do_hypercall(dom, channel)
        self.monitor.check(dom, channel, self.now)

    def on_sched(self, dom: TwoLevelDomain, vcpu: VcpuInfo, runs: bool, state: int) -> None:
        """The hypervisor's scheduler. A vCPU that blocks is in no upcall, and SCHEDOP_block unmasks upcalls."""
        vcpu.running = 1 if runs else 0
        vcpu.block_gen += 1
        if runs:
            vcpu.run_t = self.now
            if not self.closed and not self.monitor.delay_armed:
                self.monitor.arm_delay(dom, self.now)
        elif state == STATE_BLOCKED:
            vcpu.in_upcall = 0
            self.monitor.blocked(dom, vcpu, self.now)

    def on_snapshot(self, dom: TwoLevelDomain, v: int, what: int, index: int, value: int) -> None:
        """Words read from shared memory: the state from here on (U4)."""
        if value == NIL:
            return
        if what in (SNAP_PENDING, SNAP_MASK):
            if 0 <= index < dom.bits:
                self.learn_word(dom, what, index, value)
        elif what == SNAP_ABI:
            if value == ABI_FIFO:
                dom.forget()
        elif what in (SNAP_NOTIFY_VCPU, SNAP_GUEST_CPU):
            if 0 <= index < dom.limit:
                channel = dom.channel(index)
                self.rebind(dom, channel, value, what == SNAP_NOTIFY_VCPU, what == SNAP_GUEST_CPU)
        elif v >= 0:
            self.learn_vcpu(dom, dom.vcpu(v), what, value)

    def learn_word(self, dom: TwoLevelDomain, what: int, word: int, value: int) -> None:
        """A word of evtchn_pending[] or evtchn_mask[]."""
        value &= (1 << dom.bits) - 1
        initial = dom.pending0[word] if what == SNAP_PENDING else dom.masked0[word]
        initial.learn(value)
        base = word * dom.bits
        if what == SNAP_PENDING:
            bits = value
            while bits:
                low = bits & -bits
                bits ^= low
                dom.channel(base + low.bit_length() - 1)
        for port in range(base, base + dom.bits):
            channel = dom.ports[port]
            if channel is None:
                continue
            bit = 1 if value & channel.word_bit else 0
            if what == SNAP_PENDING:
                if channel.pending == 0 and bit:
                    self.unseen_send(dom)
                if channel.pend_t == NIL or channel.pending != 1:
                    channel.pend_t = self.now
                    channel.pend_seq = self.seq
                if not bit and channel.pending == 1:
                    self.monitor.end_of_life(channel)
                channel.pending = bit
            else:
                if channel.masked != bit:
                    channel.seen_t = NIL
                    channel.mask_t = self.now
                channel.masked = bit
            dom.settle(channel)
            self.monitor.check(dom, channel, self.now)

    def learn_vcpu(self, dom: TwoLevelDomain, vcpu: VcpuInfo, what: int, value: int) -> None:
        """A vCPU's selector, upcall_pending or upcall_mask."""
        if what == SNAP_SEL:
            value &= vcpu.sel_all
            if value & vcpu.sel_known & ~vcpu.sel:
                self.unseen_send(dom)
            vcpu.sel = value
            vcpu.sel_known = vcpu.sel_all
            for word in range(dom.bits):
                if dom.ready[word]:
                    self.monitor.check_word(dom, word, self.now)
                    if not value >> word & 1:
                        self.monitor.seen_stranded(dom, vcpu, word, self.now, self.seq)
        elif what == SNAP_UPCALL_PENDING:
            if value & 0xFF and vcpu.upcall_pending == 0:
                self.unseen_send(dom)
            vcpu.upcall_pending = 1 if value & 0xFF else 0
        elif what == SNAP_UPCALL_MASK:
            vcpu.upcall_mask = 1 if value & 0xFF else 0
        self.monitor.words_changed(dom, vcpu, self.now)

    # -- lost records, end -------------------------------------------------------------------------------------

    def taint(self, cpu: int, t0: int, t1: int) -> None:
        """Lost records may hide anything that any vCPU did to shared memory: all is unknown (U2). What time-outs said
        during the loss is only information (U6)."""
        if self.closed:
            return
        for dom in self.list:
            dom.forget()
        self.from_boot = False
        for finding in reversed(self.sink.findings):
            if finding.t < t0:
                break
            finding.severity = "info"
            finding.tags = (*finding.tags, "tainted")

    def metrics(self) -> dict[str, int]:
        """Spec S5.6; conservation: sends + initial = handled + coalesced + pending + closed."""
        pending = sum(1 for dom in self.list for channel in dom.channels if channel.pending == 1)
        return {
            "sends": self.sends,
            "coalesced": self.coalesced,
            "handled": self.handled,
            "pending": pending,
            "closed_pending": self.lost_pending,
            "upcalls": self.upcalls,
            "spurious_upcalls": self.spurious_upcalls,
            "notifications": self.notifications,
            "unmask_hypercalls": self.unmask_hypercalls,
            "words_scanned": self.words_scanned,
            "max_delivery_ns": self.max_delivery_ns,
            "max_delivery_word0_ns": self.max_delivery_hot_ns,
            "sum_delivery_ns": self.delivery_ns,
            "stranded": self.monitor.stranded_total,
            "stranded_ns": self.monitor.stranded_ns,
        }
