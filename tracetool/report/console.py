"""The summary that `tracetool replay` shows on a terminal, as rich markup.

Nothing that was recorded can control the terminal or become markup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from rich.markup import escape

from tracetool.report import model
from tracetool.report.words import clean, count, plural

__all__ = ["render", "story"]

_COLOUR: Final[Mapping[str, str]] = {
    "error": "bold red", "warn": "yellow", "info": "cyan", "findings": "bold red", "clean": "green",
    "inconclusive": "bold magenta",
}  # fmt: skip


def _paint(word: str, kind: str) -> str:
    return f"[{_COLOUR.get(kind, 'bold')}]{_safe(word)}[/]"


def _safe(text: object) -> str:
    """Cleaned, and not markup either. A backslash at the end would escape the markup that follows."""
    safe = escape(clean(text))
    return safe + " " if safe.endswith("\\") else safe


def render(runs: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any], *, limit: int = 10) -> str:
    """Verdict, a line for each run, the first `limit` episodes, and what could not be checked; rich markup."""
    times = model.times_of(manifest)
    verdict = model.overall(runs)
    out = [f"{_paint(verdict, verdict)}  {_safe(model.headline(runs, times))}", ""]
    for run in runs:
        summary = model.run_summary(run, times)
        found = model.severities(run["findings"])
        counted = ", ".join(_paint(count({s: n}), s) for s, n in found.items()) or "no findings"
        blind = (
            f", [bold magenta]{summary['blind']} of {len(run['coverage'])} rules blind[/]" if summary["blind"] else ""
        )
        out.append(f"  {_safe(model.run_name(run))}: {_paint(run['verdict'], run['verdict'])}, {counted}{blind}")
    told = model.stories(runs, times)
    if told:
        out.append("")
    for item in told[:limit]:
        predicted = " [dim](predicted)[/]" if item.predicted else ""
        out.append(f"  {item.number:>3} {_paint(item.severity, item.severity)} {_safe(item.title)}{predicted}")
        first = item.first
        observed, expected = _safe(first["observed"] or "not stated"), _safe(first["expected"] or "not stated")
        out.append(f"      [dim]{times.at(first['t_ns'])}[/] {observed} [dim](expected: {expected})[/]")
    if len(told) > limit:
        out.append(f"      … and {plural(len(told) - limit, 'more episode')}")
    return "\n".join(out) + "\n"


def story(item: model.Story, times: Any, *, width: int = 100) -> str:
    """One episode for `explain`, rich markup."""
    from tracetool.report.text import story_lines

    lines = story_lines(item, times, width)
    colour = _COLOUR.get(item.severity, "bold")
    return "\n".join([f"[{colour}]{_safe(lines[0])}[/]", *map(_safe, lines[1:])]) + "\n"
