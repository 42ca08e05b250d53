"""NumPy to Arrow without copies, and byte strings to text through a dictionary."""

from __future__ import annotations

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


def dictionary(kind: pa.DataType, index: Array, names: list[str]) -> pa.Array:
    """A dictionary column of type `kind` from indices into `names`."""
    indices = plain(kind.index_type, index.astype(kind.index_type.to_pandas_dtype()))
    return pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string()))


def constant(kind: pa.DataType, name: str, rows: int) -> pa.Array:
    """A dictionary column that says `name` in every row."""
    return dictionary(kind, np.zeros(rows, dtype=np.int32), [name])


def nulls(kind: pa.DataType, rows: int) -> pa.Array:
    """A column of nulls (of dictionary type too)."""
    return pa.nulls(rows, kind)


def binary(data: Array, starts: Array, lengths: Array) -> pa.Array:
    """Binary column whose row i is data[starts[i] : starts[i] + lengths[i]] (uint8)."""
    offsets = np.zeros(len(starts) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    index = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(data[index]))]
    return pa.Array.from_buffers(pa.large_binary(), len(starts), buffers)


def texts(values: pa.Array) -> pa.Array:
    """Binary values as escaped strings, each cut at its first NUL; equal values are converted once."""
    coded = values.dictionary_encode()
    names = [escape(raw.split(b"\0", 1)[0]) for raw in coded.dictionary.to_pylist()]
    return pa.DictionaryArray.from_arrays(coded.indices, pa.array(names, pa.string())).cast(pa.string())
