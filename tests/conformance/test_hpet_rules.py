"""HPET rules on recordings: each fires in one case and is silent where the specification says so (S1.7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import events_from_json
from replay.systems import SYSTEMS

HPET = SYSTEMS["hpet"]
US = 1_000
MS = 1_000_000
STOCK = frozenset(
    {"idle.enter", "idle.exit", "idle.break", "hpet.handler.begin", "hpet.handler.end", "hpet.retarget", "trace.lost"}
)


def e(t: int, kind: str, **fields: int) -> dict[str, Any]:
    return {"t": t, "kind": kind, **fields}


def replayed(events: Sequence[dict[str, Any]], policy: str = "current", *, stock: bool = False, **config: Any) -> Run:
    values = {"n_channels": 2, "n_cpus": 4, **config}
    return run_machine(
        HPET, policy, [events_from_json(sorted(events, key=lambda x: x["t"]))],
        config=Config(HPET.parameters, values), closed=False, from_boot=False, observed=STOCK if stock else None,
        t_end=events[-1]["t"] + 2_000 * MS,
    )  # fmt: skip


def found(run: Run, code: str) -> list[tuple[int, str, int, int, int]]:
    return [(f.t, f.severity, f.cpu, f.obj, f.val) for f in run.findings if f.code.name == code]


def asleep(cpu: int, t: int, sleep_ns: int) -> dict[str, Any]:
    return e(t, "idle.enter", cpu=cpu, val=t + sleep_ns)


def handled(channel: int, cpu: int, t: int, duration: int = 2 * US) -> list[dict[str, Any]]:
    return [
        e(t, "hpet.handler.begin", obj=channel, cpu=cpu),
        e(t + duration, "hpet.handler.end", obj=channel, cpu=cpu),
    ]


AWAKE = [asleep(3, 0, 9 * MS), e(1 * MS, "idle.exit", cpu=3, tgt=0)]  # CPU 3 is known to be awake from 1 ms on


# -- stock recordings: inferred --------------------------------------------------------------------------------------


def test_an_awake_cpu_that_serves_a_sleeper_is_the_wrong_one() -> None:
    events = [*AWAKE, asleep(1, 2 * MS, 2 * MS), *handled(0, 3, 4 * MS + 20 * US)]
    events.append(e(4 * MS + 60 * US, "idle.exit", cpu=1, obj=0, tgt=2))
    run = replayed(events, stock=True)
    assert found(run, "hpet-wrong-cpu") == [(4 * MS + 20 * US, "warn", 3, 0, 1)]
    assert found(run, "hpet-spurious-irq") == []
    assert {f.conf for f in run.findings} == {50}


def test_an_awake_cpu_that_serves_nobody_took_a_spurious_interrupt() -> None:
    run = replayed([*AWAKE, *handled(0, 3, 4 * MS)], stock=True)
    assert found(run, "hpet-spurious-irq") == [(4 * MS, "info", 3, 0, -(1 << 63))]
    assert found(run, "hpet-wrong-cpu") == []


@pytest.mark.parametrize("just", ["woken", "going to sleep", "unknown"])
def test_a_cpu_around_its_sleep_may_own_the_channel(just: str) -> None:
    events = {
        "woken": [*AWAKE, *handled(0, 3, 1 * MS + 90 * US)],
        "going to sleep": [
            *AWAKE, *handled(0, 3, 4 * MS), asleep(3, 4 * MS + 100 * US, 2 * MS), e(6 * MS, "idle.exit", cpu=3, tgt=0),
        ],
        "unknown": handled(0, 3, 4 * MS),
    }[just]  # fmt: skip
    assert replayed(events, stock=True).findings == []


def test_a_gap_hides_who_was_served() -> None:
    gap = [e(4 * MS + 10 * US, "trace.lost", cpu=1, val=0, flags=1), e(4 * MS + 300 * US, "trace.lost", cpu=1, val=0)]
    run = replayed([*AWAKE, *handled(0, 3, 4 * MS), *gap], stock=True)
    assert run.findings == []


def test_a_message_to_the_old_target_while_the_new_owner_sleeps() -> None:
    events = [
        asleep(2, 0, 9 * MS), e(1 * MS, "hpet.retarget", obj=0, tgt=1, cpu=1), asleep(1, 1 * MS + 5 * US, 8 * MS),
        *handled(0, 2, 2 * MS),
    ]  # fmt: skip
    run = replayed(events, stock=True)
    assert found(run, "hpet-wrong-cpu") == [(2 * MS, "warn", 2, 0, 1)]
    in_flight = [*events[:3], *handled(0, 2, 1 * MS + 400)]
    assert found(replayed(in_flight, stock=True), "hpet-wrong-cpu") == []


def test_late_early_and_missed_wakes() -> None:
    def wake(at: int, reason: int) -> Run:
        events = [asleep(0, 0, 2 * MS), *handled(0, 0, at - 5 * US), e(at, "idle.exit", cpu=0, obj=0, tgt=reason)]
        return replayed(events)

    late = 2 * MS + 251 * US
    assert found(wake(late, 1), "hpet-late-wakeup") == [(late, "info", 0, -1, 251 * US)]
    assert found(wake(2 * MS + 501 * US, 1), "hpet-late-wakeup")[0][1] == "warn"
    assert found(wake(2 * MS + 500 * US, 1), "hpet-late-wakeup")[0][1] == "info"
    assert found(wake(2 * MS + 249 * US, 1), "hpet-late-wakeup") == []  # slop and exit latency
    assert found(wake(late, 0), "hpet-missed-wakeup") == [(late, "warn", 0, -1, 251 * US)]
    assert found(wake(1 * MS, 1), "hpet-early-wakeup") == [(1 * MS, "info", 0, -1, -1 * MS)]
    assert found(wake(1 * MS, 0), "hpet-early-wakeup") == []
    assert wake(2 * MS + 20 * US, 1).findings == []


def test_asleep_for_long_after_the_deadline() -> None:
    run = replayed([asleep(0, 0, 2 * MS), e(900 * MS, "idle.exit", cpu=0, tgt=0)])
    assert found(run, "hpet-missed-wakeup") == [(402 * MS, "warn", 0, -1, 400 * MS)]


def test_without_handler_records_wakes_cannot_be_judged() -> None:
    events = [asleep(0, 0, 2 * MS), e(3 * MS, "idle.exit", cpu=0, tgt=0)]
    run = run_machine(
        HPET, "current", [events_from_json(events)], config=Config(HPET.parameters), closed=False, from_boot=False,
        observed=frozenset({"idle.enter", "idle.exit"}),
    )  # fmt: skip
    assert run.findings == []


def test_nesting_and_stack_depth() -> None:
    events = [
        *(e(MS + i, "hpet.handler.begin", obj=i, cpu=0) for i in range(3)),
        *(e(2 * MS + i, "hpet.handler.end", obj=2 - i, cpu=0) for i in range(3)),
        *handled(0, 0, 3 * MS),
    ]
    run = replayed(events)
    assert [(t, v) for t, _, _, _, v in found(run, "hpet-nested-irq")] == [(MS + 1, 2), (MS + 2, 3)]
    assert [(t, v) for t, _, _, _, v in found(run, "hpet-stack-depth")] == [(MS + 2, 3)]
    assert run.metrics["max_nesting"] == 3
    assert found(replayed(events, stack_limit=3), "hpet-stack-depth") == []


# -- recordings that show the comparators: certain -------------------------------------------------------------------


def programmed(t: int, channel: int, cpu: int, owner: int, at: int, reason: int = 0) -> dict[str, Any]:
    return e(t, "hpet.program", obj=channel, cpu=cpu, tgt=owner, val=at, val2=reason)


def test_while_records_of_a_cpu_are_lost_it_may_have_moved_a_channel() -> None:
    """Pointed at CPU 0 where everybody sees it; CPU 3, which nobody sees, then takes it and gives it to CPU 2."""
    lost = [e(1 * MS, "trace.lost", cpu=3, val=0, flags=1), e(50 * MS, "trace.lost", cpu=3, val=1 * MS)]
    sleeps = [asleep(0, 2 * MS + 1000, 9 * MS), asleep(2, 3 * MS, 5 * MS)]
    woken = [*handled(0, 2, 8 * MS), e(8 * MS + 20 * US, "idle.exit", cpu=2, obj=0, tgt=1)]
    pointed = e(2 * MS, "hpet.retarget", obj=0, cpu=0, tgt=0)
    named = programmed(2 * MS, 0, 0, 0, 11 * MS)
    for stock, told, level in ((True, pointed, "warn"), (False, named, "error")):
        assert found(replayed([*lost, told, *sleeps, *woken], stock=stock), "hpet-wrong-cpu") == []
        seen = found(replayed([told, *sleeps, *woken], stock=stock), "hpet-wrong-cpu")
        assert seen == [(8 * MS, level, 2, 0, 0)]


def test_with_a_named_owner_the_wrong_cpu_is_an_error() -> None:
    events = [programmed(0, 0, 1, 1, 2 * MS), asleep(1, 10 * US, 2 * MS), *handled(0, 2, 2 * MS)]
    assert found(replayed(events), "hpet-wrong-cpu") == [(2 * MS, "error", 2, 0, 1)]
    events = [programmed(0, 0, 1, 1, 2 * MS), asleep(1, 10 * US, 2 * MS), *handled(0, 1, 2 * MS)]
    assert found(replayed(events), "hpet-wrong-cpu") == []


def test_a_refused_move_is_stale() -> None:
    run = replayed([e(MS, "hpet.retarget", obj=0, tgt=1, val=0, cpu=0, flags=1)])
    assert found(run, "hpet-affinity-stale") == [(MS, "warn", 1, 0, 0)]


def test_retargets_are_an_error_only_where_the_policy_never_moves() -> None:
    events = [e(0, "hpet.retarget", obj=0, tgt=0, cpu=0), e(MS, "hpet.retarget", obj=0, tgt=1, cpu=1)]
    assert [x[1] for x in found(replayed(events), "hpet-retarget")] == ["info"]
    assert [x[1] for x in found(replayed(events, "proposed"), "hpet-retarget")] == ["error"]


def test_a_message_behind_a_vector_in_service() -> None:
    def blocked(vector: int, wait: int) -> list[tuple[int, str, int, int, int]]:
        events = [
            e(0, "isr.begin", cpu=0, obj=vector), e(MS, "hpet.fire", obj=0, cpu=0),
            e(MS + wait, "isr.end", cpu=0, obj=vector), *handled(0, 0, MS + wait),
        ]  # fmt: skip
        return found(replayed(events), "hpet-blocked-by-isr")

    assert blocked(0x61, 4 * MS) == [(MS, "warn", 0, 0, 4 * MS)]
    assert blocked(0x2F, 4 * MS) == []  # a lower class cannot block vector 0x30
    assert blocked(0x61, 50 * US) == []  # a short handler of the hypervisor's own


def test_a_member_whose_owner_left() -> None:
    events = [
        programmed(0, 0, 1, 1, 5 * MS), asleep(1, 10 * US, 5 * MS),
        programmed(MS, 0, 2, 1, 3 * MS, 1), asleep(2, MS + 10 * US, 2 * MS),
        e(2 * MS, "idle.exit", cpu=1, tgt=0),
    ]  # fmt: skip
    assert found(replayed(events), "hpet-orphan-member") == [(2 * MS + 40 * US, "error", 2, 0, 3 * MS)]
    handed_over = [*events, e(2 * MS + 10 * US, "hpet.retarget", obj=0, tgt=2, cpu=1)]
    assert found(replayed(handed_over), "hpet-orphan-member") == []


def test_a_member_whose_channel_was_armed_too_late() -> None:
    events = [
        programmed(0, 0, 1, 1, 5 * MS), asleep(1, 10 * US, 5 * MS),
        programmed(MS, 0, 2, 1, 3 * MS, 1), asleep(2, MS + 10 * US, 2 * MS),
        programmed(2 * MS, 0, 1, 1, 5 * MS, 2),
    ]  # fmt: skip
    assert found(replayed(events), "hpet-orphan-member") == [(2 * MS + 40 * US, "error", 2, 0, 5 * MS)]


def test_an_owner_that_stays_awake() -> None:
    events = [programmed(0, 0, 1, 1, 5 * MS), asleep(1, 10 * US, 5 * MS), e(MS, "idle.exit", cpu=1, tgt=0)]
    assert found(replayed(events, "proposed"), "hpet-owner-not-idle") == [(MS + 100 * US, "warn", 1, 0, -(1 << 63))]
    assert found(replayed(events, "proposed-keep"), "hpet-owner-not-idle") == []
    given_up = [*events, programmed(MS + 10 * US, 0, 1, -1, 0, 3)]
    given_up[-1]["tgt"] = 9
    assert found(replayed(given_up, "proposed"), "hpet-owner-not-idle") == []


def test_a_channel_that_was_a_bad_choice() -> None:
    full = [
        programmed(0, 0, 0, 0, 10 * MS), asleep(0, 5 * US, 10 * MS),
        programmed(10 * US, 1, 1, 1, 1 * MS), asleep(1, 15 * US, MS - 10 * US),
    ]  # fmt: skip
    shared = [programmed(20 * US, 0, 2, 0, 1 * MS, 1), asleep(2, 30 * US, MS)]
    assert found(replayed([*full, *shared]), "hpet-bad-choice") == [(30 * US, "info", 2, 0, 1)]
    well = [programmed(20 * US, 1, 2, 1, 1 * MS, 1), asleep(2, 30 * US, MS)]
    assert found(replayed([*full, *well]), "hpet-bad-choice") == []
    assert found(replayed([*full[2:], *shared]), "hpet-bad-choice") == []  # channel 0 is unknown


def test_a_deadline_that_passed_while_masked() -> None:
    events = [programmed(0, 0, 1, 1, MS), asleep(1, 10 * US, MS), e(MS + 30 * US, "hpet.retarget", obj=0, tgt=2, cpu=1)]
    assert found(replayed(events), "hpet-masked-expiry") == [(MS + 30 * US, "info", 2, 0, 30 * US)]
    events[-1]["t"] = MS - 30 * US
    assert found(replayed(events), "hpet-masked-expiry") == []


def test_what_is_lost_is_unknown() -> None:
    gap = [e(500 * US, "trace.lost", val=400 * US, flags=1), e(600 * US, "trace.lost", val=400 * US)]
    events = [programmed(0, 0, 1, 1, MS), asleep(1, 10 * US, MS), *gap, *handled(0, 2, MS)]
    assert replayed(events).findings == []


# -- recordings: more than one thing at a time -----------------------------------------------------------------------


def lost(t: int, cpu: int, until: int) -> list[dict[str, Any]]:
    return [e(t, "trace.lost", cpu=cpu, val=t, flags=1), e(until, "trace.lost", cpu=cpu, val=t)]


def seen(run: Run, code: str) -> list[str]:
    return [f.observed for f in run.findings if f.code.name == code]


def test_numbers_of_a_recording() -> None:
    nothing = replayed([e(0, "idle.enter", cpu=0, val=0)]).metrics
    assert nothing.pop("sleeps") == 1
    assert set(nothing.values()) == {0}
    events = [
        *AWAKE, e(MS, "hpet.retarget", obj=0, tgt=1, cpu=1), e(2 * MS, "hpet.retarget", obj=0, tgt=2, cpu=1),
        *handled(1, 3, 4 * MS),
        asleep(0, 5 * MS, 5 * MS), e(6 * MS, "idle.exit", cpu=0, obj=0, tgt=1),  # 4 ms early
        asleep(0, 20 * MS, MS), e(21 * MS + 30 * US, "idle.exit", cpu=0, obj=0, tgt=1),
        asleep(0, 30 * MS, MS), e(31 * MS + 10 * US, "idle.exit", cpu=0, obj=0, tgt=2),
        asleep(0, 40 * MS, MS), e(41 * MS + 90 * US, "idle.exit", cpu=0, tgt=0),
    ]  # fmt: skip
    assert replayed(events).metrics == {
        "sleeps": 5, "hpet_irqs": 1, "hpet_retargets": 1, "wakes_by_own_channel": 2, "wakes_by_broadcast": 1,
        "wakes_by_other": 2, "handlers_on_awake_cpu": 1, "early_wakeups": 1, "max_lateness_ns": 30 * US,
        "max_nesting": 1,
    }  # fmt: skip


def test_early_begins_beyond_the_slop_and_the_resolution_of_deadlines() -> None:
    def wake(before: int) -> list[tuple[int, str, int, int, int]]:
        at = 2 * MS - before
        events = [asleep(0, 0, 2 * MS), *handled(0, 0, at - US), e(at, "idle.exit", cpu=0, obj=0, tgt=1)]
        return found(replayed(events), "hpet-early-wakeup")

    assert wake(52 * US) == []
    assert [val for *_, val in wake(52 * US + 1)] == [-(52 * US + 1)]


def test_no_deadline_is_never_late() -> None:
    for fields in ({"val": 0}, {}):
        events = [e(0, "idle.enter", cpu=0, **fields), e(500 * MS, "idle.exit", cpu=0, obj=0, tgt=1)]
        assert replayed(events).findings == []


def test_a_time_out_belongs_to_its_sleep() -> None:
    events = [asleep(0, 0, 2 * MS), e(2 * MS, "idle.exit", cpu=0, tgt=0), asleep(0, 3 * MS, 900 * MS)]
    assert replayed([*events, e(903 * MS, "idle.exit", cpu=0, tgt=0)]).findings == []


def test_the_story_of_a_sleep_and_of_a_move() -> None:
    (f,) = replayed([asleep(0, US, 2 * MS), e(900 * MS, "idle.exit", cpu=0, tgt=0)]).findings
    assert [(v.t, v.seq) for v in f.evidence] == [(US, 0), (US + 2 * MS, None), (US + 402 * MS, None)]
    late = [asleep(0, US, 2 * MS), e(3 * MS, "idle.exit", cpu=0, obj=0, tgt=1)]
    (f,) = replayed(late).findings
    assert [(v.t, v.seq) for v in f.evidence] == [(US, 0), (US + 2 * MS, None), (3 * MS, 1)]
    moved = [
        asleep(2, 0, 9 * MS), e(1 * MS, "hpet.retarget", obj=0, tgt=1, cpu=1), asleep(1, 1 * MS + 5 * US, 8 * MS),
        *handled(0, 2, 2 * MS),
    ]  # fmt: skip
    (f,) = [f for f in replayed(moved).findings if f.code.name == "hpet-wrong-cpu"]
    assert [(v.t, v.seq, v.label) for v in f.evidence[:1]] == [(MS, 1, "channel 0 pointed at cpu 1")]


def test_a_move_is_told_when_the_target_changes() -> None:
    events = [e(t, "hpet.retarget", obj=0, tgt=tgt, cpu=0) for t, tgt in ((0, 0), (MS, 0), (2 * MS, 1))]
    run = replayed(events)
    assert found(run, "hpet-retarget") == [(2 * MS, "info", 0, 0, 0)]
    assert [f.conf for f in run.findings] == [80]


def test_how_sure_a_handler_is() -> None:
    events = [*(e(MS + i, "hpet.handler.begin", obj=i, cpu=0) for i in range(2))]
    assert [f.conf for f in replayed(events).findings] == [100]
    assert [f.conf for f in replayed(events, stock=True).findings] == [50]
    events = [programmed(0, 0, 1, 1, 2 * MS), asleep(1, 10 * US, 2 * MS), *handled(0, 2, 2 * MS)]
    assert [f.conf for f in replayed(events).findings if f.code.name == "hpet-wrong-cpu"] == [100]


def test_a_channel_that_is_known_to_have_no_owner() -> None:
    free = [programmed(0, 0, 1, 1, 5 * MS), asleep(1, 10 * US, 5 * MS), e(2 * MS, "idle.exit", cpu=1, tgt=0), *AWAKE]
    assert found(replayed([*free, *handled(0, 3, 4 * MS)]), "hpet-spurious-irq") == [(4 * MS, "warn", 3, 0, -(1 << 63))]
    released = replayed([*free, *handled(0, 3, 2 * MS + 50 * US)])  # the message may have been on its way
    assert [x[1] for x in found(released, "hpet-spurious-irq")] == ["info"]
    woke = [*free, *handled(0, 3, 4 * MS), asleep(2, 3 * MS, MS), e(4 * MS + 50 * US, "idle.exit", cpu=2, obj=0, tgt=2)]
    assert found(replayed(woke), "hpet-spurious-irq") == []
    never = [{**programmed(0, 0, 0, 0, 0, 3), "cpu": -1, "tgt": -1}, *AWAKE, *handled(0, 3, 4 * MS)]
    assert [x[1] for x in found(replayed(never), "hpet-spurious-irq")] == ["warn"]


def test_what_a_gap_hides_and_what_not() -> None:
    late = [asleep(0, 3 * MS, MS), e(5 * MS, "idle.exit", cpu=0, obj=0, tgt=1)]
    assert len(replayed([*lost(MS, 3, 2 * MS), *late]).findings) == 1
    assert replayed([*lost(MS, 3, 2 * MS)[:1], *late]).findings == []  # the gap has no end yet
    assert replayed([*lost(3 * MS + 10 * US, 3, 4 * MS), *late]).findings == []
    two = [e(MS, "hpet.handler.begin", obj=0, cpu=0), *lost(2 * MS, 0, 3 * MS)]
    assert replayed([*two, e(4 * MS, "hpet.handler.begin", obj=1, cpu=0)]).findings == []
    # The new target sleeps, unless the gap hides that it woke.
    for cpu, wrong in ((1, 0), (3, 1)):
        events = [
            asleep(2, 0, 9 * MS), asleep(1, 2 * MS - 50 * US, 8 * MS), *lost(2 * MS - 20 * US, cpu, 2 * MS - 10 * US),
            e(2 * MS, "hpet.retarget", obj=0, tgt=1, cpu=1), *handled(0, 2, 2 * MS + 500 * US),
        ]  # fmt: skip
        assert len(found(replayed(events), "hpet-wrong-cpu")) == wrong
    # The target may have been moved again in the gap, and the owner's name is forgotten.
    events = [
        asleep(2, 0, 9 * MS), e(1 * MS, "hpet.retarget", obj=0, tgt=1, cpu=1), asleep(1, 1 * MS + 5 * US, 8 * MS),
        *lost(MS + 10 * US, 3, MS + 20 * US), *handled(0, 2, 2 * MS),
    ]  # fmt: skip
    assert found(replayed(events), "hpet-wrong-cpu") == []
    events = [programmed(0, 0, 1, 1, 5 * MS), *lost(10 * US, 2, 20 * US), *AWAKE, *handled(0, 3, 4 * MS)]
    assert [x[1] for x in found(replayed(events), "hpet-spurious-irq")] == ["info"]


def test_what_a_gap_hides_of_comparators() -> None:
    join = [programmed(0, 0, 1, 1, 5 * MS), asleep(1, 10 * US, 5 * MS), programmed(MS, 0, 2, 1, 3 * MS, 1),
            asleep(2, MS + 10 * US, 2 * MS)]  # fmt: skip
    left = [*join, *lost(MS + 500 * US, 3, MS + 600 * US), e(2 * MS, "idle.exit", cpu=1, tgt=0)]
    assert found(replayed(left), "hpet-orphan-member") == []
    again = [*join, *lost(MS + 500 * US, 3, MS + 600 * US), programmed(2 * MS, 0, 1, 1, 5 * MS, 2)]
    assert found(replayed(again), "hpet-orphan-member") == []  # cpu 2 may rely on another channel by now
    full = [
        programmed(0, 0, 0, 0, 10 * MS), asleep(0, 5 * US, 10 * MS),
        programmed(10 * US, 1, 1, 1, 1 * MS), asleep(1, 15 * US, MS - 10 * US),
    ]  # fmt: skip
    shared = [programmed(20 * US, 0, 2, 0, 1 * MS, 1), asleep(2, 30 * US, MS)]
    for t in (16 * US, 22 * US):
        assert found(replayed([*full, *shared, *lost(t, 3, t + US)]), "hpet-bad-choice") == []
    blocked = [e(0, "isr.begin", cpu=0, obj=0x61), e(MS, "hpet.fire", obj=0, cpu=0), *handled(0, 0, 5 * MS)]
    assert len(found(replayed(blocked), "hpet-blocked-by-isr")) == 1
    for t in (500 * US, 2 * MS):
        assert found(replayed([*blocked, *lost(t, 3, t + US)]), "hpet-blocked-by-isr") == []
    linux = [programmed(0, 0, 1, 1, MS), asleep(1, 10 * US, MS), e(MS + 30 * US, "hpet.retarget", obj=0, tgt=2, cpu=1)]
    assert len(found(replayed(linux, fixed_owners=True), "hpet-masked-expiry")) == 1
    assert found(replayed([*linux, *lost(500 * US, 3, 600 * US)], fixed_owners=True), "hpet-masked-expiry") == []


def test_details_of_comparators() -> None:
    own = [programmed(0, 0, 1, 1, 5 * MS), asleep(1, 10 * US, 5 * MS)]
    gone = [*own, e(MS, "idle.exit", cpu=1, tgt=0), programmed(MS + 10 * US, 0, 1, 1, 7 * MS, 3)]
    assert found(replayed(gone, "proposed"), "hpet-owner-not-idle") == []  # disarmed
    join = [*own, programmed(MS, 0, 2, 1, 3 * MS, 1), asleep(2, MS + 10 * US, 2 * MS)]
    assert seen(replayed([*join, e(2 * MS, "idle.exit", cpu=1, tgt=0)]), "hpet-orphan-member") == ["no owner"]
    later = [*join, programmed(2 * MS, 0, 1, 1, 5 * MS, 2)]
    assert seen(replayed(later), "hpet-orphan-member") == ["armed too late for it"]
    unknown = e(2 * MS + 10 * US, "hpet.program", obj=0, cpu=1, tgt=1, val2=2)
    assert found(replayed([*later, unknown]), "hpet-orphan-member") == []
    # The handler serves its members within 100 us and re-arms; one that sleeps on has been forgotten.
    served = [*join, *handled(0, 1, 3 * MS), e(3 * MS + 10 * US, "idle.exit", cpu=1, obj=0, tgt=1)]
    assert found(replayed(served), "hpet-orphan-member") == [(3 * MS + 100 * US, "error", 2, 0, -(1 << 63))]
    asleep_both = [(3 * MS + 100 * US, "error", cpu, 0, -(1 << 63)) for cpu in (1, 2)]
    assert found(replayed([*join, *handled(0, 1, 3 * MS)]), "hpet-orphan-member") == asleep_both
    own_too_late = [*own, programmed(2 * MS, 0, 1, 1, 9 * MS, 2)]
    assert found(replayed(own_too_late), "hpet-orphan-member") == [(2 * MS + 40 * US, "error", 1, 0, 9 * MS)]
    rearmed = [*served, programmed(3 * MS + 50 * US, 0, 2, 2, 3 * MS + 50 * US, 2)]
    assert found(replayed(rearmed), "hpet-orphan-member") == []


def test_a_blocker_counts_while_it_is_in_service_and_for_more_than_50_us() -> None:
    def blocked(ends: int, begins: int) -> int:
        events = [
            e(0, "isr.begin", cpu=0, obj=0x61), e(ends, "isr.end", cpu=0, obj=0x61), e(MS, "hpet.fire", obj=0, cpu=0),
            *handled(0, 0, begins),
        ]  # fmt: skip
        return len(found(replayed(events), "hpet-blocked-by-isr"))

    assert blocked(500 * US, 5 * MS) == 0
    assert blocked(5 * MS, MS + 50 * US) == 0
    assert blocked(5 * MS, MS + 50 * US + 1) == 1


def test_other_choices() -> None:
    """B1 the lowest free one, B2 the latest in time, B3 the soonest: with three channels that are known."""

    def chosen(ends: Sequence[int], owners: Sequence[int], channel: int, deadline: int) -> list[int]:
        events: list[dict[str, Any]] = []
        for c, (end, owner) in enumerate(zip(ends, owners, strict=True)):
            by = owner if owner >= 0 else 9
            events += [programmed(c * US, c, by, by, end), asleep(by, c * US, end)]
            if owner < 0:
                events += [programmed(5 * US + c, c, by, -1, 0, 3), e(5 * US + c, "idle.exit", cpu=by, tgt=0)]
                events[-2]["cpu"] = -1
        events.append(programmed(20 * US, channel, 3, owners[channel], deadline, 1))
        events.append(asleep(3, 30 * US, deadline - 30 * US))
        return [val for *_, val in found(replayed(events, n_channels=3), "hpet-bad-choice")]

    assert chosen((9 * MS, 8 * MS, 7 * MS), (0, 1, 2), 0, MS) == [2]  # all too late: shorten the soonest
    assert chosen((9 * MS, 8 * MS, 7 * MS), (0, 1, 2), 2, MS) == []
    assert chosen((9 * MS, 8 * MS, 9 * MS), (0, 1, 2), 2, 9 * MS) == [0]  # the lowest of the latest
    assert chosen((9 * MS, 8 * MS, 9 * MS), (0, 1, 2), 0, 9 * MS) == []
    assert chosen((9 * MS, 8 * MS, 7 * MS), (0, -1, 2), 0, MS) == [1]  # a free one
    full = [
        programmed(0, 0, 0, 0, 10 * MS), asleep(0, 5 * US, 10 * MS),
        programmed(10 * US, 1, 1, 1, 1 * MS), asleep(1, 15 * US, MS - 10 * US),
    ]  # fmt: skip
    again = [*full, programmed(20 * US, 0, 0, 0, MS, 1), asleep(0, 30 * US, MS)]  # an owner stays on its channel
    assert found(replayed(again), "hpet-bad-choice") == []


# -- predicted: closed runs worked out by hand -----------------------------------------------------------------------


def predicted(
    events: Sequence[dict[str, Any]], policy: str = "current", *, init: Any = None, end: int = 50 * MS, sub: str = "",
    **config: Any,
) -> Run:  # fmt: skip
    values = {"n_channels": 1, "n_cpus": 2, **config}
    return run_machine(
        HPET, policy, [events_from_json(sorted(events, key=lambda x: x["t"]))],
        config=Config(HPET.parameters, values), closed=True, t_end=end, init=init, sub=sub,
    )  # fmt: skip


ALL = ("current", "upstream-2025", "proposed", "proposed-keep")


def told(run: Run) -> list[tuple[int, str, int, int]]:
    return [(f.t, f.code.name, f.cpu, f.val) for f in run.findings]


@pytest.mark.parametrize("policy", ALL)
def test_closed_nothing_happens(policy: str) -> None:
    run = predicted([e(0, "idle.break", cpu=0)], policy)
    assert (run.findings, set(run.metrics.values()), run.effects) == ([], {0}, [])


@pytest.mark.parametrize("policy", ALL)
@pytest.mark.parametrize("n_channels", [0, 1])
def test_closed_one_sleep(policy: str, n_channels: int) -> None:
    """N = 0 is the one legacy channel; a CPU beyond `n_cpus` exists all the same."""
    for cpu in (0, 5):
        run = predicted([asleep(cpu, 0, MS)], policy, n_channels=n_channels)
        assert (told(run), run.effects) == ([], [(MS, cpu)])
        assert {k: v for k, v in run.metrics.items() if v} == {"hpet_irqs": 1, "hpet_reprograms": 1, "max_nesting": 1}


@pytest.mark.parametrize("policy", ALL)
def test_closed_a_deadline_that_has_passed_fires_at_once(policy: str) -> None:
    """A4: clamped to 20 us, forced."""
    run = predicted([e(MS, "idle.enter", cpu=0, val=MS - 100)], policy)
    assert (told(run), run.effects) == ([], [(MS + 20 * US, 0)])
    assert predicted([e(0, "idle.enter", cpu=0, val=1)], policy).effects == [(20 * US, 0)]  # 1 is a time, 0 is none
    join = [asleep(0, 0, 5 * MS), e(MS, "idle.enter", cpu=1, val=MS - 60 * US)]
    assert [t for t, cpu in predicted(join, policy).effects if cpu == 1] == [MS + 20 * US]
    again = [asleep(0, 0, 5 * MS), asleep(1, 10, 6 * MS), e(MS, "idle.break", cpu=0), e(2 * MS, "idle.enter", cpu=0,
             val=2 * MS - 100)]  # fmt: skip
    if policy == "proposed-keep":  # the owner goes idle again on its own channel
        assert predicted(again, policy).effects[0] == (2 * MS + 20 * US, 0)


BLOCKED = e(0, "isr.begin", cpu=0, obj=0xF8)  # of a class that blocks even the direct vector


@pytest.mark.parametrize("policy", ALL)
def test_closed_severity_of_late_and_missed(policy: str) -> None:
    for wait, severity in ((50 * US, ""), (51 * US, "warn"), (500 * US, "warn"), (501 * US, "error")):
        run = predicted([BLOCKED, asleep(0, 1, MS - 1), e(MS + wait, "isr.end", cpu=0, obj=0xF8)], policy)
        late = [(f.t, f.severity, f.val) for f in run.findings if f.code.name == "hpet-late-wakeup"]
        assert late == ([(MS + wait, severity, wait)] if severity else [])
        assert run.metrics["max_lateness_ns"] == wait
    for end, missed in ((400 * MS, []), (401 * MS, [(401 * MS, "hpet-missed-wakeup", 0, 400 * MS)])):
        run = predicted([BLOCKED, asleep(0, 1, MS - 1)], policy, end=end)
        assert [x for x in told(run) if x[1] == "hpet-missed-wakeup"] == missed


def test_closed_the_first_state() -> None:
    """`init.S1`: owner, members, comparator, deadlines."""
    init = {"S1": {"channels": [{"owner": 0, "members": [0], "next": 5 * MS, "deadlines": {"0": 5 * MS}}]}}
    run = predicted([asleep(2, 0, 3 * MS)], init=init, n_channels=2, n_cpus=3)  # A1: channel 0 is used
    assert (told(run), run.effects, run.metrics["hpet_retargets"]) == ([], [(3 * MS, 2), (5 * MS, 0)], 0)
    run = predicted([e(MS, "idle.break", cpu=0)], init=init)  # A8: released, and still armed
    assert told(run) == [(5 * MS, "hpet-spurious-irq", 0, -(1 << 63))]
    run = predicted([asleep(1, 0, 7 * MS)], init=init)  # A3: armed for less already
    assert (run.effects, run.metrics["hpet_reprograms"]) == ([(5 * MS, 0), (7 * MS, 1)], 1)
    both = {"S1": {"channels": [{"owner": 0, "members": [0, 1], "next": 5 * MS,
                                 "deadlines": {"0": 5 * MS, "1": 6 * MS}}]}}  # fmt: skip
    run = predicted([e(MS, "idle.break", cpu=0)], "proposed", init=both, end=MS)  # B6: everybody else is woken
    assert (run.effects, run.metrics["wake_ipis"]) == ([(MS, 1)], 1)


def test_closed_handover_of_the_seed() -> None:
    """The table of S1.10."""
    events = [asleep(0, 0, 1000 * US), asleep(1, 100 * US, 700 * US), e(300 * US, "idle.break", cpu=0),
              asleep(0, 400 * US, 1600 * US), e(500 * US, "idle.break", cpu=1)]  # fmt: skip
    metrics = predicted(events).metrics
    assert (metrics["hpet_retargets"], metrics["retargets_refused"]) == (1, 1)


def test_closed_an_expiry_that_waits_is_handled_where_the_owner_leaves() -> None:
    """A5, A8: cpu 0 hands over a channel whose time has passed; its handler, inline, sends cpu 1 the IPI."""
    blocker = [e(0, "isr.begin", cpu=0, obj=0x61), e(3 * MS, "isr.end", cpu=0, obj=0x61)]
    events = [*blocker, asleep(0, 1, MS - 1), asleep(1, 2, MS + 500 * US), e(2 * MS, "idle.break", cpu=0)]
    run = predicted(events)
    assert (run.effects, run.metrics["wake_ipis"]) == ([(2 * MS, 1)], 1)
    assert (3 * MS, "hpet-spurious-irq", 0, -(1 << 63)) in told(run)  # the message itself was accepted long ago (A6)


def test_closed_a_released_channel_is_unused_again() -> None:
    """A1: from the cursor, the first unused one."""
    events = [asleep(0, 0, 5 * MS), asleep(1, 10, 4 * MS), e(MS, "idle.break", cpu=1), asleep(2, 2 * MS, MS)]
    run = predicted(events, n_channels=2, n_cpus=3)
    assert (run.effects, run.metrics["wake_ipis"]) == ([(3 * MS, 2), (5 * MS, 0)], 0)


def test_closed_deadlines_a_nanosecond_apart() -> None:
    """A4: unforced, a delta of 1 is clamped; only one that is not positive fails."""
    run = predicted([asleep(0, 0, MS), e(0, "idle.enter", cpu=1, val=MS + 1)])
    assert (told(run), run.effects) == ([], [(MS, 0), (MS + 20 * US, 1)])


def test_closed_the_same_interrupt_elsewhere_is_rerun_by_the_first_handler() -> None:
    """A7: cpu 1 only marks it pending; cpu 0 runs again at its end and serves cpu 2."""
    t = MS
    events = [asleep(0, 0, t), asleep(1, 0, t + 20 * US), asleep(2, 0, t + 30 * US)]
    run = predicted(events, n_cpus=3, handler_ns=50 * US)
    assert run.effects == [(t, 0), (t + 20 * US, 1), (t + 50 * US, 2)]
    assert run.metrics["wake_ipis"] == 1
    later = [*events, asleep(0, 2 * MS, MS), asleep(1, 2 * MS, 2 * MS)]  # pending once is rerun once
    run = predicted(later, n_cpus=3, handler_ns=50 * US)
    assert (run.effects[3:], run.metrics["hpet_reprograms"]) == ([(3 * MS, 0), (4 * MS, 1)], 4)


def pointed(index: int, at: int, dest: int = 0) -> dict[str, Any]:
    """A channel whose owner sleeps elsewhere; the message goes to `dest`."""
    owner = index + 1
    return {"owner": owner, "dest": dest, "members": [owner], "next": at, "deadlines": {str(owner): at}}


def test_closed_a_handler_that_is_nested_in_ends_later() -> None:
    """By `handler_ns` for each: 0..2 becomes 0..4, so the one at 3.5 us nests and the one at 10 us does not."""
    times = [MS, MS + US, MS + 3 * US + 500, MS + 10 * US]
    init = {"S1": {"channels": [pointed(i, t) for i, t in enumerate(times)]}}
    run = predicted([e(0, "idle.break", cpu=0)], init=init, n_channels=4, n_cpus=5)
    assert [(t, val) for t, code, _, val in told(run) if code == "hpet-nested-irq"] == [(times[1], 2), (times[2], 2)]


def test_closed_with_eoi_at_the_end_the_next_channel_waits_for_the_handler() -> None:
    """Upstream: two channels of one CPU, a microsecond apart; the second is taken when the first has ended."""
    first = {"owner": 0, "members": [0], "next": MS, "deadlines": {"0": MS}}
    second = {"owner": 0, "members": [1], "next": MS + US, "deadlines": {"1": MS + US}}
    run = predicted([], "upstream-2025", init={"S1": {"channels": [first, second]}}, n_channels=2)
    assert (told(run), run.effects) == ([], [(MS, 0), (MS + 2 * US, 1)])


def test_closed_keep_serves_its_list_when_awake() -> None:
    """B2, B6 keep: at 2 ms the owner wakes and aims at the member's 3 ms, which it serves while awake."""
    run = predicted([asleep(0, 0, 2 * MS), asleep(1, 10, 3 * MS)], "proposed-keep")
    assert (told(run), run.effects) == ([], [(2 * MS, 0), (3 * MS + 10, 1)])
    assert [run.metrics[k] for k in ("hpet_irqs", "wake_ipis", "joins")] == [2, 1, 1]


