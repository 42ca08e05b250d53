"""Guard against slow-downs that needs no clock: executed instructions of the hot loops against a stored baseline.

    python -m bench.guard                   bytecodes against bench/baseline.json; exit code 1 when a loop got slower
    python -m bench.guard --native          machine instructions too, under valgrind (two minutes)
    python -m bench.guard --renew [--native]    store what is measured now as the baseline of this Python

A loop's number is the Python bytecodes that it executes for each unit (event, record) on a fixed sample, or, for what
runs in native code, the machine instructions that valgrind counts. Neither depends on the machine or on what else it
does. Bytecodes differ between versions of Python: every minor version has a baseline of its own. See bench/README.md.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

import pyarrow as pa

import replay.machine
from bench.machines import event_channel_mix, lapic_mix
from parsers.formats import sniff
from parsers.open import open_recording
from parsers.recording import ReadOptions
from replay.declare import Config
from replay.events import Batch
from replay.machine import Machine
from replay.sink import Sink
from replay.systems import SYSTEMS
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Settings, replay_dataset
from tracetool.store import Dataset

__all__ = [
    "BASELINE", "LOOPS", "Loop", "Verdict", "bytecodes", "compare", "dataset_of", "feeding", "main",
    "measure", "read_sample", "stored",
]  # fmt: skip

ROOT: Final = Path(__file__).resolve().parent.parent
BASELINE: Final = ROOT / "bench" / "baseline.json"
SAMPLES: Final = ROOT / "samples"
#: Growth of a loop's number that is a slow-down.
TOLERANCE: Final = 0.05
#: Events of a synthetic mix.
EVENTS: Final = 1000

#: What to run, and for how many units that counts.
Prepared = tuple[Callable[[], object], int]


@dataclass(frozen=True, slots=True)
class Loop:
    """`prepare` builds the input in a scratch folder; only bytecodes of files below `folder` of the project count."""

    name: str
    unit: str
    folder: str
    prepare: Callable[[Path], Prepared]


def bytecodes(work: Callable[[], object], folder: str) -> int:
    """Bytecodes that `work` executes in files below a folder of the project."""
    place = str(ROOT / folder) + os.sep
    count = 0

    def opcode(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if event == "opcode":
            count += 1
        return opcode

    def call(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(place):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return opcode

    before = sys.gettrace()
    sys.settrace(call)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


# -- loops ---------------------------------------------------------------------------------------------------------


def feeding(system: str, policy: str, mix: Callable[[int], pa.Table], law: bool) -> Callable[[Path], Prepared]:
    """A machine over a synthetic mix: by its short cuts, or event by event."""

    def prepare(_: Path) -> Prepared:
        events = mix(EVENTS)
        declared = SYSTEMS[system]

        def work() -> None:
            machine = declared.make(declared.policies[policy](), Config(declared.parameters), Sink(closed=False), "")
            machine.observed = frozenset(events["kind"].unique().to_pylist())
            batch = Batch.of(events, machine.columns)
            if law:
                Machine.feed(machine, batch)
            else:
                machine.feed(batch)
            machine.finish(events["t_ns"][-1].as_py())

        return work, events.num_rows

    return prepare


def _replayed(sample: str, system: str, lines: int | None = None) -> Callable[[Path], Prepared]:
    """Replay of one system on a sample, or on its first lines."""

    def prepare(scratch: Path) -> Prepared:
        dataset = dataset_of(sample, scratch, lines)
        settings = Settings(systems=(system,))
        return lambda: replay_dataset(dataset, settings), int(dataset.manifest["events"])

    return prepare


def dataset_of(sample: str, scratch: Path, lines: int | None = None) -> Dataset:
    """The dataset of a sample, or of its first lines; made once for a scratch folder."""
    place = scratch / f"{sample}-{lines}"
    if not place.exists():
        recording = SAMPLES / sample
        if lines is not None:
            recording = scratch / f"{sample}-head"
            with open_recording(SAMPLES / sample) as opened:
                recording.write_bytes(b"".join(itertools.islice(opened.stream, lines)))
        ingest([str(recording)], place, IngestOptions())
    return Dataset.open(place)


def _read(sample: str) -> Callable[[Path], Prepared]:
    """Reading alone. What is left in Python is the work for each chunk: a loop over records shows at once."""

    def prepare(_: Path) -> Prepared:
        read = functools.partial(read_sample, sample)
        return read, read()

    return prepare


def read_sample(sample: str) -> int:
    """Read a sample into tables; number of records."""
    with open_recording(SAMPLES / sample) as opened:
        cls = sniff(opened.head())
        assert cls is not None
        reader = cls(opened.stream, ReadOptions(source="x"))
        return sum(table.num_rows for chunk in reader.chunks() for table in chunk.tables.values())


def _bound(sample: str) -> Callable[[Path], Prepared]:
    """Ingest: the binding from records to canonical events is what counts."""

    def prepare(scratch: Path) -> Prepared:
        options = IngestOptions(force=True)
        records = int(dataset_of(sample, scratch).manifest["span"]["records"])
        return lambda: ingest([str(SAMPLES / sample)], scratch / "again", options), records

    return prepare


XEN: Final = "xen-2l-dom0-idle.xentrace"
LINUX: Final = "linux-6.1-tracecmd-v7.dat.zst"
PROBES: Final = "ftrace-linux-6.1_10-kprobes.txt.zst"
ARM: Final = "qemu-arm64-gic.log.gz"
X86: Final = "qemu-x86-ioapic.log.gz"

LOOPS: Final = (
    Loop("machine apic, short cuts", "event", "replay", feeding("apic", "any", lapic_mix, law=False)),
    Loop("machine apic, event by event", "event", "replay", feeding("apic", "any", lapic_mix, law=True)),
    Loop("machine evtchn, short cuts", "event", "replay", feeding("evtchn", "modern", event_channel_mix, law=False)),
    Loop("machine evtchn, event by event", "event", "replay", feeding("evtchn", "modern", event_channel_mix, law=True)),
    Loop("replay hpet", "event", "replay", _replayed(XEN, "hpet")),
    Loop("replay irqflow", "event", "replay", _replayed(PROBES, "irqflow")),
    Loop("replay gic", "event", "replay", _replayed(ARM, "gic", 2500)),
    Loop("replay vgic", "event", "replay", _replayed(ARM, "vgic", 2500)),
    Loop("read xentrace", "record", "parsers", _read(XEN)),
    Loop("read trace.dat", "record", "parsers", _read(LINUX)),
    Loop("read ftrace", "record", "parsers", _read(PROBES)),
    Loop("read qemu", "record", "parsers", _read(X86)),
    Loop("bind xentrace", "record", "replay", _bound(XEN)),
    Loop("bind linux", "record", "replay", _bound(PROBES)),
    Loop("bind qemu", "record", "replay", _bound(X86)),
)


def measure(loops: tuple[Loop, ...] = LOOPS, scratch: Path | None = None) -> dict[str, float]:
    """Bytecodes for each unit by the loop's name. Each runs once before it is counted: caches are full."""
    with _folder(scratch) as folder:
        result = {}
        for loop in loops:
            work, units = loop.prepare(folder)
            work()
            result[loop.name] = round(bytecodes(work, loop.folder) / units, 3)
        return result


