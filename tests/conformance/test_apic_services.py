"""Runs of whole services taken as one step change nothing: findings, evidence and numbers are those of the rules."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import KINDS, events_from_json
from replay.systems.apic import SYSTEM, short_cuts
from replay.systems.apic.machine import ApicMachine
from replay.systems.apic.short_cuts import QuickApicMachine

PLAIN = replace(SYSTEM, make=lambda policy, config, sink, sub: ApicMachine(config, sink))
SHOWN = frozenset(k.name for k in KINDS if k.name.startswith(("lapic.", "sched."))) - {"lapic.exit"}
MS = 1_000_000
Event = dict[str, Any]


class Load:
    """Guests' and physical processors that serve vectors one after the other, now and then nested, late or wrong."""

    def __init__(self, seed: int, faults: float, delay: tuple[int, ...]) -> None:
        self.draw = random.Random(seed)
        self.faults = faults
        self.delay = delay
        self.t = 0
        self.queues: list[list[Event]] = [[] for _ in range(4)]
        self.who = [{"cpu": 1}, {"dom": 1, "vcpu": 0}, {"dom": 1, "vcpu": 1}, {"dom": 2, "vcpu": 0}]

    def service(self, vector: int, inner: bool) -> list[Event]:
        """Request, delivery and EOI, perhaps with another service inside."""
        steps: list[Event] = [{"kind": "lapic.accept", "obj": vector}, {"kind": "lapic.deliver", "obj": vector}]
        if inner and self.draw.random() < 0.2:
            for _ in range(self.draw.choice((1, 1, 2, 3))):
                steps += self.service(self.draw.choice((0x51, 0x61, 0x62, 0xF1)), inner=vector < 0x50)
        steps.append({"kind": "lapic.eoi"} if self.draw.random() < 0.7 else {"kind": "lapic.eoi", "obj": vector})
        if self.draw.random() < self.faults:
            del steps[self.draw.randrange(len(steps))]
        return steps

    def more(self) -> list[Event]:
        """What a processor does next."""
        draw = self.draw
        steps = self.service(draw.choice((0x31, 0x31, 0x32, 0x41)), inner=True)
        if draw.random() < 0.3:
            steps.append({"kind": "lapic.idle"})
        if draw.random() < self.faults:
            other = draw.choice(("lapic.tpr", "sched.run", "sched.stop", "lapic.reset", "lapic.accept", "sched.run"))
            fields = {"lapic.tpr": {"val": draw.choice((0, 0, 0x40))}, "lapic.accept": {"obj": 0x31, "flags": 1}}
            steps.insert(draw.randrange(len(steps)), {"kind": other, **fields.get(other, {})})
        return steps

    def events(self, count: int) -> list[Event]:
        """`count` events, processors in any order."""
        out: list[Event] = [{"t": 0, "kind": "sched.run", "cpu": n, **w} for n, w in enumerate(self.who) if "dom" in w]
        while len(out) < count:
            index = self.draw.choice((0, 1, 1, 1, 2, 2, 3))
            if not self.queues[index]:
                self.queues[index] = self.more()
            self.t += self.draw.choice(self.delay)
            fields = self.queues[index].pop(0)
            out.append({"cpu": index, **fields, "t": self.t, **self.who[index]})
        return out


def once(events: list[Event], system: Any, hidden: tuple[str, ...], known: bool) -> Run:
    half = len(events) // 2
    tables = [events_from_json(events[:half]), events_from_json(events[half:])]
    return run_machine(
        system, "any", tables, config=Config(SYSTEM.parameters, {}), closed=False, t_end=events[-1]["t"] + 5 * MS,
        from_boot=known, observed=SHOWN - set(hidden),
    )  # fmt: skip


QUICK = (10, 300, 4_000)
SLOW = (10, 40_000, 300_000, 900_000)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("faults", [0.0, 0.01, 0.1])
@pytest.mark.parametrize("delay", [QUICK, SLOW], ids=["quick", "slow"])
@pytest.mark.parametrize("hidden", [(), ("lapic.accept",)], ids=["", "no-accepts"])
def test_runs_change_nothing(
    seed: int, faults: float, delay: tuple[int, ...], hidden: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = interrupted = 0
    serve = QuickApicMachine.serve

    def counted(self: QuickApicMachine, lane: Any, run: int) -> bool:
        nonlocal taken, interrupted
        done = serve(self, lane, run)
        taken += done
        interrupted += done and self.runs is not None and self.runs.deep[run]
        return done

    monkeypatch.setattr(QuickApicMachine, "serve", counted)
    monkeypatch.setattr(short_cuts, "STRIDE", 80 * (seed + 1) ** 2)
    events = [e for e in Load(seed, faults, delay).events(1200) if e["kind"] not in hidden]
    for known in (False, True):
        quick = once(events, SYSTEM, hidden, known)
        plain = once(events, PLAIN, hidden, known)
        assert quick.findings == plain.findings
        assert quick.metrics == plain.metrics
    assert (taken > 10 and interrupted > 5) or delay == SLOW
    if faults == 0.1:
        assert quick.findings
