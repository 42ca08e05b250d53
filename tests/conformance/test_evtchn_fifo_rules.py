"""FIFO event channels: what the words of shared memory hold after each step (F1..F4), and which codes follow.

Words are drawn as they are in memory: of a port P, M and L (PENDING, MASKED, LINKED; `-` clear, `?` not known) and its
LINK; of queue 7, or another, head, tail, the guest's own head and the ready bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from replay.declare import Config
from replay.events import KIND_ID, NIL, NONE
from replay.hardware.evtchn_fifo import BUSY, LINKED, MASKED, PENDING, PORTS, QUEUES
from replay.knowledge import UNKNOWN
from replay.sink import Finding, Sink
from replay.systems import SYSTEMS
from replay.systems.event_channel.fifo import FifoMachine
from replay.systems.event_channel.fifo_monitor import EVALUATE

US = 1_000
Event = tuple[int, str, Mapping[str, int]]
DEFAULTS = {"val": NIL, "flags": 0}


class Guest:
    """One guest whose events are fed one after the other."""

    def __init__(
        self, *events: Event, closed: bool = False, known: bool = True, init: Any = None, **config: Any
    ) -> None:
        self.sink = Sink(closed=closed)
        self.machine = FifoMachine(None, Config(SYSTEMS["evtchn"].parameters, config), self.sink)
        self.machine.from_boot = known
        self.machine.load({"S5": init} if init else {})
        self.fed = 0
        self.feed(*events)

    def feed(self, *events: Event) -> Guest:
        rows = []
        for t, kind, fields in events:
            row = {"kind": KIND_ID[kind], "t_ns": t, **fields, "seq": self.fed}
            rows.append(tuple(row.get(name, DEFAULTS.get(name, NONE)) for name in FifoMachine.columns))
            self.fed += 1
        self.machine.consume(rows)
        return self

    def end(self, t: int) -> Guest:
        self.machine.finish(t)
        return self

    def port(self, number: int) -> str:
        port = self.machine.domain(NONE).ports[number]
        flags = (("P", port.pending), ("M", port.masked), ("L", port.linked))
        return "".join({1: name, 0: "-", UNKNOWN: "?"}[bit] for name, bit in flags) + f" {_number(port.link)}"

    def queue(self, vcpu: int = 0, queue: int = 7) -> str:
        v = self.machine.domain(NONE).vcpu(vcpu)
        words = ", ".join(_number(some[queue]) for some in (v.head, v.tail, v.lhead))
        return f"{words}, {_number(v.ready_test(queue))}"

    @property
    def codes(self) -> list[str]:
        return [f.code.name for f in self.sink.findings]

    @property
    def found(self) -> list[Finding]:
        return self.sink.findings

    @property
    def numbers(self) -> dict[str, int]:
        return {name: value for name, value in self.machine.metrics().items() if value}


def _number(value: int) -> str:
    return "?" if value == UNKNOWN else str(value)


def send(t: int, port: int, **more: int) -> Event:
    return (t, "evtchn.send", {"obj": port, **more})


def on(t: int, kind: str, vcpu: int, **fields: int) -> Event:
    return (t, f"evtchn.{kind}", {"vcpu": vcpu, **fields})


def move(t: int, port: int, vcpu: int = NONE) -> Event:
    return (t, "evtchn.bind_vcpu", {"obj": port, "tgt": vcpu})


def word(t: int, port: int, val: int) -> Event:
    return (t, "fifo.word", {"obj": port, "val": val})


def head(t: int, port: int, queue: int = 7, vcpu: int = 0) -> Event:
    return (t, "fifo.head", {"vcpu": vcpu, "tgt": queue, "val": port})


def ready(t: int, bits: int, vcpu: int = 0) -> Event:
    return (t, "fifo.ready", {"vcpu": vcpu, "val": bits})


def check(t: int) -> Event:
    return (t, "fifo.check", {})


def consuming(t: int, val: int, vcpu: int = 0) -> Event:
    return (t, "fifo.consuming", {"vcpu": vcpu, "val": val})


def gap(t: int) -> Event:
    return (t, "trace.lost", {"val": t})


Q7 = 1 << 7

# -- F1: set -----------------------------------------------------------------------------------------------------------


def test_a_send_appends_and_makes_a_new_queue_ready() -> None:
    guest = Guest()
    assert guest.queue() == "0, 0, 0, 0"
    guest.feed(send(10, 5))
    assert (guest.port(5), guest.queue()) == ("P-L 0", "5, 5, 0, 1")
    guest.feed(send(20, 1))
    assert (guest.port(5), guest.port(1), guest.queue()) == ("P-L 1", "P-L 0", "5, 1, 0, 1")
    guest.feed(send(30, 5))
    assert (guest.port(5), guest.port(1), guest.queue()) == ("P-L 1", "P-L 0", "5, 1, 0, 1")
    assert guest.numbers == {"sends": 3, "coalesced": 1, "pending": 2}


def test_a_consumed_tail_is_no_tail() -> None:
    guest = Guest(send(10, 1), on(20, "handled", 0, obj=1), send(30, 5))
    assert (guest.port(1), guest.port(5), guest.queue()) == ("?-- 0", "P-L 0", "5, 5, 0, 1")
    assert Guest(word(0, 5, 6), send(10, 5)).port(5) == "P-L 0"  # where LINKED is clear, LINK says nothing


def test_a_masked_port_is_linked_by_the_unmask_only() -> None:
    guest = Guest(on(0, "mask", 0, obj=5), send(10, 5))
    assert (guest.port(5), guest.queue()) == ("PM- 0", "0, 0, 0, 0")
    guest.feed(on(20, "unmask", 0, obj=5))
    assert (guest.port(5), guest.queue()) == ("P-L 0", "5, 5, 0, 1")
    assert guest.numbers == {"sends": 1, "pending": 1, "unmask_hypercalls": 1}
    quiet = Guest(on(0, "mask", 0, obj=5), on(10, "unmask", 0, obj=5))
    assert (quiet.port(5), quiet.queue(), quiet.numbers) == ("--- 0", "0, 0, 0, 0", {})


def test_the_queue_is_that_of_vcpu_and_priority() -> None:
    guest = Guest(init={"priority": {"5": 2}, "notify_vcpu": {"5": 1, "6": 1}, "masked": [8]})
    guest.feed(send(10, 5), send(20, 6), send(30, 8))
    assert [guest.queue(1, 2), guest.queue(1), guest.queue(0)] == ["5, 5, 0, 1", "6, 6, 0, 1", "0, 0, 0, 0"]
    assert guest.port(8) == "PM- 0"
    of_one = Guest(send(10, 5, dom=3), init={"priority": {"5": 2}, "dom": 3}).machine.domains[3]
    assert of_one.vcpu(0).head[2] == 5


def test_what_moves_takes_its_tail_along() -> None:
    """Xen evtchn_fifo_set_pending: if the event was the old queue's tail, that tail is invalid from now on."""
    consumed = [send(10, 5), on(20, "upcall", 0), on(30, "handled", 0, obj=5), on(40, "clear", 0, obj=5)]
    guest = Guest(*consumed, move(50, 5, 1), send(60, 5))
    assert (guest.queue(0), guest.queue(1)) == ("0, 0, 0, 0", "5, 5, 0, 1")
    guest.feed(send(70, 6))  # and not behind 5
    assert (guest.port(5), guest.port(6), guest.queue(0)) == ("P-L 0", "P-L 0", "6, 6, 0, 1")
    two = Guest(send(10, 5), send(11, 6), *consumed[1:], move(50, 5, 1), send(60, 5))
    assert (two.queue(0), two.queue(1)) == ("0, 6, 6, 1", "5, 5, 0, 1")  # 5 was not the tail
    third = Guest(move(0, 5, 1), send(10, 5), on(20, "handled", 1, obj=5), move(50, 5, 0), send(60, 5))
    assert (third.queue(0), third.queue(1)) == ("5, 5, 0, 1", "0, 0, 0, 0")
    bound = Guest(*consumed, move(50, 5, 1), (55, "evtchn.bind", {"obj": 5, "tgt": 1}), send(60, 5), send(70, 6))
    assert (bound.port(5), bound.queue(0)) == ("P-L 0", "6, 6, 0, 1")  # a new binding does not hide where it was


