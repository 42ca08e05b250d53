"""NumPy to Arrow without copies, and byte strings to text through a dictionary."""

from __future__ import annotations

import sys
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from parsers.ftrace.columns import escape

__all__ = ["Array", "binary", "bits", "constant", "dictionary", "nulls", "plain", "texts"]

Array = npt.NDArray[Any]


def plain(kind: pa.DataType, values: Array, valid: Array | None = None) -> pa.Array:
    """Numbers as an Arrow array of type `kind` (same width as `values`); rows where `valid` is False are null."""
    mask = None if valid is None or valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    data = np.ascontiguousarray(values)
    return pa.Array.from_buffers(kind, len(data), [mask, pa.py_buffer(data)])


def bits(values: Array, valid: Array | None = None) -> pa.Array:
    """Booleans."""
    mask = None if valid is None or valid.all() else pa.py_buffer(np.packbits(valid, bitorder="little"))
    return pa.Array.from_buffers(
        pa.bool_(), len(values), [mask, pa.py_buffer(np.packbits(values, bitorder="little"))]
    )


def dictionary(
    kind: pa.DataType, index: Array, names: list[str] | pa.Array, valid: Array | None = None
) -> pa.Array:
    """A dictionary column of type `kind` from indices into `names`; rows where `valid` is False are null."""
    indices = plain(kind.index_type, index.astype(kind.index_type.to_pandas_dtype(), copy=False), valid)
    words = pa.array(names, pa.string()) if isinstance(names, list) else names
    return pa.DictionaryArray.from_arrays(indices, words, safe=False)


def constant(kind: pa.DataType, name: str, rows: int) -> pa.Array:
    """A dictionary column that says `name` in every row."""
    return dictionary(kind, np.zeros(rows, dtype=np.int32), [name])


def nulls(kind: pa.DataType, rows: int) -> pa.Array:
    """A column of nulls (of dictionary type too)."""
    return pa.nulls(rows, kind)


def binary(data: Array, starts: Array, lengths: Array, kind: pa.DataType | None = None) -> pa.Array:
    """Column of type `kind` (large_binary; or binary): row i is data[starts[i] : starts[i] + lengths[i]] (uint8)."""
    kind = pa.large_binary() if kind is None else kind
    if starts.size and data.size < 1 << 31 and _views_work():
        return _views(data, starts, lengths).cast(kind)
    offsets = np.zeros(len(starts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    index = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data[index]))]
    return pa.Array.from_buffers(pa.large_binary(), len(starts), buffers).cast(kind)


def _views(data: Array, starts: Array, lengths: Array) -> pa.Array:
    """A view of 16 bytes for each row (Arrow's binary_view): copying through it is 50 times faster than by index.

    Up to 12 bytes stand in the view itself; a longer value has its first 4 bytes, buffer 0 and its offset there.
    """
    starts = np.where(lengths > 0, starts, 0)  # damaged: an empty value may be said to lie anywhere
    views = np.zeros((starts.size, 4), dtype="<i4")
    views[:, 0] = lengths
    rows = np.flatnonzero(lengths > 12)
    whole = rows.size == starts.size
    at = starts if whole else starts[rows]
    first = np.ndarray((max(0, data.size - 3),), "<i4", data.data, 0, (1,))
    if whole:
        views[:, 1], views[:, 3] = first[at], at
    else:
        views[rows, 1], views[rows, 3] = first[at], at
        rows = np.flatnonzero(lengths <= 12)
        # an empty value may lie anywhere
        at = starts[rows] * (lengths[rows] > 0)
        if int(at.max()) > data.size - 12:
            data = np.concatenate((data, np.zeros(12, dtype=np.uint8)))
        items = np.ndarray((max(0, data.size - 11),), "V12", data.data, 0, (1,))
        inline = items[at].view(np.uint8).reshape(-1, 12)
        views[rows, 1:] = (inline * (np.arange(12) < lengths[rows][:, None])).view("<i4")
    return pa.Array.from_buffers(pa.binary_view(), starts.size, [None, pa.py_buffer(views), pa.py_buffer(data)])


@lru_cache(maxsize=1)
def _views_work() -> bool:
    """Whether this pyarrow can make plain columns of views (older ones cannot), on a machine of the right order."""
    data = np.frombuffer(b"0123456789abcdefghij" + bytes(12), dtype=np.uint8)
    try:
        made = _views(data, np.array([0, 17, 4, 20]), np.array([14, 3, 13, 0]))
        wide, small = made.cast(pa.large_binary()).to_pylist(), made.cast(pa.binary()).to_pylist()
    except (pa.ArrowException, AttributeError, TypeError, ValueError):
        return False
    return sys.byteorder == "little" and wide == small == [b"0123456789abcd", b"hij", b"456789abcdefg", b""]


def texts(values: pa.Array) -> pa.Array:
    """Binary values as escaped strings, each cut at its first NUL; equal values are converted once."""
    coded = values.dictionary_encode()
    names = [escape(raw.split(b"\0", 1)[0]) for raw in coded.dictionary.to_pylist()]
    return pa.DictionaryArray.from_arrays(coded.indices, pa.array(names, pa.string())).cast(pa.string())
