"""Hostile and odd ftrace text: names that imitate layouts, broken bytes, lost marks, endless lines, noise."""

from __future__ import annotations

import base64
import io
import random
import time
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parsers.formats import sniff
from parsers.ftrace.systrace import SystraceReader
from parsers.ftrace.text import FtraceTextReader, PerfScriptReader
from parsers.recording import Chunk, ReadOptions, RecordingError
from tests.recordings.test_tracedat import unpacked
from tests.shared import SAMPLES
from tracetool.ingest import IngestOptions, ingest


def line(comm: bytes, rest: bytes, *, pid: int = 7, cpu: int = 1, stamp: bytes = b"    13.391118") -> bytes:
    """A line as a 6.x kernel prints it."""
    return b"%16b-%-7d [%03d] d.h1. %12b: %b\n" % (comm, pid, cpu, stamp.strip().rjust(12), rest)


def read(
    data: bytes, cls: type[FtraceTextReader] = FtraceTextReader, **options: Any
) -> tuple[FtraceTextReader, list[Chunk], dict[str, pa.Table]]:
    """Reader, chunks, whole tables; the account always adds up."""
    reader = cls(io.BytesIO(data), ReadOptions(**options))
    chunks = list(reader.chunks())
    account = reader.accounting
    assert account.total == len(data) == account.parsed + account.skipped and account.skipped >= 0
    parts: dict[str, list[pa.Table]] = {}
    for chunk in chunks:
        for name, table in chunk.tables.items():
            table.validate(full=True)
            assert table.schema.equals(reader.tables[name].schema())
            parts.setdefault(name, []).append(table)
    tables = {name: pa.concat_tables(tables) for name, tables in parts.items()}
    assert sum(reader.counts.values()) == sum(table.num_rows for table in tables.values())
    return reader, chunks, tables


NASTY = [b"", b"a-12 [001]", b" x", b"a: b", b"\xff\xfe", b"==>", b"tab\there", b"back\\slash", b"caf\xc3\xa9"]
NASTY += [b"<...>", b"x=1 y=2"]


