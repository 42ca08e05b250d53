"""All of a trace.dat but ring-buffer data: formats, symbols, task names, options, where the buffers lie."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import BinaryIO, Literal

from parsers.recording import Note, RecordingError
from parsers.tracedat.cursor import Cursor, Damage, checked_usize, decompressor
from parsers.tracedat.formats import EventText, PageHeader, announced, parse_page_header
from parsers.tracedat.layout import MAGIC, NOTES, Limit, Option

__all__ = ["Area", "Buffer", "Head", "Shift", "note", "read_head"]

SEVERITY = {code.code: code.severity for code in NOTES}


def note(code: str, text: str, offset: int = 0, cpu: int | None = None, count: int = 1) -> Note:
    """A note of a declared code."""
    return Note(code, SEVERITY[code], text, offset, cpu, count)


@dataclass(frozen=True, slots=True)
class Area:
    """One CPU's ring-buffer data in the file: `offset`, `size` in bytes."""

    cpu: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Buffer:
    """One ftrace instance; `name` '' is the top one."""

    name: str
    clock: str
    page_size: int
    areas: tuple[Area, ...]
    compressed: bool = False


@dataclass(frozen=True, slots=True)
class Shift:
    """TIME_SHIFT of one CPU: at guest time `times` add `offsets`, after scaling by `scalings` >> `fractions`."""

    times: tuple[int, ...]
    offsets: tuple[int, ...]
    scalings: tuple[int, ...]
    fractions: tuple[int, ...]


@dataclass(slots=True)
class Head:
    """What a trace.dat says about itself; `claims` are the file's intervals [start, end) that were understood."""

    version: int
    order: str
    page_size: int
    inflate: Callable[[bytes, int], bytes]
    total: int
    word: int = 8
    page: PageHeader = field(default_factory=PageHeader)
    formats: list[EventText] = field(default_factory=list)
    comms: dict[int, bytes] = field(default_factory=dict)
    tgids: dict[int, int] = field(default_factory=dict)
    symbols: bytes = b""
    printk: bytes = b""
    clock: str = ""
    buffers: list[Buffer] = field(default_factory=list)
    tsc2nsec: tuple[int, int] | None = None
    shifts: list[Shift] = field(default_factory=list)
    interpolate: bool = False
    notes: list[Note] = field(default_factory=list)
    claims: list[tuple[int, int]] = field(default_factory=list)

    def add_note(self, code: str, text: str, offset: int = 0, cpu: int | None = None, count: int = 1) -> None:
        """Remember an oddity; beyond a limit they are dropped (a hostile file could make millions)."""
        if len(self.notes) < Limit.NOTES:
            self.notes.append(note(code, text, offset, cpu, count))


def read_head(stream: BinaryIO, total: int) -> Head:
    """Read all metadata. Raises `RecordingError` when not even the page layout can be known."""
    cursor = Cursor(stream, total)
    cursor.seek(0)
    try:
        if cursor.take(len(MAGIC)) != MAGIC:
            raise RecordingError("not a trace.dat: the magic number is missing")
        version = cursor.text(16)
        endian, _long_size = cursor.take(2)
        if version not in (b"6", b"7") or endian > 1:
            raise RecordingError(f"trace.dat version {version!r}, endian flag {endian}: 6 or 7, 0 or 1 expected")
        cursor.order = "<>"[endian]
        page_size = cursor.number(4)
        name = b"none"
        if version == b"7":
            name = cursor.text(64)
            cursor.text(64)
        head = Head(int(version), cursor.order, page_size, decompressor(name.decode("latin-1")), total)
        if version == b"7":
            _read_v7(head, cursor)
        else:
            _read_v6(head, cursor)
    except Damage as damage:
        raise RecordingError(f"trace.dat header: {damage}", offset=damage.offset) from damage
    return head


