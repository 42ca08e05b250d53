"""GICv2 CPU interfaces as recorded: what IAR, EOIR and DIR did on each core, physical and virtual (spec S6.3).

The hardware classes that predict these results from register writes and lines are in `replay.hardware.gic_*`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Final

from replay.agenda import SOFTWARE
from replay.declare import Config
from replay.events import KIND_ID, NIL, NONE
from replay.knowledge import UNKNOWN
from replay.machine import Machine
from replay.sink import Sink
from replay.systems.gic.lockstep import NEEDS, GicLockstep
from replay.systems.gic.monitor import Monitor

__all__ = ["GicMachine", "InService", "Interface"]

ACK: Final = KIND_ID["gic.ack"]
EOI: Final = KIND_ID["gic.eoi"]
DIR: Final = KIND_ID["gic.dir"]
CPU_IF: Final = KIND_ID["gic.cpu_if"]
RUN: Final = KIND_ID["sched.run"]
LOST: Final = KIND_ID["trace.lost"]

CTLR: Final = 0  # GICC_CTLR
CTLR_EOIMODE: Final = 1 << 9
FIRST_SPECIAL: Final = 1020  # 1020-1023 are no interrupts
MAX_CPUS: Final = 1 << 16

# Time-outs: a = unit. One entry watches the oldest; when it is due the next oldest is watched.
LEAK: Final = 1
NO_DIR: Final = 2


class InService:
    """An interrupt between IAR and EOIR."""

    __slots__ = ("irq", "priority", "seq", "since", "told")

    def __init__(self, irq: int, priority: int, since: int, seq: int) -> None:
        self.irq: int = irq
        self.priority: int = priority  # NIL: not recorded
        self.since: int = since
        self.seq: int = seq
        self.told: bool = False  # reported as a leak


class Interface:
    """One CPU interface. Below the known stack there may be interrupts that were active before the recording:
    `bottom_known` says there are none; `settled` are those that cannot be among them."""

    __slots__ = (
        "bottom_known", "by_dir", "cpu", "dropped", "eoimode", "id", "settled", "stack", "virtual", "watch_dir",
        "watch_eoi",
    )  # fmt: skip

    def __init__(self, index: int, cpu: int, virtual: bool, *, known: bool) -> None:
        self.id: int = index
        self.cpu: int = cpu
        self.virtual: bool = virtual
        self.stack: list[InService] = []
        self.bottom_known: bool = known
        self.settled: set[int] = set()
        self.eoimode: int = 0 if known else UNKNOWN
        self.by_dir: set[int] = set()  # interrupts that DIR has deactivated here
        self.dropped: dict[int, int] = {}  # EOIR seen, DIR not: INTID to time, oldest first
        self.watch_eoi: bool = False
        self.watch_dir: bool = False

    def forget(self) -> None:
        """U2: what happened here meanwhile is not known."""
        self.stack.clear()
        self.bottom_known = False
        self.settled.clear()
        self.eoimode = UNKNOWN
        self.dropped.clear()


class GicMachine(Machine):
    """Checks IAR, EOIR and DIR of every core against the rules of the architecture."""

    columns: ClassVar[tuple[str, ...]] = (
        "kind", "t_ns", "cpu", "dom", "vcpu", "obj", "val", "flags", "seq", "tgt", "val2",
    )  # fmt: skip

    def __init__(self, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.active_ns: int = config.integer("active_ns")
        self.dir_ns: int = config.integer("dir_ns")
        self.seq: int = NONE
        self.running: dict[int, tuple[int, int]] = {}  # core to (dom, vcpu)
        self.lost: bool = False
        self.units: list[Interface] = []
        self.unit_of: dict[int, Interface] = {}
        self.monitor: Monitor = Monitor(self)
        self.acks: int = 0
        self.spurious: int = 0
        self.eois: int = 0
        self.max_depth: int = 0
        self.config: Config = config
        self.lockstep: GicLockstep | None = None  # for recordings that show lines and register writes too

    def locked(self) -> bool:
        """Whether the recording shows all that the hardware models need."""
        return self.observed is not None and not self.sink.closed and all(self.sees(kind) for kind in NEEDS)

    def unit(self, cpu: int, flags: int) -> Interface:
        """The interface of a core; bit 0 of `flags` chooses the virtual one."""
        key = cpu << 1 | flags & 1
        found = self.unit_of.get(key)
        if found is None:
            found = Interface(len(self.units), cpu, bool(flags & 1), known=self.from_boot and not self.lost)
            self.unit_of[key] = found
            self.units.append(found)
        return found

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        """Feed canonical events; kinds of other systems are skipped."""
        if self.lockstep is None and self.locked():
            self.lockstep = GicLockstep(self.sink, self.config)
        if self.lockstep is not None:
            rows = self.lockstep.watch(rows)
        for kind, t, cpu, dom, vcpu, obj, val, flags, seq, _, _ in rows:
            self.advance(t)
            self.seq = seq
            if kind == LOST:
                self.taint(cpu, val, t)
            elif not 0 <= cpu < MAX_CPUS:
                continue
            elif kind == RUN:
                self.switch(cpu, (dom, vcpu))
            elif obj < 0:
                continue
            elif kind == ACK:
                self.acknowledge(self.unit(cpu, flags), obj & 0x3FF, val)
            elif kind == EOI:
                self.end_of_interrupt(self.unit(cpu, flags), obj & 0x3FF)
            elif kind == DIR:
                self.deactivate(self.unit(cpu, flags), obj & 0x3FF)
            elif kind == CPU_IF and obj == CTLR and val != NIL and not flags & 2:
                self.unit(cpu, flags).eoimode = 1 if val & CTLR_EOIMODE else 0

    def switch(self, cpu: int, guest: tuple[int, int]) -> None:
        """Another vcpu brings its own list registers and active priorities."""
        if self.running.get(cpu) != guest:
            self.running[cpu] = guest
            self.unit(cpu, 1).forget()

    def acknowledge(self, unit: Interface, irq: int, priority: int) -> None:
        """GICC_IAR. An interrupt that is taken was not active: whatever deactivated it, DIR is not missing."""
        if irq >= FIRST_SPECIAL:
            self.spurious += 1
            self.monitor.spurious(unit, irq)
            return
        self.acks += 1
        unit.dropped.pop(irq, None)
        if unit.stack and priority != NIL:
            running = unit.stack[-1]
            if running.priority != NIL and priority >= running.priority:
                self.monitor.inversion(unit, irq, priority, running)
        unit.stack.append(InService(irq, priority, self.now, self.seq))
        self.max_depth = max(self.max_depth, len(unit.stack))
        if not unit.watch_eoi:
            unit.watch_eoi = True
            self.agenda.at(self.now + self.active_ns, SOFTWARE, LEAK, unit.id)

    def end_of_interrupt(self, unit: Interface, irq: int) -> None:
        """GICC_EOIR: the order is that of a stack; an older one may lie below what the recording saw."""
        if irq >= FIRST_SPECIAL:
            return
        self.eois += 1
        stack = unit.stack
        at = len(stack) - 1
        while at >= 0 and stack[at].irq != irq:
            at -= 1
        if at >= 0:
            if at < len(stack) - 1:
                self.monitor.order(unit, irq, stack[-1])
            del stack[at]
        elif unit.bottom_known or irq in unit.settled:
            self.monitor.unmatched(unit, irq)
            return
        unit.settled.add(irq)
        if unit.eoimode == 1 and irq in unit.by_dir:
            unit.dropped[irq] = self.now
            if not unit.watch_dir:
                unit.watch_dir = True
                self.agenda.at(self.now + self.dir_ns, SOFTWARE, NO_DIR, unit.id)

    def deactivate(self, unit: Interface, irq: int) -> None:
        """GICC_DIR."""
        unit.by_dir.add(irq)
        unit.dropped.pop(irq, None)

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        """A time-out: report what is old enough, watch the next oldest."""
        self.seq = NONE
        if action == LEAK:
            self.watch_stack(self.units[a])
        else:
            self.watch_dropped(self.units[a])

    def watch_stack(self, unit: Interface) -> None:
        """Acknowledged, no EOIR. The stack is in the order of time."""
        unit.watch_eoi = False
        for entry in unit.stack:
            if entry.told:
                continue
            if self.now - entry.since < self.active_ns:
                unit.watch_eoi = True
                self.agenda.at(entry.since + self.active_ns, SOFTWARE, LEAK, unit.id)
                return
            entry.told = True
            self.monitor.leak(unit, entry)

    def watch_dropped(self, unit: Interface) -> None:
        """EOIR, no DIR; only for interrupts that DIR deactivates, not a guest's EOI."""
        unit.watch_dir = False
        for irq, since in list(unit.dropped.items()):
            if self.now - since < self.dir_ns:
                unit.watch_dir = True
                self.agenda.at(since + self.dir_ns, SOFTWARE, NO_DIR, unit.id)
                return
            del unit.dropped[irq]
            self.monitor.dir_missing(unit, irq, since)

    def taint(self, cpu: int, t0: int, t1: int) -> None:
        self.lost = True
        for unit in self.units:
            if cpu < 0 or unit.cpu == cpu:
                unit.forget()

    def metrics(self) -> dict[str, int]:
        """Counts of IAR and EOIR."""
        return {
            "acks": self.acks,
            "spurious_acks": self.spurious,
            "eois": self.eois,
            "max_depth": self.max_depth,
            **(self.lockstep.metrics() if self.lockstep is not None else {}),
        }
