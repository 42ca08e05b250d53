"""What the kernel prints for each event: declarations (events.csv) compiled to regular expressions and columns.

A shape is literal text with `{FIELD FORMAT}` parts. FORMAT is a printf specifier, `as sym<…>` or `as flags<…>`
(names for numbers), `as bitmask`, or `-> one of 'a'/'b'` (a word in place of a number). A field printed as a word
has a second column `FIELD_sym` with that word (printed as several words: `FIELD_sym_2` … too); FIELD itself is null
where the word does not determine the number.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Literal

import pyarrow as pa

from parsers.ftrace.columns import FTRACE_COMMON, column_name
from parsers.tables import Column, Table

__all__ = ["Part", "Shape", "declared", "event_table", "is_known", "numeric_type", "raw_shape"]

How = Literal["number", "hex", "string", "symbol", "words", "bitmask"]
POINTER = r" *(?:0x)?([0-9a-f]+|\(null\)|\(____ptrval____\))"
SPLIT = re.compile(
    r"\{(expr\([^)]*\)|\w+)((?: as sym<.*?>| as flags<.*?>| as [\w/]+| -> one of .*?)?) (%[^}]*)\}"
)
#: Integers that the kernel prints as one of two words: the first word stands for 1.
TWO_WORDS = frozenset({"rw", "write"})
#: Fields whose words determine the whole number. Most tables of names are applied to some bits of a field only
#: (`(dm >> 8) & 7`, the low bits of a timer's flags): there the number stays null.
WHOLE = frozenset({"clockid", "prev_state"})


@dataclass(frozen=True, slots=True)
class Part:
    """One captured group: the column it fills and how. `words`: number for each name, if known. `nth`: several bits of
    one field may be printed as a word each."""

    column: str
    how: How
    words: dict[str, int] = field(default_factory=dict)
    flags: bool = False
    options: tuple[str, ...] = ()  # the only words that there are
    nth: int = 1

    @property
    def symbol(self) -> str:
        """Column of the word: `FIELD_sym`, of the field's second one `FIELD_sym_2` …"""
        return f"{self.column}_sym" if self.nth == 1 else f"{self.column}_sym_{self.nth}"


@dataclass(frozen=True, slots=True)
class Shape:
    """One way an event's payload is printed.

    `literals`: the fixed text before each part and after the last one; empty when parts touch each other.
    """

    pattern: str
    parts: tuple[Part, ...]
    literals: tuple[bytes, ...] = ()


def numeric_type(size: str) -> pa.DataType | None:
    """Arrow type for "4s" (signed, 4 bytes), "8" …; None for other sizes."""
    width, signed = int(size.rstrip("s") or 0), size.endswith("s")
    if width not in (1, 2, 4, 8):
        return None
    return getattr(pa, f"{'' if signed else 'u'}int{8 * width}")()


def _types(fields: str) -> dict[str, pa.DataType]:
    """Column types of a declaration `CTYPE NAME|SIZE[s]; …`."""
    types: dict[str, pa.DataType] = {}
    for item in filter(None, fields.split("; ")):
        declaration, _, size = item.rpartition("|")
        match = re.fullmatch(r"(.*?)\b(\w+)(\[\w*\])?", declaration)
        if match is None:
            continue
        ctype, name, array = match[1], match[2], match[3]
        if ctype.startswith(("__data_loc", "__rel_loc")) or array:
            plain = re.search(r"\bchar\b", ctype) and "unsigned" not in ctype
            types[name] = pa.string() if plain else pa.list_(pa.uint64())
        elif ctype.strip() in ("const char *", "char *"):
            types[name] = pa.uint64()
        elif "bool" in ctype:
            types[name] = pa.bool_()
        else:
            types[name] = numeric_type(size) or pa.string()
    return types


