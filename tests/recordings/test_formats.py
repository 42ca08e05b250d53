"""Which format a head is of: what is ruled out without importing its reader is what the reader would refuse."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest

from parsers.formats import FORMATS, MARKS, reader_class, sniff
from tests.damage.small_files import small_file
from tests.shared import SAMPLES


def heads(name: str) -> list[bytes]:
    """The head of a small file of the format: whole, its beginning lost, and with noise in some places."""
    data, rng = small_file(name)[: 64 << 10], random.Random(name)
    found = [data, data.replace(b"\n", b"\r\n"), b"\n\n" + data, b" " + data]
    for _ in range(60):
        cut = data[rng.randrange(len(data)) :]
        noise = bytearray(cut)
        for _ in range(rng.randrange(4)):
            noise[rng.randrange(len(noise))] = rng.choice(b"\n \x00\xffx0(@")
        found += [cut, bytes(noise)]
    return found


@pytest.mark.parametrize("name", [name for name, _, _ in FORMATS])
def test_no_reader_is_passed_over(name: str) -> None:
    taken = 0
    for head in heads(name):
        for other, mark in MARKS.items():
            accepts = reader_class(other).sniff(head)
            assert not accepts or mark.search(head), f"{other} takes {head[:80]!r}"
        first = next((other for other, _, _ in FORMATS if reader_class(other).sniff(head)), None)
        assert sniff(head) is (reader_class(first) if first is not None else None)
        taken += first == name
    assert taken > 1


@pytest.mark.parametrize(
    ("name", "needless"),
    [
        ("linux-6.1-tracecmd-v7.dat.zst", ("parsers.xentrace.reader", "parsers.qemu", "parsers.ftrace.text", "polars")),
        ("ftrace-linux-6.1_03-tgid.txt.zst", ("parsers.xentrace.reader", "parsers.qemu", "parsers.tracedat", "polars")),
    ],
)
def test_only_what_is_needed_is_imported(name: str, needless: tuple[str, ...]) -> None:
    code = f"""
import sys
from bench.parse import parse
assert parse({str(SAMPLES / name)!r}) > 500
print(*(m for m in {needless!r} if m in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
