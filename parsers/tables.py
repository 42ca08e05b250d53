"""Record tables, declared as data: one Arrow table for each kind of record.

A reader's decoder, the generated reference page and the column checks all come from these declarations.
Adding an event is one `Table` (or one line of a reader's own declaration file that becomes one).
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

__all__ = ["COMMON", "Column", "Table"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `unit` is "ns", "ticks", "us", "bytes", "MHz", … or "" for plain numbers and names."""

    name: str
    type: pa.DataType
    doc: str
    unit: str = ""

    def field(self) -> pa.Field:
        """The Arrow field, with prose and unit in its metadata."""
        return pa.field(self.name, self.type, metadata={"doc": self.doc, "unit": self.unit})


#: Columns that every record table starts with. Null means "the recorder did not say".
COMMON: tuple[Column, ...] = (
    Column("seq", pa.uint64(), "global order over all CPUs of this recording, from 0, without holes over all tables"),
    Column("t_ns", pa.int64(), "time since the first stamped record; in ticks when the clock model says so", "ns"),
    Column("t_err_ns", pa.uint32(), "the true time lies in [t_ns, t_ns + t_err_ns]; 0: its stamp is its time", "ns"),
    Column("tsc", pa.uint64(), "the recorder's raw stamp; null when the record carried none", "ticks"),
    Column("cpu", pa.uint16(), "physical CPU that wrote the record"),
    Column("source", pa.dictionary(pa.int16(), pa.string()), "which of the ingested recordings"),
    Column("offset", pa.uint64(), "byte offset (binary) or line number from 1 (text) in the recording"),
)


@dataclass(frozen=True, slots=True)
class Table:
    """A record table: the recorder's own event name, prose, and its own columns (COMMON comes first)."""

    name: str
    doc: str
    columns: tuple[Column, ...] = ()

    def schema(self) -> pa.Schema:
        """Arrow schema: COMMON, then the table's own columns."""
        fields = [column.field() for column in (*COMMON, *self.columns)]
        return pa.schema(fields, metadata={"table": self.name, "doc": self.doc})
