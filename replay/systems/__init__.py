"""The systems that can be replayed, by the name used on the command line.

Each folder holds one system: `codes.py` (declarations), `machine.py` (hardware and software state, pure
transitions), `policies.py` (the hooks), `monitor.py` (the rules that raise divergences), and `SYSTEM` in its
`__init__`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from replay.declare import System

__all__ = ["SYSTEMS"]

_FOLDERS = {
    "hpet": "hpet_broadcast",
    "callback": "hvm_callback",
    "vgic": "vgic",
    "irqflow": "irq_flow",
    "evtchn": "event_channel",
    "apic": "apic",
    "gic": "gic",
}


class _Systems(Mapping[str, System]):
    """Imports a system when it is first asked for."""

    def __getitem__(self, name: str) -> System:
        if name not in _FOLDERS:
            raise KeyError(name)
        system: System = import_module(f"replay.systems.{_FOLDERS[name]}").SYSTEM
        return system

    def __iter__(self) -> Iterator[str]:
        return iter(_FOLDERS)

    def __len__(self) -> int:
        return len(_FOLDERS)


SYSTEMS: Mapping[str, System] = _Systems()
