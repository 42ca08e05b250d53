"""Findings of many recordings by signature: what happens where, how often, since when. For terminal, JSON, JUnit."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree as ET

import polars as pl

from tracetool.fleet.tables import scan
from tracetool.report.words import clean, plural
from tracetool.results import SEVERITIES

__all__ = ["document", "junit", "text", "triage"]

#: Rows of the table `recordings` by name.
Rows = Mapping[str, Mapping[str, Any]]
#: Signatures that the terminal shows; `--json` and the dataset have all.
SHOWN: Final = 40
#: Bad recordings that the terminal lists.
LISTED: Final = 20


def triage(output: Path, rows: Rows) -> list[dict[str, Any]]:
    """One dictionary for each signature, worst first, then the most widespread.

    `rows` is the recordings of this call by name. "first" and "last" are by version when versions are known, else by
    time of the recording.
    """
    findings = scan(output, "findings", rows)
    grouped = (
        findings.group_by("signature", "system", "policy", "mode", "code", "severity")
        .agg(
            count=pl.len(),
            recordings=pl.col("recording").unique(),
            expected=pl.col("expected").first(),
            observed=pl.col("observed").first(),
            example=pl.struct("recording", "t_ns", "offset").sort_by("recording", "t_ns").first(),
        )
        .collect()
    )
    result = []
    for group in grouped.iter_rows(named=True):
        seen = sorted(group.pop("recordings"), key=lambda name: (_age(rows[name]), name))
        result.append({**group, "recordings": len(seen), "first": _seen(seen[0], rows), "last": _seen(seen[-1], rows)})
    rank = SEVERITIES.index
    return sorted(
        result, key=lambda g: (rank(g["severity"]), -g["recordings"], -g["count"], g["code"], g["signature"])
    )


def _age(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Versions in their natural order (4.9 before 4.17), unknown ones first; then the time."""
    parts = re.findall(r"\d+|[^\d.]+", row["version"] or "")
    version = [(1, int(p), "") if p.isdigit() else (0, 0, p) for p in parts]
    recorded = row["recorded"]
    return version, recorded.timestamp() if recorded else 0.0


def _seen(name: str, rows: Rows) -> dict[str, Any]:
    row = rows[name]
    recorded = row["recorded"]
    return {
        "recording": name,
        "version": row["version"],
        "recorded": recorded.isoformat(timespec="seconds") if recorded else None,
    }


