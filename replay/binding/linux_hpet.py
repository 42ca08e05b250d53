"""HPET channels and clock event devices of Linux, as kprobes show them.

clockevents_program_event (kernel/time/clockevents.c) tells for when a CPU's device is armed: that is the CPU's
deadline, whatever timer it is for. hpet_clkevt_set_next_event and hpet_msi_interrupt_handler (arch/x86/kernel/hpet.c)
name the channel by its address: struct hpet_channel begins with its clock event device, so `evt` of one, `dev_id` of
the other and `dev` of clockevents_program_event are the same pointer. Linux gives a channel to one CPU for good; a
device that several CPUs program is the broadcast device, which these rules know nothing of.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from replay.binding.base import event
from replay.binding.linux_probes import Source
from replay.coverage import Observation

__all__ = ["Armed", "Binder", "Survey", "numbered", "survey"]

PROGRAM: Final = "clockevents_program_event"
SET_NEXT: Final = "hpet_clkevt_set_next_event"
MSI: Final = "hpet_msi_interrupt_handler"
_NAME: Final = r"^hpet(\d+)$"
_ENTRY: Final = "irq_handler_entry"
_EVERYTHING: Final = (0, 1 << 62)
#: hpet_clkevt_set_next_event runs inside clockevents_program_event: its record on the same CPU comes within this (ns).
INSIDE_NS: Final = 20_000
#: Rules about CPUs that share channels: on Linux nobody joins, leaves or moves one.
SHARING: Final = (
    "hpet-orphan-member", "hpet-owner-not-idle", "hpet-bad-choice", "hpet-masked-expiry", "hpet-affinity-stale",
)  # fmt: skip


@dataclass(slots=True)
class Survey:
    """What the probes say of the whole recording. `devices` maps a channel's address to its number, `owners` the number
    to its CPU, `irqs` an irq to the number; `handlers`: only the probe shows them."""

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    blind: dict[str, str] = field(default_factory=dict)
    devices: dict[int, int] = field(default_factory=dict)
    owners: dict[int, int] = field(default_factory=dict)
    irqs: dict[int, int] = field(default_factory=dict)
    handlers: bool = False


def survey(source: Source, named: dict[int, int], takes: dict[int, int], offset_ns: int | None) -> Survey:
    """Which devices are HPET channels, and whose. `named` maps irqs of hpetN to N, `takes` N to the CPU that takes most
    of its interrupts, `offset_ns` is CLOCK_MONOTONIC less the recording's time."""
    found = Survey()
    by_name = _names(source)
    taken = source.probe(MSI, *_EVERYTHING, "irq", "dev")
    programmed = _programs(source, *_EVERYTHING)
    if taken is not None:
        pairs = taken.select("irq", "dev").drop_nulls().unique().sort("irq", "dev")
        for index, (irq, device) in enumerate(pairs.iter_rows()):
            found.irqs[irq] = named.get(irq, by_name.get(device, index))
            found.devices.setdefault(device, found.irqs[irq])
    if programmed is not None:
        users = programmed.group_by("dev").agg(cpus=pl.col("cpu").n_unique(), cpu=pl.col("cpu").first())
        channels = {r["dev"]: r["cpu"] for r in users.iter_rows(named=True) if r["cpus"] == 1}
        hpet = programmed.filter(pl.col("hpet"))["dev"].unique().to_list() + list(by_name)
        for device in sorted({d for d in hpet if d in channels} - set(found.devices), key=lambda d: (channels[d], d)):
            used = {*found.devices.values(), *by_name.values()}
            likely = [n for n, cpu in sorted(takes.items()) if cpu == channels[device] and n not in used]
            free = next(n for n in range(len(channels) + len(used) + 1) if n not in used and n not in takes)
            found.devices[device] = by_name.get(device, likely[0] if likely else free)
        found.owners = {n: channels[d] for d, n in found.devices.items() if d in channels}
    if found.owners:
        how = f"{PROGRAM}, {SET_NEXT}"
        found.observed["hpet.program"] = Observation(100, how if offset_ns is not None else f"{how}; without the time")
        found.observed["hpet.retarget"] = Observation(100, "the CPU that programs the channel")
        found.blind = dict.fromkeys(SHARING, "on Linux a channel belongs to one CPU for good")
        found.facts["hpet_owners"] = {f"hpet{n}": cpu for n, cpu in sorted(found.owners.items())}
    if taken is not None and not source.has(_ENTRY):
        found.handlers = True
        found.observed["hpet.handler.begin"] = Observation(100, MSI)
        if source.probed(MSI, returns=True):
            found.observed["hpet.handler.end"] = Observation(100, f"return of {MSI}")
    return found


def numbered(key: pl.Expr, numbers: dict[int, int]) -> pl.Expr:
    """The channel's number by irq, address or CPU; null for any other."""
    if not numbers:
        return pl.lit(None, pl.Int64)
    key = key.cast(pl.Int64)
    return key.replace_strict(list(numbers), list(numbers.values()), default=None, return_dtype=pl.Int64)


