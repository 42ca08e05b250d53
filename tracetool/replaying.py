"""Replays of a dataset: which systems, which policies, in which mode, and the record of each run."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa

from replay.bodies import Measured
from replay.coverage import CHECKED_FROM, Coverage, Observation, coverage
from replay.declare import Config, System, UsageError
from replay.driver import Run, run_machine
from replay.events import KIND_ID, KINDS, NONE
from replay.parting import part
from replay.sink import KEEP, Finding, Sink
from replay.systems import SYSTEMS
from tracetool import calibrate, parallel
from tracetool.results import SEVERITIES, run_record
from tracetool.store import Dataset

__all__ = [
    "Choice", "Settings", "blind_share", "checkable", "choose", "choose_recorded", "observations", "replay_dataset",
    "rules_of",
]  # fmt: skip

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
    dataset: Dataset,
    settings: Settings,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    jobs: int | None = 1,
) -> list[dict[str, Any]]:
    """Run every system under every policy asked for; returns run records (see `results.run_record`).

    Without `settings.systems` all that can be checked are run. The recorded policy is verified against the recording;
    another policy is a what-if on the recorded stimuli, with calibration and horizon. `progress` is called with what is
    done, and how many of how many events. With `jobs` above 1, or None and a large dataset, systems are replayed in
    processes of their own; the records are the same.
    """
    can = checkable(dataset)
    names = list(settings.systems) or list(can)
    for name in names:
        if name not in SYSTEMS:
            raise UsageError(f"no system {name!r}; there are {', '.join(SYSTEMS)}")
    jobs = parallel.usual_jobs(dataset, len(names)) if jobs is None else min(jobs, len(names))
    if jobs > 1 and parallel.can_part(settings):
        return [r for part in parallel.replay_systems(dataset, settings, names, jobs, progress) for r in part]
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
        self.keep = settings.keep
        self.facts: Mapping[str, Any] = dataset.manifest.get("facts", {})
        self.stated: Mapping[str, Any] = self.facts.get(f"{system.name}_config", {})
        self.asked = settings.values.get(system.name, {})
        self.recorded, self.why_recorded = self._recorded(settings)
        self.observed = observations(dataset)
        self.rules = rules_of(dataset, system)
        self.blind = blind_share(dataset)
        self.end_ns = int(dataset.manifest.get("span", {}).get("t1_ns") or 0)
        #: The user wants to know what would have been with another stimulus.
        self.changed = any(name in self.asked for name in system.changes)
        self._opened: Run | None = None
        self._verified: Run | None = None
        self._closed: Run | None = None
        self._calibration: dict[str, Any] | None = None
        self._measured: Measured | None = None

    def _recorded(self, settings: Settings) -> tuple[str, str]:
        """The policy that the recorded machine ran, and how that is known."""
        name = self.system.name
        if name in settings.recorded:
            return settings.recorded[name], "stated (--recorded)"
        fact = self.facts.get(f"{name}_recorded")
        if isinstance(fact, Mapping) and fact.get("policy") in self.system.policies:
            return str(fact["policy"]), str(fact.get("why", ""))
        alone = len(self.system.policies) == 1  # nothing to choose from, nothing to assume
        return self.system.recorded, "" if alone else "assumed; --recorded says otherwise"

    def config(self, *, closed: bool, calibrating: bool = False) -> Config:
        """Parameters: declared, measured (what-if), found by the binding, the user's; later ones win. The run that is
        calibrated knows no changed stimulus."""
        measured = self.measured().values if closed else {}
        asked = {k: v for k, v in self.asked.items() if not calibrating or k not in self.system.changes}
        return Config(self.system.parameters, {**measured, **self.stated, **asked})

    def run(self, choice: Choice) -> dict[str, Any] | None:
        """The record of one run; None when the system does not know the policy of that name."""
        if choice.cls is not None:
            run = self.what_if(choice.name, choice.cls)
        else:
            name = self.system.roles.get(choice.name, choice.name)
            if choice.name == "current" and choice.system is None and not self.changed:
                name = self.recorded  # "current" alone is whatever the recording comes from
            if name not in self.system.policies and len(self.system.policies) == 1:
                name = self.recorded
            if name not in self.system.policies:
                return None
            run = self.verify() if name == self.recorded and not self.changed else self.what_if(name, None)
        blind = set(self.facts.get("blind", {}))
        if self.dataset.manifest.get("clock", {}).get("unit") == "ticks":
            blind = {c.rule for c in self.rules if c.state == "blind"}
        if blind:
            run.findings = [f for f in run.findings if f.code.name not in blind]
            run.suppressed = {key: n for key, n in run.suppressed.items() if key[0] not in blind}
        run.extra["recorded"] = {"policy": self.recorded, "why": self.why_recorded}
        return run_record(
            run, self.system, self.config(closed=run.mode == "what-if"), self.rules,
            locate=self.locate, blind_share=self.blind,
        )  # fmt: skip

    def doubt(self, findings: Sequence[Finding]) -> None:
        """A finding is as sure as the weakest of its evidence and of the kinds that its rule needs (spec I.4). One that
        is inferred for that reason is one severity less. Doing it twice changes nothing."""
        of_rule = {c.rule: c.conf for c in self.rules if c.state != "blind"}
        seqs = {f.seq for f in findings} | {e.seq for f in findings for e in f.evidence if e.seq is not None}
        of_event = self.confidences(seqs - {NONE}) if seqs else {}
        for finding in findings:
            steps = (finding.seq, *(e.seq for e in finding.evidence if e.seq is not None))
            sure = min(of_rule.get(finding.code.name, 100), *(of_event.get(seq, 100) for seq in steps))
            if sure < finding.conf:
                if sure < CHECKED_FROM <= finding.conf:
                    finding.severity = SEVERITIES[min(SEVERITIES.index(finding.severity) + 1, len(SEVERITIES) - 1)]
                finding.conf = sure

    def confidences(self, seqs: Iterable[int]) -> dict[int, int]:
        """Confidence of those canonical events that are not recorded themselves."""
        found = self.dataset.events_of(seqs, ("conf",))
        return {seq: conf for frame in found for seq, conf in frame.filter(pl.col("conf") < 100).iter_rows()}

    def verify(self) -> Run:
        """The recording's own outcomes against the rules, and against what the model predicts (spec 0.5)."""
        if self._verified is None:
            self._verified = self.opened()
            parted = self.parted()
            self._verified.findings += parted.findings
            self._verified.suppressed.update(parted.suppressed)
        return self._verified

    def opened(self) -> Run:
        """The recording's own outcomes against the rules."""
        if self._opened is None:
            self._opened = self._run(
                self.recorded, None, self.config(closed=False), closed=False, kinds=self.system.kinds
            )
        return self._opened

    def parted(self) -> Sink:
        """Outcomes that only the recording or only its model has. A model that is not calibrated has no say."""
        system = self.system
        sink = Sink(closed=False, keep=self.keep, doubt=self.doubt)
        if system.effect is None or not system.outcomes or not any(k in self.observed for k in system.outcomes):
            return sink
        if calibrate.blind_reason(system, self.observed, self.measured()):
            return sink
        base = self.recorded_what_if()
        if self.calibration()["state"] != "calibrated":
            return sink
        config = self.config(closed=True, calibrating=True)
        lost = [(g["t0_ns"], g["t1_ns"]) for g in self.dataset.gaps() if None not in (g["t0_ns"], g["t1_ns"])]
        recorded = self._read(system.outcomes)
        if (only := self.measured().only) is not None:
            recorded = recorded.filter(pl.col("obj").is_in(only))
        part(
            base.effects, recorded, system.effect, system.effect_words,
            match_ns=config.integer("match_ns"), end_ns=self.end_ns, reach_ns=self.measured().reach_ns, lost=lost,
            subject=system.effect_object, fields=system.effect_fields,
            inferred=self.measured().inferred or calibrate.inferred(system, self.observed), sink=sink,
        )  # fmt: skip
        return sink

    def what_if(self, name: str, cls: type[Any] | None) -> Run:
        """The recorded stimuli under another policy, compared with the recorded policy on the same stimuli."""
        blind = calibrate.blind_reason(self.system, self.observed, self.measured())
        found = self.calibration()
        if blind:
            start = int(self.dataset.manifest.get("span", {}).get("t0_ns") or 0)
            run = Run(self.system.name, name, "what-if", [], {}, horizon_ns=start)
        else:
            run = self._run(name, cls, self.config(closed=True), closed=True, kinds=self._stimuli())
            run.horizon_ns = calibrate.horizon(self.recorded_what_if(), run, self.end_ns)
        reasons = list(found["reasons"])
        if name in self.measured().undecided:
            reasons.append(self.measured().undecided[name])
        state = "uncalibrated" if reasons else "calibrated"
        run.extra["calibration"] = {**found, "state": state, "reasons": reasons}
        if reasons and any(c.state != "blind" for c in self.rules):
            calibrate.withdraw(run, reasons)
        return run

    def recorded_what_if(self) -> Run:
        """What-if under the recorded policy: the self-test of spec 0.5."""
        if self._closed is None:
            config = self.config(closed=True, calibrating=True)
            self._closed = self._run(self.recorded, None, config, closed=True, kinds=self._stimuli())
        return self._closed

    def calibration(self) -> dict[str, Any]:
        """Recorded and predicted numbers of the recorded policy."""
        if self._calibration is None:
            blind = calibrate.blind_reason(self.system, self.observed, self.measured())
            predicted = {} if blind else self.recorded_what_if().metrics
            self._calibration = calibrate.calibration(
                self.system, self.opened().metrics, predicted, self.measured(), blind=blind
            )
        return self._calibration

    def measured(self) -> Measured:
        """What the system's pre-pass found in the recording."""
        if self._measured is None:
            stated = Config(self.system.parameters, {**self.stated, **self.asked})
            measure = self.system.measure
            self._measured = measure(self._read, stated, frozenset(self.observed)) if measure else Measured()
        return self._measured

    def _stimuli(self) -> tuple[str, ...]:
        if self.system.stimuli is not None:
            return self.system.stimuli
        fed = ("stimulus", "context", "response", "marker")
        return tuple(k for k in self.system.kinds if KINDS[KIND_ID[k]].role in fed)

    def _run(
        self, name: str, cls: type[Any] | None, config: Config, *, closed: bool, kinds: Sequence[str]
    ) -> Run:
        sub = str(self.facts.get(f"{self.system.name}_sub", ""))
        if closed and self.system.measure is not None:
            sub = sub or "retimed"
        return run_machine(
            self.system,
            name,
            lambda columns: self._batches(f"{self.system.name} {name}", list(kinds), columns),
            config=config,
            closed=closed,
            sub=sub,
            t_end=self.dataset.manifest.get("span", {}).get("t1_ns"),
            policy_class=cls,
            from_boot=False,
            observed=frozenset(self.observed),
            measured=self.measured() if closed else None,
            keep=self.keep,
            doubt=None if closed else self.doubt,
        )

    def _read(self, kinds: Sequence[str], limit: int | None = None) -> pl.DataFrame:
        """Events of some kinds in one frame, in order; about the first `limit` of them."""
        text = pl.col("kind").cast(pl.String)
        frames = [self.dataset.events().select(MEASURED_COLUMNS).head(0).collect().with_columns(text)]
        rows = 0
        for batch in self.dataset.event_batches(list(kinds), MEASURED_COLUMNS):
            frame = pl.from_arrow(batch.select(MEASURED_COLUMNS))
            assert isinstance(frame, pl.DataFrame)
            frames.append(frame.with_columns(text))
            rows += frame.height
            if limit is not None and rows >= limit:
                break
        return pl.concat(frames, how="vertical_relaxed").with_columns(pl.col("seq").set_sorted())

    def _batches(self, what: str, kinds: Sequence[str], columns: Sequence[str]) -> Iterator[pa.Table]:
        total = int(self.dataset.manifest.get("events") or 1)
        for batch in self.dataset.event_batches(kinds, (*columns, "seq") if self.progress else columns):
            yield batch
            if self.progress:
                self.progress(what, int(batch["seq"][-1].as_py()), total)

    def locate(self, seqs: Iterable[int]) -> dict[int, tuple[str, int]]:
        """Source and offset of canonical events."""
        found = self.dataset.events_of(seqs, ("src", "origin.offset"))
        text = pl.col("src").cast(pl.String)
        return {
            seq: (src, offset)
            for frame in found
            for seq, src, offset in frame.select("seq", text, pl.col("origin").struct.field("offset")).iter_rows()
        }
