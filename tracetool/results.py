"""One record for each run: what JSON, text, Markdown and HTML are all made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from replay.coverage import Coverage, Sight, sight
from replay.declare import Config, System
from replay.driver import Run
from replay.events import NIL, NONE
from replay.sink import Evidence, Finding

__all__ = [
    "EPISODE_GAP_NS", "SEVERITIES", "contract", "episode_key", "fold", "run_record", "seqs_of", "sight_document",
    "verdict", "worst",
]  # fmt: skip

#: Severities, worst first.
SEVERITIES: Final = ("error", "warn", "info")
#: Equal findings closer together than this are one episode (ns).
EPISODE_GAP_NS: Final = 1_000_000_000

#: Keys of a finding in `replay --json`, in this order.
CONTRACT: Final = (
    "code", "severity", "t_ns", "cpu", "dom", "vcpu", "obj", "tgt", "val", "expected", "observed", "confidence",
    "offset", "episode",
)  # fmt: skip


def seqs_of(findings: Iterable[Finding]) -> set[int]:
    """Numbers of the canonical events that findings name."""
    seqs: set[int] = set()
    for finding in findings:
        seqs.add(finding.seq)
        for step in finding.evidence:
            if step.seq is not None:
                seqs.add(step.seq)
    seqs.discard(NONE)
    return seqs


def run_record(
    run: Run,
    system: System,
    config: Config,
    rules: Sequence[Coverage],
    *,
    locate: Callable[[Iterable[int]], Mapping[int, tuple[str, int]]] | None = None,
    blind_share: float = 0.0,
) -> dict[str, Any]:
    """The whole record of a run as plain JSON values.

    `locate` maps canonical `seq` numbers to (source, offset in the recording); `blind_share` is the share of the
    recorded time that is covered by gaps.
    """
    seqs = seqs_of(run.findings)
    where = locate(seqs) if locate and seqs else {}
    # Codes are declared causes first.
    rank = {code.name: index for index, code in enumerate(system.codes)}
    findings = [_finding(f, where, rank) for f in sorted(run.findings, key=lambda f: f.t)]
    _episodes(findings)
    suppressed: dict[str, int] = {}
    by_severity: dict[str, int] = {}
    for (code, severity), count in run.suppressed.items():
        suppressed[code] = suppressed.get(code, 0) + count
        by_severity[severity] = by_severity.get(severity, 0) + count
    seen = sight(system, rules)
    calibration = run.extra.get("calibration")
    withdrawn = calibration is not None and calibration["state"] != "calibrated"  # it is evidence for nothing
    doubt = system.doubt(run.metrics, config) if run.mode == "verify" else ""
    judged = verdict(findings, rules, blind_share, seen)
    return {
        "system": system.name,
        "section": system.section,
        "title": system.title,
        "policy": run.policy,
        "mode": run.mode,
        "verdict": "inconclusive" if withdrawn or (doubt and judged == "clean") else judged,
        "seen": sight_document(seen, len(findings) + sum(suppressed.values()), doubt),
        "horizon_ns": run.horizon_ns,
        "calibration": calibration,
        "recorded": run.extra.get("recorded"),
        "extra": {k: v for k, v in run.extra.items() if k not in ("calibration", "recorded")},
        "findings": findings,
        "suppressed": suppressed,
        "suppressed_by_severity": by_severity,
        "metrics": run.metrics,
        "coverage": [{"rule": c.rule, "state": c.state, "reason": c.reason} for c in rules],
        "config": {
            p.name: {"value": config[p.name], "default": p.default, "unit": p.unit, "doc": p.doc}
            for p in system.parameters
        },
    }


#: What is null in a document, of fields that may be negative and of others.
_VALUE: Final[Mapping[int, None]] = {NIL: None}
_NULL: Final[Mapping[int, None]] = {NIL: None, NONE: None}


def _finding(f: Finding, where: Mapping[int, tuple[str, int]], rank: Mapping[str, int]) -> dict[str, Any]:
    source, offset = where.get(f.seq, (None, None))
    return {
        "code": f.code.name,
        "severity": f.severity,
        "t_ns": f.t,
        "t_first_ns": _VALUE.get(f.t_first, f.t_first),
        "cpu": _NULL.get(f.cpu, f.cpu),
        "dom": _NULL.get(f.dom, f.dom),
        "vcpu": _NULL.get(f.vcpu, f.vcpu),
        "obj": _NULL.get(f.obj, f.obj),
        "tgt": _NULL.get(f.tgt, f.tgt),
        "val": _VALUE.get(f.val, f.val),
        "expected": f.expected,
        "observed": f.observed,
        "confidence": f.conf,
        "source": source,
        "offset": offset,
        "episode": 0,
        "rank": rank.get(f.code.name, len(rank)),
        "rule": f.code.rule,
        "caused_by": f.cause or None,
        "tags": list(f.tags),
        "evidence": [_evidence(e, where) for e in f.evidence],
    }


def _evidence(e: Evidence, where: Mapping[int, tuple[str, int]]) -> dict[str, Any]:
    source, offset = where.get(e.seq, (None, None)) if e.seq is not None else (None, None)
    return {"t_ns": e.t, "seq": e.seq, "label": e.label, "source": source, "offset": offset}


def _episodes(findings: list[dict[str, Any]]) -> None:
    """Number the episodes: equal code and object, no pause longer than EPISODE_GAP_NS."""
    last: dict[tuple[Any, ...], tuple[int, int]] = {}
    count = 0
    for finding in findings:
        key = (finding["code"], finding["severity"], finding["cpu"], finding["dom"], finding["vcpu"], finding["obj"])
        episode, t = last.get(key, (0, 0))
        if not episode or finding["t_ns"] - t > EPISODE_GAP_NS:
            count += 1
            episode = count
        finding["episode"] = episode
        last[key] = (episode, finding["t_ns"])


def verdict(
    findings: Iterable[Mapping[str, Any]], rules: Sequence[Coverage], blind_share: float, seen: Sight | None = None
) -> str:
    """`findings` for any warn or error; `inconclusive` if nothing could be checked, if all rules for errors are blind
    (`seen`), or if gaps cover most; else `clean`."""
    if rules and not any(c.state != "blind" for c in rules):
        return "inconclusive"
    if any(f["severity"] in ("error", "warn") for f in findings):
        return "findings"
    if seen is not None and rules and not seen.decides:
        return "inconclusive"
    return "inconclusive" if blind_share > 0.5 else "clean"


def sight_document(seen: Sight, findings: int = 0, doubt: str = "") -> dict[str, Any]:
    """How much of the system could be seen, as plain JSON values: state, counts, and a sentence for people. `doubt`
    says why what the rules saw is not to be relied on."""
    return {
        "state": "inconclusive" if doubt and seen.decides else seen.state,
        "checked": seen.checked,
        "inferred": seen.inferred,
        "blind": seen.blind,
        "key_rules_blind": list(seen.key_blind),
        "text": f"{doubt}; {seen.words(findings)}" if doubt else seen.words(findings),
    }


def worst(runs: Iterable[Mapping[str, Any]]) -> str | None:
    """The worst severity of all findings, or None."""
    found = {f["severity"] for run in runs for f in run["findings"]}
    return next((s for s in SEVERITIES if s in found), None)


def fold(findings: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Findings grouped into episodes: worst severity, surest, root causes before consequences, then by time."""
    groups: dict[int, list[Mapping[str, Any]]] = {}
    for finding in findings:
        groups.setdefault(finding["episode"], []).append(finding)
    return sorted(groups.values(), key=episode_key)


