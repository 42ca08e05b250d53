"""The platform interrupt of HVM guests in stock xentrace (spec M.1, S2): injections, EOIs, VM entries.

Xen records which vector it injects, not why. That one of them is the callback's is known from the guest's own recording
(a handler named xen-platform-pci), or from the user (`--set callback.vector=…`); it is never guessed. The guest's
recording, put on the same clock, adds where its handler began and ended, and each time that it cleared
evtchn_upcall_pending.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import polars as pl
import pyarrow as pa

from replay.binding.base import KIND, Assembler, Context, Records, event, slices
from replay.coverage import Observation

__all__ = ["Survey", "of_guest", "of_machine", "survey"]

#: Name of the platform interrupt's handler in Linux (drivers/xen/platform-pci.c).
PLATFORM: Final = "xen-platform-pci"
#: Functions whose call follows the clearing of evtchn_upcall_pending, once for each turn of the upcall's loop.
LOOPS: Final = ("evtchn_2l_handle_events", "evtchn_fifo_handle_events", "xen_evtchn_handle_events")

#: A handler this long (ns) after an injection is not its own.
LATEST_HANDLER_NS: Final = 50_000_000

_ENTRY: Final = "irq_handler_entry"
_EXIT: Final = "irq_handler_exit"
_VMENTRY: Final = "TRC_HVM_VMENTRY"
_KEEP: Final = ("seq", "t_ns", "t_err_ns", "cpu", "offset")


@dataclass(slots=True)
class Survey:
    """What the whole recording says. `dom`, `irq`, `vector`, `loop`: of the guest whose recording is there."""

    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    guest: Records | None = None
    dom: int = -1
    irq: int = -1
    vector: int | None = None
    loops: tuple[str, ...] = ()


def survey(records: Records, context: Context, usable: bool) -> Survey:
    """What shows the callback; `usable` says whether the virtual LAPICs can be followed."""
    result = Survey()
    if not usable:
        return result
    result.observed = {
        "via.inject": Observation(100, "TRC_HVM_INJ_VIRQ"),
        "via.eoi": Observation(100, "x2APIC EOI (MSR 0x80b), MMIO 0xfee000b0 or TRC_HVM_VLAPIC; vector not recorded"),
    }
    if _VMENTRY in records.tables():
        result.observed["via.vmentry"] = Observation(100, _VMENTRY)
    why = "every Xen since hvm_maybe_deassert_evtchn_irq (10e3974b14, 2008)"
    result.facts["callback_recorded"] = {"policy": "applied", "why": why}
    for guest in context.options.get("guests", ()):
        _ask_guest(result, guest)
        if result.guest is not None:
            break
    if result.vector is None:
        result.facts["callback"] = (
            "nothing says which vector is the platform interrupt: ingest the guest's own recording too, "
            "or give --set callback.vector=…"
        )
    return result


def _ask_guest(result: Survey, guest: Mapping[str, Any]) -> None:
    """What a guest's recording says of its platform interrupt."""
    own: Records = guest["records"]
    if guest["dom"] is None or _ENTRY not in own.tables():
        return
    names = own.scan(_ENTRY).select("irq", pl.col("name").cast(pl.String)).unique().collect().sort("irq", "name")
    mine = names.filter(pl.col("name").str.contains(PLATFORM, literal=True))["irq"].to_list()
    if len(mine) != 1:
        return
    result.guest, result.dom, result.irq, result.vector = own, int(guest["dom"]), int(mine[0]), guest["vector"]
    who = f"{guest['label']}: "
    result.observed["via.isr_begin"] = Observation(100, f"{who}{_ENTRY} of {PLATFORM}")
    if _EXIT in own.tables():
        result.observed["via.isr_end"] = Observation(100, f"{who}{_EXIT} of {PLATFORM}")
        result.observed["via.upcall_set"] = Observation(
            50, "where the handler found work the flag was set when the callback was injected, at the latest"
        )
    result.loops = tuple(t for t in sorted(own.tables()) if _is_loop(own, t))
    if result.loops:
        result.observed["via.upcall_clear"] = Observation(
            80, f"{who}{', '.join(result.loops)}: called after each clearing; what the first one found is not recorded"
        )
    # GSIs above the ISA ones are Linux interrupt numbers in an HVM guest without remapping.
    config: dict[str, Any] = {"gsi": result.irq}
    if result.vector is not None:
        config["vector"] = result.vector
    sharing = names.filter((pl.col("irq") == result.irq) & ~pl.col("name").str.contains(PLATFORM, literal=True))
    if sharing.height:
        config["gsi_shared"] = 1
    else:
        # Every handler of a shared line is called and recorded; a device without a handler would be "nobody cared".
        config["gsi_shared"] = 0
        result.observed["via.gsi_assert"] = Observation(50, f"{who}{PLATFORM} is the only handler of irq {result.irq}")
    result.facts["callback_config"] = config


