"""Xen event channels as a Linux guest sees them: kprobes on drivers/xen/events (spec M.3).

One event: `xen_evtchn_do_upcall`, `evtchn_2l_handle_events` or `__evtchn_fifo_handle_events` (cpu), the flow handler
(irq, port), the chip's ack with `…_clear_pending` (port), the handler. The two-level timer VIRQ does not go through
`handle_irq_for_port`, so a flow probe that records its port is the better source of what was dispatched.

Nobody records a send. Where probes sample the shared words (pend0, mask0, up0, um0, sel0 …), a pending bit that goes
0 to 1 is one; what came while the bit was set coalesced and does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import polars as pl

from replay.binding.base import event
from replay.binding.linux_probes import KEEP, Source
from replay.binding.linux_words import ABI_WORDS, Words
from replay.coverage import Observation
from replay.hardware.evtchn_two_level import ABI_FIFO
from replay.systems.event_channel.codes import CODES
from replay.systems.irq_flow.state import EOI_PENDING

__all__ = ["DOMID_SELF", "Binder", "Survey", "survey"]

#: The recording guest when nothing says that it is dom0 (Xen public/xen.h DOMID_SELF).
DOMID_SELF: Final = 0x7FF0

#: Probes on the loop that E2/F2 is, entry and return.
SCAN: Final = {
    "2l": ("evtchn_2l_handle_events",),
    "fifo": ("__evtchn_fifo_handle_events", "evtchn_fifo_handle_events"),
}
CLEAR: Final = {"2l": "evtchn_2l_clear_pending", "fifo": "evtchn_fifo_clear_pending"}
MASK: Final = {"2l": "evtchn_2l_mask", "fifo": "evtchn_fifo_mask"}
UNMASK: Final = {"2l": "evtchn_2l_unmask", "fifo": "evtchn_fifo_unmask"}
BIND: Final = ("bind_evtchn_to_cpu", "evtchn_2l_bind_to_cpu", "evtchn_fifo_bind_to_cpu")
FLOWS: Final = ("handle_percpu_irq", "handle_edge_irq", "handle_fasteoi_irq", "handle_level_irq")
#: Chip hooks that clear the pending bit on the way into the handler.
ACKS: Final = ("ack_dynirq", "mask_ack_dynirq", "lateeoi_ack_dynirq", "lateeoi_mask_ack_dynirq")
#: Symbols that carry an irq and its port.
PAIRS: Final = (*FLOWS, *ACKS, "eoi_pirq", "xen_irq_lateeoi_locked")
#: Hooks of the chip for physical interrupts.
PIRQ: Final = ("eoi_pirq", "mask_ack_pirq", "startup_pirq")


@dataclass(slots=True)
class Survey:
    """What the whole recording says before its events are made. `abi` is "2l", "fifo" or "" (no event channels)."""

    abi: str = ""
    dom: int = DOMID_SELF
    observed: dict[str, Observation] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    blind: dict[str, str] = field(default_factory=dict)
    irq_of_port: dict[int, int] = field(default_factory=dict)
    scan: str = ""
    scan_ends: bool = False
    handled: tuple[str, ...] = ()
    fasteoi: frozenset[int] = frozenset()
    words: Words | None = None


def survey(source: Source, trusted_flows: tuple[str, ...]) -> Survey:
    """Which ABI, which probes, and which port belongs to which irq."""
    result = Survey()
    result.abi = next((abi for abi in ("2l", "fifo") if source.probed(*SCAN[abi], CLEAR[abi])), "")
    if not result.abi:
        return result
    if source.probed(*PIRQ):
        result.dom = 0  # physical interrupts: the hardware domain
    result.facts["guest"] = {
        "dom": result.dom, "abi": "two-level" if result.abi == "2l" else "FIFO",
        "doc": "dom 0 by its physical interrupts" if result.dom == 0 else "dom 0x7ff0 (DOMID_SELF): not recorded",
    }  # fmt: skip
    result.scan = next((s for s in SCAN[result.abi] if source.probed(s)), "")
    result.scan_ends = bool(result.scan) and source.probed(result.scan, returns=True)
    with_port = tuple(s for s in FLOWS if s in trusted_flows and source.argument(s, "port"))
    if with_port:
        result.handled = with_port
    elif source.probed("handle_irq_for_port"):
        result.handled = ("handle_irq_for_port",)
    result.irq_of_port = _pairs(source, trusted_flows, CLEAR[result.abi])
    result.fasteoi = _irqs(source, "handle_fasteoi_irq")
    _observe(source, result)
    result.words = Words.find(source, result.abi, result.dom)
    if result.words is not None:
        result.observed.update(result.words.observed())
        result.facts["evtchn_config"] = {"strand_ns": result.words.resolution_ns}
    if result.abi == "fifo":
        result.facts["evtchn_sub"] = "fifo"
        why = "the guest uses the FIFO ABI, which has one way to unmask"
        result.facts["evtchn_recorded"] = {"policy": "any", "why": why}
    else:
        why = "probes on evtchn_2l_* functions, which Linux has since 3.14"
        result.facts["evtchn_recorded"] = {"policy": "modern", "why": why}
    if source.probed("handle_edge_irq"):
        result.facts["irqflow_recorded"] = {"policy": "edge", "why": "event channels go through handle_edge_irq"}
    _not_of_this_abi(result)
    return result


def _not_of_this_abi(result: Survey) -> None:
    """Rules of the other ABI cannot be decided."""
    other, why = ("fifo-", "the guest uses the two-level ABI") if result.abi == "2l" else (
        "evtchn-", "the guest uses the FIFO ABI"
    )  # fmt: skip
    result.blind.update({code.name: why for code in CODES if code.name.startswith(other)})


def _irqs(source: Source, symbol: str) -> frozenset[int]:
    frame = source.probe(symbol, 0, 1 << 62, "irq")
    return frozenset() if frame is None else frozenset(frame["irq"].drop_nulls().unique().to_list())


def _pairs(source: Source, trusted: tuple[str, ...], clear: str) -> dict[int, int]:
    """irq of each port: stated by probes that carry both, handle_irq_for_port and the flow that follows it, a flow and
    the clear of the port's pending bit that follows it. The most frequent pair wins."""
    frames = []
    for symbol in PAIRS:
        if symbol in FLOWS and symbol not in trusted:
            continue
        if source.argument(symbol, "irq") and source.argument(symbol, "port"):
            frame = source.probe(symbol, 0, 1 << 62, "irq", "port")
            if frame is not None:
                frames.append(frame.select("irq", "port"))
    flows = [f for name in trusted if name in FLOWS and (f := source.probe(name, 0, 1 << 62, "irq")) is not None]
    around: tuple[tuple[str, Literal["forward", "backward"]], ...] = (
        ("handle_irq_for_port", "forward"), (clear, "backward"),
    )  # fmt: skip
    for symbol, strategy in around:
        ports = source.probe(symbol, 0, 1 << 62, "port")
        if ports is not None and flows:
            pool = pl.concat(flows).sort("seq").select("seq", "cpu", "irq")
            joined = ports.select("seq", "cpu", "port").join_asof(
                pool, on="seq", by="cpu", strategy=strategy, check_sortedness=False
            )
            frames.append(joined.select("irq", "port"))
    if not frames:
        return {}
    best = (
        pl.concat(frames).drop_nulls().filter(pl.col("port") > 0).group_by("port", "irq").agg(n=pl.len())
        .sort("n", "irq", "port", descending=[True, False, False])
        .unique("port", keep="first", maintain_order=True).unique("irq", keep="first", maintain_order=True)
    )  # fmt: skip
    return {int(port): int(irq) for port, irq, _ in best.sort("port").iter_rows()}


