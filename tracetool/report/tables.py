"""Tables beside the findings: HPET channels, where a wake's time goes, and what runs add of their own.

Plain values first (for JSON), words second (for people); every form shows the same rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from tracetool.report.verdict import primary, run_name
from tracetool.report.words import Times, number, plural
from tracetool.store import Dataset

__all__ = ["CAPPED", "Table", "document", "tables", "wake_budget"]

#: Rows of a table that people see; JSON has all.
CAPPED: Final = 120


@dataclass(frozen=True, slots=True)
class Table:
    """A table. `rows` are plain values under `columns`; `shown` the same as words, at most CAPPED.

    `numeric`: columns (by index) that are set to the right. `bar`: column whose share (0..1) is drawn, or -1.
    """

    name: str
    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    shown: tuple[tuple[str, ...], ...]
    numeric: frozenset[int] = frozenset()
    bar: int = -1

    def heads(self) -> list[str]:
        """The columns in words."""
        return [c.removesuffix("_ns").replace("_", " ") for c in self.columns]

    @property
    def more(self) -> int:
        """Rows that are not shown."""
        return len(self.rows) - len(self.shown)

    def shares(self) -> list[float]:
        """The bar of each row that is shown."""
        return [float(row[self.bar]) for row in self.rows[: len(self.shown)]] if self.bar >= 0 else []


def tables(dataset: Dataset, runs: Sequence[Mapping[str, Any]], times: Times) -> list[Table]:
    """All tables that the recording and the runs give."""
    found = [_channels(dataset, runs), _budget(dataset, times), *_extras(runs, times)]
    return [table for table in found if table is not None]


def document(found: Iterable[Table]) -> list[dict[str, Any]]:
    """For JSON: every row as an object."""
    return [
        {"name": t.name, "title": t.title, "rows": [dict(zip(t.columns, row, strict=True)) for row in t.rows]}
        for t in found
    ]


# -- HPET ----------------------------------------------------------------------------------------------------------


def _channels(dataset: Dataset, runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """Channel, irq, CPU: how many of its interrupts that CPU took, and how many were not meant for it."""
    if not {"hpet.handler.begin", "hpet.fire"} & set(dataset.manifest.get("observed") or ()):
        return None
    counted = (
        dataset.events()
        .select(pl.col("kind").cast(pl.String), "obj", "cpu")
        .filter(pl.col("kind").is_in(["hpet.handler.begin", "hpet.fire"]) & pl.col("obj").is_not_null())
        .group_by("kind", "obj", "cpu")
        .len()
        .sort("obj", "cpu")
        .collect()
    )
    # Where both are recorded the handler is what the CPU really did.
    kind = "hpet.handler.begin" if (counted["kind"] == "hpet.handler.begin").any() else "hpet.fire"
    counted = counted.filter(pl.col("kind") == kind)
    if not counted.height:
        return None
    irqs = {
        channel: int(irq)
        for irq, channel in ((dataset.manifest.get("facts") or {}).get("hpet_channels") or {}).items()
        if str(irq).isdigit()
    }
    wrong, blind = _wrong(runs)
    rows = []
    for _, channel, cpu, count in counted.iter_rows():
        said = None if blind else wrong[channel, cpu]
        rows.append((channel, irqs.get(channel), cpu, count, said))
    words = [
        (str(ch), "unknown" if irq is None else str(irq), "unknown" if cpu is None else f"CPU {cpu}", number(n),
         "cannot tell" if w is None else number(w))
        for ch, irq, cpu, n, w in rows
    ]  # fmt: skip
    return Table(
        "hpet_channels", "HPET channels",
        "Interrupts of each channel by the CPU that took them; on the wrong CPU: findings of the rule hpet-wrong-cpu.",
        ("channel", "irq", "cpu", "interrupts", "on_the_wrong_cpu"), tuple(rows), tuple(words[:CAPPED]),
        frozenset({0, 1, 3, 4}),
    )  # fmt: skip


def _wrong(runs: Sequence[Mapping[str, Any]]) -> tuple[Counter[tuple[Any, Any]], bool]:
    """Findings of hpet-wrong-cpu by (channel, CPU), and whether nobody could look."""
    wrong: Counter[tuple[Any, Any]] = Counter()
    blind = True
    for run in primary(runs):
        if run["system"] != "hpet" or run["mode"] != "verify":
            continue
        wrong.update((f["obj"], f["cpu"]) for f in run["findings"] if f["code"] == "hpet-wrong-cpu")
        blind = not any(c["rule"] == "hpet-wrong-cpu" and c["state"] != "blind" for c in run["coverage"])
    return wrong, blind


# -- budget --------------------------------------------------------------------------------------------------------


def wake_budget(dataset: Dataset) -> dict[str, Any]:
    """Where the time goes from a broadcast deadline to the guest's handler (`replay.budget`)."""
    from replay.budget import KINDS, budget, wakes

    columns = ("seq", "t_ns", "kind", "cpu", "dom", "vcpu", "obj", "tgt", "val")
    events = (
        dataset.events()
        .select(columns)
        .with_columns(pl.col("kind").cast(pl.String))
        .filter(pl.col("kind").is_in(list(KINDS)))
        .collect()
    )
    return budget(wakes(events))


