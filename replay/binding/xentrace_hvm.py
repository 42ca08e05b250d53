"""Virtual local APICs in stock xentrace: injections, EOIs, TPR, halts (spec M.1).

HVM records name no vCPU: it is the one that runs on the recording CPU, known from scheduler records. Injections that
do not come from the LAPIC (8259, the callback vector) set no ISR bit and are left out.
Xen sources: vmx_intr_assist, svm_intr_assist, hvm_msr_write_intercept, vmx_handle_eoi_write, hvm_hlt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from replay.binding.base import Forward, Records, event
from replay.binding.rows import chosen, last_of_each, renamed
from replay.coverage import Observation

__all__ = ["KEEP", "RUNSTATE", "Binder", "Survey", "survey"]

X2APIC_TPR: Final = 0x808
X2APIC_EOI: Final = 0x80B
LAPIC_TPR: Final = 0xFEE00080
LAPIC_EOI: Final = 0xFEE000B0
#: Confidence of TPR: behind a TPR shadow a guest writes without an exit, so there may be a later value unseen.
CONF_TPR: Final = 80
#: hvm_intsource of TRC_HVM_INTR_WINDOW: the interrupt comes through HVM_PARAM_CALLBACK_IRQ's vector.
SOURCE_VECTOR: Final = 5

_INJ: Final = "TRC_HVM_INJ_VIRQ"
_INTACK: Final = "TRC_HVM_EMUL_PIC_INTACK"
#: Columns of TRC_SCHED_RUNSTATE_CHANGE that are of use, beside those of every record.
RUNSTATE: Final = ("dom", "vcpu", "old_state", "new_state")
KEEP: Final = ("seq", "t_ns", "t_err_ns", "cpu", "offset")


@dataclass(slots=True)
class Survey:
    """What the whole recording says before its events are made."""

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    callback_vectors: frozenset[int] = frozenset()
    usable: bool = False


def survey(records: Records) -> Survey:
    """Whether the virtual LAPICs can be followed, and which vectors bypass them."""
    tables = records.tables()
    result = Survey()
    if _INJ not in tables:
        result.facts["apic"] = "no TRC_HVM_INJ_VIRQ: no HVM guest took an interrupt, or its class was not traced"
        return result
    if "TRC_SCHED_RUNSTATE_CHANGE" not in tables and "TRC_SCHED_SWITCH" not in tables:
        result.facts["apic"] = "no scheduler records, so injections belong to no vCPU; trace class 0x0002f000 too"
        return result
    if not ({"TRC_HVM_MSR_WRITE", "TRC_HVM_IOMEM_WRITE", "TRC_HVM_VLAPIC"} & tables):
        result.facts["apic"] = "injections but no EOI: virtual EOI (APICv) or another event mask"
        return result
    if "TRC_HVM_INTR_WINDOW" in tables:
        for part in records.parts("TRC_HVM_INTR_WINDOW", ("intr_source", "vector")):
            vectors = part.filter(pl.col("intr_source") == SOURCE_VECTOR)["vector"].unique().to_list()
            result.callback_vectors |= frozenset(vectors)
    result.usable = True
    result.facts["callback_vectors"] = sorted(result.callback_vectors)
    result.observed = {
        "lapic.deliver": Observation(100, _INJ),
        "lapic.eoi": Observation(100, "x2APIC EOI (MSR 0x80b), MMIO 0xfee000b0 or TRC_HVM_VLAPIC; vector not recorded"),
        "lapic.tpr": Observation(CONF_TPR, "CR8, MSR 0x808 and MMIO writes"),
        "lapic.idle": Observation(80, "TRC_HVM_HLT"),
    }
    return result


class Binder:
    """Makes the events of one slice after the other; remembers who ran on each CPU."""

    def __init__(self, records: Forward, found: Survey) -> None:
        self.records = records
        self.found = found
        self.tables = records.tables()
        self.running = pl.DataFrame(schema={"seq": pl.UInt64, "cpu": pl.UInt16, "dom": pl.UInt16, "vcpu": pl.UInt16})
        self.switches = self.running
        self.entered = pl.DataFrame(schema={"seq": pl.UInt64, "cpu": pl.UInt16, "entry": pl.UInt64})
        self.acknowledged = pl.DataFrame(schema={"seq": pl.UInt64, "cpu": pl.UInt16})

    def _read(self, name: str, lo: int, hi: int, *columns: str) -> pl.DataFrame | None:
        if name not in self.tables:
            return None
        return self.records.read(name, lo, hi, (*KEEP, *columns))

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi."""
        if not self.found.usable:
            return
        switches = self.switches = self._switches(lo, hi)
        yield from self._created(lo, hi)
        yield from self._injections(lo, hi, switches)
        for frame in self._eois(lo, hi):
            yield event(self._who(frame, switches), "lapic.eoi", "EOI", dom="dom", vcpu="vcpu")
        for frame in self._tpr(lo, hi):
            yield event(
                self._who(frame, switches), "lapic.tpr", "TPR write",
                dom="dom", vcpu="vcpu", val="tpr", conf=CONF_TPR,
            )  # fmt: skip
        halts = self._read("TRC_HVM_HLT", lo, hi, "runnable")
        if halts is not None:
            asleep = chosen(halts, halts["runnable"].cast(pl.Int8) == 0)
            yield event(
                self._who(asleep, switches), "lapic.idle", "TRC_HVM_HLT",
                dom="dom", vcpu="vcpu", conf=80,
            )  # fmt: skip

    def entries(self, lo: int, hi: int) -> pl.DataFrame | None:
        """VM entries of the slice that `events` was last asked for, with their dom and vcpu."""
        frame = self._read("TRC_HVM_VMENTRY", lo, hi)
        return None if frame is None else self._who(frame, self.switches)

    def _switches(self, lo: int, hi: int) -> pl.DataFrame:
        """Who runs on a CPU from a record on: (seq, cpu, dom, vcpu), with the last of the slice before."""
        parts = [self.running]
        runstates = self._read("TRC_SCHED_RUNSTATE_CHANGE", lo, hi, *RUNSTATE)
        if runstates is not None:
            parts.append(chosen(runstates[list(self.running.columns)], runstates["new_state"] == 0))
        continued = self._read("TRC_SCHED_CONTINUE_RUNNING", lo, hi, "dom", "vcpu")
        if continued is not None:
            parts.append(continued[list(self.running.columns)])
        if runstates is None:
            switched = self._read("TRC_SCHED_SWITCH", lo, hi, "next_dom", "next_unit")
            if switched is not None:
                parts.append(renamed(switched, "seq", "cpu", dom="next_dom", vcpu="next_unit"))
        schema = self.running.schema
        switches = pl.concat([p if p.schema == schema else p.cast(schema) for p in parts]).sort("seq")
        self.running = last_of_each(switches, "cpu")
        return switches

    def _who(self, frame: pl.DataFrame, switches: pl.DataFrame) -> pl.DataFrame:
        """Add dom and vcpu; records of which nobody is known are dropped, they belong to no LAPIC."""
        if not frame.height:
            return frame  # without the two columns: no event comes of it
        if not frame["seq"].is_sorted():
            frame = frame.sort("seq")
        joined = frame.join_asof(switches, on="seq", by="cpu", strategy="backward", check_sortedness=False)
        return chosen(joined, joined["dom"] < 0x7FF0)

    def _created(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """A domain that is created in the recording starts with empty LAPICs."""
        frame = self._read("TRC_DOM0_DOM_ADD", lo, hi, "dom")
        if frame is not None:
            yield event(frame, "lapic.reset", "TRC_DOM0_DOM_ADD", cpu=None, dom="dom")

    def _injections(self, lo: int, hi: int, switches: pl.DataFrame) -> Iterator[pl.DataFrame]:
        frame = self._read(_INJ, lo, hi, "vector")
        if frame is None:
            return
        frame = chosen(frame, ~frame["vector"].is_in(list(self.found.callback_vectors)))
        frame = self._without_pic(frame, lo, hi)
        yield event(
            self._who(frame, switches), "lapic.deliver", _INJ,
            dom="dom", vcpu="vcpu", obj="vector",
        )  # fmt: skip

    def _without_pic(self, frame: pl.DataFrame, lo: int, hi: int) -> pl.DataFrame:
        """Leave out what the 8259 acknowledged: the first injection after its INTACK, with no guest entry between."""
        acks = self._read(_INTACK, lo, hi)
        entries = self._read("TRC_HVM_VMENTRY", lo, hi)
        if acks is None:
            return frame
        acks = pl.concat([self.acknowledged, acks[["seq", "cpu"]]])
        injected = renamed(last_of_each(frame, "cpu"), "cpu", last="seq")
        last = last_of_each(acks, "cpu").join(injected, on="cpu", how="left", maintain_order="left")
        self.acknowledged = chosen(last[["seq", "cpu"]], last["seq"] > last["last"].fill_null(0))
        frame = frame.join_asof(
            renamed(acks, "seq", "cpu", ack="seq"), on="seq", by="cpu", strategy="backward", check_sortedness=False
        )
        # Only the first injection after an INTACK can be its own.
        from_pic = frame["ack"].is_not_null() & frame["ack"].is_first_distinct()
        if entries is not None:
            entries = pl.concat([self.entered, renamed(entries, "seq", "cpu", entry="seq")])
            self.entered = last_of_each(entries, "cpu")
            frame = frame.join_asof(entries, on="seq", by="cpu", strategy="backward", check_sortedness=False)
            from_pic &= frame["entry"].is_null() | (frame["ack"] > frame["entry"])
        return chosen(frame, ~from_pic)

    def _eois(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        msr = self._read("TRC_HVM_MSR_WRITE", lo, hi, "msr", "value")
        if msr is not None:
            yield chosen(msr, msr["msr"] == X2APIC_EOI)
        mmio = self._read("TRC_HVM_IOMEM_WRITE", lo, hi, "gpa", "data")
        if mmio is not None:
            yield chosen(mmio, mmio["gpa"] == LAPIC_EOI)
        fast = self._read("TRC_HVM_VLAPIC", lo, hi)
        if fast is not None:
            yield fast

    def _tpr(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        cr8 = self._read("TRC_HVM_CR_WRITE", lo, hi, "cr", "value")
        if cr8 is not None:
            yield chosen(cr8, cr8["cr"] == 8).with_columns(tpr=(pl.col("value") & 0xF) * 16)
        msr = self._read("TRC_HVM_MSR_WRITE", lo, hi, "msr", "value")
        if msr is not None:
            yield chosen(msr, msr["msr"] == X2APIC_TPR).with_columns(tpr=pl.col("value") & 0xFF)
        mmio = self._read("TRC_HVM_IOMEM_WRITE", lo, hi, "gpa", "data")
        if mmio is not None:
            yield chosen(mmio, mmio["gpa"] == LAPIC_TPR).with_columns(tpr=pl.col("data").fill_null(0) & 0xFF)