def test_moved_from_one_priority_to_another_by_init() -> None:
    guest = Guest(init={"priority": {"5": 3}})
    guest.feed(send(10, 5), on(20, "upcall", 0), on(30, "handled", 0, obj=5), on(40, "clear", 0, obj=5))
    assert guest.queue(0, 3) == "0, 5, 0, 0"
    guest.feed(send(50, 5))
    assert (guest.port(5), guest.queue(0, 3)) == ("P-L 0", "5, 5, 0, 1")


def test_binding_an_interdomain_port_sends_to_it() -> None:
    guest = Guest((0, "evtchn.bind", {"obj": 5, "tgt": 2, "flags": 1}), (0, "evtchn.bind", {"obj": 6, "flags": 2}))
    assert (guest.port(5), guest.queue(2), guest.port(6)) == ("P-L 0", "5, 5, 0, 1", "--- 0")
    assert Guest((0, "evtchn.bind", {"obj": 6}), send(10, 6)).queue() == "6, 6, 0, 1"


def test_no_control_block_no_link() -> None:
    guest = Guest(send(10, 5), init={"unmapped": [0]})
    assert (guest.port(5), guest.queue(), guest.codes) == ("P-- 0", "0, 0, 0, 0", ["fifo-no-control-block"])
    (f,) = guest.found
    assert (f.t, f.vcpu, f.obj, f.val, f.t_first, f.expected) == (
        10, 0, 5, NIL, 10, "a control block before the first event",
    )  # fmt: skip
    guest.feed(send(20, 5))
    assert guest.codes == ["fifo-no-control-block"]
    guest.feed(ready(30, 0), send(40, 5))
    assert guest.port(5) == "P-L 0"
    assert Guest(head(5, 0), send(10, 5), init={"unmapped": [0]}).codes == []
    assert Guest(send(10, 5), init={"unmapped": [1]}).codes == []


# -- F2, F3: as recorded -----------------------------------------------------------------------------------------------


def test_events_leave_their_queue_one_by_one() -> None:
    guest = Guest(send(10, 5), send(20, 1), send(30, 6), on(100, "upcall", 0))
    guest.feed(on(110, "handled", 0, obj=5))
    assert (guest.port(5), guest.queue()) == ("?-- 0", "0, 6, 1, 1")  # its ack may not be recorded
    guest.feed(on(120, "clear", 0, obj=5))
    assert guest.port(5) == "--- 0"
    guest.feed(on(130, "handled", 0, obj=1))
    assert guest.queue() == "0, 6, 6, 1"
    guest.feed(on(140, "handled", 0, obj=6))
    assert guest.queue() == "0, 6, 0, 0"
    guest.feed(send(150, 5))
    assert guest.queue() == "5, 5, 0, 1"
    guest.feed(on(160, "handled", 0, obj=5))
    assert guest.port(5) == "P-- 0"  # of this port acks are recorded
    guest.feed(on(200, "upcall_end", 0))
    assert guest.queue() == "?, 5, 0, ?"
    guest.feed(send(210, 6))
    assert guest.queue() == "6, 6, 0, 1"
    assert guest.numbers == {"sends": 5, "handled": 4, "upcalls": 1, "pending": 2, "max_delivery_ns": 110}


