"""Events per second of the machines: `consume` over canonical events, with the feeding of rows, on one core.

    python -m bench.machines [--events N] [--repeat N]     interpreted, and the same sources compiled by mypyc
    python -m bench.machines --no-compiled                 interpreted only

Beside every machine the same events go through two smaller loops: one that does nothing with a row, and
`bench.prototype`, which keeps the state and nothing else. They say what the interpreter takes on this computer.

CPU time, best of `--repeat` (5), a round of everything at a time: a busy machine only ever adds. Building takes a
minute or two and happens in a temporary folder; it needs mypy and a C compiler.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

import replay.machine
from bench import prototype
from replay.compiled import MODULES
from replay.declare import Config
from replay.events import KIND_ID, KINDS, Batch, rows
from replay.scenario import load_scenario, run_scenario
from replay.sink import Sink
from replay.systems import SYSTEMS

__all__ = ["event_channel_mix", "lapic_mix", "main", "outcomes"]

ROOT: Final = Path(__file__).resolve().parent.parent

#: Vectors delivered in xen-hvm-intx/boot.xentrace and how often: LAPIC timer, reschedule, callback, call function, PIT.
BOOT_VECTORS: Final = ((0xEC, 5769), (0xFB, 1674), (0x21, 807), (0xFD, 242), (0x30, 118), (0x22, 12))
#: A halt for every so many deliveries there (2,887 to 8,622).
DELIVERIES_FOR_A_HALT: Final = 3
ROW_GROUP: Final = 512 << 10

Row = tuple[str, int, int, int, int]  # kind, t_ns, dom, vcpu, obj


def table(events: Sequence[Row], **constant: int) -> pa.Table:
    """Canonical events with the columns that machines ask for."""
    kinds, times, doms, vcpus, objects = zip(*events, strict=True)
    n = len(events)
    names = pa.array([kind.name for kind in KINDS])
    columns: dict[str, Any] = {
        "kind": pa.DictionaryArray.from_arrays(pa.array([KIND_ID[k] for k in kinds], pa.int16()), names),
        "seq": pa.array(np.arange(n, dtype=np.uint64)),
        "t_ns": pa.array(times, pa.int64()),
        "cpu": pa.array(np.array(vcpus, np.int32)),
        "dom": pa.array(doms, pa.uint16()),
        "vcpu": pa.array(vcpus, pa.uint16()),
        "obj": pa.array([None if o < 0 else o for o in objects], pa.uint32()),
        "tgt": pa.nulls(n, pa.int32()),
        "val": pa.nulls(n, pa.int64()),
        "val2": pa.nulls(n, pa.int64()),
        "flags": pa.array(np.zeros(n, np.uint32)),
        "conf": pa.array(np.full(n, 100, np.uint8)),
    }
    return pa.table(columns)


def lapic_mix(events: int, seed: int = 1) -> pa.Table:
    """Request, delivery and EOI on four vCPUs of two guests; one in eight is interrupted by a higher class."""
    rng = random.Random(seed)
    vectors = [v for v, _ in BOOT_VECTORS]
    weights = [n for _, n in BOOT_VECTORS]
    out: list[Row] = []
    t = 0
    while len(out) < events:
        dom, vcpu = rng.choice(((1, 0), (1, 1), (2, 0), (2, 1)))
        stack = [rng.choices(vectors, weights)[0]]
        higher = [v for v in vectors if v >> 4 > stack[0] >> 4]
        if higher and rng.randrange(8) == 0:
            stack.append(rng.choice(higher))
        for vector in stack:
            t += rng.randrange(200, 20_000)
            out.append(("lapic.accept", t, dom, vcpu, vector))
            out.append(("lapic.deliver", t + 100, dom, vcpu, vector))
            t += 100
        for _ in stack:
            t += rng.randrange(500, 30_000)
            out.append(("lapic.eoi", t, dom, vcpu, -1))
        if rng.randrange(DELIVERIES_FOR_A_HALT) == 0:
            out.append(("lapic.idle", t + 50, dom, vcpu, -1))
    return table(out[:events])


def event_channel_mix(events: int, seed: int = 1) -> pa.Table:
    """Send, upcall, handled, ack, end on four vCPUs with 24 ports each. As in xen-2l/dom0-raw there are 5 ports for 4
    upcalls; every eighth port is masked and unmasked around its handler, every sixteenth send finds it pending."""
    rng = random.Random(seed)
    out: list[Row] = []
    for port in range(96):
        out.append(("evtchn.bind", 0, 0, port % 4, port + 8))
    t = 1
    while len(out) < events:
        vcpu = rng.randrange(4)
        ports = rng.sample(range(24), rng.choice((1, 1, 1, 2)))
        for n in ports:
            t += rng.randrange(200, 20_000)
            port = 8 + 4 * n + vcpu
            out.append(("evtchn.send", t, 0, vcpu, port))
            if rng.randrange(16) == 0:
                out.append(("evtchn.send", t + 10, 0, vcpu, port))
        t += 2_000
        out.append(("evtchn.upcall", t, 0, vcpu, -1))
        for n in ports:
            t += rng.randrange(1_000, 10_000)
            port = 8 + 4 * n + vcpu
            masks = port % 8 == 0
            out.append(("evtchn.handled", t, 0, vcpu, port))
            if masks:
                out.append(("evtchn.mask", t + 50, 0, vcpu, port))
            out.append(("evtchn.clear", t + 100, 0, vcpu, port))
            if masks:
                out.append(("evtchn.unmask", t + 200, 0, vcpu, port))
            t += 200
        t += 500
        out.append(("evtchn.upcall_end", t, 0, vcpu, -1))
    filled = table(out[:events])
    bound = [port % 4 if kind == "evtchn.bind" else None for kind, _, _, _, port in out[:events]]
    return filled.set_column(filled.schema.get_field_index("tgt"), "tgt", pa.array(bound, pa.int32()))


#: Name, system, policy, mix, prototype and its columns.
MIXES: Final[tuple[tuple[str, str, str, Callable[[int], pa.Table], Callable[[Any], int], tuple[str, ...]], ...]] = (
    ("LAPIC", "apic", "any", lapic_mix, prototype.lapics, prototype.LAPIC_COLUMNS),
    (
        "event channels, two-level", "evtchn", "modern", event_channel_mix, prototype.channels,
        prototype.CHANNEL_COLUMNS,
    ),
)  # fmt: skip

#: As many events of either mix, one mix after the other.
BOTH: Final = "both together"


def once(system: str, policy: str, events: pa.Table) -> tuple[float, int]:
    """CPU seconds of the machine, and the number of findings."""
    declared = SYSTEMS[system]
    sink = Sink(closed=False)
    machine = declared.make(declared.policies[policy](), Config(declared.parameters), sink, "")
    machine.observed = frozenset(events["kind"].unique().to_pylist())
    end: int = events["t_ns"][-1].as_py()
    begin = time.process_time()
    for start in range(0, events.num_rows, ROW_GROUP):
        machine.feed(Batch.of(events.slice(start, ROW_GROUP), machine.columns))
    machine.finish(end)
    return time.process_time() - begin, len(sink.findings)


def small(loop: Callable[[Any], int], columns: Sequence[str], events: pa.Table) -> float:
    """CPU seconds of one of the smaller loops."""
    begin = time.process_time()
    for start in range(0, events.num_rows, ROW_GROUP):
        loop(rows(events.slice(start, ROW_GROUP), columns))
    return time.process_time() - begin


def rate(system: str, policy: str, events: pa.Table, repeat: int) -> tuple[float, int]:
    """Events per second of CPU time, and the number of findings."""
    runs = [once(system, policy, events) for _ in range(repeat)]
    return events.num_rows / min(seconds for seconds, _ in runs), runs[0][1]


def outcomes(folder: Path) -> list[Any]:
    """Findings and metrics of every scenario under every policy, as JSON values."""
    out: list[Any] = []
    for path in sorted(folder.glob("*.json")):
        scenario = load_scenario(path)
        for policy in scenario.policies:
            run = run_scenario(scenario, policy)
            findings = [
                (f.t, f.code.name, f.severity, f.cpu, f.dom, f.vcpu, f.obj, f.tgt, f.val, f.expected, f.observed)
                for f in run.findings
            ]
            out.append([scenario.id, policy, findings, run.metrics])
    result: list[Any] = json.loads(json.dumps(out))
    return result


def scenarios() -> Path:
    """Where the conformance scenarios lie."""
    return ROOT / "samples" / "scenarios"


def measure(events: int, repeat: int) -> dict[str, Any]:
    """Events per second of all mixes (feed only, prototype, machine) with whatever modules are imported, and what the
    scenarios give."""
    result: dict[str, Any] = {"compiled": not str(replay.machine.__file__).endswith(".py")}
    gc.set_threshold(1_000_000, 20, 100)  # as `tracetool.__main__.prepare` does for every replay
    for name, system, policy, mix, loop, columns in MIXES:
        load = mix(events)
        rounds = [
            (
                small(prototype.feed_only, columns, load),
                small(loop, columns, load),
                once(system, policy, load)[0],
            )
            for _ in range(repeat)
        ]
        result[name] = [events / min(times) for times in zip(*rounds, strict=True)]
    rates = [result[name] for name, *_ in MIXES]
    result[BOTH] = [len(each) / sum(1 / rate for rate in each) for each in zip(*rates, strict=True)]
    result["scenarios"] = outcomes(scenarios())
    return result


def build(folder: Path, modules: Iterable[str] = (*MODULES, "bench/prototype.py")) -> None:
    """Copy the packages to `folder` and compile `modules` there. RuntimeError with mypyc's words when that fails."""
    for package in ("parsers", "replay", "bench"):
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    program = Path(sys.executable).with_name("mypyc")
    done = subprocess.run(
        [str(program), "--ignore-missing-imports", *modules],
        cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "MYPYC_OPT_LEVEL": "2", "MYPYC_MULTI_FILE": "1", "MYPYC_DEBUG_LEVEL": "0"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"mypyc: {done.stdout[-4000:]}{done.stderr[-2000:]}")


