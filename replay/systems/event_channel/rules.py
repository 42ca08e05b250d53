"""Two-level event channels: who sets and clears which bit in which order (spec S5.3, rules E1..E6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from replay.agenda import SOFTWARE
from replay.compiled import mypyc_attr
from replay.declare import Config
from replay.events import INF, NIL, NONE
from replay.hardware.evtchn_two_level import Channel, TwoLevelDomain, VcpuInfo
from replay.knowledge import UNKNOWN
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.event_channel.monitor import DELAY, FIRST_TIMER, MASKED, Monitor

__all__ = ["TwoLevelRules"]

#: Agenda: the upcall of vCPU b of domain a.
DO_UPCALL: Final = 0
#: Highest vCPU number that is believed.
MAX_VCPU: Final = 8192


@mypyc_attr(allow_interpreted_subclasses=True)
class TwoLevelRules(Machine):
    """State of all guests of a host, two-level ABI, and the transitions E1..E6."""

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
        self.samples: dict[str, list[int]] = {}  # sampled words by kind: [as the model knew them, otherwise]
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
            found = TwoLevelDomain(number, self.bits, self.from_boot or self.closed)
            found.sees_sends = self.sees("evtchn.send") or self.sees("evtchn.notify")
            found.sees_upcalls = self.sees("evtchn.upcall")
            self.domains[number] = found
            self.list.append(found)
        self.dom = found
        return found

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
        if vcpu == NONE:
            dom.unnamed.add(channel.word)
        for other in dom.vcpus if vcpu == NONE else (dom.vcpu(vcpu),):
            other.sel_forget_zero(channel.word)
            if other.in_upcall:
                other.latched |= 1 << channel.word

    def compare(self, word: str, agrees: bool) -> None:
        """Metric: a sampled word whose state the model knew, before the model learns from it."""
        self.samples.setdefault(word, [0, 0])[not agrees] += 1

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
                self.effects.append((self.now, dom.id << 48 | vcpu.number << 32 | channel.number))
                self.monitor.dispatched(dom, vcpu, channel, self.now, NONE)
                channel.pending = 0
                dom.settle(channel)

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

    def bind(self, dom: TwoLevelDomain, channel: Channel, vcpu: int, _kind: int, flags: int) -> None:
        """A port comes into being, bound to `vcpu` (0 by default) on both sides; interdomain binding conservatively
        sets it pending (Xen evtchn_bind_interdomain)."""
        target = vcpu if 0 < vcpu <= MAX_VCPU else 0
        channel.notify_vcpu = target
        channel.guest_cpu = target
        channel.bound_t = NIL  # nothing was bound before: no selector bit of an earlier vCPU can be meant
        channel.mismatch_gen += 1
        if flags & 1:
            self.send(dom, channel)
        self.monitor.check(dom, channel, self.now)

    def rebind(self, dom: TwoLevelDomain, channel: Channel, vcpu: int, notify: bool, guest: bool) -> None:
        """E5: changes future notifications only; a selector bit already set for the old vCPU stays there
        (Xen evtchn_bind_vcpu, Linux bind_evtchn_to_cpu)."""
        if not 0 <= vcpu <= MAX_VCPU:
            vcpu = NONE
        if self.closed and not self.from_boot:  # what-if from the middle: the side not recorded is taken to agree
            notify = guest = True
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

    # -- end --------------------------------------------------------------------------------------------------

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
            "samples_agree": sum(good for good, _ in self.samples.values()),
            "samples_disagree": sum(bad for _, bad in self.samples.values()),
            **{f"samples_agree.{word}": good for word, (good, _) in sorted(self.samples.items())},
            **{f"samples_disagree.{word}": bad for word, (_, bad) in sorted(self.samples.items())},
        }