def test_only_the_queue_of_the_port_moves_on() -> None:
    guest = Guest(init={"priority": {"6": 3}})
    guest.feed(send(10, 5), send(20, 6), on(100, "upcall", 0), on(110, "handled", 0, obj=6))
    assert (guest.queue(0, 3), guest.queue()) == ("0, 6, 0, 0", "5, 5, 0, 1")
    elsewhere = Guest(send(10, 5), send(20, 6), on(100, "handled", 0, obj=6))  # not the first of its queue
    assert elsewhere.queue() == "5, 6, 0, 0"


def test_spurious_upcalls_are_loops_that_dispatch_nothing() -> None:
    def spurious(*events: Event, known: bool = True) -> int:
        return Guest(*events, known=known).machine.spurious_upcalls

    loop = [on(10, "upcall", 0), on(30, "upcall_end", 0)]
    handled = on(20, "handled", 0, obj=5)
    assert spurious(*loop) == 1
    assert spurious(loop[0], handled, loop[1]) == 0
    assert spurious(loop[0], handled, loop[1], on(40, "upcall", 0), on(50, "upcall_end", 0)) == 1
    assert spurious(loop[1]) == 0  # nobody saw it begin
    assert spurious(consuming(10, 1), loop[1]) == 1
    assert spurious(loop[1], known=False) == 0
    assert spurious(loop[0], gap(15), loop[1]) == 0


def test_the_longest_delivery() -> None:
    def longest(*events: Event) -> int:
        return Guest(*events).machine.max_delivery_ns

    ack = [on(100, "handled", 0, obj=5), on(110, "clear", 0, obj=5)]
    assert longest(send(10, 5), *ack) == 90
    assert longest(send(10, 5), *ack, send(200, 5), on(220, "handled", 0, obj=5)) == 90
    assert longest(send(10, 5), send(60, 5), *ack) == 90
    assert longest(send(10, 5), *ack, on(300, "handled", 0, obj=5)) == 90  # not pending: nothing was delivered
    # Pending since it was first seen so, when nobody saw the send.
    assert longest(send(10, 5), *ack, word(200, 5, PENDING | LINKED), on(210, "handled", 0, obj=5)) == 90
    assert longest(word(200, 5, PENDING | LINKED), word(205, 5, PENDING | LINKED), on(250, "handled", 0, obj=5)) == 50


def test_closing_frees_the_port() -> None:
    guest = Guest(move(0, 5, 2), on(5, "mask", 0, obj=5), send(10, 5), (20, "evtchn.close", {"obj": 5}))
    assert (guest.port(5), guest.machine.domain(NONE).ports[5].notify_vcpu) == ("-M- 0", 0)
    assert guest.numbers == {"sends": 1, "closed_pending": 1}
    assert Guest((20, "evtchn.close", {"obj": 5})).numbers == {}
    told = Guest(word(0, 5, PENDING), (5_000, "evtchn.close", {"obj": 5})).end(50 * US)
    assert told.codes == []


# -- what is not known (U1..U4) ----------------------------------------------------------------------------------------


def test_at_an_unknown_start_nothing_is_known() -> None:
    guest = Guest((0, "evtchn.clear", {"obj": 6}), known=False)
    assert (guest.port(6), guest.queue()) == ("-?? ?", "?, ?, ?, ?")
    guest.feed(word(10, 5, PENDING | LINKED | 6), head(10, 5), ready(10, Q7 | 1 << 3))
    assert (guest.port(5), guest.queue(), guest.queue(0, 3)) == ("P-L 6", "5, ?, ?, 1", "?, ?, ?, 1")
    guest.feed(word(20, 5, MASKED))
    assert guest.port(5) == "-M- 0"
    guest.feed(head(30, 6, queue=0), head(30, 6, queue=QUEUES), head(30, 6, queue=-2), head(30, NIL), ready(30, NIL))
    assert len(guest.machine.domain(NONE).vcpu(0).head) == 16
    assert (guest.queue(0, 0), guest.queue(), guest.queue(0, 3)) == ("6, ?, ?, 0", "5, ?, ?, 1", "?, ?, ?, 1")
    guest.feed(word(30, 5, NIL))
    assert guest.port(5) == "-M- 0"


def test_behind_an_unknown_tail() -> None:
    """The queue may have been empty: then this is its head, and a clear ready bit is set now."""
    guest = Guest(word(0, 5, PENDING | LINKED), head(0, 5), ready(0, 0), send(10, 6))
    assert (guest.port(6), guest.queue(), guest.queue(0, 3)) == ("P-L 0", "?, 6, 0, ?", "0, 0, 0, 0")
    set_already = Guest(word(0, 5, PENDING | LINKED), head(0, 5), ready(0, Q7), send(10, 6))
    assert set_already.queue() == "?, 6, 0, 1"
    again = Guest(send(0, 5), gap(5), head(5, 5), ready(5, 0), move(5, 6, 0), word(5, 6, 0), send(10, 6))
    assert (again.port(5), again.queue()) == ("??? ?", "?, 6, ?, ?")


