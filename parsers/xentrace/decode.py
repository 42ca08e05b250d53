"""Turns a batch of records into one Arrow table for each kind of record, without looping over records."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from parsers.recording import ClockModel
from parsers.tables import COMMON, Table
from parsers.xentrace.events import ALL_EVENTS, BY_ID, UNKNOWN, Form, candidates
from parsers.xentrace.layout import HYPERCALL_ARGS, IdBits, Layout, Version, layout_fields
from parsers.xentrace.merge import Batch

__all__ = ["TABLES", "Decoder", "to_time"]

NS = 1_000_000_000
INT64_MAX = 2**63 - 1
CPU_CHANGE = 0x1F003
LUT_BITS = 14
HASH = np.uint32(0x9E3779B1)

#: One table for each declared event, and `unknown`.
TABLES: dict[str, Table] = {UNKNOWN.name: UNKNOWN, **{event.name: event.table() for event in ALL_EVENTS}}
_NAMES = tuple(TABLES)
_NUMBER = {name: number for number, name in enumerate(_NAMES)}
_SCHEMAS = {name: table.schema() for name, table in TABLES.items()}
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
_Filled = tuple[NDArray[Any], NDArray[np.bool_] | None]  # values, and where they are valid (None: everywhere)


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
    rest = (ticks - seconds * hz) * np.uint64(NS) // hz
    np.minimum(seconds, np.uint64(INT64_MAX // NS - 1), out=seconds)
    time: NDArray[np.int64] = (seconds * np.uint64(NS) + rest).astype(np.int64)
    return time


class _Headers:
    """Header word to code: a small hash table in front of a sorted list; code 0 is `unknown`."""

    def __init__(self, version: Version, span: tuple[Version, Version]) -> None:
        self.version = version
        self.span = span
        self.assumed: dict[str, int] = {}  # events whose form the version decided: records so decoded
        self.forms: list[Form | None] = [None]
        self.tables: list[int] = [0]
        self.decided: list[bool] = [False]
        self.known = np.zeros(0, np.uint32)
        self.codes = np.zeros(0, np.uint16)
        self.slot_header = np.zeros(1 << LUT_BITS, np.uint32)
        self.slot_code = np.zeros(1 << LUT_BITS, np.uint16)

    def encode(self, head: _Words) -> NDArray[np.uint16]:
        slot = (head * HASH) >> np.uint32(32 - LUT_BITS)
        code: NDArray[np.uint16] = self.slot_code[slot]
        missed = np.flatnonzero(self.slot_header[slot] != head)
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
        codes = np.zeros(len(fresh), np.uint16)
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
                self.tables.append(_NUMBER[form.event.name])
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
        self.seq = 0
        self.counts: dict[str, int] = {}

    def decode(self, batch: Batch) -> dict[str, pa.Table]:
        """Arrow tables of a batch by event name, rows sorted by `seq`."""
        count = len(batch.pos)
        codes = self._encode(batch)
        numbers = np.array(self.headers.tables, np.uint16)
        order = np.argsort(batch.key, kind="stable")
        by_table = np.argsort(numbers[codes][order], kind="stable")  # 16 bits: a radix sort
        pick = order[by_table]
        code, head, pos = codes[pick], batch.head[pick], batch.pos[pick]
        common = self._common(batch, pick, by_table, head)
        event = head & np.uint32(0x0FFFFFFF)
        event_column = _plain(pa.uint32(), event)
        payload = pos + 1 + 2 * (head >> np.uint32(31)).astype(np.int64)
        sizes = np.bincount(numbers[codes], minlength=len(_NAMES))
        self.seq += count
        for index, decided in enumerate(self.headers.decided):
            if decided and (rows := int(np.count_nonzero(codes == index))):
                form = self.headers.forms[index]
                assert form is not None
                self.headers.assumed[form.event.name] = self.headers.assumed.get(form.event.name, 0) + rows
        tables: dict[str, pa.Table] = {}
        start = 0
        for number in np.flatnonzero(sizes).tolist():
            name, rows = _NAMES[number], int(sizes[number])
            part = slice(start, start + rows)
            schema = _SCHEMAS[name]
            columns = [array.slice(start, rows) for array in common]
            columns.append(event_column.slice(start, rows))
            if number == 0:
                columns += _unknown(batch.words, payload[part], head[part])
            else:
                columns += self._fields(schema, batch.words, payload[part], head[part], code[part])
            tables[name] = pa.Table.from_arrays(columns, schema=schema)
            self.counts[name] = self.counts.get(name, 0) + rows
            start += rows
        return tables

    def _encode(self, batch: Batch) -> NDArray[np.uint16]:
        """Code of each record's form; hypercalls whose argument sizes contradict their length become `unknown`."""
        codes = self.headers.encode(batch.head)
        packed = [
            code
            for code, form in enumerate(self.headers.forms)
            if form is not None and form.layout.fields == "hypercall:*"
        ]
        rows = np.flatnonzero(np.isin(codes, np.array(packed, np.uint16))) if packed else np.zeros(0, np.int64)
        if len(rows):
            head = batch.head[rows]
            lengths = (head >> np.uint32(28)) & np.uint32(7)
            place = batch.pos[rows] + 1 + 2 * (head >> np.uint32(31)).astype(np.int64)
            sizes = batch.words[np.minimum(place, len(batch.words) - 1)] >> np.uint32(20)
            codes[rows[(_ARGS_WORDS[sizes] != lengths) | (lengths == 0)]] = 0
        return codes

    def _common(self, batch: Batch, pick: _Index, by_table: _Index, head: _Words) -> list[Any]:
        count = len(pick)
        seq = by_table.astype(np.uint64) + np.uint64(self.seq)
        time = to_time(batch.key, self.clock)[pick]
        error = batch.error[pick]
        error[head & np.uint32(0x0FFFFFFF) == CPU_CHANGE] = -1  # nobody knows when the collector wrote it
        known: NDArray[np.bool_] | None = error >= 0
        if self.clock.hz is not None and (waits := np.flatnonzero(error > 0)).size:
            error[waits] = np.minimum(error[waits] * (NS / self.clock.hz), 2.0**32 - 1).astype(np.int64)
        errors = np.minimum(np.maximum(error, 0), 2**32 - 1).astype(np.uint32)
        timed: NDArray[np.bool_] | None = None
        if batch.untimed is not None:
            timed = ~batch.untimed[pick]
        values = (
            _plain(pa.uint64(), seq),
            _plain(pa.int64(), time, timed),
            _plain(pa.uint32(), errors, known),
            _plain(pa.uint64(), batch.tsc[pick], head >= np.uint32(0x80000000)),
            _plain(pa.uint16(), batch.cpu[pick]),
            pa.DictionaryArray.from_arrays(_plain(pa.int16(), np.zeros(count, np.int16)), self.source),
            _plain(pa.uint64(), batch.offset[pick]),
        )
        assert len(values) == len(COMMON)
        return list(values)

    def _fields(
        self, schema: pa.Schema, words: _Words, payload: _Index, head: _Words, code: NDArray[np.uint16]
    ) -> list[Any]:
        """An event's own columns (after `event`); records of one event may have several forms."""
        present = np.flatnonzero(np.bincount(code)).tolist()
        forms = [self.headers.forms[value] for value in present]
        first = forms[0]
        assert first is not None
        columns = schema.names[len(COMMON) + 1 :]
        ready: dict[str, Any] = {bits.name: _id_bits(bits, head) for bits in first.event.id_bits}
        layouts = {form.layout.fields for form in forms if form is not None}
        if len(layouts) == 1:
            for name, (values, valid) in _gather(first.layout, words, payload, head).items():
                ready[name] = _plain(schema.field(name).type, values, valid)
        else:
            ready.update(self._several(schema, words, payload, head, code, present))
        rows = len(payload)
        return [ready[name] if name in ready else pa.nulls(rows, schema.field(name).type) for name in columns]

    def _several(
        self,
        schema: pa.Schema,
        words: _Words,
        payload: _Index,
        head: _Words,
        code: NDArray[np.uint16],
        present: list[int],
    ) -> dict[str, Any]:
        values: dict[str, NDArray[Any]] = {}
        valid: dict[str, NDArray[np.bool_]] = {}
        rows = len(payload)
        for value in present:
            form = self.headers.forms[value]
            assert form is not None
            where = np.flatnonzero(code == value)
            for name, (part, known) in _gather(form.layout, words, payload[where], head[where]).items():
                if name not in values:
                    kind = schema.field(name).type
                    values[name] = np.zeros(rows, np.bool_ if pa.types.is_boolean(kind) else kind.to_pandas_dtype())
                    valid[name] = np.zeros(rows, np.bool_)
                values[name][where] = part
                valid[name][where] = True if known is None else known
        return {name: _plain(schema.field(name).type, values[name], valid[name]) for name in values}


