"""Files made to exhaust the reader: very many names, absurd counts, instances in one place, path names, bombs."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import resource
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import parsers.ftrace.build
import parsers.ftrace.payload
import parsers.qemu.reader
import parsers.tracedat.events
import parsers.tracedat.header
import parsers.tracedat.pages
import parsers.tracedat.reader
import tracetool.store
from parsers.open import RATIO_FREE_BYTES, open_recording
from parsers.qemu.reader import QemuReader
from parsers.recording import ReadOptions, RecordingError
from parsers.tracedat.layout import Limit
from parsers.tracedat.pages import PageStream
from parsers.xenalyze.reader import AUX, XenalyzeReader
from tests.damage.test_ftrace_damage import line
from tests.damage.test_ftrace_damage import read as read_text
from tests.damage.test_tracedat_damage import FORMAT, Writer
from tests.damage.test_tracedat_damage import read as read_dat
from tests.recordings.xentrace_tools import read as read_xentrace
from tests.recordings.xentrace_tools import record, window
from tracetool.ingest import IngestOptions, ingest

FEW = 6


@pytest.fixture
def few_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a kernel had but FEW events that nobody declared."""
    monkeypatch.setattr(parsers.ftrace.build, "MAX_TABLES", FEW)
    monkeypatch.setattr(parsers.ftrace.payload, "MAX_TABLES", FEW)


def _many_names(count: int) -> bytes:
    lines = []
    for number in range(count):
        lines.append(line(b"task", b"ev_%d: a=%d b=x\\%d" % (number, number, number)))
        lines.append(line(b"task", b"softirq_entry: vec=%d [action=SCHED]" % (number % 10)))
    lines += [line(b"task", b"ev_%d: again" % number) for number in range(count)]
    return b"".join(lines)


def test_more_event_names_than_tables_in_text(few_names: None) -> None:
    """The first FEW names have columns or a count of their own; the others are text, with their names, in order."""
    count = 40
    reader, chunks, tables = read_text(_many_names(count))
    assert set(tables) == {"softirq_entry", "ftrace_text", *(f"ev_{n}" for n in range(FEW))}
    assert tables["softirq_entry"]["vec"].to_pylist() == [n % 10 for n in range(count)]
    text = tables["ftrace_text"]
    kept = {row["seq"]: (row["event"], row["payload"]) for row in text.to_pylist()}
    assert kept == {
        **{2 * n: (f"ev_{n}", f"a={n} b=x\\\\{n}") for n in range(FEW, count)},
        **{2 * count + n: (f"ev_{n}", "again") for n in range(count)},
    }
    assert text["seq"].to_pylist() == sorted(kept) and set(text["comm"].to_pylist()) == {"task"}
    assert reader.counts == {
        "softirq_entry": count, "(other events)": 2 * (count - FEW), **{f"ev_{n}": 2 for n in range(FEW)}
    }  # fmt: skip
    (told,) = [note for chunk in chunks for note in chunk.notes if note.code == "ftrace-many-events"]
    assert told.count == 2 * (count - FEW) and told.severity == "warn"


def test_a_wanted_event_is_never_one_of_too_many(few_names: None) -> None:
    """`only` names an event that comes late: it has its columns."""
    reader, _, tables = read_text(_many_names(40), only=frozenset({"ev_39"}))
    assert tables["ev_39"]["a"].to_pylist() == [39] and reader.counts == {"ev_39": 2}


def _limited(script: str, *arguments: str, mebibytes: int) -> subprocess.CompletedProcess[str]:
    """Run Python with at most so much private memory."""
    size = mebibytes << 20

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (size, size))

    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=limit, check=False)


