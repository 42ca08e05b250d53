"""The report as JUnit XML: a suite for each run, a case for each rule. A blind rule is skipped, never passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from tracetool.replaying import not_replayed
from tracetool.report import recorded, verdict
from tracetool.report.words import clean, plural, where

__all__ = ["render"]

#: Occurrences listed in one failure.
LISTED = 50


def render(runs: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> str:
    """One XML document. Errors and warnings fail a case; remarks are its output."""
    times = recorded.times_of(manifest)
    root = ET.Element("testsuites", name="tracetool")
    for run in runs:
        cases = []
        findings: dict[str, list[Mapping[str, Any]]] = {}
        for finding in run["findings"]:
            findings.setdefault(finding["code"], []).append(finding)
        states = {c["rule"]: c for c in run["coverage"]}
        for name in dict.fromkeys([*states, *findings]):
            case = ET.Element("testcase", classname=clean(f"{run['system']}.{run['policy']}"), name=clean(name))
            mine = findings.get(name, [])
            bad = [f for f in mine if f["severity"] in ("error", "warn")]
            told = [
                f"{verdict.finding_id(run, f)} {times.at(f['t_ns'])} {where(f, run['system'])}: "
                f"expected {f['expected']}; observed {f['observed']}"
                for f in (bad or mine)[:LISTED]
            ]
            if len(bad or mine) > LISTED:
                told.append(f"and {len(bad or mine) - LISTED} more")
            text = "\n".join(map(clean, told))
            if bad:
                worst = next(iter(verdict.severities(bad)))
                message = f"{plural(len(bad), 'finding')}, first at {times.at(bad[0]['t_ns'])}"
                ET.SubElement(case, "failure", type=worst, message=clean(message)).text = text
            elif name in states and states[name]["state"] == "blind":
                ET.SubElement(case, "skipped", message=clean(f"blind: {states[name]['reason']}"))
            elif mine:
                ET.SubElement(case, "system-out").text = text
            cases.append(case)
        suite = ET.SubElement(
            root, "testsuite", name=clean(verdict.run_name(run)), tests=str(len(cases)),
            failures=str(sum(c.find("failure") is not None for c in cases)),
            skipped=str(sum(c.find("skipped") is not None for c in cases)), errors="0",
        )  # fmt: skip
        properties = ET.SubElement(suite, "properties")
        for name, value in (
            ("verdict", verdict.verdict_words(run)), ("mode", run["mode"]), ("worth", verdict.worth(run, times)),
        ):  # fmt: skip
            ET.SubElement(properties, "property", name=name, value=clean(value))
        suite.extend(cases)
    for system, rules in not_replayed(runs, manifest).items():
        suite = ET.SubElement(
            root, "testsuite", name=f"{system}, not replayed", tests=str(len(rules)), failures="0",
            skipped=str(len(rules)), errors="0",
        )  # fmt: skip
        for rule in rules:
            case = ET.SubElement(suite, "testcase", classname=system, name=rule.rule)
            why = f"blind: {rule.reason}" if rule.state == "blind" else "not replayed"
            ET.SubElement(case, "skipped", message=clean(why))
    ET.indent(root, " ")
    return ET.tostring(root, encoding="unicode", xml_declaration=False).join(('<?xml version="1.0"?>\n', "\n"))
