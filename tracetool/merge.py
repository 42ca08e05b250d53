"""Several recordings of one machine in one dataset, on one clock.

Each recording is read by its own reader, with the frequency of the reference (the hypervisor's recording, else the
first one whose frequency is known), and shifted by a constant: `align` says by how much and how well that is known.
Record tables of equal names and columns are appended; where columns differ the table becomes NAME@SOURCE. `seq` is
unique over all recordings and gives the order within one; over several of them `t_ns` does. Canonical events are
merged by time, and their `seq` is the order of all.

A guest's recording tells of its own CPUs: `cpu` is the vCPU there, its events get the guest's domain, and what it says
of hardware (which is virtual) is kept in the record tables but not among the canonical events.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from parsers.open import open_recording
from replay.binding import debugkeys
from replay.binding.base import Bound, Context
from replay.declare import UsageError
from replay.events import SCHEMA
from tracetool import align, ingest
from tracetool.clocks import (
    HYPERVISOR,
    SNAPSHOTS,
    Source,
    common_frequency,
    listed,
    named,
    on_tsc,
    place,
    place_snapshot,
    reference_of,
)
from tracetool.ingest import Ingested, IngestOptions, Progress
from tracetool.store import DatasetWriter
from tracetool.streams import KEPT_OF_GUEST, merged

__all__ = ["merge_recordings"]



class _Shifted:
    """The record tables of one recording on the common clock; `seq` is its own."""

    def __init__(self, source: Source) -> None:
        assert source.records is not None
        self.source = source
        self.records = source.records

    def tables(self) -> frozenset[str]:
        """Names of the record tables."""
        return self.records.tables()

    def scan(self, name: str) -> pl.LazyFrame:
        """One table."""
        return self.records.scan(name).with_columns(
            pl.col("t_ns") + self.source.delta_ns, pl.col("t_err_ns") + pl.lit(self.source.width_ns, pl.UInt32)
        )

    def parts(
        self, name: str, columns: Sequence[str] | None, lo: int = 0, hi: int | None = None
    ) -> Iterator[pl.DataFrame]:
        """One table, some rows at a time."""
        moved: dict[str, Any] = {"t_ns": self.source.delta_ns, "t_err_ns": pl.lit(self.source.width_ns, pl.UInt32)}
        for part in self.records.parts(name, columns, lo, hi):
            yield part.with_columns(pl.col(n) + by for n, by in moved.items() if n in part.columns)


def merge_recordings(
    names: Sequence[str], target: Path, options: IngestOptions, progress: Progress | None = None
) -> Ingested:
    """Read several recordings into one dataset at `target`.

    UsageError with the reason when they cannot be put on one clock; RecordingError when one cannot be read at all.
    """
    if len(set(names)) != len(names):
        raise UsageError("the same recording is named twice")
    with DatasetWriter(target, force=options.force) as writer, ExitStack() as stack:
        sources = _open(names, options, stack)
        for offset in options.offsets:
            if offset.label not in {s.label for s in sources}:
                raise UsageError(f"--offset: no recording {offset.label!r}; there are {listed(sources)}")
        clocked = [s for s in sources if s.reader.format not in SNAPSHOTS]
        if not clocked:
            raise UsageError(f"{listed(sources)} are snapshots; there is no recording to put them beside")
        if len(clocked) == 1:
            _derive_frequency(clocked[0], writer, options)
        reference = reference_of(clocked, [s for s in sources if s not in clocked])
        hz = float(reference.reader.clock.hz or 0)
        common_frequency(clocked, reference, options, hz)
        for source in sources:
            _read(source, writer, stack, progress)
        for source in clocked:
            if source is not reference:
                place(source, reference, options, hz)
        first_clocked = sources.index(clocked[0])
        for index, source in enumerate(sources):
            if source not in clocked and source.rows:
                place_snapshot(source, clocked, options, before=index < first_clocked)
        first = min(s.delta_ns for s in sources if s.rows)
        for source in sources:
            source.delta_ns -= first
        for source in sources:
            _copy(source, writer)
        writer.close_records()
        bounds = [_bind(source, sources, options) for source in sources]
        manifest = _manifest(sources, reference, options, hz)
        ingest.note_left_out(manifest, options, writer)
        _say_what_binds(manifest, sources, bounds, reference)
        ingest.note_snapshot(manifest)
        manifest["clock"]["unit"] = reference.reader.clock.unit  # a snapshot beside it changes nothing
        streams = [_stream(source, bound) for source, bound in zip(sources, bounds, strict=True)]
        streams += _callback_streams(sources, reference, manifest)
        manifest["events"] = writer.write_events(merged(streams), SCHEMA)
        manifest["damaged"] = any(n["severity"] == "error" for n in writer.notes)
        # Renamed with the dataset they would stay in it: a second copy of all records.
        shutil.rmtree(writer.staging / "parts", ignore_errors=True)
        writer.finish(manifest)
        return Ingested(target, manifest, writer.gaps, writer.notes, manifest["damaged"])


# -- reading -------------------------------------------------------------------------------------------------------


def _open(names: Sequence[str], options: IngestOptions, stack: ExitStack) -> list[Source]:
    sources: list[Source] = []
    for name in names:
        with named(name):
            opened = stack.enter_context(open_recording(name))
            label = ingest.label_of(opened)
            taken = {s.label for s in sources}
            if label in taken:
                label = f"{Path(name).parent.name}/{label}"
            while label in taken:
                label += "+"
            sources.append(Source(label, opened, ingest.make_reader(opened, options, label)))
    return sources


def _derive_frequency(source: Source, writer: DatasetWriter, options: IngestOptions) -> None:
    """As when it is ingested alone: ticks whose frequency only its records tell are read twice."""
    if source.reader.clock.unit != "ticks" or source.opened.name == "-":
        return
    with named(source.opened.name), DatasetWriter(writer.staging / "parts" / "frequency") as part:
        ingest.store_records(source.reader, source.opened, part, None, source.label)
        source.derived_hz = ingest.derived_frequency(source.reader, part.close_records())
        # what was read is read again in any case
        source.reader = ingest.make_reader(source.opened, options, source.label, cpu_hz=source.derived_hz)
    if source.derived_hz is not None:
        writer.add_note(ingest.derived_note(source.derived_hz), source.label)


def _read(source: Source, writer: DatasetWriter, stack: ExitStack, progress: Progress | None) -> None:
    """All records into tables of their own, in the recording's own time."""
    with named(source.opened.name):
        part = stack.enter_context(DatasetWriter(writer.staging / "parts" / f"{len(source.label)}-{id(source):x}"))
        source.part = part
        source.extent = ingest.store_records(source.reader, source.opened, part, progress, source.label)
        if source.opened.truncated:
            ingest.compressed_end(part, source.opened, source.label)
        source.records = part.close_records()


