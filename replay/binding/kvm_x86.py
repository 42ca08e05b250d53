"""KVM on x86: the guest's local APICs and its IOAPIC (spec M.2).

kvm_apic_accept_irq is the request, kvm_inj_virq the delivery, kvm_eoi and kvm_pv_eoi the EOI; the IOAPIC's pins are in
`kvm_x86_ioapic`. kvm_inj_virq names no vCPU: it is the one that the thread entered or left last. Interrupts of the 8259
are injected too but set no ISR bit: a vector is the local APIC's only if it was accepted there. kvm_apic_accept_irq is
written for every message, so INIT, SIPI, NMI and SMI are told from interrupts by their delivery mode. A kvm_msi_set_irq
is judged by the accept that it causes. Under APICv and AVIC (kvm_apicv_accept_irq) deliveries and most EOIs are not
recorded: then only the IOAPIC is modelled, for the EOIs of level interrupts still leave the guest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from replay.binding import kvm_x86_ioapic
from replay.binding.base import event
from replay.binding.linux_probes import Source
from replay.coverage import Observation

__all__ = ["GUEST", "Binder", "Survey", "survey"]

#: `dom` of the one guest of a KVM host; KVM has no domain numbers.
GUEST: Final = kvm_x86_ioapic.GUEST
#: exit_reason of HLT: VMX 12, SVM 0x78 (`isa` 1 and 2); text has the word.
HALTS: Final = {1: 12, 2: 0x78}
HALT_WORDS: Final = ("HLT", "hlt")
#: Delivery modes of messages that set an IRR bit, and of INIT: binary records hold them shifted, text the word.
INTERRUPTS: Final = ((0x000, 0x100), ("Fixed", "LowPrio"))
INIT: Final = (0x500, "INIT")
#: Guest's register of the task priority in kvm_apic.
TASKPRI: Final = (0x80, "APIC_TASKPRI")

_ACCEPT: Final = "kvm_apic_accept_irq"
_VIRTUAL: Final = "kvm_apicv_accept_irq"
_INJECT: Final = "kvm_inj_virq"
_EOIS: Final = ("kvm_eoi", "kvm_pv_eoi")
_WHO: Final = ("kvm_entry", "kvm_exit")

_UNKNOWN_TPR: Final = "the task priority is unknown: neither INIT nor a write of TPR (kvm:kvm_apic) is recorded"


@dataclass(slots=True)
class Survey:
    """What the whole recording says before its events are made. `lapic`: vectors that were accepted by a LAPIC."""

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    blind: dict[str, str] = field(default_factory=dict)
    lapic: frozenset[int] = frozenset()
    usable: bool = False
    pins: kvm_x86_ioapic.Survey = field(default_factory=kvm_x86_ioapic.Survey)


def survey(source: Source) -> Survey:
    """Whether the guest's local APICs and its IOAPIC can be followed."""
    result = Survey()
    if source.has("kvm_msi_set_irq"):
        messages = source.records.scan("kvm_msi_set_irq").select(pl.len()).collect().item()
        result.facts["kvm_msi"] = f"{messages} messages (kvm_msi_set_irq), judged by the requests that they cause"
    several = False
    if source.has("kvm_entry"):
        seen = source.records.scan("kvm_entry").select("pid", "vcpu_id").drop_nulls().unique().collect()
        several = seen["vcpu_id"].n_unique() != seen.height
    if several:
        if source.has(_INJECT) or source.has(_ACCEPT):
            result.facts["apic"] = "several guests, or vCPU threads that changed: injections belong to no vCPU"
        return result
    _local_apics(source, result)
    result.pins = kvm_x86_ioapic.survey(source)
    result.observed.update(result.pins.observed)
    result.facts.update(result.pins.facts)
    return result


