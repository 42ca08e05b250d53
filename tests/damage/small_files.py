"""A real file of a few KB for every reader: cut from `samples/`, so that every offset can be tried.

`trace.dat` is the sample's own headers, formats and first two pages in a smaller frame (a whole one is megabytes).
Of systrace and perf script there is no recording: the lines are those of an ftrace sample, in their dress.
"""

from __future__ import annotations

import functools
import re
import struct

from parsers.formats import FORMATS
from parsers.tracedat.layout import Option
from tests.damage.test_text_damage import sample
from tests.shared import SAMPLES

__all__ = ["BINARY", "READERS", "small_file"]

READERS = tuple(name for name, _, _ in FORMATS)
#: Readers whose records have byte offsets; the offset of a text record is its line.
BINARY = ("xentrace", "trace.dat")

#: Sample and bytes of it (cut at the end of a line).
_HEADS = {
    "qemu": ("qemu-x86-ioapic.log.gz", 1500),
    "xenalyze": ("xenalyze-dom0-idle.dump.txt.zst", 1500),
    "xentrace_format": ("xentrace_format-dom0-idle.txt.zst", 1500),
    "proc-interrupts": ("proc-interrupts-hpet.txt", 1800),
    "timer-list": ("proc-timer_list.txt", 2000),
    "lsevtchn": ("lsevtchn-hvm.txt", 600),
    "trace-cmd-report": ("linux-6.1-tracecmd-v7.report-R.txt.zst", 1500),
    "ftrace": ("ftrace-linux-6.1_03-tgid.txt.zst", 2200),
}


@functools.cache
def small_file(name: str) -> bytes:
    """Bytes of a whole, undamaged recording for the reader of that name."""
    if name == "xentrace":
        return _windows(1500)
    if name == "trace.dat":
        return _tracedat()
    if name == "systrace":
        return _systrace()
    if name == "perf-script":
        return _perf()
    if name == "xen-console":  # three dumps, a few lines of each
        lines = sample("xen-debug-keys.txt.zst").splitlines(keepends=True)
        return b"".join(lines[300:312] + lines[333:346] + lines[373:392])
    file, size = _HEADS[name]
    return _lines(sample(file), size)


def _lines(data: bytes, size: int) -> bytes:
    return data if len(data) <= size else data[: data.rfind(b"\n", 0, size) + 1]


def _windows(size: int) -> bytes:
    """The smallest windows in a row that make more than `size` bytes."""
    raw = (SAMPLES / "xen-2l-dom0-idle.xentrace").read_bytes()
    ends = [0]
    while ends[-1] < len(raw):
        ends.append(ends[-1] + 12 + int.from_bytes(raw[ends[-1] + 8 : ends[-1] + 12], "little"))
    runs = [(b - a, a, b) for a in ends for b in ends if size < b - a < 4 * size]
    _, start, end = min(runs)
    return raw[start:end]


def _systrace() -> bytes:
    text = _lines(sample("ftrace-linux-6.1_01-default.txt.zst"), 1800)
    return (
        b'<!DOCTYPE html>\n<html><body>\n<script class="trace-data" type="application/text">\n' + text
        + b"</script>\n</body></html>\n"
    )  # fmt: skip


_LINE = re.compile(rb" *(.*)-(\d+) +\[(\d+)\] +\S+ +([0-9.]+): (\w+): (.*)")


def _perf() -> bytes:
    """`COMM PID [CPU] TIME: SYSTEM:EVENT: …`"""
    out = b""
    for line in sample("ftrace-linux-6.1_01-default.txt.zst").splitlines():
        match = _LINE.fullmatch(line)
        if match:
            comm, pid, cpu, stamp, event, rest = match.groups()
            system = event.split(b"_")[0]
            out += b"%b %5d [%b] %b: %b:%b: %b\n" % (comm.rjust(16), int(pid), cpu, stamp, system, event, rest)
    return _lines(out, 1500)


