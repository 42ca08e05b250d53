"""The mwait hand-shake: whether a wake-up posted by a memory write can be lost (spec S1.6).

The times of the waker's two steps are stimuli; only the mechanism is the policy:
`separate-flag` (Xen 2010-2025), `cmpxchg` (flag and softirq mask in the monitored line), `ipi` (always).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

from replay.agenda import SOFTWARE
from replay.declare import Config, UsageError
from replay.events import INF, KIND_ID, NONE
from replay.machine import Machine
from replay.sink import Evidence, Sink
from replay.systems.hpet_broadcast import codes
from replay.systems.hpet_broadcast.policies import BroadcastPolicy

__all__ = ["HANDSHAKES", "MwaitHandshake"]

ENTER: Final = KIND_ID["idle.enter"]
BREAK: Final = KIND_ID["idle.break"]
SAMPLE: Final = KIND_ID["wake.sample"]
STORE: Final = KIND_ID["wake.store"]

# Steps of the sleeper.
ARM: Final = 0
CHECK: Final = 1
ADVERTISE: Final = 2
SLEEP: Final = 3

#: Order of the sleeper's steps under each hand-shake.
HANDSHAKES: Final[Mapping[str, tuple[int, ...]]] = {
    "separate-flag": (ARM, CHECK, ADVERTISE, SLEEP),
    "cmpxchg": (ADVERTISE, ARM, CHECK, SLEEP),
    "ipi": (ARM, CHECK, ADVERTISE, SLEEP),
}


class Sleeper:
    """A CPU on its way into MWAIT. `lost_at` is the time of a store that it has not seen, NONE if there is none."""

    __slots__ = ("armed", "asleep", "deadline", "flag", "generation", "idle", "ipi", "lost_at", "softirq", "triggered")

    def __init__(self) -> None:
        self.flag = False  # "I am in mwait" as others see it
        self.armed = False  # MONITOR watches the wake word
        self.triggered = False  # written while armed
        self.asleep = False
        self.idle = False  # between entry and exit, asleep or not
        self.softirq = False
        self.ipi = False
        self.lost_at = NONE
        self.deadline = INF
        self.generation = 0

    def leave(self) -> None:
        """Idle exit: the flag goes, and a pending softirq is served."""
        self.flag = self.armed = self.triggered = self.asleep = self.idle = self.softirq = self.ipi = False
        self.lost_at = NONE
        self.generation += 1


class MwaitHandshake(Machine):
    """Sleepers and wakers."""

    columns: ClassVar[tuple[str, ...]] = ("kind", "t_ns", "cpu", "tgt", "val")

    def __init__(self, policy: BroadcastPolicy, config: Config, sink: Sink) -> None:
        super().__init__(sink)
        self.handshake: str = config["mwait"] or policy.mwait
        if self.handshake not in HANDSHAKES:
            raise UsageError(f"mwait must be one of {', '.join(HANDSHAKES)}, not {self.handshake!r}")
        self.step_ns = config.integer("step_ns")
        self.sleepers: dict[int, Sleeper] = {}
        self.sampled: dict[tuple[int, int], bool] = {}  # (waker, sleeper): the flag as the waker saw it
        self.wake_ipis = 0
        self.unobserved_stores = 0

    def load(self, init: Mapping[str, Any]) -> None:
        """`init.mwait[cpu]` = {flag, armed, trig, sleep, soft, lost, dl, ep}."""
        for cpu, given in init.get("mwait", {}).items():
            s = self.sleeper(int(cpu))
            s.flag, s.armed, s.triggered = bool(given["flag"]), bool(given["armed"]), bool(given["trig"])
            s.asleep = s.idle = bool(given["sleep"])
            s.softirq, s.deadline = bool(given["soft"]), given["dl"]

    def sleeper(self, cpu: int) -> Sleeper:
        """The CPU's state; busy until it is said to enter idle."""
        return self.sleepers.setdefault(cpu, Sleeper())

    def consume(self, rows: Iterable[tuple[int, ...]]) -> None:
        for kind, t, cpu, tgt, val in rows:
            self.advance(t)
            if kind == ENTER:
                self.enter(cpu, val)
            elif kind == BREAK:
                self.sleeper(cpu).leave()
            elif kind == SAMPLE:
                self.sampled[cpu, tgt] = self.sleeper(tgt).flag
            elif kind == STORE:
                self.store(cpu, tgt)

    def enter(self, cpu: int, deadline: int) -> None:
        """Idle entry: the four steps follow, `step_ns` apart."""
        s = self.sleeper(cpu)
        if s.idle:
            return
        s.idle = True
        s.deadline = deadline if deadline > 0 else INF
        for position, step in enumerate(HANDSHAKES[self.handshake]):
            self.agenda.at(self.now + (position + 1) * self.step_ns, SOFTWARE, step, cpu, c=s.generation)

    def fire(self, action: int, a: int, b: int, c: int) -> None:
        s = self.sleepers[a]
        if s.generation != c:
            return
        if action == ARM:
            s.armed = True
        elif action == ADVERTISE:
            s.flag = True
        elif action == CHECK:
            self.check(s)
        elif action == SLEEP:
            self.sleep(a, s)

    def check(self, s: Sleeper) -> None:
        """Before MWAIT: the historic code looks at the deadline only, the proposed one at the softirq mask too."""
        if s.deadline <= self.now or (self.handshake == "cmpxchg" and s.softirq):
            s.leave()

    def sleep(self, cpu: int, s: Sleeper) -> None:
        """MWAIT returns at once on a pending interrupt or a write to the armed line; otherwise the CPU sleeps."""
        if s.ipi or s.triggered:
            s.leave()
            return
        s.asleep = True
        if s.lost_at != NONE:
            self.unobserved_stores += 1
            self.sink.report(
                codes.LOST_WAKEUP, self.now, cpu=cpu, val=s.lost_at, t_first=s.lost_at,
                expected="wake word armed or looked at after the store", observed="asleep, the store unseen",
                evidence=(Evidence(s.lost_at, None, "store, no IPI"), Evidence(self.now, None, f"cpu {cpu} MWAIT")),
            )  # fmt: skip

    def store(self, waker: int, cpu: int) -> None:
        """The waker's write."""
        s = self.sleeper(cpu)
        if self.handshake == "separate-flag":
            if self.sampled.get((waker, cpu), s.flag):
                if not s.flag:
                    self.sink.report(
                        codes.IPI_ELIDED_UNSAFE, self.now, cpu=cpu, tgt=waker,
                        expected="an IPI, or the flag set at the store", observed="no IPI, flag clear at the store",
                    )  # fmt: skip
                self.write_wake_word(s)
            else:
                self.send_ipi(s)
            return
        # One compare-exchange sets the softirq and learns the flag.
        s.softirq = True
        if self.handshake == "cmpxchg" and s.flag:
            self.write_wake_word(s)
        else:
            self.send_ipi(s)

    def write_wake_word(self, s: Sleeper) -> None:
        """No IPI: seen only if MONITOR is armed, or (cmpxchg) if the softirq mask is looked at before MWAIT."""
        if s.asleep:
            s.leave()
        elif s.armed:
            s.triggered = True
        elif self.handshake == "separate-flag" and s.idle:
            s.lost_at = self.now

    def send_ipi(self, s: Sleeper) -> None:
        """An interrupt always ends MWAIT."""
        self.wake_ipis += 1
        if s.asleep:
            s.leave()
        elif s.idle:
            s.ipi = True

    def metrics(self) -> dict[str, int]:
        return {"wake_ipis": self.wake_ipis, "unobserved_stores": self.unobserved_stores}