def test_closed_keep_gives_the_channel_up_when_nobody_is_left() -> None:
    events = [asleep(0, 0, 5 * MS), asleep(1, 10, 8 * MS), e(MS, "idle.break", cpu=0), asleep(0, 2 * MS, 4 * MS),
              e(3 * MS, "idle.break", cpu=1), e(4 * MS, "idle.break", cpu=0)]  # fmt: skip
    run = predicted(events, "proposed-keep")
    assert (told(run), run.metrics["hpet_irqs"]) == ([], 0)


# -- what-if: bodies (0.6) -------------------------------------------------------------------------------------------


def test_closed_a_surplus_wake_is_dropped() -> None:
    """C5: the model still sleeps, and the deadline is the same within the slop."""
    for later in (0, 50 * US):
        events = [asleep(0, 0, 5 * MS), e(MS, "idle.exit", cpu=0), e(MS + US, "idle.enter", cpu=0, val=5 * MS + later)]
        run = predicted(events)
        assert (run.effects, run.metrics["dropped_bodies"], run.metrics["moved_deadlines"]) == ([(5 * MS, 0)], 1, 0)


def test_closed_a_moved_deadline_ends_the_sleep() -> None:
    events = [asleep(0, 0, 5 * MS), e(MS, "idle.exit", cpu=0), asleep(0, MS + 100 * US, 8 * MS)]
    run = predicted(events, "proposed")
    assert (told(run), run.effects) == ([], [(9 * MS + 100 * US, 0)])
    assert (run.metrics["dropped_bodies"], run.metrics["moved_deadlines"]) == (0, 1)
    # The old deadline has no say any more, though it had passed behind a blocker.
    late = [BLOCKED, asleep(0, 1, MS), e(2 * MS, "idle.exit", cpu=0), asleep(0, 2 * MS + US, 8 * MS),
            e(3 * MS, "isr.end", cpu=0, obj=0xF8)]  # fmt: skip
    assert "hpet-missed-wakeup" not in [code for _, code, _, _ in told(predicted(late))]


