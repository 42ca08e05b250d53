"""Two-level event channels: the bits that hypervisor and guest share (spec S5.1).

Xen public/xen.h: `shared_info.evtchn_pending[]`, `evtchn_mask[]`, `vcpu_info.evtchn_pending_sel`,
`evtchn_upcall_pending`, `evtchn_upcall_mask`. A word has B bits, B being the guest's `unsigned long`; a selector has
one bit for each word, hence B * B ports.

Only storage and single-bit operations live here; who does what in which order (E1..E6) is the machine's business.
"""

from __future__ import annotations

from typing import Final

from replay.compiled import mypyc_attr
from replay.events import INF, NIL, NONE
from replay.knowledge import UNKNOWN, Bits

__all__ = [
    "ABI_FIFO",
    "ABI_TWO_LEVEL",
    "SNAP_ABI",
    "SNAP_GUEST_CPU",
    "SNAP_MASK",
    "SNAP_NOTIFY_VCPU",
    "SNAP_PENDING",
    "SNAP_SEL",
    "SNAP_UPCALL_MASK",
    "SNAP_UPCALL_PENDING",
    "TYPE_INTERDOMAIN",
    "TYPE_IPI",
    "TYPE_PIRQ",
    "TYPE_UNBOUND",
    "TYPE_VIRQ",
    "Channel",
    "PortBits",
    "TwoLevelDomain",
    "VcpuInfo",
]

#: `obj` of an `evtchn.snapshot`: which word was read. `tgt` is the word's index (pending, mask) or the port
#: (bindings); `vcpu` says whose selector or upcall byte it is; `val` is the word.
SNAP_PENDING: Final = 0
SNAP_MASK: Final = 1
SNAP_SEL: Final = 2
SNAP_UPCALL_PENDING: Final = 3
SNAP_UPCALL_MASK: Final = 4
SNAP_ABI: Final = 5
SNAP_NOTIFY_VCPU: Final = 6
SNAP_GUEST_CPU: Final = 7

#: `val` of a SNAP_ABI snapshot.
ABI_TWO_LEVEL: Final = 0
ABI_FIFO: Final = 1

#: `val` of an `evtchn.bind`: Xen's EVTCHNSTAT_* numbers.
TYPE_UNBOUND: Final = 1
TYPE_INTERDOMAIN: Final = 2
TYPE_PIRQ: Final = 3
TYPE_VIRQ: Final = 4
TYPE_IPI: Final = 5


@mypyc_attr(allow_interpreted_subclasses=True)
class PortBits:
    """The two bits of one port, each 0, 1 or UNKNOWN. Both the event-channel and the irq-flow machine build on it."""

    __slots__ = ("masked", "pending")

    def __init__(self, pending: int, masked: int) -> None:
        self.pending: int = pending
        self.masked: int = masked

    def post(self) -> int:
        """test_and_set of the pending bit; returns what it was."""
        old = self.pending
        self.pending = 1
        return old

    def is_ready(self) -> bool:
        """Definitely pending and definitely not masked."""
        return self.pending == 1 and self.masked == 0


class Channel(PortBits):
    """One port: shared bits, both bindings, and what the checks remember of its present life.

    `notify_vcpu` is the hypervisor's binding, `guest_cpu` the guest's (`cpu_evtchn_mask`); NONE is unknown.
    """

    __slots__ = (
        "bound_t",
        "clears",
        "delay_reported",
        "generation",
        "guest_cpu",
        "hypercall_t",
        "mask_reported",
        "mask_t",
        "mismatch_gen",
        "noop",
        "notify_vcpu",
        "number",
        "pend_seq",
        "pend_t",
        "seen_t",
        "select_seq",
        "select_t",
        "select_vcpu",
        "selector_bit",
        "since",
        "strand_reported",
        "trouble",
        "unmask_seq",
        "unmask_t",
        "unmask_vcpu",
        "word",
        "word_bit",
    )  # fmt: skip

    def __init__(self, number: int, bits: int, pending: int, masked: int, vcpu: int) -> None:
        super().__init__(pending, masked)
        self.number: int = number
        self.word: int = number // bits
        self.word_bit: int = 1 << (number % bits)
        self.selector_bit: int = 1 << self.word
        self.notify_vcpu: int = vcpu
        self.guest_cpu: int = vcpu
        self.clears: bool = False  # whether the handler's ack of this port is recorded
        self.pend_t: int = NIL  # when pending became (known to be) 1
        self.pend_seq: int = NONE
        self.mask_t: int = NIL
        self.bound_t: int = NIL
        self.unmask_t: int = NIL
        self.unmask_seq: int = NONE
        self.unmask_vcpu: int = NONE
        self.hypercall_t: int = NIL  # a hypercall that the policy predicts and whose record may follow
        self.noop: bool = False  # the unmask hypercall found nothing to do
        self.select_t: int = NIL
        self.select_seq: int = NONE
        self.select_vcpu: int = NONE
        self.since: int = INF  # the stranded predicate holds since
        self.seen_t: int = NIL  # a snapshot showed it stranded
        self.generation: int = 0
        self.mismatch_gen: int = 0
        self.strand_reported: bool = False
        self.delay_reported: bool = False
        self.mask_reported: bool = False
        self.trouble: bool = False  # any of the above, or `since` or `seen_t` is set


