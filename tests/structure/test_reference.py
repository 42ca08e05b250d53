"""Generated pages are those that the declarations give; every code can be found; nothing is declared twice."""

from __future__ import annotations

import re
from collections import Counter

from replay.events import KIND_ID
from replay.systems import SYSTEMS
from tests.shared import ROOT
from tracetool.reference import pages


def test_reference_pages_are_up_to_date() -> None:
    for name, text in pages().items():
        assert (ROOT / "docs" / "reference" / name).read_text(encoding="utf-8") == text, f"run `make docs` ({name})"


def test_codes_are_unique_and_complete() -> None:
    codes = [code for name in SYSTEMS for code in SYSTEMS[name].codes]
    assert [n for n, count in Counter(c.name for c in codes).items() if count > 1] == []
    for code in codes:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", code.name)
        assert code.severity in ("error", "warn", "info")
        assert code.doc
        assert code.cause
        assert code.source


def test_needs_and_thresholds_exist() -> None:
    for name in SYSTEMS:
        parameters = {p.name for p in SYSTEMS[name].parameters}
        for code in SYSTEMS[name].codes:
            for need in code.needs:
                assert set(need.split("|")) <= set(KIND_ID), code.name
            assert set(code.thresholds) <= parameters, code.name


def test_roles_name_policies() -> None:
    for name in SYSTEMS:
        system = SYSTEMS[name]
        for role in ("current", "proposed"):
            assert system.policy(role) in system.policies
        assert system.recorded in system.policies
