"""Policies of one system side by side: verdicts, findings and every metric."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tracetool.report.verdict import verdict_words, worth
from tracetool.report.words import Times, number

__all__ = ["comparison"]


def comparison(runs: Sequence[Mapping[str, Any]], times: Times) -> list[dict[str, Any]]:
    """For each system that ran under several policies: its runs and every metric side by side."""
    tables = []
    by_system: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_system.setdefault(run["system"], []).append(run)
    for system, mine in by_system.items():
        names = dict.fromkeys(name for run in mine for name in run["metrics"])
        counted = [Counter(f["code"] for f in run["findings"]) for run in mine]
        codes = dict.fromkeys(code for c in counted for code in c)
        blind = [{c["rule"] for c in run["coverage"] if c["state"] == "blind"} for run in mine]
        base = mine[0]["metrics"]
        rows = []
        for name in names:
            values = [run["metrics"].get(name) for run in mine]
            cells = []
            for index, value in enumerate(values):
                old = base.get(name)
                both = isinstance(value, int | float) and isinstance(old, int | float)
                delta = value - old if index and both and value is not None and old is not None else None
                cells.append((_metric(name, value, times), _change(delta, old) if delta else ""))
            differs = len({str(v) for v in values if v is not None}) > 1
            label = name.removesuffix("_ns").replace("_", " ")
            rows.append({"name": name, "label": label, "cells": cells, "differs": differs})
        found = [
            {
                "name": code,
                "cells": ["–" if code in blind[i] and not c[code] else number(c[code]) for i, c in enumerate(counted)],
            }
            for code in codes
        ]
        tables.append(
            {
                "system": system,
                "title": mine[0].get("title", ""),
                "why": _recorded(mine),
                "runs": [
                    {
                        "policy": r["policy"], "mode": r["mode"], "verdict": verdict_words(r),
                        "kind": r["verdict"],
                        "trust": worth(r, times), "horizon_ns": r.get("horizon_ns"),
                    }
                    for r in mine
                ],
                "rows": rows,
                "found": found,
            }
        )  # fmt: skip
    return tables


def _recorded(runs: Sequence[Mapping[str, Any]]) -> str:
    """Which policy really ran, and how that is known."""
    for run in runs:
        said = run.get("recorded")
        if isinstance(said, Mapping) and said.get("policy") and said.get("why"):
            return f"What ran was {said['policy']}: {said['why']}"
    return ""


def _change(delta: float, old: float | None) -> str:
    """A difference: as a share of the first value where that says something. Only a value of 0 is 100 % less."""
    sign = "+" if delta > 0 else "−"
    if not old or abs(delta) >= 10 * abs(old):
        return f"{sign}{number(abs(delta))}"
    share = 100 * abs(delta) / abs(old)
    if delta < 0 and abs(delta) < abs(old):
        share = min(share, 99.9)
    return f"{sign}{share:.3g} %"


def _metric(name: str, value: object, times: Times) -> str:
    if value is None:
        return "–"
    if name.endswith("_ns") and isinstance(value, int):
        return times.span(value)
    return number(value)
