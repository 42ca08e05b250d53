"""The fast way through a shape: rows that are as long as another and have its literals in the same places share its
spans; the others step from literal to literal together; rows that do not fit are left alone.

What is taken here is exactly what the shape's regular expression would take; anything doubtful (blanks inside a
value, odd bytes, words that are not listed) is left to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array, binary, plain
from parsers.ftrace.convert import bitmask, each, fit, word_value
from parsers.ftrace.shapes import Part, Shape
from parsers.ftrace.swar import Text

__all__ = ["Rows", "quick"]

BLANK = 32
#: Rows that share spans: payloads up to this long, so many different spans, and so few rows that it does not pay.
WIDEST, MOST_TEMPLATES, FEWEST_ROWS = 1024, 24, 24
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
    """Rows whose literals fit, and where their parts begin and stop (one line for each part)."""
    begin = np.empty((len(shape.parts), at.size), dtype=np.int64)
    stop = np.empty_like(begin)
    size, left, misses = end - at, np.arange(at.size), 0
    found: list[Array] = []
    for _ in range(MOST_TEMPLATES):
        if left.size < FEWEST_ROWS or misses > 1:
            break
        first = int(left[0])
        length = int(size[first])
        spans = _walk(shape, text.data[int(at[first]) : int(end[first])].tobytes()) if length <= WIDEST else None
        if spans is None:
            # it may still fit in another way
            misses, left = misses + 1, np.append(left[1:], left[:1])
            continue
        same = size[left] == length
        rows = left if same.all() else left[same]
        fits = text.fits(at[rows], length, _literal_places(shape, spans))
        if not fits.all():
            same[np.flatnonzero(same)[~fits]] = False
            rows = rows[fits]
        left = left[~same]
        edges = np.array(spans, dtype=np.int64)
        # assigning to all columns in order is much quicker than to some
        where = slice(None) if rows.size == at.size else rows
        begin[:, where] = edges[:, :1] + at[rows]
        stop[:, where] = edges[:, 1:] + at[rows]
        found.append(rows)
    if left.size:
        step = _stepped if left.size >= FEWEST_ROWS else _walked
        rows, begins, stops = step(shape, text, at[left], end[left])
        rows = left[rows]
        begin[:, rows], stop[:, rows] = begins, stops
        found.append(rows)
    taken = np.sort(np.concatenate(found)) if len(found) > 1 else found[0] if found else left  # no row at all
    if taken.size < at.size:
        begin, stop = begin[:, taken], stop[:, taken]
    return taken, begin, stop


def _walk(shape: Shape, payload: bytes) -> tuple[tuple[int, int], ...] | None:
    """Where the parts begin and stop in one payload, each at the first place where the next literal could begin."""
    match = _steps(shape.literals).fullmatch(payload)
    return match.regs[1:] if match is not None else None


@lru_cache(maxsize=4096)
def _steps(literals: tuple[bytes, ...]) -> re.Pattern[bytes]:
    pattern = b""
    for literal, following in pairwise(literals):
        pattern += re.escape(literal) + (b"([^" + re.escape(following[:1]) + b"]*)" if following else b"(.*)")
    return re.compile(pattern + re.escape(literals[-1]), re.S)


def _literal_places(shape: Shape, spans: tuple[tuple[int, int], ...]) -> list[tuple[int, bytes]]:
    places = [(begin - len(literal), literal) for literal, (begin, _) in zip(shape.literals, spans, strict=False)]
    return [*places, (spans[-1][1], shape.literals[-1])]


def _walked(shape: Shape, text: Text, at: Array, end: Array) -> tuple[Array, Array, Array]:
    """As `_spans`, for a few rows one by one."""
    chosen, found = [], []
    for row, (begin, stop) in enumerate(zip(at.tolist(), end.tolist(), strict=True)):
        spans = _walk(shape, text.data[begin:stop].tobytes())
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
    numbers: dict[int, tuple[Array, Array]] = {}
    for how in ("number", "hex", "symbol"):
        chosen = [number for number, this in enumerate(hows) if this == how]
        if not chosen:
            continue
        b, s = begin[chosen].ravel(), stop[chosen].ravel()
        if how == "symbol":
            probes = [shape.parts[number].column.startswith("__probe_") for number in chosen]
            value, valid = _addresses(text, b, s, np.repeat(probes, count))
        else:
            value, valid = text.decimal(b, s) if how == "number" else text.hexadecimal(b, s)
        for place, number in enumerate(chosen):
            low, high = place * count, (place + 1) * count
            numbers[number] = value[low:high], valid[low:high]
    columns: dict[str, pa.Array] = {}
    for number, (part, how) in enumerate(zip(shape.parts, hows, strict=True)):
        b, s, following = begin[number], stop[number], shape.literals[number + 1]
        if how in ("number", "hex"):
            value, valid = numbers[number]
            found, fits = {part.column: fit(value, valid, types[part.column])}, valid
        elif how == "symbol":
            found, fits = _address(text, part, b, s, *numbers[number], types)
            fits = fits & (s > b)
        elif how == "refused":
            found, fits = {}, np.zeros(count, dtype=bool)
        else:
            found, fits = _words(text, part, b, s, types)
        if (how == "words" and following) or (how == "symbol" and following and not numbers[number][1].all()):
            # a row that shares another's spans may hold the next literal's first letter earlier
            fits = fits & (text.find(following[0], b, s) == s)
        elif not following:
            # a pattern would not take the blanks at the end
            fits = fits & (text.data[np.maximum(s - 1, 0)] != BLANK)
        good &= fits
        for name, values in found.items():
            columns.setdefault(name, values)
    return columns, good


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


def _addresses(text: Text, begin: Array, stop: Array, probes: Array) -> tuple[Array, Array]:
    """Numbers with 0x or decimal, in `probes` hexadecimal without it (addresses are long); and which rows are such."""
    prefixed = text.has(b"0x", begin)
    hexed = prefixed | probes
    if hexed.all():
        numbers, good = text.hexadecimal(begin, stop)
    else:
        first = text.data[begin]
        numeric = ((first == 45) | ((first >= 48) & (first <= 57))) & ~hexed
        numbers, good = np.zeros(begin.size, dtype=np.uint64), np.zeros(begin.size, dtype=bool)
        for which, convert in ((hexed, text.hexadecimal), (numeric, text.decimal)):
            rows = np.flatnonzero(which)
            if rows.size:
                numbers[rows], good[rows] = convert(begin[rows], stop[rows])
    return numbers, good & (prefixed | ~probes | (stop - begin >= 8))


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