def episode_key(group: Sequence[Mapping[str, Any]]) -> tuple[int, int, int, int]:
    """Order of episodes for human eyes: severity, confidence, causes first, time."""
    first = group[0]
    return SEVERITIES.index(first["severity"]), -first["confidence"], first.get("rank", 0), first["t_ns"]


def contract(runs: Sequence[Mapping[str, Any]], others: Iterable[Coverage] = ()) -> str:
    """`replay --json`: the documented object, one line. `others`: rules of systems that were not replayed."""
    rules: dict[str, dict[str, Any]] = {}
    for run in runs:
        for rule in run["coverage"]:
            rules.setdefault(rule["rule"], rule)
    for c in others:
        rules.setdefault(c.rule, {"rule": c.rule, "state": c.state, "reason": c.reason})
    document = {
        "schema": 1,
        "runs": [
            {
                "system": run["system"],
                "policy": run["policy"],
                "mode": run["mode"],
                "verdict": run["verdict"],
                "horizon_ns": run["horizon_ns"],
                "seen": run["seen"],
                "calibration": run["calibration"],
                "findings": [{key: finding[key] for key in CONTRACT} for finding in run["findings"]],
                "suppressed": run["suppressed"],
                "metrics": run["metrics"],
            }
            for run in runs
        ],
        "coverage": list(rules.values()),
    }
    return json.dumps(document)
