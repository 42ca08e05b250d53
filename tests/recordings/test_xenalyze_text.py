"""xenalyze dumps and xentrace_format texts against the binary recordings they were made from, record by record."""

from __future__ import annotations

import io
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from parsers.recording import Note, ReadOptions, RecordingError
from parsers.xenalyze import ClassicReader, XenalyzeReader
from parsers.xenalyze.grammar import PATTERNS
from parsers.xenalyze.words import TABLES
from parsers.xentrace.reader import XentraceReader
from tests.shared import SAMPLES, shared_path

#: Columns that a dump does not carry: null in the text's table although the binary has them.
NOT_PRINTED: dict[str, set[str]] = {
    "TRC_CSCHED2_CREDIT_BURN": {"budget"},  # left out without a cap
    "TRC_CSCHED2_SCHEDULE": {"smt_idle"},  # only printed when idle
    "TRC_CSCHED2_UPDATE_RUNQ_LOAD": {"shift"},
    "TRC_CSCHED2_UPDATE_UNIT_LOAD": {"shift"},
    "TRC_HW_IRQ_ASSIGN_VECTOR": {"cpumask2"},  # its upper word is lost
    "TRC_PM_IDLE_ENTRY": {"tick", "expected_us", "predicted_us"},
    "TRC_PM_IDLE_EXIT": {"tick", "irr0", "irr1", "irr2", "irr3"},
    "TRC_PV_HYPERCALL_V2": {"present"},
    "TRC_SCHED_SWITCH_INFNEXT": {"slice_ns"},  # left out when not positive
    "TRC_HVM_VMENTRY": {"nested"},
    "TRC_HVM_VMEXIT": {"event", "wide", "nested"},
}
#: Records of the collector and of the ring, which no text shows.
NOT_IN_TEXT = {"TRC_TRACE_CPU_CHANGE", "TRC_TRACE_WRAP_BUFFER"}
FRAMES = dict[str, pl.DataFrame]


def read_bytes(path: Path) -> bytes:
    data: bytes = pa.input_stream(str(path), compression="zstd" if path.suffix == ".zst" else None).read()
    return data


def read(reader: XenalyzeReader | ClassicReader | XentraceReader) -> tuple[FRAMES, list[Note]]:
    """All tables and notes of a recording."""
    parts: dict[str, list[pa.Table]] = {}
    notes: list[Note] = []
    last = -1
    for chunk in reader.chunks():
        notes += chunk.notes
        for name, table in chunk.tables.items():
            assert table.schema.equals(reader.tables[name].schema())
            parts.setdefault(name, []).append(table)
        seqs = [s for t in chunk.tables.values() for s in (t["seq"][0].as_py(), t["seq"][-1].as_py())]
        assert not seqs or min(seqs) > last
        last = max(seqs, default=last)
    frames: FRAMES = {}
    for name, tables in parts.items():
        frame = pl.from_arrow(pa.concat_tables(tables))
        assert isinstance(frame, pl.DataFrame)
        frames[name] = frame
    return frames, notes


def compare(binary: FRAMES, text: FRAMES, first_tsc: int, slack: int, not_printed: dict[str, set[str]]) -> int:
    """Both have the same records on each CPU in order; whatever the text carries is equal. Gives their number."""
    records = 0
    assert set(binary) - NOT_IN_TEXT == {name for name in text if name.startswith("TRC_")} - NOT_IN_TEXT
    for name in sorted(set(binary) - NOT_IN_TEXT):
        want, got = (frames[name].sort("cpu", "seq") for frames in (binary, text))
        assert got["cpu"].to_list() == want["cpu"].to_list(), name
        late = want["tsc"].cast(pl.Int64) - first_tsc - got["tsc"].cast(pl.Int64)
        assert got["tsc"].null_count() == want["tsc"].null_count(), name
        if late.null_count() < late.len():
            assert late.min() >= 0 and late.max() <= slack, name  # type: ignore[operator]
        for column in want.columns[7:]:
            carried = got[column].is_not_null()
            missing = int((~carried & want[column].is_not_null()).sum())
            assert missing == 0 or column in not_printed.get(name, set()), f"{name}.{column}: {missing} missing"
            assert got[column].filter(carried).to_list() == want[column].filter(carried).to_list(), f"{name}.{column}"
        records += want.height
    return records


DUMPS = {
    "xen-2l/dom0-idle": (".xentrace", None),
    "xen-2l/dom0-light": (".xentrace.zst", None),
    "xen-pvh/pvh-hvm-mask": (".xentrace", 2596155000.0),  # no irq_handled: the scale has to be told
}


