"""Event channels, recordings: every code fires where it should and is silent where the spec says "not when"."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from replay.declare import Config, System
from replay.driver import Run, run_machine
from replay.events import events_from_json
from replay.hardware.evtchn_fifo import BUSY, LINKED, MASKED, PENDING
from replay.hardware.evtchn_two_level import (
    SNAP_GUEST_CPU,
    SNAP_MASK,
    SNAP_NOTIFY_VCPU,
    SNAP_PENDING,
    SNAP_SEL,
    SNAP_UPCALL_MASK,
    SNAP_UPCALL_PENDING,
)
from replay.systems import SYSTEMS
from replay.systems.event_channel.codes import CODES
from replay.systems.event_channel.machine import TwoLevelMachine

SYSTEM = SYSTEMS["evtchn"]
US = 1_000
MS = 1_000_000
Event = tuple[int, str, Mapping[str, int]]


#: The machine without its short cuts.
PLAIN = replace(SYSTEM, make=lambda policy, config, sink, sub: TwoLevelMachine(policy, config, sink))


def replay(
    events: Sequence[Event],
    *,
    policy: str = "proposed",
    end: int = 20 * MS,
    sub: str = "",
    known: bool = True,
    closed: bool = False,
    init: Mapping[str, Any] | None = None,
    observed: frozenset[str] | None = None,
    **config: Any,
) -> Run:
    in_order = sorted(events, key=lambda event: event[0])
    table = events_from_json([{"t": t, "kind": kind, **fields} for t, kind, fields in in_order])

    def run(system: System) -> Run:
        return run_machine(
            system, policy, [table], config=Config(SYSTEM.parameters, config), closed=closed, sub=sub, init=init,
            t_end=end, from_boot=known, observed=observed,
        )  # fmt: skip

    done = run(SYSTEM)
    if not sub:  # the short cuts of the loop must not show
        plain = run(PLAIN)
        assert done.findings == plain.findings
        assert done.metrics == plain.metrics
    return done


def codes(run: Run) -> list[str]:
    return [f.code.name for f in run.findings]


def bind(port: int, vcpu: int = 0) -> Event:
    return (0, "evtchn.rebind", {"obj": port, "tgt": vcpu})


def send(t: int, port: int) -> Event:
    return (t, "evtchn.send", {"obj": port})


def scan(t: int, vcpu: int, *ports: int, end: int = 1_000) -> list[Event]:
    """An upcall that handles `ports`."""
    events: list[Event] = [(t, "evtchn.upcall", {"vcpu": vcpu})]
    for port in ports:
        events.append((t + 100, "evtchn.handled", {"vcpu": vcpu, "obj": port}))
        events.append((t + 200, "evtchn.clear", {"vcpu": vcpu, "obj": port}))
    return [*events, (t + end, "evtchn.upcall_end", {"vcpu": vcpu})]


def unmask(t: int, vcpu: int, port: int) -> Event:
    return (t, "evtchn.unmask", {"vcpu": vcpu, "obj": port})


def mask(t: int, vcpu: int, port: int) -> Event:
    return (t, "evtchn.mask", {"vcpu": vcpu, "obj": port})


def snap(t: int, what: int, val: int, index: int = 0, vcpu: int = 0) -> Event:
    return (t, "evtchn.snapshot", {"obj": what, "tgt": index, "val": val, "vcpu": vcpu})


STRANDED = "evtchn-stranded-pending"
WRONG = "evtchn-selector-wrong-vcpu"
NO_WORK = "evtchn-upcall-no-work"
PIGGYBACK = "evtchn-piggyback-delivery"
MISMATCH = "evtchn-binding-mismatch"
NOOP = "evtchn-unmask-hypercall-noop"
DELAY = "evtchn-delivery-delay"

#: The seed's port 65, recorded: masked and pending, unmasked on vCPU 3, vCPU 3 finds nothing.
SEED: list[Event] = [
    bind(65), bind(70), mask(0, 0, 65), send(100, 65), unmask(1_000, 3, 65),
    (1_100, "evtchn.upcall", {"vcpu": 3}), (1_200, "evtchn.upcall_end", {"vcpu": 3}),
]  # fmt: skip


def test_the_seed_as_a_recording() -> None:
    run = replay([*scan(10, 1), *SEED], policy="current", end=MS)
    stranded = [f for f in run.findings if f.code.name == STRANDED]
    assert [(f.t, f.obj, f.vcpu, f.val, f.severity, f.cause) for f in stranded] == [
        (11_000, 65, 0, 1_000, "error", WRONG)
    ]
    assert [step.label for step in stranded[0].evidence] == [
        "port 65 pending", "unmasked on vcpu3", "selector bit 1 set on vcpu3",
    ]  # fmt: skip
    assert [(f.t, f.vcpu, f.val) for f in run.findings if f.code.name == WRONG] == [(1_000, 3, 0)]


def test_stranded_is_not_raised_while_something_is_unknown() -> None:
    assert STRANDED not in codes(replay(SEED[2:], policy="current", known=False))
    run = replay([*SEED[:-1], (1_150, "trace.lost", {"val": 1_120}), SEED[-1]], policy="current")
    assert STRANDED not in codes(run)


def test_stranded_is_not_raised_while_the_mask_bit_is_unknown() -> None:
    events = [(0, "guest.bind_cpu", {"obj": 65, "tgt": 0}), *scan(0, 0), snap(5_000, SNAP_PENDING, 2, index=1)]
    assert STRANDED not in codes(replay(events, known=False))
    assert STRANDED in codes(replay([*events, snap(5_000, SNAP_MASK, 0, index=1)], known=False))


def test_stranded_is_not_raised_on_clear_selector_bits_when_sends_are_missing() -> None:
    """A port is handled that nobody was seen to send to: selector bits may be set unseen too."""
    assert STRANDED not in codes(replay([bind(9, 1), *scan(10, 1, 9), *SEED], policy="current"))


def test_stranded_found_before_a_loss_was_reported_is_tainted() -> None:
    run = replay([*SEED, (30 * US, "trace.lost", {"val": 5 * US})], policy="current")
    stranded = [f for f in run.findings if f.code.name == STRANDED]
    assert [(f.severity, f.tags) for f in stranded] == [("info", ("tainted",))]


def test_stranded_needs_its_time() -> None:
    assert STRANDED not in codes(replay([*SEED, *scan(5 * US, 0, 65)], policy="current"))
    assert STRANDED not in codes(replay(SEED, policy="current", end=10_999))


def test_stranded_not_during_the_scan_of_its_word() -> None:
    long_scan = [bind(65), send(0, 65), *scan(100, 0, 65, end=50 * US)]
    late = (150, "evtchn.send", {"obj": 70})
    assert STRANDED not in codes(replay([*long_scan, bind(70), late]))
    again: Event = (60 * US, "evtchn.rebind", {"obj": 70, "tgt": 0})  # looked at again: the last round may have got it
    assert STRANDED not in codes(replay([*long_scan, bind(70), late, again]))


def test_a_rebind_strands_what_was_selected_before() -> None:
    """E5: the selector bit stays with the old vCPU."""
    run = replay([bind(65), send(100, 65), (200, "evtchn.rebind", {"obj": 65, "tgt": 2}), *scan(300, 0)])
    assert [(f.t, f.vcpu) for f in run.findings if f.code.name == STRANDED] == [(10_200, 2)]


def snapshot_of_stranded(t: int, sel: int = 0) -> list[Event]:
    return [snap(t, SNAP_PENDING, 2, index=1), snap(t, SNAP_MASK, 0, index=1), snap(t, SNAP_SEL, sel)]


def test_snapshots_prove_stranding_without_any_send() -> None:
    start = [(0, "guest.bind_cpu", {"obj": 65, "tgt": 0}), *scan(0, 0), *scan(0, 0, 9), snap(5_000, SNAP_PENDING, 0)]
    hidden = [snap(6_000, SNAP_PENDING, 1 << 9)]  # nobody was seen to send: sends are not recorded
    events = [*start, *hidden, *snapshot_of_stranded(20 * US), *snapshot_of_stranded(25 * US)]
    assert STRANDED not in codes(replay(events, known=False))
    run = replay([*events, *snapshot_of_stranded(40 * US)], known=False)
    assert [(f.t, f.val) for f in run.findings if f.code.name == STRANDED] == [(40 * US, 20 * US)]


def test_snapshots_of_two_pending_lives_prove_nothing() -> None:
    start = [(0, "guest.bind_cpu", {"obj": 65, "tgt": 0}), *scan(0, 0, 9), snap(5_000, SNAP_PENDING, 0)]
    hidden = [snap(6_000, SNAP_PENDING, 1 << 9)]
    between = scan(30 * US, 0, 65)
    events = [*start, *hidden, *snapshot_of_stranded(20 * US), *between, *snapshot_of_stranded(40 * US)]
    assert STRANDED not in codes(replay(events, known=False))
    selected = [*start, *hidden, *snapshot_of_stranded(20 * US), *snapshot_of_stranded(40 * US, sel=2)]
    assert STRANDED not in codes(replay(selected, known=False))


def test_selector_wrong_vcpu_not_around_a_rebind_nor_for_another_port() -> None:
    moved = [bind(65), (50_000, "evtchn.bind_vcpu", {"obj": 65, "tgt": 1}), send(52_000, 65)]
    assert WRONG not in codes(replay(moved, end=55_000))
    assert WRONG in codes(replay([*moved[:2], send(70_000, 65)], end=75_000))
    shared = [bind(65), bind(70, 3), mask(0, 3, 70), send(50, 70), mask(0, 0, 65), send(60, 65),
              snap(70, SNAP_MASK, 2, index=1), unmask(1_000, 3, 65)]  # fmt: skip
    assert WRONG not in codes(replay(shared, policy="current", end=2_000))


def test_upcall_no_work() -> None:
    base = [bind(9), send(0, 9), *scan(100, 0, 9)]
    assert codes(replay([*base, *scan(5_000, 0)])) == [NO_WORK]
    nested = [*base, send(9_000, 9), *scan(9_100, 0, 9, end=5_000), *scan(9_500, 0, end=100)]
    assert NO_WORK not in codes(replay(nested))
    masked = [*base, send(9_000, 9), mask(9_050, 0, 9), *scan(9_100, 0)]
    assert NO_WORK not in codes(replay(masked))


def test_piggyback() -> None:
    rescued = [*SEED, send(700_000, 70), *scan(700_100, 0, 65, 70)]
    run = replay(rescued, policy="current")
    assert [(f.t, f.obj, f.tgt, f.val) for f in run.findings if f.code.name == PIGGYBACK] == [
        (700_200, 65, 70, 700_100)
    ]
    own = [*SEED, mask(600_000, 0, 65), unmask(700_000, 0, 65), *scan(700_100, 0, 65)]
    assert PIGGYBACK not in codes(replay(own, policy="current"))


def test_selector_without_upcall() -> None:
    code = "evtchn-selector-without-upcall"
    words = [snap(1_000, SNAP_SEL, 4), snap(1_000, SNAP_UPCALL_PENDING, 0)]
    quiet = [bind(130), send(500, 130)]
    assert code in codes(replay([*quiet, *words], end=12_000))
    assert code not in codes(replay([*quiet, words[0], snap(1_000, SNAP_UPCALL_PENDING, 1)], end=12_000))
    assert code not in codes(replay([*quiet, *words, *scan(5_000, 0, 130)], end=12_000))
    inside = [*quiet, (600, "evtchn.upcall", {"vcpu": 0}), send(700, 131), *words]
    assert code not in codes(replay(inside, end=12_000))
    before_exchange = [(600, "evtchn.upcall", {"vcpu": 0}), words[0], (1_500, "evtchn.upcall_end", {"vcpu": 0})]
    late = [*quiet, *before_exchange, bind(9), send(3_000, 9), (3_100, "guest.bind_cpu", {"obj": 9, "tgt": 2})]
    assert STRANDED in codes(replay(late))  # the early reading did not shake what is known of sends


def test_upcall_without_selector() -> None:
    code = "evtchn-upcall-without-selector"
    quiet = [bind(130), send(500, 130)]
    words = [snap(1_000, SNAP_SEL, 0), snap(1_000, SNAP_UPCALL_PENDING, 1)]
    assert code in codes(replay([*quiet, *words], end=12_000))
    assert code not in codes(replay([*quiet, *words, *scan(5_000, 0)], end=12_000))


def test_binding_mismatch() -> None:
    one = [bind(65), (1_000, "guest.bind_cpu", {"obj": 65, "tgt": 3})]
    assert [(f.code.name, f.t, f.severity) for f in replay(one, end=MS).findings] == [(MISMATCH, 11_000, "warn")]
    assert codes(replay([*one, (3_000, "evtchn.bind_vcpu", {"obj": 65, "tgt": 3})], end=MS)) == []
    stranded = replay([*one, send(20_000, 65)], end=MS)
    assert [(f.severity, f.cause) for f in stranded.findings if f.code.name in (MISMATCH, STRANDED)] == [
        ("warn", ""), ("error", ""), ("error", MISMATCH),
    ]  # fmt: skip
    seen = [snap(0, SNAP_NOTIFY_VCPU, 0, index=65), snap(0, SNAP_GUEST_CPU, 3, index=65)]
    assert codes(replay(seen, known=False)) == [MISMATCH]


def test_delivery_delay() -> None:
    running: Event = (0, "sched.run", {"vcpu": 0, "cpu": 0})
    base = [running, bind(9), send(100, 9), *scan(200, 0, 9), send(2_000, 9)]
    found = [f for f in replay(base).findings if f.code.name == DELAY]
    assert [(f.t, f.obj, f.val) for f in found] == [(2_000 + 10 * MS, 9, 10 * MS)]
    assert DELAY not in codes(replay([*base, *scan(9 * MS, 0, 9)]))
    assert DELAY not in codes(replay([*base, (3_000, "sched.stop", {"vcpu": 0, "val": 1})]))
    back = [*base, (3_000, "sched.stop", {"vcpu": 0, "val": 1}), (9 * MS, "sched.run", {"vcpu": 0})]
    assert [f.t for f in replay(back).findings if f.code.name == DELAY] == [19 * MS]
    assert DELAY not in codes(replay([e for e in base if e is not running], known=False))


def test_masked_pending_long() -> None:
    code = "evtchn-masked-pending-long"
    base = [bind(9), mask(0, 0, 9), send(1_000, 9)]
    assert [(f.t, f.val) for f in replay(base, end=3_000 * MS).findings if f.code.name == code] == [
        (1_000 * MS + 1_000, 1_000 * MS)
    ]
    assert code not in codes(replay([*base, unmask(900 * MS, 0, 9)], end=3_000 * MS))
    assert code not in codes(replay([bind(9), send(1_000, 9)], end=3_000 * MS))
    unbound = [mask(0, 0, 9), send(1_000, 9), unmask(2_000, 0, 9)]  # how it was unmasked is not known, but it was
    assert code not in codes(replay(unbound, known=False, end=3_000 * MS))


def test_unmask_hypercall_noop() -> None:
    start = [bind(65, 1), bind(70, 1), mask(0, 0, 65), send(100, 65)]
    cleared = [*start, snap(150, SNAP_MASK, 0, index=1), (200, "evtchn.unmask_hypercall", {"vcpu": 0, "obj": 65})]
    run = replay(cleared)
    assert [(f.t, f.severity) for f in run.findings if f.code.name == NOOP] == [(200, "warn"), (10_150, "error")]
    assert [f.cause for f in run.findings if f.code.name == STRANDED] == [NOOP]
    selected = [*start, send(120, 70), *cleared[4:]]
    assert NOOP not in codes(replay(selected))
    proper = [*start, unmask(150, 0, 65), (200, "evtchn.unmask_hypercall", {"vcpu": 0, "obj": 65})]
    run = replay([*proper, *scan(300, 1, 65)])
    assert codes(run) == []
    assert run.metrics["unmask_hypercalls"] == 1


def test_hypercall_that_the_policy_did_not_predict() -> None:
    start = [bind(65, 1), mask(0, 0, 65), send(100, 65)]
    run = replay([*start, (200, "evtchn.unmask_hypercall", {"vcpu": 0, "obj": 65}), *scan(300, 1, 65)])
    assert codes(run) == []
    assert run.metrics["unmask_hypercalls"] == 1


def test_port_range() -> None:
    code = "evtchn-port-range"
    assert codes(replay([send(0, 1024), send(1, 1024)], bits_per_word=32)) == [code]
    assert codes(replay([send(0, 1024), *scan(100, 0, 1024)], bits_per_word=64)) == []
    assert code in codes(replay([send(0, 1 << 17)], sub="fifo", policy="any"))


def test_lost_wakeup_block() -> None:
    code = "evtchn-lost-wakeup-block"
    blocks: Event = (1_000, "sched.stop", {"vcpu": 0, "val": 2})
    base = [bind(9), send(500, 9), blocks]
    assert code in codes(replay(base))
    assert code not in codes(replay([*base, (2_000, "sched.run", {"vcpu": 0})]))
    assert code not in codes(replay([bind(9), blocks, send(2_000, 9)]))
    assert code not in codes(replay([bind(9), (0, "evtchn.upcall_mask", {"vcpu": 0}), send(500, 9), blocks]))
    assert code not in codes(replay([bind(9), send(500, 9), (1_000, "sched.stop", {"vcpu": 0, "val": 1})]))
    assert code not in codes(replay([snap(400, SNAP_UPCALL_PENDING, 1), blocks], known=False))
    words = [snap(400, SNAP_UPCALL_PENDING, 1), snap(400, SNAP_UPCALL_MASK, 0), blocks]
    assert code in codes(replay(words, known=False))


def test_modern_policy_of_an_hvm_guest_takes_the_hypercall_when_pending() -> None:
    events = [bind(9), mask(0, 0, 9), send(100, 9), unmask(200, 0, 9)]
    counts = [
        replay(events, policy=policy, closed=True, hvm=hvm).metrics["unmask_hypercalls"]
        for policy, hvm in (("modern", True), ("modern", False), ("proposed", True), ("current", True))
    ]
    assert counts == [1, 0, 0, 0]


def test_unmask_of_a_port_that_is_not_masked() -> None:
    """E4 acts on a 1 to 0 change only; Linux on HVM therefore masks again before the hypercall."""
    stranded = [bind(65), send(100, 65), (150, "evtchn.rebind", {"obj": 65, "tgt": 2})]
    foreign = replay([*stranded, unmask(5_000, 0, 65)], closed=True)
    assert foreign.metrics["handled"] == 0
    local = replay([*stranded, unmask(5_000, 2, 65)], closed=True, policy="modern", hvm=True)
    assert local.metrics["handled"] == 1


def test_close_forgets_the_pending_event() -> None:
    events = [bind(65, 1), send(0, 65), (50, "evtchn.close", {"obj": 65})]
    run = replay(events, closed=True)
    assert codes(run) == [NO_WORK]  # the selector bit is still there
    assert run.metrics["closed_pending"] == 1
    assert run.metrics["handled"] == 0


def test_masked_upcalls_are_delivered_once_when_allowed() -> None:
    off: Event = (0, "evtchn.upcall_mask", {"vcpu": 0})
    again: Event = (300, "evtchn.upcall_mask", {"vcpu": 0})
    events = [bind(9), off, send(100, 9), send(200, 9), again, (5_000, "evtchn.upcall_unmask", {"vcpu": 0})]
    m = replay(events, closed=True).metrics
    assert (m["handled"], m["coalesced"], m["max_delivery_ns"], m["notifications"]) == (1, 1, 5_000, 1)


def test_upcall_that_arrives_while_masked_does_nothing() -> None:
    """And is not counted (spec B)."""
    off: Event = (50, "evtchn.upcall_mask", {"vcpu": 0})
    m = replay([bind(9), send(0, 9), off, (5_000, "evtchn.upcall_unmask", {"vcpu": 0})], closed=True).metrics
    assert (m["handled"], m["upcalls"], m["max_delivery_ns"], m["notifications"]) == (1, 1, 5_100, 2)


def test_two_domains_do_not_share_ports() -> None:
    events: list[Event] = [(0, "evtchn.rebind", {"obj": 65, "tgt": v, "dom": d}) for d, v in ((1, 0), (2, 1))]
    events += [(100, "evtchn.send", {"obj": 65, "dom": 1}), (200, "evtchn.send", {"obj": 65, "dom": 2})]
    run = replay(events, closed=True)
    assert codes(run) == []
    assert run.metrics["handled"] == 2


def test_conservative_bind_sets_the_port_pending() -> None:
    run = replay([(0, "evtchn.bind", {"obj": 65, "tgt": 2, "val": 2, "flags": 1})], closed=True)
    assert run.metrics["handled"] == 1


def random_events(seed: int, count: int, orderly: float) -> list[Event]:
    """Ports 5, 9 (word 0) and 65, 70 (word 1) on two vCPUs; `orderly`: how much of it is whole deliveries."""
    draw = random.Random(seed)
    out: list[Event] = [bind(port, port % 2) for port in (5, 9, 65, 70)]
    out += [event for v in (0, 1) for event in ((0, "sched.run", {"vcpu": v, "cpu": v}), *scan(0, v))]
    t = 2_000
    while len(out) < count:
        t += draw.choice((0, 100, 3_000, 200 * US))
        port, vcpu = draw.choice((5, 9, 65, 70)), draw.randrange(2)
        if draw.random() < orderly:
            out += [send(t, port), *scan(t + 100, port % 2, port)]
            t += 1_200
            continue
        out += draw.choice(
            (
                [send(t, port)], scan(t, vcpu, port), scan(t, vcpu), [mask(t, vcpu, port)], [unmask(t, vcpu, port)],
                [(t, "evtchn.clear", {"vcpu": vcpu, "obj": port})],
                [(t, "evtchn.handled", {"vcpu": vcpu, "obj": port})],
                [(t, "evtchn.unmask_hypercall", {"vcpu": vcpu, "obj": port})],
                [(t, "sched.stop", {"vcpu": vcpu, "val": draw.choice((1, 2))}), (t + 50, "sched.run", {"vcpu": vcpu})],
                [snap(t, SNAP_SEL, 0, vcpu=vcpu)] if draw.random() < 0.1 else [],
                [(t, "evtchn.rebind", {"obj": port, "tgt": vcpu})] if draw.random() < 0.2 else [],
                [(t, "trace.lost", {"val": t - 10})] if draw.random() < 0.05 else [],
            )
        )  # fmt: skip
    return sorted(out, key=lambda event: event[0])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("orderly", [0.2, 0.8, 0.97])
@pytest.mark.parametrize("known", [True, False])
def test_the_short_cuts_change_nothing(seed: int, orderly: float, known: bool) -> None:
    """`replay` compares; there must be something to compare."""
    run = replay(random_events(seed, 600, orderly), known=known, end=200 * MS)
    assert run.metrics["handled"] > 50


def test_numbers_of_a_recording() -> None:
    base = [bind(9), bind(65), send(1_000, 9), send(1_500, 9), *scan(2_000, 0, 9), send(5_000, 65), *scan(9_000, 0, 65)]
    calm = [*base, send(20_000, 9), *scan(20_100, 0, 9), send(30_000, 65), send(40_000, 9), mask(41_000, 0, 9)]
    m = replay(calm, end=42_000).metrics
    assert {name: m[name] for name in (
        "sends", "coalesced", "handled", "pending", "upcalls", "spurious_upcalls", "max_delivery_ns",
        "max_delivery_word0_ns", "sum_delivery_ns", "unmask_hypercalls", "stranded", "stranded_ns",
    )} == {
        "sends": 6, "coalesced": 1, "handled": 3, "pending": 2, "upcalls": 3, "spurious_upcalls": 0,
        "max_delivery_ns": 4_100, "max_delivery_word0_ns": 1_100, "sum_delivery_ns": 5_400, "unmask_hypercalls": 0,
        "stranded": 0, "stranded_ns": 0,
    }  # fmt: skip


def test_stranded_time_ends_with_the_delivery() -> None:
    run = replay([*SEED, *scan(50_000, 0, 65)], policy="current")
    assert (run.metrics["stranded"], run.metrics["stranded_ns"]) == (1, 49_100)


def test_delivery_delay_looks_at_every_port_in_its_turn() -> None:
    running: Event = (0, "sched.run", {"vcpu": 0, "cpu": 0})
    base = [running, bind(9), bind(70), send(100, 9), *scan(200, 0, 9), send(2_000, 9), send(5 * MS, 70)]
    found = [(f.t, f.obj, f.val) for f in replay(base, end=40 * MS).findings if f.code.name == DELAY]
    assert found == [(2_000 + 10 * MS, 9, 10 * MS), (15 * MS, 70, 10 * MS)]


def test_recorded_hypercall_does_what_the_hypervisor_does() -> None:
    """E4: unmask, then select the bound vCPU if the port was pending."""
    start = [bind(65, 1), *scan(0, 1), mask(10, 0, 65), send(100, 65)]
    call: Event = (5_000, "evtchn.unmask_hypercall", {"vcpu": 0, "obj": 65})
    run = replay([*start, call, *scan(6_000, 1, 65), *scan(9_000, 1)])
    assert [(f.code.name, f.t) for f in run.findings] == [(NO_WORK, 10_000)]
    early = [bind(65, 1), bind(9, 1), mask(10, 0, 65), send(900, 9), *scan(1_000, 1, 9), call, *scan(9_000, 1)]
    assert codes(replay(early)) == [NO_WORK]  # nothing was pending, so nothing was selected


def test_the_predicted_hypercall_is_the_first_one_recorded() -> None:
    start = [bind(65, 1), *scan(0, 1), mask(10, 0, 65), send(100, 65), unmask(4_000, 0, 65)]
    calls: list[Event] = [(t, "evtchn.unmask_hypercall", {"vcpu": 0, "obj": 65}) for t in (5_000, 5_100, 5_200)]
    assert [replay([*start, *calls[:n]], end=5_500).metrics["unmask_hypercalls"] for n in range(4)] == [1, 1, 2, 3]


def test_handled_without_a_recorded_clear_ends_the_pending_life() -> None:
    loop: list[Event] = [(2_000, "evtchn.upcall", {"vcpu": 0}), (2_100, "evtchn.handled", {"vcpu": 0, "obj": 9}),
                         (2_200, "evtchn.upcall_end", {"vcpu": 0})]  # fmt: skip
    assert replay([bind(9), *scan(0, 0), send(1_500, 9), *loop], end=3_000).metrics["pending"] == 0
    seen = [bind(9), send(0, 9), *scan(10, 0, 9), send(1_500, 9), *loop]  # here the clear would be recorded
    assert replay(seen, end=3_000).metrics["pending"] == 1


def test_after_a_gap_the_mask_is_unknown() -> None:
    start: list[Event] = [bind(65), (50, "trace.lost", {"val": 40}), (60, "guest.bind_cpu", {"obj": 65, "tgt": 0})]
    events = [*start, *scan(100, 0), snap(5_000, SNAP_PENDING, 2, index=1)]
    assert STRANDED not in codes(replay(events))
    assert STRANDED in codes(replay([*events, snap(5_000, SNAP_MASK, 0, index=1)]))


def test_a_snapshot_that_agrees_is_counted() -> None:
    m = replay([bind(9), *scan(0, 0), snap(5_000, SNAP_SEL, 0), send(6_000, 9), snap(7_000, SNAP_SEL, 0)]).metrics
    assert (m["samples_agree.selector"], m["samples_disagree.selector"]) == (1, 1)
    assert replay([snap(5_000, SNAP_SEL, 0)], known=False).metrics["samples_agree"] == 0


# -- FIFO ---------------------------------------------------------------------------------------------------------


def word(t: int, port: int, val: int) -> Event:
    return (t, "fifo.word", {"obj": port, "val": val})


def head(t: int, queue: int, port: int, vcpu: int = 0) -> Event:
    return (t, "fifo.head", {"vcpu": vcpu, "tgt": queue, "val": port})


def ready(t: int, bits: int, vcpu: int = 0) -> Event:
    return (t, "fifo.ready", {"vcpu": vcpu, "val": bits})


CHECK: Event = (10, "fifo.check", {})


def fifo(events: Sequence[Event], **config: Any) -> Run:
    return replay(events, policy="any", sub="fifo", **config)


def test_fifo_pending_unlinked() -> None:
    code = "fifo-pending-unlinked"
    assert [(f.t, f.obj) for f in fifo([word(0, 5, PENDING)]).findings] == [(10_000, 5)]
    assert code not in codes(fifo([word(0, 5, PENDING | MASKED)]))
    assert code not in codes(fifo([word(0, 5, PENDING), word(5_000, 5, 0)]))
    handler = [send(0, 5), *scan(100, 0, 5), send(2_000, 5),
               (2_100, "evtchn.upcall", {"vcpu": 0}), (2_200, "evtchn.handled", {"vcpu": 0, "obj": 5})]  # fmt: skip
    assert code not in codes(fifo(handler))
    assert codes(fifo([send(0, 5), *scan(100, 0, 5)], known=False)) == []


def test_fifo_linked_unreachable() -> None:
    code = "fifo-linked-unreachable"
    chain = [word(0, 5, PENDING | LINKED | 6), word(0, 6, PENDING | LINKED), head(0, 7, 5), ready(0, 1 << 7)]
    assert codes(fifo([*chain, CHECK])) == []
    assert codes(fifo([*chain, word(0, 8, PENDING | LINKED), CHECK])) == [code]
    assert codes(fifo([*chain, word(0, 8, PENDING | LINKED), CHECK], known=False)) == []
    assert [f.t for f in fifo([*chain, word(0, 8, PENDING | LINKED)]).findings] == [20_000]


def test_fifo_queue_cycle() -> None:
    code = "fifo-queue-cycle"
    ring = [word(0, 5, PENDING | LINKED | 6), word(0, 6, PENDING | LINKED | 5), head(0, 7, 5), ready(0, 1 << 7)]
    assert [(f.code.name, f.vcpu, f.val) for f in fifo([*ring, CHECK]).findings] == [(code, 0, 7)]
    assert code not in codes(fifo([ring[0], word(0, 6, PENDING | LINKED), *ring[2:], CHECK]))


def test_fifo_ready_lost() -> None:
    code = "fifo-ready-lost"
    chain = [word(0, 5, PENDING | LINKED), head(0, 7, 5)]
    assert codes(fifo([*chain, ready(0, 0), CHECK])) == [code]
    assert code not in codes(fifo([*chain, ready(0, 1 << 7), CHECK]))
    assert code not in codes(fifo([*chain, ready(0, 0), (0, "fifo.consuming", {"vcpu": 0, "val": 1}), CHECK]))
    left = [*chain, ready(0, 0), (0, "fifo.consuming", {"vcpu": 0, "val": 0}), CHECK]
    assert code in codes(fifo(left))
    assert code not in codes(fifo([*chain, ready(0, 0), CHECK], known=False))


def test_fifo_busy_stuck() -> None:
    code = "fifo-busy-stuck"
    assert [(f.code.name, f.t) for f in fifo([word(0, 5, BUSY | MASKED)]).findings] == [(code, 100_000)]
    assert codes(fifo([word(0, 5, BUSY | MASKED), word(90_000, 5, MASKED)])) == []


def urgent(t: int) -> list[Event]:
    return [ready(t, 1 << 0 | 1 << 7)]


def test_fifo_priority_inversion() -> None:
    code = "fifo-priority-inversion"
    base = [send(0, 5), (100, "evtchn.upcall", {"vcpu": 0})]
    handled: Event = (300, "evtchn.handled", {"vcpu": 0, "obj": 5})
    assert code in codes(fifo([*base, ready(200, 1), handled]))
    assert code not in codes(fifo([*base, ready(200, 1 << 9), handled]))
    assert code not in codes(fifo([*base, handled, ready(400, 1)]))


def test_fifo_old_queue() -> None:
    code = "fifo-old-queue-delivery"
    base = [send(0, 5), (50, "evtchn.bind_vcpu", {"obj": 5, "tgt": 1})]
    assert codes(fifo([*base, *scan(100, 0, 5)])) == [code]
    assert codes(fifo([(0, "evtchn.bind_vcpu", {"obj": 5, "tgt": 1}), send(10, 5), *scan(100, 1, 5)])) == []


def test_fifo_lost_queue_change() -> None:
    code = "fifo-lost-queue-change"
    moves: list[Event] = [(t, "evtchn.bind_vcpu", {"obj": 5, "tgt": 1 + t}) for t in range(3)]
    assert code in codes(fifo([*moves, word(10, 5, PENDING)]))
    assert code not in codes(fifo([*moves[:2], word(10, 5, PENDING)]))


def test_fifo_no_control_block() -> None:
    code = "fifo-no-control-block"
    init = {"S5": {"unmapped": [0]}}
    assert codes(fifo([send(0, 5)], init=init, end=5_000)) == [code]
    assert codes(fifo([ready(0, 0), send(10, 5)], init=init, end=5_000)) == []


def test_fifo_delivers_by_priority() -> None:
    init = {"S5": {"priority": {"5": 9, "6": 2}}}
    off: Event = (0, "evtchn.upcall_mask", {"vcpu": 0})
    events = [off, send(10, 5), send(20, 6), send(30, 7), (100, "evtchn.upcall_unmask", {"vcpu": 0})]
    run = fifo(events, init=init, closed=True)
    assert (run.metrics["handled"], run.metrics["upcalls"], codes(run)) == (3, 1, [])
    assert run.metrics["spurious_upcalls"] == 0


def test_fifo_numbers_of_a_recording() -> None:
    run = fifo([send(1_000, 5), *scan(2_000, 0, 5), *scan(4_000, 0), send(6_000, 6), *scan(9_000, 0, 6)])
    m = run.metrics
    assert (m["sends"], m["handled"], m["upcalls"], m["max_delivery_ns"]) == (2, 2, 3, 3_100)


def test_fifo_after_a_gap_nothing_is_known() -> None:
    gap: Event = (20, "trace.lost", {"val": 15})
    chain = [word(0, 5, PENDING | LINKED | 6), word(0, 6, PENDING | LINKED), head(0, 7, 5), ready(0, 1 << 7)]
    lone = word(0, 8, PENDING | LINKED)
    late: Event = (30, "fifo.check", {})
    assert "fifo-linked-unreachable" in codes(fifo([*chain, lone, late]))
    assert codes(fifo([*chain, lone, gap, late])) == []
    assert codes(fifo([gap, *((25, kind, fields) for _, kind, fields in [*chain, lone]), late])) == []
    other = [(25, kind, {**fields, "dom": 1}) for _, kind, fields in [*chain, lone]]
    assert codes(fifo([gap, *other, (30, "fifo.check", {"dom": 1})])) == []
    told = fifo([word(0, 5, PENDING), (30_000, "trace.lost", {"val": 5_000})])
    (f,) = told.findings
    assert (f.code.name, f.severity, f.tags) == ("fifo-pending-unlinked", "info", ("tainted",))


def test_fifo_port_range_is_said_once() -> None:
    run = fifo([send(0, 1 << 17), send(10, 1 << 17), send(20, (1 << 17) + 1), send(30, (1 << 17) - 1)], end=5_000)
    assert [(f.code.name, f.obj, f.val) for f in run.findings] == [
        ("evtchn-port-range", 1 << 17, 1 << 17), ("evtchn-port-range", (1 << 17) + 1, 1 << 17),
    ]  # fmt: skip


def test_fifo_unmask_links() -> None:
    events = [mask(0, 0, 5), send(10, 5), unmask(1_000, 3, 5)]
    run = fifo(events, closed=True)
    assert (run.metrics["handled"], run.metrics["unmask_hypercalls"], codes(run)) == (1, 1, [])


def test_every_code_is_named_in_a_test() -> None:
    text = open(__file__, encoding="utf-8").read()  # noqa: PTH123, SIM115
    assert [code.name for code in CODES if f'"{code.name}"' not in text] == []


@pytest.mark.parametrize("code", CODES, ids=lambda code: code.name)
def test_declared_thresholds_exist(code: Any) -> None:
    names = {parameter.name for parameter in SYSTEM.parameters}
    assert set(code.thresholds) <= names
    assert code.doc.endswith(".")


# -- closed FIFO runs, every number worked out by hand from F1 to F4 ---------------------------------------------------


def on(t: int, kind: str, vcpu: int, **fields: int) -> Event:
    return (t, f"evtchn.{kind}", {"vcpu": vcpu, **fields})


BOUND: list[Event] = [bind(3), bind(5), bind(7, 1)]
HELD: list[Event] = [*BOUND, on(500, "upcall_mask", 0), send(1_000, 3)]


@pytest.mark.parametrize(
    ("events", "expected", "served"),
    [
        # 5 is linked behind 3, the second send of 3 merges; 7 has its own vCPU.
        (
            [*BOUND, send(1_000, 3), send(1_020, 5), send(1_050, 3), send(5_000, 7)],
            {"sends": 4, "coalesced": 1, "handled": 3, "upcalls": 2, "notifications": 2, "max_queue_length": 2,
             "max_delivery_ns": 100},
            [(1_100, 0, 3), (1_100, 0, 5), (5_100, 1, 7)],
        ),
        # Not linked while masked; vCPU 1 clears MASKED, sees PENDING and asks: the queue is still that of vCPU 0.
        (
            [*BOUND, on(500, "mask", 0, obj=3), send(1_000, 3), send(1_500, 3), on(4_000, "unmask", 1, obj=3)],
            {"sends": 2, "coalesced": 1, "handled": 1, "upcalls": 1, "notifications": 1, "unmask_hypercalls": 1,
             "max_queue_length": 1, "max_delivery_ns": 3_100},
            [(4_100, 0, 3)],
        ),
        # Upcalls are off: one notification for all.
        (
            [*HELD, send(2_000, 5), send(2_500, 3), on(9_000, "upcall_unmask", 0)],
            {"sends": 3, "coalesced": 1, "handled": 2, "upcalls": 1, "notifications": 1, "max_queue_length": 2,
             "max_delivery_ns": 8_100},
            [(9_100, 0, 3), (9_100, 0, 5)],
        ),
        # F4: bound elsewhere while linked, it stays on the old queue until it is consumed.
        (
            [*HELD, (2_000, "evtchn.rebind", {"obj": 3, "tgt": 1}), send(3_000, 3), on(9_000, "upcall_unmask", 0),
             send(12_000, 3)],
            {"sends": 3, "coalesced": 1, "handled": 2, "upcalls": 2, "notifications": 2, "max_queue_length": 1,
             "max_delivery_ns": 8_100},
            [(9_100, 0, 3), (12_100, 1, 3)],
        ),
        # F2: masked while linked, it is taken off the queue and not dispatched; the unmask links it again.
        (
            [*HELD, on(1_200, "mask", 0, obj=3), on(3_000, "upcall_unmask", 0), on(9_000, "unmask", 0, obj=3)],
            {"sends": 1, "handled": 1, "upcalls": 2, "spurious_upcalls": 1, "notifications": 2, "unmask_hypercalls": 1,
             "max_queue_length": 1, "max_delivery_ns": 8_100},
            [(9_100, 0, 3)],
        ),
    ],
    ids=["linked", "masked", "upcalls off", "bound elsewhere", "masked while linked"],
)  # fmt: skip
def test_fifo_closed_runs(
    events: Sequence[Event], expected: Mapping[str, int], served: Sequence[tuple[int, int, int]]
) -> None:
    run = replay(events, policy="any", sub="fifo", closed=True, end=MS)
    assert {name: value for name, value in run.metrics.items() if value} == expected
    assert [(t, what >> 32 & 0xFFFF, what & 0xFFFF) for t, what in run.effects] == list(served)
    assert run.findings == []
