"""KVM hosts on x86: healthy and broken guests, in the kernel's own layout (see kvm_writer)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from tests.recordings.kvm_writer import Host
from tests.shared import SAMPLES
from tracetool.ingest import IngestOptions, ingest
from tracetool.replaying import Settings, choose, replay_dataset
from tracetool.store import Dataset

PIN, VECTOR = 11, 34


def replayed(host: Host, tmp_path: Path) -> tuple[dict[str, Any], Counter[str], Dataset]:
    """The apic run, its events by kind, and the dataset."""
    ingest([str(host.write(tmp_path))], tmp_path / "d", IngestOptions())
    dataset = Dataset.open(tmp_path / "d")
    frame = dataset.events().group_by(pl.col("kind").cast(pl.String)).len().collect()
    (run,) = replay_dataset(dataset, Settings((choose("current"),), ("apic",)))
    return run, Counter(dict(frame.iter_rows())), dataset


def found(run: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [(f["code"], f["severity"], f["dom"], f["vcpu"], f["obj"]) for f in run["findings"]]


def states(run: dict[str, Any]) -> dict[str, str]:
    return {c["rule"]: c["state"] for c in run["coverage"]}


def healthy(host: Host, rounds: int = 20) -> Host:
    """Both vCPUs come up; level interrupts with and without resampling, and messages."""
    host.boot(0)
    host.boot(1)
    for vcpu in (0, 1):
        host.enter(vcpu)
        host.leave(vcpu, "HLT")
    for number in range(rounds):
        host.level_interrupt(number & 1, PIN, VECTOR, resample=number % 3 == 0)
        host.message(number & 1, 0x41)
    return host


def test_a_healthy_guest(tmp_path: Path) -> None:
    host = healthy(Host())
    run, kinds, dataset = replayed(host, tmp_path)
    assert found(run) == []
    text = "".join(host.lines)
    assert kinds["lapic.accept"] == text.count("kvm_apic_accept_irq:") - 6  # INIT, SIPI and NMI of two vCPUs
    assert kinds["lapic.reset"] == 2
    assert kinds["lapic.deliver"] == text.count("kvm_inj_virq:") == 40
    assert kinds["lapic.eoi"] == text.count("kvm_eoi:") + text.count("kvm_pv_eoi:") == 40
    assert kinds["ioapic.line"] == text.count("kvm_ioapic_set_irq:") == 40
    assert kinds["ioapic.rte"] == 1  # the entry never changes
    assert kinds["ioapic.remote_irr"] == text.count("kvm_ack_irq:") == 20
    assert kinds["lapic.idle"] == text.count("reason HLT")
    metrics = run["metrics"]
    assert metrics["deliveries"] == metrics["eois"] == 40
    assert metrics["deliveries.d1v1.0x22"] == metrics["eois.d1v1.0x22"] == 10
    assert metrics["ioapic_sends"] == 19  # Remote IRR is not known before the first
    assert metrics["in_service_at_end"] == metrics["level_redeliveries"] == metrics["eois_unmatched"] == 0
    seen = states(run)
    assert {seen[r] for r in ("lapic-eoi-wrong-vector", "ioapic-remote-irr-stuck", "lapic-irr-stuck")} == {"checked"}
    # Nobody sees a guest's handlers return; KVM's slowing down of a storm would be seen, but did not happen.
    assert seen["lapic-eoi-overdue"] == seen["ioapic-level-storm"] == "blind"
    assert seen["stack-nesting-depth"] == "inferred"  # so they are taken to end with their EOI
    assert dataset.manifest["facts"]["kvm_msi"].startswith("20 messages")


def test_an_eoi_that_is_missing(tmp_path: Path) -> None:
    """The next delivery of the vector cannot be: it is still in service."""
    host = healthy(Host())
    eois = [i for i, line in enumerate(host.lines) if "kvm_eoi: apicid 1" in line]
    del host.lines[eois[3] : eois[3] + 2]  # and kvm_ack_irq
    run, _, _ = replayed(host, tmp_path)
    assert [f["code"] for f in run["findings"] if f["severity"] == "error"] == ["lapic-priority-inversion"]
    (inversion,) = (f for f in run["findings"] if f["code"] == "lapic-priority-inversion")
    assert (inversion["vcpu"], inversion["obj"]) == (1, VECTOR)  # the messages, of a higher class, may nest


def test_an_eoi_without_a_vector_in_service(tmp_path: Path) -> None:
    host = healthy(Host(), 2)
    host.eoi(0, -1)
    run, _, _ = replayed(host, tmp_path)
    assert found(run) == [("lapic-eoi-unmatched", "warn", 1, 0, None)]


def test_a_line_that_is_never_lowered(tmp_path: Path) -> None:
    """Every EOI is answered by the next message; after 10,000 KVM slows the pin down."""
    host = healthy(Host(), 2)
    host.enter(0)
    host.line_moves(PIN, 1, VECTOR, send_to=0)
    for number in range(10_000):
        host.leave(0, "EXTERNAL_INTERRUPT")
        host.inject(0, VECTOR)
        host.enter(0)
        host.leave(0)
        host.eoi(0, VECTOR)
        host.ack(0, PIN)
        if number < 9_999:
            host.accept(0, VECTOR, pid=100)
        host.enter(0)
    host.line(100, f"kvm_ioapic_delayed_eoi_inj: dst 0 vec {VECTOR} (Fixed|physical|level)")
    run, kinds, _ = replayed(host, tmp_path)
    assert found(run) == [("ioapic-level-storm", "warn", 1, None, PIN)]
    assert run["findings"][0]["val"] == 9_999
    assert run["metrics"]["level_redeliveries"] == kinds["ioapic.eoi"] == 9_999
    assert states(run)["ioapic-level-storm"] == "checked"


def test_remote_irr_that_stays_set(tmp_path: Path) -> None:
    """The entry is rewritten in flight: the EOI of the old vector reaches no pin."""
    host = healthy(Host(), 2)
    host.enter(0)
    host.line_moves(PIN, 1, VECTOR, send_to=0)
    host.leave(0, "EXTERNAL_INTERRUPT")
    host.inject(0, VECTOR)
    host.enter(0)
    host.leave(0, "EPT_MISCONFIG")
    host.line_moves(PIN, 0, 0x33)
    host.enter(0)
    host.leave(0)
    host.eoi(0, VECTOR)
    host.enter(0)
    host.wait(3_000)
    host.leave(0, "HLT")
    run, _, _ = replayed(host, tmp_path)
    assert found(run) == [
        ("ioapic-rte-change-inflight", "warn", 1, None, PIN),
        ("ioapic-remote-irr-stuck", "error", 1, None, PIN),
    ]
    assert run["findings"][1]["observed"] == "remote_irr=1, sent as 0x22, entry now 0x33, line 0"


def test_a_request_that_is_never_injected(tmp_path: Path) -> None:
    host = healthy(Host(), 2)
    host.line_moves(PIN, 1, VECTOR, send_to=1)
    host.enter(1)
    host.wait(2_000)
    host.leave(1, "HLT")
    run, _, _ = replayed(host, tmp_path)
    assert found(run) == [("lapic-irr-stuck", "warn", 1, 1, VECTOR)]


def test_a_shared_line_is_high_while_one_source_holds_it(tmp_path: Path) -> None:
    host = Host()
    host.line_moves(PIN, 0, VECTOR, source=0)
    host.line_moves(PIN, 0, VECTOR, source=1)
    host.line_moves(PIN, 1, VECTOR, source=0, send_to=0)
    host.line_moves(PIN, 1, VECTOR, source=1)
    host.line_moves(PIN, 0, VECTOR, source=0)
    host.line_moves(PIN, 0, VECTOR, source=1)
    _, _, dataset = replayed(host, tmp_path)
    lines = dataset.events().filter(pl.col("kind").cast(pl.String) == "ioapic.line").collect()
    assert lines["val"].to_list() == [0, 1, 1, 1, 0]  # not known before both were seen


def test_hardware_delivery_is_said(tmp_path: Path) -> None:
    """Under APICv neither deliveries nor most EOIs leave a record: nothing may be concluded from their absence."""
    host = Host()
    for _ in range(3):
        host.line_moves(PIN, 1, VECTOR, send_to=0)
        host.line(90, f"kvm_apicv_accept_irq: apicid 0 vec {VECTOR} (Fixed|level)")
        host.enter(0)
        host.leave(0, "EOI_INDUCED")
        host.eoi(0, VECTOR)
        host.ack(0, PIN)
        host.line_moves(PIN, 0, VECTOR)
    run, _, dataset = replayed(host, tmp_path)
    assert found(run) == []
    assert "APICv" in dataset.manifest["facts"]["apic"]
    seen = states(run)
    assert seen["lapic-priority-inversion"] == seen["lapic-irr-stuck"] == "blind"
    assert seen["ioapic-rte-change-inflight"] == "checked"


def test_a_real_host_with_a_small_guest(tmp_path: Path) -> None:
    """Its guest takes the 8259's interrupts only: the pins move, the local APIC does not."""
    ingest([str(SAMPLES / "ftrace-linux-6.1_40-kvm.txt.zst")], tmp_path / "d", IngestOptions())
    dataset = Dataset.open(tmp_path / "d")
    shown = dataset.scan("kvm_ioapic_set_irq").collect()
    assert set(shown["e_sym_3"]) == {"edge"} and "|masked" in set(shown["e_sym_4"])
    (run,) = replay_dataset(dataset, Settings((choose("current"),), ("apic",)))
    assert all(f["severity"] == "info" and f["code"] == "ioapic-edge-lost-masked" for f in run["findings"])


