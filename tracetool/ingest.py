"""Recordings in, one dataset out: open, sniff, read in chunks, store, bind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from parsers.chosen import chosen
from parsers.formats import FORMATS, reader_class, sniff
from parsers.open import Opened, open_recording
from parsers.recording import Gap, Note, Reader, ReadOptions, RecordingError
from replay.binding.base import Bound, Context, Records
from replay.declare import UsageError
from replay.events import SCHEMA
from tracetool import __version__
from tracetool.store import DatasetWriter

__all__ = [
    "DERIVED_FROM",
    "IngestOptions",
    "Ingested",
    "Offset",
    "bind",
    "compressed_end",
    "derived_frequency",
    "derived_note",
    "describe_input",
    "ingest",
    "label_of",
    "make_reader",
    "note_left_out",
    "note_snapshot",
    "parse_offset",
    "store_records",
]

#: Binding module for each format; a format without one has record tables but no canonical events.
BINDINGS: Final[Mapping[str, str]] = {
    "xentrace": "replay.binding.xentrace",
    "xenalyze": "replay.binding.xentrace",
    "xentrace_format": "replay.binding.xentrace",
    "trace.dat": "replay.binding.linux",
    "ftrace": "replay.binding.linux",
    "trace-cmd-report": "replay.binding.linux",
    "perf-script": "replay.binding.linux",
    "systrace": "replay.binding.linux",
    "qemu": "replay.binding.qemu",
    "xen-console": "replay.binding.debugkeys",
    "proc-interrupts": "replay.binding.debugkeys",
    "timer-list": "replay.binding.debugkeys",
    "lsevtchn": "replay.binding.debugkeys",
}

#: Origin of a frequency that the records of a recording tell.
DERIVED_FROM: Final = "timer:hrtimer_expire_entry against CLOCK_MONOTONIC"

#: Bytes around a damaged stretch whose records say when it was.
NEAR_BYTES: Final = 16 << 10
#: Formats whose records have byte offsets.
BYTE_OFFSETS: Final = frozenset({"xentrace", "trace.dat"})
#: Damaged stretches beyond these keep no time (each costs a scan of all offsets).
PLACED_GAPS: Final = 64

#: Called with (what, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Offset:
    """What is added to the stamps of a recording to get those of the reference: `amount` ns, or ticks of its TSC."""

    label: str
    amount: int
    ticks: bool


@dataclass(frozen=True, slots=True)
class IngestOptions:
    """What the user may state about a recording."""

    cpu_hz: float | None = None
    xen_version: tuple[int, int] | None = None
    format: str | None = None
    hpet_irqs: tuple[int, ...] = ()
    #: Event name to canonical kind or probed symbol, for names that say nothing (see replay.binding.linux_probes).
    event_map: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    force: bool = False
    command: str = ""
    #: What to add to the stamps of recordings that are merged with another.
    offsets: tuple[Offset, ...] = ()
    #: Names of the events that are wanted; empty: all.
    only: frozenset[str] = frozenset()


_TIME_UNITS: Final = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 10**9}


def parse_offset(text: str) -> Offset:
    """`guest.dat=-95888000000` (ticks), `guest.dat=+12.5ms` (or s, us, ns); UsageError for anything else."""
    label, equals, value = text.rpartition("=")
    number, scale = value, 0
    for suffix in ("ns", "us", "ms", "s"):
        if value.endswith(suffix):
            number, scale = value[: -len(suffix)], _TIME_UNITS[suffix]
            break
    try:
        amount = round(float(number) * scale) if scale and "." in number else int(number) * (scale or 1)
    except (ValueError, OverflowError):
        amount = 1 << 70
    if not equals or not label or abs(amount) >= 1 << 62:
        raise UsageError(f"--offset wants NAME=TICKS or NAME=TIME such as guest.dat=-12.5ms, not {text!r}")
    return Offset(label, amount, not scale)


class _FrequencyFound(Exception):
    """The records of a recording whose clock ticks tell the frequency: read it again with that."""

    def __init__(self, hz: float) -> None:
        super().__init__(hz)
        self.hz = hz


@dataclass(slots=True)
class Ingested:
    """What an ingest found: `manifest` as stored, `damaged` when input was lost (exit code 3)."""

    path: Path
    manifest: dict[str, Any]
    gaps: list[dict[str, Any]] = field(default_factory=list)
    notes: list[dict[str, Any]] = field(default_factory=list)
    damaged: bool = False


def ingest(
    recordings: Sequence[str], target: Path, options: IngestOptions, progress: Progress | None = None
) -> Ingested:
    """Read recordings into a new dataset at `target`.

    Raises RecordingError when one cannot be read at all and StoreError when the dataset cannot be written; in both
    cases nothing is left behind. Damage inside a recording becomes gaps and notes.
    """
    if len(recordings) != 1:
        from tracetool.merge import merge_recordings

        return merge_recordings(recordings, target, options, progress)
    name = recordings[0]
    if options.offsets:
        raise UsageError("--offset ties several recordings together; there is only one")
    try:
        try:
            return _ingest(name, target, options, progress)
        except _FrequencyFound as found:
            return _ingest(name, target, options, progress, found.hz)
    except RecordingError as error:
        raise RecordingError(f"{name}: offset {error.offset}: {error}", offset=error.offset) from error


def _ingest(
    name: str, target: Path, options: IngestOptions, progress: Progress | None, derived: float | None = None
) -> Ingested:
    with DatasetWriter(target, force=options.force) as writer, open_recording(name) as opened:
        label = label_of(opened)
        reader = make_reader(opened, options, label, cpu_hz=derived)
        extent = store_records(reader, opened, writer, progress, label)
        dataset = writer.close_records()
        if derived is None and name != "-":  # stdin cannot be read again
            hz = derived_frequency(reader, dataset)
            if hz is not None:
                raise _FrequencyFound(hz)
        manifest = {**describe_input(reader, opened, options), **extent}
        if derived is not None:
            manifest["clock"]["origin"] = DERIVED_FROM
            writer.add_note(derived_note(derived), label)
        if opened.truncated:
            compressed_end(writer, opened, label)
            dataset = writer.close_records()
        if reader.format in BYTE_OFFSETS and place_gaps(dataset, writer.gaps):
            dataset = writer.close_records()
        bound = bind(reader, dataset, label, options, writer.gaps)
        manifest["observed"] = {k: {"conf": o.conf, "how": o.how} for k, o in sorted(bound.observed.items())}
        manifest["facts"] = bound.facts
        note_left_out(manifest, options, writer)
        note_snapshot(manifest)
        batches = _reported(bound.batches, progress, manifest["span"]["records"])
        manifest["events"] = writer.write_events(batches, SCHEMA)
        manifest["damaged"] = any(n["severity"] == "error" for n in writer.notes)
        writer.finish(manifest)
        return Ingested(target, manifest, writer.gaps, writer.notes, manifest["damaged"])


def note_left_out(manifest: dict[str, Any], options: IngestOptions, writer: DatasetWriter) -> None:
    """Say in manifest and notes that events were left out on purpose: rules that need those are blind, not clean."""
    if not options.only:
        return
    met = [name for name in sorted(options.only) if manifest["counts"].get(name)]
    absent = sorted(options.only - set(met))
    manifest["left_out"] = {"kept": met, "not_met": absent, "why": "--only"}
    text = f"kept only {', '.join(met) or 'nothing'}" + (f"; not met: {', '.join(absent)}" if absent else "")
    writer.add_note(Note("events-left-out", "warn", text), "")


def note_snapshot(manifest: dict[str, Any]) -> None:
    """The time of a snapshot's events is the binding's own (ns), and goes on until the last look at it."""
    end = manifest["facts"].get("snapshot_end_ns")
    if end is not None:
        manifest["span"]["t1_ns"] = max(manifest["span"]["t1_ns"], int(end))
        manifest["clock"]["unit"] = "ns"


def place_gaps(dataset: Records, gaps: Sequence[dict[str, Any]]) -> bool:
    """Give damaged stretches a time: from the earliest record shortly before them to the latest shortly after.

    For recordings whose records have byte offsets, as gaps have; records of text have line numbers instead, and its
    readers tell the times themselves: lines are in order.

    Damage says nothing of CPU or time, so whatever the windows around it span is unknown. Returns whether any changed.
    """
    lost = [g for g in gaps if g["reason"] == "damaged" and g["t0_ns"] is None and g["t1_ns"] is None][:PLACED_GAPS]
    for gap in lost:
        start, end = gap["offset"], gap["offset"] + gap["length"]
        for name in dataset.tables():
            near = pl.col("offset").is_between(start - NEAR_BYTES, end + NEAR_BYTES)
            frame = (
                dataset.scan(name)
                .filter(near)
                .select(
                    before=pl.col("t_ns").filter(pl.col("offset") < start).min(),
                    after=pl.col("t_ns").filter(pl.col("offset") >= end).max(),
                )
                .collect()
            )
            before, after = frame.row(0)
            if before is not None:
                gap["t0_ns"] = before if gap["t0_ns"] is None else min(gap["t0_ns"], before)
            if after is not None:
                gap["t1_ns"] = after if gap["t1_ns"] is None else max(gap["t1_ns"], after)
    return bool(lost)


def derived_note(hz: float) -> Note:
    """Says that the frequency is the records' own."""
    text = f"the clock ticks at {hz:.0f} Hz by its own timer records; --cpu-hz states another"
    return Note("clock-derived", "info", text)


