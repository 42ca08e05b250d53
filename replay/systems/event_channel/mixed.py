"""Guests of both event-channel ABIs on one host: each domain goes to the machine of the ABI that it is known to use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from replay.declare import Config
from replay.effects import Effects
from replay.events import NONE
from replay.hardware.evtchn_two_level import ABI_FIFO, SNAP_ABI
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.event_channel.fifo import FifoMachine
from replay.systems.event_channel.machine import COLUMNS, SNAPSHOT, TwoLevelMachine

__all__ = ["MixedMachine"]


class MixedMachine(Machine):
    """Both machines on one sink. A domain is on the two-level ABI until a snapshot names the other one."""

    columns: ClassVar[tuple[str, ...]] = COLUMNS

    def __init__(self, policy: Any, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.two_level = TwoLevelMachine(policy, config, sink)
        self.fifo = FifoMachine(policy, config, sink)
        self.on_fifo: set[int] = set()

    def load(self, init: Mapping[str, Any]) -> None:
        """Scenarios have one ABI."""
        for machine in (self.two_level, self.fifo):
            machine.from_boot = self.from_boot
            machine.observed = self.observed

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        """The event glue: by domain; what names none concerns both."""
        two_level: list[tuple[int, ...]] = []
        fifo: list[tuple[int, ...]] = []
        for row in rows:
            kind, _, dom, _, obj, _, val, _, _ = row
            if kind == SNAPSHOT and obj == SNAP_ABI:
                (self.on_fifo.add if val == ABI_FIFO else self.on_fifo.discard)(dom)
            if dom == NONE or dom not in self.on_fifo:
                two_level.append(row)
            if dom == NONE or dom in self.on_fifo:
                fifo.append(row)
        self.two_level.consume(two_level)
        self.fifo.consume(fifo)

    def finish(self, t_end: int) -> None:
        """The ends of both."""
        self.two_level.finish(t_end)
        self.fifo.finish(t_end)
        self.effects = Effects(sorted((*self.two_level.effects, *self.fifo.effects)))
        self.sink.findings.sort(key=lambda finding: finding.t)

    def metrics(self) -> dict[str, int]:
        """Sums; of delays the longest."""
        total = dict(self.two_level.metrics())
        for name, value in self.fifo.metrics().items():
            before = total.get(name, 0)
            total[name] = max(before, value) if name.startswith("max_") else before + value
        return total
