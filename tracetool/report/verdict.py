"""What a report says of runs, in plain values: verdicts, the rules that could look, how far a run's word is evidence.

Only the rendering differs between HTML, text, Markdown, JUnit and the terminal; the sentences come from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from replay.declare import Code
from replay.generic import CODES as GENERIC
from replay.systems import SYSTEMS
from tracetool.replaying import not_replayed
from tracetool.report.words import Times, count, number, plural, where
from tracetool.results import SEVERITIES, episode_key, fold

__all__ = [
    "REASONS", "Rule", "calibration_words", "code_of", "finding_id", "headline", "overall", "primary", "reliable",
    "rules", "run_name", "run_summary", "severities", "unlisted",
    "verdict_words", "worth",
]  # fmt: skip

#: Facts of a dataset that say why a system cannot be judged, when they are text.
REASONS: Final = frozenset({"binding", *SYSTEMS})


@dataclass(frozen=True, slots=True)
class Rule:
    """One line of the coverage table. `findings` is None when the rule was blind or no run looked: nothing can be said
    then."""

    system: str
    name: str
    state: str
    reason: str
    doc: str
    findings: int | None
    worst: str


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


def verdict_words(run: Mapping[str, Any]) -> str:
    """The verdict of a run with what limits it, such as `clean as far as seen`."""
    kind = str(run["verdict"])
    seen, total = _seen(run)
    if run["mode"] != "verify":
        return {"findings": "findings predicted", "clean": "no divergence predicted"}.get(kind, kind)
    return "clean as far as seen" if kind == "clean" and seen < total else kind


def overall(runs: Sequence[Mapping[str, Any]]) -> str:
    """findings, inconclusive or clean, of what happened; a system that could not be judged is never clean."""
    verdicts = {r["verdict"] for r in primary(runs)}
    return next((v for v in ("findings", "inconclusive", "clean") if v in verdicts), "inconclusive")


def headline(runs: Sequence[Mapping[str, Any]], times: Times) -> str:
    """The verdict in a sentence or two, and what is not listed."""
    beyond = sum(unlisted(run) for run in runs)
    more = f" Counted, but not listed: {plural(beyond, 'further finding')}; --keep N lists more." if beyond else ""
    return _headline(runs, times) + more


def unlisted(run: Mapping[str, Any]) -> int:
    """Findings beyond those that were kept of each code and severity."""
    return sum((run.get("suppressed") or {}).values())


def _headline(runs: Sequence[Mapping[str, Any]], times: Times) -> str:
    if not runs:
        return (
            "Nothing was replayed, so nothing is known about this recording: it has not the events that any rule needs."
        )
    judged = primary(runs)
    states = Counter(r["state"] for run in _one_per_system(judged) for r in run["coverage"])
    blind = states["blind"]
    total = sum(states.values())
    unseen = f" {number(blind)} of {plural(total, 'rule')} could not be checked." if blind else ""
    verdict = overall(runs)
    found = [(run, group) for run in judged for group in fold(run["findings"])]
    if verdict == "findings":
        worst = [(r, g) for r, g in found if g[0]["severity"] in ("error", "warn")] or found
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
        sight = run.get("seen") or {}
        if run["verdict"] == "clean":
            parts.append(f"{run['system']} is clean as far as can be seen ({seen} of {total} rules)")
        elif sight.get("state") in ("blind", "inconclusive"):
            parts.append(f"{run['system']}: {sight['text']}")
        elif run["mode"] != "verify":
            parts.append(f"the model of {run['system']} does not reproduce what was recorded")
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
    found = Counter(severities(run["findings"])) + Counter(run.get("suppressed_by_severity"))
    return {
        "system": run["system"], "title": run.get("title", ""), "policy": run["policy"], "mode": run["mode"],
        "verdict": verdict_words(run), "kind": run["verdict"], "error": found.get("error", 0),
        "warn": found.get("warn", 0), "info": found.get("info", 0), "checked": states["checked"],
        "inferred": states["inferred"], "blind": states["blind"],
        "worth": reliable(run, -(1 << 62), times, brief=True),
    }  # fmt: skip


def _one_per_system(runs: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    chosen: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        chosen.setdefault(run["system"], run)
    return list(chosen.values())


def rules(runs: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> list[Rule]:
    """The coverage table: for each system its rules as declared, with what was found by the run that was judged; last
    the systems that were not replayed."""
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
    for system, lines in not_replayed(runs, manifest).items():
        docs = {code.name: code.doc for code in SYSTEMS[system].codes}
        for c in lines:
            reason = c.reason if c.state == "blind" else f"not replayed; {c.reason}".rstrip("; ")
            table.append(Rule(system, c.rule, c.state, reason, docs.get(c.rule, ""), None, ""))
    return table


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
