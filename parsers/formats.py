"""The formats that can be read, in the order in which they are tried.

A new format is one line here. Readers are imported only when a recording is opened, and of those that are tried only
the ones that `MARKS` does not rule out: importing all of them takes longer than reading a small recording.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import import_module
from typing import Final

from parsers.recording import Reader

__all__ = ["FORMATS", "MARKS", "reader_class", "sniff"]

#: (name of the format, module, class); the first class whose `sniff` accepts the head of the file wins, so
#: those that nothing else can be come first.
FORMATS: tuple[tuple[str, str, str], ...] = (
    ("trace.dat", "parsers.tracedat", "TraceDatReader"),
    ("xentrace", "parsers.xentrace.reader", "XentraceReader"),
    ("qemu", "parsers.qemu.reader", "QemuReader"),
    ("xenalyze", "parsers.xenalyze", "XenalyzeReader"),
    ("xentrace_format", "parsers.xenalyze", "ClassicReader"),
    ("proc-interrupts", "parsers.debugkeys", "InterruptsReader"),
    ("timer-list", "parsers.debugkeys", "TimerListReader"),
    ("lsevtchn", "parsers.debugkeys", "LsevtchnReader"),
    ("xen-console", "parsers.debugkeys", "XenConsoleReader"),
    ("systrace", "parsers.ftrace.systrace", "SystraceReader"),
    ("trace-cmd-report", "parsers.ftrace.text", "TraceCmdReportReader"),
    ("perf-script", "parsers.ftrace.text", "PerfScriptReader"),
    ("ftrace", "parsers.ftrace.text", "FtraceTextReader"),
)  # fmt: skip

#: What a head must hold to be of a format. Less than its reader asks for, never more: the reader decides; a format
#: that is not listed is always asked.
MARKS: Final[Mapping[str, re.Pattern[bytes]]] = {
    "xentrace": re.compile(rb"\x03\xf0\x01\x20", re.S),
    "qemu": re.compile(rb"^(?:\d{1,10}@|[a-z][a-z0-9_]* )", re.M),
    "trace.dat": re.compile(rb"\A\x17\x08\x44tracing"),
    "xenalyze": re.compile(rb"^[ \]!](?: {14}| *\d+\.\d{9}) [-|.lx 0-6]* d(?:\?v\?|\d)", re.M),
    "xentrace_format": re.compile(rb"^CPU\d+  \d", re.M),
    "proc-interrupts": re.compile(rb"\A\s+CPU\d"),
    "timer-list": re.compile(rb"^Timer List", re.M),
    "lsevtchn": re.compile(rb"\A\s*\d+: VCPU "),
    "xen-console": re.compile(
        rb"^\r?\(XEN\) |^'.' pressed -> |^IRQ information:|^Event channel information for domain ", re.M
    ),
    "systrace": re.compile(rb"\A\s*(?:<|trace:)", re.I),
}


def reader_class(name: str) -> type[Reader]:
    """The reader class of the format called `name`; `KeyError` if there is none."""
    for known, module, attribute in FORMATS:
        if known == name:
            cls: type[Reader] = getattr(import_module(module), attribute)
            return cls
    raise KeyError(name)


def sniff(head: bytes) -> type[Reader] | None:
    """The reader class for a recording whose first (at most 64 KiB, uncompressed) bytes are `head`."""
    for name, _, _ in FORMATS:
        mark = MARKS.get(name)
        if mark is not None and mark.search(head) is None:
            continue
        cls = reader_class(name)
        if cls.sniff(head):
            return cls
    return None
