"""The conformance suite: every scenario under every policy that it lists; and every rule against every seeded bug."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from replay.declare import UsageError
from replay.scenario import load_scenario, mismatches, run_scenario

__all__ = ["default_scenarios", "run_all", "run_selftest"]


def default_scenarios() -> Path:
    """The scenarios shipped with the tool, in a checkout or in an installed package."""
    checkout = Path(__file__).parent.parent / "samples" / "scenarios"
    for base in (checkout, Path(sys.prefix) / "share" / "tracetool" / "scenarios"):
        if base.is_dir():
            return base
    raise UsageError("the conformance scenarios were not installed; name their folder")


def run_selftest(folder: Path | None = None) -> list[dict[str, Any]]:
    """One entry for each policy run: scenario, policy, problems (empty when it passed), the codes it raised."""
    base = folder or default_scenarios()
    paths = sorted(base.glob("*.json"))
    if not paths:
        raise UsageError(f"{base}: no scenarios (*.json) there")
    results = []
    for path in paths:
        scenario = load_scenario(path)
        for policy, expected in scenario.policies.items():
            run = run_scenario(scenario, policy)
            problems = mismatches(run, expected)
            codes = sorted({finding.code.name for finding in run.findings})
            results.append({"scenario": scenario.id, "policy": policy, "problems": problems, "codes": codes})
    return results


def run_all(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The seeded bugs, after a conformance run gave `results`; the shape is that of `seeded.check.check_bugs`."""
    from tracetool.seeded.check import check_bugs

    return check_bugs(code for result in results for code in result["codes"])
