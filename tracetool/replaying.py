"""Replays of a dataset: which systems, which policies, in which mode, and the record of each run."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from replay.coverage import Coverage, Observation, coverage
from replay.declare import System, UsageError
from replay.sink import KEEP
from replay.systems import SYSTEMS
from tracetool import parallel
from tracetool.answers import Answers
from tracetool.store import Dataset

__all__ = [
    "Choice", "Settings", "blind_share", "checkable", "choose", "choose_recorded", "not_replayed", "observations",
    "replay_dataset", "rules_of",
]  # fmt: skip

#: New objects after which Python looks for cycles while a replay runs.
COLLECT_EVERY: Final = 100_000
#: What pre-passes may unpack of a canonical event.
EVENT_COLUMNS: Final = (
    "seq", "t_ns", "kind", "cpu", "dom", "vcpu", "obj", "tgt", "val", "val2", "flags", "conf",
)  # fmt: skip
#: What pre-passes and the matching of outcomes read of one.
MEASURED_COLUMNS: Final = (*EVENT_COLUMNS, "t_err_ns")


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy as the user named it: for one system only, or for all; `cls` when it is the user's own class, `spec`
    where that can be loaded from."""

    name: str
    system: str | None = None
    cls: type[Any] | None = None
    spec: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a replay was asked to do. `values` is parameter values by system name; `recorded` the policy that really
    ran, by system name, where the user knows it; `keep` findings of each code and severity are listed, the others
    counted."""

    policies: tuple[Choice, ...] = (Choice("current"),)
    systems: tuple[str, ...] = ()
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recorded: Mapping[str, str] = field(default_factory=dict)
    keep: int = KEEP


def choose(spec: str) -> Choice:
    """`current`, `hpet=proposed-keep`, `./mine.py:MyPolicy`; UsageError for anything that does not exist."""
    if ".py:" in spec:
        path, _, name = spec.rpartition(":")
        return _own_policy(Path(path), name)
    system, _, name = spec.rpartition("=")
    if system and system not in SYSTEMS:
        raise UsageError(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
    if system:
        SYSTEMS[system].policy(name)
    elif name not in ("current", "proposed", "any") and not any(name in SYSTEMS[s].policies for s in SYSTEMS):
        known = sorted({p for s in SYSTEMS for p in SYSTEMS[s].policies} | {"current", "proposed"})
        raise UsageError(f"no system has a policy {name!r}; there are {', '.join(known)}")
    return Choice(name, system or None)


def choose_recorded(specs: Iterable[str]) -> dict[str, str]:
    """`--recorded irqflow=edge`: policy by system; UsageError for anything that does not exist."""
    chosen: dict[str, str] = {}
    for spec in specs:
        system, equals, name = spec.partition("=")
        if not equals:
            raise UsageError(f"--recorded wants SYSTEM=POLICY, for instance irqflow=edge, not {spec!r}")
        if system not in SYSTEMS:
            raise UsageError(f"no system {system!r}; there are {', '.join(SYSTEMS)}")
        chosen[system] = SYSTEMS[system].policy(name)
    return chosen


def _own_policy(path: Path, name: str) -> Choice:
    """A class from a file of the user's."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(f"user_policy_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: cannot be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's own code: whatever it raises is theirs to read
        raise UsageError(f"{path}: {type(error).__name__}: {error}") from error
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        raise UsageError(f"{path} has no class {name}")
    system = getattr(cls, "system", None)
    if system not in SYSTEMS:
        raise UsageError(f"{name} must say which system it is for: system = one of {', '.join(SYSTEMS)}")
    return Choice(name, system, cls, f"{path.absolute()}:{name}")


def observations(dataset: Dataset) -> dict[str, Observation]:
    """How well the dataset shows each kind of event."""
    return _observed(dataset.manifest)


def _observed(manifest: Mapping[str, Any]) -> dict[str, Observation]:
    return {k: Observation(o["conf"], o["how"]) for k, o in (manifest.get("observed") or {}).items()}


def rules_of(dataset: Dataset, system: System) -> list[Coverage]:
    """Coverage of a system's rules; without a clock frequency those with a threshold in ns are blind too."""
    return _rules_in(dataset.manifest, system)


