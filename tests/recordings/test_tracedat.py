"""trace.dat: counts of every event and every field against trace-cmd's own raw report."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from parsers.ftrace.columns import column_name
from parsers.recording import Chunk, ReadOptions
from parsers.tracedat import TraceDatReader
from tests.shared import SAMPLES, shared_path

RECORDINGS = {
    "linux-6.1/tc-v6.dat.zst": None,
    "linux-6.1/tc-v7.dat.zst": None,
    "linux-6.1-rt/tc-v7.dat.zst": None,
    "linux-6.12-rt/tc-v7.dat.zst": None,
    "linux-6.1-xen-dom0/tc-v7.dat.zst": None,
    "linux-6.1-hpet-msi/plain-load.dat.zst": "linux-6.1-hpet-msi/plain-load.events.txt",
    "xen-fifo-domu/pv-ft.dat.zst": "xen-fifo-domu/pv-ft.events.txt",
    "xen-fifo/dom0-light.dat.zst": None,
    "xen-2l/dom0-light.dat.zst": None,
}
LINE = re.compile(
    rb"(?P<comm>.{16})-(?P<pid>\d+) +\[(?P<cpu>\d+)\] *(?P<time>\d+(?:\.\d+)?): +(?P<event>[\w-]+): *(?P<payload>.*)"
)


def unpacked(path: Path) -> bytes:
    """A zstd file's content."""
    return cast(bytes, pa.input_stream(str(path), compression="zstd").read())


def read(data: bytes, **options: Any) -> tuple[TraceDatReader, list[Chunk], dict[str, pa.Table]]:
    """Reader, chunks and whole tables; checks what every reader promises on the way."""
    reader = TraceDatReader(io.BytesIO(data), ReadOptions(**options))
    chunks = list(reader.chunks())
    parts: dict[str, list[pa.Table]] = {}
    last = -1
    for chunk in chunks:
        seqs = sorted(seq for table in chunk.tables.values() for seq in table["seq"].to_pylist())
        if seqs:
            assert seqs == list(range(last + 1, last + 1 + len(seqs)))
            last = seqs[-1]
        for name, table in chunk.tables.items():
            assert table.schema.equals(reader.tables[name].schema())
            parts.setdefault(name, []).append(table)
    assert reader.accounting.total == len(data) == reader.accounting.parsed + reader.accounting.skipped
    tables = {name: pa.concat_tables(tables) for name, tables in parts.items()}
    assert sum(reader.counts.values()) == sum(table.num_rows for table in tables.values())
    return reader, chunks, tables


def agrees(value: Any, symbol: Any, said: str) -> bool:
    """Whether trace-cmd's text for a field means the same as our value."""
    if isinstance(value, str):
        return value.rstrip("\n") == said
    if symbol == said:
        return True
    unsigned = int(value) & (1 << 64) - 1
    decimal = re.fullmatch(r"-?\d+", said) is not None and int(said) & (1 << 64) - 1 == unsigned
    return decimal or (re.fullmatch(r"(0x)?[0-9a-f]+", said) is not None and int(said, 16) == unsigned)


def compare(report: bytes, tables: dict[str, pa.Table], *, exact: bool, rows: int) -> int:
    """Every line of `trace-cmd report -R` against the same row; the number of fields compared."""
    columns = {name: table.slice(0, rows).to_pydict() for name, table in tables.items()}
    at: Counter[str] = Counter()
    fields = 0
    for line in report.split(b"\n"):
        match = LINE.fullmatch(line)
        if match is None:
            continue
        event = match["event"].decode()
        row = at[event]
        at[event] += 1
        if row >= rows:
            continue
        own = columns[event]
        assert own["cpu"][row] == int(match["cpu"]) and own["pid"][row] == int(match["pid"]), line
        assert own["comm"][row].encode() == match["comm"].lstrip(b" "), line
        stamp = int(match["time"].replace(b".", b""))
        assert own["tsc"][row] == stamp if exact else abs(own["tsc"][row] - stamp * 1000) <= 500, line
        for name, said in re.findall(rb"(\w+)=(.*?)(?= \w+=|$)", match["payload"]):
            if said.startswith(b"ARRAY[") or (event.startswith("xen_mmu") and name == b"pfn"):
                continue  # trace-cmd prints bytes of arrays, and pfn in hex without 0x
            column = column_name(name.decode())
            symbol = own.get(f"{column}_sym", {row: None})[row]
            if event == "print" and name == b"ip":
                continue
            assert agrees(own[column][row], symbol, said.decode()), (line, column, own[column][row])
            fields += 1
    assert at == {name: table.num_rows for name, table in tables.items()}
    return fields


