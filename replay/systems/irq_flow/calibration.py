"""Irq flow: what a what-if run takes from a recording (spec 0.6, S4.8).

Exogenous are the raises, affinity requests, disable and enable. A handler run is a body: how long it took, where it
looked at its ring for the last time, when its driver issued the late EOI. From a raise to the handler's begin it took
as long as the CPU was busy or had interrupts off, under any policy: a lag.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import polars as pl

from replay.bodies import Bodies, Lags, Measured, Read, median, of_kinds
from replay.declare import Config
from replay.events import NIL
from replay.hardware.irq_desc import PER_CPU

__all__ = [
    "CONSUME", "DRIVES", "DURATION", "LATEEOI", "OUTCOMES", "SPURIOUS", "WORKED", "effect", "effect_fields",
    "effect_object", "effect_words", "measure",
]  # fmt: skip

#: Columns of a body (ns): the handler's run; from its begin to the last look, from its end to the late EOI (NIL: not
#: recorded); whether that was flagged spurious; whether the handler found anything to do.
DURATION, CONSUME, LATEEOI, SPURIOUS, WORKED = range(5)

DRIVES: Final = ("flow.raise",)
OUTCOMES: Final = ("flow.handler.begin",)
_KINDS: Final = (
    "flow.raise", "flow.handler.begin", "flow.handler.end", "flow.consume", "flow.lateeoi", "flow.set_affinity",
    "guest.bind_cpu", "irqdesc.state",
)  # fmt: skip
#: A rebind this soon after the request (ns) is the request's.
AT_ONCE_NS: Final = 1_000_000


def effect(event: Mapping[str, int]) -> int:
    """A handler run as the machine's effects name it."""
    return event["cpu"] << 32 | event["obj"]


def effect_words(what: int) -> str:
    """The effect for people."""
    return f"handler of irq {what & 0xFFFFFFFF} begins on cpu {what >> 32}"


def effect_fields(what: int) -> Mapping[str, int]:
    """The effect as fields of a finding."""
    return {"cpu": what >> 32, "obj": what & 0xFFFFFFFF}


def effect_object(what: int) -> int:
    """The irq."""
    return what & 0xFFFFFFFF


def measure(read: Read, config: Config, observed: frozenset[str]) -> Measured:
    """Bodies and lags of handler runs, where irqs are bound at first, and which have the percpu flow."""
    result = Measured()
    if "flow.raise" not in observed:
        result.blind = (
            "flow.raise is not recorded: nobody records event-channel sends, and no probe samples evtchn_pending"
        )
        return result
    events = read(_KINDS)
    begins = of_kinds(events, "flow.handler.begin").drop_nulls(["obj", "cpu"])
    ends = of_kinds(events, "flow.handler.end")
    runs = begins.select("seq", "t_ns", "obj", "cpu").join_asof(
        ends.select("seq", "obj", "cpu", "val", end="t_ns"), on="seq", by=["obj", "cpu"], strategy="forward",
        check_sortedness=False,
    )  # fmt: skip
    # A run whose end is the next run's has none of its own.
    runs = runs.with_columns(later=pl.col("t_ns").shift(-1).over("obj", "cpu"))
    runs = runs.filter(pl.col("end").is_not_null() & (pl.col("later").is_null() | (pl.col("end") <= pl.col("later"))))
    runs = runs.with_columns(duration=pl.col("end") - pl.col("t_ns"))
    runs = _joined(runs, of_kinds(events, "flow.consume"), "t_ns", "consume")
    runs = _late(runs, of_kinds(events, "flow.lateeoi"))
    if runs.height:
        result.values["handler_ns"] = median(runs["duration"].to_list())
    result.bodies = _bodies(runs)
    _lags(result, of_kinds(events, "flow.raise"), begins)
    first = begins.unique("obj", keep="first", maintain_order=True)
    result.init = {"S4": {
        "bound": {str(irq): cpu for irq, cpu in first.select("obj", "cpu").iter_rows()},
        "percpu": _percpu(of_kinds(events, "irqdesc.state")),
    }}  # fmt: skip
    _moves(result, of_kinds(events, "flow.set_affinity"), of_kinds(events, "guest.bind_cpu"))
    if "flow.consume" not in observed:
        result.assumptions.append(
            "flow.consume is not recorded: a handler is taken to look at its ring last consume_ns after it begins"
        )
    late = runs["lateeoi"].drop_nulls().to_list() if runs.height else []
    if late:
        result.values["lateeoi_ns"] = median(late)
    elif "lateeoi_ns" not in config.given:
        result.undecided["lateeoi"] = (
            "no late EOI is recorded, so when these drivers would issue it is unknown; "
            "--set irqflow.lateeoi_ns=N says it (ns after the handler's end)"
        )
    return result


