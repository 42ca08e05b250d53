"""Imports run one way: tracetool -> replay -> parsers."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import ROOT

#: What each package may import of ours.
ALLOWED = {"parsers": {"parsers"}, "replay": {"replay", "parsers"}, "tracetool": {"tracetool", "replay", "parsers"}}
FILES = [p for package in ALLOWED for p in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """Top-level packages that a module imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    ours = imported(path) & {*ALLOWED, "tests"}
    assert ours <= ALLOWED[package]


def test_replay_does_not_touch_files() -> None:
    """`replay` gets tables; only scenario files, which are its own conformance suite, are opened there."""
    for path in sorted((ROOT / "replay").rglob("*.py")):
        if path.name != "scenario.py":
            assert not imported(path) & {"pathlib", "io", "tempfile"}, path


@pytest.mark.parametrize("arguments", [["--help"], ["replay", "--help"], ["--version"]])
def test_help_needs_no_heavy_import(arguments: list[str]) -> None:
    code = (
        "import sys; from tracetool.cli import run; run(sys.argv[1:]);"
        "sys.exit(','.join(m for m in ('polars', 'pyarrow', 'numpy', 'plotly') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout or "tracetool" in done.stdout
