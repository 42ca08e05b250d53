"""Payload words (as far as a text shows them) into the columns of the binary reader's record tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from parsers.tables import Table
from parsers.xentrace.events import ALL_EVENTS, UNKNOWN, Form, forms
from parsers.xentrace.layout import layout_fields

__all__ = ["TABLES", "common_columns", "decode_words", "fill", "form_of"]

#: Every record table of the binary reader, by name.
TABLES: dict[str, Table] = {**{event.name: event.table() for event in ALL_EVENTS}, UNKNOWN.name: UNKNOWN}

Words = Sequence[npt.NDArray[np.uint64] | None]


def form_of(event: int, n_words: int | None) -> Form | None:
    """The newest declared form of an event id, with this many words (None: the text does not say how many)."""
    if n_words is not None:
        found = forms(event | n_words << 28 | 1 << 31) or forms(event | n_words << 28)
        return found[0] if found else None
    for count in range(7, -1, -1):
        found = forms(event | count << 28 | 1 << 31) or forms(event | count << 28)
        if found:
            best = [f for n in range(8) for f in forms(event | n << 28 | 1 << 31)]
            return max(best, key=lambda f: f.layout.until)
    return None


def decode_words(form: Form, event: int, words: Words) -> dict[str, Any]:
    """Columns of a form from its words; a column of which a word is unknown (None) is left out, that is: null."""
    out: dict[str, Any] = {}
    rows = next((len(w) for w in words if w is not None), 0)
    for bits in form.event.id_bits:
        value = (event >> bits.shift & (1 << bits.bits) - 1) + bits.add
        out[bits.name] = np.full(rows, bool(value) if bits.bits == 1 else value)
    for field in layout_fields(form.layout.fields)[0]:
        if field.kind == "*":
            if field.name == "hypercall" and words and words[0] is not None:
                out["op"] = words[0] & np.uint64(0xFFFFF)
            elif field.name == "words" and all(w is not None for w in words):
                matrix = np.stack([w for w in words if w is not None], axis=1) if words else np.zeros((rows, 0))
                out["words"] = pa.array(matrix.astype(np.uint32).tolist(), pa.list_(pa.uint32()))
            continue
        low = words[field.word] if field.word < len(words) else None
        if low is None:
            continue
        value_ = low
        if field.bits == 64:
            high = words[field.word + 1] if field.word + 1 < len(words) else None
            if high is None:
                continue
            value_ = low | high << np.uint64(32)
        else:
            value_ = low >> np.uint64(field.shift) & np.uint64((1 << field.bits) - 1)
        if field.kind == "b":
            out[field.name] = value_ != 0
        elif field.kind == "s" and field.bits < 64:
            signed = value_.astype(np.int64)
            out[field.name] = np.where(signed >= 1 << (field.bits - 1), signed - (1 << field.bits), signed)
        else:
            out[field.name] = value_
    return out


def common_columns(
    line: npt.NDArray[np.int64],
    t: npt.NDArray[np.int64],
    error: int,
    tsc: npt.NDArray[np.int64],
    cpu: npt.NDArray[np.int64],
    source: str,
) -> pa.Table:
    """The columns every record table starts with, for all lines of a batch; -1 in `tsc` and `cpu` is null.
    Without a stamp of its own a record came some time after the one before it: no error bound is given.

    `line` counts from 0; it is the record's `seq`.
    """
    return pa.table(
        {
            "seq": line.astype(np.uint64),
            "t_ns": t,
            "t_err_ns": pa.array(np.full(len(line), error, np.uint32), mask=tsc < 0),
            "tsc": pa.array(np.maximum(tsc, 0).astype(np.uint64), mask=tsc < 0),
            "cpu": pa.array(np.maximum(cpu, 0).astype(np.uint16), mask=(cpu < 0) | (cpu > 0xFFFF)),
            "source": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(line), np.int16)), pa.array([source])),
            "offset": (line + 1).astype(np.uint64),
        }
    )


def fill(table: Table, common: pa.Table, rows: npt.NDArray[np.int64], columns: Mapping[str, Any]) -> pa.Table:
    """A record table from the columns that are known; the rest is null. `rows` picks the lines of `common`."""
    head = common.take(pa.array(rows))
    arrays: dict[str, Any] = {name: head.column(name) for name in head.column_names}
    for column in table.columns:
        value = columns.get(column.name)
        if value is None:
            arrays[column.name] = pa.nulls(len(rows), column.type)
        elif isinstance(value, pl.Series):
            arrays[column.name] = value.to_arrow().cast(column.type, safe=False)
        elif isinstance(value, pa.Array):
            arrays[column.name] = value.cast(column.type)
        else:
            arrays[column.name] = pa.array(value).cast(column.type, safe=False)
    return pa.Table.from_pydict(arrays, schema=table.schema())