def _tracedat() -> bytes:
    """Headers and formats of the events on the first page of each of two CPUs, and these pages, as recorded."""
    raw = sample("linux-6.1-tracecmd-v7.dat.zst")
    start = raw.index(b"7\0", 10) + 2 + 2 + 4
    start = raw.index(b"\0", raw.index(b"\0", start) + 1) + 1  # name and version of the compression
    (chain,) = struct.unpack_from("<Q", raw, start)
    options: dict[int, bytes] = {}
    while chain:  # sections of options
        at, chain = chain + 16, 0
        while True:
            ident, size = struct.unpack_from("<HI", raw, at)
            data = raw[at + 6 : at + 6 + size]
            at += 6 + size
            if ident == Option.DONE:
                (chain,) = struct.unpack("<Q", data[:8])
                break
            options.setdefault(ident, data)
    bodies = {}
    for ident in (16, 17, 18, 21):
        (place,) = struct.unpack("<Q", options[ident])
        (length,) = struct.unpack_from("<Q", raw, place + 8)
        bodies[ident] = raw[place + 16 : place + 16 + length]
    pages = _pages(raw, options[Option.BUFFER])
    bodies[17] = struct.pack("<I", 0)
    bodies[18] = _wanted(bodies[18], b"".join(pages.values()))
    bodies[21] = struct.pack("<Q", len(_lines(bodies[21][8:], 300))) + _lines(bodies[21][8:], 300)
    out = raw[:start] + bytes(8)
    keep = b""
    for ident, body in bodies.items():
        keep += struct.pack("<HIQ", ident, 8, len(out))
        out += struct.pack("<HHIQ", ident, 0, 0, len(body)) + body
    out += struct.pack("<HHIQ", 3, 0, 0, sum(map(len, pages.values())))
    place = (len(out) + 400 + 4095) // 4096 * 4096
    entries = b"".join(struct.pack("<IQQ", cpu, place + 4096 * n, 4096) for n, cpu in enumerate(pages))
    clock = options[Option.BUFFER][8:].split(b"\0")[1]
    buffer = struct.pack("<Q", len(out) - 16) + b"\0" + clock + b"\0" + struct.pack("<II", 4096, len(pages)) + entries
    keep += struct.pack("<HI", 3, len(buffer)) + buffer
    if Option.TRACECLOCK in options:
        keep += struct.pack("<HI", Option.TRACECLOCK, len(options[Option.TRACECLOCK])) + options[Option.TRACECLOCK]
    keep += struct.pack("<HIQ", 0, 8, 0)
    at = len(out)
    out += struct.pack("<HHIQ", 0, 0, 0, len(keep)) + keep
    out = out[:start] + struct.pack("<Q", at) + out[start + 8 :]
    assert len(out) <= place
    return out.ljust(place, b"\0") + b"".join(pages.values())


def _pages(raw: bytes, buffer: bytes) -> dict[int, bytes]:
    """First page of every CPU of the top buffer."""
    at = 8
    at = buffer.index(b"\0", at) + 1  # name
    at = buffer.index(b"\0", at) + 1  # clock
    _, count = struct.unpack_from("<II", buffer, at)
    areas = [struct.unpack_from("<IQQ", buffer, at + 8 + 20 * n) for n in range(count)]
    return {cpu: raw[place : place + 4096] for cpu, place, size in areas if size >= 4096}


def _wanted(formats: bytes, pages: bytes) -> bytes:
    """The section of formats with those events only whose id occurs on the pages (or what looks like one)."""
    ids = {int.from_bytes(pages[at : at + 2], "little") for at in range(0, len(pages), 4)}
    (systems,) = struct.unpack_from("<I", formats)
    at = 4
    kept: list[tuple[bytes, list[bytes]]] = []
    for _ in range(systems):
        end = formats.index(b"\0", at)
        system = formats[at:end]
        (count,) = struct.unpack_from("<I", formats, end + 1)
        at = end + 5
        texts = []
        for _ in range(count):
            (size,) = struct.unpack_from("<Q", formats, at)
            text = formats[at + 8 : at + 8 + size]
            at += 8 + size
            ident = re.search(rb"^ID: (\d+)$", text, re.M)
            if ident and int(ident.group(1)) in ids and len(text) < 3000:
                texts.append(text)
        if texts:
            kept.append((system, texts))
    out = struct.pack("<I", len(kept))
    for system, texts in kept:
        out += system + b"\0" + struct.pack("<I", len(texts))
        out += b"".join(struct.pack("<Q", len(text)) + text for text in texts)
    return out
