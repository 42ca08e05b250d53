"""KVM on x86: the pins of the guest's IOAPIC (spec M.2, S6.2).

kvm_set_irq is the line of an interrupt source, before anything follows from it; kvm_ioapic_set_irq comes after the
message, in the same thread, and shows the redirection entry but not the level. Both are put where kvm_set_irq is. A pin
is high while one of its sources is. kvm_ack_irq says that an EOI reached a pin; it is written before a resampling
device lowers its line and before Remote IRR falls, so it is put behind what its thread does for it. Whether the pin was
sent again then is recorded: kvm_apic_accept_irq follows in the same thread. With a split irqchip the IOAPIC is in user
space, and nothing of this is recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from replay.binding.base import event
from replay.binding.linux_probes import Source
from replay.coverage import Observation

__all__ = ["GUEST", "Binder", "Survey", "survey"]

#: `dom` of the one guest of a KVM host.
GUEST: Final = 1
#: KVM_IRQCHIP_IOAPIC.
IOAPIC: Final = (2, "IOAPIC")

_LINE: Final = "kvm_set_irq"
_PIN: Final = "kvm_ioapic_set_irq"
_ACK: Final = "kvm_ack_irq"
_DELAYED: Final = "kvm_ioapic_delayed_eoi_inj"
_ACCEPT: Final = "kvm_apic_accept_irq"
#: What a thread does next has nothing to do with the EOI any more.
_BARRIERS: Final = ("kvm_entry", "kvm_exit", "kvm_eoi", "kvm_pv_eoi", "kvm_msi_set_irq")
_MODES: Final = {"Fixed": 0, "LowPrio": 1, "SMI": 2, "Res3": 3, "NMI": 4, "INIT": 5, "SIPI": 6, "ExtINT": 7}

# Marks of the records of one thread.
_IS_ACK, _IS_LINE, _IS_ACCEPT, _IS_BARRIER = range(4)


@dataclass(slots=True)
class Survey:
    """`usable`: lines and pins are recorded. `sources`: how many sources each interrupt has."""

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    usable: bool = False
    sources: pl.DataFrame | None = None


def survey(source: Source) -> Survey:
    """Whether the pins can be followed."""
    result = Survey()
    if not source.has(_PIN):
        return result
    if not source.has(_LINE):
        result.facts["ioapic"] = "kvm_ioapic_set_irq without kvm_set_irq: the level of a line is not in it"
        return result
    result.usable = True
    pairs = source.records.scan(_LINE).select("gsi", "irq_source_id").drop_nulls().unique().collect()
    result.sources = pairs.group_by("gsi").agg(pl.len().alias("sources"))
    result.observed = {
        "ioapic.line": Observation(80, "kvm:kvm_set_irq of each source, and the pin of kvm:kvm_ioapic_set_irq"),
        "ioapic.rte": Observation(80, "kvm:kvm_ioapic_set_irq, whenever a line moves"),
    }
    if source.has(_ACK):
        result.observed["ioapic.eoi"] = Observation(80, "kvm:kvm_ack_irq, and the request that follows it")
        result.observed["ioapic.remote_irr"] = Observation(80, "kvm:kvm_ack_irq without a request after it")
    if source.has(_DELAYED):
        result.observed["ioapic.storm"] = Observation(80, f"kvm:{_DELAYED}, of the pin that its thread acknowledged")
    return result


class Binder:
    """Makes the events of one slice after the other; remembers levels and entries."""

    def __init__(self, source: Source, found: Survey) -> None:
        self.source = source
        self.found = found
        self.levels: dict[tuple[int, int], int] = {}  # (interrupt, source) to its level
        self.entries: dict[int, int] = {}  # pin to the redirection entry shown last

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi."""
        if not self.found.usable:
            return
        lines = self.source.read(_LINE, lo, hi, "pid", "gsi", "level", "irq_source_id")
        pins = self.source.read(_PIN, lo, hi, *_COLUMNS)
        moved = self._moved(self._levels(lines), pins) if lines is not None and pins is not None else None
        if moved is not None:
            changed = self._changed(moved)
            entry = {"dom": GUEST, "obj": pl.col("pin"), "conf": 80}
            yield event(
                changed, "ioapic.rte", _PIN, **entry, val=pl.col("word") & 0xFF, val2=pl.col("word"), rank=0
            )
            yield event(
                moved.drop_nulls("line"), "ioapic.line", _LINE, **entry, val=pl.col("line"), rank=1
            )
        acks = self.source.read(_ACK, lo, hi, "pid", "irqchip", "irqchip_sym", "pin")
        if acks is not None:
            yield from self._acknowledged(acks.filter(_of_ioapic()), moved, lo, hi)

    def _levels(self, lines: pl.DataFrame) -> pl.DataFrame:
        """Level of the whole line after each record: null while one of its sources was not seen yet."""
        lines = lines.drop_nulls(["gsi", "level", "irq_source_id"])
        parts = []
        assert self.found.sources is not None
        for (gsi,), part in lines.group_by("gsi", maintain_order=True):
            there = [int(s) for s in part["irq_source_id"].unique().to_list()]
            known = {s for g, s in self.levels if g == gsi}
            wanted = self.found.sources.filter(pl.col("gsi") == gsi)["sources"].to_list()
            columns = []
            for number in sorted({*there, *known}):
                mine = pl.when(pl.col("irq_source_id") == number).then(pl.col("level") != 0).forward_fill()
                before = self.levels.get((int(gsi), number))
                columns.append(mine if before is None else mine.fill_null(bool(before)))
            complete = len(columns) == sum(wanted)
            line = pl.any_horizontal(columns).cast(pl.Int64)
            all_known = pl.all_horizontal([c.is_not_null() for c in columns]) & pl.lit(complete)
            parts.append(part.with_columns(pl.when(all_known).then(line).alias("line")))
            for number in there:
                last = part.filter(pl.col("irq_source_id") == number)["level"][-1]
                self.levels[int(gsi), number] = int(last != 0)
        return pl.concat(parts).sort("seq") if parts else lines.with_columns(pl.lit(None, pl.Int64).alias("line"))

    @staticmethod
    def _moved(lines: pl.DataFrame, pins: pl.DataFrame) -> pl.DataFrame:
        """Each pin record with the line that moved it, at the line's place."""
        shown = pins.with_columns(word=_word()).select("seq", "pid", "pin", "word")
        shown = shown.drop_nulls(["pid", "pin", "word"])
        joined = shown.join_asof(
            lines.rename({"seq": "line_seq"}).with_columns(seq=pl.col("line_seq")), on="seq", by="pid",
            strategy="backward", check_sortedness=False,
        )  # fmt: skip
        # One line moves one pin of the IOAPIC.
        joined = joined.drop_nulls("line_seq").unique("line_seq", keep="first", maintain_order=True)
        return joined.with_columns(pin_seq=pl.col("seq"), seq=pl.col("line_seq"))

    def _changed(self, moved: pl.DataFrame) -> pl.DataFrame:
        """Those that show another entry than before."""
        seen = pl.DataFrame(
            {"pin": list(self.entries), "known": list(self.entries.values())},
            schema={"pin": moved.schema["pin"], "known": pl.Int64},
        )
        moved = moved.sort("seq").join(seen, on="pin", how="left", maintain_order="left")
        before = pl.col("word").shift(1).over("pin").fill_null(pl.col("known"))
        for pin, word in moved.group_by("pin", maintain_order=True).last().select("pin", "word").iter_rows():
            self.entries[int(pin)] = int(word)
        return moved.filter(pl.col("word").ne_missing(before))

    def _acknowledged(
        self, acks: pl.DataFrame, moved: pl.DataFrame | None, lo: int, hi: int
    ) -> Iterator[pl.DataFrame]:
        """EOIs at pins: whether the pin was sent again, and where that lies in the order of records."""
        parts = [acks.select("seq", "pid", mark=pl.lit(_IS_ACK, pl.Int8), vec=pl.lit(None, pl.Int64))]
        if moved is not None:
            lowered = moved.filter(pl.col("line").fill_null(1) == 0)
            parts.append(
                lowered.select("seq", "pid", mark=pl.lit(_IS_LINE, pl.Int8), vec=pl.lit(None, pl.Int64))
            )
        accepts = self.source.read(_ACCEPT, lo, hi, "pid", "vec")
        if accepts is not None:
            parts.append(
                accepts.select("seq", "pid", mark=pl.lit(_IS_ACCEPT, pl.Int8), vec=pl.col("vec").cast(pl.Int64))
            )
        for name in _BARRIERS:
            frame = self.source.read(name, lo, hi, "pid")
            if frame is not None:
                parts.append(
                    frame.select("seq", "pid", mark=pl.lit(_IS_BARRIER, pl.Int8), vec=pl.lit(None, pl.Int64))
                )
        steps = pl.concat(parts).sort("seq").with_columns(
            group=pl.col("mark").is_in([_IS_ACK, _IS_BARRIER]).cum_sum().over("pid")
        )
        mark = pl.col("mark")
        of_group = steps.group_by("pid", "group").agg(
            seq=pl.col("seq").filter(mark == _IS_ACK).first(),
            lowered=pl.col("seq").filter(mark == _IS_LINE).last(),
            again=pl.col("seq").filter(mark == _IS_ACCEPT).last(),
        )
        found = acks.join(of_group.drop_nulls("seq").drop("pid", "group"), on="seq", how="left")
        found = found.with_columns(order=pl.max_horizontal("seq", pl.col("lowered").fill_null(0)))
        at = {"dom": GUEST, "src_seq": pl.col("order"), "conf": 80, "rank": 2}
        found = self._timed(found, moved)
        sent, rest = found.filter(pl.col("again").is_not_null()), found.filter(pl.col("again").is_null())
        yield event(sent, "ioapic.eoi", _ACK, **at, tgt=pl.col("pin"))
        yield event(rest, "ioapic.remote_irr", _ACK, **at, obj=pl.col("pin"), val=0)
        delayed = self.source.read(_DELAYED, lo, hi, "pid")
        if delayed is not None:
            pins = acks.select("seq", "pid", "pin")
            held = delayed.join_asof(pins, on="seq", by="pid", strategy="backward", check_sortedness=False)
            yield event(held.drop_nulls("pin"), "ioapic.storm", _DELAYED, dom=GUEST, obj=pl.col("pin"), conf=80)

    @staticmethod
    def _timed(found: pl.DataFrame, moved: pl.DataFrame | None) -> pl.DataFrame:
        """The time of the record behind which each lies."""
        if moved is None:
            return found
        times = moved.select(order=pl.col("seq"), then=pl.col("t_ns"))
        found = found.join(times, on="order", how="left", maintain_order="left")
        return found.with_columns(t_ns=pl.col("then").fill_null(pl.col("t_ns")))


