"""One recording: read, replay, results beside their place. Runs in a worker, here or on another machine."""

from __future__ import annotations

import hashlib
import re
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from replay.declare import UsageError
from tracetool import __version__, exits
from tracetool.fleet import tables
from tracetool.fleet.plan import Job, stamp_of
from tracetool.ingest import ingest
from tracetool.replaying import Settings, choose, choose_recorded, replay_dataset
from tracetool.request import exit_code
from tracetool.results import SEVERITIES
from tracetool.store import MANIFEST, Dataset

__all__ = ["Outcome", "Task", "failed_row", "run_task", "signature"]

#: Characters of a text that take part in a signature.
SIGNATURE_CHARS: Final = 300
_NUMBER: Final = re.compile(r"0x[0-9a-fA-F]+|\d[\d.,_]*(?:\s?(?:ns|us|µs|ms|s|%)\b)?")
_NUMBERS: Final = re.compile(r"#(?:[\s,]+#)+")


@dataclass(frozen=True, slots=True)
class Task:
    """`staging` is a folder of this task alone; `content` is the hash of which results are there already."""

    name: str
    path: str
    staging: str
    job: Job
    digest: str
    content: str | None = None
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class Outcome:
    """`row` of `recordings`; `staging` holds the tables, None when there are none. `same`: what is stored stands."""

    name: str
    row: dict[str, Any]
    staging: str | None
    same: bool = False


def run_task(task: Task) -> Outcome:
    """Never raises for what a recording does: a bad one is a row with its error."""
    begin = time.process_time()
    row = {**failed_row(task), "state": "replayed", "exit_code": exits.CLEAN, "error": None}
    staging = Path(task.staging)
    shutil.rmtree(staging, ignore_errors=True)  # of an earlier attempt
    try:
        if task.job.tool != __version__:
            raise UsageError(f"the worker has tracetool {__version__}, not {task.job.tool}")
        # Before the content: a file that changes meanwhile will look changed.
        stamp = stamp_of(task.path)
        row.update(zip(("size", "mtime_ns", "ctime_ns"), stamp or (None,) * 3, strict=True))
        content = row["content"] = _content(Path(task.path))
        if content == task.content:
            return Outcome(task.name, row, None, same=True)
        staging.mkdir(parents=True)
        found = _replay(task, staging / "dataset", row)
    except Exception as error:  # whatever it is, it is this recording's and stops no other
        text, code = exits.describe(error)
        row.update(state="unreadable" if code == exits.UNREADABLE else "failed", exit_code=code, error=text)
        found = {}
    row["cpu_s"] = time.process_time() - begin
    return _stored(task, staging, row, found)


def _stored(task: Task, staging: Path, row: dict[str, Any], found: dict[str, list[dict[str, Any]]]) -> Outcome:
    shutil.rmtree(staging / "dataset", ignore_errors=True)
    try:
        tables.stage(staging, {"recordings": [row], **found})
    except Exception as error:  # the disk is full, say
        shutil.rmtree(staging, ignore_errors=True)
        text, code = exits.describe(error)
        return Outcome(task.name, {**row, "state": "failed", "exit_code": code, "error": text}, None)
    return Outcome(task.name, row, str(staging))


def failed_row(task: Task, error: str = "") -> dict[str, Any]:
    """The row of a recording of which nothing is known, but what went wrong."""
    row: dict[str, Any] = dict.fromkeys(tables.SCHEMAS["recordings"].names)
    row.update(
        path=task.path.encode("utf-8", "backslashreplace").decode(), state="crashed", exit_code=exits.INTERNAL,
        error=error, job=task.digest, attempts=task.attempt,
    )  # fmt: skip
    return row


