"""The formats that can be read, in the order in which they are tried.

A new format is one line here. Readers are imported only when a recording is opened.
"""

from __future__ import annotations

from importlib import import_module

from parsers.recording import Reader

__all__ = ["FORMATS", "reader_class", "sniff"]

#: (name of the format, module, class); the first class whose `sniff` accepts the head of the file wins.
FORMATS: tuple[tuple[str, str, str], ...] = (
    ("xentrace", "parsers.xentrace.reader", "XentraceReader"),
    ("qemu", "parsers.qemu.reader", "QemuReader"),
    ("trace.dat", "parsers.tracedat", "TraceDatReader"),
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
        cls = reader_class(name)
        if cls.sniff(head):
            return cls
    return None