def _rules_in(manifest: Mapping[str, Any], system: System) -> list[Coverage]:
    stated = (manifest.get("facts") or {}).get("blind", {})  # what the binding knows that kinds cannot say
    rules = [
        Coverage(c.rule, "blind", stated[c.rule]) if c.rule in stated and c.state != "blind" else c
        for c in coverage(system, _observed(manifest))
    ]
    if (manifest.get("clock") or {}).get("unit", "ns") == "ns":
        return rules
    in_ns = {p.name for p in system.parameters if p.unit == "ns"}
    timed = {code.name for code in system.codes if in_ns & set(code.thresholds)}
    reason = "it has a threshold in ns and the clock's frequency is unknown; give --cpu-hz"
    return [Coverage(c.rule, "blind", reason) if c.rule in timed else c for c in rules]


def checkable(dataset: Dataset) -> dict[str, list[Coverage]]:
    """Coverage of every system of which at least one rule can be decided."""
    rules = {name: rules_of(dataset, SYSTEMS[name]) for name in SYSTEMS}
    return {name: r for name, r in rules.items() if any(c.state != "blind" for c in r)}


def not_replayed(runs: Sequence[Mapping[str, Any]], manifest: Mapping[str, Any]) -> dict[str, list[Coverage]]:
    """Coverage of the systems that no run is about: most can see nothing in the recording. Of a scenario, which has no
    manifest, nothing can be said."""
    if "observed" not in manifest:
        return {}
    done = {run["system"] for run in runs}
    return {name: _rules_in(manifest, SYSTEMS[name]) for name in SYSTEMS if name not in done}


def blind_share(dataset: Dataset) -> float:
    """Share of the recorded time in which at least one CPU's records are missing."""
    span = dataset.manifest.get("span", {})
    start, end = int(span.get("t0_ns", 0)), int(span.get("t1_ns", 0))
    if end <= start:
        return 0.0
    cpus = max(1, len(dataset.manifest.get("cpus", [])))
    covered = 0.0
    by_cpu: dict[int | None, list[tuple[int, int]]] = {}
    for gap in dataset.gaps():
        if gap["t0_ns"] is not None and gap["t1_ns"] is not None:
            by_cpu.setdefault(gap["cpu"], []).append((gap["t0_ns"], gap["t1_ns"]))
    for cpu, intervals in by_cpu.items():
        reach = start
        for lo, hi in sorted(intervals):
            covered += max(0, hi - max(lo, reach)) * (cpus if cpu is None else 1)
            reach = max(reach, hi)
    return min(1.0, covered / ((end - start) * cpus))


def replay_dataset(
    dataset: Dataset,
    settings: Settings,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    jobs: int | None = 1,
    answers: Answers | None = None,
) -> list[dict[str, Any]]:
    """Run every system under every policy asked for; returns run records (see `results.run_record`).

    Without `settings.systems` all that can be checked are run. The recorded policy is verified against the recording;
    another policy is a what-if on the recorded stimuli, with calibration and horizon. `progress` is called with what is
    done, and how many of how many events. With `jobs` above 1, or None and a large dataset, systems are replayed in
    processes of their own; the records are the same. `answers`: what earlier replays of the dataset found.
    """
    can = checkable(dataset)
    names = list(settings.systems) or list(can)
    for name in names:
        if name not in SYSTEMS:
            raise UsageError(f"no system {name!r}; there are {', '.join(SYSTEMS)}")
    from tracetool.session import Session  # which imports this module

    sessions = {name: Session(dataset, SYSTEMS[name], settings, progress, answers) for name in names}
    new = [name for name in names if not sessions[name].is_known()]
    jobs = parallel.usual_jobs(dataset, len(new)) if jobs is None else min(jobs, len(new))
    done: dict[str, list[dict[str, Any]]] = {}
    if jobs > 1 and parallel.can_part(settings):
        parts = parallel.replay_systems(dataset, settings, new, jobs, progress, answers)
        done = dict(zip(new, parts, strict=True))
    with _rarely_collected():
        return [record for name in names for record in (done[name] if name in done else sessions[name].records())]


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """A replay makes many objects and hardly a cycle: looking for cycles as often as usual takes an eighth of it."""
    usual = gc.get_threshold()
    gc.set_threshold(COLLECT_EVERY, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)