def test_closed_a_late_wake_pushes_the_next_sleep() -> None:
    """C2, C7: woken at 4 ms instead of 2 ms, the body of 3 ms ends at 7 ms; the deadline stays (C6)."""
    events = [BLOCKED, asleep(0, 1, 2 * MS - 1), e(2 * MS, "idle.exit", cpu=0), e(4 * MS, "isr.end", cpu=0, obj=0xF8),
              e(5 * MS, "idle.enter", cpu=0, val=9 * MS)]  # fmt: skip
    run = predicted(events)
    assert (run.effects, run.metrics["pushed"]) == ([(4 * MS, 0), (9 * MS, 0)], 1)
    seen_asleep = predicted([*events, e(6 * MS, "idle.break", cpu=0), e(8 * MS, "idle.break", cpu=0)])
    assert seen_asleep.effects == [(4 * MS, 0)]  # awake until 7 ms, asleep at 8 ms


def test_closed_a_deadline_that_passed_while_pushed_is_not_late() -> None:
    """What is late is the push: the wake is asked for at 7 ms, and the shortest delta is 20 us."""
    events = [BLOCKED, asleep(0, 1, 2 * MS - 1), e(2 * MS, "idle.exit", cpu=0), e(4 * MS, "isr.end", cpu=0, obj=0xF8),
              e(5 * MS, "idle.enter", cpu=0, val=6 * MS)]  # fmt: skip
    run = predicted(events)
    assert run.effects == [(4 * MS, 0), (7 * MS + 20 * US, 0)]
    assert [t for t, code, _, _ in told(run) if code == "hpet-late-wakeup"] == [4 * MS]


