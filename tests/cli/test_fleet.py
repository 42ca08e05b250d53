"""`tracetool fleet`: every recording has its row, once; what was done is not done again; workers may die."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import polars as pl
import pytest

from tests.cli.test_commands import tracetool
from tests.shared import SAMPLES
from tracetool.cli import run
from tracetool.fleet import command
from tracetool.fleet.command import run_fleet
from tracetool.fleet.plan import Job, find, partition
from tracetool.fleet.work import Outcome, run_task, signature
from tracetool.ingest import IngestOptions, ingest
from tracetool.store import Dataset

SAMPLE = SAMPLES / "xen-2l-dom0-idle.xentrace"
LINUX = SAMPLES / "linux-6.1-tracecmd-v7.dat.zst"

#: A policy of a user's that kills its process: always, once (leaving a mark), or after a while.
DEADLY = """
import os, pathlib, signal, time
from replay.systems import SYSTEMS
BASE = SYSTEMS["hpet"].policies["current"]
class {name}(BASE):
    system = "hpet"
    def __init__(self, *a, **k):
        super().__init__(*a, **k)
        mark = pathlib.Path({mark!r})
        {action}
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


def policy(folder: Path, name: str, action: str) -> str:
    path = folder / f"{name.lower()}.py"
    path.write_text(DEADLY.format(name=name, mark=str(folder / "mark"), action=action))
    return f"{path}:{name}"


