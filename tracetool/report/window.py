"""The stretch of a recording that a story is about, and the records in it that the story's system reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import polars as pl

from replay.systems import SYSTEMS
from tracetool.report.around import Events
from tracetool.report.stories import Story
from tracetool.report.timeline import Window, window
from tracetool.report.words import Times
from tracetool.store import Dataset

__all__ = ["STORIES", "Records", "extent", "records_of", "view_of"]

#: Episodes that are told in full, with their window: in the HTML report and in a bundle.
STORIES: Final = 24


def extent(story: Story) -> tuple[int, int]:
    """First and last moment that a story needs, with a margin (dataset time)."""
    first = story.first
    moments = [first["t_ns"], *(s.t_ns for s in story.steps)]
    if first.get("t_first_ns") is not None:
        moments.append(first["t_first_ns"])
    if len(story.findings) > 1:
        # As many occurrences as lie near the first: the episode's rhythm is part of the story.
        near = max(max(moments) - min(moments), 1_000_000) * 4
        moments += [f["t_ns"] for f in story.findings[1:8] if f["t_ns"] - first["t_ns"] <= near]
    low, high = min(moments), max(moments)
    margin = max((high - low) // 3, 50_000)
    return low - margin, high + margin


def view_of(events: Events, story: Story, gaps: Sequence[Mapping[str, Any]], times: Times) -> Window:
    """The events around a story."""
    low, high = extent(story)
    return window(events, story.first["t_ns"], low, high, gaps, times)


@dataclass(frozen=True, slots=True)
class Records:
    """Records of one window: table name to (source, offset) of each, ascending."""

    t0: int
    t1: int
    tables: Mapping[str, tuple[tuple[str, int], ...]]


def records_of(dataset: Dataset, story: Story, view: Window) -> Records:
    """The records of a window that gave the events which the story's system reads, and the story's evidence.

    Nothing else that was recorded meanwhile: what another task or device did is not the finding's business.
    """
    kinds = list(SYSTEMS[story.run["system"]].kinds)
    evidence = [s.seq for s in story.steps if s.seq is not None and s.seq >= 0]
    inside = pl.col("t_ns").is_between(view.t0, view.t1) & pl.col("kind").cast(pl.String).is_in(kinds)
    origin = pl.col("origin").struct
    frame = (
        dataset.events()
        .filter(inside | pl.col("seq").is_in(evidence))
        .select(
            origin.field("raw_kind").cast(pl.String),
            origin.field("file").cast(pl.String),
            origin.field("offset"),
        )
        .drop_nulls()
        .unique()
        .sort("raw_kind", "file", "offset")
        .collect()
    )
    tables: dict[str, list[tuple[str, int]]] = {}
    for name, source, offset in frame.iter_rows():
        if name in dataset.tables():
            tables.setdefault(name, []).append((source, offset))
    return Records(view.t0, view.t1, {name: tuple(found) for name, found in tables.items()})
