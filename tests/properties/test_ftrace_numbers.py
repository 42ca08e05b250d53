"""Vectorised numbers in text against Python's own int()."""

from __future__ import annotations

import re

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from parsers.ftrace.swar import Text

VALUES = st.one_of(
    st.integers(-(10**19), 10**19).map(str),
    st.integers(0, 1 << 68).map(lambda n: f"{n:x}"),
    st.integers(0, 1 << 68).map(lambda n: f"0x{n:x}"),
    st.text("0123456789abcdefgx-/: @`ABF", max_size=22),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(VALUES, min_size=1, max_size=40))
def test_numbers_and_ends(values: list[str]) -> None:
    """find, decimal and hexadecimal say yes exactly where the pattern does, and then the same number."""
    text = " " * 16 + "|".join(values) + "|" + " " * 64
    start = np.cumsum([16] + [len(value) + 1 for value in values[:-1]])
    end = start + np.array([len(value) for value in values])
    reader = Text(np.frombuffer(text.encode(), dtype=np.uint8))
    assert (reader.find(ord("|"), start, end + 1) == end).all()
    decimal, is_decimal = reader.decimal(start, end)
    hexadecimal, is_hexadecimal = reader.hexadecimal(start, end)
    for row, value in enumerate(values):
        assert is_decimal[row] == bool(re.fullmatch("-?[0-9]{1,18}", value))
        assert is_hexadecimal[row] == bool(re.fullmatch("(0x)?[0-9a-f]{1,16}", value))
        if is_decimal[row]:
            assert int(decimal[row]) == int(value) % (1 << 64)
        if is_hexadecimal[row]:
            assert int(hexadecimal[row]) == int(value, 16)
