"""Mutation score of the machines: `python bench/mutate.py [--system NAME] [--sample N --seed K] [--seconds S]`.

A mutant is one small change of one machine: a comparison negated, a guard negated, a statement or call dropped, a
constant changed. Each runs the conformance scenarios, the seeded bugs, the rule tests and the pinned runs of its system
that reach its line, in a process of its own with a time limit; the files on disk are not touched. Pinned runs say only
that something has changed, the others what is right. A mutant that no test notices *survived*. One is *equivalent* and
does not count when its compiled code equals the original's, or when `equivalent_mutants/` says why nobody can tell
it from the original; those are counted apart, and judged all the same: one that is listed and caught is an error in the
list. Without --sample every mutant is judged.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import re
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cache
from pathlib import Path
from typing import Any

__all__ = [
    "ALSO", "Mutant", "Reasons", "Text", "changed", "compiled", "described", "files_of", "install", "judge", "listed",
    "mutants_in", "mutants_of", "notices", "run_sample", "score_text",
]  # fmt: skip

ROOT = Path(__file__).resolve().parent.parent
#: Mutants that change nothing anybody can see, each with its reason.
EQUIVALENT = Path(__file__).with_name("equivalent_mutants")
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
#: Systems whose pinned runs exercise hardware of another one too.
ALSO = {"vgic": ("gic",)}
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


@dataclass(frozen=True, slots=True)
class Text:
    """What a mutant changes, as text: in which function, which statement, into what."""

    inside: str
    original: str
    mutated: str


class _Mutator(ast.NodeTransformer):
    """Walks the places in a fixed order; changes the one asked for, lists all when none is."""

    def __init__(self, operator: str = "", index: int = -1) -> None:
        self.operator = operator
        self.index = index
        self.seen: Counter[str] = Counter()
        self.places: list[tuple[str, int, int]] = []
        self.owners: list[tuple[str, ast.stmt]] = []  # of each place: in which function, which statement
        self._names: list[str] = []
        self._statements: list[ast.stmt] = []
        # Of the place that is changed:
        self.statement: ast.stmt | None = None
        self.inside = ""
        self.before = ""

    def visit(self, node: ast.AST) -> Any:
        """Keep track of where we are."""
        named = isinstance(node, ast.ClassDef | ast.FunctionDef)
        if isinstance(node, ast.stmt):
            self._statements.append(node)
            if named:
                self._names.append(node.name)  # type: ignore[attr-defined]
        result = super().visit(node)
        if isinstance(node, ast.stmt):
            self._statements.pop()
            if named:
                self._names.pop()
        return result

    def here(self, operator: str, node: ast.AST) -> bool:
        """Whether this is the place to change."""
        number = self.seen[operator]
        self.seen[operator] += 1
        self.places.append((operator, number, getattr(node, "lineno", 0)))
        self.owners.append((".".join(self._names), self._statements[-1]))
        wanted = operator == self.operator and number == self.index
        if wanted:
            self.statement = self._statements[-1]
            self.inside = ".".join(self._names)
            self.before = _head(self.statement)
        return wanted

    def after(self) -> str:
        """The statement as it is now."""
        return "pass" if self.operator == "drop" or self.statement is None else _head(self.statement)

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


def files_of() -> Iterator[tuple[str, Path]]:
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
    name = path.relative_to(ROOT).as_posix()
    mutator.visit(_docless(ast.parse(_source(name))))
    return [Mutant(system, name, operator, index, line) for operator, index, line in mutator.places]


def mutants_in(system: str, path: Path, places: set[tuple[str, str]]) -> list[Mutant]:
    """Those in certain places: (function, original statement)."""
    mutator = _Mutator()
    name = path.relative_to(ROOT).as_posix()
    mutator.visit(_docless(ast.parse(_source(name))))
    heads = {id(statement): _head(statement) for _, statement in mutator.owners}
    return [
        Mutant(system, name, operator, index, line)
        for (operator, index, line), (inside, owner) in zip(mutator.places, mutator.owners, strict=True)
        if (inside, heads[id(owner)]) in places
    ]


def _head(statement: ast.stmt) -> str:
    """Source text of a statement; of a compound one only what stands before its body."""
    if not hasattr(statement, "body"):
        return ast.unparse(statement)
    fields = {name: getattr(statement, name) for name in statement._fields}
    fields.update({name: [] for name in ("orelse", "handlers", "finalbody") if name in fields})
    bare = type(statement)(**{**fields, "body": [ast.Pass()]})
    return ast.unparse(ast.fix_missing_locations(bare)).rsplit("\n", 1)[0].strip()


def _lines(statement: ast.stmt | None) -> range:
    """Lines whose running shows that a statement (of a compound one: its head) is reached."""
    if statement is None:
        return range(0)
    body = getattr(statement, "body", None)
    if not body:
        return range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
    # The compiler leaves a loop over a constant without a line of its own.
    constant = isinstance(getattr(statement, "test", None), ast.Constant)
    return range(statement.lineno, max(body[0].lineno + constant, statement.lineno + 1))


@cache
def _source(path: str) -> str:
    """Text of a file as it was when first asked for: a run speaks of one version."""
    return (ROOT / path).read_text(encoding="utf-8")


@cache
def _original(name: str, text: str) -> Any:
    return compile(_docless(ast.parse(text)), name, "exec")


def compiled(mutant: Mutant, text: str) -> tuple[Any, Any, range]:
    """Code objects of the original and the mutated file with this text, and the lines of the changed statement."""
    return changed(mutant, text)[:3]


def changed(mutant: Mutant, text: str) -> tuple[Any, Any, range, Text]:
    """As `compiled`, and the change in words of the source."""
    name = str(ROOT / mutant.path)
    mutator = _Mutator(mutant.operator, mutant.index)
    tree = mutator.visit(_docless(ast.parse(text)))
    words = Text(mutator.inside, mutator.before, mutator.after())
    code = compile(ast.fix_missing_locations(tree), name, "exec")
    return _original(name, text), code, _lines(mutator.statement), words


def mutated(mutant: Mutant) -> tuple[Any, bool]:
    """Code object of the mutated file, and whether it is the same as the original's."""
    original, code, _ = compiled(mutant, _source(mutant.path))
    return code, code == original


