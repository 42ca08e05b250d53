"""Linux idle CPUs and their wake-up by HPET MSI channels (spec M.2).

power:cpu_idle gives sleep and wake. A CPU's deadline is what its clock event device is armed for (`linux_hpet`); where
that is not probed, the earliest high-resolution timer queued on it: the tick is one of them, and a stopped tick is
queued for the next timer of the wheel (tick_nohz_stop_tick). Expiry times are of CLOCK_MONOTONIC; `now` of
timer:hrtimer_expire_entry ties that clock to the recording's.

hpetN is a channel that Linux gives to one CPU for good (arch/x86/kernel/hpet.c, init_one_hpet_msi_clockevent): its
owner is the CPU that takes most of its interrupts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import polars as pl

from replay.binding import linux_hpet
from replay.binding.base import Context, event
from replay.binding.linux_probes import Source
from replay.coverage import Observation

__all__ = ["REASONS", "Binder", "Survey", "clock_hz", "survey"]

#: `state` of power:cpu_idle that means awake (PWR_EVENT_EXIT).
AWAKE: Final = 0xFFFFFFFF
#: `tgt` of idle.exit: why the CPU woke.
REASONS: Final = {"unknown": 0, "hpet": 1, "interrupt": 3}
#: An expiry farther away than this is on another clock (CLOCK_REALTIME) or never comes (ns).
FARTHEST_NS: Final = 86_400_000_000_000
#: Stamp of hrtimer_expire_entry is later than its `now` by the way from the clock read to the trace point; the
#: quickest share of them is taken to be exact.
QUICK_SHARE: Final = 0.05
#: Fewer expiries than this do not make a clock.
MIN_EXPIRIES: Final = 16
#: So many (timer, sleep) pairs are looked at in one slice; more leave the deadlines unknown.
MAX_PAIRS: Final = 50_000_000

_IDLE: Final = "cpu_idle"
_START: Final = "hrtimer_start"
_EXPIRE: Final = "hrtimer_expire_entry"
_CANCEL: Final = "hrtimer_cancel"
_ENTRY: Final = "irq_handler_entry"
_EXIT: Final = "irq_handler_exit"
_HPET: Final = r"^hpet(\d+)$"
#: Interrupts that end a sleep, beside irq_handler_entry.
_WAKERS: Final = (
    "local_timer_entry", "reschedule_entry", "call_function_entry", "call_function_single_entry", "irq_work_entry",
    "x86_platform_ipi_entry", "ipi_entry",
)  # fmt: skip


@dataclass(slots=True)
class Survey:
    """What the whole recording says before its events are made.

    `channels` maps an irq to the N of hpetN, `owners` N to its CPU, which is as sure as `owners_conf`; `probed`: a
    probe shows their interrupts, not irq_handler_entry. `offset_ns` is CLOCK_MONOTONIC less `t_ns`; `cpus` counts CPUs
    that sleep.
    """

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    channels: dict[int, int] = field(default_factory=dict)
    owners: dict[int, int] = field(default_factory=dict)
    owners_conf: int = 50
    cpus: int = 0
    probed: bool = False
    offset_ns: int | None = None
    usable: bool = False

    def owned_by(self, hpet: linux_hpet.Survey) -> None:
        """What probes say of the channels is surer than who takes most interrupts."""
        if hpet.owners:
            self.owners = dict(hpet.owners)
            self.owners_conf = 100
            self.observed.pop("hpet.retarget", None)
        if hpet.handlers:
            self.channels = dict(hpet.irqs)
            self.probed = True
        if self.usable and (hpet.owners or hpet.handlers):
            self.facts["hpet_channels"] = {str(irq): channel for irq, channel in sorted(self.channels.items())}
            self.facts["hpet_config"] = {
                "n_channels": len(self.owners or self.channels), "n_cpus": self.cpus, "fixed_owners": True,
            }  # fmt: skip


def clock_hz(source: Source) -> float | None:
    """Frequency of a clock that ticks: stamps against `now` of hrtimer_expire_entry, in ticks a second.

    A line through the quickest records of sixteen equal stretches; None when there are too few.
    """
    if not source.has(_EXPIRE):
        return None
    frame = source.records.scan(_EXPIRE).select(t=pl.col("t_ns"), now=pl.col("now")).drop_nulls().collect()
    if frame.height < 16 * MIN_EXPIRIES:
        return None
    ticks = frame["t"].to_numpy().astype(np.float64)
    now = (frame["now"] - frame["now"][0]).to_numpy().astype(np.float64)
    if now[-1] <= 0:
        return None
    slope, base = np.polyfit(now, ticks, 1)
    for _ in range(6):
        late = ticks - (slope * now + base)
        quick = late <= np.quantile(late, 0.25)
        slope, base = np.polyfit(now[quick], ticks[quick], 1)
    hz = float(slope) * 1e9
    return hz if 1e6 < hz < 1e11 else None


def survey(source: Source, context: Context) -> Survey:
    """Find the channels, their CPUs, and the distance between the clocks."""
    result = Survey()
    if not source.has(_IDLE):
        return result
    result.usable = True
    result.cpus = int(source.records.scan(_IDLE).select(pl.col("cpu").n_unique()).collect().item())
    if context.unit == "ns":
        result.offset_ns = _offset(source)
    if result.offset_ns is not None and (source.has(_START) or source.probed(linux_hpet.PROGRAM)):
        timer = linux_hpet.PROGRAM if source.probed(linux_hpet.PROGRAM) else "timer:hrtimer_start"
        result.observed["idle.enter"] = Observation(80, f"power:cpu_idle; deadline from {timer}")
    else:
        result.observed["idle.enter"] = Observation(80, "power:cpu_idle; no deadline: record timer:hrtimer_* too")
    result.observed["idle.exit"] = Observation(80, "power:cpu_idle; the reason is the interrupt before it")
    result.observed["idle.break"] = Observation(80, "wakes by an interrupt other than the channel's")
    if not source.has(_ENTRY):
        return result
    taken = (
        source.records.scan(_ENTRY)
        .with_columns(channel=pl.col("name").cast(pl.String).str.extract(_HPET).cast(pl.Int64, strict=False))
        .filter(pl.col("channel").is_not_null())
        .group_by("irq", "channel", "cpu").agg(n=pl.len()).sort("n", "cpu", descending=[True, False])
        .collect()
    )  # fmt: skip
    for irq, channel, cpu, _ in taken.iter_rows():
        result.channels.setdefault(int(irq), int(channel))
        result.owners.setdefault(int(channel), int(cpu))
    if not result.channels:
        return result
    for kind, name in (("hpet.handler.begin", _ENTRY), ("hpet.handler.end", _EXIT)):
        if source.has(name):
            result.observed[kind] = Observation(100, f"irq:{name} name=hpetN")
    result.observed["hpet.retarget"] = Observation(50, "owner of hpetN: the CPU that takes most of its interrupts")
    result.facts["hpet_channels"] = {str(irq): channel for irq, channel in sorted(result.channels.items())}
    result.facts["hpet_owners"] = {f"hpet{channel}": cpu for channel, cpu in sorted(result.owners.items())}
    result.facts["hpet_config"] = {
        "n_channels": len(result.owners), "n_cpus": result.cpus, "fixed_owners": True,
    }  # fmt: skip
    return result


def _offset(source: Source) -> int | None:
    """CLOCK_MONOTONIC less the recording's time, from the quickest expiries."""
    if not source.has(_EXPIRE):
        return None
    late = source.records.scan(_EXPIRE).select(d=pl.col("t_ns") - pl.col("now")).drop_nulls().collect()["d"]
    if late.len() < MIN_EXPIRIES:
        return None
    return -int(late.quantile(QUICK_SHARE) or 0)


