"""trace.dat files that no machine here records (big-endian, 32-bit, TSC2NSEC, TIME_SHIFT), against trace-cmd itself.

The files come from the struct-based writer of the damage tests; trace-cmd must read them too and say the same.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from tests.damage.test_tracedat_damage import VARIANTS, Writer, busy, read

pytestmark = pytest.mark.skipif(shutil.which("trace-cmd") is None, reason="needs trace-cmd")
LINE = re.compile(rb".{16}-(\d+) +\[(\d+)\] +(\d+)\.(\d{9}): +tick: +irq=(\d+) name=(\w*) wide=(\d+) ", re.S)
Row = tuple[int, int, int, int, bytes, int]


def report(path: Path, data: bytes) -> list[Row]:
    """(pid, cpu, ns, irq, name, wide) of each line of `trace-cmd report -R -t`."""
    path.write_bytes(data)
    done = subprocess.run(["trace-cmd", "report", "-R", "-t", "-i", str(path)], capture_output=True, check=True)
    found = [match.groups() for match in map(LINE.match, done.stdout.split(b"\n")) if match]
    return [(int(p), int(c), int(s) * 10**9 + int(n), int(i), name, int(w)) for p, c, s, n, i, name, w in found]


@pytest.mark.parametrize("writer", [w for w in VARIANTS if w.method != "zlib"], ids=str)
def test_same_records(writer: Writer, tmp_path: Path) -> None:
    """Either byte order, either word size, plain and zstd: the same records and fields (Debian's build has no zlib)."""
    data = writer.file(busy(writer))
    theirs = report(tmp_path / "t.dat", data)
    _, _, tables = read(data)
    rows = tables["tick"].to_pydict()
    names = [name.encode() for name in rows["name"]]
    ours = list(zip(rows["pid"], rows["cpu"], rows["tsc"], rows["irq"], names, rows["wide"], strict=True))
    assert len(theirs) == 9 and ours == theirs


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("start", [(1 << 40) + 12345, (1 << 61) + 12345])
@pytest.mark.parametrize(("mult", "shift", "offset"), [(0x6CCCCCCD, 32, 99), (1613, 12, 0), (0x2CCCCCCD, 33, 10**6)])
def test_tsc2nsec(order: str, start: int, mult: int, shift: int, offset: int, tmp_path: Path) -> None:
    """Stamps times mult, shifted: trace-cmd stores the offset but does not use it, nor does the reader."""
    w = Writer(order=order)
    body = w.record(0, w.event(1)) + w.record(1000, w.event(2)) + w.record(77_777, w.event(3))
    option = w.pack("HIIIQ", 14, 16, mult, shift, offset)
    data = w.file({0: w.ring(start, body)}, clock="tsc2nsec", options=option)
    theirs = [row[2] for row in report(tmp_path / "t.dat", data)]
    reader, _, tables = read(data)
    assert len(theirs) == 3 and reader.clock.unit == "ns"
    assert tables["tick"]["t_ns"].to_pylist() == [time - theirs[0] for time in theirs]


SHIFTS = {
    "one sample": (0, [(100, 1000, 1)]),
    "sample before": (0, [(1000, 7, 1), (2000, 50, 1), (3000, 90, 1)]),
    "interpolated": (1, [(1000, 0, 1), (2000, 100, 1), (3000, 500, 1)]),
    "falling": (1, [(1000, 500, 1), (2600, -100, 1)]),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("version", [6, 7])
@pytest.mark.parametrize("name", SHIFTS)
def test_time_shift(order: str, version: int, name: str, tmp_path: Path) -> None:
    """A guest's stamps on the host's clock."""
    flags, samples = SHIFTS[name]
    w = Writer(order=order, version=version)
    stamps = [1000, 1500, 2000, 2250, 3500]
    deltas = [0, *(after - before for before, after in pairwise(stamps))]
    body = b"".join(w.record(delta, w.event(number)) for number, delta in enumerate(deltas))
    option = w.pack("QIII", 7, flags, 1, len(samples))
    for code, values in zip("QqQ", zip(*samples, strict=True), strict=True):
        option += w.pack(f"{len(values)}{code}", *values)
    data = w.file({0: w.ring(stamps[0], body)}, options=w.pack("HI", 12, len(option)) + option)
    theirs = [row[2] for row in report(tmp_path / "t.dat", data)]
    _, _, tables = read(data)
    assert len(theirs) == 5 and theirs != stamps
    assert tables["tick"]["t_ns"].to_pylist() == [time - theirs[0] for time in theirs]
    assert tables["tick"]["tsc"].to_pylist() == stamps
