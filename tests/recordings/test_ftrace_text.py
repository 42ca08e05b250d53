"""ftrace text: counts of every event, agreement with an independent line pattern and with the binary recording."""

from __future__ import annotations

import io
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from parsers.formats import sniff
from parsers.ftrace.columns import column_name
from parsers.ftrace.flags import decode_flags
from parsers.ftrace.shapes import declared
from parsers.ftrace.text import FtraceTextReader
from parsers.recording import Chunk, ReadOptions
from tests.recordings.test_tracedat import read as read_dat
from tests.recordings.test_tracedat import unpacked
from tests.shared import SAMPLES, shared_path

COUNTED = {
    "linux-6.1/01-default.txt.zst": "linux-6.1/01-default.counts",
    "linux-6.1/10-kprobes.txt.zst": "linux-6.1/10-kprobes.counts",
    "linux-6.1/40-kvm.txt.zst": "linux-6.1/40-kvm.counts",
    "linux-6.1-rt/01-default.txt.zst": "linux-6.1-rt/01-default.counts",
    "linux-6.12-rt/01-default.txt.zst": "linux-6.12-rt/01-default.counts",
    "linux-6.1-xen-dom0/10-kprobes.txt.zst": "linux-6.1-xen-dom0/10-kprobes.counts",
    "arm64-gic2/01-default.txt.zst": "arm64-gic2/01-default.counts",
    "arm64-gic2/10-kprobes.txt.zst": "arm64-gic2/10-kprobes.counts",
    "arm64-gic2/40-kvm.txt.zst": "arm64-gic2/40-kvm.counts",
    "linux-6.1-hpet-msi/plain-raw.trace.txt.zst": "linux-6.1-hpet-msi/plain-raw.trace.events.txt",
}
LINE = re.compile(
    rb"(?P<comm>.{16})-(?P<pid>\d+) +(?:\((?P<tgid>[\d -]+)\) )?\[(?P<cpu>\d+)\] (?P<flags>\S+) +(?P<ts>[\d.]+): "
    rb"(?P<event>\w+): (?P<payload>.*)"
)


def read(data: bytes, **options: Any) -> tuple[FtraceTextReader, list[Chunk], dict[str, pa.Table]]:
    """Reader by sniffing, chunks, whole tables; checks what every reader promises."""
    cls = sniff(data[: 64 << 10])
    assert cls is not None
    reader = cls(io.BytesIO(data), ReadOptions(**options))
    assert isinstance(reader, FtraceTextReader)
    chunks = list(reader.chunks())
    parts: dict[str, list[pa.Table]] = {}
    last = -1
    for chunk in chunks:
        seqs = sorted(seq for table in chunk.tables.values() for seq in table["seq"].to_pylist())
        assert seqs == list(range(last + 1, last + 1 + len(seqs)))
        last += len(seqs)
        for name, table in chunk.tables.items():
            table.validate(full=True)
            assert table.schema.equals(reader.tables[name].schema())
            parts.setdefault(name, []).append(table)
    assert reader.accounting.total == len(data) == reader.accounting.parsed + reader.accounting.skipped
    tables = {name: pa.concat_tables(tables) for name, tables in parts.items()}
    assert sum(reader.counts.values()) == sum(table.num_rows for table in tables.values())
    return reader, chunks, tables


def text_of(path: Path) -> bytes:
    """A compressed text."""
    return unpacked(path)


@pytest.mark.parametrize("name", COUNTED)
def test_counts(name: str) -> None:
    """Every event as often as the independent count says, nothing skipped, nothing left as text."""
    reader, _, tables = read(text_of(shared_path(f"recordings/{name}")))
    lines = shared_path(f"recordings/{COUNTED[name]}").read_text().splitlines()
    expected = {event.rstrip(":"): int(count) for count, event in (line.split() for line in lines)}
    assert reader.counts == expected
    assert reader.accounting.skipped == 0
    assert "ftrace_text" not in tables