def test_behind_a_tail_that_may_have_been_consumed() -> None:
    guest = Guest(send(0, 5), on(10, "upcall", 0), on(20, "handled", 0, obj=5), on(30, "mask", 0, obj=5))
    guest.feed(on(40, "unmask", 0, obj=5))  # pending, perhaps: then it is linked again
    assert (guest.port(5), guest.queue()) == ("?-? ?", "?, ?, 0, ?")
    guest.feed(head(45, 3), ready(45, 0), send(50, 5))
    assert (guest.port(5), guest.queue()) == ("P-L ?", "?, ?, 0, ?")
    guest.feed(on(60, "unmask", 0, obj=6), send(70, 6))
    assert (guest.port(6), guest.queue()) == ("P-L 0", "?, 6, 0, ?")
    tail = Guest(send(0, 5), send(1, 6), on(10, "upcall", 0), on(20, "handled", 0, obj=6), move(25, 6, 1))
    tail.feed(on(40, "unmask", 0, obj=6))
    assert (tail.port(6), tail.queue(), tail.queue(1)) == ("?-? ?", "5, 6, 0, 0", "?, ?, 0, ?")
    tail.feed(send(50, 8))  # 6 is linked still if it was not relinked: behind it, or the first
    assert (tail.port(8), tail.queue()) == ("P-L 0", "?, 8, 0, ?")


def test_linked_already_an_unmask_changes_nothing() -> None:
    guest = Guest(send(0, 5), (10, "evtchn.clear", {"obj": 5}), gap(20), word(30, 5, PENDING | LINKED), head(30, 5))
    guest.feed(ready(30, 0), move(40, 5, 0), on(40, "unmask", 0, obj=5))
    assert (guest.port(5), guest.queue()) == ("P-L 0", "5, ?, ?, 0")
    perhaps = Guest(word(0, 5, LINKED), head(0, 5), ready(0, Q7), on(10, "handled", 0, obj=5), word(20, 5, LINKED))
    assert perhaps.port(5) == "--L 0"
    kept = Guest(send(0, 5), on(10, "handled", 0, obj=6), on(20, "handled", 0, obj=5), send(30, 5))
    kept.feed(on(40, "handled", 0, obj=5), on(50, "unmask", 0, obj=5))
    assert kept.port(5) == "?-? ?"


def test_a_send_to_a_port_whose_mask_is_not_known_may_link_it() -> None:
    guest = Guest(known=False).feed(move(0, 5, 0), ready(0, 0), head(0, 0), send(10, 5))
    assert (guest.port(5), guest.queue()) == ("P?? ?", "?, ?, ?, ?")
    handled = Guest(known=False).feed(move(0, 5, 0), on(5, "handled", 0, obj=5))
    assert handled.port(5) == "??- 0"
    assert handled.feed(send(10, 5)).port(5) == "P?? ?"
    linked = Guest(known=False).feed(move(0, 5, 0), ready(0, 0), head(0, 3))
    linked.machine.domain(NONE).port(5).linked = 1
    linked.feed(send(10, 5))
    assert (linked.port(5), linked.queue()) == ("P?L ?", "3, ?, ?, 0")


def test_a_port_of_an_unknown_vcpu_may_be_on_any_queue() -> None:
    guest = Guest(send(0, 5), on(0, "upcall_mask", 1), move(5, 6), send(10, 6))
    assert guest.port(6) == "P-L ?"
    assert [guest.queue(v, q) for v in (0, 1, 2) for q in (0, 7)] == [
        "?, ?, 0, ?", "?, ?, 0, 1", "?, ?, 0, ?", "?, ?, 0, ?", "?, ?, ?, ?", "?, ?, ?, ?",
    ]  # fmt: skip


def test_a_gap_forgets_words_queues_and_bindings() -> None:
    guest = Guest(move(0, 5, 1), send(10, 5), gap(20))
    assert (guest.port(5), guest.queue(1), guest.queue(1, 0)) == ("??? ?", "?, ?, ?, ?", "?, ?, ?, ?")
    port = guest.machine.domain(NONE).ports[5]
    assert (port.notify_vcpu, port.last_vcpu) == (NONE, NONE)
    guest.feed((30, "evtchn.clear", {"obj": 9}), (30, "evtchn.clear", {"obj": 9, "dom": 4}))
    assert guest.port(9) == "-?? ?"
    assert guest.machine.domains[4].ports[9].linked == UNKNOWN


# -- codes -------------------------------------------------------------------------------------------------------------

UNLINKED = "fifo-pending-unlinked"
UNREACHABLE = "fifo-linked-unreachable"
CYCLE = "fifo-queue-cycle"
READY_LOST = "fifo-ready-lost"


def test_pending_unlinked_is_told_once_in_a_pending_life() -> None:
    guest = Guest(word(5, 5, PENDING), word(200, 5, PENDING), word(250, 6, 0), check(300)).end(90 * US)
    (f,) = guest.found
    assert (f.code.name, f.t, f.t_first, f.vcpu, f.obj, f.seq) == (UNLINKED, 300, 5, 0, 5, 3)
    twice = Guest(word(0, 5, PENDING), word(20 * US, 5, 0), word(30 * US, 5, PENDING)).end(90 * US)
    assert [(f.t, f.t_first) for f in twice.found] == [(10 * US, 0), (40 * US, 30 * US)]
    cleared = Guest(word(0, 5, PENDING), (20 * US, "evtchn.clear", {"obj": 5}), word(30 * US, 5, PENDING)).end(90 * US)
    assert [f.t for f in cleared.found] == [10 * US, 40 * US]
    lost = Guest(word(0, 5, PENDING), gap(20 * US), word(30 * US, 5, PENDING)).end(90 * US)
    assert [f.t for f in lost.found] == [10 * US, 40 * US]
    masked = Guest(word(0, 5, PENDING), on(20 * US, "mask", 0, obj=5), on(21 * US, "unmask", 0, obj=5))
    assert masked.end(90 * US).codes == [UNLINKED]  # the same life; and the unmask links it