def _bits(values: NDArray[np.bool_]) -> Any:
    return pa.py_buffer(np.packbits(values, bitorder="little"))


def _plain(kind: pa.DataType, values: Any, valid: NDArray[np.bool_] | None = None) -> Any:
    """Arrow array over NumPy values; an Arrow array (a list column) passes through."""
    if isinstance(values, pa.Array):
        return values
    nulls = None if valid is None or valid.all() else _bits(valid)
    if pa.types.is_boolean(kind):
        data = _bits(values)
    else:
        data = pa.py_buffer(np.ascontiguousarray(values, kind.to_pandas_dtype()))
    return pa.Array.from_buffers(kind, len(values), [nulls, data])


def _id_bits(bits: IdBits, head: _Words) -> Any:
    values = (head >> np.uint32(bits.shift)) & np.uint32((1 << bits.bits) - 1)
    if bits.bits == 1:
        return _plain(pa.bool_(), values != 0)
    if bits.bits > 8:
        return _plain(bits.type, values + np.uint32(bits.add))
    return _plain(pa.uint8(), (values + np.uint32(bits.add)).astype(np.uint8))


def _gather(layout: Layout, words: _Words, payload: _Index, head: _Words) -> dict[str, _Filled]:
    """The fields of records that all have `layout`; `payload[i]` is the place of record i's first extra word."""
    fields, _ = layout_fields(layout.fields)
    if fields and fields[0].kind == "*":
        lengths = (head >> np.uint32(28)) & np.uint32(7)
        if fields[0].name == "words":
            return {"words": (_lists(words, payload, lengths), None)}
        if fields[0].name == "filler":
            return {"n_words": (lengths.astype(np.uint8), None)}
        return _hypercall(words, payload)
    out: dict[str, _Filled] = {}
    read: dict[int, _Words] = {}
    for field in fields:
        if field.bits == 64:
            wide = np.empty((len(payload), 2), np.uint32)
            wide[:, 0] = words[payload + field.word]
            wide[:, 1] = words[payload + (field.word + 1)]
            out[field.name] = (wide.view(np.uint64)[:, 0], None)
            continue
        value = read.get(field.word)
        if value is None:
            value = read[field.word] = words[payload + field.word]
        if field.bits < 32:
            value = (value >> np.uint32(field.shift)) & np.uint32((1 << field.bits) - 1)
        values: NDArray[Any] = value
        if field.kind == "b":
            values = value != 0
        elif field.kind == "s":
            spare = 32 - field.bits
            values = (value << np.uint32(spare)).view(np.int32) >> np.int32(spare)
        out[field.name] = (values, None)
    return out