def recordings(folder: Path, count: int = 3, start: int = 80_000) -> Path:
    """Distinct small recordings: windows of the sample from its start, `start` bytes and more."""
    folder.mkdir()
    data = SAMPLE.read_bytes()
    for number in range(count):
        end, at = start + 4_000 * number, 0
        while at < end:
            at += 12 + int.from_bytes(data[at + 8 : at + 12], "little")
        (folder / f"r{number}.xentrace").write_bytes(data[:at])
    return folder


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No processes: for what is not about them (each takes a second to start)."""
    monkeypatch.setattr(command, "run_pool", lambda tasks, _jobs: map(run_task, tasks))


def rows(output: Path, table: str) -> pl.DataFrame:
    files = sorted((output / table).glob("recording=*/*.parquet"))
    return pl.read_parquet(files, hive_partitioning=True) if files else pl.DataFrame()


def states(output: Path) -> dict[str, str]:
    return dict(rows(output, "recordings").select("recording", "state").iter_rows())


def test_a_row_for_every_recording_and_one_dataset(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", 2)
    (source / "4.17" / "host a").mkdir(parents=True)
    shutil.copy(LINUX, source / "4.17" / "host a" / "r0.xentrace")  # the name says nothing, and is taken
    (source / "cut").write_bytes(SAMPLE.read_bytes()[:30_001])
    (source / "empty").touch()
    (source / "noise").write_bytes(b"\x1b]0;x\x07" * 50)
    (source / "README.md").write_text("not a recording")
    (source / ".hidden").write_bytes(b"x")
    output = tmp_path / "out"
    arguments = ("fleet", "in", "-o", "out", "-j", "2", "-p", "current", "-p", "proposed", "--junit", "j.xml", "--json",
                 "--version-from", r"\d\.\d+", "--fail-on", "error")  # fmt: skip
    done = tracetool(*arguments, cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    document = json.loads(done.stdout)
    by_name = {r["recording"]: r for r in document["recordings"]}
    assert {n: r["state"] for n, r in by_name.items()} == {
        "r0.xentrace": "replayed", "r1.xentrace": "replayed", "4.17/host a/r0.xentrace": "replayed",
        "cut": "damaged", "empty": "unreadable", "noise": "unreadable",
    }  # fmt: skip
    assert states(output) == {n: r["state"] for n, r in by_name.items()}
    assert by_name["4.17/host a/r0.xentrace"]["version"] == "4.17"
    assert by_name["empty"]["error"] and "\n" not in by_name["empty"]["error"]
    # What the dataset holds is what the single commands say.
    single = json.loads(tracetool("replay", "in/r1.xentrace", "-p", "current", "--json", cwd=tmp_path).stdout)
    stored = rows(output, "findings").filter(recording="r1.xentrace", policy="current")
    assert stored.height == sum(len(run["findings"]) for run in single["runs"]) > 0
    assert stored["offset"].to_list() == [f["offset"] for run in single["runs"] for f in run["findings"]]
    metrics = {m["name"]: m["value"] for m in rows(output, "metrics").filter(
        recording="r1.xentrace", policy="current", system="hpet").iter_rows(named=True)}  # fmt: skip
    assert metrics == {k: float(v) for run in single["runs"] if run["system"] == "hpet"
                       for k, v in run["metrics"].items()}  # fmt: skip
    # Signatures: counts are those of the rows, over all recordings.
    counted = rows(output, "findings").group_by("signature").agg(n=pl.len(), r=pl.col("recording").n_unique())
    assert {(g["signature"], g["count"], g["recordings"]) for g in document["triage"]} == set(counted.iter_rows())
    suite = ET.parse(tmp_path / "j.xml").getroot()
    assert suite.get("errors") == "3" and len(suite) == int(suite.get("tests") or 0)
    assert sum(1 for case in suite if case.get("name") == "read") == 6
    assert not (output / ".work").exists()


def test_the_terminal_gets_no_escapes_and_the_table(
    tmp_path: Path, inline: None, capfd: pytest.CaptureFixture[str]
) -> None:
    source = recordings(tmp_path / "in", 1)
    (source / "bad\x1b[2J").write_bytes(b"\x1b]0;x\x07" * 50)
    assert run(["fleet", str(source), "-o", str(tmp_path / "out"), "-j", "1"]) == 3
    said = capfd.readouterr()
    assert "\x1b" not in said.out + said.err and "\x07" not in said.out
    assert "2 recordings: " in said.out and "hpet-" in said.out and "signature" in said.out
    first = rows(tmp_path / "out", "findings")["observed"][0]
    assert len(first) > 5 and first in said.out, "a log is not cut at the width of a terminal"


def test_only_what_is_missing_or_changed_is_done(tmp_path: Path, inline: None) -> None:
    source, output = recordings(tmp_path / "in", 3), tmp_path / "out"
    job = Job()
    assert run_fleet([str(source)], output, job, jobs=2).fresh == 3
    before = rows(output, "findings")
    assert run_fleet([str(source)], output, job, jobs=2).fresh == 0
    # The same bytes with another time are looked at, and stand.
    os.utime(source / "r0.xentrace")
    assert run_fleet([str(source)], output, job, jobs=1).fresh == 0
    shutil.copy(source / "r2.xentrace", source / "r1.xentrace")
    (source / "r2.xentrace").unlink()
    result = run_fleet([str(source)], output, job, jobs=1)
    assert result.fresh == 1 and set(result.rows) == {"r0.xentrace", "r1.xentrace"}
    columns = [c for c in before.columns if c != "recording"]
    after = rows(output, "findings")
    one, other = (f.filter(recording=n).select(columns) for f, n in ((after, "r1.xentrace"), (before, "r2.xentrace")))
    assert one.equals(other)
    # Another threshold is another job; one that became unreadable loses its results.
    (source / "r0.xentrace").write_bytes(b"gone")
    result = run_fleet([str(source)], output, Job(values={"hpet": {"slop_ns": 1}}), jobs=1)
    assert result.fresh == 2 and result.rows["r0.xentrace"]["state"] == "unreadable"
    assert "r0.xentrace" not in rows(output, "findings")["recording"].to_list()


def test_the_exit_code_is_that_of_replay(tmp_path: Path, inline: None, capfd: pytest.CaptureFixture[str]) -> None:
    """A system that nobody asked for and that the recording hardly shows does not make a run inconclusive."""
    kprobes = str(SAMPLES / "ftrace-linux-6.1_03-tgid.txt.zst")
    codes = []
    for asked in ((), ("-s", "irqflow"), ("-s", "apic"), ("-s", "hpet")):
        one = run(["replay", kprobes, *asked])
        many = run(["fleet", kprobes, "-o", str(tmp_path / "out"), "-j", "1", *asked])
        assert one == many, asked
        codes.append(one)
    assert codes == [0, 4, 0, 4]
    verdicts = rows(tmp_path / "out", "runs")  # of the last call; the recording has one result
    assert verdicts["system"].to_list() == ["hpet"] and verdicts["verdict"].to_list() == ["inconclusive"]
    capfd.readouterr()


def test_the_policy_that_ran_is_part_of_the_job(tmp_path: Path, inline: None) -> None:
    """`--recorded` changes results: they are made again, and a wrong name is refused before any work."""
    recording = str(SAMPLES / "ftrace-linux-6.1_10-kprobes.txt.zst")
    output = tmp_path / "out"
    for stated, policy, done in (((), "edge", 1), (("irqflow=level",), "level", 1), (("irqflow=level",), "level", 0)):
        assert run_fleet([recording], output, Job(systems=("irqflow",), recorded=stated), jobs=1).fresh == done
        ran = rows(output, "runs")
        assert (ran["policy"].to_list(), ran["mode"].to_list()) == ([policy], ["verify"])
    assert run(["fleet", recording, "-o", str(output), "-j", "1", "--recorded", "irqflow=none"]) == 2


def test_datasets_links_and_equal_names(tmp_path: Path, inline: None) -> None:
    source = recordings(tmp_path / "in", 1)
    ingest([str(source / "r0.xentrace")], source / "d.dataset", IngestOptions())
    other = recordings(tmp_path / "other", 1)
    os.mkfifo(source / "pipe")  # would be waited for
    targets, _ = find([str(source), str(other / "*")], tmp_path / "in" / "out")
    names = [t.name for t in targets]
    assert len(set(names)) == 3 and sum(n.startswith("r0.xentrace~") for n in names) == 2 and "d.dataset" in names
    result = run_fleet([str(source / "d.dataset")], tmp_path / "out", Job(), jobs=1)
    assert result.rows["d.dataset"]["state"] == "replayed"
    assert Dataset.open(source / "d.dataset").manifest["events"]  # the input is as it was
    assert partition("a/b=c") == "recording=a%2Fb%3Dc"


def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", 2)
    once = policy(tmp_path, "Once", f"mark.exists() or (mark.touch(), {DIE})")
    result = run_fleet([str(source)], tmp_path / "out", Job(policies=(once,)), jobs=1)
    assert sorted(r["attempts"] for r in result.rows.values()) == [1, 2]
    assert set(states(tmp_path / "out").values()) == {"replayed"}
    assert (rows(tmp_path / "out", "runs").group_by("recording", "system").len()["len"] == 1).all()


def test_a_worker_that_always_dies_is_reported(tmp_path: Path) -> None:
    source = recordings(tmp_path / "in", 1)
    shutil.copy(LINUX, source / "linux.dat.zst")  # has nothing for this policy: lives
    always = policy(tmp_path, "Always", DIE)
    done = tracetool("fleet", "in", "-o", "out", "-p", always, "-p", "current", "-j", "1", "--json", cwd=tmp_path)
    assert done.returncode == 5
    by_name = {r["recording"]: r for r in json.loads(done.stdout)["recordings"]}
    assert by_name["linux.dat.zst"]["state"] == "replayed"
    assert by_name["r0.xentrace"]["state"] == "crashed" and "SIGKILL" in by_name["r0.xentrace"]["error"]
    assert by_name["r0.xentrace"]["attempts"] == 2


def test_resume_after_a_kill(tmp_path: Path) -> None:
    """The whole process group dies in the middle; the next call does the rest, and only that."""
    source, output = recordings(tmp_path / "in", 4), tmp_path / "out"
    slow = policy(tmp_path, "Slow", "time.sleep(0.3) if not mark.exists() else None")
    arguments = [sys.executable, "-m", "tracetool", "fleet", "in", "-o", "out", "-p", slow, "-j", "2"]
    child = subprocess.Popen(arguments, cwd=tmp_path, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not len(rows(output, "recordings")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    done = states(output)
    assert 0 < len(done) < 4
    assert (output / ".work").exists()
    (tmp_path / "mark").touch()  # no more sleeping
    result = run_fleet([str(source)], output, Job(policies=(slow,)), jobs=1)
    assert result.fresh == 4 - len(done)
    assert len(states(output)) == 4 and not (output / ".work").exists()
    assert (rows(output, "runs").group_by("recording", "system", "policy").len()["len"] == 1).all()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("fleet", "nowhere", "-o", "out"), 2, "no such file"),
        (("fleet", "in/*.none", "-o", "out"), 2, "no such file"),
        (("fleet", "in", "-o", "out", "-p", "nonsense"), 2, "no system has a policy"),
        (("fleet", "in", "-o", "out", "-s", "nonsense"), 2, "no system"),
        (("fleet", "in", "-o", "out", "--format", "nonsense"), 2, "no format"),
        (("fleet", "in", "-o", "out", "--fail-on", "x"), 2, "--fail-on"),
        (("fleet", "in", "-o", "out", "-j", "0"), 2, "--jobs"),
        (("fleet", "in", "-o", "out", "--version-from", "("), 2, "--version-from"),
        (("fleet", "in", "-o", "out", "--engine", "spark://x"), 2, "--engine"),
        (("fleet", "in", "-o", "in"), 2, "other things in it"),
    ],
)
def test_one_line_for_what_cannot_be_right(
    arguments: tuple[str, ...], code: int, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    recordings(tmp_path / "in", 1)
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    said = capfd.readouterr().err
    assert says in said and said.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["in"] or not any((tmp_path / "out").glob("*/recording=*"))


def test_two_runs_do_not_share_an_output(tmp_path: Path) -> None:
    import fcntl

    source = recordings(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = tracetool("fleet", str(source), "-o", "out", cwd=tmp_path)
    assert done.returncode == 2 and "another fleet run" in done.stderr


def test_a_kill_between_the_renames_leaves_no_result(
    tmp_path: Path, inline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`recordings` comes last: whatever of the others is there, the recording is done again."""
    source, output = recordings(tmp_path / "in", 1), tmp_path / "out"
    real = Path.rename

    def breaks(self: Path, target: Any) -> Path:
        if self.name == "recordings":
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", breaks)
        with pytest.raises(KeyboardInterrupt):
            run_fleet([str(source)], output, Job(), jobs=1)
    assert rows(output, "recordings").is_empty() and not rows(output, "runs").is_empty()
    assert run_fleet([str(source)], output, Job(), jobs=1).fresh == 1
    assert states(output) == {"r0.xentrace": "replayed"}


