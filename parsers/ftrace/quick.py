"""The fast way through a shape: the letters that its literals begin with tell where its parts begin and stop, in all
rows at once; rows in which a value holds such a letter go from literal to literal together; rows that do not fit are
left alone.

What is taken here is exactly what the shape's regular expression would take; anything doubtful (blanks inside a
value, odd bytes, words that are not listed) is left to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array, binary, plain
from parsers.ftrace.convert import bitmask, each, fit, word_value
from parsers.ftrace.shapes import Part, Shape
from parsers.ftrace.swar import Text

__all__ = ["Rows", "quick", "suits"]

BLANK = 32
#: So few rows are walked through one by one.
FEWEST_ROWS = 24
MASK = re.compile(r"[0-9a-f]{1,16}(,[0-9a-f]{1,16})*")


@dataclass(slots=True)
class Rows:
    """Payloads of one event: byte positions in `text`; `odd` ones hold bytes that must be escaped (None: none do)."""

    text: Text
    start: Array
    end: Array
    odd: Array | None = None

    def __len__(self) -> int:
        return int(self.start.size)

    def part(self, begin: int, end: int) -> Rows:
        """A range of the rows."""
        odd = self.odd[begin:end] if self.odd is not None and self.odd[begin:end].any() else None
        return Rows(self.text, self.start[begin:end], self.end[begin:end], odd)


def quick(shape: Shape, rows: Rows, types: dict[str, pa.DataType]) -> tuple[Array, dict[str, pa.Array]]:
    """(row numbers that fit, their columns)."""
    chosen = np.arange(len(rows)) if rows.odd is None else np.flatnonzero(~rows.odd)
    every = chosen.size == len(rows)
    at, end = (rows.start, rows.end) if every else (rows.start[chosen], rows.end[chosen])
    taken, begin, stop = _spans(shape, rows.text, at, end)
    if not taken.size:
        return taken, {}
    columns, good = _columns(rows.text, shape, begin, stop, types)
    chosen = chosen[taken]
    if not good.all():
        keep = pa.array(good)
        columns = {name: values.filter(keep) for name, values in columns.items()}
        chosen = chosen[good]
    return chosen, columns


def _spans(shape: Shape, text: Text, at: Array, end: Array) -> tuple[Array, Array, Array]:
    """Rows whose literals fit, and where their parts begin and stop (one line for each part).

    Each part ends at the first place where the next literal could begin.
    """
    if at.size < FEWEST_ROWS:
        return _walked(shape, text, at, end)
    rows, begin, stop = _gridded(shape, text, at, end)
    if rows.size == at.size:
        return rows, begin, stop
    left = np.delete(np.arange(at.size), rows)
    step = _stepped if left.size >= FEWEST_ROWS else _walked
    more, begins, stops = step(shape, text, at[left], end[left])
    if not more.size:
        return rows, begin, stop
    taken = np.concatenate((rows, left[more]))
    order = np.argsort(taken, kind="stable")
    begin, stop = np.concatenate((begin, begins), axis=1), np.concatenate((stop, stops), axis=1)
    return taken[order], begin[:, order], stop[:, order]


@dataclass(frozen=True, slots=True)
class Grid:
    """What `_gridded` needs of a shape's literals."""

    letters: tuple[int, ...]  # that a literal behind a part begins with
    count: int  # how often they stand in the literals
    first: Array  # of each literal behind a part: how many of those letters stand before it
    length: Array  # of each literal that a part follows
    literal: Array  # pieces of eight bytes: number of the literal, place in it, which bits must have which value
    place: Array
    mask: Array
    value: Array


