"""vGIC: what a what-if run takes from a recording (spec 0.6, S3.7).

Exogenous are the device's edges, writes to ITARGETSR, unrelated traps, scheduling. An edge is taken when the core
can: a lag. What the guest does with an interrupt, IAR and EOIR, is a body keyed to its arrival; it moves to whatever
vcpu the interrupt is delivered to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import polars as pl

from replay.bodies import Bodies, Lags, Measured, Read, median, of_kinds
from replay.declare import Config

__all__ = [
    "ACK", "CALIBRATE", "DRIVES", "EOI", "OUTCOMES", "effect", "effect_fields", "effect_object",
    "effect_words", "measure",
]  # fmt: skip

#: Columns of a body (ns): from the arrival (from the load, if another vcpu's core took the interrupt) to IAR, from IAR
#: to EOIR.
ACK, EOI = range(2)

CALIBRATE: Final = ("guest_acks", "itargets_writes", "migrations", "coalesced")
DRIVES: Final = ("vgic.phys_irq", "vgic.itargets")
OUTCOMES: Final = ("vgic.ack",)
_KINDS: Final = (*OUTCOMES, "vgic.phys_irq", "vgic.lr_write", "vgic.eoi", "vgic.itargets", "gic.ack")
VIRTUAL: Final = 1  # flag of gic.ack


def effect(event: Mapping[str, int]) -> int:
    """The guest's acknowledge as the machine's effects name it."""
    return event["vcpu"] << 16 | event["obj"]


def effect_words(what: int) -> str:
    """The effect for people."""
    return f"interrupt {what & 0xFFFF} acknowledged on vcpu {what >> 16}"


def effect_fields(what: int) -> Mapping[str, int]:
    """The effect as fields of a finding."""
    return {"vcpu": what >> 16, "obj": what & 0xFFFF}


def effect_object(what: int) -> int:
    """The interrupt."""
    return what & 0xFFFF


def measure(read: Read, config: Config, observed: frozenset[str]) -> Measured:
    """Lags of arrivals, bodies of interrupts, and the vcpu that each goes to at first."""
    result = Measured()
    if "vgic.phys_irq" not in observed:
        return result
    events = read(_KINDS)
    edges = of_kinds(events, "vgic.phys_irq").drop_nulls("obj").select("seq", "obj", "t_ns")
    physical = of_kinds(events, "gic.ack").filter((pl.col("flags") & VIRTUAL) == 0)
    result.aids = bool(physical.height)  # then an edge that no core took has no lag
    if physical.height:
        chain = _next(edges, "seq", physical, "taken")
    else:
        chain = edges.with_columns(taken=pl.col("t_ns"), taken_seq=pl.col("seq"), taken_on=pl.lit(None, pl.Int64))
    chain = _next(chain, "taken_seq", of_kinds(events, "vgic.lr_write"), "loaded")
    chain = _next(chain, "loaded_seq", of_kinds(events, "vgic.ack"), "acked")
    chain = _next(chain, "acked_seq", of_kinds(events, "vgic.eoi"), "ended")
    chain = chain.sort("seq").unique(["obj", "taken"], keep="first", maintain_order=True)  # what coalesced shares one
    _arrivals(result, chain.drop_nulls("taken"))
    result.bodies = Bodies(2)
    whole = chain.drop_nulls(["taken", "loaded", "acked", "ended"]).with_columns(
        since=pl.when(pl.col("taken_on").ne_missing(pl.col("loaded_on"))).then("loaded").otherwise("taken")
    )
    whole = whole.with_columns(ack=pl.col("acked") - pl.col("since"), eoi=pl.col("ended") - pl.col("acked"))
    for (obj,), mine in whole.group_by("obj", maintain_order=True):
        result.bodies.add(int(obj), mine["seq"].cast(pl.Int64).to_list(), mine["ack"].to_list(), mine["eoi"].to_list())
    for name, column in (("ack_ns", "ack"), ("eoi_ns", "eoi")):
        value = median(whole[column].to_list())
        if value is not None:
            result.values[name] = max(value, 1)
    loads = of_kinds(events, "vgic.lr_write").drop_nulls(["obj", "vcpu"])
    first = loads.unique("obj", keep="first", maintain_order=True)
    result.init = {"targets": {int(o): int(v) for o, v in first.select("obj", "vcpu").iter_rows()}}
    weak = of_kinds(events, "vgic.itargets").filter(pl.col("t_err_ns") > 2_000)
    if weak.height:
        widest = weak.select(pl.col("t_err_ns").max()).item()
        result.assumptions.append(
            f"{weak.height} of the guest's writes to ITARGETSR are known by their effect only: up to "
            f"{widest / 1e6:.1f} ms earlier than assumed"
        )
    return result


def _next(chain: pl.DataFrame, after: str, marks: pl.DataFrame, name: str) -> pl.DataFrame:
    """Each row with the time (`name`) and seq of the next mark of its interrupt after the event `after`."""
    marks = marks.select(
        pl.col("seq").alias(f"{name}_seq"), pl.col("obj"), pl.col("t_ns").alias(name),
        pl.coalesce(pl.col("vcpu").cast(pl.Int64), pl.col("cpu").cast(pl.Int64)).alias(f"{name}_on"),
    )  # fmt: skip
    known = chain.filter(pl.col(after).is_not_null()).sort(after)
    found = known.join_asof(
        marks.drop_nulls("obj").sort(f"{name}_seq"), left_on=after, right_on=f"{name}_seq", by="obj",
        strategy="forward", check_sortedness=False, coalesce=False,
    )  # fmt: skip
    return pl.concat([found, chain.filter(pl.col(after).is_null())], how="diagonal_relaxed")


def _arrivals(result: Measured, chain: pl.DataFrame) -> None:
    """When each edge was taken by a core."""
    result.lags = Lags(chain.select("seq", due="taken"))
    if chain.height:
        done = pl.coalesce("acked", "taken") - pl.col("t_ns")
        result.reach_ns = int(chain.select(done.max()).item() or 0)
