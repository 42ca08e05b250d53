"""Mutants of the machines are noticed: the suite is worth what it catches (`bench/mutate.py`)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from bench.mutate import Mutant, Text, described, judge, mutants_of, mutated, run_sample, score_text

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = ROOT / "replay" / "systems"
#: Seconds for one mutant; on a busy machine most take two.
LIMIT = 120.0


def in_function(system: str, path: Path, name: str, operator: str) -> Mutant:
    """The first mutant of a kind inside `Class.method`."""
    owner, _, method = name.partition(".")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    cls = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner)
    function = next(n for n in cls.body if isinstance(n, ast.FunctionDef) and n.name == method)
    inside = range(function.lineno, (function.end_lineno or 0) + 1)
    return next(m for m in mutants_of(system, path) if m.line in inside and m.operator == operator)


def test_mutants_are_listed_in_a_fixed_order_and_change_the_code() -> None:
    path = SYSTEMS / "irq_flow" / "policies.py"
    mutants = mutants_of("irqflow", path)
    assert mutants == mutants_of("irqflow", path)
    assert {m.operator for m in mutants} == {"compare", "guard", "drop", "constant"}
    assert not any(mutated(m)[1] for m in mutants if m.operator != "constant")


@pytest.mark.parametrize(
    ("system", "path", "function", "operator", "by"),
    [
        ("irqflow", "irq_flow/policies.py", "Edge.on_inprogress", "drop", "scenario"),
        ("evtchn", "event_channel/rules.py", "TwoLevelRules.select", "drop", "scenario"),
        ("callback", "hvm_callback/policies.py", "Current.on_vmentry", "compare", "scenario"),
        ("vgic", "vgic/policies.py", "PatchV8.on_itargets", "drop", "scenario"),
        ("hpet", "hpet_broadcast/recorded.py", "RecordedBroadcast.retarget", "guard", "seeded"),
    ],
)
def test_dropped_hooks_and_turned_guards_are_caught(
    system: str, path: str, function: str, operator: str, by: str
) -> None:
    """One for each system that the scenarios, or only the seeded recordings, must notice."""
    mutant = in_function(system, SYSTEMS / path, function, operator)
    assert judge(mutant, LIMIT) == ("caught", by)


def test_not_everything_is_called_caught() -> None:
    """A counter that is only compared with itself may start anywhere; and a change of nothing is equivalent."""
    counts = [m for m in mutants_of("hpet", SYSTEMS / "hpet_broadcast" / "state.py") if m.operator == "constant"]
    same = next(m for m in counts if described(m) == Text("Channel.__init__", "self.gen = 0", "self.gen = 1"))
    assert judge(same, LIMIT) == ("survived", "")
    nothing = Mutant("gic", "replay/systems/gic/machine.py", "compare", 10_000, 0)  # there is no such place
    assert judge(nothing, LIMIT) == ("equivalent", "same code")


def test_score() -> None:
    results = [
        {"system": "hpet", "verdict": "caught", "by": "seeded"},
        {"system": "hpet", "verdict": "survived", "by": ""},
        {"system": "hpet", "verdict": "equivalent", "by": ""},
    ]
    assert "| hpet | 3 | 1 | 1 | 0 | 1 | 50.0 % |" in score_text(results)


@pytest.mark.slow
def test_most_of_a_sample_is_caught() -> None:
    results = run_sample(30, seed=1)
    print(score_text(results))
    assert len(results) == 30
    counted = [r for r in results if r["verdict"] != "equivalent"]
    caught = sum(r["verdict"] == "caught" for r in counted)
    survivors = [f"{r['path']}:{r['line']} {r['operator']}" for r in counted if r["verdict"] == "survived"]
    assert caught >= 0.6 * len(counted), survivors
