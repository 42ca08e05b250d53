"""Looking at a whole column at once."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

__all__ = ["counted", "dense", "first_of_each"]

#: Tables by value may have this many entries, or four for each element; beyond that NumPy sorts.
_TABLE: Final = 1 << 16


def _sparse(values: Any, span: int) -> bool:
    """Whether a table with an entry for each of `span` numbers would be too large."""
    return span > max(_TABLE, 4 * len(values))


def dense(values: Any) -> tuple[Any, Any]:
    """The different values of an array of integers, and for each element the index of its value among them."""
    low = int(values.min())
    span = int(values.max()) - low + 1
    if _sparse(values, span):
        found, index = np.unique(values, return_inverse=True)
        return found, index.reshape(-1)
    values = values - low
    present = np.zeros(span, np.bool_)
    present[values] = True
    offsets = np.flatnonzero(present)
    index_of = np.empty(span, np.int64)
    index_of[offsets] = np.arange(len(offsets))
    return offsets + low, index_of.take(values)


def counted(values: Any, bound: int) -> tuple[list[int], list[int]]:
    """The different values in ascending order and how often each is there; all are in 0..bound-1."""
    if _sparse(values, bound):
        found, counts = np.unique(values, return_counts=True)
        return found.tolist(), counts.tolist()
    counts = np.bincount(values)
    found = np.flatnonzero(counts)
    return found.tolist(), counts[found].tolist()


def first_of_each(values: Any, bound: int) -> Any:
    """Indices of the first element of each value; all are in 0..bound-1."""
    if _sparse(values, bound):
        return np.unique(values, return_index=True)[1]
    first = np.full(bound, -1, np.int64)
    first[values[::-1]] = np.arange(len(values) - 1, -1, -1)  # of a value that repeats, the last assignment stays
    return first[first >= 0]
