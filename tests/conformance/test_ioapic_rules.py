"""Rules of IOAPIC pins and of the HPET block: each code where it fires, and where its "not when" keeps it silent."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from replay.declare import Config
from replay.driver import Run, run_machine
from replay.events import NONE, events_from_json
from replay.hardware.hpet_block import ticks_ahead
from replay.hardware.ioapic import LOST, MAYBE, NOTHING, SEND, IoApic, Pin, rte_word
from replay.knowledge import UNKNOWN
from replay.systems.apic import SYSTEM, hpet_block_codes, ioapic_codes
from tests.shared import SAMPLES

MS = 1_000_000
PIN = 20
VEC = 113

Event = dict[str, Any]


def ev(t: int, kind: str, **fields: Any) -> Event:
    return {"t": t, "kind": kind, **fields}


def rte(**changes: int) -> dict[str, Any]:
    return {"rte": [{"pin": PIN, "vector": VEC, "level": 1, "dest": 1, "mask": 0, **changes}]}


def replay(
    events: Iterable[Event],
    *,
    init: Mapping[str, Any] | None = None,
    end: int | None = None,
    from_boot: bool = True,
    observed: frozenset[str] | None = None,
    config: Mapping[str, Any] | None = None,
) -> Run:
    table = events_from_json(sorted(events, key=lambda event: event["t"]))
    values = Config(SYSTEM.parameters, config or {})
    return run_machine(
        SYSTEM, "any", [table], config=values, closed=False, init=rte() if init is None else init, t_end=end,
        from_boot=from_boot, observed=observed,
    )  # fmt: skip


def said(run: Run) -> list[tuple[str, str, int]]:
    return [(f.code.name, f.severity, f.t) for f in run.findings if f.code.name.startswith(("ioapic", "hwhpet"))]


def served(t: int, vector: int = VEC, result: int | None = None) -> list[Event]:
    """One delivery on cpu 1: in service for 10 ns, handler over 1 ns before its EOI."""
    returned = {} if result is None else {"val": result}
    return [
        ev(t, "lapic.deliver", cpu=1, obj=vector),
        ev(t + 9, "lapic.exit", cpu=1, obj=vector, **returned),
        ev(t + 10, "lapic.eoi", cpu=1, obj=vector),
    ]


# -- a pin, IO1 to IO5 -------------------------------------------------------------------------------------------


def known_pin(**changes: int) -> Pin:
    pin = Pin(PIN, known=True)
    pin.write(rte_word(VEC, **changes))
    return pin


def test_entry_is_read_as_the_datasheet_lays_it_out() -> None:
    pin = known_pin(level=1, masked=1, dest=0x83, logical=1, delivery=1)
    assert (pin.vector, pin.level, pin.masked, pin.dest, pin.logical, pin.delivery) == (VEC, 1, 1, 0x83, 1, 1)
    assert rte_word(0x59, level=1, masked=1, dest=2, logical=1, delivery=1) == 0x0200_0000_0001_8959
    assert rte_word(0, dest=0xFF, level=0) < 0  # as a signed 64-bit integer


def test_io1_edge() -> None:
    pin = known_pin(level=0)
    assert pin.raise_line() == SEND and pin.remote_irr == 0
    assert pin.raise_line() == NOTHING  # no edge
    pin.lower_line()
    assert pin.raise_line() == SEND
    assert pin.end_of_interrupt() == NOTHING  # an edge interrupt needs no EOI here
    assert known_pin(level=0, masked=1).raise_line() == LOST


def test_io2_level_sends_once_until_its_eoi() -> None:
    pin = known_pin()
    assert pin.raise_line() == SEND and pin.remote_irr == 1 and pin.sent == VEC
    pin.lower_line()
    assert pin.raise_line() == NOTHING
    masked = known_pin(masked=1)
    assert masked.raise_line() == NOTHING and masked.remote_irr == 0
    masked.write(rte_word(VEC))
    assert masked.assess() == SEND


def test_io3_eoi_reaches_all_pins_of_the_vector() -> None:
    ioapic = IoApic(known=True)
    for number, vector in ((1, VEC), (2, VEC), (3, VEC + 1)):
        ioapic.pin(number).write(rte_word(vector))
        ioapic.pin(number).raise_line()
    ioapic.pin(1).lower_line()
    assert [pin.number for pin in ioapic.pins_of(VEC)] == [1, 2]
    assert [pin.end_of_interrupt() for pin in ioapic.pins_of(VEC)] == [NOTHING, SEND]
    assert [ioapic.pin(n).remote_irr for n in (1, 2, 3)] == [0, 1, 1]


def test_io4_a_new_vector_orphans_the_message() -> None:
    pin = known_pin()
    pin.raise_line()
    assert pin.set_vector(VEC) is False
    assert pin.set_vector(VEC + 16) is True and pin.rewritten and pin.sent == VEC
    idle = known_pin()
    assert idle.set_vector(VEC + 16) is False and not idle.rewritten
    edge = known_pin()
    edge.raise_line()
    assert edge.write(rte_word(VEC, level=0)) is True and edge.remote_irr == 0


def test_unknown_pins_stay_unknown_and_learn() -> None:
    pin = Pin(PIN, known=False)
    assert pin.raise_line() == MAYBE and pin.remote_irr == UNKNOWN
    assert pin.end_of_interrupt() == MAYBE
    pin = Pin(PIN, known=False)
    pin.write(rte_word(VEC))
    assert pin.raise_line() == MAYBE
    assert pin.remote_irr == 1 and pin.sent == NONE  # set by this or by an earlier message
    pin.lower_line()
    assert pin.end_of_interrupt() == NOTHING and pin.remote_irr == 0
    pin.forget_line()
    assert (pin.line, pin.remote_irr) == (UNKNOWN, UNKNOWN)
    pin = known_pin()
    pin.raise_line()
    pin.forget_line()
    assert pin.remote_irr == 1 and pin.end_of_interrupt() == MAYBE and pin.remote_irr == UNKNOWN


# -- codes of the IOAPIC -----------------------------------------------------------------------------------------


def test_edge_lost_masked() -> None:
    up = ev(5, "ioapic.line", obj=PIN, val=1)
    assert said(replay([up], init=rte(level=0, mask=1))) == [("ioapic-edge-lost-masked", "info", 5)]
    assert said(replay([up], init=rte(level=0, mask=0))) == []
    assert said(replay([up], init=rte(level=1, mask=1))) == []
    assert said(replay([up], init=rte(level=0, mask=1), config={"ioapic_latches_edges": 1})) == []


def test_rte_change_inflight_by_vector_and_by_trigger() -> None:
    up = ev(0, "ioapic.line", obj=PIN, val=1)
    run = replay([up, ev(5, "ioapic.rte", obj=PIN, val=0x81, val2=rte_word(0x81, level=1, dest=1))])
    assert said(run) == [("ioapic-rte-change-inflight", "warn", 5)]
    assert (run.findings[0].val, run.findings[0].tgt) == (VEC, 0x81)
    assert said(replay([up, ev(5, "ioapic.rte", obj=PIN, val=VEC, val2=rte_word(VEC, level=0, dest=1))])) == [
        ("ioapic-rte-change-inflight", "warn", 5)
    ]
    # Masking in flight is what a driver does while it waits for the EOI.
    masked = rte_word(VEC, level=1, dest=1, masked=1)
    assert said(replay([up, ev(5, "ioapic.rte", obj=PIN, val=VEC, val2=masked)])) == []
    # After the EOI everything may change.
    down = ev(12, "ioapic.line", obj=PIN, val=0)
    assert said(replay([up, *served(10), down, ev(25, "ioapic.rte", obj=PIN, val=0x81)])) == []
    # Unknown at the start.
    assert said(replay([ev(5, "ioapic.rte", obj=PIN, val=0x81)], init={}, from_boot=False)) == []


def test_remote_irr_stuck_by_its_own_time_out() -> None:
    events = [
        ev(0, "ioapic.line", obj=PIN, val=1),
        ev(5, "ioapic.rte", obj=PIN, val=0x81),
        *served(10),
    ]
    run = replay(events, end=2 * MS)
    assert said(run)[1:] == [("ioapic-remote-irr-stuck", "error", 20 + MS)]
    assert run.findings[1].t_first == 20
    assert said(replay(events, end=20 + MS - 1))[1:] == []
    # Told once, also when asked again.
    checks = [ev(30, "ioapic.check"), ev(40, "ioapic.check")]
    assert said(replay([*events, *checks], end=2 * MS))[1:] == [("ioapic-remote-irr-stuck", "error", 30)]
    # The vector still in service, or still requested: it may yet be acknowledged.
    assert said(replay([*events[:3], ev(90, "ioapic.check")], end=100))[1:] == []
    assert said(replay([*events[:2], ev(90, "ioapic.check")], end=100))[1:] == []
    # The driver writes the old vector back in time, and the EOI matches.
    back = ev(15, "ioapic.rte", obj=PIN, val=VEC)
    names = [s[0] for s in said(replay([*events, back, ev(90, "ioapic.check")], end=2 * MS))]
    assert names == ["ioapic-rte-change-inflight", "ioapic-rte-change-inflight"]


def test_remote_irr_stuck_needs_the_message() -> None:
    """Remote IRR was set before the recording: nobody knows where its vector is."""
    events = [*served(10), ev(90, "ioapic.check")]
    assert said(replay([ev(5, "ioapic.rte", obj=PIN, val=0x81), *events], init={}, from_boot=False)) == []
    lost = ev(12, "trace.lost", cpu=0, val=11)
    flight = [ev(0, "ioapic.line", obj=PIN, val=1), ev(5, "ioapic.rte", obj=PIN, val=0x81)]
    assert said(replay([*flight, *events, lost], end=2 * MS))[1:] == []


def test_an_explicit_eoi_at_the_ioapic_is_believed() -> None:
    kinds = frozenset({"ioapic.line", "ioapic.rte", "ioapic.eoi", "lapic.deliver", "lapic.eoi", "lapic.exit"})
    events = [ev(0, "ioapic.line", obj=PIN, val=1), *served(10), ev(30, "ioapic.line", obj=PIN, val=0)]
    assert said(replay([*events, ev(21, "ioapic.eoi", obj=VEC)], observed=kinds, end=2 * MS)) == []
    lost = replay(events, observed=kinds, end=2 * MS)
    assert [s[0] for s in said(lost)] == ["ioapic-remote-irr-stuck"]
    directed = ev(21, "ioapic.eoi", obj=VEC, tgt=PIN)
    assert said(replay([*events, directed], observed=kinds, end=2 * MS)) == []
    elsewhere = ev(21, "ioapic.eoi", obj=VEC, tgt=PIN + 1)
    assert [s[0] for s in said(replay([*events, elsewhere], observed=kinds, end=2 * MS))] == ["ioapic-remote-irr-stuck"]


def test_recorded_remote_irr_wins() -> None:
    events = [ev(0, "ioapic.line", obj=PIN, val=1), ev(5, "ioapic.rte", obj=PIN, val=0x81), *served(10)]
    cleared = ev(30, "ioapic.remote_irr", obj=PIN, val=0)
    assert [s[0] for s in said(replay([*events, cleared], end=2 * MS))] == ["ioapic-rte-change-inflight"]


def test_level_storm() -> None:
    up = ev(0, "ioapic.line", obj=PIN, val=1)
    unwanted = [e for n in range(1, 7) for e in served(n * 20, result=0)]
    assert said(replay([up, *unwanted])) == [("ioapic-level-storm", "warn", 3 * 20 + 10)]
    taken = [e for n in range(1, 7) for e in served(n * 20, result=n % 2)]
    assert said(replay([up, *taken])) == []
    unknown = [e for n in range(1, 7) for e in served(n * 20)]
    assert said(replay([up, *unknown])) == []
    falls = [ev(n * 20 + 5, "ioapic.line", obj=PIN, val=level) for n in range(1, 7) for level in (0, 1)]
    assert said(replay(sorted([up, *unwanted, *falls], key=lambda e: e["t"]))) == []


def test_counts() -> None:
    run = replay([ev(0, "ioapic.line", obj=PIN, val=1), *served(10), *served(30)])
    assert run.metrics["level_redeliveries"] == 2 and run.metrics["ioapic_sends"] == 3


def test_a_guest_has_an_ioapic_of_its_own() -> None:
    events = [
        ev(0, "ioapic.rte", dom=3, obj=PIN, val=VEC, val2=rte_word(VEC, dest=0)),
        ev(1, "ioapic.line", dom=3, obj=PIN, val=1),
        ev(5, "ioapic.rte", dom=3, obj=PIN, val=0x81),
        *served(10),  # a physical cpu
        ev(90, "ioapic.check", dom=3),
    ]
    run = replay(events)
    assert said(run) == [("ioapic-rte-change-inflight", "warn", 5)]
    assert run.findings[0].dom == 3


# -- codes of the HPET block -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "counter", "ahead"),
    [(5000, 4000, 1000), (4010, 4012, -2), (16, 0xFFFF_FFF0, 32), (0xFFFF_FFF0, 16, -32), (7, 7, 0)],
)
def test_ticks_ahead_is_modulo_2_to_the_32(value: int, counter: int, ahead: int) -> None:
    assert ticks_ahead(value, counter) == ahead


def cmp(t: int, value: int, counter: int) -> Event:
    return ev(t, "hwhpet.cmp", obj=0, val=value, val2=counter)


def test_missed_comparator() -> None:
    assert said(replay([cmp(10, 100, 105)], end=50)) == [("hwhpet-missed-comparator", "error", 10)]
    assert said(replay([cmp(10, 100, 100)], end=50)) == []
    # It matched between the write and the read.
    assert said(replay([cmp(10, 100, 105), ev(11, "hwhpet.fire", obj=0)], end=50)) == []
    # Noticed and written again.
    assert said(replay([cmp(10, 100, 105), cmp(20, 200, 110)], end=50)) == [("hwhpet-missed-comparator", "info", 10)]
    assert said(replay([cmp(10, 100, 105), cmp(2 * MS, 200, 110)], end=3 * MS)) == [
        ("hwhpet-missed-comparator", "error", 10)
    ]
    # Not read back, or fires are not recorded.
    assert said(replay([ev(10, "hwhpet.cmp", obj=0, val=100)], end=50)) == []
    assert said(replay([cmp(10, 100, 105)], observed=frozenset({"hwhpet.cmp"}), end=50)) == []


def route(t: int, data: int, address: int, gap: int = 10) -> list[Event]:
    return [ev(t, "hwhpet.route_data", obj=0, val=data), ev(t + gap, "hwhpet.route_addr", obj=0, val=address)]


def test_torn_route() -> None:
    fire = ev(125, "hwhpet.fire", obj=0)
    torn = [*route(0, 65, 1), *route(120, 66, 2), fire]
    assert said(replay(torn)) == [("hwhpet-torn-route", "error", 125)]
    assert said(replay([*route(0, 65, 1), *route(120, 66, 2), fire | {"t": 131}])) == []
    # Only one of the two registers changes.
    assert said(replay([*route(0, 65, 1), *route(120, 66, 1), fire])) == []
    assert said(replay([*route(0, 65, 1), *route(120, 65, 2), fire])) == []
    # Masked meanwhile.
    masked = ev(119, "hwhpet.config", obj=0, val=0, val2=4)
    assert said(replay([*torn, masked])) == []
    # Two updates far apart.
    assert said(replay([*route(0, 65, 1), *route(120, 66, 2, gap=5 * MS), fire])) == []
    # The old route is unknown.
    assert said(replay([*route(120, 66, 2), fire], from_boot=False)) == []
    # Address first tears as well.
    reversed_order = [ev(120, "hwhpet.route_addr", obj=0, val=2), ev(130, "hwhpet.route_data", obj=0, val=66)]
    assert said(replay([*route(0, 65, 1), *reversed_order, fire])) == [("hwhpet-torn-route", "error", 125)]


def test_enable_glitch() -> None:
    enable = ev(100, "hwhpet.config", obj=0, val=4, val2=0)
    fire = ev(105, "hwhpet.fire", obj=0)
    assert said(replay([enable, fire])) == [("hwhpet-enable-glitch", "info", 105)]
    assert said(replay([cmp(50, 1000, 900), enable, fire])) == []  # armed
    assert said(replay([enable, fire | {"t": 100 + 10_001}])) == []
    assert said(replay([ev(100, "hwhpet.config", obj=0, val=4, val2=4), fire])) == []
    assert said(replay([enable, fire], from_boot=False)) == []
    again = [cmp(50, 1000, 900), ev(60, "hwhpet.fire", obj=0), enable, fire]
    assert said(replay(again)) == [("hwhpet-enable-glitch", "info", 105)]


def test_legacy_conflict() -> None:
    legacy = [ev(0, "hwhpet.config", val=3), ev(1, "hwhpet.config", obj=1, val=4, val2=0), cmp(2, 9, 1) | {"obj": 1}]
    pin8 = {"rte": [{"pin": 8, "vector": 0x38, "level": 0, "mask": 0, "dest": 0}]}
    rtc = [ev(50, "ioapic.line", obj=8, val=1), ev(51, "ioapic.line", obj=8, val=0)]
    assert said(replay([*legacy, *rtc], init=pin8)) == [("hwhpet-legacy-conflict", "warn", 50)]
    assert said(replay([*legacy, ev(49, "hwhpet.fire", obj=1), *rtc], init=pin8)) == []
    assert said(replay([*legacy[1:], *rtc], init=pin8)) == []
    assert said(replay([legacy[0], *rtc], init=pin8)) == []


def test_declarations_are_complete() -> None:
    kinds, parameters = set(SYSTEM.kinds), {p.name for p in SYSTEM.parameters}
    ours = (*ioapic_codes.CODES, *hpet_block_codes.CODES)
    assert set(ours) <= set(SYSTEM.codes) and len(ours) == 8
    for code in ours:
        assert code.doc and code.cause and code.source and code.not_when
        assert {k for need in code.needs for k in need.split("|")} <= kinds
        assert set(code.thresholds) <= parameters


# -- lockstep with an emulator's IOAPIC --------------------------------------------------------------------------


def test_pins_agree_with_an_emulator() -> None:
    """The emulator logs every line, register write, EOI and Remote IRR: the model must send and clear where it does.

    It logs "set remote irr" also for a line that rises while Remote IRR is set; those send nothing (ioapic_service).
    """
    words = {
        "set_irq": re.compile(r"ioapic_set_irq vector: (\d+) level: (\d)"),
        "set": re.compile(r"ioapic_set_remote_irr set remote irr for pin (\d+)"),
        "clear": re.compile(r"ioapic_clear_remote_irr clear remote irr for pin (\d+)"),
        "eoi": re.compile(r"ioapic_eoi_broadcast EOI broadcast for vector (\d+)"),
        "write": re.compile(r"ioapic_mem_write .*addr 0x10 regsel: (0x\w+) size \w+ val (0x\w+)"),
    }
    ioapic = IoApic(known=False)
    ioapic.pin(11).write(rte_word(34))  # what samples/README.md says of the excerpt; line and Remote IRR are unknown
    entries = {11: rte_word(34)}
    sent: dict[int, int] = {}
    cleared: dict[int, int] = {}
    checked = 0
    with gzip.open(SAMPLES / "qemu-x86-ioapic.log.gz", "rt", errors="replace") as log:
        lines = log.readlines()
    for line in lines:
        name, found = next(((n, m) for n, w in words.items() if (m := w.search(line))), ("", None))
        if found is None:
            continue
        first = int(found[1], 0)
        if name == "set_irq":
            pin = ioapic.pin(2 if first == 0 else first)
            if found[2] == "0":
                pin.lower_line()
            elif pin.raise_line() == SEND and pin.level == 1:
                sent[pin.number] = sent.get(pin.number, 0) + 1
        elif name == "write" and first >= 0x10:
            number, high = divmod(first - 0x10, 2)
            old, value = entries.get(number, 1 << 16), int(found[2], 16)
            entries[number] = old & 0xFFFFFFFF | value << 32 if high else old & ~0xFFFFFFFF | value
            pin = ioapic.pin(number)
            assert not pin.write(entries[number])  # Linux never rewrites an entry in flight
            if pin.level == 1 and pin.assess() == SEND:
                sent[number] = sent.get(number, 0) + 1
        elif name == "eoi":
            for pin in ioapic.pins_of(first):
                if pin.remote_irr != 0:
                    cleared[pin.number] = cleared.get(pin.number, 0) + 1
                if pin.end_of_interrupt() == SEND:
                    sent[pin.number] = sent.get(pin.number, 0) + 1
        elif name == "clear":
            assert cleared.get(first, 0) == 1
            cleared[first] = 0
            checked += 1
        elif name == "set":
            assert ioapic.pin(first).remote_irr == 1
            sent[first] = 0
            checked += 1
        if checked == 0:
            sent.clear()
        assert max(sent.values(), default=0) <= 1 and max(cleared.values(), default=0) <= 1
    assert checked > 500
    assert not any(sent.values()) and not any(cleared.values())
