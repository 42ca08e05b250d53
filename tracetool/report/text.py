"""The report as plain text for a mailing list: no line is longer than `width`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tracetool import __version__
from tracetool.report import recorded, stories, verdict
from tracetool.report.compare import comparison
from tracetool.report.stories import Story
from tracetool.report.tables import Table
from tracetool.report.words import Times, clean, lines, number, plural, size

__all__ = ["STORIES", "render", "story_lines"]

#: Episodes told in full; the others get a line each, up to LISTED.
STORIES: Final = 12
LISTED: Final = 60


def render(
    runs: Sequence[Mapping[str, Any]],
    manifest: Mapping[str, Any],
    width: int = 72,
    *,
    gaps: Sequence[Mapping[str, Any]] | None = None,
    beside: Sequence[Table] = (),
) -> str:
    """Verdict, recording, rules that could not be checked, stories and metrics. `gaps`: the dataset's, if at hand;
    `beside`: further tables (`tables.tables`)."""
    width = max(width, 40)
    times = recorded.times_of(manifest)
    out = [*lines(verdict.headline(runs, times), width), ""]
    out += _recording(manifest, times, width, gaps)
    out += _rules(runs, manifest, width)
    told = stories.stories(runs, times, gaps=gaps or ())
    for story in told[:STORIES]:
        out += [*story_lines(story, times, width, gaps_known=gaps is not None), ""]
    rest = told[STORIES:]
    if rest:
        out += [f"{plural(len(rest), 'further episode')}:"]
        for story in rest[:LISTED]:
            text = f"[{story.id}] {story.severity}: {story.title}, {times.at(story.first['t_ns'])}"
            out += lines(text, width, indent="    ", first="  ")
        if len(rest) > LISTED:
            out += [f"  and {number(len(rest) - LISTED)} more in the JSON output"]
        out += [""]
    for table in beside:
        out += _beside(table, width)
    out += _policies(runs, times, width)
    out += ["-- ", f"tracetool {__version__}"]
    return "\n".join(line.rstrip() if line != "-- " else line for line in out).replace("\u202f", " ") + "\n"


def _field(name: str, value: object, width: int, label: int = 11) -> list[str]:
    """`name: value`, the value wrapped beside its name."""
    head = f"  {clean(name)}:".ljust(label + 3)
    return lines(value, width, indent=" " * (label + 3), first=head) or [head]


def _recording(
    manifest: Mapping[str, Any], times: Times, width: int, gaps: Sequence[Mapping[str, Any]] | None
) -> list[str]:
    out = ["Recording"]
    for item in manifest.get("inputs") or ():
        out += _field(
            "file", f"{recorded.input_name(item)} ({item.get('format', 'unknown')}, {size(item.get('bytes'))})", width
        )
        out += _field("sha256", item.get("sha256") or "not computed", width)
    span = manifest.get("span") or {}
    if (manifest.get("clock") or {}).get("kind") == "none":
        out += _field("span", "none: a snapshot has no times", width)
    elif span.get("t0_ns") is not None and span.get("t1_ns") is not None:
        out += _field("span", times.span(span["t1_ns"] - span["t0_ns"]), width)
    out += _field("clock", recorded.clock_words(manifest.get("clock") or {}), width)
    account = manifest.get("bytes") or {}
    if account:
        out += _field(
            "bytes", f"{number(account.get('parsed'))} parsed, {number(account.get('skipped'))} skipped", width
        )
    if gaps is not None:
        lost = sum(g.get("lost") or 0 for g in gaps)
        text = plural(len(gaps), "gap") + (f", {plural(lost, 'record')} known to be lost" if lost else "")
        out += _field("gaps", text if gaps else "none known", width)
    return [*out, ""]


def _rules(runs: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any], width: int) -> list[str]:
    done = {run["system"] for run in runs}
    every = verdict.rules(runs, manifest)
    rules = [r for r in every if r.system in done]
    if not every:
        return []
    states = {state: [r for r in rules if r.state == state] for state in ("checked", "inferred", "blind")}
    out = ["Rules: " + ", ".join(f"{len(v)} {k}" for k, v in states.items())]
    for rule in states["inferred"]:
        out += lines(f"inferred {rule.name}: {rule.reason}", width, indent="    ", first="  ")
    for rule in states["blind"]:
        out += lines(f"BLIND {rule.name}: {rule.reason}", width, indent="    ", first="  ")
    for system in dict.fromkeys(r.system for r in every if r.system not in done):
        for state in ("checked", "inferred", "blind"):
            names = [r.name for r in every if r.system == system and r.state == state]
            if names:
                head = f"{system} not replayed, {state.upper() if state == 'blind' else state}: "
                out += lines(head + ", ".join(names), width, indent="    ", first="  ")
    return [*out, ""]


def story_lines(story: Story, times: Times, width: int = 72, *, gaps_known: bool = True) -> list[str]:
    """One episode, cleaned and wrapped."""
    first, code = story.first, story.code
    out = lines(f"[{story.id}] {story.severity.upper()} {story.title}", width, indent="    ", first="")
    run = verdict.run_name(story.run)
    out += lines(
        f"{run}{': predicted by the model, not recorded' if story.predicted else ''}", width, indent="  ", first="  "
    )
    if code:
        out += lines(code.doc, width, indent="  ", first="  ")
    out += _field("expected", first["expected"] or "not stated", width)
    out += _field("observed", first["observed"] or "not stated", width)
    for name, value in story.facts.items():
        out += _field(name.lower(), value, width)
    if gaps_known:
        out += _field("gap", story.gap, width)
    if code:
        out += _field("cause", code.cause or "not declared", width)
        out += _field("not when", code.not_when or "no exception is declared", width)
        out += _field("rule", f"{code.rule} ({code.source})", width)
    if story.steps:
        out += ["  events:"]
        for step in story.steps:
            when = times.relative(step.t_ns - first["t_ns"]).rjust(11)
            kind = "" if step.origin == "evidence" else " (predicted)" if story.predicted else " (computed)"
            place = f" @{step.offset:#x}" if step.offset is not None else ""
            out += lines(f"{step.text}{kind}{place}", width, indent=" " * 16, first=f"    {when} ")
    for other in story.others:
        out += lines(
            f"{other.policy} ({other.mode}): {other.says} [{other.evidence}]", width, indent="    ", first="  "
        )
    return out


def _beside(table: Table, width: int) -> list[str]:
    """A table in columns; where it is too wide for that, each row as a list of its cells."""
    out = [*lines(table.title, width), *lines(table.note, width, indent="  ", first="  ")]
    heads, rows = [clean(h) for h in table.heads()], [[clean(cell) for cell in row] for row in table.shown]
    wide = [max(len(head), *(len(row[i]) for row in rows)) for i, head in enumerate(heads)]
    if 2 + sum(wide) + 2 * (len(wide) - 1) <= width:
        for row in (heads, *rows):
            cells = [row[i].rjust(w) if i in table.numeric else row[i].ljust(w) for i, w in enumerate(wide)]
            out.append("  " + "  ".join(cells))
    else:
        for row in rows:
            told = "; ".join(f"{head} {cell}" for head, cell in zip(heads, row, strict=True))
            out += lines(told, width, indent="      ", first="  - ")
    if table.more:
        out.append(f"  and {number(table.more)} more in the JSON output")
    return [*out, ""]


def _policies(runs: Sequence[Mapping[str, Any]], times: Times, width: int) -> list[str]:
    out: list[str] = []
    for table in comparison(runs, times):
        out += lines(f"{table['system']}: {table['title']}", width)
        out += lines(table["why"], width, indent="  ", first="  ")
        heads = [clean(r["policy"]) for r in table["runs"]]
        body = [("verdict", [r["verdict"] for r in table["runs"]])]
        body += [("mode", [r["mode"] for r in table["runs"]])]
        body += [(f["name"], f["cells"]) for f in table["found"]]
        body += [(m["label"], [c[0] for c in m["cells"]]) for m in table["rows"]]
        body = [(clean(n), [clean(c) for c in cells]) for n, cells in body]
        label = min(max(len(n) for n, _ in body), 48) + 1
        room = width - 2 - label
        wide = [min(max(len(head), *(len(cells[i]) for _, cells in body)), room - 2) for i, head in enumerate(heads)]
        for some in _fitting(wide, room):
            out.append(" " * (label + 2) + "".join("  " + heads[i][: wide[i]].rjust(wide[i]) for i in some))
            for name, cells in body:
                row = "".join("  " + cells[i][: wide[i]].rjust(wide[i]) for i in some)
                out.append(f"  {name[:label].ljust(label)}{row}")
            out.append("")
        for run in table["runs"]:
            if run["mode"] != "verify":
                out += lines(f"{run['policy']}: {run['trust']}", width, indent="    ", first="  ")
        out.append("")
    return out


def _fitting(wide: Sequence[int], room: int) -> list[list[int]]:
    """Columns, as many side by side as the room takes."""
    rows: list[list[int]] = []
    left = 0
    for index, width in enumerate(wide):
        if not rows or left < width + 2:
            rows.append([])
            left = room
        rows[-1].append(index)
        left -= width + 2
    return rows
