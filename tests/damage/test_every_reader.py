"""Every reader: cut at every offset, noise in any place, any bytes; and the corpus of inputs found by fuzzing.

By default every k-th offset and a few examples; `pytest -m slow` takes all offsets and many examples.
"""

from __future__ import annotations

import io
import random
from collections import Counter
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.damage.fuzz import CORPUS, OPEN, Read, check, check_reader, corpus, corpus_name
from tests.damage.small_files import BINARY, READERS, small_file

#: Offsets tried by default, about; xenalyze's text readers need a tenth of a second each.
OFFSETS = {"xenalyze": 10, "xentrace_format": 10, "xentrace": 60, "trace.dat": 60, "qemu": 30}
#: Examples of noise by default.
EXAMPLES = {"xenalyze": 4, "xentrace_format": 4}
#: Objects that are put together from several lines: the last one before a cut may lack its end.
OPEN_ENDED = {"hrtimer", "clock_event_device"}
#: Columns that later records tell.
LATER = {"qemu": ("cpu",)}
#: Notes of what is missing.
TOLD = ("truncated", "cut", "empty", "section")

Row = tuple[int, str, str]


def rows(read: Read, name: str) -> list[Row]:
    return read.rows(but=("seq", "t_ns", "t_err_ns", *LATER.get(name, ())))


@cache
def whole(name: str) -> tuple[tuple[Row, ...], frozenset[str]]:
    read = check(small_file(name), name)
    assert read is not None and not read.gaps, "the file is sound"
    return tuple(rows(read, name)), frozenset(note.code for note in read.notes)


def assert_prefix(name: str, cut: int) -> None:
    """What a file cut there gives: the records before the cut as they were, and word of the cut."""
    full, usual = whole(name)
    data = small_file(name)[:cut]
    read = check(data, name)
    if read is None:
        return
    got = rows(read, name)
    cpus = {gap.cpu for gap in read.gaps}
    assert len(read.gaps) == len(cpus), f"more than one gap of a CPU: {read.gaps}"
    told = [n for n in read.notes if n.code not in usual and any(word in n.code for word in TOLD)]
    lost = Counter(full)
    lost.subtract(got)
    missing, extra = [r for r, n in lost.items() if n > 0], [r for r, n in lost.items() if n < 0]
    if name in BINARY:
        # Records of a window or page are in order: what is missing of each lies behind what is there.
        assert not extra, extra[:3]
        assert all(offset < cut for offset, _, _ in got)
        if missing:
            assert told or whole_windows(name, cut)
        assert len(got) == expected_count(name, cut)
    else:
        lines = data.count(b"\n")
        opened = {row[:2] for row in missing if row[1] in OPEN_ENDED}
        assert not [r for r in missing if r[0] <= lines and r[:2] not in opened], (cut, missing[:3])
        assert not [r for r in extra if r[0] <= lines and r[:2] not in opened], (cut, extra[:3])
        assert len({offset for offset, _, _ in extra}) <= 2, extra
        if not data.endswith(b"\n") and b"</script>" not in data:
            assert told, "nobody says that the last line is cut"
            assert not cpus or cpus == {None}


def whole_windows(name: str, cut: int) -> bool:
    """A cut between two windows cannot be seen."""
    data, at = small_file(name), 0
    while name == "xentrace" and at < cut:
        at += 12 + int.from_bytes(data[at + 8 : at + 12], "little")
    return at == cut


def expected_count(name: str, cut: int) -> int:
    """Records of the file that end before the cut."""
    full = [offset for offset, _, _ in whole(name)[0]]
    if name == "xentrace":
        ends = [*full[1:], len(small_file(name))]
        return sum(end <= cut for end in ends)
    return sum(record_end(offset) <= cut for offset in full)


def record_end(offset: int) -> int:
    """Where a record of trace.dat ends: by the length in its header (words up to 28, else the word behind it). The next
    one may start later, behind an extension of the time."""
    data = small_file("trace.dat")
    words = data[offset] & 31
    return offset + 4 + (4 * words if words else int.from_bytes(data[offset + 4 : offset + 8], "little"))


