"""A debug build of Xen with more trace points (docs/instrumented-xen.md) to canonical events (spec M.3).

What these records show replaces what stock records only let one infer: the kinds of a recorded group are taken from
here alone. The set-up record says which groups were compiled in and traced, so that "no such record" means "it did not
happen". What a guest does in shared memory no hypervisor sees: without the guest's own marks the rules that read those
bits stay blind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl

from parsers.xentrace.events_instrumented import GROUPS, NEVER_NS, POINTS, SETUP, VERSION
from replay.binding.base import Context, Forward, Records, event
from replay.coverage import Observation

__all__ = ["ALGORITHMS", "BLIND_WITHOUT_GUEST", "RULES", "Binder", "Rule", "Survey", "kinds_of", "survey"]

_KEEP: Final = ("seq", "t_ns", "t_err_ns", "cpu", "offset")
_DOM: Final[Mapping[str, Any]] = {"dom": pl.col("dom"), "cpu": None}
_WHO: Final[Mapping[str, Any]] = {"dom": pl.col("dom"), "vcpu": pl.col("vcpu"), "cpu": None}
_CHANNEL: Final[Mapping[str, Any]] = {"obj": pl.col("channel")}
_PORT: Final[Mapping[str, Any]] = {**_WHO, "obj": pl.col("port")}
_VECTOR: Final[Mapping[str, Any]] = {**_WHO, "obj": pl.col("vector")}
_VIRQ: Final[Mapping[str, Any]] = {**_WHO, "obj": pl.col("virq")}

#: Policies by number in the set-up record.
ALGORITHMS: Final[Mapping[str, tuple[str, ...]]] = {
    "hpet": ("", "current", "proposed", "proposed-keep", "upstream-2025"),
    "vgic": ("", "naive", "patch-v8", "merged", "merged-2017", "maintenance"),
}
#: What `late_ns` says when the comparator was rewritten after it had matched.
_REWRITTEN: Final = 0xFFFFFFFF
#: `obj` of evtchn.snapshot that are vCPU words; the others are the domain's.
_VCPU_WORDS: Final = (2, 3, 4)
_NOTIFIED: Final = 6

#: Rules of event channels that read bits which only the guest changes.
BLIND_WITHOUT_GUEST: Final = (
    "evtchn-stranded-pending", "evtchn-selector-wrong-vcpu", "evtchn-upcall-no-work", "evtchn-piggyback-delivery",
    "evtchn-selector-without-upcall", "evtchn-upcall-without-selector", "evtchn-binding-mismatch",
    "evtchn-delivery-delay", "evtchn-masked-pending-long", "evtchn-unmask-hypercall-noop", "fifo-pending-unlinked",
    "fifo-linked-unreachable", "fifo-queue-cycle", "fifo-ready-lost", "fifo-priority-inversion",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rule:
    """One canonical kind made from one record: which rows, which columns, and how sure.

    `without`: not if this group is recorded too. `own`: stock records of this kind are then left out.
    """

    table: str
    kind: str
    columns: Mapping[str, Any]
    when: pl.Expr | None = None
    rank: int = 0
    conf: int = 100
    without: str = ""
    own: bool = True


def _after(column: str) -> pl.Expr:
    """Absolute time from a distance; null for "never"."""
    distance = pl.col(column)
    return pl.when(distance != NEVER_NS).then(pl.col("t_ns") + distance)


def _present(column: str) -> pl.Expr:
    """Null where the record says "none" (negative)."""
    return pl.when(pl.col(column) >= 0).then(pl.col(column))


def _mark(what: int) -> pl.Expr:
    return pl.col("what") == what


_MARK_PORT: Final[Mapping[str, Any]] = {**_WHO, "obj": pl.col("obj")}
_LATE: Final = pl.when(pl.col("late_ns") != _REWRITTEN).then(pl.col("late_ns")).otherwise(0).cast(pl.Int64)
_SET: Final = pl.col("asserted")
_LEVEL: Final = {**_DOM, "obj": pl.col("gsi"), "val": (pl.col("count") > 0).cast(pl.Int64)}

RULES: Final[tuple[Rule, ...]] = (
    # -- hpet ------------------------------------------------------------------------------------------------
    Rule("TRC_HPET_PROGRAM", "hpet.program",
         {**_CHANNEL, "tgt": pl.col("owner"), "val": _after("delta_ns"), "val2": pl.col("reason")}),
    Rule("TRC_HPET_RETARGET", "hpet.retarget",
         {**_CHANNEL, "tgt": _present("new_target"), "val": _present("old_target"), "flags": pl.col("refused")}),
    Rule("TRC_HPET_ENTRY", "hpet.fire", {**_CHANNEL, "t_ns": pl.col("t_ns") - _LATE}, rank=-2),
    Rule("TRC_HPET_ENTRY", "hpet.handler.begin", {**_CHANNEL, "val": _present("irq")}),
    Rule("TRC_HPET_RETURN", "hpet.handler.end", _CHANNEL),
    Rule("TRC_HPET_WAKE", "wake.post", {"tgt": pl.col("target"), "flags": pl.col("how")}),
    Rule("TRC_IDLE_DEADLINE", "idle.enter", {"val": _after("delta_ns"), "val2": pl.col("state")}),
    Rule("TRC_IDLE_WOKEN", "idle.break", {"obj": pl.col("vector"), "tgt": pl.col("reason")},
         ~pl.col("reason").is_in([1, 2]), rank=-1),
    Rule("TRC_IDLE_WOKEN", "idle.exit", {"tgt": pl.col("reason"), "obj": _present("channel")}),
    Rule("TRC_MWAIT_STEP", "idle.prep.advertise", {}, pl.col("step") == 0),
    Rule("TRC_MWAIT_STEP", "idle.prep.arm", {}, pl.col("step") == 1),
    Rule("TRC_MWAIT_STEP", "idle.prep.check", {}, pl.col("step") == 2),
    Rule("TRC_MWAIT_STEP", "idle.prep.sleep", {}, pl.col("step") == 3),
    Rule("TRC_MWAIT_SAMPLE", "wake.sample", {"tgt": pl.col("target"), "val": pl.col("flag").cast(pl.Int64)}),
    Rule("TRC_MWAIT_STORE", "wake.store", {"tgt": pl.col("target"), "val": pl.col("flag").cast(pl.Int64)}),
    # -- callback --------------------------------------------------------------------------------------------
    Rule("TRC_CALLBACK_VIA", "via.set_param", {**_DOM, "obj": pl.col("gsi"), "val": pl.col("via")}),
    Rule("TRC_UPCALL_SET", "via.upcall_set", _WHO, pl.col("vcpu") == 0),
    Rule("TRC_UPCALL_CLEARED", "via.upcall_clear", _WHO, conf=80),
    Rule("TRC_CALLBACK_LINE", "via.line",
         {**_DOM, "obj": pl.col("gsi"), "val": _SET.cast(pl.Int64), "val2": pl.col("count")}),
    Rule("TRC_CALLBACK_LINE", "ioapic.line", _LEVEL, rank=1),
    Rule("TRC_GSI_LINE", "via.gsi_assert", {**_DOM, "obj": pl.col("gsi"), "tgt": pl.col("holder")}, _SET),
    Rule("TRC_GSI_LINE", "via.gsi_deassert", {**_DOM, "obj": pl.col("gsi"), "tgt": pl.col("holder")}, ~_SET),
    Rule("TRC_GSI_LINE", "ioapic.line", _LEVEL, rank=1),
    Rule("TRC_VIOAPIC_RTE", "via.rte_write",
         {**_DOM, "obj": pl.col("gsi"), "tgt": _present("dest_vcpu"), "val": pl.col("rte").reinterpret(signed=True)}),
    Rule("TRC_VIOAPIC_RTE", "ioapic.rte",
         {**_DOM, "obj": pl.col("gsi"), "val": pl.col("rte") & 0xFF, "val2": pl.col("rte").reinterpret(signed=True)},
         rank=1),
    # A level pin sends only while Remote IRR is clear, and that sets it.
    Rule("TRC_VIOAPIC_SEND", "ioapic.remote_irr", {**_DOM, "obj": pl.col("gsi"), "val": 0}, pl.col("level"), rank=-1),
    Rule("TRC_VIOAPIC_SEND", "ioapic.remote_irr", {**_DOM, "obj": pl.col("gsi"), "val": 1}, pl.col("level")),
    Rule("TRC_VIOAPIC_EOI", "ioapic.eoi", {**_DOM, "obj": pl.col("vector"), "tgt": pl.col("gsi")}),
    Rule("TRC_VLAPIC_ACCEPT", "lapic.accept",
         {**_VECTOR, "flags": pl.col("level").cast(pl.UInt32) + pl.when(pl.col("was")).then(2).otherwise(4)}),
    Rule("TRC_VLAPIC_SERVE", "lapic.deliver", _VECTOR),
    Rule("TRC_VLAPIC_SERVE", "via.inject", _VECTOR, rank=1),
    Rule("TRC_VLAPIC_EOI", "lapic.eoi", {**_WHO, "obj": pl.when(pl.col("vector") > 0).then(pl.col("vector"))}),
    Rule("TRC_VLAPIC_EOI", "via.eoi", {**_WHO, "obj": pl.when(pl.col("vector") > 0).then(pl.col("vector"))}, rank=1),
    # Behind a TPR shadow a guest writes without an exit: vlapic_set_tpr sees only the writes that are intercepted.
    Rule("TRC_VLAPIC_TPR", "lapic.tpr", {**_WHO, "val": pl.col("tpr")}, conf=80),
    Rule("TRC_VLAPIC_WINDOW", "lapic.intr_window", {**_VECTOR, "val": pl.col("kind")}),
    # -- event channels --------------------------------------------------------------------------------------
    Rule("TRC_EVTCHN_PENDING", "evtchn.send", {**_DOM, "obj": pl.col("port")}),
    Rule("TRC_EVTCHN_PENDING", "evtchn.notify", _PORT, pl.col("raised"), rank=1),
    Rule("TRC_EVTCHN_PENDING_FIFO", "evtchn.send", {**_DOM, "obj": pl.col("port")}),
    Rule("TRC_EVTCHN_PENDING_FIFO", "fifo.word", {**_DOM, "obj": pl.col("port"), "val": pl.col("word")}, rank=1),
    Rule("TRC_EVTCHN_PENDING_FIFO", "evtchn.notify", _PORT, pl.col("raised"), rank=2),
    Rule("TRC_EVTCHN_UNMASK", "evtchn.unmask_hypercall", _PORT),
    Rule("TRC_EVTCHN_BIND", "evtchn.bind",
         {**_DOM, "obj": pl.col("port"), "tgt": pl.col("vcpu"), "val": pl.col("type"), "flags": pl.col("pending")},
         pl.col("how") == 0),
    Rule("TRC_EVTCHN_BIND", "evtchn.bind_vcpu", {**_DOM, "obj": pl.col("port"), "tgt": pl.col("vcpu")},
         pl.col("how") == 1),
    Rule("TRC_EVTCHN_BIND", "evtchn.close", {**_DOM, "obj": pl.col("port")}, pl.col("how") == 2),
    Rule("TRC_EVTCHN_UPCALL", "evtchn.upcall", _WHO, without="guest"),
    Rule("TRC_EVTCHN_WORD", "evtchn.snapshot",
         {**_DOM, "vcpu": pl.when(pl.col("what").is_in(_VCPU_WORDS)).then(pl.col("vcpu")), "obj": pl.col("what"),
          "tgt": pl.col("index"), "val": pl.when(pl.col("what") == _NOTIFIED).then(pl.col("vcpu").cast(pl.Int64))
          .otherwise(pl.col("value").reinterpret(signed=True))}),
    Rule("TRC_GUEST_MARK", "evtchn.upcall", _WHO, _mark(0)),
    Rule("TRC_GUEST_MARK", "evtchn.upcall_end", _WHO, _mark(1)),
    Rule("TRC_GUEST_MARK", "evtchn.handled", _MARK_PORT, _mark(2)),
    Rule("TRC_GUEST_MARK", "evtchn.clear", _MARK_PORT, _mark(3)),
    Rule("TRC_GUEST_MARK", "evtchn.mask", _MARK_PORT, _mark(4)),
    Rule("TRC_GUEST_MARK", "evtchn.unmask", _MARK_PORT, _mark(5)),
    Rule("TRC_GUEST_MARK", "guest.bind_cpu", {**_DOM, "obj": pl.col("obj"), "tgt": pl.col("vcpu")}, _mark(6)),
    Rule("TRC_GUEST_MARK", "evtchn.upcall_mask", _WHO, _mark(7)),
    Rule("TRC_GUEST_MARK", "evtchn.upcall_unmask", _WHO, _mark(8)),
    Rule("TRC_GUEST_MARK", "vgic.ack", _MARK_PORT, _mark(16)),
    Rule("TRC_GUEST_MARK", "vgic.eoi", _MARK_PORT, _mark(17)),
    # -- vgic ------------------------------------------------------------------------------------------------
    Rule("TRC_VGIC_PHYS", "vgic.phys_irq", {"obj": pl.col("virq")}),
    Rule("TRC_VGIC_INJECT", "vgic.inject", _VIRQ),
    Rule("TRC_VGIC_LR_WRITE", "vgic.lr_write",
         {**_VIRQ, "cpu": pl.col("cpu"), "tgt": pl.col("lr"), "val": pl.col("word").reinterpret(signed=True)}),
    Rule("TRC_VGIC_LR_CLEAR", "vgic.lr_clear", {**_VIRQ, "cpu": pl.col("cpu"), "tgt": pl.col("lr")}),
    Rule("TRC_VGIC_ITARGETS", "vgic.itargets", {**_VIRQ, "tgt": pl.col("new_vcpu")}),
    Rule("TRC_VGIC_SGI", "vgic.sgi", {"tgt": pl.col("target")}),
    Rule("TRC_VGIC_MAINT", "vgic.maint", {"val": pl.col("misr")}),
    Rule("TRC_VGIC_DEACTIVATE", "vgic.deactivate", {"obj": pl.col("virq")}),
    Rule("TRC_VGIC_AFFINITY", "vgic.affinity",
         {"cpu": None, "obj": pl.col("virq"), "tgt": _present("new_target"), "val": _present("old_target")}),
    Rule("TRC_VGIC_ENTRY", "vgic.hyp_entry", {**_WHO, "val": pl.col("reason")}),
    Rule("TRC_VGIC_ENABLE", "vgic.enable", _VIRQ, pl.col("enabled")),
    Rule("TRC_VGIC_ENABLE", "vgic.disable", _VIRQ, ~pl.col("enabled")),
)  # fmt: skip

#: Physical interrupts that are no channel's; the local APIC's rules only where no virtual one is recorded beside them.
IRQ_RULES: Final[tuple[Rule, ...]] = (
    Rule("TRC_IRQ_ENTER", "isr.begin", {"obj": pl.col("vector")}),
    Rule("TRC_IRQ_EOI", "isr.end", {"obj": pl.col("vector")}),
)  # fmt: skip
LAPIC_RULES: Final[tuple[Rule, ...]] = (
    Rule("TRC_IRQ_ENTER", "lapic.deliver", {"obj": pl.col("vector")}),
    Rule("TRC_IRQ_RETURN", "lapic.exit", {"obj": pl.col("vector")}),
    Rule("TRC_IRQ_EOI", "lapic.eoi", {"obj": pl.col("vector")}),
)  # fmt: skip

_GROUP_OF: Final = {point.event.name: point.group for point in POINTS}


def kinds_of(table: str) -> tuple[str, ...]:
    """The canonical kinds that a record can become."""
    return tuple(dict.fromkeys(r.kind for r in (*RULES, *IRQ_RULES, *LAPIC_RULES) if r.table == table))


@dataclass(slots=True)
class Survey:
    """What the whole recording says. `rules` are those that apply, `owned` the kinds that only they make."""

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    owned: frozenset[str] = frozenset()
    channel_irqs: tuple[int, ...] = ()

    def theirs(self, frames: Iterable[pl.DataFrame]) -> Iterator[pl.DataFrame]:
        """Events of stock records, without what is recorded better here."""
        for frame in frames:
            yield frame.filter(~pl.col("kind").is_in(list(self.owned))) if self.owned else frame


def survey(records: Records, context: Context, virtual: bool) -> Survey:
    """Which trace points the hypervisor has; nothing at all for a stock one. `virtual`: stock virtual LAPICs."""
    found = Survey()
    present = frozenset(_GROUP_OF) & records.tables()
    if not present:
        return found
    groups = _groups(records, present, found)
    if "vlapic" in groups or virtual:
        physical: tuple[Rule, ...] = IRQ_RULES
    else:
        physical = (*IRQ_RULES, *LAPIC_RULES)
    rules = [r for r in (*RULES, *physical) if _GROUP_OF[r.table] in groups and r.without not in groups]
    found.rules = tuple(rules)
    found.owned = frozenset(r.kind for r in rules if r.own)
    for rule in rules:
        before = found.observed.get(rule.kind)
        if before is None or before.conf < rule.conf:
            found.observed[rule.kind] = Observation(rule.conf, f"{rule.table} of an instrumented Xen")
    if "hpet" in groups:
        found.channel_irqs = _channel_irqs(records, present)
    _subsystems(groups, present, found)
    return found


def _groups(records: Records, present: frozenset[str], found: Survey) -> frozenset[str]:
    """Groups that are recorded: as the set-up record says, else those of which there are records."""
    seen = frozenset(_GROUP_OF[t] for t in present if t != SETUP)
    if SETUP not in present:
        return seen
    last = records.scan(SETUP).sort("seq").last().collect().row(0, named=True)
    if last["version"] != VERSION:
        found.facts["instrumented"] = (
            f"records of layout version {last['version']}, this tool knows {VERSION}: fields may have moved"
        )
        return seen
    mask = last["event_mask"]
    traced = {
        g.name
        for g in GROUPS
        if last["groups"] >> g.bit & 1 and mask & g.base & 0x0FFF0000 and mask & g.base & 0xF000
    }
    found.facts["instrumented"] = sorted(traced | seen)
    config = {"n_channels": last["channels"], "n_cpus": last["cpus"], "hpet_vector": last["hpet_vector"]}
    if "hpet" in traced:
        found.facts["hpet_config"] = {k: v for k, v in config.items() if v}
    for system, names in ALGORITHMS.items():
        number = last[f"{system}_algorithm"]
        if 0 < number < len(names):
            found.facts[f"{system}_recorded"] = {"policy": names[number], "why": f"{SETUP} says so"}
    return frozenset(traced) | seen


def _channel_irqs(records: Records, present: frozenset[str]) -> tuple[int, ...]:
    """Interrupt numbers of the channels: their handlers are the broadcast's own, not what holds it back."""
    irqs: set[int] = set()
    for table in ("TRC_HPET_ENTRY", "TRC_HPET_RETARGET"):
        if table in present:
            irqs.update(records.scan(table).select(pl.col("irq").unique()).collect()["irq"].to_list())
    return tuple(sorted(i for i in irqs if i >= 0))


