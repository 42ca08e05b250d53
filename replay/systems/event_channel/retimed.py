"""Two-level event channels, what-if on a recording: upcalls and handlers take the time that they took (spec 0.6, S5.7).

Where scenarios have upcalls after upcall_ns and handlers without duration, a recorded vCPU took each event when it was
able to, and one event after the other. A port that its recorded scan had not seen yet is left to its own upcall.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import KIND_ID, NIL, NONE
from replay.hardware.evtchn_two_level import Channel, TwoLevelDomain, VcpuInfo
from replay.sink import Sink
from replay.systems.event_channel.machine import TwoLevelMachine
from replay.systems.event_channel.rules import DO_UPCALL

__all__ = ["RetimedChannels"]

UNMASK: Final = KIND_ID["evtchn.unmask"]
MASK: Final = KIND_ID["evtchn.mask"]

#: Agenda, beside those of TwoLevelRules: the scan of vCPU b of domain a goes on, c is its generation; the vCPU looks,
#: as it did when the recorded send was taken.
SCAN: Final = -1
LOOK: Final = -2


class RetimedChannels(TwoLevelMachine):
    """Closed runs with the lags of a recording."""

    def __init__(self, policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(policy, config, sink)
        self.waits: dict[int, int] = {}  # vCPU to the generation of its scan's next step
        self.serial: int = 0
        #: Requests of a handler that has not been dispatched yet: (kind, vCPU), by dom << 32 | port.
        self.held: dict[int, list[tuple[int, int]]] = {}
        self.pushed: int = 0

    def load(self, init: Mapping[str, Any]) -> None:
        """`init.S5` as in scenarios; nothing is known to be wrong at the start."""
        super().load(init)
        self.evaluate_start = False

    def send(self, dom: TwoLevelDomain, channel: Channel) -> None:
        """E1; whatever it changed, the vCPU will have looked when it took the recorded event."""
        super().send(dom, channel)
        vcpu = channel.guest_cpu
        due = self.due(self.seq)
        if due >= self.now and vcpu >= 0 and channel.masked == 0:
            self.agenda.at(due, SOFTWARE, LOOK, dom.id, vcpu)

    # -- upcalls ---------------------------------------------------------------------------------------------

    def schedule_upcall(self, dom: TwoLevelDomain, vcpu: VcpuInfo) -> None:
        """The upcall comes when the recorded send was taken, or upcall_ns from now where nothing is recorded."""
        self.notifications += 1
        due = self.now + self.upcall_ns
        taken = self.due(self.seq)
        if taken >= self.now:
            due = taken
        self.agenda.at(due, SOFTWARE, DO_UPCALL, dom.id, vcpu.number)

    def due(self, seq: int) -> int:
        """When a vCPU took the event that was sent at `seq`; NIL if that is not recorded."""
        lags = self.measured.lags if self.measured is not None else None
        return NIL if lags is None or seq < 0 else lags.of(seq)

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        self.seq = NONE
        if action == LOOK:
            dom = self.switch(a)
            self.upcall(dom, dom.vcpu(b))
        elif action != SCAN:
            super().fire(action, a, b, c)
        elif self.waits.get(self.key(a, b)) == c:
            dom = self.switch(a)
            self.scan(dom, dom.vcpu(b))

    @staticmethod
    def key(dom: int, number: int) -> int:
        """A vCPU or port of a domain as one number."""
        return dom << 32 | number

    def upcall(self, dom: TwoLevelDomain, vcpu: VcpuInfo) -> None:
        """E2; one that arrives inside a scan lets it look again."""
        if vcpu.in_upcall:
            self.scan(dom, vcpu)
            return
        if vcpu.upcall_mask == 1 or vcpu.upcall_pending != 1:
            return
        self.upcalls += 1
        vcpu.dispatched = 0
        self.round(dom, vcpu)

    def round(self, dom: TwoLevelDomain, vcpu: VcpuInfo) -> None:
        """One turn of E2's loop: clear upcall_pending, exchange the selector with 0, look."""
        vcpu.in_upcall = 1
        vcpu.upcall_pending = 0
        vcpu.taken = vcpu.sel
        vcpu.sel = 0
        vcpu.latched = 0
        self.words_scanned += vcpu.taken.bit_count()
        self.scan(dom, vcpu)

    def scan(self, dom: TwoLevelDomain, vcpu: VcpuInfo) -> None:
        """Dispatch what the recorded scan had dispatched by now, and wait for the rest of it."""
        while True:
            port, when, later = self.next_port(dom, vcpu)
            if port is None:
                break
            if when > self.now:
                self.serial += 1
                self.waits[self.key(dom.id, vcpu.number)] = self.serial
                self.agenda.at(when, SOFTWARE, SCAN, dom.id, vcpu.number, self.serial)
                return
            self.dispatch(dom, vcpu, port)
        self.waits.pop(self.key(dom.id, vcpu.number), None)
        if vcpu.upcall_pending == 1:
            self.round(dom, vcpu)
            return
        vcpu.in_upcall = 0
        for channel in later:
            self.leave(dom, vcpu, channel)
        if vcpu.dispatched == 0 and not later:
            self.spurious_upcalls += 1
            self.monitor.no_work(dom, vcpu, self.now, NONE)

    def next_port(self, dom: TwoLevelDomain, vcpu: VcpuInfo) -> tuple[Channel | None, int, list[Channel]]:
        """The ready port that is dispatched first, and when (ns); ports of this vCPU that come to a later upcall."""
        best: Channel | None = None
        best_t = 0
        later: list[Channel] = []
        lags = self.measured.lags if self.measured is not None else None
        words = vcpu.taken
        while words:
            low = words & -words
            words ^= low
            word = low.bit_length() - 1
            ready = dom.ready[word]
            while ready:
                bit = ready & -ready
                ready ^= bit
                channel = dom.ports[word * dom.bits + bit.bit_length() - 1]
                if channel is None:
                    continue
                if channel.guest_cpu != vcpu.number:
                    self.monitor.check(dom, channel, self.now)
                    continue
                index = -1 if lags is None or channel.pend_seq < 0 else lags.find(channel.pend_seq)
                if index >= 0 and lags is not None and lags.due[index] > self.now:
                    later.append(channel)
                    continue
                when = self.now if index < 0 or lags is None else max(self.now, lags.done[index])
                if best is None or when < best_t:
                    best, best_t = channel, when
        return best, best_t, later

    def leave(self, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> None:
        """The port's selector bit is still to be seen, by the upcall that took it in the recording."""
        vcpu.sel |= 1 << channel.word
        vcpu.setter[channel.word] = channel.number
        vcpu.upcall_pending = 1
        self.agenda.at(self.due(channel.pend_seq), SOFTWARE, DO_UPCALL, dom.id, vcpu.number)

    def dispatch(self, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> None:
        """The port is handed to its flow, which acks it; requests of its handler follow it (C2)."""
        vcpu.dispatched += 1
        self.handled += 1
        self.count_delivery(channel)
        self.effects.append((self.now, dom.id << 48 | vcpu.number << 32 | channel.number))
        self.monitor.dispatched(dom, vcpu, channel, self.now, NONE)
        channel.pending = 0
        dom.settle(channel)
        for kind, _ in self.held.pop(self.key(dom.id, channel.number), ()):
            # The body runs on the vCPU that dispatches now: a hypercall may become a local unmask (S5.7).
            super().port_event(dom, channel, kind, vcpu.number, NONE, NIL, 0)

    # -- bodies ----------------------------------------------------------------------------------------------

    def port_event(
        self, dom: TwoLevelDomain, channel: Channel, kind: int, v: int, tgt: int, val: int, flags: int
    ) -> None:
        """A mask or unmask request of a handler that this policy has not dispatched yet waits for it (C7)."""
        if kind in (MASK, UNMASK) and channel.pending == 1 and channel.masked == 0 and v >= 0:
            taken = self.due(channel.pend_seq)
            if taken != NIL and taken < self.now:
                self.pushed += 1
                self.held.setdefault(self.key(dom.id, channel.number), []).append((kind, v))
                return
        super().port_event(dom, channel, kind, v, tgt, val, flags)

    def metrics(self) -> dict[str, int]:
        return {**super().metrics(), "pushed": self.pushed}
