"""Judges the mutants of one system in one warmed process: `bench/mutate.py` starts it and reads its verdicts.

The process loads the system, collects its scenarios, seeded bugs and rule tests once, and runs them once to see how
long each takes and which lines of the machines it reaches. Then it forks for every mutant: the child puts the changed
code into the loaded functions and runs the tests that reach the changed line, the best ones so far first, until one
fails. What ran already while modules were loaded cannot be exchanged so: such mutants, and those of classes and
modules, are judged by a fork that has loaded only libraries, and loads the changed file itself.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import pickle
import resource
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

__all__ = ["MEMORY", "Judge", "Loading", "Unit", "forked", "lines_of", "main", "pinned_tests", "rule_tests"]

ROOT = Path(__file__).resolve().parent.parent
#: Where machines live; only their lines are looked at.
WATCHED = (str(ROOT / "replay" / "systems") + os.sep, str(ROOT / "replay" / "hardware") + os.sep)
#: CPU seconds that a test of a mutant may take: so much, and so many times what it takes without one.
FLOOR, TIMES = 3.0, 20.0
#: Memory that a mutant may take beyond what the process has, in bytes.
MEMORY = 2 << 30

Place = tuple[str, str, int]  # file, qualified name, first line: what tells a code object from others


@dataclass(slots=True)
class Unit:
    """One test: what it is called, of which kind, how to run it (True: something is wrong)."""

    name: str
    kind: str  # scenario | seeded | rule test | pinned
    run: Callable[[], bool]
    seconds: float = 0.0
    lines: set[tuple[str, int]] = field(default_factory=set)
    kills: int = 0


def _place(code: CodeType) -> Place:
    return (code.co_filename, code.co_qualname, code.co_firstlineno)


def rule_tests(system: str) -> list[str]:
    """Files of the rule tests of a system: those that are named for it, or for its hardware."""
    names = {"apic": ("apic", "ioapic")}.get(system, (system,))
    return [str(p) for name in names for p in sorted((ROOT / "tests" / "conformance").glob(f"test_{name}_*.py"))]


def pinned_tests(system: str) -> list[str]:
    """Tests that say only that nothing has changed (`tests/conformance/pinned.py`)."""
    from bench.mutate import ALSO
    from tests.conformance.pinned import GROUPS, warm

    warm(system)
    name = str(ROOT / "tests" / "conformance" / "test_pinned.py")
    systems = (system, *ALSO.get(system, ()))
    return [f"{name}::test_nothing_has_changed[{s}-{group}]" for s in systems for group in GROUPS]


def _pinned_units(system: str) -> list[Unit]:
    """The same, run by run: one is enough to notice."""
    from bench.mutate import ALSO
    from tests.conformance.pinned import GROUPS, known_names, pinned, runs, said, warm

    warm(system)
    known = known_names(system)

    def unit(name: str, make: Callable[[], Any], line: str) -> Unit:
        return Unit(name, "pinned", lambda: said(name, make, known) != line)

    units = []
    for group in GROUPS:
        for (name, make), line in zip(runs(system, group), pinned(system, group), strict=True):
            units.append(unit(f"{group}, {name}", make, line))
    return units + [u for other in ALSO.get(system, ()) for u in _pinned_units(other)]


# -- what is loaded ----------------------------------------------------------------------------------------------------


class Loading:
    """Remembers which functions of the machines run while it is on: their results may be kept in modules."""

    def __init__(self) -> None:
        self.ran: set[Place] = set()

    def note(self, frame: FrameType, event: str, _argument: Any) -> None:
        """A profile function."""
        if event == "call" and frame.f_code.co_filename.startswith(WATCHED):
            self.ran.add(_place(frame.f_code))

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Listen."""
        sys.setprofile(self.note)
        try:
            yield
        finally:
            sys.setprofile(None)


def _scenarios_and_bugs(system: str) -> list[Unit]:
    from replay.scenario import Scenario, load_scenario, mismatches, run_scenario
    from tracetool.seeded import BUGS, Bug
    from tracetool.seeded.check import check_bug

    def scenario_unit(scenario: Scenario, policy: str, expected: Any) -> Unit:
        name = f"{scenario.id} {policy}"
        return Unit(name, "scenario", lambda: bool(mismatches(run_scenario(scenario, policy), expected)))

    def bug_unit(bug: Bug) -> Unit:
        bug.record(bad=True)  # loads the simulator
        return Unit(bug.name, "seeded", lambda: bool(check_bug(bug)["problems"]))

    units = []
    for path in sorted((ROOT / "samples" / "scenarios").glob("*.json")):
        scenario = load_scenario(path)
        if scenario.system.name == system:
            units += [scenario_unit(scenario, policy, expected) for policy, expected in scenario.policies.items()]
    return units + [bug_unit(bug) for bug in BUGS if bug.system == system]


def _item_unit(item: Any) -> Unit:
    from _pytest.runner import runtestprotocol

    def run() -> bool:
        reports = runtestprotocol(item, log=False, nextitem=None)
        return any(report.failed for report in reports)

    return Unit(item.nodeid, "rule test", run)


