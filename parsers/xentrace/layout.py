"""How a trace record's words are declared: a small grammar of bit fields, and what it stands for.

A layout is a string of fields in storage order, lowest bits of a word first:

    "vcpu:16 dom:16 pos:32"          two words, the first holds two halves
    "gpa:64 mfn:64 p2mt:32"          64-bit values are two words, low word first
    "credit:s32 _:16 tasklet:b8"     s = signed, b = boolean (not zero), _ = bits without meaning
    "words:*"                        whatever words there are, as a list
    "filler:*"                       whatever words there are; only their number is kept
    "hypercall:*"                    a word `op:20 | six 2-bit argument sizes`, then the arguments

Bits of the event id become columns in the same way: `IdBits("old_state", 8, 2)`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pyarrow as pa

from parsers.tables import COMMON, Column, Table

__all__ = ["NEWEST", "Event", "Field", "IdBits", "Layout", "Version", "layout_fields"]

Version = tuple[int, int]
NEWEST: Version = (99, 0)  #: "still so"
OLDEST: Version = (0, 0)

HYPERCALL_ARGS = 6
_TAKEN = {column.name for column in COMMON} | {"event"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field: `word` and `shift` say where it starts, `kind` is "u", "s", "b" or "*"."""

    name: str
    word: int
    shift: int
    bits: int
    kind: str

    @property
    def type(self) -> pa.DataType:
        """The narrowest Arrow type that holds the field."""
        if self.kind == "b":
            return pa.bool_()
        size = next(size for size in (8, 16, 32, 64) if self.bits <= size)
        return {"u": pa.uint8, "s": pa.int8}[self.kind]() if size == 8 else _INTS[self.kind, size]


_INTS: dict[tuple[str, int], pa.DataType] = {
    ("u", 16): pa.uint16(),
    ("u", 32): pa.uint32(),
    ("u", 64): pa.uint64(),
    ("s", 16): pa.int16(),
    ("s", 32): pa.int32(),
    ("s", 64): pa.int64(),
}


@dataclass(frozen=True, slots=True)
class IdBits:
    """`bits` bits of the event id from `shift` on, plus `add`, as a column; one bit becomes a boolean."""

    name: str
    shift: int
    bits: int = 1
    add: int = 0

    @property
    def type(self) -> pa.DataType:
        if self.bits == 1:
            return pa.bool_()
        return pa.uint8() if self.bits <= 8 else pa.uint16()


@dataclass(frozen=True, slots=True)
class Layout:
    """One form of an event's payload.

    `since`/`until`: first and last Xen release that wrote it; `stamped`: True or False if only records with
    (without) a time stamp have this form; `ids`: the ids that have it (all of the event's if empty).
    """

    fields: str
    since: Version = OLDEST
    until: Version = NEWEST
    stamped: bool | None = None
    ids: tuple[int, ...] = ()

    @property
    def words(self) -> int | None:
        """Length of the payload in words, or None if it may have any length."""
        return layout_fields(self.fields)[1]


@dataclass(frozen=True, slots=True)
class Event:
    """A kind of record: its recorder's name, its ids, what it means and the forms its payload can take.

    `stamped` says whether current Xen stamps it: "yes", "no" or "sometimes".
    """

    name: str
    ids: tuple[int, ...]
    doc: str
    layouts: tuple[Layout, ...]
    since: Version = OLDEST
    until: Version = NEWEST
    stamped: str = "yes"
    id_bits: tuple[IdBits, ...] = ()
    notes: str = ""

    def columns(self) -> tuple[Column, ...]:
        """`event`, the id's bits, then every field that occurs in any of the layouts, widest type."""
        found: dict[str, pa.DataType] = {bits.name: bits.type for bits in self.id_bits}
        for layout in self.layouts:
            for field in layout_fields(layout.fields)[0]:
                for name, kind in _field_columns(field):
                    found[name] = _wider(found.get(name), kind)
        if taken := found.keys() & _TAKEN:
            raise ValueError(f"{self.name}: {', '.join(taken)} is a column of every table")
        event = Column("event", pa.uint32(), "28-bit event id as recorded")
        return (event, *(Column(name, kind, *_describe(name)) for name, kind in found.items()))

    def table(self) -> Table:
        """The declaration of this event's record table."""
        doc = f"{self.doc}. {self.notes}" if self.notes else f"{self.doc}."
        return Table(self.name, doc, self.columns())