@pytest.mark.parametrize(
    "between",
    [
        word(5_000, 5, 0), word(5_000, 5, PENDING | MASKED), on(5_000, "mask", 0, obj=5), gap(5_000),
        (5_000, "evtchn.clear", {"obj": 5}), (5_000, "evtchn.close", {"obj": 5}), send(5_000, 5),
        on(5_000, "handled", 0, obj=5),
    ],
    ids=lambda event: event[1],
)  # fmt: skip
def test_pending_unlinked_needs_its_time(between: Event) -> None:
    assert Guest(word(0, 5, PENDING), between).end(9_000_000).codes == []
    assert Guest(word(0, 5, PENDING), between, check(6_000)).codes == []
    late = Guest(word(0, 5, PENDING), between, word(7_000, 5, PENDING)).end(90 * US)
    assert [(f.t, f.t_first) for f in late.found if f.code.name == UNLINKED] == [(17_000, 7_000)]


def test_pending_unlinked_not_while_its_vcpu_handles_it() -> None:
    acked = [send(0, 5), on(10, "upcall", 0), on(20, "handled", 0, obj=5), on(30, "clear", 0, obj=5)]
    assert Guest(*acked, word(100, 5, PENDING)).end(90 * US).codes == []
    assert Guest(*acked, on(50, "upcall_end", 0), word(100, 5, PENDING)).end(90 * US).codes == [UNLINKED]
    assert Guest(*acked, gap(50), word(100, 5, PENDING)).end(90 * US).codes == []  # some vCPU may be at it
    assert Guest(on(0, "clear", 0, obj=5), word(100, 5, PENDING)).end(90 * US).codes == [UNLINKED]
    handled_only = acked[:3]  # whether it was acked is not known
    assert Guest(*handled_only, word(100, 5, PENDING)).end(90 * US).codes == [UNLINKED]
    unmapped = Guest(send(0, 5), init={"unmapped": [0]}).end(90 * US)
    assert unmapped.codes == ["fifo-no-control-block", UNLINKED]
    allowed = [on(0, "mask", 0, obj=5), send(5, 5), on(30, "unmask", 0, obj=5)]
    found = Guest(*allowed, init={"unmapped": [0]}).end(90 * US).found
    assert [(f.code.name, f.t, f.t_first) for f in found] == [
        ("fifo-no-control-block", 30, 30), (UNLINKED, 10_030, 30),
    ]  # fmt: skip


def test_lost_queue_change_after_three_attempts() -> None:
    moves = [move(t, 5, t) for t in (1, 2, 3)]
    guest = Guest(*moves, word(10, 5, PENDING)).end(90 * US)
    assert [(f.code.name, f.val, f.t_first) for f in guest.found] == [
        (UNLINKED, NIL, 10), ("fifo-lost-queue-change", 3, 10),
    ]  # fmt: skip
    assert Guest(*moves[1:], word(10, 5, PENDING)).end(90 * US).codes == [UNLINKED]
    assert Guest(move(1, 5, 1), move(2, 5, 2), move(3, 5, 2), word(10, 5, PENDING)).end(90 * US).codes == [UNLINKED]
    assert Guest(*moves, gap(5), word(10, 5, PENDING)).end(90 * US).codes == [UNLINKED]
    assert Guest(on(0, "mask", 0, obj=5), gap(0), *moves[1:], word(10, 5, PENDING)).end(90 * US).codes == [UNLINKED]
    linked = [*moves, send(4, 5), word(10, 5, PENDING)]
    assert Guest(*linked).end(90 * US).codes == [UNLINKED]
    assert Guest(*linked[:4], move(5, 5, 1), move(6, 5, 2), linked[4]).end(90 * US).codes == [UNLINKED]


CHAIN = [word(0, 5, PENDING | LINKED | 6), word(0, 6, PENDING | LINKED), head(0, 5), ready(0, Q7)]
LONE = word(0, 8, PENDING | LINKED)


def test_unreachable_ports_are_told_when_all_queues_are_known() -> None:
    assert Guest(*CHAIN, check(1)).codes == []
    (f,) = Guest(*CHAIN, LONE, check(1)).found
    assert (f.code.name, f.t, f.vcpu, f.obj, f.val, f.t_first) == (UNREACHABLE, 1, NONE, 8, NIL, 1)
    assert (f.expected, f.observed) == ("LINKED means on some queue", "LINKED, and on no queue")
    assert Guest(*CHAIN, LONE, consuming(0, 1), check(1)).codes == []  # some may be in the guest's hands
    assert Guest(*CHAIN, LONE, consuming(0, 1), consuming(0, 0), check(1)).codes == [UNREACHABLE]
    assert Guest(LONE, check(1)).codes == []  # of no vCPU anything is known
    assert Guest(*CHAIN, LONE, on(0, "upcall", 1), check(1)).codes == []
    loop = [on(0, "upcall", 0), on(0, "upcall_end", 0)]
    assert Guest(*loop, LONE, check(1)).codes == []  # what the heads are now is not known
    own = Guest(send(0, 5), send(0, 6), send(0, 8), on(0, "handled", 0, obj=5), check(1))  # 6 and 8: the guest's own
    assert own.codes == []


def test_unreachable_needs_certain_ends_and_all_vcpus() -> None:
    assert Guest(*CHAIN, send(1, 8), head(2, 5), check(3)).codes == []  # appended, perhaps behind 6
    one = [word(0, 5, PENDING | LINKED), *CHAIN[2:]]
    assert Guest(*one, send(1, 8), head(2, 5), check(3)).codes == []
    # The end is read again: 8 is not behind it. LINK of 5 cannot have changed.
    assert Guest(*CHAIN, send(1, 8), head(2, 5), word(3, 6, PENDING | LINKED), check(4)).codes == [UNREACHABLE]
    behind = [send(1, 8), word(3, 6, PENDING | LINKED | 8), head(3, 5), ready(3, Q7)]
    assert Guest(*CHAIN, *behind, check(4)).codes == []
    assert [f.obj for f in Guest(*CHAIN, *behind, word(3, 9, LINKED), check(4)).found] == [9]
    assert Guest(*CHAIN, word(0, 6, PENDING | LINKED | 7), LONE, check(1)).codes == []  # 7 is LINKED, or is it?
    every = [head(1, 0, queue=q) for q in range(QUEUES)]
    empty = [on(0, "upcall", 0), on(0, "upcall_end", 0), *every, ready(1, 0), word(1, 8, LINKED), check(2)]
    assert Guest(*empty).codes == [UNREACHABLE]
    assert Guest(*empty, known=False).codes == []  # there may be a vCPU that nobody has named
    assert Guest(move(0, 9), send(0, 9), *empty).codes == []  # 9 may be on a queue of that one
    assert Guest(*CHAIN, send(1, 9), check(2), LONE, check(3)).codes == []


