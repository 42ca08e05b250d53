"""Conformance scenarios (spec I.6): load one, run it under a policy, compare with what it lists."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from replay.declare import Config, System, UsageError
from replay.driver import Run, run_machine
from replay.events import KIND_ID, KINDS, NIL, NONE, events_from_json
from replay.sink import Finding
from replay.systems import SYSTEMS

__all__ = ["Scenario", "load_scenario", "mismatches", "run_scenario"]

_SECTIONS = {"S1": "hpet", "S2": "callback", "S3": "vgic", "S4": "irqflow", "S5": "evtchn"}


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario file, checked: `events` is a canonical event table, `policies` what each run must give."""

    id: str
    system: System
    sub: str
    title: str
    closed: bool
    config: Mapping[str, Any]
    init: Mapping[str, Any]
    events: pa.Table
    end: int
    policies: Mapping[str, Mapping[str, Any]]
    explain: str


def load_scenario(path: str | Path) -> Scenario:
    """Read a scenario JSON file; UsageError with one line when it is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return parse_scenario(data)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path}: not a scenario: {type(error).__name__} {error}") from None


def parse_scenario(data: Mapping[str, Any]) -> Scenario:
    """A scenario from its JSON object. Raises KeyError/ValueError/TypeError on a malformed one."""
    for event in data["events"]:
        if event["kind"] not in KIND_ID:
            raise ValueError(f"unknown event kind {event['kind']!r}")
    section = data["system"]
    if section in _SECTIONS:
        name = _SECTIONS[section]
    elif section in SYSTEMS:
        name = section
    else:
        first = KINDS[KIND_ID[data["events"][0]["kind"]]].sys
        name = "gic" if first == "gic" else "apic"
    return Scenario(
        id=data["id"],
        system=SYSTEMS[name],
        sub=data.get("sub", ""),
        title=data.get("title", ""),
        closed=data["mode"] == "closed",
        config=data.get("config", {}),
        init=data.get("init", {}),
        events=events_from_json(data["events"]),
        end=int(data["end"]),
        policies=data.get("policies", {}),
        explain=data.get("explain", ""),
    )


def run_scenario(
    scenario: Scenario,
    policy: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    policy_class: type[Any] | None = None,
) -> Run:
    """Run a scenario under a policy: its name or role, or a class of one's own called `policy`.

    `overrides` go over the scenario's own config.
    """
    system = scenario.system
    config = Config(system.parameters, {**scenario.config, **(overrides or {})})
    return run_machine(
        system,
        policy if policy_class else system.policy(policy),
        [scenario.events],
        config=config,
        closed=scenario.closed,
        sub=scenario.sub,
        init=scenario.init,
        t_end=scenario.end,
        policy_class=policy_class,
    )


def _field(finding: Finding, name: str) -> Any:
    value = getattr(finding, name)
    return None if value == NIL or (value == NONE and name != "val") else value


def mismatches(run: Run, expected: Mapping[str, Any]) -> list[str]:
    """What differs from a scenario's expectation: the (t, code) multiset, every listed field and metric."""
    problems: list[str] = []
    wanted = list(expected.get("divergences", ()))
    got = Counter((f.t, f.code.name) for f in run.findings)
    want = Counter((d["t"], d["code"]) for d in wanted)
    for key, n in sorted((want - got).items()):
        problems.append(f"missing {n} x {key[1]} at {key[0]}")
    for key, n in sorted((got - want).items()):
        problems.append(f"unexpected {n} x {key[1]} at {key[0]}")
    rest = list(run.findings)
    for divergence in wanted:
        fields = {k: v for k, v in divergence.items() if k not in ("t", "code")}
        same = [f for f in rest if f.t == divergence["t"] and f.code.name == divergence["code"]]
        match = [f for f in same if all(_field(f, k) == v for k, v in fields.items())]
        if match:
            rest.remove(match[0])
        elif same:
            seen = [{k: _field(f, k) for k in fields} for f in same]
            problems.append(f"{divergence['code']} at {divergence['t']}: wanted {fields}, got {seen}")
    for name, value in expected.get("metrics", {}).items():
        if run.metrics.get(name) != value:
            problems.append(f"metric {name}: wanted {value}, got {run.metrics.get(name)}")
    return problems