@pytest.mark.parametrize(
    ("name", "unit", "clock"),
    [
        ("ftrace-linux-6.1_01-default", "ns", "us"),
        ("ftrace-linux-6.1_03-tgid", "ns", "us"),
        ("ftrace-linux-6.1_50-clock-x86-tsc", "ticks", "ticks"),
        ("ftrace-linux-6.1_10-kprobes", "ns", "us"),
        ("ftrace-linux-6.1_40-kvm", "ns", "us"),
        ("ftrace-arm64-gic2_40-kvm", "ns", "us"),
    ],
)
def test_common_columns(name: str, unit: str, clock: str) -> None:
    """Common columns of each line equal what an independent pattern reads; `key=number` payloads equal the columns."""
    data = text_of(SAMPLES / f"{name}.txt.zst")
    reader, _, tables = read(data)
    assert (reader.clock.unit, reader.clock.kind) == (unit, clock)
    columns = {event: table.to_pydict() for event, table in tables.items()}
    at: Counter[str] = Counter()
    for number, line in enumerate(data.split(b"\n"), start=1):
        match = LINE.fullmatch(line)
        if match is None:
            assert line[:1] in (b"#", b"")
            continue
        event = match["event"].decode()
        row, own = at[event], columns[event]
        at[event] += 1
        stamp = int(match["ts"].replace(b".", b""))
        assert own["offset"][row] == number
        assert own["tsc"][row] == stamp
        assert own["t_ns"][row] == (stamp - reader.clock.tsc0) * (1000 if clock == "us" else 1)
        assert own["t_err_ns"][row] == (999 if clock == "us" else 0)
        assert (own["pid"][row], own["cpu"][row]) == (int(match["pid"]), int(match["cpu"]))
        assert own["comm"][row].encode() == match["comm"].strip()
        assert (own["flags"][row], own["preempt"][row]) == decode_flags(match["flags"].decode())
        tgid = (match["tgid"] or b"-").strip()
        assert own["tgid"][row] == (int(tgid) if tgid.isdigit() else None)
        if declared(event) is None:
            for key, said in re.findall(rb" (\w+)=(0x[0-9a-f]+|\d+)(?= |$)", match["payload"]):
                assert own[column_name(key.decode())][row] == int(said, 0), line
            assert own["__probe_ip_sym" if "__probe_ip_sym" in own else "__probe_ret_ip_sym"][row] in line.decode()
    assert at == reader.counts


def test_flag_words() -> None:
    """Words of three kernel families, as their headers name the columns."""
    assert decode_flags("d.h1.") == (0x01 | 0x08, 1)
    assert decode_flags("DNH21") == (0x01 | 0x80 | 0x04 | 0x20 | 0x18, 0x12)
    assert decode_flags("..s1") == (0x10, 1)
    assert decode_flags("dnLH212") == (0x01 | 0x04 | 0x02 | 0x18, 0x22)
    assert decode_flags("d.lZ...") == (0x01 | 0x02 | 0x48, 0)
    assert decode_flags("hello") is None


@pytest.mark.parametrize("raw", [True, False])
def test_report_equals_binary(raw: bool) -> None:
    """Report text (-R and pretty) and the trace.dat that it came from give the same events and fields.

    Documented differences: times are rounded to microseconds; the pretty form prints some numbers as words and leaves
    out others (those are null, never wrong); a symbol may stand for an address.
    """
    _, _, binary = read_dat(unpacked(SAMPLES / "linux-6.1-tracecmd-v7.dat.zst"))
    if raw:
        data = unpacked(SAMPLES / "linux-6.1-tracecmd-v7.report-R.txt.zst")
    else:
        data = unpacked(shared_path("recordings/linux-6.1/tc-v7.report.txt.zst"))
    reader, _, text = read(data)
    assert reader.format == "trace-cmd-report"
    assert set(text) == set(binary)
    compared = 0
    for event, table in binary.items():
        ours, theirs = text[event].to_pydict(), table.to_pydict()
        assert text[event].num_rows == table.num_rows
        assert ours["seq"] == theirs["seq"] and ours["cpu"] == theirs["cpu"]
        assert ours["pid"] == theirs["pid"] and ours["comm"] == theirs["comm"]
        for mine, exact in zip(ours["tsc"], theirs["tsc"], strict=True):
            assert abs(mine * 1000 - exact) <= 500
        for column in table.column_names[13:]:
            values = ours.get(column)
            if values is None:
                continue
            for mine, exact in zip(values, theirs[column], strict=True):
                if mine is None:
                    assert not raw or column.endswith("_sym") or ours[f"{column}_sym"], (event, column)
                    continue
                assert str(mine) == str(exact), (event, column, mine, exact)
                compared += 1
    assert compared > (1300 if raw else 1000)


