"""Rules of the HPET block, H1 to H4 (spec S6.4)."""

from __future__ import annotations

from replay.declare import Config
from replay.events import NIL, NONE
from replay.hardware.hpet_block import Comparator, HpetBlock, ticks_ahead
from replay.sink import Evidence, Sink
from replay.systems.apic import hpet_block_codes as codes

__all__ = ["ComparatorWatch", "HpetBlockMonitor"]

#: Pin that comparator 1 drives under legacy replacement, otherwise the RTC's.
RTC_PIN = 8


class ComparatorWatch:
    """What the rules remember of one comparator; NIL times mean no."""

    __slots__ = ("behind", "counter", "enable_t", "fire_t", "half_seq", "half_t", "missed_seq", "missed_t", "torn_seq",
                 "torn_t")  # fmt: skip

    def __init__(self) -> None:
        self.missed_t = NIL
        self.missed_seq = NONE
        self.counter = NIL
        self.behind = 0
        self.half_t = NIL
        self.half_seq = NONE
        self.torn_t = NIL
        self.torn_seq = NONE
        self.enable_t = NIL
        self.fire_t = NIL


class HpetBlockMonitor:
    """The comparators of a recording; a verdict that needs the next step waits for it."""

    def __init__(self, sink: Sink, config: Config) -> None:
        self.sink = sink
        self.retry_ns = config.integer("hpet_retry_ns")
        self.route_ns = config.integer("hpet_route_ns")
        self.glitch_ns = config.integer("hpet_glitch_ns")
        self.match_ns = config.integer("hpet_match_ns")
        self.block = HpetBlock(known=True)
        self.watches: dict[int, ComparatorWatch] = {}
        self.fires_seen = True
        self.conflict_reported = False
        self.writes = 0
        self.fires = 0

    def start(self, known: bool, fires_seen: bool) -> None:
        """Whether the events begin at power-up, and whether fires are recorded."""
        self.block = HpetBlock(known=known)
        self.fires_seen = fires_seen

    def watch(self, number: int) -> ComparatorWatch:
        """What is remembered of a comparator."""
        watch = self.watches.get(number)
        if watch is None:
            watch = ComparatorWatch()
            self.watches[number] = watch
        return watch

    def written(self, number: int, value: int, counter: int, t: int, seq: int) -> None:
        """H1: a comparator is written; `counter` was read back after it (NIL: it was not)."""
        self.writes += 1
        w = self.watch(number)
        self._missed(number, w, t)
        self.block.comparator(number).write_value(value)
        if counter != NIL and self.fires_seen:
            ahead = ticks_ahead(value, counter)
            if ahead < 0:
                w.missed_t = t
                w.missed_seq = seq
                w.counter = counter
                w.behind = -ahead

    def _missed(self, number: int, w: ComparatorWatch, t: int) -> None:
        """`hwhpet-missed-comparator`: the value written last was behind the counter and never matched."""
        if w.missed_t == NIL:
            return
        value = self.block.comparator(number).value
        noticed = t - w.missed_t <= self.retry_ns
        self.sink.report(
            codes.MISSED_COMPARATOR, w.missed_t, obj=number, val=value, seq=w.missed_seq,
            severity="info" if noticed else "",
            expected=f"comparator ahead of counter {w.counter}", observed=f"{value}, {w.behind} ticks behind",
            cause="It was noticed and written again." if noticed else "",
        )  # fmt: skip
        w.missed_t = NIL

    def route(self, number: int, data: int, address: int, t: int, seq: int) -> None:
        """H2: one half of the message route is written; the other argument is NIL."""
        comparator = self.block.comparator(number)
        w = self.watch(number)
        if comparator.half and t - w.half_t > self.route_ns:
            comparator.half = 0
        if comparator.half == 0:
            w.torn_t = NIL
            w.half_t = t
            w.half_seq = seq
        both = comparator.write_data(data) if address == NIL else comparator.write_address(address)
        if both and w.torn_t != NIL:
            self.sink.report(
                codes.TORN_ROUTE, w.torn_t, obj=number, val=comparator.data, tgt=NONE, seq=w.torn_seq,
                t_first=w.half_t, expected="both route registers written before the next match",
                observed=f"fired between the writes at {w.half_t} and {t} ns",
                evidence=(
                    Evidence(w.half_t, w.half_seq, "first route register written"),
                    Evidence(w.torn_t, w.torn_seq, "comparator fires"),
                    Evidence(t, seq, "second route register written"),
                ),
            )  # fmt: skip

    def configured(self, number: int, config: int, old: int, t: int) -> None:
        """H3, H4: a timer's configuration (number NONE: the general one) is written."""
        if number == NONE:
            self.block.write_general(config)
            if self.block.legacy == 0:
                self.conflict_reported = False
            return
        if self.block.comparator(number).write_config(config, old):
            self.watch(number).enable_t = t

    def fired(self, number: int, t: int, seq: int) -> None:
        """A comparator matched and raised its interrupt."""
        self.fires += 1
        comparator = self.block.comparator(number)
        w = self.watch(number)
        w.missed_t = NIL  # it matched between the write and the read of the counter
        w.fire_t = t
        if w.enable_t != NIL and t - w.enable_t <= self.glitch_ns and comparator.armed == 0:
            self.sink.report(
                codes.ENABLE_GLITCH, t, obj=number, val=t - w.enable_t, seq=seq, t_first=w.enable_t,
                expected="no interrupt from an unarmed comparator", observed="fired after int_enable was set",
            )  # fmt: skip
        w.enable_t = NIL
        comparator.match()
        self._tearing(comparator, w, t, seq)

    def _tearing(self, comparator: Comparator, w: ComparatorWatch, t: int, seq: int) -> None:
        """H2: the message went out while its route was half written; it shows when the other half comes."""
        if comparator.half and comparator.enabled != 0 and t - w.half_t <= self.route_ns:
            w.torn_t = t
            w.torn_seq = seq

    def rtc_edge(self, t: int, seq: int) -> None:
        """H4: pin 8 rises."""
        if self.block.legacy != 1 or not self.fires_seen or self.conflict_reported:
            return
        w = self.watch(1)
        if self.block.comparator(1).enabled != 1 or (w.fire_t != NIL and t - w.fire_t <= self.match_ns):
            return
        self.conflict_reported = True
        self.sink.report(
            codes.LEGACY_CONFLICT, t, obj=1, tgt=RTC_PIN, seq=seq,
            expected="pin 8 driven by comparator 1 alone", observed="pin 8 rose without a match of comparator 1",
        )  # fmt: skip

    def forget(self) -> None:
        """Records were lost (U2)."""
        self.block.forget()
        self.watches.clear()
        self.conflict_reported = False

    def finish(self, t_end: int) -> None:
        """Comparators that were missed and never written again."""
        for number, w in self.watches.items():
            self._missed(number, w, w.missed_t + self.retry_ns + 1 if w.missed_t != NIL else t_end)

    def metrics(self) -> dict[str, int]:
        """Named numbers of the run."""
        return {"hpet_comparator_writes": self.writes, "hpet_fires": self.fires}
