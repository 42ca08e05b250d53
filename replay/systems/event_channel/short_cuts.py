"""Short cuts for the kinds that make up most of a recording of two-level event channels.

`TwoLevelMachine` is the law, one method for each rule; here is only speed. Columns become lists of plain integers a
stretch at a time. Then one loop takes sends, upcalls, dispatches and acks of ports and vCPUs of which everything is
known and nothing is in trouble, doing exactly what `send`, `on_upcall`, `on_handled`, `on_clear` and `on_upcall_end` do
then; masks and unmasks go to their rule's method straight away. Anything else goes through `event`.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Any, Final

import numpy as np

from replay.declare import Config
from replay.events import INF, KINDS, NIL, Batch
from replay.sink import Sink
from replay.systems.event_channel.machine import (
    CLEAR,
    HANDLED,
    MASK,
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
TO_MASK: Final = 6
TO_UNMASK: Final = 7
STEPS: Final = 8

#: vCPU numbers of a guest that a byte holds; guests with more of them go by the rules.
BYTE: Final = 1 << 8
#: Rows that are looked at together.
STRIDE: Final = 1 << 14

_STEP: Final = np.zeros(len(KINDS), np.uint8)
_STEP[[CLEAR, SEND, HANDLED, UPCALL, UPCALL_END]] = (TO_CLEAR, TO_SEND, TO_HANDLED, TO_UPCALL, TO_UPCALL_END)
_STEP[[MASK, UNMASK]] = (TO_MASK, TO_UNMASK)
#: Whether a step needs a port, a vCPU.
_OF_PORT: Final = np.isin(np.arange(STEPS), (TO_CLEAR, TO_SEND, TO_HANDLED, TO_MASK, TO_UNMASK))
_OF_VCPU: Final = np.isin(np.arange(STEPS), (TO_HANDLED, TO_UPCALL, TO_UPCALL_END, TO_UNMASK))


class QuickTwoLevelMachine(TwoLevelMachine):
    """`TwoLevelMachine` with short cuts; findings and numbers are the same."""

    def __init__(self, policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(policy, config, sink)
        # Columns of the present stretch.
        self.times: Any = ()
        self.seqs: Any = ()
        self.others: tuple[Any, ...] = ()

    def feed(self, batch: Batch) -> None:
        """Feed a batch of events, in order. Closed runs, and what held before the first event, go by the rules."""
        if self.closed or self.evaluate_start:
            self.consume(batch.rows(self.columns))
            return
        for start in range(0, len(batch), STRIDE):
            self.stretch(batch.slice(start, STRIDE))

    def stretch(self, batch: Batch) -> None:
        """Feed the rows of one stretch."""
        vcpus = batch.array("vcpu")
        ports = batch.array("obj")
        doms = batch.array("dom")
        if vcpus.max() >= BYTE:
            self.consume(batch.rows(self.columns))
            return
        steps = _STEP.take(batch.array("kind"))
        if ports.min() < 0 or ports.max() >= self.bits * self.bits:
            steps[_OF_PORT[steps] & ((ports < 0) | (ports >= self.bits * self.bits))] = SLOW
        if vcpus.min() < 0:
            steps[_OF_VCPU[steps] & (vcpus < 0)] = SLOW
        counts = np.bincount(steps, minlength=STEPS).tolist()
        sends = self.sends + counts[TO_SEND]
        handled = self.handled + counts[TO_HANDLED]
        upcalls = self.upcalls + counts[TO_UPCALL]
        self.times = memoryview(batch.array("t_ns"))
        self.seqs = memoryview(batch.array("seq"))
        self.others = tuple(memoryview(batch.array(name)) for name in ("kind", "vcpu", "tgt", "val", "flags"))
        one = doms.min() == doms.max()
        self.run_rows(
            steps.tobytes(), [int(doms[0])] * len(batch) if one else doms.tolist(), vcpus.astype(np.uint8).tobytes(),
            ports.tolist(),
        )  # fmt: skip
        # Whatever the methods of the rules counted.
        self.sends = sends
        self.handled = handled
        self.upcalls = upcalls
        self.now = self.times[len(batch) - 1]

    def run_rows(self, steps: bytes, doms: list[int], vcpus: bytes, ports: list[int]) -> None:
        """The loop."""
        heap = self.agenda.heap
        monitor = self.monitor
        times = self.times
        seqs = self.seqs
        dom = self.dom
        number = dom.id
        channels = dom.ports
        ready = dom.ready
        slots = dom.slots
        known = len(slots)  # at least so many: they only grow
        due = heap[0][0] if heap else INF
        stop: int = bisect_left(times, due)  # the row before which an entry of the agenda is due
        coalesced = 0
        delivery_ns = 0
        longest = self.max_delivery_ns
        longest_hot = self.max_delivery_hot_ns
        for i, step, d, v, p in zip(range(len(steps)), steps, doms, vcpus, ports):  # noqa: B905 (all of one length)
            if i >= stop:
                self.advance(times[i])
                due = heap[0][0] if heap else INF
                stop = bisect_left(times, due, i + 1)
            if d != number:
                dom = self.switch(d)
                number = d
                channels = dom.ports
                ready = dom.ready
                slots = dom.slots
                known = len(slots)
            if step == TO_CLEAR:
                channel = channels[p]
                if channel is not None and not channel.trouble:
                    channel.clears = True
                    channel.pending = 0
                    word = channel.word
                    ready[word] = ready[word] & ~channel.word_bit
                    continue
            elif step == TO_SEND:
                channel = channels[p]
                if channel is None:
                    pass
                elif channel.pending == 1:
                    coalesced += 1
                    continue
                elif channel.pending == 0 and channel.masked == 0 and monitor.delay_armed:
                    guest = channel.guest_cpu
                    if channel.notify_vcpu == guest and 0 <= guest < known:
                        target = slots[guest]
                        word = channel.word
                        bit = channel.selector_bit
                        if (
                            target is not None
                            and target.in_upcall == 0
                            and (target.sel_known == target.sel_all or target.sel_known & bit)
                        ):
                            told = target.sel & bit  # E1 ends here: somebody is told already
                            if told or ready[word] == 0:
                                ready[word] = ready[word] | channel.word_bit
                                channel.pending = 1
                                channel.pend_t = times[i]
                                channel.pend_seq = seqs[i]
                                channel.since = INF
                                if not told:
                                    channel.select_vcpu = guest
                                    target.sel = target.sel | bit
                                    target.setter[word] = p
                                    target.upcall_pending = 1
                                continue
            elif step == TO_HANDLED:
                channel = channels[p]
                if (
                    channel is not None
                    and channel.guest_cpu == v
                    and channel.pending == 1
                    and channel.clears
                    and not channel.trouble
                    and dom.handled_seen
                    and v < known
                ):
                    vcpu = slots[v]
                    if vcpu is not None:
                        vcpu.dispatched += 1
                        if channel.pend_t != NIL:
                            now: int = times[i]
                            delay = now - channel.pend_t
                            delivery_ns += delay
                            if delay > longest:
                                longest = delay
                            if delay > longest_hot and channel.word == 0:
                                longest_hot = delay
                        channel.hypercall_t = NIL
                        continue
            elif step == TO_UPCALL:
                if v < known:
                    vcpu = slots[v]
                    if vcpu is not None and vcpu.in_upcall == 0:
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
            elif step == TO_UPCALL_END and v < known:
                vcpu = slots[v]
                if vcpu is not None and vcpu.in_upcall == 1 and vcpu.dispatched and not vcpu.latched:
                    words = vcpu.taken
                    while words:
                        low = words & -words
                        if ready[low.bit_length() - 1]:
                            break
                        words ^= low
                    if words == 0:  # all handled
                        vcpu.in_upcall = 0
                        dom.ends_seen = True
                        continue
            self.now = times[i]
            self.seq = seqs[i]
            self.dom = dom
            if step == TO_MASK:
                self.mask(dom, dom.channel(p))
            elif step == TO_UNMASK:
                self.unmask(dom, v, dom.channel(p))
            else:
                kinds, numbers, targets, values, flags = self.others
                self.event(dom, kinds[i], numbers[i], p, targets[i], values[i], flags[i])
                longest = max(longest, self.max_delivery_ns)
                longest_hot = max(longest_hot, self.max_delivery_hot_ns)
            known = len(slots)
            if heap and heap[0][0] != due:
                due = heap[0][0]
                stop = bisect_left(times, due, i + 1)
        self.coalesced += coalesced
        self.delivery_ns += delivery_ns
        self.max_delivery_ns = longest
        self.max_delivery_hot_ns = longest_hot
