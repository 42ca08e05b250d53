"""What snapshots say that no rule uses: sentences for `info`, by system, computed from their tables.

/proc/interrupts counts since boot, so when an interrupt came is not in it; keys M, a and c of Xen and /proc/timer_list
show one moment. None of it is a canonical event. `facts` says what is there, what stands out, and that it is for
reading only.
"""

from __future__ import annotations

from typing import Final

import polars as pl

from replay.binding.base import Records

__all__ = ["facts"]

#: A channel's own CPU takes at least this share of its interrupts; else nobody can tell whose it is.
OWN_SHARE: Final = 0.9
#: With fewer interrupts than these nobody can tell either.
FEWEST: Final = 20

_ONLY: Final = "for reading, used by no rule"


def facts(records: Records) -> dict[str, str]:
    """A sentence for each system that a table of the snapshot says something about."""
    said: dict[str, list[str]] = {}
    there = records.tables()
    if {"interrupt", "interrupt_count"} <= there:
        said.setdefault("hpet", []).extend(_elsewhere(records))
    if "hrtimer" in there:
        said.setdefault("hpet", []).append(_timers(records, "hrtimer", "in_ns", "/proc/timer_list"))
    if "timer" in there:
        said.setdefault("hpet", []).append(_timers(records, "timer", "expires_us", "key a"))
    if "cstate_residency" in there or "cstate" in there:
        said.setdefault("hpet", []).append(f"key c: residency of C-states, {_ONLY}")
    if "msi" in there:
        said.setdefault("apic", []).append(_messages(records))
    return {system: "; ".join(sentences) for system, sentences in said.items() if sentences}


def _elsewhere(records: Records) -> list[str]:
    """Interrupts of the HPET's channels on other CPUs than the channel's own, since boot, or since the first copy."""
    names = records.scan("interrupt").select("snapshot", "label", "actions").collect()
    names = names.filter(pl.col("actions").str.contains(r"^hpet\d+$")).unique(["snapshot", "label"])
    if not names.height:
        return []
    counts = records.scan("interrupt_count").select("snapshot", "label", "cpu", "count").collect()
    mine = counts.join(names, on=["snapshot", "label"]).with_columns(pl.col("count").cast(pl.Int64)).sort("snapshot")
    several = names["snapshot"].n_unique() > 1
    spread = mine.group_by("actions", "cpu").agg(
        count=pl.col("count").last() - (pl.col("count").first() if several else 0)
    )
    since = "between the first and the last copy" if several else "since boot"
    found = []
    for (name,), channel in sorted(spread.group_by("actions"), key=lambda part: str(part[0][0])):
        total = int(channel["count"].sum())
        own = channel.sort("count", descending=True).row(0, named=True)
        if total < FEWEST or own["count"] < OWN_SHARE * total:
            continue
        for other in channel.filter((pl.col("cpu") != own["cpu"]) & (pl.col("count") > 0)).sort("cpu").iter_rows():
            _, cpu, count = other
            found.append(f"{count} of {total} interrupts of {name} on CPU {cpu}, its own is CPU {own['cpu']}")
    if not found:
        return [f"/proc/interrupts: every HPET channel on its own CPU {since}"]
    return [f"/proc/interrupts {since}: {', '.join(found)}; when is not told, so this is {_ONLY}"]


def _timers(records: Records, table: str, column: str, key: str) -> str:
    """Pending deadlines of a moment, and those that had passed already."""
    frame = records.scan(table).collect()
    late = frame.filter(pl.col(column) < 0)
    if not late.height:
        return f"{key}: {frame.height} pending timers, none overdue, {_ONLY}"
    worst = late.sort(column).row(0, named=True)
    where = f" on CPU {worst['cpu']}" if worst["cpu"] is not None else ""
    by = f"{-worst[column]} {column.rpartition('_')[2]}"
    return f"{key}: {late.height} of {frame.height} pending timers overdue, the worst by {by}{where}, {_ONLY}"


def _messages(records: Records) -> str:
    """Where the HPET's messages go."""
    frame = records.scan("msi").collect().filter(pl.col("type") == "HPET").unique("irq", keep="last").sort("irq")
    rows = frame.drop_nulls("dest").iter_rows(named=True)
    goes = ", ".join(f"IRQ {row['irq']} to APIC {row['dest']}" for row in rows)
    hpet = f"; HPET: {goes}" if goes else ""
    return f"key M: message-signalled interrupts{hpet}, {_ONLY}"
