"""What every kind of report says, in plain values: the verdict, the rules, the stories.

Only the rendering differs between HTML, text, Markdown, JUnit and the terminal; the sentences come from here.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from replay.declare import Code
from replay.generic import CODES as GENERIC
from replay.systems import SYSTEMS
from tracetool.report.words import Times, count, number, plural, where
from tracetool.results import SEVERITIES, episode_key, fold

__all__ = [
    "REASONS", "Other", "Rule", "Step", "Story", "clock_words", "code_of", "finding_id", "headline",
    "input_name", "nearest_gap", "overall", "primary",
    "reliable", "rules", "run_name", "run_summary", "severities", "stories", "times_of", "title_of", "tool_of",
    "verdict_kind", "verdict_words", "worth",
]  # fmt: skip

#: Episodes for which the other runs and the gaps are searched; the search costs time for each.
COMPARED: Final = 500
#: Facts of a dataset that say why a system cannot be judged, when they are text.
REASONS: Final = frozenset({"binding", *SYSTEMS})
#: A run that could look with less than this share of its rules is not called clean.
ENOUGH: Final = 0.5


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


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the coverage table. `findings` is None when the rule was blind: nothing can be said then."""

    system: str
    name: str
    state: str
    reason: str
    doc: str
    findings: int | None
    worst: str


def times_of(manifest: Mapping[str, Any]) -> Times:
    """How to write the times of a dataset."""
    clock = manifest.get("clock")
    unit = clock.get("unit") if isinstance(clock, Mapping) else None
    return Times("ticks" if unit == "ticks" else "ns")


def title_of(manifest: Mapping[str, Any], default: str = "tracetool") -> str:
    """The recordings' names without their folders."""
    return ", ".join(filter(None, map(input_name, manifest.get("inputs") or ()))) or default


def input_name(item: Mapping[str, Any]) -> str:
    """An input's name without its folder, which is nobody else's business."""
    return str(item.get("source") or item.get("name") or "").rstrip("/").rpartition("/")[2]


def tool_of(manifest: Mapping[str, Any]) -> str:
    """Name and version of the tool that made the dataset."""
    tool = manifest.get("tool")
    return " ".join(str(v) for v in tool.values()) if isinstance(tool, Mapping) else str(tool or "")


def code_of(run: Mapping[str, Any], name: str) -> Code | None:
    """The declaration of a code, or None when this version does not know it."""
    try:
        codes = (*SYSTEMS[run["system"]].codes, *GENERIC)
    except (KeyError, ImportError):
        return None
    return next((c for c in codes if c.name == name), None)


def finding_id(run: Mapping[str, Any], finding: Mapping[str, Any]) -> str:
    """The name of a finding's episode, as `explain` and `shrink` take it: `hpet:current:3`.

    Episodes are numbered in the order in which they begin, so a replay of the same dataset under the same policy and
    thresholds gives the same names, whatever else is replayed or reported with it.
    """
    return f"{run['system']}:{run['policy']}:{finding['episode']}"


def run_name(run: Mapping[str, Any]) -> str:
    """`hpet, policy current (what-if)`."""
    mode = "" if run["mode"] == "verify" else f" ({run['mode']})"
    return f"{run['system']}, policy {run['policy']}{mode}"


