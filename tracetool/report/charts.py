"""Charts as plain plotly figures: colours are the names of CSS variables, so that both themes draw from one figure."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tracetool.report.model import Story
from tracetool.report.overview import Overview
from tracetool.report.timeline import Window, lane_key
from tracetool.report.words import Times, clean, number, percent, where
from tracetool.results import SEVERITIES

__all__ = ["Chart", "overview_chart", "story_chart"]

#: Findings and gaps drawn one by one up to this number; beyond it marks that would coincide become one with a count.
MARKS: Final = 3000
#: Rows of the table below a chart.
TABLE_ROWS: Final = 400

_SYMBOL: Final[Mapping[str, str]] = {
    "hpet.fire": "triangle-down", "hpet.program": "line-ns", "hpet.retarget": "diamond", "wake.post": "arrow-up",
    "lapic.deliver": "triangle-down-open", "lapic.eoi": "triangle-up-open", "lapic.accept": "circle-open",
    "idle.break": "star-triangle-up-open", "via.inject": "triangle-down-open", "via.eoi": "triangle-up-open",
}  # fmt: skip
_LOUD: Final = {"hpet.fire": "--fire", "hpet.retarget": "--retarget", "wake.post": "--wake"}
#: Periods that a timeline draws, back to front: role, colour, height of the bar.
_ROLES: Final = (
    ("idle", "--idle", 0.62),
    ("run", "--run", 0.62),
    ("service", "--service", 0.44),
    ("handler", "--handler", 0.28),
)


@dataclass(slots=True)
class Chart:
    """A figure with its caption and the table that says the same."""

    id: str
    label: str
    caption: str
    height: int
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    head: tuple[str, ...] = ()
    rows: list[tuple[str, ...]] = field(default_factory=list)
    more: int = 0
    figure_json: str = ""

    def figure(self) -> dict[str, Any]:
        """What goes to plotly."""
        return {"data": self.data, "layout": self.layout}


def _text(text: object) -> str:
    """Plotly reads a little HTML in its texts; nothing of a recording may be read so."""
    return html.escape(clean(text, 300), quote=False)


def _bars(
    name: str, colour: str, width: float, bars: Sequence[tuple[str, float, float, str]], **more: Any
) -> dict[str, Any]:
    """Horizontal bars from (lane, start, length, text)."""
    marker: dict[str, Any] = {"color": colour, "line": {"color": colour, "width": more.pop("line", 0.6)}}
    if "pattern" in more:
        marker["pattern"] = more.pop("pattern")
    return {
        "type": "bar", "orientation": "h", "name": name, "width": width, "marker": marker,
        "y": [_text(b[0]) for b in bars], "base": [b[1] for b in bars], "x": [b[2] for b in bars],
        "hovertext": [_text(b[3]) for b in bars], "hoverinfo": "text", **more,
    }  # fmt: skip


def _gap_bars(gaps: Sequence[tuple[str, float, float, str]]) -> dict[str, Any]:
    trace = _bars("no records", "--gap-bg", 0.96, gaps, line=1)
    trace["marker"]["pattern"] = {"shape": "/", "fgcolor": "--gap", "bgcolor": "--gap-bg", "size": 7, "solidity": 0.25}
    trace["marker"]["line"]["color"] = "--gap"
    return trace


def _layout(lanes: Sequence[str], title: str, low: float, high: float, height: int) -> dict[str, Any]:
    return {
        "barmode": "overlay", "height": height, "margin": {"l": 8, "r": 8, "t": 8, "b": 44},
        "xaxis": {"title": {"text": title, "standoff": 6}, "range": [low, high], "zeroline": False, "automargin": True},
        "yaxis": {
            "type": "category", "categoryorder": "array", "categoryarray": [_text(lane) for lane in reversed(lanes)],
            "range": [-0.6, len(lanes) - 0.4], "automargin": True, "fixedrange": True, "showgrid": False,
        },
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "font": {"size": 11}},
        "hovermode": "closest", "dragmode": "zoom", "bargap": 0,
    }  # fmt: skip


def finding_lanes(finding: Mapping[str, Any], system: str) -> list[str]:
    """The lanes that a finding is about."""
    lanes = []
    if finding.get("vcpu") is not None:
        dom = finding.get("dom")
        lanes.append(f"d{'?' if dom is None else dom}v{finding['vcpu']}")
    elif finding.get("cpu") is not None:
        lanes.append(f"CPU {finding['cpu']}")
    if system == "hpet" and finding.get("obj") is not None and str(finding.get("code", "")).startswith("hpet"):
        lanes.append(f"HPET channel {finding['obj']}")
    return lanes or [where(finding, system)]


def gap_lanes(gap: Mapping[str, Any], lanes: Sequence[str]) -> list[str]:
    """The lanes of a chart that a gap covers: one CPU and all rows that are not CPUs, or everything."""
    if gap.get("cpu") is None:
        return list(lanes)
    return [lane for lane in lanes if lane == f"CPU {gap['cpu']}" or not lane.startswith("CPU ")]


def _gaps(
    gaps: Sequence[Mapping[str, Any]], lanes: Sequence[str], t0: int, t1: int, origin: int, scale: int, times: Times
) -> list[tuple[str, float, float, str]]:
    """Bars of the gaps that touch [t0, t1]; an open end reaches to the edge."""
    bars = []
    for gap in gaps:
        start = gap["t0_ns"] if gap.get("t0_ns") is not None else None
        end = gap["t1_ns"] if gap.get("t1_ns") is not None else None
        if start is None and end is None:
            continue
        low, high = t0 if start is None else start, t1 if end is None else end
        if high < t0 or low > t1:
            continue
        low, high = max(low, t0), min(high, t1)
        lost = f", {number(gap['lost'])} records lost" if gap.get("lost") else ""
        who = "all CPUs" if gap.get("cpu") is None else f"CPU {gap['cpu']}"
        text = f"{gap.get('reason')} on {who}{lost}: {times.at(start)} to {times.at(end)}"
        bars += [(lane, (low - origin) / scale, (high - low) / scale, text) for lane in gap_lanes(gap, lanes)]
    return bars


def _marks(
    findings: Sequence[tuple[str, Mapping[str, Any], str]], origin: int, scale: int, extent: int, times: Times
) -> list[dict[str, Any]]:
    """Findings as markers. Above MARKS, those of one severity and lane closer than a pixel become one, counted."""
    step = max(extent // 2000, 1) if len(findings) > MARKS else 0
    merged: dict[tuple[str, str, int], tuple[int, int, int, str, str]] = {}
    for index, (lane, finding, tag) in enumerate(findings):
        t = finding["t_ns"]
        key = (finding["severity"], lane, t // step if step else index)
        old = merged.get(key)
        merged[key] = (old[0], t, old[2] + 1, old[3], old[4]) if old else (t, t, 1, finding["code"], tag)
    traces = []
    # Open shapes: the events underneath stay visible.
    symbols = {"error": "circle-open", "warn": "square-open", "info": "hexagon-open"}
    for severity in SEVERITIES:
        mine = [(lane, v) for (s, lane, _), v in merged.items() if s == severity]
        if not mine:
            continue
        hover = []
        for _, (low, high, n, code, tag) in mine:
            many = f"{number(n)} findings, {times.at(low)} to {times.at(high)}" if n > 1 else times.at(low)
            hover.append(_text(f"{severity}: {code} {tag} at {many}"))
        traces.append(
            {
                "type": "scatter", "mode": "markers",
                "name": {"warn": "warning", "info": "remark"}.get(severity, severity),
                "x": [(v[0] - origin) / scale for _, v in mine], "y": [_text(lane) for lane, _ in mine],
                "hovertext": hover, "hoverinfo": "text",
                "marker": {
                    "symbol": symbols[severity], "color": f"--{severity}", "size": 15 if severity == "error" else 12,
                    "line": {"width": 2, "color": f"--{severity}"},
                },
            }
        )  # fmt: skip
    return traces


def _rnd(value: float) -> float:
    return float(f"{value:.10g}")


def story_chart(
    story: Story, view: Window, gaps: Sequence[Mapping[str, Any]], times: Times, lanes_cap: int = 24
) -> Chart:
    """The window around one episode, times relative to its first finding."""
    first = story.first
    t = first["t_ns"]
    unit, scale = times.axis(view.t1 - view.t0)
    own = finding_lanes(first, story.run["system"])
    evidence = {s.seq for s in story.steps if s.seq is not None}
    lanes = _choose(view, [*own, *_gap_cpus(gaps, view)], evidence, lanes_cap)
    keep = set(lanes)
    traces: list[dict[str, Any]] = []
    rows: list[tuple[int, tuple[str, ...]]] = []
    for role, colour, width in _ROLES:
        bars = []
        for p in view.periods:
            if p.span.role != role or p.lane not in keep:
                continue
            low = view.t0 if p.t0 is None else max(p.t0, view.t0)
            high = view.t1 if p.t1 is None else min(p.t1, view.t1)
            length = "end unknown" if p.t1 is None else "" if p.t0 is None else times.span(p.t1 - p.t0)
            bars.append(
                (
                    p.lane,
                    _rnd((low - t) / scale),
                    _rnd(max(high - low, 0) / scale),
                    f"{p.text} ({length})" if length else p.text,
                )
            )
            began = times.relative(low - t) if p.t0 is not None and p.t0 >= view.t0 else "before"
            rows.append((low, (began, p.lane, p.text, length)))
        if bars:
            names = sorted({p.span.name for p in view.periods if p.span.role == role and p.lane in keep})
            traces.append(_bars(", ".join(names), colour, width, bars))
    traces += _moments(view, keep, t, scale, times)
    rows += [
        (m.t, (times.relative(m.t - t), m.lane, m.text, f"offset {m.offset:#x}" if m.offset is not None else ""))
        for m in view.moments
        if m.lane in keep
    ]
    gap_bars = _gaps(gaps, lanes, view.t0, view.t1, t, scale, times)
    if gap_bars:
        traces.append(_gap_bars(gap_bars))
    inside = [f for f in story.findings if view.t0 <= f["t_ns"] <= view.t1]
    marks = [(lane, f, where(f, story.run["system"])) for f in inside for lane in finding_lanes(f, story.run["system"])]
    traces += _marks(marks, t, scale, view.t1 - view.t0, times)
    height = 118 + 30 * max(len(lanes), 2)
    layout = _layout(
        lanes, f"{unit} from the finding at {times.at(t)}", (view.t0 - t) / scale, (view.t1 - t) / scale, height
    )
    layout["shapes"] = [
        {"type": "line", "x0": 0, "x1": 0, "y0": 0, "y1": 1, "yref": "paper",
         "line": {"color": f"--{story.severity}", "width": 1.2, "dash": "dot"}}
    ]  # fmt: skip
    rows.sort(key=lambda r: r[0])
    near = _nearest(rows, t)
    caption = f"Recorded events from {times.at(view.t0)} to {times.at(view.t1)} ({times.span(view.t1 - view.t0)})."
    if view.cut:
        caption += " The stretch is shorter than the episode: more events would not fit."
    left = len(view.lanes) - len(keep & set(view.lanes))
    if left:
        caption += f" {left} lanes that the finding does not touch are left out."
    if story.predicted:
        caption += " The markers are what the model predicts; the bars are what was recorded or given."
    caption += " Hatched: no records." if gap_bars else " No gap in this stretch."
    return Chart(
        f"story-{story.number}", f"Timeline around {story.title}", caption, height, traces, layout,
        ("time", "lane", "event", "length or place"), [r for _, r in near], len(rows) - len(near),
    )  # fmt: skip


def _nearest(rows: list[tuple[int, tuple[str, ...]]], t: int) -> list[tuple[int, tuple[str, ...]]]:
    """The rows nearest to the finding, in order."""
    cap = TABLE_ROWS // 4
    if len(rows) <= cap:
        return rows
    middle = next((i for i, r in enumerate(rows) if r[0] > t), len(rows))
    low = max(0, min(middle - cap * 2 // 3, len(rows) - cap))
    return rows[low : low + cap]


def _gap_cpus(gaps: Sequence[Mapping[str, Any]], view: Window) -> list[str]:
    """CPUs that are in a gap during the window: an empty lane must not look like a quiet CPU."""
    return sorted(
        {
            f"CPU {g['cpu']}"
            for g in gaps
            if g.get("cpu") is not None
            and (g.get("t0_ns") is not None or g.get("t1_ns") is not None)
            and (g["t0_ns"] is None or g["t0_ns"] <= view.t1)
            and (g["t1_ns"] is None or g["t1_ns"] >= view.t0)
        }
    )[:8]


def _choose(view: Window, own: Sequence[str], evidence: set[int], cap: int) -> list[str]:
    """Lanes to draw: those of the finding, then those of its evidence, then the others in order."""
    first = dict.fromkeys(own)
    first.update(dict.fromkeys(m.lane for m in view.moments if m.seq in evidence))
    lanes = list(first) + [lane for lane in view.lanes if lane not in first]
    return sorted(lanes[:cap], key=lane_key)


def _moments(view: Window, keep: set[str], t: int, scale: int, times: Times) -> list[dict[str, Any]]:
    drawn = [m for m in view.moments if m.lane in keep and m.kind not in ("idle.enter", "idle.exit")]
    kinds = sorted({m.kind for m in drawn}, key=lambda k: (k not in _LOUD, k not in _SYMBOL, k))
    traces = []
    rest: list[Any] = []
    for kind in kinds:
        mine = [m for m in drawn if m.kind == kind]
        if kind in _SYMBOL:
            traces.append(_points(kind, _SYMBOL[kind], _LOUD.get(kind, "--event"), mine, t, scale, times))
        else:
            rest += mine
    if rest:
        traces.append(_points("other events", "circle-open", "--quiet", rest, t, scale, times))
    return traces


def _points(
    name: str, symbol: str, colour: str, mine: Sequence[Any], t: int, scale: int, times: Times
) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "markers", "name": name,
        "x": [_rnd((m.t - t) / scale) for m in mine], "y": [_text(m.lane) for m in mine],
        "hovertext": [_text(f"{times.relative(m.t - t)}  {m.text}") for m in mine], "hoverinfo": "text",
        "marker": {"symbol": symbol, "color": colour, "size": 5 if colour == "--quiet" else 8,
                   "line": {"width": 1.4, "color": colour}},
    }  # fmt: skip


def overview_chart(view: Overview, stories: Sequence[Story], gaps: Sequence[Mapping[str, Any]], times: Times) -> Chart:
    """The whole recording: periods as shares of time for each column, every finding, every gap."""
    extent = view.t1 - view.t0
    unit, scale = times.axis(extent)
    findings = [(s, f) for s in stories for f in s.findings]
    marks = [
        (lane, f, where(f, s.run["system"])) for s, f in findings for lane in finding_lanes(f, s.run["system"])[:1]
    ]
    extra = sorted({lane for lane, _, _ in marks} - set(view.lanes), key=lane_key)
    more = max(0, len(extra) - 20)
    if more:
        marks = [(lane if lane not in extra[20:] else "other objects", f, tag) for lane, f, tag in marks]
        extra = [*extra[:20], "other objects"]
    gap_cpus = {f"CPU {g['cpu']}" for g in gaps if g.get("cpu") is not None}
    lanes = sorted({*view.lanes, *extra} | (gap_cpus if len(gap_cpus) <= 64 else set()), key=lane_key)
    order = {lane: i for i, lane in enumerate(reversed(lanes))}
    traces: list[dict[str, Any]] = []
    bin_width = extent / len(view.density)
    roles = {role: (colour, width) for role, colour, width in _ROLES}
    legend: set[str] = set()
    for track in view.tracks:
        colour, _ = roles[track.role]
        base = order[track.lane]
        share = (track.busy / bin_width).clip(0, 1)
        # A column with any such period shows at least a hair: it must not vanish.
        heights = [round(base - 0.4 + (max(0.04, 0.8 * s) if s > 0 else 0), 3) for s in share]
        xs = [_rnd((e - view.t0) / scale) for e in view.edges[:-1]]
        traces.append({"type": "scatter", "mode": "lines", "x": [xs[0], xs[-1]], "y": [base - 0.4] * 2,
                       "line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"})  # fmt: skip
        traces.append(
            {
                "type": "scatter", "mode": "lines", "name": track.span, "legendgroup": track.span,
                "showlegend": track.span not in legend, "x": xs, "y": heights, "fill": "tonexty",
                "fillcolor": f"{colour}-soft", "line": {"width": 0.8, "color": colour, "shape": "hv"},
                "hoverinfo": "skip",
            }
        )  # fmt: skip
        legend.add(track.span)
    bars = _merge_bars(_gaps(gaps, lanes, view.t0, view.t1, view.t0, scale, times), extent / scale / 2000)
    if bars:
        trace = _gap_bars(bars)
        trace["y"] = [order[bar[0]] for bar in bars]
        traces.append(trace)
    names = {_text(lane): i for lane, i in order.items()}
    for trace in _marks(marks, view.t0, scale, extent, times):
        trace["y"] = [names[lane] for lane in trace["y"]]
        traces.append(trace)
    height = 118 + 26 * max(len(lanes), 2)
    layout = _layout(lanes, f"{unit} since {times.at(view.t0)}", 0, extent / scale, height)
    layout["yaxis"] = {
        "tickmode": "array", "tickvals": list(range(len(lanes))), "ticktext": [_text(x) for x in reversed(lanes)],
        "range": [-0.6, len(lanes) - 0.4], "automargin": True, "fixedrange": True, "showgrid": False, "zeroline": False,
    }  # fmt: skip
    caption = (
        f"The whole recording in {len(view.density)} columns of {times.span(int(bin_width))}: the height of a band is "
        "the share of time in such periods. Every finding is marked and every gap is hatched, however short."
    )
    if len(marks) > MARKS:
        caption += f" {number(len(marks))} findings: marks that would lie on the same pixel are one mark with a count."
    if view.omitted:
        caption += f" {view.omitted} quieter lanes are left out."
    return Chart(
        "overview", "Overview of the whole recording", caption, height, traces, layout,
        ("lane", "period", "share of time", "number", "longest", "findings"),
        _overview_rows(view, lanes, marks, times),
    )  # fmt: skip


def _merge_bars(bars: list[tuple[str, float, float, str]], pixel: float) -> list[tuple[str, float, float, str]]:
    """Many gaps: neighbours closer than a pixel become one bar that covers them all; none is dropped."""
    if len(bars) <= MARKS:
        return bars
    merged: list[tuple[str, float, float, str]] = []
    for lane, start, length, text in sorted(bars):
        if merged and merged[-1][0] == lane and start <= merged[-1][1] + merged[-1][2] + pixel:
            _, s, n, t = merged[-1]
            merged[-1] = (lane, s, max(n, start + length - s), t if t.startswith("several") else "several gaps: " + t)
        else:
            merged.append((lane, start, length, text))
    return merged


def _overview_rows(
    view: Overview, lanes: Sequence[str], marks: Sequence[tuple[str, Mapping[str, Any], str]], times: Times
) -> list[tuple[str, ...]]:
    found: dict[str, int] = {}
    for lane, _, _ in marks:
        found[lane] = found.get(lane, 0) + 1
    rows: list[tuple[str, ...]] = []
    for lane in lanes:
        mine = [t for t in view.tracks if t.lane == lane]
        count = number(found.get(lane, 0))
        if not mine:
            rows.append((lane, "–", "–", "–", "–", count))
        for track in mine:
            share = percent(track.total, view.t1 - view.t0)
            rows.append((lane, track.span, share, number(track.periods), times.span(track.longest), count))
            count = ""
    return rows
