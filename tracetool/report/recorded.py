"""What a report says of a recording, in plain values: its name, clock and gaps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tracetool.report.words import Times, plural

__all__ = ["clock_words", "input_name", "nearest_gap", "times_of", "title_of", "tool_of"]


def times_of(manifest: Mapping[str, Any]) -> Times:
    """How to write the times of a dataset."""
    clock = manifest.get("clock")
    unit = clock.get("unit") if isinstance(clock, Mapping) else None
    return Times("ticks" if unit == "ticks" else "ns")


def title_of(manifest: Mapping[str, Any], default: str = "tracetool") -> str:
    """The recordings' names without their folders."""
    return ", ".join(filter(None, map(input_name, manifest.get("inputs") or ()))) or default


def input_name(item: Mapping[str, Any]) -> str:
    """An input's name without its folder, which is nobody else's business."""
    return str(item.get("source") or item.get("name") or "").rstrip("/").rpartition("/")[2]


def tool_of(manifest: Mapping[str, Any]) -> str:
    """Name and version of the tool that made the dataset."""
    tool = manifest.get("tool")
    return " ".join(str(v) for v in tool.values()) if isinstance(tool, Mapping) else str(tool or "")


def clock_words(clock: Mapping[str, Any]) -> str:
    """The quality of the clock; what is not known is said to be unknown."""
    if not clock:
        return "nothing is known about it"
    parts = [str(clock.get("kind", "unknown kind"))]
    hz = clock.get("hz")
    parts.append(f"{hz / 1e6:.6f} MHz" if isinstance(hz, int | float) and hz else "frequency unknown: times are ticks")
    if clock.get("unit") == "ns" and not hz:
        parts[-1] = "already in time units"
    if clock.get("origin"):
        parts.append(f"from {clock['origin']}")
    error = clock.get("error_ppm")
    parts.append(f"uncertainty {error:.3g} ppm" if isinstance(error, int | float) else "uncertainty not known")
    text = ", ".join(parts)
    return f"{text}. {clock['doc']}" if clock.get("doc") else text


def nearest_gap(t_ns: int, cpu: int | None, gaps: Sequence[Mapping[str, Any]], times: Times) -> str:
    """The gap nearest to a moment in words: on its own CPU, or else on another."""
    if not gaps:
        return "none: the recording has no known gap"
    own = _nearest(t_ns, [g for g in gaps if cpu is None or g.get("cpu") in (None, cpu)])
    if own is not None:
        return _distance(*own, times)
    other = _nearest(t_ns, gaps)
    if other is None:
        return "unknown: the times of the gaps are not known"
    return f"none on CPU {cpu}; elsewhere {_distance(*other, times)}"


def _nearest(t_ns: int, gaps: Iterable[Mapping[str, Any]]) -> tuple[int, Mapping[str, Any]] | None:
    """(signed distance, gap): negative when the gap is earlier, 0 inside it."""
    best: tuple[int, Mapping[str, Any]] | None = None
    for gap in gaps:
        t0, t1 = gap.get("t0_ns"), gap.get("t1_ns")
        if t0 is None and t1 is None:
            continue
        # An end that is not known is open: the gap reaches that far.
        if t0 is not None and t_ns < t0:
            distance = t0 - t_ns
        elif t1 is not None and t_ns > t1:
            distance = t1 - t_ns
        else:
            distance = 0
        if best is None or abs(distance) < abs(best[0]):
            best = (distance, gap)
    return best


def _distance(distance: int, gap: Mapping[str, Any], times: Times) -> str:
    who = "all CPUs" if gap.get("cpu") is None else f"CPU {gap['cpu']}"
    text = f"{gap.get('reason', 'gap')} on {who}"
    if gap.get("lost"):
        text += f", {plural(gap['lost'], 'record')} lost"
    if distance == 0:
        return f"inside a gap ({text}): treat with care"
    return f"{times.span(abs(distance))} {'later' if distance > 0 else 'earlier'} ({text})"