def _subsystems(groups: frozenset[str], present: frozenset[str], found: Survey) -> None:
    """Which model of a system these records belong to, and which of its rules they cannot decide."""
    blind: dict[str, str] = {}
    if "mwait" in groups and "hpet" not in groups:
        found.facts["hpet_sub"] = "mwait"
    elif "mwait" in groups:
        reason = "the hand-shake is replayed from a recording without the broadcast's records (group mwait alone)"
        blind |= dict.fromkeys(("mwait-lost-wakeup", "mwait-ipi-elided-unsafe"), reason)
    if "evtchn" in groups:
        if "TRC_EVTCHN_PENDING_FIFO" in present and "TRC_EVTCHN_PENDING" not in present:
            found.facts["evtchn_sub"] = "fifo"
        else:
            why = "hypercalls have a record of their own: an unmask by the guest is a local one, wherever it executes"
            found.facts["evtchn_recorded"] = {"policy": "current", "why": why}
        if "guest" not in groups:
            reason = "the guest changes these bits in shared memory: record the guest's marks too, or its own ftrace"
            blind |= dict.fromkeys(BLIND_WITHOUT_GUEST, reason)
    if blind:
        found.facts["blind"] = blind


class Binder:
    """Makes the events of one slice after the other."""

    def __init__(self, records: Forward, found: Survey) -> None:
        self.records = records
        self.found = found
        self.by_table: dict[str, list[Rule]] = {}
        for rule in found.rules:
            if rule.table in records.tables():
                self.by_table.setdefault(rule.table, []).append(rule)

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi."""
        for table, rules in self.by_table.items():
            frame = self.records.read(table, lo, hi)
            if not frame.height:
                continue
            for rule in rules:
                rows = frame if rule.when is None else frame.filter(rule.when)
                if rule.kind in ("isr.begin", "isr.end"):
                    rows = rows.filter(~pl.col("irq").is_in(list(self.found.channel_irqs)))
                yield event(rows, rule.kind, table, rank=rule.rank, conf=rule.conf, **rule.columns)
