"""`tracetool fleet`: plan, run what is missing, publish, triage."""

from __future__ import annotations

import contextlib
import fcntl
import json as jsonlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from parsers.formats import FORMATS
from replay.declare import UsageError
from replay.systems import SYSTEMS
from tracetool import exits, terminal
from tracetool.fleet import tables
from tracetool.fleet.cluster import PREFIX, run_cluster
from tracetool.fleet.plan import Job, Target, find, stamp_of
from tracetool.fleet.pool import run_pool
from tracetool.fleet.triage import document, junit, text, triage
from tracetool.fleet.work import Outcome, Task
from tracetool.output import whole_files
from tracetool.replaying import choose, choose_recorded
from tracetool.request import check_severity
from tracetool.results import SEVERITIES
from tracetool.store import StoreError

__all__ = ["Result", "fleet", "run_fleet"]

#: Below the output: scratch of the run that holds the lock.
WORK: Final = ".work"
LOCK: Final = ".lock"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Result:
    """`rows` of `recordings` by name; `fresh` of them were done by this run, `skipped` files were left out."""

    rows: dict[str, dict[str, Any]]
    fresh: int
    skipped: int


def fleet(
    given: Sequence[str],
    output: Path,
    job: Job,
    *,
    jobs: int | None = None,
    engine: str | None = None,
    json: bool = False,
    junit_file: Path | None = None,
    fail_on: str = "error",
) -> int:
    """The command; returns the exit code: findings first, then our own failures, damage, ignorance."""
    check_severity(fail_on)
    with terminal.progress_bar() as bar:
        result = run_fleet(given, output, job, jobs=jobs, engine=engine, progress=bar)
    groups = triage(output, result.rows)
    if junit_file is not None:
        _write(junit_file, junit(output, result.rows, fail_on))
    if json:
        print(jsonlib.dumps(document(output, result.rows, groups)))
    else:
        print(text(result.rows, groups, result.fresh, result.skipped))
    return _exit_code(result.rows, groups, fail_on)


def run_fleet(
    given: Sequence[str],
    output: Path,
    job: Job,
    *,
    jobs: int | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> Result:
    """Bring the dataset at `output` up to date for the recordings given.

    UsageError before any work for what cannot be right; StoreError when `output` cannot be written or is in use. What
    was finished before an error or a kill is kept, and is not done again.
    """
    _check(job, jobs, engine)
    job = replace(job, policies=tuple(_absolute(p) for p in job.policies))
    digest = job.digest()
    targets, skipped = find(given, output)
    if not targets:
        raise UsageError(f"no recordings in {', '.join(given)}")
    with _locked(output) as work:
        stored = tables.known(output, (t.name for t in targets))
        tasks = [
            _task(target, stored.get(target.name), job, digest, work / f"{number:06}")
            for number, target in enumerate(sorted(targets, key=lambda t: -t.size))  # the longest first: no tail
        ]
        todo = [t for t in tasks if t is not None]
        outcomes: Iterator[Outcome] = iter(())
        if todo and engine:
            outcomes = run_cluster(todo, engine)
        elif todo:
            outcomes = run_pool(todo, jobs or len(os.sched_getaffinity(0)))
        fresh = 0
        for done, outcome in enumerate(outcomes, 1):
            fresh += not outcome.same
            _keep(output, outcome, work)
            if progress:
                progress("recordings", done, len(todo))
        rows = tables.known(output, sorted(t.name for t in targets))
    lost = len(targets) - len(rows)
    if lost:
        raise StoreError(f"{output}: {lost} results are not there any more; run the command again", 5)
    return Result(rows, fresh, skipped)


def _check(job: Job, jobs: int | None, engine: str | None) -> None:
    for spec in job.policies:
        choose(spec)
    choose_recorded(job.recorded)
    for system in job.systems:
        if system not in SYSTEMS:
            raise UsageError(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
    formats = [name for name, _, _ in FORMATS]
    if job.options.format is not None and job.options.format not in formats:
        raise UsageError(f"no format {job.options.format!r}; there are {', '.join(formats)}")
    if job.version_from:
        try:
            re.compile(job.version_from)
        except re.error as error:
            raise UsageError(f"--version-from wants a regular expression: {error}") from None
    if engine is not None and (not engine.startswith(PREFIX) or len(engine) == len(PREFIX)):
        raise UsageError(f"--engine wants dask://HOST:PORT, not {engine!r}")
    if engine is not None and jobs is not None:
        raise UsageError("--jobs is for processes on this machine; a cluster has its own workers")
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs wants a number from 1 on, not {jobs}")


def _absolute(spec: str) -> str:
    """A user's policy by a path that holds in other processes."""
    path, colon, name = spec.rpartition(":")
    return f"{Path(path).resolve()}:{name}" if colon and path.endswith(".py") else spec


def _task(target: Target, row: dict[str, Any] | None, job: Job, digest: str, staging: Path) -> Task | None:
    """What is to be done for a recording; None when what is stored stands."""
    content = None
    if row is not None and row["state"] in tables.DONE and row["job"] == digest:
        if row["path"] == target.path and stamp_of(target.path) == (row["size"], row["mtime_ns"], row["ctime_ns"]):
            return None
        content = row["content"]  # the worker compares before it does anything else
    return Task(target.name, target.path, str(staging.resolve()), job, digest, content)


def _keep(output: Path, outcome: Outcome, work: Path) -> None:
    """Publish an outcome. Only this process writes outside of `WORK`: nothing is there twice."""
    scratch = work / "keep"
    if outcome.same:
        columns = ("path", "size", "mtime_ns", "ctime_ns")
        tables.touch(output, outcome.name, {k: outcome.row[k] for k in columns}, scratch)
        return
    staged = Path(outcome.staging) if outcome.staging else scratch
    if not outcome.staging:
        tables.stage(staged, {"recordings": [outcome.row]})
    elif not (staged / "recordings").is_dir():
        raise StoreError(f"{staged}: a worker's results are not here; all machines must share the file system", 5)
    tables.publish(output, outcome.name, staged, work / "trash")
    shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def _locked(output: Path) -> Iterator[Path]:
    """Hold the output for this process; gives an empty folder for scratch, gone afterwards."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        foreign = [p.name for p in output.iterdir() if p.name not in (*tables.SCHEMAS, WORK, LOCK)]
        if foreign:
            raise StoreError(f"{output} exists already and has other things in it ({foreign[0]}); choose another", 2)
        lock = (output / LOCK).open("w")
    except OSError as error:
        raise StoreError(f"{output}: cannot write there: {error.strerror or error}", 5) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise StoreError(f"{output}: another fleet run is writing there", 2) from None
        # A name of its own: what is left of a killed run may still have a writer.
        work = output / WORK / str(os.getpid())
        shutil.rmtree(output / WORK, ignore_errors=True)
        work.mkdir(parents=True, exist_ok=True)
        try:
            yield work
        finally:
            shutil.rmtree(output / WORK, ignore_errors=True)


def _write(path: Path, content: str) -> None:
    """A file, whole or not at all."""
    with whole_files(path) as (temporary,):
        temporary.write_text(content, encoding="utf-8")


def _exit_code(rows: dict[str, dict[str, Any]], groups: Sequence[dict[str, Any]], fail_on: str) -> int:
    if groups and fail_on != "never" and SEVERITIES.index(groups[0]["severity"]) <= SEVERITIES.index(fail_on):
        return exits.FINDINGS
    codes = {row["exit_code"] for row in rows.values()}
    return next((code for code in (exits.INTERNAL, exits.UNREADABLE, exits.INCONCLUSIVE) if code in codes), exits.CLEAN)