def _functions() -> dict[Place, list[FunctionType]]:
    """Every loaded function of the machines, by its place."""
    found: dict[Place, list[FunctionType]] = defaultdict(list)
    for thing in gc.get_objects():
        if isinstance(thing, FunctionType) and thing.__code__.co_filename.startswith(WATCHED):
            found[_place(thing.__code__)].append(thing)
    return found


def lines_of(run: Callable[[], Any]) -> tuple[Any, set[tuple[str, int]]]:
    """What `run` returns, and which lines of the machines it reaches."""
    lines: set[tuple[str, int]] = set()
    wanted: dict[CodeType, set[int]] = {}

    def local(frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            code = frame.f_code
            lines.add((code.co_filename, frame.f_lineno))
            left = wanted[code]
            left.discard(frame.f_lineno)
            if not left:
                frame.f_trace_lines = False
        return local

    def entered(frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        if not code.co_filename.startswith(WATCHED):
            return None
        if code not in wanted:
            wanted[code] = {line for _, _, line in code.co_lines() if line is not None}
        return local if wanted[code] else None

    sys.settrace(entered)
    try:
        return run(), lines
    finally:
        sys.settrace(None)


def forked(work: Callable[[], Any], wall: float) -> Any:
    """What `work` returns in a child process, or a word that says how the child ended."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        status = 1
        try:
            signal.alarm(int(wall))
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 1)
            os.dup2(quiet, 2)
            with os.fdopen(into, "wb") as pipe:
                pickle.dump(work(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        late = os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF)
        return "time limit" if late else f"signal {os.WTERMSIG(status)}"
    return pickle.loads(data) if data else "crash"


class _Cold:
    """A process that has loaded libraries but nothing of the project; it forks for every mutant."""

    def __init__(self, system: str) -> None:
        import hypothesis
        import numpy
        import polars
        import pyarrow.compute
        import pytest

        self.loaded = (hypothesis, numpy, polars, pyarrow, pytest)
        requests, self._ask = os.pipe()
        self._answers, replies = os.pipe()
        if os.fork() == 0:
            os.close(self._ask)
            os.close(self._answers)
            try:
                with os.fdopen(requests, "rb") as stream:
                    while True:
                        fields, text = pickle.load(stream)
                        answer = forked(partial(_cold_verdict, system, fields, text), 600.0)
                        os.write(replies, (json.dumps(answer) + "\n").encode())
            finally:
                os._exit(0)
        os.close(requests)
        os.close(replies)
        self._stream = os.fdopen(self._answers, "r")

    def judge(self, mutant: Any, text: str) -> tuple[str, str]:
        """Verdict and who noticed."""
        os.write(self._ask, pickle.dumps((asdict(mutant), text)))
        answer = json.loads(self._stream.readline())
        return ("caught", answer) if answer else ("survived", "")


def _cold_verdict(system: str, fields: dict[str, Any], text: str) -> str:
    """Who notices; "" for nobody."""
    from bench.mutate import Mutant, compiled, install, notices

    signal.setitimer(signal.ITIMER_PROF, 60.0)
    mutant = Mutant(**fields)
    install(mutant, compiled(mutant, text)[1])
    try:
        return notices(system)
    except Exception as error:  # a mutant may break in any way
        return f"error {type(error).__name__}"


# -- the judge ---------------------------------------------------------------------------------------------------------


class Judge:
    """Verdicts on mutants of one system."""

    def __init__(self, units: list[Unit], at_import: set[Place], sources: dict[str, str], cold: _Cold | None) -> None:
        self.cold = cold
        self.units = units
        self.at_import = at_import
        self.sources = sources
        self.functions = _functions()
        self.reached: set[tuple[str, int]] = set()

    def baseline(self) -> list[str]:
        """Run everything without a mutant, in a child; times and lines come back. Returns the failing ones."""
        answer = forked(self._measure, 3600.0)
        if not isinstance(answer, list):
            return [f"the run without a mutant ended: {answer}"]
        failed = []
        for unit, (bad, seconds, lines) in zip(self.units, answer, strict=True):
            unit.seconds, unit.lines = seconds, lines
            self.reached |= lines
            if bad:
                failed.append(unit.name)
        return failed

    def _measure(self) -> list[tuple[bool, float, set[tuple[str, int]]]]:
        answers = []
        for unit in self.units:
            begin = time.process_time()
            bad = unit.run()
            seconds = time.process_time() - begin
            answers.append((bad, seconds, set() if bad else lines_of(unit.run)[1]))
        return answers

    def exchange(self, original: CodeType, changed: CodeType) -> list[tuple[FunctionType, CodeType]] | None:
        """Which functions get which code; None when that cannot be done in a loaded process."""
        pairs: list[tuple[FunctionType, CodeType]] = []
        return pairs if self._exchange(original, changed, pairs) else None

    def _exchange(self, original: CodeType, changed: CodeType, pairs: list[tuple[FunctionType, CodeType]]) -> bool:
        """Of a module or a class: collect the functions that differ; False when its own statements do."""
        old = [c for c in original.co_consts if isinstance(c, CodeType)]
        new = [c for c in changed.co_consts if isinstance(c, CodeType)]
        rest = [[c for c in code.co_consts if not isinstance(c, CodeType)] for code in (original, changed)]
        if original.co_code != changed.co_code or repr(rest[0]) != repr(rest[1]) or len(old) != len(new):
            return False
        for one, other in zip(old, new, strict=True):
            if one == other:
                continue
            place = _place(one)
            functions = self.functions.get(place, [])
            if place in self.at_import and functions:
                return False
            if not functions and not self._exchange(one, other, pairs):
                return False
            if any(function.__code__.co_freevars != other.co_freevars for function in functions):
                return False
            pairs += [(function, other) for function in functions]
        return bool(pairs)

    def judge(self, mutant: Any, lines: range, original: CodeType, changed: CodeType) -> tuple[str, str]:
        """Verdict and who noticed."""
        if changed == original:
            return "equivalent", "same code"
        pairs = self.exchange(original, changed)
        if pairs is None:
            assert self.cold is not None
            return self.cold.judge(mutant, self.sources[mutant.path])
        name = str(ROOT / mutant.path)
        touched = {(name, line) for line in lines}
        units = [unit for unit in self.units if unit.lines & touched]
        if not units:
            return "survived", "not reached"
        units.sort(key=lambda unit: -(unit.kills + 1) / (unit.seconds + 0.002))

        def work() -> int:
            size = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
            for function, code in pairs:
                function.__code__ = code
            for number, unit in enumerate(units):
                signal.setitimer(signal.ITIMER_PROF, FLOOR + TIMES * unit.seconds)
                try:
                    if unit.run():
                        return number
                except Exception:  # a mutant may break in any way
                    return number
            return -1

        answer = forked(work, 600.0)
        if answer == -1:
            return "survived", ""
        if isinstance(answer, int):
            units[answer].kills += 1
            return "caught", units[answer].kind
        return "caught", answer


def _serve(request: dict[str, Any], judge: Judge) -> None:
    """Judge all mutants of a request; one line of JSON for each verdict."""
    from bench.mutate import Mutant, compiled

    begin = time.monotonic()
    for number, fields in enumerate(request["mutants"]):
        if time.monotonic() - begin > request["budget"]:
            break
        mutant = Mutant(**fields)
        original, changed, lines = compiled(mutant, judge.sources[mutant.path])
        verdict, by = judge.judge(mutant, lines, original, changed)
        _say({"number": number, "verdict": verdict, "by": by})


def _say(message: dict[str, Any]) -> None:
    os.write(_OUT, (json.dumps(message) + "\n").encode())


class _Plugin:
    """Takes over where pytest would run what it collected."""

    def __init__(
        self, request: dict[str, Any], units: list[Unit], loading: Loading, sources: dict[str, str], cold: _Cold
    ) -> None:
        self.request, self.units, self.loading, self.sources, self.cold = request, units, loading, sources, cold

    def pytest_runtestloop(self, session: Any) -> bool:
        """Judge instead of testing."""
        sys.setprofile(None)
        units = self.units + [_item_unit(item) for item in session.items]
        for path, text in self.sources.items():
            if (ROOT / path).read_text(encoding="utf-8") != text:
                _say({"failed": [f"{path} was edited meanwhile"]})
                return True
        judge = Judge(units, self.loading.ran, self.sources, self.cold)
        gc.collect()
        gc.freeze()  # children share what is loaded; what is frozen is not listed by the collector, so not earlier
        failed = judge.baseline()
        _say({"failed": failed, "units": len(units), "seconds": round(sum(u.seconds for u in units), 1)})
        if not failed:
            _serve(self.request, judge)
        return True


_OUT = 1


def main() -> None:
    """Read a request (JSON) from stdin: system, mutants, digests of their files, budget. Verdicts go to stdout."""
    global _OUT
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True
    request = json.loads(sys.stdin.read())
    sources = {path: (ROOT / path).read_text(encoding="utf-8") for path in request["files"]}
    _OUT = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for path, digest in request["files"].items():
        if hashlib.sha256(sources[path].encode()).hexdigest() != digest:
            _say({"failed": [f"{path} was edited meanwhile"]})
            return
    cold = _Cold(request["system"])
    import pytest

    loading = Loading()
    with loading.on():
        units = _scenarios_and_bugs(request["system"]) + _pinned_units(request["system"])
    options = ["-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "--no-header", "--tb=no", "-c", "/dev/null"]
    paths = rule_tests(request["system"])
    plugin = _Plugin(request, units, loading, sources, cold)
    sys.setprofile(loading.note)
    pytest.main([*options, "--rootdir", str(ROOT), *paths], plugins=[plugin])


if __name__ == "__main__":
    main()
