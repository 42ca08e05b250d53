"""Mutation score of the machines: `python bench/mutate.py --sample N --seconds S [--system NAME]`.

A mutant is one small change of one machine: a comparison negated, a guard negated, a statement or call dropped, a
constant changed. Each runs the conformance scenarios, the seeded bugs and the rule tests of its system in a process of
its own with a time limit; the files on disk are not touched. A mutant that no test notices *survived*; one whose
compiled code equals the original's is *equivalent* and does not count. The sample is the same for the same arguments.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

__all__ = ["Mutant", "mutants_of", "run_sample"]

ROOT = Path(__file__).resolve().parent.parent
#: Folder of each system; what lies in hardware/ counts for the system whose tests exercise it.
FOLDERS = {
    "hpet": "hpet_broadcast",
    "callback": "hvm_callback",
    "vgic": "vgic",
    "irqflow": "irq_flow",
    "evtchn": "event_channel",
    "apic": "apic",
    "gic": "gic",
}
HARDWARE = {
    "evtchn_fifo": "evtchn",
    "evtchn_two_level": "evtchn",
    "gic_cpu_interface": "gic",
    "gic_distributor": "gic",
    "gic_list_registers": "vgic",
    "hpet_block": "apic",
    "ioapic": "apic",
    "irq_desc": "irqflow",
    "lapic": "apic",
}
#: Files of a system that only declare; changing a text or a default is not a change of behaviour.
DECLARATIONS = {"codes.py", "__init__.py", "hpet_block_codes.py", "ioapic_codes.py"}
#: Operator of the mutant that changes nothing: its suite must pass, or no verdict means anything.
BASELINE = "none"
#: Comparisons and their negations.
COMPARE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: the `index`-th place of the file where `operator` can be applied."""

    system: str
    path: str
    operator: str  # compare | guard | drop | constant
    index: int
    line: int


class _Mutator(ast.NodeTransformer):
    """Walks the places in a fixed order; changes the one asked for, lists all when none is."""

    def __init__(self, operator: str = "", index: int = -1) -> None:
        self.operator = operator
        self.index = index
        self.seen: Counter[str] = Counter()
        self.places: list[tuple[str, int, int]] = []

    def here(self, operator: str, node: ast.AST) -> bool:
        """Whether this is the place to change."""
        number = self.seen[operator]
        self.seen[operator] += 1
        self.places.append((operator, number, getattr(node, "lineno", 0)))
        return operator == self.operator and number == self.index

    def visit_Compare(self, node: ast.Compare) -> Any:
        self.generic_visit(node)
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARE and self.here("compare", node):
            node.ops = [COMPARE[type(node.ops[0])]()]
        return node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        if not isinstance(node.test, ast.Compare) and self.here("guard", node):
            node.test = ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test)
        return node

    def visit_Expr(self, node: ast.Expr) -> Any:
        self.generic_visit(node)
        if isinstance(node.value, ast.Call) and self.here("drop", node):
            return ast.copy_location(ast.Pass(), node)
        return node

    def visit_Assign(self, node: ast.Assign) -> Any:
        self.generic_visit(node)
        if isinstance(node.targets[0], ast.Attribute) and self.here("drop", node):
            return ast.copy_location(ast.Pass(), node)
        return node

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        self.generic_visit(node)
        return ast.copy_location(ast.Pass(), node) if self.here("drop", node) else node

    def visit_Constant(self, node: ast.Constant) -> Any:
        if isinstance(node.value, bool):
            return ast.copy_location(ast.Constant(not node.value), node) if self.here("constant", node) else node
        if isinstance(node.value, int) and self.here("constant", node):
            return ast.copy_location(ast.Constant(node.value + 1 if node.value != 1 else 0), node)
        return node

    # Annotations, defaults of signatures and class bodies of names are no behaviour.
    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        if node.value is not None:
            node.value = self.visit(node.value)
        return node

    def visit_arguments(self, node: ast.arguments) -> Any:
        return node


def _docless(tree: ast.Module) -> ast.Module:
    """Without docstrings, so that they are no statements to drop."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.copy_location(ast.Pass(), first)]
    return tree


def _files() -> Iterator[tuple[str, Path]]:
    for system, folder in FOLDERS.items():
        for path in sorted((ROOT / "replay" / "systems" / folder).glob("*.py")):
            if path.name not in DECLARATIONS:
                yield system, path
    for path in sorted((ROOT / "replay" / "hardware").glob("*.py")):
        if path.stem in HARDWARE:
            yield HARDWARE[path.stem], path


def mutants_of(system: str, path: Path) -> list[Mutant]:
    """All mutants of a file, in the order of the file."""
    mutator = _Mutator()
    mutator.visit(_docless(ast.parse(path.read_text(encoding="utf-8"))))
    name = path.relative_to(ROOT).as_posix()
    return [Mutant(system, name, operator, index, line) for operator, index, line in mutator.places]


def mutated(mutant: Mutant) -> tuple[Any, bool]:
    """Code object of the mutated file, and whether it is the same as the original's."""
    path = ROOT / mutant.path
    text = path.read_text(encoding="utf-8")
    original = compile(_docless(ast.parse(text)), str(path), "exec")
    tree = _Mutator(mutant.operator, mutant.index).visit(_docless(ast.parse(text)))
    changed = compile(ast.fix_missing_locations(tree), str(path), "exec")
    return changed, changed == original


