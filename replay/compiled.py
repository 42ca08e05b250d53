"""Which modules the wheel has compiled (mypyc, the same sources), and whether these here are.

Compiled are the machines that see most events, with their rules and monitors, and their policies, which work at every
unmask or sleep. The other policies and declarations stay interpreted. A user's policy is always interpreted; it may
be a subclass of one of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from typing import Final, TypeVar

__all__ = ["MODULES", "is_compiled", "mypyc_attr"]

#: What mypyc compiles, as one group.
MODULES: Final = (
    "replay/agenda.py",
    "replay/effects.py",
    "replay/knowledge.py",
    "replay/sink.py",
    "replay/machine.py",
    "replay/hardware/lapic.py",
    "replay/hardware/evtchn_two_level.py",
    "replay/hardware/ioapic.py",
    "replay/systems/apic/state.py",
    "replay/systems/apic/monitor.py",
    "replay/systems/apic/machine.py",
    "replay/systems/apic/short_cuts.py",
    "replay/systems/event_channel/policies.py",
    "replay/systems/event_channel/monitor.py",
    "replay/systems/event_channel/rules.py",
    "replay/systems/event_channel/machine.py",
    "replay/systems/event_channel/short_cuts.py",
    "replay/systems/hpet_broadcast/state.py",
    "replay/systems/hpet_broadcast/policies.py",
    "replay/systems/hpet_broadcast/monitor.py",
    "replay/systems/hpet_broadcast/machine.py",
    "replay/systems/hpet_broadcast/comparators.py",
    "replay/systems/hpet_broadcast/recorded.py",
    "replay/systems/hpet_broadcast/sleeps.py",
    "replay/systems/hvm_callback/vcpu.py",
    "replay/systems/hvm_callback/state.py",
    "replay/systems/hvm_callback/matching.py",
    "replay/systems/hvm_callback/watchdog.py",
    "replay/systems/hvm_callback/monitor.py",
    "replay/systems/hvm_callback/machine.py",
)

T = TypeVar("T")

try:
    from mypy_extensions import mypyc_attr
except ImportError:  # the marker matters to mypyc only

    def mypyc_attr(*attrs: str, **kwattrs: object) -> Callable[[T], T]:
        """Marks a class for mypyc, e.g. that classes of interpreted modules inherit from it."""
        return lambda cls: cls


def is_compiled() -> bool:
    """Whether the machines are compiled, without importing them."""
    spec = find_spec("replay.agenda")
    return spec is not None and str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES))