@pytest.mark.parametrize("name", DUMPS)
def test_dump_agrees_with_the_binary(name: str) -> None:
    suffix, hz = DUMPS[name]
    binary, _ = read(XentraceReader(io.BytesIO(read_bytes(shared_path(f"recordings/{name}{suffix}"))), ReadOptions()))
    data = read_bytes(shared_path(f"recordings/{name}.dump.txt.zst"))
    reader = XenalyzeReader(io.BytesIO(data), ReadOptions(cpu_hz=hz))
    text, notes = read(reader)
    shown = {name: table for name, table in binary.items() if name not in NOT_IN_TEXT}
    first = min(tsc for table in shown.values() for tsc in table["tsc"].drop_nulls().to_list())
    assert compare(binary, text, first, 2, NOT_PRINTED) == sum(table.height for table in shown.values())
    assert "xenalyze_text" not in text
    assert not [n for n in notes if n.code in ("xenalyze-text", "xenalyze-unparsed", "xenalyze-cut")]
    # Every line has its place: records and the rest are the lines of the file, in order.
    seqs = pl.concat([t.select("seq") for t in text.values()])["seq"].sort()
    assert seqs.to_list() == list(range(data.count(b"\n")))
    assert reader.accounting.total == reader.accounting.parsed == len(data)


#: Words that the stock formats file does not print.
NOT_IN_TEMPLATE: dict[str, set[str]] = {
    "TRC_CSCHED2_RUNQ_CANDIDATE": {"credit"},  # printed by a template of two words
    "TRC_HW_IRQ_ASSIGN_VECTOR": {"cpumask1", "cpumask2"},
    "TRC_PV_HYPERCALL_V2": {"present", "a0", "a1", "a2"},
}


def test_classic_text_agrees_with_the_binary() -> None:
    binary, _ = read(XentraceReader(io.BytesIO(read_bytes(SAMPLES / "xen-2l-dom0-idle.xentrace")), ReadOptions()))
    data = read_bytes(SAMPLES / "xentrace_format-dom0-idle.txt.zst")
    reader = ClassicReader(io.BytesIO(data), ReadOptions())
    text, notes = read(reader)
    assert compare(binary, text, 0, 0, NOT_IN_TEMPLATE) == 8851
    assert "format_text" not in text
    assert {n.code for n in notes} == {"format-labels", "format-lossy"}
    assert reader.accounting.total == reader.accounting.parsed == len(data)
    windows = text["TRC_TRACE_CPU_CHANGE"]
    assert windows.height == binary["TRC_TRACE_CPU_CHANGE"].height == 142
    # The file has one CPU's window after the other; here all CPUs are in the order of their stamps.
    merged = pl.concat([t.select("seq", "offset", "t_ns") for t in text.values()]).sort("seq")
    assert merged["seq"].to_list() == list(range(data.count(b"\n")))
    assert not merged["offset"].is_sorted()
    assert merged["t_ns"].is_sorted()
    assert merged["offset"].sort().to_list() == list(range(1, data.count(b"\n") + 1))


CLASSIC = (
    ("INJ_VIRQ    [ vector = 0xef, fake = 0 ]", "TRC_HVM_INJ_VIRQ", {"vector": 0xEF, "fake": 0}),
    ("CR_READ     [ CR# = 3, value = 0x0000000100001000 ]", "TRC_HVM_CR_READ",
     {"event": 0x82108, "value": 0x100001000}),
    ("PF_XEN      [ errorcode = 0x1000, virt = 0x00000006 ]", "TRC_HVM_PF_XEN", {"error_code": 6, "va": 0x1000}),
    ("csched2:runq_candidate [ dom:vcpu = 0x00000001, credit = 5, tickled_cpu = 0 ]", "TRC_CSCHED2_PICKED_CPU",
     {"event": 0x22213}),
    ("VMEXIT      [ exitcode = 0x0000001e, rIP  = 0xffffffff81a00000 ]", "TRC_HVM_VMEXIT",
     {"exit_reason": 30, "rip": 0xFFFFFFFF81A00000, "wide": True}),
    ("unknown (0x0000000000802099)  [ 0x00000001" + " 0x00000000" * 6 + " ]", "unknown", {"event": 0x802099}),
    ("PF_XEN      [ something else ]", "format_text", {}),
)  # fmt: skip


@pytest.mark.parametrize(("text", "table", "columns"), CLASSIC, ids=[c[1] for c in CLASSIC])
def test_classic_lines_without_a_recording(text: str, table: str, columns: dict[str, object]) -> None:
    line = f"CPU2  4200000009000 (+    8000)  {text}\n"
    frames, _ = read(ClassicReader(io.BytesIO(line.encode()), ReadOptions()))
    assert list(frames) == [table]
    row = frames[table].row(0, named=True)
    assert (row["cpu"], row["tsc"]) == (2, 4200000009000)
    assert {name: row[name] for name in columns} == columns


def test_frequency_is_found_in_the_dump() -> None:
    reader = XenalyzeReader(io.BytesIO(read_bytes(SAMPLES / "xenalyze-dom0-idle.dump.txt.zst")), ReadOptions())
    assert reader.clock.hz is not None and reader.clock.error_ppm is not None
    assert abs(reader.clock.hz / 2596155000 - 1) * 1e6 < 2 * reader.clock.error_ppm


