"""Linux irq flow: one record for each irq and its port (spec S4.1)."""

from __future__ import annotations

from typing import Final

from replay.events import INF, NIL, NONE
from replay.hardware.evtchn_two_level import PortBits
from replay.knowledge import UNKNOWN

__all__ = ["EOI_PENDING", "EXPLICIT", "NOWHERE", "SOMEWHERE", "TEMPORARY", "IrqRecord"]

#: Reasons for which a port is masked (Linux EVT_MASK_REASON_*). Historic chips know EXPLICIT only.
EXPLICIT: Final = 1
TEMPORARY: Final = 2
EOI_PENDING: Final = 4

#: `inprogress`: no handler runs; it is not known whether and where one runs.
NOWHERE: Final = -1
SOMEWHERE: Final = -2

#: At most so many raises wait to be consumed; a recording without consumers must not fill memory.
MAX_OUTSTANDING: Final = 1024


class IrqRecord(PortBits):
    """Port bits, kernel software state, and the checker's list of raises that nobody has consumed yet.

    `masked` is 1 while `reasons` is not 0. cpu numbers are NONE when unknown or absent; flags are 0, 1 or UNKNOWN.
    """

    __slots__ = (
        "acks", "ahead", "backoff_until", "begin_cpu", "begin_t", "begins_after", "bound", "consume_seen",
        "disabled", "dropped_cpu", "dropped_t", "end_t", "entering", "eoi_after",
        "eoi_due", "eoi_gen", "eoi_owed", "eoi_spurious", "first_run", "inprogress", "irq", "irqs_pending",
        "is_active", "lateeoi_t", "mask_since", "mask_t", "masked_gen", "masked_ns", "masked_reported",
        "move_to", "none_count", "none_start", "outstanding", "per_cpu", "posted", "quiet_gen",
        "quiet_since", "raise_seqs", "raises_known", "reasons", "running", "spurious_cnt", "type",
        "virq_global", "want", "want_gen",
    )  # fmt: skip

    def __init__(self, irq: int, bound: int, known: bool) -> None:
        blank = 0 if known else UNKNOWN
        super().__init__(blank, blank)
        self.irq: int = irq
        self.bound: int = bound if known else NONE
        self.reasons: int = 0
        self.inprogress: int = NOWHERE if known else SOMEWHERE
        self.running: int = 0  # handler bodies running, also of flows without INPROGRESS
        self.entering: int = NONE  # cpu inside the flow, between ack and handler
        self.irqs_pending: int = blank
        self.disabled: int = blank
        self.move_to: int = NONE
        self.is_active: int = blank
        self.eoi_owed: int = 0
        self.eoi_due: int = INF  # closed runs: when the driver will issue the late EOI
        self.eoi_after: int = NIL  # what-if on a recording: offset of the body's late EOI from its end
        self.eoi_spurious: int = 0
        self.eoi_gen: int = 0
        self.lateeoi_t: int = NIL
        self.spurious_cnt: int = 0
        self.backoff_until: int = NIL
        self.type: int = NONE
        self.per_cpu: int = blank
        self.virq_global: bool = False
        # checker state
        self.outstanding: list[int] = []  # times of raises not yet consumed
        self.raise_seqs: list[int] = []
        self.ahead: int = 0  # how many of them came before the running handler began
        self.raises_known: bool = known
        self.posted: int = 0  # upcalls under way (closed runs)
        self.acks: bool = False
        self.consume_seen: bool = False
        self.first_run: bool = True
        self.begin_t: int = NIL
        self.begin_cpu: int = NONE
        self.end_t: int = NIL
        self.mask_t: int = NIL
        self.mask_since: int = INF
        self.masked_gen: int = 0
        self.masked_reported: bool = False
        self.masked_ns: int = 0
        self.quiet_since: int = INF
        self.quiet_gen: int = 0
        self.want: int = NONE  # cpu last asked for
        self.want_gen: int = 0
        self.begins_after: int = 0
        self.dropped_t: int = NIL
        self.dropped_cpu: int = NONE
        self.none_start: int = NIL
        self.none_count: int = 0

    def add_raise(self, t: int, seq: int) -> None:
        """A raise waits to be consumed."""
        if len(self.outstanding) < MAX_OUTSTANDING:
            self.outstanding.append(t)
            self.raise_seqs.append(seq)

    def consume_until(self, t: int) -> int:
        """The handler looked at its ring at `t`: how many raises that satisfied."""
        count = 0
        for when in self.outstanding:
            if when > t:
                break
            count += 1
        self.drop(count)
        return count

    def drop(self, count: int) -> None:
        """Forget the oldest `count` raises."""
        del self.outstanding[:count]
        del self.raise_seqs[:count]
        self.ahead = max(0, self.ahead - count)

    def forget(self) -> None:
        """Records were lost (U2). A back-off that was seen to begin still excuses; runs without work still count."""
        self.pending = self.masked = UNKNOWN
        self.bound = NONE
        self.inprogress = SOMEWHERE
        self.entering = NONE
        self.irqs_pending = self.disabled = self.is_active = UNKNOWN
        self.eoi_owed = 0
        self.move_to = NONE
        self.want = NONE
        self.outstanding.clear()
        self.raise_seqs.clear()
        self.mask_since = INF
        self.eoi_gen += 1