def document(output: Path, rows: Rows, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`fleet --json`."""
    verdicts: dict[str, list[dict[str, str]]] = {}
    columns = ("system", "policy", "verdict")
    for name, *values in scan(output, "runs", rows).select("recording", *columns).collect().iter_rows():
        verdicts.setdefault(name, []).append(dict(zip(columns, values, strict=True)))
    return {
        "schema": 1,
        "output": str(output),
        "recordings": [
            {
                "recording": name,
                **{k: row[k] for k in ("path", "state", "exit_code", "error", "format", "records", "attempts")},
                **{k: v for k, v in _seen(name, rows).items() if k != "recording"},
                "verdicts": verdicts.get(name, []),
            }
            for name, row in rows.items()
        ],
        "triage": list(groups),
    }


def text(rows: Rows, groups: Sequence[Mapping[str, Any]], fresh: int, skipped: int) -> str:
    """For the terminal: what became of the recordings, the bad ones, the table."""
    states: dict[str, int] = {}
    for row in rows.values():
        states[row["state"]] = states.get(row["state"], 0) + 1
    told = ", ".join(f"{n} {state}" for state, n in sorted(states.items(), key=lambda s: -s[1]))
    lines = [f"{plural(len(rows), 'recording')}: {told}; {fresh} done now, {len(rows) - fresh} as stored"]
    if skipped:
        lines.append(f"{plural(skipped, 'other file')} in the folders left out (by suffix)")
    bad = [(name, row) for name, row in rows.items() if row["error"]]
    lines += [f"  {row['state']:<10}  {clean(name)}: {_after_path(row)}" for name, row in bad[:LISTED]]
    if len(bad) > LISTED:
        lines.append(f"  and {len(bad) - LISTED} more (--json lists all)")
    if not groups:
        return "\n".join([*lines, "no findings"])
    return "\n".join([*lines, "", *_table(groups)])


def _after_path(row: Mapping[str, Any]) -> str:
    """The error without the path that the line has already."""
    return clean(str(row["error"]).removeprefix(f"{row['path']}: "))


def _table(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ("signature", "severity", "count", "recordings", "first", "last", "finding")
    body = [
        (
            g["signature"], g["severity"], str(g["count"]), str(g["recordings"]), _when(g["first"]), _when(g["last"]),
            f"{g['system']} {g['policy']}: {g['code']}",
        )
        for g in groups[:SHOWN]
    ]  # fmt: skip
    rows = [head, *[tuple(clean(cell, 200) for cell in row) for row in body]]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head) - 1)]
    # A log has no width: what is cut off there is lost.
    width = max(shutil.get_terminal_size((140, 24)).columns, 100) if sys.stdout.isatty() else 1000
    lines: list[str] = []
    for row, said in zip(rows, ["", *map(_said, groups)], strict=False):
        cells = [c.rjust(w) if i in (2, 3) else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=False))]
        told = ["  ".join([*cells, row[-1]]), *([f"{'':{widths[0]}}  {said}"] if said else [])]
        lines += [line if len(line) <= width else line[: width - 1] + "…" for line in told]
    if len(groups) > SHOWN:
        lines.append(f"and {len(groups) - SHOWN} more signatures (--json lists all)")
    return lines


def _said(group: Mapping[str, Any]) -> str:
    """What the first finding of a signature says, in a line of its own."""
    words = [f"{what} {clean(group[what], 400)}" for what in ("expected", "observed") if group[what]]
    return "; ".join(words)


def _when(seen: Mapping[str, Any]) -> str:
    return str(seen["version"] or (seen["recorded"] or "?")[:10])


def junit(output: Path, rows: Rows, fail_on: str) -> str:
    """One suite; a case for each run of each recording, and one for reading it. Bad recordings are errors, runs with
    findings from `fail_on` on are failures, inconclusive ones are skipped, never passed."""
    failing = SEVERITIES[: SEVERITIES.index(fail_on) + 1] if fail_on != "never" else ()
    told: dict[tuple[str, str, str], list[str]] = {}
    grouped = (
        scan(output, "findings", rows)
        .filter(pl.col("severity").is_in(failing))
        .group_by("recording", "system", "policy", "signature", "code", "severity")
        .agg(n=pl.len(), expected=pl.col("expected").first(), observed=pl.col("observed").first())
        .sort("recording", "system", "policy", "code", "signature")
        .collect()
    )
    for g in grouped.iter_rows(named=True):
        line = f"{g['signature']} {g['code']} ({g['severity']}) {g['n']} times: "
        line += f"expected {g['expected']}; observed {g['observed']}"
        told.setdefault((g["recording"], g["system"], g["policy"]), []).append(clean(line))
    runs: dict[str, list[tuple[str, str, str]]] = {}
    columns = ("recording", "system", "policy", "verdict")
    for name, *values in scan(output, "runs", rows).select(columns).collect().iter_rows():
        runs.setdefault(name, []).append((values[0], values[1], values[2]))
    suite = ET.Element("testsuite", name="tracetool fleet")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for name, row in rows.items():
        case = ET.SubElement(suite, "testcase", classname=clean(name), name="read", time=f"{row['cpu_s'] or 0:.3f}")
        counts["tests"] += 1
        if row["error"]:
            counts["errors"] += 1
            ET.SubElement(case, "error", type=row["state"], message=clean(row["error"]))
        for system, policy, verdict in runs.get(name, []):
            case = ET.SubElement(suite, "testcase", classname=clean(name), name=clean(f"{system}.{policy}"))
            counts["tests"] += 1
            lines = told.get((name, system, policy))
            if lines:
                counts["failures"] += 1
                failure = ET.SubElement(case, "failure", message=plural(len(lines), "signature"))
                failure.text = "\n".join(lines)
            elif verdict == "inconclusive":
                counts["skipped"] += 1
                ET.SubElement(case, "skipped", message="inconclusive: rules are blind, or gaps cover the time")
    for key, value in counts.items():
        suite.set(key, str(value))
    ET.indent(suite, " ")
    return f'<?xml version="1.0"?>\n{ET.tostring(suite, encoding="unicode")}\n'
