"""Times of whole steps on the samples, and of the peers on the same files: pytest-benchmark's table, nothing asserted.

    python -m pytest bench/guard_speed.py --benchmark-group-by=group

Groups pair what a user would run instead: our step and the peer's command stand in one table. Times depend on the
machine; `bench.guard` has what does not. Peers that are not installed are skipped.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark", reason="needs the extra: tracetool[bench]")

from bench.guard import LINUX, PROBES, SAMPLES, XEN, dataset_of, feeding, read_sample
from bench.machines import event_channel_mix, lapic_mix
from parsers.open import open_recording
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Settings, replay_dataset

Benchmark = Callable[..., Any]


def peer(benchmark: Benchmark, *command: str) -> None:
    """A peer's command as a whole, as a user would start it."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": True}
    benchmark(lambda: subprocess.run(command, **quiet))  # type: ignore[call-overload]


@pytest.mark.benchmark(group="xentrace")
@pytest.mark.parametrize("option", ["-a", "-s"])
def test_xenalyze(option: str, benchmark: Benchmark) -> None:
    peer(benchmark, "xenalyze", "--svm-mode", option, str(SAMPLES / XEN))


@pytest.mark.benchmark(group="xentrace")
def test_start_of_the_interpreter(benchmark: Benchmark) -> None:
    """What every command of ours pays before it does anything."""
    peer(benchmark, sys.executable, "-c", "import tracetool.ingest")


@pytest.mark.benchmark(group="xentrace")
def test_read_xentrace(benchmark: Benchmark) -> None:
    benchmark(read_sample, XEN)


@pytest.mark.benchmark(group="xentrace")
def test_ingest_xentrace(benchmark: Benchmark, tmp_path: Path) -> None:
    benchmark(ingest, [str(SAMPLES / XEN)], tmp_path / "d", IngestOptions(force=True))


@pytest.mark.benchmark(group="xentrace")
def test_replay_hpet(benchmark: Benchmark, tmp_path: Path) -> None:
    benchmark(replay_dataset, dataset_of(XEN, tmp_path), Settings(systems=("hpet",)))


@pytest.mark.benchmark(group="trace.dat")
def test_trace_cmd(benchmark: Benchmark, tmp_path: Path) -> None:
    plain = tmp_path / "trace.dat"
    with open_recording(SAMPLES / LINUX) as opened:
        plain.write_bytes(opened.stream.read())
    peer(benchmark, "trace-cmd", "report", "-i", str(plain))


@pytest.mark.benchmark(group="trace.dat")
def test_read_tracedat(benchmark: Benchmark) -> None:
    benchmark(read_sample, LINUX)


@pytest.mark.benchmark(group="ftrace text")
def test_read_ftrace(benchmark: Benchmark) -> None:
    benchmark(read_sample, PROBES)


@pytest.mark.benchmark(group="machines, 1000 events")
@pytest.mark.parametrize("law", [False, True], ids=["short cuts", "event by event"])
@pytest.mark.parametrize("system", ["apic", "evtchn"])
def test_machine(system: str, law: bool, benchmark: Benchmark, tmp_path: Path) -> None:
    mix, policy = (lapic_mix, "any") if system == "apic" else (event_channel_mix, "modern")
    work, _ = feeding(system, policy, mix, law)(tmp_path)
    benchmark(work)
