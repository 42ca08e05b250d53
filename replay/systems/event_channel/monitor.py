"""Two-level event channels: the rules that raise divergences (spec S5.4).

The machine tells the monitor of transitions; the same rules serve recordings and closed runs. A predicate that reads
something unknown is false (U3). Time-outs are entries of the agenda; an entry whose generation is old is ignored.
"""

from __future__ import annotations

from typing import Final

from replay.agenda import SOFTWARE, Agenda
from replay.declare import Config
from replay.events import INF, NIL, NONE
from replay.hardware.evtchn_two_level import Channel, TwoLevelDomain, VcpuInfo
from replay.knowledge import UNKNOWN
from replay.sink import Evidence, Sink
from replay.systems.event_channel import codes

__all__ = ["FIRST_TIMER", "Monitor"]

STRANDED: Final = 10
SELECTOR: Final = 11
UPCALL_ALONE: Final = 12
MISMATCH: Final = 13
DELAY: Final = 14
MASKED: Final = 15
BLOCK: Final = 16
#: Actions of the agenda from here on are the monitor's.
FIRST_TIMER: Final = STRANDED


def _flag(value: int) -> str:
    return "?" if value == UNKNOWN else str(value)


def _who(vcpu: int) -> str:
    return "?" if vcpu == NONE else f"vcpu{vcpu}"


