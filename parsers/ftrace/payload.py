"""Payload strings of one event to typed columns: declared shapes first, then probes and `key=value`, else as text."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from parsers.ftrace.arrays import Array, binary, nulls
from parsers.ftrace.columns import FAULT, FTRACE_COMMON, escape
from parsers.ftrace.convert import bitmask, each, fit, hexadecimal, parse_numbers, word_value
from parsers.ftrace.quick import Rows, quick, suits
from parsers.ftrace.shapes import Part, Shape, declared, event_table, raw_shape
from parsers.tables import Column, Table

__all__ = ["TEXT", "Built", "Payload", "Payloads"]

#: Events whose payload has no known grammar, and lines of text that belong to the event before.
TEXT = Table(
    "ftrace_text",
    "events whose payload is kept as text",
    (
        *FTRACE_COMMON,
        Column("event", pa.dictionary(pa.int32(), pa.string()), "its name, or '(continued)', '(cut)'"),
        Column("payload", pa.string(), "as printed, bytes escaped"),
    ),
)

#: How many undeclared event names of a text are looked at one by one (a kernel with all its modules has about 2500
#: events, most of them declared); records of further names are kept as text together.
MAX_TABLES = 2048
MAX_KEYS = 64
#: Events with at most so many different payloads in a batch, none longer than so many bytes, are looked up among the
#: payloads met before; so many payloads are kept in all.
MOST_LOOKED_UP, WIDEST_LOOKED_UP, MOST_KEPT = 256, 512, 1 << 15
#: Payloads that Python's `re` looks at: so many at once, so many of a recording, of so many bytes. It is there at once,
#: polars has to be imported first; but its time is not bounded by the length of what it reads.
RE_ROWS, RE_ALL, RE_WIDTH = 128, 4096, 256
PROBE = {"__probe_ip": pa.uint64(), "__probe_ip_sym": pa.string()}
RETURN = {
    "__probe_func": pa.uint64(),
    "__probe_ret_ip": pa.uint64(),
    "__probe_func_sym": pa.string(),
    "__probe_ret_ip_sym": pa.string(),
}
Built = tuple[Array, dict[str, pa.Array]]


def _text(values: pa.Array) -> pa.Array:
    return values.cast(pa.string())


def _convert(
    part: Part, values: pa.Array, types: dict[str, pa.DataType]
) -> tuple[dict[str, pa.Array], Array | None]:
    """Columns from one captured group; the mask says which rows really fit (None: all)."""
    name, kind, symbol = part.column, types.get(part.column), part.symbol
    if part.how == "string":
        if kind == pa.string():
            return {name: _text(values)}, None
        return {symbol: _text(values)} if symbol in types else {}, None
    if part.how == "words":
        found = {symbol: _text(values)}
        if part.words and kind is not None and kind != pa.string():
            numbers, known = each(values, word_value(part))
            found[name] = fit(numbers, known, kind)
        return found, None
    if part.how == "bitmask":
        return ({name: bitmask(values)} if kind is not None and pa.types.is_list(kind) else {}), None
    if kind is None or kind == pa.string() or pa.types.is_list(kind):
        return {name: _text(values)} if kind == pa.string() else {}, None
    if part.how in ("number", "hex"):
        numbers, known = parse_numbers(values, part.how == "hex")
        return {name: fit(numbers, known, kind)}, None
    # a number or the name of an address
    numbers, known = _addresses(values, name.startswith("__probe_"))
    found = {name: fit(numbers, known, kind)}
    if known.all():
        return found, None
    if symbol not in types:
        return found, known | pc.equal(values, FAULT).to_numpy(zero_copy_only=False)
    names = pc.if_else(pa.array(known), pa.scalar(None, values.type), values)
    found[symbol] = _text(pc.replace_substring_regex(names, r"/0x0$", ""))
    return found, None


def _addresses(values: pa.Array, base16: bool) -> tuple[Array, Array]:
    """Numbers with 0x, or without it (then hexadecimal if `base16`)."""
    first = pc.utf8_slice_codeunits(values, 0, 2)
    prefixed = pc.equal(first, "0x").to_numpy(zero_copy_only=False)
    if prefixed.all():
        return hexadecimal(pc.utf8_slice_codeunits(values, 2))
    if not base16 and not prefixed.any() and not pc.any(pc.match_substring_regex(first, r"^-?\d")).as_py():
        return np.zeros(len(values), dtype=np.uint64), prefixed
    numbers, known = parse_numbers(values, base16)
    if prefixed.any():
        other, valid = hexadecimal(pc.utf8_slice_codeunits(values, 2))
        numbers, known = np.where(prefixed, other, numbers), np.where(prefixed, valid, known)
    return numbers, known


def _unquoted(columns: dict[str, pa.Array]) -> dict[str, pa.Array]:
    """A probe's strings without the quotes around them; null where the kernel could not read one."""
    found = dict(columns)
    for name, values in columns.items():
        if values.type == pa.string() and not name.endswith("_sym"):
            bare = pc.replace_substring_regex(values, r'(?s)^"(.*)"$', r"\1")
            found[name] = pc.if_else(pc.equal(bare, FAULT), pa.scalar(None, pa.string()), bare)
    return found