def _joined(runs: pl.DataFrame, marks: pl.DataFrame, since: str, name: str) -> pl.DataFrame:
    """Offset from `since` of the last mark of the same irq inside the run (null: none)."""
    marks = marks.select("obj", at="t_ns").sort("at")
    found = runs.sort("end").join_asof(
        marks, left_on="end", right_on="at", by="obj", strategy="backward", check_sortedness=False
    )
    inside = pl.col("at") >= pl.col("t_ns")
    return found.with_columns(pl.when(inside).then(pl.col("at") - pl.col(since)).alias(name)).drop("at").sort("seq")


def _late(runs: pl.DataFrame, eois: pl.DataFrame) -> pl.DataFrame:
    """Offset from the run's end of the first late EOI before the irq's next run (null: none)."""
    eois = eois.select("obj", at="t_ns", flags="flags").sort("at")
    found = runs.with_columns(following=pl.col("t_ns").shift(-1).over("obj")).sort("t_ns").join_asof(
        eois, left_on="t_ns", right_on="at", by="obj", strategy="forward", check_sortedness=False
    )  # fmt: skip
    mine = pl.col("following").is_null() | (pl.col("at") < pl.col("following"))
    offset = (pl.col("at") - pl.col("end")).clip(lower_bound=0)
    return found.with_columns(
        lateeoi=pl.when(mine).then(offset), spurious=pl.when(mine).then(pl.col("flags").cast(pl.Int64) & 1)
    ).sort("seq")


def _bodies(runs: pl.DataFrame) -> Bodies:
    bodies = Bodies(5)
    for (irq,), mine in runs.group_by("obj", maintain_order=True):
        bodies.add(
            int(irq), mine["seq"].cast(pl.Int64).to_list(), mine["duration"].to_list(),
            mine["consume"].fill_null(NIL).to_list(), mine["lateeoi"].fill_null(NIL).to_list(),
            mine["spurious"].fill_null(0).to_list(), (mine["val"].fill_null(1) != 0).cast(pl.Int64).to_list(),
        )  # fmt: skip
    return bodies


def _lags(result: Measured, raises: pl.DataFrame, begins: pl.DataFrame) -> None:
    """Each raise with the next begin of its irq."""
    pairs = raises.select("seq", "obj", at="t_ns").join_asof(
        begins.select("seq", "obj", due="t_ns"), on="seq", by="obj", strategy="forward",
        check_sortedness=False,
    ).drop_nulls("due")  # fmt: skip
    result.lags = Lags(pairs)
    lags = (pairs["due"] - pairs["at"]).to_list()
    if lags:
        result.values["upcall_ns"] = max(median(lags) or 0, 0)
        result.reach_ns = max(lags)


def _percpu(states: pl.DataFrame) -> list[int]:
    """Irqs whose flow handler or state word says per-cpu."""
    words = states.drop_nulls(["obj", "val"]).unique("obj", keep="last")
    return words.filter((pl.col("val") & PER_CPU) != 0)["obj"].sort().to_list()


def _moves(result: Measured, asked: pl.DataFrame, bound: pl.DataFrame) -> None:
    """Whether the guest rebinds inside set_affinity, as the chips with mask reasons do."""
    if not asked.height or not bound.height:
        return
    near = asked.select("t_ns", to="tgt").sort("t_ns").join_asof(
        bound.select("t_ns", at="t_ns", new="tgt").sort("t_ns"), on="t_ns", strategy="nearest"
    )  # fmt: skip
    hits = near.filter(((pl.col("at") - pl.col("t_ns")).abs() <= AT_ONCE_NS) & (pl.col("new") == pl.col("to"))).height
    if 2 * hits >= asked.height:
        result.values["move_at_once"] = True
        result.assumptions.append(f"set_affinity rebinds at once: it did in {hits} of {asked.height} recorded requests")
