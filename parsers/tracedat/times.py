"""From raw stamps to corrected stamps (guest to host) and to nanoseconds, in exact integer arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from parsers.recording import ClockModel
from parsers.tracedat.header import Shift
from parsers.tracedat.layout import NS_CLOCKS, TSC_CLOCKS
from parsers.tracedat.walk import Array

__all__ = ["TimeBase", "shifted"]


def shifted(stamps: Array, shift: Shift | None, interpolate: bool) -> Array:
    """Guest stamps (u64) on the host's clock as i64: TIME_SHIFT, with the sample pair around each stamp."""
    signed = np.minimum(stamps, np.uint64((1 << 63) - 1)).astype(np.int64)
    if shift is None or not shift.times:
        return signed
    times = np.array(shift.times, dtype=np.uint64)
    offsets = np.array(shift.offsets, dtype=np.int64)
    low = np.clip(np.searchsorted(times, stamps, side="right") - 1, 0, max(0, len(times) - 2))
    scaling = np.array(shift.scalings, dtype=np.uint64)[low]
    fraction = np.minimum(np.array(shift.fractions, dtype=np.uint64)[low], 63)
    product = stamps
    plain = (scaling <= 1) & (fraction == 0)
    if not plain.all():
        # a 128-bit product: rare (host and guest TSC of different speed), so Python integers will do
        whole = stamps.astype(object) * scaling.astype(object)
        product = np.array(
            [int(value) >> int(bits) & (1 << 63) - 1 for value, bits in zip(whole, fraction, strict=True)],
            dtype=np.uint64,
        )
        product = np.where(plain, stamps, product)
    add = offsets[low]
    if interpolate and len(times) > 1:
        add = add + _between(stamps, times, offsets, low)
    return np.minimum(product, np.uint64((1 << 63) - 1)).astype(np.int64) + add


def _between(stamps: Array, times: Array, offsets: Array, low: Array) -> Array:
    """How far the offset has moved since sample `low`, rounded as trace-cmd does: half a step up, then towards zero."""
    since = (stamps - times[low]).view(np.int64)
    span = np.maximum((times[low + 1] - times[low]).view(np.int64), 1)
    moved = offsets[low + 1] - offsets[low]
    if float(np.abs(since).max(initial=0)) * float(np.abs(moved).max(initial=0)) > 2.0**61:
        whole = [int(a) * int(b) + int(c) // 2 for a, b, c in zip(since, moved, span, strict=True)]
        steps = [abs(a) // int(c) * (1 if a >= 0 else -1) for a, c in zip(whole, span, strict=True)]
        return np.array([min(max(step, -(1 << 62)), 1 << 62) for step in steps], dtype=np.int64)
    scaled = since * moved + span // 2
    return np.asarray(np.sign(scaled) * (np.abs(scaled) // span))


@dataclass(slots=True)
class TimeBase:
    """How one buffer's stamps become `t_ns`. `hz` None and no `scale`: they stay in ticks."""

    clock: str
    ns: bool
    hz: int | None
    scale: tuple[int, int] | None
    origin: str

    @classmethod
    def choose(cls, clock: str, scale: tuple[int, int] | None, cpu_hz: float | None) -> TimeBase:
        """`scale` is the file's TSC2NSEC (mult, shift); the user's `cpu_hz` wins over it."""
        if clock in NS_CLOCKS or clock == "":
            return cls(clock, True, None, None, f"trace clock {clock}" if clock else "assumed: trace clock local")
        if clock in TSC_CLOCKS or clock == "tsc2nsec":
            if cpu_hz is not None and cpu_hz >= 1:
                return cls(clock, False, round(cpu_hz), None, "--cpu-hz")
            if scale is not None:
                return cls(clock, False, None, scale, "TSC2NSEC option")
        return cls(clock, False, None, None, f"trace clock {clock}")

    @property
    def unit(self) -> str:
        """Unit of `t_ns`."""
        return "ns" if self.ns or self.hz or self.scale else "ticks"

    def relative(self, stamps: Array, first: int) -> Array:
        """i64 time since stamp `first`, rounded down."""
        if self.scale is not None:
            return self._scaled(stamps) - self._scaled(np.array([first], dtype=np.int64))
        elapsed = stamps - np.int64(first)
        if self.hz is None:
            return elapsed
        whole, rest = elapsed // self.hz, elapsed % self.hz
        if self.hz > 9_000_000_000:
            return (whole * 1_000_000_000 + (rest * (1e9 / self.hz)).astype(np.int64)).astype(np.int64)
        return whole * 1_000_000_000 + rest * 1_000_000_000 // self.hz

    def _scaled(self, stamps: Array) -> Array:
        """(stamp * mult) >> shift with a product of up to 96 bits."""
        assert self.scale is not None
        mult, shift = np.uint64(self.scale[0]), self.scale[1]
        unsigned = stamps.astype(np.uint64)
        high = (unsigned >> np.uint64(32)) * mult
        low = (unsigned & np.uint64(0xFFFFFFFF)) * mult
        if shift <= 32:
            value = (high << np.uint64(32 - shift)) + (low >> np.uint64(shift))
        else:
            value = (high + (low >> np.uint64(32))) >> np.uint64(shift - 32)
        return value.astype(np.int64)

    def model(self, first: int) -> ClockModel:
        """The reader's clock, once the first record's stamp is known."""
        if self.ns:
            return ClockModel("ns", 1e9, first, "ns", self.origin, doc=f"ftrace clock {self.clock or 'local'}")
        hz: float | None = self.hz
        doc = f"ftrace clock {self.clock}"
        if self.scale is not None:
            hz = 1e9 * (1 << self.scale[1]) / self.scale[0]
            doc += f"; ns = (stamp * {self.scale[0]}) >> {self.scale[1]}"
        kind = "tsc" if self.clock in TSC_CLOCKS or self.clock == "tsc2nsec" else self.clock
        return ClockModel(kind, hz, first, self.unit, self.origin, doc=doc)