def _read_v6(head: Head, cursor: Cursor) -> None:
    """Version 6: parts in a fixed sequence; damage after the formats keeps what was read."""
    _header_info(head, cursor)
    _ftrace_formats(head, cursor)
    _event_formats(head, cursor)
    head.claims.append((0, cursor.tell()))
    try:
        head.symbols = cursor.take(cursor.number(4))
        head.printk = cursor.take(cursor.number(4))
        _cmdlines(head, cursor.take(cursor.number(8)))
        cpus = cursor.number(4)
        if cpus > Limit.CPUS:
            raise Damage(f"{cpus} CPUs", cursor.tell() - 4)
        instances: list[tuple[int, str]] = []
        for _ in range(8):
            tag = cursor.take(10)
            if tag == b"options  \0":
                for option, data, at in _options(head, cursor):
                    if option == Option.BUFFER:
                        if len(data) > 8:
                            instances.append((int.from_bytes(data[:8], _byteorder(head)), _name(data[8:])))
                    else:
                        _option(head, option, data, at)
                continue
            if tag == b"latency  \0":
                head.add_note("tracedat-latency", "text of a latency tracer", cursor.tell())
            elif tag == b"flyrecord\0":
                head.buffers.append(Buffer("", head.clock, head.page_size, _v6_areas(cursor, cpus)))
            else:
                head.add_note("tracedat-section", f"unknown tag {tag!r}", cursor.tell() - 10)
            break
        head.claims.append((0, cursor.tell()))
        for offset, name in instances[: Limit.CPUS]:
            cursor.seek(offset)
            if cursor.take(10) != b"flyrecord\0":
                raise Damage(f"no buffer of instance {name!r}", offset)
            _check_areas(head, cpus, offset)
            head.buffers.append(Buffer(name, head.clock, head.page_size, _v6_areas(cursor, cpus)))
            head.claims.append((offset, cursor.tell()))
    except Damage as damage:
        head.claims.append((0, min(cursor.tell(), cursor.end)))
        head.add_note("tracedat-section", str(damage), damage.offset)


def _v6_areas(cursor: Cursor, cpus: int) -> tuple[Area, ...]:
    if cpus * 16 > cursor.left():
        raise Damage(f"no room for {cpus} CPU entries", cursor.tell())
    return tuple(Area(cpu, *cursor.unpack("QQ")) for cpu in range(cpus))


def _check_areas(head: Head, more: int, at: int) -> None:
    """Instances may all point at the same bytes: a small file could name billions of CPUs' data."""
    if sum(len(buffer.areas) for buffer in head.buffers) + more > Limit.AREAS:
        raise Damage(f"more than {int(Limit.AREAS)} CPUs in all instances together", at)


def _byteorder(head: Head) -> Literal["little", "big"]:
    return "little" if head.order == "<" else "big"


def _name(data: bytes) -> str:
    return data.split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _options(head: Head, cursor: Cursor) -> list[tuple[int, bytes, int]]:
    """(id, data, file offset) up to DONE; version 7's DONE is included, it holds the next section."""
    found: list[tuple[int, bytes, int]] = []
    for _ in range(Limit.OPTIONS):
        option = cursor.number(2)
        if option == Option.DONE and head.version == 6:
            return found
        at = cursor.base + cursor.tell() - 2
        found.append((option, cursor.take(cursor.number(4)), at))
        if option == Option.DONE:
            return found
    raise Damage("options without an end", cursor.base + cursor.tell())


def _read_v7(head: Head, cursor: Cursor) -> None:
    """Version 7: follow the chain of options sections, then the sections that they point at."""
    chain = cursor.number(8)
    head.claims.append((0, cursor.tell()))
    places: dict[int, int] = {}
    buffers: list[tuple[bytes, int]] = []
    seen: set[int] = set()
    while chain:
        if chain in seen or len(seen) > 1024:
            head.add_note("tracedat-section", "the chain of options sections runs in a circle", chain)
            break
        seen.add(chain)
        try:
            body = _section(head, cursor, chain, Option.DONE)
            chain = 0
            for option, data, at in _options(head, body):
                if option == Option.DONE:
                    chain = int.from_bytes(data[:8], _byteorder(head))
                elif option == Option.BUFFER:
                    buffers.append((data, at))
                elif option in range(Option.HEADER_INFO, Option.CMDLINES + 1) and len(data) == 8:
                    places.setdefault(option, int.from_bytes(data, _byteorder(head)))
                else:
                    _option(head, option, data, at)
        except Damage as damage:
            head.add_note("tracedat-section", f"options: {damage}", damage.offset)
            break
    for option, parse in SECTIONS.items():
        if option in places:
            try:
                parse(head, _section(head, cursor, places[option], option))
            except Damage as damage:
                head.add_note("tracedat-section", f"{option.name}: {damage}", damage.offset)
    if not head.formats and not buffers:
        raise RecordingError("trace.dat without event formats and buffers", offset=cursor.tell())
    for data, at in buffers[: Limit.CPUS]:
        try:
            head.buffers.append(_v7_buffer(head, cursor, data, at))
        except Damage as damage:
            head.add_note("tracedat-section", f"buffer: {damage}", damage.offset)
    _claim_other_sections(head, cursor)


