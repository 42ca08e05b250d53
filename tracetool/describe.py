"""Words and documents for people and programs: ingest, info, runs, codes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from replay.coverage import sight
from replay.declare import Code, Parameter
from tracetool.ingest import Ingested
from tracetool.results import sight_document
from tracetool.store import Dataset
from tracetool.terminal import clean

__all__ = [
    "code_document",
    "code_text",
    "info_document",
    "info_text",
    "ingest_document",
    "ingest_text",
    "wake_budget_text",
]


def _seconds(ns: int | None, unit: str) -> str:
    if ns is None:
        return "?"
    return f"{ns / 1e9:.6f} s" if unit == "ns" else f"{ns:,} ticks"


# -- ingest --------------------------------------------------------------------------------------------------------


def _note_counts(notes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    counts: dict[str, int] = {}
    for note in notes:
        counts[note["code"]] = counts.get(note["code"], 0) + note["count"]
    return [{"code": code, "count": count} for code, count in sorted(counts.items())]


def ingest_document(done: Ingested) -> dict[str, Any]:
    """`ingest --json`."""
    m = done.manifest
    return {
        "schema": 1,
        "output": str(done.path),
        "bytes": m["bytes"],
        "records": m["counts"],
        "gaps": done.gaps,
        "clock": m["clock"],
        "notes": _note_counts(done.notes),
    }


def ingest_text(done: Ingested) -> str:
    """A few lines that say what was read."""
    m = done.manifest
    span = m["span"]
    unit = m["clock"]["unit"]
    lines = [
        f"{clean(str(done.path))}: {span['records']:,} records, {_seconds(span['t1_ns'] - span['t0_ns'], unit)}, "
        f"{len(m['cpus'])} CPUs, {m['events']:,} canonical events",
        f"  clock    {_clock(m['clock'])}",
        f"  bytes    {m['bytes']['parsed']:,} parsed, {m['bytes']['skipped']:,} skipped of {m['bytes']['total']:,}",
        *(f"  {line}" for line in _together(m)),
    ]
    if done.gaps:
        lines.append(f"  gaps     {len(done.gaps)}: {_gap_summary(done.gaps)}")
    shown = [n for n in done.notes if n["severity"] != "info"]
    lines.extend(f"  {n['severity']:<8} {clean(n['text'])}" for n in shown[:8])
    if len(shown) > 8:
        lines.append(f"           and {len(shown) - 8} more (tracetool info)")
    return "\n".join(lines)


def _clock(clock: Mapping[str, Any]) -> str:
    if clock["kind"] == "none":
        return f"none: {clock['doc']}"
    if clock["hz"] is None:
        return f"unknown frequency, times stay in ticks ({clock['doc']}); give --cpu-hz"
    error = f", +-{clock['error_ppm']:.2g} ppm" if clock.get("error_ppm") is not None else ""
    return f"{clock['hz'] / 1e6:.3f} MHz from {clock['origin']}{error}"


def _together(manifest: Mapping[str, Any]) -> list[str]:
    """How the clocks of several recordings were tied together; nothing for one."""
    lines = []
    for source in manifest["inputs"] if len(manifest["inputs"]) > 1 else ():
        clock = source["clock"]
        words = [f"{clean(source['source'])}: {source['records']:,} records, {clock['kind']}"]
        if source["domain"] is not None:
            words.append(f"of d{source['domain']}")
        if clock["offset_ticks"]:
            words.append(f"{clock['offset_ticks'] / 1e6:+,.3f} million ticks")
        if clock["uncertainty_ns"]:
            words.append(f"known to {clock['uncertainty_ns'] / 1000:,.1f} us")
        lines.append(f"source   {', '.join(words)}" + (f" ({clean(clock['how'])})" if clock["how"] else ""))
    return lines


def _gap_summary(gaps: Sequence[Mapping[str, Any]]) -> str:
    reasons: dict[str, int] = {}
    for gap in gaps:
        reasons[gap["reason"]] = reasons.get(gap["reason"], 0) + 1
    lost = sum(g["lost"] or 0 for g in gaps)
    words = ", ".join(f"{n} {reason}" for reason, n in sorted(reasons.items()))
    return f"{words}; {lost:,} records lost" if lost else words


# -- info ----------------------------------------------------------------------------------------------------------


def info_document(dataset: Dataset) -> dict[str, Any]:
    """`info --json`."""
    from replay.systems import SYSTEMS
    from tracetool.replaying import blind_share, rules_of

    m = dataset.manifest
    rules = {name: rules_of(dataset, system) for name, system in SYSTEMS.items()}
    return {
        "schema": 1,
        "dataset": str(dataset.path),
        "inputs": m["inputs"],
        "span": m["span"],
        "cpus": m["cpus"],
        "domains": m["facts"].get("domains", {}),
        "clock": m["clock"],
        "bytes": m["bytes"],
        "records": m["counts"],
        "events": m["events"],
        "gaps": dataset.gaps(),
        "blind_share": blind_share(dataset),
        "notes": _note_counts(dataset.notes()),
        "facts": m["facts"],
        "systems": {
            name: [{"rule": c.rule, "state": c.state, "reason": c.reason} for c in of] for name, of in rules.items()
        },
        "seen": {name: sight_document(sight(SYSTEMS[name], of)) for name, of in rules.items()},
    }


def wake_budget_text(spent: dict[str, Any]) -> Sequence[str]:
    """The budget for a terminal."""
    from replay.budget import budget_text

    return budget_text(spent) or [
        "no wake can be followed to a guest's handler: ingest the hypervisor's xentrace (-e 0x00803000 and the "
        "scheduler) together with the guest's ftrace on one clock"
    ]


def info_text(dataset: Dataset) -> str:
    """What a person asks first."""
    d = info_document(dataset)
    unit = d["clock"]["unit"]
    span = d["span"]
    lines = [
        *(f"{clean(str(s['name']))}  ({s['format']}, {s['bytes']:,} bytes)" for s in d["inputs"]),
        *(f"sha256    {s['sha256']}" for s in d["inputs"]),
        *_together(dataset.manifest),
        f"span      {_seconds(span['t1_ns'] - span['t0_ns'], unit)}, {span['records']:,} records",
        f"CPUs      {', '.join(map(str, d['cpus']))}",
        f"domains   {_domains(d['domains'])}",
        f"clock     {_clock(d['clock'])}",
        f"bytes     {d['bytes']['parsed']:,} parsed, {d['bytes']['skipped']:,} skipped",
        f"gaps      {_gaps(d)}",
        "",
        "records",
    ]
    top = sorted(d["records"].items(), key=lambda item: -item[1])
    lines.extend(f"  {count:>12,}  {clean(name)}" for name, count in top[:16])
    if len(top) > 16:
        lines.append(f"  {sum(c for _, c in top[16:]):>12,}  in {len(top) - 16} other kinds")
    lines += ["", "what can be checked"]
    for name, rules in d["systems"].items():
        lines.extend(_coverage_lines(name, rules, d["facts"].get(name), d["seen"][name]["state"]))
    loud = [n for n in dataset.notes() if n["severity"] != "info"]
    if loud:
        lines += ["", "notes", *(f"  {n['severity']}: {clean(n['text'])} (offset {n['offset']})" for n in loud[:12])]
    return "\n".join(lines)


def _domains(domains: Mapping[str, int]) -> str:
    if not domains:
        return "unknown (no scheduler records)"
    return ", ".join(f"d{dom} ({n} vCPU{'s' if n > 1 else ''})" for dom, n in domains.items())


def _gaps(document: Mapping[str, Any]) -> str:
    gaps = document["gaps"]
    return f"{len(gaps)}: {_gap_summary(gaps)}; {document['blind_share']:.2%} of the time" if gaps else "none"


def _coverage_lines(name: str, rules: Sequence[Mapping[str, str]], why: Any, state: str) -> list[str]:
    states = {s: [r for r in rules if r["state"] == s] for s in ("checked", "inferred", "blind")}
    counted = ", ".join(f"{len(v)} {k}" for k, v in states.items() if v)
    reason = f"  ({clean(why)})" if isinstance(why, str) else ""
    lines = [f"  {name:<9} {counted}{reason}"]
    if state == "inconclusive":
        lines.append("            no rule for an error can be decided: finding nothing will not mean clean")
    if states["checked"] or states["inferred"]:
        for state in ("checked", "inferred", "blind"):
            if states[state]:
                listed = ", ".join(r["rule"] for r in states[state])
                lines += textwrap.wrap(f"{state}: {listed}", 96, initial_indent=" " * 12, subsequent_indent=" " * 14)
    return lines


# -- codes ---------------------------------------------------------------------------------------------------------


def code_document(system: str, code: Code) -> dict[str, Any]:
    """`explain CODE --json`."""
    return {
        "code": code.name, "system": system, "severity": code.severity, "rule": code.rule, "source": code.source,
        "doc": code.doc, "cause": code.cause, "not_when": code.not_when, "needs": list(code.needs),
        "thresholds": list(code.thresholds),
    }  # fmt: skip


def code_text(system: str, code: Code, parameters: Mapping[str, Parameter]) -> str:
    """The declaration of a code in words."""

    def item(label: str, text: str) -> list[str]:
        return textwrap.wrap(f"{label:<14}{text}", 96, subsequent_indent=" " * 14) if text else []

    lines = [f"{code.name}  ({code.severity}, system {system}, rule {code.rule})", ""]
    lines += item("what", code.doc) + item("cause", code.cause) + item("not when", code.not_when)
    lines += item("source", code.source)
    lines += item("needs", ", ".join(n.replace("|", " or ") for n in code.needs))
    for name in code.thresholds:
        p = parameters.get(name)
        if p is not None:
            lines += item("threshold", f"{system}.{name} = {p.default} {p.unit}: {p.doc}")
    return "\n".join(lines)
