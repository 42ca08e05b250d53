"""Callback: what a what-if run takes from a recording (spec 0.6, S2.7).

Exogenous are the sets of evtchn_upcall_pending, other contributors of the line, scheduling, and VM entries after exits
outside the callback's handler. Each injection carries a body: when the flag was cleared, the VM entries inside, the
EOI, the entry that follows it.

Stock recorders show no set. Each recorded injection of the callback's vector then stands for one, kick_ns before it.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import Final

import polars as pl

from replay.bodies import Bodies, Measured, Read, median, of_kinds
from replay.coverage import CHECKED_FROM
from replay.declare import Config
from replay.events import NIL, NONE

__all__ = [
    "AFTER", "CLEAR", "DRIVES", "EOI", "FIRST", "OUTCOMES", "UNTIL", "Recorded", "effect", "effect_fields",
    "effect_object", "effect_words", "measure",
]  # fmt: skip

#: Columns of a body: injection to the clear (NIL: not recorded) and to the EOI, EOI to the next VM entry (ns); where
#: its VM entries begin and end in `Recorded.entries`.
CLEAR, EOI, AFTER, FIRST, UNTIL = range(5)

DRIVES: Final = ("via.inject|via.upcall_set", "via.eoi", "via.vmentry")
OUTCOMES: Final = ("via.inject",)
_KINDS: Final = (
    "via.inject", "via.eoi", "via.upcall_clear", "via.upcall_set", "via.vmentry",
)  # fmt: skip


class Recorded:
    """What the machine needs beside bodies. `sets` are the inferred sets (ns, domain), by time; `inside` the `seq` of
    VM entries that belong to a body; `entries` their offsets from the injection (ns), body after body."""

    __slots__ = ("entries", "inside", "set_doms", "sets")

    def __init__(self) -> None:
        self.sets: array[int] = array("q")
        self.set_doms: array[int] = array("q")
        self.inside: array[int] = array("q")
        self.entries: array[int] = array("q")


def effect(event: Mapping[str, int]) -> int:
    """An injection of the callback as the machine's effects name it."""
    return event["dom"] << 16 | event["vcpu"]


def effect_words(what: int) -> str:
    """The effect for people."""
    return f"callback injected on vcpu {what & 0xFFFF} of dom {what >> 16}"


def effect_fields(what: int) -> Mapping[str, int]:
    """The effect as fields of a finding."""
    return {"dom": what >> 16, "vcpu": what & 0xFFFF}


def effect_object(what: int) -> int:
    """The domain."""
    return what >> 16


def measure(read: Read, config: Config, observed: frozenset[str]) -> Measured:
    """Sets, bodies, latencies and the destination of the callback."""
    result = Measured()
    if not {"via.inject", "via.eoi", "via.vmentry"} <= observed:
        return result  # the drives say which is missing
    vector = _vector(read, config)
    if vector == NONE:
        result.blind = (
            "which vector is the callback's is not recorded: --set callback.vector=N, or ingest the guest too"
        )
        return result
    result.only = frozenset((vector,))
    events = read(_KINDS).drop_nulls(["dom", "vcpu"])
    injections = of_kinds(events, "via.inject").filter(pl.col("obj") == vector).select("seq", "dom", "vcpu", "t_ns")
    if not injections.height:
        result.blind = f"vector {vector:#x} was never injected"
        return result
    result.values["vector"] = vector
    result.values["sample_on_exit"] = 1
    result.values["rte_dest_vcpu"] = int(injections["vcpu"].mode().sort()[0])
    sets = of_kinds(events, "via.upcall_set").filter(pl.col("conf") >= CHECKED_FROM)
    kick_ns = config.integer("kick_ns")
    recorded = result.aids = Recorded()
    runs = _runs(events, injections)
    _entries(recorded, runs, of_kinds(events, "via.vmentry"))
    if sets.height:
        injections = injections.with_columns(cause=pl.col("t_ns"))
    else:
        result.inferred = True
        recorded.sets = array("q", (injections["t_ns"] - kick_ns).to_list())
        recorded.set_doms = array("q", injections["dom"].cast(pl.Int64).to_list())
        result.assumptions.append(
            f"no set of evtchn_upcall_pending is recorded: each of the {injections.height} injections of vector "
            f"{vector:#x} stands for one, {kick_ns} ns before it"
        )
    result.bodies = _bodies(runs, 0 if sets.height else kick_ns)
    for name, column in (("isr_clear_ns", "clear"), ("isr_eoi_ns", "eoi"), ("exit_ns", "after")):
        value = median(runs[column].drop_nulls().to_list())
        if value is not None:
            result.values[name] = value
    if runs["clear"].null_count():
        known = runs.height - runs["clear"].null_count()
        result.assumptions.append(
            f"the clear of the flag is recorded for {known} of {runs.height} injections: the others clear it "
            "isr_clear_ns after the injection, or half-way to an earlier EOI"
        )
    return result


