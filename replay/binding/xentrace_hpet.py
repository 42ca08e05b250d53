"""HPET broadcast in stock xentrace: idle periods, deadlines, wake reasons, channel interrupts (spec M.1).

Stock Xen records no channel, no owner and no comparator. What it does record: when a CPU goes idle and how long the
governor expects it to sleep (TRC_PM_IDLE_ENTRY), when it leaves (TRC_PM_IDLE_EXIT), where an interrupt was handled and
for how long (TRC_HW_IRQ_HANDLED), and where an interrupt is pointed (TRC_HW_IRQ_ASSIGN_VECTOR). Which interrupts are
HPET channels is found by behaviour: only theirs are re-pointed on the way into and out of idle
(hpet_attach_channel, hpet_detach_channel), or they are bound to vector 0x30.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from replay.binding.base import Context, Forward, Records, event, slices
from replay.binding.rows import chosen, last_of_each, numbered, renamed
from replay.coverage import Observation

__all__ = ["REASONS", "Binder", "Survey", "survey"]

#: HPET_BROADCAST_VECTOR of Xen since October 2025.
FIXED_VECTOR: Final = 0x30
#: An assignment this close to an idle entry or exit of its CPU belongs to the broadcast (ns).
NEAR_IDLE_NS: Final = 1_000_000
#: Share of an interrupt's assignments that must lie there.
NEAR_IDLE_SHARE: Final = 0.8
#: Records that are looked at together to find the channels, and so many before and after them (more than in 1 ms).
SURVEY_ROWS: Final = 4 << 20
SURVEY_MARGIN: Final = 128 << 10
#: A remote handler wakes its CPUs within this (ns).
REMOTE_WAKE_NS: Final = 1_000_000
#: Records after an exit among which that of a handler that began before it is looked for, and handlers kept for it.
LOOK_AHEAD: Final = 4096
KEPT_HANDLERS: Final = 64
#: A handler record this long before the exit record still counts as its cause (ns).
WAKE_WINDOW_NS: Final = 1_000_000
#: Longest handler that is believed (ns): the two stamps in the record have 32 bits only.
LONGEST_HANDLER_NS: Final = 50_000_000
#: Earliest moment a remote handler may have begun to count as the cause of a wake: deadlines have 1 us resolution.
DUE_SLACK_NS: Final = 100_000

#: `tgt` of idle.exit: why the CPU woke.
REASONS: Final = {"unknown": 0, "hpet": 1, "broadcast": 2, "interrupt": 3, "cleanup": 4}

_ENTRY: Final = "TRC_PM_IDLE_ENTRY"
_EXIT: Final = "TRC_PM_IDLE_EXIT"
_HANDLED: Final = "TRC_HW_IRQ_HANDLED"
_ASSIGN: Final = "TRC_HW_IRQ_ASSIGN_VECTOR"
_BIND: Final = "TRC_HW_IRQ_BIND_VECTOR"
_CLEANUP: Final = "TRC_HW_IRQ_MOVE_CLEANUP"
_KEEP: Final = ("seq", "t_ns", "t_err_ns", "cpu", "offset", "tsc")


@dataclass(slots=True)
class Survey:
    """What the whole recording says before its events are made. `channels` maps an irq to its channel number."""

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    channels: dict[int, int] = field(default_factory=dict)
    pending_vectors_recorded: bool = False


def survey(records: Records, context: Context) -> Survey:
    """Find the channels and how well the broadcast can be seen."""
    tables = records.tables()
    result = Survey()
    if not {_ENTRY, _EXIT} <= tables:
        result.facts["hpet"] = "no idle records: trace class 0x00801000 (PM), and use a C-state driver"
        return result
    irq_seen = _HANDLED in tables
    result.channels = _channels(records, context) if irq_seen else {}
    pending = pl.any_horizontal(*(pl.col(f"irr{i}") != 0 for i in range(4)))
    # Records written after interrupts were enabled again show what is left, which is next to nothing; null: xenalyze
    # does not print them.
    seen = [
        part.select(pending.sum().alias("some"), pending.count().alias("all"))
        for part in records.parts(_EXIT, ("irr0", "irr1", "irr2", "irr3"))
    ]
    some, known = pl.concat(seen).sum().row(0)
    result.pending_vectors_recorded = some > 0.5 * known
    cpus = len({cpu for part in records.parts(_ENTRY, ("cpu",)) for cpu in part["cpu"].unique().to_list()})
    result.facts.update(
        {
            "hpet_channels": {str(irq): channel for irq, channel in result.channels.items()},
            "idle_cpus": cpus,
            "hpet_config": {"n_channels": max(1, len(result.channels)), "n_cpus": int(cpus)},
        }
    )
    result.observed["idle.enter"] = Observation(80, f"{_ENTRY}: the governor's expected sleep, 1 us resolution")
    if result.pending_vectors_recorded:
        result.observed["idle.exit"] = Observation(80, f"{_EXIT} with pending vectors")
    else:
        result.observed["idle.exit"] = Observation(
            50, f"{_EXIT} without pending vectors: the reason of a wake is inferred from handler records"
        )
    result.observed["idle.break"] = Observation(50, "exits that no HPET handler explains")
    if not irq_seen:
        result.facts["hpet"] = "no interrupt records: trace class 0x00802000 (IRQ) too"
        return result
    if not result.channels:
        result.facts["hpet"] = "no interrupt behaves like an HPET channel (state them with --hpet-irqs)"
        return result
    stated = "stated" if context.options.get("hpet_irqs") else "channels found by behaviour"
    conf = 80 if context.options.get("hpet_irqs") else 50
    for kind in ("hpet.handler.begin", "hpet.handler.end"):
        result.observed[kind] = Observation(conf, f"{_HANDLED}, {stated}")
    if _ASSIGN in tables:
        result.observed["hpet.retarget"] = Observation(50, f"{_ASSIGN}; a refused move leaves no record")
    return result


def _channels(records: Records, context: Context) -> dict[int, int]:
    """irq to channel number, in the order of the irq numbers."""
    stated = context.options.get("hpet_irqs")
    if stated:
        return {int(irq): channel for channel, irq in enumerate(sorted(stated))}
    tables = records.tables()
    irqs: set[int] = set()
    if _BIND in tables:
        bound = records.scan(_BIND).filter(pl.col("vector") == FIXED_VECTOR).select(pl.col("irq").unique()).collect()
        irqs.update(bound["irq"].to_list())
    if _ASSIGN in tables:
        irqs.update(_moved_around_idle(records, context.rows))
    return {irq: channel for channel, irq in enumerate(sorted(irqs))}


def _moved_around_idle(records: Records, rows: int) -> list[int]:
    """Interrupts that a CPU points elsewhere right after its idle exit or right before its idle entry."""
    met = pl.concat([part.unique() for part in records.parts(_HANDLED, ("irq", "cpu"))])
    handled = met.group_by("irq").agg(cpus=pl.col("cpu").n_unique())
    several = handled.filter(pl.col("cpus") > 1)["irq"].to_list()
    moves = [_moves(records, lo, hi) for lo, hi in slices(rows, SURVEY_ROWS)]
    found = (
        pl.concat(moves)
        .group_by("irq")
        .agg(share=pl.col("near").sum() / pl.col("n").sum(), n=pl.col("n").sum())
        .filter((pl.col("share") >= NEAR_IDLE_SHARE) & (pl.col("n") >= 8) & pl.col("irq").is_in(several))
    )
    return sorted(int(i) for i in found["irq"].to_list())


def _moves(records: Records, lo: int, hi: int) -> pl.DataFrame:
    """How often each interrupt is moved by the records with lo <= seq < hi, and how often of these near idle."""
    here = pl.col("seq").is_between(lo, hi, closed="left")
    assigned = pl.concat([part.filter(here) for part in records.parts(_ASSIGN, ("seq", "t_ns", "cpu", "irq"), lo, hi)])
    cpus = assigned["cpu"].unique().to_list()

    def idle(name: str) -> pl.DataFrame:
        first, last = lo - SURVEY_MARGIN, hi + SURVEY_MARGIN
        around = pl.col("seq").is_between(first, last) & pl.col("cpu").is_in(cpus)
        parts = records.parts(name, ("seq", "cpu", "t_ns"), first, last + 1)
        return pl.concat([part.filter(around) for part in parts]).rename({"t_ns": f"t_{name}"})

    return (
        assigned.join_asof(idle(_EXIT), on="seq", by="cpu", strategy="backward", check_sortedness=False)
        .join_asof(idle(_ENTRY), on="seq", by="cpu", strategy="forward", check_sortedness=False)
        .with_columns(
            near=((pl.col("t_ns") - pl.col(f"t_{_EXIT}")) < NEAR_IDLE_NS).fill_null(False)
            | ((pl.col(f"t_{_ENTRY}") - pl.col("t_ns")) < NEAR_IDLE_NS).fill_null(False)
        )
        .group_by("irq")
        .agg(near=pl.col("near").sum(), n=pl.len())
    )


class Binder:
    """Makes the events of one slice after the other; carries the open idle periods."""

    def __init__(self, records: Forward, context: Context, found: Survey) -> None:
        self.records = records
        self.ahead = Forward(records.records)
        self.found = found
        self.tables = records.tables()
        self.ticks_per_ns = (context.hz or 1e9) / 1e9 if context.unit == "ns" else 1.0
        self.in_ns = context.unit == "ns"
        self.broadcasts: pl.DataFrame | None = None
        self.open_entries: pl.DataFrame | None = None
        self.recent_handlers: pl.DataFrame | None = None
        self.recent_cleanups: pl.DataFrame | None = None
        self.targets: pl.DataFrame | None = None

    def _read(
        self, name: str, lo: int, hi: int, *columns: str, source: Forward | None = None
    ) -> pl.DataFrame | None:
        if name not in self.tables:
            return None
        return (source or self.records).read(name, lo, hi, (*_KEEP, *columns))

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi."""
        if _ENTRY not in self.tables or _EXIT not in self.tables:
            return
        entries = self._read(_ENTRY, lo, hi, "expected_us", "cx")
        exits = self._read(_EXIT, lo, hi, "irr0", "irr1", "irr2", "irr3")
        assert entries is not None and exits is not None
        handlers = self._handlers(lo, hi, self.records)
        yield self._enter(entries)
        yield from self._exits(entries, exits, handlers, lo, hi)
        yield from self._handler_events(handlers)
        yield from self._retargets(lo, hi)

    def _deadline(self, entered: str, expected_us: str) -> pl.Expr:
        """Null when the governor gave none, or when the clock runs in ticks and microseconds cannot be added."""
        if not self.in_ns:
            return pl.lit(None, pl.Int64)
        return pl.when(pl.col(expected_us) > 0).then(pl.col(entered) + pl.col(expected_us).cast(pl.Int64) * 1000)

    def _enter(self, entries: pl.DataFrame) -> pl.DataFrame:
        """Deadline = entry + expected sleep; 0 means that the governor gave none."""
        deadline = self._deadline("t_ns", "expected_us")
        return event(entries, "idle.enter", _ENTRY, val=deadline, val2="cx", conf=80)

    def _handlers(self, lo: int, hi: int, source: Forward) -> pl.DataFrame | None:
        """Interrupt handlers with begin and end in ns: the record comes after the end, its words are low TSC bits.

        Where the record's stamp is not its time, when the handler began and ended is not known either: it ran then.
        """
        frame = self._read(_HANDLED, lo, hi, "irq", "tsc_in", "tsc_out", source=source)
        if frame is None:
            return None

        def back(column: str) -> pl.Expr:
            low = pl.col("tsc").cast(pl.UInt64) & 0xFFFFFFFF
            ticks = (low.cast(pl.Int64) - pl.col(column).cast(pl.Int64)) & 0xFFFFFFFF
            ns = (ticks.cast(pl.Float64) / self.ticks_per_ns).cast(pl.Int64)
            told = (ns < LONGEST_HANDLER_NS) & (pl.col("t_err_ns") == 0)
            return pl.col("t_ns") - pl.when(told).then(ns).otherwise(0)

        channel = numbered(frame["irq"], self.found.channels)
        return frame.with_columns(begin=back("tsc_in"), end=back("tsc_out"), channel=channel).with_columns(
            begin=pl.min_horizontal("begin", "end")
        )

    def _handler_events(self, handlers: pl.DataFrame | None) -> Iterator[pl.DataFrame]:
        if handlers is None:
            return
        conf = self.found.observed.get("hpet.handler.begin", Observation(50, "")).conf
        hpet = chosen(handlers, handlers["channel"].is_not_null())
        yield event(
            hpet, "hpet.handler.begin", _HANDLED,
            t_ns="begin", obj="channel", val="irq", conf=conf, rank=-1,
        )  # fmt: skip
        yield event(
            hpet, "hpet.handler.end", _HANDLED,
            t_ns="end", obj="channel", val="irq", conf=conf,
        )  # fmt: skip

    def _exits(
        self, entries: pl.DataFrame, exits: pl.DataFrame, handlers: pl.DataFrame | None, lo: int, hi: int
    ) -> Iterator[pl.DataFrame]:
        """idle.exit with its reason, and idle.break for exits that neither the HPET nor a broadcast explains."""
        fresh = renamed(entries, "seq", "cpu", entered="t_ns", expected="expected_us")
        opened = self._carry(self.open_entries, fresh)
        self.open_entries = last_of_each(opened, "cpu")
        frame = exits.join_asof(opened, on="seq", by="cpu", strategy="backward", check_sortedness=False)
        frame = frame.with_columns(deadline=self._deadline("entered", "expected"))
        frame = self._own_handler(frame, handlers)
        frame = self._remote_handler(frame, lo, hi)
        frame = self._cleanup(frame, lo, hi)
        slept = pl.col("entered").is_not_null()
        reason = (
            pl.when(pl.col("own_channel").is_not_null()).then(REASONS["hpet"])
            .when(pl.col("own_irq").is_not_null()).then(REASONS["interrupt"])
            .when(pl.col("remote_channel").is_not_null()).then(REASONS["broadcast"])
            .when(pl.col("cleanup").is_not_null()).then(REASONS["cleanup"])
            .otherwise(REASONS["unknown"])
        )  # fmt: skip
        frame = frame.with_columns(reason=reason, slept=slept)
        packed = pl.sum_horizontal(*(pl.col(f"irr{i}").cast(pl.Int64) * (1 << 8 * i) for i in range(4)))
        yield event(
            frame, "idle.exit", _EXIT,
            val=packed, tgt="reason", obj=pl.coalesce("own_channel", "own_irq", "remote_channel"), conf=50,
        )  # fmt: skip
        explained = (frame["reason"] == REASONS["hpet"]) | (frame["reason"] == REASONS["broadcast"])
        broken = chosen(frame, frame["slept"] & ~explained)
        yield event(broken, "idle.break", _EXIT, obj="own_irq", tgt="reason", conf=50, rank=-1)

    def _carry(self, kept: pl.DataFrame | None, fresh: pl.DataFrame) -> pl.DataFrame:
        """Rows of the slices before, and after them those of this one."""
        return fresh if kept is None else pl.concat([kept, fresh])

    def _own_handler(self, frame: pl.DataFrame, handlers: pl.DataFrame | None) -> pl.DataFrame:
        """The last handler on this CPU since it went to sleep, right before the exit record."""
        nothing = pl.lit(None, pl.Int64)
        if handlers is None:
            return frame.with_columns(own_channel=nothing, own_irq=nothing)
        fresh = renamed(handlers, "seq", "cpu", own_end="end", own_begin="begin", h_irq="irq", h_channel="channel")
        pool = self._carry(self.recent_handlers, fresh)
        self.recent_handlers = last_of_each(pool, "cpu")
        joined = frame.join_asof(pool, on="seq", by="cpu", strategy="backward", check_sortedness=False)
        woke = (pl.col("own_begin") >= pl.col("entered")) & (pl.col("t_ns") - pl.col("own_end") < WAKE_WINDOW_NS)
        return joined.with_columns(
            own_channel=pl.when(woke).then(pl.col("h_channel")),
            own_irq=pl.when(woke & pl.col("h_channel").is_null()).then(pl.col("h_irq").cast(pl.Int64)),
        )

    def _remote_handler(self, frame: pl.DataFrame, lo: int, hi: int) -> pl.DataFrame:
        """A broadcast handler on another CPU that ran when this CPU was due, shortly before it woke."""
        nobody = frame.with_columns(remote_channel=pl.lit(None, pl.Int64))
        if not self.found.channels:
            return nobody
        # Its record is written when it has ended, perhaps after that of the exit.
        handlers = self._handlers(lo + LOOK_AHEAD if lo else 0, hi + LOOK_AHEAD, self.ahead)
        if handlers is None:
            return nobody
        fresh = chosen(handlers, handlers["channel"].is_not_null())
        remote = renamed(fresh, r_seq="seq", r_begin="begin", r_cpu="cpu", r_channel="channel")
        remote = self._carry(self.broadcasts, remote).sort("r_begin")
        self.broadcasts = remote.tail(KEPT_HANDLERS + int((remote["r_seq"] >= hi).sum()))
        joined = frame.sort("t_ns").join_asof(remote, left_on="t_ns", right_on="r_begin", strategy="backward")
        woke = (
            (pl.col("r_cpu") != pl.col("cpu"))
            & (pl.col("r_begin") >= pl.col("entered"))
            & (pl.col("t_ns") - pl.col("r_begin") < REMOTE_WAKE_NS)
            & (pl.col("r_begin") >= pl.col("deadline") - DUE_SLACK_NS)
        )
        return joined.with_columns(remote_channel=pl.when(woke).then(pl.col("r_channel"))).sort("seq")

    def _cleanup(self, frame: pl.DataFrame, lo: int, hi: int) -> pl.DataFrame:
        """IRQ_MOVE_CLEANUP since the CPU went to sleep: an IPI of the interrupt migration."""
        fresh = self._read(_CLEANUP, lo, hi)
        if fresh is None:
            return frame.with_columns(cleanup=pl.lit(None, pl.Int64))
        pool = self._carry(self.recent_cleanups, renamed(fresh, "seq", "cpu", c_t="t_ns"))
        self.recent_cleanups = last_of_each(pool, "cpu")
        joined = frame.join_asof(pool, on="seq", by="cpu", strategy="backward", check_sortedness=False)
        return joined.with_columns(
            cleanup=pl.when((pl.col("c_t") >= pl.col("entered")) & (pl.col("t_ns") - pl.col("c_t") < WAKE_WINDOW_NS))
            .then(pl.col("c_t"))
        )  # fmt: skip

    def _retargets(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Where a channel's interrupt is pointed: the lowest CPU of the assigned mask."""
        if not self.found.channels:
            return
        frame = self._read(_ASSIGN, lo, hi, "irq", "vector", "cpumask0", "cpumask1", "cpumask2")
        if frame is None:
            return
        frame = frame.with_columns(channel=numbered(frame["irq"], self.found.channels))
        frame = chosen(frame, frame["channel"].is_not_null())

        def lowest(name: str, base: int) -> pl.Expr:
            mask = pl.col(name).cast(pl.UInt64)
            return pl.when(mask != 0).then((mask.bitwise_trailing_zeros().cast(pl.Int32)) + base)

        target = pl.coalesce(lowest("cpumask0", 0), lowest("cpumask1", 64), lowest("cpumask2", 128))
        frame = frame.with_columns(target=target)
        pool = self._carry(self.targets, frame[["seq", "channel", "target"]])
        self.targets = last_of_each(pool, "channel")
        old = pool.select(pl.col("target").shift(1).over("channel")).to_series()
        frame = frame.with_columns(old=old.tail(frame.height))
        yield event(
            frame, "hpet.retarget", _ASSIGN,
            obj="channel", tgt="target", val="old", val2="vector", conf=80,
        )  # fmt: skip