def derived_frequency(reader: Reader, dataset: Records) -> float | None:
    """Ticks a second of a recording whose reader could not tell, from its records; None if they do not say."""
    if reader.clock.unit != "ticks":
        return None
    module = import_module(BINDINGS[reader.format]) if reader.format in BINDINGS else None
    clock_hz = getattr(module, "clock_hz", None)
    hz: float | None = clock_hz(dataset) if clock_hz is not None else None
    return hz


def make_reader(opened: Opened, options: IngestOptions, label: str, *, cpu_hz: float | None = None) -> Reader:
    """The reader for what the bytes look like, or for what the user says they are; `cpu_hz` when another tells it."""
    if opened.size == 0:
        raise RecordingError("empty, expected a recording; nothing was written")
    head = opened.head()
    try:
        cls = reader_class(options.format) if options.format else sniff(head)
    except KeyError:
        known = ", ".join(format_name for format_name, _, _ in FORMATS)
        raise UsageError(f"no format {options.format!r}; there are {known}") from None
    if cls is None:
        raise RecordingError(f"expected a recording of a known format, found {head[:12]!r}; nothing was written")
    hz = cpu_hz or options.cpu_hz
    asked = ReadOptions(source=label, cpu_hz=hz, xen_version=options.xen_version, only=options.only)
    return chosen(cls(opened.stream, asked), options.only)