def _local_apics(source: Source, result: Survey) -> None:
    if not source.has(_INJECT) and not source.has(_ACCEPT):
        return
    if source.has(_VIRTUAL):
        result.facts["apic"] = (
            "kvm_apicv_accept_irq: interrupts are delivered by the hardware (APICv, AVIC), which leaves no record of "
            "deliveries and most EOIs"
        )
        result.observed = {"lapic.eoi": Observation(50, "kvm:kvm_eoi of level vectors only: APICv")}
        return
    if not source.has(_ACCEPT):
        result.facts["apic"] = (
            "kvm_inj_virq without kvm_apic_accept_irq: nobody can tell the local APIC's injections from the 8259's; "
            "record kvm:kvm_apic_accept_irq and kvm:kvm_eoi too"
        )
        return
    if not any(source.has(name) for name in _EOIS):
        result.facts["apic"] = "no kvm_eoi: virtual EOI (APICv, AVIC), or the event was not recorded"
        return
    modes = _with(source.records.scan(_ACCEPT), source.fields(_ACCEPT), "dm", "dm_sym", "vec")
    vectors = modes.filter(_interrupt()).select(pl.col("vec").unique()).collect()["vec"].drop_nulls().to_list()
    result.lapic = frozenset(int(v) for v in vectors)
    result.usable = True
    result.observed = {
        "lapic.accept": Observation(100, f"kvm:{_ACCEPT}"),
        "lapic.eoi": Observation(100, "kvm:kvm_eoi, kvm:kvm_pv_eoi"),
    }
    if source.has(_INJECT):
        result.observed["lapic.deliver"] = Observation(80, f"kvm:{_INJECT}, of the vCPU that its thread ran last")
    if source.has("kvm_entry") and source.has("kvm_exit"):
        result.observed["sched.run"] = Observation(100, "kvm:kvm_entry, kvm:kvm_exit")
        started = not modes.filter(_is("dm", INIT)).head(1).collect().is_empty()
        if not started and not _writes_tpr(source):
            result.blind["lapic-irr-stuck"] = _UNKNOWN_TPR
    if source.has("kvm_exit"):
        result.observed["lapic.idle"] = Observation(80, "kvm:kvm_exit, HLT")


def _with(frame: pl.LazyFrame, there: frozenset[str], *names: str) -> pl.LazyFrame:
    """Some columns; null where the table lacks them."""
    return frame.select([pl.col(n) if n in there else pl.lit(None, _NULL.get(n)).alias(n) for n in names])


_NULL: Final[dict[str, Any]] = {"dm_sym": pl.String, "tm_sym": pl.String, "reg_sym": pl.String, "rw_sym": pl.String}


def _is(column: str, what: tuple[int, str]) -> pl.Expr:
    """A field that binary records hold as a number and text as a word."""
    return (pl.col(column) == what[0]).fill_null(False) | (
        pl.col(f"{column}_sym").cast(pl.String) == what[1]
    ).fill_null(False)


def _interrupt() -> pl.Expr:
    """The message sets an IRR bit."""
    numbers, words = INTERRUPTS
    number = pl.col("dm").is_in(list(numbers)).fill_null(False)
    return number | pl.col("dm_sym").cast(pl.String).is_in(list(words)).fill_null(False)


def _writes_tpr(source: Source) -> bool:
    if not source.has("kvm_apic"):
        return False
    frame = _with(source.records.scan("kvm_apic"), source.fields("kvm_apic"), "reg", "reg_sym", "rw", "rw_sym")
    return not frame.filter(_is("reg", TASKPRI) & (pl.col("rw") == 1)).head(1).collect().is_empty()


