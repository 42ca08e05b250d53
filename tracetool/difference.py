"""Two recordings, or two runs, side by side: findings that are new, gone or changed in number, and metrics.

Findings are compared by signature: system, policy, code, severity and object. The CPU on which something was noticed
belongs to the signature only where there is no better object, for interrupts move between CPUs by themselves.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from replay.declare import UsageError
from tracetool import exits
from tracetool.results import SEVERITIES
from tracetool.terminal import clean

__all__ = ["compare", "exit_code", "signature", "stored", "text"]

#: Columns that make an object; the first group that a finding has.
_OBJECTS: Final[tuple[tuple[str, ...], ...]] = (("dom", "obj"), ("dom", "vcpu"), ("cpu",), ("dom",))
#: Signatures of each kind that the text shows.
SHOWN: Final = 40

Signature = tuple[str, str, str, str, tuple[tuple[str, int], ...]]


def signature(run: Mapping[str, Any], finding: Mapping[str, Any]) -> Signature:
    """(system, policy, code, severity, object) of a finding; the object as (column, value) pairs."""
    place: tuple[tuple[str, int], ...] = ()
    for columns in _OBJECTS:
        if finding.get(columns[-1]) is not None:
            place = tuple((c, finding[c]) for c in columns if finding.get(c) is not None)
            break
    return str(run["system"]), str(run["policy"]), str(finding["code"]), str(finding["severity"]), place


def stored(path: Path) -> dict[str, Any] | None:
    """One side from `replay --json` or `report -o x.json`; None for JSON that is something else (a recording may be).

    UsageError when it claims to be runs but is not what this version writes.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or "runs" not in data:
        return None
    try:
        if data.get("schema") != 1:
            raise ValueError(f"schema {data.get('schema')!r} is not known here")
        runs = [_run(run, data.get("coverage", ())) for run in data["runs"]]
        unit = data.get("manifest", {}).get("clock", {}).get("unit", "ns")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path}: not the output of replay --json or report -o x.json: {type(error).__name__} {error}"
        ) from None
    return {"name": str(path), "runs": runs, "unit": unit}


def _run(run: Mapping[str, Any], coverage: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """A stored run, checked as far as a comparison reads it."""
    for finding in run["findings"]:
        if finding["severity"] not in SEVERITIES:
            raise ValueError(f"severity {finding['severity']!r}")
        signature(run, finding)
    metrics = {str(k): v for k, v in run["metrics"].items() if isinstance(v, int | float)}
    rules = [{"rule": c["rule"], "state": c["state"]} for c in run.get("coverage", coverage)]
    return {
        "system": str(run["system"]), "policy": str(run["policy"]), "mode": str(run["mode"]),
        "verdict": str(run["verdict"]), "findings": run["findings"], "metrics": metrics, "coverage": rules,
        "config": run.get("config"),
    }  # fmt: skip


def _counts(runs: Iterable[Mapping[str, Any]]) -> Counter[Signature]:
    return Counter(signature(run, f) for run in runs for f in run["findings"])


def _states(runs: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, str], str]:
    """State of each rule by (system, policy, rule)."""
    return {(r["system"], r["policy"], c["rule"]): c["state"] for r in runs for c in r["coverage"]}