def _section(head: Head, cursor: Cursor, offset: int, expected: int) -> Cursor:
    """The body of the section at `offset` (decompressed), as a cursor over it."""
    cursor.seek(offset)
    ident, flags, _string, size = cursor.unpack("HHIQ")
    if ident != expected:
        raise Damage(f"section {expected} expected, {ident} found", offset)
    start = cursor.tell()
    if size > cursor.left():
        raise Damage(f"section of {size} bytes, {cursor.left()} there", offset)
    if flags & 1:
        compressed, usize = cursor.unpack("II")
        try:
            data = head.inflate(cursor.take(compressed), checked_usize(usize, compressed, offset))
        except ValueError as error:
            raise Damage(f"section {ident}: {error}", offset) from error
    else:
        data = cursor.take(min(size, Limit.SECTION))
    head.claims.append((offset, start + size))
    return Cursor.over(data, order=head.order, base=start)


def _v7_buffer(head: Head, cursor: Cursor, data: bytes, at: int) -> Buffer:
    body = Cursor.over(data, order=head.order, base=at + 6)
    section = body.number(8)
    name, clock = body.text(), body.text()
    page_size, cpus = body.unpack("II")
    if cpus > Limit.CPUS or cpus * 20 > body.left():
        raise Damage(f"no room for {cpus} CPU entries", at)
    _check_areas(head, cpus, at)
    areas = tuple(Area(*body.unpack("IQQ")) for _ in range(cpus))
    cursor.seek(section)
    ident, flags, _string, _size = cursor.unpack("HHIQ")
    if ident != Option.BUFFER:
        raise Damage(f"a buffer section expected, {ident} found", section)
    head.claims.append((section, cursor.tell()))
    if flags & 1:
        # the size that trace-cmd writes leaves out the leading count of chunks
        areas = tuple(Area(area.cpu, area.offset, area.size + 4 * bool(area.size)) for area in areas)
    return Buffer(
        name.decode("utf-8", "backslashreplace"), clock.decode("latin-1"), page_size, areas, bool(flags & 1)
    )


def _claim_other_sections(head: Head, cursor: Cursor) -> None:
    """Sections that no option points at (strings) still are understood bytes: they follow back to back."""
    position = max(end for _, end in head.claims)
    for _ in range(64):
        try:
            cursor.seek(position)
            ident, _flags, _string, size = cursor.unpack("HHIQ")
        except Damage:
            return
        if ident == Option.BUFFER or ident > 64 or size > cursor.left():
            return
        position = cursor.tell() + size
        head.claims.append((position - size - 16, position))


def _header_info(head: Head, cursor: Cursor) -> None:
    for wanted in (b"header_page", b"header_event"):
        if cursor.text(32) != wanted:
            raise Damage(f"{wanted.decode()} expected", cursor.base + cursor.tell())
        text = cursor.take(cursor.number(8))
        if wanted == b"header_page":
            page = parse_page_header(text)
            if page is None:
                raise Damage("header_page names no usable fields", cursor.base + cursor.tell())
            head.page, head.word = page, page.commit_size


def _add_format(head: Head, system: str, text: bytes, offset: int) -> None:
    event = announced(system, text, head.word, offset)
    if event is None:
        head.add_note("tracedat-formats", f"{system}: {text[:60]!r}", offset)
    else:
        head.formats.append(event)


def _count(cursor: Cursor) -> int:
    """How many systems or formats follow; more than there are event ids is damage."""
    count = cursor.number(4)
    if count > Limit.FORMATS:
        raise Damage(f"{count} event formats or systems", cursor.base + cursor.tell() - 4)
    return count


def _ftrace_formats(head: Head, cursor: Cursor) -> None:
    for _ in range(_count(cursor)):
        at = cursor.base + cursor.tell()
        _add_format(head, "ftrace", cursor.take(cursor.number(8)), at)


def _event_formats(head: Head, cursor: Cursor) -> None:
    for _ in range(_count(cursor)):
        system = cursor.text().decode("utf-8", "backslashreplace")
        for _ in range(_count(cursor)):
            if len(head.formats) >= Limit.FORMATS:
                raise Damage(f"more than {len(head.formats)} event formats", cursor.base + cursor.tell())
            at = cursor.base + cursor.tell()
            _add_format(head, system, cursor.take(cursor.number(8)), at)


def _kallsyms(head: Head, cursor: Cursor) -> None:
    head.symbols = cursor.take(cursor.number(4))


def _printk(head: Head, cursor: Cursor) -> None:
    head.printk = cursor.take(cursor.number(4))


def _cmdlines_section(head: Head, cursor: Cursor) -> None:
    _cmdlines(head, cursor.take(cursor.number(8)))


