"""What is done piece by piece to bound memory gives what is done at once."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

import tracetool.store
from replay.binding import xentrace_hpet
from tests.shared import SAMPLES
from tracetool.ingest import IngestOptions, ingest
from tracetool.store import Dataset

RECORDING = str(SAMPLES / "xen-2l-dom0-idle.xentrace")


def test_hpet_channels_are_found_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The survey of the idle broadcast may look at a few hundred records at a time."""
    at_once = ingest([RECORDING], tmp_path / "one", IngestOptions()).manifest["facts"]["hpet_channels"]
    monkeypatch.setattr(xentrace_hpet, "SURVEY_ROWS", 500)
    in_slices = ingest([RECORDING], tmp_path / "two", IngestOptions()).manifest["facts"]["hpet_channels"]
    assert at_once == in_slices and at_once


def test_row_groups_grow_and_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of row groups changes while a recording is stored; every row is there, in order."""
    ingest([RECORDING], tmp_path / "one", IngestOptions())
    for name, value in (("FULL_ROWS", 64), ("FRESH_BYTES", 1 << 14), ("PENDING_BYTES", 1 << 14), ("MORE_EVERY", 2000)):
        monkeypatch.setattr(tracetool.store, name, value)
    ingest([RECORDING], tmp_path / "two", IngestOptions())
    one, two = Dataset.open(tmp_path / "one"), Dataset.open(tmp_path / "two")
    assert one.tables() == two.tables()
    for name in one.tables():
        assert pq.read_table(one.table_path(name)).equals(pq.read_table(two.table_path(name))), name
    assert pq.read_table(one.path / "events.parquet").equals(pq.read_table(two.path / "events.parquet"))
