"""The stories that a report tells: each episode with its events, what other policies say of it, its nearest gap."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from replay.declare import Code
from tracetool.report.recorded import Gaps
from tracetool.report.verdict import code_of, finding_id, primary, reliable
from tracetool.report.words import Times, number, plural, where
from tracetool.results import episode_key, fold

__all__ = ["Other", "Step", "Story", "stories"]

#: Episodes for which steps, facts, the other runs and the nearest gap are put together; that costs time for each.
COMPARED: Final = 500


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a story. `origin`: "evidence" (recorded, used by the rule), "model" (predicted), "context"."""

    t_ns: int
    text: str
    origin: str
    source: str | None = None
    offset: int | None = None
    seq: int | None = None


@dataclass(frozen=True, slots=True)
class Other:
    """What another policy's run says about the moment of a finding; `evidence`: how far that can be believed."""

    policy: str
    mode: str
    says: str
    evidence: str


@dataclass(slots=True)
class Story:
    """One episode: equal findings on one object, told once."""

    number: int
    run: Mapping[str, Any]
    findings: Sequence[Mapping[str, Any]]
    code: Code | None
    title: str
    steps: list[Step]
    others: list[Other]
    gap: str
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def first(self) -> Mapping[str, Any]:
        """The finding that opened the episode."""
        return self.findings[0]

    @property
    def id(self) -> str:
        """What `explain` and `shrink` call it."""
        return finding_id(self.run, self.first)

    @property
    def severity(self) -> str:
        """error, warn or info."""
        return str(self.first["severity"])

    @property
    def predicted(self) -> bool:
        """Whether this did not happen but follows from the model under a policy."""
        return bool(self.run["mode"] != "verify")


def _others(
    run: Mapping[str, Any],
    group: Sequence[Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    times: Times,
    index: dict[int, list[int]],
) -> list[Other]:
    """What each other run of the system says: near the first occurrence, and in the whole stretch of the episode.

    `index` keeps the times of each run's findings, which are in order.
    """
    first, last = group[0], group[-1]
    t = first["t_ns"]
    start = min(t, first["t_first_ns"] if first.get("t_first_ns") is not None else t)
    # A policy shifts moments a little; half the story's length, but at least 1 ms or 1 M ticks, is still "then".
    margin = max((t - start) // 2, 1_000_000)
    others = []
    for other in runs:
        if other is run or other["system"] != run["system"]:
            continue
        at = [f["t_ns"] for f in other["findings"]] if id(other) not in index else index[id(other)]
        index[id(other)] = at
        stretch = other["findings"][bisect_left(at, start - margin) : bisect_right(at, last["t_ns"] + margin)]
        same = [f for f in stretch if f["code"] == first["code"] and f.get("obj") == first.get("obj")]
        same = [f for f in same if f.get("cpu") == first.get("cpu") or first.get("obj") is not None]
        told = {id(f) for f in same}
        near = Counter(f["code"] for f in stretch if f["t_ns"] <= t + margin and id(f) not in told)
        state = next((c["state"] for c in other["coverage"] if c["rule"] == first["code"]), "checked")
        if same:
            says = f"{plural(len(same), 'finding')} of this kind, first at {times.at(same[0]['t_ns'])}"
        elif state == "blind":
            says = "cannot tell: the rule is blind here"
        else:
            says = f"no {first['code']}" + (" in the whole stretch of the episode" if len(group) > 1 else " here")
        if near:
            says += "; near it " + ", ".join(f"{n} × {c}" if n > 1 else c for c, n in sorted(near.items()))
        worth = reliable(other, t, times, brief=True)
        horizon = other.get("horizon_ns")
        if worth.startswith("evidence until") and last["t_ns"] > horizon:
            within = sum(f["t_ns"] <= horizon for f in group)
            worth += f": {number(within)} of the {number(len(group))} occurrences"
        others.append(Other(other["policy"], other["mode"], says, worth))
    return others


def _steps(group: Sequence[Mapping[str, Any]]) -> list[Step]:
    first = group[0]
    return [
        Step(e["t_ns"], e["label"], "model" if e.get("seq") is None else "evidence", e.get("source"),
             e.get("offset"), e.get("seq"))
        for e in first.get("evidence") or ()
    ]  # fmt: skip


def _title(run: Mapping[str, Any], group: Sequence[Mapping[str, Any]]) -> str:
    text = f"{group[0]['code']} on {where(group[0], run['system'])}"
    return f"{text}, {len(group)} times" if len(group) > 1 else text


def stories(
    runs: Sequence[Mapping[str, Any]],
    times: Times,
    *,
    gaps: Sequence[Mapping[str, Any]] = (),
    only_primary: bool = True,
) -> list[Story]:
    """Every episode of the runs that were judged, worst first; `only_primary` False: of all runs."""
    chosen = primary(runs) if only_primary else list(runs)
    groups = [(run, group) for run in chosen for group in fold(run["findings"])]
    groups.sort(key=lambda x: episode_key(x[1]))
    index: dict[int, list[int]] = {}
    known = Gaps(gaps)
    result = []
    for number_, (run, group) in enumerate(groups, 1):
        first = group[0]
        story = Story(number_, run, group, code_of(run, first["code"]), _title(run, group), [], [], "")
        if number_ <= COMPARED:
            story.steps = _steps(group)
            story.others = _others(run, group, runs, times, index)
            story.gap = known.nearest(first["t_ns"], first.get("cpu"), times)
            story.facts = _facts(run, group, times)
        result.append(story)
    return result


def _facts(run: Mapping[str, Any], group: Sequence[Mapping[str, Any]], times: Times) -> dict[str, str]:
    first, last = group[0], group[-1]
    facts = {"When": times.at(first["t_ns"])}
    if first.get("t_first_ns") not in (None, first["t_ns"]):
        facts["When"] += f", began {times.span(first['t_ns'] - first['t_first_ns'])} before"
    if len(group) > 1:
        facts["When"] += f"; the last of {number(len(group))} at {times.at(last['t_ns'])}"
    if first.get("offset") is not None:
        source = f"{first['source']}, " if first.get("source") else ""
        facts["Record"] = f"{source}offset {first['offset']:#x}"
    else:
        facts["Record"] = "none: computed by the model" if run["mode"] != "verify" else "none: noticed by the clock"
    low = min(f["confidence"] for f in group)
    high = max(f["confidence"] for f in group)
    facts["Confidence"] = f"{low} of 100" if low == high else f"{low} to {high} of 100"
    code = code_of(run, first["code"])
    config = run.get("config") or {}
    used = [
        f"{n} = {number(config[n]['value'])} {config[n]['unit']}"
        for n in (code.thresholds if code else ())
        if n in config
    ]
    if used:
        facts["Thresholds"] = "; ".join(used)
    if first.get("caused_by"):
        facts["Caused by"] = str(first["caused_by"])
    if first.get("tags"):
        facts["Tags"] = ", ".join(map(str, first["tags"]))
    return facts