def _field_columns(field: Field) -> list[tuple[str, pa.DataType]]:
    if field.kind != "*":
        return [(field.name, field.type)]
    if field.name == "words":
        return [("words", pa.list_(pa.uint32()))]
    if field.name == "filler":
        return [("n_words", pa.uint8())]
    args = [(f"a{i}", pa.uint64()) for i in range(HYPERCALL_ARGS)]
    return [("op", pa.uint32()), ("present", pa.uint16()), *args]


def _wider(one: pa.DataType | None, two: pa.DataType) -> pa.DataType:
    if one is None or one == two:
        return two
    if pa.types.is_integer(one) and pa.types.is_integer(two):
        return one if one.bit_width >= two.bit_width else two
    raise ValueError(f"layouts disagree: {one} and {two}")


@cache
def layout_fields(text: str) -> tuple[tuple[Field, ...], int | None]:
    """The fields of a layout string (unnamed bits left out) and its length in words (None: any).

    `ValueError` if a field crosses a word in a way no recorder does, or the last word is not full.
    """
    fields: list[Field] = []
    bit = 0
    for part in text.split():
        name, _, size = part.partition(":")
        if size == "*":
            return (Field(name, 0, 0, 0, "*"),), None
        kind = size[0] if size[0] in "sb" else "u"
        bits = int(size.lstrip("sb"))
        shift = bit % 32
        if (bits == 64 and shift) or (bits != 64 and shift + bits > 32):
            raise ValueError(f"{text!r}: {name} crosses a word")
        if name != "_":
            fields.append(Field(name, bit // 32, shift, bits, kind))
        bit += bits
    if bit % 32:
        raise ValueError(f"{text!r}: {bit} bits do not fill whole words")
    return tuple(fields), bit // 32


#: Prose for column names that occur in many events; a suffix gives the unit.
FIELD_DOCS: dict[str, str] = {
    "dom": "domain id; 32767 is the idle domain",
    "vcpu": "virtual CPU id within the domain",
    "unit": "scheduling unit id (a vCPU id unless core scheduling is on; always a vCPU before 4.13)",
    "wide": "the form with 64-bit addresses was recorded",
    "nested": "a nested (L2) guest was running; SVM only",
    "levels": "paging levels of the guest",
    "rip": "guest instruction pointer",
    "va": "guest virtual address",
    "gpa": "guest physical address",
    "gfn": "guest frame number",
    "mfn": "machine frame number",
    "vector": "interrupt or exception vector",
    "irq": "interrupt number",
    "cx": "C-state: ACPI index, or type under mwait-idle (always 0 in its builds before 2014-06)",
    "tick": "NOW() in ns where the TSC never stops, else ACPI PM timer counts; low 32 bits",
    "tsc_in": "TSC when the handler began, low 32 bits",
    "tsc_out": "TSC when the handler ended, low 32 bits",
    "cpumask0": "target CPUs 0-63",
    "cpumask1": "target CPUs 64-127",
    "cpumask2": "target CPUs 128-191",
    "op": "hypercall number",
    "present": "two bits for each argument: 0 absent, 1 one word, 2 two words",
    "words": "payload as recorded",
    "n_words": "length of the payload in words",
    "credit": "credit left",
    "ran_ns": "time in this state so far, low 32 bits: wraps at 4.29 s",
    "runnable_ns": "time spent waiting, low 32 bits: wraps at 4.29 s",
    "slice_ns": "time slice, low 32 bits; -1 is unbounded",
    "exit_reason": "VMX: 32-bit exit reason; SVM: exit code cut to 32 bits (VMEXIT_INVALID is 0xffffffff)",
}
UNITS: tuple[tuple[str, str], ...] = (("_ns", "ns"), ("_us", "us"), ("_mhz", "MHz"), ("_bytes", "bytes"))


def _describe(name: str) -> tuple[str, str]:
    unit = next((unit for suffix, unit in UNITS if name.endswith(suffix)), "")
    if name in ("tsc_in", "tsc_out", "first_tsc"):
        unit = "ticks"
    return FIELD_DOCS.get(name, name.replace("_", " ")), unit
