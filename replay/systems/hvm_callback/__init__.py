"""PV-on-HVM callback through a GSI or PCI INTx: Xen's platform interrupt (spec S2).

What a binding gives beyond the vocabulary: `val` of via.upcall_clear is the flag that the handler found (1 or 0), if
recorded; `val2` of via.line is gsi_assert_count after the change; `tgt` of via.rte_write the destination vcpu, if
resolved; `val` of sched.stop the runstate (1 runnable, 2 blocked, 3 offline); `val` of via.set_param 0 none, 1 GSI,
2 PCI INTx, 3 vector; evtchn.handled inside a handler is work that it did. A recording in which neither via.rte_write
nor via.isr_begin names the callback's vector needs `--set callback.vector=…`.
"""

from __future__ import annotations

from typing import Any

from replay.declare import Config, System
from replay.events import KINDS
from replay.sink import Sink
from replay.systems.hvm_callback.calibration import (
    DRIVES,
    OUTCOMES,
    effect,
    effect_fields,
    effect_object,
    effect_words,
    measure,
)
from replay.systems.hvm_callback.codes import CODES, PARAMETERS
from replay.systems.hvm_callback.machine import CallbackMachine
from replay.systems.hvm_callback.policies import AlwaysCheck, Applied, Current, Proposed

__all__ = ["SYSTEM"]

_OTHERS = ("evtchn.handled", "lapic.intr_window", "lapic.reset", "lapic.idle", "sched.run", "sched.stop", "trace.lost")


def _make(policy: Any, config: Config, sink: Sink, sub: str) -> CallbackMachine:
    return CallbackMachine(policy, config, sink)


SYSTEM = System(
    name="callback",
    section="S2",
    title="PV-on-HVM callback through GSI / PCI INTx",
    codes=CODES,
    parameters=PARAMETERS,
    policies={"current": Current, "proposed": Proposed, "always-check": AlwaysCheck, "applied": Applied},
    roles={},
    make=_make,
    kinds=tuple(k.name for k in KINDS if k.sys == "callback" or k.name in _OTHERS),
    recorded="applied",
    calibrate=("injections", "callback_eois"),
    drives=DRIVES,
    measure=measure,
    outcomes=OUTCOMES,
    effect=effect,
    effect_words=effect_words,
    effect_object=effect_object,
    effect_fields=effect_fields,
    changes=("route_vcpu",),
    zeros={
        "spurious_injections": "via-spurious-inject",
        "storm_max": "via-inject-storm",
        "unmatched_injections": "via-spurious-inject",
        "repeated_injections": "via-spurious-inject",
        "eois_unmatched": "via-eoi-unmatched",
    },
)
