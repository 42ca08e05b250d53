"""KVM on Arm64: what arrives at a guest's virtual GIC (spec M.2).

vgic_update_irq_pending and kvm_irq_line are the inputs of the distributor that KVM emulates. List registers,
acknowledges and EOIs are not recorded (the guest reaches GICC and GICH without an exit), and KVM moves a queued
interrupt by rules of its own (ap_list), so nothing but the stimuli is claimed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from replay.binding.base import event
from replay.binding.linux_probes import Source
from replay.coverage import Observation

__all__ = ["Binder", "Survey", "survey"]

_UPDATE: Final = "vgic_update_irq_pending"
_LINE: Final = "kvm_irq_line"
#: `type` of kvm_irq_line (KVM_ARM_IRQ_TYPE_SPI) and the first INTID of shared interrupts.
SPI: Final = 1


@dataclass(slots=True)
class Survey:
    """What the whole recording says before its events are made."""

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    table: str = ""


def survey(source: Source) -> Survey:
    """Which of the two inputs is recorded; the inner one sees every change of the outer one."""
    result = Survey()
    result.table = next((t for t in (_UPDATE, _LINE) if source.has(t)), "")
    if result.table:
        result.observed["vgic.phys_irq"] = Observation(100 if result.table == _UPDATE else 80, f"kvm:{result.table}")
        result.facts["vgic"] = "KVM records what arrives; list registers, acknowledges and EOIs are not recorded"
    return result


class Binder:
    """Makes the events of one slice after the other."""

    def __init__(self, source: Source, found: Survey) -> None:
        self.source = source
        self.found = found

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi: an interrupt becomes pending."""
        if self.found.table == _UPDATE:
            frame = self.source.read(_UPDATE, lo, hi, "vcpu_id", "irq", "level")
            if frame is not None:
                raised = frame.filter(pl.col("level").cast(pl.Int64) != 0)
                yield event(raised, "vgic.phys_irq", _UPDATE, vcpu=pl.col("vcpu_id"), obj=pl.col("irq"))
        elif self.found.table == _LINE:
            frame = self.source.read(_LINE, lo, hi, "type", "irq_num", "level", "vcpu_idx")
            if frame is not None:
                raised = frame.filter((pl.col("level") != 0) & (pl.col("irq_num") >= 0))
                private = pl.when(pl.col("type").cast(pl.Int64) != SPI).then(pl.col("vcpu_idx"))
                yield event(raised, "vgic.phys_irq", _LINE, vcpu=private, obj=pl.col("irq_num"), conf=80)
