"""What every binding shares: its input, its output, and the assembly of canonical event tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import polars as pl
import pyarrow as pa

from replay.coverage import Observation
from replay.events import KINDS, ROLES, SCHEMA

__all__ = ["COLUMNS", "KIND", "Assembler", "Bound", "Context", "Forward", "Records", "event", "lost_events", "slices"]

#: Constants that are kept as columns.
MOST_CONSTANTS: Final = 1024
#: The vocabulary as a polars type: cheap to carry, exact to spell.
KIND: Final = pl.Enum([kind.name for kind in KINDS])

_SYS: Final = tuple(dict.fromkeys(kind.sys for kind in KINDS))
_SYS_OF_KIND: Final = np.array([_SYS.index(kind.sys) for kind in KINDS], dtype=np.int8)
_NAMES: Final = {"kind": pa.array([kind.name for kind in KINDS]), "sys": pa.array(_SYS), "role": pa.array(ROLES)}
_ROLE_OF_KIND: Final = np.array([ROLES.index(kind.role) for kind in KINDS], dtype=np.int8)

#: Columns that a binding fills; absent ones are null (or 0, 100 for flags and conf).
COLUMNS: Final[Mapping[str, Any]] = {
    "t_ns": pl.Int64,
    "t_err_ns": pl.UInt32,
    "src_seq": pl.UInt64,
    "rank": pl.Int8,  # order among events of one record
    "kind": KIND,
    "cpu": pl.Int32,
    "dom": pl.UInt16,
    "vcpu": pl.UInt16,
    "obj": pl.UInt32,
    "tgt": pl.Int32,
    "val": pl.Int64,
    "val2": pl.Int64,
    "flags": pl.UInt32,
    "conf": pl.UInt8,
    "offset": pl.UInt64,
    "raw_kind": pl.String,
}
_DEFAULTS: Final[Mapping[str, Any]] = {"t_err_ns": 0, "rank": 0, "flags": 0, "conf": 100}
_TAKEN: Final[Mapping[str, str]] = {**{n: n for n in ("t_ns", "t_err_ns", "cpu", "offset")}, "src_seq": "seq"}


def _column(name: str, value: Any) -> pl.Expr:
    """A canonical column."""
    # A damaged record may hold a number that its column cannot: that field is not known then.
    expr = (value if isinstance(value, pl.Expr) else pl.lit(value)).cast(COLUMNS[name], strict=False)
    return (expr.fill_null(_DEFAULTS[name]) if name in _DEFAULTS else expr).alias(name)


_NONE: Final = pl.DataFrame(schema=dict(COLUMNS))
#: One row of a constant, by column and value: making expressions costs more than evaluating them.
_CONSTANT: Final[dict[tuple[str, Any], pl.Series]] = {}


def _repeated(name: str, value: Any, rows: int) -> pl.Series:
    """A constant as a canonical column."""
    key = (name, value)
    if key not in _CONSTANT:
        if len(_CONSTANT) >= MOST_CONSTANTS:
            _CONSTANT.clear()
        _CONSTANT[key] = pl.select(_column(name, value)).to_series()
    return _CONSTANT[key].new_from_index(0, rows)


def _taken(name: str, values: pl.Series) -> pl.Series:
    """A column of a frame as a canonical column."""
    values = values if values.dtype == COLUMNS[name] else values.cast(COLUMNS[name], strict=False)
    if name in _DEFAULTS and values.null_count():
        values = values.fill_null(_DEFAULTS[name])
    return values.alias(name)


class Records(Protocol):
    """Record tables, wherever they lie."""

    def tables(self) -> frozenset[str]:
        """Names of the tables that exist."""
        ...

    def scan(self, name: str) -> pl.LazyFrame:
        """One table, sorted by `seq`."""
        ...

    def parts(
        self, name: str, columns: Sequence[str] | None, lo: int = 0, hi: int | None = None
    ) -> Iterator[pl.DataFrame]:
        """The same table (only some columns; None: all) from front to back, a bounded number of rows at a time.

        At least one frame; stretches of the table that have no `seq` in [lo, hi) may be left out.
        """
        ...


@dataclass(frozen=True, slots=True)
class Context:
    """What a binding needs to know of the recording beside its tables.

    `rows` is the number of records; `unit` that of `t_ns` ("ns" or "ticks"); `hz` the stamp frequency if known;
    `gaps` have t0_ns, t1_ns, cpu, lost; `options` is what the user stated (for instance `hpet_irqs`).
    """

    source: str
    rows: int
    unit: str
    hz: float | None
    gaps: Sequence[Mapping[str, Any]] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Bound:
    """What a binding gives: how well each kind is shown, what it found out, and the events in order."""

    observed: dict[str, Observation]
    facts: dict[str, Any]
    batches: Iterator[pa.Table]


def slices(rows: int, step: int = 1 << 20) -> Iterator[tuple[int, int]]:
    """Ranges [lo, hi) of `seq` that cover a recording."""
    for lo in range(0, max(rows, 1), step):
        yield lo, lo + step


class _Stream:
    """One table on its way from front to back; `parts` gives at least one frame."""

    def __init__(self, parts: Iterator[pl.DataFrame]) -> None:
        self.parts = parts
        self.rest = next(parts)
        self.seq = self.rest["seq"].to_numpy()
        self.passed = 0  # rows of `rest`
        self.at = (0, 0)
        self.now = self.rest.clear()

    def advance(self, lo: int, hi: int) -> pl.DataFrame:
        """Rows with lo <= seq < hi that were not passed before."""
        found: list[pl.DataFrame] = []
        while True:
            first, last = (self.passed + int(n) for n in np.searchsorted(self.seq[self.passed :], (lo, hi)))
            if last > first:
                found.append(self.rest[first:last])
            self.passed = last
            following = next(self.parts, None) if last == len(self.seq) else None
            if following is None:
                break
            self.rest, self.seq, self.passed = following, following["seq"].to_numpy(), 0
        self.at = (lo, hi)
        self.now = self.rest.clear() if not found else found[0] if len(found) == 1 else pl.concat(found)
        return self.now


class Forward:
    """Record tables read once from front to back, a slice of `seq` at a time, whoever asks for it."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.streams: dict[tuple[str, tuple[str, ...] | None], _Stream] = {}

    def tables(self) -> frozenset[str]:
        """Names of the tables that exist."""
        return self.records.tables()

    def read(self, name: str, lo: int, hi: int, columns: tuple[str, ...] | None = None) -> pl.DataFrame:
        """The records with lo <= seq < hi of a table that exists; slices are asked for in ascending order."""
        key = (name, columns)
        if key not in self.streams:
            self.streams[key] = _Stream(self.records.parts(name, columns))
        stream = self.streams[key]
        return stream.now if stream.at == (lo, hi) else stream.advance(lo, hi)

    def release(self) -> None:
        """Nobody asks for the same slice again."""
        for stream in self.streams.values():
            stream.now = stream.now.clear()
            stream.at = (0, 0)


