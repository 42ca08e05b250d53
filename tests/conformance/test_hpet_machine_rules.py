"""HPET rules that need a second look: batches, ties, what must not be remembered, hooks of a policy of one's own."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import INF, NIL, Batch, events_from_json
from replay.machine import Machine
from replay.sink import Sink
from replay.systems import SYSTEMS
from replay.systems.hpet_broadcast.machine import HpetBroadcast
from replay.systems.hpet_broadcast.policies import Current, Proposed
from replay.systems.hpet_broadcast.recorded import RecordedBroadcast
from replay.systems.hpet_broadcast.state import Channel, Cpu
from tests.conformance.test_hpet_rules import (
    BLOCKED,
    HPET,
    MS,
    US,
    asleep,
    e,
    found,
    handled,
    lost,
    predicted,
    programmed,
    replayed,
    told,
)  # fmt: skip

ALL = tuple(SYSTEMS["hpet"].policies)


# -- predicted -------------------------------------------------------------------------------------------------------


def in_batches(events: Sequence[dict[str, Any]], cuts: Sequence[int], policy: str = "current", **config: Any) -> Run:
    whole = events_from_json(events)
    edges = [0, *cuts, len(events)]
    return run_machine(
        HPET, policy, [whole.slice(lo, hi - lo) for lo, hi in pairwise(edges)],
        config=Config(HPET.parameters, {"n_channels": 1, "n_cpus": 3, **config}), closed=True, t_end=50 * MS,
    )  # fmt: skip


def test_a_recorded_exit_is_remembered_across_batches() -> None:
    """C5: of each CPU the last exit without an entry after it, whether the entry is in this batch or in the next."""
    events = [
        asleep(0, 0, 5 * MS), asleep(1, 10, 6 * MS), asleep(2, 20, 7 * MS),
        e(MS, "idle.exit", cpu=1), e(MS + 5, "idle.exit", cpu=0), e(MS + 10, "idle.exit", cpu=2),
        e(MS + 100, "idle.enter", cpu=2, val=7 * MS + 20), e(2 * MS, "idle.enter", cpu=0, val=5 * MS),
        e(2 * MS + 1, "idle.enter", cpu=1, val=6 * MS + 10),
    ]  # fmt: skip
    for cuts in ([], [3], [4], [5], [6], [7], [8], [3, 5, 8]):
        run = in_batches(events, cuts)
        assert run.effects == [(5 * MS, 0), (6 * MS + 10, 1), (7 * MS + 20, 2)]
        assert (run.metrics["dropped_bodies"], run.metrics["moved_deadlines"]) == (3, 0)


def test_an_exit_that_was_used_is_not_used_again_in_the_next_batch() -> None:
    events = [asleep(0, 0, MS), e(MS, "idle.exit", cpu=0), asleep(0, MS + 100 * US, 5 * MS), asleep(0, 2 * MS, 9 * MS)]
    for cuts in ([], [2], [3]):
        run = in_batches(events, cuts)
        assert run.effects == [(MS, 0), (6 * MS + 100 * US, 0)]
        assert (run.metrics["dropped_bodies"], run.metrics["moved_deadlines"]) == (0, 0)


@pytest.mark.parametrize("policy", ALL)
def test_events_of_no_known_cpu_belong_to_none(policy: str) -> None:
    """Neither its sleep, nor its wake, nor a vector in service is the last CPU's."""
    nobody = [
        e(0, "isr.begin", cpu=-1, obj=0xF8), e(1, "idle.enter", cpu=-1, val=MS), asleep(1, 2, 2 * MS),
        e(MS, "idle.break", cpu=-1), e(MS + 1, "idle.exit", cpu=-1),
    ]  # fmt: skip
    run = predicted(nobody, policy)
    assert (told(run), run.effects, run.metrics["hpet_irqs"]) == ([], [(2 * MS + 2, 1)], 1)


