"""Healthy recordings raise no error that is not explained, event by event, in explained.toml."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest

from tests.shared import ROOT, SAMPLES
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Choice, Settings, replay_dataset
from tracetool.store import Dataset

SHARED = Path(os.environ.get("TRACETOOL_SHARED", ROOT.parent / "shared")) / "recordings"
#: Recordings of machines that worked; text beside them (counts, configurations) is no recording.
BIG = [
    path.relative_to(SHARED).as_posix()
    for path in sorted(SHARED.rglob("*"))
    if path.suffix in (".xentrace", ".zst", ".gz") and path.is_file()
]
SMALL = sorted(p.name for p in SAMPLES.iterdir() if p.suffix in (".xentrace", ".zst", ".gz"))
EXPLAINED = tomllib.loads((Path(__file__).parent / "explained.toml").read_text(encoding="utf-8")).get("finding", [])


def errors(path: Path, folder: Path) -> list[tuple[str, str, int]]:
    ingest([str(path)], folder / "d", IngestOptions())
    runs = replay_dataset(Dataset.open(folder / "d"), Settings((Choice("current"),)))
    return [(r["system"], f["code"], f["t_ns"]) for r in runs for f in r["findings"] if f["severity"] == "error"]


def unexplained(name: str, found: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
    known = {(e["system"], e["code"], e["t_ns"]) for e in EXPLAINED if e["recording"] == name}
    return [f for f in found if f not in known]


@pytest.mark.parametrize("name", BIG or ["absent"])
def test_recording(name: str, tmp_path: Path) -> None:
    if name == "absent":
        pytest.skip("the bigger recordings are not part of the repository")
    assert unexplained(name, errors(SHARED / name, tmp_path)) == []


@pytest.mark.parametrize("name", SMALL)
def test_sample(name: str, tmp_path: Path) -> None:
    assert unexplained(name, errors(SAMPLES / name, tmp_path)) == []


def test_explanations_have_their_evidence() -> None:
    for entry in EXPLAINED:
        assert entry["why"].strip()
        assert entry["evidence"]
