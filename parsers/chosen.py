"""Only the events that were asked for, from any reader."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from parsers.recording import Chunk, Reader

__all__ = ["ChosenReader", "chosen"]


class ChosenReader:
    """A reader's tables of the events in `only`; all else (clock, gaps, notes, account of bytes) is the reader's.

    For readers that do not leave the others out themselves: `seq` keeps the numbers of the whole recording.
    """

    def __init__(self, reader: Reader, only: frozenset[str]) -> None:
        self._reader, self._only = reader, only

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    @property
    def counts(self) -> dict[str, int]:
        """Records by event, of those that were asked for."""
        return {name: count for name, count in self._reader.counts.items() if name in self._only}

    def chunks(self) -> Iterator[Chunk]:
        """The reader's chunks without the other tables."""
        for chunk in self._reader.chunks():
            tables = {name: table for name, table in chunk.tables.items() if name in self._only}
            yield Chunk(tables, chunk.gaps, chunk.notes, chunk.position)


def chosen(reader: Reader, only: frozenset[str]) -> Reader:
    """`reader`, or its chosen tables if it cannot leave out records by itself."""
    if not only or getattr(reader, "leaves_out", False):
        return reader
    kept: Any = ChosenReader(reader, only)
    result: Reader = kept
    return result