def test_raw_fields_say_the_same(tmp_path: Path) -> None:
    """`trace-cmd report -R` and trace.dat hold numbers where the kernel's text has words."""
    entry = (0 << 56) | (1 << 15) | VECTOR
    lines = [
        (90, "kvm_set_irq", f"gsi={PIN} level=1 irq_source_id=0"),
        (90, "kvm_apic_accept_irq", f"apicid=0x1 dm=0x0 tm=0x1 vec={VECTOR}"),
        (90, "kvm_ioapic_set_irq", f"e={entry:#x} pin={PIN} coalesced=0"),
        (101, "kvm_apic_accept_irq", "apicid=0x2 dm=0x500 tm=0x8000 vec=0"),
        (101, "kvm_entry", "vcpu_id=1 rip=0xffffffff81000000 immediate_exit=0"),
        (101, "kvm_exit", "exit_reason=0x1 guest_rip=0x0 isa=0x1 info1=0x0 info2=0x0 intr_info=0x0 error_code=0x0 "
         "vcpu_id=1"),
        (101, "kvm_inj_virq", f"vector={VECTOR} soft=0 reinjected=0"),
        (101, "kvm_entry", "vcpu_id=1 rip=0xffffffff81000000 immediate_exit=0"),
        (101, "kvm_exit", "exit_reason=0xc guest_rip=0x0 isa=0x1 info1=0x0 info2=0x0 intr_info=0x0 error_code=0x0 "
         "vcpu_id=1"),
        (101, "kvm_eoi", f"apicid=0x1 vector={VECTOR}"),
        (101, "kvm_ack_irq", f"irqchip=0x2 pin={PIN}"),
        (101, "kvm_apic_accept_irq", f"apicid=0x1 dm=0x100 tm=0x1 vec={VECTOR}"),
    ]  # fmt: skip
    path = tmp_path / "report.txt"
    text = "".join(
        f"{'qemu':>16}-{pid:<5d} [{pid % 4:03d}]    78.{10 * n:06d}: {name + ':':<21} {fields}\n"
        for n, (pid, name, fields) in enumerate(lines)
    )
    path.write_text("cpus=4\n" + text)
    ingest([str(path)], tmp_path / "d", IngestOptions())
    events = Dataset.open(tmp_path / "d").events().with_columns(pl.col("kind").cast(pl.String)).collect()
    rows = [(k, v, o, f) for k, v, o, f in events.select("kind", "vcpu", "obj", "flags").iter_rows()]
    assert [r for r in rows if not r[0].startswith("sched.")] == [
        ("ioapic.rte", None, PIN, 0),
        ("ioapic.line", None, PIN, 0),
        ("lapic.accept", 1, VECTOR, 1),
        ("lapic.reset", 2, None, 0),
        ("lapic.deliver", 1, VECTOR, 0),
        ("lapic.idle", 1, None, 0),
        ("lapic.eoi", 1, VECTOR, 0),
        ("ioapic.eoi", None, None, 0),
        ("lapic.accept", 1, VECTOR, 1),
    ]
    rte = events.filter(pl.col("kind") == "ioapic.rte").row(0, named=True)
    assert (rte["val"], rte["val2"]) == (VECTOR, entry)
