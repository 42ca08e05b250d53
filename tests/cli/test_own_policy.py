"""docs/policy.md, run exactly as it stands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.small import sample_dataset
from tests.shared import ROOT
from tracetool.cli import run

PAGE = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = re.findall(r"```sh\n(.*?)```", PAGE, re.S)


def test_the_page_has_one_policy_in_under_40_lines() -> None:
    assert len(PYTHON) == 1
    assert len(PYTHON[0].splitlines()) < 40


@pytest.mark.parametrize("command", COMMANDS)
def test_the_page_runs(command: str, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(PYTHON[0])
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    arguments = command.split()
    assert arguments[0] == "tracetool"
    done = subprocess.run(
        [sys.executable, "-m", "tracetool", *arguments[1:], "--json"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    if arguments[1] == "explain":
        assert json.loads(done.stdout)["first"]["code"] == "hpet-early-wakeup"
        return
    runs = json.loads(done.stdout)["runs"]
    mine = next(r for r in runs if r["policy"] == "NextInLine")
    assert mine["system"] == "hpet"
    assert mine["metrics"]["hpet_irqs"] > 0


def test_a_broken_policy_is_the_users_error(tmp_path: Path) -> None:
    scenario = ROOT / "samples" / "scenarios" / "s1-shorten.json"
    (tmp_path / "bad.py").write_text("class P:\n    system = 'hpet'\n    def __init__(self): raise OSError('oops')\n")
    for policy in ("./bad.py:P", "./bad.py:Q", "./nowhere.py:P"):
        done = subprocess.run(
            [sys.executable, "-m", "tracetool", "replay", str(scenario), "--policy", policy],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1


def test_a_finding_of_an_own_policy_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(PYTHON[0])
    sample_dataset(tmp_path / "d")
    monkeypatch.chdir(tmp_path)
    own = ["--policy", "./mine.py:NextInLine"]
    assert run(["explain", "d", "--json", *own]) == 0
    listed = json.loads(capfd.readouterr().out)["findings"]
    assert listed and all(f["finding"].startswith("hpet:NextInLine:") for f in listed)
    assert run(["explain", "d", listed[0]["finding"], "--json", *own]) == 0
    told = json.loads(capfd.readouterr().out)
    assert (told["finding"], told["first"]["t_ns"]) == (listed[0]["finding"], listed[0]["t_ns"])
    assert told["mode"] == "what-if" and {o["policy"] for o in told["other_policies"]} >= {"current", "proposed"}
    assert run(["explain", "d", listed[0]["finding"]]) == 2
    assert "--policy ./FILE.py:NextInLine" in capfd.readouterr().err