@pytest.mark.slow
def test_a_million_event_names(tmp_path: Path) -> None:
    """One event name for each line: ingest ends within 1 GiB and every line is a row."""
    path = tmp_path / "names.txt"
    with path.open("wb") as out:
        out.writelines(line(b"t", b"ev_%d: a=%d" % (n, n)) for n in range(1_000_000))
    script = (
        "import sys; from tracetool.ingest import *; from pathlib import Path;"
        "print(ingest([sys.argv[1]], Path(sys.argv[2]), IngestOptions()).manifest['span']['records'])"
    )
    done = _limited(script, str(path), str(tmp_path / "set"), mebibytes=1024)
    assert done.stdout == "1000000\n", done.stderr[-2000:]


def _formats(writer: Writer, names: list[str], system: str = "irq") -> bytes:
    """The section body of event formats: `tick` under other names and ids from 77 on."""
    body = writer.pack("I", 1) + system.encode() + b"\0" + writer.pack("I", len(names))
    for number, name in enumerate(names):
        text = FORMAT.replace("name: tick", f"name: {name}").replace("ID: 77", f"ID: {77 + number}").encode()
        body += writer.pack("Q", len(text)) + text
    return body


def _with_formats(names: list[str], system: str = "irq") -> bytes:
    """A version 6 file with one record of each event."""
    writer = Writer(version=6, page=65536)
    old = writer.pack("I", 1) + b"irq\0" + writer.pack("I", 1) + writer.pack("Q", len(FORMAT)) + FORMAT.encode()
    body = b"".join(writer.record(1, writer.event(n, ident=77 + n)) for n in range(len(names)))
    pages = writer.ring(10, body)
    writer_file = writer.file({0: pages})
    assert writer_file.count(old) == 1
    new = _formats(writer, names, system)
    grown = len(new) - len(old)
    # the data moves: whole pages, so that its place stays aligned
    padding = -grown % writer.page
    data_at = writer_file.index(pages)
    entry = writer_file.index(writer.pack("QQ", data_at, len(pages)))
    head = writer_file[:entry] + writer.pack("QQ", data_at + grown + padding, len(pages))
    head = head.replace(old, new)
    between = writer_file[entry + 16 : data_at]
    return head + between + bytes(padding) + pages


def test_more_events_than_tables_in_trace_dat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events beyond the limit go to ftrace_raw as bytes, counted by their names."""
    few = SimpleNamespace(EVENTS=3, NOTES=Limit.NOTES)
    monkeypatch.setattr(parsers.tracedat.events, "Limit", few)
    names = [f"ev_{n}" for n in range(8)]
    reader, chunks, tables = read_dat(_with_formats(names))
    assert reader.counts == dict.fromkeys(names, 1)
    assert set(tables) == {"ev_0", "ev_1", "ev_2", "ftrace_raw"}
    raw = tables["ftrace_raw"]
    assert raw["event_id"].to_pylist() == [80, 81, 82, 83, 84]
    assert raw["payload"].to_pylist() == [Writer().event(n, ident=77 + n) for n in range(3, 8)]
    codes = {note.code: note.count for chunk in chunks for note in chunk.notes}
    assert codes["tracedat-many-events"] == 5 and "tracedat-unknown-event" not in codes


PATHS = ["../../escaped", "/tmp/escaped", "a/../../escaped", "..", "x" * 300, "semi;colon", "nul\\0", "-rf", ".hidden"]


def test_names_that_are_paths_stay_in_the_dataset(tmp_path: Path) -> None:
    """Names of events, systems and instances never choose where a file is written; every record can be read again."""
    names = [*PATHS, "x" * 301]
    for place, data in (
        ("events", _with_formats(names)),
        ("systems", _with_formats(["tick", "tick"], "../../escaped")),  # two of a name: the system becomes part of it
        ("instance", Writer().file({0: Writer().ring(5, Writer().record(0, Writer().event(1)))}, instance=PATHS[0])),
    ):
        home = tmp_path / place / "deep" / "er"
        home.mkdir(parents=True)
        recording = home / "hostile.dat"
        recording.write_bytes(data)
        done = ingest([str(recording)], home / "set", IngestOptions())
        assert {path.name for path in home.iterdir()} == {"hostile.dat", "set"}
        assert {path.parent.name for path in tmp_path.rglob("*escaped*")} <= {"records"}
        files = list((home / "set" / "records").iterdir())
        assert sum(pq.read_metadata(path).num_rows for path in files) == done.manifest["span"]["records"] > 0
        assert all(len(path.name) < 200 for path in files)


def test_names_that_are_paths_in_text(tmp_path: Path) -> None:
    """What is no kernel's event name stays text."""
    lines = [line(b"t", b"softirq_entry: vec=1 [action=TIMER]")]
    lines += [line(b"../../escaped", name.encode() + b": a=1") for name in PATHS] + [line(b"t", b"nul\0nul: a=1")]
    reader, _, tables = read_text(b"".join(lines))
    assert sum(table.num_rows for table in tables.values()) == len(lines)
    assert all("/" not in name and "\0" not in name and len(name) <= 128 for name in reader.tables)


