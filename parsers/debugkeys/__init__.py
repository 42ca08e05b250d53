"""Snapshots: Xen debug-key dumps, /proc/interrupts, /proc/timer_list, lsevtchn."""

from parsers.debugkeys.console import XenConsoleReader
from parsers.debugkeys.proc import InterruptsReader, LsevtchnReader, TimerListReader

__all__ = ["InterruptsReader", "LsevtchnReader", "TimerListReader", "XenConsoleReader"]