def measure_in(folder: Path, events: int, repeat: int) -> dict[str, Any]:
    """`measure` by another process that imports from `folder`."""
    command = [sys.executable, "-c", _CHILD, str(folder), str(scenarios()), str(events), str(repeat)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-4000:])
    result: dict[str, Any] = json.loads(done.stdout)
    return result


_CHILD: Final = """
import sys, json, pathlib
sys.path.insert(0, sys.argv[1])
from bench import machines
machines.scenarios = lambda: pathlib.Path(sys.argv[2])
print(json.dumps(machines.measure(int(sys.argv[3]), int(sys.argv[4]))))
"""


def report(interpreted: Mapping[str, Any], compiled: Mapping[str, Any] | None) -> None:
    """A Markdown table."""
    print("M events/s:\n")
    print("| mix | loop | interpreted | compiled | ratio |\n|---|---|---|---|---|")
    for name in (*(name for name, *_ in MIXES), BOTH):
        for index, loop in enumerate(("feed only", "prototype", "machine")):
            plain = interpreted[name][index] / 1e6
            if compiled is None:
                print(f"| {name} | {loop} | {plain:.2f} | | |")
            else:
                fast = compiled[name][index] / 1e6
                print(f"| {name} | {loop} | {plain:.2f} | {fast:.2f} | {fast / plain:.1f} |")
    if compiled is not None:
        same = interpreted["scenarios"] == compiled["scenarios"]
        runs = len(interpreted["scenarios"])
        print(f"\n{runs} scenario runs: findings and metrics are {'the same' if same else 'NOT THE SAME'}")


def main(arguments: list[str] | None = None) -> None:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--events", type=int, default=1_000_000)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--no-compiled", action="store_true")
    given = parser.parse_args(arguments)
    compiled = None
    if not given.no_compiled:
        with tempfile.TemporaryDirectory() as scratch:
            build(Path(scratch))
            compiled = measure_in(Path(scratch), given.events, given.repeat)
            if not compiled["compiled"]:
                raise SystemExit("the compiled modules were not imported")
    report(measure(given.events, given.repeat), compiled)


if __name__ == "__main__":
    main()