@contextmanager
def _folder(scratch: Path | None) -> Iterator[Path]:
    if scratch is not None:
        yield scratch
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# -- native code ---------------------------------------------------------------------------------------------------

#: Samples that a child under valgrind reads.
NATIVE: Final[Mapping[str, str]] = {
    "read xentrace": XEN,
    "read trace.dat": LINUX,
    "read ftrace": PROBES,
    "read qemu": X86,
}
#: Readings of which the difference is taken, so that start-up and what is done once do not count.
FEW, MANY = 2, 4


def native(names: Mapping[str, str] = NATIVE) -> dict[str, float]:
    """Machine instructions for each record, by cachegrind. RuntimeError without valgrind or when it fails."""
    if shutil.which("valgrind") is None:
        raise RuntimeError("valgrind is not installed")
    result = {}
    for name, sample in names.items():
        records = read_sample(sample)
        few, many = (_instructions(sample, times) for times in (FEW, MANY))
        result[name] = round((many - few) / (MANY - FEW) / records, 1)
    return result


def _instructions(sample: str, times: int) -> int:
    child = [sys.executable, "-c", _CHILD, str(SAMPLES / sample), str(times)]
    # One thread and no random hashes: the same instructions in every run.
    fixed = {"PYTHONHASHSEED": "0", "POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "ARROW_NUM_THREADS": "1"}
    done = subprocess.run(
        ["valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null", *child],
        cwd=ROOT, env={**os.environ, **fixed}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"I +refs: +([\d,]+)", done.stderr)
    if done.returncode or not found:
        raise RuntimeError(f"valgrind: {done.stderr[-1000:]}")
    return int(found[1].replace(",", ""))


_CHILD: Final = """
import sys
from bench.parse import parse
for _ in range(int(sys.argv[2])):
    parse(sys.argv[1])
"""


# -- baseline ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """One loop: what it needs now, what it needed; `state` is same, faster, slower, new or gone."""

    name: str
    now: float | None
    then: float | None
    state: str

    @property
    def bad(self) -> bool:
        """A slow-down, or a baseline that does not fit the loops."""
        return self.state in ("slower", "new", "gone")


def compare(now: Mapping[str, float], then: Mapping[str, float], tolerance: float = TOLERANCE) -> list[Verdict]:
    """Each loop of either side."""
    result = []
    for name in [*now, *(n for n in then if n not in now)]:
        a, b = now.get(name), then.get(name)
        if a is None or b is None:
            state = "new" if b is None else "gone"
        elif a > b * (1 + tolerance):
            state = "slower"
        else:
            state = "faster" if a < b * (1 - tolerance) else "same"
        result.append(Verdict(name, a, b, state))
    return result


def stored(kind: str = "bytecodes") -> dict[str, float] | None:
    """The baseline of this Python (`bytecodes`) or of native code (`native`); None when there is none."""
    document = json.loads(BASELINE.read_text())
    found: dict[str, float] | None = document[kind].get(_python())
    return found


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _store(kind: str, values: Mapping[str, float]) -> None:
    document = json.loads(BASELINE.read_text()) if BASELINE.exists() else {"bytecodes": {}, "native": {}}
    document["measured"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    document[kind][_python()] = dict(values)
    BASELINE.write_text(json.dumps(document, indent=1) + "\n")


def _judge(kind: str, now: Mapping[str, float], units: Mapping[str, str], renew: bool) -> bool:
    """Print the table; whether anything is bad."""
    then = None if renew or not BASELINE.exists() else stored(kind)
    if renew:
        _store(kind, now)
    what = "bytecodes" if kind == "bytecodes" else "instructions"
    print(f"| loop | {what} for each | baseline | |\n|---|---|---|---|")
    verdicts = compare(now, now if then is None else then)
    for v in verdicts:
        print(f"| {v.name} | {v.now} {units.get(v.name, '')} | {'' if then is None else v.then} | {v.state} |")
    if then is None and not renew:
        print(f"no baseline for Python {_python()}: --renew stores one")
    if any(v.state == "faster" for v in verdicts):
        print("faster than the baseline: --renew keeps it so")
    print()
    return any(v.bad for v in verdicts)


def main(arguments: list[str] | None = None) -> int:
    """Command line: see the module's text."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--native", action="store_true", help="machine instructions under valgrind too")
    parser.add_argument("--renew", action="store_true", help="store the numbers as baseline")
    given = parser.parse_args(arguments)
    if not str(replay.machine.__file__).endswith(".py"):
        print("the machines are compiled: there are no bytecodes to count")
        return 2
    bad = _judge("bytecodes", measure(), {loop.name: loop.unit for loop in LOOPS}, given.renew)
    if given.native:
        bad |= _judge("native", native(), dict.fromkeys(NATIVE, "record"), given.renew)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
