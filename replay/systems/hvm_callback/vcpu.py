"""One vCPU of an HVM domain: its virtual LAPIC, and the injection that awaits its verdict (spec S2.1)."""

from __future__ import annotations

from replay.events import NIL
from replay.hardware.lapic import LocalApic
from replay.knowledge import UNKNOWN

__all__ = ["Vcpu"]


class Vcpu:
    """A vCPU: its virtual LAPIC, whether it runs, and what is remembered of its last callback injection.

    `injected_t` is NIL when no injection awaits its verdict. `ready_since` is the time from which it was running or
    runnable without a break (NIL: it is not, or that is unknown); `ahead_t` that of a handler seen before it.
    """

    __slots__ = (
        "after_eoi", "ahead_t", "begun", "blocked", "entries_since_eoi", "flag_at_injection", "injected_conf",
        "injected_seq", "injected_t", "lapic", "last_entry_t", "number", "offline", "others_at_injection",
        "reads_at_injection", "ready_since", "repeated", "running", "sets_at_injection", "work",
    )  # fmt: skip

    def __init__(self, number: int, *, known: bool) -> None:
        self.number = number
        self.lapic = LocalApic(known=known)
        self.running = 1 if known else UNKNOWN
        self.ready_since = 0 if known else NIL
        self.offline = 0 if known else UNKNOWN
        self.blocked = False  # what-if: it waits for an interrupt
        self.entries_since_eoi = 1
        self.last_entry_t = NIL
        self.ahead_t = NIL
        self.work = 0
        self.repeated = False  # the last injection came right at the EOI of the one before
        self.injected_t = NIL
        # Of the injection that awaits its verdict: written and read with `injected_t`.
        self.injected_seq: int
        self.injected_conf: int
        self.flag_at_injection: int
        self.others_at_injection: int
        self.reads_at_injection: int
        self.sets_at_injection: int
        self.after_eoi: bool
        self.begun: bool

    def forget_injection(self) -> None:
        """The last injection has had its verdict, or will have none."""
        self.injected_t = NIL

    def forget(self) -> None:
        """Records were lost (U2). One that was offline is until it is seen to run; a handler seen just before the gap
        may still be the next injection's."""
        self.lapic.forget()
        self.ready_since = NIL
        self.entries_since_eoi = 1
        self.last_entry_t = NIL
        self.forget_injection()