@lru_cache(maxsize=4096)
def _grid(literals: tuple[bytes, ...]) -> Grid:
    letters = tuple(sorted({literal[0] for literal in literals[1:] if literal}))
    counts = [sum(literal.count(letter) for letter in letters) for literal in literals]
    pieces = [
        (number, place, literal[place : place + 8])
        for number, literal in enumerate(literals)
        for place in range(0, len(literal), 8)
    ]
    return Grid(
        letters,
        sum(counts),
        np.array(list(accumulate(counts))[: len(literals) - 1 - (not literals[-1])], dtype=np.int64),
        np.array([len(literal) for literal in literals[:-1]], dtype=np.int64)[:, None],
        np.array([number for number, _, _ in pieces], dtype=np.int64),
        np.array([place for _, place, _ in pieces], dtype=np.int64)[:, None],
        np.array([(1 << 8 * len(piece)) - 1 for _, _, piece in pieces], dtype=np.uint64)[:, None],
        np.array([int.from_bytes(piece, "little") for _, _, piece in pieces], dtype=np.uint64)[:, None],
    )


def _gridded(shape: Shape, text: Text, at: Array, end: Array) -> tuple[Array, Array, Array]:
    """As `_spans`, of the rows in which no value holds a letter that a literal begins with."""
    grid, literals = _grid(shape.literals), shape.literals
    size = end - at
    block = binary(text.data, at, size, pa.binary())
    edges = np.frombuffer(block.buffers()[1], dtype=np.int32)[: at.size + 1].astype(np.int64)
    inside = np.frombuffer(block.buffers()[2], dtype=np.uint8)[: edges[-1]] if edges[-1] else text.data[:0]
    hits = np.zeros(inside.size, dtype=bool)
    for letter in grid.letters:
        hits |= inside == letter
    places = np.flatnonzero(hits)
    counts = np.diff(np.searchsorted(places, edges))
    rows, exact = np.arange(at.size), counts == grid.count
    if not exact.all():
        places, rows = places[np.repeat(exact, counts)], rows[exact]
        at, end, edges = at[rows], end[rows], edges[rows]
    parts = len(shape.parts)
    # where each literal stands that follows a part, and the end
    where = np.empty((parts + 1, rows.size), dtype=np.int64)
    where[0] = at
    columns = places.reshape(rows.size, grid.count).T[grid.first]
    where[1 : 1 + grid.first.size] = columns + (at - edges[: rows.size])
    if not literals[-1]:
        where[parts] = end
    begin, stop = where[:-1] + grid.length, where[1:]
    words = text.words[np.minimum(where[grid.literal] + grid.place, text.words.size - 1)]
    good = (((words ^ grid.value) & grid.mask) == 0).all(axis=0)
    good &= (begin <= stop).all(axis=0) & (where[parts] + len(literals[-1]) == end)
    if not good.all():
        rows, begin, stop = rows[good], begin[:, good], stop[:, good]
    return rows, begin, stop


def _walk(literals: tuple[bytes, ...], payload: bytes) -> list[tuple[int, int]] | None:
    """Where the parts begin and stop in one payload, each at the first place where the next literal could begin."""
    spans, at = [], 0
    for literal, following in pairwise(literals):
        if not payload.startswith(literal, at):
            return None
        begin = at + len(literal)
        at = payload.find(following[:1], begin) if following else len(payload)
        if at < 0:
            return None
        spans.append((begin, at))
    return spans if payload[at:] == literals[-1] else None


def suits(shape: Shape, payload: bytes) -> bool:
    """Whether a payload has a shape's literals, and numbers and listed words where the shape has them."""
    spans = _walk(shape.literals, payload) if shape.literals else None
    if spans is None:
        return False
    for part, (begin, stop) in zip(shape.parts, spans, strict=True):
        value = payload[begin:stop].lstrip(b" -" if part.how == "number" else b" ")
        if part.how == "number" and not value.isdigit():
            return False
        if part.options and value.decode("latin-1") not in part.options:
            return False
    return True


def _walked(shape: Shape, text: Text, at: Array, end: Array) -> tuple[Array, Array, Array]:
    """As `_spans`, for a few rows one by one."""
    chosen, found = [], []
    for row, (begin, stop) in enumerate(zip(at.tolist(), end.tolist(), strict=True)):
        spans = _walk(shape.literals, text.data[begin:stop].tobytes())
        if spans is not None:
            chosen.append(row)
            found.append(spans)
    edges = np.array(found, dtype=np.int64).reshape(len(chosen), len(shape.parts), 2)
    edges += at[chosen].reshape(-1, 1, 1) if chosen else 0
    return np.array(chosen, dtype=np.int64), edges[:, :, 0].T, edges[:, :, 1].T


