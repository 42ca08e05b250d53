"""Runs a machine under a policy over canonical events."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from replay.bodies import Measured
from replay.declare import Config, System, UsageError
from replay.effects import Effects
from replay.events import Batch
from replay.machine import Machine
from replay.sink import KEEP, Doubt, Finding, Sink

__all__ = ["Run", "run_machine"]


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
    sink = Sink(closed=closed, keep=keep, doubt=doubt)
    try:
        chosen = (policy_class or system.policies[policy])()
        machine = system.make(chosen, config, sink, sub)
        machine.from_boot = from_boot
        machine.observed = observed
        if measured is not None:
            machine.measured = measured.fresh()
            init = init or measured.init
        machine.load(init or {})
        last = 0
        for batch in batches(tuple(machine.columns), machine.ignores()) if callable(batches) else batches:
            if batch.num_rows:
                machine.feed(Batch.of(batch, machine.columns))
                last = batch["t_ns"][-1].as_py()
        machine.finish(last if t_end is None else t_end)
        sink.settle()
    except Exception as error:
        if policy_class is None or isinstance(error, UsageError):
            raise
        raise UsageError(f"policy {policy}: {_where(error)}{type(error).__name__}: {error}") from error
    return Run(
        effects=machine.effects,
        system=system.name,
        policy=policy,
        mode="what-if" if closed else "verify",
        findings=sink.findings,
        metrics=_metrics(machine),
        suppressed=sink.suppressed,
        extra=dict(machine.extra),
    )
