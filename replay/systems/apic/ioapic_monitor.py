"""Rules of IOAPIC pins, IO1 to IO5 (spec S6.2), over what a recording shows of lines, entries, deliveries and EOIs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from replay.agenda import SOFTWARE, Agenda
from replay.declare import Config
from replay.events import NIL, NONE
from replay.hardware.ioapic import LOST, SEND, IoApic, Pin
from replay.knowledge import UNKNOWN
from replay.sink import Evidence, Sink
from replay.systems.apic import ioapic_codes as codes

__all__ = ["STUCK_LIMIT", "IoApicMonitor", "PinWatch"]

#: Action of the agenda: pin `a` is looked at again, `b` = its generation, `c` = the domain.
STUCK_LIMIT: Final = 16

# Where the message is that Remote IRR stands for; without meaning while that is unknown (Pin.sent NONE).
REQUESTED: Final = 1  # in some IRR
SERVICED: Final = 2  # in some ISR
GONE: Final = 0  # its EOI has come


class PinWatch:
    """What the rules remember of one pin."""

    __slots__ = ("flight", "generation", "gone_t", "redelivered", "reported", "storm_reported", "story", "unwanted")

    def __init__(self) -> None:
        self.flight = GONE
        self.generation = 0
        self.gone_t = NIL
        self.redelivered = 0
        self.unwanted = 0
        self.reported = False
        self.storm_reported = False
        self.story: list[tuple[int, int, str]] = []

    def note(self, t: int, seq: int, label: str) -> None:
        """Keep the last steps."""
        self.story.append((t, seq, label))
        if len(self.story) > 6:
            del self.story[0]

    def told(self) -> tuple[Evidence, ...]:
        """The last steps, oldest first."""
        return tuple(Evidence(t, None if seq == NONE else seq, label) for t, seq, label in self.story)


class IoApicMonitor:
    """The pins of the machine or of one guest; methods are told of one event and return the pins that sent."""

    def __init__(self, sink: Sink, config: Config, agenda: Agenda, dom: int = NONE) -> None:
        self.sink = sink
        self.dom = dom
        self.agenda = agenda
        self.latches_edges = config.integer("ioapic_latches_edges")
        self.stuck_ns = config.integer("ioapic_stuck_ns")
        self.storm_count = config.integer("ioapic_storm_count")
        self.ioapic = IoApic(known=True)
        self.watches: dict[int, PinWatch] = {}
        #: The recording shows when an EOI reaches the IOAPIC; then the LAPIC's own EOI only moves the vector.
        self.explicit_eoi = False
        self.sends = 0
        self.level_redeliveries = 0

    def start(self, known: bool, explicit_eoi: bool) -> None:
        """Whether the events begin at power-up, and whether `ioapic.eoi` is among them."""
        self.ioapic.known = known
        self.explicit_eoi = explicit_eoi

    def load(self, entries: Iterable[Mapping[str, Any]]) -> None:
        """Entries of a scenario or a register dump: pin, vector, level, dest, mask; Remote IRR clear, line low."""
        for entry in entries:
            pin = self.ioapic.pin(int(entry["pin"]))
            pin.vector = int(entry["vector"])
            pin.level = int(entry.get("level", 0))
            pin.masked = int(entry.get("mask", 0))
            pin.dest = int(entry.get("dest", NONE))
            pin.logical = int(entry.get("logical", 0))
            pin.remote_irr = int(entry.get("remote_irr", 0))
            pin.line = int(entry.get("line", 0))

    def watch(self, number: int) -> PinWatch:
        """What is remembered of a pin."""
        watch = self.watches.get(number)
        if watch is None:
            watch = PinWatch()
            self.watches[number] = watch
        return watch

    # -- IO1 to IO5 --------------------------------------------------------------------------------------------

    def line(self, number: int, level: int, t: int, seq: int) -> list[Pin]:
        """IO1, IO2: the line of a pin moves."""
        pin = self.ioapic.pin(number)
        w = self.watch(number)
        if level == 0:
            pin.lower_line()
            w.redelivered = 0
            w.unwanted = 0
            w.storm_reported = False
            return []
        outcome = pin.raise_line()
        if outcome == LOST and not self.latches_edges:
            self.sink.report(
                codes.EDGE_LOST_MASKED, t, dom=self.dom, obj=number, val=pin.vector, seq=seq,
                expected="pin unmasked", observed="edge at a masked pin", evidence=w.told(),
            )  # fmt: skip
        return self._outcome(pin, w, outcome, t, seq, "line rises: sent as")

    def rte(self, number: int, vector: int, word: int, t: int, seq: int) -> list[Pin]:
        """IO4: the entry is rewritten; `word` is all of it, if recorded."""
        pin = self.ioapic.pin(number)
        w = self.watch(number)
        old = pin.vector
        in_flight = pin.set_vector(vector) if word == NIL else pin.write(word)
        w.note(t, seq, f"entry rewritten: vector {pin.vector:#x}")
        if in_flight:
            self.sink.report(
                codes.RTE_CHANGE_INFLIGHT, t, dom=self.dom, obj=number, tgt=pin.vector, val=old, seq=seq,
                expected=f"vector {old:#x} acknowledged before the entry changes",
                observed=f"remote_irr=1, vector now {pin.vector:#x}", evidence=w.told(),
            )  # fmt: skip
        self._look(number, pin, w, t)
        if pin.level != 1:
            return []
        return self._outcome(pin, w, pin.assess(), t, seq, "entry unmasked: sent as")

    def delivered(self, vector: int) -> None:
        """A LAPIC took the vector from IRR to ISR."""
        for number, w in self.watches.items():
            if w.flight == REQUESTED and self.ioapic.pins[number].sent == vector:
                w.flight = SERVICED

    def dismissed(self, vector: int, t: int, seq: int) -> list[Pin]:
        """A LAPIC cleared the vector's ISR bit (L4); its EOI goes to the IOAPIC if it was a level interrupt."""
        again: list[Pin] = [] if self.explicit_eoi else self.broadcast(vector, t, seq)
        for number, w in self.watches.items():
            pin = self.ioapic.pins[number]
            if pin.sent == vector and w.flight == SERVICED and pin not in again:
                w.flight = GONE
                w.gone_t = t
                w.note(t, seq, f"EOI of {vector:#x}")
                self._look(number, pin, w, t)
        return again

    def acknowledged(self, vector: int, number: int, t: int, seq: int) -> list[Pin]:
        """The recording shows an EOI at the IOAPIC: of all pins with the vector, or of one (`number`)."""
        self.explicit_eoi = True
        return self.broadcast(vector, t, seq) if number == NONE else self.directed(self.ioapic.pin(number), t, seq)

    def broadcast(self, vector: int, t: int, seq: int) -> list[Pin]:
        """IO3: the EOI clears Remote IRR of all pins with this vector; a line still high sends again."""
        again: list[Pin] = []
        for pin in self.ioapic.pins_of(vector):
            again += self.directed(pin, t, seq)
        return again

    def directed(self, pin: Pin, t: int, seq: int) -> list[Pin]:
        """IO5: an EOI for exactly one pin."""
        w = self.watch(pin.number)
        was = pin.remote_irr
        outcome = pin.end_of_interrupt()
        w.reported = False
        w.note(t, seq, "EOI clears Remote IRR")
        if outcome != SEND:
            return []
        if was == 1:
            self.level_redeliveries += 1
            w.redelivered += 1
            self._storm(pin, w, t, seq)
        return self._outcome(pin, w, outcome, t, seq, "line still high: sent again as")

    def remote_irr(self, number: int, value: int) -> None:
        """The recording states Remote IRR: it wins over the model (U4)."""
        pin = self.ioapic.pin(number)
        w = self.watch(number)
        if pin.remote_irr == value:
            return
        pin.remote_irr = value
        pin.sent = pin.vector if value else NONE
        pin.rewritten = False
        w.flight = REQUESTED

    def handler_returned(self, vector: int, result: int) -> None:
        """A handler returned irqreturn `result` (0: not mine); NIL when that is not recorded."""
        for pin in self.ioapic.pins_of(vector):
            w = self.watch(pin.number)
            w.unwanted = w.unwanted + 1 if result == 0 else 0

    def slowed(self, number: int, t: int, seq: int) -> None:
        """KVM holds a level pin back: its EOIs were answered by the next message all the time."""
        w = self.watch(number)
        if w.storm_reported:
            return
        w.storm_reported = True
        self.sink.report(
            codes.LEVEL_STORM, t, dom=self.dom, obj=number, val=w.redelivered, seq=seq,
            expected="a handler that makes the line fall",
            observed=f"KVM slows the pin down; {w.redelivered} messages since the line rose or the recording began",
            evidence=w.told(),
        )  # fmt: skip

    def check(self, t: int, in_flight: int = -1) -> None:
        """Evaluate the time-outs now. `in_flight`: vectors that may be requested or in service somewhere, as bits; -1:
        of some local APIC that is not known."""
        for number, w in self.watches.items():
            pin = self.ioapic.pins[number]
            if in_flight >= 0 and pin.level == 1 and pin.sent != NONE and not in_flight >> pin.sent & 1:
                w.flight = GONE
                w.gone_t = t
            if self._stuck(pin, w):
                self._report_stuck(pin, w, t)

    def fire(self, number: int, generation: int, t: int) -> None:
        """A pin's Remote IRR has stood for nothing for `ioapic_stuck_ns`, unless something happened since."""
        w = self.watches[number]
        if w.generation == generation and self._stuck(self.ioapic.pins[number], w):
            self._report_stuck(self.ioapic.pins[number], w, t)

    def forget(self) -> None:
        """Records were lost (U2)."""
        self.ioapic.forget()
        for w in self.watches.values():
            w.redelivered = 0
            w.unwanted = 0

    # -- inside ------------------------------------------------------------------------------------------------

    def _outcome(self, pin: Pin, w: PinWatch, outcome: int, t: int, seq: int, why: str) -> list[Pin]:
        if outcome == SEND:
            self.sends += 1
            w.flight = REQUESTED
            w.note(t, seq, f"{why} {pin.vector:#x}")
            return [pin]
        return []

    def _stuck(self, pin: Pin, w: PinWatch) -> bool:
        return w.flight == GONE and pin.remote_irr == 1 and pin.sent != NONE and not w.reported

    def _look(self, number: int, pin: Pin, w: PinWatch, t: int) -> None:
        w.generation += 1
        if self._stuck(pin, w):
            self.agenda.at(t + self.stuck_ns, SOFTWARE, STUCK_LIMIT, number, w.generation, self.dom)

    def _report_stuck(self, pin: Pin, w: PinWatch, t: int) -> None:
        w.reported = True
        self.sink.report(
            codes.REMOTE_IRR_STUCK, t, dom=self.dom, obj=pin.number, val=pin.sent, t_first=w.gone_t,
            expected="remote_irr=0",
            observed=f"remote_irr=1, sent as {pin.sent:#x}, entry now {pin.vector:#x}, "
            f"line {'?' if pin.line == UNKNOWN else pin.line}",
            cause="The entry was rewritten while the interrupt was in flight." if pin.rewritten else "",
            evidence=w.told(),
        )  # fmt: skip

    def _storm(self, pin: Pin, w: PinWatch, t: int, seq: int) -> None:
        if w.redelivered >= self.storm_count and w.unwanted >= self.storm_count and not w.storm_reported:
            w.storm_reported = True
            self.sink.report(
                codes.LEVEL_STORM, t, dom=self.dom, obj=pin.number, val=w.redelivered, seq=seq,
                expected="a handler that makes the line fall", observed=f"{w.unwanted} handlers returned none",
                evidence=w.told(),
            )  # fmt: skip
