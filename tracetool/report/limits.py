"""How much of a report is told in full, so that it stays small enough to be attached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["LADDER", "MAX_BYTES", "Limits"]

#: What many trackers still accept as an attachment (bytes).
MAX_BYTES: Final = 5_000_000


@dataclass(frozen=True, slots=True)
class Limits:
    """Counts of what an HTML report tells in full. What is beyond is summed up, and is whole in the JSON output."""

    #: Episodes with their story, episodes with a line, occurrences listed for one episode.
    stories: int
    listed: int
    occurrences: int
    #: Rows of gaps, notes, kinds of records and the like.
    rows: int
    #: All charts together (bytes); an episode whose chart does not fit is told without one.
    chart_bytes: int
    #: Characters of one string that came from outside.
    text: int


#: Tried in order until the report is at most MAX_BYTES; only long strings make the second necessary.
LADDER: Final = (
    Limits(stories=24, listed=250, occurrences=60, rows=300, chart_bytes=640_000, text=4000),
    Limits(stories=24, listed=150, occurrences=20, rows=150, chart_bytes=640_000, text=400),
    Limits(stories=10, listed=40, occurrences=6, rows=40, chart_bytes=300_000, text=160),
)
