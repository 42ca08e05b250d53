"""Event channels, what-if on a recording: upcalls and handlers take the time they took (S5.7), worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl

from replay.bodies import Lags, Measured
from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import events_from_json
from replay.systems import SYSTEMS
from tests.conformance.test_evtchn_rules import MS, NO_WORK, STRANDED, SYSTEM, Event, bind, codes, mask, send, unmask

Lag = tuple[int, int, int]  # event number, when its upcall began, when it was handled


def retimed(
    *events: Event, lags: Sequence[Lag] = (), policy: str = "current", init: Mapping[str, Any] | None = None,
    end: int = 5 * MS,
) -> Run:  # fmt: skip
    measured = Measured()
    measured.lags = Lags(pl.DataFrame(list(lags), schema=["seq", "due", "done"], orient="row"))
    table = events_from_json([{"t": t, "kind": kind, **fields} for t, kind, fields in events])
    return run_machine(
        SYSTEMS["evtchn"], policy, [table], config=Config(SYSTEM.parameters, {}), closed=True, sub="retimed",
        init=init, t_end=end, from_boot=False, measured=measured,
    )  # fmt: skip


def served(run: Run) -> list[tuple[int, int, int]]:
    return [(t, what >> 32 & 0xFFFF, what & 0xFFFFFFFF) for t, what in run.effects]


def numbers(run: Run, *names: str) -> list[int]:
    return [run.metrics[name] for name in names]


def test_the_upcall_comes_when_the_recorded_one_did() -> None:
    run = retimed(send(100, 5), lags=[(0, 500, 520)])
    assert (served(run), numbers(run, "upcalls", "notifications", "words_scanned", "sends")) == ([(520, 0, 5)], [1] * 4)
    assert served(retimed(send(100, 5))) == [(200, 0, 5)]  # nothing recorded: upcall_ns
    assert served(retimed(send(100, 5), lags=[(0, 100, 100)])) == [(100, 0, 5)]
    assert served(retimed(send(100, 5), lags=[(0, 50, 60)])) == [(200, 0, 5)]  # cannot have been


def test_ports_of_one_scan_come_in_the_recorded_order() -> None:
    run = retimed(send(100, 5), send(100, 9), send(120, 7), lags=[(0, 500, 520), (1, 500, 510), (2, 500, 510)])
    assert (served(run), numbers(run, "upcalls", "spurious_upcalls")) == (
        [(510, 0, 7), (510, 0, 9), (520, 0, 5)], [1, 0],
    )  # fmt: skip


def test_a_port_of_a_later_upcall_is_left_to_it() -> None:
    run = retimed(send(100, 9), send(150, 5), lags=[(0, 900, 910), (1, 500, 520)])
    assert (served(run), numbers(run, "upcalls", "spurious_upcalls")) == ([(520, 0, 5), (910, 0, 9)], [2, 0])
    alone = retimed(send(100, 9), send(150, 5), (160, "evtchn.close", {"obj": 5}), lags=[(0, 900, 910), (1, 500, 520)])
    assert (served(alone), numbers(alone, "spurious_upcalls"), codes(alone)) == ([(910, 0, 9)], [0], [])


def test_unmasked_early_it_still_waits_for_its_upcall() -> None:
    run = retimed(mask(0, 0, 9), send(100, 9), unmask(300, 0, 9), lags=[(1, 900, 910)])
    assert (served(run), numbers(run, "upcalls")) == ([(910, 0, 9)], [2])


def test_a_scan_looks_again_when_something_arrives() -> None:
    same_word = retimed(send(100, 5), send(600, 9), lags=[(0, 500, 900), (1, 700, 710)])
    assert (served(same_word), numbers(same_word, "upcalls", "words_scanned")) == ([(710, 0, 9), (900, 0, 5)], [1, 2])
    other_word = retimed(send(100, 5), send(600, 65), lags=[(0, 500, 900), (1, 700, 910)])
    assert (served(other_word), numbers(other_word, "upcalls", "words_scanned")) == (
        [(900, 0, 5), (910, 0, 65)], [1, 2],
    )  # fmt: skip
    assert numbers(other_word, "stranded", "spurious_upcalls") == [0, 0]


def test_every_upcall_counts_for_itself() -> None:
    run = retimed(send(100, 5), send(1_000, 5), (1_050, "evtchn.close", {"obj": 5}))
    assert (served(run), numbers(run, "upcalls", "spurious_upcalls"), codes(run)) == ([(200, 0, 5)], [2, 1], [NO_WORK])


def test_a_scan_that_has_ended_is_not_taken_up_again() -> None:
    closed = [(600, "evtchn.close", {"obj": 5}), send(610, 9), (620, "evtchn.close", {"obj": 9})]
    run = retimed(send(100, 5), *closed, lags=[(0, 500, 900), (2, 650, 660)])
    assert (served(run), numbers(run, "upcalls", "spurious_upcalls")) == ([], [1, 1])
    assert [f.t for f in run.findings if f.code.name == NO_WORK] == [650]


def test_a_step_that_was_put_off_does_not_come() -> None:
    """Port 5, for which the scan waited until 900, is closed; 11, of which nothing is recorded, comes with the next."""
    events = [send(100, 5), send(110, 9), (600, "evtchn.close", {"obj": 5}), send(610, 7), send(700, 11)]
    run = retimed(*events, lags=[(0, 500, 900), (1, 500, 1_000), (3, 650, 660)])
    assert served(run) == [(660, 0, 7), (1_000, 0, 9), (1_000, 0, 11)]


def test_vcpus_and_domains_wait_for_themselves() -> None:
    def in_dom(dom: int, event: Event) -> Event:
        return (event[0], event[1], {**event[2], "dom": dom})

    events = [in_dom(1, bind(9, 1)), in_dom(1, send(100, 5)), in_dom(2, send(100, 5)), in_dom(1, send(100, 9))]
    run = retimed(*events, lags=[(1, 500, 900), (2, 500, 800), (3, 500, 700)])
    assert [(t, what >> 48, what >> 32 & 0xFFFF) for t, what in run.effects] == [(700, 1, 1), (800, 2, 0), (900, 1, 0)]


def test_what_was_pending_at_the_start_has_no_lag() -> None:
    run = retimed(send(100, 5), init={"S5": {"pending": [3]}}, lags=[(0, 500, 520)])
    assert served(run) == [(500, 0, 3), (520, 0, 5)]
    bound = {"S5": {"notify_vcpu": {"5": 2}, "guest_cpu": {"5": 2}}}
    assert served(retimed(send(100, 5), init=bound, lags=[(0, 500, 520)])) == [(520, 2, 5)]
    quiet = retimed(send(100, 65), init={"S5": {"pending": [3]}})  # nothing is known to be wrong at the start
    assert (STRANDED in codes(quiet), quiet.metrics["pending"]) == (False, 1)


#: Upcalls are off while the recorded handler of port 5 ran (200 to 210).
HELD: list[Event] = [(0, "evtchn.upcall_mask", {"vcpu": 0}), send(100, 5)]
ALLOW: Event = (1_000, "evtchn.upcall_unmask", {"vcpu": 0})
LAG: Lag = (1, 200, 210)


def test_requests_of_a_handler_wait_for_it() -> None:
    run = retimed(*HELD, mask(215, 0, 5), ALLOW, send(2_000, 5), lags=[LAG])
    assert (served(run), numbers(run, "pushed", "pending")) == ([(1_100, 0, 5)], [1, 1])  # masked by its first run
    both = retimed(*HELD, mask(215, 0, 5), unmask(220, 0, 5), ALLOW, send(2_000, 5), lags=[LAG])
    assert (served(both), numbers(both, "pushed", "pending")) == ([(1_100, 0, 5), (2_100, 0, 5)], [2, 0])
    other = retimed(*HELD, mask(215, 1, 5), ALLOW, send(2_000, 5), lags=[LAG])
    assert (served(other), numbers(other, "pushed")) == ([(1_100, 0, 5)], [1])


def test_requests_that_are_not_a_handlers_do_not_wait() -> None:
    before = retimed(*HELD, mask(150, 0, 5), ALLOW, lags=[LAG])  # before the recorded upcall
    assert (served(before), numbers(before, "pushed", "pending")) == ([], [0, 1])
    at_once = retimed(*HELD, mask(200, 0, 5), ALLOW, lags=[LAG])
    assert numbers(at_once, "pushed") == [0]
    unknown = retimed(*HELD, mask(215, 0, 5), ALLOW)  # nothing is recorded of it
    assert (served(unknown), numbers(unknown, "pushed")) == ([], [0])
    nowhere: Event = (215, "evtchn.mask", {"obj": 5})
    assert numbers(retimed(*HELD, nowhere, ALLOW, lags=[LAG]), "pushed") == [0]
    masked = retimed(*HELD, mask(150, 0, 5), unmask(215, 0, 5), ALLOW, lags=[LAG])
    assert (served(masked), numbers(masked, "pushed")) == ([(1_100, 0, 5)], [0])
    moved = retimed(*HELD, (215, "evtchn.close", {"obj": 5}), ALLOW, lags=[LAG])
    assert numbers(moved, "pushed", "closed_pending") == [0, 1]


def test_a_body_runs_where_its_port_is_dispatched() -> None:
    """The handler unmasks port 65 of vCPU 1; under this policy by hypercall where it runs elsewhere."""
    run = retimed(*HELD, mask(215, 3, 5), unmask(220, 3, 5), ALLOW, policy="proposed", lags=[LAG])
    assert numbers(run, "unmask_hypercalls", "pushed") == [0, 2]


def test_what_the_model_does_later_has_no_event_number() -> None:
    held = [*HELD, mask(215, 0, 5), unmask(220, 0, 5), ALLOW, bind(9, 1), send(1_000, 9)]
    run = retimed(*held, send(2_000, 5), (2_010, "evtchn.rebind", {"obj": 5, "tgt": 3}), lags=[LAG, (6, 1_050, 1_060)])
    (f,) = [f for f in run.findings if f.code.name == STRANDED]
    assert [(s.label, s.t, s.seq) for s in f.evidence] == [
        ("unmasked on vcpu0", 1_100, None), ("port 5 pending", 2_000, 7), ("selector bit 0 set on vcpu0", 2_000, 7),
    ]  # fmt: skip


def test_the_time_that_a_port_was_stranded_ends_with_its_selector_bit() -> None:
    moved = [bind(66, 2), send(100, 65), (150, "evtchn.rebind", {"obj": 65, "tgt": 2}), send(20_000, 66)]
    run = retimed(*moved, lags=[(3, 20_100, 20_200)])
    assert served(run) == [(20_100, 2, 65), (20_200, 2, 66)]
    assert numbers(run, "stranded", "stranded_ns") == [1, 19_850]
    second = [send(30_000, 65), (30_010, "evtchn.rebind", {"obj": 65, "tgt": 3})]
    again = retimed(*moved, *second, lags=[(3, 20_100, 20_200)])
    assert [f.t for f in again.findings if f.code.name == STRANDED] == [10_150, 40_010]  # another pending life