def _stepped(shape: Shape, text: Text, at: Array, end: Array) -> tuple[Array, Array, Array]:
    """As `_spans`, from literal to literal."""
    literals = shape.literals
    chosen = np.arange(at.size)
    spans: list[tuple[Array, Array]] = []
    for number in range(len(shape.parts)):
        literal, following = literals[number], literals[number + 1]
        good = text.has(literal, at) & (at + len(literal) <= end)
        begin = at + len(literal)
        stop = text.find(following[0], begin, end) if following else end
        spans.append((begin, stop))
        at = stop
        if not good.all():
            chosen, at, end = chosen[good], at[good], end[good]
            spans = [(b[good], s[good]) for b, s in spans]
            if not chosen.size:
                break
    good = text.has(literals[-1], at) & (at + len(literals[-1]) == end) if literals[-1] else at == end
    shown = [(b[good], s[good]) for b, s in spans] if chosen.size else [(at, at)] * len(shape.parts)
    return chosen[good], np.array([b for b, _ in shown]), np.array([s for _, s in shown])


def _columns(
    text: Text, shape: Shape, begin: Array, stop: Array, types: dict[str, pa.DataType]
) -> tuple[dict[str, pa.Array], Array]:
    """Columns of all parts, and which rows fit. Numbers of all parts are converted at once."""
    count = begin.shape[1]
    good = np.ones(count, dtype=bool)
    hows = [_how(part, types) for part in shape.parts]
    numbers = _numbers(text, shape, hows, begin, stop)
    columns: dict[str, pa.Array] = {}
    for number, (part, how) in enumerate(zip(shape.parts, hows, strict=True)):
        b, s, following = begin[number], stop[number], shape.literals[number + 1]
        if how == "refused":
            return {}, np.zeros(count, dtype=bool)
        if how == "words":
            found, fits = _words(text, part, b, s, types)
        else:
            value, valid, every = numbers[number]
            if every:
                found, fits = {part.column: fit(value, None, types[part.column])}, None
            elif how == "symbol":
                found, fits = _address(text, part, b, s, value, valid, types)
                fits = fits & (s > b)
            else:
                found, fits = {part.column: fit(value, valid, types[part.column])}, valid
        if fits is not None:
            good &= fits
        if not following:
            # a pattern would not take the blanks at the end
            good &= text.data[np.maximum(s - 1, 0)] != BLANK
        for name, values in found.items():
            columns.setdefault(name, values)
    return columns, good


def _numbers(
    text: Text, shape: Shape, hows: list[str], begin: Array, stop: Array
) -> dict[int, tuple[Array, Array, bool]]:
    """Numbers of the parts that have some by part: values, which rows are numbers, and whether all are.

    Those of all parts that are written alike are converted in one go.
    """
    groups: dict[str, list[int]] = {"number": [], "hex": [], "0x": []}
    mixed: list[int] = []
    for number, how in enumerate(hows):
        if how in groups:
            groups[how].append(number)
    symbols = [number for number, how in enumerate(hows) if how == "symbol"]
    if symbols:
        at = begin[symbols]
        prefixed = text.has(b"0x", at.ravel()).reshape(at.shape)
        for number, has in zip(symbols, prefixed, strict=True):
            if has.all():
                groups["0x"].append(number)
            elif not has.any() and not _is_probe(shape.parts[number]) and _digit(text, begin[number]).all():
                groups["number"].append(number)
            else:
                mixed.append(number)
    found: dict[int, tuple[Array, Array, bool]] = {}
    for how, chosen in groups.items():
        if chosen:
            starts, ends = begin[chosen].ravel(), stop[chosen].ravel()
            if how == "number":
                value, valid = text.decimal(starts, ends)
            else:
                value, valid = text.hexadecimal(starts, ends, prefixed=how == "0x")
            value, valid = value.reshape(len(chosen), -1), valid.reshape(len(chosen), -1)
            for number, values, good in zip(chosen, value, valid, strict=True):
                found[number] = values, good, bool(good.all())
    for number in mixed:
        values, good = _addresses(text, begin[number], stop[number], _is_probe(shape.parts[number]))
        found[number] = values, good, bool(good.all())
    return found


