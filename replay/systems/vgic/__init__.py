"""ARM GICv2 virtual interrupts: retargeting while in flight (spec S3)."""

from __future__ import annotations

from typing import Any

from replay.declare import Config, System
from replay.events import KINDS
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.vgic.calibration import (
    CALIBRATE,
    DRIVES,
    OUTCOMES,
    effect,
    effect_fields,
    effect_object,
    effect_words,
    measure,
)
from replay.systems.vgic.codes import CODES, PARAMETERS
from replay.systems.vgic.machine import VgicMachine
from replay.systems.vgic.policies import Maintenance, Merged, Merged2017, Naive, PatchV8
from replay.systems.vgic.recorded import RecordedVgic
from replay.systems.vgic.retimed import RetimedVgic

__all__ = ["SYSTEM"]


def _make(policy: Any, config: Config, sink: Sink, sub: str) -> Machine:
    if not sink.closed:
        return RecordedVgic(policy, config, sink)
    # Scenarios have their own latencies; `sub` "retimed" is a what-if on a recording.
    return RetimedVgic(policy, config, sink) if sub == "retimed" else VgicMachine(policy, config, sink)


SYSTEM = System(
    name="vgic",
    section="S3",
    title="ARM GICv2 virtual interrupts: retargeting while in flight",
    codes=CODES,
    parameters=PARAMETERS,
    policies={policy.name: policy for policy in (PatchV8, Maintenance, Merged, Merged2017, Naive)},
    roles={"current": "patch-v8", "proposed": "maintenance"},
    make=_make,
    kinds=tuple(k.name for k in KINDS if k.sys in ("vgic", "sched", "trace")),
    recorded="merged-2017",  # what every Xen since 4.10 does
    calibrate=CALIBRATE,
    drives=DRIVES,
    measure=measure,
    outcomes=OUTCOMES,
    effect=effect,
    effect_words=effect_words,
    effect_object=effect_object,
    effect_fields=effect_fields,
)
