"""State of the virtual GIC (spec S3.1): Xen's struct pending_irq and the list registers of each vcpu.

The same classes serve predicted state, where everything is known, and recorded state, where a flag may be UNKNOWN,
a vcpu or cpu NONE or NOWHERE_KNOWN, and a list register may have unknown contents.
"""

from __future__ import annotations

from typing import Final

from replay.events import NIL, NONE
from replay.hardware.gic_list_registers import NO_LR, ListRegisters
from replay.knowledge import UNKNOWN

__all__ = ["NOWHERE_KNOWN", "Irq", "Vcpu", "enqueue"]

#: "On some vcpu, in some list register, or on none": nobody saw it.
NOWHERE_KNOWN: Final = -2

DEFAULT_PRIORITY: Final = 0xA0


class Irq:
    """One interrupt of a guest (struct pending_irq and the physical side of its irq_desc). Times are ns."""

    __slots__ = (
        "disturbed", "dom", "edit", "enabled", "foreign", "gen", "id", "inflight_on", "leak_since", "lr",
        "lr_pending_on", "migrate_from", "migrating", "migrating_since", "mismatch_since", "moved", "obj", "p_active",
        "p_affinity", "p_latch", "priority", "queued", "queued_since", "raised_at", "soft", "stranded_since",
        "target", "waiting_since", "wrote", "wrote_seq",
    )  # fmt: skip

    def __init__(self, index: int, obj: int, dom: int, *, known: bool) -> None:
        self.id: int = index  # position in the machine's list
        self.obj: int = obj
        self.dom: int = dom
        self.gen: int = 0  # of time-outs
        self.reset(known=known)

    def reset(self, *, known: bool) -> None:
        """The initial state (the machine sets the target), or nothing known at all (U1, U2)."""
        flag = 0 if known else UNKNOWN
        place = NO_LR if known else NOWHERE_KNOWN
        # status word
        self.enabled: int = 1 if known else UNKNOWN
        self.queued: int = flag
        self.migrating: int = flag
        self.priority: int = DEFAULT_PRIORITY
        # places: a list register index, the vcpu whose list the node is on
        self.lr: int = place
        self.inflight_on: int = place
        self.lr_pending_on: int = place
        self.migrate_from: int = NONE  # patch-v8 only
        self.soft: bool = False  # its list register was edited to HW=0: the guest's EOI does not deactivate
        self.edit: bool = False  # an edit of the live list register waits for its vcpu's next entry
        #: effective target (lowest set bit of ITARGETSR) as a vcpu, and when the last write took effect
        self.target: int = NONE
        self.wrote: int = NIL
        self.wrote_seq: int = NONE
        # the physical interrupt
        self.p_active: int = flag
        self.p_latch: int = flag
        self.p_affinity: int = 0 if known else NONE
        # what monitors and metrics remember
        self.raised_at: int = NIL  # physically active since
        self.waiting_since: int = NIL  # arrived, not yet acknowledged by the guest
        self.queued_since: int = NIL
        self.migrating_since: int = NIL
        self.mismatch_since: int = NIL
        self.leak_since: int = NIL
        self.stranded_since: int = NIL
        self.disturbed: bool = False  # QUEUED or written again while MIGRATING
        self.moved: bool = False  # a migration finished, nothing acknowledged since
        self.foreign: bool = False


class Vcpu:
    """One vcpu: its list registers, its lr_pending and inflight lists, and the pcpu it runs on (NONE: none)."""

    __slots__ = (
        "dom", "id", "inflight", "invalid_since", "kicks", "loaded", "loaded_seq", "lr_pending", "lrs", "number",
        "owner", "running_on", "serial", "waiting",
    )  # fmt: skip

    def __init__(self, index: int, dom: int, number: int, nr_lrs: int, running_on: int) -> None:
        self.id: int = index  # position in the machine's list
        self.dom: int = dom
        self.number: int = number
        self.running_on: int = running_on
        self.lrs: ListRegisters = ListRegisters(nr_lrs)
        self.owner: list[Irq | None] = [None] * nr_lrs
        self.loaded: list[int] = [NIL] * nr_lrs  # ns
        self.loaded_seq: list[int] = [NONE] * nr_lrs
        self.invalid_since: list[int] = [NIL] * nr_lrs  # guest's EOI, until the next entry
        self.serial: list[int] = [0] * nr_lrs  # a new one when its content goes (predicted state only)
        self.lr_pending: list[Irq] = []
        self.inflight: list[Irq] = []
        self.kicks: int = 0  # sent to it, not yet taken; UNKNOWN where the recording does not tell
        self.waiting: list[tuple[int, int, int]] = []  # guest's acts that wait for it to run: action, LR, serial

    def grow(self, lr: int) -> None:
        """Make room for a list register index."""
        while len(self.owner) <= lr:
            self.lrs.words.append(0)
            self.owner.append(None)
            self.loaded.append(NIL)
            self.loaded_seq.append(NONE)
            self.invalid_since.append(NIL)

    def free_lr(self) -> int:
        """Lowest list register that holds nothing, -1 without one. An invalid but VISIBLE one is in use."""
        for index, irq in enumerate(self.owner):
            if irq is None:
                return index
        return -1


def enqueue(queue: list[Irq], irq: Irq) -> None:
    """Insert by priority (lower value first), behind its equals: gic_add_to_lr_pending, vgic_vcpu_inject_irq."""
    index = len(queue)
    while index > 0 and queue[index - 1].priority > irq.priority:
        index -= 1
    queue.insert(index, irq)