# -- one dataset ---------------------------------------------------------------------------------------------------


def _copy(source: Source, writer: DatasetWriter) -> None:
    """Tables, gaps and notes into the common dataset, on the common clock."""
    assert source.records is not None and source.part is not None
    source.base = writer.total_rows()
    for name in sorted(source.records.tables()):
        file = pq.ParquetFile(source.records.table_path(name))
        schema = source.part.schema_of(name)
        target = name if writer.fits(name, schema) else f"{name}@{source.label}"
        for group in range(file.num_row_groups):
            writer.append(target, _shift(file.read_row_group(group), schema, source))
    writer.gaps.extend(_shifted_gaps(source))
    writer.notes.extend(source.part.notes)


def _shifted_gaps(source: Source) -> list[dict[str, Any]]:
    assert source.part is not None

    def moved(t: int | None) -> int | None:
        return None if t is None else t + source.delta_ns

    return [{**gap, "t0_ns": moved(gap["t0_ns"]), "t1_ns": moved(gap["t1_ns"])} for gap in source.part.gaps]


def _shift(table: pa.Table, schema: pa.Schema, source: Source) -> pa.Table:
    """A row group with common `seq`, `t_ns` and `t_err_ns`."""
    frame = pl.from_arrow(table.select(["seq", "t_ns", "t_err_ns"]))
    assert isinstance(frame, pl.DataFrame)
    frame = frame.select(
        pl.col("seq") + source.base,
        pl.col("t_ns") + source.delta_ns,
        pl.col("t_err_ns") + pl.lit(source.width_ns, pl.UInt32),
    )
    for name in frame.columns:
        table = table.set_column(table.schema.get_field_index(name), schema.field(name), frame[name].to_arrow())
    return table.cast(schema)


