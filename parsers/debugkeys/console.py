"""Debug-key dumps inside a Xen console log: serial console, `xl dmesg`, with anything else in between."""

from __future__ import annotations

import re
from typing import Any, ClassVar

from parsers.debugkeys.dumptables import TABLES
from parsers.debugkeys.grammar import EVTCHN_STATES, RULES, Rule
from parsers.debugkeys.rows import Row, TextReader, convert
from parsers.recording import ClockModel

__all__ = ["XenConsoleReader"]

#: "(XEN) ", then the stamp of `console_timestamps`: boot "[   12.345678] ", date "[2026-11-21 09:00:00] ", raw.
_PREFIX = re.compile(
    r"^\r?\(XEN\) (?:\[(?:\s*(?P<s>\d{1,10})\.(?P<us>\d{6})|(?P<raw>[0-9a-f]{16})|"
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{3})?)\] )?"
)
_BOOT_STAMP = re.compile(rb"^\r?\(XEN\) \[\s*(\d{1,10})\.(\d{6})\] ", re.M)
_GUEST = re.compile(r"d(?P<dom>\d+):\s*(?P<pirq>\d+)\((?P<pending>[-P?])(?P<masked>[-M?])(?P<held>[-M])\)")
#: ≤ 4.8: pending, masked (S the guest's shared mask), M held; four marks.
_GUEST_OLD = re.compile(r"(?P<dom>\d+):\s*(?P<pirq>\d+)\((?P<pending>[-P])(?P<masked>[-M])(?P<marks>[-A-Z]{2})\)")
#: Lines that are recognised anywhere: the dump whose ordinal they carry, if it is not called like their table.
_COUNTED = {"xen_now": "sched", "sched_unit": "sched", "cpu_current": "sched", "virq_notified": "domain"}
_PAIR = re.compile(r"(\w)=(\S+)")
_FIFO = re.compile(r"^(?P<busy>[B ]) (?P<link>\d+|-)\s*$")


