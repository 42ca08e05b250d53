"""Parts of plotly figures: bars, gaps, marks of findings. Colours are names of CSS variables, for both themes."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tracetool.report.words import Times, clean, number, where
from tracetool.results import SEVERITIES

__all__ = [
    "MARKS", "Bar", "Chart", "bars_trace", "finding_lanes", "finding_traces", "gap_bars", "gap_lanes", "gap_trace",
    "layout_of", "merge_gaps", "short", "text",
]  # fmt: skip

#: Findings and gaps drawn one by one up to this number, which is also the most marks that a chart has: beyond it marks
#: that lie together become one with a count, so that none is left out.
MARKS: Final = 3000

#: A horizontal bar: lane, start, length, text.
Bar = tuple[str, float, float, str]


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


def text(text: object) -> str:
    """Plotly reads a little HTML in its texts; nothing of a recording may be read so."""
    return html.escape(clean(text, 300), quote=False)


def bars_trace(name: str, colour: str, width: float, bars: Sequence[Bar], **more: Any) -> dict[str, Any]:
    """Horizontal bars from (lane, start, length, text)."""
    marker: dict[str, Any] = {"color": colour, "line": {"color": colour, "width": more.pop("line", 0.6)}}
    if "pattern" in more:
        marker["pattern"] = more.pop("pattern")
    return {
        "type": "bar", "orientation": "h", "name": name, "width": width, "marker": marker,
        "y": [text(b[0]) for b in bars], "base": [b[1] for b in bars], "x": [b[2] for b in bars],
        "hovertext": [text(b[3]) for b in bars], "hoverinfo": "text", **more,
    }  # fmt: skip


def gap_trace(gaps: Sequence[Bar]) -> dict[str, Any]:
    trace = bars_trace("no records", "--gap-bg", 0.96, gaps, line=1)
    trace["marker"]["pattern"] = {"shape": "/", "fgcolor": "--gap", "bgcolor": "--gap-bg", "size": 7, "solidity": 0.25}
    trace["marker"]["line"]["color"] = "--gap"
    return trace


def layout_of(lanes: Sequence[str], title: str, low: float, high: float, height: int) -> dict[str, Any]:
    return {
        "barmode": "overlay", "height": height, "margin": {"l": 8, "r": 8, "t": 8, "b": 44},
        "xaxis": {"title": {"text": title, "standoff": 6}, "range": [low, high], "zeroline": False, "automargin": True},
        "yaxis": {
            "type": "category", "categoryorder": "array", "categoryarray": [text(lane) for lane in reversed(lanes)],
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


def gap_bars(
    gaps: Sequence[Mapping[str, Any]], lanes: Sequence[str], t0: int, t1: int, origin: int, scale: int, times: Times
) -> list[Bar]:
    """Bars of the gaps that touch [t0, t1]; an open end reaches to the edge."""
    bars = []
    for gap in merge_gaps(gaps, t0, t1, len(lanes)):
        start, end = gap.get("t0_ns"), gap.get("t1_ns")
        reach = _reach(gap, t0, t1)
        if reach is None:
            continue
        low, high = reach
        lost = f", {number(gap['lost'])} records lost" if gap.get("lost") else ""
        who = "all CPUs" if gap.get("cpu") is None else f"CPU {gap['cpu']}"
        text = f"{gap.get('reason')} on {who}{lost}: {times.at(start)} to {times.at(end)}"
        bars += [(lane, (low - origin) / scale, (high - low) / scale, text) for lane in gap_lanes(gap, lanes)]
    return bars


def finding_traces(
    findings: Sequence[tuple[str, Mapping[str, Any], str]], origin: int, scale: int, extent: int, times: Times
) -> list[dict[str, Any]]:
    """Findings as markers. Above MARKS, those of one severity and lane that lie together become one, counted."""
    merged = _merged(findings, 0)
    step = max(extent // 1000, 1)
    while len(merged) > MARKS and step <= 2 * extent:
        merged = _merged(findings, step)
        step *= 2
    traces = []
    # Open shapes: the events underneath stay visible.
    symbols = {"error": "circle-open", "warn": "square-open", "info": "hexagon-open"}
    for rank, severity in enumerate(reversed(SEVERITIES)):  # the worst are drawn last, on top
        mine = [(lane, v) for (s, lane, _), v in merged.items() if s == severity]
        if not mine:
            continue
        hover = []
        for _, (low, high, n, code, tag) in mine:
            many = f"{number(n)} findings, {times.at(low)} to {times.at(high)}" if n > 1 else times.at(low)
            hover.append(text(f"{severity}: {code} {tag} at {many}"))
        traces.append(
            {
                "type": "scatter", "mode": "markers", "legendrank": 2000 - rank,
                "name": {"warn": "warning", "info": "remark"}.get(severity, severity),
                "x": [(v[0] - origin) / scale for _, v in mine], "y": [text(lane) for lane, _ in mine],
                "hovertext": hover, "hoverinfo": "text",
                "marker": {
                    "symbol": symbols[severity], "color": f"--{severity}", "size": 15 if severity == "error" else 12,
                    "line": {"width": 2, "color": f"--{severity}"},
                },
            }
        )  # fmt: skip
    return traces


def _merged(
    findings: Sequence[tuple[str, Mapping[str, Any], str]], step: int
) -> dict[tuple[str, str, int], tuple[int, int, int, str, str]]:
    """Marks by (severity, lane, time in steps; 0: each of its own): first and last time, how many, code, tag."""
    merged: dict[tuple[str, str, int], tuple[int, int, int, str, str]] = {}
    for index, (lane, finding, tag) in enumerate(findings):
        t = finding["t_ns"]
        key = (finding["severity"], lane, t // step if step else index)
        old = merged.get(key)
        if old:
            merged[key] = (min(old[0], t), max(old[1], t), old[2] + 1, old[3], old[4])
        else:
            merged[key] = (t, t, 1, finding["code"], tag)
    return merged


def short(value: float) -> float:
    return float(f"{value:.10g}")


def merge_gaps(gaps: Sequence[Mapping[str, Any]], t0: int, t1: int, lanes: int) -> list[Mapping[str, Any]]:
    """The gaps that touch [t0, t1]. Too many for a chart of so many lanes: those of one CPU that lie together become
    one with a count, which covers them all."""
    inside = [g for g in gaps if _reach(g, t0, t1) is not None]
    step = max((t1 - t0) // 2000, 1)
    kept = inside
    while len(kept) * max(lanes, 1) > MARKS and step <= 2 * (t1 - t0):
        kept = _joined(inside, t0, t1, step)
        step *= 2
    return kept


def _reach(gap: Mapping[str, Any], t0: int, t1: int) -> tuple[int, int] | None:
    """What a gap covers of [t0, t1]; an end that is not known is open."""
    start, end = gap.get("t0_ns"), gap.get("t1_ns")
    if start is None and end is None:
        return None
    low, high = t0 if start is None else start, t1 if end is None else end
    return None if high < t0 or low > t1 else (max(low, t0), min(high, t1))


def _joined(gaps: Sequence[Mapping[str, Any]], t0: int, t1: int, step: int) -> list[Mapping[str, Any]]:
    by_cpu: dict[int | None, list[tuple[int, int, int]]] = {}
    for gap in gaps:
        low, high = _reach(gap, t0, t1) or (t0, t1)
        by_cpu.setdefault(gap.get("cpu"), []).append((low, high, gap.get("lost") or 0))
    joined: list[Mapping[str, Any]] = []
    for cpu, spans in by_cpu.items():
        whole: list[list[int]] = []
        for low, high, lost in sorted(spans):
            if whole and low <= whole[-1][1] + step:
                whole[-1] = [whole[-1][0], max(whole[-1][1], high), whole[-1][2] + lost, whole[-1][3] + 1]
            else:
                whole.append([low, high, lost, 1])
        joined += [
            {"cpu": cpu, "t0_ns": low, "t1_ns": high, "lost": lost, "reason": f"{number(n)} gaps" if n > 1 else "gap"}
            for low, high, lost, n in whole
        ]  # fmt: skip
    return joined
