"""mwait (second finding of the HPET proposal): a CPU is woken before its MONITOR is armed, and sleeps on.

Simulated are one wake word and one flag of each sleeping CPU, the monitor hardware, a waker that takes a while between
looking and writing, and device interrupts that make a sleeper leave and come back in between.
"""

from __future__ import annotations

from random import Random

from tracetool.seeded.engine import Recording, World

__all__ = ["record"]

US = 1_000
MS = 1_000_000

SLEEPERS = 4
WAKER = 9
ROUNDS = 60
PERIOD = 200 * US
STEP = 100
DEVICE_VECTOR = 0x41
BUSY = 900


class Sleeper:
    """A CPU in or near MWAIT: the flag that others see, the armed monitor, work that was asked of it."""

    def __init__(self) -> None:
        self.flag = False
        self.armed = False
        self.triggered = False
        self.asleep = False
        self.idle = False
        self.softirq = False
        self.life = 0


class MwaitIdle(World):
    """Flag beside the monitored word (`bad`), or flag and softirq mask in it, changed by one atomic instruction."""

    def __init__(self, rng: Random, *, bad: bool) -> None:
        super().__init__()
        self.bad = bad
        self.cpus = [Sleeper() for _ in range(SLEEPERS)]
        self.looked: dict[int, bool] = {}
        for p in range(SLEEPERS):
            self.at(p, self.enter, p)
            for n in range(1, ROUNDS):
                self.plan(rng, p, n * PERIOD)

    def plan(self, rng: Random, p: int, t: int) -> None:
        """One wake-up: looked, a device in between or not, stored; and a device that ends the round for sure."""
        gap = rng.randrange(200, 2_500)
        self.at(t, self.look, p)
        self.at(t + gap, self.store, p)
        if rng.random() < 0.5:
            self.at(t + rng.randrange(1, gap), self.device, p)
        self.at(t + PERIOD // 2, self.device, p)

    # -- sleeper -----------------------------------------------------------------------------------------------

    def enter(self, p: int) -> None:
        """Idle entry; the steps follow one by one."""
        cpu = self.cpus[p]
        cpu.idle = True
        cpu.life += 1
        self.note("idle.enter", cpu=p, val=self.now + 50 * MS)
        order = (self.arm, self.check, self.advertise) if self.bad else (self.advertise, self.arm, self.check)
        for n, step in enumerate((*order, self.sleep)):
            self.after((n + 1) * STEP, step, p, cpu.life)

    def arm(self, p: int, life: int) -> None:
        if self.cpus[p].life == life and self.cpus[p].idle:
            self.note("idle.prep.arm", cpu=p)
            self.cpus[p].armed = True

    def check(self, p: int, life: int) -> None:
        cpu = self.cpus[p]
        if cpu.life == life and cpu.idle:
            self.note("idle.prep.check", cpu=p)
            if not self.bad and cpu.softirq:
                self.leave(p)

    def advertise(self, p: int, life: int) -> None:
        if self.cpus[p].life == life and self.cpus[p].idle:
            self.note("idle.prep.advertise", cpu=p)
            self.cpus[p].flag = True

    def sleep(self, p: int, life: int) -> None:
        """MWAIT: falls through when the line was written since MONITOR."""
        cpu = self.cpus[p]
        if cpu.life != life or not cpu.idle:
            return
        self.note("idle.prep.sleep", cpu=p)
        if cpu.triggered:
            self.leave(p)
            return
        cpu.asleep = True
        if cpu.softirq:
            self.happened("mwait-lost-wakeup")

    def leave(self, p: int) -> None:
        """Idle exit; whatever was asked is done, then idle again."""
        cpu = self.cpus[p]
        self.note("idle.exit", cpu=p)
        cpu.flag = cpu.armed = cpu.triggered = cpu.asleep = cpu.idle = cpu.softirq = False
        cpu.life += 1
        self.after(BUSY, self.enter, p)

    def device(self, p: int) -> None:
        """An interrupt of a device: ends any sleep."""
        if self.cpus[p].idle:
            self.note("idle.break", cpu=p, obj=DEVICE_VECTOR)
            self.leave(p)

    # -- waker -------------------------------------------------------------------------------------------------

    def look(self, p: int) -> None:
        """The waker reads the flag."""
        self.note("wake.sample", cpu=WAKER, tgt=p)
        self.looked[p] = self.cpus[p].flag

    def store(self, p: int) -> None:
        """The waker writes; an IPI goes where the flag was not seen. The good code sees it in the same instruction."""
        cpu = self.cpus[p]
        seen = self.looked[p] if self.bad else cpu.flag
        self.note("wake.store", cpu=WAKER, tgt=p)
        self.note("wake.post", cpu=WAKER, tgt=p, flags=1 if seen else 2)
        if seen and not cpu.flag:
            self.happened("mwait-ipi-elided-unsafe")
        if not cpu.idle:
            return
        cpu.softirq = True
        if not seen or cpu.asleep:
            self.leave(p)
        elif cpu.armed:
            cpu.triggered = True


def record(*, bad: bool, seed: int) -> Recording:
    """Simulate 4 sleepers and their waker for 12 ms; same devices and wake-ups for the same seed."""
    return MwaitIdle(Random(seed), bad=bad).run(ROUNDS * PERIOD)