@cache
def _drops(path: str) -> dict[int, Text]:
    """What each drop of a file takes away."""
    mutator = _Mutator()
    mutator.visit(_docless(ast.parse(_source(path))))
    return {
        index: Text(inside, _head(owner), "pass")
        for (operator, index, _), (inside, owner) in zip(mutator.places, mutator.owners, strict=True)
        if operator == "drop"
    }


def described(mutant: Mutant) -> Text:
    """The change in words of the source."""
    if mutant.operator == "drop" and mutant.index in _drops(mutant.path):
        return _drops(mutant.path)[mutant.index]
    mutator = _Mutator(mutant.operator, mutant.index)
    mutator.visit(_docless(ast.parse(_source(mutant.path))))
    return Text(mutator.inside, mutator.before, mutator.after())


def listed(kind: str = "mutant") -> list[dict[str, Any]]:
    """Entries of `equivalent_mutants/*.toml`: file, in, original, mutated, reason. Of kind `mutant` they are texts,
    of kind `pattern` regular expressions for the whole of each; what is left out matches everything."""
    files = sorted(EQUIVALENT.glob("*.toml"))
    return [entry for file in files for entry in tomllib.loads(file.read_text(encoding="utf-8")).get(kind, [])]


class Reasons:
    """Why mutants are equivalent: entries of one mutant, and patterns (regular expressions) of several."""

    def __init__(self) -> None:
        self.exact = {(e["file"], Text(e["in"], e["original"], e["mutated"])): e["reason"] for e in listed()}
        self.patterns = [([re.compile(e.get(w, ".*"), re.DOTALL) for w in ("file", "in", "original", "mutated")],
                          e["reason"]) for e in listed("pattern")]  # fmt: skip

    def get(self, path: str, text: Text) -> str:
        """The reason, "" if there is none."""
        if (path, text) in self.exact:
            return str(self.exact[path, text])
        words = (path, *astuple(text))
        for patterns, reason in self.patterns:
            if all(p.fullmatch(w) for p, w in zip(patterns, words, strict=True)):
                return str(reason)
        return ""


# -- inside the process of one mutant --------------------------------------------------------------------------------


def install(mutant: Mutant, code: Any) -> None:
    """Have the import system run the mutated code instead of the file."""
    from importlib.machinery import SourceFileLoader

    wanted = str(ROOT / mutant.path)
    get_code = SourceFileLoader.get_code

    def replaced(self: SourceFileLoader, fullname: str) -> Any:
        return code if self.path == wanted else get_code(self, fullname)

    setattr(SourceFileLoader, "get_code", replaced)  # noqa: B010  (a plain assignment has no type)