def _bind(source: Source, sources: Sequence[Source], options: IngestOptions) -> Bound:
    """Canonical events of one recording; the hypervisor's binding is told what its guests' recordings show."""
    guests = [
        _told(s)
        for s in sources
        if s.is_guest and source.reader.format in HYPERVISOR
    ]
    given: dict[str, Any] = {"guests": guests} if guests else {}
    if source.dom is not None:
        given["dom"] = source.dom
    gaps = _shifted_gaps(source)
    if source.reader.format in SNAPSHOTS:
        given["snapshot"], apart = _beside(source, sources)
        gaps = [*gaps, *apart]
    elif not options.hpet_irqs:
        dumps = [s for s in sources if s.reader.format in SNAPSHOTS and s.records is not None]
        irqs = sorted({irq for s in dumps for irq in debugkeys.hpet_irqs(_Shifted(s))})
        given |= {"hpet_irqs": tuple(irqs)} if irqs else {}
    return ingest.bind(source.reader, _Shifted(source), source.label, options, gaps, given)


def _beside(source: Source, sources: Sequence[Source]) -> tuple[str, list[dict[str, Any]]]:
    """Whether a snapshot comes before or after the recordings, and the time between, of which nothing is known."""
    spans = [
        (s.extent["span"]["t0_ns"] + s.delta_ns, s.extent["span"]["t1_ns"] + s.delta_ns)
        for s in sources
        if s.rows and s.reader.format not in SNAPSHOTS
    ]
    start, end = min(lo for lo, _ in spans), max(hi for _, hi in spans)
    at = source.extent["span"]["t0_ns"] + source.delta_ns
    if at > end:
        return "after", [{"t0_ns": end, "t1_ns": at, "cpu": None, "offset": 0, "lost": 0}]
    return ("before" if at < start else "during"), []


def _stream(source: Source, bound: Bound) -> Iterator[pa.Table]:
    """The events of one recording with common sequence numbers; of a guest, what is its own."""
    for batch in bound.batches:
        numbers = pl.Series(batch["src_seq"]) + source.base
        batch = batch.set_column(batch.schema.get_field_index("src_seq"), SCHEMA.field("src_seq"), numbers.to_arrow())
        if source.dom is not None:
            batch = _of_guest(batch, source.dom)
        if batch.num_rows:
            yield batch


def _callback_streams(
    sources: Sequence[Source], reference: Source, manifest: dict[str, Any]
) -> list[Iterator[pa.Table]]:
    """What a guest's recording says of the interrupt by which the hypervisor reaches it."""
    from replay.binding import xentrace_hvm, xentrace_via

    streams: list[Iterator[pa.Table]] = []
    records = _Shifted(reference)
    hvm = xentrace_hvm.survey(records)
    for source in sources:
        if not source.is_guest or not hvm.usable:
            continue
        context = Context(source.label, source.rows, "ns", None, options={"guests": [_told(source)]})
        found = xentrace_via.survey(records, context, True)
        if found.guest is None:
            continue
        taken = align.injected(records).filter(
            (pl.col("dom") == source.dom) & (pl.col("vector") == (-1 if found.vector is None else found.vector))
        )
        config = manifest["facts"].get("callback_config")
        if config is not None and taken.height:
            config["rte_dest_vcpu"] = int(taken["vcpu"].mode().sort()[0])
        batches = xentrace_via.of_guest(found, taken, source.label, source.rows)
        streams.append(_stream(source, Bound({}, {}, batches)))
    return streams


def _told(source: Source) -> dict[str, Any]:
    """What the hypervisor's binding may know of a guest's recording."""
    vector = source.match.vector if source.match and source.match.name else None
    return {"records": _Shifted(source), "dom": source.dom, "vector": vector, "label": source.label}


def _of_guest(batch: pa.Table, dom: int) -> pa.Table:
    """Events of a guest's kernel: only those of its own software, with its domain; its losses are on no real CPU."""
    frame = pl.from_arrow(batch.select(["sys", "kind", "cpu", "dom"]))
    assert isinstance(frame, pl.DataFrame)
    keep = frame.select(pl.col("sys").cast(pl.String).is_in(list(KEPT_OF_GUEST))).to_series()
    lost = pl.col("kind").cast(pl.String) == "trace.lost"
    frame = frame.select(
        cpu=pl.when(lost).then(None).otherwise(pl.col("cpu")),
        dom=pl.when(lost).then(None).otherwise(pl.lit(dom, pl.UInt16)),
    )
    for name in frame.columns:
        field_ = SCHEMA.field(name)
        batch = batch.set_column(batch.schema.get_field_index(name), field_, frame[name].to_arrow().cast(field_.type))
    return batch.filter(keep.to_arrow())


