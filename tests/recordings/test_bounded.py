"""What is done piece by piece to bound memory gives what is done at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tracetool.store
from parsers.xentrace.reader import XentraceReader
from replay.binding import xentrace, xentrace_hpet
from tests.shared import SAMPLES
from tracetool.ingest import IngestOptions, ingest
from tracetool.store import Dataset, DatasetWriter

RECORDING = str(SAMPLES / "xen-2l-dom0-idle.xentrace")


def _rows(path: Path) -> Any:
    """A table, whatever its file says of columns without nulls."""
    table = pq.read_table(path)
    return table.cast(pa.schema([field.with_nullable(True) for field in table.schema]))


def test_hpet_channels_are_found_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The survey of the idle broadcast may look at a few hundred records at a time."""
    at_once = ingest([RECORDING], tmp_path / "one", IngestOptions()).manifest["facts"]["hpet_channels"]
    monkeypatch.setattr(xentrace_hpet, "SURVEY_ROWS", 500)
    in_slices = ingest([RECORDING], tmp_path / "two", IngestOptions()).manifest["facts"]["hpet_channels"]
    assert at_once == in_slices and at_once


def test_events_do_not_depend_on_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records are turned into events some at a time; what lies on both sides of a cut belongs together."""
    ingest([RECORDING], tmp_path / "one", IngestOptions())
    monkeypatch.setattr(xentrace, "SLICE", 777)
    monkeypatch.setattr(tracetool.store, "EVENT_GROUP", 500)
    ingest([RECORDING], tmp_path / "two", IngestOptions())
    one, two = (_rows(tmp_path / name / "events.parquet") for name in ("one", "two"))
    assert one.num_rows > 1500 and one.to_pylist() == two.to_pylist()


def test_row_groups_grow_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of row groups changes while a recording is stored; every row is there, in order."""
    ingest([RECORDING], tmp_path / "one", IngestOptions())
    monkeypatch.setitem(XentraceReader.__init__.__kwdefaults__, "batch_words", 2048)  # type: ignore[arg-type]
    for name, value in (("FRESH_BYTES", 1 << 14), ("PENDING_BYTES", 1 << 14), ("PENDING_OF_ROW", 4)):
        monkeypatch.setattr(tracetool.store, name, value)
    ingest([RECORDING], tmp_path / "two", IngestOptions())
    one, two = Dataset.open(tmp_path / "one"), Dataset.open(tmp_path / "two")
    assert one.tables() == two.tables()
    assert max(pq.ParquetFile(two.table_path(name)).num_row_groups for name in two.tables()) > 3
    for name in one.tables():
        assert _rows(one.table_path(name)).equals(_rows(two.table_path(name))), name
    assert _rows(one.path / "events.parquet").equals(_rows(two.path / "events.parquet"))


def test_a_null_that_comes_late_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are stored as having no null until one comes; what was written before stays as it was."""
    monkeypatch.setattr(tracetool.store, "PENDING_BYTES", 0)
    monkeypatch.setattr(tracetool.store, "PENDING_OF_ROW", 0)
    name = pa.dictionary(pa.int16(), pa.string())
    schema = pa.schema([("seq", pa.uint64()), ("ok", pa.bool_()), ("word", pa.uint32()), ("name", name)])
    batches: list[dict[str, list[object]]] = [
        {"seq": [0, 1], "ok": [True, False], "word": [7, 8], "name": ["a", "b"]},
        {"seq": [2], "ok": [True], "word": [9], "name": ["b"]},
        {"seq": [3, 4], "ok": [None, True], "word": [None, 1], "name": [None, "a"]},
        {"seq": [5], "ok": [None], "word": [None], "name": ["c"]},
    ]
    with DatasetWriter(tmp_path / "d") as writer:
        for batch in batches:
            writer.append("t", pa.table(batch, schema=schema))
            writer.flush()
        dataset = writer.close_records()
        stored = pq.read_table(dataset.table_path("t"))
        assert stored.cast(schema).to_pydict() == {c: [v for b in batches for v in b[c]] for c in schema.names}
        assert [p.name for p in dataset.table_path("t").parent.iterdir()] == ["t.parquet"]