def _cmdlines(head: Head, text: bytes) -> None:
    """`PID COMM` lines; the last one of a pid wins, as in trace-cmd."""
    lines = text.split(b"\n", Limit.TASKS)
    if len(lines) > Limit.TASKS:
        head.add_note("tracedat-section", f"more than {int(Limit.TASKS)} names of tasks; the rest is left out")
        lines.pop()
    for line in lines:
        pid, _, comm = line.partition(b" ")
        if comm and pid.isdigit() and len(pid) < 10:
            head.comms[int(pid)] = comm


SECTIONS: dict[Option, Callable[[Head, Cursor], None]] = {
    Option.HEADER_INFO: _header_info,
    Option.FTRACE_EVENTS: _ftrace_formats,
    Option.EVENT_FORMATS: _event_formats,
    Option.KALLSYMS: _kallsyms,
    Option.PRINTK: _printk,
    Option.CMDLINES: _cmdlines_section,
}


def _option(head: Head, option: int, data: bytes, at: int) -> None:
    """One option's meaning; sizes are checked first, wild files carry other things under the same ids."""
    try:
        if option == Option.TRACECLOCK:
            chosen = re.search(rb"\[(\S+?)\]", data)
            head.clock = chosen[1].decode("latin-1") if chosen else head.clock
        elif option == Option.CPUSTAT:
            _cpustat(head, data, at)
        elif option == Option.TSC2NSEC:
            mult, shift, _offset = Cursor.over(data, order=head.order, base=at).unpack("IIQ")
            if not mult or shift > 63:
                raise Damage(f"mult {mult}, shift {shift}", at)
            head.tsc2nsec = (mult, shift)
        elif option == Option.TIME_SHIFT:
            _time_shift(head, data, at)
        elif option == Option.TRACEID and len(data) == 8:
            head.add_note("tracedat-trace-id", f"{int.from_bytes(data, _byteorder(head)):#018x}", at)
        elif option == Option.GUEST:
            _guest(head, data, at)
        elif option == Option.CPUCOUNT and len(data) != 4:
            # a 2017 fork of trace-cmd put a "pid tgid" list under this id
            pairs = re.findall(rb"^(\d{1,9}) (\d{1,9})$", data, re.M)
            head.tgids.update((int(pid), int(tgid)) for pid, tgid in pairs)
            if not pairs:
                raise Damage(f"CPU count of {len(data)} bytes", at)
    except Damage as damage:
        head.add_note("tracedat-option", f"option {option}: {damage}", at)


def _cpustat(head: Head, data: bytes, at: int) -> None:
    cpu = re.search(rb"CPU: *(\d{1,6})", data)
    for name, count in re.findall(rb"^(overrun|commit overrun|dropped events): *(\d{1,18})", data, re.M):
        if int(count):
            number = int(cpu[1]) if cpu else None
            head.add_note("tracedat-overrun", f"{name.decode()}: {int(count)}", at, number, int(count))


def _time_shift(head: Head, data: bytes, at: int) -> None:
    body = Cursor.over(data, order=head.order, base=at)
    _peer, flags, cpus = body.unpack("QII")
    shifts = []
    for _ in range(min(cpus, Limit.CPUS)):
        (count,) = body.unpack("I")
        if count * 24 > body.left():
            raise Damage(f"{count} samples", at)
        times, offsets, scalings = (body.unpack(f"{count}{code}") for code in "QqQ")
        shifts.append(Shift(times, offsets, scalings, (0,) * count))
    if body.left() == sum(len(shift.times) for shift in shifts) * 8:
        # newer recorders append the fixed-point fraction of each scaling
        shifts = [
            Shift(shift.times, shift.offsets, shift.scalings, body.unpack(f"{len(shift.times)}Q"))
            for shift in shifts
        ]
    head.shifts, head.interpolate = shifts, bool(flags & 1)
    head.add_note("tracedat-time-shift", f"{cpus} CPUs, interpolation {'on' if flags & 1 else 'off'}", at)


def _guest(head: Head, data: bytes, at: int) -> None:
    body = Cursor.over(data, order=head.order, base=at)
    name = body.text().decode("utf-8", "backslashreplace")
    ident, count = body.unpack("QI")
    if count * 8 > body.left():
        raise Damage(f"{count} vCPUs", at)
    pairs = ", ".join("vcpu {} = pid {}".format(*body.unpack("II")) for _ in range(min(count, 4096)))
    head.add_note("tracedat-guest", f"guest {name} {ident:#018x}: {pairs}", at)