def _say_what_binds(
    manifest: dict[str, Any], sources: Sequence[Source], bounds: Sequence[Bound], reference: Source
) -> None:
    """Facts and observations of all: the reference's word first; a guest cannot speak of the machine's hardware."""
    from replay.events import KIND_ID, KINDS

    observed: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    pairs = sorted(zip(sources, bounds, strict=True), key=lambda pair: pair[0] is not reference)
    for source, bound in pairs:
        for kind, seen in sorted(bound.observed.items()):
            if source.is_guest and KINDS[KIND_ID[kind]].sys not in KEPT_OF_GUEST:
                continue
            how = f"{source.label}: {seen.how}" if source is not reference else seen.how
            if kind not in observed or observed[kind]["conf"] < seen.conf:
                observed[kind] = {"conf": seen.conf, "how": how}
        for key, value in bound.facts.items():
            if key == "binding" and any(b.observed for b in bounds):
                continue
            if key == "blind" and source.reader.format in SNAPSHOTS and len(bounds) > 1 and "evtchn.send" in observed:
                continue  # the recordings decide what a snapshot cannot
            if key not in facts or (isinstance(facts[key], str) and not isinstance(value, str)):
                facts[key] = value
    manifest["observed"] = dict(sorted(observed.items()))
    manifest["facts"] = facts


def _manifest(sources: Sequence[Source], reference: Source, options: IngestOptions, hz: float) -> dict[str, Any]:
    """The reference's manifest with the inputs of all, and for each how its clock was tied to the common one."""
    manifest = ingest.describe_input(reference.reader, reference.opened, options)
    if reference.derived_hz is not None:
        manifest["clock"]["origin"] = ingest.DERIVED_FROM
    counts: dict[str, int] = {}
    for source in sources:
        for name, n in source.reader.counts.items():
            counts[name] = counts.get(name, 0) + n
    manifest["counts"] = dict(sorted(counts.items()))
    accounts = [s.reader.accounting for s in sources]
    manifest["bytes"] = {key: sum(getattr(a, key) for a in accounts) for key in ("total", "parsed", "skipped")}
    manifest["inputs"] = [_input(s, reference, options, hz) for s in sources]
    manifest["clock"]["offsets"] = {i["source"]: i["clock"] for i in manifest["inputs"]}
    manifest["span"] = {
        "t0_ns": min(s.extent["span"]["t0_ns"] + s.delta_ns for s in sources if s.rows),
        "t1_ns": max(s.extent["span"]["t1_ns"] + s.delta_ns for s in sources if s.rows),
        "records": sum(s.rows for s in sources),
    }
    # CPUs of a guest are vCPUs: the machine's are those of whoever is no guest.
    manifest["cpus"] = sorted({c for s in sources if not s.is_guest for c in s.extent["cpus"]})
    return manifest


def _input(source: Source, reference: Source, options: IngestOptions, hz: float) -> dict[str, Any]:
    clock = source.reader.clock
    apart = source.delta_ns - reference.delta_ns
    ticks = None
    if on_tsc(source) and on_tsc(reference):
        # Ticks that the reference's TSC is ahead of this one.
        ticks = round(apart * hz / 1e9) + reference.reader.clock.tsc0 - clock.tsc0
        stated = next((o.amount for o in options.offsets if o.label == source.label and o.ticks), ticks)
        ticks = 0 if source.kind in ("same-tsc", "reference") else stated  # ns are coarser than ticks
    entry = dict(ingest.describe_input(source.reader, source.opened, options)["inputs"][0])
    entry.update(
        source=source.label,
        records=source.rows,
        seq=[source.base, source.base + source.rows],
        cpus=source.extent["cpus"],
        domain=source.dom,
        span={k: source.extent["span"][k] + source.delta_ns for k in ("t0_ns", "t1_ns")},
        clock={
            "kind": source.kind, "how": source.how, "shift_ns": source.delta_ns, "offset_ticks": ticks,
            "uncertainty_ns": source.width_ns, "stamps": clock.kind, "tsc0": clock.tsc0, "doc": clock.doc,
        },
    )  # fmt: skip
    return entry