def test_more_tables_than_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording with more events than this process may open files."""
    path = tmp_path / "many.dat"
    path.write_bytes(_with_formats([f"ev_{n}" for n in range(100)]))
    monkeypatch.setattr(tracetool.store, "_allow_many_files", lambda: None)
    ingest([str(path)], tmp_path / "first", IngestOptions())  # opens what is opened once
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 40, before[1]))
    try:
        done = ingest([str(path)], tmp_path / "set", IngestOptions())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert done.manifest["span"]["records"] == 100


def test_unknown_ids_of_xentrace_share_a_table() -> None:
    """Ids that nothing declares, all different: one table, as words."""
    count = 20_000
    records = b"".join(record(0x0B000000 + n, [n], 100 + n) for n in range(count))
    tables = read_xentrace(window(0, records)).tables
    assert {name for name in tables if tables[name].num_rows} == {"cpu_change", "unknown"} or "unknown" in tables
    unknown = tables["unknown"]
    assert unknown["event"].to_pylist() == [0x0B000000 + n for n in range(count)]
    assert unknown["words"].to_pylist() == [[n] for n in range(count)]


def test_more_event_names_than_are_counted_of_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undeclared events of QEMU: one table, counted by name up to a limit."""
    monkeypatch.setattr(parsers.qemu.reader, "MAX_NAMES", 5)
    count = 30
    lines = [f"7@{1_700_000_000 + n}.000000:hostile_{n} value {n}\n" for n in range(count)]
    reader = QemuReader(io.BytesIO("".join(lines).encode()), ReadOptions())
    (chunk,) = reader.chunks()
    table = chunk.tables["qemu_event"]
    assert table["event"].to_pylist() == [f"hostile_{n}" for n in range(count)]
    assert reader.counts["(other events)"] == count - 5 and sum(reader.counts.values()) == count


def test_unknown_words_of_xenalyze_share_a_table() -> None:
    """Lines with a new first word each: kept, in one table."""
    count = 3000
    head = "]  0.000000000 -x- d32767v0 runstate_change d0v0 blocked->runnable\n"
    lines = [f"]  0.{n:09d} -x- d32767v0 hostile{n} {n}\n" for n in range(count)]
    reader = XenalyzeReader(io.BytesIO((head + "".join(lines)).encode()), ReadOptions())
    tables: dict[str, list[pa.Table]] = {}
    for chunk in reader.chunks():
        for name, table in chunk.tables.items():
            tables.setdefault(name, []).append(table)
    assert len(tables) < 4 and sum(table.num_rows for parts in tables.values() for table in parts) == count + 1


def _refused(data: bytes) -> str:
    """What stops the reader, in its words; all notes count."""
    try:
        _, chunks, _ = read_dat(data)
    except RecordingError as error:
        return str(error)
    return " ".join(note.text for chunk in chunks for note in chunk.notes)