class Monitor:
    """Divergences of one run of the two-level machine."""

    def __init__(self, config: Config, sink: Sink, agenda: Agenda) -> None:
        self.sink = sink
        self.agenda = agenda
        self.closed: bool = sink.closed
        self.strand_ns: int = config.integer("strand_ns")
        self.rebind_ns: int = config.integer("rebind_ns")
        self.delay_ns: int = config.integer("delay_ns")
        self.masked_ns: int = config.integer("masked_ns")
        self.delay_armed: bool = False
        self.masked_armed: bool = False
        self.stranded_total: int = 0
        self.stranded_ns: int = 0

    # -- stranded ports (E1..E5) -----------------------------------------------------------------------------

    def is_stranded(self, dom: TwoLevelDomain, channel: Channel) -> bool:
        """Pending, not masked, selector bit of the handling vCPU clear, no scan of the word running: all certain."""
        if channel.pending != 1 or channel.masked != 0 or channel.guest_cpu == NONE or not dom.sees_sends:
            return False
        vcpu = dom.vcpu(channel.guest_cpu)
        if vcpu.sel_test(channel.word) != 0:
            return False
        return vcpu.in_upcall == 0 or (vcpu.in_upcall > 0 and not vcpu.taken >> channel.word & 1)

    def check(self, dom: TwoLevelDomain, channel: Channel, t: int) -> None:
        """Something that the stranded predicate reads has changed: start or stop its clock (U5)."""
        if not self.is_stranded(dom, channel):
            if channel.since != INF:
                self.stranded_ns += t - channel.since
                channel.since = INF
        elif channel.since == INF:
            channel.since = t
            channel.trouble = True
            channel.generation += 1
            if not channel.strand_reported:
                due = t + self.strand_ns
                self.agenda.at(due, SOFTWARE, STRANDED, dom.id, channel.number, channel.generation)

    def check_word(self, dom: TwoLevelDomain, word: int, t: int) -> None:
        """`check` for every port of a word that is known to be pending and not masked."""
        ready = dom.ready[word]
        while ready:
            low = ready & -ready
            ready ^= low
            channel = dom.ports[word * dom.bits + low.bit_length() - 1]
            if channel is not None:
                self.check(dom, channel, t)

    def seen_stranded(self, dom: TwoLevelDomain, vcpu: VcpuInfo, word: int, t: int, seq: int) -> None:
        """A snapshot shows the selector bit clear. Where sends are not recorded a clear bit is only known at such
        moments, so a second one, strand_ns later in the same pending life, is the proof."""
        ready = dom.ready[word]
        while ready:
            low = ready & -ready
            ready ^= low
            channel = dom.ports[word * dom.bits + low.bit_length() - 1]
            if channel is None or channel.guest_cpu != vcpu.number or vcpu.in_upcall != 0:
                continue
            if channel.seen_t == NIL:
                channel.seen_t = t
                channel.trouble = True
            elif t - channel.seen_t >= self.strand_ns and not channel.strand_reported:
                self.report_stranded(dom, channel, t, channel.seen_t, seq)

    def report_stranded(self, dom: TwoLevelDomain, channel: Channel, t: int, since: int, seq: int) -> None:
        """Raise the code once in a pending life, with the story and the root cause that came before it."""
        channel.strand_reported = True
        self.stranded_total += 1
        guest = channel.guest_cpu
        cause = ""
        if channel.noop:
            cause = codes.HYPERCALL_NOOP.name
            self.sink.report(
                codes.HYPERCALL_NOOP, t, dom=dom.id, vcpu=guest, obj=channel.number, severity="error", seq=seq,
                expected="the unmask marks a pending event again",
                observed="the mask bit was clear already: the hypercall did nothing",
            )  # fmt: skip
        elif NONE != channel.notify_vcpu != guest:
            cause = codes.BINDING_MISMATCH.name
            self.sink.report(
                codes.BINDING_MISMATCH, t, dom=dom.id, vcpu=guest, obj=channel.number, tgt=channel.notify_vcpu,
                severity="error", expected="both bindings agree", seq=seq,
                observed=f"hypervisor {_who(channel.notify_vcpu)}, guest {_who(guest)}",
            )  # fmt: skip
        elif channel.select_vcpu not in (NONE, guest):
            cause = codes.SELECTOR_WRONG_VCPU.name
        self.sink.report(
            codes.STRANDED,
            t,
            dom=dom.id,
            vcpu=guest,
            obj=channel.number,
            val=since,
            t_first=since,
            seq=seq,
            cause=cause,
            expected=f"selector bit {channel.word} of {_who(guest)} set",
            observed=(
                f"pending 1, mask 0, selector bit {channel.word} of {_who(guest)} 0; hypervisor notifies "
                f"{_who(channel.notify_vcpu)}; bit last set on {_who(channel.select_vcpu)}"
            ),
            evidence=self.story(channel),
        )

    def story(self, channel: Channel) -> list[Evidence]:
        """What happened to the port in this pending life, oldest first."""
        steps: list[Evidence] = []
        if channel.pend_t != NIL:
            steps.append(Evidence(channel.pend_t, self.seq(channel.pend_seq), f"port {channel.number} pending"))
        if channel.unmask_t != NIL:
            where = _who(channel.unmask_vcpu)
            steps.append(Evidence(channel.unmask_t, self.seq(channel.unmask_seq), f"unmasked on {where}"))
        if channel.select_vcpu != NONE:
            t, seq = channel.select_t, channel.select_seq
            if t < channel.pend_t:  # by the send itself
                t, seq = channel.pend_t, channel.pend_seq
            label = f"selector bit {channel.word} set on {_who(channel.select_vcpu)}"
            steps.append(Evidence(t, self.seq(seq), label))
        steps.sort(key=lambda step: step.t)
        return steps

    def seq(self, seq: int) -> int | None:
        """Event number of a step; None when the model inferred it."""
        return None if seq == NONE else seq

    # -- transitions -----------------------------------------------------------------------------------------

    def selector_set(self, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel, t: int, seq: int) -> None:
        """sel[v][w] certainly went 0 to 1, caused by `channel` (E1, E3, E4)."""
        word = channel.word
        if dom.ready[word] & ~channel.word_bit:
            self.check_word(dom, word, t)
        guest = channel.guest_cpu
        if guest in (vcpu.number, NONE):
            return
        if not self.closed:
            if channel.bound_t != NIL and t - channel.bound_t <= self.rebind_ns:
                return
            if self.needed_by_another(dom, vcpu, channel):
                return
        self.sink.report(
            codes.SELECTOR_WRONG_VCPU, t, dom=dom.id, vcpu=vcpu.number, obj=channel.number, val=guest, seq=seq,
            expected=f"selector bit {word} on {_who(guest)}", observed=f"selector bit {word} on {_who(vcpu.number)}",
            evidence=self.story(channel),
        )  # fmt: skip

    def needed_by_another(self, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> bool:
        """Whether another port of the word, as far as is known, may be ready and handled on this vCPU (U3)."""
        first = channel.word * dom.bits
        for other in dom.ports[first : first + dom.bits]:
            if other is None or other is channel or other.pending == 0 or other.masked == 1:
                continue
            if other.guest_cpu in (vcpu.number, NONE):
                return True
        return False

    def dispatched(self, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel, t: int, seq: int) -> None:
        """E2 handed the port to its handler: its pending life ends."""
        if channel.since != INF:
            self.stranded_ns += t - channel.since
        if channel.strand_reported:
            setter = vcpu.setter[channel.word]
            certain = self.closed or not vcpu.latched >> channel.word & 1
            if certain and setter not in (channel.number, NONE):
                delay = t - channel.pend_t if channel.pend_t != NIL else NIL
                self.sink.report(
                    codes.PIGGYBACK, t, dom=dom.id, vcpu=vcpu.number, obj=channel.number, tgt=setter, val=delay,
                    t_first=channel.pend_t, seq=seq, cause=codes.STRANDED.name,
                    expected="delivered by its own event", observed=f"rescued by port {setter}",
                    evidence=self.story(channel),
                )  # fmt: skip
        self.end_of_life(channel)

    def end_of_life(self, channel: Channel) -> None:
        """The port was handled or its pending bit cleared: everything may be reported again."""
        channel.since = INF
        channel.seen_t = NIL
        channel.noop = False
        channel.strand_reported = False
        channel.delay_reported = False
        channel.mask_reported = False
        channel.trouble = False

    def no_work(self, dom: TwoLevelDomain, vcpu: VcpuInfo, t: int, seq: int) -> None:
        """A scan dispatched nothing (E2)."""
        if not self.closed:
            words = vcpu.taken
            while words:
                low = words & -words
                words ^= low
                setter = vcpu.setter[low.bit_length() - 1]
                channel = dom.ports[setter] if setter != NONE else None
                if channel is not None and channel.mask_t != NIL and channel.mask_t >= channel.pend_t:
                    return
        self.sink.report(
            codes.UPCALL_NO_WORK, t, dom=dom.id, vcpu=vcpu.number, seq=seq,
            expected="a ready port",
            observed=f"no port dispatched (selector 0x{vcpu.taken:x} as far as known)",
        )  # fmt: skip

    def bound(self, dom: TwoLevelDomain, channel: Channel, t: int) -> None:
        """A binding changed: it may strand the port (E5), and the two sides may disagree."""
        channel.mismatch_gen += 1
        if NONE != channel.notify_vcpu != channel.guest_cpu != NONE:
            due = t + self.rebind_ns
            self.agenda.at(due, SOFTWARE, MISMATCH, dom.id, channel.number, channel.mismatch_gen)
        self.check(dom, channel, t)

    def hypercall_noop(self, dom: TwoLevelDomain, vcpu: int, channel: Channel, t: int, seq: int) -> None:
        """EVTCHNOP_unmask found the mask bit clear although the port is pending and nobody was told (E4)."""
        channel.noop = True
        self.sink.report(
            codes.HYPERCALL_NOOP, t, dom=dom.id, vcpu=vcpu, obj=channel.number, seq=seq,
            expected="mask bit set until the hypercall clears it", observed="mask 0, pending 1",
            evidence=self.story(channel),
        )  # fmt: skip
        self.check(dom, channel, t)

    def words_changed(self, dom: TwoLevelDomain, vcpu: VcpuInfo, t: int) -> None:
        """sel, upcall_pending or in_upcall of a vCPU became known: compare selector and upcall byte."""
        vcpu.sel_gen += 1
        if vcpu.in_upcall != 0 or not dom.sees_sends:
            return
        if vcpu.sel and vcpu.upcall_pending == 0:
            self.agenda.at(t + self.strand_ns, SOFTWARE, SELECTOR, dom.id, vcpu.number, vcpu.sel_gen)
        elif vcpu.upcall_pending == 1 and not vcpu.sel and vcpu.sel_known == vcpu.sel_all:
            self.agenda.at(t + self.strand_ns, SOFTWARE, UPCALL_ALONE, dom.id, vcpu.number, vcpu.sel_gen)

    def blocked(self, dom: TwoLevelDomain, vcpu: VcpuInfo, t: int) -> None:
        """The vCPU blocks (SCHEDOP_block, HLT)."""
        seen = dom.sees_upcalls or vcpu.upcall_t == t  # a snapshot of this moment shows the byte itself
        if vcpu.upcall_pending == 1 and vcpu.upcall_mask == 0 and seen:
            self.agenda.at(t + self.strand_ns, SOFTWARE, BLOCK, dom.id, vcpu.number, vcpu.block_gen)

    def arm_delay(self, dom: TwoLevelDomain, t: int) -> None:
        """A port became ready: make sure that somebody looks when it is late. One entry serves all ports: later ones
        have later deadlines, and the look computes the next one."""
        self.delay_armed = True
        self.agenda.at(t + self.delay_ns, SOFTWARE, DELAY, dom.id)

    def arm_masked(self, dom: TwoLevelDomain, t: int) -> None:
        """A port is pending and masked; as `arm_delay`."""
        self.masked_armed = True
        self.agenda.at(t + self.masked_ns, SOFTWARE, MASKED, dom.id)

    # -- time-outs -------------------------------------------------------------------------------------------

    def fire(self, action: int, dom: TwoLevelDomain, number: int, generation: int, t: int) -> None:
        """A time-out is due."""
        if action == STRANDED:
            channel = dom.channel(number)
            if channel.generation == generation and channel.since != INF and not channel.strand_reported:
                if self.is_stranded(dom, channel):
                    self.report_stranded(dom, channel, t, channel.since, NONE)
                else:
                    channel.since = INF
        elif action == MISMATCH:
            self.fire_mismatch(dom, dom.channel(number), generation, t)
        elif action in (SELECTOR, UPCALL_ALONE):
            self.fire_words(action, dom, dom.vcpu(number), generation, t)
        elif action == BLOCK:
            vcpu = dom.vcpu(number)
            if vcpu.block_gen == generation and vcpu.upcall_pending == 1 and vcpu.upcall_mask == 0:
                self.sink.report(
                    codes.LOST_WAKEUP_BLOCK, t, dom=dom.id, vcpu=number, t_first=t - self.strand_ns,
                    expected="not blocked", observed="blocked, upcall_pending 1, upcall_mask 0",
                )  # fmt: skip

    def fire_mismatch(self, dom: TwoLevelDomain, channel: Channel, generation: int, t: int) -> None:
        """The bindings have differed for rebind_ns."""
        if channel.mismatch_gen != generation:
            return
        self.sink.report(
            codes.BINDING_MISMATCH, t, dom=dom.id, vcpu=channel.guest_cpu, obj=channel.number,
            tgt=channel.notify_vcpu, t_first=t - self.rebind_ns, expected="both bindings agree",
            observed=f"hypervisor {_who(channel.notify_vcpu)}, guest {_who(channel.guest_cpu)}",
        )  # fmt: skip

    def fire_words(self, action: int, dom: TwoLevelDomain, vcpu: VcpuInfo, generation: int, t: int) -> None:
        """Selector and upcall byte have contradicted each other for strand_ns."""
        if vcpu.sel_gen != generation or vcpu.in_upcall != 0 or not dom.sees_sends:
            return
        if vcpu.upcall_pending != (0 if action == SELECTOR else 1) or bool(vcpu.sel) != (action == SELECTOR):
            return
        code = codes.SELECTOR_WITHOUT_UPCALL if action == SELECTOR else codes.UPCALL_WITHOUT_SELECTOR
        self.sink.report(
            code, t, dom=dom.id, vcpu=vcpu.number, t_first=t - self.strand_ns,
            observed=f"selector 0x{vcpu.sel:x}, upcall_pending {_flag(vcpu.upcall_pending)}, no upcall running",
        )  # fmt: skip

    def look_for_delays(self, doms: list[TwoLevelDomain], t: int) -> None:
        """Report every ready port whose running vCPU has left it alone for delay_ns; arm for the next deadline."""
        self.delay_armed = False
        following = INF
        for dom in doms:
            if not dom.handled_seen:
                continue
            for channel in dom.channels:
                if channel.delay_reported or not channel.is_ready() or channel.guest_cpu == NONE:
                    continue
                vcpu = dom.vcpu(channel.guest_cpu)
                ready_t = max(channel.pend_t, channel.unmask_t)
                if vcpu.running != 1 or channel.pend_t == NIL:
                    continue
                start = max(ready_t, vcpu.run_t)
                if t - start < self.delay_ns:
                    following = min(following, start + self.delay_ns)
                    continue
                channel.delay_reported = True
                channel.trouble = True
                self.sink.report(
                    codes.DELIVERY_DELAY, t, dom=dom.id, vcpu=vcpu.number, obj=channel.number, val=t - ready_t,
                    t_first=ready_t, expected=f"handled within {self.delay_ns} ns",
                    observed=f"pending and not masked, upcall_mask {_flag(vcpu.upcall_mask)}, vCPU running",
                    evidence=self.story(channel),
                )  # fmt: skip
        if following != INF:
            self.delay_armed = True
            self.agenda.at(following, SOFTWARE, DELAY)

    def look_for_masked(self, doms: list[TwoLevelDomain], t: int) -> None:
        """Report every port that has been pending and masked for masked_ns; arm for the next deadline."""
        self.masked_armed = False
        following = INF
        for dom in doms:
            for channel in dom.channels:
                if channel.pending != 1 or channel.masked != 1 or channel.mask_reported or channel.pend_t == NIL:
                    continue
                start = max(channel.pend_t, channel.mask_t)
                if t - start < self.masked_ns:
                    following = min(following, start + self.masked_ns)
                    continue
                channel.mask_reported = True
                channel.trouble = True
                self.sink.report(
                    codes.MASKED_PENDING_LONG, t, dom=dom.id, vcpu=channel.guest_cpu, obj=channel.number,
                    val=t - start, t_first=start, observed="pending 1, mask 1", evidence=self.story(channel),
                )  # fmt: skip
        if following != INF:
            self.masked_armed = True
            self.agenda.at(following, SOFTWARE, MASKED)
