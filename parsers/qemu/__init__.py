"""QEMU device-trace logs: what the emulated interrupt hardware did, seen from outside the guest."""

from parsers.qemu.reader import QemuReader

__all__ = ["QemuReader"]