@pytest.mark.parametrize("policy", ALL)
def test_rows_and_columns_predict_the_same(policy: str) -> None:
    """A batch with an event of no known CPU goes row by row: breaks and vectors in service too."""
    draw = random.Random(policy)
    for _ in range(20):
        out, t = [], 0
        for _ in range(60):
            t += draw.choice((0, 3 * US, 40 * US, 300 * US))
            cpu, vector = draw.randrange(3), draw.choice((0xF8, 0x59))
            kind = draw.choice(("idle.enter", "idle.enter", "idle.exit", "idle.break", "isr.begin", "isr.end"))
            more = {"idle.enter": {"val": t + draw.choice((20 * US, MS))}, "isr.begin": {"obj": vector},
                    "isr.end": {"obj": vector}}.get(kind, {})  # fmt: skip
            out.append(e(t, kind, cpu=cpu, **more))
        columns, rows = in_batches(out, [], policy), in_batches([e(0, "idle.break", cpu=-1), *out], [], policy)
        assert (columns.effects, told(columns), columns.metrics) == (rows.effects, told(rows), rows.metrics)


def test_one_nanosecond_is_a_deadline_on_a_cpu_beyond_the_declared_ones_too() -> None:
    run = predicted([e(0, "idle.enter", cpu=7, val=1), asleep(0, 1, MS)])
    assert run.effects == [(20 * US, 7), (MS + 1, 0)]


def test_a_match_at_zero_comes_before_the_first_event() -> None:
    """0.1: hardware first."""
    init = {"S1": {"channels": [{"owner": 0, "members": [0], "next": 0, "deadlines": {"0": 0}}]}}
    run = predicted([e(0, "idle.break", cpu=0)], init=init)
    assert (told(run), run.effects) == ([], [(0, 0)])


def test_matches_of_one_moment_come_in_the_order_in_which_they_were_written() -> None:
    """0.1: ties are broken by insertion. With enough channels each CPU has its own (A1)."""
    for first, second in ((0, 1), (1, 0)):
        run = predicted([asleep(first, 0, MS), asleep(second, 10, MS - 10)], n_channels=2)
        assert run.effects == [(MS, first), (MS, second)]


@pytest.mark.parametrize("policy", ALL)
def test_a_sleep_that_something_unrelated_ends_long_after_its_deadline_was_missed(policy: str) -> None:
    for late, missed in ((50 * US, []), (50 * US + 1, [(MS + 50 * US + 1, "hpet-missed-wakeup", 0, 50 * US + 1)])):
        run = predicted([BLOCKED, asleep(0, 1, MS - 1), e(MS + late, "idle.break", cpu=0)], policy)
        assert [x for x in told(run) if x[1] != "hpet-blocked-by-isr"] == missed
        assert (run.effects, run.metrics["max_lateness_ns"]) == ([], 0)


def test_a_handler_that_ends_inside_another_one_has_ended() -> None:
    """A6, A7: channel 1 nests in channel 0 on cpu 0 and ends first; its next interrupt, elsewhere, is handled there."""
    first = {"owner": 1, "dest": 0, "members": [1], "next": MS, "deadlines": {"1": MS}}
    second = {"owner": 2, "dest": 0, "members": [2, 3, 4], "next": MS + US,
              "deadlines": {"2": MS + US, "3": 2 * MS, "4": 2 * MS}}  # fmt: skip
    run = predicted([], init={"S1": {"channels": [first, second]}}, n_channels=2, n_cpus=5)
    assert run.effects == [(MS, 1), (MS + US, 2), (2 * MS, 4), (2 * MS, 3)]


def test_keep_aims_again_when_its_owner_goes_idle_beside_one_without_a_deadline() -> None:
    """B6 keep: after the fire nothing is due, and the comparator is armed for nothing; the owner shortens it (A4)."""
    events = [asleep(0, 0, MS), e(10, "idle.enter", cpu=1, val=0), asleep(0, 2 * MS, MS)]
    run = predicted(events, "proposed-keep")
    assert (told(run), run.effects) == ([], [(MS, 0), (3 * MS, 0)])


