"""QEMU device trace of an Arm machine: GICv2, physical and virtual, and the vGIC that runs on it (spec S6.3, S3, M).

What the guest writes to its virtual distributor is not in the log; what the hypervisor then does is. So the guest's
write to ITARGETSR is inferred: when Xen moves the physical interrupt. If Xen does that as the next thing after it
found the interrupt's list register empty, it completes a migration and the guest wrote earlier (`vgic.itargets` is
then placed at the last entry of another core, with the possible time before it as its error).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import polars as pl

from replay.binding.base import Records, event
from replay.coverage import Observation

__all__ = ["HOLD_NS", "TABLES", "Binder"]

#: Tables that only an Arm log has.
TABLES: Final = frozenset({"gic_cpu_read", "gic_cpu_write", "gic_dist_write", "gic_hyp_write", "gic_set_irq"})
#: How far before its record an inferred event may lie (ns).
HOLD_NS: Final = 100_000_000

#: Lines around a slice in which the reason of an entry, or the way to a move, is looked for.
REACH: Final = 8192
ERR_LIMIT: Final = (1 << 32) - 1

PRIVATE: Final = 32
FIRST_SPECIAL: Final = 1020
VIRTUAL: Final = 1
HYPERVISOR: Final = 2
SGI_EVENT_CHECK: Final = 0  # GIC_SGI_EVENT_CHECK
MAINTENANCE: Final = 25  # PPI of GICH, by convention of the boards
_COMMON: Final = ("seq", "t_ns", "t_err_ns", "cpu", "offset")

#: Confidence of "vcpu i runs on core i", and of a guest's write that only its effect shows.
CONF_PLACE: Final = 80
CONF_EFFECT: Final = 50


class Binder:
    """Events of the Arm half; what a slice must know of the lines before it is carried along."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.tables = records.tables()
        self.facts: dict[str, Any] = {}
        self.observed: dict[str, Observation] = {}
        self.targets: dict[int, int] = {}  # of SPIs: mask of cores
        #: of list registers (core, number): word written last, and whether the hypervisor has found it empty since
        self.loaded: dict[tuple[int, int], tuple[int, bool]] = {}
        #: The end of the slice before: accesses to GICH, loads, clears and entries.
        self.tail: dict[str, pl.DataFrame] = {}
        self.routed = self._survey()

    # -- survey ------------------------------------------------------------------------------------------------

    def _survey(self) -> frozenset[int]:
        """SPIs that the hypervisor gives to a guest: those that a list register ties to a physical interrupt."""
        seen = self.observed

        def shown(table: str, *kinds: str, conf: int = 100, how: str = "") -> None:
            if table in self.tables:
                seen.update({kind: Observation(conf, how or table) for kind in kinds})

        shown("gic_set_irq", "gic.line")
        shown("gic_dist_write", "gic.dist", "gic.sgi")
        shown("gic_cpu_write", "gic.cpu_if", "gic.eoi", "gic.dir")
        shown("gic_cpu_read", "gic.ack", how="IAR read")
        shown("gic_update_bestirq", "gic.best")
        self.facts["gic_config"] = {"irqs": self._interrupts(), "latch_pinned": 1}
        if "gich_reg" not in self.tables:
            return frozenset()
        shown("gich_reg", "gic.hyp_read", how="gic_hyp_read")
        registers = self.records.scan("gich_reg").filter(pl.col("reg").cast(pl.String) == "LR")
        routed = registers.filter("hw").select(pl.col("virq").unique().sort()).collect()["virq"].to_list()
        cores = registers.select(pl.col("cpu").max()).collect()["cpu"].max()
        vcpus = 1 + (cores if isinstance(cores, int) else 0)
        place = "vcpu i taken to run on core i"
        shown("gic_set_irq", "vgic.phys_irq", how="the line of an SPI that list registers name rises")
        shown("gich_reg", "vgic.lr_write", conf=CONF_PLACE, how=f"GICH_LR written, {place}")
        shown("gich_reg", "vgic.lr_clear", conf=CONF_PLACE, how="GICH_LR read back empty")
        shown("gich_reg", "vgic.hyp_entry", conf=CONF_PLACE, how="GICH_HCR read, as every entry does")
        shown("gic_cpu_read", "vgic.ack", conf=CONF_PLACE, how=f"GICV_IAR read, {place}")
        shown("gic_cpu_write", "vgic.eoi", conf=CONF_PLACE, how=f"GICV_EOIR written, {place}")
        shown("gic_cpu_read", "vgic.maint", how="IAR returned the maintenance interrupt")
        shown("gic_dist_write", "vgic.affinity", how="GICD_ITARGETSR written by the hypervisor")
        shown("gic_dist_write", "vgic.sgi", how="GICD_SGIR, event check")
        shown("gic_dist_write", "vgic.itargets", conf=CONF_EFFECT, how="inferred from the physical move that follows")
        self.facts["vgic_routed_spis"] = routed
        self.facts["vgic_placement"] = place
        self.facts["vgic_config"] = {"vcpus": vcpus, **self._latencies(routed)}
        return frozenset(int(irq) for irq in routed)

    def _interrupts(self) -> int:
        """How many interrupts the distributor has, as far as the log names them; a multiple of 32 (GICD_TYPER)."""
        highest = PRIVATE - 1
        if "gicd_reg" in self.tables:
            last = pl.col("irq_first").cast(pl.Int64) + pl.col("irq_count") - 1
            # Loops over all 1,020 initialise registers that are not there.
            named = self.records.scan("gicd_reg").filter(pl.col("reg").cast(pl.String) != "OTHER").select(last.max())
            highest = max(highest, int(named.collect().item() or 0))
        if "gic_set_irq" in self.tables:
            lines = self.records.scan("gic_set_irq").select(pl.col("irq").cast(pl.Int64).max())
            highest = max(highest, int(lines.collect().item() or 0))
        return min((highest // 32 + 1) * 32, FIRST_SPECIAL)

    def _latencies(self, routed: list[int]) -> dict[str, int]:
        """Median times of the guest, for what-if runs: from the load of a list register to IAR, from IAR to EOIR."""
        if not {"gicc_reg", "gich_reg"} <= self.tables or not routed:
            return {}
        words = ("seq", "t_ns", "cpu")
        guest = self.records.scan("gicc_reg").filter("virtual", pl.col("irq").is_in(routed))
        loads = self.records.scan("gich_reg").filter("write", pl.col("virq").is_in(routed), pl.col("state") == 1)
        frame = (
            pl.concat([
                loads.select(*words, irq="virq", what=pl.lit("load")),
                guest.select(*words, "irq", what=pl.col("reg").cast(pl.String)),
            ])
            .filter(pl.col("what").is_in(["load", "IAR", "EOIR"]))
            .sort("seq")
            .with_columns(before=pl.col("what").shift().over("cpu", "irq"), dt=pl.col("t_ns").diff().over("cpu", "irq"))
            .filter(pl.concat_str("before", "what").is_in(["loadIAR", "IAREOIR"]))
            .group_by("what")
            .agg(pl.col("dt").median())
            .collect()
        )  # fmt: skip
        names = {"IAR": "ack_ns", "EOIR": "eoi_ns"}
        return {names[what]: max(1, int(dt)) for what, dt in frame.sort("what").iter_rows()}

    # -- slices ------------------------------------------------------------------------------------------------

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Canonical events of the lines `lo` to `hi`."""
        lines = self._slice("gic_set_irq", lo, hi, "irq", "level", "cpumask")
        cpu_if = self._slice("gicc_reg", lo, hi, "write", "virtual", "core", "reg", "reg_offset", "value", "irq")
        dist = self._slice("gicd_reg", lo, hi, "write", "reg", "reg_offset", "value", "size", "irq_first", "irq_count",
                           "sgi", "sgi_targets", "sgi_filter")  # fmt: skip
        hyp = self._slice("gich_reg", lo, hi, "write", "reg", "reg_offset", "lr", "value", "virq", "state", "hw")
        if lines is not None:
            yield from self._lines(lines)
        if cpu_if is not None:
            yield from self._interfaces(cpu_if)
        if dist is not None:
            yield from self._distributor(dist)
        best = self._slice("gic_update_bestirq", lo, hi, "iface", "core", "irq", "priority", "running")
        if best is not None:
            flags = pl.when(pl.col("iface") == "vcpu").then(VIRTUAL).otherwise(0)
            yield event(
                best, "gic.best", "gic_update_bestirq", cpu=pl.col("core"), obj=pl.col("irq"),
                val=pl.col("priority"), val2=pl.col("running"), flags=flags,
            )  # fmt: skip
        if hyp is not None:
            yield from self._list_registers(hyp)
            beyond = self._slice("gicc_reg", hi, hi + REACH, "write", "virtual", "core", "reg", "irq")
            later = self._slice("gich_reg", hi, hi + REACH, "write", "reg")
            yield from self._virtual(hyp, cpu_if, dist, beyond, later)

    def _slice(self, name: str, lo: int, hi: int, *columns: str) -> pl.DataFrame | None:
        if name not in self.tables:
            return None
        frame = (
            self.records.scan(name)
            .filter(pl.col("seq").is_between(lo, hi, closed="left"))
            .select(*_COMMON, *columns)
            .collect()
        )
        if "reg" in columns:
            frame = frame.with_columns(pl.col("reg").cast(pl.String))
        return frame if frame.height else None

    # -- physical ----------------------------------------------------------------------------------------------

    def _lines(self, frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
        irq, level = pl.col("irq"), pl.col("level")
        core = pl.col("cpumask").cast(pl.Float64).log(2).round().cast(pl.Int32)
        private = pl.when(irq < PRIVATE).then(core)
        yield event(frame, "gic.line", "gic_set_irq", cpu=private, obj=irq, val=level)
        risen = frame.filter((level == 1) & irq.is_in(list(self.routed)))
        yield event(risen, "vgic.phys_irq", "gic_set_irq", obj=irq, cpu=pl.lit(None), rank=1)

    def _interfaces(self, frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """GICC and GICV: the reads of IAR are outcomes; writes other than EOIR and DIR are register state."""
        flags = pl.when("virtual").then(VIRTUAL).otherwise(0)
        who: dict[str, Any] = {"cpu": pl.col("core"), "flags": flags}
        reg = pl.col("reg")
        acks = frame.filter(~pl.col("write"), reg == "IAR")
        # All 13 bits: an SGI comes with its source.
        word = pl.col("value") & 0x1FFF
        yield event(acks, "gic.ack", "gic_cpu_read", obj=word, **who)
        yield event(frame.filter("write", reg == "EOIR"), "gic.eoi", "gic_cpu_write", obj=word, **who)
        yield event(frame.filter("write", reg == "DIR"), "gic.dir", "gic_cpu_write", obj=word, **who)
        rest = frame.filter("write", ~reg.is_in(["EOIR", "DIR"]))
        yield event(rest, "gic.cpu_if", "gic_cpu_write", obj=pl.col("reg_offset"), val=pl.col("value"), **who)

    def _distributor(self, frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
        writes = frame.filter("write", pl.col("reg") != "SGIR")
        yield event(
            writes, "gic.dist", "gic_dist_write", obj=pl.col("irq_first"), tgt=pl.col("reg_offset"),
            val=pl.col("value"), val2=pl.col("size"),
        )  # fmt: skip
        sgis = frame.filter("write", pl.col("reg") == "SGIR")
        # The register as it was written: the filter may mean all others, or self.
        yield event(sgis, "gic.dist", "gic_dist_write", obj=pl.col("sgi"), tgt=pl.col("reg_offset"),
                    val=pl.col("value"), val2=pl.col("size"))  # fmt: skip
        one = sgis.filter(pl.col("sgi_filter") == 0).with_columns(to=pl.col("sgi_targets").cast(pl.Int64))
        for core in range(8):
            to = one.filter(pl.col("to") // (1 << core) % 2 == 1)
            yield event(to, "gic.sgi", "gic_dist_write", tgt=core, obj=pl.col("sgi"), rank=1)
            if "vgic.sgi" in self.observed:
                yield event(to.filter(pl.col("sgi") == SGI_EVENT_CHECK), "vgic.sgi", "gic_dist_write", tgt=core, rank=1)

    def _list_registers(self, frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
        reads = frame.filter(~pl.col("write"))
        yield event(reads, "gic.hyp_read", "gic_hyp_read", obj=pl.col("reg_offset"), val=pl.col("value"))
        writes = frame.filter("write")
        yield event(
            writes, "gic.cpu_if", "gic_hyp_write", obj=pl.col("reg_offset"), val=pl.col("value"), flags=HYPERVISOR
        )

    # -- virtual -----------------------------------------------------------------------------------------------

    def _virtual(
        self, hyp: pl.DataFrame, cpu_if: pl.DataFrame | None, dist: pl.DataFrame | None, beyond: pl.DataFrame | None,
        later: pl.DataFrame | None,
    ) -> Iterator[pl.DataFrame]:  # fmt: skip
        """The guest's interrupts that are tied to physical ones (the others never reach another vcpu)."""
        if not self.routed:
            return
        routed = list(self.routed)
        cleared, loads = self._registers(hyp.filter(pl.col("reg") == "LR", pl.col("cpu").is_not_null()))
        place: dict[str, Any] = {"vcpu": pl.col("cpu"), "conf": CONF_PLACE}
        yield event(
            loads, "vgic.lr_write", "gic_hyp_write", obj=pl.col("virq"), tgt=pl.col("lr"), val=pl.col("value"), **place
        )
        yield event(cleared, "vgic.lr_clear", "gic_hyp_read", obj=pl.col("virq"), tgt=pl.col("lr"), **place)
        if cpu_if is not None:
            guest = cpu_if.filter("virtual", pl.col("irq").is_in(routed))
            who: dict[str, Any] = {"cpu": pl.col("core"), "vcpu": pl.col("core"), "conf": CONF_PLACE, "rank": 1}
            acks = guest.filter(~pl.col("write"), pl.col("reg") == "IAR")
            yield event(acks, "vgic.ack", "gic_cpu_read", obj=pl.col("irq"), **who)
            eois = guest.filter("write", pl.col("reg") == "EOIR")
            yield event(eois, "vgic.eoi", "gic_cpu_write", obj=pl.col("irq"), **who)
            maint = cpu_if.filter(~pl.col("write"), ~pl.col("virtual"), pl.col("irq") == MAINTENANCE)
            yield event(maint, "vgic.maint", "gic_cpu_read", rank=1)
        reads = [f.select("seq", "write", "virtual", "core", "reg", "irq") for f in (cpu_if, beyond) if f is not None]
        entries = self._entries(hyp, pl.concat(reads) if reads else None, later)
        yield event(entries.filter("own"), "vgic.hyp_entry", "gic_hyp_read", **place)
        around = {
            "hyp": hyp.select("seq", "cpu"), "loads": loads.select("seq", "cpu", "virq"),
            "cleared": cleared.select("seq", "cpu", "virq"), "entries": entries,
        }  # fmt: skip
        around = {name: pl.concat([self.tail[name], f]) if self.tail else f for name, f in around.items()}
        if dist is not None:
            yield from self._moves(dist, around["hyp"], around["loads"], around["cleared"], around["entries"])
        self.tail = {name: f.tail(REACH) for name, f in around.items()}

    def _registers(self, frame: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Loads of routed interrupts, and the reads at which the hypervisor finds such a list register empty.

        A restore of saved registers writes words that are in place already, or empty ones: no load.
        """
        cleared: list[int] = []
        loads: list[int] = []
        columns = ("cpu", "lr", "write", "value")
        rows = frame.select(pl.int_range(pl.len()), *columns).iter_rows()
        loaded = self.loaded
        for index, cpu, lr, write, value in rows:
            word, empty = loaded.get((cpu, lr), (0, True))
            virq = value & 0x3FF
            if write:
                if not value >> 28 & 3:
                    if virq != word & 0x3FF:
                        loaded[(cpu, lr)] = (value, True)
                elif virq in self.routed:
                    if word != value or empty:
                        loads.append(index)
                    loaded[(cpu, lr)] = (value, False)
                else:
                    loaded[(cpu, lr)] = (value, True)
            elif not value >> 28 & 3 and not empty and virq == word & 0x3FF:
                cleared.append(index)
                loaded[(cpu, lr)] = (word, True)
        return frame[cleared], frame[loads]

    def _entries(
        self, hyp: pl.DataFrame, cpu_if: pl.DataFrame | None, later: pl.DataFrame | None
    ) -> pl.DataFrame:
        """Entries into the hypervisor. `own`: for a reason of the guest's own, not one that the vGIC brought about.

        The physical interrupt that is acknowledged before the next entry is the reason; a routed SPI or an event
        check is an outcome and not a trap (spec S3.7).
        """
        both = [f.select(*_COMMON, "write", "reg") for f in (hyp, later) if f is not None]
        entry = pl.concat(both).filter(~pl.col("write"), pl.col("reg") == "HCR", pl.col("cpu").is_not_null())
        entry = entry.select(*_COMMON)
        end = hyp["seq"].max()
        if cpu_if is None:
            return entry.filter(pl.col("seq") <= end).with_columns(own=pl.lit(True))
        taken = cpu_if.filter(~pl.col("write"), ~pl.col("virtual"), pl.col("reg") == "IAR")
        taken = taken.select("seq", cpu=pl.col("core"), irq="irq").with_columns(pl.col("cpu").cast(entry["cpu"].dtype))
        brought = [*self.routed, SGI_EVENT_CHECK]
        rows = pl.concat([entry, taken], how="diagonal").sort("seq")
        rows = rows.with_columns(reason=pl.col("irq").shift(-1).over("cpu"))
        return rows.filter(pl.col("irq").is_null(), pl.col("seq") <= end).select(
            *_COMMON, own=pl.col("reason").is_in(brought).fill_null(False).not_()
        )

    def _moves(
        self, dist: pl.DataFrame, hyp: pl.DataFrame, loads: pl.DataFrame, cleared: pl.DataFrame, entries: pl.DataFrame
    ) -> Iterator[pl.DataFrame]:
        """Physical moves of routed SPIs, and the guest's writes that they answer. Some a second: a loop is fine."""
        moves = dist.filter(
            "write", pl.col("reg") == "ITARGETSR", pl.col("size") == 1, pl.col("irq_first").is_in(list(self.routed))
        )
        if not moves.height:
            return
        inferred: list[dict[str, Any]] = []
        affinity: list[dict[str, Any]] = []
        hyp_seq, hyp_cpu = hyp["seq"], hyp["cpu"]
        for row in moves.select(*_COMMON, "value", "irq_first").iter_rows(named=True):
            mask, irq = row["value"], row["irq_first"]
            if not mask:
                continue
            new = (mask & -mask).bit_length() - 1
            old = self.targets.get(irq)
            self.targets[irq] = new
            affinity.append({**row, "new": new, "old": old})
            # The last access to GICH by this core before the move.
            before = int(hyp_seq.search_sorted(row["seq"]))
            while before > 0 and hyp_cpu[before - 1] != row["cpu"]:
                before -= 1
            last = hyp_seq[before - 1] if before > 0 else None
            found = cleared.filter(pl.col("seq") == last, pl.col("virq") == irq)
            if not found.height:
                inferred.append({**row, "new": new, "writer": row["cpu"], "err": 0})
                continue
            load = loads.filter(pl.col("seq") < last, pl.col("virq") == irq, pl.col("cpu") == row["cpu"])
            since = load["seq"][-1] if load.height else 0
            earlier = entries.filter(
                pl.col("seq").is_between(since, last), pl.col("cpu") != row["cpu"], "own",
                pl.col("t_ns") > row["t_ns"] - HOLD_NS,
            )  # fmt: skip
            if earlier.height:
                first, t, writer = earlier["t_ns"][0], earlier["t_ns"][-1], earlier["cpu"][-1]
                inferred.append({**row, "new": new, "t_ns": t, "writer": writer, "err": min(t - first, ERR_LIMIT)})
        schema: dict[str, Any] = {**moves.select(*_COMMON).schema, "irq_first": pl.Int64, "new": pl.Int64}
        wrote = pl.DataFrame(affinity, schema={**schema, "old": pl.Int64})
        yield event(
            wrote, "vgic.affinity", "gic_dist_write", obj=pl.col("irq_first"), tgt=pl.col("new"), val=pl.col("old"),
            rank=3,
        )  # fmt: skip
        guest = pl.DataFrame(inferred, schema={**schema, "writer": pl.Int64, "err": pl.Int64})
        # At its own trap the write comes after the entry's look at the list registers.
        yield event(
            guest, "vgic.itargets", "gic_dist_write", obj=pl.col("irq_first"), tgt=pl.col("new"), rank=2,
            vcpu=pl.col("writer"), cpu=pl.col("writer"), t_err_ns=pl.col("err"), conf=CONF_EFFECT,
        )  # fmt: skip
