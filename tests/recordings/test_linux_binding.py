"""Linux recordings to canonical events and findings, against counts taken independently of the readers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from parsers.open import open_recording
from replay.binding.linux_probes import check_event_map
from replay.declare import UsageError
from tests.shared import SAMPLES, shared_path
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Settings, choose, replay_dataset
from tracetool.store import Dataset


def stored(path: Path, folder: Path, **options: Any) -> Dataset:
    ingest([str(path)], folder / "d", IngestOptions(**options))
    return Dataset.open(folder / "d")


def kinds(dataset: Dataset) -> Counter[str]:
    frame = dataset.events().group_by(pl.col("kind").cast(pl.String)).len().collect()
    return Counter(dict(frame.iter_rows()))


def replayed(dataset: Dataset, *policies: str, systems: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
    runs = replay_dataset(dataset, Settings(tuple(choose(p) for p in policies), systems))
    return {f"{run['system']} {run['policy']}": run for run in runs}


def codes(run: dict[str, Any]) -> Counter[str]:
    return Counter(f["code"] for f in run["findings"])


def states(run: dict[str, Any]) -> dict[str, str]:
    return {c["rule"]: c["state"] for c in run["coverage"]}


# -- HPET ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "handlers", "sleeps"), [("plain-raw.trace.txt.zst", 2392, 2851), ("plain-load.dat.zst", 11621, 14342)]
)
def test_hpet_channels_of_plain_linux(tmp_path: Path, name: str, handlers: int, sleeps: int) -> None:
    """The one hpet4 interrupt on CPU 2 and the one hpet5 on CPU 3 of interrupts-end.txt are in neither recording: all
    irq_handler_entry records of hpetN are on the channel's own CPU, so nothing is on the wrong one."""
    dataset = stored(shared_path(f"recordings/linux-6.1-hpet-msi/{name}"), tmp_path)
    assert dataset.manifest["facts"]["hpet_owners"] == {"hpet3": 0, "hpet4": 1, "hpet5": 2, "hpet6": 3}
    run = replayed(dataset, "current", systems=("hpet",))["hpet current"]
    assert run["metrics"]["hpet_irqs"] == handlers
    assert run["metrics"]["sleeps"] == sleeps
    assert "hpet-wrong-cpu" not in codes(run)
    assert all(f["severity"] != "error" for f in run["findings"])
    # Deadlines and wakes belong together: next to nobody wakes before the earliest timer by its own channel.
    assert run["metrics"]["early_wakeups"] < run["metrics"]["wakes_by_own_channel"] / 1000


def test_hpet_interrupt_elsewhere_is_found(tmp_path: Path) -> None:
    """The same recording with one handler's record moved to another CPU."""
    raw = open_recording(shared_path("recordings/linux-6.1-hpet-msi/plain-raw.trace.txt.zst")).stream.read()
    lines = raw.decode("latin-1").splitlines(keepends=True)
    index = [i for i, line in enumerate(lines) if "irq_handler_entry" in line and "name=hpet4" in line][300]
    assert "[001]" in lines[index]
    lines[index] = lines[index].replace("[001]", "[002]")
    path = tmp_path / "moved.txt"
    path.write_bytes("".join(lines).encode("latin-1"))
    run = replayed(stored(path, tmp_path), "current", systems=("hpet",))["hpet current"]
    found = [f for f in run["findings"] if f["code"] == "hpet-wrong-cpu"]
    assert [(f["cpu"], f["obj"], f["val"], f["offset"]) for f in found] == [(2, 4, 1, index + 1)]


def test_the_frequency_is_derived_from_timers(tmp_path: Path) -> None:
    """The boot log of the same machine says 2596.155 MHz."""
    dataset = stored(shared_path("recordings/xen-2l/dom0-raw.trace.txt.zst"), tmp_path)
    assert abs(dataset.manifest["clock"]["hz"] / 2_596_155_000 - 1) < 2e-6
    assert dataset.manifest["clock"]["unit"] == "ns"