class Binder:
    """Makes the events of one slice after the other; remembers which vCPU each thread runs."""

    def __init__(self, source: Source, found: Survey) -> None:
        self.source = source
        self.found = found
        self.running: pl.DataFrame | None = None
        self.pins = kvm_x86_ioapic.Binder(source, found.pins)

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi."""
        yield from self.pins.events(lo, hi)
        if not self.found.usable:
            if self.found.observed.get("lapic.eoi") is not None:
                yield from self._eois(lo, hi)
            return
        yield from self._requests(lo, hi)
        yield from self._eois(lo, hi)
        who = self._who(lo, hi)
        injected = self.source.read(_INJECT, lo, hi, "vector", "pid", "soft", "reinjected")
        if injected is not None and who is not None:
            again = pl.col("reinjected").cast(pl.Int8, strict=False).fill_null(0) + pl.col("soft").cast(
                pl.Int8, strict=False
            ).fill_null(0)
            fresh = injected.filter((again == 0) & pl.col("vector").is_in(list(self.found.lapic)))
            fresh = _of_vcpu(fresh, who)
            yield event(
                fresh, "lapic.deliver", _INJECT, dom=GUEST, vcpu=pl.col("vcpu_id"), obj=pl.col("vector"), conf=80
            )
        written = self.source.read("kvm_apic", lo, hi, "pid", "rw", "reg", "reg_sym", "val")
        if written is not None and who is not None:
            tpr = _of_vcpu(written.filter(_is("reg", TASKPRI) & (pl.col("rw") == 1)), who)
            yield event(  # behind a TPR shadow later writes leave no record
                tpr, "lapic.tpr", "kvm_apic", dom=GUEST, vcpu=pl.col("vcpu_id"), val=pl.col("val") & 0xFF, conf=80
            )
        yield from self._runs(lo, hi)

    def _requests(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        accepted = self.source.read(_ACCEPT, lo, hi, "apicid", "vec", "dm", "dm_sym", "tm", "tm_sym")
        if accepted is None:
            return
        # TM is 1, or 0x8000 where the message is an IPI.
        level = (pl.col("tm").cast(pl.Int64).fill_null(0) != 0) | (pl.col("tm_sym").cast(pl.String) == "level")
        yield event(
            accepted.filter(_interrupt()), "lapic.accept", _ACCEPT, cpu=None, dom=GUEST, vcpu=pl.col("apicid"),
            obj=pl.col("vec"), flags=level.fill_null(False),
        )  # fmt: skip
        reset = accepted.filter(_is("dm", INIT))
        yield event(reset, "lapic.reset", _ACCEPT, cpu=None, dom=GUEST, vcpu=pl.col("apicid"), conf=80)

    def _eois(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        for name in _EOIS:
            frame = self.source.read(name, lo, hi, "apicid", "vector")
            if frame is not None:  # vector -1: KVM found none in service
                yield event(frame, "lapic.eoi", name, dom=GUEST, vcpu=pl.col("apicid"), obj=pl.col("vector"))

    def _runs(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """When a vCPU executes, and when it halts."""
        vcpu: dict[str, Any] = {"dom": GUEST, "vcpu": pl.col("vcpu_id")}
        entered = self.source.read("kvm_entry", lo, hi, "vcpu_id")
        left = self.source.read("kvm_exit", lo, hi, "exit_reason", "exit_reason_sym", "isa", "vcpu_id")
        if entered is not None and self.source.has("kvm_exit"):
            yield event(entered.drop_nulls("vcpu_id"), "sched.run", "kvm_entry", **vcpu)
        if left is None:
            return
        left = left.drop_nulls("vcpu_id")
        yield event(left, "sched.stop", "kvm_exit", **vcpu)
        halt = pl.any_horizontal(
            pl.col("exit_reason_sym").cast(pl.String).is_in(list(HALT_WORDS)),
            *((pl.col("isa") == isa) & (pl.col("exit_reason") == reason) for isa, reason in HALTS.items()),
        )
        yield event(left.filter(halt), "lapic.idle", "kvm_exit", **vcpu, conf=80, rank=1)

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


def _of_vcpu(frame: pl.DataFrame, who: pl.DataFrame) -> pl.DataFrame:
    """Records with the vCPU that their thread ran last."""
    joined = frame.join_asof(who, on="seq", by="pid", strategy="backward", check_sortedness=False)
    return joined.filter(pl.col("vcpu_id").is_not_null())
