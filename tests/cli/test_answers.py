"""What earlier replays found gives the same bytes, is never another's, and may be lost or damaged at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.small import SAMPLE
from tests.shared import SAMPLES
from tracetool import answers, session
from tracetool.answers import Answers
from tracetool.cache import dataset_of
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Choice, Settings, choose, replay_dataset
from tracetool.store import Dataset

FILES = (SAMPLE, SAMPLES / "qemu-arm64-gic.log.gz", SAMPLES / "ftrace-linux-6.1_10-kprobes.txt.zst")
CURRENT, PROPOSED = (Settings((Choice(name),)) for name in ("current", "proposed"))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TRACETOOL_CACHE", raising=False)
    return tmp_path / "cache" / "tracetool" / "answers"


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.name)
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    target = tmp_path_factory.mktemp("answers") / "d"
    ingest([str(request.param)], target, IngestOptions())
    return Dataset.open(target)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    target = tmp_path_factory.mktemp("small") / "d"
    ingest([str(SAMPLE)], target, IngestOptions())
    return Dataset.open(target)


def told(dataset: Dataset, settings: Settings, kept: Answers | None = None) -> str:
    return json.dumps(replay_dataset(dataset, settings, answers=kept))


def runs_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The machines that run from now on."""
    ran: list[str] = []
    make: Callable[..., Any] = session.Replay

    def counted(system: Any, policy: str, *rest: Any, **given: Any) -> Any:
        ran.append(f"{system.name} {policy} {'closed' if given['closed'] else 'open'}")
        return make(system, policy, *rest, **given)

    monkeypatch.setattr(session, "Replay", counted)
    return ran


def test_the_same_bytes_with_and_without(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [told(dataset, settings) for settings in (CURRENT, PROPOSED)]
    kept = Answers.of(dataset.path)
    assert [told(dataset, settings, kept) for settings in (CURRENT, PROPOSED)] == plain
    ran = runs_of(monkeypatch)
    assert [told(dataset, settings, Answers.of(dataset.path)) for settings in (CURRENT, PROPOSED)] == plain
    assert not ran


def test_another_policy_runs_only_that(small: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Answers.of(small.path)
    for settings in (CURRENT, PROPOSED):
        told(small, settings, kept)
    ran = runs_of(monkeypatch)
    third = Settings((choose("hpet=upstream-2025"),))
    warm = told(small, third, kept)
    assert ran == ["hpet upstream-2025 closed"]
    assert warm == told(small, third)
    assert len(ran) == 4  # that run again, and what it is compared with: the recording and its policy's what-if


def test_damaged_answers_are_computed_again(small: Dataset, place: Path) -> None:
    kept = Answers.of(small.path)
    plain = [told(small, settings, kept) for settings in (CURRENT, PROPOSED)]
    for number, path in enumerate(sorted(place.iterdir())):
        whole = path.read_bytes()
        cut = number % 3
        path.write_bytes(b"" if cut == 0 else whole[:-1] if cut == 1 else whole[:90] + b"~" + whole[91:])
    assert [told(small, settings, kept) for settings in (CURRENT, PROPOSED)] == plain


def test_a_changed_program_or_dataset_has_its_own(
    small: Dataset, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told(small, CURRENT, Answers.of(small.path))
    ran = runs_of(monkeypatch)
    for asked in (
        Settings((Choice("current"),), keep=3),
        Settings((Choice("current"),), values={"hpet": {"slop_ns": 1}}),
        Settings((Choice("current"),), recorded={"hpet": "upstream-2025"}),
    ):
        before = len(ran)
        assert told(small, asked, Answers.of(small.path)) == told(small, asked)
        assert any(run.startswith("hpet") for run in ran[before:])
    before = len(ran)
    monkeypatch.setattr(answers, "program", lambda: "another")
    told(small, CURRENT, Answers.of(small.path))
    assert len(ran) > before
    identity = Answers.of(small.path)
    os.utime(small.path / "gaps.parquet")
    assert Answers.of(small.path) == identity  # content counts, not time
    manifest = (small.path / "manifest.json").read_bytes()
    (small.path / "manifest.json").write_bytes(manifest + b"\n")
    assert Answers.of(small.path) != identity
    (small.path / "manifest.json").write_bytes(manifest)


def test_ones_own_policies_are_never_kept(small: Dataset, place: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("from replay.systems.hpet_broadcast.policies import Current\n\n\nclass Mine(Current):\n    pass\n")
    told(small, PROPOSED, Answers.of(small.path))
    before = set(place.iterdir())
    told(small, Settings((choose(f"{mine}:Mine"),)), Answers.of(small.path))
    assert set(place.iterdir()) == before


def test_switched_off(small: Dataset, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACETOOL_CACHE", "0")
    assert Answers.of(small.path) is None
    assert not place.exists()


def test_the_longest_unused_go(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "LARGEST", 400)
    kept = Answers(place, "x")
    seen: set[Path] = set()
    for number in range(3):
        kept.put({"n": number}, b"." * 50, number)
        (new,) = set(place.iterdir()) - seen
        seen.add(new)
        os.utime(new, ns=(number, number))
    assert kept.get(0) == ({"n": 0}, b"." * 50)  # used just now
    kept.put({"n": 3}, b"." * 50, 3)  # about 130 bytes each: three have room
    assert all(120 < path.stat().st_size < 133 for path in place.iterdir())
    assert [kept.get(number) is not None for number in range(4)] == [True, False, True, True]


def test_nothing_is_kept_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = Answers(tmp_path / "file" / "answers", "x")
    kept.put({}, b"", 1)
    assert kept.get(1) is None


def test_datasets_of_recordings_are_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = dataset_of(str(SAMPLE), IngestOptions()).path
    assert dataset_of(str(SAMPLE), IngestOptions()).path == first
    monkeypatch.setattr("tracetool.cache.program", lambda: "another")
    assert dataset_of(str(SAMPLE), IngestOptions()).path != first