def compare(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    """The differences from `one` to `two`, each with `name` and `runs`; the object that `diff --json` prints.

    A finding whose rule is blind on the other side is neither new nor gone but `untold`: nothing is known about it.
    """
    before, after = _counts(one["runs"]), _counts(two["runs"])
    keys = {(r["system"], r["policy"]): r for r in one["runs"]}, {(r["system"], r["policy"]): r for r in two["runs"]}
    states = _states(one["runs"]), _states(two["runs"])
    groups: dict[str, list[dict[str, Any]]] = {"new": [], "gone": [], "changed": [], "untold": []}
    same = 0
    for key in sorted({*before, *after}, key=_order):
        a, b = before[key], after[key]
        row = _row(key, a, b)
        if a and b:
            if a != b:
                groups["changed"].append(row)
            else:
                same += 1
            continue
        lacking = 1 if a else 0  # the side on which it is not found
        reason = _untold(key, keys[lacking], states[lacking])
        if reason:
            groups["untold"].append({**row, "reason": reason})
        else:
            groups["gone" if a else "new"].append(row)
    return {
        "schema": 1,
        "a": one["name"],
        "b": two["name"],
        **groups,
        "same": same,
        "verdicts": [
            {"system": s, "policy": p, "a": _verdict(keys[0], s, p), "b": _verdict(keys[1], s, p)}
            for s, p in sorted({*keys[0], *keys[1]})
        ],
        "metrics": _metrics(*keys),
        "settings": _settings(*keys),
    }


def _order(key: Signature) -> tuple[Any, ...]:
    return (SEVERITIES.index(key[3]), key[0], key[1], key[2], key[4])


def _row(key: Signature, a: int, b: int) -> dict[str, Any]:
    system, policy, code, severity, place = key
    return {
        "severity": severity, "code": code, "system": system, "policy": policy, "object": dict(place), "a": a, "b": b,
    }  # fmt: skip


def _untold(
    key: Signature, runs: Mapping[tuple[str, str], Any], states: Mapping[tuple[str, str, str], str]
) -> str | None:
    """Why the absence of a finding says nothing, or None when it does say that it is absent."""
    system, policy, code = key[:3]
    if (system, policy) not in runs:
        return f"{system} was not replayed under {policy}"
    if states.get((system, policy, code)) == "blind":
        return "the rule is blind"
    return None


def _verdict(runs: Mapping[tuple[str, str], Any], system: str, policy: str) -> str | None:
    run = runs.get((system, policy))
    return str(run["verdict"]) if run else None


def _metrics(before: Mapping[tuple[str, str], Any], after: Mapping[tuple[str, str], Any]) -> list[dict[str, Any]]:
    """Metrics that differ, for runs that both sides have."""
    rows = []
    for key in sorted({*before} & {*after}):
        one, two = before[key]["metrics"], after[key]["metrics"]
        for name in sorted({*one, *two}):
            a, b = one.get(name), two.get(name)
            if a != b:
                delta = b - a if a is not None and b is not None else None
                rows.append({"system": key[0], "policy": key[1], "metric": name, "a": a, "b": b, "delta": delta})
    return rows


def _settings(before: Mapping[tuple[str, str], Any], after: Mapping[tuple[str, str], Any]) -> list[dict[str, Any]]:
    """Parameters in which two runs differ: then a difference of findings may be their doing."""
    rows = []
    for key in sorted({*before} & {*after}):
        one, two = before[key].get("config") or {}, after[key].get("config") or {}
        for name in sorted({*one} & {*two}):
            if one[name]["value"] != two[name]["value"]:
                rows.append(
                    {"system": key[0], "policy": key[1], "parameter": name, "a": one[name]["value"],
                     "b": two[name]["value"]}
                )  # fmt: skip
    return rows


def exit_code(found: Mapping[str, Any], fail_on: str) -> int:
    """1 for new findings at or above `fail_on`; 4 when something cannot be compared; else 0."""
    if fail_on != "never":
        limit = SEVERITIES.index(fail_on)
        if any(SEVERITIES.index(row["severity"]) <= limit for row in found["new"]):
            return exits.FINDINGS
    missing = any(v["b"] is None or v["b"] == "inconclusive" for v in found["verdicts"])
    return exits.INCONCLUSIVE if found["untold"] or missing or not found["verdicts"] else exits.CLEAN


def text(found: Mapping[str, Any]) -> str:
    """The same for people."""
    lines = [f"A  {clean(str(found['a']))}", f"B  {clean(str(found['b']))}"]
    for v in found["verdicts"]:
        lines.append(
            f"{clean(v['system'])} under {clean(v['policy'])}: "
            f"{clean(v['a'] or 'not replayed')} -> {clean(v['b'] or 'not replayed')}"
        )
    for s in found["settings"]:
        lines.append(
            f"  different settings: {clean(s['system'])}.{clean(s['parameter'])} "
            f"{clean(str(s['a']))} -> {clean(str(s['b']))}"
        )
    heads = {
        "new": "new in B", "gone": "gone in B", "changed": "changed in number",
        "untold": "cannot be compared",
    }  # fmt: skip
    for group, head in heads.items():
        rows = found[group]
        if not rows:
            continue
        lines.append(f"{head}: {len(rows)}")
        lines += [f"  {_line(row)}" for row in rows[:SHOWN]]
        if len(rows) > SHOWN:
            lines.append(f"  and {len(rows) - SHOWN} more (--json lists all)")
    if not any(found[g] for g in heads):
        lines.append(f"the same findings: {found['same']} signatures")
    if found["metrics"]:
        lines.append("metrics")
        plain = [m for m in found["metrics"] if "." not in m["metric"]] or found["metrics"]
        lines += [f"  {_metric(m)}" for m in plain[:SHOWN]]
        if len(found["metrics"]) > len(plain[:SHOWN]):
            lines.append(f"  and {len(found['metrics']) - len(plain[:SHOWN])} more (--json lists all)")
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    place = ", ".join(f"{k} {v}" for k, v in row["object"].items())
    where = f" ({place})" if place else ""
    why = f": {row['reason']}" if row.get("reason") else ""
    run = f"{row['system']} under {row['policy']}"
    return clean(f"{row['severity']:<5} {row['code']}{where}, {run}: {row['a']} -> {row['b']}{why}")


def _metric(m: Mapping[str, Any]) -> str:
    delta = f" ({m['delta']:+g})" if m["delta"] is not None else ""
    a, b = ("none" if m[k] is None else m[k] for k in ("a", "b"))
    return clean(f"{m['system']} under {m['policy']}: {m['metric']} {a} -> {b}{delta}")