def _content(path: Path) -> str:
    with (path / MANIFEST if path.is_dir() else path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replay(task: Task, scratch: Path, row: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Rows of all tables but `recordings`; what is said of the recording goes to `row`."""
    job = task.job
    path = Path(task.path)
    if not path.is_dir():
        ingest([task.path], scratch, job.options)
    dataset = Dataset.open(path if path.is_dir() else scratch)
    recorded = choose_recorded(job.recorded)
    settings = Settings(tuple(choose(p) for p in job.policies), job.systems, job.values, recorded, job.keep)
    # Two roles may be one policy of a system; its run is stored once.
    runs = list({(r["system"], r["policy"]): r for r in replay_dataset(dataset, settings)}.values())
    _describe(row, dataset.manifest, task)
    notes = dataset.notes()
    if dataset.manifest.get("damaged"):
        bad = next((n for n in notes if n["severity"] == "error"), None)
        said = f"offset {bad['offset']}: {bad['text']}; the rest was kept" if bad else None
        row.update(state="damaged", exit_code=exits.UNREADABLE, error=said)
    else:
        # Findings are counted over all recordings, by `--fail-on`.
        row["exit_code"] = exit_code(runs, "never", damaged=False, asked=bool(job.systems))
    return {
        "runs": [_run(r) for r in runs],
        "findings": [f for r in runs for f in _findings(r)],
        "metrics": [m for r in runs for m in _metrics(r)],
        "notes": notes,
    }


def _describe(row: dict[str, Any], manifest: Mapping[str, Any], task: Task) -> None:
    inputs: Sequence[Mapping[str, Any]] = manifest.get("inputs", [])
    row["format"] = "+".join(dict.fromkeys(str(i["format"]) for i in inputs))
    row["bytes"] = sum(int(i["bytes"]) for i in inputs)
    row["records"] = manifest.get("span", {}).get("records")
    row["version"] = _version(manifest, task)
    row["recorded"], row["recorded_from"] = _recorded(manifest, task)


def _version(manifest: Mapping[str, Any], task: Task) -> str | None:
    """What the user's pattern finds in the path, else what the recording says, else what the user says of all."""
    if task.job.version_from:
        match = re.search(task.job.version_from, task.path)
        if match:
            return match.group(1) if match.re.groups else match.group()
    facts = manifest.get("facts", {})
    for key in ("xen_version", "linux_version", "kernel"):
        if facts.get(key):
            return str(facts[key])
    stated = task.job.options.xen_version
    return f"Xen {stated[0]}.{stated[1]}" if stated else None


def _recorded(manifest: Mapping[str, Any], task: Task) -> tuple[datetime | None, str | None]:
    clock = manifest.get("clock", {})
    if "wall clock" in str(clock.get("origin")) and clock.get("hz"):
        seconds = clock["tsc0"] / clock["hz"]
        if 0 < seconds < 1 << 33:
            return datetime.fromtimestamp(seconds, UTC), "recording"
    stamp = stamp_of(task.path)
    return (datetime.fromtimestamp(stamp[1] / 1e9, UTC), "file") if stamp else (None, None)


def signature(system: str, policy: str, finding: Mapping[str, Any]) -> str:
    """Twelve hex digits, equal for findings of one rule that say the same but for numbers and object."""
    words = [system, policy, finding["code"], finding["severity"], _words(finding["expected"])]
    return hashlib.sha256("\0".join([*words, _words(finding["observed"])]).encode()).hexdigest()[:12]


def _words(text: object) -> str:
    return _NUMBERS.sub("#", _NUMBER.sub("#", str(text)[:SIGNATURE_CHARS]))


def _run(run: Mapping[str, Any]) -> dict[str, Any]:
    severities = Counter(f["severity"] for f in run["findings"])
    states = Counter(c["state"] for c in run["coverage"])
    return {
        **{k: run[k] for k in ("system", "policy", "mode", "verdict", "horizon_ns")},
        "calibration": (run.get("calibration") or {}).get("state"),
        **{s: severities[s] for s in SEVERITIES},
        **{s: states[s] for s in ("checked", "inferred", "blind")},
    }


def _findings(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    common = {k: run[k] for k in ("system", "policy", "mode")}
    columns = [n for n in tables.SCHEMAS["findings"].names if n not in (*common, "signature")]
    return [
        {**common, "signature": signature(run["system"], run["policy"], f), **{k: f[k] for k in columns}}
        for f in run["findings"]
    ]


def _metrics(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    common = {k: run[k] for k in ("system", "policy", "mode")}
    return [
        {**common, "name": name, "value": float(value)}
        for name, value in run["metrics"].items()
        if isinstance(value, int | float)
    ]
