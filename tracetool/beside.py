"""Recordings' own runs of several systems side by side, so that the events are read once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa

from replay.driver import run_beside
from tracetool.session import Session
from tracetool.store import Dataset

__all__ = ["open_beside"]

Progress = Callable[[str, int, int], None]


def open_beside(dataset: Dataset, sessions: Sequence[Session], progress: Progress | None = None) -> None:
    """Run the recorded policies of those systems that will be asked for them."""
    asked = [session for session in sessions if session.is_to_verify()]
    if len(asked) < 2:
        return
    replays = [session.recording() for session in asked]
    told = ("seq",) if progress else ()
    wants = [
        ([kind for kind in session.system.kinds if kind not in replay.ignored], (*replay.columns, *told))
        for session, replay in zip(asked, replays, strict=True)
    ]
    parts = dataset.event_parts(wants)
    if progress:
        names = ", ".join(session.system.name for session in asked)
        parts = _told(parts, names, progress, int(dataset.manifest.get("events") or 1))
    runs = run_beside(replays, parts, dataset.manifest.get("span", {}).get("t1_ns"))
    for session, run in zip(asked, runs, strict=True):
        session.found(run)


def _told(
    parts: Iterator[tuple[int, pa.Table]], names: str, progress: Progress, total: int
) -> Iterator[tuple[int, pa.Table]]:
    for number, table in parts:
        yield number, table
        progress(names, int(table["seq"][-1].as_py()), total)
