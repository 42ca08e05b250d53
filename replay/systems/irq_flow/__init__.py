"""Linux irq flow for event channels: who loses an edge, and checks of irq_desc (spec S4, S6.5)."""

from __future__ import annotations

from typing import Any

from replay.declare import Config, System
from replay.events import KINDS
from replay.sink import Sink
from replay.systems.irq_flow.calibration import (
    DRIVES,
    OUTCOMES,
    effect,
    effect_fields,
    effect_object,
    effect_words,
    measure,
)
from replay.systems.irq_flow.codes import CODES, PARAMETERS
from replay.systems.irq_flow.machine import IrqFlowMachine
from replay.systems.irq_flow.policies import POLICIES

__all__ = ["SYSTEM"]


def _make(policy: Any, config: Config, sink: Sink, sub: str) -> IrqFlowMachine:
    return IrqFlowMachine(policy, config, sink)


SYSTEM = System(
    name="irqflow",
    section="S4",
    title="Linux irq flow for event channels",
    codes=CODES,
    parameters=PARAMETERS,
    policies=POLICIES,
    roles={"current": "level", "proposed": "edge"},
    make=_make,
    kinds=tuple(k.name for k in KINDS if k.sys in ("irqflow", "trace") or k.name == "evtchn.bind"),
    recorded="edge",
    calibrate=("handler_runs", "acked", "handler_time_ns"),
    drives=DRIVES,
    measure=measure,
    outcomes=OUTCOMES,
    effect=effect,
    effect_words=effect_words,
    effect_object=effect_object,
    effect_fields=effect_fields,
)