def test_what_is_wrong_has_to_last() -> None:
    guest = Guest(*CHAIN, LONE).end(19_999)
    assert guest.codes == []
    guest.end(90 * US)
    assert [(f.code.name, f.t, f.t_first) for f in guest.found] == [(UNREACHABLE, 20 * US, 10 * US)]
    assert Guest(*CHAIN, LONE, word(15 * US, 8, 0)).end(90 * US).codes == []
    back = Guest(*CHAIN, LONE, word(25 * US, 8, 0), word(50 * US, 8, LINKED)).end(190 * US)
    assert [(f.t, f.t_first) for f in back.found] == [(20 * US, 10 * US), (70 * US, 60 * US)]
    stays = Guest(*CHAIN, LONE, word(50 * US, 8, LINKED), check(55 * US)).end(190 * US)
    assert [f.t for f in stays.found] == [20 * US]
    away = Guest(*CHAIN, LONE, word(12 * US, 8, 0), word(18 * US, 8, LINKED)).end(190 * US)
    assert [f.t for f in away.found] == [20 * US]  # nobody looked in between
    # A gap: whatever was suspected before it has to last anew.
    lost = [word(0, 5, PENDING | LINKED), head(0, 5), ready(0, 0)]
    relearnt = [consuming(16 * US, 0), *((16 * US, kind, fields) for _, kind, fields in lost)]
    assert [f.t for f in Guest(*lost).end(90 * US).found] == [20 * US]
    assert [f.t for f in Guest(*lost, gap(15 * US), *relearnt).end(90 * US).found] == [30 * US]


def test_one_look_for_all_changes_until_then() -> None:
    guest = Guest(*(word(t, 5, 0) for t in range(50)), ready(60, 0))
    assert [entry[0] for entry in guest.machine.agenda.heap if entry[3] == EVALUATE] == [10 * US]
    guest.feed(word(30 * US, 5, 0))
    assert [entry[0] for entry in guest.machine.agenda.heap if entry[3] == EVALUATE] == [40 * US]
    assert Guest(*CHAIN, closed=True).machine.agenda.heap == []


def test_a_cycle_is_told_at_the_first_look() -> None:
    ring = [word(0, 5, PENDING | LINKED | 6), word(0, 6, PENDING | LINKED | 5), head(0, 5, vcpu=1), ready(0, Q7, 1)]
    (f,) = Guest(*ring).end(90 * US).found
    assert (f.code.name, f.t, f.vcpu, f.obj, f.val, f.t_first) == (CYCLE, 10 * US, 1, NONE, 7, 10 * US)
    itself = Guest(word(0, 5, PENDING | LINKED | 5), head(0, 5), ready(0, Q7), LONE, check(1))
    assert sorted(itself.codes) == [UNREACHABLE, CYCLE]  # a ring is known to its end
    torn = Guest(*ring, word(0, 6, 5), check(1))
    assert torn.codes == []


def test_ready_lost_counts_linked_events_only() -> None:
    chain = [word(0, 5, PENDING | LINKED), head(0, 5), ready(0, 0)]
    (f,) = Guest(*chain, check(1)).found
    assert (f.code.name, f.vcpu, f.obj, f.val) == (READY_LOST, 0, NONE, 7)
    assert Guest(*chain, ready(0, Q7), check(1)).codes == []
    first = [word(0, 1, PENDING | LINKED), head(0, 1), ready(0, 0), check(1)]
    assert Guest(*first).codes == [READY_LOST]
    later = Guest(*chain, ready(0, Q7), ready(50 * US, 0)).end(90 * US)
    assert [f.t for f in later.found] == [70 * US]
    assert Guest(*chain, ready(0, 1 << 8), check(1)).codes == [READY_LOST]
    assert Guest(*chain, ready(0, 1 << 16), check(1)).codes == [READY_LOST]
    assert Guest(head(0, 5), ready(0, 0), check(1), known=False).codes == []
    stale = [word(0, 5, 0), head(0, 5), ready(0, 0), consuming(0, 0), check(1)]  # guests leave the head as it was
    assert Guest(*stale).codes == []
    unknown = [head(0, 5), ready(0, 0), consuming(0, 0), check(1)]
    assert Guest(*unknown, known=False).codes == []
    assert Guest(*chain, consuming(0, 0), check(1), known=False).codes == [READY_LOST]
    own = Guest(send(0, 5), send(0, 6), ready(1, 0), on(1, "handled", 0, obj=5), check(1))
    assert own.codes == [READY_LOST]  # 6 is the guest's own head, and it is not consuming


def test_ready_lost_within_the_loop_is_no_loss() -> None:
    chain = [word(0, 5, PENDING | LINKED), head(0, 5), ready(0, 0)]
    assert Guest(*chain, on(0, "upcall", 0), check(1)).codes == []
    assert Guest(*chain, consuming(0, 2), check(1)).codes == []
    left = [on(0, "upcall", 0), on(0, "upcall_end", 0), head(0, 5), ready(0, 0), check(1)]
    assert Guest(chain[0], *left).codes == [READY_LOST]


