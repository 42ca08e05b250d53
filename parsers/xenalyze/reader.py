"""Reader of `xenalyze --dump-all` text, into the record tables of the binary reader."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, BinaryIO, ClassVar

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from parsers.lines import BATCH_BYTES, LineBatch, line_batches
from parsers.recording import Accounting, Chunk, ClockModel, Gap, Note, NoteCode, ReadOptions, RecordingError
from parsers.tables import Column, Table
from parsers.xenalyze.grammar import PATTERNS
from parsers.xenalyze.matching import match_pattern
from parsers.xenalyze.names import HANDLERS, PV_NAMES
from parsers.xenalyze.scale import printed_scale, scale_of
from parsers.xenalyze.words import TABLES, common_columns, decode_words, fill, form_of
from parsers.xentrace.events import BY_ID, UNKNOWN

__all__ = ["AUX", "TEXT", "XenalyzeReader"]

I64 = npt.NDArray[np.int64]

AUX = Table(
    "xenalyze_aux",
    "a line of the dump that is no record: trackers, raw copies, warnings, blank lines",
    (
        Column("kind", pa.string(), "w2h, vla, raw, lost-end, interrupt, message, blank or unparsed"),
        Column("text", pa.string(), "the line, cut at 4 KiB"),
    ),
)
TEXT = Table(
    "xenalyze_text",
    "a record of which the text is not understood",
    (Column("mark", pa.string(), "first character of the line"), Column("text", pa.string(), "what follows the vCPU")),
)

#: xenalyze's default of 2.4 GHz, as its scaled integer: ns = (cycles << 10) / q.
_DEFAULT_Q = 2457
_MAX_SECONDS = 3_000_000
_RECORD = (
    r"^(?P<mark>[ \]!])(?P<t> {14}| *\d{1,7}\.\d{9}) (?P<map>[-|.lx 0-6]{1,256}?) "
    r"(?P<cur>d\?v\?|d\d{1,5}v\d{1,5}) (?P<text>.*)$"
)
_BARE = (
    r"^(?P<mark> ?)(?P<t> {14}| *\d{1,7}\.\d{9}) (?P<map>[-|.lx 0-6]{1,256}?) "
    r"(?P<text>(?:inj_exc trap |pf_inject(?:64)? guest_cr2 |inj_virq vec |destroy_proc cur_cr3 ).*)$"
)
_SNIFF = re.compile(rb"^[ \]!](?: {14}| *\d+\.\d{9}) [-|.l 0-6]*x[-|.lx 0-6]* (?:d\?v\?|d\d+v\d+)  *\S", re.M)
_GENERIC = r"^\s*(?P<ev>[0-9a-f]{1,7})\([0-9a-f]+:[0-9a-f]:[0-9a-f]+\) (?P<n>[0-7]) \[(?P<w>(?: [0-9a-f]{1,8})*) \]\s*$"
_NAMED = r"^(?P<name>[A-Za-z_]+(?:64)?(?:[- ][a-z0-9]+)?) ?\[(?P<w>(?: [0-9a-f]{1,8})*) \]\s*$"
#: Printed without a line end: the next record is glued to it.
_GLUED = r"^d\d+v\d+ RUNSTATE_RUNNING detected, leaving INIT(?P<rest>[ \]!] )"
_KINDS: tuple[tuple[str, str], ...] = (
    ("blank", r"^\s*$"),
    ("w2h", r"^ \[w2h\]"),
    ("vla", r"^ *\[vla\]"),
    ("raw", r"^(?:R p\s?\d+ o[0-9a-f]{16} |\* )"),
    ("lost-end", r"^ {15}[-|.lx 0-6]+ lost_records end"),
    ("interrupt", r"^  Interrupt \d+ clearing start_tsc"),
    (
        "message",
        r"^(?:Creating |scan_for_new_pcpu|init_pcpus|read_record|deactivate_pcpu|process_lost_records|First"
        r" schedule|Using |TSC skew"
        r"|Tsc skew|runstate_change old_runstate| ?Not updating|Strange|WARNING|Warning|ERROR|FATAL|Changing"
        r" p|d\d+v\d+ RUNSTATE_RUNNING"
        r"|Unknown hvm event|hvm_\w+: |sched_switch|Setting |choose_next_record|Enabling|activate_early_eof| "
        r" p\d|Early EOF)",
    ),
)

_CODES = {
    note.code: note
    for note in (
        NoteCode("xenalyze-clock", "info", "the scale of the printed times, found from the TSC words of irq_handled"),
        NoteCode("xenalyze-clock-assumed", "warn", "the scale of the printed times is --cpu-hz, or else 2.4 GHz"),
        NoteCode("xenalyze-corrected", "info", "records whose labels xenalyze gets wrong, put right or left null"),
        NoteCode("xenalyze-text", "warn", "records whose text is not understood: kept in `xenalyze_text`"),
        NoteCode(
            "xenalyze-unparsed", "warn", "lines that are neither records nor known messages: kept in `xenalyze_aux`"
        ),
        NoteCode("xenalyze-cut", "warn", "the dump ends in the middle of a line"),
        NoteCode(
            "xenalyze-lossy",
            "info",
            "not in a dump: HVM_EMUL records, idle ticks, vectors pending at wake-up; the binary has them",
        ),
    )
}


class XenalyzeReader:
    """A dump of `xenalyze -a`. See `parsers.recording.Reader`.

    Tables and columns are those of the binary reader; what the text does not carry is null (also `event` where the
    text hides a flag of the id). `seq` counts lines, so it also counts the lines of `xenalyze_aux`. `tsc` is ticks
    since the first stamped record, recovered from the printed ns; records that Xen never stamps have none.
    """

    format: ClassVar[str] = "xenalyze"
    note_codes: ClassVar[tuple[NoteCode, ...]] = tuple(_CODES.values())

    @staticmethod
    def sniff(head: bytes) -> bool:
        """Whether a record line of a dump is in the head."""
        return _SNIFF.search(head) is not None

    def __init__(self, stream: BinaryIO, options: ReadOptions) -> None:
        self.tables: dict[str, Table] = {**TABLES, AUX.name: AUX, TEXT.name: TEXT}
        self.accounting = Accounting()
        self.counts: dict[str, int] = {}
        self._stream = stream
        self._source = options.source
        self._hz = options.cpu_hz
        stream.seek(0)
        head = stream.read(1 << 20)
        if not self.sniff(head):
            raise RecordingError(f"no record line of xenalyze in the first {len(head)} bytes")
        measured = printed_scale(head)
        self._q = measured or (scale_of(options.cpu_hz) if options.cpu_hz else _DEFAULT_Q)
        self._known = measured is not None
        hz, origin, ppm = options.cpu_hz, "--cpu-hz", None
        if hz is None and measured is not None and measured != _DEFAULT_Q:
            # Somebody told xenalyze the frequency; the scale gives it back with the precision of an integer.
            hz, origin, ppm = (measured + 0.5) * 1e9 / 1024, "the frequency xenalyze was told", 0.5e6 / measured
        self._hz = hz
        doc = f"ticks since the first stamped record, +-2; printed at {self._q}/1024 ticks a ns"
        self.clock = ClockModel("tsc", hz, 0, "ns" if hz else "ticks", origin if hz else "unknown", ppm, doc)

    def chunks(self) -> Iterator[Chunk]:
        """The dump in batches of lines."""
        self._stream.seek(0)
        first = True
        for batch in line_batches(self._stream, BATCH_BYTES):
            chunk = self._chunk(batch)
            if first:
                code = "xenalyze-clock" if self._known else "xenalyze-clock-assumed"
                chunk.notes.append(_note(code, f"{self._q}/1024 ticks a ns"))
                chunk.notes.append(_note("xenalyze-lossy", _CODES["xenalyze-lossy"].doc))
            first = False
            yield chunk

    def _chunk(self, batch: LineBatch) -> Chunk:
        lines = self._lines(batch)
        row_number = np.arange(len(batch), dtype=np.int64)
        ns = lines["ns"].fill_null(0).to_numpy()
        ticks = -(-ns * self._q // 1024)
        t = ticks if self._hz is None else (ticks * (1e9 / self._hz)).astype(np.int64)
        cpu = lines["cpu"].fill_null(-1).to_numpy().astype(np.int64)
        common = common_columns(
            batch.first_line - 1 + row_number, t, 2, np.where(cpu >= 0, ticks, -1), cpu, self._source
        )
        parts: dict[str, list[pa.Table]] = {}
        notes: list[Note] = []
        done = np.zeros(len(batch), np.bool_)

        def add(table: str, rows: I64, columns: dict[str, Any]) -> None:
            made = fill(self.tables[table], common, rows, columns)
            if table in TABLES and table != UNKNOWN.name and _STAMPED[table] == "no":
                for name in ("t_err_ns", "tsc"):
                    index = made.schema.get_field_index(name)
                    field = made.schema.field(index)
                    made = made.set_column(index, field, pa.nulls(len(rows), field.type))
            parts.setdefault(table, []).append(made)
            self.counts[table] = self.counts.get(table, 0) + len(rows)
            done[rows] = True

        records = lines.filter(pl.col("cpu").is_not_null()).select("row", "mark", "text")
        corrected = self._words(records, add)
        rest = records.filter(~pl.Series(done[records["row"].to_numpy()], dtype=pl.Boolean))
        keyed = rest.with_columns(pl.col("text").str.extract(r"^ ?([\w:]+)").alias("key"))
        known = keyed.filter(pl.col("key").is_in(list(_BY_KEY)))  # what is unknown may differ in every line
        for (key,), group in known.partition_by("key", as_dict=True).items():
            for pattern in _BY_KEY[str(key)]:
                if not group.height:
                    break
                hits, columns = match_pattern(pattern, group)
                if hits.height:
                    add(pattern.table, hits["row"].to_numpy(), columns)
                    corrected += hits.height if pattern.error else 0
                    group = group.join(hits.select("row"), on="row", how="anti")
        if corrected:
            notes.append(_note("xenalyze-corrected", f"{corrected} records", batch.offset, corrected))
        left = records.filter(~pl.Series(done[records["row"].to_numpy()], dtype=pl.Boolean))
        if left.height:
            first = batch.first_line + int(left["row"][0])
            notes.append(_note("xenalyze-text", f"line {first}: {left['text'][0][:80]!r}", batch.offset, left.height))
            add(TEXT.name, left["row"].to_numpy(), {"mark": left["mark"], "text": left["text"].str.slice(0, 4096)})
        gaps = self._aux(batch, done, add, notes, lines["kind"])
        tables = {
            name: made[0] if len(made) == 1 else pa.concat_tables(made).sort_by("seq") for name, made in parts.items()
        }
        return Chunk(tables, gaps, notes, self.accounting.total)

    def _lines(self, batch: LineBatch) -> pl.DataFrame:
        """row, mark, ns, cpu, text of records (null otherwise), kind of the other lines."""
        frame = pl.DataFrame({"row": np.arange(len(batch), dtype=np.int64), "line": batch.text, "dirty": batch.dirty})
        frame = frame.with_columns(pl.col("line").str.replace(_GLUED, "${rest}"))
        frame = frame.with_columns(
            pl.col("line").str.extract_groups(_RECORD).alias("full"),
            pl.col("line").str.extract_groups(_BARE).alias("bare"),
        )
        field = {
            n: pl.coalesce(pl.col("full").struct.field(n), pl.col("bare").struct.field(n))
            for n in ("mark", "t", "map", "text")
        }
        frame = frame.with_columns(**field)
        seconds = pl.col("t").str.extract(r"^ *(\d+)\.").cast(pl.Int64, strict=False)
        frame = frame.with_columns(
            seconds=seconds,
            ns=seconds * 1_000_000_000 + pl.col("t").str.extract(r"\.(\d{9})$").cast(pl.Int64, strict=False),
            cpu=pl.col("map").str.find("x", literal=True).cast(pl.Int64),
        )
        sane = pl.col("seconds").fill_null(0).lt(_MAX_SECONDS) & ~pl.col("dirty")
        kind = pl.coalesce(*(pl.when(pl.col("line").str.contains(regex)).then(pl.lit(name)) for name, regex in _KINDS))
        return frame.with_columns(cpu=pl.when(sane).then("cpu"), kind=kind).drop("full", "bare", "dirty")

    def _words(self, records: pl.DataFrame, add: Any) -> int:
        """Records printed as words: `ev(main:sub:minor) n [ … ]` and `name[64] [ … ]`."""
        generic = (
            records.with_columns(pl.col("text").str.extract_groups(_GENERIC).alias("g")).unnest("g").drop_nulls("ev")
        )
        for (ev, n), group in generic.partition_by("ev", "n", as_dict=True).items():
            if len(_split(group["w"], int(str(n)))) == int(str(n)):
                self._decode(int(str(ev), 16), group, int(str(n)), add)
        named = (
            records.with_columns(pl.col("text").str.extract_groups(_NAMED).alias("g")).unnest("g").drop_nulls("name")
        )
        named = named.with_columns(pl.col("w").str.count_matches(" ").alias("n"))
        for (name, n), group in named.partition_by("name", "n", as_dict=True).items():
            event = _named_event(str(name), int(str(n)))
            if event is not None:
                self._decode(event, group, int(str(n)), add)
        return 0

    def _decode(self, event: int, group: pl.DataFrame, n: int, add: Any) -> None:
        words = _split(group["w"], n)
        rows = group["row"].to_numpy()
        form = form_of(event, n)
        ids = np.full(len(rows), event, np.uint32)
        if form is not None:
            add(form.event.name, rows, {"event": ids, **decode_words(form, event, words)})
            return
        lists = pa.array(
            np.stack(words, axis=1).astype(np.uint32).tolist() if words else [[]] * len(rows), pa.list_(pa.uint32())
        )
        add(UNKNOWN.name, rows, {"event": ids, "n_words": np.full(len(rows), n), "words": lists})

    def _aux(
        self, batch: LineBatch, done: npt.NDArray[np.bool_], add: Any, notes: list[Note], kinds: pl.Series
    ) -> list[Gap]:
        lengths = batch.byte_lengths()
        other = np.flatnonzero(~done)
        skipped = 0
        if len(other):
            kind = kinds.gather(other).fill_null("unparsed")
            unparsed = other[(kind == "unparsed").to_numpy()]
            skipped = int(lengths[unparsed].sum())
            if len(unparsed):
                text = f"line {batch.first_line + int(unparsed[0])}: {batch.raw(int(unparsed[0]))[:80]!r}"
                offset = batch.offset + int(batch.starts[unparsed[0]])
                notes.append(_note("xenalyze-unparsed", text, offset, len(unparsed)))
            add(AUX.name, other, {"kind": kind, "text": pl.Series([batch.raw(int(i)) for i in other], dtype=pl.String)})
        self.accounting.total += batch.size
        self.accounting.skipped += skipped
        self.accounting.parsed += batch.size - skipped
        if not batch.unterminated:
            return []
        offset = batch.offset + int(batch.starts[-1])
        notes.append(_note("xenalyze-cut", "the last line has no line end", offset))
        return [Gap("truncated", None, None, None, offset, int(lengths[-1]), text="the dump ends inside a line")]


_BY_KEY: dict[str, list[Any]] = {}
for _pattern in PATTERNS:
    _BY_KEY.setdefault(_pattern.key, []).append(_pattern)
_STAMPED = {event.name: event.stamped for found in BY_ID.values() for event in found}


def _note(code: str, text: str, offset: int = 0, count: int = 1) -> Note:
    return Note(code, _CODES[code].severity, text, offset, count=count)


def _split(words: pl.Series, n: int) -> list[npt.NDArray[np.uint64]]:
    parts = words.str.strip_chars().str.split(" ")
    if n == 0:
        return []
    return [
        parts.list.get(i, null_on_oob=True)
        .str.to_integer(base=16, strict=False, dtype=pl.UInt64)
        .fill_null(0)
        .to_numpy()
        for i in range(n)
    ]


def _named_event(name: str, n: int) -> int | None:
    """Event id of a line `name[64] [ n words ]`."""
    if match := re.match(r"hvm_handler (\w+)$", name):
        return 0x82000 | int(match[1], 16) if re.fullmatch(r"[0-9a-f]{1,3}", match[1]) else None
    base = name.removesuffix("64")
    if base in HANDLERS:
        return 0x82000 | HANDLERS[base] | (0x100 if base != name else 0)
    number = PV_NAMES.get(name)
    if number is None and (match := re.match(r"PV-(\d{1,3})$", name)):
        number = int(match[1])
    if number is None:
        return None
    # The text does not say whether the guest was 64-bit: the number of words does.
    wide = form_of(0x201100 | number, n)
    return 0x201100 | number if wide is not None else 0x201000 | number