#: Made lines for what no recording has: (text after the vCPU, table, columns).
MADE = (
    ("lost_records count 7 d1v0 (cur d32767v2) first_tsc 99", "TRC_LOST_RECORDS",
     {"lost_records": 7, "dom": 1, "vcpu": 0, "first_tsc": 99}),
    ("irq_bind_vector irq 300018 vec 2 mask 5 4 3 1", "TRC_HW_IRQ_BIND_VECTOR",
     {"irq": 0x18, "vector": 0x30, "cpumask0": 2 | 1 << 32, "cpumask1": 3 | 4 << 32, "cpumask2": None}),
    ("rtds:schedule cpu 3,, busy, tickled", "TRC_RTDS_SCHEDULE", {"on_cpu": 3, "idle": True, "tickled": False}),
    ("sched_switch prev d1v0, run for 12.7us", "TRC_SCHED_SWITCH_INFPREV", {"ran_ns": 12007}),
    ("csched:schedule cpu 2, tasklet scheduled, idle", "TRC_CSCHED_SCHEDULE",
     {"on_cpu": 2, "tasklet": True, "idle": True}),
    ("  802005(80:2:5) 3 [ 1d 41 2 ] ", "TRC_HW_IRQ_MOVE_FINISH", {"irq": 0x1D, "vector": 0x41, "on_cpu": 2}),
    ("  12345(1:2:345) 1 [ 7 ] ", "unknown", {"event": 0x12345, "n_words": 1, "words": [7]}),
    ("cr_read64 [ 3 1000 1 ]", "TRC_HVM_CR_READ", {"event": 0x82108, "cr": 3, "value": 0x1_0000_1000}),
    ("intr vec LOCAL_TIMER_VECTOR(f9)", "TRC_HVM_INTR", {"vector": 0xF9}),
    ("vmexit exit_reason HLT eip ffffffff81a0", "TRC_HVM_VMEXIT", {"exit_reason": 12, "rip": 0xFFFFFFFF81A0}),
    ("mmio_assist w gpa fee000b0 data 0", "TRC_HVM_IOMEM_WRITE", {"gpa": 0xFEE000B0, "data": 0}),
    ("io read port 1f7 val 50", "TRC_HVM_IOPORT_READ", {"port": 0x1F7, "data": 0x50}),
    (" hypercall  20 (event_channel_op)", "TRC_PV_HYPERCALL_SUBCALL", {"op": 0x20}),
    ("null:schedule cpu 1, no vcpu", "TRC_SNULL_SCHEDULE", {"on_cpu": 1, "dom": -1, "unit": -1}),
)  # fmt: skip


@pytest.mark.parametrize(("text", "table", "columns"), MADE, ids=[m[1] for m in MADE])
def test_variants_without_a_recording(text: str, table: str, columns: dict[str, object]) -> None:
    line = f"   0.000100003 |x- d3v0 {text}\n"
    frames, _ = read(XenalyzeReader(io.BytesIO(line.encode()), ReadOptions()))
    assert list(frames) == [table]
    row = frames[table].row(0, named=True)
    assert row["cpu"] == 1
    assert {name: row[name] for name in columns} == columns


def test_lines_beside_the_records() -> None:
    text = (
        "   0.000100003 |x- d3v0 vcpu_wake d3v1\n"
        "  [vla] d4v0 vec 65 injecting\n"
        "\n"
        "d1v0 RUNSTATE_RUNNING detected, leaving INIT   0.000100004 |x- d3v0 vcpu_block d3v1\n"
        "   0.004100200 -x pf_inject64 guest_cr2 7f0012  guest_ec 6\n"
        "   0.004100300 -x d1v0 never_seen 12\n"
        "garbage\n"
        "   0.004100400 -x d1v0 vcpu_wa"
    )
    frames, notes = read(XenalyzeReader(io.BytesIO(text.encode()), ReadOptions()))
    kinds = [(1, "vla"), (2, "blank"), (6, "unparsed"), (7, "unparsed")]  # the last line was cut
    assert frames["xenalyze_aux"].select("seq", "kind").rows() == kinds
    assert frames["TRC_SCHED_BLOCK"]["seq"].to_list() == [3]
    assert frames["TRC_HVM_PF_INJECT"].select("cpu", "cr2", "error_code").rows() == [(1, 0x7F0012, 6)]
    assert frames["xenalyze_text"]["text"].to_list() == ["never_seen 12"]
    assert {n.code for n in notes} >= {"xenalyze-text", "xenalyze-unparsed", "xenalyze-cut", "xenalyze-clock-assumed"}


def test_patterns_fit_the_tables() -> None:
    """Every column named by a pattern exists, or is one of those that have no column."""
    without = {"cur", "oval", "cycles", "duration", "opname", "detail", *(f"w{i}" for i in range(7))}
    for pattern in PATTERNS:
        names = {name.partition("__")[0] for name, _ in pattern.fields}
        assert names - without <= {column.name for column in TABLES[pattern.table].columns}, pattern.template


def test_something_else_is_refused() -> None:
    for reader in (XenalyzeReader, ClassicReader):
        assert not reader.sniff(b"hello\n")
        with pytest.raises(RecordingError):
            reader(io.BytesIO(b"hello\n"), ReadOptions())
