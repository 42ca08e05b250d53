"""FIFO event channels: event words, queues, control blocks (spec S5.5).

Xen public/event_channel.h, EVTCHN_FIFO_*: one 32-bit word for each port, 16 queues by priority for each vCPU, each a
singly linked list through the LINK fields, with a shared head and the hypervisor's private tail.
"""

from __future__ import annotations

from typing import Final

from replay.events import INF, NIL, NONE
from replay.hardware.evtchn_two_level import PortBits
from replay.knowledge import UNKNOWN

__all__ = [
    "BUSY",
    "DEFAULT_PRIORITY",
    "LINKED",
    "LINK_MASK",
    "MASKED",
    "PENDING",
    "PORTS",
    "QUEUES",
    "FifoPort",
    "FifoVcpu",
    "walk",
]

PENDING: Final = 1 << 31
MASKED: Final = 1 << 30
LINKED: Final = 1 << 29
BUSY: Final = 1 << 28
LINK_BITS: Final = 17
LINK_MASK: Final = (1 << LINK_BITS) - 1
PORTS: Final = 1 << LINK_BITS
QUEUES: Final = 16
DEFAULT_PRIORITY: Final = 7


class FifoPort(PortBits):
    """One event word, field by field; LINK 0 ends a queue. Every field may be UNKNOWN."""

    __slots__ = (
        "busy_t", "changes", "clears", "last_vcpu", "link", "link_gen", "linked", "notify_vcpu", "number", "pend_t",
        "priority", "reported", "since",
    )  # fmt: skip

    def __init__(self, number: int, known: bool) -> None:
        blank = 0 if known else UNKNOWN
        super().__init__(blank, blank)
        self.number: int = number
        self.linked: int = blank
        self.link: int = blank
        self.link_gen: int = NONE  # generation of the domain's ends in which LINK was learnt
        self.notify_vcpu: int = 0 if known else NONE
        self.priority: int = DEFAULT_PRIORITY  # changes are not recorded
        self.last_vcpu: int = self.notify_vcpu  # on whose queue it was linked last (hypervisor)
        self.changes: int = 0  # queue changes since it was last linked
        self.clears: bool = False
        self.pend_t: int = NIL  # when PENDING became (known to be) 1
        self.since: int = INF  # pending, not masked, not linked since
        self.busy_t: int = INF  # BUSY since; NIL once that has been told
        self.reported: bool = False

    def set_word(self, word: int) -> None:
        """The whole event word was read; BUSY is left to the monitor."""
        self.pending = 1 if word & PENDING else 0
        self.masked = 1 if word & MASKED else 0
        self.linked = 1 if word & LINKED else 0
        self.link = word & LINK_MASK

    def unlink(self) -> int:
        """F2: (LINK, LINKED) := 0 atomically; returns the old LINK (Linux clear_linked)."""
        following = self.link
        self.link = 0
        self.linked = 0
        return following

    def forget(self) -> None:
        """Records were lost (U2)."""
        self.pending = self.masked = self.linked = self.link = UNKNOWN
        self.notify_vcpu = self.last_vcpu = NONE
        self.changes = 0
        self.since = self.busy_t = INF
        self.reported = False


class FifoVcpu:
    """A vCPU's control block: `head[q]` and `ready` are shared, `tail[q]` is the hypervisor's, `lhead[q]` the guest's.

    A head or tail is a port, 0 for none, UNKNOWN; a bit of `ready` counts where `ready_known` has it too. Upcalls are
    the model's own in closed runs; in recordings they are as recorded.
    """

    __slots__ = (
        "consuming", "dispatched", "head", "lhead", "mapped", "number", "ready", "ready_known", "tail",
        "upcall_mask", "upcall_pending",
    )  # fmt: skip

    def __init__(self, number: int, known: bool) -> None:
        blank = 0 if known else UNKNOWN
        self.number: int = number
        self.head: list[int] = [blank] * QUEUES
        self.lhead: list[int] = [blank] * QUEUES
        self.tail: list[int] = [blank] * QUEUES
        self.ready: int = 0
        self.ready_known: int = -1 if known else 0  # -1: all bits
        self.consuming: int = blank
        self.mapped: bool = True  # it has a control block
        self.upcall_pending: bool = False  # of closed runs only, as upcall_mask
        self.upcall_mask: int = 0
        self.dispatched: int = 0

    def ready_test(self, queue: int) -> int:
        """0, 1 or UNKNOWN."""
        if not self.ready_known >> queue & 1:
            return UNKNOWN
        return self.ready >> queue & 1

    def forget(self) -> None:
        """Records were lost (U2)."""
        for queue in range(QUEUES):
            self.head[queue] = self.lhead[queue] = self.tail[queue] = UNKNOWN
        self.ready_known = 0
        self.consuming = UNKNOWN


def walk(ports: dict[int, FifoPort], start: int, ends_gen: int) -> tuple[list[int], bool, bool]:
    """Follow LINK from port `start`: (LINKED ports met, for certain all there are, in a cycle).

    A head that is not LINKED was consumed and is left where it was: there the queue is empty. LINK 0 is an end for
    certain only if it was learnt in generation `ends_gen`: since then nothing was linked behind an unknown port.
    """
    met: dict[int, None] = {}
    at = start
    while at > 0:
        if at in met:
            return list(met), True, True
        port = ports.get(at)
        if port is None or port.linked == UNKNOWN:
            return list(met), False, False
        if port.linked == 0:
            break
        met[at] = None
        at = port.link
        if at == 0 and port.link_gen != ends_gen:
            return list(met), False, False
    return list(met), at >= 0, False
