"""Replays of a dataset: which systems, which policies, in which mode, and the record of each run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa

from replay.coverage import Coverage, Observation, coverage
from replay.declare import Config, System, UsageError
from replay.driver import Run, run_machine
from replay.events import KIND_ID, KINDS
from replay.generic import UNCALIBRATED
from replay.sink import Finding
from replay.systems import SYSTEMS
from tracetool.results import run_record
from tracetool.store import Dataset

__all__ = ["Choice", "Settings", "blind_share", "checkable", "choose", "observations", "replay_dataset", "rules_of"]

#: Share by which a what-if run of the recorded policy may miss the recording's numbers.
CALIBRATION_TOLERANCE: Final = 0.25
#: What machines may unpack of a canonical event.
EVENT_COLUMNS: Final = (
    "seq", "t_ns", "kind", "cpu", "dom", "vcpu", "obj", "tgt", "val", "val2", "flags", "conf",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Choice:
    """A policy as the user named it: for one system only, or for all; `cls` when it is the user's own class."""

    name: str
    system: str | None = None
    cls: type[Any] | None = None


@dataclass(frozen=True, slots=True)
class Settings:
    """What a replay was asked to do. `values` is parameter values by system name."""

    policies: tuple[Choice, ...] = (Choice("current"),)
    systems: tuple[str, ...] = ()
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


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
    return Choice(name, system, cls)


def observations(dataset: Dataset) -> dict[str, Observation]:
    """How well the dataset shows each kind of event."""
    return {k: Observation(o["conf"], o["how"]) for k, o in dataset.manifest.get("observed", {}).items()}


def rules_of(dataset: Dataset, system: System) -> list[Coverage]:
    """Coverage of a system's rules; without a clock frequency those with a threshold in ns are blind too."""
    stated = dataset.manifest.get("facts", {}).get("blind", {})  # what the binding knows that kinds cannot say
    rules = [
        Coverage(c.rule, "blind", stated[c.rule]) if c.rule in stated and c.state != "blind" else c
        for c in coverage(system, observations(dataset))
    ]
    if dataset.manifest.get("clock", {}).get("unit", "ns") == "ns":
        return rules
    in_ns = {p.name for p in system.parameters if p.unit == "ns"}
    timed = {code.name for code in system.codes if in_ns & set(code.thresholds)}
    reason = "it has a threshold in ns and the clock's frequency is unknown; give --cpu-hz"
    return [Coverage(c.rule, "blind", reason) if c.rule in timed else c for c in rules]


def checkable(dataset: Dataset) -> dict[str, list[Coverage]]:
    """Coverage of every system of which at least one rule can be decided."""
    rules = {name: rules_of(dataset, SYSTEMS[name]) for name in SYSTEMS}
    return {name: r for name, r in rules.items() if any(c.state != "blind" for c in r)}


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
    dataset: Dataset, settings: Settings, progress: Callable[[str, int, int], None] | None = None
) -> list[dict[str, Any]]:
    """Run every system under every policy asked for; returns run records (see `results.run_record`).

    Without `settings.systems` all that can be checked are run. The recorded policy is verified against the recording;
    another policy is a what-if on the recorded stimuli, with calibration and horizon. `progress` is called with what is
    done, and how many of how many events.
    """
    can = checkable(dataset)
    names = list(settings.systems) or list(can)
    for name in names:
        if name not in SYSTEMS:
            raise UsageError(f"no system {name!r}; there are {', '.join(SYSTEMS)}")
    records = []
    for name in names:
        session = _Session(dataset, SYSTEMS[name], settings, progress)
        for choice in settings.policies:
            if choice.system not in (None, name):
                continue
            record = session.run(choice)
            if record is not None:
                records.append(record)
    return records