def notices(system: str) -> str:
    """Which part of the suite notices, "" if none does: scenarios, seeded bugs, rule tests, pinned runs."""
    from bench.mutation_judge import pinned_tests, rule_tests
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
    import pytest

    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=no", "-c", "/dev/null"]
    for by, paths in (("rule test", rule_tests(system)), ("pinned", pinned_tests(system))):
        if paths and pytest.main([*options, "--rootdir", str(ROOT), *paths]) != 0:
            return by
    return ""


def _child(mutant: Mutant) -> None:
    """The process of one mutant: exit code 0 survived, 1 noticed, 3 equivalent. `stdout` ends with who noticed."""
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True
    code, same = mutated(mutant)
    if same and mutant.operator != BASELINE:
        sys.exit(3)
    install(mutant, code)
    try:
        by = notices(mutant.system)
    except Exception as error:  # a mutant may break in any way
        by = f"error {type(error).__name__}"
    print(f"\n{by}")
    sys.exit(1 if by else 0)


# -- the run ---------------------------------------------------------------------------------------------------------


def judge(mutant: Mutant, seconds: float) -> tuple[str, str]:
    """Verdict (caught, survived, equivalent) of a fresh process, and who noticed; beyond `seconds` it is caught."""
    command = [sys.executable, __file__, "--one", json.dumps(asdict(mutant))]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "caught", "time limit"
    if done.returncode == 3:
        return "equivalent", "same code"
    if done.returncode == 0:
        return "survived", ""
    lines = done.stdout.strip().splitlines()
    return "caught", lines[-1] if lines else "crash"


def _warm(system: str, mutants: Sequence[Mutant], budget: float) -> Iterator[dict[str, Any]]:
    """Verdicts of a warmed process (`mutation_judge.py`), in the order of the mutants, as far as the budget goes."""
    paths = sorted({m.path for m in mutants})
    digests = {path: hashlib.sha256(_source(path).encode()).hexdigest() for path in paths}
    request = {"system": system, "mutants": [asdict(m) for m in mutants], "files": digests, "budget": budget}
    command = [sys.executable, "-m", "bench.mutation_judge"]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request))
        process.stdin.close()
        for line in process.stdout:
            message = json.loads(line)
            if message.get("failed"):
                raise SystemExit(f"{system}: the suite fails without a mutant already ({', '.join(message['failed'])})")
            yield message


def earlier(files: Sequence[str]) -> dict[tuple[str, ...], tuple[str, str]]:
    """Verdict and who noticed, by the text of mutants, from JSON of earlier runs and hunts, the oldest first. Where a
    text occurs twice in a function, the worse verdict counts."""
    found: dict[tuple[str, ...], tuple[str, str]] = {}
    for file in files:
        here: dict[tuple[str, ...], tuple[str, str]] = {}
        for row in json.loads(Path(file).read_text(encoding="utf-8")):
            key = tuple(row[k] for k in ("path", "inside", "original", "mutated"))
            if key not in here or row["verdict"] == "survived":
                here[key] = row["verdict"], row["by"]
        for key, verdict in here.items():
            if found.get(key, ("", ""))[0] != "caught":
                found[key] = verdict
    return found


