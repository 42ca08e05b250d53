"""The smallest loops that keep the LAPIC and two-level event-channel state of `bench.machines`' mixes, nothing else:
no unknown state, no rules, no evidence, no metrics, no agenda. What they need is what the interpreter needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from replay.events import KIND_ID

__all__ = ["CHANNEL_COLUMNS", "LAPIC_COLUMNS", "channels", "feed_only", "lapics"]

LAPIC_COLUMNS: Final = ("kind", "t_ns", "dom", "vcpu", "obj")
CHANNEL_COLUMNS: Final = ("kind", "t_ns", "dom", "vcpu", "obj", "tgt")

ACCEPT: Final = KIND_ID["lapic.accept"]
DELIVER: Final = KIND_ID["lapic.deliver"]
EOI: Final = KIND_ID["lapic.eoi"]

BIND: Final = KIND_ID["evtchn.bind"]
SEND: Final = KIND_ID["evtchn.send"]
UPCALL: Final = KIND_ID["evtchn.upcall"]
UPCALL_END: Final = KIND_ID["evtchn.upcall_end"]
MASK: Final = KIND_ID["evtchn.mask"]
UNMASK: Final = KIND_ID["evtchn.unmask"]
CLEAR: Final = KIND_ID["evtchn.clear"]


class Lapic:
    """IRR and ISR, and how many deliveries were impossible."""

    __slots__ = ("irr", "isr", "wrong")

    def __init__(self) -> None:
        self.irr: int = 0
        self.isr: int = 0
        self.wrong: int = 0


class Domain:
    """Pending, mask, selector words and upcall flags (32 words of 32 ports), and the vCPU of every port."""

    __slots__ = ("mask", "pending", "selector", "upcall", "vcpu_of")

    def __init__(self) -> None:
        self.pending: list[int] = [0] * 32
        self.mask: list[int] = [0] * 32
        self.selector: list[int] = [0] * 64
        self.upcall: list[int] = [0] * 64
        self.vcpu_of: list[int] = [0] * 1024


def feed_only(rows: Iterable[tuple[int, ...]]) -> int:
    """What rows cost when nothing is done with them."""
    n = 0
    for _ in rows:
        n += 1
    return n


def lapics(rows: Iterable[tuple[int, ...]]) -> int:
    """Request, delivery and EOI; returns the deliveries that IRR and ISR do not allow."""
    known: dict[int, Lapic] = {}
    for kind, _t, dom, vcpu, vector in rows:
        key = dom << 16 | vcpu
        lapic = known.get(key)
        if lapic is None:
            known[key] = lapic = Lapic()
        if kind == DELIVER:
            bit = 1 << vector
            if not lapic.irr & bit or lapic.isr >= bit:
                lapic.wrong += 1
            lapic.irr &= ~bit
            lapic.isr |= bit
        elif kind == ACCEPT:
            lapic.irr |= 1 << vector
        elif kind == EOI and lapic.isr:
            lapic.isr ^= 1 << (lapic.isr.bit_length() - 1)
    return sum(lapic.wrong for lapic in known.values())


def channels(rows: Iterable[tuple[int, ...]]) -> int:
    """Send, mask, unmask, upcall, clear; returns the ports that are pending at the end of an upcall of theirs."""
    known: dict[int, Domain] = {}
    wrong = 0
    for kind, _t, dom, vcpu, port, target in rows:
        d = known.get(dom)
        if d is None:
            known[dom] = d = Domain()
        word = port >> 5
        if kind == SEND:
            bit = 1 << (port & 31)
            if not d.pending[word] & bit:
                d.pending[word] |= bit
                if not d.mask[word] & bit:
                    v = d.vcpu_of[port]
                    d.selector[v] |= 1 << word
                    d.upcall[v] = 1
        elif kind == CLEAR:
            d.pending[word] &= ~(1 << (port & 31))
        elif kind == UPCALL:
            d.upcall[vcpu] = 0
            d.selector[vcpu] = 0
        elif kind == UPCALL_END:
            wrong += d.upcall[vcpu]
        elif kind == MASK:
            d.mask[word] |= 1 << (port & 31)
        elif kind == UNMASK:
            d.mask[word] &= ~(1 << (port & 31))
            if d.pending[word] >> (port & 31) & 1:
                v = d.vcpu_of[port]
                d.selector[v] |= 1 << word
                d.upcall[v] = 1
        elif kind == BIND:
            d.vcpu_of[port] = target
    return wrong
