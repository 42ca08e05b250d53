"""Recordings in, one dataset out: open, sniff, read in chunks, store, bind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from parsers.formats import FORMATS, reader_class, sniff
from parsers.open import Opened, open_recording
from parsers.recording import Gap, Note, Reader, ReadOptions, RecordingError
from replay.binding.base import Bound, Context
from replay.declare import UsageError
from replay.events import SCHEMA
from tracetool import __version__
from tracetool.store import Dataset, DatasetWriter

__all__ = ["IngestOptions", "Ingested", "ingest"]

#: Binding module for each format; a format without one has record tables but no canonical events.
BINDINGS: Final[Mapping[str, str]] = {
    "xentrace": "replay.binding.xentrace",
    "xenalyze": "replay.binding.xentrace",
    "xentrace_format": "replay.binding.xentrace",
    "qemu": "replay.binding.qemu",
}

#: Called with (what, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class IngestOptions:
    """What the user may state about a recording."""

    cpu_hz: float | None = None
    xen_version: tuple[int, int] | None = None
    format: str | None = None
    hpet_irqs: tuple[int, ...] = ()
    force: bool = False
    command: str = ""


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
        raise UsageError("one recording at a time; several on a common clock cannot be merged yet")
    name = recordings[0]
    try:
        return _ingest(name, target, options, progress)
    except RecordingError as error:
        raise RecordingError(f"{name}: offset {error.offset}: {error}", offset=error.offset) from error


def _ingest(name: str, target: Path, options: IngestOptions, progress: Progress | None) -> Ingested:
    with DatasetWriter(target, force=options.force) as writer:
        opened = open_recording(name)
        reader = _reader(opened, options)
        extent = _store(reader, opened, writer, progress)
        dataset = writer.close_records()
        manifest = {**_manifest(reader, opened, options), **extent}
        if opened.truncated:
            _compressed_end(writer, opened)
            dataset = writer.close_records()
        bound = _bind(reader, dataset, _label(opened), options, writer.gaps)
        manifest["observed"] = {k: {"conf": o.conf, "how": o.how} for k, o in sorted(bound.observed.items())}
        manifest["facts"] = bound.facts
        batches = _reported(bound.batches, progress, manifest["span"]["records"])
        manifest["events"] = writer.write_events(batches, SCHEMA)
        manifest["damaged"] = any(n["severity"] == "error" for n in writer.notes)
        writer.finish(manifest)
        return Ingested(target, manifest, writer.gaps, writer.notes, manifest["damaged"])


def _reader(opened: Opened, options: IngestOptions) -> Reader:
    """The reader for what the bytes look like, or for what the user says they are."""
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
    return cls(
        opened.stream,
        ReadOptions(source=_label(opened), cpu_hz=options.cpu_hz, xen_version=options.xen_version),
    )


def _label(opened: Opened) -> str:
    """What a recording is called in tables and reports: its file name without the folder."""
    return Path(opened.name).name if opened.name != "-" else "stdin"


def _store(reader: Reader, opened: Opened, writer: DatasetWriter, progress: Progress | None) -> dict[str, Any]:
    """Write all chunks; returns `span` (first and last time, number of records) and `cpus`."""
    source = _label(opened)
    starts: list[int] = []
    ends: list[int] = []
    cpus: set[int] = set()
    rows = 0
    for chunk in reader.chunks():
        for table_name, table in chunk.tables.items():
            if not table.num_rows:
                continue
            writer.append(table_name, table)
            rows += table.num_rows
            starts.append(table["t_ns"][0].as_py())
            ends.append(table["t_ns"][-1].as_py())
            cpus.update(c for c in pc.unique(table["cpu"]).to_pylist() if c is not None)
        starts, ends = [min(starts, default=0)], [max(ends, default=0)]
        for gap in chunk.gaps:
            writer.add_gap(gap, source, _ns(reader, gap.t0), _ns(reader, gap.t1))
        for note in chunk.notes:
            writer.add_note(note, source)
        if progress:
            progress("reading", chunk.position, opened.size)
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


def _compressed_end(writer: DatasetWriter, opened: Opened) -> None:
    source = _label(opened)
    text = opened.truncated or ""
    writer.add_gap(Gap("truncated", None, None, None, opened.size, text=text), source, None, None)
    writer.add_note(Note("compressed-truncated", "error", text, offset=opened.size), source)


def _bind(
    reader: Reader, dataset: Dataset, source: str, options: IngestOptions, gaps: Sequence[Mapping[str, Any]]
) -> Bound:
    module = BINDINGS.get(reader.format)
    if module is None:
        return Bound({}, {"binding": f"format {reader.format} has no binding to the models yet"}, iter(()))
    context = Context(
        source=source,
        rows=sum(reader.counts.values()),
        unit=reader.clock.unit,
        hz=reader.clock.hz,
        gaps=gaps,
        options={"hpet_irqs": options.hpet_irqs},
    )
    bound: Bound = import_module(module).bind(dataset, context)
    return bound


def _reported(batches: Iterable[pa.Table], progress: Progress | None, rows: int) -> Iterable[pa.Table]:
    for batch in batches:
        if progress:
            progress("binding", int(batch["src_seq"][-1].as_py()), max(rows, 1))
        yield batch


def _manifest(reader: Reader, opened: Opened, options: IngestOptions) -> dict[str, Any]:
    clock = reader.clock
    account = reader.accounting
    return {
        "tool": {"name": "tracetool", "version": __version__},
        "command": options.command,
        "inputs": [
            {
                "name": _label(opened),
                "source": _label(opened),
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
