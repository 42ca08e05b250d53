"""Recorded sleeps that break no rule, found in columns.

Most sleeps end by something else than the HPET, not too late: they change nothing but whether their CPU sleeps and
since when, and hardly ever does anybody ask that before they are over. They are kept beside the rows of a batch, and
whoever wants to know how a CPU is looks there (`RecordedBroadcast.look`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np

from replay.events import INF, KIND_ID, NIL

__all__ = ["BY_BROADCAST", "BY_HPET", "QuietSleeps", "by_cpu", "quiet_sleeps"]

ENTER: Final = KIND_ID["idle.enter"]
EXIT: Final = KIND_ID["idle.exit"]

# Why a CPU woke: `tgt` of idle.exit.
BY_HPET: Final = 1
BY_BROADCAST: Final = 2


class QuietSleeps:
    """Those of one CPU in a batch, by time: `seq` and time (ns) of each entry and exit."""

    __slots__ = ("entered", "entered_seqs", "exited", "exited_seqs")

    def __init__(self, entered_seqs: list[int], entered: list[int], exited_seqs: list[int], exited: list[int]) -> None:
        self.entered_seqs: list[int] = entered_seqs
        self.entered: list[int] = entered
        self.exited_seqs: list[int] = exited_seqs
        self.exited: list[int] = exited


def quiet_sleeps(kinds: Any, times: Any, cpus: Any, reasons: Any, deadlines: Any, late_ns: int) -> Any:
    """Which rows of a batch are entries (n indices) and exits (n) of sleeps that nothing of the HPET ended, at most
    `late_ns` after their deadline (0 or NIL: none). By CPU, and of each in order."""
    moves = np.flatnonzero((kinds == ENTER) | (kinds == EXIT))
    moves = moves[np.argsort(cpus[moves], kind="stable")]
    first, second = moves[:-1], moves[1:]
    pairs = (kinds[first] == ENTER) & (kinds[second] == EXIT) & (cpus[first] == cpus[second])
    entries, exits = first[pairs], second[pairs]
    reason, deadline = reasons[exits], deadlines[entries]
    quiet = (reason != BY_HPET) & (reason != BY_BROADCAST)
    endless = (deadline == NIL) | (deadline == 0)
    quiet &= endless | ((deadline > -INF) & (times[exits] - np.maximum(deadline, -INF) <= late_ns))
    return entries[quiet], exits[quiet]


def by_cpu(entries: Any, exits: Any, seqs: Any, times: Any, cpus: Any) -> Iterator[tuple[int, QuietSleeps]]:
    """The sleeps of each CPU that has any; see `quiet_sleeps`."""
    owners = cpus[entries]
    cuts = np.flatnonzero(owners[1:] != owners[:-1]) + 1
    for mine, others in zip(np.split(entries, cuts), np.split(exits, cuts), strict=True):
        if len(mine):
            lists = [column[rows].tolist() for rows in (mine, others) for column in (seqs, times)]
            yield int(cpus[mine[0]]), QuietSleeps(*lists)