def apply_shape(shape: Shape, payload: pa.Array, types: dict[str, pa.DataType], *, small: bool = False) -> Built:
    """(row numbers that match, their columns). Payloads that repeat are matched once; `small`: by Python's `re`."""
    if small:
        return _converted(shape, *_matched_by_re(shape, payload), types)
    coded = payload.dictionary_encode() if len(payload) > 64 else None
    if coded is not None and 3 * len(coded.dictionary) < len(payload):
        rows, columns = _apply(shape, coded.dictionary, types)
        index = coded.indices.to_numpy(zero_copy_only=False)
        if rows.size == len(coded.dictionary):
            return np.arange(len(payload)), {name: values.take(coded.indices) for name, values in columns.items()}
        place = np.full(len(coded.dictionary), -1, dtype=np.int64)
        place[rows] = np.arange(rows.size)
        found = np.flatnonzero(place[index] >= 0)
        taken = pa.array(place[index[found]])
        return found, {name: values.take(taken) for name, values in columns.items()}
    return _apply(shape, payload, types)


def _apply(shape: Shape, payload: pa.Array, types: dict[str, pa.DataType]) -> Built:
    return _converted(shape, *_matched(shape, payload), types)


def _matched_by_re(shape: Shape, payload: pa.Array) -> tuple[Array, list[pa.Array]]:
    """As `_matched`."""
    found = [re.search(shape.pattern, text) for text in payload.to_pylist()]
    rows = np.array([number for number, match in enumerate(found) if match is not None], dtype=np.int64)
    groups = [match.groups() for match in found if match is not None]
    return rows, [pa.array([group[n] for group in groups], pa.large_string()) for n in range(len(shape.parts))]


def _matched(shape: Shape, payload: pa.Array) -> tuple[Array, list[pa.Array]]:
    """Rows that match, and the texts of their parts."""
    import polars as pl  # costs more than reading a small recording, and many need no pattern

    series = pl.Series(payload)
    if not shape.parts:
        return np.flatnonzero(series.str.contains(shape.pattern).to_numpy()), []
    groups = series.str.extract_groups(shape.pattern).to_arrow().flatten()
    rows = np.arange(len(payload))
    if groups[0].null_count:
        matched = groups[0].is_valid()
        rows = np.flatnonzero(matched.to_numpy(zero_copy_only=False))
        groups = [values.filter(matched) for values in groups]
    return rows, groups