def test_task_names_are_bytes() -> None:
    """Any bytes in a task name: the columns are right and the name can be had back."""
    data = b"".join(line(name, b"softirq_entry: vec=7 [action=SCHED]", pid=i) for i, name in enumerate(NASTY))
    data += b"".join(
        line(b"t", b"sched_wakeup: comm=%b pid=%d prio=120 target_cpu=003" % (name, i)) for i, name in enumerate(NASTY)
    )
    _, _, tables = read(data)
    expected = [
        name.lstrip(b" ").replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace") for name in NASTY
    ]
    assert tables["softirq_entry"]["comm"].to_pylist() == expected
    assert tables["softirq_entry"]["pid"].to_pylist() == list(range(len(NASTY)))
    woken = tables["sched_wakeup"]
    assert woken["arg_pid"].to_pylist() == list(range(len(NASTY)))
    plain = [name.replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace") for name in NASTY]
    assert woken["arg_comm"].to_pylist() == plain


def test_lost_marks_and_started_marks() -> None:
    """Lost records become gaps between the CPU's neighbours; a started buffer is only a note."""
    data = line(b"a", b"cpu_idle: state=1 cpu_id=1", stamp=b"1.000001")
    data += b"CPU:1 [LOST 7516 EVENTS]\n"
    data += b"##### CPU 1 buffer started ####\n"
    data += line(b"a", b"cpu_idle: state=4294967295 cpu_id=1", stamp=b"2.000001") + b"CPU:1 [EVENTS DROPPED]\n"
    data = b"# entries-in-buffer/entries-written: 2/12   #P:2\n" + data
    reader, chunks, _ = read(data)
    gaps = [(gap.reason, gap.cpu, gap.t0, gap.t1, gap.lost) for chunk in chunks for gap in chunk.gaps]
    assert ("lost-records", 1, 1000001, 2000001, 7516) in gaps
    assert ("lost-records", 1, 2000001, None, None) in gaps
    assert ("overrun", None, None, None, 10) in gaps
    assert "ftrace-buffer-started" in {note.code for chunk in chunks for note in chunk.notes}
    assert reader.accounting.skipped == 0


def test_marker_with_newlines() -> None:
    """Raw lines after a marker are kept with the marker's stamp; anywhere else they are damage."""
    data = line(b"sh", b"tracing_mark_write: first") + b"second line of the marker\nand a third\n"
    idle = line(b"sh", b"cpu_idle: state=1 cpu_id=1")
    data += idle + b"stray words of no record\n" + idle
    reader, chunks, tables = read(data)
    text = tables["ftrace_text"].to_pydict()
    assert text["payload"] == ["second line of the marker", "and a third"]
    assert set(text["event"]) == {"(continued)"} and text["t_ns"] == [0, 0] and text["offset"] == [2, 3]
    assert reader.accounting.skipped == len("stray words of no record\n")
    assert [gap.reason for chunk in chunks for gap in chunk.gaps] == ["damaged"]


def test_unknown_and_unexpected_payloads_stay_text() -> None:
    """An event that no declaration knows gets columns from its keys, else its payload is kept."""
    data = line(b"a", b"my_probe: (do_it+0x0/0x30) a=0x10 b=-3 name=\"x y\"") * 2
    data += line(b"a", b"my_probe: something else")
    data += line(b"a", b"mystery: free words") + line(b"a", b"irq_handler_entry: not what it prints")
    data += line(b"a", b"ret_probe: (caller+0x11/0x20 <- callee) ret=0xffffffffffffffff")
    reader, _, tables = read(data)
    assert tables["my_probe"]["a"].to_pylist() == [16, 16] and tables["my_probe"]["b"].to_pylist() == [-3, -3]
    assert tables["my_probe"]["__probe_ip_sym"].to_pylist() == ["do_it+0x0/0x30"] * 2
    assert tables["ret_probe"]["ret"].to_pylist() == [(1 << 64) - 1]
    assert tables["ret_probe"]["__probe_func_sym"].to_pylist() == ["callee"]
    assert sorted(tables["ftrace_text"]["event"].to_pylist()) == ["irq_handler_entry", "my_probe", "mystery"]
    assert reader.counts["my_probe"] == 3 and reader.counts["irq_handler_entry"] == 1


def test_function_lines_between_events() -> None:
    """Function tracer lines have no event name."""
    data = line(b"a", b"do_one <-do_two") + line(b"a", b"cpu_idle: state=1 cpu_id=1")
    _, _, tables = read(data)
    assert tables["function"]["ip_sym"].to_pylist() == ["do_one"]
    assert tables["function"]["parent_ip_sym"].to_pylist() == ["do_two"]


def test_perf_script() -> None:
    """perf prints the subsystem and no dash before the pid."""
    data = b"swapper     0 [003] 12345.678901: irq:irq_handler_entry: irq=24 name=timer 0\n"
    data += b"my task  4711/4712 [001] 12345.678903234:   sched:sched_stat_runtime: comm=my task pid=4712 "
    data += b"runtime=3 [ns]\n"
    assert sniff(data) is PerfScriptReader
    reader, _, tables = read(data, PerfScriptReader)
    assert tables["irq_handler_entry"]["name"].to_pylist() == ["timer 0"]
    own = tables["sched_stat_runtime"].to_pydict()
    assert (own["comm"], own["tgid"], own["pid"], own["cpu"]) == (["my task"], [4711], [4712], [1])
    assert reader.counts == {"irq_handler_entry": 1, "sched_stat_runtime": 1}


@pytest.mark.parametrize("style", ["script", "string", "zlib"])
def test_systrace(style: str) -> None:
    """The trace inside an HTML page, in the three ways in which pages carry it."""
    trace = b"# tracer: nop\n" + line(b"a", b"cpu_idle: state=1 cpu_id=1") + line(b"b", b"tracing_mark_write: B|7|x")
    if style == "zlib":
        body = b"TRACE:\n" + base64.b64encode(zlib.compress(trace))
    else:
        body = trace
    if style == "string":
        literal = trace.replace(b"\n", b"\\n\\\n")
        page = b'<!DOCTYPE html>\n<script>var linuxPerfData = "' + literal + b'";</script>'
    else:
        head = b'<!DOCTYPE html>\n<html><script class="trace-data" type="application/text">\n'
        page = head + body + b"</script></html>"
    assert sniff(page) is SystraceReader
    reader, _, tables = read(page, SystraceReader)
    assert reader.counts == {"cpu_idle": 1, "tracing_mark_write": 1}
    assert tables["tracing_mark_write"]["buf"].to_pylist() == ["B|7|x"]


@pytest.mark.parametrize("style", ["script", "string", "zlib"])
def test_places_of_systrace_are_those_of_the_page(style: str) -> None:
    """Lines and offsets count in the page, with what stands around the trace; of packed text the block is the place."""
    rows = [b"# tracer: nop\n"] + [line(b"a", b"cpu_idle: state=%d cpu_id=1" % n) for n in range(300)]
    rows.insert(200, b"?? no event at all\n")
    rows.insert(100, b"CPU:3 [LOST 7 EVENTS]\n")
    trace = b"".join(rows)
    top = b"<!DOCTYPE html>\n<html><!-- \\n a\n\n-->"
    if style == "string":
        page = top + b'<script>\nvar linuxPerfData = "' + trace.replace(b"\n", b"\\n\\\n") + b'";</script>'
    else:
        body = trace if style == "script" else b"TRACE:\n" + base64.b64encode(zlib.compress(trace))
        lists = b'<script class="trace-data" type="application/text">\nUSER PID\n</script>\n'
        page = top + lists + lists.replace(b"USER PID", b"\n\n" + body) + b"</html>"
    assert sniff(page) is SystraceReader
    reader, chunks, tables = read(page, SystraceReader)
    found = tables["cpu_idle"].to_pydict()
    assert len(found["state"]) == 300 and reader.accounting.skipped == len("?? no event at all\n")
    for state, number in zip(found["state"], found["offset"], strict=True):
        shown = page.split(b"\n")[number - 1] if style != "zlib" else rows[number - 1]
        assert b"cpu_idle: state=%d cpu_id=1" % state in shown
    for mark, code, reason in ((b"?? no", "ftrace-line", "damaged"), (b"CPU:3 [", "ftrace-lost", "lost-records")):
        place = page.index(mark) if style != "zlib" else page.index(b"TRACE:")
        (told,) = [note for chunk in chunks for note in chunk.notes if note.code == code]
        (gap,) = [gap for chunk in chunks for gap in chunk.gaps if gap.reason == reason]
        assert told.offset == gap.offset == place
        if code == "ftrace-line":
            number = page.count(b"\n", 0, place) + 1 if style != "zlib" else 202
            assert told.text == f"line {number}"


def test_endless_line_is_bounded() -> None:
    """A line of 100 MB costs neither memory nor the records around it."""
    good = line(b"a", b"cpu_idle: state=1 cpu_id=1")
    data = good + b"x" * (100 << 20) + b"\n" + good
    tracemalloc.start()
    reader, chunks, _ = read(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80 << 20
    assert reader.counts == {"cpu_idle": 2} and reader.accounting.skipped == (100 << 20) + 1
    assert "ftrace-long-line" in {note.code for chunk in chunks for note in chunk.notes}


def test_junk_is_bounded() -> None:
    """Megabytes of binary junk and of tiny lines after one good line: quick, and accounted as skipped."""
    good = line(b"a", b"cpu_idle: state=1 cpu_id=1")
    junk = random.Random(1).randbytes(2 << 20) + b"\n" + b"x\n" * 200_000 + b"-1 " * 300_000 + b"\n"
    begin = time.process_time()
    reader, _, _ = read(good + junk + good)
    assert time.process_time() - begin < 15
    assert reader.counts["cpu_idle"] == 2
    assert reader.accounting.skipped > len(junk) * 0.9


def test_not_ftrace_text() -> None:
    """Text without a single line in the layout is the typed error."""
    for data in (b"", b"hello\nworld\n", b"\0" * 5000, b"\n" * 100):
        with pytest.raises(RecordingError):
            FtraceTextReader(io.BytesIO(data), ReadOptions())


SEEDS = [
    "ftrace-linux-6.1_10-kprobes",
    "ftrace-linux-6.1_03-tgid",
    "ftrace-linux-6.1_60-stacktrace",
    "ftrace-arm64-gic2_40-kvm",
]


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SEEDS), st.integers(0, 1 << 32), st.integers(0, 40))
def test_noise_and_truncation(name: str, seed: int, flips: int) -> None:
    """Cut anywhere and flip bytes: valid tables or the typed error, and most of the good lines survive."""
    data = bytearray(unpacked(SAMPLES / f"{name}.txt.zst")[:40_000])
    chance = random.Random(seed)
    del data[chance.randrange(3000, len(data)) :]
    for _ in range(flips):
        data[chance.randrange(len(data))] = chance.randrange(256)
    try:
        reader, _, _ = read(bytes(data))
    except RecordingError:
        assert flips
        return
    events = sum(count for event, count in reader.counts.items() if event != "(continued)")
    assert events >= bytes(data).count(b": ") // 12 - flips


