"""The tables of a fleet's results, declared once; written beside their place and moved there."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from tracetool.fleet.plan import partition
from tracetool.store import NOTES_SCHEMA

__all__ = ["DONE", "PART", "SCHEMAS", "known", "publish", "scan", "stage", "touch"]

PART: Final = "part-0.parquet"
#: States of a recording whose result stands until the recording or the job changes; the others are tried again.
DONE: Final = ("replayed", "damaged", "unreadable")


def _schema(*columns: tuple[str, Any, str]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, metadata={"doc": doc}) for name, kind, doc in columns])


_RUN: Final = (
    ("system", pa.string(), "hpet, callback, vgic, …"),
    ("policy", pa.string(), "policy that was replayed"),
)

#: Every table has the partition column `recording` besides these.
SCHEMAS: Final[Mapping[str, pa.Schema]] = {
    "recordings": _schema(
        ("path", pa.string(), "where it was"),
        ("state", pa.string(), "replayed, damaged (a part was lost), unreadable, failed, crashed (its worker died)"),
        ("exit_code", pa.int32(), "as of `tracetool replay`, findings left out"),
        ("error", pa.string(), "one line; null when all is well"),
        ("format", pa.string(), "what it was recognised as"),
        ("bytes", pa.uint64(), "uncompressed"),
        ("records", pa.uint64(), "records read"),
        ("version", pa.string(), "what was recorded: Xen or Linux version, or from --version-from; null: unknown"),
        ("recorded", pa.timestamp("us", "UTC"), "time of the recording"),
        ("recorded_from", pa.string(), "recording: its own clock; file: modification time"),
        ("content", pa.string(), "SHA-256 of the file as stored; of manifest.json for a dataset"),
        ("job", pa.string(), "digest of policies, settings and tool version"),
        ("size", pa.uint64(), "bytes of the file as stored"),
        ("mtime_ns", pa.int64(), "for a quick look whether the file may have changed"),
        ("ctime_ns", pa.int64(), "likewise"),
        ("cpu_s", pa.float64(), "CPU seconds that it took"),
        ("attempts", pa.int32(), "1, or 2 when the first worker died"),
    ),
    "runs": _schema(
        *_RUN,
        ("mode", pa.string(), "verify or what-if"),
        ("verdict", pa.string(), "clean, findings or inconclusive"),
        ("calibration", pa.string(), "of a what-if: calibrated or uncalibrated"),
        ("horizon_ns", pa.int64(), "until when the recording is evidence"),
        ("error", pa.uint32(), "findings of that severity"),
        ("warn", pa.uint32(), "findings of that severity"),
        ("info", pa.uint32(), "findings of that severity"),
        ("checked", pa.uint32(), "rules checked"),
        ("inferred", pa.uint32(), "rules checked on inferred events"),
        ("blind", pa.uint32(), "rules that could not be checked"),
    ),
    "findings": _schema(
        *_RUN,
        ("mode", pa.string(), "verify or what-if"),
        ("signature", pa.string(), "equal for findings that say the same, numbers apart"),
        ("code", pa.string(), "see `tracetool explain CODE`"),
        ("severity", pa.string(), "error, warn or info"),
        ("t_ns", pa.int64(), "when"),
        ("cpu", pa.int64(), ""),
        ("dom", pa.int64(), ""),
        ("vcpu", pa.int64(), ""),
        ("obj", pa.int64(), "channel, port, vector, INTID or irq"),
        ("tgt", pa.int64(), "target CPU or vCPU"),
        ("val", pa.int64(), ""),
        ("expected", pa.string(), ""),
        ("observed", pa.string(), ""),
        ("confidence", pa.int32(), "percent"),
        ("offset", pa.int64(), "where in the recording"),
        ("episode", pa.int32(), "repeats of one thing"),
    ),
    "metrics": _schema(
        *_RUN,
        ("mode", pa.string(), "verify or what-if"),
        ("name", pa.string(), ""),
        ("value", pa.float64(), ""),
    ),
    "notes": NOTES_SCHEMA,
}


def stage(folder: Path, tables: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write the tables of one recording below `folder`, for `publish`."""
    for table, rows in tables.items():
        place = folder / table
        place.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, SCHEMAS[table]), place / PART, compression="zstd")


def publish(output: Path, name: str, staged: Path, trash: Path) -> None:
    """Move staged tables to their places.

    The row in `recordings` goes first and comes last: results without it are not there, and the next call replaces
    them. A recording that could not be read has no other tables.
    """
    slot = partition(name)
    for table in SCHEMAS:
        _discard(output / table / slot, trash)
    for table in reversed(list(SCHEMAS)):
        if (staged / table).is_dir():
            (output / table).mkdir(parents=True, exist_ok=True)
            (staged / table).rename(output / table / slot)


def _discard(place: Path, trash: Path) -> None:
    if place.exists():
        trash.mkdir(parents=True, exist_ok=True)
        gone = trash / f"{place.parent.name}-{place.name}"
        place.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def touch(output: Path, name: str, changes: Mapping[str, Any], scratch: Path) -> None:
    """Change columns of a recording's row."""
    place = output / "recordings" / partition(name) / PART
    row = {**pq.read_table(place, partitioning=None).to_pylist()[0], **changes}
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = scratch / PART
    pq.write_table(pa.Table.from_pylist([row], SCHEMAS["recordings"]), temporary, compression="zstd")
    temporary.replace(place)


def known(output: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Rows of `recordings` by name; a row that cannot be read is none."""
    rows = {}
    for name in names:
        with suppress(OSError, pa.ArrowException, IndexError):
            rows[name] = pq.read_table(output / "recordings" / partition(name) / PART, partitioning=None).to_pylist()[0]
    return rows


def scan(output: Path, table: str, names: Iterable[str]) -> pl.LazyFrame:
    """Rows of one table for some recordings, with the column `recording`."""
    files = [f for n in names if (f := output / table / partition(n) / PART).is_file()]
    if not files:
        empty = pl.from_arrow(SCHEMAS[table].empty_table())
        assert isinstance(empty, pl.DataFrame)
        return empty.lazy().with_columns(recording=pl.lit(None, pl.String))
    return pl.scan_parquet(files, glob=False, hive_partitioning=True, hive_schema={"recording": pl.String})