#: Text spells the entry in words (`e_sym` …, `dst`); binary records hold it whole.
_COLUMNS: Final = ("pid", "pin", "e", "dst", "e_sym", "e_sym_2", "e_sym_3", "e_sym_4")


def _word() -> pl.Expr:
    """The redirection entry as a signed 64-bit word, without Remote IRR and delivery status."""
    raw = pl.col("e").cast(pl.UInt64).reinterpret(signed=True)
    spelled = (
        (raw & 0xFF)
        + pl.col("e_sym").cast(pl.String).replace_strict(_MODES, default=None, return_dtype=pl.Int64) * (1 << 8)
        + (pl.col("e_sym_2").cast(pl.String) == "logical").cast(pl.Int64) * (1 << 11)
        + (pl.col("e_sym_3").cast(pl.String) == "level").cast(pl.Int64) * (1 << 15)
        + (pl.col("e_sym_4").cast(pl.String) == "|masked").cast(pl.Int64) * (1 << 16)
        + (pl.col("dst").cast(pl.Int64) & 0xFF) * (1 << 56)
    )
    return pl.when(pl.col("e_sym_3").is_not_null()).then(spelled).otherwise(raw & ~(1 << 12 | 1 << 14))


def _of_ioapic() -> pl.Expr:
    return (pl.col("irqchip") == IOAPIC[0]).fill_null(False) | (
        pl.col("irqchip_sym").cast(pl.String) == IOAPIC[1]
    ).fill_null(False)
