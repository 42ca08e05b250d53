"""Linux interrupts: handler entry and exit, vectors of the local APIC, flow handlers (spec M.2, M.3).

irq:irq_handler_entry/exit give one pair for each action of a line. irq_vectors:*_entry are recorded after ack_APIC_irq
(arch/x86/kernel/smp.c, apic/apic.c), so the EOI of those vectors lies right before the entry record; the thermal,
threshold and deferred-error vectors write theirs after the exit record. Device vectors are left out of the local APIC:
whether their flow acks before or after the handler is not in the recording.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from replay.binding.base import event
from replay.binding.linux_probes import Source
from replay.coverage import Observation
from replay.hardware import irq_desc

__all__ = ["FLOWS", "Binder", "Survey", "survey"]

#: irq_vectors events whose handler has written EOI before the entry record, and those that write it after the exit.
ACKED_BEFORE: Final = (
    "local_timer", "x86_platform_ipi", "irq_work", "call_function", "call_function_single", "reschedule",
)  # fmt: skip
ACKED_AFTER: Final = ("threshold_apic", "deferred_error_apic", "thermal_apic")

#: Flow handlers (kernel/irq/chip.c): whether their irqs are per-cpu.
FLOWS: Final = {
    "handle_edge_irq": False,
    "handle_level_irq": False,
    "handle_fasteoi_irq": False,
    "handle_percpu_irq": True,
    "handle_percpu_devid_irq": True,
}
#: A probe's irq argument is believed when this share of its hits agrees with the next handler on the CPU.
TRUSTED_SHARE: Final = 0.9

#: Bits of irq_common_data.state_use_accessors and of core_internal_state (Linux 6.1 and 6.12).
_STATE_BITS: Final = {1 << 18: irq_desc.INPROGRESS, 1 << 17: irq_desc.MASKED, 1 << 16: irq_desc.DISABLED}
_ISTATE_BITS: Final = {0x200: irq_desc.PENDING, 0x40: irq_desc.REPLAY, 0x20: irq_desc.ONESHOT}

_ENTRY: Final = "irq_handler_entry"
_EXIT: Final = "irq_handler_exit"


@dataclass(slots=True)
class Survey:
    """What the whole recording says before its events are made. `flows`: flow probes whose irq can be believed."""

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    blind: dict[str, str] = field(default_factory=dict)
    flows: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()


def survey(source: Source) -> Survey:
    """Which interrupts can be followed."""
    result = Survey()
    if source.has(_ENTRY) and source.has(_EXIT):
        for kind, how in (
            ("irqdesc.entry", _ENTRY), ("irqdesc.exit", _EXIT),
            ("flow.handler.begin", _ENTRY), ("flow.handler.end", _EXIT),
        ):  # fmt: skip
            result.observed[kind] = Observation(100, f"irq:{how}")
    flows = []
    for symbol in FLOWS:
        if source.probed(symbol) and source.argument(symbol, "irq"):
            share = _agreement(source, symbol)
            if share >= TRUSTED_SHARE:
                flows.append(symbol)
            else:
                source.distrusted[symbol] = f"its irq agrees with the handler that follows in {share:.0%} of its hits"
    result.flows = tuple(flows)
    if result.flows:
        how = ", ".join(result.flows)
        result.observed["irqdesc.state"] = Observation(80, f"probes on {how}: the flow tells whether it is per-cpu")
    else:
        reason = "whether an irq is per-cpu is not recorded (probe the flow handlers)"
        result.blind = {"flow-concurrent-handler": reason}
    result.vectors = tuple(v for v in (*ACKED_BEFORE, *ACKED_AFTER) if source.has(f"{v}_entry"))
    if result.vectors:
        result.observed["lapic.deliver"] = Observation(80, "irq_vectors:*_entry; device vectors are left out")
        result.observed["lapic.exit"] = Observation(100, "irq_vectors:*_exit")
        result.observed["lapic.eoi"] = Observation(50, "the kernel's own order of EOI and entry record, not recorded")
    return result


def _agreement(source: Source, symbol: str) -> float:
    """Share of hits whose irq is that of the next handler on the CPU: fixed offsets may read garbage."""
    hits = source.probe(symbol, 0, 1 << 62, "irq")
    entries = source.read(_ENTRY, 0, 1 << 62, "irq")
    if hits is None or entries is None:
        return 1.0  # nothing contradicts it
    joined = hits.select("seq", "cpu", "irq").join_asof(
        entries.select("seq", "cpu", next="irq"), on="seq", by="cpu", strategy="forward", check_sortedness=False
    ).drop_nulls("next")  # fmt: skip
    return float((joined["irq"] == joined["next"]).mean() or 0.0) if joined.height else 1.0  # type: ignore[arg-type]


class Binder:
    """Makes the events of one slice after the other."""

    def __init__(self, source: Source, found: Survey) -> None:
        self.source = source
        self.found = found

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi."""
        entries = self.source.read(_ENTRY, lo, hi, "irq")
        if entries is not None:
            entries = entries.filter(pl.col("irq") >= 0)
            yield event(entries, "irqdesc.entry", _ENTRY, obj=pl.col("irq"))
            yield event(entries, "flow.handler.begin", _ENTRY, obj=pl.col("irq"), rank=1)
        exits = self.source.read(_EXIT, lo, hi, "irq", "ret")
        if exits is not None:
            exits = exits.filter(pl.col("irq") >= 0)
            yield event(exits, "flow.handler.end", _EXIT, obj=pl.col("irq"), val=pl.col("ret"))
            yield event(exits, "irqdesc.exit", _EXIT, obj=pl.col("irq"), val=pl.col("ret"), rank=1)
        yield from self._vectors(lo, hi)
        yield from self._states(lo, hi)

    def _vectors(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        for name in self.found.vectors:
            vector = {"obj": pl.col("vector")}
            entered = self.source.read(f"{name}_entry", lo, hi, "vector")
            if entered is not None:
                yield event(entered, "lapic.deliver", f"{name}_entry", **vector, conf=80)
                if name in ACKED_BEFORE:
                    yield event(entered, "lapic.eoi", f"{name}_entry", **vector, conf=50, rank=1)
            left = self.source.read(f"{name}_exit", lo, hi, "vector")
            if left is not None:
                yield event(left, "lapic.exit", f"{name}_exit", **vector)
                if name in ACKED_AFTER:
                    yield event(left, "lapic.eoi", f"{name}_exit", **vector, conf=50, rank=1)
        if self.found.vectors:
            idle = self.source.read("cpu_idle", lo, hi, "state")
            if idle is not None:
                asleep = idle.filter(pl.col("state").cast(pl.Int64) != 0xFFFFFFFF)
                yield event(asleep, "lapic.idle", "cpu_idle", conf=80)

    def _states(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """What the flow handlers' arguments say of the irq_desc."""
        for symbol in self.found.flows:
            frame = self.source.probe(symbol, lo, hi, "irq", "istate", "istd", "depth")
            if frame is None:
                continue
            per_cpu = irq_desc.PER_CPU if FLOWS[symbol] else 0
            word = pl.lit(per_cpu, pl.Int64)
            for column, bits in (("istd", _STATE_BITS), ("istate", _ISTATE_BITS)):
                for bit, meaning in bits.items():
                    word = word + pl.when((pl.col(column).fill_null(0) & bit) != 0).then(meaning).otherwise(0)
            yield event(
                frame, "irqdesc.state", symbol, obj=pl.col("irq"), val=word, val2=pl.col("depth"), conf=80, rank=-1
            )
