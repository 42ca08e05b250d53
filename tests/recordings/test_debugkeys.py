"""Debug-key dumps and /proc snapshots against counts and values taken with plain string operations."""

from __future__ import annotations

import io
import re
from typing import Any

import polars as pl
import pyarrow as pa
import pytest

from parsers.debugkeys import InterruptsReader, LsevtchnReader, TimerListReader, XenConsoleReader
from parsers.debugkeys.grammar import RULES
from parsers.debugkeys.rows import TextReader
from parsers.recording import Note, ReadOptions, RecordingError
from tests.shared import SAMPLES

READERS: tuple[type[TextReader], ...] = (XenConsoleReader, InterruptsReader, TimerListReader, LsevtchnReader)
FILES = {
    "xen-debug-keys.txt.zst": XenConsoleReader,
    "lsevtchn-hvm.txt": LsevtchnReader,
    "proc-interrupts-dom0.txt": InterruptsReader,
    "proc-interrupts-hpet.txt": InterruptsReader,
    "proc-timer_list.txt": TimerListReader,
}


class Read:
    """A snapshot read into memory."""

    def __init__(self, reader: type[TextReader], data: bytes) -> None:
        self.lines = data.decode("latin-1").splitlines()
        self.reader = reader(io.BytesIO(data), ReadOptions())
        self.notes: list[Note] = []
        self.tables: dict[str, pl.DataFrame] = {}
        parts: dict[str, list[pa.Table]] = {}
        for chunk in self.reader.chunks():
            self.notes += chunk.notes
            for name, table in chunk.tables.items():
                assert table.schema.equals(self.reader.tables[name].schema())
                parts.setdefault(name, []).append(table)
        for name, tables in parts.items():
            frame = pl.from_arrow(pa.concat_tables(tables))
            assert isinstance(frame, pl.DataFrame)
            self.tables[name] = frame


def sample(name: str) -> bytes:
    path = SAMPLES / name
    compression = "zstd" if path.suffix == ".zst" else None
    data: bytes = pa.input_stream(str(path), compression=compression).read()
    return data


def load(name: str) -> Read:
    return Read(FILES[name], sample(name))


@pytest.mark.parametrize("name", FILES)
def test_one_reader_takes_it_and_every_line_is_in_some_table(name: str) -> None:
    data = sample(name)
    assert [r for r in READERS if r.sniff(data[: 64 << 10])] == [FILES[name]]
    read = Read(FILES[name], data)
    seqs = set().union(*(set(t["seq"]) for t in read.tables.values()))
    assert seqs == set(range(len(read.lines)))
    account = read.reader.accounting
    assert account.total == len(data) == account.parsed + account.skipped
    others = read.tables.get("other")
    assert account.skipped == (0 if others is None else others["length"].sum())
    assert read.reader.counts == {name: t.height for name, t in read.tables.items()}


def test_debug_key_counts() -> None:
    read = load("xen-debug-keys.txt.zst")
    patterns = {
        "evtchn": r"\]: s=\d",
        "irq": r"\(XEN\)    IRQ:",
        "irq_guest": r" d0:",
        "ioapic_irq": r"Apic 0x",
        "ioapic_rte": r"\(XEN\)  [0-9a-f]{2}  \d\d  ",
        "msi": r" dest=\d{8} mask=",
        "direct_vector": r"0x\w\w -> ",
        "irq_pin": r"IRQ\d+ -> ",
        "timer": r"ex=",
        "cstate": r"duration\[",
        "cpu_current": r"current=",
        "sched_unit": r"credit=",
    }
    for table, pattern in patterns.items():
        expected = [i for i, line in enumerate(read.lines) if re.search(pattern, line)]
        assert read.tables[table]["seq"].to_list() == expected, table
        assert set(read.tables[table]["snapshot"]) == {0}


def test_dumps_are_numbered() -> None:
    data = sample("xen-debug-keys.txt.zst")
    once, thrice = Read(XenConsoleReader, data), Read(XenConsoleReader, data * 3)
    for name, table in once.tables.items():
        if name != "other":
            counts = thrice.tables[name].group_by("snapshot").len().sort("snapshot").rows()
            assert counts == [(n, table.height) for n in range(3)], name


