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
    assert found(wake(2 * MS + 600 * US, 1), "hpet-late-wakeup")[0][1] == "warn"
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