def _converted(shape: Shape, rows: Array, groups: list[pa.Array], types: dict[str, pa.DataType]) -> Built:
    """Columns from the texts of the parts, and the rows that fit."""
    columns: dict[str, pa.Array] = {}
    good = np.ones(rows.size, dtype=bool)
    if not rows.size:
        return rows, columns
    for values, part in zip(groups, shape.parts, strict=True):
        found, fits = _convert(part, values.cast(pa.large_string()), types)
        for name, column in found.items():
            columns.setdefault(name, column)
        if fits is not None:
            good &= fits
    if not good.all():
        keep = pa.array(good)
        columns = {name: values.filter(keep) for name, values in columns.items()}
        rows = rows[good]
    return rows, columns


def _infer(values: set[str]) -> pa.DataType:
    """Type of an undeclared argument from its first values."""
    known = [value for value in values if value != FAULT]
    if known and all(re.fullmatch(r"-?\d{1,18}", value) for value in known):
        return pa.int64()
    if known and all(re.fullmatch(r"0x[0-9a-f]{1,16}|\d{1,20}", value) for value in known):
        return pa.uint64()
    return pa.string()


def _fits(shape: Shape, first: str) -> bool:
    """Whether a shape may fit a payload; seldom is the pattern needed, which takes long to make."""
    return suits(shape, first.encode()) or re.search(shape.pattern, first) is not None


@dataclass(slots=True)
class Known:
    """Payloads of one event that were decoded before: row in `columns` by payload, -1 for those that stay text."""

    place: dict[bytes, int]
    columns: pa.RecordBatch | None


def _no_columns(rows: int) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([nulls(pa.bool_(), rows)], names=["(none)"])


class Payload:
    """Payloads of one event in two forms: byte positions, and (made when asked for) escaped strings."""

    def __init__(self, rows: Rows, text: bytes) -> None:
        self._rows, self._raw = rows, text

    def __len__(self) -> int:
        return len(self._rows)

    def longest(self) -> int:
        """Bytes of the longest one."""
        return int((self._rows.end - self._rows.start).max(initial=0))

    def values(self) -> list[bytes]:
        """All of them as they stand in the recording."""
        rows = self._rows
        return [self._raw[low:high] for low, high in zip(rows.start.tolist(), rows.end.tolist(), strict=True)]

    def part(self, chosen: Array) -> Payload:
        """Some of them."""
        return Payload(self.rows(chosen), self._raw)

    def rows(self, chosen: Array) -> Rows:
        """Some of the rows (all of them: `chosen` as long as there are rows)."""
        rows = self._rows
        if chosen.size == len(rows):
            return rows
        return Rows(rows.text, rows.start[chosen], rows.end[chosen], None if rows.odd is None else rows.odd[chosen])

    def strings(self, chosen: Array) -> pa.Array:
        """Some of the payloads as large strings; those with bytes that need it are escaped one by one."""
        rows = self.rows(chosen)
        data, start = rows.text.data, rows.start
        length = np.maximum(rows.end - start, 0)
        if rows.odd is not None and rows.odd.any():
            start, extra, position = start.copy(), [], len(data)
            for index in np.flatnonzero(rows.odd).tolist():
                better = escape(self._raw[int(start[index]) : int(rows.end[index])]).replace("\0", "\\x00").encode()
                extra.append(better)
                start[index], length[index] = position, len(better)
                position += len(better)
            data = np.concatenate((data, np.frombuffer(b"".join(extra), dtype=np.uint8)))
        raw = binary(data, start, length)
        return pa.Array.from_buffers(pa.large_string(), len(raw), raw.buffers(), offset=raw.offset)