def test_closed_a_sleep_without_a_recorded_end_and_an_end_without_a_sleep() -> None:
    run = predicted([asleep(0, 0, 5 * MS), asleep(0, MS, 4 * MS)])
    assert (run.effects, run.metrics["dropped_bodies"]) == ([(5 * MS, 0)], 0)
    run = predicted([e(MS, "idle.exit", cpu=0), asleep(0, 2 * MS, MS)])
    assert (run.effects, run.metrics["pushed"]) == ([(3 * MS, 0)], 0)


def test_closed_a_body_is_counted_once() -> None:
    events = [asleep(0, 0, MS), e(MS, "idle.exit", cpu=0), asleep(0, MS + 100 * US, 900 * US),
              asleep(0, 2 * MS + 500 * US, MS)]  # fmt: skip
    run = predicted(events)
    assert (run.effects, run.metrics["pushed"]) == ([(MS, 0), (2 * MS, 0), (3 * MS + 500 * US, 0)], 0)


# -- mwait (S1.6): steps at 100 (arm), 200 (check), 300 (flag), 400 (MWAIT); cmpxchg: flag, arm, check, MWAIT ----------


def wake(t: int, *, sample: int = -1, waker: int = 0) -> list[dict[str, Any]]:
    """A wake of cpu 1; the flag is looked at at `sample`, or with the store."""
    store = e(t, "wake.store", cpu=waker, tgt=1)
    return [store] if sample < 0 else [e(sample, "wake.sample", cpu=waker, tgt=1), store]


