"""KVM on x86: the guests' local APICs (spec M.2).

kvm_apic_accept_irq is the request, kvm_inj_virq the delivery, kvm_eoi and kvm_pv_eoi the EOI. kvm_inj_virq names no
vCPU: it is the one that the thread entered or left last. Interrupts of the 8259 are injected too but set no ISR bit:
a vector is the local APIC's only if it was accepted there. Under APICv and AVIC deliveries are not recorded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from replay.binding.base import event
from replay.binding.linux_probes import Source
from replay.coverage import Observation

__all__ = ["GUEST", "Binder", "Survey", "survey"]

#: `dom` of the one guest of a KVM host; KVM has no domain numbers.
GUEST: Final = 1
#: exit_reason of HLT: VMX 12, SVM 0x78 (`isa` 1 and 2).
HALTS: Final = {1: 12, 2: 0x78}
#: TM field of kvm_apic_accept_irq: level.
LEVEL: Final = 1

_ACCEPT: Final = "kvm_apic_accept_irq"
_INJECT: Final = "kvm_inj_virq"
_EOIS: Final = ("kvm_eoi", "kvm_pv_eoi")
_WHO: Final = ("kvm_entry", "kvm_exit")


@dataclass(slots=True)
class Survey:
    """What the whole recording says before its events are made. `lapic`: vectors that were accepted by a LAPIC."""

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    lapic: frozenset[int] = frozenset()
    usable: bool = False


def survey(source: Source) -> Survey:
    """Whether the guest's local APICs can be followed."""
    result = Survey()
    if not source.has(_INJECT) and not source.has(_ACCEPT):
        return result
    if source.has("kvm_entry"):
        seen = source.records.scan("kvm_entry").select("pid", "vcpu_id").drop_nulls().unique().collect()
        if seen["vcpu_id"].n_unique() != seen.height:
            result.facts["apic"] = "several guests, or vCPU threads that changed: injections belong to no vCPU"
            return result
    if not source.has(_ACCEPT):
        result.facts["apic"] = (
            "kvm_inj_virq without kvm_apic_accept_irq: nobody can tell the local APIC's injections from the 8259's; "
            "record kvm:kvm_apic_accept_irq and kvm:kvm_eoi too"
        )
        return result
    if not any(source.has(name) for name in _EOIS):
        result.facts["apic"] = "no kvm_eoi: virtual EOI (APICv, AVIC), or the event was not recorded"
        return result
    vectors = source.records.scan(_ACCEPT).select(pl.col("vec").unique()).collect()["vec"].drop_nulls().to_list()
    result.lapic = frozenset(int(v) for v in vectors)
    result.usable = True
    result.observed = {
        "lapic.accept": Observation(100, f"kvm:{_ACCEPT}"),
        "lapic.eoi": Observation(100, "kvm:kvm_eoi, kvm:kvm_pv_eoi"),
    }
    if source.has(_INJECT):
        result.observed["lapic.deliver"] = Observation(80, f"kvm:{_INJECT}, of the vCPU that its thread ran last")
    if source.has("kvm_exit"):
        result.observed["lapic.idle"] = Observation(80, "kvm:kvm_exit, HLT")
    return result


class Binder:
    """Makes the events of one slice after the other; remembers which vCPU each thread runs."""

    def __init__(self, source: Source, found: Survey) -> None:
        self.source = source
        self.found = found
        self.running: pl.DataFrame | None = None

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi."""
        if not self.found.usable:
            return
        accepted = self.source.read(_ACCEPT, lo, hi, "apicid", "vec", "tm")
        if accepted is not None:
            yield event(
                accepted, "lapic.accept", _ACCEPT, cpu=None, dom=GUEST, vcpu=pl.col("apicid"), obj=pl.col("vec"),
                flags=(pl.col("tm").fill_null(0).cast(pl.Int64) & LEVEL),
            )  # fmt: skip
        for name in _EOIS:
            frame = self.source.read(name, lo, hi, "apicid", "vector")
            if frame is not None:
                yield event(frame, "lapic.eoi", name, dom=GUEST, vcpu=pl.col("apicid"), obj=pl.col("vector"))
        who = self._who(lo, hi)
        injected = self.source.read(_INJECT, lo, hi, "vector", "pid", "soft", "reinjected")
        if injected is not None and who is not None:
            again = pl.col("reinjected").cast(pl.Int8, strict=False).fill_null(0) + pl.col("soft").cast(
                pl.Int8, strict=False
            ).fill_null(0)
            fresh = injected.filter((again == 0) & pl.col("vector").is_in(list(self.found.lapic)))
            fresh = fresh.join_asof(who, on="seq", by="pid", strategy="backward", check_sortedness=False)
            fresh = fresh.filter(pl.col("vcpu_id").is_not_null())
            yield event(
                fresh, "lapic.deliver", _INJECT, dom=GUEST, vcpu=pl.col("vcpu_id"), obj=pl.col("vector"), conf=80
            )
        left = self.source.read("kvm_exit", lo, hi, "exit_reason", "isa", "vcpu_id")
        if left is not None:
            halt = pl.any_horizontal(
                *((pl.col("isa") == isa) & (pl.col("exit_reason") == reason) for isa, reason in HALTS.items())
            )
            halted = left.filter(halt & pl.col("vcpu_id").is_not_null())
            yield event(halted, "lapic.idle", "kvm_exit", dom=GUEST, vcpu=pl.col("vcpu_id"), conf=80)

    def _who(self, lo: int, hi: int) -> pl.DataFrame | None:
        """vCPU of each thread from a record on."""
        parts = [] if self.running is None else [self.running]
        for name in _WHO:
            frame = self.source.read(name, lo, hi, "pid", "vcpu_id")
            if frame is not None:
                parts.append(frame.select("seq", "pid", pl.col("vcpu_id").cast(pl.Int64)).drop_nulls())
        if not parts:
            return None
        pool = pl.concat(parts).sort("seq")
        self.running = pool.group_by("pid", maintain_order=True).last().select(pool.columns)
        return pool