def severities(findings: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Occurrences of each severity, worst first."""
    counted = Counter(f["severity"] for f in findings)
    return {s: counted[s] for s in SEVERITIES if counted[s]}


def primary(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The runs that tell what happened: verify runs; of a system that has none, its what-if runs."""
    verified = {r["system"] for r in runs if r["mode"] == "verify"}
    return [r for r in runs if r["mode"] == "verify" or r["system"] not in verified]


def _seen(run: Mapping[str, Any]) -> tuple[int, int]:
    """(rules that could look, rules) of a run."""
    states = Counter(r["state"] for r in run["coverage"])
    total = sum(states.values())
    return total - states["blind"], total


def verdict_kind(run: Mapping[str, Any]) -> str:
    """findings, clean or inconclusive; never clean when most of the rules could not look."""
    verdict = str(run["verdict"])
    seen, total = _seen(run)
    return "inconclusive" if verdict == "clean" and seen < ENOUGH * total else verdict


def verdict_words(run: Mapping[str, Any]) -> str:
    """The verdict of a run with what limits it: such as `clean as far as seen` or `mostly blind`."""
    kind = verdict_kind(run)
    seen, total = _seen(run)
    if run["mode"] != "verify":
        return {"findings": "findings predicted", "clean": "no divergence predicted"}.get(kind, kind)
    if kind == "inconclusive" and run["verdict"] == "clean":
        return "mostly blind"
    return "clean as far as seen" if kind == "clean" and seen < total else kind


def overall(runs: Sequence[Mapping[str, Any]]) -> str:
    """findings, inconclusive or clean, of what happened; a system that could not be judged is never clean."""
    verdicts = {verdict_kind(r) for r in primary(runs)}
    return next((v for v in ("findings", "inconclusive", "clean") if v in verdicts), "inconclusive")


def headline(runs: Sequence[Mapping[str, Any]], times: Times) -> str:
    """The verdict in a sentence or two."""
    if not runs:
        return "Nothing was replayed, so nothing is known about this recording."
    judged = primary(runs)
    states = Counter(r["state"] for run in _one_per_system(judged) for r in run["coverage"])
    blind = states["blind"]
    total = sum(states.values())
    unseen = f" {number(blind)} of {plural(total, 'rule')} could not be checked." if blind else ""
    verdict = overall(runs)
    found = [(run, group) for run in judged for group in fold(run["findings"])]
    if verdict == "findings":
        worst = [(r, g) for r, g in found if g[0]["severity"] in ("error", "warn")]
        run, group = min(worst, key=lambda x: episode_key(x[1]))
        code = code_of(run, group[0]["code"])
        doc = _inside(code.doc) if code else group[0]["code"]
        counted = severities(f for _, g in worst for f in g)
        lead = count(counted)
        episodes = plural(len(worst), "episode")
        would = "The model predicts" if run["mode"] != "verify" else "Found"
        return (
            f"{would} {lead} in {episodes}. The worst: {doc} "
            f"({group[0]['code']}, {where(group[0], run['system'])}, first at {times.at(group[0]['t_ns'])}).{unseen}"
        )
    if verdict == "inconclusive":
        seen = total - blind
        if total and not seen:
            return (
                "Inconclusive: none of the events that the rules need are in this recording. This is not a clean bill."
            )
        return f"Inconclusive: {_undecided(judged) or 'no rule was evaluated'}. This is not a clean bill.{unseen}"
    remarks = severities(f for _, g in found for f in g)
    extra = f" {count(remarks)} noted." if remarks else ""
    return f"Clean as far as can be seen: no divergence under the {plural(total - blind, 'rule')} that " + (
        f"this recording can decide.{extra}{unseen}"
    )


def _undecided(runs: Sequence[Mapping[str, Any]]) -> str:
    """Which systems could not be judged and why, which could."""
    parts = []
    for run in runs:
        seen, total = _seen(run)
        said = (run.get("seen") or {}).get("text")
        if run["verdict"] == "inconclusive" and said:
            parts.append(f"{run['system']}: {said}")
            continue
        if verdict_kind(run) == "clean":
            parts.append(f"{run['system']} is clean as far as can be seen ({seen} of {total} rules)")
        elif seen < ENOUGH * total:
            parts.append(f"{run['system']} could hardly be judged ({seen} of {total} rules could look)")
        else:
            parts.append(f"gaps cover most of what {run['system']} needs")
    return "; ".join(parts)


def _inside(sentence: str) -> str:
    """A declared sentence as part of another one."""
    word = sentence.partition(" ")[0]
    own = (word.isupper() and len(word) > 1) or word in ("Xen", "Linux", "Intel")
    return (sentence if own else sentence[:1].lower() + sentence[1:]).rstrip(".").replace("`", "")


def run_summary(run: Mapping[str, Any], times: Times) -> dict[str, Any]:
    """Numbers of one run for the table of verdicts."""
    states = Counter(r["state"] for r in run["coverage"])
    found = severities(run["findings"])
    return {
        "system": run["system"], "title": run.get("title", ""), "policy": run["policy"], "mode": run["mode"],
        "verdict": verdict_words(run), "kind": verdict_kind(run), "error": found.get("error", 0),
        "warn": found.get("warn", 0), "info": found.get("info", 0), "checked": states["checked"],
        "inferred": states["inferred"], "blind": states["blind"],
        "suppressed": sum((run.get("suppressed") or {}).values()),
        "worth": reliable(run, -(1 << 62), times, brief=True),
    }  # fmt: skip


def _one_per_system(runs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    chosen: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        chosen.setdefault(run["system"], run)
    return list(chosen.values())


def rules(runs: Sequence[Mapping[str, Any]]) -> list[Rule]:
    """The coverage table: for each system its rules as declared, with what was found by the run that was judged."""
    table = []
    for run in _one_per_system(primary(runs)):
        found: dict[str, list[Mapping[str, Any]]] = {}
        for finding in run["findings"]:
            found.setdefault(finding["code"], []).append(finding)
        for line in run["coverage"]:
            code = code_of(run, line["rule"])
            mine = found.get(line["rule"], [])
            blind = line["state"] == "blind" and not mine
            table.append(
                Rule(
                    run["system"], line["rule"], line["state"], line["reason"], code.doc if code else "",
                    None if blind else len(mine), next(iter(severities(mine)), ""),
                )
            )  # fmt: skip
    return table


def nearest_gap(t_ns: int, cpu: int | None, gaps: Sequence[Mapping[str, Any]], times: Times) -> str:
    """The gap nearest to a moment in words: on its own CPU, or else on another."""
    if not gaps:
        return "none: the recording has no known gap"
    own = _nearest(t_ns, [g for g in gaps if cpu is None or g.get("cpu") in (None, cpu)])
    if own is not None:
        return _distance(*own, times)
    other = _nearest(t_ns, gaps)
    if other is None:
        return "unknown: the times of the gaps are not known"
    return f"none on CPU {cpu}; elsewhere {_distance(*other, times)}"


def _nearest(t_ns: int, gaps: Iterable[Mapping[str, Any]]) -> tuple[int, Mapping[str, Any]] | None:
    """(signed distance, gap): negative when the gap is earlier, 0 inside it."""
    best: tuple[int, Mapping[str, Any]] | None = None
    for gap in gaps:
        t0, t1 = gap.get("t0_ns"), gap.get("t1_ns")
        if t0 is None and t1 is None:
            continue
        # An end that is not known is open: the gap reaches that far.
        if t0 is not None and t_ns < t0:
            distance = t0 - t_ns
        elif t1 is not None and t_ns > t1:
            distance = t1 - t_ns
        else:
            distance = 0
        if best is None or abs(distance) < abs(best[0]):
            best = (distance, gap)
    return best


def _distance(distance: int, gap: Mapping[str, Any], times: Times) -> str:
    who = "all CPUs" if gap.get("cpu") is None else f"CPU {gap['cpu']}"
    text = f"{gap.get('reason', 'gap')} on {who}"
    if gap.get("lost"):
        text += f", {plural(gap['lost'], 'record')} lost"
    if distance == 0:
        return f"inside a gap ({text}): treat with care"
    return f"{times.span(abs(distance))} {'later' if distance > 0 else 'earlier'} ({text})"


def reliable(run: Mapping[str, Any], t_ns: int, times: Times, *, brief: bool = False) -> str:
    """How far a run's word about a moment is evidence; `brief`: the calibration in a word or two."""
    if run["mode"] == "verify":
        return "evidence: what was recorded"
    label, detail = calibration_words(run.get("calibration"))
    tail = f", {label}" + (f" ({detail})" if detail and not brief else "")
    horizon = run.get("horizon_ns")
    if label.startswith("un"):
        # The model does not even reproduce what was recorded: whatever it predicts is worth little.
        until = f"; horizon {times.at(horizon)}" if horizon is not None else ""
        return f"not evidence{tail}{until}"
    if horizon is None:
        return f"prediction{tail}"
    if t_ns <= horizon:
        return f"evidence until {times.at(horizon)}{tail}"
    return f"prediction only: the recording is evidence until {times.at(horizon)}{tail}"


def worth(run: Mapping[str, Any], times: Times) -> str:
    """How far a run's numbers are evidence: horizon, calibration and what it was compared with."""
    return reliable(run, -1 if run.get("horizon_ns") is not None else 0, times)


def calibration_words(calibration: object) -> tuple[str, str]:
    """(calibrated, uncalibrated or not calibrated, what was compared) of a what-if run."""
    if isinstance(calibration, Mapping):
        pairs = calibration.get("metrics") or {}
        compared = ", ".join(
            f"{name.removesuffix('_ns').replace('_', ' ')} recorded {number(a)}, predicted {number(b)}"
            for name, (a, b) in pairs.items()
        )
        state = str(calibration.get("state", "not calibrated"))
        detail = compared or "nothing could be compared"
        if state == "uncalibrated" and calibration.get("reasons"):
            detail = "; ".join(map(str, calibration["reasons"]))
        if calibration.get("assumptions"):
            detail += "; assumed: " + "; ".join(map(str, calibration["assumptions"]))
        return state, detail
    label, _, detail = str(calibration or "not calibrated against the recording").partition(": ")
    return label, detail


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
    result = []
    for number_, (run, group) in enumerate(groups, 1):
        first = group[0]
        result.append(
            Story(
                number_, run, group, code_of(run, first["code"]), _title(run, group), _steps(group),
                _others(run, group, runs, times, index) if number_ <= COMPARED else [],
                nearest_gap(first["t_ns"], first.get("cpu"), gaps, times) if number_ <= COMPARED else "",
                _facts(run, group, times),
            )
        )  # fmt: skip
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


def clock_words(clock: Mapping[str, Any]) -> str:
    """The quality of the clock; what is not known is said to be unknown."""
    if not clock:
        return "nothing is known about it"
    parts = [str(clock.get("kind", "unknown kind"))]
    hz = clock.get("hz")
    parts.append(f"{hz / 1e6:.6f} MHz" if isinstance(hz, int | float) and hz else "frequency unknown: times are ticks")
    if clock.get("unit") == "ns" and not hz:
        parts[-1] = "already in time units"
    if clock.get("origin"):
        parts.append(f"from {clock['origin']}")
    error = clock.get("error_ppm")
    parts.append(f"uncertainty {error:.3g} ppm" if isinstance(error, int | float) else "uncertainty not known")
    text = ", ".join(parts)
    return f"{text}. {clock['doc']}" if clock.get("doc") else text
