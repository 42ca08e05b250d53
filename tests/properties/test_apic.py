"""Local APIC: whatever hardware can do is clean, whatever it cannot do is found, and ignorance is silent."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import events_from_json
from replay.hardware.lapic import LocalApic
from replay.systems import SYSTEMS

APIC = SYSTEMS["apic"]
CALM = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
LONG = settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def recordings(draw: st.DrawFn) -> list[dict[str, Any]]:
    """What two correct LAPICs do under random requests: an own little model of IRR and ISR as sets."""
    events: list[dict[str, Any]] = []
    requested: list[set[int]] = [set(), set()]
    serving: list[list[int]] = [[], []]
    t = 0
    for _ in range(draw(st.integers(1, 120))):
        t += draw(st.integers(1, 1000))
        cpu = draw(st.integers(0, 1))
        step = draw(st.integers(0, 2))
        if step == 0:
            vector = draw(st.integers(0x20, 0xEF))
            requested[cpu].add(vector)
            events.append({"t": t, "kind": "lapic.accept", "cpu": cpu, "obj": vector})
        elif step == 1 and requested[cpu]:
            vector = max(requested[cpu])
            if not serving[cpu] or vector >> 4 > serving[cpu][-1] >> 4:
                requested[cpu].remove(vector)
                serving[cpu].append(vector)
                events.append({"t": t, "kind": "lapic.deliver", "cpu": cpu, "obj": vector})
        elif step == 2 and serving[cpu]:
            vector = serving[cpu].pop()
            named = {"obj": vector} if draw(st.booleans()) else {}
            events.append({"t": t, "kind": "lapic.eoi", "cpu": cpu, **named})
            events.append({"t": t, "kind": "lapic.exit", "cpu": cpu, "obj": vector})
    return events


def run(events: list[dict[str, Any]], *, known: bool) -> Run:
    config = Config(APIC.parameters, {"nesting_limit": 16})
    return run_machine(APIC, "any", [events_from_json(events)], config=config, closed=False, from_boot=known)


def codes(result: Run) -> Counter[str]:
    return Counter(f.code.name for f in result.findings)


@CALM
@given(recordings())
def test_correct_hardware_is_clean_and_conserved(events: list[dict[str, Any]]) -> None:
    result = run(events, known=True)
    assert codes(result) == Counter()
    kinds = Counter(e["kind"] for e in events)
    metrics = result.metrics
    assert metrics["deliveries"] == kinds["lapic.deliver"]
    assert metrics["deliveries"] == metrics["eois"] + metrics["in_service_at_end"]
    assert metrics["irr_coalesced"] <= kinds["lapic.accept"] - metrics["deliveries"]


@CALM
@given(recordings(), st.integers(0, 200))
def test_any_prefix_may_be_missing(events: list[dict[str, Any]], cut: int) -> None:
    assert codes(run(events[cut:], known=False)) == Counter()


@CALM
@given(recordings(), st.integers(0, 200), st.integers(1, 60))
def test_any_gap_may_be_there(events: list[dict[str, Any]], start: int, length: int) -> None:
    head, lost, tail = events[:start], events[start : start + length], events[start + length :]
    if not lost:
        return
    gap = {"t": lost[-1]["t"], "kind": "trace.lost", "val": lost[0]["t"]}
    assert codes(run([*head, gap, *tail], known=True)) == Counter()


@pytest.mark.slow
@LONG
@given(recordings(), st.integers(0, 200), st.integers(1, 60))
def test_correct_hardware_longer(events: list[dict[str, Any]], start: int, length: int) -> None:
    """Clean and conserved whole, without its beginning, and with a gap."""
    result = run(events, known=True)
    assert codes(result) == Counter()
    assert result.metrics["deliveries"] == result.metrics["eois"] + result.metrics["in_service_at_end"]
    assert codes(run(events[start:], known=False)) == Counter()
    head, lost, tail = events[:start], events[start : start + length], events[start + length :]
    if lost:
        gap = {"t": lost[-1]["t"], "kind": "trace.lost", "val": lost[0]["t"]}
        assert codes(run([*head, gap, *tail], known=True)) == Counter()


@CALM
@given(recordings(), st.data())
def test_a_missing_eoi_is_found(events: list[dict[str, Any]], data: st.DataObject) -> None:
    """Without its EOI a vector stays in service, and the next delivery of its class or below is impossible."""
    eois = [i for i, e in enumerate(events) if e["kind"] == "lapic.eoi"]
    if not eois:
        return
    index = data.draw(st.sampled_from(eois))
    vector = events[index + 1]["obj"]
    cpu = events[index]["cpu"]
    later = [e for e in events[index + 2 :] if e["cpu"] == cpu and e["kind"] in ("lapic.deliver", "lapic.eoi")]
    found = codes(run([*events[:index], *events[index + 1 :]], known=True))
    if later and later[0]["kind"] == "lapic.deliver" and later[0]["obj"] >> 4 <= vector >> 4:
        assert found["lapic-priority-inversion"] >= 1


@CALM
@given(recordings())
def test_an_eoi_too_many_is_found(events: list[dict[str, Any]]) -> None:
    end = events[-1]["t"] if events else 0
    result = run([*events, *({"t": end + 1, "kind": "lapic.eoi", "cpu": 0} for _ in range(130))], known=True)
    assert codes(result)["lapic-eoi-unmatched"] >= 1


@CALM
@given(recordings())
def test_reruns_are_identical(events: list[dict[str, Any]]) -> None:
    assert run(events, known=False).findings == run(events, known=False).findings


@given(st.lists(st.integers(0x20, 0xEF), unique=True, max_size=20))
def test_eoi_always_takes_the_highest(vectors: list[int]) -> None:
    lapic = LocalApic(known=True)
    for vector in vectors:
        lapic.deliver(vector)
    assert [lapic.eoi() for _ in vectors] == sorted(vectors, reverse=True)
    assert lapic.eoi() == -1