def test_event_channels_of_both_abis() -> None:
    evtchn = load("xen-debug-keys.txt.zst").tables["evtchn"]
    assert dict(evtchn.group_by("dom").agg(pl.col("abi").unique()).iter_rows()) == {0: ["fifo"], 1: ["2l"]}
    guest = evtchn.filter(dom=1)
    assert guest.filter(pl.col("masked"))["port"].to_list() == [3, 4, 5]
    assert not guest["selector"].any()
    dom0 = evtchn.filter(dom=0)
    assert dom0.filter(pl.col("linked"))["port"].to_list() == [61, 65]
    assert dom0.filter(pl.col("linked"))["link"].to_list() == [0, 0]
    assert dom0.filter(pl.col("pending") & ~pl.col("masked"))["port"].to_list() == [61, 65]
    pirq = dom0.filter(port=33).row(0, named=True)
    assert (pirq["state"], pirq["pirq"], pirq["irq"], pirq["vcpu"]) == ("pirq", 647, 27, 1)
    # Both ends of every interdomain channel name each other.
    ends = {(r["dom"], r["port"]): (r["remote_dom"], r["remote_port"])
            for r in evtchn.filter(state="interdomain").iter_rows(named=True)}  # fmt: skip
    assert len(ends) == 26
    assert all(ends[other] == end for end, other in ends.items())


def test_ioapic_views_agree() -> None:
    """Keys i and z read the same registers: vector, mask, trigger mode and destination agree pin by pin."""
    tables = load("xen-debug-keys.txt.zst").tables
    by_irq = tables["ioapic_irq"].select("pin", "vector", "masked", "dest", level=pl.col("trigger") == "L").sort("pin")
    by_pin = tables["ioapic_rte"].select("pin", "vector", "masked", "dest", "level")
    joined = by_pin.join(by_irq.select("pin"), on="pin").sort("pin")
    assert joined.height == 15
    assert joined.equals(by_irq.select(joined.columns))
    irq = tables["irq"].join(tables["ioapic_irq"], on=["irq", "vector"])
    assert irq.height == 15


def test_timers_and_cstates_name_their_cpu() -> None:
    tables = load("xen-debug-keys.txt.zst").tables
    assert tables["timer"].group_by("cpu", maintain_order=True).len().rows() == [(0, 6), (1, 2), (2, 1), (3, 3)]
    assert tables["timer"].filter(pl.col("expires_us") < 0)["expires_us"].to_list() == [-7788]
    c3 = tables["cstate"].filter(index=3)
    assert c3["cpu"].to_list() == [0, 1, 2, 3]
    assert c3["usage"].to_list() == [11524, 14041, 12111, 12731]
    assert tables["xen_now"]["now_ns"].to_list() == [272276579327]


#: Written from Xen's printk formats; no recording holds these keys.
UNTRIED = """\
(XEN) [  272.000001] 'q' pressed -> dumping domain info (now = 272276579327)
(XEN) [  272.000002] General information for domain 1:
(XEN) [  272.000003]     refcnt=3 dying=0 pause_count=0
(XEN) [  272.000004] VCPU information and callbacks for domain 1:
(XEN) [  272.000005]   UNIT0 affinities: hard={0-3} soft={0-3}
(XEN) [  272.000006]     VCPU0: CPU3 [has=T] poll=0 upcall_pend=01 upcall_mask=00 dirty_cpu=3
[  100.0] a line of dom0 in between
(XEN) [  272.000005]     pause_count=0 pause_flags=1
(XEN) [  272.000006] GICH_LRs (vcpu 0) mask=3
(XEN) [  272.000007]    VCPU_LR[0]=9a04f04f
(XEN) [  272.000007] Inflight irq=79 lr=0
(XEN) [  272.000007] Pending irq=27
(XEN) [  272.000008] Notifying guest 1:0 (virq 1, port 7)
(XEN) [  272.000009] 'I' pressed -> dumping HVM irq info
(XEN) [  272.000010] Domain 1:
(XEN) [  272.000011] PCI 0x00000000000000000000000000001000 ISA 0x00000100 ROUTE 5 10 11 5
(XEN) [  272.000012] GSI [18 - 1f] 01 00 00 00 00 00 00 00
(XEN) [  272.000013] Link 00 00 01 00
(XEN) [  272.000014] Callback via 2:0x3, not asserted
(XEN) [  272.000015] 'e' pressed -> dumping event-channel info
(XEN) [  272.000016] Event channel information for domain 1:
(XEN) [  272.000017]        5 [1/0/1]: s=3 n=1 x=0 d=0 p=57
(XEN) [  272.000018] 'e' pressed -> dumping event-channel info
(XEN) [  272.000019] Event channel information for domain 1:
(XEN) [  272.000020]        5 [1/0/1]: s=2 n=1 x=0 d=7
(XEN) [  272.000021]        6 [0/1/B 9    ]: s=6 n=1 x=0
(XEN) [  272.000022]        7 [0/1/0]: s=6 n=99999 x=0
"""