# -- inside the process of one mutant --------------------------------------------------------------------------------


def _install(mutant: Mutant, code: Any) -> None:
    """Have the import system run the mutated code instead of the file."""
    from importlib.machinery import SourceFileLoader

    wanted = str(ROOT / mutant.path)
    get_code = SourceFileLoader.get_code

    def replaced(self: SourceFileLoader, fullname: str) -> Any:
        return code if self.path == wanted else get_code(self, fullname)

    setattr(SourceFileLoader, "get_code", replaced)  # noqa: B010  (a plain assignment has no type)


def _notices(system: str) -> str:
    """Which part of the suite notices, "" if none does: scenarios, seeded bugs, rule tests; cheapest first."""
    from replay.scenario import load_scenario, mismatches, run_scenario
    from tracetool.seeded import BUGS
    from tracetool.seeded.check import check_bug

    for path in sorted((ROOT / "samples" / "scenarios").glob("*.json")):
        scenario = load_scenario(path)
        if scenario.system.name != system:
            continue
        for policy, expected in scenario.policies.items():
            if mismatches(run_scenario(scenario, policy), expected):
                return "scenario"
    for bug in BUGS:
        if bug.system == system and check_bug(bug)["problems"]:
            return "seeded"
    tests = {"apic": ["test_apic_rules.py", "test_ioapic_rules.py"]}.get(system, [f"test_{system}_rules.py"])
    paths = [str(ROOT / "tests" / "conformance" / name) for name in tests]
    paths = [path for path in paths if Path(path).exists()]
    if paths:
        import pytest

        options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=no", "-c", "/dev/null"]
        if pytest.main([*options, "--rootdir", str(ROOT), *paths]) != 0:
            return "rule test"
    return ""


def _child(mutant: Mutant) -> None:
    """The process of one mutant: exit code 0 survived, 1 noticed, 3 equivalent. `stdout` ends with who noticed."""
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True
    code, same = mutated(mutant)
    if same and mutant.operator != BASELINE:
        sys.exit(3)
    _install(mutant, code)
    try:
        by = _notices(mutant.system)
    except Exception as error:  # a mutant may break in any way
        by = f"error {type(error).__name__}"
    print(f"\n{by}")
    sys.exit(1 if by else 0)


# -- the run ---------------------------------------------------------------------------------------------------------


def judge(mutant: Mutant, seconds: float) -> tuple[str, str]:
    """Verdict (caught, survived, equivalent) and who noticed; a run beyond `seconds` is caught by the time limit."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(mutant))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "caught", "time limit"
    if done.returncode == 3:
        return "equivalent", ""
    if done.returncode == 0:
        return "survived", ""
    lines = done.stdout.strip().splitlines()
    return "caught", lines[-1] if lines else "crash"


def run_sample(
    count: int, *, seed: int = 1, seconds: float = 30.0, budget: float = 1e9, systems: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Judge `count` mutants chosen by `seed` (all of them when there are fewer), as far as `budget` seconds go."""
    everything = [m for system, path in _files() if not systems or system in systems for m in mutants_of(system, path)]
    chosen = random.Random(seed).sample(everything, min(count, len(everything)))
    for system, path in {m.system: m.path for m in chosen}.items():
        verdict, by = judge(Mutant(system, path, BASELINE, 0, 0), 10 * seconds)
        if verdict != "survived":
            raise SystemExit(f"{system}: the suite fails without a mutant already ({by})")
    results = []
    start = time.monotonic()
    for mutant in chosen:
        if time.monotonic() - start > budget:
            break
        verdict, by = judge(mutant, seconds)
        results.append({**asdict(mutant), "verdict": verdict, "by": by})
        if sys.stderr.isatty() or verdict == "survived":
            where = f"{mutant.path}:{mutant.line} {mutant.operator}"
            print(f"{len(results)}/{len(chosen)} {verdict} {where}", file=sys.stderr, flush=True)
    return results


def score_text(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a row for each system, and what noticed."""
    lines = ["| system | mutants | caught | survived | equivalent | score |", "|---|---|---|---|---|---|"]
    for system in [*FOLDERS, "all"]:
        of = [r for r in results if system in (r["system"], "all")]
        if of:
            verdicts = Counter(r["verdict"] for r in of)
            counted = len(of) - verdicts["equivalent"]
            score = f"{100 * verdicts['caught'] / counted:.0f} %" if counted else "-"
            lines.append(
                f"| {system} | {len(of)} | {verdicts['caught']} | {verdicts['survived']} | "
                f"{verdicts['equivalent']} | {score} |"
            )
    by = Counter(r["by"].split()[0] for r in results if r["verdict"] == "caught")
    lines += ["", "noticed by: " + ", ".join(f"{name} {n}" for name, n in by.most_common())]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, default=30, help="how many mutants (default 30)")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting new ones after this many seconds")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds for one mutant")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--system", action="append", default=[], choices=list(FOLDERS))
    parser.add_argument("--json", action="store_true", help="every mutant, one JSON document")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _child(Mutant(**json.loads(options.one)))
    results = run_sample(
        options.sample, seed=options.seed, seconds=options.limit, budget=options.seconds, systems=options.system
    )
    print(json.dumps(results, indent=1) if options.json else score_text(results))


if __name__ == "__main__":
    main()
