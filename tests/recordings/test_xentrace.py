"""The xentrace reader against independent counts, a plain decoder, and vectors written by hand."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from parsers.open import open_recording
from parsers.recording import ReadOptions
from parsers.xentrace.events import ALL_EVENTS, BY_ID
from parsers.xentrace.layout import NEWEST, Event, Layout, layout_fields
from parsers.xentrace.reader import XentraceReader
from tests.recordings.xentrace_tools import hop_file, id_counts, read, record, window
from tests.shared import SAMPLES, shared_path

SAMPLE = SAMPLES / "xen-2l-dom0-idle.xentrace"
TRUE_HZ = 2596.155e6

COUNTED = (
    "xen-2l/dom0-idle.xentrace", "xen-2l/dom0-light.xentrace.zst", "xen-2l/dom0-raw.xentrace.zst",
    "xen-2l/idle-cx.xentrace", "xen-2l/lost.xentrace.zst", "xen-2l/mask-pm.xentrace",
    "xen-fifo-domu/pv-ft.xentrace.zst", "xen-hvm-intx/boot.xentrace.zst", "xen-hvm-intx/load.xentrace.zst",
    "xen-hvm/hvm-load.xentrace.zst", "xen-pvh/pvh-hvm-mask.xentrace", "xen-pvh/pvh-load.xentrace.zst",
)  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_counts_match_the_independent_ones(name: str) -> None:
    path = shared_path(f"recordings/{name}")
    counts = id_counts(path.with_name(path.name.removesuffix(".zst") + ".counts.txt"))
    found: Counter[int] = Counter()
    with open_recording(path) as opened:
        reader = XentraceReader(opened.stream, ReadOptions())
        last = -1
        for chunk in reader.chunks():
            seqs = [table["seq"].to_numpy() for table in chunk.tables.values()]
            if seqs:
                assert min(seq[0] for seq in seqs) == last + 1
                last = max(int(seq[-1]) for seq in seqs)
            for table in chunk.tables.values():
                for entry in table["event"].value_counts().to_pylist():
                    found[entry["values"]] += entry["counts"]
        assert found == counts
        assert last + 1 == sum(counts.values())
        assert (reader.accounting.parsed, reader.accounting.skipped) == (opened.size, 0)
        assert "unknown" not in reader.counts


def test_sample_counts_by_name() -> None:
    result = read(SAMPLE)
    by_id = id_counts(SAMPLES / "xen-2l-dom0-idle.counts.txt")
    by_name: Counter[str] = Counter()
    for event, count in by_id.items():
        by_name[BY_ID[event][-1].name] += count
    assert result.reader.counts == by_name
    assert result.reader.counts["TRC_SCHED_RUNSTATE_CHANGE"] == 196 + 196 + 392 + 196
    assert not result.gaps


def test_sample_clock() -> None:
    clock = read(SAMPLE).reader.clock
    assert clock.unit == "ns"
    assert clock.hz == pytest.approx(TRUE_HZ, rel=5e-6)
    assert clock.error_ppm is not None
    assert clock.error_ppm < 1


@pytest.mark.parametrize("name", ["dom0-light.xentrace.zst", "mask-pm.xentrace", "idle-cx.xentrace"])
def test_clock_of_other_recordings(name: str) -> None:
    with open_recording(shared_path(f"recordings/xen-2l/{name}")) as opened:
        assert XentraceReader(opened.stream, ReadOptions()).clock.hz == pytest.approx(TRUE_HZ, rel=5e-6)


def test_stated_frequency_wins_and_none_means_ticks() -> None:
    assert read(SAMPLE, cpu_hz=1e9).reader.clock.origin == "--cpu-hz"
    result = read(window(0, record(0x28006, [1, 2], 5000), record(0x28004, [1, 2], 5700)))
    assert result.reader.clock.unit == "ticks"
    assert [row["t_ns"] for row in result.ordered()] == [0, 0, 700]
    assert "xentrace-ticks" in {note.code for note in result.notes}


def test_pm_timer_counts_are_not_taken_for_ns() -> None:
    rows = [
        record(0x801002, [2, (n * 35795) & 0xFFFFFF, 0, 0], 10**9 + n * 26_000_000) for n in range(200)
    ]
    result = read(window(0, *rows))
    assert result.reader.clock.hz is None
    assert "PM timer" in result.reader.clock.doc


def test_times_do_not_drift() -> None:
    tsc0, day = 12345, 2596155000 * 86400
    rows = [record(0x28006, [1, 2], tsc0), record(0x28006, [1, 2], tsc0 + day), record(0x28006, [1, 2], tsc0 + day + 1)]
    result = read(window(0, *rows), cpu_hz=2596155000)
    assert [row["t_ns"] for row in result.rows("TRC_SCHED_BLOCK")] == [0, 86400 * 10**9, 86400 * 10**9]


def plain_fields(event: Event, layout: Layout, event_id: int, words: tuple[int, ...]) -> dict[str, object]:
    """The declared fields of one record, decoded with Python integers."""
    out: dict[str, object] = {}
    for bits in event.id_bits:
        value = (event_id >> bits.shift & (1 << bits.bits) - 1) + bits.add
        out[bits.name] = bool(value) if bits.bits == 1 else value
    value = sum(word << 32 * index for index, word in enumerate(words))
    fields, _ = layout_fields(layout.fields)
    for field in fields:
        if field.name == "hypercall":
            out |= {"op": words[0] & 0xFFFFF, "present": words[0] >> 20}
            rest = list(words[1:])
            for number in range(6):
                size = words[0] >> 20 + 2 * number & 3
                taken, rest = rest[:size], rest[size:]
                out[f"a{number}"] = sum(part << 32 * i for i, part in enumerate(taken)) if size else None
        elif field.name == "words":
            out["words"] = list(words)
        elif field.name == "filler":
            out["n_words"] = len(words)
        else:
            part = value >> 32 * field.word + field.shift & (1 << field.bits) - 1
            if field.kind == "s" and part >> field.bits - 1:
                part -= 1 << field.bits
            out[field.name] = bool(part) if field.kind == "b" else part
    return out


def test_every_record_of_the_sample_against_a_plain_decoder() -> None:
    raw = SAMPLE.read_bytes()
    result = read(SAMPLE)
    rows = {row["offset"]: row for row in result.ordered()}
    assert result.reader.clock.hz is not None
    hz = int(result.reader.clock.hz)
    place: dict[int, int] = {}
    seen = 0
    first = min(tsc for _, _, _, tsc, _ in hop_file(raw) if tsc is not None)
    for offset, cpu, event_id, tsc, words in hop_file(raw):
        row = rows[offset]
        seen += 1
        assert (row["cpu"], row["event"], row["tsc"]) == (cpu, event_id, tsc)
        if tsc is not None:
            assert row["t_ns"] == (tsc - first) * 10**9 // hz
            assert row["t_err_ns"] == 0
        assert row["seq"] > place.get(cpu, -1)
        place[cpu] = row["seq"]
        event = next(event for event in ALL_EVENTS if event.name == row["table"])
        layout = next(layout for layout in event.layouts if layout.words in (None, len(words)))
        for name, value in plain_fields(event, layout, event_id, words).items():
            assert row[name] == value, (hex(event_id), name)
    assert seen == len(rows) == 8993
    times = [row["tsc"] for row in result.ordered() if row["tsc"] is not None]
    assert times == sorted(times)


def test_lost_records_become_gaps() -> None:
    with open_recording(shared_path("recordings/xen-2l/lost.xentrace.zst")) as opened:
        reader = XentraceReader(opened.stream, ReadOptions())
        gaps = [gap for chunk in reader.chunks() for gap in chunk.gaps]
    assert [gap.reason for gap in gaps] == ["lost-records"] * 4
    assert sum(gap.lost or 0 for gap in gaps) == 57703
    assert {gap.cpu for gap in gaps} == {0, 1, 2, 3}
    assert all(gap.t0 is not None and gap.t1 is not None and gap.t0 < gap.t1 for gap in gaps)


SYNTHETIC = [
    pytest.param(event, event_id, layout, id=f"{event.name}-{event_id:#x}-{number}")
    for event in ALL_EVENTS
    for number, layout in enumerate(event.layouts)
    for event_id in (layout.ids or event.ids[:12])
    if not (event_id >> 8 == 0x220 and "CSCHED2" in event.name and layout.since > (4, 2))
]


@pytest.mark.parametrize(("event", "event_id", "layout"), SYNTHETIC)
def test_every_declared_form_round_trips(event: Event, event_id: int, layout: Layout) -> None:
    rng = random.Random(f"{event.name} {event_id} {layout}")
    count = layout.words
    if count is None:
        words = [0xABCDE | 0b01 << 20 | 0b10 << 24, *(rng.getrandbits(32) for _ in range(3))]
    else:
        words = [rng.getrandbits(32) for _ in range(count)]
    stamped = event.stamped != "no" if layout.stamped is None else layout.stamped
    version = layout.until if layout.until != NEWEST else max(layout.since, (4, 19))
    # pre-4.3 credit2 shares ids with credit, old idle ids are shared with move-cleanup
    if event_id >> 8 == 0x220 and event.name.startswith("TRC_CSCHED2"):
        version = (4, 2)
        assert layout.since <= version
    data = window(3, record(event_id, words, 1000 if stamped else None))
    row = next(row for row in read(data, xen_version=version).ordered() if row["offset"] == 12)
    assert row["table"] == event.name
    got = {name: row[name] for name in plain_fields(event, layout, event_id, tuple(words))}
    assert got == plain_fields(event, layout, event_id, tuple(words))
    assert row["tsc"] == (1000 if stamped else None)


#: Written by hand from the layout of the records: event id, words, Xen version, table, fields.
VECTORS = [
    (0x21321, [0x7FFF0003], None, "TRC_SCHED_RUNSTATE_CHANGE",
     {"old_state": 3, "new_state": 2, "vcpu": 3, "dom": 32767}),
    (0x21111, [0x00010002], None, "unknown", {"n_words": 1, "words": [0x00010002]}),
    (0x2800F, [1, 2, 500, 0xFFFFFFFF], None, "TRC_SCHED_SWITCH_INFNEXT",
     {"dom": 1, "unit": 2, "runnable_ns": 500, "slice_ns": -1}),
    (0x2800E, [7, 900], None, "TRC_SCHED_SWITCH_INFPREV", {"dom": 7, "unit": None, "ran_ns": 900}),
    (0x22203, [0x00050001, 0xFFFFFFF6, 0x80000000, 42], None, "TRC_CSCHED2_CREDIT_BURN",
     {"unit": 1, "dom": 5, "credit": -10, "budget": -(2**31), "delta": 42}),
    (0x22203, [0x00050001, 10, 42], (4, 6), "TRC_CSCHED2_CREDIT_BURN", {"unit": 5, "dom": 1, "budget": None}),
    (0x22203, [0x00050001, 10, 42], (4, 8), "TRC_CSCHED2_CREDIT_BURN", {"unit": 1, "dom": 5, "delta": 42}),
    (0x22002, [9, 8, 7], None, "TRC_CSCHED_ACCOUNT_START", {"dom": 9, "unit": 8, "active_units": 7}),
    (0x22215, [0x00010003, 0x01000100], None, "TRC_CSCHED2_SCHEDULE",
     {"on_cpu": 3, "rq_id": 1, "tasklet": False, "idle": True, "smt_idle": False, "tickled": True}),
    (0x22806, [0x02010004], None, "TRC_RTDS_SCHEDULE",
     {"on_cpu": 4, "tasklet": True, "tickled": True, "idle": False}),
    (0x81102, [0x80000021, 0x11223344, 0xFFFF8000], None, "TRC_HVM_VMEXIT",
     {"exit_reason": 0x80000021, "rip": 0xFFFF800011223344, "wide": True, "nested": False}),
    (0x81403, [0xFFFFFFFF, 0x1000], None, "TRC_HVM_SVM_EXIT",
     {"exit_reason": 0xFFFFFFFF, "rip": 0x1000, "wide": False, "nested": True}),
    (0x8200D, [0x80B, 0, 0], None, "TRC_HVM_MSR_WRITE", {"msr": 0x80B, "value": 0}),
    (0x82217, [0xFEE000B0, 0], None, "TRC_HVM_IOMEM_WRITE", {"gpa": 0xFEE000B0, "data": 0, "wide": False}),
    (0x82117, [0x1000, 1, 0xDEAD, 0xBEEF], None, "TRC_HVM_IOMEM_READ",
     {"gpa": 0x100001000, "data": 0xBEEF0000DEAD, "wide": True}),
    (0x82016, [0x3F8], None, "TRC_HVM_IOPORT_READ", {"port": 0x3F8, "data": None}),
    (0x82020, [0x21, 1, 0xFFFFFFFF], None, "TRC_HVM_INTR_WINDOW",
     {"vector": 0x21, "intr_source": 1, "queued_vector": -1}),
    (0x8200F, [], None, "TRC_HVM_INTR", {"vector": None}),
    (0x201103, [0x1000, 0xFFFFFFFF, 0x0002800E], None, "TRC_PV_TRAP",
     {"rip": 0xFFFFFFFF00001000, "trapnr": 14, "use_error_code": True, "error_code": 2}),
    (0x20F103, [0x1000, 0xFFFFFFFF, 0x0000000D], None, "TRC_PV_TRAP", {"trapnr": 13, "use_error_code": False}),
    (0x20100D, [20 | 1 << 20 | 1 << 24, 5, 2], None, "TRC_PV_HYPERCALL_V2",
     {"op": 20, "present": 0x11, "a0": 5, "a1": None, "a2": 2, "a3": None}),
    (0x20200E, [1 | 2 << 22, 0x55, 0xAA], None, "TRC_PV_HYPERCALL_SUBCALL",
     {"op": 1, "a0": None, "a1": 0xAA00000055}),
    (0x20100D, [20 | 1 << 20, 5, 2], None, "unknown", {"words": [20 | 1 << 20, 5, 2]}),
    (0x40F208, [1, 2, 3, 4, 5, 6, 0xE0000001], None, "TRC_SHADOW_EMULATE",
     {"gl1e": 0x200000001, "write_val": 0x400000003, "va": 0x600000005, "flags": 1, "emul_count": 7, "levels": 4}),
    (0x40F009, [1, 2], None, "TRC_SHADOW_EMULATE_UNSHADOW_USER", {"gfn": 1, "va": 2, "flags": None, "levels": 2}),
    (0x10F005, [1, 0, 0x00090004, 77], (4, 17), "TRC_MEM_DECREASE_RESERVATION", {"gfn": 1, "dom": 4, "order": 9}),
    (0x10F005, [1, 0, 4, 9], (4, 18), "TRC_MEM_DECREASE_RESERVATION", {"gfn": 1, "dom": 4, "order": 9}),
    (0x801003, [2, 123, 0x30, 0xF0, 0, 0], None, "TRC_PM_IDLE_EXIT", {"cx": 2, "tick": 123, "irr0": 0x30}),
    (0x802002, [2, 123, 0x30, 0xF0, 0, 0], None, "TRC_PM_IDLE_EXIT", {"cx": 2, "irr1": 0xF0}),
    (0x802002, [27, 0x41, 3], None, "TRC_HW_IRQ_MOVE_CLEANUP", {"irq": 27, "vector": 0x41, "on_cpu": 3}),
    (0x802006, [0x0041001B, 8, 0, 0, 0, 0, 1], None, "TRC_HW_IRQ_ASSIGN_VECTOR",
     {"irq": 27, "vector": 0x41, "cpumask0": 8, "cpumask1": 0, "cpumask2": 1 << 32}),
    (0x800F123, [1, 2], None, "TRC_GUEST", {"number": 0x123, "words": [1, 2]}),
]  # fmt: skip


@pytest.mark.parametrize(("event", "words", "version", "table", "fields"), VECTORS)
def test_vectors(event: int, words: list[int], version: object, table: str, fields: dict[str, object]) -> None:
    row = read(window(1, record(event, words, 77)), xen_version=version).ordered()[1]
    assert row["table"] == table
    assert {name: row[name] for name in fields} == fields


def test_lost_records_without_times() -> None:
    data = window(2, record(0x1F001, [12, 0x7FFF0000, 500, 1], 2**32 + 900), record(0x28006, [0, 0], 2**32 + 950))
    result = read(data)
    (gap,) = result.gaps
    assert (gap.reason, gap.cpu, gap.t0, gap.t1, gap.lost) == ("lost-records", 2, 2**32 + 500, 2**32 + 900, 12)
    assert result.rows("TRC_LOST_RECORDS")[0]["dom"] == 32767
    old = read(window(2, record(0x1F001, [12], 900)))
    assert (old.gaps[0].t0, old.gaps[0].lost) == (None, 12)


def test_version_is_sniffed_from_lengths() -> None:
    cpuid5 = record(0x8200E, [1, 2, 3, 4, 5])
    burn = record(0x22203, [0x00050001, 1, 2], 10)
    runq = record(0x22202, [0x00050001, 1], 11)
    result = read(window(0, runq, burn, cpuid5))
    assert result.reader.version_range == ((4, 7), (4, 9))
    assert result.rows("TRC_CSCHED2_CREDIT_BURN")[0]["dom"] == 5
    assert "xentrace-version" not in {note.code for note in result.notes}


def test_what_was_assumed_is_noted() -> None:
    result = read(window(0, record(0x10F005, [1, 0, 4, 9])))
    assert [note.text for note in result.notes if note.code == "xentrace-version"] == [
        "read as written by the newest Xen (the recording shows 4.0 or later), "
        "which matters for TRC_MEM_DECREASE_RESERVATION"
    ]
    stated = read(window(0, record(0x10F005, [1, 0, 4, 9])), xen_version=(4, 17))
    assert "xentrace-version" not in {note.code for note in stated.notes}
