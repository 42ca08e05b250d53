"""The charts of a report as plain plotly figures: the window around an episode, and the whole recording."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from tracetool.report.figures import (
    MARKS,
    Chart,
    bars_trace,
    finding_lanes,
    finding_traces,
    gap_bars,
    gap_trace,
    layout_of,
    short,
    text,
)
from tracetool.report.overview import Overview
from tracetool.report.stories import Story
from tracetool.report.timeline import Period, Window, lane_key
from tracetool.report.words import Times, number, percent, where

__all__ = ["Chart", "overview_chart", "story_chart"]

#: Rows of the table below a chart.
TABLE_ROWS: Final = 60

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


def story_chart(
    story: Story, view: Window, gaps: Sequence[Mapping[str, Any]], times: Times, lanes_cap: int = 24
) -> Chart:
    """The window around one episode, times relative to its first finding."""
    first = story.first
    t = first["t_ns"]
    gaps = [g for g in gaps if _touches(g, view.t0, view.t1)]
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
            low, high = _extent(p, view, gaps)
            length = "end unknown" if p.t1 is None else "" if p.t0 is None else times.span(p.t1 - p.t0)
            bars.append(
                (
                    p.lane,
                    short((low - t) / scale),
                    short(max(high - low, 0) / scale),
                    f"{p.text} ({length})" if length else p.text,
                )
            )
            began = times.relative(low - t) if p.t0 is not None and p.t0 >= view.t0 else "before"
            rows.append((low, (began, p.lane, p.text, length)))
        if bars:
            names = sorted({p.span.name for p in view.periods if p.span.role == role and p.lane in keep})
            traces.append(bars_trace(", ".join(names), colour, width, bars))
    traces += _moments(view, keep, t, scale, times)
    rows += [
        (m.t, (times.relative(m.t - t), m.lane, m.text, f"offset {m.offset:#x}" if m.offset is not None else ""))
        for m in view.moments
        if m.lane in keep
    ]
    gaps_here = gap_bars(gaps, lanes, view.t0, view.t1, t, scale, times)
    if gaps_here:
        traces.append(gap_trace(gaps_here))
    inside = [f for f in story.findings if view.t0 <= f["t_ns"] <= view.t1]
    marks = [(lane, f, where(f, story.run["system"])) for f in inside for lane in finding_lanes(f, story.run["system"])]
    traces += finding_traces(marks, t, scale, view.t1 - view.t0, times)
    height = 118 + 30 * max(len(lanes), 2)
    layout = layout_of(
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
    caption += " Hatched: no records." if gaps_here else " No gap in this stretch."
    return Chart(
        f"story-{story.number}", f"Timeline around {story.title}", caption, height, traces, layout,
        ("time", "lane", "event", "length or place"), [r for _, r in near], len(rows) - len(near),
    )  # fmt: skip


def _extent(period: Period, view: Window, gaps: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """What is drawn of a period; an end that nobody saw is not beyond the next gap, a beginning not before one."""
    low = view.t0 if period.t0 is None else max(period.t0, view.t0)
    high = view.t1 if period.t1 is None else min(period.t1, view.t1)
    for gap in gaps:
        if gap.get("cpu") is not None and period.lane.startswith("CPU ") and period.lane != f"CPU {gap['cpu']}":
            continue
        start, end = gap.get("t0_ns"), gap.get("t1_ns")
        if period.t1 is None and start is not None and low <= start < high:
            high = start
        if period.t0 is None and end is not None and low < end <= high:
            low = end
    return low, high


def _nearest(rows: list[tuple[int, tuple[str, ...]]], t: int) -> list[tuple[int, tuple[str, ...]]]:
    """The rows nearest to the finding, in order."""
    cap = TABLE_ROWS
    if len(rows) <= cap:
        return rows
    middle = next((i for i, r in enumerate(rows) if r[0] > t), len(rows))
    low = max(0, min(middle - cap * 2 // 3, len(rows) - cap))
    return rows[low : low + cap]


def _touches(gap: Mapping[str, Any], t0: int, t1: int) -> bool:
    """Whether a gap reaches into [t0, t1]; an end that is not known is open."""
    start, end = gap.get("t0_ns"), gap.get("t1_ns")
    return (start is not None or end is not None) and (start is None or start <= t1) and (end is None or end >= t0)


def _gap_cpus(gaps: Sequence[Mapping[str, Any]], view: Window) -> list[str]:
    """CPUs that are in a gap during the window: an empty lane must not look like a quiet CPU."""
    return sorted({f"CPU {g['cpu']}" for g in gaps if g.get("cpu") is not None and _touches(g, view.t0, view.t1)})[:8]


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
        "x": [short((m.t - t) / scale) for m in mine], "y": [text(m.lane) for m in mine],
        "hovertext": [text(f"{times.relative(m.t - t)}  {m.text}") for m in mine], "hoverinfo": "text",
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
        xs = [short((e - view.t0) / scale) for e in view.edges[:-1]]
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
    bars = gap_bars(gaps, lanes, view.t0, view.t1, view.t0, scale, times)
    if bars:
        trace = gap_trace(bars)
        trace["y"] = [order[bar[0]] for bar in bars]
        traces.append(trace)
    names = {text(lane): i for lane, i in order.items()}
    for trace in finding_traces(marks, view.t0, scale, extent, times):
        # Severities lie above each other, so that none hides another.
        lift = {"error": 0.24, "warning": 0.0}.get(trace["name"], -0.24)
        trace["y"] = [names[lane] + lift for lane in trace["y"]]
        trace["marker"]["size"] = 8
        traces.append(trace)
    height = 118 + 26 * max(len(lanes), 2)
    layout = layout_of(lanes, f"{unit} since {times.at(view.t0)}", 0, extent / scale, height)
    layout["yaxis"] = {
        "tickmode": "array", "tickvals": list(range(len(lanes))), "ticktext": [text(x) for x in reversed(lanes)],
        "range": [-0.6, len(lanes) - 0.4], "automargin": True, "fixedrange": True, "showgrid": False, "zeroline": False,
    }  # fmt: skip
    caption = (
        f"The whole recording in {len(view.density)} columns of {times.span(int(bin_width))}: the height of a band is "
        "the share of time in such periods. Every finding is marked and every gap is hatched, however short."
    )
    if len(marks) > MARKS:
        caption += f" {number(len(marks))} findings: marks that lie together are one mark with a count."
    if view.omitted:
        caption += f" {view.omitted} quieter lanes are left out."
    return Chart(
        "overview", "Overview of the whole recording", caption, height, traces, layout,
        ("lane", "period", "share of time", "number", "longest", "findings"),
        _overview_rows(view, lanes, marks, times),
    )  # fmt: skip


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
