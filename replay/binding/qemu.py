"""QEMU device-trace logs to canonical events: what the emulated interrupt hardware was told and what it did.

The log's line order is authoritative; stamps are the host's, in microseconds. Which half applies shows in the tables:
x86 (LAPIC, IOAPIC, HPET block) in `qemu_x86`, Arm (GICv2, and the virtual GIC that it hosts) in `qemu_gic`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Protocol

import polars as pl
import pyarrow as pa

from replay.binding import qemu_gic, qemu_x86
from replay.binding.base import Assembler, Bound, Context, Records, slices
from replay.coverage import Observation

__all__ = ["FORMATS", "bind"]

#: Formats of the reader whose tables this binding understands.
FORMATS: Final = ("qemu",)


class _Binder(Protocol):
    """One half of the binding."""

    observed: dict[str, Observation]
    facts: dict[str, Any]

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Canonical events of the lines `lo` to `hi`."""
        ...


def bind(records: Records, context: Context) -> Bound:
    """Survey the log once, then give its events slice by slice in bounded memory."""
    binders: list[_Binder] = []
    if qemu_x86.TABLES & records.tables():
        binders.append(qemu_x86.Binder(records))
    if qemu_gic.TABLES & records.tables():
        binders.append(qemu_gic.Binder(records))
    observed: dict[str, Observation] = {"trace.lost": Observation(100, "damage found by the reader")}
    facts: dict[str, Any] = {}
    for binder in binders:
        observed.update(binder.observed)
        facts.update(binder.facts)
    return Bound(observed, facts, _batches(records, context, binders))


def _batches(records: Records, context: Context, binders: list[_Binder]) -> Iterator[pa.Table]:
    # A log's lines are in order and no event lies before its line, but for inferred ones of the virtual GIC.
    assembler = Assembler(context.source, hold_ns=qemu_gic.HOLD_NS)
    for lo, hi in slices(_lines(records)):
        frames = [frame for binder in binders for frame in binder.events(lo, hi)]
        last = max((int(f["t_ns"].max() or 0) for f in frames if f.height), default=None)  # type: ignore[arg-type]
        if last is None:
            continue
        table = assembler.push(frames, last)
        if table is not None:
            yield table
    rest = assembler.push([], None)
    if rest is not None:
        yield rest


def _lines(records: Records) -> int:
    """Number of the last line, plus one: lines that could not be read have numbers too."""
    tables = sorted(records.tables())
    if not tables:
        return 0
    highest = pl.concat([records.scan(name).select(pl.col("seq").max()) for name in tables]).collect()
    return int(highest["seq"].max() or 0) + 1  # type: ignore[arg-type]
