"""What every reader gives: chunks of record tables, gaps, notes, a clock and an account of every byte."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, ClassVar, Protocol

import pyarrow as pa

from parsers.tables import Table

__all__ = ["Accounting", "Chunk", "ClockModel", "Gap", "Note", "NoteCode", "ReadOptions", "Reader", "RecordingError"]


class RecordingError(Exception):
    """The one error a reader raises: nothing at all could be read.

    `str(error)` is one line without the file's name: what was expected, what stood there, at which offset.
    Damage after the first good record is not an error but a `Gap` and a `Note`.
    """

    def __init__(self, message: str, *, offset: int = 0) -> None:
        super().__init__(message)
        self.offset = offset


@dataclass(frozen=True, slots=True)
class NoteCode:
    """A kind of oddity, declared once by the reader that can report it."""

    code: str
    severity: str  # "info" | "warn" | "error"; error means that input could not be read (exit code 3)
    doc: str


@dataclass(frozen=True, slots=True)
class Note:
    """One oddity (or a counted group of equal ones) met while reading."""

    code: str
    severity: str
    text: str
    offset: int = 0
    cpu: int | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class Gap:
    """A stretch in which records are missing: lost by the recorder, damaged, or cut off.

    `t0`/`t1` are raw stamps in ticks (None: unknown, open end), `cpu` None means every CPU,
    `lost` the number of records if the recorder counted them, `length` the bytes skipped in the file.
    """

    reason: str  # "lost-records" | "truncated" | "damaged" | "overrun" | …
    cpu: int | None
    t0: int | None
    t1: int | None
    offset: int
    length: int = 0
    lost: int | None = None
    text: str = ""


@dataclass(frozen=True, slots=True)
class ClockModel:
    """How raw stamps become `t_ns`. With `hz` None the stamps stay in ticks and `unit` is "ticks".

    t_ns = (tsc - tsc0) * 1e9 / hz, rounded down, in integers.
    """

    kind: str  # "tsc" | "ns" | "us" | "none" …
    hz: float | None
    tsc0: int
    unit: str  # unit of t_ns: "ns" | "ticks"
    origin: str  # where hz comes from: "PM_IDLE ticks", "--cpu-hz", "trace clock", …
    error_ppm: float | None = None
    doc: str = ""


@dataclass(slots=True)
class Accounting:
    """Every byte of the (uncompressed) recording is parsed, or skipped for a reason; the sum is `total`."""

    total: int = 0
    parsed: int = 0
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What the user may state. `source` is the label written to the `source` column.

    `only`: names of the events that are wanted, empty for all. A reader that can tell an event's name before it
    parses the record leaves the others out (no table, no count, no `seq`); the bytes still count as parsed.
    """

    source: str = "recording"
    cpu_hz: float | None = None
    xen_version: tuple[int, int] | None = None
    event_map: Mapping[str, str] = field(default_factory=dict)
    only: frozenset[str] = frozenset()


@dataclass(slots=True)
class Chunk:
    """A slice of a recording in global order: all `seq` of a chunk are larger than those of the chunk before.

    `tables` maps table name to rows (schema = `reader.tables[name].schema()`), sorted by `seq`.
    Memory is bounded: a chunk comes from about 12 MB of input.
    """

    tables: dict[str, pa.Table]
    gaps: list[Gap]
    notes: list[Note]
    position: int  # bytes of the uncompressed recording consumed so far, for the progress bar


class Reader(Protocol):
    """A recording of one format, opened. Construct it, iterate `chunks()` once, then read the attributes.

    The constructor may already raise `RecordingError`. `clock` is final before the first chunk;
    `tables` may grow while chunks are produced (formats that bring their own event layouts), but the schema of a
    table never changes once it has been given out; `accounting` and `counts` are final after the last chunk.
    `counts` holds the number of records per event name, tables and records without a table alike.
    """

    format: ClassVar[str]
    note_codes: ClassVar[tuple[NoteCode, ...]]
    tables: dict[str, Table]
    clock: ClockModel
    accounting: Accounting
    counts: dict[str, int]

    @staticmethod
    def sniff(head: bytes) -> bool:
        """Whether the first 64 KiB (uncompressed) look like this format."""
        ...

    def __init__(self, stream: BinaryIO, options: ReadOptions) -> None:
        """`stream` is a seekable binary file of the uncompressed recording."""
        ...

    def chunks(self) -> Iterator[Chunk]:
        """The whole recording, in order."""
        ...
