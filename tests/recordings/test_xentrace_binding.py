"""Stock xentrace to findings: what real recordings say about the virtual LAPICs and the HPET broadcast."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.recordings.instrumented_writer import HZ, Writer, struct
from tests.shared import SAMPLES, shared_path
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Settings, blind_share, choose, replay_dataset
from tracetool.store import Dataset

XEN_2L = ("dom0-idle.xentrace", "idle-cx.xentrace", "dom0-light.xentrace.zst", "dom0-raw.xentrace.zst")


def stored(path: Path, folder: Path, **options: Any) -> Dataset:
    ingest([str(path)], folder / "d", IngestOptions(**options))
    return Dataset.open(folder / "d")


def replayed(dataset: Dataset, *policies: str, systems: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return replay_dataset(dataset, Settings(tuple(choose(p) for p in policies), systems))


def counted(run: dict[str, Any]) -> Counter[str]:
    return Counter(f["code"] for f in run["findings"])


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return stored(SAMPLES / "xen-2l-dom0-idle.xentrace", tmp_path_factory.mktemp("sample"))


# -- virtual LAPIC -------------------------------------------------------------------------------------------------


def test_pvh_guest_every_injection_has_its_eoi(tmp_path: Path) -> None:
    dataset = stored(shared_path("recordings/xen-pvh/pvh-load.xentrace.zst"), tmp_path)
    (run,) = replayed(dataset, "current", systems=("apic",))
    metrics = run["metrics"]
    assert metrics["deliveries.d1v0.0xf3"] + metrics["deliveries.d1v1.0xf3"] == metrics["deliveries"] == 2390
    assert metrics["eois.d1v0.0xf3"] + metrics["eois.d1v1.0xf3"] == metrics["eois"] == 2390
    assert metrics["eois_unmatched"] == 0
    assert metrics["max_nesting"] == 1
    assert metrics["in_service_at_end"] == 0
    assert run["verdict"] == "clean"
    assert run["findings"] == []


def test_hvm_guest_every_injection_has_its_eoi(tmp_path: Path) -> None:
    """4,283 injections and 4,284 EOIs are in the file; the first EOI comes before its CPU's first scheduler record."""
    dataset = stored(shared_path("recordings/xen-hvm/hvm-load.xentrace.zst"), tmp_path)
    assert dataset.manifest["counts"]["TRC_HVM_INJ_VIRQ"] == 4283
    (run,) = replayed(dataset, "current", systems=("apic",))
    assert run["metrics"]["deliveries"] == run["metrics"]["eois"] == 4283
    assert run["findings"] == []


def test_injections_of_the_8259_are_no_lapic_deliveries(tmp_path: Path) -> None:
    """A BIOS takes vector 8 from the 8259: without the filter it would stay in service for ever."""
    dataset = stored(shared_path("recordings/xen-hvm-intx/boot.xentrace.zst"), tmp_path)
    (run,) = replayed(dataset, "current", systems=("apic",))
    injected = dataset.scan("TRC_HVM_INJ_VIRQ").select(pl.len()).collect().item()
    acknowledged = dataset.manifest["counts"]["TRC_HVM_EMUL_PIC_INTACK"]
    assert run["metrics"]["deliveries"] < injected
    assert injected - run["metrics"]["deliveries"] <= acknowledged
    assert run["metrics"]["in_service_at_end"] == 0
    assert run["findings"] == []


def test_a_removed_eoi_is_found(tmp_path: Path) -> None:
    """The same recording without one of its EOIs: the next delivery of the vector is impossible."""
    from replay.declare import Config
    from replay.driver import run_machine
    from replay.systems import SYSTEMS

    dataset = stored(shared_path("recordings/xen-pvh/pvh-load.xentrace.zst"), tmp_path)
    events = dataset.events().sort("seq").collect()
    eois = events.filter(pl.col("kind").cast(pl.String) == "lapic.eoi")["seq"]
    broken = events.filter(pl.col("seq") != eois[500]).to_arrow()
    system = SYSTEMS["apic"]
    observed = frozenset(dataset.manifest["observed"])
    run = run_machine(
        system, "any", [broken], config=Config(system.parameters), closed=False, from_boot=False, observed=observed
    )
    assert [f.code.name for f in run.findings][:1] == ["lapic-priority-inversion"]


def test_writes_of_tpr_are_not_certain(tmp_path: Path) -> None:
    """A guest behind a TPR shadow writes without an exit: each row is as sure as the manifest says the kind is."""
    w = Writer()
    w.record(0x21101, struct.pack("<HH", 0, 1))  # vCPU 0 of domain 1 runs
    w.record(0x82109, struct.pack("<IQ", 8, 5), stamped=False)  # CR8
    w.record(0x8200D, struct.pack("<IQ", 0x808, 0x61), stamped=False)  # the x2APIC's TPR
    w.record(0x82317, struct.pack("<QQ", 0xFEE00080, 0x72), stamped=False)
    w.record(0x82004, struct.pack("<II", 0x83, 0), stamped=False)
    w.record(0x8200D, struct.pack("<IQ", 0x80B, 0), stamped=False)
    (tmp_path / "host.xentrace").write_bytes(w.file())
    dataset = stored(tmp_path / "host.xentrace", tmp_path, cpu_hz=HZ)
    events = dataset.events().with_columns(pl.col("kind").cast(pl.String)).collect()
    tpr = events.filter(pl.col("kind") == "lapic.tpr").sort("seq")
    assert tpr["val"].to_list() == [0x50, 0x61, 0x72]
    assert tpr["conf"].to_list() == [80, 80, 80]
    assert dataset.manifest["observed"]["lapic.tpr"]["conf"] == 80
    assert events.filter(pl.col("kind") == "lapic.deliver")["conf"].to_list() == [100]


