"""Writes what an instrumented Xen would have recorded, from the notes of the seeded simulators.

It follows docs/instrumented-xen.md word by word and shares no code with the reader: ids, packing and who writes what
are spelled out here again.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["HZ", "Writer", "struct", "write"]

#: Ticks in a ns: records of one ns keep their order (of one CPU, however many).
TICKS = 10
HZ = TICKS * 10**9
START = 7_000_000 * TICKS
NEVER = (1 << 63) - 1
ALL_TRACED = 0x0FFFF000

HPET, MWAIT, IRQ, CALLBACK, VLAPIC, EVTCHN, GUEST, VGIC, IDLE = (1 << bit for bit in range(9))
HPET_ALGORITHMS = {"current": 1, "proposed": 2, "proposed-keep": 3, "upstream-2025": 4}
VGIC_ALGORITHMS = {"naive": 1, "patch-v8": 2, "merged": 3, "merged-2017": 4, "maintenance": 5}


class Writer:
    """Records of several CPUs; `at` is the present time in ns."""

    def __init__(self) -> None:
        self.cpus: dict[int, list[bytes]] = {}
        self.at = 0
        self.cpu = 0
        self._same: Counter[int] = Counter()

    def record(self, event: int, payload: bytes = b"", *, stamped: bool = True) -> None:
        """One record of the present CPU and time."""
        assert len(payload) % 4 == 0 and len(payload) <= 28
        header = event | len(payload) // 4 << 28 | (1 << 31 if stamped else 0)
        self._same[self.at] = min(self._same[self.at] + 1, TICKS)
        stamp = struct.pack("<Q", START + self.at * TICKS + self._same[self.at] - 1) if stamped else b""
        self.cpus.setdefault(self.cpu, []).append(struct.pack("<I", header) + stamp + payload)

    def setup(self, groups: int, *, hpet: int = 0, vgic: int = 0, channels: int = 0, cpus: int = 0,
              mask: int = ALL_TRACED, version: int = 1) -> None:  # fmt: skip
        """The record that says what is recorded."""
        self.record(0x804000, struct.pack("<HBBIIHHBxxx", version, hpet, vgic, groups, mask, channels, cpus, 0x30))

    def file(self) -> bytes:
        """The recording: one window for each CPU."""
        parts = []
        for cpu, records in sorted(self.cpus.items()):
            payload = b"".join(records)
            parts.append(struct.pack("<III", 0x2001F003, cpu, len(payload)) + payload)
        return b"".join(parts)


def _who(e: Mapping[str, Any]) -> bytes:
    return struct.pack("<HH", e.get("vcpu", 0), e.get("dom", 0))


def write(events: Iterable[Mapping[str, Any]], groups: int, **setup: int) -> bytes:
    """A recording of simulator notes (times in ns, short names)."""
    w = Writer()
    w.setup(groups, **setup)
    if groups & EVTCHN:
        for vcpu in range(4):  # evtchn_pending_sel, empty
            w.record(0x100F007, struct.pack("<HHHHQ", vcpu, 0, 2, 0, 0))
    vector = 0
    notes = list(events)
    for index, e in enumerate(notes):
        w.at = e["t"]
        if "cpu" in e:
            w.cpu = e["cpu"]
        elif e["kind"].startswith(("vgic.", "via.")) and "vcpu" in e:
            w.cpu = e["vcpu"]  # vCPU n runs on CPU n
        if e["kind"] == "idle.break":
            vector = e["obj"]
            continue
        if e["kind"] == "idle.exit":
            reason = e.get("tgt", 2) or 3
            w.record(0x804007, struct.pack("<BBh", 3 if vector else reason, vector, e.get("obj", -1)))
            vector = 0
            continue
        if e["kind"] == "evtchn.send":
            _send(w, e, notes[index + 1 : index + 2])
            continue
        if e["kind"] == "evtchn.unmask":
            follows = [f["kind"] for f in notes[index + 1 : index + 4] if f["t"] == e["t"] and f.get("obj") == e["obj"]]
            if "evtchn.unmask_hypercall" not in follows:
                w.record(0x100F020, _who(e) + struct.pack("<IBxxx", e["obj"], 5))
            continue
        _WRITE[e["kind"]](w, e)
    return w.file()


def _send(w: Writer, e: Mapping[str, Any], following: list[Mapping[str, Any]]) -> None:
    """The two-level record is written after the last step, so it says whether the vCPU was notified."""
    raised = bool(following and following[0]["kind"] == "evtchn.notify" and following[0]["t"] == e["t"])
    vcpu = following[0]["vcpu"] if raised else 0
    w.record(0x100F002, struct.pack("<HHIBBBB", vcpu, e["dom"], e["obj"], 0, 0, 0, raised))


def _distance(w: Writer, t: int | None) -> int:
    return NEVER if t is None else t - w.at


def _program(w: Writer, e: Mapping[str, Any]) -> None:
    owner = e.get("tgt", -1)
    w.record(0x804001, struct.pack("<HBBhHq", e["obj"], e["val2"], 1, owner, 0, _distance(w, e.get("val"))))


def _retarget(w: Writer, e: Mapping[str, Any]) -> None:
    old, refused = e.get("val", -1), e.get("flags", 0)
    w.record(0x804002, struct.pack("<HBBhhI", e["obj"], refused, 0, old, e["tgt"], 24 + e["obj"]))


def _runstate(w: Writer, e: Mapping[str, Any]) -> None:
    """Stock record TRC_SCHED_RUNSTATE_CHANGE, runnable to running."""
    w.record(0x21101, _who(e))


def _stock(event: int, payload: bytes = b"") -> Any:
    def put(w: Writer, e: Mapping[str, Any]) -> None:
        w.record(event, payload, stamped=event >> 12 & 0xF == 1)

    return put


def _inject(w: Writer, e: Mapping[str, Any]) -> None:
    """The stock record, without stamp, and the instrumented one."""
    w.record(0x82004, struct.pack("<II", e["obj"], 0), stamped=False)
    w.record(0x88011, _who(e) + struct.pack("<I", e["obj"]))


def _eoi(w: Writer, e: Mapping[str, Any]) -> None:
    w.record(0x8200D, struct.pack("<IQ", 0x80B, 0), stamped=False)
    w.record(0x88012, _who(e) + struct.pack("<BBBB", e["obj"], 1, 0, 0))


def _cleared(w: Writer, e: Mapping[str, Any]) -> None:
    """Xen sees the flag clear only where it was set before."""
    if e.get("val", 1):
        w.record(0x88003, _who(e))


def _mark(what: int) -> Any:
    def put(w: Writer, e: Mapping[str, Any]) -> None:
        w.record(0x100F020, _who(e) + struct.pack("<IBxxx", e.get("obj", 0), what))

    return put


def _bind(how: int) -> Any:
    def put(w: Writer, e: Mapping[str, Any]) -> None:
        w.record(0x100F005, struct.pack("<HHIBBBBHHI", e["tgt"], e["dom"], e["obj"], how, e.get("val", 0),
                                        e.get("flags", 0) & 1, 0, 0, 0, 0))  # fmt: skip

    return put


def _rebind(w: Writer, e: Mapping[str, Any]) -> None:
    _bind(1)(w, e)
    w.record(0x100F020, struct.pack("<HHIBxxx", e["tgt"], e["dom"], e["obj"], 6))


def _nothing(w: Writer, e: Mapping[str, Any]) -> None:
    """Told by another record."""


def _virq(event: int, fmt: str, *fields: str) -> Any:
    def put(w: Writer, e: Mapping[str, Any]) -> None:
        w.record(event, _who(e) + struct.pack(fmt, *(e.get(f, 0) if isinstance(f, str) else f for f in fields)))

    return put


_WRITE: dict[str, Any] = {
    "idle.enter": lambda w, e: w.record(0x804006, struct.pack("<hHq", -1, 3, _distance(w, e.get("val")))),
    "hpet.program": _program,
    "hpet.retarget": _retarget,
    "hpet.fire": _nothing,
    "hpet.handler.begin": lambda w, e: w.record(0x804003, struct.pack("<HhIhH", e["obj"], 24 + e["obj"], 0, -1, 0)),
    "hpet.handler.end": lambda w, e: w.record(0x804004, struct.pack("<HH", e["obj"], 0)),
    "wake.post": lambda w, e: w.record(0x804005, struct.pack("<HH", e["tgt"], e["flags"])),
    "isr.begin": lambda w, e: w.record(0x804020, struct.pack("<BBHi", e["obj"], 0, 0, 40)),
    "isr.end": lambda w, e: w.record(0x804022, struct.pack("<BBHi", e["obj"], 0, 0, 40)),
    "idle.prep.advertise": lambda w, e: w.record(0x804010, struct.pack("<I", 0)),
    "idle.prep.arm": lambda w, e: w.record(0x804010, struct.pack("<I", 1)),
    "idle.prep.check": lambda w, e: w.record(0x804010, struct.pack("<I", 2)),
    "idle.prep.sleep": lambda w, e: w.record(0x804010, struct.pack("<I", 3)),
    "wake.sample": lambda w, e: w.record(0x804011, struct.pack("<HBB", e["tgt"], 1, 0)),
    "wake.store": lambda w, e: w.record(0x804012, struct.pack("<HBB", e["tgt"], 1, 0)),
    "sched.run": _runstate,
    "via.rte_write": lambda w, e: w.record(0x88006, struct.pack("<HHhHq", e["dom"], e["obj"], -1, 0, e["val"])),
    "via.upcall_set": lambda w, e: w.record(0x88002, _who(e)),
    "via.upcall_clear": _cleared,
    "via.vmentry": _stock(0x81001),
    "via.line": lambda w, e: w.record(
        0x88004, struct.pack("<HHBBH", e["dom"], e["obj"], e["val"], 1 - e["val"], e["val"])
    ),
    "via.inject": _inject,
    "via.eoi": _eoi,
    "evtchn.notify": _nothing,
    "evtchn.unmask_hypercall": lambda w, e: w.record(0x100F004, _who(e) + struct.pack("<IHBB", e["obj"], 0, 1, 0)),
    "evtchn.bind": _bind(0),
    "evtchn.bind_vcpu": _bind(1),
    "evtchn.rebind": _rebind,
    "evtchn.upcall": _mark(0),
    "evtchn.upcall_end": _mark(1),
    "evtchn.handled": _mark(2),
    "evtchn.clear": _mark(3),
    "evtchn.mask": _mark(4),
    "vgic.ack": _mark(16),
    "vgic.eoi": _mark(17),
    "vgic.enable": lambda w, e: w.record(0x8802A, _who(e) + struct.pack("<HBB", e["obj"], 1, 0)),
    "vgic.phys_irq": lambda w, e: w.record(0x88020, struct.pack("<HH", e["obj"], e["obj"])),
    "vgic.hyp_entry": lambda w, e: w.record(0x88029, _who(e) + struct.pack("<I", e.get("val", 0))),
    "vgic.inject": lambda w, e: w.record(0x88021, _who(e) + struct.pack("<HH", e["obj"], 0)),
    "vgic.lr_write": lambda w, e: w.record(0x88022, _who(e) + struct.pack("<HBxQ", e["obj"], e["tgt"], e["val"])),
    "vgic.lr_clear": lambda w, e: w.record(0x88023, _who(e) + struct.pack("<HBB", e["obj"], e["tgt"], 0)),
    "vgic.itargets": lambda w, e: w.record(0x88024, _who(e) + struct.pack("<HHBxxx", e["obj"], e["tgt"], 0)),
    "vgic.affinity": lambda w, e: w.record(0x88028, struct.pack("<HhhH", e["obj"], e.get("val", -1), e["tgt"], 0)),
    "vgic.sgi": lambda w, e: w.record(0x88025, struct.pack("<HH", e["tgt"], 0)),
    "vgic.maint": lambda w, e: w.record(0x88026, struct.pack("<I", e.get("val", 0) or 0)),
    "vgic.deactivate": lambda w, e: w.record(0x88027, struct.pack("<HH", e["obj"], e["obj"])),
}
