"""`tracetool shrink`: the case shows the same finding, nothing can be left out, its test fails until it is fixed."""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replay.declare import UsageError
from replay.scenario import load_scenario, mismatches, parse_scenario, run_scenario
from tests.cli.small import ESCAPES, sample_dataset
from tests.cli.test_commands import tracetool
from tests.shared import ROOT
from tracetool.query import findings_frame
from tracetool.replaying import Settings, choose, replay_dataset
from tracetool.shrink import Case, ddmin, shrink_finding, write_case
from tracetool.store import Dataset
from tracetool.story import find


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return sample_dataset(tmp_path_factory.mktemp("shrink") / "d")


def shrunk(dataset: Dataset, name: str, **options: Any) -> Case:
    return shrink_finding(dataset, find(dataset, name), "case", {}, **options)


def shows(scenario: dict[str, Any], case: Case) -> bool:
    """Whether a scenario shows the finding of a case, by rule, severity, object and moment."""
    policy = next(iter(case.scenario["policies"]))
    run = run_scenario(parse_scenario(scenario), policy)
    place = {k: v for k, v in case.signature.items() if k != "code"}
    return any(f.code.name == case.signature["code"] and all(getattr(f, k) == v for k, v in place.items())
               for f in run.findings)  # fmt: skip


# -- delta debugging -----------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.sets(st.integers(0, 60)), st.sets(st.integers(0, 60)))
def test_ddmin_finds_exactly_what_is_needed(items: set[int], needed: set[int]) -> None:
    needed &= items
    kept, done = ddmin(sorted(items), lambda part: needed <= set(part), lambda _: True)
    assert (kept, done) == (sorted(needed), True)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 24), st.randoms(use_true_random=False))
def test_ddmin_leaves_nothing_that_could_go(count: int, random: Any) -> None:
    verdicts: dict[tuple[int, ...], bool] = {tuple(range(count)): True}

    def holds(part: Sequence[int]) -> bool:
        return verdicts.setdefault(tuple(part), random.random() < 0.3)

    kept, done = ddmin(list(range(count)), holds, lambda _: True)
    assert done
    assert holds(kept)
    for item in kept if len(kept) > 1 else []:
        assert not holds([x for x in kept if x != item])


def test_ddmin_stops_when_told_and_keeps_what_holds() -> None:
    left = iter([True] * 3)
    kept, done = ddmin(list(range(100)), lambda part: {3, 97} <= set(part), lambda _: next(left, False))
    assert not done
    assert {3, 97} <= set(kept)


# -- findings of a real recording ----------------------------------------------------------------------------------


def test_every_kind_of_finding_shrinks_to_a_case_that_shows_it(dataset: Dataset) -> None:
    runs = replay_dataset(dataset, Settings(policies=(choose("current"), choose("proposed"))))
    names = findings_frame(runs).group_by("policy", "code", maintain_order=True).first()["id"].to_list()
    assert len(names) >= 6
    for name in names:
        case = shrunk(dataset, name)
        assert case.minimal
        assert case.kept <= 12, name
        assert shows(dict(case.scenario), case), name


def test_no_event_of_a_case_can_be_left_out(dataset: Dataset) -> None:
    case = shrunk(dataset, "hpet-wrong-cpu")
    chosen = find(dataset, "hpet-wrong-cpu")
    evidence = {e["seq"] for e in chosen.first["evidence"]}
    events = case.scenario["events"]
    assert evidence <= {e["seq"] for e in events}
    for index, event in enumerate(events):
        if event["seq"] not in evidence:
            fewer = {**case.scenario, "events": events[:index] + events[index + 1 :]}
            assert not shows(fewer, case), event


def test_events_lead_back_to_the_recording(dataset: Dataset) -> None:
    stored = {r["seq"]: r for r in dataset.events().collect().to_dicts()}
    for event in shrunk(dataset, "hpet-wrong-cpu").scenario["events"]:
        row = stored[event["seq"]]
        assert (event["t"], event["kind"], event.get("cpu")) == (row["t_ns"], row["kind"], row["cpu"])
        assert event["origin"] == row["origin"]


def test_a_predicted_finding_becomes_a_closed_scenario(dataset: Dataset) -> None:
    case = shrunk(dataset, "hpet:proposed:1")
    assert case.scenario["mode"] == "closed"
    assert {e["role"] for e in case.scenario["events"]} <= {"stimulus", "context", "response", "marker"}