def _words(text: str) -> dict[str, int]:
    """`0:HI|1:TIMER` -> {"HI": 0, …}; empty if a number is not spelled out (constants of the kernel's source)."""
    words: dict[str, int] = {}
    for item in re.split(r"\|(?=[^|:]*:)", text):
        value, _, name = item.partition(":")
        number = re.fullmatch(r"\(?(0x[0-9a-fA-F]+|\d+)\)?", value.strip())
        if number is None:
            return {}
        words[name] = int(number[1], 0)
    return words


def _compile(shape: str, types: dict[str, pa.DataType]) -> tuple[Shape, dict[str, pa.DataType]]:
    """Pattern and parts of a shape, and the columns that it fills besides the fields."""
    pattern = ""
    parts: list[Part] = []
    extra: dict[str, pa.DataType] = {}
    position, used = 0, set()
    literals: list[bytes] = []
    shape = shape.strip()
    for match in SPLIT.finditer(shape):
        nth = 1
        before = shape[position : match.start()]
        position = match.end()
        pattern += re.escape(before)
        field_name, text, spec = match[1], match[2], match[3]
        if field_name.startswith("expr("):
            key = re.search(r"(\w+)[= ](?:0x)?$", before)
            field_name = key[1] if key and key[1] not in types else f"expr_{len(parts) + 1}"
            extra.setdefault(
                field_name, pa.int64() if spec[-1] in "du" else pa.uint64() if spec[-1] == "x" else pa.string()
            )
        how: How
        words: dict[str, int] = {}
        options: list[str] = []
        literals.append(before.encode())
        if text.startswith((" as sym<", " as flags<")) or "-> one of" in text:
            how = "words"
            if "-> one of" in text:
                options = re.findall(r"'([^']*)'", text)
                boolean = types.get(field_name) == pa.bool_() or field_name in TWO_WORDS
                words = {options[0]: 1, options[1]: 0} if boolean and len(options) == 2 else {}
                if options == ["handled", "unhandled"]:
                    # handled may be 1, or 2 or 3 with a thread woken
                    words = {"unhandled": 0}
                group = "(" + "|".join(re.escape(option) for option in options) + ")" if options else "(.*?)"
                group = " *" + group if spec != "%s" else group
            else:
                inside = re.search(r"<(.*)>", text)
                words = _words(inside[1]) if inside is not None and field_name in WHOLE else {}
                group = "(.*?)"
            nth = 1 + sum(part.column == field_name and part.how == "words" for part in parts)
            extra.setdefault(Part(field_name, how, nth=nth).symbol, pa.string())
        elif " as bitmask" in text:
            how, group = "bitmask", "([0-9a-f]{1,16}(?:,[0-9a-f]{1,16})*)"
        elif " as " in text:
            how, group = "string", "(.*?)"
            extra.setdefault(f"{field_name}_sym", pa.string())
        elif re.fullmatch(r"%p[sSfF]", spec):
            how, group = "symbol", r"(\S*(?: \[\w+\])?)"
            extra.setdefault(f"{field_name}_sym", pa.string())
        elif spec[-1] == "p" or spec.endswith("x"):
            how, group = "hex", POINTER
        elif spec[-1] in "du":
            how, group = "number", r" *(-?\d+)"
        else:
            how, group = "string", "(.*?)"
            if types.get(field_name) not in (pa.string(), None):
                extra.setdefault(f"{field_name}_sym", pa.string())
        if (field_name, how) in used or (how == "words" and (field_name, "number") in used):
            words = {}
        used.add((field_name, how))
        pattern += group
        parts.append(Part(field_name, how, words, " as flags<" in text, tuple(options), nth))
    pattern += re.escape(shape[position:])
    pattern = re.sub(r"(\\ )+", lambda run: " +" if len(run[0]) > 2 else " ", pattern)
    literals.append(shape[position:].encode())
    simple = parts and all(literals[1:-1])
    return Shape(f"^ *{pattern} *$", tuple(parts), tuple(literals) if simple else ()), extra


