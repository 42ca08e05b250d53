"""Interrupt hardware of x86 driven by a recording: local APICs, physical and virtual (spec S6.1).

There is no policy here: hardware has one behaviour. The recording names what was requested, delivered and dismissed;
the machine keeps IRR, ISR and the handler stacks, and the monitor says where that is impossible.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import INF, KIND_ID, NIL, NONE
from replay.hardware.ioapic import Pin
from replay.hardware.lapic import VECTORS
from replay.knowledge import UNKNOWN
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.apic.hpet_block_monitor import RTC_PIN, HpetBlockMonitor
from replay.systems.apic.ioapic_monitor import STUCK_LIMIT, IoApicMonitor
from replay.systems.apic.lockstep import NEEDS, ApicLockstep
from replay.systems.apic.monitor import LapicMonitor
from replay.systems.apic.state import Processor

__all__ = ["ApicMachine"]

ACCEPT: Final = KIND_ID["lapic.accept"]
DELIVER: Final = KIND_ID["lapic.deliver"]
EXIT: Final = KIND_ID["lapic.exit"]
EOI: Final = KIND_ID["lapic.eoi"]
TPR: Final = KIND_ID["lapic.tpr"]
IDLE: Final = KIND_ID["lapic.idle"]
RESET: Final = KIND_ID["lapic.reset"]
SNAPSHOT: Final = KIND_ID["lapic.snapshot"]
RUN: Final = KIND_ID["sched.run"]
STOP: Final = KIND_ID["sched.stop"]
LOST: Final = KIND_ID["trace.lost"]
IOAPIC_LINE: Final = KIND_ID["ioapic.line"]
IOAPIC_RTE: Final = KIND_ID["ioapic.rte"]
IOAPIC_CHECK: Final = KIND_ID["ioapic.check"]
IOAPIC_REMOTE_IRR: Final = KIND_ID["ioapic.remote_irr"]
IOAPIC_EOI: Final = KIND_ID["ioapic.eoi"]
IOAPIC_STORM: Final = KIND_ID["ioapic.storm"]
HPET_CMP: Final = KIND_ID["hwhpet.cmp"]
HPET_DATA: Final = KIND_ID["hwhpet.route_data"]
HPET_ADDRESS: Final = KIND_ID["hwhpet.route_addr"]
HPET_CONFIG: Final = KIND_ID["hwhpet.config"]
HPET_FIRE: Final = KIND_ID["hwhpet.fire"]

# Actions of the agenda.
EOI_LIMIT: Final = 1
IRR_LIMIT: Final = 2  # of a vector that could not be delivered when its time was up
IRR_WATCH: Final = 3  # of a processor's oldest request

#: In place of a vector: an EOI of something delivered before the recording began.
UNSEEN: Final = VECTORS
#: Confidence of "ISR is empty" when that was concluded from the vCPU halting (a handler does not halt).
CONF_FROM_HALT: Final = 80


class ApicMachine(Machine):
    """All local APICs of a recording; a physical one is keyed by CPU, a virtual one by domain and vCPU."""

    columns: ClassVar[tuple[str, ...]] = (
        "kind", "seq", "t_ns", "cpu", "dom", "vcpu", "obj", "tgt", "val", "val2", "flags",
    )  # fmt: skip

    def __init__(self, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.spurious_vector = config.integer("spurious_vector")
        self.eoi_overdue_ns = config.integer("eoi_overdue_ns")
        self.irr_stuck_ns = config.integer("irr_stuck_ns")
        self.monitor = LapicMonitor(sink, config.integer("nesting_limit"), config.integer("t_err_ns"))
        self.processors: dict[int, Processor] = {}
        self.by_serial: list[Processor] = []
        self.started = False
        self.born: set[int] = set()  # domains created in the recording: their LAPICs start empty
        self.irr_coalesced = 0
        self.exits_traced = True
        self.config = config
        self.ioapics: dict[int, IoApicMonitor] = {}  # by domain; NONE: the machine's own
        self.hpet = HpetBlockMonitor(sink, config)
        self.lockstep: ApicLockstep | None = None  # for recordings that show what the hardware did

    def ignores(self) -> frozenset[str]:
        """Which vCPU runs matters to time-outs of requests and of EOIs after a return, and a vCPU that is first seen
        running to what is known of domains created later."""
        timed = ("lapic.accept", "lapic.exit", "lapic.reset")
        if self.from_boot or self.observed is None or any(self.sees(kind) for kind in timed):
            return frozenset()
        return frozenset(("sched.run", "sched.stop"))

    def load(self, init: Mapping[str, Any]) -> None:
        """`rte`: redirection entries at the start."""
        if "rte" in init:
            self.ioapic(NONE).load(init["rte"])

    # -- event glue --------------------------------------------------------------------------------------------

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        """The event glue: every event to the method of its rule."""
        if not self.started:
            self.start()
        if self.lockstep is not None:
            rows = self.lockstep.watch(rows)
        for kind, seq, t, cpu, dom, vcpu, obj, tgt, val, val2, flags in rows:
            self.advance(t)
            key = dom << 16 | vcpu if dom >= 0 else -1 - cpu
            self.event(kind, seq, key, cpu, dom, vcpu, obj, tgt, val, val2, flags)

    def event(
        self, kind: int, seq: int, key: int, cpu: int, dom: int, vcpu: int, obj: int, tgt: int, val: int, val2: int,
        flags: int,
    ) -> None:  # fmt: skip
        """Any event at `self.now`."""
        if IOAPIC_LINE <= kind <= HPET_FIRE:
            self.block(kind, seq, dom, obj, tgt, val, val2)
            return
        if kind == LOST:  # of all CPUs at once it belongs to no processor
            self.gap(flags)
            self.taint(cpu, val, self.now)
            return
        if kind in (ACCEPT, DELIVER, EXIT) and not 0 <= obj < VECTORS:
            return  # a damaged record names no vector
        p = self.processors.get(key)
        if p is None:
            p = self.discover(key, cpu, dom, vcpu)
        if self.open_gaps and dom >= 0:
            p.forget()  # U2: between this event and the one before it may have run where records are lost
        if kind == DELIVER:
            self.deliver(p, obj, seq)
        elif kind == EOI:
            self.eoi(p, obj, seq)
        elif kind == ACCEPT:
            self.accept(p, obj, bool(flags & 1), seq)
        elif kind == EXIT:
            self.exit(p, obj, seq)
            if val != NIL and dom in self.ioapics:
                self.ioapics[dom].handler_returned(obj, val)
        elif kind == RUN:
            self.run(p)
        elif kind == STOP:
            p.running = 0
        elif kind == IDLE:
            self.idle(p)
        elif kind == TPR:
            self.tpr(p, val)
        elif kind == RESET:
            self.reset(p, dom, vcpu)
        elif kind == SNAPSHOT:
            self.snapshot(p, obj, tgt, val)

    def start(self) -> None:
        """What the recording can show decides which rules may speak."""
        self.started = True
        self.monitor.accepts_seen = self.sees("lapic.accept")
        self.exits_traced = self.sees("lapic.exit")
        self.monitor.exits_seen = self.exits_traced
        self.monitor.delivers_seen = self.sees("lapic.deliver")
        self.monitor.tpr_certain = self.observed is None
        self.hpet.start(self.from_boot, self.sees("hwhpet.fire"))
        if self.observed is not None and not self.sink.closed and all(self.sees(kind) for kind in NEEDS):
            self.lockstep = ApicLockstep(self.sink)

    def discover(self, key: int, cpu: int, dom: int, vcpu: int) -> Processor:
        """First event of a CPU or vCPU."""
        p = Processor(
            key,
            len(self.by_serial),
            NONE if dom >= 0 else cpu,
            dom,
            vcpu,
            known=self.from_boot or dom in self.born,
            spurious_vector=self.spurious_vector,
        )
        self.processors[key] = p
        self.by_serial.append(p)
        return p

    # -- transitions -------------------------------------------------------------------------------------------

    def accept(self, p: Processor, vector: int, level: bool, seq: int) -> None:
        """L1: set IRR; a request that is already there is absorbed."""
        if self.monitor.illegal(p, vector, self.now, seq):
            return
        if p.lapic.accept(vector, level):
            self.irr_coalesced += 1
            return
        p.requested_at[vector] = self.now
        if self.irr_stuck_ns and p.dom >= 0 and self.monitor.accepts_seen and not p.watched:
            p.watched = True
            self.agenda.at(self.now + self.irr_stuck_ns, SOFTWARE, IRR_WATCH, p.serial, 0, p.generation)

    def deliver(self, p: Processor, vector: int, seq: int) -> None:
        """L3: IRR to ISR, and a frame on the stack."""
        t = self.now
        self.monitor.delivering(p, vector, t, seq)
        p.lapic.deliver(vector)
        p.requested_at.pop(vector, None)
        p.frames.append((vector, t))
        p.recent.append((t, seq, vector))
        p.deliveries[vector] += 1
        self.monitor.entered(p, vector, t, seq)
        if p.dom in self.ioapics:
            self.ioapics[p.dom].delivered(vector)

    def eoi(self, p: Processor, named: int, seq: int) -> int:
        """L4: dismiss the highest vector in service; returns it (NONE if none is known)."""
        t = self.now
        self.monitor.eoi(p, named, t, seq)
        vector = p.lapic.eoi()
        p.recent.append((t, seq, -1))
        p.deliverable_since = t
        p.eois[vector if 0 <= vector < VECTORS else UNSEEN] += 1
        if not self.exits_traced and vector >= 0:
            # Without exit records the EOI is the only sign that a handler ends.
            p.frames = [frame for frame in p.frames if frame[0] != vector]
        if p.dom in self.ioapics and (vector >= 0 or named >= 0):
            self.request(p.dom, self.ioapics[p.dom].dismissed(vector if vector >= 0 else named, t, seq), seq)
        return vector

    def exit(self, p: Processor, vector: int, seq: int) -> None:
        """L5: the handler returned; its ISR bit may outlive it (L6)."""
        self.monitor.exiting(p, vector, self.now, seq)
        for index in range(len(p.frames) - 1, -1, -1):
            if p.frames[index][0] == vector:
                del p.frames[index]
                break
        if vector in p.lapic.isr:
            p.returned_at[vector] = self.now
            self.agenda.at(self.now + self.eoi_overdue_ns, SOFTWARE, EOI_LIMIT, p.serial, vector, p.generation)

    def run(self, p: Processor) -> None:
        """A vCPU starts to run."""
        if p.running != 1:
            p.deliverable_since = self.now
        p.running = 1

    def idle(self, p: Processor) -> None:
        """U4: a halted vCPU is in no handler, so nothing unseen is in service."""
        if not p.lapic.isr_is_known():
            p.lapic.settle()
            p.conf = CONF_FROM_HALT
        p.frames_known = True

    def tpr(self, p: Processor, value: int) -> None:
        """L2: TPR is written."""
        p.lapic.tpr = value & 0xFF if value >= 0 else UNKNOWN
        p.deliverable_since = self.now

    def reset(self, p: Processor, dom: int, vcpu: int) -> None:
        """A new vCPU, INIT or power-up; without a vCPU, a whole new domain."""
        if dom != NONE and vcpu == NONE:
            self.born.add(dom)
        p.lapic.reset()
        p.frames.clear()
        p.frames_known = True
        p.requested_at.clear()
        p.new_generation()
        p.conf = 100

    def snapshot(self, p: Processor, register: int, word: int, bits: int) -> None:
        """Register words from a dump: 64 vectors each, register 0 IRR, 1 ISR."""
        value = bits & (1 << 64) - 1
        if not 0 <= word < VECTORS // 64:
            return
        if register == 0:
            p.lapic.irr = p.lapic.irr & ~(((1 << 64) - 1) << 64 * word) | value << 64 * word
            p.lapic.irr_known |= ((1 << 64) - 1) << 64 * word
        elif register == 1:
            kept = [v for v in p.lapic.isr if v >> 6 != word]
            p.lapic.isr = sorted(kept + [64 * word + b for b in range(64) if value >> b & 1])
            if word == VECTORS // 64 - 1:
                p.lapic.isr_unknown_below = 0

    # -- IOAPIC and HPET block -----------------------------------------------------------------------------------

    def ioapic(self, dom: int) -> IoApicMonitor:
        """The IOAPIC of the machine (NONE) or of a guest."""
        ioapic = self.ioapics.get(dom)
        if ioapic is None:
            ioapic = IoApicMonitor(self.sink, self.config, self.agenda, dom)
            ioapic.start(self.from_boot, self.observed is not None and self.sees("ioapic.eoi"))
            self.ioapics[dom] = ioapic
        return ioapic

    def block(self, kind: int, seq: int, dom: int, obj: int, tgt: int, val: int, val2: int) -> None:
        """Event glue of the hardware that is not a processor's."""
        t = self.now
        if kind == IOAPIC_LINE:
            if obj == RTC_PIN and val:
                self.hpet.rtc_edge(t, seq)
            self.request(dom, self.ioapic(dom).line(obj, val, t, seq), seq)
        elif kind == IOAPIC_RTE:
            self.request(dom, self.ioapic(dom).rte(obj, val, val2, t, seq), seq)
        elif kind == IOAPIC_EOI:
            self.request(dom, self.ioapic(dom).acknowledged(obj, tgt, t, seq), seq)
        elif kind == IOAPIC_REMOTE_IRR:
            self.ioapic(dom).remote_irr(obj, val)
        elif kind == IOAPIC_CHECK:
            self.ioapic(dom).check(t, self.in_flight(dom))
        elif kind == IOAPIC_STORM:
            self.ioapic(dom).slowed(obj, t, seq)
        elif kind == HPET_CMP:
            self.hpet.written(obj, val, val2, t, seq)
        elif kind == HPET_FIRE:
            self.hpet.fired(obj, t, seq)
        elif kind == HPET_DATA:
            self.hpet.route(obj, val, NIL, t, seq)
        elif kind == HPET_ADDRESS:
            self.hpet.route(obj, NIL, val, t, seq)
        elif kind == HPET_CONFIG:
            self.hpet.configured(obj, val, val2, t)

    def in_flight(self, dom: int) -> int:
        """Vectors that are, or may be, in an IRR or ISR of the machine (NONE) or of a guest, as bits; -1 if unknown."""
        bits = 0
        mine = [p.lapic for p in self.processors.values() if p.dom == dom]
        for lapic in mine:
            if not lapic.isr_is_known() or lapic.irr_known != (1 << VECTORS) - 1:
                return -1
            bits |= lapic.irr
            for vector in lapic.isr:
                bits |= 1 << vector
        return bits if mine else -1

    def request(self, dom: int, pins: list[Pin], seq: int) -> None:
        """L1 for the messages of pins. A recording states its accepts itself; a scenario leaves them to the model."""
        if self.observed is not None:
            return
        for pin in pins:
            if pin.dest >= 0 and pin.logical != 1:
                key = dom << 16 | pin.dest if dom >= 0 else -1 - pin.dest
                p = self.processors.get(key) or self.discover(key, pin.dest, dom, pin.dest if dom >= 0 else NONE)
                self.accept(p, pin.vector, pin.level == 1, seq)

    def conclude(self, t_end: int) -> None:
        if self.lockstep is not None:
            self.lockstep.finish()
        self.hpet.finish(t_end)
        self.sink.findings.sort(key=lambda finding: finding.t)

    # -- time-outs ---------------------------------------------------------------------------------------------

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        if action == STUCK_LIMIT:
            self.ioapics[c].fire(a, b, self.now)
            return
        p = self.by_serial[a]
        if c != p.generation:
            return
        if action == EOI_LIMIT:
            # A later service of the same vector has a time-out of its own.
            since = self.now - self.eoi_overdue_ns
            if b in p.lapic.isr and p.returned_at[b] == since and not any(v == b for v, _ in p.frames):
                self.monitor.overdue(p, b, self.now, since)
        elif action == IRR_LIMIT:
            vector = b % VECTORS
            if p.requested_at.get(vector) == b // VECTORS:  # a later request of it has a time-out of its own
                self.irr_limit(p, vector)
        elif action == IRR_WATCH:
            self.irr_watch(p)

    def irr_watch(self, p: Processor) -> None:
        """The oldest request's time is up, if it was not served. One entry at a time stands for all requests."""
        p.watched = False
        oldest = INF
        for vector, since in list(p.requested_at.items()):
            due = since + self.irr_stuck_ns
            if due > self.now:
                oldest = min(oldest, due)
            elif due == self.now:
                self.irr_limit(p, vector)
        if oldest < INF:
            p.watched = True
            self.agenda.at(oldest, SOFTWARE, IRR_WATCH, p.serial, 0, p.generation)

    def irr_limit(self, p: Processor, vector: int) -> None:
        """Still requested: count only the time in which it could have been delivered."""
        if not p.lapic.irr >> vector & 1 or vector not in p.requested_at:
            return
        asked = p.requested_at[vector]
        again = asked * VECTORS + vector
        since = max(asked, p.deliverable_since)
        if p.running == 1 and not p.blocked(vector) and p.lapic.tpr >= 0:
            if self.now - since >= self.irr_stuck_ns:
                self.monitor.stuck(p, vector, self.now, since)
                return
            self.agenda.at(since + self.irr_stuck_ns, SOFTWARE, IRR_LIMIT, p.serial, again, p.generation)
            return
        self.agenda.at(self.now + self.irr_stuck_ns, SOFTWARE, IRR_LIMIT, p.serial, again, p.generation)

    # -- ignorance ---------------------------------------------------------------------------------------------

    def taint(self, cpu: int, t0: int, t1: int) -> None:
        """U2: the LAPIC of `cpu` is unknown, and so is every vCPU, for it may have run there."""
        for key, p in self.processors.items():
            if p.dom >= 0 or cpu in (NONE, NIL) or key == -1 - cpu:
                p.forget()
        self.from_boot = False  # who has not appeared yet may have lost records as well
        self.born.clear()
        for ioapic in self.ioapics.values():
            ioapic.forget()
        self.hpet.forget()

    # -- numbers -----------------------------------------------------------------------------------------------

    def metrics(self) -> dict[str, int]:
        delivered = sum(sum(p.deliveries) for p in self.by_serial)
        result = {
            "deliveries": delivered,
            "eois": sum(sum(p.eois) for p in self.by_serial),
            "eois_unmatched": self.monitor.unmatched,
            "irr_coalesced": self.irr_coalesced,
            "in_service_at_end": sum(len(p.lapic.isr) for p in self.processors.values()),
            "max_nesting": self.monitor.max_nesting,
            "ioapic_sends": sum(x.sends for x in self.ioapics.values()),
            "level_redeliveries": sum(x.level_redeliveries for x in self.ioapics.values()),
            **self.hpet.metrics(),
            **(self.lockstep.metrics() if self.lockstep is not None else {}),
        }
        for name in ("deliveries", "eois"):
            for p in sorted(self.by_serial, key=lambda p: p.key):
                owner = f"d{p.dom}v{p.vcpu}" if p.dom >= 0 else f"cpu{p.cpu}"
                for vector, count in enumerate(p.deliveries if name == "deliveries" else p.eois):
                    if count:
                        result[f"{name}.{owner}.{'unknown' if vector == UNSEEN else f'{vector:#04x}'}"] = count
        return result
