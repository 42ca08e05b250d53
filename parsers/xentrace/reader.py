"""Reader of xentrace recordings: windows, records in global order, tables, gaps, notes, clock, byte account."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO, ClassVar

import numpy as np
import pyarrow as pa

from parsers.recording import Accounting, Chunk, ClockModel, Gap, Note, NoteCode, ReadOptions, RecordingError
from parsers.tables import Table
from parsers.xentrace.calibrate import Sample, fit_clock, take_sample
from parsers.xentrace.decode import TABLES, Decoder
from parsers.xentrace.events import sniff_versions
from parsers.xentrace.layout import NEWEST, OLDEST, Version
from parsers.xentrace.merge import Batch, batches
from parsers.xentrace.stamps import Run, runs
from parsers.xentrace.windows import HEADER_BYTES, MAGIC_LE, Source, Windows, plausible, scan

__all__ = ["XentraceReader"]

MAX_HZ = 1 << 34  # to_time multiplies a remainder below this by 1e9 in 64 bits


class XentraceReader:
    """A recording made by xentrace. See `parsers.recording.Reader`.

    `version` is the Xen release that decides between forms of equal length; `version_range` what the ids and
    lengths in the recording allow.
    """

    format: ClassVar[str] = "xentrace"
    note_codes: ClassVar[tuple[NoteCode, ...]] = (
        NoteCode("xentrace-damaged", "error", "bytes that are neither a window header nor records were skipped"),
        NoteCode("xentrace-truncated", "error", "the recording ends inside a window"),
        NoteCode("xentrace-overrun", "error", "a record reaches beyond the end of its window; the rest is skipped"),
        NoteCode("xentrace-lost", "warn", "the recorder's ring was full and it dropped records"),
        NoteCode("xentrace-stamp", "error", "stamps that cannot be true, far off those around; t_ns is the one before"),
        NoteCode("xentrace-tsc-back", "warn", "stamps of a CPU step backward; storage order is kept, t_ns stands"),
        NoteCode("xentrace-unknown", "warn", "records whose id or length is not declared; kept in table `unknown`"),
        NoteCode("xentrace-version", "info", "the Xen version was assumed; it decides how some records are read"),
        NoteCode("xentrace-ticks", "warn", "no frequency could be derived: times are in ticks"),
        NoteCode("xentrace-clock", "info", "how the frequency was derived"),
        NoteCode("xentrace-unstamped", "warn", "a CPU has no stamped record: its records have no time"),
    )
    _severity: ClassVar[dict[str, str]] = {code.code: code.severity for code in note_codes}

    tables: dict[str, Table]
    clock: ClockModel
    accounting: Accounting
    counts: dict[str, int]

    @staticmethod
    def sniff(head: bytes) -> bool:
        """A window header at the start or, in a damaged recording, two that follow each other in the head."""
        unlimited = 1 << 32
        if plausible(head[:HEADER_BYTES], unlimited + HEADER_BYTES) is not None:
            return True
        at = head.find(MAGIC_LE)
        while at >= 0:
            fit = plausible(head[at : at + HEADER_BYTES], len(head) - at)
            if fit is not None:
                end = at + HEADER_BYTES + fit[1]
                if plausible(head[end : end + HEADER_BYTES], unlimited + HEADER_BYTES) is not None:
                    return True
            at = head.find(MAGIC_LE, at + 1)
        return False

    def __init__(self, stream: BinaryIO, options: ReadOptions, *, batch_words: int | None = None) -> None:
        self.tables = dict(TABLES)
        self.counts = {}
        self._options = options
        self._batch_words = batch_words
        self._source = Source(stream)
        self._windows: Windows = scan(self._source)
        self.accounting = Accounting(total=self._source.size, skipped=self._windows.skipped)
        sample = take_sample(self._source, self._windows)
        self.version_range: tuple[Version, Version] = sniff_versions(sample.headers)
        self.version: Version = options.xen_version or self.version_range[1]
        self._clock_notes: list[Note] = []
        self._last: dict[int, int] = {}  # last key of each CPU so far
        # End of what is there of a truncated window: bytes of the record that was cut.
        self._cut_off = {item.offset: 0 for item in self._windows.damage if item.reason == "truncated"}
        self.clock = self._make_clock(sample)

    def _note(self, code: str, text: str, offset: int = 0, cpu: int | None = None, count: int = 1) -> Note:
        return Note(code, self._severity[code], text, offset, cpu, count)

    def _make_clock(self, sample: Sample) -> ClockModel:
        tsc0 = self._windows.origin
        stated = self._options.cpu_hz
        if stated is not None:
            if not 1 <= stated < MAX_HZ:
                raise RecordingError(f"a frequency of {stated:g} Hz is out of range")
            return ClockModel("tsc", float(round(stated)), tsc0, "ns", "--cpu-hz")
        fit = fit_clock(sample)
        if fit.hz is None:
            self._clock_notes.append(self._note("xentrace-ticks", f"{fit.text}; state the frequency to get ns"))
            return ClockModel("tsc", None, tsc0, "ticks", "none", doc=fit.text)
        self._clock_notes.append(self._note("xentrace-clock", fit.text, count=fit.pairs))
        return ClockModel("tsc", float(round(fit.hz)), tsc0, "ns", "PM_IDLE ticks", fit.error_ppm, fit.text)

    def chunks(self) -> Iterator[Chunk]:
        """The whole recording in global order (key, cpu, place in the CPU's stream)."""
        stated = self._options.xen_version
        span = (stated, stated) if stated else self.version_range
        decoder = Decoder(self.clock, self.version, span, self._options.source)
        self.counts = decoder.counts
        position = self._windows.skipped
        gaps, notes = self._damage()
        notes += self._clock_notes
        odd: list[Run] = []
        for batch in batches(self._source, self._windows, self._batch_words):
            tables = decoder.decode(batch) if batch.count else {}
            self.accounting.parsed += batch.done - sum(overrun.length for overrun in batch.overruns)
            gaps += self._lost(tables, notes)
            self._last.update(batch.last)
            for overrun in batch.overruns:
                self.accounting.skipped += overrun.length
                if overrun.offset + overrun.length in self._cut_off:
                    self._cut_off[overrun.offset + overrun.length] = overrun.length
                    continue  # told once, with the truncation
                text = f"CPU {overrun.cpu}: a record reaches beyond its window; {overrun.length} bytes skipped"
                t0 = self._last.get(overrun.cpu)
                gaps.append(Gap("overrun", overrun.cpu, t0, None, overrun.offset, overrun.length, text=text))
                notes.append(self._note("xentrace-overrun", text, overrun.offset, overrun.cpu))
            gaps += self._odd(batch, odd)
            position += batch.done
            chunk = Chunk(tables, gaps, notes, min(position, self.accounting.total))
            del batch, tables  # nothing of this batch may stay while the next one is made
            yield chunk
            del chunk
            gaps, notes = [], []
        yield Chunk({}, self._truncation(), self._summary(decoder, odd), self.accounting.total)

    def _damage(self) -> tuple[list[Gap], list[Note]]:
        gaps, notes = [], []
        for item in self._windows.damage:
            if item.reason != "truncated":
                gaps.append(Gap(item.reason, item.cpu, None, None, item.offset, item.length, text=item.text))
            notes.append(self._note(f"xentrace-{item.reason}", item.text, item.offset, item.cpu))
        for cpu in sorted(set(self._windows.cpu.tolist()) - set(self._windows.first_stamp)):
            text = f"CPU {cpu} has no stamped record"
            notes.append(self._note("xentrace-unstamped", text, cpu=cpu))
        return gaps, notes

    def _truncation(self) -> list[Gap]:
        """Gaps at the end of the file; they begin at the CPU's last key."""
        gaps = []
        for item in self._windows.damage:
            if item.reason == "truncated":
                before = self._cut_off[item.offset]  # bytes of a record that was cut
                t0 = None if item.cpu is None else self._last.get(item.cpu)
                gaps.append(
                    Gap("truncated", item.cpu, t0, None, item.offset - before, item.length + before, text=item.text)
                )
        return gaps

    def _lost(self, tables: dict[str, pa.Table], notes: list[Note]) -> list[Gap]:
        table = tables.get("TRC_LOST_RECORDS")
        if table is None:
            return []
        gaps = []
        columns = ("cpu", "offset", "tsc", "first_tsc", "lost_records")
        for cpu, offset, tsc, first, lost in zip(*(table[name].to_pylist() for name in columns), strict=True):
            text = f"CPU {cpu}: the ring was full, {lost} records were dropped"
            gaps.append(Gap("lost-records", cpu, first, tsc, offset, 0, lost, text))
            notes.append(self._note("xentrace-lost", text, offset, cpu, lost))
        return gaps

    @staticmethod
    def _odd(batch: Batch, odd: list[Run]) -> list[Gap]:
        """Runs of records whose stamps are not their time are kept in `odd`; those that are far off are gaps.

        Whoever changed the stamps may have changed the records.
        """
        if not len(batch.odd):
            return []
        ticks = batch.late_ticks[np.searchsorted(batch.late, batch.odd)]
        of = batch.odd
        found = list(runs(batch.tsc[of], batch.key[of], ticks, batch.cpu[of], batch.offset[of]))
        odd += found
        return [
            Gap(run.reason, run.cpu, run.t0, run.t1, run.offset, text=f"CPU {run.cpu}: {run.count} stamps far off")
            for run in found
            if run.reason != "skew"
        ]

    def _summary(self, decoder: Decoder, odd: list[Run]) -> list[Note]:
        notes = []
        for code, damaged, what in (
            ("xentrace-stamp", True, "stamps that cannot be true"),
            ("xentrace-tsc-back", False, "stamps below an earlier one"),
        ):
            told = [run for run in odd if (run.reason == "damaged") is damaged]
            for cpu in sorted({run.cpu for run in told}):
                mine = [run for run in told if run.cpu == cpu]
                count = sum(run.count for run in mine)
                notes.append(self._note(code, f"CPU {cpu}: {count} {what}", mine[0].offset, cpu, count))
        if unknown := self.counts.get("unknown", 0):
            text = f"{unknown} records with an unknown id or length are kept raw"
            notes.append(self._note("xentrace-unknown", text, count=unknown))
        if decoder.headers.assumed and self._options.xen_version is None:
            names = ", ".join(sorted(decoder.headers.assumed))
            what = "the newest Xen" if self.version == NEWEST else f"Xen {self.version[0]}.{self.version[1]}"
            first = self.version_range[0]
            since = "" if first == OLDEST else f" (the recording shows {first[0]}.{first[1]} or later)"
            text = f"read as written by {what}{since}, which matters for {names}"
            notes.append(self._note("xentrace-version", text, count=sum(decoder.headers.assumed.values())))
        return notes