#: Text of trace_marker, trace_printk and their kin: the whole payload is the user's.
MARKERS: dict[str, tuple[dict[str, pa.DataType], tuple[Shape, ...]]] = {
    "tracing_mark_write": ({"buf": pa.string()}, (Shape("^(.*)$", (Part("buf", "string"),)),)),
    "print": (
        {"ip": pa.uint64(), "buf": pa.string(), "ip_sym": pa.string()},
        (
            Shape(r"^ip=(\S+) buf=(.*)$", (Part("ip", "symbol"), Part("buf", "string"))),
            Shape(r"^(\S+): (.*)$", (Part("ip", "symbol"), Part("buf", "string"))),
        ),
    ),
}


@dataclass(frozen=True, slots=True)
class Declared:
    """An event with all the ways it is printed and the columns of all of them."""

    name: str
    system: str
    types: dict[str, pa.DataType]
    shapes: tuple[Shape, ...]


@lru_cache(maxsize=1)
def _declarations() -> dict[str, list[dict[str, str]]]:
    """The lines of events.csv by event."""
    found: dict[str, list[dict[str, str]]] = {}
    with (Path(__file__).parent / "events.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["event"], []).append(row)
    return found


@lru_cache(maxsize=4096)
def declared(event: str) -> Declared | None:
    """An event of events.csv or a marker; None for others. Made when first asked for: a recording has a few."""
    rows = _declarations().get(event, [])
    marker = MARKERS.get(event)
    if not rows and marker is None:
        return None
    system = rows[-1]["system"] if rows else "ftrace"
    merged, shapes = (dict(marker[0]), list(marker[1])) if marker is not None else ({}, [])
    for row in rows:
        types = _types(row["fields"])
        shape, extra = _compile(row["shape"], types)
        for name, kind in {**types, **extra}.items():
            merged.setdefault(name, kind)
        shapes.append(shape)
    return Declared(event, system, merged, tuple(shapes))


def is_known(name: bytes | None, payload: bytes | None) -> bool:
    """Whether the payload is printed as the event `name` prints it (or as a probe of any name does)."""
    if name is None or payload is None:
        return False
    text = payload[:4096].decode("latin-1")
    known = declared(bytes(name).decode("latin-1"))
    if known is not None:
        return known.name not in MARKERS and any(re.search(shape.pattern, text) for shape in known.shapes)
    return re.match(r"\([\w.]+\+0x[0-9a-f]+/0x[0-9a-f]+(?: <- [\w.]+)?\)(?: \w+=|\s*$)", text) is not None


def event_table(name: str, doc: str, types: dict[str, pa.DataType]) -> Table:
    """Record table with ftrace's common columns and then `types`, renamed where a common column has the name."""
    columns: list[Column] = list(FTRACE_COMMON)
    for field_name, kind in types.items():
        columns.append(Column(column_name(field_name), kind, doc if field_name in types else ""))
    return Table(name, doc, tuple(columns))


def raw_shape(payload: str, types: dict[str, pa.DataType]) -> Shape | None:
    """The shape of a `trace-cmd report -R` payload (`field=value field=value`), if all fields are declared."""
    keys = re.findall(r"(?:^| )(\w+)=", payload)
    if not keys or len(keys) > 64 or any(key not in types for key in keys) or len(set(keys)) != len(keys):
        return None
    parts = []
    for key in keys:
        kind = types[key]
        if pa.types.is_list(kind):
            return None
        how: How = "string" if kind == pa.string() else "symbol"
        parts.append(Part(key, how))
    literals = (f"{keys[0]}=".encode(), *(f" {key}=".encode() for key in keys[1:]), b"")
    # the option `fields` prints numbers twice: 0x7 (7)
    pattern = " ".join(f"{key}=(.*?)" + ("" if types[key] == pa.string() else r"(?: \(-?\d+\))?") for key in keys)
    return Shape(rf"^(?:\[FAILED TO PARSE\] )?{pattern} *$", tuple(parts), literals)
