"""Datasets made of recordings are kept up to a bound: the longest unused go first, never one in use."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from replay.declare import UsageError
from tests.cli.small import SAMPLE
from tracetool.cache import VARIABLE, dataset_of
from tracetool.ingest import IngestOptions
from tracetool.store import MANIFEST

MB = 10**6


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "cache" / "tracetool"


def kept(place: Path, name: str, age_s: int) -> Path:
    """A dataset of 1 MB that was last used some time ago."""
    dataset = place / name
    (dataset / "records").mkdir(parents=True)
    (dataset / MANIFEST).write_text("{}")
    (dataset / "records" / "t.parquet").write_bytes(bytes(MB))
    used = dataset.stat().st_mtime - age_s
    os.utime(dataset, (used, used))
    return dataset


def test_the_longest_unused_go_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    middle, oldest, newest = (kept(place, c * 32, age) for c, age in (("b", 200), ("a", 300), ("c", 100)))
    (place / "answers").mkdir()
    mine = kept(place, "of-the-user", 1000)
    monkeypatch.setenv(VARIABLE, "2.9e-3")
    fresh = dataset_of(str(SAMPLE), IngestOptions()).path  # less than 0.9 MB
    assert not oldest.exists() and middle.exists() and newest.exists() and fresh.exists()
    assert mine.exists() and (place / "answers").exists()
    assert not [path for path in place.iterdir() if "gone" in path.name]


def test_one_that_is_found_again_was_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataset_of(str(SAMPLE), IngestOptions()).path
    os.utime(first, (1, 1))
    assert dataset_of(str(SAMPLE), IngestOptions()).path == first
    assert first.stat().st_mtime > 1000


def test_none_in_use_is_removed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used, idle, later = (kept(place, c * 32, age) for c, age in (("a", 300), ("b", 200), ("c", 100)))
    lock = os.open(used, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    monkeypatch.setenv(VARIABLE, "0")
    one = dataset_of(str(SAMPLE), IngestOptions()).path
    assert used.exists() and one.exists() and not idle.exists() and not later.exists()
    other = dataset_of(str(SAMPLE), IngestOptions(cpu_hz=2e9)).path  # this process still uses the first
    assert one.exists() and other.exists() and one != other
    os.close(lock)
    dataset_of(str(SAMPLE), IngestOptions(cpu_hz=3e9))
    assert not used.exists() and one.exists()


def test_what_a_killed_process_was_removing_goes(place: Path) -> None:
    rest = kept(place, f".{'d' * 32}.gone-1", 10)
    dataset_of(str(SAMPLE), IngestOptions())
    assert not rest.exists()


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_bound_is_a_number(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(UsageError, match=VARIABLE):
        dataset_of(str(SAMPLE), IngestOptions())
