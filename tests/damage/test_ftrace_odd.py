"""Rare but legal ftrace: several buffers, guests' clocks, glued lines, formats of the trace options, one event only."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from parsers.ftrace.text import FtraceTextReader, TraceCmdReportReader
from parsers.recording import RecordingError
from tests.damage.test_ftrace_damage import line
from tests.damage.test_ftrace_damage import read as read_text
from tests.damage.test_tracedat_damage import FORMAT, Writer, busy, read
from tests.recordings.test_tracedat import unpacked
from tests.shared import SAMPLES

SHARED = ("ftrace-linux-6.1_01-default.txt.zst", "ftrace-linux-6.1_50-clock-x86-tsc.txt.zst")


@pytest.mark.parametrize("order", "<>")
def test_second_buffer_is_merged_by_time(order: str) -> None:
    """v6 with an instance: its records are between the top buffer's, and say so in `buffer`."""
    w = Writer(order=order, version=6)
    top = {0: w.ring(10, w.record(0, w.event(1)) + w.record(20, w.event(3)))}
    plain = w.file(top, options=w.pack("HIQ", 3, 8 + 6, 0) + b"inner\0")
    table = (len(plain) + 4095) // 4096 * 4096
    data = w.file(top, options=w.pack("HIQ", 3, 8 + 6, table) + b"inner\0").ljust(table, b"\0")
    inner = w.ring(20, w.record(0, w.event(2)) + w.record(30, w.event(4)))
    data += b"flyrecord\0" + w.pack("QQ", table + 4096, len(inner))
    _, _, tables = read(data.ljust(table + 4096, b"\0") + inner)
    rows = tables["tick"].to_pydict()
    assert rows["irq"] == [1, 2, 3, 4] and rows["tsc"] == [10, 20, 30, 50]
    assert rows["buffer"] == ["", "inner", "", "inner"] and rows["t_ns"] == [0, 10, 20, 40]


def _times(stamps: list[int], samples: list[tuple[int, int, int, int]], flags: int) -> list[int]:
    """t_ns of records at `stamps` in a guest's recording whose shift has (time, offset, scaling, fraction)."""
    w = Writer()
    body = w.record(0, w.event(0))
    for number, (before, after) in enumerate(pairwise(stamps), start=1):
        body += w.record(after - before, w.event(number))
    option = w.pack("QIII", 1, flags, 1, len(samples))
    for code, values in zip("QqQQ", zip(*samples, strict=True), strict=True):
        option += w.pack(f"{len(values)}{code}", *values)
    _, _, tables = read(w.file({0: w.ring(stamps[0], body)}, options=w.pack("HI", 12, len(option)) + option))
    assert tables["tick"]["tsc"].to_pylist() == stamps
    elapsed = tables["tick"]["t_ns"].to_pylist()
    return [int(value) for value in elapsed]


def test_time_shift_takes_the_sample_before() -> None:
    """Without interpolation each stamp gets the offset of the sample pair that it lies in."""
    assert _times([100, 1200, 2500], [(1000, 7, 1, 0), (2000, 50, 1, 0), (3000, 90, 1, 0)], 0) == [0, 1100, 2443]


def test_time_shift_interpolates() -> None:
    """With the flag the offset runs linearly between the samples, and on beyond them."""
    samples = [(1000, 0, 1, 0), (2000, 100, 1, 0), (3000, 500, 1, 0)]
    stamps = [1000, 1500, 2000, 2250, 3500]
    moved = [1000, 1550, 2100, 2450, 3500 + 700]
    assert _times(stamps, samples, 1) == [time - 1000 for time in moved]


def test_time_shift_scales() -> None:
    """A guest whose TSC has another speed: (stamp * scaling) >> fraction, with more than 64 bits."""
    scaling = 3 << 47  # 1.5 with 48 bits of fraction
    stamps = [1 << 50, (1 << 50) + 1001, (1 << 50) + 20_000]
    wanted = [int(Fraction(stamp * scaling, 1 << 48)) for stamp in stamps]
    assert _times(stamps, [(5, -40, scaling, 48)], 0) == [value - wanted[0] for value in wanted]


def test_broken_format_of_a_recorded_event() -> None:
    """An event whose format cannot be understood: its records stay as bytes, with a note where the format is."""
    w = Writer(version=6)
    data = w.file(busy(w))
    broken = data.replace(b"field:u64 wide;", b"field:    wide;")
    reader, chunks, tables = read(broken)
    assert tables["ftrace_raw"].num_rows == 9 and reader.counts == {"event_77": 9}
    notes = [note for chunk in chunks for note in chunk.notes if note.code == "tracedat-formats"]
    assert len(notes) == 1 and notes[0].offset < broken.index(b"name: tick")


def test_event_glued_to_a_marker() -> None:
    """A marker with a NUL loses its end of line: the whole line stays the marker's, nothing is lost."""
    first, second = line(b"sh", b"tracing_mark_write: one\0"), line(b"sh", b"softirq_entry: vec=7 [action=SCHED]")
    _, _, tables = read_text(first.rstrip(b"\n") + second + line(b"sh", b"softirq_exit: vec=7 [action=SCHED]"))
    (text,) = tables["tracing_mark_write"]["buf"].to_pylist()
    assert text.startswith("one\\x00") and text.endswith("softirq_entry: vec=7 [action=SCHED]")
    assert tables["softirq_exit"].num_rows == 1