def _is_probe(part: Part) -> bool:
    return part.column.startswith("__probe_")


def _digit(text: Text, at: Array) -> Array:
    """Whether a digit or a minus stands at each place."""
    first = text.data[at]
    return np.asarray((first == 45) | ((first >= 48) & (first <= 57)))


def _how(part: Part, types: dict[str, pa.DataType]) -> str:
    """How a part is read: "number", "hex" and "symbol" need a column of numbers."""
    if part.how in ("number", "hex", "symbol"):
        kind = types.get(part.column)
        return "refused" if kind is None or kind == pa.string() or pa.types.is_list(kind) else part.how
    return "words"


def _strings(text: Text, begin: Array, stop: Array) -> pa.Array:
    raw = binary(text.data, begin, stop - begin, pa.binary())
    return pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), offset=raw.offset)


def _words(
    text: Text, part: Part, begin: Array, stop: Array, types: dict[str, pa.DataType]
) -> tuple[dict[str, pa.Array], Array]:
    """Columns of a part that is no number, and which rows fit."""
    name, kind, symbol = part.column, types.get(part.column), part.symbol
    every = np.ones(begin.size, dtype=bool)
    if part.how == "string":
        if kind == pa.string():
            return {name: _strings(text, begin, stop)}, every
        return ({symbol: _strings(text, begin, stop)} if symbol in types else {}), every
    if part.how == "words":
        words = _strings(text, begin, stop)
        found = {symbol: words}
        if part.options:
            every = each(words, lambda word: int(word in part.options))[0] == 1
        if part.words and kind is not None and kind != pa.string():
            numbers, known = each(words, word_value(part))
            found[name] = fit(numbers, known, kind)
        return found, every
    if kind is None or not pa.types.is_list(kind):
        return {}, stop > begin
    masks = _strings(text, begin, stop)
    return {name: bitmask(masks)}, each(masks, lambda word: int(bool(MASK.fullmatch(word))))[0] == 1


def _addresses(text: Text, begin: Array, stop: Array, probe: bool) -> tuple[Array, Array]:
    """Numbers with 0x or decimal, of a `probe` hexadecimal without it (addresses are long); and which rows are such."""
    prefixed = text.has(b"0x", begin)
    if probe:
        numbers, good = text.hexadecimal(begin, stop)
        return numbers, good & (prefixed | (stop - begin >= 8))
    numeric = _digit(text, begin) & ~prefixed
    numbers, good = np.zeros(begin.size, dtype=np.uint64), np.zeros(begin.size, dtype=bool)
    for which, convert in ((prefixed, text.hexadecimal), (numeric, text.decimal)):
        rows = np.flatnonzero(which)
        if rows.size:
            numbers[rows], good[rows] = convert(begin[rows], stop[rows])
    return numbers, good


def _address(
    text: Text, part: Part, begin: Array, stop: Array, numbers: Array, good: Array, types: dict[str, pa.DataType]
) -> tuple[dict[str, pa.Array], Array]:
    """Columns of a number or the name of an address."""
    name, symbol = part.column, f"{part.column}_sym"
    found = {name: fit(numbers, good, types[name])}
    if good.all() or symbol not in types:
        return found, good
    first = text.data[begin]
    doubtful = ~good & (first >= 48) & (first <= 57)
    # trace-cmd prints an offset after a symbol although it is none
    stop = stop - 4 * (text.has(b"/0x0", np.maximum(stop - 4, 0)) & (stop - begin > 4))
    names = _strings(text, begin, np.where(good, begin, stop))
    if good.any():
        names = pa.Array.from_buffers(
            pa.string(), len(names), [plain(pa.uint8(), first, ~good).buffers()[0], *names.buffers()[1:]]
        )
    found[symbol] = names
    return found, ~doubtful
