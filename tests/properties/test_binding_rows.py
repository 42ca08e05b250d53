"""`replay.binding.rows` against polars' own methods, which do the same in another thread."""

from __future__ import annotations

import polars as pl
from hypothesis import given
from hypothesis import strategies as st

from replay.binding.rows import chosen, last_of_each, numbered, renamed

Rows = list[tuple[int | None, int | None]]
ROWS = st.lists(st.tuples(st.none() | st.integers(0, 5), st.none() | st.integers(0, 300)), max_size=60)


def frame_of(rows: Rows) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema={"cpu": pl.UInt16, "irq": pl.UInt32}, orient="row")
    return frame.with_columns(seq=pl.int_range(pl.len(), dtype=pl.UInt64))


@given(ROWS, st.integers(0, 300))
def test_rows_are_chosen_where_the_mask_is_true_not_where_it_is_null(rows: Rows, limit: int) -> None:
    frame = frame_of(rows)
    assert chosen(frame, frame["irq"] < limit).equals(frame.filter(pl.col("irq") < limit))


@given(ROWS)
def test_the_last_row_of_each_in_the_order_of_rows(rows: Rows) -> None:
    frame = frame_of(rows)
    expected = frame.group_by("cpu").agg(pl.col("irq").last(), pl.col("seq").last()).sort("seq")
    assert last_of_each(frame, "cpu").equals(expected)


@given(ROWS, st.dictionaries(st.integers(0, 2**32 - 1) | st.integers(0, 300), st.integers(0, 40), max_size=6))
def test_each_value_has_its_number_or_none(rows: Rows, numbers: dict[int, int]) -> None:
    frame = frame_of(rows)
    found = numbered(frame["irq"], numbers)
    assert found.dtype == pl.Int64
    assert found.to_list() == [None if irq is None else numbers.get(irq) for irq in frame["irq"].to_list()]


def test_columns_under_other_names() -> None:
    frame = frame_of([(1, 2)])
    assert renamed(frame, "seq", line="irq").to_dict(as_series=False) == {"seq": [0], "line": [2]}
