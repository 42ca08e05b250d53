"""What-ifs on real recordings: the recorded policy's own what-if reproduces the recording, or the run says why not."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from replay.bodies import Bodies, Lags, median
from replay.declare import UsageError
from replay.events import NIL
from replay.parting import part
from tests.shared import SAMPLES, shared_path
from tracetool import cli
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Settings, choose, choose_recorded, replay_dataset
from tracetool.store import Dataset


def stored(path: Path, folder: Path) -> Dataset:
    ingest([str(path)], folder / "d", IngestOptions())
    return Dataset.open(folder / "d")


def replayed(dataset: Dataset, *policies: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """Runs by `system policy`."""
    systems = tuple(sorted({p.partition("=")[0] for p in policies}))
    chosen = tuple(choose(p) for p in policies)
    runs = replay_dataset(dataset, Settings(chosen, systems, **settings))
    return {f"{r['system']} {r['policy']}": r for r in runs}


def agree(run: dict[str, Any], tolerance: float) -> bool:
    return all(abs(a - b) <= tolerance * a for a, b in run["calibration"]["metrics"].values())


# -- bodies and lags -----------------------------------------------------------------------------------------------


def bodies() -> Bodies:
    made = Bodies(1)
    made.add(7, [10, 20, 30], [100, 200, 300])
    return made


def test_a_body_is_given_to_the_cause_that_it_followed() -> None:
    made = bodies()
    assert made.take(7, 5, 5) == ((100,),)
    assert made.take(7, 25, 25) == ((300,),)  # that of 20 is passed over
    assert made.metrics()["bodies_dropped"] == 1
    assert made.take(7, 15, 15) == ()  # nothing is given twice


def test_causes_that_became_one_bring_all_their_bodies() -> None:
    made = bodies()
    assert made.take(7, 5, 15) == ((100,), (200,))
    assert made.metrics() == {
        "bodies_moved": 1, "bodies_merged": 1, "bodies_dropped": 1, "bodies_synthetic": 0, "bodies_default": 0,
    }  # fmt: skip


def test_substitutes_need_eight_samples() -> None:
    made = bodies()
    assert made.substitute(7) is None  # too few
    made.add(8, range(8), [5, 1, 9, 3, 3, 3, 8, 2])
    assert made.substitute(8) == (3,)
    assert made.substitute(9) is None
    assert (made.synthetic, made.default) == (1, 2)


def test_every_run_begins_with_all_bodies() -> None:
    made = bodies()
    made.take(7, 5, 30)
    assert made.rewind().take(7, 5, 5) == ((100,),)
    assert made.rewind().metrics()["bodies_moved"] == 0


def test_lags_are_found_by_stimulus() -> None:
    lags = Lags(pl.DataFrame({"seq": [3, 9], "due": [30, 90]}))
    assert (lags.of(9), lags.of(4), lags.find(3)) == (90, NIL, 0)
    assert median([]) is None


# -- outcomes that one side has alone --------------------------------------------------------------------------------


def recorded(*rows: tuple[int, int]) -> pl.DataFrame:
    columns = {name: [1] * len(rows) for name in ("cpu", "dom", "vcpu", "tgt", "val")}
    times = {"t_ns": [t for t, _ in rows], "obj": [o for _, o in rows]}
    return pl.DataFrame({"seq": range(len(rows)), "t_err_ns": [0] * len(rows), **times, **columns})


def parted(predicted: list[tuple[int, int]], seen: pl.DataFrame, **more: Any) -> list[tuple[str, int]]:
    given: dict[str, Any] = {"match_ns": 5, "end_ns": 10_000, "reach_ns": 100, **more}
    return [(f.code.name, f.t) for f in part(predicted, seen, lambda e: e["obj"], str, **given)]


def test_matched_outcomes_part_nothing() -> None:
    assert parted([(100, 1), (203, 1), (100, 2)], recorded((100, 1), (200, 1), (104, 2))) == []


def test_missing_and_extra_outcomes_are_told() -> None:
    found = parted([(100, 1), (300, 1)], recorded((100, 1), (200, 1)))
    assert found == [("model-extra-outcome", 200), ("model-missing-outcome", 300)]


def test_what_the_model_cannot_know_is_not_told() -> None:
    assert parted([(9_950, 1)], recorded()) == []  # may come after the end
    assert parted([], recorded((100, 1))) == []  # its stimulus may lie before the start
    assert parted([(100, 1), (900, 1)], recorded((100, 1)), lost=[(800, 850)]) == []


BEYOND: dict[str, Any] = {"match_ns": 5, "end_ns": 10**10, "reach_ns": 0, "inferred": True}


def test_inferred_stimuli_make_information_unless_the_object_dies() -> None:
    seen = recorded((100, 1), (900, 1))
    late = part([(100, 1), (500, 1)], seen, lambda e: e["obj"], str, **BEYOND)
    assert [(f.code.name, f.severity) for f in late] == [
        ("model-missing-outcome", "info"), ("model-extra-outcome", "info"),
    ]  # fmt: skip
    other = part([(100, 1), (950, 1)], seen, lambda e: e["obj"], str, **BEYOND, subject=lambda what: what)
    assert [f.severity for f in other if f.code.name == "model-missing-outcome"] == ["warn"]
    alive = recorded((100, 1), (900, 1), (2_000, 2))
    moved = part([(950, 1), (2_000, 2)], alive, lambda e: e["obj"], str, **BEYOND, subject=lambda what: 0)
    assert "warn" not in {f.severity for f in moved}  # it is served elsewhere
    dead = part([(100, 1), (950, 1)], seen, lambda e: e["obj"], str, **BEYOND)
    assert [f.severity for f in dead if f.code.name == "model-missing-outcome"] == ["warn"]


# -- samples -----------------------------------------------------------------------------------------------------------


def test_a_blind_stimulus_is_named_and_nothing_is_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain Linux: nobody records what raises its interrupts."""
    dataset = stored(SAMPLES / "ftrace-linux-6.1_10-kprobes.txt.zst", tmp_path)
    run = replayed(dataset, "irqflow=level")["irqflow level"]
    assert run["verdict"] == "inconclusive"
    assert run["calibration"]["state"] == "uncalibrated"
    assert run["calibration"]["reasons"][0].startswith("flow.raise is not recorded")
    assert run["metrics"] == {}
    assert [f["code"] for f in run["findings"]] == ["model-uncalibrated"]
    assert run["findings"][0]["observed"].startswith("flow.raise is not recorded")
    assert run["horizon_ns"] == dataset.manifest["span"]["t0_ns"]  # evidence for nothing
    status = cli.run(["replay", str(tmp_path / "d"), "-s", "irqflow", "-p", "irqflow=level"])
    assert status == 4
    assert "flow.raise is not recorded" in capsys.readouterr().out.replace("\n    ", " ")


