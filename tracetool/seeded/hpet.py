"""HPET broadcast (proposal of 2013): ownership handed over by moving the interrupt, or an interrupt that never moves.

Simulated are timers and device interrupts of CPUs that idle as often as they can, a block of too few comparators, local
APICs that hold back a message while a vector of the same or a higher class is in service, and the two algorithms.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tracetool.seeded.engine import Recording, World

__all__ = ["record"]

US = 1_000
MS = 1_000_000
NEVER = 1 << 60
NOBODY = -1

CPUS = 8
CHANNELS = 3
END = 60 * MS
#: Vectors: the comparator's among the devices' (bad), or above all of them (good).
SHARED_VECTOR = 0x30
DIRECT_VECTOR = 0xF1
DEVICE_VECTOR = 0x71
#: From here on all CPUs but two are busy, so channels are released while they are armed.
LOAD = 40 * MS
IDLERS = 2
SLOP = 50 * US
HANDLER = 12 * US
IPI = 300
#: Why a CPU left idle, as the recorder says it.
OTHER, OWN_CHANNEL, BROADCAST = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Stimuli:
    """What happens under any algorithm: absolute timer expiries of each CPU, device interrupts (t, cpu, length)."""

    timers: tuple[tuple[int, ...], ...]
    devices: tuple[tuple[int, int, int], ...]


def stimuli(rng: Random) -> Stimuli:
    """Ticks that nearly coincide, odd timers between them, and device interrupts some of which wait for a guest."""
    timers = []
    for _ in range(CPUS):
        ticks = {k * 2 * MS + rng.randrange(8 * US) for k in range(1, END // (2 * MS) + 2)}
        odd = {rng.randrange(END) for _ in range(20)}
        timers.append(tuple(sorted(ticks | odd | {2 * END})))
    devices = []
    for _ in range(120):
        length = 3 * MS if rng.random() < 0.15 else 2 * US
        devices.append((rng.randrange(END), rng.randrange(CPUS), length))
    devices += [(LOAD + 200 * US + p * 20 * US, p, 2 * US) for p in range(IDLERS, CPUS)]
    return Stimuli(tuple(timers), tuple(sorted(devices)))


class Channel:
    """A comparator that sends a message to `dest`; owner and members are the algorithm's."""

    def __init__(self) -> None:
        self.owner = NOBODY
        self.members: set[int] = set()
        self.next_event = NEVER
        self.generation = 0
        self.dest = NOBODY
        self.moving = False


class Cpu:
    """A CPU: asleep until when, vectors in service, messages that wait behind them, handlers on its stack."""

    def __init__(self) -> None:
        self.asleep = False
        self.deadline = NEVER
        self.channel = NOBODY
        self.in_service = 0
        self.waiting: list[int] = []
        self.stack: list[int] = []
        self.must_leave = False


