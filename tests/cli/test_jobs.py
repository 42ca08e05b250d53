"""Replay in processes of its own: the same records, and one line when a process dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from replay.declare import UsageError
from tests.shared import SAMPLES, shared_path
from tracetool import parallel
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Choice, Settings, choose, replay_dataset
from tracetool.store import Dataset, StoreError

SAMPLE = SAMPLES / "xen-2l-dom0-idle.xentrace"
TWO = ("evtchn", "hpet")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    target = tmp_path_factory.mktemp("jobs") / "d"
    ingest([str(SAMPLE)], target, IngestOptions())
    return Dataset.open(target)


@pytest.mark.slow
def test_the_records_are_the_same_and_in_the_same_order(dataset: Dataset, tmp_path: Path) -> None:
    own = tmp_path / "mine.py"
    own.write_text(
        "from replay.systems.hpet_broadcast.policies import ProposedKeep\n"
        "class Mine(ProposedKeep):\n    system = 'hpet'\n"
    )
    policies = (choose("current"), choose(f"{own}:Mine"))
    settings = Settings(policies=policies, systems=TWO, values={"hpet": {"slop_ns": 1}})
    one, two = (replay_dataset(dataset, settings, jobs=jobs) for jobs in (1, 2))
    assert [(r["system"], r["policy"]) for r in one][1:] == [("hpet", "current"), ("hpet", "Mine")]
    assert json.dumps(one) == json.dumps(two)


@pytest.mark.slow
def test_what_goes_wrong_there_is_raised_here(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no system"):
        parallel.replay_systems(dataset, Settings(), ["nosuch"], 2, None)
    with pytest.raises(StoreError, match="evtchn: its process died with exit code 7"):
        monkeypatch.setattr(parallel, "_serve", _dies)
        parallel.replay_systems(dataset, Settings(), ["evtchn"], 2, None)


def _dies(*_: object) -> None:
    os._exit(7)


def test_small_datasets_and_classes_without_a_file_stay_here(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.usual_jobs(dataset, 7) == 1
    assert not parallel.can_part(Settings(policies=(Choice("X", "hpet", Choice),)))
    large = Dataset(dataset.path, {**dataset.manifest, "events": parallel.LARGE_EVENTS})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(parallel, "_free_bytes", lambda: 64 * parallel.PROCESS_BYTES)
    assert (parallel.usual_jobs(large, 1), parallel.usual_jobs(large, 3), parallel.usual_jobs(large, 7)) == (1, 3, 4)
    monkeypatch.setattr(parallel, "_free_bytes", lambda: 1)
    assert parallel.usual_jobs(large, 7) == 1


def _children(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
def test_ctrl_c_ends_all_processes(dataset: Dataset) -> None:
    asked = ("-s", "hpet", "-s", "evtchn", "-s", "irqflow", "--jobs", "2")
    command = [sys.executable, "-m", "tracetool", "replay", str(dataset.path), *asked]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started: list[int] = []
    end = time.monotonic() + 60
    while len(started) < 2 and time.monotonic() < end and running.poll() is None:
        started = _children(running.pid)
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    out, said = running.communicate(timeout=60)
    assert started and running.returncode == 130 and out == ""
    assert said.count("\n") <= 1 and "Traceback" not in said
    end = time.monotonic() + 30  # the resource tracker sees its pipe close, and goes
    while (left := [pid for pid in started if Path(f"/proc/{pid}").exists()]) and time.monotonic() < end:
        time.sleep(0.05)
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xen-hvm-intx/boot.xentrace.zst", "xen-2l/dom0-light.xentrace.zst"])
def test_real_recordings_in_two_processes(name: str, tmp_path: Path) -> None:
    ingest([str(shared_path(f"recordings/{name}"))], tmp_path / "d", IngestOptions())
    command = [sys.executable, "-m", "tracetool", "replay", str(tmp_path / "d"), "-p", "current", "-p", "proposed"]
    one, two = (
        subprocess.run([*command, "--json", "--jobs", jobs], capture_output=True, check=False) for jobs in ("1", "2")
    )
    assert one.stdout and one.stdout == two.stdout and one.returncode == two.returncode


def test_memory_is_that_of_the_control_group(tmp_path: Path) -> None:
    member = tmp_path / "cgroup"
    member.write_text("4:memory:/a/b\n1:name=systemd:/x\n0::/job\n")
    assert parallel.group_bytes(member, tmp_path) == 1 << 63
    limits = {"memory/a/memory.limit_in_bytes": "5000", "memory/a/b/memory.limit_in_bytes": "9" * 18}
    for path, text in {**limits, "job/memory.max": "max"}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text + "\n")
    assert parallel.group_bytes(member, tmp_path) == 5000
    (tmp_path / "memory.max").write_text("4000\n")
    assert parallel.group_bytes(member, tmp_path) == 4000
    assert parallel.group_bytes(tmp_path / "none", tmp_path) == 1 << 63