def run_sample(
    count: int | None = None,
    *,
    seed: int = 1,
    budget: float = 1e9,
    systems: Sequence[str] = (),
    only: str = "",
    skip: str = "",
    before: Mapping[tuple[str, ...], tuple[str, str]] | None = None,
) -> list[dict[str, Any]]:
    """Judge `count` mutants chosen by `seed` (None, or more than there are: all), as far as `budget` seconds go.

    `only` and `skip` are parts of "path:function". `before` are results of earlier runs: mutants whose text was caught
    then are not judged again (tests are only ever added), others keep their verdict if time is up. Each result has the
    fields of its mutant, the verdict (caught, survived, equivalent), `by` (who noticed, or why it is equivalent) and
    the change as text.
    """
    files = [(system, path) for system, path in files_of() if not systems or system in systems]
    everything = [m for system, path in files for m in mutants_of(system, path)]
    if only or skip:
        names = {m: f"{m.path}:{described(m).inside}" for m in everything}
        everything = [m for m in everything if only in names[m] and not (skip and skip in names[m])]
    everything = random.Random(seed).sample(everything, len(everything))[:count]
    results: list[dict[str, Any]] = []
    known = Reasons()
    before = before or {}
    caught = {key: by for key, (verdict, by) in before.items() if verdict == "caught"}
    start = time.monotonic()
    for system in dict.fromkeys(m.system for m in everything):
        mutants = [m for m in everything if m.system == system]
        texts = {m: described(m) for m in mutants}
        for mutant in [m for m in mutants if (m.path, *astuple(texts[m])) in caught]:
            mutants.remove(mutant)
            by = caught[mutant.path, *astuple(texts[mutant])]
            results.append({**asdict(mutant), "verdict": "caught", "by": by, **asdict(texts[mutant])})
        left = budget - (time.monotonic() - start)
        judged: set[int] = set()
        for message in _warm(system, mutants, left) if left > 0 else ():
            if "units" in message:
                print(f"{system}: {message['units']} tests, {message['seconds']} s", file=sys.stderr, flush=True)
                continue
            judged.add(message["number"])
            mutant, verdict, by = mutants[message["number"]], message["verdict"], message["by"]
            text = texts[mutant]
            reason = known.get(mutant.path, text)
            if reason and verdict == "survived":
                verdict, by = "equivalent", f"listed: {reason}"
            if reason and verdict == "caught":
                by = f"{by} (but listed as equivalent)"
            results.append({**asdict(mutant), "verdict": verdict, "by": by, **asdict(text)})
            if verdict == "survived":
                where = f"{mutant.path}:{mutant.line} {mutant.operator}"
                print(f"{len(results)}/{len(mutants)} survived {where}", file=sys.stderr, flush=True)
        for mutant in [m for number, m in enumerate(mutants) if number not in judged and before]:
            text = texts[mutant]
            verdict, by = before.get((mutant.path, *astuple(text)), ("survived", "not judged"))
            if reason := known.get(mutant.path, text):
                verdict, by = "equivalent", f"listed: {reason}"
            results.append({**asdict(mutant), "verdict": verdict, "by": by, **asdict(text)})
    return results


def score_text(results: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a row for each system, and what noticed."""
    lines = [
        "| system | mutants | same code | caught | equivalent with reason | survived | score |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in [*FOLDERS, "all"]:
        of = [r for r in results if system in (r["system"], "all")]
        if of:
            verdicts = Counter(r["verdict"] for r in of)
            reasoned = sum(r["verdict"] == "equivalent" and r["by"].startswith("listed") for r in of)
            counted = len(of) - verdicts["equivalent"]
            score = f"{100 * verdicts['caught'] / counted:.1f} %" if counted else "-"
            lines.append(
                f"| {system} | {len(of)} | {verdicts['equivalent'] - reasoned} | {verdicts['caught']} | {reasoned} | "
                f"{verdicts['survived']} | {score} |"
            )
    by = Counter(r["by"] if r["by"] in ("rule test", "time limit") else r["by"].split()[0]
                 for r in results if r["verdict"] == "caught")  # fmt: skip
    lines += ["", "noticed by: " + ", ".join(f"{name} {n}" for name, n in by.most_common())]
    why = Counter(re.sub(r"\d+", "N", r["by"]) or "not told" for r in results if r["verdict"] == "survived")
    why["reached by no stream"] = sum(r["by"] == "no difference in 0 streams" for r in results)
    lines += ["survived: " + ", ".join(f"{name} {n}" for name, n in why.most_common())]
    wrong = [f"{r['path']}:{r['line']}" for r in results if r["by"].endswith("(but listed as equivalent)")]
    if wrong:
        lines += ["", f"listed as equivalent, but caught: {', '.join(wrong)}"]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sample", type=int, help="how many mutants (default: all)")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop starting new ones after this many seconds")
    parser.add_argument("--again", metavar="FILE", action="append", default=[],
                        help="--json of an earlier run or hunt: what was caught there is not judged again")  # fmt: skip
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--system", action="append", default=[], choices=list(FOLDERS))
    parser.add_argument("--only", default="", help="only where path:Class.function contains this")
    parser.add_argument("--skip", default="", help="not where path:Class.function contains this")
    parser.add_argument("--json", metavar="FILE", help="write every mutant there, one JSON document")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        _child(Mutant(**json.loads(options.one)))
    results = run_sample(
        options.sample, seed=options.seed, budget=options.seconds, systems=options.system, only=options.only,
        skip=options.skip, before=earlier(options.again),
    )  # fmt: skip
    if options.json:
        Path(options.json).write_text(json.dumps(results, indent=1), encoding="utf-8")
    print(score_text(results))


if __name__ == "__main__":
    main()