@pytest.mark.parametrize(
    ("mwait", "events", "ipis"),
    [
        ("separate-flag", wake(50), 1),  # not advertised yet
        ("separate-flag", wake(350), 0),
        ("separate-flag", [*wake(50), *wake(350)], 1),  # the IPI does not keep it from advertising
        ("separate-flag", [*wake(50), *wake(450)], 2),  # but MWAIT returned at once
        ("separate-flag", [*wake(350), *wake(450)], 1),  # seen by the armed MONITOR: MWAIT returned
        ("separate-flag", [*wake(450), *wake(480)], 1),  # woken, awake
        ("separate-flag", [*wake(450, sample=50), *wake(480, waker=2)], 2),  # woken by the IPI
        ("ipi", wake(450), 1),
        ("ipi", [*wake(350), *wake(450)], 2),
        ("cmpxchg", wake(50), 1),
        ("cmpxchg", wake(450), 0),
        ("cmpxchg", [*wake(150), *wake(350)], 1),  # the softirq is seen by the check at 300
        ("cmpxchg", [*wake(350), *wake(450)], 1),  # the armed line
        ("cmpxchg", [*wake(450), *wake(480)], 1),
    ],
)
def test_mwait_who_sends_an_ipi(mwait: str, events: list[dict[str, Any]], ipis: int) -> None:
    run = predicted([asleep(1, 0, MS), *events], sub="mwait", mwait=mwait)
    assert (told(run), run.metrics) == ([], {"wake_ipis": ipis, "unobserved_stores": 0})