def _is_loop(own: Records, table: str) -> bool:
    """Whether a table is a probe at the entry of a function of LOOPS, by its symbol or else by its name."""
    if table in LOOPS:
        return True
    if "__probe_ip_sym" not in own.scan(table).collect_schema().names():
        return False
    first = own.scan(table).select(pl.col("__probe_ip_sym").cast(pl.String)).head(1).collect()
    symbol = str(first.item()) if first.height else ""
    name, _, place = symbol.partition("+")
    return name in LOOPS and place.startswith("0x0/")


def of_machine(found: Survey, lapics: Iterable[pl.DataFrame], entries: pl.DataFrame | None) -> Iterator[pl.DataFrame]:
    """What the virtual LAPICs did, as the callback sees it: of its own guest only when that is known.

    `lapics` are the canonical events of `xentrace_hvm`, from which the 8259's injections are missing already.
    """
    def mine(frame: pl.DataFrame) -> pl.DataFrame:
        return frame if found.guest is None else frame.filter(pl.col("dom") == found.dom)

    by_kind: dict[str, list[pl.DataFrame]] = {}
    for frame in lapics:  # each of one kind
        if frame.height:
            by_kind.setdefault(frame.item(0, "kind"), []).append(frame)
    for kind, own in (("lapic.deliver", "via.inject"), ("lapic.eoi", "via.eoi")):
        for frame in by_kind.get(kind, ()):
            same = mine(frame)
            if same.height and own in found.observed:
                yield same.with_columns(kind=pl.lit(own, KIND), rank=pl.col("rank") + pl.lit(1, pl.Int8))
    if entries is not None and entries.height and found.observed:
        yield event(mine(entries), "via.vmentry", _VMENTRY, dom="dom", vcpu="vcpu", rank=2)


def of_guest(found: Survey, injections: pl.DataFrame, label: str, rows: int) -> Iterator[pa.Table]:
    """The handler and its clearing of the flag, from the guest's recording `label`; `cpu` there is the vCPU.

    `injections` (t_ns, vcpu) of the callback's vector. That evtchn_upcall_pending was set is recorded by nobody; where
    the handler found work it was set when the callback was injected, at the latest.
    """
    own = found.guest
    if own is None:
        return
    assembler = Assembler(label)
    names = own.tables()
    injections = injections.select(pl.col("t_ns"), cpu=pl.col("vcpu").cast(pl.UInt16), at=pl.col("t_ns")).sort("t_ns")
    for lo, hi in slices(rows):
        window = pl.col("seq").is_between(lo, hi, closed="left")
        entries = own.scan(_ENTRY).filter(window).select(*_KEEP, "irq").collect()
        exits = own.scan(_EXIT).filter(window).select(*_KEEP, "irq").collect() if _EXIT in names else entries.clear()
        frames = list(_handlers(found, entries, exits, injections))
        for table in found.loops:
            turns = own.scan(table).filter(window).select(*_KEEP).collect()
            frames.append(_turns(found, table, turns, entries))
        last = max((int(f["t_ns"][-1]) for f in frames if f.height), default=None)
        if last is not None:
            table_ = assembler.push([f.sort("t_ns", maintain_order=True) for f in frames], last)
            if table_ is not None:
                yield table_
    rest = assembler.push([], None)
    if rest is not None:
        yield rest