@pytest.mark.parametrize("base", [Current, Proposed])
def test_a_policy_may_leave_a_sleeper_without_a_channel(base: type[Any]) -> None:
    """It then has none to leave, whatever it had in the sleep before."""
    left: list[tuple[int, int]] = []

    class Sparse(base):  # type: ignore[misc]
        def pick(self, m: HpetBroadcast, cpu: Cpu) -> None:
            if cpu.deadline < INF:
                super().pick(m, cpu)

        def on_exit(self, m: HpetBroadcast, channel: Channel, cpu: Cpu) -> None:
            left.append((m.now, cpu.index))
            super().on_exit(m, channel, cpu)

    forever = {"kind": "idle.enter", "val": 0}
    events = [
        {"t": 0, "cpu": 1, **forever}, e(10, "idle.break", cpu=1), asleep(0, 20, MS), e(MS, "idle.break", cpu=0),
        {"t": 2 * MS, "cpu": 0, **forever}, e(3 * MS, "idle.break", cpu=0),
    ]  # fmt: skip
    run_machine(
        HPET, "mine", [events_from_json(events)], config=Config(HPET.parameters, {"n_channels": 1, "n_cpus": 2}),
        closed=True, policy_class=Sparse,
    )  # fmt: skip
    assert left == [(MS, 0)]


# -- recorded --------------------------------------------------------------------------------------------------------


def test_a_time_out_of_an_earlier_sleep_says_nothing_of_one_without_a_deadline() -> None:
    events = [asleep(0, 0, 2 * MS), e(2 * MS, "idle.exit", cpu=0, tgt=0), e(3 * MS, "idle.enter", cpu=0, val=0)]
    assert replayed(events).findings == []


def test_who_went_to_sleep_first_is_missed_first() -> None:
    for first, second in ((0, 1), (1, 0)):
        run = replayed([asleep(first, 0, 2 * MS), asleep(second, 10, 2 * MS - 10)])
        assert [f.cpu for f in run.findings if f.code.name == "hpet-missed-wakeup"] == [first, second]


def test_a_sleep_that_began_while_records_were_lost_is_not_judged() -> None:
    late = [asleep(0, 3 * MS, MS), e(5 * MS, "idle.exit", cpu=0, obj=0, tgt=1)]
    assert replayed([*lost(2 * MS, 3, 4 * MS), *late]).findings == []
    assert len(replayed([*lost(2 * MS, 3, 3 * MS - 1), *late]).findings) == 1


def test_an_owner_from_before_a_gap_makes_no_choice_a_bad_one() -> None:
    """B3 asks for the owners of all channels; that their handlers ran since does not tell them."""
    full = [
        programmed(0, 0, 0, 0, 10 * MS), asleep(0, 5 * US, 10 * MS),
        programmed(10 * US, 1, 1, 1, 1 * MS), asleep(1, 15 * US, MS - 10 * US),
    ]  # fmt: skip
    fired = [*handled(0, 0, 20 * US), *handled(1, 1, 21 * US)]
    join = [programmed(40 * US, 1, 2, 1, 1 * MS, 1), asleep(2, 50 * US, MS)]
    assert len(found(replayed([*full, *fired, *join]), "hpet-bad-choice")) == 1
    assert found(replayed([*full, *lost(17 * US, 3, 18 * US), *fired, *join]), "hpet-bad-choice") == []


def test_who_joins_while_the_handler_runs_is_looked_at_when_it_is_over() -> None:
    """HANDLING_NS after the handler's begin, however early the channel was written meanwhile."""
    for begin, when in ((0, 100 * US), (60 * US, 160 * US)):
        events = [*handled(0, 1, begin), programmed(70 * US, 0, 2, 1, 9 * MS, 1), asleep(2, 75 * US, MS)]
        expected = [(max(when, 110 * US), "error", 2, 0, 9 * MS)]
        assert found(replayed(events), "hpet-orphan-member") == expected
    left = [*events, e(159 * US, "idle.exit", cpu=2, tgt=0)]
    assert found(replayed(left), "hpet-orphan-member") == []


def test_a_check_that_is_due_at_once_comes_before_the_next_event() -> None:
    """With no time to settle, what is wrong at 0 is said at 0, though it is put right at 1 ns."""
    events = [asleep(2, 0, MS), programmed(0, 0, 2, 1, 9 * MS, 1), e(1, "idle.exit", cpu=2, tgt=0)]
    assert [t for t, *_ in found(replayed(events, min_delta_ns=0), "hpet-orphan-member")] == [0]


