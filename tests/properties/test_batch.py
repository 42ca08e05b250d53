"""Columns of a batch hold what the table holds: nulls become NONE or NIL, whatever the numbers are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from replay.events import KIND_ID, KINDS, NIL, NONE, SCHEMA, Batch

COLUMNS = ("kind", "cpu", "dom", "vcpu", "obj", "tgt", "val", "val2")
KIND = st.sampled_from([kind.name for kind in KINDS])


def numbers(name: str) -> st.SearchStrategy[int | None]:
    """Values of a column, those at the edges of narrower types among them."""
    kind = SCHEMA.field(name).type
    low, high = (int(edge) for edge in (np.iinfo(kind.to_pandas_dtype()).min, np.iinfo(kind.to_pandas_dtype()).max))
    edges = [v for v in (0, 1, 127, 128, 255, 256, 32767, 32768, 65535, 1 << 31, (1 << 31) - 1) if low <= v <= high]
    return st.one_of(st.none(), st.sampled_from([low, high, *edges]), st.integers(low, high))


ROW = st.fixed_dictionaries({"kind": KIND, **{name: numbers(name) for name in COLUMNS[1:]}})


@given(st.lists(ROW, min_size=1, max_size=12), st.integers(0, 12))
def test_nulls_become_numbers(rows: list[dict[str, Any]], cut: int) -> None:
    table = pa.table(
        {name: pa.array([row[name] for row in rows], SCHEMA.field(name).type) for name in COLUMNS}
    )
    table = pa.concat_tables([table.slice(0, cut), table.slice(cut)])
    absent = dict.fromkeys(COLUMNS, NONE) | {"val": NIL, "val2": NIL}
    wanted = [
        tuple(KIND_ID[row[n]] if n == "kind" else absent[n] if row[n] is None else row[n] for n in COLUMNS)
        for row in rows
    ]
    batch = Batch.of(table, COLUMNS)
    assert list(batch.rows(COLUMNS)) == wanted
    assert [batch.row(index, COLUMNS) for index in range(len(rows))] == wanted
    assert [tuple(batch.array(name)[index] for name in COLUMNS) for index in range(len(rows))] == wanted
