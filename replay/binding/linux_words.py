"""Shared event-channel words sampled by probes: pend<w>, mask<w>, sel<v>, up<v>, um<v>; FIFO ready<v>, h7_<v>.

A probe reads its words one after the other, some microseconds after its stamp. What belongs to the CPU that the probe
ran on is exact; words of other CPUs are believed only when those CPUs recorded nothing close by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import polars as pl

from replay.binding.base import event
from replay.binding.linux_probes import KEEP, Source
from replay.coverage import Observation
from replay.hardware.evtchn_two_level import (
    SNAP_ABI,
    SNAP_MASK,
    SNAP_PENDING,
    SNAP_SEL,
    SNAP_UPCALL_MASK,
    SNAP_UPCALL_PENDING,
)

__all__ = ["ABI_WORDS", "Words"]

#: `obj` of the snapshot that names the ABI.
ABI_WORDS: Final = SNAP_ABI
#: Words of other CPUs count when those recorded nothing this close to the sample (ns).
QUIET_NS: Final = 200_000
#: How long an inconsistent state must last in sampled words before it is believed (ns).
RESOLUTION_NS: Final = 1_000_000
#: Bits of an event-channel word (x86-64, Arm64).
BITS: Final = 64
#: Queue of FIFO priority 7, the default and the only one that the recipe samples.
SAMPLED_QUEUE: Final = 7

_WORD: Final = re.compile(r"(pend|mask|sel|up|um|ready|h7_)(\d{1,3})\Z")
_PER_VCPU: Final = {"sel": SNAP_SEL, "up": SNAP_UPCALL_PENDING, "um": SNAP_UPCALL_MASK}
_SHARED: Final = {"pend": SNAP_PENDING, "mask": SNAP_MASK}


@dataclass(slots=True)
class _Port:
    """Where a port's pending bit stood at the end of the slice before: 0, 1, or -1 unknown."""

    bit: int = -1


