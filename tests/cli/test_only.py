"""`tracetool ingest --only`: fewer records, the manifest says so, and rules that need the others are blind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.shared import SAMPLES
from tracetool.cli import run

DAT = str(SAMPLES / "linux-6.1-tracecmd-v7.dat.zst")
XEN = str(SAMPLES / "xen-2l-dom0-idle.xentrace")


def _ingested(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, int]:
    assert run(["ingest", *arguments, "--json"]) == 0
    records: dict[str, int] = json.loads(capsys.readouterr().out)["records"]
    return records


@pytest.mark.parametrize(
    ("recording", "names"),
    [(DAT, ["sched_switch", "hrtimer_start"]), (XEN, ["TRC_HW_IRQ_HANDLED"])],
    ids=["trace.dat", "xentrace"],
)
def test_only_these_are_kept(
    recording: str, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reader that leaves records out and one that cannot give the same: the counts of a whole reading."""
    whole = _ingested(capsys, recording, "-o", str(tmp_path / "whole"))
    assert set(names) < set(whole)
    only = ["--only", ",".join([*names, "absent"])]
    some = _ingested(capsys, recording, "-o", str(tmp_path / "some"), *only)
    assert some == {name: whole[name] for name in names}
    manifest = json.loads((tmp_path / "some" / "manifest.json").read_text())
    assert manifest["left_out"] == {"kept": sorted(names), "not_met": ["absent"], "why": "--only"}
    assert sorted(p.stem for p in (tmp_path / "some" / "records").iterdir()) == sorted(names)


def test_rules_that_need_the_others_are_blind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the handler's entries alone no rule about idle or timers is called clean."""
    _ingested(capsys, DAT, "-o", str(tmp_path / "some"), "--only", "sched_switch")
    assert run(["replay", str(tmp_path / "some"), "--system", "hpet", "--json"]) == 4
    rules = json.loads(capsys.readouterr().out)["coverage"]
    assert rules and {rule["state"] for rule in rules} == {"blind"}
