"""What a report says of a recording, in plain values: its name, clock and gaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from tracetool.report.words import Times, plural

__all__ = ["Gaps", "clock_words", "input_name", "times_of", "title_of", "tool_of"]


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
    doc = str(clock.get("doc") or "")
    if clock.get("kind") == "none":
        return f"none: {doc}" if doc else "none"
    parts = [str(clock.get("kind", "unknown kind"))]
    hz = clock.get("hz")
    parts.append(f"{hz / 1e6:.6f} MHz" if isinstance(hz, int | float) and hz else "frequency unknown: times are ticks")
    if clock.get("unit") == "ns" and not hz:
        parts[-1] = "already in time units"
    if clock.get("origin") not in (None, "", "none"):
        parts.append(f"from {clock['origin']}")
    error = clock.get("error_ppm")
    if isinstance(error, int | float):
        parts.append(f"uncertainty {error:.3g} ppm")
    elif hz:
        parts.append("uncertainty not known")
    text = ", ".join(parts)
    return f"{text}. {doc[:1].upper()}{doc[1:]}" if doc else text


class Gaps:
    """The gaps of a recording, to be asked again and again which of them is nearest."""

    def __init__(self, gaps: Sequence[Mapping[str, Any]]) -> None:
        self.known = bool(gaps)
        self.gaps = [g for g in gaps if g.get("t0_ns") is not None or g.get("t1_ns") is not None]
        # An end that is not known is open: the gap reaches that far.
        self.t0 = np.array([_LONG_AGO if g.get("t0_ns") is None else g["t0_ns"] for g in self.gaps], np.int64)
        self.t1 = np.array([_LATE if g.get("t1_ns") is None else g["t1_ns"] for g in self.gaps], np.int64)
        self.cpu = np.array([_ALL if g.get("cpu") is None else g["cpu"] for g in self.gaps], np.int64)

    def nearest(self, t_ns: int, cpu: int | None, times: Times) -> str:
        """The gap nearest to a moment in words: on its own CPU, or else on another."""
        if not self.known:
            return "none: the recording has no known gap"
        if not self.gaps:
            return "unknown: the times of the gaps are not known"
        # Signed distance: negative when the gap is earlier, 0 inside it.
        away = np.where(t_ns < self.t0, self.t0 - t_ns, np.where(t_ns > self.t1, self.t1 - t_ns, 0))
        far = np.abs(away)
        own = np.flatnonzero((self.cpu == _ALL) | (self.cpu == cpu)) if cpu is not None else np.arange(len(far))
        if len(own):
            best = own[np.argmin(far[own])]
            return _distance(int(away[best]), self.gaps[best], times)
        best = np.argmin(far)
        return f"none on CPU {cpu}; elsewhere {_distance(int(away[best]), self.gaps[best], times)}"


#: Ends of gaps that are not known; far from any time, and differences with them do not overflow.
_LONG_AGO: Final = -(1 << 61)
_LATE: Final = 1 << 61
_ALL: Final = -1


def _distance(distance: int, gap: Mapping[str, Any], times: Times) -> str:
    who = "all CPUs" if gap.get("cpu") is None else f"CPU {gap['cpu']}"
    text = f"{gap.get('reason', 'gap')} on {who}"
    if gap.get("lost"):
        text += f", {plural(gap['lost'], 'record')} lost"
    if distance == 0:
        return f"inside a gap ({text}): treat with care"
    return f"{times.span(abs(distance))} {'later' if distance > 0 else 'earlier'} ({text})"
