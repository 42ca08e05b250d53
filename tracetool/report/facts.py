"""What was recorded and how it was judged, as the rows of a report's tables and lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from replay.systems import SYSTEMS
from tracetool.report import recorded, verdict, words

__all__ = ["by_system", "concluded", "configs", "facts", "gap", "ranges", "sentence"]


def by_system(rules: Sequence[verdict.Rule]) -> list[tuple[str, list[verdict.Rule]]]:
    grouped: dict[str, list[verdict.Rule]] = {}
    for rule in rules:
        grouped.setdefault(rule.system, []).append(rule)
    return list(grouped.items())


def configs(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Thresholds of each system; runs of one system that differ are listed apart."""
    seen: list[dict[str, Any]] = []
    for run in runs:
        config = run.get("config") or {}
        match = next((s for s in seen if s["system"] == run["system"] and s["config"] == config), None)
        if match:
            match["policies"].append(run["policy"])
        else:
            seen.append({"system": run["system"], "policies": [run["policy"]], "config": config})
    return seen


def gap(gap: Mapping[str, Any], times: words.Times) -> dict[str, Any]:
    t0, t1 = gap.get("t0_ns"), gap.get("t1_ns")
    return {
        **gap,
        "from": times.at(t0),
        "to": times.at(t1),
        "long": times.span(t1 - t0) if t0 is not None and t1 is not None else "unknown",
    }


def facts(manifest: Mapping[str, Any], times: words.Times) -> list[tuple[str, str]]:
    """What was recorded, as pairs of words and values; what the manifest does not say is said to be unknown."""
    span = manifest.get("span") or {}
    clock = manifest.get("clock") or {}
    account = manifest.get("bytes") or {}
    facts = []
    t0, t1 = span.get("t0_ns"), span.get("t1_ns")
    if clock.get("kind") == "none":
        facts.append(("Span", "none: a snapshot has no times"))
    elif t0 is not None and t1 is not None:
        facts.append(("Span", f"{times.span(t1 - t0)}, from {times.at(t0)} to {times.at(t1)}"))
    else:
        facts.append(("Span", "unknown"))
    cpus = manifest.get("cpus")
    if cpus is not None:
        facts.append(("CPUs", f"{len(cpus)}: {ranges(cpus)}" if cpus else "none seen"))
    domains = (manifest.get("facts") or {}).get("domains", manifest.get("domains"))
    if isinstance(domains, Mapping) and domains:
        facts.append(("Domains", ", ".join(f"d{dom} with {words.plural(n, 'vCPU')}" for dom, n in domains.items())))
    elif domains:
        facts.append(("Domains", f"{len(domains)}: {ranges(domains)}"))
    facts.append(("Clock", recorded.clock_words(clock)))
    if account:
        total = account.get("total", 0)
        parsed, skipped = account.get("parsed", 0), account.get("skipped", 0)
        text = f"{words.size(total)}: {words.number(parsed)} parsed, {words.number(skipped)} skipped"
        text += ", none unaccounted" if parsed + skipped == total else f", {total - parsed - skipped} UNACCOUNTED"
        facts.append(("Bytes", text))
    counts = manifest.get("counts")
    if counts:
        facts.append(("Records", f"{words.number(sum(counts.values()))} of {words.plural(len(counts), 'kind')}"))
    return facts


#: Facts that stand elsewhere in the report: in a table, among the thresholds, as the reason of a blind rule.
_ELSEWHERE: Final = frozenset({"domains", "hpet_channels", "blind", *(f"{name}_config" for name in SYSTEMS)})


def concluded(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the binding concluded from the records, as pairs of words and values."""
    facts = (manifest.get("facts") or {}).items()
    return [(str(key).replace("_", " "), _plain(value)) for key, value in facts if key not in _ELSEWHERE]


def sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plain(value: object) -> str:
    """A value of the manifest in words."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k}: {_plain(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return str(value) if isinstance(value, str) else words.number(value)


def ranges(values: Sequence[Any]) -> str:
    """Numbers as ranges: `0-3, 7`."""
    if not all(isinstance(v, int) for v in values):
        return ", ".join(map(str, values))
    parts: list[list[int]] = []
    for value in sorted(set(values)):
        if parts and value == parts[-1][1] + 1:
            parts[-1][1] = value
        else:
            parts.append([value, value])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in parts)