class Binder:
    """Makes the events of one slice after the other; carries open sleeps and queued timers."""

    def __init__(self, source: Source, found: Survey) -> None:
        self.source = source
        self.found = found
        self.sleeping: pl.DataFrame | None = None  # enters without their exit
        self.queued: pl.DataFrame | None = None  # timers started and not yet expired
        self.recent: pl.DataFrame | None = None  # interrupts of the slice before
        self.armed = linux_hpet.Armed(source, found.offset_ns)

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi."""
        if not self.found.usable:
            return
        if lo == 0 and self.found.owners:
            yield self._owners()
        idle = self.source.read(_IDLE, lo, hi, "state", "cpu_id")
        wakers = self._wakers(lo, hi)
        timers = self._timers(lo, hi)
        if idle is not None:
            idle = idle.with_columns(cpu=pl.coalesce(pl.col("cpu_id").cast(pl.Int64), pl.col("cpu").cast(pl.Int64)))
            awake = pl.col("state").cast(pl.Int64) == AWAKE
            enters = self.armed.before(self._deadlines(idle.filter(~awake), timers), lo, hi)
            enters = enters.with_columns(deadline=pl.coalesce("armed", "deadline"))
            yield event(
                enters, "idle.enter", _IDLE, val=pl.col("deadline"), val2=pl.col("state"), conf=80
            )
            yield from self._exits(enters, idle.filter(awake), wakers)
        yield from self._handlers(lo, hi)

    def _owners(self) -> pl.DataFrame:
        """Who owns each channel, at the very start."""
        channels = sorted(self.found.owners)
        frame = pl.DataFrame(
            {
                "seq": [0] * len(channels), "t_ns": [0] * len(channels), "t_err_ns": [0] * len(channels),
                "cpu": [self.found.owners[c] for c in channels], "offset": [0] * len(channels), "channel": channels,
            },
            schema={"seq": pl.UInt64, "t_ns": pl.Int64, "t_err_ns": pl.UInt32, "cpu": pl.Int64,
                    "offset": pl.UInt64, "channel": pl.Int64},
        )  # fmt: skip
        how = "most of its interrupts" if self.found.owners_conf < 100 else linux_hpet.PROGRAM
        return event(
            frame, "hpet.retarget", how,
            obj=pl.col("channel"), tgt=pl.col("cpu"), conf=self.found.owners_conf, rank=-2,
        )  # fmt: skip

    def _handlers(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        if not self.found.channels:
            return
        for name, kind, rank in ((_ENTRY, "hpet.handler.begin", -1), (_EXIT, "hpet.handler.end", 2)):
            frame = self.source.read(name, lo, hi, "irq")
            if frame is None:
                continue
            frame = frame.with_columns(channel=self._channel()).filter(pl.col("channel").is_not_null())
            yield event(frame, kind, name, obj=pl.col("channel"), val=pl.col("irq"), rank=rank)

    def _channel(self) -> pl.Expr:
        return linux_hpet.numbered(pl.col("irq"), self.found.channels)

    def _wakers(self, lo: int, hi: int) -> pl.DataFrame:
        """Interrupt entries: seq, cpu, when, irq (null for vectors) and channel."""
        parts = []
        entries = self.source.read(_ENTRY, lo, hi, "irq")
        if entries is not None:
            irq = pl.col("irq").cast(pl.Int64)
            parts.append(entries.select("seq", "cpu", began="t_ns", irq=irq, channel=self._channel()))
        if self.found.probed:
            hits = self.source.probe(linux_hpet.MSI, lo, hi, "irq")
            if hits is not None:
                parts.append(hits.select("seq", "cpu", "irq", began="t_ns", channel=self._channel()))
        for name in _WAKERS:
            frame = self.source.read(name, lo, hi)
            if frame is not None:
                null = pl.lit(None, pl.Int64)
                parts.append(frame.select("seq", "cpu", began="t_ns", irq=null, channel=null))
        if self.recent is not None:
            parts.append(self.recent)
        schema = {"seq": pl.UInt64, "cpu": pl.Int64, "began": pl.Int64, "irq": pl.Int64, "channel": pl.Int64}
        cast = [p.select(pl.col(c).cast(t) for c, t in schema.items()) for p in parts]
        pool = (pl.concat(cast) if cast else pl.DataFrame(schema=schema)).sort("seq")
        self.recent = pool.group_by("cpu", maintain_order=True).tail(8).select(list(schema))
        return pool

    def _exits(self, enters: pl.DataFrame, exits: pl.DataFrame, wakers: pl.DataFrame) -> Iterator[pl.DataFrame]:
        """A CPU wakes when its first interrupt begins; the exit record comes after the handlers."""
        opened = enters.select("seq", "cpu", entered="t_ns", enter_seq="seq")
        if self.sleeping is not None:
            opened = pl.concat([self.sleeping, opened]).sort("seq")
        self.sleeping = opened.group_by("cpu", maintain_order=True).last().select(opened.columns)
        frame = exits.sort("seq").join_asof(
            opened.sort("seq"), on="seq", by="cpu", strategy="backward", check_sortedness=False
        )
        # The first interrupt after the enter record.
        first = (
            frame.filter(pl.col("enter_seq").is_not_null())
            .select("cpu", exit_seq="seq", seq="enter_seq")
            .sort("seq")
            .join_asof(wakers.rename({"seq": "w_seq"}), left_on="seq", right_on="w_seq", by="cpu", strategy="forward",
                       check_sortedness=False)
            .filter(pl.col("w_seq") < pl.col("exit_seq"))
            .select("exit_seq", "cpu", "began", "irq", "channel")
        )  # fmt: skip
        frame = frame.join(first, left_on=["seq", "cpu"], right_on=["exit_seq", "cpu"], how="left")
        reason = (
            pl.when(pl.col("channel").is_not_null()).then(REASONS["hpet"])
            .when(pl.col("began").is_not_null()).then(REASONS["interrupt"])
            .otherwise(REASONS["unknown"])
        )  # fmt: skip
        frame = frame.with_columns(woke=pl.coalesce("began", "t_ns"), reason=reason)
        yield event(
            frame, "idle.exit", _IDLE,
            t_ns=pl.col("woke"), tgt=pl.col("reason"), obj=pl.coalesce("channel", "irq"), conf=80,
        )  # fmt: skip
        broken = frame.filter((pl.col("reason") != REASONS["hpet"]) & pl.col("entered").is_not_null())
        yield event(
            broken, "idle.break", _IDLE, t_ns=pl.col("woke"), obj=pl.col("irq"), tgt=pl.col("reason"), conf=80, rank=-1
        )

    def _timers(self, lo: int, hi: int) -> pl.DataFrame | None:
        """Queued timers: cpu, from seq, to seq, expiry in the recording's time. They live where they expire."""
        if self.found.offset_ns is None:
            return None
        parts = [] if self.queued is None else [self.queued]
        for name, what in ((_START, 1), (_EXPIRE, 2), (_CANCEL, 3)):
            columns = ("hrtimer", "expires") if what == 1 else ("hrtimer",)
            frame = self.source.read(name, lo, hi, *columns)
            if frame is not None:
                expires = pl.col("expires").cast(pl.Int64) if what == 1 else pl.lit(None, pl.Int64)
                parts.append(frame.select("seq", pl.col("cpu").cast(pl.Int64), "hrtimer", expires=expires,
                                          what=pl.lit(what, pl.Int8)))  # fmt: skip
        if not parts:
            return None
        pool = pl.concat(parts).sort("seq").with_columns(
            end=pl.col("seq").shift(-1).over("hrtimer"),
            next_what=pl.col("what").shift(-1).over("hrtimer"),
            next_cpu=pl.col("cpu").shift(-1).over("hrtimer"),
        )  # fmt: skip
        starts = pool.filter(pl.col("what") == 1)
        self.queued = starts.filter(pl.col("end").is_null()).select("seq", "cpu", "hrtimer", "expires", "what")
        due = pl.col("expires") - self.found.offset_ns
        return starts.select(
            "seq",
            end=pl.col("end").fill_null(1 << 63),
            cpu=pl.when(pl.col("next_what") == 2).then(pl.col("next_cpu")).otherwise(pl.col("cpu")),
            due=due,
        ).filter(pl.col("due") < FARTHEST_NS)

    def _deadlines(self, enters: pl.DataFrame, timers: pl.DataFrame | None) -> pl.DataFrame:
        """The earliest timer that is queued on the CPU when it goes to sleep; null when none is known."""
        if timers is None or not enters.height:
            return enters.with_columns(deadline=pl.lit(None, pl.Int64))
        parts = []
        for (cpu,), mine in enters.group_by("cpu", maintain_order=True):
            queued = timers.filter(pl.col("cpu") == cpu)
            parts.append(mine.with_columns(deadline=pl.Series(_earliest(mine["seq"], queued), dtype=pl.Int64)))
        return pl.concat(parts).sort("seq").with_columns(
            # A timer that is due already is being served: the CPU will not sleep for it.
            deadline=pl.when(pl.col("deadline") > pl.col("t_ns")).then(pl.col("deadline"))
        )  # fmt: skip


def _earliest(asleep: pl.Series, timers: pl.DataFrame) -> list[int | None]:
    """For each seq the least `due` of the timers whose [seq, end) covers it."""
    at = asleep.to_numpy()
    first = np.searchsorted(at, timers["seq"].to_numpy(), side="right")
    last = np.searchsorted(at, timers["end"].to_numpy(), side="left")
    count = np.maximum(last - first, 0)
    total = int(count.sum())
    if total == 0 or total > MAX_PAIRS:
        return [None] * len(at)
    starts = np.repeat(first - np.concatenate(([0], np.cumsum(count)[:-1])), count)
    covered = np.arange(total) + starts
    least = np.full(len(at), np.iinfo(np.int64).max)
    np.minimum.at(least, covered, np.repeat(timers["due"].to_numpy(), count))
    return [None if v == np.iinfo(np.int64).max else int(v) for v in least]
