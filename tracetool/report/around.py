"""Events around a moment: the row groups of a dataset's events, read when needed, the last few kept."""

from __future__ import annotations

from typing import Any, Final

import polars as pl
import pyarrow.parquet as pq

from tracetool.store import Dataset

__all__ = ["COLUMNS", "Events"]

COLUMNS: Final = ("seq", "t_ns", "kind", "cpu", "dom", "vcpu", "obj", "tgt", "val", "val2", "flags", "conf", "origin")
#: Row groups kept in memory.
KEPT: Final = 2
#: Rows that are searched backwards for what was going on before a window.
SEARCHED: Final = 262_144


class Events:
    """Canonical events of a dataset by time. They are in order, so a window is a slice."""

    def __init__(self, data: Dataset) -> None:
        self.file = pq.ParquetFile(data.path / "events.parquet")
        self.bounds: list[tuple[int, int]] = []
        self.kept: dict[int, pl.DataFrame] = {}
        meta = self.file.metadata
        column = next(i for i in range(meta.num_columns) if meta.schema.column(i).path == "t_ns")
        for index in range(meta.num_row_groups):
            stats = meta.row_group(index).column(column).statistics
            if stats is not None and stats.has_min_max:
                self.bounds.append((stats.min, stats.max))
            else:
                times = self.file.read_row_group(index, columns=["t_ns"])["t_ns"]
                self.bounds.append((times[0].as_py(), times[-1].as_py()))

    def _group(self, index: int) -> pl.DataFrame:
        frame = self.kept.pop(index, None)
        if frame is None:
            read = pl.from_arrow(self.file.read_row_group(index, columns=list(COLUMNS)))
            assert isinstance(read, pl.DataFrame)
            frame = read.select(COLUMNS).with_columns(pl.col("kind").cast(pl.String))
        self.kept[index] = frame
        while len(self.kept) > KEPT:
            self.kept.pop(next(iter(self.kept)))
        return frame

    def between(self, low: int, high: int, limit: int) -> list[dict[str, Any]]:
        """Rows with low <= t_ns <= high, in order, at most `limit`."""
        rows: list[dict[str, Any]] = []
        for index, (first, last) in enumerate(self.bounds):
            if last < low or first > high or len(rows) >= limit:
                continue
            frame = self._group(index)
            start = int(frame["t_ns"].search_sorted(low, "left"))
            end = int(frame["t_ns"].search_sorted(high, "right"))
            rows += frame.slice(start, min(end - start, limit - len(rows))).to_dicts()
        return rows

    def before(self, low: int, reach: int) -> pl.DataFrame:
        """Rows with low - reach <= t_ns < low, in order; of many, the last."""
        parts: list[pl.DataFrame] = []
        left = SEARCHED
        for index in reversed(range(len(self.bounds))):
            first, last = self.bounds[index]
            if first >= low or last < low - reach or left <= 0:
                continue
            frame = self._group(index)
            start = int(frame["t_ns"].search_sorted(low - reach, "left"))
            end = int(frame["t_ns"].search_sorted(low, "left"))
            start = max(start, end - left)
            left -= end - start
            parts.append(frame.slice(start, end - start))
        if not parts:
            return pl.DataFrame(schema={"seq": pl.UInt64}).clear()
        return pl.concat(reversed(parts))
