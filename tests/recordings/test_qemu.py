"""QEMU logs against counts and values taken with plain string operations, not with the reader's declarations."""

from __future__ import annotations

import gzip
import io
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from parsers.qemu import QemuReader
from parsers.qemu.events import EVENTS
from parsers.recording import Chunk, Note, ReadOptions, RecordingError
from tests.shared import SAMPLES, shared_path

SAMPLE_LOGS = ("qemu-x86-hpet.log.gz", "qemu-x86-ioapic.log.gz", "qemu-arm64-gic.log.gz")
FULL_LOGS = ("recordings/qemu/linux-x86-ioapic-hpet.log.gz", "recordings/qemu/xen-arm64-gic.log.gz")


class Read:
    """A whole recording read into memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.lines = data.decode("latin-1").splitlines()
        self.reader = QemuReader(io.BytesIO(data), ReadOptions(source="log"))
        self.notes: list[Note] = []
        self.chunks: list[Chunk] = []
        tables: dict[str, list[pa.Table]] = {}
        for chunk in self.reader.chunks():
            self.chunks.append(chunk)
            self.notes += chunk.notes
            for name, table in chunk.tables.items():
                assert table.schema.equals(self.reader.tables[name].schema(), check_metadata=False)
                tables.setdefault(name, []).append(table)
        self.arrow = {name: pa.concat_tables(parts) for name, parts in tables.items()}
        self.tables: dict[str, pl.DataFrame] = {}
        for name, table in self.arrow.items():
            frame = pl.from_arrow(table)
            assert isinstance(frame, pl.DataFrame)
            self.tables[name] = frame

    def grep(self, text: str) -> list[str]:
        return [line for line in self.lines if text in line]


_CACHE: dict[Path, Read] = {}


def load(path: Path) -> Read:
    if path not in _CACHE:
        _CACHE[path] = Read(gzip.decompress(path.read_bytes()))
    return _CACHE[path]


@pytest.fixture(params=[*SAMPLE_LOGS, *FULL_LOGS])
def log(request: pytest.FixtureRequest) -> Iterator[Read]:
    name = request.param
    yield load(SAMPLES / name if "/" not in name else shared_path(name))


def test_every_event_is_counted_and_has_its_table(log: Read) -> None:
    expected = Counter(re.match(r"\d+@[\d.]+:(\w+)", line)[1] for line in log.lines)  # type: ignore[index]
    assert log.reader.counts == expected
    assert {name: table.height for name, table in log.tables.items() if name in EVENTS} == expected
    assert log.reader.accounting.total == log.reader.accounting.parsed == len(log.data)
    assert not log.notes


def test_seq_is_the_line_order_without_holes(log: Read) -> None:
    raw = pl.concat([t.select("seq", "t_ns", "offset", "tsc") for n, t in log.tables.items() if n in EVENTS]).sort(
        "seq"
    )
    assert raw["seq"].to_list() == list(range(len(log.lines)))
    assert (raw["offset"] == raw["seq"] + 1).all()
    assert (raw["t_ns"].diff().drop_nulls() >= 0).all()
    stamps = [int(line[line.index("@") + 1 : line.index(":")].replace(".", "")) for line in log.lines]
    assert raw["tsc"].to_list() == stamps
    assert raw["t_ns"].to_list() == [(s - stamps[0]) * 1000 for s in stamps]  # these logs never step back
    last = -1
    for chunk in log.chunks:
        seqs = [s for t in chunk.tables.values() for s in (t["seq"][0].as_py(), t["seq"][-1].as_py())]
        assert min(seqs) > last
        last = max(seqs)


def test_arguments_print_back_to_the_line(log: Read) -> None:
    """Every line is rebuilt from its row and the template: no value was lost, shifted or rounded."""
    shown = {
        "ioapic_set_irq": "vector: {pin} level: {level}",
        "apic_deliver_irq": "dest {dest} dest_mode {dest_mode} delivery_mode {delivery_mode} vector {vector}"
        " trigger_mode {trigger_mode}",
        "apic_mem_writel": "0x{reg_offset:x} = 0x{value:08x}",
        "memory_region_ops_write": "cpu {by} mr 0x{mr:x} addr 0x{addr:x} value 0x{value:x} size {size} name '{name}'",
        "ioapic_mem_write": "ioapic mem write addr 0x{reg_offset:x} regsel: 0x{regsel:x} size 0x{size:x}"
        " val 0x{value:x}",
        "gic_update_bestirq": "{iface} {core} irq {irq} priority {priority} cpu priority mask {pmr}"
        " cpu running priority {running}",
        "gic_update_set_irq": "{cpu_name}[{core}]: {wire} = {level}",
        "gic_set_irq": "irq {irq} level {level} cpumask 0x{cpumask:x} target 0x{target:x}",
        "gic_hyp_write": "hyp write at 0x{reg_offset:08x}: 0x{value:08x}",
        "gic_dist_write": "dist write at 0x{reg_offset:08x} size {size}: 0x{value:08x}",
        "gic_cpu_read": "{iface} {core} iface read at 0x{reg_offset:08x}: 0x{value:08x}",
    }
    checked = 0
    for name, form in shown.items():
        for row in log.tables.get(name, pl.DataFrame()).head(20000).iter_rows(named=True):
            line = log.lines[row["seq"]]
            assert line == f"{row['tid']}@{line.split('@')[1].split(':')[0]}:{name} {form.format(**row)}"
            checked += 1
    assert checked > 3000


def test_thread_to_cpu(log: Read) -> None:
    """The CPU of a thread is the one that its own lines name; threads that never name one have none."""
    named: dict[str, set[int]] = {}
    for line in log.lines:
        tid, rest = line.split("@")[0], line.split(":", 1)[1]
        hit = re.match(r"(?:memory_region_ops_\w+|gic_acknowledge_irq|gic_cpu_\w+) v?cpu (\d+) ", rest)
        named.setdefault(tid, set()).update({int(hit[1])} if hit else set())
    raw = pl.concat([t.select("tid", "cpu") for n, t in log.tables.items() if n in EVENTS])
    got = {str(t): set(c) - {None} for t, c in raw.group_by("tid").agg(pl.col("cpu").unique()).iter_rows()}
    assert got == named
    assert any(not cpus for cpus in got.values())
    assert all(raw.filter(pl.col("tid") == int(t))["cpu"].null_count() == 0 for t, cpus in named.items() if cpus)


def test_lapic_and_messages() -> None:
    log = load(SAMPLES / "qemu-x86-ioapic.log.gz")
    lapic = log.tables["lapic_reg"]
    eoi = lapic.filter(pl.col("write") & (pl.col("reg") == "EOI"))
    assert eoi.height == len(log.grep("apic_mem_writel 0xb0 = "))
    # The register write is logged without its CPU; the window write just before it on the same thread names it.
    for cpu in range(4):
        expected = sum(" addr 0xfee000b0 " in line for line in log.grep(f"memory_region_ops_write cpu {cpu} "))
        assert eoi.filter(pl.col("cpu") == cpu).height == expected > 0
    messages = log.tables["msi_write"]
    assert messages.height == sum(" addr 0xfee0" in x and not re.search(r"addr 0xfee00\w\w0 ", x) for x in log.lines)
    # Every message is followed on the same thread by the bus transaction that it becomes.
    bus = log.tables["apic_deliver_irq"].with_columns(kind=pl.lit(1))
    both = pl.concat([messages.with_columns(kind=pl.lit(0)), bus], how="diagonal_relaxed").sort("seq")
    pairs = both.with_columns(pl.col("vector", "dest", "trigger_mode", "kind").shift(-1).over("tid").name.prefix("n_"))
    sent = pairs.filter((pl.col("kind") == 0) & (pl.col("n_kind") == 1))
    assert sent.height >= messages.height - 1
    assert (sent["vector"] == sent["n_vector"]).all()
    assert (sent["dest"] == sent["n_dest"]).all()
    assert (sent["trigger_mode"] == sent["n_trigger_mode"]).all()


def test_ioapic_entries() -> None:
    log = load(SAMPLES / "qemu-x86-ioapic.log.gz")
    ioapic = log.tables["ioapic_reg"]
    low = ioapic.filter(pl.col("reg") == "RTE_LO")
    expected = [
        (int(m[1], 16) - 16) // 2
        for line in log.lines
        if (m := re.search(r"addr 0x10 regsel: 0x(\w*[02468ace]) ", line))
    ]
    assert low["pin"].to_list() == expected
    assert set(low["pin"]) == {11}
    written = [int(line.rsplit("0x", 1)[1], 16) & 0xFF for line in log.grep("addr 0x10 regsel: 0x26 ")]
    assert low["vector"].to_list() == written
    # Remote IRR is set and cleared in turn, and the EOI names the vector of the entry.
    irr = pl.concat([
        log.tables["ioapic_set_remote_irr"].select("seq", "pin", up=pl.lit(True)),
        log.tables["ioapic_clear_remote_irr"].select("seq", "pin", up=pl.lit(False)),
    ]).sort("seq")  # fmt: skip
    assert irr.height == len(log.grep("remote irr for pin"))
    high = ioapic.filter(pl.col("reg") == "RTE_HI")
    assert set(high["dest"]) <= {1, 2, 4, 8} and len(set(high["dest"])) > 1  # affinity is rotated, flat logical


def test_hpet_comparators() -> None:
    log = load(SAMPLES / "qemu-x86-hpet.log.gz")
    hpet = log.tables["hpet_reg"]
    assert hpet.height == len(log.grep("name 'hpet'"))
    assert hpet.height > 1000
    compare = hpet.filter((pl.col("reg") == "TN_CMP") & ~pl.col("high"))
    for timer in range(3):
        lines = log.grep(f" addr 0x{0xFED00108 + 0x20 * timer:x} ")
        values = [int(re.search(r"value 0x(\w+)", x)[1], 16) for x in lines]  # type: ignore[index]
        assert compare.filter(pl.col("timer") == timer)["value"].to_list() == values


def test_hpet_configuration_and_message_route() -> None:
    """Three writes as in the log of a machine whose comparators deliver messages (HPET 1.0a, 2.3.8 and 2.3.11)."""
    writes = {0x010: 0x3, 0x120: 0x400C, 0x130: 0x4031, 0x134: 0xFEE02004, 0x12C: 0x7}
    form = "1@1795238175.000000:memory_region_ops_write cpu 1 mr 0x1 addr 0x{:x} value 0x{:x} size 4 name 'hpet'\n"
    log = read_text("".join(form.format(0xFED00000 + off, value) for off, value in writes.items()))
    got = log.tables["hpet_reg"].select(
        "reg", "timer", "high", "enable", "legacy", "int_enable", "periodic", "fsb", "vector", "dest", "dest_mode"
    )
    assert got.rows() == [
        ("GENERAL_CONFIG", None, False, True, True, None, None, None, None, None, None),
        ("TN_CONFIG", 1, False, None, None, True, True, True, None, None, None),
        ("TN_FSB_VALUE", 1, False, None, None, None, None, None, 0x31, None, None),
        ("TN_FSB_ADDR", 1, False, None, None, None, None, None, None, 2, 1),
        ("TN_CMP", 1, True, None, None, None, None, None, None, None, None),
    ]


def test_gic_registers() -> None:
    log = load(SAMPLES / "qemu-arm64-gic.log.gz")
    dist = log.tables["gicd_reg"]
    move = dist.filter((pl.col("reg") == "ITARGETSR") & (pl.col("irq_first") == 79))
    assert move["value"].to_list() == [2, 4, 8]
    assert move["irq_count"].to_list() == [1, 1, 1]
    assert move["size"].to_list() == [1, 1, 1]
    sgir = dist.filter(pl.col("reg") == "SGIR")
    expected = [int(x.rsplit("0x", 1)[1], 16) for x in log.grep("dist write at 0x00000f00")]
    assert sgir["sgi"].to_list() == [v & 15 for v in expected]
    assert sgir["sgi_targets"].to_list() == [v >> 16 & 255 for v in expected]
    hyp = log.tables["gich_reg"].filter(pl.col("write"))
    entries = hyp.filter(pl.col("reg") == "LR")
    lines = [x for x in log.lines if re.search(r"gic_hyp_write hyp write at 0x000001", x)]
    assert entries.height == len(lines)
    disk = entries.filter(pl.col("virq") == 79, pl.col("state") != 0)
    assert (
        disk.height
        == sum(
            int(x.rsplit("0x", 1)[1], 16) & 0x3FF == 79 and int(x.rsplit("0x", 1)[1], 16) >> 28 & 3 > 0 for x in lines
        )
        > 0
    )
    assert set(disk["hw"]) == {True} and set(disk["pirq"]) == {79}
    cpu = log.tables["gicc_reg"]
    taken = cpu.filter((pl.col("reg") == "IAR") & ~pl.col("virtual"))
    acks = [int(x.rsplit(" ", 1)[1]) for x in log.lines if re.search(r"gic_acknowledge_irq cpu \d", x)]
    assert taken["irq"].to_list() == acks
    assert (taken["cpu"] == taken["core"]).all()


LINE = "7@1795238175.{:06d}:ioapic_set_irq vector: 4 level: 1\n"


def read_text(text: str) -> Read:
    return Read(text.encode())


def test_stamps_that_step_back_are_held() -> None:
    log = read_text(LINE.format(100) + LINE.format(97) + LINE.format(98) + LINE.format(101))
    table = log.tables["ioapic_set_irq"]
    assert table["t_ns"].to_list() == [0, 0, 0, 1000]
    assert set(table["t_err_ns"]) == {999}
    assert [n.code for n in log.notes] == ["qemu-stamp-back"]


def test_clock_set_back_and_one_wild_stamp() -> None:
    back = "7@1795230000.{:06d}:ioapic_set_irq vector: 4 level: 1\n"
    log = read_text(LINE.format(0) + LINE.format(5) + back.format(10) + back.format(12))
    assert log.tables["ioapic_set_irq"]["t_ns"].to_list() == [0, 5000, 5000, 7000]
    assert "qemu-clock-step" in {n.code for n in log.notes}
    wild = "7@8999999999.000000:ioapic_set_irq vector: 4 level: 1\n"
    log = read_text(LINE.format(0) + wild + LINE.format(5))
    assert log.tables["ioapic_set_irq"]["t_ns"].to_list() == [0, 0, 5000]
    assert "qemu-stamp-wild" in {n.code for n in log.notes}


def test_without_stamps_only_the_order_is_known() -> None:
    text = "ioapic_set_irq vector: 4 level: 1\nioapic_eoi_broadcast EOI broadcast for vector 34\n"
    assert QemuReader.sniff(text.encode())
    log = read_text(text)
    assert log.reader.clock.kind == "none"
    assert log.tables["ioapic_eoi_broadcast"]["t_ns"].to_list() == [1]
    assert log.tables["ioapic_eoi_broadcast"]["tsc"].to_list() == [None]
    assert [n.code for n in log.notes] == ["qemu-no-stamps"]


def test_single_threaded_emulation_names_the_cpu_line_by_line() -> None:
    apic = "memory_region_ops_write cpu {} mr 0x1 addr 0xfee000b0 value 0x0 size 4 name 'apic-msi'"
    rows = [apic.format(0), "apic_mem_writel 0xb0 = 0x00000000", apic.format(2), "apic_mem_writel 0xb0 = 0x00000000"]
    log = read_text("".join(f"7@1795238175.{i:06d}:{row}\n" for i, row in enumerate(rows)))
    assert log.tables["lapic_reg"]["cpu"].to_list() == [0, 2]
    assert [n.code for n in log.notes] == ["qemu-shared-thread"]


def test_what_does_not_fit_is_kept() -> None:
    text = (
        LINE.format(0)
        + "7@1795238175.000001:ioapic_set_irq vector: 4 level: 1 extra\n"
        + "7@1795238175.000002:ioapic_set_irq vector: 70000 level: 1\n"
        + "qemu-system-x86_64: terminating\n"
        + "7@1795238175.000003:virtio_notify vdev 0x1 vq 0x2\n"
        + "7@1795238175.000004:ioapic_set_irq vec"
    )
    log = read_text(text)
    assert log.tables["unparsed"]["text"].to_list() == [log.lines[i] for i in (1, 2, 3, 5)]
    assert log.tables["unparsed"]["t_err_ns"].to_list() == [None] * 4
    assert log.tables["qemu_event"]["args"].to_list() == ["vdev 0x1 vq 0x2"]
    assert log.reader.counts == {"ioapic_set_irq": 1, "virtio_notify": 1}
    skipped = sum(len(log.lines[i]) + 1 for i in (1, 2, 3, 5)) - 1
    assert log.reader.accounting.skipped == skipped
    assert log.reader.accounting.total == len(text)
    assert [g.reason for c in log.chunks for g in c.gaps] == ["truncated"]


def test_not_a_log_is_refused() -> None:
    assert not QemuReader.sniff(b"\x7fELF" + bytes(100))
    with pytest.raises(RecordingError):
        QemuReader(io.BytesIO(b"hello\n"), ReadOptions())