def test_without_scheduler_records_nothing_is_claimed(tmp_path: Path) -> None:
    dataset = stored(shared_path("recordings/xen-pvh/pvh-hvm-mask.xentrace"), tmp_path)
    assert dataset.manifest["clock"]["unit"] == "ticks"
    assert replayed(dataset, "current") == []
    (run,) = replayed(dataset, "current", systems=("apic",))
    assert run["verdict"] == "inconclusive"


# -- HPET broadcast ------------------------------------------------------------------------------------------------


def test_channels_are_found_in_the_sample(sample: Dataset) -> None:
    facts = sample.manifest["facts"]
    assert facts["hpet_channels"] == {"24": 0, "25": 1, "26": 2}
    assert facts["hpet_config"] == {"n_channels": 3, "n_cpus": 4}


def test_idle_periods_have_deadlines_and_reasons(sample: Dataset) -> None:
    events = sample.events().with_columns(pl.col("kind").cast(pl.String)).collect()
    entered = events.filter(pl.col("kind") == "idle.enter")
    assert entered.height == 366
    assert (entered["val"] > entered["t_ns"]).all()
    exits = events.filter(pl.col("kind") == "idle.exit")
    assert exits.height == 366
    reasons = Counter(exits["tgt"].to_list())
    assert reasons[1] > 150  # its own channel
    assert reasons[2] > 30  # another CPU's handler
    handlers = events.filter(pl.col("kind") == "hpet.handler.begin")
    assert handlers.height == 220  # HW_IRQ_HANDLED of 24, 25 and 26
    assert events["t_ns"].is_sorted()
    assert events["seq"].to_list() == list(range(events.height))


@pytest.mark.parametrize("name", XEN_2L)
def test_healthy_recordings_raise_no_error(name: str, tmp_path: Path) -> None:
    dataset = stored(shared_path(f"recordings/xen-2l/{name}"), tmp_path)
    assert dataset.manifest["facts"]["hpet_channels"] == {"24": 0, "25": 1, "26": 2}
    verify, proposed, keep = replayed(dataset, "current", "proposed", "proposed-keep", systems=("hpet",))
    assert not [f for f in verify["findings"] if f["severity"] == "error"]
    for finding in verify["findings"]:
        if finding["code"] in ("hpet-wrong-cpu", "hpet-spurious-irq"):
            assert finding["confidence"] == 50
            assert finding["evidence"]
            assert finding["offset"] is not None
    for what_if in (proposed, keep):
        assert what_if["calibration"]["state"] == "calibrated"
        assert what_if["horizon_ns"] > 0
        assert what_if["metrics"]["hpet_retargets"] == 0
        assert what_if["verdict"] == "clean"
        assert what_if["metrics"]["hpet_irqs"] < verify["metrics"]["hpet_irqs"]
    assert keep["metrics"]["early_wakeups"] < proposed["metrics"]["early_wakeups"]


def test_wrong_cpu_is_told_record_by_record(tmp_path: Path) -> None:
    """Channel 0's handler on CPU 3, awake for 2.9 ms, and CPU 2 wakes 66 us later: the first such case by hand."""
    dataset = stored(shared_path("recordings/xen-2l/dom0-light.xentrace.zst"), tmp_path)
    (run,) = replayed(dataset, "current", systems=("hpet",))
    case = [f for f in run["findings"] if f["code"] == "hpet-wrong-cpu" and f["t_ns"] == 1758515927]
    assert len(case) == 1
    assert (case[0]["cpu"], case[0]["obj"], case[0]["val"], case[0]["severity"]) == (3, 0, 2, "warn")
    assert [e["label"].split(",")[0] for e in case[0]["evidence"]] == [
        "channel 0 pointed at cpu 3",
        "handler of channel 0 begins on cpu 3",
        "cpu 2 leaves idle",
    ]


def test_idle_records_alone_show_no_wake_reason(tmp_path: Path) -> None:
    dataset = stored(shared_path("recordings/xen-2l/mask-pm.xentrace"), tmp_path)
    assert replayed(dataset, "current") == []
    (run,) = replayed(dataset, "current", systems=("hpet",))
    assert (run["verdict"], run["findings"]) == ("inconclusive", [])


def test_lost_records_make_things_unknown_not_wrong(tmp_path: Path) -> None:
    dataset = stored(shared_path("recordings/xen-2l/lost.xentrace.zst"), tmp_path)
    assert 0.2 < blind_share(dataset) < 0.3
    gaps = [(g["t0_ns"], g["t1_ns"]) for g in dataset.gaps() if g["t0_ns"] is not None and g["t1_ns"] is not None]
    assert gaps
    (run,) = replayed(dataset, "current", systems=("hpet",))
    assert not [f for f in run["findings"] if f["severity"] == "error"]
    for finding in run["findings"]:
        if finding["code"] in ("hpet-missed-wakeup", "hpet-late-wakeup"):
            start = finding["evidence"][0]["t_ns"]
            assert not any(t0 <= finding["t_ns"] and t1 >= start for t0, t1 in gaps)


def test_stated_channels_replace_the_guess(tmp_path: Path) -> None:
    dataset = stored(SAMPLES / "xen-2l-dom0-idle.xentrace", tmp_path, hpet_irqs=(24,))
    assert dataset.manifest["facts"]["hpet_channels"] == {"24": 0}
    assert dataset.manifest["observed"]["hpet.handler.begin"]["conf"] == 80
