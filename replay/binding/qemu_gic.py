"""QEMU device trace of an Arm machine (in work: no events yet)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import polars as pl

from replay.binding.base import Records
from replay.coverage import Observation

__all__ = ["HOLD_NS", "TABLES", "Binder"]

TABLES: Final = frozenset({"gic_cpu_read"})
HOLD_NS: Final = 0


class Binder:
    """Events of the Arm half."""

    def __init__(self, records: Records) -> None:
        self.observed: dict[str, Observation] = {}
        self.facts: dict[str, Any] = {}

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Canonical events of the lines `lo` to `hi`."""
        return iter(())
