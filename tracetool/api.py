"""A dataset or a recording for Python: `tracetool.open(path)`, then polars frames.

    import polars as pl
    import tracetool

    trace = tracetool.open("boot.xentrace")
    idle = trace.events("hpet").filter(pl.col("kind") == "idle.enter").collect()
    print(trace.findings(system="hpet").group_by("code").len())
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import polars as pl

from replay.declare import UsageError
from replay.sink import KEEP
from replay.systems import SYSTEMS
from tracetool import cache
from tracetool.query import ask, columns_of, findings_frame, tables_of
from tracetool.replaying import Settings, choose, choose_recorded, replay_dataset
from tracetool.request import ingest_options
from tracetool.store import Dataset
from tracetool.terminal import clean

__all__ = ["Trace", "open"]


class Trace:
    """A dataset to ask. Nothing is loaded until a frame is collected; nothing is ever written."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset

    def __repr__(self) -> str:
        return f"<tracetool dataset {str(self.path)!r}: {self.manifest['span']['records']} records>"

    @property
    def path(self) -> Path:
        """The dataset's folder."""
        return self._dataset.path

    @property
    def manifest(self) -> Mapping[str, Any]:
        """What was read, from what, with which clock: the parsed manifest.json."""
        return self._dataset.manifest

    def tables(self) -> pl.DataFrame:
        """Every table with `table`, `rows` and `doc`."""
        return pl.DataFrame(tables_of(self._dataset), schema={"table": pl.String, "rows": pl.Int64, "doc": pl.String})

    def columns(self, table: str) -> pl.DataFrame:
        """Columns of a table with `column`, `type`, `unit` and `doc`."""
        schema = dict.fromkeys(("column", "type", "unit", "doc"), pl.String)
        return pl.DataFrame(columns_of(self._dataset, table), schema=schema)

    def events(self, system: str | None = None) -> pl.LazyFrame:
        """Canonical events (`replay.events.SCHEMA`), in order; `system`: only the kinds that its model reads."""
        events = self._dataset.events()
        if system is None:
            return events
        kinds = list(SYSTEMS[_known(system)].kinds)
        return events.filter(pl.col("kind").cast(pl.String).is_in(kinds))

    def records(self, name: str) -> pl.LazyFrame:
        """A record table under the recorder's own event name; UsageError when the dataset has none of that name."""
        if name not in self._dataset.tables():
            known = ", ".join(sorted(self._dataset.tables())[:8])
            raise UsageError(f"no record table {name!r}; there are {known}, …: see .tables()")
        return self._dataset.scan(name)

    def gaps(self) -> pl.DataFrame:
        """Where records are missing: source, reason, cpu, t0_ns, t1_ns, offset, length, lost, text."""
        return pl.read_parquet(self.path / "gaps.parquet", glob=False)

    def notes(self) -> pl.DataFrame:
        """Oddities that the reader met: source, code, severity, text, offset, cpu, count."""
        return pl.read_parquet(self.path / "notes.parquet", glob=False)

    def sql(self, query: str, *, policy: str | Sequence[str] = "current") -> pl.DataFrame:
        """Any SQL over the tables; `findings` are those of a replay under `policy`."""
        return ask(self._dataset, query, runs=lambda: self.replay(policy=policy)).frame

    def replay(
        self,
        system: str | Sequence[str] | None = None,
        policy: str | Sequence[str] = "current",
        *,
        set: Mapping[str, Mapping[str, Any]] | None = None,
        recorded: Mapping[str, str] | None = None,
        keep: int = KEEP,
    ) -> list[dict[str, Any]]:
        """Replay the dataset; returns one record for each run, as in `report -o x.json`.

        `system`: one or several, None for all that can be checked. `policy`: as `--policy` on the command line.
        `set`: parameter values by system, for instance `{"hpet": {"slop_ns": 50_000}}`. `recorded`: the policy that
        really ran, by system, where the recording does not tell. `keep`: findings of each code and severity that are
        listed; those beyond are counted in `suppressed`.
        """
        systems = (system,) if isinstance(system, str) else tuple(system or ())
        policies = (policy,) if isinstance(policy, str) else tuple(policy)
        for name in systems:
            _known(name)
        ran = choose_recorded(f"{name}={policy}" for name, policy in (recorded or {}).items())
        settings = Settings(tuple(choose(p) for p in policies), systems, _checked(set or {}), ran, keep)
        return replay_dataset(self._dataset, settings)

    def findings(
        self,
        system: str | Sequence[str] | None = None,
        policy: str | Sequence[str] = "current",
        *,
        set: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> pl.DataFrame:
        """Findings of a replay, one row each (`tracetool.query.FINDINGS_SCHEMA`); arguments as for `replay`."""
        return findings_frame(self.replay(system, policy, set=set))


def _known(system: str) -> str:
    if system not in SYSTEMS:
        raise UsageError(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
    return system


def _checked(values: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    for system, given in values.items():
        declared = {p.name for p in SYSTEMS[_known(system)].parameters}
        for name in given:
            if name not in declared:
                raise UsageError(f"{system} has no parameter {name!r}; it has {', '.join(sorted(declared))}")
    return values


def open(
    path: str | PathLike[str],
    *,
    cpu_hz: float | None = None,
    xen_version: str | None = None,
    format: str | None = None,
    hpet_irqs: Sequence[int] = (),
) -> Trace:
    """Open a dataset folder made by `tracetool ingest`, or a recording.

    A recording is read once and kept in the user's cache folder, as on the command line; what of it could not be read
    is a UserWarning. The keywords say how to read it where the recording does not tell, and do nothing to a dataset.
    UsageError when there is nothing at `path` or a keyword is wrong, StoreError for a folder that is no dataset,
    RecordingError for a file that is no recording; each is one line.
    """
    place = fspath(path)
    options = ingest_options(
        None if cpu_hz is None else f"{cpu_hz:.17g}", xen_version, format, ",".join(map(str, hpet_irqs)) or None
    )
    options = replace(options, command=f"tracetool.open({place!r})")
    dataset = cache.dataset_of(place, options)
    if dataset.manifest.get("damaged") and not Path(place).is_dir():
        for note in dataset.notes():
            if note["severity"] == "error":
                text = f"{note['source']}: offset {note['offset']}: {note['text']}; the rest was kept"
                warnings.warn(clean(text), UserWarning, stacklevel=2)
    return Trace(dataset)