@pytest.mark.parametrize("name", READERS)
def test_cut_at_many_offsets(name: str) -> None:
    size = len(small_file(name))
    step = max(1, size // OFFSETS.get(name, 40)) | 1
    for cut in [*range(0, size, step), size - 1]:
        assert_prefix(name, cut)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_cut_at_every_offset(name: str) -> None:
    for cut in range(len(small_file(name))):
        assert_prefix(name, cut)


# -- noise ---------------------------------------------------------------------------------------------------------


def assert_bounded_loss(name: str, start: int, noise: bytes) -> None:
    """Bytes replaced at `start`: what lies outside of the blocks that they are in is still there."""
    data = small_file(name)
    stop = min(len(data), start + len(noise))
    damaged = data[:start] + noise[: stop - start] + data[stop:]
    read = check(damaged, name)
    if name == "trace.dat":
        assert_pages(read, start, stop)
        return
    if read is None:
        assert lost_head(name, start), f"all is lost to {stop - start} bytes at {start}"
        return
    got = Counter(rows(read, name))
    if name == "xentrace":
        # A damaged window header is found again at the next one: 12 bytes whose size field chains.
        spans = window_spans()
        hit = [i for i, (a, b) in enumerate(spans) if a < stop and start < b]
        low, high = spans[hit[0]][0], spans[hit[-1]][1]
        kept = [r for r in whole(name)[0] if not low <= r[0] < high]
        # Records without a stamp of their own and the id's version do not depend on others, but for `tsc`.
        places = {(offset, table) for offset, table, _ in got}
        assert all((offset, table) in places for offset, table, _ in kept)
        return
    # Text: lines in a row; noise may bring or take line ends, so rows behind it move by that many lines.
    first = data[:start].count(b"\n") + 1
    before = [r for r in whole(name)[0] if r[0] < first - CONTEXT.get(name, 0) and r[1] not in OPEN_ENDED]
    gone = [r for r in before if not got[r]]
    assert not gone, f"{len(gone)} rows before the damage, first {gone[0]}"
    last = data[:stop].count(b"\n") + 1
    moved = damaged.count(b"\n") - data.count(b"\n")
    if name in INDEPENDENT:
        # In whichever table: what an undeclared event's columns are is told by its first lines.
        found = {offset for offset, _, _ in got}
        lost = [r for r in whole(name)[0] if r[0] > last and r[0] + moved not in found]
        assert not lost, f"{len(lost)} rows behind the damage, first {lost[0]}"


#: Lines before the damaged one that belong to the same object.
CONTEXT = {"timer-list": 2}
#: Formats in which a line means the same whatever stands before it.
INDEPENDENT = {"qemu", "lsevtchn", "trace-cmd-report", "perf-script", "ftrace", "systrace", "xentrace_format"}


def lost_head(name: str, start: int) -> bool:
    """Whether the damage is in what the format is recognised by."""
    data = small_file(name)
    if name == "proc-interrupts":
        return start <= data.index(b"\n")
    if name == "systrace":
        return start < 100
    return name in ("lsevtchn", "xenalyze", "timer-list", "xentrace") and start < 450


def assert_pages(read: Read | None, start: int, stop: int) -> None:
    """trace.dat: damage in a page loses records of that page only; in the headers it may lose more, or all."""
    first_page = min(offset for offset, _, _ in whole("trace.dat")[0]) // 4096 * 4096
    if start < first_page:
        return
    assert read is not None
    got = Counter(rows(read, "trace.dat"))
    hit = range(start // 4096, (stop - 1) // 4096 + 1)
    lost = [r for r in whole("trace.dat")[0] if r[0] // 4096 not in hit and not got[r]]
    assert not lost, lost[:3]
    # And of the damaged page all records before the damage.
    before = [r for r in whole("trace.dat")[0] if r[0] // 4096 == hit[0] and start % 4096 >= 16 and r[0] < start]
    gone = [r for r in before[:-1] if not got[r]]
    assert not gone, gone[:3]


@cache
def window_spans() -> list[tuple[int, int]]:
    data, spans, at = small_file("xentrace"), [], 0
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at + 8 : at + 12], "little")
        spans.append((at, end))
        at = end
    return spans


def noisy(name: str, examples: int) -> None:
    size = len(small_file(name))

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(st.integers(0, size - 1), st.binary(min_size=1, max_size=40))
    def one(start: int, noise: bytes) -> None:
        assert_bounded_loss(name, start, noise)

    one()


@pytest.mark.parametrize("name", READERS)
def test_noise_in_any_place(name: str) -> None:
    noisy(name, EXAMPLES.get(name, 25))


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_noise_in_every_place(name: str) -> None:
    noisy(name, 300 if name in EXAMPLES else 1500)


# -- any bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*READERS, OPEN])
def test_random_bytes(name: str) -> None:
    """Noise alone, noise behind a good head, and a good file whose bytes were shuffled in blocks."""
    chance = random.Random(name)
    base = small_file(READERS[0] if name == OPEN else name)
    for size in (1, 100, 5000):
        check(chance.randbytes(size), name)
        check(base[:size] + chance.randbytes(size), name)
    blocks = [base[i : i + 97] for i in range(0, len(base), 97)]
    chance.shuffle(blocks)
    check(b"".join(blocks), name)


@pytest.mark.parametrize("name", [*READERS, OPEN])
def test_corpus(name: str) -> None:
    """What fuzzing found once stays mended, and what reaches far into a reader is still read without trouble."""
    paths = list(corpus(name))
    assert paths, "no inputs: `python -m tests.damage.fuzz --reader NAME --out FOLDER`, then `--collect FOLDER`"
    for path in paths:
        try:
            check(path.read_bytes(), name)
        except AssertionError as error:
            raise AssertionError(f"{path.name}: {error}") from error


def test_the_corpus_is_small_and_belongs_to_readers() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} == {corpus_name(name) for name in [*READERS, OPEN]}
    assert len(files) <= 200 and sum(path.stat().st_size for path in files) <= 1 << 20
    assert len({(path.parent, path.read_bytes()) for path in files}) == len(files), "an input is there twice"


class Failing(io.BytesIO):
    """A disk that fails in the middle of the file."""

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if self.tell() > len(self.getvalue()) // 2:
            raise OSError(5, "Input/output error")
        return data


@pytest.mark.parametrize("name", READERS)
def test_a_failing_disk_is_not_hidden(name: str) -> None:
    """An I/O error is no end of file: it comes out as it is (the command makes one line of it)."""
    data = small_file(name)
    with pytest.raises(OSError, match="Input/output"):
        check_reader(Failing(data), len(data), name)