class VcpuInfo:
    """`vcpu_info` of one vCPU, and whether it is inside its upcall.

    A bit of `sel` counts only where `sel_known` has it too; the flags are 0, 1 or UNKNOWN.
    """

    __slots__ = (
        "block_gen", "dispatched", "in_upcall", "latched", "number", "run_t", "running", "sel", "sel_all",
        "sel_gen", "sel_known", "setter", "taken", "upcall_mask", "upcall_pending", "upcall_t",
    )  # fmt: skip

    def __init__(self, number: int, bits: int, known: bool) -> None:
        self.number: int = number
        self.sel_all: int = (1 << bits) - 1
        self.sel: int = 0
        self.sel_known: int = self.sel_all if known else 0
        self.upcall_pending: int = 0 if known else UNKNOWN
        self.upcall_mask: int = 0 if known else UNKNOWN
        self.in_upcall: int = 0 if known else UNKNOWN
        self.running: int = 1 if known else UNKNOWN
        self.run_t: int = 0
        self.setter: list[int] = [NONE] * bits  # port that turned the selector bit on
        self.taken: int = 0  # selector words the running scan exchanged
        self.latched: int = 0  # selector bits set since the running scan began
        self.dispatched: int = 0
        self.upcall_t: int = NIL
        self.sel_gen: int = 0
        self.block_gen: int = 0

    def sel_test(self, word: int) -> int:
        """0, 1 or UNKNOWN."""
        if not self.sel_known >> word & 1:
            return UNKNOWN
        return self.sel >> word & 1

    def sel_forget_zero(self, word: int) -> None:
        """The bit may have been set meanwhile: a known 1 stays, anything else is unknown."""
        bit = 1 << word
        if not self.sel & bit:
            self.sel_known &= ~bit
            if self.upcall_pending == 0:
                self.upcall_pending = UNKNOWN

    def forget(self) -> None:
        """Records were lost (U2)."""
        self.sel = 0
        self.sel_known = 0
        self.upcall_pending = UNKNOWN
        self.upcall_mask = UNKNOWN
        self.in_upcall = UNKNOWN
        self.running = UNKNOWN
        self.latched = 0
        self.block_gen += 1


class TwoLevelDomain:
    """One guest: its ports, its vCPUs and `ready`, the word-wise AND of known pending and known not masked.

    Ports that no event has named yet are described by `pending0`/`masked0` (the default, or the last snapshot).
    """

    __slots__ = (
        "bits", "channels", "ends_seen", "handled_seen", "id", "known", "limit", "masked0", "pending0", "ports",
        "range_reported", "ready", "sees_sends", "sees_upcalls", "slots", "unnamed", "vcpus",
    )  # fmt: skip

    def __init__(self, number: int, bits: int, known: bool) -> None:
        self.id: int = number
        self.bits: int = bits
        self.limit: int = bits * bits
        self.known: bool = known
        self.ports: list[Channel | None] = [None] * self.limit
        self.channels: list[Channel] = []
        self.vcpus: list[VcpuInfo] = []  # in order of appearance
        self.slots: list[VcpuInfo | None] = []  # by number
        self.unnamed: set[int] = set()  # words whose selector bit may be set on vCPUs that no event has named yet
        self.ready: list[int] = [0] * bits
        self.pending0: list[Bits] = [Bits(bits, known=known) for _ in range(bits)]
        self.masked0: list[Bits] = [Bits(bits, known=known) for _ in range(bits)]
        self.sees_sends: bool = True  # no pending bit has been found that nobody was seen to set
        self.sees_upcalls: bool = True
        self.handled_seen: bool = False
        self.ends_seen: bool = False
        self.range_reported: set[int] = set()

    def channel(self, port: int) -> Channel:
        """The port's record; 0 <= port < limit."""
        found = self.ports[port]
        if found is None:
            word, bit = divmod(port, self.bits)
            pending = self.pending0[word].test(bit)
            masked = self.masked0[word].test(bit)
            found = Channel(port, self.bits, pending, masked, 0 if self.known else NONE)
            self.ports[port] = found
            self.channels.append(found)
        return found

    def vcpu(self, number: int) -> VcpuInfo:
        """The vCPU's record; `number` is a u16."""
        slots = self.slots
        if number >= len(slots):
            slots.extend([None] * (number + 1 - len(slots)))
        found = slots[number]
        if found is None:
            found = VcpuInfo(number, self.bits, self.known)
            for word in self.unnamed:
                found.sel_forget_zero(word)
            slots[number] = found
            self.vcpus.append(found)
        return found

    def settle(self, channel: Channel) -> None:
        """Bring `ready` in line with the port's bits."""
        if channel.pending == 1 and channel.masked == 0:
            self.ready[channel.word] |= channel.word_bit
        else:
            self.ready[channel.word] &= ~channel.word_bit

    def forget(self) -> None:
        """Records were lost: bits, selectors and bindings may have changed (U2)."""
        self.known = False
        for word in range(self.bits):
            self.ready[word] = 0
            self.pending0[word].forget()
            self.masked0[word].forget()
        for channel in self.channels:
            channel.pending = UNKNOWN
            channel.masked = UNKNOWN
            channel.notify_vcpu = NONE
            channel.guest_cpu = NONE
            channel.pend_t = NIL
            channel.hypercall_t = NIL
            channel.since = INF
            channel.seen_t = NIL
            channel.mismatch_gen += 1
            channel.strand_reported = False
        for vcpu in self.vcpus:
            vcpu.forget()
