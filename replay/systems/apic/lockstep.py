"""IOAPIC and local APICs in lockstep with an emulator's log (spec 0.5, S6.1, S6.2).

The models are fed lines, redirection entries, interrupt messages, ICR and EOI writes only; they predict Remote IRR
going up and down, interrupt messages, EOI broadcasts and the TMR words that the guest reads. When a local APIC takes
a vector from IRR to ISR is not in such a log, so at an EOI any vector requested earlier may be the one in service:
the broadcast is predicted with certainty when all of them, or none, are level triggered; else it is open.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from replay.events import KIND_ID, NIL, NONE
from replay.hardware.ioapic import MAYBE, SEND, IoApic, Pin
from replay.hardware.lapic import VECTORS
from replay.knowledge import UNKNOWN
from replay.lockstep import ANY, Lockstep
from replay.sink import Sink

__all__ = ["NEEDS", "ApicLockstep"]

ACCEPT: Final = KIND_ID["lapic.accept"]
EOI: Final = KIND_ID["lapic.eoi"]
RESET: Final = KIND_ID["lapic.reset"]
SNAPSHOT: Final = KIND_ID["lapic.snapshot"]
LINE: Final = KIND_ID["ioapic.line"]
RTE: Final = KIND_ID["ioapic.rte"]
REMOTE_IRR: Final = KIND_ID["ioapic.remote_irr"]
BROADCAST: Final = KIND_ID["ioapic.eoi"]
MESSAGE: Final = KIND_ID["ioapic.message"]
LOST: Final = KIND_ID["trace.lost"]

#: Without these in the recording there is nothing to compare.
NEEDS: Final = ("ioapic.message", "ioapic.line", "ioapic.rte", "ioapic.remote_irr", "ioapic.eoi")

NAMES: Final = (
    "ioapic_remote_irr_set", "ioapic_remote_irr_clear", "ioapic_message", "ioapic_eoi_broadcast", "lapic_tmr",
    "lapic_irr_merged",
)  # fmt: skip
SET: Final = 0
CLEAR: Final = 1
MSG: Final = 2
EOIED: Final = 3
TMR_WORD: Final = 4
MERGE: Final = 5

# Flags of lapic.accept: IRR had the vector already; it had not; neither: not recorded.
MERGED: Final = 2
FRESH: Final = 4
UPPER_UNKNOWN: Final = 1
TMR: Final = 2
ALL: Final = (1 << VECTORS) - 1
WORD_BITS: Final = 32
WORD: Final = (1 << WORD_BITS) - 1


class _Lapic:
    """Requests of one local APIC that were not dismissed yet, in IRR or in ISR.

    `vectors` and `twice` are bit masks: requested, and requested again while in service. `serving` is a vector that is
    known to be in service. `settled`: nothing is in IRR or ISR that was not seen to come. `sure`: the vectors are the
    right ones; after an EOI that could have been of several, only their number `total` is. `broken`: dismissed what
    nobody requested, so requests are missing in the log (a local timer) and nothing can be predicted.
    """

    __slots__ = ("broken", "level", "level_known", "serving", "settled", "sure", "total", "twice", "vectors")

    def __init__(self, *, known: bool) -> None:
        self.vectors: int = 0
        self.twice: int = 0
        self.total: int = 0
        self.serving: int = NONE
        self.level: int = 0
        self.level_known: int = ALL if known else 0
        self.settled: bool = known
        self.sure: bool = True
        self.broken: bool = False

    def certain(self) -> bool:
        """Whether the vectors requested or in service are known."""
        return self.settled and self.sure and not self.broken

    def accept(self, vector: int, level: int, merged: int) -> bool:
        """L1: IRR is set, `merged` if it was already. TMR takes the trigger mode. False: that cannot be."""
        bit = 1 << vector
        present = bool(self.vectors & bit)
        self.level_known |= bit
        self.level = self.level | bit if level else self.level & ~bit
        if merged == UNKNOWN:
            self.broken = self.broken or present
            merged = int(present)
        if merged == 0:
            self.total += 1
            if present:
                self.twice |= bit
                if self.sure:
                    self.serving = vector  # the older request has left IRR
            self.vectors |= bit
        elif not present:
            self.total += 1
            self.vectors |= bit
            return not self.certain()
        return True

    def candidates(self) -> int:
        """L4: what an EOI can dismiss: the highest in service, which is the known one or one of a higher class."""
        if self.serving == NONE:
            return self.vectors
        above = ((self.serving >> 4) + 1) << 4
        return self.vectors & (1 << self.serving | ALL << above)

    def dismissed(self, vector: int) -> None:
        """L4, for a vector that is known to be the one; NONE: some vector that is not level triggered."""
        self.settled = True
        if vector == NONE:
            edges = self.candidates() & ~self.level
            if not edges:
                self.broken = self.broken or not self.total
                return
            if edges & (edges - 1):
                self.sure = False
            vector = edges.bit_length() - 1  # the highest is the likeliest
        bit = 1 << vector
        if self.twice & bit:
            self.twice &= ~bit
        else:
            self.vectors &= ~bit
        if vector <= self.serving:
            self.serving = NONE
        self.total = max(0, self.total - 1)
        if self.total == 0:
            self.vectors = 0
            self.twice = 0
            self.serving = NONE
            self.sure = True


class ApicLockstep(Lockstep):
    """Feeds `IoApic` and the request masks of the local APICs; `feed` takes every event of the machine's own APICs."""

    def __init__(self, sink: Sink) -> None:
        super().__init__(sink, NAMES)
        self.ioapic = IoApic(known=False)
        self.lapics: dict[int, _Lapic] = {}
        self.pending_eoi = NONE  # CPU whose EOI may be followed by a broadcast
        self.broadcast_vector = NONE

    def watch(self, rows: Iterable[tuple[int, ...]]) -> Iterator[tuple[int, ...]]:
        """Passes the machine's rows on, having fed what belongs to the machine's own APICs."""
        for row in rows:
            kind, seq, t, cpu, dom, _, obj, tgt, val, val2, flags = row
            if kind == LOST:
                self.forget()
            elif dom < 0:
                self.feed(kind, seq, t, cpu, obj, tgt, val, val2, flags)
            yield row

    def feed(self, kind: int, seq: int, t: int, cpu: int, obj: int, tgt: int, val: int, val2: int, flags: int) -> None:
        """One canonical event, stimulus or outcome."""
        if kind == LINE:
            self.step(t, seq, "line of pin", NONE, obj, val)
            self.line(obj, val)
        elif kind == ACCEPT:
            self.accept(cpu, obj, flags, t, seq)
        elif kind == EOI:
            self.step(t, seq, "EOI", cpu, NONE, NIL)
            self.eoi(cpu)
        elif kind == MESSAGE:
            self.check(MSG, t, seq, NONE, obj, tgt, val)
        elif kind == REMOTE_IRR:
            self.remote_irr(obj, val, t, seq)
        elif kind == BROADCAST:
            self.broadcast(obj, t, seq)
        elif kind == RTE:
            self.step(t, seq, "entry of pin", NONE, obj, val2)
            self.rte(obj, val2, flags)
        elif kind == SNAPSHOT and obj == TMR:
            self.tmr(cpu, tgt, val, t, seq)
        elif kind == RESET:
            self.step(t, seq, "INIT", cpu, NONE, NIL)
            self.lapics[cpu] = _Lapic(known=True)

    def lapic(self, cpu: int) -> _Lapic:
        """What is known of a CPU's local APIC."""
        found = self.lapics.get(cpu)
        if found is None:
            found = self.lapics[cpu] = _Lapic(known=False)
        return found

    # -- IOAPIC ------------------------------------------------------------------------------------------------

    def line(self, number: int, level: int) -> None:
        """IO1, IO2."""
        pin = self.ioapic.pin(number)
        if level == 0:
            pin.lower_line()
        else:
            self.sent(pin, pin.raise_line())

    def rte(self, number: int, word: int, flags: int) -> None:
        """IO4, and IO2 for a level pin that is unmasked with its line high."""
        pin = self.ioapic.pin(number)
        pin.write(word)
        if flags & UPPER_UNKNOWN:
            pin.dest = NONE
        if pin.level == 1:
            self.sent(pin, pin.assess())

    def sent(self, pin: Pin, outcome: int) -> None:
        """What a transition of a pin makes visible."""
        if outcome not in (SEND, MAYBE):
            return
        certain = outcome == SEND
        if pin.level != 0:
            self.expect(SET, NONE, pin.number, certain=certain)
        vector = pin.vector if pin.vector != NONE else ANY
        dest = pin.dest if pin.dest != NONE else ANY
        known = pin.level != UNKNOWN and pin.logical != UNKNOWN
        mode = (pin.logical | pin.delivery << 8 | pin.level << 15) if known else ANY
        self.expect(MSG, NONE, vector, dest, mode, certain=certain)

    def remote_irr(self, number: int, value: int, t: int, seq: int) -> None:
        """Recorded. "Set" is also written while it is set already: the pin was looked at again, and nothing is sent."""
        pin = self.ioapic.pin(number)
        if pin.vector == NONE:
            self.learn(pin, value)
            return
        if value:
            if pin.remote_irr == 1 and not self.expects(SET, number):
                return
            self.check(SET, t, seq, NONE, number)
        else:
            self.check(CLEAR, t, seq, NONE, number)
        pin.remote_irr = value

    def learn(self, pin: Pin, value: int) -> None:
        """U4: an entry that was never seen written shows what it is by what it does."""
        kind = SET if value else CLEAR
        self.observed[kind] += 1
        self.open[kind] += 1
        self.drop(SET)
        pin.level = 1
        pin.remote_irr = value
        if value:
            pin.masked = 0
            pin.line = 1
            self.expect(MSG, NONE, ANY, certain=False)
        else:
            pin.vector = self.broadcast_vector
            if pin.line != 0:
                self.sent(pin, pin.assess())

    # -- local APICs ---------------------------------------------------------------------------------------------

    def accept(self, cpu: int, vector: int, flags: int, t: int, seq: int) -> None:
        """L1, for a message of a device or an IPI; merging into IRR is an outcome that the log shows."""
        if not 0 <= vector < VECTORS:
            return  # a damaged record
        if self.pending_eoi != NONE:
            self.step(t, seq, "request", cpu, vector, NIL)
        merged = int(flags & MERGED != 0) if flags & (MERGED | FRESH) else UNKNOWN
        good = self.lapic(cpu).accept(vector, flags & 1, merged)
        if merged == 1:
            self.predicted[MERGE] += 1
            self.observed[MERGE] += 1
            if not good:
                self.report_extra(MERGE, t, seq, cpu, vector, NONE, NIL, "IRR bit clear")

    def eoi(self, cpu: int) -> None:
        """L4: which vector was in service is one of those requested; the broadcast shows a level triggered one."""
        p = self.lapic(cpu)
        self.pending_eoi = cpu
        if not p.certain():
            self.expect(EOIED, cpu, ANY, certain=False)
            return
        likely = p.candidates()
        levels = likely & p.level
        if levels:
            one = levels.bit_length() - 1 if levels & (levels - 1) == 0 else ANY
            self.expect(EOIED, cpu, one, certain=levels == likely)

    def step(self, t: int, seq: int, what: str, cpu: int, obj: int, val: int) -> None:
        super().step(t, seq, what, cpu, obj, val)
        if self.pending_eoi != NONE:
            # No broadcast came: it was not a level triggered vector.
            self.lapic(self.pending_eoi).dismissed(NONE)
            self.pending_eoi = NONE

    def broadcast(self, vector: int, t: int, seq: int) -> None:
        """IO3: a level triggered vector was dismissed; Remote IRR falls at every pin that has it."""
        if not 0 <= vector < VECTORS:
            return  # a damaged record
        cpu = self.pending_eoi
        self.check(EOIED, t, seq, cpu, vector)
        if cpu != NONE:
            self.lapic(cpu).dismissed(vector)
            self.pending_eoi = NONE
        self.broadcast_vector = vector
        for pin in self.ioapic.pins_of(vector):
            was = pin.remote_irr
            if pin.level != 0 and was != 0:
                self.expect(CLEAR, NONE, pin.number, certain=pin.level == 1 and was == 1)
            self.sent(pin, pin.end_of_interrupt())

    def tmr(self, cpu: int, word: int, value: int, t: int, seq: int) -> None:
        """The guest read a word of TMR; bits of vectors that were never accepted are not known."""
        if not 0 <= word < VECTORS // WORD_BITS:
            return  # a damaged record
        p = self.lapic(cpu)
        shift = WORD_BITS * word
        known = p.level_known >> shift & WORD
        expected = p.level >> shift & known
        self.predicted[TMR_WORD] += 1
        self.observed[TMR_WORD] += 1
        if value & known != expected:
            wanted = self.text(TMR_WORD, cpu, word, NONE, expected)
            self.report_extra(TMR_WORD, t, seq, cpu, word, NONE, value, wanted)
            p.level = p.level & ~(WORD << shift) | (value & WORD) << shift

    def forget(self) -> None:
        """Records were lost (U2)."""
        super().forget()
        self.ioapic.forget()
        self.lapics.clear()
        self.pending_eoi = NONE
