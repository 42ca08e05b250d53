"""The fast way through a shape: all rows step from literal to literal together; rows that do not fit are left alone.

What is taken here is exactly what the shape's regular expression would take; anything doubtful (blanks inside a
value, odd bytes, words that are not listed) is left to it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array, binary, plain
from parsers.ftrace.convert import bitmask, each, fit, word_value
from parsers.ftrace.shapes import Part, Shape
from parsers.ftrace.swar import Text

__all__ = ["Rows", "quick"]

BLANK = 32
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
    literals, text = shape.literals, rows.text
    at = rows.start
    chosen = np.arange(at.size) if rows.odd is None else np.flatnonzero(~rows.odd)
    at, end = at[chosen], rows.end[chosen]
    spans: list[tuple[Array, Array]] = []
    for number, part in enumerate(shape.parts):
        literal = literals[number]
        good = text.has(literal, at) & (at + len(literal) <= end)
        begin = at + len(literal)
        following = literals[number + 1]
        stop = text.find(following[0], begin, end) if following else end
        if part.how != "string" and part.how != "words":
            good &= stop > begin
        if not following:
            # a pattern would not take the blanks at the end
            good &= text.data[np.maximum(stop - 1, 0)] != BLANK
        spans.append((begin, stop))
        at = stop
        if not good.all():
            chosen, at, end = chosen[good], at[good], end[good]
            spans = [(b[good], s[good]) for b, s in spans]
            if not chosen.size:
                return chosen, {}
    if literals[-1]:
        good = text.has(literals[-1], at) & (at + len(literals[-1]) == end)
    else:
        good = at == end
    columns: dict[str, pa.Array] = {}
    for part, (begin, stop) in zip(shape.parts, spans, strict=True):
        found, fits = _value(text, part, begin, stop, types)
        good &= fits
        for name, values in found.items():
            columns.setdefault(name, values)
    if not good.all():
        keep = pa.array(good)
        columns = {name: values.filter(keep) for name, values in columns.items()}
        chosen = chosen[good]
    return chosen, columns


def _strings(text: Text, begin: Array, stop: Array) -> pa.Array:
    raw = binary(text.data, begin, stop - begin)
    return pa.Array.from_buffers(pa.large_string(), len(raw), raw.buffers()).cast(pa.string())


def _value(
    text: Text, part: Part, begin: Array, stop: Array, types: dict[str, pa.DataType]
) -> tuple[dict[str, pa.Array], Array]:
    """Columns of one part, and which rows fit."""
    name, kind, symbol = part.column, types.get(part.column), f"{part.column}_sym"
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
    if part.how == "bitmask":
        if kind is None or not pa.types.is_list(kind):
            return {}, every
        masks = _strings(text, begin, stop)
        return {name: bitmask(masks)}, each(masks, lambda word: int(bool(MASK.fullmatch(word))))[0] == 1
    if kind is None or kind == pa.string() or pa.types.is_list(kind):
        return {}, np.zeros(begin.size, dtype=bool)
    if part.how == "symbol":
        return _address(text, part, begin, stop, types)
    numbers, good = text.decimal(begin, stop) if part.how == "number" else text.hexadecimal(begin, stop)
    return {name: fit(numbers, good, kind)}, good


def _address(
    text: Text, part: Part, begin: Array, stop: Array, types: dict[str, pa.DataType]
) -> tuple[dict[str, pa.Array], Array]:
    """A number (with 0x, or decimal; probe addresses are hexadecimal without it) or the name of an address."""
    name, symbol = part.column, f"{part.column}_sym"
    prefixed = text.has(b"0x", begin)
    first = text.data[begin]
    if name.startswith("__probe_"):
        numbers, good = text.hexadecimal(begin, stop)
        good &= prefixed | (stop - begin >= 8)
    elif prefixed.all():
        numbers, good = text.hexadecimal(begin, stop)
    else:
        numeric = (first == 45) | ((first >= 48) & (first <= 57))
        if numeric.any():
            numbers, good = text.decimal(begin, stop)
        else:
            numbers, good = np.zeros(begin.size, dtype=np.uint64), np.zeros(begin.size, dtype=bool)
        if prefixed.any():
            other, valid = text.hexadecimal(begin, stop)
            numbers, good = np.where(prefixed, other, numbers), np.where(prefixed, valid, good)
    found = {name: fit(numbers, good, types[name])}
    if good.all():
        return found, good
    if symbol not in types:
        return found, good
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