def test_absurd_counts_in_trace_dat() -> None:
    """Counts that no recorder writes are refused before anything is made of them."""
    writer = Writer(version=6)
    data = writer.file({0: writer.ring(10, writer.record(0, writer.event(1)))})
    formats = data.index(b"irq\0") - 4
    for at in (formats - 4, formats, formats + 8):
        assert "event formats" in _refused(data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :])


def test_instances_that_all_point_at_one_place() -> None:
    """Thousands of instances with the same data: their CPUs are counted together, the data is read once."""
    writer = Writer(version=6)
    pages = {0: writer.ring(10, writer.record(0, writer.event(1))), 63: b""}
    plain = writer.file(pages)
    options = 4000
    one = len(writer.pack("HIQ", 3, 10, 0) + b"a\0")
    place = plain.index(b"flyrecord\0") + options * one
    again = b"".join(writer.pack("HIQ", 3, 10, place) + b"a\0" for _ in range(options))
    data = writer.file(pages, options=again)
    assert data.index(b"flyrecord\0") == place
    _, chunks, tables = read_dat(data)
    assert tables["tick"].num_rows == 1
    texts = " ".join(note.text for chunk in chunks for note in chunk.notes)
    assert "CPUs in all instances" in texts or "overlaps" in texts


@pytest.mark.parametrize("method", ["zstd", "none"])
def test_pages_of_all_cpus_are_bounded_together(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """As many CPUs as fit are read whole; the others are given up, with a line and a gap each; never more is held."""
    writer, room, cpus = Writer(method=method), 5, 12
    held: list[int] = []
    keep = parsers.tracedat.pages.PageStream._hold

    def watched(stream: PageStream, block: bytes) -> None:
        keep(stream, block)
        held.append(stream.budget.held)

    monkeypatch.setattr(parsers.tracedat.pages.PageStream, "_hold", watched)
    chunk = writer.page * (2 if method == "zstd" else 1)
    few = SimpleNamespace(**{**Limit.__members__, "CHUNKS_HELD": room * chunk})
    monkeypatch.setattr(parsers.tracedat.reader, "Limit", few)
    rings = {
        cpu: b"".join(writer.ring(10 + n, writer.record(0, writer.event(n))) for n in range(4)) for cpu in range(cpus)
    }
    _, chunks, tables = read_dat(writer.file(rings))
    assert sorted(tables["tick"]["cpu"].to_pylist()) == [cpu for cpu in range(room) for _ in range(4)]
    assert 0 < max(held) <= few.CHUNKS_HELD
    told = [note for part in chunks for note in part.notes if note.code == "tracedat-memory"]
    assert [note.cpu for note in told] == list(range(room, cpus))
    assert {note.text for note in told} == {
        f"{chunk} bytes more of pages to hold: all CPUs together may hold {room * chunk}"
    }
    gaps = [gap for part in chunks for gap in part.gaps]
    assert [(gap.cpu, gap.reason) for gap in gaps] == [(cpu, "damaged") for cpu in range(room, cpus)]
    monkeypatch.undo()
    assert read_dat(writer.file(rings))[2]["tick"].num_rows == 4 * cpus


def test_more_task_names_than_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of task names is cut where no kernel could have more."""
    few = SimpleNamespace(**{**Limit.__members__, "TASKS": 0})
    monkeypatch.setattr(parsers.tracedat.header, "Limit", few)
    writer = Writer()
    _, chunks, tables = read_dat(writer.file({0: writer.ring(10, writer.record(0, writer.event(1)))}))
    assert tables["tick"]["comm"].to_pylist() == ["<...>"]
    assert "names of tasks" in " ".join(note.text for chunk in chunks for note in chunk.notes)


def _zstd(data: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(data, asbytes=True))


@pytest.mark.parametrize("codec", ["gzip", "xz", "bz2", "zstd"])
def test_a_bomb_stops_early_in_bounded_memory(tmp_path: Path, codec: str) -> None:
    """What expands a thousandfold and more: refused, long before all of it came out."""
    pack: dict[str, Any] = {"gzip": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress, "zstd": _zstd}
    part = pack[codec](bytes(4 << 20))
    bomb = part * (RATIO_FREE_BYTES // (4 << 20) + 200)
    path = tmp_path / "bomb"
    path.write_bytes(bomb)
    assert len(bomb) * 200 < (RATIO_FREE_BYTES + (800 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(RecordingError, match="expand"):
            open_recording(path)
        assert tracemalloc.get_traced_memory()[1] < 80 << 20
    finally:
        tracemalloc.stop()


def test_the_last_line_of_ftrace_text_may_be_shorter() -> None:
    """`vector=236` cut to `vector=23` is no event: it stays text and the end is told."""
    whole = line(b"t", b"local_timer_entry: vector=236") + line(b"t", b"local_timer_entry: vector=236", cpu=2)
    for data in (whole[:-2], whole[:-1]):
        reader, chunks, tables = read_text(data)
        assert tables["local_timer_entry"]["vector"].to_pylist() == [236]
        assert tables["ftrace_text"]["event"].to_pylist() == ["(cut)"]
        assert tables["ftrace_text"]["payload"].to_pylist() == [data[data.rindex(b"local_") :].decode()]
        (gap,) = [gap for chunk in chunks for gap in chunk.gaps]
        assert gap.reason == "truncated" and gap.t0 is not None and gap.offset == whole.index(b"\n") + 1
        assert "ftrace-truncated" in {note.code for chunk in chunks for note in chunk.notes}
        assert reader.accounting.skipped == 0
    reader, chunks, tables = read_text(whole)
    assert reader.counts == {"local_timer_entry": 2} and not [gap for chunk in chunks for gap in chunk.gaps]


def test_a_cut_line_is_no_event_when_only_some_are_read() -> None:
    """With `only` the cut line is left out, and told."""
    whole = line(b"t", b"local_timer_entry: vector=236") * 2
    reader, chunks, _ = read_text(whole[:-2], only=frozenset({"local_timer_entry"}))
    assert reader.counts == {"local_timer_entry": 1}
    assert [gap.reason for chunk in chunks for gap in chunk.gaps] == ["truncated"]


def test_a_cut_stack_line_is_no_caller() -> None:
    """The last symbol of a stack trace may be shorter too."""
    data = line(b"t", b"softirq_entry: vec=7 [action=SCHED]") + line(b"t", b"<stack trace>") + b" => one\n => two_th"
    _, chunks, tables = read_text(data)
    assert tables["kernel_stack"]["caller_sym"].to_pylist() == [["one"]]
    assert [gap.reason for chunk in chunks for gap in chunk.gaps] == ["truncated"]


def test_the_last_line_of_a_qemu_log_may_be_shorter() -> None:
    """A last line without end is kept in `unparsed`."""
    one = b"7@1700000000.000000:ioapic_set_irq vector: 23 level: 1\n"
    reader = QemuReader(io.BytesIO(one + one[:-1]), ReadOptions())
    chunks = list(reader.chunks())
    rows = {name: table.num_rows for chunk in chunks for name, table in chunk.tables.items()}
    assert rows == {"ioapic_set_irq": 1, "unparsed": 1}
    assert [gap.reason for chunk in chunks for gap in chunk.gaps] == ["truncated"]
    assert reader.accounting.skipped == len(one) - 1


def test_the_last_line_of_a_xenalyze_dump_may_be_shorter() -> None:
    """A last line without end is no record."""
    text = b"]  0.000000001 -x- d32767v0 runstate_change d0v0 blocked->runnable\n" * 2
    reader = XenalyzeReader(io.BytesIO(text[:-1]), ReadOptions())
    chunks = list(reader.chunks())
    assert sum(table.num_rows for chunk in chunks for name, table in chunk.tables.items() if name != AUX.name) == 1
    assert [gap.reason for chunk in chunks for gap in chunk.gaps] == ["truncated"]
