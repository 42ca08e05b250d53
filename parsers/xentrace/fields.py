"""A record's payload words as columns: fields gathered from many records at once, and Arrow arrays of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from parsers.xentrace.layout import HYPERCALL_ARGS, Field, IdBits, Layout, layout_fields

__all__ = ["Filled", "gather", "id_bits", "plain", "unknown"]

_Words = NDArray[np.uint32]
_Index = NDArray[np.int64]
Filled = tuple[NDArray[Any], NDArray[np.bool_] | None]  #: values, and where they are valid (None: everywhere)


def _bits(values: NDArray[np.bool_]) -> Any:
    return pa.py_buffer(np.packbits(values, bitorder="little"))


def plain(kind: pa.DataType, values: Any, valid: NDArray[np.bool_] | None = None) -> Any:
    """Arrow array over NumPy values; an Arrow array (a list column) passes through."""
    if isinstance(values, pa.Array):
        return values
    nulls = None if valid is None or valid.all() else _bits(valid)
    if pa.types.is_boolean(kind):
        data = _bits(values)
    else:
        data = pa.py_buffer(np.ascontiguousarray(values, kind.to_pandas_dtype()))
    return pa.Array.from_buffers(kind, len(values), [nulls, data])


def id_bits(bits: IdBits, head: _Words) -> Any:
    """The column for bits of the event id."""
    values = (head >> np.uint32(bits.shift)) & np.uint32((1 << bits.bits) - 1)
    if bits.bits == 1:
        return plain(pa.bool_(), values != 0)
    if bits.bits > 8:
        return plain(bits.type, values + np.uint32(bits.add))
    return plain(pa.uint8(), (values + np.uint32(bits.add)).astype(np.uint8))


def gather(layout: Layout, words: _Words, payload: _Index, head: _Words) -> dict[str, Filled]:
    """The fields of records that all have `layout`; `payload[i]` is the place of record i's first extra word.

    `take` needs two thirds of the time of an index in brackets.
    """
    fields, _ = layout_fields(layout.fields)
    if fields and fields[0].kind == "*":
        lengths = (head >> np.uint32(28)) & np.uint32(7)
        if fields[0].name == "words":
            return {"words": (_lists(words, payload, lengths), None)}
        if fields[0].name == "filler":
            return {"n_words": (lengths.astype(np.uint8), None)}
        return _hypercall(words, payload)
    out: dict[str, Filled] = {}
    read: dict[int, _Words] = {}
    for field in fields:
        if field.bits == 64:
            wide = np.empty((len(payload), 2), np.uint32)
            wide[:, 0] = words[field.word :].take(payload)
            wide[:, 1] = words[field.word + 1 :].take(payload)
            out[field.name] = (wide.view(np.uint64)[:, 0], None)
            continue
        value = read.get(field.word)
        if value is None:
            value = read[field.word] = words[field.word :].take(payload)
        out[field.name] = (_part(field, value), None)
    return out


def _part(field: Field, value: _Words) -> NDArray[Any]:
    """A field of at most 32 bits out of its word."""
    spare = 32 - field.bits
    if field.bits in (8, 16) and field.kind != "b" and field.shift % field.bits == 0:
        size = field.bits // 8
        parts = value.view(f"<{'i' if field.kind == 's' else 'u'}{size}")
        part: NDArray[Any] = parts[field.shift // field.bits :: 4 // size]
        return part
    if spare:
        value = (value >> np.uint32(field.shift)) & np.uint32((1 << field.bits) - 1)
    if field.kind == "b":
        truth: NDArray[Any] = value != 0
        return truth
    if field.kind == "s":
        signed: NDArray[Any] = (value << np.uint32(spare)).view(np.int32) >> np.int32(spare)
        return signed
    return value


def _hypercall(words: _Words, payload: _Index) -> dict[str, Filled]:
    """op:20, then six 2-bit sizes (0 absent, 1 one word, 2 two words), then the arguments themselves."""
    first = words[payload]
    sizes = first >> np.uint32(20)
    out: dict[str, Filled] = {
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
    return pa.ListArray.from_arrays(plain(pa.int32(), offsets), plain(pa.uint32(), flat))


def unknown(words: _Words, payload: _Index, head: _Words) -> list[Any]:
    """The columns of table `unknown`: number of words, and the words."""
    lengths = (head >> np.uint32(28)) & np.uint32(7)
    return [plain(pa.uint8(), lengths.astype(np.uint8)), _lists(words, payload, lengths)]