class Platform(World):
    """CPUs, comparators and interrupts; subclasses hold the algorithm."""

    vector = SHARED_VECTOR
    nests = True

    def __init__(self, given: Stimuli) -> None:
        super().__init__()
        self.timers = given.timers
        self.cpus = [Cpu() for _ in range(CPUS)]
        self.channels = [Channel() for _ in range(CHANNELS)]
        for p in range(CPUS):
            self.at(p * US, self.idle, p)
        for t, p, length in given.devices:
            self.at(t, self.device, p, length)

    # -- the algorithm's part ----------------------------------------------------------------------------------

    def went_idle(self, p: int) -> None:
        """A CPU has gone idle and wants to be woken at its deadline."""
        raise NotImplementedError

    def left_idle(self, p: int) -> None:
        """A CPU is on its way out of idle."""
        raise NotImplementedError

    def broadcast(self, c: int, p: int) -> None:
        """The handler of channel `c` runs on CPU `p`."""
        raise NotImplementedError

    # -- CPUs --------------------------------------------------------------------------------------------------

    def idle(self, p: int) -> None:
        """Nothing to do: sleep until the next timer, unless that is too near."""
        cpu = self.cpus[p]
        if cpu.asleep or cpu.stack or cpu.must_leave or (self.now > LOAD and p >= IDLERS):
            return
        deadline = next(t for t in self.timers[p] if t > self.now)
        if deadline - self.now < 25 * US:
            self.at(deadline + 10 * US + p * US, self.idle, p)
            return
        cpu.asleep = True
        cpu.deadline = deadline
        self.note("idle.enter", cpu=p, val=deadline)
        self.went_idle(p)

    def wake(self, p: int, reason: int, channel: int) -> None:
        """Out of the C-state; the exit path follows, at once or after the handler that woke it."""
        cpu = self.cpus[p]
        cpu.asleep = False
        if channel == NOBODY:
            self.note("idle.exit", cpu=p, tgt=reason)
        else:
            self.note("idle.exit", cpu=p, tgt=reason, obj=channel)
        cpu.must_leave = True

    def exit_path(self, p: int) -> None:
        """After the wake: give channels up; work for a while, then idle again."""
        cpu = self.cpus[p]
        if cpu.must_leave:
            cpu.must_leave = False
            self.left_idle(p)
            cpu.deadline = NEVER
            self.after(12 * US + p * US, self.idle, p)

    def device(self, p: int, length: int) -> None:
        """A device interrupts a CPU; its EOI comes `length` later, for some only when a guest gets to it."""
        cpu = self.cpus[p]
        if cpu.in_service or cpu.stack:
            return
        self.note("isr.begin", cpu=p, obj=DEVICE_VECTOR)
        cpu.in_service += 1
        if cpu.asleep:
            self.note("idle.break", cpu=p, obj=DEVICE_VECTOR)
            self.wake(p, OTHER, NOBODY)
            self.exit_path(p)
        self.after(length, self.device_eoi, p)

    def device_eoi(self, p: int) -> None:
        """The vector leaves ISR; what waited behind it is taken."""
        self.note("isr.end", cpu=p, obj=DEVICE_VECTOR)
        self.cpus[p].in_service -= 1
        self.take_waiting(p)

    def ipi(self, p: int, c: int) -> None:
        """A wake-up sent by another CPU's handler arrives."""
        if self.cpus[p].asleep:
            self.wake(p, BROADCAST, c)
            self.exit_path(p)

    # -- comparators and messages ------------------------------------------------------------------------------

    def program(self, c: int, by: int, t: int, reason: int) -> None:
        """Write the comparator: fires at `t`, or as soon as possible."""
        channel = self.channels[c]
        channel.next_event = t
        channel.generation += 1
        fires = max(t, self.now + 20 * US)
        self.note("hpet.program", obj=c, cpu=by, tgt=channel.owner, val=fires, val2=reason)
        self.at(fires, self.match, c, channel.generation)

    def match(self, c: int, generation: int) -> None:
        """The counter has reached the comparator."""
        channel = self.channels[c]
        if channel.generation != generation:
            return
        cpu = self.cpus[channel.dest]
        if self.blocked(cpu):
            if c not in cpu.waiting:
                cpu.waiting.append(c)
        else:
            self.take(c, channel.dest)

    def blocked(self, cpu: Cpu) -> bool:
        """Whether a vector in service, or a handler that runs with interrupts off, holds the message back."""
        return (cpu.in_service > 0 and self.vector >> 4 <= DEVICE_VECTOR >> 4) or (bool(cpu.stack) and not self.nests)

    def take_waiting(self, p: int) -> None:
        """From IRR to ISR."""
        cpu = self.cpus[p]
        while cpu.waiting and not self.blocked(cpu):
            self.take(cpu.waiting.pop(0), p)

    def take(self, c: int, p: int) -> None:
        """The message is accepted on CPU `p`: its handler begins, on top of whatever runs there."""
        channel, cpu = self.channels[c], self.cpus[p]
        if p == channel.dest:
            channel.moving = False
        if channel.owner not in (NOBODY, p):
            self.happened("hpet-wrong-cpu")
        if channel.owner == NOBODY:
            self.happened("hpet-spurious-irq")
        self.note("hpet.fire", obj=c, cpu=p)
        if cpu.asleep:
            self.wake(p, OWN_CHANNEL, c)
        if cpu.stack:
            self.happened("hpet-nested-irq")
        cpu.stack.append(c)
        if len(cpu.stack) > 2:
            self.happened("hpet-stack-depth")
        self.note("hpet.handler.begin", obj=c, cpu=p)
        self.after(HANDLER, self.handler_end, p)
        self.broadcast(c, p)

    def handler_end(self, p: int) -> None:
        """The innermost handler returns; with the last one the exit path goes on."""
        cpu = self.cpus[p]
        self.note("hpet.handler.end", obj=cpu.stack.pop(), cpu=p)
        if cpu.stack:
            return
        self.exit_path(p)
        self.take_waiting(p)
        if not cpu.asleep and not cpu.stack:
            self.after(5 * US, self.idle, p)

    def post(self, by: int, p: int, c: int) -> None:
        """Wake another CPU by an IPI."""
        self.note("wake.post", cpu=by, tgt=p, flags=2)
        self.after(IPI, self.ipi, p, c)


