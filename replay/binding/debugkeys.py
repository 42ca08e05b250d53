"""Debug-key dumps (`xl debug-keys e q i z I M`, `xl dmesg`) to canonical events: state at one moment as evidence.

A dump is no recording: it shows words, not how they came about, and a state that may not last is suspicious only if it
lasts. So each dump is put at its time, and what it shows is looked at again HOLD_NS later: as the next dump of the same
key shows it, or, when there is none, as if nothing had changed (that assumption has confidence 50 and is said in the
facts). A machine that hangs is dumped because nothing changes any more; on a busy one dump twice.

With `console_timestamps=boot` a dump carries its own time. Without, it comes `before` or `after` the recordings it is
ingested with (`Context.options["snapshot"]`); before them only what does not change by itself is used: bindings and
redirection entries. What happened in between is unknown: `Context.gaps` says so to the models.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final

import polars as pl
import pyarrow as pa

from replay.binding import reading
from replay.binding.base import COLUMNS, Assembler, Bound, Context, Records, lost_events
from replay.coverage import Observation
from replay.hardware.evtchn_two_level import (
    ABI_FIFO,
    ABI_TWO_LEVEL,
    SNAP_ABI,
    SNAP_GUEST_CPU,
    SNAP_MASK,
    SNAP_NOTIFY_VCPU,
    SNAP_PENDING,
    SNAP_SEL,
    SNAP_UPCALL_MASK,
    SNAP_UPCALL_PENDING,
)
from replay.hardware.ioapic import rte_word

__all__ = ["FORMATS", "HOLD_NS", "bind", "hpet_irqs"]

FORMATS: Final = ("xen-console", "proc-interrupts", "timer-list", "lsevtchn")

#: From a dump to the second look at it (ns): longer than every threshold that a snapshot can meet but seconds.
HOLD_NS: Final = 10_000_000
#: `t_err_ns` of a dump without a time.
ANY_TIME: Final = 0xFFFFFFFF
BITS: Final = 64
#: Confidence: the words themselves, what Xen's own books say of the hardware, what is assumed.
READ, BOOKS, ASSUMED = 100, 80, 50

#: Bits of an IRQ's status in key i: IRQ_INPROGRESS, IRQ_PENDING.
_UNDER_WAY: Final = 0x5
#: VPF_blocked.
_BLOCKED: Final = 1
_RUNSTATE_BLOCKED: Final = 2
_RUNSTATE_RUNNABLE: Final = 1
#: Bits of an event word of the FIFO ABI.
_FIFO_BITS: Final = ((1 << 31, "pending"), (1 << 30, "masked"), (1 << 29, "linked"), (1 << 28, "busy"))
_DELIVERY: Final = {"Fixed": 0, "LowPri": 1, "SMI": 2, "NMI": 4, "INIT": 5, "ExINT": 7}
#: How many vector words of 64 bits a local APIC's register has.
_WORDS: Final = 4
_IRR, _ISR = 0, 1
_VIA_TYPES: Final = {"none": 0, "GSI": 1, "PCI dev": 2, "vector": 3}

#: Rules that coverage would call decidable by the kinds, though one snapshot cannot decide them.
_NOT_BY_SNAPSHOT: Final = {
    "evtchn-selector-without-upcall": "needs every send between two snapshots",
    "evtchn-upcall-without-selector": "needs every send between two snapshots",
    "evtchn-binding-mismatch": "a dump shows the hypervisor's binding only; the guest's is taken to agree",
    "evtchn-masked-pending-long": "one moment does not tell since when",
    "fifo-lost-queue-change": "one moment does not tell how often a port was rebound",
}

_NOT_BEFORE: Final = ("evtchn-stranded-pending", "evtchn-lost-wakeup-block", "fifo-pending-unlinked")

Row = dict[str, Any]


def hpet_irqs(records: Records) -> tuple[int, ...]:
    """Interrupts of HPET channels, as key i names them."""
    if "irq" not in records.tables():
        return ()
    found = records.scan("irq").filter(pl.col("type").str.starts_with("HPET")).select(pl.col("irq").unique()).collect()
    return tuple(sorted(int(i) for i in found["irq"].to_list()))


def bind(records: Records, context: Context) -> Bound:
    """All events of a dump: it is small."""
    tables = records.tables()
    if not {"evtchn", "ioapic_irq", "ioapic_rte", "vcpu", "hvm_callback"} & tables:
        why = "a snapshot without event channels, IOAPIC entries, vCPUs or HVM lines: kept as tables, read by no rule"
        return Bound({}, {"binding": why, **reading.facts(records)}, iter(()))
    dump = _Dump(records, context)
    dump.event_channels()
    dump.vcpus()
    dump.pins()
    dump.lines()
    facts: dict[str, Any] = {
        "snapshot": f"state at one moment; looked at again {HOLD_NS // 1_000_000} ms later: where there is no second "
        "dump of the same key it is assumed to have lasted (confidence 50)",
        "snapshot_end_ns": dump.end + HOLD_NS,
        "domains": dump.domains(),
        **reading.facts(records),
    }
    if hpet_irqs(records):
        facts["hpet_irqs"] = list(hpet_irqs(records))
    if dump.abis:
        facts["evtchn_sub"] = "mixed" if len(dump.abis) > 1 else "fifo" if ABI_FIFO in dump.abis else ""
        blind = dict(_NOT_BY_SNAPSHOT)
        if dump.before:
            blind |= dict.fromkeys(_NOT_BEFORE, "a dump of before gives bindings only")
        facts["blind"] = blind
    return Bound(dump.observed, facts, dump.batches())


class _Dump:
    """The events of a dump while they are collected. `held` are looks that a later dump of the key makes needless."""

    def __init__(self, records: Records, context: Context) -> None:
        self.records = records
        self.context = context
        self.before = context.options.get("snapshot") == "before"
        self.stamped = context.unit == "ns"
        self.observed: dict[str, Observation] = {}
        self.abis: set[int] = set()
        self.doms: dict[int, int] = {}
        self.rows: list[Row] = []
        self.twice = False
        self.base = min((self._first(t) for t in records.tables()), default=0)
        self.end = self.base

    def _first(self, table: str) -> int:
        value = self.records.scan(table).select(pl.col("t_ns").min()).collect().item()
        return int(value) if value is not None else 0

    def _read(self, table: str, *, last: bool = False) -> list[Row]:
        """Rows of a table, in order; `last`: of the last dump of its key."""
        if table not in self.records.tables():
            return []
        frame = self.records.scan(table).collect()
        if last:
            frame = frame.filter(pl.col("snapshot") == pl.col("snapshot").max())
        return frame.sort("seq").to_dicts()

    def put(self, at: Row, kind: str, conf: int, how: str, *, later: int = 0, **fields: Any) -> None:
        """An event told by row `at`; `later` looks HOLD_NS after the dump."""
        t = int(at["t_ns"]) if self.stamped else self.base + int(at["snapshot"]) * HOLD_NS
        error = int(at["t_err_ns"] or 0) if self.stamped else ANY_TIME
        t += later * HOLD_NS
        self.end = max(self.end, t)
        self.rows.append(
            {"t_ns": t, "t_err_ns": error, "src_seq": at["seq"], "rank": 0, "kind": kind,
             "flags": 0, "conf": conf, "offset": at["offset"], "raw_kind": how, **fields}
        )  # fmt: skip

    def see(self, kind: str, conf: int, how: str) -> None:
        """A kind of event that the dump shows."""
        before = self.observed.get(kind)
        if before is None or before.conf < conf:
            self.observed[kind] = Observation(conf, how)

    def lasting(self, kind: str, twice: bool, how: str) -> None:
        """A kind that time-outs read: sure only where a second dump shows whether it lasted."""
        self.see(kind, READ if twice else ASSUMED, how if twice else f"{how}; one dump, assumed to last")

    def _twice(self, table: str) -> bool:
        """Whether the key of a table was pressed more than once."""
        if table not in self.records.tables():
            return False
        return int(self.records.scan(table).select(pl.col("snapshot").n_unique()).collect().item()) > 1

    def domains(self) -> dict[str, int]:
        """Domains and how many vCPUs they have, as far as seen."""
        return {str(dom): n for dom, n in sorted(self.doms.items())}

    # -- key e -------------------------------------------------------------------------------------------------

    def event_channels(self) -> None:
        """Words of the two-level ABI, or the event words of the FIFO ABI."""
        dumps: dict[tuple[int, int], list[Row]] = {}
        for row in self._read("evtchn"):
            if row["dom"] is not None and row["abi"] is not None and row["state"] != "free":
                dumps.setdefault((row["snapshot"], row["dom"]), []).append(row)
        last = max((snapshot for snapshot, _ in dumps), default=0)
        self.twice = len({snapshot for snapshot, _ in dumps}) > 1
        for (snapshot, dom), ports in sorted(dumps.items()):
            self.doms[dom] = max(self.doms.get(dom, 0), 1 + max(p["vcpu"] or 0 for p in ports))
            fifo = ports[0]["abi"] == "fifo"
            self.abis.add(ABI_FIFO if fifo else ABI_TWO_LEVEL)
            self._word(ports[0], dom, None, SNAP_ABI, 0, ABI_FIFO if fifo else ABI_TWO_LEVEL)
            if fifo:
                self._fifo(dom, ports, last=snapshot == last)
            else:
                self._two_level(dom, ports, last=snapshot == last)

    def _word(self, at: Row, dom: int, vcpu: int | None, what: int, index: int, value: int, **more: Any) -> None:
        signed = value - (1 << 64) if value >> 63 else value
        how, conf = more.pop("how", "key e"), more.pop("conf", READ)
        self.put(at, "evtchn.snapshot", conf, how, dom=dom, vcpu=vcpu, obj=what, tgt=index, val=signed, **more)

    def _two_level(self, dom: int, ports: list[Row], *, last: bool) -> None:
        what = "key e: pending, mask, selector of each port, and the vCPU notified"
        self.lasting("evtchn.snapshot", self.twice, what)
        lasts = ASSUMED if last else READ  # rules about time-outs take the words to stay as they are
        words: dict[int, list[Row]] = {}
        for row in ports:
            words.setdefault(row["port"] // BITS, []).append(row)
            self._word(row, dom, None, SNAP_NOTIFY_VCPU, row["port"], row["vcpu"] or 0)
            self._word(row, dom, None, SNAP_GUEST_CPU, row["port"], row["vcpu"] or 0,
                       how="the guest's binding is taken to agree", conf=ASSUMED)  # fmt: skip
        if self.before:
            return
        selectors: dict[int, int] = {}
        for word, rows in sorted(words.items()):
            pending = sum(1 << r["port"] % BITS for r in rows if r["pending"])
            masked = sum(1 << r["port"] % BITS for r in rows if r["masked"])
            self._word(rows[0], dom, None, SNAP_PENDING, word, pending, conf=lasts)
            self._word(rows[0], dom, None, SNAP_MASK, word, masked, conf=lasts)
            for r in rows:
                selectors.setdefault(r["vcpu"] or 0, 0)
                selectors[r["vcpu"] or 0] |= bool(r["selector"]) << word
        for vcpu, selector in sorted(selectors.items()):
            row = next(r for r in ports if (r["vcpu"] or 0) == vcpu)
            # Whether the guest is scanning just now no dump shows; a scan takes microseconds.
            self.put(row, "evtchn.upcall_end", ASSUMED, "no scan is running", dom=dom, vcpu=vcpu)
            self._word(row, dom, vcpu, SNAP_SEL, 0, selector)
            if last:
                self._word(row, dom, vcpu, SNAP_SEL, 0, selector, later=1, how="assumed to last", conf=ASSUMED)

    def _fifo(self, dom: int, ports: list[Row], *, last: bool) -> None:
        if self.before:
            return
        for row in ports:
            if row["linked"] is None:
                continue  # its page is not mapped
            word = sum(bit for bit, name in _FIFO_BITS if row[name]) | (row["link"] or 0)
            self.put(row, "evtchn.bind_vcpu", READ, "key e", dom=dom, obj=row["port"], tgt=row["vcpu"] or 0)
            self.put(row, "fifo.word", ASSUMED if last else READ, "key e", dom=dom, obj=row["port"], val=word)
        self.lasting("fifo.word", self.twice, "key e: the event word of each port")

    # -- key q -------------------------------------------------------------------------------------------------

    def vcpus(self) -> None:
        """Upcall bytes, and who runs or blocks."""
        if self.before:
            return
        twice = self._twice("vcpu")
        pauses = {(r["snapshot"], r["dom"], r["vcpu"]): r for r in self._read("vcpu_pause")}
        for row in self._read("vcpu"):
            dom, vcpu = row["dom"], row["vcpu"]
            if dom is None or vcpu is None:
                continue
            self.doms[dom] = max(self.doms.get(dom, 0), 1 + vcpu)
            for what, name in ((SNAP_UPCALL_MASK, "upcall_mask"), (SNAP_UPCALL_PENDING, "upcall_pending")):
                if row[name] is not None:
                    self._word(row, dom, vcpu, what, 0, row[name], how="key q")
            self.lasting("evtchn.snapshot", twice, "key q: upcall bytes of each vCPU")
            who = {"dom": dom, "vcpu": vcpu, "cpu": row["cpu"]}
            pause = pauses.get((row["snapshot"], dom, vcpu))
            if row["running"] == "T":
                self.put(row, "sched.run", READ, "key q", **who)
            elif pause is not None and pause["pause_flags"] is not None:
                state = _RUNSTATE_BLOCKED if pause["pause_flags"] & _BLOCKED else _RUNSTATE_RUNNABLE
                self.put(row, "sched.stop", BOOKS, "key q", **who, val=state)
            self.see("sched.run", READ, "key q: has=T")
            self.see("sched.stop", BOOKS, "key q: pause flags")

    # -- keys i and z ------------------------------------------------------------------------------------------

    def pins(self) -> None:
        """Redirection entries as read from the IOAPIC, Remote IRR, and which vectors Xen itself is working on."""
        entries = self._read("ioapic_rte", last=True)
        several = any(r["ioapic"] for r in entries)
        pins: dict[int, tuple[Row, int, bool, bool]] = {}
        for r in entries:
            word = rte_word(r["vector"], level=r["level"], masked=r["masked"], dest=r["dest"] or 0,
                            logical=r["dest_mode"] or 0, delivery=r["delivery_mode"] or 0)  # fmt: skip
            pins[(r["ioapic"] or 0) << 8 | r["pin"] if several else r["pin"]] = (r, word, r["level"], r["remote_irr"])
        for r in [] if entries else self._read("ioapic_irq", last=True):
            level = r["trigger"] == "L"
            word = rte_word(r["vector"], level=level, masked=r["masked"], dest=r["dest"] or 0,
                            logical=r["dest_mode"] == "L", delivery=_DELIVERY.get(r["delivery"], 0))  # fmt: skip
            pins[r["pin"]] = (r, word, level, r["remote_irr"])
        for pin, (r, word, level, remote) in sorted(pins.items()):
            self.put(r, "ioapic.rte", READ, "key z or i", obj=pin, val=word & 0xFF, val2=word)
            if level and not self.before:
                self.put(r, "ioapic.remote_irr", READ, "key z or i", obj=pin, val=int(remote))
        if not pins:
            return
        self.see("ioapic.rte", READ, "keys z and i: redirection entries")
        if self.before:
            return
        self.see("ioapic.remote_irr", READ, "keys z and i")
        self._local_apics(next(reversed(pins.values()))[0])

    def _local_apics(self, at: Row) -> None:
        """No key dumps the physical local APICs: what is in service there Xen's own books say (key i)."""
        irqs = self._read("irq", last=True)
        if not irqs:
            return
        cpus: set[int] = set()
        busy: dict[int, int] = {}
        for r in irqs:
            at_cpus = _cpus(r["effective"])
            cpus |= at_cpus | _cpus(r["affinity"])
            if (r["status"] or 0) & _UNDER_WAY or r["in_flight"]:
                for cpu in at_cpus or {0}:
                    busy[cpu] = busy.get(cpu, 0) | 1 << r["vector"]
        self.see("lapic.snapshot", ASSUMED, "key i: handlers in progress and guests' interrupts in flight")
        for cpu in sorted(cpus):
            for register in (_IRR, _ISR):
                vectors = busy.get(cpu, 0) if register == _ISR else 0
                for word in range(_WORDS):
                    value = vectors >> 64 * word & (1 << 64) - 1
                    signed = value - (1 << 64) if value >> 63 else value
                    self.put(at, "lapic.snapshot", ASSUMED, "key i", cpu=cpu, obj=register, tgt=word, val=signed)
        self.put(at, "ioapic.check", ASSUMED, "assumed to last", later=1)

    # -- key I -------------------------------------------------------------------------------------------------

    def lines(self) -> None:
        """How upcalls reach HVM domains, whether the line is asserted, and vCPU 0's flag (key q) against it."""
        flags = {r["dom"]: r["upcall_pending"] for r in self._read("vcpu", last=True) if r["vcpu"] == 0}
        counts: dict[tuple[int, int], list[int]] = {}
        for r in self._read("hvm_gsi", last=True):
            counts[r["dom"], r["first"]] = [int(n) for n in r["counts"].split()]
        for r in self._read("hvm_callback", last=True):
            via = _VIA_TYPES.get(r["via"], int(r["via"]) if r["via"].isdigit() else 0)
            gsi = _gsi(via, r["number"] or "")
            self.put(r, "via.set_param", READ, "key I", dom=r["dom"], val=via, obj=gsi)
            self.see("via.set_param", READ, "key I")
            if self.before or via not in (1, 2):
                continue
            count = next((c[gsi - f] for (d, f), c in counts.items()
                          if d == r["dom"] and gsi is not None and 0 <= gsi - f < len(c)), None)  # fmt: skip
            asserted = int(r["asserted"] is None if r["via"].isdigit() else r["asserted"] is not None)
            self.put(r, "via.line", READ, "key I", dom=r["dom"], obj=gsi, val=asserted, val2=count)
            self.lasting("via.line", self._twice("hvm_callback"), "key I: callback asserted, and the GSI's count")
            if flags.get(r["dom"]):
                self.put(r, "via.upcall_set", BOOKS, "key q: set by then", dom=r["dom"], vcpu=0)
            if r["dom"] in flags:
                self.see("via.upcall_set", BOOKS, "key q: evtchn_upcall_pending of vCPU 0")

    def batches(self) -> Iterator[pa.Table]:
        """Everything, in order."""
        if not self.rows:
            return
        assembler = Assembler(self.context.source)
        frame = pl.DataFrame(self.rows, schema_overrides=dict(COLUMNS), infer_schema_length=None)
        missing = [pl.lit(None).cast(dtype).alias(name) for name, dtype in COLUMNS.items() if name not in frame.columns]
        frame = frame.with_columns(missing).select(list(COLUMNS))
        # In the order in which they were put: bits before what reads them.
        frame = frame.with_row_index("n").sort("t_ns", "n").drop("n").with_columns(src_seq=pl.col("src_seq").cum_max())
        table = assembler.push([lost_events(self.context), frame], None)
        if table is not None:
            yield table


def _cpus(text: str | None) -> set[int]:
    """CPUs of a list such as 0-3,7; absurd ones are left out."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d{1,4})(?:-(\d{1,4}))?", text or ""):
        low, high = int(first), int(last or first)
        if high - low <= 1024:
            found.update(range(low, high + 1))
    return found


def _gsi(via: int, number: str) -> int | None:
    """The GSI of the callback: as given, or by the wiring of a PCI INTx (hvm_pci_intx_gsi)."""
    if via == 1:
        return int(number, 0) if re.fullmatch(r"\d+|0x[0-9a-fA-F]+", number) else None
    if via != 2:
        return None
    if packed := re.fullmatch(r"0x([0-9a-fA-F]{1,4})", number):  # older Xen: device in the low byte, pin in the next
        device, pin = int(packed[1], 16) & 0xFF, int(packed[1], 16) >> 8 & 3
    elif named := re.fullmatch(r"(\d{1,2})(?: INTx ([A-D0-3]))?", number):
        device, pin = int(named[1]), "ABCD".find(named[2]) if (named[2] or "").isalpha() else int(named[2] or 0)
    else:
        return None
    return ((device << 2) + (device >> 3) + pin & 31) + 16