VERBOSE = b"%16b %7d %3d %d %08x %08x [%08x] 12.345ms (+0.010ms): %b\n"
SOFTIRQ = b"softirq_entry: vec=7 [action=SCHED]"
#: Layouts of the trace options, as kernel/trace/trace_output.c prints them: the line, (pid, cpu, tsc, flags, preempt,
#: comm) that it shows, and where the record must be.
PLAIN_LAYOUTS = {
    "verbose": (VERBOSE % (b"sh", 123, 1, 17, 2, 7, 500, SOFTIRQ), (123, 1, 500, 17, 2, "sh"), "softirq_entry"),
    "verbose, ticks": (
        b"              sh     123   1 17 00000002 00000007 [00000000000001f4] 500 (+3): " + SOFTIRQ + b"\n",
        (123, 1, 500, 17, 2, "sh"),
        "softirq_entry",
    ),
    "raw": (b"123 1 1234567 type: 63\n", (123, 1, 1234567, None, None, None), "event_63"),
    "raw, named": (b"123 1 1234567 softirq_entry: 63\n", (123, 1, 1234567, None, None, None), "softirq_entry"),
    "raw, function": (
        b"123 1 1234567 ffffffff810223d0 ffffffff81661470\n", (123, 1, 1234567, None, None, None), "(no name)",
    ),
    "hex": (b"0000007b 00000001 000000000012d687 type: 63\n", (123, 1, 1234567, None, None, None), "event_63"),
    "hex, odd": (b"7b000000 01000000 1234 \n", (0x7B000000, None, 0x1234, None, None, None), "(no name)"),
    "nocontext-info": (SOFTIRQ + b"\n", (None,) * 6, "softirq_entry"),
    "nocontext-info, probe": (b"mine: (do_it+0x0/0x30) a=0x10\n", (None,) * 6, "mine"),
    "fields": (
        line(b"sh", b"softirq_entry: vec=0x7 (7)", pid=123),
        (123, 1, 13391118, 0x09, 1, "sh"),
        "softirq_entry",
    ),
}  # fmt: skip
COLUMNS = ("pid", "cpu", "tsc", "flags", "preempt", "comm")


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "among others"])
@pytest.mark.parametrize("layout", PLAIN_LAYOUTS)
def test_layouts_of_trace_options_are_kept(layout: str, alone: bool) -> None:
    """Each line of a plainer layout is a record with what it shows, null for the rest; none is skipped."""
    odd, shown, event = PLAIN_LAYOUTS[layout]
    data = 3 * odd
    if alone:
        data = b"# tracer: nop\n#\n" + data
    else:
        data = line(b"sh", b"softirq_raise: vec=7 [action=SCHED]", stamp=b"0.000400") + data
    reader, chunks, tables = read_text(data, only=frozenset())
    assert not [gap for chunk in chunks for gap in chunk.gaps] and reader.accounting.skipped == 0
    assert reader.counts.pop("softirq_raise", 1) == 1 and reader.counts == {event: 3}
    table = tables[event] if event in tables else tables["ftrace_text"]
    for name, value in zip(COLUMNS, shown, strict=True):
        assert table[name].to_pylist() == [value] * 3, name
    assert (table["t_ns"].null_count == 3) == (shown[2] is None)
    assert table["offset"].to_pylist() == ([3, 4, 5] if alone else [2, 3, 4])
    if event == "softirq_entry" and "vec" in table.column_names:
        assert table["vec"].to_pylist() == [7] * 3
    elif "payload" in table.column_names:
        assert set(table["event"].to_pylist()) == {event}
        assert table["payload"].to_pylist()[0] in odd.decode()


def test_plain_words_are_no_recording() -> None:
    """Without a header, lines that could be anything are not taken for the plainer layouts."""
    for text in (b"note: buy milk\n" * 50, b"12 3 4567 apples: 8\n" * 2, b"Error: no such file\nsh: 1: not found\n"):
        with pytest.raises(RecordingError):
            read_text(text)


def test_marker_text_is_no_event_without_context() -> None:
    """A line that looks like an event without context belongs to the marker before it."""
    data = line(b"sh", b"tracing_mark_write: first") + SOFTIRQ + b"\n" + line(b"sh", b"cpu_idle: state=1 cpu_id=1")
    reader, _, tables = read_text(data)
    assert reader.counts == {"tracing_mark_write": 1, "(continued)": 1, "cpu_idle": 1}
    assert tables["ftrace_text"]["payload"].to_pylist() == [SOFTIRQ.decode()]


def test_graph_without_cpu() -> None:
    """function_graph with funcgraph-cpu off."""
    data = b"# tracer: function_graph\n#\n#     DURATION                  FUNCTION CALLS\n"
    data += b"               |  do_one() {\n   0.752 us    |    do_two();\n + 11.003 us   |  }\n"
    reader, _, tables = read_text(data)
    assert reader.counts == {"funcgraph": 3} and reader.accounting.skipped == 0
    assert tables["funcgraph"]["duration_ns"].to_pylist() == [None, 752, 11003]
    assert tables["funcgraph"]["cpu"].null_count == 3


