"""QEMU logs through the whole tool: the hardware models in lockstep with what the emulated hardware says it did.

The expected numbers of outcomes are counted in the text of the log, not by the reader.
"""

from __future__ import annotations

import gzip
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from replay.binding.base import slices
from tests.shared import SAMPLES, shared_path
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Choice, Settings, replay_dataset
from tracetool.store import Dataset

MISMATCH = ("model-missing-outcome", "model-extra-outcome")
POLICIES = ("merged-2017", "merged", "patch-v8", "maintenance", "naive")


def lines_of(path: Path) -> list[str]:
    return gzip.decompress(path.read_bytes()).decode("latin-1").splitlines(keepends=True)


def replayed(log: Path, tmp_path: Path, *policies: Choice, systems: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    target = tmp_path / "dataset"
    ingest([str(log)], target, IngestOptions(force=True))
    return replay_dataset(Dataset.open(target), Settings(policies=policies or (Choice("current"),), systems=systems))


def mutated(lines: list[str], tmp_path: Path, change: Callable[[list[str]], object]) -> Path:
    changed = list(lines)
    change(changed)
    path = tmp_path / "mutated.log"
    path.write_text("".join(changed), encoding="latin-1")
    return path


def apic(log: Path, tmp_path: Path) -> dict[str, Any]:
    (run,) = replayed(log, tmp_path, systems=("apic",))
    return run


def gic(log: Path, tmp_path: Path) -> dict[str, Any]:
    (run,) = replayed(log, tmp_path, systems=("gic",))
    return run


def mismatches(run: dict[str, Any]) -> list[tuple[str, int]]:
    return [(f["code"], f["offset"]) for f in run["findings"] if f["code"] in MISMATCH]


def lockstep(run: dict[str, Any]) -> dict[str, int]:
    return {k.removeprefix("lockstep."): v for k, v in run["metrics"].items() if k.startswith("lockstep.")}


def count(lines: list[str], pattern: str) -> int:
    return sum(re.search(pattern, line) is not None for line in lines)


def remote_irr_transitions(lines: list[str]) -> int:
    """Lines "set remote irr" of a pin that was clear; the log repeats them while it is set."""
    state: dict[str, str] = {}
    changes = 0
    for line in lines:
        if hit := re.search(r":ioapic_(set|clear)_remote_irr .*for pin (\d+)", line):
            changes += hit[1] == "set" and state.get(hit[2]) != "set"
            state[hit[2]] = hit[1]
    return changes


# -- x86 ---------------------------------------------------------------------------------------------------------


def check_x86(log: Path, tmp_path: Path) -> dict[str, int]:
    lines = lines_of(log)
    run = apic(log, tmp_path)
    got = lockstep(run)
    assert not mismatches(run)
    assert not [f for f in run["findings"] if f["severity"] != "info"]
    assert got["ioapic_remote_irr_set.observed"] == remote_irr_transitions(lines)
    assert got["ioapic_remote_irr_clear.observed"] == count(lines, ":ioapic_clear_remote_irr ")
    assert got["ioapic_message.observed"] == count(lines, ":apic_deliver_irq ")
    assert got["ioapic_eoi_broadcast.observed"] == count(lines, ":ioapic_eoi_broadcast ")
    assert got["lapic_tmr.observed"] == count(lines, ":apic_mem_readl 0x1[89a-f]0 ")
    for kind in ("ioapic_remote_irr_set", "ioapic_remote_irr_clear", "ioapic_message", "ioapic_eoi_broadcast"):
        assert got[f"{kind}.predicted"] + got.get(f"{kind}.open", 0) == got[f"{kind}.observed"]
        assert got[f"{kind}.mismatch"] == 0
    return got


def test_x86_sample(tmp_path: Path) -> None:
    """The excerpt begins in the middle: what a pin's entry is shows in its first interrupt, one by one."""
    got = check_x86(SAMPLES / "qemu-x86-ioapic.log.gz", tmp_path)
    assert got["ioapic_remote_irr_set.predicted"] == 306
    assert got["ioapic_remote_irr_clear.predicted"] == 350
    assert got["ioapic_message.predicted"] == 305
    assert got["ioapic_eoi_broadcast.predicted"] == 277


def test_x86_whole_log(tmp_path: Path) -> None:
    got = check_x86(shared_path("recordings/qemu/linux-x86-ioapic-hpet.log.gz"), tmp_path)
    assert got["ioapic_remote_irr_set.predicted"] == got["ioapic_remote_irr_clear.predicted"] == 8719
    assert got["ioapic_message.predicted"] == 13952  # and one of an entry that was never written, open
    assert got["ioapic_eoi_broadcast.predicted"] == 6055  # the others: edge vectors were requested too
    assert got["lapic_irr_merged.mismatch"] == 0 < got["lapic_irr_merged.predicted"]


def test_a_clear_that_is_missing_is_found(tmp_path: Path) -> None:
    lines = lines_of(SAMPLES / "qemu-x86-ioapic.log.gz")
    at = [i for i, line in enumerate(lines) if ":ioapic_clear_remote_irr " in line][100]
    run = apic(mutated(lines, tmp_path, lambda changed: changed.pop(at)), tmp_path)
    (code, offset), *others = mismatches(run)
    assert not others
    assert code == "model-missing-outcome"
    assert at - 20 < offset <= at + 1  # the EOI that should have cleared it
    assert lockstep(run)["ioapic_remote_irr_clear.mismatch"] == 1
    (finding,) = (f for f in run["findings"] if f["code"] in MISMATCH)
    assert "remote irr clear" in finding["expected"]
    assert finding["evidence"][-1]["label"].startswith("EOI")


def test_an_eoi_of_the_wrong_vector_is_found(tmp_path: Path) -> None:
    lines = lines_of(SAMPLES / "qemu-x86-ioapic.log.gz")
    at = [i for i, line in enumerate(lines) if ":ioapic_eoi_broadcast EOI broadcast for vector 34" in line][60]

    def swap(changed: list[str]) -> None:
        changed[at] = changed[at].replace("vector 34", "vector 97")

    run = apic(mutated(lines, tmp_path, swap), tmp_path)
    got = mismatches(run)
    assert ("model-extra-outcome", at + 2) in got  # the clear that nothing explains any more
    assert len(got) <= 3


def test_a_message_with_the_wrong_destination_is_found(tmp_path: Path) -> None:
    lines = lines_of(SAMPLES / "qemu-x86-ioapic.log.gz")
    at = [i for i, line in enumerate(lines) if re.search(r":apic_deliver_irq .* vector 34 trigger_mode 1", line)][200]

    def bend(changed: list[str]) -> None:
        changed[at] = re.sub(r"dest \d+ ", "dest 64 ", changed[at], count=1)

    run = apic(mutated(lines, tmp_path, bend), tmp_path)
    assert mismatches(run)[0] == ("model-extra-outcome", at + 1)


def test_comparators_of_the_excerpt(tmp_path: Path) -> None:
    """Document 000 on this machine: three comparators, no message routes, one writer each: no channel changes hands."""
    log = SAMPLES / "qemu-x86-hpet.log.gz"
    runs = replayed(log, tmp_path)
    assert not [f for run in runs for f in run["findings"] if f["severity"] != "info"]
    (run,) = (r for r in runs if r["system"] == "apic")
    assert run["metrics"]["hpet_comparator_writes"] == count(lines_of(log), r"addr 0xfed001[0-9a-f]8 .*'hpet'")
    assert all(r["system"] != "hpet" for r in runs)
    facts = Dataset.open(tmp_path / "dataset").manifest["facts"]["hpet_block"]
    assert facts["comparators_with_message_route"] == []


# -- Arm ---------------------------------------------------------------------------------------------------------


def check_arm(log: Path, tmp_path: Path) -> dict[str, int]:
    lines = lines_of(log)
    run = gic(log, tmp_path)
    got = lockstep(run)
    assert not mismatches(run)
    assert not [f for f in run["findings"] if f["severity"] != "info"]
    assert got["gic_ack.observed"] == count(lines, r":gic_cpu_read cpu \d+ iface read at 0x0000000c")
    assert got["gic_virtual_ack.observed"] == count(lines, r":gic_cpu_read vcpu \d+ iface read at 0x0000000c")
    assert got["gic_running_priority.observed"] == count(lines, ":gic_update_bestirq cpu ")
    assert got["gic_virtual_running_priority.observed"] == count(lines, ":gic_update_bestirq vcpu ")
    assert got["gic_priority_drops"] == count(lines, r":gic_cpu_write cpu \d+ iface write at 0x00000010")
    assert got["gic_virtual_priority_drops"] == count(lines, r":gic_cpu_write vcpu \d+ iface write at 0x00000010")
    for kind in ("gic_ack", "gic_virtual_ack", "gich_read", "gic_running_priority", "gic_virtual_running_priority"):
        assert got[f"{kind}.predicted"] + got.get(f"{kind}.open", 0) == got[f"{kind}.observed"]
        assert got[f"{kind}.mismatch"] == 0
    return got


def test_arm_sample(tmp_path: Path) -> None:
    got = check_arm(SAMPLES / "qemu-arm64-gic.log.gz", tmp_path)
    assert (got["gic_ack.predicted"], got["gic_ack.open"]) == (571, 44)  # nearly all SGIs: who sent them before?
    assert (got["gic_virtual_ack.predicted"], got["gic_virtual_ack.open"]) == (429, 67)
    assert got["gich_read.predicted"] == 1288


def test_arm_whole_log(tmp_path: Path) -> None:
    """It begins with the distributor's own beginning, so nothing is open."""
    log = shared_path("recordings/qemu/xen-arm64-gic.log.gz")
    got = check_arm(log, tmp_path)
    assert not [k for k in got if k.endswith(".open")]
    assert got["gic_ack.predicted"] == 25269
    assert got["gic_virtual_ack.predicted"] == 18661
    assert got["gich_read.predicted"] == 54340
    assert got["gic_deactivated_by_guest"] == 640


def test_latches_left_behind(tmp_path: Path) -> None:
    """As the manual has it (4.3.12) a latched edge follows ITARGETSR; the emulator leaves it with the old core.

    That is all that differs: nine times the new core reads IAR and gets nothing.
    """
    log = shared_path("recordings/qemu/xen-arm64-gic.log.gz")
    ingest([str(log)], tmp_path / "dataset", IngestOptions())
    dataset = Dataset.open(tmp_path / "dataset")
    (run,) = replay_dataset(dataset, Settings(systems=("gic",), values={"gic": {"latch_pinned": 0}}))
    assert Counter(code for code, _ in mismatches(run)) == {"model-extra-outcome": 9}
    assert lockstep(run)["gic_ack.mismatch"] == 9


def test_an_acknowledge_of_another_interrupt_is_found(tmp_path: Path) -> None:
    lines = lines_of(SAMPLES / "qemu-arm64-gic.log.gz")
    read = ":gic_cpu_read vcpu 0 iface read at 0x0000000c: 0x0000001b"
    at = [i for i, line in enumerate(lines) if read in line][-10]

    def bend(changed: list[str]) -> None:
        changed[at] = changed[at].replace("0x0000001b", "0x0000001c")

    run = gic(mutated(lines, tmp_path, bend), tmp_path)
    assert mismatches(run)[0] == ("model-extra-outcome", at + 1)


def test_a_lost_deactivation_is_found(tmp_path: Path) -> None:
    lines = lines_of(SAMPLES / "qemu-arm64-gic.log.gz")
    at = [i for i, line in enumerate(lines) if "iface write at 0x00001000 0x0000001a" in line][20]
    run = gic(mutated(lines, tmp_path, lambda changed: changed.pop(at)), tmp_path)
    code, offset = mismatches(run)[0]
    assert code == "model-extra-outcome"
    assert offset > at  # the same interrupt is taken again though it was never deactivated


# -- moves in flight ---------------------------------------------------------------------------------------------


def moves(lines: list[str]) -> int:
    return count(lines, "dist write at 0x0000084f size 1")


def test_moves_of_the_sample(tmp_path: Path) -> None:
    log = SAMPLES / "qemu-arm64-gic.log.gz"
    (run,) = replayed(log, tmp_path, systems=("vgic",))
    assert run["metrics"]["itargets_writes"] == moves(lines_of(log)) == 3
    assert run["metrics"]["phys_edges"] == count(lines_of(log), "gic_set_irq irq 79 level 1")
    assert not [f for f in run["findings"] if f["severity"] != "info"]


def test_moves_of_the_whole_log_under_every_policy(tmp_path: Path) -> None:
    log = shared_path("recordings/qemu/xen-arm64-gic.log.gz")
    runs = {r["policy"]: r for r in replayed(log, tmp_path, *(Choice(p, "vgic") for p in POLICIES), systems=("vgic",))}
    lines = lines_of(log)
    recorded = runs["merged-2017"]
    assert recorded["mode"] == "verify"
    # Xen took the last edge of SPI 79 while it was migrating, cleared its list register, moved the physical affinity,
    # and never injected it: no IAR of vcpu 1, no deactivation, the line high to the end. Nothing but the model's
    # prediction tells; the disk is dead from there on.
    (lost,) = [f for f in recorded["findings"] if f["severity"] != "info"]
    assert (lost["code"], lost["severity"]) == ("model-missing-outcome", "warn")
    assert lost["expected"] == "interrupt 79 acknowledged on vcpu 1"
    assert (lost["obj"], lost["vcpu"]) == (79, 1)
    last = max(i for i, line in enumerate(lines) if "cpu 0 acknowledged irq 79" in line)
    assert count(lines[last:], r"irq 79\b") == 1
    table = recorded["extra"]["vgic_moves"]
    assert recorded["metrics"]["itargets_writes"] == moves(lines) == 49
    in_flight = [m for m in table if m["list_register"] != "none"]
    assert len(in_flight) == recorded["metrics"]["migrations"] == 6
    for move in in_flight:
        assert move["completed_ns"] >= move["t_ns"]
    assert recorded["metrics"]["guest_acks"] == count(lines, r"gic_acknowledge_irq vcpu \d+ acknowledged irq 79\b")
    for name in POLICIES[1:]:
        run = runs[name]
        assert run["mode"] == "what-if"
        assert run["calibration"]["state"] == "calibrated"
        assert run["calibration"]["metrics"]["itargets_writes"] == [49, 49]
        assert run["calibration"]["metrics"]["migrations"] == [6, 5]
        assert "known by their effect only" in run["calibration"]["assumptions"][0]
    # Only where the write changes the target and nothing else does the old vcpu get what was moved away from it.
    assert {"vgic-delivered-old-target", "vgic-lr-foreign-access"} == {
        f["code"] for f in runs["naive"]["findings"] if f["severity"] == "error"
    }
    for name in ("merged", "patch-v8", "maintenance"):
        assert not [f for f in runs[name]["findings"] if f["severity"] == "error"]
    costs = {name: (runs[name]["metrics"]["sgis"], runs[name]["metrics"]["maintenance_irqs"]) for name in POLICIES[1:]}
    assert costs == {"merged": (1, 0), "patch-v8": (2, 0), "maintenance": (5, 0), "naive": (0, 0)}


@pytest.mark.parametrize("name", ["qemu-x86-ioapic.log.gz", "qemu-arm64-gic.log.gz"])
def test_slices_do_not_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Events are the same however the log is cut into slices."""
    whole = tmp_path / "whole"
    ingest([str(SAMPLES / name)], whole, IngestOptions())
    monkeypatch.setattr("replay.binding.qemu.slices", lambda rows: slices(rows, 617))
    cut = tmp_path / "cut"
    ingest([str(SAMPLES / name)], cut, IngestOptions())
    columns = ["t_ns", "kind", "cpu", "vcpu", "obj", "tgt", "val", "val2", "flags", "conf"]
    one, two = (Dataset.open(d).events().select(columns).collect() for d in (whole, cut))
    assert one.equals(two)
