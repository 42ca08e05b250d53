"""Short cuts for the five kinds that make up most of a recording of two-level event channels.

`TwoLevelMachine` is the law, one method for each rule; here is only speed. A batch of events is looked at column by
column first: every row gets its domain, port and vCPU. Then one loop takes sends, upcalls, dispatches and acks of ports
and vCPUs of which everything is known and nothing is in trouble, doing exactly what `send`, `on_upcall`, `on_handled`,
`on_clear` and `on_upcall_end` do then. Anything else goes to the method of its rule.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Final

import numpy as np

from replay.columns import dense
from replay.declare import Config
from replay.events import INF, KINDS, NIL, Batch
from replay.hardware.evtchn_two_level import Channel, TwoLevelDomain, VcpuInfo
from replay.sink import Sink
from replay.systems.event_channel.machine import (
    CLEAR,
    HANDLED,
    MASK,
    PORT_KINDS,
    SEND,
    UNMASK,
    UPCALL,
    UPCALL_END,
    TwoLevelMachine,
)

__all__ = ["QuickTwoLevelMachine"]

# What the loop does with an event.
SLOW: Final = 0
TO_CLEAR: Final = 1
TO_SEND: Final = 2
TO_HANDLED: Final = 3
TO_UPCALL: Final = 4
TO_UPCALL_END: Final = 5

#: Rows that are looked at together.
STRIDE: Final = 1 << 14
#: Ports and vCPUs of all domains of a stretch that a table is made for.
TABLE: Final = 1 << 18

_STEP: Final = np.zeros(len(KINDS), np.uint8)
_STEP[[CLEAR, SEND, HANDLED, UPCALL, UPCALL_END]] = (TO_CLEAR, TO_SEND, TO_HANDLED, TO_UPCALL, TO_UPCALL_END)
_OF_PORT: Final = np.zeros(len(KINDS), np.bool_)
_OF_PORT[sorted(PORT_KINDS)] = True


class QuickTwoLevelMachine(TwoLevelMachine):
    """`TwoLevelMachine` with short cuts; findings and numbers are the same."""

    def __init__(self, policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(policy, config, sink)
        # Of the present stretch: columns, what each row is about, and the same as numbers in a table.
        self.columns_of: dict[str, Any] = {}
        self.times: Any = ()
        self.seqs: Any = ()
        self.doms: list[TwoLevelDomain | None] = []
        self.channels: list[Channel | None] = []
        self.vcpus: list[VcpuInfo | None] = []
        self.slots: Any = ()
        self.ports: Any = ()
        self.units: Any = ()

    def feed(self, batch: Batch) -> None:
        """Feed a batch of events, in order. Closed runs, and what held before the first event, go by the rules."""
        if self.closed or self.evaluate_start:
            self.consume(batch.rows(self.columns))
            return
        for start in range(0, len(batch), STRIDE):
            self.stretch(batch.slice(start, STRIDE))

    def stretch(self, batch: Batch) -> None:
        """Feed the rows of one stretch."""
        kinds = batch.array("kind")
        numbers = batch.array("vcpu").astype(np.int64)
        ports = batch.array("obj").astype(np.int64)
        found, slots = dense(batch.array("dom").astype(np.int64))
        limit = self.bits * self.bits
        width = int(numbers.max()) + 2
        if len(found) * max(limit, width) > TABLE:
            self.consume(batch.rows(self.columns))
            return
        doms = [self.domains.get(number) for number in found.tolist()]
        self.columns_of = {name: memoryview(batch.array(name)) for name in self.columns}
        self.times = self.columns_of["t_ns"]
        self.seqs = self.columns_of["seq"]
        # Numbers in the tables of ports and vCPUs; the first entry of either is "none".
        self.slots = slots
        self.ports = np.where(_OF_PORT[kinds] & (ports >= 0) & (ports < limit), slots * limit + ports + 1, 0)
        self.units = np.where(numbers >= 0, slots * width + numbers + 1, 0)
        channels = np.full(len(found) * limit + 1, None, object)
        vcpus = np.full(len(found) * width + 1, None, object)
        for slot, dom in enumerate(doms):
            if dom is not None:
                channels[slot * limit + 1 : (slot + 1) * limit + 1] = dom.ports
                known = dom.slots[:width]
                vcpus[slot * width + 1 : slot * width + len(known) + 1] = known
        self.doms = np.array([*doms, None], object)[slots].tolist()
        self.channels = channels[self.ports].tolist()
        self.vcpus = vcpus[self.units].tolist()
        sends = self.sends + int(np.count_nonzero((kinds == SEND) & (self.ports > 0)))
        handled = self.handled + int(np.count_nonzero((kinds == HANDLED) & (self.ports > 0) & (numbers >= 0)))
        upcalls = self.upcalls + int(np.count_nonzero((kinds == UPCALL) & (numbers >= 0)))
        self.run_rows(_STEP[kinds].tolist())
        # Whatever the methods of the rules counted.
        self.sends = sends
        self.handled = handled
        self.upcalls = upcalls
        self.now = self.times[len(batch) - 1]

    def run_rows(self, steps: list[int]) -> None:
        """The loop."""
        heap = self.agenda.heap
        monitor = self.monitor
        times = self.times
        seqs = self.seqs
        n = len(steps)
        due = heap[0][0] if heap else INF
        stop: int = bisect_left(times, due)  # the row before which an entry of the agenda is due
        coalesced = 0
        delivery_ns = 0
        longest = self.max_delivery_ns
        longest_hot = self.max_delivery_hot_ns
        for i, step, dom, channel, vcpu in zip(  # noqa: B905 (all are n long)
            range(n), steps, self.doms, self.channels, self.vcpus
        ):
            if i >= stop:
                self.advance(times[i])
                due = heap[0][0] if heap else INF
                stop = bisect_left(times, due, i + 1)
            if dom is None:
                pass
            elif channel is not None:
                if step == TO_CLEAR:
                    if not channel.trouble:
                        channel.clears = True
                        channel.pending = 0
                        dom.ready[channel.word] &= ~channel.word_bit
                        continue
                elif step == TO_SEND:
                    if channel.pending == 1:
                        coalesced += 1
                        continue
                    guest = channel.guest_cpu
                    if (
                        channel.pending == 0
                        and channel.masked == 0
                        and channel.notify_vcpu == guest
                        and guest >= 0
                        and monitor.delay_armed
                        and guest < len(dom.slots)
                    ):
                        target = dom.slots[guest]
                        word = channel.word
                        bit = channel.selector_bit
                        if (
                            target is not None
                            and target.in_upcall == 0
                            and (target.sel_known == target.sel_all or target.sel_known & bit)
                        ):
                            if target.sel & bit:  # E1 ends here: somebody is told already
                                dom.ready[word] |= channel.word_bit
                                channel.pending = 1
                                channel.pend_t = times[i]
                                channel.pend_seq = seqs[i]
                                channel.since = INF
                                continue
                            if dom.ready[word] == 0:
                                dom.ready[word] = channel.word_bit
                                channel.pending = 1
                                channel.pend_t = times[i]
                                channel.pend_seq = seqs[i]
                                channel.since = INF
                                channel.select_vcpu = guest
                                target.sel |= bit
                                target.setter[word] = channel.number
                                target.upcall_pending = 1
                                continue
                elif (
                    step == TO_HANDLED
                    and vcpu is not None
                    and channel.guest_cpu == vcpu.number
                    and channel.pending == 1
                    and channel.clears
                    and not channel.trouble
                    and dom.handled_seen
                ):
                    vcpu.dispatched += 1
                    if channel.pend_t != NIL:
                        delay = times[i] - channel.pend_t
                        delivery_ns += delay
                        if delay > longest:
                            longest = delay
                        if delay > longest_hot and channel.word == 0:
                            longest_hot = delay
                    channel.hypercall_t = NIL
                    continue
            elif vcpu is not None:
                if step == TO_UPCALL:
                    if vcpu.in_upcall == 0:
                        vcpu.in_upcall = 1
                        vcpu.upcall_pending = 0
                        vcpu.taken = vcpu.sel
                        vcpu.sel = 0
                        if vcpu.sel_known != vcpu.sel_all:
                            vcpu.taken |= vcpu.sel_all & ~vcpu.sel_known
                            vcpu.sel_known = vcpu.sel_all
                        vcpu.latched = 0
                        vcpu.dispatched = 0
                        continue
                elif step == TO_UPCALL_END and vcpu.in_upcall == 1 and vcpu.dispatched and not vcpu.latched:
                    words = vcpu.taken
                    while words and dom.ready[words.bit_length() - 1] == 0:
                        words ^= 1 << (words.bit_length() - 1)
                    if words == 0:  # all handled
                        vcpu.in_upcall = 0
                        dom.ends_seen = True
                        continue
            self.long_way(i)
            if heap and heap[0][0] != due:
                due = heap[0][0]
                stop = bisect_left(times, due, i + 1)
            longest = max(longest, self.max_delivery_ns)
            longest_hot = max(longest_hot, self.max_delivery_hot_ns)
        self.coalesced += coalesced
        self.delivery_ns += delivery_ns
        self.max_delivery_ns = longest
        self.max_delivery_hot_ns = longest_hot

    def long_way(self, row: int) -> None:
        """An event that goes to the method of its rule."""
        columns = self.columns_of
        self.now = self.times[row]
        self.seq = self.seqs[row]
        kind: int = columns["kind"][row]
        v: int = columns["vcpu"][row]
        dom = self.doms[row]
        channel = self.channels[row]
        if dom is None:
            number: int = columns["dom"][row]
            dom = self.dom if number == self.dom.id else self.switch(number)
            self.learn(self.doms, self.slots, row, dom)
        self.dom = dom
        if channel is not None and kind == MASK:
            self.mask(dom, channel)
        elif channel is not None and kind == UNMASK:
            self.unmask(dom, v, channel)
        else:
            p: int = columns["obj"][row]
            self.event(dom, kind, v, p, columns["tgt"][row], columns["val"][row], columns["flags"][row])
            if channel is None and self.ports[row]:
                self.learn(self.channels, self.ports, row, dom.ports[p])
        if v >= 0 and self.vcpus[row] is None and v < len(dom.slots):
            self.learn(self.vcpus, self.units, row, dom.slots[v])

    def learn(self, things: list[Any], numbers: Any, row: int, thing: Any) -> None:
        """A domain, port or vCPU appears: the rest of the stretch knows it."""
        for index in np.flatnonzero(numbers == numbers[row]).tolist():
            things[index] = thing
