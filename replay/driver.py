"""Runs a machine under a policy over canonical events."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from replay.bodies import Measured
from replay.declare import Config, System, UsageError
from replay.effects import Effects
from replay.events import Batch
from replay.machine import Machine
from replay.sink import KEEP, Doubt, Finding, Sink

__all__ = ["Replay", "Run", "run_beside", "run_machine", "run_replays"]


@dataclass(slots=True)
class Run:
    """What one machine said under one policy."""

    system: str
    policy: str
    mode: str  # "verify" | "what-if"
    findings: list[Finding]
    metrics: dict[str, int]
    #: Findings that were counted, not kept: by code and severity.
    suppressed: dict[tuple[str, str], int] = field(default_factory=dict)
    horizon_ns: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    effects: Effects = field(default_factory=Effects)


def _metrics(machine: Machine) -> dict[str, int]:
    """The machine's numbers; those of a what-if on a recording say how many bodies came from where."""
    bodies = machine.measured.bodies if machine.measured is not None else None
    return machine.metrics() if bodies is None else {**machine.metrics(), **bodies.metrics()}


def _where(error: BaseException) -> str:
    """File and line in which a user's own class failed."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}: " if frames else ""


class Replay:
    """One machine under one policy, fed a batch at a time; `columns` and `ignored` say what it wants of each."""

    def __init__(
        self,
        system: System,
        policy: str,
        *,
        config: Config,
        closed: bool,
        sub: str = "",
        init: Mapping[str, Any] | None = None,
        policy_class: type[Any] | None = None,
        from_boot: bool = True,
        observed: frozenset[str] | None = None,
        measured: Measured | None = None,
        keep: int = KEEP,
        doubt: Doubt | None = None,
    ) -> None:
        """Arguments as those of `run_machine`."""
        self.system = system
        self.policy = policy
        self.policy_class = policy_class
        self.closed = closed
        self.sink = Sink(closed=closed, keep=keep, doubt=doubt)
        with self._blame():
            chosen = (policy_class or system.policies[policy])()
            self.machine: Machine = system.make(chosen, config, self.sink, sub)
            self.machine.from_boot = from_boot
            self.machine.observed = observed
            if measured is not None:
                self.machine.measured = measured.fresh()
                init = init or measured.init
            self.machine.load(init or {})
            self.columns = tuple(self.machine.columns)
            self.ignored = self.machine.ignores()

    @contextmanager
    def _blame(self) -> Iterator[None]:
        """Whatever a user's own class raises is a UsageError that says where."""
        try:
            yield
        except Exception as error:
            if self.policy_class is None or isinstance(error, UsageError):
                raise
            raise UsageError(f"policy {self.policy}: {_where(error)}{type(error).__name__}: {error}") from error

    def feed(self, batch: Batch) -> None:
        """The next events."""
        with self._blame():
            self.machine.feed(batch)

    def finish(self, t_end: int) -> Run:
        """What the machine said, at `t_end` (ns)."""
        with self._blame():
            self.machine.finish(t_end)
            self.sink.settle()
        return Run(
            effects=self.machine.effects,
            system=self.system.name,
            policy=self.policy,
            mode="what-if" if self.closed else "verify",
            findings=self.sink.findings,
            metrics=_metrics(self.machine),
            suppressed=self.sink.suppressed,
            extra=dict(self.machine.extra),
        )


def run_replays(
    replays: Sequence[Replay],
    batches: Iterable[pa.Table] | Callable[[tuple[str, ...], frozenset[str]], Iterable[pa.Table]],
    t_end: int | None = None,
) -> list[Run]:
    """Feed the same events to all, read once where all want the same of them; see `run_machine`."""
    first = replays[0]
    if callable(batches) and any((r.columns, r.ignored) != (first.columns, first.ignored) for r in replays):
        return [run for replay in replays for run in run_replays([replay], batches, t_end)]
    last = 0
    for table in batches(first.columns, first.ignored) if callable(batches) else batches:
        if table.num_rows:
            batch = Batch.of(table, first.columns)
            for replay in replays:
                replay.feed(batch)
            last = table["t_ns"][-1].as_py()
    return [replay.finish(last if t_end is None else t_end) for replay in replays]


def run_beside(replays: Sequence[Replay], parts: Iterable[tuple[int, pa.Table]], t_end: int | None = None) -> list[Run]:
    """Feed each its own events, of which `parts` says whose they are; see `run_machine`."""
    last = [0] * len(replays)
    for number, table in parts:
        replays[number].feed(Batch.of(table, replays[number].columns))
        last[number] = table["t_ns"][-1].as_py()
    return [replay.finish(t if t_end is None else t_end) for replay, t in zip(replays, last, strict=True)]


def run_machine(
    system: System,
    policy: str,
    batches: Iterable[pa.Table] | Callable[[tuple[str, ...], frozenset[str]], Iterable[pa.Table]],
    *,
    config: Config,
    closed: bool,
    sub: str = "",
    init: Mapping[str, Any] | None = None,
    t_end: int | None = None,
    policy_class: type[Any] | None = None,
    from_boot: bool = True,
    observed: frozenset[str] | None = None,
    measured: Measured | None = None,
    keep: int = KEEP,
    doubt: Doubt | None = None,
) -> Run:
    """Replay batches of canonical events (schema `events.SCHEMA`, in order) and return findings and metrics.

    `batches` may be a function of the columns that the machine unpacks and the kinds that it ignores: a reader then
    leaves out the other columns (but t_ns) and these kinds.
    `closed`: only stimuli are fed and the policy decides; otherwise the recording's outcomes are checked.
    `t_end` (ns) defaults to the time of the last event. `from_boot` False makes all state unknown at the start (U1);
    scenarios are complete by convention. `observed` names the kinds that the recording can show (None: all).
    `measured` is what a what-if run takes from the recording besides stimuli: bodies, lags, initial state (spec 0.6).
    `keep` and `doubt`: see `Sink`.
    """
    replay = Replay(
        system, policy, config=config, closed=closed, sub=sub, init=init, policy_class=policy_class,
        from_boot=from_boot, observed=observed, measured=measured, keep=keep, doubt=doubt,
    )  # fmt: skip
    return run_replays([replay], batches, t_end)[0]
