"""What the machines say about recordings of all sorts has not changed unnoticed (see `pinned.py`)."""

from __future__ import annotations

import pytest

from tests.conformance.pinned import GROUPS, known_names, lines, pinned
from tests.conformance.pinned_grammar import SETTINGS

CASES = [(system, group) for system in SETTINGS for group in GROUPS]


@pytest.mark.parametrize(("system", "group"), CASES, ids=["-".join(case) for case in CASES])
def test_nothing_has_changed(system: str, group: str) -> None:
    """On purpose? `python -m tests.conformance.pinned SYSTEM --show RUN` before and after, then `--write`."""
    assert lines(system, group, known_names(system)) == pinned(system, group)