def _budget(dataset: Dataset, times: Times) -> Table | None:
    from replay.budget import KINDS

    seen = set(dataset.manifest.get("observed") or ())
    if not set(KINDS) <= seen or (dataset.manifest.get("clock") or {}).get("unit") == "ticks":
        return None
    spent = wake_budget(dataset)
    if not spent["wakes"]:
        return None
    parts = spent["parts"]
    rows = [(p["part"], p["share"], p["ns"], p["median_ns"], p["max_ns"]) for p in parts]
    rows.append(("in all", sum(p["share"] for p in parts), spent["total_ns"], None, None))
    words = [
        (part, f"{share:.1%}", times.span(ns), "–" if median is None else times.span(median),
         "–" if longest is None else times.span(longest))
        for part, share, ns, median, longest in rows
    ]  # fmt: skip
    mean = times.span(round(spent["total_ns"] / spent["wakes"]))
    early = f" {plural(spent['early'], 'handler')} began before the deadline." if spent["early"] else ""
    return Table(
        "budget", "From a timer's deadline to the guest's handler",
        f"{plural(spent['wakes'], 'wake')} can be followed all the way, {mean} on average; the parts add up.{early}",
        ("part", "share", "total_ns", "median_ns", "longest_ns"), tuple(rows), tuple(words), frozenset({1, 2, 3, 4}), 1,
    )  # fmt: skip


# -- runs ----------------------------------------------------------------------------------------------------------


def _extras(runs: Sequence[Mapping[str, Any]], times: Times) -> Iterable[Table]:
    """Tables that a system's run carries in `extra`: a list of equal rows each."""
    for run in runs:
        for name, rows in (run.get("extra") or {}).items():
            if not isinstance(rows, list | tuple) or not rows or not all(isinstance(r, Mapping) for r in rows):
                continue
            columns = tuple(dict.fromkeys(str(key) for row in rows for key in row))
            plain = tuple(tuple(row.get(c) for c in columns) for row in rows)
            shown = tuple(
                tuple(_cell(c, value, times) for c, value in zip(columns, row, strict=True)) for row in plain[:CAPPED]
            )
            numeric = frozenset(
                i for i, c in enumerate(columns)
                if all(isinstance(r[i], int | float) or r[i] is None for r in plain)
            )  # fmt: skip
            title = f"{name.replace('_', ' ')} ({run_name(run)})"
            yield Table(f"{run['system']}:{run['policy']}:{name}", title, "", columns, plain, shown, numeric)


def _cell(column: str, value: object, times: Times) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and column.endswith("_ns"):
        return times.at(value)
    if isinstance(value, Mapping | list | tuple):
        return str(value)
    return number(value)