def test_grammar_of_keys_without_a_recording() -> None:
    read = Read(XenConsoleReader, UNTRIED.encode())

    def values(table: str, *columns: str) -> list[tuple[Any, ...]]:
        return read.tables[table].select(columns).rows()

    assert values("vcpu", "dom", "vcpu", "cpu", "running", "upcall_pending", "upcall_mask") == [(1, 0, 3, "T", 1, 0)]
    assert values("vcpu_pause", "dom", "vcpu", "pause_flags") == [(1, 0, 1)]
    assert values("gich_mask", "dom", "vcpu", "mask") == [(1, 0, 3)]
    assert values("gich_lr", "dom", "vcpu", "place", "lr", "value") == [(1, 0, "VCPU", 0, 0x9A04F04F)]
    assert values("vgic_irq", "vcpu", "list", "irq", "lr") == [(0, "Inflight", 79, 0), (0, "Pending", 27, None)]
    assert values("unit_affinity", "dom", "unit", "hard") == [(1, 0, "0-3")]
    assert values("virq_notified", "dom", "vcpu", "virq", "port") == [(1, 0, 1, 7)]
    assert values("hvm_irq", "dom", "pci_intx", "pci_intx_low", "isa", "route") == [(1, 0, 0x1000, 0x100, "5 10 11 5")]
    assert values("hvm_gsi", "dom", "first", "last", "counts") == [(1, 24, 31, "01 00 00 00 00 00 00 00")]
    assert values("hvm_callback", "dom", "via", "number", "asserted") == [(1, "2", "0x3", "not")]
    assert values("evtchn", "snapshot", "dom", "port", "selector", "busy", "link", "remote_dom", "remote_port") == [
        (0, 1, 5, True, None, None, 0, 57),
        (1, 1, 5, True, None, None, 7, None),
        (1, 1, 6, None, True, 9, None, None),
    ]
    assert read.tables["other"]["seq"].to_list() == [6, 26]  # dom0's line; a vCPU number that does not fit
    # Stamps of the console: microseconds since boot, held when neighbours are swapped.
    assert read.reader.clock.kind == "us"
    assert values("vcpu_pause", "tsc", "t_ns") == [(272000006, 5000)]
    assert values("other", "tsc", "t_ns", "t_err_ns")[0] == (None, 5000, None)  # after the line before it
    untried = {rule.table for rule in RULES if not rule.tried}
    assert untried >= {"vcpu", "hvm_irq", "hvm_gsi", "hvm_callback"}


def test_a_dump_pasted_without_prefix() -> None:
    text = UNTRIED.replace("[  100.0] a line of dom0 in between\n", "")
    bare = "".join(line[21:] + "\n" for line in text.splitlines())
    assert XenConsoleReader.sniff(bare.encode())
    with_prefix, without = Read(XenConsoleReader, text.encode()), Read(XenConsoleReader, bare.encode())
    assert without.reader.counts == with_prefix.reader.counts
    assert without.tables["evtchn"]["port"].to_list() == [5, 5, 6]


