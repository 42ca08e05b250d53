"""x86 interrupt hardware: local APICs (spec S6.1), IOAPIC pins (S6.2), HPET block (S6.4)."""

from __future__ import annotations

from typing import Any

from replay.declare import Config, System
from replay.events import KINDS
from replay.sink import Sink
from replay.systems.apic import hpet_block_codes, ioapic_codes
from replay.systems.apic.codes import CODES, PARAMETERS
from replay.systems.apic.machine import ApicMachine
from replay.systems.apic.short_cuts import QuickApicMachine

__all__ = ["SYSTEM", "Hardware"]


class Hardware:
    """Hardware has no policy; the name `any` stands for it."""

    name = "any"


def _make(policy: Any, config: Config, sink: Sink, sub: str) -> ApicMachine:
    return QuickApicMachine(config, sink)


SYSTEM = System(
    name="apic",
    section="S6.1",
    title="Local APIC, IOAPIC and HPET block",
    codes=CODES + ioapic_codes.CODES + hpet_block_codes.CODES,
    parameters=PARAMETERS + ioapic_codes.PARAMETERS + hpet_block_codes.PARAMETERS,
    policies={"any": Hardware},
    roles={"current": "any", "proposed": "any"},
    make=_make,
    kinds=tuple(k.name for k in KINDS if k.sys in ("apic", "sched", "trace")),
    recorded="any",
)
