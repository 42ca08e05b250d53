"""Channels and CPUs of the HPET broadcast (spec S1.1)."""

from __future__ import annotations

from replay.events import INF, NONE

__all__ = ["Channel", "Cpu", "Frame"]


class Channel:
    """One HPET comparator that can send a message.

    `members` are the CPUs that rely on it as a bit mask; under the proposed policies without the owner, for there it
    is the wake list. `gen` invalidates older matches of the
    comparator, which is to match at `armed_for` (INF: not), in its `serial` turn among entries of that moment; `timer`
    is the time of the agenda's entry that sees to it, then or before.
    `vector_cpu` is where the interrupt's vector is valid; it lags behind `dest` while a move is in progress.
    """

    __slots__ = (
        "armed_for", "dest", "gen", "handler_cpu", "index", "members", "move_in_progress", "next_event", "owner",
        "rerun", "serial", "timer", "used",
    )  # fmt: skip

    def __init__(self, index: int) -> None:
        self.index = index
        self.owner = NONE
        self.used = False
        self.members = 0
        self.next_event = INF
        self.gen = 0
        self.armed_for = INF
        self.serial = 0
        self.timer = INF
        self.dest = NONE
        self.move_in_progress = False
        self.handler_cpu = NONE
        self.rerun = False


class Frame:
    """A broadcast handler that runs on a CPU until `end` (ns)."""

    __slots__ = ("channel", "end", "serial")

    def __init__(self, channel: int, end: int, serial: int) -> None:
        self.channel = channel
        self.end = end
        self.serial = serial


class Cpu:
    """One CPU: asleep or busy, its deadline, the vectors in service at its LAPIC, the handlers on its stack.

    `recorded_exit` is when it left idle in the recording (NONE: not yet), `woke_at` when it did so in the model.
    """

    __slots__ = (
        "asleep", "channel", "deadline", "in_service", "index", "pending", "recorded_exit", "stack", "woke_at",
    )  # fmt: skip

    def __init__(self, index: int) -> None:
        self.index = index
        self.asleep = False
        self.deadline = INF
        self.channel = NONE
        self.in_service: list[int] = []  # vectors of other interrupts, not yet EOIed
        self.pending: list[int] = []  # channels whose message waits in IRR
        self.stack: list[Frame] = []
        self.recorded_exit = NONE
        self.woke_at = NONE
