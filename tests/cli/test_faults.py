"""Full disks, unreadable files, kills: never a half dataset, never a lost input, one line and the right exit code."""

from __future__ import annotations

import hashlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from parsers.open import Opened, open_recording
from parsers.recording import Chunk, RecordingError
from parsers.xentrace.reader import XentraceReader
from replay.declare import UsageError
from tests.cli.small import SAMPLE, sample_dataset
from tests.cli.test_commands import tracetool
from tracetool import exits, ingest, merge
from tracetool.cli import run
from tracetool.fleet import command
from tracetool.fleet.work import run_task
from tracetool.store import Dataset, StoreError

INPUT = hashlib.sha256(SAMPLE.read_bytes()).hexdigest()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes a file system of that many KiB; needs root."""
    made: list[Path] = []

    def make(kib: int) -> Path:
        place = tmp_path / f"disk-{kib}"
        place.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(place)]
        try:
            done = subprocess.run(mount, capture_output=True, check=False)
        except OSError:
            pytest.skip("no mount")
        if done.returncode:
            pytest.skip("may not mount a small file system")
        made.append(place)
        return place

    yield make
    for place in made:
        subprocess.run(["umount", str(place)], check=True)


def one_line(text: str) -> str:
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("tracetool: "), text
    assert "Traceback" not in text and "internal error" not in text
    return lines[0]


def nothing_in(folder: Path) -> bool:
    return not any(folder.iterdir())


# -- disks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kib", [4, 40, 160, 240, 700])
def test_disk_full_while_reading(
    kib: int, small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """Sizes at which it happens in the first table, between tables, in the events, in the manifest."""
    disk = small_disk(kib)
    code = run(["ingest", str(SAMPLE), "-o", str(disk / "d")])
    said = capfd.readouterr()
    if code == exits.CLEAN:
        assert whole(disk / "d") and kib > 300
        return
    assert code == exits.INTERNAL and "No space left" in one_line(said.err) and not said.out
    assert nothing_in(disk)
    assert hashlib.sha256(SAMPLE.read_bytes()).hexdigest() == INPUT


def test_disk_full_keeps_the_dataset_that_was_there(
    small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(1000)
    sample_dataset(disk / "d")
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - 100_000)))
    assert run(["ingest", "--force", str(SAMPLE), "-o", str(disk / "d")]) == exits.INTERNAL
    assert "No space left" in one_line(capfd.readouterr().err)
    assert whole(disk / "d") and sorted(p.name for p in disk.iterdir()) == ["ballast", "d"]


@pytest.mark.parametrize("name", ["r.html", "r.txt", "r.md", "r.json", "r.xml"])
def test_disk_full_while_reporting(
    name: str, tmp_path: Path, small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    sample_dataset(tmp_path / "d")
    disk = small_disk(4)
    (disk / "ballast").write_bytes(bytes(4096))  # not a byte is left
    assert run(["report", str(tmp_path / "d"), "-o", str(disk / name)]) == exits.INTERNAL
    assert "No space left" in one_line(capfd.readouterr().err)
    assert [p.name for p in disk.iterdir()] == ["ballast"]
    assert whole(tmp_path / "d")


def test_disk_full_while_exporting_and_asking(
    tmp_path: Path, small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    sample_dataset(tmp_path / "d")
    disk = small_disk(4)
    (disk / "ballast").write_bytes(bytes(4096))
    for arguments in (
        ["query", str(tmp_path / "d"), "SELECT * FROM events", "-o", str(disk / "q.parquet")],
        ["query", str(tmp_path / "d"), "SELECT * FROM events", "-o", str(disk / "q.csv")],
        ["export", str(tmp_path / "d"), "-o", str(disk / "e.pftrace")],
    ):
        code = run(arguments)
        said = one_line(capfd.readouterr().err)
        if "needs the extra" in said:
            continue
        assert code == exits.INTERNAL and "No space left" in said, (arguments, said)
        assert [p.name for p in disk.iterdir()] == ["ballast"], arguments


def test_disk_full_in_a_fleet(
    small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our own trouble is no verdict on the recording: it is done again when there is room."""
    monkeypatch.setattr(command, "run_pool", lambda tasks, _jobs: map(run_task, tasks))
    disk = small_disk(200)
    assert run(["fleet", str(SAMPLE), "-o", str(disk / "out"), "-j", "1"]) == exits.INTERNAL
    said = capfd.readouterr()
    assert "No space left" in said.out + said.err
    assert not list((disk / "out").glob("runs/*"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
    assert run(["fleet", str(SAMPLE), "-o", str(disk / "out"), "-j", "1"]) in (exits.CLEAN, exits.FINDINGS)


def test_a_limit_on_file_sizes(tmp_path: Path) -> None:
    """The same without root: `ulimit -f`."""
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-m", "tracetool", "ingest", str(SAMPLE), "-o", "d"],
        cwd=tmp_path, preexec_fn=limit, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == exits.INTERNAL and "File too large" in one_line(done.stderr)
    assert nothing_in(tmp_path)


def test_a_read_only_output(
    tmp_path: Path, small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    sample_dataset(tmp_path / "d")
    disk = small_disk(64)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for arguments in (
        ["ingest", str(SAMPLE), "-o", str(disk / "d")],
        ["report", str(tmp_path / "d"), "-o", str(disk / "r.html")],
        ["query", str(tmp_path / "d"), "SELECT * FROM gaps", "-o", str(disk / "q.csv")],
        ["fleet", str(SAMPLE), "-o", str(disk / "f")],
        ["shrink", str(tmp_path / "d"), "hpet-wrong-cpu", "-o", str(disk / "s"), "--seconds", "0.1"],
    ):
        code = run(arguments)
        assert "Read-only" in one_line(capfd.readouterr().err), arguments
        assert code in (exits.UNREADABLE, exits.INTERNAL), arguments


def test_a_read_only_dataset_is_replayed(
    tmp_path: Path, small_disk: Callable[[int], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    disk = small_disk(1000)
    sample_dataset(disk / "d")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert run(["replay", str(disk / "d")]) in (exits.CLEAN, exits.FINDINGS)
    assert capfd.readouterr().err == ""


# -- inputs and outputs --------------------------------------------------------------------------------------------


def _folder(place: Path) -> str:
    (place / "in").mkdir()
    return str(place / "in")


def _loop(place: Path) -> str:
    (place / "loop").symlink_to(place / "loop")
    return str(place / "loop")


def _below_a_file(place: Path) -> str:
    (place / "file").write_bytes(b"x")
    return str(place / "file" / "in")


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (_folder, exits.UNREADABLE, "directory"),
        (_loop, exits.UNREADABLE, "symbolic links"),
        (_below_a_file, exits.UNREADABLE, "Not a directory"),
        (lambda _: "/proc/self/mem", exits.UNREADABLE, "Input/output error"),
        (lambda p: str(p / ("n" * 300)), exits.UNREADABLE, "name too long"),
        (lambda p: str(p / "none"), exits.UNREADABLE, "No such file"),
    ],
)
def test_what_cannot_be_read(
    make: Callable[[Path], str], code: int, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = make(tmp_path)
    before = sorted(p.name for p in tmp_path.iterdir())
    assert run(["ingest", name, "-o", str(tmp_path / "out")]) == code
    assert says.lower() in one_line(capfd.readouterr().err).lower()
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def _cut(recording: Path) -> None:
    os.truncate(recording, recording.stat().st_size // 2)


def _grow(recording: Path) -> None:
    with recording.open("ab") as file:
        file.write(SAMPLE.read_bytes())


def _rewrite(recording: Path) -> None:
    with recording.open("r+b") as file:
        file.seek(50_000)
        file.write(bytes(100_000))
    os.utime(recording, (1, 1))  # a coarse clock may not tell


def _replace(recording: Path) -> None:
    new = recording.with_name("new")
    new.write_bytes(SAMPLE.read_bytes()[:-5])
    new.replace(recording)


@pytest.mark.parametrize("damaged", [False, True])
@pytest.mark.parametrize("others", [0, 1])
def test_recordings_are_closed(
    damaged: bool, others: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No recording stays open after an ingest, alone or beside others, whether it can be read or not."""
    opened: list[Opened] = []

    def watched(path: str) -> Opened:
        opened.append(open_recording(path))
        return opened[-1]

    monkeypatch.setattr(ingest, "open_recording", watched)
    monkeypatch.setattr(merge, "open_recording", watched)
    good, bad = tmp_path / "good.trace", tmp_path / "bad.trace"
    good.write_bytes(SAMPLE.read_bytes())
    bad.write_bytes(b"no recording at all\n" * 20 if damaged else SAMPLE.read_bytes())
    names = [str(good)] * others + [str(bad)]
    try:
        ingest.ingest(names, tmp_path / "set", ingest.IngestOptions())
    except RecordingError:
        assert damaged
    except UsageError:
        assert others and not damaged  # two hypervisors
    else:
        assert not damaged and not others
    assert len(opened) == len(names) and all(one.stream.closed for one in opened)


@pytest.mark.parametrize("change", [_cut, _grow, _rewrite, _replace])
def test_an_input_that_changes_while_it_is_read(
    change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What was read is neither the one nor the other: nothing is written, and a dataset that was there stays."""
    recording = tmp_path / "r"
    real = XentraceReader.chunks

    def chunks(self: XentraceReader) -> Iterator[Chunk]:
        change(recording)
        yield from real(self)

    for force in (False, True):
        recording.write_bytes(SAMPLE.read_bytes())
        if force:
            sample_dataset(tmp_path / "d")
        with monkeypatch.context() as patch:
            patch.setattr(XentraceReader, "chunks", chunks)
            assert run(["ingest", "--force", str(recording), "-o", str(tmp_path / "d")]) == exits.UNREADABLE
        assert "while it was read" in one_line(capfd.readouterr().err)
        assert whole(tmp_path / "d") if force else not (tmp_path / "d").exists()
        assert sorted(p.name for p in tmp_path.iterdir()) == (["d", "r"] if force else ["r"])


class Failing(io.FileIO):
    """A disk that fails in the middle of the file."""

    def fileno(self) -> int:
        raise io.UnsupportedOperation("fileno")  # nobody reads past it

    def readinto(self, buffer: Any) -> int | None:
        left = 100_000 - self.tell()
        if left <= 0:
            raise OSError(5, "Input/output error")
        return super().readinto(memoryview(buffer)[:left])


def test_a_disk_that_fails_midway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """No end of file: half a recording must not be taken for a whole one."""

    def opened(name: str) -> Opened:
        return Opened(io.BufferedReader(Failing(name)), name, size=Path(name).stat().st_size, digest=INPUT)

    monkeypatch.setattr(ingest, "open_recording", opened)
    assert run(["ingest", str(SAMPLE), "-o", str(tmp_path / "d")]) == exits.UNREADABLE
    assert "Input/output error" in one_line(capfd.readouterr().err)
    assert nothing_in(tmp_path)


def test_a_pipe_that_ends_midway(tmp_path: Path) -> None:
    """Its writer died: what came is kept, and the exit code says that it is not all."""
    ingested = [sys.executable, "-m", "tracetool", "ingest", "-", "-o", "d"]
    done = subprocess.run(ingested, input=SAMPLE.read_bytes()[:100_001], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == exits.UNREADABLE and "the rest was kept" in one_line(done.stderr.decode())
    assert whole(tmp_path / "d") and Dataset.open(tmp_path / "d").manifest["damaged"]


#: A child that has everything imported, gives up its rights, and then runs the command.
AS_NOBODY = """
import os, sys
from tracetool.cli import run
run(["ingest", sys.argv[1], "-o", sys.argv[2] + "/warm"])
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.stdout.flush()
sys.exit(run(sys.argv[3:]))
"""


def as_nobody(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    if os.geteuid():
        pytest.skip("needs root, to give up its rights")
    child = [sys.executable, "-c", AS_NOBODY, str(SAMPLE), str(folder), *arguments]
    return subprocess.run(child, capture_output=True, text=True, check=False)


def test_no_permission(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SAMPLE.read_bytes())
    secret.chmod(0)
    opened = tmp_path / "open"
    opened.mkdir()
    opened.chmod(0o777)
    for place in tmp_path.parents:  # the way to it
        if place.stat().st_uid == os.getuid() and place.name.startswith(("pytest", "popen")):
            place.chmod(0o755)
    tmp_path.chmod(0o755)
    done = as_nobody(tmp_path, "ingest", str(secret), "-o", str(opened / "d"))
    assert done.returncode == exits.UNREADABLE and "Permission denied" in one_line(done.stderr)
    assert nothing_in(opened)
    shutil.rmtree(tmp_path / "warm")
    done = as_nobody(tmp_path, "ingest", str(SAMPLE), "-o", str(tmp_path / "d"))
    assert done.returncode == exits.INTERNAL and "Permission denied" in one_line(done.stderr)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("what", ["file", "folder", "dataset"])
def test_an_output_that_exists_is_not_touched(what: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    if what == "file":
        output.write_bytes(b"mine")
    elif what == "folder":
        output.mkdir()
        (output / "mine").write_bytes(b"mine")
    else:
        sample_dataset(output)
    before = {p: p.stat().st_mtime_ns for p in [output, *output.rglob("*")]}
    force = [] if what == "dataset" else ["--force"]  # which is for datasets only
    assert run(["ingest", *force, str(SAMPLE), "-o", str(output)]) == exits.USAGE
    assert "exists already" in one_line(capfd.readouterr().err)
    assert {p: p.stat().st_mtime_ns for p in [output, *output.rglob("*")]} == before


def test_an_input_in_the_place_of_the_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recording = tmp_path / "r"
    recording.write_bytes(SAMPLE.read_bytes())
    for arguments in (
        ["ingest", "--force", str(recording), "-o", str(recording)],
        ["fleet", str(recording), "-o", str(recording)],
    ):
        assert run(arguments) in (exits.USAGE, exits.INTERNAL)
        one_line(capfd.readouterr().err)
    assert hashlib.sha256(recording.read_bytes()).hexdigest() == INPUT


# -- kills ---------------------------------------------------------------------------------------------------------

#: A child that says when everything is imported; what follows takes a few tenths of a second.
WARM = """
import sys, time
import polars, pyarrow.parquet
import parsers.xentrace.reader, replay.binding.xentrace, tracetool.ingest
from tracetool.cli import run
print("go", flush=True)
code = run(sys.argv[1:])
print("done", flush=True)
sys.exit(code)
"""


def whole(path: Path) -> bool:
    """Whether every table of a dataset has the rows that the manifest says."""
    dataset = Dataset.open(path)
    tables = dataset.manifest["tables"]
    assert {n: pq.read_metadata(dataset.table_path(n)).num_rows for n in tables} == {
        n: t["rows"] for n, t in tables.items()
    }
    assert dataset.events().collect().height == dataset.manifest["events"]
    dataset.gaps(), dataset.notes()
    return True


def kill_at_random(place: Path, times: int, *, force: bool) -> dict[str, int]:
    """Kill an ingest at `times` random moments between its start and its end; what was there each time."""
    recording = place / "r.xentrace"
    recording.write_bytes(SAMPLE.read_bytes())
    target = place / "d"
    chance = random.Random(times)
    seen = {"nothing": 0, "whole": 0, "between": 0, "late": 0, "killed": 0}
    span = 0.0  # s that an ingest takes, measured by those that end before they are killed
    if force:
        sample_dataset(target)
    while seen["killed"] < times:
        if not force:
            shutil.rmtree(target, ignore_errors=True)
        ingest = [sys.executable, "-c", WARM, "ingest", "--force", str(recording), "-o", str(target)]
        child = subprocess.Popen(ingest, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        assert child.stdout.readline() == "go\n"
        began = time.monotonic()
        if span:
            # Towards the end: that is where the dataset comes to its place.
            time.sleep(span * chance.random() ** 0.5)
        else:  # the first may end by itself, that its time is known
            assert child.stdout.readline()
            child.wait()
        taken = time.monotonic() - began
        child.kill()
        _, err = child.communicate()
        assert not err
        if child.returncode == 0:
            seen["late"] += 1
            span = taken if not span else 0.9 * span  # it was killed too late: the machine is quicker now
        else:
            assert child.returncode == -signal.SIGKILL
            seen["killed"] += 1
            span *= 1.02
        assert hashlib.sha256(recording.read_bytes()).hexdigest() == INPUT
        if target.exists():
            assert whole(target)
            seen["whole"] += 1
            continue
        with pytest.raises(StoreError):
            Dataset.open(target)
        if force:  # between the renames: the old one lies beside and comes back with the next run
            assert list(place.glob(".d.old-*"))
            seen["between"] += 1
        else:
            seen["nothing"] += 1
    assert run(["ingest", "--force", str(recording), "-o", str(target)]) == exits.CLEAN
    assert whole(target) and sorted(p.name for p in place.iterdir()) == ["d", "r.xentrace"]
    return seen


@pytest.mark.parametrize("force", [False, True])
def test_killed_at_random_moments(force: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen = kill_at_random(tmp_path, 3, force=force)
    assert seen["killed"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("force", [False, True])
def test_killed_two_hundred_times(force: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    seen = kill_at_random(tmp_path, 100, force=force)
    with capfd.disabled():
        print(f"\n{'replacing a dataset' if force else 'new dataset'}: {seen}")
    assert seen["killed"] == 100
    assert force or seen["nothing"] > 50  # they did come in the middle


#: Kills itself before the n-th rename, or after it.
AT_RENAME = """
import os, pathlib, signal, sys
import tracetool.store
from tracetool.cli import run
n, after = int(sys.argv[1]), sys.argv[2] == "after"
real, count = pathlib.Path.rename, 0
def rename(self, target):
    global count
    count += 1
    if count == n and not after:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, target)
    if count == n:
        os.kill(os.getpid(), signal.SIGKILL)
pathlib.Path.rename = rename
sys.exit(run(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("number", "when"),
    [
        pytest.param(1, "before", marks=pytest.mark.slow),
        (1, "after"),
        pytest.param(2, "after", marks=pytest.mark.slow),
    ],
)
def test_killed_around_the_renames(number: int, when: str, tmp_path: Path) -> None:
    """The one moment in which neither is in its place: the next run puts the old one back before it starts."""
    target = tmp_path / "d"
    sample_dataset(target)
    child = [sys.executable, "-c", AT_RENAME, str(number), when, "ingest", "--force", str(SAMPLE), "-o", str(target)]
    assert subprocess.run(child, stdout=subprocess.DEVNULL, check=False).returncode == -signal.SIGKILL
    assert target.exists() == ((number, when) != (1, "after"))
    # A run that fails for another reason brings it back too.
    done = tracetool("ingest", "--force", str(tmp_path / "none"), "-o", str(target), cwd=tmp_path)
    assert done.returncode == exits.UNREADABLE
    assert whole(target) and [p.name for p in tmp_path.iterdir()] == ["d"]