def test_a_channel_that_never_had_an_owner_has_been_free_from_the_beginning() -> None:
    events = [
        e(0, "idle.exit", cpu=3, tgt=0), {**programmed(0, 0, 0, 0, 0, 3), "cpu": -1, "tgt": -1}, *handled(0, 3, 1),
    ]  # fmt: skip
    run = replayed(events, exit_path_ns=0)
    assert [x[1] for x in found(run, "hpet-spurious-irq")] == ["warn"]


def test_a_cpu_of_which_nothing_was_seen_may_be_the_one_that_was_served() -> None:
    events = [
        asleep(3, 0, 9 * MS), e(1 * MS, "idle.exit", cpu=3, tgt=0), *handled(0, 3, 4 * MS),
        e(4 * MS + 50 * US, "idle.exit", cpu=1, obj=0, tgt=2),
    ]  # fmt: skip
    assert [(cpu, val) for _, _, cpu, _, val in found(replayed(events, stock=True), "hpet-wrong-cpu")] == [(3, 1)]


def test_what_has_been_judged_is_let_go() -> None:
    """A long recording has many handlers on CPUs that are awake; each is kept until it is judged."""
    events = [asleep(3, 0, 9 * MS), e(1 * MS, "idle.exit", cpu=3, tgt=0)]
    for n in range(5):
        events += handled(0, 3, (4 + 2 * n) * MS)
    machine = RecordedBroadcast(Current(), Config(HPET.parameters), Sink(closed=False))
    machine.feed(Batch.of(events_from_json(events), machine.columns))
    assert (machine.awake_handlers, len(machine.suspects)) == (5, 1)
    machine.finish(20 * MS)
    assert machine.suspects == []


# -- recorded: columns say what rows say -----------------------------------------------------------------------------

APART = (0, 1, 500, 20 * US, 99 * US, 100 * US, 101 * US, 249 * US, 250 * US, 251 * US, 5 * MS, 420 * MS)


def idle_stream(seed: int) -> list[dict[str, Any]]:
    """Sleeps, mostly quiet ones, with handlers around them; now and then a word about owners, or lost records."""
    draw = random.Random(seed)
    out: list[dict[str, Any]] = []
    t = 0
    rare = draw.random() < 0.3
    while len(out) < 60:
        t += draw.choice(APART)
        what, cpu, channel = draw.random(), draw.randrange(3), draw.randrange(2)
        if what < 0.45:
            ahead = draw.choice((20 * US, 100 * US, 5 * MS, 100 * MS))
            out.append(e(t, "idle.enter", cpu=cpu, val=draw.choice((t + ahead, t + ahead, t + ahead, 0, NIL, t - 5))))
        elif what < 0.85:
            t += draw.choice(APART)
            out.append(e(t, "idle.exit", cpu=draw.choice((cpu, out[-1]["cpu"] if out else 0)), obj=channel,
                         tgt=draw.choice((0, 0, 0, 0, 1, 2))))  # fmt: skip
        elif what < 0.95:
            out.append(e(t, "hpet.handler.begin", obj=channel, cpu=cpu))
            out.append(e(t + draw.choice((0, 2 * US)), "hpet.handler.end", obj=channel, cpu=cpu))
            t = out[-1]["t"]
        elif what < 0.98 or not rare:
            refused = int(draw.random() < 0.1)
            out.append(e(t, "hpet.retarget", obj=channel, cpu=cpu, tgt=draw.randrange(3), flags=refused))
        else:
            out.append(draw.choice((programmed(t, channel, cpu, draw.randrange(3), t + MS), lost(t, cpu, t)[1])))
    return out


def in_full(events: Sequence[dict[str, Any]], cuts: Sequence[int], policy: str, **config: Any) -> Any:
    whole = events_from_json(events)
    edges = [0, *cuts, len(events)]
    run = run_machine(
        HPET, policy, [whole.slice(lo, hi - lo) for lo, hi in pairwise(edges)],
        config=Config(HPET.parameters, {"n_channels": 2, "n_cpus": 4, **config}), closed=False, from_boot=False,
        t_end=events[-1]["t"] + 500 * MS,
    )  # fmt: skip
    return run.metrics, sorted(map(repr, run.findings))


