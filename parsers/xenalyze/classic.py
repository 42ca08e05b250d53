"""Reader of the classic `xentrace_format` text: file order per CPU, merged here by time stamp."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from parsers.lines import LineBatch, line_batches
from parsers.recording import Accounting, Chunk, ClockModel, Gap, Note, NoteCode, ReadOptions, RecordingError
from parsers.tables import Column, Table
from parsers.xenalyze.templates import BY_NAME, LABEL_ERRORS, Template
from parsers.xenalyze.words import TABLES, common_columns, decode_words, fill, form_of
from parsers.xentrace.events import UNKNOWN

__all__ = ["FORMAT_TEXT", "ClassicReader"]

FORMAT_TEXT = Table(
    "format_text",
    "a line of xentrace_format that is no record or whose template is not the stock one",
    (Column("text", pa.string(), "the line, cut at 4 KiB"),),
)
_LINE = (
    r"^CPU(?P<cpu>\d{1,5})  (?P<tsc>\d{1,19}) \(\+ *-?\d+\)  +"
    r"(?P<name>csched2:credit burn|unknown|[A-Za-z_][\w:]*)(?P<args>[ \t].*)?$"
)
_SNIFF = re.compile(rb"^CPU\d+  \d+ \(\+ *-?\d+\)  +[A-Za-z_]", re.M)
_UNKNOWN = r"^\s*\(0x(?P<ev>[0-9a-f]{1,16})\)\s+\[(?P<w>(?: 0x[0-9a-f]{1,8}){7}) \]\s*$"
#: Bytes held back for the merge: two rounds of the collector at most, as text; above it order is given up.
_HOLD = 256 << 20
#: Bytes read at a time.
BATCH_BYTES = 2 << 20

_CODES = {
    note.code: note
    for note in (
        NoteCode("format-labels", "info", "records that the stock formats file labels wrongly: decoded by id and word"),
        NoteCode("format-text", "warn", "lines that are no record of the stock formats file: kept in `format_text`"),
        NoteCode("format-order", "warn", "records came too late to be merged in order"),
        NoteCode("format-cut", "warn", "the text ends in the middle of a line"),
        NoteCode("format-lossy", "info", "words that the template of an event does not print are null"),
    )
}


class ClassicReader:
    """Text of `xentrace_format` with the stock formats file. See `parsers.recording.Reader`.

    Tables and columns are those of the binary reader; words that are not printed are null. Records come in the order
    of their stamps over all CPUs; `offset` is the line. Records without a stamp (printed as 0) follow the one before
    on their CPU.
    """

    format: ClassVar[str] = "xentrace_format"
    note_codes: ClassVar[tuple[NoteCode, ...]] = tuple(_CODES.values())

    @staticmethod
    def sniff(head: bytes) -> bool:
        """Whether a record line is in the head."""
        return _SNIFF.search(head) is not None

    def __init__(self, stream: BinaryIO, options: ReadOptions) -> None:
        self.tables: dict[str, Table] = {**TABLES, FORMAT_TEXT.name: FORMAT_TEXT}
        self.accounting = Accounting()
        self.counts: dict[str, int] = {}
        self._stream = stream
        self._source = options.source
        stream.seek(0)
        head = stream.read(1 << 20)
        if not self.sniff(head):
            raise RecordingError(f"no line of xentrace_format in the first {len(head)} bytes")
        # The first window of each CPU starts about together; the earliest stamp of the head is the origin.
        stamps = [int(s) for s in re.findall(rb"^CPU\d+  (\d{1,19}) \(\+", head, re.M)]
        first = min((s for s in stamps if s), default=0)
        unit = "ns" if options.cpu_hz else "ticks"
        self.clock = ClockModel("tsc", options.cpu_hz, first, unit, "--cpu-hz" if options.cpu_hz else "unknown")
        self._seq = 0
        self._done = -1  # stamp up to which records have been given out
        self._last: dict[int, int] = {}  # CPU → stamp of its last stamped record

    def chunks(self) -> Iterator[Chunk]:
        """The text, merged over CPUs within what two rounds of the collector can overlap."""
        self._stream.seek(0)
        held: list[pl.DataFrame] = []
        window_cpu = 1 << 30
        epoch_high = previous_high = -1
        first = True
        for batch in line_batches(self._stream, BATCH_BYTES):
            lines, notes, gaps = self._lines(batch)
            held.append(lines)
            # A window of a CPU not above the one before starts a new round of the collector. What is read in the
            # round after next was written after the present round began: up to the highest stamp of the round before
            # the last, order is final.
            opens = (pl.col("name").first() == "cpu_change").fill_null(False)
            windows = lines.group_by("window", maintain_order=True).agg(
                opens.alias("opens"), pl.col("cpu").first(), pl.col("key").max()
            )
            for _, opened, cpu, high in windows.iter_rows():
                if opened and cpu is not None:
                    if cpu <= window_cpu:
                        previous_high, epoch_high = max(previous_high, epoch_high), -1
                    window_cpu = cpu
                epoch_high = max(epoch_high, high)
            every = pl.concat(held)
            limit = previous_high if every.estimated_size() < _HOLD else int(every["key"].max() or 0)  # type: ignore[arg-type]
            ready, rest = every.filter(pl.col("key") <= limit), every.filter(pl.col("key") > limit)
            held = [rest]
            if first:
                notes.append(_note("format-lossy", _CODES["format-lossy"].doc))
            first = False
            yield self._chunk(ready, notes, gaps)
        if held and held[0].height:
            yield self._chunk(held[0], [], [])

    def _lines(self, batch: LineBatch) -> tuple[pl.DataFrame, list[Note], list[Gap]]:
        frame = pl.DataFrame({"line": np.arange(len(batch), dtype=np.int64) + batch.first_line, "text": batch.text})
        frame = frame.with_columns(pl.col("text").str.extract_groups(_LINE).alias("g")).unnest("g")
        frame = frame.with_columns(
            pl.col("cpu").cast(pl.Int64),
            pl.col("tsc").cast(pl.Int64, strict=False).replace(0, None),
            pl.when(pl.Series(batch.dirty)).then(None).otherwise("name").alias("name"),
            (pl.col("name") == "cpu_change").fill_null(False).cum_sum().alias("window"),
        )
        before = pl.DataFrame(list(self._last.items()), schema={"cpu": pl.Int64, "before": pl.Int64}, orient="row")
        key = pl.col("tsc").forward_fill().over("cpu")
        window = pl.when(pl.col("name") == "cpu_change").then(pl.col("tsc").backward_fill().over("cpu"))
        frame = frame.join(before, on="cpu", how="left", maintain_order="left").with_columns(
            pl.coalesce(window, key, "before").forward_fill().fill_null(0).alias("key")
        )
        ends = frame.drop_nulls(["cpu", "tsc"]).group_by("cpu").agg(pl.col("tsc").last())
        self._last.update(dict(ends.iter_rows()) if len(self._last) < 1 << 16 else {})
        lengths = batch.byte_lengths()
        good = frame["name"].is_not_null().to_numpy()
        self.accounting.total += batch.size
        self.accounting.parsed += int(lengths[good].sum())
        self.accounting.skipped += int(lengths[~good].sum())
        raw = {int(i): batch.raw(int(i)) for i in np.flatnonzero(~good)}
        shown = [raw.get(i) for i in range(len(batch))] if raw else [None] * len(batch)
        frame = frame.with_columns(pl.Series("raw", shown, dtype=pl.String))
        notes: list[Note] = []
        gaps: list[Gap] = []
        if batch.unterminated:
            offset = batch.offset + int(batch.starts[-1])
            notes.append(_note("format-cut", "the last line has no line end", offset))
            gaps.append(Gap("truncated", None, None, None, offset, int(lengths[-1]), text="ends inside a line"))
        kept = pl.when(pl.col("name").is_null()).then(pl.lit("")).otherwise(pl.col("text").str.slice(0, 4096))
        frame = frame.with_columns(kept.alias("text"))
        return frame.select("line", "cpu", "tsc", "key", "window", "name", "args", "raw", "text"), notes, gaps

    def _chunk(self, lines: pl.DataFrame, notes: list[Note], gaps: list[Gap]) -> Chunk:
        lines = lines.sort("key", "cpu", "line", nulls_last=True).with_row_index("row")
        if lines.height and lines["key"][0] < self._done:
            late = int((lines["key"] < self._done).sum())
            notes.append(_note("format-order", f"first at line {lines['line'][0]}", count=late))
        if lines.height:
            self._done = max(self._done, int(lines["key"][-1]))
        key = lines["key"].to_numpy()
        ticks = np.maximum(key - self.clock.tsc0, 0)
        hz = self.clock.hz
        t = ticks if hz is None else (ticks * (1e9 / hz)).astype(np.int64)
        number = np.arange(lines.height, dtype=np.int64) + self._seq
        self._seq += lines.height
        common = common_columns(
            number, t, 0, lines["tsc"].fill_null(-1).to_numpy(), lines["cpu"].fill_null(-1).to_numpy(), self._source
        )
        common = common.set_column(6, "offset", pa.array(lines["line"].to_numpy().astype(np.uint64)))
        parts: dict[str, list[pa.Table]] = {}
        done = np.zeros(lines.height, np.bool_)
        wrong = 0

        def add(name: str, rows: npt.NDArray[np.int64], columns: dict[str, Any]) -> None:
            parts.setdefault(name, []).append(fill(self.tables[name], common, rows, columns))
            self.counts[name] = self.counts.get(name, 0) + len(rows)
            done[rows] = True

        records = lines.with_columns(pl.col("row").cast(pl.Int64)).drop_nulls("name")
        for (name,), group in records.partition_by("name", as_dict=True).items():
            if name == "unknown":
                _unknown(group, add)
                continue
            for template in BY_NAME.get(str(name), ()):
                group, hits = _match(template, group, add)
                wrong += hits if template.event in LABEL_ERRORS else 0
        left = np.flatnonzero(~done)
        if len(left):
            text = lines[left].select(pl.coalesce("raw", "text")).to_series()
            notes.append(_note("format-text", f"line {lines['line'][int(left[0])]}: {text[0][:80]!r}", count=len(left)))
            add(FORMAT_TEXT.name, left, {"text": text})
        if wrong:
            notes.append(_note("format-labels", f"{wrong} records", count=wrong))
        tables = {n: made[0] if len(made) == 1 else pa.concat_tables(made).sort_by("seq") for n, made in parts.items()}
        return Chunk(tables, gaps, notes, self.accounting.total)


def _note(code: str, text: str, offset: int = 0, count: int = 1) -> Note:
    return Note(code, _CODES[code].severity, text, offset, count=count)


def _unknown(group: pl.DataFrame, add: Any) -> None:
    """`unknown (0xID)  [ seven words ]`: the fallback template; words that the record did not have are printed as 0."""
    found = group.select("row", pl.col("args").str.extract_groups(_UNKNOWN).alias("g")).unnest("g").drop_nulls("ev")
    for (text,), part in found.partition_by("ev", as_dict=True).items():
        event = int(str(text), 16)
        if event > 0x0FFFFFFF:
            continue
        words = part["w"].str.strip_chars().str.split(" ")
        columns = [
            words.list.get(i).str.slice(2).str.to_integer(base=16, strict=False, dtype=pl.UInt64).to_numpy()
            for i in range(7)
        ]
        rows = part["row"].to_numpy()
        ids = np.full(len(rows), event, np.uint32)
        form = form_of(event, None)
        if form is not None:
            add(form.event.name, rows, {"event": ids, **decode_words(form, event, columns)})
        else:
            lists = pa.array(np.stack(columns, axis=1).astype(np.uint32).tolist(), pa.list_(pa.uint32()))
            add(UNKNOWN.name, rows, {"event": ids, "words": lists})


def _match(template: Template, group: pl.DataFrame, add: Any) -> tuple[pl.DataFrame, int]:
    """Decodes the lines whose values fit the template; gives the others and the number of hits."""
    if not group.height:
        return group, 0
    count = len(template.slots)
    # What stands before a value belongs to the match: the value itself is what the group of the pattern holds.
    values = group["args"].fill_null("").str.extract_all(template.pattern).to_frame("v")
    fits = (values["v"].list.len() == count) | (count == 0)
    words: dict[int, npt.NDArray[np.uint64]] = {}
    half = np.uint64(16)
    for i, slot in enumerate(template.slots):
        text = values["v"].list.get(i, null_on_oob=True).str.extract(template.pattern)
        digits = text.str.len_chars()
        base = 10 if slot[0] == "d" else 16
        number = text.str.to_integer(base=base, strict=False, dtype=pl.UInt64)
        # A null would make the array floating point; such rows do not fit anyway.
        value: npt.NDArray[np.uint64] = number.fill_null(0).to_numpy()
        if slot[0] == "H":
            fits = fits & (digits == 16)
            words[int(slot[1])], words[int(slot[2])] = value >> (half * np.uint64(2)), value & np.uint64(0xFFFFFFFF)
            continue
        fits = fits & number.is_not_null() & (number <= 0xFFFFFFFF)
        if slot[0] == "q":
            words[int(slot[1])], words[int(slot[2])] = value >> half, value & np.uint64(0xFFFF)
        else:
            fits = fits & (digits <= (10 if base == 10 else 8))
            words[int(slot[1])] = value
    mask = fits.fill_null(False).to_numpy()
    if mask.any():
        rows = group["row"].to_numpy()[mask]
        form = form_of(template.event, None)
        columns: dict[str, Any] = {"event": np.full(len(rows), template.event, np.uint32)}
        if form is None:
            return group, 0
        listed = [words[n][mask] if n in words else None for n in range(1, 8)]
        if template.slots:
            columns |= decode_words(form, template.event, listed)
        add(form.event.name, rows, columns)
    return group.filter(~pl.Series(mask)), int(mask.sum())