def test_mwait_an_ipi_to_a_busy_cpu_is_over_when_it_sleeps() -> None:
    run = predicted([*wake(0), asleep(1, 100, MS), *wake(600)], sub="mwait", mwait="separate-flag")
    assert run.metrics["wake_ipis"] == 1


@pytest.mark.parametrize("mwait", ["separate-flag", "cmpxchg", "ipi"])
@pytest.mark.parametrize(("deadline", "sleeps"), [(1, False), (200, False), (201, True), (0, True)])
def test_mwait_looks_at_the_deadline_once_more(mwait: str, deadline: int, sleeps: bool) -> None:
    """The check is at 200, or at 300 after the flag; no deadline never comes."""
    late = 100 if mwait == "cmpxchg" and deadline > 1 else 0
    events = [e(0, "idle.enter", cpu=1, val=deadline + late), *wake(450)]
    assert predicted(events, sub="mwait", mwait=mwait).metrics["wake_ipis"] == (0 if sleeps and mwait != "ipi" else 1)
    stale = [e(0, "idle.enter", cpu=1, val=deadline + late), e(500, "idle.enter", cpu=1, val=MS), *wake(680)]
    if mwait == "separate-flag":  # who is awake begins anew at 500 and has not advertised at 680
        assert predicted(stale, sub="mwait", mwait=mwait).metrics["wake_ipis"] == (0 if sleeps else 1)


def test_mwait_the_first_state() -> None:
    given = {"flag": 1, "armed": 1, "trig": 0, "sleep": 1, "soft": 0, "lost": 0, "dl": MS, "ep": 1}
    run = predicted([*wake(100), *wake(200)], sub="mwait", mwait="cmpxchg", init={"mwait": {"1": given}})
    assert run.metrics["wake_ipis"] == 1  # the first one wakes it


def test_mwait_a_stale_sample_loses_the_store() -> None:
    """S1.6 (a): sampled in the last sleep, stored before the new MONITOR."""
    events = [asleep(1, 0, MS), e(500, "idle.break", cpu=1), asleep(1, 600, MS), *wake(650, sample=450)]
    run = predicted(events, sub="mwait", mwait="separate-flag")
    assert told(run) == [(1000, "mwait-lost-wakeup", 1, 650)]
    assert told(predicted(events, sub="mwait", mwait="cmpxchg")) == []