# -- event channels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flows", "clears", "scans"),
    [("dom0-raw.trace.txt.zst", 3464, 3465, 2900), ("dom0-light.dat.zst", 9428, 9433, 7725)],
)
def test_two_level_state_from_samples(tmp_path: Path, name: str, flows: int, clears: int, scans: int) -> None:
    dataset = stored(shared_path(f"recordings/xen-2l/{name}"), tmp_path)
    seen = kinds(dataset)
    assert seen["evtchn.handled"] == seen["irqdesc.entry"] == flows  # percpu + edge + fasteoi flow handlers
    assert seen["evtchn.clear"] == clears
    assert seen["evtchn.upcall"] == seen["evtchn.upcall_end"] == scans
    assert abs(seen["evtchn.send"] - clears) <= 1  # one pending life for each clear
    runs = replayed(dataset, "current", systems=("evtchn", "irqflow"))
    run = runs["evtchn modern"]
    metrics = run["metrics"]
    assert metrics["samples_disagree"] < metrics["samples_agree"] / 400
    assert metrics.get("samples_disagree.mask", 0) == 0
    assert {f["severity"] for f in run["findings"]} <= {"info"}
    assert {f["severity"] for f in runs["irqflow edge"]["findings"]} <= {"info"}
    assert states(run)["fifo-ready-lost"] == "blind"


def test_unmask_of_2005_would_set_selectors_of_wrong_vcpus(tmp_path: Path) -> None:
    """Ports 44 and 56 were pending when another vCPU unmasked them: the local unmask sets that vCPU's selector bit.

    Both are in word 0, and another of its ports was waiting for the right vCPU, so its upcall finds them: the
    document's "hot" word. With EVTCHNOP_unmask no selector is wrong.
    """
    dataset = stored(shared_path("recordings/xen-2l/dom0-light.dat.zst"), tmp_path)
    runs = replayed(dataset, "evtchn=current", "evtchn=proposed", systems=("evtchn",))
    found = [(f["code"], f["vcpu"], f["obj"]) for f in runs["evtchn current"]["findings"] if f["severity"] != "info"]
    assert found == [("evtchn-selector-wrong-vcpu", 3, 44), ("evtchn-selector-wrong-vcpu", 0, 56)]
    assert {f["severity"] for f in runs["evtchn proposed"]["findings"]} <= {"info"}
    for run in runs.values():
        assert run["calibration"]["state"] == "calibrated"
        metrics = run["metrics"]
        assert metrics["sends"] == metrics["handled"] + metrics["pending"] + metrics["coalesced"] == 9432
        assert metrics["handled"] == 9426  # six were sent to ports that are masked all the time


@pytest.mark.parametrize(("policy", "early"), [("level", 61), ("edge", 0), ("fasteoi", 0)])
def test_flow_what_if_with_affinity_moves(tmp_path: Path, policy: str, early: int) -> None:
    dataset = stored(shared_path("recordings/xen-2l/dom0-raw.trace.txt.zst"), tmp_path)
    assert kinds(dataset)["flow.set_affinity"] == 199
    run = replayed(dataset, f"irqflow={policy}", systems=("irqflow",))[f"irqflow {policy}"]
    assert codes(run)["flow-migrate-unmask-early"] == early
    assert codes(run)["flow-edge-lost"] == 0


@pytest.mark.parametrize(
    ("name", "handled", "scans"),
    [
        ("xen-fifo/dom0-light.dat.zst", 6010, 4836),
        ("xen-fifo-domu/pv-ft.dat.zst", 4038, 3028),
        ("linux-6.1-xen-dom0/10-kprobes.txt.zst", 704, 628),
    ],
)
def test_fifo_guests(tmp_path: Path, name: str, handled: int, scans: int) -> None:
    dataset = stored(shared_path(f"recordings/{name}"), tmp_path)
    seen = kinds(dataset)
    assert (seen["evtchn.handled"], seen["evtchn.upcall"]) == (handled, scans)
    for run in replayed(dataset, "current").values():
        assert all(f["severity"] == "info" for f in run["findings"]) or run["system"] == "hpet", codes(run)


