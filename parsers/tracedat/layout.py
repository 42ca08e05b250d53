"""Numbers of the trace.dat container, declared once (trace-cmd.dat.v6(5), trace-cmd.dat.v7(5))."""

from __future__ import annotations

from enum import IntEnum

from parsers.recording import NoteCode

__all__ = ["BATCH", "MAGIC", "NOTES", "NS_CLOCKS", "TSC_CLOCKS", "Limit", "Option"]

MAGIC = b"\x17\x08\x44tracing"

#: Ring-buffer bytes taken per batch; bounds the memory of a chunk.
BATCH = 16 << 20


class Option(IntEnum):
    """Ids of options; from 15 on also ids of version 7 sections."""

    DONE = 0
    DATE = 1
    CPUSTAT = 2
    BUFFER = 3
    TRACECLOCK = 4
    UNAME = 5
    HOOK = 6
    OFFSET = 7
    CPUCOUNT = 8
    VERSION = 9
    PROCMAPS = 10
    TRACEID = 11
    TIME_SHIFT = 12
    GUEST = 13
    TSC2NSEC = 14
    STRINGS = 15
    HEADER_INFO = 16
    FTRACE_EVENTS = 17
    EVENT_FORMATS = 18
    KALLSYMS = 19
    PRINTK = 20
    CMDLINES = 21


class Limit(IntEnum):
    """What a sane file never exceeds; more is damage (or an attack), not data."""

    SECTION = 256 << 20  # uncompressed bytes of a section other than a buffer
    PAGE = 8 << 20  # a ring-buffer (sub-)page
    CHUNK = 64 << 20  # uncompressed bytes of one compressed chunk of pages
    CHUNK_LEAST = 1 << 20  # a chunk of this size is taken however many CPUs there are, while the sum allows it
    CHUNKS_HELD = 256 << 20  # of all CPUs together
    CPUS = 1 << 16
    FORMATS = 1 << 16  # ids of events have 16 bits
    EVENTS = 4096  # events that have a table; a kernel with all its modules has about 2500
    TASKS = 1 << 22  # names of tasks: the highest pid of Linux
    AREAS = 1 << 14  # of all CPUs and instances together
    FIELDS = 4096
    ARRAY = 1 << 16
    OPTIONS = 1 << 16
    NOTES = 200


#: Clocks that count nanoseconds.
NS_CLOCKS = frozenset({"local", "global", "perf", "mono", "mono_raw", "boot", "tai"})
#: Clocks that count cycles: `cpu_hz` applies.
TSC_CLOCKS = frozenset({"x86-tsc", "ppc-tb"})

NOTES: tuple[NoteCode, ...] = (
    NoteCode("tracedat-section", "error", "a section or option lies outside the file or contradicts itself; skipped"),
    NoteCode("tracedat-option", "warn", "an option has an unexpected size or content; ignored"),
    NoteCode("tracedat-formats", "warn", "an event format could not be understood; its records go to ftrace_raw"),
    NoteCode("tracedat-many-events", "warn", "more events occur than any kernel has; records of the rest: ftrace_raw"),
    NoteCode("tracedat-unknown-event", "warn", "records whose id no event format declares; kept in ftrace_raw"),
    NoteCode("tracedat-short-record", "error", "records shorter than their event's fields; kept in ftrace_raw"),
    NoteCode("tracedat-page", "error", "a ring-buffer page is damaged; the rest of that page is skipped"),
    NoteCode("tracedat-chunk", "error", "a compressed chunk is damaged; the rest of that CPU's chunks is skipped"),
    NoteCode("tracedat-memory", "error", "too many CPUs with too large parts to hold at once; a CPU's rest is skipped"),
    NoteCode("tracedat-truncated", "error", "the file ends inside the recorded data"),
    NoteCode("tracedat-lost", "warn", "the ring buffer dropped records (readers were too slow)"),
    NoteCode("tracedat-overrun", "warn", "the recorder's own statistics count overwritten or dropped records"),
    NoteCode("tracedat-clock", "warn", "stamps could not be brought to nanoseconds or the clock is not stated"),
    NoteCode("tracedat-time-shift", "info", "a guest's stamps were shifted to the host's clock"),
    NoteCode("tracedat-guest", "info", "the host recording maps threads to a guest's vCPUs"),
    NoteCode("tracedat-trace-id", "info", "identity that pairs host and guest recordings"),
    NoteCode("tracedat-empty", "warn", "the file holds no ring-buffer data (the recorder was stopped early)"),
    NoteCode("tracedat-latency", "warn", "the file holds a latency tracer's text instead of ring buffers; skipped"),
)
