"""Each finding says what was expected or what was observed: a code alone convinces nobody."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SYSTEMS = Path(__file__).resolve().parents[2] / "replay" / "systems"
MODULES = sorted(str(path.relative_to(SYSTEMS)) for path in SYSTEMS.rglob("*.py"))


def mute(source: str) -> list[int]:
    """Lines of calls of a `report` with keywords that names neither `expected` nor `observed`."""
    lines = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "report":
            names = {keyword.arg for keyword in node.keywords}
            if not names & {"expected", "observed", None}:
                lines.append(node.lineno)
    return lines


@pytest.mark.parametrize("module", MODULES)
def test_each_report_says_what_was_expected_or_observed(module: str) -> None:
    assert mute((SYSTEMS / module).read_text(encoding="utf-8")) == []


def test_the_check_sees_a_mute_report() -> None:
    assert mute("self.sink.report(CODE, t, cpu=1)\nself.report(CODE, q, observed='x')") == [1]
