"""The HTML report: one document with everything in it, that asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from replay.systems import SYSTEMS
from tracetool import __version__
from tracetool.report import facts, recorded, stories, verdict, words
from tracetool.report.around import Events
from tracetool.report.charts import Chart, overview_chart, story_chart
from tracetool.report.compare import comparison
from tracetool.report.figures import finding_lanes
from tracetool.report.limits import LADDER, MAX_BYTES, Limits
from tracetool.report.overview import Overview, overview
from tracetool.report.stories import Step, Story
from tracetool.report.tables import Table, tables
from tracetool.report.timeline import Moment, Window, meanings
from tracetool.report.vendor import PLOTLYJS_VERSION, plotlyjs
from tracetool.report.window import view_of
from tracetool.store import Dataset

__all__ = ["render"]

#: Episodes that the verdict names.
FIRST: Final = 5
#: Recorded events listed before and after a finding.
BEFORE, AFTER = 12, 5


def render(
    dataset: Dataset,
    runs: Sequence[Mapping[str, Any]],
    *,
    command: str = "",
    beside: Sequence[Table] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> str:
    """The report of a dataset and the runs over it, as one HTML document.

    `runs` are records of `results.run_record`; `command` the command line that made the report; `beside` the tables
    of `tables.tables`, if they have been made already. The same input gives the same bytes. Typically 1.5 to 2.5 MB,
    of which plotly.js is 1.2 MB; never more than MAX_BYTES, whatever was found and however long its strings are.
    """
    gaps = dataset.gaps()
    times = recorded.times_of(dataset.manifest)
    whole = _Whole(
        dataset, runs, command, gaps, dataset.notes(), stories.stories(runs, times, gaps=gaps),
        _hypothetical(runs, times), tables(dataset, runs, times) if beside is None else beside,
        overview(dataset, gaps), times,
    )  # fmt: skip
    text = ""
    for limits in LADDER:
        text = _document(whole, limits, progress)
        if len(text.encode("utf-8", "backslashreplace")) <= MAX_BYTES:
            break
    return text


@dataclass(frozen=True, slots=True)
class _Whole:
    """All that a report may tell, whatever of it there is room for."""

    dataset: Dataset
    runs: Sequence[Mapping[str, Any]]
    command: str
    gaps: Sequence[Mapping[str, Any]]
    notes: Sequence[Mapping[str, Any]]
    told: Sequence[Story]
    predicted: Sequence[Story]
    beside: Sequence[Table]
    view: Overview | None
    times: words.Times


def _document(whole: _Whole, limits: Limits, progress: Callable[[str, int, int], None] | None) -> str:
    """The report within these limits."""
    manifest, runs, times, gaps, notes = whole.dataset.manifest, whole.runs, whole.times, whole.gaps, whole.notes
    told, view = whole.told, whole.view
    place = partial(_place, len(manifest.get("inputs") or ()) == 1)
    figures = _Figures(limits.chart_bytes)
    drawn = figures.add(overview_chart(view, told, gaps, times), force=True) if view else None
    events = Events(whole.dataset) if view else None
    details = []
    for story in told[: limits.stories]:
        details.append(_detail(events, story, gaps, times, figures, place, limits))
        if progress:
            progress("stories", len(details), min(len(told), limits.stories))
    listed = told[limits.stories : limits.stories + limits.listed]
    beyond = told[limits.stories + limits.listed :]
    counts = sorted((manifest.get("counts") or {}).items(), key=lambda kv: (-kv[1], kv[0]))
    observed = sorted((manifest.get("observed") or {}).items())
    concluded = facts.concluded(manifest)
    command = whole.command
    script = _source("report.js")
    library = plotlyjs()
    context = {
        "inputs": (manifest.get("inputs") or [])[: limits.rows],
        "inputs_more": max(0, len(manifest.get("inputs") or ()) - limits.rows),
        "title": recorded.title_of(manifest, whole.dataset.path.name),
        "verdict": verdict.overall(runs),
        "headline": verdict.headline(runs, times),
        "summaries": [verdict.run_summary(r, times) for r in runs],
        "titles": {name: system.title for name, system in SYSTEMS.items()},
        "replayed": {r["system"] for r in runs},
        "worst": [_line(s, times, place) for s in told[:FIRST] if s.severity != "info"],
        "sights": {r["system"]: facts.sentence((r.get("seen") or {}).get("text", "")) for r in verdict.primary(runs)},
        "facts": facts.facts(manifest, times),
        "concluded": concluded[: limits.rows],
        "concluded_total": len(concluded),
        "counts": counts[: limits.rows],
        "counts_total": len(counts),
        "observed": observed[: limits.rows],
        "observed_total": len(observed),
        "gaps": [facts.gap(g, times) for g in gaps[: limits.rows]],
        "gaps_more": max(0, len(gaps) - limits.rows),
        "gaps_total": len(gaps),
        "notes": notes[: limits.rows],
        "notes_more": max(0, len(notes) - limits.rows),
        "rules": facts.by_system(verdict.rules(runs, manifest)),
        "details": details,
        "rest": [_line(s, times, place) for s in listed],
        "beyond": _summed(beyond, times),
        "episodes": len(told),
        "predicted": [_line(s, times, place) for s in whole.predicted[: limits.listed]],
        "predicted_beyond": _summed(whole.predicted[limits.listed :], times),
        "predicted_total": len(whole.predicted),
        "overview": drawn,
        "beside": whole.beside,
        "policies": comparison(runs, times),
        "configs": facts.configs(runs),
        "legend": sorted(figures.kinds.items()),
        "command": command or manifest.get("command", ""),
        "ingest_command": manifest.get("command", ""),
        "versions": {
            "tracetool": __version__,
            "plotly.js": PLOTLYJS_VERSION,
            "dataset made by": recorded.tool_of(manifest),
        },
        "times": times,
        "words": words,
        "css": Markup(_source("report.css")),
        "library": Markup(library),
        "script": Markup(script),
        "figures": Markup(figures.json()),
        "csp": f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'",
    }
    return _environment(limits.text).from_string(_source("report.html.j2")).render(context)


#: Writes where a record is from its source and offset.
Place = Callable[[object, int | None], str]


class _Figures:
    """The figures of the charts that are drawn, within so many bytes."""

    def __init__(self, left: int) -> None:
        self.parts: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.left = left

    def add(self, chart: Chart, *, force: bool = False) -> Chart | None:
        """The chart if it fits, else None."""
        text = _json(chart.figure())
        if len(text) > self.left and not force:
            return None
        self.left -= len(text)
        self.parts[chart.id] = text
        return chart

    def json(self) -> str:
        """All figures as one JSON object, safe inside a script element."""
        return "{" + ",\n".join(f'"{key}":{value}' for key, value in self.parts.items()) + "}"


def _json(value: object) -> str:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _source(name: str) -> str:
    return files("tracetool.report").joinpath(name).read_text(encoding="utf-8")


def _environment(limit: int) -> Environment:
    """Templates in which every value but markup is printed without control and reordering characters, and no value
    that came from outside is longer than `limit` characters."""

    def finalize(value: object) -> object:
        if isinstance(value, Markup):
            return value
        return "" if value is None else words.clean(value, limit)

    environment = Environment(
        autoescape=True, finalize=finalize, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["prose"] = _prose
    return environment


def _prose(text: object) -> Markup:
    """Declared prose: `name` in back quotes is code."""
    parts = words.clean(text).split("`")
    if len(parts) % 2 == 0:
        return escape(words.clean(text))
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(parts))


def _detail(
    events: Events | None,
    story: Story,
    gaps: Sequence[Mapping[str, Any]],
    times: words.Times,
    figures: _Figures,
    place: Place,
    limits: Limits,
) -> dict[str, Any]:
    """One episode with its window, chart and occurrences."""
    view: Window | None = None
    chart: Chart | None = None
    if events is not None:
        view = view_of(events, story, gaps, times)
        chart = story_chart(story, view, gaps, times)
        fits = figures.add(chart)
        if fits is None:
            chart = None
        figures.kinds.update(meanings(m.kind for m in view.moments))
    occurrences = [
        {
            "t": times.at(f["t_ns"]),
            "dt": times.relative(f["t_ns"] - story.findings[max(i - 1, 0)]["t_ns"]) if i else "",
            "expected": f["expected"],
            "observed": f["observed"],
            "val": f.get("val"),
            "confidence": f["confidence"],
            "place": place(f.get("source"), f.get("offset")),
        }
        for i, f in enumerate(story.findings[: limits.occurrences])
    ]
    return {
        "story": story,
        "run": verdict.run_name(story.run),
        "steps": _told(story, view, times, place),
        "chart": chart,
        "occurrences": occurrences if len(story.findings) > 1 else [],
        "occurrences_more": max(0, len(story.findings) - limits.occurrences),
    }


def _told(story: Story, view: Window | None, times: words.Times, place: Place) -> list[dict[str, Any]]:
    """The events of a story in order: its evidence, and what was recorded beside it on the same lanes."""
    first = story.first
    t = first["t_ns"]
    steps = list(story.steps)
    if view is not None:
        known = {s.seq for s in steps if s.seq is not None}
        lanes = set(finding_lanes(first, story.run["system"]))
        lanes |= {m.lane for m in view.moments if m.seq in known}
        near = [m for m in view.moments if m.lane in lanes and m.seq not in known and not _stranger(m, story)]
        before = [m for m in near if m.t <= t][-BEFORE:]
        after = [m for m in near if m.t > t][:AFTER]
        steps += [Step(m.t, m.text, "context", m.source, m.offset, m.seq) for m in (*before, *after)]
    rows = [
        {
            "t": s.t_ns,
            "seq": -1 if s.seq is None else s.seq,
            "dt": times.relative(s.t_ns - t),
            "text": s.text,
            "origin": "computed" if s.origin == "model" and not story.predicted else s.origin,
            "place": place(s.source, s.offset),
        }
        for s in steps
    ]
    rows.sort(key=lambda r: (r["t"], r["seq"]))
    here = next((i for i, r in enumerate(rows) if r["t"] > t), len(rows))
    observed = first["observed"] or first["code"]
    here_place = place(first.get("source"), first.get("offset"))
    rows.insert(here, {"t": t, "seq": 0, "dt": "0", "text": observed, "origin": "finding", "place": here_place})
    return rows


def _stranger(moment: Moment, story: Story) -> bool:
    """Whether an event is about another object of the same kind as the finding's: another port, another channel."""
    own = story.first.get("obj")
    same = words.noun(moment.kind) == words.noun(story.first["code"], story.run["system"])
    return own is not None and same and moment.obj not in (None, own)


