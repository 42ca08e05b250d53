"""One system on one dataset: its runs and their records, each made once or found among earlier answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import polars as pl
import pyarrow as pa

from replay.bodies import Measured
from replay.coverage import CHECKED_FROM
from replay.declare import Config, System
from replay.driver import Replay, Run, run_replays
from replay.effects import Effects
from replay.events import KIND_ID, KINDS
from replay.parting import part
from replay.sink import Finding, Sink
from tracetool import calibrate
from tracetool.answers import Answer, Answers
from tracetool.asked import Choice, Settings
from tracetool.results import SEVERITIES, run_record, seqs_of
from tracetool.seen import blind_share, observations, rules_of
from tracetool.store import Dataset

__all__ = ["MEASURED_COLUMNS", "Session"]

#: What pre-passes and the matching of outcomes read of a canonical event.
MEASURED_COLUMNS: Final = (
    "seq", "t_ns", "kind", "cpu", "dom", "vcpu", "obj", "tgt", "val", "val2", "flags", "conf", "t_err_ns",
)  # fmt: skip


class Session:
    """One system on one dataset; the verify and calibration runs are made once and shared."""

    def __init__(
        self,
        dataset: Dataset,
        system: System,
        settings: Settings,
        progress: Callable[[str, int, int], None] | None = None,
        answers: Answers | None = None,
    ) -> None:
        self.dataset = dataset
        self.answers = answers
        self.policies = [c for c in settings.policies if c.system in (None, system.name)]
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
        #: Whatever else decides an answer; the dataset and the program are known to `answers`.
        self.about = (system.name, sorted(self.asked.items()), self.recorded, self.why_recorded, self.keep)
        self._opened: Run | None = None
        self._verified: Run | None = None
        self._closed: Effects | None = None
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

    def records(self) -> list[dict[str, Any]]:
        """The records of all runs asked for, of the policies that the system has."""
        return [record for choice in self.policies if (record := self.record(choice)) is not None]

    def is_known(self) -> bool:
        """Whether earlier replays answer all that is asked."""
        names = [self.policy_of(choice) for choice in self.policies if choice.cls is None]
        if self.answers is None or len(names) < len(self.policies):
            return False
        return all(self.answers.has(*self.about, "run", name) for name in names if name is not None)

    def policy_of(self, choice: Choice) -> str | None:
        """The policy's own name; None when the system does not know one of that name."""
        name = self.system.roles.get(choice.name, choice.name)
        if choice.name == "current" and choice.system is None and not self.changed:
            name = self.recorded  # "current" alone is whatever the recording comes from
        if name not in self.system.policies and len(self.system.policies) == 1:
            name = self.recorded
        return name if name in self.system.policies else None

    def answer(self, *asked: str | None) -> Answer | None:
        """What an earlier replay found, with the same settings."""
        return None if self.answers is None else self.answers.get(*self.about, *asked)

    def keep_answer(self, found: Mapping[str, Any], arrays: bytes, *asked: str | None) -> None:
        """For later replays."""
        if self.answers is not None:
            self.answers.put(found, arrays, *self.about, *asked)

    def record(self, choice: Choice) -> dict[str, Any] | None:
        """The record of one run; None when the system does not know the policy of that name."""
        if choice.cls is not None:
            return self.run(self.what_if(choice.name, choice.cls))
        name = self.policy_of(choice)
        if name is None:
            return None
        known = self.answer("run", name)
        if known is not None:
            return dict(known[0])
        made = self.run(self.verify() if name == self.recorded and not self.changed else self.what_if(name, None))
        self.keep_answer(made, b"", "run", name)
        return made

    def run(self, run: Run) -> dict[str, Any]:
        """The record of a run."""
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
        steps = seqs_of(findings)
        of_event = self.confidences(steps) if steps else {}
        for finding in findings:
            sure = min(of_rule.get(finding.code.name, 100), of_event.get(finding.seq, 100))
            for step in finding.evidence:
                if step.seq in of_event and of_event[step.seq] < sure:
                    sure = of_event[step.seq]
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
            self.found(*self._run([self.recording()], self.system.kinds))
        assert self._opened is not None
        return self._opened

    def recording(self) -> Replay:
        """The recorded policy, to be fed what was recorded."""
        return self._replay(self.recorded, None, self.config(closed=False), closed=False)

    def found(self, run: Run) -> None:
        """What the recorded policy's own run said."""
        self._opened = run
        self.keep_answer(run.metrics, b"", "metrics")

    def is_to_verify(self) -> bool:
        """Whether `records` will need the recorded policy's own run."""
        if self.changed or self._opened is not None:
            return False
        mine = any(choice.cls is None and self.policy_of(choice) == self.recorded for choice in self.policies)
        return mine and self.answer("run", self.recorded) is None

    def recorded_metrics(self) -> Mapping[str, int]:
        """Numbers of the recording itself."""
        known = self.answer("metrics") if self._opened is None else None
        return known[0] if known is not None else self.opened().metrics

    def parted(self) -> Sink:
        """Outcomes that only the recording or only its model has. A model that is not calibrated has no say."""
        system = self.system
        sink = Sink(closed=False, keep=self.keep, doubt=self.doubt)
        if system.effect is None or not system.outcomes or not any(k in self.observed for k in system.outcomes):
            return sink
        if calibrate.blind_reason(system, self.observed, self.measured()):
            return sink
        if self.calibration()["state"] != "calibrated":
            return sink
        config = self.config(closed=True, calibrating=True)
        lost = [(g["t0_ns"], g["t1_ns"]) for g in self.dataset.gaps() if None not in (g["t0_ns"], g["t1_ns"])]
        recorded = self._read(system.outcomes)
        if (only := self.measured().only) is not None:
            recorded = recorded.filter(pl.col("obj").is_in(only))
        part(
            self.recorded_effects(), recorded, system.effect, system.effect_words,
            match_ns=config.integer("match_ns"), end_ns=self.end_ns, reach_ns=self.measured().reach_ns, lost=lost,
            subject=system.effect_object, fields=system.effect_fields,
            inferred=self.measured().inferred or calibrate.inferred(system, self.observed), sink=sink,
        )  # fmt: skip
        return sink

    def what_if(self, name: str, cls: type[Any] | None) -> Run:
        """The recorded stimuli under another policy, compared with the recorded policy on the same stimuli."""
        blind = calibrate.blind_reason(self.system, self.observed, self.measured())
        if blind:
            found = self.calibration()
            start = int(self.dataset.manifest.get("span", {}).get("t0_ns") or 0)
            run = Run(self.system.name, name, "what-if", [], {}, horizon_ns=start)
        else:
            replays = [self._replay(name, cls, self.config(closed=True), closed=True)]
            if not self._find_calibration():  # the recorded policy's own what-if reads the same events
                replays.append(self._recorded_what_if())
            run, *base = self._run(replays, self._stimuli())
            found = self.calibration(*base)
            run.horizon_ns = calibrate.horizon(self.recorded_effects(), run.effects, self.end_ns)
        reasons = list(found["reasons"])
        if name in self.measured().undecided:
            reasons.append(self.measured().undecided[name])
        state = "uncalibrated" if reasons else "calibrated"
        run.extra["calibration"] = {**found, "state": state, "reasons": reasons}
        if reasons and any(c.state != "blind" for c in self.rules):
            calibrate.withdraw(run, reasons)
        return run

    def recorded_effects(self) -> Effects:
        """Effects of the what-if under the recorded policy: the self-test of spec 0.5."""
        self.calibration()
        assert self._closed is not None
        return self._closed

    def calibration(self, base: Run | None = None) -> dict[str, Any]:
        """Recorded and predicted numbers of the recorded policy; `base` is its what-if, if that was run already."""
        if not self._find_calibration():
            blind = calibrate.blind_reason(self.system, self.observed, self.measured())
            recorded: Mapping[str, int] = {}
            predicted: Mapping[str, int] = {}
            self._closed = Effects()
            if not blind:
                if base is None:
                    (base,) = self._run([self._recorded_what_if()], self._stimuli())
                recorded, predicted, self._closed = self.recorded_metrics(), base.metrics, base.effects
            self._calibration = calibrate.calibration(self.system, recorded, predicted, self.measured(), blind=blind)
            whats, arrays = self._closed.stored()
            self.keep_answer({"calibration": self._calibration, "effects": whats}, arrays, "calibration")
        assert self._calibration is not None
        return self._calibration

    def _find_calibration(self) -> bool:
        """Whether the calibration is known, here or from an earlier replay."""
        if self._calibration is None and (known := self.answer("calibration")) is not None:
            self._calibration = dict(known[0]["calibration"])
            self._closed = Effects.restored(known[0]["effects"], known[1])
        return self._calibration is not None

    def _recorded_what_if(self) -> Replay:
        """What every what-if is compared with."""
        return self._replay(self.recorded, None, self.config(closed=True, calibrating=True), closed=True)

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

    def _replay(self, name: str, cls: type[Any] | None, config: Config, *, closed: bool) -> Replay:
        """A machine under a policy, to be run."""
        sub = str(self.facts.get(f"{self.system.name}_sub", ""))
        if closed and self.system.measure is not None:
            sub = sub or "retimed"
        return Replay(
            self.system,
            name,
            config=config,
            closed=closed,
            sub=sub,
            policy_class=cls,
            from_boot=False,
            observed=frozenset(self.observed),
            measured=self.measured() if closed else None,
            keep=self.keep,
            doubt=None if closed else self.doubt,
        )

    def _run(self, replays: Sequence[Replay], kinds: Sequence[str]) -> list[Run]:
        """Events of some kinds for machines that want the same; their names are those of the first."""
        what = f"{self.system.name} {replays[0].policy}"
        return run_replays(
            replays,
            lambda columns, ignored: self._batches(what, [kind for kind in kinds if kind not in ignored], columns),
            self.dataset.manifest.get("span", {}).get("t1_ns"),
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
