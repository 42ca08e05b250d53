"""What the wheel has compiled, and that an installation without a C compiler works."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from replay.compiled import MODULES
from tests.shared import ROOT, SAMPLES


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The build backend, with the environment of a user who asks for nothing."""
    pytest.importorskip("setuptools")
    monkeypatch.delenv("TRACETOOL_COMPILE", raising=False)
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("build_backend_under_test", ROOT / "build_backend.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_compiled_module_exists() -> None:
    assert len(set(MODULES)) == len(MODULES) > 10
    assert [m for m in MODULES if not (ROOT / m).is_file()] == []


def test_without_a_compiler_nothing_is_compiled_and_nothing_needed(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert "no working C compiler" in backend.why_not()
    assert not [need for need in backend.get_requires_for_build_wheel() if "mypy" in need]
    monkeypatch.delenv("CC")
    monkeypatch.setenv("TRACETOOL_COMPILE", "0")
    assert backend.why_not() == "TRACETOOL_COMPILE=0"


def test_metadata_and_editable_installations_compile_nothing(backend: ModuleType) -> None:
    assert backend.extensions() == []
    assert not [need for need in backend.get_requires_for_build_editable() if "mypy" in need]


@pytest.mark.parametrize("fault", [SystemExit(1), RuntimeError("cc1: out of memory")])
def test_when_compiling_fails_the_wheel_is_interpreted(
    backend: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: BaseException
) -> None:
    folders: list[Path | None] = []

    def build(*_: Any) -> str:
        folders.append(backend._folder)
        if backend._folder is not None:
            raise fault
        return "plain.whl"

    monkeypatch.setattr(backend, "why_not", lambda: None)
    monkeypatch.setattr(backend.build_meta, "build_wheel", build)
    assert backend.build_wheel("somewhere") == "plain.whl"
    assert folders[0] is not None and not (ROOT / folders[0]).exists() and folders[1:] == [None]
    assert "will run interpreted: compiling failed" in capsys.readouterr().err
    monkeypatch.setenv("TRACETOOL_COMPILE", "1")
    with pytest.raises(type(fault)):
        backend.build_wheel("somewhere")


def run(folder: Path, *arguments: str, status: Sequence[int] = (0,)) -> str:
    """`tracetool` as it is in `folder`."""
    done = subprocess.run(
        [sys.executable, "-m", "tracetool", *arguments],
        cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode in status, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_compiled_wheel_says_the_same(tmp_path: Path, backend: ModuleType) -> None:
    if backend.why_not():
        pytest.skip(f"{backend.why_not()}")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        env={**os.environ, "TRACETOOL_COMPILE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "No matching distribution" in done.stdout + done.stderr:
        pytest.skip("mypyc cannot be fetched here")
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    compiled = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(compiled)
    assert "machines: compiled" in run(compiled, "--version")
    assert "machines: interpreted" in run(ROOT, "--version")
    count = len(list((SAMPLES / "scenarios").glob("*.json")))
    assert count > 40
    for path in [SAMPLES / "xen-2l-dom0-idle.xentrace", *sorted((SAMPLES / "scenarios").glob("*.json"))[::8]]:
        command = ("replay", str(path), "--policy", "current", "--policy", "proposed", "--json")
        ours, theirs = (json.loads(run(folder, *command, status=(0, 1))) for folder in (ROOT, compiled))
        assert ours == theirs