class _Session:
    """One system on one dataset; the verify and calibration runs are made once and shared."""

    def __init__(
        self,
        dataset: Dataset,
        system: System,
        settings: Settings,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.dataset = dataset
        self.progress = progress
        self.system = system
        facts = dataset.manifest.get("facts", {})
        values = {**facts.get(f"{system.name}_config", {}), **settings.values.get(system.name, {})}
        self.config = Config(system.parameters, values)
        self.observed = observations(dataset)
        self.rules = rules_of(dataset, system)
        self.blind = blind_share(dataset)
        self._verified: Run | None = None
        self._calibrated: Run | None = None

    def run(self, choice: Choice) -> dict[str, Any] | None:
        """The record of one run; None when the system does not know the policy of that name."""
        if choice.cls is not None:
            run = self.what_if(choice.name, choice.cls)
        else:
            name = self.system.roles.get(choice.name, choice.name)
            if choice.name == "current" and choice.system is None:
                name = self.system.recorded  # "current" alone is whatever the recording comes from
            if name not in self.system.policies and len(self.system.policies) == 1:
                name = self.system.recorded
            if name not in self.system.policies:
                return None
            run = self.verify() if name == self.system.recorded else self.what_if(name, None)
        blind = set(self.dataset.manifest.get("facts", {}).get("blind", {}))
        if self.dataset.manifest.get("clock", {}).get("unit") == "ticks":
            blind = {c.rule for c in self.rules if c.state == "blind"}
        if blind:
            run.findings = [f for f in run.findings if f.code.name not in blind]
        return run_record(
            run, self.system, self.config, self.rules, locate=self.locate, blind_share=self.blind
        )

    def verify(self) -> Run:
        """The recording's own outcomes against the rules."""
        if self._verified is None:
            self._verified = self._run(self.system.recorded, None, closed=False, kinds=self.system.kinds)
        return self._verified

    def what_if(self, name: str, cls: type[Any] | None) -> Run:
        """The recorded stimuli under another policy, compared with the recorded policy on the same stimuli."""
        base = self.recorded_what_if()
        run = self._run(name, cls, closed=True, kinds=self._stimuli())
        run.horizon_ns = _horizon(base, run, self.dataset)
        run.extra["calibration"] = calibration = self.calibration(base)
        if calibration["state"] == "uncalibrated" and any(c.state != "blind" for c in self.rules):
            run.findings.append(
                Finding(
                    UNCALIBRATED, UNCALIBRATED.severity, 0,
                    expected=f"numbers of the recording within {CALIBRATION_TOLERANCE:.0%}",
                    observed=", ".join(
                        f"{k}: recorded {a}, predicted {b}" for k, (a, b) in calibration["metrics"].items()
                    ),
                    conf=100,
                )
            )  # fmt: skip
        return run

    def recorded_what_if(self) -> Run:
        """What-if under the recorded policy: the self-test of spec 0.5."""
        if self._calibrated is None:
            self._calibrated = self._run(self.system.recorded, None, closed=True, kinds=self._stimuli())
        return self._calibrated

    def calibration(self, predicted: Run) -> dict[str, Any]:
        """Recorded and predicted numbers of the recorded policy."""
        recorded = self.verify()
        pairs = {
            name: (recorded.metrics[name], predicted.metrics[name])
            for name in self.system.calibrate
            if name in recorded.metrics and name in predicted.metrics
        }
        good = pairs and all(abs(a - b) <= CALIBRATION_TOLERANCE * max(a, 1) for a, b in pairs.values())
        return {
            "state": "calibrated" if good else "uncalibrated",
            "tolerance": CALIBRATION_TOLERANCE,
            "metrics": {k: list(v) for k, v in pairs.items()},
        }

    def _stimuli(self) -> tuple[str, ...]:
        if self.system.stimuli is not None:
            return self.system.stimuli
        fed = ("stimulus", "context", "response", "marker")
        return tuple(k for k in self.system.kinds if KINDS[KIND_ID[k]].role in fed)

    def _run(self, name: str, cls: type[Any] | None, *, closed: bool, kinds: Sequence[str]) -> Run:
        span = self.dataset.manifest.get("span", {})
        return run_machine(
            self.system,
            name,
            self._batches(f"{self.system.name} {name}", list(kinds), EVENT_COLUMNS),
            config=self.config,
            closed=closed,
            sub=str(self.dataset.manifest.get("facts", {}).get(f"{self.system.name}_sub", "")),
            t_end=span.get("t1_ns"),
            policy_class=cls,
            from_boot=False,
            observed=frozenset(self.observed),
        )

    def _batches(self, what: str, kinds: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
        total = int(self.dataset.manifest.get("events") or 1)
        for batch in self.dataset.event_batches(kinds, columns):
            yield batch
            if self.progress:
                self.progress(what, int(batch["seq"][-1].as_py()), total)

    def locate(self, seqs: Iterable[int]) -> dict[int, tuple[str, int]]:
        """Source and offset of canonical events."""
        wanted = sorted(seqs)
        frame = (
            self.dataset.events()
            .filter(pl.col("seq").is_in(wanted))
            .select("seq", pl.col("src").cast(pl.String), pl.col("origin").struct.field("offset"))
            .collect()
        )
        return {seq: (src, offset) for seq, src, offset in frame.iter_rows()}


def _horizon(base: Run, run: Run, dataset: Dataset) -> int:
    """Until when the recording is evidence for `run`: the first effect that differs from the recorded policy's."""
    end = int(dataset.manifest.get("span", {}).get("t1_ns", 0))
    for one, other in zip(base.effects, run.effects, strict=False):
        if one != other:
            return min(one[0], other[0])
    shorter, longer = sorted((base.effects, run.effects), key=len)
    return longer[len(shorter)][0] if len(longer) > len(shorter) else end
