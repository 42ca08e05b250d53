"""The HTML report: one document with everything in it, that asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from typing import Any, Final

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from replay.systems import SYSTEMS
from tracetool import __version__
from tracetool.report import recorded, stories, verdict, words
from tracetool.report.around import Events
from tracetool.report.charts import Chart, overview_chart, story_chart
from tracetool.report.compare import comparison
from tracetool.report.figures import finding_lanes
from tracetool.report.overview import overview
from tracetool.report.stories import Step, Story
from tracetool.report.tables import Table, tables
from tracetool.report.timeline import Moment, Window, meanings
from tracetool.report.vendor import PLOTLYJS_VERSION, plotlyjs
from tracetool.report.window import STORIES, view_of
from tracetool.store import Dataset

__all__ = ["CHART_BYTES", "render"]

#: Episodes that the verdict names.
FIRST: Final = 5
#: Lines of the table of episodes that are not told in full, and occurrences listed for one episode.
LISTED: Final = 250
OCCURRENCES: Final = 60
#: All charts together may take this much (bytes); an episode whose chart does not fit is told without one.
CHART_BYTES: Final = 640_000
#: Rows of gaps and notes that are listed.
ROWS: Final = 300
#: Recorded events listed before and after a finding.
BEFORE, AFTER = 12, 5


def render(
    dataset: Dataset,
    runs: Sequence[Mapping[str, Any]],
    *,
    command: str = "",
    beside: Sequence[Table] | None = None,
) -> str:
    """The report of a dataset and the runs over it, as one HTML document.

    `runs` are records of `results.run_record`; `command` the command line that made the report; `beside` the tables
    of `tables.tables`, if they have been made already. The same input gives the same bytes. Typically 1.5 to 2.5 MB,
    of which plotly.js is 1.2 MB.
    """
    manifest = dataset.manifest
    times = recorded.times_of(manifest)
    gaps = dataset.gaps()
    notes = dataset.notes()
    told = stories.stories(runs, times, gaps=gaps)
    place = partial(_place, len(manifest.get("inputs") or ()) == 1)
    figures = _Figures()
    view = overview(dataset, gaps)
    whole = figures.add(overview_chart(view, told, gaps, times), force=True) if view else None
    events = Events(dataset) if view else None
    details = [_detail(events, story, gaps, times, figures, place) for story in told[:STORIES]]
    script = _source("report.js")
    library = plotlyjs()
    context = {
        "inputs": manifest.get("inputs") or [],
        "title": recorded.title_of(manifest, dataset.path.name),
        "verdict": verdict.overall(runs),
        "headline": verdict.headline(runs, times),
        "summaries": [verdict.run_summary(r, times) for r in runs],
        "titles": {r["system"]: r.get("title", "") for r in runs},
        "worst": [_line(s, times, place) for s in told[:FIRST] if s.severity != "info"],
        "sights": {r["system"]: _sentence((r.get("seen") or {}).get("text", "")) for r in verdict.primary(runs)},
        "facts": _facts(manifest, times),
        "concluded": _concluded(manifest),
        "counts": sorted((manifest.get("counts") or {}).items(), key=lambda kv: (-kv[1], kv[0])),
        "observed": sorted((manifest.get("observed") or {}).items()),
        "gaps": [_gap(g, times) for g in gaps[:ROWS]],
        "gaps_more": max(0, len(gaps) - ROWS),
        "gaps_total": len(gaps),
        "notes": notes[:ROWS],
        "notes_more": max(0, len(notes) - ROWS),
        "rules": _by_system(verdict.rules(runs)),
        "details": details,
        "rest": [_line(s, times, place) for s in told[STORIES : STORIES + LISTED]],
        "rest_more": max(0, len(told) - STORIES - LISTED),
        "episodes": len(told),
        "predicted": [_line(s, times, place) for s in _hypothetical(runs, times)],
        "overview": whole,
        "beside": tables(dataset, runs, times) if beside is None else beside,
        "policies": comparison(runs, times),
        "configs": _configs(runs),
        "legend": sorted(figures.kinds.items()),
        "command": command or manifest.get("command", ""),
        "ingest_command": manifest.get("command", ""),
        "versions": {
            "tracetool": __version__,
            "plotly.js": PLOTLYJS_VERSION,
            "dataset made by": recorded.tool_of(manifest),
        },
        "suppressed": sum(sum((r.get("suppressed") or {}).values()) for r in runs),
        "times": times,
        "words": words,
        "css": Markup(_source("report.css")),
        "library": Markup(library),
        "script": Markup(script),
        "figures": Markup(figures.json()),
        "csp": f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'",
    }
    return _environment().from_string(_source("report.html.j2")).render(context)


#: Writes where a record is from its source and offset.
Place = Callable[[object, int | None], str]


class _Figures:
    """The figures of the charts that are drawn, within CHART_BYTES."""

    def __init__(self) -> None:
        self.parts: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self.left = CHART_BYTES

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


def _finalize(value: object) -> object:
    """Every printed value: markup as it is, all else without control and reordering characters."""
    if isinstance(value, Markup):
        return value
    return "" if value is None else words.clean(value)


def _environment() -> Environment:
    environment = Environment(
        autoescape=True, finalize=_finalize, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
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
        for i, f in enumerate(story.findings[:OCCURRENCES])
    ]
    return {
        "story": story,
        "run": verdict.run_name(story.run),
        "steps": _told(story, view, times, place),
        "chart": chart,
        "occurrences": occurrences if len(story.findings) > 1 else [],
        "occurrences_more": max(0, len(story.findings) - OCCURRENCES),
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
    return stories.stories(other, times, only_primary=False)[:LISTED] if other else []


def _by_system(rules: Sequence[verdict.Rule]) -> list[tuple[str, list[verdict.Rule]]]:
    grouped: dict[str, list[verdict.Rule]] = {}
    for rule in rules:
        grouped.setdefault(rule.system, []).append(rule)
    return list(grouped.items())


def _configs(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
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


def _gap(gap: Mapping[str, Any], times: words.Times) -> dict[str, Any]:
    t0, t1 = gap.get("t0_ns"), gap.get("t1_ns")
    return {
        **gap,
        "from": times.at(t0),
        "to": times.at(t1),
        "long": times.span(t1 - t0) if t0 is not None and t1 is not None else "unknown",
    }


def _facts(manifest: Mapping[str, Any], times: words.Times) -> list[tuple[str, str]]:
    """What was recorded, as pairs of words and values; what the manifest does not say is said to be unknown."""
    span = manifest.get("span") or {}
    clock = manifest.get("clock") or {}
    account = manifest.get("bytes") or {}
    facts = []
    t0, t1 = span.get("t0_ns"), span.get("t1_ns")
    if t0 is not None and t1 is not None:
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


def _concluded(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the binding concluded from the records, as pairs of words and values."""
    facts = (manifest.get("facts") or {}).items()
    return [(str(key).replace("_", " "), _plain(value)) for key, value in facts if key not in _ELSEWHERE]


def _sentence(text: str) -> str:
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