def test_without_time_the_case_is_big_but_true(dataset: Dataset) -> None:
    case = shrunk(dataset, "hpet-wrong-cpu", seconds=1e-9)
    assert not case.minimal
    assert "time ran out" in case.summary()
    assert shows(dict(case.scenario), case)
    assert case.kept > shrunk(dataset, "hpet-wrong-cpu").kept


# -- the command and its files -------------------------------------------------------------------------------------


def run_test(folder: Path, name: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder / name)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_test_fails_before_the_fix_and_passes_after(dataset: Dataset, tmp_path: Path) -> None:
    done = tracetool("shrink", dataset.path, "hpet-wrong-cpu", "-o", "wrong-cpu", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert (document["scenario"], document["test"]) == ("wrong-cpu.json", "test_wrong_cpu.py")
    assert document["events"] < 5 < document["of"]
    before = run_test(tmp_path, "test_wrong_cpu.py")
    assert before.returncode == 1, before.stdout
    assert "handler on cpu 3" in before.stdout
    # A hypervisor that points the channel at the CPU which then takes it: no wrong CPU any more.
    scenario = json.loads((tmp_path / "wrong-cpu.json").read_text())
    taker = next(e["cpu"] for e in scenario["events"] if e["kind"] == "hpet.handler.begin")
    for event in scenario["events"]:
        if event["kind"] == "hpet.retarget":
            event["tgt"] = taker
    (tmp_path / "wrong-cpu.json").write_text(json.dumps(scenario))
    after = run_test(tmp_path, "test_wrong_cpu.py")
    assert after.returncode == 0, after.stdout


def test_the_scenario_is_one_for_every_other_command(dataset: Dataset, tmp_path: Path) -> None:
    folder = tmp_path / "cases"
    folder.mkdir()
    done = tracetool("shrink", dataset.path, "hpet-wrong-cpu", "-o", folder / "c", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scenario = load_scenario(folder / "c.json")
    policy, expected = next(iter(scenario.policies.items()))
    assert mismatches(run_scenario(scenario, policy), expected) == []
    assert "1 of 1" in tracetool("selftest", folder, cwd=tmp_path).stdout
    replayed = json.loads(tracetool("replay", folder / "c.json", "--json", cwd=tmp_path).stdout)
    assert "hpet-wrong-cpu" in {f["code"] for f in replayed["runs"][0]["findings"]}


def test_two_shrinks_are_byte_identical(dataset: Dataset, tmp_path: Path) -> None:
    first, second = shrunk(dataset, "hpet:proposed:1"), shrunk(dataset, "hpet:proposed:1")
    assert json.dumps(first.scenario) == json.dumps(second.scenario)
    assert first.tests == second.tests


def test_files_are_not_overwritten(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text("mine")
    done = tracetool("shrink", dataset.path, "hpet-wrong-cpu", "-o", "c", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--force" in done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["c.json"]
    assert (tmp_path / "c.json").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["nonsense", "hpet:current:99999", "hpet:nonsense:1", "moon:current:1", "hpet:current:x"]
)
def test_a_finding_that_does_not_exist(dataset: Dataset, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        find(dataset, name)
    assert "\n" not in str(caught.value)


def test_seconds_must_be_a_time(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="--seconds"):
        shrunk(dataset, "hpet-wrong-cpu", seconds=0)


def test_hostile_names_stay_inside_their_literals(dataset: Dataset, tmp_path: Path) -> None:
    case = shrunk(dataset, "hpet-wrong-cpu")
    evil = f"x'\"\"\"\n'''\nimport os; os.abort()\n\\{ESCAPES}"
    origin = {"source": evil, "sha256": evil}
    hostile = dataclasses.replace(
        case, source=evil, finding=evil, scenario={**case.scenario, "origin": origin, "title": evil}
    )
    plain_files = write_case(case, tmp_path / "plain")
    evil_files = write_case(hostile, tmp_path / "evil")
    shape = [[type(n) for n in ast.walk(ast.parse(f[1].read_text()))] for f in (plain_files, evil_files)]
    assert shape[0] == shape[1]
    assert not set(evil_files[1].read_text()) & set(ESCAPES) - set(map(chr, range(32, 127)))
