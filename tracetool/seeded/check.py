"""Every rule against every seeded bug: what fires on the bad recording, what on the repaired one, what on neither."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.systems import SYSTEMS
from tracetool.seeded import BUGS, Bug
from tracetool.seeded.engine import Recording
from tracetool.seeded.reached import UNIT_TESTED

__all__ = ["check_bugs", "replayed", "summary_text", "table_text"]

#: What a cell of the table may say; "" where the bug does not concern the rule.
FIRES, BOTH, GOOD_ONLY, MISSING = "fires", "both", "good", "MISSING"


def replayed(bug: Bug, recording: Recording, policy: str, *, closed: bool) -> Run:
    """Replay a seeded recording: as it is (verify), or its stimuli under a policy (what-if)."""
    system = SYSTEMS[bug.system]
    return run_machine(
        system,
        policy,
        [recording.stimuli() if closed else recording.table()],
        config=Config(system.parameters, bug.config),
        closed=closed,
        sub=bug.sub,
        t_end=recording.t_end,
    )


def _counts(run: Run) -> Counter[str]:
    return Counter(finding.code.name for finding in run.findings)


def _serious(run: Run) -> set[str]:
    return {finding.code.name for finding in run.findings if finding.severity != "info"}


def check_bug(bug: Bug) -> dict[str, Any]:
    """Both recordings in both modes. `problems` is empty when every declared rule fires on the bug, is silent on the
    repair, and the repair raises nothing above info at all."""
    bad, good = bug.record(bad=True), bug.record(bad=False)
    verify_bad = replayed(bug, bad, bug.bad, closed=False)
    verify_good = replayed(bug, good, bug.good, closed=False)
    what_if_bad = replayed(bug, bad, bug.bad, closed=True)
    what_if_good = replayed(bug, bad, bug.good, closed=True)
    modes = {
        "verify": (_counts(verify_bad), _counts(verify_good), bug.verify),
        "what-if": (_counts(what_if_bad), _counts(what_if_good), bug.what_if),
    }
    problems = []
    for mode, (on_bad, on_good, declared) in modes.items():
        problems += [f"{code} does not fire ({mode})" for code in declared if not on_bad[code]]
        problems += [f"{code} fires on the repair ({mode})" for code in declared if on_good[code]]
    for code in sorted(_serious(verify_good) | _serious(what_if_good)):
        if code not in bug.verify and code not in bug.what_if:
            problems.append(f"{code} on the repair, though nothing is wrong there")
    for code in bug.exact:
        known, found = len(bad.truth.get(code, ())), modes["verify"][0][code]
        if known != found:
            problems.append(f"{code}: the simulator knows of {known}, the replay found {found}")
    for recording, run in ((bad, verify_bad), (good, verify_good)):
        seen = Counter(event["kind"] for event in recording.events)
        for metric, kind in bug.counts:
            if run.metrics[metric] != seen[kind]:
                problems.append(f"{metric} is {run.metrics[metric]} under {run.policy}, recorded {seen[kind]} x {kind}")
    return {
        "bug": bug.name,
        "document": bug.document,
        "system": bug.system,
        "policies": {"bad": bug.bad, "good": bug.good},
        "events": {"bad": len(bad.events), "good": len(good.events)},
        "modes": {mode: {"bad": dict(b), "good": dict(g)} for mode, (b, g, _) in modes.items()},
        "declared": {"verify": list(bug.verify), "what-if": list(bug.what_if)},
        "problems": problems,
    }


def _cell(result: Mapping[str, Any], code: str) -> str:
    """One word for a rule and a bug: fires (v verify, w what-if), both (on the repair too), good (there only)."""
    modes = result["modes"]
    on_bad = [m[0] for m in ("verify", "what-if") if modes[m]["bad"].get(code)]
    on_good = any(modes[m]["good"].get(code) for m in modes)
    if on_good:
        return BOTH if on_bad else GOOD_ONLY
    if on_bad:
        return f"{FIRES} {'+'.join(on_bad)}"
    declared = {c for codes in result["declared"].values() for c in codes}
    return MISSING if code in declared else ""


def check_bugs(in_scenarios: Iterable[str] = ()) -> dict[str, Any]:
    """All bugs. `rules` has a row for each code of their systems: cells by bug, and what else reaches the rule:
    the conformance scenarios (`in_scenarios` names the codes they raised), the rule tests, or nothing."""
    results = [check_bug(bug) for bug in BUGS]
    scenarios = set(in_scenarios)
    rules = []
    for system in dict.fromkeys(bug.system for bug in BUGS):
        for code in SYSTEMS[system].codes:
            cells = {r["bug"]: _cell(r, code.name) for r in results if r["system"] == system}
            elsewhere = [
                name
                for name, reached in (("scenario", code.name in scenarios), ("unit test", code.name in UNIT_TESTED))
                if reached
            ]
            rules.append(
                {
                    "system": system,
                    "code": code.name,
                    "severity": code.severity,
                    "bugs": cells,
                    "elsewhere": elsewhere,
                    "reached": bool(any(cells.values()) or elsewhere),
                }
            )
    return {"bugs": results, "rules": rules, "problems": [f"{r['bug']}: {p}" for r in results for p in r["problems"]]}


def table_text(checked: Mapping[str, Any]) -> str:
    """The table for people: a row for each rule, a column for each bug, and what else reaches the rule."""
    names = [r["bug"] for r in checked["bugs"]]
    head = ["rule", "severity", *names, "also reached by"]
    lines = [head]
    for rule in checked["rules"]:
        cells = [rule["bugs"].get(name) or ("-" if name in rule["bugs"] else "") for name in names]
        lines.append([rule["code"], rule["severity"], *cells, ", ".join(rule["elsewhere"]) or "nothing"])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    legend = (
        "fires: on the bug and silent on its repair (v: verify, w: what-if)   both: on the repair too   "
        "good: on the repair only   -: this bug does not show it"
    )
    return "\n".join([*text, legend])


def summary_text(checked: Mapping[str, Any]) -> str:
    """The bugs, the table, the problems, and which rules nothing reaches."""
    lines = ["", "Seeded bugs, each simulated with and without its repair on the same stimuli:"]
    for bug, result in zip(BUGS, checked["bugs"], strict=True):
        lines.append(f"  {bug.name:<9} {bug.document}")
        lines.append(f"  {'':<9} bug: {bug.fault} ({bug.bad}, {result['events']['bad']} events)")
        lines.append(f"  {'':<9} repair: {bug.repair} ({bug.good}, {result['events']['good']} events)")
    lines += ["", table_text(checked), ""]
    lines += [f"FAIL {problem}" for problem in checked["problems"]]
    declared = sum(len(set(bug.verify) | set(bug.what_if)) for bug in BUGS)
    fine = "as declared" if not checked["problems"] else f"{len(checked['problems'])} problems"
    lines.append(f"{declared} rules declared for {len(BUGS)} seeded bugs: {fine}")
    unreached = [rule["code"] for rule in checked["rules"] if not rule["reached"]]
    if unreached:
        lines.append(f"reached by no bug, scenario or rule test: {', '.join(unreached)}")
    return "\n".join(lines)