def test_signatures_do_not_depend_on_numbers() -> None:
    base = {"code": "c", "severity": "warn", "expected": "wake within 50.0 us on cpu 1", "observed": "1.2 ms later"}
    same = {**base, "expected": "wake within 3 ms on cpu 0x1f", "observed": "343.7 us later"}
    other = {**base, "observed": "1.2 ms earlier"}
    assert signature("hpet", "current", base) == signature("hpet", "current", same)
    assert signature("hpet", "current", base) != signature("hpet", "current", other)
    assert signature("hpet", "current", base) != signature("hpet", "proposed", base)


# -- a real cluster ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[tuple[str, list[subprocess.Popen[bytes]]]]:
    """A Dask scheduler and worker processes of its own; (address, workers)."""
    pytest.importorskip("distributed", reason="needs the extra: tracetool[dask]")
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    base = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", address, "--no-dashboard"]
    started = [subprocess.Popen(base, **quiet)]  # type: ignore[call-overload]
    for _ in range(workers):
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", f"tcp://{address}", "--nthreads", "1",
                  "--no-nanny", "--no-dashboard"]  # fmt: skip
        started.append(subprocess.Popen(worker, **quiet))  # type: ignore[call-overload]
    try:
        yield address, started[1:]
    finally:
        for process in started:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_a_dask_cluster_loses_a_worker_and_nothing_else(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="needs the extra: tracetool[dask]")
    source, output = recordings(tmp_path / "in", 8), tmp_path / "out"
    slow = policy(tmp_path, "Slow", "time.sleep(0.5)")
    with cluster(2) as (address, workers):
        client = distributed.Client(f"tcp://{address}", set_as_default=False, timeout=60)
        client.wait_for_workers(2, timeout=120)
        client.close()
        killed: list[int] = []

        def progress(_: str, done: int, total: int) -> None:
            if done == 2 and not killed:  # in the middle: the other tasks are spread over both
                workers[0].send_signal(signal.SIGKILL)
                killed.append(total)

        result = run_fleet(
            [str(source)], output, Job(policies=(slow,)), engine=f"dask://{address}", progress=progress
        )
        assert killed == [8]
        assert workers[0].wait() == -signal.SIGKILL and workers[1].poll() is None
        again = run_fleet([str(source)], output, Job(policies=(slow,)), engine=f"dask://{address}")
    assert result.fresh == 8 and again.fresh == 0
    assert states(output) == {f"r{n}.xentrace": "replayed" for n in range(8)}
    # Nothing twice, nothing lost: equal to what one process on this machine gives.
    alone = tmp_path / "alone"
    run_fleet([str(source)], alone, Job(policies=(slow,)), jobs=1)
    for table in ("runs", "findings", "metrics", "notes"):
        assert rows(output, table).equals(rows(alone, table)), table
    assert not (output / ".work").exists()


@pytest.mark.slow
def test_no_cluster_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("distributed", reason="needs the extra: tracetool[dask]")
    recordings(tmp_path / "in", 1)
    done = tracetool("fleet", "in", "-o", "out", "--engine", "dask://127.0.0.1:9", cwd=tmp_path)
    assert done.returncode == 2 and "no Dask scheduler answers" in done.stderr.splitlines()[-1]


def test_outcome_travels() -> None:
    """Tasks and outcomes are plain data: what a cluster needs."""
    import pickle

    outcome = Outcome("a", {"state": "replayed"}, None, same=True)
    assert pickle.loads(pickle.dumps(outcome)) == outcome
    assert pickle.loads(pickle.dumps(Job(values={"hpet": {"slop_ns": 1}}))).digest() == Job(
        values={"hpet": {"slop_ns": 1}}
    ).digest()
