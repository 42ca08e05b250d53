"""Rules of the virtual GIC (spec S3.5): predicates over its state, called where state changes.

One monitor serves predicted and recorded state. In recorded state a flag can be UNKNOWN and a place NOWHERE_KNOWN;
every predicate compares with the value it needs, so the unknown never satisfies it (U3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replay.agenda import SOFTWARE
from replay.declare import Code, Config
from replay.events import NIL, NONE
from replay.hardware.gic_list_registers import INVALID, NO_LR
from replay.sink import Evidence
from replay.systems.vgic.codes import (
    AFFINITY_MISMATCH,
    DELIVERED_OLD_TARGET,
    DUPLICATE_LR,
    HW_PENDING_ACTIVE,
    LOST_IRQ,
    LR_FOREIGN_ACCESS,
    LR_STALE,
    MAINT_UNNEEDED,
    MIGRATING_STUCK,
    MIGRATION_REFUSED,
    PHYS_ACTIVE_LEAK,
    QUEUED_STRANDED,
    TWO_LISTS,
)
from replay.systems.vgic.state import Irq, Vcpu

if TYPE_CHECKING:
    from replay.systems.vgic.base import VgicBase

__all__ = ["LEAK", "MISMATCH", "STUCK", "Monitor"]

# Time-outs in the agenda: a = irq, c = its generation
LEAK = 4
STUCK = 5
MISMATCH = 6


class Monitor:
    """Raises divergences and counts what the metrics need. Times in ns."""

    def __init__(self, machine: VgicBase, config: Config) -> None:
        self.machine: VgicBase = machine
        self.strand_ns: int = config.integer("strand_ns")
        self.migrating_ns: int = config.integer("migrating_ns")
        self.leak_ns: int = config.integer("leak_ns")
        self.lost_ns: int = config.integer("lost_ns")
        self.stale_ns: int = config.integer("stale_ns")
        self.slice_ns: int = config.integer("slice_ns")
        self.support: dict[str, bool] = {}
        self.on_two_lists: set[int] = set()  # irqs
        # metrics
        self.edges: int = 0
        self.arrivals: int = 0
        self.coalesced: int = 0
        self.guest_acks: int = 0
        self.delivery_sum_ns: int = 0
        self.delivery_n: int = 0
        self.max_delivery_ns: int = 0
        self.max_delivery_after_migration_ns: int = 0
        self.queued_ns: int = 0
        self.lazy_lr_ns: int = 0
        self.itargets_writes: int = 0
        self.migrations: int = 0
        self.migrations_double: int = 0
        self.migrations_reraised: int = 0
        self.migrations_quiet: int = 0
        self.migrations_refused: int = 0
        self.lock_drops: int = 0

    def report(
        self,
        code: Code,
        q: Irq,
        vcpu: int,
        *,
        val: int = NIL,
        cpu: int = NONE,
        since: int = NIL,
        expected: str = "",
        observed: str = "",
        severity: str = "",
        cause: str = "",
        evidence: tuple[Evidence, ...] = (),
    ) -> None:
        """One finding about an interrupt; `vcpu` is an index. A rule that the recording cannot support is silent."""
        m = self.machine
        if not m.sink.closed and not self.supported(code):
            return
        m.sink.report(
            code, m.now, cpu=cpu, dom=q.dom, vcpu=self.number(vcpu), obj=q.obj, val=val, t_first=since,
            expected=expected, observed=observed, severity=severity, cause=cause, seq=m.seq, evidence=evidence,
        )  # fmt: skip

    def supported(self, code: Code) -> bool:
        """Whether the recording shows every kind of event that the rule needs."""
        known = self.support.get(code.name)
        if known is None:
            known = all(any(self.machine.sees(kind) for kind in need.split("|")) for need in code.needs)
            self.support[code.name] = known
        return known

    def number(self, vcpu: int) -> int:
        """The guest's number of a vcpu."""
        return self.machine.vcpus[vcpu].number if vcpu >= 0 else NONE

    # -- delivery ----------------------------------------------------------------------------------------

    def arrived(self, q: Irq) -> None:
        """The distributor handed the interrupt over."""
        self.arrivals += 1
        q.waiting_since = self.machine.now

    def acked(self, q: Irq, v: int, loaded: int, loaded_seq: int) -> None:
        """vgic-delivered-old-target: `v` took it from a list register loaded strictly after the last write."""
        now = self.machine.now
        self.guest_acks += 1
        q.waiting_since = NIL
        if q.raised_at != NIL:
            delay = now - q.raised_at
            self.delivery_n += 1
            self.delivery_sum_ns += delay
            self.max_delivery_ns = max(self.max_delivery_ns, delay)
            if q.moved:
                self.max_delivery_after_migration_ns = max(self.max_delivery_after_migration_ns, delay)
            q.raised_at = NIL
        q.moved = False
        if q.target >= 0 and v != q.target and q.wrote != NIL and loaded != NIL and loaded > q.wrote:
            target = self.number(q.target)
            self.report(
                DELIVERED_OLD_TARGET,
                q,
                v,
                val=target,
                since=q.wrote,
                expected=f"delivered on vcpu {target}",
                observed=f"acknowledged on vcpu {self.number(v)}",
                cause=LR_FOREIGN_ACCESS.name if q.foreign else "",
                evidence=(
                    Evidence(q.wrote, _seq(q.wrote_seq), f"ITARGETSR of {q.obj} set to vcpu {target}"),
                    Evidence(loaded, _seq(loaded_seq), f"list register of vcpu {self.number(v)} loaded"),
                    Evidence(now, _seq(self.machine.seq), "guest acknowledged it there"),
                ),
            )

    def loaded(self, q: Irq, vcpu: Vcpu) -> None:
        """G2 happened: the end of a stranding; vgic-duplicate-lr."""
        self.strand(q, vcpu.id, known=True)
        for other in self.machine.vcpus:
            for lr, owner in enumerate(other.owner):
                if owner is q and (other is not vcpu or lr != q.lr) and other.lrs.state(lr) != INVALID:
                    self.report(
                        DUPLICATE_LR,
                        q,
                        vcpu.id,
                        val=other.number,
                        since=other.loaded[lr],
                        expected="valid in one list register",
                        observed=f"valid in LR{q.lr} of vcpu {vcpu.number} and LR{lr} of vcpu {other.number}",
                    )

    def cleared(self, q: Irq, vcpu: Vcpu, lr: int) -> None:
        """The hypervisor found a list register invalid: vgic-lr-stale says for how long."""
        since = vcpu.invalid_since[lr]
        if since != NIL:
            self.lazy_lr_ns += self.machine.now - since
            stale = self.machine.now - since
            if stale > self.stale_ns:
                self.report(
                    LR_STALE, q, vcpu.id, val=stale, since=since, expected=f"cleared within {self.stale_ns} ns",
                    observed=f"LR{lr} invalid for {stale} ns before the hypervisor looked",
                )  # fmt: skip

    # -- no way forward ----------------------------------------------------------------------------------

    def no_way_forward(self, q: Irq) -> bool:
        """QUEUED, enabled, not in lr_pending, list register invalid or none, nobody kicked its vcpu."""
        if q.queued != 1 or q.enabled != 1:
            return False
        if q.lr == NO_LR:
            return q.lr_pending_on == NO_LR
        if q.lr < 0 or q.inflight_on < 0:
            return False
        holder = self.machine.vcpus[q.inflight_on]
        return holder.owner[q.lr] is q and holder.lrs.state(q.lr) == INVALID and holder.kicks == 0

    def check(self, q: Irq) -> None:
        """A transition of `q` is complete: its lists, and the clocks of stranded and leak."""
        now = self.machine.now
        self.check_lists(q)
        if self.no_way_forward(q):
            if q.stranded_since == NIL:
                q.stranded_since = now
        elif q.stranded_since != NIL and now - q.stranded_since <= self.strand_ns:
            q.stranded_since = NIL  # not for long enough; otherwise `strand` tells of it
        leak = q.p_active == 1 and q.lr == NO_LR and q.queued == 0
        if not leak:
            q.leak_since = NIL
        elif q.leak_since == NIL:
            q.leak_since = now
            q.gen += 1
            self.machine.agenda.at(now + self.leak_ns, SOFTWARE, LEAK, q.id, 0, q.gen)

    def strand(self, q: Irq, v: int, *, known: bool) -> None:
        """vgic-queued-stranded: evaluated when `q` is loaded on `v`, or at the end."""
        since = q.stranded_since
        if since == NIL:
            return
        now = self.machine.now
        q.stranded_since = NIL
        if now - since <= self.strand_ns:
            return
        paused = v >= 0 and self.machine.vcpus[v].running_on < 0
        self.report(
            QUEUED_STRANDED,
            q,
            v,
            val=now - since,
            since=since,
            severity="warn" if paused else "",
            expected="in lr_pending, or its old vcpu kicked",
            observed=f"QUEUED on vcpu {self.number(v)}, "
            + (f"loaded {now - since} ns later" if known else "never loaded"),
            cause=LR_FOREIGN_ACCESS.name if q.foreign else "",
            evidence=(
                Evidence(since, None, f"{q.obj} became QUEUED with an invalid list register and no kick"),
                Evidence(now, _seq(self.machine.seq), "the old vcpu entered the hypervisor" if known else "end"),
            ),
        )

    # -- ownership ---------------------------------------------------------------------------------------

    def foreign_access(self, q: Irq, executing: int, owner: int, cpu: int) -> None:
        """vgic-lr-foreign-access."""
        q.foreign = True
        self.report(
            LR_FOREIGN_ACCESS,
            q,
            executing,
            cpu=cpu,
            val=self.number(owner),
            expected=f"LR{q.lr} of vcpu {self.number(owner)}",
            observed=f"LR{q.lr} of vcpu {self.number(executing)}",
        )

    def check_lists(self, q: Irq) -> None:
        """vgic-two-lists, once for as long as it lasts. No recording shows lr_pending, so only predictions have it."""
        if q.inflight_on < 0 or q.lr_pending_on < 0 or q.inflight_on == q.lr_pending_on:
            self.on_two_lists.discard(q.id)
        elif q.id not in self.on_two_lists:
            self.on_two_lists.add(q.id)
            other = self.number(q.lr_pending_on)
            self.report(
                TWO_LISTS,
                q,
                q.inflight_on,
                val=other,
                expected="one vcpu's lists",
                observed=f"inflight of vcpu {self.number(q.inflight_on)}, lr_pending of vcpu {other}",
            )

    def hw_pending_active(self, q: Irq, v: int) -> None:
        """vgic-hw-pending-active."""
        self.report(HW_PENDING_ACTIVE, q, v, expected="QUEUED only after the EOI", observed="active and QUEUED, HW=1")

    def unneeded(self, cpu: int, v: int) -> None:
        """vgic-maint-unneeded."""
        m = self.machine
        m.sink.report(MAINT_UNNEEDED, m.now, cpu=cpu, vcpu=self.number(v), val=0, seq=m.seq, observed="MISR 0")

    # -- migration ---------------------------------------------------------------------------------------

    def refused(self, q: Irq, writer: int, new: int) -> None:
        """vgic-migration-refused."""
        self.migrations_refused += 1
        self.report(
            MIGRATION_REFUSED,
            q,
            writer,
            val=self.number(new),
            since=q.migrating_since,
            expected=f"target vcpu {self.number(new)}",
            observed=f"target stays vcpu {self.number(q.target)}",
        )

    def migration_began(self, q: Irq) -> None:
        """MIGRATING 0 to 1. Recordings get the time-out of vgic-migrating-stuck; closed runs look at the end."""
        self.migrations += 1
        if not self.machine.sink.closed:
            self.machine.agenda.at(self.machine.now + self.migrating_ns, SOFTWARE, STUCK, q.id, 0, self.migrations)

    def migration_ended(self, q: Irq) -> None:
        """MIGRATING 1 to 0."""
        q.moved = True
        if q.disturbed or q.queued == 1:
            self.migrations_reraised += 1
        else:
            self.migrations_quiet += 1

    def stuck(self, q: Irq) -> None:
        """vgic-migrating-stuck; silent while the old vcpu is paused."""
        old = q.migrate_from
        if old >= 0 and self.machine.vcpus[old].running_on < 0:
            return
        self.report(
            MIGRATING_STUCK,
            q,
            old,
            val=self.machine.now - q.migrating_since,
            since=q.migrating_since,
            expected="the old vcpu clears its list register",
            observed=f"MIGRATING for {self.machine.now - q.migrating_since} ns",
        )

    # -- time-outs and the end ---------------------------------------------------------------------------

    def time_out(self, action: int, q: Irq, gen: int) -> None:
        """An entry of the agenda that the monitor made is due."""
        now = self.machine.now
        if action == LEAK:
            if q.leak_since != NIL and q.gen == gen:
                self.report(
                    PHYS_ACTIVE_LEAK,
                    q,
                    NONE,
                    val=now - q.leak_since,
                    since=q.leak_since,
                    expected="deactivated with the virtual EOI",
                    observed="physically active, in no list register, not QUEUED",
                )
        elif action == STUCK:
            if q.migrating == 1 and now - q.migrating_since >= self.migrating_ns:
                self.stuck(q)
        elif action == MISMATCH and q.mismatch_since != NIL and now - q.mismatch_since >= self.slice_ns:
            self.report(
                AFFINITY_MISMATCH, q, q.target, cpu=q.p_affinity, since=q.mismatch_since,
                expected="routed to the CPU of the target vCPU",
                observed=f"routed to CPU {q.p_affinity} for {now - q.mismatch_since} ns",
            )  # fmt: skip

    def concluded(self, q: Irq) -> None:
        """What is only known at the end: stranded, stuck (closed runs), lost."""
        now = self.machine.now
        self.strand(q, q.inflight_on if q.inflight_on >= 0 else NONE, known=False)
        if self.machine.sink.closed and q.migrating == 1 and now - q.migrating_since > self.migrating_ns:
            self.stuck(q)
        if q.waiting_since != NIL and q.enabled == 1 and now - q.waiting_since > self.lost_ns:
            self.report(
                LOST_IRQ,
                q,
                q.target,
                val=q.waiting_since,
                since=q.waiting_since,
                expected="acknowledged by the guest",
                observed="not acknowledged by the end",
                cause=LR_FOREIGN_ACCESS.name if q.foreign else "",
            )

    def metrics(self) -> dict[str, int]:
        """Numbers of S3.6 that both modes know; times in ns."""
        return {
            "phys_edges": self.edges,
            "arrivals": self.arrivals,
            "coalesced": self.coalesced,
            "guest_acks": self.guest_acks,
            "max_delivery_ns": self.max_delivery_ns,
            "mean_delivery_ns": self.delivery_sum_ns // self.delivery_n if self.delivery_n else 0,
            "max_delivery_after_migration_ns": self.max_delivery_after_migration_ns,
            "queued_ns": self.queued_ns,
            "lazy_lr_ns": self.lazy_lr_ns,
            "itargets_writes": self.itargets_writes,
            "migrations": self.migrations,
            "migrations_quiet": self.migrations_quiet,
            "migrations_reraised": self.migrations_reraised,
            "migrations_double": self.migrations_double,
            "migrations_refused": self.migrations_refused,
            "lock_drops": self.lock_drops,
        }


def _seq(seq: int) -> int | None:
    return None if seq < 0 else seq
