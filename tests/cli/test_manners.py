"""Help is quick and has an example for each command; an interrupted command leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer.main

from tests.cli.small import sample_dataset
from tests.cli.test_commands import tracetool
from tracetool import shrink
from tracetool.cli import app
from tracetool.export import perfetto
from tracetool.query import write_frame
from tracetool.story import find

COMMANDS = sorted(getattr(typer.main.get_command(app), "commands"))  # noqa: B009 - typed as a single command
#: What takes longer to import than `--help` may take in all (150 ms); the time itself is in bench/RESULTS.md.
HEAVY = {"polars", "numpy", "pyarrow", "plotly", "jinja2", "rich", "dask", "multiprocessing", "asyncio", "replay"}


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom tracetool.cli import run\ntry:\n    run(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(*{name.partition('.')[0] for name in sys.modules}, len(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *packages, count = done.stderr.split()
    assert "typer" in packages and "Usage" in done.stdout
    assert HEAVY.isdisjoint(packages), HEAVY.intersection(packages)
    assert int(count) < 250


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_an_example_that_names_it(command: str, tmp_path: Path) -> None:
    done = tracetool(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    example = " ".join(done.stdout.partition("Example")[2].split())
    assert f"tracetool {command}" in example
    assert "--json" in done.stdout or command == "recipe"


def test_the_first_lines_fit_a_terminal() -> None:
    environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tracetool", "--help"], env=environment, capture_output=True, text=True, check=True
    )
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "\x1b" not in done.stdout


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def _export(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("perfetto", reason="needs the extra: tracetool[perfetto]")
    monkeypatch.setattr(perfetto, "_gaps", interrupt)
    perfetto.export(sample_dataset(folder / "d"), [], folder / "out.pftrace")


def _query(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", interrupt)
    write_frame(pl.DataFrame({"a": [1]}), folder / "out.parquet", None)


def _shrink(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = sample_dataset(folder / "d")
    case = shrink.shrink_finding(dataset, find(dataset, "hpet-wrong-cpu"), "out", {})
    monkeypatch.setattr(Path, "rename", interrupt)
    shrink.write_case(case, folder / "out")


@pytest.mark.parametrize("work", [_export, _query, _shrink])
def test_ctrl_c_leaves_nothing(
    work: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path, monkeypatch)
    assert [p.name for p in tmp_path.iterdir() if p.name != "d"] == []
