"""HPET broadcast: few comparators wake many idle CPUs (spec S1)."""

from __future__ import annotations

from typing import Any

from replay.declare import Config, System
from replay.events import KINDS
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.hpet_broadcast.codes import CODES, PARAMETERS
from replay.systems.hpet_broadcast.machine import HpetBroadcast
from replay.systems.hpet_broadcast.mwait import MwaitHandshake
from replay.systems.hpet_broadcast.policies import Current, Proposed, ProposedKeep, Upstream2025
from replay.systems.hpet_broadcast.recorded import RecordedBroadcast

__all__ = ["SYSTEM"]


def _make(policy: Any, config: Config, sink: Sink, sub: str) -> Machine:
    if sub == "mwait":
        return MwaitHandshake(policy, config, sink)
    if not sink.closed:
        return RecordedBroadcast(policy, config, sink)
    return HpetBroadcast(policy, config, sink)


SYSTEM = System(
    name="hpet",
    section="S1",
    title="HPET broadcast for idle CPUs",
    codes=CODES,
    parameters=PARAMETERS,
    policies={p.name: p for p in (Current, Proposed, ProposedKeep, Upstream2025)},
    roles={},
    make=_make,
    kinds=tuple(k.name for k in KINDS if k.sys in ("hpet", "trace")),
    stimuli=("idle.enter", "idle.exit", "idle.break", "isr.begin", "isr.end"),
    calibrate=("hpet_irqs",),
    drives=("idle.enter", "idle.exit"),
)