@dataclass(slots=True)
class Words:
    """The sampled words of one recording. `names` maps a prefix to the numbers sampled; `scans` are entries at which
    upcall_pending has just been cleared."""

    source: Source
    abi: str
    dom: int
    tables: list[tuple[str, bool, str]]  # (table, whether a return probe, symbol)
    names: dict[str, list[int]]
    resolution_ns: int = RESOLUTION_NS
    ports: dict[int, _Port] = field(default_factory=dict)

    @staticmethod
    def find(source: Source, abi: str, dom: int) -> Words | None:
        """Tables with sampled words, recognised by the names of their fields; None without any."""
        tables: list[tuple[str, bool, str]] = []
        names: dict[str, set[int]] = {}
        for returns, probes in ((False, source.entries), (True, source.returns)):
            for symbol, hits in sorted(probes.items()):
                for probe in hits:
                    found = [m for m in map(_WORD.match, source.fields(probe.table)) if m]
                    if not any(m[1] in ("sel", "ready") for m in found):
                        continue
                    tables.append((probe.table, returns, symbol))
                    for m in found:
                        names.setdefault(m[1], set()).add(int(m[2]))
        if not tables:
            return None
        return Words(source, abi, dom, tables, {k: sorted(v) for k, v in names.items()})

    def observed(self) -> dict[str, Observation]:
        """What the samples show."""
        if self.abi == "fifo":
            how = "words sampled by probes, of the probe's own CPU"
            sampled = (("fifo.ready", "ready"), ("fifo.head", "h7_"))
            return {kind: Observation(80, how) for kind, prefix in sampled if prefix in self.names}
        seen = {"evtchn.snapshot": Observation(80, "words sampled by probes: pend, mask, sel, up, um")}
        if "pend" in self.names:
            how = "a sampled pending bit went 0 to 1; when exactly, and what coalesced, is not recorded"
            seen["evtchn.send"] = Observation(50, how)
            seen["flow.raise"] = Observation(50, how)
        return seen

    def events(
        self, lo: int, hi: int, irq_of_port: Mapping[int, int], handled: pl.DataFrame | None = None
    ) -> Iterator[pl.DataFrame]:
        """Sends and snapshots of the records with lo <= seq < hi; `handled` (KEEP, port) is what was dispatched."""
        samples = self._read(lo, hi)
        if samples is None:
            return
        if self.abi == "fifo":
            yield from self._fifo(samples)
            return
        if "pend" in self.names:
            yield from self._sends(samples, lo, hi, irq_of_port, handled)
        yield from self._own(samples)
        yield from self._foreign(samples)

    def _read(self, lo: int, hi: int) -> pl.DataFrame | None:
        """All samples in order; absent words are null. `returned`: from a return probe, `scan`: inside the loop that
        clears the upcall byte first."""
        wanted = [f"{p}{n}" for p, numbers in self.names.items() for n in numbers]
        parts = []
        window = pl.col("seq").is_between(lo, hi, closed="left")
        for table, returns, symbol in self.tables:
            names = self.source.fields(table)
            exprs = [
                pl.col(c).cast(pl.UInt64) if c in names else pl.lit(None, pl.UInt64).alias(c) for c in wanted
            ]
            scan = not returns and "handle_events" in symbol
            frame = self.source.records.scan(table).filter(window).select(*KEEP, *exprs).collect()
            if frame.height:
                parts.append(frame.with_columns(returned=pl.lit(returns), scan=pl.lit(scan), symbol=pl.lit(symbol)))
        return pl.concat(parts).sort("seq") if parts else None

    # -- sends ---------------------------------------------------------------------------------------------------

    def _sends(
        self, samples: pl.DataFrame, lo: int, hi: int, irq_of_port: Mapping[int, int], handled: pl.DataFrame | None
    ) -> Iterator[pl.DataFrame]:
        clears = self.source.probe("evtchn_2l_clear_pending", lo, hi, "port")
        found: list[tuple[int, int]] = []  # (row of `samples`, port)
        for word in self.names["pend"]:
            rows = np.flatnonzero(samples[f"pend{word}"].is_not_null().to_numpy())
            if rows.size:
                found += self._risen(samples, rows, word, clears)
        if not found:
            return
        early = self._first_hint(samples)
        index = [int(early[row]) for row, _ in found]
        ports = [port for _, port in found]
        frame = samples.select(KEEP)[index].with_columns(port=pl.Series(ports, dtype=pl.Int64)).sort("seq", "port")
        if handled is not None:
            frame = _before_dispatch(frame, handled, clears)
        raw = "pending bit"
        yield event(frame, "evtchn.send", raw, cpu=None, dom=self.dom, obj=pl.col("port"), conf=50, rank=-3)
        if irq_of_port:
            irq = pl.col("port").replace_strict(
                list(irq_of_port), list(irq_of_port.values()), default=None, return_dtype=pl.Int64
            )
            flows = frame.with_columns(irq=irq).filter(pl.col("irq").is_not_null())
            yield event(flows, "flow.raise", raw, cpu=None, obj=pl.col("irq"), conf=50, rank=-3)

    def _first_hint(self, samples: pl.DataFrame) -> Any:
        """Row at which a send first seen in each row may be placed: the entry of the upcall samples selector and upcall
        byte only, and what they show was sent before it."""
        blank = pl.all_horizontal(*(pl.col(f"pend{w}").is_null() for w in self.names["pend"]))
        frame = samples.with_row_index("row").with_columns(blank=blank).with_columns(
            last=pl.col("row").shift(1).over("cpu"), last_blank=pl.col("blank").shift(1).over("cpu")
        )  # fmt: skip
        hint = pl.when(pl.col("scan") & pl.col("last_blank").fill_null(False)).then(pl.col("last"))
        return frame.select(hint=pl.coalesce(hint, pl.col("row")))["hint"].to_numpy()

    def _risen(
        self, samples: pl.DataFrame, rows: Any, word: int, clears: pl.DataFrame | None
    ) -> list[tuple[int, int]]:
        """Rows at which a pending bit of `word` is first seen set, with the port."""
        values = samples[f"pend{word}"].drop_nulls().to_numpy()  # nulls would make them floats
        seq = samples["seq"].to_numpy()[rows].astype(np.int64)
        when = samples["t_ns"].to_numpy()[rows]
        cpu = samples["cpu"].to_numpy()[rows]
        some = int(np.bitwise_or.reduce(values))
        result: list[tuple[int, int]] = []
        for bit in range(BITS):
            port = word * BITS + bit
            state = self.ports.get(port)
            if not some >> bit & 1 and state is None:
                continue
            state = self.ports.setdefault(port, _Port())
            level = (values >> np.uint64(bit) & np.uint64(1)).astype(np.int8)
            if clears is None:
                c_seq = c_when = c_cpu = np.empty(0, np.int64)
            else:
                mine = clears.filter(pl.col("port") == port)
                c_seq, c_when = mine["seq"].to_numpy().astype(np.int64), mine["t_ns"].to_numpy()
                c_cpu = mine["cpu"].to_numpy()
            last = np.searchsorted(c_seq, seq, side="left") - 1  # clear before each sample
            known = last >= 0
            believed = np.ones(len(seq), bool)
            if known.any():
                at = last[known]
                near = (when[known] - c_when[at] < QUIET_NS) & (cpu[known] != c_cpu[at])
                believed[known] = ~(near & (level[known] == 1))
            after = last + 1  # a sample of another CPU may show the clear that its stamp precedes
            ahead = after < len(c_seq)
            if ahead.any():
                at = after[ahead]
                near = (c_when[at] - when[ahead] < QUIET_NS) & (cpu[ahead] != c_cpu[at])
                believed[ahead] &= ~(near & (level[ahead] == 0))
            keep = np.flatnonzero(believed)
            order_key = np.concatenate((seq[keep] * 2, c_seq * 2 + 1))
            levels = np.concatenate((level[keep], np.zeros(len(c_seq), np.int8)))
            is_clear = np.concatenate((np.zeros(len(keep), bool), np.ones(len(c_seq), bool)))
            row = np.concatenate((rows[keep], np.full(len(c_seq), -1)))
            order = np.argsort(order_key, kind="stable")
            levels, is_clear, row = levels[order], is_clear[order], row[order]
            if not len(levels):
                continue
            before = np.concatenate(([state.bit], levels[:-1]))
            risen = np.flatnonzero((levels == 1) & (before == 0))
            fallen = np.flatnonzero((levels == 0) & (before == 1))
            if risen.size and fallen.size:
                # A bit that falls without a clear was never set: the words of two samples were read out of order.
                nxt = np.searchsorted(fallen, risen)
                closed = nxt < len(fallen)
                real = ~closed | is_clear[fallen[np.minimum(nxt, len(fallen) - 1)]]
                risen = risen[real]
            result += [(int(row[i]), port) for i in risen]
            state.bit = int(levels[-1])
        return result

    # -- snapshots -----------------------------------------------------------------------------------------------

    def _own(self, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Selector and upcall byte of the vCPU that the probe ran on."""
        for prefix, what in _PER_VCPU.items():
            for vcpu in self.names.get(prefix, ()):
                column = f"{prefix}{vcpu}"
                # At the entry of the scan the caller has cleared the byte, but not yet exchanged the selector.
                mine = samples.filter(
                    (pl.col("cpu") == vcpu) & pl.col(column).is_not_null() & ~pl.col("scan")
                )
                yield self._snapshot(mine, column, what, vcpu)

    def _foreign(self, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Words of CPUs that were quiet around the sample; shared words when all others were."""
        active = samples.select("t_ns", "cpu").sort("t_ns")
        quiet: dict[int, pl.Series] = {}
        for vcpu in active["cpu"].unique().sort().to_list():
            times = active.filter(pl.col("cpu") == vcpu)["t_ns"].to_numpy()
            when = samples["t_ns"].to_numpy()
            after = np.searchsorted(times, when, side="left")
            later = np.where(after < len(times), times[np.minimum(after, len(times) - 1)], np.iinfo(np.int64).max)
            earlier = np.where(after > 0, times[np.maximum(after - 1, 0)], np.iinfo(np.int64).min // 2)
            far = (later - when > QUIET_NS) & (when - earlier > QUIET_NS)
            quiet[int(vcpu)] = pl.Series(far)
        for prefix, what in _PER_VCPU.items():
            for vcpu in self.names.get(prefix, ()):
                column = f"{prefix}{vcpu}"
                mask = (samples["cpu"] != vcpu) & samples[column].is_not_null()
                if vcpu in quiet:
                    mask = mask & quiet[vcpu]
                yield self._snapshot(samples.filter(mask), column, what, vcpu)
        others = pl.Series(np.ones(samples.height, bool))
        for vcpu, far in quiet.items():
            others = others & (far | (samples["cpu"] == vcpu))
        for prefix, what in _SHARED.items():
            for number in self.names.get(prefix, ()):
                column = f"{prefix}{number}"
                # The probe's own change comes after the sample.
                frame = samples.filter(others & samples[column].is_not_null())
                yield self._snapshot(frame, column, what, None, number)

    def _snapshot(
        self, frame: pl.DataFrame, column: str, what: int, vcpu: int | None, index: int | None = None
    ) -> pl.DataFrame:
        """evtchn.snapshot: before the event of the same record, after it for a return probe."""
        rank = pl.when(pl.col("returned")).then(1).otherwise(-2)
        return event(
            frame, "evtchn.snapshot", column, dom=self.dom, vcpu=vcpu, obj=what, tgt=index,
            val=pl.col(column).reinterpret(signed=True), conf=80, rank=rank,
        )  # fmt: skip

    def _fifo(self, samples: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """Ready word and head of queue 7 of the probe's own vCPU, outside its loop: inside, the exchange may have
        happened or not."""
        for prefix, kind, queue in (("ready", "fifo.ready", None), ("h7_", "fifo.head", SAMPLED_QUEUE)):
            for vcpu in self.names.get(prefix, ()):
                column = f"{prefix}{vcpu}"
                mine = samples.filter(
                    (pl.col("cpu") == vcpu) & pl.col(column).is_not_null() & pl.col("returned")
                )
                if queue is not None:
                    # The guest never clears the shared head: it is stale while the ready bit is clear.
                    mine = mine.filter((pl.col(f"ready{vcpu}").fill_null(0) & (1 << queue)) != 0)
                yield event(
                    mine, kind, column, dom=self.dom, vcpu=vcpu, tgt=queue,
                    val=pl.col(column).reinterpret(signed=True), conf=80, rank=1,
                )  # fmt: skip


def _before_dispatch(sends: pl.DataFrame, handled: pl.DataFrame, clears: pl.DataFrame | None) -> pl.DataFrame:
    """A bit first seen set between its dispatch and its clear was set before the dispatch, at the latest (U4)."""
    earlier = handled.select(pl.col("seq"), "port", *(pl.col(c).alias(f"of_{c}") for c in KEEP)).sort("seq")
    found = sends.sort("seq").join_asof(earlier, on="seq", by="port", strategy="backward", check_sortedness=False)
    mine = pl.col("of_seq").is_not_null()
    if clears is not None:
        ends = clears.select("seq", "port", cleared=pl.col("seq")).sort("seq")
        found = found.join_asof(  # the clear's own probe samples the words before it acts
            ends, on="seq", by="port", strategy="backward", check_sortedness=False, allow_exact_matches=False
        )
        mine = mine & (pl.col("cleared").is_null() | (pl.col("cleared") < pl.col("of_seq")))
    placed = (pl.when(mine).then(pl.col(f"of_{c}")).otherwise(pl.col(c)).alias(c) for c in KEEP)
    return found.select(*placed, "port").sort("seq", "port")
