"""Fields of many records of one event type, gathered column by column."""

from __future__ import annotations

from typing import Final

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array, binary, bits, plain, texts
from parsers.tracedat.formats import Field
from parsers.tracedat.layout import Limit

__all__ = ["Batch", "Block", "column", "numbers"]


#: Words; a wider record is gathered field by field.
WIDEST = 64


class Batch:
    """Ring-buffer bytes with views as half words and words; `data` ends with SPARE bytes and a word more."""

    SPARE: Final = 24

    def __init__(self, data: Array, order: str) -> None:
        self.data, self.order = data, order
        self.half = data.view(f"{order}u2")
        self.words = data.view(f"{order}u4")


def numbers(batch: Batch, at: Array, size: int) -> Array:
    """Unsigned numbers of `size` (1, 2, 4, 8) bytes at byte positions `at`, in native byte order."""
    if size == 1:
        return np.asarray(batch.data[at])
    offset = int(at[0]) if at.size else 0
    # record starts are multiples of 4, so one row tells how all rows are aligned
    if size == 2 and offset % 2 == 0:
        return np.asarray(batch.half[at >> 1], dtype=np.uint16)
    if size == 4 and offset % 4 == 0:
        return np.asarray(batch.words[at >> 2], dtype=np.uint32)
    if size == 8 and offset % 4 == 0:
        pair = np.empty((at.size, 2), dtype=np.uint32)
        index = at >> 2
        first, second = (0, 1) if np.little_endian == (batch.order == "<") else (1, 0)
        pair[:, first], pair[:, second] = batch.words[index], batch.words[index + 1]
        return pair.view(np.uint64).ravel()
    gathered = batch.data[at[:, None] + np.arange(size)]
    return gathered.view(f"{batch.order}u{size}").ravel().astype(f"=u{size}")


class Block:
    """The fixed parts of all records of one event, copied side by side: one gather serves all fields."""

    def __init__(self, batch: Batch, start: Array, size: Array, least: int) -> None:
        self.batch, self.start, self.size = batch, start, size
        width = (least + 3) // 4
        self._rows: Array | None = None
        if 0 < width <= WIDEST and start.size and not int(start[0]) & 3:
            # items of a record's size that begin at every word; records start at words
            data = batch.data
            count = (len(data) - 4 * width) // 4 + 1
            items = np.ndarray((max(0, count),), dtype=f"V{4 * width}", buffer=data.data, strides=(4,))
            index = start >> 2
            if int(index.max()) < count:
                self._rows = items[index].view(np.uint8).reshape(start.size, 4 * width)

    def __len__(self) -> int:
        return int(self.start.size)

    def numbers(self, offset: int, size: int) -> Array:
        """Unsigned numbers of `size` bytes at `offset` of every record, in native byte order."""
        if self._rows is None or offset + size > self._rows.shape[1]:
            return numbers(self.batch, self.start + offset, size)
        part = self._rows[:, offset : offset + size]
        if size == 1:
            return np.ascontiguousarray(part).ravel()
        fields = np.ndarray(
            (len(self),), f"{self.batch.order}u{size}", self._rows.data, offset, (self._rows.shape[1],)
        )
        return fields.astype(f"=u{size}")


def column(block: Block, field: Field) -> pa.Array:
    """The field's values of a block's records."""
    batch, start, size = block.batch, block.start, block.size
    if field.place == "fixed" and field.kind in ("number", "bool"):
        values = block.numbers(field.offset, field.size)
        return bits(values != 0) if field.kind == "bool" else plain(field.arrow(), values)
    if field.place == "fixed":
        return _fixed_array(batch, field, start + field.offset)
    if field.place == "rest":
        where, length = field.offset, size - field.offset
        begin = np.full(start.size, where, dtype=np.int64)
    else:
        location = block.numbers(field.offset, 4).astype(np.int64)
        begin, length = location & 0xFFFF, location >> 16
        if field.place == "rel_loc":
            begin = begin + field.offset + 4
        # a damaged location must not reach beyond its own record
        length = np.clip(np.minimum(length, size - begin), 0, None)
    return _variable_array(batch, field, start + begin, np.minimum(length, Limit.ARRAY))


def _fixed_array(batch: Batch, field: Field, at: Array) -> pa.Array:
    rows, size = at.size, field.size
    if rows and int(at[0]) % 4 == 0 and size % 4 == 0:
        flat = batch.data.view(np.uint32)[(at >> 2)[:, None] + np.arange(size // 4)].view(np.uint8)
    else:
        flat = batch.data[at[:, None] + np.arange(size)]
    if field.kind == "list":
        values = flat.reshape(-1).view(f"{batch.order}u{field.item}").astype(f"=u{field.item}")
        offsets = np.arange(rows + 1, dtype=np.int32) * (size // field.item)
        return _list(field, offsets, values)
    raw = pa.Array.from_buffers(pa.binary(size), rows, [None, pa.py_buffer(np.ascontiguousarray(flat))])
    return texts(raw) if field.kind == "string" else raw.cast(pa.binary())


def _variable_array(batch: Batch, field: Field, begin: Array, length: Array) -> pa.Array:
    if field.kind == "list":
        length = length // field.item * field.item
        offsets = np.zeros(begin.size + 1, dtype=np.int32)
        np.cumsum(length // field.item, out=offsets[1:])
        total = np.concatenate(([0], np.cumsum(length)))
        index = np.repeat(begin - total[:-1], length) + np.arange(total[-1])
        values = batch.data[index].view(f"{batch.order}u{field.item}").astype(f"=u{field.item}")
        return _list(field, offsets, values)
    raw = binary(batch.data, begin, length)
    return texts(raw) if field.kind == "string" else raw.cast(pa.binary())


def _list(field: Field, offsets: Array, values: Array) -> pa.Array:
    items = plain(field.arrow().value_type, values)
    return pa.ListArray.from_arrays(plain(pa.int32(), offsets), items).cast(field.arrow())