class Migrating(Platform):
    """The code of 2013: round robin, and the IRQ migration machinery points the interrupt at each new owner."""

    def __init__(self, given: Stimuli) -> None:
        super().__init__(given)
        self.cursor = 0

    def went_idle(self, p: int) -> None:
        order = [(self.cursor + i) % CHANNELS for i in range(CHANNELS)]
        self.cursor = (self.cursor + 1) % CHANNELS
        c = next((i for i in order if self.channels[i].owner == NOBODY), order[0])
        channel = self.channels[c]
        self.cpus[p].channel = c
        channel.members.add(p)
        if channel.owner == NOBODY:
            channel.owner = p
            self.point(c, p)
        if self.cpus[p].deadline < channel.next_event:
            self.program(c, p, self.cpus[p].deadline, 0)

    def point(self, c: int, by: int) -> None:
        """set_affinity: refused while the previous move waits for its first interrupt."""
        channel = self.channels[c]
        if channel.dest == channel.owner:
            return
        if channel.dest == NOBODY:
            channel.dest = channel.owner
        elif channel.moving:
            self.note("hpet.retarget", obj=c, cpu=by, tgt=channel.owner, val=channel.dest, flags=1)
            self.happened("hpet-affinity-stale")
        else:
            self.note("hpet.retarget", obj=c, cpu=by, tgt=channel.owner, val=channel.dest)
            channel.dest = channel.owner
            channel.moving = True

    def left_idle(self, p: int) -> None:
        c = self.cpus[p].channel
        channel = self.channels[c]
        self.cpus[p].channel = NOBODY
        channel.members.discard(p)
        if channel.owner != p:
            return
        if channel.members:
            channel.owner = min(channel.members)
            self.point(c, p)
        else:
            channel.owner = NOBODY  # and the comparator stays armed

    def broadcast(self, c: int, p: int) -> None:
        channel = self.channels[c]
        channel.next_event = NEVER
        rest = NEVER
        for member in sorted(channel.members):
            deadline = self.cpus[member].deadline
            if deadline > self.now:
                rest = min(rest, deadline)
            elif member != p:
                self.post(p, member, c)
        if rest < NEVER:
            self.program(c, p, rest, 2)


class Fixed(Platform):
    """The proposal: join a channel that fires in time or shorten the soonest; the owner wakes everybody who joined."""

    vector = DIRECT_VECTOR
    nests = False

    def went_idle(self, p: int) -> None:
        cpu = self.cpus[p]
        free = next((i for i, channel in enumerate(self.channels) if channel.owner == NOBODY), NOBODY)
        if free != NOBODY:
            cpu.channel = free
            self.channels[free].owner = self.channels[free].dest = p
            self.program(free, p, cpu.deadline, 0)
            return
        in_time = [i for i, channel in enumerate(self.channels) if channel.next_event <= cpu.deadline + SLOP]
        if in_time:
            c = max(in_time, key=lambda i: self.channels[i].next_event)
        else:
            c = min(range(CHANNELS), key=lambda i: self.channels[i].next_event)
            self.program(c, p, cpu.deadline, 1)
        cpu.channel = c
        self.channels[c].members.add(p)

    def left_idle(self, p: int) -> None:
        c = self.cpus[p].channel
        if c == NOBODY:
            return
        channel = self.channels[c]
        self.cpus[p].channel = NOBODY
        channel.members.discard(p)
        if channel.owner != p:
            return
        channel.owner = NOBODY
        channel.next_event = NEVER
        channel.generation += 1  # disarmed
        for member in sorted(channel.members):
            self.cpus[member].channel = NOBODY
            self.post(p, member, c)
        channel.members.clear()

    def broadcast(self, c: int, p: int) -> None:
        """The interrupt only wakes the owner; its exit path does the rest."""


def record(*, bad: bool, seed: int) -> Recording:
    """Simulate 60 ms of 8 CPUs on 3 comparators under one of the two algorithms, same stimuli for the same seed."""
    given = stimuli(Random(seed))
    platform = Migrating(given) if bad else Fixed(given)
    return platform.run(END)
