"""QEMU device trace of an x86 machine: IOAPIC, local APICs, HPET block (spec S6.1, S6.2, S6.4; of S1 what shows).

Interrupt acceptance (IRR to ISR) is not in the log, so there is no `lapic.deliver`; the EOI is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import polars as pl

from replay.binding.base import Records, event
from replay.coverage import Observation

__all__ = ["TABLES", "Binder"]

#: Tables that only an x86 log has.
TABLES: Final = frozenset({"ioapic_set_irq", "lapic_reg", "ioapic_reg", "hpet_reg", "apic_deliver_irq", "msi_write"})

#: GSI 0, the timer, is wired to this pin (the log prints the GSI).
TIMER_PIN: Final = 2
#: Line into the router that each comparator drives under legacy replacement (HPET 1.0a, 2.3.5).
LEGACY_GSI: Final = {0: 0, 1: 8}

FIXED: Final = 0
LOWEST_PRIORITY: Final = 1
INIT: Final = 5
REPORT_REACH: Final = 256  # lines
LEVEL_ASSERT: Final = 1 << 14  # ICR_LO
# Flags of lapic.accept: level triggered; IRR had the vector already; it had not.
LEVEL_FLAG: Final = 1
MERGED_FLAG: Final = 2
FRESH_FLAG: Final = 4
UPPER_UNKNOWN: Final = 1
SVR_ENABLED: Final = 1 << 8
FLAT_MODEL: Final = 0xF  # DFR bits 31:28
TMR: Final = 2  # lapic.snapshot
_COMMON: Final = ("seq", "t_ns", "t_err_ns", "cpu", "offset")


class Binder:
    """Events of the x86 half; what a slice must know of the lines before it is carried along."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.tables = records.tables()
        self.observed: dict[str, Observation] = {}
        self.facts: dict[str, Any] = {}
        self.levels: dict[int, int] = {}  # of pins
        self.entries: dict[int, tuple[int | None, int | None]] = {}  # halves of redirection entries
        self.icr_high: dict[int, int] = {}  # destination in ICR_HI
        self.legacy: bool = False
        self.coalescing = 0  # last value of the emulator's counter
        self.reports: pl.DataFrame | None = None
        self.targets = self._survey()

    # -- survey ------------------------------------------------------------------------------------------------

    def _survey(self) -> pl.DataFrame:
        """Logical and physical ids of the local APICs, from their registers; see `_resolve`."""
        cpus: dict[int, dict[str, int]] = {}
        if "lapic_reg" in self.tables:
            frame = (
                self.records.scan("lapic_reg")
                .filter(pl.col("cpu").is_not_null())
                .select("seq", "cpu", "write", "value", reg=pl.col("reg").cast(pl.String))
            )
            for cpu in frame.select(pl.col("cpu").unique()).collect()["cpu"]:
                cpus[int(cpu)] = {}
            few = frame.filter(pl.col("reg").is_in(["LDR", "DFR", "ID", "SVR"])).collect().sort("seq")
            for seq, cpu, _, value, reg in few.iter_rows():
                known = cpus[cpu]
                if reg == "SVR":
                    if "on" not in known and not value & SVR_ENABLED:
                        known.setdefault("off", 1)  # the first that is seen of it: off since power-up
                    elif "on" not in known:
                        known["on"] = seq if "off" in known else 0
                else:
                    known[reg] = value
        if "ioapic_set_irq" in self.tables and not cpus:
            cpus = {0: {}}
        stated = [c for c, known in cpus.items() if "LDR" in known]
        flat = all(known.get("DFR", 0xFFFFFFFF) >> 28 == FLAT_MODEL for known in cpus.values())
        rows = [
            (
                cpu,
                known.get("ID", cpu << 24) >> 24,
                known["LDR"] >> 24 if "LDR" in known else 1 << cpu & 0xFF,
                known.get("on", 0),
            )
            for cpu, known in sorted(cpus.items())
        ]
        self._observe(complete=len(stated) == len(cpus), flat=flat)
        self.facts["x86_local_apics"] = {
            str(cpu): {"physical_id": pid, "logical_id": lid, "read_from_log": cpu in stated}
            for cpu, pid, lid, _ in rows
        }
        return pl.DataFrame(
            rows,
            schema={"target": pl.Int32, "physical": pl.Int64, "logical": pl.Int64, "on": pl.UInt64},
            orient="row",
        )

    def _observe(self, *, complete: bool, flat: bool) -> None:
        seen = self.observed

        def shown(table: str, *kinds: str, conf: int = 100, how: str = "") -> None:
            if table in self.tables:
                seen.update({kind: Observation(conf, how or table) for kind in kinds})

        ids = "destinations by LDR and APIC id" if complete else "no LDR in the log: logical id taken as 1 << cpu"
        shown("ioapic_set_irq", "ioapic.line")
        shown("ioapic_reg", "ioapic.rte", how="ioapic_mem_write, both halves")
        shown("ioapic_eoi_broadcast", "ioapic.eoi")
        if {"ioapic_set_remote_irr", "ioapic_clear_remote_irr"} & self.tables:
            seen["ioapic.remote_irr"] = Observation(100, "ioapic_set_remote_irr, ioapic_clear_remote_irr")
        shown("apic_deliver_irq", "ioapic.message")
        if flat:
            how = f"apic_deliver_irq and ICR: {ids}"
            shown("apic_deliver_irq", "lapic.accept", conf=80 if complete else 50, how=how)
        shown("lapic_reg", "lapic.eoi", "lapic.tpr", "lapic.reset", "lapic.snapshot", how="lapic_reg")
        shown("hpet_reg", "hwhpet.cmp", "hwhpet.config", "hwhpet.route_data", "hwhpet.route_addr", how="hpet_reg")
        if "hpet_reg" in self.tables:
            self._observe_hpet()

    def _observe_hpet(self) -> None:
        hpet = self.records.scan("hpet_reg").filter(pl.col("write")).with_columns(reg=pl.col("reg").cast(pl.String))
        few = hpet.filter(pl.col("reg").is_in(["TN_CONFIG", "GENERAL_CONFIG", "TN_FSB_ADDR", "TN_FSB_VALUE"])).collect()
        programmed = hpet.filter(pl.col("reg") == "TN_CMP", ~pl.col("high")).group_by("timer", "cpu").len().collect()
        if few["legacy"].any() and "ioapic_set_irq" in self.tables:
            how = "the line of a comparator under legacy replacement rises"
            self.observed["hwhpet.fire"] = Observation(80, how)
        self.facts["hpet_block"] = {
            "comparators_with_message_route": sorted(set(few.filter(pl.col("fsb"))["timer"].to_list())),
            "legacy_replacement": bool(few["legacy"].any()),
            "comparator_writes": {
                f"timer {timer} by cpu {cpu}": count
                for timer, cpu, count in programmed.sort("timer", "cpu", nulls_last=True).iter_rows()
            },
        }
        if few["fsb"].any():
            programs = Observation(50, "comparator write; its owner is the message's destination")
            self.observed.update({"hpet.program": programs, "hpet.retarget": Observation(100, "TN_FSB_ADDR")})

    # -- slices ------------------------------------------------------------------------------------------------

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Canonical events of the lines `lo` to `hi`."""
        self._load_reports(lo, hi)
        yield from self._ioapic(lo, hi)
        yield from self._messages(lo, hi)
        yield from self._lapics(lo, hi)
        yield from self._hpet(lo, hi)

    def _slice(self, name: str, lo: int, hi: int, *columns: str) -> pl.DataFrame | None:
        if name not in self.tables:
            return None
        frame = (
            self.records.scan(name)
            .filter(pl.col("seq").is_between(lo, hi, closed="left"))
            .select(*_COMMON, *columns)
            .collect()
        )
        return frame if frame.height else None

    def _ioapic(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        lines = self._slice("ioapic_set_irq", lo, hi, "pin", "level")
        if lines is not None:
            before = pl.col("pin").replace_strict(self.levels, default=None, return_dtype=pl.Int8)
            last = lines.group_by("pin").agg(pl.col("level").last()).iter_rows()
            # A line that is low and is set low again is written all the time and means nothing.
            lines = lines.filter(
                (pl.col("level") != 0) | (pl.col("level").shift(1).over("pin").fill_null(before).ne_missing(0))
            )
            self.levels.update(last)
            pin = pl.when(pl.col("pin") == 0).then(TIMER_PIN).otherwise("pin")
            yield event(lines, "ioapic.line", "ioapic_set_irq", obj=pin, val=pl.col("level"))
        yield from self._entries(lo, hi)
        for name, value in (("ioapic_set_remote_irr", 1), ("ioapic_clear_remote_irr", 0)):
            frame = self._slice(name, lo, hi, "pin")
            if frame is not None:
                yield event(frame, "ioapic.remote_irr", name, obj=pl.col("pin"), val=value)
        frame = self._slice("ioapic_eoi_broadcast", lo, hi, "vector")
        if frame is not None:
            yield event(frame, "ioapic.eoi", "ioapic_eoi_broadcast", obj=pl.col("vector"))

    def _entries(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Both halves of an entry at each write of one; the other is the last one written."""
        frame = self._slice("ioapic_reg", lo, hi, "pin", "value", "reg", "write")
        if frame is None:
            return
        frame = frame.with_columns(reg=pl.col("reg").cast(pl.String)).filter(
            pl.col("write") & pl.col("reg").is_in(["RTE_LO", "RTE_HI"])
        )
        value = pl.col("value").cast(pl.Int64)
        schema = {"pin": pl.UInt8, "low0": pl.Int64, "high0": pl.Int64}
        known = pl.DataFrame([(p, a, b) for p, (a, b) in self.entries.items()], schema=schema, orient="row")
        frame = (
            frame.with_columns(
                low=pl.when(pl.col("reg") == "RTE_LO").then(value).forward_fill().over("pin"),
                high=pl.when(pl.col("reg") == "RTE_HI").then(value).forward_fill().over("pin"),
            )
            .join(known, on="pin", how="left", maintain_order="left")
            .with_columns(low=pl.coalesce("low", "low0"), high=pl.coalesce("high", "high0"))
        )
        for pin, low, high in frame.group_by("pin").agg(pl.col("low", "high").last()).iter_rows():
            self.entries[pin] = (low, high)
        frame = frame.filter(pl.col("low").is_not_null())
        # The word is a signed 64-bit integer: the upper half is shifted as such.
        upper = pl.col("high").fill_null(0)
        upper = pl.when(upper >= 1 << 31).then(upper - (1 << 32)).otherwise(upper) * (1 << 32)
        yield event(
            frame, "ioapic.rte", "ioapic_mem_write", obj=pl.col("pin"), val=pl.col("low") & 0xFF,
            val2=upper + pl.col("low"), flags=pl.when(pl.col("high").is_null()).then(UPPER_UNKNOWN).otherwise(0),
        )  # fmt: skip

    def _messages(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Messages on the bus, and the local APICs that take them."""
        columns = ("dest", "dest_mode", "delivery_mode", "vector", "trigger_mode")
        frame = self._slice("apic_deliver_irq", lo, hi, "tid", *columns)
        if frame is None:
            return
        frame = frame.with_columns(pl.col(*columns).cast(pl.Int64), shorthand=pl.lit(0))
        mode = pl.col("dest_mode") + pl.col("delivery_mode") * 256 + pl.col("trigger_mode") * 32768
        yield event(
            frame, "ioapic.message", "apic_deliver_irq", obj=pl.col("vector"), tgt=pl.col("dest"), val=mode
        )
        yield from self._accepts(frame, "apic_deliver_irq")

    def _accepts(self, frame: pl.DataFrame, raw: str) -> Iterator[pl.DataFrame]:
        """One accept for each local APIC that a message reaches; a lowest-priority one only if one CPU is named."""
        if "lapic.accept" not in self.observed:
            return
        frame = frame.filter(pl.col("delivery_mode").is_in([FIXED, LOWEST_PRIORITY]))
        if not frame.height or not self.targets.height:
            return
        both = frame.join(self.targets, how="cross", maintain_order="left").filter(_reaches())
        alone = pl.len().over("seq") == 1
        both = both.filter((pl.col("delivery_mode") == FIXED) | alone, pl.col("seq") >= pl.col("on"))
        flags = pl.when(pl.col("trigger_mode") == 1).then(LEVEL_FLAG).otherwise(0)
        yield event(
            self._merged(both), "lapic.accept", raw, cpu=pl.col("target"), obj=pl.col("vector"), rank=1,
            flags=flags + pl.col("irr"),
            conf=self.observed["lapic.accept"].conf,
        )  # fmt: skip

    def _merged(self, accepts: pl.DataFrame) -> pl.DataFrame:
        """`irr`: whether IRR had the vector. The counter in the report behind a message grows if it had not.

        There is one report for each local APIC reached, in the order of their numbers.
        """
        reports = self.reports
        if reports is None or not accepts.height:
            return accepts.with_columns(irr=pl.lit(0))
        first = reports["seq"].search_sorted(accepts["seq"], side="right").cast(pl.Int64)
        nth = accepts.select(n=pl.int_range(pl.len()).over("seq"))["n"]
        at = (first + nth).clip(upper_bound=reports.height - 1)
        beyond = (first + nth) >= reports.height
        seq, tid, irr = (reports[name].gather(at) for name in ("seq", "tid", "irr"))
        near = (seq.cast(pl.Int64) - accepts["seq"].cast(pl.Int64) - nth) <= 1
        return accepts.with_columns(
            irr=pl.when(pl.Series(near & ~beyond) & pl.col("tid").eq_missing(tid)).then(irr).otherwise(0)
        )

    def _load_reports(self, lo: int, hi: int) -> None:
        """Reports of the slice and a few lines beyond, with what each says of IRR."""
        self.reports = None
        if "apic_report_irq_delivered" not in self.tables:
            return
        frame = (
            self.records.scan("apic_report_irq_delivered")
            .filter(pl.col("seq").is_between(lo, hi + REPORT_REACH, closed="left"))
            .select("seq", "tid", "coalescing")
            .collect()
        )
        if not frame.height:
            return
        before = pl.col("coalescing").shift(1).fill_null(self.coalescing)
        # A device resets the counter (apic_reset_irq_delivered): then it is 0 only if the bit was set.
        count = pl.col("coalescing")
        same = pl.when(count < before).then(count == 0).otherwise(count == before)
        self.reports = frame.with_columns(irr=pl.when(same).then(MERGED_FLAG).otherwise(FRESH_FLAG))
        inside = frame.filter(pl.col("seq") < hi)
        if inside.height:
            self.coalescing = int(inside["coalescing"][-1])

    def _lapics(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        columns = ("tid", "reg", "write", "value", "vector", "delivery_mode", "dest_mode", "shorthand", "dest")
        frame = self._slice("lapic_reg", lo, hi, *columns)
        if frame is None:
            return
        frame = frame.filter(pl.col("cpu").is_not_null()).with_columns(reg=pl.col("reg").cast(pl.String))
        read = frame.filter(~pl.col("write") & pl.col("reg").str.starts_with("TMR"))
        yield event(
            read, "lapic.snapshot", "apic_mem_readl", obj=TMR, tgt=pl.col("reg").str.slice(3).cast(pl.Int32),
            val=pl.col("value"),
        )  # fmt: skip
        frame = frame.filter(pl.col("write"))
        yield event(frame.filter(pl.col("reg") == "EOI"), "lapic.eoi", "apic_mem_writel")
        yield event(frame.filter(pl.col("reg") == "TPR"), "lapic.tpr", "apic_mem_writel", val=pl.col("value"))
        yield from self._ipis(frame.filter(pl.col("reg").is_in(["ICR_LO", "ICR_HI"])))

    def _ipis(self, frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """A write to ICR_LO sends; ICR_HI holds the destination."""
        if not frame.height:
            return
        before = pl.col("cpu").replace_strict(self.icr_high, default=0, return_dtype=pl.Int64)
        high = pl.when(pl.col("reg") == "ICR_HI").then("dest").forward_fill().over("cpu")
        frame = frame.with_columns(dest=high.cast(pl.Int64).fill_null(before))
        self.icr_high.update(frame.group_by("cpu").agg(pl.col("dest").last()).iter_rows())
        sent = frame.filter(pl.col("reg") == "ICR_LO").with_columns(
            pl.col("vector", "delivery_mode", "dest_mode").cast(pl.Int64), trigger_mode=pl.lit(0, pl.Int64)
        )
        yield from self._accepts(sent, "apic_mem_writel")
        init = sent.filter(
            (pl.col("delivery_mode") == INIT) & (pl.col("value").cast(pl.Int64) & LEVEL_ASSERT != 0)
        )
        if init.height and self.targets.height:
            reached = init.join(self.targets, how="cross", maintain_order="left").filter(_reaches())
            yield event(reached, "lapic.reset", "apic_mem_writel", cpu=pl.col("target"))

    def _hpet(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        columns = ("reg", "write", "timer", "high", "value", "legacy", "fsb", "vector", "dest")
        frame = self._slice("hpet_reg", lo, hi, *columns)
        general = None
        if frame is not None:
            frame = frame.filter(pl.col("write") & ~pl.col("high").fill_null(False)).with_columns(
                reg=pl.col("reg").cast(pl.String)
            )
            timer, value = pl.col("timer"), pl.col("value")
            raw = "memory_region_ops_write"
            general = frame.filter(pl.col("reg") == "GENERAL_CONFIG")
            yield event(general, "hwhpet.config", raw, obj=pl.lit(None), val=value)
            yield event(frame.filter(pl.col("reg") == "TN_CONFIG"), "hwhpet.config", raw, obj=timer, val=value)
            yield event(frame.filter(pl.col("reg") == "TN_CMP"), "hwhpet.cmp", raw, obj=timer, val=value)
            yield event(frame.filter(pl.col("reg") == "TN_FSB_VALUE"), "hwhpet.route_data", raw, obj=timer, val=value)
            address = frame.filter(pl.col("reg") == "TN_FSB_ADDR")
            yield event(address, "hwhpet.route_addr", raw, obj=timer, val=value)
            yield from self._channels(frame, address)
        yield from self._fires(general, lo, hi)

    def _channels(self, frame: pl.DataFrame, address: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """S1: a comparator with a message route is a channel; the message's destination is its CPU."""
        if "hpet.retarget" not in self.observed:
            return
        lookup = dict(self.targets.select("physical", "target").iter_rows())
        cpu = pl.col("dest").replace_strict(lookup, default=None, return_dtype=pl.Int32)
        raw = "memory_region_ops_write"
        yield event(address, "hpet.retarget", raw, obj=pl.col("timer"), tgt=cpu, rank=1)
        routed = self.facts["hpet_block"]["comparators_with_message_route"]
        compare = frame.filter((pl.col("reg") == "TN_CMP") & pl.col("timer").is_in(routed))
        yield event(compare, "hpet.program", raw, obj=pl.col("timer"), rank=1, conf=50)

    def _fires(self, general: pl.DataFrame | None, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Under legacy replacement comparators 0 and 1 drive GSI 0 and 8 instead of PIT and RTC."""
        if "hwhpet.fire" not in self.observed:
            return
        lines = self._slice("ioapic_set_irq", lo, hi, "pin", "level")
        if lines is not None:
            gsis = {gsi: timer for timer, gsi in LEGACY_GSI.items()}
            risen = lines.filter(pl.col("level") == 1, pl.col("pin").is_in(list(gsis))).with_columns(
                timer=pl.col("pin").replace_strict(gsis, return_dtype=pl.Int32)
            )
            if general is None or not general.height:
                on = risen.with_columns(legacy=pl.lit(self.legacy))
            else:
                on = risen.join_asof(general.select("seq", "legacy"), on="seq").with_columns(
                    pl.col("legacy").fill_null(self.legacy)
                )
            fired = on.filter("legacy")
            yield event(fired, "hwhpet.fire", "ioapic_set_irq", obj=pl.col("timer"), conf=80, rank=-1)
        if general is not None and general.height:
            self.legacy = bool(general["legacy"][-1])


def _reaches() -> pl.Expr:
    """Whether a message or ICR write reaches the local APIC `target` (flat logical ids are masks; 0xff: all)."""
    direct = (
        pl.when(pl.col("dest_mode") == 1)
        .then((pl.col("dest") & pl.col("logical")) != 0)
        .otherwise((pl.col("dest") == pl.col("physical")) | (pl.col("dest") == 0xFF))
    )
    # ICR_LO shorthand: 0 the destination, 1 self, 2 all, 3 all but self.
    own = pl.col("cpu") == pl.col("target")
    kind = pl.col("shorthand").cast(pl.Int64).fill_null(0)
    return pl.when(kind == 0).then(direct).when(kind == 1).then(own).when(kind == 2).then(pl.lit(True)).otherwise(~own)
