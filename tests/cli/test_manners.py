"""Help is quick and has an example for each command; an interrupted command leaves nothing behind."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import typer.main

from replay.declare import UsageError
from tests.cli.small import SAMPLE, sample_dataset
from tests.cli.test_commands import tracetool
from tracetool import shrink, terminal
from tracetool.cli import app, run
from tracetool.export import perfetto
from tracetool.fleet import command as fleet_command
from tracetool.query import write_frame
from tracetool.replaying import Settings, replay_dataset
from tracetool.report import bundle
from tracetool.report.bundle import write_bundle
from tracetool.report.write import write_report, write_whole
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


def test_progress_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal only, on stderr, and only when it takes longer than a moment."""
    with terminal.progress_bar() as nobody:
        assert nobody is None
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(terminal.sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    for patience, shown in ((60.0, False), (0.0, True)):
        monkeypatch.setattr(terminal, "PATIENCE", patience)
        with terminal.progress_bar() as bar:
            assert bar is not None
            for done in range(5):
                bar("stories", done, 8)
                time.sleep(0.02)
        assert ("stories" in screen.getvalue()) == shown
    assert re.search(r"50 % \d.*/s .*\d:\d\d:\d\d", screen.getvalue())


def test_what_takes_long_tells_how_far_it_is(tmp_path: Path) -> None:
    dataset = sample_dataset(tmp_path / "d")
    runs = replay_dataset(dataset, Settings(systems=("hpet",)))
    runs[0]["findings"] = [f for f in runs[0]["findings"] if f["severity"] == "warn"][:2]  # quick
    told: dict[str, list[tuple[int, int]]] = {}

    def progress(what: str, done: int, total: int) -> None:
        told.setdefault(what, []).append((done, total))

    write_report(dataset, runs, tmp_path / "r.html", progress=progress)
    write_bundle(dataset, runs, tmp_path / "r.zip", progress=progress)
    shrink.shrink_finding(dataset, find(dataset, "hpet-wrong-cpu"), "out", {}, progress=progress)
    with suppress(UsageError):  # needs the extra: tracetool[perfetto]
        perfetto.export(dataset, runs, tmp_path / "out.pftrace", progress=progress)
        assert told["writing"][0] == (0, dataset.manifest["events"])
    assert {"stories", "records", "shrinking"} <= set(told)
    assert all(0 <= done <= total for steps in told.values() for done, total in steps)
    assert told["stories"][-1][0] == told["stories"][-1][1]


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


def _report(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "rename", interrupt)
    write_whole(folder / "out.html", "x")


def _bundle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = sample_dataset(folder / "d")
    monkeypatch.setattr(bundle, "_manifest", interrupt)
    write_bundle(dataset, [], folder / "out.zip")


def _fleet_junit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "replace", interrupt)
    monkeypatch.setattr(Path, "rename", interrupt)
    fleet_command._write(folder / "junit.xml", "<testsuites/>")


@pytest.mark.parametrize("work", [_bundle, _export, _fleet_junit, _query, _report, _shrink])
def test_ctrl_c_leaves_nothing(
    work: Callable[[Path, pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        work(tmp_path, monkeypatch)
    assert [p.name for p in tmp_path.iterdir() if p.name != "d"] == []


def test_ctrl_c_is_one_line_and_130(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sample_dataset(tmp_path / "d")
    target = str(tmp_path / "d")
    monkeypatch.setattr(Path, "rename", interrupt)
    commands = [
        ["report", target, "-o", str(tmp_path / "r.html")], ["report", target, "--bundle", str(tmp_path / "r.zip")],
        ["shrink", target, "hpet-wrong-cpu", "-o", str(tmp_path / "s")],
    ]  # fmt: skip
    for command in commands:
        assert run(command) == 130
        said = capfd.readouterr()
        assert said.out == "" and said.err.splitlines() == ["tracetool: interrupted; nothing half-written was left"]
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


def test_an_output_never_replaces_the_input(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recording = tmp_path / "r.txt"
    recording.write_bytes(SAMPLE.read_bytes())
    (tmp_path / "same.html").symlink_to(recording)
    (tmp_path / "same.csv").hardlink_to(recording)
    sample_dataset(tmp_path / "d")
    for command in (
        ["report", str(recording), "-o", str(recording)], ["report", str(recording), "-o", f"{tmp_path}/same.html"],
        ["query", str(recording), "SELECT 1", "-o", f"{tmp_path}/same.csv"],
        ["report", f"{tmp_path}/d", "-o", f"{tmp_path}/d/manifest.json"],
    ):  # fmt: skip
        assert run(command) == 2
        assert "choose another" in capfd.readouterr().err
    assert recording.read_bytes() == SAMPLE.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("after", [0.02, 0.2, 0.5, 1.0, 1.5, 2.0])
def test_a_real_ctrl_c(after: float, tmp_path: Path) -> None:
    """Whenever it comes: before anything is imported, while the recording is read, while the report is written."""
    command = [sys.executable, "-m", "tracetool", "report", str(SAMPLE), "-o", "out.html", "--bundle", "out.zip"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    child = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    time.sleep(after)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode in (0, 130, -signal.SIGINT)  # in time, or too early for Python to have a handler
    assert b"Traceback" not in err or child.returncode == -signal.SIGINT
    assert len(err.splitlines()) <= 1 or child.returncode == -signal.SIGINT
    left = {p.name for p in tmp_path.rglob("*") if p.name.startswith(".")}
    assert left == set()
