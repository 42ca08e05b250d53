"""The report as Markdown for an issue tracker. Nothing that a recording says can become markup."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tracetool import __version__
from tracetool.report import recorded, stories, verdict
from tracetool.report.compare import comparison
from tracetool.report.stories import Story
from tracetool.report.tables import Table
from tracetool.report.words import Times, clean, number, plural, size

__all__ = ["escape", "render"]

STORIES: Final = 12
LISTED: Final = 100
_SPECIAL: Final = re.compile(r"([\\`*_\[\]|~@$])")
#: What trackers make a link of; a character without width behind it keeps them from it.
_LINKED: Final = re.compile(r":(?=//)|(?:@|#|\bGH(?=-)|\bwww(?=\.))", re.IGNORECASE)
#: What makes a heading, a list, a quotation or a rule at the start of a line.
_OPENING: Final = re.compile(r"^(\s*)([-+#>=]|\d+(?=[.)](?:\s|$)))")


def escape(text: object) -> str:
    """Text that Markdown shows as it is: no markup, link, mention, HTML or table cell of its own."""
    safe = _SPECIAL.sub(r"\\\1", clean(text)).replace("&", "&amp;").replace("<", "&lt;")
    safe = _OPENING.sub(lambda m: m[1] + (f"\\{m[2]}" if not m[2].isdigit() else f"{m[2]}\u2060"), safe)
    # Addresses, people and issues would become links by themselves, and issues would be told of the mention.
    return _LINKED.sub(lambda m: m[0] + "\u2060", safe)


def _code(text: object) -> str:
    """Inline code; the text cannot end it."""
    return "`" + clean(text).replace("`", "ˋ").replace("|", "¦") + "`"


def render(
    runs: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    *,
    gaps: Sequence[Mapping[str, Any]] | None = None,
    beside: Sequence[Table] = (),
) -> str:
    """Verdict, recording, coverage, stories and metrics. `gaps`: the dataset's, if at hand; `beside`: further tables
    (`tables.tables`)."""
    times = recorded.times_of(manifest)
    out = ["## " + escape(recorded.title_of(manifest)), "", f"**{escape(verdict.headline(runs, times))}**", ""]
    for item in manifest.get("inputs") or ():
        line = f"{recorded.input_name(item)} ({item.get('format', 'unknown')}, {size(item.get('bytes'))})"
        out += [f"* {escape(line)}, sha256 {_code(item.get('sha256') or 'not computed')}"]
    out += [f"* Clock: {escape(recorded.clock_words(manifest.get('clock') or {}))}"]
    if gaps is not None:
        out += [f"* Gaps: {escape(plural(len(gaps), 'gap') if gaps else 'none known')}"]
    out += [""]
    out += _coverage(runs, manifest)
    told = stories.stories(runs, times, gaps=gaps or ())
    for story in told[:STORIES]:
        out += _story(story, times, gaps is not None)
    if len(told) > STORIES:
        out += [f"### {escape(plural(len(told) - STORIES, 'further episode'))}", ""]
        for story in told[STORIES : STORIES + LISTED]:
            out += [f"* {_code(story.id)} {story.severity}: {escape(story.title)}, {times.at(story.first['t_ns'])}"]
        if len(told) > STORIES + LISTED:
            out += [f"* and {number(len(told) - STORIES - LISTED)} more in the JSON output"]
        out += [""]
    for extra in beside:
        out += [f"### {escape(extra.title)}", "", *([escape(extra.note), ""] if extra.note else [])]
        out += _table([escape(h) for h in extra.heads()], [[escape(c) for c in row] for row in extra.shown])
        if extra.more:
            out += [f"and {number(extra.more)} more in the JSON output", ""]
    for table in comparison(runs, times):
        out += _policies(table)
    out += [f"tracetool {__version__}", ""]
    return "\n".join(out).replace("\u202f", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|".join(["---"] * len(head))
    return ["| " + " | ".join(head) + " |", f"|{rule}|", *("| " + " | ".join(r) + " |" for r in rows), ""]


def _coverage(runs: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> list[str]:
    rules = verdict.rules(runs, manifest)
    if not rules:
        return []
    rows = [
        [_code(r.name), r.state.upper() if r.state == "blind" else r.state,
         "cannot tell" if r.findings is None else number(r.findings), escape(r.reason)]
        for r in rules
    ]  # fmt: skip
    blind = sum(r.state == "blind" for r in rules)
    summary = f"Coverage: {len(rules)} rules, {blind} blind"
    return [
        f"<details><summary>{summary}</summary>",
        "",
        *_table(("rule", "state", "found", "why"), rows),
        "</details>",
        "",
    ]


def _story(story: Story, times: Times, gaps_known: bool) -> list[str]:
    first, code = story.first, story.code
    out = [f"### {_code(story.id)} {story.severity}: {escape(story.title)}", ""]
    note = ", **predicted by the model, not recorded**" if story.predicted else ""
    out += [f"{escape(verdict.run_name(story.run))}{note}.", ""]
    if code:
        out += [escape(code.doc.replace("`", "")), ""]
    rows = [
        ["expected", escape(first["expected"] or "not stated")],
        ["observed", escape(first["observed"] or "not stated")],
    ]
    rows += [[escape(name.lower()), escape(value)] for name, value in story.facts.items()]
    if gaps_known:
        rows += [["nearest gap", escape(story.gap)]]
    if code:
        rows += [["probable cause", escape(code.cause or "not declared")]]
        rows += [["not reported when", escape(code.not_when or "no exception is declared")]]
        rows += [["rule", escape(f"{code.rule} ({code.source})")]]
    out += _table(("", ""), rows)
    if story.steps:
        kind = "predicted" if story.predicted else "computed"
        steps = [
            [times.relative(s.t_ns - first["t_ns"]), escape(s.text), "evidence" if s.origin == "evidence" else kind,
             "" if s.offset is None else _code(f"{s.offset:#x}")]
            for s in story.steps
        ]  # fmt: skip
        out += _table(("time", "event", "", "offset"), steps)
    if story.others:
        others = [[escape(o.policy), escape(o.says), escape(o.evidence)] for o in story.others]
        out += _table(("other policy", "says", "worth"), others)
    return out


def _policies(table: Mapping[str, Any]) -> list[str]:
    runs = table["runs"]
    head = [escape(table["system"]), *(escape(f"{r['policy']} ({r['mode']})") for r in runs)]
    rows = [["verdict", *(r["verdict"] for r in runs)], ["worth", *(escape(r["trust"]) for r in runs)]]
    rows += [[_code(f["name"]), *map(escape, f["cells"])] for f in table["found"]]
    rows += [[escape(m["label"]), *(escape(c[0]) for c in m["cells"])] for m in table["rows"]]
    why = [escape(table["why"]), ""] if table["why"] else []
    return [f"### Policies of {escape(table['system'])}", "", *why, *_table(head, rows)]
