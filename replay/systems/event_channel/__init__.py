"""Event channels: lost wake-ups between hypervisor and SMP guest, two-level and FIFO ABI (spec S5)."""

from __future__ import annotations

from typing import Any

from replay.declare import Config, System, UsageError
from replay.events import KINDS
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.event_channel.calibration import (
    CALIBRATE,
    DRIVES,
    OUTCOMES,
    STIMULI,
    doubt,
    effect,
    effect_fields,
    effect_object,
    effect_words,
    measure,
)
from replay.systems.event_channel.codes import CODES, PARAMETERS
from replay.systems.event_channel.fifo import FifoMachine
from replay.systems.event_channel.mixed import MixedMachine
from replay.systems.event_channel.policies import POLICIES
from replay.systems.event_channel.retimed import RetimedChannels
from replay.systems.event_channel.short_cuts import QuickTwoLevelMachine

__all__ = ["SYSTEM"]


def _make(policy: Any, config: Config, sink: Sink, sub: str) -> Machine:
    if sub == "fifo":
        return FifoMachine(policy, config, sink)
    if not hasattr(policy, "on_unmask"):
        known = ", ".join(name for name in POLICIES if name != "any")
        raise UsageError(f"the two-level ABI needs a policy that says how a port is unmasked: {known}")
    if sub == "mixed":
        return MixedMachine(policy, config, sink)
    # Scenarios have their own latencies; `sub` "retimed" is a what-if on a recording.
    return RetimedChannels(policy, config, sink) if sub == "retimed" else QuickTwoLevelMachine(policy, config, sink)


SYSTEM = System(
    name="evtchn",
    section="S5",
    title="Event channels",
    codes=CODES,
    parameters=PARAMETERS,
    policies=POLICIES,
    roles={"current": "current", "proposed": "proposed"},
    make=_make,
    kinds=tuple(k.name for k in KINDS if k.sys in ("evtchn", "sched", "trace")),
    recorded="modern",
    stimuli=STIMULI,
    calibrate=CALIBRATE,
    doubt=doubt,
    drives=DRIVES,
    measure=measure,
    outcomes=OUTCOMES,
    effect=effect,
    effect_words=effect_words,
    effect_object=effect_object,
    effect_fields=effect_fields,
)
