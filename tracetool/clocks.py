"""The common clock of several recordings: which one is the reference, and how far each of the others is from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from parsers.open import Opened
from parsers.recording import Note, Reader, RecordingError
from replay.declare import UsageError
from tracetool import align, ingest
from tracetool.ingest import IngestOptions, Offset
from tracetool.store import Dataset, DatasetWriter

__all__ = [
    "HYPERVISOR", "SNAPSHOTS", "Source", "common_frequency", "listed", "named", "on_tsc", "place", "place_snapshot",
    "reference_of",
]  # fmt: skip

#: Formats of the hypervisor, and of kernels that may run on it.
HYPERVISOR: Final = ("xentrace", "xenalyze", "xentrace_format")
KERNEL: Final = ("ftrace", "trace.dat")
#: Formats that show one moment. Without stamps, or with stamps that nothing ties to the recordings', they come before
#: or after them, as they are named on the command line.
SNAPSHOTS: Final = ("xen-console", "proc-interrupts", "timer-list", "lsevtchn")
#: Between a snapshot without a time and the recordings (ns): nobody knows how long it really was.
APART_NS: Final = 1_000_000_000
#: The uncertainty that is stated for it (ns).
UNPLACED_NS: Final = 4_000_000_000
#: Formats whose raw stamps are the TSC when their clock says "tsc", and which take a stated frequency.
_RAW_TSC: Final = ("xentrace", *KERNEL)
_NS: Final = 10**9


@dataclass(slots=True)
class Source:
    """One recording while it is merged. `delta_ns` is added to its `t_ns`, `width_ns` to its `t_err_ns`."""

    label: str
    opened: Opened
    reader: Reader
    part: DatasetWriter | None = None
    records: Dataset | None = None
    extent: dict[str, Any] = field(default_factory=dict)
    base: int = 0  # of `seq`
    delta_ns: int = 0
    width_ns: int = 0
    kind: str = "reference"
    how: str = ""
    dom: int | None = None  # the domain whose kernel wrote it
    match: align.Estimate | None = None
    derived_hz: float | None = None  # ticks a second by its own records

    @property
    def rows(self) -> int:
        """Records in it."""
        return int(self.extent["span"]["records"])

    @property
    def is_guest(self) -> bool:
        """Whether it was written by a domain of the machine."""
        return self.dom is not None


@contextmanager
def named(name: str) -> Iterator[None]:
    """Errors say which recording they are about."""
    try:
        yield
    except RecordingError as error:
        raise RecordingError(f"{name}: offset {error.offset}: {error}", offset=error.offset) from error


def listed(sources: Sequence[Source]) -> str:
    """Their names."""
    return ", ".join(s.label for s in sources)


def reference_of(sources: Sequence[Source], beside: Sequence[Source] = ()) -> Source:
    """The hypervisor's recording if its frequency is known, else the first with a known one.

    A single recording needs none if the snapshots `beside` it have no stamps: there is nothing to convert.
    """
    for source in sources:
        if source.reader.clock.kind == "none":
            raise UsageError(f"{source.label} cannot be merged: a {source.reader.format} recording has no clock")
    known = [s for s in sources if s.reader.clock.unit == "ns" and s.reader.clock.hz]
    if not known and len(sources) == 1 and all(s.reader.clock.kind == "none" for s in beside):
        return sources[0]
    if not known:
        raise UsageError(f"no frequency is known for {listed(sources)}; give --cpu-hz")
    return next((s for s in known if s.reader.format in HYPERVISOR), known[0])


def common_frequency(sources: Sequence[Source], reference: Source, options: IngestOptions, hz: float) -> None:
    """Read TSC stamps of all recordings with the frequency of the reference."""
    if len(sources) == 1:
        return
    if reference.reader.clock.kind != "tsc":
        ticking = [s.label for s in sources if s.reader.clock.unit == "ticks"]
        if ticking:
            raise UsageError(f"{ticking[0]} has raw ticks and no recording tells their frequency; give --cpu-hz")
        return
    for source in sources:
        clock = source.reader.clock
        raw = clock.unit == "ticks" or (clock.kind == "tsc" and source.reader.format in _RAW_TSC)
        if source is not reference and raw and clock.hz != hz:
            with named(source.opened.name):
                source.reader = ingest.make_reader(source.opened, options, source.label, cpu_hz=hz)


def place_snapshot(source: Source, clocked: Sequence[Source], options: IngestOptions, *, before: bool) -> None:
    """Put a snapshot before the first or after the last record, or where --offset says (`clocked` are in place)."""
    spans = [(s.extent["span"], s.delta_ns) for s in clocked if s.rows]
    own = source.extent["span"]
    stated = next((o for o in options.offsets if o.label == source.label), None)
    if stated is not None and not stated.ticks:
        source.delta_ns, source.kind, source.how = stated.amount, "stated", "--offset"
        return
    if stated is not None:
        raise UsageError(f"--offset: {source.label} has no TSC; give a time such as {source.label}=+2s")
    if before:
        source.delta_ns = min(span["t0_ns"] + delta for span, delta in spans) - own["t1_ns"] - APART_NS
    else:
        source.delta_ns = max(span["t1_ns"] + delta for span, delta in spans) - own["t0_ns"] + APART_NS
    source.kind = "snapshot"
    place_ = "before the first" if before else "after the last"
    source.how = f"no clock in common: taken to come {place_} record, as named; when exactly is unknown"
    if source.reader.clock.hz:
        source.width_ns = UNPLACED_NS
        _say_boot_stamps(source, clocked, before=before)


def _say_boot_stamps(source: Source, clocked: Sequence[Source], *, before: bool) -> None:
    """A dump's own stamps count from Xen's boot. What lies between the TSC's reset and that boot (firmware, loader) is
    in no recording, so they tie the dump to nothing; but the TSC is at least as old, which bounds the dump's time."""
    text = (
        f"{source.label}: its stamps count from Xen's boot, which the recordings' clock does not know; not tied to it "
        f"(--offset {source.label}=TIME places it)"
    )
    severity = "info"
    machine = next((s for s in clocked if on_tsc(s) and s.reader.format in HYPERVISOR and s.reader.clock.hz), None)
    if machine is not None:
        hz = float(machine.reader.clock.hz or _NS)
        span, stamp_ns = machine.extent["span"], source.reader.clock.tsc0 * 1000  # its clock counts microseconds
        late = stamp_ns - int(machine.reader.clock.tsc0 / hz * _NS)  # after the recording's first record, at the least
        if late > span["t1_ns"] - span["t0_ns"]:
            text += "; a TSC that was not reset since shows that it came after the last record"
        elif late > 0:
            text += f"; a TSC that was not reset since shows it came {late / _NS:.1f} s or more after the first record"
        if before and late > 0:
            severity = "warn"
            text += ", though it is named before"
    if source.part is not None:
        source.part.add_note(Note("boot-stamps-not-tied", severity, text), source.label)


