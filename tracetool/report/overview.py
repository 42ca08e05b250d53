"""The whole recording in a few hundred columns: share of time in each kind of period, and events per column.

Down-sampled while it streams, a row group at a time, so memory does not grow with the recording. Findings and gaps
are not part of it: the chart draws those whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from tracetool.report.timeline import SPANS, lane_expr, lane_key, span_kinds
from tracetool.store import Dataset

__all__ = ["BINS", "Overview", "Track", "overview"]

#: Columns of the overview.
BINS: Final = 320
#: Lanes that are kept; the ones with most periods win, and the chart says how many are left out.
LANES: Final = 40

_BEGIN: Final = {kind: span.name for span in SPANS for kind in span.begin}
_SPAN: Final = _BEGIN | {kind: span.name for span in SPANS for kind in span.end}
_ROLE: Final = {span.name: span.role for span in SPANS}

Floats = npt.NDArray[np.float64]


@dataclass(slots=True)
class Track:
    """One lane and kind of period: busy time (dataset units) for each column, number of periods, longest."""

    lane: str
    span: str
    role: str
    busy: Floats
    periods: int = 0
    longest: int = 0

    @property
    def total(self) -> int:
        """Time in such periods, over the whole recording."""
        return int(self.busy.sum())


@dataclass(slots=True)
class Overview:
    """`edges` are BINS + 1 times; `density` the number of canonical events in each column."""

    t0: int
    t1: int
    edges: Floats
    density: npt.NDArray[np.int64]
    tracks: list[Track] = field(default_factory=list)
    lanes: list[str] = field(default_factory=list)
    omitted: int = 0
    events: int = 0


def overview(data: Dataset, gaps: Sequence[Mapping[str, Any]]) -> Overview | None:
    """Stream the canonical events once; None when there are none."""
    path = data.path / "events.parquet"
    if not path.is_file():
        return None
    extent = data.events().select(pl.col("t_ns").min().alias("a"), pl.col("t_ns").max().alias("b")).collect().row(0)
    if extent[0] is None:
        return None
    t0, t1 = int(extent[0]), int(extent[1])
    t1 = max(t1, t0 + 1)
    edges = np.linspace(t0, t1, BINS + 1)
    view = Overview(t0, t1, edges, np.zeros(BINS, np.int64))
    tracks: dict[tuple[str, str], Track] = {}
    carry: pl.DataFrame | None = None
    starts = _gap_starts(gaps)
    file = pq.ParquetFile(path)
    for group in range(file.num_row_groups):
        frame = pl.from_arrow(file.read_row_group(group, columns=["t_ns", "kind", "cpu", "dom", "vcpu"]))
        assert isinstance(frame, pl.DataFrame)
        view.events += frame.height
        view.density += np.histogram(frame["t_ns"].to_numpy(), bins=edges)[0]
        part = (
            frame.with_columns(pl.col("kind").cast(pl.String))
            .filter(pl.col("kind").is_in(span_kinds()))
            .select(
                pl.col("t_ns"),
                pl.col("cpu"),
                lane_expr().alias("lane"),
                pl.col("kind").replace_strict(_SPAN, return_dtype=pl.String).alias("span"),
                pl.col("kind").is_in(list(_BEGIN)).alias("begin"),
            )
        )
        if carry is not None:
            part = pl.concat([carry, part])
        if part.height:
            carry = part.group_by("lane", "span", maintain_order=True).last().select(part.columns)
            _accumulate(part, edges, tracks, starts)
    _finish(view, tracks)
    return view


def _gap_starts(gaps: Sequence[Mapping[str, Any]]) -> pl.DataFrame:
    rows = [
        (g.get("cpu"), g["t0_ns"] if g.get("t0_ns") is not None else g.get("t1_ns"))
        for g in gaps
        if g.get("t0_ns") is not None or g.get("t1_ns") is not None
    ]
    schema = {"cpu": pl.Int32, "gap": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row").sort("gap")


def _accumulate(part: pl.DataFrame, edges: Floats, tracks: dict[tuple[str, str], Track], gaps: pl.DataFrame) -> None:
    """Add the periods of one part: from a beginning to the next event of the same lane and kind of period.

    A period ends at a gap of its CPU: nobody knows what happened behind it.
    """
    frame = part.with_columns(pl.col("t_ns").shift(-1).over("lane", "span").alias("end")).filter(
        pl.col("begin") & pl.col("end").is_not_null()
    )
    if not frame.height:
        return
    if gaps.height:
        everywhere = gaps.filter(pl.col("cpu").is_null()).select("gap").sort("gap")
        frame = frame.sort("t_ns").join_asof(everywhere, left_on="t_ns", right_on="gap", strategy="forward")
        own = gaps.filter(pl.col("cpu").is_not_null()).rename({"gap": "own"}).sort("own")
        frame = frame.join_asof(
            own, left_on="t_ns", right_on="own", by="cpu", strategy="forward", check_sortedness=False
        )
        frame = frame.with_columns(pl.min_horizontal("end", "gap", "own").alias("end"))
    for (lane, span), rows in frame.sort("t_ns").group_by("lane", "span", maintain_order=True):
        key = (str(lane), str(span))
        track = tracks.get(key)
        if track is None:
            track = tracks[key] = Track(key[0], key[1], _ROLE[key[1]], np.zeros(len(edges) - 1))
        start = rows["t_ns"].to_numpy().astype(np.float64)
        end = rows["end"].to_numpy().astype(np.float64)
        track.periods += rows.height
        track.longest = max(track.longest, int((end - start).max()))
        track.busy += _busy(start, end, edges)


def _busy(start: Floats, end: Floats, edges: Floats) -> Floats:
    """Time inside the periods (sorted, disjoint) for each column."""
    before = np.concatenate(([0.0], np.cumsum(end - start)))
    index = np.searchsorted(start, edges, side="right")
    inside = np.zeros(len(edges))
    running = index > 0
    last = index[running] - 1
    inside[running] = np.minimum(edges[running], end[last]) - start[last]
    whole = before[np.maximum(index - 1, 0)]
    return np.asarray(np.diff(whole + inside), dtype=np.float64)


def _finish(view: Overview, tracks: Mapping[tuple[str, str], Track]) -> None:
    weight: dict[str, int] = {}
    for track in tracks.values():
        weight[track.lane] = weight.get(track.lane, 0) + track.periods
    kept = sorted(weight, key=lambda lane: (-weight[lane], lane_key(lane)))[:LANES]
    view.omitted = len(weight) - len(kept)
    view.lanes = sorted(kept, key=lane_key)
    order = {lane: i for i, lane in enumerate(view.lanes)}
    chosen = [t for t in tracks.values() if t.lane in order]
    view.tracks = sorted(chosen, key=lambda t: (order[t.lane], [s.name for s in SPANS].index(t.span)))
