"""Event format texts (`events/SYSTEM/NAME/format`): which field lies where in a record."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import pyarrow as pa

from parsers.ftrace.columns import FTRACE_COMMON, column_name
from parsers.tables import Column, Table
from parsers.tracedat.layout import Limit

__all__ = [
    "PROBED", "EventFormat", "EventText", "Field", "PageHeader", "announced", "parse_format", "parse_page_header",
]  # fmt: skip

#: plain: one number. string/bytes/list: an array, stored as `place` says.
Kind = Literal["number", "bool", "string", "bytes", "list"]
#: fixed: at offset, size bytes. data_loc/rel_loc: a u32 there says where. rest: from offset to the record's end.
Place = Literal["fixed", "data_loc", "rel_loc", "rest"]

FIELD = re.compile(r"\s*field:\s*([^;]*);\s*offset:\s*(\d+);\s*size:\s*(\d+);(?:\s*signed:\s*([01]);)?")
EVENT_NAME = re.compile(rb"^name:\s*(\S+)", re.M)
EVENT_ID = re.compile(rb"^ID:\s*(\d{1,9})(?!\d)", re.M)
NUMBERS = {
    (1, False): pa.uint8(),
    (2, False): pa.uint16(),
    (4, False): pa.uint32(),
    (8, False): pa.uint64(),
    (1, True): pa.int8(),
    (2, True): pa.int16(),
    (4, True): pa.int32(),
    (8, True): pa.int64(),
}
#: Fields of the common part that have a column of their own in every ftrace table.
COMMON_FIELDS = {
    "common_type": "type",
    "common_flags": "flags",
    "common_preempt_count": "preempt",
    "common_pid": "pid",
    "common_tgid": "tgid",
}
#: Stack traces declare a small array but run to the end of the record.
STACKS = {("kernel_stack", "caller"), ("user_stack", "caller")}
#: Addresses of dynamic probes: the kernel prints them as symbols, trace-cmd as numbers. True: with the offset.
PROBED = {"__probe_ip": True, "__probe_ret_ip": True, "__probe_func": False}
#: Sizes of array elements that are not named by a width; `long` and pointers come from the recorder's word size.
ELEMENTS = {"bool": 1, "char": 1, "u8": 1, "s8": 1, "short": 2, "u16": 2, "s16": 2, "u64": 8, "s64": 8, "long long": 8}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a record: `offset`/`size` in bytes from the record's start; `item` bytes per array element."""

    name: str
    ctype: str
    offset: int
    size: int
    signed: bool
    kind: Kind
    place: Place
    item: int

    def arrow(self) -> pa.DataType:
        """The column's type."""
        if self.kind == "number":
            return NUMBERS[self.size, self.signed]
        if self.kind == "list":
            return pa.list_(NUMBERS[self.item, self.signed])
        return {"bool": pa.bool_(), "string": pa.string(), "bytes": pa.binary()}[self.kind]


@dataclass(frozen=True, slots=True)
class EventFormat:
    """An event as this kernel boot recorded it.

    `ident` is its common_type, `least` the smallest sane record in bytes, `symbolic` the fields (addresses of
    functions) that the kernel prints by name: they get a second column `NAME_sym`.
    """

    ident: int
    system: str
    name: str
    common: dict[str, Field]
    fields: tuple[Field, ...]
    least: int
    symbolic: tuple[Field, ...] = ()

    @property
    def is_probe(self) -> bool:
        """Whether a user's probe made it: its strings are null where the kernel could not read them."""
        return any(field.name in PROBED for field in self.fields)

    def table(self, name: str) -> Table:
        """The record table: ftrace's common columns, then the fields."""
        columns: list[Column] = list(FTRACE_COMMON)
        taken: list[str] = []
        for field in self.fields:
            taken.append(column_name(field.name, taken))
            doc = f"{field.ctype} {field.name}, offset {field.offset}, size {field.size}"
            columns.append(Column(taken[-1], field.arrow(), doc))
        for field in self.symbolic:
            taken.append(column_name(f"{field.name}_sym", taken))
            columns.append(Column(taken[-1], pa.string(), f"symbol at address `{field.name}`"))
        return Table(name, f"ftrace event {self.system}:{self.name}", tuple(columns))


@dataclass(frozen=True, slots=True)
class EventText:
    """A `format` file of which only name and id were read: files declare hundreds of events and record a few."""

    ident: int
    system: str
    name: str
    text: bytes
    word: int
    offset: int  # in the recording

    def parse(self) -> EventFormat | None:
        """The whole of it; None when it makes no sense."""
        return parse_format(self.system, self.text, self.word)


@dataclass(frozen=True, slots=True)
class PageHeader:
    """Where a ring-buffer page keeps its stamp (always u64 at 0), its commit word and its data."""

    commit: int = 8
    commit_size: int = 8
    data: int = 16


def parse_page_header(text: bytes) -> PageHeader | None:
    """`events/header_page`; None when it names no usable commit and data fields."""
    found = {}
    for declaration, offset, size, _ in FIELD.findall(text.decode("latin-1")):
        found[declaration.split()[-1].strip("*")] = (int(offset), int(size))
    if "commit" not in found or "data" not in found or found.get("timestamp", (0, 8)) != (0, 8):
        return None
    (commit, commit_size), (data, _) = found["commit"], found["data"]
    if commit != 8 or commit_size not in (4, 8) or not 12 <= data <= 256 or data % 4:
        return None
    return PageHeader(commit, commit_size, data)