def test_latency_stack_and_graph_layouts() -> None:
    """The layouts that have no fixed columns: every line of them is some record."""
    reader, _, tables = read(text_of(SAMPLES / "ftrace-linux-6.1-rt_02-latency.txt.zst"))
    assert reader.clock.kind == "us" and reader.accounting.skipped == 0
    assert sum(reader.counts.values()) == 1200 - 20
    assert tables["tracing_mark_write"]["buf"].to_pylist()[0].startswith("marker 02-latency")
    data = text_of(SAMPLES / "ftrace-linux-6.1_60-stacktrace.txt.zst")
    reader, _, tables = read(data)
    stacks = tables["kernel_stack"].to_pydict()
    assert sum(map(len, stacks["caller_sym"])) == data.count(b"\n => ")
    assert stacks["caller_sym"][0][:2] == ["trace_event_raw_event_hrtimer_init", "hrtimer_init"]
    assert stacks["of_seq"][0] == tables["hrtimer_init"]["seq"].to_pylist()[0]
    data = text_of(SAMPLES / "ftrace-linux-6.1_20-function_graph.txt.zst")
    reader, _, tables = read(data)
    calls = sum(1 for line in data.split(b"\n") if b" |  " in line and b"/* " not in line)
    assert reader.counts["funcgraph"] == calls and reader.clock.kind == "none"
    graph = tables["funcgraph"].to_pydict()
    assert graph["call"][:3] == ["irq_enter_rcu() {", "tick_irq_enter() {", "tick_check_oneshot_broadcast_this_cpu();"]
    assert graph["depth"][:3] == [0, 1, 2] and graph["duration_ns"][:3] == [None, None, 4106]
    assert tables["hrtimer_expire_entry"]["function_sym"].to_pylist()[0] == "tick_sched_timer"
    assert set(tables["funcgraph"]["t_ns"].to_pylist()) == {None}


def test_symbols_and_words() -> None:
    """Words in place of numbers become the number where the word determines it, and are kept beside it."""
    _, _, tables = read(text_of(SAMPLES / "ftrace-linux-6.1_40-kvm.txt.zst"))
    assert set(tables["softirq_raise"]["vec_sym"].to_pylist()) >= {"RCU", "SCHED"}
    exits = tables["kvm_exit"].to_pydict()
    assert set(exits["exit_reason_sym"]) >= {"npf"} and set(exits["vcpu_id"]) == {0}
    _, _, tables = read(text_of(SAMPLES / "ftrace-linux-6.1_01-default.txt.zst"))
    switch = tables["sched_switch"].to_pydict()
    assert set(zip(switch["prev_state_sym"], switch["prev_state"], strict=True)) >= {("R", 0), ("S", 1), ("I", 128)}
    assert set(tables["cpu_idle"]["state"].to_pylist()) >= {4294967295, 1}


TEXTS = sorted(path.name for path in SAMPLES.glob("ftrace-*.txt.zst"))


@pytest.mark.parametrize("name", [*TEXTS, "report", "report-R"])
def test_fast_way_equals_patterns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stepping from literal to literal and the regular expressions give the same tables."""
    if name == "report":
        data = unpacked(shared_path("recordings/linux-6.1-rt/tc-v7.report.txt.zst"))
    elif name == "report-R":
        data = unpacked(SAMPLES / "linux-6.1-tracecmd-v7.report-R.txt.zst")
    else:
        data = text_of(SAMPLES / name)
    _, _, fast = read(data)

    def refused(shape: Any, rows: Any, types: Any) -> tuple[Any, dict[str, Any]]:
        return rows.start[:0], {}

    monkeypatch.setattr("parsers.ftrace.payload.quick", refused)
    _, _, slow = read(data)
    assert set(fast) == set(slow)
    for event, table in fast.items():
        assert table.to_pydict() == slow[event].to_pydict(), event


@pytest.mark.parametrize("name", TEXTS)
def test_batches_do_not_show(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches give the same rows as one big one: stacks and markers stay with their records."""
    data = text_of(SAMPLES / name)
    _, _, whole = read(data)
    monkeypatch.setattr("parsers.ftrace.text.BATCH", 9_000)
    _, many, pieces = read(data)
    assert len(many) > 5
    for event, table in whole.items():
        assert table.to_pydict() == pieces[event].to_pydict()
