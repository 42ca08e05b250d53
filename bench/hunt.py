"""Hunts mutants that no test notices: `python -m bench.hunt SYSTEM... [--rounds N] [--open FILE] [--write]`.

For every mutant of a system (or those that survived in FILE, a `--json` of mutate.py) the changed machine and the
original replay the same generated streams (`tests/conformance/hunted.py`) until they differ in a finding, a number or
an effect. The streams that tell most mutants apart come first, so few are needed for many; `--write` makes them pinned
runs. Each mutant is tried in a fork that has the changed code in the loaded functions, or has loaded the changed module
anew where that cannot be done.

"No difference in N streams" counts the streams that reach the changed line.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import mmap
import os
import resource
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import numpy as np
import pyarrow as pa

from bench.mutate import ALSO, FOLDERS, Mutant, Reasons, Text, changed, files_of, install, mutants_in, mutants_of
from bench.mutation_judge import MEMORY, Judge, Loading, forked, lines_of

__all__ = ["main"]

ROOT = Path(__file__).resolve().parent.parent
#: Streams of each flavour in a round; CPU seconds that one run of a mutant, and of the original, may take.
ROUND, LIMIT, SLOWEST = 20, 1.0, 0.01


@dataclass(slots=True)
class Stream:
    """A stream of a system, what the original says about it and which lines it reaches."""

    system: str
    flavour: str
    number: int
    prepared: Any
    said: str
    lines: set[tuple[str, int]]
    seconds: float
    kills: int = 0
    light: _Light | None = None


@dataclass(slots=True)
class Prey:
    """A mutant that nobody has noticed yet."""

    mutant: Mutant
    text: Text
    lines: set[tuple[str, int]]
    pairs: Any  # functions and their code; None: the module has to be loaded anew
    code: CodeType
    again: bool  # it may change what is measured
    tried: int = 0
    killer: str = ""

    def verdict(self) -> dict[str, str]:
        """In the words of mutate.py."""
        if self.killer:
            return {"verdict": "caught", "by": f"hunted {self.killer}"}
        return {"verdict": "survived", "by": f"no difference in {self.tried} streams"}


class _Light:
    """Events as columns of numbers, without a library that starts threads: what machines read, and fast."""

    NAMES = ("dom", "cpu", "vcpu", "obj", "tgt", "val", "val2", "flags", "conf", "t_err_ns")

    def __init__(self, columns: dict[str, list[int]]) -> None:
        self.columns = columns
        self.num_rows = len(columns["t_ns"])

    @classmethod
    def of_events(cls, events: Sequence[dict[str, Any]]) -> _Light:
        """As `events_from_json`."""
        from replay.events import KIND_ID, NIL

        default = {"val": NIL, "val2": NIL, "flags": 0, "conf": 100}
        columns = {n: [e.get(n, default.get(n, -1)) for e in events] for n in cls.NAMES}
        columns["t_err_ns"] = [e.get("t_err", 0) for e in events]
        columns["t_ns"] = [e["t"] for e in events]
        columns["kind"] = [KIND_ID[e["kind"]] for e in events]
        columns["seq"] = list(range(len(events)))
        return cls(columns)

    def filter(self, mask: Any) -> _Light:
        """Some rows."""
        flags = mask.to_pylist()
        return _Light({n: [v for v, f in zip(c, flags, strict=True) if f] for n, c in self.columns.items()})

    def slice(self, start: int, rows: int | None = None) -> _Light:
        """Rows in a row."""
        stop = None if rows is None else start + rows
        return _Light({n: c[start:stop] for n, c in self.columns.items()})

    def __getitem__(self, name: str) -> Any:
        return pa.array(self.columns[name])


def _batch(original: Any) -> Any:
    """`Batch.of` for light tables too."""

    def of(table: Any, columns: Sequence[str]) -> Any:
        from replay.events import Batch

        if not isinstance(table, _Light):
            return original(table, columns)
        return Batch({n: np.array(table.columns[n], np.int64) for n in columns}, table.num_rows)

    return staticmethod(of)


class _Late(BaseException):
    """The original takes too long."""


def _late(*_: Any) -> None:
    raise _Late


def _say(prepared: Any, light: _Light | None = None) -> str:
    from replay.declare import UsageError
    from tests.conformance.hunted import replay
    from tests.conformance.pinned import text

    try:
        return text(replay(prepared, _Light.of_events if light is None else lambda _: light))
    except UsageError as error:
        return f"refused: {error}"


class Hunt:
    """One system."""

    def __init__(self, system: str, texts: set[tuple[str, Text]] | None, only: Sequence[str] = ()) -> None:
        from tests.conformance.pinned import warm

        self.system = system
        self.flavours = only
        loading = Loading()
        with loading.on():
            from replay.events import Batch
            from replay.systems import SYSTEMS
            from tests.conformance.hunted import flavours

            warm(system)
            setattr(Batch, "of", _batch(Batch.of))  # noqa: B010
            # The machines are loaded; libraries that start threads must not run before the forks.
            assert flavours(system) and SYSTEMS[system].codes
        sources = {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for s, p in files_of() if s == system}
        judge = Judge([], loading.ran, sources, None)
        self.prey: list[Prey] = []
        reasons = Reasons()
        for path, source in sources.items():
            if texts is None:
                mutants = mutants_of(system, ROOT / path)
            else:
                mutants = mutants_in(system, ROOT / path, {(t.inside, t.original) for p, t in texts if p == path})
            for mutant in mutants:
                original, code, lines, text = changed(mutant, source)
                if code == original or (texts is not None and (path, text) not in texts) or reasons.get(path, text):
                    continue
                pairs = judge.exchange(original, code)
                touched = {(str(ROOT / path), line) for line in lines}
                self.prey.append(Prey(mutant, text, touched, pairs, code, path.endswith("calibration.py")))
        self.chosen: list[Stream] = []
        self.wrong: list[str] = []

    def streams(self, numbers: Sequence[int]) -> list[Stream]:
        """What the original says, in a process of its own: libraries start threads, which no fork survives."""
        answer = forked(partial(self._streams, numbers), 3600.0)
        if isinstance(answer, str):
            raise SystemExit(f"{self.system}: the original ended: {answer}")
        streams, wrong = answer
        self.wrong += wrong
        made = [Stream(*fields) for fields in streams]
        for one in made:
            one.light = _Light.of_events(one.prepared.events)
        return made

    def _streams(self, numbers: Sequence[int]) -> tuple[list[tuple[Any, ...]], list[str]]:
        from tests.conformance.hunted import FLAVOURS, flavours, prepare

        out: list[tuple[Any, ...]] = []
        wrong: list[str] = []
        systems = (self.system, *ALSO.get(self.system, ()))
        for number in numbers:
            for system, flavour in ((s, f) for s in systems for f in flavours(s) if f in (self.flavours or FLAVOURS)):
                signal.signal(signal.SIGPROF, _late)
                signal.setitimer(signal.ITIMER_PROF, LIMIT)
                try:
                    prepared, first = lines_of(partial(prepare, system, flavour, number))
                    begin = time.process_time()
                    said = _say(prepared)
                    seconds = time.process_time() - begin
                    if seconds > SLOWEST or said.startswith("refused"):
                        continue
                    again, lines = lines_of(partial(_say, prepared))
                    lines |= first
                    if again != said:
                        wrong.append(f"{flavour} {number}: not the same twice")
                        continue
                    out.append((system, flavour, number, prepared, said, lines, seconds))
                except _Late:
                    wrong.append(f"{flavour} {number}: too slow")
                except Exception as error:  # a defect of the original, or of the generator
                    wrong.append(f"{flavour} {number}: {type(error).__name__} {error}")
                finally:
                    signal.setitimer(signal.ITIMER_PROF, 0)
        return out, wrong

    def tell(self, prey: Prey, streams: list[Stream]) -> int:
        """Which of the streams tells the mutant from the original; -1 for none."""
        from tests.conformance.hunted import prepare

        shared = mmap.mmap(-1, 16)
        shared[:16] = struct.pack("qq", 0, -1)
        child = os.fork()
        if child == 0:
            try:
                signal.signal(signal.SIGPROF, signal.SIG_DFL)
                signal.alarm(600)
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
                size = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
                for number, one in enumerate(streams):
                    shared[:8] = struct.pack("q", number)
                    signal.setitimer(signal.ITIMER_PROF, LIMIT)
                    if number == 0:
                        self.change(prey)
                    try:
                        if prey.again or one.flavour == "round-trip":
                            one.prepared = prepare(one.system, one.flavour, one.number)
                            one.light = None
                        differs = _say(one.prepared, one.light) != one.said
                    except Exception:  # a mutant may break in any way
                        differs = True
                    if differs:
                        shared[8:16] = struct.pack("q", number)
                        break
            except Exception:
                shared[8:16] = shared[:8]
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        at, found = struct.unpack("qq", shared[:16])
        return int(at if os.WIFSIGNALED(status) else found)

    def change(self, prey: Prey) -> None:
        """Put the mutant's code in place of the original's."""
        if prey.pairs is not None:
            for function, code in prey.pairs:
                function.__code__ = code
            return
        for name in [n for n in sys.modules if n.startswith(("replay.systems.", "replay.hardware"))]:
            del sys.modules[name]
        install(prey.mutant, prey.code)

    def round(self, numbers: Sequence[int]) -> None:
        """Try all that is left with some more streams."""
        fresh = self.streams(numbers)
        gc.collect()
        gc.freeze()
        for prey in [p for p in self.prey if not p.killer]:
            self.chosen.sort(key=lambda s: -s.kills)
            known = [s for s in self.chosen if s not in fresh and not prey.tried]
            # What was measured belongs to the modules that measured it, and not to those loaded anew.
            some = [s for s in (*known, *sorted(fresh, key=lambda s: -s.kills))
                    if (s.lines & prey.lines if prey.pairs is not None else prey.again or s.prepared.measured is None)]
            found = self.tell(prey, some) if some else -1
            prey.tried += len(some) if found < 0 else 0
            if found >= 0:
                one = some[found]
                one.kills += 1
                prey.killer = f"{one.flavour} {one.number}"
                if one not in self.chosen:
                    self.chosen.append(one)


def _digest(system: str) -> str:
    """Of the machine's sources."""
    return hashlib.sha256(b"".join(p.read_bytes() for s, p in files_of() if s == system)).hexdigest()[:12]


