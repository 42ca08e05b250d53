"""Columns that every ftrace record table has, whatever the carrier, and byte strings as text."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import pyarrow as pa

from parsers.tables import COMMON, Column, Table

__all__ = ["FAULT", "FTRACE_COMMON", "RESERVED", "column_name", "escape", "ftrace_schema"]

#: After COMMON, before the event's own fields. Null: the recording does not say.
FTRACE_COMMON: tuple[Column, ...] = (
    Column("pid", pa.int32(), "task on the CPU when the record was written; 0 is that CPU's idle task"),
    Column(
        "comm",
        pa.dictionary(pa.int32(), pa.string()),
        "last known name of that task; bytes escaped by `escape`; '<...>' unknown; looked up when the trace was "
        "saved, so it may be wrong after exec or pid reuse",
    ),
    Column("flags", pa.uint8(), "common_flags: 1 irqs off, 4 need-resched, 8 hardirq, 16 softirq, 64 NMI, 128 BH off"),
    Column("preempt", pa.uint8(), "low nibble preempt depth (text: 15 means 15 or more), high nibble migrate-disable"),
    Column("tgid", pa.int32(), "thread group, if recorded"),
    Column("buffer", pa.dictionary(pa.int16(), pa.string()), "ftrace instance; '' is the top one"),
)

#: What the kernel prints (newer ones: store) in place of a probe's argument that it could not read.
FAULT = "(fault)"

#: Names an event's own field cannot keep.
RESERVED = frozenset(column.name for column in (*COMMON, *FTRACE_COMMON))


def column_name(field: str, taken: Iterable[str] = ()) -> str:
    """Column for an event's own field: its name, or `arg_NAME` where a common column has that name.

    A second field of the same name (kprobe arguments allow it) gets `_2`, `_3` …
    """
    name = base = f"arg_{field}" if field in RESERVED else field
    used, number = set(taken), 1
    while name in used:
        number += 1
        name = f"{base}_{number}"
    return name


@lru_cache(maxsize=1)
def _common_fields() -> tuple[pa.Field, ...]:
    return tuple(column.field() for column in (*COMMON, *FTRACE_COMMON))


def ftrace_schema(table: Table) -> pa.Schema:
    """`table.schema()` of a table that starts with FTRACE_COMMON, whose fields are made only once."""
    own = [column.field() for column in table.columns[len(FTRACE_COMMON) :]]
    return pa.schema([*_common_fields(), *own], metadata={"table": table.name, "doc": table.doc})


def escape(raw: bytes) -> str:
    r"""Bytes as text, losslessly: UTF-8 as it is, every other byte as `\xNN`, and a backslash as `\\`."""
    return raw.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")