def test_damaged_mask_stays_text() -> None:
    """A CPU mask with a letter that is no digit is not decoded, and stops nothing."""
    data = line(b"a", b"ipi_raise: target_mask=00000000,00000003 (Function call interrupts)")
    data += line(b"a", b"ipi_raise: target_mask=000000p0,00000001 (Function call interrupts)")
    _, _, tables = read(data)
    assert tables["ipi_raise"]["target_cpus"].to_pylist() == [[3]]
    assert tables["ftrace_text"]["event"].to_pylist() == ["ipi_raise"]


@pytest.mark.parametrize("batch", [20 << 20, 3000])
def test_damage_lies_between_the_records_around_it(
    batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stretch of junk has the times of the records before and after it, in the reader's ticks and in the dataset."""
    monkeypatch.setattr("parsers.ftrace.text.BATCH", batch)
    lines = [line(b"a", b"cpu_idle: state=1 cpu_id=1", stamp=b"10.%06d" % (10 * n)) for n in range(900)]
    long = b"y" * (1 << 20) + b"\n"
    data = b"".join([*lines[:100], b"?? no event at all\n", *lines[100:700], long, *lines[700:], b"?? after all\n"])
    _, chunks, _ = read(data)
    gaps = sorted((gap for chunk in chunks for gap in chunk.gaps), key=lambda gap: gap.offset)
    first = 10_000_000
    assert [(gap.t0, gap.t1) for gap in gaps] == [
        (first + 990, first + 1000), (first + 6990, first + 7000), (first + 8990, None)
    ]  # fmt: skip
    assert [data[gap.offset : gap.offset + 3] for gap in gaps] == [b"?? ", b"yyy", b"?? "]
    (tmp_path / "noise.txt").write_bytes(data)
    done = ingest([str(tmp_path / "noise.txt")], tmp_path / "set", IngestOptions())
    placed = [(gap["t0_ns"], gap["t1_ns"]) for gap in sorted(done.gaps, key=lambda gap: int(gap["offset"]))]
    assert placed == [(990_000, 1_000_000), (6_990_000, 7_000_000), (8_990_000, None)]
