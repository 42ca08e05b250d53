"""File names, task names and guest text that mean harm, through the commands: the terminal stays the user's."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.cli.small import SAMPLE
from tracetool.cli import run

#: Window title, colour, right-to-left override, isolate, a new line, CSI of eight bits, markup.
EVIL = "\x1b]0;t\x07\x1b[31m\u202eabc<script>alert(1)<\u2066\n|`*[x](y)@me #1 \x9b31m"


def ftrace() -> str:
    """A small recording whose tasks, interrupt names, marks and events are hostile."""
    name = EVIL.replace("\n", "").replace(" ", "")[:15]
    out = ["# tracer: nop", "#"]
    for i in range(60):
        head, t = f"  {name}-{100 + i % 3}   [00{i % 2}] d..1.  ", 1 + i / 1000
        out += [
            f"{head} {t:.6f}: sched_switch: prev_comm={name} prev_pid={100 + i % 3} prev_prio=120 prev_state=S "
            f"==> next_comm={name} next_pid=5 next_prio=120",
            f"{head} {t + 0.0001:.6f}: irq_handler_entry: irq=24 name={name}",
            f"{head} {t + 0.0002:.6f}: irq_handler_exit: irq=24 ret=handled",
            f"{head} {t + 0.0003:.6f}: tracing_mark_write: {EVIL.splitlines()[0]}",
            f"{head} {t + 0.0004:.6f}: e{name}: a={EVIL.splitlines()[0]}",
        ]
    return "\n".join(out) + "\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / f"a{EVIL}.xentrace").write_bytes(SAMPLE.read_bytes())
    (folder / f"b{EVIL}.txt").write_text(ftrace(), encoding="utf-8")
    return folder


def controls(text: str, allowed: str = "\n") -> set[str]:
    return {c for c in set(text) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in allowed}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a", "b"])
def test_no_command_lets_a_recording_control_the_terminal(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    recording = next(p.name for p in place.iterdir() if p.name.startswith(name) and p.is_file())
    finding = ["hpet-wrong-cpu"] if name == "a" else []
    for command in (
        ["info", recording], ["info", "--json", recording], ["replay", recording], ["explain", recording, *finding],
        ["query", recording], ["query", recording, "SELECT * FROM events"], ["query", recording, "SELECT * FROM notes"],
        ["query", recording, "--table", EVIL], ["query", recording, EVIL],
        ["explain", recording, *finding, "--show-python"], ["ingest", recording, "-o", f"{name}{EVIL}.dataset"],
    ):  # fmt: skip
        check(command, capfd)


def test_the_first_commands_are_not_controlled(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    recording = next(p.name for p in place.iterdir() if p.name.startswith("b") and p.is_file())
    check(["ingest", recording, "-o", f"first{EVIL}.dataset"], capfd)
    check(["info", f"first{EVIL}.dataset"], capfd)


@pytest.mark.slow
def test_a_fleet_is_not_controlled(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    recordings = [p.name for p in place.iterdir() if p.is_file() and p.suffix in (".txt", ".xentrace")]
    check(["fleet", *recordings, "-o", f"{EVIL}.results", "--junit", "fleet.junit.xml"], capfd)
    check(["diff", *recordings[:2]], capfd)
    ET.fromstring((place / "fleet.junit.xml").read_bytes())


def check(command: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """A command that says nothing but printable lines."""
    code = run(command)
    said = capfd.readouterr()
    assert code in (0, 1, 2, 4), (command, said.err)
    assert not controls(said.out), (command, controls(said.out))
    assert not controls(said.err) and len(said.err.splitlines()) <= 1, (command, said.err)


@pytest.mark.parametrize("name", ["a", "b"])
def test_no_report_is_controlled(
    name: str, place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    recording = next(p.name for p in place.iterdir() if p.name.startswith(name) and p.is_file())
    for suffix, allowed in ((".txt", "\n"), (".md", "\n\u2060"), (".xml", "\n"), (".json", "\n")):
        output = place / f"{name}{EVIL}-report{suffix}"
        assert run(["report", recording, "-s", "hpet", "-s", "irqflow", "-p", "current", "-o", str(output)]) == 0
        assert not controls(capfd.readouterr().out)
        document = output.read_text(encoding="utf-8")
        assert not controls(document, allowed), suffix
        if suffix == ".xml":
            ET.fromstring(document)
        if suffix == ".json":
            assert json.loads(document)["manifest"]["inputs"][0]["name"] == recording


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", f"no{EVIL}"], ["replay", str(SAMPLE), "-p", EVIL], ["replay", str(SAMPLE), "-s", EVIL],
        ["replay", str(SAMPLE), "--set", EVIL], ["replay", str(SAMPLE), "--config", EVIL], ["explain", EVIL],
        ["report", str(SAMPLE), "-o", f"x{EVIL}"], ["recipe", EVIL], ["replay", str(SAMPLE), "-p", f"./{EVIL}.py:X"],
        [f"--{EVIL}"], [EVIL], ["replay", str(SAMPLE), "--fail-on", EVIL], ["selftest", f"no{EVIL}"],
        ["ingest", str(SAMPLE), "--format", EVIL, "-o", "q"], ["replay", str(SAMPLE), "--cpu-hz", EVIL],
        ["diff", f"no{EVIL}", str(SAMPLE)], ["fleet", f"no{EVIL}", "-o", "q"],
    ],
)  # fmt: skip
def test_error_lines_are_one_line(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert run(arguments) == 2
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1 and not controls(said) and "\\x1b" in said