def _hypercall(words: _Words, payload: _Index) -> dict[str, _Filled]:
    """op:20, then six 2-bit sizes (0 absent, 1 one word, 2 two words), then the arguments themselves."""
    first = words[payload]
    sizes = first >> np.uint32(20)
    out: dict[str, _Filled] = {
        "op": (first & np.uint32(0xFFFFF), None),
        "present": (sizes.astype(np.uint16), None),
    }
    place = payload + 1
    for number in range(HYPERCALL_ARGS):
        size = (sizes >> np.uint32(2 * number)) & np.uint32(3)
        rows = np.flatnonzero(size)
        value = np.zeros(len(payload), np.uint64)
        if len(rows):
            value[rows] = words[place[rows]]
            wide = np.flatnonzero(size == 2)
            if len(wide):
                value[wide] |= words[place[wide] + 1].astype(np.uint64) << np.uint64(32)
            place[rows] += size[rows]
        out[f"a{number}"] = (value, size != 0)
    return out


def _lists(words: _Words, payload: _Index, lengths: _Words) -> Any:
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    flat = words[np.repeat(payload - starts, lengths) + np.arange(int(ends[-1]) if len(ends) else 0)]
    offsets = np.zeros(len(lengths) + 1, np.int32)
    offsets[1:] = ends
    return pa.ListArray.from_arrays(_plain(pa.int32(), offsets), _plain(pa.uint32(), flat))


def _unknown(words: _Words, payload: _Index, head: _Words) -> list[Any]:
    lengths = (head >> np.uint32(28)) & np.uint32(7)
    return [_plain(pa.uint8(), lengths.astype(np.uint8)), _lists(words, payload, lengths)]
