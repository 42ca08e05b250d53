"""Turns a batch of records into one Arrow table for each kind of record, without looping over records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from parsers.recording import ClockModel
from parsers.tables import COMMON, Table
from parsers.xentrace.events import ALL_EVENTS, BY_ID, UNKNOWN, Form, candidates
from parsers.xentrace.fields import Filled, gather, id_bits, plain, unknown
from parsers.xentrace.layout import HYPERCALL_ARGS, Version
from parsers.xentrace.merge import Batch

__all__ = ["TABLES", "Decoder", "to_time"]

NS = 1_000_000_000
INT64_MAX = 2**63 - 1
CPU_CHANGE = 0x1F003
STAMPED = np.uint32(0x80000000)  # bit of a header word
LUT_BITS = 14
HASH = np.uint32(0x9E3779B1)

#: One table for each declared event, and `unknown`.
TABLES: dict[str, Table] = {UNKNOWN.name: UNKNOWN, **{event.name: event.table() for event in ALL_EVENTS}}
_NAMES = tuple(TABLES)
_NUMBER = {name: number for number, name in enumerate(_NAMES)}
_NUMBER_TYPE = np.min_scalar_type(len(_NAMES))  # 8 bits sort faster than 16
_SCHEMAS = {name: table.schema() for name, table in TABLES.items()}
#: An event's own columns, after COMMON and `event`.
_OWN = {name: [(field.name, field.type) for field in list(_SCHEMAS[name])[len(COMMON) + 1 :]] for name in _NAMES}
#: Tables with records of which nobody knows when the collector wrote them.
_COLLECTOR = frozenset({0, *(_NUMBER[event.name] for event in BY_ID[CPU_CHANGE])})
_KNOWN_IDS = np.array(sorted(BY_ID), np.uint32)

#: Words of a hypercall record by its six 2-bit argument sizes; 0 where a size is 3, which means nothing.
_ARGS_WORDS = np.array(
    [
        0 if 3 in sizes else 1 + sum(sizes)
        for packed in range(1 << 2 * HYPERCALL_ARGS)
        for sizes in [[packed >> 2 * number & 3 for number in range(HYPERCALL_ARGS)]]
    ],
    np.uint8,
)

_Words = NDArray[np.uint32]
_Index = NDArray[np.int64]


def to_time(key: NDArray[np.uint64], clock: ClockModel) -> NDArray[np.int64]:
    """`t_ns` of sort keys: floor((key - tsc0) * 1e9 / hz) in integers, or ticks without a frequency.

    `clock.hz` is a whole number of Hz below 2**34, so that the remainder times 1e9 fits into 64 bits.
    """
    ticks = key - np.uint64(clock.tsc0)
    if clock.hz is None:
        clipped: NDArray[np.int64] = np.minimum(ticks, np.uint64(INT64_MAX)).astype(np.int64)
        return clipped
    hz = np.uint64(int(clock.hz))
    seconds = ticks // hz
    ticks -= seconds * hz
    ticks *= np.uint64(NS)
    ticks //= hz
    np.minimum(seconds, np.uint64(INT64_MAX // NS - 1), out=seconds)
    seconds *= np.uint64(NS)
    seconds += ticks
    time: NDArray[np.int64] = seconds.view(np.int64)
    return time


class _Headers:
    """Header word to code: a small hash table in front of a sorted list; code 0 is `unknown`."""

    def __init__(self, version: Version, span: tuple[Version, Version]) -> None:
        self.version = version
        self.span = span
        self.assumed: dict[str, int] = {}  # events whose form the version decided: records so decoded
        self.forms: list[Form | None] = [None]
        self.tables = np.zeros(1, _NUMBER_TYPE)  # table of each code
        self.packed = np.zeros(1, np.bool_)  # whether the code is a hypercall with packed arguments
        self.of_table: dict[int, list[int]] = {}  # codes of each table
        self.decided: list[bool] = [False]
        self.known = np.zeros(0, np.uint32)
        self.codes = np.zeros(0, np.intp)  # as wide as an index: other integers are converted each time
        self.slot_header = np.zeros(1 << LUT_BITS, np.uint32)
        self.slot_code = np.zeros(1 << LUT_BITS, np.intp)

    def encode(self, head: _Words) -> NDArray[np.intp]:
        slot = ((head * HASH) >> np.uint32(32 - LUT_BITS)).astype(np.intp)
        code: NDArray[np.intp] = self.slot_code.take(slot)
        missed = np.flatnonzero(self.slot_header.take(slot) != head)
        if len(missed):
            values = head[missed]
            ids = values & np.uint32(0x0FFFFFFF)
            place = np.minimum(np.searchsorted(_KNOWN_IDS, ids), len(_KNOWN_IDS) - 1)
            declared = _KNOWN_IDS[place] == ids
            code[missed[~declared]] = 0
            values = values[declared]
            fresh = np.setdiff1d(values, self.known)
            if len(fresh):
                self._add(fresh)
            if len(values):
                code[missed[declared]] = self.codes[np.searchsorted(self.known, values)]
        return code

    def _add(self, fresh: _Words) -> None:
        codes = np.zeros(len(fresh), np.intp)
        for index, header in enumerate(fresh.tolist()):
            form, decided = candidates(header, self.version, self.span)
            if form is None:
                continue
            key = (form, decided)
            for code in range(1, len(self.forms)):
                if (self.forms[code], self.decided[code]) == key:
                    codes[index] = code
                    break
            else:
                codes[index] = len(self.forms)
                self.forms.append(form)
                self.decided.append(decided)
                self.tables = np.append(self.tables, self.tables.dtype.type(_NUMBER[form.event.name]))
                self.packed = np.append(self.packed, form.layout.fields == "hypercall:*")
                self.of_table.setdefault(_NUMBER[form.event.name], []).append(len(self.forms) - 1)
        slot = (fresh * HASH) >> np.uint32(32 - LUT_BITS)
        self.slot_header[slot] = fresh
        self.slot_code[slot] = codes
        known = np.concatenate((self.known, fresh))
        order = np.argsort(known)
        self.known = known[order]
        self.codes = np.concatenate((self.codes, codes))[order]


class Decoder:
    """Decodes batches one after the other; numbers the records; counts them per event name."""

    def __init__(
        self, clock: ClockModel, version: Version, span: tuple[Version, Version], source: str
    ) -> None:
        self.clock = clock
        self.headers = _Headers(version, span)
        self.source = pa.array([source], pa.string())
        self.same = (_repeated(0, self.source), plain(pa.uint32(), np.zeros(0, np.uint32)))
        self.seq = 0
        self.counts: dict[str, int] = {}

    def decode(self, batch: Batch) -> dict[str, pa.Table]:
        """Arrow tables of a batch by event name, rows sorted by `seq`."""
        codes = self._encode(batch)
        numbers = self.headers.tables.take(codes)
        if batch.chosen is None:
            order = np.argsort(batch.key, kind="stable")
        else:
            order = batch.chosen[np.argsort(batch.key[batch.chosen], kind="stable")]
        by_table = np.argsort(numbers.take(order), kind="stable")  # of small integers: a radix sort
        pick = order.take(by_table)
        rows = _Rows(self, batch, pick, by_table, codes)
        ends = np.searchsorted(numbers.take(pick), np.arange(len(_NAMES) + 1, dtype=np.int64)).tolist()
        self.seq += batch.count
        tables: dict[str, pa.Table] = {}
        for number, name in enumerate(_NAMES):
            start, end = ends[number], ends[number + 1]
            if start == end:
                continue
            part = slice(start, end)
            bare = bool(rows.head[part].min() < STAMPED)
            columns = rows.common(part, bare, number)
            # Where the payload begins, counted from the header word.
            if bare and rows.head[part].max() >= STAMPED:
                words, place = batch.words, rows.pos[part] + 1 + 2 * (rows.head[part] >> np.uint32(31)).astype(np.int64)
            else:
                words, place = batch.words[1 if bare else 3 :], rows.pos[part]
            if number == 0:
                columns += unknown(words, place, rows.head[part])
            else:
                columns += self._fields(number, words, place, rows.head[part], pick[part], codes)
            tables[name] = pa.Table.from_arrays(columns, schema=_SCHEMAS[name])
            self.counts[name] = self.counts.get(name, 0) + end - start
        return tables

    def alike(self, rows: int) -> tuple[Any, Any]:
        """Columns that are the same in most tables: `source`, and `t_err_ns` of records whose stamp is their time."""
        if rows > len(self.same[0]):
            zeros = np.zeros(2 * rows, np.uint32)
            self.same = (_repeated(2 * rows, self.source), plain(pa.uint32(), zeros))
        return self.same[0].slice(0, rows), self.same[1].slice(0, rows)

    def _encode(self, batch: Batch) -> NDArray[np.intp]:
        """Code of each record's form; hypercalls whose argument sizes contradict their length become `unknown`."""
        codes = self.headers.encode(batch.head)
        if self.headers.packed.any():
            rows = np.flatnonzero(self.headers.packed.take(codes))
            head = batch.head[rows]
            lengths = (head >> np.uint32(28)) & np.uint32(7)
            place = batch.pos[rows] + 1 + 2 * (head >> np.uint32(31)).astype(np.int64)
            sizes = batch.words[place] >> np.uint32(20)
            codes[rows[(_ARGS_WORDS[sizes] != lengths) | (lengths == 0)]] = 0
        return codes

    def _fields(
        self, number: int, words: _Words, payload: _Index, head: _Words, pick: _Index, codes: NDArray[np.intp]
    ) -> list[Any]:
        """An event's own columns (after `event`); records of one event may have several forms."""
        rows = len(payload)
        code: NDArray[np.intp] | None = None
        present = self.headers.of_table[number]
        counts = [rows]
        if len(present) > 1:
            code = codes[pick]
            sizes = np.bincount(code)
            present = np.flatnonzero(sizes).tolist()
            counts = sizes[present].tolist()
        forms = [form for value in present if (form := self.headers.forms[value]) is not None]
        for value, form, count in zip(present, forms, counts, strict=True):
            if self.headers.decided[value]:
                assumed = self.headers.assumed
                assumed[form.event.name] = assumed.get(form.event.name, 0) + count
        first = forms[0]
        own = _OWN[first.event.name]
        ready: dict[str, Any] = {bits.name: id_bits(bits, head) for bits in first.event.id_bits}
        if code is None or len({form.layout.fields for form in forms}) == 1:
            filled = gather(first.layout, words, payload, head)
        else:
            filled = self._several(dict(own), words, payload, head, code, present)
        for name, kind in own:
            if name in filled:
                ready[name] = plain(kind, *filled[name])
            elif name not in ready:
                ready[name] = pa.nulls(rows, kind)
        return [ready[name] for name, _ in own]

    def _several(
        self,
        kinds: dict[str, pa.DataType],
        words: _Words,
        payload: _Index,
        head: _Words,
        code: NDArray[np.intp],
        present: list[int],
    ) -> dict[str, Filled]:
        values: dict[str, NDArray[Any]] = {}
        valid: dict[str, NDArray[np.bool_]] = {}
        rows = len(payload)
        for value in present:
            form = self.headers.forms[value]
            assert form is not None
            where = np.flatnonzero(code == value)
            for name, (part, known) in gather(form.layout, words, payload[where], head[where]).items():
                if name not in values:
                    kind = kinds[name]
                    values[name] = np.zeros(rows, np.bool_ if pa.types.is_boolean(kind) else kind.to_pandas_dtype())
                    valid[name] = np.zeros(rows, np.bool_)
                values[name][where] = part
                valid[name][where] = True if known is None else known
        return {name: (values[name], valid[name]) for name in values}