def test_edges_of_the_arm_sample_are_predicted(tmp_path: Path) -> None:
    dataset = stored(SAMPLES / "qemu-arm64-gic.log.gz", tmp_path)
    runs = replayed(dataset, "vgic=merged-2017", "vgic=maintenance", "vgic=naive")
    assert not [f for f in runs["vgic merged-2017"]["findings"] if f["code"].startswith("model-")]
    assert agree(runs["vgic maintenance"], 0.01)
    assert runs["vgic maintenance"]["metrics"]["bodies_synthetic"] == 0


def test_a_virtual_gic_without_retargets_is_about_nothing(tmp_path: Path) -> None:
    """KVM's trace points show arrivals, but neither writes to ITARGETSR nor list registers."""
    dataset = stored(SAMPLES / "ftrace-arm64-gic2_40-kvm.txt.zst", tmp_path)
    run = replayed(dataset, "vgic=maintenance", recorded={"vgic": "merged"})["vgic maintenance"]
    assert run["verdict"] == "inconclusive"
    assert run["calibration"]["state"] == "uncalibrated"
    assert run["calibration"]["reasons"][0].startswith("vgic.itargets is not recorded")


def test_recorded_policies_are_checked() -> None:
    assert choose_recorded(["irqflow=current", "hpet=proposed"]) == {"irqflow": "level", "hpet": "proposed"}
    for wrong in ("irqflow", "nothing=edge", "irqflow=nothing"):
        with pytest.raises(UsageError):
            choose_recorded([wrong])


# -- the bigger recordings -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return stored(shared_path("recordings/xen-2l/dom0-raw.trace.txt.zst"), tmp_path_factory.mktemp("raw"))


def test_every_dispatch_of_the_two_level_recording_is_predicted(raw: Dataset) -> None:
    runs = replayed(raw, "evtchn=modern", "evtchn=proposed", "evtchn=current")
    verified = runs["evtchn modern"]
    assert verified["recorded"] == {"policy": "modern", "why": verified["recorded"]["why"]}
    assert not [f for f in verified["findings"] if f["code"].startswith("model-")]
    for run in (runs["evtchn proposed"], runs["evtchn current"]):
        assert run["calibration"]["state"] == "calibrated"
        assert agree(run, 0.02)  # handled, upcalls, time from send to handler
        assert run["horizon_ns"] is not None