class XenConsoleReader(TextReader):
    """Debug-key dumps in a console log. See `parsers.recording.Reader`; the tables are those of `debugkeys.grammar`.

    `snapshot` is the ordinal of the dump of its kind. With `console_timestamps=boot` rows carry the stamp (microseconds
    since Xen's boot) in `tsc`; without, `t_ns` counts lines. `cpu` is the CPU that a row is about (timers, C-states).
    """

    format: ClassVar[str] = "xen-console"
    TABLES = TABLES
    RECOGNISE = re.compile(
        rb"^\r?\(XEN\) |^'.' pressed -> |^IRQ information:|^Event channel information for domain \d", re.M
    )
    STAMP_ERROR = 999

    def start(self, head: bytes) -> None:
        """Finds out whether the console stamps its lines."""
        self._snapshots: dict[str, int] = {}
        self._section: str | None = None
        self._context: dict[str, str | None] = {}
        self._us = 0
        self._stamp: int | None = None
        self._bare = b"(XEN) " not in head  # a dump pasted without the console's prefix
        found = _BOOT_STAMP.search(head)
        if found:
            self._us = int(found[1]) * 1_000_000 + int(found[2])
            self.clock = ClockModel("us", 1e6, self._us, "ns", "console_timestamps=boot")

    def _time(self, row: Row) -> int:
        return max((row.tsc if row.tsc is not None else row.at) - self.clock.tsc0, 0) * 1000

    def last_stamp(self) -> int:
        """Microseconds since Xen's boot."""
        return self._us

    def line(self, text: str) -> list[Row]:
        """Rows of one console line."""
        prefix = _PREFIX.match(text)
        if prefix is None and not self._bare:
            return []  # a guest's or dom0's own line
        self._stamp = None
        if prefix is not None and prefix["s"] is not None:
            # Stamps are taken before the console lock, so neighbours may be swapped by microseconds.
            self._us = self._stamp = max(self._us, int(prefix["s"]) * 1_000_000 + int(prefix["us"]))
        body = text if prefix is None else text[prefix.end() :]
        for rule in RULES:
            if rule.within is not None and rule.within != self._section:
                continue
            match = rule.pattern.match(body)
            if match:
                rows = self._rows(rule, match.groupdict())
                for row in rows:
                    row.tsc = self._stamp
                return rows
        return []

    def _rows(self, rule: Rule, groups: dict[str, str | None]) -> list[Row]:
        if rule.enter is not None:
            self._enter(rule.enter, groups)
        values = {**{name: self._context.get(name) for name in rule.uses}, **groups}
        self._context.update({name: groups[name] for name in rule.sets})
        cpu = int(values["cpu"]) if values.get("cpu") is not None else None  # type: ignore[arg-type]
        values["kind"] = self._section
        section = rule.within or rule.enter or _COUNTED.get(rule.table, rule.table)
        if section not in self._snapshots:
            self._snapshots[section] = 0
        base: dict[str, Any] = {"snapshot": self._snapshots[section]}
        kinds = TABLES[rule.table][1]
        if rule.table == "evtchn":
            values |= _evtchn(values)
        if rule.table == "irq_pin":
            pins = re.findall(r"(\d+):(\d+)", values.pop("pins") or "")
            return [Row("irq_pin", base | convert(kinds, {**values, "ioapic": a, "pin": p})) for a, p in pins]
        rows = [Row(rule.table, base | convert(kinds, values), cpu)]
        if rule.table == "irq":
            rows += self._guests(rows[0], base)
        return rows

    def _guests(self, irq: Row, base: dict[str, Any]) -> list[Row]:
        handler = irq.values.get("handler") or ""
        found = list(_GUEST.finditer(handler)) or list(_GUEST_OLD.finditer(handler))
        if not found:
            return []
        irq.values["handler"] = None
        kinds = TABLES["irq_guest"][1]
        number = {"irq": irq.values["irq"]}
        return [Row("irq_guest", base | number | convert(kinds, m.groupdict())) for m in found]

    def _enter(self, section: str, groups: dict[str, str | None]) -> None:
        """A heading: a new dump of its kind, unless it continues the one that is open."""
        dom, last = groups.get("dom"), self._context.get("dom")
        again = section != self._section
        if not again and section in ("evtchn", "domain"):
            # One heading for each domain, in ascending order, after the line that says the key was pressed.
            again = dom is None or (last is not None and int(dom) < int(last)) or (section == "evtchn" and dom == last)
        elif section == "ioapic":
            again = again or groups.get("ioapic") is None
        if again:
            self._snapshots[section] = self._snapshots.get(section, -1) + 1
            self._context = {}
        self._section = section


def _evtchn(values: dict[str, str | None]) -> dict[str, str | None]:
    """The third field of `[p/m/s]`, the state's name and the trailing pairs, whose meaning depends on the state."""
    out: dict[str, str | None] = {}
    queue = values.pop("queue", None)
    fifo = _FIFO.match(queue) if queue is not None else None
    if queue is not None and queue.strip() in ("0", "1") and len(queue) == 1:
        out |= {"abi": "2l", "selector": queue}
    elif fifo:
        linked = fifo["link"] != "-"
        out |= {"abi": "fifo", "linked": str(int(linked)), "busy": str(int(fifo["busy"] == "B"))}
        out["link"] = fifo["link"] if linked else None
    elif queue is not None and queue.strip() == "?":
        out["abi"] = "fifo"  # the page with this event word is not mapped
    state = int(values.pop("s") or 0)
    out["state"] = EVTCHN_STATES[state] if state < len(EVTCHN_STATES) else str(state)
    names = {"x": "consumer", "d": "remote_dom", "v": "virq", "i": "irq", "Z": "ssid"}
    for name, value in _PAIR.findall(values.pop("rest") or ""):
        if name == "p":
            out["pirq" if state == 4 else "remote_port"] = value
        elif name in names:
            out[names[name]] = value
    return out