class _Rows:
    """The records of a batch in the order of the tables: what all kinds of records have."""

    def __init__(
        self, decoder: Decoder, batch: Batch, pick: _Index, by_table: _Index, codes: NDArray[np.intp]
    ) -> None:
        self.decoder = decoder
        self.batch = batch
        self.pick = pick
        self.head = batch.head.take(pick)
        self.pos = batch.pos.take(pick)
        self.event = self.head & np.uint32(0x0FFFFFFF)
        self.seq = by_table.view(np.uint64)
        self.seq += np.uint64(decoder.seq)
        self.key = batch.key.take(pick)
        self.time = to_time(self.key, decoder.clock)
        self.cpu = batch.cpu.take(pick)
        self.offset = batch.offset.take(pick)
        # Only records without a stamp of their own can have an error.
        self.error = np.zeros(len(batch.pos), np.uint32)
        self.known = np.ones(len(batch.pos), np.bool_)
        late = batch.late_ticks
        if decoder.clock.hz is not None:
            late = np.where(late > 0, np.minimum(late * (NS / decoder.clock.hz), 2.0**32 - 1).astype(np.int64), late)
        self.columns = {
            "seq": plain(pa.uint64(), self.seq),
            "t_ns": plain(pa.int64(), self.time),
            "tsc": plain(pa.uint64(), batch.tsc.take(pick) if len(batch.odd) else self.key),
            "cpu": plain(pa.uint16(), self.cpu),
            "offset": plain(pa.uint64(), self.offset),
            "event": plain(pa.uint32(), self.event),
        }
        self.error[batch.late] = np.minimum(np.maximum(late, 0), 2**32 - 1).astype(np.uint32)
        self.known[batch.late] = late >= 0

    def common(self, part: slice, bare: bool, number: int) -> list[Any]:
        """COMMON and `event`; `bare`: some of these records have no stamp."""
        batch, rows = self.batch, part.stop - part.start
        own = {name: column.slice(part.start, rows) for name, column in self.columns.items()}
        source, error = self.decoder.alike(rows)
        if bare or number in _COLLECTOR or len(batch.odd):
            pick = self.pick[part]
            known = self.known[pick] & (self.event[part] != CPU_CHANGE)
            error = plain(pa.uint32(), self.error[pick], known)
        if batch.untimed is not None:
            own["t_ns"] = plain(pa.int64(), self.time[part], ~batch.untimed[self.pick[part]])
        if bare:
            own["tsc"] = plain(pa.uint64(), batch.tsc[self.pick[part]], self.head[part] >= STAMPED)
        columns = [own["seq"], own["t_ns"], error, own["tsc"], own["cpu"], source, own["offset"]]
        assert len(columns) == len(COMMON)
        return [*columns, own["event"]]


def _repeated(rows: int, value: Any) -> Any:
    """The one value, `rows` times, as a dictionary array."""
    return pa.DictionaryArray.from_arrays(plain(pa.int16(), np.zeros(rows, np.int16)), value)
