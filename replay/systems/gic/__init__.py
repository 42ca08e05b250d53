"""GICv2 CPU interfaces: acknowledge, end of interrupt, deactivate (spec S6.3)."""

from __future__ import annotations

from typing import Any

from replay.declare import Config, System
from replay.events import KINDS
from replay.sink import Sink
from replay.systems.gic.codes import CODES, PARAMETERS
from replay.systems.gic.machine import GicMachine
from replay.systems.gic.policies import Hardware

__all__ = ["SYSTEM"]


def _make(policy: Any, config: Config, sink: Sink, sub: str) -> GicMachine:
    return GicMachine(config, sink)


SYSTEM = System(
    name="gic",
    section="S6.3",
    title="GICv2 CPU interfaces",
    codes=CODES,
    parameters=PARAMETERS,
    policies={"any": Hardware},
    roles={"current": "any", "proposed": "any"},
    make=_make,
    kinds=tuple(k.name for k in KINDS if k.sys in ("gic", "sched", "trace")),
    recorded="any",
)