def label_of(opened: Opened) -> str:
    """What a recording is called in tables and reports: its file name without the folder."""
    return Path(opened.name).name if opened.name != "-" else "stdin"


def store_records(
    reader: Reader, opened: Opened, writer: DatasetWriter, progress: Progress | None, source: str
) -> dict[str, Any]:
    """Write all chunks; returns `span` (first and last time, number of records) and `cpus`."""
    starts: list[int] = []
    ends: list[int] = []
    cpus: set[int] = set()
    times: list[Any] = []
    where: list[Any] = []
    rows = 0
    for chunk in reader.chunks():
        for table_name, table in chunk.tables.items():
            if not table.num_rows:
                continue
            writer.append(table_name, table)
            rows += table.num_rows
            times.extend(table["t_ns"].chunks)
            where.extend(table["cpu"].chunks)
            del table
        if times:  # of all tables together: each call costs more than many rows
            extremes = pc.min_max(pa.chunked_array(times)).as_py()  # null for records without a stamp
            if extremes["min"] is not None:
                starts, ends = [min((*starts, extremes["min"]))], [max((*ends, extremes["max"]))]
            cpus.update(c for c in pc.unique(pa.chunked_array(where)).to_pylist() if c is not None)
        times, where = [], []
        for gap in chunk.gaps:
            writer.add_gap(gap, source, _ns(reader, gap.t0), _ns(reader, gap.t1))
        for note in chunk.notes:
            writer.add_note(note, source)
        if progress:
            progress("reading", chunk.position, opened.size)
        del chunk  # the next one is made before the name is given to it
    return {
        "span": {"t0_ns": starts[0] if starts else 0, "t1_ns": ends[0] if ends else 0, "records": rows},
        "cpus": sorted(cpus),
    }


def _ns(reader: Reader, stamp: int | None) -> int | None:
    """A raw stamp in dataset time."""
    if stamp is None:
        return None
    ticks = stamp - reader.clock.tsc0
    return ticks if reader.clock.hz is None else int(ticks * 10**9 // int(reader.clock.hz))


def compressed_end(writer: DatasetWriter, opened: Opened, source: str) -> None:
    """The gap and the note of a compressed file that stops in the middle."""
    text = opened.truncated or ""
    writer.add_gap(Gap("truncated", None, None, None, opened.size, text=text), source, None, None)
    writer.add_note(Note("compressed-truncated", "error", text, offset=opened.size), source)


def bind(
    reader: Reader,
    dataset: Records,
    source: str,
    options: IngestOptions,
    gaps: Sequence[Mapping[str, Any]],
    known: Mapping[str, Any] | None = None,
) -> Bound:
    """Canonical events of one recording's tables; `known` is what other recordings of the machine say."""
    module = BINDINGS.get(reader.format)
    if module is None:
        return Bound({}, {"binding": f"format {reader.format} has no binding to the models yet"}, iter(()))
    context = Context(
        source=source,
        rows=sum(reader.counts.values()),
        unit=reader.clock.unit,
        hz=reader.clock.hz,
        gaps=gaps,
        options={"hpet_irqs": options.hpet_irqs, "event_map": options.event_map, **(known or {})},
    )
    bound: Bound = import_module(module).bind(dataset, context)
    return bound


def _reported(batches: Iterable[pa.Table], progress: Progress | None, rows: int) -> Iterable[pa.Table]:
    for batch in batches:
        if progress:
            progress("binding", int(batch["src_seq"][-1].as_py()), max(rows, 1))
        yield batch


def describe_input(reader: Reader, opened: Opened, options: IngestOptions) -> dict[str, Any]:
    """What the manifest says of a recording."""
    clock = reader.clock
    account = reader.accounting
    return {
        "tool": {"name": "tracetool", "version": __version__},
        "command": options.command,
        "inputs": [
            {
                "name": label_of(opened),
                "source": label_of(opened),
                "format": reader.format,
                "compression": opened.compression,
                "sha256": opened.sha256,
                "bytes": opened.size,
            }
        ],
        "clock": {
            "kind": clock.kind,
            "hz": clock.hz,
            "unit": clock.unit,
            "origin": clock.origin,
            "error_ppm": clock.error_ppm,
            "tsc0": clock.tsc0,
            "doc": clock.doc,
        },
        "bytes": {"total": account.total, "parsed": account.parsed, "skipped": account.skipped},
        "counts": dict(sorted(reader.counts.items())),
    }