def _observe(source: Source, result: Survey) -> None:
    seen = result.observed
    if result.scan:
        seen["evtchn.upcall"] = Observation(100, f"probe on {result.scan}")
        seen["flow.upcall"] = seen["evtchn.upcall"]
        if result.scan_ends:
            seen["evtchn.upcall_end"] = Observation(100, f"return probe on {result.scan}")
    if result.handled:
        conf = 80 if result.handled == ("handle_irq_for_port",) and result.abi == "2l" else 100
        seen["evtchn.handled"] = Observation(conf, "probes on " + ", ".join(result.handled))
    if source.probed(CLEAR[result.abi]):
        seen["evtchn.clear"] = Observation(100, f"probe on {CLEAR[result.abi]}")
    for kind, table in (("evtchn.mask", MASK), ("evtchn.unmask", UNMASK)):
        if source.probed(table[result.abi]):
            seen[kind] = Observation(100, f"probe on {table[result.abi]}")
            if result.irq_of_port:
                seen[kind.replace("evtchn", "flow")] = Observation(80, f"probe on {table[result.abi]}; reason unknown")
    if _bind(source):
        seen["guest.bind_cpu"] = Observation(100, f"probe on {_bind(source)}")
        if source.probed("set_affinity_irq"):
            seen["evtchn.bind_vcpu"] = Observation(
                50, "set_affinity_irq calls EVTCHNOP_bind_vcpu before it changes the guest's binding"
            )
    if source.probed("set_affinity_irq"):
        seen["flow.set_affinity"] = Observation(80, "probe on set_affinity_irq")
    if source.probed(*ACKS):
        seen["flow.ack"] = Observation(100, "probe on " + ", ".join(s for s in ACKS if source.probed(s)))
    if source.probed("eoi_pirq"):
        seen["flow.eoi"] = Observation(100, "probe on eoi_pirq")
    if source.probed("xen_irq_lateeoi") or source.probed("xen_irq_lateeoi_locked"):
        seen["flow.lateeoi"] = Observation(100, "probe on xen_irq_lateeoi")
    for kind, symbol in (("flow.disable", "disable_dynirq"), ("flow.enable", "enable_dynirq")):
        if source.probed(symbol):
            seen[kind] = Observation(80, f"probe on {symbol}")


