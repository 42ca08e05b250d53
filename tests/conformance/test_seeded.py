"""Seeded bugs: every declared rule fires on its bug, at the moments that the simulator knows, and not on the repair."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tracetool.seeded
from replay.events import KIND_ID, KINDS, SCHEMA
from replay.sink import Sink
from replay.systems import SYSTEMS
from tracetool.cli import run as main
from tracetool.seeded import BUGS, Bug
from tracetool.seeded.check import check_bug, check_bugs, replayed, table_text
from tracetool.seeded.reached import UNIT_TESTED

ROOT = Path(__file__).resolve().parents[2]
each_bug = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
#: Rules that wait before they speak; `t_first` is the moment itself.
WAITS = {"flow-edge-lost"}
#: Stimuli whose moments depend on what the algorithm did: idle entries, and what the guest sets once it has looked.
RESPONSIVE = {"idle.enter", "idle.break", "isr.begin", "isr.end", "via.upcall_set"}


@each_bug
def test_every_declared_rule(bug: Bug) -> None:
    assert check_bug(bug)["problems"] == []


@each_bug
def test_at_the_moments_the_simulator_knows(bug: Bug) -> None:
    recording = bug.record(bad=True)
    run = replayed(bug, recording, bug.bad, closed=False)
    assert bug.exact
    for code in bug.exact:
        found = [f.t_first if code in WAITS else f.t for f in run.findings if f.code.name == code]
        assert Counter(found) == Counter(recording.truth[code]), code


@each_bug
def test_recordings_are_canonical_and_repeatable(bug: Bug) -> None:
    for bad in (True, False):
        recording = bug.record(bad=bad)
        assert recording == bug.record(bad=bad)
        table = recording.table()
        assert table.schema.equals(SCHEMA)
        times = table["t_ns"].to_pylist()
        assert times == sorted(times)
        assert times[-1] <= recording.t_end
        roles = set(table["role"].to_pylist())
        assert {"stimulus", "outcome"} <= roles
        assert set(recording.stimuli()["role"].to_pylist()) <= {"stimulus", "context", "marker"}


@each_bug
def test_both_algorithms_get_the_same_stimuli(bug: Bug) -> None:
    def outside(*, bad: bool) -> list[dict[str, Any]]:
        events = bug.record(bad=bad).events
        return [
            e for e in events
            if e.get("role", KINDS[KIND_ID[e["kind"]]].role) == "stimulus" and e["kind"] not in RESPONSIVE
        ]  # fmt: skip

    bad, good = outside(bad=True), outside(bad=False)
    assert bad == good
    assert bad or bug.name == "hpet"


@each_bug
def test_another_seed_shows_the_bug_too(bug: Bug) -> None:
    """The verdict does not hang on one lucky seed: the first exact code fires for others, and never on the repair."""
    from dataclasses import replace

    for seed in (bug.seed + 100, bug.seed + 101):
        other = replace(bug, seed=seed)
        recording = other.record(bad=True)
        bad = replayed(other, recording, bug.bad, closed=False)
        assert any(f.code.name in bug.exact for f in bad.findings)
        for run in (
            replayed(other, other.record(bad=False), bug.good, closed=False),
            replayed(other, recording, bug.good, closed=True),
        ):
            assert [(f.t, f.code.name) for f in run.findings if f.severity != "info"] == []


def test_simulators_know_nothing_of_the_models() -> None:
    folder = Path(tracetool.seeded.__file__).parent
    simulators = [folder / f"{bug.name}.py" for bug in BUGS] + [folder / "engine.py"]
    for path in simulators:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                assert not module.startswith("replay.") or module == "replay.events", f"{path.name} imports {module}"


def test_the_table_lists_every_rule_and_every_bug() -> None:
    checked = check_bugs()
    codes = [code.name for system in dict.fromkeys(bug.system for bug in BUGS) for code in SYSTEMS[system].codes]
    assert [rule["code"] for rule in checked["rules"]] == codes
    lines = table_text(checked).splitlines()
    assert all(bug.name in lines[0] for bug in BUGS)
    assert [line.split()[0] for line in lines[2 : 2 + len(codes)]] == codes
    cells = {rule["code"]: rule["bugs"] for rule in checked["rules"]}
    assert cells["hpet-wrong-cpu"] == {"hpet": "fires v+w", "mwait": ""}
    assert cells["vgic-lr-stale"] == {"vgic": "both"}
    assert cells["vgic-two-lists"] == {"vgic": ""}


def test_selftest_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--all", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["failed"] == [] and document["passed"] == 116
    assert document["seeded"]["problems"] == []
    elsewhere = {rule["code"]: rule["elsewhere"] for rule in document["seeded"]["rules"]}
    assert "scenario" in elsewhere["hpet-wrong-cpu"]
    assert main(["selftest", "--all"]) == 0
    assert "fires v+w" in capsys.readouterr().out


@pytest.mark.parametrize(("code", "never"), [("evtchn-stranded-pending", True), ("flow-edge-lost", False)])
def test_selftest_fails_when_a_rule_does(
    code: str, never: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rule that is silent on its bug, and one that also speaks on the repair."""
    report = Sink.report
    extra = next(c for c in SYSTEMS["irqflow"].codes if c.name == "flow-edge-lost")

    def broken(self: Sink, declared: Any, t: int, **fields: Any) -> None:
        if never and declared.name == code:
            return
        report(self, declared, t, **fields)
        if not never and declared.name == "flow-upcall-no-work":
            report(self, extra, t)

    monkeypatch.setattr(Sink, "report", broken)
    checked = check_bugs()
    expected = "does not fire" if never else "fires on the repair"
    assert any(code in p and expected in p for p in checked["problems"])
    assert main(["selftest", "--all"]) == 1
    assert f"FAIL {'evtchn' if never else 'irqflow'}: {code}" in capsys.readouterr().out


@pytest.mark.slow
def test_the_rule_tests_reach_what_they_are_said_to(tmp_path: Path) -> None:
    reached = tmp_path / "reached"
    tests = sorted(str(p) for p in (ROOT / "tests" / "conformance").glob("test_*_rules.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.conformance.reach", *tests]
    environment = {**os.environ, "REACHED": str(reached)}
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    five = {code.name for system in {bug.system for bug in BUGS} for code in SYSTEMS[system].codes}
    assert set(reached.read_text(encoding="utf-8").split()) & five == UNIT_TESTED