def _run(system: str, options: argparse.Namespace) -> None:
    texts = None
    if options.open:
        given = json.loads(Path(options.open).read_text(encoding="utf-8"))
        texts = {(r["path"], Text(r["inside"], r["original"], r["mutated"])) for r in given
                 if r["verdict"] == "survived" and r["system"] == system}  # fmt: skip
    hunt = Hunt(system, texts, options.flavour)
    gc.collect()
    print(f"{system}: {len(hunt.prey)} mutants, sources {_digest(system)}", flush=True)
    begin = time.monotonic()
    for number in range(options.first, options.first + options.rounds):
        hunt.round(range(number * ROUND, (number + 1) * ROUND))
        left = sum(not p.killer for p in hunt.prey)
        print(f"{system}: round {number}, {left} left, {len(hunt.chosen)} streams, "
              f"{time.monotonic() - begin:.0f} s", flush=True)  # fmt: skip
        if options.json:
            rows = [{**asdict(p.mutant), **asdict(p.text), **p.verdict()} for p in hunt.prey]
            Path(options.json.format(system)).write_text(json.dumps(rows, indent=1), encoding="utf-8")
        if not left or time.monotonic() - begin > options.seconds:
            break
    for line, times in Counter(w.partition(": ")[2] for w in hunt.wrong).items():
        print(f"  left out, {times} streams: {line}; {next(w for w in hunt.wrong if w.endswith(line))}")
    if options.write:
        from tests.conformance.pinned import add_hunted

        added = 0
        for name in (system, *ALSO.get(system, ())):
            added += add_hunted(name, [f"{s.flavour} {s.number}" for s in hunt.chosen if s.system == name])
        print(f"{system}: {added} more pinned runs", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("system", nargs="+", choices=list(FOLDERS))
    parser.add_argument("--open", metavar="FILE", help="a --json of mutate.py: only what survived there")
    parser.add_argument("--flavour", action="append", default=[], help="only streams of this flavour")
    parser.add_argument("--rounds", type=int, default=10, help=f"of {ROUND} streams of each flavour")
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin no round after so many seconds")
    parser.add_argument("--json", metavar="FILE", help="verdicts, in the form of mutate.py; {} stands for the system")
    parser.add_argument("--write", action="store_true", help="make pinned runs of the streams that told mutants apart")
    options = parser.parse_args()
    for system in options.system:
        _run(system, options)


if __name__ == "__main__":
    main()