# -- finding the difference ----------------------------------------------------------------------------------------


def _start_ns(source: Source, reference: Source, added_ticks: int, hz: float) -> int:
    """The recording's time zero on the reference's time, if their raw stamps are the same but for `added_ticks`."""
    return (source.reader.clock.tsc0 + added_ticks - reference.reader.clock.tsc0) * _NS // int(hz)


def place(source: Source, reference: Source, options: IngestOptions, hz: float) -> None:
    """Find `delta_ns` relative to the reference, or refuse with the reason."""
    if not source.rows or not reference.rows:
        raise UsageError(f"{source.label} cannot be merged: it or {reference.label} has no records")
    stated = next((o for o in options.offsets if o.label == source.label), None)
    same_scale = on_tsc(source) and on_tsc(reference)
    if stated is not None:
        _place_as_stated(source, reference, stated, same_scale, hz)
        return
    reasons = []
    if same_scale:
        source.delta_ns = _start_ns(source, reference, 0, hz)
        reason = _same_tsc(source, reference)
        if not reason:
            return
        reasons.append(reason)
    else:
        reasons.append(f"its clock is {source.reader.clock.kind}, not the TSC")
    reason = _estimated(source, reference, same_scale, hz)
    if not reason:
        return
    reasons.append(reason)
    raise UsageError(
        f"{source.label} cannot be put on the clock of {reference.label}: {'; '.join(reasons)}; "
        f"state it with --offset {source.label}=TICKS"
    )