def test_late_eois_of_backends(tmp_path: Path) -> None:
    dataset = stored(shared_path("recordings/xen-fifo-domu/pv-ft.dat.zst"), tmp_path)
    assert kinds(dataset)["flow.lateeoi"] == 363
    run = replayed(dataset, "current", systems=("irqflow",))["irqflow edge"]
    assert states(run)["flow-lateeoi-missing"] == "checked"
    assert codes(run)["flow-lateeoi-missing"] == 0


# -- plain interrupts, KVM ---------------------------------------------------------------------------------------------


def test_vectors_nest_and_handlers_pair(tmp_path: Path) -> None:
    dataset = stored(SAMPLES / "ftrace-linux-6.1_01-default.txt.zst", tmp_path)
    counts = dataset.manifest["counts"]
    seen = kinds(dataset)
    assert seen["irqdesc.entry"] == counts["irq_handler_entry"] > 0
    vectors = ("local_timer", "reschedule", "call_function_single", "call_function", "irq_work")
    assert seen["lapic.deliver"] == sum(counts.get(f"{v}_entry", 0) for v in vectors)
    runs = replayed(dataset, "current")
    assert runs["irqflow edge"]["findings"] == [] == runs["apic any"]["findings"]
    assert runs["apic any"]["metrics"]["max_nesting"] == 1
    # The EOI is the kernel's order, not a record; whether irqs are per-cpu is not known.
    assert states(runs["apic any"])["lapic-eoi-unmatched"] == "inferred"
    assert states(runs["irqflow edge"])["flow-concurrent-handler"] == "blind"


def test_injections_of_the_8259_are_not_the_lapics(tmp_path: Path) -> None:
    dataset = stored(SAMPLES / "ftrace-linux-6.1_40-kvm.txt.zst", tmp_path)
    assert dataset.manifest["counts"].get("kvm_inj_virq", 0) > 0
    assert "kvm_apic_accept_irq" in dataset.manifest["facts"]["apic"]
    frame = dataset.events().filter(pl.col("dom").is_not_null()).select(pl.col("kind").cast(pl.String)).collect()
    assert set(frame["kind"]) <= {"ioapic.line", "ioapic.rte"}  # its pins move, the local APIC does not


def test_arm64_stimuli(tmp_path: Path) -> None:
    dataset = stored(shared_path("recordings/arm64-gic2/40-kvm.txt.zst"), tmp_path)
    updates = dataset.scan("vgic_update_irq_pending").collect()
    assert updates.height == 1302
    assert kinds(dataset)["vgic.phys_irq"] == updates["level"].cast(pl.Int64).sum() == 1176
    assert "vgic patch-v8" not in replayed(dataset, "current")  # nothing of it can be checked


# -- event map ---------------------------------------------------------------------------------------------------------


def test_event_map_gives_names_a_meaning(tmp_path: Path) -> None:
    given = check_event_map({"setaff": {"kind": "flow.set_affinity", "obj": "irq", "tgt": 1}}, "test")
    dataset = stored(shared_path("recordings/linux-6.1/10-kprobes.txt.zst"), tmp_path, event_map=given)
    frame = dataset.events().filter(pl.col("kind").cast(pl.String) == "flow.set_affinity").collect()
    assert frame.height == 3
    assert frame["tgt"].to_list() == [1, 1, 1]
    assert dataset.manifest["observed"]["flow.set_affinity"]["how"] == "setaff, by the event map"


@pytest.mark.parametrize(
    "entry", [{}, {"kind": "no.such"}, {"kind": "evtchn.send", "symbol": "x"}, {"kind": "evtchn.send", "port": "p"}, 1]
)
def test_event_map_errors_are_one_line(entry: Any) -> None:
    with pytest.raises(UsageError) as caught:
        check_event_map({"mine": entry}, "map.toml")
    assert str(caught.value).startswith("map.toml: [mine] ")
    assert "\n" not in str(caught.value)
