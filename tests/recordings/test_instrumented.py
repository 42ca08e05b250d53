"""An instrumented Xen: simulators' notes as its records, through the command line, give what the models say of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from parsers.xentrace.events import ALL_EVENTS
from parsers.xentrace.events_instrumented import EVENTS, GROUPS, POINTS
from replay.binding.xentrace_instrumented import BLIND_WITHOUT_GUEST, RULES, kinds_of
from replay.events import KIND_ID
from tests.recordings import instrumented_writer as xen
from tests.recordings.instrumented_writer import HZ, Writer, write
from tests.shared import ROOT
from tracetool.cli import run as main
from tracetool.instrumented import section
from tracetool.seeded import BUGS, Bug
from tracetool.seeded.check import replayed

GROUPS_OF = {
    "hpet": xen.HPET | xen.IDLE | xen.IRQ,
    "mwait": xen.MWAIT | xen.IDLE,
    "callback": xen.CALLBACK | xen.VLAPIC,
    "vgic": xen.VGIC | xen.GUEST,
    "evtchn": xen.EVTCHN | xen.GUEST,
}
RECORDABLE = [bug for bug in BUGS if bug.name in GROUPS_OF]  # irqflow is a guest's own affair


def ingested(data: bytes, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A dataset made by the command line."""
    recording, dataset = folder / "host.xentrace", folder / "dataset"
    recording.write_bytes(data)
    assert main(["ingest", str(recording), "-o", str(dataset), "--cpu-hz", str(HZ), "--json", "--force"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["notes"] == [] and document["bytes"]["skipped"] == 0
    assert "unknown" not in document["records"]
    return dataset


def run_of(dataset: Path, system: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """`replay --json`; the one run with the coverage beside it."""
    main(["replay", str(dataset), "--json", "--system", system, *more])
    document = json.loads(capsys.readouterr().out)
    assert len(document["runs"]) == 1
    coverage = {c["rule"]: c["state"] for c in document["coverage"]}
    return {**document["runs"][0], "rules": coverage}


def recording_of(bug: Bug, *, bad: bool) -> tuple[Any, bytes]:
    recording = bug.record(bad=bad)
    policy = bug.bad if bad else bug.good
    setup = {}
    if bug.system == "hpet":
        setup = {"hpet": xen.HPET_ALGORITHMS[policy], "channels": 3, "cpus": 8}
    elif bug.system == "vgic":
        setup = {"vgic": xen.VGIC_ALGORITHMS[policy]}
    return recording, write(recording.events, GROUPS_OF[bug.name], **setup)


@pytest.mark.parametrize("bug", RECORDABLE, ids=lambda bug: bug.name)
@pytest.mark.parametrize("bad", [True, False], ids=["bug", "repair"])
def test_findings_are_those_of_the_simulator(
    bug: Bug, bad: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording, data = recording_of(bug, bad=bad)
    own = [
        f"--set={bug.system}.{k}={v}" for k, v in bug.config.items() if k not in ("n_channels", "n_cpus")
    ]
    run = run_of(ingested(data, tmp_path, capsys), bug.system, capsys, *own)
    found = Counter((f["code"], f["t_ns"]) for f in run["findings"] if not f["code"].startswith("model-"))
    expected = Counter((f.code.name, f.t) for f in replayed(bug, recording, bug.bad if bad else bug.good,
                                                             closed=False).findings)  # fmt: skip
    assert found == expected
    for code in bug.exact:
        moments = Counter(t for c, t in found.elements() if c == code)
        assert moments == Counter(recording.truth.get(code, ())), code
    if bad:
        assert set(bug.verify) <= {code for code, _ in found}
        assert run["verdict"] == "findings"
    else:
        assert not [f for f in run["findings"] if f["severity"] != "info"]
    # What the bug is known by is checked, not inferred.
    assert {run["rules"][code] for code in (*bug.verify, *bug.exact)} == {"checked"}


def test_a_stock_recording_of_the_same_is_blind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the new records the same machine shows next to nothing: the difference is theirs."""
    bug = next(b for b in BUGS if b.name == "callback")
    kinds = ("sched.run", "via.vmentry", "via.inject", "via.eoi")
    stock = [e for e in bug.record(bad=True).events if e["kind"] in kinds]
    w = Writer()
    for e in stock:
        w.at, w.cpu = e["t"], e["vcpu"]
        if e["kind"] == "via.inject":
            w.record(0x82004, e["obj"].to_bytes(8, "little"), stamped=False)
        elif e["kind"] == "via.eoi":
            w.record(0x8200D, (0x80B).to_bytes(12, "little"), stamped=False)
        elif e["kind"] == "sched.run":
            w.record(0x21101, (e["dom"] << 16 | e["vcpu"]).to_bytes(4, "little"))
        else:
            w.record(0x81001)
    run = run_of(ingested(w.file(), tmp_path, capsys), "callback", capsys)
    assert run["findings"] == []
    blind = [rule for rule in bug.verify if run["rules"][rule] == "blind"]
    assert blind == list(bug.verify)


def test_a_message_that_waited_is_placed_when_its_comparator_matched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A6: late_ns says how long the message sat in IRR behind a device's vector of the same class."""
    w = Writer()
    w.cpu = 2
    w.setup(xen.HPET | xen.IDLE | xen.IRQ, hpet=1, channels=1, cpus=4)
    events = [
        (1_000, 0x804006, xen.struct.pack("<hHq", 0, 3, 500_000)),  # idle, deadline in 500 us
        (1_100, 0x804001, xen.struct.pack("<HBBhHq", 0, 0, 1, 2, 0, 499_900)),
        (300_000, 0x804007, xen.struct.pack("<BBh", 3, 0x71, -1)),
        (300_010, 0x804020, xen.struct.pack("<BBHi", 0x71, 0, 1, 40)),
        (301_000, 0x804006, xen.struct.pack("<hHq", 0, 3, 200_000)),
        (301_100, 0x804001, xen.struct.pack("<HBBhHq", 0, 0, 1, 2, 0, 199_900)),
        (4_301_000, 0x804022, xen.struct.pack("<BBHi", 0x71, 1, 0, 40)),  # the guest's own EOI, 4 ms later
        (4_301_100, 0x804020, xen.struct.pack("<BBHi", 0x30, 0, 0, 24)),
        (4_301_200, 0x804003, xen.struct.pack("<HhIhH", 0, 24, 3_800_200, 2, 0)),
        (4_301_300, 0x804007, xen.struct.pack("<BBh", 1, 0x30, 0)),
        (4_303_000, 0x804004, xen.struct.pack("<HH", 0, 0)),
        (4_303_010, 0x804022, xen.struct.pack("<BBHi", 0x30, 0, 0, 24)),
    ]
    for t, event, payload in events:
        w.at = t
        w.record(event, payload)
    run = run_of(ingested(w.file(), tmp_path, capsys), "hpet", capsys)
    found = {f["code"]: f for f in run["findings"]}
    blocked = found["hpet-blocked-by-isr"]
    assert (blocked["t_ns"], blocked["tgt"], blocked["val"], blocked["confidence"]) == (501_000, 0x71, 3_800_200, 100)
    assert run["rules"]["hpet-blocked-by-isr"] == "checked"


def test_virtual_ioapic_and_fifo_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """IO4 on a guest's pin: the vector is rewritten in flight, its EOI reaches no pin. FIFO words become events."""
    rte = 1 << 15 | 0x59
    w = Writer()
    w.setup(xen.CALLBACK | xen.VLAPIC | xen.EVTCHN)
    steps = [
        (10, 0x88006, xen.struct.pack("<HHhHQ", 1, 28, 0, 0, rte)),
        (20, 0x88005, xen.struct.pack("<HHBBHI", 1, 28, 1, 0, 1, 12)),
        (30, 0x88007, xen.struct.pack("<HHBBBBI", 1, 28, 0x59, 1, 0, 0, 0)),
        (30, 0x88010, xen.struct.pack("<HHBBBB", 0, 1, 0x59, 1, 0, 0)),
        (40, 0x88011, xen.struct.pack("<HHI", 0, 1, 0x59)),
        (50, 0x88006, xen.struct.pack("<HHhHQ", 1, 28, 0, 0, rte + 1)),
        (60, 0x88012, xen.struct.pack("<HHBBBB", 0, 1, 0x59, 1, 0, 0)),
        (70, 0x88005, xen.struct.pack("<HHBBHI", 1, 28, 0, 0, 0, 12)),
        (80, 0x100F003, xen.struct.pack("<HHIIBBBBBBH", 1, 3, 61, 0xA0000000, 0, 0, 0, 1, 7, 7, 1)),
        (9_000_000, 0x88013, xen.struct.pack("<HHI", 0, 1, 0)),
    ]
    for t, event, payload in steps:
        w.at = t
        w.record(event, payload)
    dataset = ingested(w.file(), tmp_path, capsys)
    run = run_of(dataset, "apic", capsys)
    found = {f["code"]: f for f in run["findings"]}
    assert (found["ioapic-rte-change-inflight"]["t_ns"], found["ioapic-rte-change-inflight"]["dom"]) == (50, 1)
    assert found["ioapic-remote-irr-stuck"]["obj"] == 28
    assert run["rules"]["ioapic-remote-irr-stuck"] == "checked"
    assert main(["query", str(dataset), "SELECT kind, obj, val FROM events WHERE obj = 61", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert {tuple(row.values()) if isinstance(row, dict) else tuple(row) for row in rows} == {
        ("evtchn.send", 61, None), ("fifo.word", 61, 0xA0000000), ("evtchn.notify", 61, None),
    }  # fmt: skip


def test_writes_of_tpr_are_not_certain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vlapic_set_tpr sees only the writes that exit: a guest behind a TPR shadow may have written since."""
    w = Writer()
    w.setup(xen.VLAPIC)
    for t, event, payload in (
        (10, 0x88013, xen.struct.pack("<HHI", 0, 1, 0x50)),
        (20, 0x88010, xen.struct.pack("<HHBBBB", 0, 1, 0x61, 0, 0, 0)),
        (30, 0x88011, xen.struct.pack("<HHI", 0, 1, 0x61)),
        (40, 0x88012, xen.struct.pack("<HHBBBB", 0, 1, 0x61, 0, 0, 0)),
    ):
        w.at = t
        w.record(event, payload)
    dataset = ingested(w.file(), tmp_path, capsys)
    assert main(["query", str(dataset), "SELECT kind, val, conf FROM events WHERE kind LIKE 'lapic.%'", "--json"]) == 0
    rows = [tuple(r.values()) if isinstance(r, dict) else tuple(r) for r in json.loads(capsys.readouterr().out)["rows"]]
    assert sorted(rows) == [
        ("lapic.accept", None, 100), ("lapic.deliver", None, 100), ("lapic.eoi", None, 100), ("lapic.tpr", 0x50, 80),
    ]  # fmt: skip
    observed = json.loads((dataset / "manifest.json").read_text())["observed"]
    assert (observed["lapic.tpr"]["conf"], observed["lapic.deliver"]["conf"]) == (80, 100)


def test_the_guest_part_is_blind_without_marks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bug = next(b for b in BUGS if b.name == "evtchn")
    seen = [e for e in bug.record(bad=True).events if e["kind"] in ("evtchn.send", "evtchn.notify", "evtchn.bind")]
    run = run_of(ingested(write(seen, xen.EVTCHN), tmp_path, capsys), "evtchn", capsys)
    assert run["findings"] == []
    assert {run["rules"][rule] for rule in BLIND_WITHOUT_GUEST} == {"blind"}


@pytest.mark.parametrize(("setup", "state"), [({}, "checked"), ({"mask": 0x0FF2F000}, "checked"),
                                              ({"mask": 0x00021000}, "blind")])  # fmt: skip
def test_compiled_in_is_not_recorded(
    setup: dict[str, int], state: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing happened, or nothing could be seen: the event mask in the set-up record tells them apart."""
    w = Writer()
    w.setup(xen.MWAIT | xen.IDLE, **setup)
    w.at = 1_000_000
    w.record(0x21101, bytes(4))
    dataset = ingested(w.file(), tmp_path, capsys)
    main(["info", str(dataset), "--json"])
    rules = {r["rule"]: r["state"] for r in json.loads(capsys.readouterr().out)["systems"]["hpet"]}
    mask = setup.get("mask", xen.ALL_TRACED)
    expected = state if mask & 0x4000 or state == "blind" else "blind"
    assert rules["mwait-lost-wakeup"] == expected


def test_another_layout_version_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    w = Writer()
    w.setup(xen.HPET, version=2)
    w.record(0x804004, bytes(4))
    dataset = ingested(w.file(), tmp_path, capsys)
    main(["info", str(dataset), "--json"])
    assert "version 2" in json.loads(capsys.readouterr().out)["facts"]["instrumented"]


def test_declarations() -> None:
    """Ids lie in ranges that no released Xen uses, at most seven words, every record but two becomes an event."""
    stock = {i for e in ALL_EVENTS if e not in EVENTS for i in e.ids}
    for point in POINTS:
        (number,) = point.event.ids
        assert number not in stock
        assert number >> 12 in (0x804, 0x88, 0x100F)
        assert number & 0xFFFFF000 == next(g.base for g in GROUPS if g.name == point.group)
        words = point.event.layouts[0].words
        assert words is not None and words <= 7
        assert point.event.stamped == "yes"
    silent = {p.event.name for p in POINTS if not kinds_of(p.event.name)}
    assert silent == {"TRC_INST_SETUP", "TRC_EVTCHN_SEND"}
    assert {rule.kind for rule in RULES} <= set(KIND_ID)


def test_the_page_is_up_to_date() -> None:
    page = (ROOT / "docs" / "instrumented-xen.md").read_text(encoding="utf-8")
    assert section() in page, "run python -m tracetool.instrumented docs/instrumented-xen.md"
