"""Event channels: what a what-if takes from a recording (spec 0.6, S5.7), worked out by hand."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import pytest

from replay.bodies import Measured
from replay.declare import Config
from replay.events import NONE, events_from_json
from replay.hardware.evtchn_two_level import SNAP_MASK, SNAP_PENDING
from replay.systems import SYSTEMS
from replay.systems.event_channel.calibration import (
    EARLY,
    FEW,
    doubt,
    effect,
    effect_fields,
    effect_object,
    effect_words,
    measure,
)

CONFIG = Config(SYSTEMS["evtchn"].parameters, {"disagree_percent": 5})
COLUMNS = ["kind", "t_ns", "dom", "vcpu", "obj", "tgt", "val", "flags", "seq"]
Event = Mapping[str, Any]


def event(t: int, kind: str, dom: int = 1, **fields: int) -> Event:
    return {"t": t, "kind": kind, "dom": dom, **fields}


def send(t: int, port: int, dom: int = 1) -> Event:
    return event(t, "evtchn.send", dom, obj=port)


def upcall(t: int, *ports: int, vcpu: int = 0, dom: int = 1) -> list[Event]:
    handled = [event(t + 10, "evtchn.handled", dom, vcpu=vcpu, obj=port) for port in ports]
    return [event(t, "evtchn.upcall", dom, vcpu=vcpu), *handled]


def snap(t: int, what: int, index: int, val: int) -> Event:
    return event(t, "evtchn.snapshot", obj=what, tgt=index, val=val)


def measured(events: Sequence[Event], bits: int = 64) -> tuple[Measured, list[tuple[tuple[str, ...], int | None]]]:
    """What is measured, and what was asked of the recording."""
    table = pl.from_arrow(events_from_json(list(events)).select(COLUMNS))
    assert isinstance(table, pl.DataFrame)
    frame = table.with_columns(pl.col("kind").cast(pl.String))
    asked: list[tuple[tuple[str, ...], int | None]] = []

    def read(kinds: Sequence[str], limit: int | None = None) -> pl.DataFrame:
        asked.append((tuple(kinds), limit))
        some = frame.filter(pl.col("kind").is_in(list(kinds)))
        return (some if limit is None else some.head(limit)).with_columns(pl.col("seq").set_sorted())

    config = Config(SYSTEMS["evtchn"].parameters, {"bits_per_word": bits})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return measure(read, config, frozenset(str(e["kind"]) for e in events)), asked


def test_doubt_needs_samples_and_differences() -> None:
    def said(agree: int, differ: int) -> str:
        return doubt({"samples_agree": agree, "samples_disagree": differ}, CONFIG)

    assert FEW == 100
    assert (said(89, 10), said(89, 11) != "") == ("", True)  # 99 and 100 samples
    assert (said(95, 5), said(94, 6) != "") == ("", True)  # 5 % are allowed
    assert (said(950, 50), said(949, 51) != "") == ("", True)
    assert said(90, 10).startswith("10 of 100 sampled words are not as the model has them")
    assert doubt({}, CONFIG) == ""
    assert doubt({"samples_agree": 10}, Config(SYSTEMS["evtchn"].parameters, {"disagree_percent": 0})) == ""
    none = Config(SYSTEMS["evtchn"].parameters, {"disagree_percent": 0})
    assert (doubt({"samples_agree": 100}, none), doubt({"samples_disagree": 99}, none)) == ("", "")


def test_effects_in_words() -> None:
    what = effect({"dom": 3, "vcpu": 0x1234, "obj": 0x10005})
    assert what == 3 << 48 | 0x1234 << 32 | 0x10005
    assert effect_fields(what) == {"dom": 3, "vcpu": 0x1234, "obj": 0x10005}
    assert effect_object(what) == 3 << 32 | 0x10005
    assert effect_words(what) == "port 65541 handled on vcpu 4660 of dom 3"
    assert effect_words(effect({"dom": NONE, "vcpu": 1, "obj": 5})) == "port 5 handled on vcpu 1"
    assert effect_words(effect({"dom": 0, "vcpu": 0xFFFF, "obj": 0xFFFFFFFF})) == (
        "port 4294967295 handled on vcpu 65535 of dom 0"
    )
    assert effect_fields(effect({"dom": 0, "vcpu": 0xFFFF, "obj": 0xFFFFFFFF})) == {
        "dom": 0, "vcpu": 0xFFFF, "obj": 0xFFFFFFFF,
    }  # fmt: skip
    assert effect_object(effect({"dom": 0, "vcpu": 0xFFFF, "obj": 0xFFFFFFFF})) == 0xFFFFFFFF


def test_without_sends_a_recording_is_blind() -> None:
    result, asked = measured(upcall(10, 5))
    assert (result.blind.partition(":")[0], asked) == ("evtchn.send is not recorded", [])
    none, _ = _without_sends()
    assert none.blind.startswith("no evtchn.send in the recording")
    assert measured([send(10, 5), *upcall(20, 5)])[0].blind == ""


def _without_sends() -> tuple[Measured, None]:
    """A recorder that shows sends, and a recording that has none."""
    table = pl.from_arrow(events_from_json([dict(e) for e in upcall(10, 5)]).select(COLUMNS))
    assert isinstance(table, pl.DataFrame)
    frame = table.with_columns(pl.col("kind").cast(pl.String))

    def read(kinds: Sequence[str], limit: int | None = None) -> pl.DataFrame:
        return frame

    return measure(read, CONFIG, frozenset({"evtchn.send"})), None


def test_lags_from_send_to_upcall() -> None:
    pairs = [send(100, 5), *upcall(400, 5), send(1_000, 6), *upcall(1_500, 6), send(2_000, 7), *upcall(2_700, 7)]
    result, _ = measured([*pairs, send(3_000, 8)])
    assert (result.values["upcall_ns"], result.reach_ns) == (500, 710)  # the median to the upcall; at most to the end
    at_once, _ = measured([*upcall(100), send(105, 5), event(110, "evtchn.handled", vcpu=0, obj=5)])
    assert (at_once.values["upcall_ns"], at_once.reach_ns) == (0, 5)  # sent during the scan that handled it
    assert "upcall_ns" not in measured([send(100, 5)])[0].values
    other, _ = measured([send(100, 5, dom=2), *upcall(400, 5), send(100, 6), *upcall(400, 7)])
    assert "upcall_ns" not in other.values
    no_entry, _ = measured([send(100, 5), event(350, "evtchn.handled", vcpu=0, obj=5)])
    assert no_entry.values["upcall_ns"] == 250  # the upcall is not recorded: the dispatch


def test_ports_are_bound_where_they_are_handled_first() -> None:
    rebind = event(500, "evtchn.rebind", obj=6, tgt=1)
    result, _ = measured([send(1, 5), *upcall(10, 5, vcpu=2), *upcall(600, 6, vcpu=1), rebind, *upcall(900, 5, vcpu=3)])
    bound = {"5": 2, "6": 1}
    assert result.init["S5"] == {"dom": 1, "notify_vcpu": bound, "guest_cpu": bound, "masked": []}
    first = [send(1, 5), rebind, *upcall(600, 6, vcpu=3), *upcall(700, 5, vcpu=2)]
    assert measured(first)[0].init["S5"]["notify_vcpu"] == {"5": 2}
    most = [send(1, 5, dom=4), *upcall(10, 5, dom=4), *upcall(20, 6, 7, vcpu=1)]
    assert measured(most)[0].init["S5"]["dom"] == 1
    assert measured([send(1, 5), send(2, 5)])[0].init == {}


def test_masked_is_what_the_first_sample_of_a_word_says() -> None:
    start = [send(1, port) for port in (0, 5, 64, 65, 70, 128)] + upcall(10, 5)
    samples = [
        snap(20, SNAP_PENDING, 1, 0xFF), snap(30, SNAP_MASK, 1, 1 << 6 | 1 << 9), snap(40, SNAP_MASK, 1, 0xFF),
        snap(40, SNAP_MASK, 0, 1 << 5),
    ]  # fmt: skip
    result, asked = measured([*start, *samples])
    assert result.init["S5"]["masked"] == [5, 70]
    assert asked[-1] == (("evtchn.snapshot",), 4096) == (("evtchn.snapshot",), EARLY)
    assert measured([*start, *samples], bits=32)[0].init["S5"]["masked"] == [5]
    assert measured([*start, *samples[:3]])[0].init["S5"]["masked"] == [70]


@pytest.mark.parametrize("missing", ["obj", "vcpu"])
def test_dispatches_without_a_port_or_vcpu_are_left_out(missing: str) -> None:
    events = [send(1, 5), *upcall(10, 5), {k: v for k, v in upcall(5, 6)[1].items() if k != missing}]
    result, _ = measured(sorted(events, key=lambda e: int(e["t"])))
    assert result.init["S5"]["notify_vcpu"] == {"5": 0}