def _vector(read: Read, config: Config) -> int:
    """The callback's vector: stated, or named by the guest's handler."""
    if "vector" in config.given:
        return config.integer("vector")
    named = read(("via.isr_begin",)).drop_nulls(["dom", "vcpu", "obj"])["obj"]
    return int(named.mode().sort()[0]) if len(named) else NONE


def _runs(events: pl.DataFrame, injections: pl.DataFrame) -> pl.DataFrame:
    """Each injection with the offsets of what followed it on its vCPU before the next one."""
    who = ["dom", "vcpu"]
    runs = injections.with_columns(following=pl.col("t_ns").shift(-1).over(who))
    for name, kind in (("eoi", "via.eoi"), ("clear", "via.upcall_clear")):
        marks = of_kinds(events, kind).select("seq", *who, at="t_ns")
        if name == "eoi":
            marks = marks.with_columns(eoi_seq=pl.col("seq"))
        found = runs.join_asof(marks, on="seq", by=who, strategy="forward", check_sortedness=False)
        mine = pl.col("at").is_not_null() & (pl.col("following").is_null() | (pl.col("at") < pl.col("following")))
        runs = found.with_columns(pl.when(mine).then(pl.col("at") - pl.col("t_ns")).alias(name)).drop("at")
    runs = runs.with_columns(clear=pl.when(pl.col("clear") < pl.col("eoi")).then(pl.col("clear")))
    entries = of_kinds(events, "via.vmentry").select("seq", *who, entry="t_ns", after_seq="seq")
    ended = runs.filter(pl.col("eoi_seq").is_not_null()).sort("eoi_seq")
    ended = ended.join_asof(
        entries, left_on="eoi_seq", right_on="seq", by=who, strategy="forward", check_sortedness=False
    )
    ended = ended.with_columns(after=pl.col("entry") - pl.col("t_ns") - pl.col("eoi"))
    return ended.filter(pl.col("eoi").is_not_null()).sort("seq").with_columns(body=pl.int_range(pl.len()))


def _entries(recorded: Recorded, runs: pl.DataFrame, entries: pl.DataFrame) -> None:
    """VM entries from an injection to the one after its EOI: the body's, and its offsets to them."""
    bodies = runs.select("seq", "dom", "vcpu", "body", begin="t_ns", until="after_seq", last="eoi_seq")
    mine = entries.select("seq", "dom", "vcpu", "t_ns").join_asof(
        bodies, on="seq", by=["dom", "vcpu"], strategy="backward", check_sortedness=False
    ).filter(pl.col("until").is_not_null() & (pl.col("seq") <= pl.col("until")))  # fmt: skip
    recorded.inside = array("q", mine["seq"].cast(pl.Int64).to_list())
    within = mine.filter(pl.col("seq") < pl.col("last")).sort("body", "seq")
    recorded.entries = array("q", (within["t_ns"] - within["begin"]).to_list())
    counts = dict(within.group_by("body").len().iter_rows())
    ends: list[int] = []
    total = 0
    for body in range(runs.height):
        total += counts.get(body, 0)
        ends.append(total)
    # Two columns of `runs` for `_bodies`.
    runs.insert_column(runs.width, pl.Series("until_entry", ends, dtype=pl.Int64))
    runs.insert_column(runs.width, pl.Series("first_entry", [0, *ends[:-1]] if ends else [], dtype=pl.Int64))


def _bodies(runs: pl.DataFrame, kick_ns: int) -> Bodies:
    """Bodies by domain; the cause is the time of the set."""
    bodies = Bodies(5)
    for (dom,), mine in runs.group_by("dom", maintain_order=True):
        bodies.add(
            int(dom), (mine["t_ns"] - kick_ns).to_list(), mine["clear"].fill_null(NIL).to_list(),
            mine["eoi"].to_list(), mine["after"].fill_null(NIL).to_list(),
            mine["first_entry"].to_list(), mine["until_entry"].to_list(),
        )  # fmt: skip
    return bodies
