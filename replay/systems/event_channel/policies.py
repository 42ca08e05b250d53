"""Two-level event channels: how a guest unmasks a port (spec S5.3). The only hook is `on_unmask`."""

from __future__ import annotations

from typing import ClassVar, Final

from replay.compiled import mypyc_attr
from replay.events import NONE
from replay.hardware.evtchn_two_level import Channel, TwoLevelDomain, VcpuInfo
from replay.systems.event_channel.machine import TwoLevelMachine

__all__ = ["POLICIES", "Any", "Current", "Modern", "Policy", "Proposed"]


@mypyc_attr(allow_interpreted_subclasses=True)
class Policy:
    """Strategy of the two-level guest; subclass it for `--policy ./mine.py:MyPolicy`."""

    name: ClassVar[str] = ""

    def on_unmask(self, machine: TwoLevelMachine, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> None:
        """Unmask `channel`, executing on `vcpu`: by `machine.unmask_locally` (E3) or `unmask_by_hypercall` (E4)."""
        raise NotImplementedError


@mypyc_attr(allow_interpreted_subclasses=True)
class Current(Policy):
    """Linux before December 2005, unmask_evtchn: E3 wherever it executes."""

    name = "current"

    def on_unmask(self, machine: TwoLevelMachine, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> None:
        """E3 on the executing vCPU."""
        machine.unmask_locally(dom, vcpu, channel)


@mypyc_attr(allow_interpreted_subclasses=True)
class Proposed(Policy):
    """Linux from 3e61615263 on: a port of another vCPU is unmasked by EVTCHNOP_unmask."""

    name = "proposed"

    def on_unmask(self, machine: TwoLevelMachine, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> None:
        """E3 if the executing vCPU is the one that handles the port, else E4."""
        if channel.guest_cpu == NONE:
            machine.unmask_somewhere(dom, channel)
        elif channel.guest_cpu == vcpu.number:
            machine.unmask_locally(dom, vcpu, channel)
        else:
            machine.unmask_by_hypercall(dom, channel)


@mypyc_attr(allow_interpreted_subclasses=True)
class Modern(Policy):
    """Linux events_2l.c, evtchn_2l_unmask: as proposed, but a pending port of an HVM-type guest always takes the
    hypercall, because such a guest does not look for events when it enables interrupts."""

    name = "modern"

    def on_unmask(self, machine: TwoLevelMachine, dom: TwoLevelDomain, vcpu: VcpuInfo, channel: Channel) -> None:
        """E4 for a foreign port; for a local one E3, or mask again and E4 if it is pending and the guest is HVM."""
        if channel.guest_cpu == NONE:
            machine.unmask_somewhere(dom, channel)
        elif channel.guest_cpu != vcpu.number:
            machine.unmask_by_hypercall(dom, channel)
        elif machine.hvm and channel.pending == 1:
            channel.masked = 1  # clear_bit, test pending, set_bit: E4 acts on a 1 to 0 change only
            machine.unmask_by_hypercall(dom, channel)
        else:
            machine.unmask_locally(dom, vcpu, channel)


class Any:
    """The FIFO ABI has one way to unmask (F3): no hook."""

    name: ClassVar[str] = "any"


POLICIES: Final[dict[str, type[object]]] = {p.name: p for p in (Current, Proposed, Modern, Any)}