def _element(ctype: str, word: int) -> int:
    """Bytes of one element of an array of C type `ctype`."""
    plain = re.sub(r"\b(const|volatile|unsigned|signed|struct|enum|__data_loc|__rel_loc|__user)\b", " ", ctype).strip()
    if "*" in plain:
        return word
    base = " ".join(plain.replace("__", "").removesuffix("_t").split())
    if base in ("long", "int long", "long int", "cpumask", "pte", "pmd"):
        return word
    width = re.search(r"(8|16|32|64)$", base)
    return ELEMENTS.get(base, int(width[1]) // 8 if width else 4)


@lru_cache(maxsize=4096)
def _field(declaration: str, offset: int, size: int, signed: str, word: int) -> Field | None:
    """One `field:` line; None when the declaration has no name."""
    match = re.fullmatch(r"(.*?)\b(\w+)\s*((?:\[[^\]]*\]\s*)*)", declaration.strip(), re.S)
    if match is None or not match[1].strip():
        return None
    ctype, name, dimensions = match[1].strip(), match[2], match[3].strip()
    place: Place = "fixed"
    if ctype.startswith("__data_loc"):
        place = "data_loc"
    elif ctype.startswith("__rel_loc"):
        place = "rel_loc"
    element = ctype.removeprefix("__data_loc").removeprefix("__rel_loc").replace("[]", "").strip()
    is_array = bool(dimensions) or place != "fixed"
    if place != "fixed" and size != 4:
        return None
    item = _element(element, word)
    flag = signed == "1" or (signed == "" and not re.search(r"unsigned|\bu\d|\*|__u|_t\b", ctype))
    kind: Kind
    if is_array:
        kind = "string" if re.fullmatch(r"(const )?char", element) else "bytes" if item == 1 else "list"
        constant = re.fullmatch(r"\[\s*(\d+)\s*\]", dimensions)
        if place == "fixed" and constant and int(constant[1]) and size % int(constant[1]) == 0 and size:
            item = size // int(constant[1])
            if kind == "list" and item == 1:
                kind = "bytes"
        if kind == "list" and (item, False) not in NUMBERS:
            kind = "bytes"
    elif re.search(r"\bbool\b", ctype) and size == 1:
        kind = "bool"
    else:
        kind = "number" if (size, False) in NUMBERS else "bytes"
    if place == "fixed" and size == 0:
        place = "rest"
    # a dynamic array's `signed` describes the u32, not the elements
    if kind == "list" and place != "fixed":
        flag = bool(re.search(r"\b(s8|s16|s32|s64|int|long|short)\b", element)) and "unsigned" not in element
    return Field(name, ctype + dimensions, offset, size, flag, kind, place, item)


def announced(system: str, text: bytes, word: int, offset: int) -> EventText | None:
    """Name and id of a `format` file; None when it lacks one."""
    head = text.partition(b"print fmt:")[0]
    name, ident = EVENT_NAME.search(head), EVENT_ID.search(head)
    if name is None or ident is None or int(ident[1]) > 0xFFFF:
        return None
    return EventText(int(ident[1]), system, name[1].decode("latin-1"), text, word, offset)


def parse_format(system: str, text: bytes, word: int) -> EventFormat | None:
    """One `format` file; None when it lacks a name, an id or sane fields. `word` = sizeof(long) of the kernel."""
    decoded = text.decode("latin-1")
    head, _, printing = decoded.partition("print fmt:")
    declared = announced(system, text, word, 0)
    if declared is None:
        return None
    name = declared.name
    common: dict[str, Field] = {}
    fields: list[Field] = []
    for declaration, offset, size, signed in FIELD.findall(head)[: Limit.FIELDS]:
        if len(offset) > 6 or len(size) > 6:
            return None
        field = _field(declaration, int(offset), int(size), signed, word)
        if field is None:
            return None
        key = COMMON_FIELDS.get(field.name)
        if key is None:
            fields.append(field)
        elif field.kind == "number":
            common[key] = field
    if fields:
        last = max(fields, key=lambda field: field.offset)
        if (name, last.name) in STACKS:
            index = fields.index(last)
            fields[index] = Field(
                last.name, last.ctype, last.offset, 0, False, "list", "rest", word if word in (4, 8) else 8
            )
    least = max((field.offset + field.size for field in (*common.values(), *fields)), default=0)
    probed = tuple(f for f in fields if f.name in PROBED and f.kind == "number" and f.size in (4, 8))
    symbolic = _symbolic(printing, fields) + probed
    return EventFormat(declared.ident, system, name, common, tuple(fields), least, symbolic)


def _symbolic(printing: str, fields: list[Field]) -> tuple[Field, ...]:
    """Fields printed with %ps, %pS, %pf or %pF; only when specifiers and simple arguments pair up."""
    if not re.search(r"%[-0-9]*p[sSfF]", printing):
        return ()
    match = re.match(r'\s*"((?:[^"\\]|\\.)*)"\s*,(.*)', printing, re.S)
    if match is None:
        return ()
    wanted = re.findall(r"%[-+ #0-9.*]*(?:hh|h|ll|l|z)?(p[sSfF]|[a-zA-Z])", match[1].replace("%%", ""))
    arguments, depth, current = [], 0, ""
    for letter in match[2].strip() + ",":
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            arguments.append(current)
            current = ""
        else:
            current += letter
    if len(wanted) != len(arguments):
        return ()
    names = []
    for specifier, argument in zip(wanted, arguments, strict=True):
        simple = re.fullmatch(r"\s*(?:\((?:void|const void) \*\))?\s*\(?REC->(\w+)\)?\s*", argument)
        if specifier[0] == "p" and len(specifier) == 2 and simple:
            names.append(simple[1])
    return tuple(f for f in fields if f.name in names and f.kind == "number" and f.size in (4, 8))