def _place(single: bool, source: object, offset: int | None) -> str:
    """Where in which file; a single file goes without saying."""
    if offset is None:
        return ""
    return f"{offset:#x}" if single or not source else f"{source} {offset:#x}"


def _line(story: Story, times: words.Times, place: Place) -> dict[str, Any]:
    first = story.first
    return {
        "id": story.id, "severity": story.severity, "code": first["code"], "run": verdict.run_name(story.run),
        "where": words.where(first, story.run["system"]), "t": times.at(first["t_ns"]), "n": len(story.findings),
        "expected": first["expected"], "observed": first["observed"], "confidence": first["confidence"],
        "place": place(first.get("source"), first.get("offset")),
        "evidence": verdict.reliable(story.run, first["t_ns"], times, brief=True),
    }  # fmt: skip


def _hypothetical(runs: Sequence[Mapping[str, Any]], times: words.Times) -> list[Story]:
    """Episodes of the runs that say what another policy would have done."""
    judged = {id(r) for r in verdict.primary(runs)}
    other = [r for r in runs if id(r) not in judged]
    return stories.stories(other, times, only_primary=False) if other else []


def _summed(told: Sequence[Story], times: words.Times) -> list[dict[str, Any]]:
    """Episodes that have no line of their own, by severity and code: none is left out of the sums."""
    groups: dict[tuple[str, str, str], list[Story]] = {}
    for story in told:
        groups.setdefault((story.severity, story.first["code"], verdict.run_name(story.run)), []).append(story)
    return [
        {
            "severity": severity, "code": code, "run": run, "episodes": len(some),
            "findings": sum(len(s.findings) for s in some),
            "first": times.at(min(s.first["t_ns"] for s in some)),
            "last": times.at(max(s.findings[-1]["t_ns"] for s in some)),
        }
        for (severity, code, run), some in groups.items()
    ]  # fmt: skip
