"""Two-level event channels: the event glue, and what recordings say about the state.

Closed runs feed the stimuli and the model schedules the upcalls. On recordings the recorded outcomes are the truth:
they confirm or refine what the model knows (U4), and rules speak only where everything they read is known.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import ClassVar, Final

from replay.compiled import mypyc_attr
from replay.events import KIND_ID, NIL, NONE
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
from replay.systems.event_channel import codes
from replay.systems.event_channel.rules import TwoLevelRules

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

#: `val` of `sched.stop`: the vCPU blocked (Xen RUNSTATE_blocked).
STATE_BLOCKED: Final = 2


@mypyc_attr(allow_interpreted_subclasses=True)
class TwoLevelMachine(TwoLevelRules):
    """Event channels of all guests of a host, two-level ABI."""

    columns: ClassVar[tuple[str, ...]] = COLUMNS

    # -- events ----------------------------------------------------------------------------------------------

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        """Feed events. What held before the first one is evaluated right after it (spec B)."""
        stream = iter(rows)
        if self.evaluate_start:
            first = list(islice(stream, 1))
            if first:
                self.evaluate_start = False
                self.take(first)
                for dom in self.list:
                    for channel in dom.channels:
                        self.monitor.check(dom, channel, self.now)
        self.take(stream)

    def take(self, rows: Iterable[tuple[int, ...]]) -> None:
        """The event glue: every event to the method of its rule."""
        dom = self.dom
        for kind, t, d, v, p, tgt, val, flags, seq in rows:
            self.advance(t)
            if d != dom.id:
                dom = self.switch(d)
            self.seq = seq
            self.event(dom, kind, v, p, tgt, val, flags)

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
                known = channel.notify_vcpu if what == SNAP_NOTIFY_VCPU else channel.guest_cpu
                if known != value:  # what is as it was begins nothing anew
                    self.rebind(dom, channel, value, what == SNAP_NOTIFY_VCPU, what == SNAP_GUEST_CPU)
        elif v >= 0:
            self.learn_vcpu(dom, dom.vcpu(v), what, value)

    def learn_word(self, dom: TwoLevelDomain, what: int, word: int, value: int) -> None:
        """A word of evtchn_pending[] or evtchn_mask[]."""
        value &= (1 << dom.bits) - 1
        initial = dom.pending0[word] if what == SNAP_PENDING else dom.masked0[word]
        initial.learn(value)
        base = word * dom.bits
        self.compare_word(dom, what, base, value)
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

    def compare_word(self, dom: TwoLevelDomain, what: int, base: int, value: int) -> None:
        """Metric: whether all bits that the model knows are as sampled."""
        known = differ = 0
        for channel in dom.ports[base : base + dom.bits]:
            if channel is not None:
                bit = channel.pending if what == SNAP_PENDING else channel.masked
                if bit != UNKNOWN:
                    known += 1
                    differ += bit != (1 if value & channel.word_bit else 0)
        if known:
            self.compare("pending" if what == SNAP_PENDING else "mask", differ == 0)

    def learn_vcpu(self, dom: TwoLevelDomain, vcpu: VcpuInfo, what: int, value: int) -> None:
        """A vCPU's selector, upcall_pending or upcall_mask. Inside its upcall nobody can tell whether the words were
        read before or after the scan's exchange."""
        if vcpu.in_upcall > 0:
            return
        if what == SNAP_SEL:
            value &= vcpu.sel_all
            if vcpu.sel_known:
                self.compare("selector", not (value ^ vcpu.sel) & vcpu.sel_known)
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
            if vcpu.upcall_pending != UNKNOWN:
                self.compare("upcall_pending", vcpu.upcall_pending == (1 if value & 0xFF else 0))
            if value & 0xFF and vcpu.upcall_pending == 0:
                self.unseen_send(dom)
            vcpu.upcall_pending = 1 if value & 0xFF else 0
            vcpu.upcall_t = self.now
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
        self.sink.taint(t0)