class Payloads:
    """Decodes payloads event by event and remembers which undeclared events got which columns."""

    def __init__(self, tables: dict[str, Table], report: bool) -> None:
        """`report`: the text is trace-cmd's, which prints many events as `field=value` (all of them with -R)."""
        self.tables, self._report = tables, report
        tables[TEXT.name] = TEXT
        self._dynamic: dict[str, tuple[dict[str, pa.DataType], Shape]] = {}
        self._plain: set[str] = set()
        self._admitted: set[str] = set()
        self._known: dict[str, Known] = {}
        self._kept = 0
        self._by_re = 0  # payloads

    def admits(self, name: str) -> bool:
        """Whether an event is one of those that `decode` takes: declared, or among the first MAX_TABLES others."""
        if name in self._admitted or declared(name) is not None:
            return True
        if len(self._admitted) >= MAX_TABLES:
            return False
        self._admitted.add(name)
        return True

    def decode(self, name: str, payload: Payload) -> tuple[list[Built], Array]:
        """Typed parts (row numbers, columns by field) of event `name`, and the rows that stay text.

        The payloads must differ. Events that have few of them are looked up among those of earlier batches.
        """
        if not 0 < len(payload) <= MOST_LOOKED_UP or payload.longest() > WIDEST_LOOKED_UP:
            return self._decode(name, payload)
        known = self._known.get(name)
        values = payload.values()
        if known is None or not all(value in known.place for value in values):
            known = self._learn(name, payload, values, known)
        place = np.array([known.place[value] for value in values], dtype=np.int64)
        rows = np.flatnonzero(place >= 0)
        if known.columns is None or not rows.size:
            return [], np.arange(len(values))
        columns = known.columns.take(pa.array(place[rows]))
        return [(rows, dict(zip(columns.schema.names, columns.columns, strict=True)))], np.flatnonzero(place < 0)

    def _learn(self, name: str, payload: Payload, values: list[bytes], known: Known | None) -> Known:
        """Decode what was not met before, and keep it; when too much is kept, start again."""
        if self._kept > MOST_KEPT:
            self._known.clear()
            self._kept, known = 0, None
        known = self._known.setdefault(name, known or Known({}, None))
        new = np.array([number for number, value in enumerate(values) if value not in known.place], dtype=np.int64)
        self._kept += new.size
        built, rest = self._decode(name, payload.part(new))
        known.place.update((values[int(new[row])], -1) for row in rest)
        parts = [] if known.columns is None else [known.columns]
        at = known.columns.num_rows if known.columns is not None else 0
        for rows, columns in built:
            known.place.update(zip((values[int(new[row])] for row in rows), range(at, at + rows.size), strict=True))
            at += rows.size
            own = [
                columns[field].cast(kind) if field in columns else nulls(kind, rows.size)
                for field, kind in self.types(name).items()
            ]
            struct = pa.StructArray.from_arrays(own, names=list(self.types(name))) if own else None
            batch = pa.RecordBatch.from_struct_array(struct) if struct is not None else _no_columns(rows.size)
            parts.append(batch)
        if len(parts) > 1:
            table = pa.Table.from_batches(parts).combine_chunks()
            parts = table.to_batches() if table.num_columns else [_no_columns(at)]
        known.columns = parts[0] if parts else None
        return known

    def _decode(self, name: str, payload: Payload) -> tuple[list[Built], Array]:
        known = declared(name)
        parts: list[Built] = []
        rest = np.arange(len(payload))
        if known is not None:
            if name not in self.tables:
                self.tables[name] = event_table(name, f"{known.system}:{name}, from its text", known.types)
            first = str(payload.strings(rest[:1])[0])[:4096]
            if self._report and not any(_fits(shape, first) for shape in known.shapes):
                # -R, or an event without a plugin: do not try the kernel's patterns in vain on every row
                rest = self._raw(first, known.types, payload, rest, parts)
            for shape in known.shapes:
                rest = self._try(shape, known.types, payload, rest, parts)
            if rest.size:
                first = str(payload.strings(rest[:1])[0])[:4096]
                rest = self._raw(first, known.types, payload, rest, parts)
            return parts, rest
        if name in self._plain:
            return parts, rest
        if name not in self._dynamic:
            sample = payload.strings(np.arange(min(len(payload), 200)))
            guess = self._guess(sample)
            if guess is None:
                self._plain.add(name)
                return parts, rest
            self._dynamic[name] = guess
            self.tables[name] = event_table(name, f"{name}: columns from the text's own keys", guess[0])
        types, shape = self._dynamic[name]
        rest = self._try(shape, types, payload, rest, parts)
        if "__probe_ip" in types or "__probe_func" in types:
            parts = [(rows, _unquoted(columns)) for rows, columns in parts]
        return parts, rest

    def types(self, name: str) -> dict[str, pa.DataType]:
        """Field types of a table made here."""
        known = declared(name)
        return known.types if known is not None else self._dynamic[name][0]

    def _raw(
        self, first: str, types: dict[str, pa.DataType], payload: Payload, rest: Array, parts: list[Built]
    ) -> Array:
        """As `_try`, with the shape of `trace-cmd report -R` that payload `first` has."""
        shape = raw_shape(first, types)
        return rest if shape is None else self._try(shape, types, payload, rest, parts)

    def _try(
        self, shape: Shape, types: dict[str, pa.DataType], payload: Payload, rest: Array, parts: list[Built]
    ) -> Array:
        """Append what `shape` takes of the rows `rest` to `parts`; gives the other rows."""
        if not rest.size:
            return rest
        if shape.literals:
            rows, columns = quick(shape, payload.rows(rest), types)
            if rows.size:
                parts.append((rest[rows], columns))
                rest = np.delete(rest, rows)
                if not rest.size:
                    return rest
        strings = payload.strings(rest)
        literal = max(shape.literals, key=len, default=b"").strip(b" ")
        if literal and b"  " not in literal and literal not in memoryview(strings.buffers()[2]).tobytes():
            return rest
        small = rest.size <= RE_ROWS and self._by_re < RE_ALL and payload.part(rest).longest() <= RE_WIDTH
        self._by_re += rest.size if small else 0
        rows, columns = apply_shape(shape, strings, types, small=small)
        if rows.size:
            parts.append((rest[rows], columns))
            rest = np.delete(rest, rows)
        return rest

    @staticmethod
    def _guess(payload: pa.Array) -> tuple[dict[str, pa.DataType], Shape] | None:
        """Columns and pattern of a probe (`(symbol+0x0/0x10) a=1`) or of `a=1 b=2`, from the first rows."""
        first = str(payload[0])[:4096]
        head = re.match(r"\(([^()]*)\)(?= \w+=|\s*$)", first)
        keys = re.findall(r"(?:^| )(\w+)=", first[head.end() :] if head else first)
        if len(keys) > MAX_KEYS or len(set(keys)) != len(keys) or (head is None and not re.match(r"\w+=", first)):
            return None
        types: dict[str, pa.DataType] = {}
        fixed: tuple[Part, ...] = ()
        pattern = "^"
        if head:
            if " <- " in head[1]:
                pattern += r"\((\S+) <- ([^()\s]+)\)"
                fixed = (Part("__probe_ret_ip", "symbol"), Part("__probe_func", "symbol"))
                types.update(RETURN)
            else:
                pattern += r"\(([^()]*)\)"
                fixed = (Part("__probe_ip", "symbol"),)
                types.update(PROBE)
        joined = " ".join(f"{key}=(.*?)" for key in keys)
        pattern += (" " if head and keys else "") + joined + " *$"
        found = [match.groups() for match in map(re.compile(pattern).match, payload.to_pylist()) if match]
        for number, key in enumerate(keys, start=len(fixed)):
            values = {groups[number] for groups in found}
            types[key] = pa.uint64() if key.startswith("__probe_") else _infer(values)
        parts = fixed + tuple(
            Part(key, "string" if types[key] == pa.string() else "symbol") for key in keys
        )
        opening = ([b"(", b" <- "] if len(fixed) == 2 else [b"("]) if fixed else []
        ends = [f" {key}=".encode() for key in keys]
        if fixed:
            literals = [*opening, *([b")" + ends[0], *ends[1:], b""] if keys else [b")"])]
        else:
            literals = [ends[0][1:], *ends[1:], b""]
        return types, Shape(pattern, parts, tuple(literals))


