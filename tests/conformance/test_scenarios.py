"""Every scenario under every policy it lists: exact on (t, code), every listed field, every listed metric."""

from __future__ import annotations

import json

import pytest

from replay.scenario import load_scenario, mismatches, run_scenario
from tests.shared import SAMPLES

SCENARIOS = sorted((SAMPLES / "scenarios").glob("*.json"))
CASES = [
    pytest.param(path, policy, id=f"{path.stem}-{policy}")
    for path in SCENARIOS
    for policy in json.loads(path.read_text())["policies"]
]


def test_the_suite_is_complete() -> None:
    assert len(SCENARIOS) == 42
    assert len(CASES) == 116


@pytest.mark.parametrize(("path", "policy"), CASES)
def test_scenario(path: object, policy: str) -> None:
    scenario = load_scenario(str(path))
    run = run_scenario(scenario, policy)
    assert mismatches(run, scenario.policies[policy]) == []