def _names(source: Source) -> dict[int, int]:
    """Devices called hpetN, where the probe fetched the name."""
    names = source.texts(PROGRAM, "dev", "name")
    if names is None:
        return {}
    number = pl.col("name").str.extract(_NAME).cast(pl.Int64, strict=False)
    rows = names.select("dev", number=number).drop_nulls().unique().sort("dev", "number")
    return {int(device): int(n) for device, n in rows.iter_rows()}


def _programs(source: Source, lo: int, hi: int) -> pl.DataFrame | None:
    """Writes of comparators: KEEP, dev, expires (CLOCK_MONOTONIC, null unknown), hpet (by the HPET's own function)."""
    outer = source.probe(PROGRAM, lo, hi, "dev", "expires")
    inner = source.probe(SET_NEXT, lo, hi, "evt")
    if inner is not None:
        inner = inner.rename({"evt": "dev"}).with_columns(hpet=pl.lit(True))
    if outer is None:
        return None if inner is None else inner.with_columns(expires=pl.lit(None, pl.Int64)).drop_nulls("dev")
    outer = outer.drop_nulls("dev").with_columns(hpet=pl.lit(False))
    if inner is None:
        return outer
    # The inner record of a pair says which device it is, the outer one for when.
    inside = inner.sort("seq").join_asof(
        outer.select("seq", "cpu", "dev", "expires", outer_t="t_ns"), on="seq", by=("cpu", "dev"), strategy="backward",
        check_sortedness=False,
    )  # fmt: skip
    near = pl.col("t_ns") - pl.col("outer_t") <= INSIDE_NS
    inside = inside.with_columns(expires=pl.when(near).then(pl.col("expires"))).drop("outer_t")
    others = outer.join(inner.select("dev").unique(), on="dev", how="anti")
    return pl.concat([inside.select(others.columns), others]).sort("seq")


class Armed:
    """For when each CPU's device is armed, carried from slice to slice."""

    def __init__(self, source: Source, offset_ns: int | None) -> None:
        self.source = source
        self.offset_ns = offset_ns
        self.last: pl.DataFrame | None = None

    def before(self, sleeps: pl.DataFrame, lo: int, hi: int) -> pl.DataFrame:
        """`sleeps` (seq, cpu, t_ns …) with `armed`: the time in the recording, null where it is over or unknown."""
        unknown = sleeps.with_columns(armed=pl.lit(None, pl.Int64))
        if self.offset_ns is None:
            return unknown
        rows = self.source.probe(PROGRAM, lo, hi, "dev", "expires")
        parts = [] if self.last is None else [self.last]
        if rows is not None:
            parts.append(
                rows.drop_nulls(("dev", "expires"))
                .select("seq", pl.col("cpu").cast(pl.Int64), "dev", armed=pl.col("expires") - self.offset_ns)
            )  # fmt: skip
        if not parts:
            return unknown
        pool = pl.concat(parts).sort("seq")
        alone = pool.group_by("dev").agg(pl.col("cpu").n_unique().alias("cpus")).filter(pl.col("cpus") == 1)
        pool = pool.join(alone.select("dev"), on="dev", how="semi").sort("seq")
        self.last = pool.group_by("cpu", maintain_order=True).last().select("seq", "cpu", "dev", "armed")
        return (
            sleeps.sort("seq")
            .join_asof(
                pool.select("seq", "cpu", "armed"), on="seq", by="cpu", strategy="backward", check_sortedness=False
            )
            .with_columns(armed=pl.when(pl.col("armed") > pl.col("t_ns")).then(pl.col("armed")))
        )


class Binder:
    """Events of HPET channels, slice by slice."""

    def __init__(self, source: Source, found: Survey, offset_ns: int | None) -> None:
        self.source = source
        self.found = found
        self.offset_ns = offset_ns

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi."""
        if self.found.owners:
            programs = _programs(self.source, lo, hi)
            if programs is not None:
                yield self._program(programs)
        if self.found.handlers:
            for returns, kind, rank in ((False, "hpet.handler.begin", -1), (True, "hpet.handler.end", 2)):
                frame = self.source.probe(MSI, lo, hi, *(() if returns else ("irq",)), returns=returns)
                if frame is not None and not returns:
                    channel = numbered(pl.col("irq"), self.found.irqs)
                    yield event(frame, kind, MSI, obj=channel, val=pl.col("irq"), rank=rank)
                elif frame is not None:
                    yield event(frame, kind, MSI, obj=self._of_cpu(), rank=rank)

    def _program(self, programs: pl.DataFrame) -> pl.DataFrame:
        frame = programs.with_columns(channel=numbered(pl.col("dev"), self.found.devices))
        frame = frame.filter(pl.col("channel").is_not_null())
        armed = pl.lit(None, pl.Int64) if self.offset_ns is None else pl.col("expires") - self.offset_ns
        return event(frame, "hpet.program", PROGRAM, obj=pl.col("channel"), tgt=pl.col("cpu"), val=armed)

    def _of_cpu(self) -> pl.Expr:
        """A return names no irq: the channel of the CPU that it is on."""
        return numbered(pl.col("cpu"), {cpu: n for n, cpu in self.found.owners.items()})
