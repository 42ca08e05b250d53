"""Record tables of a Linux recording by what they show, not by what the user called them.

Kprobe names are the user's own. A probe is recognised by the symbol that it sits on: text carries it in parentheses,
trace.dat in `__probe_ip` with the saved kallsyms; where neither gives it, the event's name counts if it is one of the
symbols in question. An event map states the rest:

    [my_mask]                      # event name in the recording
    symbol = "evtchn_2l_mask"      # treat it as a probe of this function …
    fields = { port = "arg1" }     # … whose arguments have these names

    [my_send]
    kind = "evtchn.send"           # or: straight to a canonical kind; the rest are columns or numbers
    obj = "port"
    dom = 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from replay.binding.base import COLUMNS, Records, event
from replay.coverage import Observation
from replay.declare import UsageError
from replay.events import KIND_ID

__all__ = ["KEEP", "Mapped", "Probe", "Source", "check_event_map"]

#: Columns of every record that bindings pass on.
KEEP: Final = ("seq", "t_ns", "t_err_ns", "cpu", "offset")

#: Columns of a mapped event that a user may give.
_TARGETS: Final = frozenset(COLUMNS) - {"t_ns", "t_err_ns", "src_seq", "rank", "kind", "offset", "raw_kind"}
#: Arguments that share a name with a common column; readers and `probe` call them `arg_…`.
_CLASHES: Final = ("cpu", "flags", "pid")
_KNOWN_KEYS: Final = _TARGETS | {"kind", "symbol", "return", "fields"}


@dataclass(frozen=True, slots=True)
class Probe:
    """One table that holds hits of a probe; `fields` maps an argument's usual name to the user's."""

    table: str
    fields: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mapped:
    """A table that the user mapped straight to a canonical kind."""

    table: str
    kind: str
    columns: Mapping[str, Any]


def check_event_map(given: Mapping[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """An event map as read from TOML, checked; UsageError names what is wrong."""
    result: dict[str, dict[str, Any]] = {}
    for name, entry in given.items():
        if not isinstance(entry, dict) or bool(entry.get("kind")) == bool(entry.get("symbol")):
            raise UsageError(f"{origin}: [{name}] needs either kind = … or symbol = …")
        if "kind" in entry and entry["kind"] not in KIND_ID:
            raise UsageError(f"{origin}: [{name}] no canonical kind {entry['kind']!r}")
        unknown = sorted(set(entry) - _KNOWN_KEYS)
        if unknown:
            known = ", ".join(sorted(_KNOWN_KEYS))
            raise UsageError(f"{origin}: [{name}] unknown key {unknown[0]!r}; there are {known}")
        for key in _TARGETS & set(entry):
            if not isinstance(entry[key], (int, str)) or isinstance(entry[key], bool):
                raise UsageError(f"{origin}: [{name}] {key} must be a column's name or a whole number")
        if not isinstance(entry.get("fields", {}), dict):
            raise UsageError(f"{origin}: [{name}] fields must be a table of name = column")
        result[str(name)] = dict(entry)
    return result


class Source:
    """The tables of one recording, found by tracepoint name or by probed symbol."""

    def __init__(self, records: Records, event_map: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self.records = records
        self.tables = records.tables()
        self.columns: dict[str, frozenset[str]] = {}
        self.entries: dict[str, list[Probe]] = {}
        self.returns: dict[str, list[Probe]] = {}
        self.mapped: list[Mapped] = []
        self.distrusted: dict[str, str] = {}
        given = dict(event_map or {})
        for table in sorted(self.tables):
            entry = given.get(table)
            if entry is not None and "kind" in entry:
                columns = {k: v for k, v in entry.items() if k in _TARGETS}
                self.mapped.append(Mapped(table, str(entry["kind"]), columns))
            elif entry is not None:
                self._add(str(entry["symbol"]), Probe(table, dict(entry.get("fields", {}))), bool(entry.get("return")))
            else:
                self._recognise(table)

    def _add(self, symbol: str, probe: Probe, returns: bool) -> None:
        (self.returns if returns else self.entries).setdefault(symbol, []).append(probe)

    def _recognise(self, table: str) -> None:
        """Probes carry their own address; tables of tracepoints do not and are found by name."""
        columns = self.fields(table)
        returns = "__probe_func" in columns
        if not returns and "__probe_ip" not in columns:
            return
        column = "__probe_func_sym" if returns else "__probe_ip_sym"
        symbol: str | None = None
        if column in columns:
            first = self.records.scan(table).select(pl.col(column).drop_nulls().first()).collect().item()
            symbol = str(first).split("+", 1)[0].split(" ", 1)[0] if first else None
        if symbol is None:  # no kallsyms: the name is all there is
            symbol = table.removesuffix("_ret") if returns else table
        self._add(symbol, Probe(table), returns)

    def fields(self, table: str) -> frozenset[str]:
        """Column names of a table; none if it does not exist."""
        if table not in self.tables:
            return frozenset()
        if table not in self.columns:
            self.columns[table] = frozenset(self.records.scan(table).collect_schema().names())
        return self.columns[table]

    def has(self, table: str) -> bool:
        """Whether a tracepoint was recorded."""
        return table in self.tables

    def probed(self, *symbols: str, returns: bool = False) -> bool:
        """Whether a probe on one of the symbols fired."""
        where = self.returns if returns else self.entries
        return any(s in where for s in symbols)

    def argument(self, symbol: str, name: str) -> bool:
        """Whether the probe on `symbol` recorded the argument `name`."""
        return any(self._column(p, name) is not None for p in self.entries.get(symbol, ()))

    def _column(self, probe: Probe, name: str) -> str | None:
        """Column that holds an argument. Readers prefix arguments that clash with a common column by `arg_`."""
        names = self.fields(probe.table)
        wanted = probe.fields.get(name, name)
        for candidate in (f"arg_{wanted}", wanted):
            if candidate in names and not (candidate == wanted and wanted in _CLASHES):
                return candidate
        return None

    def read(self, table: str, lo: int, hi: int, *columns: str) -> pl.DataFrame | None:
        """Records lo <= seq < hi of a tracepoint, or None if there is no such table or none of its rows."""
        if table not in self.tables:
            return None
        names = self.fields(table)
        exprs = [pl.col(c) if c in names else pl.lit(None, pl.Int64).alias(c) for c in columns]
        window = pl.col("seq").is_between(lo, hi, closed="left")
        frame = self.records.scan(table).filter(window).select(*KEEP, *exprs).collect()
        return frame.sort("seq") if frame.height else None

    def probe(self, symbol: str, lo: int, hi: int, *arguments: str, returns: bool = False) -> pl.DataFrame | None:
        """Hits of the probes on `symbol` with some of their arguments (as Int64, words bit for bit), by seq."""
        parts = []
        for probe in (self.returns if returns else self.entries).get(symbol, ()):
            types = self.records.scan(probe.table).collect_schema()
            exprs = [self._word(types, self._column(probe, name), name) for name in arguments]
            window = pl.col("seq").is_between(lo, hi, closed="left")
            parts.append(self.records.scan(probe.table).filter(window).select(*KEEP, *exprs).collect())
        frames = [p for p in parts if p.height]
        return pl.concat(frames).sort("seq") if frames else None

    def texts(self, symbol: str, key: str, name: str) -> pl.DataFrame | None:
        """Distinct pairs of a number `key` and a text `name` among the arguments of a probe; None without texts."""
        parts = []
        for probe in self.entries.get(symbol, ()):
            types = self.records.scan(probe.table).collect_schema()
            column = self._column(probe, name)
            if column is not None and types[column] in (pl.String, pl.Categorical):
                word = self._word(types, self._column(probe, key), key)
                text = pl.col(column).cast(pl.String).alias(name)
                parts.append(self.records.scan(probe.table).select(word, text).unique().collect())
        return pl.concat(parts) if parts else None

    @staticmethod
    def _word(types: Mapping[str, Any], column: str | None, name: str) -> pl.Expr:
        """An argument as Int64, bit for bit; null when it is absent or no number."""
        name = f"arg_{name}" if name in _CLASHES else name
        if column is None or not types[column].is_integer():
            return pl.lit(None, pl.Int64).alias(name)
        word = pl.col(column)
        return (word.reinterpret(signed=True) if types[column] == pl.UInt64 else word.cast(pl.Int64)).alias(name)

    def observed(self) -> dict[str, Observation]:
        """What the event map makes observable: the user says so."""
        return {m.kind: Observation(100, f"{m.table}, by the event map") for m in self.mapped}

    def mapped_events(self, lo: int, hi: int) -> list[pl.DataFrame]:
        """Canonical events of mapped tables; UsageError when a column named in the map does not exist."""
        frames = []
        for entry in self.mapped:
            names = self.fields(entry.table)
            missing = [v for v in entry.columns.values() if isinstance(v, str) and v not in names]
            if missing:
                known = ", ".join(sorted(names))
                raise UsageError(f"event map: {entry.table} has no column {missing[0]!r}; it has {known}")
            wanted = {v for v in entry.columns.values() if isinstance(v, str)} - set(KEEP)
            frame = self.read(entry.table, lo, hi, *sorted(wanted))
            if frame is not None:
                columns = {k: pl.col(v) if isinstance(v, str) else v for k, v in entry.columns.items()}
                frames.append(event(frame, entry.kind, entry.table, **columns))
        return frames