@pytest.mark.parametrize(("name", "cpus"), [("proc-interrupts-dom0.txt", 2), ("proc-interrupts-hpet.txt", 4)])
def test_interrupts(name: str, cpus: int) -> None:
    read = load(name)
    rows = [line.split() for line in read.lines[1:]]
    counts = {
        (row[0][:-1], cpu): int(row[1 + cpu]) for row in rows if row[0] not in ("ERR:", "MIS:") for cpu in range(cpus)
    }
    got = read.tables["interrupt_count"].filter(pl.col("cpu").is_not_null())
    assert {(r["label"], r["cpu"]): r["count"] for r in got.iter_rows(named=True)} == counts
    lines = read.tables["interrupt"]
    assert lines.height == len(rows)
    assert lines["total"].sum() == sum(counts.values())
    numbered = lines.filter(pl.col("irq").is_not_null())
    assert numbered["actions"].to_list() == [row[-1] for row in rows if row[0][:-1].isdigit()]
    assert numbered["chip"].null_count() == 0


def test_interrupts_chip_columns() -> None:
    hpet = load("proc-interrupts-hpet.txt").tables["interrupt"]
    row = hpet.filter(label="25").row(0, named=True)
    assert (row["chip"], row["hwirq"], row["flow"], row["actions"]) == ("HPET-MSI", 4, "edge", "hpet4")
    dom0 = load("proc-interrupts-dom0.txt").tables["interrupt"]
    row = dom0.filter(label="30").row(0, named=True)
    assert (row["chip"], row["hwirq"], row["flow"], row["actions"]) == ("xen-percpu", None, "virq", "timer1")
    arm = "           CPU0       CPU1       \n 12:  0  1     GICv2  27 Level     kvm guest vtimer\nErr:          0\n"
    read = Read(InterruptsReader, (arm * 2).encode())
    rows = read.tables["interrupt"].select("snapshot", "chip", "hwirq", "flow", "actions").rows()
    assert rows[0] == (0, "GICv2", 27, "Level", "kvm guest vtimer")
    assert rows[2] == (1, "GICv2", 27, "Level", "kvm guest vtimer")


def test_timer_list() -> None:
    read = load("proc-timer_list.txt")
    devices = read.tables["clock_event_device"]
    assert devices.select("role", "cpu", "device", "mode", "retries").rows()[:3] == [
        ("broadcast", None, "hpet", 1, 0), ("per-cpu", 0, "hpet3", 3, 24), ("per-cpu", 1, "hpet4", 3, 29),
    ]  # fmt: skip
    assert devices["next_event_ns"].to_list() == [
        int(line.split()[1]) for line in read.lines if line.strip().startswith("next_event:")
    ]
    timers = read.tables["hrtimer"]
    assert timers["function"].to_list() == [line.split(", ")[1] for line in read.lines if re.match(r" #\d+: ", line)]
    expires = [line.split()[3].split("-") for line in read.lines if "# expires at" in line]
    assert timers["hard_ns"].to_list() == [int(hard) for _, hard in expires]
    assert timers["cpu"].n_unique() == 4
    assert read.reader.clock.tsc0 == 52621101116
    assert set(timers["tsc"]) == {52621101116}
    masks = read.tables["timer_value"].filter(object="broadcast")
    assert masks.select("name", "text").rows() == [("tick_broadcast_mask", "0"), ("tick_broadcast_oneshot_mask", "0")]


def test_lsevtchn_agrees_with_the_debug_key() -> None:
    tool = load("lsevtchn-hvm.txt").tables["lsevtchn"]
    key = load("xen-debug-keys.txt.zst").tables["evtchn"].filter(dom=1)
    both = tool.join(key, on="port")
    assert both.height == tool.height == 9
    for column in ("state", "remote_dom", "remote_port", "vcpu"):
        assert both[column].to_list() == both[f"{column}_right"].to_list()
    twice = b"   1: VCPU 0: Virtual IRQ 0\n   2: VCPU 0: IPI\n"
    twice += b"   3: VCPU 1: Interdomain (Waiting connection) - Remote Domain 7\n"
    rows = (
        Read(LsevtchnReader, twice * 2)
        .tables["lsevtchn"]
        .select("snapshot", "port", "state", "virq", "remote_dom")
        .rows()
    )
    assert rows[:3] == [(0, 1, "virq", 0, None), (0, 2, "ipi", None, None), (0, 3, "unbound", None, 7)]
    assert [row[0] for row in rows] == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("reader", READERS)
def test_something_else_is_refused(reader: type[TextReader]) -> None:
    with pytest.raises(RecordingError):
        reader(io.BytesIO(b"hello\nworld\n"), ReadOptions())