def event(frame: pl.DataFrame, kind: str, raw_kind: str, **columns: Any) -> pl.DataFrame:
    """Canonical columns from a frame of records; `columns` are expressions, names of the frame's columns, or numbers.

    `t_ns`, `t_err_ns`, `cpu`, `offset` and `seq` (as `src_seq`) are taken over unless given.
    """
    if not frame.height:
        return _NONE
    made = [_column(name, value) for name, value in columns.items() if isinstance(value, pl.Expr)]
    ready = {series.name: series for series in frame.select(made).get_columns()} if made else {}
    rows = frame.height
    found: list[pl.Series] = []
    for name in COLUMNS:
        value = columns.get(name) if name in columns else _TAKEN.get(name, _DEFAULTS.get(name))
        if name in ready:
            series = ready[name]
            found.append(series if len(series) == rows else series.new_from_index(0, rows))
        elif name in ("kind", "raw_kind"):
            found.append(_repeated(name, kind if name == "kind" else raw_kind, rows))
        elif isinstance(value, str):
            found.append(_taken(name, frame[value]))
        else:
            found.append(_repeated(name, value, rows))
    return pl.DataFrame(found)


def lost_events(context: Context) -> pl.DataFrame:
    """Gaps as markers at their begin and end; one without an end lasts to the end of the recording."""
    rows = [g for g in context.gaps if g["t1_ns"] is not None]  # an open one comes after the last record
    frame = pl.DataFrame(
        {
            "seq": [0] * len(rows),
            "t_ns": [g["t1_ns"] for g in rows],
            "t_err_ns": [0] * len(rows),
            "cpu": [g["cpu"] for g in rows],
            "offset": [g["offset"] for g in rows],
            "start": [g["t0_ns"] if g["t0_ns"] is not None else g["t1_ns"] for g in rows],
            "lost": [g["lost"] for g in rows],
        },
        schema={
            "seq": pl.UInt64, "t_ns": pl.Int64, "t_err_ns": pl.UInt32, "cpu": pl.Int32, "offset": pl.UInt64,
            "start": pl.Int64, "lost": pl.Int64,
        },
    )  # fmt: skip
    ends = event(frame, "trace.lost", "gap", val=pl.col("start"), val2=pl.col("lost"), rank=-1)
    begins = event(frame, "trace.lost", "gap", t_ns=pl.col("start"), val=pl.col("start"), flags=1, rank=-1)
    return pl.concat([begins, ends])