def test_report_with_instances() -> None:
    """`trace-cmd report` puts `instance: ` before the lines of other buffers and blanks before the top one's."""
    row = b"%b%16b-%-5d [%03d] %12b: %-20b %b\n"
    data = b"cpus=2\n"
    data += row % (b"       ", b"sh", 5, 0, b"1.000001", b"softirq_entry:", b"vec=7 [action=SCHED]")
    data += row % (b"inner: ", b"<idle>", 0, 1, b"1.000003", b"softirq_exit:", b"vec=7 [action=SCHED]")
    _, _, tables = read_text(data, TraceCmdReportReader)
    assert tables["softirq_exit"]["buffer"].to_pylist() == ["inner"]
    assert tables["softirq_exit"]["comm"].to_pylist() == ["<idle>"]
    assert tables["softirq_entry"]["buffer"].to_pylist() == [""]
    assert tables["softirq_entry"]["comm"].to_pylist() == ["sh"]


@pytest.mark.parametrize("name", SHARED)
def test_only_some_events(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`only` gives the rows that a whole reading gives, but for `seq`, whatever the batches; other events are gone."""
    data = unpacked(SAMPLES / name)
    _, _, whole = read_text(data)
    only = frozenset({"irq_handler_entry", "irq_handler_exit", "sched_switch", "softirq_entry", "absent"})
    only |= {next(event for event in sorted(whole) if event not in only and whole[event].num_rows)}
    for batch in (12 << 20, 9_000):
        monkeypatch.setattr("parsers.ftrace.text.BATCH", batch)
        reader, _, some = read_text(data, FtraceTextReader, only=only)
        assert set(some) == {event for event in whole if event in only} and len(some) >= 2
        sequence = np.sort(np.concatenate([table["seq"].to_numpy() for table in some.values()]))
        assert np.array_equal(sequence, np.arange(sequence.size))
        for event, table in some.items():
            assert table.drop_columns(["seq"]).to_pydict() == whole[event].drop_columns(["seq"]).to_pydict()
        assert reader.accounting.skipped == 0


def test_only_ignores_names_elsewhere_in_the_line() -> None:
    """A marker whose text imitates a wanted event is not that event."""
    data = line(b"a", b"tracing_mark_write: x softirq_entry: vec=1 [action=TIMER]")
    data += line(b"a", b"softirq_entry: vec=7 [action=SCHED]")
    reader, _, tables = read_text(data, FtraceTextReader, only=frozenset({"softirq_entry"}))
    assert reader.counts == {"softirq_entry": 1} and tables["softirq_entry"]["offset"].to_pylist() == [2]


def _probe_file(names: list[bytes]) -> bytes:
    """A trace.dat of one event, a kprobe with a string argument."""
    w = Writer(version=6)
    body = b""
    for name in names:
        record = w.pack("HBBi", 77, 0, 0, 7) + w.pack("QI", 0xFFFFFFFF81000010, 20 | len(name) << 16) + name
        body += w.record(1, record + bytes(-len(record) % 4))
    fields = "unsigned long __probe_ip;\toffset:8;\tsize:8;\tsigned:0;\n"
    fields += "\tfield:__data_loc char[] what;\toffset:16;\tsize:4;\tsigned:1;\n"
    head = FORMAT[: FORMAT.index("\tfield:int irq;")].replace("name: tick", "name: mine")
    text = head + "\tfield:" + fields + '\nprint fmt: "(%lx) what=\\"%s\\"", REC->__probe_ip, __get_str(what)\n'
    data = w.file({0: w.ring(1000, body)})
    size = w.pack("Q", len(FORMAT))
    return data.replace(size + FORMAT.encode(), w.pack("Q", len(text)) + text.encode())


def test_strings_of_probes_are_equal_in_text_and_binary() -> None:
    """Quotes belong to the print, not to the string; what the kernel could not read is null in both."""
    names = ["eth0", 'say "hi"', "", "a=1 b", None]
    stored = [b"" if name is None else name.encode() + b"\0" for name in names]
    w = Writer(version=6)
    data = _probe_file(stored)
    moved = data.find(w.ring(1000, b"")[:8])
    assert moved > 0
    # the format is longer than the writer's own, so its pages have moved: tell it where they are
    table = data.index(b"flyrecord\0") + 10
    place = (table + 16 + 4095) // 4096 * 4096
    page = data[moved : moved + 4096]
    data = (data[:table] + w.pack("QQ", place, 4096)).ljust(place, b"\0") + page
    _, _, binary = read(data)
    shown = [b"(fault)" if name is None else b'"' + name.encode() + b'"' for name in names]
    _, _, text = read_text(b"".join(line(b"sh", b"mine: (do_it+0x10/0x40) what=" + word) for word in shown))
    assert binary["mine"]["what"].to_pylist() == text["mine"]["what"].to_pylist() == names
