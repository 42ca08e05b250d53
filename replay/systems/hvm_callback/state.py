"""State of one HVM domain as the platform interrupt sees it, and the rules V1 to V5 (spec S2.1, S2.3).

Xen arch/x86/hvm/irq.c, vioapic.c, vlapic.c, vmx/intr.c before 10e3974b14. Flags are 0, 1 or UNKNOWN.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final

from replay.agenda import SOFTWARE
from replay.events import NIL, NONE
from replay.hardware.ioapic import LOWEST_PRIORITY, MAYBE, SEND, IoApic, Pin
from replay.hardware.lapic import vector_class
from replay.knowledge import UNKNOWN
from replay.sink import Evidence
from replay.systems.hvm_callback.matching import Matching
from replay.systems.hvm_callback.vcpu import Vcpu

if TYPE_CHECKING:
    from replay.systems.hvm_callback.machine import CallbackMachine

__all__ = ["ENTRY", "Domain", "flag_text"]

#: Action of the agenda: a VM entry of vcpu b of domain a.
ENTRY: Final = 1

# via_type; hvm_irq.callback_via_type.
VIA_NONE: Final = 0
VIA_GSI: Final = 1
VIA_PCI_INTX: Final = 2

# Words of the story that goes with a finding.
SET_WORD, CLEAR_WORD, ASSERT_WORD, DEASSERT_WORD, INJECT_WORD, EOI_WORD, RTE_WORD = range(7)
_WORDS: Final = (
    "upcall_pending set on vcpu",
    "upcall_pending cleared on vcpu",
    "callback asserts its line",
    "callback lets its line go",
    "callback injected on vcpu",
    "EOI on vcpu",
    "redirection entry written, vector",
)
_STORY: Final = 8


def flag_text(value: int) -> str:
    """A flag for people: 0, 1 or ?."""
    return "?" if value < 0 else str(value)


class Domain:
    """The callback of one domain. `flag` is evtchn_upcall_pending of vcpu0, the only one that matters."""

    def __init__(self, number: int, machine: CallbackMachine, *, created: bool = False) -> None:
        self.id = number
        self.machine = machine
        closed = machine.closed
        known = closed or machine.from_boot or created
        self.known = known
        self.flag = 0 if closed or (known and machine.sees("via.upcall_set")) else UNKNOWN
        self.set_t: int  # written where the flag becomes 1, read only while it is
        self.clear_t = NIL
        self.via_type = VIA_GSI
        self.via_gsi = machine.gsi
        self.via_asserted = 0 if closed or (known and machine.sees("via.line")) else UNKNOWN
        self.ioapic = IoApic(known=closed or (known and machine.sees("via.rte_write")))
        #: Sources other than the callback that hold a GSI: gsi << 32 | source -> how often.
        self.held: dict[int, int] = {}
        #: How many sources hold the callback's GSI besides those in `held`; UNKNOWN, or a number.
        self.strangers = self.unnamed_holders()
        self.vcpus: dict[int, Vcpu] = {}
        self.unplaced = 0  # vectors sent to an unknown destination
        self.round_robin = 0
        self.vector = machine.vector  # the callback's, NONE unknown
        # What the monitor remembers: the episode, time-outs, the story.
        self.ordinal = 0
        self.storm_reported = False
        self.stale_reported = False
        self.stale_t = NIL  # with the next five, which are read while it is not NIL
        self.stale_start: int
        self.stale_vcpu: int
        self.stale_seq: int
        self.stale_count: int
        self.stale_asserted: int
        self.storm_start = NIL
        self.callback_eoi_t = NIL  # with the next four
        self.callback_eoi_asserted: int
        self.callback_eoi_others: int
        self.callback_eoi_seq: int
        self.callback_eoi_vcpu: int
        self.offline0 = False
        self.late_reported = False
        self.line_t = NIL
        self.line_excused = False
        self.lost_since = NIL
        self.lost_reported = False
        self.stuck_since: dict[int, int] = {}
        self.stuck_reported: set[int] = set()
        self.param_t = NIL
        self.reads = 0
        self.sets = 0
        self.story: deque[tuple[int, int, int, int]] = deque(maxlen=_STORY)
        # Metrics.
        self.matching = Matching(machine.monitor.storm_count)
        self.irq_lock_taken = 0
        self.vm_entries = 0
        self.injections = 0
        self.spurious = 0
        self.useful = 0
        self.eoi_exits = 0
        self.handlers = 0
        self.callback_eois = 0
        self.eois_unmatched = 0
        self.max_assert_delay = 0
        self.max_latency = 0
        self.latency_sum = 0
        self.latency_from = NIL
        self.stale_ns = 0
        self.stale_clock = NIL
        self.storm_max = 0
        self.storm_ns = 0
        self.no_work = 0
        self.set_count = 0
        self.consumed = 0
        self.clears = 0
        if closed:
            self.configure(machine.gsi)

    def configure(self, gsi: int) -> None:
        """The redirection entry that a scenario's `config` describes: level, unmasked."""
        pin = self.ioapic.pin(gsi)
        pin.vector = self.vector
        pin.level = 1
        pin.masked = 0
        pin.dest = self.machine.dest_vcpu * self.machine.apic_id_stride

    def vcpu(self, number: int) -> Vcpu:
        """The vCPU of this number."""
        vcpu = self.vcpus.get(number)
        if vcpu is None:
            vcpu = Vcpu(number, known=self.known)
            self.vcpus[number] = vcpu
        return vcpu

    # -- who holds the line ------------------------------------------------------------------------------------

    def others(self, gsi: int) -> int:
        """Whether a source other than the callback holds the GSI: 0, 1 or UNKNOWN."""
        for key, count in self.held.items():
            if key >> 32 == gsi and count > 0:
                return 1
        if gsi != self.via_gsi:
            return 0 if self.known else UNKNOWN
        return UNKNOWN if self.strangers < 0 else 1 if self.strangers else 0

    def unnamed_holders(self) -> int:
        """Sources on the callback's GSI that no event has named yet: none, if the recording would have shown them."""
        shown = self.machine.closed or (self.known and self.machine.sees("via.gsi_assert"))
        return 0 if shown or self.machine.gsi_shared == 0 else UNKNOWN

    def held_count(self) -> int:
        """How many sources other than the callback hold its GSI; UNKNOWN if that is not known."""
        if self.strangers < 0:
            return UNKNOWN
        return self.strangers + sum(n for key, n in self.held.items() if key >> 32 == self.via_gsi)

    def routed(self) -> bool:
        """Whether the callback goes through a GSI at all (`callback_via_type`)."""
        return self.via_type in (VIA_GSI, VIA_PCI_INTX)

    def holders(self, gsi: int) -> int:
        """Whether gsi_assert_count is above 0: 0, 1 or UNKNOWN."""
        mine = self.via_asserted if gsi == self.via_gsi and self.routed() else 0
        others = self.others(gsi)
        if mine == 1 or others == 1:
            return 1
        return 0 if mine == 0 and others == 0 else UNKNOWN

    def refresh(self, gsi: int) -> None:
        """V2 (vioapic_irq_positive_edge): the line of the pin follows gsi_assert_count."""
        pin = self.ioapic.pin(gsi)
        high = self.holders(gsi)
        if high == 1:
            self.message(pin, pin.raise_line(), NONE)
        elif high == 0:
            pin.lower_line()
        else:
            pin.forget_line()

    # -- V1 to V5 ----------------------------------------------------------------------------------------------

    def line(self, a: int) -> None:
        """V1 with its lock (hvm_set_callback_irq_level): the lock-free tests have passed."""
        if self.routed():
            self.irq_lock_taken += 1
            self.set_line(a)

    def set_line(self, a: int) -> None:
        """V1 (hvm_set_callback_irq_level): the callback's own contribution to the GSI becomes `a`."""
        if self.via_asserted == a or not self.routed():
            return
        self.via_asserted = a
        self.machine.monitor.line_changed(self, a)
        self.refresh(self.via_gsi)

    def set_param(self, via_type: int, gsi: int) -> None:
        """hvm_set_callback_via: an asserted callback moves from the old GSI to the new one."""
        old, was_routed = self.via_gsi, self.routed()
        if gsi != NONE and gsi != old:
            self.via_gsi = gsi
            self.strangers = self.unnamed_holders()
        if via_type != NIL:
            self.via_type = via_type
        if was_routed and (old != self.via_gsi or not self.routed()):
            self.refresh(old)
        if self.routed():
            self.refresh(self.via_gsi)
            vector = self.ioapic.pin(self.via_gsi).vector
            if vector != NONE:
                self.vector = vector

    def hold(self, gsi: int, source: int, a: int) -> bool:
        """Another device raises or lowers its INTx. True when it lets go of what it surely did not hold."""
        key = gsi << 32 | (source & 0xFFFFFFFF)
        count = self.held.get(key, 0)
        underflow = False
        if a:
            # The same source twice is one contribution: pci_intx is a bitmap. An unnamed source may be several.
            self.held[key] = count + 1 if source == NONE else 1
        elif count:
            self.held[key] = count - 1
        elif gsi == self.via_gsi and self.strangers > 0:
            self.strangers -= 1
        elif (gsi == self.via_gsi and self.strangers == 0) or (gsi != self.via_gsi and self.known):
            underflow = True
        self.refresh(gsi)
        return underflow

    def message(self, pin: Pin, outcome: int, eoi_vcpu: int) -> None:
        """V3 for what the pin did: `outcome` of a transition, `eoi_vcpu` the vCPU whose EOI caused it."""
        if outcome == SEND:
            self.deliver(pin, eoi_vcpu)
        elif outcome == MAYBE and pin.vector != NONE:
            for vcpu in self.vcpus.values():
                vcpu.lapic.irr_known &= ~(1 << pin.vector)

    def deliver(self, pin: Pin, eoi_vcpu: int) -> None:
        """V3 (vioapic_deliver, vlapic_set_irq): IRR and TMR of the destination, and a kick unless it is exiting."""
        if pin.vector == NONE:
            return
        targets = self.targets(pin)
        if not targets:
            self.unplaced |= 1 << pin.vector
        for v in targets:
            self.vcpu(v).lapic.accept(pin.vector, pin.level == 1)
            if v != eoi_vcpu:
                self.kick(v)

    def targets(self, pin: Pin) -> list[int]:
        """vCPUs that the entry names; lowest priority takes turns (apic_round_robin)."""
        if pin.dest == NONE:
            return []
        if pin.logical != 1:
            return [pin.dest // self.machine.apic_id_stride]
        named = [v for v in range(8) if pin.dest >> v & 1]
        if pin.delivery == LOWEST_PRIORITY and named:
            chosen = next((v for v in named if v > self.round_robin), named[0])
            self.round_robin = chosen
            return [chosen]
        return named

    def kick(self, v: int) -> None:
        """vcpu_kick: a VM entry `kick_ns` later; nothing if the vCPU is not running. Recordings have their own. In a
        what-if on a recording it wakes a vCPU that had blocked, as vcpu_kick does (scenarios know no such vCPU)."""
        machine = self.machine
        vcpu = self.vcpu(v)
        if machine.recorded is not None and vcpu.blocked and vcpu.running == 0:
            vcpu.running = 1
        if machine.closed and self.vcpu(v).running == 1:
            machine.agenda.at(machine.now + machine.kick_ns, SOFTWARE, ENTRY, self.id, v)

    def vmentry(self, v: int) -> int:
        """V4 (vmx_intr_assist): policy hook, then the highest IRR vector above PPR is injected. NONE: nothing is."""
        vcpu = self.vcpu(v)
        if vcpu.running != 1:
            return NONE
        self.vm_entries += 1
        self.machine.policy.on_vmentry(self, v)
        lapic = vcpu.lapic
        vector = lapic.irr.bit_length() - 1
        if vector < 0 or vector_class(vector) <= lapic.ppr_class():
            return NONE
        lapic.deliver(vector)
        return vector

    def eoi(self, v: int, seq: int) -> int:
        """V5 (vlapic_EOI_set, vioapic_update_EOI): hook, highest ISR bit, Remote IRR, re-delivery."""
        lapic = self.vcpu(v).lapic
        if self.machine.closed:
            self.machine.policy.on_eoi(self, v)
        vector = lapic.eoi()
        if vector < 0:
            return NONE
        if not self.machine.closed or lapic.tmr >> vector & 1:
            for pin in self.ioapic.pins_of(vector):
                outcome = pin.end_of_interrupt()
                if outcome == SEND and self.machine.closed and pin.number == self.via_gsi:
                    self.machine.monitor.redelivered(self, v, seq)
                self.message(pin, outcome, v)
        return vector

    def rte_write(self, gsi: int, word: int, target: int) -> None:
        """vioapic_write_redirent: unmasking a level pin whose line is high delivers. `target`: vcpu if resolved."""
        pin = self.ioapic.pin(gsi)
        pin.write(word)
        if target != NONE:
            pin.logical = 0
            pin.dest = target * self.machine.apic_id_stride
        if gsi == self.via_gsi:
            self.vector = pin.vector
        self.message(pin, pin.assess() if pin.level == 1 else 0, NONE)

    # -- where a vector is -------------------------------------------------------------------------------------

    def took(self, v: int, vector: int) -> None:
        """A recorded injection: the vector leaves the IRR it was in, even if the model had it in another one."""
        bit = 1 << vector
        lapic = self.vcpu(v).lapic
        if not lapic.irr & bit:
            for vcpu in self.vcpus.values():
                if vcpu.lapic.irr & bit:
                    vcpu.lapic.irr &= ~bit
                    break
        self.unplaced &= ~bit
        lapic.deliver(vector)
        lapic.irr_known |= bit
        for pin in self.ioapic.pins_of(vector):
            if pin.level == 1:
                pin.remote_irr = 1

    def in_flight(self, vector: int) -> bool:
        """Whether some virtual LAPIC is known to have the vector in IRR or ISR."""
        bit = 1 << vector
        if self.unplaced & bit:
            return True
        return any(u.lapic.irr & bit or vector in u.lapic.isr for u in self.vcpus.values())

    def surely_nowhere(self, vector: int) -> bool:
        """Whether every virtual LAPIC is known to have the vector neither in IRR nor in ISR."""
        if not self.known or self.in_flight(vector):
            return False
        bit = 1 << vector
        return all(
            u.lapic.irr_known & bit and u.lapic.isr_unknown_below <= vector_class(vector) for u in self.vcpus.values()
        )

    def told(self) -> tuple[Evidence, ...]:
        """The last transitions of the callback, oldest first."""
        return tuple(
            Evidence(t, None if seq == NONE else seq, _WORDS[word] if v == NONE else f"{_WORDS[word]} {v}")
            for t, seq, word, v in self.story
        )

    def forget(self) -> None:
        """Records were lost (U2): whatever they could have changed is unknown."""
        self.known = False
        self.matching.forget()
        self.flag = UNKNOWN
        self.callback_eoi_t = NIL
        self.line_t = NIL
        self.via_asserted = UNKNOWN
        self.held.clear()
        self.strangers = self.unnamed_holders()
        self.ioapic.forget()
        self.unplaced = 0
        self.vector = self.machine.vector
        for vcpu in self.vcpus.values():
            vcpu.forget()