def _handlers(
    found: Survey, entries: pl.DataFrame, exits: pl.DataFrame, injections: pl.DataFrame
) -> Iterator[pl.DataFrame]:
    """Begin and end of the platform interrupt's handler, and the flag that must have been set before."""
    who = {"dom": found.dom, "vcpu": pl.col("cpu"), "cpu": None}
    mine = entries.filter(pl.col("irq") == found.irq).sort("seq")
    ends = exits.filter(pl.col("irq") == found.irq).sort("seq")
    frames: dict[str, pl.DataFrame] = {}
    yield event(mine, "via.isr_begin", _ENTRY, **who, obj=found.vector)
    # The handlers of event channels run inside the platform interrupt's own.
    inside = entries.filter(pl.col("irq") != found.irq).sort("seq")
    inside = inside.with_columns(n=pl.int_range(1, pl.len() + 1).over("cpu"))
    count = inside.select("seq", "cpu", "n").sort("seq")
    for name, frame in (("before", mine), ("until", ends)):
        seen = frame.join_asof(count, on="seq", by="cpu", strategy="backward", check_sortedness=False)
        frames[name] = seen.with_columns(pl.col("n").fill_null(0))
    begins = frames["before"].select("seq", "cpu", before=pl.col("n"))
    ended = frames["until"].join_asof(begins, on="seq", by="cpu", strategy="backward", check_sortedness=False)
    yield event(ended, "via.isr_end", _EXIT, **who, obj=found.vector, val=(pl.col("n") - pl.col("before")).clip(0))
    nested = entries.filter(pl.col("irq") != found.irq).select("seq", "cpu", work=pl.col("seq")).sort("seq")
    worked = (
        _next_on_cpu(_next_on_cpu(mine, ends.select("seq", "cpu", end=pl.col("seq"))), nested)
        .filter(pl.col("work") < pl.col("end"))
        .sort("t_ns")
        .join_asof(injections, on="t_ns", by="cpu", strategy="backward", check_sortedness=False)
        .filter((pl.col("t_ns") - pl.col("at")) < LATEST_HANDLER_NS)
        .unique("at", keep="first", maintain_order=True)
    )
    yield event(
        worked, "via.upcall_set", "set when injected",
        dom=found.dom, vcpu=pl.col("cpu"), cpu=None, t_ns=pl.col("at") - 1, conf=50, rank=-1,
    )  # fmt: skip


def _next_on_cpu(frame: pl.DataFrame, other: pl.DataFrame) -> pl.DataFrame:
    """Each row with the next one of `other` on its CPU."""
    return frame.join_asof(other, on="seq", by="cpu", strategy="forward", check_sortedness=False)


def _turns(found: Survey, table: str, turns: pl.DataFrame, entries: pl.DataFrame) -> pl.DataFrame:
    """Each turn of the upcall's loop clears the flag; only the first one does so without having looked."""
    mine = entries.filter(pl.col("irq") == found.irq).select("seq", "cpu", handler=pl.col("seq")).sort("seq")
    turns = turns.sort("seq").join_asof(mine, on="seq", by="cpu", strategy="backward", check_sortedness=False)
    again = pl.col("handler").is_not_null() & (pl.col("seq") != pl.col("seq").min().over("cpu", "handler"))
    return event(
        turns, "via.upcall_clear", table,
        dom=found.dom, vcpu=pl.col("cpu"), cpu=None, val=pl.when(again).then(1), conf=80,
    )  # fmt: skip