def test_busy_is_told_once_when_it_lasts() -> None:
    (f,) = Guest(word(7, 5, BUSY | MASKED), word(50 * US, 5, BUSY | MASKED)).end(900 * US).found
    assert (f.code.name, f.t, f.t_first, f.obj) == ("fifo-busy-stuck", 100_007, 7, 5)
    again = [word(0, 5, BUSY | MASKED), word(60 * US, 5, MASKED), word(70 * US, 5, BUSY | MASKED)]
    assert [f.t for f in Guest(*again).end(900 * US).found] == [170 * US]
    assert Guest(word(0, 5, BUSY | MASKED), gap(50 * US)).end(900 * US).codes == []
    twice = [word(0, 5, BUSY | MASKED), word(0, 5, MASKED), word(0, 5, BUSY | MASKED)]
    assert len(Guest(*twice).end(900 * US).found) == 1
    more = [*again[:1], word(150 * US, 5, BUSY | MASKED), word(160 * US, 5, 0), word(200 * US, 5, BUSY | MASKED)]
    assert [f.t for f in Guest(*more).end(900 * US).found] == [100 * US, 300 * US]


def test_priority_inversion_names_the_queue_that_should_have_come_first() -> None:
    base = [send(0, 5), on(10, "upcall", 0)]
    handled = on(30, "handled", 0, obj=5)
    (f,) = Guest(*base, ready(20, Q7 | 1 << 4 | 1 << 2), handled).found
    assert (f.code.name, f.vcpu, f.obj, f.val, f.seq) == ("fifo-priority-inversion", 0, 5, 2, 3)
    assert (f.expected, f.observed) == ("queue 2 first", "dispatched from queue 7")
    (zero,) = Guest(*base, ready(20, 1), handled).found
    assert (zero.val, zero.expected) == (0, "queue 0 first")
    assert Guest(*base, ready(20, 1), handled).numbers["priority_inversions"] == 1
    assert Guest(*base, ready(20, Q7 | 1 << 8), handled).codes == []
    assert Guest(*base, ready(20, 1), on(25, "upcall_end", 0), handled).codes == []  # read anew by the next loop
    assert Guest(*base, ready(20, 1), gap(25), on(26, "upcall", 0), handled).codes == []
    assert Guest(send(0, 5), ready(10, 1, vcpu=1), on(30, "handled", 1, obj=5)).codes == []  # not from its queue
    urgent = Guest(send(0, 5), send(1, 6), *base[1:], on(20, "handled", 0, obj=5), init={"priority": {"6": 3}})
    assert urgent.codes == ["fifo-priority-inversion"]
    served = [send(0, 5), send(1, 6), *base[1:], on(20, "handled", 0, obj=6), on(25, "handled", 0, obj=5)]
    assert Guest(*served, init={"priority": {"6": 3}}).codes == []  # queue 3 was emptied first


def test_priority_inversion_while_the_urgent_queue_has_more() -> None:
    """Port 1 is left on queue 3 when 5 is dispatched from queue 7."""
    events = [send(0, 5), send(1, 6), send(2, 1), on(10, "upcall", 0), on(20, "handled", 0, obj=6)]
    guest = Guest(*events, init={"priority": {"6": 3, "1": 3}})
    assert guest.queue(0, 3) == "0, 1, 1, 1"
    guest.feed(on(30, "handled", 0, obj=5))
    assert [(f.code.name, f.val) for f in guest.found] == [("fifo-priority-inversion", 3)]


def test_delivery_from_the_old_queue() -> None:
    """F4: allowed, and told once."""
    code = "fifo-old-queue-delivery"
    moved = [send(0, 5), move(10, 5, 1), on(20, "upcall", 0), on(30, "handled", 0, obj=5)]
    (f,) = Guest(*moved).found
    assert (f.code.name, f.vcpu, f.obj, f.tgt, f.observed) == (code, 0, 5, 1, "queue 7 of vcpu0")
    assert Guest(*moved, on(40, "handled", 0, obj=5)).codes == [code]
    assert Guest(*moved[:2], move(15, 5, 0), *moved[2:]).codes == []  # and back
    assert Guest(send(0, 5), move(10, 5, 1), on(30, "handled", 1, obj=5)).codes == []
    assert Guest(move(0, 5, 1), on(30, "handled", 0, obj=5)).codes == []  # nobody saw it linked
    relinked = [word(40, 5, 0), send(50, 5), on(60, "handled", 0, obj=5)]
    assert Guest(send(0, 5), move(10, 5, 1), *relinked).codes == []
    bound = [(0, "evtchn.bind", {"obj": 5, "tgt": 1}), on(30, "handled", 0, obj=5)]
    assert Guest(*bound).codes == []
    assert Guest(send(0, 5), *bound).codes == [code]
    unknown = [on(0, "clear", 0, obj=5), move(0, 5, 1), word(10, 5, PENDING | LINKED), on(30, "handled", 0, obj=5)]
    assert Guest(*unknown, known=False).codes == []


# -- the rest ----------------------------------------------------------------------------------------------------------


def test_ports_out_of_range() -> None:
    guest = Guest(send(0, PORTS), send(1, PORTS), send(2, 1 << 20, dom=1), send(3, 0), send(3, NONE), send(4, 1))
    assert [(f.code.name, f.t, f.dom, f.obj, f.val, f.expected, f.seq) for f in guest.found] == [
        ("evtchn-port-range", 0, NONE, PORTS, PORTS, f"a port below {PORTS}", 0),
        ("evtchn-port-range", 2, 1, 1 << 20, PORTS, f"a port below {PORTS}", 2),
    ]
    assert guest.numbers == {"sends": 1, "pending": 1}
    assert Guest(send(0, PORTS - 1)).numbers == {"sends": 1, "pending": 1}


