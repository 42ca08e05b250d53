"""Strings of a whole column to numbers, words and masks."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from parsers.ftrace.arrays import Array, bits, plain
from parsers.ftrace.shapes import Part

__all__ = ["bitmask", "each", "fit", "hexadecimal", "parse_numbers", "word_value"]

#: So few strings that Python converts them at once, without polars, which has to be imported first.
FEW = 256
BASE16 = re.compile(r"\+?[0-9a-fA-F]+")


def parse_numbers(values: pa.Array, base16: bool) -> tuple[Array, Array]:
    """(u64 bit patterns, which rows are numbers)."""
    if base16:
        return hexadecimal(values)
    try:
        return values.cast(pa.int64()).to_numpy(zero_copy_only=False).view(np.uint64), np.ones(len(values), dtype=bool)
    except pa.ArrowInvalid:
        pass
    import polars as pl  # costs more than reading a small recording, and few come here

    series = pl.Series(values)
    signed = series.cast(pl.Int64, strict=False)
    result, known = signed.fill_null(0).to_numpy().view(np.uint64), signed.is_not_null().to_numpy()
    if not known.all():
        large = series.cast(pl.UInt64, strict=False)
        result = np.where(known, result, large.fill_null(0).to_numpy())
        known = known | large.is_not_null().to_numpy()
    return result, known


def hexadecimal(values: pa.Array) -> tuple[Array, Array]:
    """As `parse_numbers`, for hexadecimal digits without 0x; pointers have 16 of them in every row."""
    buffers, rows = values.buffers(), len(values)
    if values.null_count == 0 and buffers[2] is not None:
        offsets = np.frombuffer(buffers[1], dtype=np.int64)[values.offset : values.offset + rows + 1]
        if rows and offsets[-1] - offsets[0] == 16 * rows and (np.diff(offsets) == 16).all():
            try:
                packed = bytes.fromhex(bytes(buffers[2][int(offsets[0]) : int(offsets[-1])]).decode("latin-1"))
            except ValueError:
                packed = b""
            if len(packed) == 8 * rows:
                return np.frombuffer(packed, dtype=">u8").astype(np.uint64), np.ones(rows, dtype=bool)
    if rows <= FEW:
        numbers = [int(text, 16) if text and BASE16.fullmatch(text) else None for text in values.to_pylist()]
        known = np.array([number is not None and number < 1 << 64 for number in numbers], dtype=bool)
        return np.array([n if n is not None and n < 1 << 64 else 0 for n in numbers], dtype=np.uint64), known
    import polars as pl  # as above

    parsed = pl.Series(values).str.to_integer(base=16, dtype=pl.UInt64, strict=False)
    return parsed.fill_null(0).to_numpy(), parsed.is_not_null().to_numpy()


def fit(values: Array, valid: Array | None, kind: pa.DataType) -> pa.Array:
    """u64 bit patterns as `kind`, wrapped to its width as the kernel's field would hold them; `valid` None: all are."""
    if kind == pa.bool_():
        return bits(values != 0, valid)
    width = kind.bit_width // 8
    return plain(kind, values.astype(f"u{width}", copy=False), valid)


def each(values: pa.Array, function: Callable[[str], int | None]) -> tuple[Array, Array]:
    """`function` of each different value, spread over the rows: (u64 bit patterns, which are known)."""
    coded = values.dictionary_encode()
    answers = [function(str(word)) for word in coded.dictionary.to_pylist()]
    index = coded.indices.to_numpy(zero_copy_only=False)
    numbers = np.array([(answer or 0) & (1 << 64) - 1 for answer in answers] or [0], dtype=np.uint64)
    known = np.array([answer is not None for answer in answers] or [False], dtype=bool)
    return numbers[index], known[index]


def word_value(part: Part) -> Callable[[str], int | None]:
    def value(word: str) -> int | None:
        if word in part.words or not part.flags:
            return part.words.get(word)
        total = 0
        for name in filter(None, re.split(r"\||(?=\+)", word)):
            if name not in part.words:
                return None
            total |= part.words[name]
        return total

    return value


def bitmask(values: pa.Array) -> pa.Array:
    """`00000000,00000003` (32-bit words, highest first) as a list of 64-bit words, lowest first."""

    def words(text: str) -> list[int]:
        digits = text.replace(",", "")
        if not re.fullmatch(r"[0-9a-f]{1,4096}", digits):
            return []
        number, size = int(digits, 16), (len(text.split(",")) + 1) // 2
        return [number >> 64 * i & (1 << 64) - 1 for i in range(size)]

    coded = values.dictionary_encode()
    lists = pa.array([words(str(text)) for text in coded.dictionary.to_pylist()], pa.list_(pa.uint64()))
    return lists.take(coded.indices)