class Assembler:
    """Puts frames of events into one order over the whole recording and gives each its `seq`.

    Events may lie before the record they come from (a handler's begin); `hold_ns` is how far back that can be, so
    that much is kept for the next batch.
    """

    def __init__(self, source: str, hold_ns: int = 100_000_000) -> None:
        self.source = source
        self.hold_ns = hold_ns
        self.held: pl.DataFrame | None = None
        self.seq = 0
        self.emitted_t: int | None = None

    def push(self, frames: Iterable[pl.DataFrame], until_ns: int | None) -> pa.Table | None:
        """Add events; return those that are final. `until_ns`: time of the slice's last record, None at the end."""
        parts = [f for f in frames if f.height]
        if self.held is not None:
            parts.insert(0, self.held)
        if not parts:
            return None
        # An event older than what was given out already cannot be put in its place any more.
        frame = pl.concat(parts)
        del parts
        if frame["t_ns"].null_count():
            # Records without any stamp stand where they stand in their source; how late they really were is unknown.
            frame = frame.sort("src_seq").with_columns(
                t_ns=pl.col("t_ns").forward_fill(),
                t_err_ns=pl.when(pl.col("t_ns").is_null()).then(pl.lit(0xFFFFFFFF)).otherwise(pl.col("t_err_ns")),
            )
            frame = frame.cast({"t_err_ns": pl.UInt32}).filter(pl.col("t_ns").is_not_null())
            if not frame.height:
                return None
        if self.emitted_t is not None:
            frame = frame.with_columns(pl.col("t_ns").clip(lower_bound=self.emitted_t))
        frame = frame.sort("t_ns", "src_seq", "rank", maintain_order=True)
        if until_ns is None:
            self.held = None
        else:
            final = frame["t_ns"].search_sorted(until_ns - self.hold_ns, side="left")
            self.held = frame.filter(pl.int_range(pl.len()) >= int(final))  # a copy: the rest need not stay for it
            frame = frame[: int(final)]
        if not frame.height:
            return None
        self.emitted_t = int(frame["t_ns"][-1])
        table = self._arrow(frame)
        self.seq += frame.height
        return table

    def _arrow(self, frame: pl.DataFrame) -> pa.Table:
        """SCHEMA from a sorted frame."""
        n = frame.height
        kind = frame["kind"].to_physical().cast(pl.Int16).to_numpy()
        zeros = pa.array(np.zeros(n, np.int16))
        columns: dict[str, Any] = {
            name: frame[name].to_arrow() for name in COLUMNS if name in SCHEMA.names and name not in ("kind", "seq")
        }
        columns["seq"] = pa.array(np.arange(self.seq, self.seq + n, dtype=np.uint64))
        columns["src"] = pa.DictionaryArray.from_arrays(zeros, [self.source])
        columns["kind"] = pa.DictionaryArray.from_arrays(pa.array(kind), _NAMES["kind"])
        columns["sys"] = pa.DictionaryArray.from_arrays(pa.array(_SYS_OF_KIND[kind]), _NAMES["sys"])
        columns["role"] = pa.DictionaryArray.from_arrays(pa.array(_ROLE_OF_KIND[kind]), _NAMES["role"])
        columns["cause_seq"] = pa.nulls(n, pa.uint64())
        columns["body_id"] = pa.nulls(n, pa.uint64())
        raw = frame["raw_kind"].to_arrow().dictionary_encode()
        columns["origin"] = pa.StructArray.from_arrays(
            [
                pa.DictionaryArray.from_arrays(zeros, [self.source]),
                frame["offset"].to_arrow(),
                pa.DictionaryArray.from_arrays(raw.indices, raw.dictionary.cast(pa.string())),
            ],
            fields=list(SCHEMA.field("origin").type),
        )
        return pa.table([columns[f.name].cast(f.type) for f in SCHEMA], schema=SCHEMA)
