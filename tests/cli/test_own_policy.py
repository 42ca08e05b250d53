"""docs/policy.md, run exactly as it stands."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import ROOT

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