def on_tsc(source: Source) -> bool:
    return source.reader.clock.kind == "tsc" and source.reader.format in _RAW_TSC


def _is_guest_of(source: Source, reference: Source) -> bool:
    return source.reader.format in KERNEL and reference.reader.format in HYPERVISOR


def _presence(source: Source, reference: Source, delta_ns: int, slack_ns: int = 0) -> align.Presence | None:
    """Whether the kernel's records fit what the hypervisor scheduled."""
    if not _is_guest_of(source, reference):
        return None
    assert source.records is not None and reference.records is not None
    return align.presence(reference.records, align.stamps(source.records), -delta_ns, slack_ns)


def _said(found: align.Presence) -> str:
    return f"{found.share:.1%} of its records lie where a vCPU of d{found.dom} ran ({found.chance:.0%} by chance)"


def _same_tsc(source: Source, reference: Source) -> str:
    """"" when both carry one TSC; otherwise why that is not so, or not shown."""
    span, other = source.extent["span"], reference.extent["span"]
    lo, hi = span["t0_ns"] + source.delta_ns, span["t1_ns"] + source.delta_ns
    if hi < other["t0_ns"] or lo > other["t1_ns"]:
        return "their TSC ranges do not overlap"
    found = _presence(source, reference, source.delta_ns)
    if found is None:
        return "their TSC ranges overlap, but nothing in them shows that it is one TSC"
    if not found.fits:
        return f"their TSC ranges overlap, but only {_said(found)}"
    source.kind, source.dom = "same-tsc", found.dom
    source.how = f"one TSC: {_said(found)}"
    return ""


def _estimated(source: Source, reference: Source, same_scale: bool, hz: float) -> str:
    """"" when a constant difference was found; otherwise the reason."""
    if not _is_guest_of(source, reference):
        return "only a guest's recording can be matched with its hypervisor's"
    assert source.records is not None and reference.records is not None
    found = align.estimate(reference.records, source.records)
    if isinstance(found, str):
        return found
    if not found.two_sided and not same_scale:
        return "the clocks do not run equally fast, or nothing bounds their difference from both sides"
    # t_ns is the earliest moment, t_ns + t_err_ns the latest: the column's own convention.
    source.delta_ns, source.width_ns = -found.hi, found.hi - found.lo
    check = _presence(source, reference, source.delta_ns, source.width_ns)
    if check is not None and not check.fits:
        return f"the best difference is contradicted: only {_said(check)}"
    source.kind, source.dom, source.match = "estimated", found.dom, found
    sides = "from both sides" if found.two_sided else "from one side"
    source.how = (
        f"{found.pairs} injections of vector {found.vector:#x} in d{found.dom} and their handlers bound it {sides}; "
        f"usual delay {found.median_delay_ns / 1000:.0f} us"
        + (f"; {_said(check)}" if check is not None else "; the scheduler was not recorded, so nothing checks it")
    )
    return ""


def _place_as_stated(source: Source, reference: Source, stated: Offset, same_scale: bool, hz: float) -> None:
    clock = source.reader.clock
    if stated.ticks and not same_scale:
        raise UsageError(f"--offset {source.label}: its clock is {clock.kind}; give a time such as 12.5ms, not ticks")
    if same_scale:
        source.delta_ns = _start_ns(source, reference, stated.amount if stated.ticks else 0, hz)
    else:
        other = reference.reader.clock
        source.delta_ns = clock.tsc0 * _NS // int(clock.hz or _NS) - other.tsc0 * _NS // int(other.hz or _NS)
    if not stated.ticks:
        source.delta_ns += stated.amount
    source.kind, source.how = "stated", "--offset"
    found = _presence(source, reference, source.delta_ns)
    if found is None:
        return
    source.dom = found.dom if found.fits else None
    source.how += f"; {_said(found)}"
    if not found.fits and source.part is not None:
        text = f"the stated offset does not fit: only {_said(found)}"
        source.part.add_note(Note("offset-contradicted", "warn", text), source.label)
