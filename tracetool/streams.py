"""Streams of canonical events from several recordings, merged by time in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final

import polars as pl
import pyarrow as pa

from replay.events import SCHEMA

__all__ = ["KEPT_OF_GUEST", "merged"]

#: Systems of which a guest's recording says something about the machine as a whole; its CPUs and timers are virtual.
KEPT_OF_GUEST: Final = frozenset({"evtchn", "irqflow", "callback", "trace"})


def merged(streams: Sequence[Iterator[pa.Table]]) -> Iterator[pa.Table]:
    """One stream in the order of (t_ns, number of the stream), each stream's own order kept; `seq` is numbered anew.

    Each stream is sorted by `t_ns`. What is held is one batch of each, and what cannot be given out before a slower
    stream has caught up.
    """
    waiting: list[list[pa.Table]] = [[] for _ in streams]
    open_ = [True] * len(streams)
    seq = 0
    while True:
        for index, stream in enumerate(streams):
            if open_[index] and not waiting[index]:
                _next(stream, waiting, open_, index)
        if not any(waiting):
            return
        ends = [_last(waiting[i]) for i in range(len(streams)) if open_[i]]
        limit = min(ends) if ends else None
        parts, ranks = [], []
        for index, tables in enumerate(waiting):
            ready, rest = _split(tables, limit)
            waiting[index] = rest
            parts.extend(ready)
            ranks.extend([index] * sum(t.num_rows for t in ready))
        if not ranks:
            # All that is left of the slowest has one and the same time: more of it is needed to get past that.
            for index in range(len(streams)):
                if open_[index] and _last(waiting[index]) == limit:
                    _next(streams[index], waiting, open_, index)
            continue
        table = pa.concat_tables(parts).unify_dictionaries().combine_chunks()
        order = pl.DataFrame({"t": pl.Series(table["t_ns"]), "rank": ranks}).select(
            pl.arg_sort_by("t", "rank", maintain_order=True)
        )
        table = table.take(order.to_series().to_arrow())
        numbers = pl.Series("seq", range(seq, seq + table.num_rows), dtype=pl.UInt64)
        seq += table.num_rows
        yield table.set_column(SCHEMA.get_field_index("seq"), SCHEMA.field("seq"), numbers.to_arrow())


def _next(stream: Iterator[pa.Table], waiting: list[list[pa.Table]], open_: list[bool], index: int) -> None:
    for batch in stream:
        if batch.num_rows:
            waiting[index].append(batch)
            return
    open_[index] = False


def _last(tables: Sequence[pa.Table]) -> int:
    """Time up to which a stream is known."""
    return int(tables[-1]["t_ns"][-1].as_py()) if tables else -(1 << 63)


def _split(tables: Sequence[pa.Table], limit: int | None) -> tuple[list[pa.Table], list[pa.Table]]:
    """Rows before `limit` (None: all), and the others."""
    if limit is None:
        return list(tables), []
    ready: list[Any] = []
    rest: list[Any] = []
    for table in tables:
        cut = int(pl.Series(table["t_ns"]).search_sorted(limit, side="left"))
        if cut:
            ready.append(table.slice(0, cut))
        if cut < table.num_rows:
            rest.append(table.slice(cut))
    return ready, rest