def test_ports_out_of_range_are_remembered_up_to_a_limit() -> None:
    guest = Guest(*(send(0, PORTS + n) for n in range(10_001)))
    assert len(guest.machine.domain(NONE).reported) == 10_000


def test_events_without_a_vcpu_are_left_out() -> None:
    guest = Guest(*(on(0, kind, NONE) for kind in ("upcall", "upcall_end", "upcall_mask", "upcall_unmask")))
    guest.feed(on(0, "handled", NONE, obj=5), head(0, 5, vcpu=NONE), ready(0, 1, vcpu=NONE), consuming(0, 1, NONE))
    assert (guest.numbers, guest.machine.domain(NONE).vcpus) == ({}, {})
    first = Guest(on(0, "upcall", 0), on(1, "upcall_end", 0))
    assert first.numbers == {"upcalls": 1, "spurious_upcalls": 1}


def test_a_gap_taints_from_where_it_began() -> None:
    events = [word(0, 5, PENDING), check(2_000)]
    for lost, severity in (({"val": 1_000}, "info"), ({"val": 2_001}, "error"), ({}, "error")):
        guest = Guest(*events, (3_000, "trace.lost", lost))
        assert [(f.t, f.severity) for f in guest.found] == [(2_000, severity)]


def closed(*events: Event, **more: Any) -> Guest:
    return Guest(*events, closed=True, **more).end(900 * US)


def test_what_recordings_say_is_left_out_of_closed_runs() -> None:
    said: Sequence[Event] = [
        on(10, "upcall", 0), on(20, "handled", 0, obj=5), on(20, "clear", 0, obj=5), word(30, 5, BUSY | PENDING),
        head(30, 6), ready(30, 1), on(40, "upcall_end", 0), gap(45), consuming(47, 1),
    ]  # fmt: skip
    guest = Guest(send(0, 5), *said, closed=True)
    assert (guest.port(5), guest.queue()) == ("P-L 0", "5, 5, 0, 1")
    guest.end(900 * US)
    assert (guest.numbers, guest.codes) == (
        {"sends": 1, "handled": 1, "upcalls": 1, "notifications": 1, "max_queue_length": 1, "max_delivery_ns": 100},
        [],
    )


def test_closed_runs_take_queues_in_the_order_of_priority() -> None:
    priority = {"5": 9, "6": 2, "1": 0, "8": 15}
    events = [on(0, "upcall_mask", 0), *(send(10 + p, p) for p in (8, 5, 6, 9, 1)), on(100, "upcall_unmask", 0)]
    guest = closed(*events, init={"priority": priority, "dom": 1})
    assert guest.machine.domains[1].ports[5].priority == 9
    of_one = [(t, kind, {**fields, "dom": 1}) for t, kind, fields in events]
    served = closed(*of_one, init={"priority": priority, "dom": 1}).machine.effects
    assert [(t, what >> 48, what >> 32 & 0xFFFF, what & 0xFFFFFFFF) for t, what in served] == [
        (200, 1, 0, port) for port in (1, 6, 9, 5, 8)
    ]


def test_closed_runs_scan_only_what_is_pending_and_notified() -> None:
    off, allow = on(0, "upcall_mask", 0), on(1_000, "upcall_unmask", 0)
    assert closed(off, send(10, 5)).numbers == {"sends": 1, "pending": 1, "max_queue_length": 1}
    assert closed(off, allow).numbers == {}
    masked = closed(send(10, 5), on(50, "upcall_mask", 0), on(500, "upcall_unmask", 0))
    assert masked.numbers == {
        "sends": 1, "handled": 1, "upcalls": 1, "notifications": 2, "max_queue_length": 1, "max_delivery_ns": 590,
    }  # fmt: skip
    between = closed(send(10, 5), on(50, "upcall_mask", 0), on(60, "upcall_unmask", 0))  # two notifications, one loop
    assert between.numbers["upcalls"] == 1
    freed = closed(send(10, 5), (50, "evtchn.close", {"obj": 5}))  # still LINKED
    assert freed.numbers == {
        "sends": 1, "closed_pending": 1, "upcalls": 1, "spurious_upcalls": 1, "notifications": 1, "max_queue_length": 1,
    }  # fmt: skip
    again = closed(send(10, 5), send(200, 5), send(400, 6))
    assert again.numbers == {
        "sends": 3, "handled": 3, "upcalls": 3, "notifications": 3, "max_queue_length": 1, "max_delivery_ns": 100,
    }  # fmt: skip
    assert (again.port(5), again.queue(0, 0)) == ("--- 0", "0, 0, 0, 0")


def test_a_closed_run_knows_where_every_port_is() -> None:
    """A request that does not say where to changes nothing."""
    guest = closed(move(0, 5), send(10, 5), (20, "evtchn.rebind", {"obj": 5}), send(200, 5))
    assert (guest.numbers["handled"], guest.queue()) == (2, "0, 5, 0, 0")


def test_closed_runs_tell_of_unmapped_vcpus_in_every_life() -> None:
    guest = closed(move(0, 5, 1), send(10, 5), move(20 * US, 5, 0), send(21 * US, 5), move(40 * US, 5, 1),
                   send(50 * US, 5), init={"unmapped": [1]})  # fmt: skip
    assert [f.t for f in guest.found if f.code.name == UNLINKED] == [10_010, 60 * US]


def test_looks_in_closed_runs_are_asked_for() -> None:
    held = [on(0, "upcall_mask", 0), send(10, 5), send(10, 6)]
    assert closed(*held, check(20), check(900)).codes == []
    moved = closed(send(10, 5), move(300, 5, 1), on(350, "upcall_mask", 1), send(400, 5), check(500))
    assert moved.codes == []  # the old head was consumed