def test_sample_equals_raw_report() -> None:
    """Counts and all fields of the sample equal the report made on the recorded machine."""
    data = unpacked(SAMPLES / "linux-6.1-tracecmd-v7.dat.zst")
    reader, _, tables = read(data)
    report = unpacked(SAMPLES / "linux-6.1-tracecmd-v7.report-R.txt.zst")
    assert compare(report, tables, exact=False, rows=1 << 20) > 1500
    assert reader.accounting.skipped == 0
    assert reader.clock.unit == "ns" and reader.clock.kind == "ns"
    entry = tables["hrtimer_start"].to_pydict()
    assert set(entry["function_sym"]) == {"tick_sched_timer", "hrtimer_wakeup", "watchdog_timer_fn"}


@pytest.mark.parametrize("name", RECORDINGS)
def test_counts_and_fields(name: str) -> None:
    """Counts equal the independent lists; the first rows of each event equal `trace-cmd report -R`."""
    data = unpacked(shared_path(f"recordings/{name}"))
    reader, chunks, tables = read(data)
    assert reader.accounting.skipped == 0
    assert not [gap for chunk in chunks for gap in chunk.gaps]
    listed = RECORDINGS[name]
    if listed:
        text = shared_path(f"recordings/{listed}").read_text()
        expected = {event.rstrip(":"): int(count) for count, event in (line.split() for line in text.splitlines())}
        assert reader.counts == expected
    if shutil.which("trace-cmd"):
        with tempfile.NamedTemporaryFile(suffix=".dat") as copy:
            copy.write(data)
            copy.flush()
            command = ["trace-cmd", "report", "-R", "-t", copy.name]
            report = subprocess.run(command, capture_output=True, check=True).stdout
        assert compare(report, tables, exact=True, rows=200) > 100


def test_tick_clock_needs_a_frequency() -> None:
    """x86-tsc stamps stay ticks unless the user states a frequency; the raw stamp is kept either way."""
    data = unpacked(shared_path("recordings/xen-2l/dom0-light.dat.zst"))
    ticks, chunks, tables = read(data)
    assert ticks.clock.unit == "ticks" and ticks.clock.hz is None
    assert "tracedat-clock" in {note.code for chunk in chunks for note in chunk.notes}
    stated, _, in_ns = read(data, cpu_hz=2_596_155_000.0)
    assert stated.clock.unit == "ns" and stated.clock.tsc0 == ticks.clock.tsc0
    stamps, times = tables["cpu_idle"]["tsc"].to_pylist(), in_ns["cpu_idle"]["t_ns"].to_pylist()
    for raw, nanoseconds in zip(stamps, times, strict=True):
        assert nanoseconds == (raw - ticks.clock.tsc0) * 10**9 // 2_596_155_000


def test_batches_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches give the same rows in the same order as one big one."""
    data = unpacked(shared_path("recordings/linux-6.1-hpet-msi/plain-load.dat.zst"))
    _, one, whole = read(data)
    monkeypatch.setattr("parsers.tracedat.reader.BATCH", 400_000)
    _, many, pieces = read(data)
    assert len(one) == 1 and len(many) > 10
    for event, table in whole.items():
        assert table.equals(pieces[event]) or table.to_pydict() == pieces[event].to_pydict()


def test_probes_have_the_symbols_that_the_kernel_prints() -> None:
    """Addresses of probes through the saved kallsyms: symbol, offset, size as in the kernel's own text of that boot."""
    _, _, tables = read(unpacked(shared_path("recordings/xen-2l/dom0-light.dat.zst")))
    text = unpacked(shared_path("recordings/xen-2l/dom0-raw.trace.txt.zst"))
    printed: dict[bytes, set[bytes]] = {}
    for name, shown in re.findall(rb": (\w+): \(([\w.]+\+0x[^)]*)\)", text):
        printed.setdefault(name, set()).add(shown)
    compared = 0
    for name, table in tables.items():
        columns = [c for c in ("__probe_ret_ip_sym", "__probe_func_sym", "__probe_ip_sym") if c in table.column_names]
        known = printed.get(name.encode())
        if columns and known:
            rows = zip(*(table[column].to_pylist() for column in columns), strict=True)
            assert {" <- ".join(row).encode() for row in rows} <= known
            compared += 1
    assert compared >= 15


def test_only_some_events() -> None:
    """`only` gives the rows of a whole reading, but for `seq`."""
    data = unpacked(SAMPLES / "linux-6.1-tracecmd-v7.dat.zst")
    _, _, whole = read(data)
    only = frozenset({"sched_switch", "hrtimer_start", "absent"})
    reader, _, some = read(data, only=only)
    assert set(some) == set(reader.counts) == only - {"absent"}
    for event, table in some.items():
        assert table.drop_columns(["seq"]).equals(whole[event].drop_columns(["seq"]))