def test_every_handler_run_is_predicted(raw: Dataset) -> None:
    runs = replayed(raw, "irqflow=edge", "irqflow=level", "irqflow=fasteoi-naive")
    verified = runs["irqflow edge"]
    assert verified["recorded"]["policy"] == "edge"
    assert not [f for f in verified["findings"] if f["code"].startswith("model-")]
    for name in ("irqflow level", "irqflow fasteoi-naive"):
        run = runs[name]
        assert run["calibration"]["state"] == "calibrated"
        assert agree(run, 0.05)
        assert run["metrics"]["handler_time_ns"] == pytest.approx(verified["metrics"]["handler_time_ns"], rel=0.001)
        assert run["metrics"]["bodies_moved"] > 3400
        assert any("flow.consume is not recorded" in a for a in run["calibration"]["assumptions"])


def test_late_eois_that_nobody_recorded_decide_nothing(raw: Dataset) -> None:
    run = replayed(raw, "irqflow=lateeoi")["irqflow lateeoi"]
    assert run["verdict"] == "inconclusive"
    assert "no late EOI is recorded" in run["calibration"]["reasons"][0]
    assert {f["severity"] for f in run["findings"] if f["code"] != "model-uncalibrated"} <= {"info"}
    assert {tag for f in run["findings"] if f["severity"] == "info" for tag in f["tags"]} == {"uncalibrated"}
    told = replayed(raw, "irqflow=lateeoi", values={"irqflow": {"lateeoi_ns": 1_000}})["irqflow lateeoi"]
    assert told["calibration"]["state"] == "calibrated"
    assert Counter(f["severity"] for f in told["findings"])["error"] == 0


def test_the_user_may_say_what_ran(raw: Dataset) -> None:
    run = replayed(raw, "irqflow=level", recorded={"irqflow": "level"})["irqflow level"]
    assert run["mode"] == "verify"
    assert run["recorded"] == {"policy": "level", "why": "stated (--recorded)"}


def test_fifo_guests_have_one_way_to_unmask(tmp_path: Path) -> None:
    dataset = stored(shared_path("recordings/linux-6.1-xen-dom0/10-kprobes.txt.zst"), tmp_path)
    assert dataset.manifest["facts"]["evtchn_recorded"]["policy"] == "any"
    run = replayed(dataset, "irqflow=level")["irqflow level"]
    assert run["verdict"] == "inconclusive"


@pytest.mark.slow
def test_document_001_routed_to_the_other_vcpu(tmp_path: Path) -> None:
    """xen-hvm-intx: 807 injections, all of them predicted; routed to vCPU 1, the code of 2008 sticks."""
    dataset = stored(shared_path("recordings/xen-hvm-intx/boot.xentrace.zst"), tmp_path)
    silent = replayed(dataset, "callback=current")["callback current"]
    assert silent["verdict"] == "inconclusive"
    assert "--set callback.vector=N" in silent["calibration"]["reasons"][0]
    told = {"callback": {"vector": 0x21}}
    healthy = replayed(dataset, "callback=applied", "callback=current", values=told)
    assert healthy["callback current"]["calibration"]["metrics"] == {
        "injections": [807, 807], "callback_eois": [807, 807],
    }  # fmt: skip
    assert healthy["callback current"]["metrics"]["spurious_injections"] == 0  # vcpu0's own entries sample the flag
    assert not [f for f in healthy["callback applied"]["findings"] if f["code"].startswith("model-")]
    elsewhere = {"callback": {"vector": 0x21, "route_vcpu": 1}}
    runs = replayed(dataset, *(f"callback={p}" for p in ("current", "proposed", "applied")), values=elsewhere)
    assert {r["mode"] for r in runs.values()} == {"what-if"}
    assert {r["calibration"]["state"] for r in runs.values()} == {"calibrated"}
    stuck = Counter(f["code"] for f in runs["callback current"]["findings"])
    assert stuck["via-inject-storm"] > 40
    assert runs["callback current"]["metrics"]["spurious_injections"] > 1_000
    for name in ("callback proposed", "callback applied"):
        assert runs[name]["metrics"]["spurious_injections"] == 0
    first = dataset.events().filter((pl.col("kind").cast(pl.String) == "via.inject") & (pl.col("obj") == 0x21))
    assert runs["callback current"]["horizon_ns"] == first.select(pl.col("t_ns").min()).collect().item()
