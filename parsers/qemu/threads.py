"""Which CPU of the virtual machine a host thread of the emulator runs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

__all__ = ["ThreadMap"]

I64 = npt.NDArray[np.int64]
#: Threads remembered; a real process has tens. Beyond it the log is noise and threads are not told apart.
_LIMIT = 1 << 14


class ThreadMap:
    """Learns thread → CPU from the lines that name both.

    With one thread per CPU (multi-threaded TCG, KVM) the whole thread gets its CPU. A thread that names several
    (single-threaded TCG) gets the one named last. Lines in batches before the thread's first naming line stay unknown.
    """

    def __init__(self) -> None:
        self._cpu: dict[int, int] = {}  # thread → CPU named last
        self._shared: set[int] = set()
        self._new: list[int] = []

    def take_new_shared(self) -> list[int]:
        """Threads found to run several CPUs since the last call."""
        new, self._new = self._new, []
        return new

    def assign(self, tid: I64, named: I64) -> I64:
        """CPU of every line (-1 unknown), from thread ids and the CPU each line names (-1 none), in line order."""
        lines = pl.DataFrame({"tid": tid, "named": pl.Series(named).replace(-1, None)})
        seen = (
            lines.drop_nulls()
            .group_by("tid")
            .agg(pl.col("named").n_unique().alias("n"), pl.col("named").last().alias("last"))
        )
        before = dict(self._cpu)
        for thread, n, last in seen.sort("tid").iter_rows():
            if thread not in self._cpu and len(self._cpu) >= _LIMIT:
                continue
            if (n > 1 or self._cpu.get(thread, last) != last) and thread not in self._shared:
                self._shared.add(thread)
                self._new.append(thread)
            self._cpu[thread] = last
        schema = {"tid": pl.Int64, "cpu": pl.Int64, "before": pl.Int64, "shared": pl.Boolean}
        rows = [(t, cpu, before.get(t), t in self._shared) for t, cpu in self._cpu.items()]
        known = pl.DataFrame(rows, schema=schema, orient="row")
        running = pl.coalesce(pl.col("named").forward_fill().over("tid"), "before")
        cpu = lines.join(known, on="tid", how="left", maintain_order="left").select(
            pl.when("shared").then(running).otherwise("cpu").fill_null(-1)
        )
        return cpu.to_series().to_numpy()