def _bind(source: Source) -> str:
    """The one of the nested binding functions that is probed."""
    return next((s for s in BIND if source.probed(s)), "")


class Binder:
    """Makes the events of one slice after the other."""

    def __init__(self, source: Source, found: Survey) -> None:
        self.source = source
        self.found = found
        self.who = {"dom": found.dom, "vcpu": pl.col("cpu")}
        self.last_affinity: pl.DataFrame | None = None

    def events(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Events of the records with lo <= seq < hi."""
        found = self.found
        if not found.abi:
            return
        if lo == 0 and found.abi == "fifo":
            yield self._abi()
        if found.words is not None:
            yield from found.words.events(lo, hi, found.irq_of_port, self._dispatched(lo, hi))
        yield from self._scans(lo, hi)
        yield from self._handled(lo, hi)
        yield from self._masks(lo, hi)
        yield from self._bindings(lo, hi)
        yield from self._chip(lo, hi)

    def _abi(self) -> pl.DataFrame:
        frame = pl.DataFrame(
            {"seq": [0], "t_ns": [0], "t_err_ns": [0], "cpu": [None], "offset": [0]},
            schema={"seq": pl.UInt64, "t_ns": pl.Int64, "t_err_ns": pl.UInt32, "cpu": pl.Int64, "offset": pl.UInt64},
        )
        return event(
            frame, "evtchn.snapshot", "probes of the FIFO ABI", dom=self.found.dom, obj=ABI_WORDS, val=ABI_FIFO, rank=-3
        )

    def _scans(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """E2/F2 begins and ends."""
        name = self.found.scan
        frame = self.source.probe(name, lo, hi) if name else None
        if frame is not None:
            yield event(frame, "evtchn.upcall", name, **self.who)
            yield event(frame, "flow.upcall", name)
        if self.found.scan_ends:
            frame = self.source.probe(name, lo, hi, returns=True)
            if frame is not None:
                yield event(frame, "evtchn.upcall_end", f"{name} returns", **self.who)

    def _hits(self, lo: int, hi: int) -> Iterator[tuple[str, pl.DataFrame]]:
        """Probes at which the scan dispatches, with the port."""
        for symbol in self.found.handled:
            frame = self.source.probe(symbol, lo, hi, "port", "irq")
            if frame is not None:
                port = pl.when(pl.col("port") > 0).then(pl.col("port")).otherwise(self._port())
                yield symbol, frame.with_columns(port=port).filter(pl.col("port").is_not_null())

    def _dispatched(self, lo: int, hi: int) -> pl.DataFrame | None:
        """All dispatches in one frame."""
        frames = [frame.select(*KEEP, "port") for _, frame in self._hits(lo, hi)]
        return pl.concat(frames).sort("seq") if frames else None

    def _handled(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """What the scan dispatched, and the clear of the pending bit that follows it."""
        for symbol, frame in self._hits(lo, hi):
            yield event(frame, "evtchn.handled", symbol, **self.who, obj=pl.col("port"))
        symbol = CLEAR[self.found.abi]
        cleared = self.source.probe(symbol, lo, hi, "port")
        if cleared is not None:
            yield event(cleared, "evtchn.clear", symbol, **self.who, obj=pl.col("port"), rank=1)

    def _irq(self, port: str = "port") -> pl.Expr:
        known = self.found.irq_of_port
        if not known:
            return pl.lit(None, pl.Int64)
        return pl.col(port).replace_strict(list(known), list(known.values()), default=None, return_dtype=pl.Int64)

    def _port(self) -> pl.Expr:
        """Port of `irq`, for irqs below 16, whose port the recipe's offsets do not reach (legacy_info_ptrs)."""
        known = {irq: port for port, irq in self.found.irq_of_port.items()}
        if not known:
            return pl.lit(None, pl.Int64)
        return pl.col("irq").replace_strict(list(known), list(known.values()), default=None, return_dtype=pl.Int64)

    def _masks(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        for table, kind in ((MASK, "mask"), (UNMASK, "unmask")):
            symbol = table[self.found.abi]
            frame = self.source.probe(symbol, lo, hi, "port")
            if frame is None:
                continue
            yield event(frame, f"evtchn.{kind}", symbol, **self.who, obj=pl.col("port"))
            flows = frame.with_columns(irq=self._irq()).filter(pl.col("irq").is_not_null())
            yield event(flows, f"flow.{kind}", symbol, obj=pl.col("irq"), conf=80)

    def _bindings(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """set_affinity_irq, and the binding it leads to."""
        asked = self.source.probe("set_affinity_irq", lo, hi, "irq", "port", "dest")
        symbol = _bind(self.source)
        bound = self.source.probe(symbol, lo, hi, "port", "cpu") if symbol else None
        if bound is not None:
            bound = bound.filter(pl.col("port") > 0).rename({"arg_cpu": "target"})
        yield from self._bound(bound, asked, symbol)
        if asked is not None:
            port = pl.when(pl.col("port") > 0).then(pl.col("port")).otherwise(self._port())
            valid = asked.filter(port.is_not_null())  # others have no event channel: refused
            lowest = pl.when(pl.col("dest") != 0).then(
                pl.col("dest").reinterpret(signed=False).bitwise_trailing_zeros().cast(pl.Int64)
            )
            yield event(
                valid.with_columns(target=lowest).filter(pl.col("target").is_not_null()),
                "flow.set_affinity", "set_affinity_irq", obj=pl.col("irq"), tgt=pl.col("target"), conf=80,
            )  # fmt: skip

    def _bound(
        self, bound: pl.DataFrame | None, asked: pl.DataFrame | None, symbol: str
    ) -> Iterator[pl.DataFrame]:
        """guest.bind_cpu; the hypervisor's binding was changed first where set_affinity_irq is behind it."""
        recent = [f for f in (self.last_affinity, asked) if f is not None]
        pool = pl.concat(recent).sort("seq") if recent else None
        if pool is not None:
            port = pl.when(pl.col("port") > 0).then(pl.col("port")).otherwise(self._port())
            pool = pool.select("seq", "cpu", asked_port=port)
        if asked is not None:
            self.last_affinity = asked.group_by("cpu", maintain_order=True).last().select(asked.columns).sort("seq")
        if bound is None:
            return
        yield event(bound, "guest.bind_cpu", symbol, dom=self.found.dom, vcpu=pl.col("cpu"), obj=pl.col("port"),
                    tgt=pl.col("target"), rank=1)  # fmt: skip
        if pool is None:
            return
        moved = bound.join_asof(pool, on="seq", by="cpu", strategy="backward", check_sortedness=False).filter(
            pl.col("asked_port") == pl.col("port")
        )
        yield event(moved, "evtchn.bind_vcpu", "set_affinity_irq", dom=self.found.dom, vcpu=pl.col("cpu"),
                    obj=pl.col("port"), tgt=pl.col("target"), conf=50)  # fmt: skip

    def _chip(self, lo: int, hi: int) -> Iterator[pl.DataFrame]:
        """Acks, EOIs and late EOIs of the Xen irq chips."""
        for symbol in ACKS:
            frame = self.source.probe(symbol, lo, hi, "irq")
            if frame is None:
                continue
            if symbol.startswith("lateeoi"):
                yield event(frame, "flow.mask", symbol, obj=pl.col("irq"), val=EOI_PENDING, rank=-1)
            yield event(frame, "flow.ack", symbol, obj=pl.col("irq"))
        frame = self.source.probe("eoi_pirq", lo, hi, "irq")
        if frame is not None:
            late = pl.col("irq").is_in(list(self.found.fasteoi))
            yield event(frame.filter(~late), "flow.ack", "eoi_pirq", obj=pl.col("irq"))
            yield event(frame.filter(late), "flow.eoi", "eoi_pirq", obj=pl.col("irq"))
        name = "xen_irq_lateeoi" if self.source.probed("xen_irq_lateeoi") else "xen_irq_lateeoi_locked"
        frame = self.source.probe(name, lo, hi, "irq", "flags")
        if frame is not None:
            frame = frame.filter(pl.col("irq").is_not_null())
            yield event(frame, "flow.lateeoi", name, obj=pl.col("irq"), flags=pl.col("arg_flags").fill_null(0) & 1)
        for kind, symbol in (("flow.disable", "disable_dynirq"), ("flow.enable", "enable_dynirq")):
            frame = self.source.probe(symbol, lo, hi, "irq")
            if frame is not None:
                yield event(frame, kind, symbol, obj=pl.col("irq"), conf=80)