def test_a_refused_move_names_an_owner_whose_exit_counts() -> None:
    """A5, A8: cpu 1 owns channel 0 from the refusal until it leaves idle, for whatever reason."""
    events = [
        asleep(2, 0, 9 * MS), e(MS, "idle.exit", cpu=2, tgt=0),
        e(2 * MS, "hpet.retarget", obj=0, tgt=1, val=0, cpu=0, flags=1), asleep(1, 3 * MS, MS),
        e(4 * MS, "idle.exit", cpu=1, tgt=0), *handled(0, 2, 5 * MS),
    ]  # fmt: skip
    assert found(replayed(events), "hpet-wrong-cpu") == []
    assert len(found(replayed([*events[:3], *events[5:]]), "hpet-wrong-cpu")) == 1


def test_owners_that_are_known_from_before_are_released_by_sleeps_of_the_next_batch() -> None:
    events = [
        programmed(0, 0, 1, 1, 9 * MS), asleep(2, 1 * MS, 9 * MS), asleep(1, 2 * MS, 9 * MS),
        e(4 * MS, "idle.exit", cpu=1, tgt=0), *handled(0, 2, 5 * MS),
    ]  # fmt: skip
    wrong = {len(events): 0, 3: 1}
    for shown, count in wrong.items():
        some = events if shown == len(events) else [*events[:3], *events[4:]]
        for cuts in ([], [1]):
            assert sum("hpet-wrong-cpu" in finding for finding in in_full(some, cuts, "current")[1]) == count


def test_a_target_that_sleeps_quietly_sleeps() -> None:
    """A6: the message went to the old target while the new one slept, whatever woke that afterwards."""
    moved = [asleep(2, 0, 9 * MS), e(1 * MS, "hpet.retarget", obj=0, tgt=1, cpu=1), asleep(1, 1 * MS + 5 * US, 8 * MS)]
    for woke, wrong in ((4 * MS, 1), (1_500 * US, 0)):
        events = [*moved, *handled(0, 2, 2 * MS), e(woke, "idle.exit", cpu=1, tgt=0)]
        assert len(found(replayed(events, stock=True), "hpet-wrong-cpu")) == wrong


def test_the_first_nanosecond_is_a_deadline_in_recordings_too() -> None:
    for deadline, missed in ((0, 0), (1, 1)):
        events = [e(0, "idle.enter", cpu=0, val=deadline), e(3 * MS, "idle.exit", cpu=0, tgt=0)]
        assert len(found(replayed(events), "hpet-missed-wakeup")) == missed


def test_events_out_of_the_order_of_their_numbers_are_taken_one_by_one() -> None:
    """`look` goes by the number of an event."""
    table = events_from_json([asleep(3, 0, 9 * MS), e(MS, "idle.exit", cpu=3, tgt=0), *handled(0, 3, 4 * MS)])
    at = table.schema.get_field_index("seq")
    field = table.schema.field(at)
    table = table.set_column(at, field, pa.array(range(len(table), 0, -1), field.type))
    run = run_machine(HPET, "current", [table], config=Config(HPET.parameters), closed=False, from_boot=False)
    assert run.metrics["handlers_on_awake_cpu"] == 1


def test_quiet_sleeps_in_columns_say_what_rows_say(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for seed in range(20):
        events = idle_stream(seed)
        cuts = sorted(random.Random(seed).sample(range(1, len(events)), seed % 4))
        policy = ALL[seed % len(ALL)]
        config = ({}, {"exit_path_ns": 0}, {"miss_ns": 200 * US, "slop_ns": 0}, {"remote_wake_ns": 0})[seed // 4 % 4]
        runs.append((events, cuts, policy, config))
    columns = [in_full(events, cuts, policy, **config) for events, cuts, policy, config in runs]
    monkeypatch.setattr(RecordedBroadcast, "feed", Machine.feed)
    assert columns == [in_full(events, cuts, policy, **config) for events, cuts, policy, config in runs]
