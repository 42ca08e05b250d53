"""The short cuts of two-level event channels change nothing: findings, evidence and numbers are those of the rules."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import KINDS, events_from_json
from replay.systems.event_channel import SYSTEM, short_cuts
from replay.systems.event_channel.machine import TwoLevelMachine
from replay.systems.event_channel.short_cuts import QuickTwoLevelMachine

PLAIN = replace(SYSTEM, make=lambda policy, config, sink, sub: TwoLevelMachine(policy, config, sink))
SHOWN = frozenset(k.name for k in KINDS if k.name.startswith(("evtchn.", "guest.", "sched.", "trace.")))
PORTS = (3, 9, 40, 62, 63, 65, 70, 127, 700, 4095)
VCPUS = 3
Event = dict[str, Any]


class Load:
    """Two guests whose vCPUs take their events in upcalls; sends come at any time, ports are masked and moved, and now
    and then something is missing or out of place."""

    def __init__(self, seed: int, faults: float, delay: tuple[int, ...]) -> None:
        self.draw = random.Random(seed)
        self.faults = faults
        self.delay = delay
        self.t = 0
        self.bound = {(dom, port): index % VCPUS for dom in (0, 5) for index, port in enumerate(PORTS)}
        self.waiting: dict[tuple[int, int], list[int]] = {(dom, v): [] for dom in (0, 5) for v in range(VCPUS)}
        self.queues: dict[tuple[int, int], list[Event]] = {who: [] for who in self.waiting}

    def upcall(self, dom: int, vcpu: int) -> list[Event]:
        """An upcall of a vCPU for what waits for it."""
        draw = self.draw
        me = {"dom": dom, "vcpu": vcpu}
        steps: list[Event] = [{"kind": "evtchn.upcall", **me}]
        for port in self.waiting[dom, vcpu]:
            body = [{"kind": f"evtchn.{name}", **me, "obj": port} for name in ("handled", "clear")]
            if draw.random() < 0.2:
                body.insert(1, {"kind": "evtchn.mask", **me, "obj": port})
                body.append({"kind": "evtchn.unmask", **me, "obj": port})
            steps += body
        self.waiting[dom, vcpu] = []
        steps.append({"kind": "evtchn.upcall_end", **me})
        if draw.random() < self.faults:
            del steps[draw.randrange(len(steps))]
        return steps

    def other(self, dom: int) -> Event:
        """Something that is not the rule."""
        draw = self.draw
        port = draw.choice(PORTS)
        vcpu = draw.randrange(VCPUS)
        where = {"dom": dom, "vcpu": vcpu}
        kind = draw.choice(
            ("evtchn.mask", "evtchn.unmask", "rebind", "evtchn.snapshot", "sched.run", "sched.stop", "trace.lost",
             "evtchn.close", "evtchn.unmask_hypercall", "evtchn.notify", "range", "evtchn.upcall_mask")
        )  # fmt: skip
        if kind == "rebind":
            self.bound[dom, port] = vcpu
            name = draw.choice(("evtchn.rebind", "evtchn.rebind", "evtchn.bind_vcpu", "guest.bind_cpu"))
            return {"kind": name, "dom": dom, "obj": port, "tgt": vcpu}
        if kind == "range":
            return {"kind": "evtchn.send", "dom": dom, "obj": 4096 + port}
        if kind == "evtchn.snapshot":
            what = draw.randrange(5)
            return {"kind": kind, **where, "obj": what, "tgt": port // 64, "val": draw.choice((0, 0, 1, 2))}
        if kind in ("sched.run", "sched.stop"):
            return {"kind": kind, **where, "cpu": vcpu, "val": draw.choice((0, 2))}
        if kind == "trace.lost":
            return {"kind": kind, "cpu": vcpu, "val": self.t, "flags": draw.randrange(2)} if draw.random() < 0.2 else {
                "kind": "evtchn.mask", **where, "obj": port
            }  # fmt: skip
        return {"kind": kind, **where, "obj": port}

    def events(self, count: int) -> list[Event]:
        """`count` events."""
        draw = self.draw
        out: list[Event] = [
            {"kind": "evtchn.bind", "dom": dom, "obj": port, "tgt": vcpu} for (dom, port), vcpu in self.bound.items()
        ]
        while len(out) < count:
            dom, vcpu = draw.choice(tuple(self.queues))
            queue = self.queues[dom, vcpu]
            if queue:
                new = [queue.pop(0) for _ in range(draw.randint(1, len(queue)))]
            elif draw.random() < self.faults:
                new = [self.other(dom)]
            elif self.waiting[dom, vcpu] and draw.random() < 0.6:
                self.queues[dom, vcpu] = self.upcall(dom, vcpu)
                new = []
            else:
                port = draw.choice(PORTS)
                waiting = self.waiting[dom, self.bound[dom, port]]
                waiting += [] if port in waiting else [port]
                new = [{"kind": "evtchn.send", "dom": dom, "obj": port}]
            for event in new:
                self.t += draw.choice(self.delay)
                out.append({**event, "t": self.t})
        return [{"t": 0, **event} for event in out]


def once(events: list[Event], system: Any, policy: str, known: bool) -> Run:
    half = len(events) // 2
    tables = [events_from_json(events[:half]), events_from_json(events[half:])]
    return run_machine(
        system, policy, tables, config=Config(SYSTEM.parameters, {}), closed=False, t_end=events[-1]["t"] + 10**10,
        from_boot=known, observed=SHOWN,
    )  # fmt: skip


QUICK = (10, 300, 4_000)
SLOW = (10, 40_000, 3_000_000, 30_000_000)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("faults", [0.0, 0.02, 0.2])
@pytest.mark.parametrize("delay", [QUICK, SLOW], ids=["quick", "slow"])
def test_short_cuts_change_nothing(
    seed: int, faults: float, delay: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_the_rules = 0
    event = QuickTwoLevelMachine.event

    def counted(self: QuickTwoLevelMachine, *values: Any) -> None:
        nonlocal by_the_rules
        by_the_rules += 1
        event(self, *values)

    monkeypatch.setattr(QuickTwoLevelMachine, "event", counted)
    monkeypatch.setattr(short_cuts, "STRIDE", 60 * (seed + 1) ** 2)
    policy = ("current", "proposed", "modern")[seed % 3]
    events = Load(seed, faults, delay).events(900)
    for known in (False, True):
        by_the_rules = 0
        quick = once(events, SYSTEM, policy, known)
        if known and not faults:
            assert by_the_rules < len(events) / 2
        plain = once(events, PLAIN, policy, known)
        assert quick.findings == plain.findings
        assert quick.metrics == plain.metrics
        assert quick.suppressed == plain.suppressed
    if faults == 0.2:
        assert quick.findings
