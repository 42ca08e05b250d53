"""HPET broadcast under random loads: what each policy may and may not do (spec V), on loads without a blocker."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import events_from_json
from replay.systems import SYSTEMS

HPET = SYSTEMS["hpet"]
CALM = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
LONG = settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
MS = 1_000_000


@st.composite
def loads(draw: st.DrawFn) -> tuple[int, int, list[dict[str, Any]]]:
    """Channels, CPUs, and idle entries and breaks of CPUs at random times; deadlines up to 20 ms ahead."""
    channels = draw(st.integers(1, 4))
    cpus = draw(st.integers(2, 8))
    events: list[dict[str, Any]] = []
    t = 0
    for _ in range(draw(st.integers(1, 60))):
        t += draw(st.integers(1, 3 * MS))
        cpu = draw(st.integers(0, cpus - 1))
        if draw(st.integers(0, 3)):
            deadline = t + draw(st.integers(30_000, 20 * MS))
            events.append({"t": t, "kind": "idle.enter", "cpu": cpu, "val": deadline})
        else:
            events.append({"t": t, "kind": "idle.break", "cpu": cpu})
    return channels, cpus, events


def run(policy: str, load: tuple[int, int, list[dict[str, Any]]], **config: Any) -> Run:
    channels, cpus, events = load
    end = events[-1]["t"] + 2_000 * MS
    values = {"n_channels": channels, "n_cpus": cpus, **config}
    return run_machine(
        HPET, policy, [events_from_json(events)], config=Config(HPET.parameters, values), closed=True, t_end=end
    )


def loud(result: Run) -> Counter[str]:
    return Counter(f.code.name for f in result.findings if f.severity != "info")


def no_alarm(load: tuple[int, int, list[dict[str, Any]]]) -> None:
    for policy in ("proposed", "proposed-keep"):
        result = run(policy, load)
        assert loud(result) == Counter()
        assert result.metrics["hpet_retargets"] == 0
        assert result.metrics["max_nesting"] <= 1
    # Current never wakes late without a blocker either: it costs other CPUs' time, not punctuality.
    late = loud(run("current", load))
    assert not late["hpet-late-wakeup"]
    assert not late["hpet-missed-wakeup"]
    assert loud(run("upstream-2025", load)) == Counter()


@CALM
@given(loads())
def test_proposed_raises_no_alarm_without_a_blocker(load: tuple[int, int, list[dict[str, Any]]]) -> None:
    no_alarm(load)


@pytest.mark.slow
@LONG
@given(loads())
def test_proposed_raises_no_alarm_without_a_blocker_long(load: tuple[int, int, list[dict[str, Any]]]) -> None:
    no_alarm(load)


def random_load(rng: random.Random, channels: int, cpus: int, steps: int) -> tuple[int, int, list[dict[str, Any]]]:
    """A load of the same kind as `loads`, cheaper to make in numbers."""
    t, events = 0, []
    for _ in range(steps):
        t += rng.randrange(1, MS)
        cpu = rng.randrange(cpus)
        if rng.random() < 0.7:
            events.append({"t": t, "kind": "idle.enter", "cpu": cpu, "val": t + rng.randrange(30_000, 20 * MS)})
        else:
            events.append({"t": t, "kind": "idle.break", "cpu": cpu})
    return channels, cpus, events


def test_random_loads_show_what_current_does_wrong() -> None:
    rng = random.Random(3)
    seen: Counter[str] = Counter()
    for _ in range(60):
        seen += loud(run("current", random_load(rng, rng.randrange(1, 4), 6, 80)))
    assert {"hpet-wrong-cpu", "hpet-affinity-stale", "hpet-spurious-irq", "hpet-nested-irq"} <= set(seen)


@CALM
@given(loads(), st.sampled_from(["current", "upstream-2025", "proposed", "proposed-keep"]))
def test_reruns_are_identical(load: tuple[int, int, list[dict[str, Any]]], policy: str) -> None:
    first, second = run(policy, load), run(policy, load)
    assert first.findings == second.findings
    assert first.metrics == second.metrics
    assert first.effects == second.effects


@CALM
@given(loads(), st.sampled_from(["current", "upstream-2025", "proposed", "proposed-keep"]))
def test_everybody_with_a_deadline_wakes(load: tuple[int, int, list[dict[str, Any]]], policy: str) -> None:
    """Nobody is left asleep: the end of the run is far beyond every deadline."""
    assert not [f for f in run(policy, load).findings if f.code.name == "hpet-missed-wakeup" and f.val > 400 * MS]


def test_keep_wakes_fewer_cpus_early_than_wake_all() -> None:
    """Spec V: wake-all causes several times the early wake-ups of keep."""
    rng = random.Random(7)
    early: Counter[str] = Counter()
    for _ in range(40):
        load = random_load(rng, 2, 6, 80)
        for policy in ("proposed", "proposed-keep"):
            early[policy] += run(policy, load).metrics["early_wakeups"]
    assert early["proposed"] > 2 * early["proposed-keep"] > 0


# -- recordings ----------------------------------------------------------------------------------------------------


@st.composite
def recordings(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A healthy machine: each CPU owns the channel of its number, which wakes it at its deadline."""
    events: list[dict[str, Any]] = []
    for cpu in range(draw(st.integers(1, 4))):
        t = draw(st.integers(0, MS))
        events.append({"t": t, "kind": "hpet.retarget", "cpu": cpu, "obj": cpu, "tgt": cpu})
        for _ in range(draw(st.integers(1, 12))):
            t += draw(st.integers(200_000, 2 * MS))
            deadline = t + draw(st.integers(100_000, 30 * MS))
            events.append({"t": t, "kind": "idle.enter", "cpu": cpu, "val": deadline})
            t = deadline + draw(st.integers(0, 30_000))
            events.append({"t": t, "kind": "hpet.handler.begin", "cpu": cpu, "obj": cpu})
            events.append({"t": t + 2_000, "kind": "hpet.handler.end", "cpu": cpu, "obj": cpu})
            t += 3_000
            events.append({"t": t, "kind": "idle.exit", "cpu": cpu, "obj": cpu, "tgt": 1})
    return sorted(events, key=lambda e: e["t"])


def verified(events: list[dict[str, Any]]) -> Counter[str]:
    result = run_machine(
        HPET, "current", [events_from_json(events)], config=Config(HPET.parameters), closed=False, from_boot=False
    )
    return loud(result)


@CALM
@given(recordings(), st.integers(0, 200))
def test_a_clean_recording_stays_clean_without_its_beginning(events: list[dict[str, Any]], cut: int) -> None:
    assert verified(events) == Counter()
    assert verified(events[cut:]) == Counter()


@CALM
@given(recordings(), st.integers(0, 200), st.integers(1, 40))
def test_a_clean_recording_stays_clean_with_a_gap(events: list[dict[str, Any]], start: int, length: int) -> None:
    """Records of one CPU are lost, and the recorder says so."""
    start = min(start, len(events) - 1)
    cpu = events[start]["cpu"]
    t0 = events[start]["t"]
    t1 = events[min(start + length, len(events) - 1)]["t"]
    kept = [e for e in events if not (e["cpu"] == cpu and t0 <= e["t"] <= t1)]
    kept.append({"t": t0, "kind": "trace.lost", "cpu": cpu, "val": t0, "flags": 1})
    kept.append({"t": t1, "kind": "trace.lost", "cpu": cpu, "val": t0})
    assert verified(sorted(kept, key=lambda e: e["t"])) == Counter()
