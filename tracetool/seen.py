"""How much of each system a dataset shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from replay.coverage import Coverage, Observation, coverage
from replay.declare import System
from replay.systems import SYSTEMS
from tracetool.store import Dataset

__all__ = ["blind_share", "checkable", "not_replayed", "observations", "rules_of"]


def observations(dataset: Dataset) -> dict[str, Observation]:
    """How well the dataset shows each kind of event."""
    return _observed(dataset.manifest)


def _observed(manifest: Mapping[str, Any]) -> dict[str, Observation]:
    return {k: Observation(o["conf"], o["how"]) for k, o in (manifest.get("observed") or {}).items()}


def rules_of(dataset: Dataset, system: System) -> list[Coverage]:
    """Coverage of a system's rules; without a clock frequency those with a threshold in ns are blind too."""
    return _rules_in(dataset.manifest, system)


def _rules_in(manifest: Mapping[str, Any], system: System) -> list[Coverage]:
    stated = (manifest.get("facts") or {}).get("blind", {})  # what the binding knows that kinds cannot say
    rules = [
        Coverage(c.rule, "blind", stated[c.rule]) if c.rule in stated and c.state != "blind" else c
        for c in coverage(system, _observed(manifest))
    ]
    if (manifest.get("clock") or {}).get("unit", "ns") == "ns":
        return rules
    in_ns = {p.name for p in system.parameters if p.unit == "ns"}
    timed = {code.name for code in system.codes if in_ns & set(code.thresholds)}
    reason = "it has a threshold in ns and the clock's frequency is unknown; give --cpu-hz"
    return [Coverage(c.rule, "blind", reason) if c.rule in timed else c for c in rules]


def checkable(dataset: Dataset) -> dict[str, list[Coverage]]:
    """Coverage of every system of which at least one rule can be decided."""
    rules = {name: rules_of(dataset, SYSTEMS[name]) for name in SYSTEMS}
    return {name: r for name, r in rules.items() if any(c.state != "blind" for c in r)}


def not_replayed(runs: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> dict[str, list[Coverage]]:
    """Coverage of the systems that no run is about: most can see nothing in the recording. Of a scenario, which has no
    manifest, nothing can be said."""
    if "observed" not in manifest:
        return {}
    done = {run["system"] for run in runs}
    return {name: _rules_in(manifest, SYSTEMS[name]) for name in SYSTEMS if name not in done}


def blind_share(dataset: Dataset) -> float:
    """Share of the recorded time in which at least one CPU's records are missing."""
    span = dataset.manifest.get("span", {})
    start, end = int(span.get("t0_ns", 0)), int(span.get("t1_ns", 0))
    if end <= start:
        return 0.0
    cpus = max(1, len(dataset.manifest.get("cpus", [])))
    covered = 0.0
    by_cpu: dict[int | None, list[tuple[int, int]]] = {}
    for gap in dataset.gaps():
        if gap["t0_ns"] is not None and gap["t1_ns"] is not None:
            by_cpu.setdefault(gap["cpu"], []).append((gap["t0_ns"], gap["t1_ns"]))
    for cpu, intervals in by_cpu.items():
        reach = start
        for lo, hi in sorted(intervals):
            covered += max(0, hi - max(lo, reach)) * (cpus if cpu is None else 1)
            reach = max(reach, hi)
    return min(1.0, covered / ((end - start) * cpus))
